//! Backups of whole LUNs on the embedded kernel, led over QMP and by the command line, and judged by qemu-img and `pi verify`.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{control::Registry, image::Format, peer::kernel::Data};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{BLOCKS, Known, SIZE, judge, make, new_lun, path, qemu_img, refused, start, tcmu_dif};
use rig::{MIB, Rig, Talk};

/// Says to the test that it is the process to be killed, and where its files are.
const VICTIM: &str = "TCMU_DIF_TEST_BACKUP_VICTIM";

fn backup(target: &Path, more: Value) -> Value {
    let mut arguments = json!({ "device": "vm1", "target": target.display().to_string(), "sync": "full" });
    for (key, value) in more.as_object().unwrap() {
        arguments[key] = value.clone();
    }
    arguments
}

/// Lets a job that was slow go on as fast as it can, to its end.
fn let_go(talk: &mut Talk) -> Value {
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    talk.event("BLOCK_JOB_COMPLETED")
}

fn assert_under_way(talk: &mut Talk) {
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!((&jobs[0]["type"], &jobs[0]["status"]), (&json!("backup"), &json!("running")), "{jobs}");
}

#[test]
fn a_backup_is_the_lun_as_it_was_when_it_began_whatever_is_written_meanwhile() {
    for (from, to) in
        [(Format::Raw, Format::Qcow2), (Format::Qcow2, Format::Raw), (Format::Qcow2, Format::Qcow2)]
    {
        for (pi, mode) in
            [(false, "absolute-paths"), (true, "absolute-paths"), (true, "existing"), (false, "existing")]
        {
            let rig = Rig::new(Registry::default());
            let (old, mut known) = new_lun(&rig, from, pi);
            let target = rig.dir.path().join("copy");
            if mode == "existing" {
                // It holds something else, everywhere.
                make(&target, to, pi);
                let other = Rig::new(Registry::default());
                let mut last = start(&other, &target, pi);
                assert_eq!((0..8).map(|i| last.guest.write(i * 2048, &[0xee; MIB as usize])).sum::<u8>(), 0);
                last.guest.lun.stop().unwrap();
            }
            let then = known.disk.clone();
            let mut talk = rig.talk();
            let more = json!({ "format": to.to_string(), "mode": mode, "speed": 1 });
            talk.get("drive-backup", backup(&target, more));
            known.steps(150);
            assert_under_way(&mut talk);
            let resize = refused(&talk.ask("block_resize", json!({ "device": "vm1", "size": 2 * SIZE })));
            assert!(resize.contains("backed up"), "{resize}");
            talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
            known.steps(50);
            let done = talk.event("BLOCK_JOB_COMPLETED");
            assert_eq!(done["data"]["type"], "backup");
            assert!(done["data"].get("error").is_none(), "{done}");
            assert_eq!(done["data"]["len"], done["data"]["offset"]);
            known.steps(20);
            known.compare();
            assert_ne!(then, known.disk);
            assert_eq!(known.guest.lun.remote().made().config.image, old);
            known.guest.lun.stop().unwrap();
            judge(&target, to, pi, &then, rig.dir.path());
            judge(&old, from, pi, &known.disk, rig.dir.path());
        }
    }
}

#[test]
fn holes_stay_holes_and_states_and_events_are_those_of_qemu() {
    let rig = Rig::new(Registry::default());
    let image = rig.dir.path().join("old.qcow2");
    make(&image, Format::Qcow2, false);
    let mut known = start(&rig, &image, false);
    assert_eq!(known.guest.write(0, &[7; 4096]), 0);
    known.disk[..4096].fill(7);
    let target = rig.dir.path().join("copy.qcow2");
    let mut talk = rig.talk();
    talk.get("drive-backup", backup(&target, json!({ "auto-finalize": false, "auto-dismiss": false })));
    let mut statuses = Vec::new();
    while statuses.last().is_none_or(|s| s != "pending") {
        statuses.push(talk.event("JOB_STATUS_CHANGE")["data"]["status"].as_str().unwrap().to_owned());
    }
    assert_eq!(statuses, ["created", "running", "waiting", "pending"]);
    let early = refused(&talk.ask("job-complete", json!({ "id": "vm1" })));
    assert_eq!(early, "Job 'vm1' in state 'pending' cannot accept command verb 'complete'");
    talk.get("job-finalize", json!({ "id": "vm1" }));
    talk.event("BLOCK_JOB_COMPLETED");
    talk.event("JOB_STATUS_CHANGE");
    assert_eq!(talk.get("query-jobs", json!({}))[0]["status"], "concluded");
    talk.get("job-dismiss", json!({ "id": "vm1" }));
    known.guest.lun.stop().unwrap();
    judge(&target, Format::Qcow2, false, &known.disk, rig.dir.path());
    let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", path(&target)])).unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| run["data"] == true);
    let data: u64 = data.map(|run| run["length"].as_u64().unwrap()).sum();
    assert!(data <= 65536, "{map}");
}

