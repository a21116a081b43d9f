//! Chains of images under whole LUNs on the embedded kernel: snapshots, of one LUN and of several, judged by qemu-img and `pi verify`.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    image::Format,
    peer::kernel::{Data, Kernel},
    pi::store::default_path,
};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{
    BLOCKS, Known, SIZE, chain, image_of, judge, make, new_lun, path, qemu_img, refused, start, start_named,
    tcmu_dif,
};
use rig::{Rig, Talk};

fn snapshot(device: &str, file: &Path) -> Value {
    json!({ "device": device, "snapshot-file": path(file) })
}

fn transaction(pairs: &[(&str, &Path)]) -> Value {
    let action = |(device, file): &(&str, &Path)| json!({ "type": "blockdev-snapshot-sync", "data": snapshot(device, file) });
    json!({ "actions": pairs.iter().map(action).collect::<Vec<_>>() })
}

#[test]
fn a_lun_goes_on_with_an_overlay_and_its_image_stays_what_it_was() {
    for format in [Format::Raw, Format::Qcow2] {
        for pi in [false, true] {
            let rig = Rig::new(Registry::default());
            let dir = rig.dir.path();
            let (old, mut known) = new_lun(&rig, format, pi);
            let mut talk = rig.talk();
            let mut left = vec![(old.clone(), format, known.disk.clone())];
            for i in 1..=3 {
                let file = dir.join(format!("over{i}.qcow2"));
                talk.get("blockdev-snapshot-sync", snapshot("vm1", &file));
                assert_eq!(image_of(&known), file);
                known.compare();
                known.steps(60);
                known.compare();
                left.push((file, Format::Qcow2, known.disk.clone()));
            }
            let blocks = talk.get("query-block", json!({}));
            let inserted = &blocks[0]["inserted"];
            assert_eq!(inserted["file"], path(&left[3].0), "{blocks}");
            assert_eq!(inserted["image"]["backing-image"]["filename"], path(&left[2].0), "{blocks}");
            assert_eq!(known.guest.flush(), 0);
            let top = left[3].0.clone();
            assert_eq!(chain(&top), left.iter().rev().map(|(file, ..)| file.clone()).collect::<Vec<_>>());
            known.guest.lun.stop().unwrap();
            for (file, format, disk) in &left {
                judge(file, *format, pi, disk, dir);
            }
            // Whoever still names the first image gets the newest.
            let disk = known.disk;
            let mut known = Known { disk, ..start(&rig, &old, pi) };
            assert_eq!(image_of(&known), top);
            known.compare();
            known.guest.lun.stop().unwrap();
        }
    }
}

/// Keeps 32 writes of 4 KiB under way, each of which says where it belongs and in which turn it came, until that is told; gives the turn of
/// each place.
fn load(kernel: &mut Kernel, turns: &mut [u32], mut done: impl FnMut() -> bool) {
    let places = turns.len() as u32;
    let mut turn = *turns.iter().max().unwrap();
    let mut over = false;
    while !over || kernel.in_flight() > 0 {
        over = over || done();
        while !over && kernel.in_flight() < 32 {
            turn += 1;
            let place = turn.wrapping_mul(2_654_435_761) % places;
            kernel.submit(&write(place), Data::Out(&content(place, turn))).unwrap();
            turns[place as usize] = turn;
        }
        for ended in kernel.wait(Duration::from_secs(20)).unwrap() {
            assert_eq!(ended.status, 0);
        }
    }
}

fn command(opcode: u8, place: u32) -> Vec<u8> {
    let mut cdb = vec![opcode, 0];
    cdb.extend((place * 8).to_be_bytes());
    cdb.extend([0, 0, 8, 0]);
    cdb
}

fn write(place: u32) -> Vec<u8> {
    command(0x2a, place)
}

fn content(place: u32, turn: u32) -> Vec<u8> {
    [turn.to_be_bytes(), place.to_be_bytes()].concat().repeat(512)
}

/// Places whose turns come again while one is under way may end in any order: only that one of them is there is sure.
fn check_load(kernel: &mut Kernel, turns: &[u32]) {
    for (place, turn) in turns.iter().enumerate().filter(|(_, turn)| **turn > 0) {
        let read = kernel.execute(&command(0x28, place as u32), Data::In(4096)).unwrap();
        assert_eq!(read.status, 0);
        let found = u32::from_be_bytes(read.data[..4].try_into().unwrap());
        assert!(found > 0 && found <= *turn, "{place}: {found}, and not {turn}");
        assert!(found + 64 > *turn || found == *turn, "{place}: {found}, and not {turn}");
        assert_eq!(read.data, content(place as u32, found), "{place}");
    }
}

