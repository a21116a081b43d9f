//! LUNs as exports of one point in time, read by QEMU and libnbd while guests write: whole, and by what a dirty bitmap has.

use std::{
    io::{Read, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    image::Format,
    nbd::{command, handshake, option, request::Request},
    peer::kernel::Data,
    pi::store::default_path,
};

use crate::{
    contexts::{bitmap, dirty},
    export::{connect, go, socket, start, uri},
    known::{self, BLOCKS, Known, SIZE, make, new_lun, path},
    rig::{Rig, Talk},
    support::{must, scale},
};

/// The job that keeps a point in time of vm1.
pub fn order(scratch: &Path, more: Value) -> Value {
    let mut arguments = json!({
        "device": "vm1", "job-id": "past", "target": path(scratch), "format": "qcow2", "sync": "none", "scratch": true,
    });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    arguments
}

pub fn export(talk: &mut Talk, more: Value) {
    let mut arguments = json!({ "type": "nbd", "id": "e1", "node-name": "past", "name": "then" });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    talk.get("block-export-add", arguments);
}

/// Ends the export.
pub fn unexport(talk: &mut Talk) {
    // A client that has gone is not known to have gone at once.
    let end = Instant::now() + Duration::from_secs(60);
    while !talk.ask("block-export-del", json!({ "id": "e1" }))["error"].is_null() {
        assert!(Instant::now() < end, "it is used");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends the export, and waits for the end of the job.
pub fn end(talk: &mut Talk, verb: &str) {
    unexport(talk);
    talk.get(verb, json!({ "id": "past" }));
    idle(talk);
}

pub fn idle(talk: &mut Talk) {
    let end = Instant::now() + Duration::from_secs(60);
    while talk.get("query-jobs", json!({})) != json!([]) {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program while a guest writes, and tells whether it did its work.
pub fn beside(known: &mut Known, program: &str, args: &[&str]) -> bool {
    let mut child = Command::new(program).args(args).stderr(Stdio::null()).spawn().unwrap();
    loop {
        known.steps(3);
        if let Some(ended) = child.try_wait().unwrap() {
            return ended.success();
        }
    }
}

/// A client that reads.
pub struct Reader(UnixStream);

impl Reader {
    pub fn new(rig: &Rig, export: &str) -> Reader {
        let mut client = connect(&socket(rig));
        go(&mut client, export);
        Reader(client)
    }

    /// The bytes, or an error number.
    pub fn read(&mut self, at: u64, len: u32) -> Result<Vec<u8>, u32> {
        let request = Request { flags: 0, kind: command::READ, cookie: 1, offset: at, length: len };
        self.0.write_all(&request.to_bytes()).unwrap();
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        match u32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => {
                let mut data = vec![0; len as usize];
                self.0.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }

    /// Whether there is no export of that name.
    pub fn new_is_refused(rig: &Rig, export: &str) -> bool {
        let mut client = connect(&socket(rig));
        client.read_exact(&mut [0; 18]).unwrap();
        client.write_all(&3u32.to_be_bytes()).unwrap();
        client.write_all(&handshake::option(option::EXPORT_NAME, export.as_bytes())).unwrap();
        client.read(&mut [0; 10]).is_ok_and(|n| n == 0)
    }
}

/// A scratch file is gone, and its sidecar too.
pub fn nothing_of(scratch: &Path) {
    assert!(!scratch.exists() && !default_path(scratch).exists(), "{} is left", scratch.display());
}

#[test]
fn copies_of_what_changed_put_over_the_first_are_the_lun_at_each_point_in_time_while_it_is_written_to() {
    for (format, pi) in
        [(Format::Raw, true), (Format::Qcow2, false), (Format::Qcow2, true), (Format::Raw, false)]
    {
        let rig = Rig::new(Registry::default());
        let (_, mut known) = new_lun(&rig, format, pi);
        let dir = rig.dir.path().to_owned();
        let (scratch, copy) = (dir.join("scratch"), dir.join("copy"));
        let mut talk = rig.talk();
        start(&rig, &mut talk);
        bitmap(
            &mut talk,
            "add",
            "daily",
            json!({ "persistent": format == Format::Qcow2, "granularity": 4096 }),
        );
        for round in 0..3 + scale() {
            known.steps(if round == 0 { 20 } else { 3 });
            let then = known.disk.clone();
            let with = json!({ "bitmap": "daily", "bitmap-mode": "on-success" });
            talk.get("drive-backup", order(&scratch, with));
            known.steps(10);
            export(&mut talk, json!({ "bitmaps": ["daily"] }));
            let uri = uri(&mut talk);
            if round == 0 {
                assert!(beside(&mut known, "nbdcopy", &[&uri, path(&copy)]));
                assert!(std::fs::read(&copy).unwrap() == then, "{format} {pi}: the whole");
                // Another of QEMU's, later: it is the same.
                let other = dir.join("other.qcow2");
                assert!(beside(
                    &mut known,
                    "qemu-img",
                    &["convert", "-f", "raw", "-O", "qcow2", &uri, path(&other)]
                ));
                must("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", path(&copy), path(&other)]);
            }
            let changed = dirty(&uri, "daily");
            let bytes: u64 = changed.iter().map(|run| run.end - run.start).sum();
            // Until then what was written beside the first copies counts.
            assert!(round < 3 || (0 < bytes && bytes < SIZE), "{bytes} have changed");
            let file = std::fs::File::options().write(true).open(&copy).unwrap();
            let mut reader = Reader::new(&rig, "then");
            for run in changed {
                for at in run.clone().step_by(32768) {
                    let data = reader.read(at, (run.end - at).min(32768) as u32).unwrap();
                    file.write_all_at(&data, at).unwrap();
                    if known.random(8) == 0 {
                        known.step();
                    }
                }
            }
            drop(reader);
            assert!(std::fs::read(&copy).unwrap() == then, "{format} {pi}: round {round}");
            // One that was not read to its end has lost nothing of what the next one needs.
            let verb = if round == 1 { "job-cancel" } else { "job-complete" };
            end(&mut talk, verb);
            nothing_of(&scratch);
        }
        known.compare();
        let pi = talk.get("query-pi", json!({}));
        assert!(pi[0]["counters"].is_null() || pi[0]["counters"]["guard_errors"] == 0, "{pi}");
        known.guest.lun.stop().unwrap();
    }
}

#[test]
fn thirty_two_commands_at_a_time_change_nothing_of_what_is_read() {
    for pi in [false, true] {
        let rig = Rig::new(Registry::default());
        let (_, mut known) = new_lun(&rig, Format::Qcow2, pi);
        let then = known.disk.clone();
        let scratch = rig.dir.path().join("scratch");
        let mut talk = rig.talk();
        start(&rig, &mut talk);
        talk.get("drive-backup", order(&scratch, json!({})));
        export(&mut talk, json!({}));
        let copies: Vec<PathBuf> = (0..3).map(|n| rig.dir.path().join(format!("copy{n}"))).collect();
        let uri = uri(&mut talk);
        let mut children: Vec<_> = copies
            .iter()
            .map(|copy| Command::new("nbdcopy").args([&uri, path(copy)]).spawn().unwrap())
            .collect();
        let (mut lba, mut written) = (0u32, 0u32);
        while written < 3000 || children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
            while known.guest.kernel.in_flight() < 32 {
                lba = (lba + if written.is_multiple_of(3) { 8 } else { 1000 }) % (BLOCKS as u32 - 8);
                // WRITE, WRITE SAME with UNMAP, and UNMAP by it.
                let (op, flags, len) = match written % 7 {
                    5 => (0x41, 8, 512),
                    6 => (0x41, 0, 512),
                    _ => (0x2a, 0, 4096),
                };
                let data = vec![if flags == 8 { 0 } else { lba as u8 | 1 }; len];
                let mut cdb = vec![op, flags];
                cdb.extend(lba.to_be_bytes());
                cdb.extend([0, 0, 8, 0]);
                known.guest.kernel.submit(&cdb, Data::Out(&data)).unwrap();
                written += 1;
            }
            for done in known.guest.kernel.wait(Duration::from_secs(20)).unwrap() {
                assert_eq!(done.status, 0);
            }
        }
        while known.guest.kernel.in_flight() > 0 {
            known
                .guest
                .kernel
                .wait(Duration::from_secs(20))
                .unwrap()
                .iter()
                .for_each(|e| assert_eq!(e.status, 0));
        }
        for (mut child, copy) in children.into_iter().zip(&copies) {
            assert!(child.wait().unwrap().success());
            assert!(std::fs::read(copy).unwrap() == then);
        }
        end(&mut talk, "job-cancel");
        nothing_of(&scratch);
        known.guest.lun.stop().unwrap();
    }
}

#[test]
fn several_luns_are_of_one_point_in_time_with_their_bitmaps_as_qemu_has_them() {
    let rig = Rig::new(Registry::default());
    let names = ["vm1", "vm2"];
    let mut luns = names.map(|name| {
        let image = rig.dir.path().join(format!("{name}.qcow2"));
        make(&image, Format::Qcow2, true);
        known::start_named(&rig, name, &image, true)
    });
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    let action = |kind: &str, data: Value| json!({ "type": kind, "data": data });
    for name in names {
        talk.get("block-dirty-bitmap-add", json!({ "node": name, "name": "since", "granularity": 512 }));
    }
    let dir = rig.dir.path().to_owned();
    let actions: Vec<Value> = names
        .iter()
        .flat_map(|name| {
            let scratch = dir.join(format!("{name}.scratch"));
            let mut past = order(&scratch, json!({ "device": name, "job-id": format!("past-{name}") }));
            [
                // What QEMU's clients do: what was written before the point in time is frozen beside what is written after.
                action(
                    "block-dirty-bitmap-add",
                    json!({ "node": name, "name": "frozen", "granularity": 512, "disabled": true }),
                ),
                action(
                    "block-dirty-bitmap-merge",
                    json!({ "node": name, "target": "frozen", "bitmaps": ["since"] }),
                ),
                action("block-dirty-bitmap-clear", json!({ "node": name, "name": "since" })),
                action("drive-backup", past.take()),
            ]
        })
        .collect();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        talk.get("transaction", json!({ "actions": actions }));
        talk
    });
    // Each turn is written to the first, and when that is answered to the second.
    let (mut turn, mut after) = (0u32, 0);
    while after < 50 {
        for lun in &mut luns {
            let data = [(turn + 1).to_be_bytes(); 128].concat();
            assert_eq!(lun.guest.write(turn % BLOCKS as u32, &data), 0);
        }
        turn += 1;
        after += u32::from(thread.is_finished());
    }
    let mut talk = thread.join().unwrap();
    let counted = names.map(|name| {
        talk.get(
            "block-export-add",
            json!({ "type": "nbd", "id": name, "node-name": format!("past-{name}"), "name": name, "bitmaps": ["frozen"] }),
        );
        let exports = talk.get("query-block-exports", json!({}));
        let export = exports.as_array().unwrap().iter().find(|e| e["id"] == name).unwrap().clone();
        let copy = dir.join(format!("{name}.copy"));
        must("nbdcopy", &[export["uri"].as_str().unwrap(), path(&copy)]);
        let held: u64 = std::fs::read(copy).unwrap().chunks(512).map(|block| u64::from(block[0..4] != [0; 4])).sum();
        let frozen: u64 =
            dirty(export["uri"].as_str().unwrap(), "frozen").iter().map(|run| (run.end - run.start) / 512).sum();
        (held, frozen)
    });
    for (held, frozen) in counted {
        assert_eq!(held, frozen, "the bitmap is of another moment");
    }
    assert!(
        counted[0].0 >= counted[1].0 && counted[0].0 - counted[1].0 <= 1,
        "{counted:?}: the second has what the first has not"
    );
    assert!(counted[0].0 > 0 && counted[0].0 < u64::from(turn), "{counted:?} of {turn}");
    for lun in luns {
        lun.guest.lun.stop().unwrap();
    }
    for name in names {
        nothing_of(&dir.join(format!("{name}.scratch")));
    }
}
