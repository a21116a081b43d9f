//! Dirty bitmaps of whole LUNs on the embedded kernel, and backups of what they have; QEMU reads ours, and we read QEMU's.
#![allow(clippy::unwrap_used)] // A test may panic.
#![allow(clippy::single_range_in_vec_init)] // One run is a list of one.

use std::{
    ops::Range,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{control::Registry, image::Format, pi::store::default_path};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{Known, SIZE, image_of, judge, make, new_lun, path, qemu_img, refused, start, tcmu_dif};
use rig::{Guest, MIB, Rig, Talk};

const G: u64 = 65536;

fn add(talk: &mut Talk, name: &str, more: Value) {
    let mut arguments = json!({ "node": "vm1", "name": name });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    talk.get("block-dirty-bitmap-add", arguments);
}

/// The bitmaps of the LUN, by query-block.
fn bitmaps(talk: &mut Talk) -> Value {
    let blocks = talk.get("query-block", json!({}));
    blocks[0]["inserted"]["dirty-bitmaps"].clone()
}

fn bitmap(talk: &mut Talk, name: &str) -> Value {
    let all = bitmaps(talk);
    let found = all.as_array().into_iter().flatten().find(|b| b["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {all}")).clone()
}

/// What qemu-img says of an image's bitmaps.
fn of_qemu(image: &Path) -> Vec<Value> {
    let info: Value = serde_json::from_str(&qemu_img(&["info", "-U", "--output=json", path(image)])).unwrap();
    info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default()
}

fn is_whole(image: &Path) {
    let said = qemu_img(&["check", path(image)]);
    assert!(said.contains("No errors were found"), "{said}");
}

/// What QEMU finds marked in a bitmap of an image that nobody uses: runs of bytes.
fn marked(image: &Path, name: &str) -> Vec<Range<u64>> {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-t", "-f", "qcow2", "-B", name, "-k", path(&socket), path(image)])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    while !socket.exists() {
        assert!(
            Instant::now() < end && server.try_wait().unwrap().is_none(),
            "qemu-nbd does not serve {name}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let what = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let map = qemu_img(&["map", "--output=json", "--image-opts", &what]);
    server.kill().unwrap();
    server.wait().unwrap();
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let mut runs: Vec<Range<u64>> = Vec::new();
    // Marked is told as a hole.
    for run in map.iter().filter(|run| run["data"] == false) {
        let (at, len) = (run["start"].as_u64().unwrap(), run["length"].as_u64().unwrap());
        match runs.last_mut() {
            Some(last) if last.end == at => last.end += len,
            _ => runs.push(at..at + len),
        }
    }
    runs
}

fn backup(target: &Path, more: Value) -> Value {
    let mut arguments = json!({ "device": "vm1", "target": target.display().to_string() });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    arguments
}

fn ended_well(talk: &mut Talk) {
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    while talk.event("JOB_STATUS_CHANGE")["data"]["status"] != "null" {}
}

fn write(guest: &mut Guest, at: u64, len: u64) {
    assert_eq!(guest.write((at / 512) as u32, &vec![0xa5; len as usize]), 0);
}

#[test]
fn qemu_reads_what_is_marked_here_after_an_orderly_stop() {
    for (cluster, pi, backing) in
        [("65536", false, false), ("65536", true, false), ("4096", false, true), ("512", false, false)]
    {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path();
        let image = dir.join("old.qcow2");
        let options = format!("cluster_size={cluster}");
        let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        let base = dir.join("base.raw");
        std::fs::write(&base, vec![1; SIZE as usize]).unwrap();
        let size = SIZE.to_string();
        if backing {
            words.extend(["-b", path(&base), "-F", "raw"]);
        }
        words.extend([path(&image), &size]);
        match pi {
            false => drop(qemu_img(&words)),
            true => make(&image, Format::Qcow2, true),
        }
        let mut known = start(&rig, &image, pi);
        let mut talk = rig.talk();
        add(&mut talk, "coarse", json!({ "persistent": true, "granularity": 1 << 20 }));
        add(&mut talk, "usual", json!({ "persistent": true }));
        add(&mut talk, "fine", json!({ "persistent": true, "granularity": 512 }));
        add(&mut talk, "off", json!({ "persistent": true, "disabled": true }));
        add(&mut talk, "lun", json!({ "granularity": 512 }));
        write(&mut known.guest, 3 * G + 512, 512);
        write(&mut known.guest, 7 * G - 512, 1024);
        write(&mut known.guest, SIZE - 512, 512);
        let told = bitmap(&mut talk, "usual");
        assert_eq!(
            told,
            json!({ "name": "usual", "count": 4 * G, "granularity": G, "recording": true, "busy": false, "persistent": true })
        );
        assert_eq!(bitmap(&mut talk, "off")["recording"], false);
        assert_eq!(bitmap(&mut talk, "lun")["count"], 4 * 512);
        assert!(of_qemu(&image).is_empty(), "they are stored at the end");
        known.guest.lun.stop().unwrap();
        is_whole(&image);
        let told = of_qemu(&image);
        let names: Vec<_> = told.iter().map(|b| b["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["coarse", "usual", "fine", "off"], "{told:?}");
        assert_eq!((&told[1]["flags"], &told[1]["granularity"]), (&json!(["auto"]), &json!(G)));
        assert_eq!(told[3]["flags"], json!([]));
        assert_eq!(marked(&image, "coarse"), [0..MIB, SIZE - MIB..SIZE]);
        assert_eq!(marked(&image, "usual"), [3 * G..4 * G, 6 * G..8 * G, SIZE - G..SIZE]);
        assert_eq!(
            marked(&image, "fine"),
            [3 * G + 512..3 * G + 1024, 7 * G - 512..7 * G + 512, SIZE - 512..SIZE]
        );
        assert_eq!(marked(&image, "off"), []);
        if backing {
            assert!(qemu_img(&["info", path(&image)]).contains(path(&base)));
        }
        if pi {
            let (good, said) = tcmu_dif(&["pi", "verify", path(&image)], None);
            assert!(good, "{said}");
        }
        // QEMU changes them, and they go on here.
        qemu_img(&["bitmap", "--merge", "fine", path(&image), "off"]);
        if pi {
            // QEMU has written to the image: it is no longer what its protection was left with.
            continue;
        }
        let mut known = start(&rig, &image, pi);
        assert!(of_qemu(&image).iter().all(|b| b["flags"].as_array().unwrap().contains(&json!("in-use"))));
        assert_eq!(bitmap(&mut talk, "off")["count"], 4 * G);
        assert_eq!(bitmap(&mut talk, "fine")["count"], 4 * 512);
        assert_eq!(
            bitmap(&mut talk, "lun")["inconsistent"],
            true,
            "nobody has marked there what QEMU changed"
        );
        write(&mut known.guest, 20 * G, G);
        known.guest.lun.stop().unwrap();
        is_whole(&image);
        assert_eq!(marked(&image, "usual"), [3 * G..4 * G, 6 * G..8 * G, 20 * G..21 * G, SIZE - G..SIZE]);
        assert_eq!(marked(&image, "off"), [3 * G..4 * G, 6 * G..8 * G, SIZE - G..SIZE]);
        // One after the other they go, and with the last the extension.
        let known = start(&rig, &image, pi);
        for name in ["coarse", "usual", "fine"] {
            talk.get("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": name }));
        }
        known.guest.lun.stop().unwrap();
        is_whole(&image);
        assert_eq!(of_qemu(&image).len(), 1);
        let known = start(&rig, &image, pi);
        talk.get("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": "off" }));
        known.guest.lun.stop().unwrap();
        is_whole(&image);
        assert!(of_qemu(&image).is_empty());
        let said = qemu_img(&["info", path(&image)]);
        assert!(!said.contains("inconsistent"), "{said}");
    }
}

