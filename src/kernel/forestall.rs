//! Keeps the kernel from asking about new devices of ours where another daemon (tcmu-runner) would answer.
//!
//! The kernel takes the first answer that anybody gives for a new device, and tcmu-runner says at once that it has no handler for ours, so that
//! the device is refused. But it asks only when a device is enabled, and whoever makes one (rtslib, a script) makes its directory, writes its
//! configuration, and enables it after that. So each directory is set not to be asked about as soon as it is seen, and one that turns out not to be ours is set
//! back. It is a race with who makes the device, and nothing is worse where it is lost. [`Forestall::look`] is the whole of it; [`Watch`] says when to look.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};

use super::{backstore::CORE, tree::Tree};

/// What a device has from the beginning: what the kernel's daemons announced.
const ASKED_IF_ANNOUNCED: &str = "0";
/// Nobody is asked.
const NOT_ASKED: &str = "-1";

/// What is known of the devices that there are.
#[derive(Debug)]
pub struct Forestall {
    subtype: String,
    seen: BTreeSet<PathBuf>,
    /// Set not to be asked about, and without a configuration yet.
    undecided: Vec<PathBuf>,
}

impl Forestall {
    /// Nothing is known yet; ours are the devices of that subtype.
    pub fn new(subtype: &str) -> Forestall {
        Forestall { subtype: subtype.to_owned(), seen: BTreeSet::new(), undecided: Vec::new() }
    }

    /// Looks at what there is; gives whether a device is there of which nobody can tell yet whose it will be, and so whether to look again soon. Devices that are
    /// enabled, or have been configured, are let alone.
    pub fn look(&mut self, tree: &dyn Tree) -> bool {
        let core = Path::new(CORE);
        let mut there = BTreeSet::new();
        for hba in tree.dirs(core).unwrap_or_default() {
            if hba.starts_with("user_") {
                let hba = core.join(hba);
                let devices = tree.dirs(&hba).unwrap_or_default();
                there.extend(devices.into_iter().map(|device| hba.join(device)));
            }
        }
        for new in there.difference(&self.seen) {
            // The attribute of one that is gone again is gone too.
            if config(tree, new).is_some_and(|c| c.is_empty()) && set(tree, new, NOT_ASKED).is_ok() {
                self.undecided.push(new.clone());
            }
        }
        self.undecided.retain(|device| match config(tree, device) {
            Some(config) if config.is_empty() => true,
            Some(config) => {
                let ours = config.split('/').next() == Some(self.subtype.as_str());
                // What its maker has said in words of his own stays.
                let as_we_left_it = || tree.read(&answers(device)).is_ok_and(|value| value.trim() == NOT_ASKED);
                if !ours && as_we_left_it() && set(tree, device, ASKED_IF_ANNOUNCED).is_err() {
                    tracing::debug!(device = %device.display(), "the kernel does not ask about another handler's device");
                }
                false
            }
            None => false,
        });
        self.seen = there;
        !self.undecided.is_empty()
    }
}

fn config(tree: &dyn Tree, device: &Path) -> Option<String> {
    Some(tree.read(&device.join("attrib/dev_config")).ok()?.trim().to_owned())
}

fn answers(device: &Path) -> PathBuf {
    device.join("attrib/nl_reply_supported")
}

fn set(tree: &dyn Tree, device: &Path, value: &str) -> io::Result<()> {
    tree.write(&answers(device), value)
}

/// Waits until somebody makes a directory among the backstores. inotify tells of what is made by name, in configfs too.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
    core: PathBuf,
    /// HBAs that are watched.
    hbas: BTreeSet<OsString>,
}

