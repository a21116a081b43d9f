//! Growing the disk: a larger L1 table where it is needed, zeros where a longer backing file would show, then the new size.

use super::{Qcow2, Storage, header::field, layout::MAX_L1_BYTES, tables::encode};
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
            let detail =
                format!("shrinking; with the LUN deleted: qemu-img resize --shrink {}", self.path.display());
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        if self.geometry.version < 3 && !self.snapshots.is_empty() {
            let detail = "a version 2 image with snapshots; first: qemu-img amend -o compat=v3";
            return Err(self.error(IoErrorKind::Unsupported, OP, detail));
        }
        let entries = self.geometry.l1_entries_for(size);
        if entries * 8 > MAX_L1_BYTES || size > i64::MAX as u64 {
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

    async fn grow_l1(&self, entries: u64) -> Result<()> {
        let _linking = self.linking.lock().await;
        let g = self.geometry;
        let old = (g.index(self.l1_at.get()), g.clusters_for(self.l1.borrow().len() as u64 * 8));
        let count = g.clusters_for(entries * 8);
        let place = self.take_together(OP, count).await?;
        let mut table = self.l1.borrow().clone();
        table.resize(entries as usize, 0);
        let at = place.0 << g.cluster_bits;
        self.storage.write(at, &encode(&table).sg()).await.map_err(|e| self.io_error(OP, e))?;
        self.sync(OP).await?;
        // l1_size and l1_table_offset stand side by side in one sector of the header.
        let mut words = (entries as u32).to_be_bytes().to_vec();
        words.extend_from_slice(&at.to_be_bytes());
        let written = self.storage.write(field::SIZE + 12, &Buffer::from_slice(&words).sg()).await;
        if let Err(e) = written {
            // The file may name either table now.
            self.barrier.fail();
            return Err(self.io_error(OP, e));
        }
        *self.l1.borrow_mut() = table;
        self.l1_at.set(at);
        self.move_fixed(old, place);
        self.free_later(old.0, old.1);
        Ok(())
    }
}
