//! What the storage beneath a file does with a write when the power fails.

use std::{
    fs::File,
    os::unix::fs::{FileTypeExt, MetadataExt},
};

/// No storage has smaller sectors.
const SECTOR: u32 = 512;
/// Beyond one page of the page cache a write goes to the disk in pieces.
const PAGE: u32 = 4096;

/// Bytes of an aligned piece of the file that power loss leaves old or new as a whole, if nothing of its page is on its way
/// to the disk when it is written. 0 if there are none.
///
/// That is the disk's physical block, as the kernel reports it (it takes NVMe's AWUPF into account), as far as the file system
/// keeps to it, and a page at most. Of a file system without a disk of its own (NFS, overlayfs, btrfs) no more is known than that a sector
/// is a sector. Persistent memory has none.
pub(super) fn atomic_unit(file: &File) -> u32 {
    let Ok(meta) = file.metadata() else { return 0 };
    let device = meta.file_type().is_block_device();
    let number = if device { meta.rdev() } else { meta.dev() };
    let base = format!("/sys/dev/block/{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let read = |name: &str| -> Option<u32> {
        std::fs::read_to_string(format!("{base}/{name}")).ok()?.trim().parse().ok()
    };
    // A partition has its disk's queue.
    let of_queue = |name: &str| read(&format!("queue/{name}")).or_else(|| read(&format!("../queue/{name}")));
    if of_queue("dax") == Some(1) {
        return 0;
    }
    let shifted = read("alignment_offset").unwrap_or(0) != 0;
    let physical = of_queue("physical_block_size").filter(|n| n.is_power_of_two() && !shifted);
    let file_system = if device { PAGE } else { u32::try_from(meta.blksize()).unwrap_or(PAGE) };
    unit(physical, file_system)
}

fn unit(physical: Option<u32>, file_system: u32) -> u32 {
    let file_system = if file_system.is_power_of_two() { file_system } else { SECTOR };
    physical.unwrap_or(SECTOR).min(file_system).clamp(SECTOR, PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_of_disk_file_system_and_page_is_what_stays_whole() {
        assert_eq!(unit(Some(4096), 4096), 4096);
        assert_eq!(unit(Some(512), 4096), 512);
        assert_eq!(unit(Some(16384), 65536), 4096);
        assert_eq!(unit(Some(4096), 1024), 1024);
        assert_eq!(unit(None, 4096), 512);
        assert_eq!(unit(Some(4096), 3000), 512);
    }
}
