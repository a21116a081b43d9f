//! The time of day where this host is: what lists for people show.

use std::mem::MaybeUninit;

/// A local date and time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// Year, month (1–12), day (1–31).
    pub date: (i32, u32, u32),
    /// Hour (0–23), minute, second.
    pub time: (u32, u32, u32),
}

/// The local time of a number of seconds since 1970; `None` where the host's library cannot tell.
pub fn local(seconds: i64) -> Option<Local> {
    let at: libc::time_t = seconds;
    let mut tm = MaybeUninit::<libc::tm>::uninit();
    // SAFETY: both pointers are valid for the call, and localtime_r keeps neither. The environment (TZ) is not changed by any
    // thread of ours.
    let filled = unsafe { libc::localtime_r(&raw const at, tm.as_mut_ptr()) };
    if filled.is_null() {
        return None;
    }
    // SAFETY: localtime_r did not fail, so it has filled the structure.
    let tm = unsafe { tm.assume_init() };
    Some(Local {
        date: (tm.tm_year.saturating_add(1900), tm.tm_mon as u32 + 1, tm.tm_mday as u32),
        time: (tm.tm_hour as u32, tm.tm_min as u32, tm.tm_sec as u32),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_later_is_a_second_later_wherever_this_is() {
        let (a, b) = (local(1_000_000_000).unwrap(), local(1_000_000_001).unwrap());
        assert_eq!(a.date.0, 2001);
        assert_eq!((a.time.2 + 1) % 60, b.time.2);
    }
}
