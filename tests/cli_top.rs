//! `tcmu-dif top` before a daemon's QMP server with a LUN under load, on a terminal and without one.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    io::{Read, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use tcmu_dif::control::Registry;

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use rig::{Guest, MIB, Rig};

const BIN: &str = env!("CARGO_BIN_EXE_tcmu-dif");

fn top(run_dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(BIN);
    command.arg("top").args(words).arg("--run-dir").arg(run_dir).env_remove("TCMU_DIF_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Writes and reads while that runs; gives what it said, and how much was written.
fn under_load(guest: &mut Guest, mut child: Child) -> (Output, u64) {
    let end = Instant::now() + Duration::from_secs(60);
    let mut written = 0;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < end, "it does not end");
        assert_eq!(guest.write(0, &[7; 65536]), 0);
        assert_eq!(guest.read(0, 128), 0);
        written += 65536;
    }
    (child.wait_with_output().unwrap(), written)
}

#[test]
fn a_sample_has_the_rates_of_its_second_and_the_counters_so_far() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    let started = Instant::now();
    let (out, written) = under_load(&mut guest, top(rig.dir.path(), &["--json"]).spawn().unwrap());
    assert!(out.status.success(), "{out:?}");
    let seen: Value = serde_json::from_slice(&out.stdout).unwrap();
    let lun = &seen["luns"][0];
    let number = |pointer: &str| {
        seen.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer}: {seen}"))
    };
    assert_eq!((&lun["name"], &lun["state"], &lun["pi"]), (&"vm1".into(), &"online".into(), &"type1".into()));
    assert!(lun["in_flight"].is_u64() && seen["jobs"] == serde_json::json!([]), "{seen}");

    let interval = number("/interval_seconds");
    assert!(interval >= 1.0 && interval <= started.elapsed().as_secs_f64(), "{seen}");
    let (total, rate) = (number("/luns/0/totals/wr_bytes"), number("/luns/0/rates/wr_bytes"));
    assert!(total <= written as f64 && rate > 0.0 && rate * interval <= total, "{written}: {seen}");
    // Each write has 64 KiB, each read as much, and all of it is checked.
    let from_operations = number("/luns/0/rates/wr_operations") * 65536.0;
    assert!((rate / from_operations - 1.0).abs() < 1e-9, "{rate} is not {from_operations}: {seen}");
    assert!(number("/luns/0/rates/verified") > 0.0 && number("/luns/0/protection/generated") > 0.0, "{seen}");
    assert_eq!(number("/luns/0/protection/guard_errors"), 0.0);

    // One command at a time: never more than one on the average, and each took longer than nothing.
    let depth = number("/luns/0/rates/queue_depth");
    assert!(depth > 0.0 && depth <= 1.01, "{seen}");
    for kind in ["read", "write", "read_write"] {
        let at = |p: &str| number(&format!("/luns/0/rates/latency/{kind}/{p}"));
        let (half, most, nearly_all) = (at("p50_us"), at("p99_us"), at("p999_us"));
        assert!(0.0 < half && half <= most && most <= nearly_all, "{kind}: {seen}");
        // So many of them end in a second that the median cannot be longer than a second through half of them.
        let done = number("/luns/0/rates/rd_operations") + number("/luns/0/rates/wr_operations");
        assert!(half <= 2e6 / done * 2.0, "{kind}: {seen}");
    }
    assert!(seen["luns"][0]["rates"]["latency"]["flush"].is_null(), "{seen}");
}

