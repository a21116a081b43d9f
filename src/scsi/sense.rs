//! Status and sense data: the codes in use, both formats on the wire, and the one map from [`IoError`] to sense.
//!
//! The map has no catch-all arm: a new kind of error does not compile until somebody has decided what an initiator is told.

use smallvec::SmallVec;

use crate::{
    units::{BlockSize, Lba},
    volume::{IoError, IoErrorKind, IoOp, PiTag},
};

/// Status codes (SAM-5 5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// GOOD.
    Good = 0x00,
    /// CHECK CONDITION: sense data says why.
    CheckCondition = 0x02,
    /// BUSY.
    Busy = 0x08,
    /// TASK SET FULL.
    TaskSetFull = 0x28,
    /// TASK ABORTED.
    TaskAborted = 0x40,
}

/// Sense keys (SPC-4 4.5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum SenseKey {
    /// NO SENSE.
    NoSense = 0x0,
    /// NOT READY.
    NotReady = 0x2,
    /// MEDIUM ERROR.
    MediumError = 0x3,
    /// HARDWARE ERROR.
    HardwareError = 0x4,
    /// ILLEGAL REQUEST.
    IllegalRequest = 0x5,
    /// UNIT ATTENTION.
    UnitAttention = 0x6,
    /// DATA PROTECT.
    DataProtect = 0x7,
    /// COPY ABORTED.
    CopyAborted = 0xa,
    /// ABORTED COMMAND.
    AbortedCommand = 0xb,
    /// MISCOMPARE.
    Miscompare = 0xe,
}

/// ADDITIONAL SENSE CODE and its qualifier, as T10 lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asc(pub u8, pub u8);

#[allow(missing_docs)] // The names are T10's own.
impl Asc {
    pub const NONE: Asc = Asc(0x00, 0x00);
    pub const OPERATION_IN_PROGRESS: Asc = Asc(0x00, 0x16);
    pub const MANUAL_INTERVENTION_REQUIRED: Asc = Asc(0x04, 0x03);
    pub const FORMAT_IN_PROGRESS: Asc = Asc(0x04, 0x04);
    pub const SANITIZE_IN_PROGRESS: Asc = Asc(0x04, 0x1b);
    pub const COMMUNICATION_FAILURE: Asc = Asc(0x08, 0x00);
    pub const UNREACHABLE_COPY_TARGET: Asc = Asc(0x08, 0x04);
    pub const WRITE_ERROR: Asc = Asc(0x0c, 0x00);
    pub const COPY_TARGET_NOT_REACHABLE: Asc = Asc(0x0d, 0x02);
    pub const GUARD_CHECK_FAILED: Asc = Asc(0x10, 0x01);
    pub const APPLICATION_TAG_CHECK_FAILED: Asc = Asc(0x10, 0x02);
    pub const REFERENCE_TAG_CHECK_FAILED: Asc = Asc(0x10, 0x03);
    pub const UNRECOVERED_READ_ERROR: Asc = Asc(0x11, 0x00);
    pub const PARAMETER_LIST_LENGTH_ERROR: Asc = Asc(0x1a, 0x00);
    pub const MISCOMPARE_DURING_VERIFY: Asc = Asc(0x1d, 0x00);
    pub const INVALID_OPERATION_CODE: Asc = Asc(0x20, 0x00);
    pub const LBA_OUT_OF_RANGE: Asc = Asc(0x21, 0x00);
    pub const INVALID_FIELD_IN_CDB: Asc = Asc(0x24, 0x00);
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Asc = Asc(0x26, 0x00);
    pub const TOO_MANY_TARGET_DESCRIPTORS: Asc = Asc(0x26, 0x06);
    pub const UNSUPPORTED_TARGET_DESCRIPTOR: Asc = Asc(0x26, 0x07);
    pub const TOO_MANY_SEGMENT_DESCRIPTORS: Asc = Asc(0x26, 0x08);
    pub const UNSUPPORTED_SEGMENT_DESCRIPTOR: Asc = Asc(0x26, 0x09);
    pub const UNEXPECTED_INEXACT_SEGMENT: Asc = Asc(0x26, 0x0a);
    pub const INLINE_DATA_LENGTH_EXCEEDED: Asc = Asc(0x26, 0x0b);
    pub const WRITE_PROTECTED: Asc = Asc(0x27, 0x00);
    pub const SOFTWARE_WRITE_PROTECTED: Asc = Asc(0x27, 0x02);
    pub const SPACE_ALLOCATION_FAILED: Asc = Asc(0x27, 0x07);
    pub const POWER_ON_OR_RESET: Asc = Asc(0x29, 0x00);
    pub const MODE_PARAMETERS_CHANGED: Asc = Asc(0x2a, 0x01);
    pub const CAPACITY_DATA_CHANGED: Asc = Asc(0x2a, 0x09);
    pub const MEDIUM_FORMAT_CORRUPTED: Asc = Asc(0x31, 0x00);
    pub const FORMAT_COMMAND_FAILED: Asc = Asc(0x31, 0x01);
    pub const SANITIZE_COMMAND_FAILED: Asc = Asc(0x31, 0x03);
    pub const SOFT_THRESHOLD_REACHED: Asc = Asc(0x38, 0x07);
    pub const SAVING_PARAMETERS_NOT_SUPPORTED: Asc = Asc(0x39, 0x00);
    pub const INTERNAL_TARGET_FAILURE: Asc = Asc(0x44, 0x00);
}

