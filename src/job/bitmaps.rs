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
//!
//! One that is *exposed*, to clients of an export, is busy as well: what they are told is not changed under them, but by what is written.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
};

pub use super::bits::Bits;

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
    /// A backup has it, or an export.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// It was in use when the image was last written to and not closed.
    #[error(
        "Bitmap '{0}' is inconsistent and cannot be used: it can only be removed (block-dirty-bitmap-remove)"
    )]
    Inconsistent(String),
    /// Clients that only read would be told of changes, but not of what is there since.
    #[error("Enabled bitmap '{0}' incompatible with readonly export")]
    Enabled(String),
    /// Nowhere to keep it.
    #[error("{0}")]
    CannotPersist(String),
    /// It could not be taken out of the image, or put there.
    #[error("{0}")]
    Image(String),
}

/// Whether a disk of that size can have a bitmap with granules of so many bytes.
///
/// # Errors
/// It is out of bounds, or no power of two; the bits would take too much memory.
pub fn check_granularity(capacity: u64, granularity: u64) -> Done {
    let fits = (MIN_BITMAP_GRANULARITY..=MAX_BITMAP_GRANULARITY).contains(&granularity);
    if !fits || !granularity.is_power_of_two() {
        return Err(BitmapError::Granularity(granularity));
    }
    if capacity.div_ceil(granularity).div_ceil(8) > MAX_BITS {
        return Err(BitmapError::TooFine(granularity));
    }
    Ok(())
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
    /// A backup has it, or an export.
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
    /// Its own, whatever others have its name later.
    number: u64,
    name: String,
    enabled: bool,
    persistent: bool,
    inconsistent: bool,
    bits: Bits,
    /// What it had when a backup began that has it.
    before: Option<Bits>,
    /// An export has it.
    exposed: bool,
}

impl Bitmap {
    fn is_busy(&self) -> bool {
        self.before.is_some() || self.exposed
    }

    /// As it is kept, by an image or another host.
    fn to_keep(&self) -> KeptBitmap {
        let mut bits = self.bits.clone();
        // A backup that was cut off has copied nothing that counts.
        self.before.iter().for_each(|before| bits.add(before));
        let granularity = bits.granularity();
        let bits = (!self.inconsistent).then_some(bits);
        KeptBitmap { name: self.name.clone(), enabled: self.enabled, bits, granularity }
    }
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
    made: Cell<u64>,
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
                    busy: bitmap.is_busy(),
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

    fn number(&self) -> u64 {
        self.made.replace(self.made.get() + 1)
    }

