//! The commands by T10's names, and the blocks that they name, for those who count them and show them to people.

use super::{
    cdb::Cdb,
    opcodes::{self, Abilities, Kind},
};
use crate::{
    units::{Blocks, Lba},
    volume::PiType,
};

impl Kind {
    /// How many there are: each is an index below this (`kind as usize`).
    pub const COUNT: usize = Kind::ALL.len();

    /// Every kind, in the order of their declaration.
    pub const ALL: [Kind; 36] = [
        Kind::TestUnitReady,
        Kind::RequestSense,
        Kind::FormatUnit,
        Kind::Inquiry,
        Kind::ModeSelect,
        Kind::ModeSense,
        Kind::StartStopUnit,
        Kind::PreventAllow,
        Kind::ReadCapacity10,
        Kind::ReadCapacity16,
        Kind::Read,
        Kind::Write,
        Kind::WriteAtomic,
        Kind::WriteAndVerify,
        Kind::Verify,
        Kind::PreFetch,
        Kind::SynchronizeCache,
        Kind::ReadDefectData,
        Kind::WriteSame,
        Kind::Unmap,
        Kind::SanitizeOverwrite,
        Kind::SanitizeBlockErase,
        Kind::SanitizeExitFailureMode,
        Kind::LogSense,
        Kind::CompareAndWrite,
        Kind::OrWrite,
        Kind::GetLbaStatus,
        Kind::ReportLuns,
        Kind::ReportTargetPortGroups,
        Kind::ReportSupportedOpcodes,
        Kind::ReportSupportedTmf,
        Kind::ExtendedCopy,
        Kind::ReceiveCopyStatus,
        Kind::ReceiveCopyData,
        Kind::ReceiveCopyParameters,
        Kind::ReceiveCopyFailure,
    ];

    /// The command's name, without the length of its CDB where there are several.
    pub fn name(self) -> &'static str {
        match self {
            Kind::TestUnitReady => "TEST UNIT READY",
            Kind::RequestSense => "REQUEST SENSE",
            Kind::FormatUnit => "FORMAT UNIT",
            Kind::Inquiry => "INQUIRY",
            Kind::ModeSelect => "MODE SELECT",
            Kind::ModeSense => "MODE SENSE",
            Kind::StartStopUnit => "START STOP UNIT",
            Kind::PreventAllow => "PREVENT ALLOW MEDIUM REMOVAL",
            Kind::ReadCapacity10 => "READ CAPACITY (10)",
            Kind::ReadCapacity16 => "READ CAPACITY (16)",
            Kind::Read => "READ",
            Kind::Write => "WRITE",
            Kind::WriteAtomic => "WRITE ATOMIC",
            Kind::WriteAndVerify => "WRITE AND VERIFY",
            Kind::Verify => "VERIFY",
            Kind::PreFetch => "PRE-FETCH",
            Kind::SynchronizeCache => "SYNCHRONIZE CACHE",
            Kind::ReadDefectData => "READ DEFECT DATA",
            Kind::WriteSame => "WRITE SAME",
            Kind::Unmap => "UNMAP",
            Kind::SanitizeOverwrite => "SANITIZE OVERWRITE",
            Kind::SanitizeBlockErase => "SANITIZE BLOCK ERASE",
            Kind::SanitizeExitFailureMode => "SANITIZE EXIT FAILURE MODE",
            Kind::LogSense => "LOG SENSE",
            Kind::CompareAndWrite => "COMPARE AND WRITE",
            Kind::OrWrite => "ORWRITE",
            Kind::GetLbaStatus => "GET LBA STATUS",
            Kind::ReportLuns => "REPORT LUNS",
            Kind::ReportTargetPortGroups => "REPORT TARGET PORT GROUPS",
            Kind::ReportSupportedOpcodes => "REPORT SUPPORTED OPERATION CODES",
            Kind::ReportSupportedTmf => "REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS",
            Kind::ExtendedCopy => "EXTENDED COPY",
            Kind::ReceiveCopyStatus => "RECEIVE COPY STATUS",
            Kind::ReceiveCopyData => "RECEIVE COPY DATA",
            Kind::ReceiveCopyParameters => "RECEIVE COPY OPERATING PARAMETERS",
            Kind::ReceiveCopyFailure => "RECEIVE COPY FAILURE DETAILS",
        }
    }
}