/// SENSE KEY SPECIFIC (SPC-4 4.5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Specific {
    /// SKSV = 0.
    #[default]
    None,
    /// FIELD POINTER: the byte, and the most significant bit of the field, that was wrong.
    Field {
        /// In the CDB, or else in the parameter list.
        in_cdb: bool,
        /// Byte from the start.
        byte: u16,
        /// Bit, if the field is not the whole byte.
        bit: Option<u8>,
    },
    /// PROGRESS INDICATION in 65 536ths.
    Progress(u16),
    /// SEGMENT POINTER, and the segment's number in COMMAND-SPECIFIC INFORMATION (SPC-4 4.5.2.4.5, 5.17.7.4): what in an EXTENDED COPY
    /// was to blame.
    Segment {
        /// The segment descriptor, counted from 0.
        segment: u16,
        /// Byte from the descriptor's start (SD = 1).
        byte: u16,
    },
}

/// What an initiator is told about a failure; turned into bytes by [`Sense::to_bytes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// The key.
    pub key: SenseKey,
    /// The additional sense code and qualifier.
    pub asc: Asc,
    /// INFORMATION: the LBA, or for COMPARE AND WRITE the byte that differs.
    pub information: Option<u64>,
    /// The sense key specific field.
    pub specific: Specific,
    /// Descriptor format (D_SENSE = 1), else fixed.
    pub descriptor: bool,
}

/// Sense data as bytes.
pub type SenseBytes = SmallVec<[u8; 32]>;

impl Sense {
    /// Sense of that key and code, in fixed format, with nothing else.
    pub const fn new(key: SenseKey, asc: Asc) -> Sense {
        Sense { key, asc, information: None, specific: Specific::None, descriptor: false }
    }

    /// Key, additional code and qualifier as people write them: `0Bh/10h/01h`.
    pub fn codes(&self) -> String {
        format!("{:02X}h/{:02X}h/{:02X}h", self.key as u8, self.asc.0, self.asc.1)
    }

    /// The same with INFORMATION.
    pub const fn info(mut self, information: u64) -> Sense {
        self.information = Some(information);
        self
    }

    /// INVALID FIELD IN CDB, with the byte and the field's highest bit.
    pub const fn invalid_field(byte: u16, bit: u8) -> Sense {
        let mut sense = Sense::new(SenseKey::IllegalRequest, Asc::INVALID_FIELD_IN_CDB);
        sense.specific = Specific::Field { in_cdb: true, byte, bit: Some(bit) };
        sense
    }

