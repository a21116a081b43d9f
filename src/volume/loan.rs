//! Blocks that lie in a file as they are, lent to another volume, so that the kernel can move them from file to file by itself.
//!
//! The owner keeps away, while it lends, what would take the bytes from their place: another image, a shorter one, a close. It waits for
//! nobody in doing so but for the kernel, since who has the loan does nothing else with it than to have it copied. An owner that cannot
//! wait takes the loan back ([`Owner`] is dropped): what was copied by then is not to be believed.

use std::{
    any::Any,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::units::ByteOffset;

/// Where bytes of a volume lie.
#[derive(Debug, Clone)]
pub struct Place {
    /// The open file.
    pub file: Arc<File>,
    /// The first byte, in the file.
    pub at: ByteOffset,
}

/// Blocks that are lent. Sent to another thread it is given back by being dropped.
#[derive(Debug)]
pub struct Loan {
    place: Place,
    len: u64,
    holds: Arc<AtomicBool>,
    #[allow(dead_code)] // Held, never read: dropping it is what it is for.
    way_back: Option<Box<dyn Any + Send>>,
}

/// The owner's end of a loan.
#[derive(Debug)]
pub struct Owner(Arc<AtomicBool>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

impl Loan {
    /// That many bytes at that place, for as long as the owner's end is there.
    pub fn new(place: Place, len: u64) -> (Loan, Owner) {
        let holds = Arc::new(AtomicBool::new(true));
        (Loan { place, len, holds: holds.clone(), way_back: None }, Owner(holds))
    }

    /// The same, and what is given is dropped with it.
    #[must_use]
    pub fn with_way_back(self, way_back: impl Any + Send) -> Loan {
        Loan { way_back: Some(Box::new(way_back)), ..self }
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty)] // Nobody lends nothing.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where they lie.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Whether what has been copied so far is what was lent.
    pub fn holds(&self) -> bool {
        self.holds.load(Ordering::SeqCst)
    }
}

/// What came of having the kernel move blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// They are there, as after a write.
    Done,
    /// Not these, or not now: they have to be read and written, which also tells what is wrong. Some of them may have been moved.
    NotThese,
    /// It cannot between these two volumes.
    Never,
}
