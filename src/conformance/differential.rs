//! The same seeded random commands to two disks, and what comes of them compared: status, sense, LBA, data and tuples.
//!
//! Where the second disk is known to differ from SBC-4, an expectation says so, as narrowly as it can: it names the command, what the
//! peer answers and what is right. Whatever no expectation explains is a difference. The list stands in words in
//! `docs/protection-differences.md`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    ConformanceError,
    disk::{Carriage, Disk, Facts, Kind, Op},
    initiator::Answer,
    random::Random,
    tuples::Tuple,
};

/// Differences that are listed one by one.
const LISTED: usize = 40;
/// Blocks at either end and in the middle that commands go to, so that they meet.
const WINDOW: u64 = 48;

/// How much is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// Commands.
    pub commands: u32,
    /// What the random numbers begin with.
    pub seed: u64,
}

/// A difference that is known.
pub struct Expectation {
    /// Its name in the list.
    pub name: &'static str,
    /// What SBC-4 says, with the clause.
    pub clause: &'static str,
    /// Whether it explains what came of a command.
    holds: fn(&Case<'_>) -> bool,
}

/// A command and what both made of it.
pub struct Case<'a> {
    op: &'a Op,
    pi_type: u8,
    peer: &'a Facts,
    ours: &'a Answer,
    theirs: &'a Answer,
}

impl Case<'_> {
    fn peer_is(&self, name: &str) -> bool {
        self.peer.name.contains(name)
    }

    fn ours_is(&self, codes: (u8, u8, u8)) -> bool {
        self.ours.status == 2 && self.ours.codes() == Some(codes)
    }

    fn theirs_is(&self, codes: (u8, u8, u8)) -> bool {
        self.theirs.status == 2 && self.theirs.codes() == Some(codes)
    }
}

const BAD_FIELD: (u8, u8, u8) = (5, 0x24, 0);
const NO_OPCODE: (u8, u8, u8) = (5, 0x20, 0);
const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
const MISCOMPARE: (u8, u8, u8) = (0x0e, 0x1d, 0);

