//! The simulated disk is cut at random moments of random work: no cut may leave an image with errors, a flushed write undone, a
//! byte that nobody wrote; and every operation that fails leaves the image sound.

use std::{
    cell::{Cell, RefCell},
    path::Path,
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::{Backing, CreateOptions, Qcow2, Repair, create_on, repair_on},
    sys::exec::{join, yield_now},
    units::ByteOffset,
    volume::Volume,
};

use crate::{
    model::{BLOCK, Model, Settled},
    sim::{self, Cut, SimDisk},
    support::{FULL, Rng, check_leaks_at_most, qemu_img, qemu_io, scale},
    walk::walk,
    work::{Work, read_disk},
};

const PATH: &str = "/simulated.qcow2";

/// A kind of image to work on.
pub struct Kind {
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    pub image: Vec<u8>,
    /// A backing file as qcow2 bytes.
    pub under: Option<Vec<u8>>,
    /// What an external data file holds at first.
    pub data: Option<Vec<u8>>,
}

pub async fn made(options: CreateOptions) -> Vec<u8> {
    let disk = SimDisk::new(&[], 1, 0);
    let data = options.data_file.as_ref().map(|_| SimDisk::new(&[], 1, 0));
    create_on(disk.clone(), data, Path::new(PATH), &options).await.unwrap();
    disk.cut(Cut::Process, &mut Rng::new(1))
}

fn by_qemu(options: &str, size: u64, snapshot: bool) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()]);
    qemu_io(
        &path,
        &["write -P 7 0 60k", "write -c -P 9 64k 64k", "write -P 8 150k 30k", "write -z 100k 20k"],
    );
    if snapshot {
        qemu_img(&["snapshot", "-c", "one", name]);
    }
    std::fs::read(&path).unwrap()
}

pub const SIZE: u64 = (300 << 10) + 512;

pub fn kinds() -> Vec<Rc<Kind>> {
    let ours = |size, cluster_size, refcount_bits, version, backed: bool| {
        let options = CreateOptions {
            cluster_size,
            refcount_bits,
            version,
            backing_file: backed.then(|| "under".to_owned()),
            backing_format: backed.then(|| "qcow2".to_owned()),
            ..CreateOptions::new(size)
        };
        sim::run(made(options))
    };
    let under = by_qemu("cluster_size=4k", SIZE - (50 << 10), false);
    // Free clusters that hold what somebody left there.
    let mut littered = ours(SIZE, 4096, 16, 3, false);
    littered.extend([0xee; 150 << 10]);
    let snapshot = by_qemu("cluster_size=4k", SIZE, true);
    let snapshot_512 = by_qemu("cluster_size=512,refcount_bits=8", SIZE, true);
    let compressed = by_qemu("cluster_size=16k", SIZE, false);
    let subclusters = |backed: bool| {
        let options = CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            backing_file: backed.then(|| "under".to_owned()),
            backing_format: backed.then(|| "qcow2".to_owned()),
            ..CreateOptions::new(SIZE)
        };
        sim::run(made(options))
    };
    let external = |extended_l2: bool| {
        let options = CreateOptions {
            cluster_size: if extended_l2 { 16384 } else { 4096 },
            extended_l2,
            data_file: Some("data".to_owned()),
            backing_file: extended_l2.then(|| "under".to_owned()),
            backing_format: extended_l2.then(|| "qcow2".to_owned()),
            ..CreateOptions::new(SIZE)
        };
        sim::run(made(options))
    };
    let (external, external_backed) = (external(false), external(true));
    let (subclusters, subclusters_backed) = (subclusters(false), subclusters(true));
    let subclusters_snapshot = by_qemu("extended_l2=on,cluster_size=16k", SIZE, true);
    // Grows beyond what one cluster of refcount table counts (2 MiB).
    let large = 2200 << 10;
    [
        ("64k", SIZE, ours(SIZE, 65536, 16, 3, false), None),
        ("4k", SIZE, ours(SIZE, 4096, 16, 3, false), None),
        ("4k, littered", SIZE, littered, None),
        ("512, 64-bit refcounts", SIZE, ours(SIZE, 512, 64, 3, false), None),
        ("512, 64-bit refcounts, large", large, ours(large, 512, 64, 3, false), None),
        ("1k, 1-bit refcounts", SIZE, ours(SIZE, 1024, 1, 3, false), None),
        ("version 2, 4k", SIZE, ours(SIZE, 4096, 16, 2, false), None),
        ("subclusters", SIZE, subclusters, None),
        ("subclusters, backed", SIZE, subclusters_backed, Some(under.clone())),
        ("subclusters, snapshot", SIZE, subclusters_snapshot, None),
        ("data file", SIZE, external, None),
        ("data file, subclusters, backed", SIZE, external_backed, Some(under.clone())),
        ("4k, backed", SIZE, ours(SIZE, 4096, 16, 3, true), Some(under.clone())),
        ("version 2, 1k, backed", SIZE, ours(SIZE, 1024, 16, 2, true), Some(under)),
        ("4k, snapshot", SIZE, snapshot, None),
        ("512, snapshot", SIZE, snapshot_512, None),
        ("16k, compressed", SIZE, compressed, None),
    ]
    .map(|(name, size, image, under)| {
        // What lay in a data file before must never be seen.
        let data = name.starts_with("data file").then(|| vec![0xee; size as usize]);
        Rc::new(Kind { name: name.to_owned(), size, image, under, data })
    })
    .into()
}

