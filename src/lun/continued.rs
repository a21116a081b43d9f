//! What initiators have set of a LUN, or have not been told yet, in a file under /run beside the in-flight record: it outlives the daemon, and not the host.
//!
//! The file says which instance of the device it is of, so that a new device never wakes up with another's state, and its version. It is written
//! by the LUN's thread, on a file system in memory, and seldom: when a mode page or a unit attention changes.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::state_file::check_version;
use crate::{
    files,
    handover::state::Modes,
    scsi::continued::{Continued, Keeper, Unfinished},
};

const VERSION: u32 = 1;

/// The file of one device.
#[derive(Debug, Clone)]
pub struct ContinuedFile {
    /// Where it is; its folder is there.
    pub path: PathBuf,
    /// The number of this instance of the device: another for each that ever was since boot.
    pub device: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content {
    version: u32,
    device: u64,
    mode_pages: Vec<u8>,
    write_cache: bool,
    unit_attentions: Vec<(u8, u8)>,
    unfinished: Option<Word>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    Format,
    Sanitize,
    SanitizeWithAuse,
}

impl Word {
    fn of(unfinished: Unfinished) -> Word {
        match unfinished {
            Unfinished::Format => Word::Format,
            Unfinished::Sanitize { ause: false } => Word::Sanitize,
            Unfinished::Sanitize { ause: true } => Word::SanitizeWithAuse,
        }
    }

    fn unfinished(&self) -> Unfinished {
        match self {
            Word::Format => Unfinished::Format,
            Word::Sanitize => Unfinished::Sanitize { ause: false },
            Word::SanitizeWithAuse => Unfinished::Sanitize { ause: true },
        }
    }
}

/// What is kept, as it goes to another host.
pub fn to_modes(kept: Continued) -> Modes {
    let word = |w: Word| serde_json::to_value(w).ok().and_then(|v| v.as_str().map(str::to_owned));
    Modes {
        pages: kept.pages,
        write_cache: kept.write_cache,
        unit_attentions: kept.attentions,
        unfinished: kept.unfinished.map(Word::of).and_then(word),
    }
}

/// The same as it comes from there; nothing, if it has a word that is not known.
pub fn from_modes(modes: &Modes) -> Option<Continued> {
    let word = modes.unfinished.as_ref().map(|w| serde_json::from_value::<Word>(w.as_str().into()));
    let unfinished = word.transpose().ok()?.map(|w| w.unfinished());
    Some(Continued {
        pages: modes.pages.clone(),
        write_cache: modes.write_cache,
        attentions: modes.unit_attentions.clone(),
        unfinished,
    })
}

impl ContinuedFile {
    /// What was kept in that file, of whichever instance of the device.
    ///
    /// # Errors
    /// As [`ContinuedFile::load`].
    pub fn load_any(path: &Path) -> io::Result<Option<Continued>> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        check_version(path, &text, VERSION)?;
        let content: Content = serde_json::from_slice(&text)?;
        ContinuedFile { path: path.to_owned(), device: content.device }.load()
    }

    /// What was kept of this device, if anything was.
    ///
    /// # Errors
    /// The file system's; InvalidData if it makes no sense, and [`super::state_file::NewerVersion`].
    pub fn load(&self) -> io::Result<Option<Continued>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        check_version(&self.path, &text, VERSION)?;
        let content: Content = serde_json::from_slice(&text)?;
        let unfinished = content.unfinished.map(|word| word.unfinished());
        Ok((content.device == self.device).then_some(Continued {
            pages: content.mode_pages,
            write_cache: content.write_cache,
            attentions: content.unit_attentions,
            unfinished,
        }))
    }
}

impl Keeper for ContinuedFile {
    fn keep(&self, state: &Continued) -> io::Result<()> {
        let unfinished = state.unfinished.map(Word::of);
        let content = Content {
            version: VERSION,
            device: self.device,
            mode_pages: state.pages.clone(),
            write_cache: state.write_cache,
            unit_attentions: state.attentions.clone(),
            unfinished,
        };
        files::replace(&self.path, &serde_json::to_vec(&content)?, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lun::state_file::NewerVersion;

    fn state(unfinished: Option<Unfinished>) -> Continued {
        Continued { pages: vec![8, 1], write_cache: true, attentions: vec![(0x2a, 1), (0x2a, 9)], unfinished }
    }

    #[test]
    fn what_was_kept_is_that_of_this_instance_of_the_device_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = ContinuedFile { path: dir.path().join("uio3.json"), device: 77 };
        assert_eq!(file.load().unwrap(), None);
        let all = [None, Some(Unfinished::Format)].into_iter();
        for state in all.chain([false, true].map(|ause| Some(Unfinished::Sanitize { ause }))).map(state) {
            file.keep(&state).unwrap();
            assert_eq!(file.load().unwrap(), Some(state.clone()));
            assert_eq!(ContinuedFile::load_any(&file.path).unwrap(), Some(state.clone()));
            assert_eq!(from_modes(&to_modes(state.clone())), Some(state.clone()));
            let other = Modes { unfinished: Some("other".into()), ..to_modes(state) };
            assert_eq!(from_modes(&other), None);
        }
        assert_eq!(ContinuedFile { device: 78, ..file }.load().unwrap(), None);
    }

    #[test]
    fn a_newer_version_is_refused_in_words_and_what_makes_no_sense_too() {
        let dir = tempfile::tempdir().unwrap();
        let file = ContinuedFile { path: dir.path().join("uio3.json"), device: 77 };
        fs::write(&file.path, r#"{"version":2,"device":77,"more":[]}"#).unwrap();
        let e = file.load().unwrap_err();
        assert!(NewerVersion::of(&e).is_some_and(|newer| newer.version == 2), "{e}");
        for wrong in ["", "[]", "{}", r#"{"version":1,"device":77}"#] {
            fs::write(&file.path, wrong).unwrap();
            assert!(file.load().is_err(), "{wrong}");
        }
    }
}