/// Calls QMP commands one after the other on a thread of its own, and tells when it is through.
fn meanwhile<W: FnOnce(&mut Talk) + Send + 'static>(rig: &Rig, work: W) -> impl FnMut() -> bool + use<W> {
    let mut talk = rig.talk();
    let thread = std::thread::spawn(move || work(&mut talk));
    let mut thread = Some(thread);
    move || {
        if thread.as_ref().is_some_and(|t| t.is_finished()) {
            thread.take().unwrap().join().unwrap();
        }
        thread.is_none()
    }
}

#[test]
fn thirty_two_commands_at_a_time_pass_through_ten_snapshots_without_an_error() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path().to_owned();
        let image = dir.join("disk.raw");
        make(&image, Format::Raw, pi);
        let mut known = start(&rig, &image, pi);
        let mut turns = vec![0; (BLOCKS / 8) as usize];
        let files: Vec<PathBuf> = (0..10).map(|i| dir.join(format!("over{i}.qcow2"))).collect();
        let top = files[9].clone();
        let done = meanwhile(&rig, move |talk| {
            for file in files {
                talk.get("blockdev-snapshot-sync", snapshot("vm1", &file));
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        load(&mut known.guest.kernel, &mut turns, done);
        check_load(&mut known.guest.kernel, &turns);
        assert_eq!(image_of(&known), top);
        known.guest.lun.stop().unwrap();
        assert_eq!(chain(&top).len(), 11);
        assert!(qemu_img(&["check", path(&top)]).contains("No errors were found"));
        if pi {
            let (good, said) = tcmu_dif(&["pi", "verify", path(&top)], None);
            assert!(good, "{said}");
        }
    }
}

#[test]
fn a_corrupt_block_below_an_overlay_stays_an_error_and_a_scrub_finds_it() {
    use std::os::unix::fs::FileExt;
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(4000, &[9; 512]), 0);
    let mut talk = rig.talk();
    talk.get("blockdev-snapshot-sync", snapshot("vm1", &rig.dir.path().join("over.qcow2")));
    assert_eq!(known.guest.read(4000, 1), 0);
    let file = std::fs::File::options().write(true).open(&old).unwrap();
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    assert_eq!(known.guest.read(4000, 1), 2);
    // Part of its cluster is taken over: the block does not get a guard that fits.
    assert_eq!(known.guest.write(4001, &[7; 512]), 0);
    assert_eq!(known.guest.read(4000, 1), 2);
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 0 }));
    let found = talk.event("PI_MISMATCH");
    assert_eq!(found["data"]["lba"], 4000, "{found}");
    assert_eq!(known.guest.write(4000, &[5; 512]), 0);
    assert_eq!(known.guest.read(4000, 1), 0);
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_scrub_goes_on_across_a_snapshot() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, true);
    let mut talk = rig.talk();
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &vec![7; 1 << 20]), 0);
    }
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 2 << 20 }));
    talk.get("blockdev-snapshot-sync", snapshot("vm1", &rig.dir.path().join("over.qcow2")));
    talk.get("block-job-set-speed", json!({ "device": "scrub-vm1", "speed": 0 }));
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let pi = talk.get("query-pi", json!({ "device": "vm1" }));
        if pi[0]["scrub"]["status"] == "concluded" {
            let scrub = &pi[0]["scrub"];
            assert_eq!((&scrub["mismatches"], &scrub["verified"]), (&json!(0), &json!(BLOCKS)), "{pi}");
            break;
        }
        assert!(Instant::now() < end, "{pi}");
        std::thread::sleep(Duration::from_millis(5));
    }
    known.guest.lun.stop().unwrap();
}

