//! Tuples of initiators: they are kept as they came, across crashes too, and nothing of ours judges their tags.

use std::{cell::Cell, rc::Rc};

use super::*;
use crate::{
    pi::{
        store::LAYOUT,
        testing::{World, block_on, read, write},
        tools,
        tuple::{Tuple, tuples},
    },
    storage::sim::{Rng, scaled},
    sys::{exec::Executor, mem::Buffer},
    volume::AppTags,
};

const MIB: u64 = 1 << 20;

fn exposed(world: &World) -> Protection {
    Protection { exposure: Exposure::Initiator, ..world.protection(false) }
}

async fn open(world: &World) -> Protected<crate::pi::testing::SimVolume, crate::storage::sim::SimDisk> {
    let stamp = world.stamp;
    let (volume, sidecar) = (world.volume(), world.sidecar.clone());
    Protected::attach(volume, sidecar, &exposed(world), Box::new(move || Ok(stamp))).await.unwrap()
}

/// Tuples that nobody but their initiator could have made: other tags than ours.
fn theirs(world: &World, data: &[u8], lba: u64) -> Vec<u8> {
    let kind = world.kind;
    let guards =
        Checker { guard: Guard::best(), kind, block_size: world.block_size, tags: Exposure::Initiator };
    let mut out = guards.generate(&Buffer::from_slice(data).sg(), Lba(lba));
    for (i, t) in out.chunks_mut(8).enumerate() {
        t[2..4].copy_from_slice(&0x4321u16.to_be_bytes());
        if kind != PiType::Type1 {
            t[4..].copy_from_slice(&(0x8000_0000 + i as u32).to_be_bytes());
        }
    }
    out
}

#[test]
fn tags_of_initiators_survive_a_crash_and_a_later_look_by_anybody() {
    for kind in PiType::ALL {
        let world = World::new(21, kind, BlockSize::B512, MIB);
        block_on(async move {
            let data = Rng::new(3).bytes(8192);
            let sent = theirs(&world, &data, 16);
            let p = open(&world).await;
            assert_eq!(p.protection(), Some(kind));
            let from = Buffer::from_slice(&data).sg();
            p.write_with_tuples(
                ByteOffset(8192),
                &from,
                sent.clone(),
                WriteFlags { fua: true, ..WriteFlags::default() },
            )
            .await
            .unwrap();
            drop(p); // not closed

            let p = open(&world).await;
            assert_eq!(p.counters().recomputed, 0, "{kind}");
            let to = Buffer::zeroed(8192);
            let told =
                TupleCheck { guard: true, app: AppTags::One { tag: 0x4321, mask: 0xffff }, reference: None };
            let got = p.read_with_tuples(ByteOffset(8192), &to.sg(), &told).await.unwrap();
            assert!(got == sent && to.to_vec() == data, "{kind}");
            // Without being told anything: the guard, and the reference tag of type 1.
            assert_eq!(read(&p, 8192, 8192).await.unwrap(), data);
            let report =
                tools::verify(p.volume(), p.sidecar(), &Beneath::nothing(), |_, _| ()).await.unwrap();
            assert_eq!((report.verified, report.is_clean()), (16, true), "{kind}: {report:?}");
            p.close().await.unwrap();

            // Seen by nobody any more: their tags are no errors then either.
            let p = world.open().await;
            assert_eq!(p.protection(), None);
            assert_eq!(read(&p, 8192, 8192).await.unwrap(), data);
        });
    }
}

#[test]
fn a_block_that_a_crash_has_torn_gets_a_new_guard_and_keeps_its_tags() {
    for kind in PiType::ALL {
        let world = World::new(22, kind, BlockSize::B512, MIB);
        block_on(async move {
            let data = Rng::new(4).bytes(4096);
            let sent = theirs(&world, &data, 0);
            let p = open(&world).await;
            let from = Buffer::from_slice(&data).sg();
            p.write_with_tuples(ByteOffset(0), &from, sent.clone(), WriteFlags::default()).await.unwrap();
            // The data of block 2 did not get there.
            world.image.write(1024, &Buffer::from_slice(&[9; 512]).sg(), false).await.unwrap();
            drop(p);
            let p = open(&world).await;
            assert_eq!(p.counters().recomputed, 1);
            let to = Buffer::zeroed(4096);
            let check = TupleCheck { guard: true, ..TupleCheck::default() };
            let got = p.read_with_tuples(ByteOffset(0), &to.sg(), &check).await.unwrap();
            for (i, (old, new)) in tuples(&sent).zip(tuples(&got)).enumerate() {
                let want = if i == 2 { Tuple { guard: new.guard, ..old } } else { old };
                assert_eq!(new, want, "{kind} {i}");
            }
        });
    }
}

