//! Jobs of whole LUNs whose target is an NBD export: mirrors that a LUN goes over to, backups, and servers that go meanwhile.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{control::Registry, image::Format, lun::config::DeviceConfig, pi::PiType};

use crate::{
    known::{Known, SIZE, new_lun, path, qemu_img, refused, tcmu_dif},
    rig::{MIB, Rig, Talk},
    servers::{Server, file, nbdkit, qemu_nbd},
};

fn order(uri: &Path, more: Value) -> Value {
    let mut arguments = json!({ "device": "vm1", "target": path(uri), "sync": "full" });
    for (key, value) in more.as_object().unwrap() {
        arguments[key] = value.clone();
    }
    arguments
}

/// A server of one file of the LUN's size, full of what has to be overwritten.
fn full(rig: &Rig) -> (Server, PathBuf) {
    let disk = file(rig.dir.path(), "disk", SIZE);
    std::fs::write(&disk, vec![0xee; SIZE as usize]).unwrap();
    (nbdkit(rig.dir.path(), &["file", path(&disk)]), disk)
}

fn wait_until(talk: &mut Talk, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let jobs = talk.get("query-block-jobs", json!({}));
        if holds(&jobs) {
            return jobs;
        }
        assert!(Instant::now() < end, "{what}: {jobs}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_lun_goes_over_to_an_export_while_its_server_is_killed_and_comes_back() {
    for (pi, copy_mode) in [(false, "background"), (true, "write-blocking"), (true, "background")] {
        let rig = Rig::new(Registry::default());
        let (_, mut known) = new_lun(&rig, Format::Qcow2, pi);
        let (mut server, disk) = full(&rig);
        let (uri, sidecar) = (server.uri(""), rig.dir.path().join("disk.pi"));
        let mut more = json!({ "copy-mode": copy_mode, "granularity": 4096, "speed": 16 * MIB });
        if pi {
            more["sidecar"] = path(&sidecar).into();
        }
        let mut talk = rig.talk();
        talk.get("blockdev-mirror", order(&uri, more));
        known.steps(30);
        server.again();
        known.steps(30);
        talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
        talk.event("BLOCK_JOB_READY");
        known.steps(30);
        talk.get("block-job-complete", json!({ "device": "vm1" }));
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
        known.steps(50);
        server.again();
        known.steps(50);
        known.compare();
        assert_eq!(known.guest.lun.remote().made().config.image, uri);
        known.guest.lun.stop().unwrap();
        assert!(std::fs::read(&disk).unwrap() == known.disk, "the server has something else");
        let config = DeviceConfig {
            pi: pi.then_some(PiType::Type1),
            ..DeviceConfig::new(rig.dir.path().join("old.qcow2"))
        };
        if pi {
            let (good, said) = tcmu_dif(&["pi", "verify", path(&uri), "--sidecar", path(&sidecar)], None);
            assert!(good, "{said}");
        }
        // Whoever still names the old image gets the export.
        let mut known = Known { guest: rig.start("vm1", config, SIZE), ..known };
        known.compare();
        known.guest.lun.stop().unwrap();
    }
}

#[test]
fn a_mirror_to_an_export_goes_on_after_a_restart_of_the_lun() {
    let rig = Rig::new(Registry::default());
    let (old, known) = new_lun(&rig, Format::Raw, false);
    let (server, disk) = full(&rig);
    let uri = server.uri("");
    let mut talk = rig.talk();
    talk.get("drive-mirror", order(&uri, json!({ "mode": "existing", "speed": 2 * MIB })));
    let jobs = wait_until(&mut talk, "nothing is copied", |jobs| jobs[0]["offset"].as_u64() >= Some(MIB));
    known.guest.lun.stop().unwrap();
    let disk_then = known.disk;
    let mut known =
        Known { guest: rig.start("vm1", DeviceConfig::new(&old), SIZE), disk: disk_then, seed: 9 };
    let again = talk.get("query-block-jobs", json!({}));
    assert!(again[0]["offset"].as_u64() >= jobs[0]["offset"].as_u64(), "it began anew: {again}");
    known.steps(20);
    talk.get("block-job-set-speed", json!({ "device": "vm1", "speed": 0 }));
    talk.event("BLOCK_JOB_READY");
    talk.get("block-job-cancel", json!({ "device": "vm1" }));
    assert_eq!(talk.job().last().unwrap(), "null");
    assert!(std::fs::read(&disk).unwrap() == known.disk, "the copy is another");
    assert_eq!(known.guest.lun.remote().made().config.image, old);
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_backup_to_an_export_is_of_one_moment_and_increments_go_over_it() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    // QEMU's own server, of an image that is qcow2 there and raw here.
    let image = rig.dir.path().join("backup.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path(&image), &SIZE.to_string()]);
    let server = qemu_nbd(rig.dir.path(), &["--format=qcow2", path(&image)]);
    let (uri, sidecar) = (server.uri(""), rig.dir.path().join("backup.pi"));
    let mut talk = rig.talk();
    talk.get("block-dirty-bitmap-add", json!({ "node": "vm1", "name": "daily" }));
    let more = json!({ "mode": "existing", "sidecar": path(&sidecar), "bitmap": "daily", "bitmap-mode": "on-success" });
    for sync in ["full", "incremental"] {
        let then = known.disk.clone();
        let mut arguments = order(&uri, more.clone());
        arguments["sync"] = sync.into();
        talk.get("drive-backup", arguments);
        known.steps(100);
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"].get("error").is_none(), "{done}");
        let raw = rig.dir.path().join("then.raw");
        std::fs::write(&raw, &then).unwrap();
        let said = qemu_img(&["compare", "-f", "raw", "-F", "raw", path(&uri), path(&raw)]);
        assert!(said.contains("identical"), "{said}");
        let (good, said) = tcmu_dif(&["pi", "verify", path(&uri), "--sidecar", path(&sidecar)], None);
        assert!(good, "{said}");
    }
    known.compare();
    known.guest.lun.stop().unwrap();
}

#[test]
fn a_server_that_goes_for_good_ends_the_job_and_never_a_command_of_the_guest() {
    for copy_mode in ["background", "write-blocking"] {
        let rig = Rig::new(Registry::default());
        let (old, mut known) = new_lun(&rig, Format::Raw, false);
        let (mut server, _) = full(&rig);
        let mut talk = rig.talk();
        let more = json!({ "mode": "existing", "copy-mode": copy_mode });
        talk.get("drive-mirror", order(&server.uri("&reconnect=1"), more));
        talk.event("BLOCK_JOB_READY");
        known.steps(10);
        server.kill();
        known.steps(10);
        let done = talk.event("BLOCK_JOB_COMPLETED");
        assert!(done["data"]["error"].as_str().is_some_and(|e| e.contains("server")), "{done}");
        known.steps(10);
        known.compare();
        assert_eq!(known.guest.lun.remote().made().config.image, old);
        known.guest.lun.stop().unwrap();
    }
}

#[test]
fn a_job_whose_server_is_away_is_cancelled_soon_and_frees_the_writes_that_wait() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, false);
    let (mut server, _) = full(&rig);
    let mut talk = rig.talk();
    let more = json!({ "mode": "existing", "copy-mode": "write-blocking" });
    talk.get("drive-mirror", order(&server.uri("&reconnect=600"), more));
    talk.event("BLOCK_JOB_READY");
    server.kill();
    let begun = Instant::now();
    let canceller = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        talk.get("block-job-cancel", json!({ "device": "vm1", "force": true }));
        talk.job()
    });
    known.steps(5);
    assert_eq!(canceller.join().unwrap().last().unwrap(), "null");
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    known.compare();
    known.guest.lun.stop().unwrap();
}

