//! EXTENDED COPY within one logical unit over a volume in memory: what does not need a second one. `tests/lun_copy.rs` has the rest.

use std::rc::Rc;

use tcmu_dif::{
    scsi::naa_from_serial,
    sys::mem::{Buffer, Sg},
    units::BlockSize,
    volume::{IoErrorKind, IoOp},
};

use crate::memory::*;

/// A list with that identifier, one unit (the bench's own) and one segment.
fn list(id: u8, blocks: u16, from: u64, to: u64) -> Vec<u8> {
    let mut out = vec![id, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
    out.extend([0xe4, 0, 0, 0, 1, 3, 0, 8]);
    out.extend(naa_from_serial("serial-1").to_be_bytes());
    out.extend([0; 12]);
    out.extend(512u32.to_be_bytes());
    out.extend([2, 0, 0, 0x18, 0, 0, 0, 0, 0, 0]);
    out.extend(blocks.to_be_bytes());
    out.extend(from.to_be_bytes());
    out.extend(to.to_be_bytes());
    out
}

pub fn xcopy(len: usize) -> Vec<u8> {
    let mut cdb = vec![0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    cdb.extend((len as u32).to_be_bytes());
    cdb.extend([0, 0]);
    cdb
}

fn status(b: &Bench, id: u8) -> Answer {
    b.get(&[0x84, 0, id, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64)
}

#[test]
fn a_copy_that_was_cut_off_is_begun_again_unless_it_would_read_what_it_has_written() {
    let b = Bench::new(BlockSize::B512);
    b.put(0, &b.pattern(1, 64));
    let mark = Rc::new(Mark::default());
    for _ in 0..2 {
        assert_eq!(b.send_once(&xcopy(76), &list(1, 64, 0, 64), &mark).sense, GOOD);
    }
    assert!(!mark.0.get());
    let overlapping = list(1, 64, 0, 8);
    assert_eq!(b.send_once(&xcopy(76), &overlapping, &mark).sense, GOOD);
    assert!(mark.0.get() && b.medium(8, 64) == b.pattern(1, 64));
    b.volume().take_seen();
    assert_eq!(b.send_once(&xcopy(76), &overlapping, &mark).sense, (0xa, 0, 0));
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn failures_of_the_volume_are_told_by_their_code_and_a_copy_under_way_is_in_progress() {
    let b = Bench::new(BlockSize::B512);
    for (op, byte, kind, sense) in [
        (IoOp::Read, 0, IoErrorKind::Medium, (0xa, 0x11, 0)),
        (IoOp::Write, 64 * 512, IoErrorKind::NoSpace, (0xa, 0x27, 7)),
        (IoOp::Write, 64 * 512, IoErrorKind::Failed, (0xa, 0x44, 0)),
    ] {
        b.volume().fail(op, byte, kind);
        let refused = b.send(&xcopy(76), &list(3, 8, 0, 64));
        assert_eq!((refused.sense, status(&b, 3).data[4]), (sense, 2));
        b.volume().mend();
    }
    b.volume().yields.set(20);
    let good = Buffer::from_slice(&list(3, 8, 0, 64)).sg();
    let copies: Vec<_> = (3..7)
        .map(|id| {
            good.copy_in(0, &[id]);
            let out = b.spawn(&xcopy(76), &good);
            b.turns(3);
            out
        })
        .collect();
    assert_eq!(status_while_running(&b, &good), ((5, 0, 0x16), 8));
    b.settle();
    for copy in copies {
        assert_eq!(copy.take().unwrap().sense, GOOD);
    }
    assert_eq!(status(&b, 3).data[4], 1);
}

/// While four copies run: the sense of one with an identifier in use, and the status of one more.
fn status_while_running(b: &Bench, list: &Sg) -> ((u8, u8, u8), u8) {
    list.copy_in(0, &[3]);
    let same = b.spawn(&xcopy(76), list);
    b.turns(3);
    list.copy_in(0, &[9]);
    let fifth = b.spawn(&xcopy(76), list);
    b.turns(3);
    (same.take().unwrap().sense, fifth.take().unwrap().status)
}
