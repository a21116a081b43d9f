//! The mailbox ring of target_core_user: bytes from the kernel become checked commands, and answers go back.
//!
//! [`device`] is what a ring is made of (a mapping and two doorbells), [`entry`] parses one entry, [`Ring`] walks them and
//! completes out of order, [`reply`] sees to it that each command is answered exactly once, and [`record`] that this holds when
//! the process is killed. Every offset and length
//! from the shared memory is checked before use, entries are copied out before they are parsed, and an entry that makes no
//! sense is a [`RingError`]: the device is faulted, and nothing panics.
//!
//! ABI: `<linux/target_core_user.h>`, mailbox version 2.

pub mod device;
pub mod entry;
pub mod foreign;
pub mod record;
pub mod reply;
mod walk;

#[cfg(test)]
mod record_tests;
#[cfg(test)]
mod tests;

pub use device::Device;
pub use entry::{Command, Entry, Tmr};
pub use record::Once;
pub use reply::{Completion, Reply};
pub use walk::{Calls, Capabilities, Ring};

/// What is wrong with a ring. The device that it belongs to takes no more commands.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The region cannot be mapped.
    #[error("the ring cannot be mapped ({len} bytes)")]
    Map {
        /// Bytes that were asked for.
        len: usize,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A doorbell cannot be used.
    #[error("the ring's doorbell failed")]
    Doorbell(#[source] std::io::Error),
    /// The in-flight record cannot be kept.
    #[error("the in-flight record cannot be kept")]
    Record(#[source] std::io::Error),
    /// The in-flight record is another version's, and what it knows would be needed.
    #[error(
        "the in-flight record is of version {found}, and this program knows {}: which of the commands in the ring are unanswered cannot be told",
        record::VERSION
    )]
    RecordVersion {
        /// Its version.
        found: u8,
    },
    /// Another mailbox than the one that we speak.
    #[error("mailbox version {found}: only version {} is understood", tcmu_sys::TCMU_MAILBOX_VERSION)]
    Version {
        /// The version found.
        found: u16,
    },
    /// The mailbox contradicts itself or the size of the region.
    #[error("broken mailbox: {field} is {value}, and the region has {len} bytes")]
    Mailbox {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Bytes of the region.
        len: u64,
    },
    /// An entry makes no sense.
    #[error("broken ring entry at {at}: {what} {value}")]
    Entry {
        /// Bytes from the start of the ring.
        at: u32,
        /// What is wrong.
        what: &'static str,
        /// The value found.
        value: u64,
    },
}

impl From<foreign::RecordError> for RingError {
    fn from(e: foreign::RecordError) -> RingError {
        match e {
            foreign::RecordError::Io(e) => RingError::Record(e),
            foreign::RecordError::Version(found) => RingError::RecordVersion { found },
        }
    }
}