#[test]
fn an_export_that_cannot_be_a_target_is_refused_in_words() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, true);
    let small = file(rig.dir.path(), "small", SIZE / 2);
    let server = nbdkit(rig.dir.path(), &["file", path(&small)]);
    let (uri, sidecar) = (server.uri(""), rig.dir.path().join("new.pi"));
    let mut talk = rig.talk();
    for (more, words) in [
        (json!({}), "give mode existing"),
        (json!({ "mode": "existing" }), "give a sidecar on this host"),
        (json!({ "mode": "existing", "sidecar": path(&sidecar), "format": "qcow2" }), "raw"),
        (json!({ "mode": "existing", "sidecar": path(&sidecar) }), "give a target of the same size"),
    ] {
        for verb in ["drive-mirror", "drive-backup"] {
            let said = refused(&talk.ask(verb, order(&uri, more.clone())));
            assert!(said.contains(words), "{verb} {more}: {said}");
            assert!(!sidecar.exists(), "{said}");
        }
    }
    let gone = rig.dir.path().join("nobody.sock");
    let nobody = PathBuf::from(format!("nbd+unix:///?socket={}", gone.display()));
    let more = json!({ "mode": "existing", "sidecar": path(&sidecar) });
    let said = refused(&talk.ask("drive-mirror", order(&nobody, more)));
    assert!(said.contains("nobody.sock") && !sidecar.exists(), "{said}");
    let said = refused(&talk.ask("blockdev-mirror", order(Path::new("disk.raw"), json!({}))));
    assert!(said.contains("Cannot find device='disk.raw'"), "{said}");
    assert_eq!(talk.get("query-jobs", json!({})), json!([]));
    known.guest.lun.stop().unwrap();
}
