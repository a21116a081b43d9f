//! The snapshot table: entries of any length, each padded to 8 bytes, read with every bound checked and written back as they were.

use std::io;

use super::Snapshot;
use crate::{
    image::qcow2::{
        header::HeaderInfo,
        layout::{Geometry, MAX_L1_BYTES, be16, be32, be64},
        storage::Storage,
    },
    sys::mem::Buffer,
};

/// Bytes of an entry before its extra data, ID and name.
const HEAD: u64 = Head::BYTES as u64;
/// Bytes of extra data that we write: VM state size, disk size, icount.
const EXTRA: u32 = 24;
/// QEMU's bound on the whole table.
pub const MAX_BYTES: u64 = 64 << 20;

/// Bytes of the table of these snapshots.
pub fn bytes(all: &[Snapshot]) -> u64 {
    // The specification pads between entries; the last one ends where it ends, and so does QEMU's count.
    all.iter().map(|s| (s.raw.len() as u64).next_multiple_of(8)).sum()
}

/// The table of these snapshots.
pub fn encode(all: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes(all) as usize);
    for snapshot in all {
        out.extend_from_slice(&snapshot.raw);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// The head of an entry, as far as it says where what follows lies.
pub struct Head {
    /// The L1 table: offset.
    pub l1_offset: u64,
    /// The L1 table: entries.
    pub l1_entries: u32,
    /// Bytes of extra data.
    pub extra_len: u32,
    names_len: u64,
}

impl Head {
    /// Bytes of it.
    pub const BYTES: usize = 40;

    /// Reads it.
    pub fn read(bytes: &[u8]) -> Head {
        Head {
            l1_offset: be64(bytes, 0),
            l1_entries: be32(bytes, 8),
            extra_len: be32(bytes, 36),
            names_len: u64::from(be16(bytes, 12)) + u64::from(be16(bytes, 14)),
        }
    }

    /// Bytes of the entry that follow the head.
    pub fn rest(&self) -> u64 {
        u64::from(self.extra_len) + self.names_len
    }
}

/// A new entry, as QEMU writes it for version 3.
pub struct NewEntry<'a> {
    pub id: &'a str,
    pub name: &'a str,
    pub seconds: u32,
    pub nanoseconds: u32,
    pub disk_size: u64,
    pub l1_offset: u64,
    pub l1_entries: u32,
}

impl NewEntry<'_> {
    /// The snapshot. The ID and the name have fewer than 65536 bytes.
    pub fn build(&self) -> Snapshot {
        let mut raw = Vec::with_capacity(HEAD as usize + EXTRA as usize + self.id.len() + self.name.len());
        raw.extend_from_slice(&self.l1_offset.to_be_bytes());
        raw.extend_from_slice(&self.l1_entries.to_be_bytes());
        raw.extend_from_slice(&(self.id.len() as u16).to_be_bytes());
        raw.extend_from_slice(&(self.name.len() as u16).to_be_bytes());
        raw.extend_from_slice(&self.seconds.to_be_bytes());
        raw.extend_from_slice(&self.nanoseconds.to_be_bytes());
        raw.extend_from_slice(&[0; 12]); // VM clock, VM state size in 32 bits
        raw.extend_from_slice(&EXTRA.to_be_bytes());
        raw.extend_from_slice(&[0; 8]); // VM state size
        raw.extend_from_slice(&self.disk_size.to_be_bytes());
        raw.extend_from_slice(&u64::MAX.to_be_bytes()); // icount: none
        raw.extend_from_slice(self.id.as_bytes());
        raw.extend_from_slice(self.name.as_bytes());
        parse(raw)
    }
}

/// What an entry says. It has its head, and all the bytes that the head promises.
fn parse(raw: Vec<u8>) -> Snapshot {
    let extra_len = be32(&raw, 36) as usize;
    let extra = &raw[HEAD as usize..][..extra_len];
    let extra_word = |at: usize| (extra_len >= at + 8).then(|| be64(extra, at));
    let names = &raw[HEAD as usize + extra_len..];
    let (id, name) = names.split_at(be16(&raw, 12).into());
    Snapshot {
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        seconds: be32(&raw, 16),
        nanoseconds: be32(&raw, 20),
        vm_clock: be64(&raw, 24),
        vm_state_size: extra_word(0).unwrap_or_else(|| be32(&raw, 32).into()),
        disk_size: extra_word(8),
        icount: extra_word(16).filter(|n| *n != u64::MAX),
        l1_offset: be64(&raw, 0),
        l1_entries: be32(&raw, 8),
        raw,
    }
}

/// Reads the snapshot table entry by entry; the inner error says what is wrong with it.
pub async fn read<S: Storage>(
    storage: &S,
    header: &HeaderInfo,
    file_len: u64,
) -> io::Result<Result<Vec<Snapshot>, String>> {
    let g = header.geometry();
    let mut all = Vec::new();
    let mut at = header.snapshot_offset;
    for number in 0..header.snapshot_count {
        if at + HEAD > file_len {
            return Ok(Err(format!("entry {number} lies beyond the end of the file")));
        }
        let head = Buffer::zeroed(HEAD as usize);
        storage.read(at, &head.sg()).await?;
        let head = Head::read(&head.to_vec());
        let rest = head.rest();
        let padded = (HEAD + rest).next_multiple_of(8);
        if at - header.snapshot_offset + padded > MAX_BYTES
            || at + padded > file_len.next_multiple_of(g.cluster())
        {
            return Ok(Err(format!("entry {number} is too long")));
        }
        if let Err(why) = check_l1(&g, head.l1_offset, head.l1_entries, file_len) {
            return Ok(Err(format!("the L1 table of entry {number} {why}")));
        }
        let raw = Buffer::zeroed((HEAD + rest) as usize);
        storage.read(at, &raw.sg()).await?;
        all.push(parse(raw.to_vec()));
        at += padded;
    }
    Ok(Ok(all))
}

fn check_l1(g: &Geometry, at: u64, entries: u32, file_len: u64) -> Result<(), &'static str> {
    let bytes = u64::from(entries) * 8;
    let end = at.checked_add(bytes);
    if bytes > MAX_L1_BYTES || !g.aligned(at) || end.is_none_or(|end| end > file_len) {
        return Err("does not lie in the file");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written_and_unknown_extra_data_are_kept() {
        let new = NewEntry {
            id: "7",
            name: "before the upgrade",
            seconds: 1,
            nanoseconds: 2,
            disk_size: 3 << 30,
            l1_offset: 0x50000,
            l1_entries: 6,
        };
        let one = new.build();
        assert_eq!((one.id.as_str(), one.disk_size, one.icount), ("7", Some(3 << 30), None));
        assert_eq!((one.l1_offset, one.l1_entries, one.vm_state_size), (0x50000, 6, 0));
        // Another 8 bytes of extra data, of which nobody knows what they are.
        let mut raw = one.raw.clone();
        raw[36..40].copy_from_slice(&32u32.to_be_bytes());
        raw.splice(64..64, [9; 8]);
        let other = parse(raw.clone());
        assert_eq!((other.name.as_str(), &other.raw), ("before the upgrade", &raw));
        let table = encode(&[other.clone(), one.clone()]);
        assert_eq!(table.len() as u64, bytes(&[other, one]));
        assert_eq!(table[..raw.len()], raw);
        // Version 2 without any.
        raw.drain(40..72);
        raw[36..40].copy_from_slice(&[0; 4]);
        let old = parse(raw);
        assert_eq!((old.disk_size, old.id.as_str()), (None, "7"));
    }
}
