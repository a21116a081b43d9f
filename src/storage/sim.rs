//! A simulated disk: a [`Storage`] in memory that keeps what was not synced apart, and loses part of it when the power
//! is cut. For the tests of everything that promises something about crashes.
//!
//! Each sector of 512 bytes keeps its durable content and every newer version. A cut leaves each sector at its durable
//! content or at any of the newer ones, chosen sector by sector: so writes are dropped, kept, torn and reordered as a
//! page cache and a disk's cache may. The length has versions too. Operations take a random number of turns of the
//! executor, and take effect on one of them, so that a test that stops between two turns (and drops the tasks) finds
//! some of them done, some not: that is `kill -9`; [`SimDisk::cut`] is power loss. Faults are injected by the number of
//! the operation ([`SimDisk::fail_at`]).

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
    rc::Rc,
};

use super::Storage;
use crate::sys::{exec::yield_now, io::Fallocate, mem::Sg};

const SECTOR: u64 = 512;
type Bytes = [u8; SECTOR as usize];

/// A small generator (SplitMix64): a seed names a run.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// The sequence of that seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // An iterator without end is no help here.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        out.truncate(len);
        out
    }
}

/// The loops of a simulation: `n` by default, a tenth with `TCMU_DIF_SCALE=quick`, five times as many with `full`.
pub fn scaled(n: u64) -> u64 {
    match std::env::var("TCMU_DIF_SCALE").as_deref() {
        Ok("quick") => n.div_ceil(10),
        Ok("full") => n * 5,
        _ => n,
    }
}

/// The kinds of operation that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A sync.
    Sync,
    /// A fallocate or change of length.
    Space,
}

#[derive(Clone, Default)]
struct Sector {
    /// `None` is zeros.
    durable: Option<Rc<Bytes>>,
    /// Newer contents, oldest first, each with its number.
    newer: Vec<(u64, Option<Rc<Bytes>>)>,
}

impl Sector {
    fn now(&self) -> Option<&Bytes> {
        match self.newer.last() {
            Some((_, bytes)) => bytes.as_deref(),
            None => self.durable.as_deref(),
        }
    }

    fn settle(&mut self, upto: u64) {
        // What a failed sync forgot is never settled, but what was written over it is.
        let n = self.newer.iter().rposition(|(seq, _)| *seq <= upto).map_or(0, |last| last + 1);
        if let Some((_, bytes)) = self.newer.drain(..n).next_back() {
            self.durable = bytes;
        }
    }
}

/// What lies beyond a file's end is zeros when the file grows again.
fn until(mut bytes: Rc<Bytes>, len: u64) -> Rc<Bytes> {
    if len < SECTOR {
        Rc::make_mut(&mut bytes)[len as usize..].fill(0);
    }
    bytes
}

struct State {
    sectors: BTreeMap<u64, Sector>,
    dirty: BTreeSet<u64>,
    durable_len: u64,
    newer_len: Vec<(u64, u64)>,
    seq: u64,
    ops: u64,
    log: Vec<OpKind>,
    fail_at: Option<u64>,
    fail_from: Option<(OpKind, i32)>,
    max_delay: u64,
    held: Option<Rc<Cell<bool>>>,
    rng: Rng,
    watcher: Option<Watcher>,
}

/// Hears of every step that changes what a cut may leave.
type Watcher = Rc<dyn Fn()>;

/// A simulated disk; clones are the same disk.
#[derive(Clone)]
pub struct SimDisk(Rc<RefCell<State>>);

impl SimDisk {
    /// An empty disk, whose operations take up to three turns, chosen by `seed`.
    pub fn new(seed: u64) -> SimDisk {
        SimDisk(Rc::new(RefCell::new(State {
            sectors: BTreeMap::new(),
            dirty: BTreeSet::new(),
            durable_len: 0,
            newer_len: Vec::new(),
            seq: 0,
            ops: 0,
            log: Vec::new(),
            fail_at: None,
            fail_from: None,
            max_delay: 3,
            held: None,
            rng: Rng::new(seed),
            watcher: None,
        })))
    }

    /// What a power cut leaves: each sector, and the length, durable or any newer version.
    pub fn cut(&self, rng: &mut Rng) -> SimDisk {
        let state = self.0.borrow();
        let new = SimDisk::new(rng.next());
        {
            let mut out = new.0.borrow_mut();
            let pick = rng.below(state.newer_len.len() as u64 + 1) as usize;
            out.durable_len = if pick == 0 { state.durable_len } else { state.newer_len[pick - 1].1 };
            // Some cuts lose all, some nothing: the extremes are the likely ones on real hardware.
            let mood = rng.below(4);
            for (at, sector) in &state.sectors {
                let n = sector.newer.len() as u64;
                let pick = match mood {
                    0 => 0,
                    1 => n,
                    _ => rng.below(n + 1),
                };
                let bytes = match pick {
                    0 => sector.durable.clone(),
                    k => sector.newer[k as usize - 1].1.clone(),
                };
                let kept = out.durable_len.saturating_sub(at * SECTOR);
                if let Some(bytes) = bytes.filter(|_| kept > 0) {
                    let durable = Some(until(bytes, kept));
                    out.sectors.insert(*at, Sector { durable, newer: Vec::new() });
                }
            }
        }
        new
    }

