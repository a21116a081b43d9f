//! `cargo bench --bench image [-- --seconds N] [--dir DIR] [--rows TEXT] [--json FILE]`: images as a LUN uses them, without a ring: raw and qcow2,
//! allocated, fresh, over a backing file, with protection information; beside `qemu-img bench` (io_uring, buffered) on the same kind of file, and
//! beside the raw file alone, read and written by our io_uring with no image over it, all in one run.
//!
//! The rows take turns, and the best round of each counts, in operations a second of real time. Rows of 4 KiB go through
//! their image with the same stride, which meets each block once, far from the one before; longer ones from its beginning to its end. Ratios count; an
//! absolute figure is a note. `--rows` keeps the rows whose name has the text, or one of several with `|` between them. Files are in the page cache, so what is measured is the way there; `--dir /dev/shm` leaves the file system's share out. The
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
        Format,
        create::create_raw,
        open::{OpenOptions, open},
    },
    pi::{
        Exposure, PiMode, PiType,
        protected::{Protected, Protection, Recheck, sidecar_path},
        store::{ImageFormat, NewSidecar, Stamp},
        tools,
    },
    sys::{self, io::Io, mem::Buffer},
    units::{BlockSize, ByteOffset},
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

/// Who does the work.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    Ours,
    /// Ours, with protection of type 1.
    Protected,
    /// Ours, on the file, without an image.
    File,
    Qemu,
}

#[derive(Clone, Copy)]
struct Row {
    kind: Kind,
    op: Op,
    bytes: u64,
    depth: usize,
    who: Who,
}

impl Row {
    fn name(self) -> String {
        let who = match self.who {
            Who::Ours => "tcmu-dif",
            Who::Protected => "tcmu-dif, type 1",
            Who::File => "the file alone",
            Who::Qemu => "qemu-img bench",
        };
        let op = if self.op == Op::Read { "read" } else { "write" };
        format!("{op} {} KiB QD{} {}: {who}", self.bytes >> 10, self.depth, self.kind.name())
    }

    fn stride(self) -> u64 {
        match (self.kind, self.bytes) {
            (Kind::Fresh, _) => 65536,
            (_, BLOCK) => STRIDE * BLOCK,
            (_, bytes) => bytes,
        }
    }

    fn count(self) -> u64 {
        if self.kind == Kind::Fresh { FRESH_COUNT } else { SIZE / self.bytes }
    }

    /// Rows that do the same on something else.
    fn is_beside(self, other: Row) -> bool {
        (self.op, self.bytes, self.depth) == (other.op, other.bytes, other.depth)
    }

    /// What there is to measure.
    fn all() -> Vec<Row> {
        let mut rows = Vec::new();
        let loads = [(BLOCK, 32), (BLOCK, 1), (64 << 10, 32), (64 << 10, 1), (1 << 20, 32), (1 << 20, 1)];
        for (bytes, depth) in loads {
            for op in [Op::Read, Op::Write] {
                for kind in [Kind::Raw, Kind::Allocated, Kind::Fresh, Kind::Backing] {
                    let who: &[Who] = match kind {
                        Kind::Raw => &[Who::File, Who::Ours, Who::Protected, Who::Qemu],
                        Kind::Allocated => &[Who::Ours, Who::Protected, Who::Qemu],
                        Kind::Fresh if op == Op::Write && bytes == BLOCK => &[Who::Ours, Who::Qemu],
                        Kind::Backing if op == Op::Read => &[Who::Ours, Who::Qemu],
                        _ => &[],
                    };
                    rows.extend(who.iter().map(|who| Row { kind, op, bytes, depth, who: *who }));
                }
            }
        }
        rows
    }
}

struct Files(PathBuf);

impl Files {
    fn of(&self, kind: Kind, who: Who) -> PathBuf {
        self.0.join(match (kind, who) {
            (Kind::Raw, Who::Protected) => "protected.raw",
            (Kind::Raw, _) => "disk.raw",
            (Kind::Allocated, Who::Protected) => "protected.qcow2",
            (Kind::Allocated, _) => "disk.qcow2",
            (Kind::Fresh, _) => "fresh.qcow2",
            (Kind::Backing, _) => "overlay.qcow2",
        })
    }

    /// All are filled in the same way, and come into the page cache by being read: otherwise its folios are as large as the writes were
    /// that brought them, and that is measured.
    fn make(&self) {
        let raws = [Who::Ours, Who::Protected].map(|who| self.of(Kind::Raw, who));
        for path in raws.clone() {
            sys::run(async move |io| create_raw(&io, &path, SIZE).await.unwrap());
        }
        let allocated = [Who::Ours, Who::Protected].map(|who| self.of(Kind::Allocated, who));
        let backing = [self.0.join("base.qcow2")];
        for path in allocated.iter().chain(&backing) {
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
        }
        for path in raws.into_iter().chain(allocated).chain(backing) {
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
        for kind in [Kind::Raw, Kind::Allocated] {
            protect(&self.of(kind, Who::Protected));
        }
        let overlay = self.of(Kind::Backing, Who::Ours);
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
        let path = self.of(row.kind, row.who);
        if row.kind == Kind::Fresh {
            let _ = std::fs::remove_file(&path);
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &FRESH_SIZE.to_string()]);
        }
        path
    }
}

