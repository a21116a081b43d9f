//! Every metric that the daemon has: name, type, unit, labels and what it means. What is exposed, `docs/metrics.md` and the
//! dashboard's test all read this file.
//!
//! Names are those of metric families: a counter's sample ends in `_total`, that of an info in `_info`.

/// What a metric is, in OpenMetrics' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Goes up, and back to 0 when its LUN or the daemon is started anew.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size; its buckets are powers of two.
    Histogram,
    /// Always 1: its labels are what it says.
    Info,
}

impl Type {
    /// As it stands in a TYPE line.
    pub fn word(self) -> &'static str {
        match self {
            Type::Counter => "counter",
            Type::Gauge => "gauge",
            Type::Histogram => "histogram",
            Type::Info => "info",
        }
    }

    /// What the names of samples have behind that of the family.
    pub fn suffixes(self) -> &'static [&'static str] {
        match self {
            Type::Counter => &["_total"],
            Type::Gauge => &[""],
            Type::Histogram => &["_bucket", "_count", "_sum"],
            Type::Info => &["_info"],
        }
    }
}

/// A metric, as it is declared.
#[derive(Debug)]
pub struct Metric {
    /// The family's name.
    pub name: &'static str,
    /// What it is.
    pub of: Type,
    /// Its unit, with which the name has to end then.
    pub unit: Option<&'static str>,
    /// The labels that each sample has, in this order.
    pub labels: &'static [&'static str],
    /// One line for people.
    pub help: &'static str,
}

