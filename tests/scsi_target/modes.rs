//! Mode pages, write protection, sense format, START STOP UNIT, unit attentions.

use std::{cell::RefCell, io, rc::Rc};

use tcmu_dif::{
    scsi::{SavedPages, opcodes::Kind},
    sys::mem::Buffer,
    units::BlockSize,
};

use crate::memory::*;

fn sense6(page: u8, room: u8) -> [u8; 6] {
    [0x1a, 0x08, page, 0, room, 0]
}

/// The current page of that code.
fn page(b: &Bench, code: u8) -> Vec<u8> {
    b.get(&sense6(code, 255), 255).data[4..].to_vec()
}

fn select(b: &Bench, save: bool, page: &[u8]) -> Answer {
    let list = [&[0; 4], page].concat();
    b.send(&[0x15, 0x10 | u8::from(save), 0, 0, list.len() as u8, 0], &list)
}

fn set(b: &Bench, code: u8, byte: usize, mask: u8, on: bool) -> Answer {
    let mut p = page(b, code);
    p[0] &= 0x7f;
    p[byte] = if on { p[byte] | mask } else { p[byte] & !mask };
    select(b, false, &p)
}

#[derive(Clone, Default)]
struct Shelf(Rc<RefCell<Option<Vec<u8>>>>, bool);

impl SavedPages for Shelf {
    fn load(&self) -> Option<Vec<u8>> {
        self.0.borrow().clone()
    }

    fn save(&self, pages: &[u8]) -> io::Result<()> {
        if self.1 {
            return Err(io::Error::other("full"));
        }
        *self.0.borrow_mut() = Some(pages.to_vec());
        Ok(())
    }
}

#[test]
fn mode_sense_says_its_length_and_is_cut_to_the_allocation_length() {
    let b = Bench::new(BlockSize::B512);
    let all = b.get(&sense6(0x3f, 255), 255).data;
    assert_eq!((all[0] as usize + 1, all[1], all[2], all[3]), (all.len(), 0, 0x10, 0));
    for room in [0, 3, 4, 12, 200] {
        assert_eq!(b.get(&sense6(0x3f, room), 255).data, all[..all.len().min(room.into())]);
    }
    let ten = b.get(&[0x5a, 0x08, 0x3f, 0, 0, 0, 0, 1, 0, 0], 256).data;
    assert_eq!(usize::from(u16::from_be_bytes([ten[0], ten[1]])) + 2, ten.len());
    assert_eq!(ten[2..8], [0, 0x10, 0, 0, 0, 0]);
    assert_eq!(ten[8..], all[4..]);
    let mut codes = vec![];
    let mut rest = &all[4..];
    while let [code, len, ..] = rest {
        codes.push(*code);
        rest = &rest[2 + usize::from(*len)..];
    }
    assert_eq!(codes, [0x01, 0x08, 0x0a, 0x1c]);
    for bad in [0x00, 0x02, 0x19, 0x3e] {
        assert_eq!(b.get(&sense6(bad, 255), 255).sense, INVALID_FIELD);
    }
    assert_eq!(b.get(&[0x1a, 8, 0x3f, 1, 255, 0], 255).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x1a, 8, 0x3f, 0xff, 255, 0], 255).data, all);
}

#[test]
fn block_descriptors_hold_capacity_and_block_size() {
    for b in [BlockSize::B512, BlockSize::B4096].map(Bench::new) {
        let size = (b.block as u32).to_be_bytes();
        let six = b.get(&[0x1a, 0, 0x08, 0, 255, 0], 255).data;
        assert_eq!(six[3..12], [&[8, 0, 0, 4, 0][..], &size[..]].concat());
        assert_eq!(six[12] & 0x3f, 0x08);
        let long = b.get(&[0x5a, 0x10, 0x08, 0, 0, 0, 0, 0, 255, 0], 255).data;
        assert_eq!(long[4..8], [1, 0, 0, 16]);
        assert_eq!(long[8..24], [&[0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0][..], &size[..]].concat());
        // Written back as they were read they change nothing; another capacity or block size is refused.
        let mut list = six.clone();
        list[0] = 0;
        assert_eq!(b.send(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).sense, GOOD);
        list[6] ^= 1;
        assert_eq!(b.send(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).sense, INVALID_PARAMETER);
        list[6] ^= 1;
        list[10] ^= 8;
        assert_eq!(b.send(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).sense, INVALID_PARAMETER);
        let mut list = long.clone();
        list[..2].fill(0);
        assert_eq!(b.send(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], &list).sense, GOOD);
        list[15] ^= 1;
        assert_eq!(
            b.send(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], &list).sense,
            INVALID_PARAMETER
        );
    }
}

