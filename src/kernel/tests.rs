//! Building and taking down on the fake tree: every step fails once, and nothing is left behind.

use std::path::Path;

use super::{
    backstore::{self, Spec},
    fabric::{self, Fabric},
    fake::Fake,
    leftover,
    names::{Name, Wwn},
    tree::Tree,
    undo::Undo,
    usage::{self, User},
};
use crate::units::BlockSize;

fn spec(name: &str) -> Spec {
    Spec {
        name: Name::new(name).unwrap(),
        dev_config: "dif//images/vm1.qcow2;pi=type1".into(),
        capacity: 1 << 30,
        block_size: BlockSize::B4096,
        serial: "serial-1".into(),
        write_cache: true,
    }
}

fn build(tree: &Fake, name: &str) -> Result<(), backstore::ConfigfsError> {
    let mut undo = Undo::new(tree);
    let path = backstore::create(tree, &spec(name), &mut undo)?;
    for fabric in [Fabric::Loopback, Fabric::Vhost] {
        fabric::create(tree, &path, fabric, &Wwn::derived(&[fabric.word(), name]), &mut undo)?;
    }
    undo.keep();
    Ok(())
}

#[test]
fn what_was_created_is_read_back() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let found = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    assert_eq!(found.path, Path::new("target/core/user_0/vm1"));
    assert_eq!(found.config_after("dif"), Some("/images/vm1.qcow2;pi=type1"));
    assert_eq!((found.capacity, found.block_size, found.serial.as_str()), (1 << 30, 4096, "serial-1"));
    assert!(found.enabled && found.write_cache && !found.wants_answers);
    assert_eq!(found.device_id(&tree).unwrap(), 7);
    assert_eq!(tree.read(&found.path.join("attrib/hw_max_sectors")).unwrap(), "2048");
    assert_eq!(tree.read(&found.path.join("attrib/cmd_time_out")).unwrap(), "90");
    let exports = fabric::of(&tree, &found).unwrap();
    assert_eq!(exports.iter().map(|e| e.fabric.as_str()).collect::<Vec<_>>(), ["loopback", "vhost"]);
    assert_eq!(fabric::scsi_address(&tree, &exports[0]).unwrap(), "2:0:1:0");
}

#[test]
fn a_number_that_another_device_has_not_left_yet_is_waited_for() {
    let tree = Fake::new();
    tree.numbers_taken.set(3);
    build(&tree, "vm1").unwrap();
    assert_eq!(tree.numbers_taken.get(), 0);
    assert!(backstore::find(&tree, "dif", "vm1").unwrap().unwrap().enabled);
    // One that never becomes free is an error, and nothing stays behind.
    let before = tree.snapshot();
    tree.numbers_taken.set(usize::MAX);
    let refused = build(&tree, "vm2").unwrap_err();
    assert_eq!((refused.what, refused.source.raw_os_error()), ("write", Some(libc::EEXIST)));
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn the_kernel_tells_of_task_management_where_it_can() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let attr = Path::new("target/core/user_0/vm1/attrib/tmr_notification");
    assert_eq!(tree.read(attr).unwrap(), "0");
    backstore::hear_task_management(&tree, 0, "vm1").unwrap();
    assert_eq!(tree.read(attr).unwrap(), "1");
    // A kernel that has no such attribute is as good.
    backstore::hear_task_management(&tree, 7, "none").unwrap();
}

#[test]
fn every_step_that_fails_leaves_the_tree_as_it_was() {
    let tree = Fake::new();
    build(&tree, "before").unwrap();
    let before = tree.snapshot();
    let mut failed = 0;
    for step in 0.. {
        tree.changes_left.set(Some(step));
        let done = build(&tree, "vm1");
        tree.changes_left.set(None);
        if done.is_ok() {
            break;
        }
        failed += 1;
        assert_eq!(tree.snapshot(), before, "step {step}");
    }
    assert!(failed > 15, "{failed}");
}

#[test]
fn what_is_removed_leaves_nothing_and_touches_nothing_else() {
    let tree = Fake::new();
    build(&tree, "other").unwrap();
    let before = tree.snapshot();
    build(&tree, "vm1").unwrap();
    let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    for export in fabric::of(&tree, &store).unwrap() {
        fabric::remove(&tree, &export).unwrap();
    }
    store.remove(&tree).unwrap();
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn each_backstore_has_a_directory_of_its_own_in_core() {
    let tree = Fake::new();
    tree.make_dir(Path::new("target/core/user_1")).unwrap();
    for name in ["a", "b", "c"] {
        build(&tree, name).unwrap();
    }
    let hbas: Vec<_> = backstore::all(&tree).unwrap().iter().map(|b| b.hba).collect();
    assert_eq!(hbas, [0, 2, 3]);
}

#[test]
fn commands_without_a_daemon_end_in_an_error_and_not_in_busy() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    store.end_commands(&tree, false).unwrap();
    assert_eq!(tree.read(&store.path.join("action/reset_ring")).unwrap(), "2");
}