#[test]
fn thirty_two_commands_at_a_time_change_nothing_of_it() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let (_, mut known) = new_lun(&rig, Format::Qcow2, pi);
        let then = known.disk.clone();
        let target = rig.dir.path().join("copy.qcow2");
        let mut talk = rig.talk();
        talk.get("drive-backup", backup(&target, json!({ "speed": 1 })));
        let (mut lba, mut written, mut is_slow) = (0u32, 0, true);
        let end = Instant::now() + Duration::from_secs(60);
        while talk.get("query-jobs", json!({})) != json!([]) {
            assert!(Instant::now() < end);
            while known.guest.kernel.in_flight() < 32 {
                let data = [lba as u8 | 1; 4096];
                // Neighbours in one granule at the same time, and far apart.
                lba = (lba + if written % 3 == 0 { 8 } else { 1000 }) % (BLOCKS as u32 - 8);
                let mut cdb = vec![0x2a, 0];
                cdb.extend(lba.to_be_bytes());
                cdb.extend([0, 0, 8, 0]);
                known.guest.kernel.submit(&cdb, Data::Out(&data)).unwrap();
                written += 1;
            }
            for done in known.guest.kernel.wait(Duration::from_secs(20)).unwrap() {
                assert_eq!(done.status, 0);
            }
            if is_slow && written >= 2000 {
                is_slow = false;
                talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
            }
        }
        while known.guest.kernel.in_flight() > 0 {
            for done in known.guest.kernel.wait(Duration::from_secs(20)).unwrap() {
                assert_eq!(done.status, 0);
            }
        }
        known.guest.lun.stop().unwrap();
        judge(&target, Format::Qcow2, pi, &then, rig.dir.path());
    }
}

#[test]
fn a_block_that_does_not_match_is_named_and_never_copied() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(4000, &[9; 512]), 0);
    let file = std::fs::File::options().read(true).write(true).open(&old).unwrap();
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    let mut talk = rig.talk();

    let new = rig.dir.path().join("new.raw");
    talk.get("drive-backup", backup(&new, json!({ "auto-dismiss": false })));
    let found = talk.event("PI_MISMATCH");
    assert_eq!((&found["data"]["operation"], &found["data"]["lba"]), (&json!("backup"), &json!(4000)));
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!((&error["data"]["operation"], &error["data"]["action"]), (&json!("read"), &json!("report")));
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"]["error"].as_str().unwrap().contains("4000"), "{done}");
    talk.get("job-dismiss", json!({ "id": "vm1" }));
    assert_eq!(std::fs::read(&new).unwrap()[4000 * 512..4001 * 512], [0; 512], "it was copied");

    // Told to stop, it waits. Whoever writes there takes its past away: the write goes on, and the job does not.
    let new = rig.dir.path().join("other.raw");
    talk.get("drive-backup", backup(&new, json!({ "on-source-error": "stop" })));
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "stop");
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!((&jobs[0]["status"], &jobs[0]["io-status"]), (&json!("paused"), &json!("failed")), "{jobs}");
    assert_eq!(known.guest.write(4001, &[5; 512]), 0);
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "report");
    let done = talk.event("BLOCK_JOB_COMPLETED");
    let reason = done["data"]["error"].as_str().unwrap();
    assert!(reason.contains("4000") && reason.contains("before a write of a guest"), "{done}");
    assert_eq!(known.guest.read(4001, 1), 0);
    assert_eq!(std::fs::read(&new).unwrap()[4000 * 512..4002 * 512], [0; 1024], "it was copied");
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_cancelled_backup_leaves_the_lun_alone_and_another_may_begin() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, true);
    let mut talk = rig.talk();
    let (a, b) = (rig.dir.path().join("a.raw"), rig.dir.path().join("b.raw"));
    talk.get("drive-backup", backup(&a, json!({ "speed": 1, "job-id": "nightly" })));
    let busy = refused(&talk.ask("drive-backup", backup(&b, json!({}))));
    assert!(busy.contains("has a job already: nightly"), "{busy}");
    let busy = refused(&talk.ask("drive-mirror", backup(&b, json!({ "job-id": "m" }))));
    assert!(busy.contains("has a job already"), "{busy}");
    assert!(!b.exists());
    talk.get("job-pause", json!({ "id": "nightly" }));
    known.steps(20);
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["status"], "paused");
    talk.get("block-job-cancel", json!({ "device": "nightly" }));
    let ended = talk.event("BLOCK_JOB_CANCELLED");
    assert_eq!(ended["data"]["type"], "backup");
    known.steps(20);
    known.compare();
    talk.event("JOB_STATUS_CHANGE");
    let then = known.disk.clone();
    talk.get("drive-backup", backup(&b, json!({})));
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    known.guest.lun.stop().unwrap();
    judge(&b, Format::Raw, true, &then, rig.dir.path());
}

