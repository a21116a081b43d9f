//! The in-flight record: what the ring itself forgets, so that whoever maps the ring next runs the unanswered commands and no other.
//!
//! An answer goes into the slot at the tail, over the request that stood there. Three things are lost with that: the request, if its
//! command is still running; that the answered command's own slot, further on, holds nothing to do any more; and, while
//! the tail has not moved yet, which answers were on their way. The record keeps these three, in a file under /run that
//! is mapped: stores into it survive the process, at whatever instruction it is killed (not the machine, whose ring is gone too).
//!
//! A batch of answers is made in this order, each step visible to a successor before the next:
//! 1. the requests about to be overwritten are copied aside, and the batch (answers, and what becomes of the tables) is written down;
//! 2. the batch is declared valid;
//! 3. the answers go into the ring, and the tail moves: the kernel has them;
//! 4. the tables are brought up to date, and the batch is declared done.
//!
//! A successor that finds a valid batch does steps 3 and 4 again, which changes nothing that was done already. So no answer is lost or
//! given twice, and what was executed is not executed again, but for commands that died between their execution and step 2:
//! those are run once more, which their initiator cannot tell from their having been slow. COMPARE AND WRITE could tell,
//! so it says in the record when it has compared ([`Once`]).
//!
//! The first 40 bytes mean the same in every version: `TCMUDIF`, the version, which ring it is, whether the ring alone says all, and the tail.
//! A record of a version that isn't known is taken up only if nothing but that is needed: the handler before stopped when each entry between
//! tail and head was unanswered, or there is none. Otherwise it is refused, and nothing of it or the ring is touched.

use std::{cell::RefCell, collections::HashMap, fmt, fs::File, io, rc::Rc, sync::atomic};

use tcmu_sys as abi;

use super::{
    device::{HEAD, TAIL},
    foreign::{Foreign, RecordError},
    reply::{CHECK_CONDITION, SenseBytes},
};
use crate::sys::mem::Mapping;

/// The version of what follows the first 40 bytes.
pub const VERSION: u8 = 1;
pub(super) const NAME: [u8; 7] = *b"TCMUDIF";
/// First bytes, with the version.
const MAGIC: [u8; 8] = [NAME[0], NAME[1], NAME[2], NAME[3], NAME[4], NAME[5], NAME[6], VERSION];
/// Answers of one batch.
pub const MAX_BATCH: usize = 128;
/// Requests that can be kept aside; more are running only where an initiator has far more than 256 commands under way.
const KEPT: usize = 512;
/// Bytes of one, its head included: the iovecs of 4000 pieces.
const KEPT_LEN: u64 = 64 << 10;
/// Slots that hold nothing to do, and marks of [`Once`].
const WORDS: usize = 1024;

pub(super) const AT_RING: u64 = 8;
/// 1 if the handler has stopped and each entry from the tail to the head is unanswered.
pub(super) const AT_PLAIN: u64 = 24;
pub(super) const AT_TAIL: u64 = 32;
const AT_LOST: u64 = 36;
pub(super) const AT_VALID: u64 = 40;
const AT_BATCH: u64 = 48;
const AT_ANSWERS: u64 = 4096;
const ANSWER_LEN: u64 = 160;
const RESPONSE_AT: u64 = 32;
const RESPONSE_LEN: usize = size_of::<abi::CmdResponse>();
const SENSE_AT: usize = std::mem::offset_of!(abi::CmdResponse, sense_buffer);
const AT_DEAD: u64 = 28 << 10;
const AT_ONCE: u64 = 32 << 10;
/// Bytes that are used all the time.
const HOT: u64 = 36 << 10;
const AT_KEPT: u64 = 64 << 10;
const KEPT_HEAD: u64 = 24;
const LEN: u64 = AT_KEPT + KEPT as u64 * KEPT_LEN;

const _: () = assert!(AT_ANSWERS + MAX_BATCH as u64 * ANSWER_LEN <= AT_DEAD);
const _: () = assert!(AT_DEAD + 4 * WORDS as u64 <= AT_ONCE && AT_ONCE + 4 * WORDS as u64 <= HOT);
const _: () = assert!(RESPONSE_AT + RESPONSE_LEN as u64 <= ANSWER_LEN && HOT <= AT_KEPT);

/// Which ring a record is of: the kernel's number for this instance of the device, and the ring's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingId {
    /// Another for each device that ever was since boot: the inode of its directory in sysfs.
    pub device: u64,
    /// As in the mailbox.
    pub cmdr_off: u32,
    /// As in the mailbox.
    pub cmdr_size: u32,
}

