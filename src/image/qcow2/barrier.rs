//! Two kinds of waiting that keep metadata safe: [`Barrier`], one fdatasync shared by all who need one, and [`Epochs`], which
//! tells when everybody who may still use a cluster is done with it.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
};

use crate::sync::Notify;

/// Syncs that are shared: a caller gets one that began after its call, together with all who called before it began. The
/// first that fails is the last: the kernel has dropped the error, and nothing can be promised any more.
#[derive(Default)]
pub struct Barrier {
    started: Cell<u64>,
    done: Cell<u64>,
    running: Cell<bool>,
    failed: Cell<bool>,
    ended: Notify,
}

/// How a barrier ends badly.
pub enum Lost {
    /// This one failed.
    Now(io::Error),
    /// One has failed before, or an operation was dropped half way.
    Before,
}

struct Running<'a>(&'a Barrier);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(false);
        self.0.ended.notify_all();
    }
}

impl Barrier {
    /// Whether a sync has failed.
    pub fn has_failed(&self) -> bool {
        self.failed.get()
    }

    /// From now on every sync fails.
    pub fn fail(&self) {
        self.failed.set(true);
        self.ended.notify_all();
    }

    /// The stamp of what is written now: durable when [`Barrier::covers`] it.
    pub fn stamp(&self) -> u64 {
        self.started.get()
    }

    /// Whether what was stamped is durable.
    pub fn covers(&self, stamp: u64) -> bool {
        self.done.get() > stamp
    }

    /// Waits until all that was written before the call is durable; `flush` is what makes it so.
    pub async fn sync(&self, flush: impl AsyncFn() -> io::Result<()>) -> Result<(), Lost> {
        let stamp = self.stamp();
        loop {
            if self.failed.get() {
                return Err(Lost::Before);
            }
            if self.covers(stamp) {
                return Ok(());
            }
            if self.running.get() {
                self.ended.wait().await;
                continue;
            }
            let id = self.started.get() + 1;
            self.started.set(id);
            self.running.set(true);
            let running = Running(self);
            match flush().await {
                Ok(()) => self.done.set(id),
                Err(e) => {
                    self.failed.set(true);
                    return Err(Lost::Now(e));
                }
            }
            drop(running);
        }
    }
}

/// Who is at work. A cluster freed in one epoch is free for others when nobody of that epoch or before is left.
#[derive(Default)]
pub struct Epochs {
    current: Cell<u64>,
    active: RefCell<VecDeque<(u64, u32)>>,
}

/// Somebody at work.
pub struct AtWork<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Epochs {
    /// Joins the current epoch.
    pub fn enter(&self) -> AtWork<'_> {
        let epoch = self.current.get();
        let mut active = self.active.borrow_mut();
        match active.back_mut() {
            Some((e, count)) if *e == epoch => *count += 1,
            _ => active.push_back((epoch, 1)),
        }
        AtWork { epochs: self, epoch }
    }

    /// The epoch of what is freed now.
    pub fn current(&self) -> u64 {
        self.current.get()
    }

    /// Begins a new epoch.
    pub fn advance(&self) {
        self.current.set(self.current.get() + 1);
    }

    /// Whether nobody of that epoch or before is left.
    pub fn is_past(&self, epoch: u64) -> bool {
        self.active.borrow().front().is_none_or(|(first, _)| *first > epoch)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let mut active = self.epochs.active.borrow_mut();
        if let Some((_, count)) = active.iter_mut().find(|(e, _)| *e == self.epoch) {
            *count -= 1;
        }
        while active.front().is_some_and(|(_, count)| *count == 0) {
            active.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_freed_waits_for_those_who_were_there() {
        let epochs = Epochs::default();
        let old = epochs.enter();
        let freed = epochs.current();
        assert!(!epochs.is_past(freed));
        epochs.advance();
        let new = epochs.enter();
        assert!(!epochs.is_past(freed));
        drop(old);
        assert!(epochs.is_past(freed) && !epochs.is_past(epochs.current()));
        drop(new);
        assert!(epochs.is_past(epochs.current()));
    }
}
