//! The volume as it was when a backup began, for whoever wants to read it while the backup goes on (what QEMU calls image fleecing).
//!
//! Only a backup that copies what is overwritten and nothing else (`sync none`) has one: what it has copied is read from its target, and
//! all else from the volume. A reader shares its granules, and the copy before a change has them to itself. So a granule is as it was for as
//! long as it is read: a change of it waits for the read, and a reader that comes later finds the copy.
//!
//! The moment may be lost at any time: the copy before a change fails, or the job is ended. Changes are not held up then, so what is read
//! from there on is worth nothing; a reader looks before and after each read, and says so.

use super::Mirror;
use crate::{
    job::Side,
    sync::RangeGuard,
    sys::mem::Sg,
    units::ByteOffset,
    volume::{ExtentKind, IoError},
};

/// Bytes that are read with their granules held, while guests are idle and while they are at work: a change waits for no more than that.
const PIECE: u64 = super::copy::PIECE;
const SMALL_PIECE: u64 = super::copy::SMALL_PIECE;

/// Why the past cannot be read.
#[derive(Debug)]
pub enum PastError {
    /// The job does not keep it, or not any more.
    Lost,
    /// It could not be read, from the volume itself (`source`) or from what was copied.
    Io {
        /// From the volume.
        source: bool,
        /// What went wrong.
        error: IoError,
    },
}

impl<S: Side> Mirror<S> {
    /// Whether what the volume was when the job began can be read.
    pub fn keeps_its_moment(&self) -> bool {
        let asked = self.state.borrow().asked.is_some();
        self.settings.get().keeps_only_the_past() && !asked && !self.is_over() && !self.closed.get()
    }

    fn still(&self) -> Result<(), PastError> {
        if self.keeps_its_moment() { Ok(()) } else { Err(PastError::Lost) }
    }

    /// Which side has a byte as it was, and up to where, at `stop` at the latest. Its granules have to be shared.
    fn side(&self, at: u64, stop: u64) -> (bool, &S, u64) {
        let (source, end) = self.map.alike(at, stop);
        (source, if source { &self.source } else { &self.target }, end)
    }

    /// Has no change of what lies there begin, as long as what is given lives.
    pub(in crate::job) async fn share(&self, at: u64, len: u64) -> RangeGuard {
        let held = self.map.covering(at, len);
        self.lock.shared(held.start, held.end - held.start).await
    }

    /// Fills `to` with what the bytes at `at` were, verified.
    ///
    /// # Errors
    /// A [`PastError`]: nothing of `to` is to be believed.
    pub async fn read_past(&self, at: ByteOffset, to: &Sg) -> Result<(), PastError> {
        let (start, end) = (at.0, at.0.saturating_add(to.len() as u64));
        let mut at = start;
        while at < end {
            let piece = if self.guests_are_at_work() { SMALL_PIECE } else { PIECE };
            let stop = end.min(at.saturating_add(piece));
            let _shared = self.share(at, stop - at).await;
            while at < stop {
                self.still()?;
                let (source, side, until) = self.side(at, stop);
                let part = to.slice((at - start) as usize, (until - at) as usize);
                let read = side.read_whole(ByteOffset(at), &part).await;
                // If it was lost meanwhile, a change may have come before what was read.
                self.still()?;
                read.map_err(|error| PastError::Io { source, error })?;
                at = until;
            }
        }
        Ok(())
    }

    /// What the bytes from `at` on held, in whole blocks: runs, `most` at most.
    ///
    /// # Errors
    /// A [`PastError`].
    pub async fn map_past(
        &self,
        at: ByteOffset,
        len: u64,
        most: usize,
    ) -> Result<Vec<(u64, ExtentKind)>, PastError> {
        let (mut at, end) = (at.0, at.0.saturating_add(len));
        let mut runs: Vec<(u64, ExtentKind)> = Vec::new();
        while at < end {
            let _shared = self.share(at, end - at).await;
            self.still()?;
            let (source, side, until) = self.side(at, end);
            let found = side.extent(ByteOffset(at), until - at).await;
            self.still()?;
            let extent = found.map_err(|error| PastError::Io { source, error })?;
            let len = extent.len.clamp(1, until - at);
            let full = runs.len() >= most;
            match runs.last_mut() {
                Some((all, kind)) if *kind == extent.kind => *all += len,
                _ if full => break,
                _ => runs.push((len, extent.kind)),
            }
            at += len;
        }
        Ok(runs)
    }

    /// Waits until nobody reads the past any more. Whoever comes after that finds it lost.
    pub async fn past_is_left(&self) {
        let _alone = self.lock.exclusive(0, u64::MAX).await;
    }
}
