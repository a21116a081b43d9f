//! Chains of backing files: walked as QEMU walks them, and every way in which one can be broken is named.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tcmu_dif::{
    image::{
        Format,
        create::{CreateErrorKind, create_qcow2},
        open::{OpenError, OpenErrorKind, OpenOptions, open},
        qcow2::CreateOptions,
    },
    sys::{io::Io, mem::Buffer, run},
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

fn tool(name: &str, dir: &Path, args: &[&str]) -> Output {
    Command::new(name).current_dir(dir).args(args).output().unwrap()
}

fn img(dir: &Path, args: &[&str]) {
    let out = tool("qemu-img", dir, args);
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn io(dir: &Path, file: &str, format: &str, command: &str) -> bool {
    tool("qemu-io", dir, &["-f", format, "-c", command, file]).status.success()
}

fn refused(path: PathBuf, options: OpenOptions) -> OpenError {
    run(async move |io| match open(&io, &path, &options).await {
        Ok(image) => panic!("{image:?} was opened"),
        Err(e) => e,
    })
}

fn writable() -> OpenOptions {
    OpenOptions::default()
}

/// base.raw (1 MiB) under mid.qcow2 (2 MiB) under top.qcow2 (2 MiB), each with a byte of its own in its own 64 KiB.
fn chain() -> tempfile::TempDir {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::create_dir(dir.join("below")).unwrap();
    img(dir, &["create", "-q", "-f", "raw", "below/base.raw", "1M"]);
    assert!(io(dir, "below/base.raw", "raw", "write -P 1 0 256k"));
    img(dir, &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "below/mid.qcow2", "2M"]);
    assert!(io(dir, "below/mid.qcow2", "qcow2", "write -P 2 64k 64k"));
    img(dir, &["create", "-q", "-f", "qcow2", "-b", "below/mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    assert!(io(dir, "top.qcow2", "qcow2", "write -P 3 128k 64k"));
    tmp
}

#[test]
fn a_chain_with_relative_names_reads_through_and_only_its_top_is_written() {
    let tmp = chain();
    let dir = tmp.path().to_owned();
    let before =
        (fs::read(dir.join("below/base.raw")).unwrap(), fs::read(dir.join("below/mid.qcow2")).unwrap());
    let at = dir.clone();
    run(async move |io| {
        let image = open(&io, &at.join("top.qcow2"), &writable()).await.unwrap();
        assert_eq!((image.format(), image.limits().capacity), (Format::Qcow2, 2 << 20));
        let got = Buffer::zeroed(2 << 20);
        image.read(ByteOffset(0), &got.sg()).await.unwrap();
        let got = got.to_vec();
        let want = [(0, 1), (64, 2), (128, 3), (192, 1), (256, 0), (1024, 0), (2047, 0)];
        for (kib, byte) in want {
            assert!(got[kib << 10..(kib << 10) + 1024].iter().all(|b| *b == byte), "{byte} at {kib} KiB");
        }
        let mine = Buffer::from_slice(&[9; 512]).sg();
        for kib in [0u64, 64, 128, 1536] {
            image.write(ByteOffset(kib << 10), &mine, WriteFlags::default()).await.unwrap();
        }
        image.close().await.unwrap();
    });
    img(&dir, &["check", "-q", "top.qcow2"]);
    for (kib, below) in [(0, 1), (64, 2), (128, 3), (1536, 0)] {
        assert!(io(&dir, "top.qcow2", "qcow2", &format!("read -P 9 {kib}k 512")));
        assert!(io(&dir, "top.qcow2", "qcow2", &format!("read -P {below} {}k 1k", kib + 1)));
    }
    let after =
        (fs::read(dir.join("below/base.raw")).unwrap(), fs::read(dir.join("below/mid.qcow2")).unwrap());
    assert!(before == after, "a backing file was written to");
}

#[test]
fn the_metadata_of_a_chain_stay_within_its_cache_size() {
    const LIMIT: u64 = 1 << 20;
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().to_owned();
    let small = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    img(&dir, &[&small[..], &["base.qcow2", "512M"]].concat());
    img(&dir, &[&small[..], &["-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]].concat());
    let spread = async move |io: &Io, name: &str, cache_size: Option<u64>| {
        let options = OpenOptions { cache_size, ..writable() };
        let image = open(io, &dir.join(name), &options).await.unwrap();
        let block = Buffer::from_slice(&[7; 512]).sg();
        // Each in a slice of its own, of 2 MiB.
        for at in (0..512 << 20).step_by(2 << 20) {
            image.write(ByteOffset(at), &block, WriteFlags::default()).await.unwrap();
        }
        for at in (0..512 << 20).step_by(1 << 20) {
            image.read(ByteOffset(at), &block).await.unwrap();
        }
        let counts = image.caches().unwrap();
        image.close().await.unwrap();
        counts
    };
    run(async move |io| {
        spread(&io, "base.qcow2", None).await;
        let counts = spread(&io, "top.qcow2", Some(LIMIT)).await;
        let bytes = counts.l2_cache.bytes + counts.refcount_cache.bytes;
        assert!(bytes > LIMIT / 2 && bytes <= LIMIT, "{counts:?}");
        assert!(counts.l2_cache.hits > 0 && counts.l2_cache.misses > 512, "{counts:?}");
        // With room for all of them each is read once: 256 in both images.
        let counts = spread(&io, "top.qcow2", None).await;
        assert_eq!(counts.l2_cache.misses, 512, "{counts:?}");
    });
}

#[test]
fn the_whole_chain_is_locked_while_it_is_open_and_free_after() {
    let tmp = chain();
    let dir = tmp.path().to_owned();
    run(async move |qio| {
        let image = open(&qio, &dir.join("top.qcow2"), &writable()).await.unwrap();
        let info = tool("qemu-img", &dir, &["info", "top.qcow2"]);
        let stderr = String::from_utf8_lossy(&info.stderr);
        assert!(stderr.contains("Failed to get shared \"write\" lock"), "{stderr}");
        assert!(!io(&dir, "below/mid.qcow2", "qcow2", "write 0 512"));
        assert!(!io(&dir, "below/base.raw", "raw", "write 0 512"));
        img(&dir, &["info", "below/mid.qcow2"]);
        image.close().await.unwrap();
        for (file, format) in
            [("below/base.raw", "raw"), ("below/mid.qcow2", "qcow2"), ("top.qcow2", "qcow2")]
        {
            assert!(io(&dir, file, format, "write 0 512"), "{file} is still locked");
        }
    });
}

#[test]
fn a_backing_file_that_is_missing_or_in_use_is_named_and_nothing_stays_locked() {
    let tmp = chain();
    let dir = tmp.path();
    let (top, mid, base) = (dir.join("top.qcow2"), dir.join("below/mid.qcow2"), dir.join("below/base.raw"));
    fs::rename(&base, dir.join("gone")).unwrap();
    let e = refused(top.clone(), writable());
    assert_eq!((&e.what, &e.path, e.backing_of.as_deref()), (&OpenErrorKind::NotFound, &base, Some(&*mid)));
    let words = format!("{} (backing file of {}): no such file", base.display(), mid.display());
    assert_eq!(e.to_string(), words);
    assert!(e.next_step().unwrap().contains("qemu-img rebase -u -b NEW"));
    fs::rename(dir.join("gone"), &base).unwrap();
    assert!(io(dir, "top.qcow2", "qcow2", "write -P 3 128k 64k"), "the refused chain left locks behind");

    let (other, at) = (mid.clone(), top.clone());
    run(async move |io| {
        let _writer = open(&io, &other, &writable()).await.unwrap();
        let e = open(&io, &at, &writable()).await.unwrap_err();
        assert!(matches!(e.what, OpenErrorKind::InUse(_)), "{e}");
        assert_eq!(e.path, other);
    });
    assert!(io(dir, "top.qcow2", "qcow2", "write -P 3 128k 64k"));
}

#[test]
fn loops_and_endless_chains_are_found() {
    let tmp = chain();
    let dir = tmp.path();
    img(dir, &["rebase", "-q", "-u", "-b", "../top.qcow2", "-F", "qcow2", "below/mid.qcow2"]);
    let e = refused(dir.join("top.qcow2"), writable());
    assert_eq!((e.what, e.path), (OpenErrorKind::BackingLoop, dir.join("top.qcow2")));
    img(dir, &["rebase", "-q", "-u", "-b", "./top.qcow2", "-F", "qcow2", "top.qcow2"]);
    assert_eq!(refused(dir.join("top.qcow2"), writable()).what, OpenErrorKind::BackingLoop);

    let at = dir.to_owned();
    let e = run(async move |io| {
        let mut options = CreateOptions::new(1 << 20);
        for i in 0..65 {
            let file = at.join(format!("{i}.qcow2"));
            let new = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&file).unwrap();
            tcmu_dif::image::qcow2::create(&io, new.into(), None, &file, &options).await.unwrap();
            options.backing_file = Some(format!("{i}.qcow2"));
            options.backing_format = Some("qcow2".to_owned());
        }
        let image = open(&io, &at.join("63.qcow2"), &writable()).await.unwrap();
        let got = Buffer::zeroed(4096);
        image.read(ByteOffset(0), &got.sg()).await.unwrap();
        assert!(got.sg().is_zero());
        drop(image);
        open(&io, &at.join("64.qcow2"), &writable()).await.unwrap_err()
    });
    assert_eq!((e.what, e.path), (OpenErrorKind::ChainTooLong, dir.join("64.qcow2")));
}

#[test]
fn backing_names_and_formats_that_are_not_ours_are_refused_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fs::write(dir.join("base"), vec![0; 1 << 20]).unwrap();
    let json = r#"json:{"driver":"file","filename":"base"}"#;
    let create = |name: &str, format: &str| {
        let _ = fs::remove_file(dir.join("t.qcow2"));
        img(dir, &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format, "t.qcow2", "1M"]);
    };
    for name in ["nbd://localhost/x", "nbd:unix:/run/x", json, "https://example.com/base"] {
        create(name, "raw");
        let e = refused(dir.join("t.qcow2"), writable());
        assert_eq!(e.what, OpenErrorKind::BackingProtocol(name.to_owned()));
        assert!(e.next_step().is_some());
    }
    create("base", "vmdk");
    assert_eq!(
        refused(dir.join("t.qcow2"), writable()).what,
        OpenErrorKind::BackingFormat("vmdk".to_owned())
    );
    create("file:base", "raw");
    let at = dir.join("t.qcow2");
    run(async move |io| drop(open(&io, &at, &writable()).await.unwrap()));
}

#[test]
fn a_raw_backing_file_stays_raw_whatever_its_first_bytes_are() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    // Shorter than the overlay, and no multiple of a sector.
    let mut bytes = vec![7; 100_001];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    fs::write(dir.join("guest.raw"), &bytes).unwrap();
    img(dir, &["create", "-q", "-f", "qcow2", "-b", "guest.raw", "-F", "raw", "t.qcow2", "1M"]);
    let at = dir.join("t.qcow2");
    run(async move |io| {
        let image = open(&io, &at, &writable()).await.unwrap();
        let got = Buffer::zeroed(1 << 20);
        image.read(ByteOffset(0), &got.sg()).await.unwrap();
        bytes.resize(1 << 20, 0);
        assert!(got.to_vec() == bytes);
    });
}

#[test]
fn damaged_and_foreign_headers_are_refused_with_the_next_step() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    img(dir, &["create", "-q", "-f", "qcow2", "ext.qcow2", "1M"]);
    let mut unknown = fs::read(dir.join("ext.qcow2")).unwrap();
    unknown[72] = 0x80;
    fs::write(dir.join("ext.qcow2"), unknown).unwrap();
    let e = refused(dir.join("ext.qcow2"), writable());
    assert_eq!(e.what, OpenErrorKind::Unsupported);
    assert!(e.next_step().unwrap().contains("qemu-img convert"));

    img(dir, &["create", "-q", "-f", "qcow2", "ok.qcow2", "1M"]);
    let good = fs::read(dir.join("ok.qcow2")).unwrap();
    for (at, byte) in [(23, 30), (23, 3), (31, 1), (47, 1), (55, 3), (99, 9)] {
        let mut bad = good.clone();
        bad[at] = byte;
        fs::write(dir.join("bad.qcow2"), &bad).unwrap();
        let e = refused(dir.join("bad.qcow2"), writable());
        // Cutting the virtual size to an odd number is a size that no disk has, and not damage.
        let size = matches!(e.what, OpenErrorKind::SizeNotMultiple { .. });
        assert!(matches!(e.what, OpenErrorKind::Corrupt | OpenErrorKind::Unsupported) || size, "{at}: {e}");
        assert!(e.next_step().is_some(), "{at}: {e}");
    }
    for len in [4, 8, 60, 100] {
        fs::write(dir.join("bad.qcow2"), &good[..len]).unwrap();
        assert_eq!(refused(dir.join("bad.qcow2"), writable()).what, OpenErrorKind::Corrupt, "{len} bytes");
    }
}

