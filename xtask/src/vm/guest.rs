//! One running VM and what a test may ask of it.
//!
//! [`Guest::boot`] brings it up in a few seconds, [`Guest::sh`] runs bash in it. Nothing waits for ever: every script has a time limit, and
//! the guest as a whole has a deadline. When the value is dropped, QEMU is ended and its files are gone; the
//! logs stay: `console.log` (the serial console), `transcript.log` (every script, what it said and how it ended).

use super::artefacts::Artefacts;
use super::programs;
use super::protocol::{Exit, Frame, Request, Tag};
use super::qemu::{self, Accel, Cable};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::cell::Cell;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Guest memory: room for 64 LUNs with their 8 MiB rings and what their data areas really use.
pub const MEMORY_MIB: u32 = 4096;
/// How often a VM that does not reach user space is started anew.
const BOOT_ATTEMPTS: u32 = 3;
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// A script's time unless it says another.
const SCRIPT_LIMIT: Duration = Duration::from_secs(120);
/// How much longer than the agent's own limit the host waits for its answer.
const ANSWER_SLACK: Duration = Duration::from_secs(20);

/// Every limit times this, from `TCMU_DIF_VM_PATIENCE`: for a machine that has much else to do.
pub fn patience() -> u32 {
    std::env::var("TCMU_DIF_VM_PATIENCE")
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|factor| (1..=20).contains(factor))
        .unwrap_or(1)
        * MORE_PATIENCE.get()
}

static COUNTER: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// What patience is multiplied with for the test that this thread runs.
    static MORE_PATIENCE: Cell<u32> = const { Cell::new(1) };
}

/// Makes every limit of this thread's tests from now on `factor` times as long as it usually is.
pub fn set_more_patience(factor: u32) {
    MORE_PATIENCE.set(factor);
}

/// When the whole run has to be over, if that was told: no guest does anything after it.
static END: OnceLock<Instant> = OnceLock::new();

/// From now on no guest is asked for anything after `end`. Only the first call counts.
pub fn end_at(end: Instant) {
    let _ = END.set(end);
}

/// How long until the end that [`end_at`] was told; none if there is none.
pub fn until_end() -> Option<Duration> {
    END.get().map(|end| end.saturating_duration_since(Instant::now()))
}

/// That long, but no longer than until that end.
fn before_end(limit: Duration) -> Duration {
    until_end().map_or(limit, |end| limit.min(end))
}

/// What every boot of this run has in common.
pub struct Lab {
    /// Kernel, disks.
    pub artefacts: Artefacts,
    /// How it is run.
    pub accel: Accel,
    /// Programs for the guest's `/usr/local/bin`.
    pub programs: Vec<PathBuf>,
    /// tcmu-dif's Debian package, if there is one: the guest's `/host/tcmu-dif.deb`.
    pub package: Option<PathBuf>,
    /// Where the logs go; a folder for each boot.
    pub logs: PathBuf,
}

/// Which network a guest has.
#[derive(Clone, Copy)]
pub enum Net<'a> {
    /// None.
    Nowhere,
    /// One that another may join later.
    Own,
    /// That guest's.
    With(&'a Guest),
}

/// The guest's process 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// A script that mounts what a test needs.
    Script,
    /// systemd.
    Systemd,
}

/// A VM.
pub struct Guest {
    qemu: Child,
    channel: UnixStream,
    dir: RunDir,
    logs: PathBuf,
    transcript: File,
    requests: u32,
    deadline: Instant,
    /// Passes what scripts say on to our own output as it comes.
    echo: bool,
    notes: Vec<String>,
}

/// What a script said and how it ended.
#[derive(Clone, Debug)]
pub struct Output {
    /// Exit status; none if a signal ended it or it would not die.
    pub status: Option<i32>,
    /// It had to be killed.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// It exited with 0.
    pub fn ok(&self) -> bool {
        self.status == Some(0) && !self.timed_out
    }
}

/// What an error says whose cause is a time limit: the machine may just have been too busy, so the suite tries such a test
/// once more, with longer limits.
pub const TIME_IS_OVER: &str = "time-is-over";

/// Whether an error comes of a time limit, and of nothing that was seen to be wrong.
pub fn is_time_over(error: &anyhow::Error) -> bool {
    format!("{error:#}").contains(TIME_IS_OVER)
}

/// Whether a read has waited for as long as it may.
fn is_late(error: &anyhow::Error) -> bool {
    let late = |e: &std::io::Error| matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
    error.downcast_ref().is_some_and(late)
}

/// A point in the kernel's log.
#[derive(Clone, Debug)]
pub struct Mark(String);

/// A folder under the temporary folder that goes away with its value.
pub struct RunDir(PathBuf);

