//! What a disk may hold, block by block, while any number of operations overlap: an operation's value is illegal once another
//! that began after its end has settled.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::Write as _,
};

/// Bytes of a block of the model.
pub const BLOCK: u64 = 512;

/// What a block may settle by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Settled {
    /// Having ended: what a read sees, and what is left by kill -9.
    Ended,
    /// Having been flushed: what is left by a power cut.
    Flushed,
}

#[derive(Clone, Copy)]
struct Op {
    zero: bool,
    /// The blocks, of which a cut leaves all or none: the first, and how many.
    whole: Option<(u64, u64)>,
    start: u64,
    end: Option<u64>,
    durable: bool,
}

/// The model of one disk.
pub struct Model {
    base: Vec<u8>,
    clock: Cell<u64>,
    ops: RefCell<Vec<Op>>,
    /// Operations that touched a block and may still be seen, by index.
    blocks: RefCell<Vec<Vec<u32>>>,
    /// When the reads under way began.
    reads: RefCell<Vec<u64>>,
    /// Where beginnings and ends are written down, for whoever outlives this process.
    diary: Option<File>,
}

fn value(op: usize, block: u64) -> u64 {
    (op as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
        ^ block.wrapping_mul(0xd134_2543_de82_ef95)
        | 1
}

impl Model {
    pub fn new(mut base: Vec<u8>) -> Model {
        let blocks = base.len().div_ceil(BLOCK as usize);
        base.resize(blocks * BLOCK as usize, 0);
        Model {
            base,
            clock: Cell::new(1),
            ops: RefCell::default(),
            blocks: RefCell::new(vec![Vec::new(); blocks]),
            reads: RefCell::default(),
            diary: None,
        }
    }

    /// The same, with a diary.
    pub fn with_diary(self, diary: File) -> Model {
        Model { diary: Some(diary), ..self }
    }

    /// Lives through what a diary says. Its last line may be cut short.
    pub fn relive(&self, diary: &str) {
        for line in diary.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let words: Vec<u64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
            match words[..] {
                [first, count, 2] => drop(self.begin_whole(first, count)),
                [first, count, zero] => drop(self.begin(first, count, zero == 1)),
                [op] => self.end(op as usize, false),
                _ => panic!("the diary says {line:?}"),
            }
        }
    }

    fn note(&self, line: std::fmt::Arguments<'_>) {
        if let Some(mut diary) = self.diary.as_ref() {
            diary.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
    }

    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// A write (or zeroing) of blocks begins; gives its number.
    pub fn begin(&self, first: u64, count: u64, zero: bool) -> usize {
        self.note(format_args!("{first} {count} {}", u8::from(zero)));
        self.begins(first, count, zero, None)
    }

    /// An atomic write of blocks begins.
    pub fn begin_whole(&self, first: u64, count: u64) -> usize {
        self.note(format_args!("{first} {count} 2"));
        self.begins(first, count, false, Some((first, count)))
    }

    fn begins(&self, first: u64, count: u64, zero: bool, whole: Option<(u64, u64)>) -> usize {
        let start = self.tick();
        let id = self.ops.borrow().len();
        self.ops.borrow_mut().push(Op { zero, whole, start, end: None, durable: false });
        for block in first..first + count {
            self.blocks.borrow_mut()[block as usize].push(id as u32);
        }
        id
    }

    /// The bytes that an operation writes.
    pub fn data(&self, op: usize, first: u64, count: u64) -> Vec<u8> {
        let block = |b: u64| value(op, b).to_le_bytes().repeat(BLOCK as usize / 8);
        (first..first + count).flat_map(block).collect()
    }

    /// It has ended well. One that failed is never ended: both values stay legal.
    pub fn end(&self, op: usize, durable: bool) {
        self.note(format_args!("{op}"));
        let end = self.tick();
        let op = &mut self.ops.borrow_mut()[op];
        op.end = Some(end);
        op.durable = durable;
    }

    /// The moment that a flush begins.
    pub fn flush_begins(&self) -> u64 {
        self.tick()
    }

    /// The moment that a read begins.
    pub fn read_begins(&self) -> u64 {
        let began = self.tick();
        self.reads.borrow_mut().push(began);
        began
    }

    /// The read that began then is over.
    pub fn read_ended(&self, began: u64) {
        self.reads.borrow_mut().retain(|r| *r != began);
    }

    /// A flush that began then has ended well.
    pub fn flush_ended(&self, began: u64) {
        for op in self.ops.borrow_mut().iter_mut() {
            op.durable |= op.end.is_some_and(|end| end < began);
        }
    }

    /// Forgets operations that can not be seen any more, whatever happens.
    pub fn prune(&self) {
        let ops = self.ops.borrow();
        let oldest = self.reads.borrow().iter().copied().min().unwrap_or(u64::MAX);
        let hidden = |b: &Op| b.durable && b.end.is_some_and(|end| end < oldest);
        for seen in self.blocks.borrow_mut().iter_mut() {
            let hides =
                |a: &Op| seen.iter().any(|b| hidden(&ops[*b as usize]) && after(&ops[*b as usize], a));
            let keep: Vec<u32> = seen.iter().copied().filter(|a| !hides(&ops[*a as usize])).collect();
            *seen = keep;
        }
    }

    /// Whether a read that began at `began` may see those bytes in a block; or, with `whole` false, a mix of legal bytes. (Not of words: where the reader's memory is not
    /// aligned, as that of a server that reads for TLS, the kernel's copy from its page cache meets a write in the middle of one.)
    fn judge(&self, block: u64, bytes: &[u8], by: Settled, began: u64, whole: bool) -> Result<(), String> {
        let ops = self.ops.borrow();
        let blocks = self.blocks.borrow();
        let seen = &blocks[block as usize];
        let settled = |op: &Op| match by {
            Settled::Ended => op.end.is_some_and(|end| end < began),
            Settled::Flushed => op.durable,
        };
        let mut legal: Vec<(usize, Vec<u8>)> = Vec::new();
        if !seen.iter().any(|b| settled(&ops[*b as usize])) {
            let at = (block * BLOCK) as usize;
            legal.push((usize::MAX, self.base[at..at + BLOCK as usize].to_vec()));
        }
        for a in seen {
            let op = &ops[*a as usize];
            if seen.iter().any(|b| settled(&ops[*b as usize]) && after(&ops[*b as usize], op)) {
                continue;
            }
            let word = if op.zero { 0 } else { value(*a as usize, block) };
            legal.push((*a as usize, word.to_le_bytes().repeat(BLOCK as usize / 8)));
        }
        let fits = match whole {
            true => legal.iter().any(|(_, value)| value[..bytes.len()] == *bytes),
            false => bytes.chunks(8).enumerate().all(|(i, word)| {
                let has = |at: usize, part: &[u8]| legal.iter().any(|(_, v)| v[at..at + part.len()] == *part);
                has(i * 8, word) || word.iter().enumerate().all(|(j, byte)| has(i * 8 + j, &[*byte]))
            }),
        };
        if fits {
            return Ok(());
        }
        let found = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let whose = (0..ops.len()).find(|op| value(*op, block) == found);
        Err(format!(
            "block {block} holds {found:#x} (operation {whose:?}); legal are {:?}, {} touched it",
            legal.iter().map(|(id, _)| *id as isize).collect::<Vec<_>>(),
            seen.len()
        ))
    }

    /// What a snapshot may hold whose making began at that moment (from [`Model::flush_begins`]) and ends now: all that had
    /// ended before, nothing that begins later.
    pub fn freeze(&self, began: u64) -> Frozen {
        let ops = self.ops.borrow();
        let blocks = self.blocks.borrow();
        let settled = |op: &Op| op.end.is_some_and(|end| end < began);
        let legal = |(block, seen): (usize, &Vec<u32>)| {
            let mut legal = Vec::new();
            if !seen.iter().any(|b| settled(&ops[*b as usize])) {
                let at = block * BLOCK as usize;
                legal.push(self.base[at..at + BLOCK as usize].to_vec());
            }
            for a in seen {
                let op = &ops[*a as usize];
                if !seen.iter().any(|b| settled(&ops[*b as usize]) && after(&ops[*b as usize], op)) {
                    let word = if op.zero { 0 } else { value(*a as usize, block as u64) };
                    legal.push(word.to_le_bytes().repeat(BLOCK as usize / 8));
                }
            }
            legal
        };
        Frozen(blocks.iter().enumerate().map(legal).collect())
    }

    /// Judges what a read gave that began at that moment (from [`Model::read_begins`]).
    pub fn judge_read(&self, first: u64, bytes: &[u8], began: u64) -> Result<(), String> {
        for (i, block) in bytes.chunks(BLOCK as usize).enumerate() {
            self.judge(first + i as u64, block, Settled::Ended, began, false)?;
        }
        Ok(())
    }

    /// Judges a whole disk that nobody writes to.
    pub fn judge_disk(&self, bytes: &[u8], by: Settled) -> Result<(), String> {
        for (i, block) in bytes.chunks(BLOCK as usize).enumerate() {
            self.judge(i as u64, block, by, u64::MAX, true)?;
        }
        self.judge_whole(bytes)
    }

    /// An atomic write that can be seen in one block must not have left another of its blocks as it was before it began.
    fn judge_whole(&self, bytes: &[u8]) -> Result<(), String> {
        let (ops, blocks) = (self.ops.borrow(), self.blocks.borrow());
        let word_of = |bytes: &[u8], block: u64| {
            let at = (block * BLOCK) as usize;
            bytes.get(at..at + 8).map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap()))
        };
        let word = |block: u64| word_of(bytes, block);
        // Another life's operation of that number has left the same there: such a block says nothing.
        let says_nothing = |id: usize, block: u64| word_of(&self.base, block) == value(id, block);
        for (id, op) in ops.iter().enumerate() {
            let Some((first, count)) = op.whole else { continue };
            let shows = |block: &u64| word(*block) == value(id, *block);
            let Some(seen) = (first..first + count).find(|block| shows(block) && !says_nothing(id, *block))
            else {
                continue;
            };
            // What the block may be is another's that was written later or at the same time; else it is older.
            let fits = |other: usize, block: u64| match ops[other].zero {
                true => word(block) == 0,
                false => word(block) == value(other, block),
            };
            let is_older = |block: &u64| {
                let mut others = blocks[*block as usize].iter().map(|other| *other as usize);
                !shows(block) && !others.any(|other| fits(other, *block) && !after(op, &ops[other]))
            };
            if let Some(old) = (first..first + count).find(is_older) {
                return Err(format!(
                    "the atomic write {id} of {count} blocks at {first} is torn: it is at {seen}, not at {old}"
                ));
            }
        }
        Ok(())
    }
}

/// What each block of a snapshot may hold.
pub struct Frozen(Vec<Vec<Vec<u8>>>);

impl Frozen {
    /// Judges the whole content of the snapshot.
    pub fn judge(&self, bytes: &[u8]) -> Result<(), String> {
        if bytes.len().div_ceil(BLOCK as usize) != self.0.len() {
            return Err(format!("{} bytes for {} blocks", bytes.len(), self.0.len()));
        }
        let wrong =
            |(block, legal): (&[u8], &Vec<Vec<u8>>)| !legal.iter().any(|l| l[..block.len()] == *block);
        match bytes.chunks(BLOCK as usize).zip(&self.0).position(wrong) {
            None => Ok(()),
            Some(block) => {
                Err(format!("block {block} of the snapshot is none of {} values", self.0[block].len()))
            }
        }
    }
}

fn after(b: &Op, a: &Op) -> bool {
    a.end.is_some_and(|end| end < b.start)
}
