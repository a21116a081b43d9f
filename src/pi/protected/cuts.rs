//! Crashes: workloads that are stopped at any turn, by power loss or by `kill -9`, or by an error at any one operation, and
//! opened again. What must hold each time: no false alarm, and every write that was flushed (by `kill -9`: finished) is
//! there and protected.

use std::{cell::Cell, rc::Rc};

use super::*;
use crate::{
    pi::testing::{World, block_on},
    storage::sim::{Rng, SimDisk, scaled},
    sys::{
        exec::{Executor, yield_now},
        mem::Buffer,
    },
};

const REGION: u64 = 64 << 20;
/// Blocks that one task works on, in several regions.
const SITES: u64 = 6;
const SITE_BLOCKS: u64 = 4;
const TASKS: u64 = 3;

/// What may be found in one block. Versions grow with each write of the block; the content names its version.
#[derive(Clone, Default)]
struct Block {
    begun: u64,
    acked: u64,
    durable: u64,
    /// The versions that are zeros.
    zeros: Vec<u64>,
    /// The last write ended in an error or a crash: the content is any version since the durable one.
    failed: bool,
}

impl Block {
    fn allows(&self, sector: &[u8], floor: u64, name: u64) -> bool {
        if sector.iter().all(|b| *b == 0) {
            return floor == 0 || self.zeros.iter().any(|z| *z >= floor);
        }
        (floor.max(1)..=self.begun).any(|v| !self.zeros.contains(&v) && sector == &pattern(name, v)[..])
    }
}

fn pattern(name: u64, version: u64) -> [u8; 512] {
    let mut out = [0; 512];
    for (i, word) in out.chunks_mut(8).enumerate() {
        word.copy_from_slice(&(name << 40 | version << 8 | i as u64 | 0x80).to_be_bytes());
    }
    out
}

#[derive(Clone)]
struct Model {
    blocks: Rc<RefCell<Vec<Block>>>,
    size: BlockSize,
    /// Something was answered with an error.
    errors: Rc<Cell<u64>>,
}

type Lun = Protected<crate::pi::testing::SimVolume, SimDisk>;

impl Model {
    fn new(size: BlockSize) -> Model {
        let blocks = vec![Block::default(); (TASKS * SITES * SITE_BLOCKS) as usize];
        Model { blocks: Rc::new(RefCell::new(blocks)), size, errors: Rc::default() }
    }

    fn capacity() -> u64 {
        4 * REGION
    }

    /// Where the blocks of a site lie: in four regions, and across no two of them.
    fn place(&self, site: u64) -> u64 {
        let region = site % 4;
        region * REGION + (site / 4) * 300 * 4096
    }

    /// One random operation of a task, on its own sites.
    async fn step(&self, lun: &Lun, rng: &mut Rng, task: u64) {
        let site = task * SITES + rng.below(SITES);
        let first = rng.below(SITE_BLOCKS);
        let n = 1 + rng.below(SITE_BLOCKS - first);
        let range = (site * SITE_BLOCKS + first) as usize..(site * SITE_BLOCKS + first + n) as usize;
        let bs = self.size.bytes();
        let at = ByteOffset(self.place(site) + first * bs);
        let what = rng.below(12);
        if what < 4 {
            let snapshot: Vec<u64> = self.blocks.borrow().iter().map(|b| b.acked).collect();
            match lun.flush().await {
                Ok(()) => {
                    for (b, acked) in self.blocks.borrow_mut().iter_mut().zip(snapshot) {
                        b.durable = b.durable.max(acked);
                    }
                }
                Err(_) => self.errors.set(self.errors.get() + 1),
            }
            return;
        }
        if what == 4 {
            return self.check_site(lun, site, |b| if b.failed { b.durable } else { b.acked }).await;
        }
        let zeros = what == 5 || what == 6;
        let versions: Vec<u64> = {
            let mut blocks = self.blocks.borrow_mut();
            range
                .clone()
                .map(|i| {
                    blocks[i].begun += 1;
                    let v = blocks[i].begun;
                    if zeros {
                        blocks[i].zeros.push(v);
                    }
                    v
                })
                .collect()
        };
        let fua = what == 7;
        let done = match what {
            5 => lun.discard(at, n * bs).await,
            6 => lun.write_zeroes(at, n * bs, rng.one_in(2)).await,
            _ => {
                let bytes: Vec<u8> = range
                    .clone()
                    .zip(&versions)
                    .flat_map(|(i, v)| pattern(i as u64, *v).repeat((bs / 512) as usize))
                    .collect();
                lun.write(at, &Buffer::from_slice(&bytes).sg(), WriteFlags { fua }).await
            }
        };
        if let Err(e) = &done {
            assert!(!matches!(e.kind, IoErrorKind::Protection(_)), "{e}");
            self.errors.set(self.errors.get() + 1);
        }
        for (i, v) in range.zip(versions) {
            let block = &mut self.blocks.borrow_mut()[i];
            block.failed = done.is_err();
            if done.is_ok() {
                block.acked = v;
                if fua {
                    block.durable = v;
                }
            }
        }
    }

