//! The clauses about tuples: what is checked for each value of RDPROTECT, WRPROTECT and VRPROTECT, what is refused without a trace,
//! and what comes back.

use super::{
    ConformanceError,
    clauses::{APP, GUARD, REFERENCE, Table, Verdict},
    disk::{Disk, Kind, Op},
    initiator::Answer,
    random::Random,
    tuples::Tuple,
};

/// Which tag of a tuple is spoiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spoilt {
    Guard,
    Reference,
}

impl Spoilt {
    fn word(self) -> &'static str {
        match self {
            Spoilt::Guard => "guard",
            Spoilt::Reference => "reference tag",
        }
    }

    fn sense(self) -> (u8, u8, u8) {
        match self {
            Spoilt::Guard => GUARD,
            Spoilt::Reference => REFERENCE,
        }
    }

    fn spoil(self, tuple: &mut Tuple) {
        match self {
            Spoilt::Guard => tuple.guard ^= 0x0100,
            Spoilt::Reference => tuple.reference = tuple.reference.wrapping_add(1000),
        }
    }
}

/// What follows from the disk's type and claims.
pub(super) struct Plan {
    pub(super) form: u8,
    pi_type: u8,
    size: usize,
    guard_checked: bool,
    reference_checked: bool,
}

impl Plan {
    pub(super) fn of(disk: &Disk) -> Plan {
        let facts = &disk.facts;
        Plan {
            form: disk.form(),
            pi_type: facts.pi_type,
            size: facts.block_size,
            guard_checked: facts.guard_checked(),
            reference_checked: facts.reference_checked() && facts.pi_type != 3,
        }
    }

    /// Blocks with their right tuples, each with an application tag of its own.
    fn blocks(&self, lba: u64, count: u32, seed: u64) -> (Vec<u8>, Vec<Tuple>) {
        let mut random = Random::new(seed);
        let mut data = vec![0; count as usize * self.size];
        random.fill(&mut data);
        let blocks = data.chunks(self.size).zip(lba..);
        let tuples = blocks.map(|(b, lba)| Tuple::of(b, lba, random.below(0xffff) as u16)).collect();
        (data, tuples)
    }

    /// Whether a read or VERIFY with that xxPROTECT finds the fault (SBC-4 tables of RDPROTECT and VRPROTECT).
    fn read_finds(&self, fault: Spoilt, protect: u8) -> bool {
        match fault {
            Spoilt::Guard => self.guard_checked && matches!(protect, 0 | 1 | 4 | 5),
            // A READ(32) of type 2 tells which tag is expected, with any value.
            Spoilt::Reference => self.reference_checked && matches!(protect, 0 | 1 | 2 | 5),
        }
    }

    /// Whether a write with that WRPROTECT finds the fault (SBC-4, the table of WRPROTECT).
    fn write_finds(&self, fault: Spoilt, protect: u8) -> bool {
        match fault {
            Spoilt::Guard => matches!(protect, 1 | 4 | 5),
            Spoilt::Reference => self.pi_type != 3 && matches!(protect, 1 | 2 | 5),
        }
    }

    fn write(
        &self,
        disk: &mut Disk,
        lba: u64,
        data: &[u8],
        tuples: &[Tuple],
        protect: u8,
    ) -> Result<Answer, ConformanceError> {
        disk.run(&Op::new(Kind::Write, self.form, protect, lba, tuples.len() as u32), data, tuples)
    }

    fn read(&self, disk: &mut Disk, lba: u64, blocks: u32, protect: u8) -> Result<Answer, ConformanceError> {
        disk.run(&Op::new(Kind::Read, self.form, protect, lba, blocks), &[], &[])
    }

    /// Writes a few blocks around `lba`, and that one with a guard that does not fit.
    pub(super) fn spoil_guard(&self, disk: &mut Disk, lba: u64) -> Result<u64, ConformanceError> {
        self.plant(disk, lba, Spoilt::Guard)
    }

    fn plant(&self, disk: &mut Disk, lba: u64, fault: Spoilt) -> Result<u64, ConformanceError> {
        let (data, mut tuples) = self.blocks(lba - 2, 5, lba);
        fault.spoil(&mut tuples[2]);
        self.write(disk, lba - 2, &data, &tuples, 3)?;
        Ok(lba)
    }

