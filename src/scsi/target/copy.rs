//! EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (SPC-4 6.4, 6.17 to 6.21): blocks go from one logical unit to another, or to another
//! place of the same, without passing through the initiator.
//!
//! The unit that gets the command is the copy manager. It reads and writes by errands ([`Errand`]), to itself too, one at a time and
//! [`CHUNK`] bytes at most; it holds nothing while it waits, so copies in both directions cannot wait for each other. Where the kernel can move
//! the blocks by itself, it does ([`by_kernel`]). All segments are
//! checked before the first block is moved. A segment that overlaps itself ends as if all of it had been read first; the segments of
//! a list are done one after another.

mod by_kernel;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    time::{Duration, Instant},
};

use super::{Command, Failure, Once, Outcome, Target, along::plain_cdb, rw::CHUNK};
use crate::{
    scsi::{
        cdb::Cdb,
        copy_list::{self, CopyList, LONGEST, MAX_COPIES, MAX_SEGMENT_BYTES, Segment},
        neighbour::{Answer, Designator, Errand, Neighbour, Undone},
        sense::{Asc, Sense, SenseBytes, SenseKey, Specific, Status},
    },
    sys::mem::Buffer,
    units::{BlockSize, Lba},
    volume::{Volume, loan::Moved},
};

/// How long a copy may take. The kernel gives a command up some time later, and would not know what became of it.
const PATIENCE: Duration = Duration::from_secs(45);
/// Copies that are over and whose results are kept.
const KEPT: usize = 16;

/// How a copy went.
#[derive(Debug, Clone)]
enum State {
    Running,
    Completed,
    Failed { sense: Sense },
}

/// What is told of a copy.
#[derive(Debug, Clone)]
struct Record {
    id: u8,
    state: State,
    /// Segments that were done.
    segments: u16,
    /// Bytes that were written.
    bytes: u64,
}

/// The copies of a logical unit, under way and over.
#[derive(Default)]
pub(super) struct Copies {
    running: Cell<u8>,
    records: RefCell<VecDeque<Record>>,
}

/// A copy under way; forgotten if it is dropped without an end.
struct Running<'a> {
    copies: &'a Copies,
    id: Option<u8>,
    started: Instant,
}

impl Copies {
    /// Begins a copy under that list identifier, whose older results are forgotten.
    fn begin(&self, id: Option<u8>) -> Result<Running<'_>, Failure> {
        let mut records = self.records.borrow_mut();
        let same = records.iter().position(|r| Some(r.id) == id);
        if let Some(at) = same {
            if matches!(records[at].state, State::Running) {
                return Err(Sense::new(SenseKey::IllegalRequest, Asc::OPERATION_IN_PROGRESS).into());
            }
            records.remove(at);
        }
        if self.running.get() >= MAX_COPIES {
            return Err(Failure::Status(Status::Busy));
        }
        self.running.set(self.running.get() + 1);
        if let Some(id) = id {
            records.push_back(Record { id, state: State::Running, segments: 0, bytes: 0 });
        }
        Ok(Running { copies: self, id, started: Instant::now() })
    }

    fn find(&self, id: u8) -> Option<Record> {
        self.records.borrow().iter().find(|r| r.id == id).cloned()
    }
}

impl Running<'_> {
    fn change(&self, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.copies.records.borrow_mut().iter_mut().find(|r| Some(r.id) == self.id) {
            change(record);
        }
    }

    /// Keeps how it went; only failures if nobody will ask for anything else.
    fn end(self, result: Result<(), Sense>, discard: bool) {
        if !(discard && result.is_ok()) {
            self.change(|r| {
                r.state = match result {
                    Ok(()) => State::Completed,
                    Err(sense) => State::Failed { sense },
                }
            });
        }
        let mut records = self.copies.records.borrow_mut();
        let over = |r: &Record| !matches!(r.state, State::Running);
        while records.iter().filter(|r| over(r)).count() > KEPT {
            let Some(oldest) = records.iter().position(over) else { break };
            records.remove(oldest);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.copies.running.set(self.copies.running.get() - 1);
        let mut records = self.copies.records.borrow_mut();
        records.retain(|r| Some(r.id) != self.id || !matches!(r.state, State::Running));
    }
}

/// A logical unit that takes part.
#[derive(Clone)]
struct Party {
    /// `None` for the copy manager's own.
    other: Option<Rc<dyn Neighbour>>,
    block_size: BlockSize,
    blocks: u64,
}

impl Party {
    fn is_same(&self, other: &Party) -> bool {
        let number = |party: &Party| party.other.as_ref().map(|n| n.number());
        number(self) == number(other)
    }
}

