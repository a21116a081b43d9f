//! A LUN that goes from one host to another: the state that goes with it, and the steps of both sides.
//!
//! [`format`] is the state's outer form: named sections that say whether they may be skipped. [`state`] is what stands in them. [`give`] and [`take`] are the two sides of
//! a handover over a connection ([`wire`]): they know neither the kernel nor an image, and have all that done by a [`Source`] and a [`Destination`], so
//! that tests can have each step fail. Called by the daemon for LUNs that are really there.
//!
//! What decides is the image's owner's file (`image/owner`): the source gives the image back and tells of which generation it is then, and the destination takes just that
//! one. Whatever is lost on the way, one of the two can take it and the other cannot.
//!
//! Where the hosts have no storage in common, the LUN's goes along ([`storage`], [`give_with_storage`]), and there is nothing that both could look at. The source decides then: it writes down
//! that the LUN is the other host's before it says so, and serves it again only if that host answers that it has nothing of it.

pub mod format;
mod give;
pub mod port;
pub mod state;
pub mod storage;
mod take;
pub mod wire;
mod with_storage;

use std::sync::mpsc::Sender;

pub use give::{Given, NotGiven, give};
pub use state::{Identity, State};
use storage::{Parcel, Piece};
pub use take::take;
use wire::Host;
pub use with_storage::give_with_storage;

/// The steps of a handover, in their order, as the source sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Both sides say who they are, and the destination looks whether it could have the LUN.
    Preflight,
    /// Its storage is copied, while it serves.
    Storage,
    /// The LUN takes no more commands (they wait in the ring), ends those under way, flushes and closes its image, and gives it back.
    Freeze,
    /// What is known of the LUN is collected.
    State,
    /// It is sent, and the destination takes the image and makes the LUN.
    Build,
    /// The source takes its own LUN down.
    Finish,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::Preflight => "preflight",
            Step::Storage => "storage",
            Step::Freeze => "freeze",
            Step::State => "state",
            Step::Build => "build",
            Step::Finish => "finish",
        })
    }
}

/// Why a side could not do its part, in words for a person, with what to do next.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Failure {
    /// Why.
    pub reason: String,
    /// What to do next, if that is known.
    pub next: Option<String>,
}

impl Failure {
    /// One without a next step.
    pub fn new(reason: impl Into<String>) -> Failure {
        Failure { reason: reason.into(), next: None }
    }

    /// With the next step.
    pub fn then(mut self, next: impl Into<String>) -> Failure {
        self.next = Some(next.into());
        self
    }
}

/// What became of a LUN that was to serve again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thawed {
    /// It serves.
    Serves,
    /// Its image has been taken by another host since it was given back: the LUN has gone over.
    Taken,
}

/// The host that has the LUN.
pub trait Source {
    /// What is to go over.
    ///
    /// # Errors
    /// Why it cannot.
    fn identity(&mut self) -> Result<Identity, Failure>;
    /// Stops the LUN, so that its commands wait, its image is closed and flushed, and given back.
    ///
    /// # Errors
    /// Why not; the LUN serves then, or [`Source::thaw`] makes it.
    fn freeze(&mut self) -> Result<(), Failure>;
    /// What there is to know of the frozen LUN.
    ///
    /// # Errors
    /// Why it is not known.
    fn state(&mut self) -> Result<State, Failure>;
    /// Has a frozen LUN serve again, with all that waited, if its image can be had.
    ///
    /// # Errors
    /// Why it does not, other than that the image has been taken.
    fn thaw(&mut self) -> Result<Thawed, Failure>;
    /// Takes the frozen LUN down, which serves elsewhere.
    ///
    /// # Errors
    /// What is left of it.
    fn finish(&mut self) -> Result<(), Failure>;
}

/// The host that has the LUN, and the only copy of its image.
pub trait WithStorage: Source {
    /// The image that stays here, for people.
    fn image(&self) -> String;
    /// Copies the LUN, while it serves, until nothing but what it takes to stop it is missing. [`Source::freeze`] after it sends the rest, and lets go of `to`.
    ///
    /// # Errors
    /// Why not; the LUN serves.
    fn copy(&mut self, to: Sender<Parcel>) -> Result<(), Failure>;
    /// Writes down, durably, that the image which stays here is not to be served any more: that host has the LUN.
    ///
    /// # Errors
    /// Why that could not be; then it may be served.
    fn leave(&mut self, to: &Host) -> Result<(), Failure>;
    /// Takes that back: it has nothing of the LUN.
    ///
    /// # Errors
    /// The file system's.
    fn stay(&mut self) -> Result<(), Failure>;
}

/// The destination has no place for a LUN's storage.
pub fn no_storage() -> Failure {
    Failure::new("the destination was not told where the LUN's new image is to be")
        .then("give it a place there: tcmu-dif receive --image PATH")
}

/// The host that is to have it. What has defaults is for LUNs whose storage comes along.
pub trait Destination {
    /// Looks whether it could have the LUN; changes nothing.
    ///
    /// # Errors
    /// Why not.
    fn prepare(&mut self, of: &Identity) -> Result<(), Failure>;
    /// Takes the image and makes the LUN, which serves then; tells what was made.
    ///
    /// # Errors
    /// Why not: nothing of it is left then, and the image is given back.
    fn build(&mut self, state: &State) -> Result<serde_json::Value, Failure>;
    /// As [`Destination::prepare`], for a LUN whose image is to be made here.
    ///
    /// # Errors
    /// Why not.
    fn prepare_storage(&mut self, of: &Identity) -> Result<(), Failure> {
        let _ = of;
        Err(no_storage())
    }
    /// Does that to the new image.
    ///
    /// # Errors
    /// Why it can't.
    fn land(&mut self, piece: Piece) -> Result<(), Failure> {
        let _ = piece;
        Err(no_storage())
    }
    /// Closes the new image, all of which has come, and tells what this host is. [`Destination::build`] comes next, or [`Destination::clear`].
    ///
    /// # Errors
    /// Why it is not whole.
    fn settle(&mut self) -> Result<Host, Failure> {
        Err(no_storage())
    }
    /// It does not come about: what was made of an image is removed.
    fn clear(&mut self) {}
}

#[cfg(test)]
pub(crate) mod tests;
