//! The administrator's handbook, command by command, on a host as it describes: systemd is process 1, and the package comes as the handbook says.

use super::super::guest::Guest;
use super::fault::{flip, offset_in_file};
use super::shown::{Shown, commands, matches};
use super::{Run, Test};
use anyhow::{Context, Result, ensure};

pub const TESTS: &[Test] = &[Test {
    name: "docs.operations",
    promise: "every command of the handbook's console blocks succeeds and says what the handbook shows, from the installation to the purge",
    limit: 600,
    group: None,
    run: operations,
}];

const HANDBOOK: &str = "docs/operations.md";

/// How often a command that only looks is repeated until it says what is shown, a fifth of a second apart: what a reload orders takes its time.
const LOOKS: u32 = 150;

fn handbook() -> Result<String> {
    let path = crate::sh::workspace_root().join(HANDBOOK);
    std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

fn operations(run: &mut Run<'_>) -> Result<()> {
    let shown = commands(&handbook()?);
    let guest = &mut *run.guest;
    guest.sh("cp /host/tcmu-dif.deb /root/tcmu-dif_0_amd64.deb")?;
    for Shown { command, output } in &shown {
        if command.contains(" SENSE=") {
            meet_a_bad_block(guest)?;
        }
        let said = execute(guest, command, output).with_context(|| format!("{HANDBOOK}: {command}"))?;
        ensure!(
            matches(output, &said),
            "{HANDBOOK}: {command}\nshows:\n{}\nand it says:\n{said}",
            output.join("\n")
        );
    }
    guest.note(format!("{} commands", shown.len()));
    ensure!(!guest.try_sh("command -v tcmu-dif")?.ok(), "the handbook ends with the program installed");
    Ok(())
}

/// Has a block of vm1 go bad, be read, and written again: the log has an entry then.
fn meet_a_bad_block(guest: &mut Guest) -> Result<()> {
    let (image, at) = ("/srv/images/vm1.qcow2", 64 << 20);
    let device = guest.sh("tcmu-dif show vm1 --json | sed -n 's/.*\"device\": *\"\\([^\"]*\\)\".*/\\1/p'")?;
    let (device, seek) = (device.trim(), at / 4096);
    let write = format!(
        "dd if=/dev/urandom of={device} bs=4096 seek={seek} count=1 oflag=direct status=none && sync"
    );
    guest.sh(&write)?;
    let place = offset_in_file(guest, image, "qcow2", at)?;
    flip(guest, image, place)?;
    let read = guest.try_sh(&format!("dd if={device} bs=4096 skip={seek} count=1 iflag=direct 2>&1"))?;
    ensure!(!read.ok(), "a bad block was read");
    guest.sh(&write).map(drop)
}

/// Runs a command until it says what is shown, if it only looks, and else once; gives what it said last.
fn execute(guest: &mut Guest, command: &str, shown: &[String]) -> Result<String> {
    let looks = ["tcmu-dif list", "tcmu-dif show", "journalctl"].iter().any(|word| command.starts_with(word));
    let mut said = guest.sh(command);
    for _ in 1..if looks { LOOKS } else { 1 } {
        match &said {
            Ok(text) if matches(shown, text) => break,
            _ => guest.sh("sleep 0.2")?,
        };
        said = guest.sh(command);
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What cannot be executed in the VM stands in blocks of another kind, and these are few.
    #[test]
    fn nearly_all_of_the_handbook_s_commands_are_executed() {
        let text = handbook().unwrap();
        let opened: Vec<&str> = text.lines().filter(|l| l.starts_with("```") && l.len() > 3).collect();
        let others: Vec<&&str> = opened.iter().filter(|l| **l != "```console").collect();
        assert!(others.iter().all(|l| **l == "```sh") && others.len() <= 1, "{others:?}");
        assert!(commands(&text).len() >= 30, "{} commands", commands(&text).len());
        let indented = text.lines().find(|l| l.starts_with("    "));
        assert_eq!(indented, None, "a block that no test reads");
    }
}
