//! What protection information is for: a block that comes back wrong is an error, there and nowhere else.

use super::super::guest::Guest;
use super::initiator::{raw, read16, sum_of_range};
use super::lun::{assert_image_clean, assert_nothing_left, create_on_loopback, daemon, delete, start_daemon};
use super::{Run, Test};
use anyhow::{Context, Result, bail, ensure};

pub const TESTS: &[Test] = &[
    Test {
        name: "fault.flipped-bit-raw",
        promise: "a bit that flips in a raw image is 0Bh/10h/01h at its LBA, not before and nowhere else",
        limit: 180,
        group: Some("flipped"),
        run: |run| flipped_bit(run, "raw", 512),
    },
    Test {
        name: "fault.flipped-bit-qcow2",
        promise: "a bit that flips in a qcow2 image is 0Bh/10h/01h at its LBA, not before and nowhere else",
        limit: 180,
        group: Some("flipped"),
        run: |run| flipped_bit(run, "qcow2", 4096),
    },
    Test {
        name: "fault.foreign-change",
        promise: "an image that somebody wrote to is refused at open with the next step named; rebuild mends it",
        limit: 180,
        group: Some("flipped"),
        run: foreign_change,
    },
    Test {
        name: "fault.descriptor-sense",
        promise: "with D_SENSE set, errors come as descriptor sense with the LBA in INFORMATION",
        limit: 120,
        group: Some("flipped"),
        run: descriptor_sense,
    },
    Test {
        name: "fault.scrub",
        promise: "a scrub finds a flipped bit before a guest does, while the guest writes, and goes on after kill -9",
        limit: 240,
        group: Some("flipped"),
        run: scrub,
    },
];

const SIZE: u64 = 16 << 20;
const GUARD_FAILED: &str = "Logical block guard check failed";

/// Where in the image's file the byte at `offset` of the LUN lies.
pub fn offset_in_file(guest: &mut Guest, image: &str, format: &str, offset: u64) -> Result<u64> {
    if format == "raw" {
        return Ok(offset);
    }
    let map = guest.json(&format!("qemu-img map -U --output=json -f {format} {image}"))?;
    for part in map.as_array().into_iter().flatten() {
        let number = |key: &str| part[key].as_u64();
        if let (Some(start), Some(length), Some(host)) = (number("start"), number("length"), number("offset"))
            && (start..start + length).contains(&offset)
        {
            return Ok(host + offset - start);
        }
    }
    bail!("{image} holds nothing at {offset}")
}

