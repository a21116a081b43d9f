//! A LUN of the demo: its thread, the embedded kernel in front of it, and the image file behind its back.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use super::{DemoError, Result};
use crate::{
    image::{Format, create, qcow2},
    lun::{self, LunHandle, LunParams, config::DeviceConfig},
    peer::kernel::{Data, Ended, Kernel, Options},
    pi::{
        PiMode, PiType,
        protected::sidecar_path,
        store::{NewSidecar, Sidecar, Stamp, create_file},
    },
    sys::{self, io::Backend},
    units::BlockSize,
};

/// How long a command may take: a flush on a disk that has much else to do takes tens of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Sense key, ASC, ASCQ, and the LBA if the sense data have one.
pub(super) type SenseOf = (u8, u8, u8, Option<u64>);

pub(super) struct Disk {
    pub(super) kernel: Kernel,
    lun: LunHandle,
    file: File,
}

fn stack<E: std::error::Error + Send + Sync + 'static>(what: &'static str) -> impl FnOnce(E) -> DemoError {
    move |e| DemoError::Stack { what, source: Box::new(e) }
}

fn file(what: &'static str) -> impl FnOnce(std::io::Error) -> DemoError {
    move |source| DemoError::Io { what, source }
}

impl Disk {
    /// A new image, with a sidecar if it is to be protected.
    pub(super) fn create(image: &Path, format: Format, capacity: u64, protected: bool) -> Result<()> {
        let path = image.to_owned();
        sys::run(async move |io| {
            match format {
                Format::Raw => create::create_raw(&io, &path, capacity).await,
                Format::Qcow2 => create::create_qcow2(&io, &path, &qcow2::CreateOptions::new(capacity)).await,
            }
            .map_err(stack("the image cannot be made"))?;
            if !protected {
                return Ok(());
            }
            let sidecar = sidecar_path(&path, None);
            let storage = create_file(&io, &sidecar).await.map_err(file("the sidecar cannot be made"))?;
            let new = NewSidecar {
                block_size: BlockSize::B512,
                kind: PiType::Type1,
                mode: PiMode::Bitmap,
                capacity: BlockSize::B512.blocks_in(capacity),
                format: format.into(),
                stamp: Stamp::of(&path).map_err(file("the image cannot be looked at"))?,
            };
            Sidecar::create(storage, new).await.map(drop).map_err(stack("the sidecar cannot be made"))
        })
    }

    /// Starts the LUN's thread on the image, with an empty ring.
    pub(super) fn start(image: &Path, capacity: u64, block_size: BlockSize, protected: bool) -> Result<Disk> {
        let options = Options { cmdr_size: 256 << 10, ..Options::default() };
        let kernel = Kernel::new(options).map_err(file("no memory for the ring"))?;
        let params = LunParams {
            name: "demo".into(),
            config: DeviceConfig { pi: protected.then_some(PiType::Type1), ..DeviceConfig::new(image) },
            block_size,
            capacity,
            write_cache: true,
            serial: Some("demo0001".into()),
            neighbourhood: Default::default(),
            state_dir: None,
            // io_uring if it may, as the daemon, unless threads are asked for.
            backend: Some(sys::backend_from_env()).filter(|b| *b == Backend::Threads),
            polling: true,
            device: kernel.device().map_err(file("no descriptors for the ring"))?,
        };
        let lun = lun::start(params).map_err(stack("the LUN does not start"))?;
        let open = OpenOptions::new().read(true).write(true).open(image);
        Ok(Disk {
            kernel,
            lun,
            file: open.map_err(file("the image cannot be opened behind the LUN's back"))?,
        })
    }

    /// The way to the kernel.
    pub(super) fn backend(&self) -> String {
        self.lun.stats().map_or_else(|e| e.to_string(), |s| s.io)
    }

    pub(super) fn stop(self) -> Result<()> {
        self.lun.stop().map_err(stack("the LUN does not stop cleanly"))
    }

    /// One command and its end.
    pub(super) fn run(&mut self, cdb: &[u8], data: Data<'_>) -> Result<Ended> {
        self.kernel.execute(cdb, data).map_err(stack("the ring failed"))
    }

    /// TEST UNIT READY: none if GOOD, else the sense.
    pub(super) fn ready(&mut self) -> Result<Option<(u8, u8, u8)>> {
        let ended = self.run(&[0; 6], Data::None)?;
        Ok((ended.status != 0).then(|| ended.key_asc_ascq()))
    }

    /// READ(16).
    pub(super) fn read(&mut self, lba: u64, blocks: usize) -> Result<std::result::Result<Vec<u8>, SenseOf>> {
        let ended = self.run(&cdb16(0x88, lba, blocks), Data::In(blocks * 512))?;
        Ok(if ended.status == 0 { Ok(ended.data) } else { Err(sense(&ended)) })
    }

    /// WRITE(16); it must be GOOD.
    pub(super) fn write(&mut self, lba: u64, data: &[u8]) -> Result<()> {
        let ended = self.run(&cdb16(0x8a, lba, data.len() / 512), Data::Out(data))?;
        if ended.status == 0 {
            return Ok(());
        }
        Err(DemoError::Unexpected {
            step: format!("writing block {lba}"),
            expected: "GOOD".into(),
            found: format!("sense {:x?}", sense(&ended)),
        })
    }

    /// Where in the image file these bytes lie.
    pub(super) fn find(&self, bytes: &[u8]) -> Result<u64> {
        let mut whole = Vec::new();
        let len = self.file.metadata().map_err(file("the image cannot be looked at"))?.len();
        whole.resize(len as usize, 0);
        self.file.read_exact_at(&mut whole, 0).map_err(file("the image cannot be read"))?;
        let found = whole.chunks(512).position(|chunk| chunk == bytes);
        found.map(|i| i as u64 * 512).ok_or_else(|| DemoError::Unexpected {
            step: "looking for a block in the image file".into(),
            expected: "its bytes".into(),
            found: "none of them".into(),
        })
    }

    /// Changes one byte of the image file behind the LUN's back.
    pub(super) fn poke(&self, at: u64, change: impl FnOnce(u8) -> u8) -> Result<()> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).map_err(file("the image cannot be read"))?;
        self.put(at, &[change(byte[0])])
    }

    /// Writes to the image file behind the LUN's back.
    pub(super) fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(file("the image cannot be written"))
    }

    /// The ends of at least one command.
    pub(super) fn wait(&mut self) -> Result<Vec<Ended>> {
        self.kernel.wait(PATIENCE).map_err(stack("the ring failed"))
    }
}

/// A 16-byte CDB with an LBA and a transfer length.
pub(super) fn cdb16(opcode: u8, lba: u64, blocks: usize) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
    cdb
}

/// What fixed sense data say: the LBA stands in INFORMATION (bytes 3 to 6) if VALID is set.
fn sense(ended: &Ended) -> SenseOf {
    let (key, asc, ascq) = ended.key_asc_ascq();
    let s = &ended.sense;
    let lba = (s[0] & 0x80 != 0).then(|| u64::from(u32::from_be_bytes([s[3], s[4], s[5], s[6]])));
    (key, asc, ascq, lba)
}
