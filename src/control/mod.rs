//! How a running daemon is asked: QMP, QEMU's protocol for machines (qemu's `docs/interop/qmp-spec.rst`), over a Unix socket.
//!
//! [`server`] listens for the daemon, [`client`] asks for the command line, [`commands`] is what can be asked, [`qmp`] are the
//! words of the protocol, [`events`] is what is told unasked, [`access`] says who may ask. [`metrics`] are what is counted, over HTTP, [`trace`] are
//! commands as they pass.
//! The LUNs that can be asked stand in a [`Registry`], which the daemon keeps. Nothing here is on
//! the data path: a question goes to the LUN's thread as a message.

mod access;
pub mod client;
mod commands;
mod door;
pub mod events;
pub mod metrics;
mod migrations;
pub mod qmp;
mod schema;
pub mod server;
pub mod trace;
mod types;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde_json::{Map, Value, json};

use crate::{export::Exports, lun::Remote};
use events::Bus;
use migrations::Migrations;

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

/// What the daemon does for those who ask: what a LUN cannot do by itself.
pub trait Host: Send + Sync {
    /// Has the kernel and the LUN take another capacity, in bytes.
    ///
    /// # Errors
    /// Why it has the old one still.
    fn resize(&self, device: &str, bytes: u64) -> Result<(), qmp::Error>;
    /// Makes a LUN of that name from an order's words (those of `tcmu-dif create`), and tells what it is.
    ///
    /// # Errors
    /// Why there is none.
    fn add(&self, device: &str, words: Map<String, Value>) -> Result<Value, qmp::Error>;
    /// Takes a LUN down, with `force` even while it is in use, and tells what is left of it.
    ///
    /// # Errors
    /// Why it is there still.
    fn del(&self, device: &str, force: bool) -> Result<Value, qmp::Error>;
    /// Hands a LUN over to another host's daemon, and tells what came of it.
    ///
    /// # Errors
    /// Why it is here still.
    fn hand_over(
        &self,
        luns: &Registry,
        device: &str,
        to: &To<'_>,
        progress: &dyn Progress,
    ) -> Result<Value, qmp::Error> {
        let _ = (luns, to, progress);
        Err(qmp::Error::generic(format!("there is no daemon here that could hand LUN '{device}' over")))
    }
    /// Listens for a source, whose LUN comes so.
    ///
    /// # Errors
    /// Why nobody listens.
    fn listen(&self, from: &To<'_>, comes: &Comes<'_>) -> Result<Box<dyn Incoming>, qmp::Error> {
        let _ = comes;
        Err(qmp::Error::generic(format!(
            "there is no daemon here that could have a LUN come over {}",
            from.uri
        )))
    }
    /// Begins to end the daemon, as SIGTERM does.
    fn quit(&self);
}

/// Who hears how far a LUN is that is handed over, and says when it may be stopped.
pub trait Progress: Sync {
    /// Both sides have looked at it, and it goes: it stops, or begins to be copied.
    fn goes(&self);
    /// Whether the LUN may be stopped, now that its copy has caught up. Asked again and again until it is true; the LUN serves meanwhile, and its copy has all
    /// that it has.
    fn may_switch_over(&self) -> bool {
        true
    }
}

/// One who listens for a source, until it is dropped.
pub trait Incoming: Send {
    /// Waits for one, and takes its LUN; false if it was told to stop before one had come. `comes` is called with the LUN's name when this side has
    /// looked at it, and says whether it is wanted still.
    ///
    /// # Errors
    /// Why it is not here.
    fn take(&mut self, stop: &AtomicBool, comes: &dyn Fn(&str) -> bool) -> Result<bool, qmp::Error>;
}

/// Where a LUN goes to, as a client says it.
#[derive(Debug, Clone, Copy)]
pub struct To<'a> {
    /// Where the other side listens.
    pub uri: &'a str,
    /// The directory of certificates, with TLS.
    pub certificates: Option<&'a str>,
    /// The name that the other side's certificate has, if it is another than the host's.
    pub hostname: Option<&'a str>,
    /// Its storage goes along.
    pub blk: bool,
    /// It is not stopped before somebody says so.
    pub pause_before_switchover: bool,
}

/// How a LUN comes, as a client says it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Comes<'a> {
    /// Under another name.
    pub device: Option<&'a str>,
    /// Where its image is made, if it comes with its storage.
    pub image: Option<&'a str>,
    /// The new image's format, if it is to be another than there.
    pub format: Option<&'a str>,
}

/// One who can take a LUN out of service for a while: its commands wait.
pub trait Pausing: Send + Sync {
    /// Stops the LUN, and closes its image.
    ///
    /// # Errors
    /// Why it serves still; or, if it could not be stopped in order, that it has been started again.
    fn pause(&self) -> Result<(), String>;
    /// Starts it again.
    ///
    /// # Errors
    /// Why it does not serve.
    fn resume(&self) -> Result<(), String>;
}

/// Why the daemon stops, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownCause {
    /// The command `quit`.
    Quit,
    /// A signal.
    Signal,
}

