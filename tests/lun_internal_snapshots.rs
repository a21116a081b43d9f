//! Internal snapshots of LUNs in use, over whole LUNs on the embedded kernel, led over QMP and by the command line; QEMU reads what they hold.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::{control::Registry, image::Format, peer::kernel::Data, pi::store::default_path};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{Known, SIZE, judge, make, path, qemu_img, refused, start_named, tcmu_dif};
use rig::{Rig, Talk};

const TAKE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";
/// Blocks that a guest writes with numbers.
const PLACES: usize = 64;
const PLACE: usize = 4096;
/// From one to the next: each in a cluster of its own.
const STRIDE: usize = SIZE as usize / PLACES;

struct Lun {
    name: &'static str,
    image: PathBuf,
    known: Known,
}

fn lun(rig: &Rig, name: &'static str, format: Format, pi: bool) -> Lun {
    let image = rig.dir.path().join(format!("{name}.{format}"));
    make(&image, format, pi);
    let known = start_named(rig, name, &image, pi);
    Lun { name, image, known }
}

impl Lun {
    /// Stops it: its image is whole and has what the guest knows.
    fn judge(self, rig: &Rig, pi: bool) {
        let format =
            if self.image.extension().is_some_and(|e| e == "raw") { Format::Raw } else { Format::Qcow2 };
        let mut known = self.known;
        known.compare();
        known.guest.lun.stop().unwrap();
        judge(&self.image, format, pi, &known.disk, rig.dir.path());
    }
}

/// The names of a LUN's internal snapshots, by query-block.
fn names(talk: &mut Talk, lun: &str) -> Vec<String> {
    let blocks = talk.get("query-block", json!({}));
    let found = blocks.as_array().unwrap().iter().find(|block| block["device"] == lun).unwrap();
    let all = found["inserted"]["image"]["snapshots"].as_array().cloned().unwrap_or_default();
    all.iter().map(|s| s["name"].as_str().unwrap().to_owned()).collect()
}

/// What QEMU reads in a snapshot, beside the LUN that has the image.
fn read_by_qemu(dir: &Path, image: &Path, name: &str) -> Vec<u8> {
    let raw = dir.join("read.raw");
    let which = format!("snapshot.name={name}");
    qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", "-l", &which, path(image), path(&raw)]);
    std::fs::read(raw).unwrap()
}

fn write(place: usize) -> Vec<u8> {
    let mut cdb = vec![0x2a, 0];
    cdb.extend(((place * STRIDE / 512) as u32).to_be_bytes());
    cdb.extend([0, 0, (PLACE / 512) as u8, 0]);
    cdb
}

fn content(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(PLACE / 8)
}

/// The number that stands in a place of a disk; all of it has to have it.
fn number(disk: &[u8], place: usize) -> u64 {
    let block = &disk[place * STRIDE..][..PLACE];
    let number = u64::from_be_bytes(block[..8].try_into().unwrap());
    assert!(block == content(number), "place {place} is torn");
    number
}

#[test]
fn snapshots_are_of_their_moment_under_eight_writes_at_a_time_and_the_disk_goes_on() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let mut vm1 = lun(&rig, "vm1", Format::Qcow2, pi);
        let mut next = 0_u64;
        // By place: the number that was answered last, and the one that was begun last.
        let (mut answered, mut begun) = ([0_u64; PLACES], [0_u64; PLACES]);
        for place in 0..PLACES {
            next += 1;
            let done = vm1.known.guest.kernel.execute(&write(place), Data::Out(&content(next))).unwrap();
            assert_eq!(done.status, 0);
            (answered[place], begun[place]) = (next, next);
        }
        let mut kept = Vec::new();
        for round in 0..6 {
            let mut other = rig.talk();
            let least = answered;
            let taker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(2 * round));
                if round > 2 {
                    other.get(DELETE, json!({ "device": "vm1", "name": format!("s{}", round - 3) }));
                }
                other.get(TAKE, json!({ "device": "vm1", "name": format!("s{round}") }));
            });
            let kernel = &mut vm1.known.guest.kernel;
            let mut under_way = std::collections::HashMap::new();
            let mut done = false;
            // Some more once it is taken.
            let mut left = 200;
            while left > 0 || !under_way.is_empty() {
                let most = (!done && taker.is_finished()).then_some(begun);
                if let Some(most) = most {
                    done = true;
                    kept.push((round, least, most));
                }
                while under_way.len() < 8 && left > 0 {
                    next += 1;
                    let place = (next.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % PLACES;
                    if under_way.values().any(|(at, _)| *at == place) {
                        continue;
                    }
                    let id = kernel.submit(&write(place), Data::Out(&content(next))).unwrap();
                    begun[place] = next;
                    under_way.insert(id, (place, next));
                    left -= u32::from(done);
                }
                for ended in kernel.wait(Duration::from_secs(20)).unwrap() {
                    let (place, number) = under_way.remove(&ended.id).unwrap();
                    assert_eq!(ended.status, 0);
                    answered[place] = number;
                }
            }
            taker.join().unwrap();
        }
        for (round, least, most) in kept.drain(..).skip(3) {
            let disk = read_by_qemu(rig.dir.path(), &vm1.image, &format!("s{round}"));
            for place in 0..PLACES {
                let found = number(&disk, place);
                assert!(
                    (least[place]..=most[place]).contains(&found),
                    "snapshot s{round}, place {place}: {found}, and should be {} to {}",
                    least[place],
                    most[place]
                );
            }
        }
        assert_eq!(names(&mut rig.talk(), "vm1"), ["s3", "s4", "s5"]);
        for (place, number) in answered.iter().enumerate() {
            vm1.known.disk[place * STRIDE..][..PLACE].copy_from_slice(&content(*number));
        }
        // All that the LUN reads as, its tuples, and qemu-img's check with three snapshots in the image.
        vm1.judge(&rig, pi);
    }
}

