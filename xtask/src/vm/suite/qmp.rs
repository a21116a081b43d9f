//! A LUN's life over the QMP socket: made, resized and taken down without the command line, by a client of a few lines of Python.

use super::super::guest::Guest;
use super::initiator::geometry;
use super::lun::{
    assert_image_clean, assert_nothing_left, create_on_loopback, daemon_pid, delete, show, start_daemon,
};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::process::Command;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "lifecycle.qmp",
        promise: "over QMP a LUN is made, grows while a file system on it is in use, is not deleted in use, shrinks if it is raw, and outlives quit",
        limit: 300,
        group: None,
        run: life,
    },
    Test {
        name: "lifecycle.qemu-qmp",
        promise: "PyPI's qemu.qmp, which nobody here wrote, makes a LUN, asks everything, hears its events, takes it down and ends the daemon",
        limit: 200,
        group: None,
        run: other_client,
    },
];

/// What pip installs, for `lifecycle.qemu-qmp`.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// `other.py`: a LUN's life, by somebody else's client.
const OTHER: &str = r#"
import asyncio
from qemu.qmp import ExecuteError, QMPClient

async def main():
    qmp = QMPClient("host")
    await qmp.connect("/run/tcmu-dif/qmp.sock")
    added = await qmp.execute("lun-add", {"device": "q", "image": "/scratch/q.raw", "size": 64 << 20, "format": "raw", "pi": "type1", "export": ["loopback"]})
    disk = added["exports"][0]["device"]
    with open(disk, "r+b", buffering=0) as f:
        assert f.write(b"qemu.qmp" * 512) == 4096
    await qmp.execute("block_resize", {"device": "q", "size": 128 << 20})
    try:
        await qmp.execute("lun-add", {"device": "q", "image": "/scratch/q.raw"})
        raise AssertionError("two LUNs of one name")
    except ExecuteError as refused:
        assert refused.error_class == "GenericError", refused
    for name in [c["name"] for c in await qmp.execute("query-commands")]:
        if name.startswith("query-"):
            await qmp.execute(name)
    luns = await qmp.execute("query-luns")
    assert [lun["name"] for lun in luns] == ["q"], luns
    with qmp.listener() as listener:
        await qmp.execute("pi-scrub", {"device": "q", "speed": 0})
        seen = []
        async for event in listener:
            seen.append(event["data"].get("status"))
            if seen[-1] == "null":
                break
    assert "concluded" in seen, seen
    await qmp.execute("lun-del", {"device": "q"})
    assert await qmp.execute("query-luns") == []
    await qmp.execute("quit")
    try:
        await qmp.disconnect()
    except EOFError:
        pass # The daemon was quicker.

asyncio.run(asyncio.wait_for(main(), 150))
"#;

fn other_client(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let made = crate::sh::target_dir().join(PACKAGE);
    if !made.exists() {
        let half = made.with_extension("half");
        let pip = ["-m", "pip", "install", "--quiet", "--upgrade", "--target"];
        crate::sh::quiet(Command::new("python3").args(pip).arg(&half).arg(PACKAGE))
            .context("next: apt-get install --yes --no-install-recommends python3-pip")?;
        std::fs::rename(&half, &made)?;
    }
    crate::sh::quiet(Command::new("cp").arg("--recursive").arg(&made).arg(guest.share().join("python")))?;
    std::fs::write(guest.share().join("other.py"), OTHER)?;
    start_daemon(guest, "auto")?;
    let pid = daemon_pid(guest)?;
    guest.sh_within(
        Duration::from_secs(170),
        &format!(
            "PYTHONPATH=/host/python python3 /host/other.py
             for _ in $(seq 100); do [ -e /proc/{pid} ] || exit 0; sleep 0.1; done; echo the daemon is still there; exit 1"
        ),
    )?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, "/scratch/q.raw", "raw", true)
}

/// A connection, and `ask`, which sends a command and gives its answer. To the daemon, or to whom the environment says.
pub const CONNECTION: &str = r#"
import json, os, socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(90)
s.connect(os.environ.get("QMP", "/run/tcmu-dif/qmp.sock"))
# Not for both: what a text file has read ahead, a part of an event perhaps, is dropped when it is written to.
lines = s.makefile("r")
assert "QMP" in json.loads(lines.readline())
def ask(command):
    s.sendall(json.dumps(command).encode())
    while "event" in (answer := json.loads(lines.readline())): pass
    return answer
assert ask({"execute": "qmp_capabilities"}) == {"return": {}}
"#;

/// `qmp.py COMMAND…` executes each and prints the answers as a JSON array; `qmp.py --events` prints each event as a line, until the daemon ends.
const CLIENT: &str = r#"
if sys.argv[1:] == ["--events"]:
    s.settimeout(None)
    print("listening", flush=True)
    for line in lines: print(line, end="", flush=True)