/// Whoever made the image chose the name, and has no business with other files of the host.
#[test]
fn an_external_data_file_is_opened_beside_its_image_and_nowhere_else() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().join("images");
    fs::create_dir(&dir).unwrap();
    let at = |name: &str| format!("data_file={}", tmp.path().join(name).display());
    img(&dir, &["create", "-q", "-f", "qcow2", "-o", &at("images/beside"), "good.qcow2", "1M"]);
    img(&dir, &["create", "-q", "-f", "qcow2", "-o", &at("secret"), "bad.qcow2", "1M"]);
    img(&dir, &["create", "-q", "-f", "qcow2", "-o", "data_file=../secret", "worse.qcow2", "1M"]);
    for name in ["bad.qcow2", "worse.qcow2"] {
        let e = refused(dir.join(name), writable());
        assert!(matches!(e.what, OpenErrorKind::DataFileElsewhere(_)), "{e}");
        assert!(e.next_step().unwrap().contains("ln -s"));
    }
    let good = dir.join("good.qcow2");
    let locked = good.clone();
    run(async move |io| {
        let image = open(&io, &good, &writable()).await.unwrap();
        assert!(image.places()[0].ends_with("beside") && image.files()[0].ends_with("good.qcow2"));
        let before = image.stamp().unwrap();
        let data = Buffer::from_slice(&[7; 4096]);
        image.write(ByteOffset(0), &data.sg(), Default::default()).await.unwrap();
        assert_ne!(image.stamp().unwrap(), before);
        // The data file has QEMU's locks, too.
        let raw = refused(locked.with_file_name("beside"), writable());
        assert!(matches!(raw.what, OpenErrorKind::InUse(_)), "{raw}");
        image.close().await.unwrap();
    });
    fs::remove_file(dir.join("beside")).unwrap();
    assert_eq!(refused(dir.join("good.qcow2"), writable()).what, OpenErrorKind::NotFound);
}

