//! Making tuples anew from the data: after a crash for the marked regions, after a failed write for its range, and for a
//! whole image when an administrator asks for it. In bounded memory; holes cost nothing.
//!
//! The caller sees to it that nobody writes to the range meanwhile, and that its regions are marked.

use std::ops::Range;

use super::{
    check::Checker,
    store::Sidecar,
    tuple::{TUPLE_LEN, Tuple},
};
use crate::{
    storage::Storage,
    sys::{
        exec::join,
        mem::{Buffer, Sg},
    },
    units::{BlockSize, ByteOffset, Lba},
    volume::{ExtentKind, IoError, IoOp, PiMismatch, Result, Volume, first_run},
};

/// Bytes of data that are looked at together.
pub(super) const CHUNK: u64 = 1 << 20;

/// Which blocks get a new tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Blocks that do not match, and data of the image's own that have no tuple though they are not zeros (their tuple
    /// was lost with the power). All others keep theirs.
    Mend,
    /// All data; what reads as zeros without being stored gets the escape.
    All,
}

/// What became of the blocks of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Recomputed {
    /// Blocks whose data were read.
    pub read: u64,
    /// Blocks that did not match their tuple and have a new one.
    pub recomputed: u64,
    /// Blocks that had no tuple and have one now.
    pub protected: u64,
    /// Blocks that could not be read, and have the escape now.
    pub unreadable: u64,
}

impl Recomputed {
    pub fn add(&mut self, other: Recomputed) {
        self.read += other.read;
        self.recomputed += other.recomputed;
        self.protected += other.protected;
        self.unreadable += other.unreadable;
    }
}

/// The next blocks worth a look: data of the volume, or tuples other than the escape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub blocks: Range<u64>,
    /// Data that somebody stored, and in which file of the chain; `None` for a hole that has tuples.
    pub data_depth: Option<u32>,
    /// Where they lie in that file.
    pub host_offset: Option<u64>,
}

/// The first run at or after `from`, at most [`CHUNK`] long, or `None` if there is nothing before `end`.
pub(super) async fn next_run<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    mut from: u64,
    end: u64,
) -> Result<Option<Run>> {
    let size = sidecar.block_size();
    let most = CHUNK >> size.shift();
    while from < end {
        let (at, len) = bytes(size, from..end)?;
        let extent = first_run(volume, at, len).await?;
        // Extents of a file need not end where blocks do: a block that only begins in a hole counts as data.
        let whole = extent.start.0.saturating_add(extent.len).min(at.0 + len).saturating_sub(at.0);
        let (kind, stop) = match (extent.kind, whole >> size.shift()) {
            (ExtentKind::Data, _) => (ExtentKind::Data, from + whole.div_ceil(size.bytes())),
            (_, 0) => (ExtentKind::Data, from + 1),
            (kind, n) => (kind, from + n),
        };
        if kind == ExtentKind::Data {
            let host_offset = extent.host_offset.map(|host| host + (at.0 - extent.start.0.min(at.0)));
            let blocks = from..stop.min(from + most);
            return Ok(Some(Run { blocks, data_depth: Some(extent.depth), host_offset }));
        }
        let tuples = sidecar.next_tuples(Lba(from)).await.map_err(|e| IoError::from_io(IoOp::Read, e))?;
        match tuples {
            Some(run) if run.start < stop => {
                let blocks = run.start..run.end.min(stop).min(run.start + most);
                return Ok(Some(Run { blocks, data_depth: None, host_offset: None }));
            }
            Some(_) => from = stop,
            // No tuple follows: only data are of interest from here on.
            None => from = stop,
        }
    }
    Ok(None)
}

/// Makes tuples anew for the blocks of a range, as the mode says. `progress` hears the block reached.
pub(super) async fn recompute<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    checker: &Checker,
    blocks: Range<u64>,
    mode: Mode,
    progress: impl FnMut(u64),
) -> Result<Recomputed> {
    recompute_seeing(volume, sidecar, checker, blocks, mode, progress, |_, _| ()).await
}

