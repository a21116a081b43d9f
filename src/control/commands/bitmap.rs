//! Dirty bitmaps, in QEMU's words. Their node is a LUN's, and has its name.

use serde_json::Value;

use super::{
    super::schema::{Member, Type, has, may},
    Arguments, Command, NOTHING, done, find, told,
};
use crate::{
    control::{Registry, qmp::Error},
    lun::jobs::{BITMAP_GRANULARITY, BitmapOrder, JobOrder},
};

/// BlockDirtyBitmap.
pub(super) const NAMED: &[Member] = &[has("node", Type::Str), has("name", Type::Str)];

/// BlockDirtyBitmapAdd.
pub(super) const ADDED: &[Member] = &[
    has("node", Type::Str),
    has("name", Type::Str),
    may("granularity", Type::Int),
    may("persistent", Type::Bool),
    may("disabled", Type::Bool),
];

/// BlockDirtyBitmapMerge.
pub(super) const MERGED: &[Member] =
    &[has("node", Type::Str), has("target", Type::Str), has("bitmaps", Type::List(&Type::Any))];

/// What the command of that name, or the action of a transaction, has done with a bitmap.
pub(super) fn order(command: &str, args: &Arguments) -> Result<BitmapOrder, Error> {
    let name = || args.text("name").map(str::to_owned);
    Ok(match command {
        "block-dirty-bitmap-add" => BitmapOrder::Add {
            name: name()?,
            granularity: args.maybe_number("granularity").unwrap_or(BITMAP_GRANULARITY),
            persistent: args.flag("persistent"),
            enabled: !args.flag("disabled"),
        },
        "block-dirty-bitmap-clear" => BitmapOrder::Clear(name()?),
        "block-dirty-bitmap-disable" => BitmapOrder::Enable(name()?, false),
        "block-dirty-bitmap-enable" => BitmapOrder::Enable(name()?, true),
        "block-dirty-bitmap-merge" => {
            let node = args.text("node")?;
            let listed = args.all().get("bitmaps").and_then(Value::as_array);
            let sources = listed.into_iter().flatten().map(|one| named(node, one));
            BitmapOrder::Merge {
                target: args.text("target")?.to_owned(),
                sources: sources.collect::<Result<_, _>>()?,
            }
        }
        "block-dirty-bitmap-remove" => BitmapOrder::Remove(name()?),
        other => return Err(Error::generic(format!("'{other}' does nothing with dirty bitmaps"))),
    })
}

fn ordered(luns: &Registry, command: &Command, args: &Arguments) -> Result<Value, Error> {
    let lun = find(luns, args.text("node")?)?;
    told(lun.job(JobOrder::Bitmap(order(command.name, args)?)))?;
    done()
}

/// `block-dirty-bitmap-add`.
pub(super) const ADD: Command = Command {
    name: "block-dirty-bitmap-add",
    args: ADDED,
    returns: NOTHING,
    help: "as in QEMU: marks from now on what is written to a LUN (`node` is its name), in granules of `granularity` bytes, 65536 if it is \
           left out. A `persistent` one is kept in a qcow2 image when the LUN stops in good order; after a crash it is inconsistent, and can \
           only be removed. Others are the LUN's until it stops",
    run: |luns, args| ordered(luns, &ADD, args),
    after: None,
};

/// `block-dirty-bitmap-clear`.
pub(super) const CLEAR: Command = Command {
    name: "block-dirty-bitmap-clear",
    args: NAMED,
    returns: NOTHING,
    help: "as in QEMU: nothing is marked in it any more",
    run: |luns, args| ordered(luns, &CLEAR, args),
    after: None,
};

/// `block-dirty-bitmap-disable`.
pub(super) const DISABLE: Command = Command {
    name: "block-dirty-bitmap-disable",
    args: NAMED,
    returns: NOTHING,
    help: "as in QEMU: what is written is not marked in it any more",
    run: |luns, args| ordered(luns, &DISABLE, args),
    after: None,
};

/// `block-dirty-bitmap-enable`.
pub(super) const ENABLE: Command = Command {
    name: "block-dirty-bitmap-enable",
    args: NAMED,
    returns: NOTHING,
    help: "as in QEMU: what is written is marked in it again",
    run: |luns, args| ordered(luns, &ENABLE, args),
    after: None,
};

/// `block-dirty-bitmap-merge`.
pub(super) const MERGE: Command = Command {
    name: "block-dirty-bitmap-merge",
    args: MERGED,
    returns: NOTHING,
    help: "as in QEMU: marks in `target` what is marked in `bitmaps`: names, or objects with `node` and `name`, of the same LUN. All of it or \
           nothing",
    run: |luns, args| ordered(luns, &MERGE, args),
    after: None,
};

/// BlockDirtyBitmapOrStr: a bitmap of that LUN.
pub(super) fn named(node: &str, one: &Value) -> Result<String, Error> {
    let text = |member: &str| one.get(member).and_then(Value::as_str);
    match (one.as_str(), text("node"), text("name")) {
        (Some(name), ..) => Ok(name.to_owned()),
        (None, Some(other), Some(name)) if other == node => Ok(name.to_owned()),
        (None, Some(other), Some(_)) => Err(Error::generic(format!(
            "node '{other}': a bitmap of another LUN than '{node}' cannot be used here"
        ))),
        _ => {
            Err(Error::generic("Invalid parameter type for 'bitmaps', expected: string or BlockDirtyBitmap"))
        }
    }
}

/// `block-dirty-bitmap-remove`.
pub(super) const REMOVE: Command = Command {
    name: "block-dirty-bitmap-remove",
    args: NAMED,
    returns: NOTHING,
    help: "as in QEMU: removes it; an inconsistent one too. The image forgets a persistent one when the LUN stops in good order",
    run: |luns, args| ordered(luns, &REMOVE, args),
    after: None,
};
