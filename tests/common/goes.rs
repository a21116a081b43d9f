//! A LUN on a host that goes to another with its storage: both hosts with embedded kernels and directories of their own, and a guest that writes numbered blocks meanwhile.

use std::{
    cell::RefCell,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, mpsc::Sender},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tcmu_dif::{
    handover::{
        self, Destination, Failure, Given, Identity, NotGiven, Source, State, Thawed, WithStorage,
        storage::{Parcel, Piece},
        wire::Host as HostName,
    },
    image::{
        Format,
        create::{create_qcow2, create_raw},
        owner::{Claim, HostId, Left, OwnerState},
        qcow2::CreateOptions,
    },
    lun::{
        LunError, LunHandle, LunParams,
        away::{self, Far},
        chain,
        config::DeviceConfig,
        continued::{self, ContinuedFile},
        handed_over::HandedOver,
        jobs::{HandoverOrder, JobOrder},
        landing::{Landing, Plan, check_place},
        saved_pages, start_where,
        state_file::StateFile,
    },
    peer::kernel::{Data, Kernel, Options},
    pi::{
        Exposure, PiMode, PiType, Transfer,
        store::{NewSidecar, Stamp, default_path},
        tools,
    },
    ring::Device,
    sys::{self, backend_from_env},
    units::{BlockSize, Blocks},
};

use super::numbered::{Guest, Numbers, SIZE, fill};

const SERIAL: &str = "goes-with-its-storage";

/// A host: what it keeps, and the LUN, if it has it.
pub struct Host {
    pub dir: PathBuf,
    pub config: DeviceConfig,
    /// The handler's end of the device, for the next start.
    device: Option<Device>,
    /// Instances of the device that there were.
    instance: u64,
    pub lun: Option<LunHandle>,
}

impl Host {
    fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    fn continued(&self) -> ContinuedFile {
        ContinuedFile { path: self.dir.join("uio0.json"), device: self.instance }
    }

    /// Starts the LUN on the ring as it is.
    pub fn start(&mut self) -> Result<(), LunError> {
        let record = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(self.dir.join("uio0"))
            .unwrap();
        let params = LunParams {
            name: "vm1".into(),
            config: self.config.clone(),
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

    pub fn stop(&mut self) -> Result<(), LunError> {
        self.lun.take().map_or(Ok(()), LunHandle::stop)
    }
}

/// A host, and the kernel's side of its LUN.
pub struct Side {
    pub host: Arc<Mutex<Host>>,
    pub kernel: RefCell<Kernel>,
}

/// A new image, with protection if the configuration says so.
pub fn make(config: &DeviceConfig) {
    let config = config.clone();
    sys::run(async move |io| {
        let at = &config.image;
        let format = config.format.unwrap();
        match format {
            Format::Raw => create_raw(&io, at, SIZE).await.unwrap(),
            Format::Qcow2 => create_qcow2(&io, at, &CreateOptions::new(SIZE)).await.unwrap(),
        }
        let Some(kind) = config.pi else { return };
        let new = NewSidecar {
            block_size: BlockSize::B512,
            kind,
            // One of each.
            mode: if format == Format::Raw { PiMode::Bitmap } else { PiMode::Journal },
            capacity: Blocks(SIZE / 512),
            format: format.into(),
            stamp: Stamp::of(at).unwrap(),
        };
        tools::create(&io, at, &default_path(at), new).await.unwrap();
    });
}

pub fn config(dir: &Path, format: Format, pi: bool) -> DeviceConfig {
    DeviceConfig {
        format: Some(format),
        pi: pi.then_some(PiType::Type1),
        ..DeviceConfig::new(dir.join(format!("vm1.{format}")))
    }
}

/// Initiators have tuples of their own.
pub fn exposed(config: DeviceConfig) -> DeviceConfig {
    DeviceConfig { exposure: Exposure::Initiator, transfer: Transfer::Interleaved, ..config }
}

impl Side {
    pub fn new(dir: &Path, config: DeviceConfig) -> Side {
        let host = Host { dir: dir.to_owned(), config, device: None, instance: 0, lun: None };
        let kernel = Kernel::new(Options::default()).unwrap();
        let side = Side { host: Arc::new(Mutex::new(host)), kernel: RefCell::new(kernel) };
        side.new_device();
        side
    }

    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap()
    }

    /// The device is made anew, as for a LUN that comes.
    pub fn new_device(&self) {
        *self.kernel.borrow_mut() = Kernel::new(Options::default()).unwrap();
        self.host().instance += 1;
        self.offer_device();
    }

    /// The next start finds the ring as it is.
    pub fn offer_device(&self) {
        let device = self.kernel.borrow().device().unwrap();
        self.host().device = Some(device);
    }

    pub fn run(&self, cdb: &[u8], data: Data<'_>) -> (u8, Vec<u8>) {
        let done = self.kernel.borrow_mut().execute(cdb, data).unwrap();
        (done.status, done.data)
    }
}

/// What fails, on whose side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    State,
    Leave,
    /// Nothing; but the LUN is stopped when most of it has still to be copied.
    Early,
    /// The destination, as it is told of the LUN.
    Prepare,
    /// After so many pieces.
    Land(usize),
    Settle,
    /// The destination's LUN is there, and then cannot be exported.
    Export,
    /// The destination is done, and its answer is lost.
    Answer,
}

