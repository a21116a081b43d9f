//! Jobs and protection: scrubs are begun, led and told of.

use serde_json::{Value, json};

use super::{Arguments, done, find, told};
use crate::{
    control::{
        Registry, job_device, job_id,
        qmp::{Class, Error},
        without_nulls,
    },
    lun::{
        Remote,
        scrub::{Scrub, ScrubOrder},
    },
};

/// Begins a scrub.
pub(super) fn scrub(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let lun = find(luns, args.text("device")?)?;
    told(lun.scrub(ScrubOrder::Start(args.maybe_number("speed"))))?;
    done()
}

fn order(luns: &Registry, id: &str, order: ScrubOrder) -> Result<Value, Error> {
    let none = || Error::new(Class::DeviceNotActive, format!("Job '{id}' not found"));
    let lun = job_device(id).and_then(|device| luns.find(device)).ok_or_else(none)?;
    told(lun.scrub(order))?;
    done()
}

/// Ends a job.
pub(super) fn cancel(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, ScrubOrder::Cancel)
}

/// Has a job wait.
pub(super) fn pause(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, ScrubOrder::Pause)
}

/// Has a job go on.
pub(super) fn resume(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("id")?, ScrubOrder::Resume)
}

/// Sets the speed of a job.
pub(super) fn set_speed(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    order(luns, args.text("device")?, ScrubOrder::SetSpeed(args.number("speed")?))
}

/// The jobs under way.
pub(super) fn query_jobs(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    let mut jobs = Vec::new();
    for (name, lun) in luns.all_knocked() {
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
