//! A single-threaded executor: tasks are `!Send` futures, and waking one costs a push to a queue of its own thread.
//!
//! A waker is the executor's number, the task's slot and the slot's generation in one word: no allocation, no count. Woken
//! on another thread than its executor's it does nothing: what crosses threads here goes through an eventfd ([`super::io`]),
//! never through a waker.
//!
//! The memory of a task that has ended serves the next of its size ([`super::pool`]): a task that ends where it was started costs no allocation.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    mem::ManuallyDrop,
    pin::Pin,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

use slab::Slab;

use super::pool;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// What `make` gives, made where it lies.
fn hold<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(pool::hold(make))
}

fn release<F: Future + ?Sized>(future: Pin<Box<F>>) {
    // SAFETY: the future is dropped where it is, and never moved.
    pool::release(unsafe { Pin::into_inner_unchecked(future) });
}

/// A future on the heap, in memory that one of its size had before: what makes the futures that wait for it small, and costs no allocation
/// where it is needed again and again.
pub struct Boxed<F: Future>(ManuallyDrop<Pin<Box<F>>>);

/// Makes a future on the heap: [`Box::pin`], for those that commands need one after the other. It is made where it lies: one with room for
/// all that it may wait for has kilobytes, and would be copied whole.
pub fn boxed<F: Future>(make: impl FnOnce() -> F) -> Boxed<F> {
    Boxed(ManuallyDrop::new(hold(make)))
}

impl<F: Future> Future for Boxed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<F: Future> Drop for Boxed<F> {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody looks at it afterwards.
        release(unsafe { ManuallyDrop::take(&mut self.0) });
    }
}

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
        let task = hold(|| task);
        let (key, _) = self.add(true, Some(task));
        self.0.ready.borrow_mut().push_back(key);
    }

    /// Adds the task that `make` gives and runs it at once, up to where it waits for something. One that waits for nothing has
    /// ended when this returns.
    pub fn start<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce() -> F) {
        let task = hold(make);
        let (key, generation) = self.add(false, None);
        self.poll(key, generation, task);
    }

    fn add(&self, queued: bool, task: Option<Task>) -> (u32, u16) {
        let generation = self.0.generation.get().wrapping_add(1);
        self.0.generation.set(generation);
        (self.0.tasks.borrow_mut().insert(Slot { generation, queued, task }) as u32, generation)
    }

    /// Runs a task that was taken out of its slot, and puts it back unless it has ended.
    fn poll(&self, key: u32, generation: u16, mut task: Task) {
        let waker = waker(self.0.id, generation, key);
        if task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
            // Dropped outside the borrow: its fields may wake or spawn.
            release(task);
            self.0.tasks.borrow_mut().remove(key as usize);
        } else if let Some(slot) = self.0.tasks.borrow_mut().get_mut(key as usize) {
            slot.task = Some(task);
        }
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
            let (task, generation) = {
                let mut tasks = self.0.tasks.borrow_mut();
                let Some(slot) = tasks.get_mut(key as usize) else { continue };
                slot.queued = false;
                let Some(task) = slot.task.take() else { continue };
                (task, slot.generation)
            };
            self.poll(key, generation, task);
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
pub fn join<A: Future, B: Future>(a: A, b: B) -> Join<A, B> {
    Join { a: Half::Runs(a), b: Half::Runs(b) }
}

/// What [`join`] gives. No `async fn`, whose state would have room for each of them twice: as they come, and as they are pinned.
pub struct Join<A: Future, B: Future> {
    a: Half<A>,
    b: Half<B>,
}

enum Half<F: Future> {
    Runs(F),
    Ended(F::Output),
    Taken,
}

impl<F: Future> Half<F> {
    /// Whether it has ended; polls it if not.
    ///
    /// # Safety
    /// It is pinned.
    unsafe fn has_ended(&mut self, cx: &mut Context<'_>) -> bool {
        let Half::Runs(future) = self else { return true };
        // SAFETY: it is never moved, but dropped where it is when its output takes its place.
        let Poll::Ready(output) = unsafe { Pin::new_unchecked(future) }.poll(cx) else { return false };
        *self = Half::Ended(output);
        true
    }

    fn take(&mut self) -> F::Output {
        match std::mem::replace(self, Half::Taken) {
            Half::Ended(output) => output,
            Half::Runs(_) | Half::Taken => unreachable!("taken once, of one that has ended"),
        }
    }
}

impl<A: Future, B: Future> Future for Join<A, B> {
    type Output = (A::Output, B::Output);

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // SAFETY: neither future is moved from here.
        let me = unsafe { self.get_unchecked_mut() };
        // SAFETY: both are pinned as the whole is.
        let ended = unsafe { (me.a.has_ended(cx), me.b.has_ended(cx)) };
        match ended {
            (true, true) => Poll::Ready((me.a.take(), me.b.take())),
            _ => Poll::Pending,
        }
    }
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

/// Runs two futures side by side to the end of one; the other is dropped. The first is asked first.
pub async fn race<T>(a: impl Future<Output = T>, b: impl Future<Output = T>) -> T {
    let mut a = std::pin::pin!(a);
    let mut b = std::pin::pin!(b);
    std::future::poll_fn(|cx| match a.as_mut().poll(cx) {
        Poll::Pending => b.as_mut().poll(cx),
        ready => ready,
    })
    .await
}

/// Runs any number of futures side by side to the end of one; the others are dropped. For ever, if there are none.
pub async fn race_all<T>(futures: Vec<Pin<Box<dyn Future<Output = T> + '_>>>) -> T {
    let mut futures = futures;
    std::future::poll_fn(|cx| {
        for future in &mut futures {
            if let Poll::Ready(value) = future.as_mut().poll(cx) {
                return Poll::Ready(value);
            }
        }
        Poll::Pending
    })
    .await
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
    fn a_started_task_runs_at_once_and_its_memory_serves_the_next() {
        let exec = Executor::new();
        let places: Rc<RefCell<Vec<usize>>> = Rc::default();
        let dropped = Rc::new(Cell::new(0));
        struct Counts(Rc<Cell<u32>>);
        impl Drop for Counts {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let start = |waits: bool| {
            let (places, counts) = (places.clone(), Counts(dropped.clone()));
            exec.start(move || async move {
                let own = [1u64; 16];
                places.borrow_mut().push(own.as_ptr().addr());
                if waits {
                    yield_now().await;
                }
                assert_eq!((own, Rc::strong_count(&counts.0) > 1), ([1; 16], true));
            });
        };
        start(true);
        start(true);
        assert_eq!((exec.tasks(), dropped.get()), (2, 0));
        exec.run_ready();
        assert_eq!((exec.tasks(), dropped.get()), (0, 2));
        // Both pieces are used again, the last first, and one suffices for tasks that never wait.
        start(false);
        start(false);
        start(true);
        start(true);
        exec.clear();
        assert_eq!((exec.tasks(), dropped.get()), (0, 6));
        let places = places.borrow();
        assert_eq!(places[2..], [places[1], places[1], places[1], places[0]]);
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
