//! The copying: a few lanes, each of which takes a dirty run, reads it and writes it.
//!
//! How much of the disk's time a job may take is bounded here. While guests are at work one lane copies, in small pieces, so that a
//! command never stands behind more than one of them, and after each the job rests as its `share` says; while they are not, all lanes do.
//! `speed` bounds it further.

use std::{
    cell::Cell,
    ops::Range,
    time::{Duration, Instant},
};

use super::{Mirror, Settings, SyncMode, Task, Told, Verdict};
use crate::{
    job::{ErrorAction, IoStatus, Side, dirty::Copying, front::Ending},
    sys::{
        exec::{join, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::{ExtentKind, IoError, Result},
};

/// Bytes of one piece while guests are idle ...
pub(super) const PIECE: u64 = 1 << 20;
/// ... and while they are at work.
pub(super) const SMALL_PIECE: u64 = 256 << 10;
/// Holes between data that are not worth a system call of their own: they are copied as zeros.
const SMALL_HOLE: u64 = 32 << 10;
/// Guests are at work for so long after a command.
const AT_WORK: Duration = Duration::from_millis(20);
/// How long a mirror that has caught up lets writes gather, so that a block that is written again and again is not copied each time.
const GATHER: Duration = Duration::from_millis(50);
/// How long it waits after an error that it is to ignore.
const RETRY: Duration = Duration::from_millis(100);
/// The longest that a lane sleeps without looking whether it was told something.
const SLICE: Duration = Duration::from_millis(100);

/// A copy that failed.
pub(super) struct Failure {
    /// On the source, not on the target.
    pub(super) source: bool,
    pub(super) error: IoError,
}

enum Next<'a> {
    Copy(Copying<'a>),
    /// What is dirty there, once nobody changes it.
    CopyThere(Range<u64>),
    Wait(Duration),
    Nothing,
}

/// A piece that is being copied, until it is dropped.
struct UnderWay<'a>(&'a Cell<usize>);

impl<'a> UnderWay<'a> {
    fn new(pieces: &'a Cell<usize>) -> UnderWay<'a> {
        pieces.set(pieces.get() + 1);
        UnderWay(pieces)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl<S: Side> Mirror<S> {
    /// Marks what there is to copy. A target that is `fresh` reads as zeros.
    pub async fn scan(&self, fresh: bool) {
        let capacity = self.map.capacity();
        let Settings { sync, task, .. } = self.settings.get();
        if task.keeps_the_past() {
            return self.scan_the_past(fresh).await;
        }
        if sync == SyncMode::None {
            return;
        }
        if task.copies_all() && sync == SyncMode::Full && !fresh {
            return self.map.set(0, capacity);
        }
        let mut at = 0;
        while at < capacity && !self.is_over() {
            match self.source.extent(ByteOffset(at), capacity - at).await {
                Ok(extent) => {
                    let own = extent.depth == 0 && extent.kind != ExtentKind::Unallocated;
                    let wanted = match sync {
                        _ if !task.copies_all() => task.wants(&extent),
                        SyncMode::Full => extent.kind == ExtentKind::Data,
                        SyncMode::Top => own,
                        SyncMode::None | SyncMode::Bitmap => false,
                    };
                    if wanted {
                        self.map.set(at, extent.len);
                    }
                    at += extent.len.max(1);
                }
                Err(error) => {
                    // The copy comes here again, and does what it was told about errors.
                    tracing::warn!(job = self.id, %error, "what the source holds cannot be told: all of it is copied");
                    return self.map.set(at, capacity - at);
                }
            }
            yield_now().await;
        }
    }

    /// Copies until there is something to decide. May be called again after that, and dropped at any time.
    pub async fn run(&self) -> Verdict {
        self.change(|_| ());
        loop {
            join(join(self.lane(0), self.lane(1)), join(self.lane(2), self.lane(3))).await;
            // Nothing is awaited between this and the lanes' own look, but a guest may have written before it.
            if let Some(verdict) = self.verdict() {
                return verdict;
            }
        }
    }

    async fn lane(&self, number: usize) {
        let buffer = Buffer::zeroed(PIECE as usize);
        loop {
            let change = self.changed.wait();
            let next = self.next(number);
            if self.verdict().is_some() {
                return;
            }
            let began = Instant::now();
            let failed = match next {
                Next::Copy(copying) => self.copy(copying, &buffer).await,
                Next::CopyThere(range) => self.copy_there(range, &buffer).await,
                Next::Wait(time) => {
                    (self.hooks.sleep)(time.min(SLICE)).await;
                    continue;
                }
                Next::Nothing => {
                    change.await;
                    if self.keeps_up_at_leisure() {
                        (self.hooks.sleep)(GATHER).await;
                    }
                    continue;
                }
            };
            if let Some(ErrorAction::Ignore) = failed {
                (self.hooks.sleep)(RETRY).await;
            }
            self.rest_after(began);
            self.was_that_the_last();
        }
    }

    /// Somebody may wait for the last copy.
    fn was_that_the_last(&self) {
        if !self.map.has_work() {
            self.changed.notify_all();
        }
    }

    /// Leaves guests their part of the time, after work since then.
    fn rest_after(&self, began: Instant) {
        if self.guests_are_at_work() {
            let now = Instant::now();
            let rest = self.settings.get().share.rest(now - began);
            self.rest_until.set(Some(now + rest));
        }
    }

    fn keeps_up_at_leisure(&self) -> bool {
        let state = self.state.borrow();
        state.ready && state.asked.is_none() && !state.cancelled && state.failed.is_none()
    }

    pub(super) fn guests_are_at_work(&self) -> bool {
        let recent = |came: Instant| came.elapsed() < AT_WORK;
        self.guests.get() > 0 || self.guest_came.get().is_some_and(recent)
    }

    fn next(&self, number: usize) -> Next<'_> {
        let Settings { auto_finalize, speed, task, sync, .. } = self.settings.get();
        let (waits, ready, asked, told) = {
            let state = self.state.borrow();
            let stopped = state.stopped != IoStatus::Ok || self.halted.get();
            let waits = state.paused || stopped || state.cancelled || state.failed.is_some();
            (waits, state.ready, state.asked.is_some(), state.pending || state.finalize)
        };
        // What is changed is copied then, and nothing else.
        if waits || (task.keeps_the_past() && sync == SyncMode::None) {
            return Next::Nothing;
        }
        if !self.map.has_work() {
            if self.map.is_settled() {
                if task.ends_by_itself() && !asked {
                    let how = if task.keeps_the_past() { Ending::Leave } else { Ending::Finish };
                    self.change(|state| state.asked = Some(how));
                } else if !ready && !task.ends_by_itself() {
                    self.change(|state| state.ready = true);
                    let (done, all) = self.progress();
                    (self.hooks.tell)(Told::Ready(done, all, speed));
                } else if asked && !auto_finalize && !told {
                    (self.hooks.tell)(Told::Status(crate::job::JobStatus::Waiting));
                    self.change(|state| state.pending = true);
                }
            }
            return Next::Nothing;
        }
        let small = self.guests_are_at_work();
        if small && number > 0 {
            return Next::Wait(AT_WORK);
        }
        let left = |until: Option<Instant>| until.and_then(|t| t.checked_duration_since(Instant::now()));
        // Who has told it to come to its end waits for that.
        if small
            && !asked
            && let Some(rest) = left(self.rest_until.get()).filter(|rest| !rest.is_zero())
        {
            return Next::Wait(rest);
        }
        if speed > 0
            && let Some(rest) = left(self.not_before.get())
        {
            return Next::Wait(rest);
        }
        let most = if small { SMALL_PIECE } else { PIECE };
        let next = match task.keeps_the_past() {
            true => self.map.look(most).map(Next::CopyThere),
            false => self.map.take(most).map(Next::Copy),
        };
        next.unwrap_or(Next::Nothing)
    }

    /// Where data that begin at `at`, `len` bytes at least, end as far as one piece goes. Files of small extents are read in one go.
    async fn data_end(&self, at: u64, len: u64, stop: u64) -> u64 {
        let stop = stop.min(at + PIECE);
        let mut end = (at + len).min(stop);
        while end < stop {
            // What is wrong with the map comes up again when it is that extent's turn.
            let Ok(next) = self.source.extent(ByteOffset(end), stop - end).await else { break };
            // A hole whose page of tuples has some may have none itself, and is looked at alone.
            let settings = self.settings.get();
            let stored = next.kind == ExtentKind::Data && next.host_offset.is_some() && settings.wants(&next);
            let whole = settings.task.copies_all()
                || (settings.task == Task::Backup && settings.sync != SyncMode::Top);
            let bridged =
                whole && next.kind != ExtentKind::Data && next.len < SMALL_HOLE && end + next.len < stop;
            if !stored && !bridged {
                break;
            }
            end = (end + next.len).min(stop);
        }
        end
    }

    /// Data of so many bytes are moved now: the next have to wait for their time.
    fn pace(&self, bytes: u64) {
        let speed = self.settings.get().speed;
        if speed > 0 {
            let now = Instant::now();
            let from = self.not_before.get().map_or(now, |t| t.max(now));
            self.not_before.set(from.checked_add(Duration::from_secs_f64(bytes as f64 / speed as f64)));
        }
    }

    /// Reads what is to be copied of a range, and checks it.
    async fn verify(&self, range: Range<u64>, buffer: &Buffer) -> Result<()> {
        let task = self.settings.get().task;
        let mut at = range.start;
        while at < range.end {
            let extent = self.source.extent(ByteOffset(at), range.end - at).await?;
            let len = extent.len.min(range.end - at).min(PIECE);
            if extent.kind == ExtentKind::Data && task.wants(&extent) {
                self.source.read_whole(ByteOffset(at), &buffer.sg().slice(0, len as usize)).await?;
            }
            at += len;
        }
        Ok(())
    }

    /// Copies one run. Tells what was done about an error, if there was one; the run is dirty again then.
    async fn copy(&self, copying: Copying<'_>, buffer: &Buffer) -> Option<ErrorAction> {
        let _under_way = UnderWay::new(&self.pieces);
        let range = copying.range();
        let len = range.end - range.start;
        let task = self.settings.get().task;
        debug_assert!(!task.keeps_the_past(), "a granule may be taken once nobody changes it");
        // A guest that writes here in the background makes it dirty again, and another lane may take it while this one still copies what was
        // there before: that must not come last. Taken before the other lock, by copies alone.
        let _one = self.copies.exclusive(range.start, len).await;
        // What is copied within one volume has to be so before a guest may change it.
        let _together = if self.is_write_blocking() || task.is_within() {
            self.lock.exclusive(range.start, len).await
        } else {
            self.lock.shared(range.start, len).await
        };
        // Whoever writes a part of a cluster takes all of it over: what goes along has to be right as well.
        if task.is_within()
            && let Err(e) = self.verify(range.clone(), buffer).await
        {
            return Some(self.failed(true, &e));
        }
        self.copied_or_failed(copying, buffer).await
    }

    /// Copies what is dirty of a range as it was when the job began, which no change may come before.
    async fn copy_there(&self, range: Range<u64>, buffer: &Buffer) -> Option<ErrorAction> {
        let _under_way = UnderWay::new(&self.pieces);
        let _alone = self.lock.exclusive(range.start, range.end - range.start).await;
        while let Some(copying) = self.map.take_within(&range, PIECE) {
            if self.is_over() {
                return None;
            }
            let failed = self.copied_or_failed(copying, buffer).await;
            if failed.is_some() {
                return failed;
            }
        }
        None
    }

    async fn copied_or_failed(&self, copying: Copying<'_>, buffer: &Buffer) -> Option<ErrorAction> {
        match self.transfer(copying.range(), buffer).await {
            Ok(true) => copying.done(),
            Ok(false) => {}
            Err(Failure { source, error }) => return Some(self.failed(source, &error)),
        }
        None
    }

    /// Copies what is still dirty, on a volume that nobody uses any more and nothing else copies.
    ///
    /// # Errors
    /// Why the target does not have all of it.
    pub async fn copy_rest(&self) -> std::result::Result<(), String> {
        let buffer = Buffer::zeroed(PIECE as usize);
        while let Some(copying) = self.map.take(PIECE) {
            match self.transfer(copying.range(), &buffer).await {
                Ok(true) => copying.done(),
                Ok(false) => break,
                Err(Failure { error, .. }) => return Err(error.to_string()),
            }
        }
        match self.verdict() {
            Some(Verdict::Failed(reason)) => Err(reason),
            Some(Verdict::Cancelled) => Err("the copy was cancelled".to_owned()),
            _ if !self.map.is_settled() => Err("not all of it could be copied".to_owned()),
            _ => Ok(()),
        }
    }

    /// Moves a range from the source to the target. False if the job is over before that is done. `buffer` has a piece, or the range.
    pub(super) async fn transfer(
        &self,
        range: Range<u64>,
        buffer: &Buffer,
    ) -> std::result::Result<bool, Failure> {
        let of_source = |error| Failure { source: true, error };
        let mut at = range.start;
        while at < range.end {
            if self.is_over() {
                return Ok(false);
            }
            let place = ByteOffset(at);
            let extent = self.source.extent(place, range.end - at).await.map_err(of_source)?;
            let settings = self.settings.get();
            let unmap = settings.unmap;
            let mut len = extent.len.min(range.end - at);
            let written = match extent.kind {
                _ if !settings.wants(&extent) => Ok(()),
                ExtentKind::Zero => self.target.write_zeroes(place, len, false).await,
                ExtentKind::Hole | ExtentKind::Unallocated => {
                    self.target.write_zeroes(place, len, unmap).await
                }
                ExtentKind::Data => {
                    len = len.min(PIECE);
                    if extent.host_offset.is_some() {
                        len = self.data_end(at, len, range.end).await - at;
                    }
                    self.pace(len);
                    let data = buffer.sg().slice(0, len as usize);
                    match self.source.read_whole(place, &data).await.map_err(of_source)? {
                        // A part of a hole that shares a page of tuples with data.
                        Some(tuples) if tuples.iter().all(|b| *b == 0xff) && data.is_zero() => {
                            self.target.write_zeroes(place, len, unmap).await
                        }
                        tuples => self.target.write_whole(place, &data, tuples).await,
                    }
                }
            };
            written.map_err(|error| Failure { source: false, error })?;
            at += len;
        }
        self.copied.set(self.copied.get() + (range.end - range.start));
        Ok(true)
    }
}
