//! Exports with TLS: what QEMU and libnbd read of them, what a client of ours writes to them, and who is sent away.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::{
    control::Registry,
    image::error::OpenErrorKind,
    nbd::{answer, handshake, option},
    sys,
    tls::{Client as Certificates, Session, duplex},
};

use crate::{
    certificates::{Ca, When},
    export::{add, socket, uri, work_beside, written},
    rig::{MIB, Rig, Talk},
    servers::try_attach,
    support::{must, run},
    tls::{pki, secure, with_certificates},
};

fn start(rig: &Rig, talk: &mut Talk, certificates: &Path) {
    let addr = json!({ "type": "unix", "data": { "path": socket(rig) } });
    talk.get("nbd-server-start", json!({ "addr": addr, "tls-certificates": certificates }));
}

#[test]
fn qemu_and_libnbd_read_over_tls_what_the_lun_holds() {
    let rig = Rig::new(Registry::default());
    let (guest, model) = written(&rig);
    let (_ca, pki) = pki(rig.dir.path());
    let path = |name: &str| rig.dir.path().join(name).to_str().unwrap().to_owned();
    for inet in [false, true] {
        let mut talk = rig.talk();
        if inet {
            let addr = json!({ "type": "inet", "data": { "host": "localhost", "port": "0" } });
            talk.get("nbd-server-start", json!({ "addr": addr, "tls-certificates": pki }));
        } else {
            start(&rig, &mut talk, &pki);
        }
        add(&mut talk, false);
        let uri = uri(&mut talk);
        assert!(
            uri.starts_with(if inet { "nbds://127.0.0.1:" } else { "nbds+unix:///vm1?socket=" }),
            "{uri}"
        );
        let secured = with_certificates(&uri, &pki);
        let told: Value = serde_json::from_str(&must("nbdinfo", &["--json", &secured])).unwrap();
        assert_eq!(
            (&told["TLS"], &told["exports"][0]["export-size"]),
            (&json!(true), &json!(8 * MIB)),
            "{told}"
        );
        let list: Value = serde_json::from_str(&must("nbdinfo", &["--json", "--list", &secured])).unwrap();
        assert_eq!(list["exports"][0]["export-name"], "vm1", "{list}");
        must("nbdcopy", &[&secured, &path("copy")]);
        assert!(std::fs::read(path("copy")).unwrap() == model);
        // QEMU, which has an object for its certificates.
        let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", pki.display());
        let at = match uri.strip_prefix("nbds://").and_then(|rest| rest.split_once('/')) {
            Some((at, _)) => {
                let port = at.rsplit_once(':').unwrap().1;
                format!("server.type=inet,server.host=127.0.0.1,server.port={port}")
            }
            None => format!("server.type=unix,server.path={},tls-hostname=localhost", socket(&rig).display()),
        };
        let image = format!(
            "driver=raw,file.driver=nbd,file.export=vm1,file.tls-creds=tls0,{}",
            at.replace("server.", "file.server.").replace("tls-hostname", "file.tls-hostname")
        );
        must(
            "qemu-img",
            &["convert", "--object", &object, "--image-opts", "-O", "raw", &image, &path("copy2")],
        );
        assert!(std::fs::read(path("copy2")).unwrap() == model);
        talk.get("nbd-server-stop", json!({}));
    }
    drop(guest);
}

#[test]
fn random_work_of_a_client_over_tls_on_a_writable_export_beside_a_guest() {
    let rig = Rig::new(Registry::default());
    let mut guest = rig.protected("vm1", 2 * MIB);
    let (_ca, pki) = pki(rig.dir.path());
    let mut talk = rig.talk();
    start(&rig, &mut talk, &pki);
    add(&mut talk, true);
    for (seed, query) in [(1, ""), (2, "&connections=3")] {
        let uri = PathBuf::from(with_certificates(&uri(&mut talk), &pki) + query);
        work_beside(&mut guest, uri, seed);
    }
    let copy = rig.dir.path().join("from");
    let data: Vec<u8> = (0..2 << 20).map(|i| (i / 11) as u8).collect();
    std::fs::write(&copy, &data).unwrap();
    must("nbdcopy", &["--flush", copy.to_str().unwrap(), &with_certificates(&uri(&mut talk), &pki)]);
    assert!(std::fs::read(rig.dir.path().join("vm1.raw")).unwrap() == data);
}

