//! What can be asked over QMP, command by command. Names, arguments and words are QEMU's where it has them.
//!
//! One table says it all: arguments are checked against it, `query-commands` and `query-qmp-schema` are made from it, and so is
//! the table in `docs/qmp.md`.

mod backup;
mod bitmap;
mod block;
mod chain;
mod export;
mod jobs;
mod luns;
mod migrate;
mod mirror;
mod snapshot;
mod throttle;
mod transaction;

use serde_json::{Map, Value, json};

use super::{
    Host, Registry, ShutdownCause,
    events::EVENTS,
    qmp::{Class, Error, version},
    schema::{EMPTY, Member, Schema, Type, check_members, has, may},
    types,
};
use crate::lun::{LunError, Remote, jobs::JobError, scrub::ScrubError};

/// What is done once the client has its answer.
pub(super) type After = fn(&Registry);

/// A command.
pub(super) struct Command {
    name: &'static str,
    args: &'static [Member],
    returns: Type,
    help: &'static str,
    run: fn(&Registry, &Arguments) -> Result<Value, Error>,
    /// What is done once the client has its answer.
    after: Option<After>,
}

const NOTHING: Type = Type::Object(&EMPTY);

/// Every command.
static COMMANDS: &[Command] = &[
    export::ADD,
    export::DEL,
    bitmap::ADD,
    bitmap::CLEAR,
    bitmap::DISABLE,
    bitmap::ENABLE,
    bitmap::MERGE,
    bitmap::REMOVE,
    Command {
        name: "block-job-cancel",
        args: &[has("device", Type::Str), may("force", Type::Bool)],
        returns: NOTHING,
        help: "as in QEMU: `device` is the job's id. A mirror that is ready ends with a target that is what the LUN was at that moment, and \
               with BLOCK_JOB_COMPLETED, unless `force` is true",
        run: mirror::block_cancel,
        after: None,
    },
    Command {
        name: "block-job-complete",
        args: &[has("device", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU: a mirror that is ready ends, and the LUN goes over to its target; `device` is the job's id",
        run: mirror::block_complete,
        after: None,
    },
    Command {
        name: "block-job-dismiss",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as `job-dismiss`",
        run: mirror::dismiss,
        after: None,
    },
    Command {
        name: "block-job-finalize",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as `job-finalize`",
        run: mirror::finalize,
        after: None,
    },
    Command {
        name: "block-job-pause",
        args: &[has("device", Type::Str)],
        returns: NOTHING,
        help: "as `job-pause`",
        run: jobs::block_pause,
        after: None,
    },
    Command {
        name: "block-job-resume",
        args: &[has("device", Type::Str)],
        returns: NOTHING,
        help: "as `job-resume`",
        run: jobs::block_resume,
        after: None,
    },
    Command {
        name: "block-job-set-speed",
        args: &[has("device", Type::Str), has("speed", Type::Int)],
        returns: NOTHING,
        help: "as in QEMU: `device` is the job's id, `speed` is in bytes a second, 0 for no limit",
        run: jobs::set_speed,
        after: None,
    },
    Command {
        name: "block_set_io_throttle",
        args: throttle::ARGUMENTS,
        returns: NOTHING,
        help: "as in QEMU: the LUN's limits from now on, all of them anew, 0 for none; `device` or `id` is the LUN's name. They outlive a \
               restart, until the LUN is deleted",
        run: throttle::set,
        after: None,
    },
    Command {
        name: "block_resize",
        args: &[may("device", Type::Str), may("node-name", Type::Str), has("size", Type::Int)],
        returns: NOTHING,
        help: "another size in bytes, of the image and for initiators, as `tcmu-dif resize`: a multiple of the block size",
        run: block::resize,
        after: None,
    },
    chain::COMMIT,
    chain::STREAM,
    backup::BLOCKDEV_BACKUP,
    mirror::BLOCKDEV_MIRROR,
    snapshot::TAKE,
    snapshot::TAKE_WITHIN,
    snapshot::DELETE_WITHIN,
    backup::DRIVE_BACKUP,
    mirror::DRIVE_MIRROR,
    Command {
        name: "job-cancel",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU: the job ends at once, and a mirror's target is left as it is",
        run: jobs::cancel,
        after: None,
    },
    Command {
        name: "job-complete",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as `block-job-complete`",
        run: mirror::complete,
        after: None,
    },
    Command {
        name: "job-dismiss",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU: forgets a job that has ended, if that was begun with `auto-dismiss` false",
        run: mirror::dismiss,
        after: None,
    },
    Command {
        name: "job-finalize",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU: makes final a job that is pending, begun with `auto-finalize` false",
        run: mirror::finalize,
        after: None,
    },
    Command {
        name: "job-pause",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU; a paused job stays paused across a restart",
        run: jobs::pause,
        after: None,
    },
    Command {
        name: "job-resume",
        args: &[has("id", Type::Str)],
        returns: NOTHING,
        help: "as in QEMU",
        run: jobs::resume,
        after: None,
    },
    Command {
        name: "job-set-share",
        args: &[has("id", Type::Str), has("share", Type::Int)],
        returns: NOTHING,
        help: "ours: while guests are at work, the block job of that `id` copies for `share` percent of the time, 1 to 100, and rests for the \
               others; 100 is no rest. One that has been told to come to its end does not rest",
        run: mirror::set_share,
        after: None,
    },
    Command {
        name: "lun-add",
        args: &[
            has("device", Type::Str),
            has("image", Type::Str),
            may("size", Type::Int),
            may("format", Type::Str),
            may("block-size", Type::Int),
            may("pi", Type::Str),
            may("pi-mode", Type::Str),
            may("exposure", Type::Str),
            may("pi-transfer", Type::Str),
            may("sidecar", Type::Str),
            may("cache", Type::Str),
            may("cpus", Type::Str),
            may("cache-size", Type::Int),
            may("copy-group", Type::Str),
            may("throttle", Type::Str),
            may("read-only", Type::Bool),
            may("serial", Type::Str),
            may("export", Type::List(&Type::Str)),
        ],
        returns: Type::Object(&types::LUN_ADDED),
        help: "makes a LUN and its exports, as `tcmu-dif create` does, in the same words; answers when its disks are there",
        run: luns::add,
        after: None,
    },
    Command {
        name: "lun-del",
        args: &[has("device", Type::Str), may("force", Type::Bool)],
        returns: Type::Object(&types::LUN_DELETED),
        help: "takes a LUN and its exports down, as `tcmu-dif delete` does; the image stays. Refused while somebody uses it, unless \
               `force` is true",
        run: luns::del,
        after: None,
    },
    migrate::MIGRATE,
    migrate::INCOMING,
    migrate::CONTINUE,
    migrate::CANCEL,
    export::SERVER_ADD,
    export::SERVER_REMOVE,
    export::SERVER_START,
    export::SERVER_STOP,
    Command {
        name: "pi-scrub",
        args: &[has("device", Type::Str), may("speed", Type::Int)],
        returns: NOTHING,
        help: "begins a scrub of a LUN that has protection information, as the job `scrub-DEVICE`; `speed` is in bytes a second, 0 \
               for no limit, 104857600 if it is left out",
        run: jobs::scrub,
        after: None,
    },
    Command {
        name: "qmp_capabilities",
        args: &[may("enable", Type::List(&Type::Enum(&types::CAPABILITY)))],
        returns: NOTHING,
        help: "as in QEMU: has to come first; there are no capabilities to enable",
        run: |_, _| {
            let words = "Capabilities negotiation is already complete, command ignored";
            Err(Error::new(Class::CommandNotFound, words))
        },
        after: None,
    },
    Command {
        name: "query-block-jobs",
        args: &[],
        returns: Type::List(&Type::Object(&types::BLOCK_JOB_INFO)),
        help: "as in QEMU: every block job, also those that have ended and wait to be dismissed; `lun`, `target`, `sync`, `copy-mode` and \
               `repaired` are ours",
        run: mirror::query,
        after: None,
    },
    Command {
        name: "query-block",
        args: &[],
        returns: Type::List(&Type::Object(&types::BLOCK_INFO)),
        help: "as in QEMU: every LUN with its image and backing files",
        run: block::query_block,
        after: None,
    },
    export::QUERY,
    Command {
        name: "query-blockstats",
        args: &[],
        returns: Type::List(&Type::Object(&types::BLOCK_STATS)),
        help: "as in QEMU: bytes and commands of every LUN since it started, and the time that they took, whose histograms are always on; \
               what is not counted here (merges, zones, `wr_highest_offset`) is left out",
        run: block::query_stats,
        after: None,
    },
    Command {
        name: "query-commands",
        args: &[],
        returns: Type::List(&Type::Object(&types::COMMAND_INFO)),
        help: "the names of all commands",
        run: |_, _| Ok(COMMANDS.iter().map(|c| json!({ "name": c.name })).collect()),
        after: None,
    },
    Command {
        name: "query-jobs",
        args: &[],
        returns: Type::List(&Type::Object(&types::JOB_INFO)),
        help: "the jobs under way, as QEMU tells of its own",
        run: jobs::query_jobs,
        after: None,
    },
    Command {
        name: "query-luns",
        args: &[],
        returns: Type::List(&Type::Object(&types::LUN_INFO)),
        help: "every LUN that serves or has failed since it did: image, state, size, protection, counters; one that never started \
               is in `tcmu-dif list`",
        run: block::query_luns,
        after: None,
    },
    migrate::QUERY,
    Command {
        name: "query-named-block-nodes",
        args: &[],
        returns: Type::List(&Type::Object(&types::BLOCK_DEVICE_INFO)),
        help: "as in QEMU: every image under its LUN's name, and its backing files as `NAME-backing-1` and so on",
        run: block::query_nodes,
        after: None,
    },
    Command {
        name: "query-pi",
        args: &[may("device", Type::Str)],
        returns: Type::List(&Type::Object(&types::PI_INFO)),
        help: "protection of one LUN or of all: counters, and the scrub under way or the last one, with the blocks that it found",
        run: jobs::query_pi,
        after: None,
    },
    Command {
        name: "query-qmp-schema",
        args: &[],
        returns: Type::List(&Type::Object(&types::SCHEMA_INFO)),
        help: "every command with the types of its arguments and its answer, as in QEMU, under plain type names",
        run: |_, _| Ok(schema()),
        after: None,
    },
    Command {
        name: "query-version",
        args: &[],
        returns: Type::Object(&types::VERSION_INFO),
        help: "the version, in QEMU's shape: what it calls `qemu` is this program's",
        run: |_, _| Ok(version()),
        after: None,
    },
    Command {
        name: "quit",
        args: &[],
        returns: NOTHING,
        help: "ends the daemon as SIGTERM does: commands in flight are finished, images closed; the LUNs stay, and wait for the next",
        run: |luns, _| match luns.host() {
            Some(_) => done(),
            None => Err(Error::generic("there is no daemon here that could end")),
        },
        after: Some(|luns| {
            luns.shut_down(ShutdownCause::Quit);
            luns.host().into_iter().for_each(Host::quit);
        }),
    },
    transaction::TRANSACTION,
];

/// The tables of commands and events, in Markdown.
pub(super) fn documentation() -> String {
    let argument =
        |m: &Member| format!("`{}`: {}{}", m.name, m.of.name(), if m.optional { ", optional" } else { "" });
    let arguments = |members: &[Member]| match members {
        [] => "–".to_owned(),
        some => some.iter().map(argument).collect::<Vec<_>>().join("; "),
    };
    let mut text =
        String::from("| command | arguments | returns | what it does |\n| --- | --- | --- | --- |\n");
    for c in COMMANDS {
        let returns = match c.returns.name() {
            name if name == EMPTY.name => "–".to_owned(),
            name => format!("`{name}`"),
        };
        text.push_str(&format!("| `{}` | {} | {returns} | {} |\n", c.name, arguments(c.args), c.help));
    }
    text.push_str("\n| event | data | when |\n| --- | --- | --- |\n");
    for e in EVENTS {
        text.push_str(&format!("| `{}` | {} | {} |\n", e.name, arguments(e.data), e.help));
    }
    text
}

fn schema() -> Value {
    let mut schema = Schema::default();
    for command in COMMANDS {
        schema.command(command.name, command.args, &command.returns);
    }
    for event in EVENTS {
        schema.event(event.name, event.data);
    }
    schema.into_value()
}

/// Looks a command up, and checks what it is given.
///
/// # Errors
/// In QEMU's words: that there is no such command; arguments that are missing, of the wrong type, or too many.
pub(super) fn parse(
    name: &str,
    arguments: Map<String, Value>,
) -> Result<(&'static Command, Arguments), Error> {
    let command = COMMANDS.iter().find(|known| known.name == name).ok_or_else(|| {
        Error::new(Class::CommandNotFound, format!("The command {name} has not been found"))
    })?;
    check_members(command.args, &arguments)?;
    Ok((command, Arguments(arguments)))
}

/// Carries out a command. Gives its answer, and what is to be done once the client has that.
///
/// # Errors
/// Those of [`parse`], and the command's own.
pub(super) fn execute(
    luns: &Registry,
    name: &str,
    arguments: Map<String, Value>,
) -> Result<(Value, Option<After>), Error> {
    let (command, arguments) = parse(name, arguments)?;
    Ok(((command.run)(luns, &arguments)?, command.after))
}

/// The arguments of a command, of the types that its row declares.
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    fn maybe_text(&self, name: &str) -> Option<&str> {
        self.0.get(name).and_then(Value::as_str)
    }

    fn text(&self, name: &str) -> Result<&str, Error> {
        self.maybe_text(name).ok_or_else(|| missing(name))
    }

    fn maybe_number(&self, name: &str) -> Option<u64> {
        self.0.get(name).and_then(Value::as_u64)
    }

    fn number(&self, name: &str) -> Result<u64, Error> {
        self.maybe_number(name).ok_or_else(|| missing(name))
    }

    fn flag(&self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or_default()
    }

    /// A member of an argument that is an object.
    fn within(&self, name: &str, member: &str) -> Option<&str> {
        self.0.get(name)?.get(member)?.as_str()
    }

    /// A member of an object in an argument that is one.
    fn within_two(&self, name: &str, object: &str, member: &str) -> Option<&str> {
        self.0.get(name)?.get(object)?.get(member)?.as_str()
    }

    fn flag_or(&self, name: &str, otherwise: bool) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(otherwise)
    }

    /// All of them.
    fn all(&self) -> &Map<String, Value> {
        &self.0
    }

    /// How many elements a list has.
    pub(super) fn elements(&self, name: &str) -> usize {
        self.0.get(name).and_then(Value::as_array).map_or(0, Vec::len)
    }
}

