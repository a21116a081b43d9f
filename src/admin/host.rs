//! What those who ask over QMP want of the daemon itself: LUNs made and taken down, the kernel's part of a resize, and its end.

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use rustix::process::{Signal, getpid, kill_process};
use serde_json::{Map, Value, json};

use super::{
    Admin, Refusal,
    order::Words,
    receive::NewImage,
    require_root,
    way::{Address, Certificates, Listener},
};
use crate::{
    control::{
        Comes, Host, Incoming, Progress, Registry, To,
        qmp::{Class, Error},
    },
    daemon::resize::{ResizeError, resize},
    kernel::{SYSFS, backstore, names::Name},
    lun::{chain, config::SUBTYPE},
};

impl Host for Admin {
    fn resize(&self, device: &str, bytes: u64) -> Result<(), Error> {
        let places = &self.places;
        let found = backstore::find(&places.tree, SUBTYPE, device).map_err(|e| Error::generic(chain(&e)))?;
        let store = found.ok_or_else(|| {
            Error::new(
                Class::DeviceNotFound,
                format!("LUN '{device}' is not in configfs: it is being removed"),
            )
        })?;
        resize(&places.tree, Path::new(SYSFS), &places.run, &store, bytes).map_err(|e| {
            let next = match &e {
                ResizeError::NotMultiple { up, .. } => format!("choose {up}"),
                ResizeError::Kernel(_) => "look at the kernel's messages: dmesg".to_owned(),
                _ => "look at the daemon's log".to_owned(),
            };
            Error::generic(format!("LUN '{device}' cannot have {bytes} bytes: {}: {next}", chain(&e)))
        })
    }

    fn add(&self, device: &str, mut words: Map<String, Value>) -> Result<Value, Error> {
        words.remove("device");
        let name = name_of(device)?;
        let words: Words = serde_json::from_value(Value::Object(words))
            .map_err(|e| Error::generic(format!("LUN '{device}' cannot be made: {e}")))?;
        let order = words.order(name).map_err(|e| told(&e))?;
        let made = self.create(&order).map_err(|e| told(&e))?;
        serde_json::to_value(&made).map_err(|e| Error::generic(e.to_string()))
    }

    fn del(&self, device: &str, force: bool) -> Result<Value, Error> {
        let gone = self.delete(&name_of(device)?, force).map_err(|e| told(&e))?;
        serde_json::to_value(&gone).map_err(|e| Error::generic(e.to_string()))
    }

    fn hand_over(
        &self,
        luns: &Registry,
        device: &str,
        to: &To<'_>,
        progress: &dyn Progress,
    ) -> Result<Value, Error> {
        let storage = to.blk;
        let (to, with) = way(to)?;
        let image = luns.find(device).filter(|_| storage).map(|lun| lun.made().config.image.clone());
        let given = Admin::hand_over(self, luns, &name_of(device)?, &to, (with.as_ref(), storage), progress);
        let given = given.map_err(|e| told(&e))?;
        Ok(json!({
            "device": device, "uri": to.to_string(), "answered": given.made.is_some(),
            "left": given.left.map(|left| left.reason), "image": image,
        }))
    }

    fn listen(&self, from: &To<'_>, comes: &Comes<'_>) -> Result<Box<dyn Incoming>, Error> {
        require_root("migrate-incoming").map_err(|e| told(&e))?;
        let name = comes.device.map(name_of).transpose()?;
        let image = new_image(comes)?;
        let (at, with) = way(from)?;
        let listener = at.listen(with.as_ref());
        let listener = listener.map_err(|e| Error::generic(format!("uri: {at}: {e}")))?;
        Ok(Box::new(Listening { admin: self.clone(), listener, name, image }))
    }

    fn quit(&self) {
        // The signal itself, so that there is one way to end.
        if let Err(e) = kill_process(getpid(), Signal::TERM) {
            tracing::error!("quit: {e}");
        }
    }
}

/// Where the other side is, and what shows who it is.
fn way(To { uri, certificates, hostname, .. }: &To<'_>) -> Result<(Address, Option<Certificates>), Error> {
    let to: Address = uri.parse().map_err(|why| Error::generic(format!("uri: {uri}: {why}")))?;
    let with = Certificates::of(&to, certificates.map(PathBuf::from), hostname.map(str::to_owned));
    with.map(|with| (to, with)).map_err(|why| Error::generic(format!("tls-certificates: {why}")))
}

/// One who listens for a source.
struct Listening {
    admin: Admin,
    listener: Listener,
    name: Option<Name>,
    image: Option<NewImage>,
}

/// Where the image of a LUN is made that comes with its storage.
fn new_image(comes: &Comes<'_>) -> Result<Option<NewImage>, Error> {
    let format = comes.format.map(str::parse).transpose();
    let format = format.map_err(|e| Error::generic(format!("format: {e}")))?;
    match comes.image {
        Some(at) if at.starts_with('/') => Ok(Some(NewImage { at: at.into(), format })),
        Some(at) => Err(Error::generic(format!("image: {at}: the path is not absolute"))),
        None if format.is_some() => Err(Error::generic("format: give the new image's path too: image")),
        None => Ok(None),
    }
}

impl Incoming for Listening {
    fn take(&mut self, stop: &AtomicBool, comes: &dyn Fn(&str) -> bool) -> Result<bool, Error> {
        let connection = self.listener.accept_unless(stop);
        let connection = connection.map_err(|e| Error::generic(format!("who listens for a source: {e}")))?;
        let Some(mut connection) = connection else { return Ok(false) };
        let came = self.admin.receive(&mut connection, self.name.as_ref(), self.image.as_ref(), comes);
        came.map(|_| true).map_err(|e| {
            tracing::error!("no LUN has come: {}", e.in_one_line());
            told(&e)
        })
    }
}

fn name_of(device: &str) -> Result<Name, Error> {
    Name::new(device).map_err(|e| Error::generic(format!("device: {device}: {e}")))
}

fn told(e: &Refusal) -> Error {
    Error::generic(e.in_one_line())
}
