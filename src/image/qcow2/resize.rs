//! Growing the disk: a larger L1 table where it is needed, zeros where a longer backing file would show, then the new size.
//!
//! Shrinking: everything beyond the new end is unlinked and freed and the new size set in one step ([`super::rebuild`]), so that a crash
//! leaves the old disk whole or the new one. The rest of a cluster that the end cuts through is zeros afterwards, in a
//! new cluster: whoever lets the disk grow again finds nothing there. An external data file is cut off after that; what a crash leaves of it
//! beyond the end is zeros again when the disk grows.

use super::{
    Qcow2, Storage,
    header::field,
    layout::{COPIED, Mapping, Place},
    rebuild::Plan,
    tables::encode,
    tree::Table,
};
use crate::{
    sys::mem::Buffer,
    volume::{IoErrorKind, IoOp, Result},
};

const OP: IoOp = IoOp::Resize;

impl<S: Storage> Qcow2<S> {
    pub(super) async fn resize_to(&self, size: u64) -> Result<()> {
        let old = self.size.get();
        if size == old {
            return Ok(());
        }
        if size < old {
            let detail = format!(
                "shrinking; with the LUN deleted: tcmu-dif image resize --shrink {} SIZE",
                self.path.display()
            );
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        self.check_resizable()?;
        let entries = self.geometry.l1_entries_for(size);
        if !self.geometry.can_hold(size) {
            let detail = "the L1 table would be larger than 32 MiB; use larger clusters";
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        if entries > self.l1.borrow().len() as u64 {
            self.grow_l1(entries).await?;
        }
        // What may show there is what a longer backing file has, and what somebody left in the rest of the last cluster.
        // The new size is in memory while that is covered, and not yet on disk; nobody is told of it before the end.
        let last = old.next_multiple_of(self.geometry.cluster());
        let end = self.backing.as_ref().map_or(0, |b| b.len()).max(last).min(size);
        if end > old {
            self.size.set(size);
            let covered = self.zero_range(old, end - old, true).await;
            if covered.is_err() {
                self.size.set(old);
            }
            covered?;
        }
        self.grow_raw_data(OP, old, size).await?;
        self.sync(OP).await?;
        let bytes = Buffer::from_slice(&size.to_be_bytes()).sg();
        if let Err(e) = self.storage.write(field::SIZE, &bytes).await {
            self.size.set(old);
            return Err(self.io_error(OP, e));
        }
        self.size.set(size);
        self.sync(OP).await
    }

    /// A version 2 snapshot does not say how large its disk was.
    fn check_resizable(&self) -> Result<()> {
        if self.geometry.version < 3 && !self.snapshots.borrow().is_empty() {
            let detail = "a version 2 image with snapshots; first: qemu-img amend -o compat=v3";
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        Ok(())
    }

    /// Makes the disk shorter; what lies beyond the new end is lost. Operations on the lost part that wait meanwhile fail
    /// with `OutOfRange`. A LUN's disk is not cut off under its initiators: this is for an image that nobody serves.
    ///
    /// # Errors
    /// `Unsupported` for version 2 with snapshots (as QEMU), `OutOfRange` for 0 or a size that is not smaller; those of any
    /// change. The disk has its old size and content then.
    pub async fn shrink(&self, size: u64) -> Result<()> {
        let work = async {
            self.check_resizable()?;
            if size == 0 || size > self.size.get() {
                let detail = format!("{size} bytes are not fewer than {}", self.size.get());
                return Err(self.error(IoErrorKind::OutOfRange, OP, detail));
            }
            self.cut(size).await?;
            self.cut_data(size).await
        };
        self.alone(OP, work).await
    }

    /// Whether L2 tables lie beyond the disk's end: VM state that QEMU has loaded, which must not appear when the disk grows.
    pub(super) fn holds_beyond_end(&self) -> bool {
        let used = self.geometry.l1_entries_for(self.size.get()) as usize;
        self.l1.borrow().iter().skip(used).any(|entry| *entry != 0)
    }

    /// Unlinks all that lies beyond `size` bytes, and makes that the size. The caller is alone.
    pub(super) async fn cut(&self, size: u64) -> Result<()> {
        let g = self.geometry;
        // The tables from this guest cluster on go; the first of them perhaps not altogether.
        let end = g.clusters_for(size);
        let keep = g.l1_entries_for(size).max(1) as usize;
        self.rebuild(OP, async |plan| {
            let l1 = plan.l1.clone();
            let first = (g.l1_index(size >> g.cluster_bits) as usize).min(l1.len());
            let work = async |mut table: Table| {
                let here = (table.index as u64) << g.l2_bits();
                let from = (end.saturating_sub(here) as usize).min(table.entries().len());
                self.count_entries(OP, &mut plan.counts, &table, from, -1).await?;
                self.cut_entries(&mut table, from);
                let cuts = g.within(size) != 0 && size < self.size.get() && self.data.is_none();
                if cuts && g.l1_index(end - 1) == table.index as u64 {
                    self.cut_last_cluster(plan, &mut table, size).await?;
                }
                let index = table.index;
                if table.is_blank() {
                    plan.counts.add(g.index(table.at), 1, -1);
                    plan.l1[index] = 0;
                } else if table.changed {
                    plan.counts.add(g.index(table.at), 1, -1);
                    plan.l1[index] = self.put_table(OP, plan, &table).await? | COPIED;
                }
                Ok(())
            };
            self.each_table(OP, first, &l1[first..], work).await?;
            plan.l1.truncate(keep);
            plan.size = size;
            Ok(())
        })
        .await
    }

    /// The cluster that the new end lies in gets a new place, where zeros follow the end.
    async fn cut_last_cluster(&self, plan: &mut Plan, table: &mut Table, size: u64) -> Result<()> {
        let g = self.geometry;
        let cluster = g.index(size);
        let index = g.l2_index(cluster) as usize;
        let entry = table.entries()[index];
        let place = self.place_of(OP, entry).await?;
        // A cluster with subclusters may have data in any of them.
        let has_data = match g.extended_l2 {
            true => place != Place::None,
            false => matches!(
                self.mapping_of(OP, entry, 0).await?,
                Mapping::Data { .. } | Mapping::Compressed { .. }
            ),
        };
        if !has_data {
            return Ok(());
        }
        let host = self.take_for(OP, plan).await?;
        let kept = Buffer::zeroed(g.within(size) as usize).sg();
        self.read_range(cluster << g.cluster_bits, &kept).await?;
        self.storage.write(host, &kept).await.map_err(|e| self.io_error(OP, e))?;
        if let Some((first, count)) = self.referred(place) {
            plan.counts.add(first, count, -1);
        }
        self.put_entry(table, index, host);
        Ok(())
    }

    async fn grow_l1(&self, entries: u64) -> Result<()> {
        let _linking = self.linking.lock().await;
        let mut table = self.l1.borrow().clone();
        table.resize(entries as usize, 0);
        self.move_l1(OP, table).await
    }

    /// Lets another L1 table, at a new place, take the place of the one that there is. What was written before is durable before
    /// that is. The caller holds `linking`.
    pub(super) async fn move_l1(&self, op: IoOp, table: Vec<u64>) -> Result<()> {
        let g = self.geometry;
        let old = (g.index(self.l1_at.get()), g.clusters_for(self.l1.borrow().len() as u64 * 8));
        let place = self.take_together(op, g.clusters_for(table.len() as u64 * 8)).await?;
        let at = place.0 << g.cluster_bits;
        let ready = match self.storage.write(at, &encode(&table).sg()).await {
            Ok(()) => self.sync(op).await,
            Err(e) => Err(self.io_error(op, e)),
        };
        if let Err(e) = ready {
            self.free_later(place.0, place.1);
            return Err(e);
        }
        // l1_size and l1_table_offset stand side by side in one sector of the header.
        let mut words = (table.len() as u32).to_be_bytes().to_vec();
        words.extend_from_slice(&at.to_be_bytes());
        let written = self.storage.write(field::SIZE + 12, &Buffer::from_slice(&words).sg()).await;
        if let Err(e) = written {
            // The file may name either table now.
            self.barrier.fail();
            return Err(self.io_error(op, e));
        }
        *self.l1.borrow_mut() = table;
        self.l1_at.set(at);
        self.move_fixed(old, place);
        self.free_later(old.0, old.1);
        Ok(())
    }
}
