//! Jobs and protection: scrubs are begun, led and told of. What is asked of all jobs alike goes to mirrors too.

use serde_json::{Value, json};

use super::{Arguments, done, find, mirror, told};
use crate::{
    control::{Registry, job_device, job_id, qmp::Error, without_nulls},
    lun::{
        Remote,
        jobs::JobOrder,
        scrub::{Scrub, ScrubOrder},
    },
};

/// Begins a scrub.
pub(super) fn scrub(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let lun = find(luns, args.text("device")?)?;
    told(lun.scrub(ScrubOrder::Start(args.maybe_number("speed"))))?;
    done()
}

/// A scrub if it is one's name, and otherwise a block job.
fn order(luns: &Registry, id: &str, order: ScrubOrder, other: JobOrder) -> Result<Value, Error> {
    match job_device(id).and_then(|device| luns.find(device)) {
        Some(lun) => told(lun.scrub(order)).map(drop)?,
        None => mirror::order(luns, id, other)?,
    }
    done()
}

/// Ends a job.
pub(super) fn cancel(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let id = args.text("id")?;
    order(luns, id, ScrubOrder::Cancel, JobOrder::Cancel { id: id.to_owned(), force: true })
}

/// Has a job wait.
pub(super) fn pause(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    pause_job(luns, args.text("id")?)
}

/// Has a job go on.
pub(super) fn resume(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    resume_job(luns, args.text("id")?)
}

/// Has a job wait, by QEMU's older name.
pub(super) fn block_pause(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    pause_job(luns, args.text("device")?)
}

/// Has a job go on, by QEMU's older name.
pub(super) fn block_resume(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    resume_job(luns, args.text("device")?)
}

fn pause_job(luns: &Registry, id: &str) -> Result<Value, Error> {
    order(luns, id, ScrubOrder::Pause, JobOrder::Pause(id.to_owned()))
}

fn resume_job(luns: &Registry, id: &str) -> Result<Value, Error> {
    order(luns, id, ScrubOrder::Resume, JobOrder::Resume(id.to_owned()))
}

/// Sets the speed of a job.
pub(super) fn set_speed(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (id, speed) = (args.text("device")?, args.number("speed")?);
    order(luns, id, ScrubOrder::SetSpeed(speed), JobOrder::SetSpeed(id.to_owned(), speed))
}

/// The jobs under way.
pub(super) fn query_jobs(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    let mut jobs = Vec::new();
    for (name, lun) in luns.all_knocked() {
        for job in lun.job(JobOrder::Query).unwrap_or_default() {
            jobs.push(without_nulls(json!({
                "id": job.id, "type": job.settings.task.word(), "status": job.status, "current-progress": job.offset,
                "total-progress": job.len, "error": job.error,
            })));
        }
        // A LUN that has just gone, or has no protection, has none.
        if let Ok(Some(scrub)) = lun.scrub(ScrubOrder::Query)
            && scrub.is_under_way()
        {
            let (done, total) = scrub.progress();
            jobs.push(json!({
                "id": job_id(&name), "type": "pi-scrub", "status": scrub.status,
                "current-progress": done, "total-progress": total,
            }));
        }
    }
    Ok(Value::Array(jobs))
}

/// Protection of one LUN, or of all that serve: its counters, and the scrub under way or the last one.
pub(super) fn query_pi(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    match args.maybe_text("device") {
        Some(device) => Ok(json!([protection(device, &find(luns, device)?)?])),
        // One that has failed has no protection to tell of; `query-luns` says that it failed.
        None => Ok(luns.all_knocked().iter().filter_map(|(name, lun)| protection(name, lun).ok()).collect()),
    }
}

fn protection(name: &str, lun: &Remote) -> Result<Value, Error> {
    let counters = told(lun.stats())?.pi;
    let scrub = if counters.is_some() { told(lun.scrub(ScrubOrder::Query))? } else { None };
    Ok(without_nulls(json!({
        "device": name, "protected": counters.is_some(), "counters": counters,
        "scrub": scrub.map(|s| described(name, &s)),
    })))
}

fn described(device: &str, scrub: &Scrub) -> Value {
    let (done, total) = scrub.progress();
    let mut value = json!(scrub);
    if let Some(map) = value.as_object_mut() {
        map.insert("current-progress".to_owned(), done.into());
        map.insert("total-progress".to_owned(), total.into());
        if scrub.is_under_way() {
            map.insert("job".to_owned(), job_id(device).into());
        }
    }
    value
}
