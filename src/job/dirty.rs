//! What a mirror has still to copy: a bit for each granule of the volume, and, kept outside the process, what has to be copied
//! again if the process dies.
//!
//! A granule is *dirty* if the target may have something else there. A copy under way takes its granules out of the dirty ones and
//! puts them back unless it is finished; a write of a guest that is under way counts as well, since nobody knows yet what it leaves. What is
//! kept ([`Kept`]) is the sum of the three: it gains a bit before anything is done that could make the sides differ, and loses one
//! only after both have the same. So whoever takes it up after `kill -9` copies too much, and never too little. A future that is
//! dropped in the middle leaves its granules dirty.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
    rc::Rc,
};

use slab::Slab;

use crate::sys::mem::Mapping;

/// The finest granule (bytes): QEMU's.
pub const MIN_GRANULARITY: u64 = 512;
/// The coarsest.
pub const MAX_GRANULARITY: u64 = 64 << 20;
/// The usual one, up to volumes of 8 TiB: larger ones get larger granules, so that the bits take 16 MiB at most.
pub const GRANULARITY: u64 = 64 << 10;
const MOST_BITS: u64 = 1 << 27;

/// The granularity for a volume, where none is asked for.
pub fn granularity_for(capacity: u64) -> u64 {
    let least = capacity.div_ceil(MOST_BITS).next_power_of_two();
    least.clamp(GRANULARITY, MAX_GRANULARITY)
}

/// Bytes that the bits of a volume take where they are kept.
pub fn kept_bytes(capacity: u64, granularity: u64) -> u64 {
    capacity.div_ceil(granularity).div_ceil(64).max(1) * 8
}

/// Where bits are kept that outlive the process: 64 in a word.
#[derive(Clone)]
pub enum Kept {
    /// A mapped file: stores survive the process, at whatever instruction it is killed.
    File(Rc<Mapping>),
    /// Nowhere but in memory.
    Memory(Rc<RefCell<Vec<u64>>>),
}

impl Kept {
    /// Memory for a volume.
    pub fn memory(capacity: u64, granularity: u64) -> Kept {
        let words = kept_bytes(capacity, granularity) / 8;
        Kept::Memory(Rc::new(RefCell::new(vec![0; words as usize])))
    }

    /// Words that it has.
    fn words(&self) -> usize {
        match self {
            Kept::File(map) => map.len() / 8,
            Kept::Memory(words) => words.borrow().len(),
        }
    }

    fn get(&self, word: usize) -> u64 {
        match self {
            Kept::File(map) => {
                let mut bytes = [0xff; 8];
                // What is outside stays dirty.
                let _ = map.read(word as u64 * 8, &mut bytes);
                u64::from_le_bytes(bytes)
            }
            Kept::Memory(words) => words.borrow().get(word).copied().unwrap_or(u64::MAX),
        }
    }

    fn put(&self, word: usize, bits: u64) {
        match self {
            Kept::File(map) => {
                let inside = map.write(word as u64 * 8, &bits.to_le_bytes());
                debug_assert!(inside, "the kept bits are as many as the granules");
            }
            Kept::Memory(words) => {
                if let Some(slot) = words.borrow_mut().get_mut(word) {
                    *slot = bits;
                }
            }
        }
    }
}

/// Granules, by number.
type Granules = Range<u64>;

fn overlap(a: &Granules, b: &Granules) -> bool {
    a.start < b.end && b.start < a.end
}

/// The bits of one volume.
pub struct DirtyMap {
    shift: u32,
    capacity: u64,
    granules: u64,
    words: RefCell<Vec<u64>>,
    dirty: Cell<u64>,
    /// Where the next copy begins to look.
    cursor: Cell<u64>,
    copying: RefCell<Slab<Granules>>,
    writers: RefCell<Slab<Granules>>,
    kept: Kept,
}

impl DirtyMap {
    /// All clean. `granularity` is a power of two.
    pub fn new(capacity: u64, granularity: u64, kept: Kept) -> DirtyMap {
        let me = DirtyMap::of(capacity, granularity, kept);
        (0..me.words.borrow().len()).for_each(|word| me.kept.put(word, 0));
        me
    }

    /// None dirty; what is kept stays as it is.
    fn of(capacity: u64, granularity: u64, kept: Kept) -> DirtyMap {
        let granules = capacity.div_ceil(granularity);
        debug_assert!(granularity.is_power_of_two() && kept.words() as u64 * 64 >= granules);
        DirtyMap {
            shift: granularity.trailing_zeros(),
            capacity,
            granules,
            words: RefCell::new(vec![0; granules.div_ceil(64) as usize]),
            dirty: Cell::new(0),
            cursor: Cell::new(0),
            copying: RefCell::default(),
            writers: RefCell::default(),
            kept,
        }
    }

