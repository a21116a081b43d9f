//! Whether a LUN could be made of a configuration string: what targetcli asks over D-Bus before it makes a device.
//!
//! The string is read by the daemon's own parser, and image and protection are looked at as `create` looks at them, so that what passes here is served,
//! and what is refused is refused in the same words. Nothing is made and nothing is changed: protection information that is missing is refused with the command
//! that makes it, since a restore of old settings must not take an image's blocks for good whose sidecar has been lost.

use std::path::{Path, PathBuf};

use super::{Refusal, create::look_at_image, order::Order};
use crate::{
    image::{nbd::is_uri, open::OpenError},
    kernel::{
        dif::{self, Dif},
        names::Name,
    },
    lun::{
        chain,
        config::{DeviceConfig, MAX_DEV_CONFIG, SUBTYPE, pi_word},
    },
    pi::{
        Exposure, Transfer,
        error::PiOpenErrorKind,
        store::default_path,
        tools::{self, StatusReport},
    },
    sys,
    units::BlockSize,
};

/// What the configuration string may hold, for people; targetcli prints it (`help create`).
pub const DESCRIPTION: &str = "/PATH/OF/IMAGE[;SETTING]...\n\
    The image is raw or qcow2; targetcli's size must be the disk's in it (tcmu-dif image info). Settings:\n\
    pi=type1|type2|type3   protection information for every block; the sidecar must be there (tcmu-dif pi rebuild)\n\
    sidecar=/PATH          where it is, if not in IMAGE.pi\n\
    pimode=bitmap|journal  how it stays true across a crash\n\
    exposure=initiator     initiators see it; transfer=interleaved: within the data\n\
    format=raw|qcow2       instead of looking\n\
    cache=none             past the host's page cache (O_DIRECT), where transfers are aligned\n\
    cpus=2-3               the processors that the LUN's thread runs on\n\
    cachesize=SIZE         memory for a qcow2 image's tables\n\
    copygroup=NAME         EXTENDED COPY to and from the other LUNs of the group\n\
    iops=N, bps=N and kin  limits, in QEMU's words; several settings, with ; between them\n\
    ro                     writes are refused\n\
    Write a blank as %20, a comma as %2c, a colon as %3a. Beside tcmu-runner add control=nl_reply_supported=-1.";

/// Looks at all of it: the string, the image, the protection. `sysfs` is /sys.
///
/// # Errors
/// The first thing that would keep the daemon from serving it.
pub fn check(dev_config: &str, sysfs: &Path) -> Result<DeviceConfig, Refusal> {
    let config = parse(dev_config)?;
    if config.exposure == Exposure::Initiator {
        let interleaved = config.transfer == Transfer::Interleaved;
        dif::may_expose(Dif::of_this_kernel(sysfs), interleaved).map_err(|e| {
            Refusal::from("exposure", config.exposure, &e)
                .then("leave exposure=initiator out, or add transfer=interleaved")
        })?;
    }
    let protection = protection(&config)?;
    match protection {
        Some(found) => {
            let block_size = BlockSize::new(found.info.block_size).unwrap_or(BlockSize::B512);
            look_at_image(&order(&config, block_size)?, &config)?;
        }
        // Nobody says what blocks it will have (hw_block_size=4096 stands in targetcli's control=).
        None => {
            if let Err(refusal) = look_at_image(&order(&config, BlockSize::B512)?, &config) {
                look_at_image(&order(&config, BlockSize::B4096)?, &config).map_err(|_| refusal)?;
            }
        }
    }
    Ok(config)
}