    /// Operations so far.
    pub fn ops(&self) -> u64 {
        self.0.borrow().ops
    }

    /// The kinds of the operations so far, in order.
    pub fn log(&self) -> Vec<OpKind> {
        self.0.borrow().log.clone()
    }

    /// The operation with that number (from 0) fails with EIO: a write leaves any part of itself, a sync drops what it
    /// should have kept (as Linux does: the pages stay readable, and are never written).
    pub fn fail_at(&self, op: u64) {
        self.0.borrow_mut().fail_at = Some(op);
    }

    /// From now on every operation of that kind fails with that errno; `None` ends it.
    pub fn fail_all(&self, what: Option<(OpKind, i32)>) {
        self.0.borrow_mut().fail_from = what;
    }

    /// Operations take at most so many turns.
    pub fn set_max_delay(&self, turns: u64) {
        self.0.borrow_mut().max_delay = turns;
    }

    /// The next write waits until what is given is true.
    pub fn hold_next_write(&self) -> Rc<Cell<bool>> {
        let go = Rc::new(Cell::new(false));
        self.0.borrow_mut().held = Some(go.clone());
        go
    }

    /// Calls `watcher` after every step that changes what a cut may leave: each write, sync, change of space or of length, as
    /// it takes effect.
    pub fn watch(&self, watcher: Option<Rc<dyn Fn()>>) {
        self.0.borrow_mut().watcher = watcher;
    }

    fn stepped(&self) {
        let watcher = self.0.borrow().watcher.clone();
        if let Some(watcher) = watcher {
            watcher();
        }
    }

    /// The bytes as a read would give them, at once.
    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let state = self.0.borrow();
        let mut out = vec![0; len];
        let end = (at + len as u64).min(state.len_now());
        if at >= end {
            return out;
        }
        for (sector, content) in state.sectors.range(at / SECTOR..end.div_ceil(SECTOR)) {
            let Some(bytes) = content.now() else { continue };
            let start = sector * SECTOR;
            let (from, to) = (start.max(at), (start + SECTOR).min(end));
            out[(from - at) as usize..(to - at) as usize]
                .copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]);
        }
        out
    }

    /// Changes bytes behind everybody's back, durably.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let mut state = self.0.borrow_mut();
        state.put(at, bytes);
        state.settle_range(at, bytes.len() as u64, u64::MAX);
        let len = state.len_now();
        state.durable_len = len;
    }

    /// The length, at once.
    pub fn len_now(&self) -> u64 {
        self.0.borrow().len_now()
    }

    /// Bytes that are not zeros by never having been written.
    pub fn allocated(&self) -> u64 {
        self.0.borrow().sectors.values().filter(|s| s.now().is_some()).count() as u64 * SECTOR
    }

    async fn begin(&self, kind: OpKind) -> Option<io::Error> {
        let (held, fail) = {
            let mut s = self.0.borrow_mut();
            let op = s.ops;
            s.ops += 1;
            s.log.push(kind);
            let fail = match s.fail_from {
                Some((k, errno)) if k == kind => Some(io::Error::from_raw_os_error(errno)),
                _ if s.fail_at == Some(op) => Some(io::Error::from_raw_os_error(libc::EIO)),
                _ => None,
            };
            (if kind == OpKind::Write { s.held.take() } else { None }, fail)
        };
        while held.as_ref().is_some_and(|go| !go.get()) {
            yield_now().await;
        }
        self.some_turns().await;
        fail
    }

    async fn some_turns(&self) {
        let turns = {
            let mut s = self.0.borrow_mut();
            let max = s.max_delay;
            s.rng.below(max + 1)
        };
        for _ in 0..turns {
            yield_now().await;
        }
    }
}

impl State {
    fn len_now(&self) -> u64 {
        self.newer_len.last().map_or(self.durable_len, |(_, len)| *len)
    }

