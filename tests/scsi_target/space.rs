//! Logical block provisioning thresholds, and what becomes of a LUN whose storage is full.

use tcmu_dif::{
    sys::mem::Buffer,
    units::BlockSize,
    volume::{IoErrorKind, IoOp},
};

use crate::memory::*;

const MIB: u64 = 1 << 20;
const SOFT_THRESHOLD: (u8, u8, u8) = (6, 0x38, 0x07);
const FULL: (u8, u8, u8) = (7, 0x27, 0x07);

/// A volume with so much room beneath it.
fn bench(free: u64) -> Bench {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.tells_free = true);
    b.volume().free.set(Some(free));
    b
}

fn threshold(b: &Bench, enabled: bool, count: u32) {
    let mut page = vec![0x5c, 2, 0, 20];
    page.resize(16, 0);
    page.extend([u8::from(enabled) << 7, 1, 0, 0]);
    page.extend(count.to_be_bytes());
    let list = [&[0; 4], &page[..]].concat();
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).sense, GOOD);
}

fn write(b: &Bench) -> (u8, u8, u8) {
    b.send(&cdb(0x2a, 0, 0, 1), &[7; 512]).sense
}

#[test]
fn a_volume_that_counts_its_room_has_thresholds_and_another_has_none() {
    let b = bench(77 * MIB + 5);
    let log = [0x4d, 0, 0x4c, 0, 0, 0, 0, 0, 64, 0];
    assert_eq!(b.get(&[0x12, 1, 0xb2, 0, 64, 0], 64).data[4], 11, "sets of 2048 blocks, 1 MiB");
    assert_eq!(b.get(&log, 64).data, [0x0c, 0, 0, 12, 0, 1, 3, 8, 0, 0, 0, 77, 2, 0, 0, 0]);
    let page = b.get(&[0x1a, 8, 0x1c, 2, 255, 0], 255).data;
    assert_eq!((page.len(), page[4] & 0x7f, page[5], page[20] & 0x80), (28, 0x5c, 2, 0), "disabled at first");
    b.volume().free.set(Some(u64::MAX));
    assert_eq!(be(&b.get(&log, 64).data[8..12]), u64::from(u32::MAX));
    for other in [
        Bench::new(BlockSize::B512),
        Bench::with(BlockSize::B512, |_| {}, |l| (l.tells_free, l.discard_granularity) = (true, 0)),
    ] {
        assert_eq!(other.get(&[0x12, 1, 0xb2, 0, 64, 0], 64).data[4], 0);
        assert_eq!(other.get(&log, 64).data, [0x0c, 0, 0, 0]);
        assert_eq!(other.get(&[0x1a, 8, 0x1c, 2, 255, 0], 255).sense, INVALID_FIELD);
        assert_eq!(other.volume().asked_free.get(), 0);
    }
}

#[test]
fn initiators_are_told_once_when_the_threshold_is_reached() {
    let b = bench(100 * MIB);
    threshold(&b, true, 50);
    assert_eq!((write(&b), write(&b)), (GOOD, GOOD));
    b.volume().free.set(Some(50 * MIB));
    threshold(&b, true, 51);
    assert_eq!(write(&b), GOOD, "the command that found it is done");
    assert_eq!(write(&b), SOFT_THRESHOLD);
    for _ in 0..3 {
        assert_eq!(write(&b), GOOD);
    }
    // Looked at again it is still reached, and that is no news.
    std::thread::sleep(std::time::Duration::from_millis(1050));
    assert_eq!((write(&b), write(&b)), (GOOD, GOOD));
    // Room comes, and goes.
    for (free, then) in [(60, GOOD), (51, SOFT_THRESHOLD)] {
        b.volume().free.set(Some(free * MIB));
        std::thread::sleep(std::time::Duration::from_millis(1050));
        assert_eq!((write(&b), write(&b)), (GOOD, then), "{free}");
    }
}

#[test]
fn nobody_looks_at_the_room_more_than_once_a_second_and_only_if_somebody_wants_to_know() {
    let b = bench(100 * MIB);
    for _ in 0..50 {
        assert_eq!(write(&b), GOOD);
    }
    assert_eq!(b.volume().asked_free.get(), 0);
    threshold(&b, true, 1);
    b.volume().yields.set(2);
    for i in 0..50 {
        b.spawn(&cdb(0x2a, 0, i, 1), &Buffer::from_slice(&[1; 512]).sg());
    }
    b.settle();
    for _ in 0..50 {
        assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, GOOD);
    }
    assert_eq!(b.volume().asked_free.get(), 1);
    threshold(&b, false, 1);
    assert_eq!((write(&b), b.volume().asked_free.get()), (GOOD, 1));
}

#[test]
fn a_full_volume_says_so_and_goes_on_when_there_is_room_again() {
    let b = bench(0);
    threshold(&b, true, 10);
    b.volume().fail(IoOp::Write, 512, IoErrorKind::NoSpace);
    let refused = b.send(&cdb(0x2a, 0, 0, 4), &[9; 2048]);
    assert_eq!((refused.status, refused.sense, refused.information), (2, FULL, None));
    assert_eq!(write(&b), SOFT_THRESHOLD, "one that was refused for lack of room looks too");
    assert_eq!(write(&b), GOOD, "what needs no room is written");
    assert_eq!(b.send(&cdb(0x2a, 0x08, 0, 4), &[9; 2048]).sense, FULL);
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).data, [7; 512]);
    assert_eq!(b.none(&cdb(0x35, 0, 0, 0)).sense, GOOD);
    b.volume().mend();
    assert_eq!(b.send(&cdb(0x2a, 0, 0, 4), &[9; 2048]).sense, GOOD);
    assert_eq!(b.medium(0, 4), [9; 2048]);
}
