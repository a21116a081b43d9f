//! What a qcow2 image is stored on. The driver does all its I/O through [`Storage`], so that tests can put a disk beneath it
//! that fails a chosen step, or forgets what was not synced.

use std::{
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileTypeExt,
    rc::Rc,
};

use crate::{
    image::{direct::Ways, power::atomic_unit, space::free_bytes},
    sys::{
        io::{Fallocate, Io},
        mem::{Buffer, Sg},
    },
};

/// A file as the driver needs it. Operations may be in flight side by side; those that overlap are ordered by the driver.
#[allow(async_fn_in_trait)] // One thread owns a volume; its futures need not be Send.
pub trait Storage {
    /// Fills `to`; what lies beyond the end reads as zeros.
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()>;
    /// Writes all of `from`; the file grows as needed.
    async fn write(&self, at: u64, from: &Sg) -> io::Result<()>;
    /// As [`Storage::read`], of clusters that hold the guest's data and share no page with anything else.
    async fn read_data(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.read(at, to).await
    }
    /// As [`Storage::write`], to such clusters.
    async fn write_data(&self, at: u64, from: &Sg) -> io::Result<()> {
        self.write(at, from).await
    }
    /// Everything that has been written before the call is on stable storage after it, the length included.
    async fn sync(&self) -> io::Result<()>;
    /// Frees the range, which reads as zeros; the length stays.
    async fn punch(&self, at: u64, len: u64) -> io::Result<()>;
    /// Makes the range zeros and keeps space for it; the length stays.
    async fn zero(&self, at: u64, len: u64) -> io::Result<()>;
    /// Bytes in the file.
    fn size(&self) -> io::Result<u64>;
    /// Sets the length; what is new reads as zeros.
    async fn set_size(&self, len: u64) -> io::Result<()>;
    /// Whether the length is given by the device and cannot be set.
    fn is_fixed(&self) -> bool;
    /// Bytes that it may still grow by, if that is known.
    async fn free_bytes(&self) -> Option<u64> {
        None
    }
    /// Bytes of an aligned piece that power loss leaves old or new as a whole ([`crate::volume::Limits::atomic_write`]).
    fn atomic_write(&self) -> u32 {
        0
    }
}

/// A regular file or a block device, through a thread's I/O.
pub struct FileStorage {
    io: Io,
    ways: Ways,
    device: bool,
    atomic_write: u32,
}

/// Zeros are written in pieces of this size where the file system cannot make them.
const ZEROS: usize = 1 << 20;

impl FileStorage {
    /// The storage in that file.
    ///
    /// # Errors
    /// What `fstat` says.
    pub fn new(io: &Io, ways: impl Into<Ways>) -> io::Result<FileStorage> {
        let ways = ways.into();
        let device = ways.file().metadata()?.file_type().is_block_device();
        let atomic_write = atomic_unit(ways.file());
        Ok(FileStorage { io: io.clone(), ways, device, atomic_write })
    }

    async fn write_zeros(&self, at: u64, len: u64) -> io::Result<()> {
        let zeros = Buffer::zeroed(ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))).sg();
        let mut done = 0;
        while done < len {
            let n = (zeros.len() as u64).min(len - done);
            self.io.write(self.ways.file(), at + done, &zeros.slice(0, n as usize), false).await?;
            done += n;
        }
        Ok(())
    }

    async fn fallocate_or_write(&self, what: Fallocate, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match self.io.fallocate(self.ways.file(), what, at, len).await {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)) => {
                let end = self.size()?.min(at.saturating_add(len));
                if end > at { self.write_zeros(at, end - at).await } else { Ok(()) }
            }
            result => result,
        }
    }
}

impl Storage for FileStorage {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.io.read_or_zero(self.ways.file(), at, to).await
    }

    async fn write(&self, at: u64, from: &Sg) -> io::Result<()> {
        self.io.write(self.ways.file(), at, from, false).await
    }

    async fn read_data(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.ways.read_or_zero(&self.io, at, to).await
    }

    async fn write_data(&self, at: u64, from: &Sg) -> io::Result<()> {
        self.ways.write(&self.io, at, from, false).await
    }

    async fn sync(&self) -> io::Result<()> {
        self.io.fdatasync(self.ways.file()).await
    }

    async fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate_or_write(Fallocate::PunchHole, at, len).await
    }

    async fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.fallocate_or_write(Fallocate::ZeroRange, at, len).await
    }

    fn size(&self) -> io::Result<u64> {
        if self.device {
            return (&**self.ways.file()).seek(SeekFrom::End(0));
        }
        Ok(self.ways.file().metadata()?.len())
    }

    async fn set_size(&self, len: u64) -> io::Result<()> {
        if !self.device {
            return self.ways.file().set_len(len);
        }
        if len > self.size()? { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
    }

    fn is_fixed(&self) -> bool {
        self.device
    }

    async fn free_bytes(&self) -> Option<u64> {
        if self.device { None } else { free_bytes(&self.io, self.ways.file()).await }
    }

    fn atomic_write(&self) -> u32 {
        self.atomic_write
    }
}

impl<S: Storage> Storage for Rc<S> {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        (**self).read(at, to).await
    }

    async fn write(&self, at: u64, from: &Sg) -> io::Result<()> {
        (**self).write(at, from).await
    }

    async fn read_data(&self, at: u64, to: &Sg) -> io::Result<()> {
        (**self).read_data(at, to).await
    }

    async fn write_data(&self, at: u64, from: &Sg) -> io::Result<()> {
        (**self).write_data(at, from).await
    }

    async fn sync(&self) -> io::Result<()> {
        (**self).sync().await
    }

    async fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        (**self).punch(at, len).await
    }

    async fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        (**self).zero(at, len).await
    }

    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }

    async fn set_size(&self, len: u64) -> io::Result<()> {
        (**self).set_size(len).await
    }

    fn is_fixed(&self) -> bool {
        (**self).is_fixed()
    }

    async fn free_bytes(&self) -> Option<u64> {
        (**self).free_bytes().await
    }

    fn atomic_write(&self) -> u32 {
        (**self).atomic_write()
    }
}
