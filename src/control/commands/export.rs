//! LUNs exported over NBD: QEMU's commands, of the old names and the new.

use serde_json::{Value, json};

use super::{Arguments, Command, NOTHING, bitmap, done, find, mirror, told};
use crate::{
    control::{
        Registry,
        qmp::Error,
        schema::{Type, has, may},
        types, without_nulls,
    },
    export::{Address, Export, ExportError},
    lun::jobs::Expose,
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
        may("bitmap", Type::Str),
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
        may("bitmaps", Type::List(&Type::Any)),
        may("allocation-depth", Type::Bool),
    ],
    returns: NOTHING,
    help: "as in QEMU: the LUN `node-name` is exported by the NBD server, by its name unless `name` is another, read-only unless `writable` is true; \
           with the contexts `base:allocation`, `qemu:dirty-bitmap:NAME` of each of its `bitmaps` (names, or objects with `node` and `name`), and with \
           `allocation-depth` true `qemu:allocation-depth`. What is exported is the LUN as it is, and changes while others write to it; if `node-name` \
           is the id of a backup with `sync` none, and no LUN's name, it is the LUN as it was when that began, until the job ends: then reads fail. A \
           bitmap is busy while it is exported; it has to be disabled, unless the export is `writable` or it is the backup's own",
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
    luns.exports().is_there().map_err(refused)?;
    // A LUN's name comes first: one who means it is not to get the past.
    let backup = if luns.find(device).is_some() { None } else { mirror::lun_of(luns, device) };
    let (lun, node, moment_of) = match backup {
        Some((node, lun)) => (lun, node, Some(device.to_owned())),
        None => (find(luns, device)?, device.to_owned(), None),
    };
    let (writable, allocation_depth) = (args.flag("writable"), args.flag("allocation-depth"));
    if moment_of.is_some() && allocation_depth {
        return Err(Error::generic("'allocation-depth' is not known of a point in time: leave it out"));
    }
    let listed = args.all().get("bitmaps").and_then(Value::as_array).into_iter().flatten();
    let named = listed.map(|one| bitmap::named(&node, one));
    let mut bitmaps = named.collect::<Result<Vec<_>, _>>()?;
    bitmaps.extend(args.maybe_text("bitmap").map(str::to_owned));
    let expose = Expose { moment_of, bitmaps, writable };
    let export = Export {
        id: id.to_owned(),
        device: device.to_owned(),
        name: name.to_owned(),
        description: args.maybe_text("description").unwrap_or_default().to_owned(),
        writable,
        allocation_depth,
        lun: told(lun.expose(expose))?,
    };
    luns.exports().add(export).map_err(refused)?;
    done()
}

fn remove(luns: &Registry, id: &str, args: &Arguments) -> Result<Value, Error> {
    luns.exports().remove(id, args.maybe_text("mode") == Some("hard")).map_err(refused)?;
    luns.exports_gone(vec![id.to_owned()]);
    done()
}
