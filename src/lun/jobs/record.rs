//! What a job keeps outside the process: what it was told, and which granules it has still to copy, so that it goes on after a restart
//! or `kill -9` where it was.
//!
//! The bits are a mapped file. They outlive the process at whatever instruction it dies, and not the machine: after a reboot, unless the
//! daemon had closed the target, what the disk has of them and of the target is anybody's guess, and all is copied again.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{
    job::{
        dirty::{DirtyMap, Kept, kept_bytes},
        mirror::Settings,
    },
    lun::{config::DeviceConfig, state_file::StateFile},
    sys::mem::Mapping,
};

/// The folder of these files.
pub const FOLDER: &str = "jobs";

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A target that was closed: neither it nor the bits depend on the kernel's memory.
const CLOSED: &str = "closed";

/// A file that was made for a job, and goes with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::lun) struct Scratch {
    path: PathBuf,
    /// Which file that is: another of its name is somebody else's, and may have got its inode.
    inode: u64,
    /// When it was made, where the file system says so.
    born: Option<Duration>,
}

impl Scratch {
    /// A file that is there.
    pub(in crate::lun) fn of(path: &Path) -> io::Result<Scratch> {
        let found = path.symlink_metadata()?;
        let born = found.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Ok(Scratch { path: path.to_owned(), inode: found.ino(), born })
    }

    /// Whether it is gone; one that another stands in the place of is not.
    fn remove(&self) -> io::Result<bool> {
        match Scratch::of(&self.path) {
            Ok(found) if found == *self => fs::remove_file(&self.path).map(|()| true),
            Ok(_) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(e) => Err(e),
        }
    }
}

/// A mirror as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::lun) struct Record {
    pub(in crate::lun) id: String,
    /// The image that it copies.
    pub(in crate::lun) source: PathBuf,
    /// The target, as a LUN's configuration.
    pub(in crate::lun) target: String,
    /// The image in the chain that is committed, if that is not the LUN's own.
    #[serde(default)]
    pub(in crate::lun) top: Option<PathBuf>,
    /// The image in the chain that stays beneath, of a job that has one.
    #[serde(default)]
    pub(in crate::lun) base: Option<PathBuf>,
    pub(in crate::lun) granularity: u64,
    #[serde(flatten)]
    pub(in crate::lun) settings: Settings,
    /// The target read as zeros when it began.
    pub(in crate::lun) fresh: bool,
    /// All that there is to copy is marked.
    pub(in crate::lun) scanned: bool,
    /// Bytes copied.
    pub(in crate::lun) copied: u64,
    /// For which boot of the host the bits hold.
    trust: Option<String>,
    /// What goes with the job, whatever becomes of it.
    #[serde(default)]
    pub(in crate::lun) scratch: Vec<Scratch>,
}

impl Record {
    pub(in crate::lun) fn new(
        id: String,
        source: &Path,
        target: &DeviceConfig,
        granularity: u64,
        settings: Settings,
        fresh: bool,
    ) -> Record {
        Record {
            id,
            source: source.to_owned(),
            target: target.to_string(),
            top: None,
            base: None,
            granularity,
            settings,
            fresh,
            scanned: false,
            copied: 0,
            trust: boot(),
            scratch: Vec::new(),
        }
    }

    /// The job is over: what was made to go with it goes.
    pub(in crate::lun) fn remove_scratch(&self) {
        for scratch in &self.scratch {
            let path = scratch.path.display();
            match scratch.remove() {
                Ok(true) => info!(job = self.id, %path, "the job's scratch file is removed"),
                Ok(false) => {
                    warn!(job = self.id, %path, "another file has the name of the job's scratch file: it stays")
                }
                Err(error) => {
                    warn!(job = self.id, %path, %error, "the scratch file of a job that is over cannot be removed: remove it");
                }
            }
        }
    }
}

fn boot() -> Option<String> {
    fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned())
}

/// Where the job of a LUN is kept; nowhere if the LUN keeps nothing.
#[derive(Debug, Clone)]
pub(in crate::lun) struct Place(Option<StateFile>);

impl Place {
    pub(in crate::lun) fn new(file: Option<StateFile>) -> Place {
        Place(file)
    }

    fn bits(file: &StateFile) -> PathBuf {
        file.path().with_extension("dirty")
    }

    /// The job that was under way, if one was.
    pub(in crate::lun) fn load(&self) -> io::Result<Option<Record>> {
        self.0.as_ref().map_or(Ok(None), StateFile::load)
    }

