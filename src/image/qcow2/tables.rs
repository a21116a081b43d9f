//! Changing the mapping: L2 entries, written through before they are visible; L2 tables made and copied on first use.

use std::rc::Rc;

use super::{
    Qcow2, Storage,
    layout::{COPIED, Entry, Mapping, Place, be64},
};
use crate::{
    storage::cache::Slice,
    sys::mem::Buffer,
    volume::{IoOp, Result},
};

/// A slice of an L2 table that belongs to this image alone, held so that it stays in memory; and where a cluster's entry is in it.
pub(super) struct Entries {
    slice: Rc<Slice>,
    first_cluster: u64,
    first_index: usize,
}

impl Entries {
    fn index(&self, cluster: u64) -> usize {
        self.first_index + (cluster - self.first_cluster) as usize
    }
}

/// The bytes of a table of words.
pub(super) fn encode(entries: &[u64]) -> Buffer {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
    Buffer::from_slice(&bytes)
}

/// The words of a table's bytes.
pub(super) fn decode(table: &Buffer) -> Vec<u64> {
    let mut words = Vec::with_capacity(table.len() / 8);
    let mut chunk = [0u8; 4096];
    let mut pos = 0;
    while pos < table.len() {
        let n = chunk.len().min(table.len() - pos);
        table.sg().copy_out(pos, &mut chunk[..n]);
        words.extend((0..n / 8).map(|i| be64(&chunk, i * 8)));
        pos += n;
    }
    words
}

/// How entries change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    /// After a crash each is old or new by itself.
    Each,
    /// After a crash all are old or all are new, if they lie in one sector, and what was written before is durable if they are new.
    AtOnce,
}

/// The kernel brings a file to the disk by pages.
const PAGE: u64 = 4096;

impl<S: Storage> Qcow2<S> {
    /// The entries around a guest cluster, ready to be changed: the L2 table is made if there is none, and copied if a
    /// snapshot shares it. The caller holds the guest clusters.
    pub(super) async fn entries(&self, op: IoOp, cluster: u64) -> Result<Entries> {
        let table = match self.l2_table(cluster) {
            Ok(Some((table, true))) => table,
            Ok(_) => self.own_table(op, cluster).await?,
            Err(why) => return Err(self.damaged(op, why).await),
        };
        let slice = self.load_slice(op, table, cluster).await?;
        Ok(Entries { slice, first_cluster: cluster, first_index: self.place(table, cluster).index })
    }

    async fn own_table(&self, op: IoOp, cluster: u64) -> Result<u64> {
        let _linking = self.linking.lock().await;
        let old = match self.l2_table(cluster) {
            Ok(Some((table, true))) => return Ok(table),
            Ok(old) => old.map(|(table, _)| table),
            Err(why) => return Err(self.damaged(op, why).await),
        };
        let g = self.geometry;
        let index = g.l1_index(cluster) as usize;
        if index >= self.l1.borrow().len() {
            return Err(self.damaged(op, "the L1 table is too small for the disk").await);
        }
        let (host, _) = self.take(op, 1).await?;
        self.l2.forget(host, g.cluster());
        if let Some(old) = old
            && let Err(e) = self.copy_table(op, old, host).await
        {
            self.give_back(host, 1);
            return Err(e);
        }
        // Without an old table there is nothing to write: the cluster is known to be zeros, durably.
        self.tables.borrow_mut().insert(g.index(host));
        let entry = host | COPIED;
        let at = self.l1_at.get() + index as u64 * 8;
        if let Err(e) = self.storage.write(at, &encode(&[entry]).sg()).await {
            // It may be there all the same, so the cluster is neither used nor given back. Nothing is lost: until the entry
            // is written again, nobody changes the old table or the new one.
            return Err(self.io_error(op, e));
        }
        self.l1.borrow_mut()[index] = entry;
        if let Some(old) = old {
            self.tables.borrow_mut().remove(&g.index(old));
            self.free_later(g.index(old), 1);
        }
        Ok(host)
    }

