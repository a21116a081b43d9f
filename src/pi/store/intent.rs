//! The intent map: one bit for each region of data in which a block and its tuple may disagree after a crash.
//!
//! A bit is durable before the first write to its region begins: writers that need bits at the same moment share one
//! write of the map (group commit). It is cleared lazily: every [`CLEAR_EVERY`] flushes, those regions that nobody has
//! touched since the last such time, and only after that flush has made their data and tuples durable. So a LUN with
//! random writes pays one small durable write for each region it enters, not for each write.
//!
//! Writes of the map are serialised, and each takes the bits as they are when it starts; a sector of the map that is torn
//! has old and new bits, and either is right. Called by [`super::Sidecar`].

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    io,
    ops::Range,
};

use crate::{
    storage::{Storage, cache::OffsetMap},
    sync::AsyncMutex,
    sys::{exec::join_all, mem::Buffer},
};

/// Idle regions are looked for once in so many flushes.
pub const CLEAR_EVERY: u64 = 16;

const SECTOR_BITS: u64 = 4096;
const SECTOR: u64 = 512;

/// A set of region numbers, as bits.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn get(&self, i: u64) -> bool {
        self.0.get((i / 64) as usize).is_some_and(|w| w >> (i % 64) & 1 == 1)
    }

    fn set(&mut self, i: u64, on: bool) {
        let word = (i / 64) as usize;
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        self.0[word] = self.0[word] & !(1 << (i % 64)) | u64::from(on) << (i % 64);
    }
}

#[derive(Default)]
struct Region {
    /// Writes under way.
    writers: u32,
    /// The flush epoch in which it was last touched.
    touched: u64,
    /// A write in it ended in doubt: not cleared before the next open has looked at it.
    sticky: bool,
    /// What the last session has left in it is still to be looked at: not cleared before that.
    unchecked: bool,
}

#[derive(Default)]
struct State {
    /// What the map should say.
    wanted: Bits,
    /// Set on stable storage for sure.
    durable: Bits,
    /// Sectors of the map in which `wanted` may differ from the file.
    dirty: BTreeSet<u64>,
    /// Every region whose bit is wanted.
    regions: OffsetMap<Region>,
}

/// The map of one sidecar.
pub(super) struct Intent {
    offset: u64,
    shift: u32,
    state: RefCell<State>,
    writing: AsyncMutex,
    epoch: Cell<u64>,
    last_pass: Cell<u64>,
    commits: Cell<u64>,
}

/// A write under way in some regions; they are not cleared while it lives.
pub struct Writing<'a> {
    map: &'a Intent,
    regions: Range<u64>,
    finished: bool,
}

impl Intent {
    pub fn new(offset: u64, region_shift: u32) -> Intent {
        Intent {
            offset,
            shift: region_shift,
            state: RefCell::default(),
            writing: AsyncMutex::new(),
            epoch: Cell::new(1),
            last_pass: Cell::new(0),
            commits: Cell::new(0),
        }
    }

    /// The regions that hold some bytes of data.
    pub fn regions(&self, at: u64, len: u64) -> Range<u64> {
        at >> self.shift..(at + len).div_ceil(1 << self.shift)
    }

