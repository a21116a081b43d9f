//! The dirty bitmaps of a LUN, and who keeps them while nobody serves it: the image those that are persistent, a file of the daemon's the others.
//! Both are read when the LUN starts, and written when it stops in good order; after a crash the former are inconsistent and the latter gone.
//!
//! Whoever changes an image marks its bitmaps as in use. Nobody does so with a file that is not the image's: what it has counts only for the
//! image with the stamp that it had when the LUN stopped.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::{error, warn};

use super::{stack::Stack, state_file::StateFile};
use crate::{
    handover::state::{DirtyBitmap, bounded},
    image::{Stamp, qcow2::StoredBitmap},
    job::bitmaps::{BitmapError, Bitmaps, Bits, KeptBitmap, check_granularity},
    volume::Volume,
};

/// The folder of the files of those that are not persistent.
pub const FOLDER: &str = "bitmaps";

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

/// Those that are not persistent, from a stop of the LUN to its next start.
#[derive(Debug, Serialize, Deserialize)]
struct Left {
    image: PathBuf,
    /// The image when the LUN had closed it.
    stamp: Stamp,
    bitmaps: Vec<DirtyBitmap>,
}

/// What the LUN with that file has left of those that are not persistent, for another host that goes on with the image.
///
/// # Errors
/// As [`StateFile::load`].
pub fn left(file: &StateFile) -> io::Result<Vec<DirtyBitmap>> {
    Ok(file.load::<Left>()?.map_or_else(Vec::new, |left| left.bitmaps))
}

/// The path of an image that tells by its stamp whether somebody else has changed it: a regular file that holds all of itself.
fn stamped(stack: &Stack) -> Option<&Path> {
    let image = stack.image();
    let alone = image.places().first().is_some_and(|place| place == image.path());
    Some(image.path()).filter(|path| alone && path.is_file())
}

/// Keeps them, of a LUN that has closed its image in good order; nothing if they end with the LUN.
pub(super) fn leave(file: &StateFile, stack: &Stack, bitmaps: &Bitmaps) {
    let all: Vec<DirtyBitmap> = to_hand_over(bitmaps).into_iter().filter(|b| !b.persistent).collect();
    let Some((image, stamp)) = stamped(stack).zip(stack.image().left_as()).filter(|_| !all.is_empty()) else {
        return;
    };
    let left = Left { image: image.to_owned(), stamp, bitmaps: bounded(&all) };
    if let Err(error) = file.save(left, true) {
        warn!(path = %file.path().display(), %error, "the dirty bitmaps that are not persistent are lost");
    }
}

/// Takes those up that the LUN has left at its last stop, before anybody changes the image. The file is gone then, durably: after a crash it
/// would not know what has been written since. If somebody else has changed the image, they are inconsistent.
pub(super) fn found(file: &StateFile, stack: &Stack) -> Vec<DirtyBitmap> {
    let taken = file.load::<Left>().and_then(|left| match left {
        Some(left) => file.remove_durably().map(|()| Some(left)),
        None => Ok(None),
    });
    let left = match taken {
        Ok(Some(left)) => left,
        Ok(None) => return Vec::new(),
        Err(error) => {
            warn!(path = %file.path().display(), %error, "the dirty bitmaps that are not persistent are lost");
            return Vec::new();
        }
    };
    let Some(image) = stamped(stack).filter(|path| **path == left.image) else {
        warn!(image = %left.image.display(), "the LUN has another image: the dirty bitmaps that are not persistent are gone");
        return Vec::new();
    };
    let unchanged = stack.image().stamp().is_ok_and(|now| left.stamp == now);
    let mut bitmaps = left.bitmaps;
    for bitmap in bitmaps.iter_mut().filter(|_| !unchanged) {
        warn!(image = %image.display(), bitmap = bitmap.name, "the image has been changed by somebody else: the dirty bitmap is inconsistent, and can only be removed");
        bitmap.words = None;
    }
    bitmaps
}
