//! The decorator over a simulated image and sidecar: what it finds, what it refuses, and that it equals a naive model.

use super::*;
use crate::{
    pi::{
        store::{CLEAR_EVERY, Layout, StoreError},
        testing::{Trick, World, block_on, read, write},
    },
    storage::sim::{OpKind, Rng, SimDisk, scaled},
    sys::exec::join_all,
    volume::{PiMismatch, PiTag},
};

const MIB: u64 = 1 << 20;
/// A journal that is full after a hundred writes.
const SMALL: Layout = Layout { region_shift: 26, journal_len: 64 << 10 };

fn mismatch(e: IoError) -> PiMismatch {
    match e.kind {
        IoErrorKind::Protection(m) => m,
        _ => panic!("{e}"),
    }
}

#[test]
fn a_flipped_bit_is_an_error_at_its_block_and_its_neighbours_still_read() {
    for kind in [PiType::Type1, PiType::Type3] {
        for size in [BlockSize::B512, BlockSize::B4096] {
            let world = World::new(1, kind, size, MIB);
            block_on(async move {
                let p = world.open().await;
                let bs = size.bytes();
                write(&p, 0, &Rng::new(7).bytes(8 * bs as usize)).await.unwrap();
                let mut byte = world.image.peek(3 * bs + 5, 1);
                byte[0] ^= 0x10;
                world.image.poke(3 * bs + 5, &byte);
                let e = read(&p, 0, 8 * bs as usize).await.unwrap_err();
                assert_eq!(e.at, Some(ByteOffset(3 * bs)));
                let m = mismatch(e);
                assert_eq!((m.lba, m.tag), (Lba(3), PiTag::Guard));
                for lba in [0, 1, 2, 4, 5, 6, 7] {
                    read(&p, lba * bs, bs as usize).await.unwrap();
                }
                assert_eq!(p.counters().guard_errors, 1);
                // Writing the block heals it.
                write(&p, 3 * bs, &vec![1; bs as usize]).await.unwrap();
                read(&p, 0, 8 * bs as usize).await.unwrap();
            });
        }
    }
}

#[test]
fn a_lost_write_and_both_ends_of_a_misdirected_one_are_found() {
    for kind in [PiType::Type1, PiType::Type3] {
        let world = World::new(2, kind, BlockSize::B512, MIB);
        block_on(async move {
            let volume = world.volume();
            let trick = volume.trick.clone();
            let p = world.open_with(volume, false).await.unwrap();
            let mut rng = Rng::new(1);
            write(&p, 0, &rng.bytes(16 * 512)).await.unwrap();
            trick.set(Some(Trick::Drop));
            write(&p, 512, &rng.bytes(512)).await.unwrap();
            assert_eq!(mismatch(read(&p, 512, 512).await.unwrap_err()).lba, Lba(1));
            trick.set(Some(Trick::Misdirect(9 * 512)));
            write(&p, 5 * 512, &rng.bytes(512)).await.unwrap();
            assert_eq!(mismatch(read(&p, 5 * 512, 512).await.unwrap_err()).lba, Lba(5));
            assert_eq!(mismatch(read(&p, 9 * 512, 512).await.unwrap_err()).lba, Lba(9));
            read(&p, 6 * 512, 3 * 512).await.unwrap();
        });
    }
}

#[test]
fn a_read_and_tuple_that_came_from_another_block_fail_on_the_reference_tag() {
    let world = World::new(3, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &Rng::new(1).bytes(8 * 512)).await.unwrap();
        // Block and tuple 2 wholly over block and tuple 6.
        world.image.poke(6 * 512, &world.image.peek(2 * 512, 512));
        world.sidecar.poke(MIB + 6 * 8, &world.sidecar.peek(MIB + 2 * 8, 8));
        let m = mismatch(read(&p, 6 * 512, 512).await.unwrap_err());
        assert_eq!(m, PiMismatch { lba: Lba(6), tag: PiTag::Reference, expected: 6, found: 2 });
    });
}

