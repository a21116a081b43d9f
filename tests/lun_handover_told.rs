//! What the command line and QMP tell of a handover with storage, and how it is called off, or has to wait before the switchover.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use tcmu_dif::{
    control::{Host, Progress, Registry, To, qmp::Error},
    handover,
    image::Format,
};

#[path = "common/goes.rs"]
#[allow(dead_code)] // Others use more of it.
mod goes;
#[path = "common/numbered.rs"]
#[allow(dead_code)] // Others use more of it.
mod numbered;
#[path = "common/qmp_rig.rs"]
#[allow(dead_code)] // Others use more of it.
mod rig;
#[path = "common/qmp_schema.rs"]
#[allow(dead_code)] // Others use more of it.
mod schema;

use goes::{Fault, Giving, Taking, config, names, pair};
use numbered::{Guest, Numbers};
use rig::{Rig, Talk};
use schema::Schema;

/// A daemon that hands one LUN over, to one who takes it in the same process.
struct Daemon {
    from: Arc<Mutex<goes::Host>>,
    to: Arc<Mutex<goes::Host>>,
    image: String,
    /// What fails next.
    fault: Arc<Mutex<Fault>>,
}

impl Daemon {
    fn of(from: &goes::Side, to: &goes::Side, image: String, fault: Fault) -> Daemon {
        let fault = Arc::new(Mutex::new(fault));
        Daemon { from: from.host.clone(), to: to.host.clone(), image, fault }
    }
}

impl Host for Daemon {
    fn resize(&self, _: &str, _: u64) -> Result<(), Error> {
        unreachable!("nobody asks for that")
    }

    fn add(&self, _: &str, _: Map<String, Value>) -> Result<Value, Error> {
        unreachable!("nobody asks for that")
    }

    fn del(&self, _: &str, _: bool) -> Result<Value, Error> {
        unreachable!("nobody asks for that")
    }

    fn hand_over(
        &self,
        _: &Registry,
        device: &str,
        to: &To<'_>,
        progress: &dyn Progress,
    ) -> Result<Value, Error> {
        assert!(to.blk);
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let host = self.to.clone();
        let fault = std::mem::replace(&mut *self.fault.lock().unwrap(), Fault::None);
        let taking =
            thread::spawn(move || handover::take(&mut there, &mut Taking::of(host, fault)).map(drop));
        progress.goes();
        let may_stop = || progress.may_switch_over();
        let mut giving = Giving::of(self.from.clone(), Fault::None).asking(&may_stop);
        let given = handover::give_with_storage(&mut here, &mut giving);
        drop(here);
        let taken = taking.join().unwrap();
        assert_eq!(given.is_ok(), taken.is_ok());
        given.map_err(|e| Error::generic(e.to_string()))?;
        Ok(json!({ "device": device, "uri": to.uri, "answered": true, "image": self.image }))
    }

    fn quit(&self) {
        unreachable!("nobody asks for that")
    }
}

/// Two hosts with a folder of their own each, `here` and `there`, and a protected LUN on the first.
fn sides(dir: &Path, from: Format, to: Format) -> (goes::Side, goes::Side, Numbers) {
    let of = |name: &str, format| {
        let folder = dir.join(name);
        std::fs::create_dir(&folder).unwrap();
        config(&folder, format, true)
    };
    pair(dir, of("here", from), of("there", to))
}

