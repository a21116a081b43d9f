//! What becomes of a job that was under way when the LUN stopped, before it serves again.

use tracing::{error, info};

use super::{Place, Resumed, Task, backup, beneath, chain, commit, target};
use crate::{
    lun::{LunParams, config::DeviceConfig, stack::Stack},
    sys::io::Io,
    volume::Volume,
};

/// Opens the target of a job that was under way. Before the LUN serves: no write may pass the mirror by.
pub(in crate::lun) async fn resume(
    io: &Io,
    params: &LunParams,
    place: &Place,
    stack: &Stack,
) -> Option<Resumed> {
    let mut record = match place.load() {
        Ok(record) => record?,
        Err(error) => {
            error!(%error, "the record of a job cannot be read: the job is lost");
            place.remove();
            return None;
        }
    };
    if record.settings.task == Task::Handover {
        info!(job = record.id, "the LUN was being handed over, which came to nothing: it serves here");
        place.remove();
        return None;
    }
    if record.settings.task.keeps_the_past() {
        record.remove_scratch();
    }
    if record.source != params.config.image {
        // It went over to the target, or was made anew with another image; then nobody is served by it.
        info!(job = record.id, "the job of another image is over");
        place.remove();
        return None;
    }
    let config = match DeviceConfig::parse(&record.target) {
        Ok(config) => config,
        Err(e) => return Some(Resumed::Lost(Box::new(record), e.to_string())),
    };
    if record.settings.task.keeps_the_past() {
        let why = if record.scratch.is_empty() { backup::PAST_IS_LOST } else { backup::SCRATCH_IS_GONE };
        return Some(Resumed::Lost(Box::new(record), why.to_owned()));
    }
    if record.settings.task.is_within() {
        return Some(match chain::stream_again(&mut record, stack.image()) {
            Ok(()) => Resumed::Within(Box::new(record)),
            Err(reason) => Resumed::Lost(Box::new(record), reason),
        });
    }
    if let Task::CommitBeneath { .. } = record.settings.task {
        let (own, size) = (&params.config, params.block_size);
        return match beneath::open_again(io, &mut record, own, &config, size, stack).await {
            Ok(Some((source, target))) => {
                Some(Resumed::Beneath(Box::new(record), Box::new(source), Box::new(target)))
            }
            Ok(None) => {
                info!(job = record.id, "the job had done its work");
                place.remove();
                None
            }
            Err(reason) => Some(Resumed::Lost(Box::new(record), reason)),
        };
    }
    let opened = match record.settings.task {
        Task::Commit { .. } => commit::open_again(io, &mut record, &config, params.block_size, stack).await,
        _ => target::reopen(io, &config, params.block_size, stack.limits().capacity).await,
    };
    match opened {
        Ok(stack) => Some(Resumed::Open(Box::new(record), Box::new(stack))),
        Err(reason) => Some(Resumed::Lost(Box::new(record), format!("its target: {reason}"))),
    }
}