#[test]
fn a_wrong_mode_select_changes_nothing() {
    let b = Bench::new(BlockSize::B512);
    let before = b.get(&sense6(0x3f, 255), 255).data;
    let caching = page(&b, 0x08);
    let list = [&[0; 4], &caching[..]].concat();
    assert_eq!(b.none(&[0x15, 0x10, 0, 0, 0, 0]).sense, GOOD);
    assert_eq!(b.send(&[0x15, 0x00, 0, 0, 24, 0], &list).sense, INVALID_FIELD); // PF = 0
    assert_eq!(b.send(&[0x15, 0x11, 0, 0, 24, 0], &list).sense, INVALID_FIELD); // SP = 1
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, 24, 0], &list[..23]).sense, LIST_LENGTH);
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, 3, 0], &list).sense, LIST_LENGTH);
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, 20, 0], &list).sense, LIST_LENGTH);
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, 8, 0], &[0, 0, 0, 8, 0, 0, 0, 0]).sense, LIST_LENGTH);
    // A good page before a bad one is not taken either.
    let mut two = list.clone();
    two[4 + 2] ^= 0x04;
    two.extend(&caching);
    let last = two.len() - 1;
    two[last] ^= 1;
    assert_eq!(b.send(&[0x15, 0x10, 0, 0, two.len() as u8, 0], &two).sense, INVALID_PARAMETER);
    assert_eq!(b.get(&sense6(0x3f, 255), 255).data, before);
    assert_eq!(b.get(&[0x1a, 8, 0xff, 0, 255, 0], 255).sense, (5, 0x39, 0)); // saved values
}

#[test]
fn turning_the_write_cache_off_flushes_and_then_every_write_is_durable() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(page(&b, 0x08)[2], 0x04);
    assert_eq!(set(&b, 0x08, 2, 0x04, false).sense, GOOD);
    assert_eq!(b.volume().take_seen(), [Seen::Flush]);
    assert!(!b.target.write_cache());
    b.send(&cdb(0x2a, 0, 0, 1), &[0; 512]);
    assert_eq!(b.volume().take_seen(), [Seen::Write { at: 0, len: 512, fua: true }]);
    assert_eq!(set(&b, 0x08, 2, 0x04, true).sense, GOOD);
    b.send(&cdb(0x2a, 0, 0, 1), &[0; 512]);
    assert_eq!(b.volume().take_seen(), [Seen::Write { at: 0, len: 512, fua: false }]);
    // The default page stays what it was.
    assert_eq!(set(&b, 0x08, 2, 0x04, false).sense, GOOD);
    assert_eq!(b.get(&[0x1a, 8, 0x88, 0, 255, 0], 255).data[4 + 2], 0x04);
    assert_eq!(page(&b, 0x08)[2], 0);
}

#[test]
fn a_write_under_way_when_the_cache_is_turned_off_is_flushed_too() {
    let b = Bench::new(BlockSize::B512);
    b.volume().yields.set(4);
    b.spawn(&cdb(0x2a, 0, 0, 1), &Buffer::zeroed(512).sg());
    b.exec.run_ready();
    let mut p = page(&b, 0x08);
    p[2] = 0;
    b.volume().take_seen();
    select(&b, false, &p);
    assert_eq!(b.volume().take_seen(), [Seen::Flush]);
}

