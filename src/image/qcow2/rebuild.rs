//! Changes of the whole image in one step: a snapshot made, gone back to or deleted, the disk cut shorter.
//!
//! Nothing is changed where it stands. Whatever is to be different is written to clusters that nobody refers to: L2 tables, the L1 table,
//! the snapshot table, the refcount blocks that change, and the refcount table. When all of it is durable, **one write to
//! one sector of the header** (bytes 24 to 71: size, l1_size, l1_table_offset, refcount_table_offset, refcount_table_clusters, nb_snapshots,
//! snapshots_offset) puts it in place of the old. So the marks of ownership (COPIED), which have to agree with the
//! refcounts, and the references, which must not outnumber them, change in the same instant; a crash leaves the old image or the new one.
//!
//! Steps, each durable before the next:
//! 1. the clusters are reserved as for any other use: refcount 1 and zeros (a crash leaks them);
//! 2. the new tables are written there (a crash leaks them);
//! 3. the header names them. What the old tables alone referred to has refcount 0 already; what held the old refcounts
//!    is counted still (a crash leaks that);
//! 4. the clusters of the old refcount blocks and refcount table are given back.
//!
//! The caller is alone ([`super::Qcow2::alone`]): nobody changes the image meanwhile. Readers go on until step 3, and wait for the moment in
//! which clusters that they may be reading are let go.

use std::cell::Cell;

use super::{
    Qcow2, Snapshot, Storage,
    deltas::Deltas,
    header::field,
    open::{find_tables, fixed_ranges, in_ranges},
    refcount::{Clusters, push_run},
    snapshot::table,
    tables::encode,
    tree::Table,
};
use crate::{
    sys::mem::Buffer,
    volume::{IoErrorKind, IoOp, Result},
};

/// What the image is to become.
pub(super) struct Plan {
    /// References gained and lost.
    pub counts: Deltas,
    /// Bytes of the guest's disk.
    pub size: u64,
    /// The L1 table.
    pub l1: Vec<u64>,
    /// The old L1 table lives on as a snapshot's.
    pub keeps_l1: bool,
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Clusters reserved for all this.
    taken: Vec<Clusters>,
    /// The header may name the new tables.
    switched: Cell<bool>,
}

/// Where the new tables lie.
struct Places {
    l1_at: u64,
    snapshots_at: u64,
    refcount_table_at: u64,
}

impl<S: Storage> Qcow2<S> {
    /// Rebuilds the image as `work` plans it. Fails without a trace before the step that matters, and fails the image in it.
    pub(super) async fn rebuild(
        &self,
        op: IoOp,
        work: impl AsyncFnOnce(&mut Plan) -> Result<()>,
    ) -> Result<()> {
        let mut plan = Plan {
            counts: Deltas::new(&self.geometry),
            size: self.size.get(),
            l1: self.l1.borrow().clone(),
            keeps_l1: false,
            snapshots: self.snapshots.borrow().clone(),
            taken: Vec::new(),
            switched: Cell::new(false),
        };
        let done = match work(&mut plan).await {
            Ok(()) => self.carry_out(op, &mut plan).await,
            Err(e) => Err(e),
        };
        if done.is_err() && !plan.switched.get() {
            for (first, count) in plan.taken {
                self.free_later(first, count);
            }
        }
        done
    }

    /// Writes an L2 table to a new place; gives that.
    pub(super) async fn put_table(&self, op: IoOp, plan: &mut Plan, table: &Table) -> Result<u64> {
        let at = self.take_for(op, plan).await?;
        self.l2.forget(at, self.geometry.cluster());
        let bytes = Buffer::from_slice(&self.geometry.entry_table(table.entries()));
        self.storage.write(at, &bytes.sg()).await.map_err(|e| self.io_error(op, e))?;
        Ok(at)
    }

    /// A new cluster; it holds zeros.
    pub(super) async fn take_for(&self, op: IoOp, plan: &mut Plan) -> Result<u64> {
        let (at, _) = self.take(op, 1).await?;
        plan.taken.push((self.geometry.index(at), 1));
        Ok(at)
    }