    /// Makes the blocks around `lba` good again.
    pub(super) fn mend(&self, disk: &mut Disk, lba: u64) -> Result<(), ConformanceError> {
        let (data, tuples) = self.blocks(lba - 2, 5, lba);
        self.write(disk, lba - 2, &data, &tuples, 3).map(drop)
    }
}

fn same(answer: &Answer, data: &[u8], tuples: &[Tuple]) -> bool {
    let bytes: Vec<u8> = tuples.iter().flat_map(|t| t.bytes()).collect();
    answer.status == 0 && answer.data == data && answer.tuples == bytes
}

/// WRITE: good tuples are kept, bad ones refused where WRPROTECT says that they are checked, and then nothing is written.
pub(super) fn writes(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let form = plan.form;
    for protect in 1..=5 {
        let (data, tuples) = plan.blocks(10, 4, u64::from(protect));
        let answer = plan.write(table.disk, 10, &data, &tuples, protect)?;
        table.ends(
            "5.42",
            format!("WRITE({form}) WRPROTECT={protect} with good tuples"),
            &answer,
            None,
            None,
        );
        let back = plan.read(table.disk, 10, 4, 1)?;
        let what = format!("the tuples of a WRITE({form}) WRPROTECT={protect} come back as they were sent");
        table.hold("5.42", what, same(&back, &data, &tuples), back.words());
        for fault in [Spoilt::Guard, Spoilt::Reference] {
            let (new, mut spoilt) = plan.blocks(10, 4, 100 + u64::from(protect));
            fault.spoil(&mut spoilt[2]);
            let answer = plan.write(table.disk, 10, &new, &spoilt, protect)?;
            let finds = plan.write_finds(fault, protect);
            let does = if finds { "is refused at its LBA" } else { "is kept unchecked" };
            let what = format!("WRITE({form}) WRPROTECT={protect}: a wrong {} {does}", fault.word());
            table.ends("5.42", what, &answer, finds.then_some(fault.sense()), Some(12));
            let back = plan.read(table.disk, 10, 4, 3)?;
            let (kept, wanted) = if finds { (&data, &tuples) } else { (&new, &spoilt) };
            // Blocks before the wrong one may have been written (SBC-4 4.22.4); that one and those behind it must not.
            let from = if finds { 2 } else { 0 };
            let part = Answer {
                data: back.data.get(from * plan.size..).unwrap_or_default().to_vec(),
                tuples: back.tuples.get(from * 8..).unwrap_or_default().to_vec(),
                ..back.clone()
            };
            let what = format!(
                "WRITE({form}) WRPROTECT={protect}, wrong {}: {}",
                fault.word(),
                if finds { "nothing of it is written" } else { "all of it is written" }
            );
            table.hold("5.42", what, same(&part, &kept[from * plan.size..], &wanted[from..]), back.words());
            plan.write(table.disk, 10, &data, &tuples, 3)?;
        }
    }
    if plan.pi_type == 3 {
        let (data, mut tuples) = plan.blocks(10, 1, 7);
        tuples[0].reference = 0xdead_beef;
        let answer = plan.write(table.disk, 10, &data, &tuples, 1)?;
        let back = plan.read(table.disk, 10, 1, 1)?;
        table.hold(
            "4.22.2.5",
            "type 3: the reference tag is the application client's own",
            answer.status == 0 && same(&back, &data, &tuples),
            back.words(),
        );
    }
    Ok(())
}

/// READ: the tag that is wrong is found where RDPROTECT and the disk's claims say so, at its LBA.
pub(super) fn reads(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let form = plan.form;
    for fault in [Spoilt::Guard, Spoilt::Reference] {
        let lba = plan.plant(table.disk, 20, fault)?;
        for protect in 0..=5 {
            if protect == 0 && plan.pi_type == 2 && fault == Spoilt::Reference {
                // Whether the expected tag of a READ(32) counts without RDPROTECT is left to the disk.
                continue;
            }
            let finds = plan.read_finds(fault, protect);
            let does = if finds { "is reported at its LBA" } else { "is not looked at" };
            let what =
                format!("READ({form}) RDPROTECT={protect}: a wrong {} on the medium {does}", fault.word());
            let answer = plan.read(table.disk, lba - 1, 3, protect)?;
            table.ends("5.13", what, &answer, finds.then_some(fault.sense()), Some(lba));
        }
        let beside = plan.read(table.disk, lba + 1, 2, 1)?;
        table.ends("5.13", format!("blocks beside a wrong {} are good", fault.word()), &beside, None, None);
        plan.mend(table.disk, lba)?;
    }
    escapes(table, plan)?;
    generated(table, plan)
}

