//! The VM suite: which tests there are, and how they are run.
//!
//! A test is a function that drives a [`Guest`]. [`runner`] gives each a VM and tells how it went.

mod chain;
mod chance;
mod conformance;
mod copy;
mod daemon;
mod data;
mod device;
mod docs;
mod fabric;
mod fault;
mod guest_goes;
mod handover;
pub(super) mod initiator;
mod iscsi;
mod job_rounds;
mod jobs;
mod lifecycle;
mod limits;
pub(super) mod lun;
mod nbd;
mod panic;
mod pi;
mod pi_guest;
mod qmp;
mod readme;
pub(super) mod reference;
mod refuse;
mod runner;
mod service;
mod shown;
mod tools;
mod two_kernels;
mod witness;

pub use panic::NAME as NEEDS_FAULT_POINTS;
pub use runner::{Tally, run};

use super::guest::{Guest, Init, Lab, Net};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::PathBuf;

/// How much of the longer loops is run: `TCMU_DIF_SCALE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scale {
    /// As little as still shows something.
    Quick,
    /// What a developer waits for.
    Default,
    /// What CI runs.
    Full,
}

impl Scale {
    /// From the environment.
    pub fn from_env() -> Result<Self> {
        match std::env::var("TCMU_DIF_SCALE").as_deref() {
            Ok("quick") => Ok(Self::Quick),
            Ok("default" | "") | Err(_) => Ok(Self::Default),
            Ok("full") => Ok(Self::Full),
            Ok(other) => bail!("TCMU_DIF_SCALE is quick, default or full, not {other:?}"),
        }
    }

    /// As the environment spells it.
    pub fn name(self) -> &'static str {
        self.pick("quick", "default", "full")
    }

    /// One of three values.
    pub fn pick<T>(self, quick: T, default: T, full: T) -> T {
        match self {
            Self::Quick => quick,
            Self::Default => default,
            Self::Full => full,
        }
    }
}

/// What a test has beside the guest.
pub struct Run<'a> {
    /// The VM.
    pub guest: &'a mut Guest,
    /// What it was booted from, for a test that has another beside it.
    pub lab: &'a Lab,
    /// How much to do.
    pub scale: Scale,
    /// Rewrite snapshots and expectations instead of comparing with them.
    pub bless: bool,
    /// xtask's own folder, with `snapshots/` and `expect/`.
    pub files: PathBuf,
}

/// A test.
pub struct Test {
    /// `room.what`.
    pub name: &'static str,
    /// What is promised, and would be broken if it failed.
    pub promise: &'static str,
    /// Seconds it may take, boot left aside, on a slow machine under translation.
    pub limit: u64,
    /// Tests of the same group share a boot.
    pub group: Option<&'static str>,
    /// The test.
    pub run: fn(&mut Run<'_>) -> Result<()>,
}

/// All tests, in the order in which they are run.
pub fn all() -> Vec<&'static Test> {
    [
        reference::TESTS,
        refuse::TESTS,
        readme::TESTS,
        data::TESTS,
        fault::TESTS,
        device::TESTS,
        panic::TESTS,
        fabric::TESTS,
        daemon::TESTS,
        lifecycle::TESTS,
        limits::TESTS,
        chain::TESTS,
        jobs::TESTS,
        job_rounds::TESTS,
        handover::TESTS,
        guest_goes::TESTS,
        two_kernels::TESTS,
        nbd::TESTS,
        qmp::TESTS,
        conformance::TESTS,
        copy::TESTS,
        pi::TESTS,
        pi_guest::TESTS,
        service::TESTS,
        docs::TESTS,
        tools::TESTS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The process 1 that a test's guest has.
pub fn init_of(name: &str) -> Init {
    if ["service.", "docs."].iter().any(|room| name.starts_with(room)) { Init::Systemd } else { Init::Script }
}

/// The network that a test's guest has.
fn net_of(name: &str) -> Net<'static> {
    if name == two_kernels::NAME { Net::Own } else { Net::Nowhere }
}

/// Tests that take minutes each, or wait out a stop time, or need a build of their own: run at full scale, or when they are named.
const LONG: &[&str] = &[
    "pi.guest-",
    guest_goes::NAME,
    "pi.differential-lio",
    "jobs.mirror-under-fio",
    "jobs.chain-under-fio",
    "jobs.rounds-",
    "service.upgrade",
    "tools.targetcli",
    "fault.hung-device",
    two_kernels::NAME,
    "conformance.offloads-elsewhere",
    panic::NAME,
];

fn is_long(test: &Test) -> bool {
    LONG.iter().any(|part| test.name.starts_with(part))
}

/// The tests that `wanted` names: by name, or by a part of it; if it is empty, all that fit the scale. A word that names none is an error.
pub fn select(wanted: &[String], scale: Scale) -> Result<Vec<&'static Test>> {
    for word in wanted {
        if !all().iter().any(|test| test.name.contains(word.as_str())) {
            bail!("no VM test's name contains {word:?}; `cargo xtask vm list` shows them");
        }
    }
    Ok(all()
        .into_iter()
        .filter(|test| {
            let named = wanted.iter().any(|word| test.name.contains(word.as_str()));
            named || wanted.is_empty() && (!is_long(test) || scale == Scale::Full)
        })
        .collect())
}

