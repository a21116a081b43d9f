//! The qcow2 driver, from outside: random work against a model on files and on a simulated disk that is cut, failed and
//! damaged, with qemu-img as the judge. `TCMU_DIF_SCALE` (quick, default, full) sets how long.
#![allow(clippy::unwrap_used)] // A test may panic.
#![allow(missing_docs)]

#[path = "qcow2/atomic.rs"]
mod atomic;
#[path = "qcow2/atomic_pi.rs"]
mod atomic_pi;
#[path = "qcow2/bitmaps.rs"]
mod bitmaps;
#[path = "qcow2/crash.rs"]
mod crash;
#[path = "qcow2/damage.rs"]
mod damage;
#[path = "qcow2/gallery.rs"]
mod gallery;
#[path = "qcow2/hostile.rs"]
mod hostile;
#[path = "qcow2/kill.rs"]
mod kill;
#[path = "qcow2/model.rs"]
mod model;
#[path = "qcow2/sim.rs"]
mod sim;
#[path = "qcow2/sizes.rs"]
mod sizes;
#[path = "qcow2/snapshot_crash.rs"]
mod snapshot_crash;
#[path = "qcow2/snapshot_order.rs"]
mod snapshot_order;
#[path = "qcow2/snapshots.rs"]
mod snapshots;
#[path = "qcow2/support.rs"]
mod support;
#[path = "qcow2/tools.rs"]
mod tools;
#[path = "qcow2/walk.rs"]
mod walk;
#[path = "qcow2/work.rs"]
mod work;
#[path = "qcow2/workload.rs"]
mod workload;
