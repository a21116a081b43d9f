//! Jobs that shorten the LUN's chain while it is in use.
//!
//! `block-stream` copies what lies beneath into the image itself, with its tuples, verified; a guest's writes and the copies of one range
//! take turns. When nothing is left that comes from the images that are to go, the header names what stays beneath, or nothing,
//! durably, and the image is opened anew: [`super::switch`]. Whatever is cut off before that leaves an image that holds more of what
//! it shows, and a chain that shows the same.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use tracing::info;

use super::{Active, JobError, Jobs, Record, StreamOrder, switch::Switch};
use crate::{
    image::{Format, Image},
    job::{
        JobStatus,
        dirty::granularity_for,
        front::{Ending, Front, Outcome},
        mirror::{Settings, SyncMode, Task, Verdict},
    },
    lun::stack::Stack,
    units::BlockSize,
    volume::Volume,
};

/// How often something may be found to be left when all was copied. Nothing makes it come back; it is a fault then.
const ROUNDS: u32 = 3;

/// Whether two names are of one file.
pub(super) fn is_same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
    a == b || identity(a).is_some_and(|a| Some(a) == identity(b))
}

/// The depth of the base of a job, 1 or more, or an error in QEMU's words.
pub(super) fn base_depth(image: &Image, base: &Path) -> Result<u32, String> {
    let beneath = image.files().iter().skip(1);
    match (1u32..).zip(beneath).find(|(_, file)| is_same_file(file, base)) {
        Some((depth, _)) => Ok(depth),
        None => Err(format!("Can't find '{}' in the backing chain", base.display())),
    }
}

/// Finds the base of a stream in the chain as it is now: it may have done its work before it could be forgotten.
pub(super) fn stream_again(record: &mut Record, image: &Image) -> Result<(), String> {
    let below = record.base.as_deref().map_or(Ok(u32::MAX), |base| base_depth(image, base))?;
    record.settings.task = Task::Stream { below };
    Ok(())
}

impl Jobs {
    /// Begins to bring what lies beneath into the image.
    pub(super) async fn stream(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: StreamOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        let volume = front.volume();
        let image = volume.image();
        let own = self.made.get().config.clone();
        if own.read_only {
            return Err(JobError::Chain(
                "the LUN is read-only: nothing can be brought into its image".into(),
            ));
        }
        if image.format() == Format::Raw {
            let words = format!("{} is a raw image: nothing lies beneath it", own.image.display());
            return Err(JobError::Chain(words));
        }
        let below = order.base.as_deref().map_or(Ok(u32::MAX), |base| base_depth(image, base));
        let below = below.map_err(JobError::Chain)?;
        let task = Task::Stream { below };
        let settings = Settings { task, sync: SyncMode::Full, ..order.settings };
        // Whole clusters, which are taken over at once.
        let limits = volume.limits();
        let least = block_size.bytes().max(u64::from(limits.discard_granularity).next_power_of_two());
        let granularity = granularity_for(limits.capacity).max(least);
        let mut record = Record::new(order.id, &own.image, &own, granularity, settings, false);
        record.base = image.files().get(below as usize).cloned();
        self.launch(front, (volume.clone(), volume), record, own).await
    }

    /// Runs a job that ends by itself to its end.
    pub(super) async fn drive_chain(
        &self,
        active: &Active,
        front: &Front<Stack>,
        moved: &impl Fn(),
    ) -> Outcome {
        let mirror = &active.mirror;
        let mut rounds = 0;
        loop {
            let outcome = match mirror.run().await {
                Verdict::End(_) => {
                    // Looked at once more: what is still to be found beneath would be lost.
                    if mirror.settings().task.is_within() {
                        mirror.scan(true).await;
                    }
                    if mirror.status() == JobStatus::Aborting {
                        continue;
                    }
                    if !mirror.is_settled() {
                        rounds += 1;
                        if rounds > ROUNDS {
                            mirror.give_up("what was copied does not stay in the image");
                        }
                        continue;
                    }
                    match self.finish(active, front, moved).await {
                        Ok(()) => return Outcome::Ended(Ending::Finish),
                        Err(reason) => Outcome::Failed(reason),
                    }
                }
                Verdict::Cancelled => Outcome::Cancelled,
                Verdict::Failed(reason) => Outcome::Failed(reason),
            };
            mirror.part();
            front.detach().await;
            return outcome;
        }
    }

    /// Has the image name what stays beneath it, and opens it anew.
    async fn finish(&self, active: &Active, front: &Front<Stack>, moved: &impl Fn()) -> Result<(), String> {
        if let Task::CommitBeneath { .. } = active.mirror.settings().task {
            return self.finish_beneath(active, front, moved).await;
        }
        let (stays, block_size) = {
            let volume = front.volume();
            let below = match active.mirror.settings().task {
                Task::Stream { below } => below as usize,
                _ => usize::MAX,
            };
            let infos = volume.image().describe();
            let stays = infos.get(below).map(|info| (info.path.clone(), info.format));
            (stays, self.made.get().block_size)
        };
        let to = self.made.get().config.clone();
        // The job's two sides are the image as well.
        let how = Switch { to: &to, block_size, others: 2 };
        let rename = async |stack: &Stack| {
            let stays = stays.as_ref().map(|(path, format)| (&**path, *format));
            stack.image().set_backing(stays).await.map_err(|e| crate::lun::chain(&e))
        };
        self.switch(front, how, moved, rename, async || Ok(()), async || Ok(())).await?;
        let stays = stays.map(|(path, _)| path.display().to_string());
        info!(image = %to.image.display(), backing = stays, "the chain is shorter");
        Ok(())
    }
}
