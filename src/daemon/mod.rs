//! The daemon: answers the kernel, and starts and stops LUNs.
//!
//! One loop ([`serve`]) hears netlink, signals and a timer, and does nothing that could wait. Each device has a worker
//! ([`worker`]) that may: it opens the image, resizes, closes. What a LUN is doing stands in a file under /run
//! ([`rundir`]), which is how the command line learns of it; the service manager is told by [`systemd`].

mod beside;
pub mod declaring;
mod descriptors;
pub mod devices;
pub mod held;
pub mod known;
pub mod pauses;
pub mod real;
pub mod resize;
pub mod rundir;
pub mod serve;
pub mod settings;
pub mod systemd;
pub mod worker;

#[cfg(test)]
mod cycles_tests;
