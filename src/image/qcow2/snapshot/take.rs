//! Making a snapshot.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{
    Snapshot, SnapshotError,
    find::{check_name, find, next_id},
    table::{self, MAX_BYTES, NewEntry},
};
use crate::{
    image::qcow2::{
        Qcow2, Storage,
        header::{EXTERNAL_DATA, MAX_SNAPSHOTS},
        layout::COPIED,
        rebuild::Plan,
        tree::Table,
    },
    volume::{IoErrorKind, IoOp, Result},
};

pub(super) const OP: IoOp = IoOp::Snapshot;

impl<S: Storage> Qcow2<S> {
    /// Makes an internal snapshot of the disk as it is now, of that name and date, and gives its entry. Operations in
    /// flight end first, and those that come meanwhile wait; reads go on. Durable when this returns.
    ///
    /// # Errors
    /// A name that is taken or cannot be one; `Unsupported` if a second reference does not fit in the image's refcounts;
    /// those of any change. The image has no new snapshot then.
    pub async fn snapshot_create(
        &self,
        name: &str,
        at: SystemTime,
    ) -> std::result::Result<Snapshot, SnapshotError> {
        let work = async {
            let checked = {
                let all = self.snapshots.borrow();
                match all.len() {
                    n if n >= MAX_SNAPSHOTS as usize => Err(SnapshotError::Full(n)),
                    _ => check_name(&all, name).map(|()| next_id(&all)),
                }
            };
            match checked {
                Ok(id) => self.take_snapshot(&id, name, at).await,
                Err(e) => Ok(Err(e)),
            }
        };
        self.alone(OP, work).await?
    }

    /// What a driver that counts all references can have snapshots of.
    pub(super) fn check_snapshots_work(&self) -> Result<()> {
        if self.header.incompatible & EXTERNAL_DATA != 0 {
            let detail = "an image whose data lie in another file has no internal snapshots";
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        Ok(())
    }

    async fn take_snapshot(
        &self,
        id: &str,
        name: &str,
        at: SystemTime,
    ) -> Result<std::result::Result<Snapshot, SnapshotError>> {
        self.check_snapshots_work()?;
        let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let entries = self.l1.borrow().len() as u32;
        let snapshot = NewEntry {
            id,
            name,
            seconds: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
            nanoseconds: since.subsec_nanos(),
            disk_size: self.size.get(),
            l1_offset: if entries == 0 { 0 } else { self.l1_at.get() },
            l1_entries: entries,
        }
        .build();
        let mut all = self.snapshots.borrow().clone();
        all.push(snapshot.clone());
        if table::bytes(&all) > MAX_BYTES {
            return Ok(Err(SnapshotError::Full(all.len() - 1)));
        }
        self.rebuild(OP, async |plan| {
            plan.keeps_l1 = true;
            plan.snapshots = all;
            // VM state that QEMU has loaded beyond the disk's end stays with the snapshot.
            let used = self.geometry.l1_entries_for(self.size.get()) as usize;
            let l1 = plan.l1.clone();
            plan.l1[used..].fill(0);
            self.share(plan, &l1[..used]).await
        })
        .await?;
        Ok(Ok(snapshot))
    }

    /// Finds the snapshot that a word means, and does something with it alone; it is given by its index.
    pub(super) async fn alone_with(
        &self,
        which: &str,
        work: impl AsyncFnOnce(usize) -> Result<()>,
    ) -> std::result::Result<(), SnapshotError> {
        let work = async {
            let found = find(&self.snapshots.borrow(), which);
            match found {
                Ok(index) => work(index).await.map(Ok),
                Err(e) => Ok(Err(e)),
            }
        };
        self.alone(OP, work).await?
    }

    /// One reference more to all that the tables of an L1 table refer to, which the live disk has from now on too.
    pub(super) async fn share(&self, plan: &mut Plan, l1: &[u64]) -> Result<()> {
        let share = async |mut table: Table| {
            self.count_entries(OP, &mut plan.counts, &table, 0, 1).await?;
            plan.l1[table.index] = self.share_table(plan, &mut table).await?;
            Ok(())
        };
        self.each_table(OP, 0, l1, share).await
    }

    /// One reference less to the tables of an L1 table, and to all that they refer to.
    pub(super) async fn let_go_of(&self, plan: &mut Plan, l1: &[u64]) -> Result<()> {
        let let_go = async |table: Table| {
            self.count_entries(OP, &mut plan.counts, &table, 0, -1).await?;
            plan.counts.add(self.geometry.index(table.at), 1, -1);
            Ok(())
        };
        self.each_table(OP, 0, l1, let_go).await
    }

    /// The L1 entry by which the live disk has a table that a snapshot has too: a copy of its own without marks of ownership, if
    /// there are any; else the table itself.
    async fn share_table(&self, plan: &mut Plan, table: &mut Table) -> Result<u64> {
        self.disown(table);
        if table.changed {
            return Ok(self.put_table(OP, plan, table).await? | COPIED);
        }
        plan.counts.add(self.geometry.index(table.at), 1, 1);
        Ok(table.at)
    }
}
