//! Dirty bitmaps: which granules of a LUN have been written to since a bitmap was made or cleared (QEMU's `block-dirty-bitmap-*`).
//!
//! A bitmap never misses a change. It is marked when the change is over, whatever came of it, and before it is answered; so what is cleared
//! or taken for a backup while a change is under way is marked again after. A change that is dropped half way is marked too.
//!
//! While a backup has a bitmap it is *busy*: what it had when the backup began is kept, and what is written from then on is marked in it
//! anew. Which of the two it is in the end says how the backup ended ([`Bitmaps::give_back`]).
//!
//! Persistent bitmaps are kept in the image when that is closed in good order ([`Bitmaps::to_keep`]); until then the image says that they
//! are in use, and whoever opens it after a crash finds them *inconsistent*: such a bitmap can be removed, and nothing else.

use std::{cell::RefCell, ops::Range};

/// The longest name (bytes): QEMU's, and the qcow2 specification's.
pub const MAX_NAME: usize = 1023;
/// The finest granularity (bytes).
pub const MIN_BITMAP_GRANULARITY: u64 = 512;
/// The coarsest.
pub const MAX_BITMAP_GRANULARITY: u64 = 2 << 30;
/// The most memory that the bits of one may take (bytes).
pub const MAX_BITS: u64 = 256 << 20;
/// Bitmaps of one LUN at most.
pub const MAX_BITMAPS: usize = 256;

/// Why something is not done with a bitmap. In QEMU's words where it has them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// There is none of that name.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// There is one already.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// A name that is empty or too long.
    #[error("a bitmap has a name of 1 to {MAX_NAME} bytes")]
    Name,
    /// Too many.
    #[error("the LUN has {MAX_BITMAPS} dirty bitmaps already: remove one")]
    TooMany,
    /// A granularity out of bounds.
    #[error(
        "a granularity of {0} bytes: give a power of two from {MIN_BITMAP_GRANULARITY} to {MAX_BITMAP_GRANULARITY}"
    )]
    Granularity(u64),
    /// Too fine for the size of the LUN.
    #[error("with a granularity of {0} bytes its bits would take more than 256 MiB: give a coarser one")]
    TooFine(u64),
    /// A backup has it.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// It was in use when the image was last written to and not closed.
    #[error(
        "Bitmap '{0}' is inconsistent and cannot be used: it can only be removed (block-dirty-bitmap-remove)"
    )]
    Inconsistent(String),
    /// Nowhere to keep it.
    #[error("{0}")]
    CannotPersist(String),
    /// It could not be taken out of the image, or put there.
    #[error("{0}")]
    Image(String),
}

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

    /// All that is set in others, of any granularity.
    pub fn add(&mut self, others: &Bits) {
        if others.shift == self.shift {
            self.words.iter_mut().zip(&others.words).for_each(|(word, more)| *word |= more);
            return self.cut();
        }
        others.runs().for_each(|run| self.set(run.start, run.end - run.start));
    }

    fn clear(&mut self) {
        self.words.fill(0);
    }

    fn resize(&mut self, capacity: u64) {
        self.capacity = capacity;
        self.words.resize(self.granules().div_ceil(64) as usize, 0);
        self.cut();
    }
}

/// A bitmap, as it is told of (BlockDirtyInfo).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that it has marked.
    pub count: u64,
    /// Bytes of a granule.
    pub granularity: u64,
    /// Changes are marked.
    pub recording: bool,
    /// A backup has it.
    pub busy: bool,
    /// It is kept in the image.
    pub persistent: bool,
    /// It is of no use any more.
    pub inconsistent: bool,
}

/// A bitmap that is kept in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBitmap {
    /// Its name.
    pub name: String,
    /// Changes are marked.
    pub enabled: bool,
    /// What is marked; `None` if it is inconsistent.
    pub bits: Option<Bits>,
    /// Bytes of a granule.
    pub granularity: u64,
}

/// One bitmap.
#[derive(Clone)]
struct Bitmap {
    name: String,
    enabled: bool,
    persistent: bool,
    inconsistent: bool,
    bits: Bits,
    /// What it had when a backup began that has it.
    before: Option<Bits>,
}

/// What a backup leaves of its bitmap (BitmapSyncMode).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    /// What was copied is taken out if all was.
    OnSuccess,
    /// Nothing is taken out.
    Never,
    /// What was copied is taken out, whatever came of the rest.
    Always,
}

/// The dirty bitmaps of a LUN.
#[derive(Default)]
pub struct Bitmaps {
    all: RefCell<Vec<Bitmap>>,
}

