//! A whole LUN over an NBD export: commands from the embedded kernel, protection in a sidecar on this host, and a server that goes and comes
//! back meanwhile.

use std::time::{Duration, Instant};

use tcmu_dif::{
    lun::{LunHandle, LunParams, config::DeviceConfig, start},
    peer::kernel::{Data, Kernel, Options},
    pi::{
        PiMode, PiType,
        tools::{self, RebuildOptions},
    },
    sys::{self, backend_from_env},
    units::BlockSize,
};

use crate::{
    servers::{Server, file, nbdkit, try_attach},
    support::Rng,
};

const SIZE: u64 = 4 << 20;

struct Rig {
    kernel: Kernel,
    lun: LunHandle,
}

fn rig(config: DeviceConfig) -> Rig {
    let options = Options { cmdr_size: 128 << 10, data_size: 32 << 20, cut: Some(7), ..Options::default() };
    let mut kernel = Kernel::new(options).unwrap();
    let lun = start(LunParams {
        name: "nbd".into(),
        config,
        block_size: BlockSize::B512,
        capacity: SIZE,
        write_cache: true,
        serial: Some("0123456789".into()),
        neighbourhood: Default::default(),
        state_dir: None,
        backend: Some(backend_from_env()),
        polling: true,
        device: kernel.device().unwrap(),
    })
    .unwrap();
    // The unit attention of a power on.
    kernel.execute(&[0; 6], Data::None).unwrap();
    Rig { kernel, lun }
}

fn rw16(opcode: u8, lba: u64, blocks: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
    cdb
}

impl Rig {
    fn write(&mut self, lba: u64, data: &[u8]) -> u8 {
        let cdb = rw16(0x8a, lba, data.len() as u64 / 512);
        self.kernel.execute(&cdb, Data::Out(data)).unwrap().status
    }

    fn read(&mut self, lba: u64, blocks: u64) -> (u8, Vec<u8>) {
        let ended = self.kernel.execute(&rw16(0x88, lba, blocks), Data::In(blocks as usize * 512)).unwrap();
        (ended.status, ended.data)
    }
}

fn server(dir: &tempfile::TempDir) -> Server {
    let disk = file(dir.path(), "disk", SIZE);
    nbdkit(dir.path(), &["file", disk.to_str().unwrap()])
}

#[test]
fn a_lun_with_protection_serves_an_export_across_a_restart_of_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = server(&dir);
    let sidecar = dir.path().join("disk.pi");
    let (uri, at) = (server.uri("&connections=2"), sidecar.clone());
    let image = uri.clone();
    sys::run(async move |io| {
        let volume = try_attach(&io, &image, true).await.unwrap();
        let options = RebuildOptions {
            kind: Some(PiType::Type1),
            mode: Some(PiMode::Bitmap),
            block_size: Some(BlockSize::B512),
            format: tcmu_dif::pi::store::ImageFormat::Raw,
        };
        tools::rebuild(&io, &volume, &image, &at, options, |_, _| {}).await.unwrap();
    });
    let config = DeviceConfig { pi: Some(PiType::Type1), sidecar: Some(sidecar), ..DeviceConfig::new(&uri) };
    let mut rig = rig(config.clone());
    let mut model = vec![0u8; SIZE as usize];
    let mut rng = Rng::new(5);
    assert_eq!(rig.write(0, &[7; 4096]), 0);
    model[..4096].fill(7);
    for round in 0..300 {
        if round == 150 {
            server.again();
        }
        let blocks = 1 + rng.below(64);
        let lba = rng.below(SIZE / 512 - blocks);
        let range = lba as usize * 512..(lba + blocks) as usize * 512;
        if rng.one_in(2) {
            let data: Vec<u8> = (0..blocks * 512).map(|_| rng.next() as u8).collect();
            assert_eq!(rig.write(lba, &data), 0);
            model[range].copy_from_slice(&data);
        } else {
            let (status, data) = rig.read(lba, blocks);
            assert!(status == 0 && data == model[range], "round {round}");
        }
    }
    assert_eq!(rig.kernel.execute(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::None).unwrap().status, 0);
    rig.lun.stop().unwrap();
    let disk = dir.path().join("disk");
    assert!(std::fs::read(&disk).unwrap() == model);
    // What goes bad behind the server is found.
    let mut bytes = std::fs::read(&disk).unwrap();
    bytes[700] ^= 1;
    std::fs::write(&disk, &bytes).unwrap();
    let mut rig = self::rig(config);
    let ended = rig.kernel.execute(&rw16(0x88, 1, 1), Data::In(512)).unwrap();
    assert_eq!((ended.status, ended.key_asc_ascq()), (2, (0xb, 0x10, 1)));
    rig.lun.stop().unwrap();
}

#[test]
fn a_server_that_stays_away_is_not_ready_and_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = server(&dir);
    let mut rig = rig(DeviceConfig::new(server.uri("&reconnect=1")));
    assert_eq!(rig.write(0, &[1; 512]), 0);
    server.kill();
    let ended = rig.kernel.execute(&rw16(0x88, 1, 1), Data::In(512)).unwrap();
    // NOT READY, LOGICAL UNIT COMMUNICATION FAILURE
    assert_eq!((ended.status, ended.key_asc_ascq()), (2, (2, 8, 0)));
    let began = Instant::now();
    // The write was never flushed, and cannot be: that has to be said.
    let e = rig.lun.stop().unwrap_err().to_string();
    assert!(e.contains("cannot be reached"), "{e}");
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}

#[test]
fn a_lun_that_is_stopped_while_commands_wait_for_its_server_ends_soon() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = server(&dir);
    let mut rig = rig(DeviceConfig::new(server.uri("&reconnect=3600")));
    assert_eq!(rig.read(0, 1).0, 0);
    server.kill();
    rig.kernel.submit(&rw16(0x88, 1, 1), Data::In(512)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    let _ = rig.lun.stop();
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
}
