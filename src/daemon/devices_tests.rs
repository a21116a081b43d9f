//! Devices that come, change, fail and go, on a directory in place of sysfs and LUNs that only count.

use std::{
    fs,
    path::Path,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32},
    },
};

use super::*;
use crate::{
    daemon::{
        rundir::{LunState, Phase},
        worker::{Failure, Identity, Lun, Report},
    },
    kernel::{
        netlink::{Change, NetlinkError},
        uio::UioName,
    },
    lun::{Remote, config::DeviceConfig},
};

/// Everything that happened, in order.
#[derive(Default)]
struct World {
    log: Mutex<Vec<String>>,
    changed: Condvar,
    fail_start: AtomicBool,
    slow_start: AtomicBool,
    /// The kernel takes its time to hear of another configuration.
    slow_tell: AtomicBool,
    panic_on_resize: AtomicBool,
    slow_stop: AtomicBool,
    stop_may_go_on: AtomicBool,
    opted_out: AtomicBool,
    not_enabled: AtomicBool,
    /// The device has no serial number yet.
    nameless: AtomicBool,
    capacity: AtomicU32,
    /// The image that LUNs have gone over to.
    moved_to: Mutex<Option<String>>,
    /// LUNs whose threads have died.
    dead: Mutex<Vec<String>>,
}

impl World {
    fn say(&self, text: impl Into<String>) {
        self.log.lock().unwrap().push(text.into());
        self.changed.notify_all();
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let log = self.log.lock().unwrap();
        let missing = |log: &mut Vec<String>| !log.iter().any(|l| l == text);
        let (log, timeout) = self.changed.wait_timeout_while(log, Duration::from_secs(10), missing).unwrap();
        assert!(!timeout.timed_out(), "{text} did not happen: {log:?}");
    }
}

impl Answers for World {
    fn done(&self, kind: Kind, device_id: u32, status: i32) -> Result<(), NetlinkError> {
        self.say(format!("answer {kind:?} {device_id} {status}"));
        Ok(())
    }
}

struct TestHost(Arc<World>);
struct TestLun(Arc<World>, String);

impl Host for TestHost {
    fn identify(&self, device: &UioDevice) -> Result<Identity, Failure> {
        Ok(Identity {
            capacity: u64::from(self.0.capacity.load(Ordering::Relaxed)),
            block_size: 512,
            serial: if self.0.nameless.load(Ordering::Relaxed) { String::new() } else { "1".to_owned() },
            write_cache: true,
            device_id: 100 + device.minor,
            wants_answers: !self.0.opted_out.load(Ordering::Relaxed),
            enabled: !self.0.not_enabled.load(Ordering::Relaxed),
        })
    }

    fn start(&self, device: &UioDevice, _: &DeviceConfig, _: &Identity) -> Result<Box<dyn Lun>, Failure> {
        while self.0.slow_start.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.0.fail_start.load(Ordering::Relaxed) {
            self.0.say(format!("failed {}", device.name.name));
            return Err(Failure::new(libc::EBUSY, "the image is in use"));
        }
        self.0.dead.lock().unwrap().retain(|name| *name != device.name.name);
        self.0.say(format!("start {}", device.name.name));
        Ok(Box::new(TestLun(self.0.clone(), device.name.name.clone())))
    }

