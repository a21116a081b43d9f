//! Whole LUNs on embedded kernels that go from one host to another on a directory that both have: data, protection, identity, mode pages and unit
//! attentions go along, whatever fails one of the two serves, and a host that has lost its image touches it no more.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    io::{Read, Write},
    net::TcpListener,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tcmu_dif::{
    admin::way::{Address, Certificates, Connection},
    handover::{self, Destination, Failure, Identity, Source, State, Thawed},
    image::{
        create::create_raw,
        owner::{self, Claim, HostId, OwnerState},
    },
    lun::{
        LunError, LunHandle, LunParams, bitmaps,
        config::DeviceConfig,
        continued::{self, ContinuedFile},
        handed_over::HandedOver,
        jobs::{BitmapOrder, JobOrder},
        saved_pages, start_where,
        state_file::StateFile,
    },
    peer::kernel::{Data, Kernel, Options},
    pi::{
        PiMode, PiType,
        store::{ImageFormat, NewSidecar, Stamp, default_path},
        tools,
    },
    ring::Device,
    sys::{self, backend_from_env},
    units::{BlockSize, Blocks},
};

#[path = "common/certificates.rs"]
#[allow(dead_code)] // Others use more of it.
mod certificates;

const SIZE: u64 = 4 << 20;
const SERIAL: &str = "one-serial-for-both";

/// A host: what it keeps, and the LUN, if it has it.
struct Host {
    dir: tempfile::TempDir,
    image: PathBuf,
    /// The handler's end of the device, for the next start.
    device: Option<Device>,
    /// Instances of the device that there were.
    instance: u64,
    lun: Option<LunHandle>,
}

type Shared = Arc<Mutex<Host>>;

impl Host {
    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn continued(&self) -> ContinuedFile {
        ContinuedFile { path: self.dir.path().join("uio0.json"), device: self.instance }
    }

    /// Starts the LUN on the ring as it is.
    fn start(&mut self) -> Result<(), LunError> {
        let record = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.dir.path().join("uio0"))
            .unwrap();
        let params = LunParams {
            name: "vm1".into(),
            config: DeviceConfig { pi: Some(PiType::Type1), ..DeviceConfig::new(&self.image) },
            block_size: BlockSize::B512,
            capacity: SIZE,
            write_cache: true,
            serial: Some(SERIAL.into()),
            state_dir: Some(self.state_dir()),
            neighbourhood: Default::default(),
            backend: Some(backend_from_env()),
            polling: false,
            device: self.device.take().unwrap().with_record(record, self.instance),
        };
        self.lun = Some(start_where(params, Some(self.continued()))?);
        Ok(())
    }

    fn stop(&mut self) -> Result<(), LunError> {
        self.lun.take().map_or(Ok(()), LunHandle::stop)
    }
}

/// A host, and the kernel's side of its LUN.
struct Side {
    host: Shared,
    kernel: Kernel,
}

impl Side {
    fn new(image: &Path) -> Side {
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
            image: image.to_owned(),
            device: None,
            instance: 0,
            lun: None,
        };
        let kernel = Kernel::new(Options::default()).unwrap();
        let mut side = Side { host: Arc::new(Mutex::new(host)), kernel };
        side.new_device();
        side
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap()
    }

    /// The device is made anew, as for a LUN that comes.
    fn new_device(&mut self) {
        self.kernel = Kernel::new(Options::default()).unwrap();
        self.host().instance += 1;
        self.offer_device();
    }

    /// The next start finds the ring as it is.
    fn offer_device(&mut self) {
        let device = self.kernel.device().unwrap();
        self.host().device = Some(device);
    }

    fn status(&mut self, cdb: &[u8]) -> u8 {
        self.kernel.execute(cdb, Data::None).unwrap().status
    }

    fn read(&mut self, cdb: &[u8], len: usize) -> Vec<u8> {
        let done = self.kernel.execute(cdb, Data::In(len)).unwrap();
        assert_eq!(done.status, 0, "{cdb:?}: {done:?}");
        done.data
    }

    fn write(&mut self, lba: u8, byte: u8) -> u8 {
        self.kernel.execute(&[0x2a, 0, 0, 0, 0, lba, 0, 0, 8, 0], Data::Out(&[byte; 4096])).unwrap().status
    }

    fn blocks(&mut self, lba: u8) -> Vec<u8> {
        self.read(&[0x28, 0, 0, 0, 0, lba, 0, 0, 8, 0], 4096)
    }

    /// The designators of the device identification page.
    fn names(&mut self) -> Vec<u8> {
        self.read(&[0x12, 1, 0x83, 1, 0, 0], 256)
    }

    /// The control mode page: current values.
    fn control_page(&mut self) -> Vec<u8> {
        self.read(&[0x1a, 8, 0x0a, 0, 64, 0], 64)
    }
}

