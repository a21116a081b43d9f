//! What makes a write safe against a crash and against an error half-way: [`Protected::begin`] before it, [`Protected::end`]
//! after it, [`Protected::recheck`] at the next opening and [`Protected::recheck_next`] from then on. The head of [`super`] says what is promised.

use std::{cell::RefCell, ops::Range};

use super::{Protected, Recheck};
use crate::{
    pi::{
        exposure::Exposure,
        recompute::{CHUNK, Mode, next_run, recompute},
        replay::{Sink, replay},
        store::{ENTRY, Intention, PiMode, Recorded, Sidecar, Source, Writing, entry},
        tuple::{TUPLE_LEN, Tuple},
    },
    storage::Storage,
    sync::RangeGuard,
    sys::mem::{Buffer, Sg},
    units::{ByteOffset, Lba},
    volume::{IoError, IoErrorKind, IoOp, Limits, Result, Volume},
};

/// What blocks are about to become.
pub(super) enum New<'a> {
    /// These data with these tuples.
    Blocks(&'a Sg, &'a [u8]),
    /// Zeros without protection.
    Zeros,
}

/// What a range is locked for.
pub(super) enum Use {
    /// To read it.
    Read,
    /// To change it; these of its blocks whole, and both they and their tuples.
    Change(Range<u64>),
}

/// Bytes around a block that somebody needs which are looked at along with it.
const AROUND: u64 = 64 << 10;

/// Blocks of which it is not known whether they match, and the record of the journal that is kept for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doubt {
    pub blocks: Range<u64>,
    pub record: Option<(u64, u64)>,
}

/// What lasts beyond the crash: the mark of the regions, or the record in the journal.
enum Safety<'a> {
    Marked(Writing<'a>),
    Recorded(Recorded<'a>),
}

/// A change under way: its blocks are locked, and a crash is provided for.
pub(super) struct Turn<'a> {
    doubt: InDoubt<'a>,
    safety: Safety<'a>,
    _alone: RangeGuard,
}

/// Puts its blocks on the list of those in doubt when it is dropped, unless they were taken out.
struct InDoubt<'a> {
    list: &'a RefCell<Vec<Doubt>>,
    what: Option<Doubt>,
}

impl Drop for InDoubt<'_> {
    fn drop(&mut self) {
        if let Some(doubt) = self.what.take() {
            self.list.borrow_mut().push(doubt);
        }
    }
}

impl<V: Volume, S: Storage> Protected<V, S> {
    /// Most bytes of an atomic write, and its unit. After a crash each block gets a tuple that its data match, so data that are old or new as
    /// a whole have such tuples. But initiators' tags have to come with their data: in bitmap mode a crash may part a block
    /// from its tags, and in journal mode each block whose data are the same before and after has either's tags, whatever the others have.
    pub(super) fn keeps_whole(&self, inner: &Limits) -> (u32, u32) {
        let block = self.checker().block_size.bytes() as u32;
        let one = inner.keeps_whole(ByteOffset(0), block.into());
        match (self.checker().tags, self.sidecar.mode()) {
            (Exposure::Target, _) => (inner.atomic_write, inner.atomic_unit.max(block)),
            (Exposure::Initiator, PiMode::Journal) if one => (block, block),
            (Exposure::Initiator, _) => (0, 0),
        }
    }

