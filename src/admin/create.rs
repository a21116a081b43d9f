//! A LUN made from an image: from there to a disk, or nothing at all.
//!
//! Everything that can be wrong is looked at before the kernel is touched, and everything that was made is taken down
//! again if a later step fails, the new image included. The same order a second time changes nothing, and says so.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    Admin, Refusal,
    half::{self, Half},
    images::{self, Looked},
    inherited::Inherited,
    luns::{self, DISK_TIMEOUT, ExportView, Places, refused},
    order::{ExportOrder, Order},
    require_root,
};
use crate::{
    daemon::rundir::{LunState, Phase},
    image::{Format, null},
    kernel::{
        SYSFS,
        backstore::{self, Backstore, Spec},
        dif::{self, Dif},
        fabric::{self, Export, Fabric},
        modules,
        names::{Name, Wwn},
        undo::Undo,
    },
    lun::config::{DeviceConfig, SUBTYPE, pi_word},
    pi::{Exposure, Transfer, store::default_path},
};

/// How long the daemon may take to notice a new device.
const NOTICE_PATIENCE: Duration = Duration::from_secs(120);
/// How long a disk may take to come up.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// A LUN that is there as it was ordered.
#[derive(Debug, Serialize)]
pub struct Created {
    /// Its name.
    pub name: String,
    /// The image.
    pub image: String,
    /// Its format, if the daemon has said.
    pub format: Option<String>,
    /// The disk's serial number.
    pub serial: String,
    /// `off`, `type1`, `type2`, `type3`.
    pub pi: &'static str,
    /// Who sees it.
    pub exposure: Exposure,
    /// How it travels to those who do.
    pub transfer: Option<Transfer>,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes.
    pub capacity_bytes: u64,
    /// Where it is exported.
    pub exports: Vec<ExportView>,
    /// It was made now, and was not there before.
    pub created: bool,
}

impl Created {
    fn new(
        there: &Backstore,
        config: &DeviceConfig,
        exports: Vec<ExportView>,
        state: Option<LunState>,
        created: bool,
    ) -> Created {
        Created {
            name: there.name.clone(),
            image: config.image.display().to_string(),
            format: state.and_then(|s| s.format),
            serial: there.serial.clone(),
            pi: config.pi.map_or("off", pi_word),
            exposure: config.exposure,
            transfer: (config.exposure == Exposure::Initiator).then_some(config.transfer),
            block_size: there.block_size,
            capacity_bytes: there.capacity,
            exports,
            created,
        }
    }
}

impl Admin {
    /// Makes the LUN, and gives back when it serves and its disks are there.
    ///
    /// # Errors
    /// Nothing that was made is left then.
    pub fn create(&self, order: &Order) -> Result<Created, Refusal> {
        self.create_with(order, &Inherited::default())
    }

