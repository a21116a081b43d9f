//! What the jobs of a LUN are told, and what they tell.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;

use super::{ballot::Ballot, group::Group};
use crate::{
    image::{Format, nbd::is_uri},
    job::{
        IoStatus, JobStatus,
        bitmaps::{BitmapError, BitmapMode},
        dirty::{MAX_GRANULARITY, MIN_GRANULARITY},
        mirror::{CopyMode, Settings, Share, SyncMode, VerbError},
    },
    lun::away::Far,
};

/// Whether that names an image as a job's target is named: an absolute path, or an NBD URI.
pub fn names_an_image(target: &str) -> bool {
    target.starts_with('/') || is_uri(Path::new(target))
}

/// A mirror that is asked for (`drive-mirror`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MirrorOrder {
    /// The job's name.
    pub id: String,
    /// The target's file, an absolute path, or an NBD URI.
    pub target: PathBuf,
    /// Its format; the LUN's image's if it is not given, or of an existing one what its first bytes say.
    pub format: Option<Format>,
    /// It is there; otherwise it is made.
    pub existing: bool,
    /// Where its protection information is kept, instead of beside it.
    pub sidecar: Option<PathBuf>,
    /// Bytes that are copied again when one of them is written.
    pub granularity: Option<u64>,
    /// All else.
    pub settings: Settings,
}

/// A backup that is asked for (`drive-backup`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupOrder {
    /// The job's name.
    pub id: String,
    /// The target's file, an absolute path, or an NBD URI.
    pub target: PathBuf,
    /// Its format; the LUN's image's if it is not given, or of an existing one what its first bytes say.
    pub format: Option<Format>,
    /// It is there; otherwise it is made.
    pub existing: bool,
    /// Where its protection information is kept, instead of beside it.
    pub sidecar: Option<PathBuf>,
    /// The dirty bitmap that says what is copied, or is to say afterwards what has changed since.
    pub bitmap: Option<(String, BitmapMode)>,
    /// The target goes with the job, whatever becomes of that.
    pub scratch: bool,
    /// All else.
    pub settings: Settings,
}

/// A copy that goes along with a LUN that is handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandoverOrder {
    /// The job's name.
    pub id: String,
    /// The way to the new image.
    pub far: Arc<Far>,
}

/// What is done with the LUN's dirty bitmaps (`block-dirty-bitmap-*`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BitmapOrder {
    /// Make one.
    Add {
        /// Its name.
        name: String,
        /// Bytes of a granule.
        granularity: u64,
        /// It is kept in the image.
        persistent: bool,
        /// Changes are marked in it.
        enabled: bool,
    },
    /// Remove one.
    Remove(String),
    /// Nothing is marked in it any more.
    Clear(String),
    /// Changes are marked in it, or no longer.
    Enable(String, bool),
    /// Mark in one what is marked in others.
    Merge {
        /// The one.
        target: String,
        /// The others.
        sources: Vec<String>,
    },
}

/// A job that brings what lies beneath into the image (`block-stream`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOrder {
    /// The job's name.
    pub id: String,
    /// The image of the chain that stays beneath; none if it is left out.
    pub base: Option<PathBuf>,
    /// All else.
    pub settings: Settings,
}

/// A job that brings what the LUN's chain holds above an image to that image (`block-commit`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitOrder {
    /// The job's name.
    pub id: String,
    /// The LUN's own image, if it is named.
    pub top: Option<PathBuf>,
    /// The image of the chain that it is brought to; the last if it is left out.
    pub base: Option<PathBuf>,
    /// All else.
    pub settings: Settings,
}

/// A snapshot that is asked for (`blockdev-snapshot-sync`): the image becomes the backing file of a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotOrder {
    /// The new image's file, an absolute path.
    pub file: PathBuf,
    /// It is there, empty, over the LUN's image; otherwise it is made.
    pub existing: bool,
    /// The vote that it is a part of, if others take part.
    pub ballot: Option<Arc<Ballot>>,
}

/// What is done with the internal snapshots of a LUN's qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InternalOrder {
    /// Take one of that name (`blockdev-snapshot-internal-sync`).
    Take(String),
    /// Delete the one that this means: an ID or a name, or just one of the two after `snapshot.id=` or `snapshot.name=`
    /// (`blockdev-snapshot-delete-internal-sync`).
    Delete(String),
}

/// One thing of several that are done at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// With a dirty bitmap.
    Bitmap(BitmapOrder),
    /// A backup begins; one of a LUN at most.
    Backup(Box<BackupOrder>),
    /// An internal snapshot of that name is taken.
    Internal(String),
}