#[test]
fn what_qemu_has_marked_is_read_here_and_gone_on_with() {
    let rig = Rig::new(Registry::default());
    let image = rig.dir.path().join("old.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), &SIZE.to_string()]);
    qemu_img(&["bitmap", "--add", "-g", "4096", path(&image), "a"]);
    qemu_img(&["bitmap", "--add", "--disable", path(&image), "b"]);
    let out = Command::new("qemu-io").args(["-c", "write -P 7 1M 8k", path(&image)]).output().unwrap();
    assert!(out.status.success());
    let mut known = start(&rig, &image, false);
    let mut talk = rig.talk();
    assert_eq!(
        bitmaps(&mut talk),
        json!([
            { "name": "a", "count": 8192, "granularity": 4096, "recording": true, "busy": false, "persistent": true },
            { "name": "b", "count": 0, "granularity": G, "recording": false, "busy": false, "persistent": true },
        ])
    );
    // UNMAP and WRITE SAME are changes too.
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend((2 * MIB / 512).to_be_bytes());
    list.extend(8u32.to_be_bytes());
    list.extend([0; 4]);
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    use tcmu_dif::peer::kernel::Data;
    assert_eq!(known.guest.kernel.execute(&unmap, Data::Out(&list)).unwrap().status, 0);
    let mut same = vec![0x41, 0];
    same.extend(((3 * MIB / 512) as u32).to_be_bytes());
    same.extend([0, 0, 8, 0]);
    assert_eq!(known.guest.kernel.execute(&same, Data::Out(&[1; 512])).unwrap().status, 0);
    assert_eq!(bitmap(&mut talk, "a")["count"], 8192 + 2 * 4096);
    talk.get("block-dirty-bitmap-enable", json!({ "node": "vm1", "name": "b" }));
    write(&mut known.guest, 5 * MIB, 512);
    talk.get("block-dirty-bitmap-disable", json!({ "node": "vm1", "name": "a" }));
    write(&mut known.guest, 6 * MIB, 512);
    talk.get(
        "block-dirty-bitmap-merge",
        json!({ "node": "vm1", "target": "a", "bitmaps": ["b", { "node": "vm1", "name": "a" }] }),
    );
    known.guest.lun.stop().unwrap();
    is_whole(&image);
    assert_eq!(marked(&image, "b"), [5 * MIB..5 * MIB + G, 6 * MIB..6 * MIB + G]);
    let four = |mib: u64| mib * MIB..mib * MIB + 4096;
    assert_eq!(
        marked(&image, "a"),
        [MIB..MIB + 8192, four(2), four(3), 5 * MIB..5 * MIB + G, 6 * MIB..6 * MIB + G]
    );
}

#[test]
fn after_a_crash_a_persistent_bitmap_is_inconsistent_and_can_only_be_removed() {
    let rig = Rig::new(Registry::default());
    let (old, known) = new_lun(&rig, Format::Qcow2, false);
    let mut talk = rig.talk();
    add(&mut talk, "a", json!({ "persistent": true }));
    known.guest.lun.stop().unwrap();
    let mut known = Known { disk: known.disk.clone(), ..start(&rig, &old, false) };
    // Nothing has been written yet, and it is in use all the same.
    let crashed = rig.dir.path().join("crashed.qcow2");
    std::fs::copy(&old, &crashed).unwrap();
    write(&mut known.guest, 0, 512);
    known.guest.lun.stop().unwrap();
    assert_eq!(marked(&old, "a"), [0..G]);

    assert_eq!(of_qemu(&crashed)[0]["flags"], json!(["in-use", "auto"]));
    let mut known = start(&rig, &crashed, false);
    let told = bitmap(&mut talk, "a");
    assert_eq!((&told["inconsistent"], &told["recording"]), (&json!(true), &json!(false)));
    let named = json!({ "node": "vm1", "name": "a" });
    let target = rig.dir.path().join("inc.qcow2");
    for (verb, arguments) in [
        ("block-dirty-bitmap-clear", named.clone()),
        ("block-dirty-bitmap-enable", named.clone()),
        ("block-dirty-bitmap-disable", named.clone()),
        ("block-dirty-bitmap-merge", json!({ "node": "vm1", "target": "a", "bitmaps": [] })),
        ("drive-backup", backup(&target, json!({ "sync": "incremental", "bitmap": "a" }))),
    ] {
        let said = refused(&talk.ask(verb, arguments));
        assert!(said.contains("inconsistent") && said.contains("remove"), "{verb}: {said}");
    }
    assert!(!target.exists());
    write(&mut known.guest, 0, 512);
    known.guest.lun.stop().unwrap();
    // It stays so.
    assert_eq!(of_qemu(&crashed)[0]["flags"].as_array().unwrap()[0], "in-use");
    is_whole(&crashed);
    let known = start(&rig, &crashed, false);
    talk.get("block-dirty-bitmap-remove", named);
    add(&mut talk, "a", json!({ "persistent": true }));
    known.guest.lun.stop().unwrap();
    is_whole(&crashed);
    assert_eq!(of_qemu(&crashed)[0]["flags"], json!(["auto"]));
}

#[test]
fn a_bitmap_that_no_image_keeps_goes_on_after_an_orderly_stop_and_never_misses_a_change() {
    for (format, pi) in [(Format::Raw, false), (Format::Raw, true), (Format::Qcow2, true)] {
        let rig = Rig::new(Registry::default());
        let (image, mut known) = new_lun(&rig, format, pi);
        let mut talk = rig.talk();
        add(&mut talk, "daily", json!({}));
        add(&mut talk, "off", json!({ "disabled": true, "granularity": 4096 }));
        write(&mut known.guest, 3 * G, 512);
        let before = bitmaps(&mut talk);
        assert_eq!((&before[0]["count"], &before[1]["count"]), (&json!(G), &json!(0)));
        let kept = || std::fs::read_dir(rig.dir.path().join("state/bitmaps")).unwrap().count();
        known.guest.lun.stop().unwrap();
        assert_eq!(kept(), 1);

        let mut known = start(&rig, &image, pi);
        assert_eq!(bitmaps(&mut talk), before);
        assert_eq!(kept(), 0, "after a crash it would not know of what is written now");
        write(&mut known.guest, 9 * G, 512);
        assert_eq!(bitmap(&mut talk, "daily")["count"], 2 * G);
        known.guest.lun.stop().unwrap();

        // Another image of that name's LUN has none of them.
        let other = rig.dir.path().join("other.raw");
        make(&other, Format::Raw, false);
        let known = start(&rig, &other, false);
        assert_eq!(bitmaps(&mut talk), Value::Null);
        add(&mut talk, "daily", json!({}));
        known.guest.lun.stop().unwrap();
        // Somebody else writes to it.
        let file = std::fs::OpenOptions::new().write(true).open(&other).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 512], 0).unwrap();
        drop(file);
        let known = start(&rig, &other, false);
        assert_eq!(bitmap(&mut talk, "daily")["inconsistent"], true);
        talk.get("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": "daily" }));
        known.guest.lun.stop().unwrap();
        assert_eq!(kept(), 0);
    }
}