pub struct Giving<'a> {
    host: Arc<Mutex<Host>>,
    fault: Fault,
    /// Whether a LUN whose copy has caught up may be stopped.
    may_stop: &'a (dyn Fn() -> bool + Sync),
    far: Option<Arc<Far>>,
    left: Option<Left>,
    offered: Option<Identity>,
}

/// As this host, with a lease that tests can wait for.
pub fn claim() -> Claim {
    Claim { lease: Duration::from_millis(100), ..Claim::of_this_host().unwrap() }
}

impl Giving<'_> {
    pub fn new(side: &Side, fault: Fault) -> Giving<'static> {
        Giving::of(side.host.clone(), fault)
    }

    pub fn of(host: Arc<Mutex<Host>>, fault: Fault) -> Giving<'static> {
        Giving { host, fault, may_stop: &|| true, far: None, left: None, offered: None }
    }

    /// One who asks that, once the copy has caught up.
    pub fn asking<'a>(self, may_stop: &'a (dyn Fn() -> bool + Sync)) -> Giving<'a> {
        Giving { may_stop, ..self }
    }

    fn failed(e: impl std::error::Error + 'static) -> Failure {
        Failure::new(chain(&e))
    }
}

impl Source for Giving<'_> {
    fn identity(&mut self) -> Result<Identity, Failure> {
        let host = self.host.lock().unwrap();
        let stats = host.lun.as_ref().unwrap().stats().unwrap();
        let offered = Identity {
            name: "vm1".into(),
            serial: SERIAL.into(),
            config: host.config.to_string(),
            format: stats.format,
            block_size: 512,
            capacity: stats.capacity_bytes,
            write_cache: true,
            exports: Vec::new(),
            generation: None,
        };
        self.offered = Some(offered.clone());
        Ok(offered)
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        let far = self.far.as_ref().unwrap();
        far.call_the_last();
        self.host.lock().unwrap().stop().map_err(Giving::failed)?;
        far.whole().map_err(Failure::new)
    }

    fn state(&mut self) -> Result<State, Failure> {
        if self.fault == Fault::State {
            return Err(Failure::new("injected"));
        }
        let host = self.host.lock().unwrap();
        let kept = ContinuedFile::load_any(&host.continued().path).unwrap();
        let saved = StateFile::new(&host.state_dir(), saved_pages::FOLDER, SERIAL);
        Ok(State {
            modes: kept.map(continued::to_modes),
            saved_pages: saved.load::<Value>().unwrap(),
            bitmaps: self.far.as_ref().unwrap().bitmaps(),
            ..State::new(self.offered.clone().unwrap())
        })
    }

    fn thaw(&mut self) -> Result<Thawed, Failure> {
        let mut host = self.host.lock().unwrap();
        if host.lun.is_some() {
            return Ok(Thawed::Serves);
        }
        match host.start() {
            Ok(()) => Ok(Thawed::Serves),
            Err(LunError::Image(e)) if chain(&e).contains("has it (generation") => Ok(Thawed::Taken),
            Err(e) => Err(Giving::failed(e)),
        }
    }

    fn finish(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

impl WithStorage for Giving<'_> {
    fn image(&self) -> String {
        self.host.lock().unwrap().config.image.display().to_string()
    }

    fn copy(&mut self, to: Sender<Parcel>) -> Result<(), Failure> {
        let remote = self.host.lock().unwrap().lun.as_ref().unwrap().remote().clone();
        let far = Far::new(to, "unix:/there".into());
        if self.fault == Fault::Early {
            let (id, told) = ("handover@vm1".to_owned(), |e: LunError| Failure::new(chain(&e)));
            remote
                .job(JobOrder::Handover(HandoverOrder { id: id.clone(), far: far.clone() }))
                .map_err(told)?;
            remote.job(JobOrder::SetSpeed(id, 8 << 20)).map_err(told)?;
            thread::sleep(Duration::from_millis(300));
            let jobs = remote.job(JobOrder::Query).map_err(told)?;
            assert!(jobs.iter().all(|job| job.len - job.offset > SIZE / 4), "it is nearly done: {jobs:?}");
        } else {
            away::copy(&remote, "handover@vm1", far.clone(), self.may_stop)?;
        }
        self.far = Some(far);
        Ok(())
    }

    fn leave(&mut self, to: &HostName) -> Result<(), Failure> {
        if self.fault == Fault::Leave {
            return Err(Failure::new("injected"));
        }
        let host = HostId { id: to.id, name: "the-other".into() };
        let image = self.host.lock().unwrap().config.image.clone();
        self.left = Some(Left::leave(&image, &claim(), &host).map_err(Giving::failed)?);
        Ok(())
    }

    fn stay(&mut self) -> Result<(), Failure> {
        self.left.take().map_or(Ok(()), |left| left.take_back(&claim())).map_err(Giving::failed)
    }
}

