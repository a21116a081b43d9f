//! The new image of a LUN that is handed over with its storage, as the LUN's thread sees it: a volume that can only be written, on another host.
//!
//! Each operation is a piece ([`crate::handover::storage`]) that somebody else carries there, on a thread that may wait for a connection. The answer comes by
//! a pair of sockets, which wakes the task that waits wherever the LUN's thread sleeps, also when its loop is over. A LUN with protection information sends the tuples of whatever it
//! writes: what comes there is compared with them, and stored as it was made here.

use std::{
    cell::RefCell,
    fmt,
    io::Write,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use super::{
    LunError, Remote, chain,
    events::JobStatus,
    jobs::{HandoverOrder, JobOrder},
    stack::Stack,
};
use crate::{
    handover::{
        Failure,
        state::DirtyBitmap,
        storage::{Back, Kept, MOST, Parcel, Piece},
    },
    image::{
        Image,
        open::{OpenOptions, open},
    },
    pi::{Exposure, PiMode, check::Checker},
    sys::{
        io::{Io, net::Stream},
        mem::Sg,
    },
    units::{ByteOffset, Lba},
    volume::{Extent, IoError, IoErrorKind, IoOp, Limits, PiType, Result, Volume, WriteFlags},
};

/// The way to the new image, for the LUN's thread and for whoever hands the LUN over.
pub struct Far {
    to: Sender<Parcel>,
    address: String,
    last: AtomicBool,
    stopped: Mutex<Option<Stopped>>,
}

/// How the LUN was when it stopped for the last call.
struct Stopped {
    whole: std::result::Result<(), String>,
    bitmaps: Vec<DirtyBitmap>,
}

impl fmt::Debug for Far {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Far({})", self.address)
    }
}

/// Two of them are the same only if they are one.
impl PartialEq for Far {
    fn eq(&self, other: &Far) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for Far {}

impl Far {
    /// What is put into `to` is carried to whoever listens at that address.
    pub fn new(to: Sender<Parcel>, address: String) -> Arc<Far> {
        Arc::new(Far { to, address, last: AtomicBool::new(false), stopped: Mutex::new(None) })
    }

    /// Where that is, for people.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// When the LUN stops next, what is still to be copied is, before its image is closed.
    pub fn call_the_last(&self) {
        self.last.store(true, Ordering::Release);
    }

    pub(super) fn is_last_call(&self) -> bool {
        self.last.load(Ordering::Acquire)
    }

    fn stopped(&self) -> MutexGuard<'_, Option<Stopped>> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_stopped(&self, whole: std::result::Result<(), String>, bitmaps: Vec<DirtyBitmap>) {
        *self.stopped() = Some(Stopped { whole, bitmaps });
    }

    /// The dirty bitmaps that the LUN had when it stopped.
    pub fn bitmaps(&self) -> Vec<DirtyBitmap> {
        self.stopped().as_ref().map(|stopped| stopped.bitmaps.clone()).unwrap_or_default()
    }

    /// Whether the new image had, durably, all that the LUN had when it stopped.
    ///
    /// # Errors
    /// Why it has not.
    pub fn whole(&self) -> std::result::Result<(), String> {
        let whole = self.stopped().as_ref().map(|stopped| stopped.whole.clone());
        whole.unwrap_or_else(|| Err("the copy had ended before the LUN stopped".to_owned()))
    }
}

/// How often it is looked how far the copy is.
const LOOK: Duration = Duration::from_millis(100);

/// How long what is left to copy may not have become less before guests are held to the copy's pace.
const PATIENCE: Duration = Duration::from_secs(2);

/// What may be left when the LUN is stopped: initiators wait for it.
const LITTLE: u64 = 4 << 20;