#[test]
fn we_make_images_with_external_data_files() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path().to_owned();
    run(async move |io| {
        let options = CreateOptions {
            data_file: Some("new.data".to_owned()),
            data_file_raw: true,
            ..CreateOptions::new(1 << 20)
        };
        create_qcow2(&io, &dir.join("new.qcow2"), &options).await.unwrap();
        assert_eq!(fs::metadata(dir.join("new.data")).unwrap().len(), 1 << 20);
        img(&dir, &["check", "-q", "new.qcow2"]);
        let info = tool("qemu-img", &dir, &["info", "new.qcow2"]);
        let info = String::from_utf8_lossy(&info.stdout).into_owned();
        assert!(info.contains("data file: new.data") && info.contains("data file raw: true"), "{info}");

        let options = CreateOptions { data_file: Some("/dev/shm/x".to_owned()), ..options };
        let e = create_qcow2(&io, &dir.join("two.qcow2"), &options).await.unwrap_err();
        assert!(matches!(e.what, CreateErrorKind::DataFile(_)) && !dir.join("two.qcow2").exists(), "{e}");
        let options = CreateOptions { data_file: Some("new.data".to_owned()), ..options };
        let e = create_qcow2(&io, &dir.join("two.qcow2"), &options).await.unwrap_err();
        assert!(e.what == CreateErrorKind::Exists && !dir.join("two.qcow2").exists(), "{e}");
    });
}

