//! Adaptive polling: after work the loop looks at the ring for a while before it sleeps, if looking has been worth it; and while a command that
//! is alone waits for its I/O, it looks for its results in the same way, with gaps of their own.
//!
//! The price of sleeping is a wake-up, and what that is depends on the machine: some microseconds on one, some hundred on one that is
//! emulated. So it is measured, once for the process ([`wakeup`]). The price of spinning is CPU. The spinner keeps the usual gap between
//! running dry and the next entry. Where the gap is no longer than twice a wake-up (and [`UNTRIED`]), it spins for twice the gap.
//!
//! Where it is longer, it is tried out ([`Trial`]): a few gaps are spun through now and then, and if work then comes sooner than it does to a
//! thread that sleeps, spinning pays, until a few gaps that are slept through say otherwise. That holds what no measurement of a wake-up
//! has in it (a processor that has to be woken as well, and the sender's part of it), and it tells a peer that waits for our answer, and
//! is the faster for it, from one that sends at its own pace and gains nothing. So a LUN at ten commands a second costs no spinning, and
//! an idle one nothing.
//!
//! Whatever comes, three things bound it: no spin is longer than twice [`MOST`]; spins that find nothing take no more than one part in
//! [`WASTE`] of a CPU for a LUN; and no more than half of the CPUs spin at once, for all LUNs of the process together.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};

/// Gaps up to this are worth a spin however cheap a wake-up is: it costs more than the thread's own time (caches, the sender's).
const LEAST: Duration = Duration::from_micros(20);

/// Gaps beyond this are not spun through on the strength of what a wake-up costs alone: a load of 1 000 commands a second at its own pace
/// would have a CPU to itself where wake-ups are dear, and gain nothing.
const UNTRIED: Duration = Duration::from_micros(100);

/// Gaps beyond this are worth none, however dear a wake-up is.
const MOST: Duration = Duration::from_millis(2);

/// Of the time that passes, spins that find nothing may take one part in so many.
const WASTE: u32 = 16;

/// How much of that can be saved up.
const PURSE: Duration = Duration::from_millis(5);

/// What a wake-up is taken to cost where it cannot be measured.
const USUAL: Duration = Duration::from_micros(20);

/// Gaps that are enough to judge by.
const TRIAL: usize = 16;

/// Gaps that are spun through before those. A thread that sleeps is often woken on its peer's processor, and one that spins there is in the
/// peer's way until the scheduler moves one of the two, which takes some milliseconds.
const WARM: usize = 48;

/// After such a pause what was found before says nothing any more.
const FORGET: Duration = Duration::from_secs(1);

/// So many gaps from one trial to the next while spinning does not pay: at first, and at most, after trials that found the same.
const BETWEEN_SPINS: (u32, u32) = (128, 8192);

/// The same while it does: those trials are slow commands, and more than one in a hundred would be seen.
const BETWEEN_SLEEPS: (u32, u32) = (2048, 16384);

/// Of so many rounds of looks, one ends with a yield. Somebody who waits for this processor has it then: the kernel's thread that ends the
/// commands just answered, or their sender. A spin that does not yield holds them up until the scheduler's next tick.
const BETWEEN_YIELDS: usize = 4;

/// Threads that spin at this moment.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

pub(super) struct Spinner {
    /// The usual gap, as a moving average over the last few.
    gap: Duration,
    /// The longest gap that is worth spinning for.
    longest: Duration,
    wakeup: Duration,
    dry_since: Option<Instant>,
    worked_at: Option<Instant>,
    /// It has slept since then, so the gap has a wake-up in it.
    slept: bool,
    /// It has spun since then.
    has_spun: bool,
    /// Whether longer gaps are worth it.
    trial: Trial,
    /// What may still be spent on spins that find nothing.
    purse: Duration,
    filled: Option<Instant>,
    /// Threads that may spin at once, and with 0 none.
    most: usize,
    spun: Duration,
}

