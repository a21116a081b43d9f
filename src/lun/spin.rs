//! Adaptive polling: after work the loop looks at the ring for a while before it sleeps, if looking has been worth it.
//!
//! The price of sleeping is a wake-up (a poll, a schedule, an interrupt's path); the price of spinning is CPU. The spinner
//! keeps the usual gap between running dry and the next entry. Where that gap is short, it spins for twice its length;
//! where it is long, not at all. So a LUN at ten commands a second costs no spinning, and an idle one nothing.

use std::time::{Duration, Instant};

/// The longest spin: what a few wake-ups cost.
const LONGEST: Duration = Duration::from_micros(200);

pub(super) struct Spinner {
    /// The usual gap, as a moving average over the last few.
    gap: Duration,
    dry_since: Option<Instant>,
    enabled: bool,
}

impl Spinner {
    /// Spins if it may, unless this machine has one CPU, where the peer could not run meanwhile.
    pub(super) fn new(polling: bool) -> Spinner {
        let enabled = polling && std::thread::available_parallelism().is_ok_and(|n| n.get() > 1);
        Spinner { gap: LONGEST * 4, dry_since: None, enabled }
    }

    /// Work has come: the gap since the loop ran dry goes into the average.
    pub(super) fn worked(&mut self) {
        if let Some(since) = self.dry_since.take() {
            // A long pause says no more than that spinning would not have paid.
            let gap = since.elapsed().min(LONGEST * 16);
            self.gap = (self.gap * 7 + gap) / 8;
        }
    }

    /// The loop has run dry: spins until `wake` says so or it is time to sleep. Tells whether `wake` did.
    pub(super) fn spin(&mut self, mut wake: impl FnMut() -> bool) -> bool {
        let start = *self.dry_since.get_or_insert_with(Instant::now);
        let budget = self.budget();
        if budget.is_zero() {
            return false;
        }
        loop {
            for _ in 0..32 {
                if wake() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= budget {
                return false;
            }
        }
    }

    fn budget(&self) -> Duration {
        if self.enabled && self.gap <= LONGEST { (self.gap * 2).min(LONGEST) } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(gaps: &[Duration]) -> Spinner {
        let mut spinner = Spinner { enabled: true, ..Spinner::new(true) };
        for gap in gaps {
            spinner.dry_since = Instant::now().checked_sub(*gap);
            spinner.worked();
        }
        spinner
    }

    #[test]
    fn an_idle_or_slow_device_does_not_spin() {
        assert_eq!(after(&[]).budget(), Duration::ZERO);
        assert_eq!(after(&[Duration::from_millis(10); 20]).budget(), Duration::ZERO);
        let mut woken = 0;
        assert!(!after(&[]).spin(|| {
            woken += 1;
            true
        }));
        assert_eq!(woken, 0);
    }

    #[test]
    fn a_busy_device_spins_and_stops_when_the_load_goes() {
        let mut busy = vec![Duration::from_micros(20); 40];
        assert!(after(&busy).budget() > Duration::ZERO);
        assert!(after(&busy).budget() <= LONGEST);
        busy.extend([Duration::from_millis(10); 10]);
        assert_eq!(after(&busy).budget(), Duration::ZERO);
    }
}
