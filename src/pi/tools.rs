//! What an administrator does to protection information: make it, ask about it, verify an image against it, make it anew.
//!
//! For the command line. The caller has the image open and locked, read-only for all of these: nothing here writes to it.
//! Memory is bounded, and holes cost nothing, however large the image.

use std::{
    ffi::OsString,
    fs::File,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use adopt::{AdoptReport, adopt};

use super::{
    chain::Beneath,
    check::Checker,
    error::{PiOpenError, PiOpenErrorKind as Kind},
    exposure::Exposure,
    guard::Guard,
    recompute::{Mode, ReadBlocks, Recomputed, Run, bytes, next_run, read_blocks, recompute},
    replay::{Sink, replay},
    store::{
        ImageFormat, NewSidecar, PiMode, Sidecar, SidecarInfo, Stamp, StoreError, create_file, open_file,
    },
    tuple::PiType,
};
use crate::{
    files,
    nbd::uri::is_uri,
    storage::{FileStorage, Storage},
    sys::{exec::join, io::Io, mem::Sg},
    units::{BlockSize, Lba},
    volume::{IoError, IoOp, PiMismatch, Result, Volume},
};

/// Mismatches that a report lists one by one.
pub const LISTED: usize = 100;

/// A block that does not match its tuple.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadBlock {
    /// The block.
    pub lba: u64,
    /// Which tag failed: `guard`, `application tag` or `reference tag`.
    pub tag: String,
    /// What the tag should be.
    pub expected: u32,
    /// What it is.
    pub found: u32,
    /// Where the block's data lie in the file, if they lie there as they are.
    pub host_offset: Option<u64>,
    /// In which file: 0 for the image, 1 for its backing file, and so on.
    pub depth: u32,
    /// That file's path, if it is known.
    pub file: Option<PathBuf>,
}

impl BadBlock {
    fn new(run: &Run, size: BlockSize, m: PiMismatch) -> BadBlock {
        BadBlock {
            lba: m.lba.0,
            tag: m.tag.to_string(),
            expected: m.expected,
            found: m.found,
            host_offset: run.host_offset.map(|host| host + ((m.lba.0 - run.blocks.start) << size.shift())),
            depth: run.data_depth.unwrap_or(0),
            file: None,
        }
    }
}

/// Names the files in which the blocks lie, of an image whose chain has these.
pub fn name_files(bad: &mut [BadBlock], files: &[PathBuf]) {
    for block in bad {
        block.file = files.get(block.depth as usize).cloned();
    }
}

/// How a verification went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// Blocks of the LUN.
    pub blocks: u64,
    /// Blocks that match their tuple.
    pub verified: u64,
    /// Blocks with data and without protection.
    pub unprotected: u64,
    /// Blocks that do not match.
    pub mismatches: u64,
    /// Blocks that do not match and lie where a crash may have cut off a write: the next start makes their tuples anew.
    pub in_doubt: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
    /// The first [`LISTED`] mismatches.
    pub bad: Vec<BadBlock>,
}

impl VerifyReport {
    /// Checks the blocks of a run that have been read and counts how they are. What does not match and `is_marked` is in doubt.
    pub(super) fn take(
        &mut self,
        checker: &Checker,
        run: &Run,
        (data, unreadable): (&Sg, &[usize]),
        tuples: &[u8],
        is_marked: impl Fn(Lba) -> bool,
    ) {
        checker.check(data, Lba(run.blocks.start), tuples, |i, _, found| match found {
            _ if unreadable.binary_search(&i).is_ok() => self.unreadable += 1,
            Ok(true) => self.verified += 1,
            Ok(false) => self.unprotected += u64::from(run.data_depth.is_some()),
            Err(m) if is_marked(m.lba) => self.in_doubt += 1,
            Err(m) => {
                self.mismatches += 1;
                if self.bad.len() < LISTED {
                    self.bad.push(BadBlock::new(run, checker.block_size, m));
                }
            }
        });
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.mismatches == 0 && self.unreadable == 0
    }
}

/// How a rebuild went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RebuildReport {
    /// Blocks of the LUN.
    pub blocks: u64,
    /// Blocks that have a tuple now.
    pub protected: u64,
    /// Blocks that could not be read, and are without protection.
    pub unreadable: u64,
    /// The type of protection.
    pub pi: Option<PiType>,
    /// How it stays true across a crash.
    pub mode: PiMode,
    /// The block size in bytes.
    pub block_size: u64,
}

/// What is to be said about a sidecar.
#[derive(Debug, Clone, Serialize)]
pub struct StatusReport {
    /// Its header.
    #[serde(flatten)]
    pub info: SidecarInfo,
    /// The image now.
    pub found: Stamp,
    /// The image has been changed by something else since the clean close. `None` while in use, or after a crash.
    pub image_changed: Option<bool>,
}

