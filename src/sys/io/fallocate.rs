//! What `fallocate` is asked for, by name.

/// What a fallocate does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallocate {
    /// Allocates zeros, and lets the file grow.
    Allocate,
    /// Frees the range (it reads as zeros), and keeps the size.
    PunchHole,
    /// Makes the range zeros that are allocated, and keeps the size.
    ZeroRange,
}

impl Fallocate {
    pub(super) fn mode(self) -> libc::c_int {
        match self {
            Fallocate::Allocate => 0,
            Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
        }
    }
}
