//! The copy that goes along with a LUN that is handed over: a mirror whose target is on another host, and which ends when the LUN stops.
//!
//! It begins in the background. Once it has been through, whoever hands the LUN over has it converge, so that it catches up whatever guests do. When the LUN stops after that, its
//! last commands have ended, and what they left is copied before the image is closed: so the new image has all that was answered, and nobody has to hold commands back in
//! between. It keeps nothing across a restart: there the handover has come to nothing, and the LUN serves.

use std::rc::Rc;

use tracing::warn;

use super::{HandoverOrder, JobError, Jobs, Settings, Task, record::Record};
use crate::{
    job::{dirty::granularity_for, front::Front},
    lun::{away::Away, bitmaps, chain, config::DeviceConfig, stack::Stack},
    units::BlockSize,
    volume::Volume,
};

impl Jobs {
    /// Has the new image made, and begins to copy.
    pub(super) async fn handover(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: HandoverOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        let source = front.volume();
        let address = order.far.address().to_owned();
        let away = Away::begin(&self.io, order.far, &source, block_size.bytes()).await;
        let away = Stack::Away(Box::new(away.map_err(|e| JobError::Target(chain(&e)))?));
        let own = self.made.get().config.clone();
        // For people: there is no such image here.
        let target = DeviceConfig { image: address.into(), sidecar: None, ..own.clone() };
        let granularity = granularity_for(source.limits().capacity).max(block_size.bytes());
        let settings = Settings { task: Task::Handover, auto_dismiss: false, ..Settings::default() };
        let record = Record::new(order.id, &own.image, &target, granularity, settings, true);
        self.launch(front, (source, Rc::new(away)), record, target).await
    }

    /// The LUN has stopped, and its image is open still: sends what the copy lacks, if the LUN stopped for that.
    pub(in crate::lun) async fn send_the_rest(&self, front: &Front<Stack>) {
        let active = self.active.borrow().clone();
        let Some(active) = active else { return };
        let Stack::Away(away) = &**active.mirror.target() else { return };
        if !away.far().is_last_call() {
            return;
        }
        let sent = match active.mirror.copy_rest().await {
            Ok(()) => away.flush().await.map_err(|e| chain(&e)),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = &sent {
            warn!(job = active.mirror.id(), "the copy is not whole: {reason}");
        }
        away.far().has_stopped(sent, bitmaps::to_hand_over(front.bitmaps()));
    }
}
