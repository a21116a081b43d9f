//! What an export shows beside the LUN's blocks, or in their place: dirty bitmaps, and the LUN as it was when a backup began.
//!
//! An export has numbers, and not names, of what it shows: a job or a bitmap that comes later under the same name is another, and the
//! export of what is gone says so.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

use tracing::error;

use super::{JobError, Jobs};
use crate::{
    job::{
        front::Front,
        mirror::{Mirror, past::PastError},
    },
    lun::stack::Stack,
    scsi::{
        Sense,
        neighbour::{Answer, Errand, Undone},
        sense::{self, Asc, SenseKey},
    },
    sys::mem::Buffer,
    units::{BlockSize, ByteOffset, Lba},
    volume::{ExtentKind, Volume},
};

/// Runs of one answer.
const MOST_RUNS: usize = 4096;

/// What an export is to show.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expose {
    /// The backup whose moment it is of; the LUN as it is, if there is none.
    pub moment_of: Option<String>,
    /// Dirty bitmaps.
    pub bitmaps: Vec<String>,
    /// Clients may write.
    pub writable: bool,
}

/// What an export shows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::lun) struct Shown {
    /// The number of a moment.
    pub moment: Option<u64>,
    /// The numbers of dirty bitmaps, and whether they are those of the moment's backup.
    pub bitmaps: Vec<(u64, bool)>,
}

/// What is asked of an export.
#[derive(Debug)]
pub(in crate::lun) enum Ask {
    /// To do something with the LUN as it was at that moment.
    Past(u64, Errand),
    /// What a dirty bitmap of the export has marked, in blocks: its place among those that are shown, a byte and so many bytes.
    Marked(Shown, usize, (u64, u64)),
}

/// What it answers.
#[derive(Debug)]
pub(in crate::lun) enum Told {
    Done(Result<Answer, Undone>),
    Marked(Vec<(u64, bool)>),
}

/// A backup whose moment is exported.
struct Moment {
    number: u64,
    id: String,
    mirror: Weak<Mirror<Stack>>,
}

/// Those of a LUN.
#[derive(Default)]
pub(super) struct Moments {
    all: RefCell<Vec<Moment>>,
    made: Cell<u64>,
}

impl Moments {
    fn add(&self, mirror: &Rc<Mirror<Stack>>) -> u64 {
        let number = self.made.replace(self.made.get() + 1);
        let moment = Moment { number, id: mirror.id().to_owned(), mirror: Rc::downgrade(mirror) };
        self.all.borrow_mut().push(moment);
        number
    }

    /// The backup whose moment has that number, if it keeps it.
    fn find(&self, number: u64) -> Result<Rc<Mirror<Stack>>, JobError> {
        let all = self.all.borrow();
        let Some(moment) = all.iter().find(|moment| moment.number == number) else {
            return Err(JobError::Past("the export is gone".into()));
        };
        let mirror = moment.mirror.upgrade().filter(|mirror| mirror.keeps_its_moment());
        mirror.ok_or_else(|| lost(&moment.id))
    }
}

fn lost(id: &str) -> JobError {
    JobError::Past(format!("the point in time is lost: the backup '{id}' that kept it has ended"))
}

impl Jobs {
    /// An export begins.
    pub(in crate::lun) async fn expose(
        &self,
        front: &Front<Stack>,
        order: Expose,
    ) -> Result<Shown, JobError> {
        // A transaction may have done something with them that it takes back.
        front.passable().await;
        let active = self.active.borrow().clone();
        let (mut moment, mut lent) = (None, None);
        if let Some(id) = &order.moment_of {
            let active = active.filter(|active| active.mirror.id() == id);
            let active = active.ok_or_else(|| JobError::NotFound(id.clone()))?;
            if !active.mirror.keeps_its_moment() {
                let words = format!(
                    "Job '{id}' keeps no point in time that could be exported: a backup with sync none does"
                );
                return Err(JobError::Past(words));
            }
            if order.writable {
                return Err(JobError::Past(format!("the point in time of job '{id}' cannot be written to")));
            }
            lent = active.bitmap.as_ref().map(|(name, _)| name.clone());
            moment = Some(active);
        }
        let is_lent = |name: &str| lent.as_deref() == Some(name);
        let live = order.writable || front.limits().read_only;
        let numbers = front.bitmaps().expose(&order.bitmaps, is_lent, live)?;
        let bitmaps = numbers.into_iter().zip(order.bitmaps.iter().map(|name| is_lent(name))).collect();
        let moment = moment.map(|active| self.exposed.add(&active.mirror));
        Ok(Shown { moment, bitmaps })
    }

