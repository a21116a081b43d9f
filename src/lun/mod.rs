//! One LUN: its thread, its event loop, the stack it is built from.
//!
//! [`start`] opens the image on the LUN's own thread, attaches the ring and serves it until [`LunHandle::stop`]. Everything that
//! belongs to a LUN lives on that thread; from outside there are messages. A ring that makes no sense, an I/O backend that
//! fails or a panic ends that thread alone: the LUN is [`State::Failed`] with the reason, and the others never notice.

pub mod config;
mod event_loop;
pub mod events;
mod inbox;
#[cfg(test)]
mod loop_tests;
pub mod saved_pages;
pub mod scrub;
mod service;
mod spin;
mod stack;
pub mod state_file;
pub mod traffic;

use std::{
    any::Any,
    io,
    path::PathBuf,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde::Serialize;
use tracing::{error, info, warn};

pub use crate::image::ImageInfo;
use crate::{
    image::{CacheCounts, open::OpenError},
    pi::{self, Exposure, PiOpenError, PiType, Transfer},
    ring::{Device, Ring, RingError},
    sys::{
        exec::Executor,
        io::{Backend, Io},
    },
    units::BlockSize,
    volume::{IoError, Volume},
};
use config::DeviceConfig;
use event_loop::{EventLoop, run_to_end};
use events::Watcher;
pub use inbox::Pulse;
use inbox::{Inbox, Message, Outbox};
use scrub::{Scrub, ScrubError, ScrubOrder, ScrubStatus};
use service::Lun;
pub use service::serial_of;
use stack::Stack;
use traffic::Traffic;

/// How often one who waits for an answer looks whether the LUN is still there.
const LOOK: Duration = Duration::from_millis(200);

/// How long a message may wait for its answer. A resize writes metadata; nothing that is asked takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

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
    /// The ring.
    pub device: Device,
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
    /// There is no thread any more.
    #[error("the LUN is not running: {0}")]
    Gone(String),
    /// What a scrub was told.
    #[error(transparent)]
    Scrub(#[from] ScrubError),
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
            LunError::Scrub(_)
            | LunError::Ring(_)
            | LunError::Volume(_)
            | LunError::Thread(_)
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

/// What commands have come to.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PublicStats {
    /// Bytes of data-in given back.
    pub bytes_in: u64,
    /// Bytes of data-out taken.
    pub bytes_out: u64,
    /// Commands that ended in CHECK CONDITION, unit attentions included.
    pub check_conditions: u64,
    /// Commands that ended in another status than GOOD and CHECK CONDITION.
    pub other_statuses: u64,
}

/// A LUN's counters since it started.
#[derive(Debug, Clone, Serialize)]
pub struct Stats {
    /// SCSI commands taken from the ring.
    pub commands: u64,
    /// Commands that task management took back before they began.
    pub aborted: u64,
    /// Batches of answers, each with one kick.
    pub batches: u64,
    /// How often the thread slept.
    pub sleeps: u64,
    /// Commands under way.
    pub in_flight: u64,
    /// The way to the kernel: `io_uring` or `threads`.
    pub io: String,
    /// The image's format.
    pub format: String,
    /// Bytes.
    pub capacity_bytes: u64,
    /// WCE.
    pub write_cache: bool,
    /// What commands have come to.
    #[serde(flatten)]
    pub counted: PublicStats,
    /// The same by kind of command.
    #[serde(skip)]
    pub traffic: Traffic,
    /// The type of protection that initiators see now: FORMAT UNIT may have chosen another than the configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub formatted_with: Option<PiType>,
    /// Protection, where there is any.
    pub pi: Option<pi::Counters>,
    /// The metadata caches of a qcow2 image and its backing files.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub caches: Option<CacheCounts>,
    /// The scrub under way, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubSummary>,
}

/// A scrub, in a few words.
#[derive(Debug, Clone, Serialize)]
pub struct ScrubSummary {
    /// How far it is.
    pub status: ScrubStatus,
    /// Bytes of the LUN that are behind it.
    pub done_bytes: u64,
    /// Blocks that do not match.
    pub mismatches: u64,
    /// Blocks that could not be read.
    pub unreadable: u64,
}

impl From<Scrub> for ScrubSummary {
    fn from(scrub: Scrub) -> ScrubSummary {
        ScrubSummary {
            status: scrub.status,
            done_bytes: scrub.progress().0,
            mismatches: scrub.found.mismatches,
            unreadable: scrub.found.unreadable,
        }
    }
}

/// What a LUN was started with.
#[derive(Debug, Clone)]
pub struct Made {
    /// Image, protection and the rest of `dev_config`.
    pub config: DeviceConfig,
    /// Size of a block.
    pub block_size: BlockSize,
}

/// A way to ask a LUN from anywhere; clones ask the same one. It keeps nothing alive.
#[derive(Debug, Clone)]
pub struct Remote {
    outbox: Outbox,
    state: Arc<Mutex<State>>,
    made: Arc<Made>,
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

    /// What it was started with; known also of one that has failed.
    pub fn made(&self) -> &Made {
        &self.made
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

    /// The image and its backing files, from the top down.
    ///
    /// # Errors
    /// That the LUN does not answer.
    pub fn describe(&self) -> Result<Vec<ImageInfo>, LunError> {
        self.ask(Message::Describe)
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

    fn ask<T>(&self, message: impl FnOnce(SyncSender<T>) -> Message) -> Result<T, LunError> {
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
    let (outbox, inbox) = inbox::channel().map_err(LunError::Thread)?;
    let (up, started) = sync_channel(1);
    let name = params.name.clone();
    let state = Arc::new(Mutex::new(State::Online));
    let made = Arc::new(Made { config: params.config.clone(), block_size: params.block_size });
    let shared = state.clone();
    let thread = std::thread::Builder::new()
        // 15 characters is what the kernel shows.
        .name(format!("lun-{name}").chars().take(15).collect())
        .spawn(move || {
            let span = tracing::info_span!("lun", lun = %params.name);
            let _entered = span.entered();
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| live(params, inbox, up)));
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
fn live(params: LunParams, inbox: Inbox, up: SyncSender<Result<(), LunError>>) -> State {
    let (io, exec) = match backend(params.backend) {
        Ok(io) => (io, Executor::new()),
        Err(e) => return refuse(up, LunError::Thread(e)),
    };
    if let Err(e) = check_transfer(&params) {
        return refuse(up, e);
    }
    let opened = {
        let io = io.clone();
        let exec_io = io.clone();
        let params = Rc::new(params);
        let for_task = params.clone();
        let opened = run_to_end(&exec_io, &exec, None, async move { Stack::open(&io, &for_task).await });
        opened.map(|stack| (stack, params))
    };
    let (stack, params) = match opened {
        Ok((Ok(stack), params)) => (stack, params),
        Ok((Err(e), _)) => return refuse(up, e),
        Err(e) => return refuse(up, LunError::Thread(e)),
    };
    let lun = Rc::new(Lun::new(&params, stack, &io));
    let Some(params) = Rc::into_inner(params) else {
        return refuse(up, LunError::Gone("its parameters are still in use".into()));
    };
    let ring = match Ring::attach(params.device) {
        Ok(ring) => ring,
        Err(e) => {
            close(&io, &exec, lun.stack().clone());
            return refuse(up, e.into());
        }
    };
    if let Some(commands) = ring.resumed() {
        lun.goes_on();
        info!(commands, "taken up where another daemon left it");
    }
    info!(image = %params.config.image.display(), io = %io.backend(), pi = ?params.config.pi, "online");
    if up.send(Ok(())).is_err() {
        warn!("nobody waits for this LUN any more");
    }
    let served = EventLoop::new(ring, io.clone(), exec.clone(), lun.clone(), inbox).run();
    lun.scrubber().stop();
    let closed = close(&io, &exec, lun.stack().clone());
    match (served, closed) {
        (Ok(()), None) => State::Stopped,
        (Ok(()), Some(reason)) => State::Failed(reason),
        (Err(e), _) => State::Failed(chain(&e)),
    }
}

/// A LUN that says PROTECT = 1 over a kernel that drops tuples would fail every read and write of a guest that uses them.
fn check_transfer(params: &LunParams) -> Result<(), LunError> {
    let config = &params.config;
    let promised = config.exposure == Exposure::Initiator && config.transfer == Transfer::Separate;
    if promised && !params.device.carries_dif()? {
        return Err(LunError::PiNotCarried);
    }
    Ok(())
}

fn refuse(up: SyncSender<Result<(), LunError>>, error: LunError) -> State {
    let reason = chain(&error);
    let _ = up.send(Err(error));
    State::Failed(reason)
}

/// Closes the stack; tells what went wrong if something that was promised may be lost.
fn close(io: &Io, exec: &Executor, stack: Rc<Stack>) -> Option<String> {
    let closed = run_to_end(io, exec, None, async move { stack.close().await });
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

/// An error and its sources in one line. A source that the text before it has said already is left out.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        let more = e.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = e.source();
    }
    text
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}
