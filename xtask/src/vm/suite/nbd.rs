//! NBD on the real kernel: a LUN whose image is an export of a server that is killed under load, and a LUN that is exported as it was while
//! guests write to it.

use super::super::guest::Guest;
use super::lun::{create_on_loopback, daemon, delete};
use super::{Run, Test, jobs::unnoticed, witness};
use anyhow::{Context, Result};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "nbd.server-killed",
        promise: "a protected LUN on qemu-nbd's export keeps what was answered, and its guest meets no error, while the server and the daemon are killed under fio at QD32",
        limit: 400,
        group: Some("nbd"),
        run: server_killed,
    },
    Test {
        name: "nbd.point-in-time",
        promise: "what QEMU copies from an export of a point in time, whole and as an increment by its bitmap, is the LUN as it was, while fio overwrites it at QD32",
        limit: 400,
        group: Some("nbd"),
        run: point_in_time,
    },
];

/// Writes and verifies in the background until `/tmp/enough` is there; `ended` waits for that.
const FIO: &str = r#"
rm -f /tmp/enough
(
    while [ ! -e /tmp/enough ]; do
        fio --name=verify --filename=$device --direct=1 --ioengine=libaio --iodepth=32 --rw=randrw --rwmixread=30 --bs=4k --size=16M \
            --verify=crc32c --verify_fatal=1 > /tmp/fio.txt 2>&1 || exit 1
    done
) &
fio=$!
ended() { touch /tmp/enough; wait $fio || { cat /tmp/fio.txt; exit 1; }; }
"#;

/// `killed.sh DEVICE ROUNDS`: kills the server, or the daemon, and starts it again after a moment.
const KILLED: &str = r#"
device=$1
for round in $(seq $2); do
    sleep 1.$((RANDOM % 10))
    if [ $((round % 3)) = 0 ]; then
        pid=$(cat /run/tcmu-dif/daemon.pid)
        kill -9 $pid
        setsid tcmu-dif daemon >> /scratch/daemon.log 2>&1 < /dev/null &
        for _ in $(seq 600); do [ "$(cat /run/tcmu-dif/daemon.pid 2>/dev/null)" != $pid ] && tcmu-dif list > /dev/null 2>&1 && break; sleep 0.1; done
    else
        kill -9 $(cat /tmp/nbd.pid)
        sleep 0.$((RANDOM % 10))
        serve
    fi
done
ended
"#;

const SERVE: &str = "serve() { qemu-nbd --persistent --shared=8 --format=raw --socket=/scratch/far.sock --pid-file=/tmp/nbd.pid --fork /scratch/far.raw; }\n";

fn script(guest: &Guest, name: &str, parts: &[&str]) -> Result<String> {
    std::fs::write(guest.share().join(name), parts.concat())?;
    Ok(format!("bash -euo pipefail /host/{name}"))
}

