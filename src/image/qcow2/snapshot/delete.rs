//! Deleting a snapshot.

use super::{SnapshotError, take::OP};
use crate::{
    image::qcow2::{Qcow2, Storage, layout::COPIED, tree::Table},
    volume::Result,
};

impl<S: Storage> Qcow2<S> {
    /// Deletes a snapshot, and frees what it alone kept. Operations in flight end first, and those that come meanwhile wait;
    /// reads go on.
    ///
    /// `which` as for [`Qcow2::snapshot_apply`].
    ///
    /// # Errors
    /// A snapshot that does not exist, or several that fit; those of any change. The snapshot is still there then.
    pub async fn snapshot_delete(&self, which: &str) -> std::result::Result<(), SnapshotError> {
        self.alone_with(which, async |index| self.remove(index).await).await
    }

    async fn remove(&self, index: usize) -> Result<()> {
        self.check_snapshots_work()?;
        let g = self.geometry;
        let theirs = self.snapshot_l1(index).await?;
        self.rebuild(OP, async |plan| {
            let gone = plan.snapshots.remove(index);
            let l1_clusters = g.clusters_for(u64::from(gone.l1_entries) * 8);
            plan.counts.add(g.index(gone.l1_offset), l1_clusters, -1);
            self.let_go_of(plan, &theirs).await?;
            // What the live disk alone refers to now is its own again. Beneath a table that is still shared nothing is.
            let ours = plan.l1.clone();
            let claim = async |mut table: Table| {
                let cluster = g.index(table.at);
                if self.refcount_after(OP, &plan.counts, cluster).await? != 1 {
                    return Ok(());
                }
                self.mark_owned(OP, &plan.counts, &mut table).await?;
                if table.changed {
                    plan.counts.add(cluster, 1, -1);
                    plan.l1[table.index] = self.put_table(OP, plan, &table).await? | COPIED;
                } else {
                    plan.l1[table.index] = table.at | COPIED;
                }
                Ok(())
            };
            self.each_table(OP, 0, &ours, claim).await
        })
        .await
    }
}
