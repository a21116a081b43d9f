//! What protection costs in writes and syncs, counted on a simulated disk.

use super::*;
use crate::{
    pi::{
        store::{LAYOUT, Layout},
        testing::{World, block_on, read, write},
    },
    storage::sim::{OpKind, Rng, SimDisk, scaled},
    sys::exec::join_all,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn count(disk: &SimDisk, kind: OpKind) -> u64 {
    disk.log().iter().filter(|k| **k == kind).count() as u64
}

/// Random writes of 4 KiB over 100 GiB, 32 at a time, with a flush of the guest's after each 256: the writes, and what they
/// cost the sidecar in durable writes and in writes.
fn random_writes(mode: PiMode) -> (u64, u64, u64) {
    let world = World::made(1, (PiType::Type1, mode), BlockSize::B512, 100 * GIB, LAYOUT);
    let rounds = scaled(200).next_multiple_of(8);
    let costs = block_on(async move {
        let p = &world.open().await;
        let mut rng = Rng::new(5);
        let (commits, writes, syncs) = (
            p.sidecar().intent_commits(),
            count(&world.sidecar, OpKind::Write),
            count(&world.sidecar, OpKind::Sync),
        );
        for round in 0..rounds {
            let bytes = &rng.bytes(4096);
            let mut places: Vec<u64> = (0..32).map(|_| rng.below(100 * GIB / 4096) * 4096).collect();
            places.dedup();
            join_all(places.iter().map(|at| async move { write(p, *at, bytes).await.unwrap() })).await;
            if round % 8 == 7 {
                p.flush().await.unwrap();
            }
        }
        let flushes = count(&world.sidecar, OpKind::Sync) - syncs;
        assert_eq!(flushes, rounds / 8, "a sync for each flush and no other");
        (p.sidecar().intent_commits() - commits, count(&world.sidecar, OpKind::Write) - writes)
    });
    println!(
        "{mode}: {} writes, {} durable writes and {} writes of the sidecar",
        rounds * 32,
        costs.0,
        costs.1
    );
    (rounds * 32, costs.0, costs.1)
}

#[test]
fn random_writes_over_100_gib_share_their_durable_writes() {
    for mode in [PiMode::Bitmap, PiMode::Journal] {
        let (writes, durable, all) = random_writes(mode);
        // 32 writers share one; each may miss its bus once.
        assert!(durable * 6 < writes, "{mode}: {durable} durable writes for {writes}");
        // The tuples, one write each, and what is written for all of a batch.
        assert!(all <= writes + writes / 5, "{mode}: {all} writes of the sidecar for {writes}");
    }
}

#[test]
fn sequential_writes_at_a_queue_depth_share_their_writes_of_tuples() {
    let world = World::new(6, PiType::Type1, BlockSize::B512, GIB);
    block_on(async move {
        let p = &world.open().await;
        write(p, 0, &[1; 4096]).await.unwrap();
        let before = count(&world.sidecar, OpKind::Write);
        for round in 0..16u64 {
            let at = |i: u64| (round * 32 + i) * 4096;
            join_all((0..32).map(|i| async move { write(p, at(i), &[3; 4096]).await.unwrap() })).await;
        }
        let writes = count(&world.sidecar, OpKind::Write) - before;
        assert!(writes <= 16 * 4, "{writes} writes of tuples for 512 writes of data");
        assert_eq!(read(p, 77 * 4096, 4096).await.unwrap(), [3; 4096]);
    });
}

#[test]
fn a_region_that_is_marked_costs_a_write_of_tuples_and_nothing_else() {
    let world = World::new(2, PiType::Type1, BlockSize::B512, GIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 4096]).await.unwrap();
        write(&p, 64 * MIB, &[1; 4096]).await.unwrap();
        // Blocks in one region, in many pages of tuples, and across the border of two regions.
        for (at, len) in [(0, 512), (512, 4096), (8 * MIB, 2 << 20), (64 * MIB - 4096, 8192)] {
            let before = world.sidecar.log().len();
            write(&p, at, &vec![2; len]).await.unwrap();
            assert_eq!(world.sidecar.log()[before..], [OpKind::Write], "{at}+{len}");
        }
    });
}

#[test]
fn a_recorded_write_costs_one_durable_write_more() {
    let layout = Layout { journal_len: 1 << 20, ..LAYOUT };
    let world = World::made(3, (PiType::Type1, PiMode::Journal), BlockSize::B512, GIB, layout);
    block_on(async move {
        let p = world.open().await;
        let costs = async |at, len| {
            let before = world.sidecar.log().len();
            write(&p, at, &vec![2; len]).await.unwrap();
            world.sidecar.log().split_off(before)
        };
        // Old tuples, journal, new tuples; small ones that were there already need no look at the old ones.
        let (first, again) = ([OpKind::Read, OpKind::Write, OpKind::Write], [OpKind::Write, OpKind::Write]);
        assert_eq!(costs(0, MIB as usize).await, first);
        assert_eq!(costs(0, MIB as usize).await, first);
        assert_eq!(costs(0, 4096).await, first);
        assert_eq!(costs(8192, 4096).await, again);
    });
}

