//! Jobs that shorten the chain of a whole LUN on the embedded kernel: streams and commits, judged by qemu-img and `pi verify`.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
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

use known::{Known, SIZE, chain, image_of, judge, new_lun, path, qemu_img, refused, start, tcmu_dif};
use rig::{MIB, Rig, Talk};

/// A LUN over `old`, and so many overlays; from the base up.
fn chain_of(rig: &Rig, format: Format, pi: bool, overlays: usize) -> (Vec<PathBuf>, Known, Talk) {
    let (old, mut known) = new_lun(rig, format, pi);
    let mut talk = rig.talk();
    let mut files = vec![old];
    for i in 1..=overlays {
        known.steps(30);
        let file = rig.dir.path().join(format!("over{i}.qcow2"));
        talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&file) }));
        files.push(file);
    }
    known.steps(30);
    (files, known, talk)
}

/// What a scrub finds: blocks with protection, and blocks that do not match.
fn scrubbed(talk: &mut Talk) -> (u64, u64) {
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 0 }));
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let pi = talk.get("query-pi", json!({ "device": "vm1" }));
        let scrub = &pi[0]["scrub"];
        if scrub["status"] == "concluded" {
            return (scrub["verified"].as_u64().unwrap(), scrub["mismatches"].as_u64().unwrap());
        }
        assert!(Instant::now() < end, "{pi}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn copy_of(files: &[PathBuf], dir: &Path) -> PathBuf {
    std::fs::create_dir(dir).unwrap();
    let mut below: Option<(PathBuf, &str)> = None;
    for file in files {
        let to = dir.join(file.file_name().unwrap());
        std::fs::copy(file, &to).unwrap();
        let format = if to.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        if let Some((below, its)) = &below {
            qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", path(below), "-F", its, path(&to)]);
        }
        below = Some((to, format));
    }
    below.unwrap().0
}

#[test]
fn a_stream_brings_what_lies_beneath_into_the_image_while_it_is_written_to() {
    for (format, pi) in [(Format::Raw, true), (Format::Qcow2, true), (Format::Qcow2, false)] {
        for base in [None, Some(0), Some(1)] {
            let rig = Rig::new(Registry::default());
            let dir = rig.dir.path();
            let (files, mut known, mut talk) = chain_of(&rig, format, pi, 3);
            let protected = pi.then(|| scrubbed(&mut talk));
            let mut arguments = json!({ "device": "vm1", "job-id": "up" });
            if let Some(base) = base {
                arguments["base"] = path(&files[base]).into();
            }
            talk.get("block-stream", arguments);
            known.steps(40);
            let done = talk.event("BLOCK_JOB_COMPLETED");
            assert_eq!((&done["data"]["type"], &done["data"]["device"]), (&json!("stream"), &json!("up")));
            assert!(done["data"].get("error").is_none(), "{done}");
            known.compare();
            known.steps(40);
            known.compare();
            if let Some((verified, _)) = protected {
                let (now, wrong) = scrubbed(&mut talk);
                assert_eq!(wrong, 0);
                // What is written or discarded meanwhile changes a little; what is beneath is most of it.
                assert!(now + 3000 > verified, "{now} blocks are protected, and {verified} were");
            }
            let blocks = talk.get("query-block", json!({}));
            assert_eq!(blocks[0]["inserted"]["file"], path(&files[3]), "{blocks}");
            known.guest.lun.stop().unwrap();
            let mut left = vec![files[3].clone()];
            left.extend(base.into_iter().flat_map(|base| files[..=base].iter().rev().cloned()));
            assert_eq!(chain(&files[3]), left);
            // Images that went out of the chain are not needed any more.
            for file in files.iter().filter(|file| !left.contains(file)) {
                std::fs::remove_file(file).unwrap();
                let _ = std::fs::remove_file(default_path(file));
            }
            judge(&files[3], Format::Qcow2, pi, &known.disk, dir);
            let disk = known.disk;
            let mut known = Known { disk, ..start(&rig, &files[3], pi) };
            known.compare();
            known.guest.lun.stop().unwrap();
        }
    }
}

