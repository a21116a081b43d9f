//! Mirrors of whole LUNs on the embedded kernel, led over QMP and by the command line, and judged by qemu-img and `pi verify`.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::fs::FileExt,
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

use known::{BLOCKS, Known, SIZE, judge, new_lun, path, qemu_img, refused, start, tcmu_dif};
use rig::{MIB, Rig, Talk};

fn mirror(target: &Path, more: Value) -> Value {
    let mut arguments = json!({ "device": "vm1", "target": target.display().to_string(), "sync": "full" });
    for (key, value) in more.as_object().unwrap() {
        arguments[key] = value.clone();
    }
    arguments
}

#[test]
fn a_lun_goes_over_to_its_mirror_while_it_is_written_to_and_stays_there() {
    for (from, to) in [(Format::Raw, Format::Qcow2), (Format::Qcow2, Format::Raw)] {
        for (pi, copy_mode) in [(false, "background"), (true, "write-blocking"), (true, "background")] {
            let rig = Rig::new(Registry::default());
            let (old, mut known) = new_lun(&rig, from, pi);
            let new = rig.dir.path().join("new");
            let mut talk = rig.talk();
            let arguments = mirror(&new, json!({ "format": to.to_string(), "copy-mode": copy_mode }));
            talk.get("drive-mirror", arguments);
            known.steps(50);
            let ready = talk.event("BLOCK_JOB_READY");
            assert_eq!((&ready["data"]["type"], &ready["data"]["device"]), (&json!("mirror"), &json!("vm1")));
            known.steps(50);
            let jobs = talk.get("query-block-jobs", json!({}));
            assert_eq!((&jobs[0]["status"], &jobs[0]["ready"]), (&json!("ready"), &json!(true)), "{jobs}");
            talk.get("block-job-complete", json!({ "device": "vm1" }));
            known.steps(30);
            let done = talk.event("BLOCK_JOB_COMPLETED");
            assert!(done["data"].get("error").is_none(), "{done}");
            let at_pivot = known.disk.clone();
            known.steps(100);
            known.compare();
            let blocks = talk.get("query-block", json!({}));
            assert_eq!(blocks[0]["inserted"]["file"], path(&new));
            assert_eq!(talk.get("query-jobs", json!({})), json!([]));
            known.guest.lun.stop().unwrap();
            judge(&new, to, pi, &known.disk, rig.dir.path());
            assert_ne!(at_pivot, known.disk);
            // Whoever still names the old image gets the new one.
            let disk = known.disk;
            let mut known = Known { disk, ..start(&rig, &old, pi) };
            known.compare();
            assert_eq!(known.guest.lun.remote().made().config.image, new);
            known.guest.lun.stop().unwrap();
        }
    }
}

#[test]
fn a_cancelled_mirror_that_was_ready_leaves_an_identical_copy() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let (old, mut known) = new_lun(&rig, Format::Raw, pi);
        let new = rig.dir.path().join("new.qcow2");
        let mut talk = rig.talk();
        talk.get("drive-mirror", mirror(&new, json!({ "format": "qcow2", "job-id": "copy" })));
        talk.event("BLOCK_JOB_READY");
        known.steps(50);
        talk.get("block-job-cancel", json!({ "device": "copy" }));
        assert_eq!(talk.job().last().unwrap(), "null");
        let same = known.disk.clone();
        known.guest.lun.stop().unwrap();
        let said = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", path(&old), path(&new)]);
        assert!(said.contains("identical"), "{said}");
        judge(&new, Format::Qcow2, pi, &same, rig.dir.path());
        judge(&old, Format::Raw, pi, &same, rig.dir.path());
        // The LUN stays where it was.
        let known = start(&rig, &old, pi);
        assert_eq!(known.guest.lun.remote().made().config.image, old);
        known.guest.lun.stop().unwrap();
    }
}

#[test]
fn a_mirror_goes_on_after_a_restart_with_what_is_still_to_be_copied() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    let data = vec![7; MIB as usize];
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &data), 0);
    }
    known.disk.fill(7);
    let new = rig.dir.path().join("new.raw");
    let mut talk = rig.talk();
    talk.get("drive-mirror", mirror(&new, json!({ "speed": 4 * MIB })));
    let end = Instant::now() + Duration::from_secs(30);
    let copied = loop {
        let jobs = talk.get("query-block-jobs", json!({}));
        let copied = jobs[0]["offset"].as_u64().unwrap();
        if copied >= MIB {
            break copied;
        }
        assert!(Instant::now() < end, "{jobs}");
        std::thread::sleep(Duration::from_millis(5));
    };
    known.guest.lun.stop().unwrap();
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &old, true) };
    let jobs = talk.get("query-block-jobs", json!({}));
    let (offset, len) = (jobs[0]["offset"].as_u64().unwrap(), jobs[0]["len"].as_u64().unwrap());
    assert!(offset >= copied && len <= SIZE + MIB, "it began anew: {jobs}");
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    known.steps(50);
    talk.event("BLOCK_JOB_READY");
    talk.get("job-complete", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    known.compare();
    known.guest.lun.stop().unwrap();
    judge(&new, Format::Raw, true, &known.disk, rig.dir.path());
}

