//! A LUN and its exports taken down; refused while somebody uses them.

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use serde::Serialize;

use super::{
    Admin, Refusal,
    half::{self, Half},
    luns::{self, Places, refused},
    require_root,
};
use crate::{
    daemon::rundir::Phase,
    kernel::{
        SYSFS,
        backstore::{self, Backstore},
        fabric::{self, Export, Fabric, Removed},
        names::Name,
        usage::{self, User},
    },
    lun::{chain, serial_of},
};

/// A LUN that is gone.
#[derive(Debug, Serialize)]
pub struct Deleted {
    /// Its name.
    pub name: String,
    /// It is.
    pub deleted: bool,
    /// Targets that stay until their guest goes.
    pub left: Vec<String>,
    /// What was left of it by a create or delete that was cut off, and is gone too: paths in configfs, files.
    pub leftovers: Vec<String>,
}

impl Admin {
    /// Takes the LUN down, also half of one; its image stays. With `force` even while it is in use.
    ///
    /// # Errors
    /// If there is none, if somebody uses it, and the kernel's.
    pub fn delete(&self, name: &Name, force: bool) -> Result<Deleted, Refusal> {
        let _turn = self.places.turn("delete", name)?;
        self.delete_in_turn(name, force)
    }

    /// The same, for who has the turn on that name.
    ///
    /// # Errors
    /// As [`Admin::delete`].
    pub(super) fn delete_in_turn(&self, name: &Name, force: bool) -> Result<Deleted, Refusal> {
        self.take_down(name, if force { How::Forced } else { How::Unused })
    }

    /// Takes down a LUN that serves on another host now: nobody here answers its commands any more, and its initiators are to send them again.
    ///
    /// # Errors
    /// As [`Admin::delete`].
    pub(super) fn delete_handed_over(&self, name: &Name) -> Result<Deleted, Refusal> {
        let _turn = self.places.turn("delete", name)?;
        self.take_down(name, How::HandedOver)
    }

    fn take_down(&self, name: &Name, how: How) -> Result<Deleted, Refusal> {
        let force = how != How::Unused;
        let places = &self.places;
        let half = Half::noted(places, name);
        let Some(store) = places.find("delete", name)? else {
            return self.delete_leftovers(name, half.as_ref());
        };
        let exports = fabric::of(&places.tree, &store).map_err(|e| refused("delete", name, &e))?;
        if let Some(foreign) = exports.iter().find_map(usage::of_foreign) {
            return Err(Refusal::new("delete", name, foreign.to_string())
                .then("take that export down first, with the tool that made it: targetcli"));
        }
        require_root("delete")?;
        let users: io::Result<Vec<Vec<User>>> = exports.iter().map(|e| users_of(places, e)).collect();
        let users = match users {
            Ok(users) => users.concat(),
            Err(_) if force => Vec::new(),
            Err(e) => {
                return Err(Refusal::new("delete", name, format!("whether it is in use is not known: {e}"))
                    .then(format!("make sure that nobody uses it, and: tcmu-dif delete --force {name}")));
            }
        };
        if !force && !users.is_empty() {
            let users = users.iter().map(User::to_string).collect::<Vec<_>>().join("; ");
            return Err(Refusal::new("delete", name, users).then(format!(
                "let go of it first, or take it away from its users: tcmu-dif delete --force {name}"
            )));
        }
        let alive = places.run.daemon().map_err(|e| Refusal::from("delete", name, &e))?.is_some();
        if !alive && !exports.is_empty() && !force {
            // The disk driver would wait for an answer to SYNCHRONIZE CACHE that nobody gives.
            let reason = "the daemon isn't running, and the disk's cache can't be flushed";
            return Err(Refusal::new("delete", name, reason).then(format!(
                "start it: tcmu-dif daemon; or give up what isn't flushed: tcmu-dif delete --force {name}"
            )));
        }
        // What is begun here can be ended by the next who comes.
        let serial =
            luns::config_of(&store).map(|config| serial_of(Some(&store.serial), &config, &store.name));
        let serial = serial.unwrap_or_else(|| store.serial.clone());
        let now = exports.iter().map(|e| (e.fabric.as_str(), e.target.as_str()));
        Half::new(&serial, now).note_with(half.as_ref(), places, name)?;
        let handed_over = how == How::HandedOver;
        // A guest that goes along sends again there what was BUSY here. This host's own disk driver stays, and would send its SYNCHRONIZE CACHE
        // again and again.
        let busy = handed_over && !exports.iter().any(|e| e.kind() == Some(Fabric::Loopback));
        // Nobody answers a LUN that has failed either, of which the daemon keeps nothing but why.
        let state = if force { places.state("delete", name.as_str()).unwrap_or_default() } else { None };
        let failed = state.is_some_and(|state| state.state == Phase::Failed);
        let unanswered = !alive || handed_over || failed;
        let _failing = unanswered.then(|| Failing::start(places, &store, &exports, busy));
        let mut left = Vec::new();
        for export in &exports {
            match fabric::remove(&places.tree, export).map_err(|e| refused("delete", name, &e))? {
                Removed::Whole => {}
                Removed::TargetInUse => left.push(export.target.clone()),
            }
        }
        store.remove(&places.tree).map_err(|e| refused("delete", name, &e))?;
        // Until the daemon has let go of the image, nobody else can have it.
        if alive && let Err(e) = luns::wait_until_closed(places, name.as_str(), Some(store.hba)) {
            tracing::warn!("{name}: {e}");
        }
        // A LUN that was handed over to another of this host has left what is kept to that.
        let another = backstore::all(&places.tree).map_err(|e| refused("delete", name, &e))?;
        if another.iter().any(|b| b.serial == serial) {
            Half::forget(places, name);
            return Ok(Deleted { name: name.to_string(), deleted: true, left, leftovers: Vec::new() });
        }
        // After that: a LUN that stops saves how far its scrub is.
        half::forget_state(places, &serial);
        let leftovers = half::take_down(places, name, half.as_ref())?;
        Half::forget(places, name);
        Ok(Deleted { name: name.to_string(), deleted: true, left, leftovers })
    }

