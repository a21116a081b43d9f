//! A mirror: a copy of a LUN's volume that is made while the LUN is written to, and then kept up, until the LUN goes over to it or
//! leaves it behind (QEMU's `blockdev-mirror`).
//!
//! What it guarantees:
//! - Once it is ready, and whenever it has caught up, the target holds what a guest would read from the source, protection
//!   information included. Holes stay holes.
//! - A block that does not match its protection information is never copied: the job stops or ends there, and names it.
//! - Whatever is cut off (a copy, a write of a guest, the process) leaves its range to be copied again: [`super::dirty`].
//!
//! Two ways to keep up: in the background, where a guest's write goes to the source and its range is copied later; and
//! write-blocking, where it goes to both before it is answered. A mirror that is told to end takes the second way, so that it does end.
//!
//! While it is attached each side is the other's spare: a block that cannot be read from the source, or does not match, is read
//! from the target, if that is known to have the same, and written back.
//!
//! `run` is driven by the LUN's background task; guests come through [`super::front::Front`].

mod backup;
mod copy;
mod guest;
pub mod past;
mod settings;

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    time::{Duration, Instant},
};

pub use settings::{CopyMode, Settings, Share, SyncMode, Task};

use super::{ErrorAction, IoStatus, JobStatus, OnError, Side, dirty::DirtyMap, front::Ending};
use crate::{
    sync::{Notify, RangeLock},
    volume::{IoError, IoErrorKind, PiMismatch},
};

/// What a mirror tells while it goes on.
#[derive(Debug)]
pub enum Told {
    /// It is in another state.
    Status(JobStatus),
    /// It has caught up, with so many bytes copied, of so many, at that speed.
    Ready(u64, u64, u64),
    /// Its own I/O failed.
    Error {
        /// The source's, not the target's.
        source: bool,
        /// What is done about it.
        action: ErrorAction,
        /// In words, with the place.
        reason: String,
        /// The block that does not match its protection information, if it is that.
        mismatch: Option<PiMismatch>,
    },
    /// A block of the source was brought back from the target.
    Repaired(u64),
    /// Commands are about to pass it by, for good: what is kept of it outside the process must not be there any more after this.
    Parting,
}

/// A future of no type that anybody needs to know.
pub type Later = Pin<Box<dyn Future<Output = ()>>>;

/// What a mirror needs of those around it.
pub struct Hooks {
    /// Hears what happens; may not wait.
    pub tell: Box<dyn Fn(Told)>,
    /// Sleeps.
    pub sleep: Box<dyn Fn(Duration) -> Later>,
}

/// Why something is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerbError {
    /// QEMU's words.
    #[error("Job '{id}' in state '{state}' cannot accept command verb '{verb}'")]
    State {
        /// The job.
        id: String,
        /// [`JobStatus`].
        state: &'static str,
        /// The verb.
        verb: &'static str,
    },
    /// The target of a mirror with `sync: none` holds a part of the disk alone.
    #[error("its target holds only what was written since it began: it can be cancelled, and not completed")]
    Partial,
}

/// What is to be done after [`Mirror::run`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has caught up and was told to end: [`super::front::Front::end`].
    End(Ending),
    /// It was told to end at once.
    Cancelled,
    /// It cannot go on.
    Failed(String),
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    paused: bool,
    stopped: IoStatus,
    asked: Option<Ending>,
    pending: bool,
    waiting: bool,
    finalize: bool,
    cancelled: bool,
    failed: Option<String>,
    told: Option<JobStatus>,
}