fn server_killed(run: &mut Run<'_>) -> Result<()> {
    let rounds = run.scale.pick(3, 6, 30);
    let guest = &mut *run.guest;
    daemon(guest)?;
    guest.sh(&format!("truncate -s 48M /scratch/far.raw; {SERVE} serve"))?;
    let uri = "nbd+unix:///?socket=/scratch/far.sock";
    let lun =
        create_on_loopback(guest, "far", &format!("--image '{uri}' --pi type1 --sidecar /scratch/far.pi"))?;
    let mark = guest.mark()?;
    witness::start(guest, &lun.device, 40)?;
    let killed = script(guest, "killed.sh", &[SERVE, "device=$1\n", FIO, KILLED])?;
    guest.sh_within(Duration::from_secs(300), &format!("{killed} {} {rounds}", lun.device))?;
    witness::end(guest)?;
    guest.note(format!("{rounds} kills, each third of the daemon"));
    unnoticed(&guest.kernel_log_since(&mark)?)?;
    guest.sh(&format!("dd if={} iflag=direct bs=1M of=/scratch/far.copy status=none", lun.device))?;
    delete(guest, "far")?;
    guest
        .sh(&format!("tcmu-dif pi verify '{uri}' --sidecar /scratch/far.pi --json"))
        .context("PI does not match")?;
    guest.sh("kill $(cat /tmp/nbd.pid); for _ in $(seq 100); do [ -e /proc/$(cat /tmp/nbd.pid) ] || break; sleep 0.1; done
         cmp /scratch/far.copy /scratch/far.raw").map(drop)
}

/// `past.sh DEVICE`: what is exported is what was there before fio began, and the increment what was there before it went on.
const PAST: &str = r#"
device=$1
uri='nbd+unix:///past?socket=/run/tcmu-dif/nbd.sock'
copy() { dd if=$device bs=1M iflag=direct of=$1 status=none; }
# The same bytes as long as nobody writes: fio rests.
rest() { pkill -STOP -x fio || true; sleep 1; }
go_on() { pkill -CONT -x fio || true; }
dd if=/dev/urandom of=$device bs=1M count=48 oflag=direct status=none
tcmu-dif bitmap add past daily --persistent > /dev/null
for round in full increment; do
    copy /scratch/then.raw
    tcmu-dif export past --point-in-time --bitmap daily > /dev/null
    before=$(awk '{ print $5 }' /sys/block/${device#/dev/}/stat)
    [ $round = full ] && begin || go_on
    for _ in $(seq 600); do [ $(($(awk '{ print $5 }' /sys/block/${device#/dev/}/stat) - before)) -ge 300 ] && break; sleep 0.1; done
    if [ $round = full ]; then
        qemu-img convert -f raw -O qcow2 $uri /scratch/copied.qcow2
        qemu-img compare -f raw -F qcow2 /scratch/then.raw /scratch/copied.qcow2 > /dev/null
    else
        # Only what the bitmap has, as backup software does it.
        qemu-img map --output=json --image-opts driver=nbd,server.type=unix,server.path=/run/tcmu-dif/nbd.sock,export=past,x-dirty-bitmap=qemu:dirty-bitmap:daily > /tmp/map.json
        python3 - <<'END'
import json, subprocess
uri = "nbd+unix:///past?socket=/run/tcmu-dif/nbd.sock"
# With x-dirty-bitmap what is dirty is told as data that is not there.
dirty = [e for e in json.load(open("/tmp/map.json")) if not e["data"]]
whole = sum(e["length"] for e in dirty)
assert 0 < whole < 48 << 20, whole
subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, "/scratch/now.raw"], check=True)
with open("/scratch/increment.raw", "r+b") as over, open("/scratch/now.raw", "rb") as new:
    for e in dirty:
        over.seek(e["start"]), new.seek(e["start"])
        over.write(new.read(e["length"]))
print("increment", whole >> 10, "KiB")
END
        cmp /scratch/then.raw /scratch/increment.raw
    fi
    [ $round = full ] && cp /scratch/then.raw /scratch/increment.raw
    tcmu-dif export past --end --copied > /dev/null
    rest
    copy /scratch/after.raw
    ! cmp -s /scratch/then.raw /scratch/after.raw || { echo 'fio has changed nothing'; exit 1; }
done
go_on
ended
"#;

fn point_in_time(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let options = "--image /scratch/past.qcow2 --size 48M --format qcow2 --pi type1";
    let lun = create_on_loopback(guest, "past", options)?;
    let mark = guest.mark()?;
    let begin = format!("begin() {{ {FIO} }}\n");
    let past = script(guest, "past.sh", &["device=$1\n", &begin, PAST])?;
    let said = guest.sh_within(Duration::from_secs(300), &format!("{past} {}", lun.device))?;
    guest.note(said.trim().to_owned());
    unnoticed(&guest.kernel_log_since(&mark)?)?;
    delete(guest, "past")?;
    super::lun::assert_image_clean(guest, "/scratch/past.qcow2", "qcow2", true)
}