/// Flips one bit of a file, behind the back of whoever has it open.
pub fn flip(guest: &mut Guest, file: &str, offset: u64) -> Result<()> {
    guest
        .sh(&format!(
            "python3 -c 'import os
f = os.open(\"{file}\", os.O_RDWR)
b = os.pread(f, 1, {offset})[0]
assert os.pwrite(f, bytes([b ^ 0x10]), {offset}) == 1
os.fsync(f)'"
        ))
        .map(drop)
}

fn flipped_bit(run: &mut Run<'_>, format: &str, block: u64) -> Result<()> {
    let guest = &mut *run.guest;
    let image = format!("/scratch/flip.{format}");
    daemon(guest)?;
    let lun = create_on_loopback(
        guest,
        "flip",
        &format!("--image {image} --size {SIZE} --format {format} --block-size {block} --pi type1"),
    )?;
    let (device, sg) = (&lun.device, &lun.sg);
    guest.sh(&format!(
        "dd if=/dev/urandom of=/scratch/model bs=1M count=16 status=none
         dd if=/scratch/model of={device} oflag=direct bs=1M status=none"
    ))?;
    let lba = 1234;
    let at = lba * block;
    let before = guest.mark()?;
    let model = guest.sh("sha256sum < /scratch/model | cut -d' ' -f1")?;
    ensure!(sum_of_range(guest, device, 0, SIZE)? == model, "the LUN does not give back what was written");
    let log = guest.kernel_log_since(&before)?;
    ensure!(!log.contains("error"), "an error before there was one:\n{log}");

    let in_file = offset_in_file(guest, &image, format, at + 77)?;
    flip(guest, &image, in_file)?;

    // As a SCSI command sees it: alone, and in the middle of a longer one.
    for (from, blocks) in [(lba, 1), (lba - 3, 8)] {
        let answer = read16(guest, sg, from, blocks, block)?;
        ensure!(answer.status != Some(0), "the flipped block reads as good: {}", answer.text);
        for part in ["Aborted Command", GUARD_FAILED, &format!("{lba:#x}")] {
            ensure!(answer.text.contains(part), "no {part:?} in the answer:\n{}", answer.text);
        }
    }
    for neighbour in [lba - 1, lba + 1] {
        let answer = read16(guest, sg, neighbour, 1, block)?;
        ensure!(answer.status == Some(0), "LBA {neighbour} is hurt too: {}", answer.text);
    }
    let verify = guest.try_sh(&format!("sg_verify --16 --lba={lba} --count=1 {sg} 2>&1"))?;
    ensure!(!verify.ok(), "VERIFY finds nothing wrong");

    // As a file system's read sees it: an I/O error at that sector in the kernel's log, and no other.
    let mark = guest.mark()?;
    let direct = guest
        .try_sh(&format!("dd if={device} of=/dev/null iflag=direct bs={block} skip={lba} count=1 2>&1"))?;
    ensure!(!direct.ok(), "the block layer reads the flipped block as good");
    let log = guest.kernel_log_since(&mark)?;
    let sector = at / 512;
    ensure!(
        log.lines().any(|line| line.contains(" error, dev ") && line.contains(&format!("sector {sector} "))),
        "no error for sector {sector} in the kernel's log:\n{log}"
    );
    ensure!(log.contains(GUARD_FAILED), "the kernel's log names no guard:\n{log}");
    let others: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" error, dev ") && !line.contains(&format!("sector {sector} ")))
        .collect();
    ensure!(others.is_empty(), "errors elsewhere: {others:?}");
    let whole = |from: u64, to: u64| {
        format!(
            "dd if=/scratch/model iflag=skip_bytes,count_bytes skip={from} count={} bs=64k status=none | sha256sum | cut -d' ' -f1",
            to - from
        )
    };
    for (from, to) in [(0, at), (at + block, SIZE)] {
        let expected = guest.sh(&whole(from, to))?;
        ensure!(
            sum_of_range(guest, device, from, to - from)? == expected,
            "bytes {from} to {to} are hurt too"
        );
    }

    // Writing the block again makes it good again.
    guest.sh(&format!(
        "dd if=/scratch/model of={device} oflag=direct bs={block} skip={lba} seek={lba} count=1 status=none"
    ))?;
    ensure!(sum_of_range(guest, device, 0, SIZE)? == model);
    delete(guest, "flip")?;
    assert_image_clean(guest, &image, format, true)?;
    guest.sh(&format!("rm -f {image} {image}.pi /scratch/model && dmesg --clear")).map(drop)
}

