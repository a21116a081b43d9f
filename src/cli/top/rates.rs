//! What two looks say of the time between them.
//!
//! Counters begin anew when a LUN is started again. One that has gone backwards says so, and then there are no rates for that time, rather than
//! absurd ones. (A LUN that was started again and has already counted beyond where it was cannot be told from one that went on: its rate is too low,
//! for that one time.)

use serde::Serialize;

use super::sample::{Histogram, Job, Lun, Sample, Times, Traffic};
use crate::pi::Counters;

/// What is shown.
#[derive(Debug, Clone, Serialize)]
pub struct View {
    /// The time that the rates are of; there are none without.
    pub interval_seconds: Option<f64>,
    /// By name.
    pub luns: Vec<Row>,
    /// Jobs under way.
    pub jobs: Vec<Job>,
}

/// One LUN. What is not known is null in JSON.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// `online`, `stopped`, `failed`, `silent`.
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// `off`, `type1`, `type2`, `type3`.
    pub pi: String,
    /// Commands under way.
    pub in_flight: Option<u64>,
    /// Over the interval.
    pub rates: Option<Rates>,
    /// Since the LUN started.
    pub totals: Option<Traffic>,
    /// Since the LUN started, in blocks.
    pub protection: Option<Counters>,
}

/// How long commands of one kind took, in microseconds: half of them, 99 and 99.9 of a hundred no longer than that. Within a factor of two, as
/// the bins are, and interpolated there as Prometheus does.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// The median.
    pub p50_us: f64,
    /// 99 %.
    pub p99_us: f64,
    /// 99.9 %.
    pub p999_us: f64,
}

/// How long commands took; nothing where there were none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Reads.
    pub read: Option<Percentiles>,
    /// Writes.
    pub write: Option<Percentiles>,
    /// SYNCHRONIZE CACHE.
    pub flush: Option<Percentiles>,
    /// Reads and writes together.
    pub read_write: Option<Percentiles>,
}

/// What happened in a second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    /// Reads.
    pub rd_operations: f64,
    /// Writes.
    pub wr_operations: f64,
    /// UNMAP and its kin.
    pub unmap_operations: f64,
    /// SYNCHRONIZE CACHE.
    pub flush_operations: f64,
    /// Bytes read.
    pub rd_bytes: f64,
    /// Bytes written.
    pub wr_bytes: f64,
    /// Blocks whose protection information was compared and right; none for a LUN without.
    pub verified: Option<f64>,
    /// Commands under way, on the average: the time that all took together, by the time that has passed.
    pub queue_depth: Option<f64>,
    /// Of the commands that ended in the interval.
    pub latency: Latency,
}

/// What is in a histogram and was not in it before; nothing if that makes no sense.
fn since(before: &Histogram, after: &Histogram) -> Option<Histogram> {
    if before.boundaries != after.boundaries || before.bins.len() != after.bins.len() {
        return None;
    }
    let bins = after.bins.iter().zip(&before.bins).map(|(new, old)| new.checked_sub(*old));
    Some(Histogram { boundaries: after.boundaries.clone(), bins: bins.collect::<Option<_>>()? })
}

fn together(a: &Histogram, b: &Histogram) -> Histogram {
    let bins = a.bins.iter().zip(&b.bins).map(|(a, b)| a + b).collect();
    Histogram { boundaries: a.boundaries.clone(), bins }
}

/// How long that share of the commands took at most, in microseconds. In the last bin, which has no end, it is where that begins.
fn percentile(took: &Histogram, share: f64) -> Option<f64> {
    let all: u64 = took.bins.iter().sum();
    if all == 0 {
        return None;
    }
    let rank = share * all as f64;
    let mut below = 0;
    for (i, bin) in took.bins.iter().enumerate().filter(|(_, bin)| **bin > 0) {
        let from = i.checked_sub(1).and_then(|i| took.boundaries.get(i)).map_or(0.0, |ns| *ns as f64);
        let Some(to) = took.boundaries.get(i) else { return Some(from / 1e3) };
        if (below + bin) as f64 >= rank {
            let part = (rank - below as f64) / *bin as f64;
            return Some((from + (*to as f64 - from) * part) / 1e3);
        }
        below += bin;
    }
    None
}

fn percentiles(took: &Histogram) -> Option<Percentiles> {
    Some(Percentiles {
        p50_us: percentile(took, 0.5)?,
        p99_us: percentile(took, 0.99)?,
        p999_us: percentile(took, 0.999)?,
    })
}

