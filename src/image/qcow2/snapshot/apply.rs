//! Going back to a snapshot.

use super::{SnapshotError, take::OP};
use crate::{
    image::qcow2::{Qcow2, Storage, open::read_table},
    volume::{IoErrorKind, Result},
};

impl<S: Storage> Qcow2<S> {
    /// Makes the disk what it was when the snapshot was taken, its size included (where the entry tells it, as it always does in version 3). The snapshot
    /// stays. What the disk held since is lost. Operations in flight end first; those that come meanwhile wait, and
    /// fail with `OutOfRange` if the disk has become too short for them.
    ///
    /// `which` is an ID or a name, or `snapshot.id=ID`, `snapshot.name=NAME`.
    ///
    /// # Errors
    /// A snapshot that does not exist, or several that fit; those of any change. The disk is as it was then.
    pub async fn snapshot_apply(&self, which: &str) -> std::result::Result<(), SnapshotError> {
        self.alone_with(which, async |index| self.go_back(index).await).await
    }

    /// A snapshot's L1 table.
    pub(super) async fn snapshot_l1(&self, index: usize) -> Result<Vec<u64>> {
        let (at, bytes) = {
            let all = self.snapshots.borrow();
            (all[index].l1_offset, u64::from(all[index].l1_entries) * 8)
        };
        let table = read_table(&self.storage, self.file_len.get(), at, bytes).await;
        match table.map_err(|e| self.io_error(OP, e))? {
            Some(table) => Ok(table),
            None => Err(self.damaged(OP, format!("the file ends within the L1 table at {at:#x}")).await),
        }
    }

    async fn go_back(&self, index: usize) -> Result<()> {
        self.check_snapshots_work()?;
        let size = self.snapshots.borrow()[index].disk_size.unwrap_or_else(|| self.size.get());
        let needed = self.geometry.l1_entries_for(size);
        if !self.geometry.can_hold(size) {
            let detail = format!("the snapshot's disk has {size} bytes, which is too large");
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        let mut theirs = self.snapshot_l1(index).await?;
        // Beyond the disk's end lies VM state, which is of no use to a disk.
        theirs.resize(needed.max(1) as usize, 0);
        theirs[needed as usize..].fill(0);
        self.rebuild(OP, async |plan| {
            let ours = std::mem::replace(&mut plan.l1, theirs.clone());
            plan.size = size;
            self.let_go_of(plan, &ours).await?;
            self.share(plan, &theirs).await
        })
        .await
    }
}
