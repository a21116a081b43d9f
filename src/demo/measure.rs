//! Measures the demo's disks: 4 KiB at random, with protection off and on. Figures to compare with each other, from one run on
//! one machine; the embedded kernel copies each block in and out, as the real one does.

use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant},
};

use super::{Disk, Measured, Result, Steps, disk::cdb16};
use crate::{image::Format, peer::kernel::Data, units::BlockSize};

const BLOCK: usize = 4096;

/// The four loads: whether it writes, and how many commands are under way.
const LOADS: [(bool, usize); 4] = [(false, 1), (false, 32), (true, 1), (true, 32)];
/// Both disks of a format take turns, so that what else the machine does falls on both.
const ROUNDS: u32 = 4;

/// What a disk has done under a load.
#[derive(Default)]
struct Figures {
    seconds: f64,
    latencies: Vec<Duration>,
}

impl Figures {
    fn iops(&self) -> f64 {
        self.latencies.len() as f64 / self.seconds
    }

    fn median(&mut self) -> Duration {
        self.latencies.sort_unstable();
        self.latencies.get(self.latencies.len() / 2).copied().unwrap_or_default()
    }
}

pub(super) fn table(steps: &mut Steps<'_>, dir: &Path, capacity: u64, time: Duration) -> Result<()> {
    steps.title(
        "4 KiB at random, on images that are filled (page cache; both disks of a format take turns)",
    )?;
    steps.line("  image   protection      read, depth 1         read, depth 32        write, depth 1        write, depth 32")?;
    for format in [Format::Raw, Format::Qcow2] {
        let mut disks = Vec::new();
        for protected in [false, true] {
            let image = dir.join(format!("bench-{protected}.{format}"));
            Disk::create(&image, format, capacity, protected)?;
            let mut disk = Disk::start(&image, capacity, BlockSize::B512, protected)?;
            disk.ready()?;
            // Through the LUN, so that every block has its tuple; faults the data area in as well.
            fill(&mut disk, capacity)?;
            disks.push((disk, LOADS.map(|_| Figures::default())));
        }
        for (i, (write, depth)) in LOADS.into_iter().enumerate() {
            for _ in 0..ROUNDS {
                for (disk, figures) in &mut disks {
                    load(disk, capacity, write, depth, time / ROUNDS, &mut figures[i])?;
                }
            }
        }
        let mut base: Option<[f64; LOADS.len()]> = None;
        for (name, (disk, mut figures)) in ["off", "type 1"].into_iter().zip(disks) {
            let iops = figures.each_ref().map(Figures::iops);
            for (i, (write, depth)) in LOADS.into_iter().enumerate() {
                steps.report.measured.push(Measured {
                    format: format.to_string(),
                    pi: if name == "off" { "off" } else { "type1" },
                    operation: if write { "write" } else { "read" },
                    depth,
                    per_second: iops[i],
                    median_us: figures[i].median().as_secs_f64() * 1e6,
                });
            }
            let cells: Vec<String> = (0..LOADS.len())
                .map(|i| {
                    let ratio = base.map(|off| format!("{:>3.0} %", iops[i] / off[i] * 100.0));
                    let median = figures[i].median().as_secs_f64() * 1e6;
                    format!("{:>7.0}/s {median:>5.1} µs {:<5}", iops[i], ratio.unwrap_or_default())
                })
                .collect();
            steps.line(format!("  {:<7} {name:<10} {}", format.to_string(), cells.join(" ")))?;
            base.get_or_insert(iops);
            disk.stop()?;
        }
    }
    steps.line("  (commands a second, median latency, and the share of the figure without protection)")
}

fn fill(disk: &mut Disk, capacity: u64) -> Result<()> {
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 3) as u8).collect();
    for lba in (0..capacity / 512).step_by(data.len() / 512) {
        disk.write(lba, &data)?;
    }
    Ok(())
}

/// Keeps `depth` commands under way for that long.
fn load(
    disk: &mut Disk,
    capacity: u64,
    write: bool,
    depth: usize,
    time: Duration,
    to: &mut Figures,
) -> Result<()> {
    let data = vec![0xc3; BLOCK];
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut sent: HashMap<u16, Instant> = HashMap::new();
    let start = Instant::now();
    loop {
        while sent.len() < depth && start.elapsed() < time {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let lba = random % (capacity / BLOCK as u64) * 8;
            let (opcode, buffer) = if write { (0x8a, Data::Out(&data)) } else { (0x88, Data::In(BLOCK)) };
            let queued = disk.kernel.queue(&cdb16(opcode, lba, BLOCK / 512), buffer);
            let id = queued
                .map_err(|e| super::DemoError::Stack { what: "the ring failed", source: Box::new(e) })?;
            sent.insert(id, Instant::now());
        }
        // The time may run out while nothing is under way: there is nothing to wait for then.
        if sent.is_empty() {
            break;
        }
        disk.kernel
            .ring_doorbell()
            .map_err(|e| super::DemoError::Stack { what: "the ring failed", source: Box::new(e) })?;
        for ended in disk.wait()? {
            if ended.status != 0 {
                return Err(super::DemoError::Unexpected {
                    step: "measuring".into(),
                    expected: "GOOD".into(),
                    found: format!("sense {:x?}", ended.key_asc_ascq()),
                });
            }
            to.latencies.extend(sent.remove(&ended.id).map(|at| at.elapsed()));
        }
    }
    to.seconds += start.elapsed().as_secs_f64();
    Ok(())
}