/// The LUN as a chain of backups has it.
fn is_that(image: &Path, pi: bool, disk: &[u8], dir: &Path) {
    judge(image, Format::Qcow2, false, disk, dir);
    if pi {
        let (good, said) = tcmu_dif(&["pi", "verify", path(image)], None);
        assert!(good, "{said}");
    }
}

#[test]
fn incremental_backups_over_a_full_one_are_the_lun_at_each_moment() {
    for (pi, persistent) in [(false, true), (true, true), (true, false)] {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path().to_owned();
        let (old, mut known) = new_lun(&rig, Format::Qcow2, pi);
        let mut talk = rig.talk();
        add(&mut talk, "b", json!({ "persistent": persistent, "granularity": 4096 }));
        known.steps(20);
        let mut last = dir.join("0.qcow2");
        let more = json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "speed": 1 });
        let then = known.disk.clone();
        talk.get("drive-backup", backup(&last, more));
        known.steps(30);
        assert_eq!(bitmap(&mut talk, "b")["busy"], true);
        let busy = refused(&talk.ask("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": "b" })));
        assert!(busy.contains("in use by another operation"), "{busy}");
        talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
        ended_well(&mut talk);
        is_that(&last, pi, &then, &dir);
        for turn in 1..5 {
            known.steps(15);
            let next = dir.join(format!("{turn}.qcow2"));
            let more = json!({ "sync": "incremental", "bitmap": "b", "mode": "existing", "speed": 1 });
            if turn == 2 && persistent {
                // What is marked outlives an orderly stop, one with a backup under way too.
                let lost = dir.join("lost.qcow2");
                talk.get(
                    "drive-backup",
                    backup(&lost, json!({ "sync": "incremental", "bitmap": "b", "speed": 1 })),
                );
                known.steps(5);
                let before = bitmap(&mut talk, "b");
                known.guest.lun.stop().unwrap();
                known = Known { disk: known.disk, seed: known.seed, guest: start(&rig, &old, pi).guest };
                assert_eq!(bitmap(&mut talk, "b")["count"], before["count"]);
                if talk.get("query-block-jobs", json!({})) != json!([]) {
                    talk.get("job-dismiss", json!({ "id": "vm1" }));
                }
            }
            if turn == 3 {
                // One that was cancelled has taken nothing out of it.
                let lost = dir.join("cancelled.qcow2");
                let before = bitmap(&mut talk, "b")["count"].as_u64().unwrap();
                let more =
                    json!({ "sync": "incremental", "bitmap": "b", "speed": 1, "auto-finalize": false });
                talk.get("drive-backup", backup(&lost, more));
                known.steps(5);
                talk.get("block-job-cancel", json!({ "device": "vm1", "force": true }));
                talk.event("BLOCK_JOB_CANCELLED");
                while talk.event("JOB_STATUS_CHANGE")["data"]["status"] != "null" {}
                assert!(bitmap(&mut talk, "b")["count"].as_u64().unwrap() >= before);
            }
            qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(&last), "-F", "qcow2", path(&next)]);
            let then = known.disk.clone();
            talk.get("drive-backup", backup(&next, more));
            known.steps(15);
            // It may have been done at once.
            let _ = talk.ask("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
            ended_well(&mut talk);
            is_that(&next, pi, &then, &dir);
            let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", path(&next)])).unwrap();
            let beneath = map.as_array().unwrap().iter().any(|run| run["depth"].as_u64().unwrap() > 0);
            assert!(beneath, "all of it was copied");
            assert_eq!(default_path(&next).exists(), pi);
            last = next;
        }
        known.compare();
        known.guest.lun.stop().unwrap();
        is_that(&old, pi, &known.disk, &dir);
    }
}

