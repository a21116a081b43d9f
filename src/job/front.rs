//! The one place where a LUN's commands meet its jobs: a volume over the LUN's stack, which can have a mirror attached, and can be
//! changed for another while commands keep coming.
//!
//! Without a job a command pays for a counter and for one look at what is there. Each command holds the layer that it began with; to attach,
//! to detach and to pivot means to put another layer in its place, and to wait until nobody holds the old one. A pivot closes the gate
//! for the moment in which nobody may write: commands that come meanwhile wait there, and none fails.

use std::{
    cell::{Cell, RefCell},
    ops::Deref,
    rc::Rc,
};

use super::{
    Side,
    bitmaps::{Bitmaps, KeptBitmap},
    mirror::{Mirror, Task, Verdict},
};
use crate::{
    sync::Notify,
    sys::mem::Sg,
    units::ByteOffset,
    volume::{
        AtRest, Extent, IoError, IoErrorKind, IoOp, Limits, PiType, Result, TupleCheck, Volume, WriteFlags,
        loan::{Loan, Moved, Place},
    },
};

/// What a command goes to.
struct Layer<S> {
    volume: Rc<S>,
    mirror: Option<Rc<Mirror<S>>>,
    /// Commands that hold it.
    held: Cell<usize>,
}

/// The volume that commands go to.
pub struct Front<S> {
    layer: RefCell<Rc<Layer<S>>>,
    closed: Cell<bool>,
    opened: Notify,
    /// Somebody waits for a layer to be let go of.
    awaited: Cell<bool>,
    let_go: Notify,
    bitmaps: Bitmaps,
    /// What the image kept that the LUN has gone over from, and the image has yet to be told.
    parted: RefCell<Vec<KeptBitmap>>,
}

/// A layer, for as long as a command needs it.
struct Hold<'a, S> {
    front: &'a Front<S>,
    layer: Rc<Layer<S>>,
}

impl<S> Deref for Hold<'_, S> {
    type Target = Layer<S>;

    fn deref(&self) -> &Layer<S> {
        &self.layer
    }
}

impl<S> Drop for Hold<'_, S> {
    fn drop(&mut self) {
        self.layer.held.set(self.layer.held.get() - 1);
        if self.front.awaited.get() {
            self.front.let_go.notify_all();
        }
    }
}

/// The gate is closed for as long as this lives.
struct Closed<'a, S>(&'a Front<S>);

impl<'a, S> Closed<'a, S> {
    /// One at a time: whoever comes second waits.
    async fn close(front: &'a Front<S>) -> Closed<'a, S> {
        while front.closed.get() {
            front.opened.wait().await;
        }
        front.closed.set(true);
        Closed(front)
    }
}

impl<S> Drop for Closed<'_, S> {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.opened.notify_all();
    }
}

/// What a job that has caught up ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Commands go to the target.
    Pivot,
    /// They go on to the source; the target is what it was at that moment.
    Leave,
    /// They go on to the source, in whose chain something has changed.
    Finish,
}

/// What came of an attempt to end.
#[derive(Debug)]
pub enum Ended {
    /// It is done.
    Done,
    /// There is more to copy first.
    Again,
    /// The target could not be made durable.
    Target(IoError),
    /// It could not be written down that the LUN has another image.
    Undecided(String),
}

impl<S: Side> Front<S> {
    /// A front without jobs.
    pub fn new(volume: S) -> Front<S> {
        Front::mirrored(Rc::new(volume), None)
    }

    /// A front with a mirror from its first command on, if there is one.
    pub fn mirrored(volume: Rc<S>, mirror: Option<Rc<Mirror<S>>>) -> Front<S> {
        Front {
            layer: RefCell::new(Rc::new(Layer { volume, mirror, held: Cell::new(0) })),
            closed: Cell::new(false),
            opened: Notify::new(),
            awaited: Cell::new(false),
            let_go: Notify::new(),
            bitmaps: Bitmaps::default(),
            parted: RefCell::default(),
        }
    }

    /// The dirty bitmaps, in which every change is marked before it is answered.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// What the source of a mirror kept when commands went over to its target, once.
    pub fn take_parted(&self) -> Vec<KeptBitmap> {
        self.parted.take()
    }

    /// What commands go to now.
    pub fn volume(&self) -> Rc<S> {
        self.layer.borrow().volume.clone()
    }

    /// The mirror that is attached.
    pub fn mirror(&self) -> Option<Rc<Mirror<S>>> {
        self.layer.borrow().mirror.clone()
    }

    /// Commands under way, those that wait at the gate not counted.
    pub fn busy(&self) -> usize {
        self.layer.borrow().held.get()
    }

