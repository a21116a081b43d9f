//! The promises of a volume over servers as they are found: random work at depth 16 judged by the model, limits, maps, errors.

use std::{
    cell::{Cell, RefCell},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::error::OpenErrorKind,
    sys::{self, mem::Buffer},
    units::ByteOffset,
    volume::{ExtentKind, IoErrorKind, Volume, WriteFlags},
};

use crate::{
    model::{BLOCK, Model, Settled},
    servers::{Server, attach, file, nbdkit, qemu_nbd, try_attach},
    support::{Rng, qemu_img, scale},
    work::{Work, read_disk},
};

const SIZE: u64 = (4 << 20) + 512 * 8 * 13;

/// Random work on an export that reads as zeros, with a second look after the connection was closed.
fn work_on(server: &Server, query: &str, seed: u64, operations: u64) {
    work_with(server, query, seed, operations, 16);
}

fn work_with(server: &Server, query: &str, seed: u64, operations: u64, depth: u64) {
    work_at(server.uri(query), seed, operations, depth);
}

pub fn work_at(uri: PathBuf, seed: u64, operations: u64, depth: u64) {
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let size = image.limits().capacity;
        let model = Model::new(vec![0; size as usize]);
        let work = Work {
            volume: &image,
            model: &model,
            blocks: size / BLOCK,
            longest: 600,
            rng: RefCell::new(Rng::new(seed)),
            left: Cell::new(operations * scale()),
            may_fail: false,
        };
        work.run(depth).await;
        image.close().await.unwrap();
        drop(image);
        let image = attach(&io, &uri).await;
        let bytes = read_disk(&image).await.unwrap();
        model.judge_disk(&bytes, Settled::Ended).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        image.close().await.unwrap();
    });
}

#[test]
fn random_work_on_a_file_behind_nbdkit_over_one_and_over_four_connections() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let server = nbdkit(dir.path(), &["file", disk.to_str().unwrap()]);
    work_on(&server, "", 1, 600);
    std::fs::write(&disk, []).unwrap();
    file(dir.path(), "disk", SIZE);
    work_on(&server, "&connections=4", 2, 600);
}

#[test]
fn random_work_on_a_raw_file_behind_qemu_nbd_over_four_connections() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", SIZE);
    let server = qemu_nbd(dir.path(), &["--format=raw", "--discard=unmap", disk.to_str().unwrap()]);
    work_on(&server, "&connections=4", 3, 600);
}

/// One at a time: a read that meets a change of the same cluster may get what another cluster holds from QEMU's qcow2 driver (7.2, over one connection as
/// over four, with and without discard; from its raw driver it never does).
#[test]
fn random_work_on_a_qcow2_image_behind_qemu_nbd() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.qcow2");
    let name = disk.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", name, &SIZE.to_string()]);
    let server = qemu_nbd(dir.path(), &["--format=qcow2", "--discard=unmap", name]);
    work_with(&server, "&connections=4", 4, 300, 1);
    drop(server);
    crate::support::check_leaks_at_most(&disk);
}