#[test]
fn a_new_overlay_takes_size_and_format_from_its_backing_file() {
    let tmp = chain();
    let dir = tmp.path().to_owned();
    run(async move |qio| {
        let mut options = CreateOptions::new(0);
        options.backing_file = Some("top.qcow2".to_owned());
        create_qcow2(&qio, &dir.join("new.qcow2"), &options).await.unwrap();
        img(&dir, &["compare", "-q", "new.qcow2", "top.qcow2"]);
        let info = tool("qemu-img", &dir, &["info", "new.qcow2"]);
        assert!(String::from_utf8_lossy(&info.stdout).contains("backing file format: qcow2"));

        let e = create_qcow2(&qio, &dir.join("new.qcow2"), &options).await.unwrap_err();
        assert_eq!(e.what, CreateErrorKind::Exists);
        options.backing_file = Some("nothing".to_owned());
        let e = create_qcow2(&qio, &dir.join("two.qcow2"), &options).await.unwrap_err();
        assert_eq!(e.what, CreateErrorKind::Backing("nothing".to_owned()));
        assert!(e.next_step().is_some() && !dir.join("two.qcow2").exists());
        let mut options = CreateOptions::new(1 << 20);
        options.cluster_size = 1000;
        let e = create_qcow2(&qio, &dir.join("two.qcow2"), &options).await.unwrap_err();
        assert!(matches!(e.what, CreateErrorKind::Option { .. }), "{e}");
        assert!(!dir.join("two.qcow2").exists());
    });
}
