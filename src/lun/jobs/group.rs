//! Jobs that succeed together or not at all (QEMU's `completion-mode: grouped`): who has done its work waits for the others, and if one
//! fails or is cancelled, all others are cancelled. They run on the threads of their LUNs, and look at what they share.

use std::{
    future::{Future, pending},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    job::{JobStatus, Side, front::Outcome, mirror::Mirror},
    sys::{exec::race, io::Io},
};

/// How often one looks how the others are.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Progress {
    members: usize,
    /// Those that have done their work. Once all have, nothing can go wrong any more.
    done: usize,
    broken: bool,
}

/// Jobs that succeed together.
#[derive(Debug, Default)]
pub struct Group(Mutex<Progress>);

/// Two of them are the same only if they are one.
impl PartialEq for Group {
    fn eq(&self, other: &Group) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Group {}

impl Group {
    /// Of so many jobs.
    pub fn of(members: usize) -> Arc<Group> {
        Arc::new(Group(Mutex::new(Progress { members, ..Progress::default() })))
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all have done their work; an error if one of them has not, and never will.
    fn look(&self) -> Result<bool, ()> {
        let progress = self.progress();
        match &*progress {
            p if p.done == p.members => Ok(true),
            p if p.broken => Err(()),
            _ => Ok(false),
        }
    }
}

/// One job of a group. Whoever goes without having done its work breaks the group.
pub(super) struct Member(Arc<Group>);

impl Member {
    pub(super) fn new(group: Arc<Group>) -> Member {
        Member(group)
    }

    /// Runs a job to its end by `drive`, which is never cut off, and gives what came of it and of the others.
    pub(super) async fn with_all<S: Side>(
        &self,
        io: &Io,
        mirror: &Mirror<S>,
        drive: impl Future<Output = Outcome>,
    ) -> Outcome {
        let watch = async {
            while self.0.look().is_ok() {
                io.sleep(LOOK).await;
            }
            mirror.cancel(true);
            pending().await
        };
        let outcome = race(drive, watch).await;
        if !matches!(outcome, Outcome::Ended(_)) {
            self.0.progress().broken = true;
            return outcome;
        }
        self.0.progress().done += 1;
        mirror.wait_for_others();
        loop {
            match self.0.look() {
                Ok(true) => return outcome,
                // Told to end while it waited.
                Ok(false) if mirror.status() == JobStatus::Aborting => {
                    self.0.progress().broken = true;
                }
                Ok(false) => {}
                Err(()) => return Outcome::Cancelled,
            }
            io.sleep(LOOK).await;
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Does nothing once all are done.
        self.0.progress().broken = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_done_or_one_that_leaves_breaks_it() {
        let group = Group::of(2);
        let (a, b) = (Member::new(group.clone()), Member::new(group.clone()));
        assert_eq!(group.look(), Ok(false));
        group.progress().done += 1;
        assert_eq!(group.look(), Ok(false));
        drop(a);
        assert_eq!(group.look(), Err(()));
        drop(b);
        let group = Group::of(1);
        let a = Member::new(group.clone());
        group.progress().done += 1;
        drop(a);
        assert_eq!(group.look(), Ok(true));
    }
}
