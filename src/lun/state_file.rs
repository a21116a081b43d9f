//! What a LUN has to know again after a restart or a reboot, in a file of its own under /var/lib/tcmu-dif.
//!
//! The file is named after the LUN's serial number, so that a new LUN of an old name does not wake up with the other's
//! settings, and it says its version, so that a newer one is refused in words, and not written over either. It is written beside and renamed over: a
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

/// A file of a version that isn't known: a newer program wrote it.
#[derive(Debug, thiserror::Error)]
#[error("{} is of version {version}, and this program knows {known}", path.display())]
pub struct NewerVersion {
    /// The file.
    pub path: PathBuf,
    /// Its version.
    pub version: u32,
    /// Ours.
    pub known: u32,
}

impl NewerVersion {
    /// It, if that is what the error is.
    pub fn of(error: &io::Error) -> Option<&NewerVersion> {
        error.get_ref()?.downcast_ref()
    }

    /// What to do about it.
    pub fn next_step(&self) -> String {
        format!(
            "start the version of tcmu-dif that wrote it, or begin without it: rm {}",
            self.path.display()
        )
    }
}

/// All that is read of a file before its version is known to be ours.
#[derive(Deserialize)]
struct Head {
    #[serde(default = "first")]
    version: u32,
}

/// Files from before they had one.
fn first() -> u32 {
    1
}

/// Whether a file's version is one that this program knows; a file in JSON that says none is of the first.
///
/// # Errors
/// [`NewerVersion`], and InvalidData for what is no JSON object.
pub fn check_version(path: &Path, text: &[u8], known: u32) -> io::Result<()> {
    let Head { version } = serde_json::from_slice(text)?;
    if (1..=known).contains(&version) {
        return Ok(());
    }
    let newer = NewerVersion { path: path.to_owned(), version, known };
    Err(io::Error::new(io::ErrorKind::InvalidData, newer))
}

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

    /// The same, so that it does not come back after a power cut.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove_durably(&self) -> io::Result<()> {
        self.remove()?;
        files::sync_folder_of(&self.path)
    }

    /// What was saved last, if anything was.
    ///
    /// # Errors
    /// The file system's; InvalidData if it makes no sense or is of a version that isn't known.
    pub fn load<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        let Some(text) = self.text()? else { return Ok(None) };
        check_version(&self.path, &text, VERSION)?;
        let content: Content<serde_json::Value> = serde_json::from_slice(&text)?;
        // Two serial numbers of one hash: the file is the other's.
        if content.serial != self.serial {
            return Ok(None);
        }
        Ok(Some(serde_json::from_value(content.state)?))
    }

    fn text(&self) -> io::Result<Option<Vec<u8>>> {
        match fs::read(&self.path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether what was saved, if anything, is of a version that is known. What makes no sense is not newer.
    ///
    /// # Errors
    /// [`NewerVersion`] alone.
    pub fn check(&self) -> io::Result<()> {
        let Ok(Some(text)) = self.text() else { return Ok(()) };
        check_version(&self.path, &text, VERSION).or_else(|e| match NewerVersion::of(&e) {
            Some(_) => Err(e),
            None => Ok(()),
        })
    }

    /// Saves; with `durable`, so that it outlives a power cut. If it fails, what was saved before stays.
    ///
    /// # Errors
    /// The file system's; [`NewerVersion`] if that is what would be lost.
    pub fn save<T: Serialize>(&self, state: T, durable: bool) -> io::Result<()> {
        self.check()?;
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
    fn a_newer_file_is_refused_in_words_whatever_else_is_in_it_and_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let file = StateFile::new(dir.path(), "mode-pages", "vm1");
        fs::create_dir_all(file.path().parent().unwrap()).unwrap();
        for newer in
            [r#"{"version":2,"serial":"vm1","mode_pages":[9]}"#, r#"{"version":77,"all":{"is":"otherwise"}}"#]
        {
            fs::write(file.path(), newer).unwrap();
            for e in [
                file.load::<Pages>().unwrap_err(),
                file.check().unwrap_err(),
                file.save(pages(&[1]), true).unwrap_err(),
            ] {
                let newer = NewerVersion::of(&e).unwrap();
                assert!(newer.version > 1 && newer.next_step().contains(&file.path().display().to_string()));
                assert!(e.to_string().contains("this program knows 1"), "{e}");
            }
            assert_eq!(fs::read_to_string(file.path()).unwrap(), newer);
        }
        // One that is damaged is nobody's loss.
        fs::write(file.path(), "{").unwrap();
        file.check().unwrap();
        file.save(pages(&[1]), true).unwrap();
        assert_eq!(file.load().unwrap(), Some(pages(&[1])));
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
        for wrong in [
            "",
            "{}",
            "[]",
            r#"{"version":2,"serial":"vm1","mode_pages":[9]}"#,
            r#"{"version":1,"serial":"vm1"}"#,
        ] {
            fs::write(&file.path, wrong).unwrap();
            assert!(file.load::<Pages>().is_err(), "{wrong}");
        }
    }
}