#[test]
fn a_command_whose_backup_is_cancelled_does_not_call_it_whole() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, true);
    let dir = rig.dir.path();
    let mut talk = rig.talk();
    for by_command in [false, true] {
        let target = dir.join(format!("{by_command}.raw"));
        let said = std::thread::scope(|scope| {
            let waits =
                scope.spawn(|| tcmu_dif(&["backup", "vm1", path(&target), "--speed", "512"], Some(dir)));
            let end = Instant::now() + Duration::from_secs(30);
            while talk.get("query-block-jobs", json!({}))[0]["status"] != "running" {
                assert!(Instant::now() < end);
                std::thread::sleep(Duration::from_millis(5));
            }
            if by_command {
                // That one is content: it is what was wanted.
                let (good, said) = tcmu_dif(&["job", "cancel", "vm1"], Some(dir));
                assert!(good && said.contains("vm1 has ended"), "{said}");
            } else {
                talk.get("block-job-cancel", json!({ "device": "vm1" }));
            }
            waits.join().unwrap()
        });
        assert!(!said.0 && !said.1.contains("as it was"), "{said:?}");
        // Whichever of two commands has it forgotten first.
        let why = ["Operation canceled", "another command has ended the job"];
        assert!(why.iter().any(|why| said.1.contains(why)), "{said:?}");
        assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    }
    let target = dir.join("kept.raw");
    talk.get("drive-backup", backup(&target, json!({ "speed": 1, "auto-dismiss": false })));
    talk.get("block-job-cancel", json!({ "device": "vm1" }));
    let end = Instant::now() + Duration::from_secs(30);
    let jobs = loop {
        let jobs = talk.get("query-jobs", json!({}));
        if jobs[0]["status"] != "aborting" || Instant::now() > end {
            break jobs;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!((&jobs[0]["status"], &jobs[0]["error"]), (&json!("concluded"), &json!("Operation canceled")));
    talk.get("job-dismiss", json!({ "id": "vm1" }));
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_paused_backup_keeps_its_moment_and_goes_on() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let target = rig.dir.path().join("copy.qcow2");
    let then = known.disk.clone();
    let mut talk = rig.talk();
    talk.get("drive-backup", backup(&target, json!({ "speed": 1 })));
    talk.get("job-pause", json!({ "id": "vm1" }));
    known.steps(100);
    talk.get("job-resume", json!({ "id": "vm1" }));
    let done = let_go(&mut talk);
    assert!(done["data"].get("error").is_none(), "{done}");
    known.compare();
    known.guest.lun.stop().unwrap();
    judge(&target, Format::Qcow2, true, &then, rig.dir.path());
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
    let then = known.disk.clone();
    let target = dir.join("copy.qcow2");
    let mut talk = rig.talk();
    talk.get("drive-backup", backup(&target, json!({ "sync": "top", "speed": 1 })));
    known.steps(20);
    let done = let_go(&mut talk);
    assert!(done["data"].get("error").is_none(), "{done}");
    known.guest.lun.stop().unwrap();
    assert!(qemu_img(&["info", path(&target)]).contains(path(&base)));
    judge(&target, Format::Qcow2, false, &then, dir);
    let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", path(&target)])).unwrap();
    assert!(map.as_array().unwrap().iter().any(|run| run["depth"] == 1), "all of it was copied");
}

#[test]
fn without_a_copy_of_its_own_a_backup_has_what_was_overwritten_and_nothing_else() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(0, &[1; 512]), 0);
    assert_eq!(known.guest.write(8192, &[2; 512]), 0);
    let target = rig.dir.path().join("past.raw");
    let mut talk = rig.talk();
    talk.get("drive-backup", backup(&target, json!({ "sync": "none" })));
    assert_eq!(known.guest.write(0, &[3; 512]), 0);
    std::thread::sleep(Duration::from_millis(300));
    assert_under_way(&mut talk);
    talk.get("block-job-cancel", json!({ "device": "vm1" }));
    talk.event("BLOCK_JOB_CANCELLED");
    known.guest.lun.stop().unwrap();
    let past = std::fs::read(&target).unwrap();
    assert_eq!((&past[..512], &past[8192 * 512..8193 * 512]), (&[1; 512][..], &[0; 512][..]));
    let (good, said) = tcmu_dif(&["pi", "verify", path(&target)], None);
    assert!(good, "{said}");
}

