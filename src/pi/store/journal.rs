//! The journal: what the tuples of blocks were and what they are to be, durable before the blocks are written.
//!
//! The journal is a run of records, one after another from the start of its area. A record is padded to sectors. All
//! numbers are big-endian:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `PIJ1` |
//! | 4 | 4 | CRC-32C of the record from byte 8 to its end, padding left out |
//! | 8 | 8 | epoch: a random number, the same for all records of a run |
//! | 16 | 8 | number of the record in its run, from 0 |
//! | 24 | 8 | records below this number are settled: a flush has made their blocks and tuples durable |
//! | 32 | 8 | the first block |
//! | 40 | 4 | blocks whose tuples follow |
//! | 44 | 4 | kind: 0 nothing but the numbers above, 1 tuples, 2 the blocks become zeros without protection |
//! | 48 | 8 | blocks (of kind 2; otherwise 0) |
//! | 56 | 20 a block | new tuple (8), old tuple (8), guard of the new data (2), guard of the old data (2) |
//!
//! The guards are in the tuples too, unless a tuple is an escape, whose bits mean nothing: with its guard an old block without
//! protection is told from a torn one.
//!
//! Writers that come together share one durable write (group commit). A position is written with one content only while an
//! epoch lasts, so a run ends at the first record that is not whole, of another epoch, or out of turn. When a flush has
//! settled every record, the run begins anew at the start with a new epoch; when the area is full, writers wait for such a
//! flush ([`Journal::drain`]). Called by [`super::Sidecar`].

use std::{cell::RefCell, collections::BTreeMap, io, ops::Range};

use crc_fast::{CrcAlgorithm, checksum};
use uuid::Uuid;

use crate::{
    pi::tuple::TUPLE_LEN,
    storage::Storage,
    sync::{AsyncMutex, Notify},
    sys::mem::Buffer,
};

/// Bytes of a record before its blocks.
pub(super) const HEAD: usize = 56;
/// Bytes of a block in a record.
pub const ENTRY: usize = 2 * TUPLE_LEN + 4;

const SECTOR: usize = 512;
const MAGIC: [u8; 4] = *b"PIJ1";

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing = 0,
    Tuples = 1,
    Zeros = 2,
}

/// What is to be made durable before blocks are written.
pub enum Intention<'a> {
    /// Blocks from the first on, [`entry`] by entry.
    Tuples(u64, &'a [u8]),
    /// These blocks become zeros without protection.
    Zeros(Range<u64>),
}

/// Appends the entry of one block to those of a record: the tuples in the form that travels, and the guards of the data.
pub fn entry(out: &mut Vec<u8>, (new, new_guard): (&[u8], u16), (old, old_guard): (&[u8], u16)) {
    out.extend_from_slice(new);
    out.extend_from_slice(old);
    out.extend_from_slice(&new_guard.to_be_bytes());
    out.extend_from_slice(&old_guard.to_be_bytes());
}

/// What the journal claims of one block: that it had this tuple, when its data had this guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The block.
    pub lba: u64,
    /// Later claims are higher.
    pub order: u64,
    /// In the form that travels.
    pub tuple: [u8; TUPLE_LEN],
    /// Of the data.
    pub guard: u16,
}

/// All that the journal claims.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claims {
    /// Of blocks that were written, by block, and then by age.
    pub blocks: Vec<Claim>,
    /// Blocks that were made zeros.
    pub zeros: Vec<Range<u64>>,
}

#[derive(Default)]
struct State {
    epoch: u64,
    /// Bytes of the run, those not yet written included.
    head: u64,
    /// The end of the run, which is not durable yet.
    pending: Vec<u8>,
    next: u64,
    /// Records below are durable.
    durable: u64,
    settled: u64,
    /// Records whose blocks are being written; `true`: nobody is at it any more, and it was not finished.
    open: BTreeMap<u64, bool>,
    /// No new records: somebody waits for those that are there.
    closed: bool,
    commits: u64,
}

/// The journal of one sidecar.
pub(super) struct Journal {
    offset: u64,
    len: u64,
    state: RefCell<State>,
    writing: AsyncMutex,
    moved: Notify,
}

/// A durable record whose blocks are being written. Dropped unfinished, it is kept until it is released.
pub struct Recorded<'a> {
    journal: &'a Journal,
    epoch: u64,
    number: u64,
    finished: bool,
}

impl Journal {
    pub fn new(offset: u64, len: u64) -> Journal {
        let mut state = State::default();
        state.restart();
        Journal { offset, len, state: RefCell::new(state), writing: AsyncMutex::new(), moved: Notify::new() }
    }

    /// Blocks of one write that fit into the journal.
    pub fn most(&self) -> u64 {
        // The first record of a run holds nothing, and one sector is lost to padding.
        (self.len.saturating_sub(3 * SECTOR as u64)) / ENTRY as u64
    }

