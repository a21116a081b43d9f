//! What a LUN's loop serves: commands through the SCSI target over the stack, and messages from outside.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Instant,
};

use tracing::{error, info, warn};

use super::{
    LunError, LunParams, PublicStats, ScrubSummary, SharedMade, Stats, SystemCalls, bitmaps,
    config::DeviceConfig,
    continued::ContinuedFile,
    event_loop::{Load, Service},
    events::{Events, JobStatus},
    handed_over::HandedOver,
    inbox::{Message, Outbox},
    jobs::{self, Jobs},
    measured::Measures,
    moved::Moves,
    neighbours::{Calls, Membership, Return},
    recheck::Rechecker,
    saved_pages::{self, SavedPagesFile},
    scrub::{self, Scrub, ScrubStatus, Scrubber},
    stack::Stack,
    state_file::{NewerVersion, StateFile},
    throttle::{self, Cost, Throttle, limits::Limits},
    trace::Tracer,
    traffic,
};
use crate::{
    handover::state::DirtyBitmap,
    job::{bitmaps::KeptBitmap, front::Front},
    pi::{Counters, Exposure},
    ring::{Command, Completion, Once},
    scsi::{
        self, Status, Target, TargetConfig,
        continued::SETTLE,
        neighbour::{Answer, Errand, Undone},
    },
    sync::Notify,
    sys::{
        exec::{join, race},
        io::Io,
    },
    units::Lba,
    volume::Volume,
};

pub(super) struct Lun {
    target: Target<Rc<Front<Stack>>>,
    front: Rc<Front<Stack>>,
    jobs: Jobs,
    scrubber: Scrubber,
    rechecker: Rechecker,
    io: Io,
    counted: RefCell<PublicStats>,
    traffic: traffic::Counters,
    measures: Measures,
    tracer: Tracer,
    throttle: Throttle,
    /// What was set while the LUN was in use.
    limits_file: Option<StateFile>,
    /// The dirty bitmaps that no image keeps.
    bitmaps_file: Option<StateFile>,
    events: Rc<Events>,
    calls: Calls,
    /// The LUN has another image.
    moved: Notify,
    /// What protection had counted where it was before.
    inherited: Cell<Counters>,
}

impl Lun {
    pub(super) fn new(
        params: &LunParams,
        continued: Option<ContinuedFile>,
        (stack, job, (kept, left)): (Stack, Option<jobs::Resumed>, (Vec<KeptBitmap>, Vec<DirtyBitmap>)),
        io: &Io,
        own: Outbox,
        made: SharedMade,
    ) -> Lun {
        let serial = params.serial();
        let state = |folder| params.state_file(folder);
        let saved_pages = state(saved_pages::FOLDER).map(SavedPagesFile);
        let saved_pages = saved_pages.map(|file| Box::new(file) as Box<dyn scsi::SavedPages>);
        let files = stack.image().places().to_vec();
        let events = Rc::new(Events::default());
        let moves = params.state_dir.as_deref().map(|dir| Moves::of(dir, &params.name));
        let jobs = Jobs::new(job_place(params), moves, made, events.clone(), io);
        let capacity = stack.limits().capacity;
        let front = Rc::new(jobs.take_up(stack, job));
        front.bitmaps().replace_kept(capacity, kept);
        bitmaps::take_over(&front.volume(), front.bitmaps(), left);
        let scrubber = Scrubber::new(state(scrub::FOLDER), files, params.block_size.bytes(), events.clone());
        let limits_file = state(throttle::FOLDER);
        let bitmaps_file = state(bitmaps::FOLDER);
        let limits = limits_now(limits_file.as_ref(), params.config.limits);
        let told = events.clone();
        let calls = Calls::new(params.neighbourhood.clone(), params.config.copy_group.clone(), own, io);
        let config = TargetConfig {
            transfer: (params.config.exposure == Exposure::Initiator).then_some(params.config.transfer),
            saved_pages,
            read_only: params.config.read_only,
            write_cache: params.write_cache,
            keeper: continued.map(|file| Box::new(file) as Box<dyn scsi::continued::Keeper>),
            on_failure: Some(Box::new(move |error| told.failed(error))),
            neighbours: Some(Rc::new(calls.clone())),
            ..TargetConfig::new(params.block_size, &serial)
        };
        let target = Target::new(config, front.clone());
        Lun {
            target,
            front,
            jobs,
            scrubber,
            rechecker: Rechecker::default(),
            io: io.clone(),
            counted: RefCell::default(),
            traffic: Default::default(),
            measures: Measures::default(),
            tracer: Tracer::default(),
            throttle: Throttle::new(limits),
            limits_file,
            bitmaps_file,
            events,
            calls,
            moved: Notify::new(),
            inherited: Cell::default(),
        }
    }

