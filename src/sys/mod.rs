//! The system beneath: the one room with unsafe code. Memory, the executor, asynchronous I/O.
//!
//! Each file wraps one facility of the kernel in an interface that safe code cannot misuse.
#![allow(unsafe_code)]

pub mod clock;
pub mod count;
pub mod exec;
pub mod fence;
pub mod io;
pub mod mem;
pub mod ofd;
pub mod pool;
pub mod sg;
pub mod signals;
pub mod socket;
pub mod vhost;

use std::{cell::RefCell, rc::Rc};

use exec::Executor;
use io::{Backend, Io, Wait};

/// The backend that `TCMU_DIF_IO` names (`uring`, `threads`), which is how the test suite runs on both; io_uring otherwise.
pub fn backend_from_env() -> Backend {
    match std::env::var("TCMU_DIF_IO").as_deref() {
        Ok("threads") => Backend::Threads,
        _ => Backend::Uring,
    }
}

/// Runs one future to its end on this thread, with I/O: for tools and tests. A LUN has its own loop.
///
/// # Panics
/// If the kernel refuses the backend altogether.
pub fn run_on<T: 'static>(backend: Backend, main: impl AsyncFnOnce(Io) -> T + 'static) -> T {
    let io = match Io::new(backend) {
        Ok(io) => io,
        Err(e) => panic!("{backend} is not to be had: {e}"),
    };
    drive(io, main)
}

/// [`run_on`] the best backend that the kernel permits, or the one that the environment names.
pub fn run<T: 'static>(main: impl AsyncFnOnce(Io) -> T + 'static) -> T {
    let io = match backend_from_env() {
        Backend::Threads => Io::new(Backend::Threads).ok(),
        Backend::Uring => None,
    };
    drive(io.unwrap_or_else(|| Io::best().0), main)
}

fn drive<T: 'static>(io: Io, main: impl AsyncFnOnce(Io) -> T + 'static) -> T {
    let exec = Executor::new();
    let out = Rc::new(RefCell::new(None));
    let (slot, handle) = (out.clone(), io.clone());
    exec.spawn(async move {
        let value = main(handle).await;
        *slot.borrow_mut() = Some(value);
    });
    loop {
        exec.run_ready();
        if let Some(value) = out.borrow_mut().take() {
            return value;
        }
        let wait = if exec.has_ready() { Wait::No } else { Wait::Event };
        if let Err(e) = io.turn(wait) {
            panic!("the I/O backend failed: {e}");
        }
    }
}
