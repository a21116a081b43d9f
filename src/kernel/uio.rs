//! UIO devices of target_core_user: found in /sys/class/uio, opened through /dev/uioN.
//!
//! This is the truth that netlink events only hint at: the daemon looks here when it starts, after an overrun, and now
//! and then.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The name of a uio device: `tcm-user/HBA/NAME/SUBTYPE/CONFIG` (tcmu_update_uio_info).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct UioName {
    /// N of configfs' `core/user_N`.
    pub hba: u32,
    /// The device's directory in `core/user_N`.
    pub name: String,
    /// Whose device it is; ours is `dif`.
    pub subtype: String,
    /// What follows the subtype.
    pub config: String,
}

impl UioName {
    /// Parses a name; `None` if it isn't one of target_core_user's with a subtype.
    pub fn parse(text: &str) -> Option<UioName> {
        let rest = text.strip_prefix("tcm-user/")?;
        let (hba, rest) = rest.split_once('/')?;
        let (name, rest) = rest.split_once('/')?;
        let (subtype, config) = rest.split_once('/')?;
        let whole = !name.is_empty() && !subtype.is_empty();
        let hba = hba.parse().ok().filter(|_| whole)?;
        Some(UioName { hba, name: name.to_owned(), subtype: subtype.to_owned(), config: config.to_owned() })
    }
}

/// A uio device of target_core_user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UioDevice {
    /// N of /dev/uioN.
    pub minor: u32,
    /// Its name, taken apart.
    pub name: UioName,
    /// Bytes of its map: the mailbox, the ring and the data area.
    pub map_size: usize,
    /// The node.
    pub node: PathBuf,
}

/// Where the devices are looked up; other places than the kernel's are for tests.
#[derive(Debug, Clone)]
pub struct Uio {
    class: PathBuf,
    dev: PathBuf,
}

impl Default for Uio {
    fn default() -> Self {
        Uio::at(Path::new("/sys/class/uio"), Path::new("/dev"))
    }
}

impl Uio {
    /// Devices in that class directory, with their nodes in that other one.
    pub fn at(class: &Path, dev: &Path) -> Uio {
        Uio { class: class.to_owned(), dev: dev.to_owned() }
    }

    /// Every device of target_core_user, whosever it is, by minor. A device that goes away under the look is left out.
    ///
    /// # Errors
    /// If the class directory can't be read; that it isn't there only says that there is no device.
    pub fn scan(&self) -> io::Result<Vec<UioDevice>> {
        let entries = match fs::read_dir(&self.class) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut out = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let minor = name.to_str().and_then(|n| n.strip_prefix("uio")).and_then(|n| n.parse().ok());
            out.extend(minor.and_then(|minor| self.device(minor).ok().flatten()));
        }
        out.sort_by_key(|d: &UioDevice| d.minor);
        Ok(out)
    }

    /// One device; `None` if it isn't target_core_user's.
    ///
    /// # Errors
    /// If it is gone, or sysfs says what can't be.
    pub fn device(&self, minor: u32) -> io::Result<Option<UioDevice>> {
        let dir = self.class.join(format!("uio{minor}"));
        let name = fs::read(dir.join("name"))?;
        let Some(name) = UioName::parse(String::from_utf8_lossy(&name).trim_end_matches('\n')) else {
            return Ok(None);
        };
        let size = fs::read_to_string(dir.join("maps/map0/size"))?;
        let map_size =
            size.trim().strip_prefix("0x").and_then(|hex| usize::from_str_radix(hex, 16).ok()).ok_or_else(
                || io::Error::new(io::ErrorKind::InvalidData, format!("map size {:?}", size.trim())),
            )?;
        Ok(Some(UioDevice { minor, name, map_size, node: self.dev.join(format!("uio{minor}")) }))
    }

    /// A number that no other device has had since boot: the inode of its directory in sysfs.
    ///
    /// # Errors
    /// If it isn't there.
    pub fn instance(&self, device: &UioDevice) -> io::Result<u64> {
        Ok(fs::metadata(self.class.join(format!("uio{}", device.minor)))?.ino())
    }

    /// Waits until the device's node is there: devtmpfs makes it a moment after the event.
    ///
    /// # Errors
    /// NotFound if it isn't there after `patience`.
    pub fn wait_for_node(&self, device: &UioDevice, patience: Duration) -> io::Result<()> {
        let end = Instant::now() + patience;
        while !device.node.exists() {
            if Instant::now() >= end {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("{} has not come up", device.node.display()),
                ));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(class: &Path, uio: &str, name: &str, size: &str) {
        let dir = class.join(uio);
        fs::create_dir_all(dir.join("maps/map0")).unwrap();
        fs::write(dir.join("name"), format!("{name}\n")).unwrap();
        fs::write(dir.join("maps/map0/size"), format!("{size}\n")).unwrap();
    }

    #[test]
    fn only_devices_of_target_core_user_are_found() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "uio10", "tcm-user/3/vm1/dif//images/a b.qcow2;ro", "0x40800000");
        put(dir.path(), "uio2", "tcm-user/0/other/qcow//images/b", "0x40800000");
        put(dir.path(), "uio0", "uio_pci_generic", "0x1000");
        put(dir.path(), "uio5", "tcm-user/0/broken/dif//a", "plenty");
        let found = Uio::at(dir.path(), Path::new("/dev")).scan().unwrap();
        assert_eq!(found.iter().map(|d| d.minor).collect::<Vec<_>>(), [2, 10]);
        let name = UioName {
            hba: 3,
            name: "vm1".into(),
            subtype: "dif".into(),
            config: "/images/a b.qcow2;ro".into(),
        };
        assert_eq!(found[1], UioDevice { minor: 10, name, map_size: 0x4080_0000, node: "/dev/uio10".into() });
    }

    #[test]
    fn a_machine_without_uio_has_no_devices() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Uio::at(&dir.path().join("none"), dir.path()).scan().unwrap(), []);
    }

    #[test]
    fn a_node_that_comes_late_is_waited_for_and_one_that_never_comes_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "uio0", "tcm-user/0/a/dif//a", "0x1000");
        let dev = dir.path().join("dev");
        let uio = Uio::at(dir.path(), &dev);
        let device = uio.device(0).unwrap().unwrap();
        let e = uio.wait_for_node(&device, Duration::from_millis(20)).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
        std::thread::scope(|s| {
            s.spawn(|| {
                std::thread::sleep(Duration::from_millis(30));
                fs::create_dir_all(&dev).unwrap();
                fs::write(dev.join("uio0"), "").unwrap();
            });
            uio.wait_for_node(&device, Duration::from_secs(10)).unwrap();
        });
    }
}