fn missing(name: &str) -> Error {
    Error::generic(format!("Parameter '{name}' is missing"))
}

/// The answer of a command that has nothing to say.
fn done() -> Result<Value, Error> {
    Ok(json!({}))
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
            LunError::Scrub(ScrubError::NoneUnderWay) | LunError::Job(JobError::NotFound(_)) => {
                Class::DeviceNotActive
            }
            _ => Class::GenericError,
        };
        Error::new(class, e.next_step().map_or(e.to_string(), |next| format!("{e}: {next}")))
    })
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
    fn luns_whose_threads_hang_are_named_and_waited_for_at_the_same_time() {
        let luns = Registry::default();
        for i in 0..40 {
            luns.insert(&format!("vm{i}"), Remote::of_nobody());
        }
        let began = std::time::Instant::now();
        let (told, _) = execute(&luns, "query-luns", Map::new()).unwrap();
        // One after the other would be 200 seconds.
        assert!(began.elapsed().as_secs() < 60, "{:?}", began.elapsed());
        let told = told.as_array().unwrap();
        assert_eq!(told.len(), 40);
        for lun in told {
            assert_eq!(lun["state"], "silent");
            let reason = lun["reason"].as_str().unwrap();
            assert!(reason.starts_with("the LUN has not answered for "), "{reason}");
        }
    }

    #[test]
    fn what_takes_no_arguments_refuses_some_and_every_command_is_listed_once() {
        let listed = execute(&Registry::default(), "query-commands", Map::new()).unwrap();
        let mut names: Vec<String> =
            listed.0.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), all), (COMMANDS.len(), COMMANDS.len()));
        let e = refused("query-version", json!({ "x": 1 }));
        assert_eq!(e, Error::generic("Parameter 'x' is unexpected"));
    }

    /// Every name of a type in the schema, and who says it.
    fn named(info: &Value) -> Vec<&str> {
        let mut names: Vec<&str> =
            ["arg-type", "ret-type", "element-type"].iter().filter_map(|key| info[key].as_str()).collect();
        for list in ["members", "variants"] {
            names.extend(info[list].as_array().into_iter().flatten().filter_map(|m| m["type"].as_str()));
        }
        names
    }

    #[test]
    fn every_type_that_the_schema_names_is_in_it_and_every_command_too() {
        let schema = schema();
        let all = schema.as_array().unwrap();
        let is = |info: &Value, metas: &[&str]| metas.iter().any(|m| info["meta-type"] == *m);
        for info in all {
            for name in named(info) {
                let found: Vec<_> =
                    all.iter().filter(|i| i["name"] == name && !is(i, &["command", "event"])).collect();
                assert_eq!(found.len(), 1, "{name}, named by {info}");
            }
        }
        for command in COMMANDS {
            assert!(all.iter().any(|i| i["name"] == command.name && is(i, &["command"])), "{}", command.name);
        }
    }
}
