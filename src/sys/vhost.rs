//! `/dev/vhost-scsi`: the ioctls of `<linux/vhost.h>` that an initiator in user space needs, on memory that it owns.
//!
//! What the kernel is given is checked to lie inside one mapping that is kept alive as long as the descriptor, so that
//! nothing it writes can land anywhere else. Called by `peer/vhost`.

use std::{
    fs::{File, OpenOptions},
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
    rc::Rc,
};

use super::mem::Mapping;

/// Where the mapping begins in the addresses that descriptors carry ("guest physical").
pub const GUEST_BASE: u64 = 0x1000_0000;

/// VIRTIO_F_VERSION_1 (virtio 1.2, 6): little-endian rings, no legacy layout.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// VIRTIO_SCSI_F_T10_PI (virtio 1.2, 5.6.3): requests say how many bytes of protection information go before the data.
pub const VIRTIO_SCSI_F_T10_PI: u64 = 1 << 3;

const VHOST_SCSI_ABI_VERSION: i32 = 1;

#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: i32,
}

#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    desc_user_addr: u64,
    used_user_addr: u64,
    avail_user_addr: u64,
    log_guest_addr: u64,
}

#[repr(C)]
struct MemoryRegion {
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
    flags_padding: u64,
}

/// `struct vhost_memory` with its one region.
#[repr(C)]
struct Memory {
    nregions: u32,
    padding: u32,
    region: MemoryRegion,
}

#[repr(C)]
struct ScsiTarget {
    abi_version: i32,
    wwpn: [u8; 224],
    tpgt: u16,
    reserved: u16,
}

const _: () = {
    assert!(size_of::<VringState>() == 8 && size_of::<VringFile>() == 8);
    assert!(size_of::<VringAddr>() == 40);
    assert!(size_of::<MemoryRegion>() == 32 && size_of::<Memory>() == 40);
    assert!(size_of::<ScsiTarget>() == 232);
};

/// `_IOC` of `<asm-generic/ioctl.h>`, for VHOST_VIRTIO (0xAF).
const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xaf << 8 | number
}

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

const GET_FEATURES: u64 = ioc(READ, 0x00, 8);
const SET_FEATURES: u64 = ioc(WRITE, 0x00, 8);
const SET_OWNER: u64 = ioc(NONE, 0x01, 0);
/// The number counts the header of `struct vhost_memory` alone.
const SET_MEM_TABLE: u64 = ioc(WRITE, 0x03, 8);
const SET_VRING_NUM: u64 = ioc(WRITE, 0x10, size_of::<VringState>());
const SET_VRING_ADDR: u64 = ioc(WRITE, 0x11, size_of::<VringAddr>());
const SET_VRING_BASE: u64 = ioc(WRITE, 0x12, size_of::<VringState>());
const SET_VRING_KICK: u64 = ioc(WRITE, 0x20, size_of::<VringFile>());
const SET_VRING_CALL: u64 = ioc(WRITE, 0x21, size_of::<VringFile>());
const SET_VRING_ERR: u64 = ioc(WRITE, 0x22, size_of::<VringFile>());
const SCSI_SET_ENDPOINT: u64 = ioc(WRITE, 0x40, size_of::<ScsiTarget>());
const SCSI_CLEAR_ENDPOINT: u64 = ioc(WRITE, 0x41, size_of::<ScsiTarget>());
const SCSI_GET_ABI_VERSION: u64 = ioc(WRITE, 0x42, 4);

const _: () = assert!(GET_FEATURES == 0x8008_af00 && SCSI_SET_ENDPOINT == 0x40e8_af40);

/// Where the three parts of a split virtqueue lie, in bytes from the start of the mapping (virtio 1.2, 2.7).
#[derive(Debug, Clone, Copy)]
pub struct Vring {
    /// Descriptors: a power of two, at most 1024.
    pub num: u16,
    /// The descriptor table: 16 bytes each, aligned to 16.
    pub desc: u64,
    /// The available ring: 6 bytes and 2 each, aligned to 4 (so that flags and index are one word).
    pub avail: u64,
    /// The used ring: 6 bytes and 8 each, aligned to 4.
    pub used: u64,
}

/// An open `/dev/vhost-scsi` with its memory. Closing it ends what is in flight.
pub struct VhostScsi {
    file: File,
    memory: Rc<Mapping>,
    endpoint: Option<Box<ScsiTarget>>,
}

