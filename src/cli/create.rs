//! `tcmu-dif create`: from an image to a disk, or nothing at all.
//!
//! Everything that can be wrong is looked at before the kernel is touched, and everything that was made is taken down
//! again if a later step fails, the new image included. The same words a second time change nothing, and say so.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    CliError, Done,
    args::{Cli, Create, ExportArg},
    image::{self, Looked},
    luns::{self, DISK_TIMEOUT, ExportView, Places, SYSFS, refused},
    output, require_root, size,
};
use crate::{
    daemon::rundir::{LunState, Phase},
    image::Format,
    kernel::{
        backstore::{self, Backstore, Spec},
        dif::{self, Dif},
        fabric::{self, Export, Fabric},
        modules,
        names::{Name, Wwn},
        undo::Undo,
    },
    lun::config::{ConfigError, DeviceConfig, SUBTYPE, pi_word},
    pi::{Exposure, Transfer, store::default_path},
};

/// How long the daemon may take to notice a new device.
const NOTICE_PATIENCE: Duration = Duration::from_secs(120);
/// How long a disk may take to come up.
const DISK_PATIENCE: Duration = Duration::from_secs(60);

/// What `create` prints.
#[derive(Serialize)]
struct Created {
    name: String,
    image: String,
    format: Option<String>,
    serial: String,
    pi: &'static str,
    exposure: Exposure,
    transfer: Option<Transfer>,
    block_size: u64,
    capacity_bytes: u64,
    exports: Vec<ExportView>,
    created: bool,
}

/// Makes the LUN.
pub fn run(cli: &Cli, args: &Create) -> Done {
    let places = Places::of(cli);
    let config = check_words(args)?;
    let _turn = places.turn("create", &args.name)?;
    if let Some(there) = places.find("create", &args.name)? {
        return again(&places, args, &config, &there);
    }
    let looked = look_at_image(args, &config)?;
    let format = looked.as_ref().map_or(args.format.unwrap_or(Format::Raw), |l| l.format);
    let config = DeviceConfig { format: Some(format), ..config };
    require_root("create")?;
    places.daemon()?;
    let unready = |e: modules::ModuleError| {
        CliError::from("create", &args.name, &e).then("see what this host lacks: tcmu-dif check-host")
    };
    modules::mount_configfs(&cli.configfs).map_err(unready)?;
    modules::load("target_core_user").map_err(unready)?;
    if config.exposure == Exposure::Initiator {
        let interleaved = config.transfer == Transfer::Interleaved;
        dif::may_expose(Dif::of_this_kernel(Path::new("/sys")), interleaved)
            .map_err(|e| CliError::from("--exposure", config.exposure, &e).then(e.next_step()))?;
    }
    for export in &args.export {
        modules::load(export.fabric.module()).map_err(unready)?;
    }
    build(&places, args, &config, looked)
}

