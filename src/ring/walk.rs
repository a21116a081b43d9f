//! Walks the ring: entries in, completions out.
//!
//! The kernel writes `cmd_head`, the handler `cmd_tail`. An answer goes into the slot at the tail, whichever command it is
//! for (TCMU_MAILBOX_FLAG_CAP_OOOC): since there are never more answers than entries read, that slot has been read before.
//! Answers are published together: one store of `cmd_tail` and one kick for a batch. Where a record is kept ([`super::record`]), a
//! handler that comes after this one goes on where it was.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    rc::Rc,
};

use tcmu_sys as abi;
use zerocopy::FromBytes;

use super::{
    Device, RingError,
    device::{HEAD, TAIL},
    entry::{self, Entry, Header, Place},
    record::{Answer, AnswerHead, Found, MAX_BATCH, Once, Record, RingId},
    reply::{Completion, Done, KEPT, Queue, Reply},
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
    at: u32,
    len: u32,
    /// Whether an answer belongs into it; PAD and TMR are stepped over.
    answer: bool,
    op: u32,
    /// Its own command has been answered.
    answered: bool,
    /// Where the record notes that, or 0.
    dead_note: u32,
}

/// Something out of the ring, with the reply that has to be given.
type Taken = (Entry, Option<Reply>);

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
    /// Up to where there are entries, as far as we have looked: the kernel writes to that cache line while we read.
    head: u32,
    /// Where the next answer goes.
    tail: u32,
    slots: VecDeque<Slot>,
    /// Which slot the first of these is, counted from the attaching.
    first: u64,
    published: u32,
    /// The tail has moved since the last kick.
    unrung: bool,
    /// Commands read and not yet put back.
    owed: usize,
    done: Queue,
    /// Reused for each entry.
    bytes: Vec<u8>,
    /// Reused for each batch.
    answers: Vec<Answer>,
    record: Option<Rc<Record>>,
    /// Commands whose request is in the record, by id.
    kept: HashMap<u16, u32>,
    /// What a predecessor left, and nobody has taken yet.
    left: VecDeque<Taken>,
    /// How many commands it left unanswered, if it is known.
    resumed: Option<usize>,
    calls: Calls,
}

/// System calls that a ring has made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// The kernel was told of answers.
    pub kicks: u64,
    /// The doorbell was read empty.
    pub reads: u64,
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Some(record) = &self.record {
            record.rest();
        }
    }
}

