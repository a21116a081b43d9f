//! A configfs for tests: the rules of target core and its fabrics as far as they matter here, and a step that fails on demand.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use super::{fake_reservations::Prepared, tree::Tree};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Dir,
    /// Made with its parent, and gone with it.
    Default,
    Attr(String),
    Link(PathBuf),
}

/// The tree, and how many more changes and removals it lets through.
#[derive(Default)]
pub struct Fake {
    pub nodes: RefCell<BTreeMap<PathBuf, Node>>,
    pub changes_left: Cell<Option<usize>>,
    pub removals_left: Cell<Option<usize>>,
    /// The change that fails is the only one that does.
    pub fails_once: Cell<bool>,
    pub busy: RefCell<Vec<PathBuf>>,
    pub prepared: RefCell<Prepared>,
    /// How many devices more meet a number that another has not left yet.
    pub numbers_taken: Cell<usize>,
}

pub fn errno(n: i32) -> io::Error {
    io::Error::from_raw_os_error(n)
}

fn one_less(left: &Cell<Option<usize>>) -> io::Result<()> {
    match left.get() {
        Some(0) => Err(errno(libc::EIO)),
        Some(n) => {
            left.set(Some(n - 1));
            Ok(())
        }
        None => Ok(()),
    }
}

impl Fake {
    pub fn new() -> Fake {
        let fake = Fake::default();
        for dir in ["target", "target/core", "target/loopback", "target/vhost"] {
            fake.nodes.borrow_mut().insert(dir.into(), Node::Default);
        }
        fake
    }

    pub fn snapshot(&self) -> BTreeMap<PathBuf, Node> {
        self.nodes.borrow().clone()
    }

    fn change(&self) -> io::Result<()> {
        let done = one_less(&self.changes_left);
        if done.is_err() && self.fails_once.take() {
            self.changes_left.set(None);
        }
        done
    }

    pub fn put(&self, path: PathBuf, node: Node) {
        self.nodes.borrow_mut().insert(path, node);
    }

    /// What the kernel makes together with a directory.
    fn furnish(&self, path: &Path) {
        let depth = path.components().count();
        let text = path.to_string_lossy();
        let attr = |name: &str, value: &str| self.put(path.join(name), Node::Attr(value.to_owned()));
        if text.starts_with("target/core/user_") && depth == 4 {
            for dir in ["action", "attrib", "wwn", "statistics", "statistics/scsi_dev"] {
                self.put(path.join(dir), Node::Default);
            }
            attr("control", "");
            attr("enable", "0");
            attr("action/reset_ring", "0");
            attr("attrib/dev_config", "");
            attr("attrib/dev_size", "0");
            attr("attrib/hw_block_size", "512");
            attr("attrib/hw_max_sectors", "128");
            attr("attrib/nl_reply_supported", "0");
            attr("attrib/cmd_ring_size_mb", "8");
            attr("attrib/cmd_time_out", "30");
            attr("attrib/qfull_time_out", "-1");
            attr("attrib/tmr_notification", "0");
            attr("attrib/emulate_write_cache", "0");
            attr("wwn/vpd_unit_serial", "T10 VPD Unit Serial Number: ");
            attr("statistics/scsi_dev/indx", "7");
            self.furnish_reservations(path);
            self.put(path.join("alua"), Node::Default);
            self.furnish_group(&path.join("alua/default_tg_pt_gp"), Node::Default, "0");
        } else if text.contains("/tpgt_") && depth == 4 {
            self.put(path.join("lun"), Node::Default);
            attr("nexus", "");
            attr("address", "2:0:1");
        } else if text.contains("/alua/") {
            self.furnish_group(path, Node::Dir, "");
        } else if text.contains("/lun/lun_") {
            attr("alua_tg_pt_gp", "");
            attr("alua_tg_pt_offline", "0");
        }
    }

    fn furnish_group(&self, path: &Path, node: Node, id: &str) {
        self.put(path.to_owned(), node);
        for (name, value) in [
            ("alua_access_state", "0"),
            ("alua_access_status", "None"),
            ("alua_access_type", "Implicit and Explicit"),
            ("alua_support_active_nonoptimized", "1"),
            ("alua_support_active_optimized", "1"),
            ("alua_support_lba_dependent", "0"),
            ("alua_support_offline", "1"),
            ("alua_support_standby", "1"),
            ("alua_support_transitioning", "1"),
            ("alua_support_unavailable", "1"),
            ("implicit_trans_secs", "0"),
            ("nonop_delay_msecs", "100"),
            ("preferred", "0"),
            ("tg_pt_gp_id", id),
            ("trans_delay_msecs", "0"),
        ] {
            self.put(path.join(name), Node::Attr(value.to_owned()));
        }
    }

