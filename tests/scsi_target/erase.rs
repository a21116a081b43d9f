//! FORMAT UNIT and SANITIZE: what they leave, what is answered meanwhile, and what becomes of a failure.

use std::{cell::RefCell, io, rc::Rc};

use tcmu_dif::{
    scsi::continued::{Continued, Keeper, Unfinished},
    sys::mem::{Buffer, Sg},
    units::BlockSize,
    volume::{IoErrorKind, IoOp},
};

use crate::memory::*;

const SANITIZING: (u8, u8, u8) = (2, 0x04, 0x1b);
const BLOCK_ERASE: u8 = 2;
const OVERWRITE: u8 = 1;
const EXIT_FAILURE_MODE: u8 = 0x1f;

fn sanitize(action: u8, flags: u8, len: usize) -> Vec<u8> {
    let [high, low] = (len as u16).to_be_bytes();
    vec![0x48, action | flags, 0, 0, 0, 0, 0, high, low, 0]
}

fn overwrite_list(first: u8, pattern: &[u8]) -> Vec<u8> {
    let mut list = vec![first, 0];
    list.extend((pattern.len() as u16).to_be_bytes());
    list.extend(pattern);
    list
}

fn filled(block_size: BlockSize) -> Bench {
    let b = Bench::new(block_size);
    b.send(&cdb(0x2a, 0, 0, 1024), &b.pattern(8, 1024));
    b.volume().take_seen();
    b
}

/// Lets IMMED work go on beside the commands.
fn in_background(b: &Bench) {
    let target = b.target.clone();
    b.exec.spawn(async move { target.background().await });
    b.settle();
}

#[test]
fn block_erase_and_format_leave_zeros_durably() {
    for b in [BlockSize::B512, BlockSize::B4096].map(filled) {
        assert_eq!(b.none(&sanitize(BLOCK_ERASE, 0, 0)).sense, GOOD);
        assert!(b.medium(0, 1024).iter().all(|x| *x == 0));
        let len = 1024 * b.block;
        assert_eq!(b.volume().take_seen(), [Seen::Discard { at: 0, len }, Seen::Flush]);
        assert_eq!(b.send(&sanitize(BLOCK_ERASE, 0, 8), &[0; 8]).sense, INVALID_FIELD);
        assert_eq!(b.none(&[0x04, 0, 0, 0, 0, 0]).sense, GOOD);
        assert_eq!(b.volume().take_seen(), [Seen::Discard { at: 0, len }, Seen::Flush]);
    }
    let thick = Bench::with(BlockSize::B512, |_| {}, |l| l.discard_granularity = 0);
    assert_eq!(thick.none(&[0x04, 0, 0, 0, 0, 0]).sense, GOOD);
    assert_eq!(
        thick.volume().take_seen(),
        [Seen::Zero { at: 0, len: 1024 * 512, may_unmap: true }, Seen::Flush]
    );
}

#[test]
fn overwrite_leaves_the_pattern_on_every_block() {
    for b in [BlockSize::B512, BlockSize::B4096].map(filled) {
        let block = b.block as usize;
        for pattern in
            [vec![0xaa; block], vec![1, 2, 3, 4], (0..block as u32 / 2 + 3).map(|i| i as u8).collect()]
        {
            let list = overwrite_list(1, &pattern);
            assert_eq!(b.send(&sanitize(OVERWRITE, 0, list.len()), &list).sense, GOOD);
            let one: Vec<u8> = pattern.iter().copied().cycle().take(block).collect();
            assert_eq!(b.medium(0, 1024), one.repeat(1024));
        }
        // Inverted every other pass, each of them flushed.
        for (passes, byte) in [(1, 0x0f), (2, 0xf0), (3, 0x0f)] {
            b.volume().take_seen();
            let list = overwrite_list(0x80 | passes, &[0x0f]);
            assert_eq!(b.send(&sanitize(OVERWRITE, 0, list.len()), &list).sense, GOOD);
            assert!(b.medium(0, 1024).iter().all(|x| *x == byte), "{passes}");
            let flushes = b.volume().take_seen().iter().filter(|s| **s == Seen::Flush).count();
            assert_eq!(flushes, usize::from(passes) + 1);
        }
    }
}

