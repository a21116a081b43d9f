//! New images: a sparse raw file, or a qcow2 image. Nothing is overwritten, and what could not be finished is removed.
//!
//! Called by `tcmu-dif image create` and by `tcmu-dif create --size`.

use std::{
    error::Error,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    rc::Rc,
};

use super::{
    open::{OpenError, OpenOptions, backing, data_file, open_any_size},
    qcow2,
};
use crate::{
    sys::io::Io,
    units::BlockSize,
    volume::{IoErrorKind, Volume},
};

/// An image that was not made.
#[derive(Debug, thiserror::Error)]
#[error("{}: {what}", .path.display())]
pub struct CreateError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub what: CreateErrorKind,
    /// The error of the layer beneath.
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

/// The reasons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CreateErrorKind {
    /// Something is there already.
    #[error("exists already")]
    Exists,
    /// The directory is missing.
    #[error("its directory does not exist")]
    NoDirectory,
    /// The directory may not be written.
    #[error("may not be created")]
    Permission,
    /// The size is 0 or not a multiple of 512.
    #[error("cannot have {0} bytes")]
    Size(u64),
    /// The file system holds no file of that size.
    #[error("no room for {0} bytes")]
    NoSpace(u64),
    /// An option of qcow2's.
    #[error("{option}={value}: {reason}")]
    Option {
        /// qemu-img's name of it.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The backing file cannot be used.
    #[error("its backing file '{0}' cannot be used")]
    Backing(String),
    /// It cannot have its external data file there.
    #[error("{0}")]
    DataFile(String),
    /// Writing it failed.
    #[error("cannot be written")]
    Io,
}

impl CreateError {
    pub(super) fn new(path: &Path, what: CreateErrorKind) -> CreateError {
        CreateError { path: path.to_owned(), what, source: None }
    }

    pub(super) fn io(path: &Path, size: u64, source: io::Error) -> CreateError {
        let what = match source.raw_os_error() {
            Some(libc::EEXIST) => CreateErrorKind::Exists,
            Some(libc::ENOENT | libc::ENOTDIR) => CreateErrorKind::NoDirectory,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => CreateErrorKind::Permission,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => CreateErrorKind::NoSpace(size),
            _ => CreateErrorKind::Io,
        };
        CreateError { source: Some(Box::new(source)), ..CreateError::new(path, what) }
    }

    /// What the administrator does next.
    pub fn next_step(&self) -> Option<String> {
        let directory = match self.path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p.display().to_string(),
            _ => ".".to_owned(),
        };
        match &self.what {
            CreateErrorKind::Exists => Some("choose another path, or remove the file first".to_owned()),
            CreateErrorKind::NoDirectory => Some(format!("mkdir -p {directory}")),
            CreateErrorKind::Permission => Some(format!("see who may write there: ls -ld {directory}")),
            CreateErrorKind::Size(_) => Some("choose a multiple of 512 bytes, for instance 10G".to_owned()),
            CreateErrorKind::NoSpace(_) => Some(format!("choose a smaller size; df -h {directory}")),
            CreateErrorKind::Option { .. } | CreateErrorKind::Io => None,
            CreateErrorKind::DataFile(_) => Some("name a file in the image's own directory".to_owned()),
            CreateErrorKind::Backing(_) => match self.source.as_ref()?.downcast_ref::<OpenError>() {
                Some(e) => e.next_step(),
                None => Some("name a local file, and its format".to_owned()),
            },
        }
    }
}

/// A file that removes itself unless it is kept.
pub(super) struct NewFile {
    path: PathBuf,
    kept: bool,
}

impl NewFile {
    /// Creates the file, which must not exist.
    ///
    /// # Errors
    /// EEXIST, and all else that open(2) has.
    pub(super) fn create(path: &Path) -> io::Result<(NewFile, File)> {
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok((NewFile { path: path.to_owned(), kept: false }, file))
    }

