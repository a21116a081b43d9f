//! LUNs and their images: ours (`query-luns`) and in QEMU's shape (`query-block` and its kin), and their size.
//!
//! A LUN is a device by its name, and the node of its image has that name too; the nodes of the backing files are `NAME-backing-1`
//! and so on, from the top down.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{Arguments, done, find, throttle, told};
use crate::{
    control::{Registry, qmp::Error, without_nulls},
    lun::{
        Made, Remote, State, Stats,
        config::{CacheMode, DeviceConfig, pi_word},
        jobs::BitmapInfo,
        measured::{BUCKETS, Histogram},
        throttle::limits::Limits,
        traffic::{Class, Count, Traffic},
    },
};

/// What a LUN says of its image and its backing files, from the top down.
type Layers = [crate::lun::ImageInfo];

/// Every LUN, also those that have failed.
pub(super) fn query_luns(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    Ok(luns.all_knocked().iter().map(|(name, lun)| lun_info(name, lun)).collect())
}

fn lun_info(name: &str, lun: &Remote) -> Value {
    let made = lun.made();
    let Made { config, block_size } = &*made;
    let (mut state, mut reason) = match lun.state() {
        State::Online => ("online", None),
        State::Stopped => ("stopped", None),
        State::Failed(reason) => ("failed", Some(reason)),
    };
    let stats = match lun.stats() {
        Ok(stats) => Some(stats),
        Err(e) if state == "online" => {
            (state, reason) = ("silent", Some(e.to_string()));
            None
        }
        Err(_) => None,
    };
    without_nulls(json!({
        "name": name, "image": config.image.display().to_string(), "state": state, "reason": reason,
        "block-size": block_size.bytes(), "pi": config.pi.map_or("off", pi_word),
        "exposure": config.exposure.to_string(), "read-only": config.read_only,
        "format": stats.as_ref().map(|s| &s.format), "size": stats.as_ref().map(|s| s.capacity_bytes),
        "write-cache": stats.as_ref().map(|s| s.write_cache), "io": stats.as_ref().map(|s| &s.io),
        "counters": stats.as_ref().map(counters),
        "throttle": stats.as_ref().and_then(|s| s.throttle.as_ref()).map(throttle::throttled),
    }))
}

fn counters(stats: &Stats) -> Value {
    let Traffic { read, write, unmap, flush } = stats.traffic;
    json!({
        "commands": stats.commands, "aborted": stats.aborted, "in-flight": stats.in_flight,
        "check-conditions": stats.counted.check_conditions, "other-statuses": stats.counted.other_statuses,
        "rd_bytes": read.bytes, "wr_bytes": write.bytes, "rd_operations": read.operations,
        "wr_operations": write.operations, "unmap_operations": unmap.operations,
        "flush_operations": flush.operations, "pi": stats.pi,
        "l2-cache": stats.caches.map(|c| c.l2_cache), "refcount-cache": stats.caches.map(|c| c.refcount_cache),
        "tuple-cache": stats.tuple_cache,
    })
}

fn image_info(layers: &Layers) -> Option<Value> {
    let (top, beneath) = layers.split_first()?;
    let backing = top.backing.as_ref();
    Some(json!({
        "filename": top.path.display().to_string(), "format": top.format.to_string(),
        "virtual-size": top.virtual_size, "actual-size": top.actual_size, "cluster-size": top.cluster_size,
        "backing-filename": backing.map(|(name, _)| name),
        "full-backing-filename": backing.and(beneath.first()).map(|b| b.path.display().to_string()),
        "backing-filename-format": backing.and_then(|(_, format)| format.as_ref()),
        "snapshots": (!top.snapshots.is_empty()).then_some(&top.snapshots),
        "backing-image": image_info(beneath),
    }))
}

/// The node of one layer; what is beneath the top is never written to.
fn node(
    name: String,
    layers: &Layers,
    config: &DeviceConfig,
    read_only: bool,
    write_cache: bool,
    limits: &Limits,
) -> Option<Value> {
    let direct = config.cache == CacheMode::None;
    let top = layers.first()?;
    let mut node = without_nulls(json!({
        "file": top.path.display().to_string(), "node-name": name, "ro": read_only, "drv": top.format.to_string(),
        "backing_file": layers.get(1).map(|b| b.path.display().to_string()),
        "backing_file_depth": layers.len() - 1, "encrypted": false, "detect_zeroes": "off",
        "write_threshold": 0,
        "cache": { "writeback": write_cache, "direct": direct, "no-flush": false },
        "image": image_info(layers),
    }));
    if let Some(node) = node.as_object_mut() {
        node.extend(throttle::limits(limits));
    }
    Some(node)
}

