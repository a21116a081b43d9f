//! A guest that goes along with its LUN: two QEMUs with `vhost-scsi-pci,migratable=on`, emulated in the VM, and a handover between them.
//!
//! One kernel has both sides, and so the LUN has another name there, and its target another WWN. The guest stands still while QEMU's
//! migration copies its memory: vhost-scsi tells nobody what it writes there before Linux 6.16.

use super::super::guest::{Guest, patience};
use super::handover::{SOCKET, receive_with, received};
use super::lun::{assert_image_clean, assert_nothing_left, create, delete, names, start_daemon};
use super::pi_guest::{BOOTS, PACK, qemu};
use super::qmp::{execute, execute_at};
use super::{Run, Test};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

pub const NAME: &str = "lifecycle.handover-guest";

pub const TESTS: &[Test] = &[Test {
    name: NAME,
    promise: "a guest goes to another QEMU with its LUN, which is copied while the guest uses it, and finds all that it wrote, and no error",
    limit: 1800,
    group: None,
    run: guest_goes,
}];

const HERE: &str = "naa.5001405000000051";
const OLD: &str = "/scratch/here.raw";
const NEW: &str = "/scratch/there.qcow2";

/// What the guest does until a line comes on its console: one fio writes and verifies all the time, and each round finds what the last one has written, which only the guest's memory
/// knows besides. Its shell and small programs are busybox's; fio takes a minute to begin there.
const INNER: &str = r#"
say() { echo "inner: $1 ($(cut -d' ' -f1 /proc/uptime) s)"; }
fail() { say "FAILED: $1"; cat /tmp/fio.log; dmesg | tail -n 20; echo b > /proc/sysrq-trigger; sleep 60; }
writes() { set -- $(cat /sys/block/sda/stat); echo $5; }
# Past the page cache.
there() { echo 1 > /proc/sys/vm/drop_caches; dd if=/dev/sda bs=64k skip=$2 count=$3 2> /dev/null | cmp -s - $1 || fail "$1 is not what was written"; }
put() { dd if=/dev/urandom of=$1 bs=64k count=$3 2> /dev/null; dd if=$1 of=/dev/sda bs=64k seek=$2 conv=fsync 2> /dev/null || fail "writing $1"; }
powered() { dmesg | grep -c 'Power-on or device reset'; }
mkdir -p /tmp
say "user space"
for _ in $(seq 300); do [ -b /dev/sda ] && break; sleep 0.1; done
first=$(powered)
put /tmp/cold 384 16
put /tmp/last 256 4
before=$(writes)
fio --name=hot --filename=/dev/sda --size=1M --bs=4k --rw=randwrite --ioengine=psync --direct=1 --verify=crc32c --verify_fatal=1 --loops=100000 > /tmp/fio.log 2>&1 &
fio=$!
while [ $(writes) -lt $((before + 100)) ]; do [ -d /proc/$fio ] || fail "fio does not begin"; sleep 1; done
round=1
while ! read -t 3 word < /dev/ttyS0; do
    there /tmp/last 256 4
    put /tmp/last 256 4
    [ -d /proc/$fio ] || fail "fio has ended"
    say "round $round, $(writes) writes"
    round=$((round + 1))
done
there /tmp/last 256 4
there /tmp/cold 384 16
[ -d /proc/$fio ] || fail "fio has ended"
killall fio
wait $fio
if grep -E 'verify|error=' /tmp/fio.log; then fail "fio has found something"; fi
if dmesg | grep -iE 'i/o error|sense key|guard|protection error|ref tag'; then fail "errors in the log"; fi
[ "$(powered)" = "$first" ] || fail "the disk was reset"
say "done"
echo b > /proc/sysrq-trigger
sleep 60
"#;

/// Starts a QEMU whose files are called `side`.
fn start(guest: &mut Guest, side: &str, wwpn: &str, words: &str) -> Result<()> {
    let qemu = qemu(384);
    guest
        .sh(&format!(
            "rm -f /scratch/{side}.log
             setsid {qemu} -device vhost-scsi-pci,wwpn={wwpn},migratable=on {words} -qmp unix:/scratch/{side}.qmp,server=on,wait=off \
                 -chardev socket,id=console,path=/scratch/{side}.console,server=on,wait=off,logfile=/scratch/{side}.log -serial chardev:console \
                 > /scratch/{side}.qemu 2>&1 < /dev/null &
             echo $! > /scratch/{side}.pid
             for _ in $(seq 300); do [ -S /scratch/{side}.qmp ] && exit 0; sleep 0.1; done
             cat /scratch/{side}.qemu; exit 1"
        ))
        .with_context(|| format!("the QEMU {side} did not start"))
        .map(drop)
}

/// What the guest has said on that side.
fn said(guest: &mut Guest, side: &str) -> Result<String> {
    guest.sh(&format!("tr -d '\\r' < /scratch/{side}.log"))
}

/// Rounds that the guest has told of on that side.
fn rounds(guest: &mut Guest, side: &str) -> Result<usize> {
    let said = said(guest, side)?;
    ensure!(
        !said.contains("inner: FAILED"),
        "the guest has met trouble:\n{}",
        crate::sh::last_lines(&said, 40)
    );
    Ok(said.matches("inner: round").count())
}

