//! External data files (qcow2 specification, "incompatible feature bit 2"): the guest's clusters lie in a file of their own, each where
//! the guest has it, and the qcow2 file has the metadata alone. No refcounts, no snapshots, no compression.
//!
//! What the data file holds where nothing is mapped is not known, so a new cluster is written whole and synced before it is linked. A
//! discarded cluster stays mapped and is punched, which keeps a raw data file (autoclear bit 1) the same disk by itself.

use super::{Qcow2, Storage, layout::Place};
use crate::{
    sys::mem::Sg,
    volume::{IoOp, Result},
};

impl<S: Storage> Qcow2<S> {
    /// A place for guest clusters from `cluster` on: at least one, at most `want`. In the image's own file they hold zeros, durably; in a
    /// data file anything.
    pub(super) async fn take_place(&self, op: IoOp, cluster: u64, want: u64) -> Result<(u64, u64)> {
        match self.data {
            Some(_) => Ok((cluster << self.geometry.cluster_bits, want)),
            None => self.take(op, want).await,
        }
    }

    /// A place from [`Qcow2::take_place`] that was not linked after all.
    pub(super) fn give_back_from(&self, host: u64, count: u64) {
        if self.data.is_none() {
            self.give_back(host, count);
        }
    }

    /// Writes whole clusters or subclusters, whose end may lie beyond the disk's; a data file gets nothing there.
    pub(super) async fn write_whole(&self, op: IoOp, host: u64, whole: &Sg) -> Result<()> {
        let most = if self.data.is_some() { self.size.get().saturating_sub(host) } else { u64::MAX };
        let len = (whole.len() as u64).min(most) as usize;
        self.data().write_data(host, &whole.slice(0, len)).await.map_err(|e| self.io_error(op, e))
    }

    /// Whether the data file is to be the same disk by itself.
    pub(super) fn raw_data(&self) -> bool {
        self.header.data_file_raw()
    }

    /// Makes guest clusters that one slice maps zeros, and gives their space back; the caller holds them.
    pub(super) async fn empty_data(&self, first: u64, next: u64) -> Result<()> {
        const OP: IoOp = IoOp::Discard;
        let g = self.geometry;
        let entries = self.entries(OP, first).await?;
        for cluster in first..next {
            let at = cluster << g.cluster_bits;
            let entry = self.entry(&entries, cluster);
            let zeros = g.zero_entry(entry.word);
            match self.place_of(OP, entry).await? {
                Place::Cluster { host, .. } => {
                    self.data().punch(host, g.cluster()).await.map_err(|e| self.io_error(OP, e))?;
                    // A subcluster that is not data yet would show the backing file.
                    if g.extended_l2 && entry.bitmap as u32 != u32::MAX {
                        self.set_entries(OP, &entries, cluster, &[zeros]).await?;
                    }
                }
                Place::None if self.has_backing_at(at) && entry != zeros => {
                    self.set_entries(OP, &entries, cluster, &[zeros]).await?;
                }
                Place::None | Place::Compressed { .. } => {}
            }
        }
        Ok(())
    }

    /// Cuts the data file off where the disk ends by now.
    pub(super) async fn cut_data(&self, size: u64) -> Result<()> {
        let Some(data) = &self.data else { return Ok(()) };
        let cut = async {
            let len = data.size()?;
            match data.is_fixed() {
                _ if len <= size => Ok(()),
                true => data.punch(size, len - size).await,
                false => data.set_size(size).await,
            }
        };
        cut.await.map_err(|e| {
            self.io_error(IoOp::Resize, e)
                .detail("the disk is shorter, and its data file still has what lay beyond")
        })
    }

    /// Lets a raw data file grow with the disk; what somebody left beyond the old end goes.
    pub(super) async fn grow_raw_data(&self, op: IoOp, old: u64, size: u64) -> Result<()> {
        let Some(data) = self.data.as_ref().filter(|d| self.raw_data() && !d.is_fixed()) else {
            return Ok(());
        };
        let grown = async {
            if data.size()? > old {
                data.set_size(old).await?;
            }
            data.set_size(size).await
        };
        grown.await.map_err(|e| self.io_error(op, e))
    }
}
