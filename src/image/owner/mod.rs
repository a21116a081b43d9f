//! Whose an image on shared storage is: one host's at a time, by generations in a file beside it ([`record`]).
//!
//! QEMU's locks (`image/lock`) keep two processes of one host apart, and two hosts where the file system passes locks on, as long as the server has
//! not dropped those of a host that it did not hear of. This is for what they do not cover: a host that stood still, or was cut off, and goes on
//! after another has taken its image.
//!
//! The rule: a holder begins no I/O later than a *lease* after it began its last look at the record ([`keeper`], [`crate::sys::fence`]), and who takes an image from a
//! holder that has not released it writes the record first, and then waits longer than that lease. So the old one's I/O is over before the new one's
//! begins, whatever stood still in between, and no clocks are compared. On the same host nobody waits: there QEMU's locks tell that no other
//! process has the image.
//!
//! It stands beside the image and not in the sidecar's header, because images without protection have none, and because the header is written by the holder
//! itself, from memory: an old holder's would go over the new one's generation. An image without such a file is nobody's, and opened as always.

mod keeper;
mod left;
mod record;
mod watch;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;

pub use keeper::Keeper;
pub use left::Left;
pub use record::{HostId, OwnerState, Record, path_of};
pub use watch::{Fencing, Heard, Taken, Watch};

use super::open::OpenError;
use crate::sys::{fence::since_boot, io::Io};
use record::OwnerFile;

/// How long a holder may go on without a look at the record. It looks four times as often.
pub const LEASE: Duration = Duration::from_secs(10);

/// Why an image is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Another host has it.
    #[error("host {} has it (generation {})", .0.host.name, .0.generation)]
    Held(Box<Record>),
    /// Somebody was taking it over, and did not come to the end.
    #[error("host {} began to take it over, and did not come to the end (generation {})", .0.host.name, .0.generation)]
    HalfTaken(Box<Record>),
    /// It has changed hands since.
    #[error(
        "it is of generation {found}, and generation {expected} was handed over: somebody else has had it meanwhile"
    )]
    Generation {
        /// What was told.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// Its holder shows signs of life.
    #[error("host {} uses it at this moment", .0.host.name)]
    Alive(Box<Record>),
    /// This host has it.
    #[error("this host has it already (generation {})", .0.generation)]
    Ours(Box<Record>),
    /// There is no such file.
    #[error("there is no {}", .0.display())]
    NotShared(PathBuf),
    /// The file is of another version.
    #[error("its owner's file is of version {0}, and this program knows 1")]
    Version(u32),
    /// Neither copy is whole.
    #[error("its owner's file is damaged")]
    Damaged,
    /// The file system.
    #[error("its owner's file cannot be used")]
    Io(#[source] io::Error),
}

impl OwnerError {
    /// What to do about it.
    pub fn next_step(&self, image: &Path) -> Option<String> {
        let image = image.display();
        match self {
            OwnerError::Held(record) => Some(format!(
                "hand it over there (tcmu-dif handover); or, if host {} is gone: tcmu-dif image owner --take-over {image}",
                record.host.name
            )),
            OwnerError::HalfTaken(_) => {
                Some(format!("take it over to the end: tcmu-dif image owner --take-over {image}"))
            }
            OwnerError::Alive(record) => Some(format!(
                "hand it over there (tcmu-dif handover); only if host {} has been cut off from the storage: --force",
                record.host.name
            )),
            OwnerError::NotShared(_) => Some(format!("begin: tcmu-dif image owner --share {image}")),
            OwnerError::Damaged => Some(format!(
                "see that no host uses the image, and begin anew: rm {0} && tcmu-dif image owner --share {image}",
                path_of(Path::new(&image.to_string())).display()
            )),
            OwnerError::Ours(_) => Some("see what it is for: tcmu-dif list".to_owned()),
            OwnerError::Generation { .. } | OwnerError::Version(_) | OwnerError::Io(_) => None,
        }
    }
}

/// One who may take an image.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The host that it is on.
    pub host: HostId,
    /// How long it goes on without a look at the record.
    pub lease: Duration,
}

impl Claim {
    /// Whoever asks on this host.
    ///
    /// # Errors
    /// If the host has no identity.
    pub fn of_this_host() -> io::Result<Claim> {
        Ok(Claim { host: HostId::this()?, lease: LEASE })
    }

    fn record(&self, state: OwnerState, generation: u64) -> Record {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Record {
            state,
            generation,
            holder: Uuid::new_v4(),
            host: self.host.clone(),
            written: since.as_secs(),
            lease: self.lease,
        }
    }
}