/// A mirror of one volume.
pub struct Mirror<S> {
    id: String,
    source: Rc<S>,
    target: Rc<S>,
    map: DirtyMap,
    /// Writes that go to both take their range alone; in the background they and the copies share it.
    lock: RangeLock,
    copies: RangeLock,
    parted: Cell<bool>,
    settings: Cell<Settings>,
    state: RefCell<State>,
    /// Something is to be looked at again.
    changed: Notify,
    hooks: Hooks,
    copied: Cell<u64>,
    repaired: Cell<u64>,
    /// No data before that.
    not_before: Cell<Option<Instant>>,
    /// No data before that while guests are at work.
    rest_until: Cell<Option<Instant>>,
    /// Commands of guests under way, and when the last one came.
    guests: Cell<usize>,
    guest_came: Cell<Option<Instant>>,
    /// Pieces that are being copied, but for guests; and that no further one is begun.
    pieces: Cell<usize>,
    halted: Cell<bool>,
    closed: Cell<bool>,
}

impl<S: Side> Mirror<S> {
    /// A mirror that has not begun. The map says what is to be copied; `copied` bytes were before.
    pub fn new(
        id: String,
        (source, target): (Rc<S>, Rc<S>),
        map: DirtyMap,
        settings: Settings,
        copied: u64,
        hooks: Hooks,
    ) -> Mirror<S> {
        let state = State { paused: settings.paused, ..State::default() };
        Mirror {
            id,
            source,
            target,
            map,
            lock: RangeLock::new(),
            copies: RangeLock::new(),
            parted: Cell::new(false),
            settings: Cell::new(settings),
            state: RefCell::new(state),
            changed: Notify::new(),
            hooks,
            copied: Cell::new(copied),
            repaired: Cell::new(0),
            not_before: Cell::new(None),
            rest_until: Cell::new(None),
            guests: Cell::new(0),
            guest_came: Cell::new(None),
            pieces: Cell::new(0),
            halted: Cell::new(false),
            closed: Cell::new(false),
        }
    }

    /// The job's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it copies.
    pub fn source(&self) -> &Rc<S> {
        &self.source
    }

    /// Where it copies to.
    pub fn target(&self) -> &Rc<S> {
        &self.target
    }

    /// What is dirty.
    pub fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// What it was told, as it is now.
    pub fn settings(&self) -> Settings {
        self.settings.get()
    }

    /// Whether all is copied at this moment; of one that copies only what is overwritten there is nothing that it has to.
    pub fn is_settled(&self) -> bool {
        self.settings.get().keeps_only_the_past() || self.map.is_settled()
    }

    /// Bytes copied, and bytes in all as far as it is known; as in QEMU the second grows with what is written meanwhile.
    pub fn progress(&self) -> (u64, u64) {
        (self.copied.get(), self.copied.get() + self.map.left())
    }

    /// Blocks that were brought back from the target.
    pub fn repaired(&self) -> u64 {
        self.repaired.get()
    }

    /// Whether it has caught up.
    pub fn is_ready(&self) -> bool {
        self.state.borrow().ready
    }

    /// Whether its I/O works.
    pub fn io_status(&self) -> IoStatus {
        self.state.borrow().stopped
    }

    /// Whether it does something at this moment.
    pub fn is_busy(&self) -> bool {
        let state = self.state.borrow();
        !state.paused && state.stopped == IoStatus::Ok
    }

    /// How far it is.
    pub fn status(&self) -> JobStatus {
        let state = self.state.borrow();
        match &*state {
            s if s.failed.is_some() || s.cancelled => JobStatus::Aborting,
            s if s.waiting => JobStatus::Waiting,
            s if s.pending => JobStatus::Pending,
            s if s.paused || s.stopped != IoStatus::Ok => {
                if s.ready {
                    JobStatus::Standby
                } else {
                    JobStatus::Paused
                }
            }
            s if s.ready => JobStatus::Ready,
            _ => JobStatus::Running,
        }
    }

