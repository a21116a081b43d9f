//! A mirror's target: made if that is asked for, opened as the LUN's image is, and looked at before anything is copied to it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{JobError, MirrorOrder};
use crate::{
    image::{Format, create::create_qcow2, create::create_raw, nbd::is_uri, qcow2::CreateOptions},
    job::{Side, mirror::SyncMode},
    lun::{LunError, config::DeviceConfig, stack::Stack},
    pi::{
        Exposure, PiOpenError,
        protected::sidecar_path,
        store::{ImageFormat, NewSidecar, Sidecar, Stamp, open_file},
        tools,
    },
    sys::io::Io,
    units::BlockSize,
    volume::Volume,
};

/// How long the target of a job that goes on may be another's, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);
const LOCK_LOOK: Duration = Duration::from_millis(50);

/// Files that were made for a target that came to nothing.
#[derive(Default)]
pub(super) struct Made {
    pub(super) files: Vec<PathBuf>,
    pub(super) keep: bool,
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.keep {
            for file in &self.files {
                // Best effort: the error that brought us here is the one to report.
                let _ = fs::remove_file(file);
            }
        }
    }
}

/// A target that is open.
pub(super) struct Prepared {
    pub(super) stack: Stack,
    pub(super) config: DeviceConfig,
    /// It reads as zeros.
    pub(super) fresh: bool,
    /// What is to be copied, where a backing file that is missing makes a difference.
    pub(super) sync: SyncMode,
    /// What was made for it; removed, unless it is kept.
    pub(super) made: Made,
}

/// Makes and opens the target of an order. What fails leaves no new file.
pub(super) async fn prepare(
    io: &Io,
    order: &MirrorOrder,
    own: &DeviceConfig,
    source: &Stack,
    block_size: BlockSize,
) -> Result<Prepared, JobError> {
    let remote = is_uri(&order.target);
    if remote {
        check_remote(order, own)?;
    } else if !order.target.is_absolute() {
        return Err(JobError::Target(format!("{}: the path is not absolute", order.target.display())));
    }
    let image = source.image();
    let backing = image.files().get(1).cloned();
    // As QEMU: without a backing file the image itself is all there is.
    let sync = match order.settings.sync {
        SyncMode::Top if backing.is_none() => SyncMode::Full,
        sync => sync,
    };
    let capacity = source.limits().capacity;
    let mut made = Made::default();
    let format = order.format.unwrap_or(if remote { Format::Raw } else { image.format() });
    let config = DeviceConfig {
        image: order.target.clone(),
        format: (!order.existing || order.format.is_some()).then_some(format),
        sidecar: order.sidecar.clone(),
        ..own.clone()
    };
    // Said now, and not when the LUN is to go over to it.
    config.dev_config().map_err(|e| JobError::Target(e.to_string()))?;
    if !order.existing {
        let failed = |e: crate::image::create::CreateError| {
            JobError::Target(match e.next_step() {
                Some(next) => format!("{}: {next}", crate::lun::chain(&e)),
                None => crate::lun::chain(&e),
            })
        };
        match (format, &backing) {
            (Format::Raw, Some(_)) if sync == SyncMode::Top => {
                return Err(JobError::Target(
                    "a raw image has no backing file: give format qcow2, or sync full".into(),
                ));
            }
            (Format::Raw, _) => create_raw(io, &order.target, capacity).await.map_err(failed)?,
            (Format::Qcow2, backing) => {
                let mut options = CreateOptions::new(capacity);
                if let Some(below) = backing.as_ref().filter(|_| sync == SyncMode::Top) {
                    options.backing_file = Some(below.display().to_string());
                    options.backing_format = image.describe().get(1).map(|info| info.format.to_string());
                }
                create_qcow2(io, &order.target, &options).await.map_err(failed)?;
            }
        }
        made.files.push(order.target.clone());
    }
    let sidecar = sidecar_path(&order.target, order.sidecar.as_deref());
    let new = protect(io, &config, &sidecar, order.existing, source, block_size, format.into()).await?;
    if let Some(sidecar) = new {
        made.files.push(sidecar);
    }
    let stack =
        Stack::open(io, &DeviceConfig { read_only: false, ..config.clone() }, block_size, capacity).await;
    let other_size = |bytes: u64| {
        let words = format!("{} has {bytes} bytes, and the LUN {capacity}", order.target.display());
        JobError::Target(format!("{words}: give a target of the same size"))
    };
    let stack = stack.map_err(|e| match e {
        LunError::Shrunk { capacity, .. } => other_size(capacity),
        e => {
            let next = e.next_step().map(|next| format!(": {next}")).unwrap_or_default();
            JobError::Target(format!("{}{next}", crate::lun::chain(&e)))
        }
    })?;
    let found = stack.limits();
    if found.capacity != capacity {
        return Err(other_size(found.capacity));
    }
    if u64::from(found.alignment) > block_size.bytes() {
        let words = format!(
            "{} is written in units of {} bytes, and the LUN has blocks of {block_size}",
            order.target.display(),
            found.alignment
        );
        return Err(JobError::Target(words));
    }
    same_tuples(source, &stack).await?;
    let format = Some(stack.image().format());
    Ok(Prepared { stack, config: DeviceConfig { format, ..config }, fresh: !order.existing, sync, made })
}

