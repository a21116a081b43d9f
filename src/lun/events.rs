//! What a LUN tells without being asked: failed I/O, blocks that fail protection, how its scrub goes.
//!
//! Told to one [`Watcher`], on the LUN's thread, which it may not hold up. A disk that fails does so with every command, so
//! each kind of failure is told of at most [`BURST`] times in [`WINDOW`]; the next that is told says how many were not.

use std::{
    cell::{Cell, RefCell},
    fmt,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::jobs::{BlockJob, Task};
pub use crate::job::JobStatus;
use crate::{
    job::ErrorAction,
    volume::{IoError, IoErrorKind, IoOp, PiMismatch},
};

/// So many of a kind ...
pub const BURST: u32 = 10;
/// ... in this time.
pub const WINDOW: Duration = Duration::from_secs(1);

/// What was being done with a block that fails protection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FoundBy {
    /// An initiator read it.
    Read,
    /// An initiator sent it.
    Write,
    /// A scrub looked at it.
    Scrub,
    /// A mirror was to copy it.
    Mirror,
    /// A backup was.
    Backup,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A command failed because the image's I/O did.
    IoError {
        /// What was being done.
        op: IoOp,
        /// There was no space left.
        no_space: bool,
        /// The byte of the LUN, if it is known.
        at: Option<u64>,
        /// In words.
        reason: String,
        /// How many of these were not told before this one.
        missed: u64,
    },
    /// A block does not match its tuple.
    PiMismatch {
        /// The block.
        lba: u64,
        /// Which tag.
        tag: String,
        /// What it should be.
        expected: u32,
        /// What it is.
        found: u32,
        /// Who came upon it.
        by: FoundBy,
        /// How many of these were not told before this one.
        missed: u64,
    },
    /// The scrub.
    Scrub(JobStatus),
    /// A block job is in another state.
    Job {
        /// The job.
        id: String,
        /// The state.
        status: JobStatus,
    },
    /// A block job has come so far.
    BlockJob {
        /// The job.
        id: String,
        /// What it is for.
        task: Task,
        /// How far.
        what: BlockJob,
        /// Bytes done, bytes in all, bytes a second.
        progress: (u64, u64, u64),
    },
    /// A block job's own I/O failed.
    BlockJobError {
        /// The job.
        id: String,
        /// On what it reads, and not on what it writes.
        read: bool,
        /// What is done about it.
        action: ErrorAction,
        /// In words, with the place.
        reason: String,
    },
}

/// Who is told. Called on the LUN's thread: it must not wait.
pub struct Watcher(Box<dyn Fn(Event) + Send>);

impl Watcher {
    /// One that is told by that call.
    pub fn new(tell: impl Fn(Event) + Send + 'static) -> Watcher {
        Watcher(Box::new(tell))
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watcher")
    }
}

/// How often something is told.
#[derive(Default)]
struct Limit {
    window: Cell<Option<Instant>>,
    told: Cell<u32>,
    missed: Cell<u64>,
}

impl Limit {
    /// Whether one more may be told now, and how many were not since the last.
    fn admit(&self, now: Instant) -> Option<u64> {
        if self.window.get().is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            self.window.set(Some(now));
            self.told.set(0);
        }
        if self.told.get() >= BURST {
            self.missed.set(self.missed.get() + 1);
            return None;
        }
        self.told.set(self.told.get() + 1);
        Some(self.missed.take())
    }
}

/// The LUN's end.
#[derive(Default)]
pub(super) struct Events {
    watcher: RefCell<Option<Watcher>>,
    io: Limit,
    pi: Limit,
}

impl Events {
    /// From now on, that one is told.
    pub(super) fn watch(&self, watcher: Watcher) {
        self.watcher.replace(Some(watcher));
    }

    pub(super) fn tell(&self, event: Event) {
        if let Some(watcher) = &*self.watcher.borrow() {
            (watcher.0)(event);
        }
    }

    /// The scrub went through these, one after another.
    pub(super) fn scrub(&self, statuses: &[JobStatus]) {
        statuses.iter().for_each(|status| self.tell(Event::Scrub(*status)));
    }

    /// A command failed. What is the initiator's own fault is told to nobody but it.
    pub(super) fn failed(&self, error: &IoError) {
        match error.kind {
            IoErrorKind::Protection(PiMismatch { lba, tag, expected, found }) => {
                let by = if error.op == IoOp::Write { FoundBy::Write } else { FoundBy::Read };
                self.mismatch(lba.0, tag.to_string(), expected, found, by);
            }
            IoErrorKind::OutOfRange | IoErrorKind::Unsupported | IoErrorKind::Cancelled => {}
            IoErrorKind::Medium
            | IoErrorKind::NoSpace
            | IoErrorKind::ReadOnly
            | IoErrorKind::Corrupt
            | IoErrorKind::Failed
            | IoErrorKind::Unreachable
            | IoErrorKind::Locked => {
                let Some(missed) = self.io.admit(Instant::now()) else { return };
                self.tell(Event::IoError {
                    op: error.op,
                    no_space: error.kind == IoErrorKind::NoSpace,
                    at: error.at.map(|at| at.0),
                    reason: super::chain(error),
                    missed,
                });
            }
        }
    }

    /// A block does not match.
    pub(super) fn mismatch(&self, lba: u64, tag: String, expected: u32, found: u32, by: FoundBy) {
        if let Some(missed) = self.pi.admit(Instant::now()) {
            self.tell(Event::PiMismatch { lba, tag, expected, found, by, missed });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_disk_that_fails_with_every_command_is_told_of_a_few_times_and_then_how_often_it_was_not() {
        let (limit, now) = (Limit::default(), Instant::now());
        let told: Vec<_> = (0..1000).filter_map(|_| limit.admit(now)).collect();
        assert_eq!(told, [0; BURST as usize]);
        assert_eq!(limit.admit(now + WINDOW), Some(1000 - u64::from(BURST)));
        assert_eq!(limit.admit(now + WINDOW), Some(0));
    }

    #[test]
    fn what_is_the_initiators_fault_is_no_event() {
        let (tell, told) = channel();
        let events = Events::default();
        events.watch(Watcher::new(move |event| drop(tell.send(event))));
        for kind in [IoErrorKind::OutOfRange, IoErrorKind::Unsupported, IoErrorKind::Cancelled] {
            events.failed(&IoError::new(kind, IoOp::Write));
        }
        events.failed(&IoError::new(IoErrorKind::NoSpace, IoOp::Write));
        match told.try_recv().unwrap() {
            Event::IoError { no_space: true, op: IoOp::Write, reason, .. } => {
                assert_eq!(reason, "write: no space left")
            }
            other => panic!("{other:?}"),
        }
        assert!(told.try_recv().is_err());
    }
}
