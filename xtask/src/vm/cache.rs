//! The VM's artefacts on disk: built once for every recipe, shared by all worktrees, never half-made.
//!
//! An artefact is a folder `<kind>-<hash of the recipe>` with a file `stamp` that holds the recipe itself. It is
//! built under another name and renamed when it is whole, under a lock that keeps two builds apart. What
//! nobody has used for two weeks is removed when something new is built.

use anyhow::{Context, Result, bail};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const KEPT_UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);

/// `~/.cache/tcmu-dif`, or under `XDG_CACHE_HOME`.
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// Opens the user's cache, making it when it is not there.
    pub fn open() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME") {
            Some(dir) if !dir.is_empty() => PathBuf::from(dir),
            _ => match std::env::home_dir() {
                Some(home) => home.join(".cache"),
                None => bail!("neither XDG_CACHE_HOME nor HOME says where the cache is"),
            },
        };
        Self::at(base.join("tcmu-dif"))
    }

    fn at(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// A file in the cache's own folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The folder of the artefact `kind` made by `recipe`; `build` fills it when it is not there yet.
    pub fn artefact(
        &self,
        kind: &str,
        recipe: &str,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let name = format!("{kind}-{:016x}", fnv1a(recipe.as_bytes()));
        let path = self.dir.join(&name);
        if is_made_by(&path, recipe) {
            return Ok(path);
        }
        let _lock = self.lock(kind)?;
        if is_made_by(&path, recipe) {
            return Ok(path);
        }
        // Whoever holds the lock is the only builder: what is left under a temporary name is a dead one's.
        self.remove(|entry, _| entry.starts_with(&format!(".{kind}-")))?;
        self.remove(|entry, unused| entry.starts_with(&format!("{kind}-")) && unused > KEPT_UNUSED)?;
        println!("building the VM's {kind} (once; kept in {})", self.dir.display());
        let temporary = self.dir.join(format!(".{name}"));
        fs::create_dir(&temporary).with_context(|| format!("cannot make {}", temporary.display()))?;
        build(&temporary).with_context(|| format!("cannot build the VM's {kind}"))?;
        fs::write(temporary.join("stamp"), recipe)?;
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::rename(&temporary, &path)
            .with_context(|| format!("cannot put {} in its place", path.display()))?;
        Ok(path)
    }

    fn lock(&self, kind: &str) -> Result<File> {
        let path = self.dir.join(format!("{kind}.lock"));
        let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                println!("waiting for another build of the VM's {kind}");
                file.lock()?;
            }
            Err(TryLockError::Error(e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(file)
    }

    fn remove(&self, doomed: impl Fn(&str, Duration) -> bool) -> Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let used = fs::metadata(entry.path().join("stamp")).and_then(|m| m.modified());
            let unused =
                used.map_or(Duration::ZERO, |at| SystemTime::now().duration_since(at).unwrap_or_default());
            if doomed(&entry.file_name().to_string_lossy(), unused) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Whether a whole artefact of this recipe lies at `path`; notes that it was used.
fn is_made_by(path: &Path, recipe: &str) -> bool {
    let stamp = path.join("stamp");
    if !fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == recipe) {
        return false;
    }
    // Only spares the artefact from the fortnight's broom: if it fails, it is built again some day.
    if let Ok(file) = File::options().append(true).open(&stamp) {
        let _ = file.set_modified(SystemTime::now());
    }
    true
}

/// FNV-1a, 64 bits: the same on every machine and with every compiler, which is all that a file's name needs.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("tcmu-dif-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn an_artefact_is_built_once_and_again_when_its_recipe_changes() {
        let dir = scratch("once");
        let cache = Cache::at(dir.clone()).unwrap();
        let built = Cell::new(0);
        let make = |recipe: &str| {
            cache
                .artefact("thing", recipe, |at| {
                    built.set(built.get() + 1);
                    Ok(fs::write(at.join("content"), recipe)?)
                })
                .unwrap()
        };
        let first = make("one");
        assert_eq!(make("one"), first);
        assert_eq!(built.get(), 1);
        let second = make("two");
        assert_ne!(second, first);
        assert_eq!(fs::read_to_string(second.join("content")).unwrap(), "two");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_build_that_fails_leaves_nothing_that_looks_whole() {
        let dir = scratch("half");
        let cache = Cache::at(dir.clone()).unwrap();
        let failed = cache.artefact("thing", "r", |at| {
            fs::write(at.join("half"), "")?;
            bail!("power went")
        });
        assert!(failed.is_err());
        let path = cache.artefact("thing", "r", |at| Ok(fs::write(at.join("whole"), "")?)).unwrap();
        assert!(path.join("whole").exists());
        assert!(!path.join("half").exists());
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
