//! EXTENDED COPY between LUNs, asked for by sg3-utils.

use super::lun::{assert_image_clean, create_on_loopback, delete, start_daemon};
use super::{Run, Test};
use anyhow::{Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[Test {
    name: "copy.sg-xcopy",
    promise: "sg_xcopy copies a protected raw LUN to a qcow2 LUN of its group byte for byte, and reaches none outside of it",
    limit: 240,
    group: None,
    run: between_luns,
}];

fn between_luns(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let raw = "--image /scratch/from.raw --size 64M --format raw --pi type1 --copy-group both";
    let from = create_on_loopback(guest, "from", raw)?;
    let qcow2 = "--image /scratch/to.qcow2 --size 64M --format qcow2 --copy-group both";
    let to = create_on_loopback(guest, "to", qcow2)?;
    let alone = create_on_loopback(guest, "alone", "--image /scratch/alone.raw --size 64M --format raw")?;
    guest.sh_within(
        Duration::from_secs(60),
        &format!(
            "dd if=/dev/urandom of=/scratch/noise bs=1M count=64 status=none
             dd if=/scratch/noise of={} oflag=direct bs=1M status=none",
            from.device
        ),
    )?;
    let parameters = guest.sh(&format!("sg_copy_results --params {}", from.sg))?;
    ensure!(parameters.contains("block device to block device"), "{parameters}");
    guest.sh_within(
        Duration::from_secs(120),
        &format!(
            "sg_xcopy if={} of={} bs=512 bpt=8192 list_id=7
             cmp /scratch/noise <(dd if={} iflag=direct bs=1M status=none)",
            from.sg, to.sg, to.device
        ),
    )?;
    let refused = guest.try_sh(&format!("sg_xcopy if={} of={} bs=512 bpt=2048 2>&1", from.sg, alone.sg))?;
    ensure!(refused.status != Some(0), "a LUN without a group was reached: {}", refused.stdout);
    guest.sh(&format!(
        "cmp <(head -c 64M /dev/zero) <(dd if={} iflag=direct bs=1M status=none)",
        alone.device
    ))?;
    for name in ["from", "to", "alone"] {
        delete(guest, name)?;
    }
    assert_image_clean(guest, "/scratch/from.raw", "raw", true)?;
    assert_image_clean(guest, "/scratch/to.qcow2", "qcow2", false)
}
