//! The conversation with a server, over however many connections it takes: commands in, answers out, and both kept across the
//! server's absence.
//!
//! There is no task that runs it. Everybody who waits for an answer drives the conversation ([`driver`](super::driver)) meanwhile: each poll of a command polls
//! it, with that command's waker, and who leaves wakes another to take over. Nobody waits, nothing runs; what the sockets hold by then is looked at
//! with the next command.
//!
//! **What is promised.** A command that got no answer is given again to the server that comes back; a write that got one is kept
//! ([`Retained`]) until a flush has covered it, and is written again before anything else, since nothing tells a server that was away from
//! one that lost power. So no acknowledged write is lost with a server, and no flush is acknowledged that does not hold. If the server will not
//! take such a write again, or is not the same export any more, or a flush fails, the conversation is over: every command fails from then on.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    path::PathBuf,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use slab::Slab;

use super::{
    driver,
    link::{Link, LinkError, Terms},
    retained::Retained,
};
use crate::{
    nbd::{
        command, error,
        reply::{Asked, Extent, Pending},
        request::{LEN, Request},
        uri::Uri,
    },
    sync::AsyncMutex,
    sys::{io::Io, mem::Buffer, mem::Sg},
};

/// How long a LUN that ends waits for a server that is away.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Requests that go out with one system call at most.
const BATCH: usize = 16;

/// A command for the server.
#[derive(Debug, Clone)]
pub(super) struct Call {
    /// Of [`command`].
    pub kind: u16,
    /// Of [`command`].
    pub flags: u16,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
    /// The data of a write, or where those of a read go.
    pub sg: Sg,
}

/// Why a command has failed.
#[derive(Debug, Clone)]
pub(super) enum CallError {
    /// The server says so: the number, and its words.
    Server(u32, String),
    /// The server is away, and was waited for long enough.
    Away(String),
    /// The conversation is over.
    Failed(String),
}

pub(super) type Answer = Result<Vec<Extent>, CallError>;

/// A command under way.
pub(super) struct Slot {
    call: Call,
    /// Its own among all that ever were.
    number: u64,
    /// The connection that it went out on, what was heard of it since, and when it went.
    sent: Option<(usize, Pending, Instant)>,
    answer: Option<Answer>,
    waker: Option<Waker>,
    /// Nobody waits for it any more.
    abandoned: bool,
    /// A write that was acknowledged before, given again.
    again: bool,
}

pub(super) struct Inner {
    pub io: Io,
    pub uri: Uri,
    pub path: PathBuf,
    /// What was agreed on when the volume was opened.
    pub terms: Terms,
    slots: RefCell<Slab<Slot>>,
    numbers: Cell<u64>,
    /// What goes out next on each connection, by place and number; none while there is no connection, or while writes are given again.
    queues: RefCell<Vec<VecDeque<(usize, u64)>>>,
    /// Of those that send, while they have nothing to.
    senders: RefCell<Vec<Option<Waker>>>,
    /// Commands may go out.
    open: Cell<bool>,
    /// Writes that are given again and have no answer yet.
    again: Cell<usize>,
    pub retained: RefCell<Retained>,
    /// The slot whose waker the driver has.
    driving: Cell<Option<u64>>,
    failed: RefCell<Option<String>>,
    /// Since when no server has answered.
    pub down_since: Cell<Option<Instant>>,
    /// When the LUN was told to end.
    pub ending: Cell<Option<Instant>>,
}

/// The conversation; dropped, it ends without a word.
pub(super) struct Session {
    pub inner: Rc<Inner>,
    driver: RefCell<Option<Pin<Box<dyn Future<Output = ()>>>>>,
    room: AsyncMutex,
}

