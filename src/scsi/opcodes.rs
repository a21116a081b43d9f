//! The table of supported commands. The parser takes lengths and reserved bits from it, the dispatcher what to run and
//! when, and REPORT SUPPORTED OPERATION CODES is its listing: so the three cannot disagree.
//!
//! REPORT LUNS, PERSISTENT RESERVE IN and OUT, RESERVE and RELEASE never arrive through the ring (the kernel answers them); of
//! these REPORT LUNS alone is here, for initiators that reach the target some other way.

use super::cdb::VARIABLE_LENGTH;
use crate::volume::PiType;

/// The operation code of COMPARE AND WRITE (SBC-4 5.2).
pub const COMPARE_AND_WRITE: u8 = 0x89;

/// The operation code of EXTENDED COPY (SPC-4 6.4).
pub const EXTENDED_COPY: u8 = 0x83;

/// What a row runs. The dispatcher matches it without a catch-all arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // The names are the commands'.
pub enum Kind {
    TestUnitReady,
    RequestSense,
    FormatUnit,
    Inquiry,
    ModeSelect,
    ModeSense,
    StartStopUnit,
    PreventAllow,
    ReadCapacity10,
    ReadCapacity16,
    Read,
    Write,
    WriteAtomic,
    WriteAndVerify,
    Verify,
    PreFetch,
    SynchronizeCache,
    ReadDefectData,
    WriteSame,
    Unmap,
    SanitizeOverwrite,
    SanitizeBlockErase,
    SanitizeExitFailureMode,
    LogSense,
    CompareAndWrite,
    OrWrite,
    GetLbaStatus,
    ReportLuns,
    ReportTargetPortGroups,
    ReportSupportedOpcodes,
    ReportSupportedTmf,
    ExtendedCopy,
    ReceiveCopyStatus,
    ReceiveCopyData,
    ReceiveCopyParameters,
    ReceiveCopyFailure,
}

impl Kind {
    /// Whether the command's buffer goes to the device, so that it is never filled.
    pub fn takes_data_out(self) -> bool {
        matches!(
            self,
            Kind::FormatUnit
                | Kind::ModeSelect
                | Kind::Write
                | Kind::WriteAtomic
                | Kind::WriteAndVerify
                | Kind::Verify
                | Kind::WriteSame
                | Kind::Unmap
                | Kind::SanitizeOverwrite
                | Kind::CompareAndWrite
                | Kind::OrWrite
                | Kind::ExtendedCopy
        )
    }
}

/// One supported command.
#[derive(Debug)]
pub struct Op {
    /// OPERATION CODE.
    pub opcode: u8,
    /// SERVICE ACTION (byte 1, bits 4 to 0; bytes 8 and 9 of a CDB of variable length), if the operation code has them.
    pub service_action: Option<u16>,
    /// CDB USAGE DATA (SPC-4 6.35.3): the operation code, then a 1 for every bit that is looked at. Without the protection
    /// field of those that have one; see [`Op::usage_data`].
    pub usage: &'static [u8],
    /// What it runs.
    pub kind: Kind,
    /// It changes the medium: refused if that is write protected.
    pub writes: bool,
    /// It is answered in spite of a pending unit attention (SPC-4 4.5.1).
    pub ignores_attention: bool,
    /// It is answered while FORMAT UNIT or SANITIZE is at work, or has failed (SBC-4 4.11.2).
    pub while_erasing: bool,
    /// Bits that are not in `usage` are refused, instead of ignored.
    pub strict: bool,
    /// It needs a thinly provisioned volume (LBPME = 1).
    pub needs_thin: bool,
    /// It needs a volume that keeps some writes whole when power fails.
    pub needs_atomic: bool,
    /// It has a protection field (RDPROTECT and its like) in byte 1.
    pub protects: bool,
    /// It needs type 2 protection, whose reference tag it brings.
    pub needs_type_2: bool,
    /// It may take hours.
    pub long: bool,
}

