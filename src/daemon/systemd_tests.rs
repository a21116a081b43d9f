//! What the service manager hears, on a socket of the test's own. `sd_notify` finds it in the environment, so each test
//! runs its body in a process of its own, with a clock of its own.

use std::{
    os::unix::net::UnixDatagram,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::daemon::worker::Outcome;

/// Tells the process which test's body it is to run.
const BODY: &str = "TCMU_DIF_NOTIFY_TEST";

/// What was heard: each datagram's lines, joined by a space, without the clock's; and what was logged.
struct Heard {
    words: Vec<String>,
    log: String,
}

/// Runs `body` in a process whose service manager we are, and gives what was heard; nothing in that process itself.
fn hear(test: &str, environment: &[(&str, &str)], body: fn()) -> Option<Heard> {
    if std::env::var(BODY).is_ok_and(|name| name == test) {
        let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).finish();
        tracing::subscriber::with_default(log, body);
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let stop = over.clone();
    let listener = std::thread::spawn(move || {
        let mut words = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            // Looked at first: what was sent before the end is read after it.
            let last = stop.load(Ordering::Acquire);
            match socket.recv(&mut buffer) {
                Ok(n) => {
                    let text = std::str::from_utf8(&buffer[..n]).unwrap();
                    let lines: Vec<&str> =
                        text.lines().filter(|l| !l.starts_with("MONOTONIC_USEC=")).collect();
                    words.push(lines.join(" "));
                }
                Err(_) if last => return words,
                Err(_) => {}
            }
        }
    });
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("daemon::systemd::tests::{test}"), "--nocapture", "--include-ignored"]);
    child.env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID");
    child.env(BODY, test).env("NOTIFY_SOCKET", &path).envs(environment.iter().copied());
    let output = child.output().unwrap();
    over.store(true, Ordering::Release);
    let words = listener.join().unwrap();
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}\n{}", String::from_utf8_lossy(&output.stdout));
    Some(Heard { words, log })
}

fn lun(minor: u32, outcome: Outcome) -> Standing {
    Standing { minor, name: format!("vm{minor}"), outcome, pulse: None }
}

fn beating(minor: u32, pulse: &Pulse) -> Standing {
    Standing { pulse: Some(pulse.clone()), ..lun(minor, Some(Ok(()))) }
}

#[test]
fn ready_waits_until_every_lun_is_online_or_has_failed_with_a_reason() {
    let Some(heard) = hear("ready_waits_until_every_lun_is_online_or_has_failed_with_a_reason", &[], || {
        let now = Instant::now();
        let mut manager = Manager::from_env(now);
        let failed = || lun(2, Some(Err("the image\nis in use".to_owned())));
        manager.begin(now, false, &[lun(1, None), failed()]);
        manager.turn(now + START_PATIENCE / 2, false, &[lun(1, None), failed()]);
        for _ in 0..3 {
            manager.turn(now + START_PATIENCE / 2, false, &[lun(1, Some(Ok(()))), failed()]);
        }
        // A LUN that comes later is told of, and is nothing that READY would wait for.
        manager.turn(now + START_PATIENCE, false, &[lun(1, Some(Ok(()))), failed(), lun(3, None)]);
    }) else {
        return;
    };
    assert_eq!(
        heard.words,
        [
            "STATUS=2 LUNs: 0 online, 1 starting, 1 failed (vm2: the image is in use)",
            "READY=1 STATUS=2 LUNs: 1 online, 1 failed (vm2: the image is in use)",
            "STATUS=3 LUNs: 1 online, 1 starting, 1 failed (vm2: the image is in use)",
        ]
    );
}

#[test]
fn a_lun_that_hangs_at_its_start_does_not_hold_ready_back_for_ever_and_is_named() {
    let Some(heard) =
        hear("a_lun_that_hangs_at_its_start_does_not_hold_ready_back_for_ever_and_is_named", &[], || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            manager.begin(now, false, &[lun(1, None), lun(2, Some(Ok(())))]);
            manager.turn(now + START_PATIENCE, false, &[lun(1, None), lun(2, Some(Ok(())))]);
        })
    else {
        return;
    };
    assert_eq!(heard.words.last().unwrap(), "READY=1 STATUS=2 LUNs: 1 online, 1 starting");
    let line = heard.log.lines().find(|l| l.contains("WARN")).unwrap();
    assert!(line.contains("vm1") && !line.contains("vm2") && line.contains("not up after 60 s"), "{line}");
}

#[test]
fn a_host_without_luns_is_ready_at_once_and_a_lun_that_went_is_not_waited_for() {
    let Some(heard) =
        hear("a_host_without_luns_is_ready_at_once_and_a_lun_that_went_is_not_waited_for", &[], || {
            let now = Instant::now();
            Manager::from_env(now).begin(now, false, &[]);
            let mut manager = Manager::from_env(now);
            manager.begin(now, false, &[lun(1, None)]);
            manager.turn(now, false, &[]);
        })
    else {
        return;
    };
    assert_eq!(
        heard.words,
        ["READY=1 STATUS=no LUNs", "STATUS=1 LUN: 0 online, 1 starting", "READY=1 STATUS=no LUNs"]
    );
}

