//! The mirror against a naive reference: guests that write, zero, discard and flush at random while it is paused, cancelled, completed,
//! fails and is killed at random, over disks that fail. With protection and without.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    rc::Rc,
    task::Poll,
};

use super::{
    OnError, Side,
    dirty::{DirtyMap, Kept},
    first_extent,
    front::{Ending, Front, Outcome},
    mirror::{CopyMode, Hooks, Mirror, Settings, Told},
};
use crate::{
    pi::{
        PiType, Protected,
        testing::{SimVolume, World, block_on, read, write},
    },
    storage::sim::{OpKind, Rng, SimDisk, scaled},
    sys::{
        exec::{join, join_all, yield_now},
        mem::{Buffer, Sg},
    },
    units::{BlockSize, ByteOffset},
    volume::{Extent, IoErrorKind, Limits, Result, TupleCheck, Volume, WriteFlags},
};

mod parting;
mod slow_target;

pub(super) const SIZE: u64 = 512 << 10;
pub(super) const BLOCKS: usize = (SIZE / 512) as usize;
pub(super) const GRANULE: u64 = 8192;
pub(super) const GUESTS: usize = 3;

/// A volume with protection or without.
pub(super) enum Disk {
    Plain(SimVolume),
    Protected(Box<Protected<SimVolume, SimDisk>>),
}

macro_rules! either {
    ($self:ident, $v:ident => $call:expr) => {
        match $self {
            Disk::Plain($v) => $call,
            Disk::Protected($v) => $call,
        }
    };
}

impl Volume for Disk {
    fn limits(&self) -> Limits {
        either!(self, v => v.limits())
    }
    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        either!(self, v => v.read(at, to).await)
    }
    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        either!(self, v => v.write(at, from, flags).await)
    }
    async fn flush(&self) -> Result<()> {
        either!(self, v => v.flush().await)
    }
    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        either!(self, v => v.discard(at, len).await)
    }
    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        either!(self, v => v.write_zeroes(at, len, may_unmap).await)
    }
    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        either!(self, v => v.map_extents(at, len).await)
    }
    async fn resize(&self, capacity: u64) -> Result<()> {
        either!(self, v => v.resize(capacity).await)
    }
    async fn close(&self) -> Result<()> {
        either!(self, v => v.close().await)
    }
    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        either!(self, v => v.read_with_tuples(at, to, check).await)
    }
    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        either!(self, v => v.write_with_tuples(at, from, tuples, flags).await)
    }
}

impl Side for Disk {
    async fn read_whole(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        match self {
            Disk::Plain(v) => v.read(at, to).await.map(|()| None),
            Disk::Protected(v) => v.read_verified(at, to).await.map(Some),
        }
    }
    async fn write_whole(&self, at: ByteOffset, from: &Sg, tuples: Option<Vec<u8>>) -> Result<()> {
        match (self, tuples) {
            (Disk::Protected(v), Some(tuples)) => {
                v.write_with_tuples(at, from, tuples, WriteFlags::default()).await
            }
            _ => self.write(at, from, WriteFlags::default()).await,
        }
    }
    async fn extent(&self, at: ByteOffset, len: u64) -> Result<Extent> {
        let extent = first_extent(self, at, len, 512).await?;
        match self {
            Disk::Plain(_) => Ok(extent),
            Disk::Protected(v) => v.with_tuples(extent).await,
        }
    }
    fn block_bytes(&self) -> u64 {
        512
    }
    fn protected_by(&self) -> Option<PiType> {
        match self {
            Disk::Plain(_) => None,
            Disk::Protected(v) => Some(v.kind_at_rest()),
        }
    }
}

pub(super) async fn open(world: &World, pi: bool) -> Disk {
    match pi {
        false => Disk::Plain(world.volume()),
        true => Disk::Protected(Box::new(world.open().await)),
    }
}

/// What a block may hold: the number of the write that it is of (0 for zeros), or anything where a write has failed.
pub(super) type Model = Rc<RefCell<Vec<Option<Vec<u64>>>>>;

pub(super) fn stamped(number: u64, block: usize) -> Vec<u8> {
    if number == 0 { vec![0; 512] } else { Rng::new(number << 20 | block as u64).bytes(512) }
}

/// What stands fast from one life of the LUN to the next.
#[derive(Clone)]
pub(super) struct Ground {
    pub(super) source: World,
    pub(super) target: World,
    pub(super) pi: bool,
    pub(super) kept: Kept,
    pub(super) model: Model,
    pub(super) next: Rc<Cell<u64>>,
    pub(super) settings: Settings,
}

