//! Zeros: discarded clusters are unlinked and freed, others are zeroed where they are.
//!
//! A discarded cluster becomes a zero cluster where there is a backing file (which may grow later), and unallocated where there
//! is none. Version 2 has no zero clusters: over a backing file zeros are written.

use super::{
    Qcow2, Storage,
    layout::{ALL_ALLOCATED, COPIED, Entry, Mapping, Place},
    map::Kind,
    tables::Entries,
};
use crate::{
    sys::mem::Buffer,
    volume::{IoOp, Result},
};

const OP: IoOp = IoOp::Discard;

impl<S: Storage> Qcow2<S> {
    /// Makes a range zeros. With `free`, clusters that it covers are given back; without, there is a cluster for each afterwards.
    pub(super) async fn zero_range(&self, at: u64, len: u64, free: bool) -> Result<()> {
        let g = self.geometry;
        let end = at + len;
        // The disk's last cluster may be cut off by its end; all there is of it is all of it.
        let whole_end = match end == self.size.get() {
            true => g.clusters_for(end),
            false => g.index(end),
        };
        let whole_start = g.clusters_for(at);
        if whole_start >= whole_end {
            self.zero_part(at, end, free).await?;
        } else {
            self.zero_part(at, whole_start << g.cluster_bits, free).await?;
            self.zero_part((whole_end << g.cluster_bits).min(end), end, free).await?;
            let mut cluster = whole_start;
            while cluster < whole_end {
                let at = cluster << g.cluster_bits;
                let next = g.index(at + self.slice_span(at)).min(whole_end);
                cluster = self.zero_clusters(cluster, next, whole_end, free).await?;
                self.relieve(OP).await?;
            }
        }
        self.relieve(OP).await
    }

    /// Makes bytes within clusters zeros.
    async fn zero_part(&self, at: u64, end: u64, free: bool) -> Result<()> {
        let mut pos = at;
        while pos < end {
            let at_work = self.epochs.enter();
            let run = self.run(OP, pos, end - pos).await?;
            let zeros = match run.kind {
                Kind::Data { host, owned: true } => {
                    let (first, last) = (self.geometry.index(host), self.geometry.index(host + run.len - 1));
                    self.check_not_metadata(OP, first, last - first + 1).await?;
                    let done = match free {
                        true => self.data().punch(host, run.len).await,
                        false => self.data().zero(host, run.len).await,
                    };
                    done.map_err(|e| self.io_error(OP, e))?;
                    true
                }
                Kind::Zero { .. } => free,
                Kind::Unallocated if free && !self.has_backing_at(pos) => true,
                Kind::Unallocated if self.geometry.extended_l2 => {
                    drop(at_work);
                    pos += self.zero_unit(pos, run.len, free).await?;
                    continue;
                }
                Kind::Data { .. } | Kind::Compressed { .. } | Kind::Unallocated => false,
            };
            drop(at_work);
            if !zeros {
                self.write_range(OP, pos, &Buffer::zeroed(run.len as usize).sg()).await?;
            }
            pos += run.len;
        }
        Ok(())
    }

    /// Makes the guest clusters from `first` to before `next`, which one slice maps, zeros; gives the cluster to go on with, which
    /// may lie further on (up to `end`) where there is nothing.
    async fn zero_clusters(&self, first: u64, next: u64, end: u64, free: bool) -> Result<u64> {
        let g = self.geometry;
        let _at_work = self.epochs.enter();
        let _held = self.guests.exclusive(first, next - first).await;
        if free && self.backing.is_none() {
            // Where there is no L2 table there is nothing to free, and no need to make one.
            match self.l2_table(first) {
                Ok(None) => return Ok(((g.l1_index(first) + 1) << g.l2_bits()).min(end)),
                Ok(Some(_)) => {}
                Err(why) => return Err(self.damaged(OP, why).await),
            }
        }
        let start = first << g.cluster_bits;
        if self.data.is_some() && free {
            self.empty_data(first, next).await?;
        } else if !free || (g.version < 3 && self.has_backing_at(start)) {
            let entries = self.entries(OP, first).await?;
            self.keep_zeros(&entries, first, next).await?;
        } else {
            self.unlink(first, next).await?;
        }
        Ok(next)
    }

