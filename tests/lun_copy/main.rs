//! EXTENDED COPY between whole LUNs: threads, rings and images as they are, two or three of them side by side.

#![allow(clippy::unwrap_used)] // A test may panic.

mod by_kernel;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::{
        create::{create_qcow2, create_raw},
        direct::CacheMode,
        qcow2::CreateOptions,
    },
    lun::{LunHandle, LunParams, Neighbourhood, config::DeviceConfig, start},
    peer::kernel::{Data, Ended, Kernel, Options},
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    scsi,
    sys::{self, backend_from_env},
    units::BlockSize,
};

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 16 * MIB;

struct Disk {
    kernel: Kernel,
    lun: Option<LunHandle>,
    image: PathBuf,
    serial: String,
    block: u64,
}

struct World {
    dir: tempfile::TempDir,
    neighbourhood: Neighbourhood,
}

/// What a disk is.
#[derive(Clone, Copy)]
struct Kind {
    qcow2: bool,
    pi: bool,
    block: BlockSize,
    group: Option<&'static str>,
    read_only: bool,
    cache: CacheMode,
}

const RAW: Kind = Kind {
    qcow2: false,
    pi: false,
    block: BlockSize::B512,
    group: Some("g"),
    read_only: false,
    cache: CacheMode::Writeback,
};

impl World {
    fn new() -> World {
        World { dir: tempfile::tempdir().unwrap(), neighbourhood: Neighbourhood::default() }
    }

    fn disk(&self, serial: &str, kind: Kind) -> Disk {
        let image = self.dir.path().join(serial);
        self.make(&image, kind);
        let options = Options { data_size: 32 << 20, cut: Some(7), ..Options::default() };
        let kernel = Kernel::new(options).unwrap();
        let mut config = DeviceConfig::new(&image);
        config.pi = kind.pi.then_some(PiType::Type1);
        config.copy_group = kind.group.map(str::to_owned);
        config.read_only = kind.read_only;
        config.cache = kind.cache;
        let lun = start(LunParams {
            name: serial.into(),
            config,
            block_size: kind.block,
            capacity: CAPACITY,
            write_cache: true,
            serial: Some(serial.into()),
            neighbourhood: self.neighbourhood.clone(),
            state_dir: None,
            backend: Some(backend_from_env()),
            polling: true,
            device: kernel.device().unwrap(),
        })
        .unwrap();
        let block = kind.block.bytes();
        let mut disk = Disk { kernel, lun: Some(lun), image, serial: serial.into(), block };
        assert_eq!(disk.run(&[0; 6], Data::None).key_asc_ascq(), (6, 0x29, 0));
        disk
    }

    fn make(&self, image: &Path, kind: Kind) {
        let image = image.to_owned();
        sys::run(async move |io| {
            if kind.qcow2 {
                create_qcow2(&io, &image, &CreateOptions::new(CAPACITY)).await.unwrap();
            } else {
                create_raw(&io, &image, CAPACITY).await.unwrap();
            }
            if kind.pi {
                let new = NewSidecar {
                    block_size: kind.block,
                    kind: PiType::Type1,
                    mode: PiMode::Bitmap,
                    capacity: kind.block.blocks_in(CAPACITY),
                    format: if kind.qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw },
                    stamp: Stamp::of(&image).unwrap(),
                };
                tools::create(&io, &image, &default_path(&image), new).await.unwrap();
            }
        });
    }
}

impl Disk {
    fn run(&mut self, cdb: &[u8], data: Data<'_>) -> Ended {
        self.kernel.execute(cdb, data).unwrap()
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        let (lba, blocks) = (at / self.block, bytes.len() as u64 / self.block);
        assert_eq!(self.run(&rw16(0x8a, lba, blocks), Data::Out(bytes)).key_asc_ascq(), (0, 0, 0));
    }

    fn read(&mut self, at: u64, len: u64) -> Vec<u8> {
        let cdb = rw16(0x88, at / self.block, len / self.block);
        let ended = self.run(&cdb, Data::In(len as usize));
        assert_eq!(ended.status, 0);
        ended.data
    }

    fn copy(&mut self, list: &[u8]) -> Ended {
        self.run(&xcopy(list.len()), Data::Out(list))
    }

    fn stop(&mut self) {
        self.lun.take().unwrap().stop().unwrap();
    }

    /// Bytes that the kernel has moved here.
    fn moved_by_kernel(&self) -> u64 {
        self.lun.as_ref().unwrap().stats().unwrap().moved_by_kernel.unwrap_or(0)
    }

