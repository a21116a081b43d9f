//! LUNs whose ports are held while they are handed over, so that the kernel takes no more reservations for them: it carries those commands out itself, and does not
//! ask the LUN, which is stopped.
//!
//! What the ports were before stands in `/run/tcmu-dif/held/NAME.json` from before they are held until they have it again. A daemon that finds such a file was killed in
//! between, and gives it back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::rundir::RunDir;
use crate::{
    files,
    kernel::{
        alua::{self, Was},
        backstore::ConfigfsError,
        tree::Tree,
    },
    lun::state_file::check_version,
};

const VERSION: u32 = 1;

/// Ports that are held.
#[derive(Debug, Serialize, Deserialize)]
pub struct Held {
    version: u32,
    /// The backstore, relative to configfs.
    backstore: PathBuf,
    groups: Vec<Was>,
}

/// Why ports could not be held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] ConfigfsError),
    /// What they were could not be written down.
    #[error("{}: {source}", path.display())]
    Note {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn folder(run: &RunDir) -> PathBuf {
    run.path().join("held")
}

fn path(run: &RunDir, name: &str) -> PathBuf {
    folder(run).join(format!("{name}.json"))
}

impl Held {
    /// Holds the ports of the LUN of that name.
    ///
    /// # Errors
    /// Why not: they are as before then.
    pub fn hold(tree: &dyn Tree, run: &RunDir, name: &str, backstore: &Path) -> Result<Held, HoldError> {
        let groups = alua::as_they_are(tree, backstore)?;
        let held = Held { version: VERSION, backstore: backstore.to_owned(), groups };
        let note = (|| {
            fs::create_dir_all(folder(run))?;
            files::replace(&path(run, name), &serde_json::to_vec(&held)?, false)
        })();
        note.map_err(|source| HoldError::Note { path: path(run, name), source })?;
        if let Err(e) = alua::hold(tree, backstore, &held.groups) {
            held.release(tree, run, name);
            return Err(e.into());
        }
        Ok(held)
    }

    /// Gives them back what they had; what fails is said, and tried again by the next daemon.
    pub fn release(self, tree: &dyn Tree, run: &RunDir, name: &str) {
        match alua::release(tree, &self.backstore, &self.groups) {
            Ok(()) => Held::forget(run, name),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(
                    lun = name,
                    error,
                    "its target port groups are held still: restart the daemon"
                );
            }
        }
    }

    /// The LUN is gone.
    pub fn forget(run: &RunDir, name: &str) {
        let path = path(run, name);
        if let Err(e) = files::remove(&path) {
            tracing::warn!("{}: {e}", path.display());
        }
    }
}

/// Releases what a daemon that was killed has held.
pub fn release_all(tree: &dyn Tree, run: &RunDir) {
    let files = match fs::read_dir(folder(run)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return,
        Err(e) => return tracing::warn!("{}: {e}", folder(run).display()),
        Ok(files) => files,
    };
    for path in files.filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".json")) else { continue };
        let read = fs::read(&path).and_then(|text| {
            check_version(&path, &text, VERSION)?;
            Ok(serde_json::from_slice::<Held>(&text)?)
        });
        match read {
            Ok(held) => {
                tracing::warn!(
                    lun = name,
                    "its target port groups were held for a handover that was cut off"
                );
                held.release(tree, run, name);
            }
            Err(e) => tracing::warn!("{}: {e}; look at alua_access_state of its groups", path.display()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test may panic.
mod tests {
    use super::*;
    use crate::kernel::{
        backstore::{self, Spec},
        fake::Fake,
        names::Name,
        undo::Undo,
    };

    fn store(tree: &Fake) -> PathBuf {
        let spec = Spec {
            name: Name::new("vm1").unwrap(),
            dev_config: "dif//vm1.raw".into(),
            capacity: 1 << 20,
            block_size: crate::units::BlockSize::B512,
            serial: "s".into(),
            write_cache: true,
        };
        let mut undo = Undo::new(tree);
        let path = backstore::create(tree, &spec, &mut undo).unwrap();
        undo.keep();
        // A group that changes its state on SET TARGET PORT GROUPS only, one that is in standby, and one that is of no use yet.
        let group = |name: &str| {
            let path = path.join("alua").join(name);
            tree.make_dir(&path).unwrap();
            move |attr: &str, value: &str| tree.write(&path.join(attr), value).unwrap()
        };
        let explicit = group("explicit");
        explicit("tg_pt_gp_id", "1");
        explicit("alua_access_type", "2");
        let standby = group("standby");
        standby("tg_pt_gp_id", "2");
        standby("alua_access_state", "2");
        let _ = group("unused");
        path
    }

    #[test]
    fn ports_have_after_a_hold_what_they_had_before_whoever_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        let tree = Fake::new();
        let store = store(&tree);
        let before = tree.snapshot();
        let state =
            |group: &str| tree.read(&store.join("alua").join(group).join("alua_access_state")).unwrap();
        let held = Held::hold(&tree, &run, "vm1", &store).unwrap();
        for group in ["default_tg_pt_gp", "explicit", "standby"] {
            assert_eq!(state(group), "15", "{group}");
        }
        assert_eq!(state("unused"), "0");
        held.release(&tree, &run, "vm1");
        assert_eq!(tree.snapshot(), before);
        assert!(!path(&run, "vm1").exists());
        // The daemon is killed, and the next one begins.
        drop(Held::hold(&tree, &run, "vm1", &store).unwrap());
        release_all(&tree, &run);
        assert_eq!(tree.snapshot(), before);
        assert!(!path(&run, "vm1").exists());
        release_all(&tree, &run);
    }

    #[test]
    fn a_hold_that_fails_anywhere_holds_nothing_and_one_of_a_lun_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::at(dir.path());
        let tree = Fake::new();
        let store = store(&tree);
        let before = tree.snapshot();
        for step in 0..4 {
            // Once the hold has failed everything works again.
            tree.changes_left.set(Some(step));
            tree.fails_once.set(true);
            assert!(Held::hold(&tree, &run, "vm1", &store).is_err(), "step {step}");
            tree.changes_left.set(None);
            assert_eq!(tree.snapshot(), before, "step {step}");
        }
        drop(Held::hold(&tree, &run, "vm1", &store).unwrap());
        tree.nodes.borrow_mut().retain(|path, _| !path.starts_with(&store));
        release_all(&tree, &run);
        assert!(!path(&run, "vm1").exists());
    }
}
