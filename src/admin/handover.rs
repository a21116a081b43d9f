//! LUNs that go to another host: the source's side of [`crate::handover`], over the kernel, the daemon and the image that are really there. The other is [`super::receive`].

mod storage;

use std::{io, path::PathBuf, time::Duration};

use serde_json::Value;

use super::{
    Admin, Refusal,
    inherited::{Stays, alua_of, reservations_of},
    luns::refused,
    require_root,
    way::{Address, Certificates},
};
use crate::{
    control::{Progress, Registry},
    daemon::held::Held,
    handover::{self, Failure, Given, Identity, Source, State, Thawed, state::Modes},
    image::{
        nbd::is_uri,
        owner::{self, Claim, OwnerState},
    },
    kernel::{
        backstore::Backstore,
        fabric::{self, Export},
        names::Name,
        reservations, usage,
    },
    lun::{
        Remote, bitmaps, chain,
        config::DeviceConfig,
        continued::{self, ContinuedFile},
        events::JobStatus,
        jobs::JobOrder,
        saved_pages, scrub,
        state_file::StateFile,
        throttle,
    },
    pi::Counters,
    tls::TlsError,
};

pub(super) fn failed(e: &Refusal) -> Failure {
    let reason = if e.value.is_empty() || e.reason.starts_with(&e.value) {
        e.reason.clone()
    } else {
        format!("{}: {}", e.value, e.reason)
    };
    Failure { reason, next: e.next.clone() }
}

/// How long the kernel may take with a reservation that it has begun with when the ports are held.
const SETTLING: Duration = Duration::from_millis(50);

/// A LUN of the daemon's, which goes.
struct Going<'a> {
    admin: &'a Admin,
    luns: &'a Registry,
    name: Name,
    progress: &'a dyn Progress,
    known: Option<Known>,
    /// Its ports, if they are held.
    held: Option<Held>,
    /// The reservations that were sent.
    sent: Option<reservations::Held>,
    /// Its storage, if that goes along.
    storage: Option<storage::Storage>,
}

/// What is known of it once it has been looked at.
struct Known {
    store: Backstore,
    exports: Vec<Export>,
    identity: Identity,
    image: PathBuf,
    counters: Option<Counters>,
}

impl Going<'_> {
    fn remote(&self) -> Result<Remote, Failure> {
        let lun = self.luns.find(self.name.as_str());
        lun.ok_or_else(|| {
            Failure::new(format!("the LUN {} does not serve", self.name)).then("see how it is: tcmu-dif list")
        })
    }

    fn known(&self) -> Result<&Known, Failure> {
        self.known.as_ref().ok_or_else(|| Failure::new("the LUN has not been looked at"))
    }

    /// A kernel's refusal, in words.
    fn refused(&self, e: &crate::kernel::backstore::ConfigfsError) -> Failure {
        failed(&refused("handover", &self.name, e))
    }

    fn stays(&self, why: Stays) -> Failure {
        match why {
            Stays::Kernel(e) => self.refused(&e),
            Stays::Because(failure) => failure,
        }
    }

    fn resume(&self) -> Result<Thawed, Failure> {
        let image = &self.known()?.image;
        let Err(reason) = self.pausing()?.resume() else { return Ok(Thawed::Serves) };
        let claim =
            Claim::of_this_host().map_err(|e| Failure::new(format!("this host has no identity: {e}")))?;
        match owner::read(image) {
            Ok(Some(now)) if now.state != OwnerState::Released && now.host.id != claim.host.id => {
                Ok(Thawed::Taken)
            }
            _ => Err(Failure::new(reason).then(format!("see how it is: tcmu-dif show {}", self.name))),
        }
    }

    /// Initiators may go on as they could before.
    fn release(&mut self) {
        if let Some(held) = self.held.take() {
            held.release(&self.admin.places.tree, &self.admin.places.run, self.name.as_str());
        }
    }

    /// The reservations as they are, in terms of the exports. From here on nobody changes them: who is registered finds the ports in transition, whatever the command.
    /// (Where nobody is registered, ports are as they are. Who registers now has a key that is not known there, and is told so by the next command that needs one.)
    fn reservations(&mut self) -> Result<Option<handover::port::Reservations>, Failure> {
        let (admin, name, path) = (self.admin, self.name.clone(), self.known()?.store.path.clone());
        let tree = &admin.places.tree;
        let of = || reservations::of(tree, &path).map_err(|e| failed(&refused("handover", &name, &e)));
        let mut found = of()?;
        if matches!(&found, reservations::Held::Persistent { registrants, .. } if !registrants.is_empty()) {
            let held = Held::hold(tree, &admin.places.run, name.as_str(), &path).map_err(|e| {
                Failure::new(format!("initiators could not be kept from their reservations: {}", chain(&e)))
                    .then("look at the kernel's messages: dmesg")
            })?;
            self.held = Some(held);
            std::thread::sleep(SETTLING);
            found = of()?;
        }
        let Known { store, exports, .. } = self.known()?;
        let told = reservations_of(tree, store, exports, &found).map_err(|e| self.stays(e))?;
        self.sent = Some(found);
        Ok(told)
    }

    /// What initiators have changed of their reservations since they were sent.
    fn changed(&self) -> Option<Failure> {
        let Known { store, .. } = self.known.as_ref()?;
        let now = reservations::of(&self.admin.places.tree, &store.path).ok()?;
        (*self.sent.as_ref()? != now).then(|| {
            Failure::new(format!(
                "initiators have reserved it meanwhile, and that is not known where the LUN is now: {now:?}"
            ))
            .then("have them register there")
        })
    }

    fn pausing(&self) -> Result<std::sync::Arc<dyn crate::control::Pausing>, Failure> {
        self.luns
            .pausing(self.name.as_str())
            .ok_or_else(|| Failure::new("the daemon does not have the LUN any more"))
    }
}

