//! Copies whose data do not pass through this process: the source lends its blocks, and the destination has the kernel copy them from file
//! to file.
//!
//! The source holds its blocks for as long as the loan is out, so who takes it may wait for nobody: neither for blocks that
//! somebody holds there, nor for a volume that is about to be another. Where it would have to, and wherever else the kernel does
//! not serve, the blocks are read and written, and that says what is wrong. Copies in both directions cannot wait for each other.

use super::{Move, field, undone};
use crate::{
    scsi::{
        neighbour::{Answer, Errand, Undone},
        sense::{Failure, Sense},
        target::Target,
    },
    units::Lba,
    volume::{
        Volume,
        loan::{Loan, Moved},
    },
};

impl<V: Volume> Target<V> {
    /// Bytes of copies to here that the kernel has moved.
    pub fn moved_by_kernel(&self) -> u64 {
        self.moved_by_kernel.get()
    }

    /// Lends blocks to `with`, which gets none if the volume has none that the kernel could copy, and holds them until that is done.
    /// Dropped before, the loan is taken back.
    ///
    /// # Errors
    /// What an initiator would be told.
    pub async fn lend<T>(
        &self,
        lba: Lba,
        blocks: u64,
        with: impl AsyncFnOnce(Option<Loan>) -> T,
    ) -> Result<T, Failure> {
        if let Some(sense) = self.medium.get().sense() {
            return Err(sense.into());
        }
        let (at, len) = self.place(lba, blocks)?;
        let _pass = self.gate.pass(lba.0, blocks).await;
        let lent = self.volume.lend_blocks(at, len, async |place| {
            let Some(place) = place else { return with(None).await };
            let (loan, _owner) = Loan::new(place, len);
            with(Some(loan)).await
        });
        Ok(lent.await)
    }

    /// Has the kernel copy what is lent.
    pub(in super::super) async fn take(&self, lba: Lba, loan: Loan) -> Result<Moved, Failure> {
        self.is_writable()?;
        let len = loan.len();
        let (at, _) = self.place(lba, len >> self.block_size.shift())?;
        let moved = {
            let Some(_pass) = self.gate.pass_at_once() else { return Ok(Moved::NotThese) };
            self.volume.take_blocks(at, loan).await
        };
        if moved == Moved::Done {
            self.settle().await?;
            self.moved_by_kernel.set(self.moved_by_kernel.get() + len);
            if self.is_time_for_space() {
                self.look_at_space().await;
            }
        }
        Ok(moved)
    }

    /// Has the kernel move `n` bytes of a segment, from byte `at` of it on.
    pub(super) async fn move_by_kernel(&self, m: &Move, at: u64, n: u64) -> Result<Moved, Sense> {
        let size = m.source.block_size;
        let (lba, blocks) = (Lba((m.from + at) >> size.shift()), n >> size.shift());
        let Some(source) = &m.source.other else {
            let lent = self.lend(lba, blocks, async |loan| self.hand_over(m, at, loan).await).await;
            // Reading them says what is wrong.
            return lent.unwrap_or(Ok(Moved::NotThese));
        };
        match source.ask(Errand::Lend { lba, blocks }).await {
            Ok(Answer::Lent(loan)) => self.hand_over(m, at, loan).await,
            Ok(_) | Err(Undone::Failed(_)) => Ok(Moved::NotThese),
            Err(Undone::Unreachable) => Err(undone(Undone::Unreachable, m.number, field::SOURCE)),
        }
    }

    async fn hand_over(&self, m: &Move, at: u64, loan: Option<Loan>) -> Result<Moved, Sense> {
        let Some(loan) = loan else { return Ok(Moved::Never) };
        let lba = Lba((m.to + at) >> m.destination.block_size.shift());
        match self.ask(m.destination.other.as_ref(), Errand::Take { lba, loan }).await {
            Ok(Answer::Moved(moved)) => Ok(moved),
            Ok(_) | Err(Undone::Failed(_)) => Ok(Moved::NotThese),
            Err(Undone::Unreachable) => Err(undone(Undone::Unreachable, m.number, field::DESTINATION)),
        }
    }
}
