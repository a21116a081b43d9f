//! The scrub of a LUN: a look at every block that has a tuple, at a set speed, while the LUN serves.
//!
//! There is at most one at a time, and its account outlives it: the last one's stands until the next begins. It is kept in a
//! file, so a scrub goes on where it was after a restart or a crash of the daemon. It runs as a part of the LUN's background
//! task, on the LUN's thread; from outside it is asked by [`ScrubOrder`]. It says which blocks are wrong and where
//! they lie, and has those brought back for which there is a second copy: while a mirror is attached.

use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::{
    events::{Events, FoundBy, JobStatus},
    state_file::{NewerVersion, StateFile, now_ms},
};
use crate::{
    pi::{
        Protected,
        scrub::Step,
        tools::{LISTED, VerifyReport, name_files},
    },
    storage::Storage,
    sync::Notify,
    sys::{exec::yield_now, io::Io},
    units::Lba,
    volume::Volume,
};

/// The folder of these files.
pub const FOLDER: &str = "scrub";

/// Bytes a second, where nothing else is said: a tenth of what one NVMe disk reads.
pub const DEFAULT_SPEED: u64 = 100 << 20;

/// The slowest that makes sense: a step of a scrub every four seconds.
pub const MIN_SPEED: u64 = 64 << 10;

/// How often a scrub under way is saved: what it would look at twice after a crash.
const SAVE: Duration = Duration::from_secs(10);

/// How far a scrub is; in QEMU's words where its jobs have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScrubStatus {
    /// It goes on.
    Running,
    /// It waits to be told to go on.
    Paused,
    /// It has looked at everything.
    Concluded,
    /// It was ended before it had.
    Cancelled,
    /// It could not go on: see the error.
    Failed,
}

/// A scrub, under way or ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrub {
    /// How far it is.
    pub status: ScrubStatus,
    /// The first block that it has not looked at.
    pub next_lba: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// Bytes a second at most; 0 for no limit.
    pub speed: u64,
    /// When it began, in milliseconds since 1970.
    pub started_ms: u64,
    /// When it ended.
    pub ended_ms: Option<u64>,
    /// Why it could not go on.
    pub error: Option<String>,
    /// Bytes that it has read; holes are passed over.
    pub read_bytes: u64,
    /// What it has found.
    #[serde(flatten)]
    pub found: VerifyReport,
}

impl Scrub {
    /// Whether it is still to go on.
    pub fn is_under_way(&self) -> bool {
        matches!(self.status, ScrubStatus::Running | ScrubStatus::Paused)
    }

    /// Bytes of the LUN that are behind it, and bytes of the LUN.
    pub fn progress(&self) -> (u64, u64) {
        let total = self.found.blocks.saturating_mul(self.block_size);
        let done = self.next_lba.saturating_mul(self.block_size).min(total);
        (if self.status == ScrubStatus::Concluded { total } else { done }, total)
    }
}

/// What a scrub can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubOrder {
    /// Begin, with so many bytes a second ([`DEFAULT_SPEED`] if nothing is said, 0 for no limit).
    Start(Option<u64>),
    /// Stop until [`ScrubOrder::Resume`], also across a restart.
    Pause,
    /// Go on.
    Resume,
    /// End.
    Cancel,
    /// So many bytes a second from now on.
    SetSpeed(u64),
    /// Nothing: only tell.
    Query,
}

/// Why an order isn't carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScrubError {
    /// The LUN has no tuples.
    #[error("this LUN has no protection information to check its blocks against")]
    NotProtected,
    /// There is one.
    #[error("a scrub of this LUN is under way already")]
    UnderWay,
    /// There is none.
    #[error("no scrub of this LUN is under way")]
    NoneUnderWay,
    /// Too slow.
    #[error("{0} bytes a second is too slow: give at least {MIN_SPEED}, or 0 for no limit")]
    Speed(u64),
}

/// The scrub of one LUN, on its thread.
pub(super) struct Scrubber {
    now: RefCell<Option<Scrub>>,
    /// Counts starts, pauses and ends: a step that was under way then does not count, so what an order saved stays true. A paused
    /// scrub looks at those blocks again.
    generation: Cell<u64>,
    changed: Notify,
    file: Option<StateFile>,
    /// The image's chain, for the reports.
    files: RefCell<Vec<PathBuf>>,
    block_size: u64,
    events: Rc<Events>,
}

