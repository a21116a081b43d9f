//! One LUN: its thread, its event loop, the stack it is built from.
//!
//! [`start`] opens the image on the LUN's own thread, attaches the ring and serves it until [`LunHandle::stop`]. Everything that
//! belongs to a LUN lives on that thread; from outside there are messages. A ring that makes no sense, an I/O backend that
//! fails or a panic ends that thread alone: the LUN is [`State::Failed`] with the reason, and the others never notice.

pub mod away;
pub mod bitmaps;
pub mod config;
pub mod continued;
pub mod cpus;
mod event_loop;
pub mod events;
pub mod exported;
#[cfg(feature = "fault-points")]
mod fault_points;
pub mod handed_over;
mod inbox;
pub mod jobs;
pub mod landing;
#[cfg(test)]
mod loop_tests;
pub mod measured;
pub mod moved;
pub mod neighbours;
mod recheck;
mod remote;
pub mod saved_pages;
pub mod scrub;
mod service;
mod spin;
mod stack;
pub mod state_file;
mod stats;
pub mod throttle;
pub mod trace;
pub mod traffic;
mod words;

use std::{
    io,
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use tracing::{error, info, warn};

pub use crate::image::{ImageInfo, qcow2::SnapshotInfo};
use crate::{
    image::{
        open::OpenError,
        owner::{Claim, Own},
    },
    pi::PiOpenError,
    ring::{Device, Ring, RingError},
    sys::{
        exec::Executor,
        io::{Backend, Io},
    },
    units::BlockSize,
    volume::{IoError, Volume},
};
use config::DeviceConfig;
use continued::ContinuedFile;
use cpus::Cpus;
use event_loop::{EventLoop, run_to_end};
pub use inbox::Pulse;
use inbox::{Inbox, Message};
use jobs::JobError;
use moved::Moves;
pub use neighbours::Neighbourhood;
use remote::SharedMade;
pub use remote::{Made, Remote};
use scrub::ScrubError;
use service::Lun;
pub use service::serial_of;
use stack::Stack;
use state_file::{NewerVersion, StateFile};
pub use stats::{PublicStats, ScrubSummary, Stats, SystemCalls};
pub use words::chain;
use words::panic_text;

/// Bytes of a LUN's stack. Futures are moved over it when they begin, and in a build that is not optimized they are large; what is not
/// touched takes no memory.
const STACK: usize = 8 << 20;

/// How often one who waits for an answer looks whether the LUN is still there.
const LOOK: Duration = Duration::from_millis(200);

/// How long a message may wait for its answer. A resize writes metadata; nothing that is asked takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How long a LUN's thread may leave a message lying before nobody waits for it any more.
const SILENCE: Duration = Duration::from_secs(5);

/// What a LUN is made of.
#[derive(Debug)]
pub struct LunParams {
    /// The backstore's name.
    pub name: String,
    /// Image, protection and the rest of `dev_config`.
    pub config: DeviceConfig,
    /// The kernel's `hw_block_size`.
    pub block_size: BlockSize,
    /// The kernel's `dev_size`, in bytes.
    pub capacity: u64,
    /// The kernel's `emulate_write_cache`.
    pub write_cache: bool,
    /// The kernel's `wwn/vpd_unit_serial`, if it is set.
    pub serial: Option<String>,
    /// Where saved mode pages are kept; without it MODE SELECT refuses to save.
    pub state_dir: Option<PathBuf>,
    /// The way to the kernel; the best that it permits if not given.
    pub backend: Option<Backend>,
    /// Look at the ring for a moment before sleeping, where that has been worth it.
    pub polling: bool,
    /// The LUNs that it may copy to and from, if its configuration has a copy group.
    pub neighbourhood: Neighbourhood,
    /// The ring.
    pub device: Device,
}

impl LunParams {
    /// The serial number, as initiators are told.
    fn serial(&self) -> String {
        serial_of(self.serial.as_deref(), &self.config, &self.name)
    }

    /// The file in that folder of what the LUN has to know again.
    fn state_file(&self, folder: &str) -> Option<StateFile> {
        self.state_dir.as_deref().map(|dir| StateFile::new(dir, folder, &self.serial()))
    }
}

/// Why a LUN does not start, or does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum LunError {
    /// The image.
    #[error(transparent)]
    Image(#[from] OpenError),
    /// The sidecar.
    #[error(transparent)]
    Protection(#[from] PiOpenError),
    /// The image lost its end since the LUN was created.
    #[error("{} has {capacity} bytes, and the LUN was created with {expected}", image.display())]
    Shrunk {
        /// The image.
        image: PathBuf,
        /// Its bytes.
        capacity: u64,
        /// The kernel's bytes.
        expected: u64,
    },
    /// Initiators were promised protection information, and the kernel would lose it.
    #[error(
        "this kernel's target_core_user drops protection information, whatever the fabric (loopback and vhost-scsi alike), so \
         initiators cannot send or get any"
    )]
    PiNotCarried,
    /// A capacity that the LUN cannot have.
    #[error("{capacity} bytes is no multiple of the block size of {block_size}")]
    Size {
        /// What was asked for.
        capacity: u64,
        /// The LUN's block size.
        block_size: BlockSize,
    },
    /// The ring.
    #[error("the ring cannot be used")]
    Ring(#[from] RingError),
    /// The volume refused.
    #[error(transparent)]
    Volume(#[from] IoError),
    /// The thread, its I/O backend or its descriptors.
    #[error("the LUN's thread cannot run")]
    Thread(#[source] io::Error),
    /// The processors that its thread is to run on.
    #[error("the LUN's thread cannot run on processors {0}")]
    Cpus(Cpus, #[source] io::Error),
    /// There is no thread any more.
    #[error("the LUN is not running: {0}")]
    Gone(String),
    /// What a scrub was told.
    #[error(transparent)]
    Scrub(#[from] ScrubError),
    /// What a block job was told.
    #[error(transparent)]
    Job(#[from] JobError),
    /// It cannot be told which image the LUN has.
    #[error("whether the LUN has been moved to another image cannot be read from {}", path.display())]
    Moved {
        /// The file that says so.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Limits hold, and are not kept.
    #[error("the limits hold now, and could not be saved")]
    Unsaved(#[source] io::Error),
    /// What initiators have saved was written by a newer version: without it the LUN would behave otherwise than they rely on.
    #[error("what was saved of the LUN cannot be read")]
    Saved(#[source] io::Error),
    /// The thread does not answer.
    #[error("the LUN has not answered for {} seconds", .0.as_secs())]
    Silent(Duration),
}

impl LunError {
    /// What to do about it, where that is known.
    pub fn next_step(&self) -> Option<String> {
        match self {
            LunError::Image(e) => e.next_step(),
            LunError::Protection(e) => e.next_step(),
            LunError::Shrunk { .. } => Some(
                "bring the whole image back, or delete the LUN and create it with the image as it is".into(),
            ),
            LunError::PiNotCarried => Some(
                "load the module that vendor/linux/README.md builds; or create the LUN with --exposure target, which protects its \
                 image all the same; or, for programs that build SCSI commands themselves, with --pi-transfer interleaved"
                    .into(),
            ),
            LunError::Size { block_size, .. } => Some(format!("give a multiple of {block_size}")),
            LunError::Scrub(ScrubError::NotProtected) => {
                Some("create it with --pi type1: the image is read once to protect it".into())
            }
            LunError::Cpus(..) => Some("name processors that this host has (`lscpu`), and that the service may use (CPUAffinity=)".into()),
            LunError::Saved(e) => NewerVersion::of(e).map(NewerVersion::next_step),
            LunError::Moved { path, .. } => Some(format!(
                "nothing is served that may have missed writes: see which image is the newest, name it, and remove {}",
                path.display()
            )),
            LunError::Scrub(_)
            | LunError::Job(_)
            | LunError::Ring(_)
            | LunError::Volume(_)
            | LunError::Thread(_)
            | LunError::Unsaved(_)
            | LunError::Gone(_)
            | LunError::Silent(_) => None,
        }
    }
}

/// Where a LUN is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It serves commands.
    Online,
    /// It was told to stop and has closed its image.
    Stopped,
    /// It has stopped by itself, for this reason. Its commands wait until the kernel gives them up or another handler comes.
    Failed(String),
}

/// A running LUN, seen from outside its thread.
#[derive(Debug)]
pub struct LunHandle {
    name: String,
    remote: Remote,
    thread: JoinHandle<()>,
}

/// Starts a LUN on a thread of its own. Returns when it serves, or has failed to.
///
/// # Errors
/// The reason why the image, its sidecar or the ring cannot be used; nothing is left open.
pub fn start(params: LunParams) -> Result<LunHandle, LunError> {
    start_where(params, None)
}

/// The same, where what a power cycle would reset is kept in a file; it is taken up from there if the ring is.
///
/// # Errors
/// As [`start`].
pub fn start_where(mut params: LunParams, continued: Option<ContinuedFile>) -> Result<LunHandle, LunError> {
    if let Some(dir) = &params.state_dir {
        let moves = Moves::of(dir, &params.name);
        let found = moved::settle(dir).and_then(|()| moves.follow(&params.config));
        params.config = found.map_err(|source| LunError::Moved { path: moves.path().to_owned(), source })?;
    }
    let (outbox, inbox) = inbox::channel().map_err(LunError::Thread)?;
    let (up, started) = sync_channel(1);
    let name = params.name.clone();
    let state = Arc::new(Mutex::new(State::Online));
    let made = SharedMade::new(Made { config: params.config.clone(), block_size: params.block_size });
    let (shared, made_here) = (state.clone(), made.clone());
    let thread = std::thread::Builder::new()
        // 15 characters is what the kernel shows.
        .name(format!("lun-{name}").chars().take(15).collect())
        .stack_size(STACK)
        .spawn(move || {
            let span = tracing::info_span!("lun", lun = %params.name);
            let _entered = span.entered();
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                live(params, continued, inbox, up, made_here)
            }));
            let end = match ended {
                Ok(end) => end,
                Err(panic) => State::Failed(format!("its thread panicked: {}", panic_text(&*panic))),
            };
            match &end {
                State::Failed(reason) => error!("the LUN has failed: {reason}"),
                _ => info!("stopped"),
            }
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = end;
        })
        .map_err(LunError::Thread)?;
    match started.recv() {
        Ok(Ok(())) => Ok(LunHandle { name, remote: Remote { outbox, state, made }, thread }),
        Ok(Err(e)) => {
            let _ = thread.join();
            Err(e)
        }
        Err(_) => {
            let _ = thread.join();
            let state = state.lock().unwrap_or_else(PoisonError::into_inner).clone();
            Err(LunError::Gone(match state {
                State::Failed(reason) => reason,
                _ => "its thread ended before it served".into(),
            }))
        }
    }
}

impl LunHandle {
    /// The backstore's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A way to ask it from anywhere.
    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Where it is in its life.
    pub fn state(&self) -> State {
        self.remote.state()
    }

    /// Changes the capacity; initiators get the unit attention 2Ah/09h.
    ///
    /// # Errors
    /// What the volume says, or that the LUN does not answer.
    pub fn resize(&self, capacity: u64) -> Result<(), LunError> {
        self.remote.resize(capacity)
    }

    /// Turns the write cache on or off; what was acknowledged is flushed before it is off.
    ///
    /// # Errors
    /// As [`LunHandle::resize`].
    pub fn set_write_cache(&self, on: bool) -> Result<(), LunError> {
        self.remote.ask(|back| Message::WriteCache(on, back))?
    }

    /// The counters.
    ///
    /// # Errors
    /// That the LUN does not answer.
    pub fn stats(&self) -> Result<Stats, LunError> {
        self.remote.stats()
    }

    /// Takes no more commands, finishes those under way, closes the image and ends the thread. What stands in the ring
    /// after that waits for the next handler.
    ///
    /// # Errors
    /// [`LunError::Gone`] with the reason, if it had failed or the close lost something.
    pub fn stop(self) -> Result<(), LunError> {
        self.request_stop();
        // The thread catches its own panics.
        let _ = self.thread.join();
        match self.remote.state() {
            State::Failed(reason) => Err(LunError::Gone(reason)),
            State::Online | State::Stopped => Ok(()),
        }
    }

    /// Begins what [`LunHandle::stop`] waits for, so that many LUNs stop at the same time.
    pub fn request_stop(&self) {
        self.remote.outbox.send(Message::Stop);
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// A LUN's life on its thread.
fn live(
    params: LunParams,
    continued: Option<ContinuedFile>,
    inbox: Inbox,
    up: SyncSender<Result<(), LunError>>,
    made: SharedMade,
) -> State {
    if let Some(cpus) = &params.config.cpus
        && let Err(e) = cpus.bind()
    {
        return refuse(up, LunError::Cpus(cpus.clone(), e));
    }
    let (io, exec) = match backend(params.backend) {
        Ok(io) => (io, Executor::new()),
        Err(e) => return refuse(up, LunError::Thread(e)),
    };
    let polling = params.polling;
    if let Err(e) = stack::check_transfer(&params).and_then(|()| saved_pages::check(&params)) {
        return refuse(up, e);
    }
    let pulse = inbox.outbox().pulse();
    // Its loop turns once more, and finds out.
    let lost = Arc::new(move || pulse.ask());
    let handed_over = match handed_over::of(&params) {
        Ok(found) => found,
        Err(e) => return refuse(up, LunError::Saved(e)),
    };
    let expected = handed_over.as_ref().and_then(|(found, _)| found.generation);
    let comes = handed_over.is_some();
    // Without an identity of the host an image that has an owner's file is refused.
    let own = Claim::of_this_host().ok().map(|claim| Own { claim, expected, lost });
    let opened = {
        let io = io.clone();
        let exec_io = io.clone();
        let params = Rc::new(params);
        let for_task = params.clone();
        let open = async move {
            let LunParams { config, block_size, capacity, .. } = &*for_task;
            let stack = Stack::open_to_serve(&io, config, *block_size, *capacity, own).await?;
            let left = for_task.state_file(bitmaps::FOLDER).map(|file| bitmaps::found(&file, &stack));
            // Those of a LUN that comes from another host came with it.
            let left = left.filter(|_| !comes);
            let job = jobs::resume(&io, &for_task, &service::job_place(&for_task), &stack).await;
            // Nobody changes the image yet.
            let kept = bitmaps::load(&stack).await;
            Ok((stack, job, (kept, left.unwrap_or_default())))
        };
        let opened = run_to_end(&exec_io, &exec, None, open);
        opened.map(|opened| (opened, params))
    };
    let (opened, params) = match opened {
        Ok((Ok(opened), params)) => (opened, params),
        Ok((Err(e), _)) => return refuse(up, e),
        Err(e) => return refuse(up, LunError::Thread(e)),
    };
    let lun = Rc::new(Lun::new(&params, continued.clone(), opened, &io, inbox.outbox(), made));
    let Some(params) = Rc::into_inner(params) else {
        return refuse(up, LunError::Gone("its parameters are still in use".into()));
    };
    let ring = match Ring::attach(params.device) {
        Ok(ring) => ring,
        Err(e) => {
            close(&io, &exec, lun.clone(), true);
            lun.jobs().stop();
            return refuse(up, e.into());
        }
    };
    if let Some(commands) = ring.resumed() {
        info!(commands, "taken up where another daemon left it");
    }
    lun.takes_up(ring.resumed().is_some(), continued.as_ref(), handed_over);
    info!(image = %params.config.image.display(), io = %io.backend(), pi = ?params.config.pi, "online");
    if up.send(Ok(())).is_err() {
        warn!("nobody waits for this LUN any more");
    }
    let membership = lun.join_neighbours();
    let served = EventLoop::new(ring, io.clone(), exec.clone(), lun.clone(), inbox, polling).run();
    drop(membership);
    if served.is_ok() {
        lun.has_answered();
    }
    lun.scrubber().stop();
    let closed = close(&io, &exec, lun.clone(), served.is_ok());
    lun.jobs().stop();
    match (served, closed) {
        (Ok(()), None) => State::Stopped,
        (Ok(()), Some(reason)) => State::Failed(reason),
        (Err(e), _) => State::Failed(chain(&e)),
    }
}

fn refuse(up: SyncSender<Result<(), LunError>>, error: LunError) -> State {
    let reason = chain(&error);
    let _ = up.send(Err(error));
    State::Failed(reason)
}

/// Closes the stack; tells what went wrong if something that was promised may be lost. Unless it ends `in_order`, it may have lost its image.
fn close(io: &Io, exec: &Executor, lun: Rc<Lun>, in_order: bool) -> Option<String> {
    let closed = run_to_end(io, exec, None, async move {
        lun.jobs().send_the_rest(lun.front()).await;
        lun.keep_bitmaps().await;
        let closed = lun.front().close().await;
        if in_order && closed.is_ok() {
            lun.leave_bitmaps();
        }
        lun.jobs().close().await;
        closed
    });
    match closed {
        Ok(Ok(())) => None,
        Ok(Err(e)) => Some(chain(&e)),
        Err(e) => Some(chain(&e)),
    }
}

fn backend(asked: Option<Backend>) -> io::Result<Io> {
    if let Some(backend) = asked {
        return Io::new(backend);
    }
    let (io, refused) = Io::best();
    if let Some(e) = refused {
        // Each LUN has its own I/O; the reason is the machine's.
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| warn!("io_uring is not permitted ({e}): I/O goes through threads"));
    }
    Ok(io)
}
