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

#[test]
fn as_json_the_demo_tells_the_steps_that_came_true_and_the_figures() {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["demo", "--json"])
        .env("TMPDIR", dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let steps = said["steps"].as_array().unwrap();
    for wanted in ["the stale block is found", "and the one that should not have"] {
        let of = steps.iter().filter(|s| s["step"].as_str().unwrap().starts_with(wanted)).count();
        assert_eq!(of, 2, "{wanted}: once for each format");
    }
    assert!(steps.iter().all(|s| !s["title"].as_str().unwrap().is_empty()));
    let measured = said["measured"].as_array().unwrap();
    assert_eq!(measured.len(), 16);
    for one in measured {
        assert!(one["per_second"].as_f64() > Some(0.0) && one["median_us"].as_f64() > Some(0.0), "{one}");
    }
}
