//! Keeps what has to be atomic apart from everything else on the same blocks, at the price of one test and one counter for
//! plain commands.
//!
//! COMPARE AND WRITE, ORWRITE and their like [`Gate::hold`] their blocks; all others [`Gate::pass`]. While nobody holds
//! anything a pass is a counter; while somebody does, passes queue in the range lock. A holder also waits for the passes that
//! were counted before it came. A qcow2 image has one for its guest's clusters: who moves one to another place holds it.

use std::cell::Cell;

use crate::sync::{Notify, RangeGuard, RangeLock};

/// See the module.
#[derive(Default)]
pub struct Gate {
    lock: RangeLock,
    counted: Cell<usize>,
    drained: Notify,
}

/// The right to work on some blocks beside others.
pub enum Pass<'a> {
    /// Nobody held anything when it was given.
    Counted(&'a Gate),
    /// It has its place in the queue.
    Ranged {
        /// That place.
        #[allow(dead_code)] // Held, never read: dropping it gives the range up.
        guard: RangeGuard,
    },
}

impl Gate {
    /// Waits until nobody holds any of these blocks.
    pub async fn pass(&self, start: u64, len: u64) -> Pass<'_> {
        if self.lock.is_idle() {
            self.counted.set(self.counted.get() + 1);
            return Pass::Counted(self);
        }
        // Seldom, so boxed: every command's future is as large as what it may wait for.
        Pass::Ranged { guard: Box::pin(self.lock.shared(start, len)).await }
    }

    /// The same for one who may not wait: nothing, while anybody holds any block.
    pub fn pass_at_once(&self) -> Option<Pass<'_>> {
        self.lock.is_idle().then(|| {
            self.counted.set(self.counted.get() + 1);
            Pass::Counted(self)
        })
    }

    /// Waits until nobody works on any of these blocks, and keeps everybody off them until the guard is dropped.
    pub async fn hold(&self, start: u64, len: u64) -> RangeGuard {
        let guard = self.lock.exclusive(start, len).await;
        while self.counted.get() > 0 {
            self.drained.wait().await;
        }
        guard
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if let Pass::Counted(gate) = self {
            gate.counted.set(gate.counted.get() - 1);
            if gate.counted.get() == 0 {
                gate.drained.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use super::*;
    use crate::sys::exec::{Executor, yield_now};

    #[test]
    fn a_holder_waits_for_those_inside_and_keeps_later_ones_out() {
        let exec = Executor::new();
        let gate: Rc<Gate> = Rc::default();
        let log: Rc<RefCell<Vec<&str>>> = Rc::default();
        for (name, start) in [("w1 ", 0), ("caw", 0), ("w2 ", 4), ("far", 100)] {
            let (gate, log) = (gate.clone(), log.clone());
            exec.spawn(async move {
                if name == "caw" {
                    let _guard = gate.hold(start, 8).await;
                    log.borrow_mut().push("caw in");
                    yield_now().await;
                    log.borrow_mut().push("caw out");
                } else {
                    let _pass = gate.pass(start, 8).await;
                    yield_now().await;
                    yield_now().await;
                    log.borrow_mut().push(name);
                }
            });
        }
        while exec.run_ready() {}
        assert_eq!(exec.tasks(), 0);
        let log = log.borrow();
        let place = |name| log.iter().position(|l| *l == name).unwrap();
        assert!(place("w1 ") < place("caw in") && place("caw out") < place("w2 "));
        assert!(place("far") < place("caw out"), "{log:?}");
    }
}