    /// Writes a table that lies in one piece; gives its offset, which is 0 if there is nothing to write.
    async fn put_together(&self, op: IoOp, plan: &mut Plan, bytes: &Buffer) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let place = self.take_together(op, self.geometry.clusters_for(bytes.len() as u64)).await?;
        plan.taken.push(place);
        let at = place.0 << self.geometry.cluster_bits;
        self.storage.write(at, &bytes.sg()).await.map_err(|e| self.io_error(op, e))?;
        Ok(at)
    }

    /// A cluster's refcount as it will be.
    pub(super) async fn refcount_after(&self, op: IoOp, counts: &Deltas, cluster: u64) -> Result<u64> {
        let now = self.refcount_now(op, cluster).await?;
        self.count_after(op, cluster, now, counts.of(cluster)).await
    }

    async fn count_after(&self, op: IoOp, cluster: u64, now: u64, by: i64) -> Result<u64> {
        let at = cluster << self.geometry.cluster_bits;
        let Some(count) = now.checked_add_signed(by) else {
            let what = format!("the refcount of the cluster at {at:#x} is {now}, which is too low");
            return Err(self.damaged(op, what).await);
        };
        if count > self.geometry.max_refcount() {
            let bits = 1u32 << self.geometry.refcount_order;
            let detail = format!(
                "the cluster at {at:#x} would have {count} references, too many for refcounts of {bits} bits; \
                 first: qemu-img amend -o refcount_bits=16"
            );
            return Err(self.error(IoErrorKind::Unsupported, op, detail));
        }
        Ok(count)
    }

    async fn carry_out(&self, op: IoOp, plan: &mut Plan) -> Result<()> {
        let g = self.geometry;
        let old_l1 = (g.index(self.l1_at.get()), g.clusters_for(self.l1.borrow().len() as u64 * 8));
        let old_snapshots =
            (g.index(self.snapshots_at.get()), g.clusters_for(table::bytes(&self.snapshots.borrow())));
        let mut l1_at = self.l1_at.get();
        if plan.keeps_l1 || plan.l1 != *self.l1.borrow() {
            let bytes = encode(&plan.l1);
            l1_at = self.put_together(op, plan, &bytes).await?;
            if !plan.keeps_l1 {
                plan.counts.add(old_l1.0, old_l1.1, -1);
            }
        }
        let mut snapshots_at = self.snapshots_at.get();
        if plan.snapshots != *self.snapshots.borrow() {
            let bytes = Buffer::from_slice(&table::encode(&plan.snapshots));
            snapshots_at = self.put_together(op, plan, &bytes).await?;
            plan.counts.add(old_snapshots.0, old_snapshots.1, -1);
        }
        // Whatever is reserved from here on is counted in the blocks before they are copied.
        let blocks = plan.counts.blocks();
        let mut places = Vec::with_capacity(blocks.len());
        for _ in &blocks {
            places.push(self.take_for(op, plan).await?);
        }
        let table_place = match blocks.is_empty() {
            true => None,
            false => Some(self.take_table_place(op, plan).await?),
        };

        let _space = self.space.lock().await;
        let old_table = {
            let len = self.refcount_table.borrow().len() as u64;
            (g.index(self.refcount_table_at.get()), g.clusters_for(len * 8))
        };
        let mut counting = Counting { table: self.refcount_table.borrow().clone(), ..Counting::default() };
        for (block, place) in blocks.iter().zip(&places) {
            self.copy_block(op, plan, *block, *place, &mut counting).await?;
        }
        let mut places = Places { l1_at, snapshots_at, refcount_table_at: self.refcount_table_at.get() };
        if let Some(place) = table_place {
            places.refcount_table_at = place << g.cluster_bits;
            let bytes = encode(&counting.table).sg();
            self.storage.write(places.refcount_table_at, &bytes).await.map_err(|e| self.io_error(op, e))?;
            counting.replaced.push(old_table);
        }
        self.switch(op, plan, &places, &counting).await?;
        self.after_switch(op, counting).await;
        Ok(())
    }

    /// The place of a new refcount table. Finding it may make the table grow.
    async fn take_table_place(&self, op: IoOp, plan: &mut Plan) -> Result<u64> {
        loop {
            let need = |me: &Self| me.geometry.clusters_for(me.refcount_table.borrow().len() as u64 * 8);
            let place = self.take_together(op, need(self)).await?;
            plan.taken.push(place);
            if need(self) == place.1 {
                return Ok(place.0);
            }
            plan.taken.pop();
            self.free_later(place.0, place.1);
        }
    }

    /// Writes a refcount block with the new counts to a new place.
    async fn copy_block(
        &self,
        op: IoOp,
        plan: &Plan,
        block: u64,
        place: u64,
        counting: &mut Counting,
    ) -> Result<()> {
        let g = self.geometry;
        let first = block << g.block_bits();
        let (old, mut bytes) = self.refcount_block(op, block).await?;
        for (index, by) in plan.counts.in_block(block) {
            let cluster = first + index as u64;
            let count = self.count_after(op, cluster, g.refcount(&bytes, index), by).await?;
            g.set_refcount(&mut bytes, index, count);
            if count == 0 {
                push_run(&mut counting.free, cluster, 1);
            }
        }
        self.refcounts.forget(place, g.cluster());
        self.storage
            .write(place, &Buffer::from_slice(&bytes).sg())
            .await
            .map_err(|e| self.io_error(op, e))?;
        counting.table[block as usize] = place;
        counting.replaced.push((g.index(old), 1));
        Ok(())
    }

    /// The step that matters. Before it the old image is whole, after it the new one.
    async fn switch(&self, op: IoOp, plan: &Plan, places: &Places, counting: &Counting) -> Result<()> {
        let g = self.geometry;
        let l1 = (places.l1_at, plan.l1.len() as u64 * 8);
        let refcount_table = (places.refcount_table_at, counting.table.len() as u64 * 8);
        let snapshot_table = (places.snapshots_at, table::bytes(&plan.snapshots));
        let fixed = fixed_ranges(&g, l1, refcount_table, snapshot_table, &plan.snapshots);
        let (tables, damage) = find_tables(&g, &fixed, &plan.l1, &counting.table, self.file_len.get());
        if let Some(what) = damage {
            return Err(self.damaged(op, what).await);
        }
        // A damaged snapshot may refer to what it has no business with. Nothing that is in use becomes free.
        let in_use = |c: u64| tables.contains(&c) || in_ranges(&fixed, c);
        let freed = counting.free.iter().flat_map(|(first, count)| *first..first + count);
        if let Some(cluster) = freed.into_iter().find(|c| in_use(*c)) {
            let at = cluster << g.cluster_bits;
            return Err(self.damaged(op, format!("the metadata at {at:#x} would become free")).await);
        }
        self.sync(op).await?;
        // A snapshot that is made takes nothing away from readers.
        let _readers = match plan.keeps_l1 {
            true => None,
            false => Some(self.readers.shut().await),
        };
        let mut words = plan.size.to_be_bytes().to_vec();
        words.extend_from_slice(&0u32.to_be_bytes()); // crypt_method
        words.extend_from_slice(&(plan.l1.len() as u32).to_be_bytes());
        words.extend_from_slice(&places.l1_at.to_be_bytes());
        words.extend_from_slice(&places.refcount_table_at.to_be_bytes());
        words.extend_from_slice(&(g.clusters_for(refcount_table.1) as u32).to_be_bytes());
        words.extend_from_slice(&(plan.snapshots.len() as u32).to_be_bytes());
        words.extend_from_slice(&places.snapshots_at.to_be_bytes());
        plan.switched.set(true);
        if let Err(e) = self.storage.write(field::SIZE, &Buffer::from_slice(&words).sg()).await {
            // The file may name either.
            self.barrier.fail();
            return Err(self.io_error(op, e));
        }
        self.sync(op).await?;

        self.size.set(plan.size);
        *self.l1.borrow_mut() = plan.l1.clone();
        self.l1_at.set(places.l1_at);
        *self.refcount_table.borrow_mut() = counting.table.clone();
        self.refcount_table_at.set(places.refcount_table_at);
        *self.snapshots.borrow_mut() = plan.snapshots.clone();
        self.snapshots_at.set(places.snapshots_at);
        *self.fixed.borrow_mut() = fixed;
        let old = self.tables.replace(tables);
        for cluster in old.difference(&self.tables.borrow()) {
            let at = cluster << g.cluster_bits;
            self.l2.forget(at, g.cluster());
            self.refcounts.forget(at, g.cluster());
        }
        self.last_inflated.take();
        Ok(())
    }

    /// The space of what nobody refers to any more. What fails here is a leak, and no failure of what was asked for.
    async fn after_switch(&self, op: IoOp, counting: Counting) {
        let bits = self.geometry.cluster_bits;
        let mut free = counting.free;
        for clusters in counting.replaced {
            match self.change_refcounts(op, clusters, false).await {
                Ok(more) => free.extend(more),
                Err(e) => tracing::warn!("clusters of the old refcounts stay reserved: {e}"),
            }
        }
        for (first, count) in &free {
            self.first_free.set(self.first_free.get().min(*first));
            let _ = self.storage.punch(first << bits, count << bits).await;
        }
        if let Err(e) = self.trim(op, free).await {
            tracing::debug!("the file's end is not cut off: {e}");
        }
    }

    /// Cuts off the end of the file if these clusters, which have become free, are there. The caller holds `space`.
    async fn trim(&self, op: IoOp, mut free: Vec<Clusters>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut end = self.file_len.get();
        free.sort_unstable();
        while let Some((first, count)) = free.pop()
            && (first + count) << bits >= end
        {
            end = end.min(first << bits);
        }
        if self.storage.is_fixed() || end == self.file_len.get() {
            return Ok(());
        }
        // The counts that let go of it have to be durable first.
        self.sync(op).await?;
        self.storage.set_size(end).await.map_err(|e| self.io_error(op, e))?;
        self.file_len.set(end);
        Ok(())
    }
}

/// The refcounts as they will be.
#[derive(Default)]
struct Counting {
    /// The refcount table.
    table: Vec<u64>,
    /// Clusters that have become free.
    free: Vec<Clusters>,
    /// What held the old counts.
    replaced: Vec<Clusters>,
}
