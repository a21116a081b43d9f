//! Transactions of backups and dirty bitmaps over whole LUNs on the embedded kernel, led over QMP, and judged by qemu-img and `pi verify`.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
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

/// A granule of a bitmap, and of a backup.
const G: u64 = 65536;
const GRANULES: u64 = SIZE / G;

fn action(kind: &str, data: Value) -> Value {
    json!({ "type": kind, "data": data })
}

fn bitmap(verb: &str, node: &str, name: &str) -> Value {
    action(&format!("block-dirty-bitmap-{verb}"), json!({ "node": node, "name": name }))
}

fn with(mut value: Value, more: Value) -> Value {
    value["data"].as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    value
}

fn backup(device: &str, target: &Path, more: Value) -> Value {
    let data = json!({ "device": device, "target": path(target), "sync": "full", "format": "qcow2" });
    with(action("drive-backup", data), more)
}

fn all(actions: &[Value]) -> Value {
    json!({ "actions": actions })
}

fn grouped(actions: &[Value]) -> Value {
    json!({ "actions": actions, "properties": { "completion-mode": "grouped" } })
}

/// The bitmaps of a LUN, by query-block.
fn bitmaps(talk: &mut Talk, lun: &str) -> Value {
    let blocks = talk.get("query-block", json!({}));
    let found = blocks.as_array().unwrap().iter().find(|block| block["device"] == lun).unwrap();
    found["inserted"]["dirty-bitmaps"].clone()
}

fn count(talk: &mut Talk, lun: &str, name: &str) -> u64 {
    let all = bitmaps(talk, lun);
    let found = all.as_array().into_iter().flatten().find(|b| b["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {all}"))["count"].as_u64().unwrap()
}

/// Waits until there are no jobs.
fn idle(talk: &mut Talk) {
    let end = Instant::now() + Duration::from_secs(60);
    while talk.get("query-jobs", json!({})) != json!([]) {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An increment over a backup, and the disk that both make.
fn increment(talk: &mut Talk, lun: &str, over: &Path, file: &Path, name: &str) {
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(over), "-F", "qcow2", path(file)]);
    let mut order = backup(lun, file, json!({ "mode": "existing", "sync": "incremental", "bitmap": name }));
    talk.get("drive-backup", order["data"].take());
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    idle(talk);
}

struct Lun {
    name: &'static str,
    image: PathBuf,
    known: Known,
}

