//! Small files that are kept for others to read: replaced as a whole, and removed whether they are there or not.
//!
//! Called by everybody who notes something in /run or /var/lib; images and sidecars have [`crate::storage`].

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Puts those bytes in the place of a file, or makes it: a reader sees all of the old ones or all of the new. With `durable` they also
/// outlive a power cut.
///
/// # Errors
/// The file system's. What was there before stays then.
pub fn replace(path: &Path, bytes: &[u8], durable: bool) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let written = (|| {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // The error that brought us here is the one to report.
        let _ = fs::remove_file(&beside);
    }
    written?;
    if durable { sync_folder_of(path) } else { Ok(()) }
}

/// Makes durable that a file has its name, or has it no more.
///
/// # Errors
/// The file system's.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir)?.sync_all()
}

/// Removes a file, if it is there.
///
/// # Errors
/// The file system's, but that there is none.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_or_stays_and_nothing_stands_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.json");
        replace(&path, b"old", false).unwrap();
        replace(&path, b"new", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // A folder cannot be replaced by a file.
        let folder = dir.path().join("folder");
        fs::create_dir(&folder).unwrap();
        assert!(replace(&folder, b"new", false).is_err());
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["folder", "vm1.json"]);
    }

    #[test]
    fn a_file_that_is_gone_is_removed_and_other_failures_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.json");
        replace(&path, b"", false).unwrap();
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(remove(dir.path()).is_err());
    }
}
