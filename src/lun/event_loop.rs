//! The loop of a LUN's thread: entries in, tasks on, completions out. The one place where the thread sleeps is `Io::turn`.
//!
//! A turn takes what the ring holds, runs every task that can go on, publishes the answers with one kick, and submits the
//! I/O that the tasks asked for with one system call. When all is dry it spins for as long as that has been worth it, and
//! sleeps. What a command means is the service's business: the loop knows no SCSI.

use std::{
    cell::Cell,
    collections::VecDeque,
    io,
    rc::Rc,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    inbox::{Inbox, Message},
    spin::Spinner,
    throttle::{Cost, Rows, Throttle},
};
use crate::{
    ring::{self, Command, Completion, Entry, Reply, Ring, RingError, reply::TASK_ABORTED},
    sys::{
        exec::Executor,
        io::{Io, Wait},
        pool::Pooled,
    },
};

/// Commands that run at once; more wait their turn, and task management can still take them back.
const MAX_RUNNING: usize = 256 + BACKGROUND;

/// Tasks that are there without a command: [`Service::background`].
const BACKGROUND: usize = 1;

/// How long a loop that was told to stop goes on serving while the volume is flushed. What is on the disk by then need not be waited for by
/// initiators once nothing is answered any more; storage that takes longer is flushed when the image is closed, as it always is.
const PARTING: Duration = Duration::from_secs(2);

/// Commands after which the doorbell is read, if that is not needed otherwise: UIO counts its events in 32 bits, and one that is read
/// seldom could look as if nothing had happened.
const SELDOM: u64 = 1 << 10;
/// The same for a loop that never sleeps.
const VERY_SELDOM: u64 = 1 << 24;

/// Why a loop ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoopError {
    #[error("the device is faulted")]
    Ring(#[from] RingError),
    #[error("the I/O backend failed")]
    Io(#[from] io::Error),
}

/// What serves the commands and messages of a loop.
pub(super) trait Service: 'static {
    /// Executes one command to its end, which was taken out of the ring at that moment.
    fn execute(&self, command: &Command, taken: Instant) -> impl Future<Output = Completion>;
    /// The answers that there are go out now.
    fn answering(&self) {}
    /// The limits of the commands.
    fn throttle(&self) -> &Throttle;
    /// What a command counts for; nothing for one that is not limited.
    fn cost(&self, command: &Command) -> Option<Cost>;
    /// What runs beside the commands for as long as the loop does.
    fn background(self: Rc<Self>) -> impl Future<Output = ()> + 'static;
    /// Handles a message other than [`Message::Stop`] and [`Message::Ping`], which are the loop's own.
    fn message(self: Rc<Self>, message: Message, load: Load) -> impl Future<Output = ()> + 'static;
    /// The loop was told to stop, and goes on serving until this is over, but not for long.
    fn parting(self: Rc<Self>) -> impl Future<Output = ()> + 'static {
        async {}
    }
    /// The loop takes no more commands, and ends as soon as nothing runs.
    fn ending(&self) {}
    /// Something is under way in the background that is not to be cut off.
    fn is_changing(&self) -> bool {
        false
    }
    /// No message arrives any more; what runs is waited for.
    fn ended(&self) {}
}

/// What the loop knows about its load.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Load {
    pub(super) commands: u64,
    pub(super) aborted: u64,
    pub(super) batches: u64,
    pub(super) sleeps: u64,
    pub(super) in_flight: usize,
    pub(super) polled: Duration,
    pub(super) ring: ring::Calls,
}

/// A loop that was told to stop.
struct Parting {
    /// The service has done what it does before.
    done: Rc<Cell<bool>>,
    /// When the loop waits for that no longer.
    until: Instant,
}

impl Parting {
    fn is_over(&self) -> bool {
        self.done.get() || Instant::now() >= self.until
    }
}

/// A command, the way to answer it, and when it was taken.
type Taken = (Pooled<Command>, Reply, Instant);

pub(super) struct EventLoop<S> {
    ring: Ring,
    io: Io,
    exec: Executor,
    service: Rc<S>,
    inbox: Inbox,
    /// Those that have to wait for the limits before they may start.
    held: Rows<Taken>,
    waiting: VecDeque<Taken>,
    load: Load,
    spinner: Spinner,
    /// The same for the I/O of a command that is alone.
    io_spinner: Spinner,
    parting: Option<Parting>,
    /// Commands when the doorbell was last read.
    read_at: u64,
}

