//! The order for a LUN, whoever gives it: the words are the same on the command line (`--pi type1`), in a file of `luns.d`
//! (`pi = "type1"`) and over QMP (`"pi": "type1"`).

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::Deserialize;

use super::Refusal;
use crate::{
    image::{Format, direct::CacheMode, nbd::is_uri},
    kernel::{
        fabric::Fabric,
        names::{Name, Wwn},
    },
    lun::{
        config::{ConfigError, DeviceConfig, is_copy_group},
        cpus::Cpus,
        throttle::limits::Limits,
    },
    nbd::uri::Uri,
    pi::{Exposure, PiMode, PiType, Transfer},
    units::{BlockSize, parse_size},
};

/// An order for a LUN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The LUN's name.
    pub name: Name,
    /// The image.
    pub image: PathBuf,
    /// Make the image first, with so many bytes.
    pub size: Option<u64>,
    /// The image's format, rather than what its first bytes say.
    pub format: Option<Format>,
    /// Bytes of a block.
    pub block_size: BlockSize,
    /// Protection information for every block.
    pub pi: Option<PiType>,
    /// How it stays true across a crash; as the sidecar has it, if there is one.
    pub pi_mode: Option<PiMode>,
    /// Who reads and writes it.
    pub exposure: Exposure,
    /// How guests' protection information travels.
    pub transfer: Transfer,
    /// Where it is kept, instead of beside the image.
    pub sidecar: Option<PathBuf>,
    /// What lies between the image and its storage.
    pub cache: CacheMode,
    /// The processors that the LUN's thread runs on.
    pub cpus: Option<Cpus>,
    /// Bytes of memory for a qcow2 image's tables.
    pub cache_size: Option<u64>,
    /// The LUNs that it may be copied to and from by those who use it.
    pub copy_group: Option<String>,
    /// What its commands are limited to.
    pub limits: Limits,
    /// Writes are refused.
    pub read_only: bool,
    /// The disk's serial number; a random one if there is none.
    pub serial: Option<String>,
    /// Where it is exported.
    pub exports: Vec<ExportOrder>,
}

/// An order for an export: `vhost`, or `vhost:naa.5001405aa1b2c3d4`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOrder {
    /// The fabric.
    pub fabric: Fabric,
    /// The world wide name, if one is asked for.
    pub wwn: Option<Wwn>,
}

impl FromStr for ExportOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<ExportOrder, String> {
        let (fabric, wwn) = text.split_once(':').map_or((text, None), |(f, w)| (f, Some(w)));
        let fabric = Fabric::of(fabric).ok_or("the fabrics are loopback and vhost")?;
        let wwn = wwn.map(Wwn::new).transpose().map_err(|e| e.to_string())?;
        Ok(ExportOrder { fabric, wwn })
    }
}

impl fmt::Display for ExportOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.fabric.word())?;
        self.wwn.as_ref().map_or(Ok(()), |wwn| write!(f, ":{wwn}"))
    }
}

/// `raw` or `qcow2`.
///
/// # Errors
/// In words.
pub fn format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        _ => Err("the formats are raw and qcow2".to_owned()),
    }
}

/// `512` or `4096`.
///
/// # Errors
/// In words.
pub fn block_size(text: &str) -> Result<BlockSize, String> {
    let bytes = parse_size(text).ok().and_then(BlockSize::new);
    bytes.ok_or_else(|| "a block has 512 or 4096 bytes".to_owned())
}

/// `type1`, `type2` or `type3`.
///
/// # Errors
/// In words.
pub fn pi_type(text: &str) -> Result<PiType, String> {
    text.parse().map_err(|_| "the types of protection are type1, type2 and type3".to_owned())
}

/// The same, or `off`.
///
/// # Errors
/// In words.
pub fn pi(text: &str) -> Result<Option<PiType>, String> {
    if text == "off" {
        return Ok(None);
    }
    pi_type(text).map(Some).map_err(|_| "protection is off, type1, type2 or type3".to_owned())
}

/// `bitmap` or `journal`.
///
/// # Errors
/// In words.
pub fn pi_mode(text: &str) -> Result<PiMode, String> {
    text.parse().map_err(|_| "the modes of protection information are bitmap and journal".to_owned())
}

/// `iops=500,bps=100M`, or `off`.
///
/// # Errors
/// In words.
pub fn limits(text: &str) -> Result<Limits, String> {
    text.parse().map_err(|e: <Limits as FromStr>::Err| e.to_string())
}

/// A serial number that INQUIRY can tell.
///
/// # Errors
/// In words.
pub fn serial(text: &str) -> Result<String, String> {
    // SPC-5 7.7.15: ASCII graphic; the kernel takes 254.
    let graphic = text.bytes().all(|b| b.is_ascii_graphic());
    if text.is_empty() || text.len() > 64 || !graphic {
        return Err("a serial number has 1 to 64 letters, digits and signs, without blanks".to_owned());
    }
    Ok(text.to_owned())
}

