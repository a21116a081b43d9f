//! Whole trees of tables, L1 and the L2 tables beneath it: read past the cache, and what they refer to counted. For the
//! operations that look at everything: snapshots and shrinking. They run alone ([`super::Qcow2::alone`]).

use super::{
    Qcow2, Storage,
    deltas::Deltas,
    layout::{COPIED, Entry, Place},
};
use crate::{
    sys::{exec::join_all, mem::Buffer},
    volume::{IoOp, Result},
};

/// L2 tables that are read side by side.
const ABREAST: usize = 16;

/// A table in memory.
pub(super) struct Table {
    /// The index of its L1 entry.
    pub index: usize,
    /// Where it lies in the file.
    pub at: u64,
    entries: Vec<Entry>,
    /// Some entry has been changed.
    pub changed: bool,
}

impl Table {
    /// The entries as they are written.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn set(&mut self, index: usize, entry: Entry) {
        self.changed |= self.entries[index] != entry;
        self.entries[index] = entry;
    }

    /// Whether no entry says anything.
    pub fn is_blank(&self) -> bool {
        self.entries.iter().all(|e| *e == Entry::default())
    }
}

impl<S: Storage> Qcow2<S> {
    /// The L2 table that an entry of some L1 table names.
    pub(super) async fn table_of(&self, op: IoOp, entry: u64) -> Result<Option<u64>> {
        match self.geometry.table(entry) {
            Ok(Some(at)) if at >= self.file_len.get() => Err(self
                .damaged(op, format!("the L2 table at {at:#x} lies beyond the end of the file"))
                .await),
            Ok(at) => Ok(at),
            Err(why) => Err(self.damaged(op, format!("an L1 entry is {entry:#x}: {why}")).await),
        }
    }

    /// Hands every L2 table of some L1 entries to `work`, in order. `first` is the index of the first entry.
    pub(super) async fn each_table(
        &self,
        op: IoOp,
        first: usize,
        l1: &[u64],
        mut work: impl AsyncFnMut(Table) -> Result<()>,
    ) -> Result<()> {
        let mut places = Vec::new();
        for (i, entry) in l1.iter().enumerate() {
            if let Some(at) = self.table_of(op, *entry).await? {
                places.push((first + i, at));
            }
        }
        for places in places.chunks(ABREAST) {
            let tables = places.iter().map(|(index, at)| async move {
                let bytes = Buffer::zeroed(self.geometry.cluster() as usize);
                self.storage.read(*at, &bytes.sg()).await.map_err(|e| self.io_error(op, e))?;
                let bytes = bytes.to_vec();
                let entries =
                    (0..1 << self.geometry.l2_bits()).map(|i| self.geometry.entry(&bytes, i)).collect();
                Ok(Table { index: *index, at: *at, entries, changed: false })
            });
            for table in join_all(tables).await {
                work(table?).await?;
            }
        }
        Ok(())
    }

    /// Adds references to what the entries of a table from `from` on refer to, or takes them away.
    pub(super) async fn count_entries(
        &self,
        op: IoOp,
        counts: &mut Deltas,
        table: &Table,
        from: usize,
        by: i64,
    ) -> Result<()> {
        for entry in &table.entries[from..] {
            let place = self.place_of(op, *entry).await?;
            if let Some((first, count)) = self.referred(place) {
                self.check_not_metadata(op, first, count).await?;
                counts.add(first, count, by);
            }
        }
        Ok(())
    }

    /// Clears the mark of ownership (COPIED) from every entry of a table: what they refer to is shared from now on.
    pub(super) fn disown(&self, table: &mut Table) {
        for i in 0..table.entries.len() {
            let entry = table.entries[i];
            if self.owner_mark(entry).is_some() {
                table.set(i, Entry { word: entry.word & !COPIED, ..entry });
            }
        }
    }

    /// Sets the mark of ownership of every entry of a table to what the refcount will be.
    pub(super) async fn mark_owned(&self, op: IoOp, counts: &Deltas, table: &mut Table) -> Result<()> {
        for i in 0..table.entries.len() {
            let entry = table.entries[i];
            let Some(host) = self.owner_mark(entry) else { continue };
            let cluster = self.geometry.index(host);
            // Where no reference goes away, the mark is right as it is.
            if counts.of(cluster) != 0 {
                let owned = self.refcount_after(op, counts, cluster).await? == 1;
                let word = if owned { entry.word | COPIED } else { entry.word & !COPIED };
                table.set(i, Entry { word, ..entry });
            }
        }
        Ok(())
    }

    /// The cluster of an entry that has such a mark: a compressed one has none.
    fn owner_mark(&self, entry: Entry) -> Option<u64> {
        match self.host_place(entry) {
            Ok(Place::Cluster { host, .. }) => Some(host),
            _ => None,
        }
    }

    /// Unlinks the entries from `from` on.
    pub(super) fn cut_entries(&self, table: &mut Table, from: usize) {
        for i in from..table.entries.len() {
            table.set(i, Entry::default());
        }
    }

    /// Links a cluster of data that belongs to this image alone.
    pub(super) fn put_entry(&self, table: &mut Table, index: usize, host: u64) {
        table.set(index, self.geometry.data_entry(host));
    }
}
