//! Snapshots of one LUN, in QEMU's words.

use serde_json::json;

use super::{
    super::{
        schema::{Member, Type, has, may},
        types::NEW_IMAGE_MODE,
    },
    Arguments, Command, NOTHING, done, find, told,
};
use crate::{
    control::{qmp::Error, types::SNAPSHOT_INFO},
    lun::{
        SnapshotInfo,
        jobs::{InternalOrder, JobOrder, SnapshotOrder},
    },
};

/// Those of QEMU's BlockdevSnapshotSync, but for the new node's name: there are no nodes without a LUN.
pub(super) const ARGUMENTS: &[Member] = &[
    may("device", Type::Str),
    may("node-name", Type::Str),
    has("snapshot-file", Type::Str),
    may("format", Type::Str),
    may("mode", Type::Enum(&NEW_IMAGE_MODE)),
];

/// `blockdev-snapshot-sync`.
pub(super) const TAKE: Command = Command {
    name: "blockdev-snapshot-sync",
    args: ARGUMENTS,
    returns: NOTHING,
    help: "as in QEMU: the LUN goes on with `snapshot-file`, an absolute path: a new qcow2 image whose backing file is the LUN's image \
           as it is at that moment, with its protection information; `mode` existing takes an empty one that is there. `device` or \
           `node-name` is the LUN's name",
    run: |luns, args| {
        let (device, order) = asked(args)?;
        told(find(luns, device)?.job(JobOrder::Snapshot(order)))?;
        done()
    },
    after: None,
};

/// Those of QEMU's BlockdevSnapshotInternal.
pub(super) const INTERNAL: &[Member] = &[has("device", Type::Str), has("name", Type::Str)];

/// `blockdev-snapshot-internal-sync`.
pub(super) const TAKE_WITHIN: Command = Command {
    name: "blockdev-snapshot-internal-sync",
    args: INTERNAL,
    returns: NOTHING,
    help: "as in QEMU: the LUN's qcow2 image keeps within itself, by that `name`, what the disk is at that moment; guests go on. It is durable \
           when this answers. `device` is the LUN's name",
    run: |luns, args| {
        let order = InternalOrder::Take(args.text("name")?.to_owned());
        told(find(luns, args.text("device")?)?.job(JobOrder::Internal(order)))?;
        done()
    },
    after: None,
};

/// `blockdev-snapshot-delete-internal-sync`.
pub(super) const DELETE_WITHIN: Command = Command {
    name: "blockdev-snapshot-delete-internal-sync",
    args: &[has("device", Type::Str), may("id", Type::Str), may("name", Type::Str)],
    returns: Type::Object(&SNAPSHOT_INFO),
    help: "as in QEMU: deletes the internal snapshot of that `id` and `name`, one of them at least, and tells of it; guests go on. `device` \
           is the LUN's name. Where a name occurs twice nothing is done, and the `id` says which",
    run: |luns, args| {
        let lun = find(luns, args.text("device")?)?;
        let (id, name) = (args.maybe_text("id"), args.maybe_text("name"));
        let which = match (id, name) {
            (Some(id), _) => format!("snapshot.id={id}"),
            (None, Some(name)) => format!("snapshot.name={name}"),
            (None, None) => return Err(Error::generic("Name or id must be provided")),
        };
        let layers = told(lun.describe())?;
        let fits =
            |s: &&SnapshotInfo| id.is_none_or(|id| s.id == id) && name.is_none_or(|name| s.name == name);
        let found = layers.first().and_then(|top| top.snapshots.iter().find(fits)).cloned();
        if let (None, Some(id), Some(name)) = (&found, id, name) {
            return Err(Error::generic(format!(
                "there is no snapshot with the ID '{id}' and the name '{name}'"
            )));
        }
        told(lun.job(JobOrder::Internal(InternalOrder::Delete(which))))?;
        Ok(json!(found))
    },
    after: None,
};

/// The name of a LUN, and the snapshot that is to be taken of it.
pub(super) fn asked(args: &Arguments) -> Result<(&str, SnapshotOrder), Error> {
    let device = match (args.maybe_text("device"), args.maybe_text("node-name")) {
        (Some(name), None) | (None, Some(name)) => name,
        _ => return Err(Error::generic("Cannot specify both or neither of 'device' and 'node-name'")),
    };
    match args.maybe_text("format") {
        None | Some("qcow2") => {}
        Some(other) => {
            return Err(Error::generic(format!(
                "format '{other}': an image with a backing file is a qcow2 image"
            )));
        }
    }
    let order = SnapshotOrder {
        file: args.text("snapshot-file")?.into(),
        existing: args.maybe_text("mode") == Some("existing"),
        ballot: None,
    };
    Ok((device, order))
}
