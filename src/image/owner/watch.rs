//! A host that waits beside an image for its holder to be gone, and takes it then.
//!
//! Silence is told by this host's clock alone: the holder counts its looks in the owner's file, and who sees the same count for as long as the holder's lease has heard
//! nothing for so long. That is a reason to take the image, and not what makes it safe: the taking is ([`super::take_over`]), which waits until a holder that
//! lives has stopped.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tracing::{error, info, warn};

use super::{Claim, OwnerError, OwnerFile, OwnerState, Record, path_of, seize};
use crate::sys::fence::since_boot;

/// What is heard of an image's holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// Nobody has it: it was given back in order.
    Released(Record),
    /// A host has it, or takes it over, and was last heard of so long ago.
    Held(Record, Duration),
    /// This host has it.
    Ours(Record),
}

/// One who watches.
#[derive(Debug)]
pub struct Watch {
    image: PathBuf,
    claim: Claim,
    last: Option<Sign>,
}

/// A sign of life, and when it was seen first.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sign {
    record: Record,
    pulse: [u8; 24],
    seen: Duration,
}

impl Watch {
    /// Begins to watch an image for that claim.
    pub fn of(image: impl Into<PathBuf>, claim: Claim) -> Watch {
        Watch { image: image.into(), claim, last: None }
    }

    /// Looks. Whoever could not look has heard nothing and missed nothing: silence begins anew after an error.
    ///
    /// # Errors
    /// That there is no such file, or that it cannot be read.
    pub fn look(&mut self) -> Result<Heard, OwnerError> {
        // The last sign is older than this look, and what is read now is newer.
        let began = since_boot();
        let last = self.last.take();
        let file =
            OwnerFile::open(&self.image)?.ok_or_else(|| OwnerError::NotShared(path_of(&self.image)))?;
        let (record, pulse) = {
            let _locked = file.lock(false)?;
            (file.record()?, file.pulse().map_err(OwnerError::Io)?)
        };
        let same = last.filter(|last| last.record == record && last.pulse == pulse);
        let sign = same.unwrap_or_else(|| Sign { record: record.clone(), pulse, seen: since_boot() });
        let silent = began.saturating_sub(sign.seen);
        self.last = Some(sign);
        Ok(match record.state {
            OwnerState::Released => Heard::Released(record),
            OwnerState::Held if record.host.id == self.claim.host.id => Heard::Ours(record),
            OwnerState::Held | OwnerState::TakingOver => Heard::Held(record, silent),
        })
    }

    /// Takes the image from the holder that was heard of last, if nothing has been heard since, and waits until that has begun its last I/O; with `fenced` at once: somebody knows that its host
    /// is gone. The image is nobody's then, and this host may open it.
    ///
    /// # Errors
    /// [`OwnerError::Alive`] if it is, [`OwnerError::Held`] if another was faster, and the file system's.
    pub fn take_over(&mut self, fenced: bool) -> Result<Record, OwnerError> {
        let file =
            OwnerFile::open(&self.image)?.ok_or_else(|| OwnerError::NotShared(path_of(&self.image)))?;
        let Some(last) = self.last.take() else {
            return Err(OwnerError::Alive(Box::new(file.record()?)));
        };
        // A host that is gone has no last words; of one that is not, they are the newest.
        let heard = (!fenced).then_some(last.pulse);
        seize(&file, &last.record, &self.claim, heard, fenced)
    }
}

/// Makes sure that a host is gone, by other means than silence.
///
/// # Errors
/// Why that is not known.
pub type Fencing<'a> = &'a dyn Fn(&str) -> Result<(), String>;

/// An image that this host may open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Whose it was.
    pub from: Record,
    /// How long nothing was heard of that host.
    pub silent: Duration,
    /// The host is gone for sure.
    pub fenced: bool,
    /// How long it took from then until the image could be opened.
    pub took: Duration,
}

/// How long a host may be silent before it is taken for gone. One that takes over does nothing else for a lease and a half.
fn patience(record: &Record) -> Duration {
    if record.state == OwnerState::TakingOver { record.lease * 3 } else { record.lease }
}

impl Watch {
    /// Watches until the image's host is gone, and takes the image; nothing, if it is told to stop. With `fencing` nothing is taken without its word, and nobody waits for a holder to stop.
    ///
    /// An image that was given back in order is not taken: whoever has done that may be about to start again, or have gone over to another image, and this one misses writes then.
    ///
    /// # Errors
    /// [`OwnerError::Ours`]: there is nothing to wait for.
    pub fn stand_by(
        &mut self,
        fencing: Option<Fencing<'_>>,
        stop: &AtomicBool,
    ) -> Result<Option<Taken>, OwnerError> {
        let mut holder = None;
        let mut failing = false;
        while !stop.load(Ordering::Acquire) {
            let heard = match self.look() {
                Ok(heard) => heard,
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        warn!(image = %self.image.display(), %error, "whose the image is cannot be told: nothing is taken until it can");
                    }
                    std::thread::sleep(self.claim.lease / 4);
                    continue;
                }
            };
            if std::mem::take(&mut failing) {
                info!(image = %self.image.display(), "the owner's file can be read again");
            }
            let (record, silent) = match heard {
                Heard::Ours(record) => return Err(OwnerError::Ours(Box::new(record))),
                Heard::Held(record, silent) => (record, silent),
                Heard::Released(record) => (record, Duration::ZERO),
            };
            let now = (record.host.name.clone(), record.state);
            if holder.as_ref() != Some(&now) {
                info!(image = %self.image.display(), host = now.0, state = ?now.1, "is watched");
                holder = Some(now);
            }
            if silent < patience(&record) {
                std::thread::sleep(record.lease / 4);
                continue;
            }
            if let Some(taken) = self.try_to_take(record, silent, fencing) {
                return Ok(Some(taken));
            }
        }
        Ok(None)
    }

    /// Takes the image of a host that is silent, if that is possible; otherwise it is watched anew.
    fn try_to_take(&mut self, from: Record, silent: Duration, fencing: Option<Fencing<'_>>) -> Option<Taken> {
        let (image, host) = (self.image.display().to_string(), from.host.name.clone());
        warn!(image, host, ?silent, "its host is silent");
        let began = since_boot();
        if let Some(fencing) = fencing
            && let Err(why) = fencing(&host)
        {
            error!(image, host, "it is not known to be gone, and the image is not taken: {why}");
            self.last = None;
            return None;
        }
        let fenced = fencing.is_some();
        match self.take_over(fenced) {
            Ok(_) => Some(Taken { from, silent, fenced, took: since_boot().saturating_sub(began) }),
            Err(error) => {
                warn!(image, host, %error, "the image is not taken");
                self.last = None;
                None
            }
        }
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