/// A segment, once it is known to lie where it can.
struct Move {
    number: u16,
    source: Party,
    destination: Party,
    /// Bytes from the start of each.
    from: u64,
    to: u64,
    len: u64,
}

impl Move {
    /// Whether it has blocks that are both read and written.
    fn overlaps_itself(&self) -> bool {
        self.source.is_same(&self.destination) && self.from.abs_diff(self.to) < self.len
    }

    /// Whether it writes to what the other reads.
    fn writes_what_reads(&self, other: &Move) -> bool {
        self.destination.is_same(&other.source)
            && self.to < other.from + other.len
            && other.from < self.to + self.len
    }
}

/// COPY ABORTED for a segment; `byte` is the field of its descriptor that is to blame, from the descriptor's start.
fn aborted(asc: Asc, segment: u16, byte: u16) -> Sense {
    let mut sense = Sense::new(SenseKey::CopyAborted, asc);
    sense.specific = Specific::Segment { segment, byte };
    sense
}

/// What the initiator of the copy is told when an errand came to nothing: the unit's own code, under COPY ABORTED.
fn undone(undone: Undone, segment: u16, byte: u16) -> Sense {
    let asc = match undone {
        Undone::Unreachable => Asc::COPY_TARGET_NOT_REACHABLE,
        Undone::Failed(Failure::Sense(sense)) => sense.asc,
        Undone::Failed(Failure::Status(_)) => Asc::NONE,
    };
    aborted(asc, segment, byte)
}

/// Bytes of a segment descriptor at which its fields start (SPC-4 6.4.6.4).
mod field {
    pub const SOURCE: u16 = 4;
    pub const DESTINATION: u16 = 6;
    pub const BLOCKS: u16 = 10;
    pub const FROM: u16 = 12;
    pub const TO: u16 = 20;
}

impl<V: Volume> Target<V> {
    /// The names under which it may be a source or a destination: those of VPD page 83h that are the logical unit's.
    pub fn designators(&self) -> Vec<Designator> {
        self.identity.designators()
    }

    /// Does an errand for a copy, this unit's or another's. Unit attentions are the initiators' and stay; all else that stands in
    /// the way of a READ or WRITE does so here.
    ///
    /// # Errors
    /// What an initiator would be told.
    pub async fn run_errand(&self, errand: Errand) -> Result<Answer, Failure> {
        if let Some(sense) = self.medium.get().sense() {
            return Err(sense.into());
        }
        match errand {
            Errand::Describe => {
                let blocks = self.geometry.get().blocks;
                Ok(Answer::Described { block_size: self.block_size, blocks })
            }
            Errand::Read { lba, blocks } => {
                let (at, len) = self.place(lba, blocks)?;
                let asked = self.asked(plain_cdb(&mut [0; 16]), lba)?;
                let _pass = self.gate.pass(lba.0, blocks).await;
                let to = Buffer::zeroed(len as usize).sg();
                let along = self.fetch_along(at, &to, &asked).await?;
                Ok(Answer::Data(to.to_vec(), along))
            }
            Errand::Write { lba, data, along } => {
                self.is_writable()?;
                let blocks = data.len() as u64 >> self.block_size.shift();
                let (at, _) = self.place(lba, blocks)?;
                let from = Buffer::from_slice(&data).sg();
                drop(data);
                {
                    let _pass = self.gate.pass(lba.0, blocks).await;
                    let taken = self.taken_along(lba, &from, along)?;
                    self.store_along(at, &from, taken).await?;
                }
                if self.is_time_for_space() {
                    self.look_at_space().await;
                }
                Ok(Answer::Written)
            }
            // Whoever lends has to hold what it lends: [`Target::lend`].
            Errand::Lend { .. } => Ok(Answer::Lent(None)),
            Errand::Take { lba, loan } => self.take(lba, loan).await.map(Answer::Moved),
            Errand::Flush => {
                self.volume.flush().await.map_err(|e| self.failure(e))?;
                Ok(Answer::Written)
            }
            Errand::Zero { lba, blocks, may_unmap } => {
                self.is_writable()?;
                let (at, len) = self.place(lba, blocks)?;
                let _pass = self.gate.pass(lba.0, blocks).await;
                self.volume.write_zeroes(at, len, may_unmap).await.map_err(|e| self.failure(e))?;
                Ok(Answer::Written)
            }
            Errand::Map { lba, blocks } => {
                let (at, len) = self.place(lba, blocks)?;
                let runs = self.volume.map_extents(at, len).await.map_err(|e| self.failure(e))?;
                Ok(Answer::Mapped(runs.iter().map(|run| (run.len, run.kind, run.depth)).collect()))
            }
        }
    }

