//! Both ends against each other without a socket and over one; and what is wrong with certificates, in words.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use super::{
    certificates::{Ca, When},
    duplex, *,
};

/// Moves what one end has for the other.
fn move_over(from: &mut Session, to: &mut Session) -> Result<(), TlsError> {
    let mut bytes = Vec::new();
    while from.has_to_write() {
        from.write_to(&mut bytes).unwrap();
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        rest = &rest[to.feed(rest)?..];
    }
    Ok(())
}

/// The handshake of those two; what the first says that fails, client or server.
fn meet(client: &Path, server: &Path, host: &str) -> Result<(Session, Session), TlsError> {
    let mut a = Session::client(&Client::read(client, host)?)?;
    let mut b = Session::server(&Server::read(server)?)?;
    // With TLS 1.3 the client is done first, and hears of a refusal afterwards.
    for _ in 0..3 {
        move_over(&mut a, &mut b)?;
        move_over(&mut b, &mut a)?;
    }
    assert!(!a.is_beginning() && !b.is_beginning());
    Ok((a, b))
}

#[test]
fn what_one_end_encrypts_the_other_reads_and_nobody_in_between() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ours");
    let all = ca.directory(&dir.path().join("pki"));
    for host in ["localhost", "127.0.0.1", "::1"] {
        let (mut a, mut b) = meet(&all, &all, host).unwrap();
        let sent: Vec<u8> = (0..200_000u32).map(|i| (i / 7) as u8).collect();
        a.encrypt(&sent).unwrap();
        let mut wire = Vec::new();
        while a.has_to_write() {
            a.write_to(&mut wire).unwrap();
        }
        assert!(!wire.windows(64).any(|w| w == &sent[..64]));
        let mut got = Vec::new();
        let mut rest = &wire[..];
        while !rest.is_empty() {
            rest = &rest[b.feed(rest).unwrap()..];
            b.plain(|bytes| {
                got.extend_from_slice(bytes);
                bytes.len()
            });
        }
        assert!(got == sent);
        assert!(!b.is_over());
        a.say_goodbye();
        move_over(&mut a, &mut b).unwrap();
        assert!(b.is_over());
    }
}

#[test]
fn a_byte_that_was_changed_on_the_way_ends_the_connection() {
    let dir = tempfile::tempdir().unwrap();
    let all = Ca::new("ours").directory(&dir.path().join("pki"));
    let (mut a, mut b) = meet(&all, &all, "localhost").unwrap();
    a.encrypt(b"to be or not to be").unwrap();
    let mut wire = Vec::new();
    a.write_to(&mut wire).unwrap();
    *wire.last_mut().unwrap() ^= 1;
    b.feed(&wire).unwrap_err();
    assert_eq!(b.plain(<[u8]>::len), 0);
}

#[test]
fn who_is_not_believed_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Ca::new("ours"), Ca::new("theirs"));
    let good = ours.directory(&dir.path().join("good"));
    let other = theirs.directory(&dir.path().join("other"));
    let refused = |client: &Path, server: &Path, host: &str, words: &[&str]| {
        let e = meet(client, server, host).map(drop).unwrap_err();
        for word in words {
            assert!(e.why.contains(word), "{}", e.in_one_line());
        }
        assert!(!e.next.is_empty());
    };
    refused(&good, &other, "localhost", &["the server's certificate", "not signed", "good/ca-cert.pem"]);
    refused(
        &good,
        &good,
        "store.example.com",
        &["is for localhost, 127.0.0.1, ", ", and not for store.example.com"],
    );
    refused(&good, &good, "127.0.0.2", &["not for 127.0.0.2"]);
    // A client that believes the server, which does not believe it: its own directory is consistent, so its CA's file has both.
    let mixed = theirs.directory(&dir.path().join("mixed"));
    let both = [good.join("ca-cert.pem"), other.join("ca-cert.pem")]
        .map(|p| fs::read_to_string(p).unwrap())
        .concat();
    fs::write(mixed.join("ca-cert.pem"), &both).unwrap();
    refused(&mixed, &good, "localhost", &["the client's certificate", "not signed", "good/ca-cert.pem"]);
    // One that was revoked.
    let revoking = ours.directory(&dir.path().join("revoking"));
    ours.revoke(&revoking, "client");
    refused(&good, &revoking, "localhost", &["the client's certificate has been revoked"]);
    ours.revoke(&revoking, "server");
    // What is revoked is told of our own as well where that is looked at.
    refused(&revoking, &good, "localhost", &["the server's certificate has been revoked"]);
    // The times.
    for (when, word) in [(When::Past, "expired"), (When::Future, "not valid yet")] {
        let at = ours.directory(&dir.path().join(word));
        ours.sign(&at, "server", &["localhost"], when);
        ours.sign(&at, "client", &[], when);
        refused(&at, &good, "localhost", &["client-cert.pem", word]);
        refused(&good, &at, "localhost", &["server-cert.pem", word]);
    }
}