    fn grow(&mut self, len: u64) {
        if len > self.len_now() {
            self.seq += 1;
            self.newer_len.push((self.seq, len));
        }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.seq += 1;
        let mut done = 0;
        while done < bytes.len() {
            let pos = at + done as u64;
            let (sector, skip) = (pos / SECTOR, (pos % SECTOR) as usize);
            let n = (bytes.len() - done).min(SECTOR as usize - skip);
            let entry = self.sectors.entry(sector).or_default();
            let mut new = entry.now().copied().unwrap_or([0; SECTOR as usize]);
            new[skip..skip + n].copy_from_slice(&bytes[done..done + n]);
            entry.newer.push((self.seq, Some(Rc::new(new))));
            self.dirty.insert(sector);
            done += n;
        }
        self.grow(at + bytes.len() as u64);
    }

    fn clear(&mut self, at: u64, len: u64) {
        let end = at + len;
        let (first, last) = (at.div_ceil(SECTOR), end / SECTOR);
        if first > last {
            return self.put_zeros(at, end - at);
        }
        self.put_zeros(at, first * SECTOR - at);
        self.put_zeros(last * SECTOR, end - last * SECTOR);
        self.seq += 1;
        let seq = self.seq;
        for (at, sector) in self.sectors.range_mut(first..last) {
            if sector.now().is_some() {
                sector.newer.push((seq, None));
                self.dirty.insert(*at);
            }
        }
    }

    fn put_zeros(&mut self, at: u64, len: u64) {
        let len = len.min(self.len_now().saturating_sub(at));
        if len > 0 {
            self.put(at, &vec![0; len as usize]);
        }
    }

    fn settle_range(&mut self, at: u64, len: u64, upto: u64) {
        for sector in at / SECTOR..(at + len).div_ceil(SECTOR) {
            if let Some(s) = self.sectors.get_mut(&sector) {
                s.settle(upto);
                if s.newer.is_empty() {
                    self.dirty.remove(&sector);
                }
            }
        }
    }

    fn settle_len(&mut self, upto: u64) {
        let n = self.newer_len.iter().take_while(|(seq, _)| *seq <= upto).count();
        if let Some((_, len)) = self.newer_len.drain(..n).next_back() {
            self.durable_len = len;
        }
    }

    fn settle_all(&mut self, upto: u64) {
        for sector in std::mem::take(&mut self.dirty) {
            if let Some(s) = self.sectors.get_mut(&sector) {
                s.settle(upto);
                if !s.newer.is_empty() {
                    self.dirty.insert(sector);
                }
            }
        }
        self.settle_len(upto);
    }

    /// A failed sync: what was dirty counts as written and reads as before, and a cut may keep or lose it, however many
    /// syncs succeed afterwards, until the sector is written again.
    fn forget_dirty(&mut self) {
        for sector in std::mem::take(&mut self.dirty) {
            if let Some(s) = self.sectors.get_mut(&sector)
                && let Some((_, now)) = s.newer.pop()
            {
                s.newer = vec![(u64::MAX, now)];
            }
        }
    }
}

