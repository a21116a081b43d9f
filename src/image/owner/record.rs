//! The file that says whose an image on shared storage is: `IMAGE.owner`, beside the image.
//!
//! Numbers are big-endian. Two copies of the record, each with a CRC: that of an even generation at 0, that of an odd one at 4096. The valid copy with the
//! higher generation counts, so a write that tears leaves the one before. Offsets in bytes within a copy:
//!
//! | at | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | magic `TCMUOWNR` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | state: 0 released, 1 held, 2 being taken over |
//! | 16 | 8 | generation: one more with every change of the record |
//! | 24 | 16 | UUID of the holder, another each time that the image is taken |
//! | 40 | 16 | the holder's host: its machine id |
//! | 56 | 64 | the host's name, UTF-8, filled up with zeros |
//! | 120 | 8 | when it was written, seconds since 1970, for people |
//! | 128 | 4 | the holder's lease in milliseconds: it begins no I/O that much later than it began its last look at the record |
//! | 132 | 376 | reserved, 0 |
//! | 508 | 4 | CRC-32C of bytes 0–507 |
//!
//! At 8192 the holder says that it lives: its UUID (16 bytes) and a number that grows with every look (8 bytes). Nobody's right depends on that.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crc_fast::{CrcAlgorithm, checksum};
use uuid::Uuid;

use super::OwnerError;
use crate::sys::ofd::{self, OfdLock};

const MAGIC: [u8; 8] = *b"TCMUOWNR";
const VERSION: u32 = 1;
const LEN: usize = 512;
const COPIES: [u64; 2] = [0, 4096];
const PULSE: u64 = 8192;
/// Bytes of the file.
const FILE_LEN: u64 = 12288;

/// How long one who looks waits for another who is writing.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// What the holder is doing with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerState {
    /// Nothing: it has closed the image.
    Released,
    /// It uses it.
    Held,
    /// It waits until an earlier holder can have begun its last I/O.
    TakingOver,
}

/// A host, as the record names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostId {
    /// Its machine id (machine-id(5)).
    pub id: [u8; 16],
    /// Its name, for people.
    pub name: String,
}

impl HostId {
    /// This host. Where it has no machine id, one that lasts until it is booted again.
    ///
    /// # Errors
    /// If it has neither.
    pub fn this() -> io::Result<HostId> {
        let hex = |path: &str| {
            let text = std::fs::read_to_string(path)?;
            Uuid::try_parse(text.trim()).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
        };
        let id = hex("/etc/machine-id").or_else(|_| hex("/proc/sys/kernel/random/boot_id"))?;
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
        Ok(HostId { id: *id.as_bytes(), name: name.trim().to_owned() })
    }
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What the holder does.
    pub state: OwnerState,
    /// Grows with every change.
    pub generation: u64,
    /// The holder, each time another.
    pub holder: Uuid,
    /// Its host.
    pub host: HostId,
    /// When it was written, seconds since 1970.
    pub written: u64,
    /// The holder's lease.
    pub lease: Duration,
}

fn be64(b: &[u8], at: usize) -> u64 {
    b[at..at + 8].iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn be32(b: &[u8], at: usize) -> u32 {
    be64(&[[0; 4], [b[at], b[at + 1], b[at + 2], b[at + 3]]].concat(), 0) as u32
}

fn sixteen(b: &[u8], at: usize) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&b[at..at + 16]);
    out
}

fn crc_of(b: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, &b[..508]) as u32
}

/// The longest piece of a name that fits whole.
fn cut(name: &str, len: usize) -> &str {
    let mut end = name.len().min(len);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

impl Record {
    fn to_bytes(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
        let state: u32 = match self.state {
            OwnerState::Released => 0,
            OwnerState::Held => 1,
            OwnerState::TakingOver => 2,
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_be_bytes());
        put(12, &state.to_be_bytes());
        put(16, &self.generation.to_be_bytes());
        put(24, self.holder.as_bytes());
        put(40, &self.host.id);
        put(56, cut(&self.host.name, 64).as_bytes());
        put(120, &self.written.to_be_bytes());
        put(128, &u32::try_from(self.lease.as_millis()).unwrap_or(u32::MAX).to_be_bytes());
        let crc = crc_of(&b);
        b[508..].copy_from_slice(&crc.to_be_bytes());
        b
    }

    /// One copy: nothing, if it is torn or was never written.
    fn from_bytes(b: &[u8; LEN]) -> Result<Option<Record>, OwnerError> {
        if b[..8] != MAGIC || be32(b, 508) != crc_of(b) {
            return Ok(None);
        }
        if be32(b, 8) != VERSION {
            return Err(OwnerError::Version(be32(b, 8)));
        }
        let state = match be32(b, 12) {
            0 => OwnerState::Released,
            1 => OwnerState::Held,
            2 => OwnerState::TakingOver,
            _ => return Ok(None),
        };
        let name = b[56..120].split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(Some(Record {
            state,
            generation: be64(b, 16),
            holder: Uuid::from_bytes(sixteen(b, 24)),
            host: HostId { id: sixteen(b, 40), name: String::from_utf8_lossy(name).into_owned() },
            written: be64(b, 120),
            lease: Duration::from_millis(u64::from(be32(b, 128))),
        }))
    }
}

/// The file of an image.
pub fn path_of(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(".owner");
    PathBuf::from(name)
}

/// The file, open; who has it locked for writing is alone with it.
#[derive(Debug)]
pub(super) struct OwnerFile {
    file: File,
}

/// A lock on it, as long as it lives. Taking it also has NFS look at the server's bytes instead of remembered ones.
pub(super) struct Locked<'a>(&'a File);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        // Unlocking what one holds fails only if the kernel is out of memory; closing the file unlocks it then.
        let _ = ofd::set(self.0, OfdLock::Unlock, 0, 1);
    }
}

