//! What a LUN does at its limits on the real kernel: a full file system under it, limits that are set, and being made and taken down again and again.

use super::super::guest::Guest;
use super::lun::{create_on_loopback, daemon, delete};
use super::qmp::CONNECTION;
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "limits.disk-full",
        promise: "a write without room is 'no space left' at the initiator, reads and other writes go on, and so does it when there is room again",
        limit: 180,
        group: Some("limits"),
        run: disk_full,
    },
    Test {
        name: "limits.iops-and-bytes",
        promise: "fio gets the IOPS and bytes a second that are set, also when they are changed under it, and all of them when they are taken away",
        limit: 240,
        group: Some("limits"),
        run: throttled,
    },
    Test {
        name: "limits.cycles",
        promise: "LUNs made and taken down again and again leave the daemon no descriptor, thread or memory more, and the kernel nothing",
        limit: 3000,
        group: Some("limits"),
        run: cycles,
    },
];

fn disk_full(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    guest.sh("mkdir -p /small && mount -t tmpfs -o size=24M tmpfs /small && dd if=/dev/zero of=/small/ballast bs=1M count=12 status=none")?;
    for (format, pi) in [("raw", "type1"), ("qcow2", "type1"), ("raw", "off")] {
        let pi = if pi == "off" { String::new() } else { format!("--pi {pi}") };
        let options = format!("--image /small/full.{format} --size 32M --format {format} {pi}");
        let device = create_on_loopback(guest, "full", &options)?.device;
        // What is acknowledged is there; what has no room is told as such, and as nothing else.
        let said = guest.sh(&format!(
            "dd if=/dev/urandom of=/tmp/model bs=64k count=512 status=none
             dd if=/tmp/model of={device} bs=64k oflag=direct 2> /tmp/dd.txt && {{ echo it took all; exit 1; }}
             grep -q 'No space left on device' /tmp/dd.txt || {{ cat /tmp/dd.txt; exit 1; }}
             sed -n 's/^\\([0-9]*\\)+0 records out/\\1/p' /tmp/dd.txt"
        ))?;
        let blocks: u32 = said.trim().parse().with_context(|| format!("dd says {said:?}"))?;
        ensure!(blocks > 50, "{blocks} blocks of 64 KiB found room");
        let same = |blocks: u32| {
            format!(
                "cmp <(dd if={device} bs=64k count={blocks} iflag=direct status=none) <(head -c $(({blocks} * 65536)) /tmp/model)"
            )
        };
        guest.sh(&same(blocks))?;
        guest.sh(&format!(
            "dd if=/tmp/model of={device} bs=64k count=16 oflag=direct conv=notrunc status=none"
        ))?;
        // Room comes back, and nothing has to be told to anybody.
        guest.sh(&format!(
            "rm /small/ballast; dd if=/tmp/model of={device} bs=64k count={more} oflag=direct status=none; {}
             dd if=/dev/zero of=/small/ballast bs=1M count=1 status=none",
            same(blocks + 80),
            more = blocks + 80
        ))?;
        delete(guest, "full")?;
        guest.sh("rm /small/full.*; dd if=/dev/zero of=/small/ballast bs=1M count=12 status=none")?;
    }
    guest.sh("umount /small").map(drop)
}

/// What fio gets of a device, in IOPS, after its first second.
fn iops(guest: &mut Guest, device: &str, how: &str) -> Result<f64> {
    let said = guest.json(&format!(
        "fio --name=rate --filename={device} --direct=1 --ioengine=libaio --iodepth=8 --time_based --ramp_time=1 --runtime=5 {how} --output-format=json"
    ))?;
    let job = &said["jobs"][0];
    let rate = |direction: &str| job[direction]["iops"].as_f64().unwrap_or_default();
    Ok(rate("read") + rate("write"))
}