    /// What of ALUA becomes of a value that is written: other words, or a refusal.
    fn write_alua(&self, path: &Path, value: &str) -> io::Result<String> {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let words = |words: &[&str]| {
            let number: usize = value.parse().map_err(|_| errno(libc::EINVAL))?;
            words.get(number).map(|word| (*word).to_owned()).ok_or_else(|| errno(libc::EINVAL))
        };
        match name {
            "alua_access_type" => words(&["None", "Implicit", "Explicit", "Implicit and Explicit"]),
            "alua_access_status" => words(&["None", "Altered by Explicit STPG", "Altered by Implicit ALUA"]),
            "alua_access_state" => {
                let group = path.parent().unwrap();
                let store = group.parent().and_then(Path::parent).unwrap();
                let usable = self.read(&store.join("enable"))? == "1"
                    && !self.read(&group.join("tg_pt_gp_id"))?.is_empty()
                    && self.read(&group.join("alua_access_type"))?.contains("Implicit");
                if !usable {
                    return Err(errno(libc::EINVAL));
                }
                let status = Node::Attr("Altered by Implicit ALUA".into());
                self.put(group.join("alua_access_status"), status);
                Ok(value.to_owned())
            }
            "alua_tg_pt_gp" => Ok(format!("TG Port Alias: {value}\nTG Port Group ID: 1\n")),
            _ => Ok(value.to_owned()),
        }
    }
}

impl Tree for Fake {
    fn make_dir(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        if self.nodes.borrow().contains_key(path) {
            return Err(errno(libc::EEXIST));
        }
        if !path.parent().is_some_and(|p| self.is_dir(p)) {
            return Err(errno(libc::ENOENT));
        }
        self.put(path.to_owned(), Node::Dir);
        self.furnish(path);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        one_less(&self.removals_left)?;
        if self.busy.borrow().iter().any(|p| p == path) {
            return Err(errno(libc::EBUSY));
        }
        let mut nodes = self.nodes.borrow_mut();
        if nodes.get(path) != Some(&Node::Dir) {
            return Err(errno(libc::ENOENT));
        }
        let made = |n: &Node| matches!(n, Node::Dir | Node::Link(_));
        if nodes.iter().any(|(p, n)| p != path && p.starts_with(path) && made(n)) {
            return Err(errno(libc::ENOTEMPTY));
        }
        // A backstore that something links to stays.
        if nodes.values().any(|n| matches!(n, Node::Link(to) if to == path)) {
            return Err(errno(libc::EBUSY));
        }
        nodes.retain(|p, _| !p.starts_with(path));
        self.forget_prepared(path);
        Ok(())
    }

    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        self.change()?;
        if !matches!(self.nodes.borrow().get(path), Some(Node::Attr(_))) {
            return Err(errno(libc::ENOENT));
        }
        let (mut path, mut value) = (path.to_owned(), value.to_owned());
        if path.ends_with("control") {
            let (key, v) = value.split_once('=').ok_or_else(|| errno(libc::EINVAL))?;
            // As the kernel's parser cuts it.
            let v = v.split([',', '\n']).next().unwrap_or_default().to_owned();
            path = path.with_file_name("attrib").join(key);
            value = v;
        } else if path.ends_with("wwn/vpd_unit_serial") {
            value = format!("T10 VPD Unit Serial Number: {value}");
        } else if path.ends_with("pr/res_aptpl_metadata") {
            return self.prepare_registration(&path, &value);
        } else if path.ends_with("enable") && self.numbers_taken.get() > 0 {
            self.numbers_taken.set(self.numbers_taken.get() - 1);
            return Err(errno(libc::EEXIST));
        } else {
            value = self.write_alua(&path, &value)?;
        }
        self.put(path, Node::Attr(value));
        Ok(())
    }

    fn read(&self, path: &Path) -> io::Result<String> {
        match self.nodes.borrow().get(path) {
            Some(Node::Attr(value)) => Ok(value.clone()),
            _ => Err(errno(libc::ENOENT)),
        }
    }

    fn link(&self, target: &Path, link: &Path) -> io::Result<()> {
        self.change()?;
        if !self.is_dir(target) || !link.parent().is_some_and(|p| self.is_dir(p)) {
            return Err(errno(libc::ENOENT));
        }
        self.put(link.to_owned(), Node::Link(target.to_owned()));
        self.begin_registrations(target, link);
        if let Some(lun) = link.parent() {
            let group = Node::Attr("TG Port Alias: default_tg_pt_gp\nTG Port Group ID: 0\n".into());
            self.put(lun.join("alua_tg_pt_gp"), group);
        }
        Ok(())
    }

    fn unlink(&self, link: &Path) -> io::Result<()> {
        one_less(&self.removals_left)?;
        let mut nodes = self.nodes.borrow_mut();
        match nodes.get(link) {
            Some(Node::Link(_)) => {
                nodes.remove(link);
                Ok(())
            }
            _ => Err(errno(libc::ENOENT)),
        }
    }

    fn dirs(&self, path: &Path) -> io::Result<Vec<String>> {
        let nodes = self.nodes.borrow();
        let inside =
            nodes.iter().filter(|(p, n)| p.parent() == Some(path) && matches!(n, Node::Dir | Node::Default));
        Ok(inside.filter_map(|(p, _)| Some(p.file_name()?.to_str()?.to_owned())).collect())
    }

    fn links(&self, path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
        let nodes = self.nodes.borrow();
        let inside = nodes.iter().filter(|(p, _)| p.parent() == Some(path));
        Ok(inside
            .filter_map(|(p, n)| match n {
                Node::Link(to) => Some((p.file_name()?.to_str()?.to_owned(), to.clone())),
                _ => None,
            })
            .collect())
    }

    fn is_dir(&self, path: &Path) -> bool {
        matches!(self.nodes.borrow().get(path), Some(Node::Dir | Node::Default))
    }
}
