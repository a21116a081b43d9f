//! Man pages and completions as a package gets them.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

fn files_of(dir: &Path) -> Vec<PathBuf> {
    let status =
        Command::new(env!("CARGO_BIN_EXE_tcmu-dif")).arg("packaging-files").arg(dir).status().unwrap();
    assert!(status.success());
    fs::read_dir(dir.join("man")).unwrap().map(|e| e.unwrap().path()).collect()
}

/// Whether a program is there; that it is not is said.
fn is_there(program: &str, version: &str, what: &str) -> bool {
    let there =
        Command::new(program).arg(version).stdin(Stdio::null()).output().is_ok_and(|out| {
            out.status.success() && !String::from_utf8_lossy(&out.stdout).contains("minimized")
        });
    if !there {
        println!("{program} is not installed: {what} is not judged by it");
    }
    there
}

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

#[test]
fn every_man_page_is_rendered_without_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let pages = files_of(dir.path());
    assert!(pages.len() > 40, "{pages:?}");
    let renderers: [(&str, &str, &[&str]); 3] = [
        ("man", "--version", &["--warnings", "-l"]),
        ("groff", "--version", &["-man", "-Tutf8", "-ww"]),
        // It has no word for its version.
        ("mandoc", "/dev/null", &["-Tutf8", "-Wwarning"]),
    ];
    let Some((program, _, words)) = renderers
        .into_iter()
        .find(|(program, version, _)| is_there(program, version, "what man pages look like"))
    else {
        println!("no man, groff or mandoc: nothing was judged");
        return;
    };
    let render = |page: &Path| {
        let mut command = Command::new(program);
        command.args(words).arg(page).env("MANWIDTH", "100").env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        let out = command.env("PAGER", "cat").env("MANPAGER", "cat").output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.success() && said.is_empty(), said, String::from_utf8_lossy(&out.stdout).into_owned())
    };
    for page in &pages {
        let (good, said, text) = render(page);
        assert!(good, "{program} {}: {said}", page.display());
        assert!(text.contains("NAME") && text.len() > 200, "{}: {text}", page.display());
    }
    // A page that is wrong would be found.
    let wrong = dir.path().join("wrong.1");
    fs::write(&wrong, ".TH wrong 1\n.SH NAME\nwrong\n.nosuchmacro\n.ft NOSUCHFONT\n").unwrap();
    let (good, said, _) = render(&wrong);
    assert!(!good, "{program} says nothing of a page that is wrong: {said}");
}

#[test]
fn shells_that_are_installed_read_their_completions() {
    let dir = tempfile::tempdir().unwrap();
    files_of(dir.path());
    for (shell, file) in [("bash", "tcmu-dif.bash"), ("zsh", "_tcmu-dif"), ("fish", "tcmu-dif.fish")] {
        if !is_there(shell, "--version", "its completion") {
            continue;
        }
        let path = dir.path().join("completions").join(file);
        let out = Command::new(shell).arg("-n").arg(&path).stdin(Stdio::null()).output().unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{shell}: {out:?}");
    }
}
