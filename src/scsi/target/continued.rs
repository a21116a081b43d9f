//! What initiators see of a logical unit and only a power cycle may reset: current mode pages, pending unit attentions, a medium that a
//! FORMAT UNIT or SANITIZE has left unusable. For initiators a restart of the process is no power cycle, so it is kept for
//! whoever takes the unit over, each time before the command that changed it is answered.
//!
//! A unit attention that has been given is kept for [`SETTLE`] longer: until its answer has surely left. Given twice it does no
//! harm; lost it would.

use std::{
    cell::{Cell, RefCell},
    io,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{Target, erase::Medium};
use crate::{
    scsi::{mode, sense::Asc},
    sync::Notify,
    volume::Volume,
};

/// How long after it was given a unit attention is surely known to its initiator. The answer leaves at the end of the loop's turn.
pub const SETTLE: Duration = Duration::from_millis(100);

/// A command that rewrites the medium, and did not come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfinished {
    /// FORMAT UNIT.
    Format,
    /// SANITIZE; with AUSE it may be left by EXIT FAILURE MODE.
    Sanitize {
        /// ALLOW UNRESTRICTED SANITIZE EXIT.
        ause: bool,
    },
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continued {
    /// The mode pages with their current values, as [`Target`] understands them.
    pub pages: Vec<u8>,
    /// The write cache, as it was last set from outside.
    pub write_cache: bool,
    /// Pending unit attentions, ASC and ASCQ, the oldest first.
    pub attentions: Vec<(u8, u8)>,
    /// Why the medium cannot be used.
    pub unfinished: Option<Unfinished>,
}

/// Where that is kept.
pub trait Keeper {
    /// Keeps it, so that it outlives this process.
    ///
    /// # Errors
    /// Whatever kept it from doing so. Commands succeed all the same: only a restart would tell.
    fn keep(&self, state: &Continued) -> io::Result<()>;
}

/// What there is to it beside the target's own state.
#[derive(Default)]
pub(super) struct Keeping {
    keeper: Option<Box<dyn Keeper>>,
    /// The write cache, as it was last set from outside.
    write_cache: Cell<bool>,
    /// Attentions that were given, and when.
    given: RefCell<Vec<(Asc, Instant)>>,
    gave: Notify,
    /// What is left if the rewriting under way is cut off.
    pub(super) unfinished: Cell<Option<Medium>>,
    /// It could not be kept, and that has been said.
    failing: Cell<bool>,
}

impl Keeping {
    pub(super) fn new(keeper: Option<Box<dyn Keeper>>, write_cache: bool) -> Keeping {
        Keeping { keeper, write_cache: Cell::new(write_cache), ..Keeping::default() }
    }
}

impl<V: Volume> Target<V> {
    /// Begins where nobody was before, or where initiators are told of a power on: what there is now is what counts.
    pub fn begins(&self) {
        self.keep();
    }

    /// The initiators have noticed nothing of the restart: all is as it was `kept`. Where nothing was, there is just no power on to tell them of.
    pub fn goes_on(&self, kept: Option<&Continued>) {
        let Some(kept) = kept else {
            self.attentions.borrow_mut().retain(|asc| *asc != Asc::POWER_ON_OR_RESET);
            return self.keep();
        };
        *self.attentions.borrow_mut() = kept.attentions.iter().map(|(asc, ascq)| Asc(*asc, *ascq)).collect();
        self.medium.set(match kept.unfinished {
            None => Medium::Ready,
            Some(Unfinished::Format) => Medium::FormatFailed,
            Some(Unfinished::Sanitize { ause }) => Medium::SanitizeFailed { ause },
        });
        if kept.unfinished.is_some() {
            warn!("the rewriting of the medium was cut off; it stays unusable until that is repeated");
        }
        let mut like = self.settings.get();
        if let Some(pi) = &mut like.pi {
            pi.capacity = self.geometry.get().blocks;
        }
        let mut other = false;
        match mode::take_up(&kept.pages, &like) {
            Some(mut settings) => {
                // The write cache may have been set from outside while nobody was here.
                let now = self.keeping.write_cache.get();
                if kept.write_cache != now && settings.write_cache != now {
                    (settings.write_cache, other) = (now, true);
                }
                if settings != self.settings.get() {
                    info!("mode pages that were changed and not saved are as they were");
                }
                self.settings.set(settings);
                if let Some(pi) = settings.pi {
                    *self.app_ranges.borrow_mut() = pi.ranges().collect();
                }
            }
            None => {
                warn!(
                    "the current mode pages do not fit the LUN any more: saved values taken, and initiators are told"
                );
                other = true;
            }
        }
        match other {
            true => self.attention(Asc::MODE_PARAMETERS_CHANGED),
            false => self.keep(),
        }
    }

    /// The write cache was set from outside.
    pub(super) fn note_write_cache(&self, on: bool) {
        if self.keeping.write_cache.replace(on) != on {
            self.keep();
        }
    }

    /// Takes the oldest pending unit attention to be given.
    pub(super) fn give_attention(&self) -> Option<Asc> {
        let asc = self.attentions.borrow_mut().pop_front()?;
        if self.keeping.keeper.is_some() {
            self.keeping.given.borrow_mut().push((asc, Instant::now()));
            self.keeping.gave.notify_all();
        }
        Some(asc)
    }

    /// Ends with the next unit attention that is given. [`SETTLE`] later somebody calls [`Target::forget_given`].
    pub fn gave_attention(&self) -> impl Future<Output = ()> + use<V> {
        self.keeping.gave.wait()
    }

    /// Whether attentions were given that are kept still.
    pub fn has_given(&self) -> bool {
        !self.keeping.given.borrow().is_empty()
    }

    /// Forgets unit attentions that were given so long ago; all of them, if everything is answered.
    pub fn forget_given(&self, everything: bool) {
        let keep = |(_, at): &(Asc, Instant)| !everything && at.elapsed() < SETTLE;
        self.keeping.given.borrow_mut().retain(keep);
        self.keep();
    }

    /// Keeps everything as it is now.
    pub(super) fn keep(&self) {
        let Some(keeper) = &self.keeping.keeper else { return };
        let given = self.keeping.given.borrow();
        let pending = self.attentions.borrow();
        let mut attentions: Vec<_> =
            given.iter().map(|(asc, _)| asc).chain(pending.iter()).map(|a| (a.0, a.1)).collect();
        attentions.dedup();
        let medium = match self.medium.get() {
            Medium::Formatting(_) | Medium::Sanitizing(_) => self.keeping.unfinished.get(),
            other => Some(other),
        };
        let state = Continued {
            pages: mode::current(&self.settings.get()),
            write_cache: self.keeping.write_cache.get(),
            attentions,
            unfinished: match medium {
                Some(Medium::FormatFailed) => Some(Unfinished::Format),
                Some(Medium::SanitizeFailed { ause }) => Some(Unfinished::Sanitize { ause }),
                _ => None,
            },
        };
        let failed = keeper.keep(&state).err();
        if let Some(error) = failed.as_ref().filter(|_| !self.keeping.failing.get()) {
            warn!(%error, "what initiators have set cannot be kept for the next daemon");
        }
        self.keeping.failing.set(failed.is_some());
    }
}