    /// The same of one that has been another host's.
    pub(super) fn create_with(&self, order: &Order, inherited: &Inherited) -> Result<Created, Refusal> {
        let places = &self.places;
        let config = order.config()?;
        let _turn = places.turn("create", &order.name)?;
        self.refuse_left(order)?;
        let half = Half::noted(places, &order.name);
        if let Some(there) = places.find("create", &order.name)? {
            let same = again(places, order, &config, &there);
            let Some(half) = half else { return same };
            let exports = fabric::of(&places.tree, &there).map_err(|e| refused("create", &order.name, &e))?;
            if half.is_whole(&there, &exports) {
                // Cut off after the last step.
                Half::forget(places, &order.name);
                return same;
            }
            require_root("create")?;
            tracing::warn!(lun = %order.name, "half of it is there, from a create that was cut off: taken down, and made anew");
            self.delete_in_turn(&order.name, false)?;
        } else if let Some(half) = half.filter(|_| require_root("create").is_ok()) {
            let gone = half::take_down(places, &order.name, Some(&half))?;
            if !gone.is_empty() {
                tracing::warn!(lun = %order.name, "taken down, from a create that was cut off: {}", gone.join(", "));
            }
        }
        let looked = look_at_image(order, &config)?;
        let format = looked.as_ref().map_or(order.format.unwrap_or(Format::Raw), |l| l.format);
        let config = DeviceConfig { format: Some(format), ..config };
        require_root("create")?;
        places.daemon()?;
        let unready = |e: modules::ModuleError| {
            Refusal::from("create", &order.name, &e).then("see what this host lacks: tcmu-dif check-host")
        };
        modules::mount_configfs(&places.configfs).map_err(unready)?;
        modules::load("target_core_user").map_err(unready)?;
        if config.exposure == Exposure::Initiator {
            let interleaved = config.transfer == Transfer::Interleaved;
            dif::may_expose(Dif::of_this_kernel(Path::new(SYSFS)), interleaved)
                .map_err(|e| Refusal::from("--exposure", config.exposure, &e).then(e.next_step()))?;
        }
        for export in &order.exports {
            modules::load(export.fabric.module()).map_err(unready)?;
        }
        let serial = order.serial.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let names = world_wide_names(order);
        // A target that is there is another's, and none that could be left of this.
        let new =
            |(fabric, wwn): &(&str, &str)| !places.tree.has_now(&Path::new("target").join(fabric).join(wwn));
        let exports =
            order.exports.iter().zip(&names).map(|(e, wwn)| (e.fabric.word(), wwn.as_str())).filter(new);
        let half = Half::new(&serial, exports);
        half.note(places, &order.name)?;
        let made = self.build(order, &config, looked, serial, inherited);
        match &made {
            Ok(_) => Half::forget(places, &order.name),
            // Nothing is left, or what could not be undone was said; then the note stays for whoever tries again.
            Err(_) => match places.find("create", &order.name) {
                Ok(None) => {
                    if let Err(e) = half::take_down(places, &order.name, Some(&half)) {
                        tracing::warn!(lun = %order.name, "something of it is left: {}: tcmu-dif delete {}", e.reason, order.name);
                    }
                }
                _ => {
                    tracing::warn!(lun = %order.name, "not all of it could be taken down: tcmu-dif delete {}", order.name)
                }
            },
        }
        made
    }

    fn build(
        &self,
        order: &Order,
        config: &DeviceConfig,
        looked: Option<Looked>,
        serial: String,
        inherited: &Inherited,
    ) -> Result<Created, Refusal> {
        let (places, name) = (&self.places, &order.name);
        let failed = |e: backstore::ConfigfsError| refused("create", name, &e);
        let mut undo = Undo::new(&places.tree);
        let capacity = match (looked, order.size) {
            (Some(looked), _) => looked.capacity,
            (None, size) => {
                let size = size.unwrap_or(0);
                images::create_new(&config.image, order.format.unwrap_or(Format::Raw), size)?;
                let path = config.image.clone();
                undo.note("the new image", move || fs::remove_file(path));
                // A LUN of that name may have been moved from a file that was there; from this one it was not.
                let moves = places.moves(name);
                let failed = |e: std::io::Error| Refusal::from("create", moves.path().display(), &e);
                moves.forget(&config.image).map_err(failed)?;
                size
            }
        };
        self.protect(config, order, &mut undo)?;
        // Undone between the device and the files: the daemon closes them before they are removed.
        undo.note("the daemon's hold on the image", || luns::wait_until_closed(places, name.as_str(), None));
        let spec = Spec {
            name: name.clone(),
            dev_config: config.dev_config().map_err(|e| Refusal::from("create", name, &e))?,
            capacity,
            block_size: order.block_size,
            serial,
            write_cache: true,
        };
        let path = backstore::create(&places.tree, &spec, &mut undo).map_err(failed)?;
        let there = backstore::find(&places.tree, SUBTYPE, name.as_str()).map_err(failed)?;
        let there = there.filter(|b| b.path == path).ok_or_else(|| {
            Refusal::new("create", name, "another `create` of the same name was faster").then("tcmu-dif list")
        })?;
        let state = wait_until_up(places, order, &there)?;
        inherited.before_exports(&places.tree, &path, &mut undo).map_err(failed)?;
        let mut views = Vec::new();
        for (export, wwn) in order.exports.iter().zip(world_wide_names(order)) {
            let made = fabric::create(&places.tree, &path, export.fabric, &wwn, &mut undo).map_err(|e| {
                if e.source.kind() == std::io::ErrorKind::AlreadyExists {
                    let text = format!("{}:{wwn}", export.fabric.word());
                    return Refusal::new("--export", text, "another target has that world wide name")
                        .then(format!("choose one: --export {}:naa.5001405XXXXXXXXX", export.fabric.word()));
                }
                failed(e)
            })?;
            inherited.exported(&places.tree, &path, &made).map_err(failed)?;
            views.push(match export.fabric {
                Fabric::Vhost => luns::view_of(&made, None),
                Fabric::Loopback => wait_for_disk(places, order, &made)?,
            });
        }
        undo.keep();
        Ok(Created::new(&there, config, views, Some(state), true))
    }