#[derive(Default)]
struct Inner {
    luns: Mutex<BTreeMap<String, Remote>>,
    bus: Bus,
    host: OnceLock<Box<dyn Host>>,
    shut_down: AtomicBool,
    /// How often a LUN was started again, by its name.
    restarts: Mutex<BTreeMap<String, u64>>,
    /// Clients of the QMP socket.
    clients: Arc<AtomicUsize>,
    /// LUNs that are exported over NBD.
    exports: Exports,
    /// LUNs that go and come.
    migrations: Migrations,
    /// Who can take LUNs out of service, by their names.
    pausing: Mutex<BTreeMap<String, Arc<dyn Pausing>>>,
}

/// The LUNs that serve, by name; what happens to them; and the daemon, if there is one.
#[derive(Clone, Default)]
pub struct Registry(Arc<Inner>);

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registry").field(&self.luns().keys()).finish()
    }
}

impl Registry {
    /// LUNs that this daemon has.
    pub fn with_host(host: impl Host + 'static) -> Registry {
        let registry = Registry::default();
        // It has none yet.
        let _ = registry.0.host.set(Box::new(host));
        registry
    }

    fn host(&self) -> Option<&dyn Host> {
        self.0.host.get().map(|host| &**host)
    }

    fn bus(&self) -> &Bus {
        &self.0.bus
    }

    /// The daemon begins to stop. Told once, whatever else says so.
    pub fn shut_down(&self, cause: ShutdownCause) {
        if !self.0.shut_down.swap(true, Ordering::AcqRel) {
            let reason = match cause {
                ShutdownCause::Quit => "host-qmp-quit",
                ShutdownCause::Signal => "host-signal",
            };
            self.bus().publish("SHUTDOWN", json!({ "guest": false, "reason": reason }));
        }
    }

    fn luns(&self) -> MutexGuard<'_, BTreeMap<String, Remote>> {
        self.0.luns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A LUN has come, or has come again. What happens to it is told from now on.
    pub fn insert(&self, name: &str, lun: Remote) {
        self.luns().insert(name.to_owned(), lun.clone());
        self.bus().publish("LUN_ADDED", json!({ "device": name }));
        lun.watch(self.bus().watcher(name));
    }

    /// A LUN has gone: this one, not one that has come under its name since.
    pub fn remove(&self, name: &str, lun: &Remote) {
        let mut luns = self.luns();
        if luns.get(name).is_some_and(|there| there.is_same(lun)) {
            luns.remove(name);
            drop(luns);
            self.exports_gone(self.0.exports.lun_gone(lun));
            self.bus().publish("LUN_REMOVED", json!({ "device": name }));
        }
    }

    /// LUNs that are exported over NBD.
    pub fn exports(&self) -> &Exports {
        &self.0.exports
    }

    /// Tells that these exports are no more.
    fn exports_gone(&self, ids: Vec<String>) {
        ids.into_iter().for_each(|id| self.bus().publish("BLOCK_EXPORT_DELETED", json!({ "id": id })));
    }

    fn counted(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.0.restarts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A LUN is started again because its thread has died.
    pub fn restarted(&self, name: &str) {
        *self.counted().entry(name.to_owned()).or_default() += 1;
    }

    /// A device is gone: another that comes under its name is another.
    pub fn forget(&self, name: &str) {
        self.counted().remove(name);
    }

    fn paused_by(&self) -> MutexGuard<'_, BTreeMap<String, Arc<dyn Pausing>>> {
        self.0.pausing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That one can take the LUN of that name out of service.
    pub fn is_paused_by(&self, name: &str, by: Arc<dyn Pausing>) {
        self.paused_by().insert(name.to_owned(), by);
    }

    /// Nobody can any more.
    pub fn is_paused_by_nobody(&self, name: &str) {
        self.paused_by().remove(name);
    }

    /// Who can take that LUN out of service.
    pub fn pausing(&self, name: &str) -> Option<Arc<dyn Pausing>> {
        self.paused_by().get(name).cloned()
    }

    fn restarts(&self, name: &str) -> u64 {
        self.counted().get(name).copied().unwrap_or(0)
    }

    fn clients(&self) -> usize {
        self.0.clients.load(Ordering::Acquire)
    }

    /// The LUN of that name.
    pub fn find(&self, name: &str) -> Option<Remote> {
        self.luns().get(name).cloned()
    }

    /// All of them, to be asked one after the other: those that hang are waited for at the same time.
    pub fn all_knocked(&self) -> Vec<(String, Remote)> {
        let all = self.all();
        all.iter().for_each(|(_, lun)| lun.knock());
        all
    }

    /// All of them.
    pub fn all(&self) -> Vec<(String, Remote)> {
        self.luns().iter().map(|(name, lun)| (name.clone(), lun.clone())).collect()
    }
}

/// The tables of commands and events, for `docs/qmp.md`.
pub fn documentation() -> String {
    commands::documentation()
}

/// An object without those members that are null: QMP leaves out what there is none of.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect()
        }
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}