    /// Reads a site: no false alarm, and each sector of each block is a version that is allowed.
    async fn check_site(&self, lun: &Lun, site: u64, floor: impl Fn(&Block) -> u64) {
        let bs = self.size.bytes();
        let buffer = Buffer::zeroed((SITE_BLOCKS * bs) as usize);
        match lun.read(ByteOffset(self.place(site)), &buffer.sg()).await {
            Ok(()) => (),
            Err(e) if !matches!(e.kind, IoErrorKind::Protection(_)) && self.errors.get() > 0 => return,
            Err(e) => panic!("false alarm or loss at site {site}: {e}"),
        }
        let bytes = buffer.to_vec();
        for i in 0..SITE_BLOCKS {
            let index = (site * SITE_BLOCKS + i) as usize;
            let block = self.blocks.borrow()[index].clone();
            let data = &bytes[(i * bs) as usize..((i + 1) * bs) as usize];
            for sector in data.chunks(512) {
                let floor = floor(&block);
                assert!(
                    block.allows(sector, floor, index as u64),
                    "block {index} at least version {floor}, begun {}, zeros {:?}, found {:x?}",
                    block.begun,
                    block.zeros,
                    &sector[..8]
                );
            }
        }
    }

    /// After reopening: all sites, and every block that is not zeros is protected.
    async fn check_all(&self, lun: &Lun, floor: impl Fn(&Block) -> u64 + Copy) {
        let before = lun.counters();
        let mut zeros = 0;
        for site in 0..TASKS * SITES {
            self.check_site(lun, site, floor).await;
            let buffer = Buffer::zeroed((SITE_BLOCKS * self.size.bytes()) as usize);
            if lun.volume().read(ByteOffset(self.place(site)), &buffer.sg()).await.is_ok() {
                let all = buffer.to_vec();
                zeros += all.chunks(self.size.bytes() as usize).filter(|b| b.iter().all(|b| *b == 0)).count();
            }
        }
        let unprotected = lun.counters().unprotected - before.unprotected;
        assert!(
            unprotected <= zeros as u64,
            "{unprotected} blocks without a tuple, {zeros} blocks are zeros"
        );
    }

    /// After a cut: what is found counts as what is there, from which the next session goes on.
    fn adopt(&self) {
        for block in self.blocks.borrow_mut().iter_mut() {
            // Any version from the durable one up may be there, torn ones too; a later flush promises no more than that.
            block.acked = block.durable;
            block.failed = true;
        }
    }
}

/// Opens, works and is stopped after some turns; tells whether it got as far as a clean close.
fn session(world: &World, model: &Model, seed: u64, turns: u64) -> bool {
    let exec = Executor::new();
    let closed = Rc::new(Cell::new(false));
    let (w, m, e, c) = (world.clone(), model.clone(), exec.clone(), closed.clone());
    exec.spawn(async move {
        let lun = Rc::new(w.open().await);
        let left = Rc::new(Cell::new(TASKS));
        for task in 0..TASKS {
            let (lun, m, left) = (lun.clone(), m.clone(), left.clone());
            e.spawn(async move {
                let mut rng = Rng::new(seed ^ task << 32);
                for _ in 0..12 + rng.below(30) {
                    m.step(&lun, &mut rng, task).await;
                }
                left.set(left.get() - 1);
            });
        }
        while left.get() > 0 {
            yield_now().await;
        }
        lun.close().await.unwrap();
        for block in m.blocks.borrow_mut().iter_mut() {
            block.durable = block.acked;
        }
        c.set(true);
    });
    for _ in 0..turns {
        if !exec.run_ready() {
            break;
        }
    }
    exec.clear();
    closed.get()
}

