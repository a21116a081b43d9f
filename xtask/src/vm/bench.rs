//! `cargo xtask bench vm`: what a user would pick instead, in one boot, on one kernel, with one initiator.
//!
//! Every row is a disk of the same size, made before the first measurement and written once, so that rings, page cache and clusters are there.
//! Then the workloads come one after another, and in each the rows take turns; the best round of each counts. fio drives the disks through
//! loopback, and at the end our initiator drives them through /dev/vhost-scsi. CPU is what the scheduler counts for the daemon's threads;
//! what the kernel's own backstores use is nobody's in particular, so it is not there.
//!
//! Nothing is written back to the guest's disk meanwhile: what is compared is the way to the page cache.

use super::guest::{Guest, Init, Lab};
use super::suite::initiator::fio;
use super::suite::lun::{create_on_loopback, daemon_pid, start_daemon};
use super::suite::reference::{LOOPBACK, START_TCMU_RUNNER};
use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

/// What follows `--` on the command line.
#[derive(Parser)]
#[command(name = "vm", about = "The bench in the VM")]
struct Options {
    /// How long each measurement takes
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How often each is made
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Only rows whose names contain one of these, with | between them
    #[arg(long, default_value = "")]
    rows: String,
}

/// Whose disk it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Handler {
    TcmuDif,
    TcmuRunner,
    /// [`BARE_LOOP`].
    Bare,
    Kernel,
}

struct Row {
    name: &'static str,
    handler: Handler,
    /// For tcmu-dif the options of `create`, for the bare loop its file; otherwise the script that makes the backstore, whose HBA and name is in `$1`.
    make: &'static str,
    /// Also measured at fixed rates.
    paced: bool,
}

/// The row that ours are to be faster than, the one that they are to be several times as fast as, and those that they are compared with.
const FILEIO: &str = "LIO fileio";
const FILEIO_PI: &str = "LIO fileio, type 1";
const BARE: &str = "bare loop, no data";
const BARE_RAW: &str = "bare loop, raw";
const RUNNER: [&str; 2] = ["tcmu-runner raw", "tcmu-runner qcow2"];

const ROWS: &[Row] = &[
    ours("tcmu-dif /dev/null", "--image /dev/null"),
    Row { paced: true, ..ours("tcmu-dif raw", "--image /scratch/ours.raw --format raw") },
    ours("tcmu-dif qcow2", "--image /scratch/ours.qcow2 --format qcow2"),
    ours("tcmu-dif raw, type 1", "--image /scratch/pi.raw --format raw --pi type1"),
    ours("tcmu-dif qcow2, type 1", "--image /scratch/pi.qcow2 --format qcow2 --pi type1"),
    Row {
        name: RUNNER[0],
        handler: Handler::TcmuRunner,
        make: "truncate -s $SIZE /scratch/runner.raw
            echo dev_size=$SIZE,dev_config=qcow//scratch/runner.raw > $T/core/$1/control",
        paced: true,
    },
    Row {
        name: RUNNER[1],
        handler: Handler::TcmuRunner,
        make: "qemu-img create -q -f qcow2 -o preallocation=metadata /scratch/runner.qcow2 $SIZE
            echo dev_size=$SIZE,dev_config=qcow//scratch/runner.qcow2 > $T/core/$1/control",
        paced: false,
    },
    bare(BARE, ""),
    bare(BARE_RAW, "/scratch/bare.raw"),
    Row {
        name: FILEIO,
        handler: Handler::Kernel,
        make: "echo fd_dev_name=/scratch/fileio.raw,fd_dev_size=$SIZE,fd_buffered_io=1 > $T/core/$1/control",
        paced: false,
    },
    Row {
        name: FILEIO_PI,
        handler: Handler::Kernel,
        make:
            "echo fd_dev_name=/scratch/fileio-pi.raw,fd_dev_size=$SIZE,fd_buffered_io=1 > $T/core/$1/control
            PI=1",
        paced: false,
    },
    Row {
        name: "LIO ramdisk",
        handler: Handler::Kernel,
        make: "echo rd_pages=$((SIZE / 4096)) > $T/core/$1/control",
        paced: false,
    },
];

