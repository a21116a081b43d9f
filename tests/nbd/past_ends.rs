//! How an export of one point in time ends: by the command line, by what cannot be copied, by a LUN that goes and a daemon that is killed; and
//! what is none from the beginning.

use std::{
    io::{Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    image::Format,
    nbd::{answer, handshake, option},
    pi::store::default_path,
};

use crate::{
    contexts::{ask, bitmap, dirty},
    export::{connect, socket, start, uri},
    known::{self, BLOCKS, Known, SIZE, make, new_lun, path, refused, tcmu_dif},
    past::{Reader, beside, export, idle, nothing_of, order},
    rig::{MIB, Rig, Talk},
    support::run,
};

/// Says to the test that it is the process to be killed, and where its files are.
const VICTIM: &str = "TCMU_DIF_TEST_PAST_VICTIM";

#[test]
fn once_the_moment_is_lost_every_read_is_an_error_and_guests_notice_nothing() {
    let rig = Rig::new(Registry::default());
    let (image, mut known) = new_lun(&rig, Format::Raw, true);
    assert_eq!(known.guest.write(4000, &[9; 1024]), 0);
    known.disk[4000 * 512..4002 * 512].fill(9);
    let (scratch, copy) = (rig.dir.path().join("scratch"), rig.dir.path().join("copy"));
    let then = known.disk.clone();
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    bitmap(&mut talk, "add", "daily", json!({}));
    let more = json!({ "bitmap": "daily", "bitmap-mode": "on-success", "auto-dismiss": false });
    talk.get("drive-backup", order(&scratch, more));
    export(&mut talk, json!({ "bitmaps": ["daily"] }));
    let uri = uri(&mut talk);
    assert!(beside_where(&mut known, &uri, &copy, |lba| !(3000..=5000).contains(&lba)));
    assert!(std::fs::read(&copy).unwrap() == then);
    let mut reader = Reader::new(&rig, "then");
    assert!(reader.read(0, 4096).unwrap() == then[..4096]);

    // A block that has gone bad cannot be copied before its neighbour is written to.
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[8], 4000 * 512 + 17).unwrap();
    assert_eq!(reader.read(4000 * 512, 512), Err(5), "it is verified");
    assert!(reader.read(4001 * 512, 512).unwrap() == [9; 512]);
    assert_eq!(known.guest.write(4001, &[5; 512]), 0);
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"]["error"].as_str().unwrap().contains("before a write of a guest"), "{done}");
    // What was copied, what is as it was, and the rest.
    for at in [0, 4000 * 512, 4001 * 512, SIZE - 512] {
        assert_eq!(reader.read(at, 512), Err(5), "{at}");
    }
    assert!(!run("nbdcopy", &[&uri, path(&copy)]).status.success());
    assert!(!run("nbdinfo", &["--map=qemu:dirty-bitmap:daily", &uri]).status.success());
    let mut client = connect(&socket(&rig));
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&3u32.to_be_bytes()).unwrap();
    let said = ask(&mut client, option::GO, &handshake::go("then", &[]));
    let (kind, words) = (said[0].0, String::from_utf8_lossy(&said[0].1));
    assert!(kind == answer::ERR_UNKNOWN && words.contains("the point in time is lost"), "{kind:#x} {words}");
    nothing_of(&scratch);
    // Another job of the same name is not what is exported.
    talk.get("job-dismiss", json!({ "id": "past" }));
    assert_eq!(known.guest.write(4000, &[6; 512]), 0);
    talk.get("drive-backup", order(&scratch, json!({})));
    assert_eq!(reader.read(0, 512), Err(5));
    assert!(Reader::new_is_refused(&rig, "then"));
    drop(reader);
    let busy = refused(&talk.ask("block-dirty-bitmap-remove", json!({ "node": "vm1", "name": "daily" })));
    assert!(busy.contains("in use"), "{busy}");
    talk.get("block-export-del", json!({ "id": "e1", "mode": "hard" }));
    export(&mut talk, json!({}));
    assert_eq!(Reader::new(&rig, "then").read(4000 * 512, 512).unwrap(), [6; 512]);
    // What the bitmap had is not lost.
    let blocks = talk.get("query-block", json!({}));
    assert!(blocks[0]["inserted"]["dirty-bitmaps"][0]["count"].as_u64().unwrap() > 0, "{blocks}");
    known.guest.lun.stop().unwrap();
    nothing_of(&scratch);
}

/// Has nbdcopy read an export while a guest writes to blocks that may be written to.
fn beside_where(known: &mut Known, uri: &str, copy: &Path, may: impl Fn(u64) -> bool) -> bool {
    let mut child = Command::new("nbdcopy").args([uri, path(copy)]).spawn().unwrap();
    loop {
        let lba = known.random(BLOCKS - 8);
        if may(lba) {
            let data = vec![known.random(256) as u8; 4096];
            assert_eq!(known.guest.write(lba as u32, &data), 0);
            known.disk[(lba * 512) as usize..][..4096].copy_from_slice(&data);
        }
        if let Some(ended) = child.try_wait().unwrap() {
            return ended.success();
        }
    }
}

