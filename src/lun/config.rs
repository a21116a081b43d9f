//! What a LUN is told through the kernel's `dev_config`: the image, and how to use it.
//!
//! The string after the subtype (`dif/`) is the absolute path (or an NBD URI), then `;`-separated settings: `;format=qcow2`, `;pi=type1`,
//! `;pimode=journal`, `;exposure=initiator`, `;transfer=interleaved`, `;ro`, `;cache=none`, `;cachesize=64M`, `;cpus=2-3`, `;sidecar=PATH`, `;serial=S`, and the limits' words ([`super::throttle::limits`]), `;iops=500`. In values, `;`, `%`, `,` (the kernel splits its `control` file there), control characters
//! and bytes that are no UTF-8 are percent-encoded, so that what is printed is parsed back to the same. Written by
//! `create`, read by the daemon; a person may write it by hand.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use thiserror::Error;

use super::{
    cpus::Cpus,
    throttle::limits::{Limits, LimitsError},
};
pub use crate::image::direct::CacheMode;
use crate::{
    image::{Format, nbd::is_uri},
    pi::{Exposure, PiMode, PiType, Transfer},
    units::parse_size,
};

/// Our subtype: the first part of `dev_config`.
pub const SUBTYPE: &str = "dif";

/// Characters that fit in the kernel's `dev_config` (TCMU_CONFIG_LEN is 256, and one is the terminating zero; what is
/// longer would be cut off silently).
pub const MAX_DEV_CONFIG: usize = 255;

/// One LUN's settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// The image, an absolute path or an NBD URI.
    pub image: PathBuf,
    /// The image's format. Without it the first bytes decide at every start, and a guest of a raw image may not write what
    /// looks like another format there.
    pub format: Option<Format>,
    /// Protection information at rest.
    pub pi: Option<PiType>,
    /// How it stays true across a crash, if that is asked for; otherwise as its sidecar has it.
    pub pi_mode: Option<PiMode>,
    /// Who sees it.
    pub exposure: Exposure,
    /// How it travels to those who do.
    pub transfer: Transfer,
    /// The LUN refuses writes.
    pub read_only: bool,
    /// What lies between the image and its storage.
    pub cache: CacheMode,
    /// The processors that its thread runs on; any if none are given.
    pub cpus: Option<Cpus>,
    /// Bytes of qcow2 metadata held in memory, for the whole chain; the driver's own measure if it is not given.
    pub cache_size: Option<u64>,
    /// The LUNs of the daemon that have the same one may be copied between by whoever uses one of them; without it a LUN is
    /// copied from and to by its own users alone.
    pub copy_group: Option<String>,
    /// What its commands are limited to at first.
    pub limits: Limits,
    /// The sidecar's path, where it isn't beside the image.
    pub sidecar: Option<PathBuf>,
    /// The serial number, unless the kernel's `wwn/vpd_unit_serial` has one.
    pub serial: Option<String>,
}

/// Why a `dev_config` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    /// There is no path, or it is relative.
    #[error("the image's path {0:?} is not absolute")]
    NotAbsolute(PathBuf),
    /// A setting that isn't known.
    #[error("unknown setting {0:?}")]
    Unknown(String),
    /// A setting that is known, with a value that isn't.
    #[error("{value:?} is no value for {key}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What it was set to.
        value: String,
    },
    /// A setting that means nothing without another.
    #[error("{0} has no meaning without {1}")]
    Without(&'static str, &'static str),
    /// A setting that stands there twice.
    #[error("{0} is set twice")]
    Twice(&'static str),
    /// Limits that make no sense.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// A percent sign without two hexadecimal digits after it, or text that is none.
    #[error("{0:?} is not percent-encoded text")]
    Encoding(String),
    /// Too long for the kernel.
    #[error("the device's configuration has {0} characters, and the kernel takes {MAX_DEV_CONFIG}: {1}")]
    TooLong(usize, String),
}

impl DeviceConfig {
    /// The settings of an image that is writable and unprotected.
    pub fn new(image: impl Into<PathBuf>) -> DeviceConfig {
        DeviceConfig {
            image: image.into(),
            format: None,
            pi: None,
            pi_mode: None,
            exposure: Exposure::Target,
            transfer: Transfer::Separate,
            read_only: false,
            cache: CacheMode::Writeback,
            cpus: None,
            cache_size: None,
            copy_group: None,
            limits: Limits::default(),
            sidecar: None,
            serial: None,
        }
    }

