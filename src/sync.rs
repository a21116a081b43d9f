//! Coordination between tasks of one thread: range locks and notifications. No atomics, no blocking.
//!
//! [`RangeLock`] is what keeps overlapping commands apart where their order matters: the SCSI room takes it for COMPARE AND
//! WRITE, the PI room so that a block and its tuple are seen together, the qcow2 room around a cluster being allocated.

pub mod gate;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    rc::Rc,
    task::{Poll, Waker},
};

use slab::Slab;

/// Locks on ranges of `u64`: any number of shared holders, or one exclusive. First come, first served: a request waits for
/// every overlapping one before it (unless both are shared), so none starves.
#[derive(Clone, Default)]
pub struct RangeLock(Rc<RefCell<Ranges>>);

#[derive(Default)]
struct Ranges {
    requests: Slab<Request>,
    next: u64,
    /// Of the requests, those that are exclusive: without any, nobody shared waits.
    exclusive: usize,
    /// Those that have found that they have to wait, and do not hold yet: without any, nobody is to be woken.
    waiting: usize,
}

struct Request {
    /// Order of arrival.
    order: u64,
    start: u64,
    end: u64,
    exclusive: bool,
    waiting: bool,
    waker: Option<Waker>,
}

/// A held (or awaited) range; dropping it gives the range up.
pub struct RangeGuard {
    lock: RangeLock,
    key: usize,
}

impl RangeLock {
    /// No range held.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    /// Waits for `start..start+len` to have no exclusive holder, and shares it.
    pub async fn shared(&self, start: u64, len: u64) -> RangeGuard {
        self.acquire(start, len, false).await
    }

    /// Waits for `start..start+len` to have no holder at all, and takes it.
    pub async fn exclusive(&self, start: u64, len: u64) -> RangeGuard {
        self.acquire(start, len, true).await
    }

