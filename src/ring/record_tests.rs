//! A handler killed before each of its stores, and what its successor makes of what it left.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::FileExt,
    rc::Rc,
};

use rustix::fs::{SeekFrom, seek};

use super::*;
use crate::{
    peer::kernel::{Data, Kernel, Options},
    sys::mem::crash,
};

const INSTANCE: u64 = 77;
const WRITE10: [u8; 10] = [0x2a, 0, 0, 0, 0, 1, 0, 0, 9, 0];

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

fn record() -> File {
    File::from(rustix::fs::memfd_create("record", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

fn copy_of(file: &File) -> File {
    let copy = record();
    copy.set_len(file.metadata().unwrap().len()).unwrap();
    // Pages that were never stored to stay holes.
    let (mut at, len) = (0, file.metadata().unwrap().len());
    while let Ok(data) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(data)).unwrap().min(len);
        let mut bytes = vec![0; (end - data) as usize];
        file.read_exact_at(&mut bytes, data).unwrap();
        copy.write_all_at(&bytes, data).unwrap();
        at = end;
    }
    copy
}

/// What the kernel knows, at the moment of a crash.
struct World {
    kernel: Kernel,
    record: File,
    /// Commands not answered by what the kernel has seen: what each was told to write, by id.
    open: BTreeMap<u16, Vec<u8>>,
}

fn options() -> Options {
    Options { cmdr_size: 4096, data_size: 256 << 10, ..Options::default() }
}

/// The successor of a handler that was killed: its ring, or `None` if it has to give all back.
fn successor(world: &World) -> Option<Ring> {
    let device = || world.kernel.device().unwrap().with_record(world.record.try_clone().unwrap(), INSTANCE);
    device().is_resumable().unwrap().then(|| Ring::attach(device()).unwrap())
}

/// A successor takes just the commands that the kernel has no answer for, with their data, and answers them.
fn judge(world: &mut World, random: &mut Random) -> usize {
    let mut ring = successor(world).expect("the record knows");
    let mut ended: BTreeSet<u16> = world.kernel.ended().unwrap().iter().map(|e| e.id).collect();
    let mut replies = Vec::new();
    while let Some((entry, reply)) = ring.take_entry().unwrap() {
        let Entry::Command(command) = entry else { continue };
        assert!(!ended.contains(&command.id), "an answered command comes again");
        assert_eq!(world.open.get(&command.id), Some(&command.data.to_vec()), "another's data");
        replies.extend(reply);
    }
    assert_eq!(ring.resumed(), Some(replies.len()));
    let taken = replies.len();
    while !replies.is_empty() {
        replies.swap_remove(random.below(replies.len())).answer(Completion::status(0));
        if random.below(3) == 0 {
            ring.publish().unwrap();
        }
    }
    ring.publish().unwrap();
    ended.extend(world.kernel.ended().unwrap().iter().map(|e| e.id));
    assert_eq!(ended, world.open.keys().copied().collect(), "each is answered once");
    assert_eq!(world.kernel.in_flight(), 0);
    // And the ring goes on.
    world.kernel.submit(&WRITE10, Data::Out(&[3; 512])).unwrap();
    ring.take_entry().unwrap().unwrap().1.unwrap().answer(Completion::status(0));
    ring.publish().unwrap();
    assert_eq!(world.kernel.ended().unwrap().len(), 1);
    taken
}

/// The shared state as it is while the process is being killed.
struct Shared {
    kernel: Kernel,
    open: BTreeMap<u16, Vec<u8>>,
    record: File,
    random: Random,
    crashes: usize,
    again: usize,
    taken: usize,
    one_in: usize,
}

impl Shared {
    fn crash(&mut self) {
        if self.random.below(self.one_in) != 0 {
            return;
        }
        let copy = |shared: &Shared| World {
            kernel: shared.kernel.copy().unwrap(),
            record: copy_of(&shared.record),
            open: shared.open.clone(),
        };
        let mut world = copy(self);
        let mut random = Random(self.random.0);
        self.taken += judge(&mut world, &mut random);
        self.crashes += 1;
        // The successor is killed as well, somewhere in its own start and work.
        let world = Rc::new(RefCell::new(copy(self)));
        let again = Rc::new(RefCell::new((random.below(40), None)));
        let (inner, at) = (world.clone(), again.clone());
        crash::before_each_store(Some(Box::new(move || {
            let mut at = at.borrow_mut();
            match at.0.checked_sub(1) {
                Some(less) => at.0 = less,
                None if at.1.is_none() => {
                    let world = inner.borrow();
                    at.1 = Some(World {
                        kernel: world.kernel.copy().unwrap(),
                        record: copy_of(&world.record),
                        open: world.open.clone(),
                    });
                }
                None => {}
            }
        })));
        let ring = successor(&world.borrow());
        let mut ring = ring.expect("the record knows");
        while let Some((_, reply)) = ring.take_entry().unwrap() {
            if let Some(reply) = reply {
                reply.answer(Completion::status(0));
            }
            if random.below(2) == 0 {
                ring.publish().unwrap();
            }
        }
        ring.publish().unwrap();
        crash::before_each_store(None);
        if let Some(mut world) = again.borrow_mut().1.take() {
            judge(&mut world, &mut random);
            self.again += 1;
        }
    }
}

fn work(seed: u64, commands: u32, one_in: usize) -> (usize, usize, usize) {
    let shared = Rc::new(RefCell::new(Shared {
        kernel: Kernel::new(options()).unwrap(),
        open: BTreeMap::new(),
        record: record(),
        random: Random(seed | 1),
        crashes: 0,
        again: 0,
        taken: 0,
        one_in,
    }));
    let device = {
        let shared = shared.borrow();
        shared.kernel.device().unwrap().with_record(shared.record.try_clone().unwrap(), INSTANCE)
    };
    let mut ring = Ring::attach(device).unwrap();
    let mut random = Random(seed * 31 + 7);
    let mut open: Vec<Reply> = Vec::new();
    let mut sent = 0;
    while sent < commands || !open.is_empty() {
        {
            let mut shared = shared.borrow_mut();
            while sent < commands && shared.kernel.in_flight() < 9 && random.below(4) != 0 {
                let data = vec![sent as u8 ^ 0x5a; (1 + random.below(3)) * 512];
                match shared.kernel.queue(&WRITE10, Data::Out(&data)) {
                    Ok(id) => shared.open.insert(id, data),
                    Err(_) => break,
                };
                sent += 1;
            }
        }
        let most = random.below(6);
        for _ in 0..most {
            let Some((_, reply)) = ring.take_entry().unwrap() else { break };
            open.extend(reply);
        }
        for _ in 0..random.below(open.len() + 1) {
            // The first one is slow, so that its request is overwritten.
            let which =
                if open.len() > 1 && random.below(10) != 0 { 1 + random.below(open.len() - 1) } else { 0 };
            open.swap_remove(which).answer(Completion::status(0));
        }
        let inside = shared.clone();
        crash::before_each_store(Some(Box::new(move || inside.borrow_mut().crash())));
        ring.publish().unwrap();
        crash::before_each_store(None);
        let mut shared = shared.borrow_mut();
        for ended in shared.kernel.ended().unwrap() {
            shared.open.remove(&ended.id);
        }
        shared.crash();
        crash::before_each_store(None);
    }
    let shared = shared.borrow();
    (shared.crashes, shared.again, shared.taken)
}

#[test]
fn whenever_a_handler_is_killed_its_successor_runs_the_unanswered_commands_and_no_other() {
    let (mut crashes, mut again, mut taken) = (0, 0, 0);
    for seed in 1..=8 {
        let (c, a, t) = work(seed, 100, 12);
        (crashes, again, taken) = (crashes + c, again + a, taken + t);
    }
    println!("{crashes} crashes, {again} of successors, {taken} commands taken up");
    assert!(crashes > 300 && again > 100 && taken > 1000, "{crashes} {again} {taken}");
}

#[test]
fn a_record_of_another_ring_or_none_is_not_believed() {
    let mut kernel = Kernel::new(options()).unwrap();
    let file = record();
    let device = |instance| kernel.device().unwrap().with_record(file.try_clone().unwrap(), instance);
    let ring = Ring::attach(device(INSTANCE)).unwrap();
    assert_eq!(ring.resumed(), None);
    drop(ring);
    assert_eq!(Ring::attach(device(INSTANCE)).unwrap().resumed(), Some(0));
    // Another device of the same place.
    assert_eq!(Ring::attach(device(INSTANCE + 1)).unwrap().resumed(), None);
    assert_eq!(Ring::attach(device(INSTANCE)).unwrap().resumed(), None);
    // A ring that somebody else has moved on.
    let other = kernel.device().unwrap();
    kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    let mut ring = Ring::attach(other).unwrap();
    ring.take_entry().unwrap().unwrap().1.unwrap().answer(Completion::status(0));
    ring.publish().unwrap();
    drop(ring);
    kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    let device = kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE);
    assert!(!device.is_resumable().unwrap());
    // Rubbish, of the right length and of another.
    let len = file.metadata().unwrap().len();
    file.write_all_at(&vec![0xa5; 60 << 10], 8).unwrap();
    let device = kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE);
    assert!(!device.is_resumable().unwrap());
    file.set_len(len - 1).unwrap();
    let device = kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE);
    assert!(!device.is_resumable().unwrap());
    assert_eq!(Ring::attach(device).unwrap().resumed(), None);
}

