//! READ, WRITE, PRE-FETCH, SYNCHRONIZE CACHE, and what becomes of the volume's errors.

use tcmu_dif::{
    scsi::opcodes::Kind,
    sys::mem::{Buffer, Sg},
    units::{BlockSize, Lba},
    volume::{IoErrorKind, IoOp, PiMismatch, PiTag},
};

use crate::memory::*;

const READS: [u8; 4] = [0x08, 0x28, 0xa8, 0x88];
const WRITES: [u8; 4] = [0x0a, 0x2a, 0xaa, 0x8a];
const SIZES: [BlockSize; 2] = [BlockSize::B512, BlockSize::B4096];

#[test]
fn what_is_written_is_read_back_by_every_size_of_command() {
    for b in SIZES.map(Bench::new) {
        for (i, write) in WRITES.into_iter().enumerate() {
            let lba = 100 * i as u64;
            let data = b.pattern(i as u64, 17);
            assert_eq!(b.send(&cdb(write, 0, lba, 17), &data).sense, GOOD);
            assert_eq!(b.medium(lba, 17), data);
            for read in READS {
                assert_eq!(b.get(&cdb(read, 0, lba, 17), data.len()).data, data, "{read:#x}");
            }
        }
    }
}

#[test]
fn a_scattered_buffer_is_one_run_of_bytes() {
    let b = Bench::new(BlockSize::B512);
    let data = b.pattern(3, 4);
    let mut sg = Sg::new();
    for part in data.chunks(700) {
        sg.append(&Buffer::from_slice(part).sg());
    }
    assert_eq!(b.execute(&cdb(0x2a, 0, 9, 4), &sg).sense, GOOD);
    sg.fill(0, sg.len(), 0);
    assert_eq!(b.execute(&cdb(0x28, 0, 9, 4), &sg).data, data);
}