    /// Parses what stands after `dif/`.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the part that is wrong.
    pub fn parse(text: &str) -> Result<DeviceConfig, ConfigError> {
        let mut parts = text.split(';');
        let image = image(parts.next().unwrap_or_default())?;
        let mut out = DeviceConfig::new(image);
        let (mut exposure, mut transfer, mut cache) = (None, None, None);
        let mut limits: Vec<(String, u64)> = Vec::new();
        for part in parts {
            let (key, value) = part.split_once('=').map_or((part, None), |(k, v)| (k, Some(v)));
            match (key, value) {
                ("format", Some(v)) => {
                    let unknown = ConfigError::Value { key: "format", value: v.to_owned() };
                    once("format", &mut out.format, v.parse().map_err(|_| unknown)?)?;
                }
                ("pi", Some(v)) => {
                    let kind = pi_type(v).ok_or(ConfigError::Value { key: "pi", value: v.to_owned() })?;
                    once("pi", &mut out.pi, kind)?;
                }
                ("pimode", Some(v)) => {
                    let unknown = ConfigError::Value { key: "pimode", value: v.to_owned() };
                    once("pimode", &mut out.pi_mode, v.parse().map_err(|_| unknown)?)?;
                }
                ("exposure", Some(v)) => {
                    let unknown = ConfigError::Value { key: "exposure", value: v.to_owned() };
                    once("exposure", &mut exposure, v.parse().map_err(|_| unknown)?)?;
                }
                ("transfer", Some(v)) => {
                    let unknown = ConfigError::Value { key: "transfer", value: v.to_owned() };
                    once("transfer", &mut transfer, v.parse().map_err(|_| unknown)?)?;
                }
                ("ro", None) if out.read_only => return Err(ConfigError::Twice("ro")),
                ("ro", None) => out.read_only = true,
                ("cache", Some(v)) => {
                    let unknown = |_| ConfigError::Value { key: "cache", value: v.to_owned() };
                    once("cache", &mut cache, v.parse().map_err(unknown)?)?;
                }
                ("cpus", Some(v)) => {
                    let wrong = || ConfigError::Value { key: "cpus", value: v.to_owned() };
                    let text = String::from_utf8(decode(v)?).map_err(|_| wrong())?;
                    once("cpus", &mut out.cpus, text.parse().map_err(|_| wrong())?)?;
                }
                ("cachesize", Some(v)) => {
                    let unknown = |_| ConfigError::Value { key: "cachesize", value: v.to_owned() };
                    once("cachesize", &mut out.cache_size, parse_size(v).map_err(unknown)?)?;
                }
                ("copygroup", Some(v)) => {
                    let group = String::from_utf8(decode(v)?).ok().filter(|g| is_copy_group(g));
                    let wrong = ConfigError::Value { key: "copygroup", value: v.to_owned() };
                    once("copygroup", &mut out.copy_group, group.ok_or(wrong)?)?;
                }
                (word, Some(v)) if Limits::is_word(word) => {
                    if limits.iter().any(|(there, _)| there == word) {
                        return Err(LimitsError::Twice(word.to_owned()).into());
                    }
                    limits.push((word.to_owned(), Limits::value(word, v)?));
                }
                ("sidecar", Some(v)) => once("sidecar", &mut out.sidecar, path(v)?)?,
                ("serial", Some(v)) => {
                    let serial = String::from_utf8(decode(v)?)
                        .map_err(|_| ConfigError::Value { key: "serial", value: v.to_owned() })?;
                    if serial.is_empty() {
                        return Err(ConfigError::Value { key: "serial", value: serial });
                    }
                    once("serial", &mut out.serial, serial)?;
                }
                _ => return Err(ConfigError::Unknown(part.to_owned())),
            }
        }
        out.limits = Limits::of(limits)?;
        out.exposure = exposure.unwrap_or_default();
        out.transfer = transfer.unwrap_or_default();
        out.cache = cache.unwrap_or_default();
        if out.pi_mode.is_some() && out.pi.is_none() {
            return Err(ConfigError::Without("pimode", "pi"));
        }
        if out.exposure == Exposure::Initiator && out.pi.is_none() {
            return Err(ConfigError::Without("exposure=initiator", "pi"));
        }
        if out.transfer == Transfer::Interleaved && out.exposure == Exposure::Target {
            return Err(ConfigError::Without("transfer=interleaved", "exposure=initiator"));
        }
        Ok(out)
    }

