//! `block-commit` of the active layer: what the LUN's chain holds above an image is copied to that image, kept up, and the LUN goes over to
//! it, as to a mirror's target.
//!
//! The image is beneath the LUN and is written to at the same time. That is sound because nothing is written where the chain shows through
//! to it: what is copied is what a file above hides. Its lock goes from the chain, which has it as a reader, to the job, and back if the
//! LUN does not go over. Until the LUN has gone over, the image shows nothing sensible by itself, as with QEMU; the chain always does.

use std::{
    path::{Path, PathBuf},
    rc::Rc,
};

use tracing::error;

use super::{
    CommitOrder, JobError, Jobs, Record,
    chain::{base_depth, is_same_file},
    close,
    target::{Made, protect, reopen},
};
use crate::{
    image::Format,
    job::{
        dirty::granularity_for,
        front::Front,
        mirror::{CopyMode, Settings, SyncMode, Task},
    },
    lun::{config::DeviceConfig, stack::Stack},
    pi::{protected::sidecar_path, store::ImageFormat},
    sys::io::Io,
    units::BlockSize,
    volume::Volume,
};

/// Gives the LUN's chain its lock on the base back, once the job has let go of that.
pub(super) fn give_back(chain: &Stack, task: Task, base: Option<&Path>) {
    let image = chain.image();
    if let Task::Commit { .. } | Task::CommitBeneath { .. } = task
        && let Some(Ok(depth)) = base.map(|base| base_depth(image, base))
        && let Err(error) = image.take_back(depth as usize)
    {
        error!(image = %image.path().display(), %error, "a backing file of the LUN is no longer locked: nobody may write to it");
    }
}

/// Opens the base of a commit that goes on, in the chain as it is now.
pub(super) async fn open_again(
    io: &Io,
    record: &mut Record,
    config: &DeviceConfig,
    block_size: BlockSize,
    source: &Stack,
) -> Result<Stack, String> {
    let below = match record.base.as_deref() {
        Some(base) => base_depth(source.image(), base)?,
        None => return Err("its record names no base".into()),
    };
    record.settings.task = Task::Commit { below };
    source.image().lend(below as usize);
    let opened = reopen(io, config, block_size, source.limits().capacity).await;
    if opened.is_err() {
        give_back(source, record.settings.task, record.base.as_deref());
    }
    opened
}

impl Jobs {
    /// Begins to copy what the chain holds above an image to that.
    pub(super) async fn commit(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: CommitOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        let volume = front.volume();
        let image = volume.image();
        let own = self.made.get().config.clone();
        let refused = |words: String| Err(JobError::Chain(words));
        let name = own.image.display();
        if own.read_only {
            return refused("the LUN is read-only: nothing was written that could be committed".into());
        }
        let last = image.files().len() as u32 - 1;
        if last == 0 {
            return refused(format!("{name} has no backing file to commit to"));
        }
        let top = match order.top.as_ref().filter(|top| !is_same_file(top, &own.image)) {
            Some(top) => base_depth(image, top).map_err(JobError::Chain)?,
            None => 0,
        };
        let below = order.base.as_deref().map_or(Ok(last), |base| base_depth(image, base));
        let below = below.map_err(JobError::Chain)?;
        if top >= below {
            return refused("the base has to lie beneath the top".into());
        }
        let infos = image.describe();
        let (Some(base), Some(place)) = (infos.get(below as usize), image.places().get(below as usize))
        else {
            return refused("the chain has another length than was thought".into());
        };
        let capacity = volume.limits().capacity;
        if base.virtual_size != capacity {
            let (path, size) = (base.path.display(), base.virtual_size);
            return refused(format!(
                "{path} has {size} bytes, and the LUN {capacity}: both have to be the same"
            ));
        }
        if *place != base.path {
            return refused(format!("{} has an external data file", base.path.display()));
        }
        let config = DeviceConfig {
            image: base.path.clone(),
            format: Some(base.format),
            sidecar: None,
            ..own.clone()
        };
        // Said now, and not when the LUN is to go over to it.
        config.dev_config().map_err(|e| JobError::Chain(e.to_string()))?;
        let task = match top {
            0 => Task::Commit { below },
            top => Task::CommitBeneath { below: below - top },
        };
        // Between two images beneath the LUN's nothing is written but by the job.
        let copy_mode = if top == 0 { order.settings.copy_mode } else { CopyMode::Background };
        let settings = Settings { task, sync: SyncMode::Full, copy_mode, ..order.settings };
        let granularity = granularity_for(capacity).max(block_size.bytes());
        let mut record = Record::new(order.id, &own.image, &config, granularity, settings, false);
        record.base = Some(base.path.clone());
        if top > 0 {
            record.top = image.files().get(top as usize).cloned();
            return self.commit_beneath(front, block_size, record, config).await;
        }
        image.lend(below as usize);
        let target = match self.open_base(&config, block_size, &volume).await {
            Ok(target) => Rc::new(target),
            Err(e) => {
                give_back(&volume, task, record.base.as_deref());
                return Err(e);
            }
        };
        let sides = (volume.clone(), target.clone());
        let base = record.base.clone();
        let launched = self.launch(front, sides, record, config).await;
        if launched.is_err() {
            close(&target).await;
            give_back(&volume, task, base.as_deref());
        }
        launched
    }

    /// Opens the image that is committed to, which nobody has locked, with the protection that the LUN has.
    pub(super) async fn open_base(
        &self,
        config: &DeviceConfig,
        block_size: BlockSize,
        source: &Stack,
    ) -> Result<Stack, JobError> {
        let failed = |reason: String| JobError::Chain(format!("{}: {reason}", config.image.display()));
        let mut made = Made::default();
        let sidecar: PathBuf = sidecar_path(&config.image, None);
        let format = if config.format == Some(Format::Qcow2) { ImageFormat::Qcow2 } else { ImageFormat::Raw };
        made.files.extend(protect(&self.io, config, &sidecar, true, source, block_size, format).await?);
        let target = reopen(&self.io, config, block_size, source.limits().capacity).await.map_err(failed)?;
        if target.protected_as() != source.protected_as() {
            close(&target).await;
            return Err(failed("it has protection information of another type than the LUN".into()));
        }
        made.keep = true;
        Ok(target)
    }
}