/// The words by themselves.
fn check_words(args: &Create) -> Result<DeviceConfig, CliError> {
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|e| CliError::usage("path", format!("{path:?}"), e.to_string()))
    };
    let block = args.block_size;
    if let Some(bytes) = args.size.filter(|s| !s.is_multiple_of(block.bytes())) {
        let up = bytes.next_multiple_of(block.bytes());
        return Err(CliError::usage(
            "--size",
            bytes,
            format!("not a multiple of the block size of {block} bytes"),
        )
        .then(format!("choose --size {up}")));
    }
    if args.sidecar.is_some() && args.pi.0.is_none() {
        let path = args.sidecar.as_deref().unwrap_or(Path::new("")).display();
        return Err(CliError::usage(
            "--sidecar",
            path,
            "there is no protection information to keep with --pi off",
        )
        .then("add --pi type1, or leave --sidecar out"));
    }
    if let Some(mode) = args.pi_mode.filter(|_| args.pi.0.is_none()) {
        let why = "there is no protection information to keep with --pi off";
        return Err(CliError::usage("--pi-mode", mode, why).then("add --pi type1, or leave --pi-mode out"));
    }
    if args.exposure == Exposure::Initiator && args.pi.0.is_none() {
        return Err(CliError::usage(
            "--exposure",
            args.exposure,
            "there is no protection information to show with --pi off",
        )
        .then("add --pi type1, or leave --exposure out"));
    }
    if args.pi_transfer == Transfer::Interleaved && args.exposure == Exposure::Target {
        return Err(CliError::usage(
            "--pi-transfer",
            args.pi_transfer,
            "with --exposure target no protection information travels",
        )
        .then("add --exposure initiator, or leave --pi-transfer out"));
    }
    if args.size.is_some() && args.read_only {
        return Err(CliError::usage("--read-only", "", "a new image that can't be written is of no use")
            .then("leave out --size or --read-only"));
    }
    for (i, export) in args.export.iter().enumerate() {
        if args.export[..i].contains(export) {
            let text = format!(
                "{}{}",
                export.fabric.word(),
                export.wwn.as_ref().map_or(String::new(), |w| format!(":{w}"))
            );
            return Err(CliError::usage("--export", text, "it is there twice")
                .then("give each export once, or each a world wide name of its own"));
        }
    }
    let config = DeviceConfig {
        image: absolute(&args.image)?,
        // The longest word, for the check of the length; what the image is comes when it has been looked at.
        format: Some(args.format.unwrap_or(Format::Qcow2)),
        pi: args.pi.0,
        pi_mode: args.pi_mode,
        exposure: args.exposure,
        transfer: args.pi_transfer,
        read_only: args.read_only,
        cache_size: args.cache_size,
        sidecar: args.sidecar.as_deref().map(absolute).transpose()?,
        serial: None,
    };
    config.dev_config().map_err(|e| {
        let next = match &e {
            ConfigError::TooLong(..) => "give the image a shorter path, with a symbolic link for instance",
            _ => "choose another path",
        };
        CliError::usage("--image", config.image.display(), e.to_string()).then(next)
    })?;
    Ok(config)
}

