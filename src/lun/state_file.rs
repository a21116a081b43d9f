//! What a LUN has to know again after a restart or a reboot, in a file of its own under /var/lib/tcmu-dif.
//!
//! The file is named after the LUN's serial number, so that a new LUN of an old name does not wake up with the other's
//! settings, and it says its version, so that a newer one is refused in words. It is written beside and renamed over: a
//! reader sees the old content or the new. The LUN's thread writes it, at start it is read, and `tcmu-dif delete` removes it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::files;

use crate::scsi::naa_from_serial;

/// The usual place of what has to be there after a reboot.
pub const STATE_DIR: &str = "/var/lib/tcmu-dif";

const VERSION: u32 = 1;

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// One file of one LUN.
#[derive(Debug, Clone)]
pub struct StateFile {
    path: PathBuf,
    serial: String,
}

#[derive(Serialize, Deserialize)]
struct Content<T> {
    version: u32,
    serial: String,
    #[serde(flatten)]
    state: T,
}

impl StateFile {
    /// The file in that folder of the LUN with that serial number. Nothing is opened yet.
    pub fn new(state_dir: &Path, folder: &str, serial: &str) -> StateFile {
        let name = format!("{:016x}.json", naa_from_serial(serial));
        StateFile { path: state_dir.join(folder).join(name), serial: serial.to_owned() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Forgets what was saved, if anything was.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self) -> io::Result<()> {
        files::remove(&self.path)
    }

    /// What was saved last, if anything was.
    ///
    /// # Errors
    /// The file system's; InvalidData if it makes no sense or is of a version that isn't known.
    pub fn load<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let content: Content<serde_json::Value> = serde_json::from_slice(&text)?;
        if content.version != VERSION {
            let words = format!("version {} of the file, and this program knows {VERSION}", content.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, words));
        }
        // Two serial numbers of one hash: the file is the other's.
        if content.serial != self.serial {
            return Ok(None);
        }
        Ok(Some(serde_json::from_value(content.state)?))
    }

    /// Saves; with `durable`, so that it outlives a power cut. If it fails, what was saved before stays.
    ///
    /// # Errors
    /// The file system's.
    pub fn save<T: Serialize>(&self, state: T, durable: bool) -> io::Result<()> {
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
        let content = Content { version: VERSION, serial: self.serial.clone(), state };
        files::replace(&self.path, &serde_json::to_vec(&content)?, durable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Pages {
        mode_pages: Vec<u8>,
    }

    fn pages(bytes: &[u8]) -> Pages {
        Pages { mode_pages: bytes.to_vec() }
    }

    #[test]
    fn what_was_saved_last_is_loaded_by_the_lun_of_that_serial_number_alone() {
        let dir = tempfile::tempdir().unwrap();
        let of = |serial| StateFile::new(dir.path(), "mode-pages", serial);
        let file = of("vm1");
        assert_eq!(file.load::<Pages>().unwrap(), None);
        file.save(pages(&[1, 2, 3]), true).unwrap();
        file.save(pages(&[4, 5]), false).unwrap();
        assert_eq!(of("vm1").load().unwrap(), Some(pages(&[4, 5])));
        assert_eq!(of("vm2").load::<Pages>().unwrap(), None);
        let other = StateFile { serial: "of the same hash".into(), ..file.clone() };
        assert_eq!(other.load::<Pages>().unwrap(), None);
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.load::<Pages>().unwrap(), None);
    }

    #[test]
    fn a_file_of_a_later_version_or_without_sense_is_refused_and_a_save_that_fails_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path(), "mode-pages", "vm1");
        file.save(pages(&[1]), true).unwrap();
        // Something in the way of the file that is written beside.
        fs::create_dir(file.path.with_extension("json.new")).unwrap();
        assert!(file.save(pages(&[2]), true).is_err());
        assert_eq!(file.load().unwrap(), Some(pages(&[1])));
        for wrong in
            ["", "{}", r#"{"version":2,"serial":"vm1","mode_pages":[9]}"#, r#"{"version":1,"serial":"vm1"}"#]
        {
            fs::write(&file.path, wrong).unwrap();
            assert!(file.load::<Pages>().is_err(), "{wrong}");
        }
    }
}
