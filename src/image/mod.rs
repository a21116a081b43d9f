//! Images: raw files, block devices, qcow2 and NBD exports, and the one way to open them.
//!
//! [`open::open`] probes the format, takes QEMU's locks, walks the chain of backing files and gives an [`Image`], which is a
//! [`Volume`]. A LUN is built over it; the PI room and the command line ask it for its path and its stamp.

pub mod create;
pub mod direct;
pub mod error;
mod kernel_copy;
pub mod lock;
pub mod nbd;
pub mod null;
pub mod open;
pub mod overlay;
pub mod owner;
mod power;
pub mod qcow2;
pub mod raw;
mod space;
pub mod tools;

use std::{
    cell::{Cell, RefCell},
    fmt,
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use self::qcow2::SnapshotInfo;
use crate::{
    storage::cache::{CacheCount, CacheCounter},
    sys::mem::Sg,
    units::ByteOffset,
    volume::{
        Extent, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags,
        loan::{Loan, Moved, Place},
    },
};
use lock::{ImageLock, LockError, LockMode};

/// The formats of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(s: &str) -> std::result::Result<Format, UnknownFormat> {
        match s {
            // QEMU writes the protocol's name for a raw backing file that is a file or a device.
            "raw" | "file" | "host_device" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(UnknownFormat(s.to_owned())),
        }
    }
}

/// A name that is no format of ours.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not an image format (raw, qcow2)")]
pub struct UnknownFormat(pub String);

/// What of a file changes when somebody writes to it and stays when `cp -p` or `rsync -a` copies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Time of the last modification: seconds since 1970, and nanoseconds.
    pub mtime: (i64, u32),
}

/// The driver of an open image.
pub enum Driver {
    /// A raw file or block device.
    Raw(raw::Raw),
    /// No file at all.
    Null(null::Null),
    /// A qcow2 image, over its backing files.
    Qcow2(Box<qcow2::Qcow2>),
    /// An export of an NBD server, as raw as a device.
    Nbd(Box<nbd::Nbd>),
}

/// Counters of a chain's metadata caches: L2 tables, refcount blocks.
#[derive(Default)]
struct Caches([CacheCounter; 2]);

/// How the metadata caches of a chain's qcow2 images have done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CacheCounts {
    /// L2 tables.
    pub l2_cache: CacheCount,
    /// Refcount blocks.
    pub refcount_cache: CacheCount,
}

/// One file of an open chain, as it is described.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The file or block device.
    pub path: PathBuf,
    /// What it was opened as.
    pub format: Format,
    /// Bytes of the disk in it.
    pub virtual_size: u64,
    /// Bytes that it takes on the host's file system, if it has a file there.
    pub actual_size: Option<u64>,
    /// Bytes of a cluster, if it has clusters.
    pub cluster_size: Option<u64>,
    /// The backing file's name as it stands in its header, and the format as it stands there.
    pub backing: Option<(String, Option<String>)>,
    /// Its internal snapshots, in the order of their table.
    pub snapshots: Vec<SnapshotInfo>,
}

/// An open image: the driver, the files under it and the locks on them.
pub struct Image {
    driver: Driver,
    path: PathBuf,
    /// None of an NBD export.
    file: Option<Rc<File>>,
    /// The files of the chain, this one first.
    files: Vec<PathBuf>,
    /// The files that hold the guest's bytes, by depth: those of `files`, or their external data files.
    places: Vec<PathBuf>,
    /// What is under this one, from the top down, with the open files.
    beneath: Vec<(ImageInfo, Option<Rc<File>>)>,
    /// Of all qcow2 images of the chain.
    caches: Caches,
    /// What transfers past the page cache have to be multiples of.
    direct_alignment: u32,
    /// What it was like when it was closed.
    left_as: Cell<Option<Stamp>>,
    /// On every file of the chain, by its depth. Given up by `close`, or when the image is dropped.
    locks: RefCell<Vec<(usize, ImageLock)>>,
    /// It is held for this host. Given up by `close`.
    owned: RefCell<Option<owner::Owned>>,
}

impl Image {
    fn new(driver: Driver, path: PathBuf, file: Option<Rc<File>>) -> Image {
        let files = vec![path.clone()];
        let places = files.clone();
        Image {
            driver,
            path,
            file,
            files,
            places,
            beneath: Vec::new(),
            caches: Caches::default(),
            direct_alignment: 1,
            left_as: Cell::default(),
            locks: RefCell::default(),
            owned: RefCell::default(),
        }
    }

    /// The format it was opened as.
    pub fn format(&self) -> Format {
        match self.driver {
            Driver::Raw(_) | Driver::Null(_) | Driver::Nbd(_) => Format::Raw,
            Driver::Qcow2(_) => Format::Qcow2,
        }
    }

