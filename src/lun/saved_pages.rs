//! The saved mode pages of a LUN, in a file under /var/lib/tcmu-dif: what MODE SELECT with SP=1 keeps across restarts and
//! power cycles (SPC-5 5.10). The LUN's thread writes it, at start it is read, and `tcmu-dif delete` removes it.
//!
//! The file is named after the LUN's serial number, so that a new LUN of an old name does not wake up with the other's
//! settings. It is written beside, synced and renamed over: a power cut leaves the old pages or the new ones.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::scsi::{SavedPages, naa_from_serial};

/// The usual place of what has to be there after a reboot.
pub const STATE_DIR: &str = "/var/lib/tcmu-dif";

const VERSION: u32 = 1;

/// The file of one LUN.
#[derive(Debug, Clone)]
pub struct SavedPagesFile {
    path: PathBuf,
    serial: String,
}

#[derive(Serialize, Deserialize)]
struct Content {
    version: u32,
    serial: String,
    mode_pages: Vec<u8>,
}

impl SavedPagesFile {
    /// The file of the LUN with that serial number. Nothing is opened yet.
    pub fn new(state_dir: &Path, serial: &str) -> SavedPagesFile {
        let name = format!("{:016x}.json", naa_from_serial(serial));
        SavedPagesFile { path: state_dir.join("mode-pages").join(name), serial: serial.to_owned() }
    }

    /// Forgets what was saved, if anything was.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    fn read(&self) -> io::Result<Option<Vec<u8>>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let content: Content = serde_json::from_slice(&text)?;
        if content.version != VERSION {
            let words = format!("version {} of the file, and this program knows {VERSION}", content.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, words));
        }
        // Two serial numbers of one hash: the file is the other's.
        Ok(Some(content.mode_pages).filter(|_| content.serial == self.serial))
    }
}

impl SavedPages for SavedPagesFile {
    fn load(&self) -> Option<Vec<u8>> {
        self.read().unwrap_or_else(|error| {
            warn!(path = %self.path.display(), %error, "the saved mode pages cannot be read: defaults taken");
            None
        })
    }

    fn save(&self, pages: &[u8]) -> io::Result<()> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let content = Content { version: VERSION, serial: self.serial.clone(), mode_pages: pages.to_vec() };
        let beside = self.path.with_extension("json.new");
        let written = (|| {
            let mut file = File::create(&beside)?;
            file.write_all(&serde_json::to_vec(&content)?)?;
            file.sync_all()?;
            fs::rename(&beside, &self.path)
        })();
        if written.is_err() {
            fs::remove_file(&beside).ok();
        }
        written?;
        File::open(dir)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_last_is_loaded_by_the_lun_of_that_serial_number_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = SavedPagesFile::new(dir.path(), "vm1");
        assert_eq!(file.load(), None);
        file.save(&[1, 2, 3]).unwrap();
        file.save(&[4, 5]).unwrap();
        assert_eq!(SavedPagesFile::new(dir.path(), "vm1").load(), Some(vec![4, 5]));
        assert_eq!(SavedPagesFile::new(dir.path(), "vm2").load(), None);
        let other = SavedPagesFile { serial: "of the same hash".into(), ..file.clone() };
        assert_eq!(other.load(), None);
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.load(), None);
    }

    #[test]
    fn a_damaged_file_gives_the_defaults_and_a_save_that_fails_keeps_the_old_pages() {
        let dir = tempfile::tempdir().unwrap();
        let file = SavedPagesFile::new(dir.path(), "vm1");
        file.save(&[7]).unwrap();
        // Something else stands where the new file would be written.
        fs::create_dir(file.path.with_extension("json.new")).unwrap();
        assert!(file.save(&[8]).is_err());
        assert_eq!(file.load(), Some(vec![7]));
        fs::write(&file.path, b"{").unwrap();
        assert_eq!(file.load(), None);
    }
}
