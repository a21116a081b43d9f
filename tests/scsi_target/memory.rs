//! A volume in memory for the tests: it counts and records what reaches it, fails where it is told to, lets other tasks in
//! between, and panics if it is asked for what lies outside itself or is not aligned.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tcmu_dif::{
    scsi::{
        Command, Once, Response, Target, TargetConfig,
        opcodes::{Op, TABLE},
    },
    sys::{
        exec::{Executor, yield_now},
        mem::{Buffer, Sg},
    },
    units::{BlockSize, ByteOffset},
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Limits, Result, Volume, WriteFlags},
};

/// Bytes that a discard frees at once.
pub const GRANULE: u64 = 4096;

/// What reached the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Read { at: u64, len: u64 },
    Write { at: u64, len: u64, fua: bool },
    Atomic { at: u64, len: u64, fua: bool },
    Flush,
    Discard { at: u64, len: u64 },
    Zero { at: u64, len: u64, may_unmap: bool },
    Map,
}

/// Operations of that kind which touch that byte fail so.
struct Fault {
    op: IoOp,
    byte: u64,
    kind: IoErrorKind,
}

pub struct Memory {
    pub bytes: RefCell<Vec<u8>>,
    mapped: RefCell<Vec<bool>>,
    pub limits: RefCell<Limits>,
    pub seen: RefCell<Vec<Seen>>,
    faults: RefCell<Vec<Fault>>,
    /// What there is beneath it.
    pub free: Cell<Option<u64>>,
    /// How often somebody wanted to know.
    pub asked_free: Cell<usize>,
    /// How often each operation lets the other tasks run.
    pub yields: Cell<usize>,
    /// If not 0: seeds how often instead, up to `yields`.
    pub jitter: Cell<u64>,
}

impl Memory {
    pub fn new(capacity: u64, block_size: BlockSize) -> Memory {
        Memory {
            bytes: RefCell::new(vec![0; capacity as usize]),
            mapped: RefCell::new(vec![false; capacity.div_ceil(GRANULE) as usize]),
            limits: RefCell::new(Limits {
                capacity,
                alignment: block_size.bytes() as u32,
                read_only: false,
                discard_granularity: GRANULE as u32,
                preferred_io: 65536,
                atomic_write: 4096,
                atomic_unit: 4096,
                tells_free: false,
            }),
            seen: RefCell::default(),
            faults: RefCell::default(),
            free: Cell::default(),
            asked_free: Cell::new(0),
            yields: Cell::new(0),
            jitter: Cell::new(0),
        }
    }

    pub fn fail(&self, op: IoOp, byte: u64, kind: IoErrorKind) {
        self.faults.borrow_mut().push(Fault { op, byte, kind });
    }

    pub fn mend(&self) {
        self.faults.borrow_mut().clear();
    }

    /// What was seen since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.borrow_mut())
    }

    async fn enter(&self, seen: Seen, op: IoOp, at: u64, len: u64) -> Result<()> {
        self.seen.borrow_mut().push(seen);
        let alignment = u64::from(self.limits.borrow().alignment);
        assert!(at.is_multiple_of(alignment) && len.is_multiple_of(alignment), "not aligned: {seen:?}");
        assert!(at + len <= self.limits.borrow().capacity, "outside: {seen:?}");
        self.give_way().await;
        for fault in self.faults.borrow().iter() {
            if fault.op == op && (len == 0 || (at..at + len).contains(&fault.byte)) {
                let error = IoError::new(fault.kind, op);
                return Err(if len == 0 { error } else { error.at(ByteOffset(fault.byte)) });
            }
        }
        Ok(())
    }

    async fn give_way(&self) {
        let mut n = self.yields.get();
        if self.jitter.get() != 0 {
            let seed = self.jitter.get().wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            self.jitter.set(seed);
            n = (seed >> 33) as usize % (n + 1);
        }
        for _ in 0..n {
            yield_now().await;
        }
    }

    fn granules(&self, at: u64, len: u64, mapped: bool) {
        let (first, last) = match mapped {
            true => (at / GRANULE, (at + len).div_ceil(GRANULE)),
            false => (at.div_ceil(GRANULE), (at + len) / GRANULE),
        };
        for i in first..last.max(first) {
            if let Some(granule) = self.mapped.borrow_mut().get_mut(i as usize) {
                *granule = mapped;
            }
        }
    }
}

