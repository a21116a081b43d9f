//! The client over TLS: servers of other makes, servers that die, lie and are not who they should be, and ways on which bytes change.

use std::{
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::error::OpenErrorKind,
    nbd::{
        answer, export,
        handshake::{self, BlockSizes, Export, OPTION_HEAD_LEN},
        option,
    },
    sys::{self, mem::Buffer},
    tls::{Server as Certificates, Session, duplex},
    units::ByteOffset,
    volume::{IoErrorKind, Volume, WriteFlags},
};

use crate::{
    certificates::{Ca, When},
    fake::{Fake, agree},
    model::{Model, Settled},
    reconnect::{work, work_while_it_dies, work_while_it_is_killed},
    servers::{Server, attach, file, nbdkit, qemu_nbd, try_attach},
    support::{Rng, scale},
    volume::work_at,
    work::read_disk,
};

const SIZE: u64 = 2 << 20;
const MOMENT: Duration = Duration::from_millis(10);
const LIMIT: Duration = Duration::from_secs(20);

/// The same URI with TLS and the certificates of that directory.
pub fn secure(uri: &Path, certificates: &Path) -> PathBuf {
    with_certificates(&uri.to_str().unwrap().replacen("nbd", "nbds", 1), certificates).into()
}

/// A URI with the certificates of that directory.
pub fn with_certificates(uri: &str, certificates: &Path) -> String {
    let join = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{join}tls-certificates={}", certificates.display())
}

/// A directory with good certificates.
pub fn pki(dir: &Path) -> (Ca, PathBuf) {
    let ca = Ca::new("tests");
    let at = ca.directory(&dir.join("pki"));
    (ca, at)
}

fn nbdkit_tls(dir: &Path, certificates: &Path, args: &[&str]) -> Server {
    let certificates = format!("--tls-certificates={}", certificates.display());
    let mut all = vec!["--tls=require", "--tls-verify-peer", &certificates];
    all.extend(args);
    nbdkit(dir, &all)
}

#[test]
fn random_work_on_a_file_behind_nbdkit_with_tls_over_one_and_over_four_connections() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let disk = file(dir.path(), "disk", SIZE);
    let server = nbdkit_tls(dir.path(), &pki, &["file", disk.to_str().unwrap()]);
    work_at(secure(&server.uri(""), &pki), 1, 400, 16);
    std::fs::write(&disk, []).unwrap();
    file(dir.path(), "disk", SIZE);
    work_at(secure(&server.uri("&connections=4"), &pki), 2, 400, 16);
}

#[test]
fn random_work_on_a_raw_file_behind_qemu_nbd_with_tls() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let disk = file(dir.path(), "disk", SIZE);
    let object =
        format!("--object=tls-creds-x509,id=tls0,endpoint=server,verify-peer=on,dir={}", pki.display());
    let args = ["--format=raw", "--discard=unmap", &object, "--tls-creds=tls0", disk.to_str().unwrap()];
    let server = qemu_nbd(dir.path(), &args);
    work_at(secure(&server.uri("&connections=4"), &pki), 3, 400, 16);
}

/// nbdkit with TLS, killed and started again beside the work; its file keeps what was written.
#[test]
fn random_work_goes_on_over_a_server_with_tls_that_is_killed_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let disk = file(dir.path(), "disk", SIZE);
    let args = ["--filter=delay", "file", disk.to_str().unwrap(), "rdelay=2ms", "wdelay=2ms"];
    let server = nbdkit_tls(dir.path(), &pki, &args);
    let uri = secure(&server.uri("&connections=2"), &pki);
    work_while_it_is_killed(server, uri, &disk, Duration::from_millis(100), 600);
}

/// A server's option and its data.
fn option_of(client: &mut impl Read) -> io::Result<(u32, Vec<u8>)> {
    let mut head = [0; OPTION_HEAD_LEN];
    client.read_exact(&mut head)?;
    let (number, len) = handshake::parse_option_head(&head).unwrap();
    let mut data = vec![0; len as usize];
    client.read_exact(&mut data)?;
    Ok((number, data))
}

/// The server's half up to STARTTLS, and what it answers.
fn greet(client: &mut UnixStream, answers: &[u8]) -> io::Result<()> {
    client.write_all(&handshake::greeting(3))?;
    client.read_exact(&mut [0; 4])?;
    let (number, data) = option_of(client)?;
    assert_eq!((number, data.len()), (option::STARTTLS, 0), "nothing is said before TLS");
    client.write_all(answers)
}

fn ack() -> Vec<u8> {
    handshake::answer(option::STARTTLS, answer::ACK, &[])
}

type Both = (duplex::Reading<UnixStream>, duplex::Writing<UnixStream>);