const fn bare(name: &'static str, make: &'static str) -> Row {
    Row { name, handler: Handler::Bare, make, paced: false }
}

const fn ours(name: &'static str, make: &'static str) -> Row {
    Row { name, handler: Handler::TcmuDif, make, paced: false }
}

/// What fio does.
struct Workload {
    name: &'static str,
    fio: &'static str,
    /// With so few commands that only the CPU is of interest, and only in rows that say so.
    paced: bool,
}

const WORKLOADS: &[Workload] = &[
    Workload { name: "4k read QD1", fio: "--rw=randread --bs=4k --iodepth=1", paced: false },
    Workload { name: "4k write QD1", fio: "--rw=randwrite --bs=4k --iodepth=1", paced: false },
    Workload { name: "4k read QD32", fio: "--rw=randread --bs=4k --iodepth=32", paced: false },
    Workload { name: "4k write QD32", fio: "--rw=randwrite --bs=4k --iodepth=32", paced: false },
    Workload { name: "1M read QD8", fio: "--rw=read --bs=1M --iodepth=8", paced: false },
    Workload { name: "1M write QD8", fio: "--rw=write --bs=1M --iodepth=8", paced: false },
    Workload { name: "100/s", fio: "--rw=randread --bs=4k --iodepth=1 --rate_iops=100", paced: true },
    Workload { name: "1000/s", fio: "--rw=randread --bs=4k --iodepth=1 --rate_iops=1000", paced: true },
];

/// One measurement.
#[derive(Clone, Copy, Default, Serialize)]
struct Cell {
    /// Commands a second.
    iops: f64,
    /// What half of the commands took at most, in microseconds.
    p50_us: f64,
    /// What 99 of 100 took at most, in microseconds.
    p99_us: f64,
    /// Seconds of the daemon's CPU for a million commands.
    cpu_s_per_million: Option<f64>,
    /// How much of one processor the daemon took.
    cpu_share: Option<f64>,
}

/// What a row came to.
#[derive(Default, Serialize)]
struct Measured {
    /// By workload.
    cells: BTreeMap<&'static str, Cell>,
    /// 4 KiB reads a second through vhost-scsi, 32 in flight.
    vhost_read_iops: f64,
}

/// A disk that is there.
struct Disk {
    row: &'static Row,
    device: String,
    wwn: String,
    daemon: Option<u32>,
    measured: Measured,
}

/// What each disk has room for; the same for all.
const SIZE: u64 = 128 << 20;

const EXPORT: &str = r#"
export_vhost() {
    local tpg=$T/vhost/$2/tpgt_1
    mkdir -p $tpg
    echo naa.5001405ffffffff1 > $tpg/nexus
    mkdir $tpg/lun/lun_0
    ln -s $T/core/$1 $tpg/lun/lun_0/link
}
"#;

/// What a handler costs that does nothing but what has to be done: how far up it is worth going.
const BARE_LOOP: &str = include_str!("guest/bare_loop.c");

/// Builds the bare loop into the guest's /host.
fn build_bare_loop(guest: &Guest) -> Result<()> {
    let source = guest.share().join("bare_loop.c");
    std::fs::write(&source, BARE_LOOP)?;
    let built = std::process::Command::new("gcc-12")
        .args(["-O2", "-Wall", "-static", "-o"])
        .arg(guest.share().join("bare-loop"))
        .arg(&source)
        .status()
        .context("gcc-12")?;
    ensure!(built.success(), "the bare loop does not build");
    Ok(())
}

