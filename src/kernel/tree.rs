//! The few operations that configfs is driven with, as a trait: the kernel's tree, or one that tests break at will.
//!
//! Paths are relative to the root of configfs (`target/core/user_0/vm1`).

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

/// A configfs: directories are objects, files are attributes, links are relations.
pub trait Tree {
    /// mkdir.
    ///
    /// # Errors
    /// The kernel's.
    fn make_dir(&self, path: &Path) -> io::Result<()>;
    /// rmdir.
    ///
    /// # Errors
    /// The kernel's.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Writes an attribute, in one write.
    ///
    /// # Errors
    /// The kernel's.
    fn write(&self, path: &Path, value: &str) -> io::Result<()>;
    /// Reads an attribute, without the newline at its end.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&self, path: &Path) -> io::Result<String>;
    /// Links `link` to the object `target`.
    ///
    /// # Errors
    /// The kernel's.
    fn link(&self, target: &Path, link: &Path) -> io::Result<()>;
    /// Removes a link.
    ///
    /// # Errors
    /// The kernel's.
    fn unlink(&self, link: &Path) -> io::Result<()>;
    /// The names of the directories in a directory, sorted; empty if it isn't there.
    ///
    /// # Errors
    /// The kernel's.
    fn dirs(&self, path: &Path) -> io::Result<Vec<String>>;
    /// The links in a directory, sorted, with what they point to; empty if it isn't there.
    ///
    /// # Errors
    /// The kernel's.
    fn links(&self, path: &Path) -> io::Result<Vec<(String, PathBuf)>>;
    /// Whether there is such a directory.
    fn is_dir(&self, path: &Path) -> bool;
}

/// How often the cache of names is asked for one that it seems not to have, and how long is waited in between.
const CACHE_TRIES: usize = 10;
const CACHE_PAUSE: Duration = Duration::from_millis(1);

/// The kernel's own.
#[derive(Debug, Clone)]
pub struct Real {
    root: PathBuf,
}

impl Real {
    /// The tree that is mounted there.
    pub fn at(root: impl Into<PathBuf>) -> Real {
        Real { root: root.into() }
    }

    /// Whether there is such an object, and the kernel isn't about to remove it; answered without waiting. While a device
    /// is removed, and its daemon asked, anything else that names it would wait for the end of that, the daemon included.
    /// Kernels before 5.12 can't tell, and are believed to have it.
    pub fn has_now(&self, path: &Path) -> bool {
        use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // The way to configfs leads through sysfs, whose names the kernel always checks, so it is not asked from the
        // cache alone. That takes no lock of configfs.
        let Ok(root) = openat2(CWD, &self.root, flags, Mode::empty(), ResolveFlags::empty()) else {
            return true;
        };
        // configfs keeps the names of its objects in the cache of names until their removal begins. The cache also gives up when
        // something changes at the same time; a name that is gone for good is gone the next times too.
        for _ in 0..CACHE_TRIES {
            match openat2(&root, path, flags, Mode::empty(), ResolveFlags::CACHED) {
                Ok(_) => return true,
                Err(rustix::io::Errno::NOENT) => return false,
                Err(rustix::io::Errno::AGAIN) => std::thread::sleep(CACHE_PAUSE),
                Err(_) => return true,
            }
        }
        false
    }

    fn entries(&self, path: &Path) -> io::Result<Vec<fs::DirEntry>> {
        if_there(fs::read_dir(self.root.join(path)))?.into_iter().flatten().collect()
    }
}

/// What was found, if it was there.
fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found.map(Some),
    }
}

impl Tree for Real {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(self.root.join(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(self.root.join(path))
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        use io::Write;
        // Neither created nor truncated: an attribute is there, or it is not.
        let mut file = fs::OpenOptions::new().write(true).open(self.root.join(path))?;
        let written = file.write(value.as_bytes())?;
        if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        let bytes = fs::read(self.root.join(path))?;
        Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned())
    }

    fn link(&self, target: &Path, link: &Path) -> io::Result<()> {
        symlink(self.root.join(target), self.root.join(link))
    }

    fn unlink(&self, link: &Path) -> io::Result<()> {
        fs::remove_file(self.root.join(link))
    }

    fn dirs(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut out = Vec::new();
        for entry in self.entries(path)? {
            if if_there(entry.file_type())?.is_some_and(|t| t.is_dir()) {
                out.extend(entry.file_name().into_string().ok());
            }
        }
        out.sort();
        Ok(out)
    }

    fn links(&self, path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
        let mut out = Vec::new();
        for entry in self.entries(path)? {
            if if_there(entry.file_type())?.is_some_and(|t| t.is_symlink()) {
                // One that somebody removes at this moment is not there.
                let Some(target) = if_there(fs::read_link(entry.path()))? else { continue };
                out.extend(entry.file_name().into_string().ok().map(|name| (name, target)));
            }
        }
        out.sort();
        Ok(out)
    }

    fn is_dir(&self, path: &Path) -> bool {
        self.root.join(path).is_dir()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test may panic.
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn what_others_remove_meanwhile_is_left_out_of_a_list_and_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Real::at(dir.path());
        let away = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !away.load(Ordering::Relaxed) {
                    let names: Vec<PathBuf> = (0..32).map(|n| n.to_string().into()).collect();
                    names.iter().for_each(|link| tree.link(Path::new("target"), link).unwrap());
                    names.iter().for_each(|link| tree.unlink(link).unwrap());
                }
            });
            let lists: Result<Vec<_>, _> = (0..2000).map(|_| tree.links(Path::new(""))).collect();
            away.store(true, Ordering::Relaxed);
            assert!(lists.unwrap().iter().any(|links| !links.is_empty()));
        });
    }
}
