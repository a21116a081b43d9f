//! The types that commands return: QEMU's names and members where it has them (`qapi/*.json`), ours in the same style.

use super::schema::{Enum, Object, Type, has, may, object};

/// QMPCapability. None is offered.
pub(super) static CAPABILITY: Enum = Enum { name: "QMPCapability", values: &["oob"] };

/// CommandInfo.
pub(super) static COMMAND_INFO: Object = object("CommandInfo", &[has("name", Type::Str)]);

/// VersionTriple.
static VERSION_TRIPLE: Object =
    object("VersionTriple", &[has("major", Type::Int), has("minor", Type::Int), has("micro", Type::Int)]);

/// VersionInfo.
pub(super) static VERSION_INFO: Object =
    object("VersionInfo", &[has("qemu", Type::Object(&VERSION_TRIPLE)), has("package", Type::Str)]);

/// JobType, with the one of ours.
pub(super) static JOB_TYPE: Enum =
    Enum { name: "JobType", values: &["commit", "stream", "mirror", "backup", "pi-scrub"] };

/// MirrorSyncMode.
pub(super) static SYNC_MODE: Enum =
    Enum { name: "MirrorSyncMode", values: &["top", "full", "none", "incremental", "bitmap"] };

/// BitmapSyncMode.
pub(super) static BITMAP_SYNC_MODE: Enum =
    Enum { name: "BitmapSyncMode", values: &["on-success", "never", "always"] };

/// BlockDirtyInfo.
static BLOCK_DIRTY_INFO: Object = object(
    "BlockDirtyInfo",
    &[
        has("name", Type::Str),
        has("count", Type::Int),
        has("granularity", Type::Int),
        has("recording", Type::Bool),
        has("busy", Type::Bool),
        has("persistent", Type::Bool),
        may("inconsistent", Type::Bool),
    ],
);

/// MirrorCopyMode.
pub(super) static COPY_MODE: Enum =
    Enum { name: "MirrorCopyMode", values: &["background", "write-blocking"] };

/// NewImageMode.
pub(super) static NEW_IMAGE_MODE: Enum =
    Enum { name: "NewImageMode", values: &["existing", "absolute-paths"] };

/// BlockdevOnError, without `auto`, which is a device's.
pub(super) static ON_ERROR: Enum =
    Enum { name: "BlockdevOnError", values: &["report", "ignore", "enospc", "stop"] };

/// BlockJobInfo; `share`, `lun`, `target`, `repaired`, of a mirror or a backup `sync`, and of a mirror `copy-mode`, are ours.
pub(super) static BLOCK_JOB_INFO: Object = object(
    "BlockJobInfo",
    &[
        has("type", Type::Enum(&JOB_TYPE)),
        has("device", Type::Str),
        has("len", Type::Int),
        has("offset", Type::Int),
        has("busy", Type::Bool),
        has("paused", Type::Bool),
        has("speed", Type::Int),
        has("share", Type::Int),
        has("io-status", Type::Enum(&IO_STATUS)),
        has("ready", Type::Bool),
        has("status", Type::Enum(&JOB_STATUS)),
        has("auto-finalize", Type::Bool),
        has("auto-dismiss", Type::Bool),
        may("error", Type::Str),
        has("actively-synced", Type::Bool),
        has("lun", Type::Str),
        has("target", Type::Str),
        may("sync", Type::Enum(&SYNC_MODE)),
        may("copy-mode", Type::Enum(&COPY_MODE)),
        has("repaired", Type::Int),
    ],
);

/// JobStatus.
pub(super) static JOB_STATUS: Enum = Enum {
    name: "JobStatus",
    values: &[
        "undefined",
        "created",
        "running",
        "paused",
        "ready",
        "standby",
        "waiting",
        "pending",
        "aborting",
        "concluded",
        "null",
    ],
};

/// JobInfo.
pub(super) static JOB_INFO: Object = object(
    "JobInfo",
    &[
        has("id", Type::Str),
        has("type", Type::Enum(&JOB_TYPE)),
        has("status", Type::Enum(&JOB_STATUS)),
        has("current-progress", Type::Int),
        has("total-progress", Type::Int),
        may("error", Type::Str),
    ],
);

