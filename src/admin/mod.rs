//! What an administrator asks for: a LUN made, a LUN taken down, those that are declared in files.
//!
//! The command line, QMP and the files of `/etc/tcmu-dif/luns.d` come together here: each gives an [`order::Order`] in the same words, and
//! [`create`] and [`delete`] do it through the kernel's configfs, or nothing at all. Called in the process of the command line, or in threads of
//! the daemon's that may wait.

pub mod config_check;
pub mod create;
pub mod declared;
pub mod delete;
mod error;
mod half;
pub mod handover;
pub mod host;
pub mod images;
mod inherited;
pub mod luns;
pub mod order;
mod owed;
pub mod receive;
pub mod standby;
pub mod way;

pub use error::Refusal;

use crate::{
    kernel::usage,
    pi::{PiMode, PiType},
    units::BlockSize,
};
use luns::Places;

/// Gives an image its first protection information: image, sidecar, what kind. No sidecar is left behind if it fails.
pub type Protect = fn(&std::path::Path, &std::path::Path, PiType, PiMode, BlockSize) -> Result<(), Refusal>;

/// One who makes LUNs and takes them down.
#[derive(Debug, Clone)]
pub struct Admin {
    /// Where.
    pub places: Places,
    /// How an image gets its first protection information.
    pub protect: Protect,
}

/// Refuses anybody but root.
///
/// # Errors
/// For anybody but root.
pub fn require_root(command: &str) -> Result<(), Refusal> {
    usage::require_root().map_err(|e| {
        Refusal::new(command, "", e.to_string()).then(format!("run it as root: sudo tcmu-dif {command} …"))
    })
}
