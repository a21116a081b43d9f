//! Snapshots (`blockdev-snapshot-sync`): the LUN goes over to an empty overlay, and its image is from then on the overlay's backing
//! file, as it was in that moment.
//!
//! With the image goes its sidecar, which is closed with it: a block that the overlay does not hold is found in the image below, data and tuple
//! ([`crate::pi::chain`]). So the sidecar has to be beside the image, where the chain looks for it.
//!
//! The order is that of a pivot: the overlay is made and durable; commands are held back; the image is closed; the overlay is opened over it;
//! the choice is written down and durable; commands go to the overlay. A start before that finds the image, with all that was
//! acknowledged; a start after it finds the overlay.

use std::path::Path;

use tracing::info;

use super::{
    JobError, Jobs, SnapshotOrder,
    ballot::{Seat, Step},
    switch::Switch,
    target::{Made, match_tuples, protect},
};
use crate::{
    image::{
        Driver, Format, Image,
        nbd::is_uri,
        open::MAX_CHAIN,
        overlay::{check_overlay, create_overlay},
    },
    job::front::Front,
    lun::{config::DeviceConfig, stack::Stack},
    pi::{protected::sidecar_path, store::ImageFormat},
    units::BlockSize,
    volume::Volume,
};

impl Jobs {
    /// Takes one.
    pub(super) async fn snapshot(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: SnapshotOrder,
        moved: &impl Fn(),
    ) -> Result<(), JobError> {
        let seat = order.ballot.clone().map(|ballot| Seat::new(ballot, &order.file.display().to_string()));
        let taken = match self.starting("snapshot") {
            Ok(_starting) => self.snapshot_alone(front, block_size, &order, seat.as_ref(), moved).await,
            Err(e) => Err(e),
        };
        if let (Err(e), Some(seat)) = (&taken, &seat) {
            seat.refuse(&e.to_string());
        }
        taken
    }

    async fn snapshot_alone(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: &SnapshotOrder,
        seat: Option<&Seat>,
        moved: &impl Fn(),
    ) -> Result<(), JobError> {
        let own = self.made.get().config.clone();
        let (config, mut made) = {
            let stack = front.volume();
            self.prepare_overlay(order, &own, &stack, block_size).await?
        };
        let failed = |reason: String| JobError::Snapshot(reason);
        if let Some(seat) = seat {
            seat.reach(&self.io, Step::Prepared).await.map_err(failed)?;
        }
        let before = async |_: &Stack| match seat {
            Some(seat) => seat.reach(&self.io, Step::Held).await,
            None => Ok(()),
        };
        let decide = async || match seat {
            Some(seat) => {
                seat.move_with_all(&self.io, self.moves.clone(), (own.clone(), config.clone())).await
            }
            None => self.decide(config.clone()).await,
        };
        let how = Switch { to: &config, block_size, others: 0 };
        self.switch(front, how, moved, before, async || Ok(()), decide).await.map_err(failed)?;
        made.keep = true;
        info!(image = %config.image.display(), backing = %own.image.display(), "the LUN has an overlay over its image");
        Ok(())
    }

    /// Makes the overlay of an order, or looks at the one that is there. What fails leaves no new file.
    async fn prepare_overlay(
        &self,
        order: &SnapshotOrder,
        own: &DeviceConfig,
        stack: &Stack,
        block_size: BlockSize,
    ) -> Result<(DeviceConfig, Made), JobError> {
        let image = stack.image();
        let file = &order.file;
        let refused = |reason: &str| JobError::Snapshot(format!("{}: {reason}", file.display()));
        if !file.is_absolute() {
            return Err(refused("the path is not absolute"));
        }
        if let Some(reason) = unfit(own, image) {
            return Err(JobError::Snapshot(reason));
        }
        let config =
            DeviceConfig { image: file.clone(), format: Some(Format::Qcow2), sidecar: None, ..own.clone() };
        // Said now, and not when the kernel is to hear of it.
        config.dev_config().map_err(|e| JobError::Snapshot(e.to_string()))?;
        let below: (&Path, Format) = (&own.image, image.format());
        let size = image.limits().capacity;
        let mut made = Made::default();
        if order.existing {
            let checked = check_overlay(&self.io, file, size, below).await;
            checked.map_err(|e| refused(&crate::lun::chain(&e)))?;
        } else {
            let created = create_overlay(&self.io, file, size, below).await;
            created.map_err(|e| match e.next_step() {
                Some(next) => JobError::Snapshot(format!("{}: {next}", crate::lun::chain(&e))),
                None => JobError::Snapshot(crate::lun::chain(&e)),
            })?;
            made.files.push(file.clone());
        }
        let sidecar = sidecar_path(file, None);
        let format = ImageFormat::Qcow2;
        let new = protect(&self.io, &config, &sidecar, order.existing, stack, block_size, format).await?;
        if new.is_some() {
            made.files.extend(new);
            match_tuples(&self.io, &sidecar, stack).await?;
        }
        Ok((config, made))
    }
}

/// Why no overlay can be put over a LUN's image, if that is so.
fn unfit(own: &DeviceConfig, image: &Image) -> Option<String> {
    let path = own.image.display();
    if own.read_only {
        return Some("the LUN is read-only: there is nothing that an overlay could be for".into());
    }
    if image.files().len() >= MAX_CHAIN {
        return Some(format!(
            "{path} has a chain of {MAX_CHAIN} images already, and longer ones are not opened"
        ));
    }
    if is_uri(&own.image) {
        return Some(format!("{path}: an image on a server cannot be a backing file here"));
    }
    if matches!(image.driver(), Driver::Null(_)) {
        return Some(format!("{path} keeps nothing"));
    }
    let beside = sidecar_path(&own.image, None);
    let elsewhere = own.sidecar.as_ref().filter(|at| own.pi.is_some() && **at != beside);
    elsewhere.map(|at| {
        format!(
            "the protection information of {path} is in {}, and that of a backing file has to be in {}",
            at.display(),
            beside.display()
        )
    })
}
