//! Clusters: reserved in runs, taken from the pool, given back when that is safe.
//!
//! A run is reserved once: its content made zeros, its refcounts set to 1, one sync for both. From then on a cluster of the
//! pool can be linked without any barrier: whatever subset of later writes a power cut leaves, the cluster is counted, and it holds zeros or what the
//! guest wrote. What a crash leaves of the pool is a leak of at most one and a half times [`MOST_BYTES`].
//!
//! Whoever finds the pool half empty after its write fills it again, before it answers. Those beside it go on taking meanwhile, so that a
//! guest with several writes in flight seldom waits for that sync.
//!
//! A cluster that the guest has no more use for is not free at once: the table that referred to it may come back after a power
//! cut, and a read that looked it up may still be on its way. It waits until a sync has covered its unlinking and everybody who
//! was at work has finished; then its refcount drops, and its space goes back to the file system.

use std::collections::VecDeque;

use super::{Qcow2, Storage, refcount::Clusters};
use crate::volume::{IoError, IoErrorKind, IoOp, Result};

/// The first run reserved has so many bytes; each that follows twice as many.
const FIRST_BYTES: u64 = 1 << 20;
/// Until they have so many, or this part of the disk.
const MOST_BYTES: u64 = 64 << 20;
const MOST_OF_DISK: u64 = 16;
/// Pieces of free space that one reservation collects.
const MOST_RUNS: usize = 64;
/// Clusters' runs that may wait to be freed before somebody is made to sync.
const MOST_WAITING: usize = 4096;

/// Clusters that are reserved and not linked: refcount 1 and zeros, durably.
#[derive(Default)]
pub(super) struct Pool {
    runs: VecDeque<Clusters>,
    /// Clusters in them.
    left: u64,
    /// With fewer than so many it is time for more.
    low: u64,
    /// Bytes reserved the last time.
    step: u64,
    /// Nobody need fill it before it is empty: somebody is at it, or found little room.
    filling: bool,
}

/// Clusters that are unlinked and still counted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Freed {
    first: u64,
    count: u64,
    /// The barrier's stamp at the unlinking.
    stamp: u64,
    /// The epoch at the unlinking.
    epoch: u64,
}

impl Pool {
    fn take(&mut self, want: u64) -> Option<Clusters> {
        let (first, count) = self.runs.front_mut()?;
        let taken = (*first, want.min(*count));
        if taken.1 == *count {
            self.runs.pop_front();
        } else {
            *first += taken.1;
            *count -= taken.1;
        }
        self.left -= taken.1;
        Some(taken)
    }

    fn add(&mut self, runs: Vec<Clusters>) {
        self.left += runs.iter().map(|(_, count)| count).sum::<u64>();
        self.low = self.left / 2;
        self.runs.extend(runs);
    }
}

impl<S: Storage> Qcow2<S> {
    /// Takes reserved clusters: at least one, at most `want`, together. Gives the offset in the file and their number. They hold zeros.
    pub(super) async fn take(&self, op: IoOp, want: u64) -> Result<(u64, u64)> {
        loop {
            let taken = self.pool.borrow_mut().take(want);
            if let Some((first, count)) = taken {
                return Ok((first << self.geometry.cluster_bits, count));
            }
            self.reserve(op).await?;
        }
    }

    /// Clusters that were taken and not linked after all. What they hold is not known any more.
    pub(super) fn give_back(&self, host: u64, count: u64) {
        self.free_later(self.geometry.index(host), count);
    }

    /// One reference less to each of these clusters, when that is safe.
    pub(super) fn free_later(&self, first: u64, count: u64) {
        let (stamp, epoch) = (self.barrier.stamp(), self.epochs.current());
        let mut freed = self.freed.borrow_mut();
        match freed.last_mut() {
            Some(last) if (last.first + last.count, last.stamp, last.epoch) == (first, stamp, epoch) => {
                last.count += count;
            }
            _ => freed.push(Freed { first, count, stamp, epoch }),
        }
    }

    /// Whether so much waits to be freed that somebody should sync.
    pub(super) fn much_is_freed(&self) -> bool {
        self.freed.borrow().len() >= MOST_WAITING
    }

    /// Frees what waits and may be freed.
    pub(super) async fn settle(&self, op: IoOp) -> Result<()> {
        let _space = self.space.lock().await;
        self.free_waiting(op).await
    }

    async fn free_waiting(&self, op: IoOp) -> Result<()> {
        if self.freed.borrow().is_empty() {
            return Ok(());
        }
        let mut ready: Vec<Freed> = Vec::new();
        self.freed.borrow_mut().retain(|f| {
            let now = self.barrier.covers(f.stamp) && self.epochs.is_past(f.epoch);
            if now {
                ready.push(*f);
            }
            !now
        });
        // Those who begin from here on have not seen what still waits.
        self.epochs.advance();
        self.last_inflated.take();
        ready.sort_unstable_by_key(|f| f.first);
        for f in ready {
            let free = self.change_refcounts(op, (f.first, f.count), false).await?;
            for (first, count) in free {
                self.first_free.set(self.first_free.get().min(first));
                let bits = self.geometry.cluster_bits;
                // Only a saving: a cluster is made zeros again before it is used.
                let _ = self.storage.punch(first << bits, count << bits).await;
            }
        }
        Ok(())
    }

