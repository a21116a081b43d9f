//! `cargo xtask test`: every check there is, one after the other, with a table at the end.
//!
//! A step that fails does not keep the next ones from running. What a step says goes to a file of its own under
//! `target/test-logs`; of a failing one the end is shown as well. The last line counts: `N passed, N failed`.

use crate::passed::{Earlier, Passed};
use crate::vm::{self, Scale};
use crate::{debian, licences, sh};
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What to run.
pub struct Plan {
    /// How long the longer loops go on.
    pub scale: Scale,
    /// Whether the VM suite is run.
    pub vm: bool,
    /// Run only tests whose names contain one of these, and none of the other checks.
    pub filters: Vec<String>,
    /// When it has to be over: VM tests that are not done by then are named as not run, and do not count as failed.
    pub within: Option<Duration>,
    /// Whether what has passed on this tree in earlier runs is left out.
    pub go_on: bool,
}

/// What came of a step.
struct Done {
    name: String,
    time: Duration,
    passed: usize,
    failed: usize,
    /// Tests that a runner left out (ignored ones), so that the table shows them.
    left_out: usize,
    log: PathBuf,
    /// Not in this run, or not all of it: how many of the tests have passed in earlier ones.
    earlier: usize,
}

/// A step that is another program.
struct Step {
    name: &'static str,
    command: Command,
    counts: Counts,
    scale: Scale,
}

/// How a step's tests are counted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Counts {
    /// The step is one check.
    One,
    /// By the runner's own summaries.
    Tests,
}

impl Done {
    /// Of a step that is not run again.
    fn before(name: &str, before: Earlier) -> Done {
        let Earlier { seconds, tests } = before;
        let time = Duration::from_secs_f64(seconds);
        let (passed, failed, left_out, log) = (0, 0, 0, PathBuf::new());
        Done { name: name.to_owned(), time, passed, failed, left_out, log, earlier: tests }
    }
}

/// Runs the plan.
pub fn run(plan: &Plan) -> Result<ExitCode> {
    let with_vm = plan.vm;
    if let Some(within) = plan.within {
        vm::end_at(Instant::now() + within);
    }
    let passed = plan.go_on.then(|| Passed::of_this_tree(plan.scale)).transpose()?;
    let mut wanted: Vec<&str> = debian::FOR_TESTS.to_vec();
    if with_vm {
        wanted.extend(debian::FOR_VM);
    }
    debian::ensure(&wanted)?;
    let logs = sh::target_dir().join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;

    let mut done = Vec::new();
    if plan.filters.is_empty() {
        done.push(licences_and_sources(&logs)?);
    }
    let (steps, mut not_run) = steps(plan)?;
    for step in steps {
        if let Some(before) = passed.as_ref().and_then(|passed| passed.earlier(step.name)) {
            println!("== {}: has passed in an earlier run", step.name);
            done.push(Done::before(step.name, before));
            continue;
        }
        println!("== {}: {}", step.name, sh::shown(&step.command));
        let one = carry_out(step, &logs)?;
        println!("   {} in {:.0} s", verdict(&one), one.time.as_secs_f64());
        if one.failed > 0 {
            let said = fs::read_to_string(&one.log).unwrap_or_default();
            println!("{}", sh::last_lines(&said, 60));
        }
        if let Some(passed) = passed.as_ref().filter(|_| one.failed == 0 && one.left_out == 0) {
            passed.add(&one.name, Earlier { seconds: one.time.as_secs_f64(), tests: one.passed })?;
        }
        done.push(one);
    }
    if with_vm && plan.filters.iter().all(|word| vm::knows(word)) {
        let (suite, cut) = vm_suite(plan, &logs, passed.as_ref())?;
        done.push(suite);
        if !cut.is_empty() {
            not_run.push(("VM suite, in part", format!("the time was over: {}", cut.join(" "))));
        }
    }
    report(plan, &done, &not_run)
}

