//! How a job begins: its target is made or opened, the job is written down; what is to be copied is marked, the job attached, and the LUN's
//! background task runs it.

use std::{cell::RefCell, io, rc::Rc};

use tracing::info;

use super::{
    Active, BitmapMode, JobError, Jobs, MirrorOrder, Record, close,
    group::Member,
    record::Scratch,
    target::{self, Made, Prepared},
};
use crate::{
    job::{
        JobStatus,
        dirty::{DirtyMap, MAX_GRANULARITY, MIN_GRANULARITY, granularity_for},
        front::Front,
        mirror::{Mirror, Settings, SyncMode, Task},
    },
    lun::{config::DeviceConfig, events::Event, stack::Stack},
    units::BlockSize,
    volume::Volume,
};

/// A job whose target is open, and which is written down: it could begin. Dropped, what was made for it is removed.
pub(super) struct Launch {
    sides: (Rc<Stack>, Rc<Stack>),
    record: Record,
    map: DirtyMap,
    target: DeviceConfig,
    bitmap: Option<(String, BitmapMode)>,
    made: Made,
}

impl Launch {
    /// Marks what is to be copied, as it is now: what the dirty bitmap has, which is lent from now on, or all.
    pub(super) fn mark(&self, front: &Front<Stack>) -> Result<(), JobError> {
        let (map, settings) = (&self.map, self.record.settings);
        let bits = match &self.bitmap {
            None => None,
            Some((name, _)) => Some(front.bitmaps().lend(name)?),
        };
        match bits {
            Some(bits) if settings.sync == SyncMode::Bitmap => {
                bits.runs().for_each(|run| map.set(run.start, run.end - run.start));
            }
            _ if settings.task.keeps_the_past() => map.set(0, map.capacity()),
            _ => {}
        }
        Ok(())
    }
}

impl Jobs {
    /// Begins a mirror.
    pub(super) async fn mirror(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: MirrorOrder,
    ) -> Result<(), JobError> {
        let _starting = self.starting(&order.id)?;
        let launch = self.prepare_copy(front, block_size, order, None).await?;
        self.begin(front, launch).await
    }

    /// Does what can be done beforehand for a job that copies to another image: makes and opens the target, and writes the job down.
    pub(super) async fn prepare_copy(
        &self,
        front: &Front<Stack>,
        block_size: BlockSize,
        order: MirrorOrder,
        bitmap: Option<(String, BitmapMode)>,
    ) -> Result<Launch, JobError> {
        let source = front.volume();
        let capacity = source.limits().capacity;
        let granularity = order.granularity.unwrap_or_else(|| granularity_for(capacity));
        let fits =
            (MIN_GRANULARITY..=MAX_GRANULARITY).contains(&granularity) && granularity >= block_size.bytes();
        if !granularity.is_power_of_two() || !fits {
            return Err(JobError::Granularity(granularity));
        }
        let own = self.made.get().config.clone();
        let Prepared { stack, config, fresh, sync, made } =
            target::prepare(&self.io, &order, &own, &source, block_size).await?;
        let settings = Settings { sync, ..order.settings };
        // Of a backup whole clusters, as QEMU: what it does not hold may be put beneath it later.
        let cluster = match settings.task.keeps_the_past() {
            true => u64::from(stack.limits().discard_granularity).next_power_of_two(),
            false => 0,
        };
        let granularity = granularity.max(cluster.min(MAX_GRANULARITY));
        let record = Record::new(order.id, &own.image, &config, granularity, settings, fresh);
        let target = Rc::new(stack);
        match self.write_down((source, target.clone()), record, config) {
            Ok(launch) => Ok(Launch { bitmap, made, ..launch }),
            Err(e) => {
                close(&target).await;
                Err(e)
            }
        }
    }

    /// Notes that the target goes with the job.
    pub(super) async fn as_scratch(&self, mut launch: Launch) -> Result<Launch, JobError> {
        let files = launch.made.files.iter();
        let noted = files.map(|file| Scratch::of(file)).collect::<io::Result<_>>().and_then(|scratch| {
            launch.record.scratch = scratch;
            self.place.save(&launch.record)
        });
        match noted {
            Ok(()) => Ok(launch),
            Err(e) => {
                self.come_to_nothing(launch).await;
                Err(JobError::Record(e.to_string()))
            }
        }
    }

    /// Begins what was prepared; what fails leaves nothing behind.
    pub(super) async fn begin(&self, front: &Front<Stack>, launch: Launch) -> Result<(), JobError> {
        // Nothing is awaited between this and the first change that the job sees.
        if let Err(e) = launch.mark(front) {
            self.come_to_nothing(launch).await;
            return Err(e);
        }
        self.attach(front, launch).await;
        Ok(())
    }

    /// Writes a job down, attaches it, and has it run.
    pub(super) async fn launch(
        &self,
        front: &Front<Stack>,
        sides: (Rc<Stack>, Rc<Stack>),
        record: Record,
        target: DeviceConfig,
    ) -> Result<(), JobError> {
        let launch = self.write_down(sides, record, target)?;
        if let Err(e) = launch.mark(front) {
            self.place.remove();
            return Err(e);
        }
        self.attach(front, launch).await;
        Ok(())
    }

    fn write_down(
        &self,
        sides: (Rc<Stack>, Rc<Stack>),
        mut record: Record,
        target: DeviceConfig,
    ) -> Result<Launch, JobError> {
        let failed = |e: io::Error| JobError::Record(e.to_string());
        let map = self.place.begin(sides.0.limits().capacity, record.granularity).map_err(failed)?;
        // Nothing to mark: what is written from now on marks itself.
        record.scanned = record.settings.sync == SyncMode::None;
        if let Err(e) = self.place.save(&record) {
            self.place.remove();
            return Err(failed(e));
        }
        Ok(Launch { sides, record, map, target, bitmap: None, made: Made::default() })
    }

    async fn attach(&self, front: &Front<Stack>, launch: Launch) {
        let active = self.bring_up(launch, None);
        if !matches!(active.mirror.settings().task, Task::CommitBeneath { .. }) {
            front.attach(active.mirror.clone()).await;
        }
        self.under_way(active);
    }

    /// Makes a job of what was prepared. It is to see every change from now on.
    pub(super) fn bring_up(&self, launch: Launch, group: Option<Member>) -> Active {
        let Launch { sides, record, map, target, bitmap, mut made } = launch;
        made.keep = true;
        let (id, settings) = (record.id.clone(), record.settings);
        self.events.tell(Event::Job { id: id.clone(), status: JobStatus::Created });
        let hooks = self.hooks(&id, settings.task);
        let mirror = Rc::new(Mirror::new(id, sides, map, settings, 0, hooks));
        Active { mirror, record: RefCell::new(record), target, bitmap, group }
    }

    /// Has a job run from now on.
    pub(super) fn under_way(&self, active: Active) -> Rc<Mirror<Stack>> {
        let mirror = active.mirror.clone();
        let settings = mirror.settings();
        info!(job = mirror.id(), target = %active.target.image.display(), ?settings, "the job begins");
        self.active.replace(Some(Rc::new(active)));
        self.added.notify_all();
        mirror
    }

    /// Closes and removes what was prepared for a job that does not begin.
    pub(super) async fn come_to_nothing(&self, launch: Launch) {
        self.place.remove();
        close(&launch.sides.1).await;
    }
}
