//! INQUIRY, READ CAPACITY, the REPORT family, LOG SENSE, READ DEFECT DATA; the table against what really answers.

use tcmu_dif::{
    scsi::opcodes::{self, Abilities},
    sys::mem::{Buffer, Sg},
    units::BlockSize,
};

use crate::memory::*;

fn rsoc(options: u8, opcode: u8, action: u16) -> Vec<u8> {
    let [high, low] = action.to_be_bytes();
    vec![0xa3, 0x0c, options, opcode, high, low, 0, 0, 0xff, 0xff, 0, 0]
}

#[test]
fn inquiry_gives_the_same_bytes_for_every_allocation_length() {
    let b = Bench::new(BlockSize::B512);
    let full = b.get(&[0x12, 0, 0, 1, 4, 0], 260).data;
    assert_eq!((full.len(), full[4]), (96, 91));
    for n in 0..=255u8 {
        assert_eq!(b.get(&[0x12, 0, 0, 0, n, 0], 255).data, full[..full.len().min(n.into())]);
    }
    assert_eq!(b.get(&[0x12, 0, 0, 0, 255, 0], 10).data, full[..10]);
    assert_eq!(b.get(&[0x12, 0, 0x80, 0, 255, 0], 255).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x12, 2, 0, 0, 255, 0], 255).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x12, 1, 0xb5, 0, 255, 0], 255).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x12, 1, 0x80, 0, 255, 0], 255).data, b"\0\x80\0\x08serial-1");
}

#[test]
fn names_that_are_too_long_or_not_ascii_are_cut_to_what_the_fields_hold() {
    let b = Bench::with(
        BlockSize::B512,
        |c| {
            c.vendor = "MORE THAN EIGHT".into();
            c.product = "é\nx".into();
            c.revision = "12345".into();
            c.serial = format!("s\u{1f600}\0{}", "9".repeat(400));
        },
        |_| {},
    );
    let d = b.get(&[0x12, 0, 0, 0, 96, 0], 96).data;
    assert_eq!(&d[8..36], b"MORE THAx               1234");
    let serial = b.get(&[0x12, 1, 0x80, 1, 0xff, 0], 511).data;
    assert_eq!((serial.len(), &serial[..6]), (4 + 252, &b"\0\x80\0\xfcs9"[..]));
    let ids = b.get(&[0x12, 1, 0x83, 2, 0, 0], 512).data;
    assert_eq!(usize::from(u16::from_be_bytes([ids[2], ids[3]])) + 4, ids.len());
}

#[test]
fn capacity_is_the_last_block_and_tells_the_physical_block() {
    for (size, exponent) in [(BlockSize::B512, 3), (BlockSize::B4096, 0)] {
        let b = Bench::new(size);
        let length = (b.block as u32).to_be_bytes();
        assert_eq!(
            b.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8).data,
            [&[0, 0, 3, 255], &length[..]].concat()
        );
        assert_eq!(b.get(&[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0], 8).sense, INVALID_FIELD);
        let c = |n| [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, n, 0, 0];
        let d = b.get(&c(32), 32).data;
        assert_eq!(d[..16], [&[0, 0, 0, 0, 0, 0, 3, 255], &length[..], &[0, exponent, 0xc0, 0]].concat());
        for n in 0..32 {
            assert_eq!(b.get(&c(n), 32).data, d[..n.into()]);
        }
    }
    let huge = Bench::with(BlockSize::B512, |_| {}, |l| l.capacity = 1024 * 512);
    huge.volume().limits.borrow_mut().capacity = 1 << 50;
    huge.target.capacity_changed();
    huge.none(&[0; 6]);
    assert_eq!(huge.get(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8).data[..4], [0xff; 4]);
}

