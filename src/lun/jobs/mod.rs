//! The block jobs of a LUN: begun, led, kept across restarts, and made an end of. On the LUN's thread.
//!
//! There is at most one at a time. What it is told comes as a [`JobOrder`] from outside, what it tells goes to the LUN's events. It runs as a
//! part of the LUN's background task ([`Jobs::run`]).
//!
//! The pivot, in an order that a `kill -9` may cut anywhere: the target is flushed, nobody writes, both sides are the same; the choice is
//! written down and durable ([`Moves`]); commands go to the target; the source is closed; the job's record goes. A start before the choice
//! is durable finds the source, which has all that was acknowledged, and the record of a mirror that goes on; a start after it finds the target.

mod backup;
mod ballot;
mod begin;
mod beneath;
mod chain;
mod commit;
pub mod exposed;
mod group;
mod handover;
mod internal;
mod record;
mod resume;
mod snapshot;
mod switch;
mod target;
mod transaction;
mod types;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tracing::{error, info, warn};

pub use ballot::Ballot;
pub use exposed::Expose;
pub use group::Group;
pub use record::FOLDER;
pub use types::{
    Act, BackupOrder, BitmapOrder, BlockJob, CommitOrder, HandoverOrder, InternalOrder, JobError, JobInfo,
    JobOrder, MirrorOrder, PartOrder, SnapshotOrder, StreamOrder, copy_mode, names_an_image, sync_mode,
};

pub use super::bitmaps::GRANULARITY as BITMAP_GRANULARITY;
pub use crate::job::{
    JobStatus, OnError,
    bitmaps::{BitmapError, BitmapInfo, BitmapMode},
    mirror::{CopyMode, Settings, Share, SyncMode, Task},
};

use self::record::Record;
pub(super) use self::{record::Place, resume::resume};
use super::{
    SharedMade,
    config::DeviceConfig,
    events::{Event, Events, FoundBy},
    moved::Moves,
    stack::Stack,
    state_file::StateFile,
};
use crate::{
    job::{
        IoStatus,
        front::{Ending, Front, Outcome},
        mirror::{Hooks, Mirror, Told, VerbError},
    },
    sync::Notify,
    sys::io::Io,
    units::BlockSize,
    volume::Volume,
};

/// The error of a job that was cancelled: strerror(ECANCELED), as in QEMU.
pub const CANCELED: &str = "Operation canceled";

/// The job under way.
struct Active {
    mirror: Rc<Mirror<Stack>>,
    record: RefCell<Record>,
    target: DeviceConfig,
    /// The dirty bitmap that it has, and what it leaves of it.
    bitmap: Option<(String, BitmapMode)>,
    /// The jobs that it succeeds together with.
    group: Option<group::Member>,
}

/// A job that was under way when the LUN stopped.
pub(super) enum Resumed {
    /// Its target is open.
    Open(Box<Record>, Box<Stack>),
    /// It copies within the LUN's own image.
    Within(Box<Record>),
    /// It copies between images that lie beneath the LUN's own: both are open.
    Beneath(Box<Record>, Box<Stack>, Box<Stack>),
    /// It is not.
    Lost(Box<Record>, String),
}

/// The jobs of one LUN.
pub(super) struct Jobs {
    place: Place,
    moves: Option<Moves>,
    active: RefCell<Option<Rc<Active>>>,
    /// Those that have ended, and wait to be dismissed.
    ended: RefCell<Vec<JobInfo>>,
    starting: Cell<bool>,
    added: Notify,
    /// Those whose moment an export shows.
    exposed: exposed::Moments,
    repaired: Cell<u64>,
    made: SharedMade,
    events: Rc<Events>,
    io: Io,
}

/// Something begins.
struct Starting<'a>(&'a Jobs);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting.set(false);
    }
}

/// Forgets the job of the LUN with that serial number, which is gone.
pub fn forget(state_dir: &std::path::Path, serial: &str) {
    let place = Place::new(Some(StateFile::new(state_dir, FOLDER, serial)));
    if let Ok(Some(record)) = place.load() {
        record.remove_scratch();
    }
    place.remove();
}

