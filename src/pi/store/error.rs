//! Why a file is no sidecar that can be used. Made by the sidecar, told by the decorator and the tools.

use std::io;

/// Why a file is no sidecar that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file could not be read or written.
    #[error("cannot read or write the sidecar")]
    Io(#[from] io::Error),
    /// Neither copy of the header has the magic.
    #[error("not a sidecar: the magic is missing")]
    NotASidecar,
    /// No copy of the header is whole.
    #[error("both copies of the sidecar's header are damaged")]
    Damaged,
    /// Of a later version.
    #[error("the sidecar has version {0}, and this program knows version 1")]
    Version(u32),
    /// Features that change the format.
    #[error("the sidecar has features that this program does not know: {0:#x}")]
    Features(u64),
    /// A type of protection that is not served.
    #[error("the sidecar holds protection of type {0}, which this program does not serve")]
    UnknownType(u8),
    /// A new sidecar where there is something.
    #[error("the file is not empty")]
    NotEmpty,
    /// More blocks than the map has room for.
    #[error("a sidecar cannot cover {0} blocks")]
    TooLarge(u64),
}
