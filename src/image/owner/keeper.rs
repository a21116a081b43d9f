//! Looks again and again whether a held image is ours still, and moves its [`Fence`] on. On a thread of its own, because the storage may not answer.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::JoinHandle,
};

use tracing::{error, info, warn};

use super::{Holding, OwnerError};
use crate::sys::fence::Fence;

/// Keeps one image, until it is released or dropped. Dropped, the image stays held by this host, and the fence is lost.
pub struct Keeper {
    fence: Fence,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<Holding>>,
    image: PathBuf,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keeper({})", self.image.display())
    }
}

impl Keeper {
    /// Begins, with one look at once: when it returns, the fence holds. `lost` is called if the image becomes another's.
    ///
    /// # Errors
    /// That this look failed, or there is no thread; the image is given back then.
    pub fn begin(
        mut holding: Holding,
        image: &Path,
        lost: impl Fn() + Send + 'static,
    ) -> Result<Keeper, OwnerError> {
        let fence = Fence::default();
        match holding.look() {
            Ok(Some(until)) => fence.holds_until(until),
            Ok(None) => return Err(OwnerError::Held(Box::new(holding.record().clone()))),
            Err(e) => {
                // That error is the one to tell.
                let _ = holding.release();
                return Err(e);
            }
        }
        let (stop, stopped) = channel::<()>();
        let (moved, at) = (fence.clone(), image.to_owned());
        let pause = holding.record().lease / 4;
        let work = move || {
            let mut failing = false;
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(pause) {
                match holding.look() {
                    Ok(Some(until)) => {
                        moved.holds_until(until);
                        if std::mem::take(&mut failing) {
                            info!(image = %at.display(), "the owner's file can be read again");
                        }
                    }
                    Ok(None) => {
                        moved.lose();
                        error!(image = %at.display(), "another owner has taken the image over: nothing is written to it any more");
                        lost();
                        break;
                    }
                    Err(error) if !failing => {
                        failing = true;
                        warn!(image = %at.display(), %error, "whose the image is cannot be told: commands wait until it can");
                    }
                    Err(_) => {}
                }
            }
            holding
        };
        let thread = std::thread::Builder::new().name("owner".into()).spawn(work).map_err(OwnerError::Io)?;
        Ok(Keeper { fence, stop: Some(stop), thread: Some(thread), image: image.to_owned() })
    }

    /// What I/O on the image has to be under.
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    fn end(&mut self) -> Option<Holding> {
        drop(self.stop.take());
        self.thread.take().and_then(|thread| thread.join().ok())
    }

    /// Gives the image back, which is closed; the generation then.
    ///
    /// # Errors
    /// That it is another's by now, or the file system's.
    pub fn release(mut self) -> Result<u64, OwnerError> {
        match self.end() {
            Some(holding) => holding.release(),
            None => Err(OwnerError::Io(std::io::Error::other("the thread that looks after it has panicked"))),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
        // Whoever still waits to touch the image does not.
        self.fence.lose();
    }
}
