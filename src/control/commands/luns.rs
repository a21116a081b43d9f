//! LUNs made and taken down. That is the daemon's: see [`Host`].

use serde_json::{Value, json};

use super::{super::without_nulls, Arguments, Error, Host, Registry};

pub(super) fn add(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.add(args.text("device")?, args.all().clone()).map(without_nulls)
}

pub(super) fn del(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.del(args.text("device")?, args.flag("force")).map(without_nulls)
}

pub(super) fn migrate(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let (host, device) = (host(luns)?, args.text("device")?);
    let tell = |status| luns.bus().publish("MIGRATION", json!({ "device": device, "status": status }));
    tell("active");
    let given = host.hand_over(luns, device, args.text("uri")?);
    tell(if given.is_ok() { "completed" } else { "failed" });
    given.map(without_nulls)
}

fn host(luns: &Registry) -> Result<&dyn Host, Error> {
    luns.host().ok_or_else(|| {
        Error::generic("there is no daemon here that could make a LUN, take one down or hand one over")
    })
}