impl RunDir {
    /// Makes it, with the share and a scratch disk in it.
    pub fn new(lab: &Lab) -> Result<Self> {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tcmu-dif-vm.{}.{number}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        let share = path.join("share");
        fs::create_dir_all(&share).with_context(|| format!("cannot make {}", share.display()))?;
        let dir = Self(path);
        programs::archive(&lab.programs, &dir.0.join(qemu::PROGRAMS))?;
        fs::write(dir.0.join("share/init.sh"), include_str!("guest/init.sh"))?;
        if let Some(package) = &lab.package {
            fs::copy(package, dir.0.join("share/tcmu-dif.deb"))
                .context("cannot give the package to the guest")?;
        }
        fs::copy(&lab.artefacts.module, dir.0.join("share/target_core_user.ko"))
            .context("cannot give the module to the guest")?;
        for part in ["vmlinux", "initramfs"] {
            let to = dir.0.join("share").join(format!("inner-{part}"));
            fs::copy(lab.artefacts.inner.join(part), to)
                .with_context(|| format!("cannot give the inner guest's {part} to the guest"))?;
        }
        crate::sh::quiet(
            Command::new("cp")
                .args(["--sparse=always", "--reflink=auto"])
                .arg(&lab.artefacts.scratch)
                .arg(dir.0.join("scratch.ext4")),
        )?;
        Ok(dir)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The socket at which its guest's network is.
    fn cable(&self) -> PathBuf {
        self.0.join("cable.sock")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Guest {
    /// Boots a VM that has until `limit` from now; `name` is that of its folder of logs.
    pub fn boot(lab: &Lab, init: Init, name: &str, limit: Duration) -> Result<Self> {
        Self::boot_on(lab, init, Net::Nowhere, name, limit)
    }

    /// [`Self::boot`] with a network card.
    pub fn boot_on(lab: &Lab, init: Init, net: Net<'_>, name: &str, limit: Duration) -> Result<Self> {
        let logs = lab.logs.join(name);
        if logs.exists() {
            fs::remove_dir_all(&logs)?;
        }
        fs::create_dir_all(&logs)?;
        let mut attempt = 1;
        loop {
            match Self::boot_once(lab, init, net, &logs, limit) {
                // Under translation the kernel's patching of its own code can trip over itself (an int3 that nobody
                // owns) before it reaches user space: that is the emulator's, and nothing of ours has run by then.
                Err(error) if attempt < BOOT_ATTEMPTS => {
                    println!(
                        "  a boot failed before user space, and is tried again: {name}, attempt {attempt}"
                    );
                    fs::write(logs.join(format!("failed-boot-{attempt}.txt")), format!("{error:?}\n"))?;
                    attempt += 1;
                }
                other => return other,
            }
        }
    }

    fn boot_once(lab: &Lab, init: Init, net: Net<'_>, logs: &Path, limit: Duration) -> Result<Self> {
        let dir = RunDir::new(lab)?;
        let socket = dir.path().join("agent.sock");
        let listener =
            UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        listener.set_nonblocking(true)?;
        let words = if init == Init::Systemd { qemu::SYSTEMD } else { "" };
        let mut command = qemu::machine(lab.accel, &lab.artefacts, dir.path(), words, MEMORY_MIB);
        qemu::with_channel(&mut command, &socket);
        match net {
            Net::Nowhere => {}
            Net::Own => qemu::with_cable(&mut command, Cable::First(&dir.cable())),
            Net::With(other) => qemu::with_cable(&mut command, Cable::Second(&other.dir.cable())),
        }
        let console = logs.join("console.log");
        command
            .args(["-serial", &format!("file:{}", console.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(logs.join("qemu.log"))?);
        let mut qemu = command.spawn().context("cannot start qemu-system-x86_64")?;
        let connected = wait_for_hello(&listener, &mut qemu);
        let channel = match connected {
            Ok(channel) => channel,
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let said = fs::read_to_string(&console).unwrap_or_default()
                    + &fs::read_to_string(logs.join("qemu.log")).unwrap_or_default();
                return Err(error.context(format!(
                    "the VM did not come up; its console's last lines:\n{}",
                    crate::sh::last_lines(&said, 20)
                )));
            }
        };
        Ok(Self {
            qemu,
            channel,
            dir,
            transcript: File::create(logs.join("transcript.log"))?,
            logs: logs.to_owned(),
            requests: 0,
            deadline: Instant::now() + limit * patience(),
            echo: false,
            notes: Vec::new(),
        })
    }

    /// Reboots a guest whose process 1 is systemd; gives back when it is up again. What its disks hold stays.
    pub fn reboot(&mut self) -> Result<()> {
        self.sh("systemctl --no-block reboot")?;
        let until = Instant::now() + BOOT_LIMIT * patience();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = before_end(left);
            if left.is_zero() {
                bail!("the guest did not come up again within {} s ({TIME_IS_OVER})", BOOT_LIMIT.as_secs());
            }
            self.channel.set_read_timeout(Some(left))?;
            let frame = Frame::read_from(&mut self.channel)
                .with_context(|| format!("the guest did not come up again ({TIME_IS_OVER})"))?;
            if frame.tag == Tag::Hello {
                return Ok(());
            }
        }
    }

    /// The folder with this boot's logs.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// The host's side of the guest's `/host`.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// A line to stand under the test's own in the table: what it has counted.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// The notes since the last call.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// From now on scripts' output is shown as it comes.
    pub fn set_echo(&mut self, echo: bool) {
        self.echo = echo;
    }

    /// The guest's time from now on.
    pub fn set_deadline(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit * patience();
    }

    /// Runs a bash script under `set -euo pipefail` and gives back its standard output without the last newline;
    /// anything but success is an error that shows what it said.
    pub fn sh(&mut self, script: &str) -> Result<String> {
        self.sh_within(SCRIPT_LIMIT, script)
    }

    /// [`Self::sh`] with another time limit.
    pub fn sh_within(&mut self, limit: Duration, script: &str) -> Result<String> {
        let output = self.run(script, true, limit)?;
        if !output.ok() {
            let how = match (output.timed_out, output.status) {
                (true, _) => format!("was killed after {} s ({TIME_IS_OVER})", limit.as_secs()),
                (false, Some(status)) => format!("exited with {status}"),
                (false, None) => "was ended by a signal".to_owned(),
            };
            bail!(
                "in the guest this {how}:\n{}\nstandard error:\n{}\nstandard output:\n{}",
                indented(script, 30),
                indented(&output.stderr, 30),
                indented(&output.stdout, 30)
            );
        }
        Ok(output.stdout.trim_end_matches('\n').to_owned())
    }

    /// Runs a bash script that may fail: the caller looks at how it ended.
    pub fn try_sh(&mut self, script: &str) -> Result<Output> {
        self.run(script, true, SCRIPT_LIMIT)
    }

    /// [`Self::sh`], and its output as JSON.
    pub fn json(&mut self, script: &str) -> Result<Value> {
        let text = self.sh(script)?;
        serde_json::from_str(&text)
            .with_context(|| format!("no JSON from {script:?}:\n{}", indented(&text, 20)))
    }

    /// Runs a bash script, as `strict` says with `set -euo pipefail`; fails only when the guest does.
    pub fn run(&mut self, script: &str, strict: bool, limit: Duration) -> Result<Output> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let left = before_end(left);
        if left.is_zero() {
            bail!("the test has had all its time ({TIME_IS_OVER})");
        }
        let limit = (limit * patience()).min(left);
        self.requests += 1;
        let request = Request { script: script.to_owned(), strict, timeout_s: limit.as_secs().max(1) };
        let started = Instant::now();
        let answer = self.exchange(&request, limit + ANSWER_SLACK);
        let mut log = format!("--- {} ---\n{}\n", self.requests, script.trim());
        match &answer {
            Ok(output) => {
                let _ = write!(
                    log,
                    "--- status {:?}{} after {:.2} s\n{}",
                    output.status,
                    if output.timed_out { ", killed" } else { "" },
                    started.elapsed().as_secs_f64(),
                    output.stdout
                );
                if !output.stderr.is_empty() {
                    let _ = write!(log, "--- stderr\n{}", output.stderr);
                }
            }
            Err(error) => {
                let _ = writeln!(log, "--- no answer: {error:#}");
            }
        }
        let _ = writeln!(self.transcript, "{log}");
        answer
    }

    fn exchange(&mut self, request: &Request, limit: Duration) -> Result<Output> {
        let number = self.requests;
        let frame = Frame { tag: Tag::Run, number, payload: serde_json::to_vec(request)? };
        frame.write_to(&mut self.channel).context("the VM is gone")?;
        let until = Instant::now() + limit;
        let mut out = Vec::new();
        let mut err = Vec::new();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the VM gave no answer for {} s ({TIME_IS_OVER})", limit.as_secs());
            }
            self.channel.set_read_timeout(Some(left))?;
            let frame = match Frame::read_from(&mut self.channel) {
                // The end of the time comes as the read's.
                Err(e) if is_late(&e) => continue,
                frame => frame.context("the VM is gone")?,
            };
            if frame.number != number {
                continue;
            }
            match frame.tag {
                Tag::Stdout => {
                    if self.echo {
                        std::io::stdout().write_all(&frame.payload)?;
                        std::io::stdout().flush()?;
                    }
                    out.extend(frame.payload);
                }
                Tag::Stderr => {
                    if self.echo {
                        std::io::stderr().write_all(&frame.payload)?;
                    }
                    err.extend(frame.payload);
                }
                Tag::Exit => {
                    let exit: Exit = serde_json::from_slice(&frame.payload)?;
                    return Ok(Output {
                        status: exit.status,
                        timed_out: exit.timed_out,
                        stdout: String::from_utf8_lossy(&out).into_owned(),
                        stderr: String::from_utf8_lossy(&err).into_owned(),
                    });
                }
                other => bail!("the agent sent a {other:?}"),
            }
        }
    }

