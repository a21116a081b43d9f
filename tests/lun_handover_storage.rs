//! Whole LUNs on embedded kernels that go to a host which has none of their storage: data, protection and application tags go along while a guest writes, one of the two serves
//! whatever fails, nothing half-made is left behind, and the image that stays is served by nobody.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    net::TcpListener,
    os::unix::{fs::FileExt, net::UnixStream},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use tcmu_dif::{
    admin::way::{Address, Certificates},
    handover::Step,
    image::{
        Format,
        owner::{self, take_over},
    },
    lun::jobs::JobOrder,
    peer::kernel::Data,
    pi::{PiType, Tuple, store::default_path},
    units::Lba,
};

#[path = "common/certificates.rs"]
#[allow(dead_code)] // Others use more of it.
mod certificates;
#[path = "common/goes.rs"]
#[allow(dead_code)] // Others use more of it.
mod goes;
#[path = "common/numbered.rs"]
#[allow(dead_code)] // Others use more of it.
mod numbered;

use goes::{
    Cut, Fault, claim, config, exposed, hand_over, hand_over_beside, hand_over_by, is_left, names, pair,
};
use numbered::{Guest, Numbers};

fn tool(program: &str, words: &[&str]) -> String {
    let out = Command::new(program).args(words).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {words:?}: {said}");
    said
}

/// Nobody writes meanwhile.
fn quietly(a: &goes::Side, b: &goes::Side) -> goes::Done {
    hand_over_beside(a, b, Fault::None, UnixStream::pair().unwrap(), || ())
}

fn verify(image: &Path) {
    tool(env!("CARGO_BIN_EXE_tcmu-dif"), &["pi", "verify", image.to_str().unwrap()]);
}

fn folders(dir: &Path) -> (std::path::PathBuf, std::path::PathBuf) {
    let of = |name: &str| {
        let folder = dir.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        folder
    };
    (of("a"), of("b"))
}

#[test]
fn a_lun_goes_with_its_storage_while_a_guest_writes_and_the_image_that_stays_is_served_by_nobody() {
    for (from, to) in [(Format::Raw, Format::Qcow2), (Format::Qcow2, Format::Raw)] {
        for pi in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (here, there) = folders(dir.path());
            let (a, b, mut numbers) = pair(dir.path(), config(&here, from, pi), config(&there, to, pi));
            let names_of = |side: &goes::Side| side.run(&[0x12, 1, 0x83, 1, 0, 0], Data::In(256)).1;
            let designators = names_of(&a);
            // The control page with D_SENSE, current values and not saved.
            let mut list = a.run(&[0x1a, 8, 0x0a, 0, 64, 0], Data::In(64)).1;
            (list[0], list[2]) = (0, 0);
            list[6] |= 4;
            list.truncate(16);
            assert_eq!(a.run(&[0x15, 0x10, 0, 0, 16, 0], Data::Out(&list)).0, 0);
            let page = a.run(&[0x1a, 8, 0x0a, 0, 64, 0], Data::In(64)).1;
            let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
            taken.unwrap();
            assert_eq!(given.unwrap().left, None);
            assert_eq!(b.run(&[0; 6], Data::None).0, 0, "nobody is told of a power on");
            assert_eq!(names_of(&b), designators);
            assert_eq!(b.run(&[0x1a, 8, 0x0a, 0, 64, 0], Data::In(64)).1, page);
            b.compare(&numbers);
            let counted = b.host().lun.as_ref().unwrap().stats().unwrap().pi;
            assert_eq!(counted.map(|c| c.guard_errors + c.app_errors + c.ref_errors), pi.then_some(0));
            // It goes on there.
            let mut numbers = settled(&b, numbers);
            Guest::of(&b, &mut numbers).turns(100);
            b.compare(&numbers);
            b.host().stop().unwrap();
            let image = b.host().config.image.clone();
            if to == Format::Qcow2 {
                assert!(
                    tool("qemu-img", &["check", image.to_str().unwrap()]).contains("No errors were found")
                );
            }
            if pi {
                verify(&image);
                let words = ["pi", "status", image.to_str().unwrap(), "--json"];
                let mode = if from == Format::Raw { "\"bitmap\"" } else { "\"journal\"" };
                let said = tool(env!("CARGO_BIN_EXE_tcmu-dif"), &words);
                assert!(said.contains(mode), "{mode} is how it stays true across a crash: {said}");
            }
            let beside = image.file_name().unwrap().to_str().unwrap().to_owned();
            let expected: Vec<String> =
                if pi { vec![beside.clone(), format!("{beside}.pi")] } else { vec![beside] };
            assert_eq!(names(&there), expected);

            // As after a restart of that daemon: it is the other host's, whoever asks.
            assert!(is_left(&a) && a.host().lun.is_none());
            a.offer_device();
            let e = a.host().start().unwrap_err();
            assert!(tcmu_dif::lun::chain(&e).contains("host the-other has it"), "{e}");
            assert!(e.next_step().unwrap().contains("image owner --take-over"), "{:?}", e.next_step());
            let old = a.host().config.image.clone();
            take_over(&old, &claim(), false).unwrap();
            a.offer_device();
            a.host().start().unwrap();
            a.host().stop().unwrap();
            if pi {
                verify(&old);
            }
        }
    }
}

