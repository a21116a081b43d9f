//! The backstore of a LUN: `target/core/user_N/NAME`, one `user_N` each.
//!
//! A directory `user_N` of its own keeps 64 creates and deletes from waiting for one another: the kernel holds the parent's
//! lock while it removes a device. And every backstore that `create` makes has `nl_reply_supported=-1`: the kernel tells
//! of it by netlink and waits for nobody, because it would take the first answer that any daemon gives, and tcmu-runner
//! answers ENOENT for every subtype that it doesn't know. `create` and the daemon meet in the state file under /run instead.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

use super::{alua, names::Name, tree::Tree, undo::Undo};
use crate::units::BlockSize;

/// Seconds after which the kernel gives up on a command: more than the minute that a restart may take.
pub const COMMAND_TIMEOUT: u32 = 90;
/// The longest command, in bytes: what vhost-scsi can carry in one (2048 pages).
const MAX_TRANSFER: u64 = 8 << 20;
/// MiB of the command ring: some sixty of the longest commands, or sixteen thousand short ones.
const RING_MB: u32 = 2;
pub(super) const CORE: &str = "target/core";

/// A step that the kernel refused.
#[derive(Debug, Error)]
#[error("{what} {path}", path = path.display())]
pub struct ConfigfsError {
    /// What was being done.
    pub what: &'static str,
    /// To what, relative to configfs.
    pub path: PathBuf,
    /// The kernel's word.
    #[source]
    pub source: io::Error,
}

/// Adds what and where to a kernel's error.
pub(super) trait Context<T> {
    fn context(self, what: &'static str, path: &Path) -> Result<T, ConfigfsError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: &'static str, path: &Path) -> Result<T, ConfigfsError> {
        self.map_err(|source| ConfigfsError { what, path: path.to_owned(), source })
    }
}

/// What a backstore is made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Its name.
    pub name: Name,
    /// The kernel's `dev_config`, subtype included.
    pub dev_config: String,
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a block.
    pub block_size: BlockSize,
    /// `wwn/vpd_unit_serial`.
    pub serial: String,
    /// WCE at first.
    pub write_cache: bool,
}

/// A backstore that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backstore {
    /// Its directory, relative to configfs: `target/core/user_N/NAME`.
    pub path: PathBuf,
    /// N.
    pub hba: u32,
    /// Its name.
    pub name: String,
    /// Its `dev_config`, subtype included.
    pub dev_config: String,
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// `wwn/vpd_unit_serial`, empty if it isn't set.
    pub serial: String,
    /// The write cache is on.
    pub write_cache: bool,
    /// The kernel has it running.
    pub enabled: bool,
    /// The kernel waits for answers to what it tells by netlink.
    pub wants_answers: bool,
}

/// How often a device's directory is begun with a `user_N` of its own.
const HBA_TRIES: usize = 3;
/// How often, and how long apart, a device whose attributes are not there is looked at again before that is an error, and a device is enabled whose number
/// is not free yet.
const REMOVAL_LOOKS: usize = 100;
const REMOVAL_PAUSE: Duration = Duration::from_millis(10);

/// The directory of a backstore, relative to configfs.
pub fn path_of(hba: u32, name: &str) -> PathBuf {
    Path::new(CORE).join(format!("user_{hba}")).join(name)
}

/// Every backstore of target_core_user, whosever it is.
///
/// # Errors
/// The kernel's.
pub fn all(tree: &dyn Tree) -> Result<Vec<Backstore>, ConfigfsError> {
    let mut out = Vec::new();
    for number in hbas(tree)? {
        let dir = Path::new(CORE).join(format!("user_{number}"));
        for name in tree.dirs(&dir).context("list", &dir)? {
            // `alua` and such are directories of the device, never of the HBA: every one here is a device. One that is
            // removed between the two looks is left out.
            out.extend(read(tree, number, &name)?);
        }
    }
    out.sort_by(|a, b| (&a.name, a.hba).cmp(&(&b.name, b.hba)));
    Ok(out)
}

/// Every backstore of that name, whosever it is. Of the others nothing is read: with hundreds there, hundreds that are made side by side would
/// have the kernel do little else.
///
/// # Errors
/// The kernel's.
pub fn named(tree: &dyn Tree, name: &str) -> Result<Vec<Backstore>, ConfigfsError> {
    let mut out = Vec::new();
    for hba in hbas(tree)? {
        out.extend(read(tree, hba, name)?);
    }
    Ok(out)
}

/// Ours of that name.
///
/// # Errors
/// The kernel's.
pub fn find(tree: &dyn Tree, subtype: &str, name: &str) -> Result<Option<Backstore>, ConfigfsError> {
    Ok(named(tree, name)?.into_iter().find(|b| b.is_of(subtype)))
}

