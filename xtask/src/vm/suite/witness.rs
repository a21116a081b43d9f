//! A second writer beside fio, which notices what fio does not: an older block that comes back. The guest's side is `guest/witness.py`.

use super::super::guest::Guest;
use anyhow::{Context, Result, ensure};
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