    /// INVALID FIELD IN PARAMETER LIST, with the byte.
    pub const fn invalid_parameter(byte: u16) -> Sense {
        let mut sense = Sense::new(SenseKey::IllegalRequest, Asc::INVALID_FIELD_IN_PARAMETER_LIST);
        sense.specific = Specific::Field { in_cdb: false, byte, bit: None };
        sense
    }

    /// PARAMETER LIST LENGTH ERROR.
    pub const fn parameter_list_length() -> Sense {
        Sense::new(SenseKey::IllegalRequest, Asc::PARAMETER_LIST_LENGTH_ERROR)
    }

    /// LOGICAL BLOCK ADDRESS OUT OF RANGE.
    pub const fn out_of_range(lba: Lba) -> Sense {
        Sense::new(SenseKey::IllegalRequest, Asc::LBA_OUT_OF_RANGE).info(lba.0)
    }

    /// NOT READY with a PROGRESS INDICATION.
    pub const fn in_progress(asc: Asc, progress: u16) -> Sense {
        let mut sense = Sense::new(SenseKey::NotReady, asc);
        sense.specific = Specific::Progress(progress);
        sense
    }

    /// Current sense data (response code 70h or 72h; SPC-4 4.5.2 and 4.5.3). In fixed format INFORMATION is 32 bits
    /// wide and VALID only if the value fits.
    pub fn to_bytes(&self) -> SenseBytes {
        let specific = self.specific.bytes();
        let mut out = SenseBytes::new();
        if self.descriptor {
            out.extend([0x72, self.key as u8, self.asc.0, self.asc.1, 0, 0, 0, 0]);
            if let Some(information) = self.information {
                out.extend([0x00, 0x0a, 0x80, 0]);
                out.extend(information.to_be_bytes());
            }
            if let Some([high, low]) = self.specific.command_specific() {
                out.extend([0x01, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, high, low]);
            }
            if let Some(specific) = specific {
                out.extend([0x02, 0x06, 0, 0, specific[0], specific[1], specific[2], 0]);
            }
            out[7] = (out.len() - 8) as u8;
        } else {
            let information = self.information.and_then(|i| u32::try_from(i).ok());
            out.extend([0x70 | if information.is_some() { 0x80 } else { 0 }, 0, self.key as u8]);
            out.extend(information.unwrap_or(0).to_be_bytes());
            let [high, low] = self.specific.command_specific().unwrap_or_default();
            out.extend([10, 0, 0, high, low, self.asc.0, self.asc.1, 0]);
            out.extend(specific.unwrap_or([0; 3]));
        }
        out
    }
}

impl Specific {
    fn bytes(self) -> Option<[u8; 3]> {
        match self {
            Specific::None => None,
            Specific::Field { in_cdb, byte, bit } => {
                let [high, low] = byte.to_be_bytes();
                let bit = bit.map_or(0, |b| 0x08 | b & 0x07);
                Some([0x80 | if in_cdb { 0x40 } else { 0 } | bit, high, low])
            }
            Specific::Progress(n) => {
                let [high, low] = n.to_be_bytes();
                Some([0x80, high, low])
            }
            Specific::Segment { byte, .. } => {
                let [high, low] = byte.to_be_bytes();
                Some([0x80 | 0x20, high, low])
            }
        }
    }

    /// The last two bytes of COMMAND-SPECIFIC INFORMATION, if it says something.
    fn command_specific(self) -> Option<[u8; 2]> {
        match self {
            Specific::Segment { segment, .. } => Some(segment.to_be_bytes()),
            Specific::None | Specific::Field { .. } | Specific::Progress(_) => None,
        }
    }
}

/// Why a command does not end with GOOD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// CHECK CONDITION.
    Sense(Sense),
    /// Another status, without sense data.
    Status(Status),
}

