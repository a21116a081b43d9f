//! Refcounts: looking for free clusters, taking and giving back references, and growing the tables that hold the counts.
//!
//! Everything here runs under the image's `space` lock. Changes are written through; when they are durable is the business of
//! [`super::alloc`].

use std::{io, rc::Rc};

use super::{
    Qcow2, Storage,
    header::field,
    layout::{MAX_HOST, MAX_REFCOUNT_TABLE_BYTES},
    tables::encode,
};
use crate::{
    storage::cache::Slice,
    sys::mem::{Buffer, Sg},
    volume::{IoErrorKind, IoOp, Result},
};

/// Entries of the refcount table that one sector holds: a write of them is not torn.
const SECTOR_ENTRIES: u64 = 512 / 8;

/// A run of clusters of the file: the first, and how many.
pub(super) type Clusters = (u64, u64);

/// Adds clusters to a list of runs in ascending order, joined where they touch.
pub(super) fn push_run(runs: &mut Vec<Clusters>, first: u64, count: u64) {
    match runs.last_mut() {
        Some((f, n)) if *f + *n == first => *n += count,
        _ => runs.push((first, count)),
    }
}

impl<S: Storage> Qcow2<S> {
    /// The refcount block that counts a cluster.
    fn block_of(&self, cluster: u64) -> std::result::Result<Option<u64>, String> {
        let index = cluster >> self.geometry.block_bits();
        let entry = self.refcount_table.borrow().get(index as usize).copied().unwrap_or(0);
        match self.geometry.table(entry) {
            Ok(None) => Ok(None),
            Ok(Some(at)) if at < self.file_len.get() => Ok(Some(at)),
            Ok(Some(at)) => Err(format!("the refcount block at {at:#x} lies beyond the end of the file")),
            Err(why) => Err(format!("refcount table entry {index} is {entry:#x}: {why}")),
        }
    }

    /// Refcounts in a slice of a refcount block.
    fn counts_per_slice(&self) -> u64 {
        (self.geometry.slice() * 8) >> self.geometry.refcount_order
    }

    /// The slice that counts a cluster, the cluster's index in it, and how many clusters it counts from that one on.
    async fn counts(&self, op: IoOp, cluster: u64) -> Result<Option<(Rc<Slice>, usize, u64)>> {
        let block = match self.block_of(cluster) {
            Ok(Some(block)) => block,
            Ok(None) => return Ok(None),
            Err(why) => return Err(self.damaged(op, why).await),
        };
        let per_slice = self.counts_per_slice();
        let in_block = cluster & ((1 << self.geometry.block_bits()) - 1);
        let at = block + in_block / per_slice * self.geometry.slice();
        let slice = self.load_counts(at).await.map_err(|e| self.io_error(op, e))?;
        let index = in_block % per_slice;
        Ok(Some((slice, index as usize, per_slice - index)))
    }

    async fn load_counts(&self, at: u64) -> io::Result<Rc<Slice>> {
        self.refcounts.load(at, async |to: &Sg| self.storage.read(at, to).await).await
    }

    /// A cluster's refcount.
    pub(super) async fn refcount_now(&self, op: IoOp, cluster: u64) -> Result<u64> {
        let counts = self.counts(op, cluster).await?;
        Ok(counts.map_or(0, |(slice, index, _)| slice.with(|bytes| self.geometry.refcount(bytes, index))))
    }

    /// A refcount block: where it lies, and what it says.
    pub(super) async fn refcount_block(&self, op: IoOp, block: u64) -> Result<(u64, Vec<u8>)> {
        let g = self.geometry;
        let first = block << g.block_bits();
        let at = match self.block_of(first) {
            Ok(Some(at)) => at,
            Ok(None) => {
                let what = format!("no refcount block for the cluster at {:#x}", first << g.cluster_bits);
                return Err(self.damaged(op, what).await);
            }
            Err(why) => return Err(self.damaged(op, why).await),
        };
        let mut bytes = Vec::with_capacity(g.cluster() as usize);
        while (bytes.len() as u64) < g.cluster() {
            let slice = self.load_counts(at + bytes.len() as u64).await;
            slice.map_err(|e| self.io_error(op, e))?.with(|slice| bytes.extend_from_slice(slice));
        }
        Ok((at, bytes))
    }

