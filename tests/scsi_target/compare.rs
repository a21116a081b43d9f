//! VERIFY, WRITE AND VERIFY, COMPARE AND WRITE, ORWRITE.

use std::rc::Rc;

use tcmu_dif::{
    sys::mem::Buffer,
    units::BlockSize,
    volume::{IoErrorKind, IoOp},
};

use crate::memory::*;

const VERIFY: [u8; 3] = [0x2f, 0xaf, 0x8f];
const WRITE_AND_VERIFY: [u8; 3] = [0x2e, 0xae, 0x8e];
const MISCOMPARE: (u8, u8, u8) = (0xe, 0x1d, 0);

fn caw(lba: u64, blocks: u8, flags: u8) -> Vec<u8> {
    let mut c = cdb(0x89, flags, lba, 0);
    c[13] = blocks;
    c
}

#[test]
fn verify_without_bytes_reads_everything_and_compares_nothing() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 8 << 20);
    for opcode in VERIFY {
        assert_eq!(b.none(&cdb(opcode, 0x10, 0, 16384)).sense, GOOD);
        let read: u64 = b
            .volume()
            .take_seen()
            .iter()
            .map(|s| if let Seen::Read { len, .. } = s { *len } else { panic!("{s:?}") })
            .sum();
        assert_eq!(read, 8 << 20);
    }
    b.volume().fail(IoOp::Read, 5000 * 512, IoErrorKind::Medium);
    let a = b.none(&cdb(0x8f, 0, 0, 16384));
    assert_eq!((a.sense, a.information), ((3, 0x11, 0), Some(5000)));
}

#[test]
fn verify_finds_the_first_byte_that_differs_and_names_its_block() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 4 << 20);
    let blocks = 3000; // over the size of a chunk
    let data = b.pattern(9, blocks);
    b.put(10, &data);
    for opcode in VERIFY {
        assert_eq!(b.send(&cdb(opcode, 2, 10, blocks), &data).sense, GOOD);
        for byte in [0, 511, 512, (1 << 20) - 1, 1 << 20, data.len() - 1] {
            let mut wrong = data.clone();
            wrong[byte] ^= 1;
            let a = b.send(&cdb(opcode, 2, 10, blocks), &wrong);
            assert_eq!((a.sense, a.information), (MISCOMPARE, Some(10 + byte as u64 / 512)), "{byte}");
        }
        assert_eq!(b.send(&cdb(opcode, 2, 10, 2), &data[..1023]).sense, INVALID_FIELD);
        assert_eq!(b.send(&cdb(opcode, 4, 10, 1), &data).sense, INVALID_FIELD);
    }
}

#[test]
fn verify_compares_one_block_with_all_of_them() {
    for b in [BlockSize::B512, BlockSize::B4096].map(Bench::new) {
        let one = b.pattern(4, 1);
        b.put(3, &one.repeat(600));
        for opcode in VERIFY {
            assert_eq!(b.send(&cdb(opcode, 6, 3, 600), &one).sense, GOOD);
            let a = b.send(&cdb(opcode, 6, 3, 601), &one);
            assert_eq!((a.sense, a.information), (MISCOMPARE, Some(603)));
            assert_eq!(b.send(&cdb(opcode, 6, 3, 2), &one[1..]).sense, INVALID_FIELD);
            assert_eq!(b.none(&cdb(opcode, 6, 3, 0)).sense, GOOD);
        }
    }
}

#[test]
fn write_and_verify_writes_to_the_medium_and_reads_back() {
    let b = Bench::new(BlockSize::B512);
    for opcode in WRITE_AND_VERIFY {
        for flags in [0, 2, 0x10] {
            let data = b.pattern(u64::from(opcode ^ flags), 5);
            assert_eq!(b.send(&cdb(opcode, flags, 7, 5), &data).sense, GOOD);
            assert_eq!(b.medium(7, 5), data);
            let (at, len) = (7 * 512, 5 * 512);
            assert_eq!(b.volume().take_seen(), [Seen::Write { at, len, fua: true }, Seen::Read { at, len }]);
        }
        for flags in [4, 6] {
            assert_eq!(b.send(&cdb(opcode, flags, 7, 1), &[0; 512]).sense, INVALID_FIELD);
        }
        b.volume().fail(IoOp::Read, 8 * 512, IoErrorKind::Medium);
        let a = b.send(&cdb(opcode, 0, 7, 5), &b.pattern(1, 5));
        assert_eq!((a.sense, a.information), ((3, 0x11, 0), Some(8)));
        b.volume().mend();
        b.volume().take_seen();
    }
}

