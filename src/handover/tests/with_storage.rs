//! A LUN that goes with its storage, whose blocks are numbers in a list: whatever fails and wherever the connection ends, no two hosts serve it, it has every block where it serves,
//! and where it serves nowhere that is because the destination was told to, and was not heard of again.

use std::{
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex,
        mpsc::{Sender, channel},
    },
    thread,
};

use super::{Cut, identity};
use crate::handover::{
    storage::{Back, Kept, MOST, Parcel, Piece},
    wire::{Host, Message, receive, send},
    *,
};

const BLOCKS: u64 = 40;

/// What there is in the world.
#[derive(Debug, Default)]
struct World {
    old_serves: bool,
    /// The image there is marked as the other host's.
    marked: bool,
    new_serves: bool,
    /// Blocks of the new image, while there is one.
    new: Option<Vec<u64>>,
    log: Vec<&'static str>,
}

impl World {
    fn check(&self) {
        assert!(!(self.old_serves && self.new_serves), "{:?}", self.log);
        assert!(!(self.marked && self.old_serves), "{:?}", self.log);
    }
}

type Shared = Arc<Mutex<World>>;

struct Old {
    world: Shared,
    fails: &'static str,
    to: Option<Sender<Parcel>>,
}

impl Old {
    fn step<T>(&mut self, word: &'static str, does: impl FnOnce(&mut World) -> T) -> Result<T, Failure> {
        let mut world = self.world.lock().unwrap();
        world.log.push(word);
        if self.fails == word {
            return Err(Failure::new(format!("no {word}")));
        }
        let out = does(&mut world);
        world.check();
        Ok(out)
    }

    fn put(&self, piece: Piece) -> Result<(), Failure> {
        let (back, answer) = channel();
        let back = Back::new(move |given| drop(back.send(given)));
        drop(self.to.as_ref().unwrap().send(Parcel { piece, back }));
        answer.recv().unwrap()
    }

    fn write(&self, blocks: std::ops::Range<u64>) -> Result<(), Failure> {
        blocks.into_iter().try_for_each(|n| {
            let data = n.to_be_bytes().repeat(64);
            self.put(Piece::Write { at: n * 512, data, tuples: Some(vec![n as u8; 8]) })
        })
    }
}

impl Source for Old {
    fn identity(&mut self) -> Result<Identity, Failure> {
        self.step("identity", |_| Identity { generation: None, ..identity() })
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        self.step("freeze", |world| world.old_serves = false)?;
        let sent = self.write(BLOCKS / 2..BLOCKS).and_then(|()| self.put(Piece::Flush));
        self.to = None;
        sent
    }

    fn state(&mut self) -> Result<State, Failure> {
        self.step("state", |_| State::new(Identity { generation: None, ..identity() }))
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        self.to = None;
        self.step("thaw", |world| {
            world.old_serves = !world.marked;
            if world.marked { Thawed::Taken } else { Thawed::Serves }
        })
    }

    fn finish(&mut self) -> Result<(), Failure> {
        self.step("finish", |world| assert!(world.marked && world.new_serves))
    }
}

impl WithStorage for Old {
    fn image(&self) -> String {
        "/old.raw".into()
    }

    fn copy(&mut self, to: Sender<Parcel>) -> Result<(), Failure> {
        self.to = Some(to);
        let copied = self.step("copy", |_| ()).and_then(|()| {
            let kept = Kept { kind: 1, journal: false, initiators: true, hidden: false };
            self.put(Piece::Begin(Some(kept)))?;
            self.write(0..BLOCKS / 2)?;
            self.put(Piece::Zeroes { at: 0, len: 0, may_unmap: true })?;
            self.put(Piece::Discard { at: 0, len: 0 })
        });
        if copied.is_err() {
            self.to = None;
        }
        copied
    }

    fn leave(&mut self, to: &Host) -> Result<(), Failure> {
        assert_eq!(to.name, "new");
        if self.fails == "leave, late" {
            self.world.lock().unwrap().marked = true;
            return Err(Failure::new("no leave"));
        }
        self.step("leave", |world| world.marked = true)
    }

    fn stay(&mut self) -> Result<(), Failure> {
        self.step("stay", |world| {
            assert!(!world.new_serves);
            world.marked = false;
        })
    }
}

struct New {
    world: Shared,
    fails: &'static str,
}

impl New {
    fn step<T>(&self, word: &'static str, does: impl FnOnce(&mut World) -> T) -> Result<T, Failure> {
        if self.fails == word {
            return Err(Failure::new(format!("no {word} there")));
        }
        let mut world = self.world.lock().unwrap();
        let out = does(&mut world);
        world.check();
        Ok(out)
    }
}

impl Destination for New {
    fn prepare(&mut self, _: &Identity) -> Result<(), Failure> {
        unreachable!("its storage comes along")
    }

    fn prepare_storage(&mut self, of: &Identity) -> Result<(), Failure> {
        assert_eq!(of.name, "vm1");
        self.step("prepare", |_| ())
    }

