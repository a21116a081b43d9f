//! The parameter list of EXTENDED COPY with list identifiers of one byte (SPC-4 6.4, service action LID1): the limits, the parser, and the
//! pages that tell initiators of the limits.
//!
//! Pure functions over bytes of an initiator, who is believed nothing: a list that is parsed has descriptors of the types that are
//! implemented alone, as many as are allowed, and each whole. Whether the units exist and the blocks are theirs is for the target to see.

use super::{
    neighbour::Designator,
    sense::{Asc, Sense, SenseKey},
};
use crate::units::{BlockSize, Lba};

/// CSCD (target) descriptors of a list at most.
pub(super) const MAX_UNITS: u16 = 64;
/// Segment descriptors of a list at most.
pub(super) const MAX_SEGMENTS: u16 = 64;
/// Bytes of all descriptors of a list at most.
pub(super) const MAX_DESCRIPTORS: u32 =
    MAX_UNITS as u32 * UNIT_LEN as u32 + MAX_SEGMENTS as u32 * SEGMENT_LEN as u32;
/// Bytes that one segment moves at most. With [`MAX_SEGMENTS`] that is 2 GiB a command, which ends before initiators give it up.
pub(super) const MAX_SEGMENT_BYTES: u64 = 32 << 20;
/// Copies that one logical unit does at the same time.
pub(super) const MAX_COPIES: u8 = 4;

/// Identification descriptor CSCD descriptor (SPC-4 6.4.5.2).
const IDENTIFICATION: u8 = 0xe4;
/// Block device to block device (SPC-4 6.4.6.4).
const BLOCK_TO_BLOCK: u8 = 0x02;
const HEADER_LEN: usize = 16;
const UNIT_LEN: usize = 32;
const SEGMENT_LEN: usize = 28;
/// Bytes of the longest list that can be good.
pub(super) const LONGEST: usize = HEADER_LEN + MAX_DESCRIPTORS as usize;

/// What an initiator wants to have copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CopyList {
    /// LIST IDENTIFIER, unless LIST ID USAGE says that there is none.
    pub id: Option<u8>,
    /// Nobody will ask how it went, if it goes well (LIST ID USAGE = 10b).
    pub discard: bool,
    /// The units that segments name by their index.
    pub units: Vec<Unit>,
    /// What is copied, one after another.
    pub segments: Vec<Segment>,
}

/// A source or destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// Who it is; `None` for a null device (NUL = 1).
    pub who: Option<Designator>,
    /// DISK BLOCK LENGTH, in bytes.
    pub block_length: u32,
    /// Byte of the list at which the descriptor starts.
    pub at: u16,
}

/// A run of blocks to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// SOURCE CSCD DESCRIPTOR ID.
    pub source: u16,
    /// DESTINATION CSCD DESCRIPTOR ID.
    pub destination: u16,
    /// BLOCK DEVICE NUMBER OF BLOCKS.
    pub blocks: u16,
    /// They are the destination's blocks (DC = 1), and not the source's.
    pub of_destination: bool,
    /// SOURCE BLOCK DEVICE LOGICAL BLOCK ADDRESS.
    pub from: Lba,
    /// DESTINATION BLOCK DEVICE LOGICAL BLOCK ADDRESS.
    pub to: Lba,
}

fn refused(asc: Asc) -> Sense {
    Sense::new(SenseKey::IllegalRequest, asc)
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
}