pub struct Taking {
    host: Arc<Mutex<Host>>,
    pub fault: Fault,
    plan: Option<Plan>,
    landing: Option<Landing>,
    pieces: usize,
    /// Once its LUN serves it says so in that file, and nothing more.
    pub hang: Option<PathBuf>,
}

impl Taking {
    pub fn new(side: &Side, fault: Fault) -> Taking {
        Taking::of(side.host.clone(), fault)
    }

    pub fn of(host: Arc<Mutex<Host>>, fault: Fault) -> Taking {
        Taking { host, fault, plan: None, landing: None, pieces: 0, hang: None }
    }

    fn injected(&self, at: Fault) -> Result<(), Failure> {
        if self.fault == at { Err(Failure::new("injected there")) } else { Ok(()) }
    }
}

impl Destination for Taking {
    fn prepare(&mut self, _: &Identity) -> Result<(), Failure> {
        unreachable!("its storage comes along")
    }

    fn prepare_storage(&mut self, of: &Identity) -> Result<(), Failure> {
        self.injected(Fault::Prepare)?;
        let config = self.host.lock().unwrap().config.clone();
        check_place(&config.image)?;
        self.plan = Some(Plan { config, block_size: BlockSize::B512, capacity: of.capacity });
        Ok(())
    }

    fn land(&mut self, piece: Piece) -> Result<(), Failure> {
        self.injected(Fault::Land(self.pieces))?;
        self.pieces += 1;
        match (&mut self.landing, piece) {
            (None, Piece::Begin(kept)) => {
                let plan = self.plan.clone().unwrap();
                self.landing = Some(Landing::begin(plan, kept, Some(backend_from_env()))?);
                Ok(())
            }
            (landing, piece) => landing.as_mut().unwrap().land(piece),
        }
    }

    fn settle(&mut self) -> Result<HostName, Failure> {
        self.injected(Fault::Settle)?;
        self.landing.as_mut().unwrap().settle()?;
        let HostId { id, name } = HostId::this().unwrap();
        Ok(HostName { id, name })
    }

    fn build(&mut self, state: &State) -> Result<Value, Failure> {
        self.landing.as_mut().unwrap().name()?;
        let mut host = self.host.lock().unwrap();
        let begin = HandedOver {
            generation: None,
            modes: state.modes.clone(),
            counters: None,
            bitmaps: state.bitmaps.clone(),
        };
        let file = HandedOver::file(&host.state_dir(), SERIAL);
        file.save(&begin, true).unwrap();
        if let Some(saved) = &state.saved_pages {
            StateFile::new(&host.state_dir(), saved_pages::FOLDER, SERIAL).save(saved, true).unwrap();
        }
        if let Err(e) = host.start() {
            file.remove().unwrap();
            return Err(Failure::new(chain(&e)));
        }
        if self.fault == Fault::Export {
            host.stop().unwrap();
            return Err(Failure::new("injected there"));
        }
        self.landing.take().unwrap().keep();
        if let Some(path) = &self.hang {
            std::fs::write(path, "").unwrap();
            thread::sleep(Duration::from_secs(600));
        }
        Ok(json!({}))
    }