    pub(in crate::lun) fn save(&self, record: &Record) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |file| file.save(record, true))
    }

    /// There is no job any more.
    pub(in crate::lun) fn remove(&self) {
        let Some(file) = &self.0 else { return };
        let removed = file.remove().and_then(|()| match fs::remove_file(Place::bits(file)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        });
        if let Err(error) = removed {
            warn!(path = %file.path().display(), %error, "the record of a job that is over stays");
        }
    }

    /// All clean, kept anew.
    pub(in crate::lun) fn begin(&self, capacity: u64, granularity: u64) -> io::Result<DirtyMap> {
        let Some(file) = &self.0 else {
            return Ok(DirtyMap::new(capacity, granularity, Kept::memory(capacity, granularity)));
        };
        let path = Place::bits(file);
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        let bits = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        let len = kept_bytes(capacity, granularity);
        // With its space, so that a store never finds the disk full.
        match rustix::fs::fallocate(&bits, rustix::fs::FallocateFlags::empty(), 0, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => bits.set_len(len)?,
            done => done?,
        }
        Ok(DirtyMap::new(capacity, granularity, Kept::File(Mapping::new(&bits, len as usize)?)))
    }

    /// The bits of a job that goes on, and whether they can be believed; otherwise all is dirty.
    pub(in crate::lun) fn go_on(&self, record: &mut Record, capacity: u64) -> io::Result<(DirtyMap, bool)> {
        let now = boot();
        let trusted = record.trust.as_deref().is_some_and(|t| t == CLOSED || Some(t) == now.as_deref());
        let there = self.0.as_ref().and_then(|file| self.map(file, capacity, record.granularity));
        let known = record.scanned && trusted;
        let map = match there.filter(|_| known) {
            Some(kept) => (DirtyMap::load(capacity, record.granularity, kept), true),
            None => {
                // A process that dies between the next lines leaves bits of which none is set, and nobody may believe those.
                record.scanned = false;
                self.save(record)?;
                let map = self.begin(capacity, record.granularity)?;
                map.set(0, capacity);
                (map, false)
            }
        };
        // Nobody reads the record as it was: from now on the bits change.
        record.trust = now;
        record.scanned = true;
        self.save(record)?;
        Ok(map)
    }

    fn map(&self, file: &StateFile, capacity: u64, granularity: u64) -> Option<Kept> {
        let bits = File::options().read(true).write(true).open(Place::bits(file)).ok()?;
        let len = kept_bytes(capacity, granularity);
        if bits.metadata().ok()?.len() != len {
            return None;
        }
        Some(Kept::File(Mapping::new(&bits, len as usize).ok()?))
    }

    /// The LUN stops, and the target is closed: what is kept now outlives the machine.
    pub(in crate::lun) fn closed(&self, record: &mut Record) -> io::Result<()> {
        let Some(file) = &self.0 else { return Ok(()) };
        File::open(Place::bits(file))?.sync_all()?;
        record.trust = Some(CLOSED.to_owned());
        self.save(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let target = DeviceConfig::new("/b");
        Record::new("vm1".into(), Path::new("/a"), &target, 4096, Settings::default(), true)
    }

    #[test]
    fn a_scratch_file_goes_with_its_job_and_another_of_its_name_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs, gone) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        [&ours, &theirs, &gone].iter().for_each(|path| fs::write(path, "").unwrap());
        let scratch = [&ours, &theirs, &gone].map(|path| Scratch::of(path).unwrap());
        // The inode is not free as long as it is open.
        let _held = File::open(&theirs).unwrap();
        fs::remove_file(&theirs).unwrap();
        fs::write(&theirs, "another's").unwrap();
        fs::remove_file(&gone).unwrap();
        let record = Record { scratch: scratch.to_vec(), ..record() };
        record.remove_scratch();
        assert!(!ours.exists() && fs::read(&theirs).unwrap() == b"another's");
        let kept = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&kept).unwrap().scratch, record.scratch);
    }

    #[test]
    fn bits_are_believed_within_one_boot_and_after_a_clean_close_and_otherwise_all_is_dirty() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(Some(StateFile::new(dir.path(), FOLDER, "vm1")));
        let map = place.begin(1 << 20, 4096).unwrap();
        map.set(8192, 1);
        // Not all is marked yet.
        let mut unscanned = record();
        let (all, known) = place.go_on(&mut unscanned, 1 << 20).unwrap();
        assert!(!known && all.left() == 1 << 20);

        let map = place.begin(1 << 20, 4096).unwrap();
        map.set(8192, 1);
        drop(map);
        let mut same_boot = Record { scanned: true, ..record() };
        let (some, known) = place.go_on(&mut same_boot, 1 << 20).unwrap();
        assert!(known && some.left() == 4096 && !some.is_clean(8192, 1));
        place.closed(&mut same_boot).unwrap();
        let mut loaded = place.load().unwrap().unwrap();
        assert_eq!(loaded.trust.as_deref(), Some(CLOSED));
        assert_eq!(place.go_on(&mut loaded, 1 << 20).unwrap().0.left(), 4096);
        // It goes on: the record does not say "closed" any more.
        assert_eq!(place.load().unwrap().unwrap().trust, boot());

        let mut other_boot = Record { scanned: true, trust: Some("another".into()), ..record() };
        assert_eq!(place.go_on(&mut other_boot, 1 << 20).unwrap().0.left(), 1 << 20);
        // A file of another size is another volume's.
        let mut larger = Record { scanned: true, ..record() };
        assert_eq!(place.go_on(&mut larger, 1 << 30).unwrap().0.left(), 1 << 30);
        place.remove();
        assert!(place.load().unwrap().is_none());
        assert_eq!(fs::read_dir(dir.path().join(FOLDER)).unwrap().count(), 0);
    }
}