/// Parses a list that has `len` bytes by its CDB, of which the first [`LONGEST`] are given.
///
/// # Errors
/// Sense with ILLEGAL REQUEST (SPC-4 6.4.2 to 6.4.6); nothing has been copied then.
/// - PARAMETER LIST LENGTH ERROR: a header or descriptor is cut, or there are more bytes of descriptors than allowed.
/// - INLINE DATA LENGTH EXCEEDED, TOO MANY TARGET or SEGMENT DESCRIPTORS, UNSUPPORTED TARGET or SEGMENT DESCRIPTOR TYPE CODE.
/// - INVALID FIELD IN PARAMETER LIST with the byte.
pub(super) fn parse(list: &[u8], len: usize) -> Result<CopyList, Sense> {
    let header = list.get(..HEADER_LEN).ok_or(Sense::parameter_list_length())?;
    let (units_len, segments_len) = (be(&header[2..4]), be(&header[8..12]));
    if be(&header[12..16]) > 0 {
        return Err(refused(Asc::INLINE_DATA_LENGTH_EXCEEDED));
    }
    let descriptors = units_len + segments_len;
    if descriptors > u64::from(MAX_DESCRIPTORS) || HEADER_LEN as u64 + descriptors > len as u64 {
        return Err(Sense::parameter_list_length());
    }
    let body =
        list.get(HEADER_LEN..HEADER_LEN + descriptors as usize).ok_or(Sense::parameter_list_length())?;
    let id = match header[1] >> 3 & 3 {
        0 | 2 => Some(header[0]),
        3 if header[0] == 0 => None,
        3 => return Err(Sense::invalid_parameter(0)),
        _ => return Err(Sense::invalid_parameter(1)),
    };
    let (units, segments) = body.split_at(units_len as usize);
    Ok(CopyList {
        id,
        discard: header[1] >> 3 & 3 != 0,
        units: parse_units(units)?,
        segments: parse_segments(segments, HEADER_LEN + units.len())?,
    })
}

fn parse_units(mut bytes: &[u8]) -> Result<Vec<Unit>, Sense> {
    let mut out = Vec::new();
    let mut at = HEADER_LEN;
    while let Some(kind) = bytes.first() {
        if out.len() == usize::from(MAX_UNITS) {
            return Err(refused(Asc::TOO_MANY_TARGET_DESCRIPTORS));
        }
        if *kind != IDENTIFICATION {
            return Err(refused(Asc::UNSUPPORTED_TARGET_DESCRIPTOR));
        }
        let (d, rest) = bytes.split_at_checked(UNIT_LEN).ok_or(Sense::parameter_list_length())?;
        let wrong = |byte: usize| Err(Sense::invalid_parameter((at + byte) as u16));
        // PERIPHERAL DEVICE TYPE other than that of a disk. LU ID TYPE means nothing in this descriptor (SPC-4 6.4.5.2).
        if d[1] & 0x1f != 0 {
            return wrong(1);
        }
        let null = d[1] & 0x20 != 0;
        if !null && d[5] & 0x30 != 0 {
            return wrong(5); // ASSOCIATION: a port's or a device's name is nobody's here
        }
        let value = d[8..28].get(..usize::from(d[7]));
        let who = match value {
            _ if null => None,
            Some(value) if !value.is_empty() => {
                Some(Designator { code_set: d[4] & 0x0f, kind: d[5] & 0x0f, value: value.to_vec() })
            }
            _ => return wrong(7),
        };
        out.push(Unit { who, block_length: be(&d[29..32]) as u32, at: at as u16 });
        (bytes, at) = (rest, at + UNIT_LEN);
    }
    Ok(out)
}

fn parse_segments(mut bytes: &[u8], mut at: usize) -> Result<Vec<Segment>, Sense> {
    let mut out = Vec::new();
    while let Some(kind) = bytes.first() {
        if out.len() == usize::from(MAX_SEGMENTS) {
            return Err(refused(Asc::TOO_MANY_SEGMENT_DESCRIPTORS));
        }
        if *kind != BLOCK_TO_BLOCK {
            return Err(refused(Asc::UNSUPPORTED_SEGMENT_DESCRIPTOR));
        }
        let (d, rest) = bytes.split_at_checked(SEGMENT_LEN).ok_or(Sense::parameter_list_length())?;
        if be(&d[2..4]) != SEGMENT_LEN as u64 - 4 {
            return Err(Sense::invalid_parameter((at + 2) as u16));
        }
        out.push(Segment {
            source: be(&d[4..6]) as u16,
            destination: be(&d[6..8]) as u16,
            blocks: be(&d[10..12]) as u16,
            of_destination: d[1] & 0x02 != 0,
            from: Lba(be(&d[12..20])),
            to: Lba(be(&d[20..28])),
        });
        (bytes, at) = (rest, at + SEGMENT_LEN);
    }
    Ok(out)
}

