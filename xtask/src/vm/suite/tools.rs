//! Other people's tools, unmodified, on LUNs of ours: Debian's targetcli and targetctl, and rtslib from Python.

use super::super::guest::Guest;
use super::lun::{assert_image_clean, daemon_pid, start_daemon, stop_daemon};
use super::reference::START_TCMU_RUNNER;
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "tools.targetcli",
        promise: "targetcli lists user:dif, makes LUNs, refuses wrong strings in our words, and restores the same disk from its saved configuration",
        limit: 600,
        group: None,
        run: targetcli,
    },
    Test {
        name: "tools.targetcli-beside-tcmu-runner",
        promise: "where tcmu-runner has the D-Bus name, targetcli sees its handlers and ours, and makes LUNs of both",
        limit: 400,
        group: None,
        run: beside_tcmu_runner,
    },
    Test {
        name: "tools.rtslib",
        promise: "rtslib's UserBackedStorageObject, from Python, makes, finds and deletes a LUN, and hears when it cannot be served",
        limit: 300,
        group: None,
        run: rtslib,
    },
];

/// The system bus with our policy, and without tcmu-runner's.
fn start_bus(guest: &mut Guest) -> Result<()> {
    let policy = include_str!("../../../../dist/dbus/tcmu-dif.conf");
    guest.sh(&format!(
        "mkdir -p /run/dbus /etc/rtslib-fb-target
         rm -f /etc/dbus-1/system.d/tcmu-runner.conf
         cat > /usr/share/dbus-1/system.d/tcmu-dif.conf <<'END'\n{policy}\nEND
         dbus-daemon --system --fork"
    ))?;
    Ok(())
}

/// Waits until an object is there for our subtype.
fn wait_for_service(guest: &mut Guest) -> Result<()> {
    guest
        .sh("for _ in $(seq 100); do
                 grep -q TCMUService1/dif <(dbus-send --system --print-reply --dest=org.kernel.TCMUService1 \
                     /org/kernel/TCMUService1 org.freedesktop.DBus.ObjectManager.GetManagedObjects 2>/dev/null) && exit 0
                 sleep 0.3
             done
             tail -n 20 /scratch/daemon.log >&2; exit 1")
        .context("nothing on D-Bus")
        .map(drop)
}

/// What targetcli says, whether it likes it or not; blanks are left out, since it breaks lines where a terminal would.
fn says(guest: &mut Guest, words: &str) -> Result<String> {
    let output = guest.run(&format!("targetcli '{words}' 2>&1"), false, Duration::from_secs(90))?;
    ensure!(!output.timed_out, "targetcli hangs at {words}");
    Ok(output.stdout.split_whitespace().collect())
}

/// A command that must do.
fn does(guest: &mut Guest, words: &str) -> Result<String> {
    let limit = Duration::from_secs(90);
    guest.sh_within(
        limit,
        &format!("targetcli '{words}' 2>&1 || {{ tail -n 30 /scratch/daemon.log; exit 1; }}"),
    )
}

const TARGET: &str = "naa.5001405000000031";

/// Exports a backstore with targetcli's own loopback, and gives the disk.
fn export(guest: &mut Guest, plugin: &str, name: &str) -> Result<String> {
    does(guest, &format!("/loopback create {TARGET}"))?;
    does(guest, &format!("/loopback/{TARGET}/luns create /backstores/{plugin}/{name}"))?;
    disk(guest)
}

fn disk(guest: &mut Guest) -> Result<String> {
    guest.sh(&format!(
        "host=$(cat /sys/kernel/config/target/loopback/{TARGET}/tpgt_1/address); host=${{host%%:*}}
         for _ in $(seq 100); do
             for disk in /sys/class/scsi_device/$host:*/device/block/*; do
                 [ -e \"$disk\" ] && {{ echo /dev/${{disk##*/}}; exit 0; }}
             done
             sleep 0.1
         done; exit 1"
    ))
}

/// The serial number that the disk tells, and the one that LIO was given.
fn serials(guest: &mut Guest, device: &str, name: &str) -> Result<(String, String)> {
    let told = guest.sh(&format!("sg_inq --page=0x80 {device} | sed -n 's/.*serial number: *//p'"))?;
    let given = guest
        .sh(&format!("sed 's/.*: //' /sys/kernel/config/target/core/user_*/{name}/wwn/vpd_unit_serial"))?;
    Ok((told.trim().to_owned(), given.trim().to_owned()))
}