#[test]
fn a_streamed_image_is_what_qemu_img_rebase_makes_of_a_copy() {
    for base in [None, Some(1)] {
        let rig = Rig::new(Registry::default());
        let dir = rig.dir.path();
        let (files, known, mut talk) = chain_of(&rig, Format::Raw, true, 3);
        known.guest.lun.stop().unwrap();
        let copy = copy_of(&files, &dir.join("copy"));
        let known = Known { disk: known.disk, ..start(&rig, &files[3], true) };
        let mut arguments = json!({ "device": "vm1" });
        let onto = base.map_or(String::new(), |base| path(&files[base]).to_owned());
        if base.is_some() {
            arguments["base"] = onto.clone().into();
        }
        talk.get("block-stream", arguments);
        talk.event("BLOCK_JOB_COMPLETED");
        known.guest.lun.stop().unwrap();
        qemu_img(&["rebase", "-f", "qcow2", "-F", "qcow2", "-b", &onto, path(&copy)]);
        let said = qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", path(&files[3]), path(&copy)]);
        assert!(said.contains("identical"), "{said}");
        judge(&files[3], Format::Qcow2, true, &known.disk, dir);
    }
}

#[test]
fn a_stream_waits_goes_on_after_a_restart_and_can_be_cancelled() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &vec![7; MIB as usize]), 0);
    }
    known.disk.fill(7);
    let top = dir.join("over.qcow2");
    let mut talk = rig.talk();
    talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&top) }));
    known.steps(10);
    talk.get("block-stream", json!({ "device": "vm1", "speed": 1 }));
    let said = refused(&talk.ask("job-complete", json!({ "id": "vm1" })));
    assert!(said.contains("cannot accept command verb 'complete'"), "{said}");
    let size = refused(&talk.ask("block_resize", json!({ "device": "vm1", "size": 2 * SIZE })));
    assert!(size.contains("end that job first"), "{size}");
    let over = dir.join("more.qcow2");
    let busy = json!({ "device": "vm1", "snapshot-file": path(&over) });
    assert!(refused(&talk.ask("blockdev-snapshot-sync", busy)).contains("has a job already"));
    talk.get("job-pause", json!({ "id": "vm1" }));
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["status"], "paused");
    known.steps(10);
    talk.get("job-cancel", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_CANCELLED");
    known.steps(10);
    known.compare();

    talk.get("block-stream", json!({ "device": "vm1", "speed": 4 * MIB }));
    let end = Instant::now() + Duration::from_secs(30);
    while talk.get("query-block-jobs", json!({}))[0]["offset"].as_u64().unwrap() < MIB {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    known.guest.lun.stop().unwrap();
    assert_eq!(chain(&top), [top.clone(), old.clone()]);
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &old, true) };
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!((&jobs[0]["type"], &jobs[0]["status"]), (&json!("stream"), &json!("running")), "{jobs}");
    assert!(jobs[0]["offset"].as_u64().unwrap() >= MIB, "it began anew: {jobs}");
    known.steps(10);
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    talk.event("BLOCK_JOB_COMPLETED");
    known.steps(10);
    known.compare();
    known.guest.lun.stop().unwrap();
    assert_eq!(chain(&top), std::slice::from_ref(&top));
    judge(&top, Format::Qcow2, true, &known.disk, dir);
}

#[test]
fn a_block_beneath_that_does_not_match_is_not_brought_up() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(4000, &[9; 512]), 0);
    let top = rig.dir.path().join("over.qcow2");
    let mut talk = rig.talk();
    talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&top) }));
    let file = std::fs::File::options().read(true).write(true).open(&old).unwrap();
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    talk.get("block-stream", json!({ "device": "vm1" }));
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"]["error"].as_str().unwrap().contains("4000"), "{done}");
    assert_eq!(chain(&top).len(), 2);
    assert_eq!(known.guest.read(4000, 1), 2);
    talk.get("block-stream", json!({ "device": "vm1", "on-error": "stop" }));
    let found = talk.event("PI_MISMATCH");
    assert_eq!(found["data"]["lba"], 4000, "{found}");
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "stop");
    assert_eq!(known.guest.write(4000, &[5; 512]), 0);
    talk.get("job-resume", json!({ "id": "vm1" }));
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    assert_eq!(known.guest.read(4000, 1), 0);
    known.guest.lun.stop().unwrap();
    assert_eq!(chain(&top).len(), 1);
}

