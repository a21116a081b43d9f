//! `cargo bench --bench ring [-- --seconds N] [--rows TEXT] [--json FILE]`: one LUN's thread, from the ring and back, on a disk that keeps nothing
//! (`/dev/null`): 4 KiB reads and writes with 1, 32 and 256 commands under way.
//!
//! The load comes from a second thread over the embedded kernel's memory ([`tcmu_dif::peer::load`]), which copies nothing. CPU is what the
//! scheduler has counted for the LUN's thread, spinning included, and beside it without. Rows take turns, and the best round of each counts. The
//! rows at a fixed rate tell what adaptive polling costs where commands come seldom; the last ones what 256 LUNs cost that nobody uses.
//! `--rows raw|qcow2` are the same on images in `--dir DIR` (`/dev/shm` if none is named), with and without protection: what
//! that costs, and what qcow2 costs, are ratios of those rows. `--count N` does N commands of each row, without polling, and measures nothing: for a
//! profiler.
#![allow(clippy::unwrap_used)] // A bench may panic.

#[path = "common/process.rs"]
mod process;

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use process::{cpu, resident};
use serde_json::json;
use tcmu_dif::{
    image::{
        create::{create_qcow2, create_raw},
        null,
        open::{OpenOptions, open},
        qcow2::CreateOptions,
    },
    lun::{self, LunHandle, LunParams, config::DeviceConfig},
    peer::load::Load,
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, mem::Buffer},
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

const BLOCK: usize = 4096;
const CAPACITY: u64 = 1 << 40;
/// Bytes of the images.
const FILE: u64 = 64 << 20;

/// What a LUN is made on.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Null,
    Raw,
    Qcow2,
}

#[derive(Clone, Copy)]
struct Row {
    kind: Kind,
    pi: bool,
    bytes: usize,
    write: bool,
    depth: u16,
    polling: bool,
    /// Commands a second; as fast as it goes if none.
    rate: Option<u64>,
}

impl Row {
    fn name(self) -> String {
        let op = if self.write { "write" } else { "read" };
        let rate = self.rate.map_or(String::new(), |rate| format!(", {rate}/s"));
        let polling = if self.polling { "" } else { ", no polling" };
        let kind = match self.kind {
            Kind::Null => "",
            Kind::Raw => ", raw",
            Kind::Qcow2 => ", qcow2",
        };
        let pi = if self.pi { ", type1" } else { "" };
        let bytes = if self.bytes > BLOCK { " 1M" } else { "" };
        format!("{op}{bytes} QD{}{kind}{pi}{rate}{polling}", self.depth)
    }

    /// Where its image lies.
    fn image(self, dir: &Path) -> PathBuf {
        let pi = if self.pi { "pi" } else { "plain" };
        match self.kind {
            Kind::Null => null::PATH.into(),
            Kind::Raw => dir.join(format!("{pi}.raw")),
            Kind::Qcow2 => dir.join(format!("{pi}.qcow2")),
        }
    }

    /// Makes the image, if it is not there, with data everywhere, and tuples for them.
    fn make(self, dir: &Path) {
        let path = self.image(dir);
        if path.exists() {
            return;
        }
        let (made, row) = (path.clone(), self);
        sys::run(async move |io| {
            match row.kind {
                Kind::Qcow2 => create_qcow2(&io, &made, &CreateOptions::new(FILE)).await.map(drop).unwrap(),
                _ => create_raw(&io, &made, FILE).await.map(drop).unwrap(),
            }
            let image = open(&io, &made, &OpenOptions::default()).await.unwrap();
            let data = Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
            for at in (0..FILE).step_by(1 << 20) {
                image.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
            }
            image.close().await.unwrap();
            if row.pi {
                let new = NewSidecar {
                    block_size: BlockSize::B512,
                    kind: PiType::Type1,
                    mode: PiMode::Bitmap,
                    capacity: BlockSize::B512.blocks_in(FILE),
                    format: if row.kind == Kind::Qcow2 { ImageFormat::Qcow2 } else { ImageFormat::Raw },
                    stamp: Stamp::of(&made).unwrap(),
                };
                tools::create(&io, &made, &default_path(&made), new).await.unwrap();
            }
        });
        if self.pi {
            for (bytes, depth) in [(BLOCK, 32), (1 << 20, 8)] {
                Bench::new(Row { write: true, bytes, depth, ..self }, dir).lun.stop().unwrap();
            }
        }
    }
}

