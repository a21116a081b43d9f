//! Random work at queue depth 16 on real files, judged by the model, by qemu-img check and by what QEMU reads.

use std::{
    cell::{Cell, RefCell},
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::{CreateOptions, Preallocation, create},
    units::ByteOffset,
    volume::{ExtentKind, Volume},
};

use crate::{
    model::{BLOCK, Model, Settled},
    support::{Rng, check_clean, open, qemu_img, qemu_io, qemu_reads, scale},
    work::{Work, read_disk},
};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Rounds of work on an image, each ended by a clean close and judged; QEMU writes between them.
fn rounds(path: &Path, seed: u64, longest: u64) {
    for round in 0..2 {
        let base = qemu_reads(path);
        let path = path.to_owned();
        let judged = path.clone();
        let size = base.len() as u64;
        let seed = seed * 1000 + round;
        let model = tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &path).await;
            let model = Model::new(base);
            let work = Work {
                volume: &image,
                model: &model,
                blocks: size / BLOCK,
                longest,
                rng: RefCell::new(Rng::new(seed)),
                left: Cell::new(400 * scale()),
                may_fail: false,
            };
            work.run(16).await;
            image.close().await.unwrap();
            // What was closed is read again by ourselves, from the file alone.
            let image = open(&io, &path).await;
            let bytes = read_disk(&image).await.unwrap();
            model.judge_disk(&bytes, Settled::Ended).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            image.close().await.unwrap();
            model
        });
        check_clean(&judged);
        let bytes = qemu_reads(&judged);
        model
            .judge_disk(&bytes, Settled::Ended)
            .unwrap_or_else(|e| panic!("seed {seed}, as QEMU reads: {e}"));
        if round == 0 {
            let end = size / 512 * 512;
            qemu_io(
                &judged,
                &[
                    "write -P 0x11 0 5k",
                    "write -z 64k 100k",
                    "discard 200k 70k",
                    &format!("write -P 0x22 {} 1536", end - 2048),
                    "write -P 0x33 300k 130k",
                ],
            );
        }
    }
}

fn by_qemu(dir: &Dir, options: &str, size: u64) -> PathBuf {
    let path = dir.path("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &size.to_string()]);
    path
}

fn by_us(dir: &Dir, options: CreateOptions) -> PathBuf {
    let path = dir.path("disk.qcow2");
    let made = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&made).unwrap();
        create(&io, Rc::new(file), None, &made, &options).await.unwrap();
    });
    check_clean(&path);
    path
}

fn raw_base(dir: &Dir, name: &str, len: u64) -> PathBuf {
    let path = dir.path(name);
    let bytes: Vec<u8> = (0..len).map(|i| (i / 512 * 7 + i % 251) as u8 | 1).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

const ODD: u64 = (6 << 20) + 512 * 13;

#[test]
fn work_on_64k_clusters_as_qemu_makes_them() {
    let dir = Dir::new();
    rounds(&by_qemu(&dir, "compat=1.1", ODD), 1, 600);
}

#[test]
fn work_on_64k_clusters_as_we_make_them() {
    let dir = Dir::new();
    rounds(&by_us(&dir, CreateOptions::new(ODD)), 2, 600);
}

#[test]
fn work_on_512_byte_clusters_with_64_bit_refcounts() {
    let dir = Dir::new();
    let options = CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(ODD) };
    rounds(&by_us(&dir, options), 3, 300);
}

#[test]
fn work_on_512_byte_clusters_of_version_2_over_a_raw_file() {
    let dir = Dir::new();
    raw_base(&dir, "base.raw", (2 << 20) + 512 * 3);
    let path = by_qemu(&dir, "compat=0.10,cluster_size=512,backing_file=base.raw,backing_fmt=raw", ODD);
    rounds(&path, 4, 200);
}

#[test]
fn work_on_subclusters() {
    let dir = Dir::new();
    rounds(&by_qemu(&dir, "extended_l2=on,cluster_size=16k", ODD), 19, 300);
    let dir = Dir::new();
    let options = CreateOptions { cluster_size: 128 << 10, extended_l2: true, ..CreateOptions::new(ODD) };
    rounds(&by_us(&dir, options), 20, 600);
    let dir = Dir::new();
    let options = CreateOptions {
        cluster_size: 32 << 10,
        extended_l2: true,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(ODD)
    };
    rounds(&by_us(&dir, options), 21, 300);
}

