//! Every way in which an image cannot be opened ends in the right kind of error, with the path, a next step, and nothing
//! left behind.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
};

use tcmu_dif::{
    image::{
        Format,
        open::{OpenErrorKind, OpenOptions, open},
    },
    sys::{backend_from_env, mem::Buffer, run, run_on},
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

#[path = "common/huge.rs"]
mod huge;

fn refused(path: &Path, options: OpenOptions) -> (OpenErrorKind, String, Option<String>) {
    let at = path.to_owned();
    run(async move |io| match open(&io, &at, &options).await {
        Ok(image) => panic!("{image:?} was opened"),
        Err(e) => (e.what.clone(), e.to_string(), e.next_step()),
    })
}

fn sized(path: PathBuf, size: u64) -> PathBuf {
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Nobody holds a lock on it: a writer of QEMU's gets it.
fn assert_unlocked(path: &Path) {
    let out = Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 512"]).arg(path).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn what_is_no_file_is_named_for_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let at = |n: &str| dir.path().join(n);
    let (what, message, next) = refused(&at("missing.raw"), OpenOptions::default());
    assert_eq!(what, OpenErrorKind::NotFound);
    assert_eq!(message, format!("{}: no such file", at("missing.raw").display()));
    assert!(next.unwrap().contains("tcmu-dif image create"));

    sized(at("file"), 512);
    assert_eq!(refused(&at("file/below"), OpenOptions::default()).0, OpenErrorKind::NotFound);
    symlink(at("nowhere"), at("dangling")).unwrap();
    assert_eq!(refused(&at("dangling"), OpenOptions::default()).0, OpenErrorKind::NotFound);
    symlink(at("circle"), at("circle")).unwrap();
    assert_eq!(refused(&at("circle"), OpenOptions::default()).0, OpenErrorKind::Io);

    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    let _listener = UnixListener::bind(at("socket")).unwrap();
    for (path, what) in [
        (dir.path().to_owned(), "a directory"),
        (at("fifo"), "a FIFO"),
        (at("socket"), "a socket"),
        (PathBuf::from("/dev/zero"), "a character device"),
    ] {
        for read_only in [false, true] {
            let (kind, message, next) = refused(&path, OpenOptions { read_only, ..OpenOptions::default() });
            assert_eq!(kind, OpenErrorKind::NotAnImage(what));
            assert!(message.ends_with(&format!(": is {what}")), "{message}");
            assert!(next.is_some());
        }
    }
}

#[test]
fn a_file_without_the_right_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = sized(dir.path().join("vm.raw"), 4096);
    let as_nobody = |mode: u32, read_only: bool| {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let path = path.clone();
        let thread = std::thread::spawn(move || {
            // Root may open anything, so this thread becomes somebody else (credentials are the thread's).
            if rustix::process::geteuid().is_root() {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            }
            run_on(backend_from_env(), async move |io| {
                let options = OpenOptions { read_only, ..OpenOptions::default() };
                open(&io, &path, &options)
                    .await
                    .map(drop)
                    .map_err(|e| (e.what.clone(), e.next_step().unwrap()))
            })
        });
        thread.join().unwrap()
    };
    let (what, next) = as_nobody(0o444, false).unwrap_err();
    assert_eq!(what, OpenErrorKind::Permission { write: true });
    assert!(next.contains("--read-only"), "{next}");
    as_nobody(0o444, true).unwrap();
    let (what, _) = as_nobody(0o000, true).unwrap_err();
    assert_eq!(what, OpenErrorKind::Permission { write: false });
}

#[test]
fn a_size_that_is_no_disks_is_refused_and_the_lock_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let empty = sized(dir.path().join("empty.raw"), 0);
    let (what, _, next) = refused(&empty, OpenOptions::default());
    assert_eq!(what, OpenErrorKind::Empty);
    assert!(next.unwrap().starts_with("give it a size"));

    let odd = sized(dir.path().join("odd.raw"), 1000);
    let (what, message, next) = refused(&odd, OpenOptions::default());
    assert_eq!(what, OpenErrorKind::SizeNotMultiple { size: 1000, block_size: 512 });
    assert!(message.contains("1000 bytes"), "{message}");
    assert!(next.unwrap().ends_with(" 1024"));
    assert_unlocked(&odd);

    let small = sized(dir.path().join("small.raw"), 4096 + 512);
    run(async move |io| {
        let image = open(&io, &small, &OpenOptions::default()).await.unwrap();
        image.check_block_size(BlockSize::B512).unwrap();
        let e = image.check_block_size(BlockSize::B4096).unwrap_err();
        assert_eq!(e.what, OpenErrorKind::SizeNotMultiple { size: 4608, block_size: 4096 });
    });
}

