//! Who uses an export, so that `delete` can refuse and say why.

use std::{
    fmt, fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::{
    fabric::{Disk, Export, Fabric},
    tree::Tree,
};

/// One user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// The disk or a partition is mounted.
    Mount {
        /// /dev/sdX or /dev/sdX1.
        device: PathBuf,
        /// Where.
        at: String,
    },
    /// Another block device (device mapper, md) stands on it.
    Holder {
        /// The disk or partition.
        device: PathBuf,
        /// The other device.
        by: String,
    },
    /// It is swap space.
    Swap {
        /// The disk or partition.
        device: PathBuf,
    },
    /// A process has it open.
    Process {
        /// The device.
        device: PathBuf,
        /// The process.
        pid: u32,
        /// Its command.
        command: String,
    },
    /// The kernel says that somebody has claimed it, and not who.
    Claimed {
        /// The disk.
        device: PathBuf,
    },
    /// A guest has the vhost target.
    Guest {
        /// The target.
        wwn: String,
    },
    /// It is exported on a fabric that isn't ours to touch.
    Foreign {
        /// The fabric.
        fabric: String,
        /// The target.
        target: String,
    },
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            User::Mount { device, at } => write!(f, "{} is mounted on {at}", device.display()),
            User::Holder { device, by } => write!(f, "{} is held by {by}", device.display()),
            User::Swap { device } => write!(f, "{} is swap space", device.display()),
            User::Process { device, pid, command } => {
                write!(f, "{} is open in process {pid} ({command})", device.display())
            }
            User::Claimed { device } => write!(f, "{} is in use", device.display()),
            User::Guest { wwn } => write!(f, "a guest is connected to {wwn}"),
            User::Foreign { fabric, target } => write!(f, "it is exported on {fabric} as {target}"),
        }
    }
}

/// Whether a guest is connected to a vhost export: the kernel then refuses to remove the portal group with EBUSY, and
/// with ENOTEMPTY otherwise, since the LUN is still in it. Either way nothing is removed.
pub fn of_vhost(tree: &dyn Tree, export: &Export) -> Option<User> {
    let refused = tree.remove_dir(&export.tpg_path()).err()?;
    (refused.raw_os_error() == Some(libc::EBUSY)).then(|| User::Guest { wwn: export.target.clone() })
}

/// An export on a fabric that we don't make exports on.
pub fn of_foreign(export: &Export) -> Option<User> {
    match export.kind() {
        Some(Fabric::Loopback | Fabric::Vhost) => None,
        None => Some(User::Foreign { fabric: export.fabric.clone(), target: export.target.clone() }),
    }
}

/// Where to look: the kernel's, or a test's.
#[derive(Debug, Clone)]
pub struct Places {
    /// /sys.
    pub sysfs: PathBuf,
    /// /proc.
    pub proc: PathBuf,
    /// /dev.
    pub dev: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Places { sysfs: super::SYSFS.into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

impl Places {
    /// Everybody who uses a disk or one of its partitions.
    ///
    /// # Errors
    /// If nobody is found, and it cannot be seen what some process has open (without CAP_SYS_PTRACE): a guest may be writing then.
    pub fn users_of(&self, disk: &Disk) -> io::Result<Vec<User>> {
        let mut users = Vec::new();
        let mut nodes: Vec<PathBuf> = disk.sg.iter().map(|sg| self.dev.join(sg)).collect();
        if let Some(block) = &disk.block {
            let parts = self.with_partitions(block);
            nodes.extend(parts.iter().map(|p| self.dev.join(p)));
            for part in &parts {
                self.mounts_and_holders(part, &mut users);
            }
        }
        let unseen = self.processes(&nodes, &mut users);
        if let Some(block) = disk.block.as_ref().filter(|_| users.is_empty()) {
            let device = self.dev.join(block);
            let open =
                fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(&device);
            if open.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)) {
                users.push(User::Claimed { device });
            }
        }
        match unseen {
            Some(unseen) if users.is_empty() => Err(unseen),
            _ => Ok(users),
        }
    }

    fn with_partitions(&self, block: &str) -> Vec<String> {
        let mut out = vec![block.to_owned()];
        let entries = fs::read_dir(self.sysfs.join("class/block").join(block));
        for entry in entries.into_iter().flatten().flatten() {
            if entry.path().join("partition").exists() {
                out.extend(entry.file_name().into_string().ok());
            }
        }
        out
    }

    fn mounts_and_holders(&self, part: &str, users: &mut Vec<User>) {
        let class = self.sysfs.join("class/block").join(part);
        let device = self.dev.join(part);
        for holder in fs::read_dir(class.join("holders")).into_iter().flatten().flatten() {
            let by = holder.file_name().to_string_lossy().into_owned();
            users.push(User::Holder { device: device.clone(), by });
        }
        let number = fs::read_to_string(class.join("dev")).unwrap_or_default();
        let mounts = fs::read_to_string(self.proc.join("self/mountinfo")).unwrap_or_default();
        for line in mounts.lines() {
            let words: Vec<_> = line.split(' ').collect();
            if !number.is_empty() && words.get(2) == Some(&number.trim()) {
                let at = words.get(4).copied().unwrap_or("?").to_owned();
                users.push(User::Mount { device: device.clone(), at });
            }
        }
        let swaps = fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        if swaps.lines().any(|l| l.split_whitespace().next().is_some_and(|w| Path::new(w) == device)) {
            users.push(User::Swap { device });
        }
    }