/// Makes the file one of another version.
fn as_version(file: &File, version: u8) {
    file.write_all_at(&[version], 7).unwrap();
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; 64 << 10];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_newer_record_that_would_be_needed_is_refused_in_words_and_neither_it_nor_the_ring_is_touched() {
    let mut kernel = Kernel::new(options()).unwrap();
    let file = record();
    let device = |kernel: &Kernel, file: &File| {
        kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE)
    };
    let mut ring = Ring::attach(device(&kernel, &file)).unwrap();
    for _ in 0..3 {
        kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    }
    // The second is answered before the first: what the ring shows of it is not to be run again.
    let first = ring.take_entry().unwrap().unwrap().1.unwrap();
    ring.take_entry().unwrap().unwrap().1.unwrap().answer(Completion::status(0));
    ring.publish().unwrap();
    kernel.ended().unwrap();
    std::mem::forget(first);
    drop(ring);
    for newer in [2, 3, 255] {
        as_version(&file, newer);
        let (before, world) = (bytes_of(&file), kernel.copy().unwrap());
        let refused = device(&kernel, &file).is_resumable().unwrap_err();
        let words = format!("the in-flight record is of version {newer}, and this program knows 1");
        assert!(refused.to_string().starts_with(&words), "{refused}");
        let refused = Ring::attach(device(&kernel, &file)).err().unwrap();
        assert!(matches!(refused, RingError::RecordVersion { found } if found == newer), "{refused}");
        assert_eq!(bytes_of(&file), before);
        assert_eq!(kernel.in_flight(), world.in_flight());
    }
    // The version that wrote it goes on as if nothing had been.
    as_version(&file, 1);
    let mut ring = Ring::attach(device(&kernel, &file)).unwrap();
    assert_eq!(ring.resumed(), Some(2));
    while let Some((_, reply)) = ring.take_entry().unwrap() {
        reply.unwrap().answer(Completion::status(0));
    }
    ring.publish().unwrap();
    assert_eq!((kernel.ended().unwrap().len(), kernel.in_flight()), (2, 0));
    // Nothing is under way: nothing of a newer record is needed. One of another ring says nothing of this one.
    drop(ring);
    as_version(&file, 2);
    assert_eq!(Ring::attach(device(&kernel, &file)).unwrap().resumed(), Some(0));
    as_version(&file, 2);
    kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    let other = kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE + 1);
    assert!(!other.is_resumable().unwrap());
}

