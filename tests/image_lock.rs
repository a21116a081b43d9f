//! QEMU's tools refuse the images that we have open, and we refuse those that they have.
#![allow(clippy::unwrap_used)] // A test that cannot go on has failed.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::open::{OpenErrorKind, OpenOptions, open},
    sys::run,
    volume::Volume,
};

fn read_only() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

fn writable() -> OpenOptions {
    OpenOptions::default()
}

fn qemu(tool: &str, args: &[&str], path: &Path) -> Output {
    Command::new(tool).args(args).arg(path).output().unwrap()
}

fn convert(args: &[&str], path: &Path) -> Output {
    let to = path.with_extension("copy");
    Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw"])
        .args(args)
        .args([path, &to])
        .output()
        .unwrap()
}

fn image(dir: &tempfile::TempDir) -> PathBuf {
    let path = dir.path().join("vm.raw");
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

/// A qemu-io that has the image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(args: &[&str], path: &Path) -> QemuIo {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        // It answers when it has opened the image.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        while !line.contains("MiB") {
            line.clear();
            assert!(out.read_line(&mut line).unwrap() > 0, "qemu-io has gone");
        }
        QemuIo(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let until = Instant::now() + Duration::from_secs(10);
        while self.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "qemu-io does not end with its input");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn qemu_img_refuses_what_we_write_to_until_it_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    run(async move |io| {
        let ours = open(&io, &path, &writable()).await.unwrap();
        // Of qemu-img's readers only `convert` minds a raw image that changes; of a qcow2 image all do.
        let out = convert(&[], &path);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success());
        assert!(stderr.contains("Failed to get shared \"write\" lock"), "{stderr}");
        assert!(!qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path).status.success());
        assert!(convert(&["-U"], &path).status.success(), "-U shares everything");
        ours.close().await.unwrap();
        let out = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path);
        assert!(out.status.success(), "close gives the lock up");
        drop(ours);
        drop(open(&io, &path, &writable()).await.unwrap());
        let out = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path);
        assert!(out.status.success(), "so does dropping");
    });
}

#[test]
fn readers_of_both_live_together_and_keep_writers_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    run(async move |io| {
        let one = open(&io, &path, &read_only()).await.unwrap();
        let two = open(&io, &path, &read_only()).await.unwrap();
        let theirs = QemuIo::open(&["-f", "raw", "-r"], &path);
        assert!(convert(&[], &path).status.success());
        let out = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && stderr.contains("Failed to get \"write\" lock"), "{stderr}");
        let e = open(&io, &path, &writable()).await.unwrap_err();
        assert!(matches!(e.what, OpenErrorKind::InUse(_)), "{e}");
        drop((one, two, theirs));
        open(&io, &path, &writable()).await.unwrap();
    });
}

#[test]
fn we_refuse_what_qemu_writes_to_and_name_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let theirs = QemuIo::open(&["-f", "raw"], &path);
    let pid = theirs.0.id();
    let at = path.clone();
    run(async move |io| {
        let e = open(&io, &at, &writable()).await.unwrap_err();
        let OpenErrorKind::InUse(holders) = &e.what else { panic!("{e}") };
        assert_eq!(holders.iter().map(|h| h.pid).collect::<Vec<_>>(), [pid]);
        assert_eq!(e.to_string(), format!("{}: is in use by qemu-io (pid {pid})", at.display()));
        assert_eq!(e.next_step().unwrap(), format!("stop qemu-io (pid {pid}), which holds it"));
        let look = OpenOptions { lock: false, ..read_only() };
        open(&io, &at, &look).await.unwrap();
    });
    drop(theirs);
    run(async move |io| drop(open(&io, &path, &writable()).await.unwrap()));
}

#[test]
fn we_refuse_what_qemu_nbd_serves() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let socket = dir.path().join("nbd");
    let mut nbd =
        Command::new("qemu-nbd").args(["-f", "raw", "-t", "-k"]).args([&socket, &path]).spawn().unwrap();
    // The socket is there before the image is open; who greets has opened it.
    let until = Instant::now() + Duration::from_secs(20);
    let greeted = || UnixStream::connect(&socket).is_ok_and(|mut s| s.read_exact(&mut [0; 8]).is_ok());
    while !greeted() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    let at = path.clone();
    let refused = run(async move |io| {
        open(&io, &at, &writable()).await.map(drop).map_err(|e| matches!(e.what, OpenErrorKind::InUse(_)))
    });
    nbd.kill().unwrap();
    nbd.wait().unwrap();
    assert_eq!(refused, Err(true));
}
