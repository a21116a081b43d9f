//! The tools over a simulated image; `tests/pi_files.rs` has them over real files.

use super::*;
use crate::{
    pi::{
        store::LAYOUT,
        testing::{SimVolume, World, block_on, read, write},
    },
    storage::sim::{OpKind, Rng, SimDisk},
    units::{Blocks, ByteOffset},
};

const MIB: u64 = 1 << 20;

async fn written(world: &World) {
    let p = world.open().await;
    write(&p, 0, &Rng::new(1).bytes(64 << 10)).await.unwrap();
    write(&p, 200 * MIB, &Rng::new(2).bytes(64 << 10)).await.unwrap();
    p.close().await.unwrap();
}

async fn verified(world: &World) -> VerifyReport {
    let mut last = (0, 0);
    let sidecar = Sidecar::open(world.sidecar.clone()).await.unwrap();
    let report = verify(&world.volume(), &sidecar, &Beneath::nothing(), |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })
    .await
    .unwrap();
    assert_eq!(last, (world.image.len_now(), world.image.len_now()));
    report
}

#[test]
fn verify_lists_what_does_not_match_and_where_it_lies() {
    for size in [BlockSize::B512, BlockSize::B4096] {
        let world = World::new(1, PiType::Type1, size, 1 << 30);
        block_on(async move {
            written(&world).await;
            let n = (128 << 10) / size.bytes();
            let clean = verified(&world).await;
            assert_eq!((clean.verified, clean.unprotected, clean.mismatches), (n, 0, 0));
            assert!(clean.is_clean());
            let at = 200 * MIB + 2 * size.bytes() + 100;
            let byte = world.image.peek(at, 1)[0] ^ 1;
            world.image.poke(at, &[byte]);
            // Data behind our back, in a place without tuples.
            world.image.poke(500 * MIB, &[5; 4096]);
            let report = verified(&world).await;
            assert_eq!((report.verified, report.mismatches), (n - 1, 1));
            assert_eq!(report.unprotected, 4096 / size.bytes());
            let bad = &report.bad[0];
            assert_eq!(bad.lba, 200 * MIB / size.bytes() + 2);
            assert_eq!(bad.host_offset, Some(200 * MIB + 2 * size.bytes()));
            assert_eq!(bad.tag, "guard");
            assert!(!report.is_clean());
        });
    }
}

#[test]
fn a_hole_where_something_was_written_is_a_mismatch_and_a_read_error_is_counted() {
    let world = World::new(2, PiType::Type3, BlockSize::B512, 1 << 30);
    block_on(async move {
        written(&world).await;
        world.volume().discard(ByteOffset(8192), 4096).await.unwrap();
        let report = verified(&world).await;
        assert_eq!((report.mismatches, report.bad[0].lba, report.bad[0].host_offset), (8, 16, None));
        world.image.fail_all(Some((OpKind::Read, libc::EIO)));
        let report = verified(&world).await;
        assert_eq!((report.unreadable, report.verified), (256, 0));
        assert!(!report.is_clean());
    });
}

#[test]
fn a_mismatch_where_a_crash_cut_a_write_off_is_in_doubt_and_no_damage() {
    let world = World::new(3, PiType::Type1, BlockSize::B512, 1 << 30);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 4096]).await.unwrap();
        p.close().await.unwrap();
        let p = world.open().await;
        write(&p, 0, &[2; 4096]).await.unwrap();
        drop(p);
        world.image.poke(0, &[1; 512]);
        let report = verified(&world).await;
        assert_eq!((report.mismatches, report.in_doubt, report.verified), (0, 1, 7));
    });
}

#[test]
fn filling_protects_all_data_and_leaves_holes_alone() {
    block_on(async {
        let disk = SimDisk::new(1);
        disk.set_len(1 << 40).await.unwrap();
        let volume = SimVolume::new(disk.clone());
        write(&volume, 5 << 30, &Rng::new(1).bytes(3 << 20)).await.unwrap();
        write(&volume, 900 << 30, &Rng::new(1).bytes(4096)).await.unwrap();
        let stamp = Stamp { size: 1 << 40, mtime: (1, 2) };
        let sidecar = SimDisk::new(2);
        let new = NewSidecar {
            block_size: BlockSize::B4096,
            kind: PiType::Type1,
            mode: PiMode::Bitmap,
            capacity: Blocks(1 << 28),
            format: ImageFormat::Raw,
            stamp,
        };
        let done = fill(&volume, sidecar.clone(), new, |_, _| ()).await.unwrap();
        assert_eq!(done.protected, 769);
        let world = World {
            image: disk,
            sidecar,
            kind: PiType::Type1,
            block_size: BlockSize::B4096,
            stamp,
            mode: PiMode::Bitmap,
            recheck: Default::default(),
        };
        let p = world.open().await;
        read(&p, 5 << 30, 3 << 20).await.unwrap();
        read(&p, 900 << 30, 8192).await.unwrap();
        assert_eq!((p.counters().verified, p.counters().unprotected), (769, 1));
        assert!(world.sidecar.allocated() < 64 << 10);
    });
}

