//! What the tests do as an initiator: file systems, fio, raw SCSI commands, all on a disk that is already there.

use super::super::guest::Guest;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::time::Duration;

/// The device's size in bytes and its logical block size, as the initiator's kernel sees them.
pub fn geometry(guest: &mut Guest, device: &str) -> Result<(u64, u64)> {
    let found = guest.json(&format!("lsblk --json --bytes --nodeps --output SIZE,LOG-SEC {device}"))?;
    let disk = &found["blockdevices"][0];
    match (disk["size"].as_u64(), disk["log-sec"].as_u64()) {
        (Some(size), Some(block)) => Ok((size, block)),
        _ => bail!("lsblk says nothing of {device}: {found}"),
    }
}

/// Runs fio with `options`, and checks that no job of it met an error; gives back its report.
pub fn fio(guest: &mut Guest, limit: Duration, options: &str) -> Result<Value> {
    let text =
        guest.sh_within(limit, &format!("cd /tmp && fio --output-format=json --name=job {options} 2>&1"))?;
    let report = text.find('{').map(|at| &text[at..]).unwrap_or(&text);
    let report: Value =
        serde_json::from_str(report).with_context(|| format!("fio's report is no JSON:\n{text}"))?;
    for job in report["jobs"].as_array().into_iter().flatten() {
        if job["error"].as_i64() != Some(0) {
            bail!("fio met error {}: {text}", job["error"]);
        }
    }
    Ok(report)
}

/// Makes a file system on `device`, writes to it at random with fio's checksums at queue depth 32, reads everything back, trims, and finds
/// the file system clean at the end.
pub fn file_system_with_verified_writes(guest: &mut Guest, device: &str, mebibytes: u32) -> Result<()> {
    guest.sh(&format!("mkfs.ext4 -q -F {device} && mkdir -p /mnt && mount -t ext4 {device} /mnt"))?;
    let report = fio(
        guest,
        Duration::from_secs(240),
        &format!(
            "--directory=/mnt --size={mebibytes}M --rw=randwrite --bs=4k --ioengine=libaio --iodepth=32 --direct=1 \
             --verify=crc32c --do_verify=1 --verify_fatal=1 --verify_backlog=1024 --randseed=7"
        ),
    )?;
    let written = report["jobs"][0]["write"]["io_bytes"].as_u64().unwrap_or(0);
    if written < u64::from(mebibytes) << 20 {
        bail!("fio wrote {written} bytes instead of {mebibytes} MiB");
    }
    // Odd sizes and buffered writes besides, then holes for the target's UNMAP.
    guest.sh(
        "mkdir /mnt/tree && cp -r /usr/share/perl5 /usr/sbin /mnt/tree/ 2>/dev/null || cp -r /usr/sbin /mnt/tree/
         (cd /mnt/tree && find . -type f -print0 | sort -z | xargs -0 sha256sum) > /tmp/sums
         sync && rm -f /mnt/job.0.0 && fstrim -v /mnt && umount /mnt",
    )?;
    guest.sh(&format!("echo 3 > /proc/sys/vm/drop_caches && e2fsck -fn {device}"))?;
    guest.sh(&format!(
        "mount -o ro {device} /mnt && (cd /mnt/tree && sha256sum --check --quiet /tmp/sums) && umount /mnt"
    ))?;
    Ok(())
}

/// The result of one SCSI command sent with sg_raw.
#[derive(Debug)]
pub struct Answer {
    /// sg_raw's exit status, which is 0 for GOOD.
    pub status: Option<i32>,
    /// What it said, sense included.
    pub text: String,
}

/// Sends READ(16) for `blocks` blocks of `block` bytes at `lba`.
pub fn read16(guest: &mut Guest, sg: &str, lba: u64, blocks: u32, block: u64) -> Result<Answer> {
    let mut cdb = [0u8; 16];
    cdb[0] = 0x88;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    let length = u64::from(blocks) * block;
    raw(guest, sg, &cdb, &format!("--request={length} --outfile=/dev/null"))
}

/// Sends a CDB with sg_raw and `options` for the data.
pub fn raw(guest: &mut Guest, sg: &str, cdb: &[u8], options: &str) -> Result<Answer> {
    let cdb: Vec<String> = cdb.iter().map(|byte| format!("{byte:02x}")).collect();
    let output = guest.try_sh(&format!("sg_raw {options} {sg} {} 2>&1", cdb.join(" ")))?;
    Ok(Answer { status: output.status, text: output.stdout })
}

/// SHA-256 of a range of a device read past the page cache, in bytes.
pub fn sum_of_range(guest: &mut Guest, device: &str, from: u64, length: u64) -> Result<String> {
    guest.sh(&format!(
        "dd if={device} iflag=direct,skip_bytes,count_bytes skip={from} count={length} bs=64k status=none | sha256sum | cut -d' ' -f1"
    ))
}