/// What is there now is what is known.
fn settled(side: &goes::Side, mut numbers: Numbers) -> Numbers {
    for (slot, number) in std::mem::take(&mut numbers.pending) {
        if side.number_in(slot) == number {
            numbers.answered[slot] = number;
        }
    }
    numbers
}

/// A block and its tuple, with an application tag of the initiator's.
fn tagged(lba: u32, app: u16, byte: u8) -> Vec<u8> {
    let data = vec![byte; 512];
    let guard = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF).checksum(&data);
    let tuple = Tuple { app, ..Tuple::new(PiType::Type1, guard, Lba(lba.into())) };
    [data, tuple.to_bytes().to_vec()].concat()
}

fn with_tuples(opcode: u8, lba: u32, blocks: u8) -> Vec<u8> {
    let [a, b, c, d] = lba.to_be_bytes();
    vec![opcode, 0x20, a, b, c, d, 0, 0, blocks, 0]
}

#[test]
fn application_tags_that_initiators_have_written_go_along_also_those_that_are_written_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let of = |dir: &Path, format| exposed(config(dir, format, true));
    let (a, b, _) = pair(dir.path(), of(&here, Format::Raw), of(&there, Format::Qcow2));
    let early: Vec<u8> = (0..9).flat_map(|i| tagged(i, 0xa000 + i as u16, i as u8)).collect();
    assert_eq!(a.run(&with_tuples(0x2a, 0, 9), Data::Out(&early)).0, 0);
    // One block after the other, round and round, each time with another tag.
    let (mut last, mut under_way, mut n) = ([0u16; 64], None, 0u16);
    let ends = UnixStream::pair().unwrap();
    let (given, taken) = hand_over_beside(&a, &b, Fault::None, ends, || {
        let mut kernel = a.kernel.borrow_mut();
        if let Some(done) = kernel.ended().unwrap().pop() {
            assert_eq!(done.status, 0, "{done:?}");
            let (slot, n) = under_way.take().unwrap();
            last[slot] = n;
        }
        if under_way.is_none() {
            n += 1;
            let slot = n % 64;
            let lba = 1000 + u32::from(slot);
            let block = tagged(lba, n, n as u8);
            kernel.submit(&with_tuples(0x2a, lba, 1), Data::Out(&block)).unwrap();
            under_way = Some((usize::from(slot), n));
        }
    });
    taken.unwrap();
    given.unwrap();
    let (status, got) = b.run(&with_tuples(0x28, 0, 9), Data::In(early.len()));
    assert_eq!((status, got == early), (0, true));
    for (i, n) in last.into_iter().enumerate().filter(|(_, n)| *n > 0) {
        let (status, got) = b.run(&with_tuples(0x28, 1000 + i as u32, 1), Data::In(520));
        let is = |n: u16| got == tagged(1000 + i as u32, n, n as u8);
        let newer = under_way.filter(|(slot, _)| *slot == i).is_some_and(|(_, n)| is(n));
        assert!(status == 0 && (is(n) || newer), "block {i}: status {status}, and not tag {n}");
    }
    assert!(last.iter().any(|n| *n > 64), "hardly anything was written meanwhile");
    b.host().stop().unwrap();
    verify(&b.host().config.image);
}