    /// Lets the others of its copy group find it, until what is given is dropped.
    pub(super) fn join_neighbours(&self) -> Option<Membership> {
        self.calls.join(self.target.designators())
    }

    /// Begins. Where another daemon served it before and its initiators have not noticed (`resumed`), it is as that has left it; what cannot
    /// be known any more they are told with a power on, which is what it comes to for them.
    /// The same of one that another host has handed over, whose initiators have not noticed either.
    pub(super) fn takes_up(
        &self,
        resumed: bool,
        continued: Option<&ContinuedFile>,
        handed_over: Option<(HandedOver, StateFile)>,
    ) {
        if let Some((mut found, file)) = handed_over {
            self.inherited.set(found.counters.unwrap_or_default());
            bitmaps::take_over(
                &self.front.volume(),
                self.front.bitmaps(),
                std::mem::take(&mut found.bitmaps),
            );
            // From here on it is kept as everything is.
            match found.continued().filter(|_| !resumed) {
                Some(kept) => self.target.goes_on(Some(&kept)),
                None => self.goes_on(resumed, continued),
            }
            if let Err(error) = file.remove() {
                warn!(path = %file.path().display(), %error, "what the LUN was handed over with stays there, and is of no use any more");
            }
            return;
        }
        self.goes_on(resumed, continued);
    }

    fn goes_on(&self, resumed: bool, continued: Option<&ContinuedFile>) {
        match continued.filter(|_| resumed).map_or(Ok(None), ContinuedFile::load) {
            Ok(kept) if resumed => self.target.goes_on(kept.as_ref()),
            Ok(_) => self.target.begins(),
            Err(error) => {
                warn!(%error, "what initiators had set is not known: saved mode pages hold, and they are told of a reset");
                self.target.begins();
            }
        }
    }

    /// Everything is answered, and the loop is over.
    pub(super) fn has_answered(&self) {
        self.target.forget_given(true);
    }

    pub(super) fn front(&self) -> &Rc<Front<Stack>> {
        &self.front
    }

    /// Stores the dirty bitmaps that the image keeps, which is closed next.
    pub(super) async fn keep_bitmaps(&self) {
        let volume = self.front.volume();
        bitmaps::store_or_tell(&volume, &self.front.bitmaps().to_keep()).await;
    }

    /// Keeps those that it does not, for the next start. It has been closed.
    pub(super) fn leave_bitmaps(&self) {
        if let Some(file) = &self.bitmaps_file {
            bitmaps::leave(file, &self.front.volume(), self.front.bitmaps());
        }
    }

    /// What goes on at the next start.
    pub(super) fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// What is kept for the next start, if the daemon is told to stop.
    pub(super) fn scrubber(&self) -> &Scrubber {
        &self.scrubber
    }