/// The nodes of a LUN, from the top down.
fn nodes(name: &str, lun: &Remote) -> Result<Vec<Value>, Error> {
    let (layers, stats) = (told(lun.describe())?, told(lun.stats())?);
    let named = |i: usize| if i == 0 { name.to_owned() } else { format!("{name}-backing-{i}") };
    let made = lun.made();
    let read_only = |i| i > 0 || made.config.read_only;
    // What is limited are the LUN's commands, whichever file they end in.
    let limits = |i| stats.throttle.filter(|_| i == 0).unwrap_or_default().limits;
    let node =
        |i| node(named(i), &layers[i..], &lun.made().config, read_only(i), stats.write_cache, &limits(i));
    let mut nodes: Vec<Value> = (0..layers.len()).filter_map(node).collect();
    if let Some(top) = nodes.first_mut().filter(|_| !stats.bitmaps.is_empty()) {
        top["dirty-bitmaps"] = stats.bitmaps.iter().map(bitmap).collect();
    }
    Ok(nodes)
}

/// QEMU's BlockDirtyInfo.
fn bitmap(bitmap: &BitmapInfo) -> Value {
    without_nulls(json!({
        "name": bitmap.name, "count": bitmap.count, "granularity": bitmap.granularity,
        "recording": bitmap.recording, "busy": bitmap.busy, "persistent": bitmap.persistent,
        "inconsistent": bitmap.inconsistent.then_some(true),
    }))
}

/// LUNs that are up, with what is asked of each: one that goes meanwhile, or has failed, has no image to tell of.
fn of_each(luns: &Registry, tell: impl Fn(&str, &Remote) -> Result<Vec<Value>, Error>) -> Value {
    luns.all_knocked().iter().filter_map(|(name, lun)| tell(name, lun).ok()).flatten().collect()
}

/// QEMU's BlockInfo of every LUN; one that has failed is there without its image.
pub(super) fn query_block(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    let block = |(name, lun): &(String, Remote)| {
        let inserted = nodes(name, lun).ok().and_then(|nodes| nodes.into_iter().next());
        without_nulls(json!({
            "device": name, "qdev": name, "type": "unknown", "removable": false, "locked": false,
            "io-status": if inserted.is_some() { "ok" } else { "failed" }, "inserted": inserted,
        }))
    };
    Ok(luns.all_knocked().iter().map(block).collect())
}

/// QEMU's BlockDeviceInfo of every image and backing file.
pub(super) fn query_nodes(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    Ok(of_each(luns, nodes))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// QEMU's BlockLatencyHistogramInfo: boundaries in nanoseconds, and one bin more than there are of them.
fn histogram(took: &Histogram) -> Value {
    let boundaries: Vec<u64> = (0..BUCKETS).filter_map(Histogram::limit).map(|us| us * 1000).collect();
    json!({ "boundaries": boundaries, "bins": took.buckets.to_vec() })
}

/// QEMU's BlockStats of every LUN.
pub(super) fn query_stats(luns: &Registry, _: &Arguments) -> Result<Value, Error> {
    Ok(of_each(luns, |name, lun| {
        let told = told(lun.stats())?;
        let Traffic { read, write, unmap, flush } = told.traffic;
        let mut stats = Map::from_iter([
            ("rd_bytes".to_owned(), read.bytes.into()),
            ("wr_bytes".to_owned(), write.bytes.into()),
        ]);
        for (kind, class, Count { operations, failed, invalid, .. }) in [
            ("rd", Class::Read, read),
            ("wr", Class::Write, write),
            ("unmap", Class::Unmap, unmap),
            ("flush", Class::Flush, flush),
        ] {
            let took = told.measured.of(class);
            stats.insert(format!("{kind}_total_time_ns"), nanoseconds(took.sum).into());
            // As in QEMU, where UNMAP has none.
            if class != Class::Unmap {
                stats.insert(format!("{kind}_latency_histogram"), histogram(&took));
            }
            stats.insert(format!("{kind}_operations"), operations.into());
            stats.insert(format!("failed_{kind}_operations"), failed.into());
            stats.insert(format!("invalid_{kind}_operations"), invalid.into());
        }
        Ok(vec![json!({ "device": name, "qdev": name, "node-name": name, "stats": stats })])
    }))
}

/// Another size, of the image and for initiators.
pub(super) fn resize(luns: &Registry, args: &Arguments) -> Result<Value, Error> {
    let device = match (args.maybe_text("device"), args.maybe_text("node-name")) {
        (Some(name), None) | (None, Some(name)) => name,
        (Some(_), Some(_)) => {
            return Err(Error::generic("'device' and 'node-name' are mutually exclusive: give one"));
        }
        (None, None) => return Err(Error::generic("Need exactly one of 'device' and 'node-name'")),
    };
    let (lun, size) = (find(luns, device)?, args.number("size")?);
    match luns.host() {
        Some(host) => host.resize(device, size)?,
        None => told(lun.resize(size))?,
    }
    done()
}
