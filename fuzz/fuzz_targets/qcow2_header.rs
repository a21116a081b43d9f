//! The head of a qcow2 image: facts or an error, and never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu_dif::image::qcow2::probe_header;

fuzz_target!(|data: &[u8]| {
    // A valid version 3 header with the input laid over it from byte 8 on, so that the magic number is passed.
    let mut head = vec![0u8; 512.max(8 + data.len())];
    head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    head[23] = 16;
    head[103] = 104;
    head[8..8 + data.len()].copy_from_slice(data);
    let _ = probe_header(&head);
});