fn throttled(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let device =
        create_on_loopback(guest, "slow", "--image /scratch/slow.raw --size 64M --format raw")?.device;
    let small = "--rw=randrw --bs=4k";
    let free = iops(guest, &device, small)?;
    let mut told = vec![format!("{free:.0} IOPS without limits")];
    ensure!(free > 400.0, "{free} IOPS without limits: too slow to tell anything of them");
    for (limits, how, wanted) in
        [("iops=200", small, 200.0), ("iops=100", small, 100.0), ("bps=2M", "--rw=randread --bs=16k", 128.0)]
    {
        guest.sh(&format!("tcmu-dif throttle slow {limits}"))?;
        let got = iops(guest, &device, how)?;
        told.push(format!("{got:.0} with {limits}"));
        // A burst of a tenth of a second is in the average.
        ensure!(
            (wanted * 0.85..wanted * 1.15).contains(&got),
            "{limits}: {got} IOPS, and {wanted} were to be"
        );
    }
    guest.sh("tcmu-dif throttle slow off")?;
    let again = iops(guest, &device, small)?;
    ensure!(again > 200.0, "{again} IOPS after the limits were taken away, {free} before them");
    told.push(format!("{again:.0} after they were taken away"));
    guest.note(told.join(", "));
    delete(guest, "slow")
}

/// `cycles.py COUNT WARM`: so many times a LUN is added and removed, on one connection; prints descriptors, threads and KiB of memory that the daemon has, after the first WARM and
/// at the end.
const CYCLES: &str = r#"
import os, time
pid = open("/run/tcmu-dif/daemon.pid").read().strip()
def used():
    # A thread that has ended may be on its way out still.
    time.sleep(2)
    # What it has allocated, and not what it has read of its own program so far.
    kib = [line.split()[1] for line in open(f"/proc/{pid}/status") if line.startswith("RssAnon")][0]
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), int(kib)
count, warm = map(int, sys.argv[1:])
# The allocator finds its shape in the first hundreds (3344 KiB after 50, 3480 after 150, 3540 after 250, 3552 after 350). A leak goes on.
for i in range(count):
    added = ask({"execute": "lun-add", "arguments": {"device": f"c{i % 7}", "image": "/scratch/cycle.qcow2", "pi": "type1", "export": ["loopback"]}})
    assert "return" in added, added
    gone = ask({"execute": "lun-del", "arguments": {"device": f"c{i % 7}"}})
    assert "return" in gone, gone
    if i + 1 == warm:
        before = used()
print(*before, *used())
"#;

fn cycles(run: &mut Run<'_>) -> Result<()> {
    let (count, warm) = run.scale.pick((40, 30), (80, 50), (1000, 400));
    let guest = &mut *run.guest;
    daemon(guest)?;
    guest.sh("tcmu-dif image create -f qcow2 /scratch/cycle.qcow2 16M")?;
    guest.sh("tcmu-dif create c0 --image /scratch/cycle.qcow2 --pi type1 > /dev/null && tcmu-dif delete c0 > /dev/null")?;
    std::fs::write(guest.share().join("cycles.py"), [CONNECTION, CYCLES].concat())?;
    let said =
        guest.sh_within(Duration::from_secs(2900), &format!("python3 /host/cycles.py {count} {warm}"))?;
    let numbers: Vec<i64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [fds, threads, kib, fds_after, threads_after, kib_after] = numbers[..] else {
        anyhow::bail!("cycles.py says {said:?}");
    };
    guest.note(format!(
        "after {warm} and after {count} cycles: descriptors {fds}, then {fds_after}; threads {threads}, then {threads_after}; KiB of memory {kib}, then {kib_after}"
    ));
    ensure!(fds_after <= fds && threads_after <= threads, "descriptors or threads are left: {said}");
    // Another page now and then is the allocator's; a leak of anything would be far more.
    ensure!(
        kib_after - kib < 128 + i64::from(count - warm) / 8,
        "{} KiB more after {} cycles",
        kib_after - kib,
        count - warm
    );
    super::lun::assert_nothing_left(guest)
}
