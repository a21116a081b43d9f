//! LUNs that come, go, grow and share the host, and a daemon that goes away and comes back.

use super::super::guest::{Guest, patience};
use super::initiator::{fio, geometry};
use super::jobs::unnoticed;
use super::lun::{
    assert_image_clean, assert_nothing_left, create_on_loopback, daemon_pid, delete, names, show,
    start_daemon, stop_daemon,
};
use super::reference::{LOOPBACK, START_TCMU_RUNNER};
use super::{Run, Test, witness};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "lifecycle.resize",
        promise: "a LUN that grows in use tells its initiator, keeps its data and can be written to its new end",
        limit: 240,
        group: None,
        run: resize,
    },
    Test {
        name: "lifecycle.many",
        promise: "64 LUNs (256 at full scale) created at the same time all come up, each its own disk, and go again at the same time",
        limit: 900,
        group: None,
        run: many,
    },
    Test {
        name: "lifecycle.same-name",
        promise: "of many who create and delete one name at the same time each gets an answer, and the LUN is whole or gone",
        limit: 300,
        group: None,
        run: same_name,
    },
    Test {
        name: "lifecycle.removal-under-load",
        promise: "a LUN removed with I/O in flight hangs nothing, and hurts no other LUN",
        limit: 240,
        group: None,
        run: removal_under_load,
    },
    Test {
        name: "lifecycle.beside-tcmu-runner",
        promise: "tcmu-runner on the same host is left alone and leaves us alone",
        limit: 240,
        group: None,
        run: beside_tcmu_runner,
    },
    Test {
        name: "lifecycle.late-daemon",
        promise: "a daemon that starts late serves the devices that are there already",
        limit: 180,
        group: None,
        run: late_daemon,
    },
    Test {
        name: "lifecycle.kill-9",
        promise: "no write that was acknowledged is lost when the daemon is killed, and a new one goes on serving",
        limit: 300,
        group: None,
        run: kill_9,
    },
    Test {
        name: "lifecycle.kill-9-under-fio",
        promise: "fio's own verification goes on across kill -9 at random moments, in both modes of PI: no false alarm, nothing answered is lost or done twice",
        limit: 900,
        group: None,
        run: kill_9_under_fio,
    },
    Test {
        name: "lifecycle.killed-create",
        promise: "whatever a create or delete that is killed at a random moment leaves, delete takes down, and create makes anew",
        limit: 600,
        group: None,
        run: killed_create,
    },
];

fn resize(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    for format in ["raw", "qcow2"] {
        let image = format!("/scratch/grow.{format}");
        let lun = create_on_loopback(
            guest,
            "grow",
            &format!("--image {image} --size 64M --format {format} --pi type1"),
        )?;
        let device = &lun.device;
        guest.sh(&format!(
            "dd if=/dev/urandom of=/scratch/model bs=1M count=8 status=none
             dd if=/scratch/model of={device} bs=1M oflag=direct status=none
             cd /tmp; setsid fio --name=load --filename={device} --offset=16M --size=16M --rw=randrw --bs=4k --direct=1 \
                 --ioengine=libaio --iodepth=8 --time_based --runtime=8 --output=/tmp/load.txt > /dev/null 2>&1 < /dev/null &
             echo $! > /tmp/load.pid; sleep 2"
        ))?;
        let mark = guest.mark()?;
        guest.json("timeout 60 tcmu-dif resize grow 128M --json")?;
        // Whoever sends the next command is told; here that is fio's through the kernel, which says so in its log.
        guest.sh("for _ in $(seq 150); do kill -0 $(cat /tmp/load.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1")?;
        let load = guest.sh("cat /tmp/load.txt")?;
        ensure!(load.contains("err= 0"), "the load met an error:\n{load}");
        let log = guest.kernel_log_since(&mark)?;
        ensure!(
            log.contains("Capacity data has changed"),
            "the initiator heard no unit attention 2Ah/09h:\n{log}"
        );
        guest.sh(&format!("echo 1 > /sys/block/$(basename {device})/device/rescan"))?;
        ensure!(geometry(guest, device)?.0 == 128 << 20, "the initiator sees no new capacity");
        ensure!(show(guest, "grow")?["capacity_bytes"] == 128u64 << 20);
        guest.sh(&format!(
            "cmp -n $((8 << 20)) /scratch/model <(dd if={device} iflag=direct bs=1M count=8 status=none)
             dd if=/scratch/model of={device} oflag=direct bs=1M seek=120 status=none
             cmp -n $((8 << 20)) /scratch/model <(dd if={device} iflag=direct bs=1M skip=120 status=none)"
        ))?;
        delete(guest, "grow")?;
        assert_image_clean(guest, &image, format, true)?;
        let info = guest.json(&format!("qemu-img info --output=json -f {format} {image}"))?;
        ensure!(info["virtual-size"] == 128u64 << 20, "{info}");
    }
    Ok(())
}