/// The values that say "no protection information" (SBC-4 4.22.2).
fn escapes(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let (data, mut tuples) = plan.blocks(30, 2, 9);
    Spoilt::Guard.spoil(&mut tuples[0]);
    tuples[0].app = 0xffff;
    plan.write(table.disk, 30, &data, &tuples, 3)?;
    let answer = plan.read(table.disk, 30, 2, 1)?;
    let wanted = (plan.pi_type == 3 && plan.guard_checked).then_some(GUARD);
    let what = match plan.pi_type {
        3 => "type 3: an application tag of FFFFh alone does not turn checking off",
        _ => "an application tag of FFFFh turns all checking off on a read",
    };
    table.ends("4.22.2", what, &answer, wanted, None);
    if plan.pi_type == 3 {
        tuples[0].reference = u32::MAX;
        plan.write(table.disk, 30, &data, &tuples, 3)?;
        let answer = plan.read(table.disk, 30, 2, 1)?;
        let what = "type 3: FFFFh and FFFFFFFFh together turn all checking off on a read";
        table.ends("4.22.2.5", what, &answer, None, None);
    }
    Ok(())
}

/// A write without tuples: the disk makes them.
fn generated(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let (data, _) = plan.blocks(32, 3, 11);
    let op = Op::new(Kind::Write, 10, 0, 32, 3);
    let written = table.disk.run(&op, &data, &[])?;
    let back = plan.read(table.disk, 32, 3, if plan.pi_type == 2 { 3 } else { 1 })?;
    let tuples: Vec<Tuple> = back.tuples.chunks(8).filter_map(Tuple::parse).collect();
    let guards = data.chunks(plan.size).map(super::tuples::guard);
    let right = written.status == 0
        && back.data == data
        && tuples.len() == 3
        && tuples.iter().zip(guards).all(|(t, g)| t.guard == g)
        && (plan.pi_type == 3 || tuples.iter().zip(32u32..).all(|(t, lba)| t.reference == lba));
    let found = format!("{}, {tuples:04x?}", back.words());
    table.hold("5.42", "WRITE(10) WRPROTECT=0: the disk makes guards and reference tags", right, found);
    Ok(())
}

/// VERIFY with each BYTCHK.
pub(super) fn verifies(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let form = plan.form;
    for fault in [Spoilt::Guard, Spoilt::Reference] {
        let lba = plan.plant(table.disk, 20, fault)?;
        for protect in 0..=5 {
            if protect == 0 && plan.pi_type == 2 && fault == Spoilt::Reference {
                continue;
            }
            let finds = plan.read_finds(fault, protect);
            let does = if finds { "is reported at its LBA" } else { "is not looked at" };
            let op = Op::new(Kind::Verify(0), form, protect, lba - 1, 3);
            let answer = table.disk.run(&op, &[], &[])?;
            let what =
                format!("VERIFY({form}) VRPROTECT={protect} BYTCHK=0: a wrong {} {does}", fault.word());
            table.ends("5.36", what, &answer, finds.then_some(fault.sense()), Some(lba));
        }
        plan.mend(table.disk, lba)?;
    }
    for protect in 1..=5 {
        let (data, tuples) = plan.blocks(24, 3, 21);
        plan.write(table.disk, 24, &data, &tuples, 1)?;
        let op = Op::new(Kind::Verify(1), form, protect, 24, 3);
        let answer = table.disk.run(&op, &data, &tuples)?;
        table.ends(
            "5.36",
            format!("VERIFY({form}) VRPROTECT={protect} BYTCHK=1 of what was written"),
            &answer,
            None,
            None,
        );
        let mut other = data.clone();
        other[plan.size + 5] ^= 1;
        let mut fitting = tuples.clone();
        fitting[1].guard = super::tuples::guard(&other[plan.size..2 * plan.size]);
        let answer = table.disk.run(&op, &other, &fitting)?;
        let what = format!("VERIFY({form}) VRPROTECT={protect} BYTCHK=1 of other data is a miscompare");
        table.ends("5.36", what, &answer, Some((0x0e, 0x1d, 0)), None);
    }
    Ok(())
}

