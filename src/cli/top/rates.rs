//! What two looks say of the time between them.
//!
//! Counters begin anew when a LUN is started again. One that has gone backwards says so, and then there are no rates for that time, rather than
//! absurd ones. (A LUN that was started again and has already counted beyond where it was cannot be told from one that went on: its rate is too low,
//! for that one time.)

use serde::Serialize;

use super::sample::{Job, Lun, Sample, Traffic};
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
    Some(Rates {
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
            protection: Some(Counters {
                verified: counted * 8,
                generated: counted * 4,
                guard_errors: 0,
                app_errors: 0,
                ref_errors: 0,
                unprotected: 0,
                recomputed: 0,
                torn: 0,
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
    fn counters_that_began_anew_give_no_rates_instead_of_absurd_ones() {
        assert_eq!(between(&lun("a", 1000), &lun("a", 10), 1.0), None);
        // One of them is enough.
        let mut one = lun("a", 2000);
        one.traffic.as_mut().unwrap().flush_operations = 0;
        assert_eq!(between(&lun("a", 1000), &one, 1.0), None);
        let mut tuples = lun("a", 2000);
        tuples.protection.as_mut().unwrap().verified = 0;
        assert_eq!(between(&lun("a", 1000), &tuples, 1.0), None);
    }

    #[test]
    fn what_is_not_known_at_both_ends_has_no_rate() {
        let silent = Lun { traffic: None, protection: None, in_flight: None, ..lun("a", 0) };
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