    fn clear(&mut self) {
        self.landing = None;
    }
}

/// A connection that ends after so many bytes were sent.
pub struct Cut<C>(pub C, pub usize);

impl<C: Read> Read for Cut<C> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(to)
    }
}

impl Write for Cut<UnixStream> {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        if self.1 == 0 {
            self.0.shutdown(std::net::Shutdown::Both)?;
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        let n = self.0.write(&from[..from.len().min(self.1)])?;
        self.1 -= n;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub type Done = (Result<Given, NotGiven>, Result<(), Failure>);

/// Hands the LUN over by a connection that is there, and does that meanwhile, over and over.
pub fn hand_over_beside<C: Read + Write + Send + 'static>(
    from: &Side,
    to: &Side,
    fault: Fault,
    (mut here, mut there): (C, C),
    mut beside: impl FnMut(),
) -> Done {
    from.offer_device();
    to.new_device();
    let (giving, host) = (Giving::new(from, fault), to.host.clone());
    let taking = thread::spawn(move || {
        let mut taking = Taking::of(host, fault);
        match fault {
            Fault::Answer => handover::take(&mut Silent(there), &mut taking).map(drop),
            _ => handover::take(&mut there, &mut taking).map(drop),
        }
    });
    let giving = thread::spawn(move || {
        let mut giving = giving;
        handover::give_with_storage(&mut here, &mut giving)
    });
    while !giving.is_finished() {
        beside();
        thread::sleep(Duration::from_micros(300));
    }
    (giving.join().unwrap(), taking.join().unwrap())
}

/// The same while a guest writes. If the LUN stays, all its commands are answered.
pub fn hand_over_by<C: Read + Write + Send + 'static>(
    from: &Side,
    to: &Side,
    fault: Fault,
    ends: (C, C),
    numbers: &mut Numbers,
) -> Done {
    let mut guest = Guest::of(from, numbers);
    let done = hand_over_beside(from, to, fault, ends, || guest.turn());
    if matches!(&done.0, Err(e) if e.down.is_none()) {
        guest.drain();
    }
    done
}

/// A destination's connection whose last message never comes.
struct Silent<C>(C);

impl<C: Read> Read for Silent<C> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(to)
    }
}

impl<C: Write> Write for Silent<C> {
    fn write(&mut self, from: &[u8]) -> std::io::Result<usize> {
        // The kind of [`handover::wire::Message::Done`].
        match from.first() {
            Some(4) => Err(std::io::ErrorKind::BrokenPipe.into()),
            _ => self.0.write(from),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// Has the next copy go at so many bytes a second.
pub fn slowly(side: &Side, speed: u64) {
    let lun = side.host().lun.as_ref().unwrap().remote().clone();
    thread::spawn(move || {
        let end = std::time::Instant::now() + Duration::from_secs(30);
        while lun.job(JobOrder::SetSpeed("handover@vm1".into(), speed)).is_err() {
            assert!(std::time::Instant::now() < end, "there is no copy");
            thread::sleep(Duration::from_millis(1));
        }
    });
}

pub fn hand_over(from: &Side, to: &Side, fault: Fault, numbers: &mut Numbers) -> Done {
    hand_over_by(from, to, fault, UnixStream::pair().unwrap(), numbers)
}

/// Both hosts, and the LUN on the first, every place of which is written.
pub fn pair(dir: &Path, from: DeviceConfig, to: DeviceConfig) -> (Side, Side, Numbers) {
    let of = |name: &str| {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    };
    make(&from);
    let (a, b) = (Side::new(&of("a.host"), from), Side::new(&of("b.host"), to));
    a.host().start().unwrap();
    assert_eq!(a.run(&[0; 6], Data::None).0, 2, "a power on");
    let numbers = fill(&a);
    (a, b, numbers)
}

/// Files beside the image, by their names.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Whether the image that stayed is refused, by the name of the host that has the LUN.
pub fn is_left(side: &Side) -> bool {
    let image = side.host().config.image.clone();
    let record = tcmu_dif::image::owner::read(&image).unwrap();
    record.is_some_and(|r| r.state == OwnerState::Held && r.host.name == "the-other")
}
