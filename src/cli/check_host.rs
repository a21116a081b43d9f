//! `tcmu-dif check-host`: what this host can do, and the remedy for what it lacks.

use std::{fs, path::Path, process::ExitCode, rc::Rc};

use serde::Serialize;

use super::{
    Done,
    args::{CheckHost, Cli},
    luns::Places,
    output,
};
use crate::{
    image::lock::{ImageLock, LockMode},
    kernel::{SYSFS, dif::Dif, fabric::Fabric, modules},
    sys::io::{Backend, Io},
};

/// How it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Standing {
    /// It is there.
    Ok,
    /// It can be brought up when it is needed.
    Available,
    /// It isn't there, and something else does its work.
    Limited,
    /// It isn't there.
    Missing,
}

impl Standing {
    fn word(self) -> &'static str {
        match self {
            Standing::Ok => "ok",
            Standing::Available => "available",
            Standing::Limited => "limited",
            Standing::Missing => "MISSING",
        }
    }
}

#[derive(Serialize)]
struct Check {
    what: String,
    standing: Standing,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn new(what: impl Into<String>, standing: Standing, detail: impl Into<String>) -> Check {
        Check { what: what.into(), standing, detail: detail.into(), remedy: None }
    }

    fn remedy(self, text: impl Into<String>) -> Check {
        Check { remedy: Some(text.into()), ..self }
    }
}

/// What was seen.
#[derive(Serialize)]
pub struct Report {
    /// LUNs can be served here.
    ready: bool,
    checks: Vec<Check>,
}