    /// The file or block device, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files of the chain, by the depth that [`Extent::depth`] counts: the image, its backing file, and so on.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The files that hold the guest's bytes, by the depth that [`Extent::depth`] counts: what [`Extent::host_offset`] is an offset in.
    pub fn places(&self) -> &[PathBuf] {
        &self.places
    }

    /// How its metadata caches have done, if it is a qcow2 image.
    pub fn caches(&self) -> Option<CacheCounts> {
        let [l2, refcounts] = &self.caches.0;
        (self.format() == Format::Qcow2)
            .then(|| CacheCounts { l2_cache: l2.get(), refcount_cache: refcounts.get() })
    }

    /// The image and its backing files, from the top down, as they are now.
    pub fn describe(&self) -> Vec<ImageInfo> {
        let beneath = self
            .beneath
            .iter()
            .map(|(info, file)| ImageInfo { actual_size: allocated(file.as_deref()), ..info.clone() });
        std::iter::once(self.info()).chain(beneath).collect()
    }

    /// This image alone.
    fn info(&self) -> ImageInfo {
        let (cluster_size, backing) = match &self.driver {
            Driver::Raw(_) | Driver::Null(_) | Driver::Nbd(_) => (None, None),
            Driver::Qcow2(v) => {
                let header = v.header();
                let backing = header.backing_file.clone().map(|name| (name, header.backing_format.clone()));
                (Some(v.cluster_size()), backing)
            }
        };
        ImageInfo {
            path: self.path.clone(),
            format: self.format(),
            virtual_size: self.limits().capacity,
            actual_size: allocated(self.file.as_deref()),
            cluster_size,
            backing,
            snapshots: self.snapshots(),
        }
    }

    /// Its internal snapshots, in the order of their table.
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        match &self.driver {
            Driver::Raw(_) | Driver::Null(_) | Driver::Nbd(_) => Vec::new(),
            Driver::Qcow2(driver) => driver.snapshots().into_iter().map(SnapshotInfo::from).collect(),
        }
    }

    /// Makes durable that the image has another backing file, or none; what is open stays as it is, and has to be closed and opened anew.
    ///
    /// # Errors
    /// `Unsupported` for a format without backing files, and where the header cannot be changed in place.
    pub async fn set_backing(&self, to: Option<(&Path, Format)>) -> Result<()> {
        let Driver::Qcow2(driver) = &self.driver else {
            let what = IoError::new(IoErrorKind::Unsupported, IoOp::Write).path(&self.path);
            return Err(what.detail("only qcow2 images have backing files"));
        };
        let named = to.map(|(path, format)| (path.display().to_string(), format.to_string()));
        driver.set_backing(named.as_ref().map(|(path, format)| (&**path, &**format))).await
    }

    /// The dirty bitmaps that it keeps, in use from now on: every change from then on has to be marked in them. None of a format without.
    ///
    /// # Errors
    /// The image's own.
    pub async fn use_bitmaps(&self) -> Result<Vec<qcow2::StoredBitmap>> {
        match &self.driver {
            Driver::Qcow2(driver) => driver.use_bitmaps().await,
            Driver::Raw(_) | Driver::Null(_) | Driver::Nbd(_) => Ok(Vec::new()),
        }
    }

    /// Stores all dirty bitmaps in place of those that it kept. From then on it can only be closed.
    ///
    /// # Errors
    /// `Unsupported` if it cannot keep any; its own.
    pub async fn store_bitmaps(&self, all: &[qcow2::StoredBitmap]) -> Result<()> {
        match &self.driver {
            Driver::Qcow2(driver) => driver.store_bitmaps(all).await,
            _ if all.is_empty() => Ok(()),
            _ => self.check_bitmaps_work(),
        }
    }

    /// Whether it can keep dirty bitmaps.
    ///
    /// # Errors
    /// `Unsupported`, with the reason.
    pub fn check_bitmaps_work(&self) -> Result<()> {
        match &self.driver {
            Driver::Qcow2(driver) => driver.check_bitmaps_work(),
            Driver::Raw(_) | Driver::Null(_) | Driver::Nbd(_) => {
                let what = IoError::new(IoErrorKind::Unsupported, IoOp::Write).path(&self.path);
                Err(what.detail("only qcow2 images keep dirty bitmaps"))
            }
        }
    }

    /// Gives up the lock on a backing file, for somebody of this process who writes to it, and takes its own.
    pub fn lend(&self, depth: usize) {
        self.locks.borrow_mut().retain(|(of, _)| *of != depth);
    }

    /// Locks a backing file again that was lent. Nothing if the image is closed.
    ///
    /// # Errors
    /// If somebody else has it now.
    pub fn take_back(&self, depth: usize) -> std::result::Result<(), LockError> {
        if self.locks.borrow().is_empty() {
            return Ok(());
        }
        let Some((_, Some(file))) = depth.checked_sub(1).and_then(|at| self.beneath.get(at)) else {
            return Ok(());
        };
        let lock = ImageLock::acquire(file, LockMode::Reader)?;
        self.locks.borrow_mut().push((depth, lock));
        Ok(())
    }

    /// The generation under which it is held, if it has an owner's file.
    pub fn generation(&self) -> Option<u64> {
        self.owned.borrow().as_ref().map(owner::Owned::generation)
    }

    /// The LUN over it was told to end, and will close it: what cannot be had soon is given up.
    pub fn ending(&self) {
        if let Driver::Nbd(v) = &self.driver {
            v.ending();
        }
    }

    /// The driver, for what only one format has.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// Size and modification time of the image's own file, now: not of its backing files, nor of an external data file.
    ///
    /// # Errors
    /// Those of `fstat`.
    pub fn stamp(&self) -> io::Result<Stamp> {
        // As of a block device: an NBD export has no time of its own.
        let Some(file) = &self.file else { return Ok(Stamp { size: self.limits().capacity, mtime: (0, 0) }) };
        let meta = file.metadata()?;
        Ok(Stamp { size: raw::size_of(file)?, mtime: (meta.mtime(), meta.mtime_nsec() as u32) })
    }

    /// The stamp that it had when it was closed in good order, taken before anybody else could have it.
    pub fn left_as(&self) -> Option<Stamp> {
        self.left_as.get()
    }
}