/// Compares `text` with the checked-in file `name` under `files`, or writes it there when blessing.
pub fn compare_snapshot(run: &Run<'_>, name: &str, text: &str) -> Result<()> {
    let path = run.files.join("snapshots").join(name);
    if run.bless {
        fs::create_dir_all(run.files.join("snapshots"))?;
        return fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()));
    }
    let known = fs::read_to_string(&path).with_context(|| {
        format!("no snapshot {}; `cargo xtask vm test --bless conformance` writes it", path.display())
    })?;
    if known == text {
        return Ok(());
    }
    let new = run.guest.logs().join(name);
    fs::write(&new, text)?;
    let diff = std::process::Command::new("diff")
        .arg("-u")
        .arg(&path)
        .arg(&new)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    bail!("{name} is not what it was (bless it if that is right):\n{diff}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_limits_are_sane() {
        let tests = all();
        for (at, test) in tests.iter().enumerate() {
            assert!(tests[..at].iter().all(|other| other.name != test.name), "{}", test.name);
            // At full scale these do the same far more often.
            let grows = ["service.kills", "limits.cycles"].contains(&test.name);
            let most = if grows {
                3000
            } else if is_long(test) {
                1800
            } else {
                900
            };
            assert!((10..=most).contains(&test.limit), "{}", test.name);
            assert!(!test.promise.is_empty());
        }
    }

    /// The guest's scripts run with `pipefail`: a reader that leaves early ends what writes to it by SIGPIPE, by chance, and
    /// that is then the script's failure. `grep -q WORD <(command)` has no such chance.
    #[test]
    fn no_script_pipes_into_a_reader_that_leaves_early() {
        let rooms = fs::read_dir(crate::sh::workspace_root().join("xtask/src/vm/suite")).unwrap();
        for room in rooms.map(|room| room.unwrap().path()) {
            let text = fs::read_to_string(&room).unwrap();
            for (at, line) in text.lines().enumerate() {
                let leaves = ["| grep -q", "| grep -m", "| head "].iter().any(|reader| line.contains(reader));
                assert!(!leaves || line.contains(".any(|reader|"), "{}:{}: {line}", room.display(), at + 1);
            }
        }
    }

    #[test]
    fn a_word_selects_by_part_of_the_name_and_an_unknown_one_is_an_error() {
        let one = select(&["reference.fileio".to_owned()], Scale::Quick).unwrap();
        assert_eq!(one.len(), 1);
        assert!(select(&["reference".to_owned()], Scale::Quick).unwrap().len() > 1);
        assert!(select(&["no-such-test".to_owned()], Scale::Full).is_err());
        assert_eq!(select(&[], Scale::Full).unwrap().len(), all().len());
        let usual = select(&[], Scale::Default).unwrap();
        assert!(usual.len() < all().len() && usual.iter().all(|test| !test.name.starts_with("pi.guest-")));
        assert_eq!(select(&["pi.guest".to_owned()], Scale::Quick).unwrap().len(), 2);
    }
}
