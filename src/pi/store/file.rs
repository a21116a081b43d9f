//! Sidecars as files: where they are, and how they are made so that they are still there after a power cut. Called by the
//! decorator and the tools.

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    rc::Rc,
};

use crate::{files, storage::FileStorage, sys::io::Io};

/// The sidecar of an image if none is named: its path with `.pi` appended.
pub fn default_path(image: &Path) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(".pi");
    PathBuf::from(name)
}

/// Opens a sidecar's file.
///
/// # Errors
/// Those of `open`; `InvalidInput` if it is not a regular file.
pub async fn open_file(io: &Io, path: &Path, read_only: bool) -> io::Result<FileStorage> {
    let owned = path.to_owned();
    let file = io
        .blocking(move || {
            let file = OpenOptions::new()
                .read(true)
                .write(!read_only)
                .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
                .open(&owned)?;
            regular(file)
        })
        .await??;
    Ok(FileStorage::new(io, Rc::new(file)))
}

/// Makes an empty file for a sidecar, that nobody but its owner reads, and makes its name durable.
///
/// # Errors
/// Those of `open` (`AlreadyExists` if there is something) and of syncing its directory.
pub async fn create_file(io: &Io, path: &Path) -> io::Result<FileStorage> {
    let owned = path.to_owned();
    let file = io
        .blocking(move || {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(libc::O_CLOEXEC)
                .open(&owned)?;
            files::sync_folder_of(&owned)?;
            Ok::<_, io::Error>(file)
        })
        .await??;
    Ok(FileStorage::new(io, Rc::new(file)))
}

fn regular(file: File) -> io::Result<File> {
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }
}
