//! Protection information through a whole LUN: from the iovecs of the embedded kernel's ring to image and sidecar, and back.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::path::{Path, PathBuf};

use tcmu_dif::{
    image::{
        Format,
        create::{create_qcow2, create_raw},
        qcow2::CreateOptions,
    },
    lun::{LunError, LunHandle, LunParams, config::DeviceConfig, start},
    peer::kernel::{Data, Ended, Kernel, Options},
    pi::{
        Exposure, PiType, Transfer, Tuple,
        store::{NewSidecar, Stamp, default_path},
        tools,
    },
    sys::{self, backend_from_env},
    units::{BlockSize, Blocks},
};

const BLOCKS: u64 = 4096;
const B: BlockSize = BlockSize::B512;
/// TCMU_MAILBOX_FLAG_CAP_DIF of the kernel that passes protection information on.
const CAP_DIF: u16 = 1 << 4;

struct Rig {
    dir: tempfile::TempDir,
    format: Format,
    kernel: Kernel,
}

impl Rig {
    fn new(flags: u16) -> Rig {
        Rig::of(flags, Format::Raw)
    }

    /// With a raw image, or qcow2 over an external data file.
    fn of(flags: u16, format: Format) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join(format!("disk.{format}"));
        sys::run(async move |io| {
            match format {
                Format::Raw => create_raw(&io, &image, BLOCKS * 512).await.unwrap(),
                Format::Qcow2 => {
                    let data_file = Some("disk.data".to_owned());
                    let options = CreateOptions { data_file, ..CreateOptions::new(BLOCKS * 512) };
                    create_qcow2(&io, &image, &options).await.unwrap();
                }
            }
            let stamp = Stamp::of(&image).unwrap();
            let kind = PiType::Type1;
            let new = NewSidecar {
                block_size: B,
                kind,
                mode: tcmu_dif::pi::PiMode::Bitmap,
                capacity: Blocks(BLOCKS),
                format: format.into(),
                stamp,
            };
            tools::create(&io, &image, &default_path(&image), new).await.unwrap();
        });
        let kernel = Kernel::new(Options { flags, cut: Some(5), ..Options::default() }).unwrap();
        Rig { dir, format, kernel }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join(format!("disk.{}", self.format))
    }

    fn start(&mut self, exposure: Exposure, transfer: Transfer) -> Result<LunHandle, LunError> {
        let image: &Path = &self.image();
        let config = DeviceConfig { pi: Some(PiType::Type1), exposure, transfer, ..DeviceConfig::new(image) };
        let lun = start(LunParams {
            name: "pi".into(),
            config,
            block_size: B,
            capacity: BLOCKS * 512,
            write_cache: true,
            serial: Some("0123456789".into()),
            neighbourhood: Default::default(),
            state_dir: None,
            backend: Some(backend_from_env()),
            polling: true,
            device: self.kernel.device().unwrap(),
        })?;
        assert_eq!(self.run(&[0; 6], Data::None).key_asc_ascq(), (6, 0x29, 0));
        Ok(lun)
    }

    fn run(&mut self, cdb: &[u8], data: Data<'_>) -> Ended {
        self.kernel.execute(cdb, data).unwrap()
    }
}

fn rw10(opcode: u8, field: u8, lba: u32, blocks: u16) -> Vec<u8> {
    let mut c = vec![opcode, field << 5];
    c.extend(lba.to_be_bytes());
    c.push(0);
    c.extend(blocks.to_be_bytes());
    c.push(0);
    c
}

fn data_and_tuples(lba: u32, blocks: u32) -> (Vec<u8>, Vec<u8>) {
    let crc = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
    let data: Vec<u8> = (0..blocks * 512).map(|i| (i / 3 + i / 512) as u8).collect();
    let tuples = data.chunks(512).zip(lba..).flat_map(|(block, reference)| {
        Tuple { guard: crc.checksum(block), app: 0xabcd, reference }.to_bytes()
    });
    let tuples = tuples.collect();
    (data, tuples)
}

#[test]
fn tuples_in_iovecs_of_their_own_are_checked_kept_across_a_restart_and_given_back() {
    let mut rig = Rig::new(0xf | CAP_DIF);
    let (data, tuples) = data_and_tuples(70, 50);
    let mut lun = rig.start(Exposure::Initiator, Transfer::Separate).unwrap();
    assert_eq!(rig.run(&rw10(0x2a, 1, 70, 50), Data::OutDif(&data, &tuples)).status, 0);
    let mut bad = tuples.clone();
    bad[49 * 8] ^= 1;
    let refused = rig.run(&rw10(0x2a, 1, 70, 50), Data::OutDif(&vec![0; data.len()], &bad));
    assert_eq!(refused.key_asc_ascq(), (0xb, 0x10, 1));
    assert_eq!(refused.sense[3..7], 70u32.to_be_bytes(), "INFORMATION: the data of no block fit");
    for _ in 0..2 {
        let got = rig.run(&rw10(0x28, 1, 70, 50), Data::InDif(data.len(), tuples.len()));
        assert_eq!((got.status, got.data == data, got.dif == tuples), (0, true, true));
        let got = rig.run(&rw10(0x28, 0, 70, 50), Data::In(data.len()));
        assert_eq!((got.status, got.data == data), (0, true));
        lun.stop().unwrap();
        lun = rig.start(Exposure::Initiator, Transfer::Separate).unwrap();
    }
    // The kernel dropped what the command asks for.
    let lost = rig.run(&rw10(0x28, 1, 70, 50), Data::In(data.len()));
    assert_eq!(lost.key_asc_ascq(), (5, 0x24, 0));
    lun.stop().unwrap();
}