/// A step that this machine cannot run, and what it lacks.
type NotRun = (&'static str, String);

fn steps(plan: &Plan) -> Result<(Vec<Step>, Vec<NotRun>)> {
    let cargo = |words: &[&str]| {
        let mut command = sh::cargo();
        command.args(words);
        command
    };
    let scale = plan.scale;
    let check = |name, words: &[&str]| Step { name, command: cargo(words), counts: Counts::One, scale };
    let tests = |name, command| Step { name, command, counts: Counts::Tests, scale };
    let suite = |io: &str, package: &[&str]| {
        let nextest = sh::on_path("cargo-nextest");
        let mut command = if nextest {
            cargo(&["nextest", "run", "--no-fail-fast", "--status-level=slow", "--hide-progress-bar"])
        } else {
            cargo(&["test", "--no-fail-fast", "--lib", "--bins", "--tests"])
        };
        command.args(package).env("TCMU_DIF_IO", io);
        // What needs root is marked as ignored; anybody else sees in the table that it was left out.
        let root = rustix::process::geteuid().is_root();
        if nextest && root {
            command.arg("--run-ignored=all");
        }
        if !nextest && (root || !plan.filters.is_empty()) {
            command.arg("--");
        }
        if !nextest && root {
            command.arg("--include-ignored");
        }
        command.args(&plan.filters);
        command
    };
    let mut steps = Vec::new();
    let mut not_run = Vec::new();
    if plan.filters.is_empty() {
        steps.push(check("formatting", &["fmt", "--all", "--check"]));
        steps.push(check(
            "clippy",
            &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
        ));
        steps.push(tests(
            "bindings are bindgen's",
            cargo(&["test", "-p", "tcmu-sys", "--features", "bindgen"]),
        ));
        let oldest = rust_version(&fs::read_to_string(sh::workspace_root().join("Cargo.toml"))?)?;
        match oldest_compiler(&oldest) {
            Ok(mut command) => {
                // A folder of its own: it would throw away what the other compiler has built. Macros are built as fast as can be, as they run once.
                let config = |of: &str| format!("--config=profile.dev.{of}opt-level=0");
                command.args([
                    "check",
                    "--quiet",
                    "--locked",
                    "--package=tcmu-dif",
                    "--package=xtask",
                    "--lib",
                    "--bins",
                ]);
                command.args([config(""), config("package.\"*\"."), config("build-override.")]);
                command.arg("--target-dir").arg(sh::target_dir().join(format!("rust-{oldest}")));
                steps.push(Step { name: "oldest compiler", command, counts: Counts::One, scale });
            }
            Err(why) => not_run.push(("oldest compiler", why)),
        }
        if sh::on_path("cargo-deny") {
            steps.push(check("cargo deny", &["deny", "check", "licenses", "bans", "sources"]));
            match advisories() {
                true => steps.push(check(
                    "cargo deny's advisories",
                    &["deny", "check", "--disable-fetch", "advisories"],
                )),
                false => not_run
                    .push(("cargo deny's advisories", "there is no copy of RustSec's database".to_owned())),
            }
        } else {
            not_run.push(("cargo deny", "it is not installed: cargo install --locked cargo-deny".to_owned()));
        }
    }
    steps.push(tests("tests on io_uring", suite("uring", &["--workspace"])));
    // What the long loops look for is above the operations on files, which is all that is done in another way here.
    let shorter = plan.scale.min(Scale::Default);
    steps.push(Step { scale: shorter, ..tests("tests on threads", suite("threads", &["--workspace"])) });
    if plan.filters.is_empty() {
        steps.push(tests("doc tests", cargo(&["test", "--workspace", "--doc"])));
        // The VM suite installs it.
        if plan.vm {
            steps.push(check("package, and lintian", &["xtask", "deb"]));
        }
    }
    Ok((steps, not_run))
}

/// The oldest compiler that Cargo.toml promises to do with.
fn rust_version(manifest: &str) -> Result<String> {
    let manifest: toml::Value = toml::from_str(manifest).context("Cargo.toml")?;
    let version = manifest.get("workspace").and_then(|w| w.get("package")?.get("rust-version")?.as_str());
    version.map(str::to_owned).context("Cargo.toml states no rust-version")
}

/// cargo of that compiler: rustup's, or the one that is here if it is that version. Otherwise what to do.
fn oldest_compiler(version: &str) -> Result<Command, String> {
    let is = |said: &str| is_version(said, version);
    if sh::run("rustc", ["--version"]).is_ok_and(|said| is(&said)) {
        return Ok(sh::cargo());
    }
    let chains = sh::run("rustup", ["toolchain", "list"]).unwrap_or_default();
    let named =
        |line: &&str| line.starts_with(&format!("{version}-")) || line.starts_with(&format!("{version}."));
    let missing =
        || format!("Rust {version} is not here: rustup toolchain install --profile minimal {version}.0");
    let chain = chains.lines().find(named).and_then(|line| line.split(' ').next()).ok_or_else(missing)?;
    // By rustup, and not by what this cargo has told its children to be.
    let mut command = Command::new("rustup");
    command.args(["run", chain, "cargo"]).current_dir(sh::workspace_root());
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(name);
    }
    Ok(command)
}