#[test]
fn another_subtypes_device_of_the_same_name_is_not_ours() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    tree.write(Path::new("target/core/user_0/vm1/attrib/dev_config"), "qcow//images/a").unwrap();
    assert_eq!(backstore::find(&tree, "dif", "vm1").unwrap(), None);
    tree.write(Path::new("target/core/user_0/vm1/attrib/dev_config"), "difference/x").unwrap();
    assert_eq!(backstore::find(&tree, "dif", "vm1").unwrap(), None);
}

#[test]
fn a_connected_guest_is_seen_and_the_question_changes_nothing() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    let export = fabric::of(&tree, &store).unwrap().remove(1);
    let before = tree.snapshot();
    assert_eq!(usage::of_vhost(&tree, &export), None);
    tree.busy.borrow_mut().push(export.tpg_path());
    assert_eq!(usage::of_vhost(&tree, &export), Some(User::Guest { wwn: export.target.clone() }));
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn an_export_by_another_fabric_is_seen_and_not_ours_to_touch() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let lun = Path::new("target/iscsi/iqn.2026-11.a:b/tpgt_1/lun/lun_3");
    for depth in 2..=6 {
        let dir: std::path::PathBuf = lun.components().take(depth).collect();
        if !tree.is_dir(&dir) {
            tree.make_dir(&dir).unwrap();
        }
    }
    tree.link(Path::new("target/core/user_0/vm1"), &lun.join("x")).unwrap();
    let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    let foreign: Vec<_> = fabric::of(&tree, &store).unwrap().iter().filter_map(usage::of_foreign).collect();
    assert_eq!(foreign, [User::Foreign { fabric: "iscsi".into(), target: "iqn.2026-11.a:b".into() }]);
}

/// A tree in which a device is being removed: its attributes are gone at once, its directory after some looks.
struct Fading<'a> {
    tree: &'a Fake,
    device: &'a Path,
    looks: std::cell::Cell<usize>,
}

impl Tree for Fading<'_> {
    fn make_dir(&self, path: &Path) -> std::io::Result<()> {
        self.tree.make_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> std::io::Result<()> {
        self.tree.remove_dir(path)
    }
    fn write(&self, path: &Path, value: &str) -> std::io::Result<()> {
        self.tree.write(path, value)
    }
    fn read(&self, path: &Path) -> std::io::Result<String> {
        match path.starts_with(self.device) {
            true => Err(std::io::ErrorKind::NotFound.into()),
            false => self.tree.read(path),
        }
    }
    fn link(&self, target: &Path, link: &Path) -> std::io::Result<()> {
        self.tree.link(target, link)
    }
    fn unlink(&self, link: &Path) -> std::io::Result<()> {
        self.tree.unlink(link)
    }
    fn dirs(&self, path: &Path) -> std::io::Result<Vec<String>> {
        self.tree.dirs(path)
    }
    fn links(&self, path: &Path) -> std::io::Result<Vec<(String, std::path::PathBuf)>> {
        self.tree.links(path)
    }
    fn is_dir(&self, path: &Path) -> bool {
        if path == self.device {
            self.looks.set(self.looks.get().saturating_sub(1));
            return self.looks.get() > 0;
        }
        self.tree.is_dir(path)
    }
}

#[test]
fn a_device_that_another_removes_at_this_moment_is_no_error_and_hides_no_other() {
    let tree = Fake::new();
    build(&tree, "stays").unwrap();
    build(&tree, "goes").unwrap();
    let device = backstore::find(&tree, "dif", "goes").unwrap().unwrap().path;
    let fading = Fading { tree: &tree, device: &device, looks: 4.into() };
    let names: Vec<_> = backstore::all(&fading).unwrap().into_iter().map(|b| b.name).collect();
    assert_eq!(names, ["stays"]);
    // One that stays without its attributes is an error all the same.
    let broken = Fading { tree: &tree, device: &device, looks: usize::MAX.into() };
    assert_eq!(backstore::all(&broken).unwrap_err().source.kind(), std::io::ErrorKind::NotFound);
}