#[test]
fn a_commit_brings_what_was_written_to_an_image_beneath_and_the_lun_goes_over_to_it() {
    for (format, pi) in [(Format::Raw, true), (Format::Qcow2, true), (Format::Raw, false)] {
        for (base, mode) in [(0, "background"), (1, "background"), (0, "write-blocking")] {
            let rig = Rig::new(Registry::default());
            let dir = rig.dir.path();
            let (files, mut known, mut talk) = chain_of(&rig, format, pi, 3);
            let protected = pi.then(|| scrubbed(&mut talk));
            let (bottom, top) = (path(&files[base]), path(&files[3]));
            talk.get(
                "block-commit",
                json!({ "device": "vm1", "base": bottom, "top": top, "copy-mode": mode }),
            );
            known.steps(40);
            let ready = talk.event("BLOCK_JOB_READY");
            assert_eq!((&ready["data"]["type"], &ready["data"]["device"]), (&json!("commit"), &json!("vm1")));
            known.steps(40);
            known.compare();
            talk.get("block-job-complete", json!({ "device": "vm1" }));
            known.steps(20);
            let done = talk.event("BLOCK_JOB_COMPLETED");
            assert!(done["data"].get("error").is_none(), "{done}");
            assert_eq!(image_of(&known), files[base]);
            known.steps(40);
            known.compare();
            if let Some((verified, _)) = protected {
                let (now, wrong) = scrubbed(&mut talk);
                assert_eq!(wrong, 0);
                assert!(now + 4000 > verified, "{now} blocks are protected, and {verified} were");
            }
            known.guest.lun.stop().unwrap();
            for file in &files[base + 1..] {
                std::fs::remove_file(file).unwrap();
                let _ = std::fs::remove_file(default_path(file));
            }
            let its = if base == 0 { format } else { Format::Qcow2 };
            judge(&files[base], its, pi, &known.disk, dir);
            // Whoever still names the image that was left gets the one that the LUN has.
            let disk = known.disk;
            let mut known = Known { disk, ..start(&rig, &files[3], pi) };
            assert_eq!(image_of(&known), files[base]);
            known.compare();
            known.guest.lun.stop().unwrap();
        }
    }
}

#[test]
fn a_committed_image_is_what_qemu_img_commit_makes_of_a_copy() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (files, known, mut talk) = chain_of(&rig, Format::Raw, true, 2);
    known.guest.lun.stop().unwrap();
    let copy = copy_of(&files, &dir.join("copy"));
    let known = Known { disk: known.disk, ..start(&rig, &files[2], true) };
    talk.get("block-commit", json!({ "device": "vm1" }));
    talk.event("BLOCK_JOB_READY");
    talk.get("block-job-complete", json!({ "device": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    known.guest.lun.stop().unwrap();
    let base = dir.join("copy").join(files[0].file_name().unwrap());
    qemu_img(&["commit", "-q", "-d", "-f", "qcow2", "-b", path(&base), path(&copy)]);
    let said = qemu_img(&["compare", "-f", "raw", "-F", "raw", path(&files[0]), path(&base)]);
    assert!(said.contains("identical"), "{said}");
    judge(&files[0], Format::Raw, true, &known.disk, dir);
}

#[test]
fn a_commit_goes_on_after_a_restart_and_one_that_is_cancelled_leaves_the_chain() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (files, mut known, mut talk) = chain_of(&rig, Format::Qcow2, true, 2);
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &vec![7; MIB as usize]), 0);
    }
    known.disk.fill(7);
    talk.get("block-commit", json!({ "device": "vm1", "speed": 4 * MIB }));
    // The chain has given its lock to the job, and gets it back.
    let locked = |file: &Path| {
        let out = std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", "q", path(file)]).output();
        !out.unwrap().status.success()
    };
    assert!(locked(&files[0]));
    known.steps(10);
    talk.get("block-job-cancel", json!({ "device": "vm1", "force": true }));
    talk.event("BLOCK_JOB_CANCELLED");
    while talk.get("query-jobs", json!({})) != json!([]) {}
    assert!(locked(&files[0]));
    known.steps(10);
    known.compare();

    talk.get("block-commit", json!({ "device": "vm1", "speed": 4 * MIB }));
    let end = Instant::now() + Duration::from_secs(30);
    while talk.get("query-block-jobs", json!({}))[0]["offset"].as_u64().unwrap() < MIB {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    known.guest.lun.stop().unwrap();
    judge(&files[2], Format::Qcow2, false, &known.disk, dir);
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &files[0], true) };
    assert_eq!(image_of(&known), files[2]);
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!((&jobs[0]["type"], &jobs[0]["target"]), (&json!("commit"), &json!(path(&files[0]))), "{jobs}");
    assert!(jobs[0]["offset"].as_u64().unwrap() >= MIB, "it began anew: {jobs}");
    known.steps(20);
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    talk.event("BLOCK_JOB_READY");
    known.steps(20);
    talk.get("job-complete", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    known.steps(20);
    known.compare();
    assert_eq!(image_of(&known), files[0]);
    known.guest.lun.stop().unwrap();
    judge(&files[0], Format::Qcow2, true, &known.disk, dir);
}

