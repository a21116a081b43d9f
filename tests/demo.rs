//! The demo is the first thing that anybody runs: it ends well, and has shown every fault that it made.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::process::{Command, Stdio};

#[test]
fn the_demo_finds_every_fault_that_it_makes_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .arg("demo")
        .env("TMPDIR", dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, log) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{said}\n{log}");
    for wanted in [
        "A raw image",
        "A qcow2 image",
        "CHECK CONDITION 0Bh/10h/01h",
        "ok  the stale block is found",
        "ok  the block that should have changed is found",
        "ok  and the one that should not have",
        "commands a second, median latency",
    ] {
        assert!(said.contains(wanted), "nothing of {wanted:?} in:\n{said}");
    }
    // It takes its images with it.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
