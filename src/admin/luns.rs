//! What is known about LUNs: the kernel's objects and the daemon's state, brought together.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{Refusal, require_root};
use crate::{
    daemon::rundir::{LunState, Phase, RunDir, TURNS},
    kernel::{
        SYSFS,
        backstore::{self, Backstore, COMMAND_TIMEOUT, ConfigfsError},
        fabric::{self, Disk, Export, Fabric},
        names::{Name, Wwn},
        tree::{Real, Tree},
    },
    lun::{
        chain,
        config::{DeviceConfig, SUBTYPE, pi_word},
        moved::Moves,
    },
    pi::{Exposure, Transfer},
};

/// How long one waits for another who works on the same LUN.
const TURN_PATIENCE: Duration = Duration::from_secs(120);

/// Where to look.
#[derive(Debug, Clone)]
pub struct Places {
    /// configfs.
    pub tree: Real,
    /// Where it is mounted.
    pub configfs: PathBuf,
    /// The daemon's directory.
    pub run: RunDir,
    /// The directory of what has to be there after a reboot.
    pub state_dir: PathBuf,
}

impl Places {
    /// Those with configfs, the daemon's directory and the one for reboots there.
    pub fn at(configfs: &Path, run_dir: &Path, state_dir: &Path) -> Places {
        Places {
            tree: Real::at(configfs),
            configfs: configfs.to_owned(),
            run: RunDir::at(run_dir),
            state_dir: state_dir.to_owned(),
        }
    }

    /// The number of the daemon.
    ///
    /// # Errors
    /// If there is none.
    pub fn daemon(&self) -> Result<i32, Refusal> {
        let found = self.run.daemon().map_err(|e| Refusal::from("daemon", self.run.path().display(), &e))?;
        found.ok_or_else(|| {
            Refusal::new("daemon", "", "it isn't running")
                .then("start it: tcmu-dif daemon (as root, in the foreground)")
        })
    }

    /// Where a LUN of that name was moved from one image to another.
    pub fn moves(&self, name: &Name) -> Moves {
        Moves::of(&self.state_dir, name.as_str())
    }

    /// What the daemon says of a LUN; nothing, if there is no daemon: what a dead one wrote says nothing any more.
    ///
    /// # Errors
    /// The file system's.
    pub fn state(&self, command: &str, name: &str) -> Result<Option<LunState>, Refusal> {
        let read = || if self.run.daemon()?.is_some() { self.run.read(name) } else { Ok(None) };
        read().map_err(|e| Refusal::from(command, name, &e))
    }