    /// Durable writes so far.
    pub fn commits(&self) -> u64 {
        self.state.borrow().commits
    }

    /// Makes an intention durable. `None` if there is no room, or somebody drains the journal: see [`Journal::drain`].
    pub async fn append(
        &self,
        storage: &impl Storage,
        what: &Intention<'_>,
    ) -> io::Result<Option<Recorded<'_>>> {
        let (epoch, number) = {
            let mut state = self.state.borrow_mut();
            if state.closed || state.head + what.size() > self.len {
                return Ok(None);
            }
            let number = state.push(what);
            state.open.insert(number, false);
            (state.epoch, number)
        };
        let mut recorded = Recorded { journal: self, epoch, number, finished: false };
        let _turn = self.writing.lock().await;
        // Whoever wrote before us has written our record along with its own, or has failed to.
        if self.state.borrow().durable <= number
            && let Err(e) = self.commit(storage).await
        {
            // No block has been touched.
            recorded.finished = true;
            return Err(e);
        }
        Ok(Some(recorded))
    }

    /// Writes what is pending; the caller has the turn. What fails stays pending, so that the run has no gap.
    async fn commit(&self, storage: &impl Storage) -> io::Result<()> {
        let (at, bytes, next) = {
            let state = self.state.borrow();
            let at = self.offset + state.head - state.pending.len() as u64;
            (at, Buffer::from_slice(&state.pending), state.next)
        };
        storage.write(at, &bytes.sg(), true).await?;
        let mut state = self.state.borrow_mut();
        state.pending.drain(..bytes.len());
        state.durable = next;
        state.commits += 1;
        Ok(())
    }

    /// A flush begins: which records it will settle.
    pub fn begin_flush(&self) -> (u64, u64) {
        let state = self.state.borrow();
        (state.epoch, state.open.keys().next().copied().unwrap_or(state.next))
    }

    /// The flush has made data and tuples durable. If it has settled all there is, the run begins anew.
    pub async fn end_flush(&self, storage: &impl Storage, (epoch, below): (u64, u64)) -> io::Result<()> {
        {
            let mut state = self.state.borrow_mut();
            if state.epoch != epoch {
                return Ok(());
            }
            state.settled = state.settled.max(below);
            if below < state.next || state.next <= 1 || !state.open.is_empty() {
                return Ok(());
            }
        }
        let _turn = self.writing.lock().await;
        let bytes = {
            let mut state = self.state.borrow_mut();
            // Somebody may have come while we waited.
            if state.epoch != epoch || below < state.next || !state.open.is_empty() {
                return Ok(());
            }
            state.restart();
            Buffer::from_slice(&state.pending)
        };
        // Not durable, and pending still: should this be lost, the old run is looked at again, to no harm.
        storage.write(self.offset, &bytes.sg(), false).await
    }

    /// Ends the run for good, durably: nothing in it is claimed any more.
    pub async fn clear(&self, storage: &impl Storage) -> io::Result<()> {
        let _turn = self.writing.lock().await;
        self.state.borrow_mut().restart();
        self.commit(storage).await
    }

    /// Whether a record could be appended now.
    pub fn has_room(&self, what: &Intention<'_>) -> bool {
        let state = self.state.borrow();
        !state.closed && state.head + what.size() <= self.len
    }

    /// Lets nobody in, and waits until every record that somebody is at is finished. A flush then settles them all.
    pub async fn drain(&self) {
        self.state.borrow_mut().closed = true;
        loop {
            let moved = self.moved.wait();
            if !self.state.borrow().open.values().any(|left| !left) {
                return;
            }
            moved.await;
        }
    }

    /// Ends [`Journal::drain`].
    pub fn reopen(&self) {
        self.state.borrow_mut().closed = false;
    }

    /// A record that was left unfinished is finished after all.
    pub fn release(&self, (epoch, number): (u64, u64)) {
        let mut state = self.state.borrow_mut();
        if state.epoch == epoch {
            state.open.remove(&number);
        }
    }

    /// Reads what the records claim that are not settled. `mine`: of the run of this session; otherwise of the one that is there.
    pub async fn claims(&self, storage: &impl Storage, mine: bool) -> io::Result<Claims> {
        let epoch = mine.then(|| self.state.borrow().epoch);
        let len = if mine { self.state.borrow().head } else { self.len };
        let buffer = Buffer::zeroed(len as usize);
        storage.read(self.offset, &buffer.sg()).await?;
        Ok(claims(&buffer.to_vec(), epoch))
    }
}

impl State {
    fn push(&mut self, what: &Intention<'_>) -> u64 {
        let (kind, lba, blocks, entries): (_, _, _, &[u8]) = match what {
            Intention::Tuples(lba, entries) => (Kind::Tuples, *lba, 0, entries),
            Intention::Zeros(range) => (Kind::Zeros, range.start, range.end - range.start, &[]),
        };
        self.record(kind, lba, blocks, entries)
    }