#[test]
fn what_lies_beyond_the_end_is_refused_before_any_io() {
    let b = Bench::new(BlockSize::B512);
    let room = Buffer::zeroed(1024 * 512).sg();
    for opcode in READS
        .into_iter()
        .chain(WRITES)
        .chain([0x2e, 0xae, 0x8e, 0x2f, 0xaf, 0x8f, 0x34, 0x90, 0x35, 0x91, 0x8b])
    {
        for (lba, blocks) in [(1024, 1), (1023, 2), (1025, 0), (900, 200), (0x1f_ffff, 1)] {
            if opcode < 0x20 && blocks == 0 {
                continue; // 256 blocks
            }
            let a = b.execute(&cdb(opcode, 0, lba, blocks), &room);
            assert_eq!(
                (a.status, a.sense, a.information),
                (2, OUT_OF_RANGE, Some(lba)),
                "{opcode:#x} {lba}+{blocks}"
            );
        }
    }
    for opcode in [0x88, 0x8a, 0x8b, 0x8e, 0x8f, 0x90, 0x91, 0x93] {
        for (lba, blocks) in [(u64::MAX, 1), (u64::MAX - 1, u64::MAX), (1 << 63, 0), (1 << 55, 1)] {
            assert_eq!(
                b.execute(&cdb(opcode, 0, lba, blocks), &room.slice(0, 512)).sense,
                OUT_OF_RANGE,
                "{opcode:#x}"
            );
        }
    }
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn a_length_of_zero_transfers_nothing_and_in_six_bytes_means_256() {
    let b = Bench::new(BlockSize::B512);
    for opcode in [0x28, 0xa8, 0x88, 0x2a, 0xaa, 0x8a, 0x2e, 0x2f, 0x8b] {
        for lba in [0, 1024] {
            assert_eq!(b.none(&cdb(opcode, 0, lba, 0)).sense, GOOD, "{opcode:#x}");
        }
    }
    assert_eq!(b.volume().take_seen(), []);
    let data = b.pattern(1, 256);
    assert_eq!(b.send(&cdb(0x0a, 0, 768, 0), &data).sense, GOOD);
    assert_eq!(b.medium(768, 256), data);
    assert_eq!(b.get(&cdb(0x08, 0, 768, 0), data.len()).data, data);
}

#[test]
fn a_request_for_protection_information_is_refused_by_every_block_command() {
    let b = Bench::new(BlockSize::B512);
    let room = Buffer::zeroed(4096).sg();
    let protected = table().into_iter().filter(|o| {
        o.opcode > 0x20
            && matches!(
                o.kind,
                Kind::Read
                    | Kind::Write
                    | Kind::WriteAndVerify
                    | Kind::Verify
                    | Kind::WriteSame
                    | Kind::CompareAndWrite
                    | Kind::OrWrite
            )
    });
    let mut n = 0;
    for op in protected {
        for protect in 1..8 {
            let a = b.execute(&cdb(op.opcode, protect << 5, 0, 1), &room);
            assert_eq!(
                (a.sense, &a.response.sense_bytes()[15..]),
                (INVALID_FIELD, &[0xcf, 0, 1][..]),
                "{op:?}"
            );
        }
        n += 1;
    }
    assert_eq!((n, b.volume().take_seen()), (16, vec![]));
}

#[test]
fn data_out_that_is_too_short_is_refused_before_any_io_and_data_in_gets_what_fits() {
    for b in SIZES.map(Bench::new) {
        b.put(5, &b.pattern(5, 4));
        for opcode in [0x0a, 0x2a, 0xaa, 0x8a, 0x2e, 0xae, 0x8e, 0x8b] {
            let a = b.send(&cdb(opcode, 0, 5, 4), &vec![0xee; 4 * b.block as usize - 1]);
            assert_eq!(a.sense, INVALID_FIELD, "{opcode:#x}");
        }
        assert_eq!(b.volume().take_seen(), []);
        for room in [0, 1, b.block - 1, b.block, b.block + 1, 3 * b.block + 100, 4 * b.block] {
            let a = b.get(&cdb(0x28, 0, 5, 4), room as usize);
            assert_eq!((a.sense, a.data), (GOOD, b.pattern(5, 4)[..room as usize].to_vec()), "{room}");
        }
        // More than the command says is the initiator's affair.
        let mut more = b.pattern(6, 4);
        more.extend(vec![0xee; 100]);
        assert_eq!(b.send(&cdb(0x2a, 0, 5, 4), &more).sense, GOOD);
        assert_eq!(b.medium(5, 5)[..4 * b.block as usize], b.pattern(6, 4));
        assert!(b.medium(9, 1).iter().all(|x| *x == 0));
    }
}

#[test]
fn the_limit_that_page_b0_names_is_the_one_that_holds() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 64 << 20);
    let page = b.get(&[0x12, 1, 0xb0, 0, 64, 0], 64).data;
    let max = be(&page[8..12]);
    assert_eq!(max, 32768);
    let room = Buffer::zeroed((max as usize + 1) * 512).sg();
    for opcode in [0x88, 0xa8] {
        assert_eq!(b.execute(&cdb(opcode, 0, 0, max), &room).sense, GOOD);
        assert_eq!(b.execute(&cdb(opcode, 0, 0, max + 1), &room).sense, INVALID_FIELD);
    }
    b.volume().take_seen();
    for opcode in [0x8a, 0xaa, 0x8e, 0x8b] {
        assert_eq!(b.execute(&cdb(opcode, 0, 0, max + 1), &room).sense, INVALID_FIELD);
    }
    assert_eq!(b.execute(&cdb(0x8f, 0x02, 0, max + 1), &room).sense, INVALID_FIELD);
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn fua_reaches_the_volume_and_without_a_write_cache_every_write_has_it() {
    let b = Bench::new(BlockSize::B512);
    let data = b.pattern(0, 1);
    let write = |fua| Seen::Write { at: 512, len: 512, fua };
    for opcode in [0x2a, 0xaa, 0x8a] {
        b.send(&cdb(opcode, 0x10, 1, 1), &data); // DPO is a hint
        b.send(&cdb(opcode, 0x08, 1, 1), &data);
        assert_eq!(b.volume().take_seen(), [write(false), write(true)]);
    }
    b.get(&cdb(0x28, 0x08, 1, 1), 512);
    assert_eq!(b.volume().take_seen(), [Seen::Flush, Seen::Read { at: 512, len: 512 }]);
    b.target.set_write_cache(false);
    assert_eq!(b.none(&[0; 6]).sense, (6, 0x2a, 0x01));
    for opcode in WRITES {
        b.send(&cdb(opcode, 0, 1, 1), &data);
        assert_eq!(b.volume().take_seen(), [write(true)]);
    }
    b.send(&cdb(0x41, 0, 1, 1), &[0; 512]);
    assert_eq!(b.volume().take_seen(), [Seen::Zero { at: 512, len: 512, may_unmap: false }, Seen::Flush]);
    b.target.set_write_cache(false); // no change, no news
    assert_eq!(b.none(&[0; 6]).sense, GOOD);
}

