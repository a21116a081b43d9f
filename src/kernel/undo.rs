//! What was built, so that it can be taken down again in the opposite order if the next step fails.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::tree::Tree;

enum Step<'a> {
    Dir(PathBuf),
    Link(PathBuf),
    Call(&'static str, Box<dyn FnOnce() -> io::Result<()> + 'a>),
}

/// The steps that can be undone. Dropped without [`Undo::keep`], it undoes them, last first; what can't be undone is said
/// in the log and left.
pub struct Undo<'a> {
    tree: &'a dyn Tree,
    steps: Vec<Step<'a>>,
}

impl<'a> Undo<'a> {
    /// Nothing done yet.
    pub fn new(tree: &'a dyn Tree) -> Undo<'a> {
        Undo { tree, steps: Vec::new() }
    }

    /// Makes a directory, to be removed on failure.
    ///
    /// # Errors
    /// The kernel's; AlreadyExists too, and then nothing is noted.
    pub fn make_dir(&mut self, path: &Path) -> io::Result<()> {
        self.tree.make_dir(path)?;
        self.steps.push(Step::Dir(path.to_owned()));
        Ok(())
    }

    /// Makes a link, to be removed on failure.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link(&mut self, target: &Path, link: &Path) -> io::Result<()> {
        self.tree.link(target, link)?;
        self.steps.push(Step::Link(link.to_owned()));
        Ok(())
    }

    /// Notes something else that was done and how it is undone.
    pub fn note(&mut self, what: &'static str, undo: impl FnOnce() -> io::Result<()> + 'a) {
        self.steps.push(Step::Call(what, Box::new(undo)));
    }

    /// Somebody else has undone the last step.
    pub fn forget_last(&mut self) {
        self.steps.pop();
    }

    /// All went well: nothing is undone.
    pub fn keep(mut self) {
        self.steps.clear();
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        while let Some(step) = self.steps.pop() {
            let (what, done) = match step {
                Step::Dir(path) => (path.display().to_string(), self.tree.remove_dir(&path)),
                Step::Link(path) => (path.display().to_string(), self.tree.unlink(&path)),
                Step::Call(what, undo) => (what.to_owned(), undo()),
            };
            if let Err(e) = done {
                tracing::warn!("could not take down {what}: {e}");
            }
        }
    }
}
