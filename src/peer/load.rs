//! Load for a ring: one command over and over, as many under way as asked for, at next to no cost to the side that sends it. What is measured
//! with it is the handler.
//!
//! Entries are made once and copied into the ring; the data area has a fixed piece for each command under way, and nobody looks at what is in it.
//! The ring is as long as a whole number of entries, so there is no padding. Called by the benches and by the tests that count what a command costs.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, memfd_create},
};
use tcmu_sys as abi;

use super::kernel::KernelError;
use crate::{ring::Device, sys::mem::Mapping};

const CMDR_OFF: u64 = 128;
const HEAD: u64 = std::mem::offset_of!(abi::Mailbox, cmd_head) as u64;
const TAIL: u64 = std::mem::offset_of!(abi::Mailbox, cmd_tail) as u64;

/// How long the answers are looked for before the thread sleeps on the doorbell.
const SPIN: Duration = Duration::from_micros(100);

/// A handler that has not answered for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A ring with a load.
pub struct Load {
    map: Rc<Mapping>,
    memory: File,
    to_handler: OwnedFd,
    from_handler: OwnedFd,
    /// The entry of each command, by its id; what it says of its own place is put in when it is sent.
    entries: Vec<Vec<u8>>,
    len: u32,
    size: u32,
    head: u32,
    cleaned: u32,
    idle: Vec<u16>,
    sent: Vec<Instant>,
    /// Where commands go, if not always to the same place: the number of places, the blocks of one, and what chooses.
    wander: Option<(u64, u64, u64)>,
}

/// What came of a run.
#[derive(Debug, Clone, Default)]
pub struct Run {
    /// Commands that ended.
    pub commands: u64,
    /// Those of them that did not end GOOD.
    pub failed: u64,
    /// How long it took.
    pub time: Duration,
    /// What each took, from before its doorbell until its answer was seen; only of every [`Load::run`] that asks for them.
    pub latencies: Vec<Duration>,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Step {
    /// Commands that ended.
    pub commands: u64,
    /// Those of them that did not end GOOD.
    pub failed: u64,
    /// Commands that have not.
    pub under_way: usize,
}

impl Load {
    /// `depth` (1 to 4096) commands of which each has `bytes` of data and a CDB from `cdb`, which is told the command's number.
    ///
    /// # Errors
    /// If memory or descriptors are not to be had.
    pub fn new(depth: u16, bytes: usize, cdb: impl Fn(u16) -> [u8; 16]) -> io::Result<Load> {
        let fixed = size_of::<abi::CmdRequest>() + size_of::<abi::IoVec>();
        let base = fixed.max(size_of::<abi::CmdResponse>());
        let len = base + 16;
        // One more than fit: a full ring would look empty.
        let size = (usize::from(depth) + 1).next_power_of_two() * len;
        let data_off = CMDR_OFF as usize + size;
        let memory = File::from(memfd_create("tcmu-load", MemfdFlags::CLOEXEC)?);
        let all = data_off + usize::from(depth) * bytes;
        memory.set_len(all as u64)?;
        let map = Mapping::new(&memory, all)?;
        let mut mailbox = [0u8; 12];
        mailbox[..2].copy_from_slice(&(abi::TCMU_MAILBOX_VERSION as u16).to_le_bytes());
        let flags = abi::TCMU_MAILBOX_FLAG_CAP_OOOC | abi::TCMU_MAILBOX_FLAG_CAP_READ_LEN;
        mailbox[2..4].copy_from_slice(&(flags as u16).to_le_bytes());
        mailbox[4..8].copy_from_slice(&(CMDR_OFF as u32).to_le_bytes());
        mailbox[8..12].copy_from_slice(&(size as u32).to_le_bytes());
        let inside = map.write(0, &mailbox);
        debug_assert!(inside, "the mailbox lies at the start of its memory");
        let entry = |id: u16| {
            let mut entry = vec![0u8; len];
            entry[..4].copy_from_slice(&(len as u32 | abi::TCMU_OP_CMD).to_le_bytes());
            entry[4..6].copy_from_slice(&id.to_le_bytes());
            entry[8..12].copy_from_slice(&u32::from(bytes > 0).to_le_bytes());
            let at = size_of::<abi::CmdRequest>();
            let place = data_off + usize::from(id) * bytes;
            entry[at..at + 8].copy_from_slice(&(place as u64).to_le_bytes());
            entry[at + 8..at + 16].copy_from_slice(&(bytes as u64).to_le_bytes());
            entry[base..].copy_from_slice(&cdb(id));
            entry
        };
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Load {
            map,
            memory,
            to_handler: event()?,
            from_handler: event()?,
            entries: (0..depth).map(entry).collect(),
            len: len as u32,
            size: size as u32,
            head: 0,
            cleaned: 0,
            idle: (0..depth).collect(),
            sent: vec![Instant::now(); usize::from(depth)],
            wander: None,
        })
    }

    /// From now on each READ(16) or WRITE(16) goes to a random one of so many places, which are `blocks` long and lie side by side from LBA 0 on.
    pub fn wander(&mut self, places: u64, blocks: u64) {
        self.wander = (places > 0).then_some((places, blocks, 0x9e37_79b9_7f4a_7c15));
    }

