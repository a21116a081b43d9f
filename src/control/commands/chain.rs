//! Jobs that shorten a LUN's chain, in QEMU's words.

use super::{
    super::{
        schema::{Type, has, may},
        types::{COPY_MODE, ON_ERROR},
    },
    Arguments, Command, NOTHING, done, find, mirror, told,
};
use crate::{
    control::{Registry, qmp::Error},
    lun::{
        Remote,
        jobs::{CommitOrder, JobOrder, Settings, StreamOrder},
    },
};

/// The LUN of a job that is to begin, the job's name, and what it is told.
fn begun(luns: &Registry, args: &Arguments) -> Result<(Remote, String, Settings), Error> {
    let device = args.text("device")?;
    let lun = find(luns, device)?;
    let on_error = mirror::on_error(args, "on-error");
    let settings =
        Settings { on_source_error: on_error, on_target_error: on_error, ..mirror::settings(args)? };
    Ok((lun, mirror::new_id(luns, args, device)?.to_owned(), settings))
}

/// `block-commit`.
pub(super) const COMMIT: Command = Command {
    name: "block-commit",
    args: &[
        may("job-id", Type::Str),
        has("device", Type::Str),
        may("base", Type::Str),
        may("top", Type::Str),
        may("speed", Type::Int),
        may("share", Type::Int),
        may("on-error", Type::Enum(&ON_ERROR)),
        may("copy-mode", Type::Enum(&COPY_MODE)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
    ],
    returns: NOTHING,
    help: "as in QEMU: brings what `top`, a file of a LUN's chain, and those between hold above `base` (the last if it is left out) to that \
           file, while the LUN is in use. If `top` is left out or is the LUN's image, the base is kept up, and `block-job-complete` has the LUN \
           go over to it; otherwise the job ends by itself, and the image over `top` has `base` for its backing file then. `copy-mode` is ours: \
           with `write-blocking` the base keeps up with whoever writes all the time",
    run: |luns, args| {
        let (lun, id, settings) = begun(luns, args)?;
        let path = |name| args.maybe_text(name).map(Into::into);
        let order = CommitOrder { id, top: path("top"), base: path("base"), settings };
        told(lun.job(JobOrder::Commit(Box::new(order))))?;
        done()
    },
    after: None,
};

/// `block-stream`.
pub(super) const STREAM: Command = Command {
    name: "block-stream",
    args: &[
        may("job-id", Type::Str),
        has("device", Type::Str),
        may("base", Type::Str),
        may("speed", Type::Int),
        may("share", Type::Int),
        may("on-error", Type::Enum(&ON_ERROR)),
        may("auto-finalize", Type::Bool),
        may("auto-dismiss", Type::Bool),
    ],
    returns: NOTHING,
    help: "as in QEMU: brings what lies beneath a LUN's image into it while it is in use, down to `base`, a file of the chain, which is its \
           backing file then; all of it if that is left out, and then it has none. The job's id is `device` unless `job-id` is given",
    run: |luns, args| {
        let (lun, id, settings) = begun(luns, args)?;
        let order = StreamOrder { id, base: args.maybe_text("base").map(Into::into), settings };
        told(lun.job(JobOrder::Stream(Box::new(order))))?;
        done()
    },
    after: None,
};