impl Session {
    /// Connects.
    ///
    /// # Errors
    /// Why that failed; nobody is waited for.
    pub async fn open(io: &Io, uri: Uri, path: PathBuf) -> Result<Session, LinkError> {
        let (links, terms) = driver::connect(io, &uri, None).await?;
        let inner = Rc::new(Inner {
            io: io.clone(),
            uri,
            path,
            terms,
            slots: RefCell::default(),
            numbers: Cell::new(0),
            queues: RefCell::default(),
            senders: RefCell::default(),
            open: Cell::new(false),
            again: Cell::new(0),
            retained: RefCell::default(),
            driving: Cell::new(None),
            failed: RefCell::default(),
            down_since: Cell::new(None),
            ending: Cell::new(None),
        });
        let driver = Box::pin(driver::run(inner.clone(), links)) as Pin<Box<dyn Future<Output = ()>>>;
        Ok(Session { inner, driver: RefCell::new(Some(driver)), room: AsyncMutex::new() })
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// A [`CallError`].
    pub async fn call(&self, call: Call) -> Answer {
        if let Some(reason) = self.inner.failed() {
            return Err(CallError::Failed(reason));
        }
        let mut ticket = Ticket { session: self, place: Some(self.inner.enqueue(call)) };
        poll_fn(|cx| ticket.poll(cx)).await
    }

    /// Flushes: what was acknowledged before is on stable storage then, whichever server acknowledged it.
    ///
    /// # Errors
    /// A [`CallError`]; the server's own is the end of the conversation.
    pub async fn flush(&self) -> Answer {
        let mark = self.inner.retained.borrow().mark();
        let call = Call { kind: command::FLUSH, flags: 0, offset: 0, length: 0, sg: Sg::new() };
        match self.call(call).await {
            Err(CallError::Server(code, words)) => {
                let what = io::Error::from_raw_os_error(code as i32);
                self.inner.fail(format!(
                    "a flush failed: {what}{}{words}",
                    if words.is_empty() { "" } else { ": " }
                ));
                Err(CallError::Server(code, words))
            }
            Ok(none) => {
                self.inner.retained.borrow_mut().flushed(mark);
                Ok(none)
            }
            other => other,
        }
    }

    /// Waits until there is room to keep another write.
    ///
    /// # Errors
    /// Those of the flush that makes it.
    pub async fn make_room(&self) -> Result<(), CallError> {
        let full = || self.inner.retained.borrow().bytes() > self.inner.uri.retain;
        if !full() {
            return Ok(());
        }
        let _turn = self.room.lock().await;
        if full() { self.flush().await.map(drop) } else { Ok(()) }
    }

    /// The LUN ends: a server that is away is not waited for much longer.
    pub fn ending(&self) {
        if self.inner.ending.get().is_none() {
            self.inner.ending.set(Some(Instant::now()));
        }
    }

    fn drive(&self, cx: &mut Context<'_>) {
        let Some(mut driver) = self.driver.borrow_mut().take() else { return };
        if driver.as_mut().poll(cx).is_pending() {
            *self.driver.borrow_mut() = Some(driver);
        }
    }
}

/// The place of one who waits.
struct Ticket<'a> {
    session: &'a Session,
    place: Option<(usize, u64)>,
}

impl Ticket<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Answer> {
        let Some((key, number)) = self.place else { return Poll::Pending };
        let inner = &self.session.inner;
        for round in 0..2 {
            let mut slots = inner.slots.borrow_mut();
            let slot = &mut slots[key];
            if let Some(answer) = slot.answer.take() {
                slots.remove(key);
                drop(slots);
                self.place = None;
                inner.hand_over(number);
                return Poll::Ready(answer);
            }
            if round == 0 {
                if !slot.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    slot.waker = Some(cx.waker().clone());
                }
                drop(slots);
                inner.driving.set(Some(number));
                self.session.drive(cx);
            }
        }
        Poll::Pending
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let Some((key, number)) = self.place else { return };
        let inner = &self.session.inner;
        let gone = {
            let mut slots = inner.slots.borrow_mut();
            let slot = &mut slots[key];
            // What is out will be answered; the answer has to be known then.
            slot.abandoned = true;
            slot.waker = None;
            (slot.sent.is_none() || slot.answer.is_some()).then(|| slots.remove(key))
        };
        drop(gone);
        inner.hand_over(number);
    }
}

impl Inner {
    /// Who leaves and was the one to drive wakes another.
    fn hand_over(&self, number: u64) {
        if self.driving.get() == Some(number) {
            self.driving.set(None);
            let next = self.slots.borrow().iter().find_map(|(_, s)| s.waker.clone());
            next.into_iter().for_each(Waker::wake);
        }
    }

    /// Why the conversation is over, if it is.
    pub fn failed(&self) -> Option<String> {
        self.failed.borrow().clone()
    }

    /// The conversation is over.
    pub fn fail(&self, reason: String) {
        if self.failed.borrow().is_none() {
            tracing::error!(path = %self.path.display(), "{reason}: the volume does no more I/O");
            *self.failed.borrow_mut() = Some(reason.clone());
            self.answer_all(&CallError::Failed(reason));
        }
    }

    /// Everybody who waits gets this.
    pub fn answer_all(&self, error: &CallError) {
        let mut slots = self.slots.borrow_mut();
        slots.retain(|_, s| !s.abandoned && !s.again);
        for (_, slot) in slots.iter_mut() {
            slot.sent = None;
            slot.answer.get_or_insert_with(|| Err(error.clone()));
            slot.waker.take().into_iter().for_each(Waker::wake);
        }
        self.again.set(0);
    }

