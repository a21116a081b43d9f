//! A change of several LUNs, all of it or none: each LUN does its part on its own thread, up to where it could still go back, and then
//! waits until all have come as far. The last step is one durable file ([`note_together`]), which whoever called the vote writes.
//!
//! A LUN that cannot go on, or waits for too long, has it refused, and then all go back. While the file is being written nobody can
//! change his mind any more, and everybody waits for what comes of it.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    lun::{
        config::DeviceConfig,
        moved::{Moves, note_together},
    },
    sys::io::Io,
};

/// How long a LUN waits for the others. Its commands are held back meanwhile.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(1);

/// How far a LUN is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// What can be done while commands run is done.
    Prepared,
    /// No command runs.
    Held,
    /// It could go on with its new image, or with what else has changed.
    Ready,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// All are ready, and it is being written down.
    Deciding,
    Carried,
    Refused(String),
}

#[derive(Debug, Default)]
struct Votes {
    voters: usize,
    reached: [usize; 3],
    moves: Vec<(Moves, DeviceConfig, DeviceConfig)>,
    state: State,
}

/// A vote of several LUNs.
#[derive(Debug, Default)]
pub struct Ballot {
    votes: Mutex<Votes>,
    changed: Condvar,
}

/// Two of them are the same only if they are one.
impl PartialEq for Ballot {
    fn eq(&self, other: &Ballot) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Ballot {}

impl Ballot {
    /// Of so many LUNs.
    pub fn of(voters: usize) -> Arc<Ballot> {
        Arc::new(Ballot { votes: Mutex::new(Votes { voters, ..Votes::default() }), ..Ballot::default() })
    }

    fn votes(&self) -> MutexGuard<'_, Votes> {
        self.votes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It comes to nothing, for that reason, unless it is decided already.
    pub fn refuse(&self, reason: &str) {
        let mut votes = self.votes();
        if votes.state == State::Open {
            votes.state = State::Refused(reason.to_owned());
            self.changed.notify_all();
        }
    }

    /// Waits until all LUNs are ready, and makes their moves durable, unless there is a reason `against` it. Called once, by who called
    /// the vote; LUNs wait for it.
    ///
    /// # Errors
    /// Why nothing has changed.
    pub fn carry(&self, against: Option<&str>) -> Result<(), String> {
        let end = Instant::now() + PATIENCE + LOOK;
        let mut votes = self.votes();
        while votes.state == State::Open && votes.reached[Step::Ready as usize] < votes.voters {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                votes.state = State::Refused("the LUNs did not get ready in time".into());
                break;
            }
            let waited = self.changed.wait_timeout(votes, left);
            votes = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let (State::Open, Some(reason)) = (&votes.state, against) {
            votes.state = State::Refused(reason.to_owned());
            self.changed.notify_all();
        }
        if let State::Refused(reason) = &votes.state {
            return Err(reason.clone());
        }
        votes.state = State::Deciding;
        let moves = std::mem::take(&mut votes.moves);
        drop(votes);
        let noted = note_together(&moves).map_err(|e: io::Error| unwritten(&e));
        let mut votes = self.votes();
        votes.state = match &noted {
            Ok(()) => State::Carried,
            Err(reason) => State::Refused(reason.clone()),
        };
        self.changed.notify_all();
        noted
    }
}

/// Why a choice of images does not hold.
pub(super) fn unwritten(e: &io::Error) -> String {
    format!("the new image cannot be written down: {e}")
}

/// One LUN's part. Given up before it is ready, it has the vote refused.
pub(super) struct Seat {
    ballot: Arc<Ballot>,
    reason: String,
}

impl Seat {
    pub(super) fn new(ballot: Arc<Ballot>, lun: &str) -> Seat {
        Seat { ballot, reason: format!("{lun} could not take part") }
    }

    /// Has the vote refused for a reason of this LUN's.
    pub(super) fn refuse(&self, reason: &str) {
        self.ballot.refuse(reason);
    }

    /// Tells that this LUN has come so far, and waits for the others.
    ///
    /// # Errors
    /// Why it comes to nothing.
    pub(super) async fn reach(&self, io: &Io, step: Step) -> Result<(), String> {
        self.ballot.votes().reached[step as usize] += 1;
        self.ballot.changed.notify_all();
        let all = |votes: &Votes| votes.reached[step as usize] >= votes.voters;
        self.wait(io, |votes| match &votes.state {
            State::Refused(reason) => Some(Err(reason.clone())),
            _ if all(votes) => Some(Ok(())),
            _ => None,
        })
        .await
    }

