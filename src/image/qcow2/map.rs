//! Finding guest bytes: L1, then a slice of an L2 table, then runs of entries that say the same. A lookup whose slice is in
//! memory neither waits nor allocates.

use std::rc::Rc;

use super::{
    Qcow2, Storage,
    layout::{COPIED, Entry, Mapping, Place as HostPlace},
    open::in_ranges,
};
use crate::{
    storage::cache::Slice,
    sys::mem::Sg,
    units::ByteOffset,
    volume::{Extent, ExtentKind, IoErrorKind, IoOp, Result},
};

/// What a run of guest bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The backing file's, or zeros.
    Unallocated,
    /// Zeros; whether clusters are kept for it.
    Zero { kept: bool },
    /// Contiguous data, from that byte of the file on; whether it may be written in place.
    Data { host: u64, owned: bool },
    /// Within one compressed cluster.
    Compressed { at: u64, len: u64 },
}

/// A run of guest bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub len: u64,
    pub kind: Kind,
}

/// Where a guest cluster's entry is: the slice, the index in it.
pub(super) struct Place {
    pub slice: u64,
    pub index: usize,
}

impl<S: Storage> Qcow2<S> {
    /// The L2 table of a guest cluster: where it lies, and whether it may be written.
    pub(super) fn l2_table(&self, cluster: u64) -> std::result::Result<Option<(u64, bool)>, String> {
        let index = self.geometry.l1_index(cluster);
        let entry = self.l1.borrow().get(index as usize).copied().unwrap_or(0);
        match self.geometry.table(entry) {
            Ok(None) => Ok(None),
            Ok(Some(at)) if at < self.file_len.get() => Ok(Some((at, entry & COPIED != 0))),
            Ok(Some(at)) => Err(format!("the L2 table at {at:#x} lies beyond the end of the file")),
            Err(why) => Err(format!("L1 entry {index} is {entry:#x}: {why}")),
        }
    }

    /// Where the entry of a guest cluster is in its L2 table.
    pub(super) fn place(&self, table: u64, cluster: u64) -> Place {
        let entry = self.geometry.entry_bytes();
        let byte = self.geometry.l2_index(cluster) * entry;
        let slice = self.geometry.slice();
        Place { slice: table + byte / slice * slice, index: (byte % slice / entry) as usize }
    }

    /// Entries in a slice.
    pub(super) fn slice_entries(&self) -> usize {
        (self.geometry.slice() / self.geometry.entry_bytes()) as usize
    }

    /// The entry at an index of a slice.
    pub(super) fn entry_in(&self, slice: &Slice, index: usize) -> Entry {
        match self.geometry.extended_l2 {
            true => Entry { word: slice.word(2 * index), bitmap: slice.word(2 * index + 1) },
            false => Entry::standard(slice.word(index)),
        }
    }

    /// Guest bytes from `at` to the end of what one slice maps.
    pub(super) fn slice_span(&self, at: u64) -> u64 {
        let span = (self.slice_entries() as u64) << self.geometry.cluster_bits;
        span - at % span
    }

    /// What an entry says of a unit of its cluster, checked against the file's length.
    pub(super) fn mapping(&self, entry: Entry, unit: u64) -> std::result::Result<Mapping, String> {
        let g = &self.geometry;
        let mapping = g.mapping(entry, unit).map_err(|why| format!("L2 entry {entry}: {why}"))?;
        let start = match mapping {
            Mapping::Data { host, .. } | Mapping::ZeroAllocated { host, .. } => host - g.within(host),
            Mapping::Compressed { at, .. } => at,
            Mapping::Unallocated | Mapping::Zero => return Ok(mapping),
        };
        self.in_file(entry, start).map(|()| mapping)
    }

    fn in_file(&self, entry: Entry, start: u64) -> std::result::Result<(), String> {
        // A data file may be shorter than the disk; beyond its end it reads as zeros.
        match self.data.is_some() || start < self.file_len.get() {
            true => Ok(()),
            false => Err(format!("L2 entry {entry}: the cluster lies beyond the end of the file")),
        }
    }