    /// It is complete: the name is made durable, and the file stays.
    ///
    /// # Errors
    /// Those of syncing the directory.
    pub(super) fn keep(mut self) -> io::Result<()> {
        let directory = match self.path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.kept {
            // Best effort: the error that brought us here is the one to report.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes a sparse raw image of `size` bytes.
///
/// # Errors
/// See [`CreateErrorKind`]; nothing is left behind then.
pub async fn create_raw(io: &Io, path: &Path, size: u64) -> Result<(), CreateError> {
    check_size(path, size)?;
    let at = path.to_owned();
    let call = move || {
        let (new, file) = NewFile::create(&at)?;
        file.set_len(size)?;
        file.sync_all()?;
        new.keep()
    };
    io.blocking(call).await.and_then(|r| r).map_err(|e| CreateError::io(path, size, e))
}

/// Makes a qcow2 image. A backing file is opened first, to see that it can be; with size 0 the new image is as large as it.
///
/// # Errors
/// See [`CreateErrorKind`]; nothing is left behind then.
pub async fn create_qcow2(io: &Io, path: &Path, options: &qcow2::CreateOptions) -> Result<(), CreateError> {
    let mut options = options.clone();
    if let Some(name) = options.backing_file.clone() {
        let refused = |e| CreateError {
            source: Some(e),
            ..CreateError::new(path, CreateErrorKind::Backing(name.clone()))
        };
        let found = backing(path, Some(&name), options.backing_format.as_deref());
        let found = found.map_err(|what| refused(Box::new(OpenError::new(&name, what))))?;
        let Some((file, format)) = found else { return Err(refused("the name is empty".into())) };
        let how = OpenOptions { read_only: true, format, ..OpenOptions::default() };
        let below = open_any_size(io, &file, &how).await.map_err(|e| refused(Box::new(e)))?;
        if options.size == 0 {
            options.size = below.limits().capacity;
        }
        // The header says what was found, so that nobody has to guess again.
        options.backing_format.get_or_insert_with(|| below.format().to_string());
    }
    make_qcow2(io, path, options).await
}

/// As [`create_qcow2`], over a backing file that is not looked at.
pub(super) async fn make_qcow2(
    io: &Io,
    path: &Path,
    options: qcow2::CreateOptions,
) -> Result<(), CreateError> {
    check_size(path, options.size)?;
    let at = path.to_owned();
    let made = io.blocking(move || NewFile::create(&at)).await.and_then(|r| r);
    let (new, file) = made.map_err(|e| CreateError::io(path, options.size, e))?;
    let beside = match &options.data_file {
        Some(name) => {
            let refused = |e: OpenError| CreateErrorKind::DataFile(e.to_string());
            let at = data_file(path, name)
                .map_err(|what| CreateError::new(path, refused(OpenError::new(path, what))))?;
            let made = at.clone();
            let made = io.blocking(move || NewFile::create(&made)).await.and_then(|r| r);
            Some(made.map_err(|e| CreateError::io(&at, options.size, e))?)
        }
        None => None,
    };
    let (beside, data) = beside.map(|(new, file)| (new, Rc::new(file))).unzip();
    qcow2::create(io, Rc::new(file), data, path, &options).await.map_err(|e| {
        let (what, source): (_, Option<Box<dyn Error + Send + Sync>>) = match e {
            qcow2::CreateError::Option { option, value, reason } => {
                (CreateErrorKind::Option { option, value, reason }, None)
            }
            qcow2::CreateError::Io(e) if e.kind == IoErrorKind::NoSpace => {
                (CreateErrorKind::NoSpace(options.size), Some(Box::new(e)))
            }
            e => (CreateErrorKind::Io, Some(Box::new(e))),
        };
        CreateError { source, ..CreateError::new(path, what) }
    })?;
    let keep = move || beside.map_or(Ok(()), NewFile::keep).and_then(|()| new.keep());
    let kept = io.blocking(keep).await.and_then(|r| r);
    kept.map_err(|e| CreateError::io(path, options.size, e))
}

/// Refuses sizes that no disk has.
pub(super) fn check_size(path: &Path, size: u64) -> Result<(), CreateError> {
    if size == 0 || !size.is_multiple_of(BlockSize::B512.bytes()) || i64::try_from(size).is_err() {
        return Err(CreateError::new(path, CreateErrorKind::Size(size)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::run;

    #[test]
    fn a_new_raw_image_is_sparse_and_nothing_is_overwritten() {
        run(async |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("new.raw");
            create_raw(&io, &path, 1 << 30).await.unwrap();
            let meta = fs::metadata(&path).unwrap();
            use std::os::unix::fs::MetadataExt;
            assert_eq!((meta.len(), meta.blocks()), (1 << 30, 0));
            let e = create_raw(&io, &path, 512).await.unwrap_err();
            assert_eq!(e.what, CreateErrorKind::Exists);
            assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
        });
    }

    #[test]
    fn what_could_not_be_finished_is_removed() {
        run(async |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("huge.raw");
            // Larger than any file ext4, xfs or tmpfs can hold.
            let e = create_raw(&io, &path, i64::MAX as u64 & !511).await.unwrap_err();
            assert!(matches!(e.what, CreateErrorKind::NoSpace(_)), "{e:?}");
            assert!(!path.exists());
            for size in [0, 1000, u64::MAX - 511] {
                let e = create_raw(&io, &path, size).await.unwrap_err();
                assert_eq!(e.what, CreateErrorKind::Size(size));
            }
            let e = create_raw(&io, &dir.path().join("no/such.raw"), 512).await.unwrap_err();
            assert_eq!(e.what, CreateErrorKind::NoDirectory);
            assert!(e.next_step().unwrap().starts_with("mkdir -p "));
        });
    }
}