/// What a server may lack, or insist on.
#[test]
fn random_work_on_servers_that_can_do_less() {
    for (seed, args) in [
        (10, &["--no-sr", "memory"][..]),
        (11, &["--filter=nozero", "--filter=noextents", "memory"]),
        (12, &["--filter=fua", "memory", "fuamode=emulate"]),
        (
            13,
            &[
                "--filter=blocksize-policy",
                "memory",
                "blocksize-error-policy=error",
                "blocksize-minimum=4096",
                "blocksize-maximum=64K",
                "blocksize-preferred=4096",
            ],
        ),
        (
            14,
            &[
                "--filter=blocksize-policy",
                "--filter=nozero",
                "memory",
                "blocksize-error-policy=error",
                "blocksize-minimum=1024",
                "blocksize-maximum=4K",
                "blocksize-preferred=4096",
            ],
        ),
        (15, &["--filter=delay", "memory", "rdelay=3ms", "wdelay=5ms"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={SIZE}");
        let mut args = args.to_vec();
        args.push(&size);
        let server = nbdkit(dir.path(), &args);
        work_on(&server, "", seed, 200);
    }
}

#[test]
fn over_tcp_an_export_is_found_by_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", 1 << 20);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child = std::process::Command::new("qemu-nbd")
        .args(["--persistent", "--format=raw", "--bind=127.0.0.1", "--export-name=a disk", "--port"])
        .arg(port.to_string())
        .arg(&disk)
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let outcome = std::panic::catch_unwind(|| {
        sys::run(async move |io| {
            let image = attach(&io, Path::new(&format!("nbd://localhost:{port}/a%20disk"))).await;
            image
                .write(ByteOffset(512), &Buffer::from_slice(&[7; 512]).sg(), WriteFlags::default())
                .await
                .unwrap();
            image.close().await.unwrap();
            drop(image);
            let e = try_attach(&io, Path::new(&format!("nbd://127.0.0.1:{port}/another")), false)
                .await
                .unwrap_err();
            assert!(
                matches!(&e.what, OpenErrorKind::ServerRefuses(why) if why.contains("no export 'another'")),
                "{e}"
            );
        });
    });
    child.kill().unwrap();
    child.wait().unwrap();
    outcome.unwrap();
    assert_eq!(std::fs::read(&disk).unwrap()[512..1024], [7; 512]);
}

/// An nbdkit plugin of one line of shell.
fn plugin(dir: &Path, cases: &str) -> String {
    let script = dir.join("plugin.sh");
    let text = format!(
        "#!/bin/sh\ncase \"$1\" in get_size) echo 1M;; pread) head -c $3 /dev/zero;; pwrite) cat >/dev/null;; {cases} *) exit 2;; esac\n"
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
    script.to_str().unwrap().to_owned()
}

/// The URI, opened and closed; what the opening said.
fn opened(uri: PathBuf, read_only: bool) -> Result<tcmu_dif::volume::Limits, OpenErrorKind> {
    sys::run(async move |io| {
        let image = try_attach(&io, &uri, read_only).await.map_err(|e| e.what)?;
        let limits = image.limits();
        image.close().await.unwrap();
        Ok(limits)
    })
}

#[test]
fn what_a_server_says_of_an_export_is_what_the_volume_is() {
    let dir = tempfile::tempdir().unwrap();
    let server = nbdkit(dir.path(), &["--readonly", "memory", "1M"]);
    assert_eq!(opened(server.uri(""), false), Err(OpenErrorKind::ReadOnly));
    let limits = opened(server.uri(""), true).unwrap();
    assert!(limits.read_only && limits.capacity == 1 << 20 && limits.alignment == 512);
    drop(server);
    let server = nbdkit(dir.path(), &["memory", "1000"]);
    assert!(matches!(opened(server.uri(""), true), Err(OpenErrorKind::SizeNotMultiple { size: 1000, .. })));
    drop(server);
    let gone = opened(
        dir.path().join("x").to_str().map(|s| format!("nbd+unix:///?socket={s}").into()).unwrap(),
        false,
    );
    assert_eq!(gone, Err(OpenErrorKind::Unreachable));
}

#[test]
fn a_server_that_cannot_flush_is_refused_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let script = plugin(dir.path(), "can_write) exit 0;; can_flush) exit 3;;");
    let server = nbdkit(dir.path(), &["sh", &script]);
    let refused = opened(server.uri(""), false);
    assert!(
        matches!(&refused, Err(OpenErrorKind::ServerRefuses(why)) if why.contains("flush")),
        "{refused:?}"
    );
    assert!(opened(server.uri(""), true).is_ok());
}

#[test]
fn the_map_of_an_export_is_that_of_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let disk = file(dir.path(), "disk", 8 << 20);
    let server = nbdkit(dir.path(), &["file", disk.to_str().unwrap()]);
    let uri = server.uri("");
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let mib = |n: u64| ByteOffset(n << 20);
        image
            .write(mib(2), &Buffer::from_slice(&vec![1; 1 << 20]).sg(), WriteFlags::default())
            .await
            .unwrap();
        image.write_zeroes(mib(4), 1 << 20, false).await.unwrap();
        let map = async |image: &tcmu_dif::image::Image| {
            let runs = image.map_extents(ByteOffset(0), 8 << 20).await.unwrap();
            runs.iter().map(|r| (r.kind, r.start.0 >> 20, r.len >> 20)).collect::<Vec<_>>()
        };
        use ExtentKind::*;
        let before = map(&image).await;
        assert_eq!(before[..2], [(Hole, 0, 2), (Data, 2, 1)]);
        image.discard(mib(2), 1 << 20).await.unwrap();
        assert_eq!(map(&image).await[0].0, Hole);
        let back = Buffer::from_slice(&vec![9; 1 << 20]);
        image.read(mib(2), &back.sg()).await.unwrap();
        assert!(back.sg().is_zero());
        let part = image.map_extents(ByteOffset((4 << 20) + 512), 1024).await.unwrap();
        assert_eq!((part[0].start.0, part.iter().map(|r| r.len).sum::<u64>()), ((4 << 20) + 512, 1024));
        image.close().await.unwrap();
    });
}

