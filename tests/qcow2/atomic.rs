//! `WriteFlags::atomic`: all of such a write or nothing is there after a cut at any moment, wherever its entries lie, whatever has to be
//! allocated or copied for it, and whatever is written beside it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::{CreateOptions, Qcow2, Storage},
    sys::{
        exec::{join, join_all, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::{IoErrorKind, Result, Volume, WriteFlags},
};

use crate::{
    crash::{Files, Kind, cut, disks, kinds, made, open, open_files},
    sim::{self, Cut, SECTOR, SimDisk},
    support::{Rng, check_leaks_at_most, qemu_img, qemu_io, scale},
    walk::walk,
};

const PAGE: u64 = 4096;
type Image = Qcow2<Rc<SimDisk>>;

async fn read(image: &Image, at: u64, len: u64) -> Vec<u8> {
    let to = Buffer::zeroed(len as usize).sg();
    image.read(ByteOffset(at), &to).await.unwrap();
    to.to_vec()
}

async fn write(image: &Image, at: u64, bytes: &[u8], atomic: bool) -> Result<()> {
    let flags = WriteFlags { atomic, ..WriteFlags::default() };
    image.write(ByteOffset(at), &Buffer::from_slice(bytes).sg(), flags).await
}

/// Bytes that say where they are and which write they are of.
fn pattern(tag: u64, at: u64, len: u64) -> Vec<u8> {
    (at / 8..(at + len) / 8).flat_map(|word| (word << 16 | (tag & 0x7fff) << 1 | 1).to_le_bytes()).collect()
}

/// Disks with entries in several sectors of a table, in several tables, and in several sectors of the L1 table.
fn large_kinds() -> Vec<(Rc<Kind>, Vec<u64>)> {
    let ours = |size, cluster_size, extended_l2, backed: bool| {
        sim::run(made(CreateOptions {
            cluster_size,
            extended_l2,
            backing_file: backed.then(|| "under".to_owned()),
            backing_format: backed.then(|| "qcow2".to_owned()),
            ..CreateOptions::new(size)
        }))
    };
    let by_qemu = |size: u64, snapshot: bool| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", name, &size.to_string()]);
        qemu_io(
            &path,
            &[
                "write -P 7 200k 100k",
                "write -P 8 2000k 90k",
                "write -c -P 9 2100k 4k",
                "write -P 6 131000k 150k",
            ],
        );
        if snapshot {
            qemu_img(&["snapshot", "-c", "one", name]);
        }
        std::fs::read(&path).unwrap()
    };
    let size = 129 << 20;
    let places = vec![256 << 10, 2 << 20, 128 << 20];
    let kind =
        |name: &str, size, image, under| Rc::new(Kind { name: name.into(), size, image, under, data: None });
    let under = by_qemu(size, false);
    vec![
        (kind("4k, large", size, ours(size, 4096, false, false), None), places.clone()),
        (kind("4k, large, snapshot", size, by_qemu(size, true), None), places.clone()),
        (kind("4k, large, backed", size, ours(size, 4096, false, true), Some(under)), places),
        (
            kind("subclusters, large", 17 << 20, ours(17 << 20, 16384, true, false), None),
            vec![512 << 10, 16 << 20],
        ),
    ]
}

/// What is known of the disk's part beside the atomic write is not looked at here: `crash` does that.
struct Session<'a> {
    kind: &'a Kind,
    image: &'a Image,
    disk: &'a Files<Rc<SimDisk>>,
    rng: RefCell<Rng>,
    busy: Cell<bool>,
    cuts: Cell<u64>,
}

