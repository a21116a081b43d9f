//! Why an image was not opened, said so that an administrator knows what to do next.

use std::{error::Error, fmt, io, path::PathBuf};

use super::{
    Format,
    lock::{Holder, LockError},
    owner::OwnerError,
    qcow2::HeaderError,
};
use crate::{
    tls::TlsError,
    volume::{IoError, IoErrorKind},
};

/// The longest chain of backing files that is followed, the image itself included.
pub const MAX_CHAIN: usize = 64;

/// An image that was not opened: which file, why, and the error beneath. Nothing is left behind: files are closed and
/// locks given back.
#[derive(Debug)]
pub struct OpenError {
    /// The file.
    pub path: PathBuf,
    /// The image that names it as its backing file.
    pub backing_of: Option<PathBuf>,
    /// Why.
    pub what: OpenErrorKind,
    /// The error of the layer beneath.
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

/// The reasons.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenErrorKind {
    /// There is no such file.
    NotFound,
    /// It is neither a regular file nor a block device, but this.
    NotAnImage(&'static str),
    /// We may not read it, or not write it.
    Permission {
        /// It was to be written.
        write: bool,
    },
    /// The file system, or the device, is read-only.
    ReadOnly,
    /// Somebody else has it.
    InUse(Vec<Holder>),
    /// It is another host's, by the file beside it; and what to do then.
    Owned(Option<String>),
    /// It cannot be locked.
    NoLocks,
    /// It has no bytes.
    Empty,
    /// Its size (bytes) is not a multiple of the block size.
    SizeNotMultiple {
        /// The size.
        size: u64,
        /// The block size.
        block_size: u64,
    },
    /// It was named qcow2 and has no qcow2 header.
    NotQcow2,
    /// Its metadata contradict themselves.
    Corrupt,
    /// It has features that we do not know.
    Unsupported,
    /// It names its backing file by a protocol.
    BackingProtocol(String),
    /// It says that its backing file has a format that we do not know.
    BackingFormat(String),
    /// It names an external data file that does not lie beside it.
    DataFileElsewhere(String),
    /// Its chain of backing files comes back to it.
    BackingLoop,
    /// Its chain of backing files is longer than [`MAX_CHAIN`].
    ChainTooLong,
    /// It cannot be reached past the page cache.
    NoDirect,
    /// The device beneath has larger sectors than the disk, which go past the page cache as a whole.
    Sectors {
        /// Bytes of a sector.
        sector: u32,
        /// Bytes of a block of the disk.
        block_size: u64,
    },
    /// It is an NBD URI that cannot be used.
    Uri(String),
    /// Its NBD server does not answer.
    Unreachable,
    /// Its NBD server will not serve it, or not as a LUN needs it.
    ServerRefuses(String),
    /// There is no TLS with its NBD server.
    Tls(TlsError),
    /// It is an NBD export, which this is not there for.
    NotForNbd(&'static str),
    /// Reading it failed.
    Io,
}

impl OpenError {
    pub(super) fn new(path: impl Into<PathBuf>, what: OpenErrorKind) -> OpenError {
        OpenError { path: path.into(), backing_of: None, what, source: None }
    }

    pub(super) fn source(mut self, source: impl Error + Send + Sync + 'static) -> OpenError {
        self.source = Some(Box::new(source));
        self
    }

    /// A failed system call on the file.
    pub(super) fn io(path: impl Into<PathBuf>, source: io::Error, write: bool) -> OpenError {
        let what = match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => OpenErrorKind::NotFound,
            Some(libc::EACCES | libc::EPERM) => OpenErrorKind::Permission { write },
            Some(libc::EROFS) => OpenErrorKind::ReadOnly,
            Some(libc::EBUSY | libc::ETXTBSY) => OpenErrorKind::InUse(Vec::new()),
            _ => OpenErrorKind::Io,
        };
        OpenError::new(path, what).source(source)
    }

    /// It cannot be opened for direct I/O.
    pub(super) fn direct(path: impl Into<PathBuf>, source: io::Error) -> OpenError {
        match source.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => {
                OpenError::new(path, OpenErrorKind::NoDirect).source(source)
            }
            _ => OpenError::io(path, source, false),
        }
    }

    pub(super) fn lock(path: impl Into<PathBuf>, e: LockError) -> OpenError {
        match e {
            LockError::Conflict { ref holders, .. } => {
                let what = OpenErrorKind::InUse(holders.clone());
                OpenError::new(path, what).source(e)
            }
            LockError::Io(e) => OpenError::new(path, OpenErrorKind::NoLocks).source(e),
        }
    }

