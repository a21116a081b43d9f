//! Commands as they pass, for those who watch. While nobody does, a command costs a look at one cell.
//!
//! Who watches has a queue of [`QUEUE`] commands. The LUN's thread puts into it what has been answered and never waits: what finds it full
//! is counted, and whoever reads the queue is told of the count.

use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, SystemTime},
};

use super::measured::{SenseCodes, UNKNOWN};
use crate::scsi::{self, Response};

/// Commands that may wait for one who watches.
pub const QUEUE: usize = 4096;

/// Bytes of a CDB that are kept: as many as any command has that is supported.
pub(super) type Kept = [u8; 32];

/// A command that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traced {
    /// When it was answered.
    pub at: SystemTime,
    /// OPERATION CODE.
    pub opcode: u8,
    /// Its name; [`UNKNOWN`] if it is not supported.
    pub name: &'static str,
    /// First block and number of blocks, if it has them in its CDB.
    pub range: Option<(u64, u64)>,
    /// SAM-5 status.
    pub status: u8,
    /// With CHECK CONDITION.
    pub sense: Option<SenseCodes>,
    /// From when it was taken out of the ring.
    pub took: Duration,
}

/// One end of a trace: the LUN stops filling it when it is dropped.
#[derive(Debug)]
pub struct Trace {
    /// What passes. It ends when the LUN does.
    pub commands: Receiver<Traced>,
    missed: Arc<AtomicU64>,
}

impl Trace {
    /// How many commands found the queue full since this was last asked.
    pub fn missed(&self) -> u64 {
        self.missed.swap(0, Ordering::Relaxed)
    }
}

/// The LUN's end.
#[derive(Debug)]
pub(super) struct Watching {
    to: SyncSender<Traced>,
    missed: Arc<AtomicU64>,
}

pub(super) fn channel() -> (Watching, Trace) {
    let (to, commands) = sync_channel(QUEUE);
    let missed = Arc::new(AtomicU64::new(0));
    (Watching { to, missed: missed.clone() }, Trace { commands, missed })
}

/// Those who watch a LUN.
#[derive(Default)]
pub(super) struct Tracer {
    on: Cell<bool>,
    all: RefCell<Vec<Watching>>,
}

impl Tracer {
    pub(super) fn add(&self, watching: Watching) {
        self.all.borrow_mut().push(watching);
        self.on.set(true);
    }

    /// What has to be kept of a command until it is answered, if anybody watches.
    #[inline]
    pub(super) fn keep(&self, cdb: &[u8]) -> Option<Kept> {
        self.on.get().then(|| {
            let mut kept = Kept::default();
            let len = cdb.len().min(kept.len());
            kept[..len].copy_from_slice(&cdb[..len]);
            kept
        })
    }

    /// Tells of a command that was answered, and forgets those who do not watch any more.
    #[cold]
    pub(super) fn tell(&self, cdb: &Kept, response: &Response, took: Duration) {
        let traced = Traced {
            at: SystemTime::now(),
            opcode: cdb[0],
            name: response.kind.map_or(UNKNOWN, |kind| kind.name()),
            range: response.kind.and_then(|kind| scsi::range_of(kind, cdb)).map(|(lba, n)| (lba.0, n.0)),
            status: response.status as u8,
            sense: response.sense.as_ref().map(|s| (s.key as u8, s.asc.0, s.asc.1)),
            took,
        };
        let mut all = self.all.borrow_mut();
        all.retain(|watching| match watching.to.try_send(traced.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                watching.missed.fetch_add(1, Ordering::Relaxed);
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
        self.on.set(!all.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{Status, opcodes::Kind};

    fn pass(tracer: &Tracer, lba: u8) -> bool {
        let response = Response {
            status: Status::Good,
            sense: None,
            data_in: 512,
            gives_data: true,
            kind: Some(Kind::Read),
        };
        let kept = tracer.keep(&[0x28, 0, 0, 0, 0, lba, 0, 0, 1, 0]);
        if let Some(cdb) = &kept {
            tracer.tell(cdb, &response, Duration::from_micros(7));
        }
        kept.is_some()
    }

    #[test]
    fn commands_are_told_while_somebody_watches_and_kept_for_nobody() {
        let tracer = Tracer::default();
        assert!(!pass(&tracer, 1));
        let (watching, trace) = channel();
        tracer.add(watching);
        assert!(pass(&tracer, 2));
        let got = trace.commands.try_recv().unwrap();
        assert_eq!((got.opcode, got.name, got.range, got.status), (0x28, "READ", Some((2, 1)), 0));
        assert_eq!((got.sense, got.took), (None, Duration::from_micros(7)));
        drop(trace);
        assert!(pass(&tracer, 3), "nobody has looked since");
        assert!(!pass(&tracer, 4), "nobody watches");
    }

    #[test]
    fn a_queue_that_is_full_holds_nothing_up_and_what_was_missed_is_counted() {
        let tracer = Tracer::default();
        let ((slow, behind), (quick, trace)) = (channel(), channel());
        tracer.add(slow);
        tracer.add(quick);
        for _ in 0..QUEUE + 10 {
            pass(&tracer, 5);
            trace.commands.try_recv().unwrap();
        }
        assert_eq!((behind.missed(), trace.missed()), (10, 0));
        assert_eq!(behind.missed(), 0, "told once");
        assert_eq!(behind.commands.try_iter().count(), QUEUE);
    }
}
