//! LUNs made and taken down. That is the daemon's: see [`Host`].

use serde_json::Value;

use super::{super::without_nulls, Arguments, Error, Host, Registry};

pub(super) fn add(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.add(args.text("device")?, args.all().clone()).map(without_nulls)
}

pub(super) fn del(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    host(luns)?.del(args.text("device")?, args.flag("force")).map(without_nulls)
}

/// The daemon, if there is one.
pub(super) fn host(luns: &Registry) -> Result<&dyn Host, Error> {
    luns.host().ok_or_else(|| {
        Error::generic("there is no daemon here that could make a LUN, take one down or hand one over")
    })
}
