//! LUNs that are half there, because whoever made or took them down was cut off.
//!
//! Before the first step a note of what is to be made stands in `/run/tcmu-dif/half/NAME.json`, and it goes after the last one. So whoever comes
//! next knows what may be left, by name: `delete` takes it down and says what it was, `create` does so before it begins. Images and
//! sidecars are never removed, whoever made them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Refusal,
    luns::{Places, refused},
};
use crate::{
    files,
    kernel::{
        backstore::Backstore,
        fabric::{Export, Fabric},
        leftover,
        names::{Name, Wwn},
    },
    lun::{
        bitmaps, handed_over, jobs, saved_pages, scrub,
        state_file::{StateFile, check_version},
        throttle,
    },
};

const VERSION: u32 = 1;

/// What somebody has begun to make or to take down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Half {
    version: u32,
    /// The disk's serial number.
    pub serial: String,
    /// Fabric and world wide name of each target.
    exports: Vec<(String, String)>,
}

impl Half {
    pub fn new<'a>(serial: &str, exports: impl Iterator<Item = (&'a str, &'a str)>) -> Half {
        let exports = exports.map(|(fabric, wwn)| (fabric.to_owned(), wwn.to_owned())).collect();
        Half { version: VERSION, serial: serial.to_owned(), exports }
    }

    fn path(places: &Places, name: &Name) -> PathBuf {
        places.run.path().join("half").join(format!("{name}.json"))
    }

    /// Notes it.
    ///
    /// # Errors
    /// The file system's.
    pub fn note(&self, places: &Places, name: &Name) -> Result<(), Refusal> {
        let path = Half::path(places, name);
        let noted = (|| {
            fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
            files::replace(&path, &serde_json::to_vec(self)?, false)
        })();
        noted.map_err(|e: io::Error| Refusal::from("note", path.display(), &e))
    }

    /// Notes it together with what was noted before, which is not done with.
    ///
    /// # Errors
    /// As [`Half::note`].
    pub fn note_with(mut self, before: Option<&Half>, places: &Places, name: &Name) -> Result<(), Refusal> {
        let more = before.iter().flat_map(|half| &half.exports).filter(|e| !self.exports.contains(e));
        let more: Vec<_> = more.cloned().collect();
        self.exports.extend(more);
        self.note(places, name)
    }

    /// What was noted, if anything was. What makes no sense is said, and is as good as nothing.
    pub fn noted(places: &Places, name: &Name) -> Option<Half> {
        let path = Half::path(places, name);
        let read = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
            read => read.and_then(|text| {
                check_version(&path, &text, VERSION)?;
                Ok(serde_json::from_slice(&text)?)
            }),
        };
        read.map_err(|e| {
            tracing::warn!("{}: {e}; what it names has to be taken down by hand", path.display())
        })
        .ok()
    }

    /// It is whole, or nothing of it is left.
    pub fn forget(places: &Places, name: &Name) {
        let path = Half::path(places, name);
        if let Err(e) = files::remove(&path) {
            tracing::warn!("{}: {e}", path.display());
        }
    }

    /// Whether a LUN is all that was to be made.
    pub fn is_whole(&self, there: &Backstore, exports: &[Export]) -> bool {
        let is_there = |(fabric, wwn): &(String, String)| {
            exports.iter().any(|e| e.fabric == *fabric && e.target == *wwn)
        };
        there.enabled && self.exports.iter().all(is_there)
    }
}

/// Takes down what is left of a LUN of that name beside a device that is known to be ours, and says what it was: paths in configfs,
/// files of its state.
///
/// # Errors
/// The kernel's.
pub(super) fn take_down(places: &Places, name: &Name, half: Option<&Half>) -> Result<Vec<String>, Refusal> {
    let tree = &places.tree;
    let failed = |e| refused("delete", name, &e);
    let mut gone = Vec::new();
    for store in leftover::unconfigured(tree, name.as_str()).map_err(failed)? {
        store.remove(tree).map_err(failed)?;
        gone.push(store.path.display().to_string());
    }
    // Those without a name of their own follow from the LUN's.
    let derived = [Fabric::Loopback, Fabric::Vhost].map(|f| (f, Wwn::derived(&[f.word(), name.as_str()])));
    let noted = half
        .iter()
        .flat_map(|half| &half.exports)
        .filter_map(|(fabric, wwn)| Some((Fabric::of(fabric)?, Wwn::new(wwn).ok()?)));
    for (fabric, wwn) in noted.chain(derived) {
        let target = leftover::remove_target(tree, fabric, &wwn).map_err(failed)?;
        gone.extend(target.map(|path| path.display().to_string()));
    }
    if half.is_some() || !gone.is_empty() {
        let hbas = leftover::remove_empty_hbas(tree).map_err(failed)?;
        gone.extend(hbas.iter().map(|path| path.display().to_string()));
    }
    if let Some(half) = half {
        gone.extend(forget_state(places, &half.serial));
        Half::forget(places, name);
    }
    Ok(gone)
}

