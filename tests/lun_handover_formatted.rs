//! LUNs whose type of protection an initiator's FORMAT UNIT has chosen, which go to another host with their storage: type, tags and what initiators see go along.
#![allow(clippy::unwrap_used)] // A test may panic.

use tcmu_dif::{image::Format, peer::kernel::Data, pi::Tuple};

#[path = "common/goes.rs"]
#[allow(dead_code)] // Others use more of it.
mod goes;
#[path = "common/numbered.rs"]
#[allow(dead_code)] // Others use more of it.
mod numbered;

use goes::{Fault, Side, config, exposed, hand_over_beside, pair};

fn read_capacity(side: &Side) -> Vec<u8> {
    let (status, data) = side.run(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], Data::In(32));
    assert_eq!(status, 0);
    data
}

/// Hears of what has changed: mode parameters, capacity.
fn hear(side: &Side) {
    assert!((0..8).any(|_| side.run(&[0; 6], Data::None).0 == 0), "there is always something else");
}

fn go(format_unit: &[u8], parameters: &[u8], write: impl Fn(&Side) -> Vec<u8>, cdb: &[u8], prot: u8) {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, format| {
        let dir = dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        exposed(config(&dir, format, true))
    };
    let (a, b, _) = pair(dir.path(), of("a", Format::Raw), of("b", Format::Qcow2));
    let data = if parameters.is_empty() { Data::None } else { Data::Out(parameters) };
    assert_eq!(a.run(format_unit, data).0, 0);
    hear(&a);
    let written = write(&a);
    let capacity = read_capacity(&a);
    assert_eq!(capacity[12] & 0xf, prot, "P_TYPE and PROT_EN");
    let ends = std::os::unix::net::UnixStream::pair().unwrap();
    let (given, taken) = hand_over_beside(&a, &b, Fault::None, ends, || ());
    taken.unwrap();
    given.unwrap();
    hear(&b);
    assert_eq!(read_capacity(&b), capacity);
    let (status, got) = b.run(cdb, Data::In(written.len()));
    assert_eq!((status, got == written), (0, true));
    // What was formatted away is gone there, too, and has no tuples.
    let (status, got) = b.run(&[0x28, 0, 0, 0, 0, 200, 0, 0, 8, 0], Data::In(4096));
    assert_eq!((status, got), (0, vec![0; 4096]));
    b.host().stop().unwrap();
}

#[test]
fn type_3_with_reference_tags_of_the_initiators_own_goes_along() {
    let write = |side: &Side| {
        let block = |i: u16| {
            let data = vec![i as u8; 512];
            let guard = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF).checksum(&data);
            let tuple = Tuple { guard, app: 0x1230 + i, reference: 0xdead_0000 + u32::from(i) * 77 };
            [data, tuple.to_bytes().to_vec()].concat()
        };
        let blocks: Vec<u8> = (0..9).flat_map(block).collect();
        assert_eq!(side.run(&[0x2a, 0x20, 0, 0, 0, 7, 0, 0, 9, 0], Data::Out(&blocks)).0, 0);
        blocks
    };
    // FMTPINFO 11b with protection field usage 001b: type 3; P_TYPE 010b and PROT_EN.
    go(&[0x04, 0xd0, 0, 0, 0, 0], &[1, 0, 0, 0], write, &[0x28, 0x20, 0, 0, 0, 7, 0, 0, 9, 0], 5);
}

#[test]
fn protection_that_initiators_have_turned_off_stays_off_for_them_and_on_at_rest() {
    let write = |side: &Side| {
        assert_eq!(side.run(&[0x2a, 0, 0, 0, 0, 7, 0, 0, 8, 0], Data::Out(&[6; 4096])).0, 0);
        vec![6; 4096]
    };
    go(&[0x04, 0, 0, 0, 0, 0], &[], write, &[0x28, 0, 0, 0, 0, 7, 0, 0, 8, 0], 0);
}
