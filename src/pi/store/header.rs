//! The sidecar's header: one sector, kept twice, written alternately. Called by [`super::Sidecar`].
//!
//! All numbers are big-endian. Offsets in bytes within the copy:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `TCMU-DIF` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | reserved, 0 |
//! | 16 | 8 | incompatible features: an unknown bit refuses the sidecar |
//! | 24 | 8 | compatible features: an unknown bit is left alone. Bit 0: tags are initiators' own; bit 1: FORMAT UNIT has chosen the type; bit 2: FORMAT UNIT has hidden it from initiators |
//! | 32 | 8 | generation: the valid copy with the higher one counts |
//! | 40 | 4 | block size in bytes: 512 or 4096 |
//! | 44 | 1 | type of protection: 1, 2 or 3 |
//! | 45 | 1 | state: 0 clean, 1 in use |
//! | 46 | 2 | format of the image: 0 not told, 1 raw, 2 qcow2 |
//! | 48 | 8 | capacity of the LUN in blocks |
//! | 56 | 16 | UUID of the sidecar, random |
//! | 72 | 8 | stamp at clean close: size of the image's file |
//! | 80 | 8 | stamp: time of its last modification, seconds since 1970 (signed) |
//! | 88 | 4 | stamp: nanoseconds |
//! | 92 | 4 | log2 of the bytes of data in a region of the intent map |
//! | 96 | 8 | where the intent map starts |
//! | 104 | 8 | bytes kept for it |
//! | 112 | 8 | where the tuples start |
//! | 120 | 8 | where the journal starts, if incompatible feature bit 0 says that there is one |
//! | 128 | 8 | bytes kept for it |
//! | 136 | 372 | reserved, 0: what later features need has a feature bit of its own |
//! | 508 | 4 | CRC-32C of bytes 0–507 |

use crc_fast::{CrcAlgorithm, checksum};
use uuid::Uuid;

use super::{Stamp, StoreError};
use crate::{
    pi::tuple::PiType,
    units::{BlockSize, Blocks},
};

/// Bytes of one copy: a sector, so that a disk tears between copies and not within one.
pub(super) const HEADER_LEN: usize = 512;
/// Where the two copies stand.
pub(super) const COPIES: [u64; 2] = [0, 4096];

const MAGIC: [u8; 8] = *b"TCMU-DIF";
const VERSION: u32 = 1;
/// Incompatible feature: there is a journal, and what it claims comes before the tuples.
const JOURNAL: u64 = 1;
/// Incompatible features that this version knows.
const KNOWN_INCOMPATIBLE: u64 = JOURNAL;
/// The smallest journal: what a write of 1 MiB of the smallest blocks needs.
const LEAST_JOURNAL: u64 = 64 << 10;
/// Compatible feature: initiators have written tuples, so application tags (and the reference tags of types 2 and 3) are
/// not known to be ours.
pub(super) const INITIATOR_TAGS: u64 = 1 << 0;
/// Compatible feature: an initiator's FORMAT UNIT has chosen the type, whatever the configuration says.
pub(super) const FORMATTED: u64 = 1 << 1;
/// Compatible feature: FORMAT UNIT has turned protection off as far as initiators see.
pub(super) const HIDDEN: u64 = 1 << 2;

/// Which format the image has, as the header keeps it; for people, and to tell a swapped image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ImageFormat {
    /// Not told.
    #[default]
    Unknown,
    /// Raw.
    Raw,
    /// qcow2.
    Qcow2,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub compatible: u64,
    pub generation: u64,
    pub block_size: BlockSize,
    pub kind: PiType,
    pub in_use: bool,
    pub format: ImageFormat,
    pub capacity: Blocks,
    pub uuid: Uuid,
    pub stamp: Stamp,
    pub region_shift: u32,
    pub map_offset: u64,
    pub map_len: u64,
    pub tuple_offset: u64,
    /// The journal's offset and length, in a sidecar of that mode.
    pub journal: Option<(u64, u64)>,
}

