//! The same job done here and by QEMU (`qemu-storage-daemon`) on copies of the same images: guests see the same in what either has made, and each goes on
//! with the chains and bitmaps of the other.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{control::Registry, image::Format};

#[allow(dead_code)] // Other tests use more of it.
#[path = "common/known.rs"]
mod known;
#[allow(dead_code)] // Other tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use known::{Known, SIZE, chain, image_of, judge, new_lun, path, qemu_img, start};
use rig::{Rig, Talk};

/// QEMU's block layer in a process of its own, led over QMP.
struct Qemu {
    process: Child,
    talk: Talk,
}

impl Qemu {
    fn start(dir: &Path) -> Qemu {
        let socket = dir.join("qsd.sock");
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
        let mut process = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=qmp"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(30);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(process.try_wait().unwrap().is_none() && Instant::now() < end, "it does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        Qemu { process, talk: Talk::begin(&socket) }
    }

    /// Opens a chain, from the base up, with the nodes n0, n1 and so on; gives the last one's name.
    fn open(&mut self, files: &[PathBuf]) -> String {
        for (i, file) in files.iter().enumerate() {
            let driver = if is_raw(file) { "raw" } else { "qcow2" };
            let mut node = json!({
                "driver": driver, "node-name": format!("n{i}"),
                "file": { "driver": "file", "filename": path(file) },
            });
            if driver == "qcow2" {
                node["backing"] = if i > 0 { format!("n{}", i - 1).into() } else { Value::Null };
            }
            self.talk.get("blockdev-add", node);
        }
        format!("n{}", files.len() - 1)
    }

    /// Opens an image, and what it says that lies beneath.
    fn open_target(&mut self, file: &Path) -> String {
        let driver = if is_raw(file) { "raw" } else { "qcow2" };
        let protocol = json!({ "driver": "file", "filename": path(file) });
        self.talk.get("blockdev-add", json!({ "driver": driver, "node-name": "target", "file": protocol }));
        "target".to_owned()
    }

    /// Runs a job to its end; a mirror or a commit that gets ready by `end`.
    fn job(&mut self, verb: &str, mut arguments: Value, end: Option<&str>) {
        arguments["job-id"] = "job".into();
        self.talk.get(verb, arguments);
        if let Some(end) = end {
            self.talk.event("BLOCK_JOB_READY");
            self.talk.get(end, json!({ "device": "job" }));
        }
        let done = self.talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
    }

