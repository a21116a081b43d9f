//! target_core_user.ko with our change (`vendor/linux/`), built out of tree for the VM's kernel.
//!
//! Headers and source are Debian's, of the very version of the cached kernel; they are downloaded and unpacked in the cache and
//! never installed. The diff has no context lines, so it is applied to exactly the file that it was made for: the SHA-256 below.

use super::artefacts::{only_entry, version};
use crate::sh;
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Our change, relative to the file itself (`patch -p0`).
const DIFF: &str = include_str!("../../../vendor/linux/target_core_user-6.12-dif.diff");

/// SHA-256 of the target_core_user.c that the diff was made for: that of 6.12.117.
const SOURCE_SHA256: &str = "cc05631a24021021574c27a73916d819f1aaec973c48aaf4875644350584d4d7";

/// The package with the kernel's source, and the file in it.
const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_FILE: &str = "linux-source-6.12/drivers/target/target_core_user.c";

/// What the module is made from, for the cache.
pub fn recipe(kernel_name: &str) -> String {
    format!("1\n{kernel_name}\n{SOURCE_SHA256}\n{DIFF}")
}

/// Builds the module for the kernel in `kernel`, and leaves `target_core_user.ko` in `at`.
pub fn build(kernel: &Path, at: &Path) -> Result<()> {
    let version = version(kernel)?;
    let work = at.join("work");
    fs::create_dir(&work)?;
    let headers = unpack_headers(&version, &work).with_context(|| {
        format!("if Debian has a newer kernel than {version} by now, remove {}", kernel.display())
    })?;
    let module = work.join("module");
    fs::create_dir(&module)?;
    unpack_source(&work, &module)?;
    let source = module.join("target_core_user.c");
    let sum = sh::run("sha256sum", [&source])?;
    ensure!(
        sum.starts_with(SOURCE_SHA256),
        "target_core_user.c of {version} is another than vendor/linux was made for: look at what changed there, make the \
         diff anew and put its new SHA-256 into xtask/src/vm/module.rs"
    );
    fs::write(work.join("dif.diff"), DIFF)?;
    sh::quiet(Command::new("patch").args(["-p0", "-i", "../dif.diff"]).current_dir(&module))?;
    fs::write(module.join("Makefile"), "obj-m := target_core_user.o\n")?;
    let mut make = Command::new("make");
    make.arg("-C").arg(&headers).arg(format!("M={}", module.display())).arg("modules");
    sh::quiet(&mut make)?;
    fs::copy(module.join("target_core_user.ko"), at.join("target_core_user.ko"))?;
    // 150 MB of source and headers served their purpose.
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// Debian's headers for the kernel `version`, made to work where they lie.
fn unpack_headers(version: &str, work: &Path) -> Result<std::path::PathBuf> {
    let (abi, _) = version.rsplit_once('-').context("a kernel version without a flavour")?;
    for package in [
        format!("linux-headers-{version}"),
        format!("linux-headers-{abi}-common"),
        format!("linux-kbuild-{abi}"),
    ] {
        sh::quiet(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(work))?;
        let archive = only_entry(work, &format!("{package}_"))?;
        sh::quiet(Command::new("dpkg-deb").arg("-x").arg(archive).arg(work))?;
    }
    let headers = work.join("usr/src").join(format!("linux-headers-{version}"));
    // Its one line names the place where an installed package would lie.
    let makefile = headers.join("Makefile");
    let text = fs::read_to_string(&makefile)?;
    fs::write(&makefile, text.replace("/usr/src/", &format!("{}/usr/src/", work.display())))?;
    // With it kbuild wants pahole, for type information that nobody here reads.
    fs::remove_file(headers.join("vmlinux"))?;
    Ok(headers)
}

/// The one file of Debian's kernel source, of the version that the headers are of.
fn unpack_source(work: &Path, to: &Path) -> Result<()> {
    let headers = only_entry(work, "linux-kbuild-")?;
    let debian = sh::run("dpkg-deb", [Path::new("--field"), &headers, Path::new("Version")])?;
    let package = format!("{SOURCE_PACKAGE}={}", debian.trim());
    sh::quiet(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(work))?;
    let archive = only_entry(work, &format!("{SOURCE_PACKAGE}_"))?;
    let pipe = format!(
        "set -o pipefail; dpkg-deb --fsys-tarfile {} | tar --extract --to-stdout ./usr/src/{SOURCE_PACKAGE}.tar.xz \
         | tar --extract --xz --occurrence=1 --to-stdout {SOURCE_FILE} > {}/target_core_user.c",
        archive.display(),
        to.display()
    );
    // tar stops reading at the first occurrence, and the one before it then finds nobody who listens: that is no error.
    let _ = sh::quiet(Command::new("bash").args(["-c", &pipe]));
    ensure!(
        fs::metadata(to.join("target_core_user.c")).is_ok_and(|m| m.len() > 0),
        "{} holds no {SOURCE_FILE}",
        archive.display()
    );
    fs::remove_file(archive)?;
    Ok(())
}