fn targetcli(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_bus(guest)?;
    start_daemon(guest, "auto")?;
    wait_for_service(guest)?;
    ensure!(does(guest, "/backstores ls")?.contains("user:dif"), "targetcli does not list user:dif");
    ensure!(does(guest, "/backstores/user:dif help create")?.contains("pi=type1"), "no description");

    guest.sh("tcmu-dif image create -f qcow2 /scratch/vm1.qcow2 64M; tcmu-dif image create -f raw /scratch/plain.raw 64M")?;
    let create = |name: &str, size: &str, config: &str| {
        format!("/backstores/user:dif create name={name} size={size} cfgstring={config}")
    };
    let config = "/scratch/vm1.qcow2;pi=type1;cache=none";
    for (string, words) in [
        ("vm1.qcow2", "isnotabsolute"),
        (
            "/scratch/none.qcow2",
            "next:checkthepath,orcreatetheimage:tcmu-difimagecreate-fqcow2/scratch/none.qcow2",
        ),
        ("/scratch/vm1.qcow2;pi=type4", "\"type4\"isnovalueforpi"),
        ("/scratch/vm1.qcow2;colour=red", "unknownsetting\"colour=red\""),
        ("/etc", "directory"),
        (config, "thereisnosidecar;next:makeit:tcmu-difpirebuild/scratch/vm1.qcow2--pitype1"),
    ] {
        let said = says(guest, &create("wrong", "64M", string))?;
        ensure!(said.contains("cfgstringinvalid") && said.contains(words), "{string}: targetcli says {said}");
    }
    guest.sh("tcmu-dif pi rebuild /scratch/vm1.qcow2 --pi type1")?;
    let said = says(guest, &create("wrong", "65M", config))?;
    ensure!(said.contains("creationfailed"), "another size than the image's passed: {said}");
    guest.sh("grep -q 'has 67108864 bytes, and the LUN was created with 68157440' /scratch/daemon.log")?;
    ensure!(
        guest.sh("ls /sys/kernel/config/target/core | grep -c user_ || true")? == "0",
        "something is left"
    );

    does(guest, &create("vm1", "64M", config))?;
    does(guest, &create("plain", "64M", "/scratch/plain.raw;cachesize=1M"))?;
    let device = export(guest, "user:dif", "vm1")?;
    let (told, given) = serials(guest, &device, "vm1")?;
    ensure!(!given.is_empty() && told == given, "the disk tells {told:?}, and LIO was given {given:?}");
    let limit = guest.sh("cat /sys/kernel/config/target/core/user_*/vm1/attrib/cmd_time_out")?;
    ensure!(limit == "90", "a command has {limit} s: less than a restart may take");
    guest.sh(&format!(
        "dd if=/dev/urandom of=/scratch/random bs=1M count=8 status=none
         dd if=/scratch/random of={device} bs=1M oflag=direct status=none"
    ))?;
    let listed = does(guest, "/backstores/user:dif ls")?;
    ensure!(listed.contains("vm1") && listed.contains("plain") && listed.contains("activated"), "{listed}");
    let said = says(guest, &create("twice", "64M", config))?;
    ensure!(said.contains("isinuse"), "an image in use passed: {said}");
    does(guest, "/backstores/user:dif delete plain")?;
    does(guest, "saveconfig")?;

    for gone in ["cleared", "restarted"] {
        does(guest, "clearconfig confirm=True")?;
        assert_image_clean(guest, "/scratch/vm1.qcow2", "qcow2", true)?;
        if gone == "restarted" {
            // A daemon that has never seen the device.
            stop_daemon(guest, "TERM")?;
            start_daemon(guest, "auto")?;
        }
        guest
            .sh_within(
                Duration::from_secs(90),
                "targetctl restore 2>&1 | tee /tmp/restore.txt; [ ! -s /tmp/restore.txt ]",
            )
            .with_context(|| format!("{gone}: targetctl restore complains"))?;
        let device = disk(guest)?;
        let again = serials(guest, &device, "vm1")?;
        ensure!(again == (told.clone(), given.clone()), "{gone}: before {told}, after {again:?}");
        guest.sh(&format!(
            "cmp -n $((8 << 20)) /scratch/random <(dd if={device} bs=1M count=8 iflag=direct status=none)"
        ))?;
        ensure!(guest.sh("tcmu-dif list")?.contains("online"), "{gone}: not online");
    }
    does(guest, "clearconfig confirm=True")?;
    daemon_pid(guest)?;
    Ok(())
}

