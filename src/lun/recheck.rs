//! A LUN's look at what a crash has left in doubt, while it serves: so a restart takes as long as opening the image does, however much was
//! being written. It takes half the time at most; the rest is for the LUN's commands, which look first at what they need.

use std::{
    cell::Cell,
    pin::Pin,
    task::Poll,
    time::{Duration, Instant},
};

use tracing::error;

use crate::{pi::Protected, storage::Storage, sys::io::Io, volume::Volume};

/// The longest that it waits after a step, so that slow storage does not make it slower than it has to be.
const PAUSE: Duration = Duration::from_millis(20);

/// The look of one LUN, on its thread.
#[derive(Default)]
pub(super) struct Rechecker {
    at_work: Cell<bool>,
    over: Cell<bool>,
}

impl Rechecker {
    /// Looks at what is left, a step at a time, until all is done or the LUN has another image. A step is never cut off.
    pub(super) async fn run<V: Volume, S: Storage>(
        &self,
        protected: &Protected<V, S>,
        io: &Io,
        mut moved: Pin<&mut impl Future<Output = ()>>,
    ) {
        loop {
            let moved = std::future::poll_fn(|cx| Poll::Ready(moved.as_mut().poll(cx).is_ready())).await;
            if moved || self.over.get() {
                return;
            }
            let began = Instant::now();
            self.at_work.set(true);
            let step = protected.recheck_next().await;
            self.at_work.set(false);
            match step {
                Ok(true) => io.sleep(began.elapsed().min(PAUSE)).await,
                Ok(false) => return,
                Err(error) => {
                    let left = protected.counters().unchecked;
                    error!(%error, left, "what a crash has left cannot be rechecked: the rest is when it is used, or at the LUN's next start");
                    return;
                }
            }
        }
    }

    /// Whether a step is under way, which writes.
    pub(super) fn is_at_work(&self) -> bool {
        self.at_work.get()
    }

    /// No further step is made.
    pub(super) fn end(&self) {
        self.over.set(true);
    }
}