#[test]
fn whatever_fails_the_lun_serves_where_it_was_nothing_is_left_there_and_the_next_try_succeeds() {
    use Fault::{Export, Land, Leave, Prepare, Settle, State};
    for (i, pi) in [(0, true), (1, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = folders(dir.path());
        let formats = [(Format::Raw, Format::Raw), (Format::Qcow2, Format::Qcow2)][i];
        let (a, b, mut numbers) =
            pair(dir.path(), config(&here, formats.0, pi), config(&there, formats.1, pi));
        for round in 0..3 {
            for fault in [Prepare, Land(0), Land(1), Land(7 + round), State, Settle, Leave, Export] {
                let (given, taken) = hand_over(&a, &b, fault, &mut numbers);
                let e = given.unwrap_err();
                assert_eq!(e.down, None, "{fault:?}: {e}");
                assert!(e.failure.reason.contains("injected"), "{fault:?}: {e}");
                taken.unwrap_err();
                a.compare(&numbers);
                assert_eq!(a.run(&[0; 6], Data::None).0, 0, "{fault:?}: initiators have noticed nothing");
                assert!(b.host().lun.is_none() && names(&there).is_empty(), "{fault:?}: {:?}", names(&there));
                assert!(owner::read(&a.host().config.image).unwrap().is_none(), "{fault:?}");
                let jobs = a.host().lun.as_ref().unwrap().remote().job(JobOrder::Query).unwrap();
                assert!(jobs.is_empty(), "{fault:?}: {jobs:?}");
            }
        }
        let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
        taken.unwrap();
        given.unwrap();
        b.compare(&numbers);
        b.host().stop().unwrap();
    }
}

#[test]
fn what_has_still_to_be_copied_when_the_lun_stops_is_sent_before_its_image_is_closed() {
    for pi in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (here, there) = folders(dir.path());
        let (a, b, mut numbers) =
            pair(dir.path(), config(&here, Format::Raw, pi), config(&there, Format::Raw, pi));
        // The connection ends when it has stopped, and it goes on.
        for sent in [12 << 20, 18 << 20] {
            let (one, other) = UnixStream::pair().unwrap();
            let ends = (Cut(one, sent), Cut(other, usize::MAX));
            let (given, taken) = hand_over_by(&a, &b, Fault::Early, ends, &mut numbers);
            let e = given.unwrap_err();
            assert_eq!((e.step, e.down.as_ref()), (Step::Freeze, None), "{e}");
            taken.unwrap_err();
            a.compare(&numbers);
            assert!(names(&there).is_empty());
        }
        let (given, taken) = hand_over(&a, &b, Fault::Early, &mut numbers);
        taken.unwrap();
        given.unwrap();
        b.compare(&numbers);
        b.host().stop().unwrap();
    }
}

#[test]
fn wherever_the_connection_ends_one_of_the_two_serves_with_all_that_was_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, mut numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let mut steps = std::collections::BTreeMap::new();
    for round in 0..14u32 {
        // Of the source, from the offer to the last blocks; of the destination, some answers.
        let cuts = match round {
            0..8 => (300 << (2 * round), usize::MAX),
            _ => (usize::MAX, 5 + 40 * (round as usize - 8)),
        };
        let (one, other) = UnixStream::pair().unwrap();
        let (given, taken) =
            hand_over_by(&a, &b, Fault::None, (Cut(one, cuts.0), Cut(other, cuts.1)), &mut numbers);
        let Err(e) = given else { panic!("{cuts:?}: that was all?") };
        assert_eq!(e.down, None, "{cuts:?}: {e}");
        taken.unwrap_err();
        *steps.entry(e.step.to_string()).or_insert(0) += 1;
        a.compare(&numbers);
        assert!(names(&there).is_empty() && owner::read(&a.host().config.image).unwrap().is_none());
    }
    assert!(steps["storage"] > 5, "{steps:?}");
    a.host().stop().unwrap();
}