fn many(run: &mut Run<'_>) -> Result<()> {
    let luns: usize = run.scale.pick(16, 64, 256);
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let pid = daemon_pid(guest)?;
    let limit = Duration::from_secs(if luns > 64 { 800 } else { 240 });
    let patience = 200 * patience();
    guest.sh_within(
        limit,
        &format!(
            "mkdir -p /scratch/many && cd /scratch/many
             seq {luns} | xargs -P 64 -I N sh -c 'timeout {patience} tcmu-dif create mN --image /scratch/many/N.raw --size 16M \
                 --format raw --pi type1 --export loopback --json > N.json 2> N.err || echo mN: exit $? $(cat N.err) >&2 && test -s N.json'"
        ),
    )?;
    let found = names(guest)?;
    ensure!(found.len() == luns, "{} LUNs of {luns} are listed", found.len());
    let devices = guest.sh("cd /scratch/many && cat *.json | grep -o '/dev/sd[a-z]*' | sort -u | wc -l")?;
    ensure!(devices == luns.to_string(), "{devices} disks of {luns}");
    // Each is its own disk: write its number, read it back, look into its file.
    guest.sh_within(
        limit,
        &format!(
            "cd /scratch/many
             for n in $(seq {luns}); do
                 disk=$(grep -o -m 1 '/dev/sd[a-z]*' $n.json)
                 printf '%-4096s' \"LUN $n\" | dd of=$disk bs=4096 seek=3 oflag=direct status=none
             done
             for n in $(seq {luns}); do
                 grep -q \"^LUN $n \" <(dd if=$n.raw bs=4096 skip=3 count=1 status=none) || {{ echo $n.raw holds another; exit 1; }}
             done"
        ),
    )?;
    guest.sh_within(
        limit,
        &format!("seq {luns} | xargs -P 64 -I N timeout {patience} tcmu-dif delete mN > /dev/null"),
    )?;
    ensure!(names(guest)?.is_empty());
    ensure!(daemon_pid(guest)? == pid, "the daemon is not the one it was");
    assert_nothing_left(guest)
}

fn same_name(run: &mut Run<'_>) -> Result<()> {
    let rounds = run.scale.pick(1, 3, 10);
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let pid = daemon_pid(guest)?;
    guest.sh("mkdir -p /scratch/twin && cd /scratch/twin && truncate -s 16M a.raw b.raw")?;
    for _ in 0..rounds {
        // Six want it on one image, six on the other.
        let created = guest.sh(
            "cd /scratch/twin && rm -f *.json *.err
             seq 12 | xargs -P 12 -I N sh -c 'image=a; [ $((N % 2)) = 0 ] && image=b
                 timeout 90 tcmu-dif create twin --image /scratch/twin/$image.raw --export loopback --json > N.json 2> N.err
                 echo $? > N.status'
             cat *.status | sort | uniq -c; cat *.err",
        )?;
        let statuses = guest.sh("cat /scratch/twin/*.status | sort -u | tr '\\n' ' '")?;
        ensure!(
            statuses.split_whitespace().all(|s| ["0", "1"].contains(&s)) && statuses.contains('0'),
            "{created}"
        );
        ensure!(names(guest)? == ["twin"], "{created}");
        // All who were told "up" were told of the same LUN.
        let told = guest.sh(
            "cd /scratch/twin && for n in $(seq 12); do [ $(cat $n.status) != 0 ] || grep -h '\"image\"' $n.json; done | sort -u | wc -l",
        )?;
        ensure!(told == "1", "two images are up as one LUN:\n{created}");
        let disk = show(guest, "twin")?["exports"][0]["device"].as_str().unwrap_or_default().to_owned();
        guest.sh(&format!("dd if=/dev/urandom of={disk} bs=64k count=4 oflag=direct status=none"))?;
        let deleted = guest.sh(
            "cd /scratch/twin && seq 12 | xargs -P 12 -I N sh -c 'timeout 90 tcmu-dif delete twin > /dev/null 2> N.err; echo $?' |
             sort | uniq -c; cat *.err",
        )?;
        ensure!(!deleted.contains("124"), "a delete hangs:\n{deleted}");
        ensure!(names(guest)?.is_empty(), "{deleted}");
        assert_nothing_left(guest)?;
        // Both at once: whatever is left afterwards can be deleted, and then nothing is.
        guest.sh_within(
            Duration::from_secs(120),
            "cd /scratch/twin && seq 12 | xargs -P 12 -I N sh -c '
                 if [ $((N % 2)) = 0 ]; then timeout 90 tcmu-dif delete twin; \
                 else timeout 90 tcmu-dif create twin --image /scratch/twin/a.raw --export loopback; fi > N.out 2>&1
                 [ $? -le 1 ] || echo N >> hangs'
             [ ! -e hangs ]",
        )?;
        if !names(guest)?.is_empty() {
            delete(guest, "twin")?;
        }
        assert_nothing_left(guest)?;
    }
    ensure!(daemon_pid(guest)? == pid, "the daemon is not the one it was");
    Ok(())
}