fn connect(at: &Path) -> UnixStream {
    let client = UnixStream::connect(at).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    client
}

/// The kind of an answer to an option.
fn ask(client: &mut (impl Read + Write), number: u32, data: &[u8]) -> u32 {
    client.write_all(&handshake::option(number, data)).unwrap();
    let mut head = [0; handshake::ANSWER_HEAD_LEN];
    client.read_exact(&mut head).unwrap();
    let (kind, len) = handshake::parse_answer_head(&head, number).unwrap();
    client.read_exact(&mut vec![0; len as usize]).unwrap();
    kind
}

fn greeted(at: &Path) -> UnixStream {
    let mut client = connect(at);
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&3u32.to_be_bytes()).unwrap();
    client
}

#[test]
fn without_tls_a_client_is_told_nothing_but_that_it_has_to_have_it() {
    let rig = Rig::new(Registry::default());
    let guest = rig.protected("vm1", MIB);
    let (_ca, pki) = pki(rig.dir.path());
    let mut talk = rig.talk();
    start(&rig, &mut talk, &pki);
    add(&mut talk, true);
    let at = socket(&rig);
    let mut client = greeted(&at);
    let go = handshake::go("vm1", &[]);
    let contexts = handshake::contexts("vm1", &["base:allocation"]);
    for (number, data) in [
        (option::LIST, &[][..]),
        (option::STRUCTURED_REPLY, &[]),
        (option::INFO, &go),
        (option::GO, &go),
        (option::LIST_META_CONTEXT, &contexts),
        (option::SET_META_CONTEXT, &contexts),
        (77, b"what"),
    ] {
        assert_eq!(ask(&mut client, number, data), answer::ERR_TLS_REQD, "option {number}");
    }
    assert_eq!(ask(&mut client, option::STARTTLS, b"x"), answer::ERR_INVALID);
    assert_eq!(ask(&mut client, option::ABORT, &[]), answer::ACK);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    // The old way in has no other answer.
    let mut client = greeted(&at);
    client.write_all(&handshake::option(option::EXPORT_NAME, b"vm1")).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    // What is sent in the clear behind the option is no part of what comes over TLS.
    let mut client = greeted(&at);
    let early = [handshake::option(option::STARTTLS, &[]), handshake::option(option::GO, &go)].concat();
    client.write_all(&early).unwrap();
    let mut heard = Vec::new();
    let _ = client.read_to_end(&mut heard);
    let ack = handshake::answer(option::STARTTLS, answer::ACK, &[]);
    // An alert at most comes after it.
    assert!(heard.starts_with(&ack) && heard.len() < ack.len() + 16, "{heard:?}");
    // Ours says what to do.
    let plain = PathBuf::from(uri(&mut talk).replacen("nbds", "nbd", 1));
    let e = sys::run(async move |io| try_attach(&io, &plain, false).await.unwrap_err());
    assert!(matches!(&e.what, OpenErrorKind::ServerRefuses(why) if why.contains("nbds://")), "{e}");
    assert!(!run("nbdinfo", &[&uri(&mut talk).replacen("nbds", "nbd", 1)]).status.success());
    // With TLS the same options are answered, and TLS begins once.
    let mut client = greeted(&at);
    assert_eq!(ask(&mut client, option::STARTTLS, &[]), answer::ACK);
    let session = Session::client(&Certificates::read(&pki, "localhost").unwrap()).unwrap();
    let (reading, writing) =
        duplex::begin(session, client.try_clone().unwrap(), client, Duration::from_secs(20)).unwrap();
    let mut client = Both(reading, writing);
    assert_eq!(ask(&mut client, option::STARTTLS, &[]), answer::ERR_INVALID);
    assert_eq!(ask(&mut client, option::STRUCTURED_REPLY, &[]), answer::ACK);
    assert_eq!(ask(&mut client, option::ABORT, &[]), answer::ACK);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    drop(guest);
}

struct Both(duplex::Reading<UnixStream>, duplex::Writing<UnixStream>);

