//! Dirty bitmaps against a naive set, and what is left of them by backups, merges, resizes and by what is undone.
#![allow(clippy::single_range_in_vec_init)] // One run is a list of one.

use super::*;
use crate::storage::sim::{Rng, scaled};

const G: u64 = 4096;

fn runs(bits: &Bits) -> Vec<Range<u64>> {
    bits.runs().collect()
}

#[test]
fn bits_are_those_of_a_naive_set_at_any_granularity() {
    for seed in 0..scaled(200) {
        let mut rng = Rng::new(seed);
        let capacity = 512 * (1 + rng.below(40_000));
        let (fine, coarse) = (512u64 << rng.below(4), 512u64 << rng.below(8));
        let (mut a, mut b) = (Bits::new(capacity, fine), Bits::new(capacity, coarse));
        let mut naive = vec![false; capacity.div_ceil(fine) as usize];
        for _ in 0..rng.below(20) {
            let (at, len) = (rng.below(capacity + 1000), rng.below(200_000));
            a.set(at, len);
            for (g, bit) in naive.iter_mut().enumerate() {
                let (start, end) = (g as u64 * fine, ((g as u64 + 1) * fine).min(capacity));
                *bit |= at < end && start < (at + len).min(capacity) && len > 0;
            }
        }
        let mut seen = vec![false; naive.len()];
        for run in a.runs() {
            assert!(run.start < run.end && run.end <= capacity);
            seen[(run.start / fine) as usize..run.end.div_ceil(fine) as usize].fill(true);
        }
        assert_eq!(seen, naive, "seed {seed}");
        b.add(&a);
        for run in a.runs() {
            assert!(b.runs().any(|r| r.start <= run.start && run.end <= r.end), "seed {seed}: {run:?}");
        }
        assert_eq!(Bits::from_words(capacity, fine, a.words().to_vec()), a);
    }
}

fn one() -> Bitmaps {
    let bitmaps = Bitmaps::default();
    bitmaps.add("a", 100 * G, G, false, true).unwrap();
    bitmaps
}

fn marked(bitmaps: &Bitmaps) -> Vec<Range<u64>> {
    runs(&bitmaps.with("a", |b| b.bits.clone()).unwrap())
}

#[test]
fn a_change_is_marked_when_it_is_over_or_dropped_and_not_forgotten_by_a_clear_meanwhile() {
    let bitmaps = one();
    let under_way = bitmaps.changing(5 * G + 1, 1);
    assert!(marked(&bitmaps).is_empty());
    bitmaps.clear("a").unwrap();
    let taken = bitmaps.lend("a").unwrap();
    assert!(runs(&taken).is_empty());
    drop(under_way);
    bitmaps.give_back("a", BitmapMode::OnSuccess, true, [].into_iter());
    assert_eq!(marked(&bitmaps), [5 * G..6 * G]);
}

#[test]
fn what_a_backup_leaves_of_its_bitmap_is_as_it_was_told() {
    let left = 3 * G..4 * G;
    for (mode, good, expected) in [
        (BitmapMode::OnSuccess, true, vec![9 * G..10 * G]),
        (BitmapMode::OnSuccess, false, vec![2 * G..4 * G, 9 * G..10 * G]),
        (BitmapMode::Never, true, vec![2 * G..4 * G, 9 * G..10 * G]),
        (BitmapMode::Never, false, vec![2 * G..4 * G, 9 * G..10 * G]),
        (BitmapMode::Always, true, vec![9 * G..10 * G]),
        (BitmapMode::Always, false, vec![left.clone(), 9 * G..10 * G]),
    ] {
        let bitmaps = one();
        drop(bitmaps.changing(2 * G, 2 * G));
        assert_eq!(runs(&bitmaps.lend("a").unwrap()), [2 * G..4 * G]);
        drop(bitmaps.changing(9 * G, 1));
        let busy = BitmapError::Busy("a".into());
        assert_eq!(bitmaps.clear("a"), Err(busy.clone()));
        assert_eq!(bitmaps.remove("a"), Err(busy));
        // Nothing is lost if it ends here.
        assert_eq!(bitmaps.infos()[0].count, 3 * G);
        let left = if good { None } else { Some(left.clone()) };
        bitmaps.give_back("a", mode, good, left.into_iter());
        assert_eq!(marked(&bitmaps), expected, "{mode:?} {good}");
    }
}