#[test]
fn a_block_that_does_not_match_ends_the_job_or_stops_it_and_is_named() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(4000, &[9; 512]), 0);
    let file = std::fs::File::options().read(true).write(true).open(&old).unwrap();
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    let new = rig.dir.path().join("new.raw");
    let mut talk = rig.talk();
    talk.get("drive-mirror", mirror(&new, json!({ "auto-dismiss": false })));
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!((&error["data"]["operation"], &error["data"]["action"]), (&json!("read"), &json!("report")));
    assert!(error["data"]["reason"].as_str().unwrap().contains("4000"), "{error}");
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"]["error"].as_str().unwrap().contains("4000"), "{done}");
    let jobs = talk.get("query-jobs", json!({}));
    assert_eq!(jobs[0]["status"], "concluded");
    assert!(refused(&talk.ask("drive-mirror", mirror(&new, json!({})))).contains("already in use"));
    talk.get("job-dismiss", json!({ "id": "vm1" }));

    // Stopped, it goes on once the block is written anew.
    let new = rig.dir.path().join("other.raw");
    talk.get("drive-mirror", mirror(&new, json!({ "on-source-error": "stop" })));
    let found = talk.event("PI_MISMATCH");
    assert_eq!((&found["data"]["operation"], &found["data"]["lba"]), (&json!("mirror"), &json!(4000)));
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "stop");
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!((&jobs[0]["status"], &jobs[0]["io-status"]), (&json!("paused"), &json!("failed")), "{jobs}");
    let copied = std::fs::read(&new).unwrap();
    assert_eq!(copied[4000 * 512..4001 * 512], [0; 512], "it was copied");
    assert_eq!(known.guest.write(4000, &[5; 512]), 0);
    talk.get("job-resume", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_READY");

    // With a spare, a block that rots is brought back, for the guest and for a scrub.
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    assert_eq!(known.guest.read(4000, 1), 0);
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 0 }));
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let pi = talk.get("query-pi", json!({ "device": "vm1" }));
        if pi[0]["scrub"]["status"] == "concluded" {
            assert_eq!(
                (&pi[0]["scrub"]["mismatches"], &pi[0]["counters"]["repaired"]),
                (&json!(1), &json!(2)),
                "{pi}"
            );
            break;
        }
        assert!(Instant::now() < end, "{pi}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4000 * 512 + 17).unwrap();
    assert_eq!(byte, [5]);
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_job_waits_to_be_made_final_and_to_be_dismissed_if_that_is_asked_for() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, false);
    let new = rig.dir.path().join("new.raw");
    let mut talk = rig.talk();
    let early = talk.ask("block-job-complete", json!({ "device": "vm1" }));
    assert_eq!(
        (refused(&early), early["error"]["class"].as_str()),
        ("Job 'vm1' not found".into(), Some("DeviceNotActive"))
    );
    talk.get(
        "drive-mirror",
        mirror(&new, json!({ "auto-finalize": false, "auto-dismiss": false, "speed": 1 })),
    );
    let early = refused(&talk.ask("job-complete", json!({ "id": "vm1" })));
    assert_eq!(early, "Job 'vm1' in state 'running' cannot accept command verb 'complete'");
    let busy = refused(&talk.ask("drive-mirror", mirror(&new, json!({ "job-id": "b" }))));
    assert!(busy.contains("has a job already"), "{busy}");
    let size = refused(&talk.ask("block_resize", json!({ "device": "vm1", "size": 2 * SIZE })));
    assert!(size.contains("being mirrored"), "{size}");
    talk.get("job-pause", json!({ "id": "vm1" }));
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["status"], "paused");
    talk.get("block-job-resume", json!({ "device": "vm1" }));
    talk.event("BLOCK_JOB_READY");
    talk.get("job-complete", json!({ "id": "vm1" }));
    let mut statuses = Vec::new();
    while statuses.last().is_none_or(|s| s != "pending") {
        statuses.push(talk.event("JOB_STATUS_CHANGE")["data"]["status"].as_str().unwrap().to_owned());
    }
    assert!(statuses.contains(&"waiting".to_owned()), "{statuses:?}");
    assert_ne!(known.guest.lun.remote().made().config.image, new);
    talk.get("job-finalize", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    assert_eq!(known.guest.lun.remote().made().config.image, new);
    talk.event("JOB_STATUS_CHANGE");
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["status"], "concluded");
    talk.get("block-job-dismiss", json!({ "id": "vm1" }));
    assert_eq!(talk.get("query-block-jobs", json!({})), json!([]));
    known.guest.lun.stop().unwrap();
}

