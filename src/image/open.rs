//! The one way to open an image: look at the file, lock it, find out its format, do the same for its backing files, and
//! build the drivers from the bottom up.
//!
//! An image that is given up half-way leaves nothing behind: files are closed and locks given back as the layers are
//! dropped. The lock is taken before the first byte is read, so nothing that is read here can change any more.

use std::{
    fs::{self, File},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::fs::OFlags;

pub use super::error::{MAX_CHAIN, OpenError, OpenErrorKind};
use super::{
    Caches, Driver, Format, Image,
    direct::{CacheMode, Ways},
    lock::{ImageLock, LockMode},
    nbd, null,
    owner::{Own, Owned},
    qcow2::{self, Backing, MAX_CLUSTER, Qcow2, probe_header},
    raw::{QCOW2_MAGIC, Raw},
};
use crate::{
    sys::{
        io::Io,
        mem::{Buffer, page_size},
    },
    units::BlockSize,
    volume::Volume,
};

/// How an image is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// Writes are refused, and other readers are tolerated.
    pub read_only: bool,
    /// The format; by the first bytes if it is not given. An image that is probed raw refuses to be turned into qcow2 by a write.
    pub format: Option<Format>,
    /// Take QEMU's locks. Only a look at an image that somebody else has goes without.
    pub lock: bool,
    /// Bytes of metadata that the chain's images may hold in memory, each its share; [`qcow2::CACHE_SIZE`] if it is not given.
    pub cache_size: Option<u64>,
    /// `/dev/null` is a disk of that many bytes ([`null`]); otherwise it is no image.
    pub null_size: Option<u64>,
    /// What lies between the image's files and their storage.
    pub cache: CacheMode,
    /// Take the image, if it has an owner's file ([`super::owner`]), until it is closed; all I/O of the thread is fenced then. Otherwise it is only
    /// refused if it is another host's.
    pub own: Option<Own>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            format: None,
            lock: true,
            cache_size: None,
            null_size: None,
            cache: CacheMode::Writeback,
            own: None,
        }
    }
}

/// One file of a chain.
pub(super) struct Layer {
    path: PathBuf,
    pub(super) file: Rc<File>,
    pub(super) format: Format,
    probed: bool,
    /// Its clusters are smaller than a page, if it has any.
    small_clusters: bool,
    pub(super) lock: Option<ImageLock>,
    data: Option<DataFile>,
}

/// An external data file of a qcow2 image.
struct DataFile {
    path: PathBuf,
    file: Rc<File>,
    lock: Option<ImageLock>,
}

/// Opens an image and its backing files.
///
/// # Errors
/// Every way in which the path, the file, its header, its locks or its chain can be wrong: see [`OpenErrorKind`].
pub async fn open(io: &Io, path: &Path, options: &OpenOptions) -> Result<Image, OpenError> {
    let image = open_any_size(io, path, options).await?;
    image.check_block_size(BlockSize::B512)?;
    Ok(image)
}

/// [`open`] for an image that need not be a disk, but may lie under one, or become one.
///
/// # Errors
/// As [`open`], but for the size.
pub async fn open_any_size(io: &Io, path: &Path, options: &OpenOptions) -> Result<Image, OpenError> {
    if let Some(size) = options.null_size.filter(|_| null::is_null(path)) {
        let file = File::open(path).map_err(|e| OpenError::io(path, e, false))?;
        let driver = Driver::Null(null::Null::new(size, options.read_only));
        return Ok(Image::new(driver, path.to_owned(), Some(Rc::new(file))));
    }
    if nbd::is_uri(path) {
        if options.format == Some(Format::Qcow2) {
            return Err(OpenError::new(path, OpenErrorKind::NotForNbd("is used as it is, as raw")));
        }
        // There are no locks over NBD.
        let driver = nbd::Nbd::open(io, path, options.read_only).await?;
        return Ok(Image::new(Driver::Nbd(Box::new(driver)), path.to_owned(), None));
    }
    let layers = open_chain(io, path, options).await?;
    // With the locks, and before anything is written.
    let owned = if options.lock { Owned::begin(io, path, options.own.as_ref())? } else { None };
    match build(io, path, options, layers).await {
        Ok(image) => {
            image.owned.replace(owned);
            tracing::debug!(path = %path.display(), format = %image.format(), depth = image.files.len(), "opened an image");
            Ok(image)
        }
        Err(e) => {
            owned
                .map_or(Ok(()), Owned::end)
                .unwrap_or_else(|error| tracing::warn!(%error, "the image could not be given back"));
            Err(e)
        }
    }
}

