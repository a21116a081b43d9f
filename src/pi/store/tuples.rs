//! The tuples of a sidecar: read, written, given up. Small reads of a sidecar that one daemon writes are answered from memory where they can be:
//! a second read of the file for 64 bytes would cost as much as that of the data.
//!
//! What is in memory is what the file has. Whoever changes tuples does so while nobody else uses their blocks ([`super::super::protected`] locks
//! them), and tells the cache at the end, so only the rest of a page may be read at the same time; that is what [`Cache`] is made for.
//! Scrubbing, rechecks and tools read the file.

use std::{io, ops::Range};

use super::{PAGE, Sidecar};
use crate::{
    pi::tuple::{TUPLE_LEN, invert},
    storage::{
        Storage,
        cache::{Cache, CacheCount},
    },
    sys::{
        io::Fallocate,
        mem::{Buffer, Sg},
    },
    units::Lba,
};

/// Bytes of tuples that are kept in memory: those of 256 MiB of blocks of 512 bytes, of 2 GiB of 4096.
const REMEMBERED: u64 = 4 << 20;
/// The most bytes of tuples that are looked for in memory, and brought there: a longer read takes so long that one more does not count.
const SMALL: u64 = 1 << 10;

/// Where tuples are read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From memory, if they are there: what a guest reads.
    Memory,
    /// From the sidecar's file: what a scrub looks at.
    File,
}

/// Tuples that are being changed. What is known of them is forgotten unless [`Changing::became`] says what they are, and what is read
/// of them meanwhile is not kept.
pub(super) struct Changing<'a> {
    recent: Option<&'a Cache>,
    at: u64,
    len: u64,
}

impl Changing<'_> {
    /// The file has these bytes now.
    fn became(mut self, bytes: &Buffer) {
        if let Some(recent) = self.recent.take_if(|_| self.len <= SMALL) {
            recent.wrote(self.at, &bytes.sg());
        }
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if let Some(recent) = self.recent {
            recent.forget(self.at, self.len);
        }
    }
}

/// The pages that a range of the file lies in, and what of each.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, Range<usize>)> {
    let end = at + len;
    let pages = (at / PAGE..end.div_ceil(PAGE)).map(|page| page * PAGE);
    pages.map(move |page| (page, (at.max(page) - page) as usize..(end.min(page + PAGE) - page) as usize))
}

impl<S: Storage> Sidecar<S> {
    pub(super) fn tuple_at(&self, lba: Lba) -> u64 {
        self.header.borrow().tuple_offset + lba.0 * TUPLE_LEN as u64
    }

    /// From now on small reads may be answered from memory. Nobody else may write the file as long as this one is used.
    pub fn remember(&mut self) {
        self.recent = Some(Cache::new(PAGE, REMEMBERED));
    }

    /// How often that was of use.
    pub fn remembered(&self) -> Option<CacheCount> {
        self.recent.as_ref().map(Cache::counted_so_far)
    }

