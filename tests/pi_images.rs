//! Protection over the real images, raw and qcow2: a clean close is recognised, a crash is rechecked, a change is refused.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::path::{Path, PathBuf};

use tcmu_dif::{
    image::{
        Image,
        create::{create_qcow2, create_raw},
        open::{OpenOptions, open},
        qcow2::CreateOptions,
    },
    pi::{
        PiMode, PiOpenError, PiOpenErrorKind, PiType, Protected, Protection, Recheck,
        chain::Beneath,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, io::Io, mem::Buffer},
    units::{BlockSize, Blocks, ByteOffset, Lba},
    volume::{IoErrorKind, Volume, WriteFlags},
};

const LEN: u64 = 256 << 20;

async fn attach(io: &Io, path: &Path) -> Result<Protected<Image>, PiOpenError> {
    let options = OpenOptions::default();
    let image = open(io, path, &options).await.unwrap();
    let stamp = image.stamp().unwrap();
    let how = Protection {
        image: path.to_owned(),
        sidecar: default_path(path),
        kind: PiType::Type1,
        mode: None,
        exposure: tcmu_dif::pi::Exposure::Target,
        block_size: BlockSize::B512,
        read_only: false,
        found: Stamp { size: stamp.size, mtime: stamp.mtime },
        recheck: Recheck::First,
    };
    Protected::open(io, image, &how).await
}

async fn made(io: &Io, dir: &Path, format: ImageFormat) -> PathBuf {
    let path = dir.join("vm1.img");
    match format {
        ImageFormat::Qcow2 => create_qcow2(io, &path, &CreateOptions::new(LEN)).await.unwrap(),
        _ => create_raw(io, &path, LEN).await.unwrap(),
    }
    let (kind, block_size, capacity) = (PiType::Type1, BlockSize::B512, Blocks(LEN / 512));
    let new = NewSidecar {
        block_size,
        kind,
        mode: PiMode::Bitmap,
        capacity,
        format,
        stamp: Stamp::of(&path).unwrap(),
    };
    tools::create(io, &path, &default_path(&path), new).await.unwrap();
    path
}

async fn write(v: &impl Volume, at: u64, byte: u8) {
    let data = Buffer::from_slice(&[byte; 128 << 10]);
    v.write(ByteOffset(at), &data.sg(), WriteFlags::default()).await.unwrap();
}

#[test]
fn sessions_follow_each_other_on_raw_and_qcow2_whether_they_end_in_a_close_or_in_a_crash() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        sys::run(async move |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = made(&io, dir.path(), format).await;
            for round in 0..6u8 {
                let p = attach(&io, &path).await.unwrap_or_else(|e| panic!("{format:?} {round}: {e}"));
                assert_eq!(p.counters().recomputed, 0, "{format:?} {round}");
                write(&p, u64::from(round) << 25, round + 1).await;
                p.discard(ByteOffset((u64::from(round) << 25) + 65536), 65536).await.unwrap();
                let buffer = Buffer::zeroed(65536);
                for old in 0..=round {
                    p.read(ByteOffset(u64::from(old) << 25), &buffer.sg()).await.unwrap();
                    assert!(buffer.to_vec() == [old + 1; 65536]);
                }
                if round % 2 == 0 {
                    p.close().await.unwrap();
                }
            }
            let volume = open(&io, &path, &OpenOptions { read_only: true, ..OpenOptions::default() }).await;
            let sidecar = tools::inspect(&io, &path, &default_path(&path)).await.unwrap();
            let report =
                tools::verify(&volume.unwrap(), &sidecar, &Beneath::nothing(), |_, _| ()).await.unwrap();
            assert_eq!((report.verified, report.unprotected, report.is_clean()), (6 * 128, 0, true));
        });
    }
}