/// The drivers over the files, from the bottom up.
async fn build(io: &Io, path: &Path, options: &OpenOptions, layers: Vec<Layer>) -> Result<Image, OpenError> {
    let mut locks = Vec::new();
    let mut image: Option<Image> = None;
    let depth = layers.len();
    let cache_share = options.cache_size.unwrap_or(qcow2::CACHE_SIZE) / depth.max(1) as u64;
    let caches = Caches::default();
    let mut beneath = Vec::new();
    let mut alignment = 1;
    let names: Vec<PathBuf> = layers.iter().map(|l| l.path.clone()).collect();
    let places = layers.iter().map(|l| l.data.as_ref().map_or(&l.path, |d| &d.path).clone()).collect();
    for (i, mut layer) in layers.into_iter().enumerate().rev() {
        locks.extend(layer.lock.take().map(|lock| (i, lock)));
        let below = layer.data.take().map(|mut data| {
            locks.extend(data.lock.take().map(|lock| (i, lock)));
            data.file
        });
        let read_only = options.read_only || i > 0;
        let ways = |file: Rc<File>, path: &Path| match options.cache {
            CacheMode::Writeback => Ok(Ways::from(file)),
            CacheMode::None if layer.small_clusters => {
                let why = "its clusters are smaller than a page, and share pages with its tables";
                Err(OpenError::new(path, OpenErrorKind::NoDirect).source(std::io::Error::other(why)))
            }
            CacheMode::None => Ways::past_the_cache(file, read_only).map_err(|e| OpenError::direct(path, e)),
        };
        let file = ways(layer.file.clone(), &layer.path)?;
        let below = below.map(|file| ways(file, &layer.path)).transpose()?;
        alignment = alignment.max(file.alignment()).max(below.as_ref().map_or(1, Ways::alignment));
        let driver = match layer.format {
            Format::Raw => Raw::new(io, file, &layer.path, read_only, layer.probed).map(Driver::Raw),
            Format::Qcow2 => {
                let backing = image.take().map(|image| {
                    beneath.insert(0, (image.info(), image.file.clone()));
                    Rc::new(image) as Backing
                });
                let opened = Qcow2::open(io, file, below, &layer.path, read_only, backing).await;
                opened.map(|mut driver| {
                    driver.set_caches(cache_share, &caches.0);
                    Driver::Qcow2(Box::new(driver))
                })
            }
        };
        let above = i.checked_sub(1).map(|i| names[i].clone());
        let driver = driver.map_err(|e| OpenError::driver(&layer.path, e).backing_of(above))?;
        image = Some(Image::new(driver, layer.path, Some(layer.file)));
    }
    let Some(mut image) = image else { return Err(OpenError::new(path, OpenErrorKind::Io)) };
    image.locks.replace(locks);
    image.files = names;
    image.places = places;
    image.beneath = beneath;
    image.caches = caches;
    image.direct_alignment = alignment;
    Ok(image)
}

impl Image {
    /// Refuses an image that cannot be a disk with blocks of that size.
    ///
    /// # Errors
    /// [`OpenErrorKind::Empty`] and [`OpenErrorKind::SizeNotMultiple`].
    pub fn check_block_size(&self, block_size: BlockSize) -> Result<(), OpenError> {
        let size = self.limits().capacity;
        if size == 0 {
            return Err(OpenError::new(self.path(), OpenErrorKind::Empty));
        }
        if !size.is_multiple_of(block_size.bytes()) {
            let what = OpenErrorKind::SizeNotMultiple { size, block_size: block_size.bytes() };
            return Err(OpenError::new(self.path(), what));
        }
        Ok(())
    }

    /// Refuses a disk whose blocks are too small to go past the cache, if they are to.
    ///
    /// # Errors
    /// [`OpenErrorKind::Sectors`].
    pub fn check_sectors(&self, block_size: BlockSize) -> Result<(), OpenError> {
        let (sector, block_size) = (self.direct_alignment, block_size.bytes());
        match u64::from(sector) <= block_size {
            true => Ok(()),
            false => Err(OpenError::new(self.path(), OpenErrorKind::Sectors { sector, block_size })),
        }
    }
}