impl VhostScsi {
    /// Opens the device, makes this process its owner, and gives it the mapping (a whole number of pages) as its guest's memory.
    ///
    /// # Errors
    /// ENOENT or ENODEV without the module, EACCES, and what the ioctls say.
    pub fn open(memory: Rc<Mapping>) -> io::Result<VhostScsi> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/vhost-scsi")?;
        let dev = VhostScsi { file, memory, endpoint: None };
        let mut abi = 0i32;
        dev.ioctl(SCSI_GET_ABI_VERSION, &mut abi)?;
        if abi > VHOST_SCSI_ABI_VERSION {
            return Err(io::Error::other(format!("vhost-scsi speaks ABI version {abi}")));
        }
        // SAFETY: SET_OWNER takes no argument.
        check(unsafe { libc::ioctl(dev.file.as_raw_fd(), SET_OWNER as _, 0) })?;
        let region = MemoryRegion {
            guest_phys_addr: GUEST_BASE,
            memory_size: dev.memory.len() as u64,
            userspace_addr: dev.memory.base() as u64,
            flags_padding: 0,
        };
        dev.ioctl(SET_MEM_TABLE, &mut Memory { nregions: 1, padding: 0, region })?;
        Ok(dev)
    }

    /// The feature bits that the kernel offers.
    ///
    /// # Errors
    /// What the ioctl says.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0u64;
        self.ioctl(GET_FEATURES, &mut features)?;
        Ok(features)
    }

    /// Settles the feature bits.
    ///
    /// # Errors
    /// EOPNOTSUPP for a bit that was not offered.
    pub fn set_features(&self, mut features: u64) -> io::Result<()> {
        self.ioctl(SET_FEATURES, &mut features)
    }

    /// Sets a virtqueue up, empty, with the eventfds for kicks, completions and errors.
    ///
    /// # Errors
    /// EINVAL for a queue that does not lie in the mapping, and what the ioctls say.
    pub fn set_vring(
        &self,
        index: u32,
        ring: Vring,
        kick: BorrowedFd<'_>,
        call: BorrowedFd<'_>,
        err: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let num = u64::from(ring.num);
        let parts = [(ring.desc, 16 * num, 16), (ring.avail, 6 + 2 * num, 4), (ring.used, 6 + 8 * num, 4)];
        for (at, len, align) in parts {
            let inside = at.checked_add(len).is_some_and(|end| end <= self.memory.len() as u64);
            if !inside || !at.is_multiple_of(align) {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
        }
        let base = self.memory.base() as u64;
        self.ioctl(SET_VRING_NUM, &mut VringState { index, num: num as u32 })?;
        self.ioctl(SET_VRING_BASE, &mut VringState { index, num: 0 })?;
        let mut addr = VringAddr {
            index,
            flags: 0,
            desc_user_addr: base + ring.desc,
            used_user_addr: base + ring.used,
            avail_user_addr: base + ring.avail,
            log_guest_addr: 0,
        };
        self.ioctl(SET_VRING_ADDR, &mut addr)?;
        for (number, fd) in [(SET_VRING_CALL, call), (SET_VRING_ERR, err), (SET_VRING_KICK, kick)] {
            self.ioctl(number, &mut VringFile { index, fd: fd.as_raw_fd() })?;
        }
        Ok(())
    }

    /// Connects to the target with that WWN (`naa.…`, at most 223 bytes).
    ///
    /// # Errors
    /// EEXIST if somebody else is connected, ENODEV if there is no such target with a nexus.
    pub fn set_endpoint(&mut self, wwpn: &str) -> io::Result<()> {
        let mut target = Box::new(ScsiTarget {
            abi_version: VHOST_SCSI_ABI_VERSION,
            wwpn: [0; 224],
            tpgt: 0,
            reserved: 0,
        });
        let name = wwpn.as_bytes();
        if name.len() >= target.wwpn.len() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        target.wwpn[..name.len()].copy_from_slice(name);
        self.ioctl(SCSI_SET_ENDPOINT, &mut *target)?;
        self.endpoint = Some(target);
        Ok(())
    }

    fn ioctl<T>(&self, number: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller in this file passes the struct that the number stands for, which lives through the call;
        // the addresses in it lie in the mapping that `self` keeps.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), number as _, argument as *mut T) })
    }
}

impl Drop for VhostScsi {
    fn drop(&mut self) {
        if let Some(mut target) = self.endpoint.take() {
            // Closing the descriptor does the same; this way the target is free as soon as we return.
            let _ = self.ioctl(SCSI_CLEAR_ENDPOINT, &mut *target);
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