#[test]
fn blocks_never_written_discarded_or_zeroed_are_unprotected_and_read_as_zeros() {
    let world = World::new(4, PiType::Type1, BlockSize::B512, 4 * MIB);
    block_on(async move {
        let p = world.open().await;
        assert_eq!(read(&p, 0, 4096).await.unwrap(), [0; 4096]);
        assert_eq!(p.counters().unprotected, 8);
        write(&p, 0, &Rng::new(1).bytes(MIB as usize)).await.unwrap();
        p.discard(ByteOffset(512), 300 * 1024).await.unwrap();
        p.write_zeroes(ByteOffset(600 * 1024), 512, false).await.unwrap();
        let before = p.counters();
        let all = read(&p, 0, MIB as usize).await.unwrap();
        assert!(all[512..512 + 300 * 1024].iter().all(|b| *b == 0));
        let unprotected = p.counters().unprotected - before.unprotected;
        assert_eq!(unprotected, 601);
        assert_eq!(p.counters().verified - before.verified, 2048 - 601);
    });
}

#[test]
fn ranges_outside_or_between_blocks_are_refused() {
    let world = World::new(5, PiType::Type1, BlockSize::B4096, MIB);
    block_on(async move {
        let p = world.open().await;
        assert_eq!(p.limits().alignment, 4096);
        for (at, len) in [(512, 4096), (0, 512), (MIB, 4096), (MIB - 4096, 8192), (u64::MAX - 4095, 4096)] {
            let e = read(&p, at, len).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::OutOfRange, "{at}+{len}");
            let e = write(&p, at, &vec![0; len]).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::OutOfRange, "{at}+{len}");
            let e = p.discard(ByteOffset(at), len as u64).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::OutOfRange, "{at}+{len}");
        }
    });
}

#[test]
fn random_operations_side_by_side_equal_a_naive_model() {
    for seed in 0..scaled(20) {
        let size = if seed % 2 == 0 { BlockSize::B512 } else { BlockSize::B4096 };
        let kind = if seed % 3 == 0 { PiType::Type3 } else { PiType::Type1 };
        let blocks = 200u64;
        let mode = if seed % 4 < 2 { PiMode::Bitmap } else { PiMode::Journal };
        let world = World::made(seed, (kind, mode), size, blocks * size.bytes(), SMALL);
        block_on(async move {
            let mut rng = Rng::new(seed);
            let bs = size.bytes();
            let mut model = vec![0u8; (blocks * bs) as usize];
            let mut p = world.open().await;
            for _ in 0..40 {
                // Ranges that do not overlap, so that the outcome is certain.
                let mut cuts: Vec<u64> = (0..8).map(|_| rng.below(blocks + 1)).collect();
                cuts.sort_unstable();
                let jobs = cuts.windows(2).filter(|w| w[0] < w[1]).map(|w| {
                    let (at, len) = (w[0] * bs, ((w[1] - w[0]) * bs) as usize);
                    let what = rng.below(6);
                    let bytes = if what < 3 { rng.bytes(len) } else { vec![0; len] };
                    (what, at, bytes)
                });
                let jobs: Vec<(u64, u64, Vec<u8>)> = jobs.collect();
                for (what, at, bytes) in &jobs {
                    if *what < 5 {
                        model[*at as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                }
                let (p_, model_) = (&p, &model);
                join_all(jobs.iter().map(|(what, at, bytes)| async move {
                    let (place, len) = (ByteOffset(*at), bytes.len() as u64);
                    match what {
                        0..=2 => write(p_, *at, bytes).await.unwrap(),
                        3 => p_.discard(place, len).await.unwrap(),
                        4 => p_.write_zeroes(place, len, *at % 1024 == 0).await.unwrap(),
                        _ => {
                            let got = read(p_, *at, bytes.len()).await.unwrap();
                            assert!(got == model_[*at as usize..][..bytes.len()]);
                        }
                    }
                }))
                .await;
                match rng.below(8) {
                    0 => p.flush().await.unwrap(),
                    1 => {
                        p.close().await.unwrap();
                        p = world.open().await;
                        assert_eq!(p.counters().recomputed, 0);
                    }
                    _ => (),
                }
            }
            assert!(read(&p, 0, model.len()).await.unwrap() == model);
        });
    }
}

#[test]
fn overlapping_writes_and_reads_never_see_a_block_without_its_tuple() {
    for seed in 0..scaled(30) {
        let mode = if seed % 2 == 0 { PiMode::Bitmap } else { PiMode::Journal };
        let world = World::made(seed, (PiType::Type1, mode), BlockSize::B512, MIB, SMALL);
        block_on(async move {
            let p = &world.open().await;
            join_all((0..24u64).map(|i| async move {
                let mut rng = Rng::new(seed * 1000 + i);
                for _ in 0..10 {
                    let (at, n) = (rng.below(16) * 512, 1 + rng.below(8) as usize);
                    match rng.below(8) {
                        0..=3 => write(p, at, &rng.bytes(n * 512)).await.unwrap(),
                        4 => p.discard(ByteOffset(at), n as u64 * 512).await.unwrap(),
                        5 => p.flush().await.unwrap(),
                        _ => drop(read(p, at, n * 512).await.unwrap()),
                    }
                }
            }))
            .await;
            read(p, 0, 32 * 512).await.unwrap();
        });
    }
}

#[test]
fn a_foreign_change_is_refused_with_the_two_commands_that_mend_it() {
    let mut world = World::new(6, PiType::Type1, BlockSize::B512, MIB);
    let w = world.clone();
    block_on(async move {
        let p = w.open().await;
        write(&p, 0, &[1; 512]).await.unwrap();
        p.close().await.unwrap();
    });
    world.stamp.mtime.1 += 1;
    block_on(async move {
        let e = world.open_with(world.volume(), false).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::ImageChanged { .. }));
        let next = e.next_step().unwrap();
        assert!(next.contains("`tcmu-dif pi verify /vm1.raw`"), "{next}");
        assert!(next.contains("`tcmu-dif pi adopt /vm1.raw`"), "{next}");
        assert!(next.contains("`tcmu-dif pi rebuild /vm1.raw`"), "{next}");
        assert_eq!(
            e.to_string(),
            "protection information /vm1.raw.pi: the image has been changed by something else (left with 1048576 \
             bytes, modified at 1.000000002; found with 1048576 bytes, modified at 1.000000003)"
        );
    });
}

