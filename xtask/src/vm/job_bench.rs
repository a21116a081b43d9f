//! `cargo xtask bench jobs`: how long a guest's commands take while a job copies as fast as it can, beside the same without one, in one boot.
//!
//! fio drives a loopback disk with protection; the jobs, one after another without a pause, are those of `guest/job_loop.py`. What counts are the
//! ratios: everything shares two processors, fio and the job's own writing back among it.

use super::guest::{Guest, Init, Lab};
use super::suite::initiator::fio;
use super::suite::lun::{create_on_loopback, start_daemon};
use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// What follows `--` on the command line.
#[derive(Parser)]
#[command(name = "jobs", about = "A guest's latency under a job")]
struct Options {
    /// How long each measurement takes
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How often each is made; the one with most commands counts
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// The LUN's size in MiB
    #[arg(long, default_value_t = 256)]
    mib: u64,
}

/// What goes on beside the guest, and `job_loop.py`'s word for it.
const ROWS: &[(&str, Option<&str>)] = &[
    ("no job", None),
    ("mirror, background", Some("mirror-background")),
    ("mirror, write-blocking", Some("mirror-write-blocking")),
    ("the same, ready", Some("mirror-write-blocking-ready")),
    ("backup", Some("backup")),
    ("stream", Some("stream")),
    ("commit", Some("commit")),
    ("no job, at the end", None),
];

const WORKLOADS: &[(&str, &str)] = &[
    ("4k read QD1", "--rw=randread --iodepth=1"),
    ("4k write QD1", "--rw=randwrite --iodepth=1"),
    ("4k read QD32", "--rw=randread --iodepth=32"),
    ("4k write QD32", "--rw=randwrite --iodepth=32"),
];

/// One measurement.
#[derive(Clone, Copy, Default, Serialize)]
struct Cell {
    iops: f64,
    p50_us: f64,
    p99_us: f64,
    max_us: f64,
}

/// What a row came to.
#[derive(Default, Serialize)]
struct Row {
    cells: BTreeMap<&'static str, Cell>,
    /// MiB a second that the job moved beside the guest, and with no guest at all.
    beside: Option<f64>,
    alone: Option<f64>,
}

