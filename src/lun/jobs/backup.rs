//! Backups (`drive-backup`): the LUN as it was at one moment, copied to another image while the LUN goes on.
//!
//! The moment is kept by copying before each change, and lives in the daemon's memory. So a backup that is cut off by a stop of the daemon,
//! in good order or not, is over: what its target has is a mixture of what was copied and nothing. The record says so at the next start.

use super::{BackupOrder, JobError, Jobs, MirrorOrder};
use crate::{
    job::{
        front::Front,
        mirror::{Settings, Task},
    },
    lun::stack::Stack,
    units::BlockSize,
};

/// What becomes of a backup that finds itself under way at the start of the LUN.
pub(super) const PAST_IS_LOST: &str = "the daemon has stopped while the backup was under way, and with that the moment that it was of is \
                                       lost: its target is not whole, remove it and begin anew";

impl Jobs {
    /// Begins a backup.
    pub(super) async fn backup(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: BackupOrder,
    ) -> Result<(), JobError> {
        let BackupOrder { id, target, format, existing, sidecar, settings } = order;
        let settings = Settings { task: Task::Backup, ..settings };
        let order = MirrorOrder { id, target, format, existing, sidecar, granularity: None, settings };
        let _starting = self.starting(&order.id)?;
        self.copy_out(front, block_size, order).await
    }
}
