//! `cargo bench --bench ring [-- --seconds N] [--rows TEXT] [--json FILE]`: one LUN's thread, from the ring and back, on a disk that keeps nothing
//! (`/dev/null`): 4 KiB reads and writes with 1, 32 and 256 commands under way.
//!
//! The load comes from a second thread over the embedded kernel's memory ([`tcmu_dif::peer::load`]), which copies nothing. CPU is what the
//! scheduler has counted for the LUN's thread, spinning included. Rows take turns, and the best round of each counts. The rows at a fixed
//! rate tell what adaptive polling costs where commands come seldom; the last ones what 256 LUNs cost that nobody uses.
#![allow(clippy::unwrap_used)] // A bench may panic.

#[path = "common/process.rs"]
mod process;

use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use process::{cpu, resident};
use serde_json::json;
use tcmu_dif::{
    image::null,
    lun::{self, LunHandle, LunParams, config::DeviceConfig},
    peer::load::Load,
    units::BlockSize,
};

const BLOCK: usize = 4096;
const CAPACITY: u64 = 1 << 40;

#[derive(Clone, Copy)]
struct Row {
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
        format!("{op} QD{}{rate}{polling}", self.depth)
    }
}

#[derive(Clone, Default)]
struct Figures {
    per_second: f64,
    /// Microseconds of the LUN's thread a command.
    cpu: f64,
    /// Of the median, the 99th and the 99.9th percentile, in microseconds.
    latency: [f64; 3],
}

struct Bench {
    load: Load,
    lun: LunHandle,
}

fn start(name: &str, load: &Load, polling: bool) -> LunHandle {
    let params = LunParams {
        name: name.into(),
        config: DeviceConfig::new(null::PATH),
        block_size: BlockSize::B512,
        capacity: CAPACITY,
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
    fn new(row: Row) -> Bench {
        let cdb = |id: u16| {
            let mut cdb = [0; 16];
            cdb[0] = if row.write { 0x8a } else { 0x88 };
            cdb[2..10].copy_from_slice(&(u64::from(id) * 24_683 * 8).to_be_bytes());
            cdb[10..14].copy_from_slice(&8u32.to_be_bytes());
            cdb
        };
        let mut load = Load::new(row.depth, BLOCK, cdb).unwrap();
        let lun = start("ring", &load, row.polling);
        // The unit attention of a power on, whichever command gets it.
        load.run(1, Duration::from_secs(1), None, false).unwrap();
        Bench { load, lun }
    }

    fn round(&mut self, row: Row, time: Duration) -> Figures {
        let gap = row.rate.map(|rate| Duration::from_secs(1) / rate as u32);
        let before = cpu("lun-ring");
        let latencies = row.depth == 1;
        let mut run = self.load.run(u64::MAX, time, gap, latencies).unwrap();
        let spent = cpu("lun-ring") - before;
        assert_eq!(run.failed, 0, "{}", row.name());
        run.latencies.sort_unstable();
        let part = |permille: usize| {
            let at = run.latencies.len() * permille / 1000;
            run.latencies.get(at).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
        };
        Figures {
            per_second: run.commands as f64 / run.time.as_secs_f64(),
            cpu: spent.as_secs_f64() * 1e6 / run.commands as f64,
            latency: [part(500), part(990), part(999)],
        }
    }
}

fn idle(count: usize, time: Duration) -> (u64, f64) {
    let before = resident();
    let luns: Vec<_> = (0..count)
        .map(|i| {
            let load = Load::new(1, BLOCK, |_| [0; 16]).unwrap();
            let lun = start(&format!("i{i}"), &load, true);
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
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => seconds = args.next().and_then(|n| n.parse().ok()).expect("--seconds N"),
            "--json" => json_file = Some(args.next().expect("--json FILE").into()),
            "--rows" => wanted = Some(args.next().expect("--rows TEXT")),
            "--bench" => {}
            other => panic!("what is {other}? --seconds N, --rows TEXT, --json FILE"),
        }
    }
    let mut rows = Vec::new();
    for write in [false, true] {
        rows.extend([1, 32, 256].map(|depth| Row { write, depth, polling: true, rate: None }));
    }
    rows.push(Row { write: false, depth: 1, polling: false, rate: None });
    for polling in [true, false] {
        rows.extend([100, 1000, 10_000].map(|n| Row { write: false, depth: 1, polling, rate: Some(n) }));
    }
    let keep = |row: &Row| wanted.as_ref().is_none_or(|w| w.split('|').any(|w| row.name().contains(w)));
    rows.retain(keep);
    let mut best = vec![Figures::default(); rows.len()];
    const ROUNDS: u32 = 5;
    let begun = Instant::now();
    for round in 0..ROUNDS {
        for (row, best) in rows.iter().zip(&mut best) {
            let mut bench = Bench::new(*row);
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
        "commands                            a second   CPU µs each     p50 µs   p99 µs p99.9 µs\n",
    );
    let mut kept = Vec::new();
    for (row, f) in rows.iter().zip(&best) {
        let _ = write!(text, "{:<34} {:>10.0} {:>13.3}", row.name(), f.per_second, f.cpu);
        if f.latency[0].is_finite() {
            let [a, b, c] = f.latency;
            let _ = write!(text, " {a:>10.1} {b:>8.1} {c:>8.1}");
        }
        text.push('\n');
        let latency = f.latency.map(|l| l.is_finite().then_some(l));
        kept.push(json!({ "row": row.name(), "per_second": f.per_second, "cpu_us": f.cpu,
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
