//! qcow2 images: our own driver (docs/adr/0001-own-qcow2-driver.md says why).
//!
//! What it guarantees, beyond the promises of [`Volume`]:
//! - **Order.** On stable storage no table ever refers to a cluster that is free or used twice; a crash can only leak. Clusters
//!   are reserved in runs whose refcounts (and whose content, zeros) are durable before the first of them is linked; a cluster
//!   that is unlinked stays reserved until the unlinking is durable and nobody who may have looked it up is still at work.
//! - **No stale bytes.** A cluster is linked when it is known to hold zeros, where the guest saw zeros before; otherwise its
//!   data are synced first.
//! - **Process death.** Every change of metadata is written through before it is visible, so what was acknowledged is in the kernel.
//! - **Hostile images.** Nothing read from the file is used before it is checked; a write that would hit metadata is refused
//!   and the image marked corrupt.
//!
//! Futures of changing operations have to be run to their end: one that is dropped half way fails the image, because nobody
//! can say any more which of its writes are still to come. What a crash leaves of a reserved run is leaked
//! (`tcmu-dif image check -r leaks` returns it); a clean [`Volume::close`] returns it.

mod alloc;
mod at_once;
mod atomic;
mod barrier;
mod bitmaps;
mod check;
mod compressed;
mod create;
mod data_file;
mod deltas;
mod discard;
mod gate;
mod header;
mod kept_bitmaps;
mod layout;
mod map;
mod measure;
mod open;
mod read;
mod rebase;
mod rebuild;
mod refcount;
mod repair;
mod resize;
mod snapshot;
mod storage;
mod subcluster;
mod tables;
mod tree;
mod write;

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
};

use barrier::{Barrier, Epochs, Lost};
use gate::Gate;
use layout::Geometry;

pub use bitmaps::BitmapDirectory;
pub use check::{CheckReport, MOST_FINDINGS, MOST_MEMORY, bitmaps_size, check_on};
pub use compressed::Compression;
pub use create::{CreateError, CreateOptions, Preallocation, check_options, create, create_on};
pub use header::{HeaderError, HeaderInfo, MAX_CLUSTER, is_qcow2, probe_header};
pub use kept_bitmaps::StoredBitmap;
pub use measure::{full_size, looks_preallocated};
pub use read::{Backing, Boxed, ReadBacking};
pub use repair::{Repair, repair_on};
pub use snapshot::{Snapshot, SnapshotError, SnapshotInfo};
pub use storage::{FileStorage, Storage};

use crate::{
    image::direct::Ways,
    storage::cache::{Cache, CacheCounter, OffsetSet},
    sync::{
        AsyncMutex, RangeLock,
        gate::{Gate as MoveGate, Pass},
    },
    sys::{io::Io, mem::Sg},
    units::ByteOffset,
    volume::{Extent, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags},
};

/// Bytes of metadata that the images of a chain hold in memory, unless they are told otherwise: enough for 256 GiB of guest's
/// data in clusters of 64 KiB.
pub const CACHE_SIZE: u64 = 36 << 20;
/// One byte in so many is for refcounts, which only new clusters need.
const REFCOUNT_SHARE: u64 = 9;

/// What L2 tables have of that many bytes, and what refcount blocks have.
fn cache_shares(bytes: u64) -> (u64, u64) {
    let refcounts = bytes / REFCOUNT_SHARE;
    (bytes - refcounts, refcounts)
}

