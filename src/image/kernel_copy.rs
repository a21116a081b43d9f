//! Raw files whose bytes the kernel copies by itself (copy_file_range(2)): XFS and btrfs share the blocks of both, NFS has its server copy.
//!
//! From file to file, both through the page cache, which is where the kernel copies; all else is read and written. Runs on another thread, and
//! tells no failure: a read and a write of the same bytes say whose it is. Called by the copies between LUNs.

use std::{fs::File, io, sync::Arc};

use rustix::io::Errno;

use super::raw::Raw;
use crate::{
    units::ByteOffset,
    volume::{
        IoOp,
        loan::{Loan, Moved, Place},
    },
};

impl Raw {
    /// As [`crate::volume::Volume::lend_blocks`].
    pub(super) async fn lend_place<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        let busy = self.begin(IoOp::Read, at, len).ok().flatten();
        // Of what may be another's by now nothing is lent: a read waits until that is known.
        let file = self.copyable().filter(|_| busy.is_some() && !self.io.is_fenced_off());
        with(file.map(|file| Place { file, at })).await
    }

    /// As [`crate::volume::Volume::take_blocks`].
    pub(super) async fn take_place(&self, at: ByteOffset, loan: Loan) -> Moved {
        let Some(file) = self.copyable() else { return Moved::Never };
        // The thread that copies would wait for the fence, and have the lender wait.
        if self.io.is_fenced_off() || self.refuses_first_bytes(at) {
            return Moved::NotThese;
        }
        let Ok(Some(_busy)) = self.begin(IoOp::Write, at, loan.len()) else { return Moved::NotThese };
        // The loan goes along: it is given back when the kernel is done, whatever becomes of this future.
        let done = self.io.blocking(move || copy(&loan, &file, at)).await;
        match done.and_then(|done| done) {
            Ok(true) => Moved::Done,
            Ok(false) => Moved::NotThese,
            Err(e) if is_unable(&e) => Moved::Never,
            Err(error) => {
                tracing::debug!(at = at.0, %error, "the kernel did not copy these blocks");
                Moved::NotThese
            }
        }
    }
}

/// Whether all of it was copied, from a lender that still holds it.
fn copy(loan: &Loan, to: &Arc<File>, at: ByteOffset) -> io::Result<bool> {
    let place = loan.place();
    let (mut from_at, mut to_at) = (place.at.0, at.0);
    let end = to_at + loan.len();
    while to_at < end {
        let left = usize::try_from(end - to_at).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(&place.file, Some(&mut from_at), to, Some(&mut to_at), left) {
            // The source ends here: somebody has cut it short.
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(loan.holds())
}

/// Whether the kernel says that it copies nothing between these two files.
fn is_unable(e: &io::Error) -> bool {
    const UNABLE: [Errno; 7] =
        [Errno::XDEV, Errno::OPNOTSUPP, Errno::NOSYS, Errno::INVAL, Errno::BADF, Errno::PERM, Errno::TXTBSY];
    UNABLE.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, path::Path, rc::Rc};

    use super::*;
    use crate::{
        sys::{io::Io, run},
        volume::Volume,
    };

    fn raw(io: &Io, bytes: &[u8], probed: bool) -> (Raw, Rc<File>) {
        let file = Rc::new(tempfile::tempfile().unwrap());
        file.write_all_at(bytes, 0).unwrap();
        (Raw::new(io, file.clone(), Path::new("/t.raw"), false, probed).unwrap(), file)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut out = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut out, 0).unwrap();
        out
    }

    /// Has so much moved from one to the other.
    async fn moved(from: &Raw, at: u64, len: u64, to: &Raw, there: u64) -> Moved {
        from.lend_blocks(ByteOffset(at), len, async |place| match place {
            None => Moved::Never,
            Some(place) => {
                let (loan, _owner) = Loan::new(place, len);
                to.take_blocks(ByteOffset(there), loan).await
            }
        })
        .await
    }

    #[test]
    fn bytes_go_from_file_to_file_and_nothing_around_them_changes() {
        run(async |io| {
            let bytes: Vec<u8> = (0..65536u32).map(|i| (i * 31 / 7) as u8).collect();
            let ((a, _), (b, to)) = (raw(&io, &bytes, false), raw(&io, &[9; 65536], false));
            assert_eq!(moved(&a, 4096, 8192, &b, 1024).await, Moved::Done);
            let mut want = vec![9; 65536];
            want[1024..][..8192].copy_from_slice(&bytes[4096..][..8192]);
            assert!(content(&to) == want);
            assert_eq!(moved(&b, 0, 512, &b, 60 << 10).await, Moved::Done, "within one file");
            want.copy_within(..512, 60 << 10);
            assert!(content(&to) == want);
        });
    }

    #[test]
    fn what_cannot_be_or_may_not_be_is_left_to_a_read_and_a_write() {
        run(async |io| {
            let ((a, from), (b, to)) = (raw(&io, &[1; 8192], false), raw(&io, &[2; 8192], true));
            assert_eq!(moved(&a, 8192, 512, &b, 512).await, Moved::Never, "nothing to lend");
            assert_eq!(moved(&a, 0, 512, &b, 8192).await, Moved::NotThese, "outside");
            assert_eq!(moved(&a, 0, 512, &b, 0).await, Moved::NotThese, "what makes a probed image qcow2");
            assert!(content(&to) == [2; 8192]);
            from.set_len(512).unwrap();
            assert_eq!(moved(&a, 4096, 512, &b, 512).await, Moved::NotThese, "cut short");
            let taken_back =
                a.lend_blocks(ByteOffset(0), 512, async |place| Loan::new(place.unwrap(), 512).0).await;
            assert_eq!(b.take_blocks(ByteOffset(512), taken_back).await, Moved::NotThese, "taken back");
            // What the kernel refuses: EXDEV in the place of a file system that is another, EINVAL for a pipe.
            let (pipe, _other) = rustix::pipe::pipe().unwrap();
            let pipe = Place { file: Arc::new(File::from(pipe)), at: ByteOffset(0) };
            assert_eq!(b.take_blocks(ByteOffset(512), Loan::new(pipe, 512).0).await, Moved::Never);
        });
    }

    #[test]
    fn only_errors_that_will_come_again_end_the_attempts() {
        for (errno, unable) in [
            (libc::EXDEV, true),
            (libc::EOPNOTSUPP, true),
            (libc::ENOSYS, true),
            (libc::ENOSPC, false),
            (libc::EIO, false),
            (libc::EDQUOT, false),
        ] {
            assert_eq!(is_unable(&io::Error::from_raw_os_error(errno)), unable, "{errno}");
        }
    }
}