impl Volume for Memory {
    fn limits(&self) -> Limits {
        self.limits.borrow().clone()
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        let len = to.len() as u64;
        self.enter(Seen::Read { at: at.0, len }, IoOp::Read, at.0, len).await?;
        to.copy_in(0, &self.bytes.borrow()[at.0 as usize..][..to.len()]);
        Ok(())
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        let len = from.len() as u64;
        let (at_byte, fua) = (at.0, flags.fua);
        let seen = match flags.atomic {
            true => Seen::Atomic { at: at_byte, len, fua },
            false => Seen::Write { at: at_byte, len, fua },
        };
        self.enter(seen, IoOp::Write, at.0, len).await?;
        // In two halves, so that whoever looks in between sees a torn write.
        let half = from.len() / 2;
        from.copy_out(0, &mut self.bytes.borrow_mut()[at.0 as usize..][..half]);
        self.give_way().await;
        from.copy_out(half, &mut self.bytes.borrow_mut()[at.0 as usize + half..][..from.len() - half]);
        self.granules(at.0, len, true);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.enter(Seen::Flush, IoOp::Flush, 0, 0).await
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.enter(Seen::Discard { at: at.0, len }, IoOp::Discard, at.0, len).await?;
        // A test may claim more capacity than it has memory for.
        let mut bytes = self.bytes.borrow_mut();
        let end = bytes.len().min((at.0 + len) as usize);
        bytes[(at.0 as usize).min(end)..end].fill(0);
        self.granules(at.0, len, false);
        Ok(())
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        self.enter(Seen::Zero { at: at.0, len, may_unmap }, IoOp::Discard, at.0, len).await?;
        self.bytes.borrow_mut()[at.0 as usize..][..len as usize].fill(0);
        self.granules(at.0, len, !may_unmap);
        Ok(())
    }

    /// At most three runs at a time, neighbours not joined.
    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        self.enter(Seen::Map, IoOp::Map, at.0, len).await?;
        let mut out = Vec::new();
        let mut pos = at.0;
        while pos < at.0 + len && out.len() < 3 {
            let end = ((pos / GRANULE + 1) * GRANULE).min(at.0 + len);
            let kind = match self.mapped.borrow()[(pos / GRANULE) as usize] {
                true => ExtentKind::Data,
                false => ExtentKind::Hole,
            };
            out.push(Extent { start: ByteOffset(pos), len: end - pos, kind, host_offset: None, depth: 0 });
            pos = end;
        }
        Ok(out)
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        self.bytes.borrow_mut().resize(capacity as usize, 0);
        self.mapped.borrow_mut().resize(capacity.div_ceil(GRANULE) as usize, false);
        self.limits.borrow_mut().capacity = capacity;
        Ok(())
    }

    async fn free_bytes(&self) -> Option<u64> {
        self.asked_free.set(self.asked_free.get() + 1);
        self.give_way().await;
        self.free.get()
    }

    async fn close(&self) -> Result<()> {
        Ok(())
    }
}

/// An answer, in the form that tests like to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    /// Key, code, qualifier.
    pub sense: (u8, u8, u8),
    pub information: Option<u64>,
    /// Data-in.
    pub data: Vec<u8>,
    pub response: Response,
}

/// Nothing to say: GOOD.
pub const GOOD: (u8, u8, u8) = (0, 0, 0);
pub const INVALID_FIELD: (u8, u8, u8) = (5, 0x24, 0);
pub const INVALID_PARAMETER: (u8, u8, u8) = (5, 0x26, 0);
pub const LIST_LENGTH: (u8, u8, u8) = (5, 0x1a, 0);
pub const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
pub const UNKNOWN: (u8, u8, u8) = (5, 0x20, 0);

pub fn answer(response: Response, data: &Sg) -> Answer {
    let sense = response.sense.map_or(GOOD, |s| (s.key as u8, s.asc.0, s.asc.1));
    let data = data.slice(0, response.data_in).to_vec();
    let information = response.sense.and_then(|s| s.information);
    Answer { status: response.status as u8, sense, information, data, response }
}

/// A command's memory of having begun, as the in-flight record keeps it.
#[derive(Debug, Default)]
pub struct Mark(pub Cell<bool>);

impl Once for Mark {
    fn is_marked(&self) -> bool {
        self.0.get()
    }

    fn mark(&self) {
        self.0.set(true);
    }
}

/// A target over a volume in memory, past its first unit attention.
#[derive(Clone)]
pub struct Bench {
    pub target: Rc<Target<Memory>>,
    pub exec: Executor,
    pub block: u64,
}

impl Bench {
    /// 1024 blocks.
    pub fn new(block_size: BlockSize) -> Bench {
        Bench::with(block_size, |_| {}, |_| {})
    }

    pub fn with(
        block_size: BlockSize,
        config: impl FnOnce(&mut TargetConfig),
        limits: impl FnOnce(&mut Limits),
    ) -> Bench {
        let memory = Memory::new(1024 * block_size.bytes(), block_size);
        limits(&mut memory.limits.borrow_mut());
        let capacity = memory.limits.borrow().capacity;
        memory.bytes.borrow_mut().resize(capacity as usize, 0);
        memory.mapped.borrow_mut().resize(capacity.div_ceil(GRANULE) as usize, false);
        let mut c = TargetConfig::new(block_size, "serial-1");
        c.power_on = false;
        config(&mut c);
        let target = Rc::new(Target::new(c, memory));
        Bench { target, exec: Executor::new(), block: block_size.bytes() }
    }

