//! Images with one thing damaged, checked and repaired: the verdict is qemu-img's, a repair changes nothing that the guest reads,
//! and may be cut off or fail at any step.

use std::{collections::BTreeMap, path::Path, rc::Rc};

use serde_json::Value;
use tcmu_dif::{
    image::qcow2::{CheckReport, Qcow2, Repair, check_on, repair_on},
    sys::mem::Buffer,
    units::ByteOffset,
    volume::Volume,
};

use crate::{
    gallery::Gallery,
    sim::{self, Cut, SimDisk},
    support::{Rng, run, scale},
    walk::walk,
};

const PATH: &str = "/damaged.qcow2";
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes(b.try_into().unwrap()))
}

type Words = BTreeMap<&'static str, Vec<usize>>;

/// Where the words of a sound image's tables lie, by what they are.
fn words(bytes: &[u8]) -> Words {
    let cluster = 1usize << be32(bytes, 20);
    let mut found = Words::new();
    let mut l1s = vec![("L1", "L2", be64(bytes, 40) as usize, be32(bytes, 36) as usize)];
    if be32(bytes, 60) > 0 {
        let table = be64(bytes, 64) as usize;
        found.entry("snapshot").or_default().extend((0..5).map(|i| table + i * 8));
        l1s.push((
            "snapshot's L1",
            "snapshot's L2",
            be64(bytes, table) as usize,
            be32(bytes, table + 8) as usize,
        ));
    }
    for (l1_name, l2_name, l1, entries) in l1s {
        for i in 0..entries {
            found.entry(l1_name).or_default().push(l1 + i * 8);
            let l2 = (be64(bytes, l1 + i * 8) & OFFSET) as usize;
            if l2 != 0 {
                found.entry(l2_name).or_default().extend((0..(cluster / 8).min(200)).map(|j| l2 + j * 8));
            }
        }
    }
    let table = be64(bytes, 48) as usize;
    for i in 0..(be32(bytes, 56) as usize * cluster / 8).min(4) {
        found.entry("refcount table").or_default().push(table + i * 8);
        let block = be64(bytes, table + i * 8) as usize;
        if block != 0 {
            found.entry("refcount block").or_default().extend((0..12).map(|j| block + j * 8));
        }
    }
    found.retain(|_, words| {
        words.retain(|at| at + 8 <= bytes.len());
        !words.is_empty()
    });
    found
}

/// A word damaged: which, of what kind, and how.
struct Damage {
    what: String,
    kind: &'static str,
}

/// Damages a word of an image whose tables lie there.
fn damage(bytes: &mut [u8], words: &Words, rng: &mut Rng) -> Damage {
    let (kind, places) = words.iter().nth(rng.below(words.len() as u64) as usize).unwrap();
    let at = places[rng.below(places.len() as u64) as usize];
    let old = be64(bytes, at);
    let bits = be32(bytes, 20);
    let len = bytes.len() as u64;
    let some = rng.below((len >> bits) + 1) << bits;
    let block = be64(bytes, be64(bytes, 48) as usize);
    let value = match rng.below(12) {
        0 => 0,
        1 => old ^ COPIED,
        2 => old ^ 1 << rng.below(64),
        3 => some,
        4 => some | COPIED,
        5 => rng.next(),
        6 => (len + (1 << bits)) | COPIED,
        7 => old.wrapping_add(512),
        8 => old | 1,
        9 => block,
        10 => be64(bytes, 40) | COPIED,
        _ => u64::MAX,
    };
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    Damage { what: format!("{kind} at {at:#x}: {old:#x} becomes {value:#x}"), kind }
}

/// The images that are damaged, with their names; none needs a backing file to be read.
fn images() -> Vec<(String, Vec<u8>)> {
    let gallery = Gallery::new(true);
    let alone = |name: &str| !["base", "middle", "top", "empty"].iter().any(|n| name.starts_with(n));
    let mut images: Vec<(String, Vec<u8>)> = Vec::new();
    for path in &gallery.images {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if alone(&name) {
            images.push((name, std::fs::read(path).unwrap()));
        }
    }
    images
}

async fn checked(bytes: &[u8]) -> tcmu_dif::volume::Result<CheckReport> {
    let disk = SimDisk::new(bytes, 1, 0);
    check_on(&disk, Path::new(PATH), &mut |_, _| ()).await
}

async fn repaired(bytes: &[u8], what: Repair) -> tcmu_dif::volume::Result<(CheckReport, Vec<u8>)> {
    let disk = SimDisk::new(bytes, 1, 0);
    let report = repair_on(&disk, Path::new(PATH), what, &mut |_, _| ()).await?;
    // What a repair has done is durable when it ends.
    Ok((report, disk.cut(Cut::Oldest, &mut Rng::new(1))))
}

