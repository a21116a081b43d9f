//! Small writes that touch become one: writers of neighbouring tuples, which a sequential load at any queue depth has, share a write
//! of the file.
//!
//! A writer that is alone writes at once. One that finds others at work leaves its bytes here for the length of a turn of its thread, so
//! that all who came with it have done the same; the first to go on takes its neighbours along. Where that has brought nobody together for
//! a while, as with a random load, it is left out, and tried again now and then: it costs more than the write's own way through user space.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    rc::Rc,
};

use crate::{
    storage::Storage,
    sync::Notify,
    sys::{exec::yield_now, mem::Buffer},
};

/// Turns without a neighbour after which nobody waits for one.
const FRUITLESS: u32 = 32;
/// Of those, how many are tried again.
const TRIED: u32 = 8;
/// Writes from one such try to the next.
const APART: u32 = 512;

/// Bytes that wait to be written.
struct Waiting {
    at: u64,
    bytes: Buffer,
    dsync: bool,
    done: Rc<Outcome>,
}

impl Waiting {
    fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }
}

/// What became of it, for its writer. An error is kept by its number.
#[derive(Default)]
struct Outcome {
    result: Cell<Option<Result<(), i32>>>,
    ended: Notify,
}

/// Tells every writer of a run what became of it, if only that nothing did.
struct Run(Vec<Waiting>);

impl Run {
    fn end(&self, result: Result<(), i32>) {
        for waiting in &self.0 {
            waiting.done.result.set(Some(result));
            waiting.done.ended.notify_all();
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for waiting in self.0.iter().filter(|w| w.done.result.get().is_none()) {
            waiting.done.result.set(Some(Err(libc::EINTR)));
            waiting.done.ended.notify_all();
        }
    }
}

/// Where they meet.
#[derive(Default)]
pub(super) struct Gather {
    /// By their offsets.
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    at_work: Cell<usize>,
    /// Turns since a writer has met a neighbour.
    fruitless: Cell<u32>,
    /// Writes until it is tried again.
    until_tried: Cell<u32>,
}

struct AtWork<'a>(&'a Gather);

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.0.at_work.set(self.0.at_work.get() - 1);
    }
}