/// A LUN that is made later with the same serial number begins with the defaults. Gives the files that were there.
pub(super) fn forget_state(places: &Places, serial: &str) -> Vec<String> {
    let mut gone = Vec::new();
    let folders =
        [saved_pages::FOLDER, scrub::FOLDER, throttle::FOLDER, bitmaps::FOLDER, handed_over::FOLDER];
    for folder in folders {
        let file = StateFile::new(&places.state_dir, folder, serial);
        let was_there = file.path().exists();
        match file.remove() {
            Ok(()) if was_there => gone.push(file.path().display().to_string()),
            Ok(()) => {}
            Err(e) => tracing::warn!("{} stays: {e}", file.path().display()),
        }
    }
    jobs::forget(&places.state_dir, serial);
    gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::Admin;

    fn admin(dir: &Path) -> Admin {
        let places = Places::at(&dir.join("configfs"), &dir.join("run"), &dir.join("lib"));
        for folder in ["run", "configfs/target/core", "configfs/target/vhost"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        Admin { places, protect: |_, _, _, _, _| Ok(()) }
    }

    #[test]
    fn what_a_create_that_was_cut_off_has_left_is_taken_down_by_its_name_and_told() {
        if !rustix::process::geteuid().is_root() {
            println!("only root may delete");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let admin = admin(dir.path());
        let name = Name::new("vm1").unwrap();
        assert!(admin.delete(&name, false).unwrap_err().reason.contains("no such LUN"));
        // A target of a name that was given, a user_N, and mode pages that were saved.
        let half =
            Half::new("serial-1", [("vhost", "naa.5001405aa1b2c3d4"), ("loopback", "naa.1")].into_iter());
        half.note(&admin.places, &name).unwrap();
        let target = dir.path().join("configfs/target/vhost/naa.5001405aa1b2c3d4");
        let hba = dir.path().join("configfs/target/core/user_3");
        fs::create_dir(&target).unwrap();
        fs::create_dir(&hba).unwrap();
        let pages = StateFile::new(&dir.path().join("lib"), saved_pages::FOLDER, "serial-1");
        pages.save(serde_json::json!({ "mode_pages": [1] }), false).unwrap();
        let gone = admin.delete(&name, false).unwrap();
        assert_eq!(
            gone.leftovers,
            [
                "target/vhost/naa.5001405aa1b2c3d4".to_owned(),
                "target/core/user_3".to_owned(),
                pages.path().display().to_string()
            ]
        );
        assert!(!target.exists() && !hba.exists() && !pages.path().exists());
        assert_eq!(Half::noted(&admin.places, &name), None);
        assert!(admin.delete(&name, false).unwrap_err().reason.contains("no such LUN"));
    }

    #[test]
    fn a_note_of_a_newer_version_or_without_sense_is_said_and_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let admin = admin(dir.path());
        let name = Name::new("vm1").unwrap();
        let half = Half::new("s", [("vhost", "naa.1")].into_iter());
        let before = Half::new("s", [("vhost", "naa.1"), ("vhost", "naa.2")].into_iter());
        half.note_with(Some(&before), &admin.places, &name).unwrap();
        assert_eq!(Half::noted(&admin.places, &name), Some(before));
        for wrong in [r#"{"version":2}"#, "{", r#"{"version":1}"#] {
            fs::write(Half::path(&admin.places, &name), wrong).unwrap();
            assert_eq!(Half::noted(&admin.places, &name), None, "{wrong}");
        }
    }
}
