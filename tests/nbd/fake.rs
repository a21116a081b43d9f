//! An NBD server whose disk has a cache: what was not flushed may be gone, sector by sector, whenever it dies, and it dies now and then in
//! the middle of anything. Replies come in any order.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tcmu_dif::nbd::{
    answer, chunk, command, export,
    handshake::{self, BlockSizes, Export, OPTION_HEAD_LEN},
    option,
    reply::{chunk_head, simple},
    request::{LEN, Request},
};

use crate::support::Rng;

const SECTOR: usize = 512;

pub struct Disk {
    live: Vec<u8>,
    durable: Vec<u8>,
    rng: Rng,
}

pub struct Fake {
    pub disk: Mutex<Disk>,
    /// It dies once in so many requests; 0 for never.
    pub dies_once_in: AtomicU64,
    pub deaths: AtomicU64,
    pub flushes: AtomicU64,
    pub flags: u16,
    /// Bytes that a client is told from now on.
    pub size: AtomicU64,
    /// How long it is away.
    pub away: Duration,
    life: AtomicU64,
    stop: AtomicBool,
    socket: PathBuf,
}

impl Fake {
    pub fn start(socket: &Path, size: usize, seed: u64, flags: u16, away: Duration) -> Arc<Fake> {
        let fake = Arc::new(Fake {
            disk: Mutex::new(Disk { live: vec![0; size], durable: vec![0; size], rng: Rng::new(seed) }),
            dies_once_in: AtomicU64::new(0),
            deaths: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            flags: flags | export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_WRITE_ZEROES,
            size: AtomicU64::new(size as u64),
            away,
            life: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            socket: socket.to_owned(),
        });
        let listener = UnixListener::bind(socket).unwrap();
        let served = fake.clone();
        std::thread::spawn(move || served.listen(listener));
        fake
    }

    pub fn uri(&self, query: &str) -> PathBuf {
        PathBuf::from(format!("nbd+unix:///?socket={}{query}", self.socket.display()))
    }

