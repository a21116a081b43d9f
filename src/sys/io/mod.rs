//! Asynchronous file I/O for one thread: [`Io`] hands out futures, [`Io::turn`] submits, waits and completes.
//!
//! Two backends behind the same futures: io_uring, and a small pool of threads with `preadv2`/`pwritev2` where io_uring is not
//! permitted. An operation owns what it works on (file, memory) until the kernel has finished, so its future may be dropped
//! at any time. The thread sleeps in `turn` alone: completions, watched descriptors and timers all arrive there.

mod fallocate;
mod fenced;
pub mod net;
mod op_future;
mod results;
mod threads;
mod uring;

use std::{
    cell::{Cell, RefCell},
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    future::poll_fn,
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
    rc::Rc,
    sync::{Arc, Mutex},
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use slab::Slab;

use super::{
    fence::Fence,
    mem::{Held, Sg},
};
pub use fallocate::Fallocate;
use op_future::OpFuture;
use threads::Pool;
use uring::Uring;

/// IOV_MAX of Linux: longer scatter lists go in several operations.
const IOV_MAX: usize = 1024;

/// Lists of iovecs that are kept for the next operation.
const SPARE: usize = 256;

/// Which way I/O goes to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// io_uring.
    Uring,
    /// A pool of threads.
    Threads,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Backend::Uring => "io_uring",
            Backend::Threads => "threads",
        })
    }
}

/// How long [`Io::turn`] may sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until something happens or a timer is due.
    Event,
    /// The same, but no longer than this.
    AtMost(Duration),
}

/// One system call's worth of work, as both backends take it.
enum Request {
    Read {
        at: u64,
    },
    Write {
        at: u64,
        dsync: bool,
    },
    Fdatasync,
    Fallocate {
        mode: libc::c_int,
        at: u64,
        len: u64,
    },
    Call(Box<dyn FnOnce() + Send>),
    /// Waits for poll(2)'s events on the descriptor, once.
    Poll {
        events: i16,
    },
}

/// An operation under way. Everything that the kernel may touch is owned here until the result is in.
struct Op {
    result: Option<i32>,
    waker: Option<Waker>,
    abandoned: bool,
    /// It only waits for a descriptor, perhaps for ever: taken back when nobody waits for it any more.
    poll: bool,
    #[allow(dead_code)] // Held, never read: it keeps the descriptor open.
    file: Option<Rc<File>>,
    #[allow(dead_code)] // The same, of the memory.
    memory: Held,
    /// For more than one piece of memory, or a thread of the pool; taken from `Inner::spare`, and given back.
    iovecs: Vec<libc::iovec>,
}

/// System calls that a thread's I/O has made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Calls {
    /// `io_uring_enter`, or on threads `ppoll`.
    pub enters: u64,
    /// Operations that were begun.
    pub operations: u64,
}

/// A descriptor that an operation waits for.
struct Polled {
    key: usize,
    fd: RawFd,
    events: i16,
}

struct Timer {
    waker: Option<Waker>,
    fired: bool,
}

/// A descriptor that is watched for readability.
pub struct Watch {
    #[allow(dead_code)] // Held, never read: it keeps the descriptor open while it is polled.
    fd: Rc<OwnedFd>,
    raw: RawFd,
    ready: Cell<bool>,
    armed: Cell<bool>,
}

impl Watch {
    /// Whether the descriptor has become readable since the last call. The caller then reads it empty.
    pub fn take_ready(&self) -> bool {
        self.ready.replace(false)
    }

    /// Whether it stays readable until it is read empty. Otherwise (a multishot poll of io_uring) each event is told once, and
    /// reading is for whoever wants to know how many there were.
    pub fn has_to_be_emptied(&self) -> bool {
        !self.armed.get()
    }
}

enum Engine {
    Uring(Box<RefCell<Uring>>),
    Threads,
}

struct Inner {
    ops: RefCell<Slab<Op>>,
    /// Operations without a result.
    under_way: Cell<usize>,
    /// Lists of iovecs that nobody uses.
    spare: RefCell<Vec<Vec<libc::iovec>>>,
    calls: Cell<Calls>,
    engine: Engine,
    /// Started with the first work for it: the whole backend, or under io_uring what has no opcode.
    pool: RefCell<Option<Pool>>,
    pool_watch: RefCell<Option<Rc<Watch>>>,
    /// Reused for the pool's results.
    results: RefCell<Vec<(usize, i32)>>,
    watches: RefCell<Vec<Rc<Watch>>>,
    /// Descriptors that operations wait for, where there is no ring that does it.
    polls: RefCell<Vec<Polled>>,
    timers: RefCell<Slab<Timer>>,
    due: RefCell<BinaryHeap<Reverse<(Instant, usize)>>>,
    /// What all of it is under.
    fence: RefCell<Option<Fence>>,
}

