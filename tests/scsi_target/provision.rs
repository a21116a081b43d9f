//! UNMAP, WRITE SAME, GET LBA STATUS, and what the pages say of thin provisioning.

use tcmu_dif::{
    units::BlockSize,
    volume::{IoErrorKind, IoOp},
};

use crate::memory::*;

fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let len = ranges.len() * 16;
    let mut list = ((len + 6) as u16).to_be_bytes().to_vec();
    list.extend((len as u16).to_be_bytes());
    list.extend([0; 4]);
    for (lba, blocks) in ranges {
        list.extend(lba.to_be_bytes());
        list.extend(blocks.to_be_bytes());
        list.extend([0; 4]);
    }
    list
}

fn unmap_cdb(len: usize) -> [u8; 10] {
    let [high, low] = (len as u16).to_be_bytes();
    [0x42, 0, 0, 0, 0, 0, 0, high, low, 0]
}

fn unmap(b: &Bench, ranges: &[(u64, u32)]) -> Answer {
    let list = unmap_list(ranges);
    b.send(&unmap_cdb(list.len()), &list)
}

/// The descriptors of GET LBA STATUS.
fn status(b: &Bench, lba: u64, room: usize) -> Vec<(u64, u32, u8)> {
    let mut c = vec![0x9e, 0x12];
    c.extend(lba.to_be_bytes());
    c.extend((room as u32).to_be_bytes());
    c.extend([0, 0]);
    let a = b.get(&c, room);
    assert_eq!(a.sense, GOOD);
    assert_eq!(be(&a.data[..4]) as usize, a.data.len() - 4);
    a.data[8..]
        .chunks(16)
        .map(|d| {
            let blocks = be(&d[8..12]) as u32;
            (be(&d[..8]), blocks, d[12])
        })
        .collect()
}

#[test]
fn unmapped_blocks_read_as_zeros_and_their_neighbours_stay() {
    for b in [BlockSize::B512, BlockSize::B4096].map(Bench::new) {
        let data = b.pattern(1, 64);
        b.send(&cdb(0x2a, 0, 0, 64), &data);
        assert_eq!(unmap(&b, &[(1, 1), (40, 3), (41, 9), (63, 1)]).sense, GOOD);
        let now = b.get(&cdb(0x28, 0, 0, 64), data.len()).data;
        for lba in 0..64usize {
            let range = lba * b.block as usize..(lba + 1) * b.block as usize;
            let gone = lba == 1 || (40..50).contains(&lba) || lba == 63;
            assert_eq!(
                now[range.clone()],
                if gone { vec![0; range.len()] } else { data[range].to_vec() },
                "{lba}"
            );
        }
    }
}

#[test]
fn a_wrong_unmap_list_unmaps_nothing() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(unmap(&b, &[(0, 8), (1024, 1)]).sense, OUT_OF_RANGE);
    assert_eq!(unmap(&b, &[(0, 8), (u64::MAX, 2)]).sense, OUT_OF_RANGE);
    assert_eq!(unmap(&b, &[(0, 1 << 20), (0, 1)]).sense, OUT_OF_RANGE);
    assert_eq!(unmap(&b, &[(0, 8); 257]).sense, INVALID_PARAMETER);
    let mut anchored = unmap_cdb(24);
    anchored[1] = 1;
    assert_eq!(b.send(&anchored, &unmap_list(&[(0, 8)])).sense, INVALID_FIELD);
    assert_eq!(b.send(&unmap_cdb(7), &[0; 7]).sense, LIST_LENGTH);
    assert_eq!(b.send(&unmap_cdb(40), &unmap_list(&[(0, 8)])).sense, LIST_LENGTH);
    assert_eq!(b.volume().take_seen(), []);
    let large = Bench::new(BlockSize::B512);
    large.volume().limits.borrow_mut().capacity = (2 << 20) * 512;
    large.target.capacity_changed();
    large.none(&[0; 6]);
    assert_eq!(unmap(&large, &[(0, 1 << 20)]).sense, GOOD);
    large.volume().take_seen();
    assert_eq!(unmap(&large, &[(0, 1 << 20), (1 << 20, 1)]).sense, INVALID_PARAMETER);
    assert_eq!(large.volume().take_seen(), []);
}

