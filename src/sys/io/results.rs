//! What has come of operations: a look that costs no system call, and the results of the pool.

use super::{Engine, Io, threads::Pool};

impl Io {
    /// Whether a turn would find results now. It enters no kernel, and is for who looks again and again.
    pub fn has_results(&self) -> bool {
        let of_engine = match &self.0.engine {
            Engine::Uring(uring) => uring.borrow_mut().has_results(),
            Engine::Threads => false,
        };
        of_engine || self.0.pool.borrow().as_ref().is_some_and(Pool::has_done)
    }

    pub(super) fn reap_pool(&self) {
        let mut results = {
            let (watch, pool) = (self.0.pool_watch.borrow(), self.0.pool.borrow());
            let (Some(watch), Some(pool)) = (&*watch, &*pool) else { return };
            // Both are asked: the eventfd has to be emptied, too.
            if !watch.take_ready() & !pool.has_done() {
                return;
            }
            let mut results = std::mem::take(&mut *self.0.results.borrow_mut());
            pool.take_done(&mut results);
            results
        };
        for (key, result) in results.drain(..) {
            self.complete(key, result);
        }
        *self.0.results.borrow_mut() = results;
    }
}
