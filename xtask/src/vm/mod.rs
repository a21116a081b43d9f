//! The VM: Debian's kernel with the real target_core_user in QEMU, and the tests that run in it.
//!
//! `cargo xtask vm test|list|run|shell|prepare`. See `docs/testing.md`.

mod agent;
mod artefacts;
mod bench;
mod cache;
mod guest;
mod module;
mod programs;
mod protocol;
mod qemu;
mod suite;

use crate::passed::Passed;
use crate::sh;
use anyhow::{Context, Result, bail};
use clap::Subcommand;
use guest::{Guest, Lab, RunDir};
use qemu::Accel;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

pub use agent::serve;
pub use artefacts::vmlinuz;
pub use cache::Cache;
pub use guest::end_at;
pub use suite::Scale;

/// What can be done with the VM.
#[derive(Subcommand)]
pub enum Action {
    /// Build the artefacts that are missing from the cache
    Prepare,
    /// Run the VM suite, or the tests whose names contain one of the words
    Test {
        /// Words
        names: Vec<String>,
        /// Rewrite snapshots and expectations instead of comparing with them
        #[arg(long)]
        bless: bool,
        /// VMs at a time [default: one for each processor, and two at most]
        #[arg(long, value_name = "COUNT")]
        lanes: Option<usize>,
        /// Build tcmu-dif with this cargo profile
        #[arg(long, default_value = "release")]
        profile: String,
    },
    /// List the VM suite's tests and what each promises
    List,
    /// Boot, run one bash script in the guest as root, print what it says and exit as it does
    Run {
        /// Give the guest no tcmu-dif (and build none)
        #[arg(long)]
        bare: bool,
        /// Build tcmu-dif with this cargo profile
        #[arg(long, default_value = "release")]
        profile: String,
        /// Another program for the guest's /usr/local/bin
        #[arg(long, value_name = "PATH")]
        program: Vec<PathBuf>,
        /// Files to put into the guest's /host
        #[arg(long, value_name = "PATH")]
        file: Vec<PathBuf>,
        /// Copy what the script puts into the guest's /host/out here
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        /// Seconds until the script is killed
        #[arg(long, default_value_t = 600)]
        timeout: u64,
        /// The script; `-` reads it from standard input
        #[arg(last = true, required = true)]
        script: Vec<String>,
    },
    /// Boot and give a shell on the console; `exit` powers off
    Shell {
        /// Give the guest no tcmu-dif (and build none)
        #[arg(long)]
        bare: bool,
        /// Build tcmu-dif with this cargo profile
        #[arg(long, default_value = "release")]
        profile: String,
    },
}

