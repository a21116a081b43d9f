//! A gate that operations pass one by one and that can be shut: whoever shuts it waits until nobody is inside, and those who
//! come meanwhile wait until it is opened again. Passing an open gate costs a counter.
//!
//! An image has two: all that changes it passes one, all that reads it the other. A snapshot shuts the first while it builds its
//! tables, which is what makes it a point in time, and the second for the moment in which tables and clusters change hands.

use std::cell::Cell;

use crate::sync::{AsyncMutex, AsyncMutexGuard, Notify};

/// See the module.
#[derive(Default)]
pub struct Gate {
    inside: Cell<u32>,
    shut: Cell<bool>,
    changed: Notify,
    turn: AsyncMutex,
}

/// Somebody inside.
pub struct Inside<'a>(&'a Gate);

/// The gate is shut as long as this lives.
pub struct Shut<'a> {
    gate: &'a Gate,
    _turn: AsyncMutexGuard<'a>,
}

impl Gate {
    /// Passes, as soon as the gate is open.
    pub async fn enter(&self) -> Inside<'_> {
        loop {
            if let Some(inside) = self.try_enter() {
                return inside;
            }
            self.changed.wait().await;
        }
    }

    /// Passes if the gate is open.
    pub fn try_enter(&self) -> Option<Inside<'_>> {
        if self.shut.get() {
            return None;
        }
        self.inside.set(self.inside.get() + 1);
        Some(Inside(self))
    }

    /// Shuts the gate, and waits until nobody is inside.
    pub async fn shut(&self) -> Shut<'_> {
        let turn = self.turn.lock().await;
        self.shut.set(true);
        let shut = Shut { gate: self, _turn: turn };
        while self.inside.get() > 0 {
            self.changed.wait().await;
        }
        shut
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let left = self.0.inside.get() - 1;
        self.0.inside.set(left);
        if left == 0 && self.0.shut.get() {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.gate.shut.set(false);
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use super::*;
    use crate::sys::exec::{Executor, yield_now};

    #[test]
    fn who_shuts_it_is_alone_and_the_others_come_after() {
        let exec = Executor::new();
        let gate = Rc::new(Gate::default());
        let log: Rc<RefCell<Vec<&str>>> = Rc::default();
        for (name, shuts) in [("a", false), ("b", false), ("S", true), ("T", true), ("c", false)] {
            let (gate, log) = (gate.clone(), log.clone());
            exec.spawn(async move {
                if shuts {
                    let _shut = gate.shut().await;
                    assert!(gate.try_enter().is_none());
                    log.borrow_mut().push(name);
                    yield_now().await;
                    log.borrow_mut().push(name);
                } else {
                    let _inside = gate.enter().await;
                    yield_now().await;
                    yield_now().await;
                    log.borrow_mut().push(name);
                }
            });
        }
        while exec.run_ready() {}
        let log = log.borrow();
        assert_eq!(log[..4], ["a", "b", "S", "S"]);
        assert_eq!((exec.tasks(), log.len(), gate.inside.get()), (0, 7, 0));
    }

    #[test]
    fn a_shutter_who_gives_up_opens_it_again() {
        let exec = Executor::new();
        exec.spawn(async {
            let gate = Gate::default();
            let inside = gate.enter().await;
            let mut shutting = Box::pin(gate.shut());
            std::future::poll_fn(|cx| {
                assert!(shutting.as_mut().poll(cx).is_pending());
                std::task::Poll::Ready(())
            })
            .await;
            assert!(gate.try_enter().is_none());
            drop(shutting);
            drop(inside);
            drop(gate.shut().await);
            assert!(gate.try_enter().is_some());
        });
        while exec.run_ready() {}
        assert_eq!(exec.tasks(), 0);
    }
}
