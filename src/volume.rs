//! What a LUN stands on: a range of bytes that can be read, written, flushed, discarded and mapped, and the one error
//! type that all of it speaks.
//!
//! A [`Volume`] belongs to one LUN thread. Its methods take `&self`, its futures are `!Send`, and any number of them may
//! be in flight: a volume keeps its own state consistent. Callers give ranges that lie inside [`Limits::capacity`] and
//! are aligned to [`Limits::alignment`]; a volume still checks, and answers [`IoErrorKind::OutOfRange`].

mod limits;
pub mod loan;

use std::{fmt, io, path::PathBuf, rc::Rc};

use serde::{Deserialize, Serialize};

pub use self::limits::Limits;
use self::loan::{Loan, Moved, Place};
use crate::{
    sys::mem::Sg,
    units::{ByteOffset, Lba},
};

/// The result of every operation on a volume.
pub type Result<T> = std::result::Result<T, IoError>;

/// How a write has to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// Force unit access (SBC-4 4.15): on stable storage, metadata included, before the answer.
    pub fua: bool,
    /// All of it or nothing, whenever the process dies or the power fails (SBC-4 4.29), as far as [`Limits::keeps_whole`] says. The
    /// caller keeps everybody else off the pages (4 KiB) that it touches, meanwhile. It costs a flush.
    pub atomic: bool,
}

/// What a range of a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data of its own.
    Data,
    /// Reads as zeros, and space is kept for it.
    Zero,
    /// Reads as zeros, and takes no space (SBC-4: deallocated).
    Hole,
    /// As [`ExtentKind::Hole`], because no file of the chain says anything of it.
    Unallocated,
}

/// One run of a volume's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: ByteOffset,
    /// Bytes; never 0.
    pub len: u64,
    /// What it holds.
    pub kind: ExtentKind,
    /// Where the data, or the space kept, lies in the file named by `depth`, if it lies there as it is.
    pub host_offset: Option<u64>,
    /// 0 for the image itself, 1 for its backing file, and so on.
    pub depth: u32,
}

/// The type of protection (SBC-4 4.21.2). What its tuples mean is [`crate::pi::tuple`]'s to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PiType {
    /// The reference tag is the low half of the LBA; an application tag of FFFFh turns checking off.
    Type1,
    /// The reference tag comes with the command (32-byte CDBs), and counts up from there; otherwise as type 1.
    Type2,
    /// The reference tag is not defined; checking is off if the application tag is FFFFh and the reference tag
    /// FFFFFFFFh.
    Type3,
}

/// The tuples that a volume keeps, whoever sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtRest {
    /// Their type.
    pub kind: PiType,
    /// Application tags, and what else of a tuple is not defined by its block, are initiators'; otherwise all of it was made here.
    pub initiators: bool,
}

/// What the application tag of a block is compared with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AppTags {
    /// Nothing is known of it, so nothing is compared (SBC-4: "has knowledge of the contents").
    #[default]
    Unknown,
    /// Every block has this one, where a bit of the mask is 1.
    One {
        /// EXPECTED LOGICAL BLOCK APPLICATION TAG.
        tag: u16,
        /// LOGICAL BLOCK APPLICATION TAG MASK.
        mask: u16,
    },
    /// By block, as the application tag mode page has them; blocks in no range have none that is known.
    ByRange(Rc<[AppRange]>),
}

impl AppTags {
    /// The tag of a block, and which bits of it count, if it is known.
    pub fn of(&self, lba: Lba) -> Option<(u16, u16)> {
        match self {
            AppTags::Unknown => None,
            AppTags::One { tag, mask } => Some((*tag, *mask)),
            AppTags::ByRange(ranges) => {
                let range = ranges.iter().find(|r| r.first <= lba && lba.0 - r.first.0 < r.blocks)?;
                Some((range.tag, 0xffff))
            }
        }
    }
}

/// A run of blocks with one application tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppRange {
    /// The first block.
    pub first: Lba,
    /// Blocks.
    pub blocks: u64,
    /// Their tag.
    pub tag: u16,
}

/// Which tags of the tuples that go with a transfer are checked, and what they should be. A block whose tuple is the
/// escape is not checked at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TupleCheck {
    /// The guard is compared with the CRC of the data.
    pub guard: bool,
    /// The application tags.
    pub app: AppTags,
    /// The reference tag of the first block; those after it count up by one. `None`: not compared.
    pub reference: Option<u32>,
}

