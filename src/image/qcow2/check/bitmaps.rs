//! Persistent bitmaps in a check (qcow2 specification, "Bitmaps"): the directory, each bitmap's table, and its clusters. They are
//! used only while the autoclear bit says that they are valid; otherwise nothing of them counts, and their clusters are leaks.

use std::io;

use super::{Scan, walk::Owner};
use crate::{
    image::qcow2::{
        HeaderInfo, Storage,
        bitmaps::{BitmapEntry, MAX_DIRECTORY},
        layout::offset,
    },
    sys::mem::Buffer,
};

/// QEMU's bounds.
const MAX_BITMAPS: u32 = 65535;
const MAX_TABLE: u64 = 64 << 20;

/// Bytes that an image's bitmaps take in another with those clusters, if all their bits were set: their clusters, their tables, the
/// directory. Those that were in use when the image was last written to are void, and not counted.
///
/// # Errors
/// Those of reading.
pub async fn bitmaps_size<S: Storage>(storage: &S, header: &HeaderInfo, cluster: u64) -> io::Result<u64> {
    let Some(found) = header.valid_bitmaps().filter(|d| d.bytes <= MAX_DIRECTORY) else { return Ok(0) };
    let buffer = Buffer::zeroed(found.bytes as usize);
    storage.read(found.at, &buffer.sg()).await?;
    let bytes = buffer.to_vec();
    let (mut at, mut directory, mut size) = (0, 0, 0);
    for _ in 0..found.count {
        let Some(map) = bytes.get(at..).and_then(BitmapEntry::read) else { break };
        at += map.len;
        if map.in_use || map.granularity_bits > 31 {
            continue;
        }
        let clusters = header.virtual_size.div_ceil(1 << map.granularity_bits).div_ceil(8).div_ceil(cluster);
        size += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (BitmapEntry::HEAD as u64 + map.name_len).next_multiple_of(8);
    }
    Ok(size + u64::next_multiple_of(directory, cluster))
}

impl Scan {
    pub(super) async fn bitmaps<S: Storage>(&mut self, storage: &S) -> io::Result<()> {
        let Some(found) = self.header.valid_bitmaps().filter(|found| found.count > 0) else { return Ok(()) };
        let sane = found.count <= MAX_BITMAPS && found.bytes <= MAX_DIRECTORY && self.g.aligned(found.at);
        if !sane || !self.table(Owner::Bitmaps, found.at, found.bytes)? {
            self.lost_bitmaps("their directory does not lie in the file");
            return Ok(());
        }
        let buffer = Buffer::zeroed(found.bytes as usize);
        storage.read(found.at, &buffer.sg()).await?;
        let bytes = buffer.to_vec();
        let mut at = 0;
        let mut left = self.file_len;
        for _ in 0..found.count {
            let Some(map) = bytes.get(at..).and_then(BitmapEntry::read) else {
                self.lost_bitmaps("their directory is too short");
                return Ok(());
            };
            at += map.len;
            let table_bytes = map.entries * 8;
            // Tables do not overlap, so together they are no larger than the file.
            let sane = self.g.aligned(map.table) && table_bytes <= MAX_TABLE && table_bytes <= left;
            if !sane || !self.table(Owner::Bitmaps, map.table, table_bytes)? {
                self.lost_bitmaps("the table of one does not lie in the file");
                return Ok(());
            }
            left -= table_bytes;
            for entry in Scan::words(storage, map.table, table_bytes).await? {
                self.bitmap_entry(entry)?;
            }
        }
        Ok(())
    }

    fn bitmap_entry(&mut self, entry: u64) -> io::Result<()> {
        let host = offset(entry);
        let reserved = entry & !(host | 1) != 0;
        if reserved || !self.g.aligned(host) || host != 0 && entry & 1 != 0 {
            self.report.corrupt(1, || format!("the bitmap table entry {entry:#x} makes no sense"));
            self.blind = true;
            return Ok(());
        }
        if host != 0 {
            self.refer(host, self.g.cluster(), 1, || format!("the bitmap table entry {entry:#x}"))?;
        }
        Ok(())
    }

    fn lost_bitmaps(&mut self, why: &str) {
        self.report.corrupt(1, || format!("bitmaps: {why}"));
        self.blind = true;
    }
}
