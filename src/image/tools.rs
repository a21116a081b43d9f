//! What is done with an image that nobody uses: check, repair, map, measure. For check and repair the file is opened alone,
//! without its backing files, which may be missing. QEMU's locks keep others out.
//!
//! Called by `tcmu-dif image`.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;

use super::{
    Driver, Format, Image,
    open::{OpenError, OpenOptions, open_any_size, open_layer},
    qcow2::{
        CheckReport, CreateOptions, FileStorage, Repair, bitmaps_size, check_on, check_options, full_size,
        looks_preallocated, repair_on,
    },
    raw::seek_runs,
};
use crate::{
    sys::io::Io,
    units::ByteOffset,
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Volume},
};

/// How an image is checked.
#[derive(Debug, Clone, Copy)]
pub struct CheckOptions {
    /// The format; by the first bytes if it is not given.
    pub format: Option<Format>,
    /// What to mend. The image is then locked as a writer does.
    pub repair: Option<Repair>,
    /// Take QEMU's locks. Without them an image that is being written may seem damaged.
    pub lock: bool,
}

/// Checks an image, and repairs it if that is asked for. `progress` is told of the bytes of metadata that have been read, and
/// how many there are, again for each pass. `None`: the format keeps nothing that could be checked.
///
/// # Errors
/// Every way in which the path, the file, its locks and its header can be wrong.
pub async fn check(
    io: &Io,
    path: &Path,
    options: CheckOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<Option<CheckReport>, OpenError> {
    let read_only = options.repair.is_none();
    let layer = open_layer(io, path, options.format, read_only, options.lock).await?;
    if layer.format == Format::Raw {
        return Ok(None);
    }
    let failed = |e| OpenError::driver(path, e);
    let storage = FileStorage::new(io, layer.file.clone())
        .map_err(|e| failed(IoError::from_io(IoOp::Open, e).path(path)))?;
    let report = match options.repair {
        None => check_on(&storage, path, &mut progress).await,
        Some(what) => repair_on(&storage, path, what, &mut progress).await,
    };
    drop(layer.lock);
    report.map(Some).map_err(failed)
}

/// Which part of an image is mapped.
#[derive(Debug, Clone, Copy)]
pub struct MapOptions {
    /// The format; by the first bytes if it is not given.
    pub format: Option<Format>,
    /// Take QEMU's locks.
    pub lock: bool,
    /// The first byte.
    pub start: u64,
    /// Bytes at most.
    pub len: u64,
}

/// A run of a map, as `qemu-img map` tells it, in its JSON too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Mapped {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    #[serde(rename = "length")]
    pub len: u64,
    /// 0 for the image itself, 1 for its backing file, and so on.
    pub depth: u32,
    /// Some file of the chain says what is there.
    pub present: bool,
    /// It reads as zeros.
    pub zero: bool,
    /// A cluster holds it.
    pub data: bool,
    /// Where in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl Mapped {
    fn of(extent: &Extent) -> Mapped {
        let data = extent.kind == ExtentKind::Data;
        Mapped {
            start: extent.start.0,
            len: extent.len,
            depth: extent.depth,
            present: extent.kind != ExtentKind::Unallocated,
            zero: !data,
            data,
            offset: extent.host_offset,
        }
    }

    fn joins(&self, next: &Mapped) -> bool {
        let offset = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a + self.len == b,
            (a, b) => a == b,
        };
        let what = |m: &Mapped| (m.depth, m.present, m.zero, m.data);
        offset && what(self) == what(next)
    }
}

/// The map of an image across its backing files, and the files by depth.
///
/// # Errors
/// Every way in which one of the files cannot be opened or read.
pub async fn map(
    io: &Io,
    path: &Path,
    options: MapOptions,
) -> Result<(Vec<Mapped>, Vec<PathBuf>), OpenError> {
    let how =
        OpenOptions { read_only: true, format: options.format, lock: options.lock, ..OpenOptions::default() };
    let image = open_any_size(io, path, &how).await?;
    let runs = map_image(io, &image, options.start, options.len).await?;
    let files = image.places().to_vec();
    image.close().await.map_err(|e| OpenError::driver(path, e))?;
    Ok((runs, files))
}

async fn map_image(io: &Io, image: &Image, start: u64, len: u64) -> Result<Vec<Mapped>, OpenError> {
    let mut sparse = Vec::new();
    for (path, place) in image.files().iter().zip(image.places()) {
        sparse.push(if path == place { sparse_qcow2(io, path).await? } else { None });
    }
    let mut runs: Vec<Mapped> = Vec::new();
    let end = image.limits().capacity.min(start.saturating_add(len));
    let mut pos = start;
    while pos < end {
        let extents = image.map_extents(ByteOffset(pos), end - pos).await;
        let extents = extents.map_err(|e| OpenError::driver(image.path(), e))?;
        let Some(stop) = extents.last().map(|e| e.start.0 + e.len) else { break };
        for extent in &extents {
            let run = Mapped::of(extent);
            let parts = match (sparse.get(run.depth as usize), run.offset) {
                (Some(Some(file)), Some(offset)) if run.data => {
                    holes(io, file, run, offset).await.map_err(|e| OpenError::io(image.path(), e, false))?
                }
                _ => vec![run],
            };
            for part in parts {
                match runs.last_mut() {
                    Some(last) if last.joins(&part) => last.len += part.len,
                    _ => runs.push(part),
                }
            }
        }
        pos = stop;
    }
    Ok(runs)
}

