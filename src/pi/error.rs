//! Why protection cannot be put on an image, and what an administrator does next. Called by the LUN and the command line.

use std::path::{Path, PathBuf};

use super::{
    store::{PiMode, Stamp, StoreError},
    tuple::PiType,
};
use crate::volume::IoError;

/// A sidecar that could not be put to use.
#[derive(Debug, thiserror::Error)]
#[error("protection information {}: {what}", .sidecar.display())]
pub struct PiOpenError {
    /// The sidecar.
    pub sidecar: PathBuf,
    /// The image that it belongs to.
    pub image: PathBuf,
    /// What is the matter.
    #[source]
    pub what: PiOpenErrorKind,
}

/// The kinds of [`PiOpenError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PiOpenErrorKind {
    /// There is no sidecar.
    #[error("there is no sidecar")]
    Missing,
    /// There is one already.
    #[error("there is a sidecar already")]
    Exists,
    /// The file is not one, or is damaged, or cannot be read.
    #[error("{0}")]
    Store(#[source] StoreError),
    /// It holds another type of protection.
    #[error("it holds {has}, and {wanted} was asked for")]
    Type {
        /// In the sidecar.
        has: PiType,
        /// Asked for.
        wanted: PiType,
    },
    /// It stays true across a crash in another way.
    #[error("it is in mode {has}, and mode {wanted} was asked for")]
    Mode {
        /// In the sidecar.
        has: PiMode,
        /// Asked for.
        wanted: PiMode,
    },
    /// It is for blocks of another size.
    #[error("it is for blocks of {has} bytes, and the LUN has blocks of {wanted}")]
    BlockSize {
        /// In the sidecar.
        has: u64,
        /// The LUN's.
        wanted: u64,
    },
    /// It covers another number of blocks, though it was closed cleanly.
    #[error("it covers {has} blocks, and the image has {image}")]
    Capacity {
        /// In the sidecar.
        has: u64,
        /// The image's.
        image: u64,
    },
    /// The image is not as we left it.
    #[error("the image has been changed by something else (left with {left}; found with {found})")]
    ImageChanged {
        /// At the last clean close.
        left: Stamp,
        /// Now.
        found: Stamp,
    },
    /// Reading the image for the recheck after a crash, or its stamp.
    #[error("{0}")]
    Image(#[source] Box<IoError>),
}

impl PiOpenError {
    pub(super) fn new(sidecar: &Path, image: &Path, what: PiOpenErrorKind) -> PiOpenError {
        PiOpenError { sidecar: sidecar.to_owned(), image: image.to_owned(), what }
    }

    /// What to do about it, as a sentence with the commands.
    pub fn next_step(&self) -> Option<String> {
        let image = self.image.display();
        let default = super::store::default_path(&self.image) == self.sidecar;
        let words = if default { String::new() } else { format!(" --sidecar {}", self.sidecar.display()) };
        let rebuild = format!("`tcmu-dif pi rebuild {image}{words}`");
        let adopt = format!("`tcmu-dif pi adopt {image}{words}`");
        let verify = format!("`tcmu-dif pi verify {image}{words}`");
        use PiOpenErrorKind as K;
        Some(match &self.what {
            K::Missing => format!("make one with {rebuild}"),
            K::Exists => format!("see what it says with `tcmu-dif pi status {image}{words}`"),
            K::ImageChanged { .. } | K::Capacity { .. } => format!(
                "see which blocks differ with {verify}; if the image is as it should be, take those blocks as they are with \
                 {adopt}, or make everything anew with {rebuild}"
            ),
            K::Store(StoreError::Damaged) => {
                format!("make it anew from the data, which is then taken as good, with {rebuild}")
            }
            K::Store(StoreError::NotASidecar | StoreError::NotEmpty) => {
                "name another file with --sidecar, or move this one away".to_owned()
            }
            K::Store(StoreError::Version(_) | StoreError::Features(_) | StoreError::UnknownType(_)) => {
                "use the version of tcmu-dif that wrote it".to_owned()
            }
            K::Store(StoreError::TooLarge(_)) => "use a smaller image, or no protection".to_owned(),
            K::Store(StoreError::Io(_)) => "see to the file and its directory, and try again".to_owned(),
            K::Type { has, .. } => format!("ask for {has}, or change the type with {rebuild} --pi TYPE"),
            K::Mode { has, wanted } => {
                format!("ask for mode {has}, or make it anew with {rebuild} --mode {wanted}")
            }
            K::BlockSize { has, .. } => {
                format!("ask for blocks of {has} bytes, or make it anew with {rebuild} --block-size N")
            }
            K::Image(_) => return None,
        })
    }
}
