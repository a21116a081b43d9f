//! New refcount blocks, and a new refcount table where the old one is too small or lies where something else does.

use std::collections::BTreeMap;

use super::Mending;
use crate::{
    image::qcow2::{
        Storage,
        check::Scan,
        header::field,
        layout::{MAX_HOST, MAX_REFCOUNT_TABLE_BYTES},
        tables::encode,
    },
    sys::mem::Buffer,
};

impl<S: Storage> Mending<'_, S> {
    /// New refcount blocks where the table has none, or one that cannot stay; and `extra` clusters together, counted as referred to once.
    /// Gives the first of those, if anything was done.
    pub(super) async fn structure(&mut self, extra: u64) -> std::io::Result<Option<u64>> {
        let s = &self.scan;
        let g = s.g;
        let at = s.header.refcount_table_offset;
        let table_clusters = u64::from(s.header.refcount_table_clusters);
        let mut move_table = (g.index(at)..g.index(at) + table_clusters).any(|c| !s.alone(c));
        if s.replace.is_empty() && !move_table && extra == 0 {
            return Ok(None);
        }
        // An entry whose block would count nothing is cleared, unless the block may count what was not seen.
        let used = s.references.blocks(g.block_bits());
        let needed = |index: &u64| used.binary_search(index).is_ok();
        let unseen = |index: &u64| s.blind && s.blocks.contains_key(index);
        let (mut make, dropped): (Vec<u64>, Vec<u64>) =
            s.replace.iter().partition(|index| needed(index) || unseen(index));
        let mut places = Places::new(s, self.storage.is_fixed());
        // Until the blocks and the table are counted themselves.
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut table: Option<(u64, u64)> = None;
        let Some(reserved) = places.take(extra) else { return self.no_room() };
        let mut taken: Vec<u64> = (reserved..reserved + extra).collect();
        make.extend(self.without_block(&taken, &blocks));
        loop {
            while let Some(index) = make.pop() {
                if blocks.contains_key(&index) {
                    continue;
                }
                let Some(cluster) = places.take(1) else { return self.no_room() };
                blocks.insert(index, cluster);
                taken.push(cluster);
            }
            let most = blocks.keys().last().copied().unwrap_or(0);
            let have = table.map_or(table_clusters, |(_, n)| n) << g.cluster_bits >> 3;
            if most >= have || (move_table && table.is_none()) {
                let entries = (most + 1).max(have) + u64::from(most >= have) * have / 2;
                let count = g.clusters_for(entries * 8);
                if count << g.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                    return self.no_room();
                }
                let Some(first) = places.take(count) else { return self.no_room() };
                table = Some((first, count));
                taken.extend(first..first + count);
                move_table = true;
            }
            make = self.without_block(&taken, &blocks);
            if make.is_empty() {
                break;
            }
        }
        self.write_structure(&blocks, table, &taken, &dropped).await?;
        Ok(Some(reserved))
    }

    /// The indices of blocks that would count these clusters, and are neither there nor to be made.
    fn without_block(&self, taken: &[u64], made: &BTreeMap<u64, u64>) -> Vec<u64> {
        let s = &self.scan;
        let good = |index: &u64| !s.replace.contains(index) && s.blocks.get(index).is_some_and(|b| b.good);
        let mut missing: Vec<u64> = taken.iter().map(|cluster| cluster >> s.g.block_bits()).collect();
        missing.retain(|index| !made.contains_key(index) && !good(index));
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    fn no_room<T>(&mut self) -> std::io::Result<Option<T>> {
        self.scan.report.say(|| "there is no room for new refcount blocks".to_owned());
        Ok(None)
    }

    async fn write_structure(
        &mut self,
        blocks: &BTreeMap<u64, u64>,
        table: Option<(u64, u64)>,
        taken: &[u64],
        dropped: &[u64],
    ) -> std::io::Result<()> {
        let g = self.scan.g;
        for cluster in taken {
            self.scan.references.set(*cluster, 1)?;
        }
        for (index, cluster) in blocks {
            let mut bytes = vec![0; g.cluster() as usize];
            let first = index << g.block_bits();
            let old = if self.scan.blind { self.scan.block(self.storage, *index).await } else { None };
            for i in 0..1u64 << g.block_bits() {
                let stored = old.as_ref().map_or(0, |b| g.refcount(b, i as usize));
                g.set_refcount(&mut bytes, i as usize, self.references(first + i).max(stored));
            }
            let at = cluster << g.cluster_bits;
            self.storage.write(at, &Buffer::from_slice(&bytes).sg()).await?;
        }
        // Where a block that stays counts a new cluster.
        let others: Vec<u64> =
            taken.iter().copied().filter(|c| !blocks.contains_key(&(c >> g.block_bits()))).collect();
        for cluster in others {
            self.change_block(
                cluster >> g.block_bits(),
                |i, stored, _| if i == cluster { 1 } else { stored },
            )
            .await?;
        }
        let mut new = self.scan.refcount_table.clone();
        if let Some((_, count)) = table {
            new.resize((count << g.cluster_bits) as usize / 8, 0);
        }
        for index in dropped {
            new[*index as usize] = 0;
        }
        for (index, cluster) in blocks {
            new[*index as usize] = cluster << g.cluster_bits;
        }
        match table {
            Some((first, count)) => {
                let at = first << g.cluster_bits;
                self.storage.write(at, &encode(&new).sg()).await?;
                self.storage.sync().await?;
                // Offset and length stand side by side in one sector of the header.
                let mut words = at.to_be_bytes().to_vec();
                words.extend_from_slice(&(count as u32).to_be_bytes());
                self.storage.write(field::REFCOUNT_TABLE, &Buffer::from_slice(&words).sg()).await?;
            }
            None => {
                self.storage.sync().await?;
                let old = encode(&self.scan.refcount_table).to_vec();
                let at = self.scan.header.refcount_table_offset;
                self.write_sectors(at, &old, &encode(&new).to_vec()).await?;
            }
        }
        self.storage.sync().await
    }
}

/// Where new tables go: beyond everything in use.
struct Places {
    next: u64,
    /// One past the last cluster that there can be.
    end: u64,
}

impl Places {
    fn new(s: &Scan, fixed: bool) -> Places {
        let used = s.references.last().map_or(0, |last| last + 1);
        match fixed {
            // A device does not grow. What is behind the last reference is free, unless something cannot be followed.
            true if s.blind => Places { next: 0, end: 0 },
            true => Places { next: used, end: s.file_len >> s.g.cluster_bits },
            false => Places { next: used.max(s.clusters), end: MAX_HOST >> s.g.cluster_bits },
        }
    }

    fn take(&mut self, count: u64) -> Option<u64> {
        let first = self.next;
        self.next = first.checked_add(count).filter(|next| *next <= self.end)?;
        Some(first)
    }
}