#[test]
fn a_wrong_sanitize_is_refused_before_any_io() {
    let b = filled(BlockSize::B512);
    for len in (0..5).chain([517, 600]) {
        let list = vec![1; len];
        assert_eq!(b.send(&sanitize(OVERWRITE, 0, len), &list).sense, INVALID_FIELD, "{len}");
    }
    for (first, said) in [(0, 4u16), (1, 0), (1, 516), (1, 5)] {
        let mut list = overwrite_list(first, &[1, 2, 3, 4]);
        list[2..4].copy_from_slice(&said.to_be_bytes());
        assert_eq!(b.send(&sanitize(OVERWRITE, 0, 8), &list).sense, INVALID_PARAMETER);
    }
    assert_eq!(b.send(&sanitize(OVERWRITE, 0, 516), &[1; 8]).sense, LIST_LENGTH);
    for action in (0..0x20).filter(|a| ![OVERWRITE, BLOCK_ERASE, EXIT_FAILURE_MODE].contains(a)) {
        assert_eq!(b.none(&sanitize(action, 0, 0)).sense, INVALID_FIELD, "{action:#x}");
    }
    // Reserved bits.
    for action in [BLOCK_ERASE, EXIT_FAILURE_MODE] {
        assert_eq!(b.none(&sanitize(action, 0x40, 0)).sense, INVALID_FIELD);
        for i in 2..7 {
            let mut c = sanitize(action, 0, 0);
            c[i] = i as u8;
            assert_eq!(b.none(&c).sense, INVALID_FIELD, "byte {i}");
        }
    }
    assert_eq!(b.none(&sanitize(EXIT_FAILURE_MODE, 0, 0)).sense, GOOD);
    assert_eq!(b.send(&sanitize(EXIT_FAILURE_MODE, 0, 8), &[0; 8]).sense, INVALID_FIELD);
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn while_a_sanitize_runs_other_commands_get_its_progress() {
    let b = filled(BlockSize::B4096);
    b.volume().yields.set(5);
    in_background(&b);
    let list = overwrite_list(1, &[7]);
    let ended = b.spawn(&sanitize(OVERWRITE, 0x80, list.len()), &Buffer::from_slice(&list).sg());
    b.exec.run_ready();
    assert_eq!(ended.take().unwrap().sense, GOOD, "IMMED ends at once");
    let mut seen = vec![];
    while b.medium(1023, 1)[4095] != 7 {
        for _ in 0..2 {
            b.exec.run_ready();
        }
        let ask = |cdb: &[u8], room: usize| {
            let data = if room == 0 { Sg::new() } else { Buffer::zeroed(room).sg() };
            let out = b.spawn(cdb, &data);
            b.exec.run_ready();
            out.take().expect("answered at once")
        };
        let a = ask(&[0, 0, 0, 0, 0, 0], 0);
        if a.sense == GOOD {
            break;
        }
        assert_eq!(a.sense, SANITIZING);
        assert_eq!(ask(&cdb(0x28, 0, 0, 1), 4096).sense, SANITIZING);
        assert_eq!(ask(&[0x1b, 0, 0, 0, 1, 0], 0).sense, SANITIZING);
        assert_eq!(ask(&[0x12, 0, 0, 0, 96, 0], 96).data.len(), 96);
        let sense = ask(&[0x03, 0, 0, 0, 18, 0], 18).data;
        assert_eq!((sense[2], sense[12], sense[13], sense[15]), (2, 0x04, 0x1b, 0x80));
        seen.push(u16::from_be_bytes([sense[16], sense[17]]));
    }
    assert!(seen.is_sorted() && seen.len() > 3 && seen.iter().any(|n| *n > 0), "{seen:?}");
    b.settle();
    assert_eq!(b.none(&[0; 6]).sense, GOOD);
    assert!(b.medium(0, 1024).iter().all(|x| *x == 7));
}

#[test]
fn a_sanitize_waits_for_the_writes_before_it() {
    let b = filled(BlockSize::B512);
    b.volume().yields.set(6);
    let write = b.spawn(&cdb(0x2a, 0, 9, 64), &Buffer::from_slice(&b.pattern(2, 64)).sg());
    b.exec.run_ready();
    b.volume().yields.set(0);
    let erase = b.spawn(&sanitize(BLOCK_ERASE, 0, 0), &Sg::new());
    b.settle();
    assert_eq!((write.take().unwrap().sense, erase.take().unwrap().sense), (GOOD, GOOD));
    assert!(b.medium(0, 1024).iter().all(|x| *x == 0));
}

#[test]
fn without_a_background_an_immediate_format_is_done_before_it_ends() {
    let b = filled(BlockSize::B512);
    assert_eq!(b.send(&[0x04, 0x10, 0, 0, 0, 0], &[0, 0x82, 0, 0]).sense, GOOD);
    assert!(b.medium(0, 1024).iter().all(|x| *x == 0));
    assert_eq!(b.none(&[0; 6]).sense, GOOD);
}

#[test]
fn format_takes_no_protection_no_pattern_and_no_defects() {
    let b = filled(BlockSize::B512);
    assert_eq!(b.none(&[0x04, 0x80, 0, 0, 0, 0]).sense, INVALID_FIELD);
    assert_eq!(b.send(&[0x04, 0x10, 0, 0, 0, 0], &[0, 0, 0]).sense, LIST_LENGTH);
    assert_eq!(b.send(&[0x04, 0x30, 0, 0, 0, 0], &[0; 7]).sense, LIST_LENGTH);
    for list in [[1, 0, 0, 0], [0, 0x88, 0, 0], [0, 0x20, 0, 0], [0, 0, 0, 4]] {
        assert_eq!(b.send(&[0x04, 0x10, 0, 0, 0, 0], &list).sense, INVALID_PARAMETER, "{list:?}");
    }
    assert_eq!(b.volume().take_seen(), []);
    assert_eq!(b.send(&[0x04, 0x30, 0, 0, 0, 0], &[0; 8]).sense, GOOD);
}

#[test]
fn a_failed_sanitize_is_left_by_another_or_with_ause_by_exit_failure_mode() {
    for ause in [false, true] {
        let b = filled(BlockSize::B512);
        let flags = if ause { 0x20 } else { 0 };
        b.volume().fail(IoOp::Discard, 0, IoErrorKind::Medium);
        assert_eq!(b.none(&sanitize(BLOCK_ERASE, flags, 0)).sense, (3, 0x0c, 0));
        b.volume().mend();
        let failed = (3, 0x31, 3);
        assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, failed);
        assert_eq!(b.none(&[0; 6]).sense, failed);
        assert_eq!(b.none(&[0x04, 0, 0, 0, 0, 0]).sense, failed);
        let exit = b.none(&sanitize(EXIT_FAILURE_MODE, 0, 0)).sense;
        assert_eq!(exit, if ause { GOOD } else { INVALID_FIELD });
        if !ause {
            assert_eq!(b.none(&sanitize(BLOCK_ERASE, 0, 0)).sense, GOOD);
        }
        assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, GOOD);
    }
}