fn luns<const N: usize>(rig: &Rig, names: [&'static str; N], pi: bool) -> [Lun; N] {
    names.map(|name| {
        let image = rig.dir.path().join(format!("{name}.qcow2"));
        make(&image, Format::Qcow2, pi);
        let known = start_named(rig, name, &image, pi);
        Lun { name, image, known }
    })
}

#[test]
fn a_backup_and_a_bitmap_that_is_cleared_are_of_one_moment_under_eight_writes_at_a_time() {
    for sync in ["clear", "add"] {
        let rig = Rig::new(Registry::default());
        let [mut lun] = luns(&rig, ["vm1"], false);
        let full = rig.dir.path().join("full.qcow2");
        let mut talk = rig.talk();
        let first = match sync {
            "clear" => {
                let before = with(bitmap("add", "vm1", "daily"), json!({ "persistent": true }));
                talk.get("block-dirty-bitmap-add", before["data"].clone());
                bitmap("clear", "vm1", "daily")
            }
            _ => with(bitmap("add", "vm1", "daily"), json!({ "persistent": true })),
        };
        // The job is slow, so that much is written while it is under way.
        let order = all(&[first, backup("vm1", &full, json!({ "speed": 1 << 20 }))]);
        let mut thread = None;
        let kernel = &mut lun.known.guest.kernel;
        for granule in 0..GRANULES {
            if granule == 30 {
                let (order, mut other) = (order.clone(), rig.talk());
                thread = Some(std::thread::spawn(move || {
                    other.get("transaction", order);
                }));
            }
            while granule == 100 && thread.as_ref().is_some_and(|t| !t.is_finished()) {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(100));
            while kernel.in_flight() >= 8 {
                kernel.wait(Duration::from_secs(20)).unwrap().iter().for_each(|e| assert_eq!(e.status, 0));
            }
            let lba = (granule * G / 512) as u32;
            let mut cdb = vec![0x2a, 0];
            cdb.extend(lba.to_be_bytes());
            cdb.extend([0, 0, 8, 0]);
            kernel.submit(&cdb, Data::Out(&[granule as u8 | 1; 4096])).unwrap();
            lun.known.disk[(granule * G) as usize..][..4096].fill(granule as u8 | 1);
        }
        while kernel.in_flight() > 0 {
            kernel.wait(Duration::from_secs(20)).unwrap().iter().for_each(|e| assert_eq!(e.status, 0));
        }
        thread.unwrap().join().unwrap();
        talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
        idle(&mut talk);
        let marked = count(&mut talk, "vm1", "daily") / G;
        let raw = rig.dir.path().join("full.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(&full), path(&raw)]);
        let held = std::fs::read(raw).unwrap();
        let held = (0..GRANULES).filter(|g| held[(g * G) as usize] != 0).count() as u64;
        assert!((22..=101).contains(&held), "{held}");
        assert_eq!(held + marked, GRANULES, "{held} in the backup, {marked} in the bitmap");
        // Nothing is missing from the next one.
        let next = rig.dir.path().join("next.qcow2");
        increment(&mut talk, "vm1", &full, &next, "daily");
        assert_eq!(count(&mut talk, "vm1", "daily"), 0);
        lun.known.guest.lun.stop().unwrap();
        judge(&next, Format::Qcow2, false, &lun.known.disk, rig.dir.path());
        judge(&lun.image, Format::Qcow2, false, &lun.known.disk, rig.dir.path());
    }
}

#[test]
fn the_backups_of_two_luns_are_one_consistent_cut_and_so_are_their_bitmaps() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path().to_owned();
        let [mut one, mut two] = luns(&rig, ["vm1", "vm2"], pi);
        let file = |name: &str| dir.join(format!("{name}-full.qcow2"));
        let named = |name| with(bitmap("add", name, "since"), json!({ "granularity": 512 }));
        let order = all(&[
            named("vm1"),
            backup("vm1", &file("vm1"), json!({})),
            backup("vm2", &file("vm2"), json!({})),
            named("vm2"),
        ]);
        let mut talk = rig.talk();
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            talk.get("transaction", order);
            talk
        });
        // Each turn is written to the first, and when that is answered to the second.
        let (mut turn, mut after) = (0u32, 0);
        while after < 50 {
            for lun in [&mut one, &mut two] {
                let data = [turn.to_be_bytes(); 128].concat();
                assert_eq!(lun.known.guest.write(turn % 16384, &data), 0);
                lun.known.disk[(turn % 16384) as usize * 512..][..512].copy_from_slice(&data);
            }
            turn += 1;
            after += u32::from(thread.is_finished());
        }
        let mut talk = thread.join().unwrap();
        idle(&mut talk);
        let marked = [&one, &two].map(|lun| count(&mut talk, lun.name, "since") / 512);
        let whole = turn <= 16384;
        let then = [one, two].map(|mut lun| {
            lun.known.compare();
            lun.known.guest.lun.stop().unwrap();
            judge(&lun.image, Format::Qcow2, pi, &lun.known.disk, &dir);
            let raw = dir.join("judged.raw");
            qemu_img(&["convert", "-f", "qcow2", "-O", "raw", path(&file(lun.name)), path(&raw)]);
            let disk = std::fs::read(raw).unwrap();
            judge(&file(lun.name), Format::Qcow2, pi, &disk, &dir);
            let turn = |at: usize| u32::from_be_bytes(disk[at * 512..][..4].try_into().unwrap());
            u64::from((0..16384).map(turn).max().unwrap()) + 1
        });
        assert!(then[0] == then[1] || then[0] == then[1] + 1, "{then:?}");
        assert!(then[0] > 1 && then[0] < u64::from(turn), "{then:?} of {turn}");
        if whole {
            assert_eq!([then[0] + marked[0], then[1] + marked[1]], [u64::from(turn); 2]);
        }
    }
}