    /// As they were kept. Nothing of that is touched: this process may be killed as well, at whatever instruction.
    pub fn load(capacity: u64, granularity: u64, kept: Kept) -> DirtyMap {
        let granules = capacity.div_ceil(granularity);
        let found: Vec<u64> = (0..granules.div_ceil(64) as usize).map(|word| kept.get(word)).collect();
        let me = DirtyMap::of(capacity, granularity, kept);
        for granule in (0..granules).filter(|g| found[(g / 64) as usize] >> (g % 64) & 1 == 1) {
            me.set_granules(granule..granule + 1);
        }
        me
    }

    /// Bytes of a granule.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes of the volume.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    fn granules(&self, at: u64, len: u64) -> Granules {
        let end = at.saturating_add(len).min(self.capacity);
        if end <= at { 0..0 } else { at >> self.shift..((end - 1) >> self.shift) + 1 }
    }

    fn bytes(&self, granules: &Granules) -> Range<u64> {
        granules.start << self.shift..(granules.end << self.shift).min(self.capacity)
    }

    fn is_set(&self, granule: u64) -> bool {
        self.words.borrow()[(granule / 64) as usize] >> (granule % 64) & 1 == 1
    }

    fn keep(&self, granule: u64, on: bool) {
        let (word, bit) = ((granule / 64) as usize, 1 << (granule % 64));
        let before = self.kept.get(word);
        let after = if on { before | bit } else { before & !bit };
        if before != after {
            self.kept.put(word, after);
        }
    }

    fn set_granules(&self, granules: Granules) {
        for granule in granules {
            self.keep(granule, true);
            if !self.is_set(granule) {
                self.words.borrow_mut()[(granule / 64) as usize] |= 1 << (granule % 64);
                self.dirty.set(self.dirty.get() + 1);
            }
        }
    }

    /// Of those granules, these need not be kept for anybody any more.
    fn settle(&self, granules: Granules) {
        for granule in granules {
            let one = granule..granule + 1;
            let used = self.is_set(granule)
                || self.copying.borrow().iter().any(|(_, g)| overlap(g, &one))
                || self.writers.borrow().iter().any(|(_, g)| overlap(g, &one));
            if !used {
                self.keep(granule, false);
            }
        }
    }

    /// The target may have something else there.
    pub fn set(&self, at: u64, len: u64) {
        self.set_granules(self.granules(at, len));
    }

    /// Both sides have the same there, and nobody writes there. Only granules that lie inside as a whole become clean.
    fn clear_inside(&self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.capacity);
        let first = at.div_ceil(self.granularity());
        let last = if end == self.capacity { self.granules } else { end >> self.shift };
        for granule in first..last.max(first) {
            if self.is_set(granule) {
                self.words.borrow_mut()[(granule / 64) as usize] &= !(1 << (granule % 64));
                self.dirty.set(self.dirty.get() - 1);
            }
        }
    }

    /// Bytes that are dirty or being copied.
    pub fn left(&self) -> u64 {
        let copying: u64 = self.copying.borrow().iter().map(|(_, g)| g.end - g.start).sum();
        ((self.dirty.get() + copying) << self.shift).min(self.capacity)
    }

    /// Whether nothing is dirty, and nothing is being copied.
    pub fn is_settled(&self) -> bool {
        self.dirty.get() == 0 && self.copying.borrow().is_empty()
    }

    /// Whether something is dirty.
    pub fn has_work(&self) -> bool {
        self.dirty.get() > 0
    }

    /// Whether both sides are known to have the same there, but for what writes that are under way leave.
    pub fn is_clean(&self, at: u64, len: u64) -> bool {
        let granules = self.granules(at, len);
        !self.copying.borrow().iter().any(|(_, g)| overlap(g, &granules))
            && granules.into_iter().all(|g| !self.is_set(g))
    }

    /// A guest begins to write there.
    pub fn begin_write(&self, at: u64, len: u64) -> Writing<'_> {
        let granules = self.granules(at, len);
        granules.clone().for_each(|g| self.keep(g, true));
        let key = self.writers.borrow_mut().insert(granules.clone());
        Writing { map: self, key, granules, dirty: true }
    }

    /// Takes the next dirty run, at most `most` bytes (at least a granule), to be copied. `None` if there is none.
    pub fn take(&self, most: u64) -> Option<Copying<'_>> {
        if self.dirty.get() == 0 {
            return None;
        }
        let from = self.cursor.get();
        let first = self.next_set(from, self.granules).or_else(|| self.next_set(0, from))?;
        let end = self.run_end(first, self.granules, most);
        self.cursor.set(if end == self.granules { 0 } else { end });
        Some(self.take_granules(first..end))
    }

    /// The next dirty run, at most `most` bytes (at least a granule), as it is now: nothing of it is taken. The one after it comes next.
    pub fn look(&self, most: u64) -> Option<Range<u64>> {
        let from = self.cursor.get();
        let first = self.next_set(from, self.granules).or_else(|| self.next_set(0, from))?;
        let end = self.run_end(first, self.granules, most);
        self.cursor.set(if end == self.granules { 0 } else { end });
        Some(self.bytes(&(first..end)))
    }

    /// Takes the first dirty run within a range of bytes, at most `most` bytes (at least a granule), to be copied.
    pub fn take_within(&self, range: &Range<u64>, most: u64) -> Option<Copying<'_>> {
        let within = self.granules(range.start, range.end.saturating_sub(range.start));
        let first = self.next_set(within.start, within.end)?;
        let end = self.run_end(first, within.end, most);
        Some(self.take_granules(first..end))
    }

    /// The bytes of the granules that a range touches.
    pub fn covering(&self, at: u64, len: u64) -> Range<u64> {
        self.bytes(&self.granules(at, len))
    }

    /// Whether the byte at `at` is dirty, and where those end that are as it is, at `stop` at the latest.
    pub fn alike(&self, at: u64, stop: u64) -> (bool, u64) {
        let granules = self.granules(at, stop.saturating_sub(at));
        let dirty = !granules.is_empty() && self.is_set(granules.start);
        let end = match dirty {
            true => self.run_end(granules.start, granules.end, u64::MAX),
            false => self.next_set(granules.start, granules.end).unwrap_or(granules.end),
        };
        (dirty, (end << self.shift).min(stop))
    }

    /// Nothing there is to be copied any more: only granules that lie inside as a whole, and that nobody copies, become clean.
    pub fn forgo(&self, at: u64, len: u64) {
        self.clear_inside(at, len);
        self.settle(self.granules(at, len));
    }

    /// The runs of bytes that are dirty, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.next_set(next, self.granules)?;
            next = self.run_end(first, self.granules, u64::MAX);
            Some(self.bytes(&(first..next)))
        })
    }

    /// Where a dirty run that begins at `first` ends.
    fn run_end(&self, first: u64, stop: u64, most: u64) -> u64 {
        let stop = stop.min(first.saturating_add((most >> self.shift).max(1)));
        (first..stop).find(|granule| !self.is_set(*granule)).unwrap_or(stop)
    }

    fn take_granules(&self, granules: Granules) -> Copying<'_> {
        for granule in granules.clone() {
            self.words.borrow_mut()[(granule / 64) as usize] &= !(1 << (granule % 64));
        }
        self.dirty.set(self.dirty.get() - (granules.end - granules.start));
        let key = self.copying.borrow_mut().insert(granules.clone());
        Copying { map: self, key, granules, done: false }
    }

    fn next_set(&self, from: u64, to: u64) -> Option<u64> {
        let words = self.words.borrow();
        let mut granule = from;
        while granule < to {
            let word = words[(granule / 64) as usize] >> (granule % 64);
            if word != 0 {
                return Some(granule + u64::from(word.trailing_zeros())).filter(|g| *g < to);
            }
            granule = (granule / 64 + 1) * 64;
        }
        None
    }
}

