//! I/O under a [`Fence`]: nothing reaches the kernel unless the files are known to be ours at that moment.
//!
//! What was asked for meanwhile waits, as it would for storage that does not answer, and the thread goes on turning. Once they are another's,
//! [`Io::turn`] fails for good, and what was queued is never handed on.

use std::{io, time::Duration};

use super::{Engine, Inner, Io, Wait};
use crate::sys::fence::{Fence, FenceLost, Standing};

/// How long is waited between two looks at a fence that has expired.
pub(super) const LOOK: Duration = Duration::from_millis(20);

/// The error of what is not begun any more.
pub(super) fn lost() -> io::Error {
    io::Error::other(FenceLost)
}

impl Inner {
    pub(super) fn is_fenced_off(&self) -> bool {
        self.fence.borrow().as_ref().is_some_and(|fence| fence.standing() != Standing::Holds)
    }
}

impl Io {
    /// Puts all file I/O of this thread under the fence from now on; `None` ends that.
    pub fn set_fence(&self, fence: Option<Fence>) {
        if let Engine::Uring(uring) = &self.0.engine {
            uring.borrow_mut().fence.clone_from(&fence);
        }
        if let Some(pool) = &*self.0.pool.borrow() {
            pool.set_fence(fence.clone());
        }
        self.0.fence.replace(fence);
    }

    /// Whether nothing is handed to the kernel for now, or any more.
    pub fn is_fenced_off(&self) -> bool {
        self.0.is_fenced_off()
    }

    /// How a turn may go: none at all (`Ok(None)`), or with that wait.
    pub(super) fn fenced_wait(&self, wait: Wait) -> io::Result<Option<Wait>> {
        let standing = self.0.fence.borrow().as_ref().map_or(Standing::Holds, Fence::standing);
        match standing {
            Standing::Holds => Ok(Some(wait)),
            Standing::Lost => Err(lost()),
            Standing::Expired => {
                std::thread::sleep(LOOK);
                let queued = match &self.0.engine {
                    Engine::Uring(uring) => uring.borrow_mut().has_queued(),
                    // The pool's threads look at the fence themselves.
                    Engine::Threads => false,
                };
                Ok((!queued).then_some(Wait::No))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Seek},
        rc::Rc,
    };

    use super::*;
    use crate::sys::{exec::Executor, fence::since_boot, io::Backend, mem::Buffer};

    fn content(file: &Rc<File>) -> Vec<u8> {
        let (mut file, mut text) = (&**file, Vec::new());
        file.rewind().unwrap();
        file.read_to_end(&mut text).unwrap();
        text
    }

    /// A write that is asked for while the fence is down.
    fn asked(io: &Io, exec: &Executor, file: &Rc<File>, byte: u8) -> Rc<std::cell::Cell<bool>> {
        let done = Rc::new(std::cell::Cell::new(false));
        let (io, file, told) = (io.clone(), file.clone(), done.clone());
        exec.spawn(async move {
            let written = io.write(&file, 0, &Buffer::from_slice(&[byte; 8]).sg(), false).await;
            told.set(written.is_ok());
        });
        exec.run_ready();
        done
    }

    #[test]
    fn what_is_asked_for_under_an_expired_fence_waits_until_it_holds_again() {
        for backend in [Backend::Uring, Backend::Threads] {
            let (io, exec) = (Io::new(backend).unwrap(), Executor::new());
            let file = Rc::new(tempfile::tempfile().unwrap());
            let fence = Fence::default();
            io.set_fence(Some(fence.clone()));
            assert!(io.is_fenced_off());
            let done = asked(&io, &exec, &file, 1);
            for _ in 0..10 {
                io.turn(Wait::Event).unwrap();
                exec.run_ready();
            }
            assert_eq!((content(&file), done.get()), (vec![], false), "{backend}");
            fence.holds_until(since_boot() + Duration::from_secs(60));
            while !done.get() {
                io.turn(Wait::AtMost(Duration::from_secs(1))).unwrap();
                exec.run_ready();
            }
            assert_eq!(content(&file), [1; 8], "{backend}");
        }
    }

    #[test]
    fn what_was_queued_when_the_files_were_lost_never_reaches_them() {
        for backend in [Backend::Uring, Backend::Threads] {
            let (io, exec) = (Io::new(backend).unwrap(), Executor::new());
            let file = Rc::new(tempfile::tempfile().unwrap());
            let fence = Fence::default();
            // On io_uring it is queued while the files are ours still, as by a process that is stopped between the two.
            if backend == Backend::Uring {
                fence.holds_until(since_boot() + Duration::from_secs(60));
            }
            io.set_fence(Some(fence.clone()));
            let done = asked(&io, &exec, &file, 2);
            fence.lose();
            for _ in 0..3 {
                let e = io.turn(Wait::Event).unwrap_err();
                assert!(e.to_string().contains("taken the image over"), "{e}");
            }
            // More than the ring's queue takes.
            (0..600).for_each(|_| drop(asked(&io, &exec, &file, 3)));
            assert!(io.turn(Wait::No).is_err());
            exec.clear();
            drop((exec, io));
            assert_eq!((content(&file), done.get()), (vec![], false), "{backend}");
        }
    }

    #[test]
    fn a_fence_that_is_taken_away_leaves_the_thread_free() {
        crate::sys::run_on(Backend::Threads, async |io| {
            let file = Rc::new(tempfile::tempfile().unwrap());
            let fence = Fence::default();
            fence.holds_until(since_boot() + Duration::from_secs(60));
            io.set_fence(Some(fence.clone()));
            io.write(&file, 0, &Buffer::from_slice(&[4; 8]).sg(), false).await.unwrap();
            io.set_fence(None);
            fence.lose();
            assert!(!io.is_fenced_off());
            io.write(&file, 8, &Buffer::from_slice(&[5; 8]).sg(), false).await.unwrap();
            assert_eq!(content(&file).len(), 16);
        });
    }
}
