//! Damaged and hostile images: an error, or the data; never a panic, a hang, or a write over metadata.

use std::{cell::Cell, path::Path, rc::Rc, time::UNIX_EPOCH};

use tcmu_dif::{
    image::qcow2::{Qcow2, probe_header},
    sys::mem::Buffer,
    units::ByteOffset,
    volume::{IoErrorKind, Volume},
};

use crate::{
    sim::{self, Cut, SimDisk},
    support::{FULL, Rng, qemu_img, qemu_io, scale},
    work::read_disk,
};

fn image(options: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let name = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "400k"]);
    qemu_io(&path, &["write -P 7 0 60k", "write -c -P 9 64k 64k", "write -P 8 150k 30k"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    qemu_io(&path, &["write -P 7 20k 60k", "write -z 200k 64k"]);
    std::fs::read(&path).unwrap()
}

/// Opens the image and does a bit of everything with it. Gives the number of errors.
async fn use_it(bytes: Rc<Vec<u8>>) -> u64 {
    let errors = Cell::new(0);
    let count = |failed: bool| errors.set(errors.get() + u64::from(failed));
    for read_only in [true, false] {
        let disk = SimDisk::new(&bytes, 1, 0);
        let image = match Qcow2::open_on(disk.clone(), Path::new("/hostile"), read_only, None).await {
            Ok(image) => image,
            Err(e) => {
                assert!(!e.to_string().is_empty());
                count(true);
                continue;
            }
        };
        let size = image.limits().capacity;
        let buffer = Buffer::zeroed(3 << 10);
        let last = size.saturating_sub(3 << 10);
        let step = (size / 150).max(2048) / 512 * 512;
        for at in (0..size.min(step * 200)).step_by(step as usize).chain([last]) {
            let len = (3 << 10).min(size - at);
            let sg = buffer.sg().slice(0, len as usize);
            count(image.read(ByteOffset(at), &sg).await.is_err());
            count(image.map_extents(ByteOffset(at), len).await.is_err());
            if read_only {
                assert!(image.write(ByteOffset(at), &sg, Default::default()).await.is_err() || len == 0);
                continue;
            }
            count(image.write(ByteOffset(at), &sg, Default::default()).await.is_err());
            count(image.discard(ByteOffset(at), len).await.is_err());
            count(image.write_zeroes(ByteOffset(at), len, false).await.is_err());
        }
        if !read_only {
            count(image.flush().await.is_err());
            count(image.snapshot_create("mine", UNIX_EPOCH).await.is_err());
            count(image.snapshot_apply("one").await.is_err());
            count(image.snapshot_delete("one").await.is_err());
            count(image.shrink((size / 3).max(1)).await.is_err());
            count(image.snapshot_apply("mine").await.is_err());
            count(image.discard(ByteOffset(0), size.min(64 << 20)).await.is_err());
            count(image.resize(size.saturating_add(1 << 20)).await.is_err());
        }
        count(image.close().await.is_err());
        assert!(disk.steps.get() < 100_000, "{} steps", disk.steps.get());
    }
    errors.get()
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn every_header_field_at_its_extremes_is_survived() {
    let good = image("cluster_size=4k");
    assert_eq!(sim::run(use_it(Rc::new(good.clone()))), 0);
    for at in (0..112).step_by(4) {
        for value in [0u32, 1, 2, 4, 9, 22, 64, 0x1000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            sim::run(use_it(Rc::new(bytes)));
        }
    }
}

/// Where the words of all tables lie in the file.
fn words(bytes: &[u8]) -> Vec<usize> {
    let bits = be32(bytes, 20);
    let cluster = 1usize << bits;
    let mut found = Vec::new();
    let (l1, entries) = (be64(bytes, 40) as usize, be32(bytes, 36) as usize);
    // With extended entries every second word is a bitmap.
    for i in 0..entries {
        found.push(l1 + i * 8);
        let l2 = (be64(bytes, l1 + i * 8) & 0x00ff_ffff_ffff_fe00) as usize;
        if l2 != 0 {
            found.extend((0..cluster / 8).map(|j| l2 + j * 8).take(110));
        }
    }
    let table = be64(bytes, 48) as usize;
    for i in 0..2 {
        found.push(table + i * 8);
        let block = be64(bytes, table + i * 8) as usize;
        if block != 0 {
            found.extend((0..16).map(|j| block + j * 8));
        }
    }
    let snapshots = be64(bytes, 64) as usize;
    found.extend((0..6).map(|i| snapshots + i * 8));
    found
}

#[test]
fn every_table_entry_pointed_anywhere_is_survived() {
    for options in ["cluster_size=4k", "cluster_size=512,compat=0.10", "extended_l2=on,cluster_size=16k"] {
        let good = image(options);
        let l1 = be64(&good, 40);
        let l2 = be64(&good, l1 as usize) & 0x00ff_ffff_ffff_fe00;
        let (table, len) = (be64(&good, 48), good.len() as u64);
        let copied = 1u64 << 63;
        let values = [
            0,
            1,
            0x200,
            l1 | copied,
            l2 | copied,
            table | copied,
            len | copied,
            u64::MAX,
            1 << 62 | u64::MAX >> 3,
        ];
        let mut rng = Rng::new(3);
        for at in words(&good) {
            for value in values {
                // All of them in the long run.
                if scale() < FULL && !rng.one_in(8 / scale().min(4)) {
                    continue;
                }
                let mut bytes = good.clone();
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                sim::run(use_it(Rc::new(bytes)));
            }
        }
    }
}

#[test]
fn images_cut_short_or_full_of_rubbish_are_survived() {
    let good = image("cluster_size=4k");
    for len in (0..good.len()).step_by(if scale() < FULL { 1111 } else { 100 }) {
        sim::run(use_it(Rc::new(good[..len].to_vec())));
    }
    let mut rng = Rng::new(9);
    for _ in 0..150 * scale() {
        let mut bytes = good.clone();
        for _ in 0..1 + rng.below(6) {
            // Mostly in the tables, which come first.
            let within = if rng.one_in(3) { bytes.len() as u64 } else { 0x6000 };
            let at = rng.below(within) as usize;
            bytes[at] = match rng.below(3) {
                0 => 0xff,
                1 => bytes[at] ^ 1 << rng.below(8),
                _ => rng.next() as u8,
            };
        }
        sim::run(use_it(Rc::new(bytes)));
    }
}

#[test]
fn a_guest_write_over_metadata_is_refused_and_the_image_marked_corrupt() {
    let good = image("cluster_size=4k");
    let l1 = be64(&good, 40);
    let l2 = (be64(&good, l1 as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    let table = be64(&good, 48);
    let block = be64(&good, table as usize);
    let snapshots = be64(&good, 64);
    let old_l1 = be64(&good, snapshots as usize);
    for target in [l1, l2 as u64, table, block, snapshots, old_l1] {
        for act in ["write", "discard", "zero", "part"] {
            let mut bytes = good.clone();
            bytes[l2..l2 + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
            let before = bytes.clone();
            sim::run(async move {
                let disk = SimDisk::new(&bytes, 1, 0);
                let image = Qcow2::open_on(disk.clone(), Path::new("/damaged"), false, None).await.unwrap();
                let data = Buffer::from_slice(&[0xee; 4096]).sg();
                let result = match act {
                    "write" => image.write(ByteOffset(0), &data, Default::default()).await,
                    "discard" => image.discard(ByteOffset(0), 4096).await,
                    "zero" => image.write_zeroes(ByteOffset(0), 4096, false).await,
                    _ => image.discard(ByteOffset(512), 512).await,
                };
                assert_eq!(result.unwrap_err().kind, IoErrorKind::Corrupt, "{act} at {target:#x}");
                // Nothing else is written any more, but it can be read.
                let other = image.write(ByteOffset(300 << 10), &data, Default::default()).await;
                assert_eq!(other.unwrap_err().kind, IoErrorKind::Corrupt);
                image.read(ByteOffset(150 << 10), &data).await.unwrap();
                assert!(data.to_vec() == [8; 4096]);
                image.close().await.unwrap();
                let mut after = disk.cut(Cut::Oldest, &mut Rng::new(1));
                assert!(probe_header(&after[..4096]).unwrap().corrupt);
                after[72..80].copy_from_slice(&before[72..80]);
                assert!(after == before, "{act} at {target:#x} changed the file");
            });
        }
    }
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    // By hand: qemu-img's own LUKS images need a measurement of the processor that now and then fails.
    for (crypt_method, name) in [(1, "AES"), (2, "LUKS")] {
        let mut bytes = image("cluster_size=4k");
        bytes[35] = crypt_method;
        let error = probe_header(&bytes).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let mut bytes = image("cluster_size=4k");
    bytes[72] = 0x80;
    let error = probe_header(&bytes).unwrap_err();
    assert!(error.to_string().contains("incompatible feature 63"), "{error}");
}

#[test]
fn marked_images_are_read_and_not_written_unless_they_are_only_dirty() {
    let good = image("cluster_size=4k");
    // An L2 entry beyond the end of the file: nobody can mend that.
    let l2 = (be64(&good, be64(&good, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    for (bits, broken, word) in
        [(1u8, false, ""), (1, true, "marked dirty"), (2, false, "corrupt"), (3, false, "corrupt")]
    {
        let mut bytes = good.clone();
        bytes[79] |= bits;
        if broken {
            bytes[l2 + 8..l2 + 16].copy_from_slice(&(1u64 << 40).to_be_bytes());
        }
        sim::run(async move {
            let disk = SimDisk::new(&bytes, 1, 0);
            let open =
                async |read_only| Qcow2::open_on(disk.clone(), Path::new("/marked"), read_only, None).await;
            let image = open(true).await.unwrap();
            assert_eq!(read_disk(&image).await.is_ok(), !broken);
            assert!(disk.cut(Cut::Process, &mut Rng::new(1)) == bytes, "a reader has written");
            match open(false).await {
                Ok(image) => {
                    assert_eq!(word, "", "a {word} image was opened for writing");
                    let marks = disk.cut(Cut::Oldest, &mut Rng::new(1))[79] & 3;
                    assert_eq!((marks, image.header().dirty), (0, false));
                }
                Err(e) => {
                    assert_eq!(e.kind, IoErrorKind::Corrupt);
                    let e = e.to_string();
                    assert!(!word.is_empty() && e.contains(word) && e.contains("tcmu-dif image"), "{e}");
                }
            }
        });
    }
}

#[test]
fn autoclear_bits_go_with_the_first_write_and_not_before() {
    let mut bytes = image("cluster_size=4k");
    bytes[95] = 3;
    let good = bytes.clone();
    let after = sim::run(async move {
        let disk = SimDisk::new(&bytes, 1, 0);
        let image = Qcow2::open_on(disk.clone(), Path::new("/auto"), false, None).await.unwrap();
        read_disk(&image).await.unwrap();
        image.flush().await.unwrap();
        assert!(disk.cut(Cut::Process, &mut Rng::new(1)) == bytes);
        let data = Buffer::from_slice(&[1; 512]).sg();
        image.write(ByteOffset(0), &data, Default::default()).await.unwrap();
        // Durable before the first change, not with it.
        disk.cut(Cut::Oldest, &mut Rng::new(1))
    });
    assert_eq!(after[95], 0);
    assert!(after[..95] == good[..95] && after[96..4096] == good[96..4096]);
}
