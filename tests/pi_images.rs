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
        PiMode, PiOpenError, PiOpenErrorKind, PiType, Protected, Protection,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, io::Io, mem::Buffer},
    units::{BlockSize, Blocks, ByteOffset},
    volume::{IoErrorKind, Volume, WriteFlags},
};

const LEN: u64 = 256 << 20;

async fn attach(io: &Io, path: &Path) -> Result<Protected<Image>, PiOpenError> {
    let options = OpenOptions { read_only: false, format: None, lock: true };
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
            let volume = open(&io, &path, &OpenOptions { read_only: true, format: None, lock: true }).await;
            let sidecar = tools::inspect(&io, &path, &default_path(&path)).await.unwrap();
            let report = tools::verify(&volume.unwrap(), &sidecar, |_, _| ()).await.unwrap();
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
            let options = OpenOptions { read_only: false, format: None, lock: true };
            let image = open(&io, &path, &options).await.unwrap();
            write(&image, 65536, 2).await;
            image.close().await.unwrap();
            drop(image);
            let e = attach(&io, &path).await.err().unwrap();
            assert!(matches!(e.what, PiOpenErrorKind::ImageChanged { .. }), "{format:?}: {e}");

            let options = OpenOptions { read_only: true, format: None, lock: true };
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