#[test]
fn unmap_of_nothing_is_good() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(b.none(&unmap_cdb(0)).sense, GOOD);
    assert_eq!(unmap(&b, &[]).sense, GOOD);
    assert_eq!(unmap(&b, &[(3, 0), (1024, 0)]).sense, GOOD);
    assert_eq!(unmap(&b, &vec![(3, 0); 256]).sense, GOOD);
    // An incomplete descriptor does not count.
    let list = unmap_list(&[(0, 8), (16, 8)]);
    assert_eq!(b.send(&unmap_cdb(39), &list[..39]).sense, GOOD);
    assert_eq!(b.volume().take_seen(), [Seen::Discard { at: 0, len: 4096 }]);
}

#[test]
fn write_same_repeats_its_block() {
    for b in [BlockSize::B512, BlockSize::B4096].map(Bench::new) {
        for opcode in [0x41, 0x93] {
            let one = b.pattern(u64::from(opcode), 1);
            assert_eq!(b.send(&cdb(opcode, 0, 10, 700), &one).sense, GOOD);
            assert_eq!(
                b.medium(9, 702),
                [vec![0; b.block as usize], one.repeat(700), vec![0; b.block as usize]].concat()
            );
            // 0 blocks: to the end.
            assert_eq!(b.send(&cdb(opcode, 0, 1000, 0), &one).sense, GOOD);
            assert_eq!(b.medium(1000, 24), one.repeat(24));
            b.put(0, &vec![0; 1024 * b.block as usize]);
        }
    }
}

#[test]
fn write_same_of_zeros_zeroes_and_with_unmap_frees() {
    let b = Bench::new(BlockSize::B512);
    let (at, len) = (512, 4096);
    for opcode in [0x41, 0x93] {
        b.send(&cdb(opcode, 0, 1, 8), &[0; 512]);
        b.send(&cdb(opcode, 8, 1, 8), &[0; 512]);
        assert_eq!(
            b.volume().take_seen(),
            [Seen::Zero { at, len, may_unmap: false }, Seen::Discard { at, len }]
        );
        // Unmapped blocks read as zeros, so another pattern is written.
        b.send(&cdb(opcode, 8, 1, 8), &[0xa6; 512]);
        assert_eq!(b.volume().take_seen(), [Seen::Write { at, len, fua: false }]);
        assert_eq!(b.medium(1, 8), vec![0xa6; 4096]);
    }
    b.none(&cdb(0x93, 0x01, 1, 8));
    b.none(&cdb(0x93, 0x09, 1, 8));
    assert_eq!(b.volume().take_seen(), [Seen::Zero { at, len, may_unmap: false }, Seen::Discard { at, len }]);
}

#[test]
fn a_write_same_that_is_not_supported_or_has_no_single_block_does_nothing() {
    let b = Bench::new(BlockSize::B512);
    for (c, len, sense) in [
        (cdb(0x41, 0x10, 0, 1), 512, INVALID_FIELD), // ANCHOR
        (cdb(0x93, 0x18, 0, 1), 512, INVALID_FIELD),
        (cdb(0x41, 0x02, 0, 1), 512, INVALID_FIELD), // LBDATA
        (cdb(0x93, 0x04, 0, 1), 512, INVALID_FIELD), // PBDATA
        (cdb(0x41, 0x01, 0, 1), 512, INVALID_FIELD), // NDOB is not in the 10-byte one
        (cdb(0x93, 0, 0, 2), 1024, INVALID_FIELD),
        (cdb(0x93, 0, 0, 1), 511, INVALID_FIELD),
        (cdb(0x93, 0, 0, 1), 0, INVALID_FIELD),
        (cdb(0x41, 0, 1025, 0), 512, OUT_OF_RANGE),
        (cdb(0x93, 0, 1024, 1), 512, OUT_OF_RANGE),
    ] {
        assert_eq!(b.send(&c, &vec![0; len]).sense, sense, "{c:x?} {len}");
    }
    assert_eq!(b.volume().take_seen(), []);
    assert_eq!(b.send(&cdb(0x93, 0, 1024, 0), &[0; 512]).sense, GOOD);
    b.volume().fail(IoOp::Discard, 512, IoErrorKind::NoSpace);
    assert_eq!(b.send(&cdb(0x93, 0, 0, 8), &[0; 512]).sense, (7, 0x27, 7));
    assert_eq!(unmap(&b, &[(0, 8)]).sense, (7, 0x27, 7));
}