    /// RECEIVE COPY RESULTS with that service action.
    fn results(&mut self, action: u8, id: u8) -> Ended {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[2], cdb[13]) = (0x84, action, id, 255);
        self.run(&cdb, Data::In(255))
    }
}

fn rw16(opcode: u8, lba: u64, blocks: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
    cdb
}

fn xcopy(len: usize) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = 0x83;
    cdb[10..14].copy_from_slice(&(len as u32).to_be_bytes());
    cdb
}

fn unit(disk: &Disk) -> Vec<u8> {
    let mut d = vec![0; 32];
    d[0] = 0xe4;
    d[4..8].copy_from_slice(&[1, 3, 0, 8]);
    d[8..16].copy_from_slice(&scsi::naa_from_serial(&disk.serial).to_be_bytes());
    d[28..32].copy_from_slice(&(disk.block as u32).to_be_bytes());
    d
}

/// Source, destination, number of blocks, LBA in each; `dc`: they are the destination's blocks.
fn segment(source: u16, destination: u16, blocks: u16, from: u64, to: u64, dc: bool) -> Vec<u8> {
    let mut d = vec![2, if dc { 2 } else { 0 }, 0, 0x18];
    d.extend(source.to_be_bytes());
    d.extend(destination.to_be_bytes());
    d.extend([0, 0]);
    d.extend(blocks.to_be_bytes());
    d.extend(from.to_be_bytes());
    d.extend(to.to_be_bytes());
    d
}

fn list(id: u8, units: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (units, segments) = (units.concat(), segments.concat());
    let mut out = vec![id, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    out[2..4].copy_from_slice(&(units.len() as u16).to_be_bytes());
    out[8..12].copy_from_slice(&(segments.len() as u32).to_be_bytes());
    [out, units, segments].concat()
}

fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    (0..len / 8).flat_map(|_| next().to_le_bytes()).collect()
}

const GOOD: (u8, u8, u8) = (0, 0, 0);

#[test]
fn blocks_go_from_one_lun_to_the_other_over_formats_protection_and_block_sizes() {
    let kinds = [
        (RAW, Kind { qcow2: true, ..RAW }),
        (Kind { qcow2: true, pi: true, ..RAW }, RAW),
        (RAW, Kind { pi: true, block: BlockSize::B4096, ..RAW }),
        (Kind { block: BlockSize::B4096, ..RAW }, Kind { qcow2: true, pi: true, ..RAW }),
    ];
    for (from, to) in kinds {
        let world = World::new();
        let (mut a, mut b) = (world.disk("source", from), world.disk("destination", to));
        let data = noise(7, 5 * MIB);
        a.write(MIB, &data);
        // More than one chunk, to another place, counted in the destination's blocks; both units can be asked.
        let blocks = (data.len() as u64 / b.block) as u16;
        let moved = |to| segment(0, 1, blocks, MIB / a.block, to / b.block, true);
        let units = [unit(&a), unit(&b)];
        let (first, second) = (moved(3 * MIB), moved(9 * MIB));
        assert_eq!(a.copy(&list(1, &units, &[first])).key_asc_ascq(), GOOD);
        assert_eq!(b.copy(&list(1, &units, &[second])).key_asc_ascq(), GOOD);
        assert!(b.read(3 * MIB, 5 * MIB) == data && b.read(9 * MIB, 5 * MIB) == data);
        assert!(b.read(2 * MIB, MIB).iter().chain(&b.read(8 * MIB, MIB)).all(|byte| *byte == 0));
        let status = a.results(0, 1);
        assert_eq!(status.data[..8], [0, 0, 0, 8, 1, 0, 1, 0]);
        assert_eq!(status.data[8..12], (5 * MIB as u32).to_be_bytes());
        a.stop();
        b.stop();
    }
}

