//! A disk in memory that forgets: what was not synced is there after a cut, or not, sector by sector; what was never written
//! holds a pattern. Operations take a random number of turns, and a chosen one can fail.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::Storage,
    sys::{
        exec::{Executor, yield_now},
        mem::Sg,
    },
};

use crate::support::Rng;

pub const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
/// What is copied in one step: the sides of a mix meet at such a boundary.
const WORD: u64 = 16;
/// What a sector holds that nobody ever wrote.
const NEVER: u8 = 0xdb;
type Sector = [u8; SECTOR as usize];

/// How a cut leaves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The process dies: everything that reached the kernel is there.
    Process,
    /// Power fails, and nothing that was not synced is there.
    Oldest,
    /// Power fails; of every sector any version since the last sync is there.
    Any,
    /// Power fails, and just what was written first is there.
    Prefix,
}

#[derive(Default)]
struct State {
    /// Of each sector, versions with their sequence numbers; the first is durable, the last is seen.
    sectors: HashMap<u64, Vec<(u64, Sector)>>,
    /// The same for the length.
    len: Vec<(u64, u64)>,
}

pub struct SimDisk {
    state: RefCell<State>,
    sequence: Cell<u64>,
    rng: RefCell<Rng>,
    /// Most turns that an operation takes; 0 for none.
    slow: u64,
    /// The changing operation that fails, counted down.
    pub fail_in: Cell<Option<u64>>,
    pub failed: Cell<bool>,
    /// Bytes of an aligned piece that a cut leaves old or new as a whole.
    pub whole: Cell<u64>,
    /// A page that is written while it has something that was not synced may be on its way to the disk, which then gets some of the old
    /// and some of the new bytes, of one sector too.
    pub racing: Cell<bool>,
    /// Bytes that the file may have; beyond them there is no space.
    pub room: Cell<u64>,
    /// Operations so far.
    pub steps: Cell<u64>,
}

/// Files larger than this are refused, as a file system would.
const LARGEST: u64 = 1 << 44;

impl SimDisk {
    pub fn new(bytes: &[u8], seed: u64, slow: u64) -> Rc<SimDisk> {
        let disk = SimDisk {
            state: RefCell::default(),
            sequence: Cell::new(0),
            rng: RefCell::new(Rng::new(seed)),
            slow,
            fail_in: Cell::new(None),
            failed: Cell::new(false),
            whole: Cell::new(SECTOR),
            racing: Cell::new(false),
            room: Cell::new(u64::MAX),
            steps: Cell::new(0),
        };
        let mut state = disk.state.borrow_mut();
        state.len.push((0, bytes.len() as u64));
        for (i, chunk) in bytes.chunks(SECTOR as usize).enumerate() {
            let mut sector = [0; SECTOR as usize];
            sector[..chunk.len()].copy_from_slice(chunk);
            state.sectors.insert(i as u64, vec![(0, sector)]);
        }
        drop(state);
        Rc::new(disk)
    }

    async fn take_turns(&self) {
        self.steps.set(self.steps.get() + 1);
        if self.slow > 0 {
            // Now and then one is overtaken by many others.
            let most = if self.rng.borrow_mut().one_in(12) { self.slow * 40 } else { self.slow };
            let turns = self.rng.borrow_mut().below(most);
            for _ in 0..turns {
                yield_now().await;
            }
        }
    }