#[test]
fn the_stamp_of_a_block_device_is_its_size_alone() {
    let left = Stamp { size: 5, mtime: (0, 0) };
    assert!(left.matches(&Stamp { size: 5, mtime: (7, 8) }));
    assert!(!left.matches(&Stamp { size: 6, mtime: (0, 0) }));
    let left = Stamp { size: 5, mtime: (7, 8) };
    assert!(!left.matches(&Stamp { size: 5, mtime: (0, 0) }));
}

#[test]
fn a_sidecar_for_something_else_is_refused() {
    let world = World::new(7, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let other = World { kind: PiType::Type3, ..world.clone() };
        let e = other.open_with(other.volume(), false).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Type { .. }), "{e}");
        let other = World { block_size: BlockSize::B4096, ..world.clone() };
        let e = other.open_with(other.volume(), false).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::BlockSize { .. }), "{e}");
        world.image.set_len(2 * MIB).await.unwrap();
        let e = world.open_with(world.volume(), false).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Capacity { has: 2048, image: 4096 }), "{e}");
        let empty = World { sidecar: SimDisk::new(1), ..world.clone() };
        let e = empty.open_with(empty.volume(), false).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::Store(StoreError::NotASidecar)), "{e}");
    });
}

#[test]
fn tuples_that_find_the_disk_full_fail_the_write_before_the_data_are_touched() {
    let world = World::new(8, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 512]).await.unwrap();
        // The intent is durable by now; what fails is the tuple in a new page.
        world.sidecar.fail_all(Some((OpKind::Write, libc::ENOSPC)));
        let e = write(&p, 512 * 1024, &[2; 512]).await.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::NoSpace);
        world.sidecar.fail_all(None);
        assert_eq!(read(&p, 512 * 1024, 512).await.unwrap(), [0; 512]);
        assert_eq!(read(&p, 0, 512).await.unwrap(), [1; 512]);
    });
}

