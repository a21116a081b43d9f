//! The dirty bitmaps of a LUN, and the image that keeps some of them: read when it is opened, stored when it is closed in good order.

use tracing::{error, warn};

use super::stack::Stack;
use crate::{
    handover::state::DirtyBitmap,
    image::qcow2::StoredBitmap,
    job::bitmaps::{BitmapError, Bitmaps, Bits, KeptBitmap, check_granularity},
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

/// All of them, as another host takes them over.
pub(super) fn to_hand_over(bitmaps: &Bitmaps) -> Vec<DirtyBitmap> {
    let all = bitmaps.all().into_iter().map(|(kept, persistent)| DirtyBitmap {
        name: kept.name,
        granularity: kept.granularity,
        recording: kept.enabled,
        persistent,
        words: kept.bits.map(|bits| bits.words().to_vec()),
    });
    all.collect()
}

/// Takes over what came from another host, before the LUN serves. Where the image cannot keep one that another kept, it lasts as long as the LUN serves.
pub(super) fn take_over(stack: &Stack, bitmaps: &Bitmaps, from: Vec<DirtyBitmap>) {
    let capacity = stack.limits().capacity;
    for DirtyBitmap { name, granularity, recording, persistent, words } in from {
        if let Err(error) = check_granularity(capacity, granularity) {
            warn!(bitmap = name, granularity, %error, "the dirty bitmap stays behind");
            continue;
        }
        let can = if persistent { check_kept(stack) } else { Ok(()) };
        if let Err(error) = &can {
            warn!(bitmap = name, %error, "the dirty bitmap is not persistent any more");
        }
        let bits = words.map(|words| Bits::from_words(capacity, granularity, words));
        let kept = KeptBitmap { name, enabled: recording, bits, granularity };
        bitmaps.put(capacity, kept, persistent && can.is_ok());
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
