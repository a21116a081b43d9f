//! Finding guest bytes: L1, then a slice of an L2 table, then runs of entries that say the same. A lookup whose slice is in
//! memory neither waits nor allocates.

use std::rc::Rc;

use super::{
    Qcow2, Storage,
    cache::Slice,
    layout::{COPIED, Mapping},
    open::in_ranges,
};
use crate::{
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
        let byte = self.geometry.l2_index(cluster) * 8;
        let slice = self.geometry.slice();
        Place { slice: table + byte / slice * slice, index: (byte % slice / 8) as usize }
    }

    /// Entries in a slice.
    pub(super) fn slice_entries(&self) -> usize {
        (self.geometry.slice() / 8) as usize
    }

    /// Guest bytes from `at` to the end of what one slice maps.
    pub(super) fn slice_span(&self, at: u64) -> u64 {
        let span = (self.slice_entries() as u64) << self.geometry.cluster_bits;
        span - at % span
    }

    /// What an entry says, checked against the file's length.
    pub(super) fn mapping(&self, entry: u64) -> std::result::Result<Mapping, String> {
        let mapping = self.geometry.mapping(entry).map_err(|why| format!("L2 entry {entry:#x}: {why}"))?;
        let start = match mapping {
            Mapping::Data { host, .. } | Mapping::ZeroAllocated { host, .. } => host,
            Mapping::Compressed { at, .. } => at,
            Mapping::Unallocated | Mapping::Zero => return Ok(mapping),
        };
        if start < self.file_len.get() {
            return Ok(mapping);
        }
        Err(format!("L2 entry {entry:#x}: the cluster lies beyond the end of the file"))
    }

    /// Whether a cluster of the file holds metadata.
    pub(super) fn is_metadata(&self, cluster: u64) -> bool {
        self.tables.borrow().contains(&cluster) || in_ranges(&self.fixed.borrow(), cluster)
    }

    /// The run that begins at a guest byte, no longer than `len`, out of its slice.
    fn run_in(&self, slice: &Slice, at: u64, len: u64) -> std::result::Result<Run, String> {
        let g = &self.geometry;
        let first = g.index(at);
        let mut index = self.place(0, first).index;
        let within = g.within(at);
        let mut run = (g.cluster() - within).min(len);
        let entry = slice.entry(index);
        let (kind, mut next) = match self.mapping(entry)? {
            Mapping::Unallocated => (Kind::Unallocated, 0),
            Mapping::Zero => (Kind::Zero { kept: false }, 0),
            Mapping::ZeroAllocated { .. } => (Kind::Zero { kept: true }, 0),
            Mapping::Data { host, owned } => (Kind::Data { host: host + within, owned }, host),
            Mapping::Compressed { at, len } => {
                return Ok(Run { len: run, kind: Kind::Compressed { at, len } });
            }
        };
        while run < len && index + 1 < self.slice_entries() {
            index += 1;
            next += g.cluster();
            let same = match (kind, self.mapping(slice.entry(index))) {
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
            run = (run + g.cluster()).min(len);
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
            Err(why) => Err(self.damaged(op, why).await),
        }
    }

    /// The slice that holds a guest cluster's entry.
    pub(super) async fn load_slice(&self, op: IoOp, table: u64, cluster: u64) -> Result<Rc<Slice>> {
        let at = self.place(table, cluster).slice;
        self.l2.load(&self.storage, at).await.map_err(|e| self.io_error(op, e))
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
    /// Where the clusters of a run of kept zeros lie: for each, the guest's bytes in it and its place.
    async fn kept_runs(&self, at: u64, len: u64) -> Result<Vec<(u64, Option<u64>)>> {
        let (g, end) = (self.geometry, at + len);
        let mut runs = Vec::new();
        let mut pos = at;
        while pos < end {
            let cluster = g.index(pos);
            let host = match self.l2_table(cluster) {
                Ok(Some((table, _))) => {
                    let slice = self.load_slice(IoOp::Map, table, cluster).await?;
                    match self.mapping(slice.entry(self.place(table, cluster).index)) {
                        Ok(Mapping::ZeroAllocated { host, .. }) => Some(host + g.within(pos)),
                        _ => None,
                    }
                }
                _ => None,
            };
            let n = (g.cluster() - g.within(pos)).min(end - pos);
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