/// Gives an image a sidecar that has a tuple for each of its blocks.
fn protect(path: &Path) {
    let path = path.to_owned();
    sys::run(async move |io: Io| {
        let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
        let new = NewSidecar {
            block_size: BlockSize::B512,
            kind: PiType::Type1,
            mode: PiMode::Bitmap,
            capacity: BlockSize::B512.blocks_in(SIZE),
            format: if image.format() == Format::Raw { ImageFormat::Raw } else { ImageFormat::Qcow2 },
            stamp: Stamp::of(&path).unwrap(),
        };
        tools::create(&io, &path, &sidecar_path(&path, None), new).await.unwrap();
        let protected = Protected::open(&io, image, &protection(&path)).await.unwrap();
        let data = Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
        for at in (0..SIZE).step_by(1 << 20) {
            protected.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
        }
        protected.close().await.unwrap();
    });
}

fn protection(path: &Path) -> Protection {
    Protection {
        image: path.to_owned(),
        sidecar: sidecar_path(path, None),
        kind: PiType::Type1,
        mode: None,
        exposure: Exposure::Target,
        block_size: BlockSize::B512,
        read_only: false,
        found: Stamp::of(path).unwrap(),
        recheck: Recheck::First,
    }
}

/// Does the work once; gives operations a second.
fn round(row: Row, path: &Path) -> f64 {
    let count = row.count();
    if row.who == Who::Qemu {
        let format = if row.kind == Kind::Raw { "raw" } else { "qcow2" };
        let (count, depth, stride) = (count.to_string(), row.depth.to_string(), row.stride().to_string());
        let mut args =
            vec!["bench", "-f", format, "-i", "io_uring", "-t", "writeback", "-c", &count, "-d", &depth];
        let bytes = row.bytes.to_string();
        args.extend(["-s", &bytes, "-S", &stride]);
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
        if row.who == Who::File {
            let file = Rc::new(File::options().read(true).write(true).open(&path).unwrap());
            let (io_of, began) = (io.clone(), Instant::now());
            images::drive(&io, row.depth, count, row.bytes as usize, move |i, buffer| {
                let (io, file, at) = (io_of.clone(), file.clone(), i * row.stride() % SIZE);
                async move {
                    match row.op {
                        Op::Read => io.read_or_zero(&file, at, &buffer).await.unwrap(),
                        Op::Write => io.write(&file, at, &buffer, false).await.unwrap(),
                    }
                }
            });
            return began.elapsed();
        }
        let found = protection(&path);
        let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
        if row.who == Who::Protected {
            drive(&io, Protected::open(&io, image, &found).await.unwrap(), row, count).await
        } else {
            drive(&io, image, row, count).await
        }
    });
    count as f64 / spent.as_secs_f64()
}

/// Keeps `depth` operations in flight, and closes the volume; gives how long the operations took.
async fn drive<V: Volume + 'static>(io: &Io, volume: V, row: Row, count: u64) -> Duration {
    let volume = Rc::new(volume);
    let shared = volume.clone();
    let began = Instant::now();
    images::drive(io, row.depth, count, row.bytes as usize, move |i, buffer| {
        let at = ByteOffset(i * row.stride() % if row.kind == Kind::Fresh { FRESH_SIZE } else { SIZE });
        let volume = shared.clone();
        async move {
            match row.op {
                Op::Read => volume.read(at, &buffer).await.unwrap(),
                Op::Write => volume.write(at, &buffer, WriteFlags::default()).await.unwrap(),
            }
        }
    });
    let spent = began.elapsed();
    volume.close().await.unwrap();
    spent
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

    let mut rows = Row::all();
    if let Some(text) = option("--rows") {
        rows.retain(|row| text.split('|').any(|part| row.name().contains(part)));
    }
    let mut best = vec![0f64; rows.len()];
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let mut rounds = 0;
    while rounds < 2 || Instant::now() < end {
        for (row, best) in rows.iter().zip(&mut best) {
            let path = files.ready(*row);
            *best = round(*row, &path).max(*best);
        }
        rounds += 1;
    }

    let mut table = format!(
        "{:<62}{:>10}{:>9}{:>9}{:>9}{:>12}\n",
        "", "1000/s", "of file", "of raw", "of plain", "of qemu-img"
    );
    let mut kept = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let of = |kind: Kind, who: Who| {
            let other = |r: &Row| r.is_beside(*row) && r.kind == kind && r.who == who;
            rows.iter().position(other).map(|j| best[i] / best[j])
        };
        let (file, raw, qemu) = (of(Kind::Raw, Who::File), of(Kind::Raw, row.who), of(row.kind, Who::Qemu));
        let plain = of(row.kind, Who::Ours).filter(|_| row.who == Who::Protected);
        let show = |ratio: Option<f64>| ratio.map_or(String::new(), |r| format!("{r:.2}"));
        let _ = writeln!(
            table,
            "{:<62}{:>10.1}{:>9}{:>9}{:>9}{:>12}",
            row.name(),
            best[i] / 1e3,
            show(file),
            show(raw),
            show(plain),
            show(qemu)
        );
        kept.push(json!({
            "row": row.name(), "per_second": best[i], "of_file": file, "of_raw": raw, "of_plain": plain, "of_qemu_img": qemu,
        }));
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