    async fn hold(&self) -> Hold<'_, S> {
        while self.closed.get() {
            self.opened.wait().await;
        }
        let layer = self.layer.borrow().clone();
        layer.held.set(layer.held.get() + 1);
        Hold { front: self, layer }
    }

    /// Waits until no command holds that layer.
    async fn let_go(&self, layer: &Layer<S>) {
        while layer.held.get() > 0 {
            self.awaited.set(true);
            self.let_go.wait().await;
        }
        self.awaited.set(false);
    }

    fn replace(&self, volume: Rc<S>, mirror: Option<Rc<Mirror<S>>>) -> Rc<Layer<S>> {
        self.layer.replace(Rc::new(Layer { volume, mirror, held: Cell::new(0) }))
    }

    /// Attaches a mirror of what commands go to. When it is done, every write that the mirror has not seen is over.
    pub async fn attach(&self, mirror: Rc<Mirror<S>>) {
        let old = self.replace(self.volume(), Some(mirror));
        self.let_go(&old).await;
    }

    /// Detaches the mirror. When it is done, nobody writes to the target any more.
    pub async fn detach(&self) {
        let old = self.replace(self.volume(), None);
        self.let_go(&old).await;
    }

    /// Whether commands are held back: the volume is about to be another.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Waits until commands may pass.
    pub async fn passable(&self) {
        while self.closed.get() {
            self.opened.wait().await;
        }
    }

    /// Changes what commands go to for another volume, in a moment in which none runs. Those under way end first, and those that come
    /// meanwhile wait and go to what `change` gives; where it gives nothing, to what was there. A job that is attached is detached then.
    pub async fn switch<T>(&self, change: impl AsyncFnOnce(Rc<S>) -> (Option<Rc<S>>, T)) -> T {
        let gate = Closed::close(self).await;
        let layer = self.layer.borrow().clone();
        self.let_go(&layer).await;
        let volume = layer.volume.clone();
        // Whoever closes the old volume wants to be its last user.
        drop(layer);
        let (new, out) = change(volume).await;
        if let Some(new) = new {
            self.replace(new, None);
        }
        drop(gate);
        out
    }

    /// Does something in a moment in which no command runs: those under way end first, and those that come meanwhile wait. A job that
    /// `work` gives is attached at the end of that moment, and sees every command that comes after it.
    pub async fn hold_back<T>(&self, work: impl AsyncFnOnce() -> (Option<Rc<Mirror<S>>>, T)) -> T {
        let gate = Closed::close(self).await;
        let layer = self.layer.borrow().clone();
        self.let_go(&layer).await;
        let (job, out) = work().await;
        if job.is_some() {
            self.replace(layer.volume.clone(), job);
        }
        drop(gate);
        out
    }

    /// Ends a mirror that has caught up. The target is flushed first, so that commands wait for little of it; then the gate is closed,
    /// the last commands end, and if all is copied the target is durable and `decide` may make the choice so. Whatever fails, commands go on
    /// as before, and to both sides.
    pub async fn end(
        &self,
        mirror: &Rc<Mirror<S>>,
        how: Ending,
        decide: &impl AsyncFn() -> std::result::Result<(), String>,
    ) -> Ended {
        if let Err(e) = mirror.target().flush().await {
            return Ended::Target(e);
        }
        let gate = Closed::close(self).await;
        let layer = self.layer.borrow().clone();
        self.let_go(&layer).await;
        if !mirror.is_settled() {
            return Ended::Again;
        }
        if let Err(e) = mirror.target().flush().await {
            return Ended::Target(e);
        }
        if how == Ending::Pivot
            && let Err(reason) = decide().await
        {
            return Ended::Undecided(reason);
        }
        let volume = if how == Ending::Pivot { mirror.target().clone() } else { self.volume() };
        if how == Ending::Pivot {
            self.parted.replace(self.bitmaps.part());
        }
        mirror.part();
        self.replace(volume, None);
        drop(gate);
        Ended::Done
    }
}

/// What became of a mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it was told, and is detached.
    Ended(Ending),
    /// It was told to end at once, and is detached.
    Cancelled,
    /// It could not go on, and is detached.
    Failed(String),
}

impl<S: Side> Front<S> {
    /// Runs an attached mirror to its end. `decide` makes durable that the LUN has another image.
    pub async fn drive(
        &self,
        mirror: &Rc<Mirror<S>>,
        decide: impl AsyncFn() -> std::result::Result<(), String>,
    ) -> Outcome {
        loop {
            let outcome = match mirror.run().await {
                Verdict::End(how) => match self.end(mirror, how, &decide).await {
                    Ended::Done => return Outcome::Ended(how),
                    Ended::Again => continue,
                    Ended::Target(e) => {
                        mirror.flush_failed(&e);
                        continue;
                    }
                    Ended::Undecided(reason) => {
                        mirror.not_ended(&reason);
                        continue;
                    }
                },
                Verdict::Cancelled => Outcome::Cancelled,
                Verdict::Failed(reason) => Outcome::Failed(reason),
            };
            mirror.part();
            self.detach().await;
            return outcome;
        }
    }
}

