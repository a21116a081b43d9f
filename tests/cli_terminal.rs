//! Colours and progress bars: on a terminal, and nowhere else.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

const BIN: &str = env!("CARGO_BIN_EXE_tcmu-dif");

/// Takes long enough for a bar to be drawn, and says something about what it found.
const WORDS: &str = "pi verify disk.raw";

fn protected(dir: &Path) {
    fs::write(dir.join("disk.raw"), vec![5; 32 << 20]).unwrap();
    let out = piped(dir, "pi rebuild disk.raw --pi type1");
    assert!(out.0.contains("blocks:"), "{out:?}");
}

/// Standard output and standard error, which are pipes.
fn piped(dir: &Path, words: &str) -> (String, String) {
    let out =
        Command::new(BIN).args(words.split(' ')).current_dir(dir).stdin(Stdio::null()).output().unwrap();
    (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
}

/// Both, on a terminal.
fn on_a_terminal(dir: &Path, words: &str, no_color: &str) -> String {
    let out = Command::new("script")
        .args(["--quiet", "--command", &format!("{BIN} {words}"), "/dev/null"])
        .current_dir(dir)
        .env("TERM", "xterm")
        .env("NO_COLOR", no_color)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn a_bar_is_drawn_on_a_terminal_and_pipes_get_text_alone() {
    let dir = tempfile::tempdir().unwrap();
    protected(dir.path());
    let is_plain = |text: &str| !text.contains(['\x1b', '\r']);
    for words in [
        WORDS,
        "pi rebuild disk.raw --pi type3",
        "pi status disk.raw",
        "image info disk.raw",
        "--help",
        "top",
        "nonsense",
    ] {
        let (out, err) = piped(dir.path(), words);
        assert!(is_plain(&out) && is_plain(&err), "{words}: {out:?} {err:?}");
    }
    let (out, err) = piped(dir.path(), WORDS);
    assert!(out.contains("verified:") && err.is_empty(), "{out:?} {err:?}");
    let drawn = on_a_terminal(dir.path(), WORDS, "");
    assert!(drawn.contains("\x1b[") && drawn.contains("verified:"), "{drawn:?}");
}

#[test]
fn log_lines_are_coloured_on_a_terminal_unless_somebody_wants_no_colour() {
    let dir = tempfile::tempdir().unwrap();
    protected(dir.path());
    // What is changed without its protection is warned of.
    let words = "image resize --shrink disk.raw 16M";
    let (_, err) = piped(dir.path(), words);
    assert!(err.contains("WARN") && !err.contains('\x1b'), "{err:?}");
    let warning = "WARN";
    let plain = on_a_terminal(dir.path(), "image resize --shrink disk.raw 8M", "1");
    assert!(plain.contains(warning) && !plain.contains("\x1b["), "{plain:?}");
    let coloured = on_a_terminal(dir.path(), "image resize --shrink disk.raw 4M", "");
    assert!(coloured.contains(warning) && coloured.contains("\x1b["), "{coloured:?}");
}

#[test]
fn release_asks_a_person_for_more_than_its_name_and_a_service_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let words = |yes: &str| {
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (run, lib, configfs) = (at("run"), at("lib"), at("configfs"));
        format!("--run-dir {run} --state-dir {lib} --configfs {configfs} release{yes}")
    };
    fs::create_dir_all(dir.path().join("configfs/target/core")).unwrap();
    let refused = on_a_terminal(dir.path(), &words(""), "");
    assert!(refused.contains("every LUN of this host") && refused.contains("release --yes"), "{refused:?}");
    // Who is not root is refused later, for that.
    for said in [on_a_terminal(dir.path(), &words(" --yes"), ""), piped(dir.path(), &words("")).1] {
        assert!(!said.contains("--yes"), "{said:?}");
    }
}
