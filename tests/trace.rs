//! `tcmu-dif trace`: commands of a LUN as they pass, seen by a program and by the command line.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::control::{
    Registry,
    trace::{SOCKET, Server},
};

#[allow(dead_code)] // QMP's tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use rig::{MIB, Rig};

fn served() -> (Rig, Server) {
    let rig = Rig::new(Registry::default());
    let server = Server::listen(&rig.dir.path().join(SOCKET), rig.luns.clone()).unwrap();
    (rig, server)
}

/// What a client hears that says this.
fn watch(rig: &Rig, question: &str) -> impl Iterator<Item = Value> + use<> {
    let mut stream = UnixStream::connect(rig.dir.path().join(SOCKET)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream.write_all(question.as_bytes()).unwrap();
    BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
}

#[test]
fn every_command_is_told_with_its_blocks_its_end_and_its_time() {
    let (rig, _server) = served();
    let mut guest = rig.protected("vm1", 8 * MIB);
    assert_eq!(guest.write(8, &[1; 4096]), 0, "before anybody watches");
    let mut lines = watch(&rig, "{\"device\":\"vm1\"}\n");
    assert_eq!(lines.next().unwrap(), json!({ "tracing": "vm1" }));
    assert_eq!((guest.write(16, &[2; 1024]), guest.read(16, 2), guest.flush()), (0, 0, 0));
    assert_ne!(guest.read(u32::MAX, 1), 0);
    guest.lun.stop().unwrap();
    let mut told: Vec<Value> = lines.collect();
    for command in &mut told[..4] {
        let map = command.as_object_mut().unwrap();
        assert!(map.remove("microseconds").unwrap().as_f64().unwrap() > 0.0);
        assert!(map.remove("time-us").unwrap().as_u64().unwrap() > 0);
    }
    let want = [
        json!({ "opcode": 0x2a, "name": "WRITE", "lba": 16, "blocks": 2, "status": 0 }),
        json!({ "opcode": 0x28, "name": "READ", "lba": 16, "blocks": 2, "status": 0 }),
        json!({ "opcode": 0x35, "name": "SYNCHRONIZE CACHE", "lba": 0, "blocks": 0, "status": 0 }),
        json!({
            "opcode": 0x28, "name": "READ", "lba": u32::MAX, "blocks": 1, "status": 2,
            "sense": { "key": 5, "asc": 0x21, "ascq": 0 },
        }),
        json!({ "ended": "vm1" }),
    ];
    assert_eq!(told, want);
}

#[test]
fn who_cannot_watch_is_told_why() {
    let (rig, server) = served();
    let path = rig.dir.path().join(SOCKET);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    for (question, words) in [
        ("{\"device\":\"vm1\"}\n", "LUN 'vm1' is not served"),
        ("{}\n", "say which LUN"),
        ("\u{1}\n", "say which LUN"),
        (&*"x".repeat(2000), "say which LUN"),
    ] {
        let said = watch(&rig, question).next().unwrap();
        assert!(said["error"].as_str().unwrap().contains(words), "{said}");
    }
    drop(server);
    assert!(!path.exists());
}

#[test]
fn one_who_watches_and_does_not_listen_holds_up_no_command() {
    let (rig, _server) = served();
    let mut guest = rig.protected("vm1", 8 * MIB);
    let mut lines = watch(&rig, "{\"device\":\"vm1\"}\n");
    assert_eq!(lines.next().unwrap(), json!({ "tracing": "vm1" }));
    // More than the queue and the socket hold together.
    let commands = 8000;
    for _ in 0..commands {
        assert_eq!(guest.read(0, 1), 0);
    }
    assert_eq!(guest.lun.stats().unwrap().traffic.read.operations, commands);
    guest.lun.stop().unwrap();
}

#[test]
fn the_command_line_prints_a_json_object_a_line_until_the_lun_ends() {
    let (rig, _server) = served();
    let mut guest = rig.protected("vm1", 8 * MIB);
    let run_dir = rig.dir.path().to_str().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["--run-dir", run_dir, "trace", "vm1", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"tracing\":\"vm1\"}");
    assert_eq!(guest.write(0, &[1; 512]), 0);
    let write: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!((&write["name"], &write["blocks"]), (&json!("WRITE"), &json!(1)));

    let mut counted = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["--run-dir", run_dir, "trace", "vm1", "--json", "--count", "2"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut of_counted = BufReader::new(counted.stdout.take().unwrap()).lines();
    assert_eq!(of_counted.next().unwrap().unwrap(), "{\"tracing\":\"vm1\"}");
    for block in [1, 2, 3] {
        assert_eq!(guest.write(block, &[1; 512]), 0);
        lines.next().unwrap().unwrap();
    }
    assert_eq!(of_counted.count(), 2, "it ends by itself, and the other goes on");
    assert!(counted.wait().unwrap().success());

    guest.lun.stop().unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "{\"ended\":\"vm1\"}");
    assert!(child.wait().unwrap().success());

    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["--run-dir", run_dir, "trace", "vm2"])
        .output()
        .unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.code() == Some(1) && said.contains("'vm2' is not served"), "{said}");
}
