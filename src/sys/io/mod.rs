//! Asynchronous file I/O for one thread: [`Io`] hands out futures, [`Io::turn`] submits, waits and completes.
//!
//! Two backends behind the same futures: io_uring, and a small pool of threads with `preadv2`/`pwritev2` where io_uring is not
//! permitted. An operation owns what it works on (file, memory) until the kernel has finished, so its future may be dropped
//! at any time. The thread sleeps in `turn` alone: completions, watched descriptors and timers all arrive there.

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
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use slab::Slab;

use super::mem::Sg;
use threads::Pool;
use uring::Uring;

/// IOV_MAX of Linux: longer scatter lists go in several operations.
const IOV_MAX: usize = 1024;

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

/// What a fallocate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallocate {
    /// Allocates zeros, and lets the file grow.
    Allocate,
    /// Frees the range (it reads as zeros), and keeps the size.
    PunchHole,
    /// Makes the range zeros that are allocated, and keeps the size.
    ZeroRange,
}

impl Fallocate {
    fn mode(self) -> libc::c_int {
        match self {
            Fallocate::Allocate => 0,
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
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
    Read { at: u64 },
    Write { at: u64, dsync: bool },
    Fdatasync,
    Fallocate { mode: libc::c_int, at: u64, len: u64 },
    Call(Box<dyn FnOnce() + Send>),
}

/// An operation under way. Everything that the kernel may touch is owned here until the result is in.
struct Op {
    result: Option<i32>,
    waker: Option<Waker>,
    abandoned: bool,
    #[allow(dead_code)] // Held, never read: it keeps the descriptor open.
    file: Option<Rc<File>>,
    #[allow(dead_code)] // Held, never read: it keeps the memory alive.
    sg: Sg,
    iovecs: Vec<libc::iovec>,
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
}

enum Engine {
    Uring(Box<RefCell<Uring>>),
    Threads,
}

struct Inner {
    ops: RefCell<Slab<Op>>,
    engine: Engine,
    /// Started with the first work for it: the whole backend, or under io_uring what has no opcode.
    pool: RefCell<Option<Pool>>,
    pool_watch: RefCell<Option<Rc<Watch>>>,
    watches: RefCell<Vec<Rc<Watch>>>,
    timers: RefCell<Slab<Timer>>,
    due: RefCell<BinaryHeap<Reverse<(Instant, usize)>>>,
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
            engine,
            pool: RefCell::default(),
            pool_watch: RefCell::default(),
            watches: RefCell::default(),
            timers: RefCell::default(),
            due: RefCell::default(),
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
        self.0.ops.borrow().iter().filter(|(_, op)| op.result.is_none()).count()
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
    /// Those of `io_uring_enter` or `ppoll` that no retry mends.
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
        match &self.0.engine {
            Engine::Uring(uring) => {
                let watches = self.0.watches.borrow();
                uring.borrow_mut().turn(&watches, wait, |key, result| self.complete(key, result))?;
            }
            Engine::Threads => {
                let watches = self.0.watches.borrow();
                threads::wait(&watches, wait)?;
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

    fn reap_pool(&self) {
        let watch = self.0.pool_watch.borrow().clone();
        let Some(watch) = watch else { return };
        if !watch.take_ready() {
            return;
        }
        let done = match &*self.0.pool.borrow() {
            Some(pool) => pool.take_done(),
            None => return,
        };
        for (key, result) in done {
            self.complete(key, result);
        }
    }

    fn complete(&self, key: usize, result: i32) {
        let mut ops = self.0.ops.borrow_mut();
        let Some(op) = ops.get_mut(key) else { return };
        op.result = Some(result);
        let waker = op.waker.take();
        if op.abandoned {
            let op = ops.remove(key);
            drop(ops);
            drop(op);
        } else {
            drop(ops);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn start(&self, request: Request, file: Option<&Rc<File>>, sg: &Sg) -> OpFuture {
        let mut iovecs = Vec::new();
        sg.iovecs(&mut iovecs);
        iovecs.truncate(IOV_MAX);
        let fd = file.map_or(-1, |f| f.as_raw_fd());
        let mut ops = self.0.ops.borrow_mut();
        let op =
            Op { result: None, waker: None, abandoned: false, file: file.cloned(), sg: sg.clone(), iovecs };
        let key = ops.insert(op);
        let iovecs: &[libc::iovec] = &ops[key].iovecs;
        let started = match (&self.0.engine, request) {
            (Engine::Uring(uring), request) if !matches!(request, Request::Call(_)) => {
                uring.borrow_mut().push(key, fd, &request, iovecs)
            }
            (_, request) => self.with_pool(|pool| pool.push(key, fd, request, iovecs)),
        };
        if let Err(e) = started {
            ops[key].result = Some(-e.raw_os_error().unwrap_or(libc::EIO));
        }
        drop(ops);
        OpFuture { io: self.clone(), key }
    }

    fn with_pool(&self, f: impl FnOnce(&Pool)) -> io::Result<()> {
        let mut pool = self.0.pool.borrow_mut();
        if pool.is_none() {
            let (new, fd) = Pool::new()?;
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
            for (key, result) in pool.take_done() {
                if let Some(op) = self.ops.get_mut().get_mut(key) {
                    op.result = Some(result);
                }
            }
        }
        let Engine::Uring(uring) = &self.engine else { return };
        loop {
            let ops = &self.ops;
            if ops.borrow().iter().all(|(_, op)| op.result.is_some()) {
                return;
            }
            let done = |key, result| {
                if let Some(op) = ops.borrow_mut().get_mut(key) {
                    op.result = Some(result);
                }
            };
            if uring.borrow_mut().turn(&[], Wait::Event, done).is_err() {
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

/// Waits for one operation; dropping it lets the operation finish on its own.
struct OpFuture {
    io: Io,
    key: usize,
}

impl Future for OpFuture {
    type Output = io::Result<usize>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut ops = self.io.0.ops.borrow_mut();
        let op = &mut ops[self.key];
        match op.result {
            Some(n) if n < 0 => Poll::Ready(Err(io::Error::from_raw_os_error(-n))),
            Some(n) => Poll::Ready(Ok(n as usize)),
            None => {
                if !op.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    op.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

impl Drop for OpFuture {
    fn drop(&mut self) {
        let mut ops = self.io.0.ops.borrow_mut();
        if ops[self.key].result.is_some() {
            let op = ops.remove(self.key);
            drop(ops);
            drop(op);
        } else {
            ops[self.key].abandoned = true;
            ops[self.key].waker = None;
        }
    }
}

#[cfg(test)]
mod tests;
