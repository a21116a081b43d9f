//! Jobs under load, against the real kernel: mirrors that a LUN goes over to while fio verifies what it writes.

use super::super::guest::{Guest, Mark};
use super::lun::{assert_image_clean, create_on_loopback, delete, show, start_daemon};
use super::{Run, Test, witness};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "jobs.backup-under-fio",
        promise: "a backup is the LUN as it was when it began, while fio overwrites it at QD32, and an incremental one what was written since; protection goes along",
        limit: 400,
        group: None,
        run: backup_under_fio,
    },
    Test {
        name: "jobs.mirror-under-fio",
        promise: "a LUN goes over to its mirror, and back, while fio verifies at QD32, with kill -9 before, in and after it: no I/O error, nothing lost",
        limit: 900,
        group: None,
        run: mirror_under_fio,
    },
];

/// `backups.sh DEVICE`: a full backup begins, slowly, and fio overwrites what has not been copied yet; then it may go on as fast as it can. Prints how many writes fio has done.
const BACKUPS: &str = r#"
device=$1
dd if=/dev/urandom of=/scratch/then.raw bs=1M count=48 status=none
dd if=/scratch/then.raw of=$device bs=1M oflag=direct status=none
written() { awk '{ print $5 }' /sys/block/${device#/dev/}/stat; }
before=$(written)
tcmu-dif bitmap add b increments --persistent > /dev/null
tcmu-dif backup b /scratch/full.qcow2 --format qcow2 --bitmap increments --speed 1M --background > /dev/null
fio --name=verify --filename=$device --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=32M --norandommap=1 \
    --verify=crc32c --verify_fatal=1 --verify_backlog=512 --time_based --runtime=30 --output-format=json > /tmp/fio.json 2> /tmp/fio.err &
fio=$!
for _ in $(seq 300); do [ $(($(written) - before)) -ge 200 ] && break; sleep 0.1; done
grep -q '"backup"' <(tcmu-dif job list --json) || { echo 'the backup was over before fio had begun'; exit 1; }
tcmu-dif job speed b 0 > /dev/null
wait $fio || { cat /tmp/fio.json /tmp/fio.err; exit 1; }
for _ in $(seq 600); do [ "$(tcmu-dif job list --json)" = '[]' ] && break; sleep 0.1; done
[ "$(tcmu-dif job list --json)" = '[]' ] || { echo 'the backup does not end'; tcmu-dif job list; exit 1; }
qemu-img compare -f raw -F qcow2 /scratch/then.raw /scratch/full.qcow2 > /dev/null
dd if=$device of=/scratch/now.raw bs=1M iflag=direct status=none
! cmp -s /scratch/then.raw /scratch/now.raw || { echo 'fio has changed nothing'; exit 1; }
tcmu-dif backup b /scratch/increment.qcow2 --format qcow2 --sync incremental --bitmap increments > /dev/null
cp /scratch/increment.qcow2 /scratch/put-over.qcow2
qemu-img rebase -u -f qcow2 -b /scratch/full.qcow2 -F qcow2 /scratch/put-over.qcow2
qemu-img compare -f raw -F qcow2 /scratch/now.raw /scratch/put-over.qcow2 > /dev/null
grep -o '"total_ios" : [0-9]*' /tmp/fio.json | tr -dc '0-9\n' | sort -n | tail -n 1
"#;

fn backup_under_fio(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("backups.sh"), BACKUPS)?;
    let options = "--image /scratch/b.qcow2 --size 48M --format qcow2 --pi type1";
    let lun = create_on_loopback(guest, "b", options)?;
    let mark = guest.mark()?;
    let script = format!("bash -euo pipefail /host/backups.sh {}", lun.device);
    let writes = guest.sh_within(Duration::from_secs(200), &script)?;
    guest.note(format!("the backup began before {} writes", writes.trim()));
    let log = guest.kernel_log_since(&mark)?;
    ensure!(!log.contains("I/O error, dev"), "errors at the guest:\n{log}");
    delete(guest, "b")?;
    for image in ["/scratch/full.qcow2", "/scratch/increment.qcow2", "/scratch/b.qcow2"] {
        assert_image_clean(guest, image, "qcow2", true)?;
    }
    let bitmaps = guest.json("qemu-img info --output=json /scratch/b.qcow2")?;
    let kept = &bitmaps["format-specific"]["data"]["bitmaps"];
    ensure!(kept[0]["name"] == "increments", "the bitmap is not in the image: {bitmaps}");
    Ok(())
}

/// `mirrors.sh DEVICE KILLS`: goes over from a raw image to a qcow2 one and back, round after round, for as long as fio writes and reads back
/// what it wrote; with KILLS 1 the daemon is killed and started again at a random moment of each round. Prints how often it went over.
const MIRRORS: &str = r#"
device=$1 kills=$2 over=0 round=0
back() {
    for _ in $(seq 600); do grep -q '"state": "online"' /run/tcmu-dif/luns/m.json 2>/dev/null && return; sleep 0.05; done
    echo "the LUN is not back after 30 s"; tail -n 20 /scratch/daemon.log; exit 1
}
fio --name=verify --filename=$device --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=32M \
    --verify=crc32c --verify_fatal=1 --verify_backlog=512 --time_based --runtime=120 > /tmp/fio.txt 2>&1 &
fio=$!
from=/scratch/m.raw to=/scratch/m.qcow2 format=qcow2
while kill -0 $fio 2>/dev/null; do
    rm -f $to $to.pi
    # In turns: in the background it may not catch up with whoever writes all the time.
    round=$((round + 1)); mode=$([ $((round % 2)) = 0 ] && echo background || echo write-blocking)
    timeout 60 tcmu-dif mirror m $to --format $format --copy-mode $mode --background > /tmp/mirror.txt 2>&1 || { cat /tmp/mirror.txt; exit 1; }
    if [ $kills = 1 ]; then
        readies=$(grep -c 'INFO ready:' /scratch/daemon.log)
        (sleep $((RANDOM % 4)).$((RANDOM % 10)); kill -9 $(cat /run/tcmu-dif/daemon.pid)
         setsid tcmu-dif daemon >> /scratch/daemon.log 2>&1 < /dev/null &) &
        killer=$!
    fi
    # A daemon that is killed meanwhile goes on with the job.
    for try in $(seq 200); do
        status=$(timeout 60 tcmu-dif job list --json 2>/dev/null)
        case $status in
            *'"ready"'*) timeout 60 tcmu-dif job complete m > /tmp/complete.txt 2>&1 && break ;;
            # Unless the next daemon has yet to find the LUN, and its job.
            '[]') [ $kills = 1 ] && [ $(grep -c 'INFO ready:' /scratch/daemon.log) -le $readies ] || break ;;
        esac
        if [ $mode = background ] && [ $try -gt 12 ]; then
            timeout 60 tcmu-dif job cancel m --force > /dev/null 2>&1 && break
        fi
        sleep 0.1
    done
    [ $kills = 1 ] && wait $killer
    back
    # The state file tells within a second or two.
    for _ in $(seq 25); do
        now=$(sed -n 's/.*"image": "\(.*\)",*/\1/p' /run/tcmu-dif/luns/m.json)
        [ "$now" = $to ] && break
        sleep 0.1
    done
    if [ "$now" = $to ]; then
        over=$((over + 1))
        [ $format = qcow2 ] && format=raw || format=qcow2
        next=$from from=$to to=$next
    else
        # Not begun, given up, or killed in the middle with fio at its end.
        timeout 60 tcmu-dif job cancel m --force > /dev/null 2>&1
    fi
