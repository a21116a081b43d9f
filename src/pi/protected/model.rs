//! What the crash tests compare with: random operations on some blocks, each version of which names itself, and what may be
//! found in a block after a crash.

use std::{cell::Cell, rc::Rc};

use super::*;
use crate::{
    storage::sim::{Rng, SimDisk},
    sys::mem::Buffer,
};

/// Blocks that one task works on, in several regions.
pub(super) const SITES: u64 = 6;
pub(super) const SITE_BLOCKS: u64 = 4;
pub(super) const TASKS: u64 = 3;

/// What may be found in one block. Versions grow with each write of the block; the content names its version.
#[derive(Clone, Default)]
pub(super) struct Block {
    pub begun: u64,
    pub acked: u64,
    pub durable: u64,
    /// The versions that are zeros.
    zeros: Vec<u64>,
    /// The last write ended in an error or a crash: the content is any version since the durable one.
    pub failed: bool,
}

impl Block {
    /// Whether the whole block is of one version.
    fn is_whole(&self, data: &[u8], floor: u64, name: u64) -> bool {
        let mut sectors = data.chunks(512);
        let zeros = floor == 0 || self.zeros.iter().any(|z| *z >= floor);
        if zeros && data.iter().all(|b| *b == 0) {
            return true;
        }
        // The first sector names the version.
        let Some(first) = sectors.next() else { return true };
        let one =
            (floor.max(1)..=self.begun).any(|v| !self.zeros.contains(&v) && first == &pattern(name, v)[..]);
        one && sectors.all(|s| s == first)
    }

    /// Whether the block has the guard of a version that it is not.
    fn collides(&self, data: &[u8], name: u64) -> bool {
        let guard = |data: &[u8]| crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF).checksum(data);
        let found = guard(data);
        let of = |v: u64| guard(&pattern(name, v).repeat(data.len() / 512));
        found == 0 || (1..=self.begun).any(|v| found == of(v))
    }

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

/// Where the model's blocks lie.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Bytes of a region of the intent map.
    pub region: u64,
    /// Bytes from one site to the next in a region.
    pub apart: u64,
}

/// The usual layout.
pub(super) const WIDE: Place = Place { region: 64 << 20, apart: 300 * 4096 };
/// All in 512 KiB, so that a disk is copied quickly.
pub(super) const NARROW: Place = Place { region: 128 << 10, apart: SITE_BLOCKS * 4096 };

#[derive(Clone)]
pub(super) struct Model {
    pub blocks: Rc<RefCell<Vec<Block>>>,
    pub place: Place,
    pub mode: PiMode,
    size: BlockSize,
    /// Something was answered with an error.
    pub errors: Rc<Cell<u64>>,
}

pub(super) type Lun = Protected<crate::pi::testing::SimVolume, SimDisk>;

impl Model {
    pub fn new(size: BlockSize, mode: PiMode, place: Place) -> Model {
        let blocks = vec![Block::default(); (TASKS * SITES * SITE_BLOCKS) as usize];
        Model { blocks: Rc::new(RefCell::new(blocks)), place, mode, size, errors: Rc::default() }
    }

    /// A model of its own that begins where this one is.
    pub fn fork(&self) -> Model {
        let blocks = Rc::new(RefCell::new(self.blocks.borrow().clone()));
        Model { blocks, errors: Rc::default(), ..self.clone() }
    }

    pub fn capacity(&self) -> u64 {
        4 * self.place.region
    }

    /// Where the blocks of a site lie: in four regions, and across no two of them.
    fn place(&self, site: u64) -> u64 {
        site % 4 * self.place.region + site / 4 * self.place.apart
    }