    /// It is not to be had, by the file beside it.
    pub(super) fn owner(path: &std::path::Path, e: OwnerError) -> OpenError {
        OpenError::new(path, OpenErrorKind::Owned(e.next_step(path))).source(e)
    }

    /// A driver's error while it opened the file.
    pub(super) fn driver(path: impl Into<PathBuf>, e: IoError) -> OpenError {
        let what = match e.kind {
            IoErrorKind::Corrupt => OpenErrorKind::Corrupt,
            IoErrorKind::Unsupported => OpenErrorKind::Unsupported,
            IoErrorKind::ReadOnly => OpenErrorKind::ReadOnly,
            IoErrorKind::Locked => OpenErrorKind::InUse(Vec::new()),
            IoErrorKind::Medium
            | IoErrorKind::NoSpace
            | IoErrorKind::OutOfRange
            | IoErrorKind::Protection(_)
            | IoErrorKind::Failed
            | IoErrorKind::Unreachable
            | IoErrorKind::Cancelled => OpenErrorKind::Io,
        };
        OpenError::new(path, what).source(e)
    }

    /// A header that begins as it should and that the driver does not take.
    pub(super) fn header(path: impl Into<PathBuf>, e: HeaderError) -> OpenError {
        let what = match e {
            HeaderError::NotQcow2 | HeaderError::Truncated | HeaderError::Field { .. } => {
                OpenErrorKind::Corrupt
            }
            HeaderError::Version(_) | HeaderError::Feature(_) => OpenErrorKind::Unsupported,
        };
        OpenError::new(path, what).source(e)
    }

    /// The same error, about a backing file of that image.
    pub(super) fn backing_of(mut self, image: Option<PathBuf>) -> OpenError {
        self.backing_of = image;
        self
    }

    /// What the administrator does next, in the words of a command where there is one.
    pub fn next_step(&self) -> Option<String> {
        let path = self.path.display();
        let step = match &self.what {
            OpenErrorKind::NotFound => match &self.backing_of {
                Some(image) => format!(
                    "put the backing file back, or point the image at its new place: qemu-img rebase -u -b NEW -F FORMAT {}",
                    image.display()
                ),
                None => {
                    format!("check the path, or create the image: tcmu-dif image create -f qcow2 {path} SIZE")
                }
            },
            OpenErrorKind::NotAnImage(_) => "name a regular file or a block device".to_owned(),
            OpenErrorKind::Permission { write: true } => {
                format!(
                    "give the daemon's user the right to read and write {path}, or open it with --read-only"
                )
            }
            OpenErrorKind::Permission { write: false } => {
                format!("give the daemon's user the right to read {path}")
            }
            OpenErrorKind::ReadOnly => "open it with --read-only".to_owned(),
            OpenErrorKind::InUse(holders) => match holders.first() {
                Some(holder) => format!("stop {holder}, which holds it"),
                None => format!("stop whoever uses it: fuser -v {path}"),
            },
            OpenErrorKind::Owned(next) => return next.clone(),
            OpenErrorKind::NoLocks => {
                "keep the image on a file system with open file description locks".to_owned()
            }
            OpenErrorKind::Empty => format!("give it a size: truncate -s SIZE {path}"),
            OpenErrorKind::SizeNotMultiple { size, block_size } => {
                let up = size.div_ceil(*block_size).saturating_mul(*block_size);
                format!("make it a multiple: qemu-img resize {path} {up}")
            }
            OpenErrorKind::NotQcow2 => "leave the format out, or name it raw".to_owned(),
            OpenErrorKind::Corrupt => format!("look at the damage: tcmu-dif image check {path}"),
            OpenErrorKind::Unsupported => format!("convert it: qemu-img convert -O qcow2 {path} NEW"),
            OpenErrorKind::BackingProtocol(_) => {
                format!("give it a local backing file: qemu-img rebase -b FILE -F FORMAT {path}")
            }
            OpenErrorKind::BackingFormat(_) => {
                format!("name the format raw or qcow2: qemu-img rebase -u -b FILE -F FORMAT {path}")
            }
            OpenErrorKind::DataFileElsewhere(name) => format!(
                "if you trust the image, put a link to it beside the image and name that: ln -s {name} {path}.data && qemu-img amend \
                 -o data_file={path}.data {path}"
            ),
            OpenErrorKind::BackingLoop => {
                format!("break the loop: qemu-img rebase -u -b FILE -F FORMAT {path}")
            }
            OpenErrorKind::ChainTooLong => {
                "shorten the chain: qemu-img commit, or qemu-img convert".to_owned()
            }
            OpenErrorKind::NoDirect => {
                "leave the cache at writeback, or keep the image on a file system that knows O_DIRECT"
                    .to_owned()
            }
            OpenErrorKind::Sectors { sector, .. } => {
                format!("leave the cache at writeback, or make the disk one with blocks of {sector} bytes")
            }
            OpenErrorKind::Uri(_) => {
                "write it as nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=/PATH".to_owned()
            }
            OpenErrorKind::Tls(e) => e.next.clone(),
            OpenErrorKind::Unreachable | OpenErrorKind::ServerRefuses(_) => {
                format!("see what the server has: nbdinfo --list '{path}'")
            }
            OpenErrorKind::NotForNbd(_) => format!(
                "see what its server tells: nbdinfo --map '{path}'; qemu-nbd serves what is in a qcow2 file"
            ),
            OpenErrorKind::Io => return None,
        };
        Some(step)
    }
}

