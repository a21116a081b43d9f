//! Storage beneath a LUN that fails for a while, or answers nothing at all: a device-mapper device whose table is exchanged or suspended.

use super::super::guest::Guest;
use super::initiator::{fio, raw, read16, sum_of_range};
use super::lun::{
    assert_image_clean, assert_nothing_left, create, create_on_loopback, daemon_pid, delete, names, show,
    start_daemon, stop_daemon,
};
use super::qmp::qmp;
use super::reference::LOOPBACK;
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "fault.failing-device",
        promise: "while its device fails a LUN says so with the right sense, goes on by itself after it, and does no I/O after a failed flush",
        limit: 240,
        group: Some("device"),
        run: failing_device,
    },
    Test {
        name: "fault.hung-device",
        promise: "a device that answers nothing holds up its LUN alone: not others, list, QMP, task management, nor the daemon's end",
        limit: 420,
        group: Some("device"),
        run: hung_device,
    },
];

const SIZE: u64 = 32 << 20;

/// Makes `/dev/mapper/NAME` of [`SIZE`] bytes over a file. No udev runs here, so dmsetup makes the node by itself.
fn make_device(guest: &mut Guest, name: &str) -> Result<()> {
    guest
        .sh(&format!(
            "modprobe -a dm_mod loop
             truncate -s {SIZE} /scratch/{name}.img
             losetup --find --show /scratch/{name}.img > /tmp/{name}.loop
             DM_DISABLE_UDEV=1 dmsetup create {name} --table \"0 {sectors} linear $(cat /tmp/{name}.loop) 0\"
             test -b /dev/mapper/{name}",
            sectors = SIZE / 512
        ))
        .map(drop)
}

fn remove_device(guest: &mut Guest, name: &str) -> Result<()> {
    guest
        .sh(&format!(
            "DM_DISABLE_UDEV=1 dmsetup remove {name} && losetup --detach $(cat /tmp/{name}.loop) && rm /scratch/{name}.*"
        ))
        .map(drop)
}

/// From now on all I/O on it fails, or none.
fn fail(guest: &mut Guest, name: &str, fails: bool) -> Result<()> {
    let sectors = SIZE / 512;
    let table = match fails {
        true => format!("0 {sectors} error"),
        false => format!("0 {sectors} linear $(cat /tmp/{name}.loop) 0"),
    };
    guest
        .sh(&format!(
            "DM_DISABLE_UDEV=1 dmsetup suspend --noflush {name}; DM_DISABLE_UDEV=1 dmsetup load {name} --table \"{table}\"; DM_DISABLE_UDEV=1 dmsetup resume {name}
             # What the host has read before is not to be had from its memory.
             echo 1 > /proc/sys/vm/drop_caches"
        ))
        .map(drop)
}

/// A loopback export, as its initiator sees it.
struct Disk {
    device: String,
    sg: String,
}

/// A protected LUN of that name on the device of that name, full of random bytes that reached the device; these are in `/scratch/model`. The kernel
/// gives its commands up after `patience` seconds.
fn make_lun(guest: &mut Guest, name: &str, wwn: &str, patience: u32) -> Result<Disk> {
    make_device(guest, name)?;
    let options = format!("--image /dev/mapper/{name} --format raw --pi type1 --sidecar /scratch/{name}.pi");
    // The kernel lets its time limit be set for as long as it is not exported.
    create(guest, name, &options)?;
    let device = guest.sh(&format!(
        "{LOOPBACK}
        lun=$(cd $T/core; echo user_*/{name})
        echo {patience} > $T/core/$lun/attrib/cmd_time_out
        export_loopback $lun {wwn}"
    ))?;
    let sg = guest.sh(&format!("echo /dev/$(ls /sys/block/$(basename {device})/device/scsi_generic)"))?;
    guest.sh(&format!(
        "[ -e /scratch/model ] || dd if=/dev/urandom of=/scratch/model bs=1M count={} status=none
         dd if=/scratch/model of={} bs=1M oflag=direct conv=fsync status=none",
        SIZE >> 20,
        device
    ))?;
    Ok(Disk { device, sg })
}

