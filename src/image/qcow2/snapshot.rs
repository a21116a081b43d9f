//! Internal snapshots, as far as a writer has to know them: their tables must not be overwritten. Their clusters are
//! protected by their refcounts.

use std::io;

use super::{
    header::{HeaderInfo, SnapshotHead},
    layout::MAX_L1_BYTES,
    storage::Storage,
};
use crate::sys::mem::Buffer;

/// QEMU's bound on the whole table.
const MAX_TABLE: u64 = 64 << 20;

/// An internal snapshot, for `image info`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID, a number in words.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken, seconds since 1970.
    pub seconds: u32,
    /// Bytes of VM state.
    pub vm_state_size: u32,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
}

pub(super) struct SnapshotTable {
    pub all: Vec<Snapshot>,
    pub table_bytes: u64,
}

/// Reads the snapshot table entry by entry; the inner error says what is wrong with it.
pub(super) async fn read_table<S: Storage>(
    storage: &S,
    header: &HeaderInfo,
    file_len: u64,
) -> io::Result<Result<SnapshotTable, String>> {
    let g = header.geometry();
    let mut table = SnapshotTable { all: Vec::new(), table_bytes: 0 };
    for number in 0..header.snapshot_count {
        let at = header.snapshot_offset + table.table_bytes;
        if at + SnapshotHead::BYTES as u64 > file_len {
            return Ok(Err(format!("entry {number} lies beyond the end of the file")));
        }
        let head = Buffer::zeroed(SnapshotHead::BYTES);
        storage.read(at, &head.sg()).await?;
        let head = SnapshotHead::read(&head.to_vec());
        let bytes = (SnapshotHead::BYTES as u64 + head.rest()).next_multiple_of(8);
        table.table_bytes += bytes;
        if table.table_bytes > MAX_TABLE || at + bytes > file_len.next_multiple_of(g.cluster()) {
            return Ok(Err(format!("entry {number} is too long")));
        }
        let l1_bytes = u64::from(head.l1_entries) * 8;
        let l1_end = head.l1_offset.checked_add(l1_bytes);
        if l1_bytes > MAX_L1_BYTES || !g.aligned(head.l1_offset) || l1_end.is_none_or(|end| end > file_len) {
            return Ok(Err(format!("the L1 table of entry {number} does not lie in the file")));
        }
        let names = Buffer::zeroed(usize::from(head.id_len) + usize::from(head.name_len));
        storage.read(at + SnapshotHead::BYTES as u64 + u64::from(head.extra_len), &names.sg()).await?;
        let names = names.to_vec();
        let (id, name) = names.split_at(head.id_len.into());
        table.all.push(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            seconds: head.seconds,
            vm_state_size: head.vm_state_size,
            l1_offset: head.l1_offset,
            l1_entries: head.l1_entries,
        });
    }
    Ok(Ok(table))
}
