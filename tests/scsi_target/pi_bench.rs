//! A target over the real thing, a protected raw image in a temporary directory, with buffers cut anywhere.

use std::{cell::RefCell, path::PathBuf, rc::Rc};

use tcmu_dif::{
    image::{
        Image,
        create::create_raw,
        open::{OpenOptions, open},
    },
    pi::{
        Exposure, PiType, Protected, Protection, Recheck, Transfer, Tuple,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    scsi::{Command, Target, TargetConfig},
    sys::{
        io::Io,
        mem::{Buffer, Sg},
    },
    units::{BlockSize, Blocks},
    volume::Volume,
};

use super::memory::{Answer, answer};

/// Blocks of the medium.
pub const BLOCKS: u64 = 256;

/// Pseudo-random numbers (PCG by O'Neill, the 32-bit output of a 64-bit state).
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = (((self.0 >> 18) ^ self.0) >> 27) as u32;
        u64::from(x.rotate_right((self.0 >> 59) as u32))
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub struct Pi {
    dir: tempfile::TempDir,
    io: Io,
    pub target: Rc<Target<Rc<Protected<Image>>>>,
    pub volume: Rc<Protected<Image>>,
    pub size: BlockSize,
    pub transfer: Transfer,
    pub dice: RefCell<Dice>,
}

/// What a command gave: its answer, and the tuples that came with the data.
pub struct Got {
    pub answer: Answer,
    pub data: Vec<u8>,
    pub tuples: Vec<u8>,
}

fn path(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join("vm1.raw")
}

impl Pi {
    pub async fn new(io: &Io, kind: PiType, size: BlockSize, transfer: Transfer) -> Pi {
        Pi::beside(io, kind, size, (transfer, Exposure::Initiator), |_| {}).await
    }

    /// One of several, with what else its configuration says.
    pub async fn beside(
        io: &Io,
        kind: PiType,
        size: BlockSize,
        seen: (Transfer, Exposure),
        configure: impl FnOnce(&mut TargetConfig),
    ) -> Pi {
        let dir = tempfile::tempdir().unwrap();
        create_raw(io, &path(&dir), BLOCKS * size.bytes()).await.unwrap();
        let new = NewSidecar {
            mode: tcmu_dif::pi::PiMode::Bitmap,
            block_size: size,
            kind,
            capacity: Blocks(BLOCKS),
            format: ImageFormat::Raw,
            stamp: Stamp::of(&path(&dir)).unwrap(),
        };
        tools::create(io, &path(&dir), &default_path(&path(&dir)), new).await.unwrap();
        Pi::open(io, dir, kind, size, seen, configure).await
    }

    async fn open(
        io: &Io,
        dir: tempfile::TempDir,
        kind: PiType,
        size: BlockSize,
        (transfer, exposure): (Transfer, Exposure),
        configure: impl FnOnce(&mut TargetConfig),
    ) -> Pi {
        let options = OpenOptions::default();
        let image = open(io, &path(&dir), &options).await.unwrap();
        let stamp = image.stamp().unwrap();
        let how = Protection {
            mode: None,
            image: path(&dir),
            sidecar: default_path(&path(&dir)),
            kind,
            exposure,
            block_size: size,
            read_only: false,
            found: Stamp { size: stamp.size, mtime: stamp.mtime },
            recheck: Recheck::First,
        };
        let volume = Rc::new(Protected::open(io, image, &how).await.unwrap());
        let mut config = TargetConfig::new(size, "serial-1");
        config.power_on = false;
        config.transfer = (exposure == Exposure::Initiator).then_some(transfer);
        configure(&mut config);
        let target = Rc::new(Target::new(config, volume.clone()));
        let dice = RefCell::new(Dice(1));
        Pi { dir, io: io.clone(), target, volume, size, transfer, dice }
    }

    /// Closes the image and opens it again, with the type that the configuration names.
    pub async fn reopen(self, kind: PiType) -> Pi {
        self.volume.close().await.unwrap();
        let Pi { dir, io, target, volume, size, transfer, .. } = self;
        drop((target, volume));
        Pi::open(&io, dir, kind, size, (transfer, Exposure::Initiator), |_| {}).await
    }

    pub fn image(&self) -> PathBuf {
        path(&self.dir)
    }

    /// A scatter list of those bytes, cut at random places.
    pub fn scatter(&self, bytes: &[u8]) -> Sg {
        let mut dice = self.dice.borrow_mut();
        let mut sg = Sg::new();
        let mut at = 0;
        while at < bytes.len() {
            let longest = [5, 100, 700, 5000][dice.below(4) as usize];
            let n = (1 + dice.below(longest) as usize).min(bytes.len() - at);
            sg.append(&Buffer::from_slice(&bytes[at..at + n]).sg());
            at += n;
        }
        sg
    }

    pub async fn execute(&self, cdb: &[u8], data: &Sg, dif: &Sg) -> Answer {
        let command = Command { cdb, data, dif, once: None };
        // Boxed, since a test holds many of these futures.
        answer(Box::pin(self.target.execute(&command)).await, data)
    }

    /// A command without data, or with plain data-out.
    pub async fn plain(&self, cdb: &[u8], out: &[u8]) -> Answer {
        self.execute(cdb, &self.scatter(out), &Sg::new()).await
    }

    /// The unit attention that is pending, if any: key, code and qualifier.
    pub async fn attention(&self) -> (u8, u8, u8) {
        self.plain(&[0, 0, 0, 0, 0, 0], &[]).await.sense
    }

    /// A command with data-in that has no tuples.
    pub async fn get(&self, cdb: &[u8], room: usize) -> Answer {
        self.execute(cdb, &self.scatter(&vec![0xee; room]), &Sg::new()).await
    }

    /// Sends blocks with their tuples, as the transfer has them; without tuples if there are none.
    pub async fn send(&self, cdb: &[u8], data: &[u8], tuples: &[u8]) -> Answer {
        if tuples.is_empty() {
            return self.plain(cdb, data).await;
        }
        match self.transfer {
            Transfer::Separate => self.execute(cdb, &self.scatter(data), &self.scatter(tuples)).await,
            Transfer::Interleaved => {
                let size = self.size.bytes() as usize;
                let both = data.chunks(size).zip(tuples.chunks(8)).flat_map(|(d, t)| [d, t].concat());
                self.plain(cdb, &both.collect::<Vec<_>>()).await
            }
        }
    }

    /// Gets blocks, with their tuples if they travel.
    pub async fn receive(&self, cdb: &[u8], blocks: u64, travel: bool) -> Got {
        let size = self.size.bytes() as usize;
        let room = |n: usize| self.scatter(&vec![0xee; n]);
        let (n, tuples) = (blocks as usize, blocks as usize * 8);
        if travel && self.transfer == Transfer::Interleaved {
            let answer = self.execute(cdb, &room(n * (size + 8)), &Sg::new()).await;
            let part = |r: fn(&[u8], usize) -> &[u8]| {
                answer.data.chunks(size + 8).flat_map(|b| r(b, size).to_vec()).collect::<Vec<u8>>()
            };
            let (data, tuples) = (part(|b, n| &b[..n]), part(|b, n| &b[n..]));
            return Got { data, tuples, answer };
        }
        let dif = room(if travel { tuples } else { 0 });
        let answer = self.execute(cdb, &room(n * size), &dif).await;
        Got { data: answer.data.clone(), tuples: dif.to_vec(), answer }
    }

    /// What the medium holds, looked at past the target.
    pub async fn medium(&self, lba: u64, blocks: u64) -> (Vec<u8>, Vec<u8>) {
        let bytes = self.size.bytes();
        let buffer = Buffer::zeroed((blocks * bytes) as usize);
        let at = tcmu_dif::units::ByteOffset(lba * bytes);
        let tuples = self.volume.read_with_tuples(at, &buffer.sg(), &Default::default()).await.unwrap();
        (buffer.to_vec(), tuples)
    }
}

/// The guard, by a crate that the program does not use.
pub fn guard(block: &[u8]) -> u16 {
    crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF).checksum(block)
}

/// Tuples for blocks: their guards, that application tag, and reference tags that count up.
pub fn tuples_for(data: &[u8], size: BlockSize, app: u16, first: u32) -> Vec<u8> {
    let blocks = data.chunks(size.bytes() as usize).enumerate();
    blocks
        .flat_map(|(i, b)| Tuple { guard: guard(b), app, reference: first.wrapping_add(i as u32) }.to_bytes())
        .collect()
}

/// A 32-byte CDB.
pub fn long(action: u8, flags: u8, lba: u64, blocks: u64, expected: (u32, u16, u16)) -> Vec<u8> {
    let mut c = vec![0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, action, flags, 0];
    c.extend(lba.to_be_bytes());
    c.extend(expected.0.to_be_bytes());
    c.extend(expected.1.to_be_bytes());
    c.extend(expected.2.to_be_bytes());
    c.extend((blocks as u32).to_be_bytes());
    c
}