fn model_sum(guest: &mut Guest) -> Result<String> {
    guest.sh("sha256sum < /scratch/model | cut -d' ' -f1")
}

/// The other LUN answers, and what it gives back is what was written.
fn assert_serves(guest: &mut Guest, device: &str) -> Result<()> {
    let options =
        "--size=4M --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c";
    fio(guest, Duration::from_secs(60), &format!("--filename={device} {options}"))
        .context("the other LUN")?;
    Ok(())
}

/// The answer has all these words.
fn assert_says(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "no {word:?} in the answer:\n{text}");
    }
    Ok(())
}

fn failing_device(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let lun = make_lun(guest, "shaky", "naa.5001405000000021", 90)?;
    let other =
        create_on_loopback(guest, "sound", "--image /scratch/sound.raw --size 32M --format raw --pi type1")?;
    let (device, sg) = (&lun.device, &lun.sg);
    let model = model_sum(guest)?;

    // Reads fail at their LBA, for a SCSI command as for the block layer, and nothing is taken for data.
    let mark = guest.mark()?;
    fail(guest, "shaky", true)?;
    let lba = 40_000;
    let answer = read16(guest, sg, lba, 8, 512)?;
    ensure!(answer.status == Some(3), "a read on a device that fails ends with {answer:?}");
    assert_says(&answer.text, &["Medium Error", "Unrecovered read error", &format!("{lba:#x}")])?;
    let read = guest
        .try_sh(&format!("dd if={device} of=/dev/null iflag=direct bs=4096 skip={} count=1 2>&1", lba / 8))?;
    // ENODATA is what the block layer makes of a medium error.
    ensure!(!read.ok() && read.stdout.contains("No data available"), "{read:?}");
    // A write of a part of a page, whose rest has to be read first.
    let write = raw(guest, sg, &write16(lba + 3, 1, false), "--send=512 --infile=/dev/urandom")?;
    ensure!(write.status == Some(3), "a write on a device that fails ends with {write:?}");
    assert_says(&write.text, &["Medium Error", "Write error"])?;
    assert_serves(guest, &other.device)?;
    ensure!(show(guest, "shaky")?["state"] == "online");

    // The device is well again: so is the LUN, and nobody had to do anything.
    fail(guest, "shaky", false)?;
    // The write that failed has changed nothing that could not be read.
    let there = read16(guest, sg, lba + 3, 1, 512)?;
    ensure!(there.status == Some(0), "after a failed write its block cannot be read: {}", there.text);
    guest.sh(&format!(
        "dd if=/scratch/model of={device} oflag=direct bs=512 skip={0} seek={0} count=1 status=none",
        lba + 3
    ))?;
    ensure!(sum_of_range(guest, device, 0, SIZE)? == model, "the data are others after the failure");
    let log = guest.kernel_log_since(&mark)?;
    ensure!(log.contains("critical medium error"), "the initiator's kernel heard of no medium error:\n{log}");

    // A flush that fails may have lost what was acknowledged before: the LUN does no more I/O, also when the device is well.
    guest.sh(&format!("dd if=/scratch/model of={device} bs=1M count=1 oflag=direct status=none"))?;
    fail(guest, "shaky", true)?;
    let write = raw(guest, sg, &write16(0, 8, true), "--send=4096 --infile=/scratch/model")?;
    ensure!(write.status == Some(3), "a durable write on a device that fails ends with {write:?}");
    assert_says(&write.text, &["Medium Error", "Write error"])?;
    fail(guest, "shaky", false)?;
    let after = read16(guest, sg, lba, 8, 512)?;
    ensure!(after.status != Some(0), "a read after a failed flush ends with {after:?}");
    assert_says(&after.text, &["Hardware Error", "Internal target failure"])?;
    assert_serves(guest, &other.device)?;
    guest.sh("grep -q 'a flush failed: the volume does no more I/O' /scratch/daemon.log")?;

    // Started again, it serves what the device holds; what was never acknowledged as durable is written again.
    stop_daemon(guest, "TERM")?;
    start_daemon(guest, "auto")?;
    wait_for(guest, "shaky", "online")?;
    guest
        .sh(&format!("dd if=/scratch/model of={device} bs=1M count=1 oflag=direct conv=fsync status=none"))?;
    ensure!(sum_of_range(guest, device, 0, SIZE)? == model, "the data are others after the restart");
    for name in ["shaky", "sound"] {
        delete(guest, name)?;
    }
    assert_image_clean(guest, "/scratch/sound.raw", "raw", true)?;
    guest.sh("tcmu-dif pi verify /dev/mapper/shaky --sidecar /scratch/shaky.pi")?;
    remove_device(guest, "shaky")?;
    guest.sh("rm /scratch/sound.*; dmesg --clear")?;
    assert_nothing_left(guest)?;
    stop_daemon(guest, "TERM")
}