impl From<Sense> for Failure {
    fn from(sense: Sense) -> Failure {
        Failure::Sense(sense)
    }
}

/// LOGICAL BLOCK GUARD, APPLICATION TAG or REFERENCE TAG CHECK FAILED.
pub(super) fn check_failed(tag: PiTag) -> Asc {
    match tag {
        PiTag::Guard => Asc::GUARD_CHECK_FAILED,
        PiTag::Application => Asc::APPLICATION_TAG_CHECK_FAILED,
        PiTag::Reference => Asc::REFERENCE_TAG_CHECK_FAILED,
    }
}

/// What an initiator is told about a failed operation on the volume.
///
/// - `Medium` is UNRECOVERED READ ERROR or WRITE ERROR, by what was being done; a lost flush is a write that was lost.
/// - `Corrupt` is MEDIUM FORMAT CORRUPTED: what tells where the blocks are contradicts itself. The medium's error, not the hardware's: a retry is
///   pointless, other blocks may well be fine, and hosts treat it as such.
/// - `Failed` is INTERNAL TARGET FAILURE: nothing that this logical unit says can be relied on any more, until somebody restarts it.
/// - `Locked` is MANUAL INTERVENTION REQUIRED: the blocks are fine, and somebody has to decide who has them.
/// - `Unsupported` is INVALID COMMAND OPERATION CODE, which makes hosts stop asking for it (Linux does so for UNMAP and WRITE SAME).
pub fn from_io_error(error: &IoError, block_size: BlockSize) -> Failure {
    use SenseKey::*;
    let lba = error.at.map(|at| block_size.lba_of(at).0);
    let sense = match error.kind {
        IoErrorKind::Medium => match error.op {
            IoOp::Open | IoOp::Read | IoOp::Map => {
                at(Sense::new(MediumError, Asc::UNRECOVERED_READ_ERROR), lba)
            }
            IoOp::Write | IoOp::Flush | IoOp::Discard | IoOp::Resize | IoOp::Snapshot | IoOp::Close => {
                at(Sense::new(MediumError, Asc::WRITE_ERROR), lba)
            }
        },
        IoErrorKind::NoSpace => Sense::new(DataProtect, Asc::SPACE_ALLOCATION_FAILED),
        IoErrorKind::OutOfRange => at(Sense::new(IllegalRequest, Asc::LBA_OUT_OF_RANGE), lba),
        IoErrorKind::ReadOnly => Sense::new(DataProtect, Asc::WRITE_PROTECTED),
        IoErrorKind::Corrupt => at(Sense::new(MediumError, Asc::MEDIUM_FORMAT_CORRUPTED), lba),
        IoErrorKind::Protection(mismatch) => {
            Sense::new(AbortedCommand, check_failed(mismatch.tag)).info(mismatch.lba.0)
        }
        IoErrorKind::Failed => Sense::new(HardwareError, Asc::INTERNAL_TARGET_FAILURE),
        IoErrorKind::Unsupported => Sense::new(IllegalRequest, Asc::INVALID_OPERATION_CODE),
        IoErrorKind::Unreachable => Sense::new(NotReady, Asc::COMMUNICATION_FAILURE),
        IoErrorKind::Locked => Sense::new(NotReady, Asc::MANUAL_INTERVENTION_REQUIRED),
        IoErrorKind::Cancelled => return Failure::Status(Status::TaskAborted),
    };
    Failure::Sense(sense)
}