    /// Copies what the daemon and the kernel said out of the guest.
    pub fn keep_logs(&mut self) {
        self.set_deadline(Duration::from_secs(30));
        for (script, name) in [
            ("cat /scratch/daemon*.log 2>/dev/null | tail -c 4000000", "daemon.log"),
            ("dmesg", "kernel.log"),
        ] {
            if let Ok(output) = self.run(script, false, Duration::from_secs(20)) {
                let _ = fs::write(self.logs.join(name), output.stdout);
            }
        }
    }

    /// Puts a mark into the kernel's log.
    pub fn mark(&mut self) -> Result<Mark> {
        let mark = format!("tcmu-dif test mark {}", self.requests + 1);
        self.sh(&format!("echo '{mark}' > /dev/kmsg"))?;
        Ok(Mark(mark))
    }

    /// The kernel's log since `mark`, without time stamps.
    pub fn kernel_log_since(&mut self, mark: &Mark) -> Result<String> {
        let log = self.sh("dmesg --notime")?;
        let mut lines = log.lines().skip_while(|line| !line.contains(&mark.0));
        if lines.next().is_none() {
            bail!("the kernel's log has run past {mark:?}");
        }
        Ok(lines.collect::<Vec<_>>().join("\n"))
    }

    /// The kernel found nothing wrong with itself, and nothing hangs: no oops, no warning, no hung task, and no process that stays in
    /// uninterruptible sleep for two seconds.
    pub fn assert_healthy(&mut self) -> Result<()> {
        let bad = self.sh(
            "dmesg --notime | grep -E 'BUG:|WARNING:|Oops|general protection|Call Trace|blocked for more than|refcount_t' || true",
        )?;
        if !bad.is_empty() {
            bail!("the guest's kernel complains:\n{}", indented(&bad, 20));
        }
        // A task may be in D state for a moment while it does honest I/O: only one that stays there hangs.
        let stuck = self.sh(
            r#"
            list() { ps -eo pid=,stat=,wchan:32=,comm= | awk '$2 ~ /^D/ && $4 !~ /^kworker/ {print $1, $3, $4}' | sort; }
            list > /tmp/.stuck
            for _ in 1 2 3 4; do
                [ -s /tmp/.stuck ] || exit 0
                sleep 0.5
                list | comm -12 /tmp/.stuck - > /tmp/.stuck2; mv /tmp/.stuck2 /tmp/.stuck
            done
            cat /tmp/.stuck
            "#,
        )?;
        if !stuck.is_empty() {
            let _ = self.sh("echo w > /proc/sysrq-trigger");
            let stacks = self.sh("dmesg | tail -n 60").unwrap_or_default();
            bail!("tasks hang in the guest:\n{stuck}\n{}", indented(&stacks, 60));
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Its disks are thrown away, so there is nothing to power off for.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Waits until QEMU has connected and the agent has said that it is up.
fn wait_for_hello(listener: &UnixListener, qemu: &mut Child) -> Result<UnixStream> {
    let limit = BOOT_LIMIT * patience();
    let until = Instant::now() + before_end(limit);
    let mut channel = loop {
        match listener.accept() {
            Ok((channel, _)) => break channel,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e.into()),
        }
        if let Some(status) = qemu.try_wait()? {
            bail!("qemu ended: {status}");
        }
        if Instant::now() > until {
            bail!("qemu did not connect");
        }
        thread::sleep(Duration::from_millis(10));
    };
    channel.set_nonblocking(false)?;
    channel.set_read_timeout(Some(
        until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1)),
    ))?;
    let hello = Frame::read_from(&mut channel).context("the agent did not report")?;
    if hello.tag != Tag::Hello {
        bail!("the agent began with a {:?}", hello.tag);
    }
    Ok(channel)
}

/// The last `count` lines of a text, indented.
pub fn indented(text: &str, count: usize) -> String {
    crate::sh::last_lines(text.trim_end(), count)
        .lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}
