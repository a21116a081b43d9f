//! LUNs that go to another host or come from one: what is under way, what became of those of late, and the source that is waited for.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Comes, Host, Progress, Registry, To, qmp::Error};
use crate::lun::{
    events::JobStatus,
    jobs::{JobInfo, JobOrder, Task},
};

/// How many that have ended are remembered, at the most.
const KEPT: usize = 64;
/// How long whoever waits for a source may take to notice that it is to end.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// The number of one that does not listen yet.
const NOT_YET: u64 = u64::MAX;

/// How far it is, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// The other side is looked for, or waited for.
    Setup,
    /// Both have looked at it, and it goes.
    Active,
    /// Its copy has all that it has, and it serves until somebody has it go on.
    PreSwitchover,
    /// It serves there.
    Completed,
    /// It does not.
    Failed,
    /// The source was not waited for any longer.
    Cancelled,
}

impl Status {
    /// Both sides have looked, and neither has it for good.
    fn is_under_way(self) -> bool {
        matches!(self, Status::Active | Status::PreSwitchover)
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Status::Setup => "setup",
            Status::Active => "active",
            Status::PreSwitchover => "pre-switchover",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
        }
    }
}

#[derive(Debug)]
struct Migration {
    id: u64,
    incoming: bool,
    device: Option<String>,
    uri: String,
    status: Status,
    error: Option<String>,
    began: Instant,
    total: Option<Duration>,
    /// Nobody has to say that it may be stopped, or somebody has.
    may_switch_over: bool,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// The newest last.
    all: VecDeque<Migration>,
    /// A source is waited for, until that is true.
    waiting: Option<(u64, Arc<AtomicBool>)>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Migrations(Mutex<Inner>);

impl Migrations {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest, or the newest of that LUN, as `query-migrate` tells it.
    pub(super) fn query(&self, device: Option<&str>) -> Value {
        let inner = self.inner();
        let is_it = |m: &&Migration| device.is_none_or(|device| m.device.as_deref() == Some(device));
        let Some(found) = inner.all.iter().rev().find(is_it) else { return json!({}) };
        let total = found.total.unwrap_or_else(|| found.began.elapsed());
        json!({
            "status": found.status.word(), "device": found.device, "uri": found.uri, "incoming": found.incoming,
            "total-time": u64::try_from(total.as_millis()).unwrap_or(u64::MAX), "error-desc": found.error,
        })
    }
}

/// One that is under way; it is told of as it goes.
pub(super) struct UnderWay<'a> {
    luns: &'a Registry,
    id: u64,
}

impl<'a> UnderWay<'a> {
    /// Begins one.
    pub(super) fn begin(luns: &'a Registry, incoming: bool, device: Option<&str>, uri: &str) -> UnderWay<'a> {
        let id = {
            let mut inner = luns.migrations().inner();
            let id = inner.next;
            inner.next += 1;
            // What is under way is not forgotten.
            let ended = inner.all.iter().position(|m| m.total.is_some());
            if let Some(ended) = ended.filter(|_| inner.all.len() >= KEPT) {
                inner.all.remove(ended);
            }
            inner.all.push_back(Migration {
                id,
                incoming,
                device: device.map(str::to_owned),
                uri: uri.to_owned(),
                status: Status::Setup,
                error: None,
                began: Instant::now(),
                total: None,
                may_switch_over: false,
            });
            id
        };
        let begun = UnderWay { luns, id };
        begun.tell(Status::Setup, device);
        begun
    }

    fn tell(&self, status: Status, device: Option<&str>) {
        let data = json!({ "device": device, "status": status.word() });
        self.luns.bus().publish("MIGRATION", super::without_nulls(data));
    }

    fn set(&self, status: Status, device: Option<&str>, error: Option<&Error>) {
        let device = {
            let mut inner = self.luns.migrations().inner();
            let Some(found) = inner.all.iter_mut().find(|m| m.id == self.id) else { return };
            found.status = status;
            if let Some(device) = device {
                found.device = Some(device.to_owned());
            }
            if !status.is_under_way() {
                found.total = Some(found.began.elapsed());
            }
            found.error = error.map(|e| e.desc.clone());
            found.device.clone()
        };
        self.tell(status, device.as_deref());
    }

    /// Both sides have looked, and it goes: that LUN.
    fn is_active(&self, device: &str) {
        self.set(Status::Active, Some(device), None);
    }

    /// Whoever hands it over tells so how far it is; `pauses` if it may not be stopped before [`switch_over`].
    pub(super) fn watched(&self, pauses: bool) -> Watched<'_> {
        Watched { going: self, pauses }
    }

    /// It has come to its end.
    pub(super) fn ends(&self, with: Result<(), &Error>) {
        match with {
            Ok(()) => self.set(Status::Completed, None, None),
            Err(e) => self.set(Status::Failed, None, Some(e)),
        }
    }
}

/// See [`UnderWay::watched`].
pub(super) struct Watched<'a> {
    going: &'a UnderWay<'a>,
    pauses: bool,
}