#[test]
fn what_cannot_be_a_target_is_refused_with_a_reason_and_nothing_is_left_of_it() {
    let rig = Rig::new(Registry::default());
    let (old, known) = new_lun(&rig, Format::Raw, true);
    let dir = rig.dir.path();
    std::fs::write(dir.join("small.raw"), vec![0; 4096]).unwrap();
    let mut talk = rig.talk();
    for (target, more, reason) in [
        (dir.join("small.raw"), json!({}), "exists already"),
        (dir.join("small.raw"), json!({ "mode": "existing" }), "4096"),
        (PathBuf::from("new.raw"), json!({}), "not absolute"),
        (dir.join("no/new.raw"), json!({}), "directory does not exist"),
        (old.clone(), json!({ "mode": "existing" }), "in use"),
        (dir.join("a"), json!({ "format": "vmdk" }), "Unknown driver"),
        (dir.join("a"), json!({ "sync": "some" }), "some"),
        (dir.join("a"), json!({ "compress": true }), "unexpected"),
    ] {
        let said = refused(&talk.ask("drive-backup", backup(&target, more)));
        assert!(said.contains(reason), "{}: {said}", target.display());
    }
    assert!(!dir.join("a").exists() && !dir.join("a.pi").exists());
    assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    known.guest.lun.stop().unwrap();
}

/// A file system with so much room, taken down at the end.
struct Small(tempfile::TempDir);

impl Small {
    fn new(room: u64) -> Small {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={room}");
        let made = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).status();
        assert!(made.unwrap().success());
        Small(dir)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "needs root, for a small file system"]
fn a_target_that_is_full_stops_the_job_or_ends_it_and_never_a_write() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, false);
    for i in 0..8 {
        assert_eq!(known.guest.write(i * 2048, &vec![i as u8 + 1; MIB as usize]), 0);
        known.disk[(i as u64 * MIB) as usize..((i as u64 + 1) * MIB) as usize].fill(i as u8 + 1);
    }
    let small = Small::new(3 * MIB);
    let then = known.disk.clone();
    let mut talk = rig.talk();
    let target = small.0.path().join("copy.raw");
    talk.get("drive-backup", backup(&target, json!({ "on-target-error": "enospc" })));
    let error = talk.event("BLOCK_JOB_ERROR");
    assert_eq!((&error["data"]["operation"], &error["data"]["action"]), (&json!("write"), &json!("stop")));
    assert_eq!(talk.get("query-block-jobs", json!({}))[0]["io-status"], "nospace");
    // With room it goes on, and nothing is missing.
    let made = Command::new("mount").args(["-o", "remount,size=64m"]).arg(small.0.path()).status();
    assert!(made.unwrap().success());
    known.steps(20);
    talk.get("job-resume", json!({ "id": "vm1" }));
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
    judge(&target, Format::Raw, false, &then, rig.dir.path());
    drop(small);

    let small = Small::new(MIB);
    let target = small.0.path().join("copy.raw");
    talk.get("drive-backup", backup(&target, json!({ "sync": "none", "on-target-error": "stop" })));
    known.steps(100);
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"]["error"].as_str().unwrap().contains("before a write of a guest"), "{done}");
    known.compare();
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_backup_that_an_orderly_stop_cut_off_has_ended_with_an_error() {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, Format::Raw, true);
    let target = rig.dir.path().join("copy.raw");
    let mut talk = rig.talk();
    talk.get("drive-backup", backup(&target, json!({ "speed": 1 })));
    known.steps(10);
    known.guest.lun.stop().unwrap();
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &old, true) };
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!(
        (&jobs[0]["status"], &jobs[0]["target"]),
        (&json!("concluded"), &json!(path(&target))),
        "{jobs}"
    );
    assert!(jobs[0]["error"].as_str().unwrap().contains("the moment that it was of is lost"), "{jobs}");
    known.steps(10);
    known.compare();
    talk.get("job-dismiss", json!({ "id": "vm1" }));
    known.guest.lun.stop().unwrap();
    let disk = known.disk;
    let mut known = Known { disk, ..start(&rig, &old, true) };
    assert_eq!(talk.get("query-block-jobs", json!({})), json!([]));
    known.compare();
    known.guest.lun.stop().unwrap();
}