#[test]
fn a_newer_handler_that_stopped_in_good_order_leaves_a_ring_that_any_version_takes_up() {
    let mut kernel = Kernel::new(options()).unwrap();
    let file = record();
    let device = |kernel: &Kernel, file: &File| {
        kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE)
    };
    let mut ring = Ring::attach(device(&kernel, &file)).unwrap();
    kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    ring.take_entry().unwrap().unwrap().1.unwrap().answer(Completion::status(0));
    ring.publish().unwrap();
    kernel.ended().unwrap();
    let killed = copy_of(&file);
    drop(ring);
    // While nobody is there, initiators go on.
    let ids: BTreeSet<u16> = (0..3).map(|_| kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap()).collect();
    for file in [&killed, &file] {
        as_version(file, 2);
    }
    assert!(device(&kernel, &killed).is_resumable().is_err(), "one that was killed has not said so");
    assert!(device(&kernel, &file).is_resumable().unwrap());
    let mut ring = Ring::attach(device(&kernel, &file)).unwrap();
    assert_eq!(ring.resumed(), Some(3));
    let mut taken = BTreeSet::new();
    while let Some((Entry::Command(command), reply)) = ring.take_entry().unwrap() {
        taken.insert(command.id);
        reply.unwrap().answer(Completion::status(0));
    }
    assert_eq!(taken, ids);
    ring.publish().unwrap();
    // The one who took it up is at work, and has not stopped: its own record counts from now on.
    assert_eq!(bytes_of(&file)[7..8], [1]);
    assert_eq!(bytes_of(&file)[24..28], [0; 4]);
}

#[test]
fn a_mark_outlives_its_process_and_goes_with_the_answer() {
    let mut kernel = Kernel::new(options()).unwrap();
    let file = record();
    let attach = |kernel: &Kernel| {
        let device = kernel.device().unwrap().with_record(file.try_clone().unwrap(), INSTANCE);
        Ring::attach(device).unwrap()
    };
    let take = |ring: &mut Ring| match ring.take_entry().unwrap() {
        Some((Entry::Command(command), Some(reply))) => (command.once.clone().unwrap(), reply),
        other => panic!("{other:?}", other = other.map(|(e, _)| e)),
    };
    let mut ring = attach(&kernel);
    let id = kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    let (once, reply) = take(&mut ring);
    assert!(!once.is_marked());
    once.mark();
    std::mem::forget(reply);
    drop(ring);
    assert_eq!(bytes_of(&file)[24..28], [0; 4], "the ring does not say that it has been marked");
    let mut ring = attach(&kernel);
    let (once, reply) = take(&mut ring);
    assert!(once.is_marked());
    reply.answer(Completion::status(0));
    ring.publish().unwrap();
    assert!(!once.is_marked());
    assert_eq!(kernel.ended().unwrap()[0].id, id);
    kernel.submit(&WRITE10, Data::Out(&[1; 512])).unwrap();
    let (once, reply) = take(&mut ring);
    assert!(!once.is_marked(), "the id is used again, the mark is not");
    reply.answer(Completion::status(0));
}