impl fmt::Display for OpenErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OpenErrorKind::NotFound => f.write_str("no such file"),
            OpenErrorKind::NotAnImage(what) => write!(f, "is {what}"),
            OpenErrorKind::Permission { write: true } => f.write_str("may not be read and written"),
            OpenErrorKind::Permission { write: false } => f.write_str("may not be read"),
            OpenErrorKind::ReadOnly => f.write_str("cannot be written"),
            OpenErrorKind::InUse(holders) if holders.is_empty() => f.write_str("is in use"),
            OpenErrorKind::InUse(holders) => {
                f.write_str("is in use by ")?;
                for (i, holder) in holders.iter().enumerate() {
                    write!(f, "{}{holder}", if i == 0 { "" } else { ", " })?;
                }
                Ok(())
            }
            OpenErrorKind::Owned(_) => f.write_str("cannot be taken"),
            OpenErrorKind::NoLocks => f.write_str("cannot be locked"),
            OpenErrorKind::Empty => f.write_str("is empty"),
            OpenErrorKind::SizeNotMultiple { size, block_size } => {
                write!(f, "its size, {size} bytes, is not a multiple of {block_size}")
            }
            OpenErrorKind::NotQcow2 => write!(f, "is no {} image", Format::Qcow2),
            OpenErrorKind::Corrupt => f.write_str("is damaged"),
            OpenErrorKind::Unsupported => f.write_str("has features that are not supported"),
            OpenErrorKind::BackingProtocol(name) => {
                write!(f, "its backing file '{name}' is not a file of this host")
            }
            OpenErrorKind::BackingFormat(name) => {
                write!(f, "its backing file has the unknown format '{name}'")
            }
            OpenErrorKind::DataFileElsewhere(name) => {
                write!(f, "its external data file '{name}' does not lie beside it")
            }
            OpenErrorKind::BackingLoop => f.write_str("its chain of backing files is a loop"),
            OpenErrorKind::ChainTooLong => write!(f, "its chain has more than {MAX_CHAIN} images"),
            OpenErrorKind::NoDirect => f.write_str("cannot be used past the host's cache (cache none)"),
            OpenErrorKind::Sectors { sector, block_size } => {
                write!(
                    f,
                    "lies on sectors of {sector} bytes, and blocks of {block_size} cannot go past the host's cache"
                )
            }
            OpenErrorKind::Uri(why) => write!(f, "is no NBD URI that can be used: {why}"),
            OpenErrorKind::Tls(e) => write!(f, "there is no TLS with its NBD server: {e}"),
            OpenErrorKind::Unreachable => f.write_str("its NBD server does not answer"),
            OpenErrorKind::ServerRefuses(why) => write!(f, "cannot be used: {why}"),
            OpenErrorKind::NotForNbd(why) => write!(f, "is an NBD export, and {why}"),
            OpenErrorKind::Io => f.write_str("cannot be read"),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(image) = &self.backing_of {
            write!(f, " (backing file of {})", image.display())?;
        }
        write!(f, ": {}", self.what)
    }
}

impl Error for OpenError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_ref().map(|e| &**e as _)
    }
}
