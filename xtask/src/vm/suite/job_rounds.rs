//! Each kind of job, run to its end again and again under load on the real kernel, while it is paused, slowed down, cancelled, killed with the daemon, and
//! while its target runs full. The guest's side is `guest/job_rounds.py`.

use super::super::guest::{Guest, patience};
use super::lun::{assert_image_clean, create_on_loopback, daemon, delete};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const PROMISE: &str = "the job runs to its end under fio at QD32, paused, slowed down, cancelled, without room, and with kill -9: nothing is lost, the guest sees no error, copies are of their moment";

pub const TESTS: &[Test] = &[
    of("jobs.rounds-mirror-background", |run| rounds(run, "mirror-background")),
    of("jobs.rounds-mirror-write-blocking", |run| rounds(run, "mirror-write-blocking")),
    of("jobs.rounds-backup-full", |run| rounds(run, "backup-full")),
    of("jobs.rounds-backup-incremental", |run| rounds(run, "backup-incremental")),
    of("jobs.rounds-snapshot", |run| rounds(run, "snapshot")),
    of("jobs.rounds-internal-snapshot", |run| rounds(run, "internal-snapshot")),
    of("jobs.rounds-stream", |run| rounds(run, "stream")),
    of("jobs.rounds-commit-active", |run| rounds(run, "commit-active")),
    of("jobs.rounds-commit-intermediate", |run| rounds(run, "commit-intermediate")),
];

const fn of(name: &'static str, run: fn(&mut Run<'_>) -> Result<()>) -> Test {
    Test { name, promise: PROMISE, limit: 1800, group: Some("job-rounds"), run }
}

/// Chooses what is done when: `TCMU_DIF_SEED`, or the clock.
pub(super) fn seed() -> Result<u64> {
    match std::env::var("TCMU_DIF_SEED") {
        Ok(text) => text.parse().with_context(|| format!("TCMU_DIF_SEED is a number, not {text:?}")),
        Err(_) => Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as u64 % 1_000_000),
    }
}

fn rounds(run: &mut Run<'_>, kind: &str) -> Result<()> {
    let (rounds, seed) = (run.scale.pick(2, 3, 20), seed()?);
    let guest = &mut *run.guest;
    guest.sh(
        "mountpoint -q /small || { mkdir -p /small && mount -t tmpfs -o size=160M tmpfs /small; }; dmesg --clear",
    )?;
    daemon(guest)?;
    std::fs::write(guest.share().join("job_rounds.py"), include_str!("../guest/job_rounds.py"))?;
    // A commit's target is what the LUN begins with.
    let image = if kind.starts_with("commit") { "/small/r.qcow2" } else { "/scratch/r.qcow2" };
    let lun =
        create_on_loopback(guest, "r", &format!("--image {image} --size 24M --format qcow2 --pi type1"))?;
    let script = format!("python3 /host/job_rounds.py {kind} {} {rounds} {seed} {}", lun.device, patience());
    let said = guest
        .sh_within(Duration::from_secs(1700), &script)
        .with_context(|| format!("{kind}, {rounds} rounds, TCMU_DIF_SEED={seed}"))?;
    let last = said.lines().last().unwrap_or_default();
    let done: Value = serde_json::from_str(last).with_context(|| format!("the script ends with {last:?}"))?;
    ensure!(done["rounds"] == rounds, "{done}");
    guest.note(format!("TCMU_DIF_SEED={seed}: {}", told(&done)));
    judged_by_others(guest, &lun.device, &done)
}

/// What was counted, in words.
fn told(done: &Value) -> String {
    let counts = done.as_object().into_iter().flatten().filter(|(what, _)| *what != "image");
    counts.map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", ")
}

/// Takes the LUN down: what it read as is what QEMU reads in its image, and all tuples match.
fn judged_by_others(guest: &mut Guest, device: &str, done: &Value) -> Result<()> {
    let image = done["image"].as_str().context("no image")?;
    guest.sh(&format!("dd if={device} iflag=direct bs=1M of=/scratch/r.copy status=none"))?;
    delete(guest, "r")?;
    let format = if image.ends_with("qcow2") { "qcow2" } else { "raw" };
    guest.sh(&format!("qemu-img compare -f raw -F {format} /scratch/r.copy {image}"))?;
    // A kill may leak a cluster of a qcow2 image.
    let strictly = if done.get("kill -9").is_some() { "raw" } else { format };
    assert_image_clean(guest, image, strictly, true)?;
    if format == "qcow2" {
        guest.sh(&format!("qemu-img check -q -f qcow2 {image} || [ $? = 3 ]"))?;
    }
    guest.sh("rm -f /scratch/*.qcow2* /scratch/*.raw* /scratch/r.copy /small/*").map(drop)
}
