//! LUNs that come from another host: the destination's side of [`crate::handover`], over the kernel, the daemon and the image that are really there.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Admin, Refusal, config_check,
    handover::{check_image, failed},
    inherited::{Inherited, Renamed},
    order::{ExportOrder, Order},
    require_root,
    way::Connection,
};
use crate::{
    handover::{self, Destination, Failure, Identity, State, storage::Piece, wire::Host},
    image::{
        Format,
        owner::{self, HostId},
    },
    kernel::{
        fabric::Fabric,
        names::{Name, Wwn},
    },
    lun::{
        chain,
        config::DeviceConfig,
        handed_over::HandedOver,
        landing::{self, Landing, Plan},
        saved_pages, scrub,
        state_file::StateFile,
        throttle,
    },
    pi::protected::sidecar_path,
    units::BlockSize,
};

/// Where the image of a LUN is made that comes with its storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewImage {
    /// Its path, or a directory, in which it is called as it is there.
    pub at: PathBuf,
    /// Its format, if it is to be another than there.
    pub format: Option<Format>,
}

impl NewImage {
    /// What the image is called here that is called so there.
    fn of(&self, there: &Path) -> Result<PathBuf, Failure> {
        if !self.at.is_dir() {
            return Ok(self.at.clone());
        }
        let name = there.file_name().ok_or_else(|| {
            Failure::new(format!("{} has no name that a new image could have", there.display()))
                .then("give the new image's path: tcmu-dif receive --once --image PATH")
        })?;
        Ok(self.at.join(name))
    }
}

impl Admin {
    /// Has one LUN handed over from whoever is at the other end, under its own name or another. `image` says where its new image is made, if it comes with its storage. `comes` is called with its
    /// name when it could be had, and says whether it is wanted still.
    ///
    /// # Errors
    /// Why not; nothing of it is here then.
    pub fn receive(
        &self,
        connection: &mut Connection,
        name: Option<&Name>,
        image: Option<&NewImage>,
        comes: &dyn Fn(&str) -> bool,
    ) -> Result<Value, Refusal> {
        let mut coming = Coming {
            admin: self,
            name: name.cloned(),
            comes,
            image: image.cloned(),
            plan: None,
            landing: None,
        };
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
    /// Where its image is made, if it comes along.
    image: Option<NewImage>,
    /// What that is to be, once it is known.
    plan: Option<Plan>,
    /// It is being made.
    landing: Option<Landing>,
}

impl Coming<'_> {
    fn name(&self, of: &Identity) -> Result<Name, Failure> {
        match &self.name {
            Some(name) => Ok(name.clone()),
            None => Name::new(&of.name).map_err(|e| Failure::new(format!("{}: {e}", of.name))),
        }
    }

    fn config(of: &Identity) -> Result<DeviceConfig, Failure> {
        let format = of.format.parse();
        let format =
            format.map_err(|_| Failure::new(format!("the format {} is not known here", of.format)))?;
        let config = DeviceConfig::parse(&of.config).map_err(|e| {
            Failure::new(format!("its configuration is not understood here: {e}"))
                .then("use the same version on both hosts")
        })?;
        Ok(DeviceConfig { format: Some(format), ..config })
    }

