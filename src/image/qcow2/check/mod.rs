//! The consistency check of an image that nobody uses: every reference to a cluster of the file is counted, and compared with
//! the refcounts that the image keeps. The verdict and the numbers are those of `qemu-img check`.
//!
//! What is looked at: header, L1, L2s, refcount table and blocks, the snapshot table with its L1s and L2s, compressed
//! clusters, bitmaps (where their autoclear bit says that they are valid), the COPIED flags of what the guest uses now, entries
//! that make no sense or point past the end, and tables that lie where something else does.
//!
//! Memory: two bytes and one bit for a cluster that is referred to, one entry of a map for a table, and never more than
//! [`MOST_MEMORY`] for the counts (32 TiB of 64 KiB clusters); then the check says that it cannot be done. Time: an L2 table is
//! read once, however many snapshots share it; no loop of pointers is followed.
//!
//! Called by `tcmu-dif image check`; [`super::repair`] mends what this finds.

mod bitmaps;
pub(super) mod counts;
mod snapshots;
pub(super) mod stored;
pub(super) mod walk;

use std::path::Path;

use super::{Storage, open::read_header};
use crate::volume::{IoError, IoOp, Result};

pub use bitmaps::bitmaps_size;
pub(super) use walk::Scan;

/// Bytes of memory for the counts.
pub const MOST_MEMORY: u64 = 1 << 30;
/// Findings that are kept in words; all are counted.
pub const MOST_FINDINGS: usize = 1000;

/// Whoever wants to know how far it has come: bytes of metadata read, and how many there are.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// What a check found. Numbers count as `qemu-img check` counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// Things that could not be looked at.
    pub check_errors: u64,
    /// What is wrong and endangers data.
    pub corruptions: u64,
    /// Refcounts that are too high: space is lost, nothing else.
    pub leaks: u64,
    /// What a repair has mended of the corruptions.
    pub corruptions_fixed: u64,
    /// And of the leaks.
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Of these, those that have a cluster of the file.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before, or are compressed.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Bytes of the file up to the end of the last cluster in use.
    pub image_end_offset: u64,
    /// The image is marked dirty or corrupt.
    pub marked: bool,
    /// The findings in words, at most [`MOST_FINDINGS`] of them.
    pub findings: Vec<String>,
    /// Findings that were not kept.
    pub more_findings: u64,
}

impl CheckReport {
    /// Nothing was found.
    pub fn is_clean(&self) -> bool {
        self.check_errors + self.corruptions + self.leaks == 0
    }

    pub(super) fn say(&mut self, words: impl FnOnce() -> String) {
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(words());
        } else {
            self.more_findings += 1;
        }
    }

    pub(super) fn corrupt(&mut self, count: u64, words: impl FnOnce() -> String) {
        self.corruptions = self.corruptions.saturating_add(count);
        self.say(words);
    }

    pub(super) fn error(&mut self, words: impl FnOnce() -> String) {
        self.check_errors += 1;
        self.say(words);
    }
}

/// Checks the image; nothing is written. The caller sees to it that nobody else writes either.
///
/// # Errors
/// If the header is refused (as [`super::Qcow2::open`] does), if reading fails, or if the counts need more than
/// [`MOST_MEMORY`].
pub async fn check_on<S: Storage>(storage: &S, path: &Path, progress: Progress<'_>) -> Result<CheckReport> {
    Ok(scan(storage, path, progress).await?.report)
}

/// [`check_on`], with all that a repair needs to know.
pub(super) async fn scan<S: Storage>(storage: &S, path: &Path, progress: Progress<'_>) -> Result<Scan> {
    let failed = |e| IoError::from_io(IoOp::Read, e).path(path);
    let file_len = storage.size().map_err(failed)?;
    let header = read_header(storage, file_len, path).await?;
    let mut scan = Scan::new(storage, header, file_len).await.map_err(failed)?;
    let done = async {
        scan.fixed_tables()?;
        scan.snapshots(storage).await?;
        scan.bitmaps(storage).await?;
        scan.refcount_structure()?;
        scan.load_ones(storage).await?;
        scan.guest_tables(storage, progress).await?;
        scan.compare(storage).await
    };
    done.await.map_err(failed)?;
    Ok(scan)
}
