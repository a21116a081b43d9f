//! Devices that come and go by the thousand, with real LUNs on embedded rings and all that the daemon keeps of each: nothing may stay behind.
//!
//! The figures are the process's own, from /proc/self: each test runs in a process of its own (nextest).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    devices::Devices,
    rundir::{Phase, RunDir},
    worker::{Failure, Host, Identity, Lun},
};
use crate::{
    control::{Registry, server::Server},
    kernel::{
        netlink::{Answers, Event, Kind, NetlinkError},
        uio::{Uio, UioDevice, UioName},
    },
    lun::{self, LunParams, config::DeviceConfig, continued::ContinuedFile},
    peer::kernel::{Data, Kernel, Options},
    sys::backend_from_env,
    units::BlockSize,
};

const MIB: u64 = 1 << 20;

/// Serves each device by a LUN on a ring of its own, with the files that the real daemon gives it.
struct Embedded {
    run: RunDir,
    image: PathBuf,
    state_dir: PathBuf,
}

impl Host for Embedded {
    fn identify(&self, device: &UioDevice) -> Result<Identity, Failure> {
        Ok(Identity {
            capacity: MIB,
            block_size: 512,
            serial: format!("serial-{}", device.name.name),
            write_cache: true,
            device_id: device.minor,
            wants_answers: false,
            enabled: true,
        })
    }

    fn tell_config(&self, _: &UioDevice, _: &str) -> Result<(), Failure> {
        Ok(())
    }

    fn start(
        &self,
        device: &UioDevice,
        config: &DeviceConfig,
        identity: &Identity,
    ) -> Result<Box<dyn Lun>, Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::new(libc::EIO, e.to_string());
        let options = Options { cmdr_size: 16 << 10, data_size: 256 << 10, ..Options::default() };
        let mut kernel = Kernel::new(options).map_err(|e| failed(&e))?;
        let record = self.run.open_record(device.minor).map_err(|e| failed(&e))?;
        let instance = u64::from(device.minor) + 1000;
        let params = LunParams {
            name: device.name.name.clone(),
            config: DeviceConfig { image: self.image.clone(), ..config.clone() },
            block_size: BlockSize::B512,
            capacity: MIB,
            write_cache: true,
            serial: Some(identity.serial.clone()),
            state_dir: Some(self.state_dir.clone()),
            neighbourhood: Default::default(),
            backend: Some(backend_from_env()),
            polling: false,
            device: kernel.device().map_err(|e| failed(&e))?.with_record(record, instance),
        };
        let file = ContinuedFile { path: self.run.continued_file(device.minor), device: instance };
        let lun = lun::start_where(params, Some(file))?;
        // The power on, and a write.
        kernel.execute(&[0; 6], Data::None).map_err(|e| failed(&e))?;
        let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
        let ended = kernel.execute(&write, Data::Out(&[7; 4096])).map_err(|e| failed(&e))?;
        assert_eq!(ended.status, 0);
        // What the LUN has of the kernel's side it keeps.
        Ok(Box::new(lun))
    }
}

struct Nobody;

impl Answers for Nobody {
    fn done(&self, _: Kind, _: u32, _: i32) -> Result<(), NetlinkError> {
        Ok(())
    }
}

/// Descriptors and threads of this process, and bytes of it that are in memory.
fn figures() -> (usize, usize, u64) {
    let entries = |of: &str| fs::read_dir(format!("/proc/self/{of}")).unwrap().count();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let resident = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10;
    (entries("fd"), entries("task"), resident)
}

/// Every file in a directory and below.
fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return BTreeSet::new() };
    let each = |path: PathBuf| if path.is_dir() { files(&path) } else { BTreeSet::from([path]) };
    entries.map(|e| e.unwrap().path()).flat_map(each).collect()
}

#[track_caller]
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_thousand_luns_that_come_and_go_leave_no_descriptor_no_thread_no_file_and_no_memory() {
    let cycles = if std::env::var("TCMU_DIF_SCALE").as_deref() == Ok("quick") { 300 } else { 1000 };
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::at(dir.path().join("run"));
    drop(run.lock().unwrap());
    let image = dir.path().join("disk.raw");
    fs::File::create(&image).unwrap().set_len(MIB).unwrap();
    let state_dir = dir.path().join("lib");
    let host = Arc::new(Embedded { run: run.clone(), image, state_dir });
    let registry = Registry::default();
    let _server = Server::listen(&dir.path().join("qmp.sock"), registry.clone()).unwrap();
    let uio = Uio::at(&dir.path().join("uio"), Path::new("/dev"));
    let mut devices = Devices::new(host, run.clone(), uio, Arc::new(Nobody), registry.clone(), |_| false);
    let mut settled = None;
    for i in 0..cycles {
        // Minor numbers come again, and names do not.
        let (minor, name) = (i % 7, format!("vm{i}"));
        let uio_name = format!("tcm-user/{minor}/{name}/dif//images/{name}.raw");
        let sysfs = dir.path().join(format!("uio/uio{minor}"));
        fs::create_dir_all(sysfs.join("maps/map0")).unwrap();
        fs::write(sysfs.join("name"), format!("{uio_name}\n")).unwrap();
        fs::write(sysfs.join("maps/map0/size"), "0x1000\n").unwrap();
        let event =
            |kind| Event { kind, device: UioName::parse(&uio_name), minor, device_id: minor, change: None };
        devices.hear(event(Kind::Added));
        until("online", || run.read(&name).unwrap().is_some_and(|s| s.state == Phase::Online));
        assert_eq!(registry.all().len(), 1);
        fs::remove_dir_all(sysfs).unwrap();
        devices.hear(event(Kind::Removed));
        until("gone", || {
            devices.tidy(Instant::now());
            run.read(&name).unwrap().is_none() && devices.is_empty() && devices.leaving() == 0
        });
        assert!(registry.all().is_empty());
        if i == 100 {
            settled = Some((figures(), files(dir.path())));
        }
    }
    let ((descriptors, threads, memory), there) = settled.unwrap();
    let (now_descriptors, now_threads, now_memory) = figures();
    let grown = now_memory.saturating_sub(memory);
    println!("{grown} bytes in {} cycles", cycles - 101);
    assert_eq!((now_descriptors, now_threads), (descriptors, threads));
    assert!(grown < 1024 * (u64::from(cycles) - 101), "{grown} bytes");
    assert_eq!(files(dir.path()), there);
    let run_files: Vec<_> =
        ["luns", "rings"].iter().flat_map(|folder| files(&run.path().join(folder))).collect();
    assert_eq!(run_files, Vec::<PathBuf>::new(), "a LUN that is gone has a file in the run directory");
}