impl Jobs {
    /// No jobs yet.
    pub(super) fn new(
        place: Place,
        moves: Option<Moves>,
        made: SharedMade,
        events: Rc<Events>,
        io: &Io,
    ) -> Jobs {
        Jobs {
            place,
            moves,
            active: RefCell::default(),
            ended: RefCell::default(),
            starting: Cell::new(false),
            added: Notify::new(),
            exposed: Default::default(),
            repaired: Cell::new(0),
            made,
            events,
            io: io.clone(),
        }
    }

    /// Takes up the job that was under way; gives what commands go to.
    pub(super) fn take_up(&self, source: Stack, found: Option<Resumed>) -> Front<Stack> {
        let source = Rc::new(source);
        let front = |mirror| Front::mirrored(source.clone(), mirror);
        let lost = |record: Record, reason: String| {
            error!(job = record.id, "the job is lost: {reason}");
            let target = DeviceConfig::parse(&record.target).map(|c| c.image).unwrap_or_default();
            self.place.remove();
            self.ended.borrow_mut().push(JobInfo {
                id: record.id,
                status: JobStatus::Concluded,
                offset: record.copied,
                len: record.copied,
                speed: record.settings.speed,
                ready: false,
                paused: false,
                busy: false,
                io_status: IoStatus::Failed,
                settings: record.settings,
                target,
                repaired: 0,
                error: Some(reason),
            });
        };
        let (mut record, copied, stack) = match found {
            None => return front(None),
            Some(Resumed::Lost(record, reason)) => {
                lost(*record, reason);
                return front(None);
            }
            Some(Resumed::Open(record, stack)) => (*record, source.clone(), Rc::new(*stack)),
            Some(Resumed::Within(record)) => (*record, source.clone(), source.clone()),
            Some(Resumed::Beneath(record, from, to)) => (*record, Rc::new(*from), Rc::new(*to)),
        };
        let (map, known) = match self.place.go_on(&mut record, source.limits().capacity) {
            Ok(found) => found,
            Err(e) => {
                drop(stack);
                commit::give_back(&source, record.settings.task, record.base.as_deref());
                lost(record, format!("its record: {e}"));
                return front(None);
            }
        };
        info!(job = record.id, left = map.left(), known, "the job goes on where it was");
        let target = match DeviceConfig::parse(&record.target) {
            Ok(target) => target,
            Err(e) => {
                lost(record, e.to_string());
                return front(None);
            }
        };
        let hooks = self.hooks(&record.id, record.settings.task);
        let sides = (copied, stack);
        let mirror = Mirror::new(record.id.clone(), sides, map, record.settings, record.copied, hooks);
        let mirror = Rc::new(mirror);
        let active = Active {
            mirror: mirror.clone(),
            record: RefCell::new(record),
            target,
            bitmap: None,
            group: None,
        };
        self.active.replace(Some(Rc::new(active)));
        // Guests are not concerned by what goes on between other images.
        let concerns_guests = !matches!(mirror.settings().task, Task::CommitBeneath { .. });
        front(concerns_guests.then_some(mirror))
    }

    fn hooks(&self, id: &str, task: Task) -> Hooks {
        let (events, io, id, place) =
            (self.events.clone(), self.io.clone(), id.to_owned(), self.place.clone());
        Hooks {
            tell: Box::new(move |told| match told {
                Told::Status(status) => events.tell(Event::Job { id: id.clone(), status }),
                Told::Ready(done, all, speed) => {
                    let progress = (done, all, speed);
                    events.tell(Event::BlockJob { id: id.clone(), task, what: BlockJob::Ready, progress });
                }
                Told::Error { source, action, reason, mismatch } => {
                    error!(job = id, side = if source { "source" } else { "target" }, ?action, "{reason}");
                    if let Some(m) = mismatch {
                        let by = if task.keeps_the_past() { FoundBy::Backup } else { FoundBy::Mirror };
                        events.mismatch(m.lba.0, m.tag.to_string(), m.expected, m.found, by);
                    }
                    events.tell(Event::BlockJobError { id: id.clone(), read: source, action, reason });
                }
                Told::Repaired(_) => {}
                // A restart has a backup's past to see to, and never takes it up.
                Told::Parting if task.keeps_the_past() => {}
                Told::Parting => place.remove(),
            }),
            sleep: Box::new(move |time| {
                let io = io.clone();
                Box::pin(async move { io.sleep(time).await })
            }),
        }
    }