impl RingId {
    pub(super) fn bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.device.to_le_bytes());
        out[8..12].copy_from_slice(&self.cmdr_off.to_le_bytes());
        out[12..].copy_from_slice(&self.cmdr_size.to_le_bytes());
        out
    }
}

/// The bytes of an answer that stand before its sense data.
pub type AnswerHead = [u8; SENSE_AT];

/// One answer, and what becomes of the tables with it. Indexes count from 1; 0 is none.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Where in the ring it goes.
    pub at: u32,
    /// The command's id.
    pub id: u16,
    /// The request at `at`, which is copied aside.
    pub keep: u32,
    /// The command's own request, which was kept aside, and is not needed any more.
    pub release: u32,
    /// The command's own slot, which stays in the ring with nothing to do.
    pub dead: u32,
    /// Where that is noted.
    pub dead_note: u32,
    /// The note that the slot at `at` had nothing to do.
    pub undead: u32,
    /// The command's mark.
    pub once: u32,
    /// The first bytes of the answer.
    pub head: AnswerHead,
    /// Those that follow, zeros if there are none. Written with CHECK CONDITION alone: nobody looks at them otherwise.
    pub sense: Option<Box<SenseBytes>>,
}

/// A request that was kept aside.
#[derive(Debug, Clone)]
pub struct Kept {
    /// Its number, from 1.
    pub number: u32,
    /// Where in the ring it stood.
    pub at: u32,
    /// Counts requests kept, so that older ones are known.
    pub order: u64,
    /// All of the entry.
    pub bytes: Vec<u8>,
}

/// What a predecessor left.
#[derive(Debug, Default)]
pub struct Found {
    /// Requests that the ring has no more.
    pub kept: Vec<Kept>,
    /// Slots with nothing to do, and the number of the note, from 1.
    pub dead: HashMap<u32, u32>,
}

impl Found {
    /// Whether every slot with nothing to do is an entry between tail and head.
    fn all_in(&self, id: RingId, ring: &Mapping) -> bool {
        let (mut at, head) = (ring.load_acquire(TAIL), ring.load_acquire(HEAD));
        let mut met = 0;
        while at != head {
            let mut word = [0; 4];
            if at >= id.cmdr_size || !ring.read(u64::from(id.cmdr_off) + u64::from(at), &mut word) {
                return false;
            }
            let len = u32::from_le_bytes(word) & !abi::TCMU_OP_MASK;
            if len == 0 || len > id.cmdr_size - at {
                return false;
            }
            met += usize::from(self.dead.contains_key(&at));
            at = (at + len) % id.cmdr_size;
        }
        met == self.dead.len()
    }
}

/// A command that can be executed only once: its execution says here when it has come to the point of no return.
#[derive(Clone)]
pub struct Once {
    record: Rc<Record>,
    id: u16,
}

impl Once {
    /// The mark of a command.
    pub fn new(record: Rc<Record>, id: u16) -> Once {
        Once { record, id }
    }

    /// Whether an execution that was cut off had come that far.
    pub fn is_marked(&self) -> bool {
        self.record.once(self.id).is_some()
    }

    /// It has come that far now.
    pub fn mark(&self) {
        self.record.mark(self.id);
    }
}

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Once({})", self.id)
    }
}

impl Answer {
    /// Bytes of its slot.
    fn slot_len(&self) -> u32 {
        let [a, b, c, d, ..] = self.head;
        u32::from_le_bytes([a, b, c, d]) & !abi::TCMU_OP_MASK
    }

    fn sense(&self) -> Option<&SenseBytes> {
        const NONE: SenseBytes = [0; RESPONSE_LEN - SENSE_AT];
        let wanted = self.head[std::mem::offset_of!(abi::CmdResponse, scsi_status)] == CHECK_CONDITION;
        wanted.then(|| self.sense.as_deref().unwrap_or(&NONE))
    }

    /// Puts it into its slot at that place of the mapping. False if that is outside. The slot of an unknown operation may be shorter than
    /// an answer: its header is all that there is room for.
    #[must_use]
    pub fn put(&self, ring: &Mapping, at: u64) -> bool {
        let len = self.slot_len() as usize;
        let inside = ring.write(at, &self.head[..SENSE_AT.min(len)]);
        match self.sense() {
            Some(sense) if len > SENSE_AT => {
                inside && ring.write(at + SENSE_AT as u64, &sense[..sense.len().min(len - SENSE_AT)])
            }
            _ => inside,
        }
    }
}

