//! What lies where a table does: an L2 entry, or an L1 entry, that refers to a cluster of metadata gets a copy of it; and so does
//! an L2 entry whose cluster is shared by more than a refcount can say. The guest
//! reads what it read before, and may write without touching the table.

use std::io;

use super::Mending;
use crate::{
    image::qcow2::{
        Storage,
        layout::{COPIED, Mapping, Place, ZERO, offset},
        tables::encode,
    },
    sys::mem::Buffer,
};

/// Entries that one round changes; what is left is reported.
const MOST: usize = 4096;

/// An entry that is to be changed.
struct Change {
    /// Where it lies in the file.
    at: u64,
    /// The cluster that it gets a copy of; else it becomes a zero cluster.
    copy: Option<u64>,
}

impl<S: Storage> Mending<'_, S> {
    /// One round: L2 entries, or if there are none to change, L1 entries. Whether anything was done.
    pub(super) async fn unshare(&mut self) -> io::Result<bool> {
        let mut changes = self.shared_data().await?;
        if changes.is_empty() {
            changes = self.shared_tables();
        }
        changes.truncate(MOST);
        let g = self.scan.g;
        let copies = changes.iter().filter(|change| change.copy.is_some()).count() as u64;
        let mut next = 0;
        if copies > 0 {
            let Some(first) = self.structure(copies).await? else { return Ok(false) };
            next = first << g.cluster_bits;
        }
        let mut entries = Vec::new();
        for Change { at, copy } in &changes {
            let Some(from) = *copy else {
                entries.push((*at, ZERO));
                continue;
            };
            let cluster = Buffer::zeroed(g.cluster() as usize).sg();
            self.storage.read(from, &cluster).await?;
            self.storage.write(next, &cluster).await?;
            entries.push((*at, next | COPIED));
            next += g.cluster();
        }
        self.storage.sync().await?;
        for (at, entry) in entries {
            self.storage.write(at, &encode(&[entry]).sg()).await?;
        }
        self.storage.sync().await?;
        Ok(!changes.is_empty())
    }

    async fn shared_data(&self) -> io::Result<Vec<Change>> {
        let (s, mut changes) = (&self.scan, Vec::new());
        let g = s.g;
        if g.data_file {
            return Ok(changes);
        }
        let most = g.max_refcount();
        let on_table = |host| s.owned.contains_key(&g.index(host));
        let shared = |host| on_table(host) || s.references.get(g.index(host)) > most;
        for (table, _) in s.tables.iter().filter(|(at, t)| t.active > 0 && s.alone(g.index(**at))) {
            let buffer = Buffer::zeroed(g.cluster() as usize);
            self.storage.read(*table, &buffer.sg()).await?;
            let bytes = buffer.to_vec();
            let step = g.entry_bytes();
            for index in 0..bytes.len() / step as usize {
                let entry = g.entry(&bytes, index);
                let at = table + index as u64 * step;
                let host = offset(entry.word);
                let lost = !g.aligned(host) || host >= s.file_len || on_table(host);
                match g.mapping(entry, 0) {
                    // A cluster with subclusters is copied whole; its bitmap stays.
                    Ok(_) if g.extended_l2 => match g.place(entry) {
                        Ok(Place::Cluster { host, .. }) if shared(host) => {
                            changes.push(Change { at, copy: Some(host) });
                        }
                        _ => {}
                    },
                    Ok(Mapping::Data { host, .. }) if shared(host) => {
                        changes.push(Change { at, copy: Some(host) });
                    }
                    Ok(Mapping::ZeroAllocated { .. }) if lost => changes.push(Change { at, copy: None }),
                    // Zeros, wherever they are said to lie.
                    Err(_)
                        if lost
                            && g.version > 2
                            && !g.extended_l2
                            && entry.word & !(host | COPIED) == ZERO =>
                    {
                        changes.push(Change { at, copy: None });
                    }
                    _ => {}
                }
            }
            if changes.len() >= MOST {
                break;
            }
        }
        Ok(changes)
    }

    /// L1 entries whose table is not theirs alone.
    fn shared_tables(&self) -> Vec<Change> {
        let s = &self.scan;
        let l1_at = s.header.l1_offset;
        if !self.l1_alone() {
            return Vec::new();
        }
        let entries = s.l1.iter().enumerate().filter_map(|(index, entry)| {
            let table = s.g.table(*entry).ok().flatten()?;
            let shared = s.tables.contains_key(&table) && !s.alone(s.g.index(table));
            shared.then_some(Change { at: l1_at + index as u64 * 8, copy: Some(table) })
        });
        entries.take(MOST).collect()
    }
}