/// The counters of protection.
pub(super) static PI_COUNTERS: Object = object(
    "PiCounters",
    &[
        has("verified", Type::Int),
        has("generated", Type::Int),
        has("guard_errors", Type::Int),
        has("app_errors", Type::Int),
        has("ref_errors", Type::Int),
        has("unprotected", Type::Int),
        has("recomputed", Type::Int),
        has("torn", Type::Int),
        has("repaired", Type::Int),
        has("unchecked", Type::Int),
    ],
);

/// A block that a scrub has found.
static BAD_BLOCK: Object = object(
    "PiBadBlock",
    &[
        has("lba", Type::Int),
        has("tag", Type::Str),
        has("expected", Type::Int),
        has("found", Type::Int),
        may("file", Type::Str),
        may("host_offset", Type::Int),
        has("depth", Type::Int),
    ],
);

static SCRUB_STATUS: Enum =
    Enum { name: "PiScrubStatus", values: &["running", "paused", "concluded", "cancelled", "failed"] };

/// A scrub under way, or the last one.
static SCRUB: Object = object(
    "PiScrubInfo",
    &[
        may("job", Type::Str),
        has("status", Type::Enum(&SCRUB_STATUS)),
        has("current-progress", Type::Int),
        has("total-progress", Type::Int),
        has("next_lba", Type::Int),
        has("block_size", Type::Int),
        has("speed", Type::Int),
        has("started_ms", Type::Int),
        may("ended_ms", Type::Int),
        may("error", Type::Str),
        has("read_bytes", Type::Int),
        has("blocks", Type::Int),
        has("verified", Type::Int),
        has("unprotected", Type::Int),
        has("mismatches", Type::Int),
        has("in_doubt", Type::Int),
        has("unreadable", Type::Int),
        has("bad", Type::List(&Type::Object(&BAD_BLOCK))),
    ],
);

/// What `query-pi` says of a LUN.
pub(super) static PI_INFO: Object = object(
    "PiInfo",
    &[
        has("device", Type::Str),
        has("protected", Type::Bool),
        may("counters", Type::Object(&PI_COUNTERS)),
        may("scrub", Type::Object(&SCRUB)),
    ],
);

/// BlockExportType, with the one of ours.
pub(super) static EXPORT_TYPE: Enum = Enum { name: "BlockExportType", values: &["nbd"] };

/// BlockExportRemoveMode.
pub(super) static EXPORT_REMOVE_MODE: Enum =
    Enum { name: "BlockExportRemoveMode", values: &["safe", "hard"] };

/// BlockExportInfo.
pub(super) static BLOCK_EXPORT_INFO: Object = object(
    "BlockExportInfo",
    &[
        has("id", Type::Str),
        has("type", Type::Enum(&EXPORT_TYPE)),
        has("node-name", Type::Str),
        has("shutting-down", Type::Bool),
        may("uri", Type::Str),
    ],
);

static ADDRESS_TYPE: Enum = Enum { name: "SocketAddressType", values: &["inet", "unix"] };

/// What is in SocketAddressLegacy's `data`: InetSocketAddress' members, or UnixSocketAddress'.
static ADDRESS_DATA: Object =
    object("SocketAddressData", &[may("host", Type::Str), may("port", Type::Str), may("path", Type::Str)]);

/// SocketAddressLegacy.
pub(super) static SOCKET_ADDRESS: Object = object(
    "SocketAddressLegacy",
    &[has("type", Type::Enum(&ADDRESS_TYPE)), has("data", Type::Object(&ADDRESS_DATA))],
);

static LUN_STATE: Enum = Enum { name: "LunState", values: &["online", "stopped", "failed", "silent"] };

/// A cache: of qcow2 metadata, for all images of the chain, or of tuples.
static CACHE_COUNT: Object =
    object("LunCacheCount", &[has("hits", Type::Int), has("misses", Type::Int), has("bytes", Type::Int)]);

static LUN_COUNTERS: Object = object(
    "LunCounters",
    &[
        has("commands", Type::Int),
        has("aborted", Type::Int),
        has("in-flight", Type::Int),
        has("check-conditions", Type::Int),
        has("other-statuses", Type::Int),
        has("rd_bytes", Type::Int),
        has("wr_bytes", Type::Int),
        has("rd_operations", Type::Int),
        has("wr_operations", Type::Int),
        has("unmap_operations", Type::Int),
        has("flush_operations", Type::Int),
        may("pi", Type::Object(&PI_COUNTERS)),
        may("l2-cache", Type::Object(&CACHE_COUNT)),
        may("refcount-cache", Type::Object(&CACHE_COUNT)),
        may("tuple-cache", Type::Object(&CACHE_COUNT)),
    ],
);

