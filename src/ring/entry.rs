//! One entry of the ring, parsed: what `target_core_user.c` queued, with every count and offset checked.

use std::rc::Rc;

use smallvec::SmallVec;
use tcmu_sys as abi;
use zerocopy::{
    FromBytes, Immutable, KnownLayout,
    little_endian::{U16, U32, U64},
};

use super::{RingError, record::Once};
use crate::sys::{
    mem::{Mapping, Sg},
    pool::Pooled,
};

/// A command descriptor block as it came.
pub type Cdb = SmallVec<[u8; 32]>;

/// Something that the kernel put into the ring.
#[derive(Debug)]
pub enum Entry {
    /// A SCSI command.
    Command(Pooled<Command>),
    /// A task management request.
    Tmr(Tmr),
    /// An operation that nobody told us of; it is answered with TCMU_UFLAG_UNKNOWN_OP.
    Unknown {
        /// Its command id.
        id: u16,
        /// The operation.
        op: u8,
    },
}

/// A SCSI command with its data, which lies in the shared data area.
#[derive(Debug)]
pub struct Command {
    /// The kernel's name for it, 1–65535.
    pub id: u16,
    /// The CDB, cut to the length that its operation code tells.
    pub cdb: Cdb,
    /// Data-out, or room for data-in.
    pub data: Sg,
    /// The other direction of a bidirectional command.
    pub bidi: Sg,
    /// Protection information (`iov_dif`), where the kernel delivers it: out with data-out, room for it with data-in.
    pub dif: Sg,
    /// For a command that can be executed only once, where a record is kept.
    pub once: Option<Once>,
}

/// A task management request: the kernel has given these commands up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmr {
    /// TCMU_TMR_*.
    pub kind: u8,
    /// The commands concerned.
    pub ids: Vec<u16>,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) len_op: U32,
    pub(super) cmd_id: U16,
    pub(super) kflags: u8,
    pub(super) uflags: u8,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RequestBytes {
    iov_cnt: U32,
    iov_bidi_cnt: U32,
    iov_dif_cnt: U32,
    _align: U32,
    cdb_off: U64,
    _pad: [U64; 2],
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct TmrBytes {
    kind: u8,
    _pad: [u8; 3],
    cmd_cnt: U32,
    _pad2: [U64; 2],
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IoVecBytes {
    base: U64,
    len: U64,
}

const _: () = {
    assert!(size_of::<Header>() == size_of::<abi::tcmu_cmd_entry_hdr>());
    assert!(size_of::<Header>() + size_of::<RequestBytes>() == size_of::<abi::CmdRequest>());
    assert!(size_of::<Header>() + size_of::<TmrBytes>() == size_of::<abi::TmrEntry>());
    assert!(size_of::<IoVecBytes>() == size_of::<abi::IoVec>());
};

/// Where an entry lies: bytes from the start of the ring, and the ring's place in the mapping.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) at: u32,
    pub(super) cmdr_off: u32,
    pub(super) cmdr_size: u32,
}

impl Place {
    pub(super) fn broken(self, what: &'static str, value: u64) -> RingError {
        RingError::Entry { at: self.at, what, value }
    }
}

/// Parses a TCMU_OP_CMD entry; `bytes` is all of it, header included.
pub(super) fn command(
    map: &Rc<Mapping>,
    place: Place,
    id: u16,
    bytes: &[u8],
) -> Result<Pooled<Command>, RingError> {
    let body = bytes.get(size_of::<Header>()..).unwrap_or_default();
    let Ok((request, rest)) = RequestBytes::ref_from_prefix(body) else {
        return Err(place.broken("a command's length is", bytes.len() as u64));
    };
    let counts = [request.iov_cnt.get(), request.iov_bidi_cnt.get(), request.iov_dif_cnt.get()];
    let total: u64 = counts.iter().map(|n| u64::from(*n)).sum();
    if total > (rest.len() / size_of::<IoVecBytes>()) as u64 {
        return Err(place.broken("the number of iovecs is", total));
    }
    let (iovecs, _) = <[IoVecBytes]>::ref_from_prefix_with_elems(rest, total as usize)
        .map_err(|_| place.broken("the number of iovecs is", total))?;
    let cdb = cdb(place, bytes, request.cdb_off.get())?;
    let [data, bidi, dif] = counts;
    let room = |n: u32| Sg::with_room(n as usize);
    // It has some hundred bytes, and goes from hand to hand.
    let mut command =
        Pooled::new(|| Command { id, cdb, data: room(data), bidi: room(bidi), dif: room(dif), once: None });
    let Command { data, bidi, dif, .. } = &mut *command;
    let mut left = iovecs;
    for (list, count) in [data, bidi, dif].into_iter().zip(counts) {
        let (mine, others) = left.split_at(count as usize);
        left = others;
        for iov in mine {
            list.push(segment(map, place, iov)?);
        }
    }
    Ok(command)
}

fn segment(map: &Rc<Mapping>, place: Place, iov: &IoVecBytes) -> Result<crate::sys::mem::Segment, RingError> {
    // Data never lies in the mailbox or the ring: an iovec there would let a command overwrite the ring.
    let data_off = u64::from(place.cmdr_off) + u64::from(place.cmdr_size);
    if iov.base.get() < data_off {
        return Err(place.broken("an iovec lies before the data area, at", iov.base.get()));
    }
    map.segment(iov.base.get(), iov.len.get())
        .ok_or_else(|| place.broken("an iovec leaves the region, at", iov.base.get()))
}

fn cdb(place: Place, bytes: &[u8], offset: u64) -> Result<Cdb, RingError> {
    let broken = || place.broken("the CDB lies outside its entry, at", offset);
    let start = u64::from(place.cmdr_off) + u64::from(place.at);
    let at = offset.checked_sub(start).ok_or_else(broken)?;
    let cdb = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).ok_or_else(broken)?;
    let len = cdb_len(cdb).ok_or_else(broken)?;
    Ok(Cdb::from_slice(cdb.get(..len).ok_or_else(broken)?))
}