/// Whether `rustc --version` says that it is of that version (`1.90`, whichever patch).
fn is_version(said: &str, version: &str) -> bool {
    let release = said.split(' ').nth(1).unwrap_or_default();
    release == version || release.strip_prefix(version).is_some_and(|rest| rest.starts_with('.'))
}

/// Whether cargo-deny has fetched RustSec's database at some time.
fn advisories() -> bool {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let folder = home.and_then(|home| fs::read_dir(home.join("advisory-dbs")).ok());
    folder.is_some_and(|mut entries| entries.any(|e| e.is_ok_and(|e| e.path().is_dir())))
}

/// The licences and the sources of all crates, by `deny.toml`.
fn licences_and_sources(logs: &Path) -> Result<Done> {
    let name = "licences and sources";
    println!("== {name}");
    let started = Instant::now();
    let log = logs.join("licences-and-sources.log");
    let (passed, said) = match licences::check() {
        Ok(crates) => (1, format!("{crates} crates")),
        Err(error) => (0, format!("{error:#}")),
    };
    println!("   {said}");
    fs::write(&log, format!("{said}\n"))?;
    let time = started.elapsed();
    Ok(Done { name: name.to_owned(), time, passed, failed: 1 - passed, left_out: 0, log, earlier: 0 })
}

fn carry_out(mut step: Step, logs: &Path) -> Result<Done> {
    let log = logs.join(format!("{}.log", step.name.replace([' ', '\''], "-")));
    let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    let started = Instant::now();
    let status = step
        .command
        .env("TCMU_DIF_SCALE", step.scale.name())
        .env("CARGO_TERM_COLOR", "never")
        .env("INSTA_UPDATE", "no")
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot run {}", sh::shown(&step.command)))?;
    let said = fs::read_to_string(&log).unwrap_or_default();
    let (passed, mut failed, left_out) = match step.counts {
        Counts::One => (usize::from(status.success()), 0, 0),
        Counts::Tests => count(&said),
    };
    if !status.success() && failed == 0 {
        failed = 1;
    }
    if status.success() && failed > 0 {
        bail!("{} says that it succeeded, and counts {failed} failures: {}", step.name, log.display());
    }
    let time = started.elapsed();
    Ok(Done { name: step.name.to_owned(), time, passed, failed, left_out, log, earlier: 0 })
}

/// The VM suite, and the tests that the end of the time left out.
fn vm_suite(plan: &Plan, logs: &Path, before: Option<&Passed>) -> Result<(Done, Vec<String>)> {
    println!("== VM suite");
    let started = Instant::now();
    let log = logs.join("VM-suite.log");
    let mut not_run = Vec::new();
    let mut earlier = 0;
    let (passed, failed, log) = match vm::test(&plan.filters, plan.scale, false, None, "release", before) {
        Ok(tally) => {
            (not_run, earlier) = (tally.not_run, tally.earlier);
            let log = tally.failed.first().map_or(log, |(_, logs)| logs.clone());
            (tally.passed, tally.failed.len(), log)
        }
        Err(error) => {
            println!("{error:#}");
            fs::write(&log, format!("{error:?}\n"))?;
            (0, 1, log)
        }
    };
    let time = started.elapsed();
    let left_out = not_run.len();
    Ok((Done { name: "VM suite".to_owned(), time, passed, failed, left_out, log, earlier }, not_run))
}