/// An open qcow2 image.
pub struct Qcow2<S: Storage = FileStorage> {
    storage: S,
    /// The guest's clusters, where they lie in a file of their own.
    data: Option<S>,
    path: PathBuf,
    geometry: Geometry,
    header: HeaderInfo,
    snapshots: RefCell<Vec<Snapshot>>,
    snapshots_at: Cell<u64>,
    read_only: bool,
    backing: Option<Backing>,
    /// Bytes of the guest's disk.
    size: Cell<u64>,
    /// Bytes in the file.
    file_len: Cell<u64>,
    l1: RefCell<Vec<u64>>,
    l1_at: Cell<u64>,
    l2: Cache,
    refcount_table: RefCell<Vec<u64>>,
    refcount_table_at: Cell<u64>,
    refcounts: Cache,
    /// Clusters of L2 tables and refcount blocks.
    tables: RefCell<OffsetSet>,
    /// Header, L1 tables, refcount table, snapshot table: clusters (first, one past the last), in order.
    fixed: RefCell<Vec<(u64, u64)>>,
    barrier: Barrier,
    epochs: Epochs,
    /// All that changes the image passes here.
    writers: Gate,
    /// All that reads the guest's disk, or its map, passes here.
    readers: Gate,
    /// Guest clusters whose mapping is being changed.
    guests: RangeLock,
    /// Guest clusters that get another place, with what they hold: whoever writes there passes, and so waits.
    moves: MoveGate,
    /// Pages of L2 tables: shared by who changes entries, held by who changes several at once.
    table_pages: RangeLock,
    /// Held while an L2 table is made or copied, or the L1 table grows.
    linking: AsyncMutex,
    /// Held while refcounts change.
    space: AsyncMutex,
    pool: RefCell<alloc::Pool>,
    freed: RefCell<Vec<alloc::Freed>>,
    /// No free cluster lies below this one, but for those in the pool.
    first_free: Cell<u64>,
    last_inflated: RefCell<Option<(u64, crate::sys::mem::Buffer)>>,
    /// Autoclear bits have been cleared.
    begun: Cell<bool>,
    /// Bitmaps have been stored, and say what has changed until then.
    bitmaps_stored: Cell<bool>,
    corrupt: RefCell<Option<String>>,
    closed: Cell<bool>,
}

impl Qcow2<FileStorage> {
    /// Opens the image in `file`; for writing, one that is marked dirty is repaired first. The opener has probed the header, locked the
    /// file and opened what the header names: the backing file, the external data file.
    ///
    /// # Errors
    /// `Unsupported` for a feature that this driver does not do; `Corrupt` for metadata that contradict themselves, and, for
    /// writing, for an image that is marked corrupt, or is marked dirty and cannot be repaired. The words name the next step.
    pub async fn open(
        io: &Io,
        file: impl Into<Ways>,
        data: Option<Ways>,
        path: &Path,
        read_only: bool,
        backing: Option<Backing>,
    ) -> Result<Qcow2> {
        let storage =
            |ways: Ways| FileStorage::new(io, ways).map_err(|e| IoError::from_io(IoOp::Open, e).path(path));
        let data = data.map(storage).transpose()?;
        Qcow2::open_with(storage(file.into())?, data, path, read_only, backing).await
    }
}

/// An operation that changes the image; dropped before [`Changing::finish`], it fails the image.
struct Changing<'a>(&'a Barrier);

impl Changing<'_> {
    fn finish(self) {
        std::mem::forget(self);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

/// An operation that changes the image, inside the gate.
struct Change<'a> {
    _inside: gate::Inside<'a>,
    changing: Changing<'a>,
}

impl Change<'_> {
    fn finish(self) {
        self.changing.finish();
    }
}

impl<S: Storage> Qcow2<S> {
    /// What the header said at the opening.
    pub fn header(&self) -> &HeaderInfo {
        &self.header
    }

    /// Internal snapshots, in the order of their table.
    pub fn snapshots(&self) -> Vec<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Bounds the metadata held in memory, and tells where looks at them are counted: at L2 tables, at refcount blocks.
    pub fn set_caches(&mut self, bytes: u64, counters: &[CacheCounter; 2]) {
        let (l2, refcounts) = cache_shares(bytes);
        self.l2.limit(l2);
        self.refcounts.limit(refcounts);
        self.l2.count_in(counters[0].clone());
        self.refcounts.count_in(counters[1].clone());
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster()
    }

    fn io_error(&self, op: IoOp, e: std::io::Error) -> IoError {
        IoError::from_io(op, e).path(&self.path)
    }

    fn error(&self, kind: IoErrorKind, op: IoOp, detail: impl Into<String>) -> IoError {
        IoError::new(kind, op).path(&self.path).detail(detail)
    }

