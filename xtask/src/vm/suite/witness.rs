//! A second writer beside fio, which notices what fio does not: an older block that comes back. The guest's side is `guest/witness.py`.

use super::super::guest::Guest;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::time::Duration;

/// Begins to write to the MiB at `mebibytes` of a disk that has 512 or 4096 bytes a block. What is there is lost.
pub fn start(guest: &mut Guest, device: &str, mebibytes: u32) -> Result<()> {
    std::fs::write(guest.share().join("witness.py"), include_str!("../guest/witness.py"))?;
    guest
        .sh(&format!(
            "rm -f /tmp/witness.*; setsid python3 /host/witness.py {device} {mebibytes} > /tmp/witness.txt 2>&1 < /dev/null &
             echo $! > /tmp/witness.pid"
        ))
        .map(drop)
}

/// Where a witness whose disk may go keeps what it knows.
const RECORD: &str = "witness.json";

/// Begins as [`start`] does, on a disk that may go away; what a record of an earlier one tells of has to be there.
pub fn start_recorded(guest: &mut Guest, device: &str, mebibytes: u32, seed: u64) -> Result<()> {
    std::fs::write(guest.share().join("witness.py"), include_str!("../guest/witness.py"))?;
    guest
        .sh(&format!(
            "rm -f /tmp/witness.*; setsid python3 /host/witness.py {device} {mebibytes} /host/{RECORD} {seed} > /tmp/witness.txt 2>&1 < /dev/null &
             echo $! > /tmp/witness.pid"
        ))
        .map(drop)
}

/// Whether it is writing still.
pub fn lives(guest: &mut Guest) -> Result<bool> {
    Ok(guest.sh("kill -0 $(cat /tmp/witness.pid) 2>/dev/null && echo yes || echo no")? == "yes")
}

/// Waits until one whose disk has gone, or that is told so, has ended; takes its record to the guest that has the disk now. Says what it did.
pub fn ended(guest: &mut Guest, enough: bool, to: Option<&Path>) -> Result<String> {
    let said = guest
        .sh_within(
            Duration::from_secs(240),
            &format!(
                "{} for _ in $(seq 1000); do kill -0 $(cat /tmp/witness.pid) 2>/dev/null || break; sleep 0.2; done
                 cat /tmp/witness.txt; grep -q '^witness: ' /tmp/witness.txt",
                if enough { "touch /tmp/witness.enough;" } else { "" }
            ),
        )
        .context("the witness has not found what was answered")?;
    ensure!(
        enough || said.contains("the disk has gone"),
        "the witness has ended with its disk there: {said}"
    );
    if let Some(to) = to {
        std::fs::copy(guest.share().join(RECORD), to.join(RECORD))
            .context("the witness has left no record")?;
    }
    Ok(said.lines().last().unwrap_or_default().to_owned())
}

/// Has it read all that it wrote, and notes what it did; every sector has what was answered last, and no COMPARE AND WRITE was done twice.
pub fn end(guest: &mut Guest) -> Result<()> {
    let said = guest
        .sh_within(
            Duration::from_secs(240),
            "touch /tmp/witness.enough
             for _ in $(seq 1000); do grep -qE '^(witness|failed): ' /tmp/witness.txt && break; sleep 0.2; done
             tail -n 20 /tmp/witness.txt; grep -q '^witness: ' /tmp/witness.txt",
        )
        .context("the witness has not found what was answered")?;
    let counts: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure!(
        counts.len() == 3 && counts.iter().all(|count| *count > 0),
        "the witness has done nothing: {said}"
    );
    guest.note(said);
    Ok(())
}
