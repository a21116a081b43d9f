//! /run/tcmu-dif: the lock of the one daemon, and a file for every LUN that says how it is.
//!
//! `daemon.pid` is locked (flock) as long as the daemon lives, so a file that an earlier one left behind misleads nobody.
//! `luns/NAME.json` is written beside and renamed over, so that a reader sees the old or the new.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, Write},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::{
    files,
    lun::state_file::{check_version, now_ms},
    scsi::naa_from_serial,
    sys::ofd::{self, OfdLock},
};

/// The file on which those lock who make or take down LUNs.
pub const TURNS: &str = "turns.lock";

/// The usual place.
pub const RUN_DIR: &str = "/run/tcmu-dif";

/// How far a LUN is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Its image is being opened.
    Starting,
    /// It serves.
    Online,
    /// It doesn't: see the reason.
    Failed,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Phase::Starting => "starting",
            Phase::Online => "online",
            Phase::Failed => "failed",
        })
    }
}

/// The last change that the kernel asked for, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastChange {
    /// `capacity` or `write_cache`.
    pub what: String,
    /// The value that was asked for (bytes; 0 or 1).
    pub value: u64,
    /// Why it wasn't done.
    pub error: Option<String>,
}

/// The version of [`LunState`], in its file; `tcmu-dif` may be another version than the daemon that runs.
const VERSION: u32 = 1;

/// One LUN's file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LunState {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: Phase,
    /// Why it failed.
    pub reason: Option<String>,
    /// What the administrator does next.
    pub next: Option<String>,
    /// The image.
    pub image: String,
    /// Its format, once it is open.
    pub format: Option<String>,
    /// `off`, `type1`, `type3`.
    pub pi: String,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes.
    pub capacity_bytes: u64,
    /// The way of its I/O, once it is open.
    pub io: Option<String>,
    /// What it has counted.
    pub counters: serde_json::Value,
    /// The last change that was asked for.
    pub last_change: Option<LastChange>,
    /// N of `user_N`: tells it from a LUN of the same name that was there before.
    pub hba: u32,
    /// N of /dev/uioN.
    pub minor: u32,
    /// When this was written, in milliseconds since 1970.
    pub written_ms: u64,
}

/// The directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
}

/// Held by the daemon while it lives.
#[derive(Debug)]
pub struct DaemonLock {
    #[allow(dead_code)] // Held, never read: it keeps the lock.
    file: File,
}

