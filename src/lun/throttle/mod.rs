//! A LUN's limits at work: commands wait for their turn before they start, in the loop of the LUN's thread.
//!
//! A LUN without limits pays one look at a cell a command. With them a command is one or more operations and some bytes of reads or of writes
//! ([`Cost`]); it waits in the row of its way, first come, first served, until each bucket that it counts in has room. A row does not wait for the other,
//! unless the one that came earlier waits for a bucket that both count in. What waits here has not started: task management takes it
//! back, and a LUN that stops lets all of it go at once.

mod bucket;
pub mod limits;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    time::{Duration, Instant},
};

use serde::Serialize;

use self::{
    bucket::{Bucket, amount},
    limits::{ALL, Limits, Of, Way},
};

/// The folder of the files that keep what was set while a LUN was in use.
pub const FOLDER: &str = "limits";

/// What a command counts for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cost {
    /// It is a write; a read otherwise.
    pub(super) writes: bool,
    /// Bytes that it moves.
    pub(super) bytes: u64,
}

/// What a LUN's limits have come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Commands that had to wait and have passed.
    pub delayed: u64,
    /// What they have waited, all together.
    pub waited: Duration,
    /// Commands that wait now.
    pub waiting: u64,
}

/// Limits and what they have come to, as they are told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Throttled {
    /// What holds now.
    #[serde(serialize_with = "words")]
    pub limits: Limits,
    /// What has come of it.
    #[serde(flatten, serialize_with = "counts")]
    pub counts: Counts,
}

fn words<S: serde::Serializer>(limits: &Limits, s: S) -> Result<S::Ok, S::Error> {
    s.collect_str(limits)
}

fn counts<S: serde::Serializer>(counts: &Counts, s: S) -> Result<S::Ok, S::Error> {
    let waited_ms = u64::try_from(counts.waited.as_millis()).unwrap_or(u64::MAX);
    s.collect_map([("delayed", counts.delayed), ("waited_ms", waited_ms), ("waiting", counts.waiting)])
}

/// The limits of a LUN, and their buckets.
pub(super) struct Throttle {
    on: Cell<bool>,
    /// Set anew since the loop last looked.
    changed: Cell<bool>,
    limits: Cell<Limits>,
    /// In the order of [`ALL`]; nothing for what is not limited.
    buckets: RefCell<[Option<Bucket>; ALL.len()]>,
    counts: Cell<Counts>,
}

/// Which limits, as bits in the order of [`ALL`].
type Set = u8;

impl Throttle {
    pub(super) fn new(limits: Limits) -> Throttle {
        let throttle = Throttle {
            on: Cell::new(false),
            changed: Cell::new(false),
            limits: Cell::default(),
            buckets: RefCell::default(),
            counts: Cell::default(),
        };
        throttle.set(limits, Instant::now());
        throttle
    }

    /// Other limits from now on. A limit that stays as it is keeps its bucket: it is no way around it to set it again.
    pub(super) fn set(&self, limits: Limits, now: Instant) {
        let before = self.limits.replace(limits);
        let mut buckets = self.buckets.borrow_mut();
        for (i, bucket) in buckets.iter_mut().enumerate() {
            if before.rates[i] != limits.rates[i] {
                *bucket = (limits.rates[i].rate > 0).then(|| Bucket::new(limits.rates[i], now));
            }
        }
        self.on.set(buckets.iter().any(Option::is_some));
        self.changed.set(true);
    }

    /// Whether anything is limited: the one look that others pay.
    #[inline]
    pub(super) fn is_on(&self) -> bool {
        self.on.get()
    }

    pub(super) fn get(&self) -> Throttled {
        Throttled { limits: self.limits.get(), counts: self.counts.get() }
    }

    fn amount(&self, cost: &Cost, of: Of) -> u128 {
        match (of, self.limits.get().iops_size) {
            (Of::Bytes, _) => amount(cost.bytes),
            (Of::Commands, 0) => amount(1),
            (Of::Commands, size) => (amount(cost.bytes) / u128::from(size)).max(amount(1)),
        }
    }