    /// Whether somebody waits for an answer.
    pub fn is_waited_for(&self) -> bool {
        self.slots.borrow().iter().any(|(_, s)| s.answer.is_none())
    }

    /// When the request went out that has waited longest.
    pub fn oldest(&self) -> Option<Instant> {
        self.slots.borrow().iter().filter_map(|(_, s)| s.sent.as_ref().map(|(_, _, at)| *at)).min()
    }

    fn enqueue(&self, call: Call) -> (usize, u64) {
        let place = self.insert(call, false);
        if self.open.get() {
            self.queue(place);
        }
        place
    }

    fn insert(&self, call: Call, again: bool) -> (usize, u64) {
        let number = self.numbers.get();
        self.numbers.set(number + 1);
        let slot = Slot { call, number, sent: None, answer: None, waker: None, abandoned: false, again };
        (self.slots.borrow_mut().insert(slot), number)
    }

    /// Has it sent on the connection that has least to send.
    fn queue(&self, place: (usize, u64)) {
        let mut queues = self.queues.borrow_mut();
        let slots = self.slots.borrow();
        let under_way =
            |link: usize| slots.iter().filter(|(_, s)| matches!(s.sent, Some((l, ..)) if l == link)).count();
        let links = 0..queues.len();
        let link =
            if links.len() == 1 { Some(0) } else { links.min_by_key(|l| queues[*l].len() + under_way(*l)) };
        if let Some(link) = link {
            queues[link].push_back(place);
            self.senders.borrow_mut()[link].take().into_iter().for_each(Waker::wake);
        }
    }

    /// There are so many connections to a server: first it gets again what it may have lost, then what it has not answered.
    pub fn connected(&self, links: usize) {
        *self.queues.borrow_mut() = vec![VecDeque::new(); links];
        *self.senders.borrow_mut() = vec![None; links];
        let again = self.retained.borrow().all();
        self.again.set(again.len());
        if !again.is_empty() {
            tracing::info!(path = %self.path.display(), writes = again.len(), "writes that were not flushed are given again");
        }
        for (offset, run) in &again {
            let sg = run.bytes().map_or_else(Sg::new, |bytes| Buffer::from_slice(bytes).sg());
            let (kind, flags) = match (run.data.is_some(), run.may_unmap) {
                (true, _) => (command::WRITE, 0),
                (false, true) => (command::WRITE_ZEROES, 0),
                (false, false) => (command::WRITE_ZEROES, command::NO_HOLE),
            };
            // No longer than when it was sent first.
            let call = Call { kind, flags, offset: *offset, length: run.len as u32, sg };
            self.queue(self.insert(call, true));
        }
        self.open_if_ready();
    }

    fn open_if_ready(&self) {
        if self.again.get() > 0 || self.open.replace(true) {
            return;
        }
        let unanswered: Vec<(usize, u64)> = {
            let slots = self.slots.borrow();
            let mut all: Vec<_> =
                slots.iter().filter(|(_, s)| s.answer.is_none()).map(|(k, s)| (k, s.number)).collect();
            all.sort_by_key(|(_, number)| *number);
            all
        };
        unanswered.into_iter().for_each(|place| self.queue(place));
    }

    /// There is no connection any more. What has no answer is sent anew later; what nobody waits for is not.
    pub fn disconnected(&self) {
        self.open.set(false);
        self.queues.borrow_mut().clear();
        self.again.set(0);
        let mut slots = self.slots.borrow_mut();
        slots.retain(|_, s| !s.again && !s.abandoned);
        slots.iter_mut().for_each(|(_, s)| s.sent = None);
    }

