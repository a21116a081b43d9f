//! What clients learn of blocks beside their content: dirty bitmaps, by QEMU's and libnbd's own programs, and the depth of a chain.

use std::{
    io::{Read, Write},
    ops::Range,
    os::unix::net::UnixStream,
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    image::Format,
    lun::config::DeviceConfig,
    nbd::{answer, chunk, command, handshake, option, request::Request},
};

use crate::{
    export::{connect, socket, start, uri},
    known::{self, Known, SIZE, new_lun, path, refused},
    past::unexport,
    rig::{MIB, Rig, Talk},
    servers::qemu_nbd,
    support::must,
};

/// The usual granule of a bitmap.
const G: u64 = 65536;

pub fn bitmap(talk: &mut Talk, verb: &str, name: &str, more: Value) {
    let mut arguments = json!({ "node": "vm1", "name": name });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    talk.get(&format!("block-dirty-bitmap-{verb}"), arguments);
}

/// What nbdinfo says that a bitmap has, as runs of bytes.
pub fn dirty(uri: &str, name: &str) -> Vec<Range<u64>> {
    let context = format!("--map=qemu:dirty-bitmap:{name}");
    let map: Value = serde_json::from_str(&must("nbdinfo", &["--json", &context, uri])).unwrap();
    let number = |run: &Value, key: &str| run[key].as_u64().unwrap();
    let runs = map.as_array().unwrap().iter();
    let all: u64 = runs.clone().map(|run| number(run, "length")).sum();
    assert_eq!(all, SIZE, "{map}");
    let dirty = runs.filter(|run| number(run, "type") == 1).map(|run| {
        let at = number(run, "offset");
        at..at + number(run, "length")
    });
    dirty.collect()
}

/// The same by qemu-img, which tells what is dirty as what is no data.
fn dirty_by_qemu(rig: &Rig, export: &str, name: &str) -> Vec<Range<u64>> {
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},export={export},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        path(&socket(rig))
    );
    let map = must("qemu-img", &["map", "--output=json", "--image-opts", &options]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let runs = map.as_array().unwrap().iter().filter(|run| run["data"] == false);
    runs.map(|run| {
        let at = run["start"].as_u64().unwrap();
        at..at + run["length"].as_u64().unwrap()
    })
    .collect()
}

fn write(known: &mut Known, at: u64, len: u64) {
    assert_eq!(known.guest.write((at / 512) as u32, &vec![7; len as usize]), 0);
}

fn add(talk: &mut Talk, more: Value) -> Value {
    let mut arguments = json!({ "type": "nbd", "id": "e1", "node-name": "vm1" });
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    talk.ask("block-export-add", arguments)
}

