//! `tcmu-dif throttle` before a daemon's QMP server with a LUN.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::Path,
    process::{Command, Output},
};

use serde_json::{Value, json};
use tcmu_dif::control::Registry;

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use rig::{MIB, Rig};

fn throttle(run_dir: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"));
    command.arg("throttle").args(words).arg("--run-dir").arg(run_dir).env_remove("TCMU_DIF_LOG");
    command.output().unwrap()
}

fn shown(run_dir: &Path, words: &[&str]) -> Value {
    let out = throttle(run_dir, &[words, &["--json"]].concat());
    assert!(out.status.success(), "{words:?}: {out:?}");
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn limits_are_set_all_anew_shown_and_taken_away() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    let dir = rig.dir.path();
    let none = shown(dir, &["vm1"]);
    assert_eq!(
        (&none["name"], &none["throttle"], &none["limits"]),
        (&json!("vm1"), &json!("off"), &json!({}))
    );

    let set = shown(dir, &["vm1", "bps_wr=1M,bps_wr_max=2M,bps_wr_max_length=3,iops=500,iops_size=4096"]);
    let limits = json!({
        "bps_wr": MIB, "bps_wr_max": 2 * MIB, "bps_wr_max_length": 3, "iops": 500, "iops_size": 4096,
    });
    assert_eq!(set["limits"], limits);
    assert_eq!(shown(dir, &["vm1"])["limits"], limits);
    // What was not named again is gone.
    assert_eq!(shown(dir, &["vm1", "iops_wr=1"])["limits"], json!({ "iops_wr": 1 }));
    for _ in 0..4 {
        assert_eq!(guest.write(0, &[7; 512]), 0);
    }
    let out = throttle(dir, &["vm1"]);
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.contains("iops_wr=1") && said.contains("waiting"), "{said}");
    assert!(shown(dir, &["vm1"])["delayed"].as_u64() > Some(0));
    assert_eq!(shown(dir, &["vm1", "off"])["limits"], json!({}));
}

#[test]
fn what_is_wrong_is_named_with_the_next_step_and_changes_nothing() {
    let rig = Rig::new(Registry::default());
    let _guest = rig.protected("vm1", 8 * MIB);
    let dir = rig.dir.path();
    shown(dir, &["vm1", "iops=500"]);
    let empty = tempfile::tempdir().unwrap();
    for (at, words, status, named) in [
        (dir, &["nobody"][..], 1, "nobody"),
        (dir, &["nobody", "iops=5"], 1, "nobody"),
        (dir, &["vm1", "iops=5,iops_rd=5"], 2, "iops and iops_rd cannot"),
        (dir, &["vm1", "speed=5"], 2, "there is no limit \"speed\""),
        (empty.path(), &["vm1"], 1, "no daemon listens"),
    ] {
        let out = throttle(at, words);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!((out.status.code(), out.stdout.len()), (Some(status), 0), "{words:?}: {said}");
        assert!(said.contains(named) && said.contains("next: "), "{words:?}: {said}");
    }
    assert_eq!(shown(dir, &["vm1"])["limits"], json!({ "iops": 500 }));
}
