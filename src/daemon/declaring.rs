//! The thread that brings up declared LUNs: it waits for the daemon to serve them, so the daemon's loop cannot.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// LUNs that are declared somewhere.
pub trait Declared: Send + Sync {
    /// Makes them as they are declared; waits until they serve or have failed.
    fn bring(&self);
}

/// Brings them up, beside the daemon's loop; one time after the other.
pub(super) struct Declaring(Arc<Inner>);

struct Inner {
    declared: Box<dyn Declared>,
    wanted: AtomicBool,
    at_work: AtomicBool,
}

impl Declaring {
    pub(super) fn new(declared: Box<dyn Declared>) -> Declaring {
        let (wanted, at_work) = (AtomicBool::new(false), AtomicBool::new(false));
        Declaring(Arc::new(Inner { declared, wanted, at_work }))
    }

    /// Has them brought up once more, after the time under way.
    pub(super) fn begin(&self) {
        self.0.wanted.store(true, Ordering::SeqCst);
        if self.0.at_work.swap(true, Ordering::SeqCst) {
            return;
        }
        let inner = self.0.clone();
        let thread = std::thread::Builder::new().name("declared".into());
        if let Err(e) = thread.spawn(move || inner.run()) {
            tracing::error!("no thread for the declared LUNs: {e}");
            self.0.at_work.store(false, Ordering::SeqCst);
        }
    }

    /// Whether some may still come.
    pub(super) fn is_at_work(&self) -> bool {
        self.0.at_work.load(Ordering::SeqCst)
    }
}

impl Inner {
    fn run(&self) {
        loop {
            while self.wanted.swap(false, Ordering::SeqCst) {
                self.declared.bring();
            }
            self.at_work.store(false, Ordering::SeqCst);
            // Somebody may have asked between the two, and seen us at work.
            if !self.wanted.load(Ordering::SeqCst) || self.at_work.swap(true, Ordering::SeqCst) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, atomic::AtomicU32},
        time::Duration,
    };

    use super::*;

    struct Counted(Arc<AtomicU32>, Arc<Barrier>);

    impl Declared for Counted {
        fn bring(&self) {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                self.1.wait();
                self.1.wait();
            }
        }
    }

    #[test]
    fn asked_while_at_work_it_looks_once_more() {
        let (count, barrier) = (Arc::new(AtomicU32::new(0)), Arc::new(Barrier::new(2)));
        let declaring = Declaring::new(Box::new(Counted(count.clone(), barrier.clone())));
        assert!(!declaring.is_at_work());
        declaring.begin();
        barrier.wait();
        declaring.begin();
        declaring.begin();
        assert!(declaring.is_at_work());
        barrier.wait();
        while declaring.is_at_work() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}