    /// One random operation of a task, on its own sites.
    pub async fn step(&self, lun: &Lun, rng: &mut Rng, task: u64) {
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
            self.check_site(lun, site, |b| if b.failed { b.durable } else { b.acked }).await;
            return;
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
                lun.write(at, &Buffer::from_slice(&bytes).sg(), WriteFlags { fua, ..WriteFlags::default() })
                    .await
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

    /// Reads a site: no false alarm, and each sector of each block is a version that is allowed. In mode "journal" every block is of
    /// one version, or it is torn and an error. Gives the blocks that are errors.
    pub async fn check_site(&self, lun: &Lun, site: u64, floor: impl Fn(&Block) -> u64) -> u64 {
        let bs = self.size.bytes();
        let buffer = Buffer::zeroed((SITE_BLOCKS * bs) as usize);
        let at = self.place(site);
        let mut torn = 0;
        let mut reported = [false; SITE_BLOCKS as usize];
        match lun.read(ByteOffset(at), &buffer.sg()).await {
            Ok(()) => (),
            Err(e) if !matches!(e.kind, IoErrorKind::Protection(_)) && self.errors.get() > 0 => return 0,
            Err(e) if self.mode == PiMode::Journal && matches!(e.kind, IoErrorKind::Protection(_)) => {
                for (i, reported) in (0..).zip(&mut reported) {
                    let block = buffer.sg().slice((i * bs) as usize, bs as usize);
                    *reported = lun.read(ByteOffset(at + i * bs), &block).await.is_err();
                }
            }
            Err(e) => panic!("false alarm or loss at site {site}: {e}"),
        }
        let bytes = buffer.to_vec();
        for i in 0..SITE_BLOCKS {
            let index = site * SITE_BLOCKS + i;
            let block = self.blocks.borrow()[index as usize].clone();
            let data = &bytes[(i * bs) as usize..((i + 1) * bs) as usize];
            let floor = floor(&block);
            let facts = || {
                let sectors: Vec<&[u8]> = data.chunks(512).map(|s| &s[..8]).collect();
                format!(
                    "block {index} at least version {floor}, begun {}, zeros {:?}, found {sectors:x?}",
                    block.begun, block.zeros
                )
            };
            for sector in data.chunks(512) {
                assert!(block.allows(sector, floor, index), "{}", facts());
            }
            if self.mode == PiMode::Bitmap {
                continue;
            }
            let whole = block.is_whole(data, floor, index);
            if reported[i as usize] {
                assert!(!whole, "false alarm: {}", facts());
                torn += 1;
            } else if !whole {
                // A guard of 16 bits cannot tell all torn blocks.
                assert!(block.collides(data, index), "a torn block was not reported: {}", facts());
            }
        }
        torn
    }

    /// After reopening: all sites, and every block that is not zeros is protected. Gives the blocks that are errors.
    pub async fn check_all(&self, lun: &Lun, floor: impl Fn(&Block) -> u64 + Copy) -> u64 {
        let bs = self.size.bytes() as usize;
        let mut all_torn = 0;
        for site in 0..TASKS * SITES {
            let before = lun.counters().unprotected;
            let torn = self.check_site(lun, site, floor).await;
            let unprotected = (lun.counters().unprotected - before) as usize;
            all_torn += torn;
            if torn > 0 {
                // Its blocks were read one by one as well.
                continue;
            }
            let data = lun.volume().disk.peek(self.place(site), SITE_BLOCKS as usize * bs);
            let zeros = data.chunks(bs).filter(|block| block.iter().all(|b| *b == 0)).count();
            assert!(
                unprotected <= zeros,
                "site {site}: {unprotected} blocks without a tuple, {zeros} blocks are zeros"
            );
        }
        all_torn
    }

    /// After a cut: what is found counts as what is there, from which the next session goes on.
    pub fn adopt(&self) {
        for block in self.blocks.borrow_mut().iter_mut() {
            // Any version from the durable one up may be there, torn ones too; a later flush promises no more than that.
            block.acked = block.durable;
            block.failed = true;
        }
    }

    /// In the session that saw an error: what was acknowledged is there, unless something failed on top of it.
    pub async fn check_all_no_loss(&self, lun: &Lun) {
        for site in 0..TASKS * SITES {
            self.check_site(lun, site, |b| if b.failed { b.durable } else { b.acked }).await;
        }
    }
}
