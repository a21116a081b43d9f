//! Writes that a server has acknowledged and not flushed yet, kept so that they can be given again to one that has lost them.
//!
//! A map of ranges in which what is newer hides what is older, so that its parts can be written again in any order. Called by the
//! session.

use std::{collections::BTreeMap, rc::Rc};

/// One run of bytes as it has to be.
#[derive(Debug, Clone)]
pub(super) struct Run {
    /// Bytes.
    pub len: u64,
    /// Its bytes, with where they begin in the buffer; nothing for zeros.
    pub data: Option<(Rc<Vec<u8>>, usize)>,
    /// Zeros for which no space need be kept.
    pub may_unmap: bool,
    seq: u64,
}

impl Run {
    fn part(&self, skip: u64, len: u64) -> Run {
        let data = self.data.as_ref().map(|(bytes, at)| (bytes.clone(), at + skip as usize));
        Run { len, data, ..self.clone() }
    }

    /// The bytes, if they are not zeros.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.data.as_ref().map(|(bytes, at)| &bytes[*at..*at + self.len as usize])
    }
}

/// A point in the order of writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    seq: u64,
    taken: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Retained {
    runs: BTreeMap<u64, Run>,
    next: u64,
    /// Bytes kept in all, those given up again included.
    taken: u64,
    /// The same, at the mark of the last flush.
    flushed: u64,
}

impl Retained {
    /// Bytes of memory that are held at most: what has come since the last flush, hidden or not.
    pub fn bytes(&self) -> u64 {
        self.taken - self.flushed
    }

    /// A write was acknowledged.
    pub fn write(&mut self, at: u64, bytes: Rc<Vec<u8>>) {
        let len = bytes.len() as u64;
        self.taken += len;
        self.put(at, Run { len, data: Some((bytes, 0)), may_unmap: false, seq: 0 });
    }

    /// Zeros were acknowledged.
    pub fn zero(&mut self, at: u64, len: u64, may_unmap: bool) {
        // An entry, so that many of them are bounded too.
        self.taken += 64;
        self.put(at, Run { len, data: None, may_unmap, seq: 0 });
    }

    fn put(&mut self, at: u64, run: Run) {
        self.cut(at, run.len);
        self.runs.insert(at, Run { seq: self.next, ..run });
        self.next += 1;
    }

    /// What lies there is on stable storage by other means, or hidden.
    pub fn cut(&mut self, at: u64, len: u64) {
        let end = at + len;
        let first = self.runs.range(..at).next_back().filter(|(start, run)| *start + run.len > at);
        let first = first.map_or(at, |(start, _)| *start);
        let touched: Vec<u64> = self.runs.range(first..end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some(run) = self.runs.remove(&start) else { continue };
            if start < at {
                self.runs.insert(start, run.part(0, at - start));
            }
            let stop = start + run.len;
            if stop > end {
                self.runs.insert(end, run.part(end - start, stop - end));
            }
        }
    }

    /// Now: what was acknowledged until here is what a flush that is sent now covers.
    pub fn mark(&self) -> Mark {
        Mark { seq: self.next, taken: self.taken }
    }

    /// A flush that was sent at that mark has ended well.
    pub fn flushed(&mut self, mark: Mark) {
        self.runs.retain(|_, run| run.seq >= mark.seq);
        self.flushed = self.flushed.max(mark.taken);
    }

    /// Everything, to be written again.
    pub fn all(&self) -> Vec<(u64, Run)> {
        self.runs.iter().map(|(at, run)| (*at, run.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Write(u64, u64),
        Zero(u64, u64),
        Cut(u64, u64),
        Flush,
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let range = (0u64..60, 1u64..20);
        let one = prop_oneof![
            4 => range.clone().prop_map(|(a, l)| Op::Write(a, l)),
            2 => range.clone().prop_map(|(a, l)| Op::Zero(a, l)),
            1 => range.prop_map(|(a, l)| Op::Cut(a, l)),
            1 => Just(Op::Flush),
        ];
        proptest::collection::vec(one, 0..40)
    }

    proptest! {
        /// A server that loses all that was not flushed has, with what is given to it again, what it had acknowledged.
        #[test]
        fn what_is_given_again_makes_the_disk_what_it_was(ops in ops()) {
            let mut retained = Retained::default();
            let (mut live, mut durable) = ([0u8; 80], [0u8; 80]);
            for (i, op) in ops.iter().enumerate() {
                let value = i as u8 + 1;
                match *op {
                    Op::Write(at, len) => {
                        retained.write(at, Rc::new(vec![value; len as usize]));
                        live[at as usize..(at + len) as usize].fill(value);
                    }
                    Op::Zero(at, len) => {
                        retained.zero(at, len, true);
                        live[at as usize..(at + len) as usize].fill(0);
                    }
                    Op::Cut(at, len) => {
                        // A write with FUA.
                        retained.cut(at, len);
                        live[at as usize..(at + len) as usize].fill(value);
                        durable[at as usize..(at + len) as usize].fill(value);
                    }
                    Op::Flush => {
                        let mark = retained.mark();
                        durable = live;
                        retained.flushed(mark);
                        prop_assert!(retained.all().is_empty() && retained.bytes() == 0);
                    }
                }
                let mut again = durable;
                let mut end = 0;
                for (at, run) in retained.all() {
                    prop_assert!(at >= end, "runs overlap");
                    end = at + run.len;
                    match run.bytes() {
                        Some(bytes) => again[at as usize..end as usize].copy_from_slice(bytes),
                        None => again[at as usize..end as usize].fill(0),
                    }
                }
                prop_assert_eq!(again, live);
            }
        }
    }

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_was_sent_and_nothing_later() {
        let mut retained = Retained::default();
        retained.write(0, Rc::new(vec![1; 10]));
        let mark = retained.mark();
        retained.write(5, Rc::new(vec![2; 10]));
        retained.flushed(mark);
        let left: Vec<_> = retained.all().iter().map(|(at, run)| (*at, run.len)).collect();
        assert_eq!((left, retained.bytes()), (vec![(5, 10)], 10));
    }
}
