//! QMP as a client sees it: what queries answer, what the schema promises, what is told unasked, and what clients cannot do to
//! each other.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::{FileExt, PermissionsExt},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};
use tcmu_dif::{
    control::{Host, Registry, ShutdownCause, qmp::Error},
    image::{create::create_qcow2, qcow2::CreateOptions},
    lun::config::DeviceConfig,
    sys,
};

#[path = "common/qmp_rig.rs"]
mod rig;
#[path = "common/qmp_schema.rs"]
mod schema;

use rig::{MIB, Rig, Talk};
use schema::Schema;

fn flip(rig: &Rig, image: &str, at: u64) {
    let file = File::options().read(true).write(true).open(rig.dir.path().join(image)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// `TCMU_DIF_BLESS=1` writes the table anew.
#[test]
fn the_documentation_has_the_table_of_commands() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/qmp.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let table = tcmu_dif::control::documentation();
    let from = text.find("| command |").unwrap();
    let to = text.find("\n\nA scrub in").unwrap() + 1;
    if std::env::var_os("TCMU_DIF_BLESS").is_some() {
        std::fs::write(&path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
    } else {
        assert_eq!(text[from..to], table, "run this test with TCMU_DIF_BLESS=1 to write the table anew");
    }
}

#[test]
fn every_query_answers_what_the_schema_says() {
    let rig = Rig::new(Registry::default());
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    let commands = talk.get("query-commands", json!({}));
    let queries: Vec<&str> = commands
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|c| c["name"].as_str().filter(|n| n.starts_with("query-")))
        .collect();
    assert!(queries.len() >= 9, "{queries:?}");
    let check = |talk: &mut Talk| {
        for query in &queries {
            schema.check_answer(query, &talk.get(query, json!({})));
        }
    };
    // Nobody there, LUNs in all their variety, a scrub under way and one that has found something, a LUN that has failed.
    check(&mut talk);
    let mut guest = rig.protected("vm1", 8 * MIB);
    assert_eq!(guest.write(0, &[7; 1 << 20]), 0);
    let overlay = rig.dir.path().join("top.qcow2");
    let at = overlay.clone();
    sys::run(async move |io| {
        let base = at.with_file_name("base.qcow2");
        let options = |size, backing_file| CreateOptions { backing_file, ..CreateOptions::new(size) };
        create_qcow2(&io, &base, &options(16 * MIB, None)).await.unwrap();
        let over =
            CreateOptions { backing_format: Some("qcow2".into()), ..options(0, Some("base.qcow2".into())) };
        create_qcow2(&io, &at, &over).await.unwrap();
    });
    let other = rig.start("vm2", DeviceConfig::new(&overlay), 16 * MIB);
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 65536 }));
    check(&mut talk);
    flip(&rig, "vm1.raw", 100);
    talk.get("job-cancel", json!({ "id": "scrub-vm1" }));
    talk.job();
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 0 }));
    talk.job();
    check(&mut talk);

    let block = talk.get("query-block", json!({}));
    let inserted = &block[1]["inserted"];
    assert_eq!((&block[1]["device"], &inserted["node-name"]), (&json!("vm2"), &json!("vm2")));
    assert_eq!((&inserted["drv"], &inserted["ro"]), (&json!("qcow2"), &json!(false)));
    let image = &inserted["image"];
    assert_eq!(image["filename"], json!(overlay.to_str().unwrap()));
    assert_eq!((&image["virtual-size"], &image["cluster-size"]), (&json!(16 * MIB), &json!(65536)));
    assert!(image["actual-size"].as_u64() > Some(0), "{image}");
    assert_eq!(
        (&image["backing-filename"], &image["backing-filename-format"]),
        (&json!("base.qcow2"), &json!("qcow2"))
    );
    assert_eq!(image["backing-image"]["filename"], image["full-backing-filename"]);
    let nodes = talk.get("query-named-block-nodes", json!({}));
    let names: Vec<_> = nodes
        .as_array()
        .unwrap()
        .iter()
        .map(|n| (n["node-name"].as_str().unwrap(), n["ro"].as_bool().unwrap()))
        .collect();
    assert_eq!(names, [("vm1", false), ("vm2", false), ("vm2-backing-1", true)]);

    let luns = talk.get("query-luns", json!({}));
    assert_eq!(
        (&luns[0]["name"], &luns[0]["pi"], &luns[0]["state"]),
        (&json!("vm1"), &json!("type1"), &json!("online"))
    );
    assert_eq!(
        (&luns[1]["format"], &luns[1]["size"], &luns[1]["block-size"]),
        (&json!("qcow2"), &json!(16 * MIB), &json!(512))
    );
    assert!(
        luns[1]["counters"]["l2-cache"]["misses"].is_u64() && luns[0]["counters"].get("l2-cache").is_none()
    );
    other.lun.stop().unwrap();
    check(&mut talk);
    let luns = talk.get("query-luns", json!({}));
    assert_eq!(luns[1]["state"], "stopped", "it is still there, and its image is told: {luns}");
    guest.lun.stop().unwrap();
}