else:
    print(json.dumps([ask(json.loads(command)) for command in sys.argv[1:]]))
"#;

/// Sends commands over one connection; gives their answers, `{"return": …}` or `{"error": …}`.
pub fn qmp(guest: &mut Guest, commands: &[Value]) -> Result<Vec<Value>> {
    qmp_at(guest, None, commands)
}

/// The same to whoever listens at that socket, if not to the daemon.
fn qmp_at(guest: &mut Guest, socket: Option<&str>, commands: &[Value]) -> Result<Vec<Value>> {
    std::fs::write(guest.share().join("qmp.py"), [CONNECTION, CLIENT].concat())?;
    let words: Vec<String> = commands.iter().map(|command| format!("'{command}'")).collect();
    let to = socket.map(|socket| format!("QMP={socket} ")).unwrap_or_default();
    let answers = guest.json(&format!("{to}python3 /host/qmp.py {}", words.join(" ")))?;
    serde_json::from_value(answers).context("the answers are no list")
}

/// One command, which must succeed.
pub fn execute(guest: &mut Guest, name: &str, arguments: Value) -> Result<Value> {
    execute_at(guest, None, name, arguments)
}

/// The same to whoever listens at that socket, if not to the daemon: a QEMU.
pub fn execute_at(guest: &mut Guest, socket: Option<&str>, name: &str, arguments: Value) -> Result<Value> {
    let mut answers = qmp_at(guest, socket, &[json!({ "execute": name, "arguments": arguments })])?;
    ensure!(answers.len() == 1 && answers[0].get("return").is_some(), "{name}: {answers:?}");
    Ok(answers[0]["return"].take())
}

/// One command, which must be refused in words with this part.
fn refused(guest: &mut Guest, name: &str, arguments: Value, words: &str) -> Result<()> {
    let answers = qmp(guest, &[json!({ "execute": name, "arguments": arguments })])?;
    let error = &answers[0]["error"];
    let desc = error["desc"].as_str().unwrap_or_default();
    ensure!(error["class"].is_string() && desc.contains(words), "{name}: no {words:?} in {answers:?}");
    Ok(())
}

/// The disk that `lun-add` names.
fn disk_of(added: &Value) -> Result<String> {
    let device = added["exports"][0]["device"].as_str();
    Ok(device.with_context(|| format!("no disk in {added}"))?.to_owned())
}