/// [`recompute`], and `seen` hears of every block that did not match.
pub(super) async fn recompute_seeing<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    checker: &Checker,
    blocks: Range<u64>,
    mode: Mode,
    mut progress: impl FnMut(u64),
    mut seen: impl FnMut(&Run, PiMismatch),
) -> Result<Recomputed> {
    let mut done = Recomputed::default();
    let mut from = blocks.start;
    while let Some(run) = next_run(volume, sidecar, from, blocks.end).await? {
        from = run.blocks.end;
        if mode == Mode::All && run.data_depth.is_none() {
            let n = run.blocks.end - run.blocks.start;
            let cleared = sidecar.clear_tuples(Lba(run.blocks.start), n, false).await;
            cleared.map_err(|e| IoError::from_io(IoOp::Write, e))?;
        } else {
            done.add(one_run(volume, sidecar, checker, &run, mode, &mut seen).await?);
        }
        progress(from);
    }
    progress(blocks.end);
    Ok(done)
}

async fn one_run<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    checker: &Checker,
    run: &Run,
    mode: Mode,
    seen: &mut impl FnMut(&Run, PiMismatch),
) -> Result<Recomputed> {
    let size = checker.block_size;
    let (first, count) = (Lba(run.blocks.start), run.blocks.end - run.blocks.start);
    let (at, _) = bytes(size, run.blocks.clone())?;
    let (read, tuples) =
        join(read_blocks(volume, size, run.blocks.clone()), sidecar.read_tuples(first, count)).await;
    let ReadBlocks { data: sg, unreadable } = read?;
    let mut tuples = tuples.map_err(|e| IoError::from_io(IoOp::Read, e).at(at))?;
    let mut out = Recomputed { read: count, ..Recomputed::default() };
    let mut changed = false;
    let stored = tuples.clone();
    checker.check(&sg, first, &stored, |i, guard, found| {
        let block = size.bytes() as usize;
        let slot = &mut tuples[i * TUPLE_LEN..][..TUPLE_LEN];
        let put = |slot: &mut [u8], bytes: [u8; TUPLE_LEN]| slot.copy_from_slice(&bytes);
        if unreadable.binary_search(&i).is_ok() {
            out.unreadable += 1;
            changed |= found != Ok(false);
            return put(slot, Tuple::ESCAPE.to_bytes());
        }
        match (found, mode) {
            (Ok(true), _) => return,
            (Ok(false), Mode::Mend) if run.data_depth != Some(0) || sg.slice(i * block, block).is_zero() => {
                return;
            }
            (Ok(false), _) => out.protected += 1,
            (Err(m), _) => {
                out.recomputed += 1;
                seen(run, m);
            }
        }
        changed = true;
        let old = super::tuple::tuples(slot).next().unwrap_or(Tuple::ESCAPE);
        put(slot, checker.mend(Lba(first.0 + i as u64), guard, old).to_bytes());
    });
    if changed {
        let wrote = sidecar.write_tuples(first, tuples, false).await;
        wrote.map_err(|e| IoError::from_io(IoOp::Write, e).at(at))?;
    }
    Ok(out)
}

/// What a volume has of some blocks.
pub(super) struct ReadBlocks {
    /// Their data. Of what could not be read, whatever came.
    pub data: Sg,
    /// Which of them could not be read, counted from the first, in order.
    pub unreadable: Vec<usize>,
}

/// Reads blocks: if they cannot be read together, one by one, because one bad sector must not decide over its neighbours.
pub(super) async fn read_blocks<V: Volume>(
    volume: &V,
    size: BlockSize,
    blocks: Range<u64>,
) -> Result<ReadBlocks> {
    let (at, len) = bytes(size, blocks.clone())?;
    let data = Buffer::zeroed(len as usize).sg();
    let mut unreadable = Vec::new();
    if volume.read(at, &data).await.is_err() {
        for (i, lba) in blocks.enumerate() {
            let (at, len) = bytes(size, lba..lba + 1)?;
            let block = data.slice(i << size.shift(), len as usize);
            if volume.read(at, &block).await.is_err() {
                unreadable.push(i);
            }
        }
    }
    Ok(ReadBlocks { data, unreadable })
}

/// A range of blocks in bytes.
pub(super) fn bytes(size: BlockSize, blocks: Range<u64>) -> Result<(ByteOffset, u64)> {
    let start = Lba(blocks.start).to_bytes(size);
    let end = Lba(blocks.end).to_bytes(size);
    match (start, end) {
        (Some(start), Some(end)) => Ok((start, end.0.saturating_sub(start.0))),
        _ => Err(IoError::new(crate::volume::IoErrorKind::OutOfRange, IoOp::Map)),
    }
}
