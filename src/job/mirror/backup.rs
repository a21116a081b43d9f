//! What a backup does differently: its target gets the volume as it was when the job began.
//!
//! All that is to be copied is dirty from the first command on that the job sees. A change waits until what it touches has been copied, and
//! only then begins (copy-before-write); what is clean stays clean, and changes of it go on at once. A copy has its granules to itself, so
//! that a change finds them dirty or copied, and nothing between.
//!
//! Guests come first: if the copy before a write fails, the past of that granule is lost, whatever the job was told about errors; so the job
//! ends with that error, and the write goes on (QEMU's `on-cbw-error: break-snapshot`).

use super::{
    Mirror, SyncMode, Told,
    copy::{Failure, PIECE},
};
use crate::{
    job::{ErrorAction, Side},
    sys::{exec::yield_now, mem::Buffer},
    units::ByteOffset,
    volume::{ExtentKind, IoErrorKind},
};

impl<S: Side> Mirror<S> {
    /// Takes out of the map what need not be copied: of a target that is `fresh` what reads as zeros, and of a chain's top what it does not
    /// hold. What a guest changes meanwhile has been copied before.
    pub(super) async fn scan_the_past(&self, fresh: bool) {
        let capacity = self.map.capacity();
        let settings = self.settings.get();
        let top = settings.sync == SyncMode::Top;
        // What a bitmap has, and what is there now to be read as zeros, may have been data in the backup before.
        let whole = matches!(settings.sync, SyncMode::Full | SyncMode::Top);
        if !whole || !(fresh || top) {
            return;
        }
        let mut at = 0;
        while at < capacity && !self.is_over() {
            let Ok(extent) = self.source.extent(ByteOffset(at), capacity - at).await else {
                // The copy comes here again, and does what it was told about errors.
                return;
            };
            let zeros = !top && fresh && extent.kind != ExtentKind::Data;
            if zeros || !settings.wants(&extent) {
                self.map.forgo(at, extent.len);
            }
            at += extent.len.max(1);
            yield_now().await;
        }
    }

    /// Copies what a change is about to touch, if that has not been done.
    pub(super) async fn copy_before(&self, at: u64, len: u64) {
        if self.is_over() || self.map.is_clean(at, len) {
            return;
        }
        let range = self.map.covering(at, len);
        let _alone = self.lock.exclusive(range.start, range.end - range.start).await;
        let buffer = Buffer::zeroed(PIECE.min(range.end - range.start) as usize);
        while let Some(copying) = self.map.take_within(&range, PIECE) {
            match self.transfer(copying.range(), &buffer).await {
                Ok(true) => copying.done(),
                Ok(false) => break,
                Err(failure) => {
                    self.past_is_lost(&failure);
                    break;
                }
            }
        }
        if !self.map.has_work() {
            self.changed.notify_all();
        }
    }

    fn past_is_lost(&self, Failure { source, error }: &Failure) {
        let mismatch = match error.kind {
            IoErrorKind::Protection(m) => Some(m),
            _ => None,
        };
        let reason = format!("before a write of a guest: {error}");
        let action = ErrorAction::Report;
        (self.hooks.tell)(Told::Error { source: *source, action, reason: reason.clone(), mismatch });
        self.give_up(&reason);
    }
}
