//! The table of clauses: what a disk with protection information says of itself, refuses, checks and gives back.
//!
//! Clauses are those of SBC-4 (INCITS 506) and SPC-5. What a disk does not claim (a check that VPD page 86h leaves out) is not
//! applicable, and so is everything about tuples where the way to the disk carries none.

use serde::Serialize;

use super::{
    ConformanceError,
    clauses_io::{self, Plan},
    disk::{Carriage, Disk, Kind, Op},
    initiator::{Answer, Wire},
};

/// LOGICAL BLOCK GUARD, APPLICATION TAG and REFERENCE TAG CHECK FAILED (SPC-5 annex F), ABORTED COMMAND.
pub(super) const GUARD: (u8, u8, u8) = (0x0b, 0x10, 1);
pub(super) const APP: (u8, u8, u8) = (0x0b, 0x10, 2);
pub(super) const REFERENCE: (u8, u8, u8) = (0x0b, 0x10, 3);
/// ILLEGAL REQUEST: INVALID COMMAND OPERATION CODE, LOGICAL BLOCK ADDRESS OUT OF RANGE, INVALID FIELD IN CDB.
pub(super) const NO_OPCODE: (u8, u8, u8) = (5, 0x20, 0);
pub(super) const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
pub(super) const BAD_FIELD: (u8, u8, u8) = (5, 0x24, 0);

/// What came of a clause.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", content = "detail", rename_all = "kebab-case")]
pub enum Verdict {
    /// As it must be.
    Pass,
    /// Not so; how it was.
    Fail(String),
    /// Not asked of this disk; why.
    NotApplicable(String),
}

/// A line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Clause {
    /// Where it stands.
    pub clause: &'static str,
    /// What is demanded.
    pub what: String,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// The table while it is made.
pub(super) struct Table<'a> {
    pub(super) disk: &'a mut Disk,
    rows: Vec<Clause>,
}

impl Table<'_> {
    pub(super) fn row(&mut self, clause: &'static str, what: impl Into<String>, verdict: Verdict) {
        self.rows.push(Clause { clause, what: what.into(), verdict });
    }

    pub(super) fn hold(
        &mut self,
        clause: &'static str,
        what: impl Into<String>,
        holds: bool,
        found: impl Into<String>,
    ) {
        let verdict = if holds { Verdict::Pass } else { Verdict::Fail(found.into()) };
        self.row(clause, what, verdict);
    }

    /// A command that must end with that status: GOOD for none.
    pub(super) fn ends(
        &mut self,
        clause: &'static str,
        what: impl Into<String>,
        answer: &Answer,
        wanted: Option<(u8, u8, u8)>,
        lba: Option<u64>,
    ) {
        let as_wanted = match wanted {
            None => answer.status == 0,
            Some(codes) => answer.status == 2 && answer.codes() == Some(codes),
        };
        let located = wanted.is_none() || lba.is_none() || answer.information() == lba;
        let found = if as_wanted && !located {
            format!("{}, and not at LBA {}", answer.words(), lba.unwrap_or(0))
        } else {
            answer.words()
        };
        self.hold(clause, what, as_wanted && located, found);
    }
}

/// Goes through the whole table. **Overwrites the first 64 blocks and the last ones.**
///
/// # Errors
/// If a command was not delivered or not answered.
pub fn run(disk: &mut Disk) -> Result<Vec<Clause>, ConformanceError> {
    let mut table = Table { disk, rows: Vec::new() };
    identity(&mut table);
    if table.disk.facts.pi_type == 0 {
        without_protection(&mut table)?;
        return Ok(table.rows);
    }
    reserved_values(&mut table)?;
    forms_of_the_type(&mut table)?;
    ends_of_the_disk(&mut table)?;
    if table.disk.facts.carriage == Carriage::Nowhere {
        let why = "the way to this disk carries no protection information".to_owned();
        table.row("4.22", "tuples are checked, kept and given back", Verdict::NotApplicable(why));
        return Ok(table.rows);
    }
    let plan = Plan::of(table.disk);
    clauses_io::writes(&mut table, &plan)?;
    clauses_io::reads(&mut table, &plan)?;
    clauses_io::verifies(&mut table, &plan)?;
    clauses_io::others(&mut table, &plan)?;
    sense_formats(&mut table, &plan)?;
    Ok(table.rows)
}

