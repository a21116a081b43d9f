//! Servers that lie: whatever they send ends as an error, soon, and with bounded memory.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tcmu_dif::{
    image::error::OpenErrorKind,
    nbd::{
        answer, chunk, export,
        handshake::{self, BlockSizes, Export},
        option,
        reply::{chunk_head, simple},
        request::{LEN, Request},
    },
    sys::{self, mem::Buffer},
    units::ByteOffset,
    volume::{IoErrorKind, Volume},
};

use crate::{
    fake::shake_hands,
    servers::{attach, try_attach},
    support::{Rng, scale},
};

/// Serves each client that way, for as long as the test runs.
fn serve(
    dir: &tempfile::TempDir,
    how: impl Fn(UnixStream) -> std::io::Result<()> + Send + Sync + 'static,
) -> PathBuf {
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let how = Arc::new(how);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (how, client) = (how.clone(), client.unwrap());
            std::thread::spawn(move || drop(how(client)));
        }
    });
    format!("nbd+unix:///?socket={}&reconnect=0&timeout=1", socket.display()).into()
}

fn good() -> Export {
    Export { size: 1 << 20, flags: export::HAS_FLAGS | export::SEND_FLUSH }
}

/// What a read says whose reply is made by that.
fn read_from(reply: impl Fn(&Request) -> Vec<u8> + Send + Sync + 'static) -> Result<Vec<u8>, IoErrorKind> {
    let dir = tempfile::tempdir().unwrap();
    let uri = serve(&dir, move |mut client| {
        shake_hands(&mut client, good(), BlockSizes::default())?;
        loop {
            let mut head = [0; LEN];
            client.read_exact(&mut head)?;
            client.write_all(&reply(&Request::parse(&head).unwrap()))?;
        }
    });
    let began = Instant::now();
    let read = sys::run(async move |io| {
        let image = attach(&io, &uri).await;
        let data = Buffer::zeroed(4096);
        let read = image.read(ByteOffset(8192), &data.sg()).await;
        read.map(|()| data.to_vec()).map_err(|e| e.kind)
    });
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    read
}

fn data(offset: u64, len: usize, cookie: u64, flags: u16) -> Vec<u8> {
    let mut out = chunk_head(flags, chunk::OFFSET_DATA, cookie, 8 + len as u32).to_vec();
    out.extend(offset.to_be_bytes());
    out.extend(vec![7; len]);
    out
}

#[test]
fn a_whole_reply_is_taken_however_it_is_cut() {
    assert_eq!(read_from(|r| data(8192, 4096, r.cookie, chunk::DONE)), Ok(vec![7; 4096]));
    let cut =
        read_from(|r| [data(8192 + 512, 3584, r.cookie, 0), data(8192, 512, r.cookie, chunk::DONE)].concat());
    assert_eq!(cut, Ok(vec![7; 4096]));
}

#[test]
fn replies_that_cannot_be_are_errors_and_soon() {
    type Reply = fn(&Request) -> Vec<u8>;
    let lies: &[(&str, Reply)] = &[
        ("silence", |_| Vec::new()),
        ("noise", |_| vec![0xa5; 64]),
        ("another's cookie", |r| data(8192, 4096, r.cookie ^ (1 << 40), chunk::DONE)),
        ("a cookie of no slot", |r| data(8192, 4096, r.cookie | 0xffff, chunk::DONE)),
        ("a simple reply", |r| simple(0, r.cookie).to_vec()),
        ("data before the range", |r| data(8191, 4096, r.cookie, chunk::DONE)),
        ("data beyond the range", |r| data(8192, 4097, r.cookie, chunk::DONE)),
        ("data far away", |r| data(u64::MAX - 3, 4096, r.cookie, chunk::DONE)),
        ("a part only", |r| data(8192, 512, r.cookie, chunk::DONE)),
        ("a part twice", |r| [data(8192, 512, r.cookie, 0), data(8192, 512, r.cookie, 0)].concat()),
        ("a chunk of 4 GiB", |r| chunk_head(0, chunk::OFFSET_DATA, r.cookie, u32::MAX).to_vec()),
        ("an error of 4 GiB", |r| chunk_head(0, chunk::ERROR, r.cookie, u32::MAX).to_vec()),
        ("an unknown chunk", |r| chunk_head(0, 77, r.cookie, 0).to_vec()),
        ("extents for a read", |r| chunk_head(0, chunk::BLOCK_STATUS, r.cookie, 12).to_vec()),
        ("chunks without end", |r| {
            chunk_head(0, chunk::ERROR, r.cookie, 6)
                .iter()
                .copied()
                .chain([0, 0, 0, 5, 0, 0])
                .collect::<Vec<_>>()
                .repeat(100)
        }),
        ("a hole beyond the range", |r| {
            let mut out = chunk_head(chunk::DONE, chunk::OFFSET_HOLE, r.cookie, 12).to_vec();
            out.extend(8192u64.to_be_bytes());
            out.extend(u32::MAX.to_be_bytes());
            out
        }),
    ];
    for (what, reply) in lies {
        assert_eq!(read_from(*reply), Err(IoErrorKind::Unreachable), "{what}");
    }
}

