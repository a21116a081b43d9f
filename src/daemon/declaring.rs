//! The thread that brings up declared LUNs: it waits for the daemon to serve them, so the daemon's loop cannot.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// LUNs that are declared somewhere.
pub trait Declared: Send + Sync {
    /// Makes them as they are declared; waits until they serve or have failed. True if some failed that may come by themselves later.
    fn bring(&self) -> bool;

    /// Tries those again, as far as that is worth it now. True if some are still to come.
    fn again(&self) -> bool;
}

/// Brings them up, beside the daemon's loop; one time after the other.
pub(super) struct Declaring(Arc<Inner>);

struct Inner {
    declared: Box<dyn Declared>,
    state: Mutex<State>,
}

/// What is to be done, and what is being done.
#[derive(Default)]
struct State {
    /// They are to be brought up.
    wanted: bool,
    /// They are being brought up.
    bringing: bool,
    /// Those that failed are to be tried again.
    again: bool,
    /// Some failed.
    owed: bool,
    /// There is a thread.
    thread: bool,
}

impl Declaring {
    pub(super) fn new(declared: Box<dyn Declared>) -> Declaring {
        Declaring(Arc::new(Inner { declared, state: Mutex::default() }))
    }

    /// Has them brought up once more, after what is under way.
    pub(super) fn begin(&self) {
        let mut state = self.0.lock();
        state.wanted = true;
        self.run(state);
    }

    /// Has those tried again that failed, if there are any and nothing is under way. Never waits.
    pub(super) fn again(&self) {
        let mut state = self.0.lock();
        if state.owed && !state.thread {
            state.again = true;
            self.run(state);
        }
    }

    fn run(&self, mut state: MutexGuard<'_, State>) {
        if state.thread {
            return;
        }
        let inner = self.0.clone();
        let thread = std::thread::Builder::new().name("declared".into());
        match thread.spawn(move || inner.run()) {
            Ok(_) => state.thread = true,
            Err(e) => {
                tracing::error!("no thread for the declared LUNs: {e}");
                *state = State { owed: state.owed, ..State::default() };
            }
        }
    }

    /// Whether some may still come that have not been tried yet.
    pub(super) fn is_at_work(&self) -> bool {
        let state = self.0.lock();
        state.wanted || state.bringing
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let all = std::mem::take(&mut state.wanted);
            if !all && !state.again {
                state.thread = false;
                return;
            }
            // Who brings up all tries what failed too.
            (state.bringing, state.again) = (all, false);
            drop(state);
            let owed = if all { self.declared.bring() } else { self.declared.again() };
            state = self.lock();
            (state.bringing, state.owed) = (false, owed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            Barrier,
            atomic::{AtomicU32, Ordering},
        },
        time::Duration,
    };

    use super::*;

    /// How often it was asked, and how often for what failed; a place to wait in, the first time; what failed and how often it will.
    #[derive(Clone, Default)]
    struct Counted(Arc<[AtomicU32; 3]>);

    struct Waits(Counted, Arc<Barrier>);

    impl Counted {
        fn get(&self, at: usize) -> u32 {
            self.0[at].load(Ordering::SeqCst)
        }
    }

    impl Declared for Counted {
        fn bring(&self) -> bool {
            self.0[0].fetch_add(1, Ordering::SeqCst);
            self.get(2) > 0
        }

        fn again(&self) -> bool {
            self.0[1].fetch_add(1, Ordering::SeqCst);
            self.0[2].fetch_sub(1, Ordering::SeqCst) > 1
        }
    }

    impl Declared for Waits {
        fn bring(&self) -> bool {
            let owed = self.0.bring();
            if self.0.get(0) == 1 {
                self.1.wait();
                self.1.wait();
            }
            owed
        }

        fn again(&self) -> bool {
            self.0.again()
        }
    }

    fn settle(declaring: &Declaring) {
        while declaring.0.lock().thread {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn asked_while_at_work_it_looks_once_more() {
        let (counted, barrier) = (Counted::default(), Arc::new(Barrier::new(2)));
        let declaring = Declaring::new(Box::new(Waits(counted.clone(), barrier.clone())));
        assert!(!declaring.is_at_work());
        declaring.begin();
        barrier.wait();
        declaring.begin();
        declaring.begin();
        assert!(declaring.is_at_work());
        barrier.wait();
        settle(&declaring);
        assert!(!declaring.is_at_work());
        assert_eq!((counted.get(0), counted.get(1)), (2, 0));
    }

    #[test]
    fn what_failed_is_tried_again_until_it_is_there_and_no_longer() {
        let counted = Counted::default();
        counted.0[2].store(2, Ordering::SeqCst);
        let declaring = Declaring::new(Box::new(counted.clone()));
        // Nothing was tried yet, so nothing has failed.
        declaring.again();
        settle(&declaring);
        assert_eq!(counted.get(1), 0);
        declaring.begin();
        settle(&declaring);
        for tried in [1, 2, 2, 2] {
            declaring.again();
            settle(&declaring);
            assert_eq!((counted.get(0), counted.get(1)), (1, tried));
        }
    }
}