    /// Reads the map of the first `regions` regions: what the last session left marked is marked still.
    pub async fn load(&self, storage: &impl Storage, regions: u64) -> io::Result<()> {
        let sectors = regions.div_ceil(SECTOR_BITS);
        let buffer = Buffer::zeroed((sectors * SECTOR) as usize);
        storage.read(self.offset, &buffer.sg()).await?;
        let mut state = self.state.borrow_mut();
        for (i, byte) in buffer.to_vec().into_iter().enumerate().filter(|(_, b)| *b != 0) {
            for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                let region = i as u64 * 8 + bit;
                state.wanted.set(region, true);
                state.durable.set(region, true);
                state.regions.insert(region, Region::default());
            }
        }
        Ok(())
    }

    /// The marked regions in order.
    pub fn marked(&self) -> Vec<u64> {
        let mut all: Vec<u64> = self.state.borrow().regions.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Every region that is marked now stays so until it is [`Intent::checked`].
    pub fn hold_marked(&self) {
        self.state.borrow_mut().regions.values_mut().for_each(|region| region.unchecked = true);
    }

    /// A region has been looked at: the next flush that begins makes sure of what was found, and it may be cleared after that.
    pub fn checked(&self, region: u64) {
        if let Some(region) = self.state.borrow_mut().regions.get_mut(&region) {
            (region.unchecked, region.touched) = (false, self.epoch.get());
        }
    }

    /// Whether a region is marked.
    pub fn is_marked(&self, region: u64) -> bool {
        self.state.borrow().wanted.get(region)
    }

    /// Durable writes of the map so far.
    pub fn commits(&self) -> u64 {
        self.commits.get()
    }

    /// Makes the regions' bits durable and keeps them until the guard is dropped.
    pub async fn enter(&self, storage: &impl Storage, regions: Range<u64>) -> io::Result<Writing<'_>> {
        {
            let mut state = self.state.borrow_mut();
            for region in regions.clone() {
                let entry = state.regions.entry(region).or_default();
                entry.writers += 1;
                entry.touched = self.epoch.get();
            }
        }
        // Until the caller begins to write, nothing is in doubt.
        let mut writing = Writing { map: self, regions, finished: true };
        self.ensure(storage, writing.regions.clone()).await?;
        writing.finished = false;
        Ok(writing)
    }

    async fn ensure(&self, storage: &impl Storage, regions: Range<u64>) -> io::Result<()> {
        if !self.want(regions.clone()) {
            return Ok(());
        }
        let _turn = self.writing.lock().await;
        // Whoever had the map before us has written our bits along with its own, or has failed to.
        if !self.want(regions) {
            return Ok(());
        }
        self.write(storage, true).await
    }

    /// Wants the bits; tells whether one of them is not durable yet.
    fn want(&self, regions: Range<u64>) -> bool {
        let mut state = self.state.borrow_mut();
        let mut missing = false;
        for region in regions {
            if !state.durable.get(region) {
                missing = true;
                state.wanted.set(region, true);
                state.dirty.insert(region / SECTOR_BITS);
            }
        }
        missing
    }

    /// Writes the sectors that differ; the caller has the turn.
    async fn write(&self, storage: &impl Storage, durable: bool) -> io::Result<()> {
        let (runs, written) = {
            let mut state = self.state.borrow_mut();
            let dirty = std::mem::take(&mut state.dirty);
            let mut runs: Vec<Range<u64>> = Vec::new();
            for sector in &dirty {
                match runs.last_mut() {
                    Some(run) if run.end == *sector => run.end += 1,
                    _ => runs.push(*sector..sector + 1),
                }
            }
            let runs: Vec<(Range<u64>, Vec<u8>)> = runs
                .into_iter()
                .map(|run| {
                    let words =
                        (run.start * SECTOR_BITS / 64) as usize..(run.end * SECTOR_BITS / 64) as usize;
                    let word = |i| state.wanted.0.get(i).copied().unwrap_or(0u64).to_le_bytes();
                    (run, words.flat_map(word).collect())
                })
                .collect();
            (runs, dirty)
        };
        let offset = self.offset;
        let done = join_all(runs.iter().map(|(run, bytes)| async move {
            storage.write(offset + run.start * SECTOR, &Buffer::from_slice(bytes).sg(), durable).await
        }))
        .await;
        let failed = done.into_iter().find_map(Result::err);
        let mut state = self.state.borrow_mut();
        if let Some(e) = failed {
            // Bits that should be set may not be: they are not durable, and the next writer tries again with all of the
            // sector's content. Bits that should be cleared may still be set, which costs a look at the next open.
            state.dirty.extend(written);
            return Err(e);
        }
        if durable {
            self.commits.set(self.commits.get() + 1);
            for (run, bytes) in runs {
                for (i, byte) in bytes.into_iter().enumerate().filter(|(_, b)| *b != 0) {
                    for bit in (0..8).filter(|bit| byte >> bit & 1 == 1) {
                        state.durable.set(run.start * SECTOR_BITS + i as u64 * 8 + bit, true);
                    }
                }
            }
        }
        Ok(())
    }

    /// A flush begins: regions touched from now on are not covered by it.
    pub fn begin_flush(&self) -> u64 {
        let epoch = self.epoch.get();
        self.epoch.set(epoch + 1);
        epoch
    }

    /// The flush that began with `epoch` has made data and tuples durable. Clears what is idle, now and then, or with `all`
    /// whatever nobody is writing to.
    pub async fn end_flush(&self, storage: &impl Storage, epoch: u64, all: bool) -> io::Result<()> {
        let last_pass = self.last_pass.get();
        if !all && epoch < last_pass + CLEAR_EVERY {
            return Ok(());
        }
        let idle_since = if all { epoch } else { last_pass };
        self.last_pass.set(epoch.max(last_pass));
        if self.state.borrow().regions.is_empty() {
            return Ok(());
        }
        let _turn = self.writing.lock().await;
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            state.regions.retain(|number, region| {
                let held = region.writers > 0 || region.sticky || region.unchecked;
                let keep = held || region.touched > idle_since;
                if !keep {
                    state.wanted.set(*number, false);
                    state.durable.set(*number, false);
                    state.dirty.insert(number / SECTOR_BITS);
                }
                keep
            });
            if state.dirty.is_empty() {
                return Ok(());
            }
        }
        self.write(storage, false).await
    }

    /// After a shrink nothing beyond the first `regions` regions is of interest.
    pub fn forget_beyond(&self, regions: u64) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.regions.retain(|number, region| {
            let keep = *number < regions || region.writers > 0;
            if !keep {
                state.wanted.set(*number, false);
                state.durable.set(*number, false);
                state.dirty.insert(number / SECTOR_BITS);
            }
            keep
        });
    }
}

impl Writing<'_> {
    /// The write has ended, and every block of it matches its tuple.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut state = self.map.state.borrow_mut();
        for number in self.regions.clone() {
            if let Some(region) = state.regions.get_mut(&number) {
                region.writers -= 1;
                region.touched = self.map.epoch.get();
                region.sticky |= !self.finished;
            }
        }
    }
}