/// A file system with so much room, taken down at the end.
struct Small(tempfile::TempDir);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "needs root, for a small file system"]
fn a_scratch_file_system_that_is_full_ends_the_export_and_no_write_of_a_guest() {
    let small = Small(tempfile::tempdir().unwrap());
    let made =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(small.0.path()).status();
    assert!(made.unwrap().success());
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let (_, mut known) = new_lun(&rig, Format::Qcow2, pi);
        known.steps(50);
        let then = known.disk.clone();
        let mut talk = rig.talk();
        start(&rig, &mut talk);
        let scratch = small.0.path().join("scratch");
        talk.get("drive-backup", order(&scratch, json!({})));
        export(&mut talk, json!({}));
        let mut reader = Reader::new(&rig, "then");
        let end = Instant::now() + Duration::from_secs(60);
        // Whatever is read until it is full is of that moment.
        loop {
            known.step();
            let at = known.random(SIZE / 4096) * 4096;
            match reader.read(at, 4096) {
                Ok(data) => assert!(data == then[at as usize..][..4096], "{at}"),
                Err(error) => {
                    assert_eq!(error, 5);
                    break;
                }
            }
            assert!(Instant::now() < end, "it is never full");
        }
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"]["error"].as_str().unwrap().contains("before a write of a guest"), "{done}");
        known.steps(20);
        assert_eq!(reader.read(0, 512), Err(5));
        known.compare();
        known.guest.lun.stop().unwrap();
        nothing_of(&scratch);
    }
}

#[test]
fn what_cannot_be_is_refused_in_words_and_leaves_nothing() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, true);
    let scratch = rig.dir.path().join("scratch");
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    bitmap(&mut talk, "add", "daily", json!({}));
    bitmap(&mut talk, "add", "other", json!({}));
    for (more, reason) in [
        (json!({ "mode": "existing" }), "leave out 'scratch'"),
        (json!({ "bitmap": "daily" }), "must be 'on-success'"),
        (json!({ "bitmap": "daily", "bitmap-mode": "always" }), "must be 'on-success'"),
        (json!({ "bitmap": "x", "bitmap-mode": "on-success" }), "not found"),
    ] {
        let said = refused(&talk.ask("drive-backup", order(&scratch, more)));
        assert!(said.contains(reason), "{said}");
        nothing_of(&scratch);
    }
    // Of a job that copies all there is nothing to export: it ends by itself.
    talk.get("drive-backup", order(&scratch, json!({ "sync": "full", "speed": 1 })));
    let add = |more: Value| {
        let mut arguments = json!({ "type": "nbd", "id": "e1", "node-name": "past" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    let said = refused(&talk.ask("block-export-add", add(json!({}))));
    assert!(said.contains("a backup with sync none does"), "{said}");
    talk.get("job-cancel", json!({ "id": "past" }));
    idle(&mut talk);
    nothing_of(&scratch);
    let with = json!({ "bitmap": "daily", "bitmap-mode": "on-success" });
    talk.get("drive-backup", order(&scratch, with));
    for (more, reason) in [
        (json!({ "writable": true }), "cannot be written to"),
        (json!({ "allocation-depth": true }), "leave it out"),
        (json!({ "bitmaps": ["other"] }), "Enabled bitmap 'other' incompatible with readonly export"),
        (json!({ "bitmaps": ["daily", "daily"] }), "in use"),
        (json!({ "node-name": "vm1", "bitmaps": ["daily"] }), "in use"),
        (json!({ "node-name": "vm3" }), "not served"),
    ] {
        let said = refused(&talk.ask("block-export-add", add(more)));
        assert!(said.contains(reason), "{said}");
    }
    talk.get("block-export-add", add(json!({ "bitmaps": ["daily"] })));
    // A LUN that goes takes all with it.
    rig.luns.remove("vm1", known.guest.lun.remote());
    assert_eq!(talk.event("BLOCK_EXPORT_DELETED")["data"]["id"], "e1");
    known.guest.lun.stop().unwrap();
    nothing_of(&scratch);
}

#[test]
fn the_command_line_does_all_of_it_in_one() {
    let rig = Rig::new(Registry::default());
    let (image, mut known) = new_lun(&rig, Format::Qcow2, true);
    let dir = rig.dir.path().to_owned();
    let cli = |words: &[&str]| tcmu_dif(words, Some(&dir));
    let good = |words: &[&str]| {
        let (good, said) = cli(words);
        assert!(good, "{words:?}: {said}");
        said
    };
    good(&["bitmap", "add", "vm1", "daily"]);
    known.steps(5);
    let (scratch, copy) = (PathBuf::from(format!("{}.scratch", path(&image))), dir.join("copy"));
    let marked = |talk: &mut Talk| {
        let blocks = talk.get("query-block", json!({}));
        blocks[0]["inserted"]["dirty-bitmaps"][0]["count"].as_u64().unwrap()
    };
    let mut talk = rig.talk();
    for copied in [true, false] {
        let then = known.disk.clone();
        let said = good(&["export", "vm1", "--point-in-time", "--bitmap", "daily"]);
        let uri = said
            .lines()
            .next()
            .unwrap()
            .strip_prefix("vm1 is exported as it is at this moment: ")
            .unwrap()
            .to_owned();
        assert!(scratch.exists() && default_path(&scratch).exists());
        assert!(beside(&mut known, "nbdcopy", &[&uri, path(&copy)]));
        assert!(std::fs::read(&copy).unwrap() == then);
        assert!(!dirty(&uri, "daily").is_empty());
        assert!(good(&["bitmap", "list", "vm1"]).contains("in use"));
        let (again, said) = cli(&["export", "vm1", "--point-in-time"]);
        assert!(!again && said.contains("next: "), "{said}");
        let before = marked(&mut talk);
        let said = match copied {
            true => good(&["export", "vm1", "--end", "--copied", "--force"]),
            false => good(&["export", "vm1", "--end", "--force"]),
        };
        assert_eq!(said.trim(), "vm1 is no longer exported");
        assert_eq!(marked(&mut talk) < before, copied, "{} of {before}", marked(&mut talk));
        nothing_of(&scratch);
        assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    }
    // Elsewhere, with its data for programs; lost, because somebody has ended the job.
    let other = dir.join("other");
    let said =
        good(&["export", "vm1", "--point-in-time", "--scratch", path(&other), "--as", "then", "--json"]);
    let told: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&told["scratch"], &told["job"]), (&json!(path(&other)), &json!("point-in-time@vm1")));
    good(&["job", "cancel", "point-in-time@vm1"]);
    let (ended, said) = cli(&["export", "vm1", "--end", "--copied"]);
    assert!(!ended && said.contains("its point in time was lost") && said.contains("next: "), "{said}");
    nothing_of(&other);
    let (ended, said) = cli(&["export", "vm1", "--end"]);
    assert!(!ended && said.contains("not found"), "{said}");
    // A disabled bitmap of the LUN as it is.
    good(&["bitmap", "disable", "vm1", "daily"]);
    good(&["export", "vm1", "--bitmap", "daily"]);
    assert!(!dirty(&uri(&mut talk), "daily").is_empty());
    let (ended, said) = cli(&["export", "vm1", "--end", "--copied", "--force"]);
    assert!(!ended && said.contains("no export of a point in time"), "{said}");
    // What could not be exported has left no job, and no file.
    let (begun, said) = cli(&["export", "vm1", "--point-in-time", "--as", &"x".repeat(5000)]);
    assert!(!begun, "{said}");
    nothing_of(&scratch);
    assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    known.compare();
    known.guest.lun.stop().unwrap();
}