#[test]
fn segments_are_done_one_after_another_and_one_that_overlaps_itself_moves_as_a_whole() {
    let world = World::new();
    let mut a = world.disk("alone", Kind { group: None, ..RAW });
    let mut model = noise(3, CAPACITY);
    for at in (0..CAPACITY).step_by(1 << 19) {
        let piece = model[at as usize..][..1 << 19].to_vec();
        a.write(at, &piece);
    }
    let me = [unit(&a)];
    let mut segments = vec![];
    // Forwards and backwards by less than a chunk and by more, over each other; 32 of them.
    for i in 0..32u64 {
        let (from, to) = ((i * 977) % 9000, (i * 977 + [3, 2500, 0, 1][i as usize % 4]) % 9000);
        let (from, to) = if i % 3 == 0 { (to, from) } else { (from, to) };
        let blocks = 4000 + i * 10;
        segments.push(segment(0, 0, blocks as u16, from, to, false));
        let range = from as usize * 512..(from + blocks) as usize * 512;
        model.copy_within(range, to as usize * 512);
    }
    assert_eq!(a.copy(&list(9, &me, &segments)).key_asc_ascq(), GOOD);
    assert_eq!(a.results(0, 9).data[4..7], [1, 0, 32]);
    a.stop();
    assert!(std::fs::read(&a.image).unwrap() == model);
}

#[test]
fn nobody_is_reached_without_a_common_group_or_under_a_name_that_two_have() {
    let world = World::new();
    let mut a = world.disk("a", RAW);
    let others = [
        world.disk("other", Kind { group: Some("h"), ..RAW }),
        world.disk("none", Kind { group: None, ..RAW }),
    ];
    for mut other in others {
        let data = noise(1, 4096);
        other.write(0, &data);
        let units = [unit(&a), unit(&other)];
        for (from, to) in [(0, 1), (1, 0)] {
            let refused = a.copy(&list(0, &units, &[segment(from, to, 8, 0, 64, false)]));
            assert_eq!(refused.key_asc_ascq(), (0xa, 0x0d, 2));
        }
        assert!(a.read(64 * 512, 4096).iter().chain(&other.read(64 * 512, 4096)).all(|b| *b == 0));
        other.stop();
    }
    let twin_world = World { dir: tempfile::tempdir().unwrap(), neighbourhood: world.neighbourhood.clone() };
    let mut twin = twin_world.disk("a", RAW);
    let units = [unit(&a)];
    let refused = a.copy(&list(0, &units, &[segment(0, 0, 8, 0, 64, false)]));
    assert_eq!(refused.key_asc_ascq(), (0xa, 0x0d, 2), "which of the two is meant?");
    twin.stop();
    assert_eq!(a.copy(&list(0, &units, &[segment(0, 0, 8, 0, 64, false)])).key_asc_ascq(), GOOD);
    a.stop();
}

#[test]
fn a_segment_that_cannot_be_is_named_and_nothing_is_copied_of_the_list() {
    let world = World::new();
    let (mut a, b) = (world.disk("a", RAW), world.disk("b", Kind { block: BlockSize::B4096, ..RAW }));
    a.write(0, &noise(5, 4096));
    let mut null = unit(&a);
    null[1] = 0x20;
    let units = [unit(&a), unit(&b), null];
    let good = segment(0, 0, 8, 0, 100, false);
    let blocks = CAPACITY / 512;
    for (bad, sense, byte) in [
        (segment(0, 3, 8, 0, 64, false), (0xa, 0x08, 4), 6),
        (segment(2, 0, 8, 0, 64, false), (0xa, 0x08, 4), 4),
        (segment(0, 1, 9, 0, 64, false), (0xa, 0x26, 0x0a), 10),
        (segment(0, 0, 8, blocks - 7, 64, false), (0xa, 0, 0), 12),
        (segment(0, 0, 8, 0, u64::MAX, false), (0xa, 0, 0), 20),
        (segment(0, 1, 8193, 0, 0, true), (0xa, 0x26, 0), 10),
    ] {
        let refused = a.copy(&list(4, &units, &[good.clone(), bad]));
        assert_eq!(refused.key_asc_ascq(), sense);
        assert_eq!(
            (&refused.sense[8..12], &refused.sense[15..18]),
            (&[0, 0, 0, 1][..], &[0xa0, 0, byte][..])
        );
        assert_eq!(a.results(0, 4).key_asc_ascq(), (5, 0x24, 0), "it was never begun");
        assert!(a.read(100 * 512, 4096).iter().all(|byte| *byte == 0));
    }
    let mut other_blocks = unit(&a);
    other_blocks[30] = 0x10;
    let refused = a.copy(&list(4, &[other_blocks], &[good]));
    assert_eq!((refused.key_asc_ascq(), refused.sense[17]), ((5, 0x26, 0), 16 + 29));
}

