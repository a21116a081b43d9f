//! How long a thread's I/O may go on touching files that another host may take over: until a moment that somebody moves on, for as long as
//! the files are known to be ours.
//!
//! [`super::io::Io`] looks at it each time that it hands operations to the kernel, and not where they are asked for: a process that
//! was stopped in between may have lost its files by the time it goes on. The time is that since boot, in which a host that sleeps grows older too.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::time::{ClockId, clock_gettime};

/// The files are another's, for good.
const LOST: u64 = 0;

/// What I/O may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// All of it.
    Holds,
    /// Nothing, until it is known again whose the files are.
    Expired,
    /// Nothing any more.
    Lost,
}

/// That moment; clones are the same one.
#[derive(Debug, Clone)]
pub struct Fence(Arc<AtomicU64>);

/// An operation that was not begun, because the files are another's.
#[derive(Debug, thiserror::Error)]
#[error("another owner has taken the image over, and this one touches it no more")]
pub struct FenceLost;

impl Default for Fence {
    fn default() -> Fence {
        // Not for a moment until somebody moves it on.
        Fence(Arc::new(AtomicU64::new(LOST + 1)))
    }
}

/// Time since boot, the host's sleep included.
pub fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Fence {
    /// The files are ours until that time since boot. One that was lost stays lost.
    pub fn holds_until(&self, time: Duration) {
        let until = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(LOST + 1);
        // An earlier moment never comes after a later one: one thread alone moves it.
        let _ =
            self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| (now != LOST).then_some(until));
    }

    /// The files are another's.
    pub fn lose(&self) {
        self.0.store(LOST, Ordering::Release);
    }

    /// What may be done now.
    pub fn standing(&self) -> Standing {
        match self.0.load(Ordering::Acquire) {
            LOST => Standing::Lost,
            until if since_boot().as_nanos() < u128::from(until) => Standing::Holds,
            _ => Standing::Expired,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_until_its_moment_and_once_lost_never_again() {
        let fence = Fence::default();
        assert_eq!(fence.standing(), Standing::Expired);
        fence.holds_until(since_boot() + Duration::from_secs(60));
        assert_eq!(fence.clone().standing(), Standing::Holds);
        fence.holds_until(since_boot());
        assert_eq!(fence.standing(), Standing::Expired);
        fence.lose();
        fence.holds_until(since_boot() + Duration::from_secs(60));
        assert_eq!(fence.standing(), Standing::Lost);
    }
}
