//! What those who ask over QMP want of the daemon itself: the kernel's part of a resize, and its end.

use std::path::{Path, PathBuf};

use rustix::process::{Signal, getpid, kill_process};

use super::{
    resize::{ResizeError, resize},
    rundir::RunDir,
};
use crate::{
    control::{
        Host,
        qmp::{Class, Error},
    },
    kernel::{backstore, tree::Real},
    lun::{chain, config::SUBTYPE},
};

/// sysfs, as it is.
const SYSFS: &str = "/sys";

/// The daemon, for QMP.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Where configfs is mounted.
    pub configfs: PathBuf,
    /// Where the LUNs' state files are.
    pub run: RunDir,
}

impl Host for Admin {
    fn resize(&self, device: &str, bytes: u64) -> Result<(), Error> {
        let tree = Real::at(&self.configfs);
        let found = backstore::find(&tree, SUBTYPE, device).map_err(|e| Error::generic(chain(&e)))?;
        let store = found.ok_or_else(|| {
            Error::new(
                Class::DeviceNotFound,
                format!("LUN '{device}' is not in configfs: it is being removed"),
            )
        })?;
        resize(&tree, Path::new(SYSFS), &self.run, &store, bytes).map_err(|e| {
            let next = match &e {
                ResizeError::NotMultiple { up, .. } => format!("choose {up}"),
                ResizeError::Kernel(_) => "look at the kernel's messages: dmesg".to_owned(),
                _ => "look at the daemon's log".to_owned(),
            };
            Error::generic(format!("LUN '{device}' cannot have {bytes} bytes: {}: {next}", chain(&e)))
        })
    }

    fn quit(&self) {
        // The signal itself, so that there is one way to end.
        if let Err(e) = kill_process(getpid(), Signal::TERM) {
            tracing::error!("quit: {e}");
        }
    }
}