struct Tables {
    kept_free: Vec<u32>,
    /// Bytes of each that the file system has given.
    kept_room: Vec<u32>,
    next_order: u64,
    dead_free: Vec<u32>,
    once_free: Vec<u32>,
    once: HashMap<u16, u32>,
    /// Running commands whose request could not be kept.
    lost: Vec<u16>,
}

/// The record of one ring, mapped by the thread that owns it.
pub struct Record {
    file: File,
    map: Rc<Mapping>,
    tables: RefCell<Tables>,
}

impl Record {
    /// Takes up the record in `file` for the ring whose mailbox is `ring`: finishes the batch that a predecessor was killed in, and
    /// tells what it left. `None` if the file says nothing of this ring as it stands now; the record is empty then.
    ///
    /// # Errors
    /// If the file cannot be made, or there is no room for it; if it is of a version that isn't known, and would be needed.
    pub fn open(file: File, id: RingId, ring: &Mapping) -> Result<(Record, Option<Found>), RecordError> {
        let foreign = Foreign::look(&file, id, ring)?;
        if let Foreign::Unknown(version) = foreign {
            return Err(RecordError::Version(version));
        }
        let new = file.metadata()?.len() != LEN;
        if new {
            file.set_len(0)?;
            file.set_len(LEN)?;
        }
        // A page that cannot be had when it is stored to would kill the process.
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, HOT).map_err(io::Error::from)?;
        let map = Mapping::new(&file, LEN as usize)?;
        let tables = Tables {
            kept_free: (1..=KEPT as u32).rev().collect(),
            kept_room: vec![0; KEPT],
            next_order: 0,
            dead_free: (1..=WORDS as u32).rev().collect(),
            once_free: (1..=WORDS as u32).rev().collect(),
            once: HashMap::new(),
            lost: Vec::new(),
        };
        let record = Record { file, map, tables: RefCell::new(tables) };
        if let Foreign::Plain(version) = foreign {
            tracing::info!(
                version,
                "another version's record is replaced: the ring alone says what is unanswered"
            );
            record.begin_anew(id, ring)?;
            return Ok((record, Some(Found::default())));
        }
        let found = if new { None } else { record.found(id, ring) };
        if found.is_none() {
            record.begin_anew(id, ring)?;
        }
        record.map.store_release(AT_PLAIN, 0);
        Ok((record, found))
    }

    /// Whether the record in `file` says which commands of the ring are unanswered.
    ///
    /// # Errors
    /// As [`Record::open`].
    pub fn knows(file: File, id: RingId, ring: &Mapping) -> Result<bool, RecordError> {
        match Foreign::look(&file, id, ring)? {
            Foreign::Plain(_) => return Ok(true),
            Foreign::Unknown(version) => return Err(RecordError::Version(version)),
            Foreign::No => {}
        }
        if file.metadata()?.len() != LEN {
            return Ok(false);
        }
        Ok(Record::open(file, id, ring)?.1.is_some())
    }

    fn begin_anew(&self, id: RingId, ring: &Mapping) -> io::Result<()> {
        // Not valid while it is written: the magic number comes last.
        self.put(0, &[0; 8]);
        self.file.set_len(0)?;
        self.file.set_len(LEN)?;
        rustix::fs::fallocate(&self.file, rustix::fs::FallocateFlags::empty(), 0, HOT)?;
        self.put(AT_RING, &id.bytes());
        self.map.store_release(AT_TAIL, ring.load_acquire(TAIL));
        atomic::fence(atomic::Ordering::Release);
        self.put(0, &MAGIC);
        Ok(())
    }

    fn found(&self, id: RingId, ring: &Mapping) -> Option<Found> {
        let mut head = [0; AT_TAIL as usize];
        self.get(0, &mut head);
        if head[..8] != MAGIC || head[AT_RING as usize..][..16] != id.bytes() {
            return None;
        }
        // A request that could not be kept is lost for good, whether or not it has been answered by now.
        if self.word(AT_LOST) != 0 {
            return None;
        }
        let tail = ring.load_acquire(TAIL);
        if self.map.load_acquire(AT_VALID) != 0 {
            let (from, to) = (self.word(AT_BATCH), self.word(AT_BATCH + 4));
            if (tail != from && tail != to) || to >= id.cmdr_size {
                return None;
            }
            let answers = self.batch()?;
            for answer in &answers {
                let at = u64::from(id.cmdr_off) + u64::from(answer.at);
                let inside = u64::from(answer.at) + u64::from(answer.slot_len()) <= u64::from(id.cmdr_size);
                if !inside || tail == from && !answer.put(ring, at) {
                    return None;
                }
            }
            ring.store_release(TAIL, to);
            self.settle(&answers, to);
        }
        if self.word(AT_TAIL) != ring.load_acquire(TAIL) {
            return None;
        }
        let mut found = Found::default();
        let mut tables = self.tables.borrow_mut();
        tables.once.clear();
        for note in 1..=WORDS as u32 {
            let at = self.word(AT_DEAD + 4 * u64::from(note - 1));
            if at != 0 {
                found.dead.insert(at - 1, note);
            }
            let id = self.word(AT_ONCE + 4 * u64::from(note - 1));
            if id != 0 {
                tables.once.insert(id as u16, note);
            }
        }
        for number in 1..=KEPT as u32 {
            let Some(kept) = self.kept(number) else { continue };
            tables.next_order = tables.next_order.max(kept.order + 1);
            found.kept.push(kept);
        }
        found.kept.sort_by_key(|k| k.order);
        let free = |all: usize, used: &[u32]| (1..=all as u32).rev().filter(|n| !used.contains(n)).collect();
        tables.dead_free = free(WORDS, &found.dead.values().copied().collect::<Vec<_>>());
        tables.once_free = free(WORDS, &tables.once.values().copied().collect::<Vec<_>>());
        tables.kept_free = free(KEPT, &found.kept.iter().map(|k| k.number).collect::<Vec<_>>());
        (found.kept.len() == found.dead.len() && found.all_in(id, ring)).then_some(found)
    }

    /// The answers of the batch that is valid.
    fn batch(&self) -> Option<Vec<Answer>> {
        let count = self.word(AT_BATCH + 8);
        if count as usize > MAX_BATCH {
            return None;
        }
        let answer = |i: u32| {
            let base = AT_ANSWERS + u64::from(i) * ANSWER_LEN;
            let word = |n: u64| self.word(base + 4 * n);
            let (mut head, mut sense) = ([0; SENSE_AT], [0; RESPONSE_LEN - SENSE_AT]);
            self.get(base + RESPONSE_AT, &mut head);
            self.get(base + RESPONSE_AT + SENSE_AT as u64, &mut sense);
            Answer {
                at: word(0),
                id: word(1) as u16,
                keep: word(2),
                release: word(3),
                dead: word(4),
                dead_note: word(5),
                undead: word(6),
                once: word(7),
                head,
                sense: Some(Box::new(sense)),
            }
        };
        Some((0..count).map(answer).collect())
    }

    fn word(&self, at: u64) -> u32 {
        self.map.load_acquire(at)
    }

    fn get(&self, at: u64, out: &mut [u8]) {
        let inside = self.map.read(at, out);
        debug_assert!(inside, "what the record has lies in it");
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let inside = self.map.write(at, bytes);
        debug_assert!(inside, "what the record has lies in it");
    }

    fn kept(&self, number: u32) -> Option<Kept> {
        let base = AT_KEPT + u64::from(number - 1) * KEPT_LEN;
        let mut head = [0; KEPT_HEAD as usize];
        self.get(base, &mut head);
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let len = word(4);
        if word(0) == 0 || u64::from(len) > KEPT_LEN - KEPT_HEAD {
            return None;
        }
        let mut bytes = vec![0; len as usize];
        self.get(base + KEPT_HEAD, &mut bytes);
        let order = u64::from(word(16)) | u64::from(word(20)) << 32;
        Some(Kept { number, at: word(8), order, bytes })
    }

    /// Copies a request aside that an answer is about to overwrite. `None` if there is no room, or it is too long: the record
    /// says then that it does not know, until that command is answered.
    pub fn keep(&self, id: u16, at: u32, entry: &[u8]) -> Option<u32> {
        let kept = self.try_keep(at, entry);
        if kept.is_none() {
            self.tables.borrow_mut().lost.push(id);
            self.map.store_release(AT_LOST, 1);
        }
        kept
    }

    fn try_keep(&self, at: u32, entry: &[u8]) -> Option<u32> {
        let mut tables = self.tables.borrow_mut();
        let len = KEPT_HEAD + entry.len() as u64;
        if len > KEPT_LEN {
            return None;
        }
        let number = *tables.kept_free.last()?;
        let base = AT_KEPT + u64::from(number - 1) * KEPT_LEN;
        let room = &mut tables.kept_room[number as usize - 1];
        if u64::from(*room) < len {
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&self.file, flags, base, len).ok()?;
            *room = len as u32;
        }
        tables.kept_free.pop();
        let order = tables.next_order;
        tables.next_order += 1;
        let mut head = [0; KEPT_HEAD as usize];
        head[4..8].copy_from_slice(&(entry.len() as u32).to_le_bytes());
        head[8..12].copy_from_slice(&at.to_le_bytes());
        head[16..].copy_from_slice(&order.to_le_bytes());
        self.put(base, &head);
        self.put(base + KEPT_HEAD, entry);
        Some(number)
    }

    /// A note that a slot has nothing to do, to be made with the batch. `None` if there is no room for more.
    pub fn dead_note(&self, id: u16) -> Option<u32> {
        let mut tables = self.tables.borrow_mut();
        let note = tables.dead_free.pop();
        if note.is_none() {
            tables.lost.push(id);
            self.map.store_release(AT_LOST, 1);
        }
        note
    }

    /// The mark of a command, if it has one.
    pub fn once(&self, id: u16) -> Option<u32> {
        let tables = self.tables.borrow();
        if tables.once.is_empty() { None } else { tables.once.get(&id).copied() }
    }

    fn mark(&self, id: u16) {
        let mut tables = self.tables.borrow_mut();
        if tables.once.contains_key(&id) {
            return;
        }
        // Fewer commands run than there are marks.
        let Some(note) = tables.once_free.pop() else { return };
        tables.once.insert(id, note);
        self.map.store_release(AT_PLAIN, 0);
        self.map.store_release(AT_ONCE + 4 * u64::from(note - 1), id.into());
    }

    /// Steps 1 and 2: the answers are about to go into the ring, whose tail moves.
    pub fn begin(&self, from: u32, to: u32, answers: &[Answer]) {
        for (i, answer) in answers.iter().enumerate() {
            let base = AT_ANSWERS + i as u64 * ANSWER_LEN;
            let mut head = [0; RESPONSE_AT as usize];
            let words = [
                answer.at,
                u32::from(answer.id),
                answer.keep,
                answer.release,
                answer.dead,
                answer.dead_note,
                answer.undead,
                answer.once,
            ];
            for (slot, word) in head.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                *slot = word.to_le_bytes();
            }
            self.put(base, &head);
            self.put(base + RESPONSE_AT, &answer.head);
            if let Some(sense) = answer.sense() {
                self.put(base + RESPONSE_AT + SENSE_AT as u64, sense);
            }
        }
        self.put(AT_BATCH, &from.to_le_bytes());
        self.put(AT_BATCH + 4, &to.to_le_bytes());
        self.put(AT_BATCH + 8, &(answers.len() as u32).to_le_bytes());
        self.map.store_release(AT_VALID, 1);
        // Nothing of the ring is touched before that is seen.
        atomic::fence(atomic::Ordering::Release);
    }

    /// Notes for a successor of another version that the ring alone says all, if that is so. Nothing is answered after that.
    pub fn rest(&self) {
        let tables = self.tables.borrow();
        let is_plain = tables.kept_free.len() == KEPT
            && tables.dead_free.len() == WORDS
            && tables.once.is_empty()
            && tables.lost.is_empty()
            && self.word(AT_VALID) == 0;
        if is_plain {
            self.map.store_release(AT_PLAIN, 1);
        }
    }

    /// Step 4: the answers are in the ring, and its tail is `tail`.
    pub fn settle(&self, answers: &[Answer], tail: u32) {
        let mut tables = self.tables.borrow_mut();
        for answer in answers {
            if answer.keep != 0 {
                self.map.store_release(AT_KEPT + u64::from(answer.keep - 1) * KEPT_LEN, 1);
            }
            if answer.release != 0 {
                self.map.store_release(AT_KEPT + u64::from(answer.release - 1) * KEPT_LEN, 0);
                tables.kept_free.push(answer.release);
            }
            if answer.dead_note != 0 {
                let note = AT_DEAD + 4 * u64::from(answer.dead_note - 1);
                self.map.store_release(note, answer.dead + 1);
            }
            if answer.undead != 0 {
                self.map.store_release(AT_DEAD + 4 * u64::from(answer.undead - 1), 0);
                tables.dead_free.push(answer.undead);
            }
            if answer.once != 0 {
                self.map.store_release(AT_ONCE + 4 * u64::from(answer.once - 1), 0);
                tables.once.remove(&answer.id);
                tables.once_free.push(answer.once);
            }
            if !tables.lost.is_empty() {
                tables.lost.retain(|id| *id != answer.id);
            }
        }
        self.map.store_release(AT_TAIL, tail);
        if tables.lost.is_empty() {
            self.map.store_release(AT_LOST, 0);
        }
        atomic::fence(atomic::Ordering::Release);
        self.map.store_release(AT_VALID, 0);
        // The next batch is not written over this one before that is seen.
        atomic::fence(atomic::Ordering::Release);
    }
}