/// An image that is held.
#[derive(Debug)]
pub struct Holding {
    file: OwnerFile,
    record: Record,
    looks: u64,
}

/// What the file says, if there is one.
///
/// # Errors
/// That it makes no sense; the file system's.
pub fn read(image: &Path) -> Result<Option<Record>, OwnerError> {
    let Some(file) = OwnerFile::open(image)? else { return Ok(None) };
    let _locked = file.lock(false)?;
    file.record().map(Some)
}

/// Begins to keep whose an image is. One that is kept already stays as it is.
///
/// # Errors
/// The file system's.
pub fn share(image: &Path, claim: &Claim) -> Result<Record, OwnerError> {
    if let Some(there) = read(image)? {
        return Ok(there);
    }
    let first = claim.record(OwnerState::Released, 1);
    match OwnerFile::create(image, &first) {
        Err(OwnerError::Io(e)) if e.kind() == io::ErrorKind::AlreadyExists => {
            read(image)?.ok_or(OwnerError::NotShared(path_of(image)))
        }
        made => made.map(|()| first),
    }
}

/// Whether that claim may have the image now; nothing is changed.
///
/// # Errors
/// Why not.
pub fn check(image: &Path, claim: &Claim) -> Result<(), OwnerError> {
    match read(image)? {
        Some(record) => may_take(&record, claim),
        None => Ok(()),
    }
}

fn may_take(record: &Record, claim: &Claim) -> Result<(), OwnerError> {
    match record.state {
        OwnerState::Released => Ok(()),
        OwnerState::Held if record.host.id == claim.host.id => Ok(()),
        OwnerState::Held => Err(OwnerError::Held(Box::new(record.clone()))),
        OwnerState::TakingOver => Err(OwnerError::HalfTaken(Box::new(record.clone()))),
    }
}

impl Holding {
    /// Takes an image, if it has an owner's file; the caller has QEMU's locks on it, so nobody else of this host has it. With a generation just
    /// if there is such a file, and it is of that one still; or if this host has taken it in that generation before, and died.
    ///
    /// # Errors
    /// Why it is another's; nothing has changed then.
    pub fn take(image: &Path, claim: &Claim, expected: Option<u64>) -> Result<Option<Holding>, OwnerError> {
        let Some(file) = OwnerFile::open(image)? else {
            return expected.map_or(Ok(None), |_| Err(OwnerError::NotShared(path_of(image))));
        };
        let record = {
            let _locked = file.lock(true)?;
            let before = file.record()?;
            may_take(&before, claim)?;
            let again = before.state == OwnerState::Held;
            let fits = |g: u64| g + u64::from(again) == before.generation;
            if let Some(expected) = expected.filter(|g| !fits(*g)) {
                return Err(OwnerError::Generation { expected, found: before.generation });
            }
            let record = claim.record(OwnerState::Held, before.generation + 1);
            file.write_record(&record).map_err(OwnerError::Io)?;
            record
        };
        Ok(Some(Holding { file, record, looks: 0 }))
    }

    /// The record as it was written when the image was taken.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Looks whether the image is ours still; until when, counted from the time before the look. `None` once it is another's.
    ///
    /// # Errors
    /// That it cannot be told.
    pub fn look(&mut self) -> Result<Option<Duration>, OwnerError> {
        let began = since_boot();
        let ours = {
            let _locked = self.file.lock(false)?;
            self.file.record()? == self.record
        };
        if !ours {
            return Ok(None);
        }
        self.looks += 1;
        self.file.write_pulse(self.record.holder, self.looks).map_err(OwnerError::Io)?;
        Ok(Some(began + self.record.lease))
    }

    /// Gives the image back, whose files are closed; the generation then.
    ///
    /// # Errors
    /// That it is another's by now, or the file system's.
    pub fn release(self) -> Result<u64, OwnerError> {
        let _locked = self.file.lock(true)?;
        let now = self.file.record()?;
        if now != self.record {
            return Err(OwnerError::Held(Box::new(now)));
        }
        let record = Record { state: OwnerState::Released, generation: now.generation + 1, ..now };
        self.file.write_record(&record).map_err(OwnerError::Io)?;
        Ok(record.generation)
    }
}

/// How a LUN takes its image.
#[derive(Clone)]
pub struct Own {
    /// As whom.
    pub claim: Claim,
    /// Just in that generation.
    pub expected: Option<u64>,
    /// Called, from another thread, when the image has become another's.
    pub lost: Arc<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Own({}, {:?})", self.claim.host.name, self.expected)
    }
}

