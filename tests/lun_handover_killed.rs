//! `kill -9` of either host in the midst of a handover in which the storage goes along: the other goes on as if nothing had been, and what was answered is there.
//!
//! The test runs itself as another process, which is one of the hosts, and kills that at different moments.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tcmu_dif::{
    handover::{self, Step, give_with_storage},
    image::{Format, owner},
    lun::jobs::JobOrder,
    peer::kernel::Data,
};

#[path = "common/goes.rs"]
#[allow(dead_code)] // Others use more of it.
mod goes;
#[path = "common/numbered.rs"]
#[allow(dead_code)] // Others use more of it.
mod numbered;

use goes::{Fault, Giving, Side, Taking, config, hand_over, is_left, make, names, pair, slowly};
use numbered::{Guest, Numbers, fill};

/// Says to the test that it is the process to be killed, and where its files are.
const VICTIM: &str = "TCMU_DIF_TEST_HANDOVER_VICTIM";

fn victim(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(VICTIM, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn connect(socket: &Path) -> UnixStream {
    wait_for("nobody listens", || UnixStream::connect(socket).is_ok());
    UnixStream::connect(socket).unwrap()
}

fn folder(dir: &Path, name: &str) -> PathBuf {
    let folder = dir.join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Hands over by that connection while a guest writes. If the LUN stays, all its commands are answered.
fn give(
    a: &Side,
    mut connection: UnixStream,
    numbers: &mut Numbers,
) -> Result<handover::Given, handover::NotGiven> {
    let mut giving = Giving::new(a, Fault::None);
    let giving = thread::spawn(move || give_with_storage(&mut connection, &mut giving));
    let mut guest = Guest::of(a, numbers);
    while !giving.is_finished() {
        guest.turn();
        thread::sleep(Duration::from_micros(300));
    }
    let given = giving.join().unwrap();
    if matches!(&given, Err(e) if e.down.is_none()) {
        guest.drain();
    }
    given
}

/// A destination that takes whoever comes, one after the other, until it is killed. One that is told to hangs once its LUN serves.
fn destination(dir: &Path) -> ! {
    let b = Side::new(&folder(dir, "b.host"), config(&folder(dir, "b"), Format::Raw, true));
    let listener = UnixListener::bind(dir.join("socket")).unwrap();
    loop {
        let (mut there, _) = listener.accept().unwrap();
        b.new_device();
        let hangs = dir.join("hang").exists();
        let mut taking = Taking::new(&b, Fault::None);
        if hangs {
            taking.hang = Some(dir.join("hangs"));
        }
        let _ = handover::take(&mut there, &mut taking);
    }
}

#[test]
fn a_destination_that_is_killed_leaves_the_lun_where_it_was_and_only_at_the_very_end_a_question() {
    let name = "a_destination_that_is_killed_leaves_the_lun_where_it_was_and_only_at_the_very_end_a_question";
    if let Some(dir) = std::env::var_os(VICTIM) {
        destination(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (here, there) = (folder(dir, "a"), folder(dir, "b"));
    let b_config = config(&there, Format::Raw, true);
    let (a, _, mut numbers) = pair(dir, config(&here, Format::Raw, true), b_config.clone());
    let socket = dir.join("socket");
    let mut killed_in_copy = 0;
    for round in 0..6u64 {
        let _ = std::fs::remove_file(&socket);
        let mut victim = victim(name, dir);
        let connection = connect(&socket);
        a.offer_device();
        slowly(&a, 16 << 20);
        let incoming = there.join("vm1.raw.incoming");
        let killing = thread::spawn(move || {
            wait_for("it does not begin", || incoming.exists());
            thread::sleep(Duration::from_millis(round * 60));
            victim.kill().unwrap();
            victim.wait().unwrap();
        });
        let given = give(&a, connection, &mut numbers);
        killing.join().unwrap();
        let Err(e) = given else { panic!("round {round}: it was faster than its end") };
        assert_eq!(e.down, None, "round {round}: {e}");
        killed_in_copy += u32::from(e.step == Step::Storage);
        a.compare(&numbers);
        assert!(owner::read(&a.host().config.image).unwrap().is_none());
        // Half an image has no image's name.
        assert!(!there.join("vm1.raw").exists(), "{:?}", names(&there));
    }
    assert!(killed_in_copy >= 4, "{killed_in_copy}");

    // It has the LUN, and dies before it has said so: nobody can tell from here, and nobody serves it until somebody says so.
    std::fs::write(dir.join("hang"), "").unwrap();
    let _ = std::fs::remove_file(&socket);
    let mut victim = victim(name, dir);
    let connection = connect(&socket);
    a.offer_device();
    let hangs = dir.join("hangs");
    let killing = thread::spawn(move || {
        wait_for("it does not come so far", || hangs.exists());
        victim.kill().unwrap();
        victim.wait().unwrap();
    });
    let given = give(&a, connection, &mut numbers);
    killing.join().unwrap();
    let e = given.unwrap_err();
    assert!(e.down.as_ref().unwrap().reason.contains("has not answered"), "{e}");
    assert!(a.host().lun.is_none() && is_left(&a));
    // What is there is whole, also what was left half before.
    assert_eq!(names(&there), ["vm1.raw", "vm1.raw.pi"]);
    let again = Side::new(&folder(dir, "c.host"), b_config);
    start(&again);
    again.compare(&numbers);
    again.host().stop().unwrap();
}

/// The kernel may hold a killed process's locks for a moment.
fn start(side: &Side) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let started = side.host().start();
        let Err(e) = started else { break };
        assert!(Instant::now() < end, "{e:?}");
        thread::sleep(Duration::from_millis(20));
        side.offer_device();
    }
    // The unit attention of a power on.
    side.run(&[0; 6], Data::None);
}

/// A source whose guest writes down what it knows, and hands over and over until it is killed.
fn source(dir: &Path) -> ! {
    let side = Side::new(&folder(dir, "a.host"), config(&folder(dir, "a"), Format::Raw, true));
    start(&side);
    let mut numbers = fill(&side);
    let mut connection = connect(&dir.join("socket"));
    numbers.unmaps = false;
    // So that it is not done before its end.
    slowly(&side, 8 << 20);
    let writing = dir.to_owned();
    let giving = Giving::new(&side, Fault::None);
    thread::spawn(move || {
        let mut giving = giving;
        let _ = give_with_storage(&mut connection, &mut giving);
        std::process::exit(3);
    });
    loop {
        // What is answered is written down before more is begun.
        Guest::of(&side, &mut numbers).turns(3);
        let bytes: Vec<u8> = numbers.answered.iter().flat_map(|n| n.to_be_bytes()).collect();
        std::fs::write(writing.join("answered.new"), bytes).unwrap();
        std::fs::rename(writing.join("answered.new"), writing.join("answered")).unwrap();
    }
}

#[test]
fn a_source_that_is_killed_in_the_copy_serves_again_with_all_that_was_answered_and_nothing_is_left_there() {
    let name = "a_source_that_is_killed_in_the_copy_serves_again_with_all_that_was_answered_and_nothing_is_left_there";
    if let Some(dir) = std::env::var_os(VICTIM) {
        source(Path::new(&dir));
    }
    for round in 0..4u64 {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let (here, there) = (folder(dir, "a"), folder(dir, "b"));
        make(&config(&here, Format::Raw, true));
        let b = Side::new(&folder(dir, "b.host"), config(&there, Format::Raw, true));
        let listener = UnixListener::bind(dir.join("socket")).unwrap();
        let mut victim = victim(name, dir);
        // The first one only looks whether somebody listens.
        drop(listener.accept().unwrap());
        let (mut there_end, _) = listener.accept().unwrap();
        let incoming = there.join("vm1.raw.incoming");
        let answered = dir.join("answered");
        let killing = thread::spawn(move || {
            wait_for("it does not begin", || incoming.exists() && answered.exists());
            thread::sleep(Duration::from_millis(100 + 150 * round));
            let alive = victim.try_wait().unwrap().is_none();
            victim.kill().unwrap();
            victim.wait().unwrap();
            assert!(alive, "it was done before");
        });
        let taken = handover::take(&mut there_end, &mut Taking::new(&b, Fault::None));
        killing.join().unwrap();
        taken.unwrap_err();
        assert!(names(&there).is_empty(), "{:?}", names(&there));
        assert!(b.host().lun.is_none());

        let a = Side::new(&folder(dir, "a.host"), config(&here, Format::Raw, true));
        start(&a);
        let remote = a.host().lun.as_ref().unwrap().remote().clone();
        assert!(remote.job(JobOrder::Query).unwrap().is_empty(), "the copy is over");
        let bytes = std::fs::read(dir.join("answered")).unwrap();
        let answered: Vec<u64> = bytes.chunks(8).map(|n| u64::from_be_bytes(n.try_into().unwrap())).collect();
        for (slot, known) in answered.into_iter().enumerate() {
            // Newer ones may have been answered since it was written down.
            let is = a.number_in(slot);
            assert!(is >= known, "place {slot}: {is} is older than {known}");
        }
        // And it goes over now.
        let mut numbers = Numbers::as_it_is(&a);
        let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
        taken.unwrap();
        given.unwrap();
        b.compare(&numbers);
        b.host().stop().unwrap();
    }
}