/// The image and its backing files, from the top down.
async fn open_chain(io: &Io, path: &Path, options: &OpenOptions) -> Result<Vec<Layer>, OpenError> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut seen = Vec::new();
    // A file that is met again: the chain, or an image's own data, comes back to it.
    let mut notice = |id| {
        if seen.contains(&id) {
            return Err(OpenError::new(path, OpenErrorKind::BackingLoop));
        }
        seen.push(id);
        Ok(())
    };
    let mut next = Some((path.to_owned(), options.format));
    while let Some((path, format)) = next.take() {
        let backing_of = layers.last().map(|l| l.path.clone());
        let read_only = options.read_only || backing_of.is_some();
        let of = |e: OpenError| e.backing_of(backing_of.clone());
        if layers.len() == MAX_CHAIN {
            return Err(OpenError::new(&layers[0].path, OpenErrorKind::ChainTooLong));
        }
        let (file, id) = open_file(io, &path, read_only).await.map_err(of)?;
        notice(id)?;
        let (mut layer, head) = look(io, &path, file, format, read_only, options.lock).await.map_err(of)?;
        if layer.format == Format::Qcow2 {
            let header = probe_header(&head).map_err(|e| of(OpenError::header(&path, e)))?;
            layer.small_clusters = header.geometry().cluster() < page_size();
            let (name, format) = (header.backing_file.as_deref(), header.backing_format.as_deref());
            next = backing(&path, name, format).map_err(|what| of(OpenError::new(&path, what)))?;
            if let Some(name) = &header.data_file {
                let at = data_file(&path, name).map_err(|what| of(OpenError::new(&path, what)))?;
                let (file, id) = open_file(io, &at, read_only).await.map_err(of)?;
                notice(id)?;
                let lock = lock_file(&file, &at, read_only, options.lock).map_err(of)?;
                layer.data = Some(DataFile { path: at, file, lock });
            }
        }
        layers.push(layer);
    }
    Ok(layers)
}

fn lock_file(
    file: &Rc<File>,
    path: &Path,
    read_only: bool,
    lock: bool,
) -> Result<Option<ImageLock>, OpenError> {
    let mode = if read_only { LockMode::Reader } else { LockMode::Writer };
    let lock = lock.then(|| ImageLock::acquire(file, mode)).transpose();
    lock.map_err(|e| OpenError::lock(path, e))
}

/// The external data file that a header names. It has to lie beside the image: whoever made the image chose the name, and may be a
/// guest's owner, who has no business with other files of the host (CVE-2024-32498).
pub(super) fn data_file(image: &Path, name: &str) -> Result<PathBuf, OpenErrorKind> {
    let directory = image.parent().unwrap_or(Path::new(""));
    let file = directory.join(name.strip_prefix("file:").unwrap_or(name));
    let real = |directory: &Path| {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        fs::canonicalize(directory).ok()
    };
    let beside =
        |parent: &Path| parent == directory || real(parent).is_some_and(|p| Some(p) == real(directory));
    match file.file_name().is_some() && file.parent().is_some_and(beside) {
        true => Ok(file),
        false => Err(OpenErrorKind::DataFileElsewhere(name.to_owned())),
    }
}

/// One file alone, opened and locked.
pub(super) async fn open_layer(
    io: &Io,
    path: &Path,
    format: Option<Format>,
    read_only: bool,
    lock: bool,
) -> Result<Layer, OpenError> {
    let (file, _) = open_file(io, path, read_only).await?;
    Ok(look(io, path, file, format, read_only, lock).await?.0)
}

/// Locks an open file and finds out what it is; gives its first bytes too.
async fn look(
    io: &Io,
    path: &Path,
    file: Rc<File>,
    format: Option<Format>,
    read_only: bool,
    lock: bool,
) -> Result<(Layer, Vec<u8>), OpenError> {
    let lock = lock_file(&file, path, read_only, lock)?;
    let head = read_head(io, &file).await.map_err(|e| OpenError::io(path, e, false))?;
    let probed = format.is_none();
    let format = match (format, head.starts_with(&QCOW2_MAGIC)) {
        (Some(Format::Qcow2), false) => return Err(OpenError::new(path, OpenErrorKind::NotQcow2)),
        (Some(format), _) => format,
        (None, true) => Format::Qcow2,
        (None, false) => Format::Raw,
    };
    let layer =
        Layer { path: path.to_owned(), file, format, probed, small_clusters: false, lock, data: None };
    Ok((layer, head))
}