    /// The place that an entry gives its cluster, checked against the file's length.
    pub(super) fn host_place(&self, entry: Entry) -> std::result::Result<HostPlace, String> {
        let place = self.geometry.place(entry).map_err(|why| format!("L2 entry {entry}: {why}"))?;
        let start = match place {
            HostPlace::Cluster { host, .. } => host,
            HostPlace::Compressed { at, .. } => at,
            HostPlace::None => return Ok(place),
        };
        self.in_file(entry, start).map(|()| place)
    }

    /// Whether a cluster of the file holds metadata.
    pub(super) fn is_metadata(&self, cluster: u64) -> bool {
        self.tables.borrow().contains(&cluster) || in_ranges(&self.fixed.borrow(), cluster)
    }

    /// The run that begins at a guest byte, no longer than `len`, out of its slice.
    fn run_in(&self, slice: &Slice, at: u64, len: u64) -> std::result::Result<Run, String> {
        let g = &self.geometry;
        let (bits, units) = (g.unit_bits(), g.units());
        // A number of the unit within the slice.
        let mut unit = (self.place(0, g.index(at)).index as u64) * units + (g.within(at) >> bits);
        let end = self.slice_entries() as u64 * units;
        let within = at & ((1 << bits) - 1);
        let mut entry = self.entry_in(slice, (unit / units) as usize);
        let (kind, mut next) = match self.mapping(entry, unit % units)? {
            Mapping::Unallocated => (Kind::Unallocated, 0),
            Mapping::Zero => (Kind::Zero { kept: false }, 0),
            Mapping::ZeroAllocated { .. } => (Kind::Zero { kept: true }, 0),
            Mapping::Data { host, owned } => (Kind::Data { host: host + within, owned }, host),
            Mapping::Compressed { at: stream, len: bytes } => {
                let len = (g.cluster() - g.within(at)).min(len);
                return Ok(Run { len, kind: Kind::Compressed { at: stream, len: bytes } });
            }
        };
        let mut run = ((1 << bits) - within).min(len);
        while run < len && unit + 1 < end {
            unit += 1;
            next += 1 << bits;
            if unit.is_multiple_of(units) {
                entry = self.entry_in(slice, (unit / units) as usize);
            }
            let same = match (kind, self.mapping(entry, unit % units)) {
                (Kind::Unallocated, Ok(Mapping::Unallocated)) => true,
                (Kind::Zero { kept }, Ok(Mapping::Zero)) => !kept,
                (Kind::Zero { kept }, Ok(Mapping::ZeroAllocated { .. })) => kept,
                (Kind::Data { owned, .. }, Ok(Mapping::Data { host, owned: o })) => {
                    owned == o && host == next
                }
                // An entry that makes no sense is met when the next run begins with it.
                _ => false,
            };
            if !same {
                break;
            }
            run = (run + (1 << bits)).min(len);
        }
        Ok(Run { len: run, kind })
    }

    /// As [`Qcow2::run`], if no I/O is needed to tell.
    pub(super) fn run_cached(&self, at: u64, len: u64) -> Option<std::result::Result<Run, String>> {
        let cluster = self.geometry.index(at);
        match self.l2_table(cluster) {
            Err(why) => Some(Err(why)),
            Ok(None) => {
                let span = 1u64 << (self.geometry.cluster_bits + self.geometry.l2_bits());
                let kind = Kind::Unallocated;
                Some(Ok(Run { len: len.min(span - at % span), kind }))
            }
            Ok(Some((table, _))) => {
                let slice = self.l2.get(self.place(table, cluster).slice)?;
                Some(self.run_in(&slice, at, len))
            }
        }
    }

    /// The run that begins at a guest byte, at most `len` bytes (not 0) long.
    pub(super) async fn run(&self, op: IoOp, at: u64, len: u64) -> Result<Run> {
        let run = match self.run_cached(at, len) {
            Some(run) => run,
            None => match self.l2_table(self.geometry.index(at)) {
                Ok(Some((table, _))) => {
                    let slice = self.load_slice(op, table, self.geometry.index(at)).await?;
                    self.run_in(&slice, at, len)
                }
                Ok(None) => Err("the L1 table changed".into()),
                Err(why) => Err(why),
            },
        };
        match run {
            Ok(run) => Ok(run),
            Err(why) => Err(Box::pin(self.damaged(op, why)).await),
        }
    }