#[test]
fn work_on_subclusters_over_a_raw_file() {
    for (seed, options) in [(22, "cluster_size=16k"), (23, "cluster_size=128k"), (24, "cluster_size=2M")] {
        let dir = Dir::new();
        raw_base(&dir, "base.raw", (3 << 20) + 777);
        let options = format!("extended_l2=on,{options},backing_file=base.raw,backing_fmt=raw");
        rounds(&by_qemu(&dir, &options, ODD), seed, 300);
    }
}

/// What the point of subclusters is: a small write over a backing file copies little.
#[test]
fn a_write_of_a_subcluster_over_a_backing_file_copies_no_cluster() {
    let dir = Dir::new();
    raw_base(&dir, "base.raw", 8 << 20);
    let path =
        by_qemu(&dir, "extended_l2=on,cluster_size=128k,backing_file=base.raw,backing_fmt=raw", 8 << 20);
    let written = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &written).await;
        let data = tcmu_dif::sys::mem::Buffer::from_slice(&[7; 4096]).sg();
        for cluster in 0..8u64 {
            image.write(ByteOffset((cluster << 17) + (64 << 10)), &data, Default::default()).await.unwrap();
        }
        let map = image.map_extents(ByteOffset(0), 128 << 10).await.unwrap();
        let here: Vec<(u64, u64)> = map.iter().filter(|e| e.depth == 0).map(|e| (e.start.0, e.len)).collect();
        assert_eq!(here, [(64 << 10, 4096)], "{map:?}");
        image.close().await.unwrap();
    });
    check_clean(&path);
    let map = qemu_img(&["map", "--output=json", path.to_str().unwrap()]);
    assert_eq!(map.matches("\"depth\": 0").count(), 8, "{map}");
}

#[test]
fn work_on_an_external_data_file() {
    for (seed, options) in [
        (27, "data_file=DATA"),
        (28, "data_file=DATA,cluster_size=4k"),
        (29, "data_file=DATA,extended_l2=on,cluster_size=32k"),
        (30, "data_file=DATA,cluster_size=4k,backing_file=base.raw,backing_fmt=raw"),
        (31, "data_file=DATA,cluster_size=16k,extended_l2=on,backing_file=base.raw,backing_fmt=raw"),
    ] {
        let dir = Dir::new();
        raw_base(&dir, "base.raw", (3 << 20) + 777);
        let options = options.replace("DATA", dir.path("disk.data").to_str().unwrap());
        rounds(&by_qemu(&dir, &options, ODD), seed, 300);
    }
}

#[test]
fn a_disk_with_an_external_data_file_is_made_shorter_and_what_was_cut_off_does_not_come_back() {
    for (seed, options) in [
        (40, "data_file=DATA"),
        (41, "data_file=DATA,data_file_raw=on,cluster_size=4k"),
        (42, "data_file=DATA,extended_l2=on,cluster_size=32k"),
        (43, "data_file=DATA,cluster_size=16k,backing_file=base.raw,backing_fmt=raw"),
    ] {
        let dir = Dir::new();
        raw_base(&dir, "base.raw", (3 << 20) + 777);
        let data = dir.path("disk.data");
        let path = by_qemu(&dir, &options.replace("DATA", data.to_str().unwrap()), ODD);
        rounds(&path, seed, 300);
        let mut rng = Rng::new(seed);
        let mut disk = qemu_reads(&path);
        for _ in 0..4 {
            let less = disk.len() as u64 - (1 + rng.below(disk.len() as u64 / 512 / 2)) * 512;
            disk.truncate(less as usize);
            resized(&path, less, true);
            check_clean(&path);
            assert!(qemu_reads(&path) == disk, "{options}: {less} bytes are left");
            assert!(std::fs::metadata(&data).unwrap().len() <= less);
            // As after a crash before the data file was cut off.
            let late = OpenOptions::new().append(true).open(&data).unwrap();
            late.set_len(less).unwrap();
            (&late).write_all(&[0x77; 100_000]).unwrap();
            let more = less + rng.below(4000) * 512;
            disk.resize(more as usize, 0);
            resized(&path, more, false);
            check_clean(&path);
            assert!(qemu_reads(&path) == disk, "{options}: from {less} to {more} bytes");
        }
    }
}

/// Gives a disk another size.
fn resized(path: &Path, size: u64, shorter: bool) {
    let path = path.to_owned();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &path).await;
        match shorter {
            true => image.shrink(size).await.unwrap(),
            false => image.resize(size).await.unwrap(),
        }
        image.close().await.unwrap();
    });
}

