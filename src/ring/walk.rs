//! Walks the ring: entries in, completions out.
//!
//! The kernel writes `cmd_head`, the handler `cmd_tail`. An answer goes into the slot at the tail, whichever command it is
//! for (TCMU_MAILBOX_FLAG_CAP_OOOC): since there are never more answers than entries read, that slot has been read before.
//! Answers are published together: one store of `cmd_tail` and one kick for a batch.

use std::{collections::VecDeque, os::fd::OwnedFd, rc::Rc};

use tcmu_sys as abi;
use zerocopy::FromBytes;

use super::{
    Device, RingError,
    device::{HEAD, TAIL},
    entry::{self, Entry, Header, Place},
    reply::{Completion, Done, Queue, Reply},
};
use crate::sys::mem::Mapping;

/// What the kernel's ring can do, from the mailbox's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Answers may come in any order.
    pub out_of_order: bool,
    /// An answer may tell how much data-in there is.
    pub read_len: bool,
    /// Task management requests are announced.
    pub tmr: bool,
    /// Protection information comes in iovecs of its own ([`Command::dif`](super::Command::dif)).
    pub dif: bool,
}

/// A slot between the tail and our reading position.
struct Slot {
    len: u32,
    /// Whether an answer belongs into it; PAD and TMR are stepped over.
    answer: bool,
    op: u32,
}

/// The ring of one device, attached by the thread that owns it.
pub struct Ring {
    map: Rc<Mapping>,
    wait: OwnedFd,
    kick: OwnedFd,
    width: usize,
    cmdr_off: u32,
    cmdr_size: u32,
    capabilities: Capabilities,
    /// Where the next entry is read.
    cursor: u32,
    /// Where the next answer goes.
    tail: u32,
    slots: VecDeque<Slot>,
    published: u32,
    /// Commands read and not yet put back.
    owed: usize,
    done: Queue,
    /// Reused for each entry.
    bytes: Vec<u8>,
}

impl Ring {
    /// Maps the device's region and checks its mailbox. Reading starts at the tail: what lies there is unanswered.
    ///
    /// # Errors
    /// [`RingError`] for a region that is no TCMU mailbox, or not one of version 2.
    pub fn attach(device: Device) -> Result<Ring, RingError> {
        let len = device.len;
        let map = Mapping::new(&device.memory, len).map_err(|source| RingError::Map { len, source })?;
        let broken = |field, value: u32| RingError::Mailbox { field, value: value.into(), len: len as u64 };
        let mut bytes = [0; size_of::<abi::Mailbox>()];
        if !map.read(0, &mut bytes) {
            return Err(broken("the length", 0));
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let version = half(std::mem::offset_of!(abi::Mailbox, version));
        if u32::from(version) != abi::TCMU_MAILBOX_VERSION {
            return Err(RingError::Version { found: version });
        }
        let flags = u32::from(half(std::mem::offset_of!(abi::Mailbox, flags)));
        let cmdr_off = word(std::mem::offset_of!(abi::Mailbox, cmdr_off));
        let cmdr_size = word(std::mem::offset_of!(abi::Mailbox, cmdr_size));
        if !cmdr_off.is_multiple_of(8) || (cmdr_off as usize) < size_of::<abi::Mailbox>() {
            return Err(broken("cmdr_off", cmdr_off));
        }
        if cmdr_size == 0
            || !cmdr_size.is_multiple_of(8)
            || u64::from(cmdr_off) + u64::from(cmdr_size) > len as u64
        {
            return Err(broken("cmdr_size", cmdr_size));
        }
        let tail = map.load_acquire(TAIL);
        if tail >= cmdr_size || !tail.is_multiple_of(8) {
            return Err(broken("cmd_tail", tail));
        }
        Ok(Ring {
            map,
            wait: device.wait,
            kick: device.kick,
            width: device.width,
            cmdr_off,
            cmdr_size,
            capabilities: Capabilities {
                out_of_order: flags & abi::TCMU_MAILBOX_FLAG_CAP_OOOC != 0,
                read_len: flags & abi::TCMU_MAILBOX_FLAG_CAP_READ_LEN != 0,
                tmr: flags & abi::TCMU_MAILBOX_FLAG_CAP_TMR != 0,
                dif: flags & abi::TCMU_MAILBOX_FLAG_CAP_DIF != 0,
            },
            cursor: tail,
            tail,
            slots: VecDeque::new(),
            published: tail,
            owed: 0,
            done: Queue::default(),
            bytes: Vec::new(),
        })
    }

    /// What the kernel's side can do.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// The descriptor that becomes readable when entries have come, for whoever watches it.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn doorbell(&self) -> Result<OwnedFd, RingError> {
        self.wait.try_clone().map_err(RingError::Doorbell)
    }

    /// Empties the doorbell, so that it can ring again.
    pub fn acknowledge(&self) {
        // EAGAIN: it is empty already.
        let _ = rustix::io::read(&self.wait, &mut [0u8; 8][..self.width]);
    }

    /// Whether an entry waits to be read. One load: this is what a polling loop spins on.
    pub fn has_entries(&self) -> bool {
        self.map.load_acquire(HEAD) != self.cursor
    }