fn removal_under_load(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let pid = daemon_pid(guest)?;
    let spared = create_on_loopback(
        guest,
        "spared",
        "--image /scratch/spared.raw --size 64M --format raw --pi type1",
    )?;
    for round in 0..run.scale.pick(1, 2, 5) {
        let lun = create_on_loopback(
            guest,
            "doomed",
            &format!("--image /scratch/doomed{round}.qcow2 --size 256M --format qcow2 --pi type1"),
        )?;
        guest.sh(&format!(
            "cd /tmp; setsid fio --name=load --filename={} --rw=randrw --bs=16k --direct=1 --ioengine=libaio --iodepth=32 \
                 --time_based --runtime=60 > /tmp/load.txt 2>&1 < /dev/null &
             echo $! > /tmp/load.pid; sleep 3; kill -0 $(cat /tmp/load.pid)",
            lun.device
        ))?;
        let busy = guest.try_sh("timeout 30 tcmu-dif delete doomed")?;
        ensure!(busy.status == Some(1), "a disk in use was deleted without --force: {busy:?}");
        guest.sh("timeout 60 tcmu-dif delete doomed --force").context("delete --force under load")?;
        guest
            .sh("for _ in $(seq 300); do kill -0 $(cat /tmp/load.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1")
            .context("fio hangs after its disk was removed")?;
        ensure!(daemon_pid(guest)? == pid, "the daemon is not the one it was");
        ensure!(names(guest)? == ["spared"]);
        let report = guest
            .json(&format!("qemu-img check --output=json -f qcow2 /scratch/doomed{round}.qcow2 || true"))?;
        ensure!(report["corruptions"].as_u64().unwrap_or(0) == 0, "{report}");
    }
    fio(
        guest,
        Duration::from_secs(90),
        &format!(
            "--filename={} --size=16M --rw=randwrite --bs=4k --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c",
            spared.device
        ),
    )?;
    delete(guest, "spared")?;
    assert_nothing_left(guest)
}

