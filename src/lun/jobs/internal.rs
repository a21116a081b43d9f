//! Internal snapshots of a LUN in use (`blockdev-snapshot-internal-sync`, `blockdev-snapshot-delete-internal-sync`): the qcow2 driver
//! takes and deletes them while commands run ([`crate::image::qcow2`], `snapshot`). A job would find its image changed under it, so
//! they exclude each other.
//!
//! The sidecar keeps the tuples of the disk as it is, and of nothing else: a snapshot has none.

use std::time::SystemTime;

use tracing::{error, info};

use super::{InternalOrder, JobError, Jobs};
use crate::{
    image::{Driver, Image, qcow2::SnapshotError},
    job::front::Front,
    lun::stack::Stack,
};

impl Jobs {
    /// Takes or deletes one.
    pub(super) async fn internal(&self, front: &Front<Stack>, order: InternalOrder) -> Result<(), JobError> {
        let _starting = self.starting("snapshot")?;
        let stack = front.volume();
        match order {
            InternalOrder::Take(name) => take(stack.image(), &name).await,
            InternalOrder::Delete(which) => delete(stack.image(), &which).await,
        }
    }

    /// While no command runs: takes some, or none.
    pub(super) async fn internals(
        &self,
        front: &Front<Stack>,
        names: impl Iterator<Item = &str>,
    ) -> Result<Taken, JobError> {
        let mut taken = Taken::default();
        let stack = front.volume();
        for name in names {
            if let Err(e) = take(stack.image(), name).await {
                taken.undo(front).await;
                return Err(e);
            }
            taken.0.push(name.to_owned());
        }
        Ok(taken)
    }
}

/// Snapshots that were taken, and may have to go again.
#[derive(Debug, Default)]
pub(super) struct Taken(Vec<String>);

impl Taken {
    /// Deletes them.
    pub(super) async fn undo(self, front: &Front<Stack>) {
        let stack = front.volume();
        for name in self.0 {
            if let Err(error) = delete(stack.image(), &format!("snapshot.name={name}")).await {
                error!(snapshot = name, %error, "an internal snapshot of a transaction that came to nothing is left");
            }
        }
    }
}

async fn take(image: &Image, name: &str) -> Result<(), JobError> {
    let Driver::Qcow2(driver) = image.driver() else { return Err(none_in(image)) };
    let taken = driver.snapshot_create(name, SystemTime::now()).await.map_err(|e| refused(image, &e))?;
    info!(image = %image.path().display(), snapshot = name, id = taken.id, "an internal snapshot was taken");
    Ok(())
}

async fn delete(image: &Image, which: &str) -> Result<(), JobError> {
    let Driver::Qcow2(driver) = image.driver() else { return Err(none_in(image)) };
    driver.snapshot_delete(which).await.map_err(|e| refused(image, &e))?;
    info!(image = %image.path().display(), snapshot = which, "an internal snapshot was deleted");
    Ok(())
}

fn none_in(image: &Image) -> JobError {
    let (path, format) = (image.path().display(), image.format());
    JobError::Snapshot(format!(
        "{path}: a {format} image has no internal snapshots; one over it has (blockdev-snapshot-sync)"
    ))
}

fn refused(image: &Image, e: &SnapshotError) -> JobError {
    let (path, why) = (image.path().display(), crate::lun::chain(e));
    // What the image could not do names its file already.
    let why = if matches!(e, SnapshotError::Io(_)) { why } else { format!("{path}: {why}") };
    JobError::Snapshot(match e.next_step() {
        Some(next) => format!("{why}: {next}"),
        None => why,
    })
}