#[test]
fn a_format_that_failed_or_was_dropped_has_to_be_repeated() {
    let b = filled(BlockSize::B512);
    b.volume().fail(IoOp::Flush, 0, IoErrorKind::Medium);
    assert_eq!(b.none(&[0x04, 0, 0, 0, 0, 0]).sense, (3, 0x0c, 0));
    b.volume().mend();
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, (3, 0x31, 1));
    assert_eq!(b.none(&[0x04, 0, 0, 0, 0, 0]).sense, GOOD);
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, GOOD);
    b.volume().yields.set(3);
    b.spawn(&[0x04, 0, 0, 0, 0, 0], &Sg::new());
    b.exec.run_ready();
    b.exec.clear();
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, (3, 0x31, 1));
}

#[derive(Clone, Default)]
struct Kept(Rc<RefCell<Vec<Option<Unfinished>>>>);

impl Keeper for Kept {
    fn keep(&self, state: &Continued) -> io::Result<()> {
        self.0.borrow_mut().push(state.unfinished);
        Ok(())
    }
}

#[test]
fn that_the_medium_is_being_rewritten_is_kept_before_it_begins_and_until_it_has_ended_well() {
    let kept = Kept::default();
    let keeper = kept.clone();
    let b = Bench::with(BlockSize::B512, |c| c.keeper = Some(Box::new(keeper)), |_| {});
    let said = || std::mem::take(&mut *kept.0.borrow_mut());
    let format = [0x04, 0, 0, 0, 0, 0];
    assert_eq!(b.none(&format).sense, GOOD);
    assert_eq!(said(), [Some(Unfinished::Format), None]);
    for ause in [false, true] {
        let flags = if ause { 0x20 } else { 0 };
        let unfinished = Some(Unfinished::Sanitize { ause });
        b.volume().fail(IoOp::Discard, 0, IoErrorKind::Medium);
        assert_eq!(b.none(&sanitize(BLOCK_ERASE, flags, 0)).sense, (3, 0x0c, 0));
        b.volume().mend();
        assert_eq!(said(), [unfinished, unfinished]);
        let end = if ause { EXIT_FAILURE_MODE } else { BLOCK_ERASE };
        assert_eq!(b.none(&sanitize(end, 0, 0)).sense, GOOD);
        assert_eq!(said().last(), Some(&None));
    }
    // In the background, and cut off there.
    in_background(&b);
    b.volume().yields.set(3);
    b.spawn(&[0x04, 0x10, 0, 0, 0, 0], &Buffer::from_slice(&[0, 0x82, 0, 0]).sg());
    b.exec.run_ready();
    b.exec.clear();
    assert_eq!(said(), [Some(Unfinished::Format)]);
}