impl<S: Service> EventLoop<S> {
    pub(super) fn new(
        ring: Ring,
        io: Io,
        exec: Executor,
        service: Rc<S>,
        inbox: Inbox,
        polling: bool,
    ) -> EventLoop<S> {
        EventLoop {
            ring,
            io,
            exec,
            service,
            inbox,
            held: Rows::new(),
            waiting: VecDeque::new(),
            load: Load::default(),
            spinner: Spinner::new(polling),
            io_spinner: Spinner::new(polling),
            parting: None,
            read_at: 0,
        }
    }

    /// Runs until it is told to stop (with everything answered) or the ring is broken (and left alone).
    pub(super) fn run(mut self) -> Result<(), LoopError> {
        let result = self.serve();
        self.inbox.end();
        self.service.ended();
        if result.is_err() {
            self.ring.close();
            self.held.take_if(|_| true);
            self.waiting.clear();
        }
        // What is under way reaches the image, answered or not.
        while (self.exec.tasks() > BACKGROUND || self.service.is_changing())
            && self.io.turn(Wait::AtMost(Duration::from_millis(100))).is_ok()
        {
            self.exec.run_ready();
        }
        self.service.answering();
        self.ring.publish()?;
        self.exec.clear();
        result
    }

    fn serve(&mut self) -> Result<(), LoopError> {
        let ring_bell = self.io.watch(self.ring.doorbell()?)?;
        let inbox_bell = self.io.watch(self.inbox.doorbell()?)?;
        let mut stopping = false;
        self.exec.spawn(self.service.clone().background());
        loop {
            if self.inbox.has_messages() {
                self.messages();
            }
            if !stopping && self.has_parted() {
                stopping = true;
                self.service.ending();
            }
            if !stopping {
                self.take()?;
            }
            if !self.held.is_empty() {
                self.release(stopping);
            }
            self.start_waiting();
            self.exec.run_ready();
            if self.ring.has_answers() {
                self.load.batches += 1;
                self.service.answering();
                self.ring.publish()?;
                if self.load.commands - self.read_at >= VERY_SELDOM {
                    self.acknowledge();
                }
            }
            self.io.turn(Wait::No)?;
            // Looked at after the turn, which may have swallowed the doorbells of both.
            let more = self.inbox.has_messages() || !stopping && self.can_take() && self.ring.has_entries();
            let startable = !self.waiting.is_empty() && self.exec.tasks() < MAX_RUNNING;
            let passable = self.held.may_go(self.service.throttle());
            let parted = !stopping && self.has_parted();
            if self.exec.has_ready() || more || startable || passable || parted || self.ring.has_answers() {
                continue;
            }
            if stopping && self.exec.tasks() <= BACKGROUND && self.waiting.is_empty() {
                return Ok(());
            }
            if !self.dry(stopping)? {
                continue;
            }
            let seldom = self.load.commands - self.read_at >= SELDOM;
            if ring_bell.take_ready() && (ring_bell.has_to_be_emptied() || seldom) {
                self.acknowledge();
            }
            if inbox_bell.take_ready() && inbox_bell.has_to_be_emptied() {
                self.inbox.acknowledge();
            }
        }
    }

    fn acknowledge(&mut self) {
        self.ring.acknowledge();
        self.read_at = self.load.commands;
    }

    /// Nothing to run: spins, then sleeps. False if spinning found work.
    fn dry(&mut self, stopping: bool) -> io::Result<bool> {
        let busy = self.io.in_flight() > 0;
        // Where several commands are under way, what one of them waits for is the others' time to run.
        let alone = !busy || self.ring.unanswered() == 1 && !self.io.is_fenced_off();
        let (ring, inbox, io) = (&self.ring, &self.inbox, &self.io);
        let spinner = if busy { &mut self.io_spinner } else { &mut self.spinner };
        let looks = || ring.has_entries() || inbox.has_messages() || busy && io.has_results();
        let found = !stopping && alone && spinner.spin(looks);
        if !found {
            spinner.sleeps();
            self.sleep(stopping)?;
        }
        if busy && alone {
            self.io_spinner.worked(Instant::now());
        }
        Ok(!found)
    }

    /// Waits for whatever comes first.
    fn sleep(&mut self, stopping: bool) -> io::Result<()> {
        self.load.sleeps += 1;
        let parting = self.parting.as_ref().filter(|_| !stopping).map(|parting| parting.until);
        let wait = match self.held.due().into_iter().chain(parting).min() {
            Some(due) => Wait::AtMost(due.saturating_duration_since(Instant::now())),
            None => Wait::Event,
        };
        self.io.turn(wait)
    }

    /// It was told to stop, and has served for as long as it was to.
    fn has_parted(&self) -> bool {
        self.parting.as_ref().is_some_and(Parting::is_over)
    }

