//! Atomic writes to a protected qcow2 image: after a cut of image and sidecar at any moment each is there as a whole or not at all, and
//! every block of it matches its tuple, in both modes.

use std::{
    cell::{Cell, RefCell},
    io,
    ops::Range,
    path::PathBuf,
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::{Qcow2, Storage as _},
    pi::{
        Exposure, PiMode, PiType, Protected, Protection, Recheck,
        store::{ImageFormat, NewSidecar, Sidecar, Stamp},
    },
    storage::Storage,
    sys::{
        exec::{join, yield_now},
        io::Fallocate,
        mem::{Buffer, Sg},
    },
    units::{BlockSize, Blocks, ByteOffset},
    volume::{Volume, WriteFlags},
};

use crate::{
    crash::{Kind, disks, kinds, open},
    sim::{self, Cut, SECTOR, SimDisk},
    support::{Rng, scale},
};

/// A sidecar on a disk of the images' kind.
struct Side(Rc<SimDisk>);

impl Storage for Side {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.0.read(at, to).await
    }

    async fn write(&self, at: u64, from: &Sg, dsync: bool) -> io::Result<()> {
        self.0.write(at, from).await?;
        if dsync { self.0.sync().await } else { Ok(()) }
    }

    async fn sync(&self) -> io::Result<()> {
        self.0.sync().await
    }

    async fn fallocate(&self, what: Fallocate, at: u64, len: u64) -> io::Result<()> {
        match what {
            Fallocate::Allocate if at + len > self.0.size()? => self.0.set_size(at + len).await,
            Fallocate::Allocate => Ok(()),
            _ => self.0.punch(at, len).await,
        }
    }

    async fn len(&self) -> io::Result<u64> {
        self.0.size()
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_size(len).await
    }

    async fn next_data(&self, at: u64) -> io::Result<Option<Range<u64>>> {
        let end = self.0.size()?;
        Ok((at < end).then_some(at..end))
    }
}

type Lun = Protected<Qcow2<Rc<SimDisk>>, Side>;

async fn attach(kind: &Kind, image: &Rc<SimDisk>, side: &Rc<SimDisk>, exposure: Exposure) -> Lun {
    let stamp = Stamp { size: kind.size, mtime: (1, 2) };
    let how = Protection {
        image: PathBuf::from("/vm1"),
        sidecar: PathBuf::from("/vm1.pi"),
        kind: PiType::Type1,
        mode: None,
        exposure,
        block_size: BlockSize::B512,
        read_only: false,
        found: stamp,
        recheck: Recheck::First,
    };
    let volume = open(image, kind.under.as_deref()).await.unwrap();
    Protected::attach(volume, Side(side.clone()), &how, Box::new(move || Ok(stamp))).await.unwrap()
}

async fn sidecar(kind: &Kind, mode: PiMode, seed: u64) -> Rc<SimDisk> {
    let disk = SimDisk::new(&[], seed, 3);
    let new = NewSidecar {
        block_size: BlockSize::B512,
        kind: PiType::Type1,
        mode,
        capacity: Blocks(kind.size / 512),
        format: ImageFormat::Qcow2,
        stamp: Stamp { size: kind.size, mtime: (1, 2) },
    };
    Sidecar::create(Side(disk.clone()), new).await.unwrap();
    Storage::sync(&Side(disk.clone())).await.unwrap();
    disk
}

async fn write(lun: &Lun, at: u64, bytes: &[u8], atomic: bool) {
    let flags = WriteFlags { atomic, ..WriteFlags::default() };
    lun.write(ByteOffset(at), &Buffer::from_slice(bytes).sg(), flags).await.unwrap();
}

async fn read(lun: &Lun, at: u64, len: u64) -> Vec<u8> {
    let to = Buffer::zeroed(len as usize).sg();
    lun.read(ByteOffset(at), &to).await.unwrap();
    to.to_vec()
}

