//! The dirty bitmaps of a LUN, and the image that keeps some of them: read when it is opened, stored when it is closed in good order.

use tracing::{error, warn};

use super::stack::Stack;
use crate::{
    image::qcow2::StoredBitmap,
    job::bitmaps::{BitmapError, Bits, KeptBitmap},
    volume::Volume,
};

/// The granularity of a new bitmap (bytes), where none is asked for: QEMU's for clusters of 64 KiB.
pub const GRANULARITY: u64 = 64 << 10;

/// Takes over what an image keeps; nothing of one that is not written to. While nobody changes it, or what is changed is marked as soon as this returns.
pub(super) async fn load(stack: &Stack) -> Vec<KeptBitmap> {
    let (image, capacity) = (stack.image(), stack.limits().capacity);
    if stack.limits().read_only {
        return Vec::new();
    }
    let stored = image.use_bitmaps().await.unwrap_or_else(|error| {
        error!(image = %image.path().display(), %error, "the dirty bitmaps of the image cannot be read: there are none");
        Vec::new()
    });
    let kept = stored.into_iter().map(|stored| {
        let granularity = 1 << stored.granularity_bits;
        let bits = stored.words.map(|words| Bits::from_words(capacity, granularity, words));
        if bits.is_none() {
            warn!(image = %image.path().display(), bitmap = stored.name, "the dirty bitmap is inconsistent: the image was not closed in good order; it can only be removed");
        }
        KeptBitmap { name: stored.name, enabled: stored.enabled, bits, granularity }
    });
    kept.collect()
}

/// Stores what an image is to keep; it can only be closed after that.
///
/// # Errors
/// In words.
pub(super) async fn store(stack: &Stack, kept: &[KeptBitmap]) -> Result<(), String> {
    if stack.limits().read_only {
        return Ok(());
    }
    let stored: Vec<StoredBitmap> = kept
        .iter()
        .map(|kept| StoredBitmap {
            name: kept.name.clone(),
            enabled: kept.enabled,
            granularity_bits: kept.granularity.trailing_zeros(),
            words: kept.bits.as_ref().map(|bits| bits.words().to_vec()),
        })
        .collect();
    stack.image().store_bitmaps(&stored).await.map_err(|e| super::chain(&e))
}

/// The same where nobody can do anything about an error: the bitmaps are inconsistent then.
pub(super) async fn store_or_tell(stack: &Stack, kept: &[KeptBitmap]) {
    if let Err(error) = store(stack, kept).await {
        error!(image = %stack.image().path().display(), error, "the dirty bitmaps could not be stored: they are inconsistent from now on");
    }
}

/// Whether the LUN's image can keep one.
///
/// # Errors
/// If it cannot.
pub(super) fn check_kept(stack: &Stack) -> Result<(), BitmapError> {
    stack
        .image()
        .check_bitmaps_work()
        .map_err(|e| BitmapError::CannotPersist(format!("{}: leave out 'persistent'", super::chain(&e))))
}
