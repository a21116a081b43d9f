//! Opening an image: every table is found and checked before the first request, so that the data path can rely on it; and
//! the two marks in the header that the driver itself changes.

use std::{
    cell::{Cell, RefCell},
    path::Path,
};

use super::{
    Backing, CACHE_SIZE, HeaderError, Qcow2, Storage,
    alloc::Pool,
    barrier::{Barrier, Epochs},
    cache_shares,
    gate::Gate,
    header::{BITMAPS, CORRUPT, HeaderInfo, MAX_CLUSTER, RAW_DATA_FILE, field, probe_header},
    layout::{Geometry, be32},
    repair::mend_dirty,
    snapshot::{self, Snapshot},
    tables::decode,
};
use crate::{
    storage::cache::{Cache, OffsetSet},
    sync::{AsyncMutex, RangeLock, gate::Gate as MoveGate},
    sys::mem::Buffer,
    volume::{IoError, IoErrorKind, IoOp, Result},
};

impl<S: Storage> Qcow2<S> {
    /// Opens the image on any storage, without an external data file; see [`Qcow2::open`].
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub async fn open_on(storage: S, path: &Path, read_only: bool, backing: Option<Backing>) -> Result<Self> {
        Qcow2::open_with(storage, None, path, read_only, backing).await
    }

    /// Opens the image on any storage, with its external data file where it has one; see [`Qcow2::open`].
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub async fn open_with(
        storage: S,
        data: Option<S>,
        path: &Path,
        read_only: bool,
        backing: Option<Backing>,
    ) -> Result<Self> {
        let failed = |e| IoError::from_io(IoOp::Open, e).path(path);
        let corrupt = |detail: String| IoError::corrupt(IoOp::Open, detail).path(path);
        let mut file_len = storage.size().map_err(failed)?;
        let mut header = read_header(&storage, file_len, path).await?;
        let next = format!("run `tcmu-dif image repair {}`", path.display());
        if !read_only && header.corrupt {
            return Err(corrupt(format!("it is marked corrupt and may only be read; {next}")));
        }
        if !read_only && header.dirty {
            mend_dirty(&storage, path).await?;
            file_len = storage.size().map_err(failed)?;
            header = read_header(&storage, file_len, path).await?;
        }
        if header.data_file.is_some() != data.is_some() {
            let what = if data.is_some() {
                "it has no external data file"
            } else {
                "its external data file is missing"
            };
            return Err(corrupt(what.to_owned()));
        }
        let g = header.geometry();
        let l1_bytes = u64::from(header.l1_entries) * 8;
        let l1 = read_table(&storage, file_len, header.l1_offset, l1_bytes)
            .await
            .map_err(failed)?
            .ok_or_else(|| corrupt("the file ends within its L1 table".into()))?;
        let table_bytes = u64::from(header.refcount_table_clusters) << g.cluster_bits;
        let table_len = file_len.next_multiple_of(g.cluster());
        let refcount_table = read_table(&storage, table_len, header.refcount_table_offset, table_bytes)
            .await
            .map_err(failed)?
            .ok_or_else(|| corrupt("the file ends within its refcount table".into()))?;
        let snapshots = snapshot::table::read(&storage, &header, file_len)
            .await
            .map_err(failed)?
            .map_err(|why| corrupt(format!("snapshot table: {why}")))?;

        let fixed = fixed_ranges(
            &g,
            (header.l1_offset, l1_bytes),
            (header.refcount_table_offset, table_bytes),
            (header.snapshot_offset, snapshot::table::bytes(&snapshots)),
            &snapshots,
        );
        let (tables, damage) = find_tables(&g, &fixed, &l1, &refcount_table, file_len);
        if let (Some(what), false) = (damage, read_only) {
            return Err(corrupt(format!("{what}; {next}")));
        }

        let (l2_share, refcount_share) = cache_shares(CACHE_SIZE);
        Ok(Qcow2 {
            storage,
            data,
            path: path.to_owned(),
            geometry: g,
            snapshots: RefCell::new(snapshots),
            snapshots_at: Cell::new(header.snapshot_offset),
            read_only,
            backing,
            size: Cell::new(header.virtual_size),
            file_len: Cell::new(file_len),
            l1: RefCell::new(l1),
            l1_at: Cell::new(header.l1_offset),
            l2: Cache::new(g.slice(), l2_share),
            refcount_table: RefCell::new(refcount_table),
            refcount_table_at: Cell::new(header.refcount_table_offset),
            refcounts: Cache::new(g.slice(), refcount_share),
            tables: RefCell::new(tables),
            fixed: RefCell::new(fixed),
            barrier: Barrier::default(),
            epochs: Epochs::default(),
            writers: Gate::default(),
            readers: Gate::default(),
            guests: RangeLock::new(),
            moves: MoveGate::default(),
            table_pages: RangeLock::new(),
            linking: AsyncMutex::new(),
            space: AsyncMutex::new(),
            pool: RefCell::new(Pool::default()),
            freed: RefCell::default(),
            first_free: Cell::new(0),
            last_inflated: RefCell::default(),
            begun: Cell::new(false),
            bitmaps_stored: Cell::new(false),
            corrupt: RefCell::default(),
            closed: Cell::new(false),
            header,
        })
    }

