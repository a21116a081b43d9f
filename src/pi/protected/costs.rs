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
        write(&p, 0, &[1; 4096]).await.unwrap();
        let before = world.sidecar.log().len();
        write(&p, 0, &[2; 4096]).await.unwrap();
        let log = world.sidecar.log();
        assert_eq!(
            log[before..],
            [OpKind::Read, OpKind::Write, OpKind::Write],
            "old tuples, journal, new tuples"
        );
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