/// What `delete` does with a LUN of which anything may be there.
fn take_down(tree: &Fake, name: &str) -> Result<Vec<String>, backstore::ConfigfsError> {
    let mut gone = Vec::new();
    if let Some(store) = backstore::find(tree, "dif", name)? {
        for export in fabric::of(tree, &store)? {
            fabric::remove(tree, &export)?;
        }
        store.remove(tree)?;
    }
    for store in leftover::unconfigured(tree, name)? {
        store.remove(tree)?;
        gone.push(store.path.display().to_string());
    }
    for fabric in [Fabric::Loopback, Fabric::Vhost] {
        let target = leftover::remove_target(tree, fabric, &Wwn::derived(&[fabric.word(), name]))?;
        gone.extend(target.map(|path| path.display().to_string()));
    }
    gone.extend(leftover::remove_empty_hbas(tree)?.iter().map(|path| path.display().to_string()));
    Ok(gone)
}

#[test]
fn whatever_a_create_that_was_killed_has_left_is_taken_down_and_it_can_be_made_anew() {
    let (mut killed, mut said) = (0, std::collections::BTreeSet::new());
    for step in 0.. {
        let tree = Fake::new();
        build(&tree, "other").unwrap();
        let before = tree.snapshot();
        tree.changes_left.set(Some(step));
        let mut undo = Undo::new(&tree);
        let made = (|| {
            let path = backstore::create(&tree, &spec("vm1"), &mut undo)?;
            for fabric in [Fabric::Loopback, Fabric::Vhost] {
                fabric::create(&tree, &path, fabric, &Wwn::derived(&[fabric.word(), "vm1"]), &mut undo)?;
            }
            Ok::<_, backstore::ConfigfsError>(())
        })();
        // Nobody undoes anything.
        undo.keep();
        tree.changes_left.set(None);
        if made.is_ok() {
            break;
        }
        killed += 1;
        said.extend(take_down(&tree, "vm1").unwrap());
        assert_eq!(tree.snapshot(), before, "step {step}");
        assert_eq!(take_down(&tree, "vm1").unwrap(), [""; 0], "nothing is left");
        build(&tree, "vm1").unwrap();
    }
    assert!(killed > 15, "{killed}");
    for part in ["target/core/user_1", "target/core/user_1/vm1", "target/loopback/naa", "target/vhost/naa"] {
        assert!(said.iter().any(|s| s.starts_with(part)), "{part}: {said:?}");
    }
}

#[test]
fn a_take_down_that_was_killed_is_ended_by_the_next() {
    let mut killed = 0;
    for step in 0.. {
        let tree = Fake::new();
        build(&tree, "other").unwrap();
        let before = tree.snapshot();
        build(&tree, "vm1").unwrap();
        tree.removals_left.set(Some(step));
        let done = take_down(&tree, "vm1");
        tree.removals_left.set(None);
        if done.is_ok() {
            break;
        }
        killed += 1;
        take_down(&tree, "vm1").unwrap();
        assert_eq!(tree.snapshot(), before, "step {step}");
        build(&tree, "vm1").unwrap();
    }
    assert!(killed > 8, "{killed}");
}

#[test]
fn what_is_somebody_s_is_no_leftover() {
    let tree = Fake::new();
    build(&tree, "vm1").unwrap();
    let wwn = |fabric: Fabric| Wwn::derived(&[fabric.word(), "vm1"]);
    // A target that exports, one with another portal group, one with another LUN.
    let other = Wwn::derived(&["another"]);
    let target = Path::new("target/vhost").join(other.as_str());
    for dir in ["", "tpgt_2"] {
        tree.make_dir(&target.join(dir)).unwrap();
    }
    let third = Wwn::derived(&["a third"]);
    let target = Path::new("target/vhost").join(third.as_str());
    for dir in ["", "tpgt_1", "tpgt_1/lun/lun_7"] {
        tree.make_dir(&target.join(dir)).unwrap();
    }
    // A device that is being configured, under another name; one that is another's.
    for dir in ["user_8", "user_8/vm2", "user_9", "user_9/vm1"] {
        tree.make_dir(&Path::new("target/core").join(dir)).unwrap();
    }
    tree.write(Path::new("target/core/user_9/vm1/attrib/dev_config"), "qcow//images/a").unwrap();
    let before = tree.snapshot();
    for wwn in [wwn(Fabric::Vhost), other, third, Wwn::derived(&["none"])] {
        assert_eq!(leftover::remove_target(&tree, Fabric::Vhost, &wwn).unwrap(), None, "{wwn}");
    }
    assert_eq!(leftover::unconfigured(&tree, "vm1").unwrap(), []);
    assert!(leftover::remove_empty_hbas(&tree).unwrap().is_empty());
    assert_eq!(tree.snapshot(), before);
}
