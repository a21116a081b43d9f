//! Reading: straight into the caller's memory, contiguous clusters in one operation, what is not here from the backing file.

use std::{pin::Pin, rc::Rc};

use super::{
    Qcow2, Storage, compressed,
    map::{Kind, Run},
};
use crate::{
    sys::{
        exec::{join, join_all},
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::{Extent, IoOp, Result, Volume},
};

/// A future of this thread, boxed.
pub type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// What lies beneath an image: anything that can be read and mapped. Every [`Volume`] is one.
pub trait ReadBacking {
    /// Bytes it has; what an overlay has beyond them reads as zeros.
    fn len(&self) -> u64;
    /// Whether it has none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Fills `to`; the range lies within [`ReadBacking::len`].
    fn read<'a>(&'a self, at: u64, to: &'a Sg) -> Boxed<'a, Result<()>>;
    /// The map of a range; depth 0 is this file.
    fn map(&self, at: u64, len: u64) -> Boxed<'_, Result<Vec<Extent>>>;
}

/// A backing file, as an image holds it.
pub type Backing = Rc<dyn ReadBacking>;

impl<V: Volume> ReadBacking for V {
    fn len(&self) -> u64 {
        self.limits().capacity
    }

    fn read<'a>(&'a self, at: u64, to: &'a Sg) -> Boxed<'a, Result<()>> {
        Box::pin(async move {
            let limits = self.limits();
            let align = u64::from(limits.alignment.max(1));
            let end = at + to.len() as u64;
            if at.is_multiple_of(align) && (end.is_multiple_of(align) || end == limits.capacity) {
                return Volume::read(self, ByteOffset(at), to).await;
            }
            let start = at / align * align;
            let end = end.next_multiple_of(align).min(limits.capacity);
            let whole = Buffer::zeroed((end - start) as usize).sg();
            Volume::read(self, ByteOffset(start), &whole).await?;
            to.copy_from(0, &whole.slice((at - start) as usize, to.len()));
            Ok(())
        })
    }

    fn map(&self, at: u64, len: u64) -> Boxed<'_, Result<Vec<Extent>>> {
        Box::pin(self.map_extents(ByteOffset(at), len))
    }
}

/// Runs that are worked on side by side.
pub(super) const ABREAST: usize = 64;

impl<S: Storage> Qcow2<S> {
    pub(super) async fn read_range(&self, at: u64, to: &Sg) -> Result<()> {
        let _at_work = self.epochs.enter();
        let len = to.len() as u64;
        let mut done = 0;
        while done < len {
            let run = self.run(IoOp::Read, at + done, len - done).await?;
            if run.len == len {
                return self.read_run(run, at, to).await;
            }
            let mut runs = vec![(done, run)];
            done += run.len;
            while done < len && runs.len() < ABREAST {
                let run = self.run(IoOp::Read, at + done, len - done).await?;
                runs.push((done, run));
                done += run.len;
            }
            let parts = runs.into_iter().map(|(start, run)| async move {
                self.read_run(run, at + start, &to.slice(start as usize, run.len as usize)).await
            });
            join_all(parts).await.into_iter().collect::<Result<()>>()?;
        }
        Ok(())
    }

    async fn read_run(&self, run: Run, at: u64, to: &Sg) -> Result<()> {
        match run.kind {
            Kind::Zero { .. } => {
                to.fill(0, to.len(), 0);
                Ok(())
            }
            Kind::Unallocated => self.read_backing(at, to).await,
            Kind::Data { host, .. } => self
                .data()
                .read_data(host, to)
                .await
                .map_err(|e| self.io_error(IoOp::Read, e).at(ByteOffset(at))),
            Kind::Compressed { at: stream, len } => {
                let cluster = Box::pin(self.inflated(stream, len)).await.map_err(|e| e.at(ByteOffset(at)))?;
                to.copy_from(0, &cluster.sg().slice(self.geometry.within(at) as usize, to.len()));
                Ok(())
            }
        }
    }

    /// Whether the backing file has anything at or after a guest byte.
    pub(super) fn has_backing_at(&self, at: u64) -> bool {
        self.backing.as_ref().is_some_and(|b| at < b.len())
    }

    /// What the guest sees where this image has nothing.
    pub(super) async fn read_backing(&self, at: u64, to: &Sg) -> Result<()> {
        let len = match &self.backing {
            Some(backing) => backing.len().saturating_sub(at).min(to.len() as u64) as usize,
            None => 0,
        };
        to.fill(len, to.len() - len, 0);
        match &self.backing {
            Some(backing) if len > 0 => backing.read(at, &to.slice(0, len)).await,
            _ => Ok(()),
        }
    }

    /// A compressed cluster's bytes. The last one is kept: guests read on where they were.
    pub(super) async fn inflated(&self, at: u64, len: u64) -> Result<Buffer> {
        if let Some((last, cluster)) = &*self.last_inflated.borrow()
            && *last == at
        {
            return Ok(cluster.clone());
        }
        let stream = Buffer::zeroed(len as usize);
        self.storage.read(at, &stream.sg()).await.map_err(|e| self.io_error(IoOp::Read, e))?;
        let mut bytes = vec![0; self.geometry.cluster() as usize];
        match compressed::expand(self.header.compression, &stream.to_vec(), &mut bytes) {
            Ok(()) => {
                let cluster = Buffer::from_slice(&bytes);
                *self.last_inflated.borrow_mut() = Some((at, cluster.clone()));
                Ok(cluster)
            }
            Err(why) => {
                let detail = format!("the compressed cluster at {at:#x}: {why}");
                Err(crate::volume::IoError::corrupt(IoOp::Read, detail).path(&self.path))
            }
        }
    }

    /// The ends of a run of clusters as the guest sees them: bytes before `at` in its first cluster, and after `end` in its
    /// last. `first` and `last` say what lies there now.
    pub(super) async fn read_ends(&self, at: u64, end: u64, first: Kind, last: Kind) -> Result<(Sg, Sg)> {
        let g = &self.geometry;
        let head = g.within(at);
        let tail = end.next_multiple_of(g.cluster()) - end;
        let head = self.read_part(first, at - head, head);
        let (head, tail) = join(head, self.read_part(last, end, tail)).await;
        Ok((head?, tail?))
    }

    /// Bytes of one cluster as the guest sees them; `kind` says what the cluster is, Data being given for its first byte.
    async fn read_part(&self, kind: Kind, at: u64, len: u64) -> Result<Sg> {
        let sg = Buffer::zeroed(len as usize).sg();
        // What lies beyond the disk's end is not the guest's; it must not appear when the disk grows.
        let seen = self.size.get().saturating_sub(at).min(len);
        if seen > 0 {
            let within = self.geometry.within(at);
            let kind = match kind {
                Kind::Data { host, owned } => Kind::Data { host: host + within, owned },
                kind => kind,
            };
            self.read_run(Run { len: seen, kind }, at, &sg.slice(0, seen as usize)).await?;
        }
        Ok(sg)
    }
}
