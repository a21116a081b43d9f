//! What the service manager is told, in `sd_notify(3)`'s words: that the LUNs are up, how they are, and that the daemon lives.
//!
//! READY=1 is held back until every LUN that was there at the start, or is declared, is online or has failed with a reason, and for
//! [`START_PATIENCE`] at most: an image that cannot be opened, or hangs, must not keep the host from booting.
//! WATCHDOG=1 is sent by the daemon's loop, so a loop that hangs sends none; and it is withheld while a LUN's thread
//! does not turn. Without `NOTIFY_SOCKET` all of this is silent.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use sd_notify::NotifyState;

use super::devices::Standing;
use crate::lun::Pulse;

/// How long READY waits for LUNs that are still being opened.
pub const START_PATIENCE: Duration = Duration::from_secs(60);

/// How often the daemon's loop turns at least while READY is held back.
const START_TURN: Duration = Duration::from_millis(50);

/// The most that a line for the service manager says of one LUN's failure.
const REASON_CHARS: usize = 120;

/// The service manager, as the daemon's loop talks to it.
pub struct Manager {
    starting: Option<Starting>,
    watchdog: Option<Watchdog>,
    status: String,
    unheard: bool,
}

struct Starting {
    minors: BTreeSet<u32>,
    until: Instant,
}

impl Manager {
    /// As the environment says: `NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`.
    pub fn from_env(now: Instant) -> Manager {
        let watchdog = sd_notify::watchdog_enabled().filter(|t| !t.is_zero()).map(|t| Watchdog::new(t, now));
        Manager { starting: None, watchdog, status: String::new(), unheard: false }
    }

    /// How long the daemon's loop may sleep.
    pub fn turn_within(&self) -> Duration {
        let watchdog = self.watchdog.as_ref().map_or(Duration::MAX, |w| w.every / 4);
        if self.starting.is_some() { START_TURN.min(watchdog) } else { watchdog }
    }

    /// The LUNs that are there now are those that READY waits for, and the declared ones, while `declaring`.
    pub fn begin(&mut self, now: Instant, declaring: bool, standings: &[Standing]) {
        let minors = standings.iter().map(|s| s.minor).collect();
        self.starting = Some(Starting { minors, until: now + START_PATIENCE });
        self.turn(now, declaring, standings);
    }

    /// Whether READY has not been told yet.
    pub fn is_starting(&self) -> bool {
        self.starting.is_some()
    }

    /// To be called whenever the loop turns: tells what has changed, and feeds the watchdog when that is due and deserved.
    pub fn turn(&mut self, now: Instant, declaring: bool, standings: &[Standing]) {
        let status = in_words(standings);
        if let Some(starting) = &self.starting {
            let mut late: Vec<&str> = standings
                .iter()
                .filter(|s| s.outcome.is_none() && starting.minors.contains(&s.minor))
                .map(|s| s.name.as_str())
                .collect();
            if declaring {
                late.push("declared ones");
            }
            if late.is_empty() || now >= starting.until {
                if !late.is_empty() {
                    let seconds = START_PATIENCE.as_secs();
                    tracing::warn!(
                        luns = late.join(", "),
                        "not up after {seconds} s: the service counts as started without them, and they go on starting"
                    );
                }
                tracing::info!("ready: {status}");
                self.starting = None;
                self.tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
                self.status.clone_from(&status);
            }
        }
        if self.status != status {
            self.tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        if self.watchdog.as_mut().is_some_and(|w| w.turn(now, standings)) {
            self.tell(&[NotifyState::Watchdog]);
        }
    }

    /// The daemon looks anew at what there is, until [`Manager::reloaded`].
    pub fn reloading(&mut self) {
        match NotifyState::monotonic_usec_now() {
            Ok(time) => self.tell(&[NotifyState::Reloading, time]),
            Err(_) => self.tell(&[NotifyState::Reloading]),
        }
    }

    /// It has looked. READY stays held back if it was.
    pub fn reloaded(&mut self) {
        if self.starting.is_none() {
            self.tell(&[NotifyState::Ready]);
        }
    }

    /// The daemon stops: its LUNs finish what is under way.
    pub fn stopping(&mut self, luns: usize) {
        self.status = format!("stopping: {luns} to close");
        let status = self.status.clone();
        self.tell(&[NotifyState::Stopping, NotifyState::Status(&status)]);
    }

    /// To be called while the daemon waits for its LUNs to stop. The watchdog is fed whatever they do: how long that
    /// may take is bounded by the one who waits.
    pub fn still_stopping(&mut self, now: Instant, luns: usize) {
        let status = format!("stopping: {luns} to close");
        if self.status != status {
            self.tell(&[NotifyState::Status(&status)]);
            self.status = status;
        }
        if self.watchdog.as_mut().is_some_and(|w| w.is_due(now)) {
            self.tell(&[NotifyState::Watchdog]);
        }
    }

    fn tell(&mut self, states: &[NotifyState]) {
        match sd_notify::notify(states) {
            Ok(()) => self.unheard = false,
            Err(e) if !self.unheard => {
                self.unheard = true;
                tracing::warn!("the service manager cannot be told through NOTIFY_SOCKET: {e}");
            }
            Err(_) => {}
        }
    }
}

/// When the watchdog is fed: every half of its time, if no LUN has owed a sign of life for that long.
struct Watchdog {
    every: Duration,
    fed: Instant,
    asked: BTreeMap<u32, Asked>,
}

struct Asked {
    pulse: Pulse,
    at: Instant,
    /// It has been logged as stuck.
    named: bool,
}

impl Watchdog {
    fn new(time: Duration, now: Instant) -> Watchdog {
        Watchdog { every: time / 2, fed: now, asked: BTreeMap::new() }
    }

