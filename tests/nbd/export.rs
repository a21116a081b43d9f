//! LUNs as exports: what QEMU and libnbd read of them, what a client of ours writes to them, and what clients cannot do.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::{Read, Write},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    nbd::{command, handshake, option, request::Request},
    sys,
    units::ByteOffset,
    volume::{IoErrorKind, Volume},
};

use crate::{
    model::{BLOCK, Model, Settled},
    rig::{Guest, MIB, Rig, Talk},
    servers::attach,
    support::{Rng, must, run, scale},
    work::{Work, read_disk},
};

pub fn socket(rig: &Rig) -> PathBuf {
    rig.dir.path().join("nbd.sock")
}

pub fn start(rig: &Rig, talk: &mut Talk) {
    let addr = json!({ "type": "unix", "data": { "path": socket(rig) } });
    talk.get("nbd-server-start", json!({ "addr": addr }));
}

pub fn add(talk: &mut Talk, writable: bool) {
    talk.get(
        "block-export-add",
        json!({ "type": "nbd", "id": "e1", "node-name": "vm1", "writable": writable }),
    );
}

pub fn uri(talk: &mut Talk) -> String {
    talk.get("query-block-exports", json!({}))[0]["uri"].as_str().unwrap().to_owned()
}

/// A LUN of 8 MiB with protection, of which a quarter is written, and its content.
pub fn written(rig: &Rig) -> (Guest, Vec<u8>) {
    let mut guest = rig.protected("vm1", 8 * MIB);
    let mut model = vec![0; 8 << 20];
    let mut rng = Rng::new(3);
    for i in 0..2u32 {
        let data: Vec<u8> = (0..1 << 20).map(|_| rng.next() as u8).collect();
        assert_eq!(guest.write(i * 4096 + 64, &data), 0);
        let at = (i as usize * 4096 + 64) * 512;
        model[at..at + data.len()].copy_from_slice(&data);
    }
    (guest, model)
}

#[test]
fn qemu_and_libnbd_read_what_the_lun_holds() {
    let rig = Rig::new(Registry::default());
    let (guest, model) = written(&rig);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    add(&mut talk, false);
    let uri = uri(&mut talk);
    assert_eq!(uri, format!("nbd+unix:///vm1?socket={}", socket(&rig).display()));
    let mode = std::fs::metadata(socket(&rig)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let told: Value = serde_json::from_str(&must("nbdinfo", &["--json", &uri])).unwrap();
    let export = &told["exports"][0];
    assert_eq!(export["export-size"], 8 * MIB, "{told}");
    assert_eq!(export["is_read_only"], true);
    assert_eq!(export["contexts"], json!(["base:allocation"]));
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["can_multi_conn"], true);
    let list: Value = serde_json::from_str(&must("nbdinfo", &["--json", "--list", &uri])).unwrap();
    assert_eq!(list["exports"][0]["export-name"], "vm1", "{list}");

    let map: Value = serde_json::from_str(&must("nbdinfo", &["--json", "--map", &uri])).unwrap();
    let holes: u64 = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| e["type"] == 3)
        .map(|e| e["length"].as_u64().unwrap())
        .sum();
    let all: u64 = map.as_array().unwrap().iter().map(|e| e["length"].as_u64().unwrap()).sum();
    assert_eq!((all, holes), (8 * MIB, 6 * MIB), "{map}");

    let path = |name: &str| rig.dir.path().join(name).to_str().unwrap().to_owned();
    must("nbdcopy", &[&uri, &path("copy")]);
    assert!(std::fs::read(path("copy")).unwrap() == model);
    must("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, &path("copy.qcow2")]);
    must("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", &path("copy.qcow2"), &uri]);
    must("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path("copy"), &uri]);
    // What reads it has verified every block.
    let pi = talk.get("query-pi", json!({}));
    assert!(pi[0]["counters"]["verified"].as_u64().unwrap() >= 3 * 4096, "{pi}");
    assert_eq!(pi[0]["counters"]["guard_errors"], 0);
    drop(guest);
}