#[test]
fn a_lun_that_stops_while_a_job_copies_leaks_nothing_of_its_target() {
    for round in 0..20u64 {
        let rig = Rig::new(Registry::default());
        let (files, mut known, mut talk) = chain_of(&rig, Format::Qcow2, round % 2 == 0, 2);
        for i in 0..8 {
            assert_eq!(known.guest.write(i * 2048, &vec![round as u8 + 1; MIB as usize]), 0);
        }
        talk.get("block-commit", json!({ "device": "vm1" }));
        std::thread::sleep(Duration::from_micros(known.random(4000)));
        known.guest.lun.stop().unwrap();
        qemu_img(&["check", "-q", path(&files[0])]);
    }
}

#[test]
fn images_between_are_committed_while_the_lun_is_written_to() {
    for (format, pi) in [(Format::Raw, true), (Format::Qcow2, true), (Format::Raw, false)] {
        // The top is under the LUN's own image, or further below; the base is the last, or not.
        for (top, base) in [(3, 0), (3, 1), (2, 0), (1, 0)] {
            let rig = Rig::new(Registry::default());
            let dir = rig.dir.path();
            let (files, mut known, mut talk) = chain_of(&rig, format, pi, 4);
            let protected = pi.then(|| scrubbed(&mut talk));
            let (bottom, top_path) = (path(&files[base]), path(&files[top]));
            // What guests write concerns no image beneath, whatever is asked for.
            let mode = if base == 0 { "write-blocking" } else { "background" };
            talk.get(
                "block-commit",
                json!({ "device": "vm1", "base": bottom, "top": top_path, "copy-mode": mode }),
            );
            known.steps(40);
            let done = talk.event("BLOCK_JOB_COMPLETED");
            assert_eq!(done["data"]["type"], "commit");
            assert!(done["data"].get("error").is_none(), "{done}");
            known.compare();
            known.steps(40);
            known.compare();
            if let Some((verified, _)) = protected {
                let (now, wrong) = scrubbed(&mut talk);
                assert_eq!(wrong, 0);
                assert!(now + 3000 > verified, "{now} blocks are protected, and {verified} were");
            }
            assert_eq!(image_of(&known), files[4]);
            known.guest.lun.stop().unwrap();
            let left: Vec<PathBuf> = files
                .iter()
                .enumerate()
                .filter(|(i, _)| *i <= base || *i > top)
                .map(|(_, f)| f.clone())
                .rev()
                .collect();
            assert_eq!(chain(&files[4]), left);
            for file in &files[base + 1..=top] {
                std::fs::remove_file(file).unwrap();
                let _ = std::fs::remove_file(default_path(file));
            }
            judge(&files[4], Format::Qcow2, pi, &known.disk, dir);
            let disk = known.disk;
            let mut known = Known { disk, ..start(&rig, &files[4], pi) };
            known.compare();
            known.guest.lun.stop().unwrap();
        }
    }
}

