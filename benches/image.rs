//! `cargo bench --bench image [-- --seconds N] [--dir DIR] [--rows TEXT] [--json FILE]`: images as a LUN uses them, without a ring: raw and qcow2,
//! allocated, fresh, over a backing file; beside `qemu-img bench` (io_uring, buffered) on the same kind of file, all in one run.
//!
//! The rows take turns, and the best round of each counts, in operations a second of real time. Every row goes through
//! its image with the same stride, which meets each 4 KiB block once, far from the one before. Ratios count; an absolute figure
//! is a note. `--rows` keeps the rows whose name has the text, or one of several with `|` between them. Files are in the page cache, so what is measured is the way there; `--dir /dev/shm` leaves the file system's share out. The
//! last line is the opening of an image of 64 TiB with all of its L2 tables.
#![allow(clippy::unwrap_used)] // A bench may panic.

use std::{
    fmt::Write as _,
    fs::File,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use images::qemu_img;
use serde_json::json;
use tcmu_dif::{
    image::{
        Image,
        create::create_raw,
        open::{OpenOptions, open},
    },
    sys::{self, io::Io, mem::Buffer},
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

#[path = "../tests/common/huge.rs"]
mod huge;
#[path = "common/images.rs"]
mod images;

const BLOCK: u64 = 4096;
const SIZE: u64 = 256 << 20;
/// The disk whose clusters are new, and how many a round writes.
const FRESH_SIZE: u64 = 4 << 30;
const FRESH_COUNT: u64 = 16384;
/// Blocks from one to the next: odd, so that all of a power of two are met.
const STRIDE: u64 = 24_683;

#[derive(Clone, Copy, PartialEq)]
enum Op {
    Read,
    Write,
}

/// What is beneath a row.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Raw,
    /// Every cluster has its data.
    Allocated,
    /// Nothing is there at the beginning of a round; one write a cluster.
    Fresh,
    /// Nothing here, everything in the backing file.
    Backing,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::Allocated => "qcow2",
            Kind::Fresh => "qcow2, new clusters",
            Kind::Backing => "qcow2, from its backing file",
        }
    }
}

#[derive(Clone, Copy)]
struct Row {
    kind: Kind,
    op: Op,
    depth: usize,
    qemu: bool,
}

impl Row {
    fn name(self) -> String {
        let who = if self.qemu { "qemu-img bench" } else { "tcmu-dif" };
        let op = if self.op == Op::Read { "read" } else { "write" };
        format!("{op} QD{} {}: {who}", self.depth, self.kind.name())
    }

    fn stride(self) -> u64 {
        if self.kind == Kind::Fresh { 65536 } else { STRIDE * BLOCK }
    }

    fn count(self, most: u64) -> u64 {
        if self.kind == Kind::Fresh { FRESH_COUNT } else { most }
    }
}

struct Files(PathBuf);

impl Files {
    fn of(&self, kind: Kind) -> PathBuf {
        self.0.join(match kind {
            Kind::Raw => "disk.raw",
            Kind::Allocated => "disk.qcow2",
            Kind::Fresh => "fresh.qcow2",
            Kind::Backing => "overlay.qcow2",
        })
    }

    /// All are filled in the same way, and come into the page cache by being read: otherwise its folios are as large as the writes were
    /// that brought them, and that is measured.
    fn make(&self) {
        let raw = self.of(Kind::Raw);
        let path = raw.clone();
        sys::run(async move |io| create_raw(&io, &path, SIZE).await.unwrap());
        let (allocated, backing) = (self.of(Kind::Allocated), self.0.join("base.qcow2"));
        for path in [&allocated, &backing] {
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
        }
        for path in [raw, allocated, backing] {
            let name = path.clone();
            sys::run(async move |io| {
                let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
                let data = Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
                for at in (0..SIZE).step_by(1 << 20) {
                    image.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
                }
                image.close().await.unwrap();
            });
            let mut file = File::open(&name).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            std::io::copy(&mut file, &mut std::io::sink()).unwrap();
        }
        let overlay = self.of(Kind::Backing);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            "base.qcow2",
            overlay.to_str().unwrap(),
        ]);
    }

    /// What a row begins with.
    fn ready(&self, row: Row) -> PathBuf {
        let path = self.of(row.kind);
        if row.kind == Kind::Fresh {
            let _ = std::fs::remove_file(&path);
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &FRESH_SIZE.to_string()]);
        }
        path
    }
}

