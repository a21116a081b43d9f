//! Persistent dirty bitmaps (qcow2 specification, "Bitmaps extension"): before the first write each is marked in use, which says to whoever
//! opens the image after a crash that it was not brought up to date; their clusters stay theirs. [`super::kept_bitmaps`] reads them for
//! whoever marks what changes, and writes them at the end.

use super::{
    Qcow2, Storage,
    header::{BITMAPS, HeaderInfo},
    layout::{be16, be32, be64},
};
use crate::{
    sys::mem::Buffer,
    volume::{IoOp, Result},
};

/// The largest directory that is looked at, QEMU's bound.
pub(super) const MAX_DIRECTORY: u64 = 64 << 20;

/// Where the directory of bitmaps lies, by its header extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// Bitmaps in it.
    pub count: u32,
    /// Bytes of it.
    pub bytes: u64,
    /// Its offset in the file.
    pub at: u64,
}

/// A bitmap, as its directory entry has it.
pub(super) struct BitmapEntry {
    /// Its table: offset.
    pub table: u64,
    /// Its table: entries.
    pub entries: u64,
    /// Flags; bit 0 is "in use".
    pub in_use: bool,
    /// log2 of the bytes that a bit stands for.
    pub granularity_bits: u8,
    /// Bytes of the name.
    pub name_len: u64,
    /// Bytes of the whole entry.
    pub len: usize,
}

impl BitmapEntry {
    /// Bytes before its extra data and name.
    pub const HEAD: usize = 24;
    /// Offset of the flags, 32 bits.
    const FLAGS: usize = 12;

    /// Reads it; `None` if there is less than its head.
    pub fn read(entry: &[u8]) -> Option<BitmapEntry> {
        if entry.len() < BitmapEntry::HEAD {
            return None;
        }
        let (name, extra) = (usize::from(be16(entry, 18)), be32(entry, 20) as usize);
        Some(BitmapEntry {
            table: be64(entry, 0),
            entries: be32(entry, 8).into(),
            in_use: be32(entry, BitmapEntry::FLAGS) & 1 != 0,
            granularity_bits: entry[17],
            name_len: name as u64,
            len: (BitmapEntry::HEAD + name + extra).next_multiple_of(8),
        })
    }
}

impl HeaderInfo {
    /// Where the bitmaps are listed, if what the list says is true.
    pub(super) fn valid_bitmaps(&self) -> Option<BitmapDirectory> {
        self.bitmaps.filter(|_| self.autoclear & BITMAPS != 0)
    }
}

/// The offsets of the flags in a directory, or `None` if it makes no sense.
fn flags_in(directory: &[u8], count: u32) -> Option<Vec<usize>> {
    let mut at = 0;
    let mut found = Vec::new();
    for _ in 0..count {
        let entry = directory.get(at..).and_then(BitmapEntry::read)?;
        found.push(at + BitmapEntry::FLAGS);
        at += entry.len;
    }
    (at == directory.len()).then_some(found)
}

impl<S: Storage> Qcow2<S> {
    /// The directory, as the header was at the opening.
    pub(super) fn bitmap_directory(&self) -> Option<BitmapDirectory> {
        self.sane_directory(&self.header)
    }

    /// The directory that a header names, if it says that it is valid, and it lies in the file.
    pub(super) fn sane_directory(&self, header: &HeaderInfo) -> Option<BitmapDirectory> {
        let directory = header.valid_bitmaps()?;
        let end = directory.at.checked_add(directory.bytes)?;
        let sane = self.geometry.aligned(directory.at)
            && directory.at > 0
            && directory.bytes <= MAX_DIRECTORY
            && end <= self.file_len.get();
        sane.then_some(directory)
    }

    /// Marks every bitmap as in use; gives false if there are none, or what there is makes no sense. The caller syncs.
    pub(super) async fn leave_bitmaps(&self, op: IoOp) -> Result<bool> {
        let Some(directory) = self.bitmap_directory() else { return Ok(false) };
        let bytes = Buffer::zeroed(directory.bytes as usize);
        self.storage.read(directory.at, &bytes.sg()).await.map_err(|e| self.io_error(op, e))?;
        let bytes = bytes.to_vec();
        let Some(places) = flags_in(&bytes, directory.count) else { return Ok(false) };
        for place in places {
            let flags = be32(&bytes, place) | 1;
            let flags = Buffer::from_slice(&flags.to_be_bytes()).sg();
            let at = directory.at + place as u64;
            self.storage.write(at, &flags).await.map_err(|e| self.io_error(op, e))?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_does_not_end_where_it_should_has_no_flags() {
        let mut directory = vec![0; 32];
        directory[19] = 5;
        assert_eq!(flags_in(&directory, 1), Some(vec![12]));
        assert_eq!(flags_in(&directory, 2), None);
        assert_eq!(flags_in(&directory, 0), None);
        directory[20] = 0xff;
        assert_eq!(flags_in(&directory, 1), None);
        assert_eq!(flags_in(&directory[..20], 1), None);
    }
}