#[test]
fn reformat_forgets_every_tuple_and_is_remembered() {
    let world = World::new(23, PiType::Type1, BlockSize::B4096, MIB);
    block_on(async move {
        for (seen, kind) in [
            (Some(PiType::Type3), PiType::Type3),
            (None, PiType::Type3),
            (Some(PiType::Type2), PiType::Type2),
        ] {
            let p = open(&world).await;
            let data = Rng::new(5).bytes(8192);
            p.write(ByteOffset(0), &Buffer::from_slice(&data).sg(), WriteFlags::default()).await.unwrap();
            p.reformat(seen).await.unwrap();
            assert_eq!((p.protection(), p.sidecar().kind()), (seen, kind));
            let to = Buffer::zeroed(MIB as usize);
            let got = p.read_with_tuples(ByteOffset(0), &to.sg(), &TupleCheck::default()).await.unwrap();
            assert!(got.iter().all(|b| *b == 0xff));
            p.close().await.unwrap();
            let p = open(&world).await;
            assert_eq!((p.protection(), p.sidecar().info().formatted), (seen, true));
            p.close().await.unwrap();
        }
    });
}

#[test]
fn tuples_that_are_too_few_or_too_many_are_refused() {
    let world = World::new(24, PiType::Type1, BlockSize::B512, MIB);
    block_on(async move {
        let p = open(&world).await;
        let from = Buffer::from_slice(&[1; 1024]).sg();
        for n in [0, 8, 15, 24] {
            let e = p.write_with_tuples(ByteOffset(0), &from, vec![0; n], WriteFlags::default()).await;
            assert_eq!(e.unwrap_err().kind, IoErrorKind::OutOfRange, "{n}");
        }
        assert_eq!(read(&p, 0, 1024).await.unwrap(), [0; 1024]);
    });
}

#[test]
fn a_power_cut_during_a_reformat_leaves_every_block_whole_under_the_old_type_or_without_a_tuple() {
    let mut ends = [0, 0];
    for (seed, mode) in (0..scaled(20)).flat_map(|s| [(s, PiMode::Bitmap), (s, PiMode::Journal)]) {
        let mut rng = Rng::new(seed);
        let world = World::made(seed, (PiType::Type1, mode), BlockSize::B512, 256 * MIB, LAYOUT);
        let places: Vec<u64> = (0..6).map(|_| rng.below(500_000) * 512).collect();
        let (w, at) = (world.clone(), places.clone());
        block_on(async move {
            let p = open(&w).await;
            for at in at {
                write(&p, at, &Rng::new(at).bytes(4096)).await.unwrap();
            }
            p.close().await.unwrap();
        });
        for turns in 0.. {
            let before = world.cut(&mut rng);
            let (exec, w) = (Executor::new(), before.clone());
            let done = Rc::new(Cell::new(false));
            let told = done.clone();
            exec.spawn(async move {
                let p = open(&w).await;
                p.reformat(Some(PiType::Type3)).await.unwrap();
                told.set(true);
            });
            for _ in 0..turns {
                exec.run_ready();
            }
            exec.clear();
            let (after, at, finished) = (before.cut(&mut rng), places.clone(), done.get());
            let formatted = block_on(async move {
                let p = open(&after).await;
                let formatted = p.sidecar().info().formatted;
                assert_eq!(p.sidecar().kind(), if formatted { PiType::Type3 } else { PiType::Type1 });
                assert!(formatted || !finished, "what was told to be done has been forgotten");
                for at in at {
                    read(&p, at, 4096).await.unwrap();
                }
                if formatted {
                    assert_eq!(p.counters().verified, 0, "a tuple of the old type is left");
                }
                formatted
            });
            ends[usize::from(formatted)] += 1;
            if finished {
                break;
            }
        }
    }
    assert!(ends[0] > 50 && ends[1] > 2, "{ends:?}");
}