#[test]
fn a_small_read_of_tuples_that_were_read_or_written_costs_nothing_of_the_sidecar() {
    for size in [BlockSize::B512, BlockSize::B4096] {
        let world = World::new(7, PiType::Type1, size, 64 * GIB);
        block_on(async move {
            let p = world.open().await;
            write(&p, 0, &Rng::new(1).bytes(MIB as usize)).await.unwrap();
            let costs = async |at, len| {
                let before = world.sidecar.log().len();
                let got = read(&p, at, len).await.unwrap();
                assert_eq!(got, world.image.peek(at, len));
                world.sidecar.log().len() - before
            };
            // A page of tuples, of 256 KiB of data or of 2 MiB; not for a long read.
            assert_eq!(costs(8192, 4096).await, 1);
            assert_eq!(costs(16384, 4096).await, 0);
            assert_eq!(costs(0, MIB as usize).await, 1);
            // What is written, zeroed or given up after that is known as well, or read anew.
            write(&p, 8192, &Rng::new(2).bytes(8192)).await.unwrap();
            assert_eq!(costs(8192, 16384).await, 0);
            p.write_zeroes(ByteOffset(12288), 4096, false).await.unwrap();
            assert_eq!(costs(8192, 16384).await, 1);
            assert_eq!(costs(8192, 16384).await, 0);
            // No more than 4 MiB of them are kept.
            for i in 0..2000u64 {
                costs(i * 512 * size.bytes(), 4096).await;
            }
            let kept = p.sidecar().remembered().unwrap();
            assert!(kept.bytes <= 4 << 20 && kept.misses >= 2000 && kept.hits >= 3, "{kept:?}");
            assert_eq!(costs(0, 4096).await, 1);
        });
    }
}

#[test]
fn tuples_in_memory_that_do_not_match_are_read_anew_before_that_is_an_error() {
    let world = World::new(8, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 4096]).await.unwrap();
        write(&p, 4096, &[2; 512]).await.unwrap();
        read(&p, 0, 4096).await.unwrap();
        // Block 3 becomes what block 8 is, with a tuple that matches, behind the daemon's back: what it remembers of it is wrong.
        let mut tuple = world.sidecar.peek(MIB + 8 * 8, 8);
        tuple[4..].copy_from_slice(&world.sidecar.peek(MIB + 3 * 8 + 4, 4));
        world.image.poke(3 * 512, &[2; 512]);
        world.sidecar.poke(MIB + 3 * 8, &tuple);
        assert_eq!(read(&p, 3 * 512, 512).await.unwrap(), [2; 512]);
        assert_eq!(p.counters().guard_errors, 0);
        // And if the file says the same it is one.
        world.image.poke(5 * 512, &[2; 512]);
        assert!(read(&p, 0, 4096).await.is_err());
        assert_eq!(p.counters().guard_errors, 1);
    });
}

#[test]
fn a_full_journal_is_emptied_by_a_flush_while_writers_wait() {
    let layout = Layout { journal_len: 64 << 10, ..LAYOUT };
    let world = World::made(4, (PiType::Type1, PiMode::Journal), BlockSize::B512, GIB, layout);
    block_on(async move {
        let p = &world.open().await;
        // Sixteen writers, with ten times what the journal holds, and never a flush of the guest's.
        join_all((0..16u64).map(|task| async move {
            for round in 0..80u64 {
                write(p, task * MIB + round * 512, &[round as u8 + 1; 512]).await.unwrap();
            }
        }))
        .await;
        assert!(count(&world.image, OpKind::Sync) >= 9, "{}", count(&world.image, OpKind::Sync));
        for task in 0..16 {
            for round in 0..80 {
                let got = read(p, task * MIB + round * 512, 512).await.unwrap();
                assert_eq!(got, [round as u8 + 1; 512]);
            }
        }
        p.close().await.unwrap();
        assert_eq!(world.open().await.counters().torn, 0);
    });
}

#[test]
fn a_write_larger_than_the_journal_is_refused_before_anything_is_touched() {
    let layout = Layout { journal_len: 64 << 10, ..LAYOUT };
    let world = World::made(5, (PiType::Type1, PiMode::Journal), BlockSize::B512, GIB, layout);
    block_on(async move {
        let p = world.open().await;
        let most = p.sidecar().most_recorded() as usize * 512;
        write(&p, 0, &vec![1; most]).await.unwrap();
        assert_eq!(write(&p, 0, &vec![2; most + 512]).await.unwrap_err().kind, IoErrorKind::OutOfRange);
        assert_eq!(read(&p, 0, 512).await.unwrap(), [1; 512]);
    });
}