/// Looks, and prints what it saw. Exit status 1 if LUNs cannot be served here.
pub fn run(cli: &Cli, args: &CheckHost) -> Done {
    let report = report(&cli.configfs, &cli.places(), &args.images);
    let ready = report.ready;
    if args.json.json {
        output::json(&report)?;
    } else {
        let rows = report
            .checks
            .iter()
            .map(|c| vec![c.what.clone(), c.standing.word().to_owned(), c.detail.clone()]);
        let mut text = output::table(&["WHAT", "STANDING", "DETAIL"], rows);
        text.push_str(&remedies(&report.checks));
        text.push_str(if ready { "\n\nLUNs can be served here." } else { "\n\nLUNs cannot be served here." });
        output::print(&text)?;
    }
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Looks; `images` is a directory in which locks are tried.
pub fn report(at: &Path, places: &Places, images: &Path) -> Report {
    let dif = Dif::of_this_kernel(Path::new(SYSFS));
    let checks = vec![
        root(),
        kernel(),
        configfs(at),
        module("target_core_user", "serves LUNs in user space; PI at rest works behind every fabric", true),
        module(
            Fabric::Loopback.module(),
            &format!("--export loopback: a disk on this host; {}", dif.of_fabric(Fabric::Loopback)),
            false,
        ),
        module(
            Fabric::Vhost.module(),
            &format!("--export vhost: a disk for a guest; {}", dif.of_fabric(Fabric::Vhost)),
            false,
        ),
        io_uring(),
        locks(images),
        daemon(places),
    ];
    let needed = ["kernel", "configfs", "target_core_user"];
    let ready = !checks.iter().any(|c| c.standing == Standing::Missing && needed.contains(&c.what.as_str()));
    Report { ready, checks }
}

/// Each remedy once, with everything that it mends.
fn remedies(checks: &[Check]) -> String {
    let mut out: Vec<(String, &str)> = Vec::new();
    for c in checks {
        let Some(remedy) = c.remedy.as_deref() else { continue };
        match out.iter_mut().find(|(_, r)| *r == remedy) {
            Some((what, _)) => what.push_str(&format!(", {}", c.what)),
            None => out.push((c.what.clone(), remedy)),
        }
    }
    let lines = out.iter().map(|(what, remedy)| format!("\n\n{what}:\n  {remedy}"));
    lines.collect()
}

fn root() -> Check {
    if rustix::process::geteuid().is_root() {
        Check::new("root", Standing::Ok, "this is root")
    } else {
        Check::new("root", Standing::Limited, "this isn't root: list, show, image and pi work")
            .remedy("run daemon, create, delete and resize with sudo")
    }
}

fn kernel() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match version(&release) {
        Some(v) if v >= (4, 18) => Check::new("kernel", Standing::Ok, release),
        _ => Check::new(
            "kernel",
            Standing::Missing,
            format!("{release}: netlink of target_core_user is too old"),
        )
        .remedy("use a kernel from 4.18 on"),
    }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn configfs(at: &Path) -> Check {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let known = filesystems.lines().any(|l| l.split_whitespace().last() == Some("configfs"));
    if modules::is_mounted(&mounts, at) {
        Check::new("configfs", Standing::Ok, format!("mounted on {}", at.display()))
    } else if known || modules::is_available("configfs") {
        Check::new("configfs", Standing::Available, "not mounted; create and the daemon mount it")
    } else {
        Check::new("configfs", Standing::Missing, "this kernel has none").remedy(OTHER_KERNEL)
    }
}

const OTHER_KERNEL: &str = "install the distribution's own kernel with its modules (Debian: linux-image-amd64, and not \
                            linux-image-cloud-amd64), and boot it; tcmu-dif demo works without";

fn module(name: &str, detail: &str, needed: bool) -> Check {
    if modules::is_loaded(Path::new(SYSFS), name) {
        Check::new(name, Standing::Ok, format!("loaded; {detail}"))
    } else if modules::is_available(name) {
        Check::new(name, Standing::Available, format!("will be loaded; {detail}"))
    } else {
        let lost = if needed { "no LUN can be served" } else { detail };
        Check::new(name, Standing::Missing, lost).remedy(OTHER_KERNEL)
    }
}

fn io_uring() -> Check {
    match Io::new(Backend::Uring) {
        Ok(_) => Check::new("io_uring", Standing::Ok, "permitted"),
        Err(e) => Check::new("io_uring", Standing::Limited, format!("{e}; I/O goes through threads"))
            .remedy("permit it: sysctl kernel.io_uring_disabled=0, or lift the container's seccomp filter"),
    }
}

/// Tries a lock on a file of that directory, as an image will be locked.
fn locks(dir: &Path) -> Check {
    let what = "locks";
    let file = match unnamed_file(dir) {
        Ok(file) => Rc::new(file),
        Err(e) => {
            return Check::new(
                what,
                Standing::Limited,
                format!("{}: no file can be made there: {e}", dir.display()),
            )
            .remedy("name the directory of the images: tcmu-dif check-host --images DIR");
        }
    };
    match ImageLock::acquire(&file, LockMode::Writer) {
        Ok(_) => {
            Check::new(what, Standing::Ok, format!("{}: open file description locks work", dir.display()))
        }
        Err(e) => Check::new(what, Standing::Missing, format!("{}: {e}", dir.display()))
            .remedy("keep images on a file system with locks; for NFS, mount version 4"),
    }
}

/// A file without a name, so that nothing is left behind.
fn unnamed_file(dir: &Path) -> rustix::io::Result<fs::File> {
    use rustix::fs::{Mode, OFlags, open};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}

fn daemon(places: &Places) -> Check {
    match places.run.daemon() {
        Ok(Some(pid)) => Check::new("daemon", Standing::Ok, format!("running as process {pid}")),
        Ok(None) => {
            Check::new("daemon", Standing::Limited, "not running").remedy("start it: tcmu-dif daemon")
        }
        Err(e) => Check::new("daemon", Standing::Limited, format!("{}: {e}", places.run.path().display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_has_a_version() {
        assert_eq!(version("6.12.117+deb12-amd64"), Some((6, 12)));
        assert_eq!(version("5.4"), Some((5, 4)));
        assert_eq!(version("gvisor"), None);
    }
}
