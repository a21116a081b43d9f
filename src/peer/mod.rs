//! The other side: an embedded kernel for the ring, a load for it, and a vhost-scsi initiator. For tests, benches and the demo.

pub mod kernel;
pub mod load;
pub mod vhost;