    fn tell_config(&self, device: &UioDevice, dev_config: &str) -> Result<(), Failure> {
        self.0.say(format!("tell {} {dev_config}", device.name.name));
        while self.0.slow_tell.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Lun for TestLun {
    fn config(&self) -> Option<DeviceConfig> {
        self.0.moved_to.lock().unwrap().as_ref().map(DeviceConfig::new)
    }

    fn resize(&self, bytes: u64) -> Result<(), Failure> {
        assert!(!self.0.panic_on_resize.load(Ordering::Relaxed), "as the test wants it");
        self.0.say(format!("resize {} {bytes}", self.1));
        if bytes == 0 { Err(Failure::new(libc::EINVAL, "no size")) } else { Ok(()) }
    }

    fn set_write_cache(&self, on: bool) -> Result<(), Failure> {
        self.0.say(format!("write cache {} {on}", self.1));
        Ok(())
    }

    fn report(&self) -> Result<Report, Failure> {
        Ok(Report { format: "raw".into(), io: "threads".into(), counters: serde_json::json!({ "reads": 1 }) })
    }

    fn remote(&self) -> Option<Remote> {
        None
    }

    fn failure(&self) -> Option<Failure> {
        let dead = self.0.dead.lock().unwrap().contains(&self.1);
        dead.then(|| Failure::new(libc::EIO, "its thread panicked"))
    }

    fn stop(self: Box<Self>) -> Result<(), Failure> {
        self.0.say(format!("stopping {}", self.1));
        while self.0.slow_stop.load(Ordering::Relaxed) && !self.0.stop_may_go_on.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.0.say(format!("stopped {}", self.1));
        Ok(())
    }
}

struct Bench {
    dir: tempfile::TempDir,
    world: Arc<World>,
    run: RunDir,
    devices: Devices,
    /// Devices that configfs has no more.
    gone: Arc<Mutex<Vec<u32>>>,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let world = Arc::new(World::default());
        world.capacity.store(4096, Ordering::Relaxed);
        let run = RunDir::at(dir.path().join("run"));
        drop(run.lock().unwrap());
        let uio = Uio::at(&dir.path().join("uio"), Path::new("/dev"));
        let gone = Arc::new(Mutex::new(Vec::new()));
        let there = gone.clone();
        let in_configfs = move |d: &UioDevice| !there.lock().unwrap().contains(&d.minor);
        let host = Arc::new(TestHost(world.clone()));
        let devices = Devices::new(host, run.clone(), uio, world.clone(), Registry::default(), in_configfs);
        Bench { dir, world, run, devices, gone }
    }

    fn plug(&self, minor: u32, name: &str) {
        let dir = self.dir.path().join(format!("uio/uio{minor}"));
        fs::create_dir_all(dir.join("maps/map0")).unwrap();
        fs::write(dir.join("name"), format!("{}\n", uio_name(minor, name))).unwrap();
        fs::write(dir.join("maps/map0/size"), "0x1000\n").unwrap();
    }

    fn rename(&self, minor: u32, name: &str, image: &str) {
        let dir = self.dir.path().join(format!("uio/uio{minor}"));
        fs::write(dir.join("name"), format!("tcm-user/{minor}/{name}/dif/{image}\n")).unwrap();
    }

    fn unplug(&self, minor: u32) {
        fs::remove_dir_all(self.dir.path().join(format!("uio/uio{minor}"))).unwrap();
    }

    fn event(&mut self, kind: Kind, minor: u32, name: &str, change: Option<Change>) {
        let device = UioName::parse(&uio_name(minor, name));
        self.devices.hear(Event { kind, device, minor, device_id: 100 + minor, change });
    }

    fn state(&self, name: &str) -> Option<LunState> {
        self.run.read(name).unwrap()
    }

    #[track_caller]
    fn wait_until(&mut self, what: &str, done: impl Fn(&mut Bench) -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < end, "{what}: {:?}", self.world.log());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn uio_name(minor: u32, name: &str) -> String {
    let subtype = if name.starts_with("other") { "qcow" } else { "dif" };
    format!("tcm-user/{minor}/{name}/{subtype}//images/{name}.raw")
}

#[test]
fn a_device_that_comes_is_answered_once_it_serves() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    assert_eq!(b.world.log(), ["start vm1", "answer Added 100 0"]);
    let state = b.state("vm1").unwrap();
    assert_eq!(
        (state.state, state.image.as_str(), state.capacity_bytes),
        (Phase::Online, "/images/vm1.raw", 4096)
    );
    assert_eq!(state.counters["reads"], 1);
}

#[test]
fn a_new_device_without_a_serial_number_is_answered_at_once_and_served_when_it_has_one() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.world.nameless.store(true, Ordering::Relaxed);
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    let shown = ["start vm1", "stopping vm1", "stopped vm1", "answer Added 100 0"];
    assert_eq!(b.world.log(), shown);
    std::thread::sleep(Duration::from_millis(100));
    b.devices.look(false).unwrap();
    assert_eq!((b.world.log().len(), b.state("vm1").unwrap().state), (4, Phase::Starting));
    b.world.nameless.store(false, Ordering::Relaxed);
    b.wait_until("online", |b| b.state("vm1").is_some_and(|s| s.state == Phase::Online));
    assert_eq!(b.world.log()[4..], ["start vm1"]);
}

#[test]
fn a_change_does_not_wait_for_a_serial_number_and_a_restore_may_write_back_what_it_has_read() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.world.nameless.store(true, Ordering::Relaxed);
    b.event(Kind::Added, 0, "vm1", None);
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::WriteCache(false)));
    b.world.wait_for("write cache vm1 false");
    for (config, errno) in [("dif//images/vm1.raw", 0), ("dif//images/vm2.raw", -libc::EOPNOTSUPP)] {
        b.event(Kind::Reconfig, 0, "vm1", Some(Change::Config(config.into())));
        b.wait_until(config, |b| b.world.log().last() == Some(&format!("answer Reconfig 100 {errno}")));
    }
}

