//! The programs for the guest's `/usr/local/bin`: an archive that is a disk of the guest's, because the share takes an emulated kernel an eighth
//! of a second for each MiB.

use crate::sh;
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Writes them to `archive`, this program among them, without what debuggers want.
pub fn archive(programs: &[PathBuf], archive: &Path) -> Result<()> {
    let bin = archive.with_extension("d");
    fs::create_dir(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
    // By this name it is there even when cargo has built another in its place meanwhile.
    let own = (Path::new("/proc/self/exe"), "xtask".as_ref());
    let given = programs.iter().map(|path| (path.as_path(), path.file_name().unwrap_or_default()));
    for (program, name) in given.chain([own]) {
        let copy = bin.join(name);
        fs::copy(program, &copy)
            .with_context(|| format!("cannot give {} to the guest", program.display()))?;
        // What is no ELF file, or where there is no strip, is as good as it is.
        let _ = sh::quiet(Command::new("strip").arg(&copy));
    }
    sh::quiet(
        Command::new("tar").arg("--create").arg("--file").arg(archive).arg("--directory").arg(&bin).arg("."),
    )?;
    fs::remove_dir_all(&bin).with_context(|| format!("cannot remove {}", bin.display()))
}