#[test]
fn a_new_image_of_what_a_bitmap_has_can_be_put_over_the_backup_before() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (_, mut known) = new_lun(&rig, Format::Qcow2, false);
    let mut talk = rig.talk();
    add(&mut talk, "b", json!({ "granularity": 512 }));
    let (full, inc) = (dir.join("full.qcow2"), dir.join("inc.qcow2"));
    let more = json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "on-success" });
    talk.get("drive-backup", backup(&full, more));
    ended_well(&mut talk);
    known.steps(60);
    // A hole where the backup before has data.
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend((3 * MIB / 512).to_be_bytes());
    list.extend(2048u32.to_be_bytes());
    list.extend([0; 4]);
    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    let done = known.guest.kernel.execute(&unmap, tcmu_dif::peer::kernel::Data::Out(&list)).unwrap();
    assert_eq!(done.status, 0);
    known.disk[3 * MIB as usize..4 * MIB as usize].fill(0);
    talk.get("drive-backup", backup(&inc, json!({ "sync": "incremental", "bitmap": "b" })));
    ended_well(&mut talk);
    qemu_img(&["rebase", "-u", "-b", path(&full), "-F", "qcow2", path(&inc)]);
    is_that(&inc, false, &known.disk, dir);
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_persistent_bitmap_stays_with_its_image_and_others_with_the_lun() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Qcow2, true);
    let mut talk = rig.talk();
    add(&mut talk, "image", json!({ "persistent": true }));
    add(&mut talk, "lun", json!({}));
    write(&mut known.guest, 0, 512);
    let over = rig.dir.path().join("over.qcow2");
    talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&over) }));
    assert_eq!(image_of(&known), over);
    write(&mut known.guest, 9 * G, 512);
    let all = bitmaps(&mut talk);
    assert_eq!(
        (all.as_array().unwrap().len(), &all[0]["name"], &all[0]["count"]),
        (1, &json!("lun"), &json!(2 * G))
    );
    assert_eq!(marked(&old, "image"), [0..G]);
    add(&mut talk, "overlay", json!({ "persistent": true }));
    let new = rig.dir.path().join("new.qcow2");
    talk.get("drive-mirror", json!({ "device": "vm1", "target": path(&new), "sync": "full" }));
    talk.event("BLOCK_JOB_READY");
    write(&mut known.guest, 20 * G, 512);
    talk.get("block-job-complete", json!({ "device": "vm1" }));
    ended_well(&mut talk);
    write(&mut known.guest, 30 * G, 512);
    let all = bitmaps(&mut talk);
    assert_eq!(
        (all.as_array().unwrap().len(), &all[0]["name"], &all[0]["count"]),
        (1, &json!("lun"), &json!(4 * G))
    );
    assert_eq!(marked(&over, "overlay"), [20 * G..21 * G]);
    is_whole(&over);
    known.guest.lun.stop().unwrap();
    is_whole(&new);
    let (good, said) = tcmu_dif(&["pi", "verify", path(&new)], None);
    assert!(good, "{said}");
}