#[test]
fn a_snapshot_can_be_gone_back_to_when_the_lun_has_stopped() {
    let rig = Rig::new(Registry::default());
    let mut vm1 = lun(&rig, "vm1", Format::Qcow2, false);
    vm1.known.steps(50);
    let then = vm1.known.disk.clone();
    rig.talk().get(TAKE, json!({ "device": "vm1", "name": "before" }));
    vm1.known.steps(200);
    assert!(vm1.known.disk != then);
    let image = vm1.image.clone();
    vm1.judge(&rig, false);
    let (ok, said) = tcmu_dif(&["image", "snapshot", "-a", "before", path(&image)], None);
    assert!(ok, "{said}");
    judge(&image, Format::Qcow2, false, &then, rig.dir.path());
}

#[test]
fn snapshots_of_two_luns_are_one_cut_with_backups_and_bitmaps_and_all_are_taken_or_none() {
    let rig = Rig::new(Registry::default());
    let mut vm1 = lun(&rig, "vm1", Format::Qcow2, true);
    let mut vm2 = lun(&rig, "vm2", Format::Qcow2, false);
    let raw = lun(&rig, "raw", Format::Raw, false);
    let mut talk = rig.talk();
    let action = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    let within = |lun: &str, name: &str| action(TAKE, json!({ "device": lun, "name": name }));
    let all = |actions: &[Value]| json!({ "actions": actions });
    let bitmap =
        |verb: &str| action(&format!("block-dirty-bitmap-{verb}"), json!({ "node": "vm1", "name": "daily" }));
    let (dir, images) = (rig.dir.path(), [vm1.image.clone(), vm2.image.clone()]);
    let orders = |mut talk: Talk| {
        for round in 0..5 {
            let name = format!("cut{round}");
            talk.get("transaction", all(&[within("vm2", &name), within("vm1", &name)]));
            let [a, b] = images.each_ref().map(|image| number(&read_by_qemu(dir, image, &name), 0));
            assert!(a == b || a == b + 1, "round {round}: {a} and {b}");
        }
        // Refused: by the LUN itself, by another, by its name, by an abort.
        for (actions, words) in [
            (vec![within("vm1", "none"), within("raw", "none")], "a raw image has no internal snapshots"),
            (vec![within("vm1", "none"), within("vm2", "cut0")], "'cut0'"),
            (vec![within("vm1", "none"), within("vm1", "none")], "'none'"),
            (vec![within("vm1", "none"), action("abort", json!({}))], "Abort action"),
            (vec![bitmap("add"), within("vm1", "none"), bitmap("add")], "daily"),
            (vec![within("vm1", "none"), bitmap("clear")], "daily"),
        ] {
            let said = refused(&talk.ask("transaction", all(&actions)));
            assert!(said.contains(words), "{said}");
            assert!(!names(&mut talk, "vm1").contains(&"none".to_owned()), "{actions:?}");
        }
        let full = dir.join("full.qcow2");
        let backup = json!({ "device": "vm1", "target": path(&full), "sync": "full", "format": "qcow2" });
        let order = all(&[bitmap("add"), within("vm1", "with"), action("drive-backup", backup)]);
        talk.get("transaction", order);
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
        let copy = dir.join("full.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(&full), path(&copy)]);
        let held = read_by_qemu(dir, &images[0], "with");
        assert!(std::fs::read(copy).unwrap() == held, "the backup and the snapshot are of one moment");
    };
    // Each number goes to vm1, and when that is answered to vm2.
    std::thread::scope(|scope| {
        let talk = rig.talk();
        let ordered = scope.spawn(|| orders(talk));
        let mut number = 0;
        while !ordered.is_finished() {
            number += 1;
            for known in [&mut vm1.known, &mut vm2.known] {
                let done = known.guest.kernel.execute(&write(0), Data::Out(&content(number))).unwrap();
                assert_eq!(done.status, 0);
                known.disk[..PLACE].copy_from_slice(&content(number));
            }
        }
        ordered.join().unwrap();
    });
    for (lun, pi) in [(vm1, true), (vm2, false)] {
        assert_eq!(names(&mut talk, lun.name).len(), 5 + usize::from(pi));
        lun.judge(&rig, pi);
    }
    raw.judge(&rig, false);
}

#[test]
fn what_cannot_be_is_refused_in_words_and_a_job_excludes_it() {
    let rig = Rig::new(Registry::default());
    let vm1 = lun(&rig, "vm1", Format::Qcow2, false);
    let mut talk = rig.talk();
    let take = |name: &str| json!({ "device": "vm1", "name": name });
    talk.get(TAKE, take("one"));
    let long = "x".repeat(256);
    for (verb, arguments, words) in [
        (TAKE, take("one"), "'one'"),
        (TAKE, take(""), "1 to 255 bytes"),
        (TAKE, take(&long), "1 to 255 bytes"),
        (TAKE, take("a\nb"), "control characters"),
        (TAKE, json!({ "device": "vm7", "name": "a" }), "vm7"),
        (TAKE, json!({ "device": "vm1" }), "name"),
        (DELETE, json!({ "device": "vm1" }), "Name or id must be provided"),
        (DELETE, take("two"), "there is no snapshot 'snapshot.name=two'"),
        (DELETE, json!({ "device": "vm1", "id": "9" }), "there is no snapshot"),
        (DELETE, json!({ "device": "vm1", "id": "1", "name": "two" }), "the ID '1' and the name 'two'"),
    ] {
        let said = refused(&talk.ask(verb, arguments));
        assert!(said.contains(words), "{verb}: {said}");
    }
    let target = rig.dir.path().join("copy.qcow2");
    let mirror =
        json!({ "device": "vm1", "job-id": "m", "target": path(&target), "sync": "full", "format": "qcow2" });
    talk.get("drive-mirror", mirror);
    for (verb, name) in [(TAKE, "two"), (DELETE, "one")] {
        let said = refused(&talk.ask(verb, take(name)));
        assert!(said.contains("has a job already"), "{said}");
    }
    talk.get("job-cancel", json!({ "id": "m" }));
    talk.job();
    let gone = talk.get(DELETE, json!({ "device": "vm1", "id": "1", "name": "one" }));
    assert_eq!((&gone["id"], &gone["name"]), (&json!("1"), &json!("one")));
    assert!(gone["date-sec"].as_u64().unwrap() > 1_600_000_000 && gone["vm-state-size"] == 0, "{gone}");
    assert!(names(&mut talk, "vm1").is_empty());
    assert!(!default_path(&vm1.image).exists());
    vm1.judge(&rig, false);
}

#[test]
fn the_command_line_takes_and_deletes_them() {
    let rig = Rig::new(Registry::default());
    let [vm1, vm2] = ["vm1", "vm2"].map(|name| lun(&rig, name, Format::Qcow2, false));
    let run = |words: &[&str]| tcmu_dif(&[&["snapshot"], words].concat(), Some(rig.dir.path()));
    let mut talk = rig.talk();
    for words in [&["--internal", "vm1", "a"][..], &["vm1", "b", "vm2", "b", "--internal"]] {
        let (ok, said) = run(words);
        assert!(ok && said.contains("TAKEN"), "{said}");
    }
    assert_eq!(names(&mut talk, "vm1"), ["a", "b"]);
    assert_eq!(names(&mut talk, "vm2"), ["b"]);
    let (ok, said) = run(&["--delete", "vm1", "a", "vm2", "b", "--json"]);
    assert!(ok, "{said}");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told, json!([{ "lun": "vm1", "deleted": "a" }, { "lun": "vm2", "deleted": "b" }]));
    assert_eq!(names(&mut talk, "vm1"), ["b"]);
    let (ok, said) = run(&["--delete", "vm1", "a"]);
    assert!(!ok && said.contains("there is no snapshot"), "{said}");
    for lun in [vm1, vm2] {
        lun.judge(&rig, false);
    }
}