    /// There is no device of ours of that name; there may be the rest of one.
    fn delete_leftovers(&self, name: &Name, half: Option<&Half>) -> Result<Deleted, Refusal> {
        let places = &self.places;
        if require_root("delete").is_err() && half.is_none() {
            places.lun("delete", name)?;
        }
        require_root("delete")?;
        let leftovers = half::take_down(places, name, half)?;
        if leftovers.is_empty() {
            // That there is none is said.
            places.lun("delete", name)?;
        }
        Ok(Deleted { name: name.to_string(), deleted: true, left: Vec::new(), leftovers })
    }
}

/// Why a LUN may be taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// Nobody uses it.
    Unused,
    /// Whoever uses it.
    Forced,
    /// It serves elsewhere.
    HandedOver,
}

/// Fails whatever would wait for a daemon that isn't there, or has no LUN to answer with, until it is dropped: the kernel sends SYNCHRONIZE CACHE to a
/// disk that it takes down, and more than once.
struct Failing {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Failing {
    fn start(places: &Places, store: &Backstore, exports: &[Export], busy: bool) -> Failing {
        for export in exports.iter().filter(|e| e.kind() == Some(Fabric::Loopback)) {
            let address = fabric::scsi_address(&places.tree, export).map_err(|e| e.source);
            if let Err(e) = address.and_then(|a| fabric::set_disk_offline(Path::new(SYSFS), &a)) {
                tracing::warn!("the disk of {} could not be put offline: {e}", export.target);
            }
        }
        let done = Arc::new(AtomicBool::new(false));
        let (end, tree, store) = (done.clone(), places.tree.clone(), store.clone());
        let thread = std::thread::spawn(move || {
            // Until the device is gone, and its attribute with it.
            while !end.load(Ordering::Acquire) && store.end_commands(&tree, busy).is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Failing { done, thread: Some(thread) }
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn users_of(places: &Places, export: &Export) -> io::Result<Vec<User>> {
    match export.kind() {
        Some(Fabric::Vhost) => Ok(usage::of_vhost(&places.tree, export).into_iter().collect()),
        Some(Fabric::Loopback) => match fabric::scsi_address(&places.tree, export) {
            Ok(address) => usage::Places::default().users_of(&fabric::disk(Path::new(SYSFS), &address)),
            // Half of an export has no disk yet, or no more.
            Err(e) if e.source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(e) => Err(io::Error::new(e.source.kind(), chain(&e))),
        },
        None => Ok(Vec::new()),
    }
}
