//! Overlays: empty qcow2 images over an image that somebody has open, as a snapshot takes them. The backing file is in use, and
//! locked by its user, so it is not opened here; whoever opens the overlay opens it.
//!
//! Called by the LUN's snapshots.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use super::{
    Format,
    create::{CreateError, make_qcow2},
    open::{OpenError, OpenErrorKind, backing, open_layer},
    qcow2::{CreateOptions, FileStorage, Qcow2},
};
use crate::{
    sys::io::Io,
    units::ByteOffset,
    volume::{ExtentKind, IoError, IoOp, Volume},
};

/// Why an image is not taken for an overlay.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its header names no backing file, or another.
    #[error("its backing file is {}, and not {wanted}", has.as_deref().unwrap_or("none"))]
    Backing {
        /// What it names.
        has: Option<String>,
        /// The image that it should be over.
        wanted: String,
    },
    /// The header says another format of the backing file than it has.
    #[error("it takes its backing file for {has}, and that is {wanted}")]
    BackingFormat {
        /// What the header says.
        has: String,
        /// What is true.
        wanted: Format,
    },
    /// Its disk is not as large.
    #[error("it has {has} bytes, and its backing file {wanted}")]
    Size {
        /// Its bytes.
        has: u64,
        /// The backing file's.
        wanted: u64,
    },
    /// It holds something already, which would show instead of what is there.
    #[error("it holds data of its own, at byte {0}")]
    HoldsData(u64),
}

/// Makes an empty qcow2 image of `size` bytes over an image of that format, which is not opened.
///
/// # Errors
/// As [`super::create::create_qcow2`]; nothing is left behind then.
pub async fn create_overlay(
    io: &Io,
    path: &Path,
    size: u64,
    (below, format): (&Path, Format),
) -> Result<(), CreateError> {
    let options = CreateOptions {
        backing_file: Some(below.display().to_string()),
        backing_format: Some(format.to_string()),
        ..CreateOptions::new(size)
    };
    make_qcow2(io, path, options).await
}

/// Sees whether an image is an empty overlay of that one: of its size, over it, and without anything of its own.
///
/// # Errors
/// [`OverlayError`].
pub async fn check_overlay(
    io: &Io,
    path: &Path,
    size: u64,
    (below, format): (&Path, Format),
) -> Result<(), OverlayError> {
    let layer = open_layer(io, path, Some(Format::Qcow2), true, true).await?;
    let driver = |e: IoError| OpenError::driver(path, e);
    let storage = FileStorage::new(io, layer.file.clone());
    let storage = storage.map_err(|e| driver(IoError::from_io(IoOp::Open, e).path(path)))?;
    // Alone: what it holds itself, and not what shows through.
    let overlay = Qcow2::open_on(storage, path, true, None).await.map_err(driver)?;
    let header = overlay.header();
    let (name, said) = (header.backing_file.as_deref(), header.backing_format.as_deref());
    let found = backing(path, name, said).map_err(|what| OpenError::new(path, what))?;
    let same = |a: &Path| -> Result<bool, OpenError> {
        let look = |p: &Path| fs::metadata(p).map_err(|e| OpenError::new(p, OpenErrorKind::Io).source(e));
        let (a, b) = (look(a)?, look(below)?);
        Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
    };
    match &found {
        Some((file, _)) if same(file)? => {}
        _ => {
            let (has, wanted) = (name.map(str::to_owned), below.display().to_string());
            return Err(OverlayError::Backing { has, wanted });
        }
    }
    // Without one the first bytes would decide, and a guest can choose those of a raw disk.
    if found.and_then(|(_, format)| format) != Some(format) {
        let has = said.unwrap_or("whatever its first bytes say").to_owned();
        return Err(OverlayError::BackingFormat { has, wanted: format });
    }
    let has = overlay.limits().capacity;
    if has != size {
        return Err(OverlayError::Size { has, wanted: size });
    }
    let mut at = 0;
    while at < has {
        let extents = overlay.map_extents(ByteOffset(at), has - at).await.map_err(driver)?;
        if let Some(own) = extents.iter().find(|e| e.kind != ExtentKind::Unallocated) {
            return Err(OverlayError::HoldsData(own.start.0));
        }
        let Some(last) = extents.last() else { break };
        at = last.start.0 + last.len;
    }
    Ok(())
}
