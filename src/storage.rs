//! A file as the layers above its bytes see it: positioned reads and writes, barriers, holes and a length.
//!
//! The stores that promise something about crashes (the protection sidecar, qcow2's metadata) are written against the
//! trait [`Storage`]. On a real host it is [`FileStorage`]; in tests it is `sim::SimDisk`, which keeps what was not
//! synced apart and forgets part of it when the power is cut.

pub mod cache;
#[cfg(test)]
pub mod sim;

use std::{fs::File, io, ops::Range, rc::Rc};

use rustix::fs::{SeekFrom, seek};

use crate::sys::{
    io::{Fallocate, Io},
    mem::Sg,
};

/// A file of bytes that one thread works on.
///
/// What a finished write left is what later reads give, and it is with the kernel: `kill -9` does not lose it. It
/// survives power loss after a finished [`Storage::sync`] that began after the write had ended, or at once if it was
/// written with `dsync`. Until then each sector of 512 bytes may come back as it was or as any write since has left it,
/// in no order. A `sync` that failed says nothing about later ones: the kernel forgets the error with the pages, so the
/// caller must not take a later success for an answer.
#[allow(clippy::len_without_is_empty)] // A length is asked of the system, and nobody wants to know just that.
#[allow(async_fn_in_trait)] // One thread owns a storage; its futures need not be Send.
pub trait Storage {
    /// Fills `to` from the bytes at `at`; what lies beyond the end reads as zeros.
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()>;

    /// Writes all of `from`, and grows the file as needed; with `dsync` it is on stable storage at the end, with the
    /// metadata needed to read it.
    async fn write(&self, at: u64, from: &Sg, dsync: bool) -> io::Result<()>;

    /// `fdatasync`: all finished writes, and the length, to stable storage.
    async fn sync(&self) -> io::Result<()>;

    /// Allocates zeros ([`Fallocate::Allocate`], which may grow the file), frees a range or zeroes it (which keep the
    /// length).
    ///
    /// # Errors
    /// EOPNOTSUPP where the file system cannot; ENOSPC.
    async fn fallocate(&self, what: Fallocate, at: u64, len: u64) -> io::Result<()>;

    /// The length in bytes.
    async fn len(&self) -> io::Result<u64>;

    /// Cuts the file off, or lets it grow by a hole.
    async fn set_len(&self, len: u64) -> io::Result<()>;

    /// The first run at or after `at` that may hold something else than zeros, or `None` if only a hole follows. A
    /// storage that cannot tell gives all that is left.
    async fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>>;
}

/// A regular file or block device through the thread's [`Io`].
#[derive(Clone)]
pub struct FileStorage {
    io: Io,
    file: Rc<File>,
}

impl FileStorage {
    /// The file, which is open for reading, and for writing if it is to be written.
    pub fn new(io: &Io, file: Rc<File>) -> FileStorage {
        FileStorage { io: io.clone(), file }
    }

    /// The open file.
    pub fn file(&self) -> &Rc<File> {
        &self.file
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(File) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let file = self.file.try_clone()?;
        self.io.blocking(move || call(file)).await?
    }
}

impl Storage for FileStorage {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.io.read_or_zero(&self.file, at, to).await
    }

    async fn write(&self, at: u64, from: &Sg, dsync: bool) -> io::Result<()> {
        self.io.write(&self.file, at, from, dsync).await
    }

    async fn sync(&self) -> io::Result<()> {
        self.io.fdatasync(&self.file).await
    }

    async fn fallocate(&self, what: Fallocate, at: u64, len: u64) -> io::Result<()> {
        self.io.fallocate(&self.file, what, at, len).await
    }

    async fn len(&self) -> io::Result<u64> {
        // A block device has no length in its metadata, but an end. All I/O is positioned, so the offset is nobody's.
        self.call(|file| Ok(seek(&file, SeekFrom::End(0))?)).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(move |file| file.set_len(len)).await
    }

    async fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        self.call(move |file| {
            let start = match seek(&file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => return Ok(None),
                // A block device knows no holes.
                Err(rustix::io::Errno::INVAL) => at,
                Err(e) => return Err(e.into()),
            };
            let end = match seek(&file, SeekFrom::Hole(start)) {
                Ok(end) => end,
                Err(rustix::io::Errno::INVAL) => seek(&file, SeekFrom::End(0))?,
                Err(rustix::io::Errno::NXIO) => return Ok(None),
                Err(e) => return Err(e.into()),
            };
            Ok((start < end).then_some(start..end))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, mem::Buffer};

    #[test]
    fn a_file_reads_as_zeros_beyond_its_end_and_tells_its_holes() {
        sys::run(|io| async move {
            let s = FileStorage::new(&io, Rc::new(tempfile::tempfile().unwrap()));
            let one = Buffer::from_slice(&[1; 4096]);
            s.write(1 << 20, &one.sg(), false).await.unwrap();
            s.set_len(4 << 20).await.unwrap();
            assert_eq!(s.len().await.unwrap(), 4 << 20);
            let buffer = Buffer::from_slice(&[7; 8192]);
            s.read((1 << 20) - 4096, &buffer.sg()).await.unwrap();
            assert!(buffer.sg().slice(0, 4096).is_zero());
            assert_eq!(buffer.sg().slice(4096, 4096).to_vec(), [1; 4096]);
            s.read((4 << 20) - 4096, &buffer.sg()).await.unwrap();
            assert!(buffer.sg().is_zero());
            let data = s.next_data(0).await.unwrap().unwrap();
            assert!(data.start <= 1 << 20 && data.end >= (1 << 20) + 4096, "{data:?}");
            assert_eq!(s.next_data(5 << 20).await.unwrap(), None);
            s.fallocate(Fallocate::PunchHole, 1 << 20, 4096).await.unwrap();
            s.sync().await.unwrap();
            s.read(1 << 20, &one.sg()).await.unwrap();
            assert!(one.sg().is_zero());
        });
    }
}
