//! The short way: reads and writes whose clusters are known from memory, which is nearly all of them. Nothing is loaded, no table changes,
//! nobody is waited for but the file, so the future is small and need not be boxed. Whatever is not as simple as that is declined with
//! `None`, and goes the long way (`read_any`, `write_any`).

use super::{
    Changing, Qcow2, Storage,
    map::{Kind, Run},
};
use crate::{
    sys::mem::Sg,
    units::ByteOffset,
    volume::{IoOp, Result, WriteFlags},
};

impl<S: Storage> Qcow2<S> {
    /// The run that a whole range is, if memory tells and the range is one of the disk's.
    fn whole_run(&self, op: IoOp, at: ByteOffset, len: u64) -> Option<Kind> {
        if len == 0 || self.check_range(op, at, len).is_err() {
            return None;
        }
        match self.run_cached(at.0, len)? {
            Ok(Run { len: found, kind }) if found == len => Some(kind),
            _ => None,
        }
    }

    /// A read of one run that is not compressed. It has begun: whoever shuts the image waits for it.
    pub(super) fn read_at_once<'a>(
        &'a self,
        at: ByteOffset,
        to: &'a Sg,
    ) -> Option<impl Future<Output = Result<()>> + use<'a, S>> {
        self.check_alive(IoOp::Read).ok()?;
        let inside = self.readers.try_enter()?;
        let kind = self.whole_run(IoOp::Read, at, to.len() as u64)?;
        if matches!(kind, Kind::Compressed { .. }) {
            return None;
        }
        let at_work = self.epochs.enter();
        Some(async move {
            let _held = (inside, at_work);
            match kind {
                Kind::Data { host, .. } => {
                    self.data().read_data(host, to).await.map_err(|e| self.io_error(IoOp::Read, e).at(at))
                }
                Kind::Unallocated => self.read_backing(at.0, to).await,
                Kind::Zero { .. } | Kind::Compressed { .. } => {
                    to.fill(0, to.len(), 0);
                    Ok(())
                }
            }
        })
    }

    /// A write in place, of clusters that are this image's alone. It has begun: whoever shuts the image waits for it, and dropped before its
    /// end it fails the image, as every change does.
    pub(super) fn write_at_once<'a>(
        &'a self,
        at: ByteOffset,
        from: &'a Sg,
        flags: WriteFlags,
    ) -> Option<impl Future<Output = Result<()>> + use<'a, S>> {
        // The first change clears header bits, and a write that is to be durable syncs.
        if flags.fua || flags.atomic || !self.begun.get() || self.check_writable(IoOp::Write).is_err() {
            return None;
        }
        let inside = self.writers.try_enter()?;
        let stays = self.moves.pass_at_once()?;
        let Kind::Data { host, owned: true } = self.whole_run(IoOp::Write, at, from.len() as u64)? else {
            return None;
        };
        if self.touches_metadata(host, from.len() as u64) {
            return None;
        }
        let at_work = self.epochs.enter();
        let changing = Changing(&self.barrier);
        Some(async move {
            let _held = (inside, stays, at_work);
            let written = self.data().write_data(host, from).await;
            changing.finish();
            written.map_err(|e| self.io_error(IoOp::Write, e).at(at))
        })
    }
}