#[test]
fn a_bad_block_is_never_copied_and_a_write_protected_lun_is_never_written() {
    let world = World::new();
    let mut a = world.disk("a", Kind { pi: true, ..RAW });
    let mut b = world.disk("b", Kind { pi: true, ..RAW });
    let mut c = world.disk("c", Kind { read_only: true, ..RAW });
    a.write(0, &noise(5, MIB));
    b.write(0, &noise(6, MIB));
    let before = b.read(0, MIB);
    let file = std::fs::OpenOptions::new().write(true).open(&a.image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"rot", 700 * 512).unwrap();
    let units = [unit(&a), unit(&b), unit(&c)];
    let rotten = b.copy(&list(1, &units, &[segment(0, 1, 2048, 0, 0, false)]));
    assert_eq!(rotten.key_asc_ascq(), (0xa, 0x10, 1));
    let (status, details) = (b.results(0, 1).data, b.results(4, 1).data);
    assert_eq!((status[4], &status[5..12]), (2, &[0; 7][..]));
    assert_eq!((details[56], &details[58..60], &details[60..78]), (2, &[0, 18][..], &rotten.sense[..18]));
    assert!(b.read(0, MIB) == before, "the chunk with the bad block");
    let protected = b.copy(&list(1, &units, &[segment(1, 2, 8, 0, 0, false)]));
    assert_eq!(protected.key_asc_ascq(), (0xa, 0x27, 0));
    assert_eq!(c.copy(&list(1, &units, &[segment(2, 1, 8, 0, 0, false)])).key_asc_ascq(), GOOD);
    for disk in [&mut a, &mut b, &mut c] {
        disk.stop();
    }
}

#[test]
fn between_luns_that_are_protected_alike_no_guard_is_made_anew() {
    let world = World::new();
    let mut a = world.disk("a", Kind { pi: true, ..RAW });
    let mut b = world.disk("b", Kind { pi: true, qcow2: true, ..RAW });
    let data = noise(21, 5 * MIB);
    a.write(0, &data);
    let units = [unit(&a), unit(&b)];
    let there = list(1, &units, &[segment(0, 1, 10240, 0, 4096, false), segment(1, 1, 2048, 4096, 1, false)]);
    assert_eq!(a.copy(&there).key_asc_ascq(), GOOD);
    let seen = b.lun.as_ref().unwrap().stats().unwrap().pi.unwrap();
    assert_eq!((seen.generated, seen.guard_errors), (0, 0));
    assert!(seen.verified >= 12288, "{seen:?}");
    assert!(b.read(2 * MIB, 5 * MIB) == data && b.read(512, MIB) == data[..MIB as usize]);
    // A block that has no tuple gets one, as from a write.
    assert_eq!(b.copy(&list(1, &units, &[segment(0, 1, 8, 20000, 0, false)])).key_asc_ascq(), GOOD);
    assert_eq!(b.lun.as_ref().unwrap().stats().unwrap().pi.unwrap().generated, 8);
    a.stop();
    b.stop();
}

#[test]
fn two_luns_that_copy_to_each_other_at_once_both_come_to_an_end() {
    let world = World::new();
    let (mut a, mut b) = (world.disk("a", RAW), world.disk("b", Kind { qcow2: true, ..RAW }));
    let (from_a, from_b) = (noise(1, 4 * MIB), noise(2, 4 * MIB));
    a.write(0, &from_a);
    b.write(0, &from_b);
    let units = [unit(&a), unit(&b)];
    for round in 0..4 {
        let there = list(round, &units, &[segment(0, 1, 8192, 0, 16384, false)]);
        let back = list(round, &units, &[segment(1, 0, 8192, 0, 16384, false)]);
        a.kernel.submit(&xcopy(there.len()), Data::Out(&there)).unwrap();
        b.kernel.submit(&xcopy(back.len()), Data::Out(&back)).unwrap();
        for disk in [&mut a, &mut b] {
            let ended = disk.kernel.wait(Duration::from_secs(30)).unwrap();
            assert_eq!((ended.len(), ended[0].status), (1, 0));
        }
    }
    assert!(a.read(8 * MIB, 4 * MIB) == from_b && b.read(8 * MIB, 4 * MIB) == from_a);
    a.stop();
    b.stop();
}

