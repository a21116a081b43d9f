//! Clients that nobody here wrote: PyPI's `qemu.qmp`, and its `qmp-shell`, against the real server before a real LUN.
//!
//! They are installed by pip into a virtual environment under `target/tmp`, once; what is missing for that fails the tests.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs::File,
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tcmu_dif::control::Registry;

#[path = "common/qmp_rig.rs"]
#[allow(dead_code)] // Another test uses the rest.
mod rig;
#[path = "common/qmp_schema.rs"]
mod schema;

use rig::{MIB, Rig};
use schema::Schema;

/// What pip installs.
const PACKAGE: &str = "qemu.qmp==0.0.6";

/// A program of the virtual environment, which is made if it is not there.
fn program(name: &str) -> PathBuf {
    let tmp = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let lock = File::create(tmp.join("qmp-venv.lock")).unwrap();
    lock.lock().unwrap();
    let venv = tmp.join("qmp-venv");
    let made = venv.join(PACKAGE);
    if !made.exists() {
        let run = |command: &mut Command| {
            let done = command.output();
            let next = "apt-get install --yes --no-install-recommends python3 python3-venv python3-pip";
            let done = done.unwrap_or_else(|e| panic!("{command:?}: {e}; install what it needs: {next}"));
            let words = String::from_utf8_lossy(&done.stderr);
            assert!(
                done.status.success(),
                "{command:?} failed: {words}\nIt needs these Debian packages and PyPI: {next}"
            );
        };
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv));
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", PACKAGE]));
        File::create(made).unwrap();
    }
    venv.join("bin").join(name)
}

#[test]
fn qemus_own_python_client_asks_everything_and_hears_a_scrub() {
    let python = program("python3");
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    assert_eq!(guest.write(0, &[7; 4096]), 0);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp_client.py");
    let out = Command::new(python).arg(script).arg(rig.socket()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();

    let answers = said["answers"].as_object().unwrap();
    let schema = Schema(answers["query-qmp-schema"].clone());
    assert!(answers.len() >= 9, "{:?}", answers.keys());
    for (query, answer) in answers {
        schema.check_answer(query, answer);
    }
    assert_eq!(answers["query-block"][0]["device"], "vm1");
    assert_eq!(answers["query-blockstats"][0]["stats"]["wr_bytes"], json!(4096));
    assert_eq!(said["error"][0], "DeviceNotFound");
    let events = said["events"].as_array().unwrap();
    events.iter().for_each(|event| schema.check_event(event));
    let statuses: Vec<&str> = events.iter().filter_map(|e| e["data"]["status"].as_str()).collect();
    assert_eq!(statuses, ["created", "running", "waiting", "pending", "concluded", "null"]);
    guest.lun.stop().unwrap();
}

#[test]
fn qmp_shell_asks_and_is_answered() {
    let shell = program("qmp-shell");
    let rig = Rig::new(Registry::default());
    let guest = rig.protected("vm1", 8 * MIB);
    let mut child = Command::new(shell)
        .arg(rig.socket())
        .env("HOME", rig.dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let script = "query-version\nblock_resize device=vm1 size=16777216\nquery-luns\nno-such-command\n";
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    // Its prompt stands before each answer.
    let answers: Vec<Value> = text
        .lines()
        .map(|line| line.rsplit_once("(QEMU) ").map_or(line, |(_, rest)| rest))
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    assert_eq!(answers.len(), 4, "{text}");
    assert!(answers[0]["return"]["package"].as_str().unwrap().starts_with("tcmu-dif "), "{text}");
    assert_eq!(answers[1], json!({ "return": {} }));
    assert_eq!(answers[2]["return"][0]["size"], json!(16 * MIB));
    assert_eq!(answers[3]["error"]["class"], "CommandNotFound");
    guest.lun.stop().unwrap();
}
