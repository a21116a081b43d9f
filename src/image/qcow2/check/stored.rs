//! The refcounts that an image keeps: their structure checked, read block by block, and compared with the references found.

use std::{collections::BTreeMap, io};

use super::{
    Scan,
    walk::{Block, Owner},
};
use crate::{image::qcow2::Storage, sys::mem::Buffer};

impl Scan {
    /// The refcount table and the places of its blocks.
    pub(super) fn refcount_structure(&mut self) -> io::Result<()> {
        let (g, at) = (self.g, self.header.refcount_table_offset);
        let bytes = self.refcount_table.len() as u64 * 8;
        if !self.table(Owner::RefcountTable, at, bytes)? {
            self.refcount_table.fill(0);
        }
        let table = self.refcount_table.clone();
        let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
        for (index, entry) in table.iter().copied().enumerate().filter(|(_, entry)| *entry != 0) {
            let at = entry & !511;
            let index = index as u64;
            let wrong = match () {
                () if entry & 511 != 0 => "reserved bits are set",
                () if !g.aligned(at) => "the offset is not the start of a cluster",
                () if g.index(at) >= self.clusters => "the block lies beyond the end of the file",
                () if seen.contains_key(&at) => "another entry has the same block",
                () => "",
            };
            if !wrong.is_empty() {
                self.report.corrupt(1, || format!("refcount table entry {index} is {entry:#x}: {wrong}"));
                self.replace.insert(index);
            }
            let readable = g.aligned(at) && g.index(at) < self.clusters;
            if !readable {
                continue;
            }
            let counted = entry & 511 == 0;
            match seen.get(&at).and_then(|first| self.blocks.get_mut(first)) {
                Some(first) => first.entries += u64::from(counted),
                None => {
                    let good = wrong.is_empty();
                    self.blocks.insert(index, Block { at, good, entries: u64::from(counted) });
                    seen.insert(at, index);
                }
            }
            if counted {
                self.table(Owner::RefcountBlock, at, g.cluster())?;
            }
        }
        Ok(())
    }

    /// When all references are known: a block that is something else too is not to be written.
    pub(super) fn blocks_alone(&mut self) {
        let blocks: Vec<(u64, Block)> = self.blocks.iter().map(|(i, b)| (*i, *b)).collect();
        for (index, Block { at, good, entries }) in blocks {
            let cluster = self.g.index(at);
            let references = self.references.get(cluster);
            if !good || references == 1 {
                continue;
            }
            // That two entries have the same block has been counted.
            if references != entries {
                self.report.corrupt(1, || {
                    format!("the refcount block {index} at {at:#x} has {references} references")
                });
            }
            self.replace.insert(index);
            self.blocks.insert(index, Block { at, good: false, entries });
        }
    }

    /// A refcount block's bytes; `None` if there is none, or it cannot be read.
    pub(in super::super) async fn block<S: Storage>(&mut self, storage: &S, index: u64) -> Option<Vec<u8>> {
        let Block { at, .. } = *self.blocks.get(&index)?;
        let buffer = Buffer::zeroed(self.g.cluster() as usize);
        match storage.read(at, &buffer.sg()).await {
            Ok(()) => Some(buffer.to_vec()),
            Err(e) => {
                self.report.error(|| format!("the refcount block {index} at {at:#x} cannot be read: {e}"));
                self.blocks.remove(&index);
                self.blind = true;
                None
            }
        }
    }

    /// The refcounts that are 1, which the COPIED flags go by.
    pub(super) async fn load_ones<S: Storage>(&mut self, storage: &S) -> io::Result<()> {
        let g = self.g;
        let indices: Vec<u64> = self.blocks.keys().copied().collect();
        for index in indices {
            let first = index << g.block_bits();
            if first > self.clusters {
                break;
            }
            let Some(bytes) = self.block(storage, index).await else { continue };
            if bytes.iter().all(|b| *b == 0) {
                continue;
            }
            let count = (1u64 << g.block_bits()).min(self.clusters + 1 - first);
            for i in (0..count).filter(|i| g.refcount(&bytes, *i as usize) == 1) {
                self.ones.set(first + i)?;
            }
        }
        Ok(())
    }

    /// Clusters of the file whose refcount is not 0, counted up to `enough`. Nothing else needs to be known before.
    pub(in super::super) async fn counted<S: Storage>(
        &mut self,
        storage: &S,
        enough: u64,
    ) -> io::Result<u64> {
        self.refcount_structure()?;
        let (g, mut found) = (self.g, 0);
        let indices: Vec<u64> = self.blocks.keys().copied().collect();
        for index in indices {
            let first = index << g.block_bits();
            if first >= self.clusters || found >= enough {
                break;
            }
            let Some(bytes) = self.block(storage, index).await else { continue };
            let count = (1u64 << g.block_bits()).min(self.clusters - first);
            found += (0..count).filter(|i| g.refcount(&bytes, *i as usize) != 0).count() as u64;
        }
        Ok(found)
    }

    /// Compares what the image says with what was found, for all clusters of the file.
    pub(super) async fn compare<S: Storage>(&mut self, storage: &S) -> io::Result<()> {
        let g = self.g;
        let mut indices = self.references.blocks(g.block_bits());
        indices.extend(self.blocks.keys());
        indices.sort_unstable();
        indices.dedup();
        let end = self.references.last().map_or(0, |last| last + 1).max(self.clusters);
        let mut used = 0;
        for index in indices {
            let first = index << g.block_bits();
            let bytes = match first < end {
                true => self.block(storage, index).await,
                false => break,
            };
            for cluster in first..end.min(first + (1 << g.block_bits())) {
                let stored = bytes.as_ref().map_or(0, |b| g.refcount(b, (cluster - first) as usize));
                let all = self.references.get(cluster);
                let found = all.min(g.max_refcount());
                if stored > 0 || found > 0 {
                    used = cluster;
                }
                let at = cluster << g.cluster_bits;
                let words = || format!("the cluster at {at:#x} has refcount {stored} and {found} references");
                if stored > found {
                    self.report.leaks += 1;
                    self.report.say(words);
                } else if stored < found {
                    self.report.corrupt(1, words);
                    if bytes.is_none() {
                        self.replace.insert(index);
                    }
                } else if all == found && self.owned.contains_key(&cluster) && !self.alone(cluster) {
                    self.report.corrupt(1, || format!("the table at {at:#x} lies where something else does"));
                }
            }
        }
        self.report.image_end_offset = (used + 1) << g.cluster_bits;
        Ok(())
    }
}