#[test]
fn a_lun_that_stops_in_the_middle_ends_the_copy_and_holds_nobody_up() {
    let world = World::new();
    let mut a = world.disk("a", RAW);
    let mut b = world.disk("b", RAW);
    let units = [unit(&a), unit(&b)];
    // As long as a list can be: 64 segments of 16 MiB, and not of holes, so that the stop comes in between.
    for at in (0..CAPACITY).step_by(1 << 20) {
        a.write(at, &noise(at + 1, MIB));
    }
    let segments = vec![segment(0, 1, (CAPACITY / 512) as u16, 0, 0, false); 64];
    let long = list(1, &units, &segments);
    a.kernel.submit(&xcopy(long.len()), Data::Out(&long)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let began = Instant::now();
    b.stop();
    assert!(began.elapsed() < Duration::from_secs(10), "the copy holds its destination");
    let ended = a.kernel.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(ended[0].key_asc_ascq(), (0xa, 0x0d, 2));
    assert_eq!(
        a.copy(&list(2, &units, &segments[..1])).key_asc_ascq(),
        (0xa, 0x0d, 2),
        "and it is not found"
    );
    a.stop();
}

#[test]
fn a_lun_that_is_told_to_stop_ends_its_own_copy_before_long() {
    let world = World::new();
    let (mut a, mut b) = (world.disk("a", RAW), world.disk("b", RAW));
    let units = [unit(&a), unit(&b)];
    let segments = vec![segment(0, 1, (CAPACITY / 512) as u16, 0, 0, false); 64];
    let long = list(1, &units, &segments);
    a.kernel.submit(&xcopy(long.len()), Data::Out(&long)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let began = Instant::now();
    a.stop();
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(a.kernel.wait(Duration::from_secs(1)).unwrap().len(), 1, "it was answered");
    b.stop();
}

#[test]
fn results_are_kept_by_list_identifier_and_unknown_ones_are_refused() {
    let world = World::new();
    let mut a = world.disk("a", RAW);
    for action in [0, 1, 4] {
        assert_eq!(a.results(action, 77).key_asc_ascq(), (5, 0x24, 0));
    }
    assert_eq!(a.results(2, 77).key_asc_ascq(), (5, 0x24, 0), "a service action that is not there");
    let units = [unit(&a)];
    let mut discarded = list(5, &units, &[segment(0, 0, 8, 0, 64, false)]);
    discarded[1] = 0x10;
    assert_eq!(a.copy(&discarded).key_asc_ascq(), GOOD);
    assert_eq!(a.results(0, 5).key_asc_ascq(), (5, 0x24, 0));
    for id in 0..40 {
        assert_eq!(a.copy(&list(id, &units, &[segment(0, 0, 1, 0, 64, false)])).key_asc_ascq(), GOOD);
    }
    assert_eq!(a.results(0, 39).data[..7], [0, 0, 0, 8, 1, 0, 1]);
    assert_eq!(
        (a.results(1, 39).data[..4].to_vec(), a.results(4, 39).data[..4].to_vec()),
        (vec![0; 4], vec![0; 4])
    );
    assert_eq!(a.results(0, 0).key_asc_ascq(), (5, 0x24, 0), "as many as are kept, the latest");
    let parameters = a.results(3, 0).data;
    assert_eq!((&parameters[..4], &parameters[8..12]), (&[0, 0, 0, 42][..], &[0, 64, 0, 64][..]));
    assert_eq!(a.run(&xcopy(0), Data::None).key_asc_ascq(), GOOD);
    a.stop();
}

/// Lists that are nearly right, with some bytes and the length changed at random.
#[test]
fn hostile_lists_are_refused_or_done_and_the_lun_goes_on() {
    let world = World::new();
    let (mut a, mut b) = (world.disk("a", RAW), world.disk("b", RAW));
    let good =
        list(1, &[unit(&a), unit(&b)], &[segment(0, 1, 8, 0, 64, false), segment(1, 0, 100, 5, 64, true)]);
    let random = noise(11, 8 * 3000);
    let mut refused = 0;
    for words in random.chunks(24) {
        let mut bad = good.clone();
        for pair in words[..8].chunks(2).take(1 + usize::from(words[8]) % 4) {
            let at = usize::from(pair[0]) % bad.len();
            bad[at] ^= 1 << (pair[1] % 8);
        }
        if words[9] < 64 {
            bad.truncate(usize::from(words[10]) % bad.len());
        }
        let len = if words[11] < 32 { usize::from(words[12]) << (words[13] % 24) } else { bad.len() };
        let ended = a.run(&xcopy(len), Data::Out(&bad));
        refused += u32::from(ended.status == 2);
        assert!(matches!(ended.status, 0 | 2), "{bad:x?}");
        assert!(ended.status == 0 || matches!(ended.sense[2], 5 | 0xa), "{bad:x?}");
    }
    assert!(refused > 100);
    assert_eq!(a.copy(&good).key_asc_ascq(), GOOD);
    a.stop();
    b.stop();
}