impl Spinner {
    /// Spins if it may, unless this machine has one CPU, where the peer could not run meanwhile.
    pub(super) fn new(polling: bool) -> Spinner {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
        if polling && cpus > 1 { Spinner::with(wakeup(), cpus / 2) } else { Spinner::with(USUAL, 0) }
    }

    fn with(wakeup: Duration, most: usize) -> Spinner {
        let longest = (wakeup * 2).clamp(LEAST, UNTRIED);
        Spinner {
            gap: longest * 4,
            longest,
            wakeup,
            dry_since: None,
            worked_at: None,
            slept: false,
            has_spun: false,
            trial: Trial::new(),
            purse: PURSE,
            filled: None,
            most,
            spun: Duration::ZERO,
        }
    }

    /// What it has spun so far.
    pub(super) fn spun(&self) -> Duration {
        self.spun
    }

    /// Work has come: the gap since the loop ran dry goes into the average.
    pub(super) fn worked(&mut self, now: Instant) {
        let slept = std::mem::take(&mut self.slept);
        let spun = std::mem::take(&mut self.has_spun);
        let before = self.worked_at.replace(now);
        if let Some(since) = self.dry_since.take() {
            let gap = now.saturating_duration_since(since);
            if self.gap > self.longest {
                let cycle = before.map_or(gap, |before| now.saturating_duration_since(before));
                self.trial.gap(spun, gap, cycle);
            }
            let gap = if slept { gap.saturating_sub(self.wakeup) } else { gap };
            // A long pause says no more than that spinning would not have paid.
            self.gap = (self.gap * 7 + gap.min(self.longest * 16)) / 8;
        }
    }

    /// The thread is about to sleep.
    pub(super) fn sleeps(&mut self) {
        self.slept = true;
    }

    /// The loop has run dry: spins until `wake` says so or it is time to sleep. Tells whether `wake` did.
    pub(super) fn spin(&mut self, mut wake: impl FnMut() -> bool) -> bool {
        if self.most == 0 {
            return false;
        }
        let start = Instant::now();
        let budget = self.dry(start);
        let Some(_turn) = (!budget.is_zero()).then(|| Turn::take(self.most)).flatten() else { return false };
        self.has_spun = true;
        let mut round = 0_usize;
        loop {
            for _ in 0..32 {
                if wake() {
                    self.ends(start.elapsed(), true);
                    return true;
                }
                std::hint::spin_loop();
            }
            if round.is_multiple_of(BETWEEN_YIELDS) {
                std::thread::yield_now();
            }
            round += 1;
            let spent = start.elapsed();
            if spent >= budget {
                self.ends(spent, false);
                return false;
            }
        }
    }

    /// The loop has run dry: how long it may spin.
    fn dry(&mut self, now: Instant) -> Duration {
        let since = *self.dry_since.get_or_insert(now);
        let filled = self.filled.replace(now).unwrap_or(now);
        self.purse = PURSE.min(self.purse + now.saturating_duration_since(filled) / WASTE);
        let worth = match self.gap <= self.longest {
            true => (self.gap * 2).max(LEAST / 4),
            false if self.trial.spins() => MOST,
            false => return Duration::ZERO,
        };
        // What is left of this gap's, if the loop was woken by something else meanwhile.
        worth.saturating_sub(now.saturating_duration_since(since)).min(self.purse)
    }

    fn ends(&mut self, spent: Duration, found: bool) {
        self.spun += spent;
        if !found {
            self.purse = self.purse.saturating_sub(spent);
        }
    }
}

/// Whether work comes sooner to a thread that spins than to one that sleeps: one way for most gaps, the other now and then.
struct Trial {
    slept: Cycles,
    spun: Cycles,
    /// What the last trial found.
    pays: bool,
    /// Gaps until the next one, and how many there were before it.
    next: u32,
    between: u32,
    /// Gaps that the one under way still needs.
    left: usize,
    /// Gaps in a row that were too long.
    long: usize,
}

impl Trial {
    fn new() -> Trial {
        let (next, between) = (BETWEEN_SPINS.0, BETWEEN_SPINS.0);
        Trial { slept: Cycles::new(), spun: Cycles::new(), pays: false, next, between, left: 0, long: 0 }
    }

