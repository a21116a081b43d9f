//! The backup against a naive reference: guests that write, zero and discard at random before it begins and while it is paused, cancelled, fails
//! and is killed, over disks that fail. Its target has to be what the volume was when it began. With protection and without.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::Poll,
};

use super::{
    OnError, Side,
    bitmaps::BitmapMode,
    dirty::DirtyMap,
    front::{Ending, Front, Outcome},
    mirror::{Hooks, Mirror, Settings, SyncMode, Task, Told},
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
    volume::{IoErrorKind, Volume, WriteFlags},
};

/// What each block may have been at a moment; anything where a write had failed.
pub(super) type Past = Vec<Option<Vec<u64>>>;

pub(super) fn hooks(told: &Rc<RefCell<Vec<String>>>) -> Hooks {
    let told = told.clone();
    Hooks {
        tell: Box::new(move |t| {
            if let Told::Error { .. } = t {
                told.borrow_mut().push(format!("{t:?}"));
            }
        }),
        sleep: Box::new(|_| {
            Box::pin(async {
                for _ in 0..5 {
                    yield_now().await;
                }
            })
        }),
    }
}

pub(super) fn backup(
    front: &Front<Disk>,
    target: &Rc<Disk>,
    settings: Settings,
    told: &Rc<RefCell<Vec<String>>>,
) -> Rc<Mirror<Disk>> {
    let map = DirtyMap::new(SIZE, GRANULE, super::dirty::Kept::memory(SIZE, GRANULE));
    map.set(0, SIZE);
    Rc::new(Mirror::new("b".into(), (front.volume(), target.clone()), map, settings, 0, hooks(told)))
}

/// The target is the volume of that moment, verified.
async fn is_of(past: &Past, target: &Disk) {
    for (block, may) in past.iter().enumerate() {
        let found = Buffer::zeroed(512).sg();
        target.read_whole(ByteOffset(block as u64 * 512), &found).await.unwrap();
        let Some(may) = may else { continue };
        let known = may.iter().any(|number| stamped(*number, block) == found.to_vec());
        assert!(known, "block {block} of the backup is none of {may:?}");
    }
}

/// Troubles at random, of the disks that may have some, until the job is over or somebody kills the LUN.
async fn trouble(
    mut rng: Rng,
    ground: Ground,
    mirror: Rc<Mirror<Disk>>,
    over: Rc<Cell<bool>>,
    kill: Rc<Cell<bool>>,
    source_fails: bool,
) {
    let mut patience = 30u64;
    while !over.get() {
        for _ in 0..rng.below(200) {
            yield_now().await;
        }
        if over.get() {
            return;
        }
        patience = patience.saturating_sub(1);
        match rng.below(if patience == 0 { 1 } else { 12 }) {
            0 => mirror.pause(false),
            1 | 2 => mirror.pause(true),
            3 if rng.one_in(8) => kill.set(true),
            4 if rng.one_in(8) => mirror.cancel(rng.one_in(2)),
            5 | 6 if rng.one_in(3) => {
                let what = [OpKind::Write, OpKind::Read, OpKind::Space][rng.below(3) as usize];
                let errno = if rng.one_in(3) { libc::ENOSPC } else { libc::EIO };
                let of_source = source_fails && rng.one_in(2);
                let image = if of_source { &ground.source.image } else { &ground.target.image };
                image.fail_all(Some((what, errno)));
                for _ in 0..rng.below(60) {
                    yield_now().await;
                }
                image.fail_all(None);
            }
            7 => mirror.set_speed(rng.below(2) * (64 << 20)),
            _ => {}
        }
    }
}