#[test]
fn what_cannot_be_is_refused_with_a_reason() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, false);
    let mut talk = rig.talk();
    let target = rig.dir.path().join("a.raw");
    add(&mut talk, "b", json!({}));
    for (verb, arguments, reason) in [
        ("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "b" }), "Bitmap already exists: b"),
        ("block-dirty-bitmap-add", json!({ "node": "vm2", "name": "b" }), "not served"),
        ("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "" }), "1 to 1023 bytes"),
        ("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "c", "granularity": 3 }), "power of two"),
        (
            "block-dirty-bitmap-add",
            json!({ "node": "vm1", "name": "c", "persistent": true }),
            "only qcow2 images",
        ),
        ("block-dirty-bitmap-clear", json!({ "node": "vm1", "name": "c" }), "Dirty bitmap 'c' not found"),
        ("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": "c" }), "Dirty bitmap 'c' not found"),
        (
            "block-dirty-bitmap-merge",
            json!({ "node": "vm1", "target": "b", "bitmaps": [{ "node": "x", "name": "b" }] }),
            "another LUN",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({ "node": "vm1", "target": "b", "bitmaps": ["c"] }),
            "'c' not found",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({ "node": "vm1", "target": "b", "bitmaps": [1] }),
            "expected: string",
        ),
        ("drive-backup", backup(&target, json!({ "sync": "incremental" })), "valid bitmap name"),
        ("drive-backup", backup(&target, json!({ "sync": "incremental", "bitmap": "c" })), "'c' not found"),
        (
            "drive-backup",
            backup(&target, json!({ "sync": "incremental", "bitmap": "b", "bitmap-mode": "never" })),
            "must be 'on-success'",
        ),
        ("drive-backup", backup(&target, json!({ "sync": "bitmap", "bitmap": "b" })), "mode must be given"),
        (
            "drive-backup",
            backup(&target, json!({ "sync": "none", "bitmap": "b", "bitmap-mode": "always" })),
            "must be 'on-success'",
        ),
        (
            "drive-backup",
            backup(&target, json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "never" })),
            "no meaningful effect",
        ),
        (
            "drive-backup",
            backup(&target, json!({ "sync": "full", "bitmap-mode": "always" })),
            "without a bitmap",
        ),
        ("drive-mirror", backup(&target, json!({ "sync": "incremental" })), "not supported"),
    ] {
        let said = refused(&talk.ask(verb, arguments));
        assert!(said.contains(reason), "{verb}: {said}");
    }
    assert!(!target.exists());
    known.guest.lun.stop().unwrap();
}

