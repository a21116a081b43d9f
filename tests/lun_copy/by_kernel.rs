//! Copies whose blocks the kernel moves from file to file: that it does where it may, that nobody else can tell, and that everything else goes
//! the other way.

use std::process::Command;

use super::*;

/// Numbers below `n`.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % n
    }
}

fn fill(disk: &mut Disk, bytes: &[u8]) {
    for (at, piece) in (0..).step_by(MIB as usize).zip(bytes.chunks(MIB as usize)) {
        disk.write(at, piece);
    }
}

/// The first bytes of it, by more than one READ.
fn first(disk: &mut Disk, len: u64) -> Vec<u8> {
    (0..len).step_by(MIB as usize).flat_map(|at| disk.read(at, MIB.min(len - at))).collect()
}

#[test]
fn what_the_kernel_moves_is_what_a_read_and_a_write_would_have() {
    for (seed, block) in [(1, BlockSize::B512), (2, BlockSize::B4096)] {
        let world = World::new();
        let mut disks = [world.disk("a", RAW), world.disk("b", Kind { block, ..RAW })];
        let mut models = [noise(seed, CAPACITY), noise(seed + 10, CAPACITY)];
        disks.iter_mut().zip(&models).for_each(|(disk, model)| fill(disk, model));
        let units = [unit(&disks[0]), unit(&disks[1])];
        let (mut dice, mut by_kernel) = (Dice(seed), [0, 0]);
        for id in 0..30 {
            let (mut segments, mut bytes) = (vec![], 0);
            for _ in 0..1 + dice.below(4) {
                let (source, destination) = (dice.below(2) as usize, dice.below(2) as usize);
                let len = (1 + dice.below(768)) * 4096;
                let places = (CAPACITY - len) / 4096 + 1;
                let (from, to) = (dice.below(places) * 4096, dice.below(places) * 4096);
                let size = |i: usize| disks[i].block;
                let blocks = (len / size(source)) as u16;
                segments.push(segment(
                    source as u16,
                    destination as u16,
                    blocks,
                    from / size(source),
                    to / size(destination),
                    false,
                ));
                let data = models[source][from as usize..(from + len) as usize].to_vec();
                models[destination][to as usize..(to + len) as usize].copy_from_slice(&data);
                if source != destination || from.abs_diff(to) >= len {
                    by_kernel[destination] += len;
                }
                bytes += len;
            }
            let manager = &mut disks[dice.below(2) as usize];
            assert_eq!(manager.copy(&list(id, &units, &segments)).key_asc_ascq(), GOOD);
            let told = manager.results(0, id).data;
            assert_eq!((told[4], told[6]), (1, segments.len() as u8));
            assert_eq!(told[8..12], (bytes as u32).to_be_bytes());
        }
        assert_eq!([disks[0].moved_by_kernel(), disks[1].moved_by_kernel()], by_kernel);
        for (disk, model) in disks.iter_mut().zip(&models) {
            assert!(first(disk, CAPACITY / 2) == model[..(CAPACITY / 2) as usize]);
            disk.stop();
            assert!(std::fs::read(&disk.image).unwrap() == *model);
        }
    }
}

#[test]
fn what_is_protected_or_in_another_format_or_past_the_cache_is_read_and_written() {
    let others =
        [Kind { qcow2: true, ..RAW }, Kind { pi: true, ..RAW }, Kind { cache: CacheMode::None, ..RAW }];
    for kind in others {
        let world = World::new();
        let (mut a, mut b) = (world.disk("a", RAW), world.disk("b", kind));
        let data = noise(4, 2 * MIB);
        a.write(0, &data);
        let units = [unit(&a), unit(&b)];
        let there = segment(0, 1, 4096, 0, 100, false);
        let back = segment(1, 0, 4096, 100, 8192, false);
        assert_eq!(a.copy(&list(1, &units, &[there, back])).key_asc_ascq(), GOOD);
        assert!(b.read(51200, 2 * MIB) == data && a.read(4 * MIB, 2 * MIB) == data);
        assert_eq!((a.moved_by_kernel(), b.moved_by_kernel()), (0, 0));
        a.stop();
        b.stop();
    }
}

#[test]
fn between_two_file_systems_blocks_are_read_and_written() {
    let world = World::new();
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return eprintln!("not tested: there is no second file system to write to");
    };
    let there = World { dir, neighbourhood: world.neighbourhood.clone() };
    let (mut a, mut b) = (world.disk("a", RAW), there.disk("b", RAW));
    let data = noise(4, 3 * MIB);
    a.write(0, &data);
    let units = [unit(&a), unit(&b)];
    assert_eq!(a.copy(&list(1, &units, &[segment(0, 1, 6144, 0, 3, false)])).key_asc_ascq(), GOOD);
    assert!(b.read(3 * 512, 3 * MIB) == data);
    a.stop();
    b.stop();
}