/// The name of a copy group.
///
/// # Errors
/// In words.
pub fn copy_group(text: &str) -> Result<String, String> {
    if !is_copy_group(text) {
        return Err("a copy group's name has 1 to 64 printable characters".to_owned());
    }
    Ok(text.to_owned())
}

/// A size in bytes, or as people write it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    Text(String),
}

impl Size {
    fn text(&self) -> String {
        match self {
            Size::Bytes(bytes) => bytes.to_string(),
            Size::Text(text) => text.clone(),
        }
    }
}

/// The words of an order in a file or in a message: those of `tcmu-dif create`, without the dashes before them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Words {
    image: PathBuf,
    size: Option<Size>,
    format: Option<String>,
    block_size: Option<Size>,
    pi: Option<String>,
    pi_mode: Option<String>,
    exposure: Option<String>,
    pi_transfer: Option<String>,
    sidecar: Option<PathBuf>,
    cache: Option<String>,
    cpus: Option<String>,
    cache_size: Option<Size>,
    copy_group: Option<String>,
    throttle: Option<String>,
    #[serde(default)]
    read_only: bool,
    serial: Option<String>,
    #[serde(default)]
    export: Vec<String>,
}

impl Words {
    /// The order that they are, for a LUN of that name.
    ///
    /// # Errors
    /// The first word with a value that makes no sense.
    pub fn order(self, name: Name) -> Result<Order, Refusal> {
        fn one<T>(
            key: &str,
            text: Option<String>,
            parse: impl Fn(&str) -> Result<T, String>,
        ) -> Result<Option<T>, Refusal> {
            text.map(|t| parse(&t).map_err(|why| Refusal::usage(key, &t, why))).transpose()
        }
        // Neither a file nor a message has a folder that a path could begin in.
        for (key, path) in [("image", Some(&self.image)), ("sidecar", self.sidecar.as_ref())] {
            if let Some(path) = path.filter(|path| !(path.is_absolute() || key == "image" && is_uri(path))) {
                let why = "not an absolute path";
                return Err(Refusal::usage(key, path.display(), why).then("give it from the root on"));
            }
        }
        let size = |key, size: Option<Size>| one(key, size.map(|s| s.text()), parse_size);
        let export = |text: String| text.parse().map_err(|why: String| Refusal::usage("export", &text, why));
        Ok(Order {
            name,
            image: self.image,
            size: size("size", self.size)?,
            format: one("format", self.format, format)?,
            block_size: one("block-size", self.block_size.map(|s| s.text()), block_size)?
                .unwrap_or(BlockSize::B512),
            pi: one("pi", self.pi, pi)?.flatten(),
            pi_mode: one("pi-mode", self.pi_mode, pi_mode)?,
            exposure: one("exposure", self.exposure, |t| {
                t.parse().map_err(|e: <Exposure as FromStr>::Err| e.to_string())
            })?
            .unwrap_or_default(),
            transfer: one("pi-transfer", self.pi_transfer, |t| {
                t.parse().map_err(|e: <Transfer as FromStr>::Err| e.to_string())
            })?
            .unwrap_or_default(),
            sidecar: self.sidecar,
            cache: one("cache", self.cache, str::parse)?.unwrap_or_default(),
            cpus: one("cpus", self.cpus, str::parse)?,
            cache_size: size("cache-size", self.cache_size)?,
            copy_group: one("copy-group", self.copy_group, copy_group)?,
            limits: one("throttle", self.throttle, limits)?.unwrap_or_default(),
            read_only: self.read_only,
            serial: one("serial", self.serial, serial)?,
            exports: self.export.into_iter().map(export).collect::<Result<_, _>>()?,
        })
    }
}