    /// The job under way, and those that wait to be dismissed.
    pub(super) fn all(&self) -> Vec<JobInfo> {
        let active = self.active.borrow();
        active.iter().map(|a| a.info()).chain(self.ended.borrow().iter().cloned()).collect()
    }

    /// Blocks of the LUN that were brought back from a mirror's target.
    pub(super) fn repaired(&self) -> u64 {
        self.repaired.get() + self.active.borrow().as_ref().map_or(0, |a| a.mirror.repaired())
    }

    /// Tells who has just begun to listen what there is.
    pub(super) fn introduce(&self) {
        if let Some(active) = &*self.active.borrow() {
            for status in [JobStatus::Created, active.mirror.status()] {
                self.events.tell(Event::Job { id: active.mirror.id().to_owned(), status });
            }
        }
    }

    /// Carries out an order; gives the jobs as they are then. `moved` is called when the LUN is about to have another image, and when it has.
    pub(super) async fn order(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: JobOrder,
        moved: impl Fn(),
    ) -> Result<Vec<JobInfo>, JobError> {
        match order {
            JobOrder::Query => {}
            JobOrder::Commit(order) => self.commit(front, block_size, *order).await?,
            JobOrder::Stream(order) => self.stream(front, block_size, *order).await?,
            JobOrder::Snapshot(order) => self.snapshot(front, block_size, order, &moved).await?,
            JobOrder::Internal(order) => self.internal(front, order).await?,
            JobOrder::Mirror(order) => self.mirror(front, block_size, *order).await?,
            JobOrder::Backup(order) => self.backup(front, block_size, *order).await?,
            JobOrder::Handover(order) => self.handover(front, block_size, order).await?,
            JobOrder::Converge(id) => self.find(&id)?.mirror.converge(),
            JobOrder::Bitmap(order) => {
                // A transaction may have done something with them that it takes back.
                front.passable().await;
                self.bitmap(front, order)?;
            }
            JobOrder::Part(order) => self.part(front, block_size, *order).await?,
            JobOrder::Complete(id) => self.find(&id)?.mirror.complete()?,
            JobOrder::Cancel { id, force } => self.find(&id)?.cancel(force),
            JobOrder::Pause(id) => self.lead(&id, |mirror| mirror.pause(true))?,
            JobOrder::Resume(id) => self.lead(&id, |mirror| mirror.pause(false))?,
            JobOrder::SetSpeed(id, speed) => self.lead(&id, |mirror| mirror.set_speed(speed))?,
            JobOrder::SetShare(id, share) => self.lead(&id, |mirror| mirror.set_share(share))?,
            JobOrder::Finalize(id) => self.find(&id)?.mirror.finalize()?,
            JobOrder::Dismiss(id) => {
                let found = self.ended.borrow().iter().position(|info| info.id == id);
                match found {
                    Some(at) => {
                        self.ended.borrow_mut().remove(at);
                        self.events.tell(Event::Job { id, status: JobStatus::Null });
                    }
                    None => {
                        let state = crate::job::mirror::word(self.find(&id)?.mirror.status());
                        return Err(VerbError::State { id, state, verb: "dismiss" }.into());
                    }
                }
            }
        }
        Ok(self.all())
    }

    fn find(&self, id: &str) -> Result<Rc<Active>, JobError> {
        let found = self.active.borrow().clone().filter(|active| active.mirror.id() == id);
        found.ok_or_else(|| JobError::NotFound(id.to_owned()))
    }

    /// Changes what a restart has to know too.
    fn lead(&self, id: &str, change: impl FnOnce(&Mirror<Stack>)) -> Result<(), JobError> {
        let active = self.find(id)?;
        change(&active.mirror);
        self.save(&active)
    }