/// The length of a CDB by its operation code's group (SPC-5 4.2.5.1), and for 7Fh by its ADDITIONAL CDB LENGTH.
fn cdb_len(cdb: &[u8]) -> Option<usize> {
    match *cdb.first()? {
        0x7f => Some(8 + usize::from(*cdb.get(7)?)),
        op => Some([6, 10, 10, 12, 16, 12, 10, 10][usize::from(op >> 5)]),
    }
}

/// Parses a TCMU_OP_TMR entry.
pub(super) fn tmr(place: Place, bytes: &[u8]) -> Result<Tmr, RingError> {
    let body = bytes.get(size_of::<Header>()..).unwrap_or_default();
    let Ok((head, rest)) = TmrBytes::ref_from_prefix(body) else {
        return Err(place.broken("a task management entry's length is", bytes.len() as u64));
    };
    let count = head.cmd_cnt.get();
    let (ids, _) = <[U16]>::ref_from_prefix_with_elems(rest, count as usize)
        .map_err(|_| place.broken("the number of aborted commands is", count.into()))?;
    Ok(Tmr { kind: head.kind, ids: ids.iter().map(|id| id.get()).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_cdb_is_that_of_its_group() {
        for (op, len) in [(0x00, 6), (0x28, 10), (0x41, 10), (0x88, 16), (0xa8, 12)] {
            assert_eq!(cdb_len(&[op]), Some(len), "{op:#x}");
        }
        let mut variable = [0u8; 32];
        (variable[0], variable[7]) = (0x7f, 24);
        assert_eq!(cdb_len(&variable), Some(32));
        assert_eq!(cdb_len(&[0x7f, 0]), None);
        assert_eq!(cdb_len(&[]), None);
    }
}