    /// That of the LUN here, if its image is made here.
    fn config_of_new(&self, of: &Identity) -> Result<DeviceConfig, Failure> {
        let new = self.image.as_ref().ok_or_else(handover::no_storage)?;
        let there = Self::config(of)?;
        let format = new.format.or(there.format);
        Ok(DeviceConfig { image: new.of(&there.image)?, format, sidecar: None, ..there })
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

    fn block_size(of: &Identity) -> Result<BlockSize, Failure> {
        BlockSize::new(of.block_size)
            .ok_or_else(|| Failure::new(format!("blocks of {} bytes are not served here", of.block_size)))
    }

    fn order(&self, of: &Identity, config: &DeviceConfig) -> Result<Order, Failure> {
        let here = self.exports(of)?.into_iter().map(|(_, (fabric, wwn))| (fabric, Some(wwn)));
        Ok(Order {
            name: self.name(of)?,
            serial: Some(of.serial.clone()),
            exports: here.map(|(fabric, wwn)| ExportOrder { fabric, wwn }).collect(),
            ..config_check::order(config, Self::block_size(of)?).map_err(|e| failed(&e))?
        })
    }

    /// Looks whether a LUN could be made so: the daemon, the name, the targets.
    fn check_order(&self, order: &Order) -> Result<(), Failure> {
        let places = &self.admin.places;
        places.daemon().map_err(|e| failed(&e))?;
        let name = &order.name;
        if places.find("receive", name).map_err(|e| failed(&e))?.is_some() {
            return Err(Failure::new(format!("a LUN {name} is there already"))
                .then(format!("delete it there, or receive under another name: tcmu-dif delete {name}")));
        }
        for export in &order.exports {
            let Some(wwn) = &export.wwn else { continue };
            let target = Path::new("target").join(export.fabric.word()).join(wwn.as_str());
            if places.tree.has_now(&target) {
                return Err(Failure::new(format!("the target {wwn} is there already"))
                    .then("take it down there first"));
            }
        }
        Ok(())
    }

    fn is_wanted(&self, order: &Order) -> Result<(), Failure> {
        match (self.comes)(order.name.as_str()) {
            true => Ok(()),
            false => Err(Failure::new("the destination does not want it any more: migrate_cancel")),
        }
    }
}

impl Destination for Coming<'_> {
    fn prepare(&mut self, of: &Identity) -> Result<(), Failure> {
        require_root("receive").map_err(|e| failed(&e))?;
        let config = Self::config(of)?;
        let order = self.order(of, &config)?;
        self.check_order(&order)?;
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
        self.is_wanted(&order)
    }

    fn prepare_storage(&mut self, of: &Identity) -> Result<(), Failure> {
        require_root("receive").map_err(|e| failed(&e))?;
        let config = self.config_of_new(of)?;
        let order = self.order(of, &config)?;
        self.check_order(&order)?;
        landing::check_place(&config.image)?;
        // Said now, and not when all has been copied.
        config
            .dev_config()
            .map_err(|e| Failure::new(e.to_string()).then("choose a shorter path: --image"))?;
        self.is_wanted(&order)?;
        self.plan = Some(Plan { config, block_size: Self::block_size(of)?, capacity: of.capacity });
        Ok(())
    }

    fn land(&mut self, piece: Piece) -> Result<(), Failure> {
        match (&mut self.landing, &self.plan, piece) {
            (Some(landing), _, piece) => landing.land(piece),
            (None, Some(plan), Piece::Begin(kept)) => {
                self.landing = Some(Landing::begin(plan.clone(), kept, None)?);
                Ok(())
            }
            // A sign of life may come before.
            (None, _, Piece::Nothing) => Ok(()),
            (None, ..) => Err(Failure::new("the source sends blocks of an image that has not begun")),
        }
    }

    fn settle(&mut self) -> Result<Host, Failure> {
        let landing = self.landing.as_mut();
        landing.ok_or_else(|| Failure::new("nothing of the image has come"))?.settle()?;
        let HostId { id, name } =
            HostId::this().map_err(|e| Failure::new(format!("the destination has no identity: {e}")))?;
        Ok(Host { id, name })
    }

    fn clear(&mut self) {
        self.landing = None;
    }

    fn build(&mut self, state: &State) -> Result<Value, Failure> {
        let of = &state.identity;
        let config = match &self.plan {
            Some(plan) => plan.config.clone(),
            None => Self::config(of)?,
        };
        let order = self.order(of, &config)?;
        let generation = of.generation;
        if generation.is_none() && self.landing.is_none() {
            return Err(Failure::new("it is not told in which generation the image was given back"));
        }
        if let Some(landing) = &mut self.landing {
            landing.name()?;
            // A LUN of that name may have been moved from an image that was there; from this one it was not.
            let moves = self.admin.places.moves(&order.name);
            moves
                .forget(&config.image)
                .map_err(|e| Failure::new(format!("{}: {e}", moves.path().display())))?;
        }
        let inherited = Inherited::of(state.reservations.as_ref(), state.alua.as_ref(), &self.exports(of)?)?;
        let counters = state.counters.clone().and_then(|c| serde_json::from_value(c).ok());
        let begin =
            HandedOver { generation, modes: state.modes.clone(), counters, bitmaps: state.bitmaps.clone() };
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
        if let Some(landing) = self.landing.take() {
            landing.keep();
        }
        if !of.write_cache
            && let Ok(Some(store)) = places.find("receive", &order.name)
            && let Err(e) = store.set_write_cache(&places.tree, false)
        {
            tracing::warn!(lun = %order.name, "its write cache could not be turned off, as it was: {}", chain(&e));
        }
        serde_json::to_value(&made).map_err(|e| Failure::new(e.to_string()))
    }
}