/// Carries out `cargo xtask vm …`.
pub fn main(action: Action) -> Result<ExitCode> {
    match action {
        Action::Prepare => {
            let cache = Cache::open()?;
            let artefacts = artefacts::prepare(&cache)?;
            let accel = Accel::of_this_machine(&cache, &artefacts)?;
            println!("ready: {} under {}", artefacts.kernel.display(), accel.name());
            Ok(ExitCode::SUCCESS)
        }
        Action::Test { names, bless, lanes, profile } => {
            let tally = test(&names, Scale::from_env()?, bless, lanes, &profile, None)?;
            println!("\n{} passed, {} failed", tally.passed, tally.failed.len());
            Ok(if tally.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Action::List => {
            for test in suite::all() {
                println!("{:<34} {}", test.name, test.promise);
            }
            Ok(ExitCode::SUCCESS)
        }
        Action::Run { bare, profile, program, file, out, timeout, script } => {
            let mut lab = lab((!bare).then_some(&profile))?;
            lab.programs.extend(program);
            run(&lab, &file, out.as_deref(), timeout, script)
        }
        Action::Shell { bare, profile } => shell(&lab((!bare).then_some(&profile))?),
    }
}

/// Runs the bench in the VM on tcmu-dif as released; gives back what is to be kept.
pub fn bench(more: &[String]) -> Result<serde_json::Value> {
    bench::run(&lab(Some(&"release".to_owned()))?, more)
}

/// Whether a VM test's name contains `word`.
pub fn knows(word: &str) -> bool {
    suite::all().iter().any(|test| test.name.contains(word))
}

/// Runs the tests that `names` select, on tcmu-dif built with `profile`; not those that have passed already.
pub fn test(
    names: &[String],
    scale: Scale,
    bless: bool,
    lanes: Option<usize>,
    profile: &str,
    passed: Option<&Passed>,
) -> Result<suite::Tally> {
    let mut tests = suite::select(names, scale)?;
    if names.is_empty() && tests.len() < suite::all().len() {
        println!("{} long tests are left out; full scale runs them", suite::all().len() - tests.len());
    }
    let all = tests.len();
    tests.retain(|test| passed.is_none_or(|passed| passed.earlier(test.name).is_none()));
    let earlier = all - tests.len();
    if tests.is_empty() && earlier > 0 {
        return Ok(suite::Tally { earlier, ..suite::Tally::default() });
    }
    // Before the true one, which then takes its place in cargo's folder again.
    let faulty = match tests.iter().any(|test| test.name == suite::NEEDS_FAULT_POINTS) {
        true => Some(build_with_fault_points(profile)?),
        false => None,
    };
    // The reference tests need no tcmu-dif: they can be run before it builds.
    let own = tests.iter().any(|test| !test.name.starts_with("reference."));
    let mut lab = lab(own.then(|| profile.to_owned()).as_ref())?;
    lab.programs.extend(faulty);
    if tests.iter().any(|test| suite::init_of(test.name) == guest::Init::Systemd) {
        lab.package = Some(crate::deb::build(profile)?);
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let lanes = lanes.unwrap_or(processors.min(2));
    suite::run(&lab, &tests, (scale, bless), lanes, passed).map(|tally| suite::Tally { earlier, ..tally })
}

/// Everything that a boot needs; with a profile, tcmu-dif is built and given to the guest.
fn lab(profile: Option<&String>) -> Result<Lab> {
    let cache = Cache::open()?;
    let artefacts = artefacts::prepare(&cache)?;
    let accel = Accel::of_this_machine(&cache, &artefacts)?;
    let programs = match profile {
        Some(profile) => vec![build(profile)?],
        None => Vec::new(),
    };
    Ok(Lab { artefacts, accel, programs, package: None, logs: sh::target_dir().join("vm-logs") })
}

/// Builds tcmu-dif as cargo's `profile` says.
fn build(profile: &str) -> Result<PathBuf> {
    build_with(profile, &[])
}

/// Builds the tcmu-dif that panics when it is told to, and puts it aside under a name of its own.
fn build_with_fault_points(profile: &str) -> Result<PathBuf> {
    let built = build_with(profile, &["--features", "fault-points"])?;
    let aside = sh::target_dir().join("tcmu-dif-fault-points");
    std::fs::copy(&built, &aside).with_context(|| format!("cannot write {}", aside.display()))?;
    Ok(aside)
}

fn build_with(profile: &str, more: &[&str]) -> Result<PathBuf> {
    let status = sh::cargo()
        .args(["build", "--quiet", "--bin", "tcmu-dif", "--profile", profile])
        .args(more)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("tcmu-dif does not build");
    }
    let folder = if profile == "dev" { "debug" } else { profile };
    Ok(sh::target_dir().join(folder).join("tcmu-dif"))
}

fn run(
    lab: &Lab,
    files: &[PathBuf],
    out: Option<&Path>,
    timeout: u64,
    words: Vec<String>,
) -> Result<ExitCode> {
    let script = if words == ["-"] { std::io::read_to_string(std::io::stdin())? } else { words.join(" ") };
    let limit = Duration::from_secs(timeout);
    let name = format!("run.{}", std::process::id());
    let mut guest = Guest::boot(lab, guest::Init::Script, &name, limit + Duration::from_secs(5))?;
    for file in files {
        let name = file.file_name().unwrap_or_default();
        std::fs::copy(file, guest.share().join(name))
            .with_context(|| format!("cannot give {} to the guest", file.display()))?;
    }
    guest.set_echo(true);
    std::fs::create_dir(guest.share().join("out"))?;
    let output = guest.run(&script, false, limit)?;
    if let Some(out) = out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        sh::quiet(Command::new("cp").args(["-r", "-T"]).arg(guest.share().join("out")).arg(out))?;
    }
    if output.timed_out {
        bail!("the script was killed after {timeout} s; see {}", guest.logs().display());
    }
    let status = output.status.and_then(|s| u8::try_from(s).ok()).unwrap_or(1);
    Ok(ExitCode::from(status))
}

fn shell(lab: &Lab) -> Result<ExitCode> {
    let dir = RunDir::new(lab)?;
    println!("{} as root; /scratch is an empty ext4, /host the host's; `exit` powers off", lab.accel.name());
    let status = qemu::machine(lab.accel, &lab.artefacts, dir.path(), "shell", guest::MEMORY_MIB)
        .args(["-serial", "mon:stdio"])
        .stdin(Stdio::inherit())
        .status()
        .context("cannot start qemu-system-x86_64")?;
    if !status.success() {
        bail!("qemu ended: {status}");
    }
    Ok(ExitCode::SUCCESS)
}