/// Latency and queue depth of the time between two measurements; `None` if the counters began anew.
fn waited(before: &Times, after: &Times, seconds: f64) -> Option<(Latency, f64)> {
    let total = |of: fn(&Times) -> u64| of(after).checked_sub(of(before));
    let ns = total(|t| t.rd_total_time_ns)?
        + total(|t| t.wr_total_time_ns)?
        + total(|t| t.unmap_total_time_ns)?
        + total(|t| t.flush_total_time_ns)?;
    let read = since(&before.rd_latency_histogram, &after.rd_latency_histogram)?;
    let write = since(&before.wr_latency_histogram, &after.wr_latency_histogram)?;
    let flush = since(&before.flush_latency_histogram, &after.flush_latency_histogram)?;
    let latency = Latency {
        read: percentiles(&read),
        write: percentiles(&write),
        flush: percentiles(&flush),
        read_write: percentiles(&together(&read, &write)),
    };
    Some((latency, ns as f64 / 1e9 / seconds))
}

/// The rates of the `seconds` between two states of a LUN; nothing if that cannot be said.
pub fn between(before: &Lun, after: &Lun, seconds: f64) -> Option<Rates> {
    let (old, new) = (before.traffic?, after.traffic?);
    if seconds <= 0.0 {
        return None;
    }
    let rate = |of: fn(&Traffic) -> u64| Some(of(&new).checked_sub(of(&old))? as f64 / seconds);
    let verified = match (before.protection, after.protection) {
        (Some(old), Some(new)) => Some(new.verified.checked_sub(old.verified)? as f64 / seconds),
        _ => None,
    };
    let waited = match (&before.times, &after.times) {
        (Some(old), Some(new)) => Some(waited(old, new, seconds)?),
        _ => None,
    };
    Some(Rates {
        queue_depth: waited.map(|(_, depth)| depth),
        latency: waited.map(|(latency, _)| latency).unwrap_or_default(),
        rd_operations: rate(|t| t.rd_operations)?,
        wr_operations: rate(|t| t.wr_operations)?,
        unmap_operations: rate(|t| t.unmap_operations)?,
        flush_operations: rate(|t| t.flush_operations)?,
        rd_bytes: rate(|t| t.rd_bytes)?,
        wr_bytes: rate(|t| t.wr_bytes)?,
        verified,
    })
}

