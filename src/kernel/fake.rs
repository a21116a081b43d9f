//! A configfs for tests: the rules of target core and its fabrics as far as they matter here, and a step that fails on demand.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use super::tree::Tree;

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
    pub busy: RefCell<Vec<PathBuf>>,
}

fn errno(n: i32) -> io::Error {
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
        one_less(&self.changes_left)
    }

    fn put(&self, path: PathBuf, node: Node) {
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
        } else if text.contains("/tpgt_") && depth == 4 {
            self.put(path.join("lun"), Node::Default);
            attr("nexus", "");
            attr("address", "2:0:1");
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
