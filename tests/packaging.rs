//! Man pages and completions as a package gets them.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{fs, process::Command};

#[test]
fn every_command_that_help_names_has_a_man_page_and_a_completion_and_hidden_ones_have_no_page() {
    let dir = tempfile::tempdir().unwrap();
    let tcmu_dif = || Command::new(env!("CARGO_BIN_EXE_tcmu-dif"));
    let status = tcmu_dif().arg("packaging-files").arg(dir.path()).status().unwrap();
    assert!(status.success());
    let help = String::from_utf8(tcmu_dif().arg("--help").output().unwrap().stdout).unwrap();
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let named = |l: &str| l.starts_with("  ") && !l.starts_with("   ");
    let names: Vec<&str> =
        commands.lines().filter(|l| named(l)).filter_map(|l| l.split_whitespace().next()).collect();
    assert!(names.len() > 8, "{help}");

    let bash = fs::read_to_string(dir.path().join("completions/tcmu-dif.bash")).unwrap();
    for name in &names {
        let page = fs::read_to_string(dir.path().join(format!("man/tcmu-dif-{name}.1"))).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{name}");
        assert!(bash.split_whitespace().any(|word| word.trim_matches('"') == *name), "{name}");
    }
    assert!(dir.path().join("man/tcmu-dif.1").is_file());
    assert!(!dir.path().join("man/tcmu-dif-packaging-files.1").exists());
    for file in ["_tcmu-dif", "tcmu-dif.fish"] {
        assert!(fs::metadata(dir.path().join("completions").join(file)).unwrap().len() > 1000, "{file}");
    }
    let checked = Command::new("bash").arg("-n").arg(dir.path().join("completions/tcmu-dif.bash")).status();
    assert!(checked.is_ok_and(|s| s.success()), "bash refuses its completions");
}

#[test]
fn a_directory_that_cannot_be_written_to_is_named() {
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["packaging-files", "/proc/none"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("/proc/none"), "{out:?}");
}
