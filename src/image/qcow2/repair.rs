//! Mending what [`super::check`] finds, as `qemu-img check -r leaks|all` does: refcounts put right, refcount blocks made anew
//! where they are missing or lie where something else does, COPIED flags set and cleared, the marks dirty and corrupt taken away when
//! nothing is left to mend.
//!
//! Order. Each step is durable before the next begins, and each leaves the image no worse than it was:
//! 1. new refcount blocks (and a new table, if it has to grow or to move), beyond everything that is in use: first the content,
//!    with the references counted, then the entries that link it, in whole sectors;
//! 2. COPIED flags are cleared where a cluster has not exactly one reference: from here on such a cluster is copied, not written to;
//! 3. refcounts that are too low are raised: too high is a leak at worst;
//! 4. refcounts that are too high are lowered to the references counted, and the space of what has none goes back;
//! 5. COPIED flags are set where a cluster has exactly one reference, and its refcount says so;
//! 6. the image is checked again, and the marks are cleared if it is clean.
//!
//! A power cut between or within the steps leaves an image that the same repair mends: no refcount was lowered below the
//! references, no flag set that permits writing to what is shared, nothing written over that anything refers to.
//!
//! What is never done: an entry of an L1 or L2 table keeps what it refers to, so the guest reads what it read before. Entries
//! that make no sense, clusters beyond the end of the file, tables that lie where something else does and a damaged snapshot
//! table are reported and left. While something that refers to clusters cannot be followed, no refcount is lowered: what looks leaked may be
//! what could not be seen.

use std::{collections::BTreeMap, path::Path};

use super::{
    Storage,
    check::{CheckReport, Progress, Scan, scan, walk::read_entry},
    header::{CORRUPT, DIRTY, field},
    layout::{COPIED, MAX_HOST, MAX_REFCOUNT_TABLE_BYTES, Mapping, be64},
    tables::encode,
};
use crate::{
    sys::mem::Buffer,
    volume::{IoError, IoOp, Result},
};

/// What a repair may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high.
    Leaks,
    /// All that can be mended.
    All,
}

/// Bytes of a sector: a write of one is not torn.
const SECTOR: usize = 512;

/// Repairs the image and checks it again: the report says what is left, and how much was mended. The caller sees to it that
/// nobody else uses the image.
///
/// # Errors
/// As [`super::check_on`]; and if writing fails, which leaves an image that can be repaired again.
pub async fn repair_on<S: Storage>(
    storage: &S,
    path: &Path,
    what: Repair,
    progress: Progress<'_>,
) -> Result<CheckReport> {
    let before = scan(storage, path, progress).await?;
    if before.report.is_clean() && !before.report.marked {
        return Ok(before.report);
    }
    let first = before.report.clone();
    let failed = |e| IoError::from_io(IoOp::Write, e).path(path);
    let mut mending = Mending { storage, scan: before };
    if what == Repair::All && mending.structure().await.map_err(failed)? {
        mending.scan = scan(storage, path, progress).await?;
    }
    mending.refcounts_and_flags(what).await.map_err(failed)?;
    let mut after = match first.corruptions + first.leaks {
        0 => mending.scan,
        _ => scan(storage, path, progress).await?,
    };
    if after.report.check_errors + after.report.corruptions == 0 && after.report.marked {
        let bits = (after.header.incompatible & !(DIRTY | CORRUPT)).to_be_bytes();
        let bits = Buffer::from_slice(&bits).sg();
        storage.sync().await.map_err(failed)?;
        storage.write(field::INCOMPATIBLE, &bits).await.map_err(failed)?;
        storage.sync().await.map_err(failed)?;
        after.report.marked = false;
    }
    after.report.corruptions_fixed = first.corruptions.saturating_sub(after.report.corruptions);
    after.report.leaks_fixed = first.leaks.saturating_sub(after.report.leaks);
    Ok(after.report)
}

struct Mending<'a, S: Storage> {
    storage: &'a S,
    scan: Scan,
}