    /// One that is there, whole, and of no backup or export.
    fn usable<T>(&self, name: &str, work: impl FnOnce(&mut Bitmap) -> T) -> Done<T> {
        self.with(name, |bitmap| match bitmap {
            b if b.inconsistent => Err(BitmapError::Inconsistent(name.to_owned())),
            b if b.is_busy() => Err(BitmapError::Busy(name.to_owned())),
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
        check_granularity(capacity, granularity)?;
        let mut all = self.all.borrow_mut();
        if all.iter().any(|bitmap| bitmap.name == name) {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        if all.len() >= MAX_BITMAPS {
            return Err(BitmapError::TooMany);
        }
        let bits = Bits::new(capacity, granularity);
        let name = name.to_owned();
        let number = self.number();
        let (inconsistent, before, exposed) = (false, None, false);
        all.push(Bitmap { number, name, enabled, persistent, inconsistent, bits, before, exposed });
        Ok(())
    }

    /// Removes one; inconsistent ones too.
    ///
    /// # Errors
    /// If there is none, or a backup or an export has it.
    pub fn remove(&self, name: &str) -> Done {
        let busy = self.with(name, |bitmap| bitmap.is_busy())?;
        if busy {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        self.all.borrow_mut().retain(|bitmap| bitmap.name != name);
        Ok(())
    }

    /// Nothing is marked in it any more.
    ///
    /// # Errors
    /// If there is none, it is inconsistent, or a backup or an export has it.
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

    /// An export has them from now on, all or none: gives their numbers. Those of which `lent` holds have to be a backup's, and what they
    /// had when it began is what they are to clients. Others do not change but by what is written, and not even by that unless the export is
    /// `live`: one that clients can write to, or of a volume that nobody writes to.
    ///
    /// # Errors
    /// If there is none, it is inconsistent, somebody else has it, or it is enabled and the export is not `live`.
    pub fn expose(&self, names: &[String], lent: impl Fn(&str) -> bool, live: bool) -> Done<Vec<u64>> {
        let mut numbers = Vec::new();
        for name in names {
            let lent = lent(name);
            let exposed = self.with(name, |bitmap| match bitmap {
                b if b.inconsistent => Err(BitmapError::Inconsistent(name.clone())),
                b if b.exposed || b.before.is_some() != lent => Err(BitmapError::Busy(name.clone())),
                b if b.enabled && !lent && !live => Err(BitmapError::Enabled(name.clone())),
                b => {
                    b.exposed = true;
                    Ok(b.number)
                }
            });
            match exposed.and_then(|done| done) {
                Ok(number) => numbers.push(number),
                Err(e) => {
                    self.cover(&numbers);
                    return Err(e);
                }
            }
        }
        Ok(numbers)
    }

    /// No export has them any more.
    pub fn cover(&self, numbers: &[u64]) {
        let mut all = self.all.borrow_mut();
        all.iter_mut().filter(|b| numbers.contains(&b.number)).for_each(|b| b.exposed = false);
    }

    /// What clients are told of an exposed bitmap: [`Bits::runs_in`]. `None` if it is gone, or the backup that had it.
    pub fn exposed(
        &self,
        number: u64,
        lent: bool,
        range: Range<u64>,
        unit: u64,
        most: usize,
    ) -> Option<Vec<(u64, bool)>> {
        let all = self.all.borrow();
        let bitmap = all.iter().find(|bitmap| bitmap.number == number && bitmap.exposed)?;
        let bits = if lent { bitmap.before.as_ref()? } else { &bitmap.bits };
        Some(bits.runs_in(range.start, range.end, unit, most))
    }

    /// The volume has another size. What it has more is not marked, as in QEMU: it reads as zeros until it is written to.
    pub fn resize(&self, capacity: u64) {
        for bitmap in self.all.borrow_mut().iter_mut() {
            bitmap.bits.resize(capacity);
            bitmap.before.iter_mut().for_each(|bits| bits.resize(capacity));
        }
    }

    /// All of them, each with whether it is to be kept in the image.
    pub fn all(&self) -> Vec<(KeptBitmap, bool)> {
        self.all.borrow().iter().map(|bitmap| (bitmap.to_keep(), bitmap.persistent)).collect()
    }

    /// Those that are to be kept in the image.
    pub fn to_keep(&self) -> Vec<KeptBitmap> {
        self.all.borrow().iter().filter(|bitmap| bitmap.persistent).map(Bitmap::to_keep).collect()
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
        self.all.borrow_mut().retain(|bitmap| !bitmap.persistent);
        for kept in kept {
            self.put(capacity, kept, true);
        }
    }

    /// Takes one over, from an image or another host, in place of one of that name.
    pub fn put(&self, capacity: u64, kept: KeptBitmap, persistent: bool) {
        let KeptBitmap { name, enabled, bits, granularity } = kept;
        let mut all = self.all.borrow_mut();
        // A name can be that of one.
        all.retain(|bitmap| bitmap.name != name);
        let inconsistent = bits.is_none();
        let bits = bits.unwrap_or_else(|| Bits::new(capacity, granularity));
        let enabled = enabled && !inconsistent;
        let (number, before, exposed) = (self.number(), None, false);
        all.push(Bitmap { number, name, enabled, persistent, inconsistent, bits, before, exposed });
    }
}

#[cfg(test)]
#[path = "bitmaps_tests.rs"]
mod tests;