#[test]
fn a_range_that_cannot_be_settled_fails_as_a_medium_and_is_settled_once_it_can() {
    let world = World::new(9, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 4096]).await.unwrap();
        world.sidecar.fail_all(Some((OpKind::Write, libc::EIO)));
        // The page has its space, so data and tuples go side by side: the data arrive, the tuples do not.
        write(&p, 512, &[2; 512]).await.unwrap_err();
        let e = read(&p, 512, 512).await.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Medium);
        assert_eq!(read(&p, 0, 512).await.unwrap(), [1; 512]);
        world.sidecar.fail_all(None);
        assert_eq!(read(&p, 0, 1536).await.unwrap()[512..1024], [2; 512]);
        assert_eq!(p.counters().recomputed, 1);
        assert_eq!(p.counters().guard_errors, 0);
    });
}

#[test]
fn after_a_failed_flush_nothing_is_written_any_more_and_the_next_open_rechecks() {
    let world = World::new(10, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 512]).await.unwrap();
        world.sidecar.fail_all(Some((OpKind::Sync, libc::EIO)));
        assert_eq!(p.flush().await.unwrap_err().kind, IoErrorKind::Failed);
        world.sidecar.fail_all(None);
        assert_eq!(p.flush().await.unwrap_err().kind, IoErrorKind::Failed);
        assert_eq!(write(&p, 0, &[2; 512]).await.unwrap_err().kind, IoErrorKind::Failed);
        assert_eq!(p.close().await.unwrap_err().kind, IoErrorKind::Failed);
        let again = world.open().await;
        assert_eq!(read(&again, 0, 512).await.unwrap(), [1; 512]);
    });
}

#[test]
fn the_intent_costs_one_durable_write_a_region_and_not_one_a_write() {
    let world = World::new(11, PiType::Type1, BlockSize::B512, 64 * 64 * MIB);
    block_on(async move {
        let p = &world.open().await;
        let mut rng = Rng::new(1);
        // 32 writers at a time, each in a region of its own: they share their commits.
        for round in 0..8u64 {
            let bytes = &rng.bytes(512);
            let places = (0..32u64).map(|i| (i * 2 + round % 2) * 64 * MIB + round * 512);
            join_all(places.map(|at| async move { write(p, at, bytes).await.unwrap() })).await;
        }
        let first = p.sidecar().intent_commits();
        assert!(first <= 6, "{first} commits for 256 writes to 64 regions");
        for _ in 0..CLEAR_EVERY / 2 {
            write(p, 0, &[3; 512]).await.unwrap();
            p.flush().await.unwrap();
        }
        assert_eq!(p.sidecar().intent_commits(), first, "a region in use is not marked again");
        for _ in 0..CLEAR_EVERY * 2 {
            p.flush().await.unwrap();
        }
        assert_eq!(p.sidecar().marked(), [], "idle regions are cleared");
    });
}

#[test]
fn a_write_across_the_border_of_two_regions_marks_both_and_no_other() {
    let world = World::new(15, PiType::Type1, BlockSize::B512, 256 * MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 128 * MIB - 512, &[1; 1024]).await.unwrap();
        let region = 64 * MIB / 512;
        assert_eq!(p.sidecar().marked(), [region..2 * region, 2 * region..3 * region]);
    });
}

#[test]
fn growing_and_shrinking_keep_the_tuples_of_what_stays_and_forget_the_rest() {
    let world = World::new(12, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 1024]).await.unwrap();
        write(&p, MIB - 512, &[2; 512]).await.unwrap();
        p.resize(2 * MIB).await.unwrap();
        write(&p, 2 * MIB - 512, &[3; 512]).await.unwrap();
        assert_eq!(read(&p, MIB - 512, 512).await.unwrap(), [2; 512]);
        p.resize(512).await.unwrap();
        assert_eq!(read(&p, 512, 512).await.unwrap_err().kind, IoErrorKind::OutOfRange);
        p.resize(2 * MIB).await.unwrap();
        let before = p.counters().unprotected;
        assert!(read(&p, 512, 2 * MIB as usize - 512).await.unwrap().iter().all(|b| *b == 0));
        assert_eq!(p.counters().unprotected - before, 4095);
        assert_eq!(read(&p, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(p.resize(1000).await.unwrap_err().kind, IoErrorKind::OutOfRange);
        p.close().await.unwrap();
        world.open().await;
    });
}