#[test]
fn limits_are_set_told_refused_and_kept_until_the_lun_is_deleted() {
    let rig = Rig::new(Registry::default());
    let image = rig.dir.path().join("vm1.raw");
    File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    let config = DeviceConfig { limits: "iops=77".parse().unwrap(), ..DeviceConfig::new(&image) };
    let guest = rig.start("vm1", config.clone(), 8 * MIB);
    let mut talk = rig.talk();
    let told = |talk: &mut Talk| talk.get("query-block", json!({}))[0]["inserted"].take();
    assert_eq!((&told(&mut talk)["iops"], &told(&mut talk)["bps"]), (&json!(77), &json!(0)));
    let all = |more: Value| {
        let mut args = json!({ "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0 });
        args.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        args
    };
    for (more, words) in [
        (json!({ "device": "vm1", "bps": 1, "bps_rd": 1 }), "bps and bps_rd cannot be set at the same time"),
        (json!({ "device": "vm1", "iops_max": 1 }), "iops_max needs iops to be set"),
        (json!({ "device": "vm1", "id": "vm1" }), "'device' and 'id' are mutually exclusive"),
        (json!({ "device": "vm9" }), "'vm9' is not served"),
        (json!({ "device": "vm1", "group": "g" }), "Parameter 'group' is unexpected"),
    ] {
        let refused = talk.ask("block_set_io_throttle", all(more));
        assert!(refused["error"]["desc"].as_str().unwrap().contains(words), "{refused}");
    }
    assert_eq!(told(&mut talk)["iops"], 77, "what was refused has changed nothing");
    let set = json!({ "id": "vm1", "iops_wr": 10, "iops_wr_max": 50, "bps": 1 << 30 });
    talk.get("block_set_io_throttle", all(set));
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    for query in ["query-block", "query-luns", "query-named-block-nodes"] {
        schema.check_answer(query, &talk.get(query, json!({})));
    }
    let now = told(&mut talk);
    assert_eq!((&now["iops"], &now["iops_wr"], &now["iops_wr_max"]), (&json!(0), &json!(10), &json!(50)));
    guest.lun.stop().unwrap();
    let mut guest = rig.start("vm1", config.clone(), 8 * MIB);
    assert_eq!(told(&mut talk)["iops_wr"], 10, "a restart keeps what was set");
    talk.get("block_set_io_throttle", all(json!({ "id": "vm1", "iops_wr": 10 })));
    // The first passes at once and the next ones have to wait.
    for i in 0..3 {
        assert_eq!(guest.write(i, &[1; 512]), 0);
    }
    let throttle = talk.get("query-luns", json!({}))[0]["throttle"].take();
    assert_eq!((&throttle["delayed"], &throttle["waiting"]), (&json!(2), &json!(0)), "{throttle}");
    assert!(throttle["waited-ns"].as_u64() > Some(0));
    talk.get("block_set_io_throttle", all(json!({ "id": "vm1" })));
    guest.lun.stop().unwrap();
    let guest = rig.start("vm1", config, 8 * MIB);
    assert_eq!(told(&mut talk)["iops"], 0, "also that there are none");
    guest.lun.stop().unwrap();
}

#[test]
fn blockstats_count_bytes_commands_and_failures_of_each_direction() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 8 * MIB);
    let mut talk = rig.talk();
    assert_eq!((guest.write(0, &[1; 8192]), guest.write(16, &[2; 512])), (0, 0));
    assert_eq!((guest.read(0, 4), guest.flush()), (0, 0));
    assert_ne!(guest.read(u32::MAX, 1), 0);
    flip(&rig, "vm1.raw", 100);
    assert_ne!(guest.read(0, 1), 0);
    let stats = talk.get("query-blockstats", json!({}))[0]["stats"].take();
    let want = [
        ("wr_bytes", 8704),
        ("wr_operations", 2),
        ("rd_bytes", 2048),
        ("rd_operations", 1),
        ("flush_operations", 1),
        ("failed_rd_operations", 1),
        ("invalid_rd_operations", 1),
        ("failed_wr_operations", 0),
        ("unmap_operations", 0),
    ];
    for (name, count) in want {
        assert_eq!(stats[name], json!(count), "{name}: {stats}");
    }
    guest.lun.stop().unwrap();
}

