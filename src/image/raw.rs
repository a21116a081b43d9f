//! Raw images: a regular file or a block device, byte for byte.
//!
//! Buffered I/O, unless it is to go past the cache ([`super::direct`]), so a finished write is in the kernel's page cache, or on the device, and
//! outlives the process; `flush` is `fdatasync`, a FUA
//! write carries RWF_DSYNC. Discarding punches holes and zeroing uses `fallocate`, on files and on block devices alike
//! (there it is the kernel's discard-with-zeros and zero-out); where neither is to be had, zeros are written. After a failed sync
//! the kernel has forgotten what it could not write, so the volume does no more I/O. Called by `image/open`, and by the
//! qcow2 driver for raw backing files.

use std::{
    cell::Cell,
    fs::File,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::SeekFrom;

use super::direct::Ways;
use crate::{
    sync::Notify,
    sys::{
        io::{Fallocate, Io},
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{
        Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags,
        loan::{Loan, Moved, Place},
    },
};

/// Whether those bytes, at the start of a file, would make it a qcow2 image.
fn starts_as_qcow2(bytes: &Sg) -> bool {
    let mut first = [0; QCOW2_MAGIC.len()];
    if bytes.len() < first.len() {
        return false;
    }
    bytes.copy_out(0, &mut first);
    first == QCOW2_MAGIC
}

/// The first bytes of a qcow2 image (qcow2 specification, "Header": magic).
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The smallest unit of I/O on an image whose size is a multiple of it.
const SECTOR: u32 = 512;
/// Bytes of zeros written by one system call where the file system cannot make zeros by itself.
const ZERO_CHUNK: usize = 1 << 20;
/// Runs after which `map_extents` stops.
const MAX_EXTENTS: usize = 4096;

/// A raw image.
pub struct Raw {
    pub(super) io: Io,
    ways: Ways,
    /// The same open file, for calls that run on another thread.
    shared: Arc<File>,
    path: PathBuf,
    block_device: bool,
    read_only: bool,
    probed: bool,
    alignment: u32,
    granularity: u32,
    atomic_write: u32,
    capacity: Cell<u64>,
    failed: Cell<bool>,
    can_punch: Cell<bool>,
    can_zero: Cell<bool>,
    under_way: Cell<usize>,
    idle: Notify,
}

impl Raw {
    /// A volume over an open file or block device. With `probed`, nobody named the format: a write that would make the
    /// image look like qcow2 at its next opening is refused, or a guest could choose a backing file of the host's for
    /// itself.
    ///
    /// # Errors
    /// Those of asking for the size.
    pub fn new(io: &Io, ways: impl Into<Ways>, path: &Path, read_only: bool, probed: bool) -> Result<Raw> {
        let ways = ways.into();
        let file = ways.file();
        let of = |e: io::Error| IoError::from_io(IoOp::Open, e).path(path);
        let meta = file.metadata().map_err(of)?;
        let block_device = meta.file_type().is_block_device();
        let capacity = size_of(file).map_err(of)?;
        let granularity = match block_device {
            true => device_granularity(meta.rdev()),
            false => u32::try_from(meta.blksize()).unwrap_or(0),
        };
        let shared = Arc::new(file.try_clone().map_err(of)?);
        let atomic_write = super::power::atomic_unit(file);
        Ok(Raw {
            io: io.clone(),
            ways,
            shared,
            path: path.to_owned(),
            block_device,
            read_only,
            probed,
            alignment: if capacity % u64::from(SECTOR) == 0 { SECTOR } else { 1 },
            granularity,
            atomic_write,
            capacity: Cell::new(capacity),
            failed: Cell::new(false),
            can_punch: Cell::new(true),
            can_zero: Cell::new(true),
            under_way: Cell::new(0),
            idle: Notify::new(),
        })
    }

    /// Checks that a range may be worked on, and counts the work. `None`: there is nothing to do.
    pub(super) fn begin(&self, op: IoOp, at: ByteOffset, len: u64) -> Result<Option<Busy<'_>>> {
        if self.failed.get() {
            return Err(self.error(IoErrorKind::Failed, op).at(at));
        }
        let inside = at.checked_add(len).is_some_and(|end| end.0 <= self.capacity.get());
        if !inside || (at.0 | len) & u64::from(self.alignment - 1) != 0 {
            return Err(self.error(IoErrorKind::OutOfRange, op).at(at));
        }
        if self.read_only && matches!(op, IoOp::Write | IoOp::Discard) {
            return Err(self.error(IoErrorKind::ReadOnly, op).at(at));
        }
        if len == 0 {
            return Ok(None);
        }
        self.under_way.set(self.under_way.get() + 1);
        Ok(Some(Busy(self)))
    }

    /// The file, if it is one and all that is read and written there goes through the page cache.
    pub(super) fn copyable(&self) -> Option<Arc<File>> {
        (!self.block_device && !self.ways.goes_past()).then(|| self.shared.clone())
    }

    /// Whether what is written there has to be looked at first.
    pub(super) fn refuses_first_bytes(&self, at: ByteOffset) -> bool {
        self.probed && at.0 == 0
    }

    fn error(&self, kind: IoErrorKind, op: IoOp) -> IoError {
        IoError::new(kind, op).path(&self.path)
    }

    fn io_error(&self, op: IoOp, at: ByteOffset, source: io::Error) -> IoError {
        IoError::from_io(op, source).at(at).path(&self.path)
    }

    /// A sync failed: what the kernel could not write is lost, and no later sync would tell.
    fn fail(&self, op: IoOp, source: io::Error) -> IoError {
        self.failed.set(true);
        tracing::error!(path = %self.path.display(), %source, "a flush failed: the volume does no more I/O");
        IoError::from_io(op, source).path(&self.path).detail("the flush failed, so the volume has failed")
    }

    /// The error of a write that was to be durable: it may have failed, or the sync after it. Lack of space is most often the write's, and then
    /// it comes again without the sync; all else counts as a failed sync.
    async fn failed_durable_write(&self, at: ByteOffset, from: &Sg, e: IoError) -> IoError {
        if e.kind == IoErrorKind::NoSpace && self.ways.write(&self.io, at.0, from, false).await.is_err() {
            return e;
        }
        self.fail(IoOp::Write, e.source.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EIO))).at(at)
    }

    /// An earlier or simultaneous sync may have taken the error that was ours to see.
    fn still_sound(&self, op: IoOp) -> Result<()> {
        match self.failed.get() {
            true => Err(self.error(IoErrorKind::Failed, op)),
            false => Ok(()),
        }
    }

    /// Tries a fallocate; `false` if the file or device has none (remembered) or not for this range.
    async fn try_fallocate(&self, what: Fallocate, can: &Cell<bool>, at: u64, len: u64) -> io::Result<bool> {
        if !can.get() {
            return Ok(false);
        }
        match self.io.fallocate(self.ways.file(), what, at, len).await {
            Ok(()) => Ok(true),
            Err(e) => match e.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => {
                    can.set(false);
                    Ok(false)
                }
                // A device with larger sectors than the range is aligned to.
                Some(libc::EINVAL) if self.block_device => Ok(false),
                _ => Err(e),
            },
        }
    }

    async fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        if self.try_fallocate(Fallocate::ZeroRange, &self.can_zero, at, len).await? {
            return Ok(());
        }
        let page = Buffer::zeroed(64 << 10);
        let mut zeros = Sg::new();
        while zeros.len() < ZERO_CHUNK {
            zeros.append(&page.sg());
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZERO_CHUNK as u64);
            self.ways.write(&self.io, at + done, &zeros.slice(0, n as usize), false).await?;
            done += n;
        }
        Ok(())
    }

    /// Waits until no operation that began before is under way.
    async fn drain(&self) {
        while self.under_way.get() > 0 {
            self.idle.wait().await;
        }
    }
}