#[test]
fn a_read_only_volume_is_verified_and_nothing_is_written_to_its_sidecar() {
    let world = World::new(13, PiType::Type1, BlockSize::B512, 128 * MIB);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 4096]).await.unwrap();
        p.close().await.unwrap();
        world.image.poke(512, &[7]);
        let writes = |d: &SimDisk| d.log().iter().filter(|k| !matches!(k, OpKind::Read)).count();
        let before = writes(&world.sidecar);
        let p = world.open_with(world.volume(), true).await.unwrap();
        assert_eq!(mismatch(read(&p, 0, 4096).await.unwrap_err()).lba, Lba(1));
        assert_eq!(write(&p, 0, &[1; 512]).await.unwrap_err().kind, IoErrorKind::ReadOnly);
        p.close().await.unwrap();
        assert_eq!(writes(&world.sidecar), before);
        // Left in use with a marked region: a mismatch there may be the crash's doing.
        world.image.poke(512, &[1]);
        let p = world.open().await;
        write(&p, 0, &[2; 512]).await.unwrap();
        drop(p);
        world.image.poke(0, &[9]);
        let p = world.open_with(world.volume(), true).await.unwrap();
        read(&p, 0, 4096).await.unwrap();
        assert_eq!((p.counters().unprotected, p.counters().verified), (1, 7));
    });
}

#[test]
fn a_sixteen_tebibyte_image_costs_kilobytes_until_it_is_written() {
    let world = World::new(14, PiType::Type1, BlockSize::B512, 16 << 40);
    block_on(async move {
        let p = world.open().await;
        write(&p, 15 << 40, &[1; 4096]).await.unwrap();
        p.close().await.unwrap();
        assert!(world.sidecar.allocated() < 64 << 10, "{}", world.sidecar.allocated());
    });
}

#[test]
fn a_write_that_is_dropped_half_way_leaves_no_false_alarm() {
    for seed in 0..scaled(100) {
        let mode = if seed % 2 == 0 { PiMode::Bitmap } else { PiMode::Journal };
        let world = World::made(seed, (PiType::Type1, mode), BlockSize::B512, MIB, SMALL);
        block_on(async move {
            let p = world.open().await;
            write(&p, 0, &[1; 4096]).await.unwrap();
            let mut doomed = Box::pin(write(&p, 0, &[2; 4096]));
            for _ in 0..Rng::new(seed).below(12) {
                let pending =
                    std::future::poll_fn(|cx| std::task::Poll::Ready(doomed.as_mut().poll(cx).is_pending()));
                if !pending.await {
                    break;
                }
            }
            drop(doomed);
            read(&p, 0, 4096).await.unwrap();
            p.close().await.unwrap();
            let p = world.open().await;
            read(&p, 0, 4096).await.unwrap();
        });
    }
}

/// A LUN of 1 GiB whose process was killed while it wrote to two regions: one block of each has lost its tuple.
async fn killed(world: &World) {
    let p = world.open().await;
    for (i, at) in [0, 40 * MIB, 640 * MIB, 641 * MIB].into_iter().enumerate() {
        write(&p, at, &[i as u8 + 1; 4096]).await.unwrap();
    }
    // As if the write's data had come to be, and its tuple had not.
    world.image.poke(512, &[9; 512]);
    world.image.poke(641 * MIB + 512, &[9; 512]);
}

#[test]
fn a_block_that_a_crash_left_in_doubt_is_looked_at_before_anybody_gets_it_and_no_other() {
    let world =
        World { recheck: Recheck::Beside, ..World::new(20, PiType::Type1, BlockSize::B512, 1024 * MIB) };
    block_on(async move {
        killed(&world).await;
        let start = world.image.ops();
        let p = world.open().await;
        assert_eq!(world.image.ops(), start, "opening reads nothing of the image");
        assert_eq!(p.counters().unchecked, 2 * 64 * MIB / 512);
        // A read of it: 64 KiB are looked at.
        assert_eq!(read(&p, 0, 1024).await.unwrap()[512..], [9; 512]);
        let c = p.counters();
        assert_eq!((c.recomputed, c.guard_errors, c.unchecked), (1, 0, (128 * MIB - (64 << 10)) / 512));
        // A write needs no look at what it overwrites.
        write(&p, 641 * MIB + 512, &[8; 512]).await.unwrap();
        assert_eq!(p.counters().unchecked, c.unchecked - 1);
        while p.recheck_next().await.unwrap() {}
        let c = p.counters();
        assert_eq!((c.recomputed, c.guard_errors, c.unchecked), (1, 0, 0));
        assert_eq!(p.sidecar().marked(), [], "what has been looked at and flushed is marked no more");
        assert_eq!(read(&p, 641 * MIB, 1024).await.unwrap()[512..], [8; 512]);
    });
}

