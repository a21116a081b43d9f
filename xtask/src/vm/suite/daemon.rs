//! The daemon's settings while it runs, and what initiators keep across one that is killed.

use super::super::guest::Guest;
use super::lun::{
    assert_nothing_left, create_on_loopback, daemon_pid, delete, show, start_daemon, stop_daemon,
};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};

pub const TESTS: &[Test] = &[
    Test {
        name: "daemon.settings",
        promise: "a SIGHUP applies what has changed in the settings file, says what waits for the next start, and leaves all as it is if that makes no sense",
        limit: 240,
        group: None,
        run: settings,
    },
    Test {
        name: "daemon.mode-pages",
        promise: "mode pages that were changed and not saved are the same after kill -9, and the initiator is told nothing",
        limit: 240,
        group: None,
        run: mode_pages,
    },
];

const FILE: &str = "/etc/tcmu-dif/tcmu-dif.toml";

/// Writes the settings, has the daemon read them, and waits until its log says that.
fn reload(guest: &mut Guest, text: &str, says: &str) -> Result<()> {
    let pid = daemon_pid(guest)?;
    guest
        .sh(&format!(
            "mkdir -p /etc/tcmu-dif; printf '%b' '{text}' > {FILE}; kill -HUP {pid}
             for _ in $(seq 150); do grep -qF '{says}' /scratch/daemon.log && exit 0; sleep 0.2; done
             tail -n 20 /scratch/daemon.log >&2; exit 1"
        ))
        .with_context(|| format!("the log does not say {says:?}"))
        .map(drop)
}

/// Whether metrics are served at a port of this host.
fn serves(guest: &mut Guest, port: u16) -> Result<bool> {
    let said = guest.sh(&format!(
        "ip link set lo up
         (exec 3<>/dev/tcp/127.0.0.1/{port} && printf 'GET /metrics HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && cat <&3) 2>/dev/null \
             | grep -c '^tcmu_dif_luns ' || true"
    ))?;
    Ok(said.trim() == "1")
}

fn settings(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    guest.sh("ip link set lo up")?;
    start_daemon(guest, "auto")?;
    create_on_loopback(guest, "s", "--image /scratch/s.qcow2 --size 16M --format qcow2")?;
    ensure!(!serves(guest, 9967)?, "metrics are served where nobody wants them");
    let first =
        "log = \"debug\"\\nmetrics-listen = \"127.0.0.1:9967\"\\ncache-size = \"1M\"\\nio = \"threads\"\\n";
    // The command line has --io, and wins.
    reload(
        guest,
        first,
        "cache-size is 1048576 from now on for LUNs that are started; for those that serve it takes effect with the next start",
    )?;
    guest.sh("grep -qF 'log is debug from now on' /scratch/daemon.log && ! grep -qF 'io is threads' /scratch/daemon.log")?;
    ensure!(serves(guest, 9967)?, "metrics are not served at the port of the file");
    reload(
        guest,
        "log = \"debug\"\\nmetrics-listen = \"127.0.0.1:9968\"\\n",
        "metrics-listen is 127.0.0.1:9968 from now on",
    )?;
    ensure!(serves(guest, 9968)? && !serves(guest, 9967)?, "metrics did not move");
    reload(guest, "log = \"info\"\\n\\ncolour = \"red\"\\n", "line 3: unknown field `colour`")?;
    guest.sh("grep -qF 'what is set stays as it is' /scratch/daemon.log")?;
    ensure!(serves(guest, 9968)?, "a file that makes no sense has changed something");
    ensure!(show(guest, "s")?["state"] == "online");
    reload(guest, "", "metrics-listen is not set from now on")?;
    ensure!(!serves(guest, 9968)?, "metrics are served for ever");
    delete(guest, "s")?;
    guest.sh(&format!("rm {FILE}"))?;
    assert_nothing_left(guest)
}

/// Byte 2 of the control mode page: D_SENSE is bit 2.
pub(super) fn control(guest: &mut Guest, sg: &str) -> Result<u8> {
    let said = guest.sh(&format!("sg_modes --six --dbd --page=0xa --raw {sg} | od -An -tu1 -j6 -N1"))?;
    said.trim().parse().with_context(|| format!("od says {said:?}"))
}

fn mode_pages(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let lun = create_on_loopback(guest, "m", "--image /scratch/m.raw --size 16M --format raw")?;
    let (device, sg) = (&lun.device, &lun.sg);
    ensure!(control(guest, sg)? & 4 == 0, "D_SENSE is on from the start");
    guest.sh(&format!("sg_wr_mode --page=0xa --contents=0a,0a,04,10,00,40,00,00,00,00,00,00 {sg}"))?;
    ensure!(control(guest, sg)? & 4 != 0, "MODE SELECT changed nothing");
    let mark = guest.mark()?;
    for signal in ["KILL", "TERM", "KILL"] {
        stop_daemon(guest, signal)?;
        start_daemon(guest, "auto")?;
        guest
            .sh(&format!("timeout 60 dd if={device} of=/dev/null bs=4k count=1 iflag=direct status=none"))?;
        ensure!(control(guest, sg)? & 4 != 0, "SIG{signal} has set the mode page back");
    }
    let log = guest.kernel_log_since(&mark)?;
    for told in ["Power-on or device reset", "Mode parameters changed", "Capacity data has changed"] {
        ensure!(!log.contains(told), "the initiator was told: {log}");
    }
    delete(guest, "m")?;
    // A new device of the name is a new disk.
    let lun = create_on_loopback(guest, "m", "--image /scratch/m.raw")?;
    ensure!(control(guest, &lun.sg)? & 4 == 0, "a new disk has the old one's mode pages");
    delete(guest, "m")?;
    assert_nothing_left(guest)
}
