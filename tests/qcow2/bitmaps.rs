//! Dirty bitmaps that an image keeps, on a disk that is cut or fails at any step of storing them: what is found afterwards is what was
//! stored, or is in use, or is not there; never an older one that looks true. What a cut leaves is leaks at most.

use std::{cell::Cell, path::Path, rc::Rc};

use tcmu_dif::{
    image::qcow2::{CreateOptions, Qcow2, Repair, StoredBitmap, create_on, repair_on},
    sys::{
        exec::{join, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::Volume,
};

use crate::{
    crash::open,
    sim::{self, Cut, SimDisk},
    support::{Rng, qemu_img, scale},
};

const PATH: &str = "/simulated.qcow2";
const SIZE: u64 = 1 << 20;

/// Images without bitmaps, and one of QEMU's with some.
fn images() -> Vec<Vec<u8>> {
    let ours = |cluster_size: u64| {
        let disk = SimDisk::new(&[], 1, 0);
        let made = disk.clone();
        sim::run(async move {
            let options = CreateOptions { cluster_size, ..CreateOptions::new(SIZE) };
            create_on(made, None, Path::new(PATH), &options).await.unwrap();
        });
        disk.cut(Cut::Process, &mut Rng::new(1))
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", name, &SIZE.to_string()]);
    qemu_img(&["bitmap", "--add", "-g", "512", name, "a"]);
    qemu_img(&["bitmap", "--add", name, "of-qemu"]);
    vec![ours(512), ours(4096), ours(65536), std::fs::read(&path).unwrap()]
}

fn random(rng: &mut Rng, name: &str, granularity_bits: u32) -> StoredBitmap {
    let granules = SIZE >> granularity_bits;
    let mut words: Vec<u64> =
        (0..granules.div_ceil(64)).map(|_| if rng.one_in(3) { rng.below(u64::MAX) } else { 0 }).collect();
    if !granules.is_multiple_of(64) {
        *words.last_mut().unwrap() &= (1 << (granules % 64)) - 1;
    }
    StoredBitmap { name: name.into(), enabled: rng.one_in(2), granularity_bits, words: Some(words) }
}

/// What is found in an image that was cut; and there are no errors but leaks.
async fn found(bytes: &[u8]) -> Vec<StoredBitmap> {
    let mended = SimDisk::new(bytes, 1, 0);
    let report = repair_on(&mended, Path::new(PATH), Repair::Leaks, &mut |_, _| ()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    let of = async |disk: &Rc<SimDisk>| open(disk, None).await.unwrap().use_bitmaps().await.unwrap();
    let all = of(&SimDisk::new(bytes, 1, 0)).await;
    assert_eq!(of(&mended).await, all, "a repair of leaks has changed them");
    all
}

fn never_an_older_one(all: &[StoredBitmap], stored: &[StoredBitmap]) {
    for one in all.iter().filter(|one| one.words.is_some()) {
        assert!(stored.contains(one), "{} looks true and is not what was stored", one.name);
    }
}

async fn write(image: &Qcow2<Rc<SimDisk>>, rng: &mut Rng) -> tcmu_dif::volume::Result<()> {
    let data = Buffer::from_slice(&[rng.below(256) as u8; 8192]).sg();
    image.write(ByteOffset(rng.below(SIZE / 8192) * 8192), &data, Default::default()).await
}

/// Sessions one after the other, each of which finds what the one before has stored. With `fails` the disk fails at that step of one.
async fn sessions(bytes: Vec<u8>, seed: u64, fails: Option<u64>) -> (u64, bool) {
    let mut rng = Rng::new(seed);
    let (mut bytes, mut before, mut cuts) = (bytes, None, 0);
    // What comes after the one that fails says no more.
    for turn in 0..if fails.is_some() { 2 } else { 4 } {
        let disk = SimDisk::new(&bytes, seed + turn, 4);
        let image = open(&disk, None).await.unwrap();
        let used = image.use_bitmaps().await.unwrap();
        if let Some(before) = before {
            assert_eq!(used, before, "seed {seed}, turn {turn}");
        }
        // In use from now on, whatever happens.
        let left = disk.cut(Cut::Oldest, &mut rng);
        never_an_older_one(&found(&left).await, &[]);
        write(&image, &mut rng).await.unwrap();
        let names = ["a", "b", "a-longer-name"];
        let stored: Vec<_> = match turn {
            2 => Vec::new(),
            turn => names[..1 + turn as usize % 3]
                .iter()
                .map(|name| {
                    let bits = 9 + rng.below(12) as u32;
                    random(&mut rng, name, bits)
                })
                .collect(),
        };
        if turn == 1
            && let Some(step) = fails
        {
            disk.fail_in.set(Some(step));
        }
        let busy = Cell::new(true);
        let storing = async {
            let done = image.store_bitmaps(&stored).await;
            if done.is_ok() {
                // What is changed now would not be marked.
                assert!(write(&image, &mut Rng::new(1)).await.is_err() || stored.is_empty());
            }
            let closed = match done.is_ok() {
                true => image.close().await.is_ok(),
                false => false,
            };
            busy.set(false);
            closed
        };
        let cutting = async {
            let (mut rng, mut cuts) = (Rng::new(seed + 99), 0);
            while busy.get() && fails.is_none() {
                for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Prefix] {
                    never_an_older_one(&found(&disk.cut(how, &mut rng)).await, &stored);
                    cuts += 1;
                }
                for _ in 0..rng.below(20) {
                    yield_now().await;
                }
            }
            cuts
        };
        let (closed, more) = join(storing, cutting).await;
        cuts += more;
        for how in [Cut::Process, Cut::Any, Cut::Prefix] {
            never_an_older_one(&found(&disk.cut(how, &mut rng)).await, &stored);
        }
        let left = disk.cut(Cut::Oldest, &mut rng);
        never_an_older_one(&found(&left).await, &stored);
        if disk.failed.get() {
            return (cuts, true);
        }
        assert!(closed, "seed {seed}, turn {turn}");
        assert_eq!(found(&left).await, stored, "seed {seed}, turn {turn}");
        let clean = SimDisk::new(&left, 1, 0);
        let report = repair_on(&clean, Path::new(PATH), Repair::Leaks, &mut |_, _| ()).await.unwrap();
        assert_eq!(report.leaks_fixed, 0, "seed {seed}, turn {turn}: leaks after a clean close");
        (bytes, before) = (left, Some(stored));
    }
    (cuts, false)
}

#[test]
fn no_cut_leaves_a_bitmap_that_looks_true_and_is_not() {
    let mut cuts = 0;
    for (number, image) in images().into_iter().enumerate() {
        for seed in 0..2 * scale() {
            cuts += sim::run(sessions(image.clone(), seed * 10 + number as u64, None)).0;
        }
    }
    assert!(cuts > 200, "only {cuts} cuts");
}

#[test]
fn every_step_of_storing_bitmaps_may_fail() {
    for image in images() {
        let mut step = 0;
        while sim::run(sessions(image.clone(), 3, Some(step))).1 {
            step += 2;
        }
        assert!(step > 5, "only {step} steps");
    }
}
