//! The protection information tuple (SBC-4 4.21.3): eight bytes, big-endian, that go with one block.
//!
//! | bytes | tag |
//! | --- | --- |
//! | 0–1 | LOGICAL BLOCK GUARD: CRC-16/T10-DIF of the block |
//! | 2–3 | LOGICAL BLOCK APPLICATION TAG |
//! | 4–7 | LOGICAL BLOCK REFERENCE TAG |
//!
//! All ones is the escape: "no protection information", nothing is checked. In the sidecar tuples stand inverted
//! ([`invert`]), so that bytes that were never written, zeros, read as the escape.

use crate::units::Lba;

pub use crate::volume::PiType;

/// Bytes of a tuple.
pub const TUPLE_LEN: usize = 8;

/// The three tags of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// LOGICAL BLOCK GUARD.
    pub guard: u16,
    /// LOGICAL BLOCK APPLICATION TAG.
    pub app: u16,
    /// LOGICAL BLOCK REFERENCE TAG.
    pub reference: u32,
}

impl PiType {
    /// Every type, by number.
    pub const ALL: [PiType; 3] = [PiType::Type1, PiType::Type2, PiType::Type3];

    /// Its number, as the sidecar's header has it: 1, 2 or 3.
    pub fn number(self) -> u8 {
        match self {
            PiType::Type1 => 1,
            PiType::Type2 => 2,
            PiType::Type3 => 3,
        }
    }

    /// The type of that number, if there is one.
    pub fn from_number(n: u8) -> Option<PiType> {
        PiType::ALL.into_iter().find(|kind| kind.number() == n)
    }

    /// The reference tag that this handler gives a block: types 1 and 2 the low 32 bits of its LBA, type 3 zero.
    pub fn reference(self, lba: Lba) -> u32 {
        match self {
            PiType::Type1 | PiType::Type2 => lba.0 as u32,
            PiType::Type3 => 0,
        }
    }
}

impl std::fmt::Display for PiType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PiType::Type1 => "type1",
            PiType::Type2 => "type2",
            PiType::Type3 => "type3",
        })
    }
}

/// Words that name no type of protection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a type of protection (type1, type2, type3)")]
pub struct UnknownPiType(pub String);

impl std::str::FromStr for PiType {
    type Err = UnknownPiType;

    fn from_str(s: &str) -> Result<PiType, UnknownPiType> {
        PiType::ALL.into_iter().find(|kind| kind.to_string() == s).ok_or_else(|| UnknownPiType(s.to_owned()))
    }
}

impl Tuple {
    /// "No protection information": all ones.
    pub const ESCAPE: Tuple = Tuple { guard: 0xffff, app: 0xffff, reference: 0xffff_ffff };

    /// The tuple that this handler gives a block: application tag 0.
    pub fn new(kind: PiType, guard: u16, lba: Lba) -> Tuple {
        Tuple { guard, app: 0, reference: kind.reference(lba) }
    }

    /// As it travels.
    pub fn to_bytes(self) -> [u8; TUPLE_LEN] {
        let mut out = [0; TUPLE_LEN];
        out[..2].copy_from_slice(&self.guard.to_be_bytes());
        out[2..4].copy_from_slice(&self.app.to_be_bytes());
        out[4..].copy_from_slice(&self.reference.to_be_bytes());
        out
    }

    /// From its bytes.
    pub fn from_bytes(b: [u8; TUPLE_LEN]) -> Tuple {
        Tuple {
            guard: u16::from_be_bytes([b[0], b[1]]),
            app: u16::from_be_bytes([b[2], b[3]]),
            reference: u32::from_be_bytes([b[4], b[5], b[6], b[7]]),
        }
    }

    /// Whether nothing is checked for a block with this tuple (SBC-4 4.21.2.3, 4.21.2.5).
    pub fn is_escape(self, kind: PiType) -> bool {
        match kind {
            PiType::Type1 | PiType::Type2 => self.app == 0xffff,
            PiType::Type3 => self.app == 0xffff && self.reference == 0xffff_ffff,
        }
    }
}

/// Between the form that travels and the form that is stored: every bit inverted.
pub fn invert(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|b| *b = !*b);
}

/// The tuples of a run of bytes in the form that travels. A length that is no multiple of 8 leaves a rest unread.
pub fn tuples(bytes: &[u8]) -> impl Iterator<Item = Tuple> + '_ {
    bytes.as_chunks::<TUPLE_LEN>().0.iter().map(|b| Tuple::from_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tuple_is_big_endian_and_zeros_on_disk_are_the_escape() {
        let t = Tuple { guard: 0x1234, app: 0x5678, reference: 0x9abc_def0 };
        assert_eq!(t.to_bytes(), [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0]);
        assert_eq!(Tuple::from_bytes(t.to_bytes()), t);
        let mut stored = [0; 8];
        invert(&mut stored);
        assert_eq!(Tuple::from_bytes(stored), Tuple::ESCAPE);
    }

    #[test]
    fn types_1_and_2_escape_by_the_application_tag_and_type_3_by_both_tags() {
        let app = Tuple { guard: 1, app: 0xffff, reference: 7 };
        assert!(app.is_escape(PiType::Type1) && !app.is_escape(PiType::Type3));
        let both = Tuple { reference: 0xffff_ffff, ..app };
        assert!(both.is_escape(PiType::Type1) && both.is_escape(PiType::Type3));
        let reference = Tuple { app: 0, ..both };
        assert!(!reference.is_escape(PiType::Type1) && !reference.is_escape(PiType::Type3));
    }

    #[test]
    fn the_reference_tag_of_type_1_is_the_low_half_of_the_lba() {
        assert_eq!(Tuple::new(PiType::Type1, 0, Lba(0x1_2345_6789)).reference, 0x2345_6789);
        // Block FFFFFFFFh of type 1 is no escape: its application tag is 0.
        assert!(!Tuple::new(PiType::Type1, 0xffff, Lba(0xffff_ffff)).is_escape(PiType::Type1));
    }
}