/// What bitmaps were before something is done with them that may have to be undone: where each stood, and what it was if it was there.
pub struct Former(Vec<(usize, String, Option<Bitmap>)>);

/// A change of a range. Dropped, it is marked.
pub struct Changing<'a> {
    bitmaps: &'a Bitmaps,
    at: u64,
    len: u64,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.bitmaps.mark(self.at, self.len);
    }
}

type Done<T = ()> = Result<T, BitmapError>;

impl Bitmaps {
    /// A change begins. What is given has to live until it is over.
    pub fn changing(&self, at: u64, len: u64) -> Changing<'_> {
        Changing { bitmaps: self, at, len }
    }

    fn mark(&self, at: u64, len: u64) {
        for bitmap in self.all.borrow_mut().iter_mut().filter(|bitmap| bitmap.enabled) {
            bitmap.bits.set(at, len);
        }
    }

    /// All that there are.
    pub fn infos(&self) -> Vec<BitmapInfo> {
        let all = self.all.borrow();
        all.iter()
            .map(|bitmap| {
                // The bits may be many.
                let count = bitmap.before.clone().map_or_else(
                    || bitmap.bits.bytes(),
                    |mut both| {
                        both.add(&bitmap.bits);
                        both.bytes()
                    },
                );
                BitmapInfo {
                    name: bitmap.name.clone(),
                    count,
                    granularity: bitmap.bits.granularity(),
                    recording: bitmap.enabled,
                    busy: bitmap.before.is_some(),
                    persistent: bitmap.persistent,
                    inconsistent: bitmap.inconsistent,
                }
            })
            .collect()
    }

    fn with<T>(&self, name: &str, work: impl FnOnce(&mut Bitmap) -> T) -> Done<T> {
        let mut all = self.all.borrow_mut();
        let found = all.iter_mut().find(|bitmap| bitmap.name == name);
        found.map(work).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
    }

    /// One that is there, whole and of no backup.
    fn usable<T>(&self, name: &str, work: impl FnOnce(&mut Bitmap) -> T) -> Done<T> {
        self.with(name, |bitmap| match bitmap {
            b if b.inconsistent => Err(BitmapError::Inconsistent(name.to_owned())),
            b if b.before.is_some() => Err(BitmapError::Busy(name.to_owned())),
            b => Ok(work(b)),
        })?
    }

    /// Makes one in which nothing is marked.
    ///
    /// # Errors
    /// A name that is taken or cannot be one, a granularity out of bounds, too many.
    pub fn add(&self, name: &str, capacity: u64, granularity: u64, persistent: bool, enabled: bool) -> Done {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(BitmapError::Name);
        }
        let fits = (MIN_BITMAP_GRANULARITY..=MAX_BITMAP_GRANULARITY).contains(&granularity);
        if !fits || !granularity.is_power_of_two() {
            return Err(BitmapError::Granularity(granularity));
        }
        if capacity.div_ceil(granularity).div_ceil(8) > MAX_BITS {
            return Err(BitmapError::TooFine(granularity));
        }
        let mut all = self.all.borrow_mut();
        if all.iter().any(|bitmap| bitmap.name == name) {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        if all.len() >= MAX_BITMAPS {
            return Err(BitmapError::TooMany);
        }
        let bits = Bits::new(capacity, granularity);
        let name = name.to_owned();
        all.push(Bitmap { name, enabled, persistent, inconsistent: false, bits, before: None });
        Ok(())
    }

    /// Removes one; inconsistent ones too.
    ///
    /// # Errors
    /// If there is none, or a backup has it.
    pub fn remove(&self, name: &str) -> Done {
        let busy = self.with(name, |bitmap| bitmap.before.is_some())?;
        if busy {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        self.all.borrow_mut().retain(|bitmap| bitmap.name != name);
        Ok(())
    }

    /// Nothing is marked in it any more.
    ///
    /// # Errors
    /// If there is none, it is inconsistent, or a backup has it.
    pub fn clear(&self, name: &str) -> Done {
        self.usable(name, |bitmap| bitmap.bits.clear())
    }

    /// Changes are marked in it from now on, or no longer.
    ///
    /// # Errors
    /// As [`Bitmaps::clear`].
    pub fn enable(&self, name: &str, on: bool) -> Done {
        self.usable(name, |bitmap| bitmap.enabled = on)
    }

    /// Marks in one what is marked in others, whose granularities may differ. All or nothing.
    ///
    /// # Errors
    /// As [`Bitmaps::clear`], of any of them.
    pub fn merge(&self, target: &str, sources: &[String]) -> Done {
        let mut sum = self.usable(target, |bitmap| bitmap.bits.clone())?;
        for source in sources {
            let more = self.usable(source, |bitmap| bitmap.bits.clone())?;
            sum.add(&more);
        }
        self.usable(target, |bitmap| bitmap.bits = sum)
    }

    /// What those of these names are, and that some of them are not there.
    pub fn former<'a>(&self, names: impl Iterator<Item = &'a str>) -> Former {
        let all = self.all.borrow();
        let one = |name: &str| match all.iter().position(|bitmap| bitmap.name == name) {
            Some(at) => (at, name.to_owned(), Some(all[at].clone())),
            None => (all.len(), name.to_owned(), None),
        };
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        names.dedup();
        Former(names.into_iter().map(one).collect())
    }

    /// Makes them again what they were. Exact as long as nothing was written meanwhile.
    pub fn restore(&self, former: Former) {
        let mut all = self.all.borrow_mut();
        all.retain(|bitmap| former.0.iter().all(|(_, name, _)| *name != bitmap.name));
        // In the order in which they stood.
        let mut former = former.0;
        former.sort_by_key(|(at, ..)| *at);
        for (at, _, was) in former {
            let at = at.min(all.len());
            all.splice(at..at, was);
        }
    }

    /// A backup begins, now: gives what is marked, and is to be given back.
    ///
    /// # Errors
    /// As [`Bitmaps::clear`].
    pub fn lend(&self, name: &str) -> Done<Bits> {
        self.usable(name, |bitmap| {
            let taken = bitmap.bits.clone();
            bitmap.bits.clear();
            bitmap.before = Some(taken.clone());
            taken
        })
    }

    /// Whether a backup could have it.
    ///
    /// # Errors
    /// As [`Bitmaps::clear`].
    pub fn check(&self, name: &str) -> Done {
        self.usable(name, |_| ())
    }

    /// A backup that has it is over. `left` is what it has not copied; nothing of it counts if it `succeeded`.
    pub fn give_back(
        &self,
        name: &str,
        mode: BitmapMode,
        succeeded: bool,
        left: impl Iterator<Item = Range<u64>>,
    ) {
        // One that is gone with its image is nobody's.
        let _ = self.with(name, |bitmap| {
            let Some(before) = bitmap.before.take() else { return };
            match (mode, succeeded) {
                (BitmapMode::OnSuccess | BitmapMode::Always, true) => {}
                (BitmapMode::Always, false) => {
                    left.for_each(|run| bitmap.bits.set(run.start, run.end - run.start))
                }
                (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => bitmap.bits.add(&before),
            }
        });
    }

    /// The volume has another size. What it has more is not marked, as in QEMU: it reads as zeros until it is written to.
    pub fn resize(&self, capacity: u64) {
        for bitmap in self.all.borrow_mut().iter_mut() {
            bitmap.bits.resize(capacity);
            bitmap.before.iter_mut().for_each(|bits| bits.resize(capacity));
        }
    }

    /// Those that are to be kept in the image.
    pub fn to_keep(&self) -> Vec<KeptBitmap> {
        let all = self.all.borrow();
        let kept = all.iter().filter(|bitmap| bitmap.persistent).map(|bitmap| {
            let mut bits = bitmap.bits.clone();
            // A backup that was cut off has copied nothing that counts.
            bitmap.before.iter().for_each(|before| bits.add(before));
            let granularity = bits.granularity();
            let bits = (!bitmap.inconsistent).then_some(bits);
            KeptBitmap { name: bitmap.name.clone(), enabled: bitmap.enabled, bits, granularity }
        });
        kept.collect()
    }

    /// The LUN gets another image: takes out what the old one keeps.
    pub fn part(&self) -> Vec<KeptBitmap> {
        let kept = self.to_keep();
        self.all.borrow_mut().retain(|bitmap| !bitmap.persistent);
        kept
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.all.borrow().is_empty()
    }

    /// The LUN has another image: what was kept in the old one goes with it, what the new one keeps is here, and all others stay.
    pub fn replace_kept(&self, capacity: u64, kept: Vec<KeptBitmap>) {
        let mut all = self.all.borrow_mut();
        all.retain(|bitmap| !bitmap.persistent);
        for KeptBitmap { name, enabled, bits, granularity } in kept {
            // A name can be that of one.
            all.retain(|bitmap| bitmap.name != name);
            let inconsistent = bits.is_none();
            let bits = bits.unwrap_or_else(|| Bits::new(capacity, granularity));
            let enabled = enabled && !inconsistent;
            all.push(Bitmap { name, enabled, persistent: true, inconsistent, bits, before: None });
        }
    }
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