impl Act {
    /// The bitmap that is another one afterwards.
    pub(super) fn changes(&self) -> Option<&str> {
        match self {
            Act::Backup(order) => order.bitmap.as_ref().map(|(name, _)| name.as_str()),
            Act::Internal(_) => None,
            Act::Bitmap(
                BitmapOrder::Add { name, .. }
                | BitmapOrder::Remove(name)
                | BitmapOrder::Clear(name)
                | BitmapOrder::Enable(name, _)
                | BitmapOrder::Merge { target: name, .. },
            ) => Some(name),
        }
    }
}

/// A LUN's part in a `transaction`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartOrder {
    /// The LUN's name.
    pub lun: String,
    /// What is done, in this order.
    pub acts: Vec<Act>,
    /// The vote of all LUNs that take part.
    pub ballot: Arc<Ballot>,
    /// The jobs that succeed together with the backup, if it is not alone.
    pub group: Option<Arc<Group>>,
}

/// What the jobs of a LUN can be told. A name that is not that of a job of this LUN is an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobOrder {
    /// Begin a mirror.
    Mirror(Box<MirrorOrder>),
    /// Begin a backup.
    Backup(Box<BackupOrder>),
    /// Begin to copy the LUN to another host.
    Handover(HandoverOrder),
    /// Have such a copy catch up, whatever guests do.
    Converge(String),
    /// Do something with dirty bitmaps.
    Bitmap(BitmapOrder),
    /// Do all of it at one moment, with other LUNs.
    Part(Box<PartOrder>),
    /// Begin to bring what lies above an image to that.
    Commit(Box<CommitOrder>),
    /// Begin to bring what lies beneath into the image.
    Stream(Box<StreamOrder>),
    /// Go over to an overlay.
    Snapshot(SnapshotOrder),
    /// Take or delete a snapshot within the image.
    Internal(InternalOrder),
    /// Nothing: only tell.
    Query,
    /// End it: the LUN goes over to the target.
    Complete(String),
    /// End it, with `force` even if it has caught up.
    Cancel {
        /// The job.
        id: String,
        /// Leave the target as it is.
        force: bool,
    },
    /// Have it wait.
    Pause(String),
    /// Have it go on.
    Resume(String),
    /// So many bytes a second; 0 for no limit.
    SetSpeed(String, u64),
    /// That much of its time while guests are at work.
    SetShare(String, Share),
    /// Make final what waits for it.
    Finalize(String),
    /// Forget one that has ended.
    Dismiss(String),
}

/// A job, as it is told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobInfo {
    /// Its name.
    pub id: String,
    /// How far it is.
    pub status: JobStatus,
    /// Bytes copied.
    pub offset: u64,
    /// Bytes in all, as far as it is known.
    pub len: u64,
    /// Bytes a second; 0 for no limit.
    pub speed: u64,
    /// It has caught up.
    pub ready: bool,
    /// It was told to wait.
    pub paused: bool,
    /// It does something.
    pub busy: bool,
    /// Whether its I/O works.
    pub io_status: IoStatus,
    /// What it was told at its beginning.
    #[serde(skip)]
    pub settings: Settings,
    /// Where it copies to.
    pub target: PathBuf,
    /// Blocks that were brought back from the target.
    pub repaired: u64,
    /// Why it could not go on.
    pub error: Option<String>,
}

/// Why an order is not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// In QEMU's words.
    #[error("Job '{0}' not found")]
    NotFound(String),
    /// There is one already.
    #[error("the LUN has a job already: {0}")]
    Busy(String),
    /// That name is taken.
    #[error("Job ID '{0}' already in use")]
    Taken(String),
    /// It cannot be told that now.
    #[error(transparent)]
    Verb(#[from] VerbError),
    /// The target.
    #[error("{0}")]
    Target(String),
    /// A snapshot.
    #[error("{0}")]
    Snapshot(String),
    /// What others have to do with it.
    #[error("{0}")]
    Transaction(String),
    /// A dirty bitmap.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// A point in time that is to be exported, or is.
    #[error("{0}")]
    Past(String),
    /// The chain.
    #[error("{0}")]
    Chain(String),
    /// The granularity.
    #[error(
        "a granularity of {0} bytes: give a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY}, and a block at least"
    )]
    Granularity(u64),
    /// The record.
    #[error("the job could not be written down: {0}")]
    Record(String),
}

/// What QEMU has an event of its own for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockJob {
    /// It has caught up.
    Ready,
    /// It has ended, with that error if it could not go on.
    Completed(Option<String>),
    /// It was ended before it was done.
    Cancelled,
}

/// QEMU's word for what is copied.
pub fn sync_mode(settings: &Settings) -> &'static str {
    match settings.sync {
        SyncMode::Full => "full",
        SyncMode::Top => "top",
        SyncMode::None => "none",
        SyncMode::Bitmap => "bitmap",
    }
}

/// QEMU's word for how it keeps up.
pub fn copy_mode(settings: &Settings) -> &'static str {
    match settings.copy_mode {
        CopyMode::Background => "background",
        CopyMode::WriteBlocking => "write-blocking",
    }
}
