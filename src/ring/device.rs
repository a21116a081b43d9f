//! What a ring is made of: a region to map, a descriptor that becomes readable when the kernel has put something in,
//! and one that tells the kernel that something is done. A UIO device is all three; the embedded kernel has eventfds.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
};

use tcmu_sys::{Mailbox, TCMU_MAILBOX_FLAG_CAP_DIF};

use super::{
    RingError,
    record::{Record, RingId},
};
use crate::sys::mem::Mapping;

/// A TCMU device that is not attached yet; it can be sent to the thread that will own it.
#[derive(Debug)]
pub struct Device {
    pub(super) memory: File,
    pub(super) len: usize,
    pub(super) wait: OwnedFd,
    pub(super) kick: OwnedFd,
    /// Bytes that a doorbell takes: 4 for UIO, 8 for an eventfd.
    pub(super) width: usize,
    /// The in-flight record, and the number of this instance of the device.
    pub(super) record: Option<(File, u64)>,
}

impl Device {
    /// Opens `/dev/uioN`, whose map 0 has `len` bytes (`/sys/class/uio/uioN/maps/map0/size`).
    ///
    /// # Errors
    /// What the kernel says to opening the node.
    pub fn open_uio(path: &Path, len: usize) -> io::Result<Device> {
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        let wait = memory.as_fd().try_clone_to_owned()?;
        let kick = memory.as_fd().try_clone_to_owned()?;
        Ok(Device { memory, len, wait, kick, width: 4, record: None })
    }

    /// A device of the embedded kernel: shared memory and two eventfds.
    pub fn embedded(memory: File, len: usize, wait: OwnedFd, kick: OwnedFd) -> Device {
        Device { memory, len, wait, kick, width: 8, record: None }
    }

    /// Keeps the in-flight record in that file, from the attaching on; what a predecessor left there is taken up. `instance` tells this
    /// device from all others since boot.
    #[must_use]
    pub fn with_record(mut self, file: File, instance: u64) -> Device {
        self.record = Some((file, instance));
        self
    }

    /// Whether it is known which of the entries in the ring are unanswered: there are none, or the record of the handler that
    /// was here before says it.
    ///
    /// # Errors
    /// If the region or the record cannot be mapped, and if the record is another version's.
    pub fn is_resumable(&self) -> Result<bool, RingError> {
        // The kernel maps the whole region or nothing.
        let len = self.len;
        let map = Mapping::new(&self.memory, len).map_err(|source| RingError::Map { len, source })?;
        if map.load_acquire(HEAD) == map.load_acquire(TAIL) {
            return Ok(true);
        }
        let Some((file, instance)) = &self.record else { return Ok(false) };
        let mut words = [0; 8];
        let at = std::mem::offset_of!(Mailbox, cmdr_off) as u64;
        if !map.read(at, &mut words) {
            return Ok(false);
        }
        let word = |at: usize| u32::from_le_bytes([words[at], words[at + 1], words[at + 2], words[at + 3]]);
        let id = RingId { device: *instance, cmdr_off: word(0), cmdr_size: word(4) };
        let file = file.try_clone().map_err(RingError::Record)?;
        Ok(Record::knows(file, id, &map)?)
    }

    /// Whether the kernel delivers protection information (`iov_dif`): see [`TCMU_MAILBOX_FLAG_CAP_DIF`].
    ///
    /// # Errors
    /// If the region cannot be mapped.
    pub fn carries_dif(&self) -> Result<bool, RingError> {
        let len = self.len;
        let map = Mapping::new(&self.memory, len).map_err(|source| RingError::Map { len, source })?;
        let mut flags = [0; 2];
        let read = map.read(std::mem::offset_of!(Mailbox, flags) as u64, &mut flags);
        Ok(read && u32::from(u16::from_le_bytes(flags)) & TCMU_MAILBOX_FLAG_CAP_DIF != 0)
    }
}

pub(super) const HEAD: u64 = std::mem::offset_of!(Mailbox, cmd_head) as u64;
pub(super) const TAIL: u64 = std::mem::offset_of!(Mailbox, cmd_tail) as u64;