impl<S: Storage> Mending<'_, S> {
    /// New refcount blocks where the table has none, or one that cannot stay. Whether anything was done.
    async fn structure(&mut self) -> std::io::Result<bool> {
        let s = &self.scan;
        let g = s.g;
        let at = s.header.refcount_table_offset;
        let table_clusters = u64::from(s.header.refcount_table_clusters);
        let mut move_table = (g.index(at)..g.index(at) + table_clusters).any(|c| !s.alone(c));
        if s.replace.is_empty() && !move_table {
            return Ok(false);
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
        let mut taken: Vec<u64> = Vec::new();
        loop {
            while let Some(index) = make.pop() {
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
            make = taken
                .iter()
                .map(|cluster| cluster >> g.block_bits())
                .filter(|index| {
                    !blocks.contains_key(index)
                        && (s.replace.contains(index) || !s.blocks.get(index).is_some_and(|b| b.good))
                })
                .collect();
            make.dedup();
            if make.is_empty() {
                break;
            }
        }
        self.write_structure(&blocks, table, &taken, &dropped).await?;
        Ok(true)
    }

    fn no_room(&mut self) -> std::io::Result<bool> {
        self.scan.report.say(|| "there is no room for new refcount blocks".to_owned());
        Ok(false)
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
                g.set_refcount(&mut bytes, i as usize, self.scan.references.get(first + i).max(stored));
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

    /// Writes the sectors of a table that have changed.
    async fn write_sectors(&self, at: u64, old: &[u8], new: &[u8]) -> std::io::Result<()> {
        for (i, (was, is)) in old.chunks(SECTOR).zip(new.chunks(SECTOR)).enumerate() {
            if was != is {
                self.storage.write(at + (i * SECTOR) as u64, &Buffer::from_slice(is).sg()).await?;
            }
        }
        Ok(())
    }

    /// Changes the refcounts of a block: `new` gives what each is to be, from the cluster, what it is, and its references.
    async fn change_block(
        &mut self,
        index: u64,
        new: impl Fn(u64, u64, u64) -> u64,
    ) -> std::io::Result<Vec<u64>> {
        let g = self.scan.g;
        let mut freed = Vec::new();
        let Some(at) = self.scan.blocks.get(&index).filter(|b| b.good).map(|b| b.at) else {
            return Ok(freed);
        };
        let Some(old) = self.scan.block(self.storage, index).await else { return Ok(freed) };
        let mut bytes = old.clone();
        let first = index << g.block_bits();
        for i in 0..1u64 << g.block_bits() {
            let stored = g.refcount(&old, i as usize);
            let is = new(first + i, stored, self.scan.references.get(first + i));
            if is != stored {
                g.set_refcount(&mut bytes, i as usize, is);
                if is == 0 {
                    freed.push(first + i);
                }
            }
        }
        self.write_sectors(at, &old, &bytes).await?;
        Ok(freed)
    }

    async fn refcounts_and_flags(&mut self, what: Repair) -> std::io::Result<()> {
        let indices: Vec<u64> = self.scan.blocks.iter().filter(|(_, b)| b.good).map(|(i, _)| *i).collect();
        if what == Repair::All {
            self.flags(false).await?;
            self.storage.sync().await?;
            for index in &indices {
                self.change_block(*index, |_, stored, found| stored.max(found)).await?;
            }
            self.storage.sync().await?;
        }
        if self.scan.blind {
            self.scan
                .report
                .say(|| "refcounts are not lowered while something cannot be followed".to_owned());
            return Ok(());
        }
        let mut freed = Vec::new();
        for index in &indices {
            freed.extend(self.change_block(*index, |_, stored, found| stored.min(found)).await?);
        }
        self.storage.sync().await?;
        self.give_back(&freed).await;
        // With leaks alone the flags were right before, and are made right again.
        if what == Repair::All || self.scan.report.corruptions == 0 {
            self.flags(true).await?;
            self.storage.sync().await?;
        }
        Ok(())
    }

    /// The space of free clusters goes back to the file system, where it can. Only a saving.
    async fn give_back(&self, freed: &[u64]) {
        let (bits, clusters) = (self.scan.g.cluster_bits, self.scan.clusters);
        for run in freed.chunk_by(|a, b| a + 1 == *b) {
            if let (Some(first), true) = (run.first(), run.iter().all(|c| *c < clusters)) {
                let _ = self.storage.punch(first << bits, (run.len() as u64) << bits).await;
            }
        }
    }

    /// The COPIED flag that a reference to a cluster ought to have, given the references counted.
    fn flagged(&self, entry: u64, at: u64, set: bool) -> u64 {
        match (self.scan.references.get(self.scan.g.index(at)) == 1, set) {
            (true, true) => entry | COPIED,
            (false, false) => entry & !COPIED,
            _ => entry,
        }
    }

    /// Sets the COPIED flags that are missing, or clears those that must not be. Tables that lie where something else does are
    /// not written.
    async fn flags(&mut self, set: bool) -> std::io::Result<()> {
        let g = self.scan.g;
        let host = |entry: u64| entry & (MAX_HOST - 1) & !511;
        let l1_at = self.scan.header.l1_offset;
        let l1_bytes = self.scan.l1.len() as u64 * 8;
        let l1_alone = (0..g.clusters_for(l1_bytes)).all(|i| self.scan.alone(g.index(l1_at) + i));
        if l1_alone {
            let old = self.scan.l1.clone();
            let new: Vec<u64> = old
                .iter()
                .map(|entry| match host(*entry) {
                    0 if !set => entry & !COPIED,
                    0 => *entry,
                    at => self.flagged(*entry, at, set),
                })
                .collect();
            self.write_sectors(l1_at, &encode(&old).to_vec(), &encode(&new).to_vec()).await?;
            self.scan.l1 = new;
        }
        let tables: Vec<u64> =
            self.scan.tables.iter().filter(|(_, t)| t.active > 0).map(|(at, _)| *at).collect();
        for at in tables.into_iter().filter(|at| self.scan.alone(g.index(*at))) {
            let buffer = Buffer::zeroed(g.cluster() as usize);
            self.storage.read(at, &buffer.sg()).await?;
            let old = buffer.to_vec();
            let mut new = old.clone();
            for word in new.chunks_exact_mut(8) {
                let entry = be64(word, 0);
                let is = match read_entry(&g, entry).0 {
                    Mapping::Data { host, .. } | Mapping::ZeroAllocated { host, .. } => {
                        self.flagged(entry, host, set)
                    }
                    Mapping::Compressed { .. } if !set => entry & !COPIED,
                    _ => entry,
                };
                word.copy_from_slice(&is.to_be_bytes());
            }
            self.write_sectors(at, &old, &new).await?;
        }
        Ok(())
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