#[test]
fn kill_minus_term_hup_or_int_gives_the_terminal_back_as_it_was() {
    let rig = Rig::new(Registry::default());
    let _guest = rig.protected("vm1", 8 * MIB);
    for signal in ["TERM", "HUP", "INT"] {
        let pid_file = rig.dir.path().join(format!("pid-{signal}"));
        // The program is in the shell's place: killed is top, and not who looks after it.
        let line = format!(
            "stty rows 20 cols 100; before=$(stty -g); sh -c 'echo $$ > {}; exec {BIN} top --run-dir {}'; \
             echo status $?; test \"$before\" = \"$(stty -g)\" && echo as before",
            pid_file.display(),
            rig.dir.path().display()
        );
        let mut child = Command::new("script")
            .args(["--quiet", "--return", "--command", &line, "/dev/null"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .env("TERM", "xterm")
            .spawn()
            .unwrap();
        let keys = child.stdin.take().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut said = Vec::new();
        let end = Instant::now() + Duration::from_secs(60);
        let mut read_until = |part: &str| {
            while !String::from_utf8_lossy(&said).contains(part) {
                assert!(Instant::now() < end, "no {part:?}: {:?}", String::from_utf8_lossy(&said));
                let mut more = [0; 4096];
                let n = out.read(&mut more).unwrap();
                assert!(n > 0, "no {part:?}: {:?}", String::from_utf8_lossy(&said));
                said.extend_from_slice(&more[..n]);
            }
        };
        read_until("vm1");
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        let killed = Command::new("kill").args([&format!("-{signal}"), pid.trim()]).status().unwrap();
        assert!(killed.success());
        read_until("as before");
        drop(keys);
        assert!(child.wait().unwrap().success());
        let said = String::from_utf8_lossy(&said);
        let at = |part: &str| said.rfind(part).unwrap_or_else(|| panic!("{signal}: no {part:?}: {said:?}"));
        assert!(at("\x1b[?1049l") > at("\x1b[?1049h") && at("status 0") > at("\x1b[?1049l"), "{said:?}");
    }
}

#[test]
fn a_sample_for_people_has_the_same_columns() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    let (out, _) = under_load(&mut guest, top(rig.dir.path(), &["--once"]).spawn().unwrap());
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.starts_with("1 LUN, 1 online: ") && said.contains(" MB/s"), "{said}");
    let heading = said.lines().nth(1).unwrap();
    for column in [
        "NAME",
        "STATE",
        "IN FLIGHT",
        "DEPTH",
        "READ/s",
        "WRITE/s",
        "P50 µs",
        "P99 µs",
        "P99.9 µs",
        "PI",
        "G/A/R ERR",
    ] {
        assert!(heading.contains(column), "{said}");
    }
    assert!(said.lines().nth(2).unwrap().starts_with("vm1 "), "{said}");
}

#[test]
fn without_a_terminal_the_way_for_scripts_is_named() {
    let rig = Rig::new(Registry::default());
    let out = top(rig.dir.path(), &[]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!((out.status.code(), out.stdout.len()), (Some(1), 0), "{said}");
    assert!(said.contains("terminal") && said.contains("\n  next: tcmu-dif list --json"), "{said}");
}

#[test]
fn without_a_daemon_the_next_step_is_to_start_it() {
    let dir = tempfile::tempdir().unwrap();
    for word in ["--once", "--json"] {
        let out = top(dir.path(), &[word]).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(1), "{said}");
        assert!(said.contains("no daemon listens") && said.contains("next: start it"), "{said}");
    }
}

#[test]
fn on_a_terminal_it_draws_until_q_and_gives_the_terminal_back() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    let line = format!("stty rows 20 cols 100; {BIN} top --run-dir {}", rig.dir.path().display());
    let mut child = Command::new("script")
        .args(["--quiet", "--return", "--command", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .env("TERM", "xterm")
        .spawn()
        .unwrap();
    let mut keys = child.stdin.take().unwrap();
    let quit = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(2500));
        keys.write_all(b"q").unwrap();
        keys
    });
    let (out, _) = under_load(&mut guest, child);
    drop(quit.join().unwrap());
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}");
    for drawn in ["vm1", "type1", "DEPTH", "P99 µs"] {
        assert!(said.contains(drawn), "{said:?}");
    }
    // Into the alternate screen, and out of it.
    let at = |sequence: &str| said.rfind(sequence).unwrap_or_else(|| panic!("no {sequence:?}: {said:?}"));
    assert!(at("\x1b[?1049l") > at("\x1b[?1049h"));
}