fn life(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    qmp(guest, &[])?;
    guest.sh("setsid python3 /host/qmp.py --events > /tmp/events.txt 2>&1 < /dev/null &
         for _ in $(seq 100); do grep -q listening /tmp/events.txt && exit 0; sleep 0.1; done; exit 1")?;

    let image = "/scratch/q.qcow2";
    let order = json!({ "device": "q", "image": image, "size": 64 << 20, "format": "qcow2", "pi": "type1", "export": ["loopback"] });
    let added = execute(guest, "lun-add", order)?;
    let device = disk_of(&added)?;
    ensure!(geometry(guest, &device)? == (64 << 20, 512), "the disk is not what was ordered");
    refused(
        guest,
        "lun-add",
        json!({ "device": "q2", "image": "/scratch/nothing.raw" }),
        "/scratch/nothing.raw",
    )?;

    // It grows under a file system that is being written to, and the file system after it.
    guest.sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt && mount -t ext4 {device} /mnt
         dd if=/dev/urandom of=/mnt/before bs=1M count=16 status=none && sync && sha256sum /mnt/before > /tmp/sums
         cd /tmp; setsid fio --name=load --directory=/mnt --size=8M --rw=randrw --bs=4k --direct=1 --ioengine=libaio --iodepth=8 \
             --time_based --runtime=8 --output=/tmp/load.txt > /dev/null 2>&1 < /dev/null &
         echo $! > /tmp/load.pid; sleep 2; kill -0 $(cat /tmp/load.pid)"
    ))?;
    let mark = guest.mark()?;
    refused(guest, "block_resize", json!({ "device": "q", "size": (128 << 20) + 1 }), "multiple")?;
    execute(guest, "block_resize", json!({ "device": "q", "size": 128 << 20 }))?;
    guest.sh(
        "for _ in $(seq 150); do kill -0 $(cat /tmp/load.pid) 2>/dev/null || exit 0; sleep 0.2; done; exit 1",
    )?;
    let load = guest.sh("cat /tmp/load.txt")?;
    ensure!(load.contains("err= 0"), "the load met an error:\n{load}");
    let log = guest.kernel_log_since(&mark)?;
    ensure!(
        log.contains("Capacity data has changed"),
        "the initiator heard no unit attention 2Ah/09h:\n{log}"
    );
    ensure!(geometry(guest, &device)?.0 == 128 << 20, "the initiator sees no new capacity");
    guest.sh(&format!(
        "resize2fs {device} && dd if=/dev/urandom of=/mnt/after bs=1M count=32 status=none && sha256sum /mnt/after >> /tmp/sums && sync
         echo 3 > /proc/sys/vm/drop_caches; sha256sum --check --quiet /tmp/sums"
    ))?;

    // Deleting a disk in use is refused, and changes nothing.
    refused(guest, "lun-del", json!({ "device": "q" }), "is mounted on /mnt")?;
    guest.sh("echo 3 > /proc/sys/vm/drop_caches; sha256sum --check --quiet /tmp/sums; umount /mnt")?;
    guest.sh(&format!("e2fsck -fn {device}"))?;

    // The daemon quits under a write, which waits for the next.
    let pid = daemon_pid(guest)?;
    guest.sh(&format!("dd if=/dev/urandom of=/tmp/tail bs=1M count=4 status=none; dd if=/tmp/tail of={device} bs=1M seek=92 oflag=direct status=none"))?;
    ensure!(qmp(guest, &[json!({ "execute": "quit" })])? == [json!({ "return": {} })]);
    guest
        .sh(&format!("for _ in $(seq 300); do [ -e /proc/{pid} ] || exit 0; sleep 0.1; done; exit 1"))
        .context("the daemon did not end after quit")?;
    guest.sh(&format!(
        "setsid dd if=/tmp/tail of={device} bs=1M seek=124 oflag=direct status=none > /tmp/dd.txt 2>&1 < /dev/null &
         echo $! > /tmp/dd.pid; sleep 1; kill -0 $(cat /tmp/dd.pid)"
    ))?;
    start_daemon(guest, "auto")?;
    guest.sh(&format!(
        "for _ in $(seq 300); do [ -e /proc/$(cat /tmp/dd.pid) ] || break; sleep 0.1; done
         [ ! -e /proc/$(cat /tmp/dd.pid) ] && [ ! -s /tmp/dd.txt ]
         cmp -n $((4 << 20)) /tmp/tail <(dd if={device} bs=1M skip=124 count=4 iflag=direct status=none)"
    ))?;

    // A qcow2 image is not shrunk in use, and the refusal names what does it; a raw one is.
    refused(
        guest,
        "block_resize",
        json!({ "node-name": "q", "size": 96 << 20 }),
        "tcmu-dif image resize --shrink",
    )?;
    ensure!(geometry(guest, &device)?.0 == 128 << 20, "a refused resize has changed the disk");
    let order = json!({ "device": "r", "image": "/scratch/r.raw", "size": 64 << 20, "format": "raw", "pi": "type1", "export": ["loopback"] });
    let added = execute(guest, "lun-add", order)?;
    let raw = disk_of(&added)?;
    guest.sh(&format!("dd if=/tmp/tail of={raw} bs=1M seek=28 oflag=direct status=none"))?;
    execute(guest, "block_resize", json!({ "node-name": "r", "size": 32 << 20 }))?;
    ensure!(geometry(guest, &raw)?.0 == 32 << 20, "the initiator sees the old capacity");
    ensure!(show(guest, "r")?["capacity_bytes"] == 32u64 << 20);
    guest.sh(&format!(
        "[ $(stat -c %s /scratch/r.raw) = $((32 << 20)) ]
         cmp -n $((4 << 20)) /tmp/tail <(dd if={raw} bs=1M skip=28 iflag=direct status=none)"
    ))?;
    let blocks = execute(guest, "query-block", json!({}))?;
    let block = blocks.as_array().into_iter().flatten().find(|b| b["device"] == "r");
    ensure!(block.is_some_and(|b| b["inserted"]["image"]["virtual-size"] == 32u64 << 20), "{blocks}");
    execute(guest, "lun-del", json!({ "device": "r" }))?;
    assert_image_clean(guest, "/scratch/r.raw", "raw", true)?;

    let deleted = execute(guest, "lun-del", json!({ "device": "q" }))?;
    ensure!(deleted.is_object(), "{deleted}");
    refused(guest, "lun-del", json!({ "device": "q" }), "q")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, image, "qcow2", true)?;
    let events = guest.sh("cat /tmp/events.txt")?;
    let order = ["LUN_ADDED", "SHUTDOWN", "LUN_REMOVED"];
    let seen: Vec<&str> = order.into_iter().filter(|name| events.contains(name)).collect();
    ensure!(seen == order && events.contains("host-qmp-quit"), "not all events came:\n{events}");

    // What QMP has taken down, the command line takes up.
    create_on_loopback(guest, "q", &format!("--image {image} --pi type1"))?;
    delete(guest, "q")
}