    /// It ends.
    pub(in crate::lun) async fn cover(&self, front: &Front<Stack>, shown: Shown) {
        front.passable().await;
        let numbers: Vec<u64> = shown.bitmaps.iter().map(|(number, _)| *number).collect();
        front.bitmaps().cover(&numbers);
        self.exposed.all.borrow_mut().retain(|moment| Some(moment.number) != shown.moment);
    }

    /// A client of it asks.
    pub(in crate::lun) async fn ask_exposed(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        ask: Ask,
    ) -> Result<Told, JobError> {
        match ask {
            Ask::Past(number, errand) => self.ask_past(number, block_size, errand).await.map(Told::Done),
            Ask::Marked(shown, which, (at, len)) => {
                if let Some(number) = shown.moment {
                    self.exposed.find(number)?;
                }
                let gone = || JobError::Past("the dirty bitmap of the export is gone".into());
                let (number, lent) = *shown.bitmaps.get(which).ok_or_else(gone)?;
                let range = at..at.saturating_add(len);
                let runs = front.bitmaps().exposed(number, lent, range, block_size.bytes(), MOST_RUNS);
                runs.map(Told::Marked).ok_or_else(gone)
            }
        }
    }

    async fn ask_past(
        &self,
        number: u64,
        block_size: BlockSize,
        errand: Errand,
    ) -> Result<Result<Answer, Undone>, JobError> {
        let mirror = self.exposed.find(number)?;
        let capacity = mirror.map().capacity();
        let place = |lba: Lba, blocks: u64| {
            let bytes = |n: u64| n.checked_mul(block_size.bytes());
            let end = lba.0.checked_add(blocks).and_then(bytes).filter(|end| *end <= capacity);
            Some((ByteOffset(bytes(lba.0)?), end? - bytes(lba.0)?))
        };
        let refuse = |sense: Sense| Ok(Err(Undone::Failed(sense.into())));
        let failed = |e: PastError| match e {
            PastError::Lost => Err(lost(mirror.id())),
            PastError::Io { source, error } => {
                error!(job = mirror.id(), "what was at the point in time cannot be read: {error}");
                // What is wrong with the copy is not the LUN's.
                if source {
                    self.events.failed(&error);
                }
                Ok(Err(Undone::Failed(sense::from_io_error(&error, block_size))))
            }
        };
        match errand {
            Errand::Describe => {
                Ok(Ok(Answer::Described { block_size, blocks: block_size.blocks_in(capacity).0 }))
            }
            // Nothing is written.
            Errand::Flush => Ok(Ok(Answer::Written)),
            Errand::Read { lba, blocks } => {
                let Some((at, len)) = place(lba, blocks) else { return refuse(Sense::out_of_range(lba)) };
                let to = Buffer::zeroed(len as usize).sg();
                match mirror.read_past(at, &to).await {
                    Ok(()) => Ok(Ok(Answer::Data(to.to_vec(), None))),
                    Err(e) => failed(e),
                }
            }
            Errand::Map { lba, blocks } => {
                let Some((at, len)) = place(lba, blocks) else { return refuse(Sense::out_of_range(lba)) };
                match mirror.map_past(at, len, MOST_RUNS).await {
                    Ok(runs) => {
                        let run = |(len, kind): (u64, ExtentKind)| (len, kind, 0);
                        Ok(Ok(Answer::Mapped(runs.into_iter().map(run).collect())))
                    }
                    Err(e) => failed(e),
                }
            }
            Errand::Write { .. } | Errand::Zero { .. } | Errand::Take { .. } => {
                refuse(Sense::new(SenseKey::DataProtect, Asc::WRITE_PROTECTED))
            }
            Errand::Lend { .. } => Ok(Ok(Answer::Lent(None))),
        }
    }

    /// A job has ended: waits until nobody reads what it kept, and says that the export is of no use any more.
    pub(super) async fn leave_the_past(&self, mirror: &Rc<Mirror<Stack>>) {
        if !mirror.settings().keeps_only_the_past() {
            return;
        }
        mirror.past_is_left().await;
        if self.exposed.all.borrow().iter().any(|moment| moment.mirror.ptr_eq(&Rc::downgrade(mirror))) {
            error!(
                job = mirror.id(),
                "the point in time is still exported, and lost: whoever reads the export has errors from now on"
            );
        }
    }
}