    /// Adds a reference to each cluster of a run, or takes one away; gives the runs that nobody refers to any more.
    pub(super) async fn change_refcounts(
        &self,
        op: IoOp,
        (first, count): Clusters,
        add: bool,
    ) -> Result<Vec<Clusters>> {
        let g = self.geometry;
        let mut free = Vec::new();
        let mut cluster = first;
        while cluster < first + count {
            let Some((slice, index, left)) = self.counts(op, cluster).await? else {
                let at = cluster << g.cluster_bits;
                return Err(self.damaged(op, format!("no refcount block for the cluster at {at:#x}")).await);
            };
            let n = left.min(first + count - cluster);
            let old: Vec<u64> =
                slice.with(|bytes| (0..n as usize).map(|i| g.refcount(bytes, index + i)).collect());
            let limit = if add { g.max_refcount() } else { 0 };
            if let Some(bad) = old.iter().position(|c| *c == limit) {
                let at = (cluster + bad as u64) << g.cluster_bits;
                return Err(self
                    .damaged(op, format!("the refcount of the cluster at {at:#x} is {limit}"))
                    .await);
            }
            let (start, end) = g.refcount_bytes(index as u64, n);
            let new = slice.change(|bytes| {
                for (i, count) in old.iter().enumerate() {
                    g.set_refcount(bytes, index + i, if add { count + 1 } else { count - 1 });
                }
                Buffer::from_slice(&bytes[start as usize..end as usize])
            });
            if let Err(e) = self.storage.write(slice.at + start, &new.sg()).await {
                // Either is safe for these clusters, which are not linked: too high a count in the file is a leak, and too
                // low a one is mended by the next write. In memory the higher one holds, so that nobody takes them.
                slice.change(|bytes| {
                    for (i, count) in old.iter().enumerate() {
                        g.set_refcount(bytes, index + i, if add { count + 1 } else { *count });
                    }
                });
                return Err(self.io_error(op, e));
            }
            if !add {
                for (i, _) in old.iter().enumerate().filter(|(_, c)| **c == 1) {
                    push_run(&mut free, cluster + i as u64, 1);
                }
            }
            cluster += n;
        }
        Ok(free)
    }

    /// Looks for free clusters that refcount blocks count already: `want` of them in at most `most` runs, or with
    /// `together` one run of `want`.
    pub(super) async fn find_free(
        &self,
        op: IoOp,
        want: u64,
        most: usize,
        together: bool,
    ) -> Result<Vec<Clusters>> {
        let g = self.geometry;
        let end = (self.refcount_table.borrow().len() as u64) << g.block_bits();
        let mut runs: Vec<Clusters> = Vec::new();
        let mut found = 0;
        let mut cluster = self.first_free.get();
        while cluster < end && found < want {
            let Some((slice, index, left)) = self.counts(op, cluster).await? else {
                cluster = ((cluster >> g.block_bits()) + 1) << g.block_bits();
                continue;
            };
            let taken = slice.with(|bytes| {
                for i in 0..left {
                    if g.refcount(bytes, index + i as usize) != 0 {
                        continue;
                    }
                    if together && runs.last().is_some_and(|(f, n)| f + n != cluster + i) {
                        runs.clear();
                        found = 0;
                    }
                    let joins = runs.last().is_some_and(|(f, n)| f + n == cluster + i);
                    if !joins && runs.len() == most {
                        return i;
                    }
                    push_run(&mut runs, cluster + i, 1);
                    found += 1;
                    if found == want {
                        return i + 1;
                    }
                }
                left
            });
            cluster += taken;
            if taken < left {
                break;
            }
        }
        if together {
            runs.retain(|(_, n)| *n >= want);
        } else {
            self.first_free.set(cluster);
        }
        for (first, count) in &runs {
            self.check_free_is_no_metadata(op, *first, *count).await?;
        }
        Ok(runs)
    }

    async fn check_free_is_no_metadata(&self, op: IoOp, first: u64, count: u64) -> Result<()> {
        match (first..first + count).find(|c| self.is_metadata(*c)) {
            None => Ok(()),
            Some(c) => {
                let at = c << self.geometry.cluster_bits;
                Err(self.damaged(op, format!("the metadata at {at:#x} have refcount 0")).await)
            }
        }
    }

