//! Faults on purpose, in a build for the VM suite alone: the feature `fault-points`, which is in no package.

/// A fault that is met when this file is there, and takes it away: it is met once.
const ARMED: &str = "/run/tcmu-dif/fault-point";

/// Panics in the midst of a command with the vendor specific operation code C0h, if the fault is armed.
pub(super) fn meet(cdb: &[u8]) {
    let met = cdb.first() == Some(&0xc0) && std::fs::remove_file(ARMED).is_ok();
    assert!(!met, "a fault point was met");
}