    /// The kernel's `dev_config`, subtype included.
    ///
    /// # Errors
    /// Paths that aren't absolute, and what is longer than the kernel keeps.
    pub fn dev_config(&self) -> Result<String, ConfigError> {
        for path in std::iter::once(&self.image).chain(&self.sidecar) {
            if !(path.is_absolute() || path == &self.image && is_uri(path)) {
                return Err(ConfigError::NotAbsolute(path.clone()));
            }
        }
        let text = format!("{SUBTYPE}/{self}");
        if text.len() > MAX_DEV_CONFIG {
            return Err(ConfigError::TooLong(text.len(), text));
        }
        Ok(text)
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(self.image.as_os_str().as_bytes()))?;
        if let Some(format) = self.format {
            write!(f, ";format={format}")?;
        }
        if let Some(pi) = self.pi {
            write!(f, ";pi={}", pi_word(pi))?;
        }
        if let Some(mode) = self.pi_mode {
            write!(f, ";pimode={mode}")?;
        }
        if self.exposure != Exposure::Target {
            write!(f, ";exposure={}", self.exposure)?;
        }
        if self.transfer != Transfer::Separate {
            write!(f, ";transfer={}", self.transfer)?;
        }
        if self.read_only {
            f.write_str(";ro")?;
        }
        if self.cache != CacheMode::Writeback {
            write!(f, ";cache={}", self.cache)?;
        }
        if let Some(cpus) = &self.cpus {
            write!(f, ";cpus={}", encode(cpus.to_string().as_bytes()))?;
        }
        if let Some(bytes) = self.cache_size {
            write!(f, ";cachesize={bytes}")?;
        }
        if let Some(group) = &self.copy_group {
            write!(f, ";copygroup={}", encode(group.as_bytes()))?;
        }
        for (word, value) in self.limits.words() {
            write!(f, ";{word}={value}")?;
        }
        if let Some(sidecar) = &self.sidecar {
            write!(f, ";sidecar={}", encode(sidecar.as_os_str().as_bytes()))?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ";serial={}", encode(serial.as_bytes()))?;
        }
        Ok(())
    }
}

/// Whether that can be the name of a copy group: 1 to 64 printable characters.
pub fn is_copy_group(name: &str) -> bool {
    !name.is_empty() && name.len() <= 64 && !name.chars().any(char::is_control)
}

/// The word for a type, on the command line and in `dev_config`.
pub fn pi_word(pi: PiType) -> &'static str {
    match pi {
        PiType::Type1 => "type1",
        PiType::Type2 => "type2",
        PiType::Type3 => "type3",
    }
}

fn pi_type(word: &str) -> Option<PiType> {
    PiType::ALL.into_iter().find(|p| pi_word(*p) == word)
}

fn once<T>(key: &'static str, slot: &mut Option<T>, value: T) -> Result<(), ConfigError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ConfigError::Twice(key)),
    }
}

fn image(text: &str) -> Result<PathBuf, ConfigError> {
    let name = PathBuf::from(OsString::from_vec(decode(text)?));
    if is_uri(&name) { Ok(name) } else { path(text) }
}

fn path(text: &str) -> Result<PathBuf, ConfigError> {
    let path = PathBuf::from(OsString::from_vec(decode(text)?));
    if Path::is_absolute(&path) { Ok(path) } else { Err(ConfigError::NotAbsolute(path)) }
}

/// Percent-encodes what may not stand in a value.
fn encode(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            if matches!(c, ';' | '%' | ',') || c.is_ascii_control() {
                out.push_str(&format!("%{:02x}", c as u32));
            } else {
                out.push(c);
            }
        }
        for b in chunk.invalid() {
            out.push_str(&format!("%{b:02x}"));
        }
    }
    out
}

