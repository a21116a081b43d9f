//! Metadata in memory: slices of L2 tables and of refcount blocks, bounded in number, evicted by second chance.
//!
//! Every change is written through before it is made here, so a slice is never dirty and may go at any time, except while
//! somebody holds it: a holder may write to the file and then here, and nobody loads an older version in between.
//! How often a slice was there is counted, for all images of a chain together.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    io,
    rc::Rc,
};

use serde::Serialize;

use super::{layout::be64, storage::Storage};
use crate::{sync::Notify, sys::mem::Buffer};

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

/// A set of cluster numbers.
pub type OffsetSet = HashSet<u64, BuildHasherDefault<OffsetHasher>>;

/// A piece of a metadata table.
pub struct Slice {
    /// Where it lies in the file.
    pub at: u64,
    bytes: RefCell<Box<[u8]>>,
    used: Cell<bool>,
}

impl Slice {
    /// The big-endian word at an index of a table of 64-bit words.
    pub fn word(&self, index: usize) -> u64 {
        be64(&self.bytes.borrow(), index * 8)
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
    slices: HashMap<u64, Rc<Slice>, BuildHasherDefault<OffsetHasher>>,
    loading: OffsetSet,
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

    /// The slice at an offset of the file, read if need be.
    pub async fn load(&self, storage: &impl Storage, at: u64) -> io::Result<Rc<Slice>> {
        loop {
            if let Some(slice) = self.get(at) {
                return Ok(slice);
            }
            if self.inner.borrow_mut().loading.insert(at) {
                break;
            }
            self.loaded.wait().await;
        }
        let _loading = Loading { cache: self, at };
        let buffer = Buffer::zeroed(self.slice as usize);
        storage.read(at, &buffer.sg()).await?;
        let bytes = RefCell::new(buffer.to_vec().into_boxed_slice());
        let slice = Rc::new(Slice { at, bytes, used: Cell::new(true) });
        let mut inner = self.inner.borrow_mut();
        let before = inner.slices.len();
        inner.make_room(self.most);
        inner.slices.insert(at, slice.clone());
        inner.order.push_back(at);
        let gone = (before + 1 - inner.slices.len()) as u64;
        self.counted(|c| {
            c.misses += 1;
            c.bytes = (c.bytes + self.slice).saturating_sub(gone * self.slice);
        });
        Ok(slice)
    }

    /// Drops what is known of a range of the file: a cluster that becomes something else.
    pub fn forget(&self, at: u64, len: u64) {
        let mut inner = self.inner.borrow_mut();
        let mut gone = 0;
        let mut pos = at;
        while pos < at + len {
            gone += u64::from(inner.slices.remove(&pos).is_some());
            pos += self.slice;
        }
        if gone > 0 {
            self.counted(|c| c.bytes = c.bytes.saturating_sub(gone * self.slice));
            inner.order.retain(|o| !(at..at + len).contains(o));
        }
    }

    /// Slices held.
    #[cfg(test)]
    pub fn len(&self) -> usize {
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
    use crate::image::qcow2::FileStorage;

    #[test]
    fn slices_are_bounded_and_held_ones_stay() {
        crate::sys::run(async |io| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4096 * 100).unwrap();
            let storage = FileStorage::new(&io, Rc::new(file)).unwrap();
            let cache = Cache::new(4096, 20 * 4096);
            let held = cache.load(&storage, 0).await.unwrap();
            held.set(24, &7u64.to_be_bytes());
            for i in 1..100 {
                cache.load(&storage, i * 4096).await.unwrap();
            }
            assert!(cache.len() <= 20);
            let count = cache.count.get();
            assert_eq!((count.hits, count.misses, count.bytes), (0, 100, 4096 * cache.len() as u64));
            assert_eq!(cache.get(0).unwrap().word(3), 7);
            cache.forget(0, 4096);
            assert!(cache.get(0).is_none());
            let count = cache.count.get();
            assert_eq!((count.hits, count.misses, count.bytes), (1, 100, 4096 * cache.len() as u64));
        });
    }
}