    fn record(&mut self, kind: Kind, lba: u64, blocks: u64, entries: &[u8]) -> u64 {
        let number = self.next;
        let start = self.pending.len();
        let out = &mut self.pending;
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        for n in [self.epoch, number, self.settled, lba] {
            out.extend_from_slice(&n.to_be_bytes());
        }
        out.extend_from_slice(&((entries.len() / ENTRY) as u32).to_be_bytes());
        out.extend_from_slice(&(kind as u32).to_be_bytes());
        out.extend_from_slice(&blocks.to_be_bytes());
        out.extend_from_slice(entries);
        let crc = checksum(CrcAlgorithm::Crc32Iscsi, &out[start + 8..]) as u32;
        out[start + 4..start + 8].copy_from_slice(&crc.to_be_bytes());
        let padded = (out.len() - start).next_multiple_of(SECTOR);
        out.resize(start + padded, 0);
        self.head += padded as u64;
        self.next += 1;
        number
    }

    fn restart(&mut self) {
        let State { closed, commits, .. } = *self;
        *self = State { epoch: fresh_epoch(), closed, commits, ..State::default() };
        self.record(Kind::Nothing, 0, 0, &[]);
    }
}

impl Intention<'_> {
    fn size(&self) -> u64 {
        let entries = match self {
            Intention::Tuples(_, entries) => entries.len(),
            Intention::Zeros(_) => 0,
        };
        (HEAD + entries).next_multiple_of(SECTOR) as u64
    }
}

impl Recorded<'_> {
    /// What to release it by.
    pub fn id(&self) -> (u64, u64) {
        (self.epoch, self.number)
    }

    /// Every block matches the tuple that it has, or is to be reported.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.journal.state.borrow_mut();
            if state.epoch != self.epoch {
                return;
            }
            if self.finished {
                state.open.remove(&self.number);
            } else if let Some(left) = state.open.get_mut(&self.number) {
                *left = true;
            }
        }
        self.journal.moved.notify_all();
    }
}

/// No two runs have the same, so that no record is taken for one of another run.
fn fresh_epoch() -> u64 {
    Uuid::new_v4().as_u128() as u64
}

/// What a run claims, from its bytes.
fn claims(bytes: &[u8], epoch: Option<u64>) -> Claims {
    let mut records = Vec::new();
    let (mut at, mut epoch, mut settled) = (0, epoch, 0);
    while let Some(record) = Record::parse(&bytes[at..]) {
        if *epoch.get_or_insert(record.epoch) != record.epoch || record.number != records.len() as u64 {
            break;
        }
        settled = settled.max(record.settled);
        at += record.size;
        records.push(record);
        if at >= bytes.len() {
            break;
        }
    }
    let mut out = Claims::default();
    for record in records.iter().filter(|r| r.number >= settled) {
        if record.kind == Kind::Zeros as u32 {
            out.zeros.push(record.lba..record.lba.saturating_add(record.blocks));
        }
        for (i, e) in record.entries.chunks_exact(ENTRY).enumerate() {
            let lba = record.lba.saturating_add(i as u64);
            let tuple = |at: usize| std::array::from_fn(|i| e[at + i]);
            let guard = |at: usize| u16::from_be_bytes([e[at], e[at + 1]]);
            let order = record.number * 2;
            out.blocks.push(Claim { lba, order, tuple: tuple(TUPLE_LEN), guard: guard(18) });
            out.blocks.push(Claim { lba, order: order + 1, tuple: tuple(0), guard: guard(16) });
        }
    }
    out.blocks.sort_unstable_by_key(|c| (c.lba, c.order));
    out
}

struct Record<'a> {
    epoch: u64,
    number: u64,
    settled: u64,
    lba: u64,
    kind: u32,
    blocks: u64,
    entries: &'a [u8],
    size: usize,
}

impl Record<'_> {
    /// The record at the start of these bytes, if it is whole.
    fn parse(bytes: &[u8]) -> Option<Record<'_>> {
        let head = bytes.get(..HEAD)?;
        let be32 = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| head[at + i]));
        let be64 = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| head[at + i]));
        let len = HEAD.checked_add((be32(40) as usize).checked_mul(ENTRY)?)?;
        let all = bytes.get(..len)?;
        let whole = head[..4] == MAGIC && be32(4) == checksum(CrcAlgorithm::Crc32Iscsi, &all[8..]) as u32;
        whole.then(|| Record {
            epoch: be64(8),
            number: be64(16),
            settled: be64(24),
            lba: be64(32),
            kind: be32(44),
            blocks: be64(48),
            entries: &all[HEAD..],
            size: len.next_multiple_of(SECTOR),
        })
    }
}
