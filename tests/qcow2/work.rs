//! The random work itself, for files and for the simulated disk: many workers, any overlap, every operation of a volume.

use std::cell::{Cell, RefCell};

use tcmu_dif::{
    sys::{
        exec::join_all,
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{Result, Volume, WriteFlags},
};

use crate::{
    model::{BLOCK, Model},
    support::Rng,
};

/// A buffer in a few pieces, as a ring's data area gives them.
pub fn scattered(rng: &mut Rng, bytes: &[u8]) -> Sg {
    let mut sg = Sg::new();
    let mut at = 0;
    while at < bytes.len() {
        let n = (1 + rng.below(bytes.len() as u64 / 512) as usize) * 512;
        let n = n.min(bytes.len() - at);
        sg.append(&Buffer::from_slice(&bytes[at..at + n]).sg());
        at += n;
    }
    sg
}

pub struct Work<'a, V: Volume> {
    pub volume: &'a V,
    pub model: &'a Model,
    /// Blocks of the disk.
    pub blocks: u64,
    /// Blocks of the longest operation.
    pub longest: u64,
    pub rng: RefCell<Rng>,
    pub left: Cell<u64>,
    /// Whether operations may fail (a disk that fails on purpose).
    pub may_fail: bool,
}

impl<V: Volume> Work<'_, V> {
    /// Runs the operations with so many workers.
    pub async fn run(&self, workers: u64) {
        join_all((0..workers).map(|_| self.worker())).await;
    }

    /// Runs operations that change the disk with so many workers, until somebody ends the process.
    pub async fn only_changes(&self, workers: u64) {
        join_all((0..workers).map(|_| async {
            loop {
                let what = self.rng.borrow_mut().below(75);
                self.act(if what < 45 { what } else { what + 25 }).await;
            }
        }))
        .await;
    }

    async fn worker(&self) {
        while self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            self.one().await;
        }
    }

    fn place(&self) -> (u64, u64) {
        let mut rng = self.rng.borrow_mut();
        let count = 1 + match rng.below(4) {
            0 => 0,
            1 => rng.below(8.min(self.longest)),
            _ => rng.below(self.longest),
        };
        let count = count.min(self.blocks);
        // Half of the work is on a small part of the disk, so that operations meet.
        let area = if rng.one_in(2) { self.blocks } else { (self.longest * 2).min(self.blocks) };
        let mut first = rng.below(area).min(self.blocks - count);
        if rng.one_in(8) {
            first = self.blocks - count;
        }
        (first, count)
    }

    fn ended(&self, op: usize, result: Result<()>, durable: bool) {
        match result {
            Ok(()) => self.model.end(op, durable),
            Err(e) => assert!(self.may_fail, "{e} {:?}", e.source),
        }
    }

    async fn one(&self) {
        let what = self.rng.borrow_mut().below(100);
        self.act(what).await;
    }

    /// An operation: 45 in 100 are writes (10 of them atomic, where that can be), 25 reads, the rest changes or asks something else.
    async fn act(&self, what: u64) {
        let (first, count) = self.place();
        let (at, len) = (ByteOffset(first * BLOCK), count * BLOCK);
        match what {
            0..45 => {
                let atomic = what < 10 && self.volume.limits().keeps_whole(at, len);
                let op = match atomic {
                    true => self.model.begin_whole(first, count),
                    false => self.model.begin(first, count, false),
                };
                let sg = scattered(&mut self.rng.borrow_mut(), &self.model.data(op, first, count));
                let fua = what == 0;
                self.ended(op, self.volume.write(at, &sg, WriteFlags { fua, atomic }).await, fua);
            }
            45..70 => {
                let began = self.model.read_begins();
                let sg = scattered(&mut self.rng.borrow_mut(), &vec![0xa5; len as usize]);
                match self.volume.read(at, &sg).await {
                    Ok(()) => self.model.judge_read(first, &sg.to_vec(), began).unwrap(),
                    Err(e) => assert!(self.may_fail, "{e}"),
                }
                self.model.read_ended(began);
            }
            70..82 => {
                let op = self.model.begin(first, count, true);
                self.ended(op, self.volume.discard(at, len).await, false);
            }
            82..94 => {
                let op = self.model.begin(first, count, true);
                self.ended(op, self.volume.write_zeroes(at, len, what < 88).await, false);
            }
            94..97 => {
                let began = self.model.flush_begins();
                match self.volume.flush().await {
                    Ok(()) => self.model.flush_ended(began),
                    Err(e) => assert!(self.may_fail, "{e}"),
                }
            }
            _ => match self.volume.map_extents(at, len).await {
                Ok(map) => {
                    assert_eq!(map[0].start, at);
                    for pair in map.windows(2) {
                        assert_eq!(pair[0].start.0 + pair[0].len, pair[1].start.0);
                    }
                }
                Err(e) => assert!(self.may_fail, "{e}"),
            },
        }
    }
}

/// Reads a whole disk.
pub async fn read_disk(volume: &impl Volume) -> Result<Vec<u8>> {
    let len = volume.limits().capacity;
    let mut bytes = Vec::with_capacity(len as usize);
    while (bytes.len() as u64) < len {
        let at = bytes.len() as u64;
        let sg = Buffer::zeroed((len - at).min(1 << 20) as usize).sg();
        volume.read(ByteOffset(at), &sg).await?;
        bytes.extend(sg.to_vec());
    }
    Ok(bytes)
}