fn begin(client: UnixStream, certificates: &Path) -> io::Result<Both> {
    let session = Session::server(&Certificates::read(certificates)?)?;
    duplex::begin(session, client.try_clone()?, client, LIMIT)
}

/// Serves each client of a new socket that way, for as long as the test runs.
fn serve(at: &Path, how: impl Fn(UnixStream) -> io::Result<()> + Send + Sync + 'static) -> PathBuf {
    let listener = UnixListener::bind(at).unwrap();
    let how = Arc::new(how);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (how, client) = (how.clone(), client.unwrap());
            std::thread::spawn(move || drop(how(client)));
        }
    });
    format!("nbd+unix:///?socket={}", at.display()).into()
}

fn pump(mut from: impl Read, mut to: impl Write, change: impl Fn(&mut [u8])) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut bytes) {
        change(&mut bytes[..n]);
        if to.write_all(&bytes[..n]).is_err() {
            return;
        }
    }
}

/// TLS before a server that has none.
fn tls_before(at: &Path, certificates: &Path, plain: &Path) -> PathBuf {
    let (certificates, plain) = (certificates.to_owned(), plain.to_owned());
    serve(at, move |mut client| {
        greet(&mut client, &ack())?;
        let raw = client.try_clone()?;
        let (reading, writing) = begin(client, &certificates)?;
        let mut server = UnixStream::connect(&plain).inspect_err(|_| drop(raw.shutdown(Shutdown::Both)))?;
        server.read_exact(&mut [0; 18])?;
        server.write_all(&3u32.to_be_bytes())?;
        let (to, end) = (server.try_clone()?, server.try_clone()?);
        let up = std::thread::spawn(move || {
            pump(reading, to, |_| ());
            drop(end.shutdown(Shutdown::Both));
        });
        pump(server, writing, |_| ());
        raw.shutdown(Shutdown::Both)?;
        up.join().unwrap();
        Ok(())
    })
}

#[test]
fn nothing_that_was_acknowledged_over_tls_is_lost_with_a_server_that_loses_its_cache() {
    for (seed, flags, query) in [
        (1, export::SEND_FUA, ""),
        (2, 0, "&retain=1M"),
        (3, export::SEND_FUA | export::CAN_MULTI_CONN, "&connections=3"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (_ca, pki) = pki(dir.path());
        let plain = dir.path().join("plain");
        let fake = Fake::start(&plain, SIZE as usize, seed, flags, MOMENT);
        let uri = tls_before(&dir.path().join("tls"), &pki, &plain);
        let uri = secure(&uri, &pki).into_os_string().into_string().unwrap() + query;
        work_while_it_dies(&fake, uri.into(), seed, 400);
        assert!(fake.deaths.load(Ordering::SeqCst) > 3, "seed {seed}: it never died");
        fake.stop();
    }
}

/// Somebody between both who changes a bit now and then: the connection ends, and no wrong byte is read or written.
#[test]
fn bits_that_change_on_the_way_end_connections_and_are_never_data() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let disk = file(dir.path(), "disk", SIZE);
    let server = nbdkit_tls(dir.path(), &pki, &["file", disk.to_str().unwrap()]);
    let there = server.socket.clone();
    let changed = Arc::new(AtomicU64::new(0));
    let count = changed.clone();
    let rng = Arc::new(Mutex::new(Rng::new(5)));
    let calm = Arc::new(AtomicU64::new(1));
    let is_calm = calm.clone();
    let between = dir.path().join("between");
    let uri = serve(&between, move |client| {
        let server = UnixStream::connect(&there)?;
        let change = |bytes: &mut [u8]| {
            let mut rng = rng.lock().unwrap();
            if is_calm.load(Ordering::SeqCst) == 0 && rng.one_in(100) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << rng.below(8);
                count.fetch_add(1, Ordering::SeqCst);
            }
        };
        let (a, b) = (client.try_clone()?, server.try_clone()?);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pump(&a, &b, change);
                drop(b.shutdown(Shutdown::Both));
            });
            pump(&server, &client, change);
            drop(client.shutdown(Shutdown::Both));
        });
        Ok(())
    });
    // A length that has become larger is waited for, up to the timeout.
    let uri = PathBuf::from(format!("{}&timeout=2", secure(&uri, &pki).display()));
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        calm.store(0, Ordering::SeqCst);
        let model = Model::new(vec![0; SIZE as usize]);
        work(&image, &model, 5, 600 * scale()).await;
        calm.store(1, Ordering::SeqCst);
        let bytes = read_disk(&image).await.unwrap();
        model.judge_disk(&bytes, Settled::Ended).unwrap();
        image.close().await.unwrap();
        model.judge_disk(&std::fs::read(&disk).unwrap(), Settled::Ended).unwrap();
    });
    assert!(changed.load(Ordering::SeqCst) > 3);
}