    /// Makes room for `count` clusters together, where no refcount block counts yet: new blocks, and if need be a larger
    /// table, lie just before them. The clusters have refcount 1 and hold zeros, durably, when this returns.
    ///
    /// Order: the content of the blocks (which count themselves), the blocks of clusters that hold blocks before the others, the table last.
    pub(super) async fn append_area(&self, op: IoOp, count: u64) -> Result<Clusters> {
        let g = self.geometry;
        let (first_block, entries_now) = {
            let table = self.refcount_table.borrow();
            (table.iter().rposition(|e| *e != 0).map_or(0, |i| i as u64 + 1), table.len() as u64)
        };
        let start = first_block << g.block_bits();
        let (mut blocks, mut table) = (1, 0);
        loop {
            let total = blocks + table + count;
            let need_blocks = (total >> g.block_bits()) + 1;
            let need_entries = first_block + need_blocks;
            let need_table = match need_entries > entries_now {
                true => g.clusters_for(need_entries.max(entries_now * 3 / 2) * 8),
                false => 0,
            };
            if need_blocks <= blocks && need_table <= table {
                break;
            }
            (blocks, table) = (blocks.max(need_blocks), table.max(need_table));
        }
        let total = blocks + table + count;
        if table << g.cluster_bits > MAX_REFCOUNT_TABLE_BYTES || start + total >= MAX_HOST >> g.cluster_bits {
            return Err(self.error(IoErrorKind::NoSpace, op, "the refcount table cannot grow any more"));
        }
        self.check_free_is_no_metadata(op, start, total).await?;
        self.make_zero(op, (start, total)).await?;
        self.refcounts.forget(start << g.cluster_bits, blocks << g.cluster_bits);
        for i in 0..blocks {
            let mut content = vec![0; g.cluster() as usize];
            let counted = total.saturating_sub(i << g.block_bits()).min(1 << g.block_bits());
            for index in 0..counted {
                g.set_refcount(&mut content, index as usize, 1);
            }
            let at = (start + i) << g.cluster_bits;
            let content = Buffer::from_slice(&content).sg();
            self.storage.write(at, &content).await.map_err(|e| self.io_error(op, e))?;
        }
        let new_entries: Vec<u64> = (0..blocks).map(|i| (start + i) << g.cluster_bits).collect();
        let linked = match table {
            0 => self.link_blocks(op, first_block, &new_entries).await,
            _ => self.move_refcount_table(op, first_block, &new_entries, (start + blocks, table)).await,
        };
        if linked.is_err() {
            // The file may refer to some of the blocks, and memory does not: nothing can be allocated safely any more.
            self.barrier.fail();
        }
        linked?;
        self.tables.borrow_mut().extend(start..start + blocks);
        Ok((start + blocks + table, count))
    }

    async fn link_blocks(&self, op: IoOp, first: u64, new: &[u64]) -> Result<()> {
        self.sync(op).await?;
        let mut done = 0;
        while done < new.len() {
            let index = first + done as u64;
            let n = ((SECTOR_ENTRIES - index % SECTOR_ENTRIES) as usize).min(new.len() - done);
            let entries = encode(&new[done..done + n]).sg();
            let at = self.refcount_table_at.get() + index * 8;
            self.storage.write(at, &entries).await.map_err(|e| self.io_error(op, e))?;
            self.sync(op).await?;
            done += n;
        }
        self.refcount_table.borrow_mut()[first as usize..][..new.len()].copy_from_slice(new);
        Ok(())
    }

    async fn move_refcount_table(
        &self,
        op: IoOp,
        first: u64,
        new: &[u64],
        (place, clusters): Clusters,
    ) -> Result<()> {
        let g = self.geometry;
        let mut table = self.refcount_table.borrow().clone();
        let old = (g.index(self.refcount_table_at.get()), g.clusters_for(table.len() as u64 * 8));
        table.resize((clusters << g.cluster_bits) as usize / 8, 0);
        table[first as usize..][..new.len()].copy_from_slice(new);
        let at = place << g.cluster_bits;
        self.storage.write(at, &encode(&table).sg()).await.map_err(|e| self.io_error(op, e))?;
        self.sync(op).await?;
        // Offset and length stand side by side in one sector of the header.
        let mut words = at.to_be_bytes().to_vec();
        words.extend_from_slice(&(clusters as u32).to_be_bytes());
        let words = Buffer::from_slice(&words).sg();
        self.storage.write(field::REFCOUNT_TABLE, &words).await.map_err(|e| self.io_error(op, e))?;
        self.sync(op).await?;
        *self.refcount_table.borrow_mut() = table;
        self.refcount_table_at.set(at);
        self.move_fixed(old, (place, clusters));
        let free = self.change_refcounts(op, old, false).await?;
        self.first_free.set(free.iter().fold(self.first_free.get(), |f, (c, _)| f.min(*c)));
        Ok(())
    }

    /// A table that is protected as a range has moved.
    pub(super) fn move_fixed(&self, (old, old_count): Clusters, (new, new_count): Clusters) {
        let mut fixed = self.fixed.borrow_mut();
        fixed.retain(|range| *range != (old, old + old_count));
        fixed.push((new, new + new_count));
        fixed.sort_unstable();
    }
}
