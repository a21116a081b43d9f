//! How long a LUN's commands took and with what sense they failed: counted on its thread, in cells, without a lock, and without an
//! allocation but for the first of each sense. The clock is looked at once for all that are answered together.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use super::traffic::Class;
use crate::scsi::{Response, Sense, opcodes::Kind};

/// Buckets of a histogram. Bucket `i` holds what took more than 2^(i-1) and at most 2^i microseconds, the first also what is shorter,
/// the last all that is longer.
pub const BUCKETS: usize = 26;

/// What commands of one kind took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Commands, by how long they took.
    pub buckets: [u64; BUCKETS],
    /// What all took together.
    pub sum: Duration,
}

impl Histogram {
    /// What bucket `i` holds at most, in microseconds; nothing for the last, which has no limit.
    pub fn limit(bucket: usize) -> Option<u64> {
        (bucket + 1 < BUCKETS).then(|| 1 << bucket)
    }

    /// Commands in all buckets.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    fn bucket(nanoseconds: u64) -> usize {
        let beyond = nanoseconds.saturating_sub(1) / 1000;
        ((u64::BITS - beyond.leading_zeros()) as usize).min(BUCKETS - 1)
    }
}

/// The codes of a sense: key, ASC and ASCQ.
pub type SenseCodes = (u8, u8, u8);

/// What was measured, by the commands' names; kinds and senses that did not occur are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Measured {
    /// From when a command was taken out of the ring until it was answered. [`UNKNOWN`] are those that are not supported.
    pub latencies: Vec<(&'static str, Histogram)>,
    /// Commands that ended in CHECK CONDITION, unit attentions included.
    pub senses: Vec<(SenseCodes, u64)>,
}

impl Measured {
    /// What all commands of a class took together.
    pub fn of(&self, class: Class) -> Histogram {
        let is_of = |name: &str| Kind::ALL.iter().any(|k| k.name() == name && Class::of(*k) == Some(class));
        let mut all = Histogram::default();
        for (_, one) in self.latencies.iter().filter(|(name, _)| is_of(name)) {
            all.buckets.iter_mut().zip(one.buckets).for_each(|(sum, more)| *sum += more);
            all.sum += one.sum;
        }
        all
    }
}

/// The name of all commands that are not supported.
pub const UNKNOWN: &str = "unknown";

struct Cells {
    buckets: [Cell<u64>; BUCKETS],
    nanoseconds: Cell<u64>,
}

/// The counters: a row for each [`Kind`], and one for what is none.
pub(super) struct Measures {
    rows: [Cells; Kind::COUNT + 1],
    /// Commands that have ended and are not answered yet: the row, when they were taken, and how many of these there are in a row.
    ended: RefCell<Vec<(usize, Instant, u64)>>,
    senses: RefCell<Vec<(SenseCodes, u64)>>,
}

impl Default for Measures {
    fn default() -> Measures {
        let row = |_| Cells { buckets: std::array::from_fn(|_| Cell::new(0)), nanoseconds: Cell::new(0) };
        Measures { rows: std::array::from_fn(row), ended: RefCell::default(), senses: RefCell::default() }
    }
}

fn add(cell: &Cell<u64>, more: u64) {
    cell.set(cell.get().wrapping_add(more));
}

impl Measures {
    /// A command has ended; how long it took is known when it is answered ([`Measures::settle`]).
    pub(super) fn ended(&self, response: &Response, taken: Instant) {
        let row = response.kind.map_or(Kind::COUNT, |kind| kind as usize);
        let mut ended = self.ended.borrow_mut();
        // Those that came together mostly end together.
        match ended.last_mut() {
            Some((r, t, count)) if (*r, *t) == (row, taken) => *count += 1,
            _ => ended.push((row, taken, 1)),
        }
        if let Some(sense) = &response.sense {
            self.count_sense(sense);
        }
    }

    /// Counts those that have ended since the last call: they are answered now.
    pub(super) fn settle(&self, now: Instant) {
        for (row, taken, count) in self.ended.borrow_mut().drain(..) {
            let took = now.saturating_duration_since(taken);
            let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            let row = &self.rows[row];
            add(&row.buckets[Histogram::bucket(nanoseconds)], count);
            add(&row.nanoseconds, nanoseconds.saturating_mul(count));
        }
    }