#[test]
fn every_command_that_is_reported_is_answered_and_no_other_is() {
    let b = Bench::new(BlockSize::B512);
    let room = Buffer::zeroed(4096).sg();
    for opcode in 0..=255u8 {
        for action in 0..32u8 {
            let listed = table()
                .iter()
                .any(|o| o.opcode == opcode && o.service_action.is_none_or(|a| a == u16::from(action)));
            let has_actions = table().iter().any(|o| o.opcode == opcode && o.service_action.is_some());
            let mut c = [0u8; 16];
            (c[0], c[1]) = (opcode, action);
            let a = b.execute(&c, &room);
            b.volume().take_seen();
            if !listed {
                assert_eq!(
                    a.sense,
                    if has_actions { INVALID_FIELD } else { UNKNOWN },
                    "{opcode:#x}/{action:#x}"
                );
            } else {
                assert_ne!(a.sense, UNKNOWN, "{opcode:#x}/{action:#x}");
            }
        }
    }
}

#[test]
fn a_cdb_that_is_shorter_than_its_command_is_refused() {
    let b = Bench::new(BlockSize::B512);
    let room = Buffer::zeroed(4096).sg();
    assert_eq!(b.none(&[]).sense, UNKNOWN);
    for op in table() {
        for n in 1..op.usage.len() {
            assert_eq!(b.execute(&op.usage[..n], &room).sense, INVALID_FIELD, "{op:?} {n}");
        }
    }
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn naca_is_refused_by_every_command() {
    let b = Bench::new(BlockSize::B512);
    for op in table() {
        let mut c = vec![0; op.usage.len()];
        (c[0], c[1]) = (op.opcode, op.service_action.unwrap_or(0) as u8);
        c[op.usage.len() - 1] = 0x04;
        assert_eq!(b.none(&c).sense, INVALID_FIELD, "{op:?}");
    }
    assert_eq!(b.volume().take_seen(), []);
}

#[test]
fn the_listing_of_supported_commands_leads_to_each_of_them() {
    let b = Bench::new(BlockSize::B512);
    let all = b.get(&rsoc(0, 0, 0), 65535).data;
    assert_eq!(all.len(), 4 + 8 * table().len());
    for d in all[4..].chunks(8) {
        let (opcode, action) = (d[0], u16::from_be_bytes([d[2], d[3]]));
        let (fits, other) = if d[5] & 1 == 1 { (2, 1) } else { (1, 2) };
        let one = b.get(&rsoc(fits, opcode, action), 65535).data;
        assert_eq!((one[1], one[3], one[4]), (3, d[7], opcode));
        assert_eq!(b.get(&rsoc(3, opcode, action), 65535).data, one);
        assert_eq!(b.get(&rsoc(0x80 | fits, opcode, action), 65535).data.len(), one.len() + 12);
        assert_eq!(b.get(&rsoc(other, opcode, action), 65535).sense, INVALID_FIELD);
        let mut usage = one[4..].to_vec();
        if d[5] & 1 == 1 {
            assert_eq!(u16::from(usage[1] & 0x1f), action);
        }
        usage[0] = opcode;
        assert!(
            opcodes::find(&usage, Abilities { thin: true, atomic: true, ..Abilities::default() }).is_ok()
        );
    }
    assert_eq!(b.get(&rsoc(4, 0, 0), 65535).sense, INVALID_FIELD);
    assert_eq!(b.get(&rsoc(0, 0, 0), 3).data.len(), 3);
    // DPO and FUA are accepted (DPOFUA = 1), and the usage maps say so.
    for opcode in [0x28, 0x2a, 0xa8, 0xaa, 0x88, 0x8a, 0x89, 0x8b, 0x9c] {
        assert_eq!(b.get(&rsoc(1, opcode, 0), 64).data[5] & 0x18, 0x18, "{opcode:#x}");
    }
}

#[test]
fn the_other_reports_have_their_shape() {
    let b = Bench::new(BlockSize::B512);
    let tmf = |extended: u8| [0xa3, 0x0d, extended, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    assert_eq!(b.get(&tmf(0), 64).data, [0x88, 0, 0, 0]);
    assert_eq!((b.get(&tmf(0x80), 64).data.len(), b.get(&tmf(0x80), 64).data[3]), (16, 12));
    let rtpg = |format: u8| [0xa3, 0x0a | format << 5, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let group = [0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1];
    assert_eq!(b.get(&rtpg(0), 64).data, [&[0, 0, 0, 12], &group[..]].concat());
    assert_eq!(b.get(&rtpg(1), 64).data, [&[0, 0, 0, 16, 0x10, 0, 0, 0], &group[..]].concat());
    assert_eq!(b.get(&rtpg(2), 64).sense, INVALID_FIELD);
    let luns = |select: u8, n: u8| [0xa0, 0, select, 0, 0, 0, 0, 0, 0, n, 0, 0];
    assert_eq!(b.get(&luns(0, 16), 16).data, [0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(b.get(&luns(1, 16), 16).data, [0; 8]);
    assert_eq!(b.get(&luns(0, 15), 16).sense, INVALID_FIELD);
    assert_eq!(b.get(&luns(9, 16), 16).sense, INVALID_FIELD);
}

#[test]
fn log_pages_and_defect_lists_have_their_shape() {
    let b = Bench::new(BlockSize::B512);
    let log = |page: u8, subpage: u8| [0x4d, 0, 0x40 | page, subpage, 0, 0, 0, 0, 64, 0];
    assert_eq!(b.get(&log(0, 0), 64).data, [0, 0, 0, 3, 0, 0x0c, 0x2f]);
    assert_eq!(b.get(&log(0, 0xff), 64).data.len(), 16);
    assert_eq!(b.get(&log(0x0c, 0), 64).data, [0x0c, 0, 0, 0]);
    assert_eq!(b.get(&log(0x0c, 0xff), 64).data, [0x4c, 0xff, 0, 4, 0x0c, 0, 0x0c, 0xff]);
    assert_eq!(b.get(&log(0x2f, 0), 64).data.len(), 12);
    assert_eq!(b.get(&log(0x11, 0), 64).sense, INVALID_FIELD);
    assert_eq!(b.get(&[0x4d, 0, 0x6f, 0, 0, 0, 1, 0, 64, 0], 64).sense, INVALID_FIELD); // no parameter from 1 on
    assert_eq!(b.get(&[0x4d, 1, 0x40, 0, 0, 0, 0, 0, 64, 0], 64).sense, INVALID_FIELD); // SP
    assert_eq!(b.get(&[0x37, 0, 0x1d, 0, 0, 0, 0, 0, 64, 0], 64).data, [0, 0x1d, 0, 0]);
    assert_eq!(b.get(&[0xb7, 0x0c, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64).data, [0, 0x0c, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_read_that_gives_nothing_is_still_a_read() {
    // Whoever carries the answer has to know that the buffer behind it holds nothing for the initiator.
    let b = Bench::new(BlockSize::B512);
    for c in [cdb(0x28, 0, 0, 0), vec![0x12, 0, 0, 0, 0, 0], vec![0x1a, 0, 0x3f, 0, 0, 0]] {
        let a = b.get(&c, 512);
        assert_eq!((a.sense, a.response.data_in, a.response.gives_data), (GOOD, 0, true), "{c:x?}");
    }
    assert!(!b.send(&cdb(0x2a, 0, 0, 1), &[0; 512]).response.gives_data);
    assert!(!b.get(&cdb(0x28, 0, 1024, 1), 512).response.gives_data);
}

#[test]
fn block_limits_fit_each_other_for_every_preferred_size() {
    for preferred in [0, 1, 512, 4096, 65536, 3 << 16, 2 << 20, 1 << 30, u32::MAX] {
        for size in [BlockSize::B512, BlockSize::B4096] {
            let b = Bench::with(size, |_| {}, |l| l.preferred_io = preferred);
            let d = b.get(&[0x12, 1, 0xb0, 0, 64, 0], 64).data;
            let word = |at: usize| be(&d[at..at + 4]);
            let (granule, max, best) = (be(&d[6..8]), word(8), word(12));
            assert!(granule > 0 && (granule * size.bytes()).is_multiple_of(4096), "{preferred}: {granule}");
            assert!(best.is_multiple_of(granule) && best <= max, "{preferred}: {granule} {best} {max}");
        }
    }
}

#[test]
fn the_future_of_a_command_is_small() {
    // Every command in flight has one on the heap; a buffer that slips into it would cost each of them.
    let b = Bench::new(BlockSize::B512);
    let none = Sg::new();
    let command = tcmu_dif::scsi::Command { cdb: &[], data: &none, dif: &none, once: None };
    let size = std::mem::size_of_val(&b.target.execute(&command));
    assert!(size < 1024, "{size} bytes");
}
