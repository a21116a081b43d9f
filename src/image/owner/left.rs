//! An image that stays behind when its LUN has gone to another host with a copy of it. It has all that the LUN had then, and nothing that came after: whoever served it would show
//! a disk of the past. So its owner's file says that it is the other host's, and whoever is to open it here is refused, by that host's name, until it is taken over on purpose.

use std::path::{Path, PathBuf};

use super::{
    Claim, HostId, OwnerError, OwnerState, Record,
    record::{OwnerFile, path_of},
    share,
};

/// An image that is left, until that is taken back.
#[derive(Debug)]
pub struct Left {
    image: PathBuf,
    /// There was no owner's file before.
    new: bool,
    record: Record,
}

impl Left {
    /// Writes down that a closed image is left for that host, durably.
    ///
    /// # Errors
    /// That it is in use or another's, or the file system's: it is not left then.
    pub fn leave(image: &Path, claim: &Claim, to: &HostId) -> Result<Left, OwnerError> {
        let new = super::read(image)?.is_none();
        share(image, claim)?;
        let file = OwnerFile::open(image)?.ok_or_else(|| OwnerError::NotShared(path_of(image)))?;
        let _locked = file.lock(true)?;
        let now = file.record()?;
        if now.state != OwnerState::Released {
            return Err(OwnerError::Held(Box::new(now)));
        }
        // The copy that the other host has is another file. Where both hosts are one, this has to be nobody's all the same.
        let host = HostId { id: to.id.map(|byte| !byte), name: to.name.clone() };
        let other = Claim { host, lease: claim.lease };
        let record = other.record(OwnerState::Held, now.generation + 1);
        if let Err(e) = file.write_record(&record) {
            // It may be there all the same, and must not be found by the next start.
            let _ = file.write_record(&claim.record(OwnerState::Released, now.generation + 2));
            return Err(OwnerError::Io(e));
        }
        Ok(Left { image: image.to_owned(), new, record })
    }

    /// The other host has nothing of the LUN: the image is as it was.
    ///
    /// # Errors
    /// That somebody has taken it meanwhile, or the file system's.
    pub fn take_back(self, claim: &Claim) -> Result<(), OwnerError> {
        let Some(file) = OwnerFile::open(&self.image)? else { return Ok(()) };
        let _locked = file.lock(true)?;
        let now = file.record()?;
        if now != self.record {
            return Err(OwnerError::Held(Box::new(now)));
        }
        let free = claim.record(OwnerState::Released, now.generation + 1);
        file.write_record(&free).map_err(OwnerError::Io)?;
        if self.new {
            std::fs::remove_file(path_of(&self.image)).map_err(OwnerError::Io)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::image::owner::{Holding, read, take_over};

    #[test]
    fn an_image_that_was_left_is_had_by_nobody_here_until_that_is_taken_back_or_it_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        std::fs::write(&image, [0; 512]).unwrap();
        let here = HostId { id: [1; 16], name: "here".into() };
        let claim = Claim { host: here.clone(), lease: Duration::from_millis(50) };
        // Also where the other host is this one.
        for to in [HostId { id: [2; 16], name: "there".into() }, here] {
            let left = Left::leave(&image, &claim, &to).unwrap();
            let e = Holding::take(&image, &claim, None).unwrap_err();
            assert!(matches!(&e, OwnerError::Held(by) if by.host.name == to.name), "{e}");
            assert!(Left::leave(&image, &claim, &to).is_err());
            left.take_back(&claim).unwrap();
            assert!(read(&image).unwrap().is_none(), "the file goes with what it was made for");
        }
        // One that was shared stays so, in a later generation.
        share(&image, &claim).unwrap();
        let there = HostId { id: [2; 16], name: "there".into() };
        let left = Left::leave(&image, &claim, &there).unwrap();
        left.take_back(&claim).unwrap();
        assert_eq!(read(&image).unwrap().unwrap().generation, 3);
        let left = Left::leave(&image, &claim, &there).unwrap();
        assert_eq!(take_over(&image, &claim, false).unwrap().state, OwnerState::Released);
        assert!(matches!(left.take_back(&claim), Err(OwnerError::Held(_))));
        drop(Holding::take(&image, &claim, None).unwrap().unwrap());
        assert!(matches!(Left::leave(&image, &claim, &there), Err(OwnerError::Held(_))), "it is in use");
    }
}