/// An image and its external data file.
pub type Files<T> = (T, Option<T>);

pub fn disks(kind: &Kind, seed: u64, latency: u64) -> Files<Rc<SimDisk>> {
    let disk = |bytes: &Vec<u8>| SimDisk::new(bytes, seed, latency);
    (disk(&kind.image), kind.data.as_ref().map(disk))
}

pub fn cut(disks: &Files<Rc<SimDisk>>, how: Cut, rng: &mut Rng) -> Files<Vec<u8>> {
    (disks.0.cut(how, rng), disks.1.as_ref().map(|disk| disk.cut(how, rng)))
}

/// An image without an external data file.
pub async fn open(disk: &Rc<SimDisk>, under: Option<&[u8]>) -> tcmu_dif::volume::Result<Qcow2<Rc<SimDisk>>> {
    open_files(&(disk.clone(), None), under).await
}

pub async fn open_files(
    (disk, data): &Files<Rc<SimDisk>>,
    under: Option<&[u8]>,
) -> tcmu_dif::volume::Result<Qcow2<Rc<SimDisk>>> {
    let backing: Option<Backing> = match under {
        Some(bytes) => {
            let disk = SimDisk::new(bytes, 1, 0);
            Some(Rc::new(Qcow2::open_on(disk, Path::new("/under"), true, None).await?))
        }
        None => None,
    };
    Qcow2::open_with(disk.clone(), data.clone(), Path::new(PATH), false, backing).await
}

/// Judges what a cut left.
async fn judge(
    (bytes, data): &Files<Vec<u8>>,
    under: Option<&[u8]>,
    model: &Model,
    by: Settled,
) -> Result<u64, String> {
    let leaks = walk(bytes)?;
    let files = (SimDisk::new(bytes, 1, 0), data.as_ref().map(|data| SimDisk::new(data, 1, 0)));
    let image = open_files(&files, under).await.map_err(|e| e.to_string())?;
    let guest = read_disk(&image).await.map_err(|e| e.to_string())?;
    model.judge_disk(&guest, by)?;
    if leaks > 0 {
        let disk = SimDisk::new(bytes, 1, 0);
        let report = repair_on(&disk, Path::new(PATH), Repair::Leaks, &mut |_, _| ()).await;
        let report = report.map_err(|e| e.to_string())?;
        if !report.is_clean() || report.leaks_fixed != leaks {
            return Err(format!("{leaks} leaks, and a repair says {report:?}"));
        }
        let mended = disk.cut(Cut::Oldest, &mut Rng::new(1));
        let left = walk(&mended)?;
        let files = (SimDisk::new(&mended, 1, 0), files.1);
        let image = open_files(&files, under).await.map_err(|e| e.to_string())?;
        if left != 0 || read_disk(&image).await.map_err(|e| e.to_string())? != guest {
            return Err(format!("{left} leaks after a repair, or the guest reads something else"));
        }
    }
    Ok(leaks)
}

struct Count {
    cuts: Cell<u64>,
    by_qemu: Cell<u64>,
}