#[test]
fn damage_outside_of_what_a_crash_left_in_doubt_is_an_error_as_ever() {
    let world =
        World { recheck: Recheck::Beside, ..World::new(21, PiType::Type1, BlockSize::B512, 1024 * MIB) };
    block_on(async move {
        let p = world.open().await;
        write(&p, 300 * MIB, &[5; 4096]).await.unwrap();
        p.close().await.unwrap();
        killed(&world).await;
        world.image.poke(300 * MIB, &[6]);
        let p = world.open().await;
        assert_eq!(mismatch(read(&p, 300 * MIB, 512).await.unwrap_err()).lba, Lba(300 * MIB / 512));
        // Nor does damage count as a crash's doing once a block has been looked at.
        read(&p, 0, 512).await.unwrap();
        world.image.poke(0, &[77]);
        assert_eq!(mismatch(read(&p, 0, 512).await.unwrap_err()).lba, Lba(0));
    });
}

#[test]
fn what_was_not_looked_at_stays_marked_through_flushes_a_close_and_a_power_cut() {
    let world =
        World { recheck: Recheck::Beside, ..World::new(22, PiType::Type1, BlockSize::B512, 1024 * MIB) };
    block_on(async move {
        killed(&world).await;
        let p = world.open().await;
        let marked = p.sidecar().marked();
        assert_eq!(marked.len(), 2);
        write(&p, 0, &[3; 512]).await.unwrap();
        for _ in 0..CLEAR_EVERY * 3 {
            p.flush().await.unwrap();
        }
        assert_eq!(p.sidecar().marked(), marked);
        p.close().await.unwrap();
        let cut = world.cut(&mut Rng::new(1));
        let p = cut.open().await;
        assert_eq!(p.sidecar().marked(), marked);
        assert_eq!(read(&p, 641 * MIB, 1024).await.unwrap()[512..], [9; 512]);
        assert_eq!(p.counters().guard_errors, 0);
    });
}

#[test]
fn what_cannot_be_looked_at_is_a_medium_error_and_never_passes_unchecked() {
    let world =
        World { recheck: Recheck::Beside, ..World::new(23, PiType::Type1, BlockSize::B512, 1024 * MIB) };
    block_on(async move {
        killed(&world).await;
        let p = world.open().await;
        world.sidecar.fail_all(Some((OpKind::Read, libc::EIO)));
        assert_eq!(read(&p, 0, 512).await.unwrap_err().kind, IoErrorKind::Medium);
        assert!(p.recheck_next().await.is_err());
        assert_eq!(p.counters().unchecked, 2 * 64 * MIB / 512);
        world.sidecar.fail_all(None);
        assert_eq!(read(&p, 0, 1024).await.unwrap()[512..], [9; 512]);
    });
}

#[test]
fn a_smaller_or_newly_formatted_lun_has_nothing_left_to_look_at_where_it_is_no_more() {
    let world =
        World { recheck: Recheck::Beside, ..World::new(24, PiType::Type1, BlockSize::B512, 1024 * MIB) };
    block_on(async move {
        killed(&world).await;
        let p = world.open().await;
        p.resize(32 * MIB).await.unwrap();
        assert_eq!(p.counters().unchecked, 32 * MIB / 512);
        p.resize(1024 * MIB).await.unwrap();
        assert_eq!(p.counters().unchecked, 32 * MIB / 512);
        p.reformat(Some(PiType::Type1)).await.unwrap();
        assert_eq!(p.counters().unchecked, 0);
    });
}