#[test]
fn a_raw_external_data_file_is_the_same_disk_by_itself() {
    for (seed, options) in [(32, "cluster_size=64k"), (33, "cluster_size=4k,preallocation=metadata")] {
        let dir = Dir::new();
        let data = dir.path("disk.data");
        let options = format!("data_file={},data_file_raw=on,{options}", data.display());
        let path = by_qemu(&dir, &options, ODD);
        rounds(&path, seed, 300);
        let (raw, seen) = (std::fs::read(&data).unwrap(), qemu_reads(&path));
        let differs = raw.iter().zip(&seen).position(|(a, b)| a != b);
        // QEMU gives it whole clusters.
        let rest = raw.get(seen.len()..).is_some_and(|rest| rest.iter().all(|b| *b == 0));
        assert!(differs.is_none() && rest, "{options}: at {differs:?}, {} bytes", raw.len());
        let grown = path.clone();
        tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &grown).await;
            image.resize(ODD + (1 << 20)).await.unwrap();
            image.close().await.unwrap();
        });
        check_clean(&path);
        let bytes = std::fs::read(&data).unwrap();
        assert!(bytes.len() as u64 == ODD + (1 << 20) && bytes == qemu_reads(&path), "{options}, grown");
        assert!(qemu_img(&["info", path.to_str().unwrap()]).contains("data file raw: true"));
    }
}

#[test]
fn a_dirty_bitmap_that_was_not_kept_says_so_and_nothing_of_it_leaks() {
    let dir = Dir::new();
    let path = by_qemu(&dir, "cluster_size=4k", ODD);
    let name = path.to_str().unwrap();
    for bitmap in ["backup", "another-name"] {
        qemu_img(&["bitmap", "--add", name, bitmap]);
    }
    qemu_io(&path, &["write -P 3 1M 300k"]);
    assert_eq!(qemu_img(&["info", name]).matches("in-use").count(), 0);
    rounds(&path, 34, 300);
    assert_eq!(qemu_img(&["info", name]).matches("in-use").count(), 2);
    qemu_img(&["bitmap", "--remove", name, "backup"]);
    check_clean(&path);
}

#[test]
fn work_on_2m_clusters() {
    let dir = Dir::new();
    rounds(&by_qemu(&dir, "cluster_size=2M", (33 << 20) + 1024), 5, 3000);
}

#[test]
fn work_on_1_bit_refcounts() {
    let dir = Dir::new();
    rounds(&by_qemu(&dir, "refcount_bits=1,cluster_size=4k", ODD), 6, 300);
}

#[test]
fn work_over_a_raw_file_that_is_shorter_and_odd() {
    let dir = Dir::new();
    raw_base(&dir, "base.raw", (3 << 20) + 777);
    let path = by_qemu(&dir, "cluster_size=4k,backing_file=base.raw,backing_fmt=raw", ODD);
    rounds(&path, 7, 300);
}

#[test]
fn work_of_version_2_over_a_shorter_qcow2_file() {
    let dir = Dir::new();
    raw_base(&dir, "base.raw", 4 << 20);
    let base = dir.path("base.qcow2");
    let raw = dir.path("base.raw");
    qemu_img(&["convert", "-c", "-O", "qcow2", raw.to_str().unwrap(), base.to_str().unwrap()]);
    let path = by_qemu(&dir, "compat=0.10,backing_file=base.qcow2,backing_fmt=qcow2", ODD);
    rounds(&path, 8, 600);
}

fn with_snapshots(path: &Path) {
    qemu_io(path, &["write -P 1 0 1M", "write -P 2 3M 700k", "write -z 2M 256k"]);
    qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
    qemu_io(path, &["write -P 3 512k 1M", "write -P 4 5M 100k"]);
    qemu_img(&["snapshot", "-c", "two", path.to_str().unwrap()]);
}

/// Every snapshot, as QEMU reads it.
fn snapshots(path: &Path) -> Vec<Vec<u8>> {
    ["one", "two"]
        .map(|name| {
            let raw = path.with_extension("snap");
            let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
            qemu_img(&["convert", "-f", "qcow2", "-l", name, "-O", "raw", from, to]);
            std::fs::read(raw).unwrap()
        })
        .into()
}

