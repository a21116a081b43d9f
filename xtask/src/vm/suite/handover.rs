//! A LUN that is handed over. One kernel has both sides, under two names: what two hosts would add, the tests on embedded kernels show.

use super::super::guest::{Guest, patience};
use super::initiator::geometry;
use super::lun::{
    assert_image_clean, assert_nothing_left, create_on_loopback, delete, names, show, start_daemon,
    stop_daemon,
};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

pub const TESTS: &[Test] = &[
    Test {
        name: "lifecycle.handover-reservations",
        promise: "persistent reservations and target port groups go along in a handover and back, and cannot be changed while it is under way",
        limit: 400,
        group: None,
        run: reservations,
    },
    Test {
        name: "lifecycle.standby",
        promise: "a standby takes a LUN over when its host is gone, by the lease and by a fencing agent's word, and says what that took",
        limit: 400,
        group: None,
        run: standby,
    },
    Test {
        name: "lifecycle.handover",
        promise: "a LUN is handed over with its data, protection, serial number and mode pages, serves on if that fails, and an image of another host is refused",
        limit: 300,
        group: None,
        run: handover,
    },
    Test {
        name: "lifecycle.handover-storage",
        promise: "a LUN is handed over with a copy of its image, and the image that stays is served by nobody until it is taken over",
        limit: 300,
        group: None,
        run: storage,
    },
];

pub(super) const SOCKET: &str = "/run/receive.sock";

/// Has one LUN received under a name, in the background.
fn receive(guest: &mut Guest, name: &str) -> Result<()> {
    receive_with(guest, name, "")
}

/// The same with more words.
pub(super) fn receive_with(guest: &mut Guest, name: &str, words: &str) -> Result<()> {
    guest
        .sh(&format!(
            "rm -f /tmp/receive.*; setsid tcmu-dif receive --listen unix:{SOCKET} --once --name {name} {words} --json \
                 > /tmp/receive.json 2> /tmp/receive.err < /dev/null &
             for _ in $(seq 100); do [ -S {SOCKET} ] && exit 0; sleep 0.1; done; cat /tmp/receive.err; exit 1"
        ))
        .map(drop)
}

/// What it made, once it has ended.
pub(super) fn received(guest: &mut Guest) -> Result<Value> {
    guest
        .sh(&format!("for _ in $(seq 300); do [ -e {SOCKET} ] || exit 0; sleep 0.1; done; exit 1"))
        .context("receive does not end")?;
    guest.json("cat /tmp/receive.json")
}