    /// Adds the processes that have one of the nodes open; gives why that cannot be known, if it can't.
    fn processes(&self, nodes: &[PathBuf], users: &mut Vec<User>) -> Option<io::Error> {
        let hidden = |process: &str, e: io::Error| {
            io::Error::new(e.kind(), format!("what process {process} has open cannot be seen: {e}"))
        };
        // Process 1 is always there, unless others' processes are hidden from us (hidepid, ProtectProc).
        let first = fs::read_dir(self.proc.join("1/fd")).err();
        let mut unseen = first.map(|e| hidden("1", e));
        for process in fs::read_dir(&self.proc).into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
                continue;
            };
            let open = fs::read_dir(process.path().join("fd")).and_then(|fds| {
                for fd in fds {
                    match fd.and_then(|fd| fs::read_link(fd.path())) {
                        Ok(to) if nodes.contains(&to) => return Ok(Some(to)),
                        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(e),
                        // Closed by now.
                        _ => {}
                    }
                }
                Ok(None)
            });
            let command = || {
                let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                command.trim().to_owned()
            };
            match open {
                Ok(None) => {}
                Ok(Some(device)) => users.push(User::Process { device, pid, command: command() }),
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                    unseen.get_or_insert_with(|| hidden(&format!("{pid} ({})", command()), e));
                }
                // A process that ends under the look has nothing open.
                Err(_) => {}
            }
        }
        unseen
    }
}

/// Whether the caller may administer the kernel.
///
/// # Errors
/// PermissionDenied if it may not.
pub fn require_root() -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, "this needs root"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn mounts_holders_swap_and_processes_are_found_on_a_disk_and_its_partitions() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places {
            sysfs: dir.path().join("sys"),
            proc: dir.path().join("proc"),
            dev: dir.path().join("dev"),
        };
        let class = places.sysfs.join("class/block");
        fs::create_dir_all(class.join("sdb/sdb1")).unwrap();
        fs::create_dir_all(class.join("sdb/holders/dm-0")).unwrap();
        fs::create_dir_all(class.join("sdb1")).unwrap();
        fs::write(class.join("sdb/dev"), "8:16\n").unwrap();
        fs::write(class.join("sdb/sdb1/partition"), "1\n").unwrap();
        fs::write(class.join("sdb1/dev"), "8:17\n").unwrap();
        fs::create_dir_all(places.proc.join("self")).unwrap();
        fs::create_dir_all(places.proc.join("1/fd")).unwrap();
        fs::create_dir_all(places.proc.join("42/fd")).unwrap();
        fs::create_dir_all(&places.dev).unwrap();
        fs::write(places.dev.join("sdb"), "").unwrap();
        let disk = Disk { address: "2:0:1:0".into(), block: Some("sdb".into()), sg: Some("sg1".into()) };

        fs::remove_dir(class.join("sdb/holders/dm-0")).unwrap();
        assert_eq!(places.users_of(&disk).unwrap(), []);

        fs::create_dir(class.join("sdb/holders/dm-0")).unwrap();
        fs::write(places.proc.join("self/mountinfo"), "36 35 8:17 / /mnt rw shared:1 - ext4 /dev/sdb1 rw\n")
            .unwrap();
        let swaps = format!("Filename Type\n{} partition 1 0 -2\n", places.dev.join("sdb").display());
        fs::write(places.proc.join("swaps"), swaps).unwrap();
        fs::write(places.proc.join("42/comm"), "dd\n").unwrap();
        symlink(places.dev.join("sg1"), places.proc.join("42/fd/3")).unwrap();
        let device = |name: &str| places.dev.join(name);
        assert_eq!(
            places.users_of(&disk).unwrap(),
            [
                User::Holder { device: device("sdb"), by: "dm-0".into() },
                User::Swap { device: device("sdb") },
                User::Mount { device: device("sdb1"), at: "/mnt".into() },
                User::Process { device: device("sg1"), pid: 42, command: "dd".into() },
            ]
        );
    }

    #[test]
    fn a_disk_is_not_taken_for_unused_where_processes_are_hidden() {
        let dir = tempfile::tempdir().unwrap();
        let places =
            Places { sysfs: dir.path().into(), proc: dir.path().join("proc"), dev: dir.path().into() };
        fs::create_dir_all(places.proc.join("42/fd")).unwrap();
        let disk = Disk { address: "2:0:1:0".into(), block: Some("sdb".into()), sg: None };
        let refused = places.users_of(&disk).unwrap_err().to_string();
        assert!(refused.starts_with("what process 1 has open cannot be seen: "), "{refused}");
        // Whoever is seen is enough to know.
        symlink(places.dev.join("sdb"), places.proc.join("42/fd/3")).unwrap();
        assert_eq!(places.users_of(&disk).unwrap().len(), 1);
    }
}