    /// Says that bytes of the file are about to change.
    pub(super) fn changing(&self, at: u64, len: u64) -> Changing<'_> {
        Changing { recent: self.recent.as_ref(), at, len }
    }

    /// The tuples of `blocks` blocks, in the form that travels, as the file has them.
    pub async fn read_tuples(&self, lba: Lba, blocks: u64) -> io::Result<Vec<u8>> {
        let buffer = Buffer::unset(blocks as usize * TUPLE_LEN);
        self.storage.read(self.tuple_at(lba), &buffer.sg()).await?;
        let mut bytes = buffer.to_vec();
        invert(&mut bytes);
        let overlay = self.overlay.borrow();
        if !overlay.is_empty() {
            for (i, slot) in bytes.as_chunks_mut::<TUPLE_LEN>().0.iter_mut().enumerate() {
                if let Some(tuple) = overlay.get(&(lba.0 + i as u64)) {
                    *slot = *tuple;
                }
            }
        }
        Ok(bytes)
    }

    /// The tuples of `blocks` blocks, in the form that travels. From memory, the blocks have to be locked.
    pub async fn tuples_from(&self, source: Source, lba: Lba, blocks: u64) -> io::Result<Vec<u8>> {
        let (at, len) = (self.tuple_at(lba), blocks * TUPLE_LEN as u64);
        let Some(recent) = self.recent.as_ref().filter(|_| source == Source::Memory && len <= SMALL) else {
            return self.read_tuples(lba, blocks).await;
        };
        let mut bytes = Vec::with_capacity(len as usize);
        for (page, inside) in pieces(at, len) {
            let slice = recent.load(page, async |to: &Sg| self.storage.read(page, to).await).await?;
            slice.with(|there| bytes.extend_from_slice(&there[inside]));
        }
        invert(&mut bytes);
        Ok(bytes)
    }

    /// The same, if all of them are in memory.
    pub fn known_tuples(&self, lba: Lba, blocks: u64) -> Option<Vec<u8>> {
        let (at, len) = (self.tuple_at(lba), blocks * TUPLE_LEN as u64);
        let recent = self.recent.as_ref().filter(|_| len <= SMALL)?;
        let mut bytes = Vec::with_capacity(len as usize);
        for (page, inside) in pieces(at, len) {
            recent.get(page)?.with(|there| bytes.extend_from_slice(&there[inside]));
        }
        invert(&mut bytes);
        Some(bytes)
    }

    /// Has what is in memory of those tuples read from the file again; false if nothing is kept in memory.
    pub fn doubt_memory(&self, lba: Lba, blocks: u64) -> bool {
        drop(self.changing(self.tuple_at(lba), blocks * TUPLE_LEN as u64));
        self.recent.is_some()
    }

    /// From now on reads give these tuples; the file stays as it is.
    pub fn overlay(&self, lba: Lba, tuples: &[u8]) {
        let tuples = tuples.as_chunks::<TUPLE_LEN>().0.iter().enumerate();
        self.overlay.borrow_mut().extend(tuples.map(|(i, tuple)| (lba.0 + i as u64, *tuple)));
    }

    /// Writes tuples in the form that travels. The region must be marked.
    pub async fn write_tuples(&self, lba: Lba, mut bytes: Vec<u8>, dsync: bool) -> io::Result<()> {
        invert(&mut bytes);
        let (at, len) = (self.tuple_at(lba), bytes.len() as u64);
        let bytes = Buffer::from_slice(&bytes);
        let changing = self.changing(at, len);
        let done = self.gather.write(&self.storage, at, bytes.clone(), dsync).await;
        self.wrote();
        done?;
        changing.became(&bytes);
        let mut pages = self.pages.borrow_mut();
        for page in at / PAGE..(at + len).div_ceil(PAGE) {
            *pages.entry(page / 64).or_default() |= 1 << (page % 64);
        }
        Ok(())
    }

    /// Whether the tuples of those blocks are known to have their space, so that writing them cannot fail for want of it
    /// (on a file system that writes in place).
    pub fn has_space(&self, lba: Lba, blocks: u64) -> bool {
        let at = self.tuple_at(lba);
        let pages = self.pages.borrow();
        (at / PAGE..(at + blocks * TUPLE_LEN as u64).div_ceil(PAGE))
            .all(|page| pages.get(&(page / 64)).is_some_and(|word| word >> (page % 64) & 1 == 1))
    }

    /// Gives the blocks the escape: frees the space of their tuples, or keeps it if later writes shall need none.
    pub async fn clear_tuples(&self, lba: Lba, blocks: u64, keep_space: bool) -> io::Result<()> {
        let (at, len) = (self.tuple_at(lba), blocks * TUPLE_LEN as u64);
        let end = at + len;
        let _changing = self.changing(at, len);
        let how = if keep_space { Fallocate::ZeroRange } else { Fallocate::PunchHole };
        self.pages.borrow_mut().retain(|word, _| !(at / PAGE / 64..=end / PAGE / 64).contains(word));
        let done = self.storage.fallocate(how, at, len).await;
        self.wrote();
        match done {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => (),
            done => return done,
        }
        let zeros = Buffer::zeroed(len.min(1 << 20) as usize).sg();
        let mut pos = at;
        while pos < end {
            let n = (end - pos).min(zeros.len() as u64);
            self.storage.write(pos, &zeros.slice(0, n as usize), false).await?;
            pos += n;
        }
        self.wrote();
        Ok(())
    }

    /// The first run of blocks at or after `lba` whose tuples may be other than the escape.
    pub async fn next_tuples(&self, lba: Lba) -> io::Result<Option<Range<u64>>> {
        let base = self.tuple_at(Lba(0));
        let found = self.storage.next_data(self.tuple_at(lba)).await?;
        let size = TUPLE_LEN as u64;
        Ok(found
            .map(|run| ((run.start - base) / size).max(lba.0)..(run.end - base).div_ceil(size))
            .filter(|run| run.start < run.end))
    }
}