#[test]
fn block_resize_grows_the_image_and_says_why_not() {
    let rig = Rig::new(Registry::default());
    let guest = rig.protected("vm1", 8 * MIB);
    let mut talk = rig.talk();
    talk.get("block_resize", json!({ "device": "vm1", "size": 16 * MIB }));
    assert_eq!(std::fs::metadata(rig.dir.path().join("vm1.raw")).unwrap().len(), 16 * MIB);
    assert_eq!(talk.get("query-luns", json!({}))[0]["size"], json!(16 * MIB));
    talk.get("block_resize", json!({ "node-name": "vm1", "size": 17 * MIB }));
    for (arguments, words) in [
        (json!({ "size": MIB }), "Need exactly one of 'device' and 'node-name'"),
        (json!({ "device": "vm1", "node-name": "vm1", "size": MIB }), "mutually exclusive"),
        (json!({ "device": "vm1", "size": MIB + 1 }), "no multiple of the block size of 512"),
        (json!({ "device": "vm2", "size": MIB }), "LUN 'vm2' is not served"),
        (json!({ "device": "vm1" }), "Parameter 'size' is missing"),
    ] {
        let answer = talk.ask("block_resize", arguments);
        assert!(answer["error"]["desc"].as_str().unwrap().contains(words), "{answer}");
    }
    guest.lun.stop().unwrap();
}

/// Notes what the daemon is asked to do.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<String>>>);

impl Host for Asked {
    fn resize(&self, device: &str, bytes: u64) -> Result<(), Error> {
        self.0.lock().unwrap().push(format!("resize {device} {bytes}"));
        Err(Error::generic("the kernel refused"))
    }

    fn add(&self, device: &str, words: Map<String, Value>) -> Result<Value, Error> {
        self.0.lock().unwrap().push(format!("add {device} {}", Value::Object(words)));
        Ok(
            json!({ "name": device, "image": "/a.raw", "format": null, "serial": "s1", "pi": "off", "exposure": "target",
            "block_size": 512, "capacity_bytes": MIB, "exports": [{ "fabric": "vhost", "wwn": "naa.5001405000000001" }],
            "created": true }),
        )
    }

    fn del(&self, device: &str, force: bool) -> Result<Value, Error> {
        self.0.lock().unwrap().push(format!("del {device} {force}"));
        Ok(json!({ "name": device, "deleted": true, "left": [], "leftovers": [] }))
    }

    fn quit(&self) {
        self.0.lock().unwrap().push("quit".into());
    }
}