/// Does the work once; gives operations a second.
fn round(row: Row, path: &Path, count: u64) -> f64 {
    if row.qemu {
        let format = if row.kind == Kind::Raw { "raw" } else { "qcow2" };
        let (count, depth, stride) = (count.to_string(), row.depth.to_string(), row.stride().to_string());
        let mut args =
            vec!["bench", "-f", format, "-i", "io_uring", "-t", "writeback", "-c", &count, "-d", &depth];
        args.extend(["-s", "4096", "-S", &stride]);
        if row.op == Op::Write {
            args.push("-w");
        }
        args.push(path.to_str().unwrap());
        let said = qemu_img(&args);
        let seconds = said.split("completed in ").nth(1).and_then(|rest| rest.split(' ').next());
        let seconds: f64 = seconds.unwrap_or_else(|| panic!("no time in {said}")).parse().unwrap();
        return count.parse::<f64>().unwrap() / seconds;
    }
    let path = path.to_owned();
    let spent = sys::run(async move |io: Io| {
        let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
        let image = Rc::new(image);
        let began = Instant::now();
        drive(&io, &image, row, count);
        let spent = began.elapsed();
        image.close().await.unwrap();
        spent
    });
    count as f64 / spent.as_secs_f64()
}

/// Keeps `depth` operations in flight.
fn drive(io: &Io, image: &Rc<Image>, row: Row, count: u64) {
    let image = image.clone();
    images::drive(io, row.depth, count, BLOCK as usize, move |i, buffer| {
        let at = ByteOffset(i * row.stride() % if row.kind == Kind::Fresh { FRESH_SIZE } else { SIZE });
        let image = image.clone();
        async move {
            match row.op {
                Op::Read => image.read(at, &buffer).await.unwrap(),
                Op::Write => image.write(at, &buffer, WriteFlags::default()).await.unwrap(),
            }
        }
    });
}

/// Milliseconds that opening an image of 64 TiB takes, at best.
fn open_huge(dir: &Path) -> f64 {
    let path = dir.join("huge.qcow2");
    huge::make(&path, huge::SIZE);
    let opened = sys::run(async move |io: Io| {
        let mut best = Duration::MAX;
        for _ in 0..10 {
            let began = Instant::now();
            let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
            best = best.min(began.elapsed());
            assert_eq!(image.limits().capacity, huge::SIZE);
            image.close().await.unwrap();
        }
        best
    });
    opened.as_secs_f64() * 1e3
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let seconds: f64 = option("--seconds").map_or(60.0, |s| s.parse().expect("--seconds takes a number"));
    let dir = match option("--dir") {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    }
    .expect("no folder for the images; give one with --dir");
    let files = Files(dir.path().to_owned());
    files.make();

    let mut rows = Vec::new();
    for (op, depth) in [(Op::Read, 32), (Op::Write, 32), (Op::Read, 1), (Op::Write, 1)] {
        for kind in [Kind::Raw, Kind::Allocated, Kind::Fresh, Kind::Backing] {
            let wanted = match kind {
                Kind::Raw | Kind::Allocated => true,
                Kind::Fresh => op == Op::Write,
                Kind::Backing => op == Op::Read,
            };
            rows.extend([false, true].iter().filter(|_| wanted).map(|qemu| Row {
                kind,
                op,
                depth,
                qemu: *qemu,
            }));
        }
    }
    if let Some(text) = option("--rows") {
        rows.retain(|row| text.split('|').any(|part| row.name().contains(part)));
    }
    let mut best = vec![0f64; rows.len()];
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut rounds = 0;
    while rounds < 2 || Instant::now() < end {
        for (row, best) in rows.iter().zip(&mut best) {
            let path = files.ready(*row);
            *best = round(*row, &path, row.count(SIZE / BLOCK)).max(*best);
        }
        rounds += 1;
    }

    let mut table = format!("{:<56}{:>10}{:>12}{:>12}\n", "4 KiB", "1000/s", "of raw", "of qemu-img");
    let mut kept = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let of = |wanted: &dyn Fn(&Row) -> bool| {
            rows.iter()
                .position(|r| (r.op == row.op && r.depth == row.depth) && wanted(r))
                .map(|j| best[i] / best[j])
        };
        let raw = of(&|r| r.kind == Kind::Raw && r.qemu == row.qemu);
        let qemu = of(&|r| r.kind == row.kind && r.qemu);
        let show = |ratio: Option<f64>| ratio.map_or(String::new(), |r| format!("{r:.2}"));
        let _ =
            writeln!(table, "{:<56}{:>10.1}{:>12}{:>12}", row.name(), best[i] / 1e3, show(raw), show(qemu));
        kept.push(json!({ "row": row.name(), "per_second": best[i], "of_raw": raw, "of_qemu_img": qemu }));
    }
    let huge = open_huge(dir.path());
    println!(
        "{table}\nThe best of {rounds} rounds of each row. An image of 64 TiB with every L2 table opens in {huge:.1} ms."
    );
    kept.push(json!({ "row": "open 64 TiB", "ms": huge }));
    if let Some(file) = option("--json") {
        std::fs::write(&file, serde_json::to_vec_pretty(&kept).unwrap()).expect("the JSON cannot be written");
    }
}