impl Read for Both {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(to)
    }
}

impl Write for Both {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        self.1.write(from)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.1.flush()
    }
}

#[test]
fn clients_that_do_not_show_who_they_are_are_not_served() {
    let rig = Rig::new(Registry::default());
    let (guest, model) = written(&rig);
    let (ca, pki) = pki(rig.dir.path());
    let mut talk = rig.talk();
    start(&rig, &mut talk, &pki);
    add(&mut talk, false);
    let uri = uri(&mut talk);
    // libnbd does without a certificate of its own.
    let bare = rig.dir.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(pki.join("ca-cert.pem"), bare.join("ca-cert.pem")).unwrap();
    assert!(!run("nbdinfo", &[&with_certificates(&uri, &bare)]).status.success());
    // One of another CA, who believes ours.
    let mixed = Ca::new("others").directory(&rig.dir.path().join("mixed"));
    let cas = [&pki, &mixed].map(|d| std::fs::read_to_string(d.join("ca-cert.pem")).unwrap()).concat();
    std::fs::write(mixed.join("ca-cert.pem"), cas).unwrap();
    assert!(!run("nbdinfo", &[&with_certificates(&uri, &mixed)]).status.success());
    let theirs = PathBuf::from(with_certificates(&uri, &mixed));
    let e = sys::run(async move |io| try_attach(&io, &theirs, true).await.unwrap_err());
    let OpenErrorKind::Tls(tls) = &e.what else { panic!("{e}") };
    assert!(tls.why.contains("mixed/client-cert.pem"), "{e}");
    // One that was revoked while the server ran: from the next connection on.
    must("nbdinfo", &[&with_certificates(&uri, &pki)]);
    ca.revoke(&pki, "client");
    let good = ca.directory(&rig.dir.path().join("good"));
    assert!(!run("nbdinfo", &[&with_certificates(&uri, &good)]).status.success());
    std::fs::remove_file(pki.join("ca-crl.pem")).unwrap();
    must("nbdcopy", &[&with_certificates(&uri, &good), rig.dir.path().join("copy").to_str().unwrap()]);
    assert!(std::fs::read(rig.dir.path().join("copy")).unwrap() == model);
    drop(guest);
}

#[test]
fn certificates_that_cannot_be_used_keep_a_server_from_starting_with_the_file_and_what_to_do() {
    let rig = Rig::new(Registry::default());
    let (ca, pki) = pki(rig.dir.path());
    let mut talk = rig.talk();
    let mut refused = |certificates: &str, words: &[&str]| {
        let addr = json!({ "type": "unix", "data": { "path": socket(&rig) } });
        let answer = talk.ask("nbd-server-start", json!({ "addr": addr, "tls-certificates": certificates }));
        let said = answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{answer}"));
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
        assert!(!socket(&rig).exists());
    };
    refused("pki", &["not an absolute path"]);
    refused("/nonexistent", &["/nonexistent cannot be used", "server-cert.pem and server-key.pem"]);
    ca.sign(&pki, "server", &["localhost"], When::Past);
    refused(pki.to_str().unwrap(), &["server-cert.pem has expired", "next: have a new one made"]);
    std::fs::copy(pki.join("client-key.pem"), pki.join("server-key.pem")).unwrap();
    refused(pki.to_str().unwrap(), &["server-key.pem is not the key of"]);
}

/// Nothing is made weaker by a server without certificates.
#[test]
fn an_export_without_tls_says_no_to_it_and_a_client_that_wants_it_goes() {
    let rig = Rig::new(Registry::default());
    let (guest, _) = written(&rig);
    let (_ca, pki) = pki(rig.dir.path());
    let mut talk = rig.talk();
    talk.get("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket(&rig) } } }));
    add(&mut talk, false);
    let uri = secure(Path::new(&uri(&mut talk)), &pki);
    let e = sys::run(async move |io| try_attach(&io, &uri, true).await.unwrap_err());
    let OpenErrorKind::Tls(tls) = &e.what else { panic!("{e}") };
    assert!(tls.why.contains("does no TLS (this server has no certificates"), "{e}");
    drop(guest);
}
