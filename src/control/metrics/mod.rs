//! What the daemon and its LUNs count, for Prometheus and its like: `GET /metrics`, in OpenMetrics' text format.
//!
//! [`declared`] has every metric, [`text`] is how they are written, [`http`] who may ask and how. LUNs count on their own threads; a
//! question goes to all of them at once as a message, and one that does not answer within [`PATIENCE`] is told to be silent.

pub mod declared;
pub mod http;
pub mod text;

use std::time::{Duration, Instant};

use super::Registry;
use crate::lun::{Stats, jobs::JobStatus, scrub::ScrubStatus};
use declared as m;
use text::Samples;

/// The socket's name in the run directory.
pub const SOCKET: &str = "metrics.sock";

/// How long the LUNs may take to answer, all together.
const PATIENCE: Duration = Duration::from_secs(2);

/// Everything that is counted, at this moment.
pub fn collect(luns: &Registry) -> Samples {
    let mut samples = Samples::default();
    let all = luns.all();
    samples.put(&m::BUILD, &[env!("CARGO_PKG_VERSION")], 1);
    samples.put(&m::LUNS, &[], all.len() as u64);
    samples.put(&m::QMP_CLIENTS, &[], luns.clients() as u64);
    // All are asked before the first is waited for.
    let asked: Vec<_> = all.iter().map(|(name, lun)| (name, lun.ask_stats().ok())).collect();
    let end = Instant::now() + PATIENCE;
    for (name, answer) in asked {
        let left = end.saturating_duration_since(Instant::now());
        let stats = answer.and_then(|answer| answer.recv_timeout(left).ok());
        samples.put(&m::ONLINE, &[name], u64::from(stats.is_some()));
        samples.put(&m::RESTARTS, &[name], luns.restarts(name));
        if let Some(stats) = stats {
            put_lun(&mut samples, name, &stats);
        }
    }
    samples
}

fn put_lun(samples: &mut Samples, lun: &str, stats: &Stats) {
    for (metric, value) in [
        (&m::CAPACITY, stats.capacity_bytes),
        (&m::IN_FLIGHT, stats.in_flight),
        (&m::COMMANDS, stats.commands),
        (&m::ABORTED, stats.aborted),
        (&m::OTHER_STATUSES, stats.counted.other_statuses),
        (&m::KICKS, stats.batches),
        (&m::SLEEPS, stats.sleeps),
    ] {
        samples.put(metric, &[lun], value);
    }
    let t = stats.traffic;
    for (kind, count) in [("read", t.read), ("write", t.write), ("unmap", t.unmap), ("flush", t.flush)] {
        samples.put(&m::OPERATIONS, &[lun, kind], count.operations);
        samples.put(&m::FAILED, &[lun, kind], count.failed);
        samples.put(&m::INVALID, &[lun, kind], count.invalid);
    }
    samples.put(&m::TRANSFERRED, &[lun, "read"], t.read.bytes);
    samples.put(&m::TRANSFERRED, &[lun, "write"], t.write.bytes);
    for (opcode, histogram) in &stats.measured.latencies {
        samples.put_histogram(&m::DURATION, &[lun, opcode], histogram);
    }
    for ((key, asc, ascq), count) in &stats.measured.senses {
        let codes = [key, asc, ascq].map(|code| format!("{code:02X}h"));
        samples.put(&m::ERRORS, &[lun, &codes[0], &codes[1], &codes[2]], *count);
    }
    if let Some(throttled) = &stats.throttle {
        samples.put(&m::THROTTLED, &[lun], throttled.counts.delayed);
        samples.put_seconds(&m::THROTTLE_WAIT, &[lun], throttled.counts.waited);
        samples.put(&m::THROTTLE_WAITING, &[lun], throttled.counts.waiting);
        throttled.limits.words().for_each(|(word, value)| samples.put(&m::LIMIT, &[lun, &word], value));
    }
    if let Some(pi) = &stats.pi {
        for (metric, value) in [
            (&m::PI_VERIFIED, pi.verified),
            (&m::PI_GENERATED, pi.generated),
            (&m::PI_UNPROTECTED, pi.unprotected),
            (&m::PI_RECOMPUTED, pi.recomputed),
            (&m::PI_UNCHECKED, pi.unchecked),
            (&m::PI_TORN, pi.torn),
            (&m::PI_REPAIRED, pi.repaired),
        ] {
            samples.put(metric, &[lun], value);
        }
        let tags = [("guard", pi.guard_errors), ("application", pi.app_errors), ("reference", pi.ref_errors)];
        tags.iter().for_each(|(tag, value)| samples.put(&m::PI_ERRORS, &[lun, tag], *value));
    }
    let tables = stats.caches.map(|c| [("l2", c.l2_cache), ("refcount", c.refcount_cache)]);
    let tuples = stats.tuple_cache.map(|c| ("tuple", c));
    for (cache, count) in tables.into_iter().flatten().chain(tuples) {
        samples.put(&m::CACHE_HITS, &[lun, cache], count.hits);
        samples.put(&m::CACHE_MISSES, &[lun, cache], count.misses);
        samples.put(&m::CACHE_SIZE, &[lun, cache], count.bytes);
    }
    if let Some(scrub) = &stats.scrub {
        for (metric, value) in [
            (&m::SCRUB_RUNNING, u64::from(scrub.status == ScrubStatus::Running)),
            (&m::SCRUB_DONE, scrub.done_bytes),
            (&m::SCRUB_SIZE, scrub.total_bytes),
            (&m::SCRUB_MISMATCHED, scrub.mismatches),
            (&m::SCRUB_UNREADABLE, scrub.unreadable),
        ] {
            samples.put(metric, &[lun], value);
        }
    }
    for job in &stats.jobs {
        for (metric, value) in [
            (&m::JOB_RUNNING, u64::from(matches!(job.status, JobStatus::Running | JobStatus::Ready))),
            (&m::JOB_READY, u64::from(job.ready)),
            (&m::JOB_FAILED, u64::from(job.error.is_some())),
            (&m::JOB_DONE, job.offset),
            (&m::JOB_SIZE, job.len),
        ] {
            samples.put(metric, &[lun, &job.id], value);
        }
    }
}
