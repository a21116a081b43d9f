//! The arithmetic of one limit: a bucket that fills with what passes and leaks at the limit's rate. No clock is read here, nothing is rounded:
//! the level is kept in billionths of a byte or a command, and a nanosecond leaks as many of them as the rate says.
//!
//! Promise: over any window of t seconds no more passes than what the bucket holds plus rate × t. A command that is bigger than the bucket
//! passes when that is empty, and counts as a whole: the window is then that much larger, once, and whoever comes next waits for all of it.

use std::time::{Duration, Instant};

use super::limits::Rate;

/// Billionths in one.
const NANO: u128 = 1_000_000_000;

/// What passes at once where no burst is asked for: a tenth of a second's worth, as in QEMU.
const AT_ONCE: u128 = 10;

/// A bucket, and how full it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Level {
    /// Units a second that leak.
    rate: u64,
    /// Billionths that it holds.
    room: u128,
    /// Billionths that are in it.
    level: u128,
}

impl Level {
    fn leak(&mut self, time: Duration) {
        self.level = self.level.saturating_sub(time.as_nanos().saturating_mul(self.rate.into()));
    }

    /// How long until so many billionths fit.
    fn wait(&self, amount: u128) -> Duration {
        let above = (self.level + amount.min(self.room)).saturating_sub(self.room);
        let nanoseconds = above.div_ceil(u128::from(self.rate).max(1));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// One limit at work: a bucket for the long run, and where bursts are longer than a second one that keeps them to their own rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bucket {
    long: Level,
    burst: Option<Level>,
    seen: Instant,
}

/// So many units, as a bucket counts.
pub(super) fn amount(units: u64) -> u128 {
    u128::from(units) * NANO
}

impl Bucket {
    /// An empty bucket of a limit that is set.
    pub(super) fn new(limit: Rate, now: Instant) -> Bucket {
        let level = |rate, room| Level { rate, room, level: 0 };
        let length = limit.length.max(1);
        let long = match limit.max {
            0 => amount(limit.rate) / AT_ONCE,
            max => amount(max) * u128::from(length),
        };
        let burst = (limit.max > 0 && length > 1).then(|| level(limit.max, amount(limit.max) / AT_ONCE));
        Bucket { long: level(limit.rate, long), burst, seen: now }
    }

    /// How long from `now` until a command of that amount may pass; nothing if it may at once.
    pub(super) fn wait(&mut self, amount: u128, now: Instant) -> Duration {
        let since = now.saturating_duration_since(self.seen);
        self.seen = self.seen.max(now);
        self.long.leak(since);
        let burst = self.burst.as_mut().map_or(Duration::ZERO, |burst| {
            burst.leak(since);
            burst.wait(amount)
        });
        self.long.wait(amount).max(burst)
    }

    /// It has passed.
    pub(super) fn take(&mut self, amount: u128) {
        self.long.level += amount;
        if let Some(burst) = &mut self.burst {
            burst.level += amount;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lets a row of commands through one after the other, each as soon as it may; gives when each passed, in nanoseconds.
    fn run(limit: Rate, sizes: &[(u64, u64)]) -> Vec<(u128, u64)> {
        let start = Instant::now();
        let mut now = start;
        let mut bucket = Bucket::new(limit, start);
        let mut passed = Vec::new();
        for (size, pause) in sizes {
            now += Duration::from_nanos(*pause);
            let wait = bucket.wait(amount(*size), now);
            now += wait;
            assert_eq!(bucket.wait(amount(*size), now), Duration::ZERO, "what was waited for is there then");
            bucket.take(amount(*size));
            passed.push(((now - start).as_nanos(), *size));
        }
        passed
    }

    proptest! {
        #[test]
        fn over_any_window_no_more_passes_than_the_burst_and_the_rate(
            rate in 1u64..100_000,
            burst in prop::option::of((1u64..50, 1u64..5)),
            sizes in prop::collection::vec((1u64..20_000, 0u64..300_000_000), 1..60),
        ) {
            let limit = match burst {
                Some((times, length)) => Rate { rate, max: rate * times, length },
                None => Rate { rate, max: 0, length: 0 },
            };
            let room = if limit.max == 0 { u128::from(rate) * NANO / 10 } else { amount(limit.max) * u128::from(limit.length) };
            let passed = run(limit, &sizes);
            for from in 0..passed.len() {
                let (mut sum, mut biggest) = (0u128, 0);
                for (at, size) in &passed[from..] {
                    sum += amount(*size);
                    biggest = amount(*size).max(biggest);
                    let time = at - passed[from].0;
                    // One that is bigger than the bucket passes alone.
                    prop_assert!(sum <= room.max(biggest) + u128::from(rate) * time, "{limit:?} {passed:?}");
                    if limit.length > 1 {
                        let most = (amount(limit.max) / 10).max(biggest) + u128::from(limit.max) * time;
                        prop_assert!(sum <= most, "a burst has its own rate: {limit:?} {passed:?}");
                    }
                }
            }
        }

        #[test]
        fn nobody_waits_longer_than_it_takes_to_leak_what_is_before_it(
            rate in 1u64..100_000, sizes in prop::collection::vec(1u64..20_000, 1..60),
        ) {
            let row: Vec<_> = sizes.iter().map(|s| (*s, 0)).collect();
            let passed = run(Rate { rate, max: 0, length: 0 }, &row);
            let mut before = 0u128;
            for (at, size) in passed {
                // A nanosecond each for what is rounded up.
                let enough = (before + amount(size)).div_ceil(rate.into()) + 60;
                prop_assert!(at <= enough, "{at} > {enough}");
                before += amount(size);
            }
        }
    }

    #[test]
    fn a_command_bigger_than_the_bucket_passes_alone_and_is_paid_for_after() {
        let second = 1_000_000_000;
        let slow = Rate { rate: 1, max: 0, length: 0 };
        assert_eq!(run(slow, &[(5, 0), (5, 0), (1, 0)]), [(0, 5), (5 * second, 5), (10 * second, 1)]);
    }

    #[test]
    fn a_burst_passes_at_its_own_rate_for_its_length_and_then_the_rate_holds() {
        let limit = Rate { rate: 10, max: 100, length: 2 };
        let passed = run(limit, &vec![(1, 0); 300]);
        let by = |seconds: f64| passed.iter().filter(|(at, _)| (*at as f64) <= seconds * 1e9).count();
        assert_eq!(by(0.0), 10, "a tenth of a second's worth at once");
        assert_eq!(by(1.0), 110);
        // The bucket of 200 has leaked 20 meanwhile.
        assert_eq!((by(2.0), by(3.0), by(4.0)), (210, 230, 240));
        assert_eq!(passed.len(), 300);
    }
}
