//! What guests do to a volume that is being mirrored.
//!
//! A write first says that its range may differ, and only then begins. In the background it goes to the source alone and leaves the
//! range dirty. Write-blocking it goes to both, with its range to itself, so that writes that overlap reach both in one order; whatever
//! goes wrong on the target is the job's trouble, and not the guest's.

use std::time::Instant;

use super::{Mirror, SyncMode, Task, Told};
use crate::{
    job::Side,
    pi::tuple::{TUPLE_LEN, Tuple, tuples},
    sys::{
        exec::join,
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{IoError, IoErrorKind, Result, TupleCheck, WriteFlags},
};

/// One change of a volume.
enum Change<'a> {
    Write(&'a Sg, WriteFlags),
    Tuples(&'a Sg, Vec<u8>, WriteFlags),
    Discard(u64),
    Zeroes(u64, bool),
}

impl Change<'_> {
    fn len(&self) -> u64 {
        match self {
            Change::Write(from, _) | Change::Tuples(from, ..) => from.len() as u64,
            Change::Discard(len) | Change::Zeroes(len, _) => *len,
        }
    }

    async fn apply<S: Side>(&self, volume: &S, at: ByteOffset) -> Result<()> {
        match self {
            Change::Write(from, flags) => volume.write(at, from, *flags).await,
            Change::Tuples(from, tuples, flags) => {
                volume.write_with_tuples(at, from, tuples.clone(), *flags).await
            }
            Change::Discard(len) => volume.discard(at, *len).await,
            Change::Zeroes(len, may_unmap) => volume.write_zeroes(at, *len, *may_unmap).await,
        }
    }
}

/// A command under way.
struct Guest<'a, S>(&'a Mirror<S>);

impl<S> Drop for Guest<'_, S> {
    fn drop(&mut self) {
        self.0.guests.set(self.0.guests.get() - 1);
    }
}