fn beside_tcmu_runner(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    guest.sh(START_TCMU_RUNNER)?;
    let runner_disk = |n: u32| {
        format!(
            r#"{LOOPBACK}
            truncate -s 64M /scratch/runner{n}.raw
            mkdir -p $T/core/user_{n}/runner{n}
            echo dev_size=$((64 << 20)),dev_config=qcow//scratch/runner{n}.raw > $T/core/user_{n}/runner{n}/control
            echo 1 > $T/core/user_{n}/runner{n}/enable
            export_loopback user_{n}/runner{n} naa.500140500000007{n}"#
        )
    };
    let works = |disk: &str| {
        format!(
            "dd if=/dev/urandom of=/tmp/random bs=1M count=2 status=none
             dd if=/tmp/random of={disk} bs=1M oflag=direct status=none
             cmp -n $((2 << 20)) /tmp/random <(dd if={disk} bs=1M count=2 iflag=direct status=none)"
        )
    };
    // Its disk from before us, ours, and one of its own made while we listen.
    let theirs = guest.sh(&runner_disk(8))?;
    start_daemon(guest, "auto")?;
    let lun = create_on_loopback(
        guest,
        "ours",
        "--image /scratch/ours.qcow2 --size 64M --format qcow2 --pi type1",
    )?;
    let theirs_too = guest.sh(&runner_disk(9))?;
    for disk in [&theirs, &lun.device, &theirs_too] {
        guest.sh(&works(disk)).with_context(|| format!("{disk} does not work"))?;
    }
    ensure!(names(guest)? == ["ours"], "we list what is not ours");
    delete(guest, "ours")?;
    for disk in [&theirs, &theirs_too] {
        guest.sh(&works(disk)).with_context(|| format!("{disk} does not work after our delete"))?;
    }
    let lun = create_on_loopback(guest, "ours", "--image /scratch/ours.qcow2 --pi type1")?;
    guest.sh(&works(&lun.device))?;
    for n in [8, 9] {
        guest.sh(&format!(
            "{LOOPBACK}
            unexport_loopback naa.500140500000007{n}
            rmdir $T/core/user_{n}/runner{n}"
        ))?;
    }
    guest.sh(&works(&lun.device))?;
    delete(guest, "ours")?;
    guest.sh("kill -0 $(cat /run/tcmu-runner.pid)").context("tcmu-runner is gone")?;
    daemon_pid(guest)?;
    assert_nothing_left(guest)
}

fn late_daemon(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let lun = create_on_loopback(
        guest,
        "kept",
        "--image /scratch/kept.qcow2 --size 64M --format qcow2 --pi type1",
    )?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/scratch/model bs=1M count=8 status=none
         dd if=/scratch/model of={} bs=1M oflag=direct status=none",
        lun.device
    ))?;
    let identity = format!("sg_vpd --page=sn {0}; sg_vpd --page=di {0}", lun.sg);
    let before = guest.sh(&identity)?;
    let serial = lun.report["serial"].as_str().unwrap_or("?");
    ensure!(before.contains(serial), "{serial} is not what the initiator sees:\n{before}");
    stop_daemon(guest, "TERM")?;
    // One that was made by hand while nobody listened.
    guest.sh(
        "truncate -s 32M /scratch/hand.raw
         mkdir -p /sys/kernel/config/target/core/user_90/hand && cd /sys/kernel/config/target/core/user_90/hand
         echo dev_size=$((32 << 20)),nl_reply_supported=-1,hw_block_size=512 > control
         echo dev_config=dif//scratch/hand.raw > control
         echo 1 > enable",
    )?;
    start_daemon(guest, "auto")?;
    let mut found = Vec::new();
    for _ in 0..50 {
        found = names(guest)?;
        found.sort();
        if found == ["hand", "kept"] {
            break;
        }
        guest.sh("sleep 0.2")?;
    }
    ensure!(found == ["hand", "kept"], "after the restart there are {found:?}");
    guest.sh(&format!(
        "cmp -n $((8 << 20)) /scratch/model <(dd if={} bs=1M iflag=direct status=none)",
        lun.device
    ))?;
    ensure!(guest.sh(&identity)? == before, "the disk's identity changed with the restart");
    let hand = guest.sh(&format!("{LOOPBACK} export_loopback user_90/hand naa.5001405000000091"))?;
    guest.sh(&format!(
        "dd if=/scratch/model of={hand} bs=1M oflag=direct status=none
         cmp -n $((8 << 20)) /scratch/model /scratch/hand.raw
         {LOOPBACK}
         unexport_loopback naa.5001405000000091
         rmdir $T/core/user_90/hand"
    ))?;
    delete(guest, "kept")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, "/scratch/kept.qcow2", "qcow2", true)
}

