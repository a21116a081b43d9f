//! `--help` of every command, as it was when it was last looked at: a change is seen, and meant.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::process::Command;

fn help(words: &[&str]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(words)
        .arg("--help")
        .env("COLUMNS", "100")
        .env_remove("TCMU_DIF_LOG")
        .output()
        .unwrap();
    assert!(out.status.success(), "{words:?}");
    assert_eq!(out.stderr, b"", "{words:?}");
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn the_help_of_every_command_is_as_it_was() {
    for words in [
        &[][..],
        &["daemon"],
        &["create"],
        &["delete"],
        &["list"],
        &["show"],
        &["resize"],
        &["throttle"],
        &["export"],
        &["scrub"],
        &["mirror"],
        &["backup"],
        &["bitmap"],
        &["bitmap", "add"],
        &["bitmap", "merge"],
        &["bitmap", "list"],
        &["snapshot"],
        &["stream"],
        &["commit"],
        &["job"],
        &["job", "list"],
        &["job", "complete"],
        &["job", "cancel"],
        &["job", "pause"],
        &["job", "resume"],
        &["job", "share"],
        &["job", "speed"],
        &["handover"],
        &["receive"],
        &["standby"],
        &["trace"],
        &["image"],
        &["image", "create"],
        &["image", "info"],
        &["image", "check"],
        &["image", "repair"],
        &["image", "map"],
        &["image", "measure"],
        &["image", "snapshot"],
        &["image", "resize"],
        &["image", "owner"],
        &["pi"],
        &["pi", "verify"],
        &["pi", "rebuild"],
        &["pi", "adopt"],
        &["pi", "status"],
        &["top"],
        &["support-bundle"],
        &["check-host"],
        &["conformance"],
        &["demo"],
    ] {
        let name = ["tcmu-dif"].iter().chain(words).copied().collect::<Vec<_>>().join("_");
        insta::assert_snapshot!(name, help(words));
    }
}

#[test]
fn the_hidden_command_is_not_in_the_help_and_works() {
    assert!(!help(&[]).contains("peer-vhost"));
    assert!(help(&["peer-vhost"]).contains("--depth"));
}

#[test]
fn the_version_is_the_packages() {
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif")).arg("--version").output().unwrap();
    assert_eq!(String::from_utf8(out.stdout).unwrap(), format!("tcmu-dif {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_and_version_that_cannot_be_written_are_a_failure_and_a_reader_that_goes_away_is_none() {
    for words in [&["--help"][..], &["create", "--help"], &["--version"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif")).args(words).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{words:?}");
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.starts_with("tcmu-dif: stdout: "), "{words:?}: {said}");
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif")).args(words).stdout(writer).output().unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{words:?}: {out:?}");
    }
}