fn foreign_change(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let image = "/scratch/foreign.raw";
    daemon(guest)?;
    let options = format!("--image {image} --pi type1");
    let lun = create_on_loopback(guest, "foreign", &format!("{options} --size {SIZE} --format raw"))?;
    guest.sh(&format!("dd if=/dev/urandom of={} oflag=direct bs=1M count=16 status=none", lun.device))?;
    delete(guest, "foreign")?;
    assert_image_clean(guest, image, "raw", true)?;

    guest.sh("sleep 1.1")?;
    flip(guest, image, 5000 * 512 + 3)?;
    let before = super::lun::configfs(guest)?;
    let refused = guest.try_sh(&format!("tcmu-dif create foreign {options} --export loopback"))?;
    ensure!(refused.status == Some(1), "an image that somebody wrote to is opened: {refused:?}");
    for part in [image, "next:", "pi verify", "pi rebuild"] {
        ensure!(refused.stderr.contains(part), "no {part:?} in the message:\n{}", refused.stderr);
    }
    ensure!(super::lun::configfs(guest)? == before, "something half-made is left");
    assert_nothing_left(guest)?;

    let verify = guest.try_sh(&format!("tcmu-dif pi verify {image}"))?;
    ensure!(verify.status == Some(1), "verify finds nothing: {verify:?}");
    ensure!(
        (verify.stdout.clone() + &verify.stderr).contains("5000"),
        "verify does not name LBA 5000: {verify:?}"
    );
    guest.sh(&format!("tcmu-dif pi rebuild {image}"))?;
    assert_image_clean(guest, image, "raw", true)?;
    let again = create_on_loopback(guest, "foreign", &options)?;
    guest.sh(&format!("cmp <(dd if={} iflag=direct bs=1M status=none) {image}", again.device))?;
    delete(guest, "foreign")?;
    guest.sh(&format!("rm -f {image} {image}.pi")).map(drop)
}

fn descriptor_sense(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let image = "/scratch/dsense.raw";
    daemon(guest)?;
    let lun = create_on_loopback(
        guest,
        "dsense",
        &format!("--image {image} --size {SIZE} --format raw --pi type1"),
    )?;
    let (device, sg) = (&lun.device, &lun.sg);
    guest.sh(&format!("dd if=/dev/urandom of={device} oflag=direct bs=1M count=1 status=none"))?;
    flip(guest, image, 99 * 512)?;
    let beyond = SIZE / 512;
    for (value, words, lba) in [
        ("0", "Fixed format", "0x63"),
        ("1", "Descriptor format", "0x0000000000000063"),
        ("0", "Fixed format", "0x63"),
    ] {
        guest.sh(&format!("sdparm --set=D_SENSE={value} {sg}"))?;
        // Whether the changed mode page is a unit attention to its own changer is left to the target; and sdparm's exit
        // status tells that there are no saved values.
        let shown = guest.sh(&format!("sg_turs {sg} || true; sdparm --get=D_SENSE {sg} || true"))?;
        ensure!(shown.split_whitespace().any(|word| word == value), "D_SENSE is not {value}: {shown}");
        let guard = read16(guest, sg, 99, 1, 512)?;
        let end = read16(guest, sg, beyond, 1, 512)?;
        for (answer, part) in [
            (&guard, words),
            (&guard, GUARD_FAILED),
            (&guard, lba),
            (&end, words),
            (&end, "Logical block address out of range"),
        ] {
            ensure!(answer.text.contains(part), "D_SENSE={value}, no {part:?} in:\n{}", answer.text);
        }
    }
    // REQUEST SENSE has its own DESC bit.
    let answer = raw(guest, sg, &[3, 1, 0, 0, 252, 0], "--request=252")?;
    ensure!(answer.status == Some(0), "{}", answer.text);
    let first = answer
        .text
        .lines()
        .find_map(|line| line.trim().strip_prefix("00"))
        .and_then(|rest| rest.split_whitespace().next())
        .context("no sense data")?;
    ensure!(first == "72", "REQUEST SENSE with DESC set begins with {first}");
    delete(guest, "dsense")?;
    guest.sh(&format!("rm -f {image} {image}.pi && dmesg --clear")).map(drop)
}