#[test]
fn what_cannot_be_a_target_is_refused_with_a_reason_and_nothing_is_left_of_it() {
    let rig = Rig::new(Registry::default());
    let (old, known) = new_lun(&rig, Format::Raw, true);
    let dir = rig.dir.path();
    std::fs::write(dir.join("small.raw"), vec![0; 4096]).unwrap();
    std::fs::write(dir.join("there.raw.pi"), b"x").unwrap();
    let mut talk = rig.talk();
    for (target, more, reason) in [
        (dir.join("small.raw"), json!({}), "exists already"),
        (dir.join("small.raw"), json!({ "mode": "existing" }), "4096"),
        (dir.join("there.raw"), json!({}), "protection information is there already"),
        (PathBuf::from("new.raw"), json!({}), "not absolute"),
        (dir.join("no/new.raw"), json!({}), "directory does not exist"),
        (old.clone(), json!({ "mode": "existing" }), "in use"),
        (dir.join("a"), json!({ "granularity": 1000 }), "power of two"),
        (dir.join("a"), json!({ "format": "vmdk" }), "Unknown driver"),
        (dir.join("a"), json!({ "job-id": "scrub-vm1" }), "Invalid job ID"),
        (dir.join("n".repeat(230)), json!({}), "the kernel takes 255"),
    ] {
        let said = refused(&talk.ask("drive-mirror", mirror(&target, more)));
        assert!(said.contains(reason), "{}: {said}", target.display());
    }
    let left = |name: &str| dir.join(name).exists();
    assert!(!left("there.raw") && !left("a") && !left("a.pi"));
    assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    known.guest.lun.stop().unwrap();
}

