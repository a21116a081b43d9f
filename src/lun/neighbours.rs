//! The LUNs of a daemon that may copy to each other, and the errands that go between their threads.
//!
//! A [`Neighbourhood`] is shared by all LUNs of a daemon. A LUN whose configuration names a copy group is in it while it serves, and
//! reaches those of the same group: who may use one of them can read and write all, so there is no group unless somebody set it.
//!
//! An errand is a message to the other's inbox with the way back ([`Return`]), which answers also if it is dropped: a LUN that ends drops
//! what its inbox holds and what comes later. The answer is a message to the asker's inbox, and wakes the task that waits. Nobody waits
//! for another's thread in any other way, and no lock is held but around a list. Used by the LUN's service; and
//! by those outside who have a LUN do the same ([`Remote::order`]), whose threads may wait.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    future::poll_fn,
    pin::pin,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use super::{
    LunError, Remote,
    inbox::{Message, Outbox},
};
use crate::{
    scsi::neighbour::{Answer, Answering, Designator, Errand, Neighbour, Neighbours, Undone},
    sync::Notify,
    sys::io::Io,
};

/// How long a LUN waits for another's answer. Its storage may be slow; a LUN whose thread hangs must not make two that do.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long copies may go on once their LUN was told to stop.
const GRACE: Duration = Duration::from_secs(5);

/// What came of an errand.
pub(super) type Outcome = Result<Answer, Undone>;

/// The LUNs of a daemon that may copy to each other; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Neighbourhood(Arc<Mutex<Vec<Member>>>);

#[derive(Debug)]
struct Member {
    number: u64,
    group: String,
    names: Vec<Designator>,
    outbox: Outbox,
}

impl Neighbourhood {
    fn with<T>(&self, f: impl FnOnce(&mut Vec<Member>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A LUN's place among the others, until it is dropped.
pub(super) struct Membership {
    neighbourhood: Neighbourhood,
    number: u64,
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.neighbourhood.with(|members| members.retain(|m| m.number != self.number));
    }
}

impl Remote {
    /// Has it do something as a command would, protection and all, and waits for that.
    ///
    /// # Errors
    /// That the LUN does not answer; in the inner result what an initiator would be told.
    pub fn order(&self, errand: Errand) -> Result<Result<Answer, Undone>, LunError> {
        self.ask(|back| Message::Order(errand, back))
    }
}

/// The way back to one who asked. Dropped, it says that nobody answers.
pub(super) struct Return {
    to: Outbox,
    ticket: u64,
    given: bool,
}

impl Return {
    pub(super) fn give(mut self, outcome: Outcome) {
        self.given = true;
        self.to.send(Message::Answered(self.ticket, outcome));
    }
}

impl Drop for Return {
    fn drop(&mut self) {
        if !self.given {
            self.to.send(Message::Answered(self.ticket, Err(Undone::Unreachable)));
        }
    }
}

impl fmt::Debug for Return {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Return({})", self.ticket)
    }
}

/// An errand whose answer is awaited.
#[derive(Default)]
struct Waiting {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

struct Inner {
    neighbourhood: Neighbourhood,
    group: Option<String>,
    number: u64,
    own: Outbox,
    io: Io,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    next: Cell<u64>,
    /// When the LUN was told to stop.
    ending: Cell<Option<Instant>>,
    told_to_end: Notify,
    /// Nothing is asked any more.
    hung_up: Cell<bool>,
}

/// A LUN's own end: what it has asked of others. Clones are the same.
#[derive(Clone)]
pub(super) struct Calls(Rc<Inner>);

impl Calls {
    /// For the LUN with that inbox.
    pub(super) fn new(neighbourhood: Neighbourhood, group: Option<String>, own: Outbox, io: &Io) -> Calls {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Calls(Rc::new(Inner {
            neighbourhood,
            group,
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            own,
            io: io.clone(),
            waiting: RefCell::default(),
            next: Cell::new(0),
            ending: Cell::new(None),
            told_to_end: Notify::new(),
            hung_up: Cell::new(false),
        }))
    }

    /// From now on the others of its group find it under these names.
    pub(super) fn join(&self, names: Vec<Designator>) -> Option<Membership> {
        let Inner { neighbourhood, number, own, .. } = &*self.0;
        let group = self.0.group.clone()?;
        let member = Member { number: *number, group, names, outbox: own.clone() };
        neighbourhood.with(|members| members.push(member));
        Some(Membership { neighbourhood: neighbourhood.clone(), number: *number })
    }