/// The numbers N of all `user_N`.
fn hbas(tree: &dyn Tree) -> Result<Vec<u32>, ConfigfsError> {
    let core = Path::new(CORE);
    let dirs = tree.dirs(core).context("list", core)?;
    let mut numbers: Vec<u32> = dirs.iter().filter_map(|d| d.strip_prefix("user_")?.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// One backstore; `None` if it isn't there.
///
/// # Errors
/// The kernel's.
pub fn read(tree: &dyn Tree, hba: u32, name: &str) -> Result<Option<Backstore>, ConfigfsError> {
    let path = path_of(hba, name);
    for _ in 0..REMOVAL_LOOKS {
        if !tree.is_dir(&path) {
            return Ok(None);
        }
        match read_there(tree, hba, name, &path) {
            // Somebody removes it: its attributes go first, and its directory a moment later.
            Err(e) if e.source.kind() == io::ErrorKind::NotFound => std::thread::sleep(REMOVAL_PAUSE),
            other => return other.map(Some),
        }
    }
    read_there(tree, hba, name, &path).map(Some)
}

fn read_there(tree: &dyn Tree, hba: u32, name: &str, path: &Path) -> Result<Backstore, ConfigfsError> {
    let get = |attr: &str| {
        let attr = path.join(attr);
        tree.read(&attr).context("read", &attr)
    };
    let number = |attr: &str| {
        let text = get(attr)?;
        let parsed = text.trim().parse::<u64>();
        parsed.map_err(|_| ConfigfsError {
            what: "read",
            path: path.join(attr),
            source: io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no number")),
        })
    };
    let serial = get("wwn/vpd_unit_serial")?;
    let serial = serial.strip_prefix("T10 VPD Unit Serial Number: ").unwrap_or_default();
    Ok(Backstore {
        path: path.to_owned(),
        hba,
        name: name.to_owned(),
        dev_config: get("attrib/dev_config")?,
        capacity: number("attrib/dev_size")?,
        block_size: number("attrib/hw_block_size")?,
        serial: serial.to_owned(),
        write_cache: number("attrib/emulate_write_cache")? != 0,
        enabled: get("enable")?.trim() == "1",
        wants_answers: !get("attrib/nl_reply_supported")?.trim().starts_with('-'),
    })
}

impl Backstore {
    /// Whether it belongs to that subtype.
    pub fn is_of(&self, subtype: &str) -> bool {
        self.config_after(subtype).is_some()
    }

    /// What follows the subtype in `dev_config`.
    pub fn config_after(&self, subtype: &str) -> Option<&str> {
        self.dev_config.strip_prefix(subtype)?.strip_prefix('/')
    }

    /// The number by which netlink names the device.
    ///
    /// # Errors
    /// The kernel's.
    pub fn device_id(&self, tree: &dyn Tree) -> Result<u32, ConfigfsError> {
        let attr = self.path.join("statistics/scsi_dev/indx");
        let text = tree.read(&attr).context("read", &attr)?;
        let no_number = |e| io::Error::new(io::ErrorKind::InvalidData, e);
        text.trim().parse().map_err(no_number).context("read", &attr)
    }

    /// Tells the kernel the new capacity in bytes. It tells the daemon; what the daemon made of it is in its state file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_capacity(&self, tree: &dyn Tree, bytes: u64) -> Result<(), ConfigfsError> {
        let attr = self.path.join("attrib/dev_size");
        tree.write(&attr, &bytes.to_string()).context("write", &attr)
    }

    /// Ends every command that waits in the ring: with CHECK CONDITION, for a removal that no daemon helps with, or with BUSY, so that initiators
    /// send it again, to wherever the LUN is then.
    ///
    /// # Errors
    /// The kernel's.
    pub fn end_commands(&self, tree: &dyn Tree, busy: bool) -> Result<(), ConfigfsError> {
        // 2 is an error, and 1 BUSY.
        let action = self.path.join("action/reset_ring");
        tree.write(&action, if busy { "1" } else { "2" }).context("write", &action)
    }

    /// Turns the write cache on or off. The kernel tells the daemon.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_write_cache(&self, tree: &dyn Tree, on: bool) -> Result<(), ConfigfsError> {
        let attr = self.path.join("attrib/emulate_write_cache");
        tree.write(&attr, if on { "1" } else { "0" }).context("write", &attr)
    }

    /// Removes the device, and its `user_N` if nothing else is in it. Nothing may be exported.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(&self, tree: &dyn Tree) -> Result<(), ConfigfsError> {
        // Also for a device that somebody else made: nobody waits for a daemon that may be gone.
        let answers = self.path.join("attrib/nl_reply_supported");
        tree.write(&answers, "-1").context("write", &answers)?;
        alua::remove_groups(tree, &self.path)?;
        tree.remove_dir(&self.path).context("remove", &self.path)?;
        if let Some(hba) = self.path.parent() {
            match tree.remove_dir(hba) {
                Err(e) if e.raw_os_error() != Some(libc::ENOTEMPTY) => return Err(e).context("remove", hba),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Gives a device that somebody else has made the time limits that `create` would have: with the kernel's half a minute, a restart of the daemon ends in
/// errors. What has been set by hand stays.
///
/// # Errors
/// The kernel's: it refuses while the device is exported.
pub fn give_patience(tree: &dyn Tree, hba: u32, name: &str) -> Result<(), ConfigfsError> {
    let attributes = path_of(hba, name).join("attrib");
    for (attr, unset) in [("cmd_time_out", "30"), ("qfull_time_out", "-1")] {
        let attr = attributes.join(attr);
        if tree.read(&attr).context("read", &attr)?.trim() == unset {
            tree.write(&attr, &COMMAND_TIMEOUT.to_string()).context("write", &attr)?;
        }
    }
    Ok(())
}

/// Has the kernel put task management (ABORT TASK, LUN RESET) into the device's ring: `tmr_notification`, which is off unless somebody turns
/// it on. A kernel before 5.9 has no such attribute, and tells of none.
///
/// # Errors
/// The kernel's.
pub fn hear_task_management(tree: &dyn Tree, hba: u32, name: &str) -> Result<(), ConfigfsError> {
    let attr = path_of(hba, name).join("attrib/tmr_notification");
    match tree.write(&attr, "1") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.context("write", &attr),
    }
}

/// Gives a device that is in use another `dev_config`. The kernel asks its handler first, and waits for the answer.
///
/// # Errors
/// The kernel's, and the handler's refusal.
pub fn set_config(tree: &dyn Tree, hba: u32, name: &str, dev_config: &str) -> Result<(), ConfigfsError> {
    let attr = path_of(hba, name).join("attrib/dev_config");
    tree.write(&attr, dev_config).context("write", &attr)
}

/// Makes a backstore and enables it; on failure nothing is left.
///
/// # Errors
/// The step that the kernel refused.
pub fn create(tree: &dyn Tree, spec: &Spec, undo: &mut Undo<'_>) -> Result<PathBuf, ConfigfsError> {
    let path = make_device(tree, spec, undo)?;
    let control = path.join("control");
    let blocks = (MAX_TRANSFER / spec.block_size.bytes()).to_string();
    for (key, value) in [
        ("dev_config", spec.dev_config.as_str()),
        ("dev_size", &spec.capacity.to_string()),
        ("hw_block_size", &spec.block_size.to_string()),
        ("hw_max_sectors", &blocks),
        ("nl_reply_supported", "-1"),
    ] {
        tree.write(&control, &format!("{key}={value}")).context("write", &control)?;
    }
    let ring = path.join("attrib/cmd_ring_size_mb");
    if tree.read(&ring).is_ok() {
        // Kernels before 5.19 have one size of ring, 8 MiB.
        tree.write(&control, &format!("cmd_ring_size_mb={RING_MB}")).context("write", &control)?;
    }
    let timeout = COMMAND_TIMEOUT.to_string();
    for (attr, value) in [
        ("attrib/cmd_time_out", timeout.as_str()),
        ("attrib/qfull_time_out", &timeout),
        ("attrib/emulate_write_cache", if spec.write_cache { "1" } else { "0" }),
        ("wwn/vpd_unit_serial", &spec.serial),
    ] {
        let attr = path.join(attr);
        tree.write(&attr, value).context("write", &attr)?;
    }
    enable(tree, &path.join("enable"))?;
    Ok(path)
}

/// Brings a device to life. The kernel gives its `uioN` the first number that nobody has, and counts one as free a moment before the device that had it
/// has left sysfs (`uio_unregister_device`): who comes in that moment is told EEXIST, nothing has happened, and it can be done again.
fn enable(tree: &dyn Tree, attr: &Path) -> Result<(), ConfigfsError> {
    for _ in 0..REMOVAL_LOOKS {
        match tree.write(attr, "1") {
            Err(e)
                if e.kind() == io::ErrorKind::AlreadyExists
                    && tree.read(attr).is_ok_and(|on| on.trim() != "1") =>
            {
                std::thread::sleep(REMOVAL_PAUSE);
            }
            done => return done.context("write", attr),
        }
    }
    tree.write(attr, "1").context("write", attr)
}

/// The device's directory in a `user_N` of its own. Who tidies up may take an empty one away between the two steps: then another is made.
fn make_device(tree: &dyn Tree, spec: &Spec, undo: &mut Undo<'_>) -> Result<PathBuf, ConfigfsError> {
    let mut tries = 1;
    loop {
        let path = make_hba(tree, undo)?.join(spec.name.as_str());
        match undo.make_dir(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < HBA_TRIES => {
                undo.forget_last();
                tries += 1;
            }
            made => return made.context("make", &path).map(|()| path),
        }
    }
}

/// The first `user_N` that nobody has.
fn make_hba(tree: &dyn Tree, undo: &mut Undo<'_>) -> Result<PathBuf, ConfigfsError> {
    let mut n = 0;
    loop {
        let path = Path::new(CORE).join(format!("user_{n}"));
        match if tree.is_dir(&path) { Err(io::ErrorKind::AlreadyExists.into()) } else { undo.make_dir(&path) }
        {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 65536 => n += 1,
            done => return done.context("make", &path).map(|()| path),
        }
    }
}