    /// Frees clusters; they read as zeros.
    async fn unlink(&self, first: u64, next: u64) -> Result<()> {
        let empty = match self.backing.is_some() && self.geometry.version >= 3 {
            true => self.geometry.zero_entry(0),
            false => Entry::default(),
        };
        if let Ok(Some((table, _))) = self.l2_table(first) {
            let slice = self.load_slice(OP, table, first).await?;
            let index = self.place(table, first).index;
            if (0..(next - first) as usize).all(|i| self.entry_in(&slice, index + i) == empty) {
                return Ok(());
            }
        }
        let entries = self.entries(OP, first).await?;
        let mut old = Vec::with_capacity((next - first) as usize);
        for cluster in first..next {
            let place = self.place_of(OP, self.entry(&entries, cluster)).await?;
            if let Some((first, count)) = self.referred(place) {
                self.check_not_metadata(OP, first, count).await?;
                old.push((first, count));
            }
        }
        self.set_entries(OP, &entries, first, &vec![empty; (next - first) as usize]).await?;
        for (first, count) in old {
            self.free_later(first, count);
        }
        Ok(())
    }

    /// Makes clusters zeros that later writes need no new space for.
    async fn keep_zeros(&self, entries: &Entries, first: u64, next: u64) -> Result<()> {
        let g = self.geometry;
        let mut cluster = first;
        while cluster < next {
            let entry = self.entry(entries, cluster);
            cluster += match self.place_of(OP, entry).await? {
                Place::Cluster { host, owned: true } => {
                    self.zero_in_place(entries, cluster, next, entry, host).await?
                }
                _ => {
                    let want = self.clusters_to_take(entries, cluster, next - 1);
                    let (host, count) = self.take_place(OP, cluster, want).await?;
                    // They hold zeros, durably; this only makes sure of the space.
                    if let Err(e) = self.data().zero(host, count << g.cluster_bits).await {
                        self.give_back_from(host, count);
                        return Err(self.io_error(OP, e));
                    }
                    if self.data.is_some() {
                        self.sync(OP).await?;
                    }
                    let new = self.side_by_side(host, count);
                    self.link(OP, entries, cluster, &new, true).await?;
                    count
                }
            };
        }
        Ok(())
    }

    /// Makes clusters of this image zeros where they are, from `cluster` at `host` on; gives their number.
    async fn zero_in_place(
        &self,
        entries: &Entries,
        cluster: u64,
        next: u64,
        entry: Entry,
        host: u64,
    ) -> Result<u64> {
        let g = self.geometry;
        if g.extended_l2 {
            self.check_not_metadata(OP, g.index(host), 1).await?;
            self.data().zero(host, g.cluster()).await.map_err(|e| self.io_error(OP, e))?;
            if entry.bitmap != ALL_ALLOCATED {
                // What was not allocated may hold anything until that is durable, so it reads as zeros by its bits.
                let zeros = g.zero_entry(host | COPIED);
                self.set_entries(OP, entries, cluster, &[zeros]).await?;
            }
            return Ok(1);
        }
        if let Mapping::ZeroAllocated { .. } = self.mapping_of(OP, entry, 0).await? {
            return Ok(1);
        }
        let follows = |i: &u64| {
            let here = self.mapping(self.entry(entries, cluster + i), 0);
            let place = host + (i << g.cluster_bits);
            here == Ok(Mapping::Data { host: place, owned: true })
        };
        let count = (0..next - cluster).take_while(follows).count() as u64;
        self.check_not_metadata(OP, g.index(host), count).await?;
        self.data().zero(host, count << g.cluster_bits).await.map_err(|e| self.io_error(OP, e))?;
        Ok(count)
    }
}
