//! A LUN as it is asked from outside its thread: questions and orders go as messages, and who asks waits for the answer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Instant,
};

use super::{
    ANSWER_LIMIT, ImageInfo, LOOK, LunError, SILENCE, State, Stats,
    config::DeviceConfig,
    events::Watcher,
    inbox::{Message, Outbox, Pulse},
    jobs::{JobInfo, JobOrder},
    scrub::{Scrub, ScrubOrder},
    throttle::limits::Limits,
    trace::{self, Trace},
};
use crate::units::BlockSize;

/// What a LUN was started with.
#[derive(Debug, Clone)]
pub struct Made {
    /// Image, protection and the rest of `dev_config`.
    pub config: DeviceConfig,
    /// Size of a block.
    pub block_size: BlockSize,
}

/// [`Made`], which a pivot changes.
#[derive(Debug, Clone)]
pub(super) struct SharedMade(Arc<Mutex<Arc<Made>>>);

impl SharedMade {
    pub(super) fn new(made: Made) -> SharedMade {
        SharedMade(Arc::new(Mutex::new(Arc::new(made))))
    }

    pub(super) fn get(&self) -> Arc<Made> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_config(&self, config: DeviceConfig) {
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *made = Arc::new(Made { config, ..(**made).clone() });
    }
}

/// A way to ask a LUN from anywhere; clones ask the same one. It keeps nothing alive.
#[derive(Debug, Clone)]
pub struct Remote {
    pub(super) outbox: Outbox,
    pub(super) state: Arc<Mutex<State>>,
    pub(super) made: SharedMade,
}

impl Remote {
    /// Whether both ask the same LUN.
    pub fn is_same(&self, other: &Remote) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }

    /// Where the LUN is in its life.
    pub fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it was started with, or has gone over to since; known also of one that has failed.
    pub fn made(&self) -> Arc<Made> {
        self.made.get()
    }

    /// The way to see whether its thread turns.
    pub fn pulse(&self) -> Pulse {
        self.outbox.pulse()
    }

    /// The counters.
    ///
    /// # Errors
    /// That the LUN does not answer.
    pub fn stats(&self) -> Result<Stats, LunError> {
        self.ask(Message::Stats)
    }

    /// Asks for the counters, and leaves it to the caller how long to wait for them. Nothing comes from a LUN that ends meanwhile.
    ///
    /// # Errors
    /// That the LUN does not serve.
    pub fn ask_stats(&self) -> Result<Receiver<Stats>, LunError> {
        let (back, answer) = sync_channel(1);
        self.is_there()?;
        self.outbox.send(Message::Stats(back));
        Ok(answer)
    }

    /// Has every command told from now on, until what is given is dropped.
    ///
    /// # Errors
    /// That the LUN does not answer.
    pub fn trace(&self) -> Result<Trace, LunError> {
        let (watching, trace) = trace::channel();
        self.ask(|back| Message::Trace(watching, back))?;
        Ok(trace)
    }

    /// The image and its backing files, from the top down.
    ///
    /// # Errors
    /// That the LUN does not answer.
    pub fn describe(&self) -> Result<Vec<ImageInfo>, LunError> {
        self.ask(Message::Describe)
    }

    /// Begins to count how long the thread is silent, unless that is counted already. Who asks many LUNs one after the other does this to all
    /// of them first, and waits for those that hang at the same time.
    pub fn knock(&self) {
        self.outbox.pulse().ask();
    }

    /// Tells that one what happens from now on, instead of who was told before.
    pub fn watch(&self, watcher: Watcher) {
        self.outbox.send(Message::Watch(watcher));
    }

    /// Changes the capacity; initiators get the unit attention 2Ah/09h. The kernel is told nothing.
    ///
    /// # Errors
    /// What the volume says, or that the LUN does not answer.
    pub fn resize(&self, capacity: u64) -> Result<(), LunError> {
        self.ask(|back| Message::Resize(capacity, back))?
    }

    /// Orders a scrub about; gives how it is then, or how the last one was.
    ///
    /// # Errors
    /// [`LunError::Scrub`], or that the LUN does not answer.
    pub fn scrub(&self, order: ScrubOrder) -> Result<Option<Scrub>, LunError> {
        Ok(self.ask(|back| Message::Scrub(order, back))??)
    }

    /// Orders block jobs about; gives those that there are then.
    ///
    /// # Errors
    /// [`LunError::Job`], or that the LUN does not answer.
    pub fn job(&self, order: JobOrder) -> Result<Vec<JobInfo>, LunError> {
        Ok(self.ask(|back| Message::Job(order, back))??)
    }

    /// Limits the commands so from now on, and after a restart until the LUN is deleted.
    ///
    /// # Errors
    /// [`LunError::Unsaved`], then the limits hold and a restart forgets them; or that the LUN does not answer.
    pub fn limit(&self, limits: Limits) -> Result<(), LunError> {
        self.ask(|back| Message::Limit(limits, back))?.map_err(LunError::Unsaved)
    }

    pub(super) fn ask<T>(&self, message: impl FnOnce(SyncSender<T>) -> Message) -> Result<T, LunError> {
        let (back, answer) = sync_channel(1);
        self.is_there()?;
        self.outbox.send(message(back));
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            match answer.recv_timeout(LOOK.min(end.saturating_duration_since(Instant::now()))) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(LunError::Gone("it has just ended".into()));
                }
                Err(RecvTimeoutError::Timeout) => self.is_there()?,
            }
            let silent = self.outbox.silent_for();
            if silent >= SILENCE {
                return Err(LunError::Silent(silent));
            }
            if Instant::now() >= end {
                return Err(LunError::Silent(ANSWER_LIMIT));
            }
        }
    }

    fn is_there(&self) -> Result<(), LunError> {
        match self.state() {
            State::Online => Ok(()),
            State::Stopped => Err(LunError::Gone("it has been stopped".into())),
            State::Failed(reason) => Err(LunError::Gone(reason)),
        }
    }
}

#[cfg(test)]
impl Remote {
    /// One whose thread hangs.
    pub fn of_nobody() -> Remote {
        let (outbox, inbox) = super::inbox::channel().unwrap();
        std::mem::forget(inbox);
        let made = SharedMade::new(Made { config: DeviceConfig::new("/none"), block_size: BlockSize::B512 });
        Remote { outbox, state: Arc::new(Mutex::new(State::Online)), made }
    }
}
