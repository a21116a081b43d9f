//! The sidecars of backing files: a block that an image does not hold is looked up in the next file of the chain, data and tuple.
//!
//! The image's own sidecar has the escape for such a block, and the image's map says which file holds it. Its tuple is then
//! taken from that file's sidecar, which is only read; where there is none the block has no protection, as ever. A tuple of
//! another type of protection is given the tags of this one: what it says of the data, its guard, stays.
//!
//! When the image takes a cluster over to write a part of it, the rest of it becomes the image's own, data copied from below;
//! [`Beneath::span`] and [`Beneath::lift`] see to it that the tuples come along. Which clusters are the image's own is remembered, so that
//! this costs a look at the map once a cluster. Called by [`super::protected`]; opened by whoever opens the image.

use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    check::Checker,
    error::{PiOpenError, PiOpenErrorKind},
    recompute::bytes,
    store::{Sidecar, Stamp, default_path, open_file},
    tuple::{PiType, TUPLE_LEN, Tuple},
};
use crate::{
    storage::{FileStorage, Storage},
    sys::io::Io,
    units::{BlockSize, Lba},
    volume::{ExtentKind, IoError, IoOp, Result, Volume},
};

const ESCAPE: [u8; TUPLE_LEN] = [0xff; TUPLE_LEN];

/// The protected files beneath an image.
pub struct Beneath<S = FileStorage> {
    /// The backing file's, that one's backing file's, and so on; `None` for a file without protection.
    layers: Vec<Option<Sidecar<S>>>,
    /// Bytes of a cluster of the image: what it takes over at once.
    cluster: u64,
    /// Clusters that are the image's own, 64 a word.
    own: RefCell<HashMap<u64, u64>>,
}

impl Beneath<FileStorage> {
    /// Opens the sidecars beside the backing files of an image, in the order of the chain.
    ///
    /// # Errors
    /// A sidecar that is damaged, or whose file has been changed by something else: what it would call an error may be none.
    pub async fn open(
        io: &Io,
        files: &[PathBuf],
        block_size: BlockSize,
        cluster: u64,
    ) -> std::result::Result<Beneath, PiOpenError> {
        let mut layers = Vec::new();
        for file in files {
            layers.push(open_layer(io, file, block_size).await?);
        }
        Ok(Beneath::over(layers, cluster))
    }
}

async fn open_layer(
    io: &Io,
    image: &Path,
    block_size: BlockSize,
) -> std::result::Result<Option<Sidecar<FileStorage>>, PiOpenError> {
    let path = default_path(image);
    let fault = |what| PiOpenError::new(&path, image, what);
    let storage = match open_file(io, &path, true).await {
        Ok(storage) => storage,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fault(PiOpenErrorKind::Store(e.into()))),
    };
    let sidecar = Sidecar::open(storage).await.map_err(|e| fault(PiOpenErrorKind::Store(e)))?;
    let info = sidecar.info();
    let unused = |why: &str| {
        tracing::warn!(sidecar = %path.display(), "{why}: the blocks of this backing file are not checked");
        Ok(None)
    };
    if info.block_size != block_size.bytes() {
        return unused("it is for blocks of another size");
    }
    if !info.in_use {
        let found = Stamp::of(image).map_err(|e| {
            let e = IoError::from_io(IoOp::Open, e).path(image);
            fault(PiOpenErrorKind::Image(Box::new(e)))
        })?;
        if !info.stamp.matches(&found) {
            return Err(fault(PiOpenErrorKind::ImageChanged { left: info.stamp, found }));
        }
    }
    let claims = sidecar.claims(false).await.map_err(|e| fault(PiOpenErrorKind::Store(e.into())))?;
    if !claims.blocks.is_empty() || !claims.zeros.is_empty() {
        return unused("its journal has not been replayed since a crash");
    }
    Ok(Some(sidecar))
}

impl<S: Storage> Beneath<S> {
    /// Over these sidecars, of the backing file, that one's, and so on.
    pub fn over(layers: Vec<Option<Sidecar<S>>>, cluster: u64) -> Beneath<S> {
        let protected = layers.iter().any(Option::is_some);
        Beneath { layers: if protected { layers } else { Vec::new() }, cluster, own: RefCell::default() }
    }

    /// An image that stands alone.
    pub fn nothing() -> Beneath<S> {
        Beneath::over(Vec::new(), 0)
    }