    fn save(&self, active: &Active) -> Result<(), JobError> {
        if active.mirror.has_parted() {
            return Ok(());
        }
        let mut record = active.record.borrow_mut();
        record.settings = active.mirror.settings();
        record.copied = active.mirror.progress().0;
        self.place.save(&record).map_err(|e| JobError::Record(e.to_string()))
    }

    /// Nothing else begins while what is given lives; refused while there is a job.
    fn starting(&self, id: &str) -> Result<Starting<'_>, JobError> {
        if self.ended.borrow().iter().any(|info| info.id == id) {
            return Err(JobError::Taken(id.to_owned()));
        }
        if let Some(active) = &*self.active.borrow() {
            return Err(JobError::Busy(active.mirror.id().to_owned()));
        }
        if self.starting.replace(true) {
            return Err(JobError::Busy(id.to_owned()));
        }
        Ok(Starting(self))
    }

    /// Runs jobs for as long as the LUN's thread does. `moved` is called when the LUN has gone over to another image.
    pub(super) async fn run(&self, front: &Front<Stack>, moved: impl Fn()) {
        loop {
            let active = self.active.borrow().clone();
            let Some(active) = active else {
                self.added.wait().await;
                continue;
            };
            // On the heap: it is some hundred KiB, which a LUN without a job is not to have.
            Box::pin(self.work(&active, front, &moved)).await;
        }
    }

    /// Runs one job to its end.
    async fn work(&self, active: &Active, front: &Front<Stack>, moved: &impl Fn()) {
        let begun = !active.record.borrow().scanned;
        if begun {
            let fresh = active.record.borrow().fresh;
            active.mirror.scan(fresh).await;
            active.record.borrow_mut().scanned = true;
            if let Err(error) = self.save(active) {
                warn!(%error, "after a restart all would be copied again");
            }
        }
        let task = active.mirror.settings().task;
        let outcome = match task.ends_by_itself() && !task.keeps_the_past() {
            true => self.drive_chain(active, front, moved).await,
            false => {
                let drive = front.drive(&active.mirror, async || self.decide(active.target.clone()).await);
                match &active.group {
                    Some(member) => member.with_all(&self.io, &active.mirror, drive).await,
                    None => drive.await,
                }
            }
        };
        Jobs::see_to_bitmaps(active, front, &outcome).await;
        let goes_on = !matches!(outcome, Outcome::Ended(Ending::Pivot | Ending::Finish));
        self.conclude(active, outcome, moved).await;
        if goes_on {
            let (task, base) = (active.mirror.settings().task, active.record.borrow().base.clone());
            commit::give_back(&front.volume(), task, base.as_deref());
        }
    }

    /// Makes it durable that the LUN has that image. On another thread: it waits for the disk.
    async fn decide(&self, to: DeviceConfig) -> Result<(), String> {
        let Some(moves) = self.moves.clone() else { return Ok(()) };
        let from = self.made.get().config.clone();
        let noted = self
            .io
            .blocking(move || {
                let Err(e) = moves.note(&from, &to) else { return Ok(()) };
                // What a restart would find is what counts.
                match moves.follow(&from) {
                    Ok(now) if now.image == to.image => {
                        warn!(error = %e, "the LUN's new image is written down, and a power cut may undo that");
                        Ok(())
                    }
                    _ => Err(e),
                }
            })
            .await;
        noted.and_then(|noted| noted).map_err(|e| ballot::unwritten(&e))
    }

    async fn conclude(&self, active: &Active, outcome: Outcome, moved: impl Fn()) {
        let mirror = &active.mirror;
        let mut info = active.info();
        let pivoted = outcome == Outcome::Ended(Ending::Pivot);
        if pivoted {
            self.made.set_config(active.target.clone());
            moved();
            info!(job = info.id, image = %active.target.image.display(), "the LUN has another image");
        }
        let (what, before) = match &outcome {
            Outcome::Ended(_) => {
                let left: &[JobStatus] = match info.status {
                    JobStatus::Pending => &[],
                    JobStatus::Waiting => &[JobStatus::Pending],
                    _ => &[JobStatus::Waiting, JobStatus::Pending],
                };
                (BlockJob::Completed(None), left.to_vec())
            }
            Outcome::Cancelled => {
                // As in QEMU, and so that nobody takes for whole what it leaves.
                info.error = Some(CANCELED.to_owned());
                (BlockJob::Cancelled, Vec::new())
            }
            Outcome::Failed(reason) => {
                error!(job = info.id, "the job could not go on: {reason}");
                info.error = Some(reason.clone());
                (BlockJob::Completed(Some(reason.clone())), Vec::new())
            }
        };
        if matches!(info.settings.task, Task::CommitBeneath { .. }) {
            Jobs::close_sides(active).await;
        } else if !info.settings.task.is_within() {
            self.leave_the_past(mirror).await;
            close(if pivoted { mirror.source() } else { mirror.target() }).await;
        }
        active.record.borrow().remove_scratch();
        self.place.remove();
        self.repaired.set(self.repaired.get() + mirror.repaired());
        self.active.replace(None);
        info.status = JobStatus::Concluded;
        (info.busy, info.ready) = (false, false);
        let id = || info.id.clone();
        before.into_iter().for_each(|status| self.events.tell(Event::Job { id: id(), status }));
        let progress = (info.offset, info.len, info.speed);
        self.events.tell(Event::BlockJob { id: id(), task: info.settings.task, what, progress });
        self.events.tell(Event::Job { id: id(), status: JobStatus::Concluded });
        info!(job = info.id, ?outcome, "the job is over");
        if info.settings.auto_dismiss {
            self.events.tell(Event::Job { id: id(), status: JobStatus::Null });
        } else {
            self.ended.borrow_mut().push(info);
        }
    }

    /// The LUN stops: a job begins nothing more.
    pub(super) fn halt(&self) {
        if let Some(active) = &*self.active.borrow() {
            active.mirror.halt();
        }
    }

    /// Whether a job copies something that it has begun.
    pub(super) fn is_copying(&self) -> bool {
        self.active.borrow().as_ref().is_some_and(|active| active.mirror.is_copying())
    }

    /// The LUN stops: closes what a job has open beside the LUN's own.
    pub(super) async fn close(&self) {
        let active = self.active.borrow().clone();
        if let Some(active) = active {
            Jobs::close_sides(&active).await;
            active.record.borrow().remove_scratch();
        }
    }

    /// The LUN has stopped, and its volumes are closed: what is under way goes on at the next start.
    pub(super) fn stop(&self) {
        let active = self.active.borrow().clone().filter(|active| !active.mirror.has_parted());
        let Some(active) = active else { return };
        if active.mirror.settings().task == Task::Handover {
            return self.place.remove();
        }
        let saved =
            self.save(&active).map_err(|e| e.to_string()).and_then(|()| match active.mirror.is_closed() {
                true => self.place.closed(&mut active.record.borrow_mut()).map_err(|e| e.to_string()),
                false => Ok(()),
            });
        if let Err(error) = saved {
            warn!(error, "the job cannot be written down as it is");
        }
    }
}

async fn close(stack: &Stack) {
    if let Err(error) = stack.close().await {
        warn!(image = %stack.image().path().display(), %error, "an image that a job has let go of could not be closed");
    }
}

impl Active {
    fn cancel(&self, force: bool) {
        self.mirror.cancel(force);
        let (source, target) = (self.mirror.source(), self.mirror.target());
        if self.mirror.status() == JobStatus::Aborting && !Rc::ptr_eq(source, target) {
            // What still waits for a server that is away holds up neither the end nor a guest.
            target.image().ending();
        }
    }

    fn info(&self) -> JobInfo {
        let (mirror, settings) = (&self.mirror, self.mirror.settings());
        let (offset, len) = mirror.progress();
        JobInfo {
            id: mirror.id().to_owned(),
            status: mirror.status(),
            offset,
            len,
            speed: settings.speed,
            ready: mirror.is_ready(),
            paused: settings.paused,
            busy: mirror.is_busy(),
            io_status: mirror.io_status(),
            settings,
            target: self.target.image.clone(),
            repaired: mirror.repaired(),
            error: None,
        }
    }
}