#[test]
fn the_watchdog_is_fed_by_half_its_time_while_every_lun_gives_signs_of_life() {
    let Some(heard) = hear(
        "the_watchdog_is_fed_by_half_its_time_while_every_lun_gives_signs_of_life",
        &[("WATCHDOG_USEC", "8000000")],
        || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            assert_eq!(manager.turn_within(), Duration::from_secs(1));
            let pulse = Pulse::of_nobody();
            manager.begin(now, false, &[beating(1, &pulse)]);
            let mut asked = 0;
            for second in 1..=24 {
                asked += usize::from(!pulse.is_answered());
                pulse.answer();
                manager.turn(now + Duration::from_secs(second), false, &[beating(1, &pulse)]);
            }
            assert!((6..=12).contains(&asked), "an idle thread was woken {asked} times in six half-times");
        },
    ) else {
        return;
    };
    let fed = heard.words.iter().filter(|w| *w == "WATCHDOG=1").count();
    assert!((6..=8).contains(&fed), "fed {fed} times in 24 s: {:?}", heard.words);
}

#[test]
fn a_lun_whose_thread_hangs_withholds_the_watchdog_and_is_named_until_it_goes_on() {
    let Some(heard) = hear(
        "a_lun_whose_thread_hangs_withholds_the_watchdog_and_is_named_until_it_goes_on",
        &[("WATCHDOG_USEC", "8000000")],
        || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            let (well, hangs) = (Pulse::of_nobody(), Pulse::of_nobody());
            manager.begin(now, false, &[beating(1, &well), beating(2, &hangs)]);
            for second in 1..=30 {
                well.answer();
                if second == 20 {
                    hangs.answer();
                }
                if second == 4 || second == 20 {
                    sd_notify::notify(&[NotifyState::Custom(&format!("X_TEST={second}"))]).unwrap();
                }
                manager.turn(
                    now + Duration::from_secs(second),
                    false,
                    &[beating(1, &well), beating(2, &hangs)],
                );
            }
            // A thread that hangs again, and is replaced by another start of its LUN, withholds nothing.
            manager.turn(
                now + Duration::from_secs(60),
                false,
                &[beating(1, &well), beating(2, &Pulse::of_nobody())],
            );
        },
    ) else {
        return;
    };
    let at = |mark: &str| heard.words.iter().position(|w| w == mark).unwrap();
    let (from, to) = (at("X_TEST=4"), at("X_TEST=20"));
    let fed = |words: &[String]| words.iter().filter(|w| *w == "WATCHDOG=1").count();
    assert_eq!((fed(&heard.words[..from]), fed(&heard.words[from..to])), (1, 0), "{:?}", heard.words);
    assert_eq!(heard.words[to + 1], "WATCHDOG=1");
    let errors: Vec<&str> = heard.log.lines().filter(|l| l.contains("ERROR")).collect();
    assert!(errors[0].contains("lun=vm2") && errors[0].contains("hangs"), "{errors:?}");
    assert!(!heard.log.contains("lun=vm1 "), "{}", heard.log);
    assert!(heard.log.lines().any(|l| l.contains("goes on") && l.contains("lun=vm2")), "{}", heard.log);
}

#[test]
fn another_process_s_watchdog_is_not_fed_and_no_thread_is_asked() {
    let Some(heard) = hear(
        "another_process_s_watchdog_is_not_fed_and_no_thread_is_asked",
        &[("WATCHDOG_USEC", "8000000"), ("WATCHDOG_PID", "1")],
        || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            let pulse = Pulse::of_nobody();
            manager.begin(now, false, &[beating(1, &pulse)]);
            for second in 1..=24 {
                manager.turn(now + Duration::from_secs(second), false, &[beating(1, &pulse)]);
            }
            assert!(pulse.is_answered(), "an idle LUN must cost nothing");
        },
    ) else {
        return;
    };
    assert_eq!(heard.words, ["READY=1 STATUS=1 LUN: 1 online"]);
}

#[test]
fn reloading_and_stopping_are_told_and_a_long_stop_is_no_reason_for_the_watchdog() {
    let Some(heard) = hear(
        "reloading_and_stopping_are_told_and_a_long_stop_is_no_reason_for_the_watchdog",
        &[("WATCHDOG_USEC", "8000000")],
        || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            manager.begin(now, false, &[lun(1, Some(Ok(())))]);
            manager.reloading();
            manager.reloaded();
            manager.stopping(1);
            manager.still_stopping(now, 1);
            manager.still_stopping(now + Duration::from_secs(4), 1);
        },
    ) else {
        return;
    };
    assert_eq!(
        heard.words,
        [
            "READY=1 STATUS=1 LUN: 1 online",
            "RELOADING=1",
            "READY=1",
            "STOPPING=1 STATUS=stopping: 1 to close",
            "WATCHDOG=1"
        ]
    );
}

#[test]
fn a_socket_that_nobody_hears_is_logged_once_and_stops_nothing() {
    let Some(heard) = hear(
        "a_socket_that_nobody_hears_is_logged_once_and_stops_nothing",
        &[("NOTIFY_SOCKET", "/none/notify")],
        || {
            let now = Instant::now();
            let mut manager = Manager::from_env(now);
            manager.begin(now, false, &[lun(1, Some(Ok(())))]);
            manager.turn(now, false, &[]);
        },
    ) else {
        return;
    };
    assert_eq!(heard.log.lines().filter(|l| l.contains("NOTIFY_SOCKET")).count(), 1, "{}", heard.log);
}