#[test]
fn a_change_behind_our_back_is_refused_and_after_a_rebuild_accepted() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        sys::run(async move |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = made(&io, dir.path(), format).await;
            let p = attach(&io, &path).await.unwrap();
            write(&p, 0, 1).await;
            p.close().await.unwrap();
            drop(p);
            std::thread::sleep(std::time::Duration::from_millis(20));
            let options = OpenOptions::default();
            let image = open(&io, &path, &options).await.unwrap();
            write(&image, 65536, 2).await;
            image.close().await.unwrap();
            drop(image);
            let e = attach(&io, &path).await.err().unwrap();
            assert!(matches!(e.what, PiOpenErrorKind::ImageChanged { .. }), "{format:?}: {e}");

            let options = OpenOptions { read_only: true, ..OpenOptions::default() };
            let image = open(&io, &path, &options).await.unwrap();
            let sidecar = default_path(&path);
            let how = tools::RebuildOptions { format, ..Default::default() };
            let report = tools::rebuild(&io, &image, &path, &sidecar, how, |_, _| ()).await.unwrap();
            assert_eq!((report.protected, report.block_size), (384, 512));
            drop(image);
            let p = attach(&io, &path).await.unwrap();
            p.read(ByteOffset(0), &Buffer::zeroed(192 << 10).sg()).await.unwrap();
            assert_eq!(p.counters().verified, 384);
            p.close().await.unwrap();
        });
    }
}

#[test]
fn a_write_past_the_protection_is_an_error_at_the_first_block_that_it_hit() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        sys::run(async move |io| {
            let dir = tempfile::tempdir().unwrap();
            let path = made(&io, dir.path(), format).await;
            let p = attach(&io, &path).await.unwrap();
            write(&p, 0, 1).await;
            let one = Buffer::from_slice(&[3; 1024]);
            p.volume().write(ByteOffset(7 * 512), &one.sg(), WriteFlags::default()).await.unwrap();
            let e = p.read(ByteOffset(0), &Buffer::zeroed(65536).sg()).await.unwrap_err();
            let IoErrorKind::Protection(m) = e.kind else { panic!("{e}") };
            assert_eq!(m.lba.0, 7);
            assert_eq!(p.counters().guard_errors, 1);
        });
    }
}

/// A protected base with an overlay over it, whose own sidecar is new.
async fn chained(io: &Io, dir: &Path) -> (PathBuf, PathBuf) {
    let base = made(io, dir, ImageFormat::Qcow2).await;
    let p = attach(io, &base).await.unwrap();
    write(&p, 0, 1).await;
    write(&p, 64 << 20, 2).await;
    p.close().await.unwrap();
    let top = dir.join("top.qcow2");
    let options = CreateOptions {
        backing_file: Some("vm1.img".into()),
        backing_format: Some("qcow2".into()),
        ..CreateOptions::new(LEN)
    };
    create_qcow2(io, &top, &options).await.unwrap();
    let (kind, block_size, capacity) = (PiType::Type3, BlockSize::B512, Blocks(LEN / 512));
    let (mode, format, stamp) = (PiMode::Bitmap, ImageFormat::Qcow2, Stamp::of(&top).unwrap());
    let new = NewSidecar { block_size, kind, mode, capacity, format, stamp };
    tools::create(io, &top, &default_path(&top), new).await.unwrap();
    (base, top)
}

async fn attach_chain(io: &Io, path: &Path) -> Result<Protected<Image>, PiOpenError> {
    let image = open(io, path, &OpenOptions::default()).await.unwrap();
    let files = image.files().to_vec();
    let cluster = u64::from(image.limits().discard_granularity);
    let stamp = image.stamp().unwrap();
    let how = Protection {
        image: path.to_owned(),
        sidecar: default_path(path),
        kind: PiType::Type3,
        mode: None,
        exposure: tcmu_dif::pi::Exposure::Target,
        block_size: BlockSize::B512,
        read_only: false,
        found: Stamp { size: stamp.size, mtime: stamp.mtime },
        recheck: Recheck::First,
    };
    let beneath = Beneath::open(io, &files[1..], BlockSize::B512, cluster).await?;
    Ok(Protected::open(io, image, &how).await?.over(beneath))
}