#[derive(Clone, Default)]
struct Figures {
    per_second: f64,
    /// Microseconds of the LUN's thread a command.
    cpu: f64,
    /// The same without those in which it looked at an empty ring.
    work: f64,
    /// Of the median, the 99th and the 99.9th percentile, in microseconds.
    latency: [f64; 3],
}

struct Bench {
    load: Load,
    lun: LunHandle,
}

fn start(name: &str, load: &Load, polling: bool, image: &Path, pi: bool) -> LunHandle {
    let mut config = DeviceConfig::new(image);
    config.pi = pi.then_some(PiType::Type1);
    let params = LunParams {
        name: name.into(),
        config,
        block_size: BlockSize::B512,
        capacity: if null::is_null(image) { CAPACITY } else { FILE },
        write_cache: true,
        serial: Some(name.into()),
        state_dir: None,
        backend: None,
        polling,
        neighbourhood: Default::default(),
        device: load.device().unwrap(),
    };
    lun::start(params).unwrap()
}

impl Bench {
    fn new(row: Row, dir: &Path) -> Bench {
        let blocks = row.bytes / 512;
        let cdb = |id: u16| {
            let mut cdb = [0; 16];
            cdb[0] = if row.write { 0x8a } else { 0x88 };
            let lba = usize::from(id) * 2 * blocks;
            cdb[2..10].copy_from_slice(&(lba as u64).to_be_bytes());
            cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
            cdb
        };
        let mut load = Load::new(row.depth, row.bytes, cdb).unwrap();
        let lun = start("ring", &load, row.polling, &row.image(dir), row.pi);
        // The unit attention of a power on, whichever command gets it; and each once, so that what is to be read was written.
        for _ in 0..2 {
            load.run(u64::from(row.depth), Duration::from_secs(1), None, false).unwrap();
        }
        Bench { load, lun }
    }

    fn round(&mut self, row: Row, time: Duration) -> Figures {
        let gap = row.rate.map(|rate| Duration::from_secs(1) / rate as u32);
        let polled = || Duration::from_micros(self.lun.stats().unwrap().polled_us);
        let (before, before_polled) = (cpu("lun-ring"), polled());
        let latencies = row.depth == 1;
        let mut run = self.load.run(u64::MAX, time, gap, latencies).unwrap();
        let spent = cpu("lun-ring") - before;
        let work = spent.saturating_sub(polled() - before_polled);
        assert_eq!(run.failed, 0, "{}", row.name());
        run.latencies.sort_unstable();
        let part = |permille: usize| {
            let at = run.latencies.len() * permille / 1000;
            run.latencies.get(at).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
        };
        Figures {
            per_second: run.commands as f64 / run.time.as_secs_f64(),
            cpu: spent.as_secs_f64() * 1e6 / run.commands as f64,
            work: work.as_secs_f64() * 1e6 / run.commands as f64,
            latency: [part(500), part(990), part(999)],
        }
    }
}

fn idle(count: usize, time: Duration) -> (u64, f64) {
    let before = resident();
    let luns: Vec<_> = (0..count)
        .map(|i| {
            let load = Load::new(1, BLOCK, |_| [0; 16]).unwrap();
            let lun = start(&format!("i{i}"), &load, true, Path::new(null::PATH), false);
            (load, lun)
        })
        .collect();
    let memory = (resident() - before) / count as u64;
    let spent = || cpu("lun-i");
    let begun = spent();
    std::thread::sleep(time);
    let share = (spent() - begun).as_secs_f64() / time.as_secs_f64();
    for (_, lun) in luns {
        lun.stop().unwrap();
    }
    (memory, share)
}