#[test]
fn dirty_bitmaps_are_read_by_qemu_and_libnbd() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Qcow2, true);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    bitmap(&mut talk, "add", "a", json!({ "persistent": true }));
    bitmap(&mut talk, "add", "fine", json!({ "granularity": 512 }));
    bitmap(&mut talk, "add", "none", json!({ "disabled": true }));
    write(&mut known, 3 * G + 512, 1024);
    write(&mut known, 10 * G - 512, 1024);
    write(&mut known, SIZE - 512, 512);
    for name in ["a", "fine"] {
        let said = refused(&add(&mut talk, json!({ "bitmaps": [name] })));
        assert_eq!(said, format!("Enabled bitmap '{name}' incompatible with readonly export"));
        bitmap(&mut talk, "disable", name, json!({}));
    }
    write(&mut known, 0, 512);
    let said = refused(&add(&mut talk, json!({ "bitmaps": ["a", "x"] })));
    assert_eq!(said, "Dirty bitmap 'x' not found");
    let said = refused(&add(&mut talk, json!({ "bitmaps": [{ "node": "vm2", "name": "a" }] })));
    assert!(said.contains("another LUN"), "{said}");

    let bitmaps = json!(["a", { "node": "vm1", "name": "fine" }, "none"]);
    let added = add(&mut talk, json!({ "bitmaps": bitmaps, "name": "disk" }));
    assert_eq!(added, json!({ "return": {} }));
    let uri = uri(&mut talk);
    let told: Value = serde_json::from_str(&must("nbdinfo", &["--json", &uri])).unwrap();
    let contexts: Vec<&str> =
        told["exports"][0]["contexts"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    let of = |name: &str| format!("qemu:dirty-bitmap:{name}");
    assert_eq!(contexts, ["base:allocation", &of("a"), &of("fine"), &of("none")]);
    let expected = [3 * G..4 * G, 9 * G..11 * G, SIZE - G..SIZE];
    let fine = [3 * G + 512..3 * G + 1536, 10 * G - 512..10 * G + 512, SIZE - 512..SIZE];
    for (name, expected) in [("a", &expected[..]), ("fine", &fine), ("none", &[])] {
        assert_eq!(dirty(&uri, name), expected, "{name}");
        assert_eq!(dirty_by_qemu(&rig, "disk", name), expected, "{name}");
    }

    // It is busy, in QEMU's words, until the export ends.
    for (command, more) in [
        ("block-dirty-bitmap-remove", json!({})),
        ("block-dirty-bitmap-clear", json!({})),
        ("block-dirty-bitmap-enable", json!({})),
    ] {
        let mut arguments = json!({ "node": "vm1", "name": "a" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let said = refused(&talk.ask(command, arguments));
        assert_eq!(said, "Bitmap 'a' is currently in use by another operation and cannot be used");
    }
    let second = json!({ "type": "nbd", "id": "e2", "node-name": "vm1", "name": "other", "bitmaps": ["a"] });
    assert!(refused(&talk.ask("block-export-add", second)).contains("in use"));
    let blocks = talk.get("query-block", json!({}));
    let listed = &blocks[0]["inserted"]["dirty-bitmaps"];
    assert!(listed.as_array().unwrap().iter().all(|b| b["busy"] == true), "{listed}");
    unexport(&mut talk);
    for name in ["a", "fine", "none"] {
        bitmap(&mut talk, "remove", name, json!({}));
    }
    // What could not be exported has left nothing busy behind, either.
    bitmap(&mut talk, "add", "b", json!({ "disabled": true }));
    talk.get("nbd-server-add", json!({ "device": "vm1", "bitmap": "b" }));
    assert!(refused(&add(&mut talk, json!({ "bitmaps": ["b"] }))).contains("in use"));
    talk.get("nbd-server-stop", json!({}));
    bitmap(&mut talk, "remove", "b", json!({}));
    drop(known);
}

#[test]
fn who_writes_to_an_export_sees_in_an_enabled_bitmap_what_was_written() {
    let rig = Rig::new(Registry::default());
    let (_, mut known) = new_lun(&rig, Format::Raw, true);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    bitmap(&mut talk, "add", "live", json!({}));
    assert_eq!(add(&mut talk, json!({ "bitmaps": ["live"], "writable": true })), json!({ "return": {} }));
    let uri = uri(&mut talk);
    assert_eq!(dirty(&uri, "live"), []);
    must(
        "qemu-io",
        &[
            "-d",
            "unmap",
            "-f",
            "raw",
            "-c",
            "write -P 1 1M 512",
            "-c",
            "write -z 2M 64k",
            "-c",
            "discard 3M 64k",
            &uri,
        ],
    );
    write(&mut known, 5 * MIB, 512);
    let marked = [1, 2, 3, 5].map(|m| m * MIB..m * MIB + G);
    assert_eq!(dirty(&uri, "live"), marked);
    drop(known);
}

#[test]
fn the_depth_of_a_chain_is_told_to_who_asks_for_it() {
    let rig = Rig::new(Registry::default());
    let dir = rig.dir.path();
    let (base, middle, top) = (dir.join("base.qcow2"), dir.join("middle.qcow2"), dir.join("top.qcow2"));
    known::qemu_img(&["create", "-q", "-f", "qcow2", path(&base), &SIZE.to_string()]);
    for (file, below) in [(&middle, &base), (&top, &middle)] {
        known::qemu_img(&["create", "-q", "-f", "qcow2", "-b", path(below), "-F", "qcow2", path(file)]);
    }
    for (file, write) in
        [(&base, "write -P 1 0 3M"), (&middle, "write -P 2 1M 2M"), (&top, "write -P 3 2M 1M")]
    {
        must("qemu-io", &["-f", "qcow2", "-c", write, path(file)]);
    }
    let guest = rig.start("vm1", DeviceConfig::new(&top), SIZE);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    assert_eq!(add(&mut talk, json!({ "allocation-depth": true })), json!({ "return": {} }));
    let uri = uri(&mut talk);
    let depths = |uri: &str| -> Vec<(u64, u64)> {
        let map = must("nbdinfo", &["--json", "--map=qemu:allocation-depth", uri]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let runs = map.as_array().unwrap().iter();
        runs.map(|run| (run["length"].as_u64().unwrap() / MIB, run["type"].as_u64().unwrap())).collect()
    };
    let found = depths(&uri);
    assert_eq!(found, [(1, 3), (1, 2), (1, 1), (5, 0)]);
    // As QEMU's own server has it.
    guest.lun.stop().unwrap();
    let qemu = qemu_nbd(dir, &["--allocation-depth", "--read-only", "--format=qcow2", path(&top)]);
    assert_eq!(depths(&format!("nbd+unix:///?socket={}", path(&qemu.socket))), found);
}

/// The answers to an option, until the last: its kind and data.
pub fn ask(client: &mut UnixStream, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
    client.write_all(&handshake::option(number, data)).unwrap();
    let mut all = Vec::new();
    loop {
        let mut head = [0; handshake::ANSWER_HEAD_LEN];
        client.read_exact(&mut head).unwrap();
        let (kind, len) = handshake::parse_answer_head(&head, number).unwrap();
        let mut data = vec![0; len as usize];
        client.read_exact(&mut data).unwrap();
        all.push((kind, data));
        if kind == answer::ACK || kind & answer::ERROR != 0 {
            return all;
        }
    }
}

#[test]
fn each_context_that_was_agreed_on_is_answered_and_no_other() {
    let rig = Rig::new(Registry::default());
    let (_, known) = new_lun(&rig, Format::Raw, false);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    for name in ["a", "b"] {
        bitmap(&mut talk, "add", name, json!({ "disabled": true }));
    }
    assert_eq!(
        add(&mut talk, json!({ "bitmaps": ["a", "b"], "allocation-depth": true })),
        json!({ "return": {} })
    );
    let mut client = connect(&socket(&rig));
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&3u32.to_be_bytes()).unwrap();
    let early = ask(&mut client, option::LIST_META_CONTEXT, &handshake::contexts("vm1", &[]));
    assert_eq!(early[0].0, answer::ERR_INVALID);
    assert_eq!(ask(&mut client, option::STRUCTURED_REPLY, &[])[0].0, answer::ACK);
    let mut names = |number: u32, queries: &[&str]| -> Vec<String> {
        let all = ask(&mut client, number, &handshake::contexts("vm1", queries));
        assert_eq!(all.last().unwrap().0, answer::ACK);
        let contexts = all.iter().filter(|(kind, _)| *kind == answer::META_CONTEXT);
        contexts.map(|(_, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect()
    };
    let (base, depth) = ("base:allocation", "qemu:allocation-depth");
    let (a, b) = ("qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b");
    let (list, set) = (option::LIST_META_CONTEXT, option::SET_META_CONTEXT);
    assert_eq!(names(list, &[]), [base, depth, a, b]);
    assert_eq!(names(list, &["qemu:"]), [depth, a, b]);
    assert_eq!(names(list, &["qemu:dirty-bitmap:"]), [a, b]);
    assert_eq!(names(list, &[b, "qemu:dirty-bitmap:x", "y:z"]), [b]);
    assert!(names(set, &["qemu:", "qemu:dirty-bitmap:", "base:"]).is_empty());
    assert_eq!(names(set, &[b, base]), [base, b]);
    let other = ask(&mut client, set, &handshake::contexts("vm2", &[a]));
    assert_eq!(other[0].0, answer::ERR_UNKNOWN);
    // What is chosen last holds.
    let all = ask(&mut client, set, &handshake::contexts("vm1", &[b, base, depth]));
    let mut numbers: Vec<[u8; 4]> = all
        .iter()
        .filter(|(kind, _)| *kind == answer::META_CONTEXT)
        .map(|(_, d)| *d.first_chunk().unwrap())
        .collect();
    assert_eq!(ask(&mut client, option::GO, &handshake::go("vm1", &[])).last().unwrap().0, answer::ACK);
    for one in [0, command::REQUEST_ONE] {
        let request =
            Request { flags: one, kind: command::BLOCK_STATUS, cookie: 9, offset: 0, length: SIZE as u32 };
        client.write_all(&request.to_bytes()).unwrap();
        let mut answered = Vec::new();
        loop {
            let mut head = [0; 20];
            client.read_exact(&mut head).unwrap();
            assert_eq!(head[6..8], chunk::BLOCK_STATUS.to_be_bytes());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            client.read_exact(&mut data).unwrap();
            answered.push(*data.first_chunk::<4>().unwrap());
            let sum: u64 =
                data[4..].chunks(8).map(|e| u64::from(u32::from_be_bytes(e[..4].try_into().unwrap()))).sum();
            assert!(sum > 0 && sum <= SIZE && (one == 0 || data.len() == 12), "{data:?}");
            if head[4..6] == chunk::DONE.to_be_bytes() {
                break;
            }
        }
        numbers.sort_unstable();
        answered.sort_unstable();
        assert_eq!(answered, numbers);
    }
    drop(known);
}
