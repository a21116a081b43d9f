//! The kernel's side of the ring in user space: what `target_core_user.c` does with entries, data blocks and completions,
//! over shared memory and two eventfds. Tests, benches and the demo drive the real LUN thread with it.
//!
//! It is as strict as the kernel: a completion for a command that is not under way is a broken ring.

use std::{
    collections::HashMap,
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

use crate::{ring::Device, sys::mem::Mapping};

const BLOCK: usize = 4096;

/// How an embedded ring is laid out.
#[derive(Debug, Clone)]
pub struct Options {
    /// Bytes of the command ring, a multiple of 8.
    pub cmdr_size: u32,
    /// Bytes of the data area, a multiple of 4096.
    pub data_size: usize,
    /// TCMU_MAILBOX_FLAG_CAP_*.
    pub flags: u16,
    /// Cut the iovecs at arbitrary bytes (from this seed), and not at blocks alone.
    pub cut: Option<u64>,
}

impl Default for Options {
    fn default() -> Options {
        Options { cmdr_size: 64 << 10, data_size: 16 << 20, flags: 0xf, cut: None }
    }
}

/// The data of a command, as its initiator sees it.
#[derive(Debug, Clone, Copy)]
pub enum Data<'a> {
    /// None.
    None,
    /// Bytes that go to the device.
    Out(&'a [u8]),
    /// Room for bytes from the device.
    In(usize),
    /// Both.
    Bidi(&'a [u8], usize),
    /// Bytes that go to the device, and their protection information, in iovecs of its own (`iov_dif`).
    OutDif(&'a [u8], &'a [u8]),
    /// Room for bytes from the device, and for that many bytes of protection information.
    InDif(usize, usize),
}

impl Data<'_> {
    /// Bytes out, room in, protection information out, room for protection information.
    fn parts(&self) -> (&[u8], usize, &[u8], usize) {
        match *self {
            Data::None => (&[], 0, &[], 0),
            Data::Out(bytes) => (bytes, 0, &[], 0),
            Data::In(room) => (&[], room, &[], 0),
            Data::Bidi(bytes, room) => (bytes, room, &[], 0),
            Data::OutDif(bytes, dif) => (bytes, 0, dif, 0),
            Data::InDif(room, dif) => (&[], room, &[], dif),
        }
    }
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its id.
    pub id: u16,
    /// SAM-5 status.
    pub status: u8,
    /// 96 bytes of sense data.
    pub sense: Vec<u8>,
    /// Data-in, cut to READ_LEN.
    pub data: Vec<u8>,
    /// The protection information of data-in, in the room that was given for it.
    pub dif: Vec<u8>,
    /// Whether the handler said that it does not know the operation.
    pub unknown_op: bool,
}

impl Ended {
    /// Sense key, ASC and ASCQ, from either sense format.
    pub fn key_asc_ascq(&self) -> (u8, u8, u8) {
        match self.sense[0] & 0x7f {
            0x72 | 0x73 => (self.sense[1] & 0xf, self.sense[2], self.sense[3]),
            _ => (self.sense[2] & 0xf, self.sense[12], self.sense[13]),
        }
    }
}

/// What the embedded kernel has to say against its handler.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No room in the ring or the data area now.
    #[error("the ring is full")]
    Full,
    /// The handler broke the protocol.
    #[error("the ring is broken: {0}")]
    Broken(String),
    /// The handler did not answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// A system call failed.
    #[error("the embedded kernel's memory or doorbell failed")]
    Io(#[from] io::Error),
}

#[derive(Default, Clone)]
struct Pending {
    iovecs: Vec<(u64, usize)>,
    blocks: Vec<u32>,
    data_in: usize,
    /// iovecs of data-out, which stand before those of data-in.
    skip: usize,
    dif_in: usize,
    /// iovecs of protection information, which stand last.
    dif_iovecs: Vec<(u64, usize)>,
}

/// What a device of the embedded kernel consists of.
#[derive(Debug)]
pub struct Descriptors {
    /// The mailbox, the ring and the data area.
    pub memory: File,
    /// Bytes of it.
    pub len: usize,
    /// Rung when entries have come.
    pub doorbell: OwnedFd,
    /// Written to when commands have ended.
    pub kick: OwnedFd,
}

/// An embedded kernel with one device.
pub struct Kernel {
    map: Rc<Mapping>,
    memory: File,
    to_handler: OwnedFd,
    from_handler: OwnedFd,
    options: Options,
    head: u32,
    cleaned: u32,
    free: Vec<u32>,
    pending: HashMap<u16, Pending>,
    next_id: u16,
    random: u64,
}

const CMDR_OFF: u32 = 128;
const HEAD: u64 = std::mem::offset_of!(abi::Mailbox, cmd_head) as u64;
const TAIL: u64 = std::mem::offset_of!(abi::Mailbox, cmd_tail) as u64;

impl Kernel {
    /// A device with an empty ring.
    ///
    /// # Errors
    /// If memory or descriptors are not to be had.
    pub fn new(options: Options) -> io::Result<Kernel> {
        let memory = File::from(memfd_create("tcmu-embedded", MemfdFlags::CLOEXEC)?);
        let len = CMDR_OFF as usize + options.cmdr_size as usize + options.data_size;
        memory.set_len(len as u64)?;
        let map = Mapping::new(&memory, len)?;
        let mut mailbox = [0u8; 12];
        mailbox[..2].copy_from_slice(&(abi::TCMU_MAILBOX_VERSION as u16).to_le_bytes());
        mailbox[2..4].copy_from_slice(&options.flags.to_le_bytes());
        mailbox[4..8].copy_from_slice(&CMDR_OFF.to_le_bytes());
        mailbox[8..12].copy_from_slice(&options.cmdr_size.to_le_bytes());
        let inside = map.write(0, &mailbox);
        debug_assert!(inside, "the mailbox lies at the start of its memory");
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Kernel {
            map,
            memory,
            to_handler: event()?,
            from_handler: event()?,
            free: (0..(options.data_size / BLOCK) as u32).rev().collect(),
            random: options.cut.unwrap_or(1) | 1,
            options,
            head: 0,
            cleaned: 0,
            pending: HashMap::new(),
            next_id: 1,
        })
    }

    /// The device, for a handler; a second one may follow when the first has gone.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn device(&self) -> io::Result<Device> {
        let Descriptors { memory, len, doorbell, kick } = self.descriptors()?;
        Ok(Device::embedded(memory, len, doorbell, kick))
    }

    /// The same for a handler in another process, which makes its [`Device::embedded`] of them.
    ///
    /// # Errors
    /// If the process is out of descriptors.
    pub fn descriptors(&self) -> io::Result<Descriptors> {
        Ok(Descriptors {
            memory: self.memory.try_clone()?,
            len: self.map.len(),
            doorbell: self.to_handler.try_clone()?,
            kick: self.from_handler.try_clone()?,
        })
    }

    /// This kernel as it is now, with memory of its own: what a handler would find that came after a crash.
    ///
    /// # Errors
    /// If memory or descriptors are not to be had.
    pub fn copy(&self) -> io::Result<Kernel> {
        let mut copy = Kernel::new(self.options.clone())?;
        let mut bytes = vec![0; self.map.len()];
        self.load(0, &mut bytes);
        copy.store(0, &bytes);
        (copy.head, copy.cleaned, copy.next_id) = (self.head, self.cleaned, self.next_id);
        (copy.free, copy.pending, copy.random) = (self.free.clone(), self.pending.clone(), self.random);
        Ok(copy)
    }

    /// Commands under way.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Queues a command without ringing; [`Kernel::ring_doorbell`] follows a batch.
    ///
    /// # Errors
    /// [`KernelError::Full`] if there is no room for it now.
    pub fn queue(&mut self, cdb: &[u8], data: Data<'_>) -> Result<u16, KernelError> {
        let (out, room, dif_out, dif_room) = data.parts();
        let blocks_out = out.len().div_ceil(BLOCK);
        let blocks_in = room.div_ceil(BLOCK);
        let blocks_dif = dif_out.len().max(dif_room).div_ceil(BLOCK);
        let wanted = blocks_out + blocks_in + blocks_dif;
        if self.free.len() < wanted {
            return Err(KernelError::Full);
        }
        let blocks = self.free.split_off(self.free.len() - wanted);
        let first = self.iovecs(&blocks[..blocks_out], out.len());
        let second = self.iovecs(&blocks[blocks_out..blocks_out + blocks_in], room);
        let dif = self.iovecs(&blocks[blocks_out + blocks_in..], dif_out.len().max(dif_room));
        // Data-out stands first, whatever else there is; data-in of a plain read stands in the first list too.
        let counts = match data {
            Data::Bidi(..) => [first.len() as u32, second.len() as u32, 0],
            _ => [(first.len() + second.len()) as u32, 0, dif.len() as u32],
        };
        self.scatter(&first, out);
        self.scatter(&dif, dif_out);
        let skip = first.len();
        let iovecs: Vec<(u64, usize)> = first.into_iter().chain(second).collect();
        let fixed = size_of::<abi::CmdRequest>() + (iovecs.len() + dif.len()) * size_of::<abi::IoVec>();
        let base = fixed.max(size_of::<abi::CmdResponse>());
        let len = (base + cdb.len()).next_multiple_of(8);
        let mut bytes = vec![0u8; len];
        let id = self.free_id();
        bytes[..4].copy_from_slice(&(len as u32 | abi::TCMU_OP_CMD).to_le_bytes());
        bytes[4..6].copy_from_slice(&id.to_le_bytes());
        for (i, count) in counts.iter().enumerate() {
            bytes[8 + 4 * i..12 + 4 * i].copy_from_slice(&count.to_le_bytes());
        }
        for (i, (offset, len)) in iovecs.iter().chain(&dif).enumerate() {
            let at = size_of::<abi::CmdRequest>() + i * size_of::<abi::IoVec>();
            bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
            bytes[at + 8..at + 16].copy_from_slice(&(*len as u64).to_le_bytes());
        }
        bytes[base..base + cdb.len()].copy_from_slice(cdb);
        let placed = self.place(&mut bytes, |bytes, at| {
            let cdb_off = u64::from(CMDR_OFF) + u64::from(at) + base as u64;
            let at = std::mem::offset_of!(abi::CmdRequest, cdb_off);
            bytes[at..at + 8].copy_from_slice(&cdb_off.to_le_bytes());
        });
        if let Err(e) = placed {
            self.free.extend(blocks);
            return Err(e);
        }
        let pending = Pending { iovecs, blocks, data_in: room, skip, dif_in: dif_room, dif_iovecs: dif };
        self.pending.insert(id, pending);
        Ok(id)
    }

    /// Queues a command and rings.
    ///
    /// # Errors
    /// As [`Kernel::queue`].
    pub fn submit(&mut self, cdb: &[u8], data: Data<'_>) -> Result<u16, KernelError> {
        let id = self.queue(cdb, data)?;
        self.ring_doorbell()?;
        Ok(id)
    }

    /// Queues a task management request.
    ///
    /// # Errors
    /// As [`Kernel::queue`].
    pub fn submit_tmr(&mut self, kind: u8, ids: &[u16]) -> Result<(), KernelError> {
        let len = (size_of::<abi::TmrEntry>() + 2 * ids.len()).next_multiple_of(8);
        let mut bytes = vec![0u8; len];
        bytes[..4].copy_from_slice(&(len as u32 | abi::TCMU_OP_TMR).to_le_bytes());
        bytes[8] = kind;
        bytes[12..16].copy_from_slice(&(ids.len() as u32).to_le_bytes());
        for (i, id) in ids.iter().enumerate() {
            bytes[32 + 2 * i..34 + 2 * i].copy_from_slice(&id.to_le_bytes());
        }
        self.place(&mut bytes, |_, _| {})?;
        self.ring_doorbell()
    }

    /// Queues bytes as they are, for the tests of what must not be believed. With an id, its answer is awaited.
    ///
    /// # Errors
    /// As [`Kernel::queue`].
    pub fn submit_raw(&mut self, bytes: &[u8], awaits: Option<u16>) -> Result<(), KernelError> {
        self.place(&mut bytes.to_vec(), |_, _| {})?;
        if let Some(id) = awaits {
            let none = Pending::default();
            self.pending.insert(id, none);
        }
        self.ring_doorbell()
    }

    /// Overwrites bytes of the shared memory behind everybody's back.
    ///
    /// # Panics
    /// Outside the memory.
    pub fn poke(&mut self, offset: u64, bytes: &[u8]) {
        self.store(offset, bytes);
        if offset == HEAD {
            self.head = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
    }

    /// Where an entry queued next would lie, in bytes from the start of the memory.
    pub fn head_offset(&self) -> u64 {
        u64::from(CMDR_OFF) + u64::from(self.head)
    }

    /// Tells the handler that entries have come.
    ///
    /// # Errors
    /// If the doorbell fails.
    pub fn ring_doorbell(&self) -> Result<(), KernelError> {
        match rustix::io::write(&self.to_handler, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    /// The commands that have ended since the last call.
    ///
    /// # Errors
    /// [`KernelError::Broken`] where the handler broke the protocol.
    pub fn ended(&mut self) -> Result<Vec<Ended>, KernelError> {
        let mut out = Vec::new();
        let tail = self.map.load_acquire(TAIL);
        if tail >= self.options.cmdr_size {
            return Err(KernelError::Broken(format!("cmd_tail {tail}")));
        }
        while self.cleaned != tail {
            let mut bytes = [0u8; size_of::<abi::CmdResponse>()];
            let at = u64::from(CMDR_OFF) + u64::from(self.cleaned);
            let short = &mut bytes[..8];
            self.load(at, short);
            let len_op = u32::from_le_bytes([short[0], short[1], short[2], short[3]]);
            let (len, op) = (len_op & !abi::TCMU_OP_MASK, len_op & abi::TCMU_OP_MASK);
            if len == 0 {
                return Err(KernelError::Broken(format!("the entry at {} has no length", self.cleaned)));
            }
            if op != abi::TCMU_OP_PAD && op != abi::TCMU_OP_TMR {
                let n = bytes.len().min(len as usize);
                self.load(at, &mut bytes[..n]);
                out.push(self.end(&bytes)?);
            }
            self.cleaned = (self.cleaned + len) % self.options.cmdr_size;
        }
        Ok(out)
    }

    /// Waits for at least one command to end.
    ///
    /// # Errors
    /// As [`Kernel::ended`], and [`KernelError::Timeout`].
    pub fn wait(&mut self, limit: Duration) -> Result<Vec<Ended>, KernelError> {
        let until = Instant::now() + limit;
        loop {
            let ended = self.ended()?;
            if !ended.is_empty() {
                return Ok(ended);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(KernelError::Timeout(limit));
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.from_handler, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
            let _ = rustix::io::read(&self.from_handler, &mut [0u8; 8]);
        }
    }

    /// How often the handler has kicked since the doorbell was last read.
    pub fn kicks(&self) -> u64 {
        let mut count = [0u8; 8];
        match rustix::io::read(&self.from_handler, &mut count) {
            Ok(8) => u64::from_ne_bytes(count),
            _ => 0,
        }
    }

    /// Sends one command and waits for its end; nothing else may be under way.
    ///
    /// # Errors
    /// As [`Kernel::queue`] and [`Kernel::wait`].
    pub fn execute(&mut self, cdb: &[u8], data: Data<'_>) -> Result<Ended, KernelError> {
        let id = self.submit(cdb, data)?;
        let mut ended = self.wait(Duration::from_secs(60))?;
        match ended.pop() {
            Some(e) if e.id == id && ended.is_empty() => Ok(e),
            other => Err(KernelError::Broken(format!("asked for {id}, got {other:?} and {ended:?}"))),
        }
    }

    fn end(&mut self, bytes: &[u8]) -> Result<Ended, KernelError> {
        let id = u16::from_le_bytes([bytes[4], bytes[5]]);
        let Some(pending) = self.pending.remove(&id) else {
            return Err(KernelError::Broken(format!("cmd_id {id} is not under way")));
        };
        let uflags = u32::from(bytes[7]);
        let mut data = self.gather(&pending.iovecs[pending.skip..], pending.data_in);
        let dif = self.gather(&pending.dif_iovecs, pending.dif_in);
        if uflags & abi::TCMU_UFLAG_READ_LEN != 0 {
            let n = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
            data.truncate(n as usize);
        }
        self.free.extend(pending.blocks);
        Ok(Ended {
            id,
            status: bytes[8],
            // As tcmu_handle_completion has it: without CHECK CONDITION nobody looks at what stands there.
            sense: match bytes[8] {
                2 => bytes[16..16 + abi::TCMU_SENSE_BUFFERSIZE as usize].to_vec(),
                _ => vec![0; abi::TCMU_SENSE_BUFFERSIZE as usize],
            },
            data,
            dif,
            unknown_op: uflags & abi::TCMU_UFLAG_UNKNOWN_OP != 0,
        })
    }

    /// Finds room for an entry, pads the end of the ring if it does not fit there, and moves the head.
    fn place(&mut self, bytes: &mut [u8], fix: impl FnOnce(&mut [u8], u32)) -> Result<(), KernelError> {
        let (len, size) = (bytes.len() as u32, self.options.cmdr_size);
        let tail = self.cleaned;
        let used = (self.head + size - tail) % size;
        let to_end = size - self.head;
        let pad = if len > to_end { to_end } else { 0 };
        // One unit stays free, so that a full ring and an empty one differ.
        if used + pad + len >= size {
            return Err(KernelError::Full);
        }
        if pad > 0 {
            let header = (pad | abi::TCMU_OP_PAD).to_le_bytes();
            let mut entry = [0u8; 8];
            entry[..4].copy_from_slice(&header);
            self.store(u64::from(CMDR_OFF + self.head), &entry);
            self.head = 0;
        }
        fix(bytes, self.head);
        self.store(u64::from(CMDR_OFF + self.head), bytes);
        self.head = (self.head + len) % size;
        self.map.store_release(HEAD, self.head);
        Ok(())
    }

    /// The iovecs of some blocks: neighbours are joined as the kernel does, or all is cut anywhere.
    fn iovecs(&mut self, blocks: &[u32], len: usize) -> Vec<(u64, usize)> {
        let data_off = u64::from(CMDR_OFF) + u64::from(self.options.cmdr_size);
        let mut out: Vec<(u64, usize)> = Vec::new();
        let mut left = len;
        for block in blocks {
            let base = data_off + u64::from(*block) * BLOCK as u64;
            let n = left.min(BLOCK);
            left -= n;
            match (self.options.cut, out.last_mut()) {
                (None, Some((last, length))) if *last + *length as u64 == base => *length += n,
                (None, _) => out.push((base, n)),
                (Some(_), _) => {
                    let mut at = 0;
                    while at < n {
                        let piece = (self.next_random() as usize % BLOCK + 1).min(n - at);
                        out.push((base + at as u64, piece));
                        at += piece;
                    }
                }
            }
        }
        out
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64: cuts need variety, not quality.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn free_id(&mut self) -> u16 {
        loop {
            let id = self.next_id;
            self.next_id = self.next_id.checked_add(1).unwrap_or(1);
            if !self.pending.contains_key(&id) {
                return id;
            }
        }
    }

    /// Puts the first bytes of the iovecs' memory where they belong; what is beyond the bytes stays as it is.
    fn scatter(&self, iovecs: &[(u64, usize)], bytes: &[u8]) {
        let mut left = bytes;
        for (base, len) in iovecs {
            let (now, later) = left.split_at((*len).min(left.len()));
            self.store(*base, now);
            left = later;
        }
    }

    /// The first `len` bytes of the iovecs' memory.
    fn gather(&self, iovecs: &[(u64, usize)], len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut left = &mut bytes[..];
        for (base, len) in iovecs {
            let (now, later) = left.split_at_mut((*len).min(left.len()));
            self.load(*base, now);
            left = later;
        }
        bytes
    }

    fn store(&self, offset: u64, bytes: &[u8]) {
        assert!(self.map.write(offset, bytes), "{offset}+{} lies outside the memory", bytes.len());
    }

    fn load(&self, offset: u64, out: &mut [u8]) {
        assert!(self.map.read(offset, out), "{offset}+{} lies outside the memory", out.len());
    }
}