/// Runs it and gives back what is to be kept as JSON; the tables go to standard output.
///
/// # Errors
/// An option that is none, a guest that does not come up, a disk that cannot be made, a workload that meets an error.
pub fn run(lab: &Lab, more: &[String]) -> Result<Value> {
    let options = Options::try_parse_from(std::iter::once(&"vm".to_owned()).chain(more))?;
    let rows: Vec<&'static Row> = ROWS
        .iter()
        .filter(|row| options.rows.is_empty() || options.rows.split('|').any(|part| row.name.contains(part)))
        .collect();
    let cells = rows.len() * WORKLOADS.len();
    let limit = Duration::from_secs((options.seconds + 10) * u64::from(options.rounds) * cells as u64 + 600);
    let mut guest = Guest::boot(lab, Init::Script, "bench", limit)?;
    let guest = &mut guest;
    guest.sh("echo 0 > /proc/sys/vm/dirty_writeback_centisecs
         echo 80 > /proc/sys/vm/dirty_ratio; echo 80 > /proc/sys/vm/dirty_background_ratio")?;
    build_bare_loop(guest)?;
    let mut disks = Vec::new();
    let mut ready = |guest: &mut Guest, bare: bool| {
        for (number, row) in rows.iter().enumerate().filter(|(_, row)| (row.handler == Handler::Bare) == bare)
        {
            let disk =
                make(guest, row, number).with_context(|| format!("cannot make the disk {}", row.name))?;
            warm_up(guest, &disk)?;
            disks.push((number, disk));
        }
        anyhow::Ok(())
    };
    // Before the others, of whom one would refuse a device that nobody knows.
    ready(guest, true)?;
    start_daemon(guest, "auto")?;
    guest.sh(START_TCMU_RUNNER)?;
    ready(guest, false)?;
    disks.sort_by_key(|(number, _)| *number);
    let mut disks: Vec<_> = disks.into_iter().map(|(_, disk)| disk).collect();
    for workload in WORKLOADS {
        for _ in 0..options.rounds {
            for disk in disks.iter_mut().filter(|disk| disk.row.paced || !workload.paced) {
                let cell = measure(guest, disk, workload, options.seconds)
                    .with_context(|| format!("{}, {}", disk.row.name, workload.name))?;
                let best = disk.measured.cells.entry(workload.name).or_default();
                let better = match workload.paced {
                    true => best.iops == 0.0 || cell.cpu_share < best.cpu_share,
                    false => cell.iops > best.iops,
                };
                if better {
                    *best = cell;
                }
            }
        }
        println!("{}: done", workload.name);
    }
    for _ in 0..options.rounds {
        for disk in &mut disks {
            let iops = through_vhost(guest, disk, options.seconds)
                .with_context(|| format!("{}, through vhost-scsi", disk.row.name))?;
            disk.measured.vhost_read_iops = disk.measured.vhost_read_iops.max(iops);
        }
    }
    guest.assert_healthy()?;
    println!("{}", tables(&disks));
    let rows: BTreeMap<_, _> = disks.iter().map(|disk| (disk.row.name, &disk.measured)).collect();
    Ok(serde_json::json!({
        "seconds": options.seconds,
        "rounds": options.rounds,
        "accelerator": lab.accel.name(),
        "rows": rows,
    }))
}

/// Makes the disk of a row, with an export through loopback and one through vhost-scsi.
fn make(guest: &mut Guest, row: &'static Row, number: usize) -> Result<Disk> {
    let wwn = format!("naa.50014050000002{number:02}");
    let (device, daemon) = if row.handler == Handler::TcmuDif {
        let exports = format!("--export loopback --export vhost:{wwn}");
        let lun = create_on_loopback(
            guest,
            &format!("bench{number}"),
            &format!("{} --size {SIZE} {exports}", row.make),
        )?;
        (lun.device, Some(daemon_pid(guest)?))
    } else {
        let hba = match (row.handler, row.name.contains("ramdisk")) {
            (Handler::TcmuRunner | Handler::Bare, _) => "user_7",
            (_, true) => "rd_mcp_7",
            (_, false) => "fileio_7",
        };
        let make = match row.handler {
            Handler::Bare => bare_backstore(row.make),
            _ => row.make.to_owned(),
        };
        let device = guest.sh(&format!(
            r#"{LOOPBACK}{EXPORT}
            modprobe -a target_core_mod target_core_file target_core_user tcm_loop vhost_scsi
            SIZE={SIZE} PI=
            serve() {{ :; }}
            set -- {hba}/bench{number}
            mkdir -p $T/core/$1
            {make}
            echo 1 > $T/core/$1/enable
            serve
            if [ "$PI" ]; then echo $PI > $T/core/$1/attrib/pi_prot_type; echo 1 > $T/core/$1/attrib/pi_prot_format; fi
            echo bench{number} > $T/core/$1/wwn/vpd_unit_serial
            export_vhost $1 {wwn}
            export_loopback $1 naa.50014050000001{number:02}"#
        ))?;
        let daemon = match row.handler {
            Handler::TcmuRunner => Some(guest.sh("cat /run/tcmu-runner.pid")?.parse()?),
            Handler::Bare => Some(guest.sh(&format!("cat /run/bare-bench{number}.pid"))?.parse()?),
            _ => None,
        };
        (device, daemon)
    };
    Ok(Disk { row, device, wwn, daemon, measured: Measured::default() })
}

/// The script that makes a backstore which the bare loop serves, as soon as it is there: nobody answers the kernel's question for a handler.
fn bare_backstore(file: &str) -> String {
    format!(
        r#"[ -z "{file}" ] || truncate -s $SIZE {file}
        echo dev_size=$SIZE,dev_config=bare/loop,nl_reply_supported=-1 > $T/core/$1/control
        serve() {{
            local name=${{HERE##*/}} uio
            for uio in /sys/class/uio/*; do
                case $(cat $uio/name) in
                    */$name/*) setsid /host/bare-loop /dev/${{uio##*/}} $((SIZE / 512)) {file} < /dev/null > /dev/null 2>&1 &
                        echo $! > /run/bare-$name.pid; return ;;
                esac
            done
            return 1
        }}
        HERE=$1"#
    )
}

/// Writes the disk once from end to end, and reads it: a ring's data area is mapped at its first use.
fn warm_up(guest: &mut Guest, disk: &Disk) -> Result<()> {
    let device = &disk.device;
    for work in ["--rw=write --bs=1M --iodepth=8", "--rw=read --bs=1M --iodepth=8"] {
        fio(
            guest,
            Duration::from_secs(120),
            &format!("--filename={device} --size={SIZE} --ioengine=libaio --direct=1 {work}"),
        )?;
    }
    Ok(())
}

/// Nanoseconds that the threads of a process have run.
fn cpu_time(guest: &mut Guest, pid: Option<u32>) -> Result<Option<f64>> {
    let Some(pid) = pid else { return Ok(None) };
    let sum = guest
        .sh(&format!("cat /proc/{pid}/task/*/schedstat | awk '{{s += $1}} END {{printf \"%.0f\", s}}'"))?;
    Ok(Some(sum.parse()?))
}

fn measure(guest: &mut Guest, disk: &Disk, workload: &Workload, seconds: u64) -> Result<Cell> {
    let before = cpu_time(guest, disk.daemon)?;
    let report = fio(
        guest,
        Duration::from_secs(seconds + 60),
        &format!(
            "--filename={} --size={SIZE} --ioengine=libaio --direct=1 --time_based --runtime={seconds} {}",
            disk.device, workload.fio
        ),
    )?;
    let after = cpu_time(guest, disk.daemon)?;
    let side = if workload.fio.contains("write") { "write" } else { "read" };
    let side = &report["jobs"][0][side];
    let number = |value: &Value| value.as_f64().context("fio's report lacks a figure");
    let percentile = |p: &str| number(&side["clat_ns"]["percentile"][p]).map(|ns| ns / 1000.0);
    let commands = number(&side["total_ios"])?;
    let cpu = before.zip(after).map(|(before, after)| (after - before) / 1e9);
    Ok(Cell {
        iops: number(&side["iops"])?,
        p50_us: percentile("50.000000")?,
        p99_us: percentile("99.000000")?,
        cpu_s_per_million: cpu.map(|s| s / commands * 1e6),
        cpu_share: cpu.map(|s| s / seconds as f64),
    })
}

/// Reads of 4 KiB a second, 32 in flight, driven by our initiator.
fn through_vhost(guest: &mut Guest, disk: &Disk, seconds: u64) -> Result<f64> {
    // What it thinks of others' answers is of no interest here.
    let report = guest.json(&format!(
        "tcmu-dif peer-vhost {} --writes 200 --measure-ms {} || true",
        disk.wwn,
        seconds * 1000
    ))?;
    report["read_iops"].as_f64().context("the initiator counted no reads")
}

fn tables(disks: &[Disk]) -> String {
    let mut out = String::new();
    let plain: Vec<_> = WORKLOADS.iter().filter(|w| !w.paced).map(|w| w.name).collect();
    let heads = |last: Option<&'static str>| plain.iter().copied().chain(last).collect::<Vec<_>>();
    let cell = |disk: &Disk, name: &str| disk.measured.cells.get(name).copied();
    table(&mut out, "commands a second", &heads(Some("vhost QD32")), disks, |disk, name| match name {
        "vhost QD32" => Some(format!("{:.0}", disk.measured.vhost_read_iops)),
        name => cell(disk, name).map(|c| format!("{:.0}", c.iops)),
    });
    table(&mut out, "p50 / p99, µs", &plain[..2], disks, |disk, name| {
        cell(disk, name).map(|c| format!("{:.0} / {:.0}", c.p50_us, c.p99_us))
    });
    table(&mut out, "daemon's CPU seconds a million commands", &plain, disks, |disk, name| {
        cell(disk, name)?.cpu_s_per_million.map(|s| format!("{s:.1}"))
    });
    let paced: Vec<_> = WORKLOADS.iter().filter(|w| w.paced).map(|w| w.name).collect();
    table(&mut out, "daemon's share of a processor", &paced, disks, |disk, name| {
        cell(disk, name)?.cpu_share.map(|s| format!("{:.1} %", s * 100.0))
    });
    for base in [FILEIO, FILEIO_PI, RUNNER[0], RUNNER[1], BARE, BARE_RAW, "tcmu-dif raw", "tcmu-dif qcow2"] {
        let Some(base) = disks.iter().find(|disk| disk.row.name == base) else { continue };
        let title = format!("times {}", base.row.name);
        table(&mut out, &title, &heads(Some("vhost QD32")), disks, |disk, name| {
            let iops = |disk: &Disk| match name {
                "vhost QD32" => Some(disk.measured.vhost_read_iops),
                name => cell(disk, name).map(|c| c.iops),
            };
            let own = disk.row.handler == Handler::TcmuDif && disk.row.name != base.row.name;
            own.then(|| Some(format!("{:.2}", iops(disk)? / iops(base)?))).flatten()
        });
    }
    out
}

/// A table in Markdown; rows without any figure are left out.
fn table(
    out: &mut String,
    title: &str,
    columns: &[&'static str],
    disks: &[Disk],
    text: impl Fn(&Disk, &str) -> Option<String>,
) {
    let _ =
        writeln!(out, "\n| {title} | {} |\n| --- |{}", columns.join(" | "), " --- |".repeat(columns.len()));
    for disk in disks {
        let cells: Vec<_> = columns.iter().map(|name| text(disk, name)).collect();
        if cells.iter().any(Option::is_some) {
            let cells: Vec<_> =
                cells.into_iter().map(|cell| cell.unwrap_or_else(|| "–".to_owned())).collect();
            let _ = writeln!(out, "| {} | {} |", disk.row.name, cells.join(" | "));
        }
    }
}