    fn land(&mut self, piece: Piece) -> Result<(), Failure> {
        match piece {
            Piece::Begin(kept) => self.step("begin", |world| {
                assert!(kept.is_some_and(|k| k.initiators && !k.hidden));
                world.new = Some(Vec::new());
            }),
            Piece::Write { at, data, tuples } => self.step("write", |world| {
                let n = u64::from_be_bytes(data[..8].try_into().unwrap());
                assert_eq!((at, data.len(), tuples), (n * 512, 512, Some(vec![n as u8; 8])));
                world.new.as_mut().unwrap().push(n);
            }),
            Piece::Flush => self.step("flush", |_| ()),
            _ => Ok(()),
        }
    }

    fn settle(&mut self) -> Result<Host, Failure> {
        self.step("settle", |_| Host { id: [7; 16], name: "new".into() })
    }

    fn build(&mut self, _: &State) -> Result<serde_json::Value, Failure> {
        self.step("build", |world| {
            world.new_serves = true;
            serde_json::json!({ "name": "vm1" })
        })
    }

    fn clear(&mut self) {
        self.world.lock().unwrap().new = None;
    }
}

struct Outcome {
    given: Result<Given, NotGiven>,
    taken: bool,
    world: World,
}

/// One handover; each side's connection may end after so many bytes of its own.
fn handover(fails: &'static str, there: &'static str, source: usize, destination: usize) -> Outcome {
    let world = Arc::new(Mutex::new(World { old_serves: true, ..World::default() }));
    let (here, far) = UnixStream::pair().unwrap();
    let mut old = Old { world: world.clone(), fails, to: None };
    let mut new = New { world: world.clone(), fails: there };
    let taking = thread::spawn(move || take(&mut Cut(far, destination), &mut new).is_ok());
    let given = give_with_storage(&mut Cut(here, source), &mut old);
    let taken = taking.join().unwrap();
    drop(old);
    let world = Arc::into_inner(world).unwrap().into_inner().unwrap();
    Outcome { given, taken, world }
}

const ALL: usize = usize::MAX;

/// Whatever happened: who has it. Whether it went over, stayed, or is in doubt.
fn judge(Outcome { given, taken, world }: &Outcome) -> &'static str {
    world.check();
    assert_eq!(*taken, world.new_serves, "{given:?}");
    if world.new_serves {
        assert_eq!(world.new.as_deref(), Some(&(0..BLOCKS).collect::<Vec<u64>>()[..]));
    } else {
        assert_eq!(world.new, None, "half an image is left");
    }
    match given {
        Ok(given) => {
            assert!(given.made.is_some() && world.new_serves && world.marked, "{given:?}");
            assert_eq!(world.log.last(), Some(&"finish"));
            "over"
        }
        Err(e) if e.down.is_none() => {
            assert!(world.old_serves && !world.marked && !world.new_serves, "{e}: {world:?}");
            "stays"
        }
        Err(e) => {
            let down = e.down.as_ref().unwrap();
            assert!(world.marked && !world.old_serves, "{e}: {world:?}");
            assert!(down.next.as_ref().unwrap().contains("--take-over /old.raw"), "{down:?}");
            "doubt"
        }
    }
}

#[test]
fn a_lun_goes_over_with_all_its_blocks_and_is_taken_down_only_then() {
    let done = handover("", "", ALL, ALL);
    assert_eq!(judge(&done), "over");
    assert_eq!(done.world.log, ["identity", "copy", "freeze", "state", "leave", "finish"]);
}

#[test]
fn whichever_step_fails_the_lun_serves_where_it_was_and_nothing_is_left_there() {
    let steps = [
        ("identity", Step::Preflight),
        ("copy", Step::Storage),
        ("freeze", Step::Freeze),
        ("state", Step::State),
        ("leave", Step::Build),
    ];
    for (fails, step) in steps {
        let failed = handover(fails, "", ALL, ALL);
        assert_eq!(judge(&failed), "stays", "{fails}");
        let e = failed.given.unwrap_err();
        assert_eq!((e.step, e.failure.reason), (step, format!("no {fails}")));
    }
    let there = [
        ("prepare", Step::Preflight),
        ("begin", Step::Storage),
        ("write", Step::Storage),
        ("flush", Step::Freeze),
        ("settle", Step::Build),
        ("build", Step::Build),
    ];
    for (fails, step) in there {
        let failed = handover("", fails, ALL, ALL);
        assert_eq!(judge(&failed), "stays", "{fails}");
        assert_eq!(failed.world.log.contains(&"stay"), fails == "build");
        let e = failed.given.unwrap_err();
        assert_eq!((e.step, e.failure.reason), (step, format!("no {fails} there")));
    }
    // A mark that is there, though it could not be made in order: nobody takes that for a LUN that has gone over.
    let failed = handover("leave, late", "", ALL, ALL);
    assert_eq!(judge(&failed), "doubt");
    assert!(!failed.taken && !failed.world.log.contains(&"finish"), "{:?}", failed.world.log);
    // It cannot be said any more that it stays: it serves nowhere, and says so.
    let failed = handover("stay", "build", ALL, ALL);
    let e = failed.given.unwrap_err();
    assert_eq!(e.down, Some(Failure::new("no stay")));
    assert!(!failed.world.old_serves && failed.world.marked && !failed.world.new_serves);
}