/// Members with those of QEMU's BlockIOThrottle among them, as they stand in its command and in what is told of limits.
macro_rules! with_limits {
    ([$($before:expr),* $(,)?], [$($after:expr),* $(,)?]) => {
        &[
            $($before,)*
            has("bps", Type::Int),
            has("bps_rd", Type::Int),
            has("bps_wr", Type::Int),
            has("iops", Type::Int),
            has("iops_rd", Type::Int),
            has("iops_wr", Type::Int),
            may("bps_max", Type::Int),
            may("bps_rd_max", Type::Int),
            may("bps_wr_max", Type::Int),
            may("iops_max", Type::Int),
            may("iops_rd_max", Type::Int),
            may("iops_wr_max", Type::Int),
            may("bps_max_length", Type::Int),
            may("bps_rd_max_length", Type::Int),
            may("bps_wr_max_length", Type::Int),
            may("iops_max_length", Type::Int),
            may("iops_rd_max_length", Type::Int),
            may("iops_wr_max_length", Type::Int),
            may("iops_size", Type::Int),
            $($after,)*
        ]
    };
}
pub(super) use with_limits;

/// A LUN's limits and what they have come to; not there if there never were any.
static LUN_THROTTLE: Object = object(
    "LunThrottle",
    with_limits!([has("delayed", Type::Int), has("waited-ns", Type::Int), has("waiting", Type::Int)], []),
);

static PI: Enum = Enum { name: "PiType", values: &["off", "type1", "type2", "type3"] };

static EXPOSURE: Enum = Enum { name: "PiExposure", values: &["target", "initiator"] };

/// What `query-luns` says of a LUN. What only a LUN that serves knows is left out of one that does not.
pub(super) static LUN_INFO: Object = object(
    "LunInfo",
    &[
        has("name", Type::Str),
        has("image", Type::Str),
        has("state", Type::Enum(&LUN_STATE)),
        may("reason", Type::Str),
        has("block-size", Type::Int),
        has("pi", Type::Enum(&PI)),
        has("exposure", Type::Enum(&EXPOSURE)),
        has("read-only", Type::Bool),
        may("format", Type::Str),
        may("size", Type::Int),
        may("write-cache", Type::Bool),
        may("io", Type::Str),
        may("counters", Type::Object(&LUN_COUNTERS)),
        may("throttle", Type::Object(&LUN_THROTTLE)),
    ],
);

/// Where a LUN is exported.
static EXPORT_INFO: Object = object(
    "LunExport",
    &[
        has("fabric", Type::Str),
        has("wwn", Type::Str),
        may("device", Type::Str),
        may("sg", Type::Str),
        may("libvirt", Type::Str),
        may("qemu", Type::Str),
    ],
);

/// What `lun-add` has made.
pub(super) static LUN_ADDED: Object = object(
    "LunAdded",
    &[
        has("name", Type::Str),
        has("image", Type::Str),
        may("format", Type::Str),
        has("serial", Type::Str),
        has("pi", Type::Enum(&PI)),
        has("exposure", Type::Enum(&EXPOSURE)),
        may("transfer", Type::Str),
        has("block_size", Type::Int),
        has("capacity_bytes", Type::Int),
        has("exports", Type::List(&Type::Object(&EXPORT_INFO))),
        has("created", Type::Bool),
    ],
);

/// What `lun-del` has left.
pub(super) static LUN_DELETED: Object = object(
    "LunDeleted",
    &[
        has("name", Type::Str),
        has("deleted", Type::Bool),
        has("left", Type::List(&Type::Str)),
        has("leftovers", Type::List(&Type::Str)),
    ],
);

/// How far a handover is.
pub(super) static MIGRATION_STATUS: Enum = Enum {
    name: "MigrationStatus",
    values: &["setup", "active", "pre-switchover", "completed", "failed", "cancelled"],
};