impl Storage for SimDisk {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        let fail = self.begin(OpKind::Read).await;
        if let Some(e) = fail {
            return Err(e);
        }
        to.copy_in(0, &self.peek(at, to.len()));
        self.some_turns().await;
        Ok(())
    }

    async fn write(&self, at: u64, from: &Sg, dsync: bool) -> io::Result<()> {
        let fail = self.begin(OpKind::Write).await;
        let bytes = from.to_vec();
        let seq = {
            let mut s = self.0.borrow_mut();
            if fail.is_some() {
                let kept = s.rng.below(bytes.len() as u64 / SECTOR + 1) * SECTOR;
                if kept > 0 && s.fail_from.is_none() {
                    s.put(at, &bytes[..kept as usize]);
                }
            } else {
                s.put(at, &bytes);
            }
            s.seq
        };
        self.stepped();
        self.some_turns().await;
        if let Some(e) = fail {
            return Err(e);
        }
        if dsync {
            {
                let mut s = self.0.borrow_mut();
                s.settle_range(at, bytes.len() as u64, seq);
                s.settle_len(seq);
            }
            self.stepped();
        }
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        let seq = self.0.borrow().seq;
        let fail = self.begin(OpKind::Sync).await;
        if let Some(e) = fail {
            self.0.borrow_mut().forget_dirty();
            return Err(e);
        }
        self.0.borrow_mut().settle_all(seq);
        self.stepped();
        self.some_turns().await;
        Ok(())
    }

    async fn fallocate(&self, what: Fallocate, at: u64, len: u64) -> io::Result<()> {
        let fail = self.begin(OpKind::Space).await;
        if let Some(e) = fail {
            return Err(e);
        }
        {
            let mut s = self.0.borrow_mut();
            match what {
                Fallocate::Allocate => s.grow(at + len),
                Fallocate::PunchHole | Fallocate::ZeroRange => s.clear(at, len),
            }
        }
        self.stepped();
        self.some_turns().await;
        Ok(())
    }

    async fn len(&self) -> io::Result<u64> {
        Ok(self.len_now())
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        let fail = self.begin(OpKind::Space).await;
        if let Some(e) = fail {
            return Err(e);
        }
        {
            let mut s = self.0.borrow_mut();
            let now = s.len_now();
            if len < now {
                s.clear(len, now - len);
            }
            s.seq += 1;
            let seq = s.seq;
            s.newer_len.push((seq, len));
        }
        self.stepped();
        self.some_turns().await;
        Ok(())
    }

    async fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let s = self.0.borrow();
        let len = s.len_now();
        let mut found: Option<Range<u64>> = None;
        for (sector, content) in s.sectors.range(at / SECTOR..) {
            let start = sector * SECTOR;
            if content.now().is_none() || start >= len {
                continue;
            }
            let end = (start + SECTOR).min(len);
            match &mut found {
                None => found = Some(start.max(at)..end),
                Some(run) if run.end == start => run.end = end,
                Some(_) => break,
            }
        }
        Ok(found.filter(|run| run.start < run.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{self, mem::Buffer};

    #[test]
    fn a_cut_keeps_what_was_synced_and_tears_what_was_not() {
        sys::run(|_| async {
            let (mut old, mut new) = (0, 0);
            for seed in 0..50 {
                let disk = SimDisk::new(seed);
                disk.write(0, &Buffer::from_slice(&[1; 4096]).sg(), false).await.unwrap();
                disk.sync().await.unwrap();
                disk.write(1024, &Buffer::from_slice(&[2; 4096]).sg(), false).await.unwrap();
                assert_eq!(disk.peek(1020, 8), [1, 1, 1, 1, 2, 2, 2, 2]);
                let cut = disk.cut(&mut Rng::new(seed)).peek(0, 8192);
                assert_eq!(cut[..1024], [1; 1024]);
                for (i, s) in cut.chunks(512).enumerate() {
                    assert!(s.iter().all(|b| *b == s[0]), "torn inside sector {i}");
                }
                old += cut[1024..4096].iter().filter(|b| **b == 1).count();
                new += cut[1024..4096].iter().filter(|b| **b == 2).count();
            }
            assert!(old > 0 && new > 0);
        });
    }

    #[test]
    fn dsync_settles_its_own_range_alone() {
        sys::run(|_| async {
            let mut lost = false;
            for seed in 0..50 {
                let disk = SimDisk::new(seed);
                disk.set_len(8192).await.unwrap();
                disk.sync().await.unwrap();
                disk.write(4096, &Buffer::from_slice(&[1; 512]).sg(), false).await.unwrap();
                disk.write(0, &Buffer::from_slice(&[2; 512]).sg(), true).await.unwrap();
                let cut = disk.cut(&mut Rng::new(seed));
                assert_eq!(cut.peek(0, 512), [2; 512]);
                lost |= cut.peek(4096, 512) == [0; 512];
            }
            assert!(lost);
        });
    }

    #[test]
    fn a_failed_sync_is_not_mended_by_a_later_one() {
        sys::run(|_| async {
            let mut lost = false;
            for seed in 0..20 {
                let disk = SimDisk::new(seed);
                disk.set_len(512).await.unwrap();
                disk.sync().await.unwrap();
                disk.write(0, &Buffer::from_slice(&[1; 512]).sg(), false).await.unwrap();
                disk.fail_at(disk.ops());
                disk.sync().await.unwrap_err();
                disk.sync().await.unwrap();
                assert_eq!(disk.peek(0, 1), [1]);
                lost |= disk.cut(&mut Rng::new(seed)).peek(0, 1) == [0];
                disk.write(0, &Buffer::from_slice(&[2; 512]).sg(), false).await.unwrap();
                disk.sync().await.unwrap();
                assert_eq!(disk.cut(&mut Rng::new(seed)).peek(0, 1), [2]);
            }
            assert!(lost);
        });
    }

    #[test]
    fn a_punched_range_reads_as_zeros_and_is_a_hole() {
        sys::run(|_| async {
            let disk = SimDisk::new(1);
            disk.write(0, &Buffer::from_slice(&[1; 4096]).sg(), false).await.unwrap();
            disk.fallocate(Fallocate::PunchHole, 700, 2000).await.unwrap();
            let bytes = disk.peek(0, 4096);
            assert!(bytes.iter().enumerate().all(|(i, b)| *b == u8::from(!(700..2700).contains(&i))));
            assert_eq!(disk.next_data(1024).await.unwrap(), Some(2560..4096));
        });
    }
}