impl Session<'_> {
    fn below(&self, n: u64) -> u64 {
        self.rng.borrow_mut().below(n)
    }

    /// Bytes to write as a whole.
    fn range(&self, places: &[u64]) -> (u64, u64) {
        let limits = self.image.limits();
        let (most, unit) = (u64::from(limits.atomic_write), u64::from(limits.atomic_unit).max(SECTOR));
        let size = self.kind.size;
        let longest = most.min(size / 2).min(if self.below(8) == 0 { most } else { 48 << 10 });
        let len = ((1 + self.below(longest / unit)) * unit).min(longest / unit * unit);
        let at = match places.get(self.below(places.len() as u64 + 1) as usize) {
            // Across it, if there is more than one unit.
            Some(place) => place.saturating_sub((self.below(len / unit) * unit).min(*place)),
            None => self.below((size - len) / unit + 1) * unit,
        };
        (at.min((size - len) / unit * unit), len)
    }

    /// Others at work near by. The target keeps them off the pages of an atomic write.
    async fn beside(&self, (at, len): (u64, u64)) {
        let own = at / PAGE * PAGE..(at + len).next_multiple_of(PAGE);
        while self.busy.get() {
            let near = (own.start / PAGE).saturating_sub(20);
            let page = (near + self.below(40 + (own.end - own.start) / PAGE)) * PAGE;
            if own.contains(&page) || page + PAGE > self.kind.size {
                yield_now().await;
                continue;
            }
            // Whole clusters come and go, so that entries beside the range's change.
            let len = if self.below(2) == 0 { PAGE } else { SECTOR * (1 + self.below(PAGE / SECTOR)) };
            let start = page + self.below((PAGE - len) / SECTOR + 1) * SECTOR;
            match self.below(6) {
                0 | 1 => self.image.discard(ByteOffset(start), len).await.unwrap(),
                2 if self.image.limits().keeps_whole(ByteOffset(start), len) => {
                    write(self.image, start, &pattern(3, start, len), true).await.unwrap();
                }
                _ => write(self.image, start, &pattern(5, start, len), false).await.unwrap(),
            }
        }
    }

    /// Cuts after every change of the disk, in every way.
    async fn cutter(&self, (at, len): (u64, u64), old: &[u8], new: &[u8]) {
        let Kind { name, under, .. } = self.kind;
        let mut last = false;
        let mut changes = u64::MAX;
        while !last {
            last = !self.busy.get();
            let now = self.disk.0.changes();
            if now == changes && !last {
                yield_now().await;
                continue;
            }
            changes = now;
            let some = [Cut::Process, Cut::Oldest, Cut::Prefix, Cut::Any][self.below(4) as usize];
            for how in [Cut::Any, some] {
                let left = cut(self.disk, how, &mut self.rng.borrow_mut());
                walk(&left.0).unwrap_or_else(|e| panic!("{name}, {how:?}: {e}"));
                let files = (SimDisk::new(&left.0, 1, 0), left.1.map(|data| SimDisk::new(&data, 1, 0)));
                let after = open_files(&files, under.as_deref()).await.unwrap();
                let got = read(&after, at, len).await;
                assert!(got == *old || got == *new, "{name}, {how:?}: {len} bytes at {at} are torn");
                self.cuts.set(self.cuts.get() + 1);
                if under.is_none() && files.1.is_none() && self.below(400) == 0 {
                    let dir = tempfile::tempdir().unwrap();
                    let path = dir.path().join("cut.qcow2");
                    std::fs::write(&path, &left.0).unwrap();
                    check_leaks_at_most(&path);
                }
            }
            // What happened on the way to the next change is no other disk.
            yield_now().await;
        }
    }
}

/// Gives how many cuts were judged.
async fn session(kind: Rc<Kind>, places: Vec<u64>, whole: u64, seed: u64) -> u64 {
    let disk = disks(&kind, seed, 4);
    for file in [Some(&disk.0), disk.1.as_ref()].into_iter().flatten() {
        file.whole.set(whole);
        file.racing.set(true);
    }
    let image = open_files(&disk, kind.under.as_deref()).await.unwrap();
    let limits = image.limits();
    let expected = match image.cluster_size() {
        0..PAGE => (0, 0),
        cluster if disk.1.is_some() => {
            let unit = if kind.name.contains("subclusters") { cluster / 32 } else { PAGE };
            (whole.min(unit) as u32, whole.min(unit) as u32)
        }
        _ => (1 << 20, 1),
    };
    assert_eq!((limits.atomic_write, limits.atomic_unit), expected, "{}", kind.name);
    let session = Session {
        kind: &kind,
        image: &image,
        disk: &disk,
        rng: RefCell::new(Rng::new(seed)),
        busy: Cell::new(true),
        cuts: Cell::new(0),
    };
    for round in 0..if expected.0 == 0 { 0 } else { 6 * scale() } {
        let (at, len) = session.range(&places);
        image.flush().await.unwrap();
        let (old, new) = (read(&image, at, len).await, pattern(100 + round, at, len));
        session.busy.set(true);
        let written = async {
            write(&image, at, &new, true).await.unwrap();
            session.busy.set(false);
        };
        let range = (at, len);
        join(
            join(written, join(session.beside(range), session.beside(range))),
            session.cutter(range, &old, &new),
        )
        .await;
        assert_eq!(read(&image, at, len).await, new, "{}", kind.name);
    }
    image.close().await.unwrap();
    let left = cut(&disk, Cut::Oldest, &mut Rng::new(seed));
    assert_eq!(walk(&left.0), Ok(0), "{}: leaks after a clean close", kind.name);
    session.cuts.get()
}