    /// Makes clusters zeros: punched where the file has them, else by letting it grow.
    pub(super) async fn make_zero(&self, op: IoOp, (first, count): Clusters) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (start, end) = (first << bits, (first + count) << bits);
        let len = self.file_len.get();
        if start < len {
            let n = end.min(len) - start;
            self.storage.punch(start, n).await.map_err(|e| self.io_error(op, e))?;
        }
        if end > len {
            self.storage.set_size(end).await.map_err(|e| self.io_error(op, e))?;
            self.file_len.set(end);
        }
        Ok(())
    }

    /// Fills the pool, if nobody has meanwhile.
    async fn reserve(&self, op: IoOp) -> Result<()> {
        let _space = self.space.lock().await;
        if !self.pool.borrow().runs.is_empty() {
            return Ok(());
        }
        let enough = match self.fill_pool(op).await {
            Err(e) if e.kind == IoErrorKind::NoSpace => {
                let little = self.reserve_little(op, e).await?;
                self.pool.borrow_mut().add(little);
                false
            }
            result => result.map(|()| true)?,
        };
        self.pool.borrow_mut().filling = !enough;
        Ok(())
    }

    /// Whether it is time to fill the pool, and nobody does.
    pub(super) fn pool_is_low(&self) -> bool {
        let pool = self.pool.borrow();
        !pool.filling && pool.left < pool.low
    }

    /// Fills the pool before it is empty. Where that fails it is for the one to hear who finds it empty; until then nobody tries again.
    pub(super) async fn reserve_ahead(&self, op: IoOp) {
        self.pool.borrow_mut().filling = true;
        let _space = self.space.lock().await;
        let filled = self.fill_pool(op).await.is_ok();
        self.pool.borrow_mut().filling = !filled;
    }

    async fn fill_pool(&self, op: IoOp) -> Result<()> {
        self.free_waiting(op).await?;
        let most = (self.size.get() / MOST_OF_DISK).min(MOST_BYTES);
        let step = (self.pool.borrow().step * 2).max(FIRST_BYTES).min(most);
        let want = (step >> self.geometry.cluster_bits).clamp(4, 16384);
        let runs = self.reserve_runs(op, want).await?;
        let mut pool = self.pool.borrow_mut();
        pool.step = step;
        pool.add(runs);
        Ok(())
    }

    /// When space is short: what waits to be freed, or just enough to go on.
    async fn reserve_little(&self, op: IoOp, no_space: IoError) -> Result<Vec<Clusters>> {
        self.sync(op).await?;
        self.free_waiting(op).await?;
        self.first_free.set(0);
        match self.reserve_runs(op, 4).await {
            Err(e) if e.kind == IoErrorKind::NoSpace => Err(no_space),
            result => result,
        }
    }

    async fn reserve_runs(&self, op: IoOp, want: u64) -> Result<Vec<Clusters>> {
        let runs = self.find_free(op, want, MOST_RUNS, false).await?;
        if runs.is_empty() {
            return Ok(vec![self.append_area(op, want).await?]);
        }
        let reserved = self.count_and_clear(op, &runs).await;
        if reserved.is_err() {
            let first = runs.first().map_or(0, |(first, _)| *first);
            self.first_free.set(self.first_free.get().min(first));
        }
        reserved?;
        Ok(runs)
    }

    async fn count_and_clear(&self, op: IoOp, runs: &[Clusters]) -> Result<()> {
        for run in runs {
            self.make_zero(op, *run).await?;
        }
        for run in runs {
            self.change_refcounts(op, *run, true).await?;
        }
        self.sync(op).await
    }

    /// Clusters in one run, for a table: refcount 1 and zeros, durably.
    pub(super) async fn take_together(&self, op: IoOp, count: u64) -> Result<Clusters> {
        let _space = self.space.lock().await;
        let runs = self.find_free(op, count, 1, true).await?;
        let Some((first, _)) = runs.first() else { return self.append_area(op, count).await };
        self.count_and_clear(op, &[(*first, count)]).await?;
        Ok((*first, count))
    }

    /// The end of a session: what is reserved and not used goes back, and the file ends where it is used.
    pub(super) async fn finish(&self) -> Result<()> {
        let op = IoOp::Close;
        self.sync(op).await?;
        if self.corrupt.borrow().is_some() {
            return Ok(());
        }
        let _space = self.space.lock().await;
        self.free_waiting(op).await?;
        let mut runs: Vec<Clusters> = std::mem::take(&mut *self.pool.borrow_mut()).runs.into();
        runs.sort_unstable();
        for run in &runs {
            self.change_refcounts(op, *run, false).await?;
        }
        self.sync(op).await?;
        if !self.storage.is_fixed() {
            let bits = self.geometry.cluster_bits;
            let mut end = self.file_len.get();
            for (first, count) in runs.iter().rev() {
                if (first + count) << bits >= end {
                    end = first << bits;
                }
            }
            if end < self.file_len.get() {
                self.storage.set_size(end).await.map_err(|e| self.io_error(op, e))?;
                self.file_len.set(end);
            }
        }
        self.sync(op).await
    }
}