/// A guest's write that is under way. Dropped, it leaves its range dirty, unless it is known to have reached both sides.
pub struct Writing<'a> {
    map: &'a DirtyMap,
    key: usize,
    granules: Granules,
    dirty: bool,
}

impl Writing<'_> {
    /// Both sides have it: granules that it covers as a whole are clean. Nobody else may write there or copy from there meanwhile.
    pub fn reached_both(mut self, at: u64, len: u64) {
        self.map.clear_inside(at, len);
        self.dirty = false;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.map.writers.borrow_mut().remove(self.key);
        if self.dirty {
            self.map.set_granules(self.granules.clone());
        } else {
            self.map.settle(self.granules.clone());
        }
    }
}

/// A copy that is under way. Dropped, it leaves its range dirty, unless it is done.
pub struct Copying<'a> {
    map: &'a DirtyMap,
    key: usize,
    granules: Granules,
    done: bool,
}

impl Copying<'_> {
    /// The bytes.
    pub fn range(&self) -> Range<u64> {
        self.map.bytes(&self.granules)
    }

    /// The target has what the source had when the copy began.
    pub fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Copying<'_> {
    fn drop(&mut self) {
        self.map.copying.borrow_mut().remove(self.key);
        if self.done {
            self.map.settle(self.granules.clone());
        } else {
            self.map.set_granules(self.granules.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::{Rng, scaled};

    const G: u64 = 4096;

    fn map(granules: u64) -> (DirtyMap, Kept) {
        let kept = Kept::memory(granules * G, G);
        (DirtyMap::new(granules * G, G, kept.clone()), kept)
    }

    /// What a successor would find dirty.
    fn after_a_crash(map: &DirtyMap, kept: &Kept) -> Vec<bool> {
        let Kept::Memory(words) = kept else { panic!() };
        let copy = Kept::Memory(Rc::new(RefCell::new(words.borrow().clone())));
        let next = DirtyMap::load(map.capacity, map.granularity(), copy);
        (0..map.granules).map(|g| next.is_set(g)).collect()
    }

    #[test]
    fn a_copy_or_a_write_that_is_dropped_leaves_its_range_dirty() {
        let (map, kept) = map(100);
        map.set(5 * G + 1, 2 * G);
        let copy = map.take(64 * G).unwrap();
        assert_eq!(copy.range(), 5 * G..8 * G);
        assert!(!map.has_work() && !map.is_settled());
        drop(copy);
        assert!(map.has_work());
        map.take(64 * G).unwrap().done();
        assert!(map.is_settled() && !after_a_crash(&map, &kept).contains(&true));
        drop(map.begin_write(0, 1));
        assert!(!map.is_clean(0, G) && map.is_clean(G, 99 * G));
    }

    #[test]
    fn a_write_that_reached_both_cleans_whole_granules_alone() {
        let (map, _) = map(10);
        map.set(0, 10 * G);
        map.begin_write(G / 2, 2 * G).reached_both(G / 2, 2 * G);
        assert!(!map.is_clean(0, 1) && map.is_clean(G, G) && !map.is_clean(2 * G, 1));
        // The last granule of a volume may be short.
        let kept = Kept::memory(10 * G + 512, G);
        let map = DirtyMap::new(10 * G + 512, G, kept);
        map.set(10 * G, 512);
        map.begin_write(10 * G, 512).reached_both(10 * G, 512);
        assert!(map.is_settled());
    }

    #[test]
    fn what_is_kept_covers_whatever_is_dirty_or_under_way_and_nothing_else() {
        for seed in 0..scaled(200) {
            let mut rng = Rng::new(seed);
            let (map, kept) = map(150);
            let (mut writes, mut copies) = (Vec::new(), Vec::new());
            for _ in 0..200 {
                let (at, len) = (rng.below(149 * G), 1 + rng.below(9 * G));
                match rng.below(6) {
                    0 => map.set(at, len),
                    1 => writes.push((map.begin_write(at, len), at, len)),
                    2 if !writes.is_empty() => {
                        let (write, at, len) = writes.swap_remove(rng.below(writes.len() as u64) as usize);
                        if rng.one_in(2) { drop(write) } else { write.reached_both(at, len) }
                    }
                    3 | 4 => copies.extend(map.take(len)),
                    _ if !copies.is_empty() => {
                        let copy = copies.swap_remove(rng.below(copies.len() as u64) as usize);
                        if rng.one_in(2) { drop(copy) } else { copy.done() }
                    }
                    _ => {}
                }
                let found = after_a_crash(&map, &kept);
                for g in 0..map.granules {
                    let one = g..g + 1;
                    let used = map.is_set(g)
                        || writes.iter().any(|(w, ..)| overlap(&w.granules, &one))
                        || copies.iter().any(|c| overlap(&c.granules, &one));
                    assert_eq!(found[g as usize], used, "seed {seed} granule {g}");
                }
                let counted = (0..map.granules).filter(|g| map.is_set(*g)).count() as u64;
                assert_eq!(map.dirty.get(), counted);
            }
        }
    }

    #[test]
    fn runs_of_granules_that_are_alike_end_where_they_end_or_where_the_question_does() {
        let (map, _) = map(100);
        map.set(5 * G, 70 * G);
        for (at, stop, dirty, end) in [
            (0, 100 * G, false, 5 * G),
            (G + 1, 3 * G, false, 3 * G),
            (5 * G + 512, 100 * G, true, 75 * G),
            (6 * G, 6 * G + 512, true, 6 * G + 512),
            (75 * G, 100 * G, false, 100 * G),
        ] {
            assert_eq!(map.alike(at, stop), (dirty, end), "{at} to {stop}");
        }
    }

    #[test]
    fn the_bits_of_any_volume_take_16_mib_at_most() {
        assert_eq!(granularity_for(1 << 30), GRANULARITY);
        assert_eq!(granularity_for(8 << 40), GRANULARITY);
        assert_eq!(granularity_for(64 << 40), 512 << 10);
        assert!(kept_bytes(64 << 40, granularity_for(64 << 40)) <= 16 << 20);
    }
}
