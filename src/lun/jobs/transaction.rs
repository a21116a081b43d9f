//! A LUN's part in a transaction (QEMU's `transaction`): what is done with its dirty bitmaps, internal snapshots, and a backup that begins, at
//! one moment, which is that of all LUNs that take part.
//!
//! The order: the backup's target is made and opened while commands run. Commands are held back, those of all LUNs. Then all is done with the
//! bitmaps, in the order in which it was asked for, and is taken back: that has shown whether it can be done, and what would be
//! there then. Internal snapshots are taken, and deleted again if it comes to nothing. When all LUNs have come so far it is decided, and what would be there is there. Nobody writes meanwhile, so no bitmap has
//! anything to catch up with; the backup is attached before the first command goes on. If it comes to nothing, what was made for the
//! backup is removed, and the bitmaps are what they were.

use super::{
    Act, JobError, Jobs, PartOrder,
    ballot::{Seat, Step},
    begin::Launch,
    group::Member,
};
use crate::{job::front::Front, lun::stack::Stack, units::BlockSize};

impl Jobs {
    /// Takes part.
    pub(super) async fn part(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: PartOrder,
    ) -> Result<(), JobError> {
        let seat = Seat::new(order.ballot.clone(), &order.lun);
        let done = self.take_part(front, block_size, order, &seat).await;
        if let Err(e) = &done {
            seat.refuse(&e.to_string());
        }
        done
    }

    async fn take_part(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        PartOrder { acts, group, .. }: PartOrder,
        seat: &Seat,
    ) -> Result<(), JobError> {
        let at = acts.iter().position(|act| matches!(act, Act::Backup(_)));
        let backup = at.and_then(|at| match &acts[at] {
            Act::Backup(order) => Some((at, (**order).clone())),
            Act::Bitmap(_) | Act::Internal(_) => None,
        });
        let (mut launch, mut member, mut _starting) = (None, None, None);
        if let Some((at, order)) = backup {
            _starting = Some(self.starting(&order.id)?);
            member = group.map(Member::new);
            let name = order.bitmap.as_ref().map(|(name, _)| name.as_str());
            // Said before a target is made, unless the bitmap is another one by then.
            if let Some(name) = name.filter(|name| acts[..at].iter().all(|act| act.changes() != Some(name))) {
                front.bitmaps().check(name)?;
            }
            launch = Some(self.prepare_backup(front, block_size, order).await?);
        } else if acts.iter().any(|act| matches!(act, Act::Internal(_))) {
            _starting = Some(self.starting("snapshot")?);
        }
        let begun = match seat.reach(&self.io, Step::Prepared).await {
            Err(reason) => Err((JobError::Transaction(reason), launch)),
            Ok(()) => {
                let at_once = async || {
                    if let Err(e) = self.act(front, &acts, launch.as_ref(), seat).await {
                        return (None, Err((e, launch)));
                    }
                    let active = launch.map(|launch| self.bring_up(launch, member));
                    (active.map(|active| self.under_way(active)), Ok(()))
                };
                front.hold_back(at_once).await
            }
        };
        let Err((e, launch)) = begun else { return Ok(()) };
        if let Some(launch) = launch {
            self.come_to_nothing(launch).await;
        }
        Err(e)
    }

    /// While no command runs: does what is to be done with bitmaps, if everybody does his part.
    async fn act(
        &self,
        front: &Front<Stack>,
        acts: &[Act],
        launch: Option<&Launch>,
        seat: &Seat,
    ) -> Result<(), JobError> {
        seat.reach(&self.io, Step::Held).await.map_err(JobError::Transaction)?;
        let bitmaps = front.bitmaps();
        let former = || bitmaps.former(acts.iter().filter_map(Act::changes));
        let before = former();
        let tried = acts.iter().try_for_each(|act| match (act, launch) {
            (Act::Bitmap(order), _) => self.bitmap(front, order.clone()),
            (Act::Backup(_), Some(launch)) => launch.mark(front),
            (Act::Backup(_), None) | (Act::Internal(_), _) => Ok(()),
        });
        let after = former();
        bitmaps.restore(before);
        tried?;
        let internals = acts.iter().filter_map(|act| match act {
            Act::Internal(name) => Some(name.as_str()),
            Act::Bitmap(_) | Act::Backup(_) => None,
        });
        let taken = self.internals(front, internals).await?;
        if let Err(reason) = seat.ready(&self.io).await {
            taken.undo(front).await;
            return Err(JobError::Transaction(reason));
        }
        bitmaps.restore(after);
        Ok(())
    }
}