impl OwnerFile {
    /// Opens it, if it is there.
    pub(super) fn open(image: &Path) -> Result<Option<OwnerFile>, OwnerError> {
        match OpenOptions::new().read(true).write(true).open(path_of(image)) {
            Ok(file) => Ok(Some(OwnerFile { file })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(OwnerError::Io(e)),
        }
    }

    /// Makes it, with its first record. It is named only once it is whole.
    pub(super) fn create(image: &Path, first: &Record) -> Result<(), OwnerError> {
        let (path, beside) =
            (path_of(image), path_of(image).with_extension(format!("owner.{}", first.holder)));
        let made = (|| {
            let file =
                OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&beside)?;
            file.set_len(FILE_LEN)?;
            let new = OwnerFile { file };
            new.write_record(first)?;
            // A link, and no renaming: it replaces nothing.
            std::fs::hard_link(&beside, &path)?;
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(dir)?.sync_all()
        })();
        // Its second name, whatever came of the first.
        let _ = std::fs::remove_file(&beside);
        made.map_err(OwnerError::Io)
    }

    /// Locks it, alone or together with others who look.
    pub(super) fn lock(&self, alone: bool) -> Result<Locked<'_>, OwnerError> {
        let kind = if alone { OfdLock::Exclusive } else { OfdLock::Shared };
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            match ofd::set(&self.file, kind, 0, 1) {
                Ok(()) => return Ok(Locked(&self.file)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => {
                    std::thread::sleep(LOCK_LOOK);
                }
                Err(e) => return Err(OwnerError::Io(e)),
            }
        }
    }

    /// The record that counts.
    pub(super) fn record(&self) -> Result<Record, OwnerError> {
        let mut found: Option<Record> = None;
        for at in COPIES {
            let mut bytes = [0; LEN];
            self.file.read_exact_at(&mut bytes, at).map_err(OwnerError::Io)?;
            let copy = Record::from_bytes(&bytes)?;
            let newer = |r: &Record| found.as_ref().is_none_or(|f| r.generation > f.generation);
            if let Some(record) = copy.filter(newer) {
                found = Some(record);
            }
        }
        found.ok_or(OwnerError::Damaged)
    }

    /// Writes one, and makes it durable.
    pub(super) fn write_record(&self, record: &Record) -> io::Result<()> {
        self.file.write_all_at(&record.to_bytes(), COPIES[(record.generation % 2) as usize])?;
        self.file.sync_all()
    }

    /// What the holder said of itself last.
    pub(super) fn pulse(&self) -> io::Result<[u8; 24]> {
        let mut bytes = [0; 24];
        self.file.read_exact_at(&mut bytes, PULSE)?;
        Ok(bytes)
    }

    /// Says that the holder lives.
    pub(super) fn write_pulse(&self, holder: Uuid, count: u64) -> io::Result<()> {
        let bytes = [holder.as_bytes().as_slice(), &count.to_be_bytes()].concat();
        self.file.write_all_at(&bytes, PULSE)?;
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64) -> Record {
        Record {
            state: OwnerState::Held,
            generation,
            holder: Uuid::from_u128(7),
            host: HostId { id: [3; 16], name: "host-é".into() },
            written: 99,
            lease: Duration::from_millis(1500),
        }
    }

    #[test]
    fn a_record_survives_the_round_trip_and_any_flipped_bit_is_seen() {
        for state in [OwnerState::Released, OwnerState::Held, OwnerState::TakingOver] {
            let record = Record { state, ..record(5) };
            assert_eq!(Record::from_bytes(&record.to_bytes()).unwrap(), Some(record));
        }
        for bit in 0..LEN * 8 {
            let mut bytes = record(5).to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::from_bytes(&bytes).unwrap(), None, "bit {bit}");
        }
        let mut newer = record(5).to_bytes();
        newer[11] = 2;
        let crc = crc_of(&newer);
        newer[508..].copy_from_slice(&crc.to_be_bytes());
        assert!(matches!(Record::from_bytes(&newer), Err(OwnerError::Version(2))));
        let long = "é".repeat(40);
        assert_eq!(cut(&long, 63).len(), 62);
    }

    #[test]
    fn a_write_that_tears_leaves_the_record_before() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        OwnerFile::create(&image, &record(1)).unwrap();
        assert!(OwnerFile::create(&image, &record(9)).is_err(), "one that is there stays");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let file = OwnerFile::open(&image).unwrap().unwrap();
        for generation in 2..6 {
            file.write_record(&record(generation)).unwrap();
            assert_eq!(file.record().unwrap(), record(generation));
            let at = COPIES[(generation % 2) as usize];
            file.file.write_all_at(&[0xee; 100], at + 200).unwrap();
            assert_eq!(file.record().unwrap().generation, generation - 1);
            file.write_record(&record(generation)).unwrap();
        }
        file.file.write_all_at(&[0xee; 8192], 0).unwrap();
        assert!(matches!(file.record(), Err(OwnerError::Damaged)));
    }
}