fn shared_image(dir: &Path) -> PathBuf {
    let image = dir.join("vm1.raw");
    let at = image.clone();
    sys::run(async move |io| {
        create_raw(&io, &at, SIZE).await.unwrap();
        let new = NewSidecar {
            block_size: BlockSize::B512,
            kind: PiType::Type1,
            mode: PiMode::Bitmap,
            capacity: Blocks(SIZE / 512),
            format: ImageFormat::Raw,
            stamp: Stamp::of(&at).unwrap(),
        };
        tools::create(&io, &at, &default_path(&at), new).await.unwrap();
    });
    owner::share(&image, &Claim::of_this_host().unwrap()).unwrap();
    image
}

/// What fails, on whose side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Identity,
    Prepare,
    State,
    /// The destination's LUN does not start: its image is not there.
    Image,
    /// The destination's LUN was made, and then could not be exported.
    Export,
    /// The state is of another generation.
    Generation,
    /// The destination is done, and its answer is lost.
    Answer,
}

struct Giving {
    host: Shared,
    fault: Fault,
    offered: Option<Identity>,
}

impl Source for Giving {
    fn identity(&mut self) -> Result<Identity, Failure> {
        if self.fault == Fault::Identity {
            return Err(Failure::new("injected"));
        }
        let host = self.host.lock().unwrap();
        let stats = host.lun.as_ref().unwrap().stats().unwrap();
        let offered = Identity {
            name: "vm1".into(),
            serial: SERIAL.into(),
            config: DeviceConfig::new(&host.image).to_string(),
            format: stats.format,
            block_size: 512,
            capacity: stats.capacity_bytes,
            write_cache: true,
            exports: Vec::new(),
            generation: owner::read(&host.image).unwrap().map(|o| o.generation),
        };
        self.offered = Some(offered.clone());
        Ok(offered)
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        self.host.lock().unwrap().stop().map_err(|e| Failure::new(e.to_string()))
    }

    fn state(&mut self) -> Result<State, Failure> {
        if self.fault == Fault::State {
            return Err(Failure::new("injected"));
        }
        let host = self.host.lock().unwrap();
        let record = owner::read(&host.image).unwrap().unwrap();
        assert_eq!(record.state, OwnerState::Released);
        let generation = record.generation - u64::from(self.fault == Fault::Generation);
        let kept = ContinuedFile::load_any(&host.continued().path).unwrap();
        let saved = StateFile::new(&host.state_dir(), saved_pages::FOLDER, SERIAL);
        Ok(State {
            modes: kept.map(continued::to_modes),
            saved_pages: saved.load::<Value>().unwrap(),
            counters: Some(json!({
                "verified": 1000, "generated": 0, "guard_errors": 7, "app_errors": 0, "ref_errors": 0, "unprotected": 0,
                "recomputed": 0, "torn": 0,
            })),
            bitmaps: bitmaps::left(&StateFile::new(&host.state_dir(), bitmaps::FOLDER, SERIAL)).unwrap(),
            ..State::new(Identity { generation: Some(generation), ..self.offered.clone().unwrap() })
        })
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        match self.host.lock().unwrap().start() {
            Ok(()) => Ok(Thawed::Serves),
            // Both are of one host here, so QEMU's lock is what tells.
            Err(LunError::Image(_)) if self.fault == Fault::Answer => Ok(Thawed::Taken),
            Err(e) => Err(Failure::new(tcmu_dif::lun::chain(&e))),
        }
    }