    /// Takes a command's share from every bucket that it counts in, if all have room. Else: which have none, and how long until they have.
    fn pass(&self, cost: &Cost, barred: Set, now: Instant) -> Result<(), (Set, Duration)> {
        let mut buckets = self.buckets.borrow_mut();
        let counts = |way| match way {
            Way::Both => true,
            Way::Read => !cost.writes,
            Way::Write => cost.writes,
        };
        let (mut full, mut longest, mut closed) = (0, Duration::ZERO, false);
        for (i, (_, of, _)) in ALL.into_iter().enumerate().filter(|(_, (_, _, way))| counts(*way)) {
            let Some(bucket) = &mut buckets[i] else { continue };
            closed |= barred & (1 << i) != 0;
            let wait = bucket.wait(self.amount(cost, of), now);
            if wait > Duration::ZERO {
                full |= 1 << i;
                longest = longest.max(wait);
            }
        }
        if full != 0 || closed {
            return Err((full, longest));
        }
        for (i, (_, of, _)) in ALL.into_iter().enumerate().filter(|(_, (_, _, way))| counts(*way)) {
            if let Some(bucket) = &mut buckets[i] {
                bucket.take(self.amount(cost, of));
            }
        }
        Ok(())
    }
}

struct Waiting<T> {
    /// Order of arrival.
    order: u64,
    since: Instant,
    cost: Cost,
    what: T,
}

/// The commands that wait, reads and writes each in a row.
pub(super) struct Rows<T> {
    rows: [VecDeque<Waiting<T>>; 2],
    next: u64,
    /// Those that came before this one were looked at and had to wait.
    looked: u64,
    /// When the next may pass.
    due: Option<Instant>,
}

impl<T> Rows<T> {
    pub(super) fn new() -> Rows<T> {
        Rows { rows: [VecDeque::new(), VecDeque::new()], next: 0, looked: 0, due: None }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.iter().map(VecDeque::len).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.iter().all(VecDeque::is_empty)
    }

    pub(super) fn push(&mut self, cost: Cost, what: T, since: Instant) {
        self.rows[usize::from(cost.writes)].push_back(Waiting { order: self.next, since, cost, what });
        self.next += 1;
        // To be looked at.
        self.due = None;
    }

    /// Takes out those of which `goes` says so.
    pub(super) fn take_if(&mut self, goes: impl Fn(&T) -> bool) -> Vec<T> {
        let mut out = Vec::new();
        for row in &mut self.rows {
            for waiting in std::mem::take(row) {
                if goes(&waiting.what) {
                    out.push(waiting.what);
                } else {
                    row.push_back(waiting);
                }
            }
        }
        self.due = None;
        out
    }

    /// When to look again, if any wait.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether a look may find one that passes: what changed since is also looked at.
    pub(super) fn may_go(&self, throttle: &Throttle) -> bool {
        !self.is_empty() && (self.due.is_none() || throttle.changed.get())
    }

    /// Gives out, in the order in which they came, those that may pass now; with `all`, every one.
    pub(super) fn release(&mut self, throttle: &Throttle, all: bool, now: Instant, mut go: impl FnMut(T)) {
        let mut counts = throttle.counts.get();
        throttle.changed.set(false);
        self.due = None;
        // What the heads of both rows have found: the buckets that had no room, and until when.
        let mut stopped: [Option<Set>; 2] = [None; 2];
        let mut longest = [Duration::MAX; 2];
        loop {
            let heads = [self.rows[0].front(), self.rows[1].front()].map(|head| head.map(|w| w.order));
            let open = |i: usize| heads[i].filter(|_| stopped[i].is_none());
            let row = match (open(0), open(1)) {
                (None, None) => break,
                (Some(_), None) => 0,
                (None, Some(_)) => 1,
                (Some(a), Some(b)) => usize::from(b < a),
            };
            let other = 1 - row;
            // What came earlier in the other row and waits for a bucket is not overtaken at that.
            let earlier = heads[other] < heads[row];
            let barred = stopped[other].filter(|_| earlier).unwrap_or(0);
            let Some(head) = self.rows[row].front() else { break };
            match if all { Ok(()) } else { throttle.pass(&head.cost, barred, now) } {
                Ok(()) => {
                    let Some(head) = self.rows[row].pop_front() else { break };
                    if head.order < self.looked {
                        counts.delayed += 1;
                        counts.waited += now.saturating_duration_since(head.since);
                    }
                    go(head.what);
                }
                Err((full, wait)) => {
                    stopped[row] = Some(full | barred);
                    // One that is barred alone waits for whoever bars it.
                    longest[row] = if full == 0 { Duration::MAX } else { wait };
                }
            }
        }
        self.looked = self.next;
        if !self.is_empty() {
            // Beyond a day somebody looks in between.
            let least = longest[0].min(longest[1]).min(Duration::from_secs(86_400));
            self.due = Some(now + least);
        }
        counts.waiting = self.len() as u64;
        throttle.counts.set(counts);
    }
}

#[cfg(test)]
mod tests;
