//! tcmu-dif in the guest, through its command line: the daemon, and LUNs on loopback.

use super::super::guest::{Guest, patience};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::Duration;

/// How long a command may take before the test calls it a hang, in seconds.
fn command_limit() -> u32 {
    60 * patience()
}

/// A LUN that `tcmu-dif create` made, as its `--json` tells it.
#[derive(Clone, Debug)]
pub struct Lun {
    /// The loopback export's `/dev/sdX`.
    pub device: String,
    /// The loopback export's `/dev/sgN`.
    pub sg: String,
    /// The whole report.
    pub report: Value,
}

/// Loads the modules and starts the daemon with `io` as its way to the files; returns when it says that it is up.
pub fn start_daemon(guest: &mut Guest, io: &str) -> Result<()> {
    guest
        .sh(&format!(
            r#"modprobe -a target_core_user tcm_loop vhost_scsi
        setsid tcmu-dif daemon --io {io} >> /scratch/daemon.log 2>&1 < /dev/null &
        pid=$!
        for _ in $(seq 300); do
            [ "$(cat /run/tcmu-dif/daemon.pid 2>/dev/null)" = $pid ] && exit 0
            kill -0 $pid 2>/dev/null || break
            sleep 0.1
        done
        tail -n 20 /scratch/daemon.log >&2
        exit 1"#
        ))
        .context("the daemon did not start")
        .map(drop)
}

/// Starts the daemon unless a test of the same group has.
pub fn daemon(guest: &mut Guest) -> Result<()> {
    if daemon_pid(guest).is_ok() { Ok(()) } else { start_daemon(guest, "auto") }
}

/// The running daemon's process id; an error if there is none.
pub fn daemon_pid(guest: &mut Guest) -> Result<u32> {
    let pid = guest
        .sh("pid=$(cat /run/tcmu-dif/daemon.pid) && kill -0 $pid && echo $pid")
        .context("the daemon is gone")?;
    Ok(pid.parse()?)
}

/// Ends the daemon with `signal` and waits until it is gone.
pub fn stop_daemon(guest: &mut Guest, signal: &str) -> Result<()> {
    let pid = daemon_pid(guest)?;
    guest
        .sh(&format!(
            "kill -{signal} {pid}; for _ in $(seq 300); do [ -e /proc/{pid} ] || exit 0; sleep 0.1; done; exit 1"
        ))
        .with_context(|| format!("the daemon did not end after SIG{signal}"))
        .map(drop)
}

/// `tcmu-dif create NAME OPTIONS --json`, which must succeed.
pub fn create(guest: &mut Guest, name: &str, options: &str) -> Result<Value> {
    guest.json(&format!("timeout {} tcmu-dif create {name} {options} --json", command_limit()))
}

/// [`create`] with an export through loopback, whose disk must be there.
pub fn create_on_loopback(guest: &mut Guest, name: &str, options: &str) -> Result<Lun> {
    let export = if options.contains("--export") { "" } else { "--export loopback" };
    let report = create(guest, name, &format!("{options} {export}"))?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let exports = report["exports"].as_array().cloned().unwrap_or_default();
    let Some((device, sg)) = exports
        .iter()
        .find(|export| export["fabric"] == "loopback")
        .and_then(|export| Some((text(&export["device"])?, text(&export["sg"])?)))
    else {
        bail!("create names no disk: {report}");
    };
    guest.sh(&format!("test -b {device} && test -c {sg}"))?;
    Ok(Lun { device, sg, report })
}

/// `tcmu-dif delete NAME`, which must succeed.
pub fn delete(guest: &mut Guest, name: &str) -> Result<()> {
    guest.sh(&format!("timeout {} tcmu-dif delete {name}", command_limit())).map(drop)
}

/// `tcmu-dif show NAME --json`.
pub fn show(guest: &mut Guest, name: &str) -> Result<Value> {
    guest.json(&format!("timeout {} tcmu-dif show {name} --json", command_limit()))
}

/// The names that `tcmu-dif list --json` gives.
pub fn names(guest: &mut Guest) -> Result<Vec<String>> {
    let list = guest.json("tcmu-dif list --json")?;
    let luns = list.as_array().or_else(|| list["luns"].as_array());
    let Some(luns) = luns else {
        bail!("list gives no list: {list}");
    };
    Ok(luns.iter().filter_map(|lun| lun["name"].as_str()).map(str::to_owned).collect())
}

/// Every object there is in the kernel's target tree: to see that nothing half-made is left.
pub fn configfs(guest: &mut Guest) -> Result<String> {
    guest.sh("find /sys/kernel/config/target -mindepth 1 \\( -type d -o -type l \\) | sort")
}

/// Checks that the target tree and the daemon's own folder hold nothing of LUNs any more.
pub fn assert_nothing_left(guest: &mut Guest) -> Result<()> {
    let left = guest.sh(
        "find /sys/kernel/config/target/core -mindepth 2 -maxdepth 2 -type d -path '*/user_*' 2>/dev/null || true
         find /sys/kernel/config/target -path '*/naa.*' -maxdepth 3 2>/dev/null || true
         ls /run/tcmu-dif/luns 2>/dev/null || true
         ls -d /sys/class/scsi_disk/* 2>/dev/null || true",
    )?;
    ensure!(left.is_empty(), "left behind:\n{left}");
    Ok(())
}

/// Opens the image as others would, when nothing serves it: qemu-img's check, and PI's verification.
pub fn assert_image_clean(guest: &mut Guest, image: &str, format: &str, pi: bool) -> Result<()> {
    if format == "qcow2" {
        let report = guest.json(&format!("qemu-img check --output=json -f qcow2 {image}"))?;
        for kind in ["corruptions", "leaks", "check-errors"] {
            let count = report[kind].as_u64().unwrap_or(0);
            ensure!(count == 0, "qemu-img check counts {count} {kind} in {image}: {report}");
        }
    }
    if pi {
        guest
            .sh_within(Duration::from_secs(120), &format!("tcmu-dif pi verify {image} --json"))
            .context("PI does not match")?;
    }
    Ok(())
}