    /// The next command or request, with the reply that has to be given (none for a TMR).
    ///
    /// # Errors
    /// An entry that makes no sense. The ring must not be used any more.
    pub fn take_entry(&mut self) -> Result<Option<(Entry, Option<Reply>)>, RingError> {
        loop {
            let head = self.map.load_acquire(HEAD);
            if head == self.cursor {
                self.skip();
                return Ok(None);
            }
            let place = Place { at: self.cursor, cmdr_off: self.cmdr_off, cmdr_size: self.cmdr_size };
            if head >= self.cmdr_size || !head.is_multiple_of(8) {
                return Err(place.broken("cmd_head is", head.into()));
            }
            // An entry is contiguous: it ends at the head or at the end of the ring.
            let limit = if head > self.cursor { head - self.cursor } else { self.cmdr_size - self.cursor };
            let mut header = [0; size_of::<Header>()];
            let start = u64::from(self.cmdr_off) + u64::from(self.cursor);
            if limit < header.len() as u32 || !self.map.read(start, &mut header) {
                return Err(place.broken("no room for a header before", limit.into()));
            }
            let Ok(header) = Header::ref_from_bytes(&header) else {
                return Err(place.broken("no header in", limit.into()));
            };
            let len = header.len_op.get() & !abi::TCMU_OP_MASK;
            let op = header.len_op.get() & abi::TCMU_OP_MASK;
            if len < size_of::<Header>() as u32 || len > limit {
                return Err(place.broken("its length is", len.into()));
            }
            let id = header.cmd_id.get();
            self.bytes.resize(len as usize, 0);
            if !self.map.read(start, &mut self.bytes) {
                return Err(place.broken("its length is", len.into()));
            }
            let entry = match op {
                abi::TCMU_OP_PAD => None,
                abi::TCMU_OP_CMD => {
                    if (len as usize) < size_of::<abi::CmdResponse>() {
                        // The answer is written into such a slot; a shorter one would be overrun.
                        return Err(place.broken("a command's length is", len.into()));
                    }
                    Some(Entry::Command(entry::command(&self.map, place, id, &self.bytes)?))
                }
                abi::TCMU_OP_TMR => Some(Entry::Tmr(entry::tmr(place, &self.bytes)?)),
                _ => Some(Entry::Unknown { id, op: op as u8 }),
            };
            self.cursor = (self.cursor + len) % self.cmdr_size;
            let answer = matches!(entry, Some(Entry::Command(_) | Entry::Unknown { .. }));
            self.slots.push_back(Slot { len, answer, op });
            self.owed += usize::from(answer);
            if let Some(entry) = entry {
                let reply = answer.then(|| Reply::new(id, self.done.clone()));
                return Ok(Some((entry, reply)));
            }
        }
    }

    /// Faults the device: nothing is read or written any more, and no reply is owed.
    pub fn close(&mut self) {
        self.done.closed.set(true);
        self.done.done.borrow_mut().clear();
    }

    /// Commands read and not yet answered.
    pub fn unanswered(&self) -> usize {
        self.owed - self.done.done.borrow().len()
    }

    /// Whether answers wait to be published.
    pub fn has_answers(&self) -> bool {
        !self.done.done.borrow().is_empty() || self.tail != self.published
    }

    /// Puts the answers given since the last call into the ring, moves the tail once and kicks the kernel once. Tells how
    /// many answers went out.
    ///
    /// # Errors
    /// If the kernel does not take the kick.
    pub fn publish(&mut self) -> Result<usize, RingError> {
        if self.done.closed.get() {
            return Ok(0);
        }
        let mut done = std::mem::take(&mut *self.done.done.borrow_mut());
        let answered = done.len();
        for Done { id, completion } in done.drain(..) {
            self.put(id, &completion);
        }
        // The list keeps its memory for the next batch.
        let mut slot = self.done.done.borrow_mut();
        if slot.is_empty() {
            *slot = done;
        }
        drop(slot);
        self.skip();
        if self.tail != self.published {
            self.map.store_release(TAIL, self.tail);
            self.published = self.tail;
            self.kick()?;
        }
        Ok(answered)
    }

    fn kick(&self) -> Result<(), RingError> {
        let one = 1u64.to_ne_bytes();
        loop {
            match rustix::io::write(&self.kick, &one[..self.width]) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(RingError::Doorbell(e.into())),
            }
        }
    }

    fn put(&mut self, id: u16, completion: &Completion) {
        self.skip();
        // Each reply belongs to one slot with `answer`, so there is one.
        let Some(slot) = self.slots.pop_front() else { return };
        self.owed -= 1;
        let mut bytes = [0u8; size_of::<abi::CmdResponse>()];
        let mut uflags = 0;
        if completion.unknown_op {
            uflags |= abi::TCMU_UFLAG_UNKNOWN_OP as u8;
        }
        let mut read_len = 0;
        if let (Some(n), true) = (completion.read_len, self.capabilities.read_len) {
            uflags |= abi::TCMU_UFLAG_READ_LEN as u8;
            read_len = n;
        }
        bytes[..4].copy_from_slice(&(slot.len | slot.op).to_le_bytes());
        bytes[4..6].copy_from_slice(&id.to_le_bytes());
        bytes[7] = uflags;
        bytes[std::mem::offset_of!(abi::CmdResponse, scsi_status)] = completion.status;
        let at = std::mem::offset_of!(abi::CmdResponse, read_len);
        bytes[at..at + 4].copy_from_slice(&read_len.to_le_bytes());
        let at = std::mem::offset_of!(abi::CmdResponse, sense_buffer);
        let sense = &completion.sense;
        bytes[at..at + sense.len()].copy_from_slice(sense);
        // An unknown operation's slot may be shorter than an answer: its header is all that there is room for.
        let len = bytes.len().min(slot.len as usize);
        let inside = self.map.write(u64::from(self.cmdr_off) + u64::from(self.tail), &bytes[..len]);
        debug_assert!(inside, "slots lie inside the ring");
        self.tail = (self.tail + slot.len) % self.cmdr_size;
    }

    /// Moves the tail over slots that take no answer.
    fn skip(&mut self) {
        while self.slots.front().is_some_and(|s| !s.answer) {
            if let Some(slot) = self.slots.pop_front() {
                self.tail = (self.tail + slot.len) % self.cmdr_size;
            }
        }
    }
}