/// Begins it as an administrator does.
fn begin(rig: &Rig, (a, b): (&goes::Side, &goes::Side), words: &[&str]) -> Child {
    a.offer_device();
    b.new_device();
    Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["handover", "vm1", "--to", "unix:/there", "--copy-storage-all"])
        .args(words)
        .arg("--run-dir")
        .arg(rig.dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Until the LUN has been copied, and waits.
fn waits(talk: &mut Talk) -> Value {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let told = talk.get("query-migrate", json!({ "device": "vm1" }));
        if told["status"] == "pre-switchover" && told["disk"]["remaining"] == 0 {
            return told;
        }
        assert!(Instant::now() < end, "{told}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_command_line_and_qmp_hand_over_with_storage_tell_how_far_it_is_and_call_it_off() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, numbers) = sides(dir.path(), Format::Raw, Format::Qcow2);
    let image = a.host().config.image.display().to_string();
    let daemon = Daemon::of(&a, &b, image.clone(), Fault::None);
    let luns = Registry::with_host(daemon);
    luns.insert("vm1", a.host().lun.as_ref().unwrap().remote().clone());
    let rig = Rig::new(luns);
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    goes::slowly(&a, 4 << 20);
    let going = begin(&rig, (&a, &b), &[]);
    let end = Instant::now() + Duration::from_secs(30);
    let told = loop {
        let told = talk.get("query-migrate", json!({ "device": "vm1" }));
        if told["disk"]["transferred"].as_u64().is_some_and(|n| n > 0) {
            break told;
        }
        assert!(Instant::now() < end, "{told}");
        thread::sleep(Duration::from_millis(5));
    };
    schema.check_answer("query-migrate", &told);
    let of = |key: &str| told["disk"][key].as_u64().unwrap();
    assert_eq!((&told["status"], of("transferred") + of("remaining")), (&json!("active"), of("total")));
    let jobs = talk.get("query-block-jobs", json!({}));
    schema.check_answer("query-block-jobs", &jobs);
    let job = &jobs[0];
    assert_eq!((&job["device"], &job["lun"]), (&json!("handover@vm1"), &json!("vm1")));
    assert_eq!((&job["type"], &job["target"]), (&json!("mirror"), &json!("unix:/there")));
    talk.get("migrate_cancel", json!({}));
    let out = going.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("the LUN serves here as before"), "{said}");
    assert!(said.contains("canceled"), "{said}");
    assert_eq!(talk.get("query-migrate", json!({}))["status"], "failed");
    assert!(names(&dir.path().join("there")).is_empty());
    a.compare(&numbers);

    let out = begin(&rig, (&a, &b), &[]).wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let expected =
        format!("vm1 serves there now, and is gone here; {image} stays here, marked as that host's\n");
    assert_eq!(said, expected);
    let told = talk.get("query-migrate", json!({}));
    assert_eq!((&told["status"], told.get("disk")), (&json!("completed"), None));
    b.compare(&numbers);
    b.host().stop().unwrap();
}

#[test]
fn a_lun_that_pauses_before_the_switchover_serves_on_until_it_is_told_to_go_or_to_stay() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, mut numbers) = sides(dir.path(), Format::Raw, Format::Qcow2);
    let image = a.host().config.image.display().to_string();
    let luns = Registry::with_host(Daemon::of(&a, &b, image, Fault::None));
    luns.insert("vm1", a.host().lun.as_ref().unwrap().remote().clone());
    let rig = Rig::new(luns);
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    let go = json!({ "device": "vm1", "state": "pre-switchover" });
    let refused = talk.ask("migrate-continue", go.clone());
    assert!(refused["error"]["desc"].as_str().unwrap().contains("does not wait"), "{refused}");
    let refused = talk.ask("migrate-continue", json!({ "device": "vm1", "state": "active" }));
    assert!(refused["error"]["desc"].as_str().unwrap().contains("pre-switchover"), "{refused}");
    let words = json!({ "device": "vm1", "uri": "unix:/there", "pause-before-switchover": true });
    let refused = talk.ask("migrate", words);
    assert!(refused["error"]["desc"].as_str().unwrap().contains("blk"), "{refused}");

    // It stays, with all that guests have written since.
    let going = begin(&rig, (&a, &b), &["--pause-before-switchover"]);
    let told = waits(&mut talk);
    schema.check_answer("query-migrate", &told);
    assert_eq!(told["disk"]["remaining"], 0, "{told}");
    let mut guest = Guest::of(&a, &mut numbers);
    guest.turns(1000);
    guest.turn();
    talk.get("migrate_cancel", json!({}));
    let out = going.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("the LUN serves here as before"), "{said}");
    assert!(said.contains("serves here until: tcmu-dif handover vm1 --continue"), "{said}");
    guest.drain();
    assert!(names(&dir.path().join("there")).is_empty());
    a.compare(&numbers);

    // It goes, with all of that, and not before.
    let going = begin(&rig, (&a, &b), &["--pause-before-switchover"]);
    waits(&mut talk);
    let mut guest = Guest::of(&a, &mut numbers);
    guest.turns(1000);
    assert_eq!(talk.get("query-migrate", json!({}))["status"], "pre-switchover");
    let said = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["handover", "vm1", "--continue", "--run-dir"])
        .arg(rig.dir.path())
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(String::from_utf8_lossy(&said.stdout), "vm1 goes over now\n");
    let out = going.wait_with_output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(talk.get("query-migrate", json!({}))["status"], "completed");
    b.compare(&numbers);
    b.host().stop().unwrap();
}

