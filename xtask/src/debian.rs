//! The Debian packages that the tests need, in one place.
//!
//! As root what is missing is installed; anybody else is told the one line that does it. Called before
//! any step of `cargo xtask test` and before the VM's artefacts are built.

use crate::sh;
use anyhow::{Result, bail};
use std::process::{Command, Stdio};

/// What `cargo xtask test --quick` needs: bindgen's library, the images' second opinion, what installs QEMU's own QMP client, the unit's
/// second opinion, the metrics' (`promtool`, and the one strict reader of OpenMetrics), a private bus and its clients (`gdbus`, `busctl`), and who reads what is printed for guests: libvirt's
/// schema (`virt-xml-validate` calls xmllint) and QEMU. NBD's servers and clients (`nbdkit`, `nbdinfo`, `nbdcopy`; `qemu-nbd` is in qemu-utils).
pub const FOR_TESTS: &[&str] = &[
    "dbus",
    "libclang-14-dev",
    "libglib2.0-bin",
    "libisal2",
    "libnbd-bin",
    "libvirt-clients",
    "libvirt0",
    "libxml2-utils",
    "nbdkit",
    "prometheus",
    "python3",
    "python3-pip",
    "python3-prometheus-client",
    "python3-venv",
    "qemu-system-x86",
    "qemu-utils",
    "systemd",
];

/// What the VM needs on top: the emulator, and what builds its artefacts.
pub const FOR_VM: &[&str] = &[
    "busybox-static",
    "ca-certificates",
    "cpio",
    "debootstrap",
    "e2fsprogs",
    "gcc-12",
    "kmod",
    "make",
    "patch",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
    "util-linux",
    "xz-utils",
    "zstd",
];

/// What `cargo xtask emulate-guard` needs: the emulator, and what makes its boot disc.
pub const FOR_EMULATION: &[&str] = &[
    "binutils",
    "bochs",
    "bochs-term",
    "bochsbios",
    "busybox-static",
    "cpio",
    "isolinux",
    "syslinux-common",
    "xorriso",
];

/// What `cargo xtask deb` needs: the libraries' packages by name, and the judge.
pub const FOR_PACKAGE: &[&str] = &["dpkg-dev", "lintian"];

/// Makes sure that every package of `wanted` is installed.
pub fn ensure(wanted: &[&str]) -> Result<()> {
    let missing: Vec<&str> = wanted.iter().copied().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --yes --no-install-recommends {}", missing.join(" "));
    if !sh::on_path("apt-get") {
        bail!(
            "packages are missing, and this is no Debian; what they are called there: {}",
            missing.join(" ")
        );
    }
    if !rustix::process::geteuid().is_root() {
        bail!("Debian packages are missing; this line installs them:\n  sudo {line}");
    }
    println!("installing {}", missing.join(" "));
    apt(&["update", "-qq"])?;
    install(&missing)?;
    // Packages from elsewhere (QEMU of the backports, say) may have gone to make room for those, ours among them.
    let displaced: Vec<&str> = wanted.iter().copied().filter(|name| !installed(name)).collect();
    if displaced.is_empty() { Ok(()) } else { install(&displaced) }
}

fn install(packages: &[&str]) -> Result<()> {
    let mut args = vec!["install", "--yes", "-qq", "--no-install-recommends"];
    args.extend(packages);
    apt(&args)
}

fn apt(args: &[&str]) -> Result<()> {
    sh::quiet(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive")).map(drop)
}

fn installed(name: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", name])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout.starts_with(b"installed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_that_is_there_is_found_and_an_invented_one_is_not() {
        if !sh::on_path("dpkg-query") {
            return;
        }
        assert!(installed("dpkg"));
        assert!(!installed("tcmu-dif-no-such-package"));
    }
}