impl RunDir {
    /// That directory.
    pub fn at(root: impl Into<PathBuf>) -> RunDir {
        RunDir { root: root.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn pid_file(&self) -> PathBuf {
        self.root.join("daemon.pid")
    }

    /// A LUN's file.
    pub fn lun_file(&self, name: &str) -> PathBuf {
        self.root.join("luns").join(format!("{name}.json"))
    }

    /// Becomes the daemon: makes the directory, takes the lock, writes the number, and removes the files of LUNs that an
    /// earlier daemon left. `None` if another one lives.
    ///
    /// # Errors
    /// The file system's.
    pub fn lock(&self) -> io::Result<Option<DaemonLock>> {
        let luns = self.root.join("luns");
        fs::create_dir_all(&luns)?;
        let options =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).clone();
        let mut file = options.open(self.pid_file())?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        for entry in fs::read_dir(luns)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(Some(DaemonLock { file }))
    }

    /// The number of the daemon that lives, if one does.
    ///
    /// # Errors
    /// The file system's.
    pub fn daemon(&self) -> io::Result<Option<i32>> {
        let mut file = match File::open(self.pid_file()) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        // A shared lock, so that two who ask don't take each other for the daemon.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(None),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                Ok(text.trim().parse().ok().filter(|pid| *pid > 0))
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Waits for one's turn to make or take down the LUN of that name, and keeps it while the file is open. `None` if another
    /// has it for longer than `patience`. Where no daemon ever ran there is nothing to wait for: a file that locks nothing.
    ///
    /// # Errors
    /// The file system's.
    pub fn turn(&self, name: &str, patience: Duration) -> io::Result<Option<File>> {
        if !self.root.is_dir() {
            return Ok(Some(File::open("/dev/null")?));
        }
        // A byte of one file for each name: nothing is left behind, and no name waits for another's.
        let byte = naa_from_serial(name) & i64::MAX as u64;
        let options = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).clone();
        let file = options.open(self.root.join(TURNS))?;
        let end = Instant::now() + patience;
        loop {
            match ofd::set(&file, OfdLock::Exclusive, byte, 1) {
                Ok(()) => return Ok(Some(file)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes a LUN's file.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, state: &LunState) -> io::Result<()> {
        let file = self.lun_file(&state.name);
        #[derive(Serialize)]
        struct Versioned<'a> {
            version: u32,
            #[serde(flatten)]
            state: &'a LunState,
        }
        let mut text = serde_json::to_vec_pretty(&Versioned { version: VERSION, state })?;
        text.push(b'\n');
        files::replace(&file, &text, false)
    }

    /// Reads a LUN's file, if there is one.
    ///
    /// # Errors
    /// The file system's, and InvalidData; [`crate::lun::state_file::NewerVersion`] if the daemon is newer than this program.
    pub fn read(&self, name: &str) -> io::Result<Option<LunState>> {
        let path = self.lun_file(name);
        match fs::read(&path) {
            Ok(text) => {
                check_version(&path, &text, VERSION)?;
                Ok(Some(serde_json::from_slice(&text)?))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Removes a LUN's file, if there is one.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        files::remove(&self.lun_file(name))
    }

    /// Opens the in-flight record of the device with that minor number, and makes it if there is none. Nobody else has it open.
    ///
    /// # Errors
    /// The file system's; WouldBlock if somebody has it.
    pub fn open_record(&self, minor: u32) -> io::Result<File> {
        let file = self.record_file(minor);
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        let options =
            fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).clone();
        let file = options.open(file)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(file)
    }

    /// Notes where the daemon serves metrics besides their socket; `None`: nowhere.
    ///
    /// # Errors
    /// The file system's.
    pub fn note_metrics_at(&self, at: Option<SocketAddr>) -> io::Result<()> {
        match at {
            Some(at) => files::replace(&self.metrics_file(), at.to_string().as_bytes(), false),
            None => files::remove(&self.metrics_file()),
        }
    }

    /// Where the last daemon served them; whether it lives is another question.
    pub fn metrics_at(&self) -> Option<SocketAddr> {
        fs::read_to_string(self.metrics_file()).ok()?.parse().ok()
    }

    fn metrics_file(&self) -> PathBuf {
        self.root.join("metrics.at")
    }

    /// Where the in-flight record of that device is.
    pub fn record_file(&self, minor: u32) -> PathBuf {
        self.root.join("rings").join(format!("uio{minor}"))
    }

    /// Where what initiators have set of that device is kept.
    pub fn continued_file(&self, minor: u32) -> PathBuf {
        self.record_file(minor).with_extension("json")
    }

    /// Removes the in-flight record of a device that is gone and what initiators have set of it, unless one that has its minor number by now keeps its own there.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove_record(&self, minor: u32) -> io::Result<()> {
        let path = self.record_file(minor);
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => files::remove(&self.continued_file(minor)).and_then(|()| files::remove(&path)),
            Err(_) => Ok(()),
        }
    }

    /// Asks the daemon for fresh counters (SIGUSR1), and gives the file as it is then, or as it was if the daemon takes
    /// longer than `patience`; nothing if there is no daemon.
    ///
    /// # Errors
    /// The file system's, and the kernel's.
    pub fn refresh(&self, name: &str, patience: Duration) -> io::Result<Option<LunState>> {
        let before = now_ms();
        let Some(pid) = self.daemon()?.and_then(rustix::process::Pid::from_raw) else {
            return Ok(None);
        };
        rustix::process::kill_process(pid, rustix::process::Signal::USR1)?;
        self.wait(name, patience, |state| state.written_ms >= before)
    }

    /// Waits until a LUN's file is as wanted; gives it as it is then, or at the end of the patience.
    ///
    /// # Errors
    /// The file system's.
    pub fn wait(
        &self,
        name: &str,
        patience: Duration,
        wanted: impl Fn(&LunState) -> bool,
    ) -> io::Result<Option<LunState>> {
        let end = Instant::now() + patience;
        loop {
            let state = self.read(name)?;
            if state.as_ref().is_some_and(&wanted) || Instant::now() >= end {
                return Ok(state);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn state(name: &str) -> LunState {
        LunState {
            name: name.into(),
            state: Phase::Online,
            reason: None,
            next: None,
            image: "/images/vm1.raw".into(),
            format: Some("raw".into()),
            pi: "off".into(),
            block_size: 512,
            capacity_bytes: 1 << 20,
            io: Some("io_uring".into()),
            counters: serde_json::json!({ "reads": 3 }),
            last_change: None,
            hba: 0,
            minor: 0,
            written_ms: now_ms(),
        }
    }

    #[test]
    fn one_daemon_at_a_time_and_a_dead_ones_number_misleads_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path().join("run"));
        assert_eq!(run.daemon().unwrap(), None);
        let lock = run.lock().unwrap().unwrap();
        assert_eq!(run.daemon().unwrap(), Some(std::process::id() as i32));
        assert!(run.lock().unwrap().is_none());
        drop(lock);
        assert_eq!(run.daemon().unwrap(), None);
        assert!(run.pid_file().exists());
    }

    #[test]
    fn a_new_daemon_forgets_the_luns_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        drop(run.lock().unwrap());
        run.write(&state("vm1")).unwrap();
        assert_eq!(
            run.read("vm1").unwrap(),
            Some(state("vm1"))
                .map(|s| LunState { written_ms: run.read("vm1").unwrap().unwrap().written_ms, ..s })
        );
        let _lock = run.lock().unwrap().unwrap();
        assert_eq!(run.read("vm1").unwrap(), None);
    }

    #[test]
    fn a_newer_daemon_s_file_is_refused_in_words_and_one_without_a_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        drop(run.lock().unwrap());
        run.write(&state("vm1")).unwrap();
        let text = fs::read_to_string(run.lun_file("vm1")).unwrap();
        let version = "  \"version\": 1,\n";
        assert!(text.contains(version), "{text}");
        fs::write(run.lun_file("vm1"), text.replace(version, "")).unwrap();
        assert_eq!(run.read("vm1").unwrap().unwrap().image, "/images/vm1.raw");
        fs::write(run.lun_file("vm1"), "{ \"version\": 2, \"all\": \"is otherwise\" }").unwrap();
        let e = run.read("vm1").unwrap_err();
        assert!(e.to_string().contains("vm1.json is of version 2, and this program knows 1"), "{e}");
    }

    #[test]
    fn one_works_on_a_name_at_a_time_and_the_next_gets_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        let first = run.turn("vm1", Duration::ZERO).unwrap().unwrap();
        assert!(run.turn("vm1", Duration::from_millis(30)).unwrap().is_none());
        std::thread::scope(|s| {
            let next = s.spawn(|| run.turn("vm1", Duration::from_secs(10)).unwrap().is_some());
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
            assert!(next.join().unwrap());
        });
        // Nobody waits for a name that is another.
        let _all: Vec<_> =
            (0..200).map(|i| run.turn(&format!("vm-{i}"), Duration::ZERO).unwrap().unwrap()).collect();
        let none = RunDir::at(dir.path().join("no-daemon-yet"));
        assert!(none.turn("vm1", Duration::ZERO).unwrap().is_some());
        assert!(!none.path().exists());
    }

    #[test]
    fn waiting_ends_when_the_state_is_as_wanted_or_patience_does() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        drop(run.lock().unwrap());
        assert_eq!(run.wait("vm1", Duration::from_millis(20), |_| true).unwrap(), None);
        std::thread::scope(|s| {
            s.spawn(|| {
                run.write(&LunState { state: Phase::Starting, ..state("vm1") }).unwrap();
                std::thread::sleep(Duration::from_millis(20));
                run.write(&state("vm1")).unwrap();
            });
            let seen = run.wait("vm1", Duration::from_secs(10), |s| s.state != Phase::Starting).unwrap();
            assert_eq!(seen.unwrap().state, Phase::Online);
        });
    }
}