    /// Tells that this LUN is ready to move, and waits for the decision. Where the LUN keeps nothing there is nothing to write down.
    ///
    /// # Errors
    /// Why it comes to nothing.
    pub(super) async fn move_with_all(
        &self,
        io: &Io,
        moves: Option<Moves>,
        (from, to): (DeviceConfig, DeviceConfig),
    ) -> Result<(), String> {
        self.ballot.votes().moves.extend(moves.map(|moves| (moves, from, to)));
        self.ready(io).await
    }

    /// The same of a LUN that keeps its image.
    ///
    /// # Errors
    /// Why it comes to nothing.
    pub(super) async fn ready(&self, io: &Io) -> Result<(), String> {
        self.ballot.votes().reached[Step::Ready as usize] += 1;
        self.ballot.changed.notify_all();
        self.wait(io, |votes| match &votes.state {
            State::Refused(reason) => Some(Err(reason.clone())),
            State::Carried => Some(Ok(())),
            State::Open | State::Deciding => None,
        })
        .await
    }

    async fn wait(&self, io: &Io, look: impl Fn(&Votes) -> Option<Result<(), String>>) -> Result<(), String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = look(&self.ballot.votes());
            if let Some(seen) = seen {
                return seen;
            }
            if Instant::now() >= end {
                // Does nothing once it is being decided: that has to be waited for.
                self.ballot.refuse("the LUNs did not get ready in time");
            }
            io.sleep(LOOK).await;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.ballot.refuse(&self.reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::run;

    fn part(
        ballot: &Arc<Ballot>,
        name: &'static str,
        dir: &std::path::Path,
        fails: bool,
    ) -> std::thread::JoinHandle<Result<(), String>> {
        let (ballot, moves) = (ballot.clone(), Moves::of(dir, name));
        std::thread::spawn(move || {
            run(async move |io| {
                let seat = Seat::new(ballot, name);
                seat.reach(&io, Step::Prepared).await?;
                seat.reach(&io, Step::Held).await?;
                if fails {
                    seat.refuse("its disk is full");
                    return Err("its disk is full".into());
                }
                let of = |image: &str| DeviceConfig::new(image);
                seat.move_with_all(&io, Some(moves), (of(&format!("/{name}")), of(&format!("/{name}1"))))
                    .await
            })
        })
    }

    #[test]
    fn all_move_or_none_does_and_everybody_is_told_the_same() {
        for fails in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let ballot = Ballot::of(3);
            let parts = [("a", false), ("b", fails), ("c", false)]
                .map(|(name, fails)| part(&ballot, name, dir.path(), fails));
            let carried = ballot.carry(None);
            let told: Vec<_> = parts.into_iter().map(|p| p.join().unwrap()).collect();
            assert!(told.iter().all(|t| *t == carried), "{told:?} {carried:?}");
            assert_eq!(carried.is_err(), fails);
            for name in ["a", "b", "c"] {
                let image = DeviceConfig::new(format!("/{name}"));
                let now = Moves::of(dir.path(), name).follow(&image).unwrap().image;
                assert_eq!(now != image.image, !fails);
            }
        }
    }

    #[test]
    fn one_who_leaves_has_it_refused_and_after_the_decision_nobody_can() {
        let ballot = Ballot::of(1);
        drop(Seat::new(ballot.clone(), "vm1"));
        assert!(ballot.carry(None).unwrap_err().contains("vm1 could not take part"));
        let dir = tempfile::tempdir().unwrap();
        let ballot = Ballot::of(1);
        let one = part(&ballot, "a", dir.path(), false);
        assert_eq!(ballot.carry(Some("aborted")), Err("aborted".into()));
        assert_eq!(one.join().unwrap(), Err("aborted".into()));
        let ballot = Ballot::of(1);
        let one = part(&ballot, "a", dir.path(), false);
        ballot.carry(None).unwrap();
        ballot.refuse("too late");
        assert_eq!(one.join().unwrap(), Ok(()));
    }
}
