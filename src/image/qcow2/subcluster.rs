//! Extended L2 entries (qcow2 specification, "Extended L2 Entries"): each of a cluster's 32 subclusters is data, zeros, or the
//! backing file's, so a small write into a large cluster copies a subcluster and not the cluster.
//!
//! The rules are those of [`super::write`], subcluster by subcluster. A cluster from the pool holds zeros, durably: where the guest saw
//! zeros, its subclusters become data at once, without a barrier, and later writes go in place. What the backing file, a shared or a
//! compressed cluster showed before is written whole and synced before its bit is set.

use super::{
    Qcow2, Storage,
    layout::{ALL_ALLOCATED, COPIED, Entry, Mapping, Place},
    tables::Entries,
};
use crate::{
    sys::mem::{Buffer, Sg},
    volume::{IoOp, Result},
};

/// The bits of subclusters from `first` to before `end`, in the lower half of a bitmap.
fn bits(first: u64, end: u64) -> u64 {
    ((1u64 << end) - 1) & !((1u64 << first) - 1)
}

/// The subclusters of a bitmap that read as zeros, as bits of its lower half.
fn zeros_of(bitmap: u64) -> u64 {
    bitmap >> 32
}

impl<S: Storage> Qcow2<S> {
    /// Writes guest bytes that one slice maps; the caller holds their clusters.
    pub(super) async fn write_subclusters(
        &self,
        op: IoOp,
        entries: &Entries,
        at: u64,
        from: &Sg,
    ) -> Result<()> {
        let g = self.geometry;
        let end = at + from.len() as u64;
        let last = g.index(end - 1);
        let mut pos = at;
        while pos < end {
            let cluster = g.index(pos);
            let entry = self.entry(entries, cluster);
            let place = self.place_of(op, entry).await?;
            let next;
            match place {
                Place::Cluster { host, owned: true } => {
                    next = ((cluster + 1) << g.cluster_bits).min(end);
                    let part = from.slice((pos - at) as usize, (next - pos) as usize);
                    self.write_within(op, entries, pos, &part, (entry, host)).await?;
                }
                _ => {
                    let want = self.clusters_to_take(entries, cluster, last);
                    let (host, count) = self.take_place(op, cluster, want).await?;
                    next = ((cluster + count) << g.cluster_bits).min(end);
                    let part = from.slice((pos - at) as usize, (next - pos) as usize);
                    match self.fill_subclusters(op, entries, pos, &part, (host, count)).await {
                        Ok(new) => self.link(op, entries, cluster, &new, true).await?,
                        Err(e) => {
                            self.give_back_from(host, count);
                            return Err(e);
                        }
                    }
                }
            }
            pos = next;
        }
        Ok(())
    }

    /// Writes within one cluster that is this image's own.
    async fn write_within(
        &self,
        op: IoOp,
        entries: &Entries,
        at: u64,
        from: &Sg,
        (entry, host): (Entry, u64),
    ) -> Result<()> {
        let g = self.geometry;
        let base = at - g.within(at);
        let end = at + from.len() as u64;
        let (first, last) = (self.unit(at), self.unit(end - 1));
        let new = bits(first, last + 1) & !entry.bitmap;
        // Where a subcluster at an end is not data yet, all of it is written.
        let unit_start = |unit: u64| base + (unit << g.unit_bits());
        let start = if new >> first & 1 != 0 { unit_start(first) } else { at };
        let stop = if new >> last & 1 != 0 { unit_start(last + 1) } else { end };
        let mut whole = self.seen(start, at - start).await?;
        whole.append(from);
        whole.append(&self.seen(end, stop - end).await?);
        self.check_not_metadata(op, g.index(host), 1).await?;
        self.write_whole(op, host + g.within(start), &whole).await?;
        if new == 0 {
            return Ok(());
        }
        self.sync(op).await?;
        let bitmap = (entry.bitmap | new) & !(new << 32);
        self.set_entries(op, entries, g.index(at), &[Entry { word: host | COPIED, bitmap }]).await
    }