#[test]
fn errors_of_chunks_are_the_servers_own() {
    let error = |code: u32| {
        read_from(move |r| {
            let mut out = chunk_head(chunk::DONE, chunk::ERROR, r.cookie, 9).to_vec();
            out.extend(code.to_be_bytes());
            out.extend([0, 3, b'n', b'o', b'\n']);
            out
        })
    };
    assert_eq!(error(5), Err(IoErrorKind::Medium));
    assert_eq!(error(95), Err(IoErrorKind::Unsupported));
    assert_eq!(error(0), Err(IoErrorKind::Medium));
    // A server that says that it goes is one that has gone.
    assert_eq!(error(108), Err(IoErrorKind::Unreachable));
}

#[test]
fn replies_of_random_bytes_do_no_harm() {
    for seed in 0..20 * scale() {
        let read = read_from(move |r| {
            let mut rng = Rng::new(seed ^ r.cookie);
            let mut reply = data(8192, 4096, r.cookie, chunk::DONE);
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(28) as usize;
                reply[at] ^= 1 << rng.below(8);
            }
            reply
        });
        assert!(!matches!(&read, Ok(bytes) if *bytes != [7; 4096]), "seed {seed}");
    }
}

/// What opening says of a server that answers so.
fn opening(how: impl Fn(UnixStream) -> std::io::Result<()> + Send + Sync + 'static) -> OpenErrorKind {
    let dir = tempfile::tempdir().unwrap();
    let uri = serve(&dir, how);
    let began = Instant::now();
    let e = sys::run(async move |io| try_attach(&io, &uri, false).await.unwrap_err());
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert!(!e.to_string().contains('\n'), "{e}");
    e.what
}

/// Answers to an option: which one, the kind, the data.
type Said = Vec<(u32, u32, Vec<u8>)>;

/// Reads an option, and answers it with those.
fn option_then(client: &mut UnixStream, answers: &[(u32, u32, Vec<u8>)]) -> std::io::Result<()> {
    let mut head = [0; 16];
    client.read_exact(&mut head)?;
    let (_, len) = handshake::parse_option_head(&head).unwrap();
    client.read_exact(&mut vec![0; len as usize])?;
    answers
        .iter()
        .try_for_each(|(number, kind, data)| client.write_all(&handshake::answer(*number, *kind, data)))
}

#[test]
fn handshakes_that_cannot_be_end_in_words() {
    use OpenErrorKind::*;
    assert_eq!(opening(|_| Ok(())), Unreachable);
    assert_eq!(opening(|mut c| c.write_all(b"220 mail.example.com ESMTP\r\n")), Unreachable);
    assert_eq!(
        opening(|mut c| c
            .write_all(&[&b"NBDMAGIC"[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 200]].concat())),
        Unreachable
    );
    let no_fixed = opening(|mut c| {
        c.write_all(&handshake::greeting(0))?;
        c.read_exact(&mut [0; 100])
    });
    assert!(matches!(no_fixed, ServerRefuses(_)));
    let answered = |answers: fn() -> Said| {
        opening(move |mut c| {
            c.write_all(&handshake::greeting(3))?;
            c.read_exact(&mut [0; 4])?;
            option_then(&mut c, &[(option::STRUCTURED_REPLY, answer::ERR_UNSUP, vec![])])?;
            option_then(&mut c, &answers())?;
            c.read_exact(&mut [0; 100])
        })
    };
    let words = answered(|| vec![(option::GO, answer::ERR_POLICY, b"not\nyou".to_vec())]);
    assert!(matches!(&words, ServerRefuses(why) if why.contains("not you")), "{words:?}");
    let tls = answered(|| vec![(option::GO, answer::ERR_TLS_REQD, vec![])]);
    assert!(matches!(&tls, ServerRefuses(why) if why.contains("TLS")), "{tls:?}");
    for lie in [
        || vec![(option::GO, answer::ACK, vec![])],
        || vec![(option::INFO, answer::ACK, vec![])],
        || vec![(option::GO, answer::INFO, Export { size: u64::MAX, flags: 1 }.to_info())],
        || vec![(option::GO, answer::INFO, vec![0])],
        || vec![(option::GO, answer::INFO, BlockSizes { minimum: 3, preferred: 5, maximum: 0 }.to_info())],
        || vec![(option::GO, answer::INFO, vec![0, 9]); 1000],
        || vec![(option::GO, answer::INFO, vec![0; 70_000])],
    ] {
        assert_eq!(answered(lie), Unreachable);
    }
    // An export whose size is no multiple of its blocks.
    let odd = opening(|mut c| {
        let sizes = BlockSizes { minimum: 65536, preferred: 65536, maximum: 65536 };
        shake_hands(&mut c, Export { size: (1 << 20) + 512, ..good() }, sizes)?;
        c.read_exact(&mut [0; 1])
    });
    assert!(matches!(odd, ServerRefuses(_)), "{odd:?}");
}