/// Blocks of one byte each: half of one and half of another is something that nobody wrote.
#[test]
fn copies_in_both_directions_and_what_holds_the_same_blocks_come_to_an_end_and_tear_nothing() {
    const AREA: u64 = 2 * MIB;
    let world = World::new();
    let mut disks = [world.disk("a", RAW), world.disk("b", RAW)];
    let mut dice = Dice(8);
    let mut of =
        |bytes: u64| -> Vec<u8> { (0..bytes / 512).flat_map(|_| [dice.below(3) as u8; 512]).collect() };
    for disk in &mut disks {
        let blocks = of(AREA);
        fill(disk, &blocks);
    }
    let units = [unit(&disks[0]), unit(&disks[1])];
    let mut dice = Dice(9);
    let (mut swapped, mut left) = (0, 0);
    for _ in 0..30 {
        for (i, disk) in disks.iter_mut().enumerate() {
            // From the first half to the second, so that what one copy writes the other does not read: nobody keeps these apart.
            let (from, to) = (dice.below(64), 2048 + dice.below(64));
            let copy = list(0, &units, &[segment(i as u16, 1 - i as u16, 1984, from, to, false)]);
            for n in 0..17 {
                if n == 4 {
                    disk.kernel.submit(&xcopy(copy.len()), Data::Out(&copy)).unwrap();
                    continue;
                }
                // COMPARE AND WRITE: one block for another.
                let both = [[dice.below(3) as u8; 512], [dice.below(3) as u8; 512]].concat();
                let mut cdb = [0; 16];
                (cdb[0], cdb[13]) = (0x89, 1);
                cdb[2..10].copy_from_slice(&dice.below(AREA / 512).to_be_bytes());
                disk.kernel.submit(&cdb, Data::Out(&both)).unwrap();
            }
        }
        for disk in &mut disks {
            let mut ended = 0;
            while ended < 17 {
                for e in disk.kernel.wait(Duration::from_secs(30)).unwrap() {
                    ended += 1;
                    match e.key_asc_ascq() {
                        GOOD => swapped += 1,
                        (0xe, 0x1d, 0) => left += 1,
                        other => panic!("{other:x?}"),
                    }
                }
            }
        }
    }
    assert!(swapped > 200 && left > 200, "{swapped} {left}");
    assert!(disks.iter().all(|disk| disk.moved_by_kernel() > 0));
    for disk in &mut disks {
        for block in first(disk, AREA).chunks(512) {
            assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
        }
        disk.stop();
    }
}

/// A file system with little room, taken down at the end.
struct Small(Option<tempfile::TempDir>);

impl Small {
    fn new(size: &str) -> Option<Small> {
        let dir = tempfile::tempdir().unwrap();
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", size, "tmpfs"]).arg(dir.path()).output();
        made.is_ok_and(|out| out.status.success()).then(|| Small(Some(dir)))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Some(dir) = &self.0 {
            let _ = Command::new("umount").arg("-l").arg(dir.path()).status();
        }
    }
}

#[test]
fn a_full_file_system_ends_the_copy_as_it_ends_a_write() {
    let Some(small) = Small::new("size=20m") else {
        return eprintln!("not tested: it takes root to mount a small file system");
    };
    let dir = tempfile::tempdir_in(small.0.as_ref().unwrap().path()).unwrap();
    let world = World { dir, neighbourhood: Neighbourhood::default() };
    let (mut a, mut b) = (world.disk("a", RAW), world.disk("b", RAW));
    let data = noise(3, 12 * MIB);
    fill(&mut a, &data);
    let units = [unit(&a), unit(&b)];
    let all = segment(0, 1, 24576, 0, 0, false);
    assert_eq!(a.copy(&list(1, &units, std::slice::from_ref(&all))).key_asc_ascq(), (0xa, 0x27, 7));
    let told = a.results(0, 1).data;
    let moved = u64::from(u32::from_be_bytes(told[8..12].try_into().unwrap()));
    assert!(told[4] == 2 && (4 * MIB..12 * MIB).contains(&moved), "{moved}");
    assert!(first(&mut b, moved) == data[..moved as usize]);
    // The last of it may have found room as a write.
    assert!((4 * MIB..=moved).contains(&b.moved_by_kernel()));
    a.stop();
    b.stop();
}
