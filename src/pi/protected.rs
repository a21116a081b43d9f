//! A volume whose blocks are protected: every write leaves a tuple, every read is checked.
//!
//! [`Protected`] stands between the SCSI room and the image, and is a [`Volume`] itself. Data and tuples are read side by
//! side and written side by side; a lock on the blocks keeps a read from seeing new data with old tuples.
//!
//! Crashes (mode "bitmap"): the region of a write is marked in the sidecar's intent map, durably, before the write begins,
//! and is cleared only after a flush of both. So after `kill -9` or power loss only marked regions can hold blocks that do
//! not match; they are looked at after opening, those tuples made anew and counted. A LUN does that while it serves
//! ([`Recheck::Beside`]): nobody gets a block that has not been looked at. There is never a false alarm; what bitmap mode
//! cannot see is damage done to a marked region between its last write and that look.
//!
//! Crashes (mode "journal"): the new tuples of a write, and the old ones, are durable in the sidecar's journal before the write
//! begins, and stay there until a flush of both. So after a crash each block gets that one of its tuples that its data match; a
//! block that matches none was torn by the crash, and stays an error. Nothing is made anew, at the price of a durable
//! write for every batch of writes.
//!
//! A write that fails half-way leaves each block old, new or torn, and so its tuples. While the range is still locked its
//! data are read back: blocks that match keep their tuple, others get one for what the medium holds now (the initiator was
//! told that the write failed, so this is not passed off as what it wrote). If even that cannot be done the range is kept
//! as "in doubt": every operation on it tries again first, and fails with a medium error rather than with a false alarm,
//! and its region stays marked (its record kept) for the next open. In mode "journal" a block that was torn gets no new
//! tuple then either: reading it is an error until it is written.
//!
//! Changes of the image by somebody else are told by its stamp (size and time of modification) after a clean close. After
//! a crash there is no stamp to compare: outside marked regions such a change shows as a mismatch when it is read.
//!
//! A read-only volume writes nothing to the sidecar. If that was not closed cleanly, mismatches in marked regions are
//! taken for what they most likely are, writes cut off by the crash, and count as unprotected.

use std::{
    cell::{Cell, RefCell},
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use self::{
    crash::{Doubt, New, Use},
    unchecked::Unchecked,
};
use super::{
    chain::Beneath,
    check::Checker,
    error::{PiOpenError, PiOpenErrorKind},
    exposure::Exposure,
    guard::Guard,
    store::{PiMode, Sidecar, Source, Stamp, open_file},
    tuple::{PiType, TUPLE_LEN},
};
use crate::{
    nbd::uri::is_uri,
    storage::{FileStorage, Storage},
    sync::{AsyncMutex, RangeLock},
    sys::{
        exec::{boxed, join},
        io::Io,
        mem::Sg,
    },
    units::{BlockSize, Blocks, ByteOffset, Lba},
    volume::{AtRest, Extent, IoError, IoErrorKind, IoOp, Limits, Result, TupleCheck, Volume, WriteFlags},
};

/// How an image is protected.
#[derive(Debug, Clone)]
pub struct Protection {
    /// The image's file: for messages, and for the stamp at close.
    pub image: PathBuf,
    /// The sidecar's file.
    pub sidecar: PathBuf,
    /// The type asked for.
    pub kind: PiType,
    /// How it stays true across a crash, if that is asked for; otherwise as the sidecar has it.
    pub mode: Option<PiMode>,
    /// Whether initiators read and write the tuples.
    pub exposure: Exposure,
    /// The LUN's block size.
    pub block_size: BlockSize,
    /// The volume is not written.
    pub read_only: bool,
    /// The image's stamp, taken when its lock was held and before anything of ours was written to it.
    pub found: Stamp,
    /// When what a crash has left marked is looked at.
    pub recheck: Recheck,
}

/// When the regions are looked at that a crash has left marked (mode "bitmap").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Recheck {
    /// By the opening, which takes as long as reading them does.
    #[default]
    First,
    /// By [`Protected::recheck_next`], called again and again, and by whoever needs a block before that.
    Beside,
}

