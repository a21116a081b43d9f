//! Pieces of a file in memory, all of one length: slices of qcow2's tables, pages of the sidecar's tuples. Bounded in number, evicted by second chance.
//!
//! Every change is written through before it is made here, so a slice is never dirty and may go at any time, except while
//! somebody holds it: a holder may write to the file and then here, and nobody loads an older version in between. Who holds none tells of what it
//! has written ([`Cache::wrote`], [`Cache::forget`]), and what was being read meanwhile is not kept.
//! How often a slice was there is counted, by many caches together if they are told to.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    hash::{BuildHasherDefault, Hasher},
    io,
    rc::Rc,
};

use serde::Serialize;

use crate::{
    sync::Notify,
    sys::mem::{Buffer, Sg},
};

/// Slices that a cache may hold however small it is: what a few operations in flight need at once.
pub const LEAST: u64 = 16;

/// Hashes offsets and cluster numbers: one multiplication, since an attacker gains nothing from collisions but time of a lookup.
#[derive(Default)]
pub struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(self.0 ^ u64::from(*b));
        }
    }

    fn write_u64(&mut self, n: u64) {
        let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = n ^ n >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Something by offsets, or by numbers of clusters, pages or regions.
pub type OffsetMap<V> = HashMap<u64, V, BuildHasherDefault<OffsetHasher>>;

/// A set of cluster numbers.
pub type OffsetSet = HashSet<u64, BuildHasherDefault<OffsetHasher>>;

/// A piece of the file.
pub struct Slice {
    /// Where it lies in the file.
    pub at: u64,
    bytes: RefCell<Box<[u8]>>,
    used: Cell<bool>,
}

impl Slice {
    /// The big-endian word at an index of a table of 64-bit words.
    pub fn word(&self, index: usize) -> u64 {
        let bytes = self.bytes.borrow();
        let words = bytes.as_chunks::<8>().0;
        u64::from_be_bytes(words[index])
    }

    /// Sets bytes from an offset on.
    pub fn set(&self, at: usize, new: &[u8]) {
        self.bytes.borrow_mut()[at..at + new.len()].copy_from_slice(new);
    }

    /// Looks at the bytes.
    pub fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        f(&self.bytes.borrow())
    }

    /// Changes the bytes.
    pub fn change<T>(&self, f: impl FnOnce(&mut [u8]) -> T) -> T {
        f(&mut self.bytes.borrow_mut())
    }
}

/// How a kind of cache has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct CacheCount {
    /// Looks at a slice that was in memory.
    pub hits: u64,
    /// Slices that were read from the file.
    pub misses: u64,
    /// Bytes of slices in memory now.
    pub bytes: u64,
}

/// The counts of one kind of cache, of all images of a chain.
pub type CacheCounter = Rc<Cell<CacheCount>>;

/// A bounded number of slices.
pub struct Cache {
    inner: RefCell<Inner>,
    loaded: Notify,
    slice: u64,
    most: usize,
    count: CacheCounter,
}

#[derive(Default)]
struct Inner {
    slices: OffsetMap<Rc<Slice>>,
    /// What is being read, and whether the file has changed there since.
    loading: OffsetMap<bool>,
    order: VecDeque<u64>,
}

struct Loading<'a> {
    cache: &'a Cache,
    at: u64,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.cache.inner.borrow_mut().loading.remove(&self.at);
        self.cache.loaded.notify_all();
    }
}

impl Cache {
    /// No slices yet, and never more than fit in `bytes`, but for [`LEAST`] and those that are held.
    pub fn new(slice: u64, bytes: u64) -> Cache {
        let mut cache = Cache {
            inner: RefCell::default(),
            loaded: Notify::new(),
            slice,
            most: 0,
            count: CacheCounter::default(),
        };
        cache.limit(bytes);
        cache
    }

    /// Holds no more than fit in `bytes` from now on, but for [`LEAST`].
    pub fn limit(&mut self, bytes: u64) {
        self.most = (bytes / self.slice).max(LEAST) as usize;
    }

    /// Counts there from now on.
    pub fn count_in(&mut self, count: CacheCounter) {
        self.count = count;
        self.counted(|c| c.bytes += self.slice * self.inner.borrow().slices.len() as u64);
    }

    /// What was counted, by all who count there.
    pub fn counted_so_far(&self) -> CacheCount {
        self.count.get()
    }

    fn counted(&self, change: impl FnOnce(&mut CacheCount)) {
        let mut count = self.count.get();
        change(&mut count);
        self.count.set(count);
    }

    /// The slice at an offset of the file, if it is there.
    pub fn get(&self, at: u64) -> Option<Rc<Slice>> {
        let inner = self.inner.borrow();
        let slice = inner.slices.get(&at)?;
        slice.used.set(true);
        self.counted(|c| c.hits += 1);
        Some(slice.clone())
    }