    pub(super) async fn extended_copy(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let len = cdb.u32(10) as usize;
        if len == 0 {
            return Ok(0);
        }
        if command.data.len() < len {
            return Err(Sense::parameter_list_length().into());
        }
        let list = copy_list::parse(&self.parameters(command, len.min(LONGEST))?, len)?;
        let running = self.copies.begin(list.id)?;
        // What fails here has moved nothing, and leaves nothing that could be asked for.
        let moves = self.plan(&list).await?;
        begin_once(&moves, command.once.as_deref())?;
        let result = self.execute_all(&moves, &running).await;
        running.end(result, list.discard);
        result?;
        Ok(0)
    }

    /// Where the blocks of each segment lie, if they all can be copied.
    async fn plan(&self, list: &CopyList) -> Result<Vec<Move>, Sense> {
        let mut parties: Vec<Option<Party>> = vec![None; list.units.len()];
        let mut moves = Vec::new();
        for (number, segment) in (0..).zip(&list.segments) {
            let source = self.party(list, &mut parties, segment.source, number, field::SOURCE).await?;
            let destination =
                self.party(list, &mut parties, segment.destination, number, field::DESTINATION).await?;
            moves.push(plan_one(number, segment, source, destination)?);
        }
        Ok(moves)
    }

    async fn execute_all(&self, moves: &[Move], running: &Running<'_>) -> Result<(), Sense> {
        for m in moves {
            self.execute_move(m, running).await?;
            running.change(|r| r.segments += 1);
        }
        Ok(())
    }

    /// The unit that a segment names by its index.
    async fn party(
        &self,
        list: &CopyList,
        known: &mut [Option<Party>],
        index: u16,
        segment: u16,
        byte: u16,
    ) -> Result<Party, Sense> {
        let index = usize::from(index);
        let nobody = aborted(Asc::UNREACHABLE_COPY_TARGET, segment, byte);
        let unit = list.units.get(index).ok_or(nobody)?;
        if let Some(party) = &known[index] {
            return Ok(party.clone());
        }
        let who = unit.who.as_ref().ok_or(nobody)?;
        let mut found = self.neighbours.as_ref().map(|n| n.named(who)).unwrap_or_default();
        let own = self.designators().contains(who);
        // A name that two have is nobody's: the copy might destroy the wrong one.
        let other = match (own, found.len()) {
            (true, 0) => None,
            (false, 1) => found.pop(),
            _ => return Err(undone(Undone::Unreachable, segment, byte)),
        };
        let (block_size, blocks) = match self.ask(other.as_ref(), Errand::Describe).await {
            Ok(Answer::Described { block_size, blocks }) => (block_size, blocks),
            Ok(_) => return Err(undone(Undone::Unreachable, segment, byte)),
            Err(e) => return Err(undone(e, segment, byte)),
        };
        if u64::from(unit.block_length) != block_size.bytes() {
            return Err(Sense::invalid_parameter(unit.at + 29));
        }
        let party = Party { other, block_size, blocks };
        known[index] = Some(party.clone());
        Ok(party)
    }

    async fn ask(&self, other: Option<&Rc<dyn Neighbour>>, errand: Errand) -> Result<Answer, Undone> {
        match other {
            Some(other) => other.ask(errand).await,
            None => self.run_errand(errand).await.map_err(Undone::Failed),
        }
    }

    async fn execute_move(&self, m: &Move, running: &Running<'_>) -> Result<(), Sense> {
        let backwards = m.source.is_same(&m.destination) && m.from < m.to;
        let mut by_kernel = !m.overlaps_itself();
        let mut done = 0;
        while done < m.len {
            if running.started.elapsed() > PATIENCE
                || self.neighbours.as_ref().is_some_and(|n| n.should_end())
            {
                return Err(aborted(Asc::NONE, m.number, field::BLOCKS));
            }
            let n = (m.len - done).min(CHUNK);
            let at = if backwards { m.len - done - n } else { done };
            if by_kernel {
                let moved = self.move_by_kernel(m, at, n).await?;
                by_kernel = moved != Moved::Never;
                if moved == Moved::Done {
                    done += n;
                    running.change(|r| r.bytes += n);
                    continue;
                }
            }
            let (source, destination) = (&m.source, &m.destination);
            let lba = Lba((m.from + at) >> source.block_size.shift());
            let read = Errand::Read { lba, blocks: n >> source.block_size.shift() };
            let (data, along) = match self.ask(source.other.as_ref(), read).await {
                Ok(Answer::Data(data, along)) if data.len() as u64 == n => (data, along),
                Ok(_) => return Err(undone(Undone::Unreachable, m.number, field::SOURCE)),
                Err(e) => return Err(undone(e, m.number, field::SOURCE)),
            };
            let lba = Lba((m.to + at) >> destination.block_size.shift());
            let write = Errand::Write { lba, data, along };
            match self.ask(destination.other.as_ref(), write).await {
                Ok(Answer::Written) => {}
                Ok(_) => return Err(undone(Undone::Unreachable, m.number, field::DESTINATION)),
                Err(e) => return Err(undone(e, m.number, field::DESTINATION)),
            }
            done += n;
            running.change(|r| r.bytes += n);
        }
        Ok(())
    }