/// Guests write for a while, a backup begins, and ends or is killed. `None` if it was.
async fn life(seed: u64, ground: Ground, fresh: bool, source_fails: bool) -> Option<Outcome> {
    let (source, target) = (open(&ground.source, ground.pi).await, open(&ground.target, ground.pi).await);
    let (front, target) = (Rc::new(Front::new(source)), Rc::new(target));
    let told = Rc::default();
    let mirror = backup(&front, &target, ground.settings, &told);
    let (over, kill, enough) =
        (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let past: Rc<RefCell<Past>> = Rc::default();
    let outcome: Rc<RefCell<Option<Outcome>>> = Rc::default();
    let job = {
        let (front, mirror, ground, past) = (front.clone(), mirror.clone(), ground.clone(), past.clone());
        let (over, enough, outcome) = (over.clone(), enough.clone(), outcome.clone());
        async move {
            for _ in 0..Rng::new(seed).below(3000) {
                yield_now().await;
            }
            // What is under way may be in it or not.
            if seed.is_multiple_of(2) {
                past.replace(ground.model.borrow().clone());
                front.attach(mirror.clone()).await;
            } else {
                // As in a transaction, whose other LUNs are waited for.
                let at_once = async || {
                    past.replace(ground.model.borrow().clone());
                    for _ in 0..Rng::new(seed).below(300) {
                        yield_now().await;
                        assert_eq!(front.busy(), 0, "a command runs");
                    }
                    (Some(mirror.clone()), ())
                };
                front.hold_back(at_once).await;
            }
            mirror.scan(fresh).await;
            let ended = front.drive(&mirror, async || panic!("a backup is not gone over to")).await;
            over.set(true);
            for _ in 0..200 {
                yield_now().await;
            }
            enough.set(true);
            outcome.replace(Some(ended));
        }
    };
    let calm = Rc::new(Cell::new(false));
    let guests = (0..GUESTS)
        .map(|n| guest(n, seed * 31 + n as u64, front.clone(), ground.clone(), enough.clone(), calm.clone()));
    let troubles = trouble(Rng::new(!seed), ground.clone(), mirror.clone(), over, kill.clone(), source_fails);
    let mut all = Box::pin(join(join(job, troubles), join_all(guests)));
    let killed = poll_fn(|cx| match all.as_mut().poll(cx) {
        Poll::Ready(_) => Poll::Ready(false),
        Poll::Pending if kill.get() => Poll::Ready(true),
        Poll::Pending => Poll::Pending,
    })
    .await;
    drop(all);
    if killed {
        return None;
    }
    assert!(front.mirror().is_none(), "it is attached still");
    let same = front.volume();
    compare(&ground, &same, &same).await;
    let outcome = outcome.take().unwrap();
    if outcome == Outcome::Ended(Ending::Leave) {
        let past = past.take();
        is_of(&past, &target).await;
    }
    Some(outcome)
}

#[test]
fn who_holds_commands_back_while_others_do_waits_for_them() {
    let (ground, _) = ground(1, &mut Rng::new(1));
    block_on(async move {
        let front = Front::new(open(&ground.source, ground.pi).await);
        let inside = Cell::new(false);
        let one = async || {
            let at_once = async || {
                for _ in 0..10 {
                    assert!(!inside.replace(true), "two at a time");
                    yield_now().await;
                    assert!(inside.replace(false) && front.is_closed());
                }
                (None, ())
            };
            front.hold_back(at_once).await;
        };
        join_all([one(), one(), one()]).await;
        assert!(!front.is_closed());
    });
}

#[test]
fn whatever_guests_errors_orders_and_kills_do_the_target_is_the_source_as_it_was_when_the_backup_began() {
    let mut count = [0u32; 4];
    for seed in 0..scaled(200) {
        let mut rng = Rng::new(seed);
        let (mut ground, fresh) = ground(seed, &mut rng);
        ground.settings = Settings { task: Task::Backup, ..ground.settings };
        let source_fails = seed.is_multiple_of(3);
        let ended = block_on(life(seed, ground.clone(), fresh, source_fails));
        ground.source.image.fail_all(None);
        ground.target.image.fail_all(None);
        match ended {
            None => {
                count[0] += 1;
                // What was acknowledged is there.
                let ground = ground.clone();
                block_on(async move {
                    let source = open(&ground.source, ground.pi).await;
                    compare(&ground, &source, &source).await;
                });
            }
            Some(Outcome::Ended(how)) => {
                assert_eq!(how, Ending::Leave);
                count[1] += 1;
            }
            Some(Outcome::Cancelled) => count[2] += 1,
            Some(Outcome::Failed(_)) => count[3] += 1,
        }
        if !source_fails {
            let failed = ground.model.borrow().iter().filter(|may| may.is_none()).count();
            assert_eq!(failed, 0, "seed {seed}: guests had errors because of the target");
        }
    }
    eprintln!("killed, done, cancelled, failed: {count:?}");
    let met = if scaled(200) < 200 { &count[1..2] } else { &count[..] };
    assert!(met.iter().all(|n| *n > 0), "not everything was tried: {count:?}");
}

/// Backups one after the other to one target, the first of all and the others of what a bitmap has, while guests go on.
async fn rounds(seed: u64, ground: Ground, fresh: bool) -> [u32; 2] {
    let (source, target) = (open(&ground.source, ground.pi).await, open(&ground.target, ground.pi).await);
    let (front, target) = (Rc::new(Front::new(source)), Rc::new(target));
    front.bitmaps().add("b", SIZE, 4096 << (seed % 4), false, true).unwrap();
    let enough = Rc::new(Cell::new(false));
    let backups = {
        let (front, ground, enough) = (front.clone(), ground.clone(), enough.clone());
        async move {
            let mut rng = Rng::new(seed * 7 + 3);
            let (mut whole, mut ended) = (false, [0, 0]);
            for round in 0..8 {
                for _ in 0..rng.below(1500) {
                    yield_now().await;
                }
                let sync = if whole { SyncMode::Bitmap } else { SyncMode::Full };
                let mode = match rng.below(if whole { 3 } else { 2 }) {
                    0 => BitmapMode::OnSuccess,
                    1 => BitmapMode::Always,
                    _ => BitmapMode::Never,
                };
                let past = ground.model.borrow().clone();
                let bits = front.bitmaps().lend("b").unwrap();
                let map = DirtyMap::new(SIZE, GRANULE, super::dirty::Kept::memory(SIZE, GRANULE));
                match whole {
                    true => bits.runs().for_each(|run| map.set(run.start, run.end - run.start)),
                    false => map.set(0, SIZE),
                }
                let settings = Settings { sync, ..ground.settings };
                let (sides, told) = ((front.volume(), target.clone()), Rc::default());
                let mirror = Rc::new(Mirror::new("b".into(), sides, map, settings, 0, hooks(&told)));
                let over = Rc::new(Cell::new(false));
                let job = async {
                    front.attach(mirror.clone()).await;
                    mirror.scan(fresh && round == 0).await;
                    let outcome = front.drive(&mirror, async || Ok(())).await;
                    over.set(true);
                    outcome
                };
                let (never, rng) = (Rc::new(Cell::new(false)), Rng::new(seed * 100 + round));
                let troubles =
                    trouble(rng, ground.clone(), mirror.clone(), over.clone(), never, seed.is_multiple_of(3));
                let (outcome, ()) = join(job, troubles).await;
                ground.source.image.fail_all(None);
                ground.target.image.fail_all(None);
                let good = outcome == Outcome::Ended(Ending::Leave);
                front.bitmaps().give_back("b", mode, good, mirror.map().runs());
                if good {
                    is_of(&past, &target).await;
                }
                // What was copied before it failed counts.
                whole |= good || mode == BitmapMode::Always;
                ended[usize::from(good)] += 1;
            }
            enough.set(true);
            ended
        }
    };
    let calm = Rc::new(Cell::new(true));
    let guests = (0..GUESTS)
        .map(|n| guest(n, seed * 31 + n as u64, front.clone(), ground.clone(), enough.clone(), calm.clone()));
    join(backups, join_all(guests)).await.0
}

#[test]
fn backups_of_what_a_bitmap_has_never_miss_a_change_whatever_became_of_those_before() {
    let mut count = [0u32; 2];
    for seed in 0..scaled(60) {
        let mut rng = Rng::new(seed);
        let (mut ground, fresh) = ground(seed, &mut rng);
        ground.settings = Settings { task: Task::Backup, ..ground.settings };
        let ended = block_on(rounds(seed, ground, fresh));
        count = [count[0] + ended[0], count[1] + ended[1]];
    }
    eprintln!("failed or cancelled, done: {count:?}");
    let met = if scaled(60) < 60 { &count[1..] } else { &count[..] };
    assert!(met.iter().all(|n| *n > 0), "not everything was tried: {count:?}");
}

/// A volume of which every block has been written once, with a backup attached that has not begun to copy.
async fn still(
    pi: bool,
    settings: Settings,
) -> (Ground, Rc<Front<Disk>>, Rc<Disk>, Rc<Mirror<Disk>>, Rc<RefCell<Vec<String>>>) {
    let mut rng = Rng::new(5);
    let (ground, _) = ground(if pi { 2 } else { 1 }, &mut rng);
    let front = Rc::new(Front::new(open(&ground.source, pi).await));
    for block in 0..BLOCKS as u64 {
        write(&*front, block * 512, &stamped(1, block as usize)).await.unwrap();
    }
    ground.target.image.poke(0, &vec![0; SIZE as usize]);
    let target = Rc::new(open(&ground.target, pi).await);
    let told = Rc::default();
    let settings = Settings { task: Task::Backup, ..settings };
    let mirror = backup(&front, &target, settings, &told);
    front.attach(mirror.clone()).await;
    (ground, front, target, mirror, told)
}

#[test]
fn a_write_waits_for_the_copy_of_what_it_changes_and_of_nothing_else() {
    for pi in [false, true] {
        block_on(async move {
            let (ground, front, target, mirror, _) =
                still(pi, Settings { sync: SyncMode::None, ..Settings::default() }).await;
            write(&*front, 33 * 512, &stamped(2, 33)).await.unwrap();
            front.discard(ByteOffset(4 * GRANULE), GRANULE).await.unwrap();
            front.write_zeroes(ByteOffset(6 * GRANULE + 512), 512, true).await.unwrap();
            for granule in 0..SIZE / GRANULE {
                let first = (granule * GRANULE / 512) as usize;
                let old: Vec<u8> =
                    (first..first + (GRANULE / 512) as usize).flat_map(|b| stamped(1, b)).collect();
                let copied = [2, 4, 6].contains(&granule);
                let expected = if copied { old } else { vec![0; GRANULE as usize] };
                let found = ground.target.image.peek(granule * GRANULE, GRANULE as usize);
                assert!(found == expected, "granule {granule}");
            }
            // It goes on for ever, and what was copied once is not copied again.
            write(&*front, 33 * 512, &stamped(3, 33)).await.unwrap();
            let mut drive = Box::pin(front.drive(&mirror, async || Ok(())));
            for _ in 0..1000 {
                assert!(poll_fn(|cx| Poll::Ready(drive.as_mut().poll(cx).is_pending())).await);
                yield_now().await;
            }
            mirror.cancel(false);
            assert_eq!(drive.await, Outcome::Cancelled);
            assert_eq!(ground.target.image.peek(33 * 512, 512), stamped(1, 33));
            let _: &Disk = &target;
        });
    }
}

#[test]
fn a_copy_before_a_write_that_fails_ends_the_job_whatever_it_was_told_and_the_write_goes_on() {
    for on_error in [OnError::Report, OnError::Stop, OnError::Ignore, OnError::Enospc] {
        block_on(async move {
            let settings =
                Settings { on_source_error: on_error, on_target_error: on_error, ..Settings::default() };
            let (ground, front, _, mirror, told) = still(true, settings).await;
            ground.target.image.fail_all(Some((OpKind::Write, libc::ENOSPC)));
            write(&*front, 512, &stamped(2, 1)).await.unwrap();
            ground.target.image.fail_all(None);
            assert!(
                told.borrow()[0].contains("source: false") && told.borrow()[0].contains("Report"),
                "{told:?}"
            );
            let Outcome::Failed(reason) = front.drive(&mirror, async || Ok(())).await else { panic!() };
            assert!(reason.contains("before a write of a guest"), "{reason}");

            let (ground, front, target, mirror, told) = still(true, settings).await;
            ground.source.image.poke(33 * 512 + 9, &[!ground.source.image.peek(33 * 512 + 9, 1)[0]]);
            // Another block of its granule.
            write(&*front, 34 * 512, &stamped(2, 34)).await.unwrap();
            assert!(told.borrow()[0].contains("lba: Lba(33)"), "{told:?}");
            assert!(matches!(front.drive(&mirror, async || Ok(())).await, Outcome::Failed(_)));
            // Nothing of it is under a new guard.
            assert_eq!(ground.target.image.peek(33 * 512, 512), vec![0; 512]);
            let found =
                target.read_whole(ByteOffset(33 * 512), &Buffer::zeroed(512).sg()).await.unwrap().unwrap();
            assert_eq!(found, vec![0xff; 8]);
            let e =
                front.volume().read_whole(ByteOffset(33 * 512), &Buffer::zeroed(512).sg()).await.unwrap_err();
            assert!(matches!(e.kind, IoErrorKind::Protection(_)));
        });
    }
}

#[test]
fn what_rots_on_the_source_is_not_replaced_by_what_it_was_long_ago() {
    block_on(async {
        let (ground, front, _, mirror, _) = still(true, Settings::default()).await;
        write(&*front, 33 * 512, &stamped(2, 33)).await.unwrap();
        ground.source.image.poke(33 * 512 + 9, &[!ground.source.image.peek(33 * 512 + 9, 1)[0]]);
        let to = Buffer::zeroed(512).sg();
        let refused = front.read(ByteOffset(33 * 512), &to).await.unwrap_err();
        assert!(matches!(refused.kind, IoErrorKind::Protection(_)));
        assert_eq!(mirror.repaired(), 0);
    });
}

#[test]
fn overlapping_writes_wait_for_one_copy_and_all_go_on() {
    block_on(async {
        let (ground, front, _, mirror, _) = still(true, Settings::default()).await;
        let writes = (0..8u64).map(|n| {
            let front = front.clone();
            async move {
                let data: Vec<u8> = (0..16).flat_map(|b| stamped(2, (n * 8 + b) as usize)).collect();
                let from = Buffer::from_slice(&data).sg();
                front.write(ByteOffset(n * 8 * 512), &from, WriteFlags::default()).await
            }
        });
        let copy = front.drive(&mirror, async || Ok(()));
        let (written, ended) = join(join_all(writes), copy).await;
        written.into_iter().for_each(|w| w.unwrap());
        assert_eq!(ended, Outcome::Ended(Ending::Leave));
        for block in 0..BLOCKS {
            assert_eq!(ground.target.image.peek(block as u64 * 512, 512), stamped(1, block), "block {block}");
        }
    });
}
