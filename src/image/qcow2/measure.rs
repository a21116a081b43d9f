//! Sizes of files: how large a new image will be, and whether an old one has places for more than it holds.

use std::path::Path;

use super::{CreateOptions, Storage, check::Scan, open::read_header};
use crate::volume::{IoError, IoOp, Result};

/// Bytes of the file of an image with these options whose every cluster is allocated: data, L2 tables, an L1 table, refcounts
/// and the header. An upper bound; `qemu-img measure` calls it "fully allocated".
pub fn full_size(options: &CreateOptions) -> u64 {
    let g = options.geometry();
    let entries = g.cluster() / 8;
    let data = g.clusters_for(options.size);
    let l2 = data.div_ceil(1 << g.l2_bits());
    let l1 = l2.div_ceil(entries);
    let counted = data + l2 + l1 + 1;
    let (mut blocks, mut table) = (0, 0);
    loop {
        let need_blocks = (counted + table + blocks).div_ceil(1 << g.block_bits());
        let need_table = need_blocks.div_ceil(entries);
        if (need_blocks, need_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (need_blocks, need_table);
    }
    (counted + blocks + table) << g.cluster_bits
}

/// Whether the image looks as if its clusters had been given places before they were written to (preallocation=metadata): the
/// refcounts count a tenth more clusters than the file has space for. `space` is that space in bytes (`st_blocks`). Then
/// a range of data may be a hole of the file. QEMU's `qemu-img map` goes by the same rule.
///
/// # Errors
/// As [`super::check_on`].
pub async fn looks_preallocated<S: Storage>(storage: &S, path: &Path, space: u64) -> Result<bool> {
    let failed = |e| IoError::from_io(IoOp::Map, e).path(path);
    let file_len = storage.size().map_err(failed)?;
    let header = read_header(storage, file_len, path).await?;
    let mut scan = Scan::new(storage, header, file_len).await.map_err(failed)?;
    let real = scan.g.clusters_for(space);
    let threshold = (real.saturating_mul(10) / 9).max(real + 2);
    Ok(scan.counted(storage, threshold).await.map_err(failed)? >= threshold)
}