fn crashes(seed: u64, power: bool) {
    let mut rng = Rng::new(seed);
    let size = if rng.one_in(2) { BlockSize::B512 } else { BlockSize::B4096 };
    let kind = if rng.one_in(2) { PiType::Type1 } else { PiType::Type3 };
    let model = Model::new(size);
    let mut world = World::new(seed, kind, size, Model::capacity());
    for life in 0..3 {
        // Short lives end in the recheck, long ones in the close.
        let turns = if rng.one_in(4) { rng.below(60) } else { rng.below(700) };
        let closed = session(&world, &model, rng.next(), turns);
        if power {
            world = world.cut(&mut rng);
        }
        let (w, m) = (world.clone(), model.clone());
        block_on(async move {
            let lun = w.open().await;
            if closed {
                assert_eq!(
                    lun.counters().recomputed,
                    0,
                    "seed {seed} life {life}: a clean close needs no recheck"
                );
            }
            m.check_all(&lun, |b| if power || b.failed { b.durable } else { b.acked }).await;
            if power {
                m.adopt();
            }
            // Left without a close.
        });
    }
}

#[test]
fn a_power_cut_at_any_turn_raises_no_false_alarm_and_loses_nothing_flushed() {
    for seed in 0..scaled(700) {
        crashes(seed, true);
    }
}

#[test]
fn kill_9_at_any_turn_raises_no_false_alarm_and_loses_nothing_finished() {
    for seed in 0..scaled(200) {
        crashes(seed, false);
    }
}

/// One task, so that the same seed gives the same operations.
async fn workload(lun: &Lun, model: &Model, seed: u64) {
    let mut rng = Rng::new(seed);
    for _ in 0..60 {
        model.step(lun, &mut rng, 0).await;
    }
}

#[test]
fn any_one_operation_may_fail_once_without_a_false_alarm_then_or_later() {
    for seed in 0..scaled(2) {
        let size = if seed % 2 == 0 { BlockSize::B512 } else { BlockSize::B4096 };
        let fresh = || World::new(seed, PiType::Type1, size, Model::capacity());
        let dry = fresh();
        let (w, start) = (dry.clone(), (dry.image.ops(), dry.sidecar.ops()));
        block_on(async move {
            let lun = w.open().await;
            workload(&lun, &Model::new(size), seed).await;
            lun.close().await.unwrap();
        });
        let steps = (start.0..dry.image.ops()).map(|i| (true, i));
        for (of_image, op) in steps.chain((start.1..dry.sidecar.ops()).map(|i| (false, i))) {
            let world = fresh();
            let disk = if of_image { world.image.clone() } else { world.sidecar.clone() };
            disk.fail_at(op);
            let model = Model::new(size);
            let (w, m) = (world.clone(), model.clone());
            block_on(async move {
                let Ok(lun) = w.open_with(w.volume(), false).await else { return };
                // The one error may be a read's.
                m.errors.set(1);
                workload(&lun, &m, seed).await;
                m.check_all_no_loss(&lun).await;
                drop(lun.close().await);
            });
            for after in [world.clone(), world.cut(&mut Rng::new(op))] {
                let m = model.clone();
                block_on(async move {
                    let lun = after.open().await;
                    m.errors.set(0);
                    for site in 0..TASKS * SITES {
                        m.check_site(&lun, site, |b| b.durable).await;
                    }
                });
            }
        }
    }
}

impl Model {
    /// In the session that saw an error: what was acknowledged is there, unless something failed on top of it.
    async fn check_all_no_loss(&self, lun: &Lun) {
        for site in 0..TASKS * SITES {
            self.check_site(lun, site, |b| if b.failed { b.durable } else { b.acked }).await;
        }
    }
}