#[test]
fn the_top_of_a_chain_is_copied_alone_and_the_copy_has_the_same_backing_file() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let base = dir.join("base.raw");
    let below: Vec<u8> = (0..SIZE).map(|b| (b / 512) as u8 | 1).collect();
    std::fs::write(&base, &below).unwrap();
    let old = dir.join("old.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(&base), "-F", "raw", path(&old)]);
    let mut known = Known { disk: below, ..start(&rig, &old, false) };
    known.steps(20);
    let new = dir.join("new.qcow2");
    let mut talk = rig.talk();
    talk.get("drive-mirror", mirror(&new, json!({ "sync": "top" })));
    talk.event("BLOCK_JOB_READY");
    known.steps(20);
    talk.get("block-job-complete", json!({ "device": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    known.compare();
    known.guest.lun.stop().unwrap();
    assert!(qemu_img(&["info", path(&new)]).contains(path(&base)));
    judge(&new, Format::Qcow2, false, &known.disk, dir);
    let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", path(&new)])).unwrap();
    assert!(map.as_array().unwrap().iter().any(|run| run["depth"] == 1), "all of it was copied");
}

fn job_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn the_command_line_mirrors_lists_leads_and_goes_over() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let dir = rig.dir.path();
    let (a, b) = (dir.join("a.raw"), dir.join("b.qcow2"));
    let cli = |words: &[&str]| tcmu_dif(words, Some(dir));
    let (good, said) = cli(&["mirror", "vm1", path(&a), "--format", "raw", "--json"]);
    assert!(good, "{said}");
    let job = job_of(&said);
    assert_eq!((&job["ready"], &job["target"]), (&json!(true), &json!(path(&a))));
    let (good, said) = cli(&["job", "list"]);
    assert!(good && said.contains("mirror") && said.contains("ready"), "{said}");
    let (good, said) = cli(&["job", "speed", "vm1", "1M"]);
    assert!(good && said.contains("1.0 MiB a second") || said.contains("1 MiB a second"), "{said}");
    for verb in ["pause", "resume"] {
        let (good, said) = cli(&["job", verb, "vm1", "--json"]);
        assert!(good, "{said}");
        assert_eq!(job_of(&said)["paused"], json!(verb == "pause"));
    }
    let (good, said) = cli(&["job", "cancel", "vm1"]);
    assert!(good && said.contains("has ended"), "{said}");
    judge(&a, Format::Raw, true, &known.disk, dir);

    let (good, said) = cli(&["mirror", "vm1", path(&b), "--complete"]);
    assert!(good && said.contains("has the image"), "{said}");
    known.steps(20);
    known.compare();
    let (good, said) = cli(&["job", "list", "--json"]);
    assert_eq!((good, job_of(&said)), (true, json!([])));
    let (good, said) = cli(&["job", "complete", "vm1"]);
    assert!(!good && said.contains("not found") && said.contains("next: "), "{said}");
    known.guest.lun.stop().unwrap();
    judge(&b, Format::Qcow2, true, &known.disk, dir);
    let _: Option<Talk> = None;
}

#[test]
fn thirty_two_commands_at_a_time_pass_through_pivots_there_and_back() {
    for copy_mode in ["background", "write-blocking"] {
        let rig = Rig::new(Registry::default());
        let (old, mut known) = new_lun(&rig, Format::Raw, true);
        let mut talk = rig.talk();
        let (mut from, mut to) = (old, rig.dir.path().join("new.raw"));
        for _ in 0..4 {
            let _ = std::fs::remove_file(&to);
            let _ = std::fs::remove_file(default_path(&to));
            talk.get("drive-mirror", mirror(&to, json!({ "copy-mode": copy_mode })));
            let end = Instant::now() + Duration::from_secs(60);
            let (mut lba, mut told) = (0u32, false);
            while known.guest.lun.remote().made().config.image != to {
                assert!(Instant::now() < end, "{}", talk.get("query-block-jobs", json!({})));
                let data = [lba as u8; 4096];
                while known.guest.kernel.in_flight() < 32 {
                    lba = (lba + 8) % (BLOCKS as u32 - 8);
                    let mut cdb = vec![0x2a, 0];
                    cdb.extend(lba.to_be_bytes());
                    cdb.extend([0, 0, 8, 0]);
                    known.guest.kernel.submit(&cdb, Data::Out(&data)).unwrap();
                }
                for done in known.guest.kernel.wait(Duration::from_secs(20)).unwrap() {
                    assert_eq!(done.status, 0);
                }
                let jobs = talk.get("query-block-jobs", json!({}));
                if !told && jobs[0]["ready"] == true {
                    talk.get("block-job-complete", json!({ "device": "vm1" }));
                    told = true;
                }
            }
            while known.guest.kernel.in_flight() > 0 {
                for done in known.guest.kernel.wait(Duration::from_secs(20)).unwrap() {
                    assert_eq!(done.status, 0);
                }
            }
            while talk.get("query-jobs", json!({})) != json!([]) {
                assert!(Instant::now() < end);
            }
            (from, to) = (to, from);
        }
        known.guest.lun.stop().unwrap();
        let (good, said) = tcmu_dif(&["pi", "verify", path(&from)], None);
        assert!(good, "{said}");
    }
}

/// How many commands a guest that always has one under way is answered while 8 MiB are copied.
fn answered_beside_a_copy(share: u64) -> u64 {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, false);
    for lba in (0..BLOCKS as u32).step_by(2048) {
        assert_eq!(known.guest.write(lba, &vec![0x5a; MIB as usize]), 0);
    }
    let mut talk = rig.talk();
    // No faster than that, so that a moment in which the guest is not let run does not have all of it copied.
    let more = json!({ "format": "raw", "speed": 64 * MIB, "share": share });
    talk.get("drive-mirror", mirror(&rig.dir.path().join("new"), more));
    let told = &talk.get("query-block-jobs", json!({}))[0]["share"].clone();
    assert_eq!(told, &json!(share));
    let ready = std::thread::spawn(move || talk.event("BLOCK_JOB_READY"));
    let mut answered = 0;
    while !ready.is_finished() {
        assert_eq!(known.guest.read(0, 8), 0);
        answered += 1;
    }
    ready.join().unwrap();
    known.guest.lun.stop().unwrap();
    answered
}

#[test]
fn a_share_leaves_guests_a_part_of_the_time_and_can_be_changed() {
    let (whole, small) = (answered_beside_a_copy(100), answered_beside_a_copy(1));
    assert!(small > 2 * whole, "{small} commands beside a copy that rests, {whole} beside one that does not");

    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, false);
    let mut talk = rig.talk();
    let target = rig.dir.path().join("new");
    for share in [0, 101] {
        let said =
            refused(&talk.ask("drive-mirror", mirror(&target, json!({ "format": "raw", "share": share }))));
        assert!(said.contains("give 1 to 100"), "{said}");
    }
    assert!(!target.exists());
    talk.get("drive-mirror", mirror(&target, json!({ "format": "raw" })));
    talk.event("BLOCK_JOB_READY");
    let said = refused(&talk.ask("job-set-share", json!({ "id": "vm1", "share": 0 })));
    assert!(said.contains("give 1 to 100"), "{said}");
    refused(&talk.ask("job-set-share", json!({ "id": "vm7", "share": 50 })));
    let (ok, said) = tcmu_dif(&["job", "share", "vm1", "25%"], Some(rig.dir.path()));
    assert!(ok && said.contains("25 %"), "{said}");
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["share"], 25);
    let (ok, said) = tcmu_dif(&["job", "share", "vm1", "200"], Some(rig.dir.path()));
    assert!(!ok && said.contains("give 1 to 100"), "{said}");
    known.guest.lun.stop().unwrap();
}
