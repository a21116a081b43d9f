//! A snapshot and the writes around it: each write is in it whole or not at all, those that ended before are, and what its
//! maker waited for no longer waits for it.

use std::{cell::Cell, path::Path, rc::Rc, time::UNIX_EPOCH};

use tcmu_dif::{
    image::qcow2::{CreateOptions, Qcow2, create_on},
    sys::{
        exec::{join, join_all, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::Volume,
};

use crate::{
    sim::{self, SimDisk},
    support::{Rng, scale},
    work::read_disk,
};

const PATH: &str = "/simulated.qcow2";
/// Writers, each with a part of the disk of its own, as large as this, which it writes in one operation.
const WRITERS: u64 = 16;
const PART: u64 = 48 << 10;

async fn made(cluster_size: u64, seed: u64) -> Qcow2<Rc<SimDisk>> {
    let disk = SimDisk::new(&[], seed, 6);
    let options = CreateOptions { cluster_size, ..CreateOptions::new(WRITERS * PART) };
    create_on(disk.clone(), None, Path::new(PATH), &options).await.unwrap();
    Qcow2::open_on(disk, Path::new(PATH), false, None).await.unwrap()
}

async fn versions(cluster_size: u64, seed: u64) -> u64 {
    let image = made(cluster_size, seed).await;
    let begun: Vec<Cell<u8>> = (0..WRITERS).map(|_| Cell::new(0)).collect();
    let ended: Vec<Cell<u8>> = (0..WRITERS).map(|_| Cell::new(0)).collect();
    let busy = Cell::new(true);
    let writer = async |part: u64| {
        for version in 1..=20u8 {
            begun[part as usize].set(version);
            let data = Buffer::from_slice(&vec![version; PART as usize]).sg();
            let at = ByteOffset(part * PART);
            match version % 5 {
                0 => image.discard(at, PART).await.unwrap(),
                1 => image.write_zeroes(at, PART, false).await.unwrap(),
                _ => image.write(at, &data, Default::default()).await.unwrap(),
            }
            ended[part as usize].set(version);
        }
    };
    let working = async {
        join_all((0..WRITERS).map(&writer)).await;
        busy.set(false);
    };
    let snapping = async {
        let mut rng = Rng::new(seed);
        let mut taken: Vec<(String, Vec<(u8, u8)>)> = Vec::new();
        while busy.get() {
            for _ in 0..rng.below(150) {
                yield_now().await;
            }
            let name = format!("s{}", taken.len());
            let before: Vec<u8> = ended.iter().map(Cell::get).collect();
            image.snapshot_create(&name, UNIX_EPOCH).await.unwrap();
            let after = begun.iter().map(Cell::get);
            taken.push((name, before.into_iter().zip(after).collect()));
        }
        taken
    };
    let ((), taken) = join(working, snapping).await;
    for (name, bounds) in &taken {
        image.snapshot_apply(name).await.unwrap();
        let disk = read_disk(&image).await.unwrap();
        for (part, (least, most)) in disk.chunks(PART as usize).zip(bounds) {
            let seen = part[0];
            assert!(part.iter().all(|b| *b == seen), "seed {seed}, {name}: half a write is in the snapshot");
            let fits = |v: u8| if v % 5 < 2 { seen == 0 } else { seen == v };
            assert!((*least..=*most).any(fits), "seed {seed}, {name}: {seen} is none of {least}..={most}");
        }
    }
    image.close().await.unwrap();
    taken.len() as u64
}

#[test]
fn a_write_is_in_a_snapshot_whole_or_not_at_all() {
    let mut taken = 0;
    for cluster_size in [512, 4096, 65536] {
        for seed in 0..scale() {
            taken += sim::run(versions(cluster_size, seed));
        }
    }
    println!("{taken} snapshots");
    assert!(taken > 20);
}

#[test]
fn operations_that_wait_for_a_shorter_disk_fail_or_lie_within_it() {
    for seed in 0..10 * scale() {
        sim::run(async move {
            let image = made(4096, seed).await;
            let size = WRITERS * PART;
            let data = Buffer::from_slice(&[7; 8192]).sg();
            let write = async |part: u64| {
                let at = ByteOffset(part * PART);
                match part % 4 {
                    0 => image.read(at, &Buffer::zeroed(8192).sg()).await.is_ok(),
                    1 => image.discard(at, 8192).await.is_ok(),
                    2 => image.write_zeroes(at, 8192, false).await.is_ok(),
                    _ => image.write(at, &data, Default::default()).await.is_ok(),
                }
            };
            let late = async |part: u64| {
                for _ in 0..part * seed % 60 {
                    yield_now().await;
                }
                write(part).await
            };
            let (shrunk, done) = join(image.shrink(size / 2), join_all((0..WRITERS).map(&late))).await;
            shrunk.unwrap();
            assert!(done[..WRITERS as usize / 2].iter().all(|ok| *ok));
            // What came too late has failed; nothing of it appears when the disk grows.
            image.resize(size).await.unwrap();
            let disk = read_disk(&image).await.unwrap();
            assert!(disk[size as usize / 2..].iter().all(|b| *b == 0), "seed {seed}");
            assert!(write(WRITERS - 1).await);
            image.close().await.unwrap();
        });
    }
}
