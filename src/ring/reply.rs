//! The duty to answer: a [`Reply`] goes along with a command and is used up by its answer.
//!
//! One that is dropped unanswered is a bug: it panics in debug builds, and in release the command ends with CHECK CONDITION,
//! ABORTED COMMAND, so that no initiator waits for ever.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tcmu_sys::TCMU_SENSE_BUFFERSIZE;

/// SAM-5 5.3.1.
pub(super) const CHECK_CONDITION: u8 = 0x02;
/// SAM-5 5.3.1.
pub const TASK_ABORTED: u8 = 0x40;

/// The sense data of an answer.
pub type SenseBytes = [u8; TCMU_SENSE_BUFFERSIZE as usize];

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// SAM-5 status.
    pub status: u8,
    /// Sense data, zeros behind; seldom, so apart.
    pub sense: Option<Box<SenseBytes>>,
    /// Bytes of data-in, where that is less than there was room for.
    pub read_len: Option<u32>,
    /// The operation was not known.
    pub unknown_op: bool,
}

impl Completion {
    /// A status without sense data.
    pub fn status(status: u8) -> Completion {
        Completion { status, sense: None, read_len: None, unknown_op: false }
    }

    /// CHECK CONDITION with sense data; what is longer than the ring's 96 bytes is cut.
    pub fn check_condition(sense: &[u8]) -> Completion {
        let mut bytes = [0; TCMU_SENSE_BUFFERSIZE as usize];
        let len = sense.len().min(bytes.len());
        bytes[..len].copy_from_slice(&sense[..len]);
        Completion { sense: Some(Box::new(bytes)), ..Completion::status(CHECK_CONDITION) }
    }

    /// The answer to an entry whose operation is not known.
    pub fn unknown_op() -> Completion {
        Completion { unknown_op: true, ..Completion::status(CHECK_CONDITION) }
    }
}

/// No slot of this process.
pub(super) const KEPT: u64 = u64::MAX;

pub(super) struct Done {
    pub(super) id: u16,
    /// Counts the slots read; [`KEPT`] for a command whose request was kept aside by a predecessor.
    pub(super) slot: u64,
    pub(super) completion: Completion,
}

/// Answers on their way to the ring.
#[derive(Default)]
pub(super) struct Answers {
    pub(super) done: RefCell<Vec<Done>>,
    /// The device is faulted: its ring is not written any more, and nobody owes it an answer.
    pub(super) closed: Cell<bool>,
}

pub(super) type Queue = Rc<Answers>;

/// Has to be given for every command.
pub struct Reply {
    id: u16,
    slot: u64,
    queue: Option<Queue>,
}

impl Reply {
    pub(super) fn new(id: u16, slot: u64, queue: Queue) -> Reply {
        Reply { id, slot, queue: Some(queue) }
    }

    /// The command that waits for it.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Answers. The kernel sees it with the next [`super::Ring::publish`].
    pub fn answer(mut self, completion: Completion) {
        self.put(completion);
    }

    fn put(&mut self, completion: Completion) {
        if let Some(queue) = self.queue.take()
            && !queue.closed.get()
        {
            queue.done.borrow_mut().push(Done { id: self.id, slot: self.slot, completion });
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.queue.as_ref().is_none_or(|q| q.closed.get()) {
            return;
        }
        // Fixed sense: ABORTED COMMAND, no additional sense (SPC-5 4.5.3).
        self.put(Completion::check_condition(&[0x70, 0, 0x0b, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        if !std::thread::panicking() {
            debug_assert!(false, "command {} was dropped without an answer", self.id);
        }
    }
}
