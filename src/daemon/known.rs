//! What a device's worker finds out, and the daemon's loop looks at without waiting for the worker.

use std::sync::{Mutex, OnceLock, PoisonError, atomic::AtomicBool};

use crate::lun::Pulse;

/// What the worker finds out and the daemon's loop wants to know.
#[derive(Debug, Default)]
pub struct Known {
    /// [`Identity::device_id`], once it is known.
    pub device_id: OnceLock<u32>,
    /// The kernel is known not to wait for answers.
    pub wants_no_answers: AtomicBool,
    /// The kernel was told that the device failed as it came; it takes it down, and the worker has ended.
    pub refused: AtomicBool,
    /// Configurations that the device has come to have since it was found, as the kernel will name it.
    configs: Mutex<Vec<String>>,
    told: Mutex<Told>,
}

/// What came of the LUN's start: nothing yet, that it is up, or why it is not.
pub type Outcome = Option<Result<(), String>>;

#[derive(Debug, Default)]
struct Told {
    outcome: Outcome,
    pulse: Option<Pulse>,
}

impl Known {
    /// How the LUN is, and the way to see whether its thread turns, for as long as it serves.
    pub fn standing(&self) -> (Outcome, Option<Pulse>) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        (told.outcome.clone(), told.pulse.clone())
    }

    /// Whether the device is known by that configuration too.
    pub fn has_come_to(&self, config: &str) -> bool {
        let configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        configs.iter().any(|known| known == config)
    }

    pub(super) fn comes_to(&self, config: &str) {
        self.configs.lock().unwrap_or_else(PoisonError::into_inner).push(config.to_owned());
    }

    pub(super) fn tell(&self, outcome: Outcome, pulse: Option<Pulse>) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Told { outcome, pulse };
    }
}
