//! Exports: a backstore behind a port of LIO's loopback or vhost fabric, one target each, at LUN 0.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    backstore::{Backstore, ConfigfsError, Context},
    names::Wwn,
    tree::Tree,
    undo::Undo,
};

/// The fabrics on which `create` makes exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fabric {
    /// tcm_loop: a SCSI disk on this host.
    Loopback,
    /// vhost-scsi: a disk for a guest of QEMU.
    Vhost,
}

impl Fabric {
    /// The directory in configfs, and the word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Fabric::Loopback => "loopback",
            Fabric::Vhost => "vhost",
        }
    }

    /// The fabric of that directory.
    pub fn of(word: &str) -> Option<Fabric> {
        [Fabric::Loopback, Fabric::Vhost].into_iter().find(|f| f.word() == word)
    }

    /// The kernel's module.
    pub fn module(self) -> &'static str {
        match self {
            Fabric::Loopback => "tcm_loop",
            Fabric::Vhost => "vhost_scsi",
        }
    }
}

/// Where a backstore is exported.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Export {
    /// The fabric's directory: `loopback`, `vhost`, or one that isn't ours to touch.
    pub fabric: String,
    /// The target's directory.
    pub target: String,
    /// The target portal group's directory, `tpgt_1` for those that we make.
    pub tpg: String,
    /// The LUN's directory, `lun_0` for those that we make.
    pub lun: String,
    /// The link in it.
    pub link: String,
}

impl Export {
    /// The target's directory, relative to configfs.
    pub fn target_path(&self) -> PathBuf {
        Path::new("target").join(&self.fabric).join(&self.target)
    }

    /// The portal group's directory.
    pub fn tpg_path(&self) -> PathBuf {
        self.target_path().join(&self.tpg)
    }

    /// The LUN's directory.
    pub fn lun_path(&self) -> PathBuf {
        self.tpg_path().join("lun").join(&self.lun)
    }

    /// The fabric, if it is one of ours.
    pub fn kind(&self) -> Option<Fabric> {
        Fabric::of(&self.fabric)
    }

    /// The LUN's number.
    pub fn lun_number(&self) -> Option<u64> {
        self.lun.strip_prefix("lun_")?.parse().ok()
    }
}

/// `user_N` and the name of a backstore.
pub type BackstoreKey = (u32, String);

/// Every export of every backstore of target_core_user, with the `user_N` and the name that its link points to.
///
/// # Errors
/// The kernel's.
pub fn all(tree: &dyn Tree) -> Result<Vec<(BackstoreKey, Export)>, ConfigfsError> {
    let root = Path::new("target");
    let mut out = Vec::new();
    let list = |path: &Path| tree.dirs(path).context("list", path);
    for fabric in list(root)?.into_iter().filter(|f| f != "core") {
        let in_fabric = root.join(&fabric);
        for target in list(&in_fabric)?.into_iter().filter(|t| t != "discovery_auth") {
            let in_target = in_fabric.join(&target);
            for tpg in list(&in_target)?.into_iter().filter(|t| t.starts_with("tpgt_")) {
                let luns = in_target.join(&tpg).join("lun");
                for lun in list(&luns)? {
                    let dir = luns.join(&lun);
                    for (link, to) in tree.links(&dir).context("list", &dir)? {
                        let Some(backstore) = backstore_of(&to) else { continue };
                        let export = Export {
                            fabric: fabric.clone(),
                            target: target.clone(),
                            tpg: tpg.clone(),
                            lun: lun.clone(),
                            link,
                        };
                        out.push((backstore, export));
                    }
                }
            }
        }
    }
    Ok(out)
}

/// `user_N` and the name at the end of a link's target.
fn backstore_of(to: &Path) -> Option<BackstoreKey> {
    let name = to.file_name()?.to_str()?;
    let hba = to.parent()?.file_name()?.to_str()?;
    Some((hba.strip_prefix("user_")?.parse().ok()?, name.to_owned()))
}

/// The exports of one backstore.
///
/// # Errors
/// The kernel's.
pub fn of(tree: &dyn Tree, backstore: &Backstore) -> Result<Vec<Export>, ConfigfsError> {
    let mine = |(hba, name): &BackstoreKey| *hba == backstore.hba && *name == backstore.name;
    Ok(all(tree)?.into_iter().filter(|(of, _)| mine(of)).map(|(_, export)| export).collect())
}

