//! One device's worker: a thread that may wait, between the daemon's loop, which may not, and the LUN.
//!
//! It opens the image, carries out what the kernel asks for in order, answers, and keeps the LUN's state file. When it
//! ends, the LUN has let go of the device. A LUN that fails or panics fails alone: its worker starts it again, once, on the ring as it was
//! left; if it fails again the state file says so, and the worker goes on answering.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, SyncSender},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

pub use super::known::{Known, Outcome};
use super::rundir::{LastChange, LunState, Phase, RunDir};
use crate::{
    control::Registry,
    kernel::{
        netlink::{Change, Pending},
        uio::UioDevice,
    },
    lun::{
        Pulse, Remote,
        config::{DeviceConfig, SUBTYPE, pi_word},
        state_file::now_ms,
    },
};

/// How often a worker looks whether its LUN still lives.
const LOOK: Duration = Duration::from_secs(1);

/// How long a new device may go without a serial number: rtslib gives it one only after the kernel has been told that we serve it.
const SERIAL_PATIENCE: Duration = Duration::from_secs(2);

/// How often a worker looks for that number.
const SERIAL_LOOK: Duration = Duration::from_millis(5);

/// A failure of a LUN, as the kernel and the administrator are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A positive errno, for the kernel.
    pub errno: i32,
    /// In words, the whole chain.
    pub reason: String,
    /// What the administrator does next.
    pub next: Option<String>,
}

impl Failure {
    /// A failure without a next step.
    pub fn new(errno: i32, reason: impl Into<String>) -> Failure {
        Failure { errno, reason: reason.into(), next: None }
    }

    /// From a panic's payload.
    fn panicked(payload: &(dyn Any + Send)) -> Failure {
        let words = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let words = words.or_else(|| payload.downcast_ref::<String>().cloned());
        Failure::new(libc::EIO, format!("the LUN's thread panicked: {}", words.unwrap_or_default()))
    }
}

/// What the kernel's configfs knows of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a block.
    pub block_size: u64,
    /// `wwn/vpd_unit_serial`, empty if it isn't set.
    pub serial: String,
    /// The write cache is on.
    pub write_cache: bool,
    /// The number by which netlink names the device.
    pub device_id: u32,
    /// The kernel waits for answers to what it tells of this device.
    pub wants_answers: bool,
    /// The kernel has the device running; until then it waits for the answer to ADDED.
    pub enabled: bool,
}

/// What a LUN says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The image's format.
    pub format: String,
    /// The way of its I/O.
    pub io: String,
    /// What it has counted.
    pub counters: serde_json::Value,
}

/// A LUN that serves, as the worker sees it.
pub trait Lun: Send {
    /// Changes the capacity to that many bytes.
    ///
    /// # Errors
    /// The image's.
    fn resize(&self, bytes: u64) -> Result<(), Failure>;
    /// Turns the write cache on or off.
    ///
    /// # Errors
    /// The LUN's.
    fn set_write_cache(&self, on: bool) -> Result<(), Failure>;
    /// How it does.
    ///
    /// # Errors
    /// If it doesn't answer.
    fn report(&self) -> Result<Report, Failure>;
    /// The way to ask it from outside, if there is one.
    fn remote(&self) -> Option<Remote>;
    /// The image that it has now, and how: a mirror may have moved it to another than it was started with.
    fn config(&self) -> Option<DeviceConfig> {
        self.remote().map(|remote| remote.made().config.clone())
    }
    /// The way to see whether its thread turns, if it has one.
    fn pulse(&self) -> Option<Pulse> {
        self.remote().map(|remote| remote.pulse())
    }
    /// Why it serves no more, if it doesn't.
    fn failure(&self) -> Option<Failure>;
    /// Finishes what is in flight, closes the image and lets go of the device.
    ///
    /// # Errors
    /// The image's; the device is let go of all the same.
    fn stop(self: Box<Self>) -> Result<(), Failure>;
}

