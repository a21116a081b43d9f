//! QEMU's locks on image files, so that QEMU, `qemu-img` and we refuse each other's images while they are in use.
//!
//! The protocol is that of QEMU's `block/file-posix.c`. Every holder takes *shared* OFD locks on single bytes: byte
//! 100 + n says "I use permission n", byte 200 + n says "I share permission n with nobody". Having taken its bytes,
//! a holder looks whether anybody else has the opposite ones, and gives its own back if so. Since all locks are
//! shared, the taking never fails; since everybody takes before looking, two newcomers can refuse each other, but never
//! overlook each other.
//!
//! A writer uses consistent-read, write and resize, and shares neither write nor resize; a reader (a backing file, a read-only
//! LUN) uses consistent-read and shares the same, so that several readers live together.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    rc::Rc,
};

use crate::sys::ofd::{self, OfdLock};

/// First of the bytes that say which permissions are used.
const USED_BASE: u64 = 100;
/// First of the bytes that say which permissions are not shared.
const UNSHARED_BASE: u64 = 200;

/// QEMU's block permissions (`include/block/block-common.h`), as the number of their bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// The data read are consistent.
    ConsistentRead = 0,
    /// Data are changed.
    Write = 1,
    /// Data are rewritten with what is there already.
    WriteUnchanged = 2,
    /// The size is changed.
    Resize = 3,
}

const ALL: [Permission; 4] =
    [Permission::ConsistentRead, Permission::Write, Permission::WriteUnchanged, Permission::Resize];

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::WriteUnchanged => "write unchanged",
            Permission::Resize => "resize",
        })
    }
}

/// How an image is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// By us alone.
    Writer,
    /// Together with other readers.
    Reader,
}

impl LockMode {
    fn used(self) -> &'static [Permission] {
        match self {
            LockMode::Writer => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
            LockMode::Reader => &[Permission::ConsistentRead],
        }
    }

    fn unshared(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// A process that holds locks on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// Its name (`/proc/PID/comm`).
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// Why a lock was not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody else uses, or does not share, that permission.
    #[error("somebody else {} the permission '{permission}'", if *.used { "uses" } else { "does not share" })]
    Conflict {
        /// The permission.
        permission: Permission,
        /// It is used (and we would not share it), or else it is not shared (and we would use it).
        used: bool,
        /// Who, as far as /proc tells: the locks themselves name nobody.
        holders: Vec<Holder>,
    },
    /// The file cannot be locked at all.
    #[error("the file cannot be locked")]
    Io(#[source] io::Error),
}

/// The locks on one image; dropping them gives them up, whoever else still has the file open.
#[derive(Debug)]
pub struct ImageLock {
    file: Rc<File>,
}

impl ImageLock {
    /// Takes the locks for that use, without waiting.
    ///
    /// # Errors
    /// [`LockError::Conflict`] if anybody else's use excludes it: nothing is held then.
    pub fn acquire(file: &Rc<File>, mode: LockMode) -> Result<ImageLock, LockError> {
        let lock = ImageLock { file: file.clone() };
        for (base, permissions) in [(USED_BASE, mode.used()), (UNSHARED_BASE, mode.unshared())] {
            for p in permissions {
                ofd::set(file, OfdLock::Shared, base + *p as u64, 1).map_err(LockError::Io)?;
            }
        }
        lock.check(UNSHARED_BASE, mode.used(), false)?;
        lock.check(USED_BASE, mode.unshared(), true)?;
        Ok(lock)
    }

    fn check(&self, base: u64, permissions: &[Permission], used: bool) -> Result<(), LockError> {
        for permission in permissions.iter().copied() {
            let at = base + permission as u64;
            if ofd::conflicts(&self.file, OfdLock::Exclusive, at, 1).map_err(LockError::Io)? {
                return Err(LockError::Conflict { permission, used, holders: holders(&self.file) });
            }
        }
        Ok(())
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        for base in [USED_BASE, UNSHARED_BASE] {
            // Unlocking what one holds fails only if the kernel is out of memory; closing the file unlocks it then.
            let _ = ofd::set(&self.file, OfdLock::Unlock, base, ALL.len() as u64);
        }
    }
}

/// The processes that hold OFD locks on the file, from `/proc/PID/fdinfo`. Best effort: others' processes are hidden from
/// an ordinary user. A process of our own that has the file open only to ask is not listed: its locks are given back.
fn holders(file: &File) -> Vec<Holder> {
    let Ok(me) = file.metadata() else { return Vec::new() };
    let mine = std::process::id();
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(fds) = fs::read_dir(process.path().join("fd")) else { continue };
        // We have just locked it ourselves; count us only if another descriptor of ours holds locks too.
        let needed = if pid == mine { 2 } else { 1 };
        let locked = fds
            .flatten()
            .filter(|fd| {
                fs::metadata(fd.path()).is_ok_and(|m| m.dev() == me.dev() && m.ino() == me.ino())
                    && fs::read_to_string(process.path().join("fdinfo").join(fd.file_name()))
                        .is_ok_and(|info| info.contains("OFDLCK"))
            })
            .take(needed)
            .count();
        if locked == needed {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: name.trim_end().to_owned() });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tmp: &tempfile::NamedTempFile) -> Rc<File> {
        Rc::new(tmp.reopen().unwrap())
    }

    #[test]
    fn a_writer_excludes_readers_and_writers_and_readers_live_together() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (file(&tmp), file(&tmp), file(&tmp));
        let writer = ImageLock::acquire(&a, LockMode::Writer).unwrap();
        for mode in [LockMode::Writer, LockMode::Reader] {
            let refused = ImageLock::acquire(&b, mode).unwrap_err();
            let LockError::Conflict { holders, .. } = &refused else { panic!("{refused}") };
            assert_eq!(holders.iter().map(|h| h.pid).collect::<Vec<_>>(), [std::process::id()]);
        }
        drop(writer);
        let _first = ImageLock::acquire(&b, LockMode::Reader).unwrap();
        let _second = ImageLock::acquire(&c, LockMode::Reader).unwrap();
        assert!(ImageLock::acquire(&a, LockMode::Writer).is_err());
    }

    #[test]
    fn a_refused_lock_leaves_nothing_behind() {
        let tmp = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (file(&tmp), file(&tmp));
        let reader = ImageLock::acquire(&a, LockMode::Reader).unwrap();
        assert!(ImageLock::acquire(&b, LockMode::Writer).is_err());
        for at in (100..104).chain(200..204) {
            assert!(!ofd::conflicts(&a, OfdLock::Exclusive, at, 1).unwrap(), "byte {at} is still locked");
        }
        drop(reader);
        ImageLock::acquire(&b, LockMode::Writer).unwrap();
    }
}
