//! What has passed on this tree, kept from run to run: all tests at full scale take hours, and where a machine is not to be had for so long,
//! `cargo xtask test --full --go-on` goes on where the last one ended.
//!
//! A file for each tree (git's name of its content) and scale, in `target/test-logs/passed`, with a line for each step and each VM test that
//! has passed as a whole. Nothing counts for another tree, so whatever changes, all of it is run again.

use crate::sh;
use crate::vm::Scale;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// What passed, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Earlier {
    /// Seconds that it took.
    pub seconds: f64,
    /// Tests in it.
    pub tests: usize,
}

/// The list of one tree and scale.
pub struct Passed {
    file: PathBuf,
    known: Mutex<BTreeMap<String, Earlier>>,
}

impl Passed {
    /// That of the tree that is checked out.
    ///
    /// # Errors
    /// If something in it is not committed, so that it has no name.
    pub fn of_this_tree(scale: Scale) -> Result<Passed> {
        let git = |words: &[&str]| {
            let root = sh::workspace_root().display().to_string();
            sh::run("git", ["-C", &root].iter().chain(words))
        };
        let changed = git(&["status", "--porcelain"])?;
        ensure!(
            changed.trim().is_empty(),
            "--go-on needs a tree that is committed, or what has passed would be another's: git commit, or git stash\n{changed}"
        );
        let tree = git(&["rev-parse", "HEAD^{tree}"])?;
        let folder = sh::target_dir().join("test-logs/passed");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Passed::at(folder.join(format!("{}-{}", tree.trim(), scale.name())))
    }

    fn at(file: PathBuf) -> Result<Passed> {
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("cannot read {}", file.display())),
        };
        // A line that was cut off has not passed.
        let known = text.lines().filter_map(|line| {
            let mut words = line.split('\t');
            let (name, seconds, tests) = (words.next()?, words.next()?, words.next()?);
            (words.next() == Some("passed")).then_some(())?;
            Some((name.to_owned(), Earlier { seconds: seconds.parse().ok()?, tests: tests.parse().ok()? }))
        });
        Ok(Passed { known: Mutex::new(known.collect()), file })
    }

    /// How it passed in an earlier run, if it has.
    pub fn earlier(&self, name: &str) -> Option<Earlier> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    /// It has passed.
    ///
    /// # Errors
    /// The file system's.
    pub fn add(&self, name: &str, how: Earlier) -> Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let line = format!("{name}\t{:.1}\t{}\tpassed\n", how.seconds, how.tests);
        let file = OpenOptions::new().create(true).append(true).open(&self.file);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.with_context(|| format!("cannot write {}", self.file.display()))?;
        known.insert(name.to_owned(), how);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_passed_is_known_to_the_next_run_and_what_was_cut_off_is_not() {
        let file = std::env::temp_dir().join(format!("xtask-passed-{}", std::process::id()));
        let one = Passed::at(file.clone()).unwrap();
        assert_eq!(one.earlier("tests on io_uring"), None);
        let how = Earlier { seconds: 12.5, tests: 1162 };
        one.add("tests on io_uring", how).unwrap();
        one.add("limits.cycles", Earlier { seconds: 707.0, tests: 1 }).unwrap();
        let mut text = fs::read_to_string(&file).unwrap();
        text += "service.kills\t70";
        fs::write(&file, text).unwrap();
        let next = Passed::at(file.clone()).unwrap();
        fs::remove_file(file).unwrap();
        assert_eq!(next.earlier("tests on io_uring"), Some(how));
        assert!(next.earlier("limits.cycles").is_some());
        assert_eq!(next.earlier("service.kills"), None);
    }
}