/// What starts LUNs and looks them up: the real thing, or a test's.
pub trait Host: Send + Sync + 'static {
    /// What configfs knows of a device.
    ///
    /// # Errors
    /// The kernel's.
    fn identify(&self, device: &UioDevice) -> Result<Identity, Failure>;
    /// Opens the image and serves the device; waits until the LUN is up or has failed.
    ///
    /// # Errors
    /// Why it isn't up.
    fn start(
        &self,
        device: &UioDevice,
        config: &DeviceConfig,
        identity: &Identity,
    ) -> Result<Box<dyn Lun>, Failure>;
    /// Tells the kernel that the device has another configuration (`dev_config`). Waits until the kernel has heard us say that it is so:
    /// never called by a worker itself, which has to answer it.
    ///
    /// # Errors
    /// The kernel's.
    fn tell_config(&self, device: &UioDevice, dev_config: &str) -> Result<(), Failure>;
}

/// What a worker is told.
pub enum Order {
    /// The kernel changes the device.
    Reconfigure(Change, Option<Pending>),
    /// Write the state file with fresh counters.
    Report,
    /// Try again to start, if that failed; else, if messages were `lost`, look whether the kernel has the device otherwise.
    Check {
        /// Messages were lost.
        lost: bool,
    },
    /// Take the LUN out of service, or back (false).
    Pause(bool, SyncSender<Result<(), String>>),
    /// The device goes, or the daemon does: stop the LUN and end. The state file goes with a device.
    End {
        /// The kernel's wait, if it waits.
        pending: Option<Pending>,
        /// The device is gone: so is its state file.
        removed: bool,
    },
}

/// The worker of one device.
pub struct Worker {
    host: Arc<dyn Host>,
    run: RunDir,
    device: UioDevice,
    known: Arc<Known>,
    registry: Registry,
    lun: Option<Box<dyn Lun>>,
    /// It has been started again after it died.
    revived: bool,
    /// The kernel is being told of another configuration: of this one.
    telling: Option<(String, JoinHandle<Result<(), Failure>>)>,
    /// The kernel has been told of the configuration that the LUN has.
    told: bool,
    /// It is out of service, on somebody's order.
    paused: bool,
    /// Until when the device may still get a serial number; the LUN waits for it, so that it never tells another.
    nameless: Option<Instant>,
    state: LunState,
}

impl Worker {
    /// A worker for a device, which has done nothing yet. Its LUN stands in the registry for as long as it is there.
    pub fn new(
        host: Arc<dyn Host>,
        run: RunDir,
        device: UioDevice,
        known: Arc<Known>,
        registry: Registry,
    ) -> Worker {
        let state = LunState {
            name: device.name.name.clone(),
            state: Phase::Starting,
            reason: None,
            next: None,
            image: device.name.config.clone(),
            format: None,
            pi: "off".to_owned(),
            block_size: 0,
            capacity_bytes: 0,
            io: None,
            counters: serde_json::Value::Null,
            last_change: None,
            hba: device.name.hba,
            minor: device.minor,
            written_ms: 0,
        };
        Worker {
            host,
            run,
            device,
            known,
            registry,
            lun: None,
            revived: false,
            telling: None,
            told: true,
            paused: false,
            nameless: None,
            state,
        }
    }

    /// Starts the LUN, then does as it is told until [`Order::End`] or until nobody is left to tell it anything. `added`
    /// is the kernel's wait for this device; `answers` makes one where configfs says that it waits and no event told us.
    pub fn work(
        mut self,
        added: Option<Pending>,
        orders: &Receiver<Order>,
        answers: impl Fn(u32) -> Pending,
    ) {
        let (identity, started) = self.start();
        let waits = identity.as_ref().is_none_or(|i| i.wants_answers);
        let is_new = |i: &Identity| added.is_some() || !i.enabled;
        if started.is_ok() && identity.as_ref().is_some_and(|i| i.serial.is_empty() && is_new(i)) {
            self.await_serial();
        }
        let added = match (added, &identity) {
            (Some(pending), _) if !waits => {
                pending.forgo();
                None
            }
            (None, Some(i)) if i.wants_answers && !i.enabled => Some(answers(i.device_id)),
            (added, _) => added,
        };
        if let Some(pending) = added {
            self.known.refused.store(started.is_err(), Ordering::Release);
            pending.answer(started.as_ref().err().map_or(0, |f| -f.errno));
            if started.is_err() {
                // The kernel takes the device down again, and tells nobody.
                return;
            }
        }
        loop {
            let turn = if self.nameless.is_some() { SERIAL_LOOK } else { LOOK };
            match orders.recv_timeout(turn) {
                Ok(Order::Reconfigure(change, pending)) => {
                    self.look_for_serial(true);
                    let done = self.reconfigure(&change);
                    if let Some(pending) = pending {
                        pending.answer(done.err().map_or(0, |f| -f.errno));
                    }
                }
                Ok(Order::Report) => self.write(),
                Ok(Order::Check { .. }) if self.nameless.is_some() || self.paused => {}
                Ok(Order::Check { lost }) => self.check(lost),
                Ok(Order::Pause(on, back)) => {
                    let done = if on { self.pause() } else { self.resume() };
                    // Whoever asked may have stopped waiting.
                    let _ = back.send(done.map_err(|f| f.reason));
                }
                Ok(Order::End { pending, removed }) => {
                    self.end(removed);
                    if let Some(pending) = pending {
                        pending.answer(0);
                    }
                    return;
                }
                Err(RecvTimeoutError::Timeout) if self.nameless.is_some() => self.look_for_serial(false),
                Err(RecvTimeoutError::Timeout) => {
                    self.look();
                    self.follow_image();
                }
                Err(RecvTimeoutError::Disconnected) => return self.end(false),
            }
        }
    }