#[test]
fn a_commit_of_images_between_goes_on_after_a_restart_and_can_be_cancelled() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (files, mut known, mut talk) = chain_of(&rig, Format::Raw, true, 1);
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &vec![7; MIB as usize]), 0);
    }
    known.disk.fill(7);
    let top = dir.join("top.qcow2");
    talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&top) }));
    known.steps(10);
    let order = |speed: u64| json!({ "device": "vm1", "top": path(&files[1]), "base": path(&files[0]), "speed": speed });
    talk.get("block-commit", order(1));
    known.steps(10);
    talk.get("job-cancel", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_CANCELLED");
    while talk.get("query-jobs", json!({})) != json!([]) {}
    known.steps(10);
    known.compare();
    talk.get("block-commit", order(4 * MIB));
    let end = Instant::now() + Duration::from_secs(30);
    while talk.get("query-block-jobs", json!({}))[0]["offset"].as_u64().unwrap() < MIB {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
    known.guest.lun.stop().unwrap();
    judge(&top, Format::Qcow2, true, &known.disk, dir);
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &files[0], true) };
    let jobs = talk.get("query-block-jobs", json!({}));
    assert!(jobs[0]["offset"].as_u64().unwrap() >= MIB, "it began anew: {jobs}");
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    known.steps(10);
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    known.compare();
    known.guest.lun.stop().unwrap();
    assert_eq!(chain(&top), [top.clone(), files[0].clone()]);
    judge(&top, Format::Qcow2, true, &known.disk, dir);
    let said = qemu_img(&["compare", "-f", "raw", "-F", "qcow2", path(&files[0]), path(&files[1])]);
    assert!(said.contains("identical"), "{said}");
}

#[test]
fn what_is_not_in_the_chain_is_refused_and_the_command_line_shortens_it() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (files, mut known, mut talk) = chain_of(&rig, Format::Raw, true, 3);
    let other = dir.join("other.raw");
    std::fs::write(&other, [0; 512]).unwrap();
    for (verb, more, reason) in [
        ("block-stream", json!({ "base": path(&other) }), "in the backing chain"),
        ("block-stream", json!({ "base": path(&files[3]) }), "in the backing chain"),
        ("block-commit", json!({ "base": path(&other) }), "in the backing chain"),
        ("block-commit", json!({ "top": path(&other) }), "in the backing chain"),
        ("block-commit", json!({ "top": path(&files[1]), "base": path(&files[2]) }), "beneath the top"),
        ("block-stream", json!({ "job-id": "scrub-vm1" }), "Invalid job ID"),
    ] {
        let mut arguments = more;
        arguments["device"] = "vm1".into();
        let said = refused(&talk.ask(verb, arguments.clone()));
        assert!(said.contains(reason), "{verb} {arguments}: {said}");
    }
    let cli = |words: &[&str]| tcmu_dif(words, Some(dir));
    let (good, said) = cli(&["stream", "vm1", "--base", path(&files[1])]);
    assert!(good && said.contains("shorter chain"), "{said}");
    known.steps(10);
    let (good, said) = cli(&["commit", "vm1", "--base", path(&files[1]), "--json"]);
    assert!(good, "{said}");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(told["image"], path(&files[1]));
    assert_eq!(image_of(&known), files[1]);
    known.steps(10);
    let (good, said) = cli(&["stream", "vm1", "--json"]);
    assert!(good, "{said}");
    known.compare();
    let (good, said) = cli(&["commit", "vm1"]);
    assert!(!good && said.contains("no backing file") && said.contains("next: "), "{said}");
    known.guest.lun.stop().unwrap();
    assert_eq!(chain(&files[1]).len(), 1);
    judge(&files[1], Format::Qcow2, true, &known.disk, dir);
}
