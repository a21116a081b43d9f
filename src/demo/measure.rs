//! Measures the demo's disks: 4 KiB at random, with protection off and on. Figures to compare with each other, from one run on
//! one machine; the embedded kernel copies each block in and out, as the real one does.

use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant},
};

use super::{Disk, Result, Steps, disk::cdb16};
use crate::{image::Format, peer::kernel::Data, units::BlockSize};

const BLOCK: usize = 4096;

struct Figures {
    iops: f64,
    median: Duration,
}

pub(super) fn table(steps: &mut Steps<'_>, dir: &Path, capacity: u64, time: Duration) -> Result<()> {
    steps.title("4 KiB at random, on images that are filled (page cache; one run, compare within it)")?;
    steps.line("  image   protection      read, depth 1         read, depth 32        write, depth 1        write, depth 32")?;
    for format in [Format::Raw, Format::Qcow2] {
        let mut base: Vec<f64> = Vec::new();
        for protected in [false, true] {
            let image = dir.join(format!("bench-{protected}.{format}"));
            Disk::create(&image, format, capacity, protected)?;
            if !protected {
                super::disk::preallocate(&image, capacity)?;
            }
            let mut disk = Disk::start(&image, capacity, BlockSize::B512, protected)?;
            disk.ready()?;
            // Fills the protected image through the LUN, so that every block has its tuple; faults the data area in.
            fill(&mut disk, capacity)?;
            let mut cells = Vec::new();
            for (i, (write, depth)) in
                [(false, 1), (false, 32), (true, 1), (true, 32)].into_iter().enumerate()
            {
                let f = load(&mut disk, capacity, write, depth, time)?;
                let ratio = match base.get(i) {
                    Some(off) if protected => format!("{:>3.0} %", f.iops / off * 100.0),
                    _ => {
                        base.push(f.iops);
                        "     ".into()
                    }
                };
                cells.push(format!("{:>7.0}/s {:>5.1} µs {ratio}", f.iops, f.median.as_secs_f64() * 1e6));
            }
            let name = if protected { "type 1" } else { "off" };
            steps.line(format!("  {:<7} {name:<10} {}", format.to_string(), cells.join(" ")))?;
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
fn load(disk: &mut Disk, capacity: u64, write: bool, depth: usize, time: Duration) -> Result<Figures> {
    let data = vec![0xc3; BLOCK];
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut sent: HashMap<u16, Instant> = HashMap::new();
    let mut latencies = Vec::new();
    let start = Instant::now();
    while start.elapsed() < time || !sent.is_empty() {
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
            latencies.extend(sent.remove(&ended.id).map(|at| at.elapsed()));
        }
    }
    let elapsed = start.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let median = latencies.get(latencies.len() / 2).copied().unwrap_or_default();
    Ok(Figures { iops: latencies.len() as f64 / elapsed, median })
}
