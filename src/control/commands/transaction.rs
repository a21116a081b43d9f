//! Transactions, in QEMU's words: snapshots over images and within them, backups and what is done with dirty bitmaps, of several LUNs at one point in time, all or nothing.

use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};

use super::{
    super::schema::{Enum, Member, Object, Type, has, may, object},
    Arguments, Command, NOTHING, backup, bitmap, done, find, snapshot, told,
};
use crate::{
    control::{Registry, qmp::Error},
    lun::{
        Remote,
        jobs::{Act, Ballot, Group, JobOrder, PartOrder, SnapshotOrder},
    },
};

/// Transactions come one after the other: two that wait for each other's LUNs would hold both back.
static TURN: Mutex<()> = Mutex::new(());

/// The actions that we have (TransactionActionKind).
static ACTION: Enum = Enum {
    name: "TransactionActionKind",
    values: &[
        "abort",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "blockdev-backup",
        "blockdev-snapshot-internal-sync",
        "blockdev-snapshot-sync",
        "drive-backup",
    ],
};

/// Declares what an action of a kind has: its `data` is what the command of that name is given.
macro_rules! actions {
    ($($data:ident, $wrapper:ident = $name:literal, $wrapped:literal, $members:expr;)*) => {$(
        static $data: Object = object($name, $members);
        static $wrapper: Object = object($wrapped, &[has("data", Type::Object(&$data))]);
    )*};
}

actions! {
    ABORT, ABORT_WRAPPER = "Abort", "AbortWrapper", &[];
    ADD, ADD_WRAPPER = "BlockDirtyBitmapAdd", "BlockDirtyBitmapAddWrapper", bitmap::ADDED;
    NAMED, NAMED_WRAPPER = "BlockDirtyBitmap", "BlockDirtyBitmapWrapper", bitmap::NAMED;
    MERGE, MERGE_WRAPPER = "BlockDirtyBitmapMerge", "BlockDirtyBitmapMergeWrapper", bitmap::MERGED;
    BLOCKDEV_BACKUP, BLOCKDEV_BACKUP_WRAPPER = "BlockdevBackup", "BlockdevBackupWrapper", backup::TO_A_NODE;
    INTERNAL, INTERNAL_WRAPPER = "BlockdevSnapshotInternal", "BlockdevSnapshotInternalWrapper", snapshot::INTERNAL;
    SNAPSHOT, SNAPSHOT_WRAPPER = "BlockdevSnapshotSync", "BlockdevSnapshotSyncWrapper", snapshot::ARGUMENTS;
    DRIVE_BACKUP, DRIVE_BACKUP_WRAPPER = "DriveBackup", "DriveBackupWrapper", backup::TO_A_FILE;
}

/// TransactionAction: which members `data` has the kind says.
static TRANSACTION_ACTION: Object = Object {
    name: "TransactionAction",
    members: &[has("type", Type::Enum(&ACTION))],
    variants: Some((
        "type",
        &[
            ("abort", &ABORT_WRAPPER),
            ("block-dirty-bitmap-add", &ADD_WRAPPER),
            ("block-dirty-bitmap-clear", &NAMED_WRAPPER),
            ("block-dirty-bitmap-disable", &NAMED_WRAPPER),
            ("block-dirty-bitmap-enable", &NAMED_WRAPPER),
            ("block-dirty-bitmap-merge", &MERGE_WRAPPER),
            ("block-dirty-bitmap-remove", &NAMED_WRAPPER),
            ("blockdev-backup", &BLOCKDEV_BACKUP_WRAPPER),
            ("blockdev-snapshot-internal-sync", &INTERNAL_WRAPPER),
            ("blockdev-snapshot-sync", &SNAPSHOT_WRAPPER),
            ("drive-backup", &DRIVE_BACKUP_WRAPPER),
        ],
    )),
};

static ACTIONS: Type = Type::Object(&TRANSACTION_ACTION);

/// TransactionProperties.
static COMPLETION_MODE: Enum = Enum { name: "ActionCompletionMode", values: &["individual", "grouped"] };
static PROPERTIES: Object =
    object("TransactionProperties", &[may("completion-mode", Type::Enum(&COMPLETION_MODE))]);

const ARGUMENTS: &[Member] =
    &[has("actions", Type::List(&ACTIONS)), may("properties", Type::Object(&PROPERTIES))];

/// `transaction`.
pub(super) const TRANSACTION: Command = Command {
    name: "transaction",
    args: ARGUMENTS,
    returns: NOTHING,
    help: "as in QEMU: carries out all `actions` or none, and all at one point in time: commands of all LUNs are held back before the \
           first is carried out. Of each LUN in the order in which they stand. Snapshots hold across `kill -9` too, all or none, but for internal \
           ones. A LUN can have one snapshot over its image, alone, or one backup and whatever of internal snapshots and dirty bitmaps. With `completion-mode` grouped all backups are \
           cancelled if one fails or is cancelled",
    run: transaction,
    after: None,
};

/// What is to be done with one LUN.
struct Part {
    name: String,
    lun: Remote,
    snapshot: Option<SnapshotOrder>,
    acts: Vec<Act>,
}

impl Part {
    /// The name of its backup.
    fn job(&self) -> Option<&str> {
        self.acts.iter().find_map(|act| match act {
            Act::Backup(order) => Some(order.id.as_str()),
            Act::Bitmap(_) | Act::Internal(_) => None,
        })
    }