    /// Whether to spin now.
    fn spins(&self) -> bool {
        self.pays != (self.left > 0)
    }

    /// A gap is over, spun through or slept through. `cycle` is the time from the work before it to the work after it: what a sleep makes
    /// slower is not the gap alone.
    fn gap(&mut self, spun: bool, gap: Duration, cycle: Duration) {
        if gap > MOST {
            self.long_gap(gap);
            return;
        }
        self.long = 0;
        if spun { &mut self.spun } else { &mut self.slept }.push(cycle);
        if self.left == 0 {
            self.next -= 1;
            if self.next == 0 {
                self.left = if self.pays { TRIAL } else { WARM + TRIAL };
            }
        } else if spun != self.pays {
            // The way that is tried. (The other is taken when no turn or no time is left to spin.)
            self.left -= 1;
            if self.left == 0 {
                self.judge();
            }
        }
    }

    /// Nothing to be had of an idle or slow device, and nothing to be tried.
    fn long_gap(&mut self, gap: Duration) {
        self.long += 1;
        if gap > FORGET {
            *self = Trial::new();
        } else if self.long >= TRIAL / 2 {
            if self.pays {
                (self.pays, self.between) = (false, BETWEEN_SPINS.0);
            }
            (self.left, self.next) = (0, self.between);
        }
    }

    fn judge(&mut self) {
        // More to begin than to go on, so that it does not go to and fro.
        let part = if self.pays { 8 } else { 4 };
        let spun = self.spun.median();
        let slept = self.slept.median();
        let pays = slept >= spun + spun / part;
        tracing::debug!(
            pays,
            slept_us = slept.as_micros() as u64,
            spun_us = spun.as_micros() as u64,
            "spinning was tried"
        );
        let (first, most) = if pays { BETWEEN_SLEEPS } else { BETWEEN_SPINS };
        self.between = if pays == self.pays { (self.between * 4).min(most) } else { first };
        (self.pays, self.next) = (pays, self.between);
    }
}

/// How long the last few times from work to work were.
struct Cycles {
    cycles: [Duration; TRIAL],
    at: usize,
}

impl Cycles {
    fn new() -> Cycles {
        Cycles { cycles: [Duration::ZERO; TRIAL], at: 0 }
    }

    fn push(&mut self, cycle: Duration) {
        self.cycles[self.at] = cycle;
        self.at = (self.at + 1) % TRIAL;
    }

    fn median(&self) -> Duration {
        let mut cycles = self.cycles;
        cycles.sort_unstable();
        cycles[TRIAL / 2]
    }
}

/// One of the threads that spin.
struct Turn;

