//! Another capacity for a LUN that is in use: the kernel is told, it tells the daemon, and what the LUN made of it is waited for.
//!
//! One path for `tcmu-dif resize` and for QMP's `block_resize`. Called from a thread that may wait, never from the daemon's loop.

use std::{io, path::Path, time::Duration};

use thiserror::Error;

use super::rundir::{LastChange, RunDir};
use crate::{
    kernel::{
        backstore::{Backstore, ConfigfsError},
        fabric::{self, Fabric},
        tree::Tree,
    },
    lun::state_file::now_ms,
};

/// How long the LUN may take: an image that shrinks frees what it had.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a LUN has its old size still.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// No whole number of blocks.
    #[error("not a multiple of the block size of {block_size} bytes")]
    NotMultiple {
        /// Bytes of a block.
        block_size: u64,
        /// The next larger size that is.
        up: u64,
    },
    /// The kernel.
    #[error("the kernel refused")]
    Kernel(#[from] ConfigfsError),
    /// The LUN's state file.
    #[error("the LUN's state cannot be read")]
    State(#[from] io::Error),
    /// The LUN said so.
    #[error("{0}")]
    Refused(String),
    /// Nobody has said anything.
    #[error("the daemon hasn't done it")]
    Silent,
}

/// Whether a LUN can have that many bytes, as far as its blocks go.
///
/// # Errors
/// [`ResizeError::NotMultiple`].
pub fn check(store: &Backstore, bytes: u64) -> Result<(), ResizeError> {
    let block_size = store.block_size.max(1);
    if bytes == 0 || !bytes.is_multiple_of(block_size) {
        let up = bytes.max(1).next_multiple_of(block_size);
        return Err(ResizeError::NotMultiple { block_size, up });
    }
    Ok(())
}

/// Resizes; gives back once initiators have the new capacity.
///
/// # Errors
/// Why not. The kernel then has the old capacity again.
pub fn resize(
    tree: &dyn Tree,
    sysfs: &Path,
    run: &RunDir,
    store: &Backstore,
    bytes: u64,
) -> Result<(), ResizeError> {
    check(store, bytes)?;
    if store.capacity == bytes {
        return Ok(());
    }
    let before = now_ms();
    store.set_capacity(tree, bytes)?;
    let mine = |c: &LastChange| c.what == "capacity" && c.value == bytes;
    let state = run.wait(&store.name, PATIENCE, |s| {
        s.written_ms >= before && s.last_change.as_ref().is_some_and(mine)
    })?;
    let change = state.filter(|s| s.written_ms >= before).and_then(|s| s.last_change).filter(mine);
    let failed = match change {
        Some(LastChange { error: None, .. }) => {
            look_again(tree, sysfs, store);
            return Ok(());
        }
        Some(LastChange { error: Some(reason), .. }) => ResizeError::Refused(reason),
        None => ResizeError::Silent,
    };
    // The kernel's number goes back to what the LUN still has.
    if let Err(e) = store.set_capacity(tree, store.capacity) {
        tracing::warn!("the old size could not be put back: {e}");
    }
    Err(failed)
}

/// Has this host's own disks ask for their capacity: Linux hears of it with the next command's unit attention, and then
/// only logs it.
fn look_again(tree: &dyn Tree, sysfs: &Path, store: &Backstore) {
    let exports = fabric::of(tree, store).unwrap_or_default();
    for export in exports.iter().filter(|e| e.kind() == Some(Fabric::Loopback)) {
        let rescanned = fabric::scsi_address(tree, export)
            .map_err(|e| e.source)
            .and_then(|address| fabric::rescan_disk(sysfs, &address));
        if let Err(e) = rescanned {
            tracing::warn!("the disk of {} still has its old size: {e}", export.target);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf, thread};

    use super::*;
    use crate::{
        daemon::rundir::{LunState, Phase},
        kernel::{backstore::path_of, tree::Real},
    };

    struct World {
        dir: tempfile::TempDir,
        run: RunDir,
        store: Backstore,
    }

    impl World {
        /// A device of 1 MiB, in files that stand for configfs.
        fn new() -> World {
            let dir = tempfile::tempdir().unwrap();
            let run = RunDir::at(dir.path().join("run"));
            fs::create_dir_all(run.path().join("luns")).unwrap();
            let path = path_of(0, "vm1");
            fs::create_dir_all(dir.path().join(&path).join("attrib")).unwrap();
            let store = Backstore {
                path,
                hba: 0,
                name: "vm1".into(),
                dev_config: "dif//vm1.raw".into(),
                capacity: 1 << 20,
                block_size: 512,
                serial: String::new(),
                write_cache: true,
                enabled: true,
                wants_answers: false,
            };
            let world = World { dir, run, store };
            fs::write(world.dev_size(), "1048576").unwrap();
            world
        }

        fn dev_size(&self) -> PathBuf {
            self.dir.path().join(&self.store.path).join("attrib/dev_size")
        }

        fn kernels(&self) -> String {
            fs::read_to_string(self.dev_size()).unwrap()
        }

        /// Resizes, with a LUN that hears of it from the kernel and makes of it what is given.
        fn resize(&self, bytes: u64, error: Option<&str>) -> Result<(), ResizeError> {
            let (run, at, error) = (self.run.clone(), self.dev_size(), error.map(str::to_owned));
            let lun = thread::spawn(move || {
                while fs::read_to_string(&at).unwrap() != bytes.to_string() {
                    thread::sleep(Duration::from_millis(1));
                }
                run.write(&LunState {
                    name: "vm1".into(),
                    state: Phase::Online,
                    reason: None,
                    next: None,
                    image: "/vm1.raw".into(),
                    format: None,
                    pi: "off".into(),
                    block_size: 512,
                    capacity_bytes: bytes,
                    io: None,
                    counters: serde_json::Value::Null,
                    last_change: Some(LastChange { what: "capacity".into(), value: bytes, error }),
                    hba: 0,
                    minor: 0,
                    written_ms: now_ms(),
                })
                .unwrap();
            });
            let tree = Real::at(self.dir.path());
            let done = resize(&tree, Path::new("/none"), &self.run, &self.store, bytes);
            lun.join().unwrap();
            done
        }
    }

    #[test]
    fn a_size_that_the_lun_took_is_the_kernels_too() {
        let world = World::new();
        world.resize(2 << 20, None).unwrap();
        assert_eq!(world.kernels(), "2097152");
    }

    #[test]
    fn a_size_that_the_lun_refused_is_taken_back_from_the_kernel() {
        let world = World::new();
        let refused = world.resize(4 << 20, Some("no space left")).unwrap_err();
        assert_eq!(refused.to_string(), "no space left");
        assert_eq!(world.kernels(), "1048576");
    }

    #[test]
    fn a_size_that_is_no_whole_number_of_blocks_never_reaches_the_kernel() {
        let world = World::new();
        let tree = Real::at(world.dir.path());
        for (bytes, next) in [(0, 512), (513, 1024)] {
            match resize(&tree, Path::new("/none"), &world.run, &world.store, bytes) {
                Err(ResizeError::NotMultiple { block_size: 512, up }) => assert_eq!(up, next),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(world.kernels(), "1048576");
    }
}