#[test]
fn a_volume_that_frees_nothing_has_no_unmap_and_says_so_everywhere() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.discard_granularity = 0);
    assert_eq!(unmap(&b, &[(0, 8)]).sense, UNKNOWN);
    assert_eq!(b.send(&cdb(0x41, 8, 0, 1), &[0; 512]).sense, INVALID_FIELD);
    assert_eq!(b.send(&cdb(0x93, 8, 0, 1), &[0; 512]).sense, INVALID_FIELD);
    assert_eq!(b.none(&[0x48, 2, 0, 0, 0, 0, 0, 0, 0, 0]).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32).data[14], 0);
    assert_eq!(b.get(&[0x12, 1, 0xb2, 0, 64, 0], 64).data[5], 0);
    assert_eq!(b.get(&[0xa3, 0x0c, 1, 0x42, 0, 0, 0, 0, 0, 64, 0, 0], 64).data, [0, 1, 0, 0]);
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn lba_status_tells_what_is_mapped() {
    let b = Bench::new(BlockSize::B512); // 8 blocks are freed at once
    assert_eq!(status(&b, 0, 1000), [(0, 1024, 1)]);
    b.send(&cdb(0x2a, 0, 100, 1), &[1; 512]);
    assert_eq!(status(&b, 0, 1000), [(0, 96, 1), (96, 8, 0), (104, 920, 1)]);
    assert_eq!(status(&b, 100, 1000), [(100, 4, 0), (104, 920, 1)]);
    assert_eq!(status(&b, 1023, 1000), [(1023, 1, 1)]);
    assert_eq!(status(&b, 0, 24), [(0, 96, 1)]);
    assert_eq!(status(&b, 0, 40), [(0, 96, 1), (96, 8, 0)]);
    unmap(&b, &[(96, 8)]);
    assert_eq!(status(&b, 0, 24), [(0, 1024, 1)]);
    for lba in [1024, 1025, u64::MAX] {
        let mut c = vec![0x9e, 0x12];
        c.extend(lba.to_be_bytes());
        c.extend([0, 0, 0, 24, 0, 0]);
        assert_eq!(b.get(&c, 24).sense, OUT_OF_RANGE);
    }
}

#[test]
fn a_capacity_that_cuts_the_last_granule_is_covered_to_its_end() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 4096 * 3 + 512);
    b.send(&cdb(0x2a, 0, 8, 1), &[1; 512]);
    assert_eq!(status(&b, 0, 1000), [(0, 8, 1), (8, 8, 0), (16, 9, 1)]);
}

#[test]
fn random_writes_and_unmaps_agree_with_their_status() {
    let mut seed = 7u64;
    let mut next = move |n: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % n
    };
    let b = Bench::new(BlockSize::B512);
    let mut mapped = [false; 128];
    for _ in 0..scale(300) {
        let (first, n) = (next(128), 1 + next(16));
        let n = n.min(128 - first);
        let on = next(2) == 0;
        mapped[first as usize..(first + n) as usize].fill(on);
        if on {
            b.send(&cdb(0x2a, 0, first * 8, n * 8), &b.pattern(first, n * 8));
        } else {
            unmap(&b, &[(first * 8, n as u32 * 8)]);
        }
        let start = next(1024);
        let mut at = start;
        for (lba, blocks, status) in status(&b, start, 8 + 16 * 64) {
            assert_eq!(lba, at);
            for block in lba..lba + u64::from(blocks) {
                assert_eq!(status == 0, mapped[block as usize / 8], "block {block}");
            }
            at += u64::from(blocks);
        }
        assert!(at > start);
    }
}