#[test]
fn an_action_that_fails_leaves_everything_as_it_was() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path().to_owned();
        let [mut one, mut two] = luns(&rig, ["vm1", "vm2"], pi);
        let mut talk = rig.talk();
        let full = dir.join("full.qcow2");
        let add = |name, more| with(bitmap("add", "vm1", name), more);
        one.known.steps(20);
        talk.get(
            "transaction",
            all(&[
                add("daily", json!({ "persistent": true })),
                add("off", json!({ "disabled": true })),
                add("weekly", json!({ "granularity": 4096 })),
                backup("vm1", &full, json!({})),
            ]),
        );
        idle(&mut talk);
        one.known.steps(20);
        two.known.steps(5);
        let before = bitmaps(&mut talk, "vm1");
        assert!(before[0]["count"] != 0 && before[1]["count"] == 0 && before[2]["count"] != 0, "{before}");
        let (a, b) = (dir.join("a.qcow2"), dir.join("b.qcow2"));
        let there = dir.join("there.qcow2");
        std::fs::write(&there, b"x").unwrap();
        let changes = [
            bitmap("clear", "vm1", "daily"),
            bitmap("enable", "vm1", "off"),
            action(
                "block-dirty-bitmap-merge",
                json!({ "node": "vm1", "target": "off", "bitmaps": ["weekly", { "node": "vm1", "name": "daily" }] }),
            ),
            bitmap("remove", "vm1", "weekly"),
            add("new", json!({ "persistent": true })),
            backup("vm1", &a, json!({ "bitmap": "new", "bitmap-mode": "on-success" })),
        ];
        for (last, reason) in [
            (vec![bitmap("clear", "vm1", "none")], "Dirty bitmap 'none' not found"),
            // Taken by the backup, or gone, by then.
            (vec![bitmap("clear", "vm1", "new")], "Bitmap 'new' is currently in use by another operation"),
            (vec![bitmap("clear", "vm1", "weekly")], "Dirty bitmap 'weekly' not found"),
            (vec![add("daily", json!({}))], "Bitmap already exists: daily"),
            (vec![bitmap("clear", "vm2", "daily")], "Dirty bitmap 'daily' not found"),
            (vec![backup("vm2", &there, json!({}))], "exists already"),
            (
                vec![backup("vm2", &b, json!({})), action("abort", json!({}))],
                "Transaction aborted using Abort action",
            ),
            (
                vec![action("abort", json!({})), bitmap("clear", "vm2", "daily")],
                "Dirty bitmap 'daily' not found",
            ),
        ] {
            let actions: Vec<Value> = changes.iter().cloned().chain(last).collect();
            let said = refused(&talk.ask("transaction", all(&actions)));
            assert!(said.contains(reason), "{said}, and not {reason}");
            assert_eq!(bitmaps(&mut talk, "vm1"), before, "{reason}");
            assert_eq!(talk.get("query-jobs", json!({})), json!([]), "{reason}");
            for file in [&a, &b] {
                assert!(!file.exists() && !default_path(file).exists(), "{reason}");
            }
            one.known.compare();
        }
        // What is still marked is what the next backup needs, and nothing else keeps it from beginning.
        one.known.steps(10);
        if !pi {
            let next = dir.join("next.qcow2");
            increment(&mut talk, "vm1", &full, &next, "daily");
            judge(&next, Format::Qcow2, false, &one.known.disk, &dir);
        }
        two.known.steps(5);
        talk.get("transaction", all(&changes));
        idle(&mut talk);
        let after = bitmaps(&mut talk, "vm1");
        let names: Vec<&str> =
            after.as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["daily", "off", "new"], "{after}");
        assert!(after[1]["recording"] == true && after[1]["count"] != 0, "{after}");
        judge(&a, Format::Qcow2, pi, &one.known.disk, &dir);
        for lun in [one, two] {
            lun.known.guest.lun.stop().unwrap();
            judge(&lun.image, Format::Qcow2, pi, &lun.known.disk, &dir);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_in_words_and_nothing_is_done() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let [one, two] = luns(&rig, ["vm1", "vm2"], false);
    let mut talk = rig.talk();
    let (a, b) = (dir.join("a.qcow2"), dir.join("b.qcow2"));
    let clear = bitmap("clear", "vm1", "x");
    let over =
        |lun: &str| action("blockdev-snapshot-sync", json!({ "device": lun, "snapshot-file": path(&b) }));
    let full = |lun: &str, file: &Path| backup(lun, file, json!({}));
    for (actions, reason) in [
        (vec![action("frobnicate", json!({}))], "does not accept value 'frobnicate'"),
        (vec![json!({ "type": "abort" })], "'data' is missing"),
        (vec![action("abort", json!({ "x": 1 }))], "'x' is unexpected"),
        (vec![action("block-dirty-bitmap-clear", json!({ "node": "vm1" }))], "'name' is missing"),
        (vec![with(clear.clone(), json!({ "persistent": true }))], "'persistent' is unexpected"),
        (vec![with(full("vm1", &a), json!({ "sync": "most" }))], "does not accept value 'most'"),
        (vec![with(full("vm1", &a), json!({ "sync": "incremental" }))], "must provide a valid bitmap name"),
        (vec![full("vm1", &a), full("vm9", &b)], "LUN 'vm9' is not served"),
        (vec![full("vm1", &a), bitmap("clear", "vm9", "x")], "LUN 'vm9' is not served"),
        (vec![full("vm1", &a), full("vm1", &b)], "LUN 'vm1': a LUN can have a backup in a transaction once"),
        (vec![full("vm1", &a), over("vm1")], "make two of it"),
        (vec![over("vm1"), bitmap("add", "vm1", "x")], "make two of it"),
        (
            vec![full("vm1", &a), with(full("vm2", &b), json!({ "job-id": "vm1" }))],
            "Job ID 'vm1' already in use",
        ),
        (vec![action("abort", json!({}))], "Transaction aborted using Abort action"),
    ] {
        let said = refused(&talk.ask("transaction", all(&actions)));
        assert!(said.contains(reason), "{said}, and not {reason}");
    }
    let both = json!({ "actions": [], "properties": { "completion-mode": "both" } });
    let said = refused(&talk.ask("transaction", both));
    assert!(said.contains("does not accept value 'both'"), "{said}");
    assert!(!a.exists() && !b.exists());
    assert_eq!(bitmaps(&mut talk, "vm1"), Value::Null);
    one.known.guest.lun.stop().unwrap();
    two.known.guest.lun.stop().unwrap();
}

