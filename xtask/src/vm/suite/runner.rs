//! Runs the VM suite's tests, in as many VMs at a time as the machine has room for.
//!
//! Each test has a boot of its own, but those that name the same group share one as long as they pass, one after another.
//! After each the guest must be healthy: no complaint in the kernel's log, no task that hangs. Most tests wait more than
//! they compute, so two VMs on two processors take little more than half the time of one after the other.

use super::super::guest::{Guest, Lab, is_time_over, set_more_patience, until_end};
use super::{Run, Scale, Test};
use crate::passed::{Earlier, Passed};
use anyhow::Result;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a run went.
#[derive(Default)]
pub struct Tally {
    /// Tests that passed.
    pub passed: usize,
    /// Names and logs of those that did not.
    pub failed: Vec<(String, PathBuf)>,
    /// How many ran out of time at first, and were tried once more.
    pub slow: usize,
    /// How many were not run, as they had passed before.
    pub earlier: usize,
    /// Names of those that the end of the run's time kept from being run, or from being run to their end.
    pub not_run: Vec<String>,
}

/// A boot is not worth beginning with less than this left of the run's time.
const WORTH_A_BOOT: Duration = Duration::from_secs(60);

/// What all lanes have in common.
struct Suite<'a> {
    lab: &'a Lab,
    scale: Scale,
    bless: bool,
    files: PathBuf,
    /// Limits times this: VMs that run side by side are slower.
    patience: u32,
    /// Tests that share a boot, and those that have one to themselves.
    waiting: Mutex<VecDeque<Vec<&'static Test>>>,
    /// Where it is noted that a test has passed.
    passed: Option<&'a Passed>,
    tally: Mutex<Tally>,
}

/// Runs `tests` in so many VMs at a time, printing a line for each; stops at no failure.
pub fn run(
    lab: &Lab,
    tests: &[&'static Test],
    (scale, bless): (Scale, bool),
    lanes: usize,
    passed: Option<&Passed>,
) -> Result<Tally> {
    let lanes = lanes.max(1);
    let suite = Suite {
        lab,
        scale,
        bless,
        files: crate::sh::workspace_root().join("xtask"),
        patience: if lanes > 1 { 2 } else { 1 },
        waiting: Mutex::new(boots(tests, lanes > 1)),
        passed,
        tally: Mutex::default(),
    };
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                loop {
                    let mut waiting = suite.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                    let next = next_boot(&mut waiting, until_end());
                    drop(waiting);
                    let Some(tests) = next else { return };
                    suite.run_boot(&tests);
                }
            });
        }
    });
    let mut tally = suite.tally.into_inner().unwrap_or_else(PoisonError::into_inner);
    let left = suite.waiting.into_inner().unwrap_or_else(PoisonError::into_inner);
    tally.not_run.extend(left.iter().flatten().map(|test| test.name.to_owned()));
    for name in &tally.not_run {
        println!("  NOT RUN {name:<34} the run's time was over");
    }
    if tally.slow > 0 {
        println!("  {} of them ran out of time at first: this machine has much else to do", tally.slow);
    }
    Ok(tally)
}

/// Seconds that the tests of a boot may take.
fn limit(boot: &[&Test]) -> u64 {
    boot.iter().map(|test| test.limit).sum()
}

/// What to run next: the first that has all its time before the run's end; if none has, the first, as most take less.
fn next_boot(
    waiting: &mut VecDeque<Vec<&'static Test>>,
    left: Option<Duration>,
) -> Option<Vec<&'static Test>> {
    let Some(left) = left else { return waiting.pop_front() };
    if left < WORTH_A_BOOT {
        return None;
    }
    let fits = waiting.iter().position(|boot| limit(boot) <= left.as_secs());
    waiting.remove(fits.unwrap_or(0))
}