/// Exports the backstore at `path`.
///
/// # Errors
/// The step that the kernel refused; EEXIST for a target that is there.
pub fn create(
    tree: &dyn Tree,
    path: &Path,
    fabric: Fabric,
    wwn: &Wwn,
    undo: &mut Undo<'_>,
) -> Result<Export, ConfigfsError> {
    let link = path.file_name().and_then(|n| n.to_str()).unwrap_or("backstore").to_owned();
    let export = Export {
        fabric: fabric.word().to_owned(),
        target: wwn.as_str().to_owned(),
        tpg: "tpgt_1".to_owned(),
        lun: "lun_0".to_owned(),
        link,
    };
    let root = Path::new("target").join(fabric.word());
    match tree.make_dir(&root) {
        // The fabric's own directory is shared, and stays.
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).context("make", &root),
        _ => {}
    }
    let (target, tpg, lun) = (export.target_path(), export.tpg_path(), export.lun_path());
    undo.make_dir(&target).context("make", &target)?;
    undo.make_dir(&tpg).context("make", &tpg)?;
    let nexus = tpg.join("nexus");
    tree.write(&nexus, initiator(wwn).as_str()).context("write", &nexus)?;
    undo.make_dir(&lun).context("make", &lun)?;
    let at = lun.join(&export.link);
    undo.link(path, &at).context("link", &at)?;
    Ok(export)
}

/// The initiator's port of the nexus of a target that was made here: a name of its own, which nobody else sees.
pub fn initiator(wwn: &Wwn) -> Wwn {
    Wwn::derived(&["initiator", wwn.as_str()])
}

/// How far an export was taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// Wholly, or as far as it was nobody else's.
    Whole,
    /// The LUN is gone; a guest is still connected to the target, which stays until it goes.
    TargetInUse,
}

/// Takes an export down: the LUN, and the portal group and the target if nothing else is in them.
///
/// # Errors
/// The step that the kernel refused.
pub fn remove(tree: &dyn Tree, export: &Export) -> Result<Removed, ConfigfsError> {
    let lun = export.lun_path();
    let link = lun.join(&export.link);
    tree.unlink(&link).context("unlink", &link)?;
    tree.remove_dir(&lun).context("remove", &lun)?;
    let tpg = export.tpg_path();
    let luns = tpg.join("lun");
    if !tree.dirs(&luns).context("list", &luns)?.is_empty() {
        return Ok(Removed::Whole);
    }
    match tree.remove_dir(&tpg) {
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => return Ok(Removed::TargetInUse),
        done => done.context("remove", &tpg)?,
    }
    let target = export.target_path();
    let others = tree.dirs(&target).context("list", &target)?;
    if others.iter().any(|d| d.starts_with("tpgt_")) {
        return Ok(Removed::Whole);
    }
    tree.remove_dir(&target).context("remove", &target)?;
    Ok(Removed::Whole)
}

/// The disk that a loopback export is on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// `host:channel:id:lun`.
    pub address: String,
    /// `sdX`, if the disk driver has taken it.
    pub block: Option<String>,
    /// `sgN`, if the driver sg is loaded.
    pub sg: Option<String>,
}

/// The SCSI address of a loopback export: the port says host, channel and id.
///
/// # Errors
/// The kernel's.
pub fn scsi_address(tree: &dyn Tree, export: &Export) -> Result<String, ConfigfsError> {
    let attr = export.tpg_path().join("address");
    let port = tree.read(&attr).context("read", &attr)?;
    Ok(format!("{}:{}", port.trim(), export.lun_number().unwrap_or(0)))
}

/// Looks a disk up in sysfs (`sysfs` is /sys, or a test's).
pub fn disk(sysfs: &Path, address: &str) -> Disk {
    let device = sysfs.join("class/scsi_device").join(address).join("device");
    let first = |class: &str| {
        let mut names: Vec<_> = fs::read_dir(device.join(class))
            .ok()?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        names.into_iter().next()
    };
    Disk { address: address.to_owned(), block: first("block"), sg: first("scsi_generic") }
}

/// Waits until the disk has come up: the disk driver looks at it after the link is made. `want_sg` if sg is loaded; no
/// longer than `still_there` says that it may come.
/// `None` if the disk isn't there in time.
pub fn wait_for_disk(
    sysfs: &Path,
    address: &str,
    want_sg: bool,
    patience: Duration,
    still_there: impl Fn() -> bool,
) -> Option<Disk> {
    let end = Instant::now() + patience;
    loop {
        let found = disk(sysfs, address);
        if found.block.is_some() && (found.sg.is_some() || !want_sg) {
            return Some(found);
        }
        if Instant::now() >= end || !still_there() {
            return found.block.is_some().then_some(found);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Lets the disk driver wait longer for an answer than the kernel's target does, so that a pause is a pause.
///
/// # Errors
/// sysfs' own.
pub fn set_disk_timeout(sysfs: &Path, address: &str, seconds: u32) -> io::Result<()> {
    fs::write(sysfs.join("class/scsi_device").join(address).join("device/timeout"), seconds.to_string())
}

/// Has the disk driver ask the disk for its capacity.
///
/// # Errors
/// sysfs' own.
pub fn rescan_disk(sysfs: &Path, address: &str) -> io::Result<()> {
    fs::write(sysfs.join("class/scsi_device").join(address).join("device/rescan"), "1")
}

/// Has the disk driver fail everything at once, for a disk that nobody serves and that is to go.
///
/// # Errors
/// sysfs' own.
pub fn set_disk_offline(sysfs: &Path, address: &str) -> io::Result<()> {
    // The kernel compares up to the newline.
    fs::write(sysfs.join("class/scsi_device").join(address).join("device/state"), "offline\n")
}