/// (corruptions, leaks, errors) and the exit status of qemu-img check; `None` if it does not open the image.
fn judged(bytes: &[u8]) -> Option<((u64, u64, u64), i32)> {
    let file = tempfile::Builder::new().suffix(".qcow2").tempfile().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let out = run("qemu-img", &["check", "-f", "qcow2", "--output=json", file.path().to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&out.stdout).ok()?;
    let number = |key: &str| json[key].as_u64().unwrap_or(0);
    Some(((number("corruptions"), number("leaks"), number("check-errors")), out.status.code()?))
}

/// What the guest reads, by pieces: `None` where reading fails.
async fn guest(bytes: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let disk = SimDisk::new(bytes, 1, 0);
    let image = Qcow2::open_on(disk, Path::new(PATH), true, None).await.ok()?;
    let size = image.limits().capacity;
    let mut pieces = Vec::new();
    for at in (0..size).step_by(4096) {
        let sg = Buffer::zeroed((size - at).min(4096) as usize).sg();
        pieces.push(image.read(ByteOffset(at), &sg).await.ok().map(|()| sg.to_vec()));
    }
    Some(pieces)
}

/// Whether everything that could be read before can be, and is the same.
fn kept(before: &Option<Vec<Option<Vec<u8>>>>, after: &Option<Vec<Option<Vec<u8>>>>) -> bool {
    let Some(before) = before else { return true };
    let Some(after) = after else { return false };
    before.iter().zip(after).all(|(before, after)| before.is_none() || before == after)
}

#[test]
fn one_damaged_word_is_judged_as_qemu_judges_and_a_repair_keeps_what_the_guest_reads() {
    let images = images();
    let mut rng = Rng::new(5);
    let (mut same, mut mended, mut left) = (0, 0, 0);
    let rounds = 150 * scale();
    for round in 0..rounds {
        let (name, good) = &images[rng.below(images.len() as u64) as usize];
        let mut bytes = good.clone();
        let Damage { what, kind } = damage(&mut bytes, &words(good), &mut rng);
        let what = format!("round {round}, {name}, {what}");
        let theirs = judged(&bytes);
        let (bytes, what) = (Rc::new(bytes), Rc::new(what));
        let (damaged, told) = (bytes.clone(), what.clone());
        let outcome = sim::run(async move {
            let report = checked(&damaged).await.ok()?;
            let before = guest(&damaged).await;
            let (after, fixed) = repaired(&damaged, Repair::All).await.unwrap();
            assert!(kept(&before, &guest(&fixed).await), "{told}: the guest reads something else");
            assert!(!report.is_clean() || after.is_clean(), "{told}: {:?}", after.findings);
            Some((report, after, fixed))
        });
        let Some((report, after, fixed)) = outcome else {
            assert!(theirs.is_none_or(|(_, status)| status != 0), "{what}: only we refuse it");
            continue;
        };
        if let Some((numbers, status)) = theirs {
            let ours = (report.corruptions, report.leaks, report.check_errors);
            let clean = ours == (0, 0, 0);
            assert!(!clean || status == 0, "{what}: qemu-img {numbers:?}, we find nothing");
            // qemu-img gives up at a refcount table entry that points nowhere; and it has no word for tables that overlap with matching refcounts.
            let known = kind == "refcount table" && status == 1
                || status != 2
                    && report.findings.iter().any(|f| f.contains("lies where something else does"));
            let known =
                known || report.findings.iter().any(|f| f.contains("a zero cluster in a version 2 image"));
            let class = |corruptions: u64, leaks: u64, errors: u64| match () {
                () if errors > 0 => 1,
                () if corruptions > 0 => 2,
                () if leaks > 0 => 3,
                () => 0,
            };
            assert!(
                known || class(ours.0, ours.1, ours.2) == status,
                "{what}: qemu-img {numbers:?}, we {ours:?}: {:?}",
                report.findings
            );
            same += u64::from(ours == numbers);
        }
        if after.is_clean() {
            mended += 1;
            assert_eq!(judged(&fixed).map(|j| j.1), Some(0), "{what}: repaired, and qemu-img finds more");
            // The test's own checker knows no bitmaps.
            assert!(name.starts_with("bitmaps") || walk(&fixed) == Ok(0), "{what}: {:?}", walk(&fixed));
        } else {
            left += 1;
        }
    }
    println!("{rounds} damages: {same} with qemu-img's very numbers, {mended} mended, {left} not altogether");
    assert!(same > rounds * 3 / 4 && mended > rounds / 2, "{same} {mended} {left}");
}

#[test]
fn a_repair_of_leaks_lowers_refcounts_and_touches_nothing_else() {
    let mut rng = Rng::new(8);
    for (name, good) in images() {
        let table = be64(&good, 48) as usize;
        let block = be64(&good, table) as usize;
        let width = 1usize << if be32(&good, 4) == 2 { 4 } else { be32(&good, 96) };
        if width < 8 {
            continue;
        }
        let mut bytes = good.clone();
        let clusters = bytes.len() >> be32(&bytes, 20);
        for _ in 0..5 {
            // The last byte of a big-endian refcount.
            let cluster = rng.below(clusters.min((1 << be32(&bytes, 20)) * 8 / width) as u64) as usize;
            let byte = &mut bytes[block + (cluster + 1) * width / 8 - 1];
            *byte = byte.saturating_add(2);
        }
        let judged_before = judged(&bytes).unwrap();
        let (told, original) = (name.clone(), good.clone());
        let fixed = sim::run(async move {
            let report = checked(&bytes).await.unwrap();
            assert_eq!((report.corruptions, report.leaks), (judged_before.0.0, judged_before.0.1), "{told}");
            let (after, fixed) = repaired(&bytes, Repair::Leaks).await.unwrap();
            assert!(kept(&guest(&original).await, &guest(&fixed).await), "{told}");
            assert_eq!((after.leaks, after.leaks_fixed), (0, report.leaks), "{told}");
            let (after, fixed) = repaired(&fixed, Repair::All).await.unwrap();
            assert!(after.is_clean(), "{told}: {:?}", after.findings);
            assert!(kept(&guest(&original).await, &guest(&fixed).await), "{told}");
            fixed
        });
        assert_eq!(judged(&fixed).unwrap().1, 0, "{name}");
    }
}

/// Damages of several kinds at once, so that a repair has every step to do.
fn much_damaged(good: &[u8], rng: &mut Rng) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let words = words(good);
    for _ in 0..1 + rng.below(4) {
        damage(&mut bytes, &words, rng);
    }
    bytes
}

