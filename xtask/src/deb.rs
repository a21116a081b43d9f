//! `cargo xtask deb`: the Debian package, by cargo-deb from `[package.metadata.deb]`.
//!
//! Man pages and completions are written by the very binary that goes into the package; the SBOM and the licences of what is in it by [`sbom`]. An error of lintian's fails the
//! chore; what it only warns of is shown.

use crate::{debian, sbom, sh};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Builds the package, has lintian look at it, and prints where it lies.
pub fn main(profile: &str) -> Result<()> {
    debian::ensure(debian::FOR_PACKAGE)?;
    let package = build(profile)?;
    let out = Command::new("lintian")
        .args(["--fail-on", "error"])
        .arg(&package)
        .output()
        .context("cannot run lintian")?;
    print!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    if !out.status.success() {
        bail!("lintian finds errors in {}", package.display());
    }
    println!("{}", package.display());
    Ok(())
}

/// Builds the package; gives where it lies.
pub fn build(profile: &str) -> Result<PathBuf> {
    if !sh::on_path("cargo-deb") {
        bail!("cargo-deb is missing; this line installs it:\n  cargo install --locked cargo-deb");
    }
    sh::quiet(sh::cargo().args(["build", "--quiet", "--bin", "tcmu-dif", "--profile", profile]))?;
    let folder = if profile == "dev" { "debug" } else { profile };
    let binary = sh::target_dir().join(folder).join("tcmu-dif");

    // The names that [package.metadata.deb] gives.
    let made = sh::workspace_root().join("target/packaging");
    if made.exists() {
        fs::remove_dir_all(&made).with_context(|| format!("cannot remove {}", made.display()))?;
    }
    fs::create_dir_all(&made).with_context(|| format!("cannot make {}", made.display()))?;
    sh::quiet(Command::new(&binary).arg("packaging-files").arg(&made))?;
    sbom::main(&made)?;
    let manifest = fs::read_to_string(sh::workspace_root().join("Cargo.toml"))?;
    let date = sh::run("date", ["--utc", "--rfc-email"])?;
    fs::write(made.join("changelog"), changelog(&manifest, date.trim())?)?;

    let mut cargo = sh::cargo();
    cargo.args(["deb", "--no-build", "--strip", "--quiet", "--package", "tcmu-dif", "--profile", profile]);
    let said = sh::quiet(&mut cargo)?;
    let package = said.lines().rfind(|line| line.ends_with(".deb")).map(str::trim);
    let package = package.with_context(|| format!("cargo-deb named no package: {said}"))?;
    Ok(PathBuf::from(package))
}

/// Debian's changelog: one entry for the version of the manifest, which points to ours.
fn changelog(manifest: &str, date: &str) -> Result<String> {
    let value = |key: &str| {
        let line = manifest.lines().find_map(|l| l.strip_prefix(key)?.trim_start().strip_prefix('='));
        let value = line.map(|v| v.trim().trim_matches('"').to_owned());
        value.with_context(|| format!("Cargo.toml has no {key}"))
    };
    let (version, maintainer) = (value("version")?, value("maintainer")?);
    Ok(format!(
        "tcmu-dif ({version}-1) unstable; urgency=medium\n\n  * What has changed: /usr/share/doc/tcmu-dif/NEWS.md\n\n \
         -- {maintainer}  {date}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_changelog_has_the_manifest_s_version_and_maintainer_in_debian_s_form() {
        let manifest = "[package]\nname = \"a\"\nversion = \"1.2.3\"\n[package.metadata.deb]\nmaintainer = \"A <a@b.c>\"\n";
        let text = changelog(manifest, "Mon, 23 Nov 2026 12:00:00 +0000").unwrap();
        assert!(text.starts_with("tcmu-dif (1.2.3-1) unstable; urgency=medium\n\n  * "), "{text}");
        assert!(text.ends_with("\n -- A <a@b.c>  Mon, 23 Nov 2026 12:00:00 +0000\n"), "{text}");
        assert!(changelog("version = \"1\"\n", "").is_err());
    }
}