/// What the logical unit is like at the moment: some commands are there only then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// It is thinly provisioned (LBPME = 1).
    pub thin: bool,
    /// It keeps some writes whole when power fails (MAXIMUM ATOMIC TRANSFER LENGTH is not 0).
    pub atomic: bool,
    /// It may be formatted with protection information (PROTECT = 1).
    pub protect: bool,
    /// It is formatted with protection information (PROT_EN = 1) of this type.
    pub protection: Option<PiType>,
}

const fn op(kind: Kind, usage: &'static [u8]) -> Op {
    Op {
        opcode: usage[0],
        service_action: None,
        usage,
        kind,
        writes: false,
        ignores_attention: false,
        while_erasing: false,
        strict: false,
        needs_thin: false,
        needs_atomic: false,
        protects: false,
        needs_type_2: false,
        long: false,
    }
}

impl Op {
    /// [`Op::usage`], with the protection field if it may be other than 0: with type 2 only CDBs of 32 bytes may ask for
    /// protection information.
    pub fn usage_data(&self, has: Abilities) -> Vec<u8> {
        let mut usage = self.usage.to_vec();
        if self.protects && has.protection.is_some_and(|kind| kind != PiType::Type2) {
            usage[1] |= 0xe0;
        }
        if has.protect && self.kind == Kind::FormatUnit {
            usage[1] |= 0xc0; // FMTPINFO
        }
        usage
    }

    fn is_there(&self, has: Abilities) -> bool {
        (has.thin || !self.needs_thin)
            && (has.atomic || !self.needs_atomic)
            && (has.protection == Some(PiType::Type2) || !self.needs_type_2)
    }

    /// Bytes of the CDB.
    pub fn cdb_len(&self) -> u8 {
        self.usage.len() as u8
    }

    const fn action(mut self) -> Op {
        self.service_action = Some((self.usage[1] & 0x1f) as u16);
        self
    }

    const fn variable(mut self) -> Op {
        self.service_action = Some((self.usage[8] as u16) << 8 | self.usage[9] as u16);
        self.needs_type_2 = true;
        self
    }

    const fn protects(mut self) -> Op {
        self.protects = true;
        self
    }

    const fn writes(mut self) -> Op {
        self.writes = true;
        self
    }

    const fn ignores_attention(mut self) -> Op {
        self.ignores_attention = true;
        self
    }

    const fn while_erasing(mut self) -> Op {
        self.while_erasing = true;
        self
    }

    const fn strict(mut self) -> Op {
        self.strict = true;
        self
    }

    const fn needs_thin(mut self) -> Op {
        self.needs_thin = true;
        self
    }

    const fn needs_atomic(mut self) -> Op {
        self.needs_atomic = true;
        self
    }

    const fn long(mut self) -> Op {
        self.long = true;
        self
    }
}

const F: u8 = 0xff;
const GROUP: u8 = 0x3f;

/// The usage data of a 32-byte command (SBC-4 5.15 and its like): `action` is its service action, `flags` the bits of byte 10
/// that are looked at.
const fn long_form(action: u8, flags: u8) -> [u8; 32] {
    let mut usage = [F; 32];
    let head = [0x7f, 0, 0, 0, 0, 0, GROUP, F, 0, action, flags, 0];
    let mut i = 0;
    while i < head.len() {
        usage[i] = head[i];
        i += 1;
    }
    usage
}

static READ_32: [u8; 32] = long_form(0x09, 0xf8);
static VERIFY_32: [u8; 32] = long_form(0x0a, 0xf6);
static WRITE_32: [u8; 32] = long_form(0x0b, 0xf8);
static WRITE_AND_VERIFY_32: [u8; 32] = long_form(0x0c, 0xf2);
static WRITE_SAME_32: [u8; 32] = long_form(0x0d, 0xe9);

