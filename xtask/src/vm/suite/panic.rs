//! A LUN whose thread panics, in a build that does so when it is told to.

use super::super::guest::Guest;
use super::device::wait_for;
use super::lun::{
    Lun, assert_image_clean, assert_nothing_left, create_on_loopback, daemon_pid, delete, show, start_daemon,
    stop_daemon,
};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};

/// The test that needs the other build.
pub const NAME: &str = "fault.lun-thread-panic";

pub const TESTS: &[Test] = &[Test {
    name: NAME,
    promise: "a LUN whose thread panics comes back by itself once, and then stays failed with the reason; another under load never notices",
    limit: 300,
    group: None,
    run: panics,
}];

fn panics(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    guest.sh("mv /usr/local/bin/tcmu-dif-fault-points /usr/local/bin/tcmu-dif")?;
    start_daemon(guest, "auto")?;
    let pid = daemon_pid(guest)?;
    let make = |guest: &mut Guest, name: &str| -> Result<Lun> {
        let image = format!("/scratch/{name}.qcow2");
        create_on_loopback(guest, name, &format!("--image {image} --size 64M --format qcow2 --pi type1"))
    };
    let (doomed, sound) = (make(guest, "doomed")?, make(guest, "sound")?);
    for lun in [&doomed, &sound] {
        guest.sh(&format!(
            "cd /tmp; setsid fio --name=load --filename={0} --size=16M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \
                 --verify=crc32c --verify_fatal=1 --verify_backlog=256 --time_based --runtime=20 > /tmp/$(basename {0}).txt 2>&1 < /dev/null &",
            lun.device
        ))?;
    }

    // Once: the command that met the fault is answered by the LUN's second life.
    let meet =
        format!("touch /run/tcmu-dif/fault-point; sg_raw --timeout=250 {} c0 00 00 00 00 00 2>&1", doomed.sg);
    let met = guest.try_sh(&format!("sleep 3; {meet}"))?;
    ensure!(met.stdout.contains("Invalid command operation code"), "the command was not taken up: {met:?}");
    guest.sh("[ ! -e /run/tcmu-dif/fault-point ] && grep -q 'its thread panicked: a fault point was met' /scratch/daemon.log
         grep -q 'started again, this once' /scratch/daemon.log")?;
    wait_for(guest, "doomed", "online")?;
    for lun in [&doomed, &sound] {
        let load = guest.sh(&format!(
            "for _ in $(seq 300); do pgrep -f '[f]io.*{0} ' > /dev/null || break; sleep 0.2; done; cat /tmp/$(basename {0}).txt",
            lun.device
        ))?;
        ensure!(load.contains("err= 0"), "the load met an error:\n{load}");
    }

    // Twice: it stays failed, says why, and what it has not answered waits.
    guest.sh(&format!("({meet}) > /tmp/met.txt < /dev/null & sleep 1"))?;
    wait_for(guest, "doomed", "failed")?;
    let failed = show(guest, "doomed")?;
    let words = |key: &str| failed[key].as_str().unwrap_or_default().to_owned();
    ensure!(
        words("reason").contains("a fault point was met") && words("next").contains("restart"),
        "{failed}"
    );
    guest.sh("sleep 6")?;
    ensure!(show(guest, "doomed")?["state"] == "failed", "it was started a third time");
    ensure!(show(guest, "sound")?["state"] == "online" && daemon_pid(guest)? == pid, "others noticed");

    // The next daemon answers it.
    stop_daemon(guest, "TERM")?;
    start_daemon(guest, "auto")?;
    wait_for(guest, "doomed", "online")?;
    guest
        .sh("for _ in $(seq 100); do [ -s /tmp/met.txt ] && break; sleep 0.2; done; grep -q 'Invalid command operation code' /tmp/met.txt")
        .context("the command that met the fault twice has no answer")?;
    for name in ["doomed", "sound"] {
        delete(guest, name)?;
        assert_image_clean(guest, &format!("/scratch/{name}.qcow2"), "raw", true)?;
    }
    assert_nothing_left(guest)
}