#[test]
fn quit_is_answered_then_told_and_then_done_and_a_resize_is_the_daemons_where_there_is_one() {
    let asked = Asked::default();
    let mut rig = Rig::new(Registry::with_host(asked.clone()));
    let guest = rig.protected("vm1", 8 * MIB);
    let (mut talk, mut other) = (rig.talk(), rig.talk());
    let refused = talk.ask("block_resize", json!({ "device": "vm1", "size": 16 * MIB }));
    assert_eq!(refused["error"]["desc"], "the kernel refused");
    assert_eq!(talk.get("query-luns", json!({}))[0]["size"], json!(8 * MIB));

    talk.get("quit", json!({}));
    for talk in [&mut talk, &mut other] {
        let told = talk.event("SHUTDOWN");
        assert_eq!(told["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    }
    // The signal that follows is no second reason.
    rig.luns.shut_down(ShutdownCause::Signal);
    let end = Instant::now() + Duration::from_secs(10);
    while asked.0.lock().unwrap().len() < 2 {
        assert!(Instant::now() < end, "quit was not done");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(*asked.0.lock().unwrap(), [format!("resize vm1 {}", 16 * MIB), "quit".into()]);
    rig.luns.remove("vm1", guest.lun.remote());
    // What was published before the server ends is told before it has ended.
    rig.server = None;
    assert_eq!(other.hear().unwrap()["event"], "LUN_REMOVED");
    guest.lun.stop().unwrap();
}

#[test]
fn luns_are_made_and_taken_down_by_the_daemon_in_the_words_of_create() {
    let asked = Asked::default();
    let rig = Rig::new(Registry::with_host(asked.clone()));
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    let made = talk
        .get("lun-add", json!({ "device": "vm1", "image": "/a.raw", "pi": "type1", "export": ["vhost"] }));
    schema.check_answer("lun-add", &made);
    assert_eq!((&made["name"], made.get("format")), (&json!("vm1"), None));
    let gone = talk.get("lun-del", json!({ "device": "vm1", "force": true }));
    schema.check_answer("lun-del", &gone);
    let words = r#"{"device":"vm1","export":["vhost"],"image":"/a.raw","pi":"type1"}"#;
    assert_eq!(*asked.0.lock().unwrap(), [format!("add vm1 {words}"), "del vm1 true".into()]);
    for (command, arguments, said) in [
        ("lun-add", json!({ "device": "vm1" }), "image"),
        ("lun-add", json!({ "device": "vm1", "image": "/a.raw", "colour": "red" }), "colour"),
        ("lun-add", json!({ "device": "vm1", "image": "/a.raw", "export": "vhost" }), "export"),
        ("lun-del", json!({ "device": "vm1", "force": "yes" }), "force"),
    ] {
        let refused = talk.ask(command, arguments);
        assert!(refused["error"]["desc"].as_str().unwrap().contains(said), "{refused}");
    }
    let nobody = Rig::new(Registry::default());
    let refused = nobody.talk().ask("lun-del", json!({ "device": "vm1" }));
    assert!(refused["error"]["desc"].as_str().unwrap().contains("no daemon"), "{refused}");
    assert_eq!(asked.0.lock().unwrap().len(), 2);
}

#[test]
fn events_tell_of_luns_jobs_mismatches_and_failed_io_to_those_who_have_negotiated() {
    let rig = Rig::new(Registry::default());
    let (mut talk, mut early) = (rig.talk(), Talk::connect(&rig.socket()));
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    let mut guest = rig.protected("vm1", 8 * MIB);
    let added = talk.event("LUN_ADDED");
    schema.check_event(&added);
    assert_eq!(added["data"], json!({ "device": "vm1" }));
    assert_eq!(guest.write(0, &[7; 1 << 20]), 0);

    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 65536 }));
    talk.get("job-pause", json!({ "id": "scrub-vm1" }));
    talk.get("job-resume", json!({ "id": "scrub-vm1" }));
    talk.get("block-job-set-speed", json!({ "device": "scrub-vm1", "speed": 0 }));
    let whole = ["created", "running", "paused", "running", "waiting", "pending", "concluded", "null"];
    assert_eq!(talk.job(), whole);
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 65536 }));
    talk.get("job-cancel", json!({ "id": "scrub-vm1" }));
    assert_eq!(talk.job(), ["created", "running", "aborting", "concluded", "null"]);

    flip(&rig, "vm1.raw", 512 * 3 + 5);
    assert_ne!(guest.read(0, 8), 0);
    let event = talk.event("PI_MISMATCH");
    schema.check_event(&event);
    let data = &event["data"];
    assert_eq!((&data["device"], &data["lba"], &data["tag"]), (&json!("vm1"), &json!(3), &json!("guard")));
    assert_eq!((&data["operation"], &data["missed"]), (&json!("read"), &json!(0)));
    talk.get("pi-scrub", json!({ "device": "vm1", "speed": 0 }));
    let found = talk.event("PI_MISMATCH");
    assert_eq!((&found["data"]["operation"], &found["data"]["lba"]), (&json!("scrub"), &json!(3)));

    // The image loses its end; a guest that asks for it a hundred times is told of a few times.
    File::options().write(true).open(rig.dir.path().join("vm1.raw")).unwrap().set_len(MIB).unwrap();
    for _ in 0..100 {
        assert_ne!(guest.read(8192, 1), 0);
    }
    let event = talk.event("BLOCK_IO_ERROR");
    schema.check_event(&event);
    let data = &event["data"];
    assert_eq!(
        (&data["operation"], &data["action"], &data["nospace"]),
        (&json!("read"), &json!("report"), &json!(false))
    );
    assert_eq!((&data["device"], &data["offset"]), (&json!("vm1"), &json!(8192 * 512)));
    assert!(data["reason"].as_str().unwrap().contains("the file ends here"), "{event}");
    std::thread::sleep(Duration::from_millis(1100));
    guest.read(8192, 1);
    let told: Vec<Value> =
        (0..).map(|_| talk.event("BLOCK_IO_ERROR")).take_while(|e| e["data"]["missed"] == 0).collect();
    assert!(told.len() < 60, "a hundred failures are not told one by one: {}", told.len());

    rig.luns.remove("vm1", guest.lun.remote());
    assert_eq!(talk.event("LUN_REMOVED")["data"], json!({ "device": "vm1" }));
    // One who has not negotiated has heard the greeting, and nothing else.
    assert!(early.hear().unwrap()["QMP"].is_object());
    assert!(early.ask("qmp_capabilities", json!({})).get("return").is_some());
    assert!(early.events.is_empty(), "{:?}", early.events);
    let _ = guest.lun.stop();
}