/// What the protection of a LUN has seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Blocks that match their tuple, read or sent by an initiator.
    pub verified: u64,
    /// Tuples made for blocks written without any.
    pub generated: u64,
    /// Reads, and writes with tuples, that failed on a guard.
    pub guard_errors: u64,
    /// The same on an application tag.
    pub app_errors: u64,
    /// The same on a reference tag.
    pub ref_errors: u64,
    /// Blocks read that have no tuple.
    pub unprotected: u64,
    /// Tuples made anew after a crash or a failed write.
    pub recomputed: u64,
    /// Blocks that a crash or a failed write has torn (mode "journal"): they are errors until they are written.
    pub torn: u64,
    /// Blocks that did not match, or could not be read, and were brought back from a mirror's target.
    #[serde(default)]
    pub repaired: u64,
    /// Blocks of regions that a crash has left marked, and that have not been looked at yet.
    #[serde(default)]
    pub unchecked: u64,
}

impl Counters {
    /// Both together.
    pub fn plus(self, other: Counters) -> Counters {
        Counters {
            verified: self.verified + other.verified,
            generated: self.generated + other.generated,
            guard_errors: self.guard_errors + other.guard_errors,
            app_errors: self.app_errors + other.app_errors,
            ref_errors: self.ref_errors + other.ref_errors,
            unprotected: self.unprotected + other.unprotected,
            recomputed: self.recomputed + other.recomputed,
            torn: self.torn + other.torn,
            repaired: self.repaired + other.repaired,
            unchecked: self.unchecked + other.unchecked,
        }
    }
}

/// A volume under protection. `S` is the sidecar's storage.
pub struct Protected<V, S = FileStorage> {
    volume: V,
    sidecar: Sidecar<S>,
    beneath: Beneath<S>,
    checker: Cell<Checker>,
    exposure: Exposure,
    /// FORMAT UNIT has turned protection off as far as initiators see.
    hidden: Cell<bool>,
    capacity: Cell<Blocks>,
    read_only: bool,
    lock: RangeLock,
    /// Blocks of which it is not known whether they match.
    doubt: RefCell<Vec<Doubt>>,
    /// Blocks that a crash may have left without their right tuple.
    unchecked: Unchecked,
    /// Held by who empties the journal because it is full.
    making_room: AsyncMutex,
    failed: Cell<bool>,
    counters: Cell<Counters>,
    sidecar_path: PathBuf,
    stamp: Box<dyn Fn() -> io::Result<Stamp>>,
}

impl<V: Volume> Protected<V> {
    /// Opens the sidecar of an image that is open and locked, and rechecks what a crash has left marked.
    ///
    /// # Errors
    /// [`PiOpenError`], which knows the next step. The volume is dropped.
    pub async fn open(io: &Io, volume: V, how: &Protection) -> std::result::Result<Self, PiOpenError> {
        let fault = |what| PiOpenError::new(&how.sidecar, &how.image, what);
        let storage = match open_file(io, &how.sidecar, how.read_only).await {
            Ok(storage) => storage,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(fault(PiOpenErrorKind::Missing)),
            Err(e) => return Err(fault(PiOpenErrorKind::Store(e.into()))),
        };
        let (image, found) = (how.image.clone(), how.found);
        // The size of an NBD export is its server's, and does not change while it is in use.
        let stamp = move || if is_uri(&image) { Ok(found) } else { Stamp::of(&image) };
        Protected::attach(volume, storage, how, Box::new(stamp)).await
    }
}