/// The backing file that a header names, and its format. A relative name is relative to the image's directory, as the image
/// was named: symbolic links are not resolved first, which is how QEMU does it.
pub(super) fn backing(
    image: &Path,
    name: Option<&str>,
    format: Option<&str>,
) -> Result<Option<(PathBuf, Option<Format>)>, OpenErrorKind> {
    let Some(name) = name.filter(|n| !n.is_empty()) else { return Ok(None) };
    let file = match name.split_once(':') {
        Some(("file", file)) => file,
        // A colon before any slash ends the name of a protocol (`nbd://`, `json:{`).
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(OpenErrorKind::BackingProtocol(name.to_owned()));
        }
        _ => name,
    };
    let format = match format {
        Some(format) => match format.parse() {
            Ok(format) => Some(format),
            Err(_) => return Err(OpenErrorKind::BackingFormat(format.to_owned())),
        },
        None => None,
    };
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(Some((directory.join(file), format)))
}

/// The first bytes: of a qcow2 image the whole first cluster, where the header, its extensions and the name of the backing
/// file are.
async fn read_head(io: &Io, file: &Rc<File>) -> std::io::Result<Vec<u8>> {
    let mut want = 64 << 10;
    loop {
        let head = Buffer::zeroed(want);
        let n = io.read(file, 0, &head.sg()).await?;
        let mut bytes = head.to_vec();
        bytes.truncate(n);
        // cluster_bits, at byte 20.
        let large = bytes.starts_with(&QCOW2_MAGIC)
            && bytes.get(20..24).is_some_and(|b| b > [0, 0, 0, 16].as_slice());
        if !large || want == MAX_CLUSTER {
            return Ok(bytes);
        }
        want = MAX_CLUSTER;
    }
}

/// Opens a regular file or block device, and nothing else: opening a FIFO would wait, opening a tape would rewind it.
async fn open_file(io: &Io, path: &Path, read_only: bool) -> Result<(Rc<File>, (u64, u64)), OpenError> {
    if nbd::is_uri(path) {
        let why = "this is for files and block devices of this host";
        return Err(OpenError::new(path, OpenErrorKind::NotForNbd(why)));
    }
    let wanted = path.to_owned();
    let call = move || {
        let failed = |e| OpenError::io(&wanted, e, !read_only);
        let seen = fs::metadata(&wanted).map_err(failed)?;
        identity(&seen).map_err(|what| OpenError::new(&wanted, what))?;
        let mut flags = OFlags::NONBLOCK;
        if seen.file_type().is_block_device() && !read_only {
            // Without O_CREAT: refuse a device that is mounted or otherwise claimed (open(2)).
            flags |= OFlags::EXCL;
        }
        let file = fs::OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags.bits() as i32)
            .open(&wanted)
            .map_err(failed)?;
        // The path may name something else by now; and O_NONBLOCK means EAGAIN to io_uring.
        let meta = file.metadata().map_err(failed)?;
        let id = identity(&meta).map_err(|what| OpenError::new(&wanted, what))?;
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
        Ok((file, id))
    };
    let opened = io.blocking(call).await.map_err(|e| OpenError::io(path, e, !read_only))?;
    opened.map(|(file, id)| (Rc::new(file), id))
}

/// What tells this file or device from any other, if it is one that can be an image.
fn identity(meta: &fs::Metadata) -> Result<(u64, u64), OpenErrorKind> {
    let kind = meta.file_type();
    if kind.is_file() {
        return Ok((meta.dev(), meta.ino()));
    }
    if kind.is_block_device() {
        return Ok((u64::MAX, meta.rdev()));
    }
    Err(OpenErrorKind::NotAnImage(match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_char_device() => "a character device",
        () if kind.is_socket() => "a socket",
        () => "neither a file nor a block device",
    }))
}