    pub(super) fn stats(&self, load: Load) -> Stats {
        let stack = self.front.volume();
        let all = |below: Counters| Counters {
            repaired: self.jobs.repaired(),
            unchecked: below.unchecked,
            ..below.plus(self.target.pi_counters()).plus(self.inherited.get())
        };
        Stats {
            commands: load.commands,
            aborted: load.aborted,
            batches: load.batches,
            sleeps: load.sleeps,
            polled_us: u64::try_from(load.polled.as_micros()).unwrap_or(u64::MAX),
            calls: SystemCalls {
                enters: self.io.calls().enters,
                kicks: load.ring.kicks,
                reads: load.ring.reads,
                operations: self.io.calls().operations,
            },
            in_flight: load.in_flight as u64,
            io: self.io.backend().to_string(),
            format: stack.image().format().to_string(),
            capacity_bytes: stack.limits().capacity,
            write_cache: self.target.write_cache(),
            counted: self.counted.borrow().clone(),
            traffic: self.traffic.get(),
            throttle: Some(self.throttle.get()).filter(|t| *t != throttle::Throttled::default()),
            moved_by_kernel: Some(self.target.moved_by_kernel()).filter(|bytes| *bytes > 0),
            measured: self.measures.get(),
            formatted_with: stack.protection(),
            scrub: self.scrubber.last().map(ScrubSummary::from),
            jobs: self.jobs.all(),
            bitmaps: self.front.bitmaps().infos(),
            caches: stack.image().caches(),
            tuple_cache: stack.tuple_cache(),
            pi: stack.pi_counters().map(all),
        }
    }

    /// Where the scrub brings back from what it finds.
    fn spare(&self) -> impl AsyncFn(u64) -> bool {
        async |lba| {
            let Some(mirror) = self.front.mirror() else { return false };
            let size = self.target.block_size().bytes();
            mirror.mend(lba * size, size).await
        }
    }

    /// The LUN has another image, or is about to: whoever looks at the image looks again.
    fn has_moved(&self) {
        self.target.capacity_changed();
        self.scrubber.set_files(self.front.volume().image().places().to_vec());
        self.moved.notify_all();
    }

    async fn resize(&self, capacity: u64) -> Result<(), LunError> {
        if capacity == 0 || !capacity.is_multiple_of(self.target.block_size().bytes()) {
            let block_size = self.target.block_size();
            return Err(LunError::Size { capacity, block_size });
        }
        self.front.resize(capacity).await?;
        self.target.capacity_changed();
        info!(capacity, "resized");
        Ok(())
    }

    /// Other limits from now on; told whether they will be known after a restart.
    fn limit(&self, limits: Limits) -> std::io::Result<()> {
        self.throttle.set(limits, Instant::now());
        info!(%limits, "limits");
        self.limits_file.as_ref().map_or(Ok(()), |file| file.save(limits, false))
    }

    /// Lends blocks to another LUN, and holds them until they are given back. At the end of this LUN they are taken back, given or not.
    async fn lend(&self, (lba, blocks): (Lba, u64), back: Return) {
        let mut back = Some(back);
        let lent = self.target.lend(lba, blocks, async |loan| match (loan, back.take()) {
            (Some(loan), Some(back)) => {
                let hand = |home| back.give(Ok(Answer::Lent(Some(loan.with_way_back(home)))));
                self.calls.until_dropped(hand).await;
            }
            (None, Some(back)) => back.give(Ok(Answer::Lent(None))),
            (_, None) => {}
        });
        let lent = lent.await;
        if let (Err(failure), Some(back)) = (lent, back) {
            back.give(Err(Undone::Failed(failure)));
        }
    }

    /// Write-back to write-through: what was acknowledged before is flushed too.
    async fn set_write_cache(&self, on: bool) -> Result<(), LunError> {
        self.target.set_write_cache(on);
        if !on {
            self.front.flush().await?;
        }
        info!(on, "write cache");
        Ok(())
    }
}

/// Where the job of a LUN is kept.
pub(super) fn job_place(params: &LunParams) -> jobs::Place {
    jobs::Place::new(params.state_file(jobs::FOLDER))
}

/// What was set while the LUN was in use, or else what it was created with.
fn limits_now(file: Option<&StateFile>, configured: Limits) -> Limits {
    let saved = file.map_or(Ok(None), StateFile::load::<Limits>).unwrap_or_else(|error| {
        let next = NewerVersion::of(&error).map(NewerVersion::next_step);
        warn!(%error, next, "the limits that were set last cannot be read; those that it was created with hold");
        None
    });
    let limits = saved.unwrap_or(configured);
    if !limits.is_none() {
        info!(%limits, "limits");
    }
    limits
}