impl Turn {
    fn take(most: usize) -> Option<Turn> {
        let turn = SPINNING.fetch_add(1, Ordering::Relaxed) < most;
        // Given back at once if there was none left.
        let guard = Turn;
        turn.then_some(guard)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        SPINNING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What it takes on this machine until a thread that sleeps runs again. Measured with the first call, which takes as long as a few dozen
/// wake-ups.
pub(super) fn wakeup() -> Duration {
    static COST: OnceLock<Duration> = OnceLock::new();
    *COST.get_or_init(|| match measure() {
        Ok(cost) => {
            tracing::debug!(microseconds = cost.as_micros() as u64, "a wake-up");
            cost
        }
        Err(error) => {
            tracing::debug!(%error, "what a wake-up costs cannot be measured");
            USUAL
        }
    })
}

/// Two threads on two processors wake each other in turn, each time after a pause: a ring's peer is on another processor than the LUN's thread, and
/// what costs most is to wake a processor that is idle. The lower quartile: what comes on top is other work of the machine.
fn measure() -> io::Result<Duration> {
    const ROUNDS: usize = 24;
    const PAUSE: Duration = Duration::from_micros(300);
    const END: u64 = 1 << 32;
    let event = || eventfd(0, EventfdFlags::CLOEXEC);
    let (there, back) = (event()?, event()?);
    let read = |fd| {
        let mut word = [0; 8];
        rustix::io::read(fd, &mut word).map(|_| u64::from_ne_bytes(word))
    };
    let write = |fd, word: u64| rustix::io::write(fd, &word.to_ne_bytes());
    let here = rustix::thread::sched_getcpu();
    std::thread::scope(|scope| {
        std::thread::Builder::new().name("wakeup".into()).spawn_scoped(scope, || {
            leave_processor(here);
            while read(&there).is_ok_and(|word| word < END) && write(&back, 1).is_ok() {}
        })?;
        let round = || {
            std::thread::sleep(PAUSE);
            let start = Instant::now();
            write(&there, 1)?;
            read(&back)?;
            Ok(start.elapsed() / 2)
        };
        let rounds: rustix::io::Result<Vec<Duration>> = (0..ROUNDS).map(|_| round()).collect();
        write(&there, END)?;
        let mut rounds = rounds?;
        rounds.sort_unstable();
        Ok(rounds[ROUNDS / 4])
    })
}

/// Moves this thread to other processors than that one, if it may run on others.
fn leave_processor(here: usize) {
    use rustix::thread::{sched_getaffinity, sched_setaffinity};
    if let Ok(mut may) = sched_getaffinity(None) {
        may.unset(here);
        // Where there is no other it stays, and what is measured is a wake-up on the same one.
        let _ = sched_setaffinity(None, &may);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A LUN whose commands come so long after the last was answered; at a wake-up of 50 µs.
    struct Lun {
        spinner: Spinner,
        now: Instant,
        /// What a sleep costs on top of the wake-up that was measured.
        hidden: Duration,
        /// Commands come at their own pace, and not so long after an answer.
        paced: bool,
    }

    impl Lun {
        fn new() -> Lun {
            Lun::with(50 * US)
        }

        fn with(wakeup: Duration) -> Lun {
            let spinner = Spinner::with(wakeup, 1);
            Lun { spinner, now: Instant::now(), hidden: Duration::ZERO, paced: false }
        }

        fn gaps(&mut self, count: usize, gap: Duration) {
            for _ in 0..count {
                self.gap(gap);
            }
        }

        /// Runs dry, and gets work after that time: spins or sleeps as the policy has it. Tells how long it has spun.
        fn gap(&mut self, gap: Duration) -> Duration {
            let s = &mut self.spinner;
            let budget = s.dry(self.now);
            let spun = budget.min(gap);
            if !budget.is_zero() {
                s.has_spun = true;
                s.ends(spun, budget >= gap);
            }
            self.now += gap;
            if budget < gap {
                s.sleeps();
                if !self.paced {
                    self.now += s.wakeup + self.hidden;
                }
            }
            s.worked(self.now);
            self.now += 3 * US;
            spun
        }

        /// How many of the next gaps are spun through.
        fn spins(&mut self, count: usize, gap: Duration) -> usize {
            (0..count).filter(|_| self.gap(gap) == gap).count()
        }
    }

    #[test]
    fn an_idle_or_slow_device_does_not_spin() {
        let mut lun = Lun::new();
        for _ in 0..1000 {
            assert_eq!(lun.gap(Duration::from_millis(10)), Duration::ZERO);
        }
        let mut woken = 0;
        let spun = lun.spinner.spin(|| {
            woken += 1;
            true
        });
        assert!(!spun && woken == 0);
    }

    #[test]
    fn gaps_up_to_twice_a_wake_up_are_spun_through_and_longer_ones_slept_through() {
        for (wakeup, gap, spins) in
            [(50, 90, true), (50, 300, false), (400, 90, true), (5, 15, true), (5, 30, false)]
        {
            let mut lun = Lun::with(wakeup * US);
            lun.gaps(100, gap * US);
            assert_eq!(lun.gap(gap * US), if spins { gap * US } else { Duration::ZERO }, "{gap} at {wakeup}");
        }
        // However dear a wake-up is, there is an end.
        let mut lun = Lun::with(Duration::from_millis(50));
        lun.gaps(100, 2 * MOST);
        assert_eq!(lun.gap(2 * MOST), Duration::ZERO);
    }

    /// Gaps of 200 µs, where a wake-up was measured at 10, but a sleep makes a command 150 µs slower.
    #[test]
    fn a_peer_that_waits_for_us_is_spun_for_where_sleeping_is_seen_to_cost_more_than_a_wake_up() {
        let mut lun = Lun::with(10 * US);
        lun.hidden = 140 * US;
        lun.gaps(200, 200 * US);
        assert_eq!(lun.spins(900, 200 * US), 900);
        // A look at the other way now and then: less than one in a hundred.
        let slept = 20_000 - lun.spins(20_000, 200 * US);
        assert!((TRIAL..200).contains(&slept), "{slept}");
        // When sleeping costs no more any longer, it ends.
        lun.hidden = Duration::ZERO;
        lun.gaps(40_000, 200 * US);
        assert!(lun.spins(1000, 200 * US) <= 2 * TRIAL);
    }

    #[test]
    fn a_load_at_its_own_pace_is_not_spun_for_but_for_a_trial_now_and_then() {
        for gap in [100, 300, 900] {
            let mut lun = Lun::with(10 * US);
            (lun.hidden, lun.paced) = (140 * US, true);
            lun.gaps(10_000, gap * US);
            let spins = lun.spins(50_000, gap * US);
            assert!((TRIAL..50_000 / 100).contains(&spins), "{spins} at {gap}");
        }
    }

    #[test]
    fn where_spinning_paid_it_ends_with_the_load_and_begins_anew_with_the_next() {
        let mut lun = Lun::with(10 * US);
        lun.hidden = 140 * US;
        lun.gaps(200, 200 * US);
        assert_eq!(lun.spins(100, 200 * US), 100);
        let long = Duration::from_millis(10);
        let spun: Duration = (0..1000).map(|_| lun.gap(long)).sum();
        assert!(spun <= 5 * MOST, "{spun:?}");
        assert!(lun.spins(400, 200 * US) > 200);
        lun.gap(2 * FORGET);
        assert!(lun.spins(400, 200 * US) > 200);
    }

    #[test]
    fn a_busy_device_stops_spinning_when_the_load_goes() {
        let mut lun = Lun::new();
        lun.gaps(100, 20 * US);
        assert_eq!(lun.gap(20 * US), 20 * US);
        // The first long pause costs one spin, the next none.
        let long = Duration::from_millis(10);
        assert!(lun.gap(long) <= 40 * US);
        assert_eq!((lun.gap(long), lun.gap(long)), (Duration::ZERO, Duration::ZERO));
        // And the load comes back.
        lun.gaps(100, 20 * US);
        assert_eq!(lun.gap(20 * US), 20 * US);
    }

    #[test]
    fn spins_that_find_nothing_take_a_small_part_of_a_cpu_whatever_the_load_does() {
        let mut lun = Lun::new();
        let (start, mut lost) = (lun.now, Duration::ZERO);
        // Just as many short gaps as it takes to begin, then one that is a little too long to find.
        for _ in 0..20_000 {
            for _ in 0..30 {
                lun.gap(US);
            }
            lun.spinner.gap = 100 * US;
            let spun = lun.gap(201 * US);
            lost += spun;
        }
        let passed = lun.now - start;
        assert!(lost <= passed / WASTE + PURSE, "{lost:?} of {passed:?}");
        assert!(lost > passed / WASTE / 4, "it has spun at all: {lost:?}");
    }

    #[test]
    fn no_more_threads_spin_at_once_than_may() {
        // Other tests of this process spin, too.
        let all: Vec<_> = (0..64).map_while(|_| Turn::take(32)).collect();
        assert!(all.len() <= 32 && Turn::take(0).is_none());
    }

    #[test]
    fn a_wake_up_is_measured_and_takes_some_time() {
        let cost = measure().unwrap();
        assert!(cost > Duration::ZERO && cost < Duration::from_secs(10), "{cost:?}");
    }
}
