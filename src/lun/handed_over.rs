//! What a LUN that another host has handed over begins with, in a file of its own until it has begun: the generation in which it may take its image, mode pages
//! and unit attentions as its initiators know them, what protection has counted, and dirty bitmaps.
//!
//! Written by whoever makes the LUN here, before it does (and by whoever has one begin again here that did not go over); read at the LUN's start, and removed once it serves.

use std::{io, path::Path};

use serde::{Deserialize, Serialize};

use super::{LunParams, continued, state_file::StateFile};
use crate::{
    handover::state::{DirtyBitmap, Modes},
    pi::Counters,
    scsi::continued::Continued,
};

/// The folder of these files.
pub const FOLDER: &str = "handed-over";

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HandedOver {
    /// The generation in which the image was given back; none of one that was made here.
    pub generation: Option<u64>,
    /// What initiators have; without it they are told of a power on.
    pub modes: Option<Modes>,
    /// What protection has counted there.
    pub counters: Option<Counters>,
    /// Dirty bitmaps that do not lie in the image.
    #[serde(default)]
    pub bitmaps: Vec<DirtyBitmap>,
}

impl HandedOver {
    /// The file of the LUN with that serial number.
    pub fn file(state_dir: &Path, serial: &str) -> StateFile {
        StateFile::new(state_dir, FOLDER, serial)
    }

    /// What initiators have, as the target takes it up.
    pub(super) fn continued(&self) -> Option<Continued> {
        self.modes.as_ref().and_then(continued::from_modes)
    }
}

/// That of a LUN which starts, and its file.
///
/// # Errors
/// The file system's, or that it makes no sense: whose the image is would not be looked at.
pub(super) fn of(params: &LunParams) -> io::Result<Option<(HandedOver, StateFile)>> {
    let Some(file) = params.state_file(FOLDER) else { return Ok(None) };
    Ok(file.load::<HandedOver>()?.map(|found| (found, file)))
}
