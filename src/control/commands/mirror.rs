//! Block jobs: mirrors are begun, led, told of and made an end of, in QEMU's words.

use std::str::FromStr;

use serde_json::{Value, json};

use super::{
    super::{
        schema::{Member, Type, has, may},
        types::{COPY_MODE, NEW_IMAGE_MODE, ON_ERROR, SYNC_MODE},
    },
    Arguments, Command, NOTHING,
    backup::free_node,
    done, find, told,
};
use crate::{
    control::{
        Registry, job_device,
        qmp::{Class, Error},
        without_nulls,
    },
    lun::{
        Remote,
        jobs::{
            CopyMode, JobInfo, JobOrder, MirrorOrder, OnError, Settings, Share, SyncMode, Task, copy_mode,
            sync_mode,
        },
    },
};

/// Those of QEMU's DriveMirror, but for the names of nodes, `replaces` and `buf-size`; `sidecar` is ours.
pub(super) const TO_A_FILE: &[Member] = &[
    may("job-id", Type::Str),
    has("device", Type::Str),
    has("target", Type::Str),
    may("format", Type::Str),
    has("sync", Type::Enum(&SYNC_MODE)),
    may("mode", Type::Enum(&NEW_IMAGE_MODE)),
    may("speed", Type::Int),
    may("share", Type::Int),
    may("granularity", Type::Int),
    may("on-source-error", Type::Enum(&ON_ERROR)),
    may("on-target-error", Type::Enum(&ON_ERROR)),
    may("unmap", Type::Bool),
    may("copy-mode", Type::Enum(&COPY_MODE)),
    may("auto-finalize", Type::Bool),
    may("auto-dismiss", Type::Bool),
    may("sidecar", Type::Str),
];

/// How what is written meanwhile comes to the other side.
fn how(args: &Arguments) -> CopyMode {
    match args.maybe_text("copy-mode") {
        Some("write-blocking") => CopyMode::WriteBlocking,
        _ => CopyMode::Background,
    }
}

/// What `on-error` and its like say.
pub(super) fn on_error(args: &Arguments, name: &str) -> OnError {
    match args.maybe_text(name) {
        Some("ignore") => OnError::Ignore,
        Some("enospc") => OnError::Enospc,
        Some("stop") => OnError::Stop,
        _ => OnError::Report,
    }
}

/// What every job is told: how it copies, how fast, what it does about errors, and how it ends.
pub(super) fn settings(args: &Arguments) -> Result<Settings, Error> {
    Ok(Settings {
        copy_mode: how(args),
        unmap: args.flag_or("unmap", true),
        speed: args.maybe_number("speed").unwrap_or(0),
        share: share(args)?.unwrap_or_default(),
        on_source_error: on_error(args, "on-source-error"),
        on_target_error: on_error(args, "on-target-error"),
        auto_finalize: args.flag_or("auto-finalize", true),
        auto_dismiss: args.flag_or("auto-dismiss", true),
        ..Settings::default()
    })
}

/// How much of its time it may copy while guests are at work.
fn share(args: &Arguments) -> Result<Option<Share>, Error> {
    args.maybe_number("share").map(|percent| Share::try_from(percent).map_err(Error::generic)).transpose()
}

/// The format of a target.
pub(super) fn format<F: FromStr>(args: &Arguments) -> Result<Option<F>, Error> {
    let named = args.maybe_text("format");
    let known = |word: &str| word.parse().map_err(|_| Error::generic(format!("Unknown driver '{word}'")));
    named.map(known).transpose()
}

/// What is copied.
pub(super) fn sync(args: &Arguments) -> Result<SyncMode, Error> {
    Ok(match args.text("sync")? {
        "top" => SyncMode::Top,
        "none" => SyncMode::None,
        word @ ("incremental" | "bitmap") => {
            return Err(Error::generic(format!("Sync mode '{word}' not supported")));
        }
        _ => SyncMode::Full,
    })
}

/// The name of a job that is to begin: the LUN's, unless one is given.
pub(super) fn new_id<'a>(luns: &Registry, args: &'a Arguments, device: &'a str) -> Result<&'a str, Error> {
    let id = args.maybe_text("job-id").unwrap_or(device);
    if id.is_empty() || job_device(id).is_some() {
        return Err(Error::generic(format!("Invalid job ID '{id}'")));
    }
    if all(luns).iter().any(|(_, _, job)| job.id == id) {
        return Err(Error::generic(format!("Job ID '{id}' already in use")));
    }
    Ok(id)
}

/// Those of QEMU's BlockdevMirror, but for `replaces`, `buf-size` and what names nodes; `unmap` and `sidecar` are ours.
pub(super) const TO_A_NODE: &[Member] = &[
    may("job-id", Type::Str),
    has("device", Type::Str),
    has("target", Type::Str),
    has("sync", Type::Enum(&SYNC_MODE)),
    may("speed", Type::Int),
    may("share", Type::Int),
    may("granularity", Type::Int),
    may("on-source-error", Type::Enum(&ON_ERROR)),
    may("on-target-error", Type::Enum(&ON_ERROR)),
    may("unmap", Type::Bool),
    may("copy-mode", Type::Enum(&COPY_MODE)),
    may("auto-finalize", Type::Bool),
    may("auto-dismiss", Type::Bool),
    may("sidecar", Type::Str),
];

