//! How a job begins: its target is made or opened, the job is written down, attached, and has the LUN's background task run it.

use std::{cell::RefCell, io, rc::Rc};

use tracing::info;

use super::{Active, BitmapMode, JobError, Jobs, MirrorOrder, Record, close, target};
use crate::{
    job::{
        JobStatus,
        dirty::{MAX_GRANULARITY, MIN_GRANULARITY, granularity_for},
        front::Front,
        mirror::{Mirror, Settings, SyncMode, Task},
    },
    lun::{config::DeviceConfig, events::Event, stack::Stack},
    units::BlockSize,
    volume::Volume,
};

impl Jobs {
    /// Begins a mirror.
    pub(super) async fn mirror(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: MirrorOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        self.copy_out(front, block_size, order, None).await
    }

    /// Begins a job that copies to another image.
    pub(super) async fn copy_out(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: MirrorOrder,
        bitmap: Option<(String, BitmapMode)>,
    ) -> Result<(), JobError> {
        let source = front.volume();
        let capacity = source.limits().capacity;
        let granularity = order.granularity.unwrap_or_else(|| granularity_for(capacity));
        let fits =
            (MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) && granularity >= block_size.bytes();
        if !granularity.is_power_of_two() || !fits {
            return Err(JobError::Granularity(granularity));
        }
        let own = self.made.get().config.clone();
        let found = target::prepare(&self.io, &order, &own, &source, block_size).await?;
        let settings = Settings { sync: found.sync, ..order.settings };
        // Of a backup whole clusters, as QEMU: what it does not hold may be put beneath it later.
        let cluster = match settings.task.keeps_the_past() {
            true => u64::from(found.stack.limits().discard_granularity).next_power_of_two(),
            false => 0,
        };
        let granularity = granularity.max(cluster.min(MAX_GRANULARITY));
        let record = Record::new(order.id, &own.image, &found.config, granularity, settings, found.fresh);
        let target = Rc::new(found.stack);
        let launched = self.launch_with(front, (source, target.clone()), record, found.config, bitmap).await;
        if launched.is_err() {
            close(&target).await;
        }
        launched
    }

    /// Writes a job down, attaches it, and has it run.
    pub(super) async fn launch(
        &self,
        front: &Front<Stack>,
        sides: (Rc<Stack>, Rc<Stack>),
        record: Record,
        target: DeviceConfig,
    ) -> Result<(), JobError> {
        self.launch_with(front, sides, record, target, None).await
    }

    /// The same of one that has a dirty bitmap.
    async fn launch_with(
        &self,
        front: &Front<Stack>,
        sides: (Rc<Stack>, Rc<Stack>),
        mut record: Record,
        target: DeviceConfig,
        bitmap: Option<(String, BitmapMode)>,
    ) -> Result<(), JobError> {
        let failed = |e: io::Error| JobError::Record(e.to_string());
        let (id, settings) = (record.id.clone(), record.settings);
        let map = self.place.begin(sides.0.limits().capacity, record.granularity).map_err(failed)?;
        // Nothing to mark: what is written from now on marks itself.
        record.scanned = settings.sync == SyncMode::None;
        if let Err(e) = self.place.save(&record) {
            self.place.remove();
            return Err(failed(e));
        }
        // Nothing is awaited between this and the first change that the job sees.
        let marked = match &bitmap {
            None => Ok(None),
            Some((name, _)) => front.bitmaps().lend(name).map(Some),
        };
        match marked {
            Ok(Some(bits)) if settings.sync == SyncMode::Bitmap => {
                bits.runs().for_each(|run| map.set(run.start, run.end - run.start));
            }
            Ok(_) if settings.task.keeps_the_past() => map.set(0, map.capacity()),
            Ok(_) => {}
            Err(e) => {
                self.place.remove();
                return Err(e.into());
            }
        }
        self.events.tell(Event::Job { id: id.clone(), status: JobStatus::Created });
        let hooks = self.hooks(&id, settings.task);
        let mirror = Rc::new(Mirror::new(id, sides, map, settings, 0, hooks));
        if !matches!(settings.task, Task::CommitBeneath { .. }) {
            front.attach(mirror.clone()).await;
        }
        info!(job = mirror.id(), target = %target.image.display(), ?settings, "the job begins");
        let active = Active { mirror, record: RefCell::new(record), target, bitmap };
        self.active.replace(Some(Rc::new(active)));
        self.added.notify_all();
        Ok(())
    }
}