    pub fn volume(&self) -> &Memory {
        self.target.volume()
    }

    /// Executes a command on that buffer.
    pub fn execute(&self, cdb: &[u8], data: &Sg) -> Answer {
        self.finish(&self.spawn(cdb, data))
    }

    /// Executes a command with those bytes, and with a memory of having begun.
    pub fn send_once(&self, cdb: &[u8], bytes: &[u8], mark: &Rc<Mark>) -> Answer {
        self.finish(&self.begin(cdb, &Buffer::from_slice(bytes).sg(), Some(mark.clone())))
    }

    fn finish(&self, out: &RefCell<Option<Answer>>) -> Answer {
        self.settle();
        out.take().expect("the command ends when nothing else can run")
    }

    /// Begins a command.
    pub fn spawn(&self, cdb: &[u8], data: &Sg) -> Rc<RefCell<Option<Answer>>> {
        self.begin(cdb, data, None)
    }

    fn begin(&self, cdb: &[u8], data: &Sg, once: Option<Rc<dyn Once>>) -> Rc<RefCell<Option<Answer>>> {
        let out = Rc::new(RefCell::new(None));
        let (slot, target, data, cdb) = (out.clone(), self.target.clone(), data.clone(), cdb.to_vec());
        self.exec.spawn(async move {
            let command = Command { cdb: &cdb, data: &data, dif: &Sg::new(), once };
            let response = target.execute(&command).await;
            *slot.borrow_mut() = Some(answer(response, &data));
        });
        out
    }

    /// Lets every task go so many steps.
    pub fn turns(&self, n: usize) {
        for _ in 0..n {
            self.exec.run_ready();
        }
    }

    pub fn settle(&self) {
        while self.exec.run_ready() {}
    }

    /// A command without data.
    pub fn none(&self, cdb: &[u8]) -> Answer {
        self.execute(cdb, &Sg::new())
    }

    /// A command that sends data.
    pub fn send(&self, cdb: &[u8], data: &[u8]) -> Answer {
        self.execute(cdb, &Buffer::from_slice(data).sg())
    }

    /// A command that gets data, with room for so many bytes.
    pub fn get(&self, cdb: &[u8], room: usize) -> Answer {
        self.execute(cdb, &Buffer::zeroed(room).sg())
    }

    /// Data for so many blocks, each of its own.
    pub fn pattern(&self, seed: u64, blocks: u64) -> Vec<u8> {
        (0..blocks * self.block).map(|i| ((i / 7 + i % 251) as u8) ^ (seed as u8).wrapping_mul(37)).collect()
    }

    /// What the medium holds.
    pub fn medium(&self, lba: u64, blocks: u64) -> Vec<u8> {
        self.volume().bytes.borrow()[(lba * self.block) as usize..][..(blocks * self.block) as usize].to_vec()
    }

    /// Puts bytes on the medium behind the target's back.
    pub fn put(&self, lba: u64, bytes: &[u8]) {
        let at = (lba * self.block) as usize;
        self.volume().bytes.borrow_mut()[at..][..bytes.len()].copy_from_slice(bytes);
    }
}

/// The 6-, 10-, 12- or 16-byte CDB of a block command.
pub fn cdb(opcode: u8, flags: u8, lba: u64, blocks: u64) -> Vec<u8> {
    let mut c = vec![opcode];
    match opcode >> 5 {
        0 => {
            c.extend(&(lba as u32).to_be_bytes()[1..]);
            c.extend([blocks as u8, 0]);
            c[1] |= flags;
        }
        1 | 2 => {
            c.push(flags);
            c.extend((lba as u32).to_be_bytes());
            c.push(0);
            c.extend((blocks as u16).to_be_bytes());
            c.push(0);
        }
        5 => {
            c.push(flags);
            c.extend((lba as u32).to_be_bytes());
            c.extend((blocks as u32).to_be_bytes());
            c.extend([0, 0]);
        }
        _ => {
            c.push(flags);
            c.extend(lba.to_be_bytes());
            c.extend((blocks as u32).to_be_bytes());
            c.extend([0, 0]);
        }
    }
    c
}

/// The commands of a disk without protection information.
pub fn table() -> Vec<&'static Op> {
    TABLE.iter().filter(|o| !o.needs_type_2).collect()
}

/// A big-endian number of up to 8 bytes.
pub fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// How much a test does: TCMU_DIF_SCALE = quick, default, full.
pub fn scale(default: usize) -> usize {
    match std::env::var("TCMU_DIF_SCALE").as_deref() {
        Ok("quick") => default / 4,
        Ok("full") => default * 20,
        _ => default,
    }
}