/// A LUN's serial number: the kernel's, or the configuration's, or one that is made of the name, so that it is the same at
/// every start.
pub fn serial_of(kernels: Option<&str>, config: &DeviceConfig, name: &str) -> String {
    let set = kernels.filter(|s| !s.is_empty()).or(config.serial.as_deref());
    set.map_or_else(|| format!("{:016x}", scsi::naa_from_serial(name)), str::to_owned)
}

/// The ring's memory of a command, as SCSI wants it.
#[derive(Debug)]
struct OnlyOnce(Once);

impl scsi::Once for OnlyOnce {
    fn is_marked(&self) -> bool {
        self.0.is_marked()
    }

    fn mark(&self) {
        self.0.mark();
    }
}

impl Service for Lun {
    async fn execute(&self, command: &Command, taken: Instant) -> Completion {
        #[cfg(feature = "fault-points")]
        super::fault_points::meet(&command.cdb);
        let room = command.data.len();
        let kept = self.tracer.keep(&command.cdb);
        let only_once = matches!(
            command.cdb.first(),
            Some(&(scsi::opcodes::COMPARE_AND_WRITE | scsi::opcodes::EXTENDED_COPY))
        );
        let once = command.once.as_ref().filter(|_| only_once).cloned();
        let once = once.map(|once| Rc::new(OnlyOnce(once)) as Rc<dyn scsi::Once>);
        let (cdb, data, dif) = (&command.cdb[..], &command.data, &command.dif);
        let response = self.target.execute(&scsi::Command { cdb, data, dif, once }).await;
        self.traffic.count(&response, room);
        self.measures.ended(&response, taken);
        if let Some(cdb) = &kept {
            self.tracer.tell(cdb, &response, taken.elapsed());
        }
        let mut counted = self.counted.borrow_mut();
        match response.status {
            Status::Good if response.data_in > 0 => counted.bytes_in += response.data_in as u64,
            Status::Good => counted.bytes_out += room as u64,
            Status::CheckCondition => counted.check_conditions += 1,
            _ => counted.other_statuses += 1,
        }
        if response.sense.is_some() {
            return Completion::check_condition(&response.sense_bytes());
        }
        let mut completion = Completion::status(response.status as u8);
        if response.gives_data && response.data_in < room {
            completion.read_len = Some(response.data_in as u32);
        }
        completion
    }

    fn answering(&self) {
        self.measures.settle(Instant::now());
    }

    fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    fn cost(&self, command: &Command) -> Option<Cost> {
        let (writes, blocks) = scsi::moved_by(&command.cdb)?;
        let bytes = blocks.0.saturating_mul(self.target.block_size().bytes());
        // What is beyond the LUN is refused; it is not to be paid for first.
        Some(Cost { writes, bytes: bytes.min(self.front.limits().capacity) })
    }

    async fn background(self: Rc<Self>) {
        let scrubs = async {
            loop {
                let moved = self.moved.wait();
                // Who changes the image for another closes the old one, and has to be alone with it.
                self.front.passable().await;
                let stack = self.front.volume();
                let Some(protected) = stack.protected() else {
                    drop(stack);
                    return std::future::pending().await;
                };
                // A step that is cut off is made again on what the LUN has then.
                race(self.scrubber.run(protected, &self.io, self.spare()), moved).await;
            }
        };
        let rechecks = async {
            loop {
                let mut moved = std::pin::pin!(self.moved.wait());
                self.front.passable().await;
                let stack = self.front.volume();
                if let Some(protected) = stack.protected() {
                    self.rechecker.run(protected, &self.io, moved.as_mut()).await;
                }
                drop(stack);
                moved.await;
            }
        };
        let attentions = async {
            loop {
                let gave = self.target.gave_attention();
                if !self.target.has_given() {
                    gave.await;
                }
                self.io.sleep(SETTLE).await;
                self.target.forget_given(false);
            }
        };
        let jobs = self.jobs.run(&self.front, || self.has_moved());
        let rest = join(join(self.calls.watch_the_end(), attentions), jobs);
        join(join(self.target.background(), scrubs), join(rechecks, rest)).await;
    }