#[test]
fn work_beside_internal_snapshots_leaves_them_as_they_were() {
    for (seed, options) in [
        (9, "compat=1.1"),
        (10, "cluster_size=512,compat=0.10"),
        (11, "cluster_size=4k,refcount_bits=8"),
        (25, "extended_l2=on,cluster_size=32k"),
    ] {
        let dir = Dir::new();
        let path = by_qemu(&dir, options, ODD);
        with_snapshots(&path);
        let before = snapshots(&path);
        rounds(&path, seed, 400);
        assert!(snapshots(&path) == before, "a snapshot has changed: {options}");
    }
}

#[test]
fn work_over_compressed_and_zero_clusters() {
    for (seed, options) in [
        (12, "cluster_size=64k"),
        (13, "cluster_size=4k"),
        (14, "cluster_size=512,compat=0.10"),
        (17, "cluster_size=64k,compression_type=zstd"),
        (18, "cluster_size=2M,compression_type=zstd"),
        (26, "cluster_size=64k,extended_l2=on"),
    ] {
        let dir = Dir::new();
        let raw = raw_base(&dir, "from.raw", 6 << 20);
        let path = dir.path("disk.qcow2");
        qemu_img(&[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            options,
            raw.to_str().unwrap(),
            path.to_str().unwrap(),
        ]);
        qemu_io(&path, &["write -P 5 1M 300k", "write -z 2M 256k"]);
        if !options.contains("0.10") {
            // Without "may unmap" QEMU keeps the clusters of what it zeroes.
            qemu_io(&path, &["write -P 5 3M 300k", "write -z 3M 256k"]);
        }
        rounds(&path, seed, 400);
    }
}

#[test]
fn work_on_a_preallocated_image() {
    let dir = Dir::new();
    let options = CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::new(ODD) };
    rounds(&by_us(&dir, options), 15, 600);
    let dir = Dir::new();
    rounds(&by_qemu(&dir, "preallocation=metadata", ODD), 16, 600);
}

#[test]
fn a_disk_grows_and_what_is_new_reads_as_zeros() {
    for options in [
        "cluster_size=512",
        "cluster_size=64k",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=64k",
    ] {
        let dir = Dir::new();
        // The backing file goes on beyond the overlay's end: that must never show.
        raw_base(&dir, "base.raw", 5 << 20);
        let path =
            by_qemu(&dir, &format!("{options},backing_file=base.raw,backing_fmt=raw"), (3 << 20) + 1536);
        let grown = path.clone();
        let before = qemu_reads(&path);
        let old = before.len();
        tcmu_dif::sys::run(async move |io| {
            let image = open(&io, &grown).await;
            image.discard(ByteOffset(old as u64 - 512), 512).await.unwrap();
            image.resize(40 << 20).await.unwrap();
            assert_eq!(image.limits().capacity, 40 << 20);
            let bytes = read_disk(&image).await.unwrap();
            assert!(bytes[..old - 512] == before[..old - 512]);
            assert!(bytes[old - 512..].iter().all(|b| *b == 0), "{options}");
            assert!(image.resize(1 << 20).await.is_err());
            image.close().await.unwrap();
        });
        check_clean(&path);
        assert_eq!(qemu_reads(&path).len(), 40 << 20);
        rounds(&path, 17, 400);
    }
}

#[test]
fn discarded_clusters_go_back_to_the_file_and_are_used_again() {
    let dir = Dir::new();
    let path = by_us(&dir, CreateOptions::new(64 << 20));
    let used = path.clone();
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &used).await;
        let data = tcmu_dif::sys::mem::Buffer::from_slice(&vec![7; 8 << 20]).sg();
        for _ in 0..20 {
            image.write(ByteOffset(0), &data, Default::default()).await.unwrap();
            image.discard(ByteOffset(0), 64 << 20).await.unwrap();
            image.flush().await.unwrap();
        }
        let map = image.map_extents(ByteOffset(0), 64 << 20).await.unwrap();
        assert!(map.len() == 1 && map[0].kind == ExtentKind::Unallocated, "{map:?}");
        image.close().await.unwrap();
    });
    check_clean(&path);
    let meta = std::fs::metadata(&path).unwrap();
    // 160 MiB were written; without reuse the file would have that.
    assert!(meta.len() < 80 << 20, "{}", meta.len());
    let blocks = std::os::unix::fs::MetadataExt::blocks(&meta);
    assert!(blocks * 512 < 4 << 20, "{blocks} blocks of 512 bytes are still in use");
}
