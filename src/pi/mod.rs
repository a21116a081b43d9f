//! T10 protection information: tuples, guards, the sidecar, and the decorator that protects a volume.
//!
//! A block is written together with a tuple (a CRC of its data, an application tag, and a reference tag that names the
//! block), and both are checked on every read. The tuples are kept apart from the image, in a sidecar ([`store`]), so that
//! a write that the disk dropped or put elsewhere is found as well as a flipped bit. The LUN thread puts
//! [`protected::Protected`] between the SCSI room and the image; the command line calls [`tools`].

pub mod chain;
pub mod check;
mod copied;
pub mod error;
pub mod exposure;
pub mod guard;
pub mod protected;
mod recompute;
mod replay;
pub mod scrub;
pub mod store;
#[cfg(test)]
pub(crate) mod testing;
mod told;
pub mod tools;
pub mod tuple;
pub mod wire;

pub use error::{PiOpenError, PiOpenErrorKind};
pub use exposure::{Exposure, Transfer};
pub use protected::{Counters, Protected, Protection, Recheck};
pub use store::PiMode;
pub use tuple::{PiType, Tuple};
