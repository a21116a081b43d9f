//! Images past the host's page cache (`cache=none`) are the same images: what goes past it and what does not see each other, and QEMU sees both.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    error::Error,
    fs,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
};

use tcmu_dif::{
    image::{
        Image,
        direct::CacheMode,
        open::{OpenErrorKind, OpenOptions, open},
    },
    sys::{self, exec::join_all, io::Io, mem::Buffer},
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

const SIZE: u64 = 4 << 20;

fn direct() -> OpenOptions {
    OpenOptions { cache: CacheMode::None, ..OpenOptions::default() }
}

/// Whether the file system for temporary files can; if not, there is nothing to test.
fn can(dir: &Path) -> bool {
    let probe = dir.join("probe");
    fs::write(&probe, [0; 4096]).unwrap();
    let can = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&probe);
    if let Err(e) = &can {
        eprintln!("not run: no direct I/O in {}: {e}", dir.display());
    }
    can.is_ok()
}

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % most
    }
}

/// One step of the model: a few operations on ranges that do not touch, all under way at once. Units of 512 bytes and of 4096 take turns.
async fn step(image: &Rc<Image>, model: &mut [u8], dice: &mut Dice) {
    let parts = 4;
    let part = SIZE / parts;
    let mut jobs = Vec::new();
    for i in 0..parts {
        let unit = if dice.below(3) == 0 { 512 } else { 4096 };
        let at = i * part + dice.below(part / 2 / unit) * unit;
        let len = (1 + dice.below((part / 2).min(128 << 10) / unit)) * unit;
        let range = at as usize..(at + len) as usize;
        let (what, byte) = (dice.below(6), 1 + dice.below(255) as u8);
        match what {
            0 | 1 => {}
            2 | 3 => model[range.clone()].fill(byte),
            _ => model[range.clone()].fill(0),
        }
        let expected = (what < 2).then(|| model[range].to_vec());
        let image = image.clone();
        jobs.push(async move {
            let at = ByteOffset(at);
            match what {
                0 | 1 => {
                    let to = Buffer::from_slice(&vec![0xee; len as usize]).sg();
                    image.read(at, &to).await.unwrap();
                    assert!(Some(to.to_vec()) == expected, "other data at {at:?}, {len} bytes");
                }
                2 | 3 => {
                    let from = Buffer::from_slice(&vec![byte; len as usize]).sg();
                    image
                        .write(at, &from, WriteFlags { fua: what == 3, ..WriteFlags::default() })
                        .await
                        .unwrap();
                }
                4 => image.discard(at, len).await.unwrap(),
                _ => image.write_zeroes(at, len, false).await.unwrap(),
            }
        });
    }
    join_all(jobs).await;
}

async fn check_all(image: &Image, model: &[u8]) {
    for (i, expected) in model.chunks(64 << 10).enumerate() {
        let to = Buffer::zeroed(expected.len()).sg();
        image.read(ByteOffset((i * (64 << 10)) as u64), &to).await.unwrap();
        assert!(to.to_vec() == expected, "chunk {i}");
    }
}

fn same_as_ever(dir: &Path, path: PathBuf, format: &str) {
    let model_file = dir.join("model.raw");
    let (at, kept) = (path.clone(), model_file.clone());
    sys::run(async move |io: Io| {
        let mut model = vec![0; SIZE as usize];
        for seed in 0..6 {
            let mut dice = Dice(seed);
            // Every other time through the cache: neither leaves anything behind that the other does not see.
            let options = if seed % 3 == 2 { OpenOptions::default() } else { direct() };
            let image = Rc::new(open(&io, &at, &options).await.unwrap());
            check_all(&image, &model).await;
            for _ in 0..60 {
                step(&image, &mut model, &mut dice).await;
            }
            image.flush().await.unwrap();
            check_all(&image, &model).await;
            image.close().await.unwrap();
        }
        fs::write(kept, &model).unwrap();
    });
    let (path, model) = (path.to_str().unwrap(), model_file.to_str().unwrap());
    qemu_img(&["compare", "-f", "raw", "-F", format, model, path]);
    if format == "qcow2" {
        qemu_img(&["check", "-q", path]);
    }
}

#[test]
fn a_raw_image_past_the_cache_is_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    if can(dir.path()) {
        let path = dir.path().join("a.raw");
        fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        same_as_ever(dir.path(), path, "raw");
    }
}

#[test]
fn a_qcow2_image_past_the_cache_is_the_same_image_whatever_its_clusters() {
    for cluster in ["4k", "64k"] {
        let dir = tempfile::tempdir().unwrap();
        if !can(dir.path()) {
            return;
        }
        let path = dir.path().join("a.qcow2");
        let options = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path.to_str().unwrap(), &SIZE.to_string()]);
        same_as_ever(dir.path(), path, "qcow2");
    }
}

#[test]
fn clusters_that_share_pages_with_tables_do_not_go_past_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2k", path.to_str().unwrap(), "1M"]);
    sys::run(async move |io: Io| {
        let e = open(&io, &path, &direct()).await.map(drop).unwrap_err();
        assert_eq!(e.what, OpenErrorKind::NoDirect);
        assert!(e.source().unwrap().to_string().contains("smaller than a page"));
    });
}

#[test]
fn an_image_on_a_file_system_without_direct_io_is_refused_with_what_to_do() {
    // Nothing of /proc can be had past the cache.
    sys::run(async |io: Io| {
        let path = Path::new("/proc/self/mountinfo");
        let options = OpenOptions { read_only: true, lock: false, ..direct() };
        let e = open(&io, path, &options).await.map(drop).unwrap_err();
        assert_eq!(e.what, OpenErrorKind::NoDirect);
        assert!(e.to_string().contains("past the host's cache"), "{e}");
        assert!(e.next_step().unwrap().contains("writeback"));
    });
}