/// Every supported command, by operation code and service action.
pub static TABLE: &[Op] = &[
    op(Kind::TestUnitReady, &[0x00, 0, 0, 0, 0, 0]),
    op(Kind::RequestSense, &[0x03, 0x01, 0, 0, F, 0]).ignores_attention().while_erasing(),
    op(Kind::FormatUnit, &[0x04, 0x38, 0, 0, 0, 0]).writes().long(),
    op(Kind::Read, &[0x08, 0x1f, F, F, F, 0]),
    op(Kind::Write, &[0x0a, 0x1f, F, F, F, 0]).writes(),
    op(Kind::Inquiry, &[0x12, 0x01, F, F, F, 0]).ignores_attention().while_erasing(),
    op(Kind::ModeSelect, &[0x15, 0x11, 0, 0, F, 0]),
    op(Kind::ModeSense, &[0x1a, 0x08, F, F, F, 0]),
    op(Kind::StartStopUnit, &[0x1b, 0x01, 0, 0, 0x07, 0]),
    op(Kind::PreventAllow, &[0x1e, 0, 0, 0, 0x03, 0]),
    op(Kind::ReadCapacity10, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    op(Kind::Read, &[0x28, 0x18, F, F, F, F, GROUP, F, F, 0]).protects(),
    op(Kind::Write, &[0x2a, 0x18, F, F, F, F, GROUP, F, F, 0]).writes().protects(),
    op(Kind::WriteAndVerify, &[0x2e, 0x12, F, F, F, F, GROUP, F, F, 0]).writes().protects(),
    op(Kind::Verify, &[0x2f, 0x16, F, F, F, F, GROUP, F, F, 0]).protects(),
    op(Kind::PreFetch, &[0x34, 0x02, F, F, F, F, GROUP, F, F, 0]),
    op(Kind::SynchronizeCache, &[0x35, 0x02, F, F, F, F, GROUP, F, F, 0]),
    op(Kind::ReadDefectData, &[0x37, 0, 0x1f, 0, 0, 0, 0, F, F, 0]),
    op(Kind::WriteSame, &[0x41, 0x08, F, F, F, F, GROUP, F, F, 0]).writes().protects(),
    op(Kind::Unmap, &[0x42, 0, 0, 0, 0, 0, GROUP, F, F, 0]).writes().needs_thin(),
    op(Kind::SanitizeOverwrite, &[0x48, 0xa1, 0, 0, 0, 0, 0, F, F, 0]).action().writes().strict().long(),
    op(Kind::SanitizeBlockErase, &[0x48, 0xa2, 0, 0, 0, 0, 0, F, F, 0])
        .action()
        .writes()
        .strict()
        .needs_thin()
        .long(),
    op(Kind::SanitizeExitFailureMode, &[0x48, 0xbf, 0, 0, 0, 0, 0, F, F, 0]).action().strict(),
    op(Kind::LogSense, &[0x4d, 0, F, F, 0, F, F, F, F, 0]).while_erasing(),
    op(Kind::ModeSelect, &[0x55, 0x11, 0, 0, 0, 0, 0, F, F, 0]),
    op(Kind::ModeSense, &[0x5a, 0x18, F, F, 0, 0, 0, F, F, 0]),
    op(Kind::Read, &READ_32).variable(),
    op(Kind::Verify, &VERIFY_32).variable(),
    op(Kind::Write, &WRITE_32).variable().writes(),
    op(Kind::WriteAndVerify, &WRITE_AND_VERIFY_32).variable().writes(),
    op(Kind::WriteSame, &WRITE_SAME_32).variable().writes(),
    // Not among those that write: the unit may be the source alone. Errands look at write protection.
    op(Kind::ExtendedCopy, &[EXTENDED_COPY, 0x00, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::ReceiveCopyStatus, &[0x84, 0x00, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::ReceiveCopyData, &[0x84, 0x01, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::ReceiveCopyParameters, &[0x84, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::ReceiveCopyFailure, &[0x84, 0x04, F, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::Read, &[0x88, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).protects(),
    op(Kind::CompareAndWrite, &[COMPARE_AND_WRITE, 0x18, F, F, F, F, F, F, F, F, 0, 0, 0, F, GROUP, 0])
        .writes()
        .protects(),
    op(Kind::Write, &[0x8a, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::OrWrite, &[0x8b, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::WriteAndVerify, &[0x8e, 0x12, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::Verify, &[0x8f, 0x16, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).protects(),
    op(Kind::PreFetch, &[0x90, 0x02, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]),
    op(Kind::SynchronizeCache, &[0x91, 0x02, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]),
    op(Kind::WriteSame, &[0x93, 0x09, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::WriteAtomic, &[0x9c, 0x18, F, F, F, F, F, F, F, F, F, F, F, F, GROUP, 0])
        .writes()
        .protects()
        .needs_atomic(),
    op(Kind::ReadCapacity16, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, F, F, F, F, 0, 0]).action(),
    op(Kind::GetLbaStatus, &[0x9e, 0x12, F, F, F, F, F, F, F, F, F, F, F, F, 0, 0]).action(),
    op(Kind::ReportLuns, &[0xa0, 0, F, 0, 0, 0, F, F, F, F, 0, 0]).ignores_attention().while_erasing(),
    op(Kind::ReportTargetPortGroups, &[0xa3, 0xea, 0, 0, 0, 0, F, F, F, F, 0, 0]).action().while_erasing(),
    op(Kind::ReportSupportedOpcodes, &[0xa3, 0x0c, 0x87, F, F, F, F, F, F, F, 0, 0]).action().while_erasing(),
    op(Kind::ReportSupportedTmf, &[0xa3, 0x0d, 0x80, 0, 0, 0, F, F, F, F, 0, 0]).action().while_erasing(),
    op(Kind::Read, &[0xa8, 0x18, F, F, F, F, F, F, F, F, GROUP, 0]).protects(),
    op(Kind::Write, &[0xaa, 0x18, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::WriteAndVerify, &[0xae, 0x12, F, F, F, F, F, F, F, F, GROUP, 0]).writes().protects(),
    op(Kind::Verify, &[0xaf, 0x16, F, F, F, F, F, F, F, F, GROUP, 0]).protects(),
    op(Kind::ReadDefectData, &[0xb7, 0x1f, F, F, F, F, F, F, F, F, 0, 0]),
];

/// Where each operation code's rows start in [`TABLE`]; `NO_ROW` if it has none.
static FIRST: [u8; 256] = first_rows();
const NO_ROW: u8 = 0xff;

const fn first_rows() -> [u8; 256] {
    assert!(TABLE.len() < NO_ROW as usize);
    let mut first = [NO_ROW; 256];
    let mut i = TABLE.len();
    while i > 0 {
        i -= 1;
        first[TABLE[i].opcode as usize] = i as u8;
    }
    first
}

/// Why there is no row for a CDB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotFound {
    /// The operation code is not supported.
    Opcode,
    /// The operation code is, and the service action is not.
    ServiceAction,
}

/// The rows of an operation code that a volume supports.
fn rows(opcode: u8, has: Abilities) -> impl Iterator<Item = &'static Op> {
    let first = FIRST[usize::from(opcode)];
    let rows = if first == NO_ROW { &[] } else { &TABLE[usize::from(first)..] };
    rows.iter().take_while(move |o| o.opcode == opcode).filter(move |o| o.is_there(has))
}

/// The row for a CDB, of which the bytes up to the service action are enough.
///
/// # Errors
/// Which part of the CDB is not supported.
pub fn find(cdb: &[u8], has: Abilities) -> Result<&'static Op, NotFound> {
    let opcode = *cdb.first().ok_or(NotFound::Opcode)?;
    let wanted = match opcode {
        VARIABLE_LENGTH => cdb.get(8..10).map(|b| u16::from_be_bytes([b[0], b[1]])),
        _ => cdb.get(1).map(|b| u16::from(b & 0x1f)),
    };
    let mut known = false;
    for op in rows(opcode, has) {
        known = true;
        match op.service_action {
            None => return Ok(op),
            Some(action) if wanted == Some(action) => return Ok(op),
            Some(_) => {}
        }
    }
    Err(if known { NotFound::ServiceAction } else { NotFound::Opcode })
}

/// Seconds in the timeout descriptors: what a command takes at most when all is well, and when to give up on it.
fn timeouts(op: &Op) -> (u32, u32) {
    if op.long { (3600, 24 * 3600) } else { (1, 60) }
}

fn timeouts_descriptor(op: &Op, out: &mut Vec<u8>) {
    let (nominal, recommended) = timeouts(op);
    out.extend([0, 0x0a, 0, 0]);
    out.extend(nominal.to_be_bytes());
    out.extend(recommended.to_be_bytes());
}

/// The all_commands parameter data of REPORT SUPPORTED OPERATION CODES (SPC-4 6.35.2); `rctd`: with timeouts.
pub(super) fn report_all(rctd: bool, has: Abilities) -> Vec<u8> {
    let mut out = vec![0; 4];
    for op in TABLE.iter().filter(|o| o.is_there(has)) {
        let action = op.service_action.unwrap_or(0).to_be_bytes();
        let flags = if rctd { 2 } else { 0 } | u8::from(op.service_action.is_some());
        out.extend([op.opcode, 0, action[0], action[1], 0, flags, 0, op.cdb_len()]);
        if rctd {
            timeouts_descriptor(op, &mut out);
        }
    }
    let len = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&len.to_be_bytes());
    out
}

/// REPORTING OPTIONS that ask for one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum One {
    /// 001b: an operation code without service actions.
    Opcode,
    /// 010b: an operation code with this service action.
    Action(u16),
    /// 011b: either; the service action counts only if the operation code has them.
    Either(u16),
}

/// The one_command parameter data (SPC-4 6.35.3). `None` if the option does not fit the operation code.
pub(super) fn report_one(opcode: u8, one: One, rctd: bool, has: Abilities) -> Option<Vec<u8>> {
    let has_actions = rows(opcode, has).any(|o| o.service_action.is_some());
    let plain = rows(opcode, has).find(|o| o.service_action.is_none());
    let with = |action: u16| rows(opcode, has).find(|o| o.service_action == Some(action));
    let found = match one {
        One::Opcode if has_actions => return None,
        One::Action(_) if plain.is_some() => return None,
        One::Opcode => plain,
        One::Action(action) => with(action),
        One::Either(action) => plain.or_else(|| with(action)),
    };
    let Some(op) = found else { return Some(vec![0, 0x01, 0, 0]) };
    let mut out = vec![0, if rctd { 0x80 } else { 0 } | 0x03, 0, op.cdb_len()];
    out.extend(op.usage_data(has));
    if rctd {
        timeouts_descriptor(op, &mut out);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const THIN: Abilities = Abilities { thin: true, atomic: false, protect: false, protection: None };
    const FIXED: Abilities = Abilities { thin: false, atomic: false, protect: false, protection: None };
    /// Everything there is.
    const FULL: Abilities =
        Abilities { thin: true, atomic: true, protect: true, protection: Some(PiType::Type2) };

    #[test]
    fn rows_of_one_operation_code_stand_together_and_differ_in_their_service_action() {
        assert!(TABLE.is_sorted_by_key(|o| (o.opcode, o.service_action)));
        for pair in TABLE.windows(2) {
            assert_ne!((pair[0].opcode, pair[0].service_action), (pair[1].opcode, pair[1].service_action));
            if pair[0].opcode == pair[1].opcode {
                assert!(pair[0].service_action.is_some() && pair[1].service_action.is_some());
            }
        }
    }

    #[test]
    fn every_row_is_found_by_its_own_usage_data_and_has_the_length_of_its_group() {
        for op in TABLE {
            assert!(std::ptr::eq(find(op.usage, FULL).unwrap(), op), "{op:?}");
            let len = match op.opcode >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                5 => 12,
                3 => 32,
                group => panic!("group {group}"),
            };
            assert_eq!(op.usage.len(), len, "{op:?}");
        }
    }

    #[test]
    fn commands_for_thin_volumes_are_not_there_on_others() {
        assert_eq!(find(&[0x42, 0], FIXED).unwrap_err(), NotFound::Opcode);
        assert_eq!(find(&[0x48, 2], FIXED).unwrap_err(), NotFound::ServiceAction);
        assert!(find(&[0x48, 1], FIXED).is_ok());
        assert_eq!(report_one(0x42, One::Opcode, false, FIXED), Some(vec![0, 1, 0, 0]));
    }

    #[test]
    fn the_listing_of_all_commands_is_the_table() {
        for (rctd, size) in [(false, 8), (true, 20)] {
            let data = report_all(rctd, FULL);
            assert_eq!(u32::from_be_bytes(data[..4].try_into().unwrap()) as usize, data.len() - 4);
            let rows: Vec<_> = data[4..].chunks(size).collect();
            assert_eq!(rows.len(), TABLE.len());
            for (row, op) in rows.iter().zip(TABLE) {
                assert_eq!((row[0], row[7]), (op.opcode, op.cdb_len()));
                assert_eq!(row[5], if rctd { 2 } else { 0 } | u8::from(op.service_action.is_some()));
                assert!(op.service_action.is_some() || row[2..4] == [0, 0]);
                assert!(!rctd || row[8..10] == [0, 0x0a]);
            }
        }
    }

    #[test]
    fn one_command_is_reported_by_the_option_that_fits_it_alone() {
        let mut usage = vec![0, 3, 0, 10];
        usage.extend([0x28, 0x18, F, F, F, F, GROUP, F, F, 0]);
        assert_eq!(report_one(0x28, One::Opcode, false, THIN), Some(usage.clone()));
        assert_eq!(report_one(0x28, One::Either(7), false, THIN), Some(usage));
        assert_eq!(report_one(0x28, One::Action(0), false, THIN), None);
        assert_eq!(report_one(0x9e, One::Opcode, false, THIN), None);
        assert_eq!(report_one(0x9e, One::Action(0x10), true, THIN).unwrap().len(), 4 + 16 + 12);
        assert_eq!(report_one(0x9e, One::Action(0x1f), false, THIN), Some(vec![0, 1, 0, 0]));
        assert_eq!(report_one(0x83, One::Action(1), false, THIN), Some(vec![0, 1, 0, 0]));
        assert_eq!(report_one(0x9c, One::Opcode, false, THIN), Some(vec![0, 1, 0, 0]));
    }

    #[test]
    fn the_long_forms_are_there_with_type_2_alone_and_the_others_protection_field_without_it() {
        for has in [None, Some(PiType::Type1), Some(PiType::Type2), Some(PiType::Type3)] {
            let has = Abilities { thin: true, atomic: false, protect: true, protection: has };
            let two = has.protection == Some(PiType::Type2);
            for action in 0x09..=0x0d {
                let found = find(&long_form(action, 0), has);
                assert_eq!(found.is_ok_and(|op| op.cdb_len() == 32), two, "{has:?} {action:#x}");
                let reported = report_one(0x7f, One::Action(u16::from(action)), false, has).unwrap();
                assert_eq!(reported.len(), if two { 4 + 32 } else { 4 });
            }
            let missing = find(&long_form(0x0e, 0), has).unwrap_err();
            assert_eq!(missing, if two { NotFound::ServiceAction } else { NotFound::Opcode });
            let usage = report_one(0x28, One::Opcode, false, has).unwrap()[5];
            let other = has.protection.is_some() && !two;
            assert_eq!(usage, if other { 0xf8 } else { 0x18 }, "{has:?}");
            assert_eq!(report_one(0x25, One::Opcode, false, has).unwrap()[5], 0);
            assert_eq!(report_one(0x04, One::Opcode, false, has).unwrap()[5], 0xf8);
            assert_eq!(report_one(0x04, One::Opcode, false, THIN).unwrap()[5], 0x38);
        }
    }
}