impl<V: Volume, S: Storage> Protected<V, S> {
    /// [`Protected::open`] over any storage; `stamp` tells the image's stamp after it is closed.
    pub async fn attach(
        volume: V,
        storage: S,
        how: &Protection,
        stamp: Box<dyn Fn() -> io::Result<Stamp>>,
    ) -> std::result::Result<Self, PiOpenError> {
        let fault = |what| PiOpenError::new(&how.sidecar, &how.image, what);
        let store = |e: io::Error| fault(PiOpenErrorKind::Store(e.into()));
        let mut sidecar = Sidecar::open(storage).await.map_err(|e| fault(PiOpenErrorKind::Store(e)))?;
        if !how.read_only {
            sidecar.remember();
        }
        let info = sidecar.info();
        // What an initiator's FORMAT UNIT has chosen stands in the sidecar alone.
        if info.pi != how.kind && !info.formatted {
            return Err(fault(PiOpenErrorKind::Type { has: info.pi, wanted: how.kind }));
        }
        if let Some(wanted) = how.mode.filter(|mode| *mode != info.mode) {
            return Err(fault(PiOpenErrorKind::Mode { has: info.mode, wanted }));
        }
        if info.block_size != how.block_size.bytes() {
            let (has, wanted) = (info.block_size, how.block_size.bytes());
            return Err(fault(PiOpenErrorKind::BlockSize { has, wanted }));
        }
        let capacity = how.block_size.blocks_in(volume.limits().capacity);
        if !info.in_use {
            if !info.stamp.matches(&how.found) {
                return Err(fault(PiOpenErrorKind::ImageChanged { left: info.stamp, found: how.found }));
            }
            if info.blocks != capacity.0 {
                return Err(fault(PiOpenErrorKind::Capacity { has: info.blocks, image: capacity.0 }));
            }
        }
        let exposed = how.exposure == Exposure::Initiator && !info.hidden;
        let me = Protected {
            volume,
            sidecar,
            beneath: Beneath::nothing(),
            checker: Cell::new(Checker {
                guard: Guard::best(),
                kind: info.pi,
                block_size: how.block_size,
                tags: if exposed { Exposure::Initiator } else { info.tags },
            }),
            exposure: how.exposure,
            hidden: Cell::new(info.hidden),
            capacity: Cell::new(capacity),
            read_only: how.read_only,
            lock: RangeLock::new(),
            doubt: RefCell::default(),
            unchecked: Unchecked::default(),
            making_room: AsyncMutex::new(),
            failed: Cell::new(false),
            counters: Cell::default(),
            sidecar_path: how.sidecar.clone(),
            stamp,
        };
        if !how.read_only {
            me.sidecar.begin_use().await.map_err(store)?;
            if exposed {
                me.sidecar.admit_initiator_tags().await.map_err(store)?;
            }
            if info.blocks != capacity.0 {
                // A resize that a crash cut off. Beyond the smaller of the two no tuple is of any worth.
                me.sidecar.forget_beyond(capacity.min(Blocks(info.blocks))).await.map_err(store)?;
                me.sidecar.set_capacity(capacity).await.map_err(store)?;
            }
        }
        me.recheck(how.recheck).await.map_err(|e| fault(PiOpenErrorKind::Image(Box::new(e))))?;
        Ok(me)
    }

    /// The same, with the sidecars of the image's backing files: blocks that the image does not hold are checked too.
    pub fn over(self, beneath: Beneath<S>) -> Self {
        Protected { beneath, ..self }
    }

    /// The volume beneath. What is done to it past the protection will not match.
    pub fn volume(&self) -> &V {
        &self.volume
    }

    /// The sidecar.
    pub fn sidecar(&self) -> &Sidecar<S> {
        &self.sidecar
    }

    /// What was seen so far.
    pub fn counters(&self) -> Counters {
        Counters { unchecked: self.unchecked.blocks(), ..self.counters.get() }
    }

    /// Bytes of a block.
    pub fn block_size(&self) -> BlockSize {
        self.checker().block_size
    }

    /// Blocks there are now.
    pub fn blocks_now(&self) -> Blocks {
        self.capacity.get()
    }

    /// Whether nothing may be written.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What makes and checks its tuples now.
    pub fn checker(&self) -> Checker {
        self.checker.get()
    }

    fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        change(&mut counters);
        self.counters.set(counters);
    }

    /// The blocks of a range of bytes, if it lies inside and is made of blocks.
    fn blocks(&self, op: IoOp, at: ByteOffset, len: u64) -> Result<(Lba, u64)> {
        let size = self.checker().block_size;
        let end = at.checked_add(len);
        let inside =
            end.is_some_and(|end| end.0 >> size.shift() <= self.capacity.get().0 && size.is_aligned(end));
        if !inside || !size.is_aligned(at) {
            return Err(IoError::new(IoErrorKind::OutOfRange, op).at(at));
        }
        Ok((size.lba_of(at), size.blocks_in(len).0))
    }

    fn sidecar_error(&self, op: IoOp, at: ByteOffset, e: io::Error) -> IoError {
        IoError::from_io(op, e).path(&self.sidecar_path).at(at).detail("protection information")
    }

    fn writable(&self, op: IoOp) -> Result<()> {
        if self.read_only {
            return Err(IoError::new(IoErrorKind::ReadOnly, op));
        }
        if self.failed.get() {
            return Err(IoError::new(IoErrorKind::Failed, op));
        }
        Ok(())
    }

    /// Reads data and their tuples, and checks nothing.
    pub(super) async fn get(&self, at: ByteOffset, to: &Sg, from: Source) -> Result<(Lba, Vec<u8>)> {
        let (lba, blocks) = self.blocks(IoOp::Read, at, to.len() as u64)?;
        let _together = self.locked(IoOp::Read, (lba, blocks), Use::Read).await?;
        let known = if from == Source::Memory { self.sidecar.known_tuples(lba, blocks) } else { None };
        let (data, tuples) = match known {
            Some(tuples) => (self.volume.read(at, to).await, Ok(tuples)),
            None => {
                let tuples = self.sidecar.tuples_from(from, lba, blocks);
                boxed(|| join(self.volume.read(at, to), tuples)).await
            }
        };
        data?;
        let mut tuples = tuples.map_err(|e| self.sidecar_error(IoOp::Read, at, e))?;
        if !self.beneath.is_empty() {
            self.beneath.fill(&self.volume, &self.checker(), lba, &mut tuples).await?;
        }
        Ok((lba, tuples))
    }

    /// Writes data and their tuples.
    async fn put(
        &self,
        at: ByteOffset,
        (lba, blocks): (Lba, u64),
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        let op = IoOp::Write;
        let turn = self.begin(op, at, (lba, blocks), New::Blocks(from, &tuples)).await?;
        // What the journal holds needs not be durable twice.
        let dsync = flags.fua && self.sidecar.mode() == PiMode::Bitmap;
        let done = if self.sidecar.has_space(lba, blocks) {
            let tuples = self.sidecar.write_tuples(lba, tuples, dsync);
            let (data, tuples) = join(self.volume.write(at, from, flags), tuples).await;
            data.and(tuples.map_err(|e| self.sidecar_error(op, at, e)))
        } else {
            // The first tuples in a page may find the disk full: before the data are touched, then.
            match self.sidecar.write_tuples(lba, tuples, dsync).await {
                Ok(()) => self.volume.write(at, from, flags).await,
                Err(e) => Err(self.sidecar_error(op, at, e)),
            }
        };
        self.end(turn, done).await
    }

    async fn zero(&self, at: ByteOffset, len: u64, keep_space: Option<bool>) -> Result<()> {
        let op = IoOp::Discard;
        let (lba, blocks) = self.blocks(op, at, len)?;
        self.writable(op)?;
        if blocks == 0 {
            return Ok(());
        }
        let turn = self.begin(op, at, (lba, blocks), New::Zeros).await?;
        let done = async {
            match keep_space {
                None => self.volume.discard(at, len).await?,
                Some(keep) => self.volume.write_zeroes(at, len, !keep).await?,
            }
            if self.sidecar.mode() == PiMode::Journal {
                // The journal knows nothing of the tuples that are given up: the data go first, then.
                self.volume.flush().await?;
            }
            let cleared = self.sidecar.clear_tuples(lba, blocks, keep_space == Some(true)).await;
            cleared.map_err(|e| self.sidecar_error(op, at, e))
        };
        let done = done.await;
        self.end(turn, done).await
    }
}

impl<V: Volume, S: Storage> Volume for Protected<V, S> {
    fn limits(&self) -> Limits {
        let size = self.checker().block_size.bytes();
        let inner = self.volume.limits();
        let (atomic_write, atomic_unit) = self.keeps_whole(&inner);
        Limits {
            capacity: self.capacity.get().0 * size,
            alignment: inner.alignment.max(size as u32),
            read_only: inner.read_only || self.read_only,
            atomic_write,
            atomic_unit,
            ..inner
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        self.read_and_check(at, to).await.map(drop)
    }

    async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        self.read_and_check(at, to).await.map(Some)
    }

    fn at_rest(&self) -> Option<AtRest> {
        let Checker { kind, tags, .. } = self.checker();
        Some(AtRest { kind, initiators: tags == Exposure::Initiator })
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        let op = IoOp::Write;
        let (lba, blocks) = self.blocks(op, at, from.len() as u64)?;
        self.writable(op)?;
        if blocks == 0 {
            return Ok(());
        }
        let tuples = self.checker().generate(from, lba);
        self.put(at, (lba, blocks), from, tuples, flags).await?;
        self.count(|c| c.generated += blocks);
        Ok(())
    }

    async fn free_bytes(&self) -> Option<u64> {
        self.volume.free_bytes().await
    }