/// Puts tests that share a boot together, in their order; if several boots run at a time, those that may take longest come
/// first, so that none is left to run alone in the end.
fn boots(tests: &[&'static Test], longest_first: bool) -> VecDeque<Vec<&'static Test>> {
    let mut boots: Vec<Vec<&'static Test>> = Vec::new();
    for test in tests {
        match boots.iter_mut().find(|boot| test.group.is_some() && boot[0].group == test.group) {
            Some(boot) => boot.push(test),
            None => boots.push(vec![test]),
        }
    }
    if longest_first {
        // The harness's own tests stay in front: when they fail, nothing else says anything.
        boots.sort_by_key(|boot| (!boot[0].name.starts_with("reference."), std::cmp::Reverse(limit(boot))));
    }
    boots.into()
}

impl Suite<'_> {
    /// Runs tests that share a boot.
    fn run_boot(&self, tests: &[&'static Test]) {
        let mut shared: Option<Guest> = None;
        for test in tests {
            if is_over() {
                let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
                tally.not_run.push(test.name.to_owned());
                continue;
            }
            let earlier = shared.take();
            shared = self.run_test(test, earlier).filter(|_| test.group.is_some());
        }
    }

    /// Runs a test, and says how it went; gives the VM back if it can be used again.
    fn run_test(&self, test: &'static Test, mut earlier: Option<Guest>) -> Option<Guest> {
        let started = Instant::now();
        let group = test.group.unwrap_or(test.name);
        let logs = self.lab.logs.join(group);
        let mut again = "";
        set_more_patience(self.patience);
        let result = loop {
            match self.attempt(test, earlier.take()) {
                Err(error) if again.is_empty() && is_time_over(&error) && !is_over() => {
                    let first = format!("{}: {}\n\n{error:?}", test.name, test.promise);
                    let _ = fs::create_dir_all(&logs);
                    println!(
                        "  slow    {:<34} ran out of time; once more, with three times as much",
                        test.name
                    );
                    set_more_patience(3 * self.patience);
                    again = "  (at the second attempt: the first ran out of time)";
                    self.tally.lock().unwrap_or_else(PoisonError::into_inner).slow += 1;
                    let kept = logs.with_file_name(format!("{group}.slow"));
                    let _ = fs::remove_dir_all(&kept);
                    let _ = fs::rename(&logs, &kept).and_then(|()| fs::write(kept.join("slow.txt"), first));
                }
                result => break result,
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok((guest, notes)) => {
                let notes: String = notes.iter().map(|note| format!("\n          {note}")).collect();
                println!("  ok      {:<34} {seconds:>7.1} s{again}{notes}", test.name);
                tally.passed += 1;
                let noted = self.passed.map_or(Ok(()), |p| p.add(test.name, Earlier { seconds, tests: 1 }));
                if let Err(error) = noted {
                    println!("          {error:#}");
                }
                Some(guest)
            }
            // Nothing that was seen to be wrong: what it waited for was cut short.
            Err(error) if is_over() => {
                let why = error.to_string();
                let why = why.lines().next().unwrap_or_default();
                println!("  cut off {:<34} {seconds:>7.1} s: {why}", test.name);
                tally.not_run.push(test.name.to_owned());
                None
            }
            Err(error) => {
                let mut text = format!("  FAILED  {:<34} {seconds:>7.1} s{again}\n", test.name);
                let _ = writeln!(text, "    broken promise: {}", test.promise);
                for line in format!("{error:#}").lines() {
                    let _ = writeln!(text, "    {line}");
                }
                println!("{text}    logs: {}", logs.display());
                let note = format!("{}: {}\n\n{error:?}\n", test.name, test.promise);
                let _ = fs::write(logs.join(format!("failure-{}.txt", test.name)), note);
                tally.failed.push((test.name.to_owned(), logs));
                None
            }
        }
    }

    /// Runs a test, in a VM that tests of its group have used or in a new one; gives back a VM that is healthy, and what
    /// the test has noted.
    fn attempt(&self, test: &Test, earlier: Option<Guest>) -> Result<(Guest, Vec<String>)> {
        let limit = Duration::from_secs(test.limit);
        let mut guest = match earlier {
            Some(mut guest) => {
                guest.set_deadline(limit);
                guest
            }
            None => {
                let (init, net) = (super::init_of(test.name), super::net_of(test.name));
                Guest::boot_on(self.lab, init, net, test.group.unwrap_or(test.name), limit)?
            }
        };
        let mut context = Run {
            guest: &mut guest,
            lab: self.lab,
            scale: self.scale,
            bless: self.bless,
            files: self.files.clone(),
        };
        let result = (test.run)(&mut context).and_then(|()| guest.assert_healthy());
        // Whether the test passed or not.
        guest.keep_logs();
        let notes = guest.take_notes();
        result.map(|()| (guest, notes))
    }
}

/// Whether the run's time is over.
fn is_over() -> bool {
    until_end().is_some_and(|left| left.is_zero())
}

#[cfg(test)]
mod tests {
    use super::super::{all, select};
    use super::*;

    #[test]
    fn near_the_end_of_the_time_what_still_fits_goes_first_and_nothing_begins_at_the_very_end() {
        let tests = select(&[], Scale::Full).unwrap();
        let mut waiting = boots(&tests, true);
        let all = waiting.len();
        assert!(next_boot(&mut waiting, Some(Duration::from_secs(59))).is_none() && waiting.len() == all);
        let short = next_boot(&mut waiting, Some(Duration::from_secs(130))).unwrap();
        assert!(limit(&short) <= 130, "{}", short[0].name);
        let first = waiting[0][0].name;
        assert_eq!(next_boot(&mut waiting, None).unwrap()[0].name, first);
        waiting.retain(|boot| limit(boot) > 300);
        let first = waiting[0][0].name;
        assert_eq!(next_boot(&mut waiting, Some(Duration::from_secs(100))).unwrap()[0].name, first);
        waiting.clear();
        assert!(next_boot(&mut waiting, None).is_none());
    }

    #[test]
    fn tests_of_a_group_share_a_boot_in_their_order_and_none_is_lost() {
        let tests = select(&[], Scale::Full).unwrap();
        for longest_first in [false, true] {
            let boots = boots(&tests, longest_first);
            assert_eq!(boots.iter().map(Vec::len).sum::<usize>(), all().len());
            for boot in &boots {
                assert!(boot.len() == 1 || boot.iter().all(|test| test.group == boot[0].group));
            }
            assert!(boots[0][0].name.starts_with("reference."));
        }
        let order = |tests: &[&Test]| -> Vec<&str> {
            tests.iter().filter(|t| t.group == Some("flipped")).map(|t| t.name).collect()
        };
        let together = boots(&tests, true).into_iter().find(|b| b[0].group == Some("flipped")).unwrap();
        assert_eq!(order(&together), order(&tests));
    }
}