/// The handle to a thread's I/O; clones are the same.
#[derive(Clone)]
pub struct Io(Rc<Inner>);

impl Io {
    /// I/O through that backend.
    ///
    /// # Errors
    /// The kernel's word on io_uring (EPERM or ENOSYS where it is not permitted).
    pub fn new(backend: Backend) -> io::Result<Io> {
        let engine = match backend {
            Backend::Uring => Engine::Uring(Box::new(RefCell::new(Uring::new()?))),
            Backend::Threads => Engine::Threads,
        };
        Ok(Io(Rc::new(Inner {
            ops: RefCell::default(),
            under_way: Cell::new(0),
            spare: RefCell::default(),
            calls: Cell::default(),
            engine,
            pool: RefCell::default(),
            pool_watch: RefCell::default(),
            results: RefCell::default(),
            watches: RefCell::default(),
            polls: RefCell::default(),
            timers: RefCell::default(),
            due: RefCell::default(),
            fence: RefCell::default(),
        })))
    }

    /// io_uring where it is permitted, else threads, and why io_uring was not.
    pub fn best() -> (Io, Option<io::Error>) {
        match Io::new(Backend::Uring) {
            Ok(io) => (io, None),
            Err(e) => match Io::new(Backend::Threads) {
                Ok(io) => (io, Some(e)),
                Err(_) => unreachable!("the pool of threads starts with its first operation"),
            },
        }
    }

    /// The backend in use.
    pub fn backend(&self) -> Backend {
        match self.0.engine {
            Engine::Uring(_) => Backend::Uring,
            Engine::Threads => Backend::Threads,
        }
    }

    /// Operations under way.
    pub fn in_flight(&self) -> usize {
        self.0.under_way.get()
    }

    /// The system calls so far.
    pub fn calls(&self) -> Calls {
        self.0.calls.get()
    }

    fn counted(&self, enters: u64, operations: u64) {
        let calls = self.0.calls.get();
        let (enters, operations) = (calls.enters + enters, calls.operations + operations);
        self.0.calls.set(Calls { enters, operations });
    }

    /// One read; gives the bytes read, which may be fewer than asked for.
    pub async fn read_some(&self, file: &Rc<File>, at: u64, to: &Sg) -> io::Result<usize> {
        self.start(Request::Read { at }, Some(file), to).await
    }

    /// Reads until `to` is full or the file ends; gives the bytes read.
    pub async fn read(&self, file: &Rc<File>, at: u64, to: &Sg) -> io::Result<usize> {
        let done = self.read_some(file, at, to).await?;
        if done == to.len() || done == 0 {
            return Ok(done);
        }
        // Seldom, so boxed: the future of every read is as large as what it may wait for.
        Box::pin(self.read_on(file, at, to, done)).await
    }

    async fn read_on(&self, file: &Rc<File>, at: u64, to: &Sg, mut done: usize) -> io::Result<usize> {
        loop {
            let n = self.read_some(file, at + done as u64, &to.slice(done, to.len() - done)).await?;
            done += n;
            if n == 0 || done == to.len() {
                return Ok(done);
            }
        }
    }

    /// Reads all of `to`; what lies beyond the end of the file reads as zeros.
    pub async fn read_or_zero(&self, file: &Rc<File>, at: u64, to: &Sg) -> io::Result<()> {
        let n = self.read(file, at, to).await?;
        to.fill(n, to.len() - n, 0);
        Ok(())
    }

    /// Writes all of `from`; with `dsync` it is on stable storage at the end, with the metadata needed to read it.
    pub async fn write(&self, file: &Rc<File>, at: u64, from: &Sg, dsync: bool) -> io::Result<()> {
        let done = self.start(Request::Write { at, dsync }, Some(file), from).await?;
        match done == from.len() {
            true => Ok(()),
            false => Box::pin(self.write_on(file, at, from, dsync, done)).await,
        }
    }

    async fn write_on(
        &self,
        file: &Rc<File>,
        at: u64,
        from: &Sg,
        dsync: bool,
        mut done: usize,
    ) -> io::Result<()> {
        while done < from.len() {
            let rest = from.slice(done, from.len() - done);
            let n = self.start(Request::Write { at: at + done as u64, dsync }, Some(file), &rest).await?;
            if n == 0 {
                return Err(io::Error::new(io::ErrorKind::WriteZero, "the file takes no more bytes"));
            }
            done += n;
        }
        Ok(())
    }

    /// `fdatasync`.
    pub async fn fdatasync(&self, file: &Rc<File>) -> io::Result<()> {
        self.start(Request::Fdatasync, Some(file), &Sg::new()).await.map(drop)
    }