fn decode(text: &str) -> Result<Vec<u8>, ConfigError> {
    let bad = || ConfigError::Encoding(text.to_owned());
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b != b'%' {
            out.push(b);
            continue;
        }
        let mut digit = || bytes.next().and_then(|d| char::from(d).to_digit(16)).ok_or_else(bad);
        out.push((digit()? * 16 + digit()?) as u8);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_path() -> impl Strategy<Value = PathBuf> {
        proptest::collection::vec(1u8..=255, 0..40).prop_map(|mut v| {
            v.insert(0, b'/');
            PathBuf::from(OsString::from_vec(v))
        })
    }

    fn protection() -> impl Strategy<Value = (Option<PiType>, Exposure, Transfer)> {
        let kinds = prop::sample::select(PiType::ALL.to_vec());
        prop_oneof![
            Just((None, Exposure::Target, Transfer::Separate)),
            kinds.clone().prop_map(|k| (Some(k), Exposure::Target, Transfer::Separate)),
            kinds.clone().prop_map(|k| (Some(k), Exposure::Initiator, Transfer::Separate)),
            kinds.prop_map(|k| (Some(k), Exposure::Initiator, Transfer::Interleaved)),
        ]
    }

    prop_compose! {
        fn any_config()(
            image in prop_oneof![
                8 => any_path(),
                1 => "nbd://[a-z%;,&=]{1,20}".prop_map(PathBuf::from),
            ],
            format in prop::option::of(prop::sample::select(vec![Format::Raw, Format::Qcow2])),
            (pi, exposure, transfer) in protection(),
            mode in prop::option::of(prop::sample::select(vec![PiMode::Bitmap, PiMode::Journal])),
            read_only: bool,
            cache in prop::sample::select(vec![CacheMode::Writeback, CacheMode::None]),
            cpus in prop::option::of(prop::sample::select(vec!["0", "1,3-5", "1023"])),
            cache_size in prop::option::of(1..1u64 << 50),
            copy_group in prop::option::of("[a-z;%, é]{1,20}"),
            sidecar in prop::option::of(any_path()),
            limits in prop::sample::select(vec!["off", "iops=5", "bps_rd=1M,bps_wr=2M,bps_wr_max=3M,iops=5,iops_size=4096"]),
            serial in prop::option::of("\\PC{1,20}|[;%,=\n]{1,5}"),
        ) -> DeviceConfig {
            let pi_mode = mode.filter(|_| pi.is_some());
            let limits = limits.parse().unwrap();
            let cpus = cpus.map(|cpus| cpus.parse().unwrap());
            DeviceConfig {
                image, format, pi, pi_mode, exposure, transfer, read_only, cache, cpus, cache_size, copy_group, limits, sidecar,
                serial,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed_back(config in any_config()) {
            prop_assert_eq!(DeviceConfig::parse(&config.to_string()), Ok(config));
        }

        #[test]
        fn what_is_printed_survives_the_kernels_separators(config in any_config()) {
            prop_assert!(!config.to_string().contains([',', '\n', '\0']));
        }

        #[test]
        fn any_text_is_parsed_or_refused_without_a_panic(text in "\\PC{0,60}|/[a-z;=%0-9]{0,60}") {
            let _ = DeviceConfig::parse(&text);
        }
    }

    #[test]
    fn every_wrong_part_is_named() {
        use ConfigError::*;
        for (text, error) in [
            ("", NotAbsolute("".into())),
            ("vm1.raw", NotAbsolute("vm1.raw".into())),
            ("/a;pi=type4", Value { key: "pi", value: "type4".into() }),
            ("/a;pi", Unknown("pi".into())),
            ("/a;pi=type1;exposure=all", Value { key: "exposure", value: "all".into() }),
            ("/a;pi=type1;pimode=fast", Value { key: "pimode", value: "fast".into() }),
            ("/a;pimode=journal", Without("pimode", "pi")),
            ("/a;exposure=initiator", Without("exposure=initiator", "pi")),
            ("/a;pi=type1;transfer=interleaved", Without("transfer=interleaved", "exposure=initiator")),
            ("/a;ro;ro", Twice("ro")),
            ("/a;pi=type1;pi=type1", Twice("pi")),
            ("/a;sidecar=b", NotAbsolute("b".into())),
            ("/a;cache=some", Value { key: "cache", value: "some".into() }),
            ("/a;cache=none;cache=none", Twice("cache")),
            ("/a;cpus=3-1", Value { key: "cpus", value: "3-1".into() }),
            ("/a;cachesize=0", Value { key: "cachesize", value: "0".into() }),
            ("/a;cachesize=1M;cachesize=1M", Twice("cachesize")),
            ("/a;copygroup=", Value { key: "copygroup", value: String::new() }),
            ("/a;copygroup=%0a", Value { key: "copygroup", value: "%0a".into() }),
            ("/a;iops=5;iops=5", Limits(LimitsError::Twice("iops".into()))),
            ("/a;iops_max=5", Limits(LimitsError::Without("iops_max".into(), "iops".into()))),
            ("/a;serial=", Value { key: "serial", value: String::new() }),
            ("/a;colour=red", Unknown("colour=red".into())),
            ("/a;", Unknown(String::new())),
            ("/a%4", Encoding("/a%4".into())),
            ("/a%zz", Encoding("/a%zz".into())),
        ] {
            assert_eq!(DeviceConfig::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_configuration_that_the_kernel_would_cut_off_is_refused() {
        let fits = DeviceConfig::new(format!("/{}", "a".repeat(MAX_DEV_CONFIG - "dif//".len())));
        assert_eq!(fits.dev_config().unwrap().len(), MAX_DEV_CONFIG);
        let longer = DeviceConfig { read_only: true, ..fits };
        assert!(matches!(longer.dev_config(), Err(ConfigError::TooLong(258, _))));
    }
}