#[test]
fn a_block_that_does_not_match_is_never_copied_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let lba = 4000;
    let file = std::fs::File::options().read(true).write(true).open(&a.host().config.image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, lba * 512 + 17).unwrap();
    file.write_all_at(&[!byte[0]], lba * 512 + 17).unwrap();
    let (given, taken) = quietly(&a, &b);
    let e = given.unwrap_err();
    assert_eq!((e.step, &e.down), (Step::Storage, &None), "{e}");
    assert!(e.failure.reason.contains("4000"), "{e}");
    assert!(taken.unwrap_err().reason.contains("4000"), "the destination is told why");
    assert!(names(&there).is_empty());
    // Mended, it goes.
    file.write_all_at(&byte, lba * 512 + 17).unwrap();
    let (given, taken) = quietly(&a, &b);
    taken.unwrap();
    given.unwrap();
    b.compare(&numbers);
    b.host().stop().unwrap();
}

#[test]
fn where_the_answer_is_lost_it_serves_there_alone_and_here_somebody_has_to_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, mut numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let (given, taken) = hand_over(&a, &b, Fault::Answer, &mut numbers);
    taken.unwrap();
    let e = given.unwrap_err();
    let down = e.down.clone().unwrap();
    assert!(down.reason.contains("has not answered"), "{e}");
    assert!(down.next.unwrap().contains(a.host().config.image.to_str().unwrap()));
    assert!(a.host().lun.is_none() && is_left(&a));
    b.compare(&numbers);
    a.offer_device();
    assert!(a.host().start().is_err(), "a restart serves it as little");
    b.host().stop().unwrap();
}

#[test]
fn what_is_there_is_not_overwritten_and_half_an_image_that_was_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, mut numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let image = there.join("vm1.raw");
    for taken in [image.clone(), default_path(&image), owner::path_of(&image)] {
        std::fs::write(&taken, "another's").unwrap();
        let (given, _) = hand_over(&a, &b, Fault::None, &mut numbers);
        let e = given.unwrap_err();
        assert_eq!(e.step, Step::Preflight);
        assert!(e.failure.reason.contains(taken.to_str().unwrap()), "{e}");
        assert_eq!(std::fs::read(&taken).unwrap(), b"another's");
        std::fs::remove_file(&taken).unwrap();
    }
    // A process that was killed has left it.
    std::fs::write(there.join("vm1.raw.incoming"), "half").unwrap();
    std::fs::write(there.join("vm1.raw.incoming.pi"), "half").unwrap();
    let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
    taken.unwrap();
    given.unwrap();
    assert_eq!(names(&there), ["vm1.raw", "vm1.raw.pi"]);
    b.compare(&numbers);
    b.host().stop().unwrap();
}