    /// `fallocate`; EOPNOTSUPP where the file system cannot.
    pub async fn fallocate(&self, file: &Rc<File>, what: Fallocate, at: u64, len: u64) -> io::Result<()> {
        self.start(Request::Fallocate { mode: what.mode(), at, len }, Some(file), &Sg::new()).await.map(drop)
    }

    /// Runs a call that may block (an ioctl, an open) on another thread.
    pub async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let slot = Arc::new(Mutex::new(None));
        let out = slot.clone();
        let run = move || {
            let value = call();
            if let Ok(mut out) = out.lock() {
                *out = Some(value);
            }
        };
        self.start(Request::Call(Box::new(run)), None, &Sg::new()).await?;
        let value = slot.lock().ok().and_then(|mut v| v.take());
        value.ok_or_else(|| io::Error::other("the call panicked"))
    }

    /// Waits that long.
    pub async fn sleep(&self, time: Duration) {
        let due = Instant::now() + time;
        let key = self.0.timers.borrow_mut().insert(Timer { waker: None, fired: false });
        self.0.due.borrow_mut().push(Reverse((due, key)));
        let guard = TimerGuard { io: self.clone(), key, due };
        poll_fn(|cx| {
            let mut timers = self.0.timers.borrow_mut();
            let timer = &mut timers[guard.key];
            if timer.fired {
                return Poll::Ready(());
            }
            timer.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Watches a (non-blocking) descriptor for readability for as long as the `Io` lives; `turn` returns when it is readable.
    pub fn watch(&self, fd: OwnedFd) -> io::Result<Rc<Watch>> {
        let raw = fd.as_raw_fd();
        let watch = Rc::new(Watch { fd: Rc::new(fd), raw, ready: Cell::new(false), armed: Cell::new(false) });
        self.0.watches.borrow_mut().push(watch.clone());
        Ok(watch)
    }

    /// Submits what was asked for since the last turn, waits as told, and completes what is done: tasks that waited for
    /// it are woken. Returns at once if anything completes.
    ///
    /// # Errors
    /// Those of `io_uring_enter` or `ppoll` that no retry mends; [`super::fence::FenceLost`] for good.
    pub fn turn(&self, wait: Wait) -> io::Result<()> {
        let wait = match self.next_timer() {
            Some(due) if wait != Wait::No => {
                let left = due.saturating_duration_since(Instant::now());
                match wait {
                    Wait::AtMost(most) => Wait::AtMost(most.min(left)),
                    _ => Wait::AtMost(left),
                }
            }
            _ => wait,
        };
        let Some(wait) = self.fenced_wait(wait)? else {
            self.reap_pool();
            self.fire_timers();
            return Ok(());
        };
        match &self.0.engine {
            Engine::Uring(uring) => {
                // Nothing that could have completed: what the kernel has to say of watches can wait until the thread sleeps.
                let idle = wait == Wait::No && self.0.under_way.get() == 0;
                let watches = self.0.watches.borrow();
                let mut uring = uring.borrow_mut();
                let turned = uring.turn(&watches, wait, idle, |key, result| self.complete(key, result));
                self.counted(uring.take_enters(), 0);
                turned?;
            }
            Engine::Threads if wait == Wait::No && self.0.polls.borrow().is_empty() => {}
            Engine::Threads => {
                self.counted(1, 0);
                let done = {
                    let (watches, polls) = (self.0.watches.borrow(), self.0.polls.borrow());
                    threads::wait(&watches, &polls, wait)?
                };
                for (key, events) in done {
                    self.0.polls.borrow_mut().retain(|p| p.key != key);
                    self.complete(key, events);
                }
            }
        }
        self.reap_pool();
        self.fire_timers();
        Ok(())
    }

    fn next_timer(&self) -> Option<Instant> {
        self.0.due.borrow().peek().map(|Reverse((due, _))| *due)
    }

    fn fire_timers(&self) {
        if self.0.due.borrow().is_empty() {
            return;
        }
        let now = Instant::now();
        loop {
            let key = match self.0.due.borrow().peek() {
                Some(Reverse((due, key))) if *due <= now => *key,
                _ => return,
            };
            self.0.due.borrow_mut().pop();
            let waker = self.0.timers.borrow_mut().get_mut(key).and_then(|t| {
                t.fired = true;
                t.waker.take()
            });
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    fn complete(&self, key: usize, result: i32) {
        let mut ops = self.0.ops.borrow_mut();
        let Some(op) = ops.get_mut(key) else { return };
        op.result = Some(result);
        self.0.under_way.set(self.0.under_way.get() - 1);
        let waker = op.waker.take();
        if op.abandoned {
            let op = ops.remove(key);
            drop(ops);
            self.forget(op);
        } else {
            drop(ops);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn start(&self, request: Request, file: Option<&Rc<File>>, sg: &Sg) -> OpFuture {
        let fd = file.map_or(-1, |f| f.as_raw_fd());
        let uring = match &self.0.engine {
            Engine::Uring(uring) if !matches!(request, Request::Call(_)) => Some(uring),
            _ => None,
        };
        // One piece goes into the entry of io_uring itself.
        let one: [libc::iovec; 1];
        let mut iovecs = Vec::new();
        if sg.segments() > 1 || uring.is_none() {
            iovecs = self.0.spare.borrow_mut().pop().unwrap_or_default();
            iovecs.extend(sg.iovecs().take(IOV_MAX));
        }
        let op = Op {
            result: None,
            waker: None,
            abandoned: false,
            poll: matches!(request, Request::Poll { .. }),
            file: file.cloned(),
            memory: sg.hold(),
            iovecs,
        };
        let mut ops = self.0.ops.borrow_mut();
        let key = ops.insert(op);
        self.0.under_way.set(self.0.under_way.get() + 1);
        self.counted(0, 1);
        let pieces: &[libc::iovec] = match sg.iovecs().next() {
            Some(first) if ops[key].iovecs.is_empty() => {
                one = [first];
                &one
            }
            _ => &ops[key].iovecs,
        };
        let started = match (uring, request) {
            (Some(uring), request) => uring.borrow_mut().push(key, fd, &request, pieces),
            (None, Request::Poll { events }) => {
                self.0.polls.borrow_mut().push(Polled { key, fd, events });
                Ok(())
            }
            (None, request) => self.with_pool(|pool| pool.push(key, fd, request, pieces)),
        };
        if let Err(e) = started {
            ops[key].result = Some(-e.raw_os_error().unwrap_or(libc::EIO));
            self.0.under_way.set(self.0.under_way.get() - 1);
        }
        drop(ops);
        OpFuture { io: self.clone(), key }
    }

    /// Lets go of an operation that has its result.
    fn forget(&self, mut op: Op) {
        let mut iovecs = std::mem::take(&mut op.iovecs);
        if iovecs.capacity() > 0 {
            iovecs.clear();
            let mut spare = self.0.spare.borrow_mut();
            if spare.len() < SPARE {
                spare.push(iovecs);
            }
        }
    }

    fn with_pool(&self, f: impl FnOnce(&Pool)) -> io::Result<()> {
        let mut pool = self.0.pool.borrow_mut();
        if pool.is_none() {
            let (new, fd) = Pool::new()?;
            new.set_fence(self.0.fence.borrow().clone());
            *self.0.pool_watch.borrow_mut() = Some(self.watch(fd)?);
            *pool = Some(new);
        }
        if let Some(pool) = &*pool {
            f(pool);
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The kernel (or the pool) may still write into memory that the operations own: wait for all of it.
        if let Some(pool) = self.pool.get_mut().take() {
            pool.stop();
            let mut results = Vec::new();
            pool.take_done(&mut results);
            for (key, result) in results {
                if let Some(op) = self.ops.get_mut().get_mut(key) {
                    op.result = Some(result);
                }
            }
        }
        let Engine::Uring(uring) = &self.engine else { return };
        let ops = &self.ops;
        let done = |key, result| {
            if let Some(op) = ops.borrow_mut().get_mut(key) {
                op.result = Some(result);
            }
        };
        // To enter the kernel is to submit what is queued, which is no longer to be written then.
        if !self.is_fenced_off()
            && let Err(error) = uring.borrow_mut().disarm(&self.watches.borrow(), done)
        {
            tracing::debug!(%error, "what was watched stays open until the kernel has taken the ring apart");
        }
        loop {
            if ops.borrow().iter().all(|(_, op)| op.result.is_some()) {
                return;
            }
            if self.is_fenced_off() || uring.borrow_mut().turn(&[], Wait::Event, false, done).is_err() {
                // Leaking beats giving the kernel's target memory to somebody else.
                std::mem::forget(std::mem::take(&mut *self.ops.borrow_mut()));
                return;
            }
        }
    }
}

struct TimerGuard {
    io: Io,
    key: usize,
    due: Instant,
}

impl Drop for TimerGuard {
    fn drop(&mut self) {
        let timer = self.io.0.timers.borrow_mut().remove(self.key);
        if !timer.fired {
            let (due, key) = (self.due, self.key);
            self.io.0.due.borrow_mut().retain(|Reverse((d, k))| !(*k == key && *d == due));
        }
    }
}

#[cfg(test)]
mod tests;
