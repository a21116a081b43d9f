//! A huge qcow2 image (64 TiB) with an L2 table for every 512 MiB, in a file that is nearly all holes.

use std::{fs::File, os::unix::fs::FileExt, path::Path, process::Command};

/// Bytes of the guest's disk.
pub const SIZE: u64 = 64 << 40;
const CLUSTER: u64 = 64 << 10;
/// Where the L2 tables lie, side by side.
const FIRST: u64 = 1 << 30;

/// Makes one of `size` bytes. Nothing counts the tables, so it is for opening and reading alone.
pub fn make(path: &Path, size: u64) {
    let tables = size / (CLUSTER / 8 * CLUSTER);
    let size = size.to_string();
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size).status();
    assert!(made.expect("qemu-img cannot be run: apt-get install qemu-utils").success());
    let file = File::options().read(true).write(true).open(path).expect("it has just been made");
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 40).expect("it has a header");
    let entries: Vec<u8> =
        (0..tables).flat_map(|i| (1 << 63 | (FIRST + i * CLUSTER)).to_be_bytes()).collect();
    file.write_all_at(&entries, u64::from_be_bytes(word)).expect("it has an L1 table");
    file.set_len(FIRST + tables * CLUSTER).expect("the file system takes holes");
}