/// Serves a LUN with a backup under way, until it is killed.
fn victim(dir: &Path) -> ! {
    let mut rig = Rig::new(Registry::default());
    // Its files are the test's.
    let image = dir.join("old.raw");
    let config = tcmu_dif::lun::config::DeviceConfig {
        pi: Some(tcmu_dif::pi::PiType::Type1),
        ..tcmu_dif::lun::config::DeviceConfig::new(&image)
    };
    let own = std::mem::replace(&mut rig.dir, tempfile::TempDir::with_prefix("victim").unwrap());
    std::os::unix::fs::symlink(dir.join("state"), rig.dir.path().join("state")).unwrap();
    let mut guest = rig.start("vm1", config, SIZE);
    for lba in (0..BLOCKS as u32).step_by(2048) {
        assert_eq!(guest.write(lba, &vec![1; MIB as usize]), 0);
    }
    let mut talk = Talk::begin(&own.path().join("qmp.sock"));
    talk.get("drive-backup", backup(&dir.join("copy.raw"), json!({ "speed": 1 })));
    for turn in 0u32.. {
        let place = turn.wrapping_mul(2_654_435_761) % (BLOCKS as u32 - 8);
        assert_eq!(guest.write(place, &[turn as u8; 4096]), 0);
        if turn == 50 {
            std::fs::write(dir.join("serves"), "").unwrap();
        }
    }
    unreachable!()
}

#[test]
fn a_backup_that_a_kill_cut_off_has_ended_with_an_error() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        victim(Path::new(&dir));
    }
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    std::fs::create_dir(dir.join("state")).unwrap();
    let image = dir.join("old.raw");
    make(&image, Format::Raw, true);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_backup_that_a_kill_cut_off_has_ended_with_an_error", "--nocapture"])
        .env(VICTIM, dir)
        .env("TMPDIR", dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    while !dir.join("serves").exists() {
        let ended = victim.try_wait().unwrap();
        assert!(Instant::now() < end && ended.is_none(), "it does not serve: {ended:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    victim.kill().unwrap();
    victim.wait().unwrap();
    // The kernel may hold a killed process's locks for a moment.
    std::thread::sleep(Duration::from_millis(300));
    let known = start(&rig, &image, true);
    let mut talk = rig.talk();
    let jobs = talk.get("query-block-jobs", json!({}));
    let copy = dir.join("copy.raw");
    assert_eq!(
        (&jobs[0]["status"], &jobs[0]["target"]),
        (&json!("concluded"), &json!(path(&copy))),
        "{jobs}"
    );
    assert!(jobs[0]["error"].as_str().unwrap().contains("not whole"), "{jobs}");
    let (good, said) = tcmu_dif(&["job", "list"], Some(dir));
    assert!(good && said.contains("backup") && said.contains("not whole"), "{said}");
    known.guest.lun.stop().unwrap();
}

#[test]
fn the_command_line_backs_up_and_tells_what_came_of_it() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let dir = rig.dir.path();
    let (a, b) = (dir.join("a.raw"), dir.join("b.qcow2"));
    let cli = |words: &[&str]| tcmu_dif(words, Some(dir));
    let (good, said) = cli(&["backup", "vm1", path(&a), "--format", "raw"]);
    assert!(good && said.contains("as it was when the backup began"), "{said}");
    let then = known.disk.clone();
    known.steps(20);
    judge(&a, Format::Raw, true, &then, dir);
    let (good, said) = cli(&["backup", "vm1", path(&a), "--format", "raw", "--existing", "--json"]);
    assert!(good, "{said}");
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&told["done"], &told["target"]), (&json!(true), &json!(path(&a))));
    judge(&a, Format::Raw, true, &known.disk, dir);

    let (good, said) = cli(&["backup", "vm1", path(&b), "--speed", "1", "--background", "--json"]);
    assert!(good, "{said}");
    let (good, said) = cli(&["job", "list"]);
    assert!(good && said.contains("backup"), "{said}");
    let (good, said) = cli(&["job", "cancel", "vm1"]);
    assert!(good, "{said}");

    // What it cannot do it says, and what comes next.
    let (good, said) = cli(&["backup", "vm1", path(&b)]);
    assert!(!good && said.contains("exists already") && said.contains("next: "), "{said}");
    known.compare();
    known.guest.lun.stop().unwrap();
}