impl Ring {
    /// Maps the device's region and checks its mailbox. Reading starts with what the record of a predecessor has, if there is one, and
    /// goes on at the tail: what lies there is unanswered.
    ///
    /// # Errors
    /// [`RingError`] for a region that is no TCMU mailbox, or not one of version 2, and if the record cannot be kept.
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
        let (record, found) = match device.record {
            None => (None, None),
            Some((file, instance)) => {
                let id = RingId { device: instance, cmdr_off, cmdr_size };
                let (record, found) = Record::open(file, id, &map)?;
                (Some(Rc::new(record)), found)
            }
        };
        let tail = map.load_acquire(TAIL);
        if tail >= cmdr_size || !tail.is_multiple_of(8) {
            return Err(broken("cmd_tail", tail));
        }
        let mut ring = Ring {
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
            head: tail,
            tail,
            slots: VecDeque::new(),
            published: tail,
            unrung: false,
            owed: 0,
            done: Queue::default(),
            bytes: Vec::new(),
            first: 0,
            answers: Vec::new(),
            record,
            kept: HashMap::new(),
            left: VecDeque::new(),
            resumed: None,
            calls: Calls::default(),
        };
        if let Some(found) = found {
            ring.resume(found)?;
        }
        Ok(ring)
    }

    /// Takes up what a predecessor left: requests from its record, in the order they came, and then the ring up to its head, for the
    /// answers need the slots there.
    fn resume(&mut self, mut found: Found) -> Result<(), RingError> {
        for kept in found.kept {
            let place = self.place(kept.at);
            let Some((header, _)) = Header::ref_from_prefix(&kept.bytes).ok() else {
                return Err(place.broken("the record has no header in", kept.bytes.len() as u64));
            };
            let (op, id) = (header.len_op.get() & abi::TCMU_OP_MASK, header.cmd_id.get());
            let Some(entry) = self.parse(place, op, id, &kept.bytes)? else { continue };
            self.kept.insert(id, kept.number);
            self.owed += 1;
            self.left.push_back((entry, Some(Reply::new(id, KEPT, self.done.clone()))));
        }
        while let Some(taken) = self.read_entry(&mut found.dead)? {
            self.left.push_back(taken);
        }
        self.resumed = Some(self.owed);
        // The predecessor may have been killed before it rang.
        self.kick()
    }

    /// How many commands a predecessor left unanswered, if its record told: nothing has been lost or answered twice then.
    pub fn resumed(&self) -> Option<usize> {
        self.resumed
    }

    fn place(&self, at: u32) -> Place {
        Place { at, cmdr_off: self.cmdr_off, cmdr_size: self.cmdr_size }
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

    /// The system calls so far.
    pub fn calls(&self) -> Calls {
        self.calls
    }

    /// Empties the doorbell, so that it can ring again.
    pub fn acknowledge(&mut self) {
        self.calls.reads += 1;
        // EAGAIN: it is empty already.
        let _ = rustix::io::read(&self.wait, &mut [0u8; 8][..self.width]);
    }

    /// Whether an entry waits to be read. One load: this is what a polling loop spins on.
    pub fn has_entries(&self) -> bool {
        !self.left.is_empty() || self.head != self.cursor || self.map.load_acquire(HEAD) != self.cursor
    }

    /// The next command or request, with the reply that has to be given (none for a TMR).
    ///
    /// # Errors
    /// An entry that makes no sense. The ring must not be used any more.
    pub fn take_entry(&mut self) -> Result<Option<Taken>, RingError> {
        if !self.left.is_empty() {
            return Ok(self.left.pop_front());
        }
        self.read_entry(&mut HashMap::new())
    }

    /// The next entry of the ring; slots at the places in `dead` have nothing to do.
    fn read_entry(&mut self, dead: &mut HashMap<u32, u32>) -> Result<Option<Taken>, RingError> {
        loop {
            let place = self.place(self.cursor);
            if self.head == self.cursor {
                let head = self.map.load_acquire(HEAD);
                if head == self.cursor {
                    self.skip();
                    return Ok(None);
                }
                if head >= self.cmdr_size || !head.is_multiple_of(8) {
                    return Err(place.broken("cmd_head is", head.into()));
                }
                self.head = head;
            }
            let head = self.head;
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
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.resize(len as usize, 0);
            if !self.map.read(start, &mut bytes) {
                return Err(place.broken("its length is", len.into()));
            }
            let entry = self.parse(place, op, id, &bytes);
            self.bytes = bytes;
            let entry = entry?;
            let answer = matches!(entry, Some(Entry::Command(_) | Entry::Unknown { .. }));
            let dead_note = if dead.is_empty() { 0 } else { dead.remove(&self.cursor).unwrap_or(0) };
            let answered = dead_note != 0;
            self.slots.push_back(Slot { at: self.cursor, len, answer, op, answered, dead_note });
            self.cursor = (self.cursor + len) % self.cmdr_size;
            if answered {
                continue;
            }
            self.owed += usize::from(answer);
            if let Some(entry) = entry {
                let slot = self.first + self.slots.len() as u64 - 1;
                let reply = answer.then(|| Reply::new(id, slot, self.done.clone()));
                return Ok(Some((entry, reply)));
            }
        }
    }

    /// What an entry says; nothing if it only fills the ring.
    fn parse(&self, place: Place, op: u32, id: u16, bytes: &[u8]) -> Result<Option<Entry>, RingError> {
        Ok(match op {
            abi::TCMU_OP_PAD => None,
            abi::TCMU_OP_CMD => {
                if bytes.len() < size_of::<abi::CmdResponse>() {
                    // The answer is written into such a slot; a shorter one would be overrun.
                    return Err(place.broken("a command's length is", bytes.len() as u64));
                }
                let mut command = entry::command(&self.map, place, id, bytes)?;
                command.once = self.record.as_ref().map(|record| Once::new(record.clone(), id));
                Some(Entry::Command(command))
            }
            abi::TCMU_OP_TMR => Some(Entry::Tmr(entry::tmr(place, bytes)?)),
            _ => Some(Entry::Unknown { id, op: op as u8 }),
        })
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
        for batch in done.chunks_mut(MAX_BATCH) {
            self.release(batch);
        }
        done.clear();
        // The list keeps its memory for the next batch.
        let mut slot = self.done.done.borrow_mut();
        if slot.is_empty() {
            *slot = done;
        }
        drop(slot);
        self.skip();
        if self.tail != self.published {
            self.release(&mut []);
        }
        if answered > 0 || self.unrung {
            self.unrung = false;
            self.kick()?;
        }
        Ok(answered)
    }

    fn kick(&mut self) -> Result<(), RingError> {
        self.calls.kicks += 1;
        let one = 1u64.to_ne_bytes();
        loop {
            match rustix::io::write(&self.kick, &one[..self.width]) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(RingError::Doorbell(e.into())),
            }
        }
    }

    /// Puts answers into the slots at the tail and moves it, in the order that [`super::record`] explains.
    fn release(&mut self, batch: &mut [Done]) {
        let mut answers = std::mem::take(&mut self.answers);
        for done in &*batch {
            if let Some(slot) = self.slot(done.slot) {
                slot.answered = true;
            }
        }
        for Done { id, completion, .. } in &mut *batch {
            self.skip();
            // Each reply belongs to one slot with `answer`, so there is one.
            let Some(slot) = self.slots.pop_front() else { break };
            self.first += 1;
            self.owed -= 1;
            let keep = if slot.answered { 0 } else { self.keep(&slot) };
            answers.push(Answer {
                at: slot.at,
                id: *id,
                keep,
                release: if self.kept.is_empty() { 0 } else { self.kept.remove(id).unwrap_or(0) },
                dead: 0,
                dead_note: 0,
                undead: slot.dead_note,
                once: self.record.as_ref().and_then(|r| r.once(*id)).unwrap_or(0),
                head: self.answer_head(&slot, *id, completion),
                sense: completion.sense.take(),
            });
            self.tail = (self.tail + slot.len) % self.cmdr_size;
        }
        self.skip();
        if let Some(record) = self.record.clone() {
            // Slots of this batch's commands that the tail has not reached have nothing to do.
            for (done, answer) in batch.iter().zip(&mut answers) {
                if let Some(slot) = self.slot(done.slot) {
                    slot.dead_note = record.dead_note(done.id).unwrap_or(0);
                    (answer.dead, answer.dead_note) = (slot.at, slot.dead_note);
                }
            }
            record.begin(self.published, self.tail, &answers);
        }
        for answer in &answers {
            let inside = answer.put(&self.map, u64::from(self.cmdr_off) + u64::from(answer.at));
            debug_assert!(inside, "slots lie inside the ring");
        }
        self.map.store_release(TAIL, self.tail);
        self.unrung = true;
        self.published = self.tail;
        if let Some(record) = &self.record {
            record.settle(&answers, self.tail);
        }
        answers.clear();
        self.answers = answers;
    }

    /// A slot by its number, if the tail has not passed it.
    fn slot(&mut self, number: u64) -> Option<&mut Slot> {
        let index = number.checked_sub(self.first).filter(|_| number != KEPT)?;
        self.slots.get_mut(usize::try_from(index).ok()?)
    }

    /// Copies the request of a running command aside, whose slot goes to another's answer. Gives its number in the record.
    fn keep(&mut self, slot: &Slot) -> u32 {
        let Some(record) = &self.record else { return 0 };
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.resize(slot.len as usize, 0);
        let inside = self.map.read(u64::from(self.cmdr_off) + u64::from(slot.at), &mut bytes);
        debug_assert!(inside, "slots lie inside the ring");
        let id = u16::from_le_bytes([bytes[4], bytes[5]]);
        let number = record.keep(id, slot.at, &bytes).unwrap_or(0);
        self.kept.insert(id, number);
        self.bytes = bytes;
        number
    }

    /// The first bytes of an answer, as they stand in its slot; sense data follow.
    fn answer_head(&self, slot: &Slot, id: u16, completion: &Completion) -> AnswerHead {
        let mut bytes = AnswerHead::default();
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
        bytes
    }

    /// Moves the tail over slots that take no answer.
    fn skip(&mut self) {
        while self.slots.front().is_some_and(|s| !s.answer) {
            if let Some(slot) = self.slots.pop_front() {
                self.first += 1;
                self.tail = (self.tail + slot.len) % self.cmdr_size;
            }
        }
    }
}