/// Every difference that is known.
pub const EXPECTATIONS: &[Expectation] = &[
    Expectation {
        name: "scsi_debug adds address and length without a look at the carry",
        clause: "an address beyond the end is LOGICAL BLOCK ADDRESS OUT OF RANGE (SBC-4 4.5)",
        holds: |c| {
            let wraps = c.op.lba.checked_add(c.op.blocks.into()).is_none();
            c.peer_is("scsi_debug") && wraps && c.ours_is(OUT_OF_RANGE)
        },
    },
    Expectation {
        name: "scsi_debug's VERIFY without data, or of no blocks, looks at nothing, not even the address",
        clause: "VERIFY beyond the end is LOGICAL BLOCK ADDRESS OUT OF RANGE (SBC-4 4.5, 5.36)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && (c.op.kind == Kind::Verify(0) || c.op.kind == Kind::Verify(1) && c.op.blocks == 0)
                && c.theirs.status == 0
                && c.ours_is(OUT_OF_RANGE)
        },
    },
    Expectation {
        name: "scsi_debug takes the reserved values",
        clause: "RDPROTECT, WRPROTECT and VRPROTECT 110b and 111b are reserved: INVALID FIELD IN CDB (SBC-4 tables of 5.13, 5.42, 5.36)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && c.op.protect >= 6
                && c.ours_is(BAD_FIELD)
                && (c.theirs.status == 0
                    || c.theirs_is(NO_OPCODE)
                    || c.theirs_is(OUT_OF_RANGE)
                    || c.op.kind == Kind::Verify(1) && c.theirs_is(MISCOMPARE))
        },
    },
    Expectation {
        name: "scsi_debug has 32-byte commands for types 1 and 3",
        clause: "READ(32), WRITE(32) and the like are for type 2 alone: INVALID COMMAND OPERATION CODE (SBC-4 5.16, 5.45)",
        holds: |c| c.peer_is("scsi_debug") && c.op.size == 32 && c.pi_type != 2 && c.ours_is(NO_OPCODE),
    },
    Expectation {
        name: "scsi_debug has READ and WRITE alone with 32 bytes",
        clause: "VERIFY(32), WRITE AND VERIFY(32) and WRITE SAME(32) are for type 2 (SBC-4 5.37, 5.47, 5.51)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && c.op.size == 32
                && !matches!(c.op.kind, Kind::Read | Kind::Write)
                && c.theirs_is(BAD_FIELD)
        },
    },
    Expectation {
        name: "scsi_debug's WRITE SAME does not look at WRPROTECT",
        clause: "with type 2, WRPROTECT in a CDB of 10 or 16 bytes is INVALID COMMAND OPERATION CODE (SBC-4 4.22.2)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && c.op.kind == Kind::WriteSame
                && c.op.protect != 0
                && c.pi_type == 2
                && c.ours_is(NO_OPCODE)
        },
    },
    Expectation {
        name: "scsi_debug has no VRPROTECT",
        clause: "VERIFY with VRPROTECT is refused for type 2 in its short forms (SBC-4 5.36)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && matches!(c.op.kind, Kind::Verify(_))
                && c.op.protect != 0
                && c.pi_type == 2
                && c.op.size != 32
                && c.ours_is(NO_OPCODE)
        },
    },
    Expectation {
        name: "scsi_debug lacks the command",
        clause: "VERIFY(12), VERIFY(32), WRITE AND VERIFY(12, 32) and WRITE SAME(32) are optional (SBC-4 table 25)",
        holds: |c| {
            c.peer_is("scsi_debug")
                && c.theirs_is(NO_OPCODE)
                && (matches!(
                    (c.op.kind, c.op.size),
                    (Kind::Verify(_) | Kind::WriteVerify, 10 | 12 | 16 | 32) | (Kind::WriteSame, 32)
                ))
        },
    },
    Expectation {
        name: "LIO's VERIFY looks at nothing",
        clause: "VERIFY compares and checks as BYTCHK and VRPROTECT say, and 110b and 111b are reserved (SBC-4 5.36)",
        holds: |c| {
            let reserved = c.op.protect >= 6 && c.ours_is(BAD_FIELD) && c.theirs_is(OUT_OF_RANGE);
            c.peer_is("LIO-ORG") && matches!(c.op.kind, Kind::Verify(_)) && (c.theirs.status == 0 || reserved)
        },
    },
    Expectation {
        name: "LIO's READ with RDPROTECT=0 looks at no tuple",
        clause: "with RDPROTECT 000b the device server checks what GRD_CHK, APP_CHK and REF_CHK say (SBC-4 table of 5.13)",
        holds: |c| {
            c.peer_is("LIO-ORG")
                && (c.op.kind, c.op.protect) == (Kind::Read, 0)
                && c.theirs.status == 0
                && c.ours.codes().is_some_and(|(key, asc, _)| (key, asc) == (0x0b, 0x10))
        },
    },
    Expectation {
        name: "LIO's ramdisk lacks the command",
        clause: "VERIFY(12) and WRITE AND VERIFY(12) are optional (SBC-4 table 25)",
        holds: |c| {
            c.peer_is("LIO-ORG")
                && c.theirs_is(NO_OPCODE)
                && c.op.size == 12
                && matches!(c.op.kind, Kind::Verify(_) | Kind::WriteVerify)
        },
    },
];

/// A command that came to something else on each disk.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// Its number, from 0.
    pub number: u32,
    /// The command.
    pub command: String,
    /// What the first disk answered.
    pub first: String,
    /// What the second answered.
    pub second: String,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The first disk.
    pub first: Facts,
    /// The second disk.
    pub second: Facts,
    /// Commands sent to both.
    pub commands: u32,
    /// Those that both carried out.
    pub good: u32,
    /// Those that both refused or failed in the same way.
    pub equal_errors: u32,
    /// Known differences by name, and how often each was met.
    pub expected: BTreeMap<&'static str, u32>,
    /// Differences that nothing explains.
    pub differences: u32,
    /// The first of them.
    pub listed: Vec<Difference>,
}

/// A command with what it takes along.
struct Shot {
    op: Op,
    data: Vec<u8>,
    tuples: Vec<Tuple>,
}

struct Generator<'a> {
    random: Random,
    facts: &'a Facts,
    /// Both disks see the tuples, so bad ones may be sent.
    tuples_compared: bool,
    /// What LIO cannot be sent is left out: commands of no blocks, which with protection information crash its core (an oops in
    /// `sgl_alloc_order`, seen on 6.12); WRITE SAME, which its ramdisk refuses; writes with WRPROTECT=0, which leave its old tuples
    /// beside new data (the table of WRPROTECT in SBC-4 5.42 has them made anew). Both disks would hold different blocks from then on.
    for_lio: bool,
}