    /// An answer has come. That nobody waits for it any more is no fault.
    pub(super) fn answered(&self, ticket: u64, outcome: Outcome) {
        let waker = self.0.waiting.borrow_mut().get_mut(&ticket).and_then(|w| {
            w.outcome.get_or_insert(outcome);
            w.waker.take()
        });
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The LUN was told to stop: copies end soon.
    pub(super) fn end_soon(&self) {
        if self.0.ending.get().is_none() {
            self.0.ending.set(Some(Instant::now()));
            self.0.told_to_end.notify_all();
        }
    }

    /// Runs beside the commands: once copies should have ended, nobody is waited for.
    pub(super) async fn watch_the_end(&self) {
        let told = self.0.told_to_end.wait();
        if self.0.ending.get().is_none() {
            told.await;
        }
        self.0.io.sleep(GRACE).await;
        self.hang_up();
        std::future::pending().await
    }

    /// Nobody's answer arrives any more: whoever waits for one goes on without.
    pub(super) fn hang_up(&self) {
        self.0.hung_up.set(true);
        let tickets: Vec<u64> = self.0.waiting.borrow().keys().copied().collect();
        tickets.into_iter().for_each(|ticket| self.answered(ticket, Err(Undone::Unreachable)));
    }

    async fn ask(self, door: Outbox, errand: Errand) -> Outcome {
        if self.0.hung_up.get() {
            return Err(Undone::Unreachable);
        }
        let place = self.place();
        door.send(Message::Errand(errand, place.way_back()));
        let mut too_long = pin!(self.0.io.sleep(PATIENCE));
        poll_fn(|cx| match place.poll(cx) {
            Poll::Ready(outcome) => Poll::Ready(outcome),
            Poll::Pending => too_long.as_mut().poll(cx).map(|()| Err(Undone::Unreachable)),
        })
        .await
    }

    /// Hands a way back to somebody, and waits until it is dropped, wherever that is; or until nobody is waited for any more.
    pub(super) async fn until_dropped(&self, hand: impl FnOnce(Return)) {
        if self.0.hung_up.get() {
            return;
        }
        let place = self.place();
        hand(place.way_back());
        // Whoever drops it says that nobody answers.
        let _ = poll_fn(|cx| place.poll(cx)).await;
    }

    /// A place for one who waits.
    fn place(&self) -> Place<'_> {
        let ticket = self.0.next.get();
        self.0.next.set(ticket + 1);
        self.0.waiting.borrow_mut().insert(ticket, Waiting::default());
        Place { calls: self, ticket }
    }
}

/// The place of one who waits, given up with the future.
struct Place<'a> {
    calls: &'a Calls,
    ticket: u64,
}

impl Place<'_> {
    fn way_back(&self) -> Return {
        Return { to: self.calls.0.own.clone(), ticket: self.ticket, given: false }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Outcome> {
        if let Some(waiting) = self.calls.0.waiting.borrow_mut().get_mut(&self.ticket) {
            if let Some(outcome) = waiting.outcome.take() {
                return Poll::Ready(outcome);
            }
            waiting.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // An answer that nobody took may have a way back itself: it is dropped when the list is free.
        let left = self.calls.0.waiting.borrow_mut().remove(&self.ticket);
        drop(left);
    }
}

impl Neighbours for Calls {
    fn named(&self, who: &Designator) -> Vec<Rc<dyn Neighbour>> {
        let Some(group) = &self.0.group else { return Vec::new() };
        let found: Vec<(u64, Outbox)> = self.0.neighbourhood.with(|members| {
            let others = members.iter().filter(|m| m.number != self.0.number && m.group == *group);
            others.filter(|m| m.names.contains(who)).map(|m| (m.number, m.outbox.clone())).collect()
        });
        let door =
            |(number, outbox)| Rc::new(Door { calls: self.clone(), number, outbox }) as Rc<dyn Neighbour>;
        found.into_iter().map(door).collect()
    }

    fn should_end(&self) -> bool {
        self.0.hung_up.get() || self.0.ending.get().is_some_and(|at| at.elapsed() >= GRACE)
    }
}

/// Another LUN, as a task of this one sees it.
struct Door {
    calls: Calls,
    number: u64,
    outbox: Outbox,
}

impl Neighbour for Door {
    fn number(&self) -> u64 {
        self.number
    }

    fn ask(&self, errand: Errand) -> Answering {
        Box::pin(self.calls.clone().ask(self.outbox.clone(), errand))
    }
}