#[test]
fn a_backup_to_a_node_goes_to_an_image_that_is_there_and_that_no_lun_has() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let [mut one, mut two] = luns(&rig, ["vm1", "vm2"], true);
    let mut talk = rig.talk();
    one.known.steps(30);
    let target = dir.join("target.raw");
    let order = |target: &str| json!({ "device": "vm1", "target": target, "sync": "full" });
    for (target, reason) in [
        ("vm2", "node 'vm2' is a LUN's"),
        ("elsewhere", "Cannot find device='elsewhere' nor node-name='elsewhere'"),
        (path(&target), "No such file"),
        (path(&two.image), "is in use by"),
    ] {
        let said = refused(&talk.ask("blockdev-backup", order(target)));
        assert!(said.contains(reason), "{said}, and not {reason}");
    }
    assert!(!target.exists() && !default_path(&target).exists());
    make(&target, Format::Raw, true);
    talk.get("blockdev-backup", order(path(&target)));
    idle(&mut talk);
    judge(&target, Format::Raw, true, &one.known.disk, &dir);
    one.known.steps(30);
    // With a snapshot of another LUN.
    let over = dir.join("over.qcow2");
    talk.get(
        "transaction",
        all(&[
            action("blockdev-backup", order(path(&target))),
            action("blockdev-snapshot-sync", json!({ "device": "vm2", "snapshot-file": path(&over) })),
        ]),
    );
    idle(&mut talk);
    judge(&target, Format::Raw, true, &one.known.disk, &dir);
    two.known.steps(10);
    assert_eq!(known::image_of(&two.known), over);
    one.known.guest.lun.stop().unwrap();
    two.known.guest.lun.stop().unwrap();
    judge(&over, Format::Qcow2, true, &two.known.disk, &dir);
}

#[test]
fn backups_that_are_grouped_succeed_together_or_not_at_all() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let [mut one, mut two] = luns(&rig, ["vm1", "vm2"], false);
    let mut talk = rig.talk();
    for (turn, group) in [true, false, true].into_iter().enumerate() {
        let file = |name: &str| dir.join(format!("{name}-{turn}.qcow2"));
        let has = json!({ "bitmap": "since", "bitmap-mode": "on-success" });
        if turn == 0 {
            talk.get("transaction", all(&[bitmap("add", "vm1", "since"), bitmap("add", "vm2", "since")]));
        }
        one.known.steps(10);
        two.known.steps(10);
        let before = ["vm1", "vm2"].map(|lun| count(&mut talk, lun, "since"));
        assert!(before.iter().all(|marked| *marked > 0));
        let actions = [
            with(backup("vm1", &file("vm1"), has.clone()), json!({ "speed": 1 })),
            backup("vm2", &file("vm2"), has),
        ];
        talk.get("transaction", if group { grouped(&actions) } else { all(&actions) });
        let end = Instant::now() + Duration::from_secs(30);
        // The second one is quick.
        let waits = |jobs: &Value| jobs.as_array().unwrap().iter().any(|job| job["status"] == "waiting");
        loop {
            let jobs = talk.get("query-block-jobs", json!({}));
            let as_expected = match group {
                true => waits(&jobs),
                false => jobs.as_array().unwrap().len() == 1,
            };
            if as_expected {
                break;
            }
            assert!(Instant::now() < end, "{jobs}");
        }
        if turn == 2 {
            talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
            for _ in 0..2 {
                let done = talk.event("BLOCK_JOB_COMPLETED");
                assert!(done["data"].get("error").is_none(), "{done}");
            }
            idle(&mut talk);
            assert_eq!(["vm1", "vm2"].map(|lun| count(&mut talk, lun, "since")), [0, 0]);
            judge(&file("vm1"), Format::Qcow2, false, &one.known.disk, &dir);
            judge(&file("vm2"), Format::Qcow2, false, &two.known.disk, &dir);
            continue;
        }
        let quick = if group { "vm2" } else { "vm1" };
        // The one that waits can be cancelled as well as the other one.
        talk.get("block-job-cancel", json!({ "device": quick }));
        for _ in 0..if group { 2 } else { 1 } {
            talk.event("BLOCK_JOB_CANCELLED");
        }
        idle(&mut talk);
        let after = ["vm1", "vm2"].map(|lun| count(&mut talk, lun, "since"));
        assert_eq!(after, if group { before } else { [before[0], 0] });
    }
    one.known.guest.lun.stop().unwrap();
    two.known.guest.lun.stop().unwrap();
}

