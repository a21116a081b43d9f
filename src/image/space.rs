//! How much room there is beneath an image.

use std::fs::File;

use crate::sys::io::Io;

/// Bytes that a file may still grow by: what its file system has left for anybody. Quotas are not looked at. Asked on another thread,
/// as a server may be behind it.
pub(super) async fn free_bytes(io: &Io, file: &File) -> Option<u64> {
    let file = file.try_clone().ok()?;
    let stat = io.blocking(move || rustix::fs::fstatvfs(&file)).await.ok()?.ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}
