//! A LUN as an export has it: the LUN as it is, or as it was when a backup began, and dirty bitmaps. Asked from outside its thread.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{
    LunError, Remote,
    inbox::Message,
    jobs::{
        Expose, JobError,
        exposed::{Ask, Shown, Told},
    },
};
use crate::scsi::neighbour::{Answer, Errand, Undone};

#[derive(Debug)]
struct Inner {
    lun: Remote,
    shown: Shown,
    bitmaps: Vec<String>,
    over: AtomicBool,
}

/// What an export has of a LUN, until it is over; clones are the same.
#[derive(Debug, Clone)]
pub struct Exported(Arc<Inner>);

impl Remote {
    /// Has it show this to clients of an export.
    ///
    /// # Errors
    /// [`LunError::Job`] if there is none of that, or somebody else has it; or that the LUN does not answer.
    pub fn expose(&self, order: Expose) -> Result<Exported, LunError> {
        let bitmaps = order.bitmaps.clone();
        let shown = self.ask(|back| Message::Expose(order, back))??;
        Ok(Exported(Arc::new(Inner { lun: self.clone(), shown, bitmaps, over: AtomicBool::new(false) })))
    }
}

impl Exported {
    /// The LUN as it is, and nothing else.
    pub fn as_it_is(lun: Remote) -> Exported {
        let (shown, bitmaps) = (Shown::default(), Vec::new());
        Exported(Arc::new(Inner { lun, shown, bitmaps, over: AtomicBool::new(false) }))
    }

    /// Whether both are one.
    pub fn is_same(&self, other: &Exported) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The LUN.
    pub fn lun(&self) -> &Remote {
        &self.0.lun
    }

    /// The names of the dirty bitmaps that it shows.
    pub fn bitmaps(&self) -> &[String] {
        &self.0.bitmaps
    }

    /// Has the LUN do something, with its blocks as the export has them.
    ///
    /// # Errors
    /// That the LUN does not answer, or that the point in time is lost; in the inner result what an initiator would be told.
    pub fn order(&self, errand: Errand) -> Result<Result<Answer, Undone>, LunError> {
        let Some(moment) = self.0.shown.moment else { return self.0.lun.order(errand) };
        match self.ask(Ask::Past(moment, errand))? {
            Told::Done(done) => Ok(done),
            Told::Marked(_) => Err(unlike()),
        }
    }

    /// What the dirty bitmap at that place of [`Exported::bitmaps`] has marked: runs of bytes from `at` on, in whole blocks.
    ///
    /// # Errors
    /// That the LUN does not answer, or that the bitmap or the point in time is lost.
    pub fn marked(&self, which: usize, at: u64, len: u64) -> Result<Vec<(u64, bool)>, LunError> {
        match self.ask(Ask::Marked(self.0.shown.clone(), which, (at, len)))? {
            Told::Marked(runs) => Ok(runs),
            Told::Done(_) => Err(unlike()),
        }
    }

    fn ask(&self, ask: Ask) -> Result<Told, LunError> {
        Ok(self.0.lun.ask(|back| Message::AskExposed(ask, back))??)
    }

    /// The export is over: the bitmaps are free again.
    pub fn end(&self) {
        self.0.end();
    }
}

fn unlike() -> LunError {
    JobError::Past("the LUN has answered something else".into()).into()
}

impl Inner {
    fn end(&self) {
        if self.shown != Shown::default() && !self.over.swap(true, Ordering::AcqRel) {
            self.lun.outbox.send(Message::Cover(self.shown.clone()));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}
