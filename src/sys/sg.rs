//! SCSI commands through a `/dev/sgN` (or the node of a block device): the SG_IO ioctl of `<scsi/sg.h>`.
//!
//! One command at a time, its buffers borrowed for the call. Called by `conformance`.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
    path::Path,
    time::Duration,
};

/// Bytes of sense data that are asked for, and that CDBs have at most.
const SENSE_LEN: usize = 96;
const SG_IO: libc::c_ulong = 0x2285;
const SG_DXFER_NONE: i32 = -1;
const SG_DXFER_TO_DEV: i32 = -2;
const SG_DXFER_FROM_DEV: i32 = -3;

/// `struct sg_io_hdr`.
#[repr(C)]
struct Header {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut u8,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<Header>() == 88);

/// What a command moves.
#[derive(Debug)]
pub enum Data<'a> {
    /// Nothing.
    None,
    /// Bytes to the device.
    Out(&'a [u8]),
    /// Room for bytes from the device.
    In(&'a mut [u8]),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// SAM-5 status.
    pub status: u8,
    /// Sense data.
    pub sense: Vec<u8>,
    /// Bytes of the transfer that were not moved.
    pub residual: usize,
}

/// An open SCSI device.
#[derive(Debug)]
pub struct SgDevice {
    file: File,
}

impl SgDevice {
    /// Opens the node.
    ///
    /// # Errors
    /// What `open` says.
    pub fn open(path: &Path) -> io::Result<SgDevice> {
        Ok(SgDevice { file: OpenOptions::new().read(true).write(true).open(path)? })
    }

    /// Sends one command and waits for it.
    ///
    /// # Errors
    /// What the ioctl says (ENOTTY: no SCSI device), and EIO if the host adapter could not deliver the command.
    pub fn execute(&self, cdb: &[u8], data: Data<'_>, timeout: Duration) -> io::Result<Answer> {
        let (direction, dxferp, len) = match data {
            Data::None => (SG_DXFER_NONE, std::ptr::null_mut(), 0),
            // The kernel only reads what goes to the device.
            Data::Out(bytes) => (SG_DXFER_TO_DEV, bytes.as_ptr().cast_mut(), bytes.len()),
            Data::In(room) => (SG_DXFER_FROM_DEV, room.as_mut_ptr(), room.len()),
        };
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let mut sense = [0u8; SENSE_LEN];
        let mut header = Header {
            interface_id: i32::from(b'S'),
            dxfer_direction: if len == 0 { SG_DXFER_NONE } else { direction },
            cmd_len: u8::try_from(cdb.len()).map_err(|_| invalid())?,
            mx_sb_len: SENSE_LEN as u8,
            iovec_count: 0,
            dxfer_len: u32::try_from(len).map_err(|_| invalid())?,
            dxferp,
            cmdp: cdb.as_ptr(),
            sbp: sense.as_mut_ptr(),
            timeout: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
            flags: 0,
            pack_id: 0,
            usr_ptr: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            msg_status: 0,
            sb_len_wr: 0,
            host_status: 0,
            driver_status: 0,
            resid: 0,
            duration: 0,
            info: 0,
        };
        // SAFETY: the header's pointers are to the CDB, the data and the sense buffer, of the lengths it says, and all of
        // them outlive the call, which returns when the command is done; the kernel writes into data only for In.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), SG_IO, &raw mut header) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        if header.host_status != 0 {
            return Err(io::Error::other(format!(
                "the host adapter could not deliver the command (host status {:#x})",
                header.host_status
            )));
        }
        let sense_len = usize::from(header.sb_len_wr).min(SENSE_LEN);
        Ok(Answer {
            status: header.status,
            sense: sense[..sense_len].to_vec(),
            residual: usize::try_from(header.resid).unwrap_or(0).min(len),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_scsi_device_is_an_error() {
        let device = SgDevice::open(Path::new("/dev/null")).unwrap();
        let refused = device.execute(&[0; 6], Data::None, Duration::from_secs(1));
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
