//! One look at the daemon: what `query-luns`, `query-blockstats`, `query-pi` and `query-jobs` say, brought together by LUN.
//!
//! The questions follow one another, so a LUN that comes or goes meanwhile may be in some answers alone; what is not known of it is left out.

use std::{path::Path, time::Duration};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{
    control::client::{Client, ClientError},
    pi::Counters,
};

/// What the daemon said, and when.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Since some moment before the first look.
    pub at: Duration,
    /// By name.
    pub luns: Vec<Lun>,
    /// Jobs under way.
    pub jobs: Vec<Job>,
}

/// One LUN; what only one that serves can tell is left out of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lun {
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
    /// Counted since it started.
    pub traffic: Option<Traffic>,
    /// Measured since it started.
    pub times: Option<Times>,
    /// Counted since it started.
    pub protection: Option<Counters>,
}

/// How long a LUN's commands took since it started.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Times {
    /// All reads together, in nanoseconds.
    pub rd_total_time_ns: u64,
    /// All writes.
    pub wr_total_time_ns: u64,
    /// All UNMAPs.
    pub unmap_total_time_ns: u64,
    /// All flushes.
    pub flush_total_time_ns: u64,
    /// Each read.
    pub rd_latency_histogram: Histogram,
    /// Each write.
    pub wr_latency_histogram: Histogram,
    /// Each flush.
    pub flush_latency_histogram: Histogram,
}

/// Commands by how long they took.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Histogram {
    /// Where a bin ends and the next begins, in nanoseconds.
    pub boundaries: Vec<u64>,
    /// Commands; one bin more than boundaries.
    pub bins: Vec<u64>,
}

/// Commands and bytes since the LUN started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Read commands.
    pub rd_operations: u64,
    /// Write commands.
    pub wr_operations: u64,
    /// UNMAP and its kin.
    pub unmap_operations: u64,
    /// SYNCHRONIZE CACHE.
    pub flush_operations: u64,
    /// Bytes read.
    pub rd_bytes: u64,
    /// Bytes written.
    pub wr_bytes: u64,
}

/// A job under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all(deserialize = "kebab-case"))]
pub struct Job {
    /// Its name.
    pub id: String,
    /// `pi-scrub`.
    #[serde(rename = "type")]
    pub kind: String,
    /// As in QEMU.
    pub status: String,
    /// How far it is.
    pub current_progress: u64,
    /// Of how much.
    pub total_progress: u64,
}

#[derive(Deserialize)]
struct LunInfo {
    name: String,
    state: String,
    reason: Option<String>,
    pi: String,
    counters: Option<LunCounters>,
}

#[derive(Deserialize)]
struct LunCounters {
    #[serde(rename = "in-flight")]
    in_flight: u64,
}

#[derive(Deserialize)]
struct BlockStats {
    device: String,
    stats: Stats,
}

#[derive(Deserialize)]
struct Stats {
    #[serde(flatten)]
    traffic: Traffic,
    #[serde(flatten)]
    times: Times,
}

#[derive(Deserialize)]
struct PiInfo {
    device: String,
    counters: Option<Counters>,
}

impl Sample {
    /// Asks for everything; `now` is the moment at which the counters of traffic were told.
    ///
    /// # Errors
    /// The connection's, and answers that make no sense.
    pub fn take(
        client: &mut Client,
        socket: &Path,
        now: impl FnOnce() -> Duration,
    ) -> Result<Sample, ClientError> {
        let luns: Vec<LunInfo> = ask(client, socket, "query-luns")?;
        let stats: Vec<BlockStats> = ask(client, socket, "query-blockstats")?;
        let at = now();
        let protections: Vec<PiInfo> = ask(client, socket, "query-pi")?;
        let jobs = ask(client, socket, "query-jobs")?;
        let lun = |lun: LunInfo| Lun {
            traffic: stats.iter().find(|s| s.device == lun.name).map(|s| s.stats.traffic),
            times: stats.iter().find(|s| s.device == lun.name).map(|s| s.stats.times.clone()),
            protection: protections.iter().find(|p| p.device == lun.name).and_then(|p| p.counters),
            in_flight: lun.counters.map(|c| c.in_flight),
            name: lun.name,
            state: lun.state,
            reason: lun.reason,
            pi: lun.pi,
        };
        Ok(Sample { at, luns: luns.into_iter().map(lun).collect(), jobs })
    }
}

fn ask<T: DeserializeOwned>(client: &mut Client, socket: &Path, command: &str) -> Result<T, ClientError> {
    let answer: Value = client.execute(command, Map::new())?;
    serde_json::from_value(answer).map_err(|e| ClientError::Protocol {
        path: socket.to_owned(),
        what: format!("{command} answers something else: {e}"),
    })
}
