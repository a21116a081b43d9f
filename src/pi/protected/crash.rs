//! What makes a write safe against a crash and against an error half-way: [`Protected::begin`] before it, [`Protected::end`]
//! after it, [`Protected::recheck`] at the next opening. The head of [`super`] says what is promised.

use std::{cell::RefCell, ops::Range};

use super::Protected;
use crate::{
    pi::{
        recompute::{Mode, Recomputed, recompute},
        replay::{Sink, replay},
        store::{ENTRY, Intention, PiMode, Recorded, Sidecar, Writing, entry},
        tuple::{TUPLE_LEN, Tuple},
    },
    storage::Storage,
    sync::RangeGuard,
    sys::mem::{Buffer, Sg},
    units::{ByteOffset, Lba},
    volume::{IoError, IoErrorKind, IoOp, Result, Volume},
};

/// What blocks are about to become.
pub(super) enum New<'a> {
    /// These data with these tuples.
    Blocks(&'a Sg, &'a [u8]),
    /// Zeros without protection.
    Zeros,
}

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
        let alone = self.locked(op, first, span, true).await?;
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
            turn.doubt.what = None;
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
        let old = self.sidecar.read_tuples(lba, blocks).await.map_err(|e| self.sidecar_error(op, at, e))?;
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
        lba: Lba,
        blocks: u64,
        exclusive: bool,
    ) -> Result<RangeGuard> {
        let overlap = |d: &&Doubt| d.blocks.start < lba.0 + blocks && lba.0 < d.blocks.end;
        loop {
            let guard = match exclusive {
                true => self.lock.exclusive(lba.0, blocks).await,
                false => self.lock.shared(lba.0, blocks).await,
            };
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
    pub(super) async fn recheck(&self) -> Result<()> {
        match self.sidecar.mode() {
            PiMode::Bitmap if self.read_only => Ok(()),
            PiMode::Bitmap => self.recheck_marked().await,
            PiMode::Journal => self.recheck_recorded().await,
        }
    }

    /// Looks at the regions that are marked, makes the tuples anew that do not match, and clears them.
    async fn recheck_marked(&self) -> Result<()> {
        let marked = self.sidecar.marked();
        if marked.is_empty() {
            return Ok(());
        }
        let checker = self.checker();
        let mut done = Recomputed::default();
        for blocks in &marked {
            let part = recompute(&self.volume, &self.sidecar, &checker, blocks.clone(), Mode::Mend, |_| ());
            done.add(part.await.map_err(|e| e.path(&self.sidecar_path))?);
        }
        self.count(|c| c.recomputed += done.recomputed + done.protected);
        tracing::info!(
            sidecar = %self.sidecar_path.display(),
            regions = marked.len(),
            blocks_read = done.read,
            recomputed = done.recomputed,
            protected_anew = done.protected,
            unreadable = done.unreadable,
            "not closed cleanly: regions that were being written have been rechecked"
        );
        // What was read came from the page cache, maybe; it has to stay as it is before the marks may go.
        self.flush().await?;
        self.sidecar.end_flush(self.sidecar.begin_flush(), true).await;
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