#[test]
fn an_empty_overlay_that_is_there_is_taken_and_nothing_else_is() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (old, mut known) = new_lun(&rig, Format::Raw, false);
    let mut talk = rig.talk();
    let size = SIZE.to_string();
    let over = |name: &str, words: &[&str]| {
        let file = dir.join(name);
        qemu_img(&[&["create", "-q", "-f", "qcow2"], words, &[path(&file), &size]].concat());
        file
    };
    let below = ["-u", "-b", path(&old), "-F", "raw"];
    let good = over("good.qcow2", &below);
    let full = over("full.qcow2", &["-u", "-b", path(&old), "-F", "raw"]);
    let said = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 5 0 4096", path(&over("alone.qcow2", &[]))])
        .output();
    let alone = dir.join("alone.qcow2");
    if said.is_ok_and(|out| out.status.success()) {
        qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", path(&old), "-F", "raw", path(&alone)]);
        std::fs::copy(&alone, &full).unwrap();
    }
    let other = over("other.qcow2", &[]);
    let unsaid = over("unsaid.qcow2", &["-u", "-b", path(&dir.join("good.qcow2")), "-F", "qcow2"]);
    std::fs::write(dir.join("there.qcow2"), b"x").unwrap();
    let existing = |file: &Path| {
        let mut arguments = snapshot("vm1", file);
        arguments["mode"] = "existing".into();
        arguments
    };
    let mut cases = vec![
        (existing(&other), "its backing file is none"),
        (existing(&unsaid), "and not"),
        (existing(&dir.join("none.qcow2")), "no such file"),
        (existing(&dir.join("there.qcow2")), "qcow2"),
        (snapshot("vm1", &dir.join("there.qcow2")), "exists already"),
        (snapshot("vm1", Path::new("new.qcow2")), "not absolute"),
        (snapshot("vm1", &dir.join("no/new.qcow2")), "directory does not exist"),
        (snapshot("vm1", &dir.join("n".repeat(230))), "the kernel takes 255"),
        (json!({ "device": "vm1", "snapshot-file": "/a", "format": "raw" }), "qcow2"),
        (json!({ "snapshot-file": "/a" }), "neither"),
        (json!({ "device": "vm1", "node-name": "vm1", "snapshot-file": "/a" }), "both"),
        (json!({ "device": "vm2", "snapshot-file": "/a" }), "not served"),
    ];
    if alone.exists() && std::fs::metadata(&full).unwrap().len() > 262_144 {
        cases.push((existing(&full), "data of its own"));
    }
    for (arguments, reason) in cases {
        let said = refused(&talk.ask("blockdev-snapshot-sync", arguments.clone()));
        assert!(said.contains(reason), "{arguments}: {said}");
    }
    assert_eq!(image_of(&known), old);
    assert!(!dir.join("new.qcow2").exists());
    known.steps(20);
    talk.get("blockdev-snapshot-sync", existing(&good));
    known.steps(20);
    known.compare();
    known.guest.lun.stop().unwrap();
    judge(&good, Format::Qcow2, false, &known.disk, dir);
}

#[test]
fn a_snapshot_and_a_mirror_do_not_meet_and_what_cannot_be_a_backing_file_is_refused() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (_, known) = new_lun(&rig, Format::Raw, true);
    let mut talk = rig.talk();
    let new = dir.join("new.raw");
    talk.get("drive-mirror", json!({ "device": "vm1", "target": path(&new), "sync": "full", "speed": 1 }));
    let over = dir.join("over.qcow2");
    let said = refused(&talk.ask("blockdev-snapshot-sync", snapshot("vm1", &over)));
    assert!(said.contains("has a job already") && !over.exists(), "{said}");
    talk.get("block-job-cancel", json!({ "device": "vm1", "force": true }));
    talk.job();
    known.guest.lun.stop().unwrap();
    // Its sidecar is where the chain would not look for it.
    let image = dir.join("far.raw");
    make(&image, Format::Raw, true);
    let sidecar = dir.join("elsewhere.pi");
    std::fs::rename(default_path(&image), &sidecar).unwrap();
    let config = tcmu_dif::lun::config::DeviceConfig {
        pi: Some(tcmu_dif::pi::PiType::Type1),
        sidecar: Some(sidecar),
        ..tcmu_dif::lun::config::DeviceConfig::new(&image)
    };
    let guest = rig.start("far", config, SIZE);
    let said = refused(&talk.ask("blockdev-snapshot-sync", snapshot("far", &over)));
    assert!(said.contains("elsewhere.pi") && !over.exists(), "{said}");
    guest.lun.stop().unwrap();
}