#[test]
fn compare_and_write_writes_only_if_all_is_equal() {
    for b in [BlockSize::B512, BlockSize::B4096].map(Bench::new) {
        let (old, new) = (b.pattern(1, 3), b.pattern(2, 3));
        b.put(5, &old);
        for byte in [0, 1, old.len() - 27, old.len() - 1] {
            let mut wrong = old.clone();
            wrong[byte] ^= 0x80;
            let a = b.send(&caw(5, 3, 0), &[wrong, new.clone()].concat());
            assert_eq!((a.sense, a.information), (MISCOMPARE, Some(byte as u64)));
            assert_eq!(b.medium(5, 3), old);
        }
        assert_eq!(b.send(&caw(5, 3, 0), &[old.clone(), new.clone()].concat()).sense, GOOD);
        assert_eq!(b.medium(5, 3), new);
        b.volume().take_seen();
        assert_eq!(b.send(&caw(5, 3, 0x18), &[new.clone(), old].concat()).sense, GOOD);
        let (at, len) = (5 * b.block, 3 * b.block);
        assert_eq!(b.volume().take_seen(), [Seen::Read { at, len }, Seen::Write { at, len, fua: true }]);
    }
}

#[test]
fn compare_and_write_checks_its_range_and_both_halves_of_its_buffer() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(b.send(&caw(1024, 1, 0), &[0; 1024]).sense, OUT_OF_RANGE);
    assert_eq!(b.send(&caw(u64::MAX, 1, 0), &[0; 1024]).sense, OUT_OF_RANGE);
    for len in [0, 512, 1023, 1025, 2048] {
        assert_eq!(b.send(&caw(0, 1, 0), &vec![0; len]).sense, INVALID_FIELD, "{len}");
    }
    assert_eq!(b.send(&caw(0, 0, 0x18), &[0; 512]).sense, GOOD);
    assert_eq!(b.volume().take_seen(), []);
    b.put(0, &[0x41; 255 * 512]);
    let data = [vec![0x41; 255 * 512], vec![0x42; 255 * 512]].concat();
    assert_eq!(b.send(&caw(0, 255, 0), &data).sense, GOOD);
    assert_eq!(b.medium(0, 256)[254 * 512..], [[0x42; 512], [0; 512]].concat());
}

#[test]
fn of_many_that_compare_and_write_the_same_value_one_wins() {
    let b = Bench::new(BlockSize::B512);
    b.volume().yields.set(3);
    let answers: Vec<_> = (1..=20u8)
        .map(|i| b.spawn(&caw(9, 2, 0), &Buffer::from_slice(&[vec![0; 1024], vec![i; 1024]].concat()).sg()))
        .collect();
    b.settle();
    let senses: Vec<_> = answers.iter().map(|a| a.borrow().as_ref().unwrap().sense).collect();
    assert_eq!(senses.iter().filter(|s| **s == GOOD).count(), 1);
    assert_eq!(senses.iter().filter(|s| **s == MISCOMPARE).count(), 19);
    let winner = 1 + senses.iter().position(|s| *s == GOOD).unwrap() as u8;
    assert_eq!(b.medium(9, 2), vec![winner; 1024]);
}