/// Log2 of the bytes in which segments are counted: a block.
fn granularity(block_size: BlockSize) -> u8 {
    block_size.shift() as u8
}

/// The parameter data of RECEIVE COPY OPERATING PARAMETERS (SPC-4 6.21): the limits, SNLID = 1, no inline and no held data.
pub(super) fn operating_parameters(block_size: BlockSize) -> Vec<u8> {
    let mut d = vec![0; 46];
    d[4] = 0x01;
    d[8..10].copy_from_slice(&MAX_UNITS.to_be_bytes());
    d[10..12].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    d[12..16].copy_from_slice(&MAX_DESCRIPTORS.to_be_bytes());
    d[16..20].copy_from_slice(&(MAX_SEGMENT_BYTES as u32).to_be_bytes());
    d[35] = MAX_COPIES;
    d[36] = MAX_COPIES;
    d[37] = granularity(block_size);
    d[43] = 2;
    d[44..46].copy_from_slice(&[BLOCK_TO_BLOCK, IDENTIFICATION]);
    let available = (d.len() - 4) as u32;
    d[..4].copy_from_slice(&available.to_be_bytes());
    d
}

/// The body of the third-party copy page, 8Fh (SPC-4 7.8.17): commands, parameter data, descriptors, general copy operations.
pub(super) fn third_party_copy(block_size: BlockSize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |code: u16, body: &[u8]| {
        let len = body.len().next_multiple_of(4);
        out.extend(code.to_be_bytes());
        out.extend((len as u16).to_be_bytes());
        out.extend(body);
        out.resize(out.len() + len - body.len(), 0);
    };
    // COMMANDS SUPPORTED LIST LENGTH; operation code, service actions.
    put(0x0001, &[9, 0x83, 1, 0x00, 0x84, 4, 0x00, 0x01, 0x03, 0x04]);
    let mut data = [0; 28];
    data[4..6].copy_from_slice(&MAX_UNITS.to_be_bytes());
    data[6..8].copy_from_slice(&MAX_SEGMENTS.to_be_bytes());
    data[8..12].copy_from_slice(&MAX_DESCRIPTORS.to_be_bytes());
    put(0x0004, &data);
    put(0x0008, &[2, BLOCK_TO_BLOCK, IDENTIFICATION]);
    let mut general = [0; 32];
    general[3] = MAX_COPIES;
    general[7] = MAX_COPIES;
    general[8..12].copy_from_slice(&(MAX_SEGMENT_BYTES as u32).to_be_bytes());
    general[12] = granularity(block_size);
    put(0x8001, &general);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit() -> Vec<u8> {
        let mut d = vec![0; 32];
        d[0] = 0xe4;
        d[4..16].copy_from_slice(&[1, 3, 0, 8, 0x31, 2, 3, 4, 5, 6, 7, 8]);
        d[29..32].copy_from_slice(&[0, 2, 0]);
        d
    }

    fn segment() -> Vec<u8> {
        let mut d = vec![0; 28];
        (d[0], d[1], d[3], d[7], d[11], d[19], d[27]) = (2, 2, 0x18, 1, 8, 16, 32);
        d
    }

    fn list(flags: u8, units: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
        let (units, segments) = (units.concat(), segments.concat());
        let mut out = vec![7, flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        out[2..4].copy_from_slice(&(units.len() as u16).to_be_bytes());
        out[8..12].copy_from_slice(&(segments.len() as u32).to_be_bytes());
        [out, units, segments].concat()
    }

    fn codes(list: &[u8]) -> (u8, u8, u8) {
        let sense = parse(&list[..list.len().min(LONGEST)], list.len()).unwrap_err();
        (sense.key as u8, sense.asc.0, sense.asc.1)
    }

    #[test]
    fn a_good_list_is_what_its_fields_say() {
        let parsed = parse(&list(0x10, &[unit(), unit()], &[segment()]), 16 + 64 + 28).unwrap();
        assert_eq!((parsed.id, parsed.discard, parsed.units.len()), (Some(7), true, 2));
        let who = Designator { code_set: 1, kind: 3, value: vec![0x31, 2, 3, 4, 5, 6, 7, 8] };
        assert_eq!(parsed.units[1], Unit { who: Some(who), block_length: 512, at: 48 });
        let (from, to) = (Lba(16), Lba(32));
        let wanted = Segment { source: 0, destination: 1, blocks: 8, of_destination: true, from, to };
        assert_eq!(parsed.segments, [wanted]);
    }

    #[test]
    fn a_list_cut_anywhere_is_too_short() {
        let good = list(0, &[unit()], &[segment()]);
        for len in 0..good.len() {
            assert_eq!(codes(&good[..len]), (5, 0x1a, 0), "{len}");
        }
        assert!(parse(&good, good.len()).is_ok());
    }

    #[test]
    fn descriptors_beyond_the_limits_and_of_other_types_are_refused_by_their_names() {
        let many = |n, d: Vec<u8>| vec![d; n];
        let (units, segments) = (usize::from(MAX_UNITS), usize::from(MAX_SEGMENTS));
        assert!(parse(&list(0, &many(units, unit()), &many(segments, segment())), LONGEST).is_ok());
        assert_eq!(codes(&list(0, &many(units + 1, unit()), &[segment()])), (5, 0x26, 6));
        assert_eq!(codes(&list(0, &[unit()], &many(segments + 1, segment()))), (5, 0x26, 8));
        let both = list(0, &many(units + 1, unit()), &many(segments + 1, segment()));
        assert_eq!(codes(&both), (5, 0x1a, 0));
        let mut other = unit();
        other[0] = 0xe0;
        assert_eq!(codes(&list(0, &[other], &[segment()])), (5, 0x26, 7));
        let mut other = segment();
        other[0] = 0x03;
        assert_eq!(codes(&list(0, &[unit()], &[other])), (5, 0x26, 9));
        let mut inline = list(0, &[unit()], &[segment()]);
        inline[15] = 1;
        assert_eq!(codes(&inline), (5, 0x26, 0x0b));
    }

    #[test]
    fn wrong_fields_are_pointed_to() {
        let byte = |list: Vec<u8>| parse(&list, list.len()).unwrap_err().to_bytes()[15..].to_vec();
        let at = |n: u8| vec![0x80, 0, n];
        assert_eq!(byte(list(0x08, &[unit()], &[segment()])), at(1), "LIST ID USAGE 01b");
        assert_eq!(byte(list(0x18, &[unit()], &[segment()])), at(0), "no list identifier, and yet one");
        let changed = |i: usize, value: u8| {
            let mut d = unit();
            d[i] = value;
            list(0, &[d], &[segment()])
        };
        assert!(parse(&changed(1, 0x80), 76).is_ok(), "LU ID TYPE is ignored");
        assert_eq!(byte(changed(1, 0x01)), at(17), "a tape");
        assert_eq!(byte(changed(5, 0x13)), at(21), "a port's designator");
        assert_eq!(byte(changed(7, 21)), at(23), "a designator longer than its place");
        assert_eq!(byte(changed(7, 0)), at(23), "an empty designator");
        let mut d = segment();
        d[3] = 0x14;
        assert_eq!(byte(list(0, &[unit()], &[d])), at(16 + 32 + 2));
        let null = changed(1, 0x20);
        assert_eq!(parse(&null, null.len()).unwrap().units[0].who, None);
    }

    #[test]
    fn the_operating_parameters_and_the_page_name_the_same_limits() {
        let d = operating_parameters(BlockSize::B4096);
        assert_eq!(be(&d[..4]) as usize, d.len() - 4);
        assert_eq!((d[4], be(&d[8..10]), be(&d[10..12]), be(&d[12..16])), (1, 64, 64, 3840));
        assert_eq!((be(&d[16..20]), d[35], d[36], d[37], &d[43..]), (32 << 20, 4, 4, 12, &[2, 2, 0xe4][..]));
        let page = third_party_copy(BlockSize::B512);
        let mut at = 0;
        let mut codes = vec![];
        while at < page.len() {
            codes.push(be(&page[at..at + 2]));
            at += 4 + be(&page[at + 2..at + 4]) as usize;
        }
        assert_eq!((at, codes), (page.len(), vec![1, 4, 8, 0x8001]));
        assert_eq!(page.len() % 4, 0);
    }
}
