//! What a SCSI disk with protection information must do, asked of any such disk, and of two that must agree.
//!
//! [`clauses`] is a table of what SBC-4 demands, each a few commands and a verdict; [`differential`] sends the same seeded random
//! commands to two disks and compares what comes of them. Both work on a [`disk::Disk`]: an [`initiator::Initiator`] (SG_IO, or
//! vhost-scsi without a guest) and what the disk says of itself. Guards are computed here by a table of its own, so that
//! nothing of the target under test has a part in judging it. **All of it overwrites the disk.**

pub mod clauses;
mod clauses_io;
pub mod differential;
pub mod disk;
pub mod initiator;
mod random;
mod tuples;

pub use clauses::{Clause, Verdict};
pub use disk::{Disk, Facts};
pub use initiator::{Initiator, SgInitiator, VhostPi};

/// Why a disk cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum ConformanceError {
    /// A command was not delivered or not answered.
    #[error("command {cdb} was not carried out")]
    Transport {
        /// The CDB in hexadecimal.
        cdb: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What every disk can do, this one cannot.
    #[error("{what}: {answer}")]
    Unusable {
        /// What was asked.
        what: &'static str,
        /// What it answered.
        answer: String,
    },
    /// The two disks are not the same.
    #[error("the disks differ in {what}: {first} and {second}")]
    Unequal {
        /// In what.
        what: &'static str,
        /// The first's.
        first: String,
        /// The second's.
        second: String,
    },
}
