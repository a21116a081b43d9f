//! Power cuts at every step that reaches a disk: each write, sync, change of space or of length, of the image and of the sidecar,
//! as it takes effect. At each of them what a cut may leave is taken (some unsynced sectors dropped, some kept, some old) and
//! opened: nothing that was flushed is lost, nothing that is whole is an error, and in mode "journal" nothing is made anew and
//! nothing that is torn passes. Opening is such a run of steps itself, and is cut as well; a life goes on after a cut or after a
//! `kill -9`, and is cut again.

use std::{cell::Cell, rc::Rc};

use super::{
    cuts::session,
    model::{Model, NARROW},
    *,
};
use crate::{
    pi::{
        store::Layout,
        testing::{World, block_on},
    },
    storage::sim::{Rng, scaled},
};

/// What a cut has left, and what the model knew then.
struct Shot {
    world: World,
    model: Model,
    /// Cuts that lie before it: one during a session, one more during the opening after that.
    generation: u32,
    /// No cut lies before the session.
    fresh: bool,
}

/// Takes a shot at every step of a world's disks while it lives.
struct Camera<'a> {
    world: &'a World,
    shots: Rc<RefCell<Vec<Shot>>>,
}

impl<'a> Camera<'a> {
    fn watch(world: &'a World, model: &Model, seed: u64, generation: u32) -> Camera<'a> {
        let shots: Rc<RefCell<Vec<Shot>>> = Rc::default();
        let (seen, model, taken) = (world.clone(), model.clone(), shots.clone());
        let rng = RefCell::new(Rng::new(seed));
        let take = move || {
            let world = seen.cut(&mut rng.borrow_mut());
            taken.borrow_mut().push(Shot { world, model: model.fork(), generation, fresh: false });
        };
        let take: Rc<dyn Fn()> = Rc::new(take);
        for disk in [&world.image, &world.sidecar] {
            disk.watch(Some(take.clone()));
        }
        Camera { world, shots }
    }

    fn shots(self) -> Vec<Shot> {
        self.shots.take()
    }
}

impl Drop for Camera<'_> {
    fn drop(&mut self) {
        self.world.image.watch(None);
        self.world.sidecar.watch(None);
    }
}

/// What came of many cuts.
#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    during_openings: u64,
    torn: u64,
    recomputed: u64,
}

/// Opens what a cut has left and looks at everything. Some openings are cut in turn.
fn look(shot: Shot, rng: &mut Rng, tally: &mut Tally) {
    let again = shot.generation < 2 && rng.one_in(12);
    let Shot { world, model, generation, fresh } = shot;
    if !again {
        // The order of what is done is of interest while it is cut, and costs time otherwise.
        world.image.set_max_delay(0);
        world.sidecar.set_max_delay(0);
    }
    let camera = again.then(|| Camera::watch(&world, &model, rng.next(), generation + 1));
    let counted = Rc::new(Cell::new((0, Counters::default())));
    let (w, m, c) = (world.clone(), model.clone(), counted.clone());
    block_on(async move {
        let lun = w.open().await;
        let torn = m.check_all(&lun, |b| b.durable).await;
        c.set((torn, lun.counters()));
    });
    let (torn, counters) = counted.get();
    if model.mode == PiMode::Journal {
        assert_eq!(counters.recomputed, 0, "mode journal makes nothing anew");
        assert!(!fresh || torn <= counters.torn, "{torn} torn blocks, {} counted", counters.torn);
    } else {
        assert_eq!((torn, counters.torn), (0, 0));
    }
    tally.cuts += 1;
    tally.during_openings += u64::from(generation > 1);
    tally.torn += torn;
    tally.recomputed += counters.recomputed;
    for shot in camera.map(Camera::shots).unwrap_or_default() {
        look(shot, rng, tally);
    }
}

/// Says where a failure was.
struct Whereabouts {
    seed: u64,
    life: u32,
    shot: usize,
}

impl Drop for Whereabouts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("seed {:#x}, life {}, cut {}", self.seed, self.life, self.shot);
        }
    }
}

/// Some lives of one LUN, one after another.
fn lives(mode: PiMode, seed: u64, tally: &mut Tally) {
    let mut at = Whereabouts { seed, life: 0, shot: 0 };
    let mut rng = Rng::new(seed);
    let size = if rng.one_in(3) { BlockSize::B512 } else { BlockSize::B4096 };
    let kind = if rng.one_in(2) { PiType::Type1 } else { PiType::Type3 };
    // The journal is full now and then.
    let layout = Layout { region_shift: NARROW.region.ilog2(), journal_len: 64 << 10 };
    let mut model = Model::new(size, mode, NARROW);
    let mut world = World::made(seed, (kind, mode), size, model.capacity(), layout);
    world.recheck = if rng.one_in(2) { Recheck::First } else { Recheck::Beside };
    for life in 0..3 {
        at.life = life;
        let turns = if rng.one_in(3) { rng.below(100) } else { rng.below(600) };
        let camera = Camera::watch(&world, &model, rng.next(), 1);
        session(&world, &model, rng.next(), turns);
        let mut shots = camera.shots();
        let next = (!shots.is_empty() && rng.one_in(2))
            .then(|| shots.swap_remove(rng.below(shots.len() as u64) as usize));
        for (i, mut shot) in shots.into_iter().enumerate() {
            at.shot = i;
            // A block that was torn in an earlier life has been counted there.
            shot.fresh = life == 0;
            look(shot, &mut rng, tally);
        }
        match next {
            Some(shot) => {
                (world, model) = (shot.world, shot.model);
                model.adopt();
            }
            // kill -9: what the session has left unsynced is still in the page cache.
            None => model.blocks.borrow_mut().iter_mut().for_each(|b| b.failed = true),
        }
    }
}

fn cuts(mode: PiMode, shard: u64) {
    let mut tally = Tally::default();
    let wanted = scaled(2_600);
    let mut seed = shard << 32;
    while tally.cuts < wanted {
        lives(mode, seed, &mut tally);
        seed += 1;
    }
    println!("{mode}: {tally:?}");
    // The test would prove little if nothing of this had happened.
    match mode {
        PiMode::Bitmap => assert!(tally.recomputed > 0),
        PiMode::Journal => assert!(tally.torn > 0),
    }
    assert!(tally.during_openings > 0);
}

macro_rules! shards {
    ($($name:ident: $mode:ident $shard:literal),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                cuts(PiMode::$mode, $shard);
            }
        )+
    };
}

shards! {
    a_cut_at_every_step_loses_nothing_flushed_and_raises_no_false_alarm_bitmap_1: Bitmap 1,
    a_cut_at_every_step_loses_nothing_flushed_and_raises_no_false_alarm_bitmap_2: Bitmap 2,
    a_cut_at_every_step_loses_nothing_flushed_and_raises_no_false_alarm_bitmap_3: Bitmap 3,
    a_cut_at_every_step_loses_nothing_flushed_and_raises_no_false_alarm_bitmap_4: Bitmap 4,
    a_cut_at_every_step_recomputes_nothing_and_reports_what_is_torn_journal_1: Journal 5,
    a_cut_at_every_step_recomputes_nothing_and_reports_what_is_torn_journal_2: Journal 6,
    a_cut_at_every_step_recomputes_nothing_and_reports_what_is_torn_journal_3: Journal 7,
    a_cut_at_every_step_recomputes_nothing_and_reports_what_is_torn_journal_4: Journal 8,
}