#[test]
fn software_write_protect_refuses_every_command_that_writes_and_no_other() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(set(&b, 0x0a, 4, 0x08, true).sense, GOOD);
    assert_eq!(b.get(&sense6(0x3f, 4), 4).data[2], 0x90);
    refuses_writes(&b, (7, 0x27, 2));
    assert_eq!(set(&b, 0x0a, 4, 0x08, false).sense, GOOD);
    assert_eq!(b.send(&cdb(0x2a, 0, 0, 1), &[0; 512]).sense, GOOD);
}

#[test]
fn a_read_only_target_and_a_read_only_volume_refuse_every_command_that_writes() {
    for b in [
        Bench::with(BlockSize::B512, |c| c.read_only = true, |_| {}),
        Bench::with(BlockSize::B512, |_| {}, |l| l.read_only = true),
    ] {
        assert_eq!(b.get(&sense6(0x3f, 4), 4).data[2], 0x90);
        refuses_writes(&b, (7, 0x27, 0));
    }
}

fn refuses_writes(b: &Bench, sense: (u8, u8, u8)) {
    b.volume().take_seen();
    let room = Buffer::zeroed(1024).sg();
    for op in table() {
        let mut c = cdb(op.opcode, op.service_action.unwrap_or(0) as u8, 0, 1);
        c[op.usage.len() - 1] = 0;
        let refused = b.execute(&c, &room).sense == sense;
        let writes = !matches!(
            op.kind,
            Kind::TestUnitReady
                | Kind::RequestSense
                | Kind::Inquiry
                | Kind::ModeSelect
                | Kind::ModeSense
                | Kind::StartStopUnit
                | Kind::PreventAllow
                | Kind::ReadCapacity10
                | Kind::ReadCapacity16
                | Kind::Read
                | Kind::Verify
                | Kind::PreFetch
                | Kind::SynchronizeCache
                | Kind::ReadDefectData
                | Kind::SanitizeExitFailureMode
                | Kind::LogSense
                | Kind::GetLbaStatus
                | Kind::ReportLuns
                | Kind::ReportTargetPortGroups
                | Kind::ReportSupportedOpcodes
                | Kind::ReportSupportedTmf
                // It may be the source: `lun_copy` has the destination.
                | Kind::ExtendedCopy
                | Kind::ReceiveCopyStatus
                | Kind::ReceiveCopyData
                | Kind::ReceiveCopyParameters
                | Kind::ReceiveCopyFailure
        );
        assert_eq!(refused, writes, "{op:?}");
    }
    let changed = |s: &Seen| !matches!(s, Seen::Read { .. } | Seen::Flush | Seen::Map);
    assert!(!b.volume().take_seen().iter().any(changed));
}

