//! Backups, in QEMU's words.

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
    lun::jobs::{BackupOrder, BitmapMode, JobOrder, Settings, SyncMode, Task},
};

/// Those of QEMU's DriveBackup, but for `compress`, `encrypt`, `filter-node-name` and what is unstable there; `sidecar` is ours.
const ARGUMENTS: &[Member] = &[
    may("job-id", Type::Str),
    has("device", Type::Str),
    has("target", Type::Str),
    may("format", Type::Str),
    has("sync", Type::Enum(&SYNC_MODE)),
    may("mode", Type::Enum(&NEW_IMAGE_MODE)),
    may("bitmap", Type::Str),
    may("bitmap-mode", Type::Enum(&BITMAP_SYNC_MODE)),
    may("speed", Type::Int),
    may("on-source-error", Type::Enum(&ON_ERROR)),
    may("on-target-error", Type::Enum(&ON_ERROR)),
    may("auto-finalize", Type::Bool),
    may("auto-dismiss", Type::Bool),
    may("sidecar", Type::Str),
];

/// `drive-backup`.
pub(super) const DRIVE_BACKUP: Command = Command {
    name: "drive-backup",
    args: ARGUMENTS,
    returns: NOTHING,
    help: "as in QEMU: copies a LUN as it is at that moment to `target`, an absolute path, while it is in use: what a write is about to \
           change is copied before. A copy that fails there ends the job, and never the write. The job's id is `device` unless `job-id` is \
           given. `mode` is absolute-paths unless it is given: a new image is made, with protection information as the LUN has it (`sidecar` \
           says where, if not beside it)",
    run: |luns, args| {
        let (lun, order) = (find(luns, args.text("device")?)?, order(luns, args)?);
        told(lun.job(JobOrder::Backup(Box::new(order))))?;
        done()
    },
    after: None,
};

fn order(luns: &Registry, args: &Arguments) -> Result<BackupOrder, Error> {
    let sync = match args.text("sync")? {
        "incremental" | "bitmap" => SyncMode::Bitmap,
        _ => sync(args)?,
    };
    let settings = Settings { task: Task::Backup, sync, ..settings(args) };
    Ok(BackupOrder {
        id: new_id(luns, args, args.text("device")?)?.to_owned(),
        target: args.text("target")?.into(),
        format: format(args)?,
        existing: args.maybe_text("mode") == Some("existing"),
        sidecar: args.maybe_text("sidecar").map(Into::into),
        bitmap: bitmap(args)?,
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
        ("none", _) => {
            return refused("sync mode 'none' does not produce meaningful bitmap outputs".into());
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
