//! WRITE ATOMIC(16): what VPD page B0 promises of it, and that nobody sees half of one.

use tcmu_dif::{
    scsi::{TargetConfig, opcodes::Kind},
    sys::mem::Buffer,
    units::BlockSize,
    volume::{IoErrorKind, IoOp, Limits},
};

use crate::memory::*;

fn atomic(flags: u8, lba: u64, boundary: u16, blocks: u16) -> Vec<u8> {
    let mut c = vec![0x9c, flags];
    c.extend(lba.to_be_bytes());
    c.extend(boundary.to_be_bytes());
    c.extend(blocks.to_be_bytes());
    c.extend([0, 0]);
    c
}

fn with_piece(size: BlockSize, bytes: u32) -> Bench {
    Bench::with(size, |_: &mut TargetConfig| {}, |l: &mut Limits| l.atomic_write = bytes)
}

/// MAXIMUM ATOMIC TRANSFER LENGTH, ALIGNMENT, GRANULARITY, LENGTH WITH BOUNDARY, BOUNDARY SIZE.
fn limits(b: &Bench) -> [u64; 5] {
    let page = b.get(&[0x12, 1, 0xb0, 0, 64, 0], 64).data;
    [44, 48, 52, 56, 60].map(|at| be(&page[at..at + 4]))
}

#[test]
fn block_limits_say_what_the_volume_keeps_whole_and_nothing_where_that_is_less_than_a_block() {
    for (size, bytes, piece) in [
        (BlockSize::B512, 512, 1),
        (BlockSize::B512, 4096, 8),
        (BlockSize::B4096, 4096, 1),
        (BlockSize::B4096, 512, 0),
        (BlockSize::B512, 0, 0),
    ] {
        let b = with_piece(size, bytes);
        assert_eq!(limits(&b), [piece, piece, piece, 0, 0]);
        let rsoc = [0xa3, 0x0c, 1, 0x9c, 0, 0, 0, 0, 0, 64, 0, 0];
        let reported = b.get(&rsoc, 64).data;
        let data = b.pattern(1, piece.max(1));
        let answer = b.send(&atomic(0, 0, 0, piece.max(1) as u16), &data);
        if piece == 0 {
            assert_eq!((reported, answer.sense), (vec![0, 1, 0, 0], UNKNOWN));
        } else {
            assert_eq!((reported[1], reported[3], reported[5] & 0x18), (3, 16, 0x18));
            assert_eq!((answer.sense, answer.response.kind), (GOOD, Some(Kind::WriteAtomic)));
            assert_eq!(b.medium(0, piece), data);
        }
    }
}

#[test]
fn what_cannot_be_written_as_a_whole_is_refused_and_nothing_is_written() {
    let b = with_piece(BlockSize::B512, 4096);
    let room = Buffer::zeroed(64 << 10).sg();
    for (c, sense) in [
        (atomic(0, 0, 0, 9), INVALID_FIELD),
        (atomic(0, 0, 0, 16), INVALID_FIELD),
        (atomic(0, 0, 0, 7), INVALID_FIELD),
        (atomic(0, 1, 0, 8), INVALID_FIELD),
        (atomic(0, 0, 8, 8), INVALID_FIELD),
        (atomic(0, 0, 8, 0), INVALID_FIELD),
        (atomic(0x20, 0, 0, 8), INVALID_FIELD),
        (atomic(0, 1017, 0, 8), OUT_OF_RANGE),
        (atomic(0, 1025, 0, 0), OUT_OF_RANGE),
        (atomic(0, u64::MAX, 0, 8), OUT_OF_RANGE),
    ] {
        assert_eq!(b.execute(&c, &room).sense, sense, "{c:x?}");
    }
    assert_eq!(b.volume().take_seen(), []);
    for lba in [0, 5, 1024] {
        assert_eq!(b.none(&atomic(0, lba, 0, 0)).sense, GOOD);
    }
    assert_eq!(b.volume().take_seen(), []);
    let read_only = Bench::with(BlockSize::B512, |c| c.read_only = true, |_| {});
    assert_eq!(read_only.send(&atomic(0, 0, 0, 8), &[0; 4096]).sense, (7, 0x27, 0));
}

#[test]
fn what_was_there_is_on_the_medium_before_an_atomic_write_begins() {
    let b = with_piece(BlockSize::B512, 4096);
    let data = b.pattern(2, 8);
    for (flags, fua) in [(0x00, false), (0x10, false), (0x08, true), (0x18, true)] {
        assert_eq!(b.send(&atomic(flags, 16, 0, 8), &data).sense, GOOD);
        let written = Seen::Write { at: 8192, len: 4096, fua };
        assert_eq!(b.volume().take_seen(), [Seen::Flush, written]);
    }
    b.volume().fail(IoOp::Flush, 0, IoErrorKind::Failed);
    assert_eq!(b.send(&atomic(0, 16, 0, 8), &[1; 4096]).sense, (4, 0x44, 0));
    assert_eq!(b.medium(16, 8), data);
}

#[test]
fn readers_see_all_of_an_atomic_write_or_nothing() {
    let b = with_piece(BlockSize::B512, 4096);
    b.volume().yields.set(3);
    let (old, new) = (vec![0x11; 4096], vec![0x22; 4096]);
    for turns in 0..24 {
        b.put(0, &old);
        let write = b.spawn(&atomic(0, 0, 0, 8), &Buffer::from_slice(&new).sg());
        b.turns(turns);
        let read = b.get(&cdb(0x28, 0, 0, 8), 4096).data;
        assert!(read == old || read == new, "torn after {turns} turns");
        b.settle();
        assert_eq!(write.borrow().as_ref().map(|a| a.sense), Some(GOOD));
        assert_eq!(b.medium(0, 8), new);
    }
}

#[test]
fn nothing_is_written_to_the_rest_of_its_page_between_the_flush_and_the_write() {
    let b = with_piece(BlockSize::B512, 512);
    b.volume().yields.set(4);
    for turns in 0..16 {
        b.volume().take_seen();
        let one = b.spawn(&atomic(0, 3, 0, 1), &Buffer::from_slice(&[1; 512]).sg());
        b.turns(turns);
        let other = b.spawn(&cdb(0x2a, 0, 6, 1), &Buffer::from_slice(&[2; 512]).sg());
        b.settle();
        assert!(one.borrow().is_some() && other.borrow().is_some());
        let seen = b.volume().take_seen();
        let at = seen.iter().position(|s| *s == Seen::Flush).unwrap();
        assert_eq!(seen[at + 1], Seen::Write { at: 1536, len: 512, fua: false }, "after {turns} turns");
    }
}