#[test]
fn a_block_that_has_gone_bad_is_an_error_for_those_who_read_an_export_and_its_neighbours_are_not() {
    let rig = Rig::new(Registry::default());
    let (guest, model) = written(&rig);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    add(&mut talk, false);
    let uri = uri(&mut talk);
    let image = File::options().write(true).open(rig.dir.path().join("vm1.raw")).unwrap();
    image.write_all_at(&[model[70 * 512] ^ 1], 70 * 512).unwrap();
    let copied = run("nbdcopy", &[&uri, rig.dir.path().join("copy").to_str().unwrap()]);
    assert!(!copied.status.success());
    let uri = PathBuf::from(uri);
    sys::run(async move |io| {
        let image = crate::servers::try_attach(&io, &uri, true).await.unwrap();
        let block = tcmu_dif::sys::mem::Buffer::zeroed(512);
        let e = image.read(ByteOffset(70 * 512), &block.sg()).await.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Medium);
        assert!(e.to_string().contains("0Bh/10h/01h"), "{e}");
        image.read(ByteOffset(71 * 512), &block.sg()).await.unwrap();
        assert_eq!(block.to_vec(), model[71 * 512..72 * 512]);
    });
    drop(guest);
}

/// Random work of a client on the export of a protected LUN of 2 MiB: the client reads what it wrote, and so does the guest.
pub fn work_beside(guest: &mut Guest, uri: PathBuf, seed: u64) {
    let bytes = sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let base = read_disk(&image).await.unwrap();
        let model = Model::new(base);
        let work = Work {
            volume: &image,
            model: &model,
            blocks: 2 * MIB / BLOCK,
            longest: 400,
            rng: RefCell::new(Rng::new(seed)),
            left: Cell::new(300 * scale()),
            may_fail: false,
        };
        work.run(16).await;
        let bytes = read_disk(&image).await.unwrap();
        model.judge_disk(&bytes, Settled::Ended).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        image.close().await.unwrap();
        bytes
    });
    // The guest sees it, and every block of it matches its tuple.
    for lba in (0..4096).step_by(64) {
        let cdb = [0x28, 0, 0, 0, (lba >> 8) as u8, lba as u8, 0, 0, 64, 0];
        let ended = guest.kernel.execute(&cdb, tcmu_dif::peer::kernel::Data::In(64 * 512)).unwrap();
        assert!(ended.status == 0 && ended.data == bytes[lba as usize * 512..(lba as usize + 64) * 512]);
    }
}

#[test]
fn random_work_of_a_client_on_a_writable_export_beside_a_guest() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 2 * MIB);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    add(&mut talk, true);
    for (seed, query) in [(1, ""), (2, "&connections=3")] {
        work_beside(&mut guest, PathBuf::from(format!("{}{query}", uri(&mut talk))), seed);
    }
    let pi = talk.get("query-pi", json!({}));
    assert_eq!(pi[0]["counters"]["guard_errors"], 0, "{pi}");
    assert!(pi[0]["counters"]["generated"].as_u64().unwrap() > 0);
    // And by a client of another make.
    let copy = rig.dir.path().join("from");
    let data: Vec<u8> = (0..2 << 20).map(|i| (i / 11) as u8).collect();
    std::fs::write(&copy, &data).unwrap();
    must("nbdcopy", &["--flush", copy.to_str().unwrap(), &uri(&mut talk)]);
    assert!(std::fs::read(rig.dir.path().join("vm1.raw")).unwrap() == data);
}

