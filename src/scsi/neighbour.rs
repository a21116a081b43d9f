//! Another logical unit, as a copy between two of them reaches it (and a LUN itself, as an export does): who it is, what it can be asked, and what it answers.
//!
//! The target that executes EXTENDED COPY knows of others by these traits alone. Whoever owns the targets says which of them
//! may be reached, and carries questions and answers across: they hold nothing that is bound to a thread.

use std::{future::Future, pin::Pin, rc::Rc};

use super::sense::Failure;
use crate::{
    units::{BlockSize, Lba},
    volume::{
        AtRest, ExtentKind,
        loan::{Loan, Moved},
    },
};

/// A designation descriptor of a logical unit (SPC-4 7.8.6.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Designator {
    /// CODE SET.
    pub code_set: u8,
    /// DESIGNATOR TYPE.
    pub kind: u8,
    /// DESIGNATOR.
    pub value: Vec<u8>,
}

/// Tuples that go with blocks from one logical unit to another, as they were verified where the blocks come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Along {
    /// Whose they are, and of which type.
    pub at_rest: AtRest,
    /// Of the blocks that they belong to.
    pub block_size: BlockSize,
    /// Eight bytes a block.
    pub tuples: Vec<u8>,
}

/// What a logical unit is asked to do for a copy.
#[derive(Debug)]
pub enum Errand {
    /// Say what it is.
    Describe,
    /// Read blocks; their protection information is checked, if there is any.
    Read {
        /// The first.
        lba: Lba,
        /// How many.
        blocks: u64,
    },
    /// Write whole blocks, with the protection information that comes along, or with some made for them.
    Write {
        /// The first.
        lba: Lba,
        /// What they are to hold.
        data: Vec<u8>,
        /// Their tuples. Of use where blocks are as large and protected in the same way.
        along: Option<Along>,
    },
    /// Lend blocks for the kernel to copy them. Only a neighbour is asked: what it lends it keeps in place until the loan is dropped.
    Lend {
        /// The first.
        lba: Lba,
        /// How many.
        blocks: u64,
    },
    /// Have the kernel copy what is lent, without waiting for anybody.
    Take {
        /// The first block to be written.
        lba: Lba,
        /// What it is to hold.
        loan: Loan,
    },
    /// Bring every write that was answered to stable storage.
    Flush,
    /// Make blocks zeros; without `may_unmap` their space is kept.
    Zero {
        /// The first.
        lba: Lba,
        /// How many.
        blocks: u64,
        /// They may be freed.
        may_unmap: bool,
    },
    /// Say what blocks hold, or the first of them.
    Map {
        /// The first.
        lba: Lba,
        /// How many.
        blocks: u64,
    },
}

/// What it answers.
#[derive(Debug)]
pub enum Answer {
    /// To [`Errand::Describe`].
    Described {
        /// Size of its blocks.
        block_size: BlockSize,
        /// How many it has.
        blocks: u64,
    },
    /// To [`Errand::Read`]: the blocks, and their tuples if it keeps some.
    Data(Vec<u8>, Option<Along>),
    /// To [`Errand::Lend`]; nothing if it has none that the kernel could copy.
    Lent(Option<Loan>),
    /// To [`Errand::Take`].
    Moved(Moved),
    /// To [`Errand::Write`], [`Errand::Flush`] and [`Errand::Zero`].
    Written,
    /// To [`Errand::Map`]: runs of bytes from the first block on, what they hold, and which image of the chain holds it (0 for the LUN's own).
    Mapped(Vec<(u64, ExtentKind, u32)>),
}

/// Why an errand came to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Undone {
    /// There is nobody, or nobody who answers. A write may have been done, or may be yet.
    Unreachable,
    /// It would have told an initiator this.
    Failed(Failure),
}

/// The answer to an errand, when it is there.
pub type Answering = Pin<Box<dyn Future<Output = Result<Answer, Undone>>>>;

/// Another logical unit.
pub trait Neighbour {
    /// A number that is its own among all neighbours.
    fn number(&self) -> u64;

    /// Sends an errand. The future may be dropped; the errand may be done all the same.
    fn ask(&self, errand: Errand) -> Answering;
}

/// Those that a logical unit may reach.
pub trait Neighbours {
    /// All that have this designator; not the one that asks.
    fn named(&self, who: &Designator) -> Vec<Rc<dyn Neighbour>>;

    /// Whether a copy should come to its end early, since the logical unit goes away.
    fn should_end(&self) -> bool;
}