impl Scrubber {
    /// Takes up what was saved.
    pub(super) fn new(
        file: Option<StateFile>,
        files: Vec<PathBuf>,
        block_size: u64,
        events: Rc<Events>,
    ) -> Scrubber {
        let saved = file.as_ref().map_or(Ok(None), StateFile::load::<Scrub>);
        let saved = saved.unwrap_or_else(|error| {
            let next = NewerVersion::of(&error).map(NewerVersion::next_step);
            warn!(%error, next, "the account of the last scrub cannot be read");
            None
        });
        let saved = saved.filter(|s| s.block_size == block_size);
        if let Some(scrub) = saved.as_ref().filter(|s| s.is_under_way()) {
            info!(status = ?scrub.status, next_lba = scrub.next_lba, "the scrub goes on where it was");
        }
        let (generation, changed) = (Cell::new(0), Notify::new());
        let (now, files) = (RefCell::new(saved), RefCell::new(files));
        Scrubber { now, generation, changed, file, files, block_size, events }
    }

    /// The LUN has another image, of these files.
    pub(super) fn set_files(&self, files: Vec<PathBuf>) {
        self.files.replace(files);
    }

    /// The scrub under way, or the last one.
    pub(super) fn last(&self) -> Option<Scrub> {
        self.now.borrow().clone()
    }

    /// Carries out an order; gives how the scrub is then. `blocks` are those of the LUN, if it is protected.
    pub(super) fn order(&self, order: ScrubOrder, blocks: Option<u64>) -> Result<Option<Scrub>, ScrubError> {
        let blocks = blocks.ok_or(ScrubError::NotProtected)?;
        if let ScrubOrder::Start(Some(speed)) | ScrubOrder::SetSpeed(speed) = order
            && (1..MIN_SPEED).contains(&speed)
        {
            return Err(ScrubError::Speed(speed));
        }
        let was = self.now.borrow().as_ref().map(|s| s.status);
        {
            let mut now = self.now.borrow_mut();
            match (order, now.as_mut().filter(|s| s.is_under_way())) {
                (ScrubOrder::Query, _) => return Ok(now.clone()),
                (ScrubOrder::Start(_), Some(_)) => return Err(ScrubError::UnderWay),
                (ScrubOrder::Start(speed), None) => {
                    *now = Some(self.begun(blocks, speed.unwrap_or(DEFAULT_SPEED)))
                }
                (_, None) => return Err(ScrubError::NoneUnderWay),
                (ScrubOrder::Pause, Some(s)) => s.status = ScrubStatus::Paused,
                (ScrubOrder::Resume, Some(s)) => s.status = ScrubStatus::Running,
                (ScrubOrder::SetSpeed(speed), Some(s)) => s.speed = speed,
                (ScrubOrder::Cancel, Some(s)) => {
                    s.status = ScrubStatus::Cancelled;
                    s.ended_ms = Some(now_ms());
                }
            }
        }
        if matches!(order, ScrubOrder::Start(_) | ScrubOrder::Pause | ScrubOrder::Cancel) {
            self.generation.set(self.generation.get() + 1);
        }
        info!(?order, "scrub");
        self.save();
        self.changed.notify_all();
        use JobStatus::{Aborting, Concluded, Created, Null, Paused, Running};
        match (order, was) {
            (ScrubOrder::Start(_), _) => self.events.scrub(&[Created, Running]),
            (ScrubOrder::Pause, Some(ScrubStatus::Running)) => self.events.scrub(&[Paused]),
            (ScrubOrder::Resume, Some(ScrubStatus::Paused)) => self.events.scrub(&[Running]),
            (ScrubOrder::Cancel, _) => self.events.scrub(&[Aborting, Concluded, Null]),
            _ => {}
        }
        Ok(self.last())
    }

    fn begun(&self, blocks: u64, speed: u64) -> Scrub {
        Scrub {
            status: ScrubStatus::Running,
            next_lba: 0,
            block_size: self.block_size,
            speed,
            started_ms: now_ms(),
            ended_ms: None,
            error: None,
            read_bytes: 0,
            found: VerifyReport { blocks, ..VerifyReport::default() },
        }
    }

