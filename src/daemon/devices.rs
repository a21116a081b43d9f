//! Every device of ours that the kernel has, and its worker: what the daemon's loop does with what it hears.
//!
//! Nothing here waits. A device is known by its minor number, which the kernel uses again once the device is gone, so a
//! worker that was told to end is kept apart until it has.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    pauses::Pauses,
    rundir::RunDir,
    worker::{Host, Known, Order, Outcome, Worker},
};
use crate::{
    control::Registry,
    kernel::{
        netlink::{Answers, Event, Kind, Pending},
        uio::{Uio, UioDevice, UioName},
    },
    lun::{Pulse, config::SUBTYPE},
};

/// How long a removal may take before the kernel is answered all the same: it waits uninterruptibly.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(10);

struct Entry {
    device: UioDevice,
    known: Arc<Known>,
    orders: Arc<Sender<Order>>,
    thread: JoinHandle<()>,
}

struct Leaving {
    name: String,
    thread: JoinHandle<()>,
    removal: Option<(Instant, Pending)>,
}

/// How one device's LUN is.
#[derive(Debug)]
pub struct Standing {
    /// N of /dev/uioN.
    pub minor: u32,
    /// The LUN's name.
    pub name: String,
    /// What came of its start.
    pub outcome: Outcome,
    /// The way to see whether its thread turns, while it serves.
    pub pulse: Option<Pulse>,
}

/// The devices.
pub struct Devices {
    host: Arc<dyn Host>,
    run: RunDir,
    uio: Uio,
    answers: Arc<dyn Answers>,
    registry: Registry,
    /// Whether configfs still has a device; asked only for its directory, which never waits.
    in_configfs: Box<dyn Fn(&UioDevice) -> bool>,
    here: BTreeMap<u32, Entry>,
    leaving: Vec<Leaving>,
}

impl Devices {
    /// None yet.
    pub fn new(
        host: Arc<dyn Host>,
        run: RunDir,
        uio: Uio,
        answers: Arc<dyn Answers>,
        registry: Registry,
        in_configfs: impl Fn(&UioDevice) -> bool + 'static,
    ) -> Devices {
        let in_configfs = Box::new(in_configfs);
        Devices { host, run, uio, answers, registry, in_configfs, here: BTreeMap::new(), leaving: Vec::new() }
    }

    /// Devices with a worker.
    pub fn len(&self) -> usize {
        self.here.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.here.is_empty()
    }

    /// Workers that were told to end and haven't yet.
    pub fn leaving(&self) -> usize {
        self.leaving.len()
    }

    /// How each LUN is. Waits for none.
    pub fn standings(&self) -> Vec<Standing> {
        let standing = |(minor, entry): (&u32, &Entry)| {
            let (outcome, pulse) = entry.known.standing();
            let ended = || Some(Err("the device's thread has ended".to_owned()));
            let outcome = if entry.thread.is_finished() { outcome.or_else(ended) } else { outcome };
            Standing { minor: *minor, name: entry.device.name.name.clone(), outcome, pulse }
        };
        self.here.iter().map(standing).collect()
    }

    /// Does what the kernel tells. An event for another's device is nothing to us, and above all not answered.
    pub fn hear(&mut self, event: Event) {
        let Some(name) = event.device.as_ref().filter(|n| n.subtype == SUBTYPE).cloned() else {
            tracing::debug!(kind = ?event.kind, minor = event.minor, "not our device");
            return;
        };
        let pending = || Pending::new(self.answers.clone(), event.kind, event.device_id);
        tracing::debug!(kind = ?event.kind, minor = event.minor, lun = %name.name, id = event.device_id, "event");
        // A worker under this minor is the device's own, unless that one is gone and we missed it.
        let same = |e: &&Entry| e.is(&name) && !e.known.refused.load(Ordering::Acquire);
        let ours = self.here.get(&event.minor).filter(same);
        match event.kind {
            Kind::Added => {
                if let Some(entry) = ours {
                    // A look found it before the event came; its worker sees in configfs that the kernel waits.
                    entry.known.device_id.get_or_init(|| event.device_id);
                    return;
                }
                let pending = pending();
                match self.uio.device(event.minor) {
                    Ok(Some(device)) if device.name == name => self.add(device, Some(pending)),
                    Ok(_) => pending.answer(-libc::ENODEV),
                    Err(e) => {
                        tracing::error!(minor = event.minor, lun = %name.name, "sysfs: {e}");
                        pending.answer(-e.raw_os_error().unwrap_or(libc::EIO));
                    }
                }
            }
            Kind::Removed => match ours {
                Some(entry) => {
                    let pending = entry.wait(pending());
                    self.remove(event.minor, pending);
                }
                None => pending().answer(0),
            },
            Kind::Reconfig => match (ours, event.change.clone()) {
                (Some(entry), Some(change)) => {
                    let order = Order::Reconfigure(change, entry.wait(pending()));
                    // A worker that has ended drops the order, and with it answers EIO.
                    entry.orders.send(order).ok();
                }
                _ => pending().answer(-libc::ENODEV),
            },
        }
    }