impl Metric {
    const fn new(
        name: &'static str,
        of: Type,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Metric {
        Metric { name, of, unit: None, labels, help }
    }

    const fn unit(mut self, unit: &'static str) -> Metric {
        self.unit = Some(unit);
        self
    }
}

macro_rules! metrics {
    ($($id:ident = $metric:expr;)*) => {
        $(pub(super) static $id: Metric = $metric;)*
        /// All of them, in the order in which they are exposed.
        pub static ALL: &[&Metric] = &[$(&$id),*];
    };
}

use Type::{Counter, Gauge, Histogram, Info};

const LUN: &[&str] = &["lun"];
const BY_KIND: &[&str] = &["lun", "kind"];
const BY_CACHE: &[&str] = &["lun", "cache"];
const BY_JOB: &[&str] = &["lun", "job"];

metrics! {
    BUILD = Metric::new("tcmu_dif_build", Info, &["version"], "The daemon's version.");
    LUNS = Metric::new("tcmu_dif_luns", Gauge, &[], "LUNs that serve, or have failed since they did.");
    QMP_CLIENTS = Metric::new("tcmu_dif_qmp_clients", Gauge, &[], "Clients that are connected to the QMP socket.");

    ONLINE = Metric::new("tcmu_dif_lun_online", Gauge, LUN,
        "1 if the LUN serves, 0 if it has failed or its thread did not answer in time; then its other metrics are missing.");
    RESTARTS = Metric::new("tcmu_dif_lun_restarts", Counter, LUN,
        "How often the LUN was started again because its thread had died.");
    CAPACITY = Metric::new("tcmu_dif_lun_capacity_bytes", Gauge, LUN, "Size of the LUN.").unit("bytes");
    IN_FLIGHT = Metric::new("tcmu_dif_lun_in_flight", Gauge, LUN, "Commands under way: the queue depth.");
    COMMANDS = Metric::new("tcmu_dif_lun_commands", Counter, LUN, "SCSI commands taken from the ring, of every kind.");
    ABORTED = Metric::new("tcmu_dif_lun_aborted_commands", Counter, LUN,
        "Commands that task management took back before they began.");
    OPERATIONS = Metric::new("tcmu_dif_lun_operations", Counter, BY_KIND,
        "Commands that were done: read, write (also WRITE SAME, COMPARE AND WRITE and their like), unmap, flush.");
    FAILED = Metric::new("tcmu_dif_lun_failed_operations", Counter, BY_KIND, "Commands that failed.");
    INVALID = Metric::new("tcmu_dif_lun_invalid_operations", Counter, BY_KIND,
        "Commands that were refused because they make no sense (ILLEGAL REQUEST).");
    TRANSFERRED = Metric::new("tcmu_dif_lun_transferred_bytes", Counter, BY_KIND,
        "Bytes moved between initiators and the LUN by commands that were done: read, write.").unit("bytes");
    DURATION = Metric::new("tcmu_dif_lun_command_duration_seconds", Histogram, &["lun", "opcode"],
        "From when a command was taken out of the ring until it was answered, by its name in SBC and SPC; unknown are those that are \
         not supported.").unit("seconds");
    ERRORS = Metric::new("tcmu_dif_lun_errors", Counter, &["lun", "key", "asc", "ascq"],
        "Commands that ended in CHECK CONDITION, by their sense in hexadecimal; unit attentions (key 06h) included.");
    OTHER_STATUSES = Metric::new("tcmu_dif_lun_other_statuses", Counter, LUN,
        "Commands that ended in another status than GOOD and CHECK CONDITION.");
    KICKS = Metric::new("tcmu_dif_lun_kicks", Counter, LUN, "Batches of answers, each told to the kernel with one kick.");
    SLEEPS = Metric::new("tcmu_dif_lun_sleeps", Counter, LUN, "How often the LUN's thread slept.");
    THROTTLED = Metric::new("tcmu_dif_lun_throttled_commands", Counter, LUN,
        "Commands that had to wait for the LUN's limits before they began.");
    THROTTLE_WAIT = Metric::new("tcmu_dif_lun_throttle_wait_seconds", Counter, LUN,
        "What they have waited, all together.").unit("seconds");
    THROTTLE_WAITING = Metric::new("tcmu_dif_lun_throttle_waiting", Gauge, LUN,
        "Commands that wait for the LUN's limits now.");
    LIMIT = Metric::new("tcmu_dif_lun_limit", Gauge, &["lun", "limit"],
        "The LUN's limits that are set, in QEMU's words: bps, iops_rd, bps_max and so on.");

    PI_VERIFIED = Metric::new("tcmu_dif_pi_verified_blocks", Counter, LUN,
        "Blocks that match their protection information, read or sent by an initiator.").unit("blocks");
    PI_GENERATED = Metric::new("tcmu_dif_pi_generated_blocks", Counter, LUN,
        "Blocks written without protection information, for which it was made.").unit("blocks");
    PI_UNPROTECTED = Metric::new("tcmu_dif_pi_unprotected_blocks", Counter, LUN,
        "Blocks read that have no protection information.").unit("blocks");
    PI_RECOMPUTED = Metric::new("tcmu_dif_pi_recomputed_blocks", Counter, LUN,
        "Blocks whose protection information was made anew after a crash or a failed write.").unit("blocks");
    PI_UNCHECKED = Metric::new("tcmu_dif_pi_unchecked_blocks", Gauge, LUN,
        "Blocks that a crash has left to be looked at (mode bitmap), which happens while the LUN serves, and before anybody gets one.").unit("blocks");
    PI_TORN = Metric::new("tcmu_dif_pi_torn_blocks", Counter, LUN,
        "Blocks that a crash or a failed write has torn (mode journal): errors until they are written.").unit("blocks");
    PI_REPAIRED = Metric::new("tcmu_dif_pi_repaired_blocks", Counter, LUN,
        "Blocks that did not match, or could not be read, and were brought back from a mirror's target.").unit("blocks");
    PI_ERRORS = Metric::new("tcmu_dif_pi_errors", Counter, &["lun", "tag"],
        "Reads, and writes with protection information, that failed on a tag: guard, application, reference.");

    CACHE_HITS = Metric::new("tcmu_dif_cache_hits", Counter, BY_CACHE,
        "Looks at a piece of a qcow2 table (l2, refcount) or of the protection information (tuple) that was in memory.");
    CACHE_MISSES = Metric::new("tcmu_dif_cache_misses", Counter, BY_CACHE,
        "Pieces of a qcow2 table, or of the protection information, that were read from the file.");
    CACHE_SIZE = Metric::new("tcmu_dif_cache_size_bytes", Gauge, BY_CACHE,
        "Memory that pieces of a qcow2 table, or of the protection information, take now.").unit("bytes");

    SCRUB_RUNNING = Metric::new("tcmu_dif_scrub_running", Gauge, LUN,
        "1 while a scrub is at work, 0 if the last one has ended or is paused.");
    SCRUB_DONE = Metric::new("tcmu_dif_scrub_done_bytes", Gauge, LUN,
        "Bytes of the LUN that are behind the scrub under way, or behind the last one.").unit("bytes");
    SCRUB_SIZE = Metric::new("tcmu_dif_scrub_size_bytes", Gauge, LUN, "Bytes of the LUN that it looks at.").unit("bytes");
    SCRUB_MISMATCHED = Metric::new("tcmu_dif_scrub_mismatched_blocks", Gauge, LUN,
        "Blocks that it found not to match.").unit("blocks");
    SCRUB_UNREADABLE = Metric::new("tcmu_dif_scrub_unreadable_blocks", Gauge, LUN,
        "Blocks that it could not read.").unit("blocks");

    JOB_RUNNING = Metric::new("tcmu_dif_job_running", Gauge, BY_JOB,
        "1 while a block job is at work or keeps up, 0 while it is paused, and once it has ended until it is dismissed.");
    JOB_READY = Metric::new("tcmu_dif_job_ready", Gauge, BY_JOB, "1 if it has caught up, and can be completed.");
    JOB_FAILED = Metric::new("tcmu_dif_job_failed", Gauge, BY_JOB, "1 if it stopped or ended with an error; query-jobs tells which.");
    JOB_DONE = Metric::new("tcmu_dif_job_done_bytes", Gauge, BY_JOB, "Bytes that it has done.").unit("bytes");
    JOB_SIZE = Metric::new("tcmu_dif_job_size_bytes", Gauge, BY_JOB,
        "Bytes that it has to do, as far as it is known; grows as the guest writes.").unit("bytes");
}

/// The table of `docs/metrics.md`, in Markdown.
pub fn documentation() -> String {
    let mut text = String::from("| metric | type | labels | what it says |\n| --- | --- | --- | --- |\n");
    for m in ALL {
        let name = match m.of.suffixes() {
            [suffix] => format!("`{}{suffix}`", m.name),
            _ => format!("`{}`", m.name),
        };
        let labels = match m.labels {
            [] => "–".to_owned(),
            some => some.iter().map(|l| format!("`{l}`")).collect::<Vec<_>>().join(", "),
        };
        text.push_str(&format!("| {name} | {} | {labels} | {} |\n", m.of.word(), m.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_end_with_their_unit_and_have_no_suffix_of_a_sample() {
        let mut names: Vec<_> = ALL.iter().map(|m| m.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        for m in ALL {
            assert!(m.name.starts_with("tcmu_dif_"), "{}", m.name);
            assert!(
                m.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit()),
                "{}",
                m.name
            );
            assert!(m.unit.is_none_or(|u| m.name.ends_with(&format!("_{u}"))), "{}", m.name);
            for suffix in ["_total", "_info", "_bucket", "_count", "_sum", "_created"] {
                assert!(!m.name.ends_with(suffix), "{}", m.name);
            }
            assert!(m.help.ends_with('.') && !m.help.contains(['\n', '\\', '"', '|']), "{}", m.name);
        }
    }
}