    /// Writes into clusters from the pool, with what has to come along from where the guest's data were. Gives
    /// the entries that they are to be linked by.
    async fn fill_subclusters(
        &self,
        op: IoOp,
        entries: &Entries,
        at: u64,
        from: &Sg,
        (host, count): (u64, u64),
    ) -> Result<Vec<Entry>> {
        let g = self.geometry;
        let base = at - g.within(at);
        let end = at + from.len() as u64;
        let (first, last) = (g.index(at), g.index(at) + count - 1);
        // Subclusters that the guest sees as zeros, and those with data to be copied, by cluster.
        let (mut zeros, mut data) = (Vec::new(), Vec::new());
        for cluster in first..=last {
            let (z, d) = self.classify(op, entries, cluster).await?;
            zeros.push(z);
            data.push(d);
        }
        let mut new: Vec<Entry> = self.side_by_side(host, count);
        if self.data.is_some() {
            // What the data file holds there is not known: nothing but what is written may be used of it.
            zeros.iter_mut().zip(&mut data).for_each(|(z, d)| {
                *d |= *z;
                *z = 0;
            });
        } else if zeros.iter().all(|z| *z == ALL_ALLOCATED) {
            self.storage.write(host + (at - base), from).await.map_err(|e| self.io_error(op, e))?;
            return Ok(new);
        }
        let ends = (data.first().copied().unwrap_or(0), data.last().copied().unwrap_or(0));
        let unit = |at: u64| (at - base) >> g.unit_bits();
        let before = bits(0, unit(at).min(31) + 1) & ends.0;
        let start_unit = before.trailing_zeros().min(unit(at) as u32);
        let start = base + (u64::from(start_unit) << g.unit_bits());
        let last_base = last << g.cluster_bits;
        let last_unit = (end - 1 - last_base) >> g.unit_bits();
        let after = ends.1 & !bits(0, last_unit);
        let stop_unit = (64 - after.leading_zeros()).max(last_unit as u32 + 1);
        let stop = last_base + (u64::from(stop_unit) << g.unit_bits());
        let mut whole = self.seen(start, at - start).await?;
        whole.append(from);
        whole.append(&self.seen(end, stop - end).await?);
        self.write_whole(op, host + (start - base), &whole).await?;
        self.sync(op).await?;
        for (i, entry) in new.iter_mut().enumerate() {
            let cluster_at = base + ((i as u64) << g.cluster_bits);
            let from_unit = start.saturating_sub(cluster_at) >> g.unit_bits();
            let to_unit = (stop.saturating_sub(cluster_at) >> g.unit_bits()).min(g.units());
            // The rest of what reads as zeros is zeros in the pool's clusters.
            entry.bitmap = bits(from_unit, to_unit) | zeros[i];
        }
        Ok(new)
    }

    /// Which subclusters of a guest cluster read as zeros, and which have data in this image.
    async fn classify(&self, op: IoOp, entries: &Entries, cluster: u64) -> Result<(u64, u64)> {
        let g = self.geometry;
        let (mut zeros, mut data) = (0, 0);
        for unit in 0..g.units() {
            let at = (cluster << g.cluster_bits) + (unit << g.unit_bits());
            match self.mapping_of(op, self.entry(entries, cluster), unit).await? {
                Mapping::Zero | Mapping::ZeroAllocated { .. } => zeros |= 1 << unit,
                Mapping::Unallocated if !self.has_backing_at(at) => zeros |= 1 << unit,
                Mapping::Unallocated => {}
                Mapping::Data { .. } | Mapping::Compressed { .. } => data |= 1 << unit,
            }
        }
        Ok((zeros, data))
    }

    /// The number of a byte's subcluster in its cluster.
    fn unit(&self, at: u64) -> u64 {
        self.geometry.within(at) >> self.geometry.unit_bits()
    }

    /// Bytes as the guest sees them; beyond the disk's end they are zeros, so that nothing appears there when it grows.
    pub(super) async fn seen(&self, at: u64, len: u64) -> Result<Sg> {
        if len == 0 {
            return Ok(Sg::new());
        }
        let sg = Buffer::zeroed(len as usize).sg();
        let seen = self.size.get().saturating_sub(at).min(len);
        if seen > 0 {
            self.read_range(at, &sg.slice(0, seen as usize)).await?;
        }
        Ok(sg)
    }

    /// Makes bytes that are the backing file's zeros, as far as one cluster goes: whole subclusters by their bits, other bytes by
    /// writing them. Gives how many bytes are done.
    pub(super) async fn zero_unit(&self, at: u64, len: u64, free: bool) -> Result<u64> {
        const OP: IoOp = IoOp::Discard;
        let g = self.geometry;
        let unit = 1 << g.unit_bits();
        let end = (at + len).min(((g.index(at) + 1) << g.cluster_bits).min(self.size.get()));
        let start = at.next_multiple_of(unit);
        let stop = if end == self.size.get() { end.next_multiple_of(unit) } else { end / unit * unit };
        if !free || start != at || stop <= start {
            let end = if start != at { end.min(start) } else { end };
            self.write_range(OP, at, &Buffer::zeroed((end - at) as usize).sg()).await?;
            return Ok(end - at);
        }
        let _at_work = self.epochs.enter();
        let cluster = g.index(at);
        let _held = self.guests.exclusive(cluster, 1).await;
        let entries = self.entries(OP, cluster).await?;
        let old = self.entry(&entries, cluster);
        if let Place::Compressed { .. } = self.place_of(OP, old).await? {
            // Somebody has put it there meanwhile; the caller looks again.
            return Ok(0);
        }
        let base = cluster << g.cluster_bits;
        let which = bits((start - base) >> g.unit_bits(), (stop - base) >> g.unit_bits());
        let bitmap = (old.bitmap & !which) | which << 32;
        if zeros_of(old.bitmap) & which != which {
            self.set_entries(OP, &entries, cluster, &[Entry { word: old.word, bitmap }]).await?;
        }
        Ok(stop.min(end) - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_name_a_run_of_subclusters() {
        assert_eq!((bits(0, 32), bits(3, 5), bits(7, 7)), (ALL_ALLOCATED, 0b11000, 0));
        assert_eq!(zeros_of(0xa << 32 | 5), 0xa);
    }
}
