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

/// What a command counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A read.
    Read,
    /// A write, also WRITE SAME, COMPARE AND WRITE and their like.
    Write,
    /// UNMAP.
    Unmap,
    /// SYNCHRONIZE CACHE.
    Flush,
}

impl Class {
    /// Of that command; nothing for those that move no blocks of the initiator's.
    pub fn of(kind: Kind) -> Option<Class> {
        match kind {
            Kind::Read => Some(Class::Read),
            Kind::Write
            | Kind::WriteAtomic
            | Kind::WriteAndVerify
            | Kind::WriteSame
            | Kind::CompareAndWrite
            | Kind::OrWrite => Some(Class::Write),
            Kind::Unmap => Some(Class::Unmap),
            Kind::SynchronizeCache => Some(Class::Flush),
            _ => None,
        }
    }
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
        let (count, bytes) = match response.kind.and_then(Class::of) {
            Some(Class::Read) => (&mut traffic.read, response.data_in),
            Some(Class::Write) => (&mut traffic.write, room),
            Some(Class::Unmap) => (&mut traffic.unmap, 0),
            Some(Class::Flush) => (&mut traffic.flush, 0),
            None => return,
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