#[test]
fn an_image_with_an_external_data_file_is_protected_across_restarts() {
    let mut rig = Rig::of(0xf, Format::Qcow2);
    let (data, _) = data_and_tuples(70, 50);
    for round in 0..3u32 {
        let lun = rig.start(Exposure::Target, Transfer::Separate).unwrap();
        assert_eq!(rig.run(&rw10(0x2a, 0, 70 + round * 50, 50), Data::Out(&data)).status, 0);
        for before in 0..=round {
            let got = rig.run(&rw10(0x28, 0, 70 + before * 50, 50), Data::In(data.len()));
            assert_eq!((got.status, got.data == data), (0, true));
        }
        lun.stop().unwrap();
    }
    // Its blocks, and nobody has looked after them.
    let path = rig.dir.path().join("disk.data");
    let mut there = std::fs::read(&path).unwrap();
    let at = there.windows(512).position(|w| w == &data[..512]).unwrap();
    there[at] ^= 1;
    std::fs::write(&path, &there).unwrap();
    let lun = rig.start(Exposure::Target, Transfer::Separate).unwrap();
    let got = rig.run(&rw10(0x28, 0, 70, 50), Data::In(data.len()));
    assert_eq!(got.key_asc_ascq(), (0xb, 0x10, 1));
    lun.stop().unwrap();
}

#[test]
fn interleaved_tuples_travel_over_any_kernel_and_are_counted() {
    let mut rig = Rig::new(0xf);
    let (data, tuples) = data_and_tuples(0, 9);
    let both: Vec<u8> = data.chunks(512).zip(tuples.chunks(8)).flat_map(|(d, t)| [d, t].concat()).collect();
    let lun = rig.start(Exposure::Initiator, Transfer::Interleaved).unwrap();
    assert_eq!(rig.run(&rw10(0x2a, 1, 0, 9), Data::Out(&both)).status, 0);
    let got = rig.run(&rw10(0x28, 1, 0, 9), Data::In(both.len()));
    assert_eq!((got.status, got.data == both), (0, true));
    let mut bad = both;
    bad[512 + 7] ^= 1;
    assert_eq!(rig.run(&rw10(0x2a, 5, 0, 9), Data::Out(&bad)).key_asc_ascq(), (0xb, 0x10, 3));
    assert_eq!(rig.run(&rw10(0x28, 0, 9, 3), Data::In(1536)).status, 0);
    assert_eq!(rig.run(&rw10(0x2a, 0, 9, 2), Data::Out(&[7; 1024])).status, 0);
    assert_eq!(lun.stats().unwrap().formatted_with, Some(PiType::Type1));
    let pi = lun.stats().unwrap().pi.unwrap();
    // Sent and read: nine blocks each; three that were never written; two whose tuples we made.
    assert_eq!((pi.verified, pi.unprotected, pi.generated, pi.ref_errors), (18, 3, 2, 1));
    lun.stop().unwrap();
}

#[test]
fn a_kernel_that_drops_tuples_is_refused_in_words_unless_they_travel_interleaved_or_not_at_all() {
    let mut rig = Rig::new(0xf);
    let refused = rig.start(Exposure::Initiator, Transfer::Separate).unwrap_err();
    assert!(matches!(refused, LunError::PiNotCarried), "{refused}");
    let next = refused.next_step().unwrap();
    assert!(next.contains("--exposure target") && next.contains("--pi-transfer interleaved"), "{next}");
    rig.start(Exposure::Initiator, Transfer::Interleaved).unwrap().stop().unwrap();
    let lun = rig.start(Exposure::Target, Transfer::Separate).unwrap();
    assert_eq!(lun.stats().unwrap().formatted_with, None);
    assert_eq!(rig.run(&rw10(0x28, 1, 0, 1), Data::In(520)).key_asc_ascq(), (5, 0x24, 0));
    assert_eq!(rig.run(&[0x12, 0, 0, 0, 96, 0], Data::In(96)).data[5] & 1, 0, "PROTECT");
    lun.stop().unwrap();
}
