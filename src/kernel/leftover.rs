//! What is left of a LUN whose making or taking down was cut off, at whatever step: devices that nobody has configured, targets that
//! export nothing, a `user_N` without a device. Called by `create` and `delete`, for a name on which nobody else is at work.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    backstore::{self, Backstore, CORE, ConfigfsError, Context},
    fabric::Fabric,
    names::Wwn,
    tree::Tree,
};

/// Devices of that name that were made and not configured: whose they are to be is not known to anybody but who made them.
///
/// # Errors
/// The kernel's.
pub fn unconfigured(tree: &dyn Tree, name: &str) -> Result<Vec<Backstore>, ConfigfsError> {
    let named = backstore::named(tree, name)?.into_iter();
    Ok(named.filter(|b| b.dev_config.trim().is_empty() && !b.enabled).collect())
}

/// Takes down a target that exports nothing and has no other portal groups and LUNs than `create` makes. Gives its path if it was there,
/// and nothing for one that is not, or that is somebody's.
///
/// # Errors
/// The kernel's; EBUSY if a guest is connected.
pub fn remove_target(tree: &dyn Tree, fabric: Fabric, wwn: &Wwn) -> Result<Option<PathBuf>, ConfigfsError> {
    let target = Path::new("target").join(fabric.word()).join(wwn.as_str());
    let list = |path: &Path| tree.dirs(path).context("list", path);
    if !tree.is_dir(&target) {
        return Ok(None);
    }
    let tpgs = list(&target)?.into_iter().filter(|d| d.starts_with("tpgt_")).collect::<Vec<_>>();
    let mut objects = Vec::new();
    for tpg in &tpgs {
        let luns = target.join(tpg).join("lun");
        for lun in list(&luns)? {
            let lun_path = luns.join(&lun);
            if lun != "lun_0" || !tree.links(&lun_path).context("list", &lun_path)?.is_empty() {
                return Ok(None);
            }
            objects.push(lun_path);
        }
        objects.push(target.join(tpg));
    }
    if tpgs.iter().any(|tpg| tpg != "tpgt_1") {
        return Ok(None);
    }
    objects.push(target.clone());
    for object in objects {
        tree.remove_dir(&object).context("remove", &object)?;
    }
    Ok(Some(target))
}

/// Takes down each `user_N` that holds no device, and gives their paths. One in which another makes his device at this moment stays.
///
/// # Errors
/// The kernel's.
pub fn remove_empty_hbas(tree: &dyn Tree) -> Result<Vec<PathBuf>, ConfigfsError> {
    let core = Path::new(CORE);
    let mut removed = Vec::new();
    for hba in tree.dirs(core).context("list", core)?.iter().filter(|d| d.starts_with("user_")) {
        let path = core.join(hba);
        if !tree.dirs(&path).context("list", &path)?.is_empty() {
            continue;
        }
        match tree.remove_dir(&path) {
            Ok(()) => removed.push(path),
            Err(e) if e.raw_os_error() == Some(libc::ENOTEMPTY) || e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).context("remove", &path),
        }
    }
    Ok(removed)
}