impl<S: Side> Mirror<S> {
    fn guest(&self) -> Guest<'_, S> {
        self.guests.set(self.guests.get() + 1);
        self.guest_came.set(Some(Instant::now()));
        Guest(self)
    }

    async fn alter(&self, at: ByteOffset, change: Change<'_>) -> Result<()> {
        let _guest = self.guest();
        let len = change.len();
        if len == 0 {
            return change.apply(&*self.source, at).await;
        }
        if self.settings.get().task.is_within() {
            // What is written here need not be copied here.
            let _together = self.lock.shared(at.0, len).await;
            return change.apply(&*self.source, at).await;
        }
        if self.settings.get().task.keeps_the_past() {
            self.copy_before(at.0, len).await;
            return change.apply(&*self.source, at).await;
        }
        let both = self.is_write_blocking();
        let _alone =
            if both { self.lock.exclusive(at.0, len).await } else { self.lock.shared(at.0, len).await };
        let writing = self.map.begin_write(at.0, len);
        if !both || self.is_over() {
            let done = change.apply(&*self.source, at).await;
            drop(writing);
            self.changed.notify_all();
            return done;
        }
        // What has to be durable before the answer is so on the source; the target is when it is gone over to.
        let calm = match &change {
            Change::Write(from, _) => Change::Write(from, WriteFlags::default()),
            Change::Tuples(from, tuples, _) => Change::Tuples(from, tuples.clone(), WriteFlags::default()),
            Change::Discard(len) if !self.settings.get().unmap => Change::Zeroes(*len, false),
            Change::Discard(len) => Change::Discard(*len),
            Change::Zeroes(len, may_unmap) => Change::Zeroes(*len, *may_unmap && self.settings.get().unmap),
        };
        let (source, target) = join(change.apply(&*self.source, at), calm.apply(&*self.target, at)).await;
        match (&source, &target) {
            (Ok(()), Ok(())) => writing.reached_both(at.0, len),
            _ => drop(writing),
        }
        if let (Ok(()), Err(e)) = (&source, &target) {
            self.failed(false, e);
        }
        // There is something to copy; or this was the last that kept it from ending.
        if !self.map.is_settled() || self.verdict().is_some() {
            self.changed.notify_all();
        }
        source
    }

    /// As [`crate::volume::Volume::write`].
    pub(in crate::job) async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        self.alter(at, Change::Write(from, flags)).await
    }

    /// As [`crate::volume::Volume::write_with_tuples`].
    pub(in crate::job) async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        self.alter(at, Change::Tuples(from, tuples, flags)).await
    }

    /// As [`crate::volume::Volume::discard`].
    pub(in crate::job) async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.alter(at, Change::Discard(len)).await
    }

    /// As [`crate::volume::Volume::write_zeroes`].
    pub(in crate::job) async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        self.alter(at, Change::Zeroes(len, may_unmap)).await
    }

    /// As [`crate::volume::Volume::read`].
    pub(in crate::job) async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        let _guest = self.guest();
        match self.source.read(at, to).await {
            Err(e) if self.may_mend(&e) && self.mend(at.0, to.len() as u64).await => {
                self.source.read(at, to).await
            }
            done => done,
        }
    }

    /// As [`crate::volume::Volume::read_along`].
    pub(in crate::job) async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        let _guest = self.guest();
        match self.source.read_along(at, to).await {
            Err(e) if self.may_mend(&e) && self.mend(at.0, to.len() as u64).await => {
                self.source.read_along(at, to).await
            }
            done => done,
        }
    }

    /// As [`crate::volume::Volume::read_with_tuples`].
    pub(in crate::job) async fn read_with_tuples(
        &self,
        at: ByteOffset,
        to: &Sg,
        check: &TupleCheck,
    ) -> Result<Vec<u8>> {
        let _guest = self.guest();
        match self.source.read_with_tuples(at, to, check).await {
            Err(e) if self.may_mend(&e) && self.mend(at.0, to.len() as u64).await => {
                self.source.read_with_tuples(at, to, check).await
            }
            done => done,
        }
    }

    /// Whether there is another side that has what this one has.
    fn has_spare(&self) -> bool {
        let settings = self.settings.get();
        let task = settings.task;
        // What is on another host is not read from here.
        let same = !task.is_within() && !task.keeps_the_past() && task != Task::Handover;
        same && settings.sync != SyncMode::None && !self.is_over()
    }

    /// Whether the other side may be of help.
    fn may_mend(&self, e: &IoError) -> bool {
        let may = matches!(e.kind, IoErrorKind::Protection(_) | IoErrorKind::Medium);
        may && self.has_spare()
    }

    /// Brings back from the target what cannot be read from the source or does not match; true if something was. Only where both are
    /// known to be the same, and only blocks that the target can vouch for.
    pub async fn mend(&self, at: u64, len: u64) -> bool {
        if !self.has_spare() {
            return false;
        }
        let _alone = self.lock.exclusive(at, len).await;
        if !self.map.is_clean(at, len) {
            return false;
        }
        let size = self.source.block_bytes();
        let block = Buffer::zeroed(size as usize).sg();
        let mut any = false;
        for place in (at..at.saturating_add(len)).step_by(size as usize).map(ByteOffset) {
            let Err(e) = self.source.read_whole(place, &block).await else { continue };
            if !self.may_mend(&e) {
                continue;
            }
            let Ok(kept) = self.target.read_whole(place, &block).await else { continue };
            // A block without protection may be as wrong as the one that it should replace.
            let vouched = match (&e.kind, &kept, self.source.protected_by()) {
                (_, Some(tuple), Some(kind)) => {
                    tuple.len() == TUPLE_LEN
                        && tuples(tuple).next().is_some_and(|t: Tuple| !t.is_escape(kind))
                }
                (IoErrorKind::Medium, None, _) => true,
                _ => false,
            };
            if !vouched {
                continue;
            }
            match self.source.write_whole(place, &block, kept).await {
                Ok(()) => {
                    any = true;
                    self.repaired.set(self.repaired.get() + 1);
                    tracing::warn!(job = self.id, lba = place.0 / size, was = %e, "a block was brought back from the mirror's target");
                    (self.hooks.tell)(Told::Repaired(place.0 / size));
                }
                Err(error) => {
                    tracing::error!(job = self.id, lba = place.0 / size, %error, "a block could not be brought back");
                }
            }
        }
        any
    }
}
