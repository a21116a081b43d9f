//! LUNs that go to another host and come from one: the two sides of [`crate::handover`], over the kernel, the daemon and the image that are really there.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;

use super::{
    Admin, Refusal, config_check,
    inherited::{Inherited, Renamed, Stays, alua_of, reservations_of},
    luns::refused,
    order::{ExportOrder, Order},
    require_root,
    way::{Address, Certificates, Connection},
};
use crate::{
    control::Registry,
    daemon::held::Held,
    handover::{self, Destination, Failure, Given, Identity, Source, State, Thawed, state::Modes},
    image::{
        nbd::is_uri,
        owner::{self, Claim, OwnerState},
    },
    kernel::{
        backstore::Backstore,
        fabric::{self, Export, Fabric},
        names::{Name, Wwn},
        reservations, usage,
    },
    lun::{
        Remote, chain,
        config::DeviceConfig,
        continued::{self, ContinuedFile},
        events::JobStatus,
        handed_over::HandedOver,
        jobs::JobOrder,
        saved_pages, scrub,
        state_file::StateFile,
        throttle,
    },
    pi::{Counters, protected::sidecar_path},
    tls::TlsError,
    units::BlockSize,
};

fn failed(e: &Refusal) -> Failure {
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
    goes: &'a dyn Fn(),
    known: Option<Known>,
    /// Its ports, if they are held.
    held: Option<Held>,
    /// The reservations that were sent.
    sent: Option<reservations::Held>,
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
            generation: owner.map(|o| o.generation),
        };
        self.known = Some(Known { store, exports, identity: identity.clone(), image, counters: stats.pi });
        Ok(identity)
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        (self.goes)();
        self.pausing()?.pause().map_err(Failure::new)
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
        let record = owner::share(image, &claim).map_err(owner)?;
        if record.state != OwnerState::Released {
            return Err(Failure::new(format!("{} was not given back: {:?}", image.display(), record.state)));
        }
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
        Ok(State {
            modes,
            saved_pages: saved(saved_pages::FOLDER)?,
            reservations,
            alua,
            limits: saved(throttle::FOLDER)?,
            scrub: saved(scrub::FOLDER)?,
            counters: counters.as_ref().and_then(|c| serde_json::to_value(c).ok()),
            ..State::new(Identity { generation: Some(record.generation), ..identity.clone() })
        })
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        let thawed = self.resume();
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
    /// Hands a LUN of the daemon's over to whoever receives there; with TLS, if the certificate shows that it is that host. `goes` is called when both
    /// have looked at it, and it stops.
    ///
    /// # Errors
    /// Which step failed; the LUN serves here then, or the words say why it does not.
    pub fn hand_over(
        &self,
        luns: &Registry,
        name: &Name,
        to: &Address,
        with: Option<&Certificates>,
        goes: &dyn Fn(),
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
        let mut going =
            Going { admin: self, luns, name: name.clone(), goes, known: None, held: None, sent: None };
        let given = handover::give(&mut connection, &mut going).map_err(|e| {
            tracing::error!(lun = %name, %to, "not handed over: {e}");
            let next = e.down.as_ref().and_then(|down| down.next.clone()).or_else(|| e.failure.next.clone());
            Refusal::new("handover", name, e.to_string()).maybe_next(next)
        })?;
        tracing::info!(lun = %name, %to, "has been handed over");
        Ok(given)
    }

    /// Has one LUN handed over from whoever is at the other end, under its own name or another. `comes` is called with that name when it could be had, and says
    /// whether it is wanted still.
    ///
    /// # Errors
    /// Why not; nothing of it is here then.
    pub fn receive(
        &self,
        connection: &mut Connection,
        name: Option<&Name>,
        comes: &dyn Fn(&str) -> bool,
    ) -> Result<Value, Refusal> {
        let mut coming = Coming { admin: self, name: name.cloned(), comes };
        let (identity, made) = handover::take(connection, &mut coming)
            .map_err(|e| Refusal::new("receive", "", e.reason).maybe_next(e.next))?;
        tracing::info!(lun = identity.name, "has come from another host");
        Ok(made)
    }
}

/// A LUN that comes.
struct Coming<'a> {
    admin: &'a Admin,
    /// Another name than it had.
    name: Option<Name>,
    comes: &'a dyn Fn(&str) -> bool,
}

impl Coming<'_> {
    fn name(&self, of: &Identity) -> Result<Name, Failure> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => Name::new(&of.name).map_err(|e| Failure::new(format!("{}: {e}", of.name))),
        }
    }

    fn config(of: &Identity) -> Result<DeviceConfig, Failure> {
        DeviceConfig::parse(&of.config).map_err(|e| {
            Failure::new(format!("its configuration is not understood here: {e}"))
                .then("use the same version on both hosts")
        })
    }

    /// Each export as it is called there, and what it is here: the same, or of a LUN that gets another name what `create` would call it.
    fn exports(&self, of: &Identity) -> Result<Vec<Renamed>, Failure> {
        let mut out: Vec<Renamed> = Vec::new();
        for (word, wwn) in &of.exports {
            let no = |why: String| Failure::new(format!("the export {word}:{wwn}: {why}"));
            let fabric =
                Fabric::of(word).ok_or_else(|| no("the fabrics are loopback and vhost".to_owned()))?;
            let here = match &self.name {
                None => Wwn::new(wwn).map_err(|e| no(e.to_string()))?,
                Some(name) => match out.iter().filter(|(_, (of, _))| *of == fabric).count() {
                    0 => Wwn::derived(&[word, name.as_str()]),
                    before => Wwn::derived(&[word, name.as_str(), &before.to_string()]),
                },
            };
            out.push(((word.clone(), wwn.clone()), (fabric, here)));
        }
        Ok(out)
    }

    fn order(&self, of: &Identity) -> Result<Order, Failure> {
        let block_size = BlockSize::new(of.block_size)
            .ok_or_else(|| Failure::new(format!("blocks of {} bytes are not served here", of.block_size)))?;
        let config = DeviceConfig {
            format: Some(
                of.format
                    .parse()
                    .map_err(|_| Failure::new(format!("the format {} is not known here", of.format)))?,
            ),
            ..Self::config(of)?
        };
        let here = self.exports(of)?.into_iter().map(|(_, (fabric, wwn))| (fabric, Some(wwn)));
        Ok(Order {
            name: self.name(of)?,
            serial: Some(of.serial.clone()),
            exports: here.map(|(fabric, wwn)| ExportOrder { fabric, wwn }).collect(),
            ..config_check::order(&config, block_size).map_err(|e| failed(&e))?
        })
    }
}

