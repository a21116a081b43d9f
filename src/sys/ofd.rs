//! Open file description locks (`F_OFD_*`, fcntl(2)): advisory byte-range locks that belong to an open file, not to a
//! process, so that they work between threads and go away with the last descriptor. `image/lock` speaks QEMU's protocol
//! with them.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

/// What is done to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OfdLock {
    /// A read lock: any number of holders, unless somebody has a write lock.
    Shared,
    /// A write lock: one holder.
    Exclusive,
    /// No lock.
    Unlock,
}

impl OfdLock {
    fn l_type(self) -> libc::c_short {
        let l_type = match self {
            OfdLock::Shared => libc::F_RDLCK,
            OfdLock::Exclusive => libc::F_WRLCK,
            OfdLock::Unlock => libc::F_UNLCK,
        };
        l_type as libc::c_short
    }
}

fn flock(lock: OfdLock, start: u64, len: u64) -> libc::flock {
    // SAFETY: `struct flock` is plain integers, for which zero is a value; OFD locks demand that l_pid is 0.
    let mut fl: libc::flock = unsafe { std::mem::zeroed() };
    fl.l_type = lock.l_type();
    fl.l_whence = libc::SEEK_SET as libc::c_short;
    fl.l_start = start as libc::off_t;
    fl.l_len = len as libc::off_t;
    fl
}

fn fcntl(fd: RawFd, cmd: libc::c_int, fl: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the commands used here take a pointer to a `struct flock`, which lives through the call.
    match unsafe { libc::fcntl(fd, cmd, fl as *mut libc::flock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Locks or unlocks `len` bytes from `start`, without waiting. Locks that the same open file holds are replaced.
///
/// # Errors
/// EAGAIN if somebody else's lock is in the way; EINVAL, ENOLCK or EOPNOTSUPP where the file system knows no such locks.
pub fn set(file: &File, lock: OfdLock, start: u64, len: u64) -> io::Result<()> {
    fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &mut flock(lock, start, len))
}

/// Whether a lock of that kind would be refused, because of somebody else's.
///
/// # Errors
/// As in [`set`].
pub fn conflicts(file: &File, lock: OfdLock, start: u64, len: u64) -> io::Result<bool> {
    let mut fl = flock(lock, start, len);
    fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut fl)?;
    Ok(fl.l_type != OfdLock::Unlock.l_type())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_open_files_of_one_process_see_each_others_locks() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (tmp.reopen().unwrap(), tmp.reopen().unwrap());
        set(&a, OfdLock::Shared, 100, 2).unwrap();
        assert!(!conflicts(&b, OfdLock::Shared, 100, 1).unwrap());
        assert!(conflicts(&b, OfdLock::Exclusive, 101, 1).unwrap());
        assert!(!conflicts(&b, OfdLock::Exclusive, 102, 1).unwrap());
        assert!(!conflicts(&a, OfdLock::Exclusive, 100, 2).unwrap(), "one's own locks are no conflict");
        let refused = set(&b, OfdLock::Exclusive, 100, 1).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
        drop(a);
        set(&b, OfdLock::Exclusive, 100, 1).unwrap();
    }
}