/// Gives how many cuts were judged.
async fn session(kind: Rc<Kind>, mode: PiMode, seed: u64) -> u64 {
    let image = disks(&kind, seed, 4).0;
    let side = sidecar(&kind, mode, seed + 1).await;
    let lun = attach(&kind, &image, &side, Exposure::Target).await;
    let limits = lun.limits();
    assert_eq!((limits.atomic_write, limits.atomic_unit), (1 << 20, 512), "{}", kind.name);
    // What was there before it was protected has no tuples; all of it has some from here on.
    let whole = vec![0x3c; kind.size as usize];
    write(&lun, 0, &whole, false).await;
    let rng = RefCell::new(Rng::new(seed));
    let below = |n| rng.borrow_mut().below(n);
    let (cuts, blocks) = (Cell::new(0), kind.size / SECTOR);
    for round in 0..3 * scale() {
        let count = 1 + below(blocks / 3);
        let at = below(blocks - count + 1) * SECTOR;
        let len = count * SECTOR;
        lun.flush().await.unwrap();
        let (old, new) = (read(&lun, at, len).await, vec![round as u8 + 1; len as usize]);
        let busy = Cell::new(true);
        let written = async {
            write(&lun, at, &new, true).await;
            busy.set(false);
        };
        let beside = async {
            while busy.get() {
                let page = below(kind.size / 4096) * 4096;
                if page + 4096 <= at / 4096 * 4096 || page >= (at + len).next_multiple_of(4096) {
                    write(&lun, page, &[0x77; 4096], below(4) == 0).await;
                }
                yield_now().await;
            }
        };
        let cutter = async {
            let (mut seen, mut last) = ((u64::MAX, u64::MAX), false);
            while !last {
                last = !busy.get();
                let now = (image.changes(), side.changes());
                if now != seen || last {
                    seen = now;
                    let how = [Cut::Any, Cut::Any, Cut::Process, Cut::Oldest, Cut::Prefix][below(5) as usize];
                    let left = {
                        let mut rng = rng.borrow_mut();
                        (image.cut(how, &mut rng), side.cut(how, &mut rng))
                    };
                    let disks = (SimDisk::new(&left.0, 1, 0), SimDisk::new(&left.1, 1, 0));
                    let after = attach(&kind, &disks.0, &disks.1, Exposure::Target).await;
                    let got = read(&after, at, len).await;
                    let name = &kind.name;
                    assert!(
                        got == old || got == new,
                        "{name}, {mode}, {how:?}: {len} bytes at {at} are torn"
                    );
                    assert_eq!(after.counters().torn, 0, "{name}, {mode}, {how:?}");
                    cuts.set(cuts.get() + 1);
                }
                yield_now().await;
            }
        };
        join(join(written, beside), cutter).await;
        assert_eq!(read(&lun, at, len).await, new);
    }
    cuts.get()
}

#[test]
fn no_cut_tears_an_atomic_write_or_parts_it_from_its_tuples() {
    let mut cuts = 0;
    let names = ["64k", "4k", "4k, snapshot", "16k, compressed", "subclusters"];
    for kind in kinds().into_iter().filter(|kind| names.contains(&&*kind.name)) {
        for mode in [PiMode::Bitmap, PiMode::Journal] {
            cuts += sim::run(session(kind.clone(), mode, 7));
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 200);
}

#[test]
fn where_initiators_have_tags_no_more_is_promised_than_holds_for_them() {
    for (mode, promised) in [(PiMode::Bitmap, (0, 0)), (PiMode::Journal, (512, 512))] {
        let kind = kinds().swap_remove(0);
        sim::run(async move {
            let side = sidecar(&kind, mode, 1).await;
            let lun = attach(&kind, &disks(&kind, 1, 0).0, &side, Exposure::Initiator).await;
            assert_eq!((lun.limits().atomic_write, lun.limits().atomic_unit), promised, "{mode}");
        });
    }
}