/// The file of a qcow2 image that has places for more than it holds.
async fn sparse_qcow2(io: &Io, path: &Path) -> Result<Option<Arc<File>>, OpenError> {
    let layer = open_layer(io, path, None, true, false).await?;
    if layer.format == Format::Raw {
        return Ok(None);
    }
    let meta = layer.file.metadata().map_err(|e| OpenError::io(path, e, false))?;
    let failed = |e| OpenError::driver(path, e);
    let storage = FileStorage::new(io, layer.file.clone())
        .map_err(|e| failed(IoError::from_io(IoOp::Open, e).path(path)))?;
    // st_blocks counts 512 bytes whatever the file system's block is (stat(2)).
    let looks =
        meta.is_file() && looks_preallocated(&storage, path, meta.blocks() * 512).await.map_err(failed)?;
    let file = layer.file.try_clone().map_err(|e| OpenError::io(path, e, false))?;
    Ok(looks.then(|| Arc::new(file)))
}

/// A run of data by what the file has there: holes read as zeros.
async fn holes(io: &Io, file: &Arc<File>, run: Mapped, offset: u64) -> std::io::Result<Vec<Mapped>> {
    let file = file.clone();
    let mut parts = Vec::new();
    let mut pos = offset;
    while pos < offset + run.len {
        let (file, end) = (file.clone(), offset + run.len);
        let found = io.blocking(move || seek_runs(&file, pos, end)).await??;
        let Some((at, len, _)) = found.last().copied() else { break };
        for (at, len, data) in found {
            let start = run.start + (at - offset);
            parts.push(Mapped { start, len, zero: !data, offset: Some(at), ..run });
        }
        pos = at + len;
    }
    Ok(parts)
}

/// What is measured, and for which new image.
#[derive(Debug, Clone)]
pub struct MeasureOptions {
    /// The old image's format; by the first bytes if it is not given.
    pub format: Option<Format>,
    /// Take QEMU's locks.
    pub lock: bool,
    /// The new image's format.
    pub to: Format,
    /// The new image's options; the size is the old image's if there is one.
    pub create: CreateOptions,
    /// All of it gets space at once (preallocation=falloc or full).
    pub full: bool,
}

/// Bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// That a new image with this content needs at most.
    pub required: u64,
    /// That it needs when every cluster has been written to.
    pub fully_allocated: u64,
    /// That the old image's bitmaps need besides, where the new one can have them. We carry none over.
    pub bitmaps: Option<u64>,
}

/// Measures a disk with nothing on it; the options have been checked.
pub fn measure_empty(options: &MeasureOptions) -> Measured {
    measured(options, 0)
}

fn measured(options: &MeasureOptions, data: u64) -> Measured {
    let size = options.create.size;
    if options.to == Format::Raw {
        return Measured { required: size, fully_allocated: size, bitmaps: None };
    }
    let fully_allocated = full_size(&options.create);
    let size = size.next_multiple_of(options.create.cluster_size);
    let data = if options.full { size } else { data.min(size) };
    Measured { required: fully_allocated - size + data, fully_allocated, bitmaps: None }
}

/// Measures a new image with an old one's content: whole clusters where the old one has data that are not zeros.
///
/// # Errors
/// As [`map`]; and if the new image cannot have that size.
pub async fn measure(io: &Io, path: &Path, options: &MeasureOptions) -> Result<Measured, OpenError> {
    let how =
        OpenOptions { read_only: true, format: options.format, lock: options.lock, ..OpenOptions::default() };
    let image = open_any_size(io, path, &how).await?;
    let mut options = options.clone();
    options.create.size = image.limits().capacity;
    if options.to == Format::Raw {
        return Ok(measured(&options, 0));
    }
    if let Err(e) = check_options(&options.create) {
        let e = IoError::new(IoErrorKind::Unsupported, IoOp::Map).path(path).detail(e.to_string());
        return Err(OpenError::driver(path, e));
    }
    let cluster = options.create.cluster_size;
    let (mut data, mut counted) = (0, 0);
    for run in map_image(io, &image, 0, u64::MAX).await?.iter().filter(|run| !run.zero) {
        let start = (run.start / cluster * cluster).max(counted);
        let end = (run.start + run.len).next_multiple_of(cluster);
        data += end.saturating_sub(start);
        counted = counted.max(end);
    }
    let mut measured = measured(&options, data);
    if let Driver::Qcow2(driver) = image.driver()
        && driver.header().version >= 3
        && options.create.version >= 3
    {
        let failed = |e| OpenError::io(path, e, false);
        if let Some(file) = image.file.clone() {
            let storage = FileStorage::new(io, file).map_err(failed)?;
            measured.bitmaps = Some(bitmaps_size(&storage, driver.header(), cluster).await.map_err(failed)?);
        }
    }
    Ok(measured)
}