/// Copies a LUN that serves, until so little is left that it can be stopped for that, and `may_stop` says that it may: asked again and again, while the copy keeps up.
///
/// # Errors
/// Why not. There is no copy under way then.
pub fn copy(
    lun: &Remote,
    id: &str,
    far: Arc<Far>,
    may_stop: &dyn Fn() -> bool,
) -> std::result::Result<(), Failure> {
    let told = |e: LunError| Failure::new(chain(&e));
    // One that ended when nobody waited for it any more.
    let _ = lun.job(JobOrder::Dismiss(id.to_owned()));
    lun.job(JobOrder::Handover(HandoverOrder { id: id.to_owned(), far })).map_err(told)?;
    let copied = follow(lun, id, may_stop);
    if copied.is_err() {
        // It has ended already, or the LUN has.
        let _ = lun.job(JobOrder::Cancel { id: id.to_owned(), force: true });
        let gone = || {
            lun.job(JobOrder::Query).map_or(true, |jobs| {
                jobs.iter().all(|job| job.id != id || job.status == JobStatus::Concluded)
            })
        };
        while !gone() {
            std::thread::sleep(LOOK);
        }
        let _ = lun.job(JobOrder::Dismiss(id.to_owned()));
    }
    copied
}

fn follow(lun: &Remote, id: &str, may_stop: &dyn Fn() -> bool) -> std::result::Result<(), Failure> {
    let told = |e: LunError| Failure::new(chain(&e));
    let (mut least, mut since, mut converges) = (u64::MAX, Instant::now(), false);
    loop {
        let jobs = lun.job(JobOrder::Query).map_err(told)?;
        let Some(job) = jobs.iter().find(|job| job.id == id) else {
            return Err(Failure::new("somebody has ended the copy"));
        };
        if job.status == JobStatus::Concluded {
            let reason = job.error.clone().unwrap_or_else(|| "the copy has ended".to_owned());
            return Err(Failure::new(reason));
        }
        let left = job.len.saturating_sub(job.offset);
        if left < least || job.paused {
            (least, since) = (left.min(least), Instant::now());
        }
        if !converges && (job.ready || since.elapsed() >= PATIENCE) {
            lun.job(JobOrder::Converge(id.to_owned())).map_err(told)?;
            converges = true;
            continue;
        }
        if converges && job.ready && !job.paused && left <= LITTLE && may_stop() {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}

/// A waiting place: our end is readable when the answer is there.
struct Bell {
    ours: Stream,
    theirs: Arc<UnixStream>,
}

type Answer = std::result::Result<(), Failure>;

/// The volume.
pub(super) struct Away {
    io: Io,
    far: Arc<Far>,
    limits: Limits,
    block: u64,
    checker: Option<Checker>,
    /// Waiting places that nobody uses.
    bells: RefCell<Vec<Bell>>,
    /// It has no image here; this one holds nothing, and is for those who ask every stack for its own.
    none: Image,
}

impl Away {
    /// Has the new image of that LUN made there.
    ///
    /// # Errors
    /// Why it is not.
    pub(super) async fn begin(
        io: &Io,
        far: Arc<Far>,
        of: &Stack,
        block: u64,
    ) -> std::result::Result<Away, LunError> {
        let limits =
            Limits { read_only: false, atomic_write: 0, atomic_unit: 0, tells_free: false, ..of.limits() };
        let nothing = OpenOptions { null_size: Some(limits.capacity), lock: false, ..OpenOptions::default() };
        let none = open(io, &PathBuf::from("/dev/null"), &nothing).await?;
        let checker = of.protected().map(|p| p.checker());
        let kept = of.protected().map(|p| {
            let info = p.sidecar().info();
            Kept {
                kind: p.kind_at_rest().number(),
                journal: info.mode == PiMode::Journal,
                initiators: info.tags == Exposure::Initiator,
                hidden: info.hidden,
            }
        });
        let away = Away { io: io.clone(), far, limits, block, checker, bells: RefCell::default(), none };
        away.call(IoOp::Open, Piece::Begin(kept)).await?;
        Ok(away)
    }

    pub(super) fn far(&self) -> &Far {
        &self.far
    }

    pub(super) fn none(&self) -> &Image {
        &self.none
    }

    pub(super) fn kind(&self) -> Option<PiType> {
        self.checker.map(|c| c.kind)
    }

    pub(super) fn block(&self) -> u64 {
        self.block
    }

    /// Has that done there.
    async fn call(&self, op: IoOp, piece: Piece) -> Result<()> {
        let failed = |e| IoError::from_io(op, e).path(self.far.address());
        let free = self.bells.borrow_mut().pop();
        let bell = match free {
            Some(bell) => bell,
            None => {
                let (ours, theirs) = Stream::pair(&self.io).map_err(failed)?;
                Bell { ours, theirs: Arc::new(theirs) }
            }
        };
        let slot: Arc<Mutex<Option<Answer>>> = Arc::default();
        let (out, ring) = (slot.clone(), bell.theirs.clone());
        let back = Back::new(move |answer| {
            *out.lock().unwrap_or_else(PoisonError::into_inner) = Some(answer);
            // Whoever waited may have gone.
            let _ = (&*ring).write(&[1]);
        });
        // One that is not taken answers as it is dropped.
        drop(self.far.to.send(Parcel { piece, back }));
        let mut rung = [0];
        while let Err(e) = bell.ours.try_receive_bytes(&mut rung) {
            match e.kind() {
                std::io::ErrorKind::WouldBlock => bell.ours.readable().await.map_err(failed)?,
                std::io::ErrorKind::Interrupted => {}
                _ => return Err(failed(e)),
            }
        }
        self.bells.borrow_mut().push(bell);
        let answer = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let lost = || Err(Failure::new("nobody has answered"));
        answer.unwrap_or_else(lost).map_err(|failure| {
            IoError::new(IoErrorKind::Unreachable, op).path(self.far.address()).detail(failure.reason)
        })
    }

    /// Sends blocks with those tuples; with new ones, if none are given and the LUN has some.
    async fn put(&self, at: ByteOffset, from: &Sg, tuples: Option<&[u8]>) -> Result<()> {
        let mut done = 0;
        while done < from.len() {
            let len = (from.len() - done).min(MOST);
            let (place, part) = (at.0 + done as u64, from.slice(done, len));
            let blocks = |bytes: usize| bytes / self.block as usize * 8;
            // A copy, since a guest may change its memory at any time: what goes is what the tuples were made of.
            let data = part.to_vec();
            let tuples = match (&self.checker, tuples) {
                (None, _) => None,
                (Some(_), Some(tuples)) => {
                    tuples.get(blocks(done)..blocks(done) + blocks(len)).map(<[u8]>::to_vec)
                }
                (Some(checker), None) => {
                    let copy = crate::sys::mem::Buffer::from_slice(&data).sg();
                    Some(checker.generate(&copy, Lba(place / self.block)))
                }
            };
            self.call(IoOp::Write, Piece::Write { at: place, data, tuples }).await?;
            done += len;
        }
        Ok(())
    }

    pub(super) async fn put_whole(&self, at: ByteOffset, from: &Sg, tuples: Option<Vec<u8>>) -> Result<()> {
        self.put(at, from, tuples.as_deref()).await
    }

    fn not_here<T>(&self, op: IoOp) -> Result<T> {
        let words = "the new image is another host's, and is only written";
        Err(IoError::new(IoErrorKind::Unsupported, op).path(self.far.address()).detail(words))
    }
}

impl Volume for Away {
    fn limits(&self) -> Limits {
        self.limits.clone()
    }

    async fn read(&self, _: ByteOffset, _: &Sg) -> Result<()> {
        self.not_here(IoOp::Read)
    }

    async fn write(&self, at: ByteOffset, from: &Sg, _: WriteFlags) -> Result<()> {
        self.put(at, from, None).await
    }

    async fn flush(&self) -> Result<()> {
        self.call(IoOp::Flush, Piece::Flush).await
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        self.call(IoOp::Discard, Piece::Discard { at: at.0, len }).await
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        self.call(IoOp::Write, Piece::Zeroes { at: at.0, len, may_unmap }).await
    }

    async fn map_extents(&self, _: ByteOffset, _: u64) -> Result<Vec<Extent>> {
        self.not_here(IoOp::Map)
    }

    async fn resize(&self, _: u64) -> Result<()> {
        self.not_here(IoOp::Resize)
    }

    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        _: WriteFlags,
    ) -> Result<()> {
        self.put(at, from, Some(&tuples)).await
    }

    /// Nobody here decides when the new image is closed.
    async fn close(&self) -> Result<()> {
        Ok(())
    }
}
