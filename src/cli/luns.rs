//! What the commands know about LUNs: the kernel's objects and the daemon's state, brought together.

use std::{
    fs::File,
    io,
    path::Path,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{CliError, args::Cli, require_root};
use crate::{
    daemon::rundir::{LunState, Phase, RunDir, TURNS},
    kernel::{
        backstore::{self, Backstore, COMMAND_TIMEOUT, ConfigfsError},
        fabric::{self, Disk, Export, Fabric},
        names::Name,
        tree::{Real, Tree},
    },
    lun::{
        chain,
        config::{DeviceConfig, SUBTYPE, pi_word},
    },
    pi::{Exposure, Transfer},
};

/// sysfs, as it is.
pub const SYSFS: &str = "/sys";

/// How long one waits for another who works on the same LUN.
const TURN_PATIENCE: Duration = Duration::from_secs(120);

/// Where the commands look.
pub struct Places {
    /// configfs.
    pub tree: Real,
    /// The daemon's directory.
    pub run: RunDir,
}

impl Places {
    /// As the command line has them.
    pub fn of(cli: &Cli) -> Places {
        Places { tree: Real::at(&cli.configfs), run: RunDir::at(&cli.run_dir) }
    }

    /// The number of the daemon.
    ///
    /// # Errors
    /// If there is none.
    pub fn daemon(&self) -> Result<i32, CliError> {
        let found = self.run.daemon().map_err(|e| CliError::from("daemon", self.run.path().display(), &e))?;
        found.ok_or_else(|| {
            CliError::new("daemon", "", "it isn't running")
                .then("start it: tcmu-dif daemon (as root, in the foreground)")
        })
    }

    /// What the daemon says of a LUN; nothing, if there is no daemon: what a dead one wrote says nothing any more.
    ///
    /// # Errors
    /// The file system's.
    pub fn state(&self, command: &str, name: &str) -> Result<Option<LunState>, CliError> {
        let read = || if self.run.daemon()?.is_some() { self.run.read(name) } else { Ok(None) };
        read().map_err(|e| CliError::from(command, name, &e))
    }

    /// Waits until nobody else makes or takes down a LUN of that name; others wait while the value lives. Two that tried the
    /// same image at once would each find it in use by the other, and both give up.
    ///
    /// # Errors
    /// If another takes longer than two minutes.
    pub fn turn(&self, command: &str, name: &Name) -> Result<Option<File>, CliError> {
        if require_root(command).is_err() {
            // Who may not change anything takes nobody's turn; what else is wrong is said first.
            return Ok(None);
        }
        let turn = self.run.turn(name.as_str(), TURN_PATIENCE);
        match turn.map_err(|e| CliError::from(command, name, &e))? {
            Some(turn) => Ok(Some(turn)),
            None => Err(CliError::new(
                command,
                name,
                "another create or delete has been at work on it for two minutes",
            )
            .then(format!(
                "look at the daemon's log, or end the other one: fuser -v {}",
                self.run.path().join(TURNS).display()
            ))),
        }
    }

    /// The backstore of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn lun(&self, command: &str, name: &Name) -> Result<Backstore, CliError> {
        let found = self.find(command, name)?;
        found.ok_or_else(|| {
            CliError::new(command, name, "no such LUN").then("see which there are: tcmu-dif list")
        })
    }

    /// The backstore of that name, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn find(&self, command: &str, name: &Name) -> Result<Option<Backstore>, CliError> {
        backstore::find(&self.tree, SUBTYPE, name.as_str()).map_err(|e| refused(command, name, &e))
    }

    /// A LUN's exports, as they are printed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn exports(&self, command: &str, backstore: &Backstore) -> Result<Vec<ExportView>, CliError> {
        let exports = fabric::of(&self.tree, backstore).map_err(|e| refused(command, &backstore.name, &e))?;
        Ok(exports.iter().map(|e| view(&self.tree, e)).collect())
    }
}

/// What the kernel refused, as the administrator reads it.
pub fn refused(command: &str, name: impl std::fmt::Display, e: &ConfigfsError) -> CliError {
    CliError::new(command, name, format!("the kernel refused: {}", chain(e)))
        .then("look at the kernel's messages: dmesg")
}

/// One export, as it is printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExportView {
    /// `loopback`, `vhost`, or another.
    pub fabric: String,
    /// The target's name.
    pub wwn: String,
    /// The disk on this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Its SCSI generic device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sg: Option<String>,
    /// libvirt's XML.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub libvirt: Option<String>,
    /// QEMU's arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<String>,
}

/// An export and what stands behind it now.
pub fn view(tree: &dyn Tree, export: &Export) -> ExportView {
    let disk = (export.kind() == Some(Fabric::Loopback))
        .then(|| fabric::scsi_address(tree, export).ok())
        .flatten()
        .map(|address| fabric::disk(Path::new(SYSFS), &address));
    view_of(export, disk.as_ref())
}