    #[cold]
    fn count_sense(&self, sense: &Sense) {
        let codes = (sense.key as u8, sense.asc.0, sense.asc.1);
        let mut senses = self.senses.borrow_mut();
        match senses.iter_mut().find(|(known, _)| *known == codes) {
            Some((_, count)) => *count += 1,
            // As many as the target's code can say: a few dozen.
            None => senses.push((codes, 1)),
        }
    }

    pub(super) fn get(&self) -> Measured {
        let names = Kind::ALL.iter().map(|kind| kind.name()).chain([UNKNOWN]);
        let histogram = |row: &Cells| Histogram {
            buckets: std::array::from_fn(|i| row.buckets[i].get()),
            sum: Duration::from_nanos(row.nanoseconds.get()),
        };
        let all = names.zip(self.rows.iter().map(histogram));
        let mut senses = self.senses.borrow().clone();
        senses.sort_unstable();
        Measured { latencies: all.filter(|(_, h)| h.count() > 0).collect(), senses }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::{SenseKey, Status, sense::Asc};

    fn response(kind: Option<Kind>, sense: Option<Sense>) -> Response {
        let status = if sense.is_some() { Status::CheckCondition } else { Status::Good };
        Response { status, sense, data_in: 0, gives_data: false, kind }
    }

    #[test]
    fn a_bucket_holds_what_took_at_most_its_limit() {
        for bucket in 0..BUCKETS - 1 {
            let limit = Histogram::limit(bucket).unwrap() * 1000;
            assert_eq!(Histogram::bucket(limit), bucket);
            assert_eq!(Histogram::bucket(limit + 1), bucket + 1);
        }
        assert_eq!((Histogram::bucket(0), Histogram::bucket(u64::MAX)), (0, BUCKETS - 1));
        assert_eq!(Histogram::limit(BUCKETS - 1), None);
    }

    #[test]
    fn commands_are_counted_by_kind_and_failures_by_their_codes() {
        let measures = Measures::default();
        assert_eq!(measures.get(), Measured::default());
        let failed = Some(Sense::new(SenseKey::AbortedCommand, Asc::GUARD_CHECK_FAILED));
        let taken = Instant::now();
        let ended = |kind, sense, took| {
            measures.ended(&response(kind, sense), taken);
            measures.settle(taken + took);
        };
        ended(Some(Kind::Read), None, Duration::from_micros(3));
        ended(Some(Kind::Read), failed, Duration::from_micros(5));
        ended(Some(Kind::Write), failed, Duration::from_secs(3600));
        let invalid = Some(Sense::new(SenseKey::IllegalRequest, Asc::INVALID_OPERATION_CODE));
        ended(None, invalid, Duration::ZERO);
        let got = measures.get();
        let names: Vec<_> = got.latencies.iter().map(|(name, h)| (*name, h.count(), h.sum)).collect();
        assert_eq!(
            names,
            [
                ("READ", 2, Duration::from_micros(8)),
                ("WRITE", 1, Duration::from_secs(3600)),
                (UNKNOWN, 1, Duration::ZERO)
            ]
        );
        let read = got.latencies[0].1.buckets;
        assert_eq!((read[1], read[2], read[3]), (0, 1, 1));
        assert_eq!(got.latencies[1].1.buckets[BUCKETS - 1], 1);
        assert_eq!(got.senses, [((5, 0x20, 0), 1), ((0xb, 0x10, 1), 2)]);
        ended(Some(Kind::WriteSame), None, Duration::from_micros(3));
        let (reads, writes) = (measures.get().of(Class::Read), measures.get().of(Class::Write));
        assert_eq!((reads.count(), reads.sum), (2, Duration::from_micros(8)));
        assert_eq!((writes.count(), writes.buckets[2], writes.buckets[BUCKETS - 1]), (2, 1, 1));
        assert_eq!(measures.get().of(Class::Flush), Histogram::default());
    }
}
