//! Internal snapshots (qcow2 specification, "Snapshots"): made, gone back to and deleted on an open image, with other operations in flight.
//!
//! **A point in time.** An operation waits until everybody who changes the image is done, and those who come meanwhile wait for
//! it ([`super::gate`]). That is what keeps a write in place, which takes no lock, from hitting a cluster that
//! a snapshot has come to share: it has looked up the cluster and written it before the snapshot begins, or does
//! both after. So a write that ended before the call is in the snapshot, one that began after its end is not, and each of those between is
//! in it whole or not at all. Before anything is counted, clusters that were unlinked earlier are given back, so that no
//! reference is missing from the tables. Readers go on, but for the moment in which clusters are let go.
//!
//! **Ownership.** A cluster with two references is never written in place, after a crash either: COPIED marks and refcounts
//! change together, with one write of a sector ([`super::rebuild`]). No snapshot, no mark and no count is ever seen without the others.
//!
//! **Who has which tables.** When a snapshot is made it keeps the L1 table and those L2 tables that hold marks of ownership; the live disk goes on with
//! copies of them, without marks. The marks left in the snapshot's tables say nothing any more (the specification wants them accurate
//! only beneath the active L1 table). L2 tables without marks are shared. Going back to a snapshot is the same from the other side.
//!
//! docs/qcow2-snapshots.md has the argument step by step, and the differences from QEMU.

mod apply;
mod delete;
mod find;
mod info;
pub(super) mod table;
mod take;

pub use find::SnapshotError;
pub use info::SnapshotInfo;

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its ID, a number in words.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken: seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// How long the VM had run, in nanoseconds.
    pub vm_clock: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// Bytes of the disk, if the entry says so (always in version 3).
    pub disk_size: Option<u64>,
    /// Instructions that the VM had executed, if that was counted.
    pub icount: Option<u64>,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// The entry as it stands in the table, padding excluded: what we do not know of it is kept.
    raw: Vec<u8>,
}
