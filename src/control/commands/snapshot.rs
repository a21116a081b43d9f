//! Snapshots, of one LUN or of several in a transaction, in QEMU's words.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    super::{
        schema::{Member, Type, has, may, object},
        types::NEW_IMAGE_MODE,
    },
    Arguments, Command, NOTHING, done, find, told,
};
use crate::{
    control::{
        Registry,
        qmp::Error,
        schema::{Enum, Object},
    },
    lun::{
        Remote,
        jobs::{Ballot, JobOrder, SnapshotOrder},
    },
};

/// Those of QEMU's BlockdevSnapshotSync, but for the new node's name: there are no nodes without a LUN.
const ARGUMENTS: &[Member] = &[
    may("device", Type::Str),
    may("node-name", Type::Str),
    has("snapshot-file", Type::Str),
    may("format", Type::Str),
    may("mode", Type::Enum(&NEW_IMAGE_MODE)),
];

/// The actions of a transaction that we have (TransactionActionKind).
static ACTION: Enum = Enum { name: "TransactionActionKind", values: &["blockdev-snapshot-sync"] };

static SNAPSHOT: Object = object("BlockdevSnapshotSync", ARGUMENTS);
static SNAPSHOT_WRAPPER: Object =
    object("BlockdevSnapshotSyncWrapper", &[has("data", Type::Object(&SNAPSHOT))]);

/// TransactionAction: which members `data` has the kind says.
static TRANSACTION_ACTION: Object = Object {
    name: "TransactionAction",
    members: &[has("type", Type::Enum(&ACTION))],
    variants: Some(("type", &[("blockdev-snapshot-sync", &SNAPSHOT_WRAPPER)])),
};

static ACTIONS: Type = Type::Object(&TRANSACTION_ACTION);

/// TransactionProperties. No action of ours has a job that could be completed together with others.
static COMPLETION_MODE: Enum = Enum { name: "ActionCompletionMode", values: &["individual", "grouped"] };
static PROPERTIES: Object =
    object("TransactionProperties", &[may("completion-mode", Type::Enum(&COMPLETION_MODE))]);

/// `blockdev-snapshot-sync`.
pub(super) const TAKE: Command = Command {
    name: "blockdev-snapshot-sync",
    args: ARGUMENTS,
    returns: NOTHING,
    help: "as in QEMU: the LUN goes on with `snapshot-file`, an absolute path: a new qcow2 image whose backing file is the LUN's image \
           as it is at that moment, with its protection information; `mode` existing takes an empty one that is there. `device` or \
           `node-name` is the LUN's name",
    run: |luns, args| {
        let (lun, order) = asked(luns, args.all(), None)?;
        told(lun.job(JobOrder::Snapshot(order)))?;
        done()
    },
    after: None,
};

/// `transaction`.
pub(super) const TRANSACTION: Command = Command {
    name: "transaction",
    args: &[has("actions", Type::List(&ACTIONS)), may("properties", Type::Object(&PROPERTIES))],
    returns: NOTHING,
    help: "as in QEMU: carries out all `actions` or none, across `kill -9` too, and all at one point in time: commands of all LUNs are \
           held back before the first snapshot is taken",
    run: transaction,
    after: None,
};

/// A LUN and the snapshot that is to be taken of it.
fn asked(
    luns: &Registry,
    args: &Map<String, Value>,
    ballot: Option<Arc<Ballot>>,
) -> Result<(Remote, SnapshotOrder), Error> {
    let text = |name: &str| args.get(name).and_then(Value::as_str);
    let device = match (text("device"), text("node-name")) {
        (Some(name), None) | (None, Some(name)) => name,
        _ => return Err(Error::generic("Cannot specify both or neither of 'device' and 'node-name'")),
    };
    let lun = find(luns, device)?;
    match text("format") {
        None | Some("qcow2") => {}
        Some(other) => {
            return Err(Error::generic(format!(
                "format '{other}': an image with a backing file is a qcow2 image"
            )));
        }
    }
    let order = SnapshotOrder {
        file: text("snapshot-file").unwrap_or_default().into(),
        existing: text("mode") == Some("existing"),
        ballot,
    };
    Ok((lun, order))
}

fn transaction(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let actions = args.all().get("actions").and_then(Value::as_array);
    let actions: Vec<&Map<String, Value>> =
        actions.into_iter().flatten().filter_map(|action| action.get("data")?.as_object()).collect();
    let ballot = Ballot::of(actions.len());
    let orders = actions
        .iter()
        .map(|action| asked(luns, action, Some(ballot.clone())))
        .collect::<Result<Vec<_>, Error>>()?;
    if orders.is_empty() {
        return done();
    }
    for (at, (lun, _)) in orders.iter().enumerate() {
        if orders[..at].iter().any(|(other, _)| other.is_same(lun)) {
            return Err(Error::generic("a LUN can be in a transaction once"));
        }
    }
    // Each LUN answers for itself; what came of it all is the vote's to say, whatever each of them says first.
    let (carried, told_by) = std::thread::scope(|scope| {
        let waiting: Vec<_> = orders
            .into_iter()
            .map(|(lun, order)| {
                let ballot = ballot.clone();
                scope.spawn(move || {
                    let answer = told(lun.job(JobOrder::Snapshot(order)));
                    if let Err(e) = &answer {
                        // One that is not there takes no part.
                        ballot.refuse(&e.desc);
                    }
                    answer
                })
            })
            .collect();
        let carried = ballot.carry();
        (carried, waiting.into_iter().filter_map(|one| one.join().ok()).collect::<Vec<_>>())
    });
    match carried {
        Ok(()) => told_by.into_iter().find_map(Result::err).map_or_else(done, Err),
        Err(reason) => Err(Error::generic(reason)),
    }
}