/// What one copy turned out to be.
#[derive(Debug)]
pub(super) enum Copy {
    Good(Header),
    /// Of another make: no magic.
    Foreign,
    /// Ours, and damaged.
    Damaged,
    /// Ours and whole, and not for this version.
    Refused(StoreError),
}

impl Header {
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &VERSION.to_be_bytes());
        put(16, &if self.journal.is_some() { JOURNAL } else { 0 }.to_be_bytes());
        put(24, &self.compatible.to_be_bytes());
        put(32, &self.generation.to_be_bytes());
        put(40, &(self.block_size.bytes() as u32).to_be_bytes());
        put(44, &[self.kind.number(), u8::from(self.in_use)]);
        let format: u16 = match self.format {
            ImageFormat::Unknown => 0,
            ImageFormat::Raw => 1,
            ImageFormat::Qcow2 => 2,
        };
        put(46, &format.to_be_bytes());
        put(48, &self.capacity.0.to_be_bytes());
        put(56, self.uuid.as_bytes());
        put(72, &self.stamp.size.to_be_bytes());
        put(80, &self.stamp.mtime.0.to_be_bytes());
        put(88, &self.stamp.mtime.1.to_be_bytes());
        put(92, &self.region_shift.to_be_bytes());
        put(96, &self.map_offset.to_be_bytes());
        put(104, &self.map_len.to_be_bytes());
        put(112, &self.tuple_offset.to_be_bytes());
        if let Some((offset, len)) = self.journal {
            put(120, &offset.to_be_bytes());
            put(128, &len.to_be_bytes());
        }
        let crc = crc_of(&b);
        b[508..].copy_from_slice(&crc.to_be_bytes());
        b
    }

    /// Judges one copy. The CRC comes first, so that what is said about the fields is true of them.
    pub fn from_bytes(b: &[u8; HEADER_LEN]) -> Copy {
        if b[..8] != MAGIC {
            return Copy::Foreign;
        }
        if be32(b, 508) != crc_of(b) {
            return Copy::Damaged;
        }
        if be32(b, 8) != VERSION {
            return Copy::Refused(StoreError::Version(be32(b, 8)));
        }
        let unknown = be64(b, 16) & !KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            return Copy::Refused(StoreError::Features(unknown));
        }
        let Some(kind) = PiType::from_number(b[44]) else {
            return Copy::Refused(StoreError::UnknownType(b[44]));
        };
        let (Some(block_size), 0 | 1) = (BlockSize::new(u64::from(be32(b, 40))), b[45]) else {
            return Copy::Damaged;
        };
        let format = match b[47] {
            1 => ImageFormat::Raw,
            2 => ImageFormat::Qcow2,
            _ => ImageFormat::Unknown,
        };
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&b[56..72]);
        let header = Header {
            compatible: be64(b, 24),
            generation: be64(b, 32),
            block_size,
            kind,
            in_use: b[45] == 1,
            format,
            capacity: Blocks(be64(b, 48)),
            uuid: Uuid::from_bytes(uuid),
            stamp: Stamp { size: be64(b, 72), mtime: (be64(b, 80) as i64, be32(b, 88)) },
            region_shift: be32(b, 92),
            map_offset: be64(b, 96),
            map_len: be64(b, 104),
            tuple_offset: be64(b, 112),
            journal: (be64(b, 16) & JOURNAL != 0).then(|| (be64(b, 120), be64(b, 128))),
        };
        if header.is_sane() { Copy::Good(header) } else { Copy::Damaged }
    }

    /// Whether the parts have room and do not overlap, so that no arithmetic on them overflows.
    fn is_sane(&self) -> bool {
        const LIMIT: u64 = 1 << 62;
        let bytes = self.capacity.to_bytes(self.block_size);
        let map_end = self.map_offset.checked_add(self.map_len);
        (12..=48).contains(&self.region_shift)
            && bytes.is_some_and(|n| {
                n < LIMIT && n.div_ceil(1 << self.region_shift) <= self.map_len.saturating_mul(8)
            })
            && self.map_offset.is_multiple_of(4096)
            && self.map_offset > COPIES[1]
            && self.map_len.is_multiple_of(4096)
            && self.map_len <= 1 << 30
            && self.tuple_offset.is_multiple_of(4096)
            && self.tuple_offset < LIMIT
            && map_end.is_some_and(|end| {
                end <= self.tuple_offset
                    && self.journal.is_none_or(|(offset, len)| {
                        offset.is_multiple_of(4096)
                            && len.is_multiple_of(4096)
                            && (LEAST_JOURNAL..=1 << 30).contains(&len)
                            && end <= offset
                            && offset.checked_add(len).is_some_and(|end| end <= self.tuple_offset)
                    })
            })
    }
}