    async fn acquire(&self, start: u64, len: u64, exclusive: bool) -> RangeGuard {
        let key = {
            let mut r = self.0.borrow_mut();
            let order = r.next;
            r.next += 1;
            let end = start.saturating_add(len);
            r.exclusive += usize::from(exclusive);
            r.requests.insert(Request { order, start, end, exclusive, waiting: false, waker: None })
        };
        let guard = RangeGuard { lock: self.clone(), key };
        poll_fn(|cx| {
            let mut r = self.0.borrow_mut();
            let blocked = r.blocked(key);
            r.waits(key, blocked);
            if blocked {
                r.requests[key].waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        guard
    }

    /// Whether any range is held or awaited.
    pub fn is_idle(&self) -> bool {
        self.0.borrow().requests.is_empty()
    }
}

impl Ranges {
    fn blocked(&self, key: usize) -> bool {
        let me = &self.requests[key];
        if self.exclusive == 0 {
            return false;
        }
        self.requests.iter().any(|(_, other)| {
            other.order < me.order
                && other.start < me.end
                && me.start < other.end
                && (other.exclusive || me.exclusive)
        })
    }

    /// Whether the request waits, from now on.
    fn waits(&mut self, key: usize, waits: bool) {
        let before = std::mem::replace(&mut self.requests[key].waiting, waits);
        self.waiting = self.waiting + usize::from(waits) - usize::from(before);
    }
}

impl Drop for RangeGuard {
    fn drop(&mut self) {
        let mut r = self.lock.0.borrow_mut();
        r.waits(self.key, false);
        let gone = r.requests.remove(self.key);
        r.exclusive -= usize::from(gone.exclusive);
        if r.waiting == 0 {
            return;
        }
        let wake: Vec<Waker> = r
            .requests
            .iter_mut()
            .filter(|(_, o)| o.waiting && o.order > gone.order && o.start < gone.end && gone.start < o.end)
            .filter_map(|(_, o)| o.waker.take())
            .collect();
        drop(r);
        wake.into_iter().for_each(Waker::wake);
    }
}

/// Something that tasks wait for to happen. A notification wakes all who wait at that moment.
#[derive(Clone, Default)]
pub struct Notify(Rc<NotifyInner>);

#[derive(Default)]
struct NotifyInner {
    epoch: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Notify {
    /// Nobody waits.
    pub fn new() -> Notify {
        Notify::default()
    }

    /// Wakes everybody who waits.
    pub fn notify_all(&self) {
        self.0.epoch.set(self.0.epoch.get() + 1);
        let waiting = std::mem::take(&mut *self.0.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Waits for the next notification after the call (not after the first poll).
    pub fn wait(&self) -> impl Future<Output = ()> + use<> {
        let me = self.0.clone();
        let seen = me.epoch.get();
        poll_fn(move |cx| {
            if me.epoch.get() != seen {
                return Poll::Ready(());
            }
            me.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
    }
}

/// A mutex for state that is held across awaits; first come, first served.
#[derive(Default)]
pub struct AsyncMutex {
    locked: Cell<bool>,
    waiting: RefCell<VecDeque<(u64, Option<Waker>)>>,
    next: Cell<u64>,
}

/// Holds an [`AsyncMutex`].
pub struct AsyncMutexGuard<'a> {
    mutex: &'a AsyncMutex,
    ticket: u64,
    held: bool,
}

impl AsyncMutex {
    /// Unlocked.
    pub fn new() -> AsyncMutex {
        AsyncMutex::default()
    }

    /// Waits for its turn and locks.
    pub async fn lock(&self) -> AsyncMutexGuard<'_> {
        let ticket = self.next.get();
        self.next.set(ticket + 1);
        self.waiting.borrow_mut().push_back((ticket, None));
        let mut guard = AsyncMutexGuard { mutex: self, ticket, held: false };
        poll_fn(|cx| {
            let mut waiting = self.waiting.borrow_mut();
            if !self.locked.get() && waiting.front().is_some_and(|(t, _)| *t == ticket) {
                waiting.pop_front();
                self.locked.set(true);
                return Poll::Ready(());
            }
            if let Some(entry) = waiting.iter_mut().find(|(t, _)| *t == ticket) {
                entry.1 = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        guard.held = true;
        guard
    }
}

impl Drop for AsyncMutexGuard<'_> {
    fn drop(&mut self) {
        if self.held {
            self.mutex.locked.set(false);
        } else {
            self.mutex.waiting.borrow_mut().retain(|(t, _)| *t != self.ticket);
        }
        let waker = self.mutex.waiting.borrow_mut().front_mut().and_then(|(_, w)| w.take());
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::exec::{Executor, yield_now};

    #[test]
    fn overlapping_exclusive_ranges_are_held_one_after_the_other() {
        let exec = Executor::new();
        let lock = RangeLock::new();
        let inside = Rc::new(Cell::new(0u32));
        for i in 0..50u64 {
            let (lock, inside) = (lock.clone(), inside.clone());
            exec.spawn(async move {
                let _guard = lock.exclusive(i % 7, 7).await;
                inside.set(inside.get() + 1);
                assert_eq!(inside.get(), 1);
                yield_now().await;
                inside.set(inside.get() - 1);
            });
        }
        while exec.run_ready() {}
        assert!(exec.tasks() == 0 && lock.is_idle());
    }

    #[test]
    fn shared_holders_overlap_and_a_waiting_writer_is_not_starved() {
        let exec = Executor::new();
        let lock = RangeLock::new();
        let log: Rc<RefCell<Vec<&str>>> = Rc::default();
        for (name, exclusive) in [("r1", false), ("r2", false), ("w", true), ("r3", false)] {
            let (lock, log) = (lock.clone(), log.clone());
            exec.spawn(async move {
                let _g = if exclusive { lock.exclusive(0, 8).await } else { lock.shared(4, 8).await };
                log.borrow_mut().push(name);
                yield_now().await;
                yield_now().await;
            });
        }
        while exec.run_ready() {}
        assert_eq!(*log.borrow(), ["r1", "r2", "w", "r3"]);
    }

    #[test]
    fn a_dropped_waiter_leaves_no_trace() {
        let exec = Executor::new();
        let lock = RangeLock::new();
        let l = lock.clone();
        exec.spawn(async move {
            let held = l.exclusive(0, 1).await;
            let mut waiter = Box::pin(l.exclusive(0, 1));
            assert!(poll_fn(|cx| Poll::Ready(waiter.as_mut().poll(cx).is_pending())).await);
            drop(waiter);
            drop(held);
            l.exclusive(0, 1).await;
        });
        while exec.run_ready() {}
        assert!(exec.tasks() == 0 && lock.is_idle());
    }

    #[test]
    fn the_mutex_serves_in_order_of_arrival() {
        let exec = Executor::new();
        let mutex = Rc::new(AsyncMutex::new());
        let log: Rc<RefCell<Vec<u32>>> = Rc::default();
        for i in 0..5 {
            let (mutex, log) = (mutex.clone(), log.clone());
            exec.spawn(async move {
                let _g = mutex.lock().await;
                yield_now().await;
                log.borrow_mut().push(i);
            });
        }
        while exec.run_ready() {}
        assert_eq!(*log.borrow(), [0, 1, 2, 3, 4]);
    }
}
