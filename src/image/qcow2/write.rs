//! Writing. What this image owns is written in place, without locks; everything else under a lock on its guest clusters:
//! new clusters, data, then the L2 entries. Two writes to the same new cluster come one after the other, and the second finds it
//! in place; unrelated ones go side by side.
//!
//! Where the guest saw zeros before, a new cluster needs no copy and no barrier: it holds zeros already. Elsewhere (over a
//! backing file, a snapshot's cluster, a compressed one) the whole cluster is written and synced before it is linked, so that after a power cut the guest
//! sees the old data or the new. One sync serves all who wait for one.

use super::{
    Qcow2, Storage,
    layout::{Entry, Mapping, Place},
    map::Kind,
    read::ABREAST,
    tables::Entries,
};
use crate::{
    sys::{exec::join_all, mem::Sg},
    volume::{IoOp, Result},
};

/// A part of a write.
#[derive(Clone, Copy)]
enum Way {
    /// To that byte of the file.
    InPlace(u64),
    /// Through [`Qcow2::write_locked`].
    Locked,
}

#[derive(Clone, Copy)]
struct Part {
    start: u64,
    len: u64,
    way: Way,
}

/// Clusters of the file that become the guest's.
struct Target {
    host: u64,
    count: u64,
    /// They were taken from the pool, and hold zeros.
    fresh: bool,
}

impl<S: Storage> Qcow2<S> {
    pub(super) async fn write_range(&self, op: IoOp, at: u64, from: &Sg) -> Result<()> {
        {
            let _at_work = self.epochs.enter();
            self.write_parts(op, at, from).await?;
        }
        if self.pool_is_low() {
            Box::pin(self.reserve_ahead(op)).await;
        }
        self.relieve(op).await
    }

    /// Frees what waits when that has become much. The caller is not at work any more.
    pub(super) async fn relieve(&self, op: IoOp) -> Result<()> {
        if self.much_is_freed() {
            Box::pin(async {
                self.sync(op).await?;
                self.settle(op).await
            })
            .await?;
        }
        Ok(())
    }