fn beside_tcmu_runner(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    // tcmu-runner second: the name is ours, it waits, and gets it.
    guest.sh("mkdir -p /etc/rtslib-fb-target /run/dbus; dbus-daemon --system --fork")?;
    start_daemon(guest, "auto")?;
    wait_for_service(guest)?;
    guest.sh(START_TCMU_RUNNER)?;
    wait_for_service(guest)?;
    let listed = does(guest, "/backstores ls")?;
    ensure!(listed.contains("user:dif") && listed.contains("user:qcow"), "{listed}");

    guest.sh("tcmu-dif image create -f raw /scratch/a.raw 64M; truncate -s 64M /scratch/b.raw")?;
    let said = says(guest, "/backstores/user:dif create name=a size=64M cfgstring=/scratch/none.raw")?;
    ensure!(said.contains("nosuchfile"), "the question was not passed on: {said}");
    does(
        guest,
        "/backstores/user:dif create name=a size=64M cfgstring=/scratch/a.raw control=nl_reply_supported=-1",
    )?;
    does(guest, "/backstores/user:qcow create name=b size=64M cfgstring=/scratch/b.raw")?;
    let device = export(guest, "user:dif", "a")?;
    let (told, given) = serials(guest, &device, "a")?;
    ensure!(told == given, "the disk tells {told:?}, and LIO was given {given:?}");
    guest.sh(&format!(
        "dd if=/dev/urandom of=/scratch/random bs=1M count=4 status=none
         dd if=/scratch/random of={device} bs=1M oflag=direct status=none
         cmp -n $((4 << 20)) /scratch/random /scratch/a.raw"
    ))?;
    does(guest, &format!("/loopback delete {TARGET}"))?;
    does(guest, "/backstores/user:dif delete a")?;
    does(guest, "/backstores/user:qcow delete b")?;

    // It goes, and the name is ours again.
    guest.sh("kill $(cat /run/tcmu-runner.pid)
         for _ in $(seq 100); do
             [ $(grep -c 'user:dif (org.kernel.TCMUService1 on D-Bus)' /scratch/daemon.log) = 2 ] && exit 0
             sleep 0.3
         done; exit 1")?;
    let listed = does(guest, "/backstores ls")?;
    ensure!(listed.contains("user:dif") && !listed.contains("user:qcow"), "{listed}");
    daemon_pid(guest)?;
    Ok(())
}

fn rtslib(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    guest.sh("tcmu-dif image create -f qcow2 /scratch/p.qcow2 64M")?;
    let said = guest.sh_within(
        Duration::from_secs(120),
        r#"python3 - <<'END'
from rtslib_fb import RTSRoot, RTSLibError, UserBackedStorageObject as User
made = User("p", config="dif//scratch/p.qcow2", size=64 << 20, wwn="serial-of-p")
assert made.wwn == "serial-of-p", made.wwn
found = [s for s in RTSRoot().storage_objects if s.name == "p"]
assert len(found) == 1 and found[0].config == "dif//scratch/p.qcow2" and found[0].size == 64 << 20
dump = made.dump()
made.delete()
try:
    User("q", config="dif//scratch/none.qcow2", size=64 << 20)
    raise SystemExit("an image that is not there was taken")
except OSError as e:
    print(e.errno)
again = User(dump["name"], config=dump["config"], size=dump["size"], wwn=dump["wwn"], hw_max_sectors=dump["hw_max_sectors"], control=dump["control"])
for name, value in dump["attributes"].items():
    again.set_attribute(name, value)
assert again.dump() == dump, (again.dump(), dump)
again.delete()
END"#,
    )?;
    ensure!(said == "2", "rtslib hears errno {said}, and not 2: no such file");
    daemon_pid(guest)?;
    assert_image_clean(guest, "/scratch/p.qcow2", "qcow2", false)
}