/// Refuses images of which no owner can be kept where the other host sees it.
pub(super) fn check_image(config: &DeviceConfig) -> Result<(), Failure> {
    let image = config.image.display();
    if config.read_only {
        return Err(
            Failure::new("it is read-only").then("make it on the other host too: nothing is in the way")
        );
    }
    if is_uri(&config.image) {
        return Err(Failure::new(format!("{image} is an NBD export, beside which no owner is kept"))
            .then("delete the LUN here and create it there"));
    }
    match config.image.metadata() {
        Ok(meta) if meta.is_file() => Ok(()),
        Ok(_) => Err(Failure::new(format!("{image} is no file: no owner is kept beside a block device"))
            .then("delete the LUN here and create it there")),
        Err(e) => Err(Failure::new(format!("{image}: {e}"))
            .then("mount the storage that both hosts have at the same place")),
    }
}

impl Source for Going<'_> {
    fn identity(&mut self) -> Result<Identity, Failure> {
        require_root("handover").map_err(|e| failed(&e))?;
        let places = &self.admin.places;
        let store = places.lun("handover", &self.name).map_err(|e| failed(&e))?;
        let remote = self.remote()?;
        let lun = |e: crate::lun::LunError| Failure::new(chain(&e));
        let config = remote.made().config.clone();
        check_image(&config)?;
        let jobs = remote.job(JobOrder::Query).map_err(lun)?;
        if let Some(job) = jobs.iter().find(|job| job.status != JobStatus::Concluded) {
            return Err(Failure::new(format!(
                "the block job {} is under way, which does not go along",
                job.id
            ))
            .then(format!(
                "have it end first: tcmu-dif job complete {0}, or tcmu-dif job cancel {0}",
                job.id
            )));
        }
        let exports = fabric::of(&places.tree, &store).map_err(|e| self.refused(&e))?;
        if let Some(foreign) = exports.iter().find_map(usage::of_foreign) {
            return Err(Failure::new(foreign.to_string())
                .then("take that export down first, with the tool that made it: targetcli"));
        }
        // What cannot go along is said before anything is touched.
        let held = reservations::of(&places.tree, &store.path).map_err(|e| self.refused(&e))?;
        reservations_of(&places.tree, &store, &exports, &held).map_err(|e| self.stays(e))?;
        let stats = remote.stats().map_err(lun)?;
        let owner = owner::read(&config.image).map_err(|e| Failure::new(chain(&e)))?;
        let image = config.image.clone();
        let serial = crate::lun::serial_of(Some(&store.serial), &config, &store.name);
        let identity = Identity {
            name: store.name.clone(),
            serial,
            config: config.to_string(),
            format: stats.format,
            block_size: store.block_size,
            capacity: stats.capacity_bytes,
            write_cache: store.write_cache,
            exports: exports.iter().map(|e| (e.fabric.clone(), e.target.clone())).collect(),
            generation: owner.map(|o| o.generation).filter(|_| self.storage.is_none()),
        };
        self.known = Some(Known { store, exports, identity: identity.clone(), image, counters: stats.pi });
        Ok(identity)
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        let Some(storage) = &mut self.storage else {
            self.progress.goes();
            return self.pausing()?.pause().map_err(Failure::new);
        };
        let far = storage.last_call()?;
        self.pausing()?.pause().map_err(Failure::new)?;
        far.whole().map_err(Failure::new)
    }

    fn state(&mut self) -> Result<State, Failure> {
        // Before the ports are held, which is a state too.
        let Known { store, exports, .. } = self.known()?;
        let alua = alua_of(&self.admin.places.tree, store, exports).map_err(|e| self.refused(&e))?;
        let reservations = self.reservations()?;
        let Known { store, identity, image, counters, .. } = self.known()?;
        let owner = |e: owner::OwnerError| Failure::new(format!("{}: {}", image.display(), chain(&e)));
        let claim =
            Claim::of_this_host().map_err(|e| Failure::new(format!("this host has no identity: {e}")))?;
        let record = match &self.storage {
            None => Some(owner::share(image, &claim).map_err(owner)?),
            // The new image is another.
            Some(_) => owner::read(image).map_err(owner)?,
        };
        if let Some(record) = record.as_ref().filter(|record| record.state != OwnerState::Released) {
            return Err(Failure::new(format!("{} was not given back: {:?}", image.display(), record.state)));
        }
        let generation = record.filter(|_| self.storage.is_none()).map(|record| record.generation);
        let places = &self.admin.places;
        let io = |e: io::Error| Failure::new(e.to_string());
        let saved =
            |folder| StateFile::new(&places.state_dir, folder, &identity.serial).load::<Value>().map_err(io);
        let minor = places.run.read(&store.name).map_err(io)?.map(|state| state.minor);
        let kept = match minor {
            Some(minor) => ContinuedFile::load_any(&places.run.continued_file(minor)).map_err(io)?,
            None => None,
        };
        let modes: Option<Modes> = kept.map(continued::to_modes);
        let bitmaps = match &self.storage {
            Some(storage) => storage.bitmaps(),
            // The image has the others.
            None => {
                let file = StateFile::new(&places.state_dir, bitmaps::FOLDER, &identity.serial);
                bitmaps::left(&file).map_err(io)?
            }
        };
        Ok(State {
            modes,
            saved_pages: saved(saved_pages::FOLDER)?,
            reservations,
            alua,
            limits: saved(throttle::FOLDER)?,
            scrub: saved(scrub::FOLDER)?,
            counters: counters.as_ref().and_then(|c| serde_json::to_value(c).ok()),
            bitmaps,
            ..State::new(Identity { generation, ..identity.clone() })
        })
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        let thawed = self.resume();
        if self.storage.is_some() && matches!(thawed, Ok(Thawed::Serves)) {
            // Where it was not stopped, the copy is there still, and goes nowhere.
            let id = storage::job_of(&self.name);
            if let Some(lun) = self.luns.find(self.name.as_str()) {
                let _ = lun.job(JobOrder::Cancel { id, force: true });
            }
        }
        if !matches!(thawed, Ok(Thawed::Taken)) {
            self.release();
        }
        thawed
    }

    fn finish(&mut self) -> Result<(), Failure> {
        let changed = self.changed();
        self.admin.delete_handed_over(&self.name).map_err(|e| failed(&e))?;
        Held::forget(&self.admin.places.run, self.name.as_str());
        changed.map_or(Ok(()), Err)
    }
}