/// MigrationInfo, of one LUN.
pub(super) static MIGRATION_INFO: Object = object(
    "MigrationInfo",
    &[
        may("status", Type::Enum(&MIGRATION_STATUS)),
        // Not known while a source is waited for.
        may("device", Type::Str),
        may("uri", Type::Str),
        may("incoming", Type::Bool),
        // In milliseconds.
        may("total-time", Type::Int),
        may("error-desc", Type::Str),
        // While its storage is copied.
        may("disk", Type::Object(&MIGRATION_STATS)),
    ],
);

/// MigrationStats, of the storage that goes along.
static MIGRATION_STATS: Object = object(
    "MigrationStats",
    &[has("transferred", Type::Int), has("remaining", Type::Int), has("total", Type::Int)],
);

/// A LUN that another host has now.
pub(super) static LUN_MIGRATED: Object = object(
    "LunMigrated",
    &[
        has("device", Type::Str),
        has("uri", Type::Str),
        // False: its answer was lost, and that it has the LUN is known from the image.
        has("answered", Type::Bool),
        // What could not be taken down here.
        may("left", Type::Str),
        // With its storage: the image that stays here, and is marked as the other host's.
        may("image", Type::Str),
    ],
);

/// SnapshotInfo.
pub(super) static SNAPSHOT_INFO: Object = object(
    "SnapshotInfo",
    &[
        has("id", Type::Str),
        has("name", Type::Str),
        has("vm-state-size", Type::Int),
        has("date-sec", Type::Int),
        has("date-nsec", Type::Int),
        has("vm-clock-sec", Type::Int),
        has("vm-clock-nsec", Type::Int),
        may("icount", Type::Int),
    ],
);

/// ImageInfo.
static IMAGE_INFO: Object = object(
    "ImageInfo",
    &[
        has("filename", Type::Str),
        has("format", Type::Str),
        has("virtual-size", Type::Int),
        may("actual-size", Type::Int),
        may("cluster-size", Type::Int),
        may("backing-filename", Type::Str),
        may("full-backing-filename", Type::Str),
        may("backing-filename-format", Type::Str),
        may("snapshots", Type::List(&Type::Object(&SNAPSHOT_INFO))),
        may("backing-image", Type::Object(&IMAGE_INFO)),
    ],
);

static CACHE_INFO: Object = object(
    "BlockdevCacheInfo",
    &[has("writeback", Type::Bool), has("direct", Type::Bool), has("no-flush", Type::Bool)],
);

static DETECT_ZEROES: Enum = Enum { name: "BlockdevDetectZeroesOptions", values: &["off", "on", "unmap"] };

/// BlockDeviceInfo.
pub(super) static BLOCK_DEVICE_INFO: Object = object(
    "BlockDeviceInfo",
    with_limits!(
        [
            has("file", Type::Str),
            may("node-name", Type::Str),
            has("ro", Type::Bool),
            has("drv", Type::Str),
            may("backing_file", Type::Str),
            has("backing_file_depth", Type::Int),
            has("encrypted", Type::Bool),
            has("detect_zeroes", Type::Enum(&DETECT_ZEROES)),
            may("dirty-bitmaps", Type::List(&Type::Object(&BLOCK_DIRTY_INFO))),
        ],
        [
            has("image", Type::Object(&IMAGE_INFO)),
            has("cache", Type::Object(&CACHE_INFO)),
            has("write_threshold", Type::Int),
        ]
    ),
);

static IO_STATUS: Enum = Enum { name: "BlockDeviceIoStatus", values: &["ok", "failed", "nospace"] };

/// BlockInfo.
pub(super) static BLOCK_INFO: Object = object(
    "BlockInfo",
    &[
        has("device", Type::Str),
        may("qdev", Type::Str),
        has("type", Type::Str),
        has("removable", Type::Bool),
        has("locked", Type::Bool),
        may("inserted", Type::Object(&BLOCK_DEVICE_INFO)),
        may("io-status", Type::Enum(&IO_STATUS)),
    ],
);

/// BlockLatencyHistogramInfo. A command that took exactly as long as a boundary is in the bin before it.
static LATENCY_HISTOGRAM: Object = object(
    "BlockLatencyHistogramInfo",
    &[has("boundaries", Type::List(&Type::Int)), has("bins", Type::List(&Type::Int))],
);

