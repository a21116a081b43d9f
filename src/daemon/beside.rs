//! Life beside another handler of target_core_user: a thread, while one is there, that keeps the kernel from asking it about our devices ([`forestall`]).
//!
//! [`forestall`]: crate::kernel::forestall

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    kernel::{
        forestall::{Forestall, Watch},
        tree::Real,
    },
    lun::config::SUBTYPE,
};

/// How long a new device is looked at without a pause until it has its configuration.
const EAGER: Duration = Duration::from_millis(50);
/// How long it is looked at now and then after that; whoever takes longer configures by hand.
const PATIENT: Duration = Duration::from_secs(5);
/// How often, meanwhile.
const NOW_AND_THEN: Duration = Duration::from_millis(1);
/// How often the thread looks when it is told of nothing, and whether it is to end.
const SELDOM: Duration = Duration::from_secs(1);

/// The thread, if there is one.
#[derive(Debug)]
pub struct Beside {
    configfs: PathBuf,
    stop: Option<Arc<AtomicBool>>,
}

impl Beside {
    /// Nobody is known to be there yet.
    pub fn new(configfs: &Path) -> Beside {
        Beside { configfs: configfs.to_owned(), stop: None }
    }

    /// Begins or ends the thread. `others` says whether another handler hears the kernel.
    pub fn turn(&mut self, others: bool) {
        match (&self.stop, others) {
            (None, true) => {
                tracing::info!(
                    "another handler of target_core_user is there: trying to keep the kernel from asking it about new devices of ours"
                );
                let stop = Arc::new(AtomicBool::new(false));
                let (told, configfs) = (stop.clone(), self.configfs.clone());
                let thread = std::thread::Builder::new().name("beside".to_owned());
                match thread.spawn(move || work(&configfs, &told)) {
                    Ok(_) => self.stop = Some(stop),
                    Err(e) => {
                        tracing::warn!("no thread for it, and targetcli may be refused our devices: {e}")
                    }
                }
            }
            (Some(_), false) => {
                tracing::info!("the other handler has gone");
                self.end();
            }
            _ => {}
        }
    }

    /// Asks the thread to end, and does not wait: it may be waiting for the removal of a device.
    fn end(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.store(true, Ordering::Release);
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.end();
    }
}

fn work(configfs: &Path, stop: &AtomicBool) {
    let tree = Real::at(configfs);
    let mut forestall = Forestall::new(SUBTYPE);
    let watched = Watch::at(configfs).and_then(|mut watch| {
        while !stop.load(Ordering::Acquire) {
            let since = Instant::now();
            while forestall.look(&tree) && since.elapsed() < PATIENT && !stop.load(Ordering::Acquire) {
                if since.elapsed() > EAGER {
                    std::thread::sleep(NOW_AND_THEN);
                }
            }
            watch.wait(SELDOM)?;
        }
        Ok(())
    });
    if let Err(e) = watched {
        tracing::warn!(
            "configfs cannot be watched: {e}; beside another handler targetcli may be refused our devices; next: add \
             control=nl_reply_supported=-1 to its line, or restart the daemon"
        );
    }
}