/// Serves a LUN with a point in time that is kept, until it is killed.
fn victim(dir: &Path) -> ! {
    let mut rig = Rig::new(Registry::default());
    // Its files are the test's.
    let own = std::mem::replace(&mut rig.dir, tempfile::TempDir::with_prefix("victim").unwrap());
    std::os::unix::fs::symlink(dir.join("state"), rig.dir.path().join("state")).unwrap();
    let mut known = known::start(&rig, &dir.join("old.raw"), true);
    let mut talk = Talk::begin(&own.path().join("qmp.sock"));
    talk.get("drive-backup", order(&dir.join("scratch"), json!({})));
    assert_eq!(known.guest.write(0, &vec![1; MIB as usize]), 0);
    std::fs::write(dir.join("serves"), "").unwrap();
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[test]
fn the_scratch_file_of_a_daemon_that_was_killed_is_removed_when_the_lun_starts_again() {
    if let Some(dir) = std::env::var_os(VICTIM) {
        victim(Path::new(&dir));
    }
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    std::fs::create_dir(dir.join("state")).unwrap();
    let (image, scratch) = (dir.join("old.raw"), dir.join("scratch"));
    make(&image, Format::Raw, true);
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "past_ends::the_scratch_file_of_a_daemon_that_was_killed_is_removed_when_the_lun_starts_again",
            "--nocapture",
        ])
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
    assert!(scratch.exists() && default_path(&scratch).exists());
    // The kernel may hold a killed process's locks for a moment.
    std::thread::sleep(Duration::from_millis(300));
    let known = known::start(&rig, &image, true);
    nothing_of(&scratch);
    let mut talk = rig.talk();
    let jobs = talk.get("query-block-jobs", json!({}));
    assert_eq!(jobs[0]["status"], "concluded");
    assert!(jobs[0]["error"].as_str().unwrap().contains("its scratch file is removed"), "{jobs}");
    known.guest.lun.stop().unwrap();
}
