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

use super::RingError;
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
        Ok(Device { memory, len, wait, kick, width: 4 })
    }

    /// A device of the embedded kernel: shared memory and two eventfds.
    pub fn embedded(memory: File, len: usize, wait: OwnedFd, kick: OwnedFd) -> Device {
        Device { memory, len, wait, kick, width: 8 }
    }

    /// Whether entries lie in the ring that no handler has released: after a crash they were perhaps answered, perhaps not.
    ///
    /// # Errors
    /// If the region cannot be mapped.
    pub fn has_unreleased_entries(&self) -> Result<bool, RingError> {
        // The kernel maps the whole region or nothing.
        let len = self.len;
        let map = Mapping::new(&self.memory, len).map_err(|source| RingError::Map { len, source })?;
        Ok(map.load_acquire(HEAD) != map.load_acquire(TAIL))
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
