//! What can be asked over QMP, command by command. Names, arguments and words are QEMU's where it has them.

use serde_json::{Map, Value, json};

use super::{
    Registry, job_device, job_id,
    qmp::{Class, Error, version},
};
use crate::lun::{
    LunError, Remote,
    scrub::{Scrub, ScrubError, ScrubOrder},
};

type Run = fn(&Registry, &mut Arguments) -> Result<Value, Error>;

/// Every command but `qmp_capabilities`, which is the connection's own.
const COMMANDS: &[(&str, Run)] = &[
    ("block-job-set-speed", set_speed),
    ("job-cancel", |luns, args| job(luns, args, ScrubOrder::Cancel)),
    ("job-pause", |luns, args| job(luns, args, ScrubOrder::Pause)),
    ("job-resume", |luns, args| job(luns, args, ScrubOrder::Resume)),
    ("pi-scrub", scrub),
    ("query-commands", |_, args| args.end().map(|()| names())),
    ("query-jobs", |luns, args| args.end().map(|()| jobs(luns))),
    ("query-pi", query_pi),
    ("query-version", |_, args| args.end().map(|()| version())),
];

/// Carries out a command.
///
/// # Errors
/// In QMP's classes: also for arguments that are missing, of the wrong type, or too many.
pub(super) fn execute(luns: &Registry, name: &str, arguments: Map<String, Value>) -> Result<Value, Error> {
    let Some((_, run)) = COMMANDS.iter().find(|(known, _)| *known == name) else {
        return Err(Error::new(Class::CommandNotFound, format!("The command {name} has not been found")));
    };
    let mut arguments = Arguments { given: arguments };
    run(luns, &mut arguments)
}

/// The arguments of a command. Each is taken once; [`Arguments::end`] refuses what is left.
struct Arguments {
    given: Map<String, Value>,
}

impl Arguments {
    fn string(&mut self, name: &str) -> Result<String, Error> {
        match self.given.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err(wrong_type(name, "string")),
            None => Err(Error::generic(format!("Parameter '{name}' is missing"))),
        }
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, Error> {
        match self.given.remove(name) {
            None => Ok(None),
            Some(value) => value.as_u64().map(Some).ok_or_else(|| wrong_type(name, "integer")),
        }
    }

    fn end(&self) -> Result<(), Error> {
        match self.given.keys().next() {
            Some(name) => Err(Error::generic(format!("Parameter '{name}' is unexpected"))),
            None => Ok(()),
        }
    }
}

fn wrong_type(name: &str, wanted: &str) -> Error {
    Error::generic(format!("Invalid parameter type for '{name}', expected: {wanted}"))
}

fn names() -> Value {
    let all = COMMANDS.iter().map(|(name, _)| *name).chain(["qmp_capabilities"]);
    all.map(|name| json!({ "name": name })).collect()
}

fn find(luns: &Registry, device: &str) -> Result<Remote, Error> {
    luns.find(device).ok_or_else(|| {
        Error::new(
            Class::DeviceNotFound,
            format!("LUN '{device}' is not served: tcmu-dif list tells which are"),
        )
    })
}

/// What a LUN says, in QMP's classes.
fn told<T>(result: Result<T, LunError>) -> Result<T, Error> {
    result.map_err(|e| {
        let class = match e {
            LunError::Scrub(ScrubError::NoneUnderWay) => Class::DeviceNotActive,
            _ => Class::GenericError,
        };
        Error::new(class, e.next_step().map_or(e.to_string(), |next| format!("{e}: {next}")))
    })
}

fn scrub(luns: &Registry, args: &mut Arguments) -> Result<Value, Error> {
    let (device, speed) = (args.string("device")?, args.number("speed")?);
    args.end()?;
    told(find(luns, &device)?.scrub(ScrubOrder::Start(speed)))?;
    Ok(json!({}))
}

fn order(luns: &Registry, id: &str, order: ScrubOrder) -> Result<Value, Error> {
    let none = || Error::new(Class::DeviceNotActive, format!("Job '{id}' not found"));
    let lun = job_device(id).and_then(|device| luns.find(device)).ok_or_else(none)?;
    told(lun.scrub(order))?;
    Ok(json!({}))
}

fn job(luns: &Registry, args: &mut Arguments, what: ScrubOrder) -> Result<Value, Error> {
    let id = args.string("id")?;
    args.end()?;
    order(luns, &id, what)
}

fn set_speed(luns: &Registry, args: &mut Arguments) -> Result<Value, Error> {
    let (id, speed) = (args.string("device")?, args.number("speed")?);
    args.end()?;
    let speed = speed.ok_or_else(|| Error::generic("Parameter 'speed' is missing"))?;
    order(luns, &id, ScrubOrder::SetSpeed(speed))
}

fn jobs(luns: &Registry) -> Value {
    let mut jobs = Vec::new();
    for (name, lun) in luns.all() {
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
    Value::Array(jobs)
}

/// Protection of one LUN, or of all: its counters, and the scrub under way or the last one.
fn query_pi(luns: &Registry, args: &mut Arguments) -> Result<Value, Error> {
    let wanted = match args.given.contains_key("device") {
        true => {
            let device = args.string("device")?;
            let lun = find(luns, &device)?;
            vec![(device, lun)]
        }
        false => luns.all(),
    };
    args.end()?;
    let mut all = Vec::new();
    for (name, lun) in wanted {
        let counters = told(lun.stats())?.pi;
        let scrub = if counters.is_some() { told(lun.scrub(ScrubOrder::Query))? } else { None };
        all.push(json!({
            "device": name, "protected": counters.is_some(), "counters": counters,
            "scrub": scrub.map(|s| described(&name, &s)),
        }));
    }
    Ok(Value::Array(all))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(name: &str, arguments: Value) -> Error {
        let Value::Object(arguments) = arguments else { panic!("{arguments}") };
        execute(&Registry::default(), name, arguments).unwrap_err()
    }

    #[test]
    fn wrong_questions_are_refused_in_qemus_words() {
        let not_found = Class::CommandNotFound;
        assert_eq!(
            refused("query-kvm", json!({})),
            Error::new(not_found, "The command query-kvm has not been found")
        );
        for (name, arguments, desc) in [
            ("pi-scrub", json!({}), "Parameter 'device' is missing"),
            ("pi-scrub", json!({ "device": 1 }), "Invalid parameter type for 'device', expected: string"),
            (
                "pi-scrub",
                json!({ "device": "a", "speed": -1 }),
                "Invalid parameter type for 'speed', expected: integer",
            ),
            ("pi-scrub", json!({ "device": "a", "fast": true }), "Parameter 'fast' is unexpected"),
            ("block-job-set-speed", json!({ "device": "scrub-a" }), "Parameter 'speed' is missing"),
        ] {
            assert_eq!(refused(name, arguments), Error::generic(desc));
        }
        assert_eq!(refused("pi-scrub", json!({ "device": "a" })).class, Class::DeviceNotFound);
        for id in ["scrub-a", "a", ""] {
            let e = refused("job-cancel", json!({ "id": id }));
            assert_eq!(e, Error::new(Class::DeviceNotActive, format!("Job '{id}' not found")));
        }
    }

    #[test]
    fn what_takes_no_arguments_refuses_some_and_every_command_is_listed_once() {
        let listed = execute(&Registry::default(), "query-commands", Map::new()).unwrap();
        let mut names: Vec<String> =
            listed.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), all), (COMMANDS.len() + 1, COMMANDS.len() + 1));
        let e = refused("query-version", json!({ "x": 1 }));
        assert_eq!(e, Error::generic("Parameter 'x' is unexpected"));
    }
}