/// Counts one operation under way.
pub(super) struct Busy<'a>(&'a Raw);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let left = self.0.under_way.get() - 1;
        self.0.under_way.set(left);
        if left == 0 {
            self.0.idle.notify_all();
        }
    }
}

impl Volume for Raw {
    fn limits(&self) -> Limits {
        Limits {
            capacity: self.capacity.get(),
            alignment: self.alignment,
            read_only: self.read_only,
            discard_granularity: if self.can_punch.get() { self.granularity } else { 0 },
            preferred_io: 4096,
            atomic_write: self.atomic_write,
            atomic_unit: self.atomic_write,
            tells_free: !self.block_device,
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        let Some(_busy) = self.begin(IoOp::Read, at, to.len() as u64)? else { return Ok(()) };
        let n = self
            .ways
            .read(&self.io, at.0, to)
            .await
            .map_err(|source| self.io_error(IoOp::Read, at, source))?;
        if n < to.len() {
            let end = ByteOffset(at.0 + n as u64);
            return Err(self.error(IoErrorKind::Medium, IoOp::Read).at(end).detail("the file ends here"));
        }
        Ok(())
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        if flags.atomic {
            // What the disk keeps whole it keeps so if nothing of the page is on its way there already.
            Box::pin(self.flush()).await?;
        }
        let Some(_busy) = self.begin(IoOp::Write, at, from.len() as u64)? else { return Ok(()) };
        if self.probed && at.0 == 0 && starts_as_qcow2(from) {
            let why = "these bytes would make it a qcow2 image at its next opening; name the format raw to allow it";
            return Err(self.error(IoErrorKind::ReadOnly, IoOp::Write).at(at).detail(why));
        }
        let Err(e) = self.ways.write(&self.io, at.0, from, flags.fua).await else {
            return if flags.fua { self.still_sound(IoOp::Write) } else { Ok(()) };
        };
        let e = self.io_error(IoOp::Write, at, e);
        if !flags.fua {
            return Err(e);
        }
        Err(Box::pin(self.failed_durable_write(at, from, e)).await)
    }

    async fn lend_blocks<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        self.lend_place(at, len, with).await
    }

    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        self.take_place(at, loan).await
    }

    async fn flush(&self) -> Result<()> {
        self.still_sound(IoOp::Flush)?;
        if self.read_only {
            return Ok(());
        }
        match self.io.fdatasync(self.ways.file()).await {
            Ok(()) => self.still_sound(IoOp::Flush),
            Err(e) => Err(self.fail(IoOp::Flush, e)),
        }
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        let Some(_busy) = self.begin(IoOp::Discard, at, len)? else { return Ok(()) };
        let of = |e| self.io_error(IoOp::Discard, at, e);
        match self.try_fallocate(Fallocate::PunchHole, &self.can_punch, at.0, len).await.map_err(of)? {
            true => Ok(()),
            false => self.zero(at.0, len).await.map_err(of),
        }
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        if may_unmap {
            return self.discard(at, len).await;
        }
        let Some(_busy) = self.begin(IoOp::Discard, at, len)? else { return Ok(()) };
        self.zero(at.0, len).await.map_err(|e| self.io_error(IoOp::Discard, at, e))
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        let Some(_busy) = self.begin(IoOp::Map, at, len)? else { return Ok(Vec::new()) };
        if self.block_device {
            let all = Extent { start: at, len, kind: ExtentKind::Data, host_offset: Some(at.0), depth: 0 };
            return Ok(vec![all]);
        }
        let file = self.shared.clone();
        let runs = self.io.blocking(move || seek_runs(&file, at.0, at.0 + len)).await;
        let runs = runs.and_then(|r| r).map_err(|e| self.io_error(IoOp::Map, at, e))?;
        Ok(runs
            .into_iter()
            .map(|(start, len, data)| Extent {
                start: ByteOffset(start),
                len,
                kind: if data { ExtentKind::Data } else { ExtentKind::Hole },
                host_offset: Some(start),
                depth: 0,
            })
            .collect())
    }

    async fn free_bytes(&self) -> Option<u64> {
        if self.block_device { None } else { super::space::free_bytes(&self.io, self.ways.file()).await }
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        self.still_sound(IoOp::Resize)?;
        if self.read_only {
            return Err(self.error(IoErrorKind::ReadOnly, IoOp::Resize));
        }
        if capacity == 0 || !capacity.is_multiple_of(u64::from(self.alignment)) {
            let why = format!("{capacity} bytes are no size for it");
            return Err(self.error(IoErrorKind::OutOfRange, IoOp::Resize).detail(why));
        }
        let of = |e| IoError::from_io(IoOp::Resize, e).path(&self.path);
        if self.block_device {
            // Whoever owns the device resizes it; we take note, or use less of it.
            let there = size_of(self.ways.file()).map_err(of)?;
            if capacity > there {
                let why = format!("the block device has {there} bytes");
                return Err(self.error(IoErrorKind::Unsupported, IoOp::Resize).detail(why));
            }
            self.capacity.set(capacity);
            return Ok(());
        }
        let old = self.capacity.get();
        if capacity < old {
            // From here on nobody begins anything beyond the new end; what has begun must not grow the file again.
            self.capacity.set(capacity);
            self.drain().await;
        }
        let file = self.shared.clone();
        match self.io.blocking(move || file.set_len(capacity)).await.and_then(|r| r) {
            Ok(()) => {
                self.capacity.set(capacity);
                Ok(())
            }
            Err(e) => {
                self.capacity.set(old);
                Err(of(e))
            }
        }
    }

    async fn close(&self) -> Result<()> {
        self.flush().await
    }
}

