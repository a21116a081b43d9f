//! What a read or a write may wait for is part of its future, which is copied for each command: it has to stay small.

use std::mem::size_of_val;

use tcmu_dif::{sys::mem::Buffer, units::ByteOffset, volume::Volume};

use crate::support::{open, qemu_img};

#[test]
fn the_futures_of_the_data_path_stay_small() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]);
    tcmu_dif::sys::run(async move |io| {
        let image = open(&io, &path).await;
        let sg = Buffer::zeroed(4096).sg();
        let read = size_of_val(&image.read(ByteOffset(0), &sg));
        let write = size_of_val(&image.write(ByteOffset(0), &sg, Default::default()));
        let zero = size_of_val(&image.write_zeroes(ByteOffset(0), 4096, true));
        let map = size_of_val(&image.map_extents(ByteOffset(0), 4096));
        println!("bytes: read {read}, write {write}, zero {zero}, map {map}");
        assert!(read.max(write).max(zero).max(map) < 4096);
    });
}