    /// The slice at an offset of the file, got by `read` if need be, which fills the memory from there on.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn load(
        &self,
        at: u64,
        read: impl AsyncFnOnce(&Sg) -> io::Result<()>,
    ) -> io::Result<Rc<Slice>> {
        loop {
            if let Some(slice) = self.get(at) {
                return Ok(slice);
            }
            if let Entry::Vacant(free) = self.inner.borrow_mut().loading.entry(at) {
                free.insert(false);
                break;
            }
            self.loaded.wait().await;
        }
        let _loading = Loading { cache: self, at };
        let buffer = Buffer::zeroed(self.slice as usize);
        read(&buffer.sg()).await?;
        let bytes = RefCell::new(buffer.to_vec().into_boxed_slice());
        let slice = Rc::new(Slice { at, bytes, used: Cell::new(true) });
        let mut inner = self.inner.borrow_mut();
        let before = inner.slices.len();
        let keep = inner.loading.get(&at) == Some(&false);
        if keep {
            inner.make_room(self.most);
            inner.slices.insert(at, slice.clone());
            inner.order.push_back(at);
        }
        let gone = (before + usize::from(keep) - inner.slices.len()) as u64;
        self.counted(|c| {
            c.misses += 1;
            c.bytes = (c.bytes + self.slice * u64::from(keep)).saturating_sub(gone * self.slice);
        });
        Ok(slice)
    }

    /// The file has these bytes at an offset now.
    pub fn wrote(&self, at: u64, bytes: &Sg) {
        let mut inner = self.inner.borrow_mut();
        let end = at + bytes.len() as u64;
        let mut pos = at;
        while pos < end {
            let first = pos / self.slice * self.slice;
            let stop = end.min(first + self.slice);
            if let Some(changed) = inner.loading.get_mut(&first) {
                *changed = true;
            }
            if let Some(slice) = inner.slices.get(&first) {
                let inside = (pos - first) as usize..(stop - first) as usize;
                slice.change(|there| bytes.copy_out((pos - at) as usize, &mut there[inside]));
            }
            pos = stop;
        }
    }

    /// Drops what is known of a range of the file: a cluster that becomes something else, bytes of which it is not known what they are.
    pub fn forget(&self, at: u64, len: u64) {
        let inner = &mut *self.inner.borrow_mut();
        let (first, end) = (at / self.slice, at.saturating_add(len).div_ceil(self.slice));
        let within = |at: &u64| (first..end).contains(&(at / self.slice));
        inner.loading.iter_mut().filter(|(at, _)| within(at)).for_each(|(_, changed)| *changed = true);
        let before = inner.slices.len();
        if end - first < before as u64 {
            (first..end).for_each(|i| drop(inner.slices.remove(&(i * self.slice))));
        } else {
            inner.slices.retain(|at, _| !within(at));
        }
        let gone = (before - inner.slices.len()) as u64;
        if gone > 0 {
            self.counted(|c| c.bytes = c.bytes.saturating_sub(gone * self.slice));
            inner.order.retain(|at| !within(at));
        }
    }

    /// Slices held.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.inner.borrow().slices.len()
    }
}

impl Inner {
    fn make_room(&mut self, most: usize) {
        let mut tries = 2 * self.order.len();
        while self.slices.len() >= most && tries > 0 {
            tries -= 1;
            let Some(at) = self.order.pop_front() else { return };
            match self.slices.get(&at) {
                Some(slice) if slice.used.replace(false) || Rc::strong_count(slice) > 1 => {
                    self.order.push_back(at);
                }
                _ => {
                    self.slices.remove(&at);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pi::testing::block_on,
        storage::{
            Storage,
            sim::{Rng, SimDisk, scaled},
        },
        sys::exec::{join, join_all, yield_now},
    };

    #[test]
    fn slices_are_bounded_and_held_ones_stay() {
        block_on(async {
            let disk = SimDisk::new(1);
            let cache = Cache::new(4096, 20 * 4096);
            let load = async |at| cache.load(at, async |to: &Sg| disk.read(at, to).await).await.unwrap();
            let held = load(0).await;
            held.set(24, &7u64.to_be_bytes());
            for i in 1..100 {
                load(i * 4096).await;
            }
            assert!(cache.len() <= 20);
            let count = cache.count.get();
            assert_eq!((count.hits, count.misses, count.bytes), (0, 100, 4096 * cache.len() as u64));
            assert_eq!(cache.get(0).unwrap().word(3), 7);
            cache.forget(0, 4096);
            assert!(cache.get(0).is_none());
            let count = cache.count.get();
            assert_eq!((count.hits, count.misses, count.bytes), (1, 100, 4096 * cache.len() as u64));
            cache.forget(0, u64::MAX);
            assert_eq!((cache.len(), cache.count.get().bytes), (0, 0));
        });
    }

    /// Writers and readers of one place never meet, as under a range lock; those of the rest of its slice do.
    #[test]
    fn what_is_read_while_its_slice_is_written_is_what_was_written_last() {
        const PIECE: u64 = 16;
        for seed in 0..20 {
            block_on(async move {
                let (cache, disk) = (&Cache::new(128, LEAST * 128), &SimDisk::new(seed));
                disk.set_max_delay(5);
                let guests = (0..64u64).map(|i| async move {
                    let (mut rng, at) = (Rng::new(seed * 100 + i), i * PIECE);
                    let mut now = [0; PIECE as usize];
                    for _ in 0..scaled(50) {
                        match rng.below(8) {
                            0..4 => {
                                let slice = at / 128 * 128;
                                let slice = cache
                                    .load(slice, async |to: &Sg| disk.read(slice, to).await)
                                    .await
                                    .unwrap();
                                let inside = (at % 128) as usize;
                                slice.with(|b| {
                                    assert_eq!(b[inside..][..now.len()], now, "seed {seed}, piece {i}")
                                });
                            }
                            4..7 => {
                                now = [rng.below(256) as u8; PIECE as usize];
                                let new = Buffer::from_slice(&now).sg();
                                disk.write(at, &new, false).await.unwrap();
                                cache.wrote(at, &new);
                            }
                            _ => {
                                now = [0; PIECE as usize];
                                cache.forget(at, PIECE);
                                disk.write(at, &Buffer::zeroed(now.len()).sg(), false).await.unwrap();
                                cache.forget(at, PIECE);
                            }
                        }
                        yield_now().await;
                    }
                });
                join(join_all(guests), yield_now()).await;
                assert!(cache.count.get().hits > 0);
            });
        }
    }
}