#[test]
fn a_block_that_an_overlay_does_not_hold_is_checked_with_the_tuple_of_its_backing_file() {
    sys::run(async move |io| {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = chained(&io, dir.path()).await;
        let p = attach_chain(&io, &top).await.unwrap();
        let buffer = Buffer::zeroed(128 << 10);
        p.read(ByteOffset(0), &buffer.sg()).await.unwrap();
        assert_eq!((p.counters().verified, p.counters().unprotected), (256, 0));
        // A part of a cluster is written, and the rest copied: all of it is protected.
        let one = Buffer::from_slice(&[9; 1024]);
        p.write(ByteOffset(7 * 512), &one.sg(), WriteFlags::default()).await.unwrap();
        p.read(ByteOffset(0), &buffer.sg()).await.unwrap();
        assert_eq!((p.counters().verified, p.counters().unprotected), (512, 0));
        // What is discarded here is zeros without protection, whatever lies below.
        p.discard(ByteOffset(65536), 512).await.unwrap();
        p.read(ByteOffset(65536), &buffer.sg().slice(0, 65536)).await.unwrap();
        assert_eq!((p.counters().verified, p.counters().unprotected), (512 + 127, 1));
        p.close().await.unwrap();
        drop(p);

        // Offline, too: with the base's sidecar nothing but what was discarded is without protection.
        let image =
            open(&io, &top, &OpenOptions { read_only: true, ..OpenOptions::default() }).await.unwrap();
        let cluster = u64::from(image.limits().discard_granularity);
        let sidecar = tools::inspect(&io, &top, &default_path(&top)).await.unwrap();
        for (files, verified, unprotected) in [(&image.files()[1..], 511, 1), (&[][..], 255, 257)] {
            let beneath = Beneath::open(&io, files, BlockSize::B512, cluster).await.unwrap();
            let report = tools::verify(&image, &sidecar, &beneath, |_, _| ()).await.unwrap();
            assert_eq!((report.verified, report.unprotected, report.mismatches), (verified, unprotected, 0));
        }
        drop(image);

        // The overlay's own copy is protected by its own tuple, and the rest by the base's: damage to either is found.
        let p = attach_chain(&io, &top).await.unwrap();
        assert_eq!(p.counters().recomputed, 0);
        for (at, lba) in [(512, 1), ((64 << 20) + 512, (64 << 11) + 1)] {
            let extent = p.map_extents(ByteOffset(at), 512).await.unwrap()[0];
            let file = if extent.depth == 0 { &top } else { &base };
            let damaged = std::fs::File::options().write(true).open(file).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&damaged, &[0x55], extent.host_offset.unwrap()).unwrap();
            let e = p.read(ByteOffset(at - 512), &buffer.sg()).await.unwrap_err();
            let IoErrorKind::Protection(m) = e.kind else { panic!("{e}") };
            assert_eq!(m.lba.0, lba);
        }
        // A scrub finds both, and says in which file they lie.
        let (mut found, mut at) = (tools::VerifyReport::default(), Lba(0));
        while let Some(step) = p.scrub(at, &mut found).await.unwrap() {
            at = step.next;
        }
        let bad: Vec<_> = found.bad.iter().map(|b| (b.lba, b.depth)).collect();
        assert_eq!(bad, [(1, 0), ((64 << 11) + 1, 1)]);
    });
}

#[test]
fn a_backing_file_that_was_changed_is_refused_and_one_without_a_sidecar_is_unprotected() {
    sys::run(async move |io| {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = chained(&io, dir.path()).await;
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::File::options()
            .write(true)
            .open(&base)
            .unwrap()
            .set_modified(std::time::SystemTime::now())
            .unwrap();
        let e = attach_chain(&io, &top).await.err().unwrap();
        assert!(matches!(e.what, PiOpenErrorKind::ImageChanged { .. }), "{e}");
        assert!(e.next_step().unwrap().contains(&format!("pi adopt {}", base.display())), "{e}");
        std::fs::remove_file(default_path(&base)).unwrap();
        let p = attach_chain(&io, &top).await.unwrap();
        p.read(ByteOffset(0), &Buffer::zeroed(65536).sg()).await.unwrap();
        assert_eq!((p.counters().verified, p.counters().unprotected), (0, 128));
    });
}