/// What is shown after a look, with the one before it.
pub fn view(before: Option<&Sample>, after: Sample) -> View {
    let seconds = before.and_then(|b| after.at.checked_sub(b.at)).map(|time| time.as_secs_f64());
    let row = |lun: Lun| {
        let earlier = before.and_then(|b| b.luns.iter().find(|l| l.name == lun.name));
        let rates = earlier.zip(seconds).and_then(|(earlier, seconds)| between(earlier, &lun, seconds));
        Row {
            rates,
            name: lun.name,
            state: lun.state,
            reason: lun.reason,
            pi: lun.pi,
            in_flight: lun.in_flight,
            totals: lun.traffic,
            protection: lun.protection,
        }
    };
    View { interval_seconds: seconds, luns: after.luns.into_iter().map(row).collect(), jobs: after.jobs }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::time::Duration;

    /// Bins that end at 1, 2 and 4 µs, with that many commands.
    fn bins(counted: [u64; 4]) -> Histogram {
        Histogram { boundaries: vec![1000, 2000, 4000], bins: counted.to_vec() }
    }

    /// Every read took 2 µs at most and every write 4.
    fn times(counted: u64) -> Times {
        Times {
            rd_total_time_ns: counted * 1500,
            wr_total_time_ns: counted / 2 * 3000,
            unmap_total_time_ns: 0,
            flush_total_time_ns: 1,
            rd_latency_histogram: bins([0, counted, 0, 0]),
            wr_latency_histogram: bins([0, 0, counted / 2, 0]),
            flush_latency_histogram: bins([0, 1, 0, 0]),
        }
    }

    /// A LUN that has counted that much of everything.
    pub fn lun(name: &str, counted: u64) -> Lun {
        Lun {
            name: name.to_owned(),
            state: "online".to_owned(),
            reason: None,
            pi: "type1".to_owned(),
            in_flight: Some(3),
            traffic: Some(Traffic {
                rd_operations: counted,
                wr_operations: counted / 2,
                unmap_operations: 0,
                flush_operations: 1,
                rd_bytes: counted * 4096,
                wr_bytes: counted * 2048,
            }),
            times: Some(times(counted)),
            protection: Some(Counters {
                verified: counted * 8,
                generated: counted * 4,
                guard_errors: 0,
                app_errors: 0,
                ref_errors: 0,
                unprotected: 0,
                recomputed: 0,
                torn: 0,
                repaired: 0,
                unchecked: 0,
            }),
        }
    }

    #[test]
    fn a_rate_is_the_difference_over_the_time() {
        let rates = between(&lun("a", 1000), &lun("a", 3000), 2.0).unwrap();
        assert_eq!((rates.rd_operations, rates.wr_operations), (1000.0, 500.0));
        assert_eq!((rates.rd_bytes, rates.wr_bytes), (4_096_000.0, 2_048_000.0));
        assert_eq!((rates.unmap_operations, rates.flush_operations), (0.0, 0.0));
        assert_eq!(rates.verified, Some(8000.0));
    }

    #[test]
    fn percentiles_are_of_the_commands_of_the_interval_and_interpolated_in_their_bin() {
        let took = |counted| percentiles(&bins(counted)).unwrap();
        // Of 1000 the 500th is the last of the first bin, the 990th and the 999th lie in the third.
        let p = took([500, 400, 100, 0]);
        assert_eq!(p.p50_us, 1.0);
        assert!((p.p99_us - 3.8).abs() < 1e-9 && (p.p999_us - 3.98).abs() < 1e-9, "{p:?}");
        assert_eq!(took([1, 0, 0, 0]).p50_us, 0.5);
        // Nobody knows how long those of the last bin took.
        assert_eq!(took([0, 0, 0, 7]).p50_us, 4.0);
        assert_eq!(percentiles(&bins([0; 4])), None);

        let rates = between(&lun("a", 1000), &lun("a", 3000), 2.0).unwrap();
        let latency = rates.latency;
        assert_eq!((latency.read.unwrap().p50_us, latency.write.unwrap().p50_us), (1.5, 3.0));
        // Two reads for each write.
        assert_eq!(latency.read_write.unwrap().p50_us, 1.75);
        assert_eq!(latency.flush, None);
        // 2000 reads of 1.5 µs and 1000 writes of 3 µs in two seconds.
        assert!((rates.queue_depth.unwrap() - 0.003).abs() < 1e-12, "{rates:?}");
    }

    #[test]
    fn counters_that_began_anew_give_no_rates_instead_of_absurd_ones() {
        assert_eq!(between(&lun("a", 1000), &lun("a", 10), 1.0), None);
        // One of them is enough.
        let mut one = lun("a", 2000);
        one.traffic.as_mut().unwrap().flush_operations = 0;
        assert_eq!(between(&lun("a", 1000), &one, 1.0), None);
        let mut bins = lun("a", 2000);
        bins.times.as_mut().unwrap().rd_latency_histogram.bins[1] = 5;
        assert_eq!(between(&lun("a", 1000), &bins, 1.0), None);
        let mut tuples = lun("a", 2000);
        tuples.protection.as_mut().unwrap().verified = 0;
        assert_eq!(between(&lun("a", 1000), &tuples, 1.0), None);
    }

    #[test]
    fn what_is_not_known_at_both_ends_has_no_rate() {
        let silent = Lun { traffic: None, times: None, protection: None, in_flight: None, ..lun("a", 0) };
        assert_eq!(between(&silent, &lun("a", 10), 1.0), None);
        assert_eq!(between(&lun("a", 10), &silent, 1.0), None);
        let plain = |n| Lun { protection: None, ..lun("a", n) };
        assert_eq!(between(&plain(0), &plain(10), 1.0).unwrap().verified, None);
        assert_eq!(between(&lun("a", 0), &lun("a", 10), 0.0), None);
    }

    #[test]
    fn a_lun_that_has_just_come_is_shown_without_rates() {
        let sample = |at, luns| Sample { at: Duration::from_secs(at), luns, jobs: Vec::new() };
        let first = view(None, sample(1, vec![lun("a", 5)]));
        assert_eq!((first.interval_seconds, first.luns[0].rates), (None, None));
        let before = sample(1, vec![lun("a", 5), lun("gone", 9)]);
        let second = view(Some(&before), sample(3, vec![lun("a", 15), lun("new", 100)]));
        assert_eq!(second.interval_seconds, Some(2.0));
        let rates: Vec<_> =
            second.luns.iter().map(|l| (l.name.as_str(), l.rates.map(|r| r.rd_operations))).collect();
        assert_eq!(rates, [("a", Some(5.0)), ("new", None)]);
    }
}