    fn can_take(&self) -> bool {
        // Everything that is in the ring is taken, so that a task management request behind it is seen.
        self.waiting.len() + self.held.len() < 65536
    }

    fn take(&mut self) -> Result<(), RingError> {
        // Read once for all that stands in the ring.
        let mut now = None;
        while self.can_take() {
            let Some((entry, reply)) = self.ring.take_entry()? else { break };
            let now = *now.get_or_insert_with(|| {
                let now = Instant::now();
                self.spinner.worked(now);
                now
            });
            match (entry, reply) {
                (Entry::Command(command), Some(reply)) => {
                    self.load.commands += 1;
                    let limited = self.service.throttle().is_on();
                    match limited.then(|| self.service.cost(&command)).flatten() {
                        None => self.waiting.push_back((command, reply, now)),
                        Some(cost) => self.held.push(cost, (command, reply, now), now),
                    }
                }
                (Entry::Tmr(tmr), _) => self.abort(&tmr.ids, tmr.kind),
                (Entry::Unknown { id, op }, Some(reply)) => {
                    warn!(id, op, "an entry of the ring has an operation that is not known");
                    reply.answer(Completion::unknown_op());
                }
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Lets those start whose limits have room; all of them, if the loop stops: to wait here would hold up the stop, and the
    /// next handler would not know how long they have waited.
    fn release(&mut self, stopping: bool) {
        let waiting = &mut self.waiting;
        let go = |taken| waiting.push_back(taken);
        self.held.release(self.service.throttle(), stopping, Instant::now(), go);
    }

    fn start_waiting(&mut self) {
        // Begun now they would wait in the I/O, where nobody takes them back.
        if !self.waiting.is_empty() && self.io.is_fenced_off() {
            return;
        }
        while self.exec.tasks() < MAX_RUNNING {
            let Some((command, reply, taken)) = self.waiting.pop_front() else { return };
            let service = self.service.clone();
            // At once: one that waits for nothing has ended then, and its memory serves the next.
            self.exec.start(move || async move { reply.answer(service.execute(&command, taken).await) });
        }
    }

    /// Ends those of the commands that have not started. The others run to their end: half of them may be done.
    fn abort(&mut self, ids: &[u16], kind: u8) {
        let held = self.held.take_if(|(command, ..)| ids.contains(&command.id));
        let mut aborted = held.len();
        held.into_iter().for_each(|(_, reply, _)| reply.answer(Completion::status(TASK_ABORTED)));
        for (command, reply, taken) in std::mem::take(&mut self.waiting) {
            if ids.contains(&command.id) {
                reply.answer(Completion::status(TASK_ABORTED));
                aborted += 1;
            } else {
                self.waiting.push_back((command, reply, taken));
            }
        }
        self.load.aborted += aborted as u64;
        debug!(kind, commands = ids.len(), aborted, "task management request");
    }

    /// Hands messages on.
    fn messages(&mut self) {
        for message in self.inbox.take() {
            match message {
                Message::Stop if self.parting.is_none() => {
                    let done = Rc::new(Cell::new(false));
                    let until = Instant::now() + PARTING;
                    self.parting = Some(Parting { done: done.clone(), until });
                    let parting = self.service.clone().parting();
                    self.exec.spawn(async move {
                        parting.await;
                        done.set(true);
                    });
                }
                Message::Stop => {}
                Message::Ping => self.inbox.pong(),
                other => {
                    let load = Load {
                        in_flight: self.ring.unanswered(),
                        polled: self.spinner.spun() + self.io_spinner.spun(),
                        ring: self.ring.calls(),
                        ..self.load
                    };
                    // At once, while the load is what it says.
                    let service = self.service.clone();
                    self.exec.start(move || service.message(other, load));
                }
            }
        }
    }
}

/// Runs one future to its end outside the loop: opening before it, closing after it.
pub(super) fn run_to_end<T: 'static>(
    io: &Io,
    exec: &Executor,
    limit: Option<Duration>,
    task: impl Future<Output = T> + 'static,
) -> io::Result<T> {
    let out = Rc::new(std::cell::RefCell::new(None));
    let slot = out.clone();
    exec.spawn(async move {
        let value = task.await;
        *slot.borrow_mut() = Some(value);
    });
    let until = limit.map(|l| Instant::now() + l);
    loop {
        exec.run_ready();
        if let Some(value) = out.borrow_mut().take() {
            return Ok(value);
        }
        if until.is_some_and(|u| Instant::now() >= u) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let wait = match (exec.has_ready(), until) {
            (true, _) => Wait::No,
            (false, Some(u)) => Wait::AtMost(u.saturating_duration_since(Instant::now())),
            (false, None) => Wait::Event,
        };
        io.turn(wait)?;
    }
}
