//! A LUN that is handed over. One kernel has both sides, under two names: what two hosts would add, the tests on embedded kernels show.

use super::super::guest::Guest;
use super::initiator::geometry;
use super::lun::{assert_image_clean, assert_nothing_left, create_on_loopback, delete, names, start_daemon};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub const TESTS: &[Test] = &[Test {
    name: "lifecycle.handover",
    promise: "a LUN is handed over with its data, protection, serial number and mode pages, serves on if that fails, and an image of another host is refused",
    limit: 300,
    group: None,
    run: handover,
}];

const SOCKET: &str = "/run/receive.sock";

/// Has one LUN received under a name, in the background.
fn receive(guest: &mut Guest, name: &str) -> Result<()> {
    guest
        .sh(&format!(
            "rm -f /tmp/receive.*; setsid tcmu-dif receive --listen unix:{SOCKET} --once --name {name} --json \
                 > /tmp/receive.json 2> /tmp/receive.err < /dev/null &
             for _ in $(seq 100); do [ -S {SOCKET} ] && exit 0; sleep 0.1; done; cat /tmp/receive.err; exit 1"
        ))
        .map(drop)
}

/// What it made, once it has ended.
fn received(guest: &mut Guest) -> Result<Value> {
    guest
        .sh(&format!("for _ in $(seq 300); do [ -e {SOCKET} ] || exit 0; sleep 0.1; done; exit 1"))
        .context("receive does not end")?;
    guest.json("cat /tmp/receive.json")
}

fn handover(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let image = "/scratch/h.qcow2";
    let a = create_on_loopback(guest, "a", &format!("--image {image} --size 64M --format qcow2 --pi type1"))?;
    let serial = guest.sh("cat /sys/kernel/config/target/core/user_*/a/wwn/vpd_unit_serial")?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={} bs=1M oflag=direct status=none",
        a.device
    ))?;

    // Nobody there; then a name that is taken: it serves as before.
    let refused = guest.try_sh(&format!("tcmu-dif handover a --to unix:{SOCKET} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("tcmu-dif receive"), "{}", refused.stdout);
    receive(guest, "a")?;
    let refused = guest.try_sh(&format!("tcmu-dif handover a --to unix:{SOCKET} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("is there already"), "{}", refused.stdout);
    let same = |device: &str| {
        format!("cmp -n $((24 << 20)) /tmp/data <(dd if={device} bs=1M iflag=direct status=none)")
    };
    guest.sh(&same(&a.device))?;

    receive(guest, "b")?;
    let given = guest.json(&format!("tcmu-dif handover a --to unix:{SOCKET} --json"))?;
    ensure!(given["answered"] == true && given["left"].is_null(), "{given}");
    let made = received(guest)?;
    let b = made["exports"][0]["device"].as_str().with_context(|| format!("no disk in {made}"))?.to_owned();
    ensure!(names(guest)? == ["b"], "the source is there still");
    ensure!(geometry(guest, &b)? == (64 << 20, 512));
    guest.sh(&same(&b))?;
    ensure!(guest.sh("cat /sys/kernel/config/target/core/user_*/b/wwn/vpd_unit_serial")? == serial);
    let owner = guest.json(&format!("tcmu-dif image owner --json {image}"))?;
    ensure!(owner["state"] == "held", "{owner}");

    // And back, with what was written meanwhile.
    guest.sh(&format!("dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={b} bs=1M oflag=direct status=none"))?;
    receive(guest, "a")?;
    guest.sh(&format!("tcmu-dif handover b --to unix:{SOCKET}"))?;
    let made = received(guest)?;
    let a = made["exports"][0]["device"].as_str().with_context(|| format!("no disk in {made}"))?.to_owned();
    guest.sh(&same(&a))?;
    delete(guest, "a")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, image, "qcow2", true)
}
