//! The pool of threads: the whole backend where io_uring is not permitted, and under io_uring the place for calls that have
//! no opcode. Results come back through a queue and an eventfd, which the LUN's thread watches like any other descriptor.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use smallvec::SmallVec;

use super::{Polled, Request, Wait, Watch, fenced};
use crate::sys::fence::{Fence, Standing};

const THREADS: usize = 4;

struct Job {
    key: usize,
    fd: i32,
    request: Request,
    iovecs: *const libc::iovec,
    count: usize,
}

// SAFETY: the iovecs and the memory behind them are owned by the operation's slot, which the submitting thread keeps
// untouched until the result is in.
unsafe impl Send for Job {}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    stop: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    done: Mutex<Vec<(usize, i32)>>,
    /// There are results, and the event has been or is being set for them.
    announced: AtomicBool,
    event: OwnedFd,
    /// What all of it is under.
    fence: Mutex<Option<Fence>>,
}

pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Pool {
    /// Starts the threads; the descriptor is readable when results wait.
    pub(super) fn new() -> io::Result<(Pool, OwnedFd)> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let watched = event.try_clone()?;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            done: Mutex::default(),
            announced: AtomicBool::new(false),
            event,
            fence: Mutex::default(),
        });
        let threads = (0..THREADS)
            .map(|_| {
                let shared = shared.clone();
                std::thread::Builder::new().name("io".into()).spawn(move || shared.work_until_stopped())
            })
            .collect::<io::Result<Vec<_>>>()?;
        Ok((Pool { shared, threads: Mutex::new(threads) }, watched))
    }

    pub(super) fn push(&self, key: usize, fd: i32, request: Request, iovecs: &[libc::iovec]) {
        let job = Job { key, fd, request, iovecs: iovecs.as_ptr(), count: iovecs.len() };
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).jobs.push_back(job);
        self.shared.work.notify_one();
    }

    /// Puts what is begun from now on under the fence.
    pub(super) fn set_fence(&self, fence: Option<Fence>) {
        *self.shared.fence.lock().unwrap_or_else(PoisonError::into_inner) = fence;
    }

    /// Whether there are results; a load, and no system call.
    pub(super) fn has_done(&self) -> bool {
        self.shared.announced.load(Ordering::Acquire)
    }

    /// Gives the results since the last call, in a list that is empty.
    pub(super) fn take_done(&self, into: &mut Vec<(usize, i32)>) {
        // In this order: what is announced after the event was read, and before the flag is down, is in the list that is taken then. The other way
        // round the event of that result would be read here and its flag stay up, and no later result would ring.
        let _ = rustix::io::read(&self.shared.event, &mut [0u8; 8]);
        self.shared.announced.store(false, Ordering::SeqCst);
        std::mem::swap(&mut *self.shared.done.lock().unwrap_or_else(PoisonError::into_inner), into);
    }

    /// Finishes the queue and ends the threads.
    pub(super) fn stop(&self) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.shared.work.notify_all();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A thread that panicked has nothing more to say.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work_until_stopped(&self) {
        loop {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let job = loop {
                if let Some(job) = queue.jobs.pop_front() {
                    break job;
                }
                if queue.stop {
                    return;
                }
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            let key = job.key;
            let result = if self.may_begin() { job.run() } else { -libc::ESTALE };
            self.done.lock().unwrap_or_else(PoisonError::into_inner).push((key, result));
            if !self.announced.swap(true, Ordering::SeqCst) {
                let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
            }
        }
    }
}

impl Shared {
    /// Waits until the files are known to be ours; false, if they are another's.
    fn may_begin(&self) -> bool {
        let fence = self.fence.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(fence) = fence else { return true };
        loop {
            match fence.standing() {
                Standing::Holds => return true,
                Standing::Lost => return false,
                Standing::Expired => std::thread::sleep(fenced::LOOK),
            }
        }
    }
}

impl Job {
    fn run(self) -> i32 {
        let count = self.count as libc::c_int;
        let result = match self.request {
            Request::Call(call) => {
                let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
                return if caught.is_ok() { 0 } else { -libc::EIO };
            }
            // Waited for by the thread itself.
            Request::Poll { .. } => return -libc::EINVAL,
            Request::Read { at } => {
                // SAFETY: the descriptor is open, and the iovecs and their memory are live until the result is in; see `Job`.
                unsafe { libc::preadv2(self.fd, self.iovecs, count, at as i64, 0) }
            }
            Request::Write { at, dsync } => {
                let flags = if dsync { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(self.fd, self.iovecs, count, at as i64, flags) }
            }
            Request::Fdatasync => {
                // SAFETY: as above.
                unsafe { libc::fdatasync(self.fd) as isize }
            }
            Request::Fallocate { mode, at, len } => {
                // SAFETY: as above.
                unsafe { libc::fallocate(self.fd, mode, at as i64, len as i64) as isize }
            }
        };
        if result < 0 {
            -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
        } else {
            result as i32
        }
    }
}

/// Waits for one of the watches to become readable, or for what operations wait for: gives those that have ended.
pub(super) fn wait(watches: &[Rc<Watch>], polls: &[Polled], wait: Wait) -> io::Result<Vec<(usize, i32)>> {
    let timeout = match wait {
        Wait::No => Some(Duration::ZERO),
        Wait::Event => None,
        Wait::AtMost(time) => Some(time),
    };
    let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
    let mut fds: SmallVec<[PollFd<'_>; 4]> =
        watches.iter().map(|w| PollFd::from_borrowed_fd(borrow(w), PollFlags::IN)).collect();
    fds.extend(polls.iter().map(|p| {
        // SAFETY: the operation owns the descriptor until it has ended or is taken back, which removes it from the list.
        let fd = unsafe { BorrowedFd::borrow_raw(p.fd) };
        PollFd::from_borrowed_fd(fd, PollFlags::from_bits_truncate(p.events as u16))
    }));
    match poll(&mut fds, timeout.as_ref()) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    }
    let (of_watches, of_polls) = fds.split_at(watches.len());
    for (fd, watch) in of_watches.iter().zip(watches) {
        if !fd.revents().is_empty() {
            watch.ready.set(true);
        }
    }
    let ended = of_polls.iter().zip(polls).filter(|(fd, _)| !fd.revents().is_empty());
    Ok(ended.map(|(fd, p)| (p.key, i32::from(fd.revents().bits()))).collect())
}

fn borrow(watch: &Watch) -> BorrowedFd<'_> {
    watch.fd.as_fd()
}
