//! LUNs exported over NBD: QEMU's commands, of the old names and the new.

use serde_json::{Value, json};

use super::{Arguments, Command, NOTHING, done, find};
use crate::{
    control::{
        Registry,
        qmp::Error,
        schema::{Type, has, may},
        types, without_nulls,
    },
    export::{Address, Export, ExportError},
};

pub(super) const SERVER_START: Command = Command {
    name: "nbd-server-start",
    args: &[
        has("addr", Type::Object(&types::SOCKET_ADDRESS)),
        may("max-connections", Type::Int),
        may("tls-certificates", Type::Str),
    ],
    returns: NOTHING,
    help: "as in QEMU: an NBD server on a Unix socket, which its owner alone may use, or on a loopback address; with `tls-certificates`, the directory that \
           QEMU's `tls-creds-x509` has as its `dir`, on any address of the host's, and for clients alone that do TLS and show a certificate of its CA. \
           `max-connections` is 32 if it is left out or 0. Gone with the daemon",
    run: start,
    after: None,
};

pub(super) const SERVER_ADD: Command = Command {
    name: "nbd-server-add",
    args: &[
        has("device", Type::Str),
        may("name", Type::Str),
        may("description", Type::Str),
        may("writable", Type::Bool),
    ],
    returns: NOTHING,
    help: "as in QEMU, the older form of `block-export-add`; `device` is the LUN, and `name` is the export's id too",
    run: |luns, args| {
        let device = args.text("device")?;
        let name = args.maybe_text("name").unwrap_or(device);
        export(luns, args, device, name, name)
    },
    after: None,
};

pub(super) const SERVER_REMOVE: Command = Command {
    name: "nbd-server-remove",
    args: &[has("name", Type::Str), may("mode", Type::Enum(&types::EXPORT_REMOVE_MODE))],
    returns: NOTHING,
    help: "as in QEMU, the older form of `block-export-del`",
    run: |luns, args| {
        let name = args.text("name")?;
        let id = luns.exports().all().into_iter().find(|e| e.name == name).map(|e| e.id);
        remove(luns, &id.ok_or_else(|| refused(ExportError::NotFound(name.to_owned())))?, args)
    },
    after: None,
};

pub(super) const SERVER_STOP: Command = Command {
    name: "nbd-server-stop",
    args: &[],
    returns: NOTHING,
    help: "as in QEMU: the server ends with its exports and its clients",
    run: |luns, _| {
        luns.exports_gone(luns.exports().stop().map_err(refused)?);
        done()
    },
    after: None,
};

pub(super) const ADD: Command = Command {
    name: "block-export-add",
    args: &[
        has("type", Type::Enum(&types::EXPORT_TYPE)),
        has("id", Type::Str),
        has("node-name", Type::Str),
        may("name", Type::Str),
        may("description", Type::Str),
        may("writable", Type::Bool),
    ],
    returns: NOTHING,
    help: "as in QEMU: the LUN `node-name` is exported by the NBD server, by its name unless `name` is another, read-only unless `writable` is true; \
           with the context `base:allocation`. What is exported is the LUN as it is, and changes while others write to it",
    run: |luns, args| {
        let device = args.text("node-name")?;
        export(luns, args, device, args.text("id")?, args.maybe_text("name").unwrap_or(device))
    },
    after: None,
};

pub(super) const DEL: Command = Command {
    name: "block-export-del",
    args: &[has("id", Type::Str), may("mode", Type::Enum(&types::EXPORT_REMOVE_MODE))],
    returns: NOTHING,
    help: "as in QEMU: refused while clients use the export, unless `mode` is `hard`",
    run: |luns, args| remove(luns, args.text("id")?, args),
    after: None,
};

pub(super) const QUERY: Command = Command {
    name: "query-block-exports",
    args: &[],
    returns: Type::List(&Type::Object(&types::BLOCK_EXPORT_INFO)),
    help: "as in QEMU: what is exported over NBD; and `uri`, where clients find it",
    run: |luns, _| {
        let all = luns.exports().all();
        let told = |e: Export| {
            let uri = luns.exports().uri(&e.name);
            without_nulls(json!({
                "id": e.id, "type": "nbd", "node-name": e.device, "shutting-down": false, "uri": uri,
            }))
        };
        Ok(all.into_iter().map(told).collect())
    },
    after: None,
};

fn refused(e: ExportError) -> Error {
    Error::generic(e.to_string())
}

fn start(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let member = |name: &str| {
        let missing = || Error::generic(format!("Parameter 'addr.data.{name}' is missing"));
        args.within_two("addr", "data", name).ok_or_else(missing)
    };
    let certificates = args.maybe_text("tls-certificates").map(std::path::PathBuf::from);
    if let Some(dir) = certificates.as_ref().filter(|dir| !dir.is_absolute()) {
        return Err(Error::generic(format!("tls-certificates: '{}' is not an absolute path", dir.display())));
    }
    let address = match args.within("addr", "type") {
        Some("unix") => Address::Unix(member("path")?.into()),
        _ => Address::inet(member("host")?, member("port")?, certificates.is_some()).map_err(refused)?,
    };
    let most = args.maybe_number("max-connections").and_then(|n| usize::try_from(n).ok());
    luns.exports().start(address, most, certificates).map_err(refused)?;
    done()
}

fn export(luns: &Registry, args: &Arguments, device: &str, id: &str, name: &str) -> Result<Value, Error> {
    let export = Export {
        id: id.to_owned(),
        device: device.to_owned(),
        name: name.to_owned(),
        description: args.maybe_text("description").unwrap_or_default().to_owned(),
        writable: args.flag("writable"),
        lun: find(luns, device)?,
    };
    luns.exports().add(export).map_err(refused)?;
    done()
}

fn remove(luns: &Registry, id: &str, args: &Arguments) -> Result<Value, Error> {
    luns.exports().remove(id, args.maybe_text("mode") == Some("hard")).map_err(refused)?;
    luns.exports_gone(vec![id.to_owned()]);
    done()
}