async fn session(kind: Rc<Kind>, seed: u64, count: Rc<Count>) {
    let Kind { name, size, under, .. } = &*kind;
    let disk = disks(&kind, seed, 6);
    let image = open_files(&disk, under.as_deref()).await.unwrap();
    let model = Model::new(read_disk(&image).await.unwrap());
    let work = Work {
        volume: &image,
        model: &model,
        blocks: size / BLOCK,
        longest: size / BLOCK / 10,
        rng: RefCell::new(Rng::new(seed)),
        left: Cell::new(300),
        may_fail: false,
    };
    let mut rng = Rng::new(seed + 77);
    let busy = Cell::new(true);
    let cutter = async {
        while busy.get() {
            // A larger disk takes longer to judge.
            for _ in 0..rng.below(80 * (size / SIZE) * (size / SIZE)) {
                yield_now().await;
            }
            for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Any, Cut::Prefix] {
                let left = cut(&disk, how, &mut rng);
                let by = if how == Cut::Process { Settled::Ended } else { Settled::Flushed };
                if let Err(e) = judge(&left, under.as_deref(), &model, by).await {
                    let keep = std::env::temp_dir().join("qcow2-crash.qcow2");
                    std::fs::write(&keep, &left.0).unwrap();
                    panic!("{name}, seed {seed}, {how:?}: {e}; the image is in {}", keep.display());
                }
                count.cuts.set(count.cuts.get() + 1);
                if under.is_none() && left.1.is_none() && rng.one_in(100) {
                    let dir = tempfile::tempdir().unwrap();
                    let path = dir.path().join("cut.qcow2");
                    std::fs::write(&path, &left.0).unwrap();
                    check_leaks_at_most(&path);
                    count.by_qemu.set(count.by_qemu.get() + 1);
                }
            }
            model.prune();
        }
    };
    let worker = async {
        work.run(8).await;
        busy.set(false);
    };
    join(worker, cutter).await;
    image.close().await.unwrap();
    let left = cut(&disk, Cut::Oldest, &mut rng);
    let leaks = judge(&left, under.as_deref(), &model, Settled::Ended).await.unwrap();
    assert_eq!(leaks, 0, "{name}, seed {seed}: leaks after a clean close");
}

#[test]
fn no_cut_leaves_errors_lost_flushes_or_stale_bytes() {
    let count = Rc::new(Count { cuts: Cell::new(0), by_qemu: Cell::new(0) });
    for kind in kinds() {
        for seed in 0..(2 * scale() + scale() / FULL).div_ceil(kind.size / SIZE) {
            sim::run(session(kind.clone(), seed, count.clone()));
        }
    }
    println!("{} cuts, {} of them judged by qemu-img too", count.cuts.get(), count.by_qemu.get());
    assert!(count.cuts.get() > 1000 && count.by_qemu.get() > 0);
}

async fn session_with_failure(kind: Rc<Kind>, step: u64) -> bool {
    let Kind { name, size, under, .. } = &*kind;
    let disk = disks(&kind, step, 3);
    let image = open_files(&disk, under.as_deref()).await.unwrap();
    let model = Model::new(read_disk(&image).await.unwrap());
    // Every second failure is one of the data file's.
    let fails = disk.1.as_ref().filter(|_| step % 2 == 1).unwrap_or(&disk.0).clone();
    fails.fail_in.set(Some(step));
    let work = Work {
        volume: &image,
        model: &model,
        blocks: size / BLOCK,
        longest: size / BLOCK / 10,
        rng: RefCell::new(Rng::new(step % 5)),
        left: Cell::new(40),
        may_fail: true,
    };
    work.run(4).await;
    let closed = image.close().await;
    let failed = fails.failed.get();
    assert!(failed || closed.is_ok());
    for how in [Cut::Process, Cut::Oldest, Cut::Any] {
        let left = cut(&disk, how, &mut Rng::new(step));
        let by = if how == Cut::Process { Settled::Ended } else { Settled::Flushed };
        if let Err(e) = judge(&left, under.as_deref(), &model, by).await {
            panic!("{name}, step {step} fails, {how:?}: {e}");
        }
    }
    failed
}

#[test]
fn every_step_may_fail_and_the_image_stays_sound() {
    for kind in kinds() {
        // Further and further on, until the work is over before the failure comes.
        let mut step = 0;
        while sim::run(session_with_failure(kind.clone(), step)) {
            step += 1 + 8 / scale() * (kind.size / SIZE);
        }
        assert!(step > 20, "{}: only {step} steps", kind.name);
    }
}

#[test]
fn a_lost_flush_fails_the_image_for_ever() {
    let bytes = sim::run(made(CreateOptions::new(1 << 20)));
    sim::run(async move {
        let disk = SimDisk::new(&bytes, 1, 0);
        let image = open(&disk, None).await.unwrap();
        let data = tcmu_dif::sys::mem::Buffer::from_slice(&[1; 4096]).sg();
        image.write(ByteOffset(0), &data, Default::default()).await.unwrap();
        disk.fail_in.set(Some(0));
        assert!(image.flush().await.is_err());
        let kind = |r: tcmu_dif::volume::Result<()>| r.unwrap_err().kind;
        let failed = tcmu_dif::volume::IoErrorKind::Failed;
        assert_eq!(kind(image.flush().await), failed);
        assert_eq!(kind(image.write(ByteOffset(0), &data, Default::default()).await), failed);
        assert_eq!(kind(image.read(ByteOffset(0), &data).await), failed);
        assert_eq!(kind(image.close().await), failed);
    });
}
