//! The io_uring engine: one ring for a thread, one `io_uring_enter` a turn.

use std::{
    io,
    rc::Rc,
    time::{Duration, Instant},
};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::{Request, Wait, Watch, fenced};
use crate::sys::fence::{Fence, Standing};

const ENTRIES: u32 = 256;
/// user_data of watches; operations have their slab keys.
const WATCH: u64 = 1 << 63;
/// user_data of what takes other operations back; its own result says nothing.
const CANCEL: u64 = 1 << 62;

pub(super) struct Uring {
    ring: IoUring,
    /// Calls of `io_uring_enter` that nobody has asked for yet.
    enters: u64,
    /// What all of it is under.
    pub(super) fence: Option<Fence>,
}

impl Uring {
    pub(super) fn new() -> io::Result<Uring> {
        // The best set-up first: a single issuer whose task work runs when it asks for it (6.1), then plain.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(ENTRIES * 8)
            .build(ENTRIES)
            .or_else(|_| IoUring::builder().setup_cqsize(ENTRIES * 8).build(ENTRIES))?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        Ok(Uring { ring, enters: 0, fence: None })
    }

    /// Queues one operation. `iovecs` must stay where it is until the completion.
    pub(super) fn push(
        &mut self,
        key: usize,
        fd: i32,
        request: &Request,
        iovecs: &[libc::iovec],
    ) -> io::Result<()> {
        let fd = types::Fd(fd);
        let flags = |dsync: bool| if dsync { libc::RWF_DSYNC } else { 0 };
        let entry = match (request, iovecs) {
            (Request::Read { at }, [one]) => {
                opcode::Read::new(fd, one.iov_base.cast(), clamp(one.iov_len)).offset(*at).build()
            }
            (Request::Read { at }, many) => {
                opcode::Readv::new(fd, many.as_ptr(), many.len() as u32).offset(*at).build()
            }
            (Request::Write { at, dsync }, [one]) => {
                opcode::Write::new(fd, one.iov_base.cast_const().cast(), clamp(one.iov_len))
                    .offset(*at)
                    .rw_flags(flags(*dsync))
                    .build()
            }
            (Request::Write { at, dsync }, many) => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
                .offset(*at)
                .rw_flags(flags(*dsync))
                .build(),
            (Request::Fdatasync, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            (Request::Fallocate { mode, at, len }, _) => {
                opcode::Fallocate::new(fd, *len).offset(*at).mode(*mode).build()
            }
            (Request::Poll { events }, _) => opcode::PollAdd::new(fd, u32::from(*events as u16)).build(),
            (Request::Call(_), _) => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        self.push_entry(&entry.user_data(key as u64))
    }

    /// Takes back a [`Request::Poll`] that has not ended; it then ends with ECANCELED.
    pub(super) fn cancel_poll(&mut self, key: usize) -> io::Result<()> {
        self.push_entry(&opcode::PollRemove::new(key as u64).build().user_data(CANCEL))
    }

    fn push_entry(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the operation's descriptor, iovecs and memory are owned by its slot in `Inner::ops` until the
            // completion is reaped; a watch's descriptor by its `Watch`, which lives as long as the ring.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // Full, which a LUN that is held up comes to only with more than its commands ask for.
            match self.fence.as_ref().map_or(Standing::Holds, Fence::standing) {
                Standing::Holds => {}
                Standing::Lost => return Err(fenced::lost()),
                Standing::Expired => {
                    std::thread::sleep(fenced::LOOK);
                    continue;
                }
            }
            self.enters += 1;
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether there are operations that the kernel has not been told of.
    pub(super) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Whether the kernel has completed something, or would as soon as it is entered.
    pub(super) fn has_results(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// How often the kernel was entered since the last call.
    pub(super) fn take_enters(&mut self) -> u64 {
        std::mem::take(&mut self.enters)
    }

    /// With `idle` there are no operations under way.
    pub(super) fn turn(
        &mut self,
        watches: &[Rc<Watch>],
        wait: Wait,
        idle: bool,
        done: impl FnMut(usize, i32),
    ) -> io::Result<()> {
        for (i, watch) in watches.iter().enumerate() {
            if !watch.armed.get() {
                watch.armed.set(true);
                let poll = opcode::PollAdd::new(types::Fd(watch.raw), libc::POLLIN as u32).multi(true);
                self.push_entry(&poll.build().user_data(WATCH | i as u64))?;
            }
        }
        let queued = !self.ring.submission().is_empty();
        let arrived = !self.ring.completion().is_empty();
        let result = match wait {
            _ if arrived && !queued => Ok(0),
            Wait::No if idle && !queued => return Ok(()),
            Wait::Event if !arrived => {
                self.enters += 1;
                self.ring.submit_and_wait(1)
            }
            Wait::AtMost(time) if !arrived => {
                self.enters += 1;
                let ts = types::Timespec::from(time);
                self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&ts))
            }
            _ => {
                let (taskrun, overflow) = {
                    let sq = self.ring.submission();
                    (sq.taskrun(), sq.cq_overflow())
                };
                if queued || taskrun || overflow { self.enter_no_wait() } else { Ok(0) }
            }
        };
        match result {
            Err(e) if !is_for_another_turn(&e) => return Err(e),
            _ => {}
        }
        self.reap(watches, done);
        Ok(())
    }

    /// Takes what the kernel has completed.
    fn reap(&mut self, watches: &[Rc<Watch>], mut done: impl FnMut(usize, i32)) {
        for cqe in self.ring.completion() {
            let data = cqe.user_data();
            if data == CANCEL {
                continue;
            }
            if data & WATCH == 0 {
                done(data as usize, cqe.result());
            } else if let Some(watch) = watches.get((data & !WATCH) as usize) {
                watch.ready.set(true);
                watch.armed.set(cqueue::more(cqe.flags()));
            }
        }
    }

    /// Takes the watches back, and submits what is queued. The kernel holds what is watched open for as long as it watches, and takes a ring that is closed apart
    /// some time later; a UIO device cannot be opened again until then.
    ///
    /// # Errors
    /// That it has not come to an end within a second, or what the kernel says against it.
    pub(super) fn disarm(
        &mut self,
        watches: &[Rc<Watch>],
        mut done: impl FnMut(usize, i32),
    ) -> io::Result<()> {
        let until = Instant::now() + Duration::from_secs(1);
        for (i, _) in watches.iter().enumerate().filter(|(_, watch)| watch.armed.get()) {
            self.push_entry(&opcode::PollRemove::new(WATCH | i as u64).build().user_data(CANCEL))?;
        }
        while watches.iter().any(|watch| watch.armed.get()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let ts = types::Timespec::from(left);
            match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&ts)) {
                Err(e) if !is_for_another_turn(&e) => return Err(e),
                _ => self.reap(watches, &mut done),
            }
        }
        Ok(())
    }

    /// Submits, and runs deferred task work, without waiting.
    fn enter_no_wait(&mut self) -> io::Result<usize> {
        self.enters += 1;
        const GETEVENTS: u32 = 1;
        let queued = {
            let mut sq = self.ring.submission();
            sq.sync();
            sq.len()
        };
        // SAFETY: no argument is passed; what is submitted was vouched for when it was pushed.
        unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued as u32, 0, GETEVENTS, None) }
    }
}

/// ETIME: the wait is over. EINTR: a signal. EAGAIN, EBUSY: short of memory, or completions to reap first.
fn is_for_another_turn(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

fn clamp(len: usize) -> u32 {
    // MAX_RW_COUNT: the kernel would shorten it to this.
    len.min(0x7fff_f000) as u32
}