    fn add(&mut self, device: UioDevice, added: Option<Pending>) {
        let minor = device.minor;
        if self.here.contains_key(&minor) {
            self.remove(minor, None);
        }
        let (orders, inbox) = channel();
        let orders = Arc::new(orders);
        let known = Arc::new(Known::default());
        let (host, run, registry) = (self.host.clone(), self.run.clone(), self.registry.clone());
        registry.is_paused_by(&device.name.name, Arc::new(Pauses::of(&orders)));
        let worker = Worker::new(host, run, device.clone(), known.clone(), registry);
        let answers = self.answers.clone();
        let body = move || worker.work(added, &inbox, |id| Pending::new(answers.clone(), Kind::Added, id));
        let thread = std::thread::Builder::new().name(format!("device {minor}")).spawn(body);
        match thread {
            Ok(thread) => {
                let entry = Entry { device, known, orders, thread };
                self.here.insert(minor, entry);
            }
            // The kernel's wait went with the closure, and was answered.
            Err(e) => tracing::error!(minor, "no thread for the device: {e}"),
        }
    }

    fn remove(&mut self, minor: u32, pending: Option<Pending>) {
        let Some(entry) = self.here.remove(&minor) else { return };
        self.registry.is_paused_by_nobody(&entry.device.name.name);
        entry.orders.send(Order::End { pending: pending.clone(), removed: true }).ok();
        let removal = pending.map(|p| (Instant::now(), p));
        self.leaving.push(Leaving { name: entry.device.name.name, thread: entry.thread, removal });
    }

    /// Looks at what there is: starts what came without our hearing, ends what went. After messages were `lost`, also
    /// ends the waits that the kernel may be in for want of an answer.
    ///
    /// # Errors
    /// If sysfs can't be read; nothing is changed then.
    pub fn look(&mut self, lost: bool) -> io::Result<()> {
        let found: BTreeMap<u32, UioDevice> = self
            .uio
            .scan()?
            .into_iter()
            .filter(|d| d.name.subtype == SUBTYPE)
            .map(|d| (d.minor, d))
            .collect();
        let minors: Vec<u32> = self.here.keys().copied().collect();
        for minor in minors {
            let Some(entry) = self.here.get_mut(&minor) else { continue };
            if found.get(&minor).is_none_or(|d| !entry.is(&d.name)) {
                self.remove(minor, None);
            } else if !(self.in_configfs)(&entry.device) {
                // Being removed. The event is on its way, unless messages were lost; then alone is this believed, because
                // the look at configfs may err, and a LUN that is in use must not be stopped for that.
                if lost {
                    let id = entry.known.device_id.get().copied();
                    let pending = id.map(|id| Pending::new(self.answers.clone(), Kind::Removed, id));
                    let pending = pending.and_then(|p| entry.wait(p));
                    self.remove(minor, pending);
                }
            } else {
                entry.orders.send(Order::Check { lost }).ok();
                if let Some(id) = entry.known.device_id.get().filter(|_| lost && entry.waits()) {
                    // The only wait that it can be in, since it is there and up; whoever waits tries again.
                    Pending::new(self.answers.clone(), Kind::Reconfig, *id).answer(-libc::EAGAIN);
                }
            }
        }
        for (minor, device) in found {
            if !self.here.contains_key(&minor) && (self.in_configfs)(&device) {
                tracing::info!(minor, lun = %device.name.name, "found a device");
                self.add(device, None);
            }
        }
        Ok(())
    }

    /// Lets go of workers that have ended, and ends waits that take too long.
    pub fn tidy(&mut self, now: Instant) {
        for leaving in &self.leaving {
            if let Some((since, pending)) = &leaving.removal
                && !pending.answered()
                && now.saturating_duration_since(*since) >= REMOVAL_PATIENCE
            {
                tracing::error!(lun = %leaving.name, "the LUN takes long to stop; the device is let go of");
                pending.answer(0);
            }
        }
        self.leaving.retain(|l| !l.thread.is_finished());
    }

    /// Has every state file written.
    pub fn report(&self) {
        for entry in self.here.values() {
            entry.orders.send(Order::Report).ok();
        }
    }

    /// Stops every LUN, and waits for all of them, at most that long; while it waits, `tell` hears how many are left.
    pub fn stop(&mut self, patience: Duration, mut tell: impl FnMut(usize)) {
        let end = Instant::now() + patience;
        for (_, entry) in std::mem::take(&mut self.here) {
            entry.orders.send(Order::End { pending: None, removed: false }).ok();
            self.leaving.push(Leaving { name: entry.device.name.name, thread: entry.thread, removal: None });
        }
        while !self.leaving.is_empty() && Instant::now() < end {
            tell(self.leaving.len());
            std::thread::sleep(Duration::from_millis(5));
            self.tidy(Instant::now());
        }
        for late in &self.leaving {
            tracing::error!(lun = %late.name, "the LUN has not stopped in time");
        }
    }
}

impl Entry {
    /// Whether a device of that name is this one: its configuration may be another by now, if its LUN says so.
    fn is(&self, name: &UioName) -> bool {
        let mine = &self.device.name;
        let same = (mine.hba, &mine.name, &mine.subtype) == (name.hba, &name.name, &name.subtype);
        same && (mine.config == name.config || self.known.has_come_to(&name.config))
    }

    fn waits(&self) -> bool {
        !self.known.wants_no_answers.load(Ordering::Acquire)
    }

    /// The kernel's wait, if it waits.
    fn wait(&self, pending: Pending) -> Option<Pending> {
        if self.waits() {
            Some(pending)
        } else {
            pending.forgo();
            None
        }
    }
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