    /// The next place, as a CDB has it.
    fn next_lba(&mut self) -> Option<[u8; 8]> {
        let (places, blocks, state) = self.wander.as_mut()?;
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        Some(((*state >> 11) % *places * *blocks).to_be_bytes())
    }

    /// The device, for the handler.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn device(&self) -> io::Result<Device> {
        let (to, from) = (self.to_handler.try_clone()?, self.from_handler.try_clone()?);
        Ok(Device::embedded(self.memory.try_clone()?, self.map.len(), to, from))
    }

    /// Keeps every command under way until so many have been sent or the time is over, and waits for the last; with `gap`, each is sent no
    /// sooner than that after the last one.
    ///
    /// # Errors
    /// If a doorbell fails, or nothing is answered for half a minute.
    pub fn run(
        &mut self,
        most: u64,
        time: Duration,
        gap: Option<Duration>,
        latencies: bool,
    ) -> Result<Run, KernelError> {
        let start = Instant::now();
        let (mut run, mut sent, mut last) = (Run::default(), 0, start);
        let depth = self.entries.len();
        loop {
            let over = sent >= most || start.elapsed() >= time;
            if over && self.idle.len() == depth {
                run.time = start.elapsed();
                return Ok(run);
            }
            if let Some(gap) = gap {
                let due = last + gap;
                if let Some(left) = due.checked_duration_since(Instant::now()) {
                    std::thread::sleep(left);
                }
                last = Instant::now();
            }
            if !over {
                sent += self.send(latencies)?;
            }
            for (id, good, at) in self.answers(latencies)? {
                run.commands += 1;
                run.failed += u64::from(!good);
                if let Some(at) = at {
                    run.latencies.push(at - self.sent[usize::from(id)]);
                }
                self.idle.push(id);
            }
        }
    }

    /// For who drives many rings from one thread: sends what is idle if there is to be `more`, takes the answers that are there, and waits for
    /// nothing.
    ///
    /// # Errors
    /// If a doorbell fails.
    pub fn step(&mut self, more: bool) -> Result<Step, KernelError> {
        if more {
            self.send(false)?;
        }
        let tail = self.map.load_acquire(TAIL);
        let mut step = Step::default();
        for (id, good, _) in self.collect(tail, None) {
            step.commands += 1;
            step.failed += u64::from(!good);
            self.idle.push(id);
        }
        step.under_way = self.entries.len() - self.idle.len();
        Ok(step)
    }

    /// Sends what is idle, with one doorbell. Tells how many.
    fn send(&mut self, stamp: bool) -> Result<u64, KernelError> {
        let count = self.idle.len() as u64;
        let now = if stamp { Some(Instant::now()) } else { None };
        for id in std::mem::take(&mut self.idle) {
            let at = CMDR_OFF + u64::from(self.head);
            let lba = self.next_lba();
            let entry = &mut self.entries[usize::from(id)];
            if let Some(lba) = lba {
                let cdb = entry.len() - 16;
                entry[cdb + 2..cdb + 10].copy_from_slice(&lba);
            }
            let field = std::mem::offset_of!(abi::CmdRequest, cdb_off);
            let cdb_off = at + u64::from(self.len) - 16;
            entry[field..field + 8].copy_from_slice(&cdb_off.to_le_bytes());
            let inside = self.map.write(at, entry);
            debug_assert!(inside, "entries lie inside the ring");
            self.head = (self.head + self.len) % self.size;
            if let Some(now) = now {
                self.sent[usize::from(id)] = now;
            }
        }
        if count > 0 {
            self.map.store_release(HEAD, self.head);
            rustix::io::write(&self.to_handler, &1u64.to_ne_bytes()).map_err(io::Error::from)?;
        }
        Ok(count)
    }

    /// Waits for answers: who was answered, whether GOOD, and when that was seen.
    fn answers(&mut self, stamp: bool) -> Result<Vec<(u16, bool, Option<Instant>)>, KernelError> {
        let start = Instant::now();
        let tail = loop {
            let tail = self.map.load_acquire(TAIL);
            if tail != self.cleaned {
                break tail;
            }
            std::hint::spin_loop();
            let waited = start.elapsed();
            if waited > PATIENCE {
                return Err(KernelError::Timeout(PATIENCE));
            }
            if waited > SPIN {
                let mut fds = [PollFd::new(&self.from_handler, PollFlags::IN)];
                let limit = Timespec { tv_sec: 1, tv_nsec: 0 };
                poll(&mut fds, Some(&limit)).map_err(io::Error::from)?;
                let _ = rustix::io::read(&self.from_handler, &mut [0u8; 8]);
            }
        };
        Ok(self.collect(tail, stamp.then(Instant::now)))
    }

    /// The answers up to `tail`.
    fn collect(&mut self, tail: u32, now: Option<Instant>) -> Vec<(u16, bool, Option<Instant>)> {
        let mut out = Vec::with_capacity(self.entries.len());
        while self.cleaned != tail {
            let mut answer = [0u8; 9];
            let inside = self.map.read(CMDR_OFF + u64::from(self.cleaned), &mut answer);
            debug_assert!(inside, "entries lie inside the ring");
            let id = u16::from_le_bytes([answer[4], answer[5]]);
            out.push((id, answer[std::mem::offset_of!(abi::CmdResponse, scsi_status)] == 0, now));
            self.cleaned = (self.cleaned + self.len) % self.size;
        }
        out
    }
}