done
wait $fio || { cat /tmp/fio.txt; exit 1; }
echo $over
"#;

fn mirror_under_fio(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("mirrors.sh"), MIRRORS)?;
    for kills in [0, 1] {
        guest.sh("rm -f /scratch/m.*")?;
        let options = "--image /scratch/m.raw --size 48M --format raw --pi type1";
        let lun = create_on_loopback(guest, "m", options)?;
        let mark = guest.mark()?;
        let script = format!("bash /host/mirrors.sh {} {kills}", lun.device);
        witness::start(guest, &lun.device, 40)?;
        let over = guest
            .sh_within(Duration::from_secs(400), &script)
            .with_context(|| format!("with {kills} kills a round"))?;
        witness::end(guest).with_context(|| format!("with {kills} kills a round"))?;
        guest.note(format!("{kills} kills a round: {} times gone over", over.trim()));
        // Two minutes are enough for a dozen times, or, where five other programs want the two processors, for one.
        ensure!(over.trim().parse::<u32>()? >= 1, "the LUN went over {over} times");
        went_over_unnoticed(guest, &lun.device, "m", &mark, kills)?;
    }
    Ok(())
}

/// By this log of its kernel's the guest has met no error, and was told of no power on.
pub(super) fn unnoticed(log: &str) -> Result<()> {
    let bad: Vec<&str> =
        log.lines().filter(|line| line.contains("check failed") || line.contains("I/O error, dev")).collect();
    ensure!(bad.is_empty(), "errors at the guest: {bad:#?}");
    ensure!(!log.contains("Power-on or device reset"), "the guest was told of a power on");
    Ok(())
}

/// Looks at a LUN whose image has changed under load, since `mark` in the kernel's log: the guest has met no error, the kernel knows the image, and what the guest reads is in it. Takes
/// the LUN down.
pub(super) fn went_over_unnoticed(
    guest: &mut Guest,
    device: &str,
    name: &str,
    mark: &Mark,
    kills: u32,
) -> Result<()> {
    unnoticed(&guest.kernel_log_since(mark)?)?;

    // The kernel's own idea of the image is the LUN's, a moment later.
    let image = guest.sh(&format!(
        r#"for _ in $(seq 100); do
            image=$(sed -n 's/.*"image": "\(.*\)",*/\1/p' /run/tcmu-dif/luns/{name}.json)
            grep -q "^dif/$image;" /sys/kernel/config/target/core/user_*/{name}/attrib/dev_config && echo $image && exit 0
            sleep 0.1
        done
        cat /sys/kernel/config/target/core/user_*/{name}/attrib/dev_config /sys/class/uio/uio*/name >&2; exit 1"#
    ))?;
    let image = image.trim();
    ensure!(show(guest, name)?["image"] == image);
    guest.sh(&format!("dd if={device} iflag=direct bs=1M of=/scratch/{name}.copy status=none"))?;
    let format = if image.ends_with("qcow2") { "qcow2" } else { "raw" };
    delete(guest, name)?;
    guest.sh(&format!("qemu-img compare -f raw -F {format} /scratch/{name}.copy {image}"))?;
    // A kill may leak a cluster of a qcow2 image.
    let strictly = if kills == 0 { format } else { "raw" };
    assert_image_clean(guest, image, strictly, true)
}
