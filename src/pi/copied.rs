//! A protected volume as a job copies it: blocks that are verified, with their tuples, and a map in which whatever has a tuple counts as
//! data. Called by the LUN's jobs.

use super::{protected::Protected, store::Source, tuple::PiType};
use crate::{
    storage::Storage,
    sys::mem::Sg,
    units::{ByteOffset, Lba},
    volume::{Extent, ExtentKind, IoError, IoErrorKind, IoOp, Result, Volume},
};

impl<V: Volume, S: Storage> Protected<V, S> {
    /// Reads blocks and their tuples, and checks all that is known of them, as a guest's read does; counts nothing.
    ///
    /// # Errors
    /// [`IoErrorKind::Protection`] with the first block that does not match.
    pub async fn read_verified(&self, at: ByteOffset, to: &Sg) -> Result<Vec<u8>> {
        let (lba, mut tuples) = self.get(at, to, Source::File).await?;
        if self.is_read_only() {
            self.forgive(lba, to, &mut tuples);
        }
        match self.checker().verify(to, lba, &tuples) {
            Ok(_) => Ok(tuples),
            Err(m) => {
                let place = m.lba.to_bytes(self.block_size()).unwrap_or(at);
                Err(IoError::new(IoErrorKind::Protection(m), IoOp::Read).at(place))
            }
        }
    }

    /// The type of the tuples that are kept, whoever sees them.
    pub fn kind_at_rest(&self) -> PiType {
        self.checker().kind
    }

    /// Shortens a hole of the image to what has no tuples; it is data if its first block has one.
    ///
    /// # Errors
    /// The sidecar's.
    pub async fn with_tuples(&self, mut extent: Extent) -> Result<Extent> {
        if extent.kind == ExtentKind::Data {
            return Ok(extent);
        }
        let size = self.block_size();
        let (first, blocks) = (size.lba_of(extent.start), size.blocks_in(extent.len).0);
        let found = self.sidecar().next_tuples(first).await;
        let found = found.map_err(|e| IoError::from_io(IoOp::Map, e).at(extent.start))?;
        if let Some(run) = found.filter(|run| run.start < first.0 + blocks) {
            let here = run.start <= first.0;
            let end = if here { Lba(run.end.min(first.0 + blocks)) } else { Lba(run.start) };
            if here {
                (extent.kind, extent.host_offset) = (ExtentKind::Data, None);
            }
            extent.len = (end.0 - first.0) << size.shift();
        }
        Ok(extent)
    }
}