    /// Changes the state, tells of it, and has everybody look again.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let out = change(&mut self.state.borrow_mut());
        let status = self.status();
        if self.state.borrow_mut().told.replace(status) != Some(status) {
            (self.hooks.tell)(Told::Status(status));
        }
        self.changed.notify_all();
        out
    }

    fn in_state<T>(&self, verb: &'static str) -> Result<T, VerbError> {
        Err(VerbError::State { id: self.id.clone(), state: word(self.status()), verb })
    }

    /// The LUN is to go over to the target. Of one that copies only what is overwritten: its moment is not needed any more, because what was
    /// wanted of it has been read ([`past`]).
    ///
    /// # Errors
    /// If it has not caught up, or its target is not whole.
    pub fn complete(&self) -> Result<(), VerbError> {
        let settings = self.settings.get();
        if settings.keeps_only_the_past() {
            if self.is_over() {
                return self.in_state("complete");
            }
            self.change(|state| {
                *state = State {
                    asked: Some(Ending::Leave),
                    finalize: true,
                    told: state.told,
                    ..State::default()
                };
            });
            return Ok(());
        }
        if settings.task.ends_by_itself() || settings.task == Task::Handover {
            return self.in_state("complete");
        }
        if settings.sync == SyncMode::None {
            return Err(VerbError::Partial);
        }
        if self.status() != JobStatus::Ready {
            return self.in_state("complete");
        }
        self.change(|state| state.asked = Some(Ending::Pivot));
        Ok(())
    }

    /// Ends it: one that has caught up leaves a target that is what the source was at that moment, unless `force` is said or it cannot
    /// copy; all others end as they are.
    pub fn cancel(&self, force: bool) {
        // What a handover leaves is of no use to anybody.
        let whole = self.settings.get().task != Task::Handover;
        self.change(|state| {
            let soft = whole && !force && state.ready && !state.paused && state.stopped == IoStatus::Ok;
            if soft {
                state.asked = Some(Ending::Leave);
                // Nobody has to say it twice.
                state.finalize = true;
            } else {
                state.cancelled = true;
            }
        });
    }

    /// Has changes go to both sides from now on, so that it catches up whatever guests do.
    pub fn converge(&self) {
        self.settings.set(Settings { copy_mode: CopyMode::WriteBlocking, ..self.settings.get() });
        self.change(|_| ());
    }

    /// Has it wait, or go on; a resumed one tries again what has failed.
    pub fn pause(&self, on: bool) {
        self.settings.set(Settings { paused: on, ..self.settings.get() });
        self.change(|state| {
            state.paused = on;
            if !on {
                state.stopped = IoStatus::Ok;
            }
        });
    }

    /// So many bytes a second from now on; 0 for no limit.
    pub fn set_speed(&self, speed: u64) {
        self.settings.set(Settings { speed, ..self.settings.get() });
        self.not_before.set(None);
        self.change(|_| ());
    }

    /// That much of its time from now on, while guests are at work.
    pub fn set_share(&self, share: Share) {
        self.settings.set(Settings { share, ..self.settings.get() });
        self.rest_until.set(None);
        self.change(|_| ());
    }

    /// Makes final what waits for it.
    ///
    /// # Errors
    /// If nothing does.
    pub fn finalize(&self) -> Result<(), VerbError> {
        if self.status() != JobStatus::Pending {
            return self.in_state("finalize");
        }
        self.change(|state| state.finalize = true);
        Ok(())
    }

    /// It has done its work, and waits for other jobs.
    pub fn wait_for_others(&self) {
        // One that was told to end has been waiting to be told.
        let waits = self.settings.get().auto_finalize;
        self.change(|state| state.waiting = waits);
    }

    /// It cannot go on, for that reason.
    pub fn give_up(&self, reason: &str) {
        self.change(|state| {
            state.failed.get_or_insert_with(|| reason.to_owned());
        });
    }

    /// It was told to end, and could not, for that reason: it stays ready, and keeps both sides in step.
    pub fn not_ended(&self, reason: &str) {
        let reason = reason.to_owned();
        (self.hooks.tell)(Told::Error { source: false, action: ErrorAction::Ignore, reason, mismatch: None });
        self.settings.set(Settings { copy_mode: CopyMode::WriteBlocking, ..self.settings.get() });
        self.change(|state| (state.asked, state.pending, state.finalize) = (None, false, false));
    }

    /// The target could not be made durable. To try again helps nobody: the kernel has dropped the data.
    pub fn flush_failed(&self, e: &IoError) {
        (self.hooks.tell)(Told::Error {
            source: false,
            action: ErrorAction::Report,
            reason: e.to_string(),
            mismatch: None,
        });
        self.give_up(&e.to_string());
    }

    /// One of its own operations failed.
    fn failed(&self, source: bool, e: &IoError) -> ErrorAction {
        let settings = self.settings.get();
        let policy = if source { settings.on_source_error } else { settings.on_target_error };
        let no_space = e.kind == IoErrorKind::NoSpace;
        let action = match policy {
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if no_space => ErrorAction::Stop,
            OnError::Report | OnError::Enospc => ErrorAction::Report,
        };
        let mismatch = match e.kind {
            IoErrorKind::Protection(m) => Some(m),
            _ => None,
        };
        (self.hooks.tell)(Told::Error { source, action, reason: e.to_string(), mismatch });
        match action {
            ErrorAction::Report => self.give_up(&e.to_string()),
            ErrorAction::Stop => self.change(|state| {
                state.stopped = if no_space { IoStatus::Nospace } else { IoStatus::Failed };
            }),
            ErrorAction::Ignore => {}
        }
        action
    }

    /// Whether writes of guests go to both sides now.
    fn is_write_blocking(&self) -> bool {
        let state = self.state.borrow();
        let wanted = self.settings.get().copy_mode == CopyMode::WriteBlocking || state.asked.is_some();
        wanted && state.stopped == IoStatus::Ok && state.failed.is_none() && !state.cancelled
    }

    /// Commands are about to pass it by: it is at its end, and no successor may take it up, since nobody marks any more what they change.
    pub fn part(&self) {
        if !self.parted.replace(true) {
            (self.hooks.tell)(Told::Parting);
        }
    }

    /// Whether commands may pass it by.
    pub fn has_parted(&self) -> bool {
        self.parted.get()
    }

    /// The LUN stops: no further piece is begun, and those that are under way are not to be cut off, which leaks clusters of a qcow2 target.
    pub fn halt(&self) {
        self.halted.set(true);
    }

    /// Whether pieces are being copied.
    pub fn is_copying(&self) -> bool {
        self.pieces.get() > 0
    }

    fn is_over(&self) -> bool {
        let state = self.state.borrow();
        state.failed.is_some() || state.cancelled
    }

    /// What is to be done, if copying is not.
    fn verdict(&self) -> Option<Verdict> {
        let state = self.state.borrow();
        if let Some(reason) = &state.failed {
            return Some(Verdict::Failed(reason.clone()));
        }
        if state.cancelled {
            return Some(Verdict::Cancelled);
        }
        let may = self.settings.get().auto_finalize || state.finalize;
        let can = !state.paused && state.stopped == IoStatus::Ok && self.is_settled();
        state.asked.filter(|_| may && can).map(Verdict::End)
    }

    /// Closes the target, the LUN's own end being near. What is still to be copied is kept.
    pub async fn close_target(&self) {
        if self.settings.get().task.is_within() {
            return;
        }
        match self.target.close().await {
            Ok(()) => self.closed.set(true),
            Err(error) => tracing::warn!(job = self.id, %error, "the mirror's target could not be closed"),
        }
    }

    /// Whether the target was closed, and is durable.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

/// QEMU's word for a state.
pub fn word(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Created => "created",
        JobStatus::Running => "running",
        JobStatus::Paused => "paused",
        JobStatus::Ready => "ready",
        JobStatus::Standby => "standby",
        JobStatus::Waiting => "waiting",
        JobStatus::Pending => "pending",
        JobStatus::Aborting => "aborting",
        JobStatus::Concluded => "concluded",
        JobStatus::Null => "null",
    }
}