#[test]
fn what_is_asked_of_exports_in_the_wrong_order_is_refused_in_qemus_words() {
    let rig = Rig::new(Registry::default());
    let guest = rig.protected("vm1", MIB);
    let mut talk = rig.talk();
    let mut refused = |command: &str, arguments: Value| {
        let answer = talk.ask(command, arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    };
    let export = json!({ "type": "nbd", "id": "e1", "node-name": "vm1" });
    assert_eq!(refused("block-export-add", export.clone()), "NBD server not running");
    assert_eq!(refused("nbd-server-stop", json!({})), "NBD server not running");
    let inet = |host: &str| json!({ "addr": { "type": "inet", "data": { "host": host, "port": "0" } } });
    for host in ["0.0.0.0", "::", "192.0.2.1", "example.com"] {
        assert!(refused("nbd-server-start", inet(host)).contains("no TLS"), "{host}");
    }
    assert!(
        refused("nbd-server-start", json!({ "addr": { "type": "unix", "data": {} } })).contains("missing")
    );
    talk.get("nbd-server-start", inet("127.0.0.1"));
    let mut refused = |command: &str, arguments: Value| {
        talk.ask(command, arguments)["error"]["desc"].as_str().unwrap().to_owned()
    };
    assert_eq!(refused("nbd-server-start", inet("127.0.0.1")), "NBD server already running");
    assert!(refused("nbd-server-add", json!({ "device": "vm2" })).contains("not served"));
    talk.get("block-export-add", export.clone());
    let mut refused = |command: &str, arguments: Value| {
        talk.ask(command, arguments)["error"]["desc"].as_str().unwrap().to_owned()
    };
    assert!(refused("block-export-add", export).contains("in use"));
    assert!(refused("nbd-server-add", json!({ "device": "vm1" })).contains("already has export named"));
    let uri = talk.get("query-block-exports", json!({}))[0]["uri"].as_str().unwrap().to_owned();
    assert!(uri.starts_with("nbd://127.0.0.1:"), "{uri}");
    assert!(must("nbdinfo", &["--size", &uri]).trim() == MIB.to_string());

    // One that is used goes when it is told to go hard, and with the LUN.
    let (host, _) = uri.strip_prefix("nbd://").unwrap().split_once('/').unwrap();
    let mut client = std::net::TcpStream::connect(host).unwrap();
    go(&mut client, "vm1");
    let safe = talk.ask("block-export-del", json!({ "id": "e1" }));
    assert_eq!(safe["error"]["desc"], "export 'e1' still in use");
    talk.get("block-export-del", json!({ "id": "e1", "mode": "hard" }));
    assert_eq!(talk.event("BLOCK_EXPORT_DELETED")["data"]["id"], "e1");
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    talk.get("nbd-server-add", json!({ "device": "vm1", "name": "a disk" }));
    let mut client = std::net::TcpStream::connect(host).unwrap();
    go(&mut client, "a disk");
    rig.luns.remove("vm1", guest.lun.remote());
    assert_eq!(talk.event("BLOCK_EXPORT_DELETED")["data"]["id"], "a disk");
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(talk.get("query-block-exports", json!({})), json!([]));
    talk.get("nbd-server-stop", json!({}));
    assert!(std::net::TcpStream::connect(host).is_err());
}

/// The client's half of the shortest handshake there is.
pub fn go(client: &mut (impl Read + Write), name: &str) {
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&3u32.to_be_bytes()).unwrap();
    client.write_all(&handshake::option(option::EXPORT_NAME, name.as_bytes())).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
}

pub fn connect(at: &Path) -> UnixStream {
    let client = UnixStream::connect(at).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client
}

#[test]
fn clients_that_make_no_sense_end_alone() {
    let rig = Rig::new(Registry::default());
    let (guest, model) = written(&rig);
    let mut talk = rig.talk();
    start(&rig, &mut talk);
    add(&mut talk, false);
    let at = socket(&rig);
    let ends = |client: &mut UnixStream| {
        let mut rest = Vec::new();
        // Reset, if it had not read all.
        let _ = client.read_to_end(&mut rest);
    };
    // Noise, instead of flags, options and requests; an option without end.
    for sent in [
        vec![0xff; 64],
        [&3u32.to_be_bytes()[..], &[0xa5; 64]].concat(),
        [&3u32.to_be_bytes()[..], &handshake::option(option::GO, &[])[..12], &u32::MAX.to_be_bytes()]
            .concat(),
        [&3u32.to_be_bytes()[..], &handshake::option(99, &[]).repeat(300)].concat(),
    ] {
        let mut client = connect(&at);
        let _ = client.write_all(&sent);
        ends(&mut client);
    }
    let request = |kind, offset, length| Request { flags: 0, kind, cookie: 7, offset, length };
    let mut client = connect(&at);
    go(&mut client, "vm1");
    client.write_all(&request(command::WRITE, 0, u32::MAX).to_bytes()).unwrap();
    ends(&mut client);
    // What is only wrong is answered, and the client goes on.
    let mut client = connect(&at);
    go(&mut client, "vm1");
    for (sent, error) in [
        (request(command::READ, 0, 513), 22u32),
        (request(command::READ, 1, 512), 22),
        (request(command::READ, 8 << 20, 512), 22),
        (request(command::READ, u64::MAX - 511, 512), 22),
        (request(command::READ, 0, 0), 22),
        (request(command::WRITE_ZEROES, 0, 512), 1),
        (request(command::BLOCK_STATUS, 0, 512), 22),
        (request(77, 0, 512), 22),
        (request(command::READ, 64 * 512, 512), 0),
    ] {
        client.write_all(&sent.to_bytes()).unwrap();
        let mut reply = [0; 16];
        client.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], error.to_be_bytes(), "{sent:?}");
    }
    let mut block = [0; 512];
    client.read_exact(&mut block).unwrap();
    assert_eq!(block, model[64 * 512..65 * 512]);
    drop(guest);
}
