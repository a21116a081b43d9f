//! SCSI: parses command descriptor blocks, executes them on a volume, and answers with status and sense. Knows no ring and no file.
//!
//! A LUN makes one [`Target`], hands it every [`Command`] that the initiators send, and gives each [`Response`] back. What
//! is supported stands once, in [`opcodes`]: the parser, the dispatcher and REPORT SUPPORTED OPERATION CODES all read it.
//! Clauses named here are those of SBC-4 (INCITS 506), SPC-4 (INCITS 513) and SAM-5 (INCITS 515).

mod cdb;
mod copy_list;
mod log;
mod mode;
mod names;
pub mod neighbour;
pub mod opcodes;
mod protect;
pub mod sense;
mod target;
mod vpd;

pub use names::{moved_by, range_of};
pub use sense::{Sense, SenseKey, Status};
pub use target::{Command, Once, Response, SavedPages, Target, TargetConfig, continued, naa_from_serial};
