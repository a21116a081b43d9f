//! Crashes: workloads that are stopped at any turn, by power loss or by `kill -9`, or by an error at any one operation, and
//! opened again. What must hold each time: no false alarm, and every write that was flushed (by `kill -9`: finished) is
//! there and protected.

use std::{cell::Cell, rc::Rc};

use super::{
    model::{Lun, Model, SITES, TASKS, WIDE},
    *,
};
use crate::{
    pi::{
        store::{LAYOUT, Layout},
        testing::{World, block_on},
    },
    storage::sim::{Rng, scaled},
    sys::exec::{Executor, yield_now},
};

const MODES: [PiMode; 2] = [PiMode::Bitmap, PiMode::Journal];
/// The usual layout with a journal that is quick to read.
const SHORT: Layout = Layout { journal_len: 128 << 10, ..LAYOUT };

/// Opens, works and is stopped after some turns; tells whether it got as far as a clean close, with nothing left to look at.
pub(super) fn session(world: &World, model: &Model, seed: u64, turns: u64) -> bool {
    let exec = Executor::new();
    let closed = Rc::new(Cell::new(false));
    let (w, m, e, c) = (world.clone(), model.clone(), exec.clone(), closed.clone());
    exec.spawn(async move {
        let lun = Rc::new(w.open().await);
        let left = Rc::new(Cell::new(TASKS));
        // What was left in doubt is looked at while the others work, all of it, some, or what they need.
        let looks = Rng::new(seed).below(3) * Rng::new(!seed).below(40);
        let (beside, looking) = (lun.clone(), Rc::new(Cell::new(true)));
        let ends = looking.clone();
        e.spawn(async move {
            for _ in 0..looks {
                if !beside.recheck_next().await.unwrap() {
                    break;
                }
                yield_now().await;
            }
            ends.set(false);
        });
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
        while left.get() > 0 || looking.get() {
            yield_now().await;
        }
        let all_looked_at = lun.counters().unchecked == 0;
        lun.close().await.unwrap();
        for block in m.blocks.borrow_mut().iter_mut() {
            block.durable = block.acked;
        }
        c.set(all_looked_at);
    });
    for _ in 0..turns {
        if !exec.run_ready() {
            break;
        }
    }
    exec.clear();
    closed.get()
}

fn crashes(seed: u64, mode: PiMode, power: bool) {
    let mut rng = Rng::new(seed);
    let size = if rng.one_in(2) { BlockSize::B512 } else { BlockSize::B4096 };
    let kind = if rng.one_in(2) { PiType::Type1 } else { PiType::Type3 };
    let model = Model::new(size, mode, WIDE);
    let mut world = World::made(seed, (kind, mode), size, model.capacity(), SHORT);
    world.recheck = if rng.one_in(2) { Recheck::First } else { Recheck::Beside };
    for life in 0..3 {
        // Short lives end in the recheck, long ones in the close.
        let turns = if rng.one_in(4) { rng.below(60) } else { rng.below(700) };
        let closed = session(&world, &model, rng.next(), turns);
        if power && rng.one_in(3) {
            // Killed, and opened again before the power goes: what that has settled must hold.
            let w = world.clone();
            let looks = rng.below(4);
            block_on(async move {
                let lun = w.open().await;
                for _ in 0..looks {
                    lun.recheck_next().await.unwrap();
                }
            });
        }
        if power {
            world = world.cut(&mut rng);
        }
        let (w, m) = (world.clone(), model.clone());
        block_on(async move {
            let lun = w.open().await;
            if closed || mode == PiMode::Journal {
                assert_eq!(
                    lun.counters().recomputed,
                    0,
                    "seed {seed} life {life}: a clean close needs no recheck"
                );
            }
            let torn = m.check_all(&lun, |b| if power || b.failed { b.durable } else { b.acked }).await;
            assert!(power || torn == 0, "kill -9 tears no block");
            if power {
                m.adopt();
            }
            // Left without a close.
        });
    }
}

#[test]
fn a_power_cut_at_any_turn_raises_no_false_alarm_and_loses_nothing_flushed() {
    for seed in 0..scaled(500) {
        MODES.into_iter().for_each(|mode| crashes(seed, mode, true));
    }
}

#[test]
fn kill_9_at_any_turn_raises_no_false_alarm_and_loses_nothing_finished() {
    for seed in 0..scaled(150) {
        MODES.into_iter().for_each(|mode| crashes(seed, mode, false));
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
        MODES.into_iter().for_each(|mode| one_failure(seed, mode));
    }
}

fn one_failure(seed: u64, mode: PiMode) {
    let size = if seed.is_multiple_of(2) { BlockSize::B512 } else { BlockSize::B4096 };
    let model = || Model::new(size, mode, WIDE);
    let fresh = || World::made(seed, (PiType::Type1, mode), size, model().capacity(), SHORT);
    let dry = fresh();
    let (w, m, start) = (dry.clone(), model(), (dry.image.ops(), dry.sidecar.ops()));
    block_on(async move {
        let lun = w.open().await;
        workload(&lun, &m, seed).await;
        lun.close().await.unwrap();
    });
    let steps = (start.0..dry.image.ops()).map(|i| (true, i));
    for (of_image, op) in steps.chain((start.1..dry.sidecar.ops()).map(|i| (false, i))) {
        let world = fresh();
        let disk = if of_image { world.image.clone() } else { world.sidecar.clone() };
        disk.fail_at(op);
        let model = model();
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