/// Waits until the guest has said that so often on that side, or its QEMU has ended.
fn wait_for(guest: &mut Guest, side: &str, words: &str, times: usize, seconds: u64) -> Result<()> {
    let seconds = seconds * u64::from(patience());
    let waited = guest.run(
        &format!(
            "for _ in $(seq {seconds}); do
                 [ \"$(grep -c '{words}' /scratch/{side}.log)\" -ge {times} ] && break
                 grep -q 'inner: FAILED' /scratch/{side}.log && break
                 kill -0 $(cat /scratch/{side}.pid) 2> /dev/null || break
                 sleep 1
             done"
        ),
        false,
        Duration::from_secs(seconds + 60),
    )?;
    ensure!(!waited.timed_out, "the VM does not answer");
    Ok(())
}

/// Until the guest has done so many rounds on that side.
fn until_round(guest: &mut Guest, side: &str, wanted: usize, seconds: u64) -> Result<()> {
    wait_for(guest, side, "inner: round", wanted, seconds)?;
    if rounds(guest, side)? < wanted {
        let said = format!("{}{}", said(guest, side)?, guest.sh(&format!("cat /scratch/{side}.qemu"))?);
        bail!("the guest has not done {wanted} rounds {side}:\n{}", crate::sh::last_lines(&said, 30));
    }
    Ok(())
}

/// Asks the QEMU on that side.
fn ask(guest: &mut Guest, side: &str, command: &str, arguments: Value) -> Result<Value> {
    execute_at(guest, Some(&format!("/scratch/{side}.qmp")), command, arguments)
}

/// Asks how a migration is, until it is as wanted.
fn until_migration(
    guest: &mut Guest,
    wanted: &str,
    query: impl Fn(&mut Guest) -> Result<Value>,
) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(300) * patience();
    loop {
        let told = query(guest)?;
        match told["status"].as_str() {
            Some(status) if status == wanted => return Ok(()),
            Some("failed") | None => bail!("it does not come to {wanted}: {told}"),
            _ => ensure!(Instant::now() < end, "it does not come to {wanted} in time: {told}"),
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn guest_goes(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    create(guest, "here", &format!("--image {OLD} --size 32M --pi type1 --export vhost:{HERE}"))?;
    guest.sh(&format!("cat > /scratch/inner.sh <<'END'\n{INNER}\nEND\n{PACK}"))?;
    boots(guest)?;
    until_round(guest, "here", 1, 600)?;

    // The LUN is copied while the guest uses it, and then waits for the guest.
    receive_with(guest, "there", &format!("--image {NEW} --format qcow2"))?;
    guest.sh(&format!(
        "setsid tcmu-dif handover here --to unix:{SOCKET} --copy-storage-all --pause-before-switchover > /tmp/give.out 2>&1 < /dev/null &
         echo $! > /tmp/give.pid"
    ))?;
    until_migration(guest, "pre-switchover", |guest| {
        execute(guest, "query-migrate", json!({ "device": "here" }))
    })
    .context("the LUN is not copied")?;
    let before = rounds(guest, "here")?;
    until_round(guest, "here", before + 2, 300)?;

    // The guest stands still, the LUN goes, and the guest after it.
    ask(guest, "here", "stop", json!({}))?;
    let stopped = Instant::now();
    guest.sh("tcmu-dif handover here --continue")?;
    guest.sh("for _ in $(seq 600); do kill -0 $(cat /tmp/give.pid) 2> /dev/null || break; sleep 0.1; done; grep 'serves there now' /tmp/give.out || { cat /tmp/give.out; exit 1; }")?;
    let gone = stopped.elapsed();
    ensure!(names(guest)? == ["there"], "the source is there still");
    let made = received(guest)?;
    let there =
        made["exports"][0]["wwn"].as_str().with_context(|| format!("no target in {made}"))?.to_owned();
    ensure!(there != HERE, "on one kernel its target has another WWN");
    start(guest, "there", &there, "-incoming unix:/scratch/migrate.sock")?;
    ask(guest, "here", "migrate", json!({ "uri": "unix:/scratch/migrate.sock" }))?;
    until_migration(guest, "completed", |guest| ask(guest, "here", "query-migrate", json!({})))
        .context("the guest does not go")?;
    ask(guest, "there", "cont", json!({}))?;
    let still = stopped.elapsed();
    until_round(guest, "there", 2, 300)?;

    // It is told to end, and has looked at everything by then.
    guest.sh(
        r#"python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect("/scratch/there.console"); s.sendall(b"end\n")'"#,
    )?;
    wait_for(guest, "there", "inner: done", 1, 400)?;
    let told = said(guest, "there")?;
    std::fs::write(guest.logs().join("inner-there.log"), &told)?;
    ensure!(
        told.contains("inner: done"),
        "the guest did not end as it should:\n{}",
        crate::sh::last_lines(&told, 40)
    );
    ask(guest, "here", "quit", json!({}))?;
    guest.sh("for _ in $(seq 300); do kill -0 $(cat /scratch/there.pid) 2> /dev/null || kill -0 $(cat /scratch/here.pid) 2> /dev/null || exit 0; sleep 0.1; done; exit 1")
        .context("a QEMU does not end")?;
    let rounds = rounds(guest, "there")?;
    guest.note(format!(
        "{} rounds of the guest's here and {rounds} there; the LUN went within {:.1} s, and the guest stood still for {:.1} s, in which QEMU copied its memory",
        before + 2,
        gone.as_secs_f64(),
        still.as_secs_f64()
    ));
    delete(guest, "there")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, NEW, "qcow2", true)
}

/// Boots the guest; a kernel that dies before user space has not seen our LUN: an emulator in an emulator does that.
fn boots(guest: &mut Guest) -> Result<()> {
    for attempt in 1..=BOOTS {
        start(guest, "here", HERE, "")?;
        wait_for(guest, "here", "inner: user space", 1, 400)?;
        if said(guest, "here")?.contains("inner: user space") {
            return Ok(());
        }
        guest.sh("kill -9 $(cat /scratch/here.pid) || true")?;
        guest.note(format!("boot {attempt} died in the emulator, and was repeated"));
    }
    bail!("the guest does not boot:\n{}", said(guest, "here")?)
}