static BLOCK_DEVICE_STATS: Object = object(
    "BlockDeviceStats",
    &[
        has("rd_bytes", Type::Int),
        has("wr_bytes", Type::Int),
        has("rd_operations", Type::Int),
        has("wr_operations", Type::Int),
        has("unmap_operations", Type::Int),
        has("flush_operations", Type::Int),
        has("failed_rd_operations", Type::Int),
        has("failed_wr_operations", Type::Int),
        has("failed_unmap_operations", Type::Int),
        has("failed_flush_operations", Type::Int),
        has("invalid_rd_operations", Type::Int),
        has("invalid_wr_operations", Type::Int),
        has("invalid_unmap_operations", Type::Int),
        has("invalid_flush_operations", Type::Int),
        has("rd_total_time_ns", Type::Int),
        has("wr_total_time_ns", Type::Int),
        has("unmap_total_time_ns", Type::Int),
        has("flush_total_time_ns", Type::Int),
        may("rd_latency_histogram", Type::Object(&LATENCY_HISTOGRAM)),
        may("wr_latency_histogram", Type::Object(&LATENCY_HISTOGRAM)),
        may("flush_latency_histogram", Type::Object(&LATENCY_HISTOGRAM)),
    ],
);

/// BlockStats.
pub(super) static BLOCK_STATS: Object = object(
    "BlockStats",
    &[
        may("device", Type::Str),
        may("qdev", Type::Str),
        may("node-name", Type::Str),
        has("stats", Type::Object(&BLOCK_DEVICE_STATS)),
    ],
);

static SCHEMA_META: Enum = Enum {
    name: "SchemaMetaType",
    values: &["builtin", "enum", "array", "object", "alternate", "command", "event"],
};

static JSON_TYPE: Enum = Enum {
    name: "JSONType",
    values: &["string", "number", "int", "boolean", "null", "object", "array", "value"],
};

static SCHEMA_BUILTIN: Object = object("SchemaInfoBuiltin", &[has("json-type", Type::Enum(&JSON_TYPE))]);

static SCHEMA_ENUM_MEMBER: Object = object("SchemaInfoEnumMember", &[has("name", Type::Str)]);

static SCHEMA_ENUM: Object = object(
    "SchemaInfoEnum",
    &[has("members", Type::List(&Type::Object(&SCHEMA_ENUM_MEMBER))), has("values", Type::List(&Type::Str))],
);

static SCHEMA_ARRAY: Object = object("SchemaInfoArray", &[has("element-type", Type::Str)]);

static SCHEMA_MEMBER: Object = object(
    "SchemaInfoObjectMember",
    &[has("name", Type::Str), has("type", Type::Str), may("default", Type::Any)],
);

static SCHEMA_VARIANT: Object =
    object("SchemaInfoObjectVariant", &[has("case", Type::Str), has("type", Type::Str)]);

static SCHEMA_OBJECT: Object = object(
    "SchemaInfoObject",
    &[
        has("members", Type::List(&Type::Object(&SCHEMA_MEMBER))),
        may("tag", Type::Str),
        may("variants", Type::List(&Type::Object(&SCHEMA_VARIANT))),
    ],
);

static SCHEMA_ALTERNATE_MEMBER: Object = object("SchemaInfoAlternateMember", &[has("type", Type::Str)]);

static SCHEMA_ALTERNATE: Object =
    object("SchemaInfoAlternate", &[has("members", Type::List(&Type::Object(&SCHEMA_ALTERNATE_MEMBER)))]);

static SCHEMA_COMMAND: Object = object(
    "SchemaInfoCommand",
    &[has("arg-type", Type::Str), has("ret-type", Type::Str), may("allow-oob", Type::Bool)],
);

static SCHEMA_EVENT: Object = object("SchemaInfoEvent", &[has("arg-type", Type::Str)]);

/// SchemaInfo.
pub(super) static SCHEMA_INFO: Object = Object {
    name: "SchemaInfo",
    members: &[has("name", Type::Str), has("meta-type", Type::Enum(&SCHEMA_META))],
    variants: Some((
        "meta-type",
        &[
            ("builtin", &SCHEMA_BUILTIN),
            ("enum", &SCHEMA_ENUM),
            ("array", &SCHEMA_ARRAY),
            ("object", &SCHEMA_OBJECT),
            ("alternate", &SCHEMA_ALTERNATE),
            ("command", &SCHEMA_COMMAND),
            ("event", &SCHEMA_EVENT),
        ],
    )),
};