    /// The slice that holds a guest cluster's entry.
    pub(super) async fn load_slice(&self, op: IoOp, table: u64, cluster: u64) -> Result<Rc<Slice>> {
        let at = self.place(table, cluster).slice;
        let slice = self.l2.load(at, async |to: &Sg| self.storage.read(at, to).await).await;
        slice.map_err(|e| self.io_error(op, e))
    }

    /// The map of a range, across the backing chain.
    pub(super) async fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let _at_work = self.epochs.enter();
        let mut out: Vec<Extent> = Vec::new();
        let mut pos = at;
        let end = at + len;
        while pos < end && out.len() < MAX_EXTENTS {
            let run = self.run(IoOp::Map, pos, end - pos).await?;
            let (kind, host_offset) = match run.kind {
                Kind::Zero { kept: false } => (ExtentKind::Hole, None),
                Kind::Zero { kept: true } => {
                    for (len, host) in self.kept_runs(pos, run.len).await? {
                        let (start, kind) = (ByteOffset(pos), ExtentKind::Zero);
                        push(&mut out, Extent { start, len, kind, host_offset: host, depth: 0 });
                        pos += len;
                    }
                    continue;
                }
                Kind::Data { host, .. } => (ExtentKind::Data, Some(host)),
                Kind::Compressed { .. } => (ExtentKind::Data, None),
                Kind::Unallocated => {
                    let beneath = match &self.backing {
                        Some(backing) if pos < backing.len() => {
                            let len = run.len.min(backing.len() - pos);
                            let map = backing.map(pos, len).await?;
                            if map.is_empty() {
                                let detail = "the backing file has no map";
                                return Err(self.error(IoErrorKind::Medium, IoOp::Map, detail));
                            }
                            map
                        }
                        _ => {
                            push(&mut out, hole(pos, run.len));
                            pos += run.len;
                            continue;
                        }
                    };
                    for extent in beneath {
                        pos = extent.start.0 + extent.len;
                        push(&mut out, Extent { depth: extent.depth + 1, ..extent });
                    }
                    continue;
                }
            };
            push(&mut out, Extent { start: ByteOffset(pos), len: run.len, kind, host_offset, depth: 0 });
            pos += run.len;
        }
        Ok(out)
    }
}

impl<S: Storage> Qcow2<S> {
    /// Where the clusters (or subclusters) of a run of kept zeros lie: for each, the guest's bytes in it and its place.
    async fn kept_runs(&self, at: u64, len: u64) -> Result<Vec<(u64, Option<u64>)>> {
        let (g, end) = (self.geometry, at + len);
        let unit = 1 << g.unit_bits();
        let mut runs = Vec::new();
        let mut pos = at;
        while pos < end {
            let cluster = g.index(pos);
            let host = match self.l2_table(cluster) {
                Ok(Some((table, _))) => {
                    let slice = self.load_slice(IoOp::Map, table, cluster).await?;
                    let entry = self.entry_in(&slice, self.place(table, cluster).index);
                    match self.mapping(entry, g.within(pos) >> g.unit_bits()) {
                        Ok(Mapping::ZeroAllocated { host, .. }) => Some(host + (pos & (unit - 1))),
                        _ => None,
                    }
                }
                _ => None,
            };
            let n = (unit - (pos & (unit - 1))).min(end - pos);
            runs.push((n, host));
            pos += n;
        }
        Ok(runs)
    }
}

/// A map stops after so many runs; the caller asks on from there.
const MAX_EXTENTS: usize = 4096;

fn hole(at: u64, len: u64) -> Extent {
    Extent { start: ByteOffset(at), len, kind: ExtentKind::Unallocated, host_offset: None, depth: 0 }
}

/// Adds a run, joined to the one before where they say the same.
fn push(out: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = out.last_mut() {
        let follows = match (last.host_offset, extent.host_offset) {
            (Some(a), Some(b)) => a + last.len == b,
            (a, b) => a == b,
        };
        if last.kind == extent.kind && last.depth == extent.depth && follows {
            last.len += extent.len;
            return;
        }
    }
    out.push(extent);
}