    /// Waits until nobody else makes or takes down a LUN of that name; others wait while the value lives. Two that tried the
    /// same image at once would each find it in use by the other, and both give up.
    ///
    /// # Errors
    /// If another takes longer than two minutes.
    pub fn turn(&self, command: &str, name: &Name) -> Result<Option<File>, Refusal> {
        if require_root(command).is_err() {
            // Who may not change anything takes nobody's turn; what else is wrong is said first.
            return Ok(None);
        }
        let turn = self.run.turn(name.as_str(), TURN_PATIENCE);
        match turn.map_err(|e| Refusal::from(command, name, &e))? {
            Some(turn) => Ok(Some(turn)),
            None => Err(Refusal::new(
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
    pub fn lun(&self, command: &str, name: &Name) -> Result<Backstore, Refusal> {
        let found = self.find(command, name)?;
        found.ok_or_else(|| {
            Refusal::new(command, name, "no such LUN").then("see which there are: tcmu-dif list")
        })
    }

    /// The backstore of that name, if there is one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn find(&self, command: &str, name: &Name) -> Result<Option<Backstore>, Refusal> {
        backstore::find(&self.tree, SUBTYPE, name.as_str()).map_err(|e| refused(command, name, &e))
    }

    /// A LUN's exports, as they are printed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn exports(&self, command: &str, backstore: &Backstore) -> Result<Vec<ExportView>, Refusal> {
        let exports = fabric::of(&self.tree, backstore).map_err(|e| refused(command, &backstore.name, &e))?;
        Ok(exports.iter().map(|e| view(&self.tree, e)).collect())
    }
}

/// What the kernel refused, as the administrator reads it.
pub fn refused(command: &str, name: impl std::fmt::Display, e: &ConfigfsError) -> Refusal {
    Refusal::new(command, name, format!("the kernel refused: {}", chain(e)))
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
    let guest = (export.kind() == Some(Fabric::Vhost)).then(|| Wwn::new(&export.target).ok()).flatten();
    let dev = |name: Option<&String>| name.map(|n| format!("/dev/{n}"));
    ExportView {
        fabric: export.fabric.clone(),
        wwn: export.target.clone(),
        device: dev(disk.and_then(|d| d.block.as_ref())),
        sg: dev(disk.and_then(|d| d.sg.as_ref())),
        libvirt: guest.as_ref().map(libvirt),
        qemu: guest.as_ref().map(qemu),
    }
}

/// libvirt's XML for a vhost target, to stand in a domain's `<devices>`. libvirt takes just names of the form `naa.…`, as a [`Wwn`] is.
fn libvirt(wwn: &Wwn) -> String {
    format!(
        "<hostdev mode='subsystem' type='scsi_host' managed='no'>\n  \
         <source protocol='vhost' wwpn='{wwn}'/>\n</hostdev>"
    )
}

/// QEMU's arguments for a vhost target.
fn qemu(wwn: &Wwn) -> String {
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

/// The pauses of one who looks again and again for what the daemon does: longer each time, for many that look all the time keep it from its work.
pub(super) struct Pauses(Duration);

impl Pauses {
    pub(super) fn new() -> Pauses {
        Pauses(Duration::from_millis(5))
    }

    pub(super) fn wait(&mut self) {
        std::thread::sleep(self.0);
        self.0 = (self.0 * 3 / 2).min(Duration::from_millis(300));
    }
}

/// How long the daemon may take to close an image.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the daemon has closed the image of a LUN that is gone: its file goes then. A LUN of the same name that
/// came since, on another `user_N` than `hba`, is none to wait for.
///
/// # Errors
/// If it takes too long; and the file system's.
pub fn wait_until_closed(places: &Places, name: &str, hba: Option<u32>) -> io::Result<()> {
    let end = Instant::now() + CLOSE_PATIENCE;
    let mut pauses = Pauses::new();
    while places.run.read(name)?.is_some_and(|s| hba.is_none_or(|hba| s.hba == hba)) {
        if places.run.daemon()?.is_none() {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the daemon still closes the image"));
        }
        pauses.wait();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(fabric: &str, target: &str) -> Export {
        let word = str::to_owned;
        Export {
            fabric: word(fabric),
            target: word(target),
            tpg: word("tpgt_1"),
            lun: word("lun_0"),
            link: word("vm1"),
        }
    }

    #[test]
    fn a_guest_s_words_are_there_for_vhost_targets_with_a_name_that_libvirt_takes_and_for_no_others() {
        let view = view_of(&export("vhost", "naa.50014055a675866c"), None);
        assert_eq!(view.qemu.as_deref(), Some("-device vhost-scsi-pci,wwpn=naa.50014055a675866c"));
        assert!(view.libvirt.is_some_and(|xml| xml.contains("wwpn='naa.50014055a675866c'")));
        for (fabric, target) in [
            ("loopback", "naa.50014055a675866c"),
            ("iscsi", "iqn.2003-01.org.example:vm1"),
            ("vhost", "iqn.2003-01.org.example:vm1"),
            ("vhost", "naa.5001'/>"),
        ] {
            let view = view_of(&export(fabric, target), None);
            assert_eq!((view.libvirt, view.qemu), (None, None), "{fabric} {target}");
        }
    }
}
