//! `block-commit` of an image between: what it and those under it hold above a base is copied to that base, and then the image over it
//! names the base for its backing file. Guests are not concerned: nobody writes to what is copied.
//!
//! The image is read by a chain of its own, and the base written by another, beside the LUN's. At the end both are closed, and the image
//! over them gets its new header while the LUN's chain is closed or, if that is the LUN's own, just before: [`super::switch`]. It is opened as
//! a LUN's image for that, so that its sidecar knows of the change.

use std::rc::Rc;

use tracing::info;

use super::{
    Active, JobError, Jobs, Record, chain::base_depth, close, commit::give_back, switch::Switch,
    target::reopen,
};
use crate::{
    job::{front::Front, mirror::Task},
    lun::{config::DeviceConfig, stack::Stack},
    sys::io::Io,
    units::BlockSize,
    volume::Volume,
};

/// An image of a LUN's chain, as a LUN's own; the chain of one that is open says its format.
fn config_of(own: &DeviceConfig, chain: &Stack, depth: usize) -> Option<DeviceConfig> {
    let info = chain.image().describe().into_iter().nth(depth)?;
    Some(DeviceConfig { image: info.path, format: Some(info.format), sidecar: None, ..own.clone() })
}

/// Where the top and the base of a job are in the chain.
fn places(record: &Record, chain: &Stack) -> Result<(usize, usize), String> {
    let (Some(top), Some(base)) = (&record.top, &record.base) else {
        return Err("its record does not name its images".into());
    };
    Ok((base_depth(chain.image(), top)? as usize, base_depth(chain.image(), base)? as usize))
}

/// The image that is committed, for reading, with the base's lock given up.
async fn open_top(
    io: &Io,
    own: &DeviceConfig,
    (top, base): (usize, usize),
    block_size: BlockSize,
    chain: &Stack,
) -> Result<Stack, String> {
    let config = config_of(own, chain, top).ok_or("the chain has another length than was thought")?;
    let config = DeviceConfig { read_only: true, ..config };
    let stack = Stack::open(io, &config, block_size, 0).await.map_err(|e| crate::lun::chain(&e))?;
    stack.image().lend(base - top);
    Ok(stack)
}

/// Opens both sides of a job that goes on; nothing if it had done all before it could be forgotten.
pub(super) async fn open_again(
    io: &Io,
    record: &mut Record,
    own: &DeviceConfig,
    config: &DeviceConfig,
    block_size: BlockSize,
    chain: &Stack,
) -> Result<Option<(Stack, Stack)>, String> {
    let known =
        |path: &Option<_>| path.as_deref().is_some_and(|path| base_depth(chain.image(), path).is_ok());
    if known(&record.base) && !known(&record.top) {
        return Ok(None);
    }
    let (top, base) = places(record, chain)?;
    record.settings.task = Task::CommitBeneath { below: (base - top) as u32 };
    chain.image().lend(base);
    let opened = async {
        let source = open_top(io, own, (top, base), block_size, chain).await?;
        let capacity = source.limits().capacity;
        Ok((source, reopen(io, config, block_size, capacity).await?))
    };
    let opened = opened.await;
    if opened.is_err() {
        give_back(chain, record.settings.task, record.base.as_deref());
    }
    opened.map(Some)
}

impl Jobs {
    /// Begins one; the record says which.
    pub(super) async fn commit_beneath(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        record: Record,
        config: DeviceConfig,
    ) -> Result<(), JobError> {
        let chain = front.volume();
        let own = self.made.get().config.clone();
        let (task, named) = (record.settings.task, record.base.clone());
        let (top, base) = places(&record, &chain).map_err(JobError::Chain)?;
        chain.image().lend(base);
        let begun = async {
            let source = open_top(&self.io, &own, (top, base), block_size, &chain).await;
            let source = Rc::new(source.map_err(JobError::Chain)?);
            let target = match self.open_base(&config, block_size, &source).await {
                Ok(target) => Rc::new(target),
                Err(e) => {
                    close(&source).await;
                    return Err(e);
                }
            };
            let launched = self.launch(front, (source.clone(), target.clone()), record, config).await;
            if launched.is_err() {
                close(&target).await;
                close(&source).await;
            }
            launched
        };
        let begun = begun.await;
        if begun.is_err() {
            give_back(&chain, task, named.as_deref());
        }
        begun
    }

    /// Closes the sides of a job that has none of the LUN's own.
    pub(super) async fn close_sides(active: &Active) {
        let mirror = &active.mirror;
        if matches!(mirror.settings().task, Task::CommitBeneath { .. }) && !mirror.is_closed() {
            mirror.close_target().await;
            close(mirror.source()).await;
        }
    }

    /// All is copied: takes the images between out of the chain.
    pub(super) async fn finish_beneath(
        &self,
        active: &Active,
        front: &Front<Stack>,
        moved: &impl Fn(),
    ) -> Result<(), String> {
        Jobs::close_sides(active).await;
        if !active.mirror.is_closed() {
            return Err("the image that was committed to could not be closed".into());
        }
        let made = self.made.get();
        let (own, block_size) = (made.config.clone(), made.block_size);
        let (over, base) = {
            let chain = front.volume();
            let (top, base) = places(&active.record.borrow(), &chain)?;
            let of =
                |depth| config_of(&own, &chain, depth).ok_or("the chain has another length than was thought");
            // The image over the top; nothing if that is the LUN's own.
            let over = if top > 1 { Some(of(top - 1)?) } else { None };
            (over, of(base)?)
        };
        let stays = base.format.map(|format| (&*base.image, format));
        let rename =
            async |stack: &Stack| stack.image().set_backing(stays).await.map_err(|e| crate::lun::chain(&e));
        let before = async |stack: &Stack| if over.is_none() { rename(stack).await } else { Ok(()) };
        let between = async || {
            let Some(over) = &over else { return Ok(()) };
            let stack =
                Stack::open(&self.io, over, block_size, 0).await.map_err(|e| crate::lun::chain(&e))?;
            let renamed = rename(&stack).await;
            let closed = stack.close().await.map_err(|e| crate::lun::chain(&e));
            renamed.and(closed)
        };
        let how = Switch { to: &own, block_size, others: 0 };
        self.switch(front, how, moved, before, between, async || Ok(())).await?;
        info!(image = %own.image.display(), base = %base.image.display(), "the chain is shorter");
        Ok(())
    }
}