/// An open image that is held, and the thread's I/O that is fenced for that. Dropped, it is given back too, unless operations may be under way still: then
/// it stays held by this host, which may take it again.
#[derive(Debug)]
pub(super) struct Owned {
    keeper: Option<Keeper>,
    generation: u64,
    io: FencedIo,
}

struct FencedIo(Io);

impl fmt::Debug for FencedIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Io")
    }
}

impl Owned {
    /// Takes the image, or looks only whether it may be opened.
    pub(super) fn begin(io: &Io, image: &Path, own: Option<&Own>) -> Result<Option<Owned>, OpenError> {
        let refused = |e| OpenError::owner(image, e);
        let Some(own) = own else {
            if read(image).map_err(refused)?.is_some() {
                let claim = Claim::of_this_host().map_err(|e| refused(OwnerError::Io(e)))?;
                check(image, &claim).map_err(refused)?;
            }
            return Ok(None);
        };
        let Some(holding) = Holding::take(image, &own.claim, own.expected).map_err(refused)? else {
            return Ok(None);
        };
        let generation = holding.record().generation;
        let lost = own.lost.clone();
        let keeper = Keeper::begin(holding, image, move || lost()).map_err(refused)?;
        io.set_fence(Some(keeper.fence().clone()));
        tracing::info!(image = %image.display(), generation, "the image is taken for this host");
        Ok(Some(Owned { keeper: Some(keeper), generation, io: FencedIo(io.clone()) }))
    }

    /// The generation in which it was taken.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Gives the image back, whose files nobody here touches any more.
    pub(super) fn end(mut self) -> Result<(), OwnerError> {
        self.give_back()
    }

    fn give_back(&mut self) -> Result<(), OwnerError> {
        let Some(keeper) = self.keeper.take() else { return Ok(()) };
        keeper.release()?;
        self.io.0.set_fence(None);
        Ok(())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.io.0.in_flight() == 0
            && let Err(e) = self.give_back()
        {
            tracing::warn!("an image that was dropped could not be given back: {e}");
        }
    }
}

/// Takes an image from a host that is gone, and waits until that can have begun its last I/O. The image is nobody's then, and this host may open it. With
/// `force` even from a holder that shows signs of life, which then stops.
///
/// # Errors
/// [`OwnerError::Alive`], [`OwnerError::NotShared`], and the file system's.
pub fn take_over(image: &Path, claim: &Claim, force: bool) -> Result<Record, OwnerError> {
    let file = OwnerFile::open(image)?.ok_or_else(|| OwnerError::NotShared(path_of(image)))?;
    let before = file.record()?;
    if before.state == OwnerState::Released {
        return Ok(before);
    }
    let mut heard = None;
    if before.state == OwnerState::Held && !force {
        let first = file.pulse().map_err(OwnerError::Io)?;
        std::thread::sleep(before.lease);
        heard = Some(first);
    }
    seize(&file, &before, claim, heard, false)
}

/// Writes that an image is taken from the holder of that record, if nothing has changed since and the holder's last sign of life is that still; waits until that has begun its last
/// I/O, unless it is known to be `gone`; and writes that it is nobody's.
fn seize(
    file: &OwnerFile,
    before: &Record,
    claim: &Claim,
    heard: Option<[u8; 24]>,
    gone: bool,
) -> Result<Record, OwnerError> {
    let taking = {
        let _locked = file.lock(true)?;
        let now = file.record()?;
        if now.generation != before.generation {
            return Err(OwnerError::Held(Box::new(now)));
        }
        if let Some(heard) = heard
            && file.pulse().map_err(OwnerError::Io)? != heard
        {
            return Err(OwnerError::Alive(Box::new(now)));
        }
        // Whoever goes on from here, should this process not, has to wait as long.
        let lease = before.lease.max(claim.lease);
        let taking = Record { lease, ..claim.record(OwnerState::TakingOver, now.generation + 1) };
        file.write_record(&taking).map_err(OwnerError::Io)?;
        taking
    };
    if !gone {
        // Half as much again, for clocks that do not run alike and for what storage does late.
        std::thread::sleep(taking.lease * 3 / 2);
    }
    let _locked = file.lock(true)?;
    let now = file.record()?;
    if now != taking {
        return Err(OwnerError::Held(Box::new(now)));
    }
    let free = Record { lease: claim.lease, ..claim.record(OwnerState::Released, taking.generation + 1) };
    file.write_record(&free).map_err(OwnerError::Io)?;
    Ok(free)
}

#[cfg(test)]
mod tests;
