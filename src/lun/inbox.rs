//! Messages from outside to a LUN's thread: a queue, a flag that costs the thread one load to look at, and an eventfd that
//! wakes it.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};

use super::{
    LunError, Stats,
    events::Watcher,
    jobs::{
        Expose, JobError, JobInfo, JobOrder,
        exposed::{Ask, Shown, Told},
    },
    neighbours::{self, Return},
    scrub::{Scrub, ScrubError, ScrubOrder},
    throttle::limits::Limits,
    trace::Watching,
};
use crate::{image::ImageInfo, scsi::neighbour::Errand};

/// What a LUN's thread can be asked. Each message carries the way back.
#[derive(Debug)]
pub(super) enum Message {
    /// Change the capacity to that many bytes.
    Resize(u64, SyncSender<Result<(), LunError>>),
    /// Turn the write cache on or off.
    WriteCache(bool, SyncSender<Result<(), LunError>>),
    /// Begin, pause, end … a scrub, or tell of it.
    Scrub(ScrubOrder, SyncSender<Result<Option<Scrub>, ScrubError>>),
    /// Lead block jobs, or tell of them.
    Job(JobOrder, SyncSender<Result<Vec<JobInfo>, JobError>>),
    /// Limit commands so from now on, and after a restart.
    Limit(Limits, SyncSender<io::Result<()>>),
    /// Tell the counters.
    Stats(SyncSender<Stats>),
    /// Tell of the image and its backing files.
    Describe(SyncSender<Vec<ImageInfo>>),
    /// Tell that one what happens, from now on.
    Watch(Watcher),
    /// Tell that one of every command that passes.
    Trace(Watching, SyncSender<()>),
    /// Do something for a copy that another LUN executes.
    Errand(Errand, Return),
    /// Do something for somebody outside who waits for it.
    Order(Errand, SyncSender<neighbours::Outcome>),
    /// An export begins, and is to show this.
    Expose(Expose, SyncSender<Result<Shown, JobError>>),
    /// The export that showed this has ended.
    Cover(Shown),
    /// What a client of an export asks of what it shows.
    AskExposed(Ask, SyncSender<Result<Told, JobError>>),
    /// Another LUN's answer to the errand of that number.
    Answered(u64, neighbours::Outcome),
    /// Show that the loop turns: [`Pulse`].
    Ping,
    /// Take no more commands, finish those under way, close the image and end.
    Stop,
}

/// Messages that the thread has not taken yet.
#[derive(Debug, Default)]
struct Unread {
    queue: VecDeque<Message>,
    /// When the first of them was sent.
    since: Option<Instant>,
}

#[derive(Debug)]
struct Shared {
    messages: Mutex<Unread>,
    waiting: AtomicBool,
    event: OwnedFd,
    /// A [`Pulse`] has asked, and the loop has not answered yet.
    asked: AtomicBool,
    /// The loop is over, and answers nobody any more. Set with the messages locked: none is added afterwards.
    ended: AtomicBool,
}

impl Shared {
    fn send(&self, message: Message) {
        {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            if self.ended.load(Ordering::Acquire) {
                // Dropped without the lock: its way back may send.
                drop(messages);
                return drop(message);
            }
            messages.queue.push_back(message);
            messages.since.get_or_insert_with(Instant::now);
        }
        self.waiting.store(true, Ordering::Release);
        // EAGAIN would mean 2^64 wake-ups that nobody has read: it is awake.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// The sending end; clones send to the same thread.
#[derive(Clone, Debug)]
pub(super) struct Outbox(Arc<Shared>);

/// The LUN's end.
pub(super) struct Inbox(Arc<Shared>);

pub(super) fn channel() -> io::Result<(Outbox, Inbox)> {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let shared = Arc::new(Shared {
        messages: Mutex::default(),
        waiting: AtomicBool::new(false),
        event,
        asked: AtomicBool::new(false),
        ended: AtomicBool::new(false),
    });
    Ok((Outbox(shared.clone()), Inbox(shared)))
}

impl Outbox {
    pub(super) fn send(&self, message: Message) {
        self.0.send(message);
    }

    /// How long the thread has left a message lying; a loop that turns takes each at once, however slow its storage is.
    pub(super) fn silent_for(&self) -> Duration {
        let messages = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    pub(super) fn pulse(&self) -> Pulse {
        Pulse(self.0.clone())
    }
}

/// Whether a LUN's event loop turns. It neither waits nor keeps the LUN alive; clones feel the same loop. A loop whose
/// storage is slow turns all the same: what is found here is a thread that hangs.
#[derive(Clone, Debug)]
pub struct Pulse(Arc<Shared>);

impl Pulse {
    /// Asks the loop for a sign of life, and wakes it for that; does nothing while one is still owed.
    pub fn ask(&self) {
        if !self.0.asked.swap(true, Ordering::AcqRel) {
            self.0.send(Message::Ping);
        }
    }

    /// Whether both feel the same loop.
    pub fn is_same(&self, other: &Pulse) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether the loop owes none: it has answered, was never asked, or is over.
    pub fn is_answered(&self) -> bool {
        !self.0.asked.load(Ordering::Acquire) || self.0.ended.load(Ordering::Acquire)
    }
}

#[cfg(test)]
impl Pulse {
    /// One that no loop answers, but [`Pulse::answer`] does.
    pub fn of_nobody() -> Pulse {
        let (outbox, inbox) = channel().unwrap();
        // Its end would count as an answer.
        std::mem::forget(inbox);
        outbox.pulse()
    }

    /// Answers in the loop's place.
    pub fn answer(&self) {
        self.0.asked.store(false, Ordering::Release);
    }
}

impl Inbox {
    /// A way to send to itself.
    pub(super) fn outbox(&self) -> Outbox {
        Outbox(self.0.clone())
    }

    pub(super) fn doorbell(&self) -> io::Result<OwnedFd> {
        self.0.event.try_clone()
    }

    /// Empties the doorbell, so that it can ring again.
    pub(super) fn acknowledge(&self) {
        let _ = rustix::io::read(&self.0.event, &mut [0u8; 8]);
    }

    pub(super) fn has_messages(&self) -> bool {
        self.0.waiting.load(Ordering::Acquire)
    }

    pub(super) fn take(&self) -> VecDeque<Message> {
        self.0.waiting.store(false, Ordering::Release);
        std::mem::take(&mut *self.0.messages.lock().unwrap_or_else(PoisonError::into_inner)).queue
    }

    /// Answers a [`Message::Ping`].
    pub(super) fn pong(&self) {
        self.0.asked.store(false, Ordering::Release);
    }

    /// The loop is over: what is there and what comes now has no answer, and those who wait for one notice.
    pub(super) fn end(&self) {
        let left = {
            let mut messages = self.0.messages.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.ended.store(true, Ordering::Release);
            std::mem::take(&mut *messages)
        };
        drop(left);
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.end();
    }
}