fn main() {
    let mut seconds = 1.0;
    let mut json_file: Option<PathBuf> = None;
    let mut wanted: Option<String> = None;
    let mut dir = PathBuf::from("/dev/shm");
    let mut count: Option<u64> = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => seconds = args.next().and_then(|n| n.parse().ok()).expect("--seconds N"),
            "--json" => json_file = Some(args.next().expect("--json FILE").into()),
            "--dir" => dir = args.next().expect("--dir DIR").into(),
            "--rows" => wanted = Some(args.next().expect("--rows TEXT")),
            "--count" => count = Some(args.next().and_then(|n| n.parse().ok()).expect("--count N")),
            "--bench" => {}
            other => panic!("what is {other}? --seconds N, --rows TEXT, --count N, --dir DIR, --json FILE"),
        }
    }
    let mut rows = Vec::new();
    let plain =
        Row { kind: Kind::Null, pi: false, bytes: BLOCK, write: false, depth: 1, polling: true, rate: None };
    for write in [false, true] {
        rows.extend([1, 32, 256].map(|depth| Row { write, depth, ..plain }));
    }
    rows.extend([1, 32].map(|depth| Row { depth, polling: false, ..plain }));
    for polling in [true, false] {
        rows.extend([100, 1000, 10_000].map(|n| Row { polling, rate: Some(n), ..plain }));
    }
    for (bytes, depth) in [(BLOCK, 1), (BLOCK, 32), (1 << 20, 8)] {
        for (write, kind) in [false, true].into_iter().flat_map(|w| [(w, Kind::Raw), (w, Kind::Qcow2)]) {
            rows.extend([false, true].map(|pi| Row { kind, pi, bytes, write, depth, ..plain }));
        }
    }
    let keep = |row: &Row| wanted.as_ref().is_none_or(|w| w.split('|').any(|w| row.name().contains(w)));
    rows.retain(keep);
    // Spins would drown what a command costs.
    rows.iter_mut().filter(|_| count.is_some()).for_each(|row| row.polling = false);
    let dir = tempfile::tempdir_in(dir).expect("a folder for images");
    rows.iter().filter(|row| row.kind != Kind::Null).for_each(|row| row.make(dir.path()));
    if let Some(count) = count {
        for row in &rows {
            let mut bench = Bench::new(*row, dir.path());
            let run = bench.load.run(count, Duration::MAX, None, false).unwrap();
            // All that is idle is sent at once, so that a few more may have been.
            assert!(run.commands >= count && run.failed == 0, "{}: {run:?}", row.name());
            bench.lun.stop().unwrap();
        }
        return;
    }
    let mut best = vec![Figures::default(); rows.len()];
    const ROUNDS: u32 = 5;
    let begun = Instant::now();
    for round in 0..ROUNDS {
        for (row, best) in rows.iter().zip(&mut best) {
            let mut bench = Bench::new(*row, dir.path());
            let found = bench.round(*row, Duration::from_secs_f64(seconds) / ROUNDS);
            bench.lun.stop().unwrap();
            let better = match row.rate {
                None => found.per_second > best.per_second,
                Some(_) => round == 0 || found.cpu < best.cpu,
            };
            if better {
                *best = found;
            }
        }
    }
    let mut text = String::from(
        "commands                            a second   CPU µs each   of it work     p50 µs   p99 µs p99.9 µs\n",
    );
    let mut kept = Vec::new();
    for (row, f) in rows.iter().zip(&best) {
        let _ = write!(text, "{:<34} {:>10.0} {:>13.3} {:>12.3}", row.name(), f.per_second, f.cpu, f.work);
        if f.latency[0].is_finite() {
            let [a, b, c] = f.latency;
            let _ = write!(text, " {a:>10.1} {b:>8.1} {c:>8.1}");
        }
        text.push('\n');
        let latency = f.latency.map(|l| l.is_finite().then_some(l));
        kept.push(json!({ "row": row.name(), "per_second": f.per_second, "cpu_us": f.cpu, "work_us": f.work,
            "p50_us": latency[0], "p99_us": latency[1], "p999_us": latency[2] }));
    }
    if wanted.as_ref().is_none_or(|w| w.contains("idle")) {
        let (memory, share) = idle(256, Duration::from_secs(3));
        let _ = writeln!(
            text,
            "256 idle LUNs: {:.0} KiB of memory each, {:.4} CPUs together",
            memory as f64 / 1024.0,
            share
        );
        kept.push(json!({ "row": "256 idle LUNs", "bytes_each": memory, "cpus": share }));
    }
    println!("{text}({:.0} s)", begun.elapsed().as_secs_f64());
    if let Some(file) = json_file {
        fs::write(file, serde_json::to_vec_pretty(&json!({ "bench": "ring", "rows": kept })).unwrap())
            .unwrap();
    }
}
