//! The saved mode pages of a LUN: what MODE SELECT with SP=1 keeps across restarts and power cycles (SPC-5 5.10).

use std::io;

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{LunError, LunParams, state_file::StateFile};
use crate::scsi::SavedPages;

/// The folder of these files.
pub const FOLDER: &str = "mode-pages";

/// Whether the LUN may go without what was saved of it, if that cannot be read: not if a newer version has written it, for mode pages can hold a
/// write protection, or that writes reach the medium before they are answered. What only limits or accounts for something may be missing.
///
/// # Errors
/// [`LunError::Saved`].
pub(super) fn check(params: &LunParams) -> Result<(), LunError> {
    let Some(file) = params.state_file(FOLDER) else { return Ok(()) };
    file.check().map_err(LunError::Saved)
}

/// The file of one LUN.
#[derive(Debug, Clone)]
pub struct SavedPagesFile(pub StateFile);

#[derive(Serialize, Deserialize)]
struct Content {
    mode_pages: Vec<u8>,
}

impl SavedPages for SavedPagesFile {
    fn load(&self) -> Option<Vec<u8>> {
        let loaded = self.0.load::<Content>().unwrap_or_else(|error| {
            let path = self.0.path().display();
            warn!(%path, %error, "the saved mode pages cannot be read: defaults taken");
            None
        });
        loaded.map(|content| content.mode_pages)
    }

    fn save(&self, pages: &[u8]) -> io::Result<()> {
        self.0.save(Content { mode_pages: pages.to_vec() }, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_gives_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let file = SavedPagesFile(StateFile::new(dir.path(), FOLDER, "vm1"));
        assert_eq!(file.load(), None);
        file.save(&[7]).unwrap();
        assert_eq!(file.load(), Some(vec![7]));
        std::fs::write(file.0.path(), b"{").unwrap();
        assert_eq!(file.load(), None);
    }
}