#[test]
fn bitmaps_take_part_while_a_job_is_under_way() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let [mut one] = luns(&rig, ["vm1"], false);
    let mut talk = rig.talk();
    one.known.steps(20);
    let (full, other) = (dir.join("full.qcow2"), dir.join("other.qcow2"));
    talk.get("transaction", all(&[bitmap("add", "vm1", "old"), backup("vm1", &full, json!({}))]));
    idle(&mut talk);
    one.known.steps(5);
    // What libvirt sends: what was written since a checkpoint, and the next checkpoint. Another job is in the way first.
    let second = dir.join("second.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(&full), "-F", "qcow2", path(&second)]);
    let bitmaps_only = [
        with(bitmap("add", "vm1", "tmp"), json!({ "disabled": true })),
        action("block-dirty-bitmap-merge", json!({ "node": "vm1", "target": "tmp", "bitmaps": ["old"] })),
        with(bitmap("add", "vm1", "new"), json!({ "persistent": true })),
    ];
    let wanted = json!({ "mode": "existing", "sync": "incremental", "bitmap": "tmp" });
    let whole: Vec<Value> = bitmaps_only.iter().cloned().chain([backup("vm1", &second, wanted)]).collect();
    talk.get(
        "drive-mirror",
        json!({ "job-id": "m", "device": "vm1", "target": path(&other), "sync": "full", "speed": 1 }),
    );
    let said = refused(&talk.ask("transaction", all(&whole)));
    assert!(said.contains("has a job already"), "{said}");
    talk.get("transaction", all(&[bitmap("add", "vm1", "aside")]));
    one.known.steps(2);
    assert!(count(&mut talk, "vm1", "aside") > 0);
    talk.get("block-job-cancel", json!({ "device": "m", "force": true }));
    idle(&mut talk);
    talk.get("transaction", all(&whole));
    let then = one.known.disk.clone();
    one.known.steps(5);
    idle(&mut talk);
    assert!(count(&mut talk, "vm1", "new") > 0);
    judge(&second, Format::Qcow2, false, &then, &dir);
    let third = dir.join("third.qcow2");
    increment(&mut talk, "vm1", &second, &third, "new");
    one.known.guest.lun.stop().unwrap();
    judge(&third, Format::Qcow2, false, &one.known.disk, &dir);
}

#[test]
fn the_command_line_backs_several_luns_up_at_once() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let [mut one, mut two] = luns(&rig, ["vm1", "vm2"], true);
    one.known.steps(20);
    two.known.steps(20);
    let (a, b) = (dir.join("a.qcow2"), dir.join("b.qcow2"));
    let (good, said) = tcmu_dif(&["backup", "vm1", path(&a), "vm9", path(&b)], Some(&dir));
    assert!(!good && said.contains("LUN 'vm9' is not served") && !a.exists(), "{said}");
    let (good, said) = tcmu_dif(&["backup", "vm1", path(&a), "vm2"], Some(&dir));
    assert!(!good && said.contains("it has no FILE") && said.contains("tcmu-dif backup vm1"), "{said}");
    let words = ["backup", "vm1", path(&a), "vm2", path(&b), "--job-id", "x"];
    let (good, said) = tcmu_dif(&words, Some(&dir));
    assert!(!good && said.contains("--job-id is for one LUN") && said.contains("next: "), "{said}");
    let (good, said) = tcmu_dif(&["backup", "vm1", path(&a), "vm2", path(&b), "--json"], Some(&dir));
    assert!(good, "{said}");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&told[1]["target"], &told[1]["done"]), (&json!(path(&b)), &json!(true)), "{told}");
    judge(&a, Format::Qcow2, true, &one.known.disk, &dir);
    judge(&b, Format::Qcow2, true, &two.known.disk, &dir);
    one.known.guest.lun.stop().unwrap();
    two.known.guest.lun.stop().unwrap();
}