    /// An image that the LUN of that name was moved from has missed writes since: whoever names it does not know, or has to say so.
    fn refuse_left(&self, order: &Order) -> Result<(), Refusal> {
        let moves = self.places.moves(&order.name);
        let failed = |e: std::io::Error| Refusal::from("create", moves.path().display(), &e);
        let Some(moved) = moves.from(&order.image).map_err(failed)? else { return Ok(()) };
        if order.size.is_some() && order.image.symlink_metadata().is_err() {
            // It is gone, and another is made in its place.
            return Ok(());
        }
        let to = moved.config().map_or(moved.to.clone(), |to| to.image.display().to_string());
        let reason =
            format!("{} was moved from this image to {to}, which has what was written since", order.name);
        let next = format!("name {to}; or, to use the old image all the same: rm {}", moves.path().display());
        Err(Refusal::new("create", order.image.display(), reason).then(next))
    }

    /// Makes the protection information of an image that has none yet.
    fn protect(&self, config: &DeviceConfig, order: &Order, undo: &mut Undo<'_>) -> Result<(), Refusal> {
        let Some(pi) = config.pi else { return Ok(()) };
        let sidecar = config.sidecar.clone().unwrap_or_else(|| default_path(&config.image));
        if sidecar.symlink_metadata().is_ok() {
            // The daemon opens it, and says what is wrong with it.
            return Ok(());
        }
        (self.protect)(&config.image, &sidecar, pi, config.pi_mode.unwrap_or_default(), order.block_size)?;
        undo.note("the new sidecar", move || fs::remove_file(sidecar));
        Ok(())
    }
}

/// The image by itself; with `--size`, that there is room for a new one.
pub(crate) fn look_at_image(order: &Order, config: &DeviceConfig) -> Result<Option<Looked>, Refusal> {
    let path = &config.image;
    let sidecar = config.sidecar.clone().unwrap_or_else(|| default_path(path));
    let sidecar_there = sidecar.symlink_metadata().is_ok();
    if null::is_null(path) {
        return null_disk(order).map(Some);
    }
    if order.size.is_some() {
        if path.symlink_metadata().is_ok() {
            return Err(Refusal::new(
                "create",
                path.display(),
                "the image is there already, and --size makes a new one",
            )
            .then("leave --size out to use it as it is, or choose another path"));
        }
        if sidecar_there {
            return Err(Refusal::new(
                "create",
                sidecar.display(),
                "protection information is there already, of an image that isn't",
            )
            .then(format!("remove it, or choose another path: rm {}", sidecar.display())));
        }
        return Ok(None);
    }
    let looked = images::look(path, order.read_only, order.cache, order.block_size)?;
    if let Some(wanted) = order.format.filter(|f| *f != looked.format) {
        return Err(Refusal::new("--format", wanted, format!("{} is {}", path.display(), looked.format))
            .then("leave --format out"));
    }
    if config.pi.is_none() && sidecar_there && !order.read_only {
        return Err(Refusal::new(
            "create",
            path.display(),
            format!(
                "it has protection information in {}, which writes without --pi would leave behind",
                sidecar.display()
            ),
        )
        .then(format!(
            "add --pi as it was made with (tcmu-dif pi status {}), or remove the sidecar",
            path.display()
        )));
    }
    Ok(Some(looked))
}