#[test]
fn no_cut_tears_what_the_image_says_it_writes_as_a_whole() {
    let mut cuts = 0;
    for kind in kinds() {
        for whole in [SECTOR, PAGE] {
            for seed in 0..2 * scale() {
                cuts += sim::run(session(kind.clone(), Vec::new(), whole, seed));
            }
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 2000);
}

#[test]
fn no_cut_tears_one_whose_entries_lie_in_several_sectors_or_tables() {
    let mut cuts = 0;
    for (kind, places) in large_kinds() {
        // Each image takes seconds: no more of them than end within a test's time.
        for seed in 0..8 * scale().min(4) {
            let whole = if seed % 4 == 3 { PAGE } else { SECTOR };
            cuts += sim::run(session(kind.clone(), places.clone(), whole, seed));
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 2000);
}

/// Where the L1 table lies, and what it says.
fn l1(disk: &SimDisk) -> (u64, Vec<u64>) {
    let bytes = disk.cut(Cut::Process, &mut Rng::new(1));
    let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let entries = u32::from_be_bytes(bytes[36..40].try_into().unwrap()) as usize;
    let at = be64(40);
    (at, (0..entries).map(|i| be64(at as usize + i * 8)).collect())
}

#[test]
fn the_least_that_can_be_changed_at_once_is_changed() {
    let size = 129 << 20;
    let bytes = sim::run(made(CreateOptions { cluster_size: 4096, ..CreateOptions::new(size) }));
    sim::run(async move {
        let disk = SimDisk::new(&bytes, 1, 0);
        let image = open(&disk, None).await.unwrap();
        for at in [0, 256 << 10, 2 << 20, 128 << 20] {
            write(&image, at - at.min(4096), &[1; 8192], false).await.unwrap();
        }
        let mut tag = 0;
        let mut moved = async |at: u64| {
            tag += 1;
            let (before, old) = l1(&disk);
            write(&image, at, &pattern(tag, at, 8192), true).await.unwrap();
            assert_eq!(read(&image, at, 8192).await, pattern(tag, at, 8192));
            let (after, new) = l1(&disk);
            let tables: Vec<usize> = (0..old.len()).filter(|i| old[*i] != new[*i]).collect();
            (before != after, tables)
        };
        // Entries in one sector, in two of one table, in two tables, in tables of two sectors of the L1 table.
        assert_eq!(moved(8192).await, (false, vec![]));
        assert_eq!(moved((256 << 10) - 4096).await, (false, vec![0]));
        assert_eq!(moved((2 << 20) - 4096).await, (false, vec![0, 1]));
        assert_eq!(moved((128 << 20) - 4096).await, (true, vec![63, 64]));
        assert_eq!(moved((128 << 20) - 8192).await, (false, vec![]));
        image.close().await.unwrap();
        assert_eq!(walk(&disk.cut(Cut::Oldest, &mut Rng::new(1))), Ok(0));
    });
}

#[test]
fn without_space_an_atomic_write_changes_nothing_and_leaks_nothing() {
    for (kind, places) in large_kinds() {
        sim::run(async move {
            let disk = disks(&kind, 1, 0);
            let image = open_files(&disk, kind.under.as_deref()).await.unwrap();
            let mut refused = 0;
            disk.0.room.set(disk.0.size().unwrap() + (3 << 20));
            for round in 0..200 {
                let len = 128 << 10;
                let at = match places.get(round % (places.len() + 2)) {
                    Some(place) => place - (64 << 10),
                    None => (round as u64 * (600 << 10) + 512) % (kind.size - len) / 512 * 512,
                };
                let old = read(&image, at, len).await;
                let new = pattern(round as u64, at, len);
                match write(&image, at, &new, true).await {
                    Ok(()) => assert_eq!(read(&image, at, len).await, new),
                    Err(e) => {
                        assert_eq!(e.kind, IoErrorKind::NoSpace, "{e}");
                        assert!(read(&image, at, len).await == old, "{}", kind.name);
                        refused += 1;
                    }
                }
            }
            disk.0.room.set(u64::MAX);
            image.close().await.unwrap();
            assert_eq!(walk(&disk.0.cut(Cut::Oldest, &mut Rng::new(1))), Ok(0), "{}", kind.name);
            assert!(refused > 10, "{}: {refused}", kind.name);
            println!("{}: {refused} of 200 found no space", kind.name);
        });
    }
}

#[test]
fn writes_in_place_beside_an_atomic_one_in_the_same_cluster_are_not_lost() {
    let bytes = sim::run(made(CreateOptions::new(4 << 20)));
    for seed in 0..20 * scale() {
        let bytes = bytes.clone();
        sim::run(async move {
            let disk = SimDisk::new(&bytes, seed, 8);
            let image = open(&disk, None).await.unwrap();
            write(&image, 0, &[0xee; 256 << 10], false).await.unwrap();
            let (image, rng) = (&image, RefCell::new(Rng::new(seed)));
            // Every second page is an ordinary writer's; atomic writes take pages in between, two sectors at a time.
            let plain = (0..64).step_by(2).map(|page| async move {
                write(image, page * PAGE, &pattern(page, page * PAGE, PAGE), false).await.unwrap();
            });
            let rng = &rng;
            let atomic = (1..64).step_by(2).map(|page| async move {
                let turns = rng.borrow_mut().below(30);
                for _ in 0..turns {
                    yield_now().await;
                }
                let at = page * PAGE + 512 * rng.borrow_mut().below(7);
                write(image, at, &pattern(page, at, 1024), true).await.unwrap();
                at
            });
            let (_, places) = join(join_all(plain), join_all(atomic)).await;
            for page in (0..64).step_by(2) {
                assert_eq!(
                    read(image, page * PAGE, PAGE).await,
                    pattern(page, page * PAGE, PAGE),
                    "page {page}"
                );
            }
            for at in places {
                assert_eq!(read(image, at, 1024).await, pattern(at / PAGE, at, 1024), "at {at}");
            }
        });
    }
}
