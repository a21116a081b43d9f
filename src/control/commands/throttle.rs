//! Limits of a LUN: QEMU's `block_set_io_throttle`, and how they stand in what queries answer.

use serde_json::{Map, Value, json};

use super::{
    super::{
        schema::{Member, Type, has, may},
        types::with_limits,
    },
    Arguments, done, find, told,
};
use crate::{
    control::{Registry, qmp::Error},
    lun::throttle::{Throttled, limits::Limits},
};

/// Those of QEMU's BlockIOThrottle, without its groups.
pub(super) const ARGUMENTS: &[Member] = with_limits!([may("device", Type::Str), may("id", Type::Str)], []);

/// Sets all limits of a LUN anew.
pub(super) fn set(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let device = match (args.maybe_text("device"), args.maybe_text("id")) {
        (Some(name), None) | (None, Some(name)) => name,
        (Some(_), Some(_)) => {
            return Err(Error::generic("'device' and 'id' are mutually exclusive: give one"));
        }
        (None, None) => return Err(Error::generic("Need exactly one of 'device' and 'id'")),
    };
    let given = args.all().iter().filter_map(|(word, value)| Some((word.clone(), value.as_u64()?)));
    let limits = Limits::of(given).map_err(|e| Error::generic(e.to_string()))?;
    told(find(luns, device)?.limit(limits))?;
    done()
}

/// Limits, as QEMU's BlockDeviceInfo has them: the rates always, the rest where it is set.
pub(super) fn limits(limits: &Limits) -> Map<String, Value> {
    limits.in_full().into_iter().map(|(word, value)| (word, value.into())).collect()
}

/// Limits and what has come of them.
pub(super) fn throttled(throttled: &Throttled) -> Value {
    let mut out = limits(&throttled.limits);
    let counts = throttled.counts;
    let waited = u64::try_from(counts.waited.as_nanos()).unwrap_or(u64::MAX);
    for (name, value) in [("delayed", counts.delayed), ("waited-ns", waited), ("waiting", counts.waiting)] {
        out.insert(name.to_owned(), value.into());
    }
    json!(out)
}