/// The image by itself; with `--size`, that there is room for a new one.
fn look_at_image(args: &Create, config: &DeviceConfig) -> Result<Option<Looked>, CliError> {
    let path = &config.image;
    let sidecar = config.sidecar.clone().unwrap_or_else(|| default_path(path));
    let sidecar_there = sidecar.symlink_metadata().is_ok();
    if args.size.is_some() {
        if path.symlink_metadata().is_ok() {
            return Err(CliError::new(
                "create",
                path.display(),
                "the image is there already, and --size makes a new one",
            )
            .then("leave --size out to use it as it is, or choose another path"));
        }
        if sidecar_there {
            return Err(CliError::new(
                "create",
                sidecar.display(),
                "protection information is there already, of an image that isn't",
            )
            .then(format!("remove it, or choose another path: rm {}", sidecar.display())));
        }
        return Ok(None);
    }
    let looked = image::look(path, args.read_only, args.block_size)?;
    if let Some(wanted) = args.format.filter(|f| *f != looked.format) {
        return Err(CliError::new("--format", wanted, format!("{} is {}", path.display(), looked.format))
            .then("leave --format out"));
    }
    if config.pi.is_none() && sidecar_there && !args.read_only {
        return Err(CliError::new(
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

/// A LUN of that name is there: the same, or another.
fn again(places: &Places, args: &Create, config: &DeviceConfig, there: &Backstore) -> Done {
    let name = &args.name;
    let exports = fabric::of(&places.tree, there).map_err(|e| refused("create", name, &e))?;
    let differences = differences(args, config, there, &exports);
    if !differences.is_empty() {
        return Err(CliError::new(
            "create",
            name,
            format!("it is there already, with {}", differences.join(", ")),
        )
        .then(format!("choose another name, or delete it first: tcmu-dif delete {name}")));
    }
    let views = exports.iter().map(|e| luns::view(&places.tree, e)).collect();
    let state = places.state("create", name.as_str())?;
    print(args, there, config, views, state, false)
}

/// In what a LUN differs from the words, as it is.
fn differences(args: &Create, config: &DeviceConfig, there: &Backstore, exports: &[Export]) -> Vec<String> {
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
            let mode = |ro| if ro { "read-only" } else { "writable" }.to_owned();
            differ("access", mode(is.read_only), mode(config.read_only));
        }
        _ => differ("configuration", there.dev_config.clone(), config.to_string()),
    }
    differ("--block-size", there.block_size.to_string(), args.block_size.to_string());
    if let Some(size) = args.size {
        differ("--size", there.capacity.to_string(), size.to_string());
    }
    if let Some(serial) = &args.serial {
        differ("--serial", there.serial.clone(), serial.clone());
    }
    let mut left: Vec<&Export> = exports.iter().collect();
    // Those with a name first: one without takes any that is left.
    let (named, unnamed): (Vec<_>, Vec<_>) = args.export.iter().partition(|e| e.wwn.is_some());
    for wanted in named.into_iter().chain(unnamed) {
        let fits = |e: &&Export| {
            e.kind() == Some(wanted.fabric) && wanted.wwn.as_ref().is_none_or(|w| w.as_str() == e.target)
        };
        match left.iter().position(fits) {
            Some(at) => {
                left.remove(at);
            }
            None => out.push(format!("no export {}{}", wanted.fabric.word(), wwn_text(wanted))),
        }
    }
    out.extend(left.iter().map(|e| format!("an export {}:{} more", e.fabric, e.target)));
    out
}

fn wwn_text(export: &ExportArg) -> String {
    export.wwn.as_ref().map_or(String::new(), |w| format!(":{w}"))
}

fn build(places: &Places, args: &Create, config: &DeviceConfig, looked: Option<Looked>) -> Done {
    let name = &args.name;
    let failed = |e: backstore::ConfigfsError| refused("create", name, &e);
    let mut undo = Undo::new(&places.tree);
    let capacity = match (looked, args.size) {
        (Some(looked), _) => looked.capacity,
        (None, size) => {
            let size = size.unwrap_or(0);
            image::create_new(&config.image, args.format.unwrap_or(Format::Raw), size)?;
            let path = config.image.clone();
            undo.note("the new image", move || fs::remove_file(path));
            size
        }
    };
    protect(config, args, &mut undo)?;
    // Undone between the device and the files: the daemon closes them before they are removed.
    undo.note("the daemon's hold on the image", || luns::wait_until_closed(places, name.as_str(), None));
    let spec = Spec {
        name: name.clone(),
        dev_config: config.dev_config().map_err(|e| CliError::from("create", name, &e))?,
        capacity,
        block_size: args.block_size,
        serial: args.serial.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string()),
        write_cache: true,
    };
    let path = backstore::create(&places.tree, &spec, &mut undo).map_err(failed)?;
    let there = backstore::find(&places.tree, SUBTYPE, name.as_str()).map_err(failed)?;
    let there = there.filter(|b| b.path == path).ok_or_else(|| {
        CliError::new("create", name, "another `create` of the same name was faster").then("tcmu-dif list")
    })?;
    let state = wait_until_up(places, args, &there)?;
    let mut views = Vec::new();
    for (export, wwn) in args.export.iter().zip(world_wide_names(args)) {
        let made = fabric::create(&places.tree, &path, export.fabric, &wwn, &mut undo).map_err(|e| {
            if e.source.kind() == std::io::ErrorKind::AlreadyExists {
                let text = format!("{}:{wwn}", export.fabric.word());
                return CliError::new("--export", text, "another target has that world wide name")
                    .then(format!("choose one: --export {}:naa.5001405XXXXXXXXX", export.fabric.word()));
            }
            failed(e)
        })?;
        views.push(match export.fabric {
            Fabric::Vhost => luns::view_of(&made, None),
            Fabric::Loopback => wait_for_disk(places, args, &made)?,
        });
    }
    undo.keep();
    print(args, &there, config, views, Some(state), true)
}

/// Every export's world wide name; what isn't given follows from the names, so that it is the same next time.
fn world_wide_names(args: &Create) -> Vec<Wwn> {
    let derived = |e: &ExportArg| Wwn::derived(&[e.fabric.word(), args.name.as_str()]);
    args.export.iter().map(|e| e.wwn.clone().unwrap_or_else(|| derived(e))).collect()
}

/// Makes the protection information of an image that has none yet.
fn protect(config: &DeviceConfig, args: &Create, undo: &mut Undo<'_>) -> Result<(), CliError> {
    let Some(pi) = config.pi else { return Ok(()) };
    let sidecar = config.sidecar.clone().unwrap_or_else(|| default_path(&config.image));
    if sidecar.symlink_metadata().is_ok() {
        // The daemon opens it, and says what is wrong with it.
        return Ok(());
    }
    super::pi::protect(&config.image, &sidecar, pi, config.pi_mode.unwrap_or_default(), args.block_size)?;
    undo.note("the new sidecar", move || fs::remove_file(sidecar));
    Ok(())
}

/// Waits until the daemon serves the device, or says why it doesn't.
fn wait_until_up(places: &Places, args: &Create, there: &Backstore) -> Result<LunState, CliError> {
    let name = &args.name;
    let began = Instant::now();
    // Many that wait at the same time must not keep the daemon from its work.
    let mut pause = Duration::from_millis(5);
    loop {
        let state = places.run.read(name.as_str()).map_err(|e| CliError::from("create", name, &e))?;
        match state.filter(|s| s.hba == there.hba) {
            Some(state) if state.state == Phase::Online => return Ok(state),
            Some(state) if state.state == Phase::Failed => {
                let reason = state.reason.unwrap_or_default();
                return Err(CliError::new("create", name, reason).maybe_next(state.next));
            }
            // An image that takes long to open takes as long as it takes, as long as the daemon lives.
            Some(_) => {}
            None if began.elapsed() > NOTICE_PATIENCE => {
                return Err(CliError::new("create", name, "the daemon hasn't noticed the device")
                    .then("look at the daemon's log"));
            }
            None => {}
        }
        if !places.tree.has_now(&there.path) {
            return Err(deleted_meanwhile(name));
        }
        places.daemon()?;
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(Duration::from_millis(300));
    }
}

fn deleted_meanwhile(name: &Name) -> CliError {
    CliError::new("create", name, "somebody else has deleted it at the same time")
        .then(format!("see what there is: tcmu-dif show {name}"))
}

fn wait_for_disk(places: &Places, args: &Create, export: &Export) -> Result<ExportView, CliError> {
    let address =
        fabric::scsi_address(&places.tree, export).map_err(|e| refused("create", &args.name, &e))?;
    let sysfs = Path::new(SYSFS);
    // Without sg there is a disk all the same.
    let want_sg = modules::load("sg").is_ok();
    let still_there = || places.tree.has_now(&export.lun_path());
    let disk = fabric::wait_for_disk(sysfs, &address, want_sg, DISK_PATIENCE, still_there).ok_or_else(|| {
        if !still_there() {
            return deleted_meanwhile(&args.name);
        }
        CliError::new("create", &args.name, format!("no disk has come up at SCSI address {address}")).then(
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
            return Err(deleted_meanwhile(&args.name));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(view)
}

fn print(
    args: &Create,
    there: &Backstore,
    config: &DeviceConfig,
    exports: Vec<ExportView>,
    state: Option<LunState>,
    created: bool,
) -> Done {
    let out = Created {
        name: args.name.to_string(),
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
    };
    if args.json.json {
        return output::json(&out);
    }
    let is = if created { "is up" } else { "is there already, as asked" };
    let format = out.format.map(|f| format!("{f}, ")).unwrap_or_default();
    let mut text = format!(
        "{} {is}: {} ({format}{}, blocks of {}, protection {})",
        out.name,
        out.image,
        size::human(out.capacity_bytes),
        out.block_size,
        out.pi
    );
    for e in &out.exports {
        match (&e.device, &e.libvirt, &e.qemu) {
            (Some(device), ..) => text.push_str(&format!("\n{} {}: {device}", e.fabric, e.wwn)),
            (None, Some(xml), Some(args)) => {
                text.push_str(&format!(
                    "\n{} {}, for libvirt:\n{xml}\nor for QEMU:\n{args}",
                    e.fabric, e.wwn
                ));
            }
            _ => text.push_str(&format!("\n{} {}", e.fabric, e.wwn)),
        }
    }
    output::print(&text)
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