/// A range of bytes that one LUN thread owns.
///
/// Promises that every implementation keeps:
/// - A finished `write` is what later reads give, and it has reached the kernel, metadata included: `kill -9` does not
///   lose it. After a finished `flush` (or with [`WriteFlags::fua`]) it survives power loss.
/// - `discard` and `write_zeroes` end with zeros: a later read gives 0 for every byte of the range, whatever lies in a
///   backing file. `discard` frees what it can, `write_zeroes` with `may_unmap` may.
/// - An operation that fails leaves every byte of its range old or new.
#[allow(async_fn_in_trait)] // One thread owns a volume; its futures need not be Send.
pub trait Volume {
    /// What it is and can do now.
    fn limits(&self) -> Limits;

    /// Fills `to` from the bytes at `at`.
    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()>;

    /// Writes `from` at `at`.
    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()>;

    /// Brings every finished write, and the metadata to find it, to stable storage. A flush that failed once fails
    /// ever after with [`IoErrorKind::Failed`]: the kernel has dropped the error, and nothing can be promised any more.
    async fn flush(&self) -> Result<()>;

    /// Frees the range as far as possible; it reads as zeros.
    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()>;

    /// Makes the range read as zeros; without `may_unmap`, later writes there need no new space.
    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()>;

    /// The runs that make up a range, in order and without gaps. May stop early, at least one run on.
    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>>;

    /// Changes the capacity. What is new reads as zeros.
    async fn resize(&self, capacity: u64) -> Result<()>;

    /// Bytes that are free for what the volume has yet to allocate, if it shares them with others and they can be counted. Looked at now and
    /// then, and not with every command.
    async fn free_bytes(&self) -> Option<u64> {
        None
    }

    /// The type of the tuples that initiators are to see, if the volume keeps some for them. Tuples travel as eight bytes
    /// a block, big-endian.
    fn protection(&self) -> Option<PiType> {
        None
    }

    /// The tuples that are kept, whoever sees them.
    fn at_rest(&self) -> Option<AtRest> {
        None
    }

    /// As [`Volume::read`], and gives what tuples are kept of the blocks, for whoever takes them along.
    async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        self.read(at, to).await.map(|()| None)
    }

    /// Calls `with` with where the bytes lie as they are, if the kernel may copy them from there, and keeps them there until it ends.
    async fn lend_blocks<T>(&self, _: ByteOffset, _: u64, with: impl AsyncFnOnce(Option<Place>) -> T) -> T {
        with(None).await
    }

    /// Has the kernel copy what is lent to `at`. Waits for nobody but the kernel; what fails is for a write to tell.
    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        let _ = (at, loan);
        Moved::Never
    }

    /// As [`Volume::read`], with the tuples of the blocks, one after another; checked as told, and by nothing else.
    /// A block without protection information has the escape, all ones.
    ///
    /// # Errors
    /// [`IoErrorKind::Protection`] with the first block that fails; then `to` has been filled all the same.
    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        let _ = (to, check);
        Err(IoError::new(IoErrorKind::Unsupported, IoOp::Read).at(at))
    }

    /// As [`Volume::write`], and keeps these tuples for the blocks as they are: the caller has checked them.
    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        let _ = (from, tuples, flags);
        Err(IoError::new(IoErrorKind::Unsupported, IoOp::Write).at(at))
    }

    /// FORMAT UNIT: from now on initiators see this type of protection, or none. Every block reads as zeros and has no
    /// protection information. Nothing may be in flight. Cut off by a crash it leaves the old type, or the new one, and
    /// each block old or gone.
    async fn reformat(&self, protection: Option<PiType>) -> Result<()> {
        let _ = protection;
        Err(IoError::new(IoErrorKind::Unsupported, IoOp::Discard))
    }

    /// Flushes, marks the volume cleanly closed and gives up its locks. Nothing may be in flight.
    async fn close(&self) -> Result<()>;
}

/// Bytes of a map that are asked for first; sixteen times as many each time after that.
const FIRST_LOOK: u64 = 256 << 10;
/// Data are not followed further than this: whoever reads them reads them in pieces.
const DATA_ENOUGH: u64 = 64 << 20;