    /// What a power cut now would leave.
    pub fn durable(&self) -> Vec<u8> {
        self.disk.lock().unwrap().durable.clone()
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.socket);
    }

    fn listen(self: Arc<Fake>, mut listener: UnixListener) {
        let mut clients: Vec<UnixStream> = Vec::new();
        let mut life = 0;
        loop {
            listener.set_nonblocking(true).unwrap();
            if self.stop.load(Ordering::SeqCst) {
                clients.iter().for_each(|c| drop(c.shutdown(std::net::Shutdown::Both)));
                return;
            }
            if self.life.load(Ordering::SeqCst) != life {
                // Dead: nobody answers, nobody listens, for a while.
                clients.drain(..).for_each(|c| drop(c.shutdown(std::net::Shutdown::Both)));
                drop(listener);
                std::fs::remove_file(&self.socket).unwrap();
                std::thread::sleep(self.away);
                life = self.life.load(Ordering::SeqCst);
                listener = UnixListener::bind(&self.socket).unwrap();
                continue;
            }
            match listener.accept() {
                Ok((client, _)) => {
                    client.set_nonblocking(false).unwrap();
                    clients.push(client.try_clone().unwrap());
                    let fake = self.clone();
                    std::thread::spawn(move || drop(fake.serve(client, life)));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Power is cut: of what was not flushed some is there, and some is not.
    pub fn die(&self) {
        let mut disk = self.disk.lock().unwrap();
        let Disk { live, durable, rng } = &mut *disk;
        for (live, durable) in live.chunks_mut(SECTOR).zip(durable.chunks_mut(SECTOR)) {
            if rng.one_in(2) {
                live.copy_from_slice(durable);
            } else {
                durable.copy_from_slice(live);
            }
        }
        self.deaths.fetch_add(1, Ordering::SeqCst);
        self.life.fetch_add(1, Ordering::SeqCst);
    }

    fn serve(&self, mut client: UnixStream, life: u64) -> io::Result<()> {
        shake_hands(
            &mut client,
            Export { size: self.size.load(Ordering::SeqCst), flags: self.flags },
            BlockSizes::default(),
        )?;
        let mut held: Vec<Vec<u8>> = Vec::new();
        loop {
            if held.len() > 3 || !held.is_empty() && !readable(&client) {
                let i = self.disk.lock().unwrap().rng.below(held.len() as u64) as usize;
                client.write_all(&held.swap_remove(i))?;
                continue;
            }
            let mut head = [0; LEN];
            client.read_exact(&mut head)?;
            let request = Request::parse(&head).unwrap();
            let (at, len) = (request.offset as usize, request.length as usize);
            let mut data = vec![0; if request.kind == command::WRITE { len } else { 0 }];
            client.read_exact(&mut data)?;
            let mut disk = self.disk.lock().unwrap();
            if self.life.load(Ordering::SeqCst) != life {
                return Ok(());
            }
            let once_in = self.dies_once_in.load(Ordering::SeqCst);
            let dies = once_in > 0 && disk.rng.one_in(once_in);
            let before = dies && disk.rng.one_in(2);
            if before {
                drop(disk);
                self.die();
                return Ok(());
            }
            let range = at..at + len;
            let mut out = Vec::new();
            match request.kind {
                command::READ => {
                    // In two chunks, the second half first.
                    let half = at + len / 2 / SECTOR * SECTOR;
                    for part in [half..at + len, at..half] {
                        if !part.is_empty() {
                            let bytes = &disk.live[part.clone()];
                            out.extend(chunk_head(
                                0,
                                chunk::OFFSET_DATA,
                                request.cookie,
                                8 + bytes.len() as u32,
                            ));
                            out.extend((part.start as u64).to_be_bytes());
                            out.extend(bytes);
                        }
                    }
                    out.extend(chunk_head(chunk::DONE, chunk::NONE, request.cookie, 0));
                }
                command::WRITE => disk.live[range.clone()].copy_from_slice(&data),
                command::WRITE_ZEROES => disk.live[range.clone()].fill(0),
                command::FLUSH => {
                    let Disk { live, durable, .. } = &mut *disk;
                    durable.copy_from_slice(live);
                    self.flushes.fetch_add(1, Ordering::SeqCst);
                }
                _ => return Ok(()),
            }
            if request.flags & command::FUA != 0 {
                let Disk { live, durable, .. } = &mut *disk;
                durable[range.clone()].copy_from_slice(&live[range]);
            }
            drop(disk);
            if dies {
                self.die();
                return Ok(());
            }
            if out.is_empty() {
                out.extend(simple(0, request.cookie));
            }
            held.push(out);
        }
    }
}

fn readable(client: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(client, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 300_000 })).unwrap() > 0
}

/// The server's half of the handshake, up to GO.
pub fn shake_hands(client: &mut UnixStream, told: Export, sizes: BlockSizes) -> io::Result<()> {
    client.write_all(&handshake::greeting(3))?;
    client.read_exact(&mut [0; 4])?;
    agree(client, told, sizes)
}

/// The same after the greeting.
pub fn agree(client: &mut (impl Read + Write), told: Export, sizes: BlockSizes) -> io::Result<()> {
    loop {
        let mut head = [0; OPTION_HEAD_LEN];
        client.read_exact(&mut head)?;
        let (number, len) = handshake::parse_option_head(&head).unwrap();
        let mut data = vec![0; len as usize];
        client.read_exact(&mut data)?;
        let mut say = |kind, data: &[u8]| client.write_all(&handshake::answer(number, kind, data));
        match number {
            option::STRUCTURED_REPLY => say(answer::ACK, &[])?,
            option::GO => {
                say(answer::INFO, &told.to_info())?;
                say(answer::INFO, &sizes.to_info())?;
                return say(answer::ACK, &[]);
            }
            _ => say(answer::ERR_UNSUP, b"not here")?,
        }
    }
}