    async fn write_parts(&self, op: IoOp, at: u64, from: &Sg) -> Result<()> {
        let len = from.len() as u64;
        let mut done = 0;
        while done < len {
            let first = self.next_part(op, at, done, len).await?;
            done += first.len;
            if first.len == len {
                return self.write_part(op, at, from, first).await;
            }
            let mut parts = vec![first];
            while done < len && parts.len() < ABREAST {
                let part = self.next_part(op, at, done, len).await?;
                parts.push(part);
                done += part.len;
            }
            let writes = parts.into_iter().map(|part| self.write_part(op, at, from, part));
            join_all(writes).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    /// The part that begins at `start`. What goes under a lock stays within the clusters that one slice maps.
    async fn next_part(&self, op: IoOp, at: u64, start: u64, len: u64) -> Result<Part> {
        let span = self.slice_span(at + start).min(len - start);
        let run = self.run(op, at + start, span).await?;
        if let Kind::Data { host, owned: true } = run.kind {
            return Ok(Part { start, len: run.len, way: Way::InPlace(host) });
        }
        let mut part = Part { start, len: run.len, way: Way::Locked };
        while part.len < span {
            let run = self.run(op, at + start + part.len, span - part.len).await?;
            if matches!(run.kind, Kind::Data { owned: true, .. }) {
                break;
            }
            part.len += run.len;
        }
        Ok(part)
    }

    async fn write_part(&self, op: IoOp, at: u64, from: &Sg, part: Part) -> Result<()> {
        let from = from.slice(part.start as usize, part.len as usize);
        match part.way {
            Way::InPlace(host) => self.write_in_place(op, host, &from).await,
            Way::Locked => Box::pin(self.write_locked(op, at + part.start, &from)).await,
        }
    }

    /// Whether a range of the file that guest's data are to go to (not empty) has clusters of metadata.
    pub(super) fn touches_metadata(&self, host: u64, len: u64) -> bool {
        let g = &self.geometry;
        self.data.is_none() && (g.index(host)..=g.index(host + len - 1)).any(|c| self.is_metadata(c))
    }

    pub(super) async fn write_in_place(&self, op: IoOp, host: u64, from: &Sg) -> Result<()> {
        if self.touches_metadata(host, from.len() as u64) {
            let g = &self.geometry;
            let (first, last) = (g.index(host), g.index(host + from.len() as u64 - 1));
            Box::pin(self.check_not_metadata(op, first, last - first + 1)).await?;
        }
        self.data().write_data(host, from).await.map_err(|e| self.io_error(op, e))
    }

    /// Writes guest bytes that one slice maps, holding their clusters.
    async fn write_locked(&self, op: IoOp, at: u64, from: &Sg) -> Result<()> {
        let g = self.geometry;
        let end = at + from.len() as u64;
        let (first, last) = (g.index(at), g.index(end - 1));
        let _held = self.guests.exclusive(first, last - first + 1).await;
        let entries = self.entries(op, first).await?;
        if g.extended_l2 {
            return self.write_subclusters(op, &entries, at, from).await;
        }
        let mut pos = at;
        while pos < end {
            let cluster = g.index(pos);
            let mapping = self.mapping_of(op, self.entry(&entries, cluster), 0).await?;
            let next = match mapping {
                Mapping::Data { host, owned: true } => {
                    // Somebody else has brought it here since we looked.
                    let next = ((cluster + 1) << g.cluster_bits).min(end);
                    let part = from.slice((pos - at) as usize, (next - pos) as usize);
                    self.write_in_place(op, host + g.within(pos), &part).await?;
                    next
                }
                Mapping::ZeroAllocated { host, owned: true } => {
                    let most = last - cluster + 1;
                    let count = self.kept_together(&entries, cluster, host, most);
                    self.check_not_metadata(op, g.index(host), count).await?;
                    let next = ((cluster + count) << g.cluster_bits).min(end);
                    let part = from.slice((pos - at) as usize, (next - pos) as usize);
                    self.fill(op, &entries, pos, &part, Target { host, count, fresh: false }).await?;
                    next
                }
                _ => {
                    let want = self.clusters_to_take(&entries, cluster, last);
                    let (host, count) = self.take_place(op, cluster, want).await?;
                    let next = ((cluster + count) << g.cluster_bits).min(end);
                    let part = from.slice((pos - at) as usize, (next - pos) as usize);
                    self.fill(op, &entries, pos, &part, Target { host, count, fresh: self.data.is_none() })
                        .await?;
                    next
                }
            };
            pos = next;
        }
        Ok(())
    }

    /// How many zero clusters from `cluster` on are kept side by side in the file, the first at `host`.
    fn kept_together(&self, entries: &Entries, cluster: u64, host: u64, most: u64) -> u64 {
        let step = self.geometry.cluster();
        let follows = |i: &u64| {
            let here = self.mapping(self.entry(entries, cluster + i), 0);
            matches!(here, Ok(Mapping::ZeroAllocated { host: h, owned: true }) if h == host + i * step)
        };
        (0..most).take_while(follows).count() as u64
    }

    /// How many clusters from `cluster` to `last` need a new place.
    pub(super) fn clusters_to_take(&self, entries: &Entries, cluster: u64, last: u64) -> u64 {
        let needs = |c: &u64| match self.host_place(self.entry(entries, *c)) {
            Ok(Place::Cluster { owned, .. }) => !owned,
            Ok(_) => true,
            Err(_) => false,
        };
        (cluster..=last).take_while(needs).count() as u64
    }

    /// Whether the guest sees zeros in a cluster.
    pub(super) fn sees_zeros(&self, mapping: Mapping, cluster: u64) -> bool {
        match mapping {
            Mapping::Zero | Mapping::ZeroAllocated { .. } => true,
            Mapping::Unallocated => !self.has_backing_at(cluster << self.geometry.cluster_bits),
            Mapping::Data { .. } | Mapping::Compressed { .. } => false,
        }
    }

    /// Writes data into clusters that are not linked, with what the guest sees around them, and links them.
    async fn fill(&self, op: IoOp, entries: &Entries, at: u64, from: &Sg, to: Target) -> Result<()> {
        let g = self.geometry;
        let end = at + from.len() as u64;
        let first = g.index(at);
        let mut old = Vec::with_capacity(to.count as usize);
        let mut zeros = to.fresh;
        for cluster in first..first + to.count {
            let mapping = self.mapping_of(op, self.entry(entries, cluster), 0).await?;
            zeros &= self.sees_zeros(mapping, cluster);
            old.push(mapping);
        }
        let written = async {
            if zeros {
                let host = to.host + g.within(at);
                return self.data().write_data(host, from).await.map_err(|e| self.io_error(op, e));
            }
            let (head, tail) = match (old.first(), old.last()) {
                (Some(first), Some(last)) => self.read_ends(at, end, seen(*first), seen(*last)).await?,
                _ => (Sg::new(), Sg::new()),
            };
            let mut whole = head;
            whole.append(from);
            whole.append(&tail);
            self.write_whole(op, to.host, &whole).await?;
            self.sync(op).await
        }
        .await;
        if let Err(e) = written {
            if to.fresh {
                self.give_back(to.host, to.count);
            }
            return Err(e);
        }
        let new: Vec<Entry> = self.side_by_side(to.host, to.count);
        self.link(op, entries, first, &new, to.fresh).await
    }

    /// The entries of clusters of data that lie side by side in the file, of this image alone.
    pub(super) fn side_by_side(&self, host: u64, count: u64) -> Vec<Entry> {
        let bits = self.geometry.cluster_bits;
        (0..count).map(|i| self.geometry.data_entry(host + (i << bits))).collect()
    }

    /// Gives guest clusters from `first` on new entries; with `replaces`, lets go of what they had before.
    pub(super) async fn link(
        &self,
        op: IoOp,
        entries: &Entries,
        first: u64,
        new: &[Entry],
        replaces: bool,
    ) -> Result<()> {
        let mut old = Vec::new();
        for cluster in (first..first + new.len() as u64).filter(|_| replaces) {
            old.extend(self.referred(self.place_of(op, self.entry(entries, cluster)).await?));
        }
        self.set_entries(op, entries, first, new).await?;
        for (first, count) in old {
            self.free_later(first, count);
        }
        Ok(())
    }
}

/// How a cluster of that mapping is read.
fn seen(mapping: Mapping) -> Kind {
    match mapping {
        Mapping::Unallocated => Kind::Unallocated,
        Mapping::Zero => Kind::Zero { kept: false },
        Mapping::ZeroAllocated { .. } => Kind::Zero { kept: true },
        Mapping::Data { host, owned } => Kind::Data { host, owned },
        Mapping::Compressed { at, len } => Kind::Compressed { at, len },
    }
}
