//! The harness shown on what is known to work: the kernel's own fileio, and tcmu-runner.
//!
//! When one of these fails, the VM is broken and not tcmu-dif.

use super::initiator::{file_system_with_verified_writes, geometry};
use super::{Run, Test};
use anyhow::{Result, ensure};

pub const TESTS: &[Test] = &[
    Test {
        name: "reference.fileio",
        promise: "the harness finds nothing wrong with LIO's fileio on loopback",
        limit: 240,
        group: Some("reference"),
        run: fileio,
    },
    Test {
        name: "reference.tcmu-runner",
        promise: "the real target_core_user works in the VM: tcmu-runner's qcow handler serves a disk",
        limit: 120,
        group: Some("reference"),
        run: tcmu_runner,
    },
    Test {
        name: "reference.notices-trouble",
        promise: "the harness sees a failing script, a script that hangs, an oops in the log and a task in D state",
        limit: 90,
        group: None,
        run: notices_trouble,
    },
];

/// Shell functions that build a loopback export by hand.
pub const LOOPBACK: &str = r#"
T=/sys/kernel/config/target
# export_loopback HBA/NAME NAA: prints the /dev/sdX
export_loopback() {
    local tpg=$T/loopback/$2/tpgt_1
    mkdir -p $tpg
    echo naa.5001405ffffffff0 > $tpg/nexus
    mkdir $tpg/lun/lun_0
    ln -s $T/core/$1 $tpg/lun/lun_0/link
    local host=$(cat $tpg/address); host=${host%%:*}
    for _ in $(seq 100); do
        for disk in /sys/class/scsi_device/$host:*/device/block/*; do
            [ -e "$disk" ] && { echo /dev/${disk##*/}; return; }
        done
        sleep 0.1
    done
    return 1
}
unexport_loopback() {
    local tpg=$T/loopback/$1/tpgt_1
    rm $tpg/lun/lun_0/link
    rmdir $tpg/lun/lun_0 $tpg $T/loopback/$1
}
"#;

fn fileio(run: &mut Run<'_>) -> Result<()> {
    let device = run.guest.sh(&format!(
        r#"{LOOPBACK}
        modprobe -a target_core_mod target_core_file tcm_loop
        mkdir -p $T/core/fileio_7/ref
        echo fd_dev_name=/scratch/ref.raw,fd_dev_size=268435456,fd_buffered_io=1 > $T/core/fileio_7/ref/control
        echo 1 > $T/core/fileio_7/ref/enable
        echo 1 > $T/core/fileio_7/ref/attrib/emulate_tpu
        # Without a serial number the kernel reports no VPD pages, and the initiator finds no UNMAP.
        echo reference > $T/core/fileio_7/ref/wwn/vpd_unit_serial
        export_loopback fileio_7/ref naa.5001405000000001"#
    ))?;
    ensure!(geometry(run.guest, &device)? == (256 << 20, 512));
    file_system_with_verified_writes(run.guest, &device, 32)?;
    run.guest.sh(&format!(
        "{LOOPBACK}
        unexport_loopback naa.5001405000000001
        rmdir $T/core/fileio_7/ref
        rm /scratch/ref.raw"
    ))?;
    Ok(())
}

fn tcmu_runner(run: &mut Run<'_>) -> Result<()> {
    run.guest.sh(START_TCMU_RUNNER)?;
    let device = run.guest.sh(&format!(
        r#"{LOOPBACK}
        truncate -s 64M /scratch/runner.raw
        mkdir -p $T/core/user_7/runner
        echo dev_size=$((64 << 20)),dev_config=qcow//scratch/runner.raw > $T/core/user_7/runner/control
        echo 1 > $T/core/user_7/runner/enable
        export_loopback user_7/runner naa.5001405000000002"#
    ))?;
    run.guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/random bs=1M count=8 status=none
         dd if=/tmp/random of={device} bs=1M oflag=direct status=none
         cmp -n $((8 << 20)) /tmp/random /scratch/runner.raw"
    ))?;
    run.guest.sh(&format!(
        "{LOOPBACK}
        unexport_loopback naa.5001405000000002
        rmdir $T/core/user_7/runner
        kill $(cat /run/tcmu-runner.pid)"
    ))?;
    Ok(())
}

/// Starts D-Bus and tcmu-runner and waits until it has opened its handlers.
pub const START_TCMU_RUNNER: &str = r#"
modprobe -a target_core_user tcm_loop
mkdir -p /run/dbus /etc/tcmu /var/log
[ -S /run/dbus/system_bus_socket ] || dbus-daemon --system --fork
setsid tcmu-runner > /scratch/tcmu-runner.out 2>&1 < /dev/null &
runner=$!
echo $runner > /run/tcmu-runner.pid
for _ in $(seq 100); do
    grep -q qcow <(dbus-send --system --print-reply --dest=org.kernel.TCMUService1 /org/kernel/TCMUService1 \
        org.freedesktop.DBus.Introspectable.Introspect 2>/dev/null) && kill -0 $runner && exit 0
    sleep 0.2
done
cat /scratch/tcmu-runner.out /var/log/tcmu-runner.log >&2
exit 1
"#;

fn notices_trouble(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let failed = guest.try_sh("echo out; echo err >&2; exit 3")?;
    ensure!(failed.status == Some(3) && failed.stdout == "out\n" && failed.stderr == "err\n");
    ensure!(guest.sh("false; true").is_err(), "a script's failing first line went unnoticed");
    let hangs = guest.run("sleep 60", true, std::time::Duration::from_secs(1))?;
    ensure!(hangs.timed_out && !hangs.ok());
    ensure!(guest.sh("echo still here")? == "still here");

    let mark = guest.mark()?;
    guest.assert_healthy()?;
    guest.sh("echo 'BUG: made up by a test' > /dev/kmsg")?;
    ensure!(guest.kernel_log_since(&mark)? == "BUG: made up by a test");
    ensure!(guest.assert_healthy().is_err(), "an oops went unnoticed");
    guest.sh("dmesg --clear")?;
    guest.assert_healthy()?;

    // A frozen file system keeps its writer in uninterruptible sleep for as long as one likes.
    guest.sh(
        "modprobe loop; truncate -s 64M /scratch/frozen && mkfs.ext4 -q /scratch/frozen && mkdir -p /mnt && mount -o loop /scratch/frozen /mnt
         fsfreeze --freeze /mnt
         (setsid touch /mnt/file > /dev/null 2>&1 < /dev/null &)
         sleep 0.5",
    )?;
    ensure!(guest.assert_healthy().is_err(), "a task in D state went unnoticed");
    guest.sh("fsfreeze --unfreeze /mnt && umount /mnt && dmesg --clear")?;
    Ok(())
}