    /// What goes out next on that connection, in one list; pending while there is nothing.
    pub fn poll_next(
        &self,
        link: usize,
        allocation: Option<u32>,
        structured: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Sg> {
        let mut batch: Vec<(usize, u64)> = Vec::new();
        {
            let mut queues = self.queues.borrow_mut();
            let slots = self.slots.borrow();
            let Some(queue) = queues.get_mut(link) else { return Poll::Pending };
            while batch.len() < BATCH
                && let Some((key, number)) = queue.pop_front()
            {
                // One that nobody waits for any more, and that has not gone out, is gone.
                if slots.get(key).is_some_and(|s| s.number == number) {
                    batch.push((key, number));
                }
            }
        }
        if batch.is_empty() {
            if let Some(waker) = self.senders.borrow_mut().get_mut(link) {
                *waker = Some(cx.waker().clone());
            }
            return Poll::Pending;
        }
        let heads = Buffer::zeroed(batch.len() * LEN);
        let mut out = Sg::new();
        let (mut slots, now) = (self.slots.borrow_mut(), Instant::now());
        for (i, (key, number)) in batch.into_iter().enumerate() {
            let Some(slot) = slots.get_mut(key) else { continue };
            let Call { kind, flags, offset, length, ref sg } = slot.call;
            let request = Request { flags, kind, cookie: cookie(key, number), offset, length };
            heads.sg().copy_in(i * LEN, &request.to_bytes());
            out.append(&heads.sg().slice(i * LEN, LEN));
            let asked = match kind {
                command::READ => Asked::Read { offset, length },
                command::BLOCK_STATUS => Asked::Status { context: allocation.unwrap_or(0), length },
                _ => Asked::Done,
            };
            if kind == command::WRITE {
                out.append(sg);
            }
            slot.sent = Some((link, Pending::new(asked, structured), now));
        }
        Poll::Ready(out)
    }

    /// Does something with the request that a reply on that connection is for.
    ///
    /// # Errors
    /// That there is none, and what `f` says.
    pub fn with_pending<T>(
        &self,
        link: usize,
        of: u64,
        f: impl FnOnce(&mut Pending) -> Result<T, crate::nbd::Broken>,
    ) -> Result<T, LinkError> {
        let mut slots = self.slots.borrow_mut();
        let slot = slots.get_mut(of as u32 as usize);
        let slot = slot.filter(|s| of >> 32 == s.number & 0xffff_ffff);
        match slot.and_then(|s| s.sent.as_mut()) {
            Some((on, pending, _)) if *on == link => Ok(f(pending)?),
            _ => Err(crate::nbd::Broken::new(format!("a reply to {of:#x}, which nobody sent")).into()),
        }
    }

    /// Where the data of a read go; nowhere, if nobody waits for it any more.
    pub fn target(&self, of: u64) -> Option<Sg> {
        let slots = self.slots.borrow();
        slots
            .get(of as u32 as usize)
            .filter(|s| !s.abandoned && s.call.kind == command::READ)
            .map(|s| s.call.sg.clone())
    }

    /// The reply to that request is complete.
    ///
    /// # Errors
    /// That it is not what was asked for, or that the server goes.
    pub fn complete(&self, of: u64) -> Result<(), LinkError> {
        let key = of as u32 as usize;
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(key) else { return Ok(()) };
        let Some((_, pending, _)) = slot.sent.take() else { return Ok(()) };
        let outcome = pending.outcome()?;
        if matches!(&outcome, Err((error::ESHUTDOWN, _))) {
            // It has no answer yet; the next server gives it one.
            return Err(LinkError::ShuttingDown);
        }
        self.down_since.set(None);
        let answer = outcome.map_err(|(code, words)| CallError::Server(code, words));
        if slot.again {
            slots.remove(key);
            drop(slots);
            match answer {
                Ok(_) => {
                    self.again.set(self.again.get().saturating_sub(1));
                    self.open_if_ready();
                }
                Err(_) => {
                    self.fail("the server does not take again a write that it had acknowledged before".into())
                }
            }
            return Ok(());
        }
        if slot.abandoned {
            let gone = slots.remove(key);
            drop(slots);
            drop(gone);
            return Ok(());
        }
        if answer.is_ok() {
            self.retain(&slot.call);
        }
        slot.answer = Some(answer);
        slot.waker.take().into_iter().for_each(Waker::wake);
        Ok(())
    }

    /// A write was acknowledged: kept until it is flushed.
    fn retain(&self, call: &Call) {
        let (at, len) = (call.offset, u64::from(call.length));
        let mut retained = self.retained.borrow_mut();
        match call.kind {
            command::WRITE | command::WRITE_ZEROES if call.flags & command::FUA != 0 => retained.cut(at, len),
            command::WRITE => retained.write(at, Rc::new(call.sg.to_vec())),
            command::WRITE_ZEROES => retained.zero(at, len, call.flags & command::NO_HOLE == 0),
            _ => {}
        }
    }
}

/// What a request is known by: its place, and the low half of its number.
fn cookie(key: usize, number: u64) -> u64 {
    (number << 32) | key as u64 & 0xffff_ffff
}

impl Drop for Session {
    fn drop(&mut self) {
        // Its connections are the driver's.
        self.driver.borrow_mut().take();
    }
}

/// Ends all connections in order.
pub(super) fn say_goodbye<'a>(links: impl Iterator<Item = &'a Link>) {
    links.for_each(Link::say_goodbye);
}