    /// Runs scrubs for as long as the LUN's thread does, or has this image. `mend` brings a block back from a second copy, if there is one;
    /// the report has it all the same.
    pub(super) async fn run<V: Volume, S: Storage>(
        &self,
        protected: &Protected<V, S>,
        io: &Io,
        mend: impl AsyncFn(u64) -> bool,
    ) {
        let mut saved = Instant::now();
        loop {
            let turn =
                self.now.borrow().as_ref().filter(|s| s.status == ScrubStatus::Running).map(|s| s.next_lba);
            let Some(from) = turn else {
                self.changed.wait().await;
                continue;
            };
            let (began, generation) = (Instant::now(), self.generation.get());
            let mut found = VerifyReport::default();
            let step = protected.scrub(Lba(from), &mut found).await;
            if self.generation.get() != generation {
                continue;
            }
            name_files(&mut found.bad, &self.files.borrow());
            for bad in &found.bad {
                mend(bad.lba).await;
            }
            let (read, speed) = match self.account(step.map_err(|e| e.to_string()), found) {
                Some(pace) => pace,
                None => {
                    self.save();
                    continue;
                }
            };
            if saved.elapsed() >= SAVE {
                saved = Instant::now();
                self.save_aside(io).await;
            }
            match Duration::from_secs_f64(read as f64 / speed.max(1) as f64).checked_sub(began.elapsed()) {
                Some(rest) if speed > 0 => io.sleep(rest).await,
                _ => yield_now().await,
            }
        }
    }

    /// Adds a step. Gives what was read and the speed, unless the scrub is over.
    fn account(&self, step: Result<Option<Step>, String>, mut found: VerifyReport) -> Option<(u64, u64)> {
        for bad in &found.bad {
            error!(lba = bad.lba, tag = %bad.tag, expected = bad.expected, found = bad.found, "scrub: a block does not match");
            self.events.mismatch(bad.lba, bad.tag.clone(), bad.expected, bad.found, FoundBy::Scrub);
        }
        let mut now = self.now.borrow_mut();
        let scrub = now.as_mut()?;
        let all = &mut scrub.found;
        all.blocks = found.blocks;
        all.verified += found.verified;
        all.unprotected += found.unprotected;
        all.mismatches += found.mismatches;
        all.in_doubt += found.in_doubt;
        all.unreadable += found.unreadable;
        let room = LISTED.saturating_sub(all.bad.len());
        all.bad.extend(found.bad.drain(..).take(room));
        match step {
            Ok(Some(step)) => {
                scrub.next_lba = step.next.0;
                scrub.read_bytes += step.read;
                return Some((step.read, scrub.speed));
            }
            Ok(None) => {
                scrub.next_lba = scrub.found.blocks;
                scrub.status = ScrubStatus::Concluded;
                let VerifyReport { verified, mismatches, unreadable, .. } = scrub.found;
                info!(verified, mismatches, unreadable, "scrub: done");
                let done = [JobStatus::Waiting, JobStatus::Pending, JobStatus::Concluded, JobStatus::Null];
                self.events.scrub(&done);
            }
            Err(reason) => {
                error!(lba = scrub.next_lba, "scrub: cannot go on: {reason}");
                scrub.status = ScrubStatus::Failed;
                scrub.error = Some(reason);
                self.events.scrub(&[JobStatus::Aborting, JobStatus::Concluded, JobStatus::Null]);
            }
        }
        scrub.ended_ms = Some(now_ms());
        None
    }

    /// Saves on another thread: the LUN's has guests to serve.
    async fn save_aside(&self, io: &Io) {
        let (Some(file), Some(scrub)) = (self.file.clone(), self.last()) else { return };
        let before = Some(scrub.clone());
        let saved = io.blocking(move || file.save(scrub, false)).await;
        if let Err(error) = saved.and_then(|done| done) {
            warn!(%error, "the scrub's account cannot be saved");
        }
        // An order that came meanwhile has been saved at the same time, and this was older.
        if self.last() != before {
            self.save();
        }
    }

    /// The LUN stops: what is under way goes on at the next start.
    pub(super) fn stop(&self) {
        if self.now.borrow().as_ref().is_some_and(Scrub::is_under_way) {
            self.save();
        }
    }

    fn save(&self) {
        let (Some(file), Some(scrub)) = (&self.file, self.last()) else { return };
        if let Err(error) = file.save(scrub, false) {
            warn!(%error, "the scrub's account cannot be saved");
        }
    }
}