#[test]
fn d_sense_decides_the_format_of_sense_data() {
    let b = Bench::new(BlockSize::B512);
    let fails = |b: &Bench| b.get(&cdb(0x88, 0, u64::MAX, 1), 512).response.sense_bytes();
    assert_eq!(fails(&b)[0], 0x70, "an LBA beyond 32 bits is not in fixed sense");
    assert_eq!(set(&b, 0x0a, 2, 0x04, true).sense, GOOD);
    let bytes = fails(&b);
    assert_eq!((bytes[0], &bytes[12..20]), (0x72, &[0xff; 8][..]));
    assert_eq!(b.get(&[0x03, 0, 0, 0, 18, 0], 18).data[0], 0x70, "REQUEST SENSE has its own bit");
    assert_eq!(b.get(&[0x03, 1, 0, 0, 18, 0], 18).data, [0x72, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(set(&b, 0x0a, 2, 0x04, false).sense, GOOD);
    assert_eq!(fails(&b)[0], 0x70);
}

#[test]
fn saved_pages_survive_a_restart_and_come_back_as_saved_values() {
    let shelf = Shelf::default();
    let new = |shelf: &Shelf| {
        let shelf = shelf.clone();
        Bench::with(BlockSize::B512, |c| c.saved_pages = Some(Box::new(shelf)), |_| {})
    };
    let b = new(&shelf);
    let mut caching = page(&b, 0x08);
    assert_eq!(caching[0], 0x88, "PS");
    caching[2] = 0;
    assert_eq!(select(&b, true, &caching).sense, GOOD);
    assert_eq!(set(&b, 0x0a, 4, 0x08, true).sense, GOOD); // not saved
    let b = new(&shelf);
    assert_eq!((page(&b, 0x08)[2], page(&b, 0x0a)[4]), (0, 0));
    assert_eq!(b.get(&[0x1a, 8, 0xc8, 0, 255, 0], 255).data[4 + 2], 0);
    assert_eq!(b.get(&[0x1a, 8, 0x88, 0, 255, 0], 255).data[4 + 2], 4);
    *shelf.0.borrow_mut() = Some(b"not ours".to_vec());
    assert_eq!(page(&new(&shelf), 0x08)[2], 4);
    let full = new(&Shelf(Rc::default(), true));
    assert_eq!(select(&full, true, &caching).sense, (4, 0x44, 0));
    assert_eq!(page(&full, 0x08)[2], 4, "what could not be saved is not in force");
}

#[test]
fn start_stop_flushes_and_ejects_nothing() {
    let b = Bench::new(BlockSize::B512);
    assert_eq!(b.none(&[0x1b, 0, 0, 0, 1, 0]).sense, GOOD);
    assert_eq!(b.none(&[0x1b, 1, 0, 0, 4, 0]).sense, GOOD);
    assert_eq!(b.volume().take_seen(), []);
    assert_eq!(b.none(&[0x1b, 0, 0, 0, 0, 0]).sense, GOOD);
    assert_eq!(b.volume().take_seen(), [Seen::Flush]);
    assert_eq!(b.none(&[0; 6]).sense, GOOD);
    for byte in [0x02, 0x03, 0x10, 0xf1] {
        assert_eq!(b.none(&[0x1b, 1, 0, 0, byte, 0]).sense, INVALID_FIELD);
    }
    assert_eq!(
        [0, 1, 2, 3].map(|n| b.none(&[0x1e, 0, 0, 0, n, 0]).sense),
        [GOOD, GOOD, INVALID_FIELD, INVALID_FIELD]
    );
}

#[test]
fn a_unit_attention_is_told_once_and_inquiry_does_not_take_it() {
    let b = Bench::with(BlockSize::B512, |c| c.power_on = true, |_| {});
    assert_eq!(b.get(&[0x12, 0, 0, 0, 96, 0], 96).sense, GOOD);
    assert_eq!(b.get(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0], 16).sense, GOOD);
    let a = b.get(&cdb(0x28, 0, 0, 1), 512);
    assert_eq!((a.status, a.sense), (2, (6, 0x29, 0)));
    assert_eq!(b.volume().take_seen(), []);
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, GOOD);
}

#[test]
fn a_new_capacity_is_announced_and_in_force() {
    let b = Bench::new(BlockSize::B512);
    b.volume().limits.borrow_mut().capacity = 2048 * 512;
    b.volume().bytes.borrow_mut().resize(2048 * 512, 0);
    assert_eq!(b.get(&cdb(0x28, 0, 2047, 1), 512).sense, OUT_OF_RANGE);
    b.target.capacity_changed();
    b.target.capacity_changed();
    let sense = b.get(&[0x03, 0, 0, 0, 18, 0], 18).data;
    assert_eq!((sense[2], sense[12], sense[13]), (6, 0x2a, 9), "REQUEST SENSE gives and clears it");
    assert_eq!(b.get(&cdb(0x28, 0, 2047, 1), 512).sense, GOOD);
    assert_eq!(b.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8).data, [0, 0, 7, 255, 0, 0, 2, 0]);
    b.volume().limits.borrow_mut().capacity = 1024 * 512 + 511;
    b.target.capacity_changed();
    assert_eq!(b.get(&cdb(0x28, 0, 0, 1), 512).sense, (6, 0x2a, 9));
    assert_eq!(b.get(&cdb(0x28, 0, 1024, 1), 512).sense, OUT_OF_RANGE);
}