fn identity(table: &mut Table<'_>) {
    let facts = table.disk.facts.clone();
    let with_pi = facts.pi_type != 0;
    table.hold(
        "SPC-5 6.6.2",
        "INQUIRY's PROTECT says that there is protection information",
        facts.protect == with_pi || facts.protect,
        format!("PROTECT is {}, and READ CAPACITY(16) says type {}", facts.protect, facts.pi_type),
    );
    table.hold(
        "5.21.2",
        "READ CAPACITY(16) has PROT_EN with a type that exists",
        facts.pi_type <= 3,
        format!("P_TYPE is {}", facts.pi_type.wrapping_sub(1)),
    );
    let Some((spt, _)) = facts.extended else {
        let demanded = "extended INQUIRY data (VPD page 86h) are there";
        table.hold("SPC-5 7.7.7", demanded, !with_pi, "no such page");
        return;
    };
    if !with_pi {
        return;
    }
    // SPT: which types a logical unit may be formatted with; bit 0 of each is one type in this order.
    let supported: &[u8] = match spt >> 3 & 7 {
        0 => &[1],
        1 => &[1, 2],
        2 => &[2],
        3 => &[1, 3],
        4 => &[3],
        5 => &[2, 3],
        7 => &[1, 2, 3],
        _ => &[],
    };
    let found = format!("SPT is {}, the type is {}", spt >> 3 & 7, facts.pi_type);
    let what = "SPT names the type that the disk has";
    table.hold("SPC-5 7.7.7", what, supported.contains(&facts.pi_type), found);
    table.hold("SPC-5 7.7.7", "GRD_CHK: guards are checked", spt & 4 != 0, "GRD_CHK is 0");
    if facts.pi_type != 3 {
        table.hold("SPC-5 7.7.7", "REF_CHK: reference tags are checked", spt & 1 != 0, "REF_CHK is 0");
    }
    let len = facts.control.as_ref().map_or(0, Vec::len);
    table.hold(
        "SPC-5 7.5.10",
        "the control mode page is there, with ATO, DPICZ and RWWP",
        len == 12,
        format!("{len} bytes"),
    );
}

/// PROTECT=0: nothing but 000b is allowed.
fn without_protection(table: &mut Table<'_>) -> Result<(), ConformanceError> {
    for kind in [Kind::Read, Kind::Write, Kind::Verify(0)] {
        for protect in 1..8 {
            let op = Op::new(kind, 16, protect, 0, 1);
            let data = vec![0; op.blocks_out() as usize * table.disk.facts.block_size];
            let answer = table.disk.run(&op, &data, &[])?;
            let what = format!("{kind:?} with xxPROTECT={protect} is refused by a disk without protection");
            table.ends("4.22.2", what, &answer, Some(BAD_FIELD), None);
        }
    }
    Ok(())
}

fn reserved_values(table: &mut Table<'_>) -> Result<(), ConformanceError> {
    let form = table.disk.form();
    for kind in [Kind::Read, Kind::Write, Kind::Verify(0)] {
        for protect in [6, 7] {
            let op = Op::new(kind, form, protect, 0, 1);
            let size = table.disk.facts.block_size;
            let data = vec![0; op.blocks_out() as usize * size];
            let tuples = vec![super::tuples::Tuple::of(&vec![0; size], 0, 0); op.blocks_out() as usize];
            let answer = table.disk.run(&op, &data, &tuples)?;
            let what = format!("{kind:?}({form}) with the reserved xxPROTECT={protect} is refused");
            table.ends("5.13, 5.42, 5.36", what, &answer, Some(BAD_FIELD), None);
        }
    }
    Ok(())
}