    async fn copy_table(&self, op: IoOp, from: u64, to: u64) -> Result<()> {
        let table = Buffer::zeroed(self.geometry.cluster() as usize).sg();
        self.storage.read(from, &table).await.map_err(|e| self.io_error(op, e))?;
        self.storage.write(to, &table).await.map_err(|e| self.io_error(op, e))?;
        self.sync(op).await
    }

    /// The entry of a guest cluster that the slice maps.
    pub(super) fn entry(&self, entries: &Entries, cluster: u64) -> Entry {
        self.entry_in(&entries.slice, entries.index(cluster))
    }

    /// Sets the entries of guest clusters from `cluster` on, in the file and then in memory. They must lie in the slice.
    pub(super) async fn set_entries(
        &self,
        op: IoOp,
        entries: &Entries,
        cluster: u64,
        new: &[Entry],
    ) -> Result<()> {
        self.set_entries_as(op, entries, cluster, new, Switch::Each).await
    }

    /// The same, in one of two ways.
    pub(super) async fn set_entries_as(
        &self,
        op: IoOp,
        entries: &Entries,
        cluster: u64,
        new: &[Entry],
        how: Switch,
    ) -> Result<()> {
        let g = self.geometry;
        let offset = entries.index(cluster) * g.entry_bytes() as usize;
        let at = entries.slice.at + offset as u64;
        let bytes = g.entry_table(new);
        // A slice lies within one page.
        let _page = match how {
            Switch::Each => self.table_pages.shared(at / PAGE, 1).await,
            Switch::AtOnce => self.table_pages.exclusive(at / PAGE, 1).await,
        };
        if how == Switch::AtOnce {
            // Of a page that is written anew while it is on its way to the disk, the disk may get a mix.
            self.sync(op).await?;
        }
        match self.storage.write(at, &Buffer::from_slice(&bytes).sg()).await {
            Ok(()) => {
                entries.slice.set(offset, &bytes);
                Ok(())
            }
            Err(e) => {
                // What the file holds now is anybody's guess: look, so that memory and file say the same.
                let there = Buffer::zeroed(bytes.len());
                match self.storage.read(at, &there.sg()).await {
                    Ok(()) => entries.slice.set(offset, &there.to_vec()),
                    Err(_) => self.barrier.fail(),
                }
                Err(self.io_error(op, e))
            }
        }
    }

    /// The clusters of the file that an entry with that place refers to: the first, and how many.
    pub(super) fn referred(&self, place: Place) -> Option<(u64, u64)> {
        let g = &self.geometry;
        match place {
            Place::None => None,
            // The clusters of a data file are counted nowhere.
            Place::Cluster { .. } if self.data.is_some() => None,
            Place::Cluster { host, .. } => Some((g.index(host), 1)),
            Place::Compressed { at, len } => {
                let first = g.index(at);
                Some((first, g.index(at + len - 1) - first + 1))
            }
        }
    }

    /// What an entry says of a unit; if it makes no sense, the image is damaged.
    pub(super) async fn mapping_of(&self, op: IoOp, entry: Entry, unit: u64) -> Result<Mapping> {
        match self.mapping(entry, unit) {
            Ok(mapping) => Ok(mapping),
            Err(why) => Err(self.damaged(op, why).await),
        }
    }

    /// The place that an entry gives; if it makes no sense, the image is damaged.
    pub(super) async fn place_of(&self, op: IoOp, entry: Entry) -> Result<Place> {
        match self.host_place(entry) {
            Ok(place) => Ok(place),
            Err(why) => Err(self.damaged(op, why).await),
        }
    }

    /// An error if one of the clusters holds metadata: an entry of a damaged image points there.
    pub(super) async fn check_not_metadata(&self, op: IoOp, first: u64, count: u64) -> Result<()> {
        if self.data.is_some() {
            return Ok(());
        }
        match (first..first + count).find(|c| self.is_metadata(*c)) {
            None => Ok(()),
            Some(c) => {
                let at = c << self.geometry.cluster_bits;
                Err(self.damaged(op, format!("an L2 entry refers to metadata at {at:#x}")).await)
            }
        }
    }
}
