//! Which image a LUN has, once a mirror has moved it: the choice that a pivot makes durable, and that every later start follows.
//!
//! The kernel's `dev_config` and the files of luns.d may name the image that was left for a while, or for ever: what stands here comes
//! first, so that a LUN never wakes up with an image that has missed writes. The file is named after the LUN's name, says which image was
//! left for which, and outlives the LUN: whoever makes it again with the old image is told. It is forgotten when a new file is made in the
//! old image's place, or when the LUN is moved back.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    config::{ConfigError, DeviceConfig},
    state_file::{StateFile, now_ms},
};

/// The folder of these files.
pub const FOLDER: &str = "moved";

/// The moves of one LUN.
#[derive(Debug, Clone)]
pub struct Moves(StateFile);

#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    /// By the image that was left.
    left: BTreeMap<PathBuf, Move>,
}

/// Where a LUN went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// The new configuration, as in `dev_config` after the subtype.
    pub to: String,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
}

impl Move {
    /// The new configuration.
    ///
    /// # Errors
    /// If it makes no sense.
    pub fn config(&self) -> Result<DeviceConfig, ConfigError> {
        DeviceConfig::parse(&self.to)
    }
}

fn nonsense(e: ConfigError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

impl Moves {
    /// Those of the LUN of that name. Nothing is opened yet.
    pub fn of(state_dir: &Path, name: &str) -> Moves {
        Moves(StateFile::new(state_dir, FOLDER, &format!("name:{name}")))
    }

    /// Where they stand.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Where the LUN went from that image, if it did.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn from(&self, image: &Path) -> io::Result<Option<Move>> {
        Ok(self.0.load::<Content>()?.and_then(|content| content.left.get(image).cloned()))
    }

    /// The configuration with the image that the LUN has now.
    ///
    /// # Errors
    /// If that cannot be told: the image that is named may have missed writes.
    pub fn follow(&self, config: &DeviceConfig) -> io::Result<DeviceConfig> {
        let Some(moved) = self.from(&config.image)? else { return Ok(config.clone()) };
        let to = moved.config().map_err(nonsense)?;
        Ok(DeviceConfig { image: to.image, format: to.format, sidecar: to.sidecar, ..config.clone() })
    }

    /// Makes durable that the LUN has the second image instead of the first.
    ///
    /// # Errors
    /// The file system's. [`Moves::from`] tells what holds then.
    pub fn note(&self, from: &DeviceConfig, to: &DeviceConfig) -> io::Result<()> {
        let mut content = self.0.load::<Content>()?.unwrap_or_default();
        let now = Move { to: to.to_string(), at_ms: now_ms() };
        // Whoever names an image that was left earlier comes to the newest one; that itself is none that was left.
        content.left.remove(&to.image);
        content.left.values_mut().for_each(|moved| moved.to.clone_from(&now.to));
        content.left.insert(from.image.clone(), now);
        self.0.save(&content, true)
    }

    /// A new file is in that image's place.
    ///
    /// # Errors
    /// The file system's.
    pub fn forget(&self, image: &Path) -> io::Result<()> {
        let Some(mut content) = self.0.load::<Content>()? else { return Ok(()) };
        match content.left.remove(image) {
            None => Ok(()),
            Some(_) if content.left.is_empty() => self.0.remove(),
            Some(_) => self.0.save(&content, true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_names_an_image_that_was_left_comes_to_the_newest_and_back_again() {
        let dir = tempfile::tempdir().unwrap();
        let moves = Moves::of(dir.path(), "vm1");
        let of = |image: &str| DeviceConfig::new(image);
        let now = |image: &str| moves.follow(&of(image)).unwrap().image.display().to_string();
        assert_eq!(now("/a"), "/a");
        let b = DeviceConfig { sidecar: Some("/s".into()), ..of("/b") };
        moves.note(&of("/a"), &b).unwrap();
        assert_eq!(moves.follow(&of("/a")).unwrap(), b);
        moves.note(&of("/b"), &of("/c")).unwrap();
        assert_eq!((now("/a"), now("/b"), now("/c")), ("/c".into(), "/c".into(), "/c".into()));
        // Back to the first: it is none that was left any more.
        moves.note(&of("/c"), &of("/a")).unwrap();
        assert_eq!((now("/a"), now("/b"), now("/c")), ("/a".into(), "/a".into(), "/a".into()));
        // Settings that are no image's stay as they were asked for.
        let read_only = DeviceConfig { read_only: true, ..of("/b") };
        assert!(moves.follow(&read_only).unwrap().read_only);
        moves.forget(Path::new("/b")).unwrap();
        assert_eq!((now("/b"), now("/c")), ("/b".into(), "/a".into()));
        moves.forget(Path::new("/c")).unwrap();
        assert!(!moves.path().exists());
        assert_eq!(Moves::of(dir.path(), "vm2").follow(&of("/a")).unwrap(), of("/a"));
    }

    #[test]
    fn a_file_without_sense_gives_no_image_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let moves = Moves::of(dir.path(), "vm1");
        moves.note(&DeviceConfig::new("/a"), &DeviceConfig::new("/b")).unwrap();
        std::fs::write(moves.path(), "{").unwrap();
        assert!(moves.follow(&DeviceConfig::new("/a")).is_err());
        assert!(moves.note(&DeviceConfig::new("/b"), &DeviceConfig::new("/c")).is_err());
    }
}