    /// Whether nothing beneath is protected.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Gives the blocks that have the escape, and whose data come from a file beneath, the tuples that they have there.
    pub async fn fill<V: Volume>(
        &self,
        volume: &V,
        checker: &Checker,
        first: Lba,
        tuples: &mut [u8],
    ) -> Result<()> {
        let slots = tuples.as_chunks_mut::<TUPLE_LEN>().0;
        let (Some(from), Some(last)) =
            (slots.iter().position(|t| *t == ESCAPE), slots.iter().rposition(|t| *t == ESCAPE))
        else {
            return Ok(());
        };
        let mut next = first.0 + from as u64;
        let end = first.0 + last as u64 + 1;
        let size = checker.block_size;
        while next < end {
            let (at, len) = bytes(size, next..end)?;
            let extents = volume.map_extents(at, len).await?;
            let Some(stop) = extents.last().map(|e| e.start.0.saturating_add(e.len)) else { break };
            for extent in &extents {
                let beneath = extent.depth.checked_sub(1).and_then(|i| self.layers.get(i as usize));
                let Some(Some(layer)) = beneath.filter(|_| extent.kind == ExtentKind::Data) else { continue };
                // Only blocks that lie there as a whole.
                let start = extent.start.0.div_ceil(size.bytes()).max(next);
                let stop = (extent.start.0.saturating_add(extent.len) >> size.shift()).min(end);
                let blocks = start..stop.min(layer.capacity().0);
                if blocks.start < blocks.end {
                    let at = (blocks.start - first.0) as usize;
                    let n = (blocks.end - blocks.start) as usize;
                    take(layer, checker, blocks, &mut slots[at..at + n]).await?;
                }
            }
            next = (stop >> size.shift()).max(next + 1);
        }
        Ok(())
    }

    /// What a change of these blocks takes over: whole clusters, unless they are the image's own.
    pub fn span(&self, size: BlockSize, (lba, blocks): (Lba, u64), capacity: u64) -> (Lba, u64) {
        let cluster = self.cluster >> size.shift();
        if self.is_empty() || cluster <= 1 || blocks == 0 {
            return (lba, blocks);
        }
        let end = lba.0 + blocks;
        let (first, last) = (lba.0 / cluster, (end - 1) / cluster);
        let start = if self.is_own(first) { lba.0 } else { first * cluster };
        let stop = if self.is_own(last) { end } else { ((last + 1) * cluster).min(capacity).max(end) };
        (Lba(start), stop - start)
    }

    /// Before blocks are changed whose span is this: gives the rest of the span, which is about to become the image's own,
    /// the tuples that it has below. The span is locked, and its regions are marked.
    pub async fn lift<V: Volume>(
        &self,
        volume: &V,
        own: &Sidecar<S>,
        checker: &Checker,
        (lba, blocks): (Lba, u64),
        (start, span): (Lba, u64),
        dsync: bool,
    ) -> Result<()> {
        let rests = [start.0..lba.0, lba.0 + blocks..start.0 + span];
        for rest in rests.into_iter().filter(|r| r.start < r.end) {
            let (at, _) = bytes(checker.block_size, rest.clone())?;
            let (first, n) = (Lba(rest.start), rest.end - rest.start);
            let old = own.read_tuples(first, n).await.map_err(|e| IoError::from_io(IoOp::Read, e).at(at))?;
            let mut tuples = old.clone();
            self.fill(volume, checker, first, &mut tuples).await?;
            if tuples != old {
                let wrote = own.write_tuples(first, tuples, dsync).await;
                wrote.map_err(|e| IoError::from_io(IoOp::Write, e).at(at))?;
            }
        }
        let cluster = (self.cluster >> checker.block_size.shift()).max(1);
        for c in start.0 / cluster..(start.0 + span).div_ceil(cluster) {
            *self.own.borrow_mut().entry(c / 64).or_default() |= 1 << (c % 64);
        }
        Ok(())
    }

    fn is_own(&self, cluster: u64) -> bool {
        self.own.borrow().get(&(cluster / 64)).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }
}

/// Puts the tuples that a layer has for these blocks where there is the escape.
async fn take<S: Storage>(
    layer: &Sidecar<S>,
    checker: &Checker,
    blocks: Range<u64>,
    slots: &mut [[u8; TUPLE_LEN]],
) -> Result<()> {
    let found = layer.read_tuples(Lba(blocks.start), blocks.end - blocks.start).await;
    let found = found
        .map_err(|e| IoError::from_io(IoOp::Read, e).detail("protection information of a backing file"))?;
    let kind = layer.kind();
    for ((slot, tuple), lba) in slots.iter_mut().zip(found.as_chunks::<TUPLE_LEN>().0).zip(blocks.map(Lba)) {
        let tuple = Tuple::from_bytes(*tuple);
        // What a crash may have cut off there is not known to match.
        if *slot == ESCAPE && !tuple.is_escape(kind) && !layer.is_marked(lba) {
            *slot = translated(tuple, kind, checker.kind, lba).to_bytes();
        }
    }
    Ok(())
}

/// The tuple that a block has under another type. One that is another block's stays as it is, so that it is found.
fn translated(tuple: Tuple, from: PiType, to: PiType, lba: Lba) -> Tuple {
    let same = from == to || from != PiType::Type3 && tuple.reference != from.reference(lba);
    if same { tuple } else { Tuple { reference: to.reference(lba), ..tuple } }
}
