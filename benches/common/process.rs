//! What this process and its threads have used.

use std::{fs, path::PathBuf, time::Duration};

/// What the scheduler has counted for this process's threads whose names begin so. (Documentation/scheduler/sched-stats.rst: the first word is
/// nanoseconds on a CPU.)
pub fn cpu(prefix: &str) -> Duration {
    let threads =
        fs::read_dir("/proc/self/task").expect("/proc is there").flatten().map(|entry| entry.path());
    let ours = threads.filter(|task: &PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim().starts_with(prefix))
    });
    let spent = ours.filter_map(|task| {
        let text = fs::read_to_string(task.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(spent.sum())
}

/// Bytes of memory that are this process's alone and in use.
pub fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").expect("/proc is there");
    let private = text.lines().find_map(|l| l.strip_prefix("Private_Dirty:")).unwrap_or("0 kB");
    private.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) << 10
}
