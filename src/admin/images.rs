//! Images, as far as LUNs made from them need it: look at one, make one.

use std::path::Path;

use super::Refusal;
use crate::{
    image::{
        Format,
        create::{CreateError, create_qcow2, create_raw},
        direct::CacheMode,
        nbd::is_uri,
        open::{OpenError, OpenOptions, open},
        qcow2::CreateOptions,
    },
    sys,
    units::BlockSize,
    volume::Volume,
};

/// What a look at an image gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looked {
    /// The format.
    pub format: Format,
    /// Bytes of the disk in it.
    pub capacity: u64,
}

/// An image that cannot be opened, as the administrator reads it.
pub fn open_failed(path: &Path, e: &OpenError) -> Refusal {
    Refusal::from("image", path.display(), e).maybe_next(e.next_step())
}

fn create_failed(path: &Path, e: &CreateError) -> Refusal {
    Refusal::from("image", path.display(), e).maybe_next(e.next_step())
}

/// Opens an image as the daemon will, lock and all, and closes it again.
///
/// # Errors
/// Everything that would keep the daemon from serving it.
pub fn look(
    path: &Path,
    read_only: bool,
    cache: CacheMode,
    block_size: BlockSize,
) -> Result<Looked, Refusal> {
    let at = path.to_owned();
    let looked = sys::run(async move |io| {
        let image = open(&io, &at, &OpenOptions { read_only, cache, ..OpenOptions::default() }).await?;
        image.check_block_size(block_size)?;
        image.check_sectors(block_size)?;
        let looked = Looked { format: image.format(), capacity: image.limits().capacity };
        Ok((looked, image.close().await))
    });
    let (looked, closed) = looked.map_err(|e: OpenError| open_failed(path, &e))?;
    closed.map_err(|e| Refusal::from("image", path.display(), &e))?;
    Ok(looked)
}

/// Makes an image with the usual options.
///
/// # Errors
/// Nothing is left behind then.
pub fn create_new(path: &Path, format: Format, size: u64) -> Result<(), Refusal> {
    make(path, format, CreateOptions::new(size))
}

/// Makes an image.
///
/// # Errors
/// Nothing is left behind then.
pub fn make(path: &Path, format: Format, options: CreateOptions) -> Result<(), Refusal> {
    if is_uri(path) {
        return Err(Refusal::new("image", path.display(), "an NBD export is made by its server"));
    }
    let at = path.to_owned();
    let made = sys::run(async move |io| match format {
        Format::Raw => create_raw(&io, &at, options.size).await,
        Format::Qcow2 => create_qcow2(&io, &at, &options).await,
    });
    made.map_err(|e| create_failed(path, &e))
}
