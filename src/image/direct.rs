//! How the bytes of a file are reached: through the page cache, or past it (`cache=none`, O_DIRECT).
//!
//! Past the cache go transfers that lie as the device wants them, in the file and in memory (statx(2), STATX_DIOALIGN): what guests do on
//! blocks does. All else goes through the cache: what is not aligned, and qcow2's tables. The kernel keeps the two ways coherent, one after
//! another: before it goes past the cache it writes out what lies there, and forgets it. But a page that is written both ways at once it cannot forget, and
//! then it fails the next sync (mm/filemap.c, `dio_warn_stale_pagecache`). So nothing may share a page with data that go past the cache: clusters smaller than a
//! page are refused, and blocks smaller than the device's.

use std::{fs::File, io, os::fd::AsRawFd, os::unix::fs::OpenOptionsExt, rc::Rc};

use rustix::fs::{AtFlags, OFlags, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::sys::{io::Io, mem::Sg};

/// What lies between an image and its storage: QEMU's words for it (`cache=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// The page cache: a write is answered when it has reached the kernel.
    #[default]
    Writeback,
    /// Nothing of the host's, where transfers are aligned.
    None,
}

impl std::fmt::Display for CacheMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            CacheMode::Writeback => "writeback",
            CacheMode::None => "none",
        })
    }
}

impl std::str::FromStr for CacheMode {
    type Err = String;

    fn from_str(text: &str) -> Result<CacheMode, String> {
        match text {
            "writeback" => Ok(CacheMode::Writeback),
            "none" => Ok(CacheMode::None),
            _ => Err("the host's cache is writeback or none".to_owned()),
        }
    }
}

/// Where nothing else is known, what every device can do.
const SAFE: usize = 4096;

/// The ways to one file.
pub struct Ways {
    cached: Rc<File>,
    direct: Option<Direct>,
}

/// The way past the cache, and what it demands.
struct Direct {
    file: Rc<File>,
    /// Of addresses and lengths in memory, in bytes.
    memory: usize,
    /// Of places in the file and lengths, in bytes.
    offset: usize,
}

impl From<Rc<File>> for Ways {
    /// Through the cache.
    fn from(cached: Rc<File>) -> Ways {
        Ways { cached, direct: None }
    }
}