#[test]
fn a_lun_that_has_gone_over_to_another_image_is_the_same_device_and_the_kernel_is_told() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("start vm1");
    *b.world.moved_to.lock().unwrap() = Some("/images/new.raw".into());
    b.world.wait_for("tell vm1 dif//images/new.raw");
    // The kernel asks for it, under the old name or the new, and no other is taken.
    for (config, errno) in [("dif//images/new.raw", 0), ("dif//images/vm1.raw", -libc::EOPNOTSUPP)] {
        b.event(Kind::Reconfig, 0, "vm1", Some(Change::Config(config.into())));
        b.wait_until(config, |b| b.world.log().last() == Some(&format!("answer Reconfig 100 {errno}")));
    }
    b.wait_until("state", |b| b.run.read("vm1").unwrap().is_some_and(|s| s.image == "/images/new.raw"));
    let started = b.world.log().iter().filter(|l| l.starts_with("start")).count();
    b.rename(0, "vm1", "/images/new.raw");
    b.devices.look(true).unwrap();
    assert_eq!((b.devices.len(), b.devices.leaving()), (1, 0));
    assert_eq!(b.world.log().iter().filter(|l| l.starts_with("start")).count(), started);
}

#[test]
fn a_lun_that_changes_its_image_while_the_kernel_is_told_of_the_last_one_has_it_told_again() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("start vm1");
    b.world.slow_tell.store(true, Ordering::Relaxed);
    *b.world.moved_to.lock().unwrap() = Some("/images/one.raw".into());
    b.world.wait_for("tell vm1 dif//images/one.raw");
    *b.world.moved_to.lock().unwrap() = Some("/images/two.raw".into());
    b.wait_until("state", |b| b.run.read("vm1").unwrap().is_some_and(|s| s.image == "/images/two.raw"));
    b.world.slow_tell.store(false, Ordering::Relaxed);
    b.world.wait_for("tell vm1 dif//images/two.raw");
}

#[test]
fn another_subtypes_device_is_neither_served_nor_answered() {
    let mut b = Bench::new();
    b.plug(0, "other1");
    for kind in [Kind::Added, Kind::Reconfig, Kind::Removed] {
        b.event(kind, 0, "other1", Some(Change::Size(1)));
    }
    b.devices.look(true).unwrap();
    b.devices.stop(Duration::from_secs(5), |_| ());
    assert_eq!(b.world.log(), [""; 0]);
}

#[test]
fn a_device_that_fails_is_refused_with_the_errno_and_can_come_again() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.world.fail_start.store(true, Ordering::Relaxed);
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for(&format!("answer Added 100 {}", -libc::EBUSY));
    let state = b.state("vm1").unwrap();
    assert_eq!((state.state, state.reason.as_deref()), (Phase::Failed, Some("the image is in use")));
    b.world.fail_start.store(false, Ordering::Relaxed);
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    b.wait_until("online", |b| b.state("vm1").is_some_and(|s| s.state == Phase::Online));
}

#[test]
fn a_removal_is_answered_after_the_lun_has_let_go() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.event(Kind::Removed, 0, "vm1", None);
    b.world.wait_for("answer Removed 100 0");
    let log = b.world.log();
    assert_eq!(
        log,
        ["start vm1", "answer Added 100 0", "stopping vm1", "stopped vm1", "answer Removed 100 0"]
    );
    assert_eq!(b.state("vm1"), None);
    b.wait_until("tidy", |b| {
        b.devices.tidy(Instant::now());
        b.devices.leaving() == 0
    });
}

#[test]
fn a_lun_that_does_not_stop_does_not_keep_the_kernel_waiting() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.world.slow_stop.store(true, Ordering::Relaxed);
    b.event(Kind::Added, 0, "vm1", None);
    b.event(Kind::Removed, 0, "vm1", None);
    b.world.wait_for("stopping vm1");
    b.devices.tidy(Instant::now());
    assert!(!b.world.log().contains(&"answer Removed 100 0".to_owned()));
    b.devices.tidy(Instant::now() + REMOVAL_PATIENCE);
    assert_eq!(b.world.log().last().unwrap(), "answer Removed 100 0");
    b.world.stop_may_go_on.store(true, Ordering::Relaxed);
    b.world.wait_for("stopped vm1");
    b.wait_until("tidy", |b| {
        b.devices.tidy(Instant::now());
        b.devices.leaving() == 0
    });
    assert_eq!(b.world.log().iter().filter(|l| l.starts_with("answer Removed")).count(), 1);
}