#[test]
fn a_merge_is_all_or_nothing_and_an_inconsistent_one_can_only_be_removed() {
    let bitmaps = one();
    bitmaps.add("b", 100 * G, 16 * G, false, false).unwrap();
    let kept = KeptBitmap { name: "old".into(), enabled: true, bits: None, granularity: G };
    bitmaps.replace_kept(100 * G, vec![kept]);
    drop(bitmaps.changing(0, 1));
    assert_eq!(bitmaps.infos().iter().map(|i| i.count).collect::<Vec<_>>(), [G, 0, 0]);
    let inconsistent = BitmapError::Inconsistent("old".into());
    assert_eq!(bitmaps.merge("b", &["a".into(), "old".into()]), Err(inconsistent.clone()));
    assert_eq!(bitmaps.infos()[1].count, 0);
    bitmaps.merge("b", &["a".into()]).unwrap();
    assert_eq!(bitmaps.infos()[1].count, 16 * G);
    assert_eq!(bitmaps.lend("old").unwrap_err(), inconsistent);
    assert_eq!(bitmaps.enable("old", true), Err(inconsistent));
    assert_eq!(bitmaps.to_keep().len(), 1);
    bitmaps.remove("old").unwrap();
    assert!(bitmaps.to_keep().is_empty());
    assert_eq!(bitmaps.add("a", G, G, false, true), Err(BitmapError::Exists("a".into())));
    assert_eq!(bitmaps.add("", G, G, false, true), Err(BitmapError::Name));
    assert_eq!(bitmaps.add("c", G, 1000, false, true), Err(BitmapError::Granularity(1000)));
    assert_eq!(bitmaps.clear("x"), Err(BitmapError::NotFound("x".into())));
}

#[test]
fn another_size_keeps_what_is_marked_and_marks_nothing_else() {
    let bitmaps = one();
    drop(bitmaps.changing(99 * G, G));
    bitmaps.resize(200 * G);
    assert_eq!(marked(&bitmaps), [99 * G..100 * G]);
    drop(bitmaps.changing(199 * G, G));
    bitmaps.resize(100 * G);
    bitmaps.resize(200 * G);
    assert_eq!(marked(&bitmaps), [99 * G..100 * G]);
}

#[test]
fn what_is_undone_is_as_it_was_and_stands_where_it_stood() {
    let bitmaps = one();
    bitmaps.add("b", 100 * G, G, false, true).unwrap();
    bitmaps.add("c", 100 * G, G, false, false).unwrap();
    drop(bitmaps.changing(3 * G, G));
    let all = bitmaps.infos();
    let former = bitmaps.former(["b", "a", "new", "b", "c"].into_iter());
    bitmaps.remove("a").unwrap();
    bitmaps.merge("c", &["b".into()]).unwrap();
    bitmaps.lend("b").unwrap();
    bitmaps.enable("c", true).unwrap();
    bitmaps.add("new", 100 * G, G, false, true).unwrap();
    assert_ne!(bitmaps.infos(), all);
    bitmaps.restore(former);
    assert_eq!(bitmaps.infos(), all);
    assert_eq!(marked(&bitmaps), [3 * G..4 * G]);
    // Those that are not named are left alone.
    bitmaps.add("d", 100 * G, G, false, true).unwrap();
    let former = bitmaps.former(["a"].into_iter());
    bitmaps.clear("a").unwrap();
    bitmaps.remove("b").unwrap();
    bitmaps.restore(former);
    let names: Vec<String> = bitmaps.infos().into_iter().map(|b| b.name).collect();
    assert_eq!(names, ["a", "c", "d"]);
    assert_eq!(marked(&bitmaps), [3 * G..4 * G]);
}