#[test]
fn a_transaction_takes_all_snapshots_or_none() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let mut luns = Vec::new();
    for (name, pi) in [("vm1", true), ("vm2", false), ("vm3", true)] {
        let image = dir.join(format!("{name}.raw"));
        make(&image, Format::Raw, pi);
        let mut known = start_named(&rig, name, &image, pi);
        known.steps(30);
        luns.push((name, image, pi, known));
    }
    let file = |name: &str, turn: u32| dir.join(format!("{name}-{turn}.qcow2"));
    let mut talk = rig.talk();
    // The last of them cannot.
    std::fs::write(file("vm3", 1), b"x").unwrap();
    let (a, b, c) = (file("vm1", 1), file("vm2", 1), file("vm3", 1));
    let all = [("vm1", &*a), ("vm2", &*b), ("vm3", &*c)];
    let said = refused(&talk.ask("transaction", transaction(&all)));
    assert!(said.contains("vm3-1.qcow2") && said.contains("exists already"), "{said}");
    for (_, image, _, known) in &mut luns {
        assert_eq!(image_of(known), *image);
        known.steps(10);
    }
    assert!(!a.exists() && !b.exists() && !default_path(&a).exists());
    std::fs::remove_file(&c).unwrap();
    for (more, reason) in [
        (transaction(&[("vm1", &a), ("vm1", &b)]), "once"),
        (transaction(&[("vm1", &a), ("vm9", &b)]), "not served"),
        (json!({ "actions": [{ "type": "blockdev-snapshot", "data": {} }] }), "does not accept value"),
        (json!({ "actions": [{ "type": "blockdev-snapshot-sync", "data": {} }] }), "snapshot-file"),
        (json!({ "actions": [{ "type": "blockdev-snapshot-sync" }] }), "'data' is missing"),
    ] {
        let said = refused(&talk.ask("transaction", more.clone()));
        assert!(said.contains(reason), "{more}: {said}");
    }
    assert_eq!(talk.get("transaction", json!({ "actions": [] })), json!({}));

    talk.get("transaction", transaction(&all));
    let left: Vec<Vec<u8>> = luns.iter().map(|(.., known)| known.disk.clone()).collect();
    for (name, _, _, known) in &mut luns {
        assert_eq!(image_of(known), file(name, 1));
        known.steps(30);
        known.compare();
    }
    // By the command line, under load.
    let pairs: Vec<String> =
        luns.iter().flat_map(|(name, ..)| [(*name).to_owned(), path(&file(name, 2)).to_owned()]).collect();
    let mut words = vec!["snapshot", "--json"];
    words.extend(pairs.iter().map(String::as_str));
    let (good, said) = tcmu_dif(&words, Some(&dir));
    assert!(good, "{said}");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told[2]["image"], path(&file("vm3", 2)));
    for ((name, image, pi, mut known), left) in luns.into_iter().zip(left) {
        known.steps(20);
        known.compare();
        known.guest.lun.stop().unwrap();
        judge(&image, Format::Raw, pi, &left, &dir);
        judge(&file(name, 2), Format::Qcow2, pi, &known.disk, &dir);
    }
}

#[test]
fn the_snapshots_of_a_transaction_are_of_one_point_in_time() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path().to_owned();
    let images = ["vm1", "vm2"].map(|name| dir.join(format!("{name}.raw")));
    images.iter().for_each(|image| make(image, Format::Raw, false));
    let [mut one, mut two] = [0, 1].map(|i| start_named(&rig, ["vm1", "vm2"][i], &images[i], false));
    let file = |name: &str| dir.join(format!("{name}.qcow2"));
    let (a, b) = (file("vm1"), file("vm2"));
    let mut done = meanwhile(&rig, move |talk| {
        std::thread::sleep(Duration::from_millis(50));
        talk.get("transaction", transaction(&[("vm1", &a), ("vm2", &b)]));
    });
    // Each turn is written to the first, and when that is answered to the second.
    let (mut turn, mut after) = (0u32, 0);
    while after < 50 {
        turn += 1;
        for known in [&mut one, &mut two] {
            assert_eq!(known.guest.write(turn % 1000, &[turn.to_be_bytes(); 128].concat()), 0);
        }
        after += u32::from(done());
    }
    one.guest.lun.stop().unwrap();
    two.guest.lun.stop().unwrap();
    let last = |image: &Path| {
        let disk = std::fs::read(image).unwrap();
        (0..1000).map(|lba| u32::from_be_bytes(disk[lba * 512..][..4].try_into().unwrap())).max().unwrap()
    };
    let (first, second) = (last(&images[0]), last(&images[1]));
    assert!(first == second || first == second + 1, "{first} and {second}");
    assert!(first > 0 && first < turn);
}

#[test]
fn the_command_line_takes_a_snapshot() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let dir = rig.dir.path();
    let over = dir.join("over.qcow2");
    let (good, said) = tcmu_dif(&["snapshot", "vm1", path(&over)], Some(dir));
    assert!(good && said.contains("over.qcow2"), "{said}");
    known.steps(20);
    known.compare();
    let (good, said) = tcmu_dif(&["snapshot", "vm1", path(&over)], Some(dir));
    assert!(!good && said.contains("exists already") && said.contains("next: "), "{said}");
    let (good, said) = tcmu_dif(&["snapshot", "vm1", "/a", "vm2"], Some(dir));
    assert!(!good && said.contains("it has no FILE"), "{said}");
    known.guest.lun.stop().unwrap();
    judge(&over, Format::Qcow2, true, &known.disk, dir);
}
