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
    Bench::with(
        size,
        |_: &mut TargetConfig| {},
        |l: &mut Limits| (l.atomic_write, l.atomic_unit) = (bytes, bytes),
    )
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
fn the_volume_is_told_that_it_is_to_be_whole() {
    let b = with_piece(BlockSize::B512, 4096);
    let data = b.pattern(2, 8);
    for (flags, fua) in [(0x00, false), (0x10, false), (0x08, true), (0x18, true)] {
        assert_eq!(b.send(&atomic(flags, 16, 0, 8), &data).sense, GOOD);
        assert_eq!(b.volume().take_seen(), [Seen::Atomic { at: 8192, len: 4096, fua }]);
    }
    b.volume().fail(IoOp::Write, 8192, IoErrorKind::Failed);
    assert_eq!(b.send(&atomic(0, 16, 0, 8), &[1; 4096]).sense, (4, 0x44, 0));
    assert_eq!(b.medium(16, 8), data);
}

#[test]
fn where_the_volume_can_any_blocks_up_to_the_longest_are_written_as_a_whole() {
    for (size, most) in [(BlockSize::B512, 2048), (BlockSize::B4096, 256)] {
        let b = Bench::with(
            size,
            |_| {},
            |l| (l.capacity, l.atomic_write, l.atomic_unit) = (4096 * size.bytes(), 1 << 20, 1),
        );
        assert_eq!(limits(&b), [most, 1, 1, 0, 0]);
        for (lba, blocks) in [(0, 1), (1, 1), (7, 9), (4095, 1), (511, most), (4096 - most, most)] {
            let data = b.pattern(lba, blocks);
            assert_eq!(b.send(&atomic(0, lba, 0, blocks as u16), &data).sense, GOOD, "{blocks} at {lba}");
            let (at, len) = (lba * size.bytes(), blocks * size.bytes());
            assert_eq!(b.volume().take_seen(), [Seen::Atomic { at, len, fua: false }]);
            assert_eq!(b.medium(lba, blocks), data);
            b.volume().take_seen();
        }
        let room = Buffer::zeroed((most as usize + 1) * size.bytes() as usize).sg();
        assert_eq!(b.execute(&atomic(0, 0, 0, most as u16 + 1), &room).sense, INVALID_FIELD);
        assert_eq!(b.execute(&atomic(0, 4096 - most + 1, 0, most as u16), &room).sense, OUT_OF_RANGE);
        assert_eq!(b.volume().take_seen(), []);
    }
}

#[test]
fn an_image_that_came_in_place_of_another_is_not_asked_for_what_it_cannot() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| (l.atomic_write, l.atomic_unit) = (1 << 20, 1));
    assert_eq!(b.send(&atomic(0, 3, 0, 9), &b.pattern(1, 9)).sense, GOOD);
    b.volume().take_seen();
    b.volume().limits.borrow_mut().atomic_write = 512;
    b.volume().limits.borrow_mut().atomic_unit = 512;
    assert_eq!(b.send(&atomic(0, 3, 0, 9), &b.pattern(2, 9)).sense, INVALID_FIELD);
    assert_eq!(b.volume().take_seen(), []);
    assert_eq!(b.send(&atomic(0, 3, 0, 1), &b.pattern(3, 1)).sense, GOOD);
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
fn nobody_else_is_at_its_pages_meanwhile() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| (l.atomic_write, l.atomic_unit) = (1 << 20, 1));
    b.volume().yields.set(4);
    // Blocks 3 to 9 lie in pages 0 to 15.
    for (other, waits) in [(0, true), (6, true), (15, true), (16, false)] {
        for turns in 1..16 {
            let one = b.spawn(&atomic(0, 3, 0, 7), &Buffer::from_slice(&[1; 7 * 512]).sg());
            b.turns(turns);
            b.volume().take_seen();
            let under_way = one.borrow().is_none();
            let beside = b.spawn(&cdb(0x2a, 0, other, 1), &Buffer::from_slice(&[2; 512]).sg());
            let mut met = false;
            while one.borrow().is_none() {
                met |= !b.volume().take_seen().is_empty();
                b.turns(1);
            }
            assert!(!met || !waits, "block {other} after {turns} turns");
            assert!(met || waits || !under_way || turns > 6, "block {other} waits after {turns} turns");
            b.settle();
            assert!(beside.borrow().is_some());
        }
    }
}