/// WRITE(16) of `blocks` blocks at `lba`, with the force unit access bit or without it.
fn write16(lba: u64, blocks: u32, durable: bool) -> [u8; 16] {
    let mut cdb = [0u8; 16];
    cdb[0] = 0x8a;
    cdb[1] = if durable { 0x08 } else { 0 };
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

/// Waits until `list` gives a LUN that state.
pub fn wait_for(guest: &mut Guest, name: &str, state: &str) -> Result<()> {
    guest
        .sh(&format!(
            "for _ in $(seq 300); do grep -q '\"state\": *\"{state}\"' <(tcmu-dif show {name} --json) && exit 0; sleep 0.2; done
             tcmu-dif list; tail -n 20 /scratch/daemon.log; exit 1"
        ))
        .with_context(|| format!("{name} is not {state}"))
        .map(drop)
}

fn hung_device(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let lun = make_lun(guest, "stuck", "naa.5001405000000022", 400)?;
    let reset = make_lun(guest, "reset", "naa.5001405000000023", 20)?;
    let other =
        create_on_loopback(guest, "sound", "--image /scratch/sound.raw --size 32M --format raw --pi type1")?;
    let device = &lun.device;
    let model = model_sum(guest)?;

    // Reads that hang, and a flush that does.
    guest.sh(&format!(
        "echo 300 > /sys/block/$(basename {device})/device/timeout
         echo 1 > /proc/sys/vm/drop_caches
         DM_DISABLE_UDEV=1 dmsetup suspend --noflush stuck
         for n in 1 2 3 4; do
             setsid dd if={device} of=/tmp/read.$n bs=64k skip=$((n * 50)) count=1 iflag=direct status=none > /tmp/said.$n 2>&1 < /dev/null &
         done
         setsid dd if=/scratch/model of={device} bs=64k count=1 oflag=direct conv=fsync status=none > /tmp/said.5 2>&1 < /dev/null &
         sleep 2; [ $(pgrep -cx dd) = 5 ]"
    ))?;
    assert_serves(guest, &other.device)?;
    let mut found = names(guest)?;
    found.sort();
    ensure!(found == ["reset", "sound", "stuck"], "{found:?}");
    for name in ["sound", "stuck"] {
        ensure!(show(guest, name)?["state"] == "online", "{name} is not online");
    }
    let queries = ["query-luns", "query-block", "query-blockstats", "query-pi", "query-jobs"];
    let answers = qmp(guest, &queries.map(|name| json!({ "execute": name })))?;
    ensure!(answers.iter().all(|answer| answer.get("return").is_some()), "{answers:?}");
    ensure!(counter(guest, "stuck", "in-flight")? >= 5, "its commands are not in flight");

    // Task management: what has not begun is given back at once, and the rest when the kernel gives it up.
    guest.sh(&format!(
        "echo none > /sys/block/$(basename {0})/queue/scheduler
         echo 1 > /proc/sys/vm/drop_caches
         DM_DISABLE_UDEV=1 dmsetup suspend --noflush reset
         cd /tmp; setsid fio --name=many --filename={0} --size=32M --rw=randread --bs=4k --direct=1 --ioengine=libaio --iodepth=400 \
             --number_ios=400 > /tmp/many.txt 2>&1 < /dev/null &
         echo $! > /tmp/many.pid",
        reset.device
    ))?;
    let mut under_way = 0;
    for _ in 0..40 {
        under_way = counter(guest, "reset", "in-flight")?;
        if under_way == 400 {
            break;
        }
        guest.sh("sleep 0.2")?;
    }
    guest
        .sh(&format!("timeout 100 sg_reset --no-escalate --device {}", reset.sg))
        .context("task management is not answered")?;
    let aborted = counter(guest, "reset", "aborted")?;
    ensure!(
        under_way == 400 && aborted > 0,
        "of {under_way} commands that hung {aborted} were given back before they had begun"
    );
    guest.sh(
        "DM_DISABLE_UDEV=1 dmsetup resume reset
         for _ in $(seq 300); do [ -e /proc/$(cat /tmp/many.pid) ] || exit 0; sleep 0.2; done; cat /tmp/many.txt; exit 1",
    )?;

    // The daemon ends, and the next serves all but this one; it does as soon as the device answers.
    let pid = daemon_pid(guest)?;
    let seconds = guest.sh_within(Duration::from_secs(100), &format!(
        "a=$(date +%s); kill -TERM {pid}
         for _ in $(seq 900); do
             grep -q '^State:.[^ZX]' /proc/{pid}/status 2>/dev/null && {{ sleep 0.1; continue; }}; echo $(($(date +%s) - a)); exit 0
         done; exit 1"
    )).context("the daemon has not ended")?;
    guest.note(format!("the daemon ended in {seconds} s"));
    start_daemon(guest, "auto")?;
    wait_for(guest, "sound", "online")?;
    assert_serves(guest, &other.device)?;
    guest.sh("[ $(pgrep -cx dd) = 5 ]")?;
    // What is left of the old daemon is in the kernel and holds the ring, and the next says so.
    let held = show(guest, "stuck")?;
    let words = |key: &str| held[key].as_str().unwrap_or_default().to_owned();
    ensure!(
        words("reason").contains("busy") && words("next").contains("goes on when the storage does"),
        "{held}"
    );
    guest.sh("DM_DISABLE_UDEV=1 dmsetup resume stuck
         for _ in $(seq 300); do pgrep -x dd > /dev/null || exit 0; sleep 0.2; done; tail -n 20 /scratch/daemon.log; exit 1")
        .context("the commands are not answered after the device is")?;
    guest.sh(
        "for n in 1 2 3 4 5; do [ ! -s /tmp/said.$n ] || { cat /tmp/said.$n; exit 1; }; done
         for n in 1 2 3 4; do cmp /tmp/read.$n <(dd if=/scratch/model bs=64k skip=$((n * 50)) count=1 status=none); done",
    )
    .context("a command that had to wait met an error")?;
    wait_for(guest, "stuck", "online")?;
    for lun in [&lun, &reset] {
        ensure!(sum_of_range(guest, &lun.device, 0, SIZE)? == model, "the data of {} are others", lun.device);
    }
    for name in ["stuck", "reset"] {
        delete(guest, name)?;
        guest.sh(&format!("tcmu-dif pi verify /dev/mapper/{name} --sidecar /scratch/{name}.pi"))?;
        remove_device(guest, name)?;
    }
    delete(guest, "sound")?;
    assert_image_clean(guest, "/scratch/sound.raw", "raw", true)?;
    guest.sh("rm /scratch/sound.* /scratch/model; dmesg --clear")?;
    assert_nothing_left(guest)?;
    stop_daemon(guest, "TERM")
}

/// A number that `query-luns` has of a LUN.
fn counter(guest: &mut Guest, name: &str, what: &str) -> Result<u64> {
    let answers = qmp(guest, &[json!({ "execute": "query-luns" })])?;
    let luns = answers[0]["return"].as_array().cloned().unwrap_or_default();
    let lun =
        luns.iter().find(|lun| lun["name"] == name).with_context(|| format!("no {name} in {answers:?}"))?;
    lun["counters"][what].as_u64().with_context(|| format!("no {what} in {lun}"))
}