#[test]
fn a_write_never_lands_inside_a_compare_and_write() {
    // Each round a plain write and a COMPARE AND WRITE that expects the old value race for the same blocks. Either order is
    // right; a mixture of both is not, and a miscompare means that the write was first.
    for round in 0..scale(400) {
        let b = Bench::new(BlockSize::B512);
        b.volume().yields.set(5);
        b.volume().jitter.set(round as u64 + 1);
        let compare = Buffer::from_slice(&[vec![0; 2048], vec![0xcc; 2048]].concat()).sg();
        let plain = Buffer::from_slice(&[0x77; 2048]).sg();
        let write = cdb([0x2a, 0x0a, 0x8a][round % 3], 0, 8, 4);
        let (of_caw, of_write) = if round % 2 == 0 {
            let of_caw = b.spawn(&caw(8, 4, 0), &compare);
            b.turns(round % 5);
            (of_caw, b.spawn(&write, &plain))
        } else {
            let of_write = b.spawn(&write, &plain);
            b.turns(round % 5);
            (b.spawn(&caw(8, 4, 0), &compare), of_write)
        };
        b.settle();
        assert_eq!(of_write.take().unwrap().sense, GOOD);
        let of_caw = of_caw.take().unwrap().sense;
        let medium = b.medium(8, 4);
        let (written, swapped) = (medium == [0x77; 2048], medium == [0xcc; 2048]);
        assert!(
            written || of_caw == GOOD && swapped,
            "round {round}: {of_caw:x?}, {:x?}",
            &medium[..2048].iter().step_by(512).collect::<Vec<_>>()
        );
        assert!(of_caw == GOOD || of_caw == MISCOMPARE);
    }
}

#[test]
fn or_write_sets_bits_and_concurrent_ones_lose_none() {
    let b = Bench::new(BlockSize::B512);
    b.put(2, &[0xa5; 1536]);
    assert_eq!(b.send(&cdb(0x8b, 0x18, 2, 3), &[0x5a; 1536]).sense, GOOD);
    assert_eq!(b.medium(2, 4), [vec![0xff; 1536], vec![0; 512]].concat());
    b.volume().yields.set(2);
    let answers: Vec<_> = (0..8)
        .map(|bit| b.spawn(&cdb(0x8b, 0, 100, 8), &Buffer::from_slice(&vec![1 << bit; 8 * 512]).sg()))
        .collect();
    b.settle();
    assert!(answers.iter().all(|a| a.borrow().as_ref().unwrap().sense == GOOD));
    assert_eq!(b.medium(100, 8), vec![0xff; 8 * 512]);
}

/// What the in-flight record promises a successor: the blocks may hold what was written, or a part of it.
#[test]
fn a_compare_and_write_that_was_cut_off_is_compared_again_only_if_it_had_not_begun_to_write() {
    let b = Bench::new(BlockSize::B512);
    let (old, new) = (b.pattern(1, 8), b.pattern(2, 8));
    let both = [old.clone(), new.clone()].concat();
    b.put(40, &old);

    // Cut off while it reads: nothing is marked, and another's data are a miscompare still.
    let mark = Rc::new(Mark::default());
    b.volume().fail(IoOp::Read, 40 * 512, IoErrorKind::Failed);
    assert_ne!(b.send_once(&caw(40, 8, 0), &both, &mark).sense, GOOD);
    b.volume().mend();
    assert!(!mark.0.get());
    b.put(40, &new);
    assert_eq!(b.send_once(&caw(40, 8, 0), &both, &mark).sense, MISCOMPARE);
    assert!(!mark.0.get());

    // Cut off while it writes: it had compared, half of it is on the medium, and it is brought to its end.
    b.put(40, &old);
    b.volume().fail(IoOp::Write, 40 * 512, IoErrorKind::Failed);
    assert_ne!(b.send_once(&caw(40, 8, 0), &both, &mark).sense, GOOD);
    b.volume().mend();
    assert!(mark.0.get());
    b.put(40, &new[..4 * 512]);
    assert_eq!(b.send(&caw(40, 8, 0), &both).sense, MISCOMPARE, "one without the mark");
    assert_eq!(b.send_once(&caw(40, 8, 0), &both, &mark).sense, GOOD);
    assert_eq!(b.medium(40, 8), new);
}
