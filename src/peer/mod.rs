//! The other side: an embedded kernel for the ring, and a vhost-scsi initiator. For tests, benches and the demo.

pub mod kernel;
pub mod vhost;