/// The first run of a volume's map at `at`, for at most `len` bytes: a hole to its end, data for [`DATA_ENOUGH`] at least or to their end.
/// Where an image is in small fragments, [`Volume::map_extents`] would look at thousands of them for the sake of one.
///
/// # Errors
/// The map's, and [`IoErrorKind::Corrupt`] if it has nothing there.
pub async fn first_run<V: Volume>(volume: &V, at: ByteOffset, len: u64) -> Result<Extent> {
    let mut look = FIRST_LOOK.min(len);
    loop {
        let Some(extent) = volume.map_extents(at, look).await?.into_iter().next() else {
            return Err(IoError::corrupt(IoOp::Map, "the map of the image has a gap").at(at));
        };
        let ends = extent.start.0.saturating_add(extent.len) < at.0.saturating_add(look);
        if ends || look == len || (extent.kind == ExtentKind::Data && look >= DATA_ENOUGH) {
            return Ok(extent);
        }
        look = look.saturating_mul(16).min(len);
    }
}

/// A volume that several owners on one thread share.
impl<V: Volume> Volume for Rc<V> {
    fn limits(&self) -> Limits {
        (**self).limits()
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        (**self).read(at, to).await
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        (**self).write(at, from, flags).await
    }

    async fn flush(&self) -> Result<()> {
        (**self).flush().await
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        (**self).discard(at, len).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        (**self).write_zeroes(at, len, may_unmap).await
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        (**self).map_extents(at, len).await
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        (**self).resize(capacity).await
    }

    async fn free_bytes(&self) -> Option<u64> {
        (**self).free_bytes().await
    }

    fn protection(&self) -> Option<PiType> {
        (**self).protection()
    }

    fn at_rest(&self) -> Option<AtRest> {
        (**self).at_rest()
    }

    async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        (**self).read_along(at, to).await
    }

    async fn lend_blocks<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        (**self).lend_blocks(at, len, with).await
    }

    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        (**self).take_blocks(at, loan).await
    }

    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        (**self).read_with_tuples(at, to, check).await
    }

    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        (**self).write_with_tuples(at, from, tuples, flags).await
    }

    async fn reformat(&self, protection: Option<PiType>) -> Result<()> {
        (**self).reformat(protection).await
    }

    async fn close(&self) -> Result<()> {
        (**self).close().await
    }
}

/// What was being done when an [`IoError`] arose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOp {
    /// Opening or probing.
    Open,
    /// Reading data or metadata.
    Read,
    /// Writing data or metadata.
    Write,
    /// Flushing.
    Flush,
    /// Discarding or writing zeros.
    Discard,
    /// Resizing.
    Resize,
    /// Making, applying or deleting an internal snapshot.
    Snapshot,
    /// Mapping extents.
    Map,
    /// Closing.
    Close,
}

/// Which tag of a tuple did not match (SBC-4 4.21), and what was there. For the one error that nothing may hide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PiMismatch {
    /// The block.
    pub lba: Lba,
    /// The tag that failed.
    pub tag: PiTag,
    /// The value that the tag should have had.
    pub expected: u32,
    /// The value found.
    pub found: u32,
}

/// The parts of a protection information tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PiTag {
    /// LOGICAL BLOCK GUARD: the CRC.
    Guard,
    /// LOGICAL BLOCK APPLICATION TAG.
    Application,
    /// LOGICAL BLOCK REFERENCE TAG.
    Reference,
}

/// The kinds of failure. `scsi/sense` maps each of them to sense data, without a catch-all arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorKind {
    /// The medium failed (EIO and its like).
    Medium,
    /// No space left for the data or its metadata.
    NoSpace,
    /// The range lies outside the volume or is not aligned.
    OutOfRange,
    /// The volume may not be written.
    ReadOnly,
    /// The image's metadata contradict themselves; nothing was done.
    Corrupt,
    /// A block does not match its protection information.
    Protection(PiMismatch),
    /// The volume has failed before (a flush that was lost) and does no more I/O.
    Failed,
    /// The volume cannot do this.
    Unsupported,
    /// The server that has the image is away, and was waited for long enough.
    Unreachable,
    /// Somebody else has the image.
    Locked,
    /// Aborted before it began.
    Cancelled,
}

/// A failed operation on a volume: what kind, doing what, where, on which file, and why.
#[derive(Debug)]
pub struct IoError {
    /// What kind of failure.
    pub kind: IoErrorKind,
    /// What was being done.
    pub op: IoOp,
    /// The first byte of the volume that failed, if the failure has a place.
    pub at: Option<ByteOffset>,
    /// The file.
    pub path: Option<PathBuf>,
    /// In words, where the kind does not say it all.
    pub detail: Option<String>,
    /// The error of the layer beneath.
    pub source: Option<io::Error>,
}