#[test]
fn an_explicit_format_wins_over_the_first_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest.raw");
    let mut bytes = vec![0xff; 4096];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    fs::write(&path, &bytes).unwrap();
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let at = path.clone();
    run(async move |io| {
        let image = open(&io, &at, &raw).await.unwrap();
        assert_eq!((image.format(), image.limits().capacity), (Format::Raw, 4096));
        image.close().await.unwrap();
    });
    let other = sized(dir.path().join("plain.raw"), 4096);
    let qcow2 = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
    assert_eq!(refused(&other, qcow2).0, OpenErrorKind::NotQcow2);
    assert_unlocked(&other);
}

#[test]
fn a_read_only_image_is_not_written_and_its_stamp_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = sized(dir.path().join("vm.raw"), 4096);
    run(async move |io| {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        let image = open(&io, &path, &options).await.unwrap();
        let (before, sector) = (image.stamp().unwrap(), tcmu_dif::sys::mem::Buffer::zeroed(512).sg());
        use tcmu_dif::volume::IoErrorKind::ReadOnly;
        assert_eq!(
            image.write(ByteOffset(0), &sector, WriteFlags::default()).await.unwrap_err().kind,
            ReadOnly
        );
        assert_eq!(image.discard(ByteOffset(0), 512).await.unwrap_err().kind, ReadOnly);
        assert_eq!(image.write_zeroes(ByteOffset(0), 512, false).await.unwrap_err().kind, ReadOnly);
        assert_eq!(image.resize(8192).await.unwrap_err().kind, ReadOnly);
        image.flush().await.unwrap();
        image.close().await.unwrap();
        assert_eq!(image.stamp().unwrap(), before);
        assert_eq!(before.size, 4096);
    });
}

#[test]
fn an_image_of_64_tib_takes_a_few_mebibytes_however_full_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.qcow2");
    huge::make(&path, huge::SIZE);
    let resident = || {
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
    };
    let before = resident();
    run(async move |io| {
        let options = OpenOptions { read_only: true, cache_size: Some(4 << 20), ..OpenOptions::default() };
        let image = open(&io, &path, &options).await.unwrap();
        assert_eq!(image.limits().capacity, huge::SIZE);
        assert_eq!(
            image.caches().unwrap().l2_cache.bytes,
            0,
            "tables were read before anybody asked for one"
        );
        // One block out of every 4 GiB: no two in the same slice of a table.
        let block = Buffer::zeroed(512).sg();
        for at in (0..huge::SIZE).step_by(4 << 30) {
            image.read(ByteOffset(at), &block).await.unwrap();
        }
        let counts = image.caches().unwrap();
        assert_eq!((counts.l2_cache.hits, counts.l2_cache.misses), (0, huge::SIZE >> 32));
        assert!(counts.l2_cache.bytes <= 4 << 20, "{counts:?}");
        let grown = resident().saturating_sub(before);
        assert!(grown < 24 << 20, "{grown} bytes for L1, the set of tables, and 4 MiB of cache");
        image.close().await.unwrap();
    });
}
