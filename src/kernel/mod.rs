//! The control side of target_core_user: netlink events, configfs objects, UIO discovery.
//!
//! Two callers: the daemon listens ([`netlink`]) and looks devices up ([`uio`]); `create`, `delete` and their kin build and
//! take down what the kernel exports ([`backstore`], [`fabric`], over [`tree`]), and ask who uses it ([`usage`]).

pub mod alua;
pub mod backstore;
pub mod dif;
pub mod fabric;
pub mod forestall;
pub mod leftover;
pub mod modules;
pub mod names;
pub mod netlink;
pub mod reservations;
pub mod tree;
pub mod uio;
pub mod undo;
pub mod usage;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod fake_reservations;
#[cfg(test)]
mod tests;

/// Where sysfs is mounted.
pub const SYSFS: &str = "/sys";

/// Where the kernel's configfs is mounted.
pub const CONFIGFS: &str = "/sys/kernel/config";
