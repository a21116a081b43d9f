//! What a LUN's counters come to, as those who ask are told.

use serde::Serialize;

use super::{
    jobs::{BitmapInfo, JobInfo},
    measured::Measured,
    scrub::{Scrub, ScrubStatus},
    throttle::Throttled,
    traffic::Traffic,
};
use crate::{
    image::CacheCounts,
    pi::{self, PiType},
    storage::cache::CacheCount,
};

/// What commands have come to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PublicStats {
    /// Bytes of data-in given back.
    pub bytes_in: u64,
    /// Bytes of data-out taken.
    pub bytes_out: u64,
    /// Commands that ended in CHECK CONDITION, unit attentions included.
    pub check_conditions: u64,
    /// Commands that ended in another status than GOOD and CHECK CONDITION.
    pub other_statuses: u64,
}

/// The system calls of a LUN's thread since it serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SystemCalls {
    /// `io_uring_enter`, or on threads `ppoll`.
    pub enters: u64,
    /// The kernel was told of answers.
    pub kicks: u64,
    /// The doorbell was read empty.
    pub reads: u64,
    /// Operations on files, however they got to the kernel.
    pub operations: u64,
}

/// A LUN's counters since it started.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// SCSI commands taken from the ring.
    pub commands: u64,
    /// Commands that task management took back before they began.
    pub aborted: u64,
    /// Batches of answers, each with one kick.
    pub batches: u64,
    /// How often the thread slept.
    pub sleeps: u64,
    /// How long the thread has looked at its ring instead of sleeping, in microseconds.
    #[serde(skip)]
    pub polled_us: u64,
    /// What the thread has asked of the kernel.
    #[serde(skip)]
    pub calls: SystemCalls,
    /// Commands under way.
    pub in_flight: u64,
    /// The way to the kernel: `io_uring` or `threads`.
    pub io: String,
    /// The image's format.
    pub format: String,
    /// Bytes.
    pub capacity_bytes: u64,
    /// WCE.
    pub write_cache: bool,
    /// What commands have come to.
    #[serde(flatten)]
    pub counted: PublicStats,
    /// The same by kind of command.
    #[serde(skip)]
    pub traffic: Traffic,
    /// Limits and what they have come to, if there are any or were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<Throttled>,
    /// Bytes that copies have brought here and the kernel has moved from file to file, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moved_by_kernel: Option<u64>,
    /// How long commands took, and with what sense they failed.
    #[serde(skip)]
    pub measured: Measured,
    /// The type of protection that initiators see now: FORMAT UNIT may have chosen another than the configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub formatted_with: Option<PiType>,
    /// Protection, where there is any.
    pub pi: Option<pi::Counters>,
    /// The metadata caches of a qcow2 image and its backing files.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub caches: Option<CacheCounts>,
    /// Tuples in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tuple_cache: Option<CacheCount>,
    /// The scrub under way, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubSummary>,
    /// Block jobs: those under way, and those that wait to be dismissed. `query-jobs` tells them.
    #[serde(skip)]
    pub jobs: Vec<JobInfo>,
    /// Dirty bitmaps. `query-block` tells them.
    #[serde(skip)]
    pub bitmaps: Vec<BitmapInfo>,
}

/// A scrub, in a few words.
#[derive(Debug, Clone, Serialize)]
pub struct ScrubSummary {
    /// How far it is.
    pub status: ScrubStatus,
    /// Bytes of the LUN that are behind it.
    pub done_bytes: u64,
    /// Bytes of the LUN that it looks at.
    #[serde(skip)]
    pub total_bytes: u64,
    /// Blocks that do not match.
    pub mismatches: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
}

impl From<Scrub> for ScrubSummary {
    fn from(scrub: Scrub) -> ScrubSummary {
        let (done_bytes, total_bytes) = scrub.progress();
        ScrubSummary {
            status: scrub.status,
            done_bytes,
            total_bytes,
            mismatches: scrub.found.mismatches,
            unreadable: scrub.found.unreadable,
        }
    }
}