    /// Starts the LUN, and gives what configfs says of the device. The same failure is logged once, however often it is tried.
    fn start(&mut self) -> (Option<Identity>, Result<(), Failure>) {
        let (host, device) = (self.host.clone(), self.device.clone());
        let before = self.state.reason.take();
        self.state.next = None;
        if before.is_none() {
            self.state.state = Phase::Starting;
            self.write();
        }
        let identity = guarded(|| host.identify(&device));
        if let Ok(identity) = &identity {
            self.known.device_id.get_or_init(|| identity.device_id);
            self.known.wants_no_answers.store(!identity.wants_answers, Ordering::Release);
            self.state.capacity_bytes = identity.capacity;
            self.state.block_size = identity.block_size;
        }
        let started = identity.clone().and_then(|identity| {
            let config = DeviceConfig::parse(&device.name.config).map_err(|e| Failure {
                next: Some(format!(
                    "make the device with `tcmu-dif create {} --image PATH`",
                    device.name.name
                )),
                ..Failure::new(libc::EINVAL, e.to_string())
            })?;
            self.state.image = config.image.display().to_string();
            self.state.pi = config.pi.map_or("off", pi_word).to_owned();
            guarded(|| host.start(&device, &config, &identity))
        });
        let started = match started {
            Ok(lun) => {
                tracing::info!(lun = %self.state.name, image = %self.state.image, "the LUN is up");
                self.state.state = Phase::Online;
                if let Some(remote) = lun.remote() {
                    self.registry.insert(&self.state.name, remote);
                }
                self.lun = Some(lun);
                self.note_image();
                self.write();
                Ok(())
            }
            Err(failure) => {
                if before.as_ref() != Some(&failure.reason) {
                    tracing::error!(lun = %self.state.name, "{}", failure.reason);
                }
                self.fail(failure.clone());
                Err(failure)
            }
        };
        (identity.ok(), started)
    }

    /// Stops the LUN that has just been shown to start, until the device has its serial number. Commands wait in the ring meanwhile.
    fn await_serial(&mut self) {
        if let Some(Err(failure)) = self.take_down() {
            tracing::warn!(lun = %self.state.name, "while stopping: {}", failure.reason);
        }
        tracing::info!(lun = %self.state.name, "the LUN waits for its serial number");
        self.state.state = Phase::Starting;
        self.nameless = Some(Instant::now() + SERIAL_PATIENCE);
        self.write();
    }

    /// Starts the LUN that waits for its serial number, if there is one by now, or it has waited long enough, or it must be up `now`.
    fn look_for_serial(&mut self, now: bool) {
        let Some(until) = self.nameless else { return };
        let (host, device) = (self.host.clone(), self.device.clone());
        let named = guarded(|| host.identify(&device)).is_ok_and(|i| !i.serial.is_empty());
        if named || now || Instant::now() >= until {
            self.nameless = None;
            self.start().1.ok();
        }
    }

