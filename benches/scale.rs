//! `cargo bench --bench scale [-- --seconds N] [--dir DIR] [--json FILE]`: what many LUNs, huge images and long chains cost.
//!
//! Busy LUNs stand on `/dev/null`, 32 reads of 4 KiB under way on each, all sent by one thread over the embedded kernel's memory
//! ([`tcmu_dif::peer::load`]): so one processor is the sender's, and the LUNs share the others. Ratios are to one LUN alone, in the same run; the counts take
//! turns, and the best round of each counts. Idle LUNs are those that nobody uses. Images are opened as a LUN opens them; chains are read at their
//! bottom, where all of their data are.
#![allow(clippy::unwrap_used)] // A bench may panic.

#[path = "../tests/common/huge.rs"]
mod huge;
#[path = "common/images.rs"]
mod images;
#[path = "common/process.rs"]
mod process;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use images::{drive, qemu_img};
use process::{cpu, resident};
use serde_json::{Value, json};
use tcmu_dif::{
    image::{
        null,
        open::{OpenOptions, open},
    },
    lun::{self, LunHandle, LunParams, config::DeviceConfig},
    peer::load::Load,
    sys,
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

const BLOCK: usize = 4096;
const DEPTH: u16 = 32;
const COUNTS: [usize; 6] = [1, 2, 4, 16, 64, 256];
const CHAINS: [usize; 3] = [1, 8, 64];
/// What a chain has at its bottom.
const CHAIN_SIZE: u64 = 64 << 20;
const ROUNDS: u32 = 3;

struct Lun {
    load: Load,
    lun: LunHandle,
}

fn start(number: usize) -> Lun {
    let cdb = |id: u16| {
        let mut cdb = [0; 16];
        cdb[0] = 0x88;
        cdb[2..10].copy_from_slice(&(u64::from(id) * 24_683 * 8).to_be_bytes());
        cdb[10..14].copy_from_slice(&8u32.to_be_bytes());
        cdb
    };
    let load = Load::new(DEPTH, BLOCK, cdb).unwrap();
    let name = format!("s{number}");
    let params = LunParams {
        name: name.clone(),
        config: DeviceConfig::new(null::PATH),
        block_size: BlockSize::B512,
        capacity: 1 << 40,
        write_cache: true,
        serial: Some(name),
        state_dir: None,
        backend: None,
        polling: true,
        neighbourhood: Default::default(),
        device: load.device().unwrap(),
    };
    Lun { lun: lun::start(params).unwrap(), load }
}

#[derive(Clone, Copy, Default)]
struct Busy {
    per_second: f64,
    /// Microseconds of the LUNs' threads a command.
    cpu: f64,
    /// Bytes that a LUN took before it had anything to do.
    memory: u64,
    /// CPUs that all took together before they had anything to do.
    idle: f64,
}

/// Commands that all of them answer in that time, all sent by this thread.
fn turn_all(luns: &mut [Lun], time: Duration) -> u64 {
    let (begun, mut done) = (Instant::now(), 0);
    loop {
        let more = begun.elapsed() < time;
        let (mut under_way, mut ended) = (0, 0);
        for lun in luns.iter_mut() {
            let step = lun.load.step(more).unwrap();
            assert_eq!(step.failed, 0, "a command failed");
            ended += step.commands;
            under_way += step.under_way;
        }
        done += ended;
        if under_way == 0 && !more {
            return done;
        }
        if ended == 0 {
            std::thread::yield_now();
        }
    }
}

fn busy(count: usize, time: Duration) -> Busy {
    let before = resident();
    let mut luns: Vec<Lun> = (0..count).map(start).collect();
    let memory = resident().saturating_sub(before) / count as u64;
    let spent = cpu("lun-s");
    std::thread::sleep(time);
    let idle = (cpu("lun-s") - spent).as_secs_f64() / time.as_secs_f64();
    // The unit attention of a power on, whichever command gets it, and the data areas' pages.
    for lun in &mut luns {
        lun.load.run(u64::from(DEPTH), Duration::from_secs(10), None, false).unwrap();
    }
    let spent = cpu("lun-s");
    let begun = Instant::now();
    let commands = turn_all(&mut luns, time);
    let (took, spent) = (begun.elapsed(), cpu("lun-s") - spent);
    for lun in luns {
        lun.lun.stop().unwrap();
    }
    Busy {
        per_second: commands as f64 / took.as_secs_f64(),
        cpu: spent.as_secs_f64() * 1e6 / commands as f64,
        memory,
        idle,
    }
}

/// Milliseconds that opening takes, at best, and the memory that an open image has.
fn opening(path: &Path) -> (f64, u64) {
    let path = path.to_owned();
    sys::run(async move |io| {
        let (mut best, mut memory) = (Duration::MAX, 0);
        for _ in 0..10 {
            let (before, began) = (resident(), Instant::now());
            let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
            best = best.min(began.elapsed());
            memory = resident().saturating_sub(before).max(memory);
            image.close().await.unwrap();
        }
        (best.as_secs_f64() * 1e3, memory)
    })
}

/// A chain of so many images, the data all in the last.
fn make_chain(dir: &Path, length: usize) -> PathBuf {
    let name = |depth: usize| dir.join(format!("chain{length}-{depth}.qcow2"));
    let bottom = name(length - 1);
    qemu_img(&["create", "-q", "-f", "qcow2", bottom.to_str().unwrap(), &CHAIN_SIZE.to_string()]);
    let path = bottom.clone();
    sys::run(async move |io| {
        let image = open(&io, &path, &OpenOptions::default()).await.unwrap();
        let data = sys::mem::Buffer::from_slice(&vec![0x5a; 1 << 20]).sg();
        for at in (0..CHAIN_SIZE).step_by(1 << 20) {
            image.write(ByteOffset(at), &data, WriteFlags::default()).await.unwrap();
        }
        image.close().await.unwrap();
    });
    for depth in (0..length - 1).rev() {
        let (top, below) = (name(depth), name(depth + 1));
        let backing = below.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, top.to_str().unwrap()]);
    }
    name(0)
}

