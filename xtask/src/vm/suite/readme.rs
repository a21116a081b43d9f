//! The README's tour, command by command: what it shows is what a reader gets.

use super::lun::{assert_nothing_left, delete, start_daemon, stop_daemon};
use super::shown::{Shown, commands, matches};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};

pub const TESTS: &[Test] = &[Test {
    name: "readme.tour",
    promise: "every command of the README's console blocks succeeds and says what the README shows",
    limit: 300,
    group: None,
    run: tour,
}];

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