    /// Before blocks and their tuples are changed: locks them, and marks or records durably what is to come.
    ///
    /// # Errors
    /// Nothing has been changed then.
    pub(super) async fn begin(
        &self,
        op: IoOp,
        at: ByteOffset,
        (lba, blocks): (Lba, u64),
        new: New<'_>,
    ) -> Result<Turn<'_>> {
        let checker = self.checker();
        // A part of a cluster that a backing file holds takes the rest of it along.
        let (first, span) = self.beneath.span(checker.block_size, (lba, blocks), self.capacity.get().0);
        let own = lba.0..lba.0 + blocks;
        let alone = self.locked(op, (first, span), Use::Change(own)).await?;
        let safety = match self.sidecar.mode() {
            PiMode::Bitmap => {
                let marked = self.sidecar.intend(first, span).await;
                Safety::Marked(marked.map_err(|e| self.sidecar_error(op, at, e))?)
            }
            PiMode::Journal => Safety::Recorded(self.record(op, at, (lba, blocks), new).await?),
        };
        if !self.beneath.is_empty() {
            let dsync = self.sidecar.mode() == PiMode::Journal;
            let (own, whole) = ((lba, blocks), (first, span));
            let lifted = self.beneath.lift(&self.volume, &self.sidecar, &checker, own, whole, dsync).await;
            if let Err(e) = lifted {
                // The blocks themselves have not been touched.
                match safety {
                    Safety::Marked(writing) => writing.finish(),
                    Safety::Recorded(recorded) => recorded.finish(),
                }
                return Err(e);
            }
        }
        let record = match &safety {
            Safety::Marked(_) => None,
            Safety::Recorded(recorded) => Some(recorded.id()),
        };
        let what = Some(Doubt { blocks: lba.0..lba.0 + blocks, record });
        Ok(Turn { doubt: InDoubt { list: &self.doubt, what }, safety, _alone: alone })
    }

    /// After the change. If it has failed its blocks are settled, or stay in doubt; so they do if the turn is dropped without this.
    pub(super) async fn end(&self, mut turn: Turn<'_>, done: Result<()>) -> Result<()> {
        let settled = match (&done, &turn.doubt.what) {
            (Err(_), Some(doubt)) => self.settle(&doubt.blocks).await.is_ok(),
            _ => true,
        };
        if settled {
            if let Some(doubt) = turn.doubt.what.take() {
                // Every block matches its tuple now, whatever a crash had left there.
                self.looked_at(&doubt.blocks);
            }
            match turn.safety {
                Safety::Marked(writing) => writing.finish(),
                Safety::Recorded(recorded) => recorded.finish(),
            }
        }
        done
    }

    /// Puts what is to come into the journal.
    async fn record(
        &self,
        op: IoOp,
        at: ByteOffset,
        (lba, blocks): (Lba, u64),
        new: New<'_>,
    ) -> Result<Recorded<'_>> {
        if blocks > self.sidecar.most_recorded() && matches!(new, New::Blocks(..)) {
            let why = "more than the journal of the protection information takes at once";
            return Err(IoError::new(IoErrorKind::OutOfRange, op).at(at).detail(why));
        }
        let entries = match new {
            New::Blocks(data, tuples) => self.entries(op, at, (lba, blocks), data, tuples).await?,
            New::Zeros => Vec::new(),
        };
        let what = match new {
            New::Blocks(..) => Intention::Tuples(lba.0, &entries),
            New::Zeros => Intention::Zeros(lba.0..lba.0 + blocks),
        };
        loop {
            let recorded = self.sidecar.record(&what).await.map_err(|e| self.sidecar_error(op, at, e))?;
            match recorded {
                Some(recorded) => return Ok(recorded),
                None => self.make_room(&what).await?,
            }
        }
    }

    /// What the journal says of blocks that are to be written: their tuples, and those that they have.
    async fn entries(
        &self,
        op: IoOp,
        at: ByteOffset,
        (lba, blocks): (Lba, u64),
        data: &Sg,
        new: &[u8],
    ) -> Result<Vec<u8>> {
        let checker = self.checker();
        let is_escape = |t: &[u8; TUPLE_LEN]| Tuple::from_bytes(*t).is_escape(checker.kind);
        let guard = |t: &[u8; TUPLE_LEN]| Tuple::from_bytes(*t).guard;
        let old = self.sidecar.tuples_from(Source::Memory, lba, blocks).await;
        let old = old.map_err(|e| self.sidecar_error(op, at, e))?;
        let (old, new) = (old.as_chunks::<TUPLE_LEN>().0, new.as_chunks::<TUPLE_LEN>().0);
        // The guard in an escape means nothing; the journal needs the one of the data.
        let mut old_guards: Vec<u16> = old.iter().map(guard).collect();
        if old.iter().any(is_escape) {
            let before = Buffer::zeroed(data.len());
            // What cannot be read cannot come back after a crash either.
            if self.volume.read(at, &before.sg()).await.is_ok() {
                checker.guards(&before.sg(), |i, crc| {
                    if is_escape(&old[i]) {
                        old_guards[i] = crc;
                    }
                });
            }
        }
        let mut new_guards: Vec<u16> = new.iter().map(guard).collect();
        if new.iter().any(is_escape) {
            checker
                .guards(data, |i, crc| new_guards[i] = if is_escape(&new[i]) { crc } else { new_guards[i] });
        }
        let mut out = Vec::with_capacity(blocks as usize * ENTRY);
        for (i, (new, old)) in new.iter().zip(old).enumerate() {
            entry(&mut out, (new, new_guards[i]), (old, old_guards[i]));
        }
        Ok(out)
    }

    /// The journal is full: a flush settles what is in it, once those are done who are writing.
    async fn make_room(&self, what: &Intention<'_>) -> Result<()> {
        let _turn = self.making_room.lock().await;
        if self.sidecar.has_room(what) {
            return Ok(());
        }
        let reopen = Reopen(&self.sidecar);
        self.sidecar.drain().await;
        let flushed = self.flush().await;
        drop(reopen);
        flushed?;
        if self.sidecar.has_room(what) {
            return Ok(());
        }
        let why = "the journal of the protection information is full of writes that have failed";
        Err(IoError::new(IoErrorKind::Medium, IoOp::Write).detail(why))
    }

    /// Settles and empties the journal, durably, while nobody is writing: what it says of some blocks will not be true of what
    /// comes after them.
    pub(super) async fn forget_journal(&self, op: IoOp) -> Result<()> {
        if self.sidecar.mode() == PiMode::Bitmap {
            return Ok(());
        }
        self.flush().await?;
        self.sidecar.clear_journal().await.map_err(|e| self.sidecar_error(op, ByteOffset(0), e))
    }

    /// Locks a range of which nothing is in doubt: what is, is settled first, or the operation fails.
    pub(super) async fn locked(
        &self,
        op: IoOp,
        (lba, blocks): (Lba, u64),
        what_for: Use,
    ) -> Result<RangeGuard> {
        let overlap = |d: &&Doubt| d.blocks.start < lba.0 + blocks && lba.0 < d.blocks.end;
        loop {
            let guard = match what_for {
                Use::Change(_) => self.lock.exclusive(lba.0, blocks).await,
                Use::Read => self.lock.shared(lba.0, blocks).await,
            };
            if !self.unchecked.is_empty()
                && let Some(found) = self.needed(&(lba.0..lba.0 + blocks), &what_for)
            {
                drop(guard);
                self.recheck_around(op, found).await?;
                continue;
            }
            // Looked at under the lock: a write that we waited for may have failed.
            let Some(doubt) = self.doubt.borrow().iter().find(overlap).cloned() else {
                return Ok(guard);
            };
            drop(guard);
            let range = &doubt.blocks;
            let _alone = self.lock.exclusive(range.start, range.end - range.start).await;
            if !self.doubt.borrow().contains(&doubt) {
                continue;
            }
            if let Err(e) = self.settle(range).await {
                let why = "a failed write left this range in doubt, and that could not be mended";
                let kind = IoErrorKind::Medium;
                return Err(IoError { source: e.source, ..IoError::new(kind, op) }
                    .at(ByteOffset(lba.0 << self.checker().block_size.shift()))
                    .detail(why));
            }
            self.doubt.borrow_mut().retain(|d| *d != doubt);
            if let Some(record) = doubt.record {
                self.sidecar.release(record);
            }
        }
    }

    /// After a failed write, with the range locked: gives every block a tuple that matches; in mode "journal" one of its own, and
    /// a torn block stays an error.
    async fn settle(&self, range: &Range<u64>) -> Result<()> {
        let checker = self.checker();
        if self.sidecar.mode() == PiMode::Journal {
            let claims = self.sidecar.claims(true).await;
            let claims = claims.map_err(|e| IoError::from_io(IoOp::Read, e).path(&self.sidecar_path))?;
            if !claims.zeros.is_empty() {
                // The journal does not know the tuples that zeros take the place of: these go once the zeros are durable.
                self.volume.flush().await?;
            }
            let all = range.clone();
            let done = replay(&self.volume, &self.sidecar, &checker, &claims, all, Sink::File).await?;
            if done.unreadable > 0 {
                // Whether these are old or new is known once they can be read.
                return Err(IoError::new(IoErrorKind::Medium, IoOp::Read));
            }
            self.count(|c| c.torn += done.torn);
            tracing::warn!(
                sidecar = %self.sidecar_path.display(),
                first_lba = range.start,
                blocks = range.end - range.start,
                torn = done.torn,
                "a write failed; its blocks have the tuples of what the medium holds, or are errors if it was torn"
            );
            return Ok(());
        }
        let done =
            recompute(&self.volume, &self.sidecar, &checker, range.clone(), Mode::Mend, |_| ()).await?;
        self.count(|c| c.recomputed += done.recomputed + done.protected);
        tracing::warn!(
            sidecar = %self.sidecar_path.display(),
            first_lba = range.start,
            blocks = range.end - range.start,
            recomputed = done.recomputed,
            unreadable = done.unreadable,
            "a write failed; the tuples of its blocks have been made to match what the medium holds"
        );
        Ok(())
    }

    /// At opening: settles what the last session has left marked or recorded.
    pub(super) async fn recheck(&self, when: Recheck) -> Result<()> {
        match self.sidecar.mode() {
            PiMode::Bitmap if self.read_only => Ok(()),
            PiMode::Bitmap => {
                self.take_marked();
                while when == Recheck::First && self.recheck_next().await? {}
                Ok(())
            }
            PiMode::Journal => self.recheck_recorded().await,
        }
    }

    /// The regions that are marked are those to look at.
    fn take_marked(&self) {
        self.sidecar.hold_marked();
        let marked = self.sidecar.marked();
        for blocks in &marked {
            self.unchecked.add(blocks.clone());
        }
        if !marked.is_empty() {
            tracing::info!(
                sidecar = %self.sidecar_path.display(),
                regions = marked.len(),
                blocks = self.unchecked.blocks(),
                "not closed cleanly: regions that were being written are to be rechecked"
            );
        }
    }

    /// Looks at some of what a crash has left marked, up to 1 MiB of data: makes the tuples anew that do not match. False if nothing is left to look at.
    ///
    /// # Errors
    /// What is left stays to be looked at, by a later call or by whoever needs it.
    pub async fn recheck_next(&self) -> Result<bool> {
        let Some(range) = self.unchecked.first() else {
            self.rechecked().await?;
            return Ok(false);
        };
        // What is written meanwhile matches: a hole is passed over without a lock, and is of no interest even if it is none any more.
        let run = next_run(&self.volume, &self.sidecar, range.start, range.end).await;
        let run = run.map_err(|e| e.path(&self.sidecar_path))?.map_or(range.end..range.end, |run| run.blocks);
        if range.start < run.start {
            self.looked_at(&(range.start..run.start));
        }
        if run.start < run.end {
            self.recheck_within(run).await?;
        }
        Ok(true)
    }

    /// Blocks of a range that are to be looked at before it can be used so.
    fn needed(&self, range: &Range<u64>, what_for: &Use) -> Option<Range<u64>> {
        match what_for {
            Use::Read => self.unchecked.first_in(range),
            // What is written whole needs no look at what was there.
            Use::Change(own) => {
                let before = self.unchecked.first_in(&(range.start..own.start));
                before.or_else(|| self.unchecked.first_in(&(own.end..range.end)))
            }
        }
    }

    /// Looks at blocks that somebody needs, and at some around them.
    async fn recheck_around(&self, op: IoOp, needed: Range<u64>) -> Result<()> {
        let size = self.checker().block_size;
        let (around, most) = (AROUND >> size.shift(), CHUNK >> size.shift());
        let start = needed.start / around * around;
        let range = start..(needed.end.div_ceil(around) * around).min(start + most);
        self.recheck_within(range).await.map_err(|e| {
            let why = "a crash left this range to be looked at, and that could not be done";
            IoError { source: e.source, ..IoError::new(IoErrorKind::Medium, op) }
                .at(ByteOffset(needed.start << size.shift()))
                .detail(why)
        })
    }

    /// Looks at those blocks of a range that are still to be looked at, while nobody else uses it.
    async fn recheck_within(&self, range: Range<u64>) -> Result<()> {
        let _alone = self.lock.exclusive(range.start, range.end - range.start).await;
        let checker = self.checker();
        for part in self.unchecked.parts_of(&range) {
            let done =
                recompute(&self.volume, &self.sidecar, &checker, part.clone(), Mode::Mend, |_| ()).await;
            let done = done.map_err(|e| e.path(&self.sidecar_path))?;
            self.count(|c| c.recomputed += done.recomputed + done.protected);
            self.unchecked.found(done);
            self.looked_at(&part);
        }
        Ok(())
    }

    /// Blocks match their tuples, or have none: nothing is left to look at there.
    pub(super) fn looked_at(&self, blocks: &Range<u64>) {
        if self.unchecked.is_empty() {
            return;
        }
        for part in self.unchecked.remove(blocks) {
            self.sidecar.checked(&part, |region| self.unchecked.first_in(region).is_none());
        }
    }

    /// Everything that a crash had left has been looked at.
    async fn rechecked(&self) -> Result<()> {
        let Some(done) = self.unchecked.take_found() else { return Ok(()) };
        tracing::info!(
            sidecar = %self.sidecar_path.display(),
            blocks_read = done.read,
            recomputed = done.recomputed,
            protected_anew = done.protected,
            unreadable = done.unreadable,
            "not closed cleanly: regions that were being written have been rechecked"
        );
        // What was read came from the page cache, maybe; it has to stay as it is before the marks may go.
        let mark = self.sidecar.begin_flush();
        self.flush().await?;
        self.sidecar.end_flush(mark, true).await;
        Ok(())
    }

    /// Gives the blocks that the journal knows of the tuple that their data match, and empties it.
    async fn recheck_recorded(&self) -> Result<()> {
        let store = |e| self.sidecar_error(IoOp::Open, ByteOffset(0), e);
        let claims = self.sidecar.claims(false).await.map_err(store)?;
        if claims.blocks.is_empty() && claims.zeros.is_empty() {
            return Ok(());
        }
        let checker = self.checker();
        let sink = if self.read_only { Sink::Memory } else { Sink::File };
        if !self.read_only {
            // What is judged now has to be what is there after the next crash.
            self.volume.flush().await?;
        }
        let all = 0..self.capacity.get().0;
        let done = replay(&self.volume, &self.sidecar, &checker, &claims, all, sink).await;
        let done = done.map_err(|e| e.path(&self.sidecar_path))?;
        self.count(|c| c.torn += done.torn);
        tracing::info!(
            sidecar = %self.sidecar_path.display(),
            blocks = done.looked_at,
            settled = done.settled,
            torn = done.torn,
            unreadable = done.unreadable,
            "not closed cleanly: the journal has been replayed"
        );
        if done.torn > 0 {
            tracing::error!(
                sidecar = %self.sidecar_path.display(),
                blocks = done.torn,
                "the crash has torn blocks in the middle; reading them is an error until they are written"
            );
        }
        if self.read_only {
            return Ok(());
        }
        self.flush().await?;
        self.sidecar.clear_journal().await.map_err(store)
    }
}

/// Lets records into the journal again.
struct Reopen<'a, S: Storage>(&'a Sidecar<S>);

impl<S: Storage> Drop for Reopen<'_, S> {
    fn drop(&mut self) {
        self.0.drained();
    }
}
