//! The processors that a LUN's thread may run on: `2`, `2-3`, `0,4-7`, as Linux writes such lists (cpuset(7), "List format").

use std::{fmt, io, str::FromStr};

use rustix::thread::{CpuSet, sched_setaffinity};

/// A list of processors, by their numbers. There is at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpus(Vec<u32>);

impl Cpus {
    /// Binds the calling thread, and those that it starts from now on, to them.
    ///
    /// # Errors
    /// EINVAL if this host has none of them, or the daemon may run on none of them.
    pub fn bind(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        self.0.iter().for_each(|cpu| set.set(*cpu as usize));
        Ok(sched_setaffinity(None, &set)?)
    }
}

impl FromStr for Cpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Cpus, String> {
        let wrong =
            || format!("processors are given as 2, 2-3 or 0,4-7, by numbers under {}", CpuSet::MAX_CPU);
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse::<u32>().ok().filter(|n| digits && (*n as usize) < CpuSet::MAX_CPU);
            number.ok_or_else(wrong)
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(wrong());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Cpus(cpus))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, run) in self.0.chunk_by(|a, b| a + 1 == *b).enumerate() {
            let comma = if i == 0 { "" } else { "," };
            match run {
                [one] => write!(f, "{comma}{one}")?,
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_linux_does_and_all_else_is_refused() {
        for (text, same) in [("2", "2"), ("2-3", "2-3"), ("7,0,4-6,5", "0,4-7"), ("0-0", "0"), ("3,1", "1,3")]
        {
            assert_eq!(text.parse::<Cpus>().unwrap().to_string(), same, "{text}");
        }
        for bad in ["", "a", "-1", "1-", "3-2", "1,,2", "+1", "1024", "99999999999", "0-1024", " 1"] {
            assert!(bad.parse::<Cpus>().unwrap_err().contains("0,4-7"), "{bad}");
        }
    }

    #[test]
    fn a_thread_runs_where_it_is_bound_and_not_where_no_processor_is() {
        std::thread::spawn(|| {
            let allowed = |cpu: &usize| rustix::thread::sched_getaffinity(None).unwrap().is_set(*cpu);
            let last = (0..CpuSet::MAX_CPU).rev().find(allowed).unwrap();
            last.to_string().parse::<Cpus>().unwrap().bind().unwrap();
            assert_eq!(rustix::thread::sched_getaffinity(None).unwrap().count(), 1);
            assert!(allowed(&last));
            let none = (CpuSet::MAX_CPU - 1).to_string().parse::<Cpus>().unwrap();
            assert_eq!(none.bind().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        })
        .join()
        .unwrap();
    }
}