impl Admin {
    /// Hands a LUN of the daemon's over to whoever receives there, with its storage if that is said; with TLS, if the certificate shows that it is that host. `progress` hears how far
    /// it is, and may have a LUN whose storage is copied serve on until it is to be stopped.
    ///
    /// # Errors
    /// Which step failed; the LUN serves here then, or the words say why it does not.
    pub fn hand_over(
        &self,
        luns: &Registry,
        name: &Name,
        to: &Address,
        (with, storage): (Option<&Certificates>, bool),
        progress: &dyn Progress,
    ) -> Result<Given, Refusal> {
        let mut connection = to.connect(with).map_err(|e| match TlsError::of(&e) {
            Some(tls) => Refusal::new("handover", to, tls.why.clone()).then(tls.next.clone()),
            None => Refusal::from("handover", to, &e).then(match to {
                Address::Unix(_) => "have the other host listen: tcmu-dif receive --listen ADDRESS",
                Address::Tls { .. } => {
                    "have the other host listen: tcmu-dif receive --listen tls://ADDRESS:PORT; the daemon's unit has to permit the way there: docs/nbd.md"
                }
            }),
        })?;
        tracing::info!(lun = %name, %to, "is handed over");
        let mut going = Going {
            admin: self,
            luns,
            name: name.clone(),
            progress,
            known: None,
            held: None,
            sent: None,
            storage: storage.then(|| storage::Storage::new(to)),
        };
        let given = match storage {
            false => handover::give(&mut connection, &mut going),
            true => handover::give_with_storage(&mut connection, &mut going),
        };
        let given = given.map_err(|e| {
            tracing::error!(lun = %name, %to, "not handed over: {e}");
            let next = e.down.as_ref().and_then(|down| down.next.clone()).or_else(|| e.failure.next.clone());
            Refusal::new("handover", name, e.to_string()).maybe_next(next)
        })?;
        tracing::info!(lun = %name, %to, "has been handed over");
        Ok(given)
    }
}