/// Makes a new sidecar: no block is protected until it is written, or until [`rebuild`].
///
/// # Errors
/// [`Kind::Exists`] if there is something, or what the file says.
pub async fn create(
    io: &Io,
    image: &Path,
    sidecar: &Path,
    new: NewSidecar,
) -> std::result::Result<(), PiOpenError> {
    let fault = |what| PiOpenError::new(sidecar, image, what);
    let storage = match create_file(io, sidecar).await {
        Ok(storage) => storage,
        // A crash right after the file was made leaves it empty.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let there = open_file(io, sidecar, false).await.map_err(|e| fault(Kind::Store(e.into())))?;
            match there.len().await {
                Ok(0) => there,
                _ => return Err(fault(Kind::Exists)),
            }
        }
        Err(e) => return Err(fault(Kind::Store(e.into()))),
    };
    Sidecar::create(storage, new).await.map_err(|e| fault(Kind::Store(e)))?;
    Ok(())
}

/// Opens a sidecar to look at.
///
/// # Errors
/// [`Kind::Missing`] or [`Kind::Store`].
pub async fn inspect(
    io: &Io,
    image: &Path,
    sidecar: &Path,
) -> std::result::Result<Sidecar<FileStorage>, PiOpenError> {
    let fault = |what| PiOpenError::new(sidecar, image, what);
    match open_file(io, sidecar, true).await {
        Ok(storage) => Sidecar::open(storage).await.map_err(|e| fault(Kind::Store(e))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(fault(Kind::Missing)),
        Err(e) => Err(fault(Kind::Store(e.into()))),
    }
}

/// What a sidecar says, and whether the image is still the one that it was closed with.
///
/// # Errors
/// As [`inspect`]; [`Kind::Image`] if the image cannot be looked at.
pub async fn status(io: &Io, image: &Path, sidecar: &Path) -> std::result::Result<StatusReport, PiOpenError> {
    let info = inspect(io, image, sidecar).await?.info();
    // Nothing tells an NBD export from what it was, as nothing does of a block device.
    let found = if is_uri(image) { Stamp::of_size(info.stamp.size) } else { stamp_of(image, sidecar)? };
    let image_changed = (!info.in_use).then_some(!info.stamp.matches(&found));
    Ok(StatusReport { info, found, image_changed })
}

/// Brings the image's data to stable storage, whoever wrote them: a tuple that outlives its data is a false alarm.
async fn sync_image(
    volume: &impl Volume,
    image: &Path,
    sidecar: &Path,
) -> std::result::Result<(), PiOpenError> {
    if is_uri(image) {
        let flushed = volume.flush().await;
        return flushed.map_err(|e| PiOpenError::new(sidecar, image, Kind::Image(Box::new(e))));
    }
    // A volume that is read-only flushes nothing; the data may be in the page cache alone.
    File::open(image).and_then(|file| file.sync_data()).map_err(|e| {
        let e = IoError::from_io(IoOp::Flush, e).path(image);
        PiOpenError::new(sidecar, image, Kind::Image(Box::new(e)))
    })
}

/// The stamp of a volume's image.
fn stamp_now(volume: &impl Volume, image: &Path, sidecar: &Path) -> std::result::Result<Stamp, PiOpenError> {
    if is_uri(image) { Ok(Stamp::of_size(volume.limits().capacity)) } else { stamp_of(image, sidecar) }
}

fn stamp_of(image: &Path, sidecar: &Path) -> std::result::Result<Stamp, PiOpenError> {
    Stamp::of(image).map_err(|e| {
        PiOpenError::new(sidecar, image, Kind::Image(Box::new(IoError::from_io(IoOp::Open, e).path(image))))
    })
}

/// Reads all data that have tuples and checks them. `progress` hears bytes done and bytes in all. What only a backing file
/// holds is checked against that one's sidecar, `beneath`.
///
/// A block that reads as zeros without being stored and has a tuple is checked like any other: if it was written, the
/// write has been lost.
///
/// # Errors
/// Of the image's map and of the sidecar. Data that cannot be read are counted.
pub async fn verify<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    beneath: &Beneath<S>,
    mut progress: impl FnMut(u64, u64),
) -> Result<VerifyReport> {
    let size = sidecar.block_size();
    let tags = sidecar.tags();
    let checker = Checker { guard: Guard::best(), kind: sidecar.kind(), block_size: size, tags };
    let blocks = size.blocks_in(volume.limits().capacity).0;
    let (_, total) = bytes(size, 0..blocks)?;
    let mut report = VerifyReport { blocks, ..VerifyReport::default() };
    // What a crash has left in the journal comes before the tuples.
    let claims = sidecar.claims(false).await.map_err(|e| IoError::from_io(IoOp::Read, e))?;
    replay(volume, sidecar, &checker, &claims, 0..blocks, Sink::Memory).await?;
    let mut from = 0;
    while let Some(run) = next_run(volume, sidecar, from, blocks).await? {
        from = run.blocks.end;
        let (first, count) = (Lba(run.blocks.start), run.blocks.end - run.blocks.start);
        let (at, len) = bytes(size, run.blocks.clone())?;
        let tuples = sidecar.read_tuples(first, count).await;
        let mut tuples = tuples.map_err(|e| IoError::from_io(IoOp::Read, e).at(at))?;
        if !beneath.is_empty() {
            beneath.fill(volume, &checker, first, &mut tuples).await?;
        }
        let checked = tuples.chunks(8).filter(|t| !is_escape(t, checker.kind)).count();
        if checked == 0 {
            report.unprotected += if run.data_depth.is_some() { count } else { 0 };
        } else {
            let ReadBlocks { data, unreadable } = read_blocks(volume, size, run.blocks.clone()).await?;
            report.take(&checker, &run, (&data, &unreadable), &tuples, |lba| sidecar.is_marked(lba));
        }
        progress(at.0 + len, total);
    }
    progress(total, total);
    Ok(report)
}