/// Reads of 4 KiB a second at a depth of 32.
fn chain_reads(path: &Path, seconds: f64) -> f64 {
    let path = path.to_owned();
    sys::run(async move |io| {
        let image = Rc::new(open(&io, &path, &OpenOptions::default()).await.unwrap());
        let blocks = CHAIN_SIZE / BLOCK as u64;
        let (mut best, end) = (0f64, Instant::now() + Duration::from_secs_f64(seconds));
        while best == 0.0 || Instant::now() < end {
            let (image, began) = (image.clone(), Instant::now());
            drive(&io, DEPTH.into(), blocks, BLOCK, move |i, to| {
                let image = image.clone();
                // Odd, so that every block is met, and far from the one before.
                let at = ByteOffset(i * 24_683 % blocks * BLOCK as u64);
                async move { image.read(at, &to).await.unwrap() }
            });
            best = best.max(blocks as f64 / began.elapsed().as_secs_f64());
        }
        image.close().await.unwrap();
        best
    })
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let seconds: f64 = option("--seconds").map_or(1.0, |s| s.parse().expect("--seconds takes a number"));
    let dir = option("--dir").map_or_else(tempfile::tempdir, tempfile::tempdir_in);
    let dir = dir.expect("no folder for the images; give one with --dir");
    let mut kept: Vec<Value> = Vec::new();

    let mut best = [Busy::default(); COUNTS.len()];
    for round in 0..ROUNDS {
        for (count, best) in COUNTS.iter().zip(&mut best) {
            let found = busy(*count, Duration::from_secs_f64(seconds));
            // Memory that was given back is taken again: only the first round tells what a LUN takes.
            let memory = if round == 0 { found.memory } else { best.memory };
            let idle = if round == 0 { found.idle } else { best.idle.min(found.idle) };
            if found.per_second > best.per_second {
                *best = found;
            }
            (best.memory, best.idle) = (memory, idle);
        }
    }
    let mut text = format!(
        "{:<8}{:>14}{:>12}{:>14}{:>16}{:>16}\n",
        "LUNs", "commands/s", "of one", "CPU µs each", "KiB each, idle", "CPUs, all idle"
    );
    for (count, b) in COUNTS.iter().zip(&best) {
        let of_one = b.per_second / best[0].per_second;
        let _ = writeln!(
            text,
            "{count:<8}{:>14.0}{of_one:>12.2}{:>14.3}{:>16.0}{:>16.4}",
            b.per_second,
            b.cpu,
            b.memory as f64 / 1024.0,
            b.idle
        );
        kept.push(json!({ "row": format!("{count} LUNs"), "per_second": b.per_second, "of_one": of_one,
            "cpu_us": b.cpu, "bytes_each": b.memory, "idle_cpus": b.idle }));
    }
    let _ =
        writeln!(text, "\n{:<28}{:>14}{:>16}", "qcow2 with every L2 table", "opens in ms", "KiB when open");
    for (name, size) in [("1 TiB", 1u64 << 40), ("64 TiB", huge::SIZE)] {
        let path = dir.path().join("huge.qcow2");
        huge::make(&path, size);
        let (ms, memory) = opening(&path);
        std::fs::remove_file(&path).unwrap();
        let _ = writeln!(text, "{name:<28}{ms:>14.1}{:>16.0}", memory as f64 / 1024.0);
        kept.push(json!({ "row": format!("open {name}"), "ms": ms, "bytes": memory }));
    }
    let _ = writeln!(
        text,
        "\n{:<28}{:>14}{:>16}{:>12}{:>16}",
        "chain of qcow2, read QD32", "1000/s", "of one image", "opens in ms", "KiB when open"
    );
    let mut alone = None;
    for length in CHAINS {
        let path = make_chain(dir.path(), length);
        let (ms, memory) = opening(&path);
        let reads = chain_reads(&path, seconds);
        let of_one = reads / *alone.get_or_insert(reads);
        let _ = writeln!(
            text,
            "{length:<28}{:>14.1}{of_one:>16.2}{ms:>12.1}{:>16.0}",
            reads / 1e3,
            memory as f64 / 1024.0
        );
        kept.push(json!({ "row": format!("chain of {length}"), "per_second": reads, "of_one": of_one, "ms": ms, "bytes": memory }));
    }
    println!("{text}");
    if let Some(file) = option("--json") {
        let all = json!({ "bench": "scale", "rows": kept });
        std::fs::write(&file, serde_json::to_vec_pretty(&all).unwrap()).expect("the JSON cannot be written");
    }
}