/// The size in bytes of a file or block device.
pub(super) fn size_of(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// The discard granularity that sysfs has for a block device (bytes), 0 if it discards nothing.
fn device_granularity(rdev: u64) -> u32 {
    let of = |queue: &str| {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/discard_granularity")).ok()
    };
    // A partition has its disk's queue.
    of("queue").or_else(|| of("../queue")).and_then(|s| s.trim().parse().ok()).unwrap_or(0)
}

/// The runs of data and holes from `at` to `end`: start, length, whether it is data.
pub(super) fn seek_runs(file: &File, mut at: u64, end: u64) -> io::Result<Vec<(u64, u64, bool)>> {
    let mut runs = Vec::new();
    while at < end && runs.len() < MAX_EXTENTS {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(n) => n.clamp(at, end),
            Err(rustix::io::Errno::NXIO) => end,
            // A file system that cannot tell.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        if data > at {
            runs.push((at, data - at, false));
        }
        if data == end {
            break;
        }
        let hole = match rustix::fs::seek(file, SeekFrom::Hole(data)) {
            Ok(n) => n.clamp(data, end),
            Err(rustix::io::Errno::NXIO | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => end,
            Err(e) => return Err(e.into()),
        };
        // Somebody may punch between the two calls.
        if hole > data {
            runs.push((data, hole - data, true));
        }
        at = hole;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::OpenOptionsExt, rc::Rc};

    use super::*;
    use crate::sys::run;

    fn pattern(len: usize, seed: u8) -> Sg {
        Buffer::from_slice(&(0..len).map(|i| (i as u8).wrapping_mul(31) ^ seed).collect::<Vec<_>>()).sg()
    }

    fn raw(io: &Io, size: u64, probed: bool) -> Raw {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Raw::new(io, Rc::new(file), Path::new("/t.raw"), false, probed).unwrap()
    }

    #[test]
    fn ranges_outside_the_image_or_not_aligned_are_refused() {
        run(async |io| {
            let v = raw(&io, 8192, false);
            for (at, len) in [(8192, 512), (7680, 1024), (u64::MAX - 511, 512), (1, 512), (0, 511)] {
                let e = v.read(ByteOffset(at), &Buffer::zeroed(len).sg()).await.unwrap_err();
                assert_eq!(e.kind, IoErrorKind::OutOfRange, "{at}+{len}");
                assert_eq!(
                    v.discard(ByteOffset(at), len as u64).await.unwrap_err().kind,
                    IoErrorKind::OutOfRange
                );
            }
            v.read(ByteOffset(8192), &Sg::new()).await.unwrap();
        });
    }

    #[test]
    fn discarded_and_zeroed_ranges_read_as_zeros_whatever_the_file_system_can() {
        run(async |io| {
            for (punch, zero) in [(true, true), (false, true), (false, false)] {
                let v = raw(&io, 4 << 20, false);
                v.can_punch.set(punch);
                v.can_zero.set(zero);
                v.write(ByteOffset(0), &pattern(4 << 20, 1), WriteFlags::default()).await.unwrap();
                v.discard(ByteOffset(512), (3 << 20) - 512).await.unwrap();
                v.write_zeroes(ByteOffset((3 << 20) + 1024), 8192, false).await.unwrap();
                let (got, mut want) = (Buffer::zeroed(4 << 20), pattern(4 << 20, 1).to_vec());
                v.read(ByteOffset(0), &got.sg()).await.unwrap();
                want[512..3 << 20].fill(0);
                want[(3 << 20) + 1024..][..8192].fill(0);
                assert!(got.to_vec() == want, "punch {punch}, zero {zero}");
            }
        });
    }

    #[test]
    fn the_map_has_every_byte_once_and_knows_holes() {
        run(async |io| {
            let v = raw(&io, 16 << 20, false);
            let durable = WriteFlags { fua: true, ..WriteFlags::default() };
            v.write(ByteOffset(4 << 20), &pattern(1 << 20, 3), durable).await.unwrap();
            let map = v.map_extents(ByteOffset(1 << 20), 12 << 20).await.unwrap();
            let kinds: Vec<_> = map.iter().map(|e| (e.start.0 >> 20, e.len >> 20, e.kind)).collect();
            assert_eq!(kinds, [(1, 3, ExtentKind::Hole), (4, 1, ExtentKind::Data), (5, 8, ExtentKind::Hole)]);
            assert_eq!(map[1].host_offset, Some(4 << 20));
        });
    }

    /// Small fragments, holes and data that are longer than each look, a hole at the end.
    #[test]
    fn a_walk_by_first_runs_sees_what_the_whole_map_has() {
        use crate::volume::first_run;
        run(async |io| {
            let v = raw(&io, 160 << 20, false);
            for at in (0..1 << 20).step_by(16 << 10) {
                v.write(ByteOffset(at), &pattern(4096, 3), WriteFlags::default()).await.unwrap();
            }
            for mib in 20..100 {
                v.write(ByteOffset(mib << 20), &pattern(1 << 20, 5), WriteFlags::default()).await.unwrap();
            }
            let whole = v.map_extents(ByteOffset(0), 160 << 20).await.unwrap();
            let (mut walked, mut at) = (Vec::<(u64, u64, ExtentKind)>::new(), 0);
            while at < 160 << 20 {
                let run = first_run(&v, ByteOffset(at), (160 << 20) - at).await.unwrap();
                assert!(run.len > 0 && run.start.0 == at);
                match walked.last_mut() {
                    Some(last) if last.2 == run.kind => {
                        assert!(
                            run.kind == ExtentKind::Data && last.1 >= 64 << 20,
                            "a hole is followed to its end"
                        );
                        last.1 += run.len;
                    }
                    _ => walked.push((at, run.len, run.kind)),
                }
                at += run.len;
            }
            let whole: Vec<_> = whole.iter().map(|e| (e.start.0, e.len, e.kind)).collect();
            assert!(whole.len() > 100, "{}", whole.len());
            assert_eq!(walked, whole);
            let end = first_run(&v, ByteOffset((160 << 20) - 512), 512).await.unwrap();
            assert_eq!((end.len, end.kind), (512, ExtentKind::Hole));
        });
    }

    #[test]
    fn a_failed_flush_fails_the_volume_for_good() {
        run(async |io| {
            let tmp = tempfile::NamedTempFile::new().unwrap();
            tmp.as_file().set_len(4096).unwrap();
            // fdatasync refuses a descriptor opened for its path only: EBADF is as good as EIO.
            let file =
                std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(tmp.path()).unwrap();
            let mut v = Raw::new(&io, Rc::new(tmp.reopen().unwrap()), tmp.path(), false, false).unwrap();
            v.ways = Rc::new(file).into();
            assert!(v.flush().await.unwrap_err().source.is_some());
            v.ways = Rc::new(tmp.reopen().unwrap()).into();
            assert_eq!(v.flush().await.unwrap_err().kind, IoErrorKind::Failed);
            let sector = Buffer::zeroed(512).sg();
            assert_eq!(v.read(ByteOffset(0), &sector).await.unwrap_err().kind, IoErrorKind::Failed);
            let e = v.write(ByteOffset(0), &sector, WriteFlags::default()).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::Failed);
        });
    }

    #[test]
    fn a_guest_cannot_turn_a_probed_raw_image_into_qcow2() {
        run(async |io| {
            let mut sector = vec![0; 1024];
            sector[..4].copy_from_slice(&QCOW2_MAGIC);
            let sector = Buffer::from_slice(&sector).sg();
            let probed = raw(&io, 4096, true);
            let e = probed.write(ByteOffset(0), &sector, WriteFlags::default()).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::ReadOnly);
            probed.write(ByteOffset(512), &sector, WriteFlags::default()).await.unwrap();
            raw(&io, 4096, false).write(ByteOffset(0), &sector, WriteFlags::default()).await.unwrap();
        });
    }

    #[test]
    fn a_file_that_somebody_cut_short_is_an_error_and_not_zeros() {
        run(async |io| {
            let v = raw(&io, 8192, false);
            v.ways.file().set_len(4096).unwrap();
            let e = v.read(ByteOffset(0), &Buffer::zeroed(8192).sg()).await.unwrap_err();
            assert_eq!((e.kind, e.at), (IoErrorKind::Medium, Some(ByteOffset(4096))));
        });
    }

    #[test]
    fn a_grown_image_has_zeros_at_its_end_and_a_shrunk_one_ends_early() {
        run(async |io| {
            let v = raw(&io, 4096, false);
            v.write(ByteOffset(0), &pattern(4096, 9), WriteFlags::default()).await.unwrap();
            v.resize(2048).await.unwrap();
            v.resize(8192).await.unwrap();
            let got = Buffer::zeroed(8192);
            v.read(ByteOffset(0), &got.sg()).await.unwrap();
            assert_eq!(got.to_vec()[..2048], pattern(4096, 9).to_vec()[..2048]);
            assert!(got.sg().slice(2048, 6144).is_zero());
            assert_eq!(v.resize(1000).await.unwrap_err().kind, IoErrorKind::OutOfRange);
            assert_eq!(v.limits().capacity, 8192);
        });
    }
}
