//! The future of one operation.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use super::{Engine, Io};

/// Waits for one operation; dropping it lets the operation finish on its own, or takes it back if it only waits itself.
pub(super) struct OpFuture {
    pub(super) io: Io,
    pub(super) key: usize,
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
            self.io.forget(op);
            return;
        }
        let op = &mut ops[self.key];
        op.abandoned = true;
        op.waker = None;
        if !op.poll {
            return;
        }
        drop(ops);
        match &self.io.0.engine {
            // Its completion comes all the same. If the kernel takes no more it ends with the descriptor's next event.
            Engine::Uring(uring) => drop(uring.borrow_mut().cancel_poll(self.key)),
            Engine::Threads => {
                self.io.0.polls.borrow_mut().retain(|p| p.key != self.key);
                self.io.complete(self.key, -libc::ECANCELED);
            }
        }
    }
}