#[test]
fn a_copy_that_is_ended_or_paused_by_somebody_ends_the_handover_or_has_it_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let lun = a.host().lun.as_ref().unwrap().remote().clone();
    let id = || "handover@vm1".to_owned();
    let with_job = |does: fn(&tcmu_dif::lun::Remote, String)| {
        let lun = lun.clone();
        thread::spawn(move || {
            loop {
                let jobs = lun.job(JobOrder::Query).unwrap();
                if jobs.iter().any(|job| job.id == "handover@vm1" && job.offset > 0) {
                    return does(&lun, "handover@vm1".into());
                }
                thread::sleep(Duration::from_millis(1));
            }
        })
    };
    // The copy has no place to go over to.
    let ended = with_job(|lun, id| {
        lun.job(JobOrder::SetSpeed(id.clone(), 4 << 20)).unwrap();
        assert!(lun.job(JobOrder::Complete(id.clone())).is_err());
        lun.job(JobOrder::Pause(id.clone())).unwrap();
        thread::sleep(Duration::from_millis(300));
        lun.job(JobOrder::Resume(id.clone())).unwrap();
        lun.job(JobOrder::Cancel { id, force: false }).unwrap();
    });
    let (given, _) = quietly(&a, &b);
    ended.join().unwrap();
    let e = given.unwrap_err();
    assert_eq!((e.step, e.down.as_ref()), (Step::Storage, None), "{e}");
    assert!(names(&there).is_empty());
    assert!(lun.job(JobOrder::Query).unwrap().iter().all(|job| job.id != id()));
    a.compare(&numbers);
    // The daemon stops in the midst of it.
    let slowed = with_job(|lun, id| drop(lun.job(JobOrder::SetSpeed(id, 1 << 20)).unwrap()));
    let host = a.host.clone();
    let stopping = thread::spawn(move || {
        slowed.join().unwrap();
        thread::sleep(Duration::from_millis(50));
        host.lock().unwrap().lun.as_ref().unwrap().request_stop();
    });
    let ends = quietly(&a, &b);
    stopping.join().unwrap();
    let e = ends.0.unwrap_err();
    assert_eq!(e.step, Step::Storage, "{e}");
    assert!(names(&there).is_empty());
    a.host().stop().unwrap();
    a.offer_device();
    a.host().start().unwrap();
    assert!(a.host().lun.as_ref().unwrap().remote().job(JobOrder::Query).unwrap().is_empty());
    a.compare(&numbers);
    a.host().stop().unwrap();
}

#[test]
fn over_tls_it_goes_with_its_storage() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = folders(dir.path());
    let (a, b, mut numbers) =
        pair(dir.path(), config(&here, Format::Raw, true), config(&there, Format::Raw, true));
    let pki = certificates::Ca::new("handovers").directory(&dir.path().join("pki"));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address: Address = format!("tls://127.0.0.1:{port}").parse().unwrap();
    let with = Certificates { dir: pki, hostname: None };
    let listener = address.listen(Some(&with)).unwrap();
    let accepting = thread::spawn(move || listener.accept().unwrap());
    let connected = address.connect(Some(&with)).unwrap();
    let (given, taken) =
        hand_over_by(&a, &b, Fault::None, (connected, accepting.join().unwrap()), &mut numbers);
    taken.unwrap();
    given.unwrap();
    b.compare(&numbers);
    b.host().stop().unwrap();
}

/// A file system with little room, taken down at the end.
struct Small(tempfile::TempDir);

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "needs root, for a tmpfs"]
fn a_destination_without_room_is_named_and_the_lun_serves_where_it_was() {
    for (format, pi) in [(Format::Raw, true), (Format::Qcow2, false)] {
        let dir = tempfile::tempdir().unwrap();
        let (here, _) = folders(dir.path());
        let small = Small(tempfile::tempdir().unwrap());
        tool("mount", &["-t", "tmpfs", "-o", "size=12M", "tmpfs", small.0.path().to_str().unwrap()]);
        let there = small.0.path();
        let (a, b, mut numbers) = pair(dir.path(), config(&here, Format::Raw, pi), config(there, format, pi));
        for _ in 0..3 {
            let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
            let e = given.unwrap_err();
            assert_eq!((e.step, e.down.as_ref()), (Step::Storage, None), "{e}");
            let image = there.join(format!("vm1.{format}"));
            assert!(e.failure.reason.contains(image.to_str().unwrap()), "{e}");
            assert!(e.failure.reason.contains("space"), "{e}");
            taken.unwrap_err();
            a.compare(&numbers);
            assert!(names(there).is_empty());
        }
        tool("mount", &["-o", "remount,size=64M", there.to_str().unwrap()]);
        let (given, taken) = hand_over(&a, &b, Fault::None, &mut numbers);
        taken.unwrap();
        given.unwrap();
        b.compare(&numbers);
        b.host().stop().unwrap();
    }
}
