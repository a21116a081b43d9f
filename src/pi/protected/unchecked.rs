//! The blocks that a crash may have left without their right tuple, and that nobody has looked at since: a set of ranges. Kept by
//! [`Protected`], which looks at them one after another, and first at those that somebody needs.
//!
//! [`Protected`]: super::Protected

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    ops::Range,
};

use crate::pi::recompute::Recomputed;

/// Ranges of blocks that do not overlap.
#[derive(Default)]
pub(super) struct Unchecked {
    /// First block, and the one after the last.
    ranges: RefCell<BTreeMap<u64, u64>>,
    blocks: Cell<u64>,
    /// What the looks have found so far; `None` if there was never anything to look at, or all has been told.
    found: Cell<Option<Recomputed>>,
}

impl Unchecked {
    /// Adds blocks, none of which is in the set.
    pub fn add(&self, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        self.blocks.set(self.blocks.get() + blocks.end - blocks.start);
        self.ranges.borrow_mut().insert(blocks.start, blocks.end);
        self.found(Recomputed::default());
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.blocks.get() == 0
    }

    /// Blocks that are left.
    pub fn blocks(&self) -> u64 {
        self.blocks.get()
    }

    /// The first range.
    pub fn first(&self) -> Option<Range<u64>> {
        self.ranges.borrow().first_key_value().map(|(start, end)| *start..*end)
    }

    /// The first part of `range` that is in the set.
    pub fn first_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() || self.is_empty() {
            return None;
        }
        let ranges = self.ranges.borrow();
        let before = ranges.range(..=range.start).next_back().filter(|(_, end)| **end > range.start);
        let (start, end) = before.or_else(|| ranges.range(range.clone()).next())?;
        Some((*start).max(range.start)..(*end).min(range.end))
    }

    /// All parts of `range` that are in the set.
    pub fn parts_of(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let (mut parts, mut rest) = (Vec::new(), range.clone());
        while let Some(part) = self.first_in(&rest) {
            rest.start = part.end;
            parts.push(part);
        }
        parts
    }

    /// Takes blocks out; gives those that were in it.
    pub fn remove(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let parts = self.parts_of(range);
        let mut ranges = self.ranges.borrow_mut();
        for part in &parts {
            let whole = ranges.range(..=part.start).next_back().map(|(start, end)| (*start, *end));
            let Some((start, end)) = whole else { continue };
            ranges.remove(&start);
            if start < part.start {
                ranges.insert(start, part.start);
            }
            if part.end < end {
                ranges.insert(part.end, end);
            }
            self.blocks.set(self.blocks.get() - (part.end - part.start));
        }
        parts
    }

    /// Adds to what the looks have found.
    pub fn found(&self, more: Recomputed) {
        let mut all = self.found.get().unwrap_or_default();
        all.add(more);
        self.found.set(Some(all));
    }

    /// What they have found, once.
    pub fn take_found(&self) -> Option<Recomputed> {
        self.found.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::{Rng, scaled};

    #[test]
    fn the_set_is_what_a_list_of_flags_is() {
        for seed in 0..scaled(200) {
            let mut rng = Rng::new(seed);
            let set = Unchecked::default();
            let mut flags = [false; 64];
            let mut at = 0;
            while at < 64 {
                let len = (1 + rng.below(12)).min(64 - at);
                if rng.one_in(2) {
                    set.add(at..at + len);
                    flags[at as usize..(at + len) as usize].fill(true);
                }
                at += len;
            }
            for _ in 0..40 {
                let start = rng.below(64);
                let range = start..(start + rng.below(16)).min(64);
                let told: Vec<u64> = set.parts_of(&range).into_iter().flatten().collect();
                let known: Vec<u64> = range.clone().filter(|i| flags[*i as usize]).collect();
                assert_eq!(told, known, "seed {seed}");
                assert_eq!(set.first_in(&range).map(|r| r.start), known.first().copied());
                if rng.one_in(2) {
                    assert_eq!(set.remove(&range).into_iter().flatten().collect::<Vec<_>>(), known);
                    range.for_each(|i| flags[i as usize] = false);
                }
                assert_eq!(set.blocks(), flags.iter().filter(|f| **f).count() as u64);
                assert_eq!(set.first().map(|r| r.start), flags.iter().position(|f| *f).map(|i| i as u64));
            }
        }
    }

    #[test]
    fn what_was_found_is_told_once_and_only_if_there_was_something_to_look_at() {
        let set = Unchecked::default();
        set.add(7..7);
        assert_eq!(set.take_found(), None);
        set.add(7..9);
        set.found(Recomputed { read: 2, recomputed: 1, ..Recomputed::default() });
        assert_eq!(set.take_found().map(|f| (f.read, f.recomputed)), Some((2, 1)));
        assert_eq!(set.take_found(), None);
    }
}