/// An export with that disk.
pub fn view_of(export: &Export, disk: Option<&Disk>) -> ExportView {
    let vhost = export.kind() == Some(Fabric::Vhost);
    let dev = |name: Option<&String>| name.map(|n| format!("/dev/{n}"));
    ExportView {
        fabric: export.fabric.clone(),
        wwn: export.target.clone(),
        device: dev(disk.and_then(|d| d.block.as_ref())),
        sg: dev(disk.and_then(|d| d.sg.as_ref())),
        libvirt: vhost.then(|| libvirt(&export.target)),
        qemu: vhost.then(|| qemu(&export.target)),
    }
}

/// libvirt's XML for a vhost target.
fn libvirt(wwn: &str) -> String {
    format!(
        "<hostdev mode='subsystem' type='scsi_host' managed='no'>\n  \
         <source protocol='vhost' wwpn='{wwn}'/>\n</hostdev>"
    )
}

/// QEMU's arguments for a vhost target.
fn qemu(wwn: &str) -> String {
    format!("-device vhost-scsi-pci,wwpn={wwn}")
}

/// A LUN as `list` and `show` print it.
#[derive(Debug, Clone, Serialize)]
pub struct LunView {
    /// Its name.
    pub name: String,
    /// `online`, `starting`, `failed`; `unserved` if no daemon says anything of it.
    pub state: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What to do next.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// The image.
    pub image: String,
    /// Its format.
    pub format: Option<String>,
    /// `off`, `type1`, `type2`, `type3`.
    pub pi: String,
    /// Who sees it: `target` or `initiator`.
    pub exposure: Exposure,
    /// How it travels to those who do: `separate` or `interleaved`.
    pub transfer: Option<Transfer>,
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes.
    pub capacity_bytes: u64,
    /// The serial number.
    pub serial: String,
    /// The write cache is on.
    pub write_cache: bool,
    /// The kernel's object, relative to configfs.
    pub backstore: String,
    /// `io_uring` or `threads`.
    pub io: Option<String>,
    /// Where it is exported.
    pub exports: Vec<ExportView>,
    /// What it has counted.
    pub counters: serde_json::Value,
}

/// What a backstore of ours was made with; nothing if its words make no sense, or if it is another's.
pub fn config_of(backstore: &Backstore) -> Option<DeviceConfig> {
    DeviceConfig::parse(backstore.config_after(SUBTYPE)?).ok()
}

impl LunView {
    /// From what the kernel and the daemon say.
    pub fn new(backstore: &Backstore, state: Option<LunState>, exports: Vec<ExportView>) -> LunView {
        let config = config_of(backstore);
        let state = state.filter(|s| s.hba == backstore.hba);
        let phase = state.as_ref().map(|s: &LunState| s.state);
        LunView {
            name: backstore.name.clone(),
            state: phase.map_or("unserved".to_owned(), |p: Phase| p.to_string()),
            reason: state.as_ref().and_then(|s| s.reason.clone()),
            next: state.as_ref().and_then(|s| s.next.clone()),
            image: config.as_ref().map_or(backstore.dev_config.clone(), |c| c.image.display().to_string()),
            format: state.as_ref().and_then(|s| s.format.clone()),
            pi: config.as_ref().and_then(|c| c.pi).map_or("off", pi_word).to_owned(),
            exposure: config.as_ref().map_or(Exposure::Target, |c| c.exposure),
            transfer: config.as_ref().filter(|c| c.exposure == Exposure::Initiator).map(|c| c.transfer),
            read_only: config.is_some_and(|c| c.read_only),
            block_size: backstore.block_size,
            capacity_bytes: backstore.capacity,
            serial: backstore.serial.clone(),
            write_cache: backstore.write_cache,
            backstore: backstore.path.display().to_string(),
            io: state.as_ref().and_then(|s| s.io.clone()),
            exports,
            counters: state.map_or(serde_json::Value::Null, |s| s.counters),
        }
    }
}

/// Lets the disk driver wait longer than the target does: what the kernel's own time limit is, and half as much again.
pub const DISK_TIMEOUT: u32 = COMMAND_TIMEOUT + COMMAND_TIMEOUT / 2;

/// How long the daemon may take to close an image.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the daemon has closed the image of a LUN that is gone: its file goes then. A LUN of the same name that
/// came since, on another `user_N` than `hba`, is none to wait for.
///
/// # Errors
/// If it takes too long; and the file system's.
pub fn wait_until_closed(places: &Places, name: &str, hba: Option<u32>) -> io::Result<()> {
    let end = Instant::now() + CLOSE_PATIENCE;
    while places.run.read(name)?.is_some_and(|s| hba.is_none_or(|hba| s.hba == hba)) {
        if places.run.daemon()?.is_none() {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the daemon still closes the image"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