impl Watch {
    /// Watches the configfs that is mounted there.
    ///
    /// # Errors
    /// The kernel's: it has no inotify left, or nothing is mounted.
    pub fn at(configfs: &Path) -> io::Result<Watch> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch =
            Watch { inotify: inotify::init(flags)?, core: configfs.join(CORE), hbas: BTreeSet::new() };
        watch.add(&watch.core)?;
        Ok(watch)
    }

    fn add(&self, directory: &Path) -> io::Result<()> {
        inotify::add_watch(
            &self.inotify,
            directory,
            inotify::WatchFlags::CREATE | inotify::WatchFlags::ONLYDIR,
        )?;
        Ok(())
    }

    /// Waits that long at most, and not at all if an HBA has come that was not watched: it may have got its device before it was.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self, at_most: Duration) -> io::Result<()> {
        let names = std::fs::read_dir(&self.core)?.flatten().map(|entry| entry.file_name());
        let there: BTreeSet<OsString> =
            names.filter(|name| name.as_encoded_bytes().starts_with(b"user_")).collect();
        let new: Vec<_> = there.difference(&self.hbas).cloned().collect();
        for hba in &new {
            // It may be gone by now.
            let _ = self.add(&self.core.join(hba));
        }
        self.hbas = there;
        if !new.is_empty() {
            return Ok(());
        }
        let timeout = Timespec::try_from(at_most).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(()),
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        // What it was is seen by looking; here it is only taken out of the queue.
        let mut buffer = [0u8; 4096];
        loop {
            match rustix::io::read(&self.inotify, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
                // Something was made among the HBAs or in one: an HBA of a known name may be another by now, and is watched anew.
                Ok(_) => self.hbas.clear(),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::Fake;

    fn asked(tree: &Fake, device: &str) -> String {
        tree.read(&answers(Path::new(device))).unwrap()
    }

    fn make(tree: &Fake, hba: &str, name: &str) -> String {
        let hba = format!("target/core/{hba}");
        if !tree.is_dir(Path::new(&hba)) {
            tree.make_dir(Path::new(&hba)).unwrap();
        }
        let device = format!("{hba}/{name}");
        tree.make_dir(Path::new(&device)).unwrap();
        device
    }

    fn configure(tree: &Fake, device: &str, config: &str) {
        tree.write(&Path::new(device).join("attrib/dev_config"), config).unwrap();
    }

    #[test]
    fn a_new_device_is_not_asked_about_and_one_that_is_not_ours_is_given_back() {
        let (tree, mut forestall) = (Fake::new(), Forestall::new("dif"));
        assert!(!forestall.look(&tree));
        let ours = make(&tree, "user_0", "vm1");
        let theirs = make(&tree, "user_1", "vm2");
        let named_alike = make(&tree, "user_2", "vm3");
        assert!(forestall.look(&tree), "nobody knows yet whose they are");
        assert_eq!([&ours, &theirs, &named_alike].map(|d| asked(&tree, d)), ["-1"; 3]);
        configure(&tree, &ours, "dif//images/vm1.raw");
        configure(&tree, &theirs, "qcow//images/vm2.qcow2");
        assert!(forestall.look(&tree));
        configure(&tree, &named_alike, "different//x");
        assert!(!forestall.look(&tree));
        assert_eq!([&ours, &theirs, &named_alike].map(|d| asked(&tree, d)), ["-1", "0", "0"]);
    }

    #[test]
    fn what_is_there_already_or_was_said_by_its_maker_stays() {
        let (tree, mut forestall) = (Fake::new(), Forestall::new("dif"));
        let old = make(&tree, "user_0", "old");
        configure(&tree, &old, "dif//images/old.raw");
        assert!(!forestall.look(&tree));
        assert_eq!(asked(&tree, &old), "0");
        let worded = make(&tree, "user_0", "worded");
        assert!(forestall.look(&tree));
        tree.write(&answers(Path::new(&worded)), "1").unwrap();
        configure(&tree, &worded, "qcow//images/x");
        assert!(!forestall.look(&tree));
        assert_eq!(asked(&tree, &worded), "1");
    }

    #[test]
    fn a_device_that_goes_before_it_is_configured_is_forgotten_and_its_name_is_new_again() {
        let (tree, mut forestall) = (Fake::new(), Forestall::new("dif"));
        let device = make(&tree, "user_0", "vm1");
        assert!(forestall.look(&tree));
        tree.remove_dir(Path::new(&device)).unwrap();
        assert!(!forestall.look(&tree));
        let device = make(&tree, "user_0", "vm1");
        assert!(forestall.look(&tree));
        assert_eq!(asked(&tree, &device), "-1");
    }

    #[test]
    fn the_watch_wakes_for_a_directory_in_an_hba_that_has_just_come_or_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let core = dir.path().join(CORE);
        std::fs::create_dir_all(&core).unwrap();
        let mut watch = Watch::at(dir.path()).unwrap();
        let (long, began) = (Duration::from_secs(60), std::time::Instant::now());
        for made in 0..50 {
            let hba = core.join("user_0");
            let device = hba.join(format!("vm{made}"));
            let (path, pause) = (device.clone(), Duration::from_micros(made * 20));
            let maker = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(2));
                std::fs::create_dir(&hba).unwrap();
                std::thread::sleep(pause);
                std::fs::create_dir(path).unwrap();
            });
            while !device.is_dir() {
                watch.wait(long).unwrap();
            }
            maker.join().unwrap();
            std::fs::remove_dir(&device).unwrap();
            std::fs::remove_dir(core.join("user_0")).unwrap();
        }
        assert!(began.elapsed() < long, "one was not noticed");
        assert!(Watch::at(Path::new("/nowhere")).is_err());
    }
}
