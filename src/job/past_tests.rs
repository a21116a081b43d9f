//! What is read of the past against a naive reference: guests write, zero and discard at random, readers read and ask for the map at random, and
//! the disks fail, until the moment is lost, is not needed any more, or the job is ended. What is read is what the volume was when the
//! job began, always the same, or an error. With protection and without.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::{
    backup_tests::{Past, backup},
    bitmaps::BitmapMode,
    front::{Ending, Front, Outcome},
    mirror::{Mirror, Settings, SyncMode, Task, past::PastError},
    model_tests::{BLOCKS, Disk, GRANULE, GUESTS, Ground, SIZE, compare, ground, guest, open, stamped},
};
use crate::{
    pi::testing::{block_on, write},
    storage::sim::{OpKind, Rng, scaled},
    sys::{
        exec::{join, join_all, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::{ExtentKind, IoErrorKind, Volume},
};

const READERS: u64 = 3;

/// What a reader has seen: pieces of the copy, of the volume, and what could not be read.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    of_the_copy: u64,
    of_the_volume: u64,
    failed: u64,
    lost: u64,
}

/// The bytes of blocks as they were first read.
type First = Rc<RefCell<Vec<Option<Vec<u8>>>>>;

/// Reads at random until there is no more use for it.
async fn reader(
    seed: u64,
    mirror: Rc<Mirror<Disk>>,
    past: Rc<RefCell<Past>>,
    first: First,
    enough: Rc<Cell<bool>>,
) -> Seen {
    let (mut rng, mut seen) = (Rng::new(seed), Seen::default());
    while !enough.get() {
        for _ in 0..rng.below(8) {
            yield_now().await;
        }
        if past.borrow().is_empty() {
            continue;
        }
        let block = rng.below(BLOCKS as u64) as usize;
        let blocks = (1 + rng.below(64) as usize).min(BLOCKS - block);
        let (at, len) = (block as u64 * 512, blocks as u64 * 512);
        if rng.one_in(6) {
            match mirror.map_past(ByteOffset(at), len, 1 + rng.below(20) as usize).await {
                Ok(runs) => zeros_are_zeros(&runs, block, blocks, &past.borrow()),
                Err(PastError::Lost) => assert!(!mirror.keeps_its_moment()),
                Err(PastError::Io { .. }) => seen.failed += 1,
            }
            continue;
        }
        let was_lost = !mirror.keeps_its_moment();
        let was_copied = mirror.map().is_clean(at, len);
        let to = Buffer::zeroed(len as usize).sg();
        match mirror.read_past(ByteOffset(at), &to).await {
            Ok(()) => {
                assert!(!was_lost, "it came back");
                seen.of_the_copy += u64::from(was_copied);
                seen.of_the_volume += u64::from(!was_copied);
                for (n, found) in to.to_vec().chunks(512).enumerate() {
                    let known = &mut first.borrow_mut()[block + n];
                    let known = known.get_or_insert_with(|| found.to_vec());
                    assert!(known == found, "block {} is not what it was when it was read before", block + n);
                    let Some(may) = &past.borrow()[block + n] else { continue };
                    let is = may.iter().any(|number| stamped(*number, block + n) == found);
                    assert!(is, "block {} of the past is none of {may:?}", block + n);
                }
            }
            Err(PastError::Lost) => {
                assert!(!mirror.keeps_its_moment());
                seen.lost += 1;
            }
            Err(PastError::Io { .. }) => seen.failed += 1,
        }
    }
    seen
}

/// What a map says to read as zeros does.
fn zeros_are_zeros(runs: &[(u64, ExtentKind)], block: usize, blocks: usize, past: &Past) {
    let mut at = block;
    for (len, kind) in runs {
        let n = (len / 512) as usize;
        assert!(n > 0 && at + n <= block + blocks, "{runs:?} of {blocks} blocks");
        for (block, may) in past.iter().enumerate().skip(at).take(n) {
            let Some(may) = may else { continue };
            assert!(
                *kind == ExtentKind::Data || may.contains(&0),
                "block {block} is {kind:?}, and was {may:?}"
            );
        }
        at += n;
    }
    assert!(!runs.is_empty());
}

async fn trouble(mut rng: Rng, ground: Ground, mirror: Rc<Mirror<Disk>>, over: Rc<Cell<bool>>, kind: u64) {
    for _ in 0..4 + rng.below(30) {
        for _ in 0..rng.below(400) {
            yield_now().await;
        }
        if over.get() {
            return;
        }
        let fails = match kind {
            // What is read fails; what is copied before a change, too, if it is the volume that does.
            1 => Some((&ground.target.image, OpKind::Read)),
            2 if rng.one_in(4) => Some((&ground.source.image, OpKind::Read)),
            3 if rng.one_in(4) => Some((&ground.target.image, OpKind::Write)),
            _ => None,
        };
        if let Some((image, what)) = fails {
            image.fail_all(Some((what, if rng.one_in(2) { libc::ENOSPC } else { libc::EIO })));
            for _ in 0..rng.below(60) {
                yield_now().await;
            }
            image.fail_all(None);
        }
        match rng.below(8) {
            0 => mirror.pause(true),
            1 => mirror.pause(false),
            _ => {}
        }
    }
    if rng.one_in(2) { mirror.cancel(rng.one_in(2)) } else { drop(mirror.complete()) }
}

async fn life(seed: u64, ground: Ground) -> (Outcome, Seen) {
    let (source, target) = (open(&ground.source, ground.pi).await, open(&ground.target, ground.pi).await);
    let (front, target) = (Rc::new(Front::new(source)), Rc::new(target));
    front.bitmaps().add("b", SIZE, 4096, false, true).unwrap();
    let mirror = backup(&front, &target, ground.settings, &Rc::default());
    let (over, enough) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let past: Rc<RefCell<Past>> = Rc::default();
    let job = {
        let (front, mirror, ground, past) = (front.clone(), mirror.clone(), ground.clone(), past.clone());
        let (over, enough) = (over.clone(), enough.clone());
        async move {
            for _ in 0..Rng::new(seed).below(3000) {
                yield_now().await;
            }
            let at_once = async || {
                past.replace(ground.model.borrow().clone());
                front.bitmaps().lend("b").unwrap();
                (Some(mirror.clone()), ())
            };
            front.hold_back(at_once).await;
            let ended = front.drive(&mirror, async || panic!("it is not gone over to")).await;
            mirror.past_is_left().await;
            // From here on the copy may be removed.
            ground.target.image.poke(0, &vec![0xee; SIZE as usize]);
            over.set(true);
            let good = matches!(ended, Outcome::Ended(_));
            front.bitmaps().give_back("b", BitmapMode::OnSuccess, good, mirror.map().runs());
            for _ in 0..200 {
                yield_now().await;
            }
            enough.set(true);
            ended
        }
    };
    let calm = Rc::new(Cell::new(false));
    let guests = (0..GUESTS)
        .map(|n| guest(n, seed * 31 + n as u64, front.clone(), ground.clone(), enough.clone(), calm.clone()));
    let first: First = Rc::new(RefCell::new(vec![None; BLOCKS]));
    let readers = (0..READERS)
        .map(|n| reader(seed * 77 + n, mirror.clone(), past.clone(), first.clone(), enough.clone()));
    let troubles = trouble(Rng::new(!seed), ground.clone(), mirror.clone(), over, seed % 4);
    let ((ended, ()), (_, seen)) = join(join(job, troubles), join(join_all(guests), join_all(readers))).await;
    assert!(front.mirror().is_none());
    let same = front.volume();
    compare(&ground, &same, &same).await;
    let all = seen.into_iter().fold(Seen::default(), |a, b| Seen {
        of_the_copy: a.of_the_copy + b.of_the_copy,
        of_the_volume: a.of_the_volume + b.of_the_volume,
        failed: a.failed + b.failed,
        lost: a.lost + b.lost,
    });
    (ended, all)
}

#[test]
fn what_is_read_of_the_past_is_what_it_was_and_an_error_once_it_is_lost_whatever_guests_and_disks_do() {
    let (mut count, mut all) = ([0u32; 3], Seen::default());
    for seed in 0..scaled(160) {
        let mut rng = Rng::new(seed);
        let (mut ground, _) = ground(seed / 4, &mut rng);
        ground.settings = Settings { task: Task::Backup, sync: SyncMode::None, ..ground.settings };
        let (ended, seen) = block_on(life(seed, ground.clone()));
        match ended {
            Outcome::Ended(how) => {
                assert_eq!(how, Ending::Leave);
                count[0] += 1;
            }
            Outcome::Cancelled => count[1] += 1,
            Outcome::Failed(reason) => {
                assert!(seed % 4 > 1, "seed {seed}: {reason}");
                count[2] += 1;
            }
        }
        if seed % 4 != 2 {
            let failed = ground.model.borrow().iter().filter(|may| may.is_none()).count();
            assert_eq!(failed, 0, "seed {seed}: guests had errors because of the copy");
        }
        all.of_the_copy += seen.of_the_copy;
        all.of_the_volume += seen.of_the_volume;
        all.failed += seen.failed;
        all.lost += seen.lost;
    }
    eprintln!("done, cancelled, failed: {count:?}; {all:?}");
    assert!(all.of_the_copy > 0 && all.of_the_volume > 0 && all.lost > 0, "{all:?}");
    let met = if scaled(160) < 160 { &count[..2] } else { &count[..] };
    assert!(met.iter().all(|n| *n > 0) && all.failed > 0, "not everything was tried: {count:?}, {all:?}");
}

/// A volume of which every block has been written once, with a job that keeps what it was.
async fn still(pi: bool) -> (Ground, Rc<Front<Disk>>, Rc<Mirror<Disk>>) {
    let (ground, _) = ground(if pi { 2 } else { 1 }, &mut Rng::new(5));
    let front = Rc::new(Front::new(open(&ground.source, pi).await));
    for block in 0..BLOCKS as u64 {
        write(&*front, block * 512, &stamped(1, block as usize)).await.unwrap();
    }
    ground.target.image.poke(0, &vec![0; SIZE as usize]);
    let target = Rc::new(open(&ground.target, pi).await);
    let settings = Settings { task: Task::Backup, sync: SyncMode::None, ..Settings::default() };
    let mirror = backup(&front, &target, settings, &Rc::default());
    front.attach(mirror.clone()).await;
    (ground, front, mirror)
}

#[test]
fn a_write_waits_for_who_reads_its_granule_and_others_do_not() {
    for pi in [false, true] {
        block_on(async move {
            let (ground, front, mirror) = still(pi).await;
            // Whoever reads is slow.
            let (reading, written) = (Cell::new(true), RefCell::new(Vec::new()));
            let read = async {
                let _shared = mirror.share(2 * GRANULE, GRANULE).await;
                for _ in 0..2000 {
                    yield_now().await;
                }
                let now = ground.source.image.peek(2 * GRANULE + 512, 512);
                assert_eq!(
                    now,
                    stamped(1, (2 * GRANULE / 512) as usize + 1),
                    "it was changed under a reader"
                );
                reading.set(false);
            };
            let one = async {
                yield_now().await;
                write(&*front, 2 * GRANULE + 512, &stamped(2, 9)).await.unwrap();
                written.borrow_mut().push(reading.get());
            };
            let other = async {
                yield_now().await;
                write(&*front, 3 * GRANULE, &stamped(2, 9)).await.unwrap();
                written.borrow_mut().push(reading.get());
            };
            join(read, join(one, other)).await;
            assert_eq!(*written.borrow(), [true, false], "the other granule first, while this is read");
            let to = Buffer::zeroed(512).sg();
            mirror.read_past(ByteOffset(2 * GRANULE + 512), &to).await.unwrap();
            assert_eq!(to.to_vec(), stamped(1, (2 * GRANULE / 512) as usize + 1));
        });
    }
}

#[test]
fn what_cannot_be_copied_is_lost_at_once_and_what_was_read_meanwhile_is_an_error() {
    block_on(async {
        let (ground, front, mirror) = still(true).await;
        write(&*front, 0, &stamped(2, 0)).await.unwrap();
        let to = Buffer::zeroed(512).sg();
        mirror.read_past(ByteOffset(0), &to).await.unwrap();
        assert_eq!(to.to_vec(), stamped(1, 0));
        ground.target.image.fail_all(Some((OpKind::Write, libc::ENOSPC)));
        write(&*front, GRANULE, &stamped(2, 0)).await.unwrap();
        ground.target.image.fail_all(None);
        // Also what was copied, and what is as it was: nobody has to know which is which.
        for at in [0, GRANULE, 2 * GRANULE] {
            assert!(matches!(mirror.read_past(ByteOffset(at), &to).await, Err(PastError::Lost)), "{at}");
            assert!(matches!(mirror.map_past(ByteOffset(at), 512, 1).await, Err(PastError::Lost)), "{at}");
        }
    });
}

#[test]
fn what_is_read_of_the_past_is_verified_on_either_side() {
    block_on(async {
        let (ground, front, mirror) = still(true).await;
        write(&*front, 0, &stamped(2, 0)).await.unwrap();
        let flip = |image: &crate::storage::sim::SimDisk, at: u64| image.poke(at, &[!image.peek(at, 1)[0]]);
        flip(&ground.target.image, 512);
        flip(&ground.source.image, 5 * GRANULE);
        let to = Buffer::zeroed(512).sg();
        for (at, of_volume) in [(512, false), (5 * GRANULE, true)] {
            let Err(PastError::Io { source, error }) = mirror.read_past(ByteOffset(at), &to).await else {
                panic!("it was read")
            };
            assert_eq!(source, of_volume);
            assert!(matches!(error.kind, IoErrorKind::Protection(m) if m.lba.0 == at / 512), "{error}");
        }
        mirror.read_past(ByteOffset(1024), &to).await.unwrap();
        assert_eq!(to.to_vec(), stamped(1, 2));
        front.flush().await.unwrap();
    });
}

#[test]
fn a_job_that_is_not_for_that_keeps_nothing_that_could_be_read() {
    block_on(async {
        let (_, _, mirror) = still(false).await;
        assert!(mirror.keeps_its_moment());
        mirror.complete().unwrap();
        assert!(!mirror.keeps_its_moment(), "writes are about to go on without it");
        let (ground, front, _) = still(false).await;
        for sync in [SyncMode::Full, SyncMode::Top] {
            let settings = Settings { task: Task::Backup, sync, ..Settings::default() };
            let target = Rc::new(open(&ground.target, false).await);
            assert!(!backup(&front, &target, settings, &Rc::default()).keeps_its_moment(), "{sync:?}");
        }
    });
}
