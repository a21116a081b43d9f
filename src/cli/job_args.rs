//! The arguments of what works on a LUN in use: `scrub`, `mirror`, `backup`, `bitmap`, `snapshot`, `stream`, `commit` and `job`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::args::Json;
use crate::{
    admin::order,
    image::Format,
    kernel::names::Name,
    lun::{
        jobs::Share,
        scrub::{MIN_SPEED, ScrubError},
    },
};

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sync {
    /// All that a guest can read
    Full,
    /// What the image itself holds; the target gets the same backing file
    Top,
    /// What is written from now on
    None,
}

/// How it keeps up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CopyMode {
    /// Writes go to the LUN, and are copied later
    Background,
    /// Writes go to both before they are answered
    WriteBlocking,
}

/// What is done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// The job ends with it
    Report,
    /// It goes on, and tries again
    Ignore,
    /// It stops if there is no space left, and otherwise ends
    Enospc,
    /// It stops, and tries again when it is resumed
    Stop,
}

/// QEMU's word for a choice.
pub(super) fn word(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// `scrub`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("what").args(["background", "pause", "resume", "cancel", "status"])))]
pub struct Scrub {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// Bytes a second at most (or with K, M, G), 0 for no limit; changes the speed of one that is under way [default: 100M]
    #[arg(long, value_name = "SIZE", value_parser = scrub_speed, conflicts_with_all = ["pause", "resume", "cancel", "status"])]
    pub speed: Option<u64>,
    /// Begin, and do not wait for the end
    #[arg(long)]
    pub background: bool,
    /// Let the one under way wait, until it is resumed
    #[arg(long)]
    pub pause: bool,
    /// Let a paused one go on
    #[arg(long)]
    pub resume: bool,
    /// End the one under way
    #[arg(long)]
    pub cancel: bool,
    /// Only tell of the one under way, or of the last
    #[arg(long)]
    pub status: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `mirror`.
#[derive(Debug, Args)]
#[command(
    after_help = "It waits until the copy has caught up, and leaves it kept up: tcmu-dif job complete then has the LUN go over to it, and \
                  tcmu-dif job cancel leaves it as a copy. With --complete the LUN goes over at once. The job goes on in the daemon if this \
                  command is interrupted, and after a restart of the daemon."
)]
pub struct Mirror {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The image to copy it to, which is made; or, with --existing, the URI of an NBD export
    pub target: PathBuf,
    /// The target's format: raw or qcow2 [default: the LUN's]
    #[arg(long, value_parser = order::format)]
    pub format: Option<Format>,
    /// The target is there already; what it holds is overwritten
    #[arg(long)]
    pub existing: bool,
    /// Where the target's protection information is kept, instead of TARGET.pi
    #[arg(long, value_name = "PATH")]
    pub sidecar: Option<PathBuf>,
    /// What is copied
    #[arg(long, value_enum, default_value_t = Sync::Full)]
    pub sync: Sync,
    /// How it keeps up with what is written meanwhile
    #[arg(long, value_enum, default_value_t = CopyMode::Background)]
    pub copy_mode: CopyMode,
    /// Bytes a second at most (or with K, M, G), 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = speed)]
    pub speed: u64,
    /// How much of its time it copies while guests are at work
    #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = share)]
    pub share: u64,
    /// Bytes that are copied again when one of them is written: a power of two [default: 64K, more for more than 8T]
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse)]
    pub granularity: Option<u64>,
    /// What is done about an error of the LUN's image, a block that fails protection among them
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_source_error: OnError,
    /// What is done about an error of the target
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_target_error: OnError,
    /// The job's name [default: the LUN's]
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// When it has caught up, have the LUN go over to the target
    #[arg(long, conflicts_with = "background")]
    pub complete: bool,
    /// Begin, and do not wait until it has caught up
    #[arg(long)]
    pub background: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// What a backup copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackupSync {
    /// All that a guest can read
    Full,
    /// What the image itself holds; the target gets the same backing file
    Top,
    /// What is written from now on, as it was before; until it is cancelled
    None,
    /// What the dirty bitmap has, which is cleared of that if all went well
    Incremental,
    /// What the dirty bitmap has; --bitmap-mode says what becomes of that
    Bitmap,
}

/// What a backup leaves of its dirty bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BitmapMode {
    /// If all went well, what was written since it began
    OnSuccess,
    /// What it had, and what was written since
    Never,
    /// What was not copied, and what was written since
    Always,
}