/// First block and number of blocks of a command whose CDB has both, as its fields say. For people: whether the rest of the CDB makes
/// sense is not looked at. `cdb` may be longer than the command.
pub fn range_of(kind: Kind, cdb: &[u8]) -> Option<(Lba, Blocks)> {
    // SAM-5 5.2.1, GROUP CODE.
    let len = match cdb.first()? >> 5 {
        0 => 6,
        1 | 2 => 10,
        3 => 32,
        4 => 16,
        5 => 12,
        _ => return None,
    };
    let cdb = Cdb::new(cdb, len)?;
    let range = match kind {
        Kind::Read
        | Kind::Write
        | Kind::WriteAndVerify
        | Kind::Verify
        | Kind::PreFetch
        | Kind::SynchronizeCache
        | Kind::WriteSame
        | Kind::CompareAndWrite
        | Kind::OrWrite => cdb.range(),
        _ => return None,
    };
    // SBC-4 5.2: one byte, at the end.
    let blocks = if kind == Kind::CompareAndWrite { Blocks(u64::from(cdb.u8(13))) } else { range.blocks };
    Some((range.lba, blocks))
}

/// What a command has the medium read (false) or written (true), and how many blocks of it by its CDB, for those who limit that: whether the
/// rest of the CDB makes sense is not looked at. WRITE SAME counts with all that it writes, UNMAP as a write of nothing; commands that
/// move no blocks of the medium, SYNCHRONIZE CACHE, FORMAT UNIT and SANITIZE among them, are none.
pub fn moved_by(cdb: &[u8]) -> Option<(bool, Blocks)> {
    let all = Abilities { thin: true, atomic: true, protect: true, protection: Some(PiType::Type2) };
    let kind = opcodes::find(cdb, all).ok()?.kind;
    let blocks = || range_of(kind, cdb).map(|(_, blocks)| blocks);
    match kind {
        Kind::Read | Kind::Verify | Kind::PreFetch => Some((false, blocks()?)),
        Kind::Write | Kind::WriteAndVerify | Kind::WriteSame | Kind::CompareAndWrite | Kind::OrWrite => {
            Some((true, blocks()?))
        }
        // SBC-4 5.48: TRANSFER LENGTH stands behind the boundary.
        Kind::WriteAtomic => Some((true, Blocks(u64::from(Cdb::new(cdb, 16)?.u16(12))))),
        Kind::Unmap => Some((true, Blocks(0))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scsi::opcodes::TABLE;

    #[test]
    fn the_range_is_where_the_command_keeps_it() {
        let of = |kind, cdb: &[u8]| range_of(kind, cdb).map(|(lba, blocks)| (lba.0, blocks.0));
        let mut padded = [0; 32];
        padded[..10].copy_from_slice(&[0x2a, 0, 0, 0, 1, 2, 0, 0, 3, 0]);
        assert_eq!(of(Kind::Write, &padded), Some((0x102, 3)));
        let compare = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 2, 0, 0];
        assert_eq!(of(Kind::CompareAndWrite, &compare), Some((5, 2)));
        assert_eq!(of(Kind::Inquiry, &padded), None);
        assert_eq!((of(Kind::Read, &[0x28, 0]), of(Kind::Read, &[])), (None, None));
    }

    #[test]
    fn what_a_command_moves_is_told_by_its_cdb() {
        let of = |cdb: &[u8]| moved_by(cdb).map(|(writes, blocks)| (writes, blocks.0));
        assert_eq!(of(&[0x28, 0, 0, 0, 0, 0, 0, 1, 2, 0]), Some((false, 0x102)));
        assert_eq!(of(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 3, 0]), Some((true, 3)));
        assert_eq!(of(&[0x41, 0, 0, 0, 0, 0, 0, 8, 0, 0]), Some((true, 0x800)), "all that WRITE SAME writes");
        assert_eq!(of(&[0x9c, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 7, 0, 0]), Some((true, 7)));
        assert_eq!(of(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]), Some((true, 0)));
        for free in [&[0x35, 0, 0, 0, 0, 0, 0, 0, 9, 0][..], &[0; 6], &[0xff], &[], &[0x28]] {
            assert_eq!(of(free), None, "{free:?}");
        }
    }

    #[test]
    fn every_kind_is_its_own_index_and_has_a_name_of_its_own() {
        assert!(Kind::ALL.iter().enumerate().all(|(i, kind)| *kind as usize == i));
        assert!(TABLE.iter().all(|op| Kind::ALL.contains(&op.kind)));
        let names: std::collections::BTreeSet<_> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), Kind::COUNT);
    }
}