#[test]
fn adopting_renews_the_blocks_that_differ_and_no_other_and_names_them() {
    for mode in [PiMode::Bitmap, PiMode::Journal] {
        let world = World::made(5, (PiType::Type1, mode), BlockSize::B512, 1 << 30, LAYOUT);
        block_on(async move {
            written(&world).await;
            world.image.poke(200 * MIB + 1024, &[9; 1024]);
            world.image.poke(500 * MIB, &[5; 4096]);
            let sidecar = Sidecar::open(world.sidecar.clone()).await.unwrap();
            let before = sidecar.read_tuples(Lba(0), 128).await.unwrap();
            let report = adopt::take(&world.volume(), &sidecar, |_, _| ()).await.unwrap();
            adopt::finish(&sidecar, world.stamp).await.unwrap();
            assert_eq!((report.adopted, report.protected, report.unreadable), (2, 8, 0));
            let lbas: Vec<u64> = report.changed.iter().map(|b| b.lba).collect();
            assert_eq!(lbas, [200 * 2048 + 2, 200 * 2048 + 3]);
            assert_eq!(report.changed[1].host_offset, Some(200 * MIB + 1536));
            assert_eq!(sidecar.read_tuples(Lba(0), 128).await.unwrap(), before);
            let report = verified(&world).await;
            assert!(report.is_clean());
            assert_eq!(report.verified, 256 + 8);
        });
    }
}

#[test]
fn a_damaged_page_of_tuples_is_reported_block_by_block_and_its_neighbours_are_not() {
    let world = World::new(6, PiType::Type1, BlockSize::B512, 1 << 30);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &Rng::new(1).bytes(MIB as usize)).await.unwrap();
        p.close().await.unwrap();
        // The second page: blocks 512 to 1023.
        let page = MIB + 4096;
        let damaged: Vec<u8> = world.sidecar.peek(page, 4096).iter().map(|b| b ^ 0x5a).collect();
        world.sidecar.poke(page, &damaged);
        let report = verified(&world).await;
        assert_eq!((report.mismatches, report.verified), (512, 2048 - 512));
        assert_eq!((report.bad.len(), report.bad[0].lba), (LISTED, 512));
        let p = world.open().await;
        for lba in 0..2048 {
            assert_eq!(read(&p, lba * 512, 512).await.is_err(), (512..1024).contains(&lba), "{lba}");
        }
    });
}

#[test]
fn verifying_what_a_crash_has_left_sees_it_as_the_next_start_will() {
    let world = World::made(7, (PiType::Type1, PiMode::Journal), BlockSize::B4096, 1 << 30, LAYOUT);
    block_on(async move {
        let p = world.open().await;
        write(&p, 0, &[1; 16384]).await.unwrap();
        p.flush().await.unwrap();
        let (data, tuples) = (world.image.peek(0, 4096), world.sidecar.peek(9 * MIB + 8, 8));
        write(&p, 0, &[2; 16384]).await.unwrap();
        drop(p);
        // Block 0 is old, its tuple is new; of block 1 the tuple is old; block 2 is torn.
        world.image.poke(0, &data);
        world.sidecar.poke(9 * MIB + 8, &tuples);
        world.image.poke(2 * 4096, &data[..512]);
        let report = verified(&world).await;
        assert_eq!((report.verified, report.mismatches, report.in_doubt), (3, 1, 0));
        assert_eq!(report.bad[0].lba, 2);
        // On a volume that is not written as well.
        let p = world.open_with(world.volume(), true).await.unwrap();
        assert_eq!(read(&p, 0, 8192).await.unwrap()[4096..], [2; 4096]);
        assert!(read(&p, 8192, 4096).await.is_err());
        assert_eq!((p.counters().verified, p.counters().guard_errors, p.counters().torn), (2, 1, 1));
        let p = world.open().await;
        assert_eq!((p.counters().torn, p.counters().recomputed), (1, 0));
        assert!(read(&p, 8192, 4096).await.is_err());
        write(&p, 8192, &[3; 4096]).await.unwrap();
        read(&p, 0, 16384).await.unwrap();
    });
}
