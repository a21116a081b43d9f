//! Intel's ISA-L, where Debian's `libisal2` is installed: the one to beat in `benches/guard.rs`, and a second opinion in tests.
//!
//! It is looked for when somebody asks, so that nothing of C is needed to build or to run. Nothing on the data path calls it.

use std::ffi::{CStr, c_void};

type Crc = unsafe extern "C" fn(u16, *const u8, u64) -> u16;
type CrcCopy = unsafe extern "C" fn(u16, *mut u8, *const u8, u64) -> u16;

/// `crc16_t10dif` and `crc16_t10dif_copy` of ISA-L 2.
#[derive(Debug, Clone, Copy)]
pub struct IsaL {
    crc: Crc,
    copy: CrcCopy,
}

impl IsaL {
    /// Loads the library, for good.
    pub fn load() -> Option<IsaL> {
        // SAFETY: the name is a C string; the library's constructors do nothing but choose functions by processor.
        let library = unsafe { libc::dlopen(c"libisal.so.2".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            return None;
        }
        let symbol = |name: &CStr| -> Option<*mut c_void> {
            // SAFETY: the handle is a library's, and is never closed.
            let at = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!at.is_null()).then_some(at)
        };
        let (crc, copy) = (symbol(c"crc16_t10dif")?, symbol(c"crc16_t10dif_copy")?);
        // SAFETY: these are the functions' signatures in `isa-l/crc.h` of every version 2.
        unsafe {
            Some(IsaL {
                crc: std::mem::transmute::<*mut c_void, Crc>(crc),
                copy: std::mem::transmute::<*mut c_void, CrcCopy>(copy),
            })
        }
    }

    /// The guard of a block.
    pub fn guard(&self, block: &[u8]) -> u16 {
        // SAFETY: the function reads as many bytes as it is told.
        unsafe { (self.crc)(0, block.as_ptr(), block.len() as u64) }
    }

    /// Copies a block and gives its guard.
    ///
    /// # Panics
    /// If the two are not of the same length.
    pub fn copy(&self, to: &mut [u8], from: &[u8]) -> u16 {
        assert_eq!(to.len(), from.len());
        // SAFETY: the function reads and writes as many bytes as it is told, and both have as many.
        unsafe { (self.copy)(0, to.as_mut_ptr(), from.as_ptr(), from.len() as u64) }
    }
}