    async fn flush(&self) -> Result<()> {
        if self.read_only {
            return self.volume.flush().await;
        }
        if self.failed.get() {
            return Err(IoError::new(IoErrorKind::Failed, IoOp::Flush));
        }
        let epoch = self.sidecar.begin_flush();
        let (data, tuples) = join(self.volume.flush(), self.sidecar.sync()).await;
        let tuples = tuples.map_err(|e| {
            let source = self.sidecar_error(IoOp::Flush, ByteOffset(0), e);
            IoError { kind: IoErrorKind::Failed, at: None, ..source }
        });
        if data.is_err() || tuples.is_err() {
            self.failed.set(true);
        }
        data?;
        tuples?;
        self.sidecar.end_flush(epoch, false).await;
        Ok(())
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.zero(at, len, None).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        self.zero(at, len, Some(!may_unmap)).await
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        self.blocks(IoOp::Map, at, len)?;
        self.volume.map_extents(at, len).await
    }

    /// Shrinking gives up the tuples of the tail first and for good: if the image then cannot be cut off, its tail is
    /// without protection, and never with the wrong one.
    async fn resize(&self, capacity: u64) -> Result<()> {
        self.writable(IoOp::Resize)?;
        let _alone = self.lock.exclusive(0, u64::MAX).await;
        let new = self.checker().block_size.blocks_in(capacity);
        if new.to_bytes(self.checker().block_size) != Some(capacity) || !self.sidecar.can_cover(new) {
            return Err(IoError::new(IoErrorKind::OutOfRange, IoOp::Resize));
        }
        let store = |e| self.sidecar_error(IoOp::Resize, ByteOffset(0), e);
        self.forget_journal(IoOp::Resize).await?;
        if new < self.capacity.get() {
            self.sidecar.forget_beyond(new).await.map_err(store)?;
            self.looked_at(&(new.0..u64::MAX));
        }
        self.volume.resize(capacity).await?;
        self.sidecar.set_capacity(new).await.map_err(store)?;
        self.capacity.set(new);
        Ok(())
    }

    fn protection(&self) -> Option<PiType> {
        (self.exposure == Exposure::Initiator && !self.hidden.get()).then_some(self.checker().kind)
    }

    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        self.read_as_told(at, to, check).await
    }

    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        let (lba, blocks) = self.blocks(IoOp::Write, at, from.len() as u64)?;
        self.writable(IoOp::Write)?;
        if tuples.len() as u64 != blocks * TUPLE_LEN as u64 {
            return Err(IoError::new(IoErrorKind::OutOfRange, IoOp::Write)
                .at(at)
                .detail("tuples and blocks"));
        }
        if blocks == 0 {
            return Ok(());
        }
        self.put(at, (lba, blocks), from, tuples, flags).await
    }

    async fn reformat(&self, protection: Option<PiType>) -> Result<()> {
        self.writable(IoOp::Discard)?;
        let _alone = self.lock.exclusive(0, u64::MAX).await;
        self.forget_journal(IoOp::Discard).await?;
        let done = self.sidecar.reformat(protection).await;
        done.map_err(|e| self.sidecar_error(IoOp::Discard, ByteOffset(0), e))?;
        // No block has a tuple now.
        self.looked_at(&(0..u64::MAX));
        self.hidden.set(protection.is_none());
        let kind = protection.unwrap_or(self.checker().kind);
        self.checker.set(Checker { kind, tags: self.sidecar.tags(), ..self.checker() });
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.read_only {
            return self.volume.close().await;
        }
        let mark = self.sidecar.begin_flush();
        let flushed = self.flush().await;
        if flushed.is_ok() {
            self.sidecar.end_flush(mark, true).await;
        }
        // Closing may change the image once more, and gives up its lock; the stamp is taken right after.
        let closed = self.volume.close().await;
        flushed?;
        closed?;
        let stamp = (self.stamp)().map_err(|e| IoError::from_io(IoOp::Close, e))?;
        let store = |e| self.sidecar_error(IoOp::Close, ByteOffset(0), e);
        if self.doubt.borrow().is_empty() {
            // What is in doubt is for the next opening to look at.
            self.sidecar.clear_journal().await.map_err(store)?;
        }
        self.sidecar.end_use(stamp).await.map_err(store)
    }
}

/// The sidecar's path for an image: the one named, or the one beside it.
pub fn sidecar_path(image: &Path, named: Option<&Path>) -> PathBuf {
    named.map_or_else(|| super::store::default_path(image), Path::to_owned)
}

mod crash;
mod unchecked;
mod wrong;

#[cfg(test)]
mod costs;
#[cfg(test)]
mod cuts;
#[cfg(test)]
mod initiator_tests;
#[cfg(test)]
mod model;
#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
