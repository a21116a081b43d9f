//! A disk that keeps nothing: `/dev/null`, of whatever size the LUN has. It reads as zeros, and every write is good at once.
//!
//! QEMU's `null-co` (with `read-zeroes`): what is measured on it is everything but the storage. Called by `image/open`, if whoever
//! opens says a size.

use std::{
    cell::Cell,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use crate::{
    sys::mem::Sg,
    units::ByteOffset,
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags},
};

/// The path that stands for it.
pub const PATH: &str = "/dev/null";

/// Whether that is the kernel's null device, under whatever name.
pub fn is_null(path: &Path) -> bool {
    // Documentation/admin-guide/devices.txt: character device 1:3.
    fs::metadata(path)
        .is_ok_and(|meta| meta.file_type().is_char_device() && meta.rdev() == rustix::fs::makedev(1, 3))
}

/// The disk.
pub struct Null {
    capacity: Cell<u64>,
    read_only: bool,
}

impl Null {
    /// One of that many bytes.
    pub fn new(capacity: u64, read_only: bool) -> Null {
        Null { capacity: Cell::new(capacity), read_only }
    }

    fn check(&self, op: IoOp, at: ByteOffset, len: u64) -> Result<()> {
        if at.checked_add(len).is_none_or(|end| end.0 > self.capacity.get()) {
            return Err(IoError::new(IoErrorKind::OutOfRange, op).path(PATH).at(at));
        }
        if self.read_only && matches!(op, IoOp::Write | IoOp::Discard) {
            return Err(IoError::new(IoErrorKind::ReadOnly, op).path(PATH).at(at));
        }
        Ok(())
    }
}

impl Volume for Null {
    fn limits(&self) -> Limits {
        Limits {
            capacity: self.capacity.get(),
            alignment: 1,
            read_only: self.read_only,
            discard_granularity: 4096,
            preferred_io: 0,
            atomic_write: 0,
            atomic_unit: 0,
            tells_free: false,
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        self.check(IoOp::Read, at, to.len() as u64)?;
        to.fill(0, to.len(), 0);
        Ok(())
    }

    async fn write(&self, at: ByteOffset, from: &Sg, _: WriteFlags) -> Result<()> {
        self.check(IoOp::Write, at, from.len() as u64)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.check(IoOp::Discard, at, len)
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, _: bool) -> Result<()> {
        self.check(IoOp::Write, at, len)
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        self.check(IoOp::Map, at, len)?;
        let hole = Extent { start: at, len, kind: ExtentKind::Hole, host_offset: None, depth: 0 };
        Ok(if len == 0 { Vec::new() } else { vec![hole] })
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        self.capacity.set(capacity);
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{mem::Buffer, run};

    #[test]
    fn it_reads_as_zeros_and_ends_where_it_was_told_to() {
        run(async |_| {
            let disk = Null::new(8192, false);
            let buffer = Buffer::zeroed(4096);
            buffer.sg().fill(0, 4096, 7);
            disk.write(ByteOffset(4096), &buffer.sg(), WriteFlags::default()).await.unwrap();
            disk.read(ByteOffset(4096), &buffer.sg()).await.unwrap();
            assert_eq!(buffer.to_vec(), [0; 4096]);
            let beyond = disk.read(ByteOffset(4097), &buffer.sg()).await.unwrap_err();
            assert_eq!(beyond.kind, IoErrorKind::OutOfRange);
            let read_only = Null::new(8192, true);
            assert_eq!(read_only.discard(ByteOffset(0), 1).await.unwrap_err().kind, IoErrorKind::ReadOnly);
        });
    }

    #[test]
    fn only_the_null_device_is_it() {
        assert!(is_null(Path::new(PATH)));
        assert!(!is_null(Path::new("/dev/zero")) && !is_null(Path::new("/etc/passwd")));
    }
}