#[test]
fn changes_are_done_in_order_and_answered_with_what_came_of_them() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::Size(8192)));
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::WriteCache(false)));
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::Config("dif//b".into())));
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::Size(0)));
    b.event(Kind::Removed, 0, "vm1", None);
    b.world.wait_for("answer Removed 100 0");
    let expected = [
        "start vm1".to_owned(),
        "answer Added 100 0".into(),
        "resize vm1 8192".into(),
        "answer Reconfig 100 0".into(),
        "write cache vm1 false".into(),
        "answer Reconfig 100 0".into(),
        format!("answer Reconfig 100 {}", -libc::EOPNOTSUPP),
        "resize vm1 0".into(),
        format!("answer Reconfig 100 {}", -libc::EINVAL),
    ];
    assert_eq!(b.world.log()[..expected.len()], expected);
}

#[test]
fn a_panic_faults_its_own_lun_and_the_worker_answers_on() {
    let mut b = Bench::new();
    b.world.panic_on_resize.store(true, Ordering::Relaxed);
    for (minor, name) in [(0, "vm1"), (1, "vm2")] {
        b.plug(minor, name);
        b.event(Kind::Added, minor, name, None);
    }
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::Size(8192)));
    b.world.wait_for(&format!("answer Reconfig 100 {}", -libc::EIO));
    let change = b.state("vm1").unwrap().last_change.unwrap();
    assert!(change.error.unwrap().contains("as the test wants it"));
    b.event(Kind::Removed, 0, "vm1", None);
    b.event(Kind::Removed, 1, "vm2", None);
    b.world.wait_for("answer Removed 100 0");
    b.world.wait_for("answer Removed 101 0");
}

#[test]
fn a_lun_that_dies_comes_back_once_and_then_stays_failed_with_the_reason() {
    let mut bench = Bench::new();
    for (minor, name) in [(0, "frail"), (1, "sound")] {
        bench.plug(minor, name);
        bench.event(Kind::Added, minor, name, None);
        bench.wait_until("it serves", |b| b.state(name).is_some_and(|s| s.state == Phase::Online));
    }
    let starts =
        |b: &Bench, name: &str| b.world.log().iter().filter(|l| **l == format!("start {name}")).count();
    let die = |b: &Bench| b.world.dead.lock().unwrap().push("frail".to_owned());
    die(&bench);
    bench.wait_until("it comes back", |b| starts(b, "frail") == 2);
    bench.wait_until("it serves again", |b| b.state("frail").is_some_and(|s| s.state == Phase::Online));
    assert_eq!(bench.state("frail").unwrap().reason, None);
    die(&bench);
    bench.wait_until("it stays failed", |b| b.state("frail").is_some_and(|s| s.state == Phase::Failed));
    let state = bench.state("frail").unwrap();
    assert_eq!(state.reason.as_deref(), Some("its thread panicked"));
    assert!(state.next.is_some());
    assert_eq!((starts(&bench, "frail"), starts(&bench, "sound")), (2, 1));
    assert_eq!(bench.state("sound").unwrap().state, Phase::Online);
    assert!(!bench.world.log().contains(&"stopping sound".to_owned()));
}

#[test]
fn a_device_that_wants_no_answers_gets_none() {
    let mut b = Bench::new();
    b.world.opted_out.store(true, Ordering::Relaxed);
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("start vm1");
    b.event(Kind::Reconfig, 0, "vm1", Some(Change::Size(8192)));
    b.world.wait_for("resize vm1 8192");
    b.event(Kind::Removed, 0, "vm1", None);
    b.world.wait_for("stopped vm1");
    b.devices.stop(Duration::from_secs(5), |_| ());
    assert_eq!(b.world.log(), ["start vm1", "resize vm1 8192", "stopping vm1", "stopped vm1"]);
}

#[test]
fn devices_that_exist_at_start_are_served_and_only_the_one_that_waits_is_answered() {
    let mut b = Bench::new();
    b.plug(3, "vm1");
    b.devices.look(false).unwrap();
    b.world.wait_for("start vm1");
    b.world.not_enabled.store(true, Ordering::Relaxed);
    b.plug(4, "vm2");
    b.devices.look(false).unwrap();
    b.world.wait_for("answer Added 104 0");
    // Its event comes late, and is not answered again.
    b.event(Kind::Added, 4, "vm2", None);
    b.devices.stop(Duration::from_secs(5), |_| ());
    let answers: Vec<_> = b.world.log().into_iter().filter(|l| l.starts_with("answer")).collect();
    assert_eq!(answers, ["answer Added 104 0"]);
}