    /// Before the first change: autoclear bits go, durably, but for those whose features we keep.
    pub(super) async fn begin(&self, op: IoOp) -> Result<()> {
        let _one_at_a_time = self.space.lock().await;
        if self.begun.get() {
            return Ok(());
        }
        let bitmaps = if self.leave_bitmaps(op).await? { BITMAPS } else { 0 };
        let kept = bitmaps | if self.raw_data() { RAW_DATA_FILE } else { 0 };
        if self.header.autoclear != kept {
            let bits = Buffer::from_slice(&kept.to_be_bytes()).sg();
            self.storage.write(field::AUTOCLEAR, &bits).await.map_err(|e| self.io_error(op, e))?;
        }
        if self.header.autoclear & !RAW_DATA_FILE != 0 {
            self.sync(op).await?;
        }
        self.begun.set(true);
        Ok(())
    }

    /// Sets the corrupt bit. Version 2 has none; there the image is only refused for the rest of this session.
    pub(super) async fn mark_corrupt(&self) {
        if self.geometry.version < 3 {
            return;
        }
        let bits = (self.header.incompatible | CORRUPT).to_be_bytes();
        // The image is not written any more either way; a mark that could not be made changes nothing of that.
        if self.storage.write(field::INCOMPATIBLE, &Buffer::from_slice(&bits).sg()).await.is_ok() {
            let _ = self.barrier.sync(async || self.sync_files().await).await;
        }
    }
}

pub(super) async fn read_header<S: Storage>(storage: &S, file_len: u64, path: &Path) -> Result<HeaderInfo> {
    let failed = |e| IoError::from_io(IoOp::Open, e).path(path);
    let refused = |e: HeaderError| {
        let kind = match e {
            HeaderError::Feature(_) | HeaderError::Version(_) => IoErrorKind::Unsupported,
            _ => IoErrorKind::Corrupt,
        };
        let next = e.next_step().map_or_else(String::new, |next| format!("; {next}"));
        IoError::new(kind, IoOp::Open).path(path).detail(format!("{e}{next}"))
    };
    let first = Buffer::zeroed(file_len.min(4096) as usize);
    storage.read(0, &first.sg()).await.map_err(failed)?;
    let first = first.to_vec();
    let cluster = match be32(&first, 20) {
        bits @ 9..=21 => 1u64 << bits,
        _ => return Err(refused(probe_header(&first).err().unwrap_or(HeaderError::Truncated))),
    };
    if cluster <= first.len() as u64 || file_len <= first.len() as u64 {
        return probe_header(&first).map_err(refused);
    }
    let whole = Buffer::zeroed(file_len.min(cluster).min(MAX_CLUSTER as u64) as usize);
    storage.read(0, &whole.sg()).await.map_err(failed)?;
    probe_header(&whole.to_vec()).map_err(refused)
}

/// A table of 64-bit words; `None` if the file ends before it does.
pub(super) async fn read_table<S: Storage>(
    storage: &S,
    file_len: u64,
    at: u64,
    bytes: u64,
) -> std::io::Result<Option<Vec<u64>>> {
    if bytes == 0 {
        return Ok(Some(Vec::new()));
    }
    if at.checked_add(bytes).is_none_or(|end| end > file_len) {
        return Ok(None);
    }
    let buffer = Buffer::zeroed(bytes as usize);
    storage.read(at, &buffer.sg()).await?;
    Ok(Some(decode(&buffer)))
}

/// The clusters that no guest's data may lie in, but for L2 tables and refcount blocks, in order. Each table is given as its
/// offset and its bytes.
pub(super) fn fixed_ranges(
    g: &Geometry,
    l1: (u64, u64),
    refcount_table: (u64, u64),
    snapshot_table: (u64, u64),
    snapshots: &[Snapshot],
) -> Vec<(u64, u64)> {
    let l1s = snapshots.iter().map(|s| (s.l1_offset, u64::from(s.l1_entries) * 8));
    let mut fixed: Vec<(u64, u64)> = [(0, 1), l1, refcount_table, snapshot_table]
        .into_iter()
        .chain(l1s)
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(at, bytes)| (g.index(at), g.index(at) + g.clusters_for(bytes)))
        .collect();
    fixed.sort_unstable();
    fixed
}

/// The clusters of all L2 tables and refcount blocks, and the first thing that is wrong with them. An entry that makes no
/// sense in itself is left to whoever follows it.
pub(super) fn find_tables(
    g: &Geometry,
    fixed: &[(u64, u64)],
    l1: &[u64],
    refcount_table: &[u64],
    file_len: u64,
) -> (OffsetSet, Option<String>) {
    let mut damage = fixed
        .windows(2)
        .find(|w| w[1].0 < w[0].1)
        .map(|w| format!("two tables lie in the cluster at {:#x}", w[1].0 << g.cluster_bits));
    let mut tables = OffsetSet::default();
    let entries =
        l1.iter().map(|e| ("L2 table", *e)).chain(refcount_table.iter().map(|e| ("refcount block", *e)));
    for (what, entry) in entries {
        if entry == 0 {
            continue;
        }
        let Ok(Some(at)) = g.table(entry) else {
            damage.get_or_insert_with(|| format!("the entry {entry:#x} is not that of a {what}"));
            continue;
        };
        if at >= file_len {
            damage.get_or_insert_with(|| format!("the {what} at {at:#x} lies beyond the end of the file"));
        } else if in_ranges(fixed, g.index(at)) || !tables.insert(g.index(at)) {
            damage.get_or_insert_with(|| format!("the {what} at {at:#x} lies where another table does"));
        }
    }
    (tables, damage)
}

/// Whether a cluster lies in one of the ranges, which are in order.
pub(super) fn in_ranges(ranges: &[(u64, u64)], cluster: u64) -> bool {
    let after = ranges.partition_point(|(start, _)| *start <= cluster);
    // Ranges of a damaged image may overlap, so a longer one may stand before the last; those images are not written.
    after > 0 && cluster < ranges[after - 1].1
}