#[test]
fn wherever_the_connection_ends_no_two_hosts_serve_the_lun_and_it_is_in_doubt_only_at_the_end() {
    let mut counted = std::collections::BTreeMap::new();
    let whole = handover("", "", ALL, ALL);
    assert_eq!(judge(&whole), "over");
    // All that either side sends, and some more. Pieces are alike, so of most of them every seventh byte does.
    for cut in (0..28_000).filter(|cut| *cut < 1500 || *cut > 24_000 || cut % 37 == 0) {
        *counted.entry(judge(&handover("", "", cut, ALL))).or_insert(0) += 1;
    }
    for cut in 0..500 {
        *counted.entry(judge(&handover("", "", ALL, cut))).or_insert(0) += 1;
    }
    assert!(counted["over"] > 50 && counted["stays"] > 500, "{counted:?}");
    // The destination's answer alone.
    assert!(counted["doubt"] > 5 && counted["doubt"] < 60, "{counted:?}");
}

#[test]
fn a_destination_that_knows_no_storage_refuses_and_so_does_one_that_was_told_no_place() {
    struct Nowhere;
    impl Destination for Nowhere {
        fn prepare(&mut self, _: &Identity) -> Result<(), Failure> {
            unreachable!()
        }
        fn build(&mut self, _: &State) -> Result<serde_json::Value, Failure> {
            unreachable!()
        }
    }
    let (mut here, mut there) = UnixStream::pair().unwrap();
    let taking = thread::spawn(move || take(&mut there, &mut Nowhere));
    let world = Arc::new(Mutex::new(World { old_serves: true, ..World::default() }));
    let mut old = Old { world, fails: "", to: None };
    let e = give_with_storage(&mut here, &mut old).unwrap_err();
    assert!(e.failure.next.unwrap().contains("receive --image"));
    assert!(taking.join().unwrap().is_err());
    // Pieces without an offer of storage are not taken.
    let (mut here, mut there) = UnixStream::pair().unwrap();
    let taking = thread::spawn(move || {
        struct Shared;
        impl Destination for Shared {
            fn prepare(&mut self, _: &Identity) -> Result<(), Failure> {
                Ok(())
            }
            fn build(&mut self, _: &State) -> Result<serde_json::Value, Failure> {
                unreachable!()
            }
        }
        take(&mut there, &mut Shared)
    });
    let offer = wire::Offer { protocol: wire::PROTOCOL, program: "1".into(), identity: identity() };
    send(&mut here, &Message::Offer(Box::new(offer))).unwrap();
    assert_eq!(receive(&mut here).unwrap(), Message::Ready);
    send(&mut here, &Message::Piece(Piece::Flush)).unwrap();
    assert!(matches!(receive(&mut here).unwrap(), Message::Failed(_)));
    assert!(taking.join().unwrap().is_err());
}

#[test]
fn pieces_come_through_whole_and_what_is_none_is_refused() {
    let kept = Kept { kind: 3, journal: true, initiators: false, hidden: true };
    let all = [
        Piece::Begin(None),
        Piece::Begin(Some(kept)),
        Piece::Write { at: 512, data: vec![3; 1024], tuples: Some(vec![4; 16]) },
        Piece::Write { at: u64::MAX, data: vec![3; MOST], tuples: None },
        Piece::Zeroes { at: 1, len: 2, may_unmap: false },
        Piece::Discard { at: 3, len: u64::MAX },
        Piece::Flush,
        Piece::Nothing,
    ];
    let mut bytes = Vec::new();
    for piece in &all {
        send(&mut bytes, &Message::Piece(piece.clone())).unwrap();
    }
    let mut from = &bytes[..];
    for piece in all {
        assert_eq!(receive(&mut from).unwrap(), Message::Piece(piece));
    }
    assert!(from.is_empty());
    let head = |what: u8, len: u64, flag: u8| [&[what][..], &[0; 8], &len.to_be_bytes(), &[flag]].concat();
    let wrong = [
        Vec::new(),
        vec![4; 17],
        head(9, 0, 0),
        [head(4, 0, 0), vec![0]].concat(),
        head(1, 1, 0),
        [head(1, 1, 0), vec![0; 2]].concat(),
        head(1, u64::MAX, 1),
        [head(1, MOST as u64 + 1, 0), vec![0; MOST + 1]].concat(),
        head(0, 0, 0),
    ];
    for body in wrong {
        let message = [&[6][..], &(body.len() as u32).to_be_bytes(), &body].concat();
        assert!(receive(&mut &message[..]).is_err(), "{:?}", &body[..body.len().min(20)]);
    }
}