    /// COPY STATUS. Nothing of the copy but this is kept.
    pub(super) fn receive_copy_status(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let record = self.copies.find(cdb.u8(2)).ok_or(Sense::invalid_field(2, 7))?;
        let mut out = vec![0, 0, 0, 8, 0, 0, 0, 0];
        out[4] = match record.state {
            State::Running => 0,
            State::Completed => 1,
            State::Failed { .. } => 2,
        };
        out[5..7].copy_from_slice(&record.segments.to_be_bytes());
        // TRANSFER COUNT UNITS: a list moves no more than 2 GiB, so bytes.
        out.extend(u32::try_from(record.bytes).unwrap_or(u32::MAX).to_be_bytes());
        self.reply(command, &out, u64::from(cdb.u32(10)))
    }

    /// RECEIVE DATA: no segment of those implemented leaves data to be received.
    pub(super) fn receive_copy_data(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        self.copies.find(cdb.u8(2)).ok_or(Sense::invalid_field(2, 7))?;
        self.reply(command, &[0; 4], u64::from(cdb.u32(10)))
    }

    pub(super) fn receive_copy_parameters(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let data = copy_list::operating_parameters(self.block_size);
        self.reply(command, &data, u64::from(cdb.u32(10)))
    }

    /// FAILED SEGMENT DETAILS: the status and sense data of a copy that failed, once more.
    pub(super) fn receive_copy_failure(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let record = self.copies.find(cdb.u8(2)).ok_or(Sense::invalid_field(2, 7))?;
        let mut out = vec![0; 4];
        if let State::Failed { sense } = record.state {
            let descriptor = self.settings.get().descriptor_sense;
            let sense: SenseBytes = Sense { descriptor, ..sense }.to_bytes();
            out.resize(60, 0);
            out[56] = Status::CheckCondition as u8;
            out[58..60].copy_from_slice(&(sense.len() as u16).to_be_bytes());
            out.extend(sense);
            let available = (out.len() - 4) as u32;
            out[..4].copy_from_slice(&available.to_be_bytes());
        }
        self.reply(command, &out, u64::from(cdb.u32(10)))
    }
}

/// Where one segment writes what one reads, a copy that was cut off and is begun again would read what it has written: such a list is
/// not begun a second time.
fn begin_once(moves: &[Move], once: Option<&dyn Once>) -> Result<(), Sense> {
    let Some(once) = once else { return Ok(()) };
    if !moves.iter().any(|m| moves.iter().any(|n| m.writes_what_reads(n))) {
        return Ok(());
    }
    if once.is_marked() {
        return Err(aborted(Asc::NONE, 0, field::BLOCKS));
    }
    once.mark();
    Ok(())
}

/// Where a segment's blocks lie, if they do.
fn plan_one(number: u16, segment: &Segment, source: Party, destination: Party) -> Result<Move, Sense> {
    let unit = if segment.of_destination { destination.block_size } else { source.block_size };
    let len = u64::from(segment.blocks) * unit.bytes();
    let whole = |size: BlockSize| len.is_multiple_of(size.bytes());
    if !whole(source.block_size) || !whole(destination.block_size) {
        return Err(aborted(Asc::UNEXPECTED_INEXACT_SEGMENT, number, field::BLOCKS));
    }
    if len > MAX_SEGMENT_BYTES {
        return Err(aborted(Asc::INVALID_FIELD_IN_PARAMETER_LIST, number, field::BLOCKS));
    }
    let place = |lba: Lba, party: &Party, byte| {
        let blocks = len >> party.block_size.shift();
        match lba.0.checked_add(blocks) {
            Some(end) if end <= party.blocks => Ok(lba.0 << party.block_size.shift()),
            _ => Err(aborted(Asc::NONE, number, byte)),
        }
    };
    let from = place(segment.from, &source, field::FROM)?;
    let to = place(segment.to, &destination, field::TO)?;
    Ok(Move { number, source, destination, from, to, len })
}
