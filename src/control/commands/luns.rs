//! LUNs made and taken down. That is the daemon's: see [`Host`].

use serde_json::{Value, json};

use super::{
    super::{
        To,
        schema::{Type, has, may},
        types, without_nulls,
    },
    Arguments, Command, Error, Host, Registry,
};

pub(super) const MIGRATE: Command = Command {
    name: "migrate",
    args: &[
        has("device", Type::Str),
        has("uri", Type::Str),
        may("tls-certificates", Type::Str),
        may("tls-hostname", Type::Str),
    ],
    returns: Type::Object(&types::LUN_MIGRATED),
    help: "as QEMU's, of one LUN: hands it over to `tcmu-dif receive`, which listens at `uri` (`unix:/PATH`, or `tls://HOST:PORT` with the \
           directory `tls-certificates`; `tls-hostname` is the name in the other side's certificate, if it is not HOST), and answers when it \
           serves there and is gone here. If a step fails it serves here as before, and the error says which",
    run: migrate,
    after: None,
};

pub(super) fn add(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.add(args.text("device")?, args.all().clone()).map(without_nulls)
}

pub(super) fn del(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.del(args.text("device")?, args.flag("force")).map(without_nulls)
}

fn migrate(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (host, device) = (host(luns)?, args.text("device")?);
    let tell = |status| luns.bus().publish("MIGRATION", json!({ "device": device, "status": status }));
    let to = To {
        uri: args.text("uri")?,
        certificates: args.maybe_text("tls-certificates"),
        hostname: args.maybe_text("tls-hostname"),
    };
    tell("active");
    let given = host.hand_over(luns, device, &to);
    tell(if given.is_ok() { "completed" } else { "failed" });
    given.map(without_nulls)
}

fn host(luns: &Registry) -> Result<&dyn Host, Error> {
    luns.host().ok_or_else(|| {
        Error::generic("there is no daemon here that could make a LUN, take one down or hand one over")
    })
}