fn scrub(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let none = guest.try_sh("tcmu-dif scrub nobody 2>&1")?;
    ensure!(!none.ok() && none.stdout.contains("'nobody' is not served"), "{}", none.stdout);
    let (mib, image) = (64, "/scratch/look.raw");
    let lun =
        create_on_loopback(guest, "look", &format!("--image {image} --size {mib}M --format raw --pi type1"))?;
    let device = &lun.device;
    guest.sh(&format!(
        "head -c {mib}M /dev/urandom > /scratch/model
         dd if=/scratch/model of={device} oflag=direct bs=1M status=none
         rm /scratch/model"
    ))?;

    guest.sh("timeout 60 tcmu-dif scrub look --speed 4M --background")?;
    let status = |guest: &mut Guest| guest.json("timeout 60 tcmu-dif scrub look --status --json");
    guest
        .sh("for _ in $(seq 150); do
                 grep -q '\"read_bytes\": 0,' <(tcmu-dif scrub look --status --json) || exit 0; sleep 0.2
             done; exit 1")
        .context("the scrub does not begin")?;
    guest.sh("timeout 60 tcmu-dif scrub look --pause")?;
    let paused = status(guest)?;
    ensure!(paused["status"] == "paused" && paused["mismatches"] == 0, "{paused}");

    // The account outlives the daemon.
    super::lun::stop_daemon(guest, "KILL")?;
    start_daemon(guest, "auto")?;
    guest.sh(
        "for _ in $(seq 150); do grep -q '\"state\": \"online\"' <(tcmu-dif show look --json) && exit 0; sleep 0.2; done; exit 1",
    )?;
    let after = status(guest)?;
    for key in ["status", "next_lba", "verified", "started_ms"] {
        ensure!(after[key] == paused[key], "{key} was {} and is {}", paused[key], after[key]);
    }

    // Beyond the scrub's position, and after the recheck of what the dead daemon had marked, which goes on while the LUN serves.
    guest.sh(
        "for _ in $(seq 150); do grep -qE '\"unchecked\": *0(,|$)' <(tcmu-dif show look --json) && exit 0; sleep 0.2; done
         tcmu-dif show look --json; exit 1",
    )?;
    let lba = 100_000;
    ensure!(after["next_lba"].as_u64() < Some(lba), "the scrub is too far already: {after}");
    flip(guest, image, lba * 512 + 300)?;
    guest.sh(&format!(
        "setsid dd if=/dev/urandom of={device} oflag=direct bs=16k count=1024 status=none > /tmp/dd.txt 2>&1 < /dev/null &
         echo $! > /tmp/dd.pid
         timeout 60 tcmu-dif scrub look --resume"
    ))?;
    let ended = guest.try_sh("timeout 120 tcmu-dif scrub look --speed 0 --json 2> /tmp/said")?;
    let report: serde_json::Value =
        serde_json::from_str(&ended.stdout).with_context(|| format!("no report: {}", ended.stdout))?;
    ensure!(!ended.ok(), "a scrub that found damage ends as if all were well: {report}");
    let said = guest.sh("cat /tmp/said")?;
    ensure!(said.contains("1 blocks do not match") && said.contains("next: "), "{said}");
    ensure!(report["status"] == "concluded" && report["mismatches"] == 1, "{report}");
    let bad = &report["bad"][0];
    ensure!(bad["lba"] == lba && bad["host_offset"] == lba * 512 && bad["file"] == image, "{bad}");
    ensure!(report["verified"] == mib * 2048 - 1, "each block is looked at once: {report}");
    guest
        .sh("for _ in $(seq 300); do kill -0 $(cat /tmp/dd.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1")
        .context("the guest's writer hangs")?;
    ensure!(guest.sh("cat /tmp/dd.txt")?.is_empty(), "the guest's writes failed");

    // Written anew, the block is whole.
    guest.sh(&format!("dd if=/dev/zero of={device} oflag=direct bs=512 seek={lba} count=1 status=none"))?;
    guest.sh("timeout 120 tcmu-dif scrub look --speed 0")?;
    delete(guest, "look")?;
    guest.sh("! ls /var/lib/tcmu-dif/scrub/*.json 2>/dev/null")?;
    assert_image_clean(guest, image, "raw", true)?;
    assert_nothing_left(guest)
}