impl Generator<'_> {
    fn lba(&mut self) -> u64 {
        let end = self.facts.blocks;
        match self.random.below(16) {
            // At, across and beyond the end.
            0 => end - 1 - self.random.below(8),
            1 => end + self.random.below(3),
            2 => [u64::MAX, 1 << 32, u64::from(u32::MAX), 1 << 63][self.random.below(4) as usize],
            3..=5 => end / 2 + self.random.below(WINDOW),
            _ => self.random.below(WINDOW),
        }
    }

    fn shot(&mut self) -> Shot {
        loop {
            let kind = match self.random.below(20) {
                0..=8 => Kind::Read,
                9..=15 => Kind::Write,
                16 | 17 => Kind::Verify(if self.random.one_in(3) { 1 } else { 0 }),
                18 => Kind::WriteVerify,
                _ if self.for_lio => Kind::Write,
                _ => Kind::WriteSame,
            };
            let natural = if self.facts.pi_type == 2 { 32 } else { 16 };
            let size = if self.random.one_in(3) {
                [6, 10, 12, 16, 32][self.random.below(5) as usize]
            } else {
                natural
            };
            // Reserved values now and then.
            let values = if self.random.one_in(8) { 8 } else { 6 };
            let protect = if size == 6 { 0 } else { self.random.below(values) as u8 };
            if self.for_lio && protect == 0 && matches!(kind, Kind::Write | Kind::WriteVerify) {
                continue;
            }
            let blocks =
                if self.random.one_in(20) && !self.for_lio { 0 } else { 1 + self.random.below(8) as u32 };
            let op = Op::new(kind, size, protect, self.lba(), blocks);
            // WRITE SAME of no blocks is all blocks to the end, READ(6) of none is 256.
            let special = blocks == 0 && (kind == Kind::WriteSame || size == 6);
            if op.exists() && !special {
                return self.load(op);
            }
        }
    }

    fn load(&mut self, mut op: Op) -> Shot {
        let count = op.blocks_out() as usize;
        let mut data = vec![0; count * self.facts.block_size];
        self.random.fill(&mut data);
        let mut tuples: Vec<Tuple> = data
            .chunks(self.facts.block_size)
            .zip(0u64..)
            .map(|(block, i)| Tuple::of(block, op.lba.wrapping_add(i), self.random.below(0xffff) as u16))
            .collect();
        if self.tuples_compared && op.protect != 0 && count > 0 && self.random.one_in(3) {
            let at = self.random.below(count as u64) as usize;
            match self.random.below(4) {
                0 => tuples[at].guard ^= 1 << self.random.below(16),
                1 => tuples[at].reference ^= 1 << self.random.below(32),
                2 => tuples[at].app = 0xffff,
                _ => {
                    tuples[at].guard ^= 0x8000;
                    tuples[at].reference ^= 1;
                }
            }
        }
        if op.size == 32 && self.random.one_in(10) && self.tuples_compared {
            op.reference ^= 1;
        }
        Shot { op, data, tuples }
    }
}

/// Whether both came to the same.
fn equal(op: &Op, a: &Answer, b: &Answer, tuples: bool) -> bool {
    if a.status != b.status || (a.status != 0 && a.codes() != b.codes()) {
        return false;
    }
    // INFORMATION counts where both give it: for an address out of range it is optional.
    if let (true, Some(x), Some(y)) = (a.status != 0, a.information(), b.information())
        && x != y
    {
        return false;
    }
    if a.status != 0 || op.kind != Kind::Read {
        return true;
    }
    a.data == b.data && (!tuples || op.protect == 0 || a.tuples == b.tuples)
}