/// WRITE AND VERIFY, WRITE SAME, application tags, unmapped blocks.
pub(super) fn others(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let form = plan.form;
    let (data, tuples) = plan.blocks(50, 2, 31);
    let answer = table.disk.run(&Op::new(Kind::WriteVerify, form, 1, 50, 2), &data, &tuples)?;
    let back = plan.read(table.disk, 50, 2, 1)?;
    if answer.codes() == Some(super::clauses::NO_OPCODE) {
        let why = "no such command".to_owned();
        table.row("5.46", format!("WRITE AND VERIFY({form})"), Verdict::NotApplicable(why));
    } else {
        let what = format!("WRITE AND VERIFY({form}) WRPROTECT=1 keeps data and tuples");
        table.hold("5.46", what, answer.status == 0 && same(&back, &data, &tuples), answer.words());
        let mut spoilt = tuples.clone();
        Spoilt::Guard.spoil(&mut spoilt[1]);
        let answer = table.disk.run(&Op::new(Kind::WriteVerify, form, 1, 50, 2), &data, &spoilt)?;
        table.ends(
            "5.46",
            format!("WRITE AND VERIFY({form}) WRPROTECT=1 refuses a wrong guard"),
            &answer,
            Some(GUARD),
            Some(51),
        );
    }

    let (one, tuple) = plan.blocks(52, 1, 33);
    let answer = table.disk.run(&Op::new(Kind::WriteSame, form, 1, 52, 4), &one, &tuple)?;
    if answer.codes() == Some(super::clauses::NO_OPCODE) {
        let why = "no such command".to_owned();
        table.row("5.50", format!("WRITE SAME({form})"), Verdict::NotApplicable(why));
    } else {
        let back = plan.read(table.disk, 52, 4, 1)?;
        let whole: Vec<u8> = one.repeat(4);
        let what =
            format!("WRITE SAME({form}) WRPROTECT=1: every block reads back with a tuple that fits it");
        table.hold(
            "5.50",
            what,
            answer.status == 0 && back.status == 0 && back.data == whole,
            format!("{}, read {}", answer.words(), back.words()),
        );
    }
    application_tags(table, plan)
}

/// The 32-byte forms of type 2 tell which application tag is expected.
fn application_tags(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    if plan.pi_type != 2 {
        return Ok(());
    }
    let (data, mut tuples) = plan.blocks(56, 2, 41);
    for tuple in &mut tuples {
        tuple.app = 0x1234;
    }
    plan.write(table.disk, 56, &data, &tuples, 1)?;
    let claims = table.disk.facts.extended.is_some_and(|(spt, _)| spt & 2 != 0);
    let what = "READ(32) with an expected application tag that differs is reported";
    if !claims {
        let why = "APP_CHK is 0".to_owned();
        table.row("5.16", what, Verdict::NotApplicable(why));
        return Ok(());
    }
    let read = Op::new(Kind::Read, 32, 1, 56, 2);
    let answer = table.disk.run(&Op { app: (0x1235, 0xffff), ..read }, &[], &[])?;
    table.ends("5.16", what, &answer, Some(APP), Some(56));
    let answer = table.disk.run(&Op { app: (0x1200, 0xff00), ..read }, &[], &[])?;
    table.ends("5.16", "READ(32) compares the bits of the mask alone", &answer, None, None);
    let answer = table.disk.run(&Op { reference: 57, ..read }, &[], &[])?;
    table.ends(
        "5.16",
        "READ(32) with an expected reference tag that differs is reported",
        &answer,
        Some(REFERENCE),
        Some(56),
    );
    Ok(())
}
