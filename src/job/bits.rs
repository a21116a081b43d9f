//! A set of granules of a volume, of which there may be many: the bits of a dirty bitmap.

use std::ops::Range;

/// A set of granules of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bits {
    shift: u32,
    capacity: u64,
    words: Vec<u64>,
}

impl Bits {
    /// None. `granularity` is a power of two.
    pub fn new(capacity: u64, granularity: u64) -> Bits {
        let granules = capacity.div_ceil(granularity);
        Bits { shift: granularity.trailing_zeros(), capacity, words: vec![0; granules.div_ceil(64) as usize] }
    }

    /// From 64 in a word, least significant first.
    pub fn from_words(capacity: u64, granularity: u64, mut words: Vec<u64>) -> Bits {
        let mut bits = Bits::new(capacity, granularity);
        words.resize(bits.words.len(), 0);
        bits.words = words;
        bits.cut();
        bits
    }

    /// 64 in a word, least significant first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Bytes of a granule.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    fn granules(&self) -> u64 {
        self.capacity.div_ceil(self.granularity())
    }

    /// Nothing is set beyond the end.
    fn cut(&mut self) {
        let used = self.granules() % 64;
        if let Some(last) = self.words.last_mut().filter(|_| used != 0) {
            *last &= (1 << used) - 1;
        }
    }

    /// All that a range touches.
    pub fn set(&mut self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.capacity);
        if end <= at {
            return;
        }
        let (first, last) = (at >> self.shift, (end - 1) >> self.shift);
        let (from, to) = ((first / 64) as usize, (last / 64) as usize);
        let (head, tail) = (u64::MAX << (first % 64), u64::MAX >> (63 - last % 64));
        if from == to {
            self.words[from] |= head & tail;
            return;
        }
        self.words[from] |= head;
        self.words[from + 1..to].fill(u64::MAX);
        self.words[to] |= tail;
    }

    /// Bytes that are set.
    pub fn bytes(&self) -> u64 {
        self.runs().map(|run| run.end - run.start).sum()
    }

    /// The runs of bytes that are set, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = self.find(next, true)?;
            let end = self.find(first, false).unwrap_or(self.granules());
            next = end;
            Some(first << self.shift..(end << self.shift).min(self.capacity))
        })
    }

    /// The first granule from `from` on that is set, or isn't.
    fn find(&self, from: u64, set: bool) -> Option<u64> {
        let mut granule = from;
        while granule < self.granules() {
            let word = self.words[(granule / 64) as usize];
            let word = if set { word } else { !word } >> (granule % 64);
            if word != 0 {
                return Some(granule + u64::from(word.trailing_zeros())).filter(|g| *g < self.granules());
            }
            granule = (granule / 64 + 1) * 64;
        }
        None
    }

    /// Runs of bytes in units of `unit` (a power of two), the first from `at` on, and whether something of them is set; up to `stop`, and
    /// `most` at most.
    pub fn runs_in(&self, at: u64, stop: u64, unit: u64, most: usize) -> Vec<(u64, bool)> {
        let (mut at, mut runs) = (at, Vec::new());
        let start = |granule: u64| (granule << self.shift) & !(unit - 1);
        while at < stop && runs.len() < most {
            let next =
                self.find(at >> self.shift, true).map_or(stop, |granule| start(granule).max(at)).min(stop);
            let (end, set) = match next > at {
                true => (next, false),
                false if self.granularity() >= unit => {
                    let end =
                        self.find(at >> self.shift, false).map_or(stop, |granule| granule << self.shift);
                    (end, true)
                }
                // Units of which a part is set count as a whole.
                false => {
                    let mut end = at + unit;
                    while end < stop && self.find(end >> self.shift, true).is_some_and(|g| start(g) == end) {
                        end += unit;
                    }
                    (end, true)
                }
            };
            let end = end.min(stop);
            runs.push((end - at, set));
            at = end;
        }
        runs
    }

    /// All that is set in others, of any granularity.
    pub fn add(&mut self, others: &Bits) {
        if others.shift == self.shift {
            self.words.iter_mut().zip(&others.words).for_each(|(word, more)| *word |= more);
            return self.cut();
        }
        others.runs().for_each(|run| self.set(run.start, run.end - run.start));
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }

    pub(super) fn resize(&mut self, capacity: u64) {
        self.capacity = capacity;
        self.words.resize(self.granules().div_ceil(64) as usize, 0);
        self.cut();
    }
}