#[test]
fn the_command_line_leads_bitmaps_and_backs_up_what_they_have() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let dir = rig.dir.path();
    let cli = |words: &[&str]| tcmu_dif(words, Some(dir));
    let (good, said) = cli(&["bitmap", "add", "vm1", "daily", "--persistent", "--granularity", "4K"]);
    assert!(good && said.contains("daily") && said.contains("in the image"), "{said}");
    let full = dir.join("full.qcow2");
    let (good, said) = cli(&["backup", "vm1", path(&full), "--bitmap", "daily"]);
    assert!(good, "{said}");
    write(&mut known.guest, 4 * G, 512);
    let (good, said) = cli(&["bitmap", "list", "vm1", "--json"]);
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((good, &told[0]["count"]), (true, &json!(4096)));
    let inc = dir.join("inc.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(&full), "-F", "qcow2", path(&inc)]);
    let words = ["backup", "vm1", path(&inc), "--existing", "--sync", "incremental", "--bitmap", "daily"];
    let (good, said) = cli(&words);
    assert!(good, "{said}");
    known.disk[(4 * G) as usize..(4 * G + 512) as usize].fill(0xa5);
    is_that(&inc, true, &known.disk, dir);
    for words in [
        &["bitmap", "add", "vm1", "other", "--disabled"][..],
        &["bitmap", "merge", "vm1", "other", "daily"],
        &["bitmap", "disable", "vm1", "daily"],
        &["bitmap", "enable", "vm1", "daily"],
        &["bitmap", "clear", "vm1", "daily"],
        &["bitmap", "remove", "vm1", "other"],
        &["bitmap", "remove", "vm1", "daily"],
    ] {
        let (good, said) = cli(words);
        assert!(good, "{words:?}: {said}");
    }
    let (good, said) = cli(&["bitmap", "list", "vm1"]);
    assert!(good && said.contains("no dirty bitmaps"), "{said}");
    let (good, said) = cli(&["bitmap", "clear", "vm1", "daily"]);
    assert!(!good && said.contains("'daily' not found") && said.contains("next: "), "{said}");
    let (good, said) = cli(&["bitmap", "list", "vm2"]);
    assert!(!good && said.contains("not served"), "{said}");
    known.guest.lun.stop().unwrap();
}
