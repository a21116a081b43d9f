//! What those who ask over QMP want of the daemon itself: LUNs made and taken down, the kernel's part of a resize, and its end.

use std::path::{Path, PathBuf};

use rustix::process::{Signal, getpid, kill_process};
use serde_json::{Map, Value, json};

use super::{
    Admin, Refusal,
    order::Words,
    way::{Address, Certificates},
};
use crate::{
    control::{
        Host, Registry, To,
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

    fn hand_over(&self, luns: &Registry, device: &str, to: &To<'_>) -> Result<Value, Error> {
        let To { uri, certificates, hostname } = to;
        let to: Address = uri.parse().map_err(|why| Error::generic(format!("uri: {uri}: {why}")))?;
        let with = Certificates::of(&to, certificates.map(PathBuf::from), hostname.map(str::to_owned))
            .map_err(|why| Error::generic(format!("tls-certificates: {why}")))?;
        let given =
            Admin::hand_over(self, luns, &name_of(device)?, &to, with.as_ref()).map_err(|e| told(&e))?;
        Ok(json!({
            "device": device, "uri": to.to_string(), "answered": given.made.is_some(),
            "left": given.left.map(|left| left.reason),
        }))
    }

    fn quit(&self) {
        // The signal itself, so that there is one way to end.
        if let Err(e) = kill_process(getpid(), Signal::TERM) {
            tracing::error!("quit: {e}");
        }
    }
}

fn name_of(device: &str) -> Result<Name, Error> {
    Name::new(device).map_err(|e| Error::generic(format!("device: {device}: {e}")))
}

fn told(e: &Refusal) -> Error {
    Error::generic(e.in_one_line())
}
