//! An entry of the ring, mostly valid: a command inside its bounds, or an error. Never a panic or a byte outside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tcmu_dif::{
    peer::kernel::{Kernel, Options},
    ring::{Completion, Entry, Ring},
};

fuzz_target!(|data: &[u8]| {
    // Pairs of a place and a byte, laid over a valid WRITE(10) of one iovec.
    let mut entry = [0u8; 128];
    entry[..4].copy_from_slice(&(128u32 | 1).to_le_bytes());
    (entry[4], entry[8], entry[112]) = (1, 1, 0x2a);
    entry[24..32].copy_from_slice(&(128u64 + 112).to_le_bytes());
    entry[48..56].copy_from_slice(&(128u64 + 1024).to_le_bytes());
    entry[56..64].copy_from_slice(&512u64.to_le_bytes());
    for change in data.chunks_exact(2) {
        entry[usize::from(change[0]) % 128] = change[1];
    }
    let options = Options { cmdr_size: 1024, data_size: 64 << 10, ..Options::default() };
    let Ok(mut kernel) = Kernel::new(options) else { return };
    let Ok(mut ring) = kernel.device().map_err(drop).and_then(|d| Ring::attach(d).map_err(drop)) else { return };
    if kernel.submit_raw(&entry, None).is_err() {
        return;
    }
    for _ in 0..32 {
        match ring.take_entry() {
            Ok(Some((entry, reply))) => {
                if let Entry::Command(command) = entry {
                    command.data.fill(0, command.data.len(), 0xa5);
                }
                reply.into_iter().for_each(|r| r.answer(Completion::status(0)));
            }
            Ok(None) | Err(_) => break,
        }
    }
    let _ = ring.publish();
});
