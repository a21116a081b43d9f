//! The simulated disk is cut at every step of making, applying and deleting a snapshot and of making the disk shorter, and at random
//! moments of work beside them: the image is without errors, the disk and every snapshot are the old ones or the new.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::UNIX_EPOCH,
};

use tcmu_dif::{
    image::qcow2::{Qcow2, SnapshotError},
    sys::exec::{join, yield_now},
    volume::{IoErrorKind, Volume},
};

use crate::{
    crash::{Kind, SIZE, kinds, open},
    model::{BLOCK, Frozen, Model, Settled},
    sim::{self, Cut, SimDisk},
    support::{Rng, check_leaks_at_most, scale},
    walk::walk,
    work::{Work, read_disk},
};

type Snapshots = BTreeMap<String, Vec<u8>>;

/// What may be found after a cut: a disk and its snapshots.
#[derive(Clone, PartialEq)]
struct State {
    disk: Vec<u8>,
    snapshots: Snapshots,
}

impl State {
    /// Whether the bytes of an image say this. `deep`: the snapshots' contents too, by going back to each.
    async fn is_in(&self, bytes: &[u8], under: Option<&[u8]>, deep: bool) -> Result<(), String> {
        let image = open(&SimDisk::new(bytes, 1, 0), under).await.map_err(|e| e.to_string())?;
        let names: Vec<String> = image.snapshots().into_iter().map(|s| s.name).collect();
        let expected: Vec<String> = self.snapshots.keys().cloned().collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        if sorted != expected {
            return Err(format!("snapshots {names:?} and not {expected:?}"));
        }
        if read_disk(&image).await.map_err(|e| e.to_string())? != self.disk {
            return Err("another disk".into());
        }
        if deep {
            for (name, content) in &self.snapshots {
                image.snapshot_apply(name).await.map_err(|e| format!("{name}: {e}"))?;
                if read_disk(&image).await.map_err(|e| e.to_string())? != *content {
                    return Err(format!("{name} has another content"));
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Count {
    cuts: Cell<u64>,
    old: Cell<u64>,
    new: Cell<u64>,
    by_qemu: Cell<u64>,
}

fn bump(n: &Cell<u64>) {
    n.set(n.get() + 1);
}

#[derive(Clone, Debug)]
enum Act {
    Create(&'static str),
    Apply(&'static str),
    Delete(&'static str),
    Shrink(u64),
    Grow(u64),
}

/// Every kind of change, in an order in which each finds something to do.
fn acts(size: u64) -> Vec<Act> {
    use Act::*;
    vec![
        Create("a"),
        Create("b"),
        Apply("a"),
        Shrink(size / 2 / 512 * 512 - 512),
        Create("c"),
        Grow(size),
        Delete("b"),
        Apply("a"),
        Shrink(size / 3 / 4096 * 4096),
        Delete("c"),
        Delete("a"),
    ]
}

async fn act(image: &Qcow2<Rc<SimDisk>>, act: &Act) -> Result<(), String> {
    let words = |e: SnapshotError| e.to_string();
    match act {
        Act::Create(name) => image.snapshot_create(name, UNIX_EPOCH).await.map(drop).map_err(words),
        Act::Apply(name) => image.snapshot_apply(name).await.map_err(words),
        Act::Delete(name) => image.snapshot_delete(name).await.map_err(words),
        Act::Shrink(size) => image.shrink(*size).await.map_err(|e| e.to_string()),
        Act::Grow(size) => image.resize(*size).await.map_err(|e| e.to_string()),
    }
}

fn after(state: &State, act: &Act) -> State {
    let mut new = state.clone();
    match act {
        Act::Create(name) => drop(new.snapshots.insert((*name).to_owned(), state.disk.clone())),
        Act::Apply(name) => new.disk.clone_from(&state.snapshots[*name]),
        Act::Delete(name) => drop(new.snapshots.remove(*name)),
        Act::Shrink(size) | Act::Grow(size) => new.disk.resize(*size as usize, 0),
    }
    new
}

/// Random work, flushed at its end. Gives the disk.
async fn work(image: &Qcow2<Rc<SimDisk>>, seed: u64) -> Vec<u8> {
    let model = Model::new(read_disk(image).await.unwrap());
    let blocks = image.limits().capacity / BLOCK;
    let work = Work {
        volume: image,
        model: &model,
        blocks,
        longest: blocks / 10,
        rng: RefCell::new(Rng::new(seed)),
        left: Cell::new(30),
        may_fail: false,
    };
    work.run(4).await;
    image.flush().await.unwrap();
    let disk = read_disk(image).await.unwrap();
    model.judge_disk(&disk, Settled::Ended).unwrap();
    disk
}

fn keep(bytes: &[u8]) -> String {
    let path = std::env::temp_dir().join("qcow2-snapshot-crash.qcow2");
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn qemu_judges(bytes: &[u8], count: &Count) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.qcow2");
    std::fs::write(&path, bytes).unwrap();
    check_leaks_at_most(&path);
    bump(&count.by_qemu);
}

/// One kind of image through all the acts, cut after every change that the disk sees.
async fn every_step(kind: Rc<Kind>, seed: u64, count: Rc<Count>) {
    let under = kind.under.as_deref();
    let disk = SimDisk::new(&kind.image, seed, 2);
    let image = open(&disk, under).await.unwrap();
    // What others have left is looked at once, and goes.
    let mut state = State { disk: Vec::new(), snapshots: Snapshots::new() };
    for snapshot in image.snapshots() {
        image.snapshot_delete(&snapshot.id).await.unwrap();
    }
    let version_2 = kind.name.contains("version 2");
    for (number, what) in acts(kind.size).iter().enumerate() {
        if version_2 && matches!(what, Act::Shrink(_) | Act::Grow(_)) && !state.snapshots.is_empty() {
            continue;
        }
        state.disk = work(&image, seed * 100 + number as u64).await;
        let new = after(&state, what);
        let busy = Cell::new(true);
        let mut rng = Rng::new(seed + number as u64);
        let cutter = async {
            let mut seen = u64::MAX;
            while busy.get() {
                if disk.changes() == seen {
                    yield_now().await;
                    continue;
                }
                seen = disk.changes();
                for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Any, Cut::Prefix] {
                    let left = disk.cut(how, &mut rng);
                    let whole = walk(&left).map(drop);
                    let deep = rng.one_in(8 / scale().min(8));
                    let as_old = state.is_in(&left, under, deep).await;
                    let as_new = match &as_old {
                        Ok(()) => Ok(()),
                        Err(_) => new.is_in(&left, under, deep).await,
                    };
                    if let Err(e) = whole.and(as_new) {
                        let old = as_old.err().unwrap_or_default();
                        panic!("{}, seed {seed}, {what:?}, {how:?}: {e} / {old}; {}", kind.name, keep(&left));
                    }
                    bump(&count.cuts);
                    bump(if as_old.is_ok() { &count.old } else { &count.new });
                    if under.is_none() && rng.one_in(200) {
                        qemu_judges(&left, &count);
                    }
                }
                yield_now().await;
            }
        };
        let worker = async {
            let done = act(&image, what).await;
            busy.set(false);
            done
        };
        let (done, ()) = join(worker, cutter).await;
        done.unwrap_or_else(|e| panic!("{}, seed {seed}, {what:?}: {e}", kind.name));
        // What has been answered is durable.
        for how in [Cut::Process, Cut::Oldest, Cut::Any] {
            let left = disk.cut(how, &mut rng);
            walk(&left).unwrap();
            let found = new.is_in(&left, under, true).await;
            found.unwrap_or_else(|e| panic!("{}, seed {seed}, after {what:?}, {how:?}: {e}", kind.name));
        }
        state = new;
    }
    let last = work(&image, seed).await;
    image.close().await.unwrap();
    let left = disk.cut(Cut::Oldest, &mut Rng::new(1));
    assert_eq!(walk(&left).unwrap(), 0, "{}, seed {seed}: leaks after a clean close", kind.name);
    State { disk: last, ..state }.is_in(&left, under, true).await.unwrap();
    if under.is_none() {
        qemu_judges(&left, &count);
    }
}

/// Kinds whose clusters can have two references.
fn sharing() -> impl Iterator<Item = Rc<Kind>> {
    kinds()
        .into_iter()
        .filter(|k| !k.name.contains("1-bit") && k.data.is_none() && (k.size == SIZE || scale() > 2))
}

#[test]
fn no_cut_within_a_snapshot_or_a_shorter_disk_shows_anything_but_old_or_new() {
    let count = Rc::new(Count::default());
    for kind in sharing() {
        sim::run(every_step(kind, 1, count.clone()));
    }
    println!(
        "{} cuts: {} show the old state, {} the new; {} judged by qemu-img too",
        count.cuts.get(),
        count.old.get(),
        count.new.get(),
        count.by_qemu.get()
    );
    assert!(count.cuts.get() > 1000 && count.old.get() > 100 && count.new.get() > 100);
}

/// One act after some work, with a step that fails. Gives whether it did.
async fn failing(kind: Rc<Kind>, which: usize, step: u64) -> bool {
    let under = kind.under.as_deref();
    let disk = SimDisk::new(&kind.image, step, 2);
    let image = open(&disk, under).await.unwrap();
    for snapshot in image.snapshots() {
        image.snapshot_delete(&snapshot.id).await.unwrap();
    }
    let mut state = State { disk: work(&image, 5).await, snapshots: Snapshots::new() };
    let what = match which {
        0 => Act::Create("b"),
        1 => Act::Apply("a"),
        2 => Act::Delete("a"),
        _ => Act::Shrink(kind.size / 2 / 512 * 512 - 512),
    };
    if which < 3 {
        act(&image, &Act::Create("a")).await.unwrap();
        state = after(&state, &Act::Create("a"));
        state.disk = work(&image, 6).await;
    }
    let new = after(&state, &what);
    disk.fail_in.set(Some(step));
    let done = act(&image, &what).await;
    let failed = disk.failed.get();
    disk.fail_in.set(None);
    let judge = async |how: Cut, may_be_old: bool| {
        let left = disk.cut(how, &mut Rng::new(step));
        let leaks = walk(&left).unwrap_or_else(|e| panic!("{}, {what:?}, step {step}: {e}", kind.name));
        let as_new = new.is_in(&left, under, true).await;
        let as_old = state.is_in(&left, under, true).await;
        let right = as_new.is_ok() || may_be_old && as_old.is_ok();
        assert!(right, "{}, {what:?}, step {step}: {as_new:?} {as_old:?}; {}", kind.name, keep(&left));
        leaks
    };
    for how in [Cut::Process, Cut::Oldest, Cut::Any] {
        judge(how, done.is_err()).await;
    }
    // The image has failed, or it is whole and goes on as what it is, and a close leaves no leak.
    let alive = image.flush().await.is_ok();
    if alive && done.is_err() {
        assert!(image.limits().capacity == state.disk.len() as u64);
        assert!(read_disk(&image).await.unwrap() == state.disk);
        act(&image, &what).await.unwrap();
    }
    if alive {
        assert!(read_disk(&image).await.unwrap() == new.disk);
        image.close().await.unwrap();
        let leaks = judge(Cut::Oldest, false).await;
        // A step after the switch that fails is no failure, and leaks.
        assert!(leaks == 0 || failed, "{}, {what:?}, step {step}: {leaks} leaks", kind.name);
    }
    failed
}

#[test]
fn every_step_of_a_snapshot_may_fail_and_the_image_stays_old_or_new() {
    let mut steps = 0;
    for kind in sharing() {
        for which in 0..4 {
            let mut step = 0;
            while sim::run(failing(kind.clone(), which, step)) {
                step += 1 + 4 / scale();
                steps += 1;
            }
        }
    }
    println!("{steps} failed steps");
    assert!(steps > 100);
}

/// Random work with snapshots in flight, cut at random moments.
async fn beside_work(kind: Rc<Kind>, seed: u64, count: Rc<Count>) {
    let under = kind.under.as_deref();
    let disk = SimDisk::new(&kind.image, seed, 4);
    let image = open(&disk, under).await.unwrap();
    for snapshot in image.snapshots() {
        image.snapshot_delete(&snapshot.id).await.unwrap();
    }
    let model = Model::new(read_disk(&image).await.unwrap());
    let work = Work {
        volume: &image,
        model: &model,
        blocks: kind.size / BLOCK,
        longest: kind.size / BLOCK / 10,
        rng: RefCell::new(Rng::new(seed)),
        left: Cell::new(300),
        may_fail: false,
    };
    let known: RefCell<BTreeMap<String, Rc<Frozen>>> = RefCell::default();
    // The one that is being made or deleted, which may be there or not.
    let open_case: RefCell<Option<String>> = RefCell::default();
    let busy = Cell::new(true);
    let snapping = async {
        let mut rng = Rng::new(seed + 3);
        for number in 0.. {
            for _ in 0..rng.below(200) {
                yield_now().await;
            }
            if !busy.get() {
                break;
            }
            let name = format!("s{number}");
            open_case.replace(Some(name.clone()));
            let began = model.flush_begins();
            image.snapshot_create(&name, UNIX_EPOCH).await.unwrap();
            let frozen = model.freeze(began);
            known.borrow_mut().insert(name, Rc::new(frozen));
            open_case.take();
            if rng.one_in(2) {
                let n = rng.below(known.borrow().len() as u64) as usize;
                let name = known.borrow().keys().nth(n).unwrap().clone();
                open_case.replace(Some(name.clone()));
                image.snapshot_delete(&name).await.unwrap();
                known.borrow_mut().remove(&name);
                open_case.take();
            }
        }
    };
    let mut rng = Rng::new(seed + 77);
    let cutter = async {
        while busy.get() {
            for _ in 0..rng.below(60) {
                yield_now().await;
            }
            for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Prefix] {
                let left = disk.cut(how, &mut rng);
                let by = if how == Cut::Process { Settled::Ended } else { Settled::Flushed };
                let (known, open_case) = (known.borrow().clone(), open_case.borrow().clone());
                let judged = judge_beside(&left, under, &model, by, &known, open_case.as_deref());
                if let Err(e) = judged.await {
                    panic!("{}, seed {seed}, {how:?}: {e}; {}", kind.name, keep(&left));
                }
                bump(&count.cuts);
            }
        }
    };
    let worker = async {
        work.run(64).await;
        busy.set(false);
    };
    join(join(worker, snapping), cutter).await;
    image.close().await.unwrap();
    let left = disk.cut(Cut::Oldest, &mut Rng::new(1));
    let known = known.into_inner();
    judge_beside(&left, under, &model, Settled::Ended, &known, None).await.unwrap();
    assert_eq!(walk(&left).unwrap(), 0, "{}, seed {seed}: leaks after a clean close", kind.name);
    count.new.set(count.new.get() + known.len() as u64);
}

async fn judge_beside(
    left: &[u8],
    under: Option<&[u8]>,
    model: &Model,
    by: Settled,
    known: &BTreeMap<String, Rc<Frozen>>,
    open_case: Option<&str>,
) -> Result<(), String> {
    walk(left)?;
    let image = open(&SimDisk::new(left, 1, 0), under).await.map_err(|e| e.to_string())?;
    model.judge_disk(&read_disk(&image).await.map_err(|e| e.to_string())?, by)?;
    let there: Vec<String> = image.snapshots().into_iter().map(|s| s.name).collect();
    if let Some(lost) = known.keys().find(|n| !there.contains(n) && open_case != Some(n.as_str())) {
        return Err(format!("the snapshot {lost} is lost"));
    }
    for name in there {
        match known.get(&name) {
            Some(frozen) => {
                image.snapshot_apply(&name).await.map_err(|e| e.to_string())?;
                let bytes = read_disk(&image).await.map_err(|e| e.to_string())?;
                frozen.judge(&bytes).map_err(|e| format!("{name}: {e}"))?;
            }
            None if open_case == Some(name.as_str()) => {}
            None => return Err(format!("the snapshot {name} has come back")),
        }
    }
    Ok(())
}

#[test]
fn snapshots_made_beside_work_are_points_in_time_after_any_cut() {
    let count = Rc::new(Count::default());
    for kind in sharing() {
        for seed in 0..scale().div_ceil(2) {
            sim::run(beside_work(kind.clone(), seed, count.clone()));
        }
    }
    println!("{} cuts; {} snapshots were left", count.cuts.get(), count.new.get());
    assert!(count.cuts.get() > 500 && count.new.get() > 10);
}

#[test]
fn one_bit_refcounts_have_shorter_disks_and_no_snapshots() {
    let kind = kinds().into_iter().find(|k| k.name.contains("1-bit")).unwrap();
    sim::run(async move {
        let disk = SimDisk::new(&kind.image, 1, 2);
        let image = open(&disk, None).await.unwrap();
        let before = work(&image, 1).await;
        let e = image.snapshot_create("a", UNIX_EPOCH).await.unwrap_err();
        assert!(matches!(&e, SnapshotError::Io(e) if e.kind == IoErrorKind::Unsupported), "{e}");
        image.shrink(kind.size / 2 / 512 * 512).await.unwrap();
        assert!(read_disk(&image).await.unwrap()[..] == before[..kind.size as usize / 2 / 512 * 512]);
        image.close().await.unwrap();
        assert_eq!(walk(&disk.cut(Cut::Oldest, &mut Rng::new(1))).unwrap(), 0);
    });
}
