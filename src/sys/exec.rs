//! A single-threaded executor: tasks are `!Send` futures, and waking one costs a push to a queue of its own thread.
//!
//! A waker is the executor's number, the task's slot and the slot's generation in one word: no allocation, no count. Woken
//! on another thread than its executor's it does nothing: what crosses threads here goes through an eventfd ([`super::io`]),
//! never through a waker.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

use slab::Slab;

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    generation: u16,
    queued: bool,
    /// Taken out while it is polled.
    task: Option<Task>,
}

struct Inner {
    id: u16,
    tasks: RefCell<Slab<Slot>>,
    ready: RefCell<VecDeque<u32>>,
    generation: Cell<u16>,
}

thread_local! {
    static EXECUTORS: RefCell<Vec<(u16, std::rc::Weak<Inner>)>> = const { RefCell::new(Vec::new()) };
}
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// Runs tasks on the thread that made it.
#[derive(Clone)]
pub struct Executor(Rc<Inner>);

impl Default for Executor {
    fn default() -> Self {
        Executor::new()
    }
}

impl Executor {
    /// An executor without tasks.
    pub fn new() -> Executor {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed) as u16;
        let inner = Rc::new(Inner {
            id,
            tasks: RefCell::default(),
            ready: RefCell::default(),
            generation: Cell::new(0),
        });
        EXECUTORS.with_borrow_mut(|all| {
            all.retain(|(_, weak)| weak.strong_count() > 0);
            all.push((id, Rc::downgrade(&inner)));
        });
        Executor(inner)
    }

    /// Adds a task; it runs at the next [`Executor::run_ready`].
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let generation = self.0.generation.get().wrapping_add(1);
        self.0.generation.set(generation);
        let key =
            self.0.tasks.borrow_mut().insert(Slot { generation, queued: true, task: Some(Box::pin(task)) });
        self.0.ready.borrow_mut().push_back(key as u32);
    }

    /// Tasks that have not finished.
    pub fn tasks(&self) -> usize {
        self.0.tasks.borrow().len()
    }

    /// Whether a task waits to be run.
    pub fn has_ready(&self) -> bool {
        !self.0.ready.borrow().is_empty()
    }

    /// Runs every task that was ready at the call, once. Tells whether there was one.
    pub fn run_ready(&self) -> bool {
        let mut left = self.0.ready.borrow().len();
        let any = left > 0;
        while left > 0 {
            left -= 1;
            let Some(key) = self.0.ready.borrow_mut().pop_front() else { break };
            let (mut task, generation) = {
                let mut tasks = self.0.tasks.borrow_mut();
                let Some(slot) = tasks.get_mut(key as usize) else { continue };
                slot.queued = false;
                let Some(task) = slot.task.take() else { continue };
                (task, slot.generation)
            };
            let waker = waker(self.0.id, generation, key);
            let finished = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
            if finished {
                // Dropped outside the borrow: its fields may wake or spawn.
                drop(task);
                self.0.tasks.borrow_mut().remove(key as usize);
            } else if let Some(slot) = self.0.tasks.borrow_mut().get_mut(key as usize) {
                slot.task = Some(task);
            }
        }
        any
    }

    /// Drops every task, wherever it waits.
    pub fn clear(&self) {
        let tasks = std::mem::take(&mut *self.0.tasks.borrow_mut());
        self.0.ready.borrow_mut().clear();
        drop(tasks);
    }

    fn wake(inner: &Inner, generation: u16, key: u32) {
        let mut tasks = inner.tasks.borrow_mut();
        if let Some(slot) = tasks.get_mut(key as usize)
            && slot.generation == generation
            && !slot.queued
        {
            slot.queued = true;
            inner.ready.borrow_mut().push_back(key);
        }
    }
}