impl Destination for Coming<'_> {
    fn prepare(&mut self, of: &Identity) -> Result<(), Failure> {
        require_root("receive").map_err(|e| failed(&e))?;
        let places = &self.admin.places;
        places.daemon().map_err(|e| failed(&e))?;
        let order = self.order(of)?;
        let name = &order.name;
        if places.find("receive", name).map_err(|e| failed(&e))?.is_some() {
            return Err(Failure::new(format!("a LUN {name} is there already"))
                .then(format!("delete it there, or receive under another name: tcmu-dif delete {name}")));
        }
        let config = Self::config(of)?;
        check_image(&config)?;
        let image = &config.image;
        let found =
            owner::read(image).map_err(|e| Failure::new(format!("{}: {}", image.display(), chain(&e))))?;
        // That it is the same file on the same storage: its owner's file says the same there.
        if found.as_ref().map(|o| o.generation) != of.generation {
            return Err(Failure::new(format!("{} is not the same file here and there", image.display()))
                .then("mount the storage that both hosts have at the same place"));
        }
        if config.pi.is_some() {
            let sidecar = sidecar_path(image, config.sidecar.as_deref());
            if !sidecar.exists() {
                return Err(Failure::new(format!("there is no {}", sidecar.display()))
                    .then("keep the protection information where both hosts see it, beside the image"));
            }
        }
        for export in &order.exports {
            let Some(wwn) = &export.wwn else { continue };
            let target = Path::new("target").join(export.fabric.word()).join(wwn.as_str());
            if places.tree.has_now(&target) {
                return Err(Failure::new(format!("the target {wwn} is there already"))
                    .then("take it down there first"));
            }
        }
        if !(self.comes)(order.name.as_str()) {
            return Err(Failure::new("the destination does not want it any more: migrate_cancel"));
        }
        Ok(())
    }

    fn build(&mut self, state: &State) -> Result<Value, Failure> {
        let of = &state.identity;
        let order = self.order(of)?;
        let generation = of
            .generation
            .ok_or_else(|| Failure::new("it is not told in which generation the image was given back"))?;
        let inherited = Inherited::of(state.reservations.as_ref(), state.alua.as_ref(), &self.exports(of)?)?;
        let counters = state.counters.clone().and_then(|c| serde_json::from_value(c).ok());
        let begin = HandedOver { generation, modes: state.modes.clone(), counters };
        let begin = serde_json::to_value(begin).map_err(|e| Failure::new(e.to_string()))?;
        let places = &self.admin.places;
        let io = |e: io::Error| Failure::new(format!("what comes with the LUN cannot be kept: {e}"));
        let file = |folder| StateFile::new(&places.state_dir, folder, &of.serial);
        let all = [
            (file(saved_pages::FOLDER), state.saved_pages.clone()),
            (file(throttle::FOLDER), state.limits.clone()),
            (file(scrub::FOLDER), state.scrub.clone()),
            (HandedOver::file(&places.state_dir, &of.serial), Some(begin)),
        ];
        // Where both LUNs are of one host, these are the source's too.
        let before = all.each_ref().map(|(file, _)| file.load::<Value>().unwrap_or(None));
        let put = |file: &StateFile, value: &Option<Value>| match value {
            Some(value) => file.save(value, true),
            None => file.remove(),
        };
        let made = all.iter().try_for_each(|(file, value)| put(file, value)).map_err(io).and_then(|()| {
            let made = self.admin.create_with(&order, &inherited).map_err(|e| failed(&e))?;
            if !made.created || made.capacity_bytes != of.capacity {
                return Err(Failure::new(format!(
                    "the disk has {} bytes here, and {} there",
                    made.capacity_bytes, of.capacity
                )));
            }
            Ok(made)
        });
        let made = match made {
            Ok(made) => made,
            Err(failure) => {
                for ((file, _), value) in all.iter().zip(&before) {
                    if let Err(e) = put(file, value) {
                        tracing::warn!("{}: {e}", file.path().display());
                    }
                }
                return Err(failure);
            }
        };
        if !of.write_cache
            && let Ok(Some(store)) = places.find("receive", &order.name)
            && let Err(e) = store.set_write_cache(&places.tree, false)
        {
            tracing::warn!(lun = %order.name, "its write cache could not be turned off, as it was: {}", chain(&e));
        }
        serde_json::to_value(&made).map_err(|e| Failure::new(e.to_string()))
    }
}