    /// Everything written before is durable after.
    async fn sync(&self, op: IoOp) -> Result<()> {
        match self.barrier.sync(async || self.sync_files().await).await {
            Ok(()) => Ok(()),
            Err(Lost::Now(e)) => {
                let source = Some(e);
                Err(IoError { source, ..self.error(IoErrorKind::Failed, op, "a flush was lost") })
            }
            Err(Lost::Before) => Err(self.failed(op)),
        }
    }

    /// Data first: what refers to them is never durable before them.
    async fn sync_files(&self) -> std::io::Result<()> {
        if let Some(data) = &self.data {
            data.sync().await?;
        }
        self.storage.sync().await
    }

    /// The file that the guest's clusters lie in.
    fn data(&self) -> &S {
        self.data.as_ref().unwrap_or(&self.storage)
    }

    fn failed(&self, op: IoOp) -> IoError {
        self.error(IoErrorKind::Failed, op, "an earlier flush or change was lost; reopen the image")
    }

    fn check_alive(&self, op: IoOp) -> Result<()> {
        if self.barrier.has_failed() {
            return Err(self.failed(op));
        }
        if self.closed.get() {
            return Err(self.error(IoErrorKind::Failed, op, "the image is closed"));
        }
        Ok(())
    }

    fn check_range(&self, op: IoOp, at: ByteOffset, len: u64) -> Result<()> {
        match at.0.checked_add(len) {
            Some(end) if end <= self.size.get() => Ok(()),
            _ => Err(IoError::new(IoErrorKind::OutOfRange, op).path(&self.path).at(at)),
        }
    }

    fn check_writable(&self, op: IoOp) -> Result<()> {
        self.check_alive(op)?;
        if self.read_only {
            return Err(IoError::new(IoErrorKind::ReadOnly, op).path(&self.path));
        }
        if self.bitmaps_stored.get() {
            return Err(self.error(IoErrorKind::Failed, op, "the image is about to be closed"));
        }
        match &*self.corrupt.borrow() {
            Some(why) => Err(IoError::corrupt(op, why.clone()).path(&self.path)),
            None => Ok(()),
        }
    }

    /// A changing operation begins, which [`Change::finish`] has to end; dropped before, it fails the image.
    ///
    /// What is awaited on the data path is kept small: a command's future is copied, and whatever it may ever wait for is part of it. So
    /// operations are not handed on as futures, and what is seldom waited for is boxed.
    async fn change(&self, op: IoOp) -> Result<Change<'_>> {
        let inside = self.writers.enter().await;
        let changing = self.begin_inside(op).await?;
        Ok(Change { _inside: inside, changing })
    }

    async fn begin_inside(&self, op: IoOp) -> Result<Changing<'_>> {
        self.check_writable(op)?;
        let changing = Changing(&self.barrier);
        if !self.begun.get()
            && let Err(e) = Box::pin(self.begin(op)).await
        {
            changing.finish();
            return Err(e);
        }
        Ok(changing)
    }

    /// Runs a changing operation alone: those under way end first, and those that come meanwhile wait. Clusters that were
    /// unlinked before are free when it begins, so that every reference is one that a table holds.
    async fn alone<T>(&self, op: IoOp, work: impl Future<Output = Result<T>>) -> Result<T> {
        let _shut = self.writers.shut().await;
        let settled_first = async {
            self.sync(op).await?;
            {
                let _readers = self.readers.shut().await;
                self.settle(op).await?;
            }
            work.await
        };
        let changing = self.begin_inside(op).await?;
        let done = settled_first.await;
        changing.finish();
        done
    }

    async fn read_any(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        self.check_alive(IoOp::Read)?;
        let _inside = self.readers.enter().await;
        self.check_range(IoOp::Read, at, to.len() as u64)?;
        self.read_range(at.0, to).await.map_err(|e| e.at(at))
    }

    async fn write_any(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        self.check_range(IoOp::Write, at, from.len() as u64)?;
        let change = self.change(IoOp::Write).await?;
        let done = self.write_inside(at, from, flags).await;
        change.finish();
        done.map_err(|e| e.at(at))
    }

    async fn write_inside(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        // It may have had to wait while the disk became shorter.
        self.check_range(IoOp::Write, at, from.len() as u64)?;
        let _stays = self.stays(at.0, from.len() as u64).await;
        self.write_range(IoOp::Write, at.0, from).await?;
        if flags.fua { self.sync(IoOp::Write).await } else { Ok(()) }
    }

    /// Keeps the clusters of a range (not empty) where they are, however many write to them.
    async fn stays(&self, at: u64, len: u64) -> Pass<'_> {
        let (first, last) = (self.geometry.index(at), self.geometry.index(at + len.max(1) - 1));
        self.moves.pass(first, last - first + 1).await
    }

    /// Metadata that make no sense: the image is marked corrupt if it may be written, as QEMU does, and never written again.
    async fn damaged(&self, op: IoOp, detail: impl Into<String>) -> IoError {
        let detail = format!("{}; run `tcmu-dif image check {}`", detail.into(), self.path.display());
        if !self.read_only && self.corrupt.borrow().is_none() {
            *self.corrupt.borrow_mut() = Some("metadata were found damaged before".to_owned());
            self.mark_corrupt().await;
        }
        IoError::corrupt(op, detail).path(&self.path)
    }
}