/// Runs it and gives back what is to be kept as JSON; the tables go to standard output.
///
/// # Errors
/// An option that is none, a guest that does not come up, a job that fails, a workload that meets an error.
pub fn run(lab: &Lab, more: &[String]) -> Result<Value> {
    let options = Options::try_parse_from(std::iter::once(&"jobs".to_owned()).chain(more))?;
    let cells = (ROWS.len() * (WORKLOADS.len() + 1)) as u64;
    let limit = Duration::from_secs((options.seconds + 15) * u64::from(options.rounds) * cells + 600);
    let mut guest = Guest::boot(lab, Init::Script, "bench-jobs", limit)?;
    let guest = &mut guest;
    std::fs::write(guest.share().join("job_loop.py"), include_str!("guest/job_loop.py"))?;
    guest.sh("echo 0 > /proc/sys/vm/dirty_writeback_centisecs
         echo 80 > /proc/sys/vm/dirty_ratio; echo 80 > /proc/sys/vm/dirty_background_ratio")?;
    start_daemon(guest, "auto")?;
    let making = format!("--image /scratch/r.qcow2 --size {}M --format qcow2 --pi type1", options.mib);
    let device = create_on_loopback(guest, "r", &making)?.device;
    fill(guest, &device, options.mib)?;
    let mut rows: Vec<(&str, Row)> = Vec::new();
    for (name, job) in ROWS {
        if *job == Some("commit") {
            // All that is to be committed.
            guest.sh("tcmu-dif snapshot r /scratch/over.qcow2")?;
            fill(guest, &device, options.mib)?;
        }
        let row = measure_row(guest, &device, *job, &options).with_context(|| (*name).to_owned())?;
        println!("{name}: done");
        rows.push((name, row));
    }
    guest.assert_healthy()?;
    println!("{}", tables(&rows));
    Ok(serde_json::json!({
        "seconds": options.seconds,
        "rounds": options.rounds,
        "accelerator": lab.accel.name(),
        "rows": rows.into_iter().collect::<BTreeMap<_, _>>(),
    }))
}

/// Writes the whole disk, with data that are no zeros.
fn fill(guest: &mut Guest, device: &str, mib: u64) -> Result<()> {
    let how = format!(
        "--filename={device} --size={mib}M --ioengine=libaio --direct=1 --rw=write --bs=1M --iodepth=4"
    );
    fio(guest, Duration::from_secs(240), &how).map(drop)
}

fn measure_row(guest: &mut Guest, device: &str, job: Option<&str>, options: &Options) -> Result<Row> {
    let mut row = Row::default();
    if let Some(job) = job {
        begin(guest, job)?;
        guest.sh(&format!("sleep {}", options.seconds))?;
        row.alone = Some(end(guest)?);
        begin(guest, job)?;
        if job.ends_with("ready") {
            let ready = r#"tcmu-dif job list --json | grep -c '"ready"'"#;
            guest.sh(&format!(
                "for _ in $(seq 120); do {ready} > /dev/null && exit 0; sleep 0.5; done; exit 1"
            ))?;
        }
    }
    for _ in 0..options.rounds {
        for (name, how) in WORKLOADS {
            let cell = measure(guest, device, how, options)?;
            let best = row.cells.entry(name).or_default();
            if cell.iops > best.iops {
                *best = cell;
            }
        }
    }
    if job.is_some() {
        row.beside = Some(end(guest)?);
    }
    Ok(row)
}

/// Begins with the jobs, and waits until there is one.
fn begin(guest: &mut Guest, job: &str) -> Result<()> {
    guest
        .sh(&format!(
            "rm -f /tmp/stop /tmp/begun
             setsid python3 /host/job_loop.py {job} > /tmp/loop.json 2> /tmp/loop.err < /dev/null &
             for _ in $(seq 300); do [ -e /tmp/begun ] && exit 0; sleep 0.1; done; cat /tmp/loop.err; exit 1"
        ))
        .map(drop)
}

/// Ends them; gives the MiB a second that they moved.
fn end(guest: &mut Guest) -> Result<f64> {
    let said = guest.json(
        "touch /tmp/stop
         for _ in $(seq 600); do [ -s /tmp/loop.json ] && break; sleep 0.1; done
         cat /tmp/loop.err >&2; cat /tmp/loop.json",
    )?;
    let number = |key: &str| said[key].as_f64().with_context(|| format!("the loop says {said}"));
    Ok(number("moved")? / number("busy")?.max(0.001) / f64::from(1 << 20))
}

fn measure(guest: &mut Guest, device: &str, how: &str, options: &Options) -> Result<Cell> {
    let (mib, seconds) = (options.mib, options.seconds);
    let report = fio(
        guest,
        Duration::from_secs(seconds + 60),
        &format!(
            "--filename={device} --size={mib}M --ioengine=libaio --direct=1 --bs=4k --time_based --runtime={seconds} {how}"
        ),
    )?;
    let side = &report["jobs"][0][if how.contains("write") { "write" } else { "read" }];
    let number = |value: &Value| value.as_f64().context("fio's report lacks a figure");
    let latency = &side["clat_ns"];
    let percentile = |p: &str| number(&latency["percentile"][p]).map(|ns| ns / 1000.0);
    Ok(Cell {
        iops: number(&side["iops"])?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        max_us: number(&latency["max"])? / 1000.0,
    })
}

fn tables(rows: &[(&str, Row)]) -> String {
    let mut out = String::new();
    let Some((_, base)) = rows.first() else { return out };
    let mut table = |title: &str, cell: &dyn Fn(&Cell, &Cell) -> String| {
        let heads: Vec<_> = WORKLOADS.iter().map(|(name, _)| *name).collect();
        let _ = writeln!(out, "\n| {title} | {} | job, MiB/s | alone |", heads.join(" | "));
        let _ = writeln!(out, "| --- |{}", " ---: |".repeat(heads.len() + 2));
        for (name, row) in rows {
            let cells =
                heads.iter().filter_map(|head| Some(cell(row.cells.get(head)?, base.cells.get(head)?)));
            let rate = |rate: Option<f64>| rate.map_or_else(String::new, |rate| format!("{rate:.0}"));
            let (beside, alone) = (rate(row.beside), rate(row.alone));
            let _ =
                writeln!(out, "| {name} | {} | {beside} | {alone} |", cells.collect::<Vec<_>>().join(" | "));
        }
    };
    table("p50 / p99 / longest, ms; commands a second", &|cell, _| {
        let ms = |us: f64| us / 1000.0;
        format!("{:.2} / {:.2} / {:.1}; {:.0}", ms(cell.p50_us), ms(cell.p99_us), ms(cell.max_us), cell.iops)
    });
    table("times no job: p50 / p99 / longest; commands", &|cell, base| {
        format!(
            "{:.2} / {:.2} / {:.1}; {:.2}",
            cell.p50_us / base.p50_us,
            cell.p99_us / base.p99_us,
            cell.max_us / base.max_us,
            cell.iops / base.iops
        )
    });
    out
}
