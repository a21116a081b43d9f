//! Many LUNs in one process, and LUNs that come and go: what they cost, and that nothing of them stays behind.
//!
//! The figures are the process's own, from /proc/self, so the tests here take turns.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tcmu_dif::{
    lun::{LunHandle, LunParams, config::DeviceConfig, start},
    peer::kernel::{Data, Kernel, Options},
    sys::backend_from_env,
    units::BlockSize,
};

const MIB: u64 = 1 << 20;

fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn entries(of: &str) -> usize {
    fs::read_dir(format!("/proc/self/{of}")).unwrap().count()
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// How often the LUNs' threads, and those that do their I/O, have gone to sleep.
fn sleeps() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let status = tasks.map(|t| fs::read_to_string(t.unwrap().path().join("status")).unwrap_or_default());
    let of_luns = status
        .filter(|s| ["lun-", "io\n", "iou-"].iter().any(|name| s.starts_with(&format!("Name:\t{name}"))));
    of_luns
        .map(|s| {
            s.lines()
                .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok())
                .unwrap_or(0)
        })
        .sum()
}

/// A LUN over a sparse image; the kernel's side has a small ring, because that is not what is measured.
fn lun(dir: &Path, i: usize) -> (Kernel, LunHandle) {
    let image = dir.join(format!("{i}.raw"));
    fs::File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let options = Options { cmdr_size: 16 << 10, data_size: 256 << 10, ..Options::default() };
    let mut kernel = Kernel::new(options).unwrap();
    let lun = start(LunParams {
        name: format!("{i}"),
        config: DeviceConfig::new(&image),
        block_size: BlockSize::B512,
        capacity: 4 * MIB,
        write_cache: true,
        serial: Some(format!("serial{i}")),
        state_dir: None,
        backend: Some(backend_from_env()),
        polling: true,
        neighbourhood: Default::default(),
        device: kernel.device().unwrap(),
    })
    .unwrap();
    // The unit attention of a power on; then a write, so that all is there that a LUN needs to serve.
    kernel.execute(&[0; 6], Data::None).unwrap();
    let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    assert_eq!(kernel.execute(&write, Data::Out(&[7; 4096])).unwrap().status, 0);
    (kernel, lun)
}

/// LUNs that the figures are of.
const MANY: usize = 256;

/// Has the process have as many descriptors as it may, and says what is missing if [`MANY`] LUNs with their kernels' sides need more.
fn make_room() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let needed = (MANY * 24 + 64) as u64;
    // None is no limit.
    if current.is_some_and(|soft| soft < needed) {
        let hard = maximum.unwrap_or(u64::MAX);
        assert!(
            hard >= needed,
            "{MANY} LUNs need {needed} descriptors, and this process may have {hard}; next: raise the hard limit (ulimit -Hn {needed}, as root)"
        );
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    }
}

#[test]
fn an_idle_lun_takes_less_than_a_mebibyte_and_wakes_up_for_nothing() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let count = MANY;
    make_room();
    // The first brings what all share.
    let first = lun(dir.path(), count);
    let (memory, descriptors, threads) = (resident(), entries("fd"), entries("task"));
    let luns: Vec<_> = (0..count).map(|i| lun(dir.path(), i)).collect();
    let each = |now: usize, before: usize| now.saturating_sub(before) as f64 / count as f64;
    let per_lun = resident().saturating_sub(memory) / count as u64;
    println!(
        "{count} LUNs on {}: {} KiB, {:.1} descriptors, {:.1} threads each, the embedded kernel's side included",
        backend_from_env(),
        per_lun >> 10,
        each(entries("fd"), descriptors),
        each(entries("task"), threads)
    );
    assert!(per_lun < MIB, "{per_lun} bytes");
    // Whoever still spins comes to rest.
    std::thread::sleep(Duration::from_millis(300));
    let before = sleeps();
    std::thread::sleep(Duration::from_secs(1));
    let woken = sleeps() - before;
    println!("{woken} wake-ups of {count} idle LUNs in a second");
    assert!(woken <= count as u64 / 8, "{woken} wake-ups");
    luns.into_iter().chain([first]).for_each(|(_, lun)| lun.stop().unwrap());
}

#[test]
fn luns_that_come_and_go_leave_no_descriptor_no_thread_and_no_memory() {
    let _turn = turn();
    let cycles = if std::env::var("TCMU_DIF_SCALE").as_deref() == Ok("quick") { 300 } else { 1000 };
    let dir = tempfile::tempdir().unwrap();
    let mut settled = None;
    for i in 0..cycles {
        let (kernel, lun) = lun(dir.path(), 0);
        lun.stop().unwrap();
        drop(kernel);
        if i == 100 {
            settled = Some((entries("fd"), entries("task"), resident()));
        }
    }
    let (descriptors, threads, memory) = settled.unwrap();
    let grown = resident().saturating_sub(memory);
    println!("{} bytes in {} cycles", grown, cycles - 101);
    assert_eq!((entries("fd"), entries("task")), (descriptors, threads));
    // A quarter of a page for each: what stays behind of a LUN's thread, ring or image would be more.
    assert!(grown < 1024 * (cycles as u64 - 101), "{grown} bytes");
}