/// What opening says, and how long it took.
fn opening(uri: PathBuf) -> OpenErrorKind {
    let began = Instant::now();
    let e = sys::run(async move |io| try_attach(&io, &uri, false).await.unwrap_err());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert!(!e.to_string().contains('\n'), "{e}");
    assert!(e.next_step().is_some());
    e.what
}

#[track_caller]
fn refused(what: &OpenErrorKind, words: &[&str]) {
    let OpenErrorKind::Tls(e) = what else { panic!("{what:?}") };
    for word in words {
        assert!(e.in_one_line().contains(word), "{word}: {}", e.in_one_line());
    }
}

#[test]
fn a_server_without_tls_is_not_spoken_to_when_tls_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let plain = nbdkit(dir.path(), &["memory", "1M"]);
    refused(
        &opening(secure(&plain.uri(""), &pki)),
        &["does no TLS", "nothing is sent", "nbd:// and not nbds://"],
    );
    drop(plain);
    for (i, kind) in [answer::ERR_UNSUP, answer::ERR_POLICY, answer::ERR_INVALID].into_iter().enumerate() {
        let uri = serve(&dir.path().join(i.to_string()), move |mut c| {
            greet(&mut c, &handshake::answer(option::STARTTLS, kind, b"not here"))?;
            // It goes without a word more.
            assert_eq!(c.read(&mut [0; 64])?, 0);
            Ok(())
        });
        refused(&opening(secure(&uri, &pki)), &["does no TLS", "not here"]);
    }
}

#[test]
fn a_server_that_wants_tls_is_told_of_to_who_asks_without() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let server = nbdkit_tls(dir.path(), &pki, &["memory", "1M"]);
    let what = opening(server.uri(""));
    assert!(matches!(&what, OpenErrorKind::ServerRefuses(why) if why.contains("nbds://")), "{what:?}");
}

#[test]
fn what_comes_in_the_clear_after_tls_was_agreed_on_is_not_taken_for_more() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let uri = serve(&dir.path().join("s"), |mut c| {
        let more = handshake::answer(option::STRUCTURED_REPLY, answer::ACK, &[]);
        greet(&mut c, &[ack(), more].concat())?;
        c.read_exact(&mut [0; 1])
    });
    assert_eq!(opening(secure(&uri, &pki)), OpenErrorKind::Unreachable);
}

#[test]
fn tls_that_cannot_be_ends_in_words_and_soon() {
    let dir = tempfile::tempdir().unwrap();
    let (_ca, pki) = pki(dir.path());
    let mut number = 0;
    let mut says = |bytes: &'static [u8]| {
        number += 1;
        let uri = serve(&dir.path().join(number.to_string()), move |mut c| {
            greet(&mut c, &ack())?;
            c.read_exact(&mut [0; 64])?;
            c.write_all(bytes)?;
            c.shutdown(Shutdown::Write)?;
            c.read_to_end(&mut Vec::new()).map(drop)
        });
        opening(secure(&uri, &pki))
    };
    refused(&says(b"220 mail.example.com ESMTP\r\n"), &["no TLS that can be"]);
    refused(&says(&[0x16, 3, 3, 0xff, 0xff, 0, 0, 0, 0, 0]), &["no TLS that can be"]);
    // An alert: handshake_failure, and protocol_version.
    refused(&says(&[0x15, 3, 3, 0, 2, 2, 40]), &["ended TLS"]);
    refused(&says(&[0x15, 3, 3, 0, 2, 2, 70]), &["TLS 1.3"]);
    assert_eq!(says(b""), OpenErrorKind::Unreachable);
    // Records without end that are no handshake.
    let uri = serve(&dir.path().join("endless"), |mut c| {
        greet(&mut c, &ack())?;
        c.read_exact(&mut [0; 64])?;
        loop {
            c.write_all(&[[0x14, 3, 3, 0, 1, 1]; 1000].concat())?;
        }
    });
    refused(&opening(secure(&uri, &pki)), &["no TLS that can be"]);
    let uri = serve(&dir.path().join("silent"), |mut c| {
        greet(&mut c, &ack())?;
        c.read_to_end(&mut Vec::new()).map(drop)
    });
    assert_eq!(opening(secure(&uri, &pki)), OpenErrorKind::Unreachable);
}