/// How one life ended.
#[derive(Debug)]
enum Life {
    Killed,
    Over(Outcome),
}

/// A guest's random commands on the blocks that are its own, until there is no more use for them.
pub(super) async fn guest(
    number: usize,
    seed: u64,
    front: Rc<Front<Disk>>,
    ground: Ground,
    enough: Rc<Cell<bool>>,
    calm: Rc<Cell<bool>>,
) {
    let mut rng = Rng::new(seed);
    while !enough.get() {
        // Stripes of four blocks: every granule is shared by all guests.
        let stripes = (BLOCKS / 4 / GUESTS) as u64;
        let first = (rng.below(stripes) as usize * GUESTS + number) * 4;
        let skip = rng.below(4) as usize;
        let (first, blocks) = (first + skip, 1 + rng.below(4 - skip as u64) as usize);
        let (at, len) = (first as u64 * 512, blocks as u64 * 512);
        let mine = first..first + blocks;
        let kind = rng.below(10);
        if kind < 3 {
            // The model as it is when the command begins: nobody else writes here.
            let found = read(&*front, at, len as usize).await;
            let Ok(found) = found else {
                yield_now().await;
                continue;
            };
            for block in mine {
                let bytes = &found[(block - first) * 512..][..512];
                if let Some(may) = &ground.model.borrow()[block] {
                    let known = may.iter().any(|number| stamped(*number, block) == bytes);
                    assert!(known, "block {block} is none of {may:?}");
                }
            }
            continue;
        }
        if kind == 3 {
            let _ = front.flush().await;
            continue;
        }
        let number = if kind < 8 { ground.next.replace(ground.next.get() + 1) } else { 0 };
        for block in mine.clone() {
            if let Some(may) = &mut ground.model.borrow_mut()[block] {
                may.push(number);
            }
        }
        let done = match kind {
            8 => front.discard(ByteOffset(at), len).await,
            9 => front.write_zeroes(ByteOffset(at), len, rng.one_in(2)).await,
            _ => {
                let data: Vec<u8> = mine.clone().flat_map(|block| stamped(number, block)).collect();
                let flags = WriteFlags { fua: rng.one_in(8), ..WriteFlags::default() };
                front.write(ByteOffset(at), &Buffer::from_slice(&data).sg(), flags).await
            }
        };
        for block in mine {
            ground.model.borrow_mut()[block] = done.is_ok().then(|| vec![number]);
        }
        // In the background a mirror does not catch up with whoever writes faster than it copies.
        for _ in 0..rng.below(if calm.get() { 4000 } else { 6 }) {
            if enough.get() {
                return;
            }
            yield_now().await;
        }
    }
}

fn same_on_both(ground: &Ground) {
    let of = |world: &World| world.image.peek(0, SIZE as usize);
    assert!(of(&ground.source) == of(&ground.target), "the sides differ");
}

/// Both sides read back, verified, with their tuples; and against the model.
pub(super) async fn compare(ground: &Ground, a: &Disk, b: &Disk) {
    for block in 0..BLOCKS {
        let (x, y) = (Buffer::zeroed(512).sg(), Buffer::zeroed(512).sg());
        let at = ByteOffset(block as u64 * 512);
        let tuples = (a.read_whole(at, &x).await.unwrap(), b.read_whole(at, &y).await.unwrap());
        assert_eq!(x.to_vec(), y.to_vec(), "block {block}");
        assert_eq!(tuples.0, tuples.1, "tuples of block {block}");
        if let Some(may) = &ground.model.borrow()[block] {
            assert!(may.iter().any(|number| stamped(*number, block) == x.to_vec()), "block {block}: {may:?}");
        }
    }
}