/// The string by itself.
fn parse(dev_config: &str) -> Result<DeviceConfig, Refusal> {
    let refuse = |why: String| Refusal::new("cfgstring", dev_config, why);
    let Some(text) = dev_config.strip_prefix(SUBTYPE).and_then(|t| t.strip_prefix('/')) else {
        return Err(refuse(format!("it does not begin with {SUBTYPE}/"))
            .then(format!("give {SUBTYPE}//PATH/OF/IMAGE")));
    };
    // The kernel's control file ends a value at a comma, rtslib refuses colons, and reads the string back up to a blank.
    if let Some(c) = text.chars().find(|c| matches!(c, ',' | ':') || c.is_whitespace() || c.is_control()) {
        let code = u32::from(c);
        let next = if c.is_ascii() {
            format!("write it as %{code:02x}")
        } else {
            "choose a path without it".to_owned()
        };
        return Err(refuse(format!("{c:?} gets lost on its way through the kernel and rtslib")).then(next));
    }
    if dev_config.len() > MAX_DEV_CONFIG {
        return Err(refuse(format!(
            "it has {} characters, and the kernel takes {MAX_DEV_CONFIG}",
            dev_config.len()
        ))
        .then("give the image a shorter path, with a symbolic link for instance"));
    }
    DeviceConfig::parse(text).map_err(|e| {
        refuse(e.to_string()).then("see what there is: help create, in targetcli's /backstores/user:dif")
    })
}

/// What `create` would be told for the same LUN.
pub(super) fn order(config: &DeviceConfig, block_size: BlockSize) -> Result<Order, Refusal> {
    Ok(Order {
        name: Name::new("check").map_err(|e| Refusal::new("cfgstring", config, e.to_string()))?,
        image: config.image.clone(),
        size: None,
        format: config.format,
        block_size,
        pi: config.pi,
        pi_mode: config.pi_mode,
        exposure: config.exposure,
        transfer: config.transfer,
        sidecar: config.sidecar.clone(),
        cache: config.cache,
        cpus: config.cpus.clone(),
        cache_size: config.cache_size,
        copy_group: config.copy_group.clone(),
        limits: config.limits,
        read_only: config.read_only,
        serial: config.serial.clone(),
        exports: Vec::new(),
    })
}

/// The protection information that is asked for, as it is.
fn protection(config: &DeviceConfig) -> Result<Option<StatusReport>, Refusal> {
    let Some(pi) = config.pi else { return Ok(None) };
    if !is_uri(&config.image) && config.image.symlink_metadata().is_err() {
        // What is wrong with the image is said first, and in its own words.
        return Ok(None);
    }
    let path: PathBuf = config.sidecar.clone().unwrap_or_else(|| default_path(&config.image));
    let (image, at) = (config.image.clone(), path.clone());
    let found = sys::run(async move |io| Ok::<_, OpenError>(tools::status(&io, &image, &at).await));
    let words = config.sidecar.as_ref().map_or(String::new(), |s| format!(" --sidecar {}", s.display()));
    let image = config.image.display();
    let refuse = |why: String| Refusal::new("pi", pi_word(pi), why);
    let found = found.map_err(|e| refuse(chain(&e)))?.map_err(|e| {
        let next = match &e.what {
            PiOpenErrorKind::Missing => {
                Some(format!("make it: tcmu-dif pi rebuild {image} --pi {}{words}", pi_word(pi)))
            }
            _ => e.next_step(),
        };
        refuse(chain(&e)).maybe_next(next)
    })?;
    let path = path.display();
    if found.info.pi != pi {
        let has = pi_word(found.info.pi);
        return Err(refuse(format!("{path} holds {has}")).then(format!("ask for pi={has}")));
    }
    if let Some(mode) = config.pi_mode.filter(|mode| *mode != found.info.mode) {
        let has = found.info.mode;
        return Err(Refusal::new("pimode", mode, format!("{path} is in mode {has}"))
            .then(format!("ask for pimode={has}")));
    }
    if found.image_changed == Some(true) {
        return Err(refuse(format!("{image} has been changed by something else since {path} was closed")).then(format!(
            "see which blocks differ: tcmu-dif pi verify {image}{words}; and take them as they are: tcmu-dif pi adopt {image}{words}"
        )));
    }
    Ok(Some(found))
}

#[cfg(test)]
#[path = "config_check_tests.rs"]
mod tests;
