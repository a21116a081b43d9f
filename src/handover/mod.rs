//! A LUN that goes from one host to another: the state that goes with it, and the steps of both sides.
//!
//! [`format`] is the state's outer form: named sections that say whether they may be skipped. [`state`] is what stands in them. [`give`] and [`take`] are the two sides of
//! a handover over a connection ([`wire`]): they know neither the kernel nor an image, and have all that done by a [`Source`] and a [`Destination`], so
//! that tests can have each step fail. Called by the daemon for LUNs that are really there.
//!
//! What decides is the image's owner's file (`image/owner`): the source gives the image back and tells of which generation it is then, and the destination takes just that
//! one. Whatever is lost on the way, one of the two can take it and the other cannot.

pub mod format;
mod give;
pub mod port;
pub mod state;
mod take;
pub mod wire;

pub use give::{Given, NotGiven, give};
pub use state::{Identity, State};
pub use take::take;

/// The steps of a handover, in their order, as the source sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Both sides say who they are, and the destination looks whether it could have the LUN.
    Preflight,
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

/// The host that is to have it.
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
}

#[cfg(test)]
pub(crate) mod tests;
