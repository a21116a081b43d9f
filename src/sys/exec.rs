//! A single-threaded executor: tasks are `!Send` futures, and waking one costs a push to a queue of its own thread.
//!
//! A waker is the executor's number, the task's slot and the slot's generation in one word: no allocation, no count. Woken
//! on another thread than its executor's it does nothing: what crosses threads here goes through an eventfd ([`super::io`]),
//! never through a waker.
//!
//! The memory of a task that has ended is kept for the next of its size, the last one first: a task that ends where it was started costs
//! no allocation, and its memory is in the cache.

use std::{
    alloc::{self, Layout},
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    mem::ManuallyDrop,
    pin::Pin,
    ptr::NonNull,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
    task::{Context, Poll, RawWaker, RawWakerVTable, Waker},
};

use slab::Slab;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Pieces of memory of one size that a thread keeps at most: as many as there are commands under way in a busy LUN.
const KEPT: usize = 320;

/// Larger ones are not kept: futures of opening and closing, which are needed once.
const LARGEST: usize = 8 << 10;

/// Memory of futures that have ended, by its layout. There are few: a LUN has one kind of task for its commands and one for its messages.
struct Memory(RefCell<Vec<(Layout, Vec<NonNull<u8>>)>>);

thread_local! {
    static MEMORY: Memory = const { Memory(RefCell::new(Vec::new())) };
}

fn is_kept(layout: Layout) -> bool {
    (1..=LARGEST).contains(&layout.size())
}

/// What `make` gives, in memory that a future before it had, or in new.
fn hold<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    let layout = Layout::new::<F>();
    // Without its locals a thread is ending.
    let kept = |layout| MEMORY.try_with(|m| m.take(layout)).ok();
    let Some(place) = Some(layout).filter(|l| is_kept(*l)).and_then(kept) else {
        return Box::pin(make());
    };
    let place = place.cast::<F>().as_ptr();
    // SAFETY: the memory has the layout of F, comes from the global allocator as a box's does, and is nobody else's.
    let boxed = unsafe {
        place.write(make());
        Box::from_raw(place)
    };
    Box::into_pin(boxed)
}

/// Drops a future and keeps its memory.
fn release<F: Future + ?Sized>(future: Pin<Box<F>>) {
    let layout = Layout::for_value(&*future);
    if !is_kept(layout) {
        return;
    }
    // SAFETY: the future is dropped where it is, and never moved.
    let future = Box::into_raw(unsafe { Pin::into_inner_unchecked(future) });
    // SAFETY: it comes out of its box, and is not used afterwards.
    unsafe { std::ptr::drop_in_place(future) };
    let place = future.cast::<u8>();
    if MEMORY.try_with(|m| m.keep(layout, place)) != Ok(true) {
        // SAFETY: the box's memory, whose value has been dropped.
        unsafe { alloc::dealloc(place, layout) }
    }
}

/// A future on the heap, in memory that one of its size had before: what makes the futures that wait for it small, and costs no allocation
/// where it is needed again and again.
pub struct Boxed<F: Future>(ManuallyDrop<Pin<Box<F>>>);

/// Puts a future on the heap: [`Box::pin`], for those that commands need one after the other.
pub fn boxed<F: Future>(future: F) -> Boxed<F> {
    Boxed(ManuallyDrop::new(hold(|| future)))
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

impl Memory {
    fn take(&self, layout: Layout) -> NonNull<u8> {
        let kept = self.0.borrow_mut().iter_mut().find(|(l, _)| *l == layout).and_then(|(_, all)| all.pop());
        kept.unwrap_or_else(|| {
            // SAFETY: the caller's layout has a size.
            NonNull::new(unsafe { alloc::alloc(layout) }).unwrap_or_else(|| alloc::handle_alloc_error(layout))
        })
    }

    /// Keeps a piece; false if there are enough.
    fn keep(&self, layout: Layout, place: *mut u8) -> bool {
        let mut kept = self.0.borrow_mut();
        let at = kept.iter().position(|(l, _)| *l == layout).unwrap_or_else(|| {
            kept.push((layout, Vec::new()));
            kept.len() - 1
        });
        let all = &mut kept[at].1;
        let few = all.len() < KEPT;
        all.extend(NonNull::new(place).filter(|_| few));
        few
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (layout, all) in self.0.get_mut() {
            for place in all {
                // SAFETY: it came from the global allocator with this layout, and what was in it has been dropped.
                unsafe { alloc::dealloc(place.as_ptr(), *layout) }
            }
        }
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
