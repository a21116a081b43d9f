//! Which image a LUN has, once a mirror has moved it: the choice that a pivot makes durable, and that every later start follows.
//!
//! The kernel's `dev_config` and the files of luns.d may name the image that was left for a while, or for ever: what stands here comes
//! first, so that a LUN never wakes up with an image that has missed writes. The file is named after the LUN's name, says which image was
//! left for which, and outlives the LUN: whoever makes it again with the old image is told. It is forgotten when a new file is made in the
//! old image's place, or when the LUN is moved back.
//!
//! Several LUNs that are moved in one transaction are moved by one more file, whose coming is the moment of it: [`note_together`]. The
//! LUNs' own files follow; a process that dies between is followed by one that finishes that first ([`settle`]).

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{
    config::{ConfigError, DeviceConfig},
    state_file::{StateFile, now_ms},
};

/// The folder of these files.
pub const FOLDER: &str = "moved";

/// The name under which moves of several LUNs stand for the moment; those of one stand under `name:`.
const TOGETHER: &str = "together";

/// Held by who finishes or begins moves of several LUNs.
static TURN: Mutex<()> = Mutex::new(());

/// The moves of one LUN.
#[derive(Debug, Clone)]
pub struct Moves {
    file: StateFile,
    state_dir: PathBuf,
    name: String,
}

/// Moves of several LUNs that hold all together.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Together {
    moves: Vec<OneOfMany>,
}

#[derive(Debug, Serialize, Deserialize)]
struct OneOfMany {
    lun: String,
    /// The image that is left.
    from: PathBuf,
    /// The new configuration, as in [`Move`].
    to: String,
}

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
        let file = StateFile::new(state_dir, FOLDER, &format!("name:{name}"));
        Moves { file, state_dir: state_dir.to_owned(), name: name.to_owned() }
    }

    /// Where they stand.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Where the LUN went from that image, if it did.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn from(&self, image: &Path) -> io::Result<Option<Move>> {
        Ok(self.file.load::<Content>()?.and_then(|content| content.left.get(image).cloned()))
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
        settle(&self.state_dir)?;
        self.add(&from.image, to)
    }

    fn add(&self, from: &Path, to: &DeviceConfig) -> io::Result<()> {
        let mut content = self.file.load::<Content>()?.unwrap_or_default();
        let now = Move { to: to.to_string(), at_ms: now_ms() };
        // Whoever names an image that was left earlier comes to the newest one; that itself is none that was left.
        content.left.remove(&to.image);
        content.left.values_mut().for_each(|moved| moved.to.clone_from(&now.to));
        content.left.insert(from.to_owned(), now);
        self.file.save(&content, true)
    }

    /// A new file is in that image's place.
    ///
    /// # Errors
    /// The file system's.
    pub fn forget(&self, image: &Path) -> io::Result<()> {
        let Some(mut content) = self.file.load::<Content>()? else { return Ok(()) };
        match content.left.remove(image) {
            None => Ok(()),
            Some(_) if content.left.is_empty() => self.file.remove(),
            Some(_) => self.file.save(&content, true),
        }
    }
}

/// Makes durable that each of those LUNs, which may be one, has the second image instead of the first: all of them or none, whatever is
/// cut off. They are of one state directory.
///
/// # Errors
/// The file system's: none of them has moved.
pub fn note_together(moves: &[(Moves, DeviceConfig, DeviceConfig)]) -> io::Result<()> {
    let Some((first, ..)) = moves.first() else { return Ok(()) };
    let dir = first.state_dir.clone();
    {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        settle_now(&dir)?;
        let one = |(of, from, to): &(Moves, DeviceConfig, DeviceConfig)| OneOfMany {
            lun: of.name.clone(),
            from: from.image.clone(),
            to: to.to_string(),
        };
        let file = StateFile::new(&dir, FOLDER, TOGETHER);
        let together = Together { moves: moves.iter().map(one).collect() };
        if let Err(e) = file.save(&together, true) {
            // It may have come all the same, and must not be found by the next start.
            return match file.remove() {
                Ok(()) => Err(e),
                // It is there, and cannot be taken back: it holds.
                Err(error) => {
                    tracing::warn!(%error, was = %e, "the LUNs' new images are written down, and a power cut may undo that");
                    Ok(())
                }
            };
        }
        if let Err(error) = settle_now(&dir) {
            tracing::warn!(%error, path = %file.path().display(), "the LUNs have moved; the next start writes that down for each");
        }
    }
    Ok(())
}

/// Finishes moves of several LUNs that were cut off after they were decided.
///
/// # Errors
/// The file system's: which image those LUNs have is not to be told from their own files yet.
pub fn settle(state_dir: &Path) -> io::Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    settle_now(state_dir)
}

fn settle_now(state_dir: &Path) -> io::Result<()> {
    let file = StateFile::new(state_dir, FOLDER, TOGETHER);
    let Some(together) = file.load::<Together>()? else { return Ok(()) };
    for OneOfMany { lun, from, to } in together.moves {
        let moves = Moves::of(state_dir, &lun);
        // It has been done, and more may have happened since.
        if moves.from(&from)?.is_none() {
            moves.add(&from, &DeviceConfig::parse(&to).map_err(nonsense)?)?;
        }
    }
    file.remove()
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
    fn moves_of_several_luns_hold_all_together_wherever_the_process_dies() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| Moves::of(dir.path(), name);
        let image = |path: &str| DeviceConfig::new(path);
        let now = |name: &str, at: &str| {
            settle(dir.path()).unwrap();
            of(name).follow(&image(at)).unwrap().image.display().to_string()
        };
        let all = [(of("a"), image("/a"), image("/a1")), (of("b"), image("/b"), image("/b1"))];
        note_together(&all).unwrap();
        assert_eq!((now("a", "/a"), now("b", "/b")), ("/a1".into(), "/b1".into()));
        // Killed after it was decided, and after the first LUN's own file was written.
        let file = StateFile::new(dir.path(), FOLDER, TOGETHER);
        assert!(!file.path().exists());
        let one = |lun: &str, from: &str, to: &str| OneOfMany {
            lun: lun.into(),
            from: from.into(),
            to: image(to).to_string(),
        };
        let moves = vec![one("a", "/a1", "/a2"), one("b", "/b1", "/b2")];
        file.save(&Together { moves }, true).unwrap();
        of("a").add(Path::new("/a1"), &image("/a2")).unwrap();
        assert_eq!((now("a", "/a"), now("b", "/b")), ("/a2".into(), "/b2".into()));
        assert!(!file.path().exists());
        // A file that stayed changes nothing of what came later.
        of("a").note(&image("/a2"), &image("/a3")).unwrap();
        file.save(&Together { moves: vec![one("a", "/a1", "/a2")] }, true).unwrap();
        assert_eq!(now("a", "/a"), "/a3");
        assert_eq!(now("a", "/a1"), "/a3");
        // One that makes no sense stops whoever would have to know.
        std::fs::write(file.path(), "{").unwrap();
        assert!(settle(dir.path()).is_err() && of("a").note(&image("/a3"), &image("/a4")).is_err());
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