impl Order {
    /// What the kernel and the daemon are to be told, as far as the words alone say.
    ///
    /// # Errors
    /// Words that contradict each other, and what does not fit into the kernel's configuration.
    pub fn config(&self) -> Result<DeviceConfig, Refusal> {
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|e| Refusal::usage("path", format!("{path:?}"), e.to_string()))
        };
        self.check()?;
        let image = if is_uri(&self.image) { self.image.clone() } else { absolute(&self.image)? };
        let config = DeviceConfig {
            image,
            // The longest word, for the check of the length; what the image is comes when it has been looked at.
            format: Some(self.format.unwrap_or(Format::Qcow2)),
            pi: self.pi,
            pi_mode: self.pi_mode,
            exposure: self.exposure,
            transfer: self.transfer,
            read_only: self.read_only,
            cache: self.cache,
            cpus: self.cpus.clone(),
            cache_size: self.cache_size,
            copy_group: self.copy_group.clone(),
            limits: self.limits,
            sidecar: self.sidecar.as_deref().map(absolute).transpose()?,
            serial: None,
        };
        config.dev_config().map_err(|e| {
            let next = match &e {
                ConfigError::TooLong(..) => {
                    "give the image a shorter path, with a symbolic link for instance, or set limits when the LUN is up"
                }
                _ => "choose another path",
            };
            Refusal::usage("--image", config.image.display(), e.to_string()).then(next)
        })?;
        Ok(config)
    }

    /// What an NBD export cannot be asked for.
    fn check_uri(&self) -> Result<(), Refusal> {
        let uri = self.image.to_str().map(Uri::parse);
        let path = self.image.display();
        match uri {
            Some(Ok(_)) => {}
            Some(Err(e)) => {
                return Err(Refusal::usage("--image", path, e.to_string())
                    .then("write it as nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=/PATH"));
            }
            None => return Err(Refusal::usage("--image", path, "it is no text")),
        }
        if let Some(size) = self.size {
            return Err(Refusal::usage("--size", size, "an NBD export is made by its server")
                .then("leave --size out"));
        }
        if self.format == Some(Format::Qcow2) {
            return Err(Refusal::usage("--format", Format::Qcow2, "an NBD export is used as it is, as raw")
                .then("have the server look into the qcow2 file: qemu-nbd does"));
        }
        if self.pi.is_some() && self.sidecar.is_none() {
            return Err(Refusal::usage(
                "--pi",
                path,
                "there is no place beside an NBD export for its protection information",
            )
            .then("say where on this host it is kept: --sidecar /PATH"));
        }
        Ok(())
    }

    /// Words that contradict each other.
    fn check(&self) -> Result<(), Refusal> {
        if is_uri(&self.image) {
            self.check_uri()?;
        }
        let block = self.block_size;
        if let Some(bytes) = self.size.filter(|s| !s.is_multiple_of(block.bytes())) {
            let up = bytes.next_multiple_of(block.bytes());
            return Err(Refusal::usage(
                "--size",
                bytes,
                format!("not a multiple of the block size of {block} bytes"),
            )
            .then(format!("choose --size {up}")));
        }
        if self.sidecar.is_some() && self.pi.is_none() {
            let path = self.sidecar.as_deref().unwrap_or(Path::new("")).display();
            return Err(Refusal::usage(
                "--sidecar",
                path,
                "there is no protection information to keep with --pi off",
            )
            .then("add --pi type1, or leave --sidecar out"));
        }
        if let Some(mode) = self.pi_mode.filter(|_| self.pi.is_none()) {
            let why = "there is no protection information to keep with --pi off";
            return Err(Refusal::usage("--pi-mode", mode, why).then("add --pi type1, or leave --pi-mode out"));
        }
        if self.exposure == Exposure::Initiator && self.pi.is_none() {
            return Err(Refusal::usage(
                "--exposure",
                self.exposure,
                "there is no protection information to show with --pi off",
            )
            .then("add --pi type1, or leave --exposure out"));
        }
        if self.transfer == Transfer::Interleaved && self.exposure == Exposure::Target {
            return Err(Refusal::usage(
                "--pi-transfer",
                self.transfer,
                "with --exposure target no protection information travels",
            )
            .then("add --exposure initiator, or leave --pi-transfer out"));
        }
        if self.size.is_some() && self.read_only {
            return Err(Refusal::usage("--read-only", "", "a new image that can't be written is of no use")
                .then("leave out --size or --read-only"));
        }
        for (i, export) in self.exports.iter().enumerate() {
            if self.exports[..i].contains(export) {
                return Err(Refusal::usage("--export", export, "it is there twice")
                    .then("give each export once, or each a world wide name of its own"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_a_fabric_and_perhaps_a_name() {
        let wwn = Some(Wwn::new("naa.5001405aa1b2c3d4").unwrap());
        assert_eq!("loopback".parse(), Ok(ExportOrder { fabric: Fabric::Loopback, wwn: None }));
        assert_eq!("vhost:naa.5001405AA1B2C3D4".parse(), Ok(ExportOrder { fabric: Fabric::Vhost, wwn }));
        for bad in ["", "iscsi", "vhost:", "vhost:5001405", "loopback:naa.1"] {
            assert!(bad.parse::<ExportOrder>().is_err(), "{bad}");
        }
    }

    #[test]
    fn serial_numbers_are_what_inquiry_can_say() {
        assert!(serial("abc-1").is_ok());
        for bad in ["", "a b", "é", &"x".repeat(65)] {
            assert!(serial(bad).is_err(), "{bad}");
        }
    }

    fn order(toml: &str) -> Result<Order, String> {
        let words: Words = toml::from_str(toml).map_err(|e| e.message().to_owned())?;
        words.order(Name::new("vm1").unwrap()).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_has_the_words_of_create() {
        let all = "image = '/a.qcow2'\nformat = 'qcow2'\nblock-size = 4096\npi = 'type1'\npi-mode = 'journal'\n\
                   exposure = 'initiator'\npi-transfer = 'interleaved'\nsidecar = '/a.pi'\ncache = 'none'\ncpus = '2-3'\ncache-size = '64M'\ncopy-group = 'g'\nthrottle = 'iops=500,bps=100M'\nread-only = true\n\
                   serial = 's1'\nexport = ['loopback', 'vhost:naa.5001405aa1b2c3d4']";
        let order = order(all).unwrap();
        assert_eq!(
            (order.block_size.bytes(), order.pi, order.pi_mode),
            (4096, Some(PiType::Type1), Some(PiMode::Journal))
        );
        assert_eq!((order.exposure, order.transfer), (Exposure::Initiator, Transfer::Interleaved));
        assert_eq!(
            (order.cache_size, order.read_only, order.serial.as_deref()),
            (Some(64 << 20), true, Some("s1"))
        );
        assert_eq!(order.cache, CacheMode::None);
        assert_eq!(order.cpus.as_ref().map(ToString::to_string).as_deref(), Some("2-3"));
        assert_eq!(order.copy_group.as_deref(), Some("g"));
        assert_eq!(order.limits.to_string(), "bps=104857600,iops=500");
        let exports: Vec<_> = order.exports.iter().map(ToString::to_string).collect();
        assert_eq!(exports, ["loopback", "vhost:naa.5001405aa1b2c3d4"]);
    }

    #[test]
    fn an_nbd_export_is_an_image_and_what_it_cannot_be_asked_for_is_refused() {
        let config = |image: &str, more: &str| {
            let words: Words = toml::from_str(&format!("image = \"{image}\"\n{more}")).unwrap();
            words.order(Name::new("vm1").unwrap()).unwrap().config()
        };
        let uri = "nbd+unix:///a%20disk?socket=/run/x";
        let made = config(uri, "pi = \"type1\"\nsidecar = \"/var/lib/x.pi\"").unwrap();
        assert_eq!(made.image.to_str(), Some(uri));
        // What the kernel keeps is read back as it was.
        let text = made.dev_config().unwrap();
        assert_eq!(DeviceConfig::parse(text.strip_prefix("dif/").unwrap()), Ok(made));
        let uri_tls = "nbds://store.example.com/vm1?tls-certificates=/etc/pki/x&tls-hostname=store";
        let text = config(uri_tls, "").unwrap().dev_config().unwrap();
        let read = DeviceConfig::parse(text.strip_prefix("dif/").unwrap()).unwrap();
        assert_eq!(read.image.to_str(), Some(uri_tls));
        for (image, more, word) in [
            (uri, "size = 512", "made by its server"),
            (uri, "format = \"qcow2\"", "as raw"),
            (uri, "pi = \"type1\"", "no place beside"),
            ("nbds://x/?tls-psk-file=/y", "", "pre-shared keys"),
            ("nbd+unix:///", "", "socket"),
            ("nbd://x/?retains=2M", "", "retains"),
        ] {
            let e = config(image, more).unwrap_err().in_one_line();
            assert!(e.contains(word), "{image} {more}: {e}");
        }
    }

    #[test]
    fn a_word_or_value_that_makes_no_sense_is_named() {
        for (toml, named) in [
            ("pi = 'type1'", "image"),
            ("image = '/a'\ncolour = 'red'", "colour"),
            ("image = '/a'\npi = 'type4'", "tcmu-dif: pi: type4: "),
            ("image = '/a'\nblock-size = 1000", "tcmu-dif: block-size: 1000: "),
            ("image = '/a'\nexport = ['iscsi']", "tcmu-dif: export: iscsi: "),
            ("image = '/a'\ncache-size = 'much'", "tcmu-dif: cache-size: much: "),
            ("image = '/a'\ncache = 'much'", "tcmu-dif: cache: much: the host's cache is writeback or none"),
            ("image = '/a'\ncpus = '3-1'", "tcmu-dif: cpus: 3-1: processors are given as"),
            ("image = '/a'\ncopy-group = ''", "tcmu-dif: copy-group: a copy group's name"),
            (
                "image = '/a'\nthrottle = 'iops=5,iops_rd=5'",
                "tcmu-dif: throttle: iops=5,iops_rd=5: iops and iops_rd cannot",
            ),
            ("image = '/a'\nserial = 'a b'", "tcmu-dif: serial: a b: "),
            ("image = 'a.raw'", "tcmu-dif: image: a.raw: not an absolute path"),
            ("image = '/a'\npi = 'type1'\nsidecar = 'a.pi'", "tcmu-dif: sidecar: a.pi: not an absolute path"),
        ] {
            let e = order(toml).unwrap_err();
            assert!(e.contains(named), "{toml}: {e}");
        }
    }
}