/// Orders and troubles at random, until the job is over or somebody kills the LUN.
async fn trouble(
    mut rng: Rng,
    ground: Ground,
    mirror: Rc<Mirror<Disk>>,
    over: Rc<Cell<bool>>,
    kill: Rc<Cell<bool>>,
    calm: Rc<Cell<bool>>,
    (mut patience, soft): (u64, bool),
) {
    while !over.get() {
        for _ in 0..rng.below(400) {
            yield_now().await;
        }
        if over.get() {
            return;
        }
        patience = patience.saturating_sub(1);
        calm.set(patience < 10);
        match rng.below(if patience == 0 { 2 } else { 12 }) {
            0 => mirror.pause(false),
            1 if soft && mirror.is_ready() => mirror.cancel(false),
            1 => drop(mirror.complete()),
            2 => mirror.pause(true),
            3 if rng.one_in(3) => kill.set(true),
            4 if rng.one_in(4) => mirror.cancel(rng.one_in(2)),
            5 | 6 => {
                let what = [OpKind::Write, OpKind::Read, OpKind::Space][rng.below(3) as usize];
                let errno = if rng.one_in(3) { libc::ENOSPC } else { libc::EIO };
                let image = if rng.one_in(2) { &ground.target.image } else { &ground.source.image };
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

/// Serves until the job is over or it is killed: then all that is under way is dropped where it stands.
async fn life(seed: u64, ground: Ground, first: bool, fresh: bool, patience: u64) -> Life {
    let (source, target) = (open(&ground.source, ground.pi).await, open(&ground.target, ground.pi).await);
    let front = Rc::new(Front::new(source));
    let map = match first {
        true => DirtyMap::new(SIZE, GRANULE, ground.kept.clone()),
        false => DirtyMap::load(SIZE, GRANULE, ground.kept.clone()),
    };
    let hooks = Hooks {
        tell: Box::new(|told| {
            if let Told::Error { mismatch, reason, .. } = told {
                assert_eq!(mismatch, None, "{reason}");
            }
        }),
        sleep: Box::new(|_| {
            Box::pin(async {
                for _ in 0..5 {
                    yield_now().await;
                }
            })
        }),
    };
    let sides = (front.volume(), Rc::new(target));
    let mirror = Rc::new(Mirror::new("m".into(), sides, map, ground.settings, 0, hooks));
    let (over, kill, enough) =
        (Rc::new(Cell::new(false)), Rc::new(Cell::new(false)), Rc::new(Cell::new(false)));
    let calm = Rc::new(Cell::new(false));
    let outcome: Rc<RefCell<Option<Outcome>>> = Rc::default();
    let job = {
        let (front, mirror, ground) = (front.clone(), mirror.clone(), ground.clone());
        let (over, enough, outcome) = (over.clone(), enough.clone(), outcome.clone());
        async move {
            front.attach(mirror.clone()).await;
            if first {
                mirror.scan(fresh).await;
            }
            let decide = async || {
                same_on_both(&ground);
                Ok(())
            };
            let ended = front.drive(&mirror, decide).await;
            over.set(true);
            if ended != Outcome::Ended(Ending::Pivot) {
                enough.set(true);
            }
            // Guests go on for a while on what they have now.
            for _ in 0..200 {
                yield_now().await;
            }
            enough.set(true);
            outcome.replace(Some(ended));
        }
    };
    let guests = (0..GUESTS)
        .map(|n| guest(n, seed * 31 + n as u64, front.clone(), ground.clone(), enough.clone(), calm.clone()));
    let troubles = trouble(
        Rng::new(!seed),
        ground.clone(),
        mirror.clone(),
        over,
        kill.clone(),
        calm.clone(),
        (patience, seed / 100 % 4 == 3),
    );
    let mut all = Box::pin(join(join(job, troubles), join_all(guests)));
    let killed = poll_fn(|cx| match all.as_mut().poll(cx) {
        Poll::Ready(_) => Poll::Ready(false),
        Poll::Pending if kill.get() => Poll::Ready(true),
        Poll::Pending => Poll::Pending,
    })
    .await;
    drop(all);
    if killed {
        return Life::Killed;
    }
    let outcome = outcome.take().unwrap();
    match outcome {
        Outcome::Ended(Ending::Pivot) => {
            assert!(Rc::ptr_eq(&front.volume(), mirror.target()) && front.mirror().is_none());
            let same = front.volume();
            compare(&ground, &same, &same).await;
        }
        // Guests have ended when the gate was closed or soon after: the target is as of then.
        Outcome::Ended(Ending::Leave) => assert!(front.mirror().is_none()),
        Outcome::Ended(Ending::Finish) => panic!("a mirror does not end by itself"),
        Outcome::Cancelled | Outcome::Failed(_) => {
            let same = front.volume();
            compare(&ground, &same, &same).await;
        }
    }
    Life::Over(outcome)
}

pub(super) fn ground(seed: u64, rng: &mut Rng) -> (Ground, bool) {
    let pi = seed.is_multiple_of(2);
    let world = |seed| World::new(seed, PiType::Type1, BlockSize::B512, SIZE);
    let (source, target) = (world(seed * 2 + 1000), world(seed * 2 + 1001));
    let policy = |rng: &mut Rng| {
        [OnError::Report, OnError::Ignore, OnError::Enospc, OnError::Stop, OnError::Stop]
            [rng.below(5) as usize]
    };
    let settings = Settings {
        copy_mode: [CopyMode::Background, CopyMode::WriteBlocking][rng.below(2) as usize],
        unmap: rng.one_in(2),
        on_source_error: policy(rng),
        on_target_error: policy(rng),
        ..Settings::default()
    };
    let fresh = pi || rng.one_in(2);
    if !fresh {
        target.image.poke(0, &Rng::new(7).bytes(SIZE as usize));
    }
    let kept = Kept::memory(SIZE, GRANULE);
    let model = Rc::new(RefCell::new(vec![Some(vec![0]); BLOCKS]));
    (Ground { source, target, pi, kept, model, next: Rc::new(Cell::new(1)), settings }, fresh)
}

#[test]
fn whatever_guests_errors_orders_and_kills_do_the_target_is_the_source_when_it_is_gone_over_to() {
    let mut count = [0u32; 5];
    for seed in 0..scaled(150) {
        let mut rng = Rng::new(seed);
        let (ground, fresh) = ground(seed, &mut rng);
        let mut lives = 0;
        loop {
            let (g, first, patience) = (ground.clone(), lives == 0, 40u64.saturating_sub(lives * 10));
            let ended = block_on(life(seed * 100 + lives, g, first, fresh, patience));
            lives += 1;
            // A kill takes back no trouble of the disks.
            ground.source.image.fail_all(None);
            ground.target.image.fail_all(None);
            match ended {
                Life::Killed => count[0] += 1,
                Life::Over(Outcome::Ended(Ending::Pivot)) => count[1] += 1,
                Life::Over(Outcome::Ended(Ending::Leave | Ending::Finish)) => count[2] += 1,
                Life::Over(Outcome::Cancelled) => count[3] += 1,
                Life::Over(Outcome::Failed(_)) => count[4] += 1,
            }
            if matches!(ended, Life::Over(_)) {
                break;
            }
        }
    }
    eprintln!("killed, pivoted, left, cancelled, failed: {count:?}");
    // A short loop meets the common endings alone.
    let met = if scaled(150) < 150 { &count[..2] } else { &count[..] };
    assert!(met.iter().all(|n| *n > 0), "not everything was tried: {count:?}");
}

async fn still(
    pi: bool,
    settings: Settings,
) -> (Ground, Rc<Front<Disk>>, Rc<Mirror<Disk>>, Rc<RefCell<Vec<String>>>) {
    let mut rng = Rng::new(5);
    let (ground, _) = ground(if pi { 2 } else { 1 }, &mut rng);
    // What is written is known without it.
    ground.model.borrow_mut().fill(None);
    let ground = Ground { settings, ..ground };
    let front = Rc::new(Front::new(open(&ground.source, pi).await));
    let target = Rc::new(open(&ground.target, pi).await);
    let told: Rc<RefCell<Vec<String>>> = Rc::default();
    let hear = told.clone();
    let hooks = Hooks {
        tell: Box::new(move |t| hear.borrow_mut().push(format!("{t:?}"))),
        sleep: Box::new(|_| Box::pin(yield_now())),
    };
    let map = DirtyMap::new(SIZE, GRANULE, ground.kept.clone());
    let mirror = Rc::new(Mirror::new("m".into(), (front.volume(), target), map, settings, 0, hooks));
    front.attach(mirror.clone()).await;
    (ground, front, mirror, told)
}

/// Runs a mirror until that holds.
async fn until(front: &Rc<Front<Disk>>, mirror: &Rc<Mirror<Disk>>, done: impl Fn() -> bool) {
    let (f, m) = (front.clone(), mirror.clone());
    let mut drive = Box::pin(async move { f.drive(&m, async || Ok(())).await });
    poll_fn(|cx| {
        if drive.as_mut().poll(cx).is_ready() || done() {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[test]
fn a_block_that_does_not_match_is_named_and_never_copied_and_the_job_goes_on_once_it_is_written_anew() {
    block_on(async {
        let settings = Settings { on_source_error: OnError::Stop, ..Settings::default() };
        let (ground, front, mirror, told) = still(true, settings).await;
        for block in 0..64 {
            write(&*front, block * 512, &stamped(9, block as usize)).await.unwrap();
        }
        ground.source.image.poke(33 * 512 + 9, &[!ground.source.image.peek(33 * 512 + 9, 1)[0]]);
        mirror.scan(true).await;
        until(&front, &mirror, || told.borrow().iter().any(|t| t.contains("Error"))).await;
        let heard = told.borrow().iter().find(|t| t.contains("Error")).cloned().unwrap();
        assert!(
            heard.contains("source: true") && heard.contains("lba: Lba(33)") && heard.contains("Stop"),
            "{heard}"
        );
        assert_eq!(ground.target.image.peek(33 * 512, 512), vec![0; 512], "it was copied");
        write(&*front, 33 * 512, &stamped(10, 33)).await.unwrap();
        mirror.pause(false);
        until(&front, &mirror, || mirror.is_ready()).await;
        compare(&ground, &front.volume(), mirror.target()).await;
    });
}

#[test]
fn a_block_that_rots_on_the_source_is_read_from_the_target_and_brought_back() {
    block_on(async {
        let (ground, front, mirror, told) = still(true, Settings::default()).await;
        for block in 0..64 {
            write(&*front, block * 512, &stamped(9, block as usize)).await.unwrap();
        }
        mirror.scan(true).await;
        until(&front, &mirror, || mirror.is_ready()).await;
        ground.source.image.poke(20 * 512, &[1, 2, 3]);
        ground.source.image.poke(21 * 512, &[1, 2, 3]);
        let found = read(&*front, 16 * 512, 16 * 512).await.unwrap();
        assert_eq!(found[4 * 512..5 * 512], stamped(9, 20));
        assert_eq!(mirror.repaired(), 2);
        assert!(told.borrow().iter().any(|t| t == "Repaired(21)"));
        assert_eq!(
            ground.source.image.peek(21 * 512, 512),
            stamped(9, 21),
            "it is whole again on the source"
        );
        // What is still to be copied is no spare.
        mirror.map().set(20 * 512, 512);
        ground.source.image.poke(20 * 512, &[1, 2, 3]);
        let refused = read(&*front, 20 * 512, 512).await.unwrap_err();
        assert!(matches!(refused.kind, IoErrorKind::Protection(_)));
    });
}

#[test]
fn holes_stay_holes() {
    for pi in [false, true] {
        block_on(async move {
            let (ground, front, mirror, _) = still(pi, Settings::default()).await;
            write(&*front, 100 * 512, &stamped(3, 100)).await.unwrap();
            mirror.map().set(0, SIZE);
            until(&front, &mirror, || mirror.is_ready()).await;
            assert!(ground.target.image.allocated() <= 8192, "{}", ground.target.image.allocated());
        });
    }
}

#[test]
fn a_cancelled_mirror_that_had_caught_up_leaves_what_the_source_was_then() {
    block_on(async {
        let (ground, front, mirror, _) = still(true, Settings::default()).await;
        write(&*front, 0, &stamped(1, 0)).await.unwrap();
        mirror.scan(true).await;
        until(&front, &mirror, || mirror.is_ready()).await;
        write(&*front, 512, &stamped(2, 1)).await.unwrap();
        mirror.cancel(false);
        assert_eq!(front.drive(&mirror, async || Ok(())).await, Outcome::Ended(Ending::Leave));
        compare(&ground, &front.volume(), mirror.target()).await;
        write(&*front, 512, &stamped(3, 1)).await.unwrap();
        assert_eq!(ground.target.image.peek(512, 512), stamped(2, 1), "it is left behind");
    });
}

#[test]
fn a_choice_that_cannot_be_written_down_leaves_both_sides_in_step_and_the_job_ready() {
    block_on(async {
        let (ground, front, mirror, _) = still(false, Settings::default()).await;
        mirror.scan(false).await;
        until(&front, &mirror, || mirror.is_ready()).await;
        mirror.complete().unwrap();
        let asked = Rc::new(Cell::new(0));
        let (f, m, a) = (front.clone(), mirror.clone(), asked.clone());
        let mut drive = Box::pin(async move {
            let decide = async || {
                a.set(a.get() + 1);
                if a.get() == 1 { Err("no space left".to_owned()) } else { Ok(()) }
            };
            f.drive(&m, decide).await
        });
        poll_fn(|cx| {
            let pending = drive.as_mut().poll(cx).is_pending();
            cx.waker().wake_by_ref();
            if asked.get() == 1 && pending { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        write(&*front, 4096, &stamped(4, 8)).await.unwrap();
        assert!(front.mirror().is_some() && !Rc::ptr_eq(&front.volume(), mirror.target()));
        loop {
            if mirror.complete().is_ok() {
                break;
            }
            let pending = poll_fn(|cx| Poll::Ready(drive.as_mut().poll(cx).is_pending())).await;
            assert!(pending);
            yield_now().await;
        }
        assert_eq!(drive.await, Outcome::Ended(Ending::Pivot));
        same_on_both(&ground);
    });
}