#[test]
fn what_is_wrong_with_the_files_is_told_with_the_file_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ours");
    let mut number = 0;
    let mut wrong = |what: &dyn Fn(&Path), words: &[&str]| {
        number += 1;
        let at = ca.directory(&dir.path().join(number.to_string()));
        what(&at);
        let e = Client::read(&at, "localhost").map(drop).unwrap_err();
        for word in words {
            assert!(e.in_one_line().contains(word), "{}", e.in_one_line());
        }
    };
    wrong(
        &|at| fs::remove_dir_all(at).unwrap(),
        &["directory of certificates", "ca-cert.pem, client-cert.pem"],
    );
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        wrong(&|at| fs::remove_file(at.join(file)).unwrap(), &[file, "cannot be read", "a client needs"]);
        wrong(&|at| fs::write(at.join(file), "nothing\n").unwrap(), &[file, "holds no", "PEM"]);
        wrong(&|at| fs::write(at.join(file), vec![b'x'; 5 << 20]).unwrap(), &[file, "4 MiB"]);
        wrong(
            &|at| {
                fs::remove_file(at.join(file)).unwrap();
                fs::create_dir(at.join(file)).unwrap();
            },
            &[file, "no regular file"],
        );
    }
    wrong(
        &|at| {
            fs::set_permissions(at.join("client-key.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        },
        &["client-key.pem", "everybody", "0644", "chmod 600"],
    );
    wrong(
        &|at| assert!(fs::copy(at.join("server-key.pem"), at.join("client-key.pem")).unwrap() > 0),
        &["client-key.pem is not the key of", "client-cert.pem"],
    );
    wrong(
        &|at| {
            drop(fs::write(
                at.join("ca-cert.pem"),
                fs::read(Ca::new("x").directory(&at.join("x")).join("ca-cert.pem")).unwrap(),
            ))
        },
        &["client-cert.pem is not signed by the CA of"],
    );
    wrong(
        &|at| {
            let text = fs::read_to_string(at.join("client-cert.pem")).unwrap();
            fs::write(at.join("client-cert.pem"), text.replace("-----END", "*-----END")).unwrap();
        },
        &["client-cert.pem is not as a PEM file is"],
    );
}

#[test]
fn over_a_socket_both_directions_run_at_once_and_the_end_is_seen() {
    let dir = tempfile::tempdir().unwrap();
    let all = Ca::new("ours").directory(&dir.path().join("pki"));
    let (here, there) = UnixStream::pair().unwrap();
    let client = Session::client(&Client::read(&all, "localhost").unwrap()).unwrap();
    let server = Session::server(&Server::read(&all).unwrap()).unwrap();
    const LIMIT: Duration = Duration::from_secs(20);
    let echo = thread::spawn(move || {
        let (mut read, mut write) = duplex::begin(server, there.try_clone().unwrap(), there, LIMIT).unwrap();
        let mut buffer = vec![0; 100_000];
        loop {
            match read.read(&mut buffer).unwrap() {
                0 => return,
                n => write.write_all(&buffer[..n]).unwrap(),
            }
        }
    });
    let (mut read, mut write) = duplex::begin(client, here.try_clone().unwrap(), here, LIMIT).unwrap();
    let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i / 5) as u8).collect();
    let copy = sent.clone();
    let sending = thread::spawn(move || {
        copy.chunks(333_333).for_each(|part| write.write_all(part).unwrap());
        write
    });
    let mut got = vec![0; sent.len()];
    read.read_exact(&mut got).unwrap();
    assert!(got == sent);
    sending.join().unwrap().say_goodbye().unwrap();
    echo.join().unwrap();
}

#[test]
fn who_speaks_no_tls_or_nothing_is_no_peer() {
    let dir = tempfile::tempdir().unwrap();
    let all = Ca::new("ours").directory(&dir.path().join("pki"));
    for said in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0; 4096], &[0x16, 3, 1, 0xff, 0xff], b""] {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(said).unwrap();
        there.shutdown(std::net::Shutdown::Write).unwrap();
        let server = Session::server(&Server::read(&all).unwrap()).unwrap();
        let e = duplex::begin(server, here.try_clone().unwrap(), here, Duration::from_secs(9))
            .map(drop)
            .unwrap_err();
        assert!(TlsError::of(&e).is_some(), "{e}");
    }
    // One that says nothing is not waited for.
    let (here, _there) = UnixStream::pair().unwrap();
    here.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let server = Session::server(&Server::read(&all).unwrap()).unwrap();
    let e =
        duplex::begin(server, here.try_clone().unwrap(), here, Duration::from_secs(9)).map(drop).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
}