#[test]
fn a_repair_cut_off_or_failing_at_any_step_keeps_the_guests_bytes_and_can_be_done_again() {
    let images: Vec<_> = images().into_iter().filter(|(_, bytes)| bytes.len() < 1 << 22).collect();
    let mut rng = Rng::new(77);
    let mut cuts = 0;
    for round in 0..30 * scale() {
        let (name, good) = &images[rng.below(images.len() as u64) as usize];
        let bytes = much_damaged(good, &mut rng);
        let told = format!("round {round}, {name}");
        let seed = rng.next();
        cuts += sim::run(async move {
            let mut rng = Rng::new(seed);
            let before = guest(&bytes).await;
            let Ok((end, _)) = repaired(&bytes, Repair::All).await else { return 0 };
            let mut cuts = 0;
            let mut step = 0;
            loop {
                let disk = SimDisk::new(&bytes, 1, 0);
                disk.fail_in.set(Some(step));
                let result = repair_on(&disk, Path::new(PATH), Repair::All, &mut |_, _| ()).await;
                if !disk.failed.get() {
                    result.unwrap();
                    break;
                }
                for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Prefix] {
                    let left = disk.cut(how, &mut rng);
                    cuts += 1;
                    assert!(kept(&before, &guest(&left).await), "{told}, step {step}, {how:?}");
                    let (again, fixed) = repaired(&left, Repair::All).await.unwrap();
                    assert!(kept(&before, &guest(&fixed).await), "{told}, step {step}, {how:?}, again");
                    // All that one repair mends, two mend.
                    assert!(
                        again.is_clean() || !end.is_clean(),
                        "{told}, step {step}, {how:?}: {:?}, without the cut {:?}",
                        again.findings,
                        end.findings
                    );
                }
                step += 1 + rng.below(3);
            }
            cuts
        });
    }
    println!("{cuts} cuts");
    assert!(cuts > 200, "{cuts}");
}

#[test]
fn rubbish_in_the_tables_is_survived_and_never_called_clean_when_qemu_finds_damage() {
    let images: Vec<_> = images().into_iter().filter(|(_, bytes)| bytes.len() < 1 << 22).collect();
    let mut rng = Rng::new(31);
    for round in 0..120 * scale() {
        let (name, good) = &images[rng.below(images.len() as u64) as usize];
        let mut bytes = good.clone();
        let words = words(good);
        for _ in 0..1 + rng.below(8) {
            if rng.one_in(8) {
                let at = rng.below(112.min(bytes.len() as u64)) as usize;
                bytes[at] = rng.next() as u8;
                continue;
            }
            let places = words.values().nth(rng.below(words.len() as u64) as usize).unwrap();
            let at = places[rng.below(places.len() as u64) as usize] + rng.below(8) as usize;
            bytes[at] = match rng.below(3) {
                0 => 0xff,
                1 => bytes[at] ^ 1 << rng.below(8),
                _ => rng.next() as u8,
            };
        }
        if rng.one_in(6) {
            bytes.truncate(rng.below(bytes.len() as u64) as usize);
        }
        let told = format!("round {round}, {name}");
        let theirs = if round % 2 == 0 { judged(&bytes) } else { None };
        sim::run(async move {
            let disk = SimDisk::new(&bytes, 1, 0);
            let report = check_on(&disk, Path::new(PATH), &mut |_, _| ()).await;
            assert!(disk.steps.get() < 100_000, "{told}: {} steps", disk.steps.get());
            let Ok(report) = report else { return };
            if let Some((numbers, status)) = theirs {
                assert!(!report.is_clean() || !matches!(status, 2 | 3), "{told}: qemu-img {numbers:?}");
            }
            let before = guest(&bytes).await;
            for what in [Repair::Leaks, Repair::All] {
                if let Ok((_, fixed)) = repaired(&bytes, what).await {
                    assert!(kept(&before, &guest(&fixed).await), "{told}, {what:?}");
                }
            }
        });
    }
}
