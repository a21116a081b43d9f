//! A snapshot as it is told of: QEMU's SnapshotInfo, which is also what `qemu-img info --output=json` shows.

use serde::Serialize;

use super::Snapshot;

/// A snapshot as QEMU tells of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its ID, a number in words.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// When it was taken: seconds since 1970,
    pub date_sec: u32,
    /// and nanoseconds.
    pub date_nsec: u32,
    /// How long the VM had run: seconds,
    pub vm_clock_sec: u64,
    /// and nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions that the VM had executed, if that was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

impl From<Snapshot> for SnapshotInfo {
    fn from(s: Snapshot) -> SnapshotInfo {
        SnapshotInfo {
            id: s.id,
            name: s.name,
            vm_state_size: s.vm_state_size,
            date_sec: s.seconds,
            date_nsec: s.nanoseconds,
            vm_clock_sec: s.vm_clock / 1_000_000_000,
            vm_clock_nsec: s.vm_clock % 1_000_000_000,
            icount: s.icount,
        }
    }
}