/// Type 2 takes protection information with the 32-byte forms alone, the other types never with them.
fn forms_of_the_type(table: &mut Table<'_>) -> Result<(), ConformanceError> {
    let size = table.disk.facts.block_size;
    let tuple = super::tuples::Tuple::of(&vec![0; size], 0, 0);
    let mut try_op = |op: Op| {
        let n = op.blocks_out() as usize;
        table.disk.run(&op, &vec![0; n * size], &vec![tuple; n]).map(|a| (op, a))
    };
    let mut seen = Vec::new();
    if try_op(Op::new(Kind::Write, 16, 0, 0, 2))?.1.status != 0 {
        return Ok(());
    }
    for kind in [Kind::Read, Kind::Write, Kind::Verify(0)] {
        if table_type_2(&seen, kind) {
            continue;
        }
        for form in [10, 12, 16] {
            seen.push(try_op(Op::new(kind, form, 1, 0, 1))?);
        }
        seen.push(try_op(Op::new(kind, 32, 0, 0, 1))?);
    }
    let type_2 = table.disk.facts.pi_type == 2;
    let carried = table.disk.facts.carriage != Carriage::Nowhere;
    for (op, answer) in seen {
        let refused = type_2 == (op.size != 32);
        let wanted = refused.then_some(NO_OPCODE);
        let does = if refused { "is refused" } else { "is carried out" };
        let what = format!(
            "type {}: {:?}({}) with xxPROTECT={} {does}",
            table.disk.facts.pi_type, op.kind, op.size, op.protect
        );
        if refused || carried || op.protect == 0 {
            table.ends("4.22.2", what, &answer, wanted, None);
        }
    }
    Ok(())
}

/// Every kind is tried once.
fn table_type_2(seen: &[(Op, Answer)], kind: Kind) -> bool {
    seen.iter().any(|(op, _)| op.kind == kind)
}

fn ends_of_the_disk(table: &mut Table<'_>) -> Result<(), ConformanceError> {
    let (end, form, size) = (table.disk.facts.blocks, table.disk.form(), table.disk.facts.block_size);
    for (lba, blocks) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (end - 1, u32::MAX)] {
        // No more data than a small transfer: the command has to be refused before any moves.
        let mut op = Op::new(Kind::Read, form, 0, lba, 1);
        op.blocks = blocks;
        let answer = table.disk.command(&op.cdb(), Wire::In(2 * size, 0))?;
        let what = format!("READ({form}) of {blocks} blocks at {} is refused", relative(lba, end));
        table.ends("5.13", what, &answer, Some(OUT_OF_RANGE), None);
    }
    let answer = table.disk.run(&Op::new(Kind::Read, form, 1, end, 0), &[], &[])?;
    let what = format!(
        "READ({form}) of no blocks at the end with RDPROTECT=1 moves nothing and ends well, or is refused"
    );
    let good = answer.status == 0 || answer.codes() == Some(OUT_OF_RANGE);
    table.hold("4.2.2", what, good, answer.words());
    Ok(())
}

fn relative(lba: u64, end: u64) -> String {
    match lba.checked_sub(end) {
        Some(0) => "the end".to_owned(),
        None if end - lba < 100 => format!("the end - {}", end - lba),
        _ => format!("LBA {lba}"),
    }
}

/// A guard error in fixed and in descriptor format (SPC-5 4.4): INFORMATION is the LBA in both.
fn sense_formats(table: &mut Table<'_>, plan: &Plan) -> Result<(), ConformanceError> {
    let lba = plan.spoil_guard(table.disk, 40)?;
    for descriptor in [true, false] {
        let Some(mut page) = table.disk.mode_page(0x0a)? else { return Ok(()) };
        // D_SENSE is bit 2 of byte 2; PS is reserved in MODE SELECT.
        page[0] &= 0x3f;
        page[2] = if descriptor { page[2] | 4 } else { page[2] & !4 };
        let mut list = vec![0; 4];
        list.extend(&page);
        let cdb = [0x15, 0x10, 0, 0, list.len() as u8, 0];
        let set = table.disk.command(&cdb, Wire::Out(&list, &[]))?;
        let name = if descriptor { "descriptor" } else { "fixed" };
        if set.status != 0 {
            let why = format!("MODE SELECT of D_SENSE ended with {}", set.words());
            table.row("SPC-5 4.4", format!("a guard error in {name} format"), Verdict::NotApplicable(why));
            continue;
        }
        let answer = table.disk.run(&Op::new(Kind::Read, plan.form, 1, lba - 1, 3), &[], &[])?;
        let what = format!("a guard error has its LBA in {name} sense data");
        let wanted = (answer.status, answer.codes(), answer.information(), answer.is_descriptor());
        table.hold("SPC-5 4.4", what, wanted == (2, Some(GUARD), Some(lba), descriptor), answer.words());
    }
    plan.mend(table.disk, lba)
}