/// What an NBD export cannot be told.
fn check_remote(order: &MirrorOrder, own: &DeviceConfig) -> Result<(), JobError> {
    let refused = |why: &str| Err(JobError::Target(format!("{}: {why}", order.target.display())));
    if !order.existing {
        return refused(
            "an NBD export is made by its server, and what it holds is overwritten: give mode existing (--existing)",
        );
    }
    if own.pi.is_some() && order.sidecar.is_none() {
        return refused(
            "there is no place beside an NBD export for its protection information: give a sidecar on this host (--sidecar /PATH)",
        );
    }
    Ok(())
}

/// Opens the LUN's image again, or the target of a job that goes on. A process that was killed a moment ago may have its lock still.
pub(super) async fn reopen(
    io: &Io,
    config: &DeviceConfig,
    block_size: BlockSize,
    capacity: u64,
) -> Result<Stack, String> {
    let config = DeviceConfig { read_only: false, ..config.clone() };
    let until = Instant::now() + LOCK_PATIENCE;
    let stack = loop {
        match Stack::open_to_serve(io, &config, block_size, capacity, None).await {
            Ok(stack) => break stack,
            Err(e) if Instant::now() >= until => return Err(crate::lun::chain(&e)),
            Err(_) => io.sleep(LOCK_LOOK).await,
        }
    };
    match stack.limits().capacity {
        now if now == capacity => Ok(stack),
        now => Err(format!("it has {now} bytes, and the LUN {capacity}")),
    }
}

/// Sees to the sidecar of an image before that is opened: makes it where there is none, and has it know whose tags it gets. Gives the
/// path of one that was made.
pub(super) async fn protect(
    io: &Io,
    config: &DeviceConfig,
    path: &Path,
    existing: bool,
    source: &Stack,
    block_size: BlockSize,
    format: ImageFormat,
) -> Result<Option<PathBuf>, JobError> {
    let (Some(protected), Some(kind)) = (source.protected(), config.pi) else { return Ok(None) };
    let failed = |e: PiOpenError| {
        let next = e.next_step().map(|next| format!(": {next}")).unwrap_or_default();
        JobError::Target(format!("{}{next}", crate::lun::chain(&e)))
    };
    let broken = |e: io::Error| JobError::Target(format!("{}: {e}", path.display()));
    let there = path.symlink_metadata().is_ok();
    if there && !existing {
        return Err(JobError::Target(format!(
            "{}: protection information is there already, of an image that isn't: remove it, or choose another path",
            path.display()
        )));
    }
    if !there {
        let capacity = source.limits().capacity;
        let remote = is_uri(&config.image).then(|| Stamp::of_size(capacity));
        let new = NewSidecar {
            block_size,
            kind,
            mode: protected.sidecar().mode(),
            capacity: block_size.blocks_in(capacity),
            format,
            stamp: remote.map_or_else(|| Stamp::of(&config.image), Ok).map_err(broken)?,
        };
        tools::create(io, &config.image, path, new).await.map_err(failed)?;
    }
    if protected.sidecar().tags() == Exposure::Initiator {
        let done = admit(io, path).await;
        if let Err(e) = done {
            if !there {
                let _ = fs::remove_file(path);
            }
            return Err(broken(e));
        }
    }
    Ok((!there).then(|| path.to_owned()))
}

/// Has a new sidecar, which is not open, keep tuples as that stack keeps them: FORMAT UNIT may have chosen others than the configuration.
pub(super) async fn match_tuples(io: &Io, path: &Path, source: &Stack) -> Result<(), JobError> {
    let Some(wanted) = source.protected().map(|p| p.sidecar().info()) else { return Ok(()) };
    let matched = async {
        let sidecar = Sidecar::open(open_file(io, path, false).await?).await.map_err(io::Error::other)?;
        let is = sidecar.info();
        match is.pi == wanted.pi && is.hidden == wanted.hidden {
            true => Ok(()),
            false => sidecar.reformat((!wanted.hidden).then_some(wanted.pi)).await,
        }
    };
    matched.await.map_err(|e: io::Error| JobError::Target(format!("{}: {e}", path.display())))
}

async fn admit(io: &Io, path: &Path) -> io::Result<()> {
    let storage = open_file(io, path, false).await?;
    let sidecar = Sidecar::open(storage).await.map_err(io::Error::other)?;
    sidecar.admit_initiator_tags().await
}

/// Has the target keep the tuples that the source keeps now: FORMAT UNIT may have chosen others than the configuration.
async fn same_tuples(source: &Stack, target: &Stack) -> Result<(), JobError> {
    let (Some(from), Some(to)) = (source.protected(), target.protected()) else {
        return match source.protected_by() == target.protected_by() {
            true => Ok(()),
            false => Err(JobError::Target("one of the sides alone has protection information".into())),
        };
    };
    let (is, wanted) = (to.sidecar().info(), from.sidecar().info());
    if is.pi != wanted.pi || is.hidden != wanted.hidden {
        let seen = (!wanted.hidden).then_some(wanted.pi);
        to.reformat(seen).await.map_err(|e| JobError::Target(e.to_string()))?;
    }
    if to.kind_at_rest() != from.kind_at_rest() {
        let words = "the target keeps another type of protection information than the LUN";
        return Err(JobError::Target(words.into()));
    }
    Ok(())
}