impl Progress for Watched<'_> {
    fn goes(&self) {
        self.going.set(Status::Active, None, None);
    }

    fn may_switch_over(&self) -> bool {
        if !self.pauses {
            return true;
        }
        let (status, may) = {
            let inner = self.going.luns.migrations().inner();
            let Some(found) = inner.all.iter().find(|m| m.id == self.going.id) else { return false };
            (found.status, found.may_switch_over)
        };
        match (status, may) {
            (Status::PreSwitchover, true) => self.going.set(Status::Active, None, None),
            (Status::PreSwitchover, false) => {}
            _ => self.going.set(Status::PreSwitchover, None, None),
        }
        may
    }
}

/// Has a LUN that waits for it go on to the other host.
///
/// # Errors
/// That it does not wait.
pub(super) fn switch_over(luns: &Registry, device: &str) -> Result<(), Error> {
    let mut inner = luns.migrations().inner();
    let waits = |m: &&mut Migration| m.device.as_deref() == Some(device) && m.status == Status::PreSwitchover;
    match inner.all.iter_mut().rev().find(waits) {
        Some(found) => {
            found.may_switch_over = true;
            Ok(())
        }
        None => Err(Error::generic(format!(
            "LUN '{device}' does not wait for its switchover; see how far it is: query-migrate"
        ))),
    }
}

/// Waits in a thread of its own for one source, and takes its LUN.
///
/// # Errors
/// Why nobody is waited for.
pub(super) fn wait_for_one(
    luns: &Registry,
    host: &dyn Host,
    from: &To<'_>,
    comes: &Comes<'_>,
) -> Result<(), Error> {
    let stop = Arc::new(AtomicBool::new(false));
    {
        let mut inner = luns.migrations().inner();
        if let Some((id, _)) = &inner.waiting {
            let at = inner.all.iter().find(|m| m.id == *id).map(|m| m.uri.clone()).unwrap_or_default();
            let e = format!("a source is waited for already, {at}; end that: migrate_cancel");
            return Err(Error::generic(e));
        }
        // Whatever comes next has this number.
        inner.waiting = Some((NOT_YET, stop.clone()));
    }
    let mut incoming = host.listen(from, comes).inspect_err(|_| luns.migrations().inner().waiting = None)?;
    let id = UnderWay::begin(luns, true, comes.device, from.uri).id;
    luns.migrations().inner().waiting = Some((id, stop.clone()));
    let luns = luns.clone();
    let begun = thread::Builder::new().name("incoming".into()).spawn({
        let luns = luns.clone();
        move || {
            let coming = UnderWay { luns: &luns, id };
            let wanted = || !stop.load(Ordering::Acquire);
            let comes = |device: &str| {
                wanted() && {
                    coming.is_active(device);
                    true
                }
            };
            let took = incoming.take(&stop, &comes);
            // Nobody listens any more when that is told.
            drop(incoming);
            luns.migrations().inner().waiting = None;
            match took {
                Ok(true) => coming.ends(Ok(())),
                Err(e) if wanted() => coming.ends(Err(&e)),
                _ => coming.set(Status::Cancelled, None, None),
            }
        }
    });
    begun.map(drop).map_err(|e| {
        luns.migrations().inner().waiting = None;
        let e = Error::generic(format!("there is no thread to wait in: {e}"));
        UnderWay { luns: &luns, id }.ends(Err(&e));
        e
    })
}

/// The copy of a LUN that goes with its storage, while it is under way.
pub(super) fn copy_of(luns: &Registry, device: &str) -> Option<JobInfo> {
    let jobs = luns.find(device)?.job(JobOrder::Query).ok()?;
    jobs.into_iter().find(|job| job.settings.task == Task::Handover && job.status != JobStatus::Concluded)
}

/// Ends what is copied to other hosts: those LUNs stay. False if there is nothing.
///
/// # Errors
/// The LUN's.
pub(super) fn cancel_copies(luns: &Registry) -> Result<bool, Error> {
    let going: Vec<String> = {
        let inner = luns.migrations().inner();
        let goes = inner.all.iter().filter(|m| !m.incoming && m.status.is_under_way());
        goes.filter_map(|m| m.device.clone()).collect()
    };
    let mut any = false;
    for device in going {
        if let (Some(lun), Some(job)) = (luns.find(&device), copy_of(luns, &device)) {
            let ended = lun.job(JobOrder::Cancel { id: job.id, force: true });
            ended.map_err(|e| Error::generic(crate::lun::chain(&e)))?;
            any = true;
        }
    }
    Ok(any)
}

/// Ends the wait for a source that has not come.
///
/// # Errors
/// That there is none.
pub(super) fn cancel(luns: &Registry) -> Result<(), Error> {
    let inner = luns.migrations().inner();
    let Some((id, stop)) = &inner.waiting else {
        return Err(Error::generic("no source is waited for; a LUN that goes over cannot be called back"));
    };
    if inner.all.iter().any(|m| m.id == *id && m.status == Status::Active) {
        return Err(Error::generic("the LUN is coming, and cannot be sent back: wait for its end"));
    }
    stop.store(true, Ordering::Release);
    Ok(())
}

impl Registry {
    pub(super) fn migrations(&self) -> &Migrations {
        &self.0.migrations
    }

    /// The daemon ends: no source is waited for any longer, and its socket goes.
    pub fn wait_for_no_source(&self) {
        if cancel(self).is_err() {
            return;
        }
        let end = Instant::now() + END_PATIENCE;
        while self.migrations().inner().waiting.is_some() && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
    }
}