    fn may_fail(&self) -> io::Result<()> {
        match self.fail_in.get() {
            Some(0) => {
                self.fail_in.set(None);
                self.failed.set(true);
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
            n => {
                self.fail_in.set(n.map(|n| n - 1));
                Ok(())
            }
        }
    }

    /// Changes so far: what it was before tells whether something has been written since.
    pub fn changes(&self) -> u64 {
        self.sequence.get()
    }

    fn next(&self) -> u64 {
        self.sequence.set(self.sequence.get() + 1);
        self.sequence.get()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let seq = self.next();
        let mut state = self.state.borrow_mut();
        let unsynced: Vec<u64> = match self.racing.get() {
            true => (at / PAGE..(at + bytes.len() as u64).div_ceil(PAGE))
                .filter(|page| {
                    (page * PAGE / SECTOR..(page + 1) * PAGE / SECTOR)
                        .any(|sector| state.sectors.get(&sector).is_some_and(|v| v.len() > 1))
                })
                .collect(),
            false => Vec::new(),
        };
        let mut done = 0;
        while done < bytes.len() {
            let pos = at + done as u64;
            let within = (pos % SECTOR) as usize;
            let n = (SECTOR as usize - within).min(bytes.len() - done);
            let versions = state.sectors.entry(pos / SECTOR).or_default();
            let mut sector = versions.last().map_or([0; SECTOR as usize], |(_, s)| *s);
            if versions.is_empty() {
                // A hole. Whether it was durably one is for the cut to say.
                versions.push((0, sector));
            }
            let before = sector;
            sector[within..within + n].copy_from_slice(&bytes[done..done + n]);
            if unsynced.contains(&(pos / PAGE)) {
                let mut mix = sector;
                // Somewhere in what is new.
                let cut = (within / WORD as usize + self.rng.borrow_mut().below(n as u64 / WORD) as usize)
                    * WORD as usize;
                mix[cut..].copy_from_slice(&before[cut..]);
                versions.push((seq, mix));
            }
            versions.push((seq, sector));
            done += n;
        }
        let end = at + bytes.len() as u64;
        if state.len.last().is_some_and(|(_, len)| *len < end) {
            state.len.push((seq, end));
        }
    }

    fn get(&self, at: u64, to: &Sg) {
        let state = self.state.borrow();
        let len = state.len.last().map_or(0, |l| l.1);
        let mut done = 0;
        while done < to.len() {
            let pos = at + done as u64;
            let within = (pos % SECTOR) as usize;
            let n = (SECTOR as usize - within).min(to.len() - done);
            match state.sectors.get(&(pos / SECTOR)).and_then(|v| v.last()) {
                Some((_, sector)) if pos < len => to.copy_in(done, &sector[within..within + n]),
                _ => to.fill(done, n, 0),
            }
            done += n;
        }
    }

    /// The bytes that a cut leaves.
    pub fn cut(&self, how: Cut, rng: &mut Rng) -> Vec<u8> {
        let state = self.state.borrow();
        let first = state.sectors.values().filter_map(|v| v.get(1)).map(|(seq, _)| *seq).min().unwrap_or(0);
        let prefix = first + rng.below(self.sequence.get().saturating_sub(first) + 1);
        let mut pick = |versions: &[u64]| match how {
            Cut::Process => versions.len() - 1,
            Cut::Oldest => 0,
            Cut::Any => rng.below(versions.len() as u64) as usize,
            Cut::Prefix => versions.iter().rposition(|seq| *seq <= prefix).unwrap_or(0),
        };
        let lens: Vec<u64> = state.len.iter().map(|(seq, _)| *seq).collect();
        let durable = state.len[0].1;
        let len = state.len[pick(&lens)].1;
        let mut out = vec![0; len as usize];
        // What the file grew by is zeros once that is durable; before, it may show what the disk held.
        if len > durable && how != Cut::Process {
            out[durable as usize..].fill(NEVER);
        }
        let mut numbers: Vec<&u64> = state.sectors.keys().collect();
        numbers.sort_unstable();
        // In a piece that stays whole all sectors are of one time.
        let mut piece = (u64::MAX, 0);
        for number in numbers {
            let versions = &state.sectors[number];
            let seqs: Vec<u64> = versions.iter().map(|(seq, _)| *seq).collect();
            let picked = if self.whole.get() == SECTOR {
                pick(&seqs)
            } else {
                let this = number * SECTOR / self.whole.get();
                if piece.0 != this {
                    let first = this * self.whole.get() / SECTOR;
                    let sectors =
                        (first..first + self.whole.get() / SECTOR).filter_map(|n| state.sectors.get(&n));
                    let mut all: Vec<u64> = sectors.flatten().map(|(seq, _)| *seq).collect();
                    all.sort_unstable();
                    all.dedup();
                    piece = (this, all[pick(&all)]);
                }
                seqs.iter().rposition(|seq| *seq <= piece.1).unwrap_or(0)
            };
            let at = number * SECTOR;
            if at >= len {
                continue;
            }
            if picked == 0 && at >= durable {
                continue;
            }
            let n = SECTOR.min(len - at) as usize;
            out[at as usize..][..n].copy_from_slice(&versions[picked].1[..n]);
        }
        out
    }
}

impl Storage for SimDisk {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.take_turns().await;
        self.get(at, to);
        Ok(())
    }

    async fn write(&self, at: u64, from: &Sg) -> io::Result<()> {
        self.take_turns().await;
        self.may_fail()?;
        self.put(at, &from.to_vec());
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        // Only what was written before the call: a driver that counts on more has to lose.
        let covered = self.sequence.get();
        self.take_turns().await;
        self.may_fail()?;
        let mut state = self.state.borrow_mut();
        let keep = state.len.iter().rposition(|(seq, _)| *seq <= covered).unwrap_or(0);
        state.len.drain(..keep);
        for versions in state.sectors.values_mut() {
            let keep = versions.iter().rposition(|(seq, _)| *seq <= covered).unwrap_or(0);
            versions.drain(..keep);
        }
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.take_turns().await;
        self.may_fail()?;
        let end = self.size()?.min(at + len);
        if end > at {
            self.put(at, &vec![0; (end - at) as usize]);
        }
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.punch(at, len).await
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state.borrow().len.last().map_or(0, |l| l.1))
    }

    async fn set_size(&self, len: u64) -> io::Result<()> {
        self.take_turns().await;
        self.may_fail()?;
        if len > LARGEST {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        if len > self.room.get() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let seq = self.next();
        let mut state = self.state.borrow_mut();
        if state.len.last().is_some_and(|(_, l)| *l > len) {
            // Shorter: what is cut off comes back as zeros.
            state.sectors.retain(|number, _| number * SECTOR < len);
            state.len = vec![(seq, len)];
        } else {
            state.len.push((seq, len));
        }
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        false
    }

    fn atomic_write(&self) -> u32 {
        self.whole.get() as u32
    }
}

/// Runs a future that does no I/O but the simulated disk's; panics if it never ends.
pub fn run<T: 'static>(work: impl Future<Output = T> + 'static) -> T {
    let exec = Executor::new();
    let out = Rc::new(RefCell::new(None));
    let slot = out.clone();
    exec.spawn(async move {
        let value = work.await;
        *slot.borrow_mut() = Some(value);
    });
    while exec.run_ready() {}
    out.take().expect("the work waits for something that never comes")
}
