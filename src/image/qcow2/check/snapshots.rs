//! Internal snapshots in a check: the table, each L1 table in it, and what those refer to.

use std::io;

use super::{Scan, walk::Owner};
use crate::{
    image::qcow2::{
        Storage,
        layout::MAX_L1_BYTES,
        snapshot::table::{Head, MAX_BYTES},
    },
    sys::mem::Buffer,
};

/// Extra data that every entry of a version 3 image has: the 64-bit size of the VM state, and the disk's size.
const EXTRA_LEN: u32 = 16;

/// QEMU's bound on the extra data of an entry.
const MAX_EXTRA: u32 = 1024;

impl Scan {
    /// The snapshot table and all L1 tables in it. What cannot be read leaves the check blind: clusters of which nobody knows
    /// must not be taken for leaks.
    pub(super) async fn snapshots<S: Storage>(&mut self, storage: &S) -> io::Result<()> {
        let g = self.g;
        let start = self.header.snapshot_offset;
        let mut bytes = 0;
        // Tables do not overlap, so all L1 tables together are no larger than the file; more than that is not read.
        let mut left = self.file_len.saturating_add(u64::from(self.header.l1_entries) * 8);
        for number in 0..self.header.snapshot_count {
            let at = start + bytes;
            if at + Head::BYTES as u64 > self.file_len || bytes > MAX_BYTES {
                self.report
                    .error(|| format!("snapshot {number}: its entry lies beyond the end of the table"));
                self.blind = true;
                break;
            }
            let head = Buffer::zeroed(Head::BYTES);
            storage.read(at, &head.sg()).await?;
            let head = Head::read(&head.to_vec());
            let entry = (Head::BYTES as u64 + head.rest()).next_multiple_of(8);
            if head.extra_len > MAX_EXTRA || at + entry > self.file_len.next_multiple_of(g.cluster()) {
                self.report.error(|| format!("snapshot {number}: its table entry is too long"));
                self.blind = true;
                break;
            }
            bytes += entry;
            if g.version >= 3 && head.extra_len < EXTRA_LEN {
                self.report.corrupt(1, || format!("snapshot {number}: its table entry is incomplete"));
            }
            let l1_bytes = u64::from(head.l1_entries) * 8;
            let why = match () {
                () if !g.aligned(head.l1_offset) => "is not the start of a cluster",
                () if l1_bytes > MAX_L1_BYTES => "is larger than 32 MiB",
                () if l1_bytes > left => "overlaps others",
                () => "",
            };
            if !why.is_empty() {
                let at = head.l1_offset;
                self.report.corrupt(1, || format!("snapshot {number}: its L1 table at {at:#x} {why}"));
                self.blind = true;
                continue;
            }
            left -= l1_bytes;
            if self.table(Owner::SnapshotL1, head.l1_offset, l1_bytes)? {
                let l1 = Scan::words(storage, head.l1_offset, l1_bytes).await?;
                self.l1_entries(&l1, false)?;
            }
        }
        self.blind |= !self.table(Owner::Snapshots, start, bytes)?;
        Ok(())
    }
}