impl IoError {
    /// An error of that kind, with nothing else known yet.
    pub fn new(kind: IoErrorKind, op: IoOp) -> IoError {
        IoError { kind, op, at: None, path: None, detail: None, source: None }
    }

    /// The error for a failed system call: ENOSPC, EDQUOT and EFBIG are lack of space, EROFS and EPERM are read only,
    /// all else is the medium's.
    pub fn from_io(op: IoOp, source: io::Error) -> IoError {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => IoErrorKind::NoSpace,
            Some(libc::EROFS | libc::EPERM | libc::EBADF) if op != IoOp::Read => IoErrorKind::ReadOnly,
            _ => IoErrorKind::Medium,
        };
        IoError { source: Some(source), ..IoError::new(kind, op) }
    }

    /// Metadata that contradict themselves.
    pub fn corrupt(op: IoOp, detail: impl Into<String>) -> IoError {
        IoError { detail: Some(detail.into()), ..IoError::new(IoErrorKind::Corrupt, op) }
    }

    /// The same error, with the place.
    pub fn at(mut self, at: ByteOffset) -> IoError {
        self.at.get_or_insert(at);
        self
    }

    /// The same error, with the file, if it has none yet.
    pub fn path(mut self, path: impl Into<PathBuf>) -> IoError {
        self.path.get_or_insert_with(|| path.into());
        self
    }

    /// The same error, with words.
    pub fn detail(mut self, detail: impl Into<String>) -> IoError {
        self.detail = Some(detail.into());
        self
    }

    /// An error of the same kind and place, for a second caller that waited for the same operation.
    pub fn duplicate(&self) -> IoError {
        IoError {
            kind: self.kind,
            op: self.op,
            at: self.at,
            path: self.path.clone(),
            detail: self.detail.clone(),
            source: self.source.as_ref().map(|e| match e.raw_os_error() {
                Some(n) => io::Error::from_raw_os_error(n),
                None => io::Error::new(e.kind(), e.to_string()),
            }),
        }
    }
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoOp::Open => "open",
            IoOp::Read => "read",
            IoOp::Write => "write",
            IoOp::Flush => "flush",
            IoOp::Discard => "discard",
            IoOp::Resize => "resize",
            IoOp::Snapshot => "snapshot",
            IoOp::Map => "map",
            IoOp::Close => "close",
        })
    }
}

impl fmt::Display for PiTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PiTag::Guard => "guard",
            PiTag::Application => "application tag",
            PiTag::Reference => "reference tag",
        })
    }
}

impl fmt::Display for IoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IoErrorKind::Medium => f.write_str("medium error"),
            IoErrorKind::NoSpace => f.write_str("no space left"),
            IoErrorKind::OutOfRange => f.write_str("range outside the volume or not aligned"),
            IoErrorKind::ReadOnly => f.write_str("the volume is read-only"),
            IoErrorKind::Corrupt => f.write_str("the image is corrupt"),
            IoErrorKind::Protection(m) => {
                write!(f, "{} of block {}: expected {:#x}, found {:#x}", m.tag, m.lba, m.expected, m.found)
            }
            IoErrorKind::Failed => f.write_str("the volume has failed"),
            IoErrorKind::Unsupported => f.write_str("not supported by the volume"),
            IoErrorKind::Unreachable => f.write_str("the server cannot be reached"),
            IoErrorKind::Locked => f.write_str("the image is in use"),
            IoErrorKind::Cancelled => f.write_str("cancelled"),
        }
    }
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.op)?;
        if let Some(path) = &self.path {
            write!(f, " {}", path.display())?;
        }
        if let Some(at) = self.at {
            write!(f, " at byte {at}")?;
        }
        write!(f, ": {}", self.kind)?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for IoError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_states_its_own_facts_and_never_its_sources() {
        let e = IoError::from_io(IoOp::Write, io::Error::from_raw_os_error(libc::ENOSPC))
            .at(ByteOffset(4096))
            .path("/vm1.qcow2");
        assert_eq!(e.kind, IoErrorKind::NoSpace);
        assert_eq!(e.to_string(), "write /vm1.qcow2 at byte 4096: no space left");
    }

    #[test]
    fn the_first_place_and_file_are_kept() {
        let e = IoError::corrupt(IoOp::Read, "x").at(ByteOffset(1)).at(ByteOffset(2)).path("/a").path("/b");
        assert_eq!(e.to_string(), "read /a at byte 1: the image is corrupt: x");
    }
}
