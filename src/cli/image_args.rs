//! The words of `tcmu-dif image check`, `repair`, `map` and `measure`: those of qemu-img.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::{Json, Output};
use crate::admin::order::format;
use crate::image::Format;

/// How to print what a look at an image gives.
#[derive(Debug, Clone, Copy, Args)]
pub struct Printed {
    /// How to print it
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
    /// The same as --output json
    #[arg(long)]
    pub json: bool,
}

impl Printed {
    /// Whether it is for programs.
    pub fn as_json(self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// What `check -r` mends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Clusters that are counted and not used
    Leaks,
    /// All that can be mended
    All,
}

/// `image check`.
#[derive(Debug, Args)]
pub struct ImageCheck {
    /// The format, rather than what the first bytes say: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Mend what is found: leaks (clusters that are counted and not used), or all; the image must not be in use
    #[arg(short, long, value_name = "WHAT", value_enum, hide_possible_values = true)]
    pub repair: Option<What>,
    /// Look at an image that is in use: what is being written may then seem damaged
    #[arg(short = 'U', long, conflicts_with = "repair")]
    pub force_share: bool,
    /// As always.
    #[command(flatten)]
    pub printed: Printed,
    /// The image
    pub path: PathBuf,
}

/// `image repair`.
#[derive(Debug, Args)]
pub struct ImageRepair {
    /// The format, rather than what the first bytes say: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// As always.
    #[command(flatten)]
    pub printed: Printed,
    /// The image
    pub path: PathBuf,
}

/// `image map`.
#[derive(Debug, Args)]
pub struct ImageMap {
    /// The format, rather than what the first bytes say: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Begin here (bytes, or with K, M, G, T)
    #[arg(short, long, value_name = "OFFSET", value_parser = super::size::parse)]
    pub start_offset: Option<u64>,
    /// Look at so many bytes at most
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = super::size::parse)]
    pub max_length: Option<u64>,
    /// Look at an image that is in use: what is being written may be missing
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// As always.
    #[command(flatten)]
    pub printed: Printed,
    /// The image
    pub path: PathBuf,
}

/// `image measure`.
#[derive(Debug, Args)]
pub struct ImageMeasure {
    /// The new image's format: raw or qcow2
    #[arg(short = 'O', long, value_name = "FORMAT", default_value = "raw", value_parser = format)]
    pub output_format: Format,
    /// The new image's options: cluster_size=65536, refcount_bits=16, compat=1.1, preallocation=off|metadata|falloc|full; separated by commas
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Measure a disk of that size with nothing on it (bytes, or with K, M, G, T)
    #[arg(long, value_name = "SIZE", value_parser = super::size::parse, conflicts_with = "path")]
    pub size: Option<u64>,
    /// The image's format, rather than what its first bytes say: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Look at an image that is in use: what is being written may be missing
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// As always.
    #[command(flatten)]
    pub printed: Printed,
    /// The image whose content the new one is to have
    #[arg(required_unless_present = "size")]
    pub path: Option<PathBuf>,
}

/// `image owner`.
#[derive(Debug, Args)]
pub struct ImageOwner {
    /// Begin to keep whose it is, in IMAGE.owner: from then on one host at a time has it, and one that has lost it never writes again
    #[arg(long, conflicts_with = "take_over")]
    pub share: bool,
    /// Take it from a host that is gone, after waiting until that can have begun its last I/O (15 seconds, and 10 to see whether it lives)
    #[arg(long)]
    pub take_over: bool,
    /// Even from a host that shows signs of life; it stops using the image
    #[arg(long, requires = "take_over")]
    pub force: bool,
    /// As always.
    #[command(flatten)]
    pub json: Json,
    /// The image
    pub path: PathBuf,
}

/// `image snapshot`.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("action").args(["list", "create", "apply", "delete"])))]
pub struct ImageSnapshot {
    /// List the snapshots; what is done if nothing else is asked for
    #[arg(short, long)]
    pub list: bool,
    /// Make a snapshot of the disk as it is
    #[arg(short, long, value_name = "NAME")]
    pub create: Option<String>,
    /// Make the disk what it was; what it holds now is lost. By name or ID, or snapshot.name=NAME, snapshot.id=ID
    #[arg(short, long, value_name = "NAME")]
    pub apply: Option<String>,
    /// Delete a snapshot, named as for -a
    #[arg(short, long, value_name = "NAME")]
    pub delete: Option<String>,
    /// List them while somebody else is writing to the image; what is shown may be out of date
    #[arg(short = 'U', long, conflicts_with_all = ["create", "apply", "delete"])]
    pub force_share: bool,
    /// Print the list as JSON
    #[arg(long, conflicts_with_all = ["create", "apply", "delete"])]
    pub json: bool,
    /// The image
    pub path: PathBuf,
}

/// `image resize`.
#[derive(Debug, Args)]
pub struct ImageResize {
    /// The format, rather than what the first bytes say
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    pub format: Option<Format>,
    /// Agree that what lies beyond a smaller size is deleted
    #[arg(long)]
    pub shrink: bool,
    /// The image
    pub path: PathBuf,
    /// The new size (bytes, or with K, M, G, T), or with + or - before it how much more or less
    #[arg(value_parser = super::image_resize::NewSize::parse, allow_hyphen_values = true)]
    pub size: super::image_resize::NewSize,
    /// As always.
    #[command(flatten)]
    pub json: Json,
}