impl<S: Storage> Volume for Qcow2<S> {
    fn limits(&self) -> Limits {
        let (atomic_write, atomic_unit) = self.atomic_limits();
        Limits {
            capacity: self.size.get(),
            alignment: 1,
            read_only: self.read_only,
            discard_granularity: self.geometry.cluster() as u32,
            preferred_io: self.geometry.cluster() as u32,
            atomic_write,
            atomic_unit,
            tells_free: !self.data().is_fixed(),
        }
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        match self.read_at_once(at, to) {
            Some(reading) => reading.await,
            None => Box::pin(self.read_any(at, to)).await,
        }
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        match self.write_at_once(at, from, flags) {
            Some(writing) => writing.await,
            None if flags.atomic => Box::pin(self.write_atomic(at, from, flags)).await,
            None => Box::pin(self.write_any(at, from, flags)).await,
        }
    }

    async fn flush(&self) -> Result<()> {
        self.check_alive(IoOp::Flush)?;
        if self.read_only {
            return Ok(());
        }
        self.sync(IoOp::Flush).await?;
        if self.freed.borrow().is_empty() || self.corrupt.borrow().is_some() {
            return Ok(());
        }
        // The flush itself is done. What cannot be freed now is a leak at worst, and shows where it matters.
        let Some(_inside) = self.writers.try_enter() else { return Ok(()) };
        let changing = Changing(&self.barrier);
        let _ = Box::pin(self.settle(IoOp::Flush)).await;
        changing.finish();
        Ok(())
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.write_zeroes(at, len, true).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        let op = IoOp::Discard;
        self.check_range(op, at, len)?;
        let change = self.change(op).await?;
        // It may have had to wait while the disk became shorter.
        let done = match self.check_range(op, at, len) {
            Ok(()) => {
                Box::pin(async {
                    let _stays = self.stays(at.0, len).await;
                    self.zero_range(at.0, len, may_unmap).await
                })
                .await
            }
            Err(e) => Err(e),
        };
        change.finish();
        done.map_err(|e| e.at(at))
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        self.check_alive(IoOp::Map)?;
        let _inside = self.readers.enter().await;
        self.check_range(IoOp::Map, at, len)?;
        Box::pin(self.extents(at.0, len)).await.map_err(|e| e.at(at))
    }

    async fn free_bytes(&self) -> Option<u64> {
        self.data().free_bytes().await
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        if self.holds_beyond_end() {
            Box::pin(self.alone(IoOp::Resize, self.cut(self.size.get()))).await?;
        }
        let change = self.change(IoOp::Resize).await?;
        let done = Box::pin(async {
            let _stays = self.moves.pass(0, u64::MAX).await;
            self.resize_to(capacity).await
        })
        .await;
        change.finish();
        done
    }

    async fn close(&self) -> Result<()> {
        if self.closed.get() {
            return Ok(());
        }
        if self.barrier.has_failed() {
            return Err(self.failed(IoOp::Close));
        }
        if !self.read_only && self.begun.get() {
            let changing = Changing(&self.barrier);
            let result = Box::pin(self.finish()).await;
            changing.finish();
            result?;
        }
        self.closed.set(true);
        Ok(())
    }
}