impl Ways {
    /// Past the cache where that goes, of a file that is open for reading, and, if it is to be written, for writing.
    ///
    /// # Errors
    /// EINVAL from a file system that knows no direct I/O, and what else open(2) says.
    pub fn past_the_cache(cached: Rc<File>, read_only: bool) -> io::Result<Ways> {
        // The same file, whatever its path names by now; and not claimed a second time, if it is a device.
        let path = format!("/proc/self/fd/{}", cached.as_raw_fd());
        let flags = OFlags::DIRECT.bits() as i32;
        let file = std::fs::OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)?;
        let (memory, offset) = alignment(&file)?;
        Ok(Ways { cached, direct: Some(Direct { file: Rc::new(file), memory, offset }) })
    }

    /// What transfers past the cache have to be multiples of, in bytes; 1 if none goes there.
    pub fn alignment(&self) -> u32 {
        self.direct.as_ref().map_or(1, |direct| direct.offset as u32)
    }

    /// Whether some of it goes past the cache.
    pub fn goes_past(&self) -> bool {
        self.direct.is_some()
    }

    /// The file, for all that is no transfer.
    pub fn file(&self) -> &Rc<File> {
        &self.cached
    }

    /// The descriptor for a transfer.
    fn of(&self, at: u64, sg: &Sg) -> &Rc<File> {
        match &self.direct {
            Some(direct) if direct.takes(at, sg) => &direct.file,
            _ => &self.cached,
        }
    }

    /// As [`Io::read`].
    ///
    /// # Errors
    /// Those of `preadv2`.
    pub async fn read(&self, io: &Io, at: u64, to: &Sg) -> io::Result<usize> {
        if self.direct.is_none() {
            return io.read(&self.cached, at, to).await;
        }
        let done = io.read_some(self.of(at, to), at, to).await?;
        if done == to.len() || done == 0 {
            return Ok(done);
        }
        Box::pin(self.read_on(io, at, to, done)).await
    }

    /// What is left may be less aligned than what there was: a file may end anywhere.
    async fn read_on(&self, io: &Io, at: u64, to: &Sg, mut done: usize) -> io::Result<usize> {
        while done < to.len() {
            let (from, rest) = (at + done as u64, to.slice(done, to.len() - done));
            match io.read_some(self.of(from, &rest), from, &rest).await? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// As [`Io::read_or_zero`].
    ///
    /// # Errors
    /// Those of `preadv2`.
    pub async fn read_or_zero(&self, io: &Io, at: u64, to: &Sg) -> io::Result<()> {
        let n = self.read(io, at, to).await?;
        to.fill(n, to.len() - n, 0);
        Ok(())
    }

    /// As [`Io::write`].
    ///
    /// # Errors
    /// Those of `pwritev2`.
    pub async fn write(&self, io: &Io, at: u64, from: &Sg, dsync: bool) -> io::Result<()> {
        io.write(self.of(at, from), at, from, dsync).await
    }
}

impl Direct {
    fn takes(&self, at: u64, sg: &Sg) -> bool {
        let mut all = self.offset as u64 - 1;
        all &= at | sg.len() as u64;
        all == 0 && sg.runs().all(|(start, len)| (start.addr().get() | len) & (self.memory - 1) == 0)
    }
}

/// What direct I/O on a file demands: of memory, and of places in the file; both are powers of two.
fn alignment(file: &File) -> io::Result<(usize, usize)> {
    let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let found = match found {
        Ok(found) if found.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => found,
        // Linux before 6.1, or a file system that does not say.
        Ok(_) | Err(rustix::io::Errno::NOSYS) => return Ok((SAFE, SAFE)),
        Err(e) => return Err(e.into()),
    };
    let (memory, offset) = (found.stx_dio_mem_align as usize, found.stx_dio_offset_align as usize);
    if !memory.is_power_of_two() || !offset.is_power_of_two() {
        // 0: not for this file (statx(2)).
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok((memory, offset))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, mem::Buffer};

    /// A file past the cache, where the file system for temporary files can.
    fn ways(size: u64) -> Option<Ways> {
        let file = Rc::new(tempfile::tempfile().unwrap());
        file.set_len(size).unwrap();
        match Ways::past_the_cache(file, false) {
            Ok(ways) => Some(ways),
            Err(e) => {
                eprintln!("not run: the file system of temporary files knows no direct I/O: {e}");
                None
            }
        }
    }

    #[test]
    fn what_is_aligned_goes_past_the_cache_and_all_else_through_it() {
        let Some(ways) = ways(1 << 20) else { return };
        let buffer = Buffer::zeroed(64 << 10).sg();
        let direct = |at: u64, start: usize, len: usize| {
            !Rc::ptr_eq(ways.of(at, &buffer.slice(start, len)), &ways.cached)
        };
        let least = ways.direct.as_ref().unwrap().offset;
        assert!(direct(0, 0, 4096) && direct(8192, 4096, 16384));
        assert!(!direct(1, 0, 4096) && !direct(0, 0, 4095) && !direct(0, 1, 4096));
        assert!(!direct(least as u64 / 2, 0, 4096) && !direct(0, 0, 4096 + least / 2));
    }

    #[test]
    fn both_ways_see_what_the_other_has_written_up_to_an_end_anywhere() {
        let Some(ways) = ways(8192 + 700) else { return };
        sys::run(async move |io| {
            let fill = |byte: u8, len: usize| Buffer::from_slice(&vec![byte; len]).sg();
            ways.write(&io, 0, &fill(1, 8192), false).await.unwrap();
            ways.write(&io, 100, &fill(2, 50), false).await.unwrap();
            ways.write(&io, 4096, &fill(3, 4096), true).await.unwrap();
            ways.write(&io, 8192, &fill(4, 700), false).await.unwrap();
            let to = Buffer::zeroed(16384).sg();
            assert_eq!(ways.read(&io, 0, &to).await.unwrap(), 8192 + 700);
            let mut expected = vec![1; 4096];
            expected[100..150].fill(2);
            expected.extend([3; 4096]);
            expected.extend([4; 700]);
            assert_eq!(to.slice(0, expected.len()).to_vec(), expected);
            to.fill(0, 16384, 9);
            ways.read_or_zero(&io, 0, &to).await.unwrap();
            expected.resize(16384, 0);
            assert!(to.to_vec() == expected);
        });
    }
}