fn at(sense: Sense, lba: Option<u64>) -> Sense {
    Sense { information: lba, ..sense }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{units::ByteOffset, volume::PiMismatch};

    #[test]
    fn fixed_sense_holds_an_lba_of_32_bits_and_leaves_out_a_larger_one() {
        let s = Sense::new(SenseKey::MediumError, Asc::UNRECOVERED_READ_ERROR).info(0xfedcba98);
        assert_eq!(
            s.to_bytes()[..],
            [0xf0, 0, 3, 0xfe, 0xdc, 0xba, 0x98, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0]
        );
        let s = s.info(1 << 32);
        assert_eq!(s.to_bytes()[..8], [0x70, 0, 3, 0, 0, 0, 0, 10]);
    }

    #[test]
    fn descriptor_sense_holds_every_lba() {
        let s = Sense {
            descriptor: true,
            ..Sense::new(SenseKey::AbortedCommand, Asc::GUARD_CHECK_FAILED).info(1 << 40)
        };
        assert_eq!(
            s.to_bytes()[..],
            [0x72, 0xb, 0x10, 1, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 1, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn the_field_that_was_wrong_is_pointed_to_in_both_formats() {
        let mut s = Sense::invalid_field(1, 7);
        assert_eq!(s.to_bytes()[15..], [0xcf, 0, 1]);
        s.descriptor = true;
        assert_eq!(s.to_bytes()[7..], [8, 2, 6, 0, 0, 0xcf, 0, 1, 0]);
        assert_eq!(Sense::invalid_parameter(0x102).to_bytes()[15..], [0x80, 1, 2]);
        s.specific = Specific::Segment { segment: 0x0203, byte: 12 };
        assert_eq!(s.to_bytes()[7..], [20, 1, 10, 0, 0, 0, 0, 0, 0, 0, 0, 2, 3, 2, 6, 0, 0, 0xa0, 0, 12, 0]);
        s.descriptor = false;
        assert_eq!(s.to_bytes()[7..], [10, 0, 0, 2, 3, 0x24, 0, 0, 0xa0, 0, 12]);
        assert_eq!(Sense::in_progress(Asc::SANITIZE_IN_PROGRESS, 0x8001).to_bytes()[15..], [0x80, 0x80, 1]);
    }

    #[test]
    fn every_kind_of_error_has_its_sense() {
        let of = |kind, op| match from_io_error(&IoError::new(kind, op).at(ByteOffset(8192)), BlockSize::B512)
        {
            Failure::Sense(s) => (s.key as u8, s.asc.0, s.asc.1, s.information),
            Failure::Status(s) => (0xff, s as u8, 0, None),
        };
        let mismatch = |tag| IoErrorKind::Protection(PiMismatch { lba: Lba(77), tag, expected: 1, found: 2 });
        use IoErrorKind::*;
        assert_eq!(of(Medium, IoOp::Read), (3, 0x11, 0, Some(16)));
        assert_eq!(of(Medium, IoOp::Map), (3, 0x11, 0, Some(16)));
        assert_eq!(of(Medium, IoOp::Write), (3, 0x0c, 0, Some(16)));
        assert_eq!(of(Medium, IoOp::Flush), (3, 0x0c, 0, Some(16)));
        assert_eq!(of(NoSpace, IoOp::Write), (7, 0x27, 7, None));
        assert_eq!(of(OutOfRange, IoOp::Read), (5, 0x21, 0, Some(16)));
        assert_eq!(of(ReadOnly, IoOp::Write), (7, 0x27, 0, None));
        assert_eq!(of(Corrupt, IoOp::Read), (3, 0x31, 0, Some(16)));
        assert_eq!(of(mismatch(PiTag::Guard), IoOp::Read), (0xb, 0x10, 1, Some(77)));
        assert_eq!(of(mismatch(PiTag::Application), IoOp::Read), (0xb, 0x10, 2, Some(77)));
        assert_eq!(of(mismatch(PiTag::Reference), IoOp::Read), (0xb, 0x10, 3, Some(77)));
        assert_eq!(of(Failed, IoOp::Flush), (4, 0x44, 0, None));
        assert_eq!(of(Unsupported, IoOp::Discard), (5, 0x20, 0, None));
        assert_eq!(of(Unreachable, IoOp::Read), (2, 8, 0, None));
        assert_eq!(of(Locked, IoOp::Write), (2, 4, 3, None));
        assert_eq!(of(Cancelled, IoOp::Read), (0xff, 0x40, 0, None));
    }
}
