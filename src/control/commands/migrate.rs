//! LUNs that go to another host and come from one. That is the daemon's: see [`Host`].

use serde_json::{Value, json};

use super::{
    super::{
        Comes, To,
        migrations::{self, Status},
        schema::{Type, has, may},
        types, without_nulls,
    },
    Arguments, Command, Error, NOTHING, Registry, luns,
};

pub(super) const MIGRATE: Command = Command {
    name: "migrate",
    args: &[
        has("device", Type::Str),
        has("uri", Type::Str),
        may("tls-certificates", Type::Str),
        may("tls-hostname", Type::Str),
        may("blk", Type::Bool),
        may("pause-before-switchover", Type::Bool),
    ],
    returns: Type::Object(&types::LUN_MIGRATED),
    help: "as QEMU's, of one LUN: hands it over to `tcmu-dif receive` or `migrate-incoming`, which listens at `uri` (`unix:/PATH`, or `tls://HOST:PORT` with the \
           directory `tls-certificates`; `tls-hostname` is the name in the other side's certificate, if it is not HOST), and answers when it \
           serves there and is gone here. With `blk` (QEMU's before 9.1; virsh's `--copy-storage-all`) its image is copied there first, while it is in use, as a job that `query-jobs` \
           has; and with `pause-before-switchover` (QEMU's capability) it is not stopped when all is copied, but serves here with the status `pre-switchover`, each write going to both \
           sides, until `migrate-continue`: the guest can be stopped there, to go along. If a step fails it serves here as before, and the error says which",
    run: migrate,
    after: None,
};

pub(super) const CONTINUE: Command = Command {
    name: "migrate-continue",
    args: &[has("device", Type::Str), has("state", Type::Enum(&types::MIGRATION_STATUS))],
    returns: NOTHING,
    help: "as in QEMU: a LUN that waits in `state`, which is `pre-switchover`, goes over now. `device` is ours",
    run: go_on,
    after: None,
};

pub(super) const CANCEL: Command = Command {
    name: "migrate_cancel",
    args: &[],
    returns: NOTHING,
    help: "as in QEMU: `migrate-incoming` waits no longer for a source that has not come, or a LUN whose image is being copied to another host stays here. One that goes over cannot be called back",
    run: cancel,
    after: None,
};

pub(super) const INCOMING: Command = Command {
    name: "migrate-incoming",
    args: &[
        has("uri", Type::Str),
        may("device", Type::Str),
        may("tls-certificates", Type::Str),
        may("image", Type::Str),
        may("format", Type::Str),
    ],
    returns: NOTHING,
    help: "as in QEMU: listens at `uri` for one source, as `tcmu-dif receive --once` does, and answers when it listens. What becomes of it is told by MIGRATION and `query-migrate`. \
           `device` is another name for the LUN than it has there. `image` is where the image of a LUN is made that comes with its storage: an absolute path, or a directory in which it is \
           called as it is there; without it such a LUN is refused. `format` is its format, if not the one that it has there",
    run: incoming,
    after: None,
};

pub(super) const QUERY: Command = Command {
    name: "query-migrate",
    args: &[may("device", Type::Str)],
    returns: Type::Object(&types::MIGRATION_INFO),
    help: "as in QEMU: what goes over or has come since the daemon began, the newest, or the newest of the LUN `device`; empty if there is none. `device`, `uri` and \
           `incoming` are ours",
    run: query,
    after: None,
};

fn to<'a>(args: &'a Arguments) -> Result<To<'a>, Error> {
    Ok(To {
        uri: args.text("uri")?,
        certificates: args.maybe_text("tls-certificates"),
        hostname: args.maybe_text("tls-hostname"),
        blk: args.flag("blk"),
        pause_before_switchover: args.flag("pause-before-switchover"),
    })
}

fn migrate(registry: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (host, device, to) = (luns::host(registry)?, args.text("device")?, to(args)?);
    if to.pause_before_switchover && !to.blk {
        return Err(Error::generic(
            "pause-before-switchover is for a LUN that goes with its storage (blk), which takes its time; without, stop the guest first: the LUN goes at once",
        ));
    }
    let going = migrations::UnderWay::begin(registry, false, Some(device), to.uri);
    let given = host.hand_over(registry, device, &to, &going.watched(to.pause_before_switchover));
    going.ends(given.as_ref().map(drop));
    given.map(without_nulls)
}

fn go_on(registry: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (device, state) = (args.text("device")?, args.text("state")?);
    if state != Status::PreSwitchover.word() {
        return Err(Error::generic(format!("state '{state}': a LUN waits in pre-switchover alone")));
    }
    migrations::switch_over(registry, device).map(|()| json!({}))
}

fn incoming(registry: &Registry, args: &Arguments) -> Result<Value, Error> {
    let comes = Comes {
        device: args.maybe_text("device"),
        image: args.maybe_text("image"),
        format: args.maybe_text("format"),
    };
    migrations::wait_for_one(registry, luns::host(registry)?, &to(args)?, &comes)?;
    Ok(json!({}))
}

fn cancel(registry: &Registry, _: &Arguments) -> Result<Value, Error> {
    match migrations::cancel_copies(registry)? {
        true => Ok(json!({})),
        false => migrations::cancel(registry).map(|()| json!({})),
    }
}

fn query(registry: &Registry, args: &Arguments) -> Result<Value, Error> {
    let mut found = registry.migrations().query(args.maybe_text("device"));
    if [Status::Active, Status::PreSwitchover].iter().any(|status| found["status"] == status.word())
        && let Some(job) = found["device"].as_str().and_then(|device| migrations::copy_of(registry, device))
    {
        found["disk"] = json!({
            "transferred": job.offset, "remaining": job.len.saturating_sub(job.offset), "total": job.len,
        });
    }
    Ok(without_nulls(found))
}
