//! The README's tour, command by command: what it shows is what a reader gets.

use super::lun::{assert_nothing_left, delete, start_daemon, stop_daemon};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};

pub const TESTS: &[Test] = &[Test {
    name: "readme.tour",
    promise: "every command of the README's console blocks succeeds and says what the README shows",
    limit: 300,
    group: None,
    run: tour,
}];

/// A command of a console block, and what is shown under it.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    command: String,
    output: Vec<String>,
}

fn tour(run: &mut Run<'_>) -> Result<()> {
    let readme = crate::sh::workspace_root().join("README.md");
    let readme =
        std::fs::read_to_string(&readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let tour = commands(&readme);
    ensure!(tour.len() >= 8, "the README shows {} commands only", tour.len());
    let guest = &mut *run.guest;
    guest.sh("mkdir -p /var/lib/images")?;
    for Shown { command, output } in &tour {
        if command == "tcmu-dif daemon &" {
            start_daemon(guest, "auto")?;
            continue;
        }
        let said = guest.sh(command).with_context(|| format!("README: {command}"))?;
        ensure!(
            matches(output, &said),
            "README: {command}\nshows:\n{}\nand it says:\n{said}",
            output.join("\n")
        );
    }
    delete(guest, "vm2")?;
    assert_nothing_left(guest)?;
    stop_daemon(guest, "TERM")
}

/// The commands of every block that is marked `console`, in order.
fn commands(readme: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in readme.lines() {
        match line.strip_prefix("# ") {
            _ if line.starts_with("```") => inside = line == "```console",
            Some(command) if inside => {
                all.push(Shown { command: command.to_owned(), output: Vec::new() });
            }
            None if inside => all.iter_mut().last().into_iter().for_each(|c| c.output.push(line.to_owned())),
            _ => (),
        }
    }
    all
}

/// Whether lines are alike: runs of space are one, any number stands for any other and any name for any other; a line
/// `...` stands for all the rest.
fn matches(shown: &[String], said: &str) -> bool {
    let said: Vec<String> = said.trim_end().lines().map(normal).collect();
    let wanted: Vec<String> = shown.iter().map(|line| normal(line)).collect();
    match wanted.iter().position(|line| line == "...") {
        Some(end) => said.len() >= end && said[..end] == wanted[..end],
        None => said == wanted,
    }
}

fn normal(line: &str) -> String {
    let words = line.split_whitespace().map(|word| match word.split_once("naa.") {
        // A world-wide name: 16 hexadecimal digits.
        Some((before, after)) if after.len() >= 16 => format!("{before}naa.N{}", &after[16..]),
        _ => word.to_owned(),
    });
    let mut out = String::new();
    for c in words.collect::<Vec<_>>().join(" ").chars() {
        match c {
            '0'..='9' if out.ends_with('N') => (),
            '0'..='9' => out.push('N'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn console_blocks_are_read_and_others_are_not() {
        let readme = "# Title\n```sh\n# no\n```\n```console\n# a b\nout 1\n\n# c\n```\n# Heading\n";
        let shown = commands(readme);
        assert_eq!(shown.iter().map(|s| s.command.as_str()).collect::<Vec<_>>(), ["a b", "c"]);
        assert_eq!(shown[0].output, ["out 1", ""]);
        assert_eq!(shown[1].output, [""; 0]);
    }

    #[test]
    fn numbers_and_names_may_differ_and_words_may_not() {
        let shown = ["loopback naa.5001405d134a0666: /dev/sda".to_owned()];
        assert!(matches(&shown, "loopback   naa.50014050000000ff: /dev/sda\n"));
        assert!(!matches(&shown, "vhost naa.50014050000000ff: /dev/sda"));
        assert!(matches(&["mismatches:  0".to_owned()], "mismatches: 12"));
        assert!(!matches(&["a".to_owned(), "b".to_owned()], "a"));
        assert!(matches(&["a".to_owned(), "...".to_owned()], "a\nb\nc"));
    }
}
