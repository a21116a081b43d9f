//! Backups (`drive-backup`, `blockdev-backup`): the LUN as it was at one moment, copied to another image while the LUN goes on.
//!
//! The moment is kept by copying before each change, and lives in the daemon's memory. So a backup that is cut off by a stop of the daemon,
//! in good order or not, is over: what its target has is a mixture of what was copied and nothing. The record says so at the next start.

use super::{Active, BackupOrder, BitmapOrder, JobError, Jobs, MirrorOrder, begin::Launch};
use crate::{
    job::{
        bitmaps::BitmapError,
        front::{Ending, Front, Outcome},
        mirror::{Settings, SyncMode, Task},
    },
    lun::{bitmaps, stack::Stack},
    units::BlockSize,
    volume::Volume,
};

/// What becomes of a backup that finds itself under way at the start of the LUN.
pub(super) const PAST_IS_LOST: &str = "the daemon has stopped while the backup was under way, and with that the moment that it was of is \
                                       lost: its target is not whole, remove it and begin anew";
/// The same of one whose target went with it.
pub(super) const SCRATCH_IS_GONE: &str = "the daemon has stopped while the point in time was kept, and with that it is lost: its scratch \
                                          file is removed, begin anew";

impl Jobs {
    /// Begins a backup.
    pub(super) async fn backup(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: BackupOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        if let Some((name, _)) = &order.bitmap {
            // Said before a target is made.
            front.bitmaps().check(name)?;
        }
        let launch = self.prepare_backup(front, block_size, order).await?;
        self.begin(front, launch).await
    }

    /// Does what can be done before the moment that a backup is of.
    pub(super) async fn prepare_backup(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: BackupOrder,
    ) -> Result<Launch, JobError> {
        let BackupOrder { id, target, format, existing, sidecar, bitmap, scratch, settings } = order;
        if scratch && existing {
            let words = "a scratch file is made for the job and removed with it: leave out 'scratch', or 'mode' existing";
            return Err(JobError::Target(words.into()));
        }
        // A new image of what a bitmap has may be put over another: zeros have to stand there themselves.
        let unmap = settings.sync != SyncMode::Bitmap || existing;
        let settings = Settings { task: Task::Backup, unmap, ..settings };
        let order = MirrorOrder { id, target, format, existing, sidecar, granularity: None, settings };
        let launch = self.prepare_copy(front, block_size, order, bitmap).await?;
        if scratch { self.as_scratch(launch).await } else { Ok(launch) }
    }

    /// Does something with dirty bitmaps.
    pub(super) fn bitmap(&self, front: &Front<Stack>, order: BitmapOrder) -> Result<(), JobError> {
        let all = front.bitmaps();
        let volume = front.volume();
        match order {
            BitmapOrder::Add { name, granularity, persistent, enabled } => {
                if volume.limits().read_only {
                    let words = "the LUN is read-only: nothing changes that could be marked";
                    return Err(BitmapError::CannotPersist(words.into()).into());
                }
                if persistent {
                    bitmaps::check_kept(&volume)?;
                }
                all.add(&name, volume.limits().capacity, granularity, persistent, enabled)?;
            }
            BitmapOrder::Remove(name) => all.remove(&name)?,
            BitmapOrder::Clear(name) => all.clear(&name)?,
            BitmapOrder::Enable(name, on) => all.enable(&name, on)?,
            BitmapOrder::Merge { target, sources } => all.merge(&target, &sources)?,
        }
        Ok(())
    }

    /// A job is over: what becomes of the dirty bitmaps that it had, or whose image the LUN has gone over from.
    pub(super) async fn see_to_bitmaps(active: &Active, front: &Front<Stack>, outcome: &Outcome) {
        let mirror = &active.mirror;
        if let Some((name, mode)) = &active.bitmap {
            let good = matches!(outcome, Outcome::Ended(_));
            front.bitmaps().give_back(name, *mode, good, mirror.map().runs());
        }
        if *outcome == Outcome::Ended(Ending::Pivot) {
            bitmaps::store_or_tell(mirror.source(), &front.take_parted()).await;
            let volume = front.volume();
            let kept = bitmaps::load(&volume).await;
            front.passable().await;
            front.bitmaps().replace_kept(volume.limits().capacity, kept);
        }
    }
}