/// Sends the commands. Both disks must have the same geometry and type. **Both are overwritten.**
///
/// # Errors
/// If the disks are not alike, or a command was not delivered or not answered.
pub fn run(first: &mut Disk, second: &mut Disk, options: &Options) -> Result<Report, ConformanceError> {
    let unlike = |what, a: String, b: String| Err(ConformanceError::Unequal { what, first: a, second: b });
    let (a, b) = (first.facts.clone(), second.facts.clone());
    if (a.blocks, a.block_size) != (b.blocks, b.block_size) {
        let words = |f: &Facts| format!("{} blocks of {}", f.blocks, f.block_size);
        return unlike("geometry", words(&a), words(&b));
    }
    if a.pi_type != b.pi_type {
        return unlike("type of protection", a.pi_type.to_string(), b.pi_type.to_string());
    }
    let tuples_compared = a.carriage != Carriage::Nowhere && b.carriage != Carriage::Nowhere;
    let mut generator = Generator {
        random: Random::new(options.seed),
        facts: &a,
        tuples_compared,
        for_lio: b.name.contains("LIO-ORG"),
    };
    level(first, second, &mut generator)?;
    let mut report = Report {
        first: a.clone(),
        second: b.clone(),
        commands: 0,
        good: 0,
        equal_errors: 0,
        expected: BTreeMap::new(),
        differences: 0,
        listed: Vec::new(),
    };
    for number in 0..options.commands {
        let Shot { op, data, tuples } = generator.shot();
        let ours = first.run(&op, &data, &tuples)?;
        let theirs = second.run(&op, &data, &tuples)?;
        report.commands += 1;
        if equal(&op, &ours, &theirs, tuples_compared) {
            report.good += u32::from(ours.status == 0);
            report.equal_errors += u32::from(ours.status != 0);
            // A write that failed in the middle may have left some of its blocks behind.
            if ours.status != 0 && op.writes() {
                mend(first, second, &op, &mut generator)?;
            }
            continue;
        }
        let case = Case { op: &op, pi_type: a.pi_type, peer: &b, ours: &ours, theirs: &theirs };
        match EXPECTATIONS.iter().find(|e| (e.holds)(&case)) {
            Some(known) => *report.expected.entry(known.name).or_default() += 1,
            None => {
                report.differences += 1;
                if report.listed.len() < LISTED {
                    report.listed.push(difference(number, &op, &tuples, &ours, &theirs));
                }
            }
        }
        if op.writes() && op.lba >= a.blocks && theirs.status == 0 {
            // It went somewhere else than it was sent to.
            level(first, second, &mut generator)?;
        } else if op.writes() {
            mend(first, second, &op, &mut generator)?;
        }
    }
    Ok(report)
}

fn difference(number: u32, op: &Op, tuples: &[Tuple], ours: &Answer, theirs: &Answer) -> Difference {
    let words = |answer: &Answer, other: &Answer| {
        let mut text = answer.words();
        if answer.status == 0 && other.status == 0 {
            let at = |x: &[u8], y: &[u8]| x.iter().zip(y).position(|(x, y)| x != y);
            match (at(&answer.data, &other.data), at(&answer.tuples, &other.tuples)) {
                (Some(n), _) => text += &format!(", data differ at byte {n}"),
                (None, Some(n)) => {
                    let from = n / 8 * 8;
                    text += &format!(", tuple {}: {:02x?}", n / 8, &answer.tuples[from..from + 8]);
                }
                _ => text += &format!(", {} and {} bytes", answer.data.len(), answer.tuples.len()),
            }
        }
        text
    };
    let command = format!(
        "{:?}({}) protect {} lba {} blocks {} {tuples:04x?}",
        op.kind, op.size, op.protect, op.lba, op.blocks
    );
    Difference { number, command, first: words(ours, theirs), second: words(theirs, ours) }
}

/// Gives both disks the same content wherever commands go.
fn level(first: &mut Disk, second: &mut Disk, generator: &mut Generator<'_>) -> Result<(), ConformanceError> {
    let end = first.facts.blocks;
    for from in [0, end / 2, end - 16] {
        let blocks = (2 * WINDOW).min(end - from);
        for lba in (from..from + blocks).step_by(8) {
            write_both(first, second, lba, 8.min(end - lba) as u32, generator)?;
        }
    }
    Ok(())
}

/// Makes the blocks of a write that came to something else on each disk the same again.
fn mend(
    first: &mut Disk,
    second: &mut Disk,
    op: &Op,
    generator: &mut Generator<'_>,
) -> Result<(), ConformanceError> {
    let end = first.facts.blocks;
    if op.lba >= end || op.blocks == 0 {
        return Ok(());
    }
    write_both(first, second, op.lba, u64::from(op.blocks).min(end - op.lba) as u32, generator)
}

fn write_both(
    first: &mut Disk,
    second: &mut Disk,
    lba: u64,
    blocks: u32,
    generator: &mut Generator<'_>,
) -> Result<(), ConformanceError> {
    let protect = if generator.tuples_compared { 3 } else { 0 };
    let size = if protect != 0 { first.form() } else { 16 };
    let mut data = vec![0; blocks as usize * first.facts.block_size];
    generator.random.fill(&mut data);
    let tuples: Vec<Tuple> =
        data.chunks(first.facts.block_size).zip(lba..).map(|(b, lba)| Tuple::of(b, lba, 0)).collect();
    for disk in [first, second] {
        let answer = disk.run(&Op::new(Kind::Write, size, protect, lba, blocks), &data, &tuples)?;
        if answer.status != 0 {
            return Err(ConformanceError::Unusable { what: "a good WRITE", answer: answer.words() });
        }
    }
    Ok(())
}