fn is_escape(bytes: &[u8], kind: PiType) -> bool {
    super::tuple::tuples(bytes).all(|t| t.is_escape(kind))
}

/// What [`rebuild`] is to make; what is left open is taken from the sidecar that is there, or is type 1, bitmap and 512 bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct RebuildOptions {
    /// The type of protection.
    pub kind: Option<PiType>,
    /// How it is to stay true across a crash.
    pub mode: Option<PiMode>,
    /// The block size.
    pub block_size: Option<BlockSize>,
    /// The image's format, for the header.
    pub format: ImageFormat,
}

/// Makes the sidecar of an image anew from its data, which are taken as good, or makes it for the first time. The new one
/// takes the place of the old in one step at the end: a rebuild that is cut off leaves the old one as it was.
///
/// # Errors
/// [`Kind::Store`] if the sidecar's path holds something that is no sidecar, or what the files say.
pub async fn rebuild<V: Volume>(
    io: &Io,
    volume: &V,
    image: &Path,
    sidecar: &Path,
    options: RebuildOptions,
    progress: impl FnMut(u64, u64),
) -> std::result::Result<RebuildReport, PiOpenError> {
    let fault = |what| PiOpenError::new(sidecar, image, what);
    let file = |e: io::Error| PiOpenError::new(sidecar, image, Kind::Store(e.into()));
    let old = match inspect(io, image, sidecar).await {
        Ok(old) => Some((old.kind(), old.block_size(), old.mode())),
        Err(PiOpenError { what: Kind::Missing | Kind::Store(StoreError::Damaged), .. }) => None,
        Err(PiOpenError { what: Kind::Store(StoreError::NotASidecar), .. }) if is_empty(sidecar) => None,
        Err(e) => return Err(e),
    };
    let kind = options.kind.or(old.map(|o| o.0)).unwrap_or(PiType::Type1);
    let block_size = options.block_size.or(old.map(|o| o.1)).unwrap_or(BlockSize::B512);
    let mode = options.mode.or(old.map(|o| o.2)).unwrap_or_default();
    let capacity = block_size.blocks_in(volume.limits().capacity);
    let stamp = stamp_now(volume, image, sidecar)?;

    let unfinished = unfinished_path(sidecar);
    files::remove(&unfinished).map_err(file)?;
    let storage = create_file(io, &unfinished).await.map_err(file)?;
    let new = NewSidecar { block_size, kind, mode, capacity, format: options.format, stamp };
    let done = fill(volume, storage, new, progress).await;
    let done = match done {
        Ok(done) => done,
        Err(e) => {
            // Nothing half-made is left; if even that fails, the next rebuild removes it.
            let _ = std::fs::remove_file(&unfinished);
            return Err(fault(e));
        }
    };
    sync_image(volume, image, sidecar).await?;
    std::fs::rename(&unfinished, sidecar).map_err(file)?;
    let dir = sidecar.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(file)?;
    Ok(RebuildReport {
        blocks: capacity.0,
        protected: done.protected + done.recomputed,
        unreadable: done.unreadable,
        pi: Some(kind),
        mode,
        block_size: block_size.bytes(),
    })
}

async fn fill<V: Volume, S: Storage>(
    volume: &V,
    storage: S,
    new: NewSidecar,
    mut progress: impl FnMut(u64, u64),
) -> std::result::Result<Recomputed, Kind> {
    let size = new.block_size;
    let tags = Exposure::Target;
    let checker = Checker { guard: Guard::best(), kind: new.kind, block_size: size, tags };
    let (_, total) = bytes(size, 0..new.capacity.0).map_err(|e| Kind::Image(Box::new(e)))?;
    let sidecar = Sidecar::create(storage, new).await.map_err(Kind::Store)?;
    let step = |block: u64| progress(block << size.shift(), total);
    let done = recompute(volume, &sidecar, &checker, 0..new.capacity.0, Mode::All, step).await;
    let done = done.map_err(|e| Kind::Image(Box::new(e)))?;
    // What was read may have come from the page cache, and tuples that outlive their data are false alarms.
    let (data, end) = join(volume.flush(), sidecar.end_use(new.stamp)).await;
    data.map_err(|e| Kind::Image(Box::new(e)))?;
    end.map_err(|e| Kind::Store(e.into()))?;
    Ok(done)
}

fn unfinished_path(sidecar: &Path) -> PathBuf {
    let mut name = OsString::from(sidecar);
    name.push(".new");
    PathBuf::from(name)
}

fn is_empty(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == 0)
}

mod adopt;
#[cfg(test)]
mod tests;
