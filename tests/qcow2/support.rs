//! qemu-img and qemu-io, random numbers, and images opened with what lies beneath them.

use std::{
    fs::{File, OpenOptions},
    path::Path,
    process::{Command, Output},
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::{Backing, Boxed, Qcow2, ReadBacking, probe_header},
    sys::{io::Io, mem::Sg},
    units::ByteOffset,
    volume::{Extent, ExtentKind, IoError, IoOp, Result},
};

/// A small generator with a seed that failures name.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n.max(1)
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// [`scale`] of the longest loops.
pub const FULL: u64 = 8;

/// How much more than the least to do.
pub fn scale() -> u64 {
    match std::env::var("TCMU_DIF_SCALE").as_deref() {
        Ok("quick") => 1,
        Ok("full") => FULL,
        _ => 2,
    }
}

pub fn run(program: &str, args: &[&str]) -> Output {
    match Command::new(program).args(args).output() {
        Ok(output) => output,
        Err(e) => panic!("{program} cannot be run ({e}); these tests need it: apt-get install qemu-utils"),
    }
}

pub fn must(program: &str, args: &[&str]) -> String {
    let out = run(program, args);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?}: {text}");
    text
}

pub fn qemu_img(args: &[&str]) -> String {
    must("qemu-img", args)
}

pub fn qemu_io(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path.to_str().unwrap());
    let text = must("qemu-io", &args);
    assert!(!text.contains("failed") && !text.contains("error"), "qemu-io {commands:?}: {text}");
}

/// What qemu-img check finds: neither errors nor leaks.
pub fn check_clean(path: &Path) {
    let out = run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.code() == Some(0), "qemu-img check {}: {text}", path.display());
}

/// What qemu-img check finds after a crash: no errors; leaks may be.
pub fn check_leaks_at_most(path: &Path) {
    let out = run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(matches!(out.status.code(), Some(0 | 3)), "qemu-img check {}: {text}", path.display());
}

/// The guest's disk as QEMU reads it.
pub fn qemu_reads(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw-of");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// A snapshot's content as QEMU reads it; `which` is an ID or a name. `convert -l` gives it the live disk's size, so
/// that only the part that both have is compared with what QEMU has when it has gone back to it.
pub fn qemu_reads_snapshot(path: &Path, which: &str) -> Vec<u8> {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    qemu_img(&["snapshot", "-a", which, copy.to_str().unwrap()]);
    let gone_back = qemu_reads(&copy);
    std::fs::remove_file(copy).unwrap();
    let listed = qemu_converts_snapshot(path, which);
    let both = listed.len().min(gone_back.len());
    assert!(listed[..both] == gone_back[..both], "QEMU reads {which} in two ways");
    gone_back
}

/// The same from `convert -l`, of the live disk's size.
pub fn qemu_converts_snapshot(path: &Path, which: &str) -> Vec<u8> {
    let raw = path.with_extension("raw-of-snapshot");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["convert", "-f", "qcow2", "-l", which, "-O", "raw", from, to]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

/// A raw file beneath an image.
struct RawBacking {
    io: Io,
    file: Rc<File>,
    len: u64,
}

impl ReadBacking for RawBacking {
    fn len(&self) -> u64 {
        self.len
    }

    fn read<'a>(&'a self, at: u64, to: &'a Sg) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            assert!(at + to.len() as u64 <= self.len, "read beyond the backing file");
            self.io.read_or_zero(&self.file, at, to).await.map_err(|e| IoError::from_io(IoOp::Read, e))
        })
    }

    fn map(&self, at: u64, len: u64) -> Boxed<'_, Result<Vec<Extent>>> {
        let extent =
            Extent { start: ByteOffset(at), len, kind: ExtentKind::Data, host_offset: Some(at), depth: 0 };
        Box::pin(async move { Ok(vec![extent]) })
    }
}

/// The backing file that an image's header names, opened.
pub async fn backing_of(io: &Io, path: &Path) -> Option<Backing> {
    let bytes = std::fs::read(path).unwrap();
    let info = probe_header(&bytes[..bytes.len().min(2 << 20)]).unwrap();
    let name = info.backing_file?;
    let under = path.parent().unwrap().join(name);
    let file = Rc::new(File::open(&under).unwrap());
    Some(match info.backing_format.as_deref() {
        Some("raw") => {
            let len = file.metadata().unwrap().len();
            Rc::new(RawBacking { io: io.clone(), file, len })
        }
        _ => {
            let beneath = Box::pin(backing_of(io, &under)).await;
            Rc::new(Qcow2::open(io, file, None, &under, true, beneath).await.unwrap())
        }
    })
}

/// The image, for writing.
pub async fn open(io: &Io, path: &Path) -> Qcow2 {
    let backing = backing_of(io, path).await;
    let writable = |path: &Path| Rc::new(OpenOptions::new().read(true).write(true).open(path).unwrap());
    let bytes = std::fs::read(path).unwrap();
    let header = probe_header(&bytes[..bytes.len().min(2 << 20)]).unwrap();
    let data = header.data_file.map(|name| writable(&path.parent().unwrap().join(name)).into());
    Qcow2::open(io, writable(path), data, path, false, backing).await.unwrap()
}
