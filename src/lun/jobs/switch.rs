//! Going over from the LUN's image to one that has it in its chain, or that is itself with another chain: the image is closed in good
//! order, while commands are held back, and the chain opened anew. So every lock, cache and sidecar is what it would be after a restart.
//!
//! What fails goes back: the image is opened again as it was. Whatever a `kill -9` cuts off is for the start after it to see: an image that
//! was closed, or not, under the configuration that is written down.

use std::{rc::Rc, time::Duration};

use tracing::{error, warn};

use super::{Jobs, target::reopen};
use crate::{
    job::front::Front,
    lun::{bitmaps, config::DeviceConfig, stack::Stack},
    units::BlockSize,
    volume::Volume,
};

/// How long those who look at the image have to let go of it.
const PATIENCE: u32 = 5000;
const LOOK: Duration = Duration::from_millis(1);

/// What the LUN goes over to.
pub(super) struct Switch<'a> {
    pub(super) to: &'a DeviceConfig,
    pub(super) block_size: BlockSize,
    /// Holders of the old image beside its layer and the switch itself.
    pub(super) others: usize,
}

impl Jobs {
    /// Goes over. While no command runs and nobody else holds the image, `before` is called with it, flushed; then it is closed, and
    /// `between` called, while nothing is open; then the new configuration is opened, and `decide` makes the choice durable. `moved` is called as in [`Jobs::order`].
    ///
    /// # Errors
    /// In words; the LUN has the image that it had, as far as that can be.
    pub(super) async fn switch(
        &self,
        front: &Front<Stack>,
        how: Switch<'_>,
        moved: &impl Fn(),
        before: impl AsyncFnOnce(&Stack) -> Result<(), String>,
        between: impl AsyncFnOnce() -> Result<(), String>,
        decide: impl AsyncFnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        // Most of what is to be flushed is flushed while commands run.
        front.volume().flush().await.map_err(|e| crate::lun::chain(&e))?;
        let from = self.made.get().config.clone();
        let done = front
            .switch(async |old: Rc<Stack>| {
                moved();
                // The layer's, and ours.
                let (mut looks, holders) = (0, 2 + how.others);
                while Rc::strong_count(&old) > holders {
                    if looks == PATIENCE {
                        return (None, Err("the image is still being looked at: try again".to_owned()));
                    }
                    looks += 1;
                    self.io.sleep(LOOK).await;
                }
                let flushed = old.flush().await.map_err(|e| crate::lun::chain(&e));
                if let Err(reason) = flushed {
                    return (None, Err(reason));
                }
                if let Err(reason) = before(&old).await {
                    return (None, Err(reason));
                }
                // What the image keeps of dirty bitmaps is stored with it, and what the next one keeps is taken over.
                if let Err(reason) = bitmaps::store(&old, &front.bitmaps().to_keep()).await {
                    return (None, Err(format!("its dirty bitmaps cannot be stored: {reason}")));
                }
                let capacity = old.limits().capacity;
                let tried = match old.close().await {
                    Ok(()) => match between().await {
                        Ok(()) => self.go_over(&how, &old, decide).await,
                        Err(reason) => Err(reason),
                    },
                    Err(e) => Err(crate::lun::chain(&e)),
                };
                let loaded = async |stack: Stack| {
                    let kept = bitmaps::load(&stack).await;
                    front.bitmaps().replace_kept(stack.limits().capacity, kept);
                    Some(Rc::new(stack))
                };
                match tried {
                    Ok(new) => (loaded(new).await, Ok(())),
                    Err(reason) => match reopen(&self.io, &from, how.block_size, capacity).await {
                        Ok(again) => (loaded(again).await, Err(reason)),
                        Err(lost) => {
                            error!(image = %from.image.display(), "the LUN's image could not be opened again: {lost}");
                            (None, Err(format!("{reason}; and the LUN's image cannot be opened again: {lost}")))
                        }
                    },
                }
            })
            .await;
        if done.is_ok() {
            self.made.set_config(how.to.clone());
        }
        moved();
        done
    }

    async fn go_over(
        &self,
        how: &Switch<'_>,
        old: &Stack,
        decide: impl AsyncFnOnce() -> Result<(), String>,
    ) -> Result<Stack, String> {
        let capacity = old.limits().capacity;
        let new = reopen(&self.io, how.to, how.block_size, capacity).await?;
        let fits = match new.protected_as() == old.protected_as() {
            true => decide().await,
            false => Err("its protection information is of another type than the LUN's".to_owned()),
        };
        if let Err(reason) = fits {
            if let Err(error) = new.close().await {
                warn!(image = %how.to.image.display(), %error, "an image that the LUN did not go over to could not be closed");
            }
            return Err(reason);
        }
        Ok(new)
    }
}