/// Writes numbered blocks past the page cache from several threads until it is told to stop, and notes each that was
/// acknowledged; one writer a block, so the last acknowledged number is what the block must hold.
const WRITER: &str = r#"
import mmap, os, sys, threading, time
disk, blocks, threads = sys.argv[1], 2048, 8
fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
acked, errors = {}, 0
def work(me):
    global errors
    page = mmap.mmap(-1, 4096)
    number = 0
    while not os.path.exists("/tmp/stop"):
        number += 1
        block = me + threads * ((number * 7919) % (blocks // threads))
        page[:] = (b"%d %d\n" % (block, number)).ljust(4096, b".")
        try:
            done = os.pwrite(fd, page, block * 4096) == 4096
        except OSError:
            done = False
        if done:
            acked[block] = number
        else:
            # Nobody knows what the block holds now: either is right.
            acked.pop(block, None)
            errors += 1
            time.sleep(0.05)
workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
for w in workers: w.start()
for w in workers: w.join()
page, lost = mmap.mmap(-1, 4096), 0
for block, number in acked.items():
    os.preadv(fd, [page], block * 4096)
    if page[:].rstrip(b".") != b"%d %d\n" % (block, number):
        lost += 1
        print("block", block, "acknowledged", number, "holds", page[:40])
print("acknowledged", len(acked), "errors", errors, "lost", lost)
sys.exit(1 if lost or not acked else 0)
"#;

fn kill_9(run: &mut Run<'_>) -> Result<()> {
    let rounds = run.scale.pick(1, 3, 8);
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("writer.py"), WRITER)?;
    for format in ["raw", "qcow2"] {
        let image = format!("/scratch/k.{format}");
        let lun = create_on_loopback(
            guest,
            "k",
            &format!("--image {image} --size 64M --format {format} --pi type1"),
        )?;
        guest.sh(&format!(
            "rm -f /tmp/stop; setsid python3 /host/writer.py {} > /tmp/writer.txt 2>&1 < /dev/null &
             echo $! > /tmp/writer.pid",
            lun.device
        ))?;
        for _ in 0..rounds {
            guest.sh("sleep 1.5")?;
            stop_daemon(guest, "KILL")?;
            guest.sh("sleep 0.5")?;
            start_daemon(guest, "auto")?;
        }
        guest.sh("sleep 1.5; touch /tmp/stop")?;
        guest
            .sh("for _ in $(seq 400); do kill -0 $(cat /tmp/writer.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1")
            .context("the writer hangs after the daemon came back")?;
        let said = guest.sh("cat /tmp/writer.txt")?;
        ensure!(
            said.contains(" lost 0") && !said.contains("Traceback"),
            "acknowledged writes are lost ({format}):\n{said}"
        );
        delete(guest, "k")?;
        let check = guest.try_sh(&format!("qemu-img check --output=json -f {format} {image}"))?;
        if format == "qcow2" {
            let report: serde_json::Value = serde_json::from_str(&check.stdout)?;
            // A crash may leak a cluster; a reference to a free one would be corruption.
            ensure!(report["corruptions"].as_u64().unwrap_or(0) == 0, "{report}");
        }
        assert_image_clean(guest, &image, "raw", true)?;
    }
    Ok(())
}

/// `kills.sh DEVICE KILLS`: kills and restarts the daemon at random moments until it has done so as often as it should, while fio writes
/// and reads back what it wrote; ends with an error if fio finds one, or if a LUN does not come back.
const KILLS: &str = r#"
device=$1 wanted=$2 kills=0
back() {
    for _ in $(seq 600); do grep -q '"state": "online"' /run/tcmu-dif/luns/k.json 2>/dev/null && return; sleep 0.05; done
    echo "the LUN is not back after 30 s"; tail -n 20 /scratch/daemon.log; exit 1
}
while [ $kills -lt $wanted ]; do
    seconds=$((wanted - kills > 10 ? 90 : 5))
    fio --name=verify --filename=$device --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=16M \
        --verify=crc32c --verify_fatal=1 --verify_backlog=512 --time_based --runtime=$seconds --randseed=$kills > /tmp/fio.txt 2>&1 &
    fio=$!
    while kill -0 $fio 2>/dev/null; do
        sleep $((RANDOM % 2)).$((RANDOM % 10))$((RANDOM % 10))
        kill -9 $(cat /run/tcmu-dif/daemon.pid)
        setsid tcmu-dif daemon >> /scratch/daemon.log 2>&1 < /dev/null &
        kills=$((kills + 1))
        back
    done
    wait $fio || { cat /tmp/fio.txt; exit 1; }
done
echo $kills
"#;

fn kill_9_under_fio(run: &mut Run<'_>) -> Result<()> {
    let wanted = run.scale.pick(3, 10, 100);
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("kills.sh"), KILLS)?;
    for (mode, format) in [("bitmap", "qcow2"), ("journal", "raw")] {
        let image = format!("/scratch/{mode}.{format}");
        let options = format!("--image {image} --size 64M --format {format} --pi type1 --pi-mode {mode}");
        let lun = create_on_loopback(guest, "k", &options)?;
        let mark = guest.mark()?;
        witness::start(guest, &lun.device, 32)?;
        let kills = guest
            .sh_within(Duration::from_secs(440), &format!("bash /host/kills.sh {} {wanted}", lun.device))
            .with_context(|| format!("mode {mode}"))?;
        witness::end(guest).with_context(|| format!("mode {mode}"))?;
        guest.note(format!("{mode}, {format}: {kills} kills"));
        // Each daemon knew what its predecessor had answered: nothing was given back as BUSY, and no initiator was told of a power on.
        unnoticed(&guest.kernel_log_since(&mark)?).context(mode)?;
        let count = |guest: &mut Guest, words: &str| -> Result<u64> {
            let said = guest.sh(&format!("grep -c '{words}' /scratch/daemon.log || true"))?;
            said.trim().parse().with_context(|| format!("grep says {said:?}"))
        };
        ensure!(count(guest, "given back to be sent again")? == 0, "{mode}: a ring was reset");
        let taken_up = count(guest, "taken up where another daemon left it")?;
        // Some are killed before they have taken anything up.
        ensure!(
            taken_up * 3 >= kills.trim().parse()?,
            "{mode}: {taken_up} rings taken up after {kills} kills"
        );
        guest.sh("rm /scratch/daemon.log")?;
        delete(guest, "k")?;
        assert_image_clean(guest, &image, "raw", true)?;
    }
    Ok(())
}

