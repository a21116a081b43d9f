//! The ABI of `<linux/target_core_user.h>` (TCMU 2.0), as bindgen gives it.
//!
//! `bindings.rs` is generated and checked in, so that a plain build needs no libclang. The assertions below
//! and those that bindgen writes stop the build if a layout is not the kernel's.
//! Bindgen's C types stand for an x86-64 or aarch64 Linux; a big-endian or 32-bit host does not build.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs)]
#![allow(clippy::all, unsafe_op_in_unsafe_fn, unnecessary_transmutes)]

mod bindings;
pub use bindings::*;

/// The generated file, for the check that the checked-in one is the same.
#[cfg(feature = "bindgen")]
pub const GENERATED: &str = include_str!(env!("TCMU_SYS_GENERATED"));

#[cfg(not(all(target_os = "linux", target_endian = "little", target_pointer_width = "64")))]
compile_error!("tcmu-sys describes the ABI of 64-bit little-endian Linux");

/// A mailbox flag of our own change to the kernel (`vendor/linux/`), in no released kernel: commands with protection information
/// carry it in iovecs of its own, which stand last in the entry and are counted in `iov_dif_cnt`; `iov_cnt` covers the data alone.
/// A kernel without it drops such protection information, and its data length may count bytes that nobody filled.
pub const TCMU_MAILBOX_FLAG_CAP_DIF: u32 = 1 << 4;

/// `struct tcmu_mailbox` with its fields: `cmd_tail` has a cache line of its own.
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy)]
pub struct Mailbox {
    pub version: u16,
    pub flags: u16,
    /// Bytes from the start of the mapping to the command ring.
    pub cmdr_off: u32,
    /// Bytes of the command ring.
    pub cmdr_size: u32,
    /// Written by the kernel: bytes from the start of the ring, modulo its size.
    pub cmd_head: u32,
    _own_line: [u8; 48],
    /// Written by the handler, like `cmd_head`.
    pub cmd_tail: u32,
    _rest: [u8; 60],
}

/// The fixed part of a `TCMU_OP_CMD` entry as the kernel writes it; `iov_cnt + iov_bidi_cnt + iov_dif_cnt`
/// [`IoVec`]s follow at once.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy)]
pub struct CmdRequest {
    pub hdr: tcmu_cmd_entry_hdr,
    pub iov_cnt: u32,
    pub iov_bidi_cnt: u32,
    pub iov_dif_cnt: u32,
    _align: u32,
    /// Bytes from the start of the mapping to the CDB, which lies in the same entry, behind the iovecs.
    pub cdb_off: u64,
    pub __pad1: u64,
    pub __pad2: u64,
}

/// The same entry as the handler leaves it.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy)]
pub struct CmdResponse {
    pub hdr: tcmu_cmd_entry_hdr,
    pub scsi_status: u8,
    pub __pad1: u8,
    pub __pad2: u16,
    /// Bytes of data-in, read by the kernel with `TCMU_UFLAG_READ_LEN`.
    pub read_len: u32,
    pub sense_buffer: [u8; TCMU_SENSE_BUFFERSIZE as usize],
}

/// The fixed part of a `TCMU_OP_TMR` entry; `cmd_cnt` command ids of two bytes follow.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy)]
pub struct TmrEntry {
    pub hdr: tcmu_cmd_entry_hdr,
    pub tmr_type: u8,
    pub __pad1: u8,
    pub __pad2: u16,
    pub cmd_cnt: u32,
    pub __pad3: u64,
    pub __pad4: u64,
}

/// `struct iovec` as it stands in the ring: the base is an offset into the mapping.
#[repr(C, packed)]
#[derive(Debug, Clone, Copy)]
pub struct IoVec {
    pub base: u64,
    pub len: u64,
}

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    const fn same(rust: usize, c: core::ffi::c_uint) {
        assert!(rust == c as usize);
    }
    same(offset_of!(Mailbox, cmd_head), OFFSET_MAILBOX_CMD_HEAD);
    same(offset_of!(Mailbox, cmd_tail), OFFSET_MAILBOX_CMD_TAIL);
    assert!(size_of::<Mailbox>() == size_of::<tcmu_mailbox>());
    assert!(align_of::<Mailbox>() == ALIGN_SIZE as usize);
    same(offset_of!(CmdRequest, iov_cnt), OFFSET_REQ_IOV_CNT);
    same(offset_of!(CmdRequest, iov_bidi_cnt), OFFSET_REQ_IOV_BIDI_CNT);
    same(offset_of!(CmdRequest, iov_dif_cnt), OFFSET_REQ_IOV_DIF_CNT);
    same(offset_of!(CmdRequest, cdb_off), OFFSET_REQ_CDB_OFF);
    same(size_of::<CmdRequest>(), OFFSET_REQ_IOV);
    same(offset_of!(CmdResponse, scsi_status), OFFSET_RSP_SCSI_STATUS);
    same(offset_of!(CmdResponse, read_len), OFFSET_RSP_READ_LEN);
    same(offset_of!(CmdResponse, sense_buffer), OFFSET_RSP_SENSE_BUFFER);
    // The response is the larger arm of the union.
    assert!(size_of::<CmdResponse>() == size_of::<tcmu_cmd_entry>());
    same(offset_of!(TmrEntry, tmr_type), OFFSET_TMR_TYPE);
    same(offset_of!(TmrEntry, cmd_cnt), OFFSET_TMR_CMD_CNT);
    same(size_of::<TmrEntry>(), OFFSET_TMR_CMD_IDS);
    assert!(size_of::<IoVec>() == 16);
};

#[cfg(all(test, feature = "bindgen"))]
mod tests {
    #[test]
    fn the_checked_in_bindings_are_what_bindgen_gives() {
        assert_eq!(super::GENERATED, include_str!("bindings.rs"));
    }
}
