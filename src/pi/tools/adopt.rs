//! `pi adopt`: after somebody else has changed an image, its blocks are taken as they are. Only those that do not match get a new
//! tuple, and are named, so that the administrator sees what the change was; `pi rebuild` makes all of them anew and names none.

use std::path::Path;

use serde::Serialize;

use super::{BadBlock, LISTED, stamp_now, sync_image};
use crate::{
    pi::{
        check::Checker,
        error::{PiOpenError, PiOpenErrorKind as Kind},
        guard::Guard,
        recompute::{Mode, bytes, recompute_seeing},
        replay::{Sink, replay},
        store::{Sidecar, Stamp, open_file},
    },
    storage::Storage,
    sys::io::Io,
    volume::{IoError, Volume},
};

/// How an adoption went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct AdoptReport {
    /// Blocks of the LUN.
    pub blocks: u64,
    /// Blocks that did not match, and have a new tuple.
    pub adopted: u64,
    /// Blocks with data that had no tuple, and have one now.
    pub protected: u64,
    /// Blocks that could not be read, and are without protection.
    pub unreadable: u64,
    /// The first [`LISTED`] of those that did not match.
    pub changed: Vec<BadBlock>,
}

/// Takes an image as it is. The sidecar says "in use" or keeps its old stamp until all is done: an adoption that is cut off leaves
/// an image that is still refused. `progress` hears bytes done and bytes in all.
///
/// # Errors
/// What keeps the sidecar from being opened, or what the files say.
pub async fn adopt<V: Volume>(
    io: &Io,
    volume: &V,
    image: &Path,
    sidecar: &Path,
    progress: impl FnMut(u64, u64),
) -> Result<AdoptReport, PiOpenError> {
    let fault = |what| PiOpenError::new(sidecar, image, what);
    let stamp = stamp_now(volume, image, sidecar)?;
    let storage = match open_file(io, sidecar, false).await {
        Ok(storage) => storage,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(fault(Kind::Missing)),
        Err(e) => return Err(fault(Kind::Store(e.into()))),
    };
    let store = Sidecar::open(storage).await.map_err(|e| fault(Kind::Store(e)))?;
    let report = take(volume, &store, progress).await.map_err(fault)?;
    sync_image(volume, image, sidecar).await?;
    finish(&store, stamp).await.map_err(fault)?;
    Ok(report)
}

/// Gives every block that does not match a new tuple.
pub(super) async fn take<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    mut progress: impl FnMut(u64, u64),
) -> Result<AdoptReport, Kind> {
    let image = |e: IoError| Kind::Image(Box::new(e));
    let size = sidecar.block_size();
    let checker =
        Checker { guard: Guard::best(), kind: sidecar.kind(), block_size: size, tags: sidecar.tags() };
    let capacity = size.blocks_in(volume.limits().capacity);
    // What a crash has left in the journal comes before the tuples.
    let claims = sidecar.claims(false).await.map_err(|e| Kind::Store(e.into()))?;
    let known = 0..capacity.min(sidecar.capacity()).0;
    replay(volume, sidecar, &checker, &claims, known, Sink::File).await.map_err(image)?;
    if capacity != sidecar.capacity() {
        sidecar.set_capacity(capacity).await.map_err(|e| Kind::Store(e.into()))?;
    }
    let (_, total) = bytes(size, 0..capacity.0).map_err(image)?;
    let mut report = AdoptReport { blocks: capacity.0, ..AdoptReport::default() };
    let step = |block: u64| progress(block << size.shift(), total);
    let mut changed = Vec::new();
    let seen = |run: &_, m| {
        if changed.len() < LISTED {
            changed.push(BadBlock::new(run, size, m));
        }
    };
    let all = 0..capacity.0;
    let done =
        recompute_seeing(volume, sidecar, &checker, all, Mode::Mend, step, seen).await.map_err(image)?;
    (report.adopted, report.protected) = (done.recomputed, done.protected);
    (report.unreadable, report.changed) = (done.unreadable, changed);
    Ok(report)
}

/// Makes it durable, and clean. The image's data must be durable.
pub(super) async fn finish<S: Storage>(sidecar: &Sidecar<S>, stamp: Stamp) -> Result<(), Kind> {
    let store = |e: std::io::Error| Kind::Store(e.into());
    let mark = sidecar.begin_flush();
    sidecar.sync().await.map_err(store)?;
    sidecar.end_flush(mark, true).await;
    sidecar.clear_journal().await.map_err(store)?;
    sidecar.end_use(stamp).await.map_err(store)
}
