//! Looking over a volume while it serves: every block that has a tuple is read and checked, a step at a time, so that damage is
//! found while there is still a copy to bring it back from, and not when a guest asks for the block.
//!
//! A step takes the same lock as a read of its blocks, so a write that is under way is never taken for damage. It reads what
//! a guest would read: blocks that are in the page cache are checked as they are there. Called by the LUN's thread, which
//! sets the pace and keeps the account.

use super::{
    protected::Protected,
    recompute::{Run, bytes, next_run},
    store::Source,
    tools::VerifyReport,
};
use crate::{
    storage::Storage,
    sys::mem::{Buffer, Sg},
    units::Lba,
    volume::{Result, Volume},
};

/// The most bytes that a step looks at: writes to them wait for so long.
pub const STEP: u64 = 256 << 10;

/// How far a step has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The first block that is still to be looked at.
    pub next: Lba,
    /// Bytes of data that were read.
    pub read: u64,
}

impl<V: Volume, S: Storage> Protected<V, S> {
    /// Looks at the next blocks at or after `from` and adds what it finds to the report; `None` at the end. Holes that have no
    /// tuples are passed over.
    ///
    /// # Errors
    /// Of the image's map and of the sidecar. Data that cannot be read are counted.
    pub async fn scrub(&self, from: Lba, report: &mut VerifyReport) -> Result<Option<Step>> {
        let size = self.block_size();
        report.blocks = self.blocks_now().0;
        let Some(run) = next_run(self.volume(), self.sidecar(), from.0, report.blocks).await? else {
            return Ok(None);
        };
        let stop = run.blocks.end.min(run.blocks.start + (STEP >> size.shift()));
        let run = Run { blocks: run.blocks.start..stop, ..run };
        let (at, len) = bytes(size, run.blocks.clone())?;
        let data = Buffer::zeroed(len as usize).sg();
        if let Ok((_, tuples)) = self.get(at, &data, Source::File).await {
            self.take(&run, &data, &tuples, report);
            return Ok(Some(Step { next: Lba(stop), read: len }));
        }
        // One bad sector must not hide its neighbours.
        for lba in run.blocks.clone() {
            let (at, len) = bytes(size, lba..lba + 1)?;
            let block = data.slice(0, len as usize);
            let host_offset = run.host_offset.map(|host| host + ((lba - run.blocks.start) << size.shift()));
            match self.get(at, &block, Source::File).await {
                Ok((_, tuple)) => {
                    self.take(&Run { blocks: lba..lba + 1, host_offset, ..run }, &block, &tuple, report);
                }
                Err(_) => report.unreadable += 1,
            }
        }
        Ok(Some(Step { next: Lba(stop), read: len }))
    }

    fn take(&self, run: &Run, data: &Sg, tuples: &[u8], report: &mut VerifyReport) {
        let checker = self.checker();
        // A region that is in use is marked; but what a crash has left in doubt stays so where nobody may write.
        let in_doubt = |lba| self.is_read_only() && self.sidecar().is_marked(lba);
        report.take(&checker, run, (data, &[]), tuples, in_doubt);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pi::{
            PiType,
            testing::{SimVolume, World, block_on, read, write},
        },
        storage::sim::{OpKind, Rng, SimDisk, scaled},
        sys::exec::{join, yield_now},
        units::BlockSize,
    };

    const MIB: u64 = 1 << 20;

    async fn all(p: &Protected<SimVolume, SimDisk>) -> VerifyReport {
        let (mut report, mut at) = (VerifyReport::default(), Lba(0));
        while let Some(step) = p.scrub(at, &mut report).await.unwrap() {
            assert!(step.next > at && step.read <= STEP);
            at = step.next;
        }
        report
    }

    #[test]
    fn damage_behind_the_luns_back_is_found_where_it_lies_and_nothing_else_is() {
        for size in [BlockSize::B512, BlockSize::B4096] {
            let world = World::new(1, PiType::Type1, size, 1 << 30);
            block_on(async move {
                let p = world.open().await;
                write(&p, 3 * MIB, &Rng::new(1).bytes(MIB as usize)).await.unwrap();
                write(&p, 900 * MIB, &Rng::new(2).bytes(4096)).await.unwrap();
                let n = (MIB + 4096) / size.bytes();
                let clean = all(&p).await;
                assert_eq!((clean.verified, clean.unprotected, clean.mismatches), (n, 0, 0));
                assert!(clean.is_clean() && clean.blocks == (1 << 30) / size.bytes());
                // One flipped, one lost altogether: a hole that has a tuple.
                let flipped = 3 * MIB + STEP + 5 * size.bytes();
                world.image.poke(flipped + 7, &[!world.image.peek(flipped + 7, 1)[0]]);
                write(&p, 500 * MIB, &vec![7; size.bytes() as usize]).await.unwrap();
                world.image.poke(500 * MIB, &vec![0; size.bytes() as usize]);
                let report = all(&p).await;
                assert_eq!((report.verified, report.mismatches), (n - 1, 2));
                let found: Vec<_> = report.bad.iter().map(|b| (b.lba, b.host_offset)).collect();
                let at = |byte: u64| (byte / size.bytes(), Some(byte));
                assert_eq!(found, [at(flipped), at(500 * MIB)]);
                assert_eq!(p.counters().guard_errors, 0, "no guest has read them");
            });
        }
    }

    #[test]
    fn a_bad_sector_does_not_hide_its_neighbours() {
        let world = World::new(2, PiType::Type1, BlockSize::B512, 64 * MIB);
        block_on(async move {
            let p = world.open().await;
            write(&p, 0, &Rng::new(3).bytes(8 * 512)).await.unwrap();
            world.image.fail_all(Some((OpKind::Read, libc::EIO)));
            let report = all(&p).await;
            assert_eq!((report.unreadable, report.verified, report.mismatches), (8, 0, 0));
            world.image.fail_all(None);
            assert_eq!(all(&p).await.verified, 8);
        });
    }

    #[test]
    fn writes_that_are_under_way_are_never_taken_for_damage() {
        let rounds = scaled(200);
        for seed in 0..4 {
            let world = World::new(seed, PiType::Type1, BlockSize::B512, 4 * MIB);
            world.image.set_max_delay(7);
            world.sidecar.set_max_delay(5);
            block_on(async move {
                let p = world.open().await;
                let mut rng = Rng::new(seed);
                let writes = async {
                    for _ in 0..rounds {
                        let (at, n) = (rng.below(8000) * 512, (1 + rng.below(100)) * 512);
                        write(&p, at, &rng.bytes(n as usize)).await.unwrap();
                        yield_now().await;
                    }
                };
                let looks = async {
                    for _ in 0..5 {
                        let report = all(&p).await;
                        assert!(report.is_clean() && report.in_doubt == 0, "{report:?}");
                    }
                };
                join(writes, looks).await;
                let report = all(&p).await;
                assert!(report.is_clean() && report.verified > 0, "{report:?}");
                read(&p, 0, 4096).await.unwrap();
            });
        }
    }
}