/// `/dev/null`, for measurements: it has the size that it is given, and keeps nothing.
fn null_disk(order: &Order) -> Result<Looked, Refusal> {
    let path = order.image.display();
    if order.pi.is_some() {
        return Err(Refusal::new(
            "create",
            path,
            "it keeps no data that protection information could be for",
        )
        .then("leave --pi out"));
    }
    if order.format == Some(Format::Qcow2) {
        return Err(Refusal::new("--format", Format::Qcow2, "it is raw").then("leave --format out"));
    }
    let capacity = order.size.ok_or_else(|| {
        Refusal::new("create", path, "it has no size of its own").then("say one: --size 1G")
    })?;
    Ok(Looked { format: Format::Raw, capacity })
}

/// A LUN of that name is there: the same, or another.
fn again(
    places: &Places,
    order: &Order,
    config: &DeviceConfig,
    there: &Backstore,
) -> Result<Created, Refusal> {
    let name = &order.name;
    let exports = fabric::of(&places.tree, there).map_err(|e| refused("create", name, &e))?;
    let differences = differences(order, config, there, &exports);
    if !differences.is_empty() {
        return Err(Refusal::new(
            "create",
            name,
            format!("it is there already, with {}", differences.join(", ")),
        )
        .then(format!("choose another name, or delete it first: tcmu-dif delete {name}")));
    }
    let views = exports.iter().map(|e| luns::view(&places.tree, e)).collect();
    let state = places.state("create", name.as_str())?;
    Ok(Created::new(there, config, views, state, false))
}

/// In what a LUN differs from the words, as it is.
pub(crate) fn differences(
    order: &Order,
    config: &DeviceConfig,
    there: &Backstore,
    exports: &[Export],
) -> Vec<String> {
    let mut out = Vec::new();
    let mut differ = |what: &str, is: String, wanted: String| {
        if is != wanted {
            out.push(format!("{what} {is} and not {wanted}"));
        }
    };
    match there.config_after(SUBTYPE).map(DeviceConfig::parse) {
        Some(Ok(is)) => {
            differ("image", is.image.display().to_string(), config.image.display().to_string());
            differ("--pi", is.pi.map_or("off", pi_word).into(), config.pi.map_or("off", pi_word).into());
            let mode =
                |c: &DeviceConfig| c.pi_mode.map_or("as the sidecar has it".to_owned(), |m| m.to_string());
            differ("--pi-mode", mode(&is), mode(config));
            differ("--exposure", is.exposure.to_string(), config.exposure.to_string());
            differ("--pi-transfer", is.transfer.to_string(), config.transfer.to_string());
            let sidecar = |c: &DeviceConfig| {
                c.sidecar.clone().unwrap_or_else(|| default_path(&c.image)).display().to_string()
            };
            if is.pi.is_some() && config.pi.is_some() {
                differ("--sidecar", sidecar(&is), sidecar(config));
            }
            let cache = |c: &DeviceConfig| {
                c.cache_size.map_or("of the usual size".to_owned(), |bytes| format!("of {bytes} bytes"))
            };
            differ("--cache-size", cache(&is), cache(config));
            differ("--cache", is.cache.to_string(), config.cache.to_string());
            let cpus = |c: &DeviceConfig| c.cpus.as_ref().map_or("any".to_owned(), ToString::to_string);
            differ("--cpus", cpus(&is), cpus(config));
            let group = |c: &DeviceConfig| c.copy_group.clone().unwrap_or_else(|| "none".to_owned());
            differ("--copy-group", group(&is), group(config));
            differ("--throttle", is.limits.to_string(), config.limits.to_string());
            let mode = |ro| if ro { "read-only" } else { "writable" }.to_owned();
            differ("access", mode(is.read_only), mode(config.read_only));
        }
        _ => differ("configuration", there.dev_config.clone(), config.to_string()),
    }
    differ("a device that is", if there.enabled { "enabled" } else { "half made" }.into(), "enabled".into());
    differ("--block-size", there.block_size.to_string(), order.block_size.to_string());
    if let Some(size) = order.size {
        differ("--size", there.capacity.to_string(), size.to_string());
    }
    if let Some(serial) = &order.serial {
        differ("--serial", there.serial.clone(), serial.clone());
    }
    let mut left: Vec<&Export> = exports.iter().collect();
    // Those with a name first: one without takes any that is left.
    let (named, unnamed): (Vec<_>, Vec<_>) = order.exports.iter().partition(|e| e.wwn.is_some());
    for wanted in named.into_iter().chain(unnamed) {
        let fits = |e: &&Export| {
            e.kind() == Some(wanted.fabric) && wanted.wwn.as_ref().is_none_or(|w| w.as_str() == e.target)
        };
        match left.iter().position(fits) {
            Some(at) => {
                left.remove(at);
            }
            None => out.push(format!("no export {wanted}")),
        }
    }
    out.extend(left.iter().map(|e| format!("an export {}:{} more", e.fabric, e.target)));
    out
}