macro_rules! through {
    ($self:ident, $method:ident($($arg:expr),*)) => {{
        let layer = $self.hold().await;
        through!(layer, $self, $method($($arg),*))
    }};
    ($self:ident, $at:ident + $len:expr, $method:ident($($arg:expr),*)) => {{
        let layer = $self.hold().await;
        // Let go of first.
        let _changing = $self.bitmaps.changing($at.0, $len);
        through!(layer, $self, $method($($arg),*))
    }};
    ($layer:ident, $self:ident, $method:ident($($arg:expr),*)) => {{
        match &$layer.mirror {
            None => $layer.volume.$method($($arg),*).await,
            // Boxed, so that commands of LUNs without a job have small futures.
            Some(mirror) => Box::pin(mirror.$method($($arg),*)).await,
        }
    }};
}

impl<S: Side> Volume for Front<S> {
    fn limits(&self) -> Limits {
        self.layer.borrow().volume.limits()
    }

    async fn read(&self, at: ByteOffset, to: &Sg) -> Result<()> {
        through!(self, read(at, to))
    }

    async fn write(&self, at: ByteOffset, from: &Sg, flags: WriteFlags) -> Result<()> {
        through!(self, at + from.len() as u64, write(at, from, flags))
    }

    async fn flush(&self) -> Result<()> {
        let layer = self.hold().await;
        layer.volume.flush().await
    }

    async fn discard(&self, at: ByteOffset, len: u64) -> Result<()> {
        through!(self, at + len, discard(at, len))
    }

    async fn write_zeroes(&self, at: ByteOffset, len: u64, may_unmap: bool) -> Result<()> {
        through!(self, at + len, write_zeroes(at, len, may_unmap))
    }

    async fn map_extents(&self, at: ByteOffset, len: u64) -> Result<Vec<Extent>> {
        let layer = self.hold().await;
        layer.volume.map_extents(at, len).await
    }

    async fn resize(&self, capacity: u64) -> Result<()> {
        let layer = self.hold().await;
        if let Some(mirror) = &layer.mirror {
            let words = match mirror.settings().task {
                Task::Backup => "the LUN is being backed up: end that job first (tcmu-dif job list)",
                _ => "the LUN is being mirrored: end that job first (tcmu-dif job list)",
            };
            return Err(IoError::new(IoErrorKind::Unsupported, IoOp::Resize).detail(words));
        }
        layer.volume.resize(capacity).await?;
        self.bitmaps.resize(capacity);
        Ok(())
    }

    async fn free_bytes(&self) -> Option<u64> {
        let layer = self.hold().await;
        layer.volume.free_bytes().await
    }

    fn protection(&self) -> Option<PiType> {
        self.layer.borrow().volume.protection()
    }

    /// A job that is attached has to see what is read, and what is written.
    async fn lend_blocks<T>(
        &self,
        at: ByteOffset,
        len: u64,
        with: impl AsyncFnOnce(Option<Place>) -> T,
    ) -> T {
        let layer = self.hold().await;
        match &layer.mirror {
            None => layer.volume.lend_blocks(at, len, with).await,
            Some(_) => with(None).await,
        }
    }

    async fn take_blocks(&self, at: ByteOffset, loan: Loan) -> Moved {
        // Whoever lends waits for this, and this for nobody.
        if self.closed.get() || self.mirror().is_some() {
            return Moved::NotThese;
        }
        let layer = self.hold().await;
        let _changing = self.bitmaps.changing(at.0, loan.len());
        layer.volume.take_blocks(at, loan).await
    }

    fn at_rest(&self) -> Option<AtRest> {
        self.layer.borrow().volume.at_rest()
    }

    async fn read_along(&self, at: ByteOffset, to: &Sg) -> Result<Option<Vec<u8>>> {
        through!(self, read_along(at, to))
    }

    async fn read_with_tuples(&self, at: ByteOffset, to: &Sg, check: &TupleCheck) -> Result<Vec<u8>> {
        through!(self, read_with_tuples(at, to, check))
    }

    async fn write_with_tuples(
        &self,
        at: ByteOffset,
        from: &Sg,
        tuples: Vec<u8>,
        flags: WriteFlags,
    ) -> Result<()> {
        through!(self, at + from.len() as u64, write_with_tuples(at, from, tuples, flags))
    }

    async fn reformat(&self, protection: Option<PiType>) -> Result<()> {
        let layer = self.hold().await;
        if let Some(mirror) = &layer.mirror {
            // Its target has another type of protection from now on, and what this changes is not marked by the block.
            mirror.map().set(0, u64::MAX);
            mirror.give_up("FORMAT UNIT has changed the LUN's protection");
        }
        let _changing = self.bitmaps.changing(0, u64::MAX);
        layer.volume.reformat(protection).await
    }

    /// Closes what commands go to, and the target of a mirror: whoever takes the job up finds both whole.
    async fn close(&self) -> Result<()> {
        let (volume, mirror) = (self.volume(), self.mirror());
        let closed = volume.close().await;
        if let Some(mirror) = mirror {
            mirror.close_target().await;
        }
        closed
    }
}