    fn finish(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

struct Taking {
    host: Shared,
    fault: Fault,
}

impl Destination for Taking {
    fn prepare(&mut self, _: &Identity) -> Result<(), Failure> {
        if self.fault == Fault::Prepare { Err(Failure::new("injected")) } else { Ok(()) }
    }

    fn build(&mut self, state: &State) -> Result<Value, Failure> {
        let mut host = self.host.lock().unwrap();
        let begin = HandedOver {
            generation: state.identity.generation,
            modes: state.modes.clone(),
            counters: serde_json::from_value(state.counters.clone().unwrap()).unwrap(),
            bitmaps: state.bitmaps.clone(),
        };
        let file = HandedOver::file(&host.state_dir(), SERIAL);
        file.save(&begin, true).unwrap();
        if let Some(saved) = &state.saved_pages {
            StateFile::new(&host.state_dir(), saved_pages::FOLDER, SERIAL).save(saved, true).unwrap();
        }
        let image = host.image.clone();
        if self.fault == Fault::Image {
            host.image = image.with_extension("none");
        }
        let started = host.start();
        host.image = image;
        if let Err(e) = started {
            file.remove().unwrap();
            return Err(Failure::new(tcmu_dif::lun::chain(&e)));
        }
        assert!(!file.path().exists(), "what it began with is of no use any more");
        if self.fault == Fault::Export {
            host.stop().unwrap();
            return Err(Failure::new("injected"));
        }
        Ok(json!({}))
    }
}

/// Hands the LUN over; whether it went.
fn hand_over(from: &mut Side, to: &mut Side, fault: Fault) -> bool {
    let (here, there) = UnixStream::pair().unwrap();
    hand_over_by(from, to, fault, here, there)
}

/// The same by a connection that is there.
fn hand_over_by<C: Read + Write + Send + 'static>(
    from: &mut Side,
    to: &mut Side,
    fault: Fault,
    mut here: C,
    mut there: C,
) -> bool {
    from.offer_device();
    to.new_device();
    let mut taking = Taking { host: to.host.clone(), fault };
    let other = thread::spawn(move || {
        if fault != Fault::Answer {
            return handover::take(&mut there, &mut taking).is_ok();
        }
        // By hand, so that the answer is not sent.
        let handover::wire::Message::Offer(offer) = handover::wire::receive(&mut there).unwrap() else {
            panic!()
        };
        taking.prepare(&offer.identity).unwrap();
        handover::wire::send(&mut there, &handover::wire::Message::Ready).unwrap();
        let handover::wire::Message::State(bytes) = handover::wire::receive(&mut there).unwrap() else {
            panic!()
        };
        taking.build(&State::from_bytes(&bytes).unwrap()).is_ok()
    });
    let given = handover::give(&mut here, &mut Giving { host: from.host.clone(), fault, offered: None });
    // As the source's process lets go of it.
    drop(here);
    let taken = other.join().unwrap();
    assert_eq!(given.is_ok(), taken, "{given:?}");
    if let Err(e) = &given {
        assert_eq!(e.down, None, "{e}");
    }
    taken
}

fn pair() -> (tempfile::TempDir, Side, Side) {
    let dir = tempfile::tempdir().unwrap();
    let image = shared_image(dir.path());
    let (a, b) = (Side::new(&image), Side::new(&image));
    a.host().start().unwrap();
    (dir, a, b)
}

#[test]
fn data_identity_mode_pages_and_unit_attentions_go_along_there_and_back() {
    let (_dir, mut a, mut b) = pair();
    assert_eq!(a.status(&[0; 6]), 2, "a power on");
    assert_eq!(a.write(0, 0x11), 0);
    // The control page with D_SENSE, current values and not saved.
    let mut list = a.control_page();
    list[0] = 0;
    list[2] = 0;
    list[6] |= 4;
    list.truncate(16);
    let select = a.kernel.execute(&[0x15, 0x10, 0, 0, 16, 0], Data::Out(&list)).unwrap();
    assert_eq!(select.status, 0, "{select:?}");
    let (names, page) = (a.names(), a.control_page());
    let daily = BitmapOrder::Add {
        name: "daily".into(),
        granularity: bitmaps::GRANULARITY,
        persistent: false,
        enabled: true,
    };
    let of = |side: &Side| side.host().lun.as_ref().unwrap().stats().unwrap().bitmaps;
    a.host().lun.as_ref().unwrap().remote().job(JobOrder::Bitmap(daily)).unwrap();
    assert_eq!(a.write(200, 0x11), 0);
    // A unit attention that nobody hears of here.
    a.host().lun.as_ref().unwrap().resize(2 * SIZE).unwrap();
    assert!(hand_over(&mut a, &mut b, Fault::None));
    assert_eq!(b.status(&[0; 6]), 2, "the attention that was pending there");
    assert_eq!(b.status(&[0; 6]), 0, "and no power on");
    assert_eq!(b.names(), names);
    assert_eq!(b.control_page(), page);
    assert_eq!(b.blocks(0), [0x11; 4096]);
    assert_eq!((of(&b).len(), of(&b)[0].count, of(&b)[0].inconsistent), (1, bitmaps::GRANULARITY, false));
    assert_eq!(b.write(8, 0x22), 0);
    assert_eq!(of(&b)[0].count, 2 * bitmaps::GRANULARITY, "the dirty bitmap that no image keeps came along");
    let counted = b.host().lun.as_ref().unwrap().stats().unwrap().pi.unwrap();
    assert_eq!(counted.guard_errors, 7, "counted where it was before");
    assert!(counted.verified >= 1000);
    // And back.
    assert!(hand_over(&mut b, &mut a, Fault::None));
    assert_eq!(a.status(&[0; 6]), 0);
    assert_eq!((a.blocks(0), a.blocks(8)), (vec![0x11; 4096], vec![0x22; 4096]));
    assert_eq!(a.control_page(), page);
    assert_eq!((of(&a).len(), of(&a)[0].count), (1, 2 * bitmaps::GRANULARITY));
    let record = owner::read(&a.host().image).unwrap().unwrap();
    assert_eq!(record.generation, 6, "taken three times, given back twice, and one from the beginning");
    a.host().stop().unwrap();
}

#[test]
fn whatever_fails_the_lun_serves_where_it_was_and_the_next_try_succeeds() {
    use Fault::{Export, Generation, Identity, Image, Prepare, State};
    for fault in [Identity, Prepare, State, Image, Export, Generation] {
        let (_dir, mut a, mut b) = pair();
        a.status(&[0; 6]);
        for round in 0..4 {
            assert_eq!(a.write(8 * round, 0x30 + round), 0);
            assert!(!hand_over(&mut a, &mut b, fault), "{fault:?}");
            assert_eq!(a.status(&[0; 6]), 0, "{fault:?}: initiators have noticed nothing");
            assert_eq!(a.blocks(8 * round), [0x30 + round; 4096], "{fault:?}");
            assert!(b.host().lun.is_none());
        }
        assert!(hand_over(&mut a, &mut b, Fault::None), "{fault:?}");
        assert_eq!(b.blocks(24), [0x33; 4096]);
        b.host().stop().unwrap();
    }
}

#[test]
fn a_lun_whose_answer_was_lost_has_gone_over_and_is_not_served_twice() {
    let (_dir, mut a, mut b) = pair();
    a.status(&[0; 6]);
    assert!(hand_over(&mut a, &mut b, Fault::Answer));
    assert!(a.host().lun.is_none());
    assert_eq!(b.write(0, 5), 0, "nobody is told of a power on");
    b.host().stop().unwrap();
}

#[test]
fn a_lun_whose_image_another_host_has_taken_fails_and_writes_nothing_more() {
    let (_dir, mut a, _) = pair();
    a.status(&[0; 6]);
    assert_eq!(a.write(0, 1), 0);
    let other =
        Claim { host: HostId { id: [9; 16], name: "other".into() }, lease: Duration::from_millis(200) };
    let image = a.host().image.clone();
    let alive = owner::take_over(&image, &other, false).unwrap_err();
    assert!(alive.to_string().contains("uses it at this moment"), "{alive}");
    let free = owner::take_over(&image, &other, true).unwrap();
    let files = || (std::fs::read(&image).unwrap(), std::fs::read(default_path(&image)).unwrap());
    let before = files();
    let end = Instant::now() + Duration::from_secs(20);
    while !a.host().lun.as_ref().unwrap().is_finished() {
        assert!(Instant::now() < end, "it goes on");
        thread::sleep(Duration::from_millis(20));
    }
    let e = a.host().stop().unwrap_err().to_string();
    assert!(e.contains("another owner has taken the image over"), "{e}");
    assert_eq!(owner::read(&image).unwrap().unwrap(), free);
    assert!(before == files());
    // It is the other's: it does not start here.
    drop(owner::Holding::take(&image, &other, None).unwrap());
    a.offer_device();
    let e = a.host().start().unwrap_err();
    assert!(e.next_step().unwrap().contains("image owner --take-over"), "{:?}", e.next_step());
}

#[test]
fn over_tls_a_lun_goes_with_what_it_has_and_who_has_no_certificate_takes_nothing() {
    let (dir, mut a, mut b) = pair();
    assert_eq!(a.status(&[0; 6]), 2, "a power on");
    assert_eq!(a.write(0, 0x11), 0);
    let names = a.names();
    let pki = certificates::Ca::new("handovers").directory(&dir.path().join("pki"));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address: Address = format!("tls://127.0.0.1:{port}").parse().unwrap();
    let with = |dir: &Path| Certificates { dir: dir.to_owned(), hostname: None };
    let listener = Arc::new(address.listen(Some(&with(&pki))).unwrap());
    let connected = || -> (Connection, Connection) {
        let listening = listener.clone();
        let there = thread::spawn(move || listening.accept().unwrap());
        // A stranger first, whom nobody hears.
        let others = certificates::Ca::new("others").directory(&dir.path().join("others"));
        address.connect(Some(&with(&others))).map(drop).unwrap_err();
        (address.connect(Some(&with(&pki))).unwrap(), there.join().unwrap())
    };
    // It fails once there, and the source serves on.
    let (here, there) = connected();
    assert!(!hand_over_by(&mut a, &mut b, Fault::Prepare, here, there));
    assert_eq!(a.blocks(0), [0x11; 4096]);
    let (here, there) = connected();
    assert!(hand_over_by(&mut a, &mut b, Fault::None, here, there));
    assert_eq!((b.status(&[0; 6]), b.blocks(0), b.names()), (0, vec![0x11; 4096], names));
    b.host().stop().unwrap();
}