    fn quit(mut self) {
        self.talk.get("quit", json!({}));
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It has ended, if all went well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn is_raw(file: &Path) -> bool {
    file.extension().is_some_and(|end| end == "raw")
}

/// Runs a job of the LUN to its end; a mirror or a commit that gets ready by `end`.
fn job(talk: &mut Talk, verb: &str, arguments: Value, end: Option<&str>) {
    talk.get(verb, arguments);
    if let Some(end) = end {
        talk.event("BLOCK_JOB_READY");
        talk.get(end, json!({ "device": "vm1" }));
    }
    let done = talk.event("BLOCK_JOB_COMPLETED");
    assert!(done["data"].get("error").is_none(), "{done}");
}

fn copied(from: &[PathBuf], dir: &Path) -> Vec<PathBuf> {
    std::fs::create_dir(dir).unwrap();
    let mut files: Vec<PathBuf> = Vec::new();
    for file in from {
        let to = dir.join(file.file_name().unwrap());
        std::fs::copy(file, &to).unwrap();
        if let Some(below) = files.last() {
            let format = if is_raw(below) { "raw" } else { "qcow2" };
            qemu_img(&["rebase", "-u", "-f", "qcow2", "-b", path(below), "-F", format, path(&to)]);
        }
        files.push(to);
    }
    files
}

/// A chain from the base up, its LUN, which is up, and a copy of it for QEMU, of the same moment.
struct Both {
    rig: Rig,
    ours: Vec<PathBuf>,
    theirs: Vec<PathBuf>,
    known: Known,
    talk: Talk,
}

fn both(base: Format, pi: bool, overlays: usize) -> Both {
    let rig = Rig::new(Registry::default());
    let (old, mut known) = new_lun(&rig, base, pi);
    let mut talk = rig.talk();
    let mut ours = vec![old];
    for i in 1..=overlays {
        let file = rig.dir.path().join(format!("over{i}.qcow2"));
        talk.get("blockdev-snapshot-sync", json!({ "device": "vm1", "snapshot-file": path(&file) }));
        known.steps(40);
        ours.push(file);
    }
    known.guest.lun.stop().unwrap();
    let theirs = copied(&ours, &rig.dir.path().join("qemu"));
    let known = Known { disk: known.disk, ..start(&rig, &ours[overlays], pi) };
    Both { rig, ours, theirs, known, talk }
}

fn identical(a: &Path, b: &Path) {
    let format = |file: &Path| if is_raw(file) { "raw" } else { "qcow2" };
    let said = qemu_img(&["compare", "-f", format(a), "-F", format(b), path(a), path(b)]);
    assert!(said.contains("identical"), "{said}");
}

/// The names of a chain's files, from the top down.
fn names(image: &Path) -> Vec<String> {
    chain(image).iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

/// A LUN goes on with what QEMU has made: reads it, writes to it, and QEMU finds that whole.
fn goes_on_with(image: &Path, disk: &[u8]) {
    let format = if is_raw(image) { Format::Raw } else { Format::Qcow2 };
    let rig = Rig::new(Registry::default());
    let mut known = Known { disk: disk.to_vec(), ..start(&rig, image, false) };
    known.compare();
    known.steps(40);
    known.compare();
    known.guest.lun.stop().unwrap();
    judge(image, format, false, &known.disk, rig.dir.path());
}

#[test]
fn a_mirror_is_what_qemus_is() {
    for (base, overlays, sync) in [
        (Format::Raw, 0, "full"),
        (Format::Qcow2, 1, "full"),
        (Format::Raw, 2, "full"),
        (Format::Raw, 1, "top"),
    ] {
        let Both { rig, ours, theirs, known, mut talk } = both(base, true, overlays);
        let made = |dir: &Path, files: &[PathBuf]| {
            let target = dir.join("mirror.qcow2");
            let mut words = vec!["create", "-q", "-f", "qcow2"];
            let below = (sync == "top").then(|| path(&files[0]).to_owned());
            if let Some(below) = &below {
                words.extend(["-b", below, "-F", "raw"]);
            }
            let size = SIZE.to_string();
            words.extend([path(&target), &size]);
            qemu_img(&words);
            target
        };
        let (ours_to, theirs_to) = (made(rig.dir.path(), &ours), made(theirs[0].parent().unwrap(), &theirs));
        let how = json!({ "device": "vm1", "target": path(&ours_to), "mode": "existing", "sync": sync });
        job(&mut talk, "drive-mirror", how, Some("block-job-cancel"));
        known.guest.lun.stop().unwrap();
        let mut qemu = Qemu::start(theirs[0].parent().unwrap());
        let (source, target) = (qemu.open(&theirs), qemu.open_target(&theirs_to));
        let how = json!({ "device": source, "target": target, "sync": sync });
        qemu.job("blockdev-mirror", how, Some("block-job-cancel"));
        qemu.quit();
        identical(&ours_to, &theirs_to);
        assert_eq!(names(&ours_to), names(&theirs_to));
        judge(&ours_to, Format::Qcow2, true, &known.disk, rig.dir.path());
        judge(&theirs_to, Format::Qcow2, false, &known.disk, rig.dir.path());
        goes_on_with(&theirs_to, &known.disk);
    }
}

#[test]
fn a_stream_makes_of_a_chain_what_qemus_does() {
    for (format, base) in
        [(Format::Raw, None), (Format::Qcow2, None), (Format::Raw, Some(0)), (Format::Raw, Some(1))]
    {
        let Both { rig, ours, theirs, known, mut talk } = both(format, true, 3);
        let mut how = json!({ "device": "vm1" });
        if let Some(base) = base {
            how["base"] = path(&ours[base]).into();
        }
        job(&mut talk, "block-stream", how, None);
        known.guest.lun.stop().unwrap();
        let mut qemu = Qemu::start(theirs[0].parent().unwrap());
        let mut how = json!({ "device": qemu.open(&theirs) });
        if let Some(base) = base {
            how["base-node"] = format!("n{base}").into();
        }
        qemu.job("block-stream", how, None);
        qemu.quit();
        identical(&ours[3], &theirs[3]);
        assert_eq!(names(&ours[3]), names(&theirs[3]));
        judge(&ours[3], Format::Qcow2, true, &known.disk, rig.dir.path());
        judge(&theirs[3], Format::Qcow2, false, &known.disk, rig.dir.path());
        goes_on_with(&theirs[3], &known.disk);
    }
}

#[test]
fn a_commit_makes_of_a_chain_what_qemus_does() {
    // The images that are named, from the base up; the last is the LUN's own.
    for (format, top, base) in [
        (Format::Raw, 3, 0),
        (Format::Qcow2, 3, 0),
        (Format::Raw, 3, 1),
        (Format::Raw, 2, 0),
        (Format::Raw, 2, 1),
    ] {
        let Both { rig, ours, theirs, mut known, mut talk } = both(format, true, 3);
        let is_active = top == 3;
        let end = is_active.then_some("block-job-complete");
        let mut how = json!({ "device": "vm1", "base": path(&ours[base]) });
        if !is_active {
            how["top"] = path(&ours[top]).into();
        }
        job(&mut talk, "block-commit", how, end);
        known.compare();
        let now = image_of(&known);
        known.guest.lun.stop().unwrap();
        let mut qemu = Qemu::start(theirs[0].parent().unwrap());
        let mut how = json!({ "device": qemu.open(&theirs), "base-node": format!("n{base}") });
        if !is_active {
            how["top-node"] = format!("n{top}").into();
        }
        qemu.job("block-commit", how, end);
        qemu.quit();
        // The LUN has the base after a commit of its own image, and so would a disk of QEMU's.
        let (ours_now, theirs_now) =
            if is_active { (&ours[base], &theirs[base]) } else { (&ours[3], &theirs[3]) };
        assert_eq!(&now, ours_now);
        identical(ours_now, theirs_now);
        identical(&ours[base], &theirs[base]);
        assert_eq!(names(ours_now), names(theirs_now));
        let format = if is_raw(ours_now) { Format::Raw } else { Format::Qcow2 };
        judge(ours_now, format, true, &known.disk, rig.dir.path());
        judge(theirs_now, format, false, &known.disk, rig.dir.path());
        goes_on_with(theirs_now, &known.disk);
    }
}

/// How many bytes of a LUN are marked in a bitmap.
fn marked(talk: &mut Talk, name: &str) -> Value {
    let blocks = talk.get("query-block", json!({}));
    let bitmaps = blocks[0]["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps.iter().find(|bitmap| bitmap["name"] == name).unwrap_or_else(|| panic!("{blocks}"))["count"]
        .clone()
}

fn overlay(of: &Path, file: PathBuf) -> PathBuf {
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(of), "-F", "qcow2", path(&file)]);
    file
}

#[test]
fn full_and_incremental_backups_are_what_qemus_are_with_the_bitmaps_of_either() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (old, known) = new_lun(&rig, Format::Qcow2, false);
    let mut talk = rig.talk();
    talk.get("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "b", "persistent": true }));
    let full = dir.join("full.qcow2");
    let how = json!({ "device": "vm1", "target": path(&full), "format": "qcow2", "sync": "full", "bitmap": "b", "bitmap-mode": "on-success" });
    job(&mut talk, "drive-backup", how, None);
    known.guest.lun.stop().unwrap();
    let theirs = copied(std::slice::from_ref(&old), &dir.join("qemu"));
    let qemus = theirs[0].parent().unwrap().to_owned();

    // Full ones of the same disk.
    let full_of_qemu = qemus.join("full.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&full_of_qemu), &SIZE.to_string()]);
    let mut qemu = Qemu::start(&qemus);
    let (source, target) = (qemu.open(&theirs), qemu.open_target(&full_of_qemu));
    qemu.job("blockdev-backup", json!({ "device": source, "target": target, "sync": "full" }), None);
    qemu.quit();
    identical(&full, &full_of_qemu);
    judge(&full_of_qemu, Format::Qcow2, false, &known.disk, dir);

    // What a LUN marks in its bitmap QEMU backs up by it, and so does the LUN.
    let mut known = Known { disk: known.disk, seed: 5, ..start(&rig, &old, false) };
    known.steps(40);
    known.guest.lun.stop().unwrap();
    std::fs::copy(&old, &theirs[0]).unwrap();
    let (first, first_of_qemu) = (overlay(&full, dir.join("1.qcow2")), overlay(&full, qemus.join("1.qcow2")));
    let how = |to: &Path| json!({ "device": "vm1", "target": path(to), "mode": "existing", "sync": "incremental", "bitmap": "b" });
    let mut known = Known { disk: known.disk, seed: 6, ..start(&rig, &old, false) };
    assert_ne!(marked(&mut talk, "b"), 0);
    job(&mut talk, "drive-backup", how(&first), None);
    known.guest.lun.stop().unwrap();
    let mut qemu = Qemu::start(&qemus);
    let (source, target) = (qemu.open(&theirs), qemu.open_target(&first_of_qemu));
    let by_qemu =
        |source, target| json!({ "device": source, "target": target, "sync": "incremental", "bitmap": "b" });
    qemu.job("blockdev-backup", by_qemu(source, target), None);
    qemu.quit();
    identical(&first, &first_of_qemu);
    let allocated = |image: &Path| {
        let map: Value = serde_json::from_str(&qemu_img(&["map", "--output=json", path(image)])).unwrap();
        let own = map.as_array().unwrap().iter().filter(|run| run["depth"] == 0);
        own.map(|run| run["length"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!(allocated(&first), allocated(&first_of_qemu), "what was marked is what was copied");
    judge(&first_of_qemu, Format::Qcow2, false, &known.disk, dir);

    // QEMU has emptied its bitmap, and the LUN goes on with it; the other way round, too.
    known.guest = start(&rig, &theirs[0], false).guest;
    assert_eq!(marked(&mut talk, "b"), 0);
    known.steps(30);
    let second = overlay(&first_of_qemu, qemus.join("2.qcow2"));
    job(&mut talk, "drive-backup", how(&second), None);
    known.guest.lun.stop().unwrap();
    judge(&second, Format::Qcow2, false, &known.disk, dir);
    let wrote = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 0x5a 1M 100k", "-c", "write -z 3M 64k", path(&old)])
        .output()
        .unwrap();
    assert!(wrote.status.success());
    let second = overlay(&first, dir.join("2.qcow2"));
    let mut qemu = Qemu::start(&qemus);
    let (source, target) = (qemu.open(std::slice::from_ref(&old)), qemu.open_target(&second));
    qemu.job("blockdev-backup", by_qemu(source, target), None);
    qemu.quit();
    identical(&second, &old);
    assert!(allocated(&second) <= 4 * 65536, "{}", allocated(&second));
}
