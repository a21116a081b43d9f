//! Mending what [`super::check`] finds, as `qemu-img check -r leaks|all` does: refcounts put right, refcount blocks made anew
//! where they are missing or lie where something else does, COPIED flags set and cleared, the marks dirty and corrupt taken away when
//! nothing is left to mend.
//!
//! Order. Each step is durable before the next begins, and each leaves the image no worse than it was:
//! 1. new refcount blocks (and a new table, if it has to grow or to move), beyond everything that is in use: first the content,
//!    with the references counted, then the entries that link it, in whole sectors;
//! 2. what lies where a table does gets a cluster of its own: reserved as in step 1, then the content copied, then the entry changed;
//! 3. COPIED flags are cleared where a cluster has not exactly one reference: from here on such a cluster is copied, not written to;
//! 4. refcounts that are too low are raised: too high is a leak at worst;
//! 5. refcounts that are too high are lowered to the references counted, and the space of what has none goes back;
//! 6. COPIED flags are set where a cluster has exactly one reference, and its refcount says so;
//! 7. the image is checked again, and the marks are cleared if it is clean.
//!
//! A power cut between or within the steps leaves an image that the same repair mends: no refcount was lowered below the
//! references, no flag set that permits writing to what is shared, nothing written over that anything refers to.
//!
//! What is never done: an entry of an L1 or L2 table keeps what it refers to, or gets a copy of it, so the guest reads what it read
//! before. Entries that make no sense, data beyond the end of the file, compressed clusters and snapshots' tables that lie where something else
//! does, and a damaged snapshot table are reported and left. While something that refers to clusters cannot be followed, no refcount is
//! lowered: what looks leaked may be what could not be seen.

mod structure;
mod unshare;

use std::path::Path;

use super::{
    Storage,
    check::{CheckReport, Progress, Scan, scan, walk::read_entry},
    header::{CORRUPT, DIRTY, field},
    layout::{COPIED, Place, offset},
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
    if what == Repair::All && first.corruptions > 0 {
        if mending.structure(0).await.map_err(failed)?.is_some() {
            mending.scan = scan(storage, path, progress).await?;
        }
        // Entries in tables of their own, then tables that had to be copied, then what is in those.
        for _ in 0..3 {
            if !mending.unshare().await.map_err(failed)? {
                break;
            }
            mending.scan = scan(storage, path, progress).await?;
        }
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

/// Before an image that is marked dirty is written to: its refcounts were postponed by whoever wrote to it last (lazy refcounts),
/// and that ended without a close. They are put right, as QEMU does.
///
/// # Errors
/// As [`repair_on`]; `Corrupt` if the mark could not be cleared.
pub(super) async fn mend_dirty<S: Storage>(storage: &S, path: &Path) -> Result<()> {
    let name = path.display();
    tracing::warn!(path = %name, "the image was not closed and its refcounts may be wrong: repairing it");
    let report = repair_on(storage, path, Repair::All, &mut |_, _| ()).await?;
    if report.marked {
        let detail = format!(
            "it is marked dirty, and {} errors are left after a repair; run `tcmu-dif image check {name}`",
            report.corruptions + report.check_errors
        );
        return Err(IoError::corrupt(IoOp::Open, detail).path(path));
    }
    let (errors, leaks) = (report.corruptions_fixed, report.leaks_fixed);
    tracing::warn!(path = %name, errors, leaks, "the image has been repaired");
    Ok(())
}

struct Mending<'a, S: Storage> {
    storage: &'a S,
    scan: Scan,
}

impl<S: Storage> Mending<'_, S> {
    /// The refcount that a cluster ought to have: its references, or as many as a refcount can say.
    fn references(&self, cluster: u64) -> u64 {
        self.scan.references.get(cluster).min(self.scan.g.max_refcount())
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
            let is = new(first + i, stored, self.references(first + i));
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

    /// Whether the L1 table lies where nothing else does.
    fn l1_alone(&self) -> bool {
        let s = &self.scan;
        let clusters = s.g.clusters_for(s.l1.len() as u64 * 8);
        (0..clusters).all(|i| s.alone(s.g.index(s.header.l1_offset) + i))
    }

    /// Sets the COPIED flags that are missing, or clears those that must not be. Tables that lie where something else does are
    /// not written.
    async fn flags(&mut self, set: bool) -> std::io::Result<()> {
        let g = self.scan.g;
        let l1_at = self.scan.header.l1_offset;
        if self.l1_alone() {
            let old = self.scan.l1.clone();
            let new: Vec<u64> = old
                .iter()
                .map(|entry| match offset(*entry) {
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
            for bytes in new.chunks_exact_mut(g.entry_bytes() as usize) {
                let entry = g.entry(bytes, 0);
                let is = match read_entry(&g, entry).0 {
                    Place::Cluster { .. } if g.data_file => entry.word,
                    Place::Cluster { host, .. } => self.flagged(entry.word, host, set),
                    Place::Compressed { .. } if !set => entry.word & !COPIED,
                    _ => entry.word,
                };
                bytes[..8].copy_from_slice(&is.to_be_bytes());
            }
            self.write_sectors(at, &old, &new).await?;
        }
        Ok(())
    }
}