#[test]
fn runs_in_units_are_those_of_a_naive_set_rounded_outward() {
    for seed in 0..scaled(300) {
        let mut rng = Rng::new(seed);
        let unit = 512u64 << rng.below(4);
        let capacity = unit * (1 + rng.below(2000));
        let mut bits = Bits::new(capacity, 512 << rng.below(7));
        let mut naive = vec![false; (capacity / unit) as usize];
        for _ in 0..rng.below(12) {
            bits.set(rng.below(capacity), 1 + rng.below(30_000));
        }
        for run in bits.runs() {
            naive[(run.start / unit) as usize..run.end.div_ceil(unit) as usize].fill(true);
        }
        let first = rng.below(naive.len() as u64);
        let last = first + 1 + rng.below(naive.len() as u64 - first);
        let most = 1 + rng.below(20) as usize;
        let mut at = first * unit;
        // As a client asks: from where the last answer ended.
        while at < last * unit {
            let runs = bits.runs_in(at, last * unit, unit, most);
            assert!(!runs.is_empty() && runs.len() <= most);
            for (len, set) in runs {
                assert!(len > 0 && len % unit == 0, "seed {seed}: {len}");
                let units = (at / unit) as usize..((at + len) / unit) as usize;
                assert!(naive[units].iter().all(|is| *is == set), "seed {seed}: {len} from {at}");
                at += len;
            }
        }
        assert_eq!(at, last * unit);
    }
}

#[test]
fn what_is_exposed_is_busy_and_is_what_it_was_if_a_backup_has_it() {
    let bitmaps = one();
    bitmaps.add("b", 100 * G, G, false, false).unwrap();
    let kept = KeptBitmap { name: "old".into(), enabled: true, bits: None, granularity: G };
    bitmaps.replace_kept(100 * G, vec![kept]);
    drop(bitmaps.changing(2 * G, G));
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let (nobody, lent) = (|_: &str| false, |name: &str| name == "a");
    let free = bitmaps.infos();
    for (asked, refused) in [
        (&["b", "x"][..], BitmapError::NotFound("x".into())),
        (&["b", "old"], BitmapError::Inconsistent("old".into())),
        (&["b", "a"], BitmapError::Enabled("a".into())),
        (&["b", "b"], BitmapError::Busy("b".into())),
    ] {
        assert_eq!(bitmaps.expose(&names(asked), nobody, false), Err(refused));
        assert_eq!(bitmaps.infos(), free, "all or nothing");
    }
    // Nobody lends what is not lent.
    assert_eq!(bitmaps.expose(&names(&["a"]), lent, false), Err(BitmapError::Busy("a".into())));
    let live = bitmaps.expose(&names(&["a", "b"]), nobody, true).unwrap();
    for verb in
        [bitmaps.clear("a"), bitmaps.remove("b"), bitmaps.enable("b", true), bitmaps.lend("a").map(drop)]
    {
        assert!(matches!(verb, Err(BitmapError::Busy(_))), "{verb:?}");
    }
    let of = |number, lent| bitmaps.exposed(number, lent, 0..100 * G, 512, 9);
    assert_eq!(of(live[0], false), Some(vec![(2 * G, false), (G, true), (97 * G, false)]));
    drop(bitmaps.changing(0, 2 * G));
    assert_eq!(of(live[0], false), Some(vec![(3 * G, true), (97 * G, false)]));
    bitmaps.cover(&live);
    assert_eq!(of(live[0], false), None);

    bitmaps.lend("a").unwrap();
    assert_eq!(bitmaps.expose(&names(&["a"]), nobody, true), Err(BitmapError::Busy("a".into())));
    let past = bitmaps.expose(&names(&["a"]), lent, false).unwrap();
    drop(bitmaps.changing(50 * G, G));
    assert_eq!(of(past[0], true), Some(vec![(3 * G, true), (97 * G, false)]), "it is as it was");
    bitmaps.give_back("a", BitmapMode::OnSuccess, true, [].into_iter());
    assert_eq!(of(past[0], true), None);
    assert!(matches!(bitmaps.remove("a"), Err(BitmapError::Busy(_))));
    bitmaps.cover(&past);
    assert_eq!(marked(&bitmaps), [50 * G..51 * G]);
    bitmaps.remove("a").unwrap();
    // Another of its name is another.
    bitmaps.add("a", 100 * G, G, false, false).unwrap();
    let next = bitmaps.expose(&names(&["a"]), nobody, false).unwrap();
    assert!(of(past[0], false).is_none() && of(next[0], false).is_some());
}
