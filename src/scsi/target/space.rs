//! The soft threshold of the space beneath a thin volume (SBC-4 4.7.3.8): looked at after a command that may have taken some, and seldom.

use std::time::{Duration, Instant};

use tracing::warn;

use super::Target;
use crate::{
    scsi::{sense::Asc, vpd::THRESHOLD_SET_SHIFT},
    volume::Volume,
};

/// How long what was seen is good for.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of the space beneath.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// When it was looked at.
    at: Option<Instant>,
    /// The threshold is reached, and initiators have been told.
    reached: bool,
}

impl<V: Volume> Target<V> {
    /// Whether somebody wants to be told of the threshold, and nobody has looked lately.
    pub(super) fn is_time_for_space(&self) -> bool {
        let wanted = self.settings.get().threshold.is_some_and(|t| t.enabled);
        wanted && self.space.get().at.is_none_or(|at| at.elapsed() >= PAUSE)
    }

    /// Establishes the unit attention THIN PROVISIONING SOFT THRESHOLD REACHED, once for each time that the threshold is reached.
    pub(super) async fn look_at_space(&self) {
        let Seen { reached: before, .. } = self.space.get();
        // At once, so that the commands beside this one do not look too.
        self.space.set(Seen { at: Some(Instant::now()), reached: before });
        let Some(available) = self.available_sets().await else { return };
        // MODE SELECT may have come meanwhile: what counts is what it says now.
        let Some(threshold) = self.settings.get().threshold.filter(|t| t.enabled) else { return };
        let reached = available <= u64::from(threshold.count);
        if reached && !self.space.get().reached {
            warn!(available_mib = available, threshold_mib = threshold.count, "the space beneath runs out");
            self.attention(Asc::SOFT_THRESHOLD_REACHED);
        }
        self.space.set(Seen { reached, ..self.space.get() });
    }

    /// Threshold sets that are free beneath the volume.
    pub(super) async fn available_sets(&self) -> Option<u64> {
        if !self.geometry.get().thresholds {
            return None;
        }
        self.volume.free_bytes().await.map(|bytes| bytes >> THRESHOLD_SET_SHIFT)
    }
}
