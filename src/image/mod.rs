//! Images: raw files, block devices and qcow2, and the one way to open them.
pub mod qcow2;