/// The bitmaps of the LUN, by query-block, by their names.
fn bitmaps(talk: &mut Talk) -> Vec<Value> {
    let mut all =
        talk.get("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"].as_array().unwrap().clone();
    all.sort_by_key(|bitmap| bitmap["name"].as_str().unwrap().to_owned());
    all
}

#[test]
fn dirty_bitmaps_go_along_and_are_kept_where_the_new_image_can_keep_them() {
    for (from, to) in
        [(Format::Qcow2, Format::Qcow2), (Format::Qcow2, Format::Raw), (Format::Raw, Format::Qcow2)]
    {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, mut numbers) = sides(dir.path(), from, to);
        let image = a.host().config.image.display().to_string();
        let luns = Registry::with_host(Daemon::of(&a, &b, image, Fault::Settle));
        luns.insert("vm1", a.host().lun.as_ref().unwrap().remote().clone());
        let rig = Rig::new(luns);
        let mut talk = rig.talk();
        let add = |talk: &mut Talk, name: &str, more: Value| {
            let mut words = json!({ "node": "vm1", "name": name });
            words.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            talk.get("block-dirty-bitmap-add", words);
        };
        let kept = from == Format::Qcow2;
        add(&mut talk, "daily", json!({ "persistent": kept }));
        add(&mut talk, "fine", json!({ "granularity": 4096 }));
        add(&mut talk, "off", json!({ "disabled": true, "persistent": kept }));
        let mut guest = Guest::of(&a, &mut numbers);
        guest.turns(20);
        let before = bitmaps(&mut talk);
        assert!(before[0]["count"].as_u64().unwrap() > 0 && before[2]["count"] == 0, "{before:?}");

        // The destination fails once the LUN has stopped, which has them all as it begins again.
        let out = begin(&rig, (&a, &b), &[]).wait_with_output().unwrap();
        assert!(!out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
        rig.luns.insert("vm1", a.host().lun.as_ref().unwrap().remote().clone());
        assert_eq!(bitmaps(&mut talk), before);

        let out = begin(&rig, (&a, &b), &[]).wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let luns = Registry::default();
        luns.insert("vm1", b.host().lun.as_ref().unwrap().remote().clone());
        let rig = Rig::new(luns);
        let mut talk = rig.talk();
        let mut expected = before;
        for bitmap in &mut expected {
            bitmap["persistent"] = json!(bitmap["persistent"] == true && to == Format::Qcow2);
        }
        assert_eq!(bitmaps(&mut talk), expected, "{from} to {to}");
        // What is written there is marked there.
        let mut guest = Guest::of(&b, &mut numbers);
        guest.turns(200);
        let after = bitmaps(&mut talk);
        assert!(after[0]["count"].as_u64() > expected[0]["count"].as_u64(), "{after:?}");
        assert_eq!(after[2]["count"], 0);
        b.compare(&numbers);
        let image = b.host().config.image.clone();
        b.host().stop().unwrap();
        if (from, to) == (Format::Qcow2, Format::Qcow2) {
            let out = Command::new("qemu-img").args(["info", "--output=json"]).arg(&image).output().unwrap();
            let info: Value = serde_json::from_slice(&out.stdout).unwrap();
            let kept = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
            let mut names: Vec<&str> = kept.iter().filter_map(|bitmap| bitmap["name"].as_str()).collect();
            names.sort_unstable();
            assert_eq!(names, ["daily", "off"], "{info}");
        }
    }
}