#[test]
fn many_clients_are_served_beside_one_that_stalls_one_that_sends_rubbish_and_one_that_stops_in_mid_message() {
    let rig = Rig::new(Registry::default());
    let guest = rig.protected("vm1", 8 * MIB);
    let socket = rig.socket();
    // One negotiates and then neither reads nor writes, while thousands of events and answers are meant for it.
    let mut staller = rig.talk();
    for _ in 0..20_000 {
        if staller.stream.set_nonblocking(true).is_err()
            || staller.stream.write_all(br#"{"execute":"query-qmp-schema"}"#).is_err()
        {
            break;
        }
    }
    let mut rubbish = rig.talk();
    rubbish.stream.write_all(&[0xff; 4096]).unwrap();
    let mut half = rig.talk();
    half.stream.write_all(br#"{"execute":"query-lu"#).unwrap();

    let began = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..20 {
            let socket = &socket;
            scope.spawn(move || {
                let mut talk = Talk::begin(socket);
                for id in 0..50 {
                    let text = json!({ "execute": "query-luns", "id": [client, id] }).to_string();
                    talk.stream.write_all(text.as_bytes()).unwrap();
                    let answer = loop {
                        let message = talk.hear().unwrap();
                        if message.get("event").is_none() {
                            break message;
                        }
                    };
                    assert_eq!(
                        (&answer["id"], &answer["return"][0]["name"]),
                        (&json!([client, id]), &json!("vm1"))
                    );
                }
            });
        }
        for _ in 0..5000 {
            rig.luns.insert("vm1", guest.lun.remote().clone());
        }
    });
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "somebody waited for the staller: {:?}",
        began.elapsed()
    );

    let error = std::iter::from_fn(|| rubbish.hear()).find(|m| m.get("error").is_some()).unwrap();
    assert_eq!(error["error"]["class"], "GenericError");
    half.stream.write_all(br#"ns"}"#).unwrap();
    let answer = std::iter::from_fn(|| half.hear()).find(|m| m.get("event").is_none()).unwrap();
    assert_eq!(answer["return"][0]["name"], "vm1");

    // The staller loses its connection: after the bytes that were on the way there are no more.
    staller.stream.set_nonblocking(false).unwrap();
    staller.wait_until_it_is_hung_up();
    assert!(staller.rest_until_it_ends() < 20_000);
    guest.lun.stop().unwrap();
}

#[test]
fn a_user_who_is_neither_root_nor_the_daemons_nor_in_the_sockets_group_is_refused_in_words() {
    let me = rustix::process::geteuid();
    assert!(me.is_root(), "only root can become another user: run this test as root");
    let rig = Rig::new(Registry::default());
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap()
    };
    mode(rig.dir.path(), 0o755);
    let socket = rig.socket();
    let as_other = |gid: u32| {
        let socket = socket.clone();
        // Linux keeps a thread's user to itself.
        let other = std::thread::spawn(move || {
            let (uid, gid) = (rustix::fs::Uid::from_raw(65534), rustix::fs::Gid::from_raw(gid));
            rustix::thread::set_thread_groups(&[]).unwrap();
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            match std::os::unix::net::UnixStream::connect(&socket) {
                Ok(_) => Talk::connect(&socket).hear().unwrap(),
                Err(e) => json!(e.kind().to_string()),
            }
        });
        other.join().unwrap()
    };
    assert_eq!(as_other(4242), json!("permission denied"), "the mode");
    mode(&socket, 0o666);
    let refused = as_other(4242);
    let words = refused["error"]["desc"].as_str().unwrap();
    assert!(words.contains("user 65534 may not ask"), "{refused}");
    mode(&socket, 0o660);
    std::os::unix::fs::chown(&socket, None, Some(4242)).unwrap();
    assert!(as_other(4242)["QMP"].is_object(), "the socket's group");
    assert_eq!(as_other(4343), json!("permission denied"));
}
