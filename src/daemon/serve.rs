//! The daemon's loop: netlink, signals and a timer, over mio.

use std::{
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use mio::{Events as Ready, Interest, Poll, Token, unix::SourceFd};
use thiserror::Error;

use super::{
    beside::Beside,
    declaring::{Declared, Declaring},
    descriptors,
    devices::Devices,
    held,
    rundir::RunDir,
    settings::{InForce, Settings, Shared},
    systemd::Manager,
    worker::Host,
};
use crate::{
    control::{
        self, Registry, SOCKET, ShutdownCause,
        metrics::{self, http},
        server::Server,
        trace,
    },
    kernel::{
        backstore,
        modules::{self, ModuleError},
        netlink::{Events, Family, Heard, NetlinkError, Replies},
        tree::Real,
        uio::{Uio, UioDevice},
    },
    lun::config::SUBTYPE,
    sys::signals::{Signal, Signals},
};

const NETLINK: Token = Token(0);
const SIGNALS: Token = Token(1);
/// How often the loop looks whether what it knows is what there is.
const LOOK: Duration = Duration::from_secs(5);
/// How often it tidies up.
const TURN: Duration = Duration::from_secs(1);
/// How long LUNs may take to stop when the daemon does.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// Why the daemon can't begin or go on.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// A module or configfs is missing.
    #[error("the kernel isn't ready")]
    Module(#[from] ModuleError),
    /// Netlink.
    #[error("the kernel's events can't be heard")]
    Netlink(#[from] NetlinkError),
    /// Another daemon lives.
    #[error("another daemon is running as process {0}")]
    Running(i32),
    /// The run directory.
    #[error("the run directory's {}", .0.display())]
    Run(PathBuf, #[source] io::Error),
    /// The loop's own descriptors.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
}

/// Runs until SIGTERM or SIGINT; SIGHUP takes up what `reread` says is set by now (nothing, if that makes no sense), tries again at once what failed, and
/// looks anew at what is declared. `admin` does what is asked over QMP; `beside` begins what has threads of its own, once the LUNs are up, and what it gives is
/// kept until the daemon stops. To be called on the main thread, before any other is started.
///
/// # Errors
/// What keeps it from beginning; later failures are logged, and it goes on.
#[allow(clippy::too_many_arguments)] // Each is another's business; the command line puts them together, once.
pub fn run<B>(
    host: Arc<dyn Host>,
    run: RunDir,
    configfs: &Path,
    settings: Shared,
    reread: impl Fn() -> Option<Settings>,
    admin: impl control::Host + 'static,
    declared: impl Declared + 'static,
    beside: impl FnOnce() -> B,
) -> Result<(), DaemonError> {
    let signals = Signals::take().map_err(|e| DaemonError::Io("signals", e))?;
    let running = || DaemonError::Running(run.daemon().ok().flatten().unwrap_or(0));
    let locked = run.lock().map_err(|e| DaemonError::Run(run.path().to_owned(), e))?;
    let _lock = locked.ok_or_else(running)?;
    descriptors::make_room();
    modules::mount_configfs(configfs)?;
    modules::load("target_core_user")?;

    let family = Family::resolve()?;
    let events = Events::listen(&family)?;
    let replies = Replies::new(&family)?;
    replies.announce()?;
    let tree = Real::at(configfs);
    let uio = Uio::default();
    free_orphans(&uio, &tree);
    held::release_all(&tree, &run);

    let in_configfs =
        move |device: &UioDevice| tree.has_now(&backstore::path_of(device.name.hba, &device.name.name));
    let registry = Registry::with_host(admin);
    let mut devices = Devices::new(host, run.clone(), uio, Arc::new(replies), registry.clone(), in_configfs);
    let mut poll = Poll::new().map_err(|e| DaemonError::Io("epoll", e))?;
    for (fd, token) in [(events.as_raw_fd(), NETLINK), (signals.as_raw_fd(), SIGNALS)] {
        let registered = poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE);
        registered.map_err(|e| DaemonError::Io("epoll", e))?;
    }
    // Initiators wait for their LUNs since the daemon before has ended: these come first.
    look(&mut devices, false);
    let socket = run.path().join(SOCKET);
    // Dropped after the LUNs have stopped.
    let _server = Server::listen(&socket, registry.clone()).map_err(|e| DaemonError::Run(socket, e))?;
    let socket = run.path().join(metrics::SOCKET);
    let _metrics = http::Server::unix(&socket, registry.clone()).map_err(|e| DaemonError::Run(socket, e))?;
    let mut in_force = InForce::begin(settings, registry.clone(), run.clone(), Instant::now());
    let socket = run.path().join(trace::SOCKET);
    let _trace = trace::Server::listen(&socket, registry.clone()).map_err(|e| DaemonError::Run(socket, e))?;
    let others = move || family.listeners().is_some_and(|sockets| sockets > 1);
    let mut rivals = Beside::new(configfs);
    rivals.turn(others());
    let mut manager = Manager::from_env(Instant::now());
    let declaring = Declaring::new(Box::new(declared));
    declaring.begin();
    manager.begin(Instant::now(), declaring.is_at_work(), &devices.standings());
    let (mut beside, mut _kept) = (Some(beside), None);

    let mut ready = Ready::with_capacity(8);
    let mut looked = Instant::now();
    loop {
        match poll.poll(&mut ready, Some(TURN.min(manager.turn_within()))) {
            Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(DaemonError::Io("epoll", e)),
            _ => {}
        }
        // Both are read empty every turn: mio tells of edges.
        hear(&events, &mut devices);
        loop {
            match signals.take_next() {
                Ok(Some(Signal::Stop)) => {
                    tracing::info!(devices = devices.len(), "stopping");
                    registry.shut_down(ShutdownCause::Signal);
                    manager.stopping(devices.len());
                    registry.wait_for_no_source();
                    devices.stop(STOP_PATIENCE, |left| manager.still_stopping(Instant::now(), left));
                    return Ok(());
                }
                Ok(Some(Signal::Reload)) => {
                    tracing::info!("looking anew at what there is, and trying again what failed");
                    manager.reloading();
                    if let Some(new) = reread() {
                        in_force.take_up(new, Instant::now());
                    }
                    look(&mut devices, false);
                    looked = Instant::now();
                    declaring.begin();
                    manager.reloaded();
                }
                Ok(Some(Signal::Report)) => devices.report(),
                Ok(None) => break,
                Err(e) => {
                    tracing::error!("signals: {e}");
                    break;
                }
            }
        }
        let now = Instant::now();
        devices.tidy(now);
        in_force.turn(now);
        if now.saturating_duration_since(looked) >= LOOK {
            rivals.turn(others());
            look(&mut devices, false);
            declaring.again();
            looked = now;
        }
        manager.turn(now, declaring.is_at_work(), &devices.standings());
        // It has its own work at the start, and no initiator waits for that.
        if !manager.is_starting()
            && let Some(begin) = beside.take()
        {
            _kept = Some(begin());
        }
    }
}

/// Reads netlink empty.
fn hear(events: &Events, devices: &mut Devices) {
    loop {
        match events.hear() {
            Ok(Heard::Nothing) => return,
            Ok(Heard::Events(events)) => events.into_iter().for_each(|e| devices.hear(e)),
            Ok(Heard::Overrun) => {
                tracing::warn!("the kernel had to throw events away; looking for what there is");
                look(devices, true);
            }
            // The message is gone; what it told is found by looking.
            Err(NetlinkError::Protocol(e)) => {
                tracing::error!("an event that makes no sense: {e}");
                look(devices, true);
            }
            Err(e) => {
                tracing::error!("{e}");
                return;
            }
        }
    }
}

fn look(devices: &mut Devices, lost: bool) {
    if let Err(e) = devices.look(lost) {
        tracing::error!("sysfs: {e}");
    }
}

/// Ends the kernel's wait for a daemon that died while a device of ours was being removed: nobody knows the number any
/// more that an answer would have to name. The kernel can only end all waits at once, other daemons' included, so this
/// is done when such a device is really there, and said.
fn free_orphans(uio: &Uio, tree: &Real) {
    let devices = match uio.scan() {
        Ok(devices) => devices,
        Err(e) => {
            tracing::error!("sysfs: {e}");
            return;
        }
    };
    let gone = |d: &UioDevice| !tree.has_now(&backstore::path_of(d.name.hba, &d.name.name));
    let Some(orphan) = devices.iter().find(|d| d.name.subtype == SUBTYPE && gone(d)) else { return };
    tracing::warn!(lun = %orphan.name.name, "was being removed when the last daemon died; ending the kernel's waits");
    let parameters = Path::new("/sys/module/target_core_user/parameters");
    for (file, value) in [("block_netlink", "1"), ("reset_netlink", "1"), ("block_netlink", "0")] {
        if let Err(e) = std::fs::write(parameters.join(file), value) {
            tracing::error!("{file}: {e}");
        }
    }
}