/// `backup`.
#[derive(Debug, Args)]
#[command(
    after_help = "The target is the LUN as it is when the backup begins: what is written meanwhile waits until the old content is copied. \
                  If a copy before a write fails, the backup ends with that error, and the write goes on. A backup does not outlive the \
                  daemon: after a restart it has ended, with an error. Several LUNs are named one after the other (vm1 /a.qcow2 vm2 \
                  /b.qcow2): all backups are of one point in time, or none begins."
)]
pub struct Backup {
    /// A LUN's name, and the image to copy it to, which is made (or, with --existing, the URI of an NBD export); again for each further LUN
    #[arg(value_names = ["NAME", "TARGET"], num_args = 2.., required = true)]
    pub pairs: Vec<PathBuf>,
    /// The target's format: raw or qcow2 [default: the LUN's]
    #[arg(long, value_parser = order::format)]
    pub format: Option<Format>,
    /// The target is there already; what it holds is overwritten
    #[arg(long)]
    pub existing: bool,
    /// Where the target's protection information is kept, instead of TARGET.pi
    #[arg(long, value_name = "PATH")]
    pub sidecar: Option<PathBuf>,
    /// What is copied
    #[arg(long, value_enum, default_value_t = BackupSync::Full)]
    pub sync: BackupSync,
    /// The dirty bitmap that says what is copied, or with --sync full and top is to say afterwards what was written since
    #[arg(long, value_name = "BITMAP")]
    pub bitmap: Option<String>,
    /// What the backup leaves of the bitmap [default: on-success]
    #[arg(long, value_enum, requires = "bitmap")]
    pub bitmap_mode: Option<BitmapMode>,
    /// Bytes a second at most (or with K, M, G), 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = speed)]
    pub speed: u64,
    /// How much of its time it copies while guests are at work
    #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = share)]
    pub share: u64,
    /// What is done about an error of the LUN's image, a block that fails protection among them
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_source_error: OnError,
    /// What is done about an error of the target
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_target_error: OnError,
    /// The job's name [default: the LUN's]
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// Begin, and do not wait for the end
    #[arg(long)]
    pub background: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `bitmap`.
#[derive(Debug, Subcommand)]
pub enum Bitmap {
    /// Mark from now on what is written to a LUN
    Add {
        /// The bitmap
        #[command(flatten)]
        one: OneBitmap,
        /// Bytes that one mark stands for: a power of two
        #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = super::size::parse)]
        granularity: u64,
        /// Keep it in the LUN's qcow2 image when the LUN stops
        #[arg(long)]
        persistent: bool,
        /// Mark nothing before it is enabled
        #[arg(long)]
        disabled: bool,
    },
    /// Remove a bitmap
    Remove(OneBitmap),
    /// Forget what is marked
    Clear(OneBitmap),
    /// Mark what is written from now on
    Enable(OneBitmap),
    /// Mark nothing from now on
    Disable(OneBitmap),
    /// Mark in a bitmap what is marked in others
    Merge {
        /// The bitmap
        #[command(flatten)]
        one: OneBitmap,
        /// The others, of the same LUN
        #[arg(required = true, value_name = "FROM")]
        from: Vec<String>,
    },
    /// List the dirty bitmaps of a LUN
    List {
        /// The LUN's name
        #[arg(value_parser = Name::new)]
        name: Name,
        /// As always.
        #[command(flatten)]
        json: Json,
    },
}

/// One dirty bitmap.
#[derive(Debug, Args)]
pub struct OneBitmap {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The bitmap's name
    pub bitmap: String,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `snapshot`.
#[derive(Debug, Args)]
#[command(
    after_help = "FILE is a new qcow2 image whose backing file is the LUN's image, which is left as it is at that moment, with its \
                  protection information. With --internal a qcow2 image keeps the disk of that moment within itself, without protection \
                  information, by the name that stands in the place of FILE. Several LUNs are named one after the other \
                  (vm1 /a.qcow2 vm2 /b.qcow2): all of it is of one point in time, or nothing is done."
)]
pub struct Snapshot {
    /// A LUN's name, and the image that is made for it, or the internal snapshot's name; again for each further LUN
    #[arg(value_names = ["NAME", "FILE"], num_args = 2.., required = true)]
    pub pairs: Vec<PathBuf>,
    /// The images are there already, empty, over the LUNs' images
    #[arg(long)]
    pub existing: bool,
    /// Take snapshots within the LUNs' images
    #[arg(long, conflicts_with = "existing")]
    pub internal: bool,
    /// Delete snapshots within the LUNs' images
    #[arg(long, conflicts_with_all = ["existing", "internal"])]
    pub delete: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `stream`.
#[derive(Debug, Args)]
#[command(
    after_help = "Guests go on meanwhile. At the end the images that were brought in are no longer part of the chain; they are left as they \
                  are. The job goes on in the daemon if this command is interrupted, and after a restart of the daemon."
)]
pub struct Stream {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The image of the chain that stays beneath [default: none]
    #[arg(long, value_name = "PATH")]
    pub base: Option<PathBuf>,
    /// Bytes a second at most (or with K, M, G), 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = speed)]
    pub speed: u64,
    /// How much of its time it copies while guests are at work
    #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = share)]
    pub share: u64,
    /// What is done about an error, a block that fails protection among them
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_error: OnError,
    /// The job's name [default: the LUN's]
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// Begin, and do not wait for the end
    #[arg(long)]
    pub background: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `commit`.
#[derive(Debug, Args)]
#[command(
    after_help = "Guests go on meanwhile. At the end the LUN goes over to the image, and what was above it is no longer part of the chain; \
                  it is left as it is. The job goes on in the daemon if this command is interrupted, and after a restart of the daemon: \
                  tcmu-dif job complete has the LUN go over then."
)]
pub struct Commit {
    /// The LUN's name
    #[arg(value_parser = Name::new)]
    pub name: Name,
    /// The image of the chain that is brought to the base, with those between [default: the LUN's own]
    #[arg(long, value_name = "PATH")]
    pub top: Option<PathBuf>,
    /// The image of the chain that all above it is brought to [default: the last]
    #[arg(long, value_name = "PATH")]
    pub base: Option<PathBuf>,
    /// Bytes a second at most (or with K, M, G), 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = speed)]
    pub speed: u64,
    /// How much of its time it copies while guests are at work
    #[arg(long, value_name = "PERCENT", default_value = "100", value_parser = share)]
    pub share: u64,
    /// What is done about an error, a block that fails protection among them
    #[arg(long, value_enum, default_value_t = OnError::Report)]
    pub on_error: OnError,
    /// The job's name [default: the LUN's]
    #[arg(long, value_name = "ID")]
    pub job_id: Option<String>,
    /// Begin, and do not wait: the LUN goes over when tcmu-dif job complete says so
    #[arg(long)]
    pub background: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

/// `job`.
#[derive(Debug, Subcommand)]
pub enum Job {
    /// List the jobs under way, scrubs too
    List(Json),
    /// Have the LUN go over to the target of a mirror that is ready
    Complete(One),
    /// End a job; a mirror that is ready leaves a whole copy behind
    Cancel {
        /// The job
        #[command(flatten)]
        one: One,
        /// End it at once, and leave its target as it is
        #[arg(long)]
        force: bool,
    },
    /// Let a job wait, until it is resumed
    Pause(One),
    /// Let a paused job go on, or one that has stopped for an error try again
    Resume(One),
    /// Set a job's speed
    Speed {
        /// The job
        #[command(flatten)]
        one: One,
        /// Bytes a second at most (or with K, M, G), 0 for no limit
        #[arg(value_name = "SIZE", value_parser = speed)]
        speed: u64,
    },
    /// Set how much of its time a job copies while guests are at work
    Share {
        /// The job
        #[command(flatten)]
        one: One,
        /// 1 to 100
        #[arg(value_name = "PERCENT", value_parser = share)]
        share: u64,
    },
}

/// One job.
#[derive(Debug, Args)]
pub struct One {
    /// The job's name: see tcmu-dif job list
    pub id: String,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}

fn speed(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { super::size::parse(text) }
}

fn share(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches('%').trim_end().parse::<u64>();
    Share::try_from(number.map_err(|_| "give 1 to 100".to_owned())?).map(u64::from)
}

fn scrub_speed(text: &str) -> Result<u64, String> {
    let speed = if text == "0" { 0 } else { super::size::parse(text)? };
    if (1..MIN_SPEED).contains(&speed) {
        return Err(ScrubError::Speed(speed).to_string());
    }
    Ok(speed)
}
