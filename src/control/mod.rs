//! How a running daemon is asked: QMP, QEMU's protocol for machines (qemu's `docs/interop/qmp-spec.rst`), over a Unix socket.
//!
//! [`server`] listens for the daemon, [`client`] asks for the command line, [`commands`] is what can be asked, [`qmp`] are the
//! words of the protocol. The LUNs that can be asked stand in a [`Registry`], which the daemon keeps. Nothing here is on
//! the data path: a question goes to the LUN's thread as a message.

pub mod client;
mod commands;
pub mod qmp;
pub mod server;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::lun::Remote;

/// The socket's name in the run directory.
pub const SOCKET: &str = "qmp.sock";

/// The one job that a LUN can have for now, by its name.
pub fn job_id(device: &str) -> String {
    format!("{JOB}{device}")
}

/// The LUN whose job that is, if it is one's.
fn job_device(id: &str) -> Option<&str> {
    id.strip_prefix(JOB)
}

const JOB: &str = "scrub-";

/// The LUNs that serve, by name.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Mutex<BTreeMap<String, Remote>>>);

impl Registry {
    fn luns(&self) -> MutexGuard<'_, BTreeMap<String, Remote>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A LUN has come, or has come again.
    pub fn insert(&self, name: &str, lun: Remote) {
        self.luns().insert(name.to_owned(), lun);
    }

    /// A LUN has gone: this one, not one that has come under its name since.
    pub fn remove(&self, name: &str, lun: &Remote) {
        let mut luns = self.luns();
        if luns.get(name).is_some_and(|there| there.is_same(lun)) {
            luns.remove(name);
        }
    }

    /// The LUN of that name.
    pub fn find(&self, name: &str) -> Option<Remote> {
        self.luns().get(name).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<(String, Remote)> {
        self.luns().iter().map(|(name, lun)| (name.clone(), lun.clone())).collect()
    }
}
