//! The first promise: what is read back is what was written, and what lies in the image is what other tools find there.

use super::initiator::{file_system_with_verified_writes, geometry};
use super::lun::{assert_image_clean, assert_nothing_left, create_on_loopback, delete, names, start_daemon};
use super::{Run, Test};
use anyhow::{Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "data.raw-512",
        promise: "a raw image with 512-byte blocks and type 1 keeps what ext4 and fio write",
        limit: 420,
        group: None,
        run: |run| keeps(run, &Disk { format: "raw", block: 512, pi: "type1", io: "uring" }),
    },
    Test {
        name: "data.raw-4096",
        promise: "a raw image with 4096-byte blocks and type 3 keeps what ext4 and fio write",
        limit: 420,
        group: None,
        run: |run| keeps(run, &Disk { format: "raw", block: 4096, pi: "type3", io: "uring" }),
    },
    Test {
        name: "data.qcow2-512",
        promise: "a qcow2 image with 512-byte blocks and type 1 keeps what ext4 and fio write",
        limit: 420,
        group: None,
        run: |run| keeps(run, &Disk { format: "qcow2", block: 512, pi: "type1", io: "uring" }),
    },
    Test {
        name: "data.qcow2-4096",
        promise: "a qcow2 image with 4096-byte blocks and type 1 keeps what ext4 and fio write",
        limit: 420,
        group: None,
        run: |run| keeps(run, &Disk { format: "qcow2", block: 4096, pi: "type1", io: "uring" }),
    },
    Test {
        name: "data.qcow2-threads",
        promise: "the thread pool keeps what io_uring keeps, without PI too",
        limit: 420,
        group: None,
        run: |run| keeps(run, &Disk { format: "qcow2", block: 512, pi: "off", io: "threads" }),
    },
];

struct Disk {
    format: &'static str,
    block: u64,
    pi: &'static str,
    io: &'static str,
}

const SIZE: u64 = 256 << 20;

fn keeps(run: &mut Run<'_>, disk: &Disk) -> Result<()> {
    let Disk { format, block, pi, io } = disk;
    let mebibytes = run.scale.pick(8, 24, 64);
    let guest = &mut *run.guest;
    let image = format!("/scratch/disk.{format}");
    start_daemon(guest, io)?;
    let options = format!("--image {image} --block-size {block} --pi {pi}");
    let lun = create_on_loopback(guest, "disk", &format!("{options} --size {SIZE} --format {format}"))?;
    ensure!(lun.report["created"] == true, "not created: {}", lun.report);
    ensure!(lun.report["capacity_bytes"] == SIZE, "{}", lun.report);
    ensure!(geometry(guest, &lun.device)? == (SIZE, *block));
    ensure!(names(guest)? == ["disk"]);

    file_system_with_verified_writes(guest, &lun.device, mebibytes)?;

    let copy = "dd if={} iflag=direct bs=1M of=/scratch/copy conv=sparse status=none";
    guest.sh_within(Duration::from_secs(120), &copy.replace("{}", &lun.device))?;
    delete(guest, "disk")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, &image, format, *pi != "off")?;
    guest.sh_within(
        Duration::from_secs(120),
        &format!(
            "truncate -s {SIZE} /scratch/copy && qemu-img compare -f raw -F {format} /scratch/copy {image}"
        ),
    )?;

    // A second life of the same image: same size, same bytes.
    let again = create_on_loopback(guest, "disk", &options)?;
    ensure!(geometry(guest, &again.device)? == (SIZE, *block));
    guest.sh_within(
        Duration::from_secs(120),
        &format!("cmp <(dd if={} iflag=direct bs=1M status=none) /scratch/copy", again.device),
    )?;
    delete(guest, "disk")?;
    assert_image_clean(guest, &image, format, *pi != "off")
}