fn storage(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let (old, new) = ("/scratch/old.raw", "/scratch/new.qcow2");
    let a = create_on_loopback(guest, "a", &format!("--image {old} --size 64M --pi type1"))?;
    let serial = guest.sh("cat /sys/kernel/config/target/core/user_*/a/wwn/vpd_unit_serial")?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={} bs=1M oflag=direct status=none",
        a.device
    ))?;
    let give = format!("tcmu-dif handover a --to unix:{SOCKET} --copy-storage-all");

    // A destination that was told no place; and a place that is taken: it serves as before, and nothing is there.
    receive(guest, "b")?;
    let refused = guest.try_sh(&format!("{give} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("receive --image"), "{}", refused.stdout);
    guest.sh(&format!("echo taken > {new}"))?;
    receive_with(guest, "b", &format!("--image {new} --format qcow2"))?;
    let refused = guest.try_sh(&format!("{give} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("is there already"), "{}", refused.stdout);
    guest.sh(&format!("[ \"$(cat {new})\" = taken ] && rm {new}"))?;
    let same = |device: &str| {
        format!("cmp -n $((24 << 20)) /tmp/data <(dd if={device} bs=1M iflag=direct status=none)")
    };
    guest.sh(&same(&a.device))?;

    receive_with(guest, "b", &format!("--image {new} --format qcow2"))?;
    let given = guest.json(&format!("{give} --json"))?;
    ensure!(given["answered"] == true && given["left"].is_null() && given["image"] == old, "{given}");
    let made = received(guest)?;
    ensure!(made["image"] == new, "{made}");
    let b = made["exports"][0]["device"].as_str().with_context(|| format!("no disk in {made}"))?.to_owned();
    ensure!(names(guest)? == ["b"], "the source is there still");
    guest.sh(&same(&b))?;
    ensure!(guest.sh("cat /sys/kernel/config/target/core/user_*/b/wwn/vpd_unit_serial")? == serial);

    // The old image is nobody's here, until somebody says so.
    let refused = guest.try_sh(&format!("tcmu-dif create c --image {old} --pi type1 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("--take-over"), "{}", refused.stdout);
    guest.sh(&format!("tcmu-dif image owner --take-over {old}"))?;
    guest.sh(&format!("tcmu-dif pi verify {old}"))?;
    delete(guest, "b")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, new, "qcow2", true)?;

    // What is to be done with a LUN whose image turns out to be another host's: nobody answers its commands, and it is taken down all the same.
    let lost = create_on_loopback(guest, "lost", "--image /scratch/lost.raw --size 16M")?;
    stop_daemon(guest, "KILL")?;
    guest.sh("mv /scratch/lost.raw /scratch/lost.aside")?;
    start_daemon(guest, "auto")?;
    let shown = show(guest, "lost")?;
    ensure!(shown["state"] == "failed", "{shown}");
    let seconds = 25 * patience();
    guest.sh(&format!(
        "setsid dd if=/dev/zero of={} bs=4k count=4 oflag=direct > /dev/null 2>&1 < /dev/null &
         sleep 1; timeout {seconds} tcmu-dif delete --force lost",
        lost.device
    ))?;
    assert_nothing_left(guest)
}

fn handover(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let image = "/scratch/h.qcow2";
    let a = create_on_loopback(guest, "a", &format!("--image {image} --size 64M --format qcow2 --pi type1"))?;
    let serial = guest.sh("cat /sys/kernel/config/target/core/user_*/a/wwn/vpd_unit_serial")?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={} bs=1M oflag=direct status=none",
        a.device
    ))?;

    // A dirty bitmap that no image keeps, which a restart does not take away either.
    let marked = |guest: &mut Guest, lun: &str| -> Result<Value> {
        let all = guest.json(&format!("tcmu-dif bitmap list {lun} --json"))?;
        ensure!(all[0]["name"] == "daily" && all[0]["inconsistent"] != true, "{all}");
        Ok(all[0]["count"].clone())
    };
    guest.sh("tcmu-dif bitmap add a daily")?;
    guest.sh(&format!("dd if=/tmp/data of={} bs=1M count=1 oflag=direct status=none", a.device))?;
    stop_daemon(guest, "TERM")?;
    start_daemon(guest, "auto")?;
    ensure!(marked(guest, "a")? == 1 << 20);

    // Nobody there; then a name that is taken: it serves as before.
    let refused = guest.try_sh(&format!("tcmu-dif handover a --to unix:{SOCKET} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("tcmu-dif receive"), "{}", refused.stdout);
    receive(guest, "a")?;
    let refused = guest.try_sh(&format!("tcmu-dif handover a --to unix:{SOCKET} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("is there already"), "{}", refused.stdout);
    let same = |device: &str| {
        format!("cmp -n $((24 << 20)) /tmp/data <(dd if={device} bs=1M iflag=direct status=none)")
    };
    guest.sh(&same(&a.device))?;

    receive(guest, "b")?;
    let given = guest.json(&format!("tcmu-dif handover a --to unix:{SOCKET} --json"))?;
    ensure!(given["answered"] == true && given["left"].is_null(), "{given}");
    let made = received(guest)?;
    let b = made["exports"][0]["device"].as_str().with_context(|| format!("no disk in {made}"))?.to_owned();
    ensure!(names(guest)? == ["b"], "the source is there still");
    ensure!(geometry(guest, &b)? == (64 << 20, 512));
    guest.sh(&same(&b))?;
    ensure!(guest.sh("cat /sys/kernel/config/target/core/user_*/b/wwn/vpd_unit_serial")? == serial);
    let owner = guest.json(&format!("tcmu-dif image owner --json {image}"))?;
    ensure!(owner["state"] == "held", "{owner}");
    ensure!(marked(guest, "b")? == 1 << 20);

    // And back, with what was written meanwhile.
    guest.sh(&format!("dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={b} bs=1M oflag=direct status=none"))?;
    receive(guest, "a")?;
    guest.sh(&format!("tcmu-dif handover b --to unix:{SOCKET}"))?;
    let made = received(guest)?;
    let a = made["exports"][0]["device"].as_str().with_context(|| format!("no disk in {made}"))?.to_owned();
    guest.sh(&same(&a))?;
    ensure!(marked(guest, "a")? == 24 << 20);
    delete(guest, "a")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, image, "qcow2", true)
}

/// A destination that says it is ready, takes the state, and fails when it is told to: held by a file.
const FAILING: &str = r#"
import json, os, socket, struct, time
def receive(c):
    kind, length = struct.unpack(">BI", c.recv(5, socket.MSG_WAITALL))
    return kind, c.recv(length, socket.MSG_WAITALL)
def send(c, kind, body):
    c.sendall(struct.pack(">BI", kind, len(body)) + body)
s = socket.socket(socket.AF_UNIX)
s.bind("/run/failing.sock")
s.listen()
c, _ = s.accept()
assert receive(c)[0] == 1
send(c, 2, b"")
kind, state = receive(c)
assert kind == 3
open("/tmp/failing.state", "wb").write(state)
while not os.path.exists("/tmp/failing.now"):
    time.sleep(0.05)
send(c, 5, json.dumps({"reason": "it was told to fail", "next": None}).encode())
"#;

/// An export's disk.
#[derive(Clone)]
struct Disk {
    wwn: String,
    device: String,
    sg: String,
}

/// The disks of a LUN's exports, in their order.
fn disks(made: &Value) -> Result<Vec<Disk>> {
    let exports = made["exports"].as_array().with_context(|| format!("no exports in {made}"))?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let disk = |export: &Value| {
        Some(Disk { wwn: text(&export["wwn"])?, device: text(&export["device"])?, sg: text(&export["sg"])? })
    };
    exports.iter().map(disk).collect::<Option<_>>().with_context(|| format!("no disk in {made}"))
}

/// What those disks are after a handover: it tells of exports in the order of their names, and they are made in that order.
fn after(before: &[Disk], made: &Value) -> Result<Vec<Disk>> {
    let made = disks(made)?;
    let rank = |disk: &Disk| before.iter().filter(|other| other.wwn < disk.wwn).count();
    before.iter().map(|disk| made.get(rank(disk)).cloned().context("an export is missing")).collect()
}

/// What initiators read of the reservations, without what names ports and counts changes, sorted: registrations are told in the order in which they came to life.
pub(super) fn read_reservations(guest: &mut Guest, sg: &str) -> Result<String> {
    guest.sh(&format!(
        "for what in k r s; do sg_persist --in --no-inquiry -$what {sg} | sed -e 's/generation=0x[0-9a-f]*//' -e '/Relative port/d' -e '/SAS address/d'; done | sort"
    ))
}

/// Whether a disk takes a write: 0, or what dd says.
fn write(guest: &mut Guest, device: &str) -> Result<bool> {
    let written =
        guest.try_sh(&format!("dd if=/dev/zero of={device} bs=4k count=1 oflag=direct status=none"))?;
    Ok(written.status == Some(0))
}

fn reservations(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    let exports =
        "--export loopback --export loopback:naa.50014050000000b2 --export loopback:naa.50014050000000c3";
    let made = create_on_loopback(guest, "a", &format!("--image /scratch/r.raw --size 64M {exports}"))?;
    let now = disks(&made.report)?;
    // One holds a reservation for registrants, another is registered (with the largest key), and the second export is nobody's.
    guest.sh(&format!(
        "sg_persist --out --no-inquiry --register-ignore --param-sark=0xa1 {0} &&
         sg_persist --out --no-inquiry --register-ignore --param-sark=0xffffffffffffffff {1} &&
         sg_persist --out --no-inquiry --reserve --param-rk=0xa1 --prout-type=5 {0}",
        now[0].sg, now[2].sg
    ))?;
    // And the second export's port in a group of its own.
    guest.sh(
        "cd /sys/kernel/config/target && g=$(echo core/user_*/a)/alua/far && mkdir $g && echo 7 > $g/tg_pt_gp_id &&
         echo 1 > $g/alua_access_state && echo 1 > $g/preferred && echo 1 > $g/alua_access_type &&
         echo far > loopback/naa.50014050000000b2/tpgt_1/lun/lun_0/alua_tg_pt_gp",
    )?;
    let groups = |name: &str| {
        format!(
            "cd /sys/kernel/config/target/core/user_*/{name}/alua && for g in *; do cd $g
             for a in alua_* preferred tg_pt_gp_id; do echo $g $a $(cat $a); done; tr '\\0' '\\n' < members | grep -c lun_0 || true; cd ..; done"
        )
    };
    let group = guest.sh(&groups("a"))?;
    let before = read_reservations(guest, &now[0].sg)?;
    ensure!(before.contains("Key=0xa1") && before.contains("registrants only"), "{before}");
    let holds = |guest: &mut Guest, disks: &[Disk]| -> Result<()> {
        // A unit attention of the groups is heard once.
        guest.sh(&format!(
            "for sg in {} {} {}; do for _ in 1 2 3 4; do sg_turs $sg && break; done; sg_turs $sg; done",
            disks[0].sg, disks[1].sg, disks[2].sg
        ))?;
        ensure!(
            write(guest, &disks[0].device)? && write(guest, &disks[2].device)?,
            "those who are registered cannot write"
        );
        ensure!(!write(guest, &disks[1].device)?, "who is not registered has written");
        let conflict = guest.try_sh(&format!(
            "sg_raw -s 512 -i /dev/zero {} 2a 00 00 00 00 00 00 00 01 00 2>&1",
            disks[1].sg
        ))?;
        ensure!(
            conflict.stdout.contains("Reservation Conflict") || conflict.status == Some(24),
            "{:?}",
            conflict.stdout
        );
        Ok(())
    };
    holds(guest, &now)?;

    // While it is handed over nobody can change reservations, since that would be lost; when it fails all is as before.
    guest.sh(&format!("cat > /tmp/failing.py <<'END'\n{FAILING}\nEND\nsetsid python3 /tmp/failing.py > /tmp/failing.log 2>&1 < /dev/null &
        for _ in $(seq 100); do [ -S /run/failing.sock ] && exit 0; sleep 0.1; done; cat /tmp/failing.log; exit 1"))?;
    guest.sh("setsid tcmu-dif handover a --to unix:/run/failing.sock > /tmp/handover.log 2>&1 < /dev/null &
        for _ in $(seq 300); do [ -s /tmp/failing.state ] && exit 0; sleep 0.1; done; cat /tmp/handover.log; exit 1")?;
    for _ in 0..2 {
        let refused = guest
            .try_sh(&format!("sg_persist --out --no-inquiry --clear --param-rk=0xa1 {} 2>&1", now[0].sg))?;
        ensure!(refused.status != Some(0), "reservations were changed: {}", refused.stdout);
    }
    let state = guest.sh("tr -c '[:print:]' '\\n' < /tmp/failing.state")?;
    ensure!(state.contains("0xffffffffffffffff") && state.contains("\"far\""), "{state}");
    guest.sh("touch /tmp/failing.now; for _ in $(seq 300); do [ -s /tmp/handover.log ] && exit 0; sleep 0.1; done; exit 1")?;
    let said = guest.sh("cat /tmp/handover.log")?;
    ensure!(said.contains("it was told to fail") && said.contains("serves here as before"), "{said}");
    holds(guest, &now)?;
    ensure!(read_reservations(guest, &now[0].sg)? == before);
    ensure!(guest.sh(&groups("a"))? == group);
    guest.sh("[ -z \"$(ls /run/tcmu-dif/held)\" ]")?;

    // There and back.
    let mut last = now;
    for (from, to) in [("a", "b"), ("b", "a")] {
        receive(guest, to)?;
        let given = guest.json(&format!("tcmu-dif handover {from} --to unix:{SOCKET} --json"))?;
        ensure!(given["answered"] == true && given["left"].is_null(), "{given}");
        let made = received(guest)?;
        last = after(&last, &made)?;
        ensure!(names(guest)? == [to]);
        ensure!(
            read_reservations(guest, &last[0].sg)? == before,
            "{}",
            read_reservations(guest, &last[0].sg)?
        );
        ensure!(guest.sh(&groups(to))? == group, "{}", guest.sh(&groups(to))?);
        holds(guest, &last)?;
        guest.sh("[ -z \"$(ls /run/tcmu-dif/held)\" ]")?;
    }
    // They are as good as any: they can be given up, with which all may write.
    guest.sh(&format!("sg_persist --out --no-inquiry --clear --param-rk=0xa1 {}", last[0].sg))?;
    ensure!(
        write(guest, &last[1].device)? || write(guest, &last[1].device)?,
        "nobody has reserved it any more"
    );

    // RESERVE(6) cannot be taken along, and refuses before anything is touched.
    guest.sh(&format!("sg_raw {0} 16 00 00 00 00 00 || sg_raw {0} 16 00 00 00 00 00", last[0].sg))?;
    receive(guest, "b")?;
    let refused = guest.try_sh(&format!("tcmu-dif handover a --to unix:{SOCKET} 2>&1"))?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("RESERVE(6)"), "{}", refused.stdout);
    guest.sh(&format!("sg_raw {} 17 00 00 00 00 00", last[0].sg))?;
    guest.sh(&format!("for _ in $(seq 300); do [ -e {SOCKET} ] || exit 0; sleep 0.1; done; exit 1"))?;
    receive(guest, "b")?;
    guest.sh(&format!("tcmu-dif handover a --to unix:{SOCKET}"))?;
    received(guest)?;
    delete(guest, "b")?;
    assert_nothing_left(guest)
}

/// Becomes another host, whose daemon starts: the one before is gone with all that it had in the kernel.
fn become_host(guest: &mut Guest, number: u32, lun: Option<&str>) -> Result<()> {
    if let Some(lun) = lun {
        guest.sh(&format!("kill -9 $(cat /run/tcmu-dif/daemon.pid); tcmu-dif delete --force {lun}"))?;
    }
    guest.sh(&format!(
        "[ -e /etc/machine-id ] || touch /etc/machine-id; printf '%032x\\n' {number} > /tmp/id-{number}
         mount --bind /tmp/id-{number} /etc/machine-id && hostname host-{number}"
    ))?;
    start_daemon(guest, "auto")
}

fn standby(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let image = "/scratch/s.qcow2";
    become_host(guest, 1, None)?;
    let made = format!("--image {image} --pi type1 --serial standby-1");
    create_on_loopback(guest, "s", &format!("{made} --size 64M --format qcow2"))?;
    delete(guest, "s")?;
    guest.sh(&format!("tcmu-dif image owner --share {image}"))?;
    let first = create_on_loopback(guest, "s", &made)?;
    guest.sh(&format!(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=24 status=none && dd if=/tmp/data of={} bs=1M oflag=direct status=none
         mkdir -p /scratch/standby.d
         printf 'image = \"{image}\"\\npi = \"type1\"\\nserial = \"standby-1\"\\nexport = [\"loopback\"]\\n' > /scratch/standby.d/s.toml
         printf '#!/bin/sh\\necho $1 > /tmp/fenced\\n' > /scratch/agent && chmod +x /scratch/agent",
        first.device
    ))?;
    // It is here.
    let refused = guest.try_sh("tcmu-dif standby /scratch/standby.d/s.toml 2>&1")?;
    ensure!(refused.status == Some(1) && refused.stdout.contains("is here already"), "{}", refused.stdout);
    for (number, agent) in [(2, ""), (3, "--fence-agent /scratch/agent")] {
        become_host(guest, number, Some("s"))?;
        let refused = guest.try_sh(&format!("tcmu-dif create s {made} --export loopback 2>&1"))?;
        let gone = format!("host-{}", number - 1);
        ensure!(refused.status == Some(1) && refused.stdout.contains(&gone), "{}", refused.stdout);
        let over = guest.json(&format!("tcmu-dif standby /scratch/standby.d/s.toml --json {agent}"))?;
        let ms = |name: &str| over[name].as_u64().unwrap_or(u64::MAX);
        ensure!(over["from"] == gone.as_str() && ms("silent-ms") >= 10_000, "{over}");
        ensure!(over["fenced"] == !agent.is_empty(), "{over}");
        ensure!(if agent.is_empty() { ms("image-ms") >= 15_000 } else { ms("image-ms") < 10_000 }, "{over}");
        let device =
            over["lun"]["exports"][0]["device"].as_str().with_context(|| format!("no disk in {over}"))?;
        guest.sh(&format!(
            "cmp -n $((24 << 20)) /tmp/data <(dd if={device} bs=1M iflag=direct status=none)"
        ))?;
        ensure!(
            guest
                .sh("cat /sys/kernel/config/target/core/user_*/s/wwn/vpd_unit_serial")?
                .contains("standby-1")
        );
        ensure!(
            guest.json(&format!("tcmu-dif image owner --json {image}"))?["host"]
                == format!("host-{number}").as_str()
        );
    }
    ensure!(guest.sh("cat /tmp/fenced")?.trim() == "host-2");
    delete(guest, "s")?;
    assert_nothing_left(guest)?;
    // Hosts that are gone may have leaked clusters; a reference to a free one would be corruption.
    let check = guest.try_sh(&format!("qemu-img check -f qcow2 {image}"))?;
    ensure!(matches!(check.status, Some(0 | 3)), "{}", check.stdout);
    assert_image_clean(guest, image, "raw", true)
}