/// Kills `create` (and, every third time, `delete`) at random moments; then `delete` leaves nothing, or `create` makes it anew.
const HALVES: &str = r#"
create() { tcmu-dif create half --image /scratch/half.raw --export loopback --export vhost "$@"; }
left() { ls -d /sys/kernel/config/target/core/user_* /sys/kernel/config/target/*/naa.* /run/tcmu-dif/half/* 2>/dev/null; }
truncate -s 16M /scratch/half.raw
modprobe -a tcm_loop vhost_scsi
begin=$(date +%s%N); create > /dev/null || exit 1; took=$(( ($(date +%s%N) - begin) / 1000000 ))
tcmu-dif delete half > /dev/null || exit 1
halves=0
for round in $(seq $1); do
    if [ $((round % 3)) = 0 ]; then create > /dev/null || exit 1; tcmu-dif delete half > /dev/null 2>&1 & else create > /dev/null 2>&1 & fi
    pid=$!
    sleep $(awk "BEGIN { srand($round); printf \"%.3f\", rand() * $took / 1000 }")
    kill -9 $pid; wait $pid 2> /dev/null
    [ -n "$(left)" ] && halves=$((halves + 1))
    if [ $((round % 2)) = 0 ]; then
        create > /tmp/said 2>&1 || { echo "round $round: create: $(cat /tmp/said)"; left; exit 1; }
        [ $(ls -d /sys/kernel/config/target/*/naa.*/tpgt_1/lun/lun_0/half | wc -l) = 2 ] || { echo "round $round: not whole"; left; exit 1; }
    fi
    tcmu-dif delete half > /tmp/said 2>&1 || { grep -q 'no such LUN' /tmp/said; } || { echo "round $round: delete: $(cat /tmp/said)"; left; exit 1; }
    [ -z "$(left)" ] || { echo "round $round: left behind"; left; cat /tmp/said; exit 1; }
done
echo $halves
"#;

fn killed_create(run: &mut Run<'_>) -> Result<()> {
    let rounds = run.scale.pick(6, 18, 60);
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("halves.sh"), HALVES)?;
    let halves = guest.sh_within(
        Duration::from_secs(540),
        &format!("bash /host/halves.sh {rounds} 2>/tmp/err || {{ tail -n 5 /tmp/err; exit 1; }}"),
    )?;
    guest.note(format!("{rounds} kills, {} of them left something", halves.trim()));
    ensure!(
        halves.trim().parse::<u32>()? > 0,
        "nothing was ever half made: the kills came too late or too early"
    );
    assert_nothing_left(guest)
}