/// Bytes that a file takes on its file system; `None`, if it is not known.
fn allocated(file: Option<&File>) -> Option<u64> {
    // Of a file that is open fstat fails only where the host has lost its file system.
    file.map(|file| file.metadata().map_or(0, |meta| meta.blocks() * 512))
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}, {})", self.path.display(), self.format())
    }
}

/// Calls the driver, whichever it is, and waits for it. What qcow2 may wait for is boxed: it would make the future of every command
/// as large as the largest of its operations, of raw images too, and futures are copied. (Its reads and writes box what they must themselves.)
macro_rules! driver {
    ($self:ident, $v:ident => $call:expr) => {
        match &$self.driver {
            Driver::Raw($v) => $call.await,
            Driver::Null($v) => $call.await,
            Driver::Qcow2($v) => Box::pin($call).await,
            Driver::Nbd($v) => Box::pin($call).await,
        }
    };
}

impl Volume for Image {
    fn limits(&self) -> Limits {
        match &self.driver {
            Driver::Raw(v) => v.limits(),
            Driver::Null(v) => v.limits(),
            Driver::Qcow2(v) => v.limits(),
            Driver::Nbd(v) => v.limits(),
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        match &self.driver {
            Driver::Raw(v) => v.read(at, to).await,
            Driver::Null(v) => v.read(at, to).await,
            Driver::Qcow2(v) => v.read(at, to).await,
            Driver::Nbd(v) => Box::pin(v.read(at, to)).await,
        }
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        if flags.atomic && !self.limits().keeps_whole(at, from.len() as u64) {
            let why = "this image cannot write so much as a whole";
            return Err(IoError::new(IoErrorKind::Unsupported, IoOp::Write).at(at).detail(why));
        }
        match &self.driver {
            Driver::Raw(v) => v.write(at, from, flags).await,
            Driver::Null(v) => v.write(at, from, flags).await,
            Driver::Qcow2(v) => v.write(at, from, flags).await,
            Driver::Nbd(v) => Box::pin(v.write(at, from, flags)).await,
        }
    }

    async fn lend_blocks<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        match &self.driver {
            Driver::Raw(v) => v.lend_blocks(at, len, with).await,
            Driver::Null(_) | Driver::Qcow2(_) | Driver::Nbd(_) => with(None).await,
        }
    }

    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        match &self.driver {
            Driver::Raw(v) => v.take_blocks(at, loan).await,
            Driver::Null(_) | Driver::Qcow2(_) | Driver::Nbd(_) => Moved::Never,
        }
    }

    async fn flush(&self) -> Result<()> {
        driver!(self, v => v.flush())
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        driver!(self, v => v.discard(at, len))
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        driver!(self, v => v.write_zeroes(at, len, may_unmap))
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        driver!(self, v => v.map_extents(at, len))
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        driver!(self, v => v.resize(capacity))
    }

    async fn free_bytes(&self) -> Option<u64> {
        driver!(self, v => v.free_bytes())
    }

    async fn close(&self) -> Result<()> {
        let closed = driver!(self, v => v.close());
        self.left_as.set(self.stamp().ok().filter(|_| closed.is_ok()));
        if let Some(owned) = self.owned.take()
            && let Err(e) = owned.end()
        {
            tracing::warn!(image = %self.path.display(), "it could not be given back: {e}");
        }
        self.locks.borrow_mut().clear();
        closed
    }
}