    async fn message(self: Rc<Self>, message: Message, load: Load) {
        // Whoever asked may have stopped waiting; then nobody is to be told.
        match message {
            Message::Resize(capacity, back) => {
                let result = self.resize(capacity).await;
                if let Err(e) = &result {
                    error!(capacity, "resize failed: {e}");
                }
                let _ = back.send(result);
            }
            Message::WriteCache(on, back) => drop(back.send(self.set_write_cache(on).await)),
            Message::Scrub(order, back) => {
                let blocks = self.front.volume().protected().map(|p| p.blocks_now().0);
                drop(back.send(self.scrubber.order(order, blocks)));
            }
            Message::Job(order, back) => {
                let block_size = self.target.block_size();
                let done = self.jobs.order(&self.front, block_size, order, || self.has_moved()).await;
                drop(back.send(done));
            }
            Message::Limit(limits, back) => drop(back.send(self.limit(limits))),
            Message::Stats(back) => drop(back.send(self.stats(load))),
            Message::Trace(watching, back) => {
                self.tracer.add(watching);
                let _ = back.send(());
            }
            Message::Describe(back) => drop(back.send(self.front.volume().image().describe())),
            Message::Watch(watcher) => {
                self.events.watch(watcher);
                self.jobs.introduce();
                // A job that goes on after a restart is new to whoever watches.
                match self.scrubber.last().filter(Scrub::is_under_way).map(|s| s.status) {
                    Some(ScrubStatus::Paused) => {
                        self.events.scrub(&[JobStatus::Created, JobStatus::Running, JobStatus::Paused]);
                    }
                    Some(_) => self.events.scrub(&[JobStatus::Created, JobStatus::Running]),
                    None => {}
                }
            }
            Message::Errand(Errand::Lend { lba, blocks }, back) => {
                Box::pin(self.lend((lba, blocks), back)).await;
            }
            Message::Errand(errand, back) => {
                back.give(self.target.run_errand(errand).await.map_err(Undone::Failed));
            }
            Message::Order(errand, back) => {
                drop(back.send(self.target.run_errand(errand).await.map_err(Undone::Failed)));
            }
            Message::Expose(order, back) => {
                let shown = self.jobs.expose(&self.front, order).await;
                if let Err(unheard) = back.send(shown)
                    && let Ok(shown) = unheard.0
                {
                    self.jobs.cover(&self.front, shown).await;
                }
            }
            Message::Cover(shown) => self.jobs.cover(&self.front, shown).await,
            Message::AskExposed(ask, back) => {
                let block_size = self.target.block_size();
                drop(back.send(self.jobs.ask_exposed(&self.front, block_size, ask).await));
            }
            Message::Answered(ticket, outcome) => self.calls.answered(ticket, outcome),
            Message::Stop | Message::Ping => {}
        }
    }

    async fn parting(self: Rc<Self>) {
        // Closing the image flushes again, and is the one to say what failed.
        let (image, mirror) = (self.front.volume(), self.front.mirror());
        let _ = image.flush().await;
        if let Some(mirror) = mirror {
            let _ = mirror.target().flush().await;
        }
    }

    fn ending(&self) {
        self.calls.end_soon();
        self.front.volume().image().ending();
        if let Some(mirror) = self.front.mirror() {
            mirror.target().image().ending();
        }
    }

    fn is_changing(&self) -> bool {
        self.front.is_closed() || self.rechecker.is_at_work() || self.jobs.is_copying()
    }

    fn ended(&self) {
        self.calls.hang_up();
        self.rechecker.end();
        self.jobs.halt();
    }
}
