//! A block device is an image too: discarding and zeroing it end with zeros, and it is not opened while it is claimed.
//!
//! Needs root, for a loop device: so these tests are ignored, unless the one who asks is root (`cargo xtask test` looks).
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use tcmu_dif::{
    image::open::{OpenErrorKind, OpenOptions, open},
    sys::{mem::Buffer, run},
    units::ByteOffset,
    volume::{ExtentKind, IoErrorKind, Volume, WriteFlags},
};

const SIZE: u64 = 8 << 20;

/// A loop device with that sector size, taken down at the end.
struct Loop(PathBuf);

impl Loop {
    fn new(dir: &Path, sector: u32) -> Loop {
        let file = dir.join("disk");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let sector = sector.to_string();
        let out = Command::new("losetup").args(["-f", "--show", "-b", &sector]).arg(&file).output().unwrap();
        assert!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        Loop(PathBuf::from(String::from_utf8(out.stdout).unwrap().trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
#[ignore = "needs root, for a loop device"]
fn discarded_and_zeroed_ranges_of_a_device_read_as_zeros() {
    for sector in [512, 4096] {
        let dir = tempfile::tempdir().unwrap();
        let device = Loop::new(dir.path(), sector);
        let path = device.0.clone();
        run(async move |io| {
            let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
            assert_eq!(image.limits().capacity, SIZE);
            let mut want: Vec<u8> = (0..SIZE).map(|i| (i / 512 + 1) as u8 | 1).collect();
            let all = Buffer::from_slice(&want).sg();
            image
                .write(ByteOffset(0), &all, WriteFlags { fua: true, ..WriteFlags::default() })
                .await
                .unwrap();
            // The last two are aligned for a device of 512-byte sectors only.
            for (at, len) in [(1 << 20, 1 << 20), (4096, 8192), (3 << 20, 512), ((3 << 20) + 1536, 5120)] {
                image.discard(ByteOffset(at), len).await.unwrap();
                image.write_zeroes(ByteOffset(at + (2 << 20)), len, false).await.unwrap();
                for start in [at, at + (2 << 20)] {
                    want[start as usize..(start + len) as usize].fill(0);
                }
            }
            let got = Buffer::zeroed(SIZE as usize);
            image.read(ByteOffset(0), &got.sg()).await.unwrap();
            assert!(got.to_vec() == want, "sectors of {sector}");
            image.flush().await.unwrap();
            let map = image.map_extents(ByteOffset(0), SIZE).await.unwrap();
            assert!(map.len() == 1 && map[0].len == SIZE && map[0].kind == ExtentKind::Data);
            assert_eq!(image.resize(SIZE * 2).await.unwrap_err().kind, IoErrorKind::Unsupported);
            image.close().await.unwrap();
        });
    }
}

#[test]
#[ignore = "needs root, for a loop device"]
fn a_device_that_is_claimed_is_not_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let device = Loop::new(dir.path(), 512);
    let path = device.0.clone();
    run(async move |io| {
        let first = open(&io, &path, &OpenOptions::default()).await.unwrap();
        let unlocked = OpenOptions { lock: false, ..OpenOptions::default() };
        let e = open(&io, &path, &unlocked).await.unwrap_err();
        assert!(matches!(e.what, OpenErrorKind::InUse(_)), "{e}");
        drop(first);
        drop(open(&io, &path, &OpenOptions::default()).await.unwrap());
    });
}