/// What becomes of one operation on a server with that error filter.
fn failing(args: &[&str], query: &str) -> [Option<IoErrorKind>; 4] {
    let dir = tempfile::tempdir().unwrap();
    let server = nbdkit(dir.path(), args);
    let uri = server.uri(query);
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&[1; 4096]).sg();
        let kind = |r: tcmu_dif::volume::Result<()>| r.err().map(|e| e.kind);
        let read = kind(image.read(ByteOffset(0), &data).await);
        let write = kind(image.write(ByteOffset(0), &data, WriteFlags::default()).await);
        let zero = kind(image.discard(ByteOffset(0), 4096).await);
        let flush = kind(image.flush().await);
        [read, write, zero, flush]
    })
}

#[test]
fn errors_of_a_server_are_told_as_what_they_are() {
    use IoErrorKind::*;
    let failing = |what: &str, error: &str| {
        failing(
            &[
                "--filter=error",
                "memory",
                "1M",
                &format!("error-{what}={error}"),
                &format!("error-{what}-rate=100%"),
            ],
            "",
        )
    };
    assert_eq!(failing("pread", "EIO"), [Some(Medium), None, None, None]);
    assert_eq!(failing("pwrite", "ENOSPC"), [None, Some(NoSpace), None, None]);
    assert_eq!(failing("pwrite", "EPERM"), [None, Some(ReadOnly), None, None]);
    assert_eq!(failing("pwrite", "EINVAL"), [None, Some(Medium), None, None]);
    assert_eq!(failing("zero", "ENOSPC"), [None, None, Some(NoSpace), None]);
}

#[test]
fn a_failed_flush_is_the_end_of_the_volume() {
    let dir = tempfile::tempdir().unwrap();
    // The error filter knows no flush.
    let script = plugin(dir.path(), "can_write|can_flush) exit 0;; flush) echo EIO no luck >&2; exit 1;;");
    let server = nbdkit(dir.path(), &["sh", &script]);
    let uri = server.uri("");
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&[1; 4096]).sg();
        image.write(ByteOffset(0), &data, WriteFlags::default()).await.unwrap();
        assert_eq!(image.flush().await.unwrap_err().kind, IoErrorKind::Medium);
        assert_eq!(image.flush().await.unwrap_err().kind, IoErrorKind::Failed);
        assert_eq!(image.read(ByteOffset(0), &data).await.unwrap_err().kind, IoErrorKind::Failed);
        assert_eq!(image.close().await.unwrap_err().kind, IoErrorKind::Failed);
    });
}