    fn is_due(&mut self, now: Instant) -> bool {
        // The loop turns four times in `every`: so that it is never more than that from one to the next.
        let due = now.saturating_duration_since(self.fed) >= self.every * 3 / 4;
        if due {
            self.fed = now;
        }
        due
    }

    /// Asks each LUN twice in the time in which it has to answer once. True if the watchdog is to be fed now.
    fn turn(&mut self, now: Instant, luns: &[Standing]) -> bool {
        self.asked.retain(|minor, asked| {
            luns.iter()
                .any(|s| s.minor == *minor && s.pulse.as_ref().is_some_and(|p| p.is_same(&asked.pulse)))
        });
        let mut stuck = false;
        for (lun, pulse) in luns.iter().filter_map(|s| Some((s, s.pulse.as_ref()?))) {
            let asked = self.asked.entry(lun.minor).or_insert_with(|| {
                pulse.ask();
                Asked { pulse: pulse.clone(), at: now, named: false }
            });
            let since = now.saturating_duration_since(asked.at);
            if pulse.is_answered() {
                if std::mem::take(&mut asked.named) {
                    tracing::warn!(lun = %lun.name, "the LUN's thread goes on");
                }
                if since >= self.every / 2 {
                    pulse.ask();
                    asked.at = now;
                }
            } else if since >= self.every {
                stuck = true;
                if !std::mem::replace(&mut asked.named, true) {
                    tracing::error!(
                        lun = %lun.name,
                        "the LUN's thread hangs: no sign of life for {:.1} s; the watchdog is not fed until it goes on",
                        since.as_secs_f64()
                    );
                }
            }
        }
        !stuck && self.is_due(now)
    }
}

/// One line: how many LUNs there are, how they are, and why the first that failed has.
fn in_words(standings: &[Standing]) -> String {
    let online = standings.iter().filter(|s| s.outcome == Some(Ok(()))).count();
    let starting = standings.iter().filter(|s| s.outcome.is_none()).count();
    let failed = standings.len() - online - starting;
    let total = match standings.len() {
        0 => return "no LUNs".to_owned(),
        1 => "1 LUN".to_owned(),
        n => format!("{n} LUNs"),
    };
    let mut parts = vec![format!("{online} online")];
    if starting > 0 {
        parts.push(format!("{starting} starting"));
    }
    if failed > 0 {
        let first = standings.iter().find_map(|s| Some((&s.name, s.outcome.as_ref()?.as_ref().err()?)));
        let why = first.map(|(name, reason)| {
            // A line of the protocol ends where the text's would.
            let line: String =
                reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_CHARS).collect();
            let more = if failed > 1 { ", …" } else { "" };
            format!(" ({name}: {line}{more})")
        });
        parts.push(format!("{failed} failed{}", why.unwrap_or_default()));
    }
    format!("{total}: {}", parts.join(", "))
}

#[cfg(test)]
#[path = "systemd_tests.rs"]
mod tests;
