//! Both sides against each other over a socket, with images that are only counted: whatever fails and wherever the connection ends, one side has the LUN, and the
//! source serves it whenever the destination does not.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    sync::{Arc, Mutex},
    thread,
};

use serde_json::json;

mod with_storage;

use super::{
    state::Modes,
    wire::{Message, PROTOCOL, receive, send},
    *,
};

pub(crate) fn identity() -> Identity {
    Identity {
        name: "vm1".into(),
        serial: "serial-1".into(),
        config: "/shared/vm1.raw".into(),
        format: "raw".into(),
        block_size: 512,
        capacity: 1 << 20,
        write_cache: true,
        exports: vec![("vhost".into(), "naa.5001405000000001".into())],
        generation: Some(3),
    }
}

/// The image that both have: who uses it, and its generation.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Image {
    by: Option<&'static str>,
    generation: u64,
}

type Shared = Arc<Mutex<Image>>;

struct Old {
    image: Shared,
    fails: Option<Step>,
    /// What it was told, in order.
    log: Vec<&'static str>,
}

impl Old {
    fn step(&mut self, step: Step, word: &'static str) -> Result<(), Failure> {
        self.log.push(word);
        if self.fails == Some(step) { Err(Failure::new(format!("no {step}"))) } else { Ok(()) }
    }
}

impl Source for Old {
    fn identity(&mut self) -> Result<Identity, Failure> {
        self.step(Step::Preflight, "identity").map(|()| identity())
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        self.step(Step::Freeze, "freeze")?;
        let mut image = self.image.lock().unwrap();
        assert_eq!(image.by.take(), Some("old"));
        image.generation += 1;
        Ok(())
    }

    fn state(&mut self) -> Result<State, Failure> {
        self.step(Step::State, "state")?;
        let generation = Some(self.image.lock().unwrap().generation);
        Ok(State::new(Identity { generation, ..identity() }))
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        self.log.push("thaw");
        let mut image = self.image.lock().unwrap();
        match image.by {
            Some("new") => return Ok(Thawed::Taken),
            Some(_) => {}
            None => *image = Image { by: Some("old"), generation: image.generation + 1 },
        }
        Ok(Thawed::Serves)
    }

    fn finish(&mut self) -> Result<(), Failure> {
        self.step(Step::Finish, "finish")
    }
}

struct New {
    image: Shared,
    fails: Option<&'static str>,
}

impl Destination for New {
    fn prepare(&mut self, of: &Identity) -> Result<(), Failure> {
        assert_eq!(of.name, "vm1");
        if self.fails == Some("prepare") { Err(Failure::new("no room").then("make room")) } else { Ok(()) }
    }

    fn build(&mut self, state: &State) -> Result<serde_json::Value, Failure> {
        let mut image = self.image.lock().unwrap();
        if image.by.is_some() || Some(image.generation) != state.identity.generation {
            return Err(Failure::new("somebody else has had it"));
        }
        *image = Image { by: Some("new"), generation: image.generation + 1 };
        if self.fails == Some("build") {
            *image = Image { by: None, generation: image.generation + 1 };
            return Err(Failure::new("no target"));
        }
        Ok(json!({ "name": "vm1" }))
    }
}

/// A connection that ends after so many bytes were sent.
struct Cut(UnixStream, usize);