/// `blockdev-mirror`.
pub(super) const BLOCKDEV_MIRROR: Command = Command {
    name: "blockdev-mirror",
    args: TO_A_NODE,
    returns: NOTHING,
    help: "as in QEMU: a `drive-mirror` to a `target` that is there: nodes as in `blockdev-backup`",
    run: |luns, args| {
        free_node(luns, args.text("target")?)?;
        begin(luns, args, true)
    },
    after: None,
};

/// `drive-mirror`.
pub(super) const DRIVE_MIRROR: Command = Command {
    name: "drive-mirror",
    args: TO_A_FILE,
    returns: NOTHING,
    help: "as in QEMU: copies a LUN to `target`, an absolute path, or with `mode` existing an NBD URI, while it is in use, and keeps the copy \
           up until the job is completed or cancelled. The job's id is `device` unless `job-id` is given. `mode` is absolute-paths unless it is \
           given: a new image is made, with protection information as the LUN has it (`sidecar` says where, if not beside it)",
    run: |luns, args| begin(luns, args, args.maybe_text("mode") == Some("existing")),
    after: None,
};

fn begin(luns: &Registry, args: &Arguments, existing: bool) -> Result<Value, Error> {
    let device = args.text("device")?;
    let lun = find(luns, device)?;
    let id = new_id(luns, args, device)?;
    let settings = Settings { task: Task::Mirror, sync: sync(args)?, ..settings(args)? };
    let order = MirrorOrder {
        id: id.to_owned(),
        target: args.text("target")?.into(),
        format: format(args)?,
        existing,
        sidecar: args.maybe_text("sidecar").map(Into::into),
        granularity: args.maybe_number("granularity").filter(|n| *n > 0),
        settings,
    };
    told(lun.job(JobOrder::Mirror(Box::new(order))))?;
    done()
}

/// Every block job with its LUN; those of a LUN that does not answer are not known.
fn all(luns: &Registry) -> Vec<(String, Remote, JobInfo)> {
    let mut jobs = Vec::new();
    for (name, lun) in luns.all_knocked() {
        for job in lun.job(JobOrder::Query).unwrap_or_default() {
            jobs.push((name.clone(), lun.clone(), job));
        }
    }
    jobs
}

/// The LUN that has a job of that name, with its own name.
pub(super) fn lun_of(luns: &Registry, id: &str) -> Option<(String, Remote)> {
    all(luns).into_iter().find(|(_, _, job)| job.id == id).map(|(name, lun, _)| (name, lun))
}

/// Orders a job about, whichever LUN's it is.
pub(super) fn order(luns: &Registry, id: &str, order: JobOrder) -> Result<(), Error> {
    let (_, lun, _) = all(luns)
        .into_iter()
        .find(|(_, _, job)| job.id == id)
        .ok_or_else(|| Error::new(Class::DeviceNotActive, format!("Job '{id}' not found")))?;
    told(lun.job(order)).map(drop)
}

/// The LUN goes over to the target.
pub(super) fn complete(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, JobOrder::Complete(args.text("id")?.to_owned()))?;
    done()
}

/// The same by QEMU's older name.
pub(super) fn block_complete(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("device")?, JobOrder::Complete(args.text("device")?.to_owned()))?;
    done()
}

/// Ends a job; one that is ready leaves a target that is whole.
pub(super) fn block_cancel(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let id = args.text("device")?;
    order(luns, id, JobOrder::Cancel { id: id.to_owned(), force: args.flag("force") })?;
    done()
}

/// Sets how much of its time a job may copy while guests are at work.
pub(super) fn set_share(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (id, share) = (args.text("id")?, share(args)?.unwrap_or_default());
    order(luns, id, JobOrder::SetShare(id.to_owned(), share))?;
    done()
}

/// Makes final what waits for it.
pub(super) fn finalize(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, JobOrder::Finalize(args.text("id")?.to_owned()))?;
    done()
}

/// Forgets a job that has ended.
pub(super) fn dismiss(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, JobOrder::Dismiss(args.text("id")?.to_owned()))?;
    done()
}

/// QEMU's BlockJobInfo of every block job.
pub(super) fn query(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    Ok(all(luns).iter().map(|(lun, _, job)| described(lun, job)).collect())
}

fn described(lun: &str, job: &JobInfo) -> Value {
    let mirror = job.settings.task.copies_all();
    let copies = mirror || job.settings.task == Task::Backup;
    without_nulls(json!({
        "type": job.settings.task.word(), "device": job.id, "len": job.len, "offset": job.offset, "busy": job.busy,
        "paused": job.paused, "speed": job.speed, "share": u64::from(job.settings.share), "io-status": job.io_status, "ready": job.ready,
        "status": job.status, "auto-finalize": job.settings.auto_finalize,
        "auto-dismiss": job.settings.auto_dismiss, "error": job.error,
        "actively-synced": job.ready && job.settings.copy_mode == CopyMode::WriteBlocking,
        "lun": lun, "target": job.target.display().to_string(), "sync": copies.then(|| sync_mode(&job.settings)),
        "copy-mode": mirror.then(|| copy_mode(&job.settings)), "repaired": job.repaired,
    }))
}
