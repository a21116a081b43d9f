//! What a LUN's commands have moved, by kind: counted on its thread, in cells.

use std::cell::Cell;

use crate::scsi::{Response, SenseKey, Status, opcodes::Kind};

/// Commands of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Bytes that they moved between initiator and LUN.
    pub bytes: u64,
    /// Commands that were done.
    pub operations: u64,
    /// Commands that failed.
    pub failed: u64,
    /// Commands that were refused because they make no sense (ILLEGAL REQUEST).
    pub invalid: u64,
}

/// All that there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Reads.
    pub read: Count,
    /// Writes: also WRITE SAME, COMPARE AND WRITE and their like.
    pub write: Count,
    /// UNMAP.
    pub unmap: Count,
    /// SYNCHRONIZE CACHE.
    pub flush: Count,
}

/// The counters.
#[derive(Default)]
pub(super) struct Counters(Cell<Traffic>);

impl Counters {
    pub(super) fn get(&self) -> Traffic {
        self.0.get()
    }

    /// Counts a command that has ended. `room` is its buffer.
    pub(super) fn count(&self, response: &Response, room: usize) {
        let mut traffic = self.0.get();
        let (count, bytes) = match response.kind {
            Some(Kind::Read) => (&mut traffic.read, response.data_in),
            Some(
                Kind::Write
                | Kind::WriteAtomic
                | Kind::WriteAndVerify
                | Kind::WriteSame
                | Kind::CompareAndWrite
                | Kind::OrWrite,
            ) => (&mut traffic.write, room),
            Some(Kind::Unmap) => (&mut traffic.unmap, 0),
            Some(Kind::SynchronizeCache) => (&mut traffic.flush, 0),
            _ => return,
        };
        match (response.status, response.sense.as_ref().map(|s| s.key)) {
            (Status::Good, _) => {
                count.operations += 1;
                count.bytes += bytes as u64;
            }
            // Not the command's own doing.
            (_, Some(SenseKey::UnitAttention)) => return,
            (_, Some(SenseKey::IllegalRequest)) => count.invalid += 1,
            _ => count.failed += 1,
        }
        self.0.set(traffic);
    }
}