fn waker(id: u16, generation: u16, key: u32) -> Waker {
    let word = (u64::from(id) << 48) | (u64::from(generation) << 32) | u64::from(key);
    // SAFETY: the vtable's functions read the word as a number, and never as a pointer; they own nothing.
    unsafe { Waker::from_raw(RawWaker::new(std::ptr::without_provenance(word as usize), &VTABLE)) }
}

static VTABLE: RawWakerVTable = RawWakerVTable::new(
    |word| RawWaker::new(word, &VTABLE),
    |word| wake_word(word.addr() as u64),
    |word| wake_word(word.addr() as u64),
    |_| {},
);

fn wake_word(word: u64) {
    let (id, generation, key) = ((word >> 48) as u16, (word >> 32) as u16, word as u32);
    let inner = EXECUTORS.try_with(|all| {
        all.borrow().iter().rev().find(|(i, _)| *i == id).and_then(|(_, weak)| weak.upgrade())
    });
    if let Ok(Some(inner)) = inner {
        Executor::wake(&inner, generation, key);
    }
}

/// Runs two futures side by side to the end of both.
pub async fn join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let mut a = std::pin::pin!(a);
    let mut b = std::pin::pin!(b);
    let (mut out_a, mut out_b) = (None, None);
    std::future::poll_fn(move |cx| {
        if out_a.is_none()
            && let Poll::Ready(v) = a.as_mut().poll(cx)
        {
            out_a = Some(v);
        }
        if out_b.is_none()
            && let Poll::Ready(v) = b.as_mut().poll(cx)
        {
            out_b = Some(v);
        }
        match (out_a.take(), out_b.take()) {
            (Some(x), Some(y)) => Poll::Ready((x, y)),
            (x, y) => {
                (out_a, out_b) = (x, y);
                Poll::Pending
            }
        }
    })
    .await
}

/// Runs any number of futures side by side to the end of all; the results stand in their order.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut waiting = false;
        for (future, out) in &mut running {
            if out.is_none() {
                match future.as_mut().poll(cx) {
                    Poll::Ready(v) => *out = Some(v),
                    Poll::Pending => waiting = true,
                }
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().filter_map(|(_, out)| out).collect()
}

/// Lets every other ready task run before going on.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_yields_lets_the_others_run() {
        let exec = Executor::new();
        let log = Rc::new(RefCell::new(Vec::new()));
        for name in ["a", "b"] {
            let log = log.clone();
            exec.spawn(async move {
                log.borrow_mut().push(name);
                yield_now().await;
                log.borrow_mut().push(name);
            });
        }
        while exec.run_ready() {}
        assert_eq!(*log.borrow(), ["a", "b", "a", "b"]);
        assert_eq!(exec.tasks(), 0);
    }

    #[test]
    fn a_stale_waker_does_not_wake_the_next_task_in_its_slot() {
        let exec = Executor::new();
        let stale: Rc<RefCell<Option<Waker>>> = Rc::default();
        let s = stale.clone();
        exec.spawn(std::future::poll_fn(move |cx| {
            *s.borrow_mut() = Some(cx.waker().clone());
            Poll::Ready(())
        }));
        exec.run_ready();
        let polls = Rc::new(Cell::new(0));
        let p = polls.clone();
        exec.spawn(std::future::poll_fn(move |_| {
            p.set(p.get() + 1);
            Poll::Pending
        }));
        exec.run_ready();
        stale.borrow().as_ref().unwrap().wake_by_ref();
        exec.run_ready();
        assert_eq!(polls.get(), 1);
    }

    #[test]
    fn joined_futures_run_side_by_side() {
        let exec = Executor::new();
        let out = Rc::new(RefCell::new(None));
        let o = out.clone();
        exec.spawn(async move {
            let both = join(async { 1 }, async {
                yield_now().await;
                2
            })
            .await;
            let all = join_all((0..3).map(|i| async move {
                yield_now().await;
                i
            }))
            .await;
            *o.borrow_mut() = Some((both, all));
        });
        while exec.run_ready() {}
        assert_eq!(out.take(), Some(((1, 2), vec![0, 1, 2])));
    }
}