#[test]
fn synchronize_cache_flushes_and_a_lost_flush_is_said() {
    let b = Bench::new(BlockSize::B512);
    for opcode in [0x35, 0x91] {
        for flags in [0, 2] {
            assert_eq!(b.none(&cdb(opcode, flags, 0, 0)).sense, GOOD);
            assert_eq!(b.volume().take_seen(), [Seen::Flush]);
        }
    }
    b.volume().fail(IoOp::Flush, 0, IoErrorKind::Medium);
    let a = b.none(&cdb(0x35, 0, 0, 0));
    assert_eq!((a.sense, a.information), ((3, 0x0c, 0), None));
    b.volume().mend();
    b.volume().fail(IoOp::Flush, 0, IoErrorKind::Failed);
    assert_eq!(b.none(&cdb(0x91, 2, 0, 0)).sense, (4, 0x44, 0));
}

#[test]
fn pre_fetch_reads_ahead_within_bounds() {
    let b = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 32 << 20);
    for opcode in [0x34, 0x90] {
        assert_eq!(b.none(&cdb(opcode, 0, 3, 1)).sense, GOOD);
        assert_eq!(b.volume().take_seen(), [Seen::Read { at: 3 * 512, len: 512 }]);
        assert_eq!(b.none(&cdb(opcode, 2, 3, 1)).sense, GOOD);
        assert_eq!(b.volume().take_seen(), []);
        assert_eq!(b.none(&cdb(opcode, 0, 1, 0)).sense, GOOD);
        let read: u64 = b
            .volume()
            .take_seen()
            .iter()
            .map(|s| if let Seen::Read { len, .. } = s { *len } else { panic!("{s:?}") })
            .sum();
        assert_eq!(read, 8 << 20);
    }
    b.volume().fail(IoOp::Read, 4096, IoErrorKind::Medium);
    let a = b.none(&cdb(0x34, 0, 0, 16));
    assert_eq!((a.sense, a.information), ((3, 0x11, 0), Some(8)));
}

#[test]
fn a_failed_block_is_named_in_both_sense_formats_and_its_neighbours_read() {
    let b = Bench::new(BlockSize::B512);
    let mismatch = PiMismatch { lba: Lba(77), tag: PiTag::Guard, expected: 1, found: 2 };
    b.volume().fail(IoOp::Read, 77 * 512, IoErrorKind::Protection(mismatch));
    for opcode in READS {
        let a = b.get(&cdb(opcode, 0, 70, 16), 8192);
        assert_eq!((a.status, a.sense, a.information), (2, (0xb, 0x10, 1), Some(77)));
        assert!(a.data.is_empty());
        assert_eq!(a.response.sense_bytes()[..14], [0xf0, 0, 0xb, 0, 0, 0, 77, 10, 0, 0, 0, 0, 0x10, 1]);
        assert_eq!(b.get(&cdb(opcode, 0, 70, 7), 8192).sense, GOOD);
        assert_eq!(b.get(&cdb(opcode, 0, 78, 7), 8192).sense, GOOD);
    }
    let page = [0, 0, 0, 0, 0x0a, 0x0a, 0x04, 0x10, 0, 0x40, 0, 0, 0, 0, 0, 0];
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, 16, 0], &page).sense, GOOD);
    let a = b.get(&cdb(0x28, 0, 70, 16), 8192);
    assert_eq!(
        a.response.sense_bytes()[..],
        [0x72, 0xb, 0x10, 1, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 77]
    );
}

#[test]
fn every_error_of_the_volume_ends_in_its_own_sense() {
    let b = Bench::new(BlockSize::B512);
    use IoErrorKind::*;
    for (kind, op, status, sense) in [
        (Medium, IoOp::Read, 2, (3, 0x11, 0)),
        (Medium, IoOp::Write, 2, (3, 0x0c, 0)),
        (NoSpace, IoOp::Write, 2, (7, 0x27, 7)),
        (ReadOnly, IoOp::Write, 2, (7, 0x27, 0)),
        (Corrupt, IoOp::Read, 2, (3, 0x31, 0)),
        (Failed, IoOp::Write, 2, (4, 0x44, 0)),
        (Locked, IoOp::Write, 2, (2, 0x04, 3)),
        (Unsupported, IoOp::Write, 2, UNKNOWN),
        (OutOfRange, IoOp::Read, 2, OUT_OF_RANGE),
        (Cancelled, IoOp::Read, 0x40, GOOD),
    ] {
        b.volume().fail(op, 512, kind);
        let opcode = if op == IoOp::Read { 0x28 } else { 0x2a };
        let a = b.execute(&cdb(opcode, 0, 0, 2), &Buffer::zeroed(1024).sg());
        assert_eq!((a.status, a.sense), (status, sense), "{kind:?}");
        assert_eq!(a.response.sense.is_some(), status == 2);
        b.volume().mend();
    }
}
