//! Kernel modules and configfs: there, or brought up with `modprobe` and mount(2).

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use thiserror::Error;

/// What the kernel lacks.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// modprobe isn't there.
    #[error("modprobe can't be run")]
    NoModprobe(#[source] io::Error),
    /// modprobe failed; its words.
    #[error("modprobe {module}: {words}")]
    Refused {
        /// The module.
        module: String,
        /// modprobe's message.
        words: String,
    },
    /// configfs can't be mounted.
    #[error("configfs can't be mounted on {}", .0.display())]
    Mount(PathBuf, #[source] io::Error),
}

/// Whether a module is loaded or built in (`sysfs` is /sys, or a test's).
pub fn is_loaded(sysfs: &Path, module: &str) -> bool {
    sysfs.join("module").join(module).is_dir()
}

/// Whether `modprobe` would find it.
pub fn is_available(module: &str) -> bool {
    run(&["--dry-run", "--quiet", module]).is_ok()
}

fn run(args: &[&str]) -> Result<(), ModuleError> {
    let module = args.last().copied().unwrap_or_default().to_owned();
    let path = std::env::var("PATH").unwrap_or_default();
    let out = Command::new("modprobe")
        .args(args)
        // A root that came through sudo or su may lack the directory.
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(ModuleError::NoModprobe)?;
    if out.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; ");
    let words = words.strip_prefix("modprobe: ").unwrap_or(&words).to_owned();
    Err(ModuleError::Refused { module, words })
}

/// Loads a module, unless it is there.
///
/// # Errors
/// modprobe's words.
pub fn load(module: &str) -> Result<(), ModuleError> {
    if is_loaded(Path::new(super::SYSFS), module) { Ok(()) } else { run(&[module]) }
}

/// Mounts configfs, unless it is.
///
/// # Errors
/// mount's.
pub fn mount_configfs(at: &Path) -> Result<(), ModuleError> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    if is_mounted(&mounts, at) {
        return Ok(());
    }
    // The module brings the mount point with it.
    load("configfs").ok();
    let flags = rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC
        | rustix::mount::MountFlags::NOSUID;
    rustix::mount::mount("configfs", at, "configfs", flags, None)
        .map_err(|e| ModuleError::Mount(at.to_owned(), e.into()))
}

/// Whether a table of mounts has configfs there.
pub fn is_mounted(mounts: &str, at: &Path) -> bool {
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next().is_some_and(|dir| Path::new(dir) == at) && words.next() == Some("configfs")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_of_another_kind_or_place_is_not_configfs() {
        let mounts = "sysfs /sys sysfs rw 0 0\nnone /sys/kernel/config configfs rw 0 0\n";
        assert!(is_mounted(mounts, Path::new("/sys/kernel/config")));
        assert!(!is_mounted(mounts, Path::new("/sys")));
        assert!(!is_mounted(mounts, Path::new("/sys/kernel")));
    }

    #[test]
    fn a_module_that_nobody_has_is_named_in_the_error() {
        match load("tcmu_dif_has_no_module") {
            Err(ModuleError::Refused { module, words }) => {
                assert_eq!(module, "tcmu_dif_has_no_module");
                assert!(!words.is_empty());
            }
            Err(ModuleError::NoModprobe(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}