impl Gather {
    /// Writes bytes. Writers of overlapping ranges have an order of their own making, or none.
    ///
    /// # Errors
    /// Those of the write that these bytes were part of.
    pub(super) async fn write(
        &self,
        storage: &impl Storage,
        at: u64,
        bytes: Buffer,
        dsync: bool,
    ) -> io::Result<()> {
        let alone = self.at_work.get() == 0;
        self.at_work.set(self.at_work.get() + 1);
        let _at_work = AtWork(self);
        if alone || !self.is_worth_a_turn() || self.waiting.borrow().contains_key(&at) {
            return storage.write(at, &bytes.sg(), dsync).await;
        }
        let done = Rc::new(Outcome::default());
        self.waiting.borrow_mut().insert(at, Waiting { at, bytes, dsync, done: done.clone() });
        yield_now().await;
        if let Some(run) = self.take_run(at, &done) {
            self.fruitless.set(if run.0.len() > 1 { 0 } else { self.fruitless.get() + 1 });
            let mut sg = run.0[0].bytes.sg();
            run.0[1..].iter().for_each(|next| sg.append(&next.bytes.sg()));
            let wrote = storage.write(run.0[0].at, &sg, dsync).await;
            run.end(wrote.as_ref().map(drop).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)));
            return wrote;
        }
        loop {
            let ended = done.ended.wait();
            if let Some(result) = done.result.get() {
                return result.map_err(io::Error::from_raw_os_error);
            }
            ended.await;
        }
    }

    /// Whether a neighbour may be met.
    fn is_worth_a_turn(&self) -> bool {
        if self.fruitless.get() < FRUITLESS {
            return true;
        }
        match self.until_tried.get() {
            0 => {
                self.fruitless.set(FRUITLESS - TRIED);
                self.until_tried.set(APART);
                true
            }
            left => {
                self.until_tried.set(left - 1);
                false
            }
        }
    }

    /// Takes what lies side by side with the bytes of that writer, in order; `None` if somebody has taken them along.
    fn take_run(&self, at: u64, whose: &Rc<Outcome>) -> Option<Run> {
        let mut waiting = self.waiting.borrow_mut();
        waiting.get(&at).filter(|w| Rc::ptr_eq(&w.done, whose))?;
        // Back to where the run begins, then along it.
        let (mut start, dsync) = (at, waiting[&at].dsync);
        let fits = |w: &Waiting, touches: bool| w.dsync == dsync && touches;
        while let Some((before, w)) = waiting.range(..start).next_back() {
            if !fits(w, w.end() == start) {
                break;
            }
            start = *before;
        }
        let mut run: Vec<Waiting> = waiting.remove(&start).into_iter().collect();
        while let Some(end) = run.last().map(Waiting::end) {
            if !waiting.get(&end).is_some_and(|w| fits(w, true)) {
                break;
            }
            run.extend(waiting.remove(&end));
        }
        Some(Run(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pi::testing::block_on,
        storage::sim::{OpKind, SimDisk},
        sys::exec::join_all,
    };

    fn eight(byte: u8) -> Buffer {
        Buffer::from_slice(&[byte; 8])
    }

    #[test]
    fn neighbours_share_a_write_and_others_have_their_own() {
        let log = SimDisk::new(7);
        let disk = log.clone();
        block_on(async move {
            let gather = &Gather::default();
            // The first is alone when it comes; of the rest those at 8..40 and at 100..116 touch.
            let places = [0u64, 16, 8, 32, 24, 100, 108, 200];
            let writes = places.iter().map(|at| gather.write(&disk, *at, eight(*at as u8), false));
            join_all(writes).await.into_iter().for_each(|r| r.unwrap());
            let read = Buffer::zeroed(256);
            disk.read(0, &read.sg()).await.unwrap();
            for at in places {
                assert_eq!(read.to_vec()[at as usize..][..8], [at as u8; 8]);
            }
        });
        assert_eq!(log.log().iter().filter(|k| **k == OpKind::Write).count(), 4);
    }

    #[test]
    fn writers_without_neighbours_stop_waiting_for_them_and_find_them_again() {
        let disk = SimDisk::new(7);
        block_on(async move {
            let (gather, disk) = (&Gather::default(), &disk);
            // Far apart, two at a time: the second of each pair looks for a neighbour, as long as that is worth it.
            let pair = |i: u64| {
                let places = [i * 64, i * 64 + 32];
                join_all(places.map(|at| gather.write(disk, at, eight(1), false)))
            };
            let mut waited = 0;
            for i in 0..u64::from(FRUITLESS + APART) {
                let before = gather.fruitless.get();
                pair(i).await.into_iter().for_each(|r| r.unwrap());
                waited += u32::from(gather.fruitless.get() != before);
            }
            assert!((FRUITLESS..FRUITLESS + 2 * TRIED).contains(&waited), "{waited}");
            // Then side by side: they meet after a while, and go on to.
            let side_by_side =
                |i: u64| join_all((0..8).map(move |n| gather.write(disk, (i * 8 + n) * 8, eight(2), false)));
            let mut met = false;
            for i in 0..u64::from(APART) / 4 {
                side_by_side(i).await.into_iter().for_each(|r| r.unwrap());
                met |= gather.fruitless.get() == 0;
            }
            assert!(met && gather.fruitless.get() == 0);
        });
    }

    #[test]
    fn a_write_that_fails_fails_for_all_whose_bytes_it_had() {
        let disk = SimDisk::new(7);
        block_on(async move {
            let gather = &Gather::default();
            // The first write goes well; the one of all the others fails.
            disk.fail_at(1);
            let writes = (0..6u64).map(|i| gather.write(&disk, i * 8, eight(1), false));
            let results = join_all(writes).await;
            assert!(results[0].is_ok() && results[1..].iter().all(Result::is_err), "{results:?}");
            // And nobody waits for ever afterwards.
            gather.write(&disk, 0, eight(2), false).await.unwrap();
        });
    }
}