#[test]
fn who_the_server_is_and_who_we_are_is_shown_or_nothing_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, good) = pki(dir.path());
    let other = Ca::new("others").directory(&dir.path().join("other"));
    let server = nbdkit_tls(dir.path(), &good, &["memory", "1M"]);
    let uri = server.uri("");
    let at = |certificates: &Path| secure(&uri, certificates);
    // Another CA than the server's.
    refused(
        &opening(at(&other)),
        &["the server's certificate is not signed by the CA of", "other/ca-cert.pem"],
    );
    // Another name.
    let named = |name: &str| -> PathBuf { format!("{}&tls-hostname={name}", at(&good).display()).into() };
    refused(
        &opening(named("store.example.com")),
        &["localhost", "not for store.example.com", "tls-hostname"],
    );
    refused(&opening(named("a%2Fb")), &["'a/b' is no name"]);
    let right = named("127.0.0.1");
    assert!(sys::run(async move |io| try_attach(&io, &right, false).await.is_ok()));
    // A certificate of ours that the server does not take: it hangs up, with a word or without.
    let mixed = dir.path().join("mixed");
    Ca::new("others").directory(&mixed);
    let cas = [&good, &mixed].map(|d| std::fs::read_to_string(d.join("ca-cert.pem")).unwrap()).concat();
    std::fs::write(mixed.join("ca-cert.pem"), cas).unwrap();
    refused(&opening(at(&mixed)), &["mixed/client-cert.pem"]);
    // Nothing there, and one that has expired.
    refused(&opening(at(&dir.path().join("none"))), &["none cannot be used", "ca-cert.pem, client-cert.pem"]);
    let old = ca.directory(&dir.path().join("old"));
    ca.sign(&old, "client", &[], When::Past);
    refused(&opening(at(&old)), &["old/client-cert.pem has expired"]);
    drop(server);
    // The server's has expired, which nbdkit does not look at.
    let past = ca.directory(&dir.path().join("past"));
    ca.sign(&past, "server", &["localhost"], When::Past);
    let server = nbdkit_tls(dir.path(), &past, &["memory", "1M"]);
    refused(&opening(secure(&server.uri(""), &good)), &["the server's certificate has expired", "clock"]);
}

#[test]
fn a_certificate_that_is_renewed_counts_from_the_next_connection_on() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, pki) = pki(dir.path());
    let disk = file(dir.path(), "disk", SIZE);
    let mut server = nbdkit_tls(dir.path(), &pki, &["file", disk.to_str().unwrap()]);
    let ours = ca.directory(&dir.path().join("ours"));
    let uri = secure(&server.uri("&reconnect=1"), &ours);
    sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::from_slice(&[3; 4096]).sg();
        image.write(ByteOffset(0), &data, WriteFlags::default()).await.unwrap();
        ca.sign(&ours, "client", &[], When::Past);
        server.again();
        let e = image.read(ByteOffset(0), &data).await.unwrap_err();
        assert_eq!(e.kind, IoErrorKind::Unreachable);
        assert!(e.to_string().contains("client-cert.pem has expired"), "{e}");
        ca.sign(&ours, "client", &[], When::Now);
        image.flush().await.unwrap();
        image.close().await.unwrap();
    });
    assert_eq!(std::fs::read(&disk).unwrap()[..4096], [3; 4096]);
}

#[test]
fn a_server_with_tls_that_lies_is_one_that_is_away() {
    for lie in [&b""[..], &[0xa5; 64], &[0x67; 3]] {
        let dir = tempfile::tempdir().unwrap();
        let (_ca, pki) = pki(dir.path());
        let certificates = pki.clone();
        let uri = serve(&dir.path().join("s"), move |mut c| {
            greet(&mut c, &ack())?;
            let (mut reading, mut writing) = begin(c, &certificates)?;
            let told = Export { size: 1 << 20, flags: export::HAS_FLAGS | export::SEND_FLUSH };
            let mut both = Two(&mut reading, &mut writing);
            // The rest of the handshake is as without TLS, but for the greeting, which was said.
            agree(&mut both, told, BlockSizes::default())?;
            reading.read_exact(&mut [0; 28])?;
            writing.write_all(lie)?;
            reading.read_to_end(&mut Vec::new()).map(drop)
        });
        let uri = format!("{}&reconnect=0&timeout=1", secure(&uri, &pki).display());
        sys::run(async move |io| {
            let image = attach(&io, Path::new(&uri)).await;
            let e = image.read(ByteOffset(0), &Buffer::zeroed(4096).sg()).await.unwrap_err();
            assert_eq!(e.kind, IoErrorKind::Unreachable, "{e}");
        });
    }
}

/// Both halves as one.
struct Two<'a>(&'a mut duplex::Reading<UnixStream>, &'a mut duplex::Writing<UnixStream>);

impl Read for Two<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

impl Write for Two<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.1.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.1.flush()
    }
}