impl Read for Cut {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

impl Write for Cut {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if self.1 == 0 {
            self.0.shutdown(std::net::Shutdown::Both)?;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let n = self.0.write(&from[..from.len().min(self.1)])?;
        self.1 -= n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Outcome {
    given: Result<Given, NotGiven>,
    taken: Result<(Identity, serde_json::Value), Failure>,
    image: Image,
    log: Vec<&'static str>,
}

/// One handover; each side's connection may end after so many bytes of its own.
fn handover(
    source_fails: Option<Step>,
    destination_fails: Option<&'static str>,
    source_sends: usize,
    destination_sends: usize,
) -> Outcome {
    let image = Arc::new(Mutex::new(Image { by: Some("old"), generation: 3 }));
    let (here, there) = UnixStream::pair().unwrap();
    let mut old = Old { image: image.clone(), fails: source_fails, log: Vec::new() };
    let mut new = New { image: image.clone(), fails: destination_fails };
    let taking = thread::spawn(move || take(&mut Cut(there, destination_sends), &mut new));
    let given = give(&mut Cut(here, source_sends), &mut old);
    let taken = taking.join().unwrap();
    let image = image.lock().unwrap().clone();
    Outcome { given, taken, image, log: old.log }
}

/// Whatever happened: one side has it.
fn judge(outcome: &Outcome) {
    match &outcome.given {
        Ok(_) => {
            assert_eq!(outcome.image.by, Some("new"), "{:?}", outcome.given);
            assert_eq!(outcome.log.last(), Some(&"finish"));
            assert!(outcome.taken.is_ok());
        }
        Err(e) => {
            assert_eq!(e.down, None, "{e}");
            assert_eq!(outcome.image.by, Some("old"), "{e}");
            assert!(!outcome.log.contains(&"finish"), "{:?}", outcome.log);
            assert!(outcome.taken.is_err(), "{e}: {:?}", outcome.taken);
        }
    }
}

const ALL: usize = usize::MAX;

#[test]
fn a_lun_goes_over_and_is_taken_down_only_then() {
    let done = handover(None, None, ALL, ALL);
    judge(&done);
    assert_eq!(done.given, Ok(Given { made: Some(json!({ "name": "vm1" })), left: None }));
    assert_eq!(done.log, ["identity", "freeze", "state", "finish"]);
    assert_eq!(done.image.generation, 5);
    let left = handover(Some(Step::Finish), None, ALL, ALL);
    judge(&left);
    assert_eq!(left.given.unwrap().left, Some(Failure::new("no finish")));
}

#[test]
fn whichever_step_fails_the_lun_serves_where_it_was() {
    for step in [Step::Preflight, Step::Freeze, Step::State] {
        let failed = handover(Some(step), None, ALL, ALL);
        judge(&failed);
        let e = failed.given.unwrap_err();
        assert_eq!((e.step, e.failure), (step, Failure::new(format!("no {step}"))));
        assert_eq!(failed.log.contains(&"thaw"), step != Step::Preflight);
    }
    for (fails, step, words) in [("prepare", Step::Preflight, "no room"), ("build", Step::Build, "no target")]
    {
        let failed = handover(None, Some(fails), ALL, ALL);
        judge(&failed);
        let e = failed.given.unwrap_err();
        assert_eq!((e.step, e.failure.reason.as_str()), (step, words));
        assert!(e.failure.next.is_some() == (fails == "prepare"));
        assert_eq!(
            failed.log.contains(&"freeze"),
            fails == "build",
            "it is not frozen before the destination has looked"
        );
    }
}

#[test]
fn wherever_the_connection_ends_one_side_has_the_lun() {
    let (mut over, mut stayed) = (0, 0);
    for cut in 0..900 {
        for (source, destination) in [(cut, ALL), (ALL, cut.min(60))] {
            let outcome = handover(None, None, source, destination);
            judge(&outcome);
            match outcome.given {
                Ok(_) => over += 1,
                Err(_) => stayed += 1,
            }
        }
    }
    assert!(over > 100 && stayed > 100, "{over} {stayed}");
    // The answer is what was lost: the image tells.
    let lost = handover(None, None, ALL, 5);
    judge(&lost);
    assert_eq!(lost.given.unwrap().made, None);
}

#[test]
fn what_is_no_handover_is_refused_in_words() {
    let ask = |message: Message| {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        send(&mut here, &message).unwrap();
        let mut new = New { image: Shared::default(), fails: None };
        let taken = take(&mut there, &mut new).unwrap_err();
        assert_eq!(receive(&mut here).unwrap(), Message::Failed(taken.clone()));
        taken.reason
    };
    assert_eq!(ask(Message::Ready), "the source does not begin with an offer");
    let offer = wire::Offer { protocol: PROTOCOL + 2, program: "9.9".into(), identity: identity() };
    let words = ask(Message::Offer(Box::new(offer)));
    assert!(
        words.contains("tcmu-dif 9.9") && words.contains(&format!("protocol {}", PROTOCOL + 2)),
        "{words}"
    );
    for bytes in
        [&[10, 0, 0, 0, 0][..], &[1, 0xff, 0, 0, 0], &[1, 0, 0, 0, 2, b'{', b'}'], &[4, 0, 0, 0, 9, 1]]
    {
        assert!(receive(&mut &bytes[..]).is_err(), "{bytes:?}");
    }
}

/// A state with everything.
fn full() -> State {
    State {
        modes: Some(Modes {
            pages: vec![8, 18, 4],
            write_cache: false,
            unit_attentions: vec![(0x2a, 1)],
            unfinished: Some("format".into()),
        }),
        saved_pages: Some(json!({ "mode_pages": [8] })),
        limits: Some(json!({ "iops": 500 })),
        scrub: Some(json!({ "done": 7 })),
        counters: Some(json!({ "verified": 9 })),
        ..State::new(identity())
    }
}

/// The sections that came after the first version.
fn kept_by_the_kernel() -> State {
    let export = || ("vhost".to_owned(), "naa.5001405000000001".to_owned());
    let registration = port::Registration {
        export: export(),
        initiator: "naa.6001405000000001".into(),
        key: "0x00000000000abc12".into(),
        all_target_ports: false,
        holds: Some(5),
    };
    let attributes = [("alua_access_state".to_owned(), 2)].into();
    State {
        reservations: Some(port::Reservations { registrations: vec![registration] }),
        alua: Some(port::Alua {
            groups: vec![port::Group { name: "far".into(), id: Some(7), attributes }],
            ports: vec![port::Port { export: export(), group: Some("far".into()), offline: false }],
        }),
        ..full()
    }
}

#[test]
fn reservations_and_port_groups_are_refused_by_who_does_not_know_them_and_cost_nobody_else_anything() {
    let state = kept_by_the_kernel();
    let bytes = state.to_bytes().unwrap();
    assert_eq!(State::from_bytes(&bytes).unwrap(), state);
    // What the version before this knows.
    let known =
        ["identity", "modes", "saved-mode-pages", "limits", "scrub", "counters"].map(|name| (name, 1));
    let of = |state: &State| format::Sections::parse(&state.to_bytes().unwrap()).unwrap();
    let refused = |name: &str| Err(format::FormatError::Unknown { name: name.into(), version: 1 });
    assert_eq!(of(&state).check_known(&known), refused("reservations"));
    assert_eq!(of(&State { reservations: None, ..state }).check_known(&known), refused("alua"));
    assert_eq!(of(&full()).check_known(&known), Ok(()));
}

#[test]
fn a_state_goes_from_old_to_new_to_old() {
    let old = full();
    // What a newer version writes: another section, another member.
    let mut sections = format::Sections::parse(&old.to_bytes().unwrap()).unwrap();
    sections.add("of-later", 7, false, &json!([1])).unwrap();
    let limits = sections.0.iter_mut().find(|s| s.name == "limits").unwrap();
    limits.content = br#"{"iops":500,"of_later":1}"#.to_vec();
    let new = State::from_bytes(&sections.to_bytes()).unwrap();
    assert_eq!(new.limits, Some(json!({ "iops": 500, "of_later": 1 })));
    assert_eq!(State { limits: old.limits.clone(), ..new }, old);
    // A section of a newer version that may be skipped is, and one that may not refuses all.
    let of = |name: &str, version: u16| {
        let mut sections = sections.clone();
        sections.0.iter_mut().find(|s| s.name == name).unwrap().version = version;
        State::from_bytes(&sections.to_bytes())
    };
    assert_eq!(of("scrub", 2).unwrap().scrub, None);
    for name in ["identity", "modes", "saved-mode-pages"] {
        let e = of(name, 2).unwrap_err();
        assert_eq!(e, format::FormatError::Unknown { name: name.into(), version: 2 });
    }
    // Bitmaps came after the first version too, and who does not know them is not kept from the rest.
    let bitmap = |name: &str, words: usize| state::DirtyBitmap {
        name: name.into(),
        granularity: 65536,
        recording: true,
        persistent: true,
        words: Some(vec![u64::MAX; words]),
    };
    let with = State { bitmaps: vec![bitmap("daily", 3)], ..full() };
    let bytes = with.to_bytes().unwrap();
    assert_eq!(State::from_bytes(&bytes).unwrap(), with);
    let mut known = format::Sections::parse(&bytes).unwrap();
    known.0.retain(|s| s.name != "bitmaps");
    assert_eq!(State::from_bytes(&known.to_bytes()).unwrap(), full());
    // Those that are too large for a state go without their bits.
    let many = State { bitmaps: vec![bitmap("large", 1 << 20), bitmap("daily", 3)], ..full() };
    let came = State::from_bytes(&many.to_bytes().unwrap()).unwrap().bitmaps;
    assert_eq!(came, [bitmap("daily", 3), state::DirtyBitmap { words: None, ..bitmap("large", 0) }]);
    sections.add("must-know", 1, true, &json!(null)).unwrap();
    assert!(matches!(State::from_bytes(&sections.to_bytes()), Err(format::FormatError::Unknown { .. })));
}

/// The bytes of the first version, which every later one reads.
const FIRST: &str = include_str!("first_version.hex");

#[test]
fn the_state_that_the_first_version_wrote_is_read_by_this_one() {
    let hex: Vec<u8> = FIRST.bytes().filter(u8::is_ascii_hexdigit).collect();
    let bytes: Vec<u8> = hex
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    assert_eq!(State::from_bytes(&bytes).unwrap(), full());
    assert_eq!(full().to_bytes().unwrap(), bytes, "what is written is still of the first version");
}
