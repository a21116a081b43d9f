//! Block jobs: long work on a LUN's image while the LUN serves, in QEMU's names and states (`qapi/job.json`, `qapi/block-core.json`).
//!
//! A job stands over volumes and knows neither ring nor SCSI; [`front::Front`] is the one place where commands meet it. What a job keeps
//! across a restart of the daemon, and who tells it what to do, is the LUN's ([`crate::lun`]). All kinds are one machine: [`mirror`].

#[cfg(test)]
mod backup_tests;
pub mod bitmaps;
mod bits;
pub mod dirty;
pub mod front;
pub mod mirror;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod past_tests;

use serde::{Deserialize, Serialize};

use crate::{
    sys::mem::Sg,
    units::ByteOffset,
    volume::{Extent, ExtentKind, PiType, Result, Volume, first_run},
};

/// How far a job is, in QEMU's words (`qapi/job.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It is there.
    Created,
    /// It goes on.
    Running,
    /// It waits to be told to go on.
    Paused,
    /// It has caught up, and keeps up until it is told to end.
    Ready,
    /// It had caught up, and waits to be told to go on.
    Standby,
    /// It has done its work.
    Waiting,
    /// What it did waits to be made final.
    Pending,
    /// It ends before it is done.
    Aborting,
    /// It has ended.
    Concluded,
    /// It is no longer there.
    Null,
}

/// What a job does about an error (BlockdevOnError).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// It ends with the error.
    #[default]
    Report,
    /// It goes on, and tries again later.
    Ignore,
    /// It stops if there is no space left, and otherwise ends.
    Enospc,
    /// It stops until it is resumed, and tries again then.
    Stop,
}

/// What has been done about an error (BlockErrorAction).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorAction {
    /// It goes on.
    Ignore,
    /// It ends.
    Report,
    /// It waits.
    Stop,
}

/// Whether a job's I/O works (BlockDeviceIoStatus).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// It does.
    #[default]
    Ok,
    /// It has stopped for an error.
    Failed,
    /// It has stopped for want of space.
    Nospace,
}

/// A volume that a job copies from or to, protection included. What is read here has been verified, and what is written here is
/// stored as it came.
#[allow(async_fn_in_trait)] // One thread owns a volume; its futures need not be Send.
pub trait Side: Volume {
    /// Fills `to` from the bytes at `at`, verified, and gives their tuples, if the volume has protection.
    ///
    /// # Errors
    /// [`crate::volume::IoErrorKind::Protection`] with the first block that does not match: nothing of the range is to be believed.
    async fn read_whole(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>>;

    /// Writes blocks with their tuples, if the volume has protection. The caller has verified them.
    async fn write_whole(&self, at: ByteOffset, from: &Sg, tuples: Option<Vec<u8>>) -> Result<()>;

    /// What lies at `at`, for at most `len` bytes and at least one block, in whole blocks. What has protection information is
    /// data, also where the image has a hole.
    async fn extent(&self, at: ByteOffset, len: u64) -> Result<Extent>;

    /// Bytes of a block.
    fn block_bytes(&self) -> u64;

    /// The type of the tuples that it keeps, if it keeps some.
    fn protected_by(&self) -> Option<PiType>;
}

/// The first extent of a volume's map at `at`, in whole blocks: one that only begins in a hole is data.
///
/// # Errors
/// The map's.
pub async fn first_extent<V: Volume>(volume: &V, at: ByteOffset, len: u64, block: u64) -> Result<Extent> {
    let mut extent = first_run(volume, at, len).await?;
    let end = extent.start.0.saturating_add(extent.len).min(at.0.saturating_add(len));
    let here = end.saturating_sub(at.0);
    let whole = here / block * block;
    (extent.kind, extent.len) = match extent.kind {
        ExtentKind::Data => (ExtentKind::Data, here.next_multiple_of(block)),
        _ if whole == 0 => (ExtentKind::Data, block),
        kind => (kind, whole),
    };
    extent.start = at;
    Ok(extent)
}