/// Passed, failed and left-out tests by the summaries of nextest and of cargo's own runner.
fn count(said: &str) -> (usize, usize, usize) {
    let mut sum = (0, 0, 0);
    // nextest shows what a failing test said, the runner's own line for it included.
    let by_nextest = said.lines().any(|line| line.trim_start().starts_with("Summary ["));
    let wanted = if by_nextest { "Summary [" } else { "test result: " };
    for line in said.lines().map(str::trim_start).filter(|line| line.starts_with(wanted)) {
        let number_before = |word: &str| {
            let words: Vec<&str> = line.split([' ', ';', ',']).filter(|w| !w.is_empty()).collect();
            words
                .windows(2)
                .filter(|pair| pair[1] == word)
                .filter_map(|pair| pair[0].parse::<usize>().ok())
                .sum::<usize>()
        };
        sum.0 += number_before("passed");
        sum.1 += number_before("failed") + number_before("timed");
        sum.2 += number_before("skipped") + number_before("ignored");
    }
    sum
}

fn verdict(done: &Done) -> String {
    let what = if done.failed == 0 { "ok" } else { "FAILED" };
    let mut text = format!("{what}: {} passed, {} failed", done.passed, done.failed);
    if done.left_out > 0 {
        text += &format!(
            ", {} left out by their own #[ignore], the filter or the end of the time",
            done.left_out
        );
    }
    if done.earlier > 0 {
        text += &format!(", {} passed in earlier runs on this tree", done.earlier);
    }
    text
}

fn report(plan: &Plan, done: &[Done], not_run: &[NotRun]) -> Result<ExitCode> {
    println!("\n{:<24} {:>8}  result", "step", "time");
    for one in done {
        println!("{:<24} {:>6.0} s  {}", one.name, one.time.as_secs_f64(), verdict(one));
        if one.failed > 0 {
            println!("{:<24} {:>8}  see {}", "", "", one.log.display());
        }
    }
    for (name, why) in not_run {
        println!("{name:<24} {:>8}  NOT RUN: {why}", "-");
    }
    if !plan.vm {
        println!("{:<24} {:>8}  left out by --quick or --no-vm", "VM suite", "-");
    }
    let passed: usize = done.iter().map(|one| one.passed).sum();
    let failed: usize = done.iter().map(|one| one.failed).sum();
    println!("\n{passed} passed, {failed} failed");
    if plan.go_on {
        println!("and what passed in earlier runs on this tree, as the table says");
    }
    let earlier: usize = done.iter().map(|one| one.earlier).sum();
    Ok(if failed == 0 && passed + earlier > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_compiler_is_read_from_the_manifest_and_told_from_others() {
        let manifest = fs::read_to_string(sh::workspace_root().join("Cargo.toml")).unwrap();
        let version = rust_version(&manifest).unwrap();
        assert!(is_version(&format!("rustc {version}.0 (1159e78c4 2025-09-14)\n"), &version));
        assert!(is_version("rustc 1.90.1 (x 2025-01-01)", "1.90.1"));
        for other in ["rustc 1.9.0 (x)", "rustc 1.91.0 (x)", "rustc 1.900.0 (x)", ""] {
            assert!(!is_version(other, "1.90"), "{other}");
        }
        assert!(rust_version("[workspace]\n").is_err());
    }

    #[test]
    fn both_runners_summaries_are_counted() {
        let nextest =
            "     Summary [   1.204s] 12 tests run: 9 passed (1 slow), 2 failed, 1 timed out, 3 skipped\n";
        assert_eq!(count(nextest), (9, 3, 3));
        let failing =
            format!("test result: FAILED. 0 passed; 1 failed; 0 ignored; finished in 20.77s\n{nextest}");
        assert_eq!(count(&failing), (9, 3, 3));
        let cargo = "running 3 tests\ntest a ... ok\n\
            test result: FAILED. 2 passed; 1 failed; 4 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n";
        assert_eq!(count(cargo), (7, 1, 4));
        assert_eq!(count("a test prints: 7 passed, 3 failed\n"), (0, 0, 0));
    }
}