    fn order(self, ballot: &Arc<Ballot>, group: Option<&Arc<Group>>) -> (Remote, JobOrder) {
        let ballot = ballot.clone();
        let order = match self.snapshot {
            Some(snapshot) => JobOrder::Snapshot(SnapshotOrder { ballot: Some(ballot), ..snapshot }),
            None => {
                let (lun, acts) = (self.name, self.acts);
                JobOrder::Part(Box::new(PartOrder { lun, acts, ballot, group: group.cloned() }))
            }
        };
        (self.lun, order)
    }
}

/// One action.
enum Action {
    Snapshot(SnapshotOrder),
    Act(Act),
}

/// The parts of a transaction, by LUN, in the order in which the LUNs come up.
#[derive(Default)]
struct Parts(Vec<Part>);

impl Parts {
    fn add(&mut self, name: &str, lun: Remote, action: Action) -> Result<(), Error> {
        if let Action::Act(Act::Backup(order)) = &action
            && self.0.iter().any(|part| part.job() == Some(&order.id) && !part.lun.is_same(&lun))
        {
            return Err(Error::generic(format!("Job ID '{}' already in use", order.id)));
        }
        let at = self.0.iter().position(|part| part.lun.is_same(&lun));
        let at = at.unwrap_or_else(|| {
            self.0.push(Part { name: name.to_owned(), lun, snapshot: None, acts: Vec::new() });
            self.0.len() - 1
        });
        let part = &mut self.0[at];
        let refused = |words: &str| Err(Error::generic(format!("LUN '{name}': {words}")));
        match (&action, &part.snapshot) {
            (Action::Snapshot(_), Some(_)) => refused("a LUN can have a snapshot in a transaction once"),
            (Action::Act(Act::Backup(_)), None) if part.job().is_some() => {
                refused("a LUN can have a backup in a transaction once")
            }
            (Action::Act(_), Some(_)) => refused(NOT_WITH_A_SNAPSHOT),
            (Action::Snapshot(_), None) if !part.acts.is_empty() => refused(NOT_WITH_A_SNAPSHOT),
            _ => {
                match action {
                    Action::Snapshot(order) => part.snapshot = Some(order),
                    Action::Act(act) => part.acts.push(act),
                }
                Ok(())
            }
        }
    }
}

const NOT_WITH_A_SNAPSHOT: &str = "a snapshot over its image and something else of one LUN cannot be in one transaction, because its dirty bitmaps go \
                                   with the old image: make two of it";

fn transaction(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let actions = args.all().get("actions").and_then(Value::as_array);
    let (mut parts, mut aborted) = (Parts::default(), None);
    for action in actions.into_iter().flatten() {
        let kind = action.get("type").and_then(Value::as_str).unwrap_or_default();
        let data = action.get("data").and_then(Value::as_object).cloned().unwrap_or_default();
        if kind == "abort" {
            aborted = Some("Transaction aborted using Abort action");
            continue;
        }
        let (name, lun, action) = asked(luns, kind, data)?;
        parts.add(&name, lun, action)?;
    }
    carry_out(parts, args.within("properties", "completion-mode") == Some("grouped"), aborted)
}

/// A LUN, and what is to be done with it.
fn asked(luns: &Registry, kind: &str, data: Map<String, Value>) -> Result<(String, Remote, Action), Error> {
    let args = Arguments(data);
    let of = |name: &str, action| Ok((name.to_owned(), find(luns, name)?, action));
    match kind {
        "blockdev-snapshot-sync" => {
            let (name, order) = snapshot::asked(&args)?;
            of(name, Action::Snapshot(order))
        }
        "blockdev-snapshot-internal-sync" => {
            of(args.text("device")?, Action::Act(Act::Internal(args.text("name")?.to_owned())))
        }
        "drive-backup" | "blockdev-backup" => {
            let device = args.text("device")?;
            // Its name would be free otherwise.
            find(luns, device)?;
            let order = match kind {
                "drive-backup" => backup::to_a_file(luns, &args)?,
                _ => backup::to_a_node(luns, &args)?,
            };
            of(device, Action::Act(Act::Backup(Box::new(order))))
        }
        _ => of(args.text("node")?, Action::Act(Act::Bitmap(bitmap::order(kind, &args)?))),
    }
}

/// Has all LUNs do their parts, or none; none if it is `aborted`.
fn carry_out(Parts(parts): Parts, grouped: bool, aborted: Option<&str>) -> Result<Value, Error> {
    if parts.is_empty() {
        return aborted.map_or_else(done, |reason| Err(Error::generic(reason)));
    }
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let ballot = Ballot::of(parts.len());
    let group = grouped.then(|| Group::of(parts.iter().filter(|part| part.job().is_some()).count()));
    // Each LUN answers for itself; what came of it all is the vote's to say, whatever each of them says first.
    let (carried, told_by) = std::thread::scope(|scope| {
        let waiting: Vec<_> = parts
            .into_iter()
            .map(|part| {
                let ((lun, order), ballot) = (part.order(&ballot, group.as_ref()), ballot.clone());
                scope.spawn(move || {
                    let answer = told(lun.job(order));
                    if let Err(e) = &answer {
                        // One that is not there takes no part.
                        ballot.refuse(&e.desc);
                    }
                    answer
                })
            })
            .collect();
        let carried = ballot.carry(aborted);
        // Nobody waits for another LUN any more.
        drop(turn);
        (carried, waiting.into_iter().filter_map(|one| one.join().ok()).collect::<Vec<_>>())
    });
    match carried {
        Ok(()) => told_by.into_iter().find_map(Result::err).map_or_else(done, Err),
        Err(reason) => Err(Error::generic(reason)),
    }
}
