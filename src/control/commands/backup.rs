//! Backups, in QEMU's words.

use serde_json::Value;

use super::{
    super::{
        schema::{Member, Type, has, may},
        types::{BITMAP_SYNC_MODE, NEW_IMAGE_MODE, ON_ERROR, SYNC_MODE},
    },
    Arguments, Command, NOTHING, done, find,
    mirror::{format, new_id, settings, sync},
    told,
};
use crate::{
    control::{Registry, qmp::Error},
    lun::jobs::{BackupOrder, BitmapMode, JobOrder, Settings, SyncMode, Task, names_an_image},
};

/// Those of QEMU's DriveBackup, but for `compress`, `encrypt`, `filter-node-name` and what is unstable there; `sidecar` and `scratch` are ours.
pub(super) const TO_A_FILE: &[Member] = &[
    may("job-id", Type::Str),
    has("device", Type::Str),
    has("target", Type::Str),
    may("format", Type::Str),
    has("sync", Type::Enum(&SYNC_MODE)),
    may("mode", Type::Enum(&NEW_IMAGE_MODE)),
    may("bitmap", Type::Str),
    may("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
    may("speed", Type::Int),
    may("share", Type::Int),
    may("on-source-error", Type::Enum(&ON_ERROR)),
    may("on-target-error", Type::Enum(&ON_ERROR)),
    may("auto-finalize", Type::Bool),
    may("auto-dismiss", Type::Bool),
    may("sidecar", Type::Str),
    may("scratch", Type::Bool),
];

/// Those of QEMU's BlockdevBackup, with the same left out, and `on-cbw-error` and its like; `sidecar` is ours.
pub(super) const TO_A_NODE: &[Member] = &[
    may("job-id", Type::Str),
    has("device", Type::Str),
    has("target", Type::Str),
    has("sync", Type::Enum(&SYNC_MODE)),
    may("bitmap", Type::Str),
    may("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
    may("speed", Type::Int),
    may("share", Type::Int),
    may("on-source-error", Type::Enum(&ON_ERROR)),
    may("on-target-error", Type::Enum(&ON_ERROR)),
    may("auto-finalize", Type::Bool),
    may("auto-dismiss", Type::Bool),
    may("sidecar", Type::Str),
];

/// `blockdev-backup`.
pub(super) const BLOCKDEV_BACKUP: Command = Command {
    name: "blockdev-backup",
    args: TO_A_NODE,
    returns: NOTHING,
    help: "as in QEMU: a `drive-backup` to a `target` that is there. An image that no LUN has is a node by its absolute path (its \
           first bytes say its format), an NBD export by its URI; the node of a LUN cannot be a target",
    run: |luns, args| begin(luns, args, to_a_node),
    after: None,
};

/// `drive-backup`.
pub(super) const DRIVE_BACKUP: Command = Command {
    name: "drive-backup",
    args: TO_A_FILE,
    returns: NOTHING,
    help: "as in QEMU: copies a LUN as it is at that moment to `target`, an absolute path, or with `mode` existing an NBD URI, while it is in use: what a write is about to \
           change is copied before. A copy that fails there ends the job, and never the write. The job's id is `device` unless `job-id` is \
           given. `mode` is absolute-paths unless it is given: a new image is made, with protection information as the LUN has it (`sidecar` \
           says where, if not beside it). With `sync` none only what is overwritten is copied, and `block-export-add` exports the LUN as it was; a `bitmap` \
           goes with it, with `bitmap-mode` on-success: it is exported as it was then, and has afterwards what was written since if `job-complete` ends \
           the job, and otherwise all. With `scratch` the target is removed when the job ends",
    run: |luns, args| begin(luns, args, to_a_file),
    after: None,
};

fn begin(
    luns: &Registry,
    args: &Arguments,
    order: impl FnOnce(&Registry, &Arguments) -> Result<BackupOrder, Error>,
) -> Result<Value, Error> {
    let (lun, order) = (find(luns, args.text("device")?)?, order(luns, args)?);
    told(lun.job(JobOrder::Backup(Box::new(order))))?;
    done()
}

/// What `blockdev-backup` orders.
pub(super) fn to_a_node(luns: &Registry, args: &Arguments) -> Result<BackupOrder, Error> {
    free_node(luns, args.text("target")?)?;
    Ok(BackupOrder { existing: true, ..to_a_file(luns, args)? })
}

/// Refuses as the target of a job what is no image that no LUN has.
pub(super) fn free_node(luns: &Registry, target: &str) -> Result<(), Error> {
    if luns.find(target).is_some() {
        return Err(Error::generic(format!(
            "node '{target}' is a LUN's: a job copies to an image that no LUN has; give its absolute path, or its NBD URI"
        )));
    }
    if !names_an_image(target) {
        return Err(Error::generic(format!(
            "Cannot find device='{target}' nor node-name='{target}': an image that no LUN has is a node by its absolute path, or its NBD URI"
        )));
    }
    Ok(())
}

/// What `drive-backup` orders.
pub(super) fn to_a_file(luns: &Registry, args: &Arguments) -> Result<BackupOrder, Error> {
    let sync = match args.text("sync")? {
        "incremental" | "bitmap" => SyncMode::Bitmap,
        _ => sync(args)?,
    };
    let settings = Settings { task: Task::Backup, sync, ..settings(args)? };
    Ok(BackupOrder {
        id: new_id(luns, args, args.text("device")?)?.to_owned(),
        target: args.text("target")?.into(),
        format: format(args)?,
        existing: args.maybe_text("mode") == Some("existing"),
        sidecar: args.maybe_text("sidecar").map(Into::into),
        bitmap: bitmap(args)?,
        scratch: args.flag("scratch"),
        settings,
    })
}

/// The bitmap that a backup has, and what it leaves of it.
fn bitmap(args: &Arguments) -> Result<Option<(String, BitmapMode)>, Error> {
    let (sync, name, mode) = (args.text("sync")?, args.maybe_text("bitmap"), args.maybe_text("bitmap-mode"));
    let refused = |words: String| Err(Error::generic(words));
    let Some(name) = name else {
        return match (sync, mode) {
            ("incremental" | "bitmap", _) => {
                refused(format!("must provide a valid bitmap name for '{sync}' sync mode"))
            }
            (_, Some(_)) => refused("Cannot specify bitmap sync mode without a bitmap".into()),
            _ => Ok(None),
        };
    };
    let mode = match (sync, mode) {
        ("incremental", None | Some("on-success")) => BitmapMode::OnSuccess,
        ("incremental", Some(_)) => {
            return refused(
                "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'".into(),
            );
        }
        // In QEMU there is none: what is read of an export, and whether it was read to its end, it does not know.
        ("none", Some("on-success")) => BitmapMode::OnSuccess,
        ("none", _) => {
            let words = "sync mode 'none' does not produce meaningful bitmap outputs: Bitmap sync mode must be 'on-success', for a point in time that \
                         is exported";
            return refused(words.into());
        }
        (_, None) => return refused("Bitmap sync mode must be given when providing a bitmap".into()),
        ("full" | "top", Some("never")) => {
            let words = format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            );
            return refused(words);
        }
        (_, Some("on-success")) => BitmapMode::OnSuccess,
        (_, Some("always")) => BitmapMode::Always,
        (_, Some(_)) => BitmapMode::Never,
    };
    Ok(Some((name.to_owned(), mode)))
}
