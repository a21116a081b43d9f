//! Other fabrics than loopback, with the initiator where it really is.

use super::lun::{assert_image_clean, assert_nothing_left, create, daemon_pid, delete, start_daemon};
use super::{Run, Test};
use anyhow::{Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[Test {
    name: "fabric.vhost",
    promise: "an initiator in user space reads and writes a LUN through /dev/vhost-scsi and its own vring",
    limit: 240,
    group: None,
    run: vhost,
}];

const WWPN: &str = "naa.5001405000000011";

fn vhost(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    for format in ["raw", "qcow2"] {
        let image = format!("/scratch/v.{format}");
        let report = create(
            guest,
            "v",
            &format!("--image {image} --size 64M --format {format} --pi type1 --export vhost:{WWPN}"),
        )?;
        let export = &report["exports"][0];
        ensure!(export["fabric"] == "vhost" && export["wwn"] == WWPN, "{report}");
        for (key, part) in [("libvirt", "protocol='vhost'"), ("qemu", "vhost-scsi-pci")] {
            let text = export[key].as_str().unwrap_or_default();
            ensure!(text.contains(part) && text.contains(WWPN), "{key}: {text}");
        }
        let result = guest.sh_within(Duration::from_secs(120), &format!("tcmu-dif peer-vhost {WWPN}"))?;
        let result: serde_json::Value = serde_json::from_str(&result)?;
        let number = |key: &str| result[key].as_u64().unwrap_or_default();
        ensure!(
            result["ok"] == true && result["out_of_range_refused"] == true && number("mismatches") == 0,
            "{result}"
        );
        // It did what it says: all that was written was read back, with many commands in flight.
        ensure!(number("writes") >= 2000 && number("most_in_flight") >= 16, "{result}");
        ensure!(number("compared") >= number("writes"), "{result}");
        daemon_pid(guest)?;
        delete(guest, "v")?;
        assert_nothing_left(guest)?;
        assert_image_clean(guest, &image, format, true)?;
    }
    Ok(())
}
