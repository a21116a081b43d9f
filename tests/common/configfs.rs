//! A made-up configfs in a directory: LUNs and their exports as files, for commands that only look.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// A directory with `configfs`, in which LUNs can be put.
pub struct Configfs {
    pub root: PathBuf,
}

impl Configfs {
    pub fn in_dir(dir: &Path) -> Configfs {
        let root = dir.join("configfs");
        fs::create_dir_all(root.join("target/core")).unwrap();
        Configfs { root }
    }

    fn attribute(&self, path: &Path, value: &str) {
        let at = self.root.join(path);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(at, format!("{value}\n")).unwrap();
    }

    /// A LUN of ours: `target/core/user_N/NAME`.
    pub fn lun(&self, hba: u32, name: &str) -> PathBuf {
        let dir = Path::new("target/core").join(format!("user_{hba}")).join(name);
        for (attribute, value) in [
            ("attrib/dev_config", "dif//images/vm1.raw"),
            ("attrib/dev_size", "1048576"),
            ("attrib/hw_block_size", "512"),
            ("attrib/emulate_write_cache", "1"),
            ("attrib/nl_reply_supported", "-1"),
            ("wwn/vpd_unit_serial", "T10 VPD Unit Serial Number: abc-1"),
            ("enable", "1"),
        ] {
            self.attribute(&dir.join(attribute), value);
        }
        dir
    }

    /// An export of it.
    pub fn export(&self, lun: &Path, fabric: &str, wwn: &str) -> PathBuf {
        let tpg = Path::new("target").join(fabric).join(wwn).join("tpgt_1");
        let dir = self.root.join(&tpg).join("lun/lun_0");
        fs::create_dir_all(&dir).unwrap();
        symlink(self.root.join(lun), dir.join(lun.file_name().unwrap())).unwrap();
        tpg
    }
}
