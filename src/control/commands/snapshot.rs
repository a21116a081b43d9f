//! Snapshots of one LUN, in QEMU's words.

use super::{
    super::{
        schema::{Member, Type, has, may},
        types::NEW_IMAGE_MODE,
    },
    Arguments, Command, NOTHING, done, find, told,
};
use crate::{
    control::qmp::Error,
    lun::jobs::{JobOrder, SnapshotOrder},
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