#[test]
fn a_device_that_went_unheard_is_stopped_and_its_minor_number_serves_the_next() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    b.unplug(0);
    b.plug(0, "vm2");
    b.event(Kind::Added, 0, "vm2", None);
    b.world.wait_for("stopped vm1");
    b.world.wait_for("start vm2");
    b.unplug(0);
    b.devices.look(false).unwrap();
    b.world.wait_for("stopped vm2");
    assert!(b.devices.is_empty());
}

#[test]
fn after_an_overrun_lost_removals_and_changes_are_made_up_for() {
    let mut b = Bench::new();
    for (minor, name) in [(0, "vm1"), (1, "vm2")] {
        b.plug(minor, name);
        b.event(Kind::Added, minor, name, None);
        b.world.wait_for(&format!("answer Added 10{minor} 0"));
    }
    b.gone.lock().unwrap().push(0);
    b.world.capacity.store(8192, Ordering::Relaxed);
    b.devices.look(true).unwrap();
    b.world.wait_for("answer Removed 100 0");
    b.world.wait_for("resize vm2 8192");
    b.world.wait_for(&format!("answer Reconfig 101 {}", -libc::EAGAIN));
}

#[test]
fn a_device_that_seems_to_be_gone_from_configfs_is_left_to_its_event() {
    let mut b = Bench::new();
    b.plug(0, "vm1");
    b.event(Kind::Added, 0, "vm1", None);
    b.world.wait_for("answer Added 100 0");
    b.gone.lock().unwrap().push(0);
    for _ in 0..5 {
        b.devices.look(false).unwrap();
    }
    assert_eq!(b.devices.len(), 1);
    b.event(Kind::Removed, 0, "vm1", None);
    b.world.wait_for("answer Removed 100 0");
}

#[test]
fn what_failed_at_start_is_tried_again() {
    let mut b = Bench::new();
    b.world.fail_start.store(true, Ordering::Relaxed);
    b.plug(0, "vm1");
    b.devices.look(false).unwrap();
    b.wait_until("failed", |b| b.state("vm1").is_some_and(|s| s.state == Phase::Failed));
    b.world.fail_start.store(false, Ordering::Relaxed);
    b.devices.look(false).unwrap();
    b.wait_until("online", |b| b.state("vm1").is_some_and(|s| s.state == Phase::Online));
    assert_eq!(b.state("vm1").unwrap().reason, None);
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_by_name() {
    let mut b = Bench::new();
    b.plug(0, "vm1;colour=red");
    b.event(Kind::Added, 0, "vm1;colour=red", None);
    b.world.wait_for(&format!("answer Added 100 {}", -libc::EINVAL));
    let reason = b.state("vm1;colour=red").unwrap().reason.unwrap();
    assert_eq!(reason, r#"unknown setting "colour=red.raw""#);
}

#[test]
fn sixty_four_devices_at_once_come_and_go() {
    let mut b = Bench::new();
    for minor in 0..64 {
        b.plug(minor, &format!("vm{minor}"));
    }
    for minor in 0..64 {
        b.event(Kind::Added, minor, &format!("vm{minor}"), None);
    }
    for minor in 0..64 {
        b.world.wait_for(&format!("answer Added {} 0", 100 + minor));
    }
    b.devices.report();
    for minor in 0..64 {
        b.event(Kind::Removed, minor, &format!("vm{minor}"), None);
    }
    for minor in 0..64 {
        b.world.wait_for(&format!("answer Removed {} 0", 100 + minor));
    }
    assert!(b.devices.is_empty());
}

#[test]
fn how_a_lun_stands_is_told_without_waiting_for_it() {
    let mut b = Bench::new();
    let outcome = |b: &Bench| b.devices.standings()[0].outcome.clone();
    b.world.slow_start.store(true, Ordering::Relaxed);
    b.world.fail_start.store(true, Ordering::Relaxed);
    b.plug(0, "vm1");
    b.devices.look(false).unwrap();
    assert_eq!((b.devices.standings()[0].name.as_str(), outcome(&b)), ("vm1", None));
    b.world.slow_start.store(false, Ordering::Relaxed);
    b.wait_until("failed", |b| outcome(b) == Some(Err("the image is in use".to_owned())));
    b.world.fail_start.store(false, Ordering::Relaxed);
    b.devices.look(false).unwrap();
    b.wait_until("online", |b| outcome(b) == Some(Ok(())));
}

#[path = "pauses_tests.rs"]
mod pauses;