    /// Catches up with the kernel.
    fn check(&mut self, lost: bool) {
        if self.lun.is_none() {
            self.start().1.ok();
            return;
        }
        let (host, device) = (self.host.clone(), self.device.clone());
        let Some(identity) = lost.then(|| guarded(|| host.identify(&device)).ok()).flatten() else { return };
        if identity.capacity != self.state.capacity_bytes {
            self.reconfigure(&Change::Size(identity.capacity)).ok();
        }
        self.reconfigure(&Change::WriteCache(identity.write_cache)).ok();
    }

    fn pause(&mut self) -> Result<(), Failure> {
        let stopped = self.take_down().ok_or_else(|| Failure::new(libc::EIO, "the LUN is not up"))?;
        self.paused = true;
        self.state.state = Phase::Starting;
        self.state.reason = Some("it is being handed over".to_owned());
        self.write();
        if let Err(failure) = stopped {
            // Not flushed, or not closed: whoever has its image now would not have all.
            self.resume().ok();
            return Err(failure);
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), Failure> {
        if !std::mem::take(&mut self.paused) {
            let why = || self.state.reason.clone().unwrap_or_else(|| "the LUN is not up".to_owned());
            return self.lun.as_ref().map(drop).ok_or_else(|| Failure::new(libc::EIO, why()));
        }
        self.state.reason = None;
        self.start().1
    }

    fn fail(&mut self, failure: Failure) {
        self.state.state = Phase::Failed;
        self.state.reason = Some(failure.reason);
        self.state.next = failure.next;
        self.write();
    }

    fn reconfigure(&mut self, change: &Change) -> Result<(), Failure> {
        let (what, value) = match change {
            Change::Size(bytes) => ("capacity", *bytes),
            Change::WriteCache(on) => ("write_cache", u64::from(*on)),
            Change::Config(_) => ("dev_config", 0),
            Change::Unknown => ("unknown", 0),
        };
        let done = match (&self.lun, change) {
            (None, _) => Err(Failure::new(libc::EIO, "the LUN is not up")),
            (Some(lun), Change::Size(bytes)) => guarded(|| lun.resize(*bytes)),
            (Some(lun), Change::WriteCache(on)) => guarded(|| lun.set_write_cache(*on)),
            // targetctl writes back what it has read, when it restores a device.
            (Some(_), Change::Config(text)) if self.is_own_config(text) => Ok(()),
            (Some(_), Change::Config(_)) => {
                Err(Failure::new(libc::EOPNOTSUPP, "the image of a LUN is not changed while it is up"))
            }
            (Some(_), Change::Unknown) => Err(Failure::new(libc::EOPNOTSUPP, "an unknown change")),
        };
        match &done {
            Ok(()) => {
                tracing::info!(lun = %self.state.name, what, value, "changed");
                if what == "capacity" {
                    self.state.capacity_bytes = value;
                }
            }
            Err(failure) => tracing::error!(lun = %self.state.name, what, value, "{}", failure.reason),
        }
        let error = done.as_ref().err().map(|f| f.reason.clone());
        self.state.last_change = Some(LastChange { what: what.to_owned(), value, error });
        self.write();
        done
    }

    /// Takes up what image the LUN has.
    fn note_image(&mut self) {
        let Some(config) = self.lun.as_ref().and_then(|lun| lun.config()) else { return };
        if DeviceConfig::parse(&self.device.name.config).as_ref() == Ok(&config) {
            return;
        }
        let (image, now) = (config.image.display().to_string(), config.to_string());
        tracing::info!(lun = %self.state.name, image, "the LUN has another image than the kernel knows");
        self.known.comes_to(&now);
        self.device.name.config = now;
        self.state.image = image;
        self.told = false;
        self.write();
    }

    /// The LUN may have another image than the kernel knows: a mirror has moved it, now or before the daemon was started. The kernel is told by
    /// another thread, because it asks us back and waits for the answer.
    fn follow_image(&mut self) {
        self.note_image();
        if let Some((config, telling)) = self.telling.take_if(|(_, telling)| telling.is_finished()) {
            match telling.join() {
                // The LUN has gone on to another one meanwhile.
                Ok(Ok(())) if config != self.device.name.config => {}
                Ok(Ok(())) => {
                    self.told = true;
                    tracing::info!(lun = %self.state.name, "the kernel knows the LUN's image");
                }
                Ok(Err(failure)) => {
                    tracing::warn!(lun = %self.state.name, "the kernel still names the old image: {}", failure.reason);
                }
                Err(_) => {
                    tracing::error!(lun = %self.state.name, "the thread that tells the kernel has panicked")
                }
            }
        }
        if self.told || self.telling.is_some() {
            return;
        }
        let (host, device) = (self.host.clone(), self.device.clone());
        let config = device.name.config.clone();
        let dev_config = format!("{SUBTYPE}/{config}");
        let thread = std::thread::Builder::new().name("dev_config".to_owned());
        match thread.spawn(move || host.tell_config(&device, &dev_config)) {
            Ok(telling) => self.telling = Some((config, telling)),
            Err(e) => {
                tracing::warn!(lun = %self.state.name, "no thread to tell the kernel of the LUN's image: {e}")
            }
        }
    }

    fn is_own_config(&self, dev_config: &str) -> bool {
        let text = dev_config.trim_end().strip_prefix(SUBTYPE).and_then(|t| t.strip_prefix('/'));
        text == Some(self.device.name.config.as_str())
    }

    /// Notices a LUN that has died. The first time it is started again: its commands wait in the ring, and the in-flight record says
    /// which of them are unanswered. What kills it twice would do so for ever.
    fn look(&mut self) {
        let failed = self.lun.as_ref().and_then(|lun| lun.failure());
        let Some(failure) = failed.filter(|_| self.state.state != Phase::Failed) else { return };
        tracing::error!(lun = %self.state.name, "{}", failure.reason);
        if std::mem::replace(&mut self.revived, true) {
            let next = "look for what it says in the log; then `systemctl restart tcmu-dif` starts it again";
            return self.fail(Failure { next: Some(next.to_owned()), ..failure });
        }
        // Its thread has ended, and why is known.
        let _ = self.take_down();
        tracing::warn!(lun = %self.state.name, "started again, this once");
        self.registry.restarted(&self.state.name);
        self.start().1.ok();
    }

    /// Stops the LUN, if there is one, and has nobody ask it any more.
    fn take_down(&mut self) -> Option<Result<(), Failure>> {
        let lun = self.lun.take()?;
        // Closing the image may take long, and nobody is to miss the loop meanwhile.
        self.known.tell(Some(Ok(())), None);
        if let Some(remote) = lun.remote() {
            self.registry.remove(&self.state.name, &remote);
        }
        Some(guarded(|| lun.stop()))
    }

    fn end(&mut self, removed: bool) {
        if let Some(stopped) = self.take_down() {
            match stopped {
                Ok(()) => tracing::info!(lun = %self.state.name, "the LUN is down"),
                Err(failure) => {
                    tracing::error!(lun = %self.state.name, "while stopping: {}", failure.reason)
                }
            }
        }
        if removed {
            self.registry.forget(&self.state.name);
            if let Err(e) = self.run.remove_record(self.state.minor) {
                tracing::warn!(lun = %self.state.name, "in-flight record: {e}");
            }
        }
        // A device that came back under the same name has a file of its own by now.
        let mine = |s: &LunState| s.hba == self.state.hba && s.minor == self.state.minor;
        let there = self.run.read(&self.state.name).ok().flatten();
        let goes = |s: &LunState| mine(s) && (removed || s.state != Phase::Failed);
        if there.as_ref().is_some_and(goes)
            && let Err(e) = self.run.remove(&self.state.name)
        {
            tracing::warn!(lun = %self.state.name, "state file: {e}");
        }
    }

    fn write(&mut self) {
        let outcome = match self.state.state {
            Phase::Starting => None,
            Phase::Online => Some(Ok(())),
            Phase::Failed => Some(Err(self.state.reason.clone().unwrap_or_default())),
        };
        self.known.tell(outcome, self.lun.as_ref().and_then(|lun| lun.pulse()));
        if let Some(lun) = &self.lun
            && let Ok(report) = guarded(|| lun.report())
        {
            self.state.format = Some(report.format);
            self.state.io = Some(report.io);
            self.state.counters = report.counters;
        }
        self.state.written_ms = now_ms();
        if let Err(e) = self.run.write(&self.state) {
            tracing::warn!(lun = %self.state.name, "state file: {e}");
        }
    }
}

/// Runs something of a LUN's; a panic is its failure, and not the worker's end.
fn guarded<T>(call: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|payload| Err(Failure::panicked(&*payload)))
}