/// Every export's world wide name; what isn't given follows from the names, so that it is the same next time.
pub(super) fn world_wide_names(order: &Order) -> Vec<Wwn> {
    let derived = |e: &ExportOrder| Wwn::derived(&[e.fabric.word(), order.name.as_str()]);
    order.exports.iter().map(|e| e.wwn.clone().unwrap_or_else(|| derived(e))).collect()
}

/// Waits until the daemon serves the device, or says why it doesn't.
fn wait_until_up(places: &Places, order: &Order, there: &Backstore) -> Result<LunState, Refusal> {
    let name = &order.name;
    let began = Instant::now();
    let mut pauses = luns::Pauses::new();
    loop {
        let state = places.run.read(name.as_str()).map_err(|e| Refusal::from("create", name, &e))?;
        match state.filter(|s| s.hba == there.hba) {
            Some(state) if state.state == Phase::Online => return Ok(state),
            Some(state) if state.state == Phase::Failed => {
                let reason = state.reason.unwrap_or_default();
                return Err(Refusal::new("create", name, reason).maybe_next(state.next));
            }
            // An image that takes long to open takes as long as it takes, as long as the daemon lives.
            Some(_) => {}
            None if began.elapsed() > NOTICE_PATIENCE => {
                return Err(Refusal::new("create", name, "the daemon hasn't noticed the device")
                    .then("look at the daemon's log"));
            }
            None => {}
        }
        if !places.tree.has_now(&there.path) {
            return Err(deleted_meanwhile(name));
        }
        places.daemon()?;
        pauses.wait();
    }
}

fn deleted_meanwhile(name: &Name) -> Refusal {
    Refusal::new("create", name, "somebody else has deleted it at the same time")
        .then(format!("see what there is: tcmu-dif show {name}"))
}

fn wait_for_disk(places: &Places, order: &Order, export: &Export) -> Result<ExportView, Refusal> {
    let address =
        fabric::scsi_address(&places.tree, export).map_err(|e| refused("create", &order.name, &e))?;
    let sysfs = Path::new(SYSFS);
    // Without sg there is a disk all the same.
    let want_sg = modules::load("sg").is_ok();
    let still_there = || places.tree.has_now(&export.lun_path());
    let disk = fabric::wait_for_disk(sysfs, &address, want_sg, DISK_PATIENCE, still_there).ok_or_else(|| {
        if !still_there() {
            return deleted_meanwhile(&order.name);
        }
        Refusal::new("create", &order.name, format!("no disk has come up at SCSI address {address}")).then(
            "see whether the disk driver is there: modprobe sd_mod; and look at the kernel's messages: dmesg",
        )
    })?;
    if let Err(e) = fabric::set_disk_timeout(sysfs, &address, DISK_TIMEOUT) {
        tracing::warn!("the disk's time limit: {e}");
    }
    let view = luns::view_of(export, Some(&disk));
    // devtmpfs makes the node a moment after sysfs shows the disk.
    let end = Instant::now() + DISK_PATIENCE;
    while view.device.as_ref().is_some_and(|d| !PathBuf::from(d).exists()) && Instant::now() < end {
        if !still_there() {
            return Err(deleted_meanwhile(&order.name));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(view)
}