fn crc_of(b: &[u8; HEADER_LEN]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, &b[..508]) as u32
}

fn be32(b: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut n = [0; 4];
    n.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(n)
}

fn be64(b: &[u8; HEADER_LEN], at: usize) -> u64 {
    let mut n = [0; 8];
    n.copy_from_slice(&b[at..at + 8]);
    u64::from_be_bytes(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            compatible: 5,
            generation: 7,
            block_size: BlockSize::B4096,
            kind: PiType::Type3,
            in_use: true,
            format: ImageFormat::Qcow2,
            capacity: Blocks(12345),
            uuid: Uuid::from_u128(0x1234),
            stamp: Stamp { size: 99, mtime: (-5, 6) },
            region_shift: 26,
            map_offset: 65536,
            map_len: 65536,
            tuple_offset: 1 << 20,
            journal: None,
        }
    }

    fn journalled() -> Header {
        Header { journal: Some((1 << 20, 8 << 20)), tuple_offset: 9 << 20, ..header() }
    }

    #[test]
    fn a_header_survives_the_round_trip_and_any_flipped_bit_is_seen() {
        let bytes = header().to_bytes();
        assert!(matches!(Header::from_bytes(&bytes), Copy::Good(h) if h == header()));
        let journal = journalled().to_bytes();
        assert!(matches!(Header::from_bytes(&journal), Copy::Good(h) if h == journalled()));
        assert_eq!(journal[16..24], [0, 0, 0, 0, 0, 0, 0, 1], "an incompatible feature");
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(Header::from_bytes(&bytes), Copy::Foreign | Copy::Damaged), "bit {bit}");
        }
    }

    fn sealed(change: impl FnOnce(&mut [u8; HEADER_LEN])) -> Copy {
        resealed(&header(), change)
    }

    fn resealed(header: &Header, change: impl FnOnce(&mut [u8; HEADER_LEN])) -> Copy {
        let mut bytes = header.to_bytes();
        change(&mut bytes);
        let crc = crc_of(&bytes);
        bytes[508..].copy_from_slice(&crc.to_be_bytes());
        Header::from_bytes(&bytes)
    }

    #[test]
    fn a_newer_version_an_unknown_feature_and_a_later_type_are_refused_by_name() {
        assert!(matches!(sealed(|b| b[11] = 2), Copy::Refused(StoreError::Version(2))));
        assert!(matches!(sealed(|b| b[23] = 4), Copy::Refused(StoreError::Features(4))));
        assert!(matches!(sealed(|b| b[44] = 4), Copy::Refused(StoreError::UnknownType(4))));
        assert!(
            matches!(sealed(|b| b[31] = 0xff), Copy::Good(_)),
            "a compatible feature is no reason to refuse"
        );
    }

    #[test]
    fn a_sealed_header_that_makes_no_sense_is_damaged() {
        for (at, value) in [(43, 7), (45, 2), (48, 0xff), (95, 90), (104, 0xff), (112, 0xff), (119, 1)] {
            assert!(matches!(sealed(|b| b[at] = value), Copy::Damaged), "{at}");
        }
        // A journal over the map, over the tuples, of no length, off its page.
        for (at, value) in [(125, 1), (133, 0xf0), (133, 0), (127, 1), (128, 0xff)] {
            assert!(matches!(resealed(&journalled(), |b| b[at] = value), Copy::Damaged), "journal {at}");
        }
    }
}
