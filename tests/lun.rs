//! A whole LUN, black box: the real thread over the embedded kernel's ring, on images in a temporary folder.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    time::Duration,
};

use tcmu_dif::{
    lun::{
        LunError, LunHandle, LunParams, State, config::DeviceConfig, continued::ContinuedFile, start,
        start_where,
    },
    peer::kernel::{Data, Kernel, KernelError, Options},
    scsi::continued::{Continued, Keeper as _, Unfinished},
    sys::backend_from_env,
    units::BlockSize,
};

const MIB: u64 = 1 << 20;

struct Rig {
    kernel: Kernel,
    lun: Option<LunHandle>,
    image: PathBuf,
    capacity: u64,
    block_size: BlockSize,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(capacity: u64, block_size: BlockSize) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(capacity).unwrap();
        // Iovecs cut anywhere: what the real kernel cuts at pages must not matter.
        let options =
            Options { cmdr_size: 128 << 10, data_size: 32 << 20, cut: Some(7), ..Options::default() };
        let kernel = Kernel::new(options).unwrap();
        let mut rig = Rig { kernel, lun: None, image, capacity, block_size, _dir: dir };
        rig.start().unwrap();
        // POWER ON, RESET, OR BUS DEVICE RESET OCCURRED
        assert_eq!(rig.run(&[0; 6], Data::None).key_asc_ascq(), (6, 0x29, 0));
        rig
    }

    fn state_dir(&self) -> PathBuf {
        self.image.with_file_name("state")
    }

    fn params(&self) -> LunParams {
        LunParams {
            name: "test".into(),
            config: DeviceConfig::new(&self.image),
            block_size: self.block_size,
            capacity: self.capacity,
            write_cache: true,
            serial: Some("0123456789".into()),
            neighbourhood: Default::default(),
            state_dir: Some(self.state_dir()),
            backend: Some(backend_from_env()),
            polling: true,
            device: self.kernel.device().unwrap(),
        }
    }

    fn start(&mut self) -> Result<(), LunError> {
        self.lun = Some(start(self.params())?);
        Ok(())
    }

    fn continued(&self, device: u64) -> ContinuedFile {
        ContinuedFile { path: self.image.with_file_name("uio0.json"), device }
    }

    /// As the daemon starts a LUN: with an in-flight record, and what initiators have set.
    fn start_as(&mut self, device: u64) -> Result<(), LunError> {
        self.start_with(device, |_| {})
    }

    fn start_with(&mut self, device: u64, change: impl FnOnce(&mut LunParams)) -> Result<(), LunError> {
        let record = self.image.with_file_name("uio0");
        let options = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let mut params = self.params();
        params.device = params.device.with_record(options.open(record).unwrap(), device);
        change(&mut params);
        self.lun = Some(start_where(params, Some(self.continued(device)))?);
        Ok(())
    }

    /// Waits until unit attentions that were given are kept no more.
    fn wait_until_told(&self) {
        let end = std::time::Instant::now() + Duration::from_secs(30);
        while !self.continued(7).load().unwrap().unwrap().attentions.is_empty() {
            assert!(std::time::Instant::now() < end, "they are kept for ever");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the LUN, and leaves of what was kept what stood there before: a daemon that was killed at that moment.
    fn kill(&mut self) {
        let path = self.continued(0).path;
        let kept = std::fs::read(&path).unwrap();
        self.stop().unwrap();
        std::fs::write(&path, kept).unwrap();
    }

    fn lun(&self) -> &LunHandle {
        self.lun.as_ref().unwrap()
    }

    fn stop(&mut self) -> Result<(), LunError> {
        self.lun.take().unwrap().stop()
    }

    fn run(&mut self, cdb: &[u8], data: Data<'_>) -> tcmu_dif::peer::kernel::Ended {
        self.kernel.execute(cdb, data).unwrap()
    }
}

fn rw16(opcode: u8, lba: u64, blocks: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
    cdb
}

const READ16: u8 = 0x88;
const WRITE16: u8 = 0x8a;

#[test]
fn what_is_written_is_read_back_at_both_block_sizes_and_lies_in_the_image() {
    for block_size in [BlockSize::B512, BlockSize::B4096] {
        let mut rig = Rig::new(8 * MIB, block_size);
        let bs = block_size.bytes() as usize;
        let data: Vec<u8> = (0..100 * bs).map(|i| (i / 7) as u8).collect();
        assert_eq!(rig.run(&rw16(WRITE16, 5, 100), Data::Out(&data)).status, 0);
        let ended = rig.run(&rw16(READ16, 5, 100), Data::In(data.len()));
        assert_eq!((ended.status, ended.data == data), (0, true));
        rig.stop().unwrap();
        assert_eq!(std::fs::read(&rig.image).unwrap()[5 * bs..105 * bs], data);
    }
}

#[test]
fn a_range_outside_the_disk_is_refused_before_any_io() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    for (lba, blocks) in [(2048, 1), (2047, 2), (u64::MAX, 1), (1 << 32, 1)] {
        let ended = rig.run(&rw16(WRITE16, lba, blocks), Data::Out(&vec![1; blocks as usize * 512]));
        assert_eq!((ended.status, ended.key_asc_ascq()), (2, (5, 0x21, 0)), "{lba}+{blocks}");
    }
    rig.stop().unwrap();
    assert!(std::fs::read(&rig.image).unwrap().iter().all(|b| *b == 0));
}

/// Reads and writes at depth 32, each block with one command under way at most, against a model in memory.
#[test]
fn a_random_load_at_depth_32_reads_back_as_the_model_says() {
    let mut rig = Rig::new(4 * MIB, BlockSize::B512);
    let mut model = vec![0u8; 4 * MIB as usize];
    let mut busy: VecDeque<(u16, u64, u64, Option<Vec<u8>>)> = VecDeque::new();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (mut sent, total) = (0, 4000);
    while sent < total || !busy.is_empty() {
        while sent < total && busy.len() < 32 {
            let blocks = next() % 64 + 1;
            let lba = next() % (8192 - blocks);
            if busy.iter().any(|(_, l, b, _)| lba < l + b && *l < lba + blocks) {
                break;
            }
            let range = lba as usize * 512..(lba + blocks) as usize * 512;
            let submitted = if next() % 2 == 0 {
                let bytes: Vec<u8> = range.clone().map(|i| (i as u64 ^ next()) as u8).collect();
                let id = rig.kernel.queue(&rw16(WRITE16, lba, blocks as u32), Data::Out(&bytes));
                if id.is_ok() {
                    model[range].copy_from_slice(&bytes);
                }
                id.map(|id| (id, None))
            } else {
                let id = rig.kernel.queue(&rw16(READ16, lba, blocks as u32), Data::In(range.len()));
                id.map(|id| (id, Some(model[range].to_vec())))
            };
            match submitted {
                Ok((id, expected)) => busy.push_back((id, lba, blocks, expected)),
                Err(KernelError::Full) => break,
                Err(e) => panic!("{e}"),
            }
            sent += 1;
        }
        rig.kernel.ring_doorbell().unwrap();
        for ended in rig.kernel.wait(Duration::from_secs(30)).unwrap() {
            let at = busy.iter().position(|(id, ..)| *id == ended.id).unwrap();
            let (_, lba, _, expected) = busy.remove(at).unwrap();
            assert_eq!(ended.status, 0, "lba {lba}");
            assert!(expected.is_none_or(|e| e == ended.data), "lba {lba} reads back something else");
        }
    }
    rig.stop().unwrap();
    assert!(std::fs::read(&rig.image).unwrap() == model);
}

#[test]
fn a_resize_is_told_as_a_unit_attention_and_the_new_blocks_read_as_zeros() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.lun().resize(2 * MIB).unwrap();
    assert_eq!(rig.run(&[0; 6], Data::None).key_asc_ascq(), (6, 0x2a, 9));
    let ended = rig.run(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::In(8));
    assert_eq!(ended.data, [0, 0, 0x0f, 0xff, 0, 0, 2, 0]);
    assert_eq!(rig.run(&rw16(READ16, 4095, 1), Data::In(512)).data, [0; 512]);
    assert!(matches!(rig.lun().resize(1000), Err(LunError::Size { .. })));
    rig.stop().unwrap();
}

#[test]
fn the_write_cache_can_be_turned_off_and_initiators_are_told() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.lun().set_write_cache(false).unwrap();
    assert_eq!(rig.run(&[0; 6], Data::None).key_asc_ascq(), (6, 0x2a, 1));
    let ended = rig.run(&[0x1a, 8, 8, 0, 255, 0], Data::In(255));
    assert_eq!((ended.data[4] & 0x3f, ended.data[6] & 4), (8, 0));
    rig.stop().unwrap();
}

#[test]
fn a_saved_mode_page_outlives_a_restart_and_one_that_was_not_saved_does_not() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    let sense =
        |rig: &mut Rig, page: u8| rig.run(&[0x1a, 8, page, 0, 255, 0], Data::In(255)).data[4..].to_vec();
    let mut caching = sense(&mut rig, 0x08);
    assert_eq!((caching[0], caching[2] & 4), (0x88, 4), "PS=1 and WCE=1");
    let select = |rig: &mut Rig, page: &[u8], save: u8| {
        let list = [&[0; 4], page].concat();
        let cdb = [0x15, 0x10 | save, 0, 0, list.len() as u8, 0];
        assert_eq!(rig.run(&cdb, Data::Out(&list)).status, 0);
    };
    caching[0] &= 0x7f; // PS is reserved in MODE SELECT
    caching[2] &= !4;
    select(&mut rig, &caching, 1);
    let mut control = sense(&mut rig, 0x0a);
    control[0] &= 0x7f;
    control[2] |= 4; // D_SENSE; saving it would save all pages
    select(&mut rig, &control, 0);
    rig.stop().unwrap();
    rig.start().unwrap();
    rig.run(&[0; 6], Data::None); // POWER ON
    assert_eq!(sense(&mut rig, 0x08)[2] & 4, 0, "WCE as it was saved");
    assert_eq!(sense(&mut rig, 0x0a)[2] & 4, 0, "D_SENSE was not saved");
    rig.stop().unwrap();
}

fn mode_page(rig: &mut Rig, control: u8, page: u8) -> Vec<u8> {
    rig.run(&[0x1a, 8, control << 6 | page, 0, 255, 0], Data::In(255)).data[4..].to_vec()
}

fn mode_select(rig: &mut Rig, page: &[u8]) {
    let mut list = [&[0; 4], page].concat();
    list[4] &= 0x7f;
    let cdb = [0x15, 0x10, 0, 0, list.len() as u8, 0];
    assert_eq!(rig.run(&cdb, Data::Out(&list)).status, 0);
}

/// D_SENSE on and WCE off, unsaved.
fn change_pages(rig: &mut Rig) {
    for (page, byte, bit) in [(0x0a, 2, 4), (0x08, 2, 4)] {
        let mut changed = mode_page(rig, 0, page);
        changed[byte] ^= bit;
        mode_select(rig, &changed);
    }
}

fn d_sense_and_wce(rig: &mut Rig, control: u8) -> (bool, bool) {
    (mode_page(rig, control, 0x0a)[2] & 4 != 0, mode_page(rig, control, 0x08)[2] & 4 != 0)
}

const READY: (u8, u8, u8) = (0, 0, 0);
const POWER_ON: (u8, u8, u8) = (6, 0x29, 0);

/// What TEST UNIT READY says, once.
fn ready(rig: &mut Rig) -> (u8, u8, u8) {
    let ended = rig.run(&[0; 6], Data::None);
    if ended.status == 0 { READY } else { ended.key_asc_ascq() }
}

#[test]
fn mode_pages_that_were_not_saved_outlive_the_daemon_stopped_or_killed_but_not_the_device() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    assert_eq!(d_sense_and_wce(&mut rig, 0), (false, true));
    rig.wait_until_told();
    change_pages(&mut rig);
    for killed in [true, false, true] {
        if killed {
            rig.kill()
        } else {
            rig.stop().unwrap()
        }
        rig.start_as(7).unwrap();
        assert_eq!(ready(&mut rig), READY, "no initiator has noticed anything");
        assert_eq!(d_sense_and_wce(&mut rig, 0), (true, false));
        assert_eq!(d_sense_and_wce(&mut rig, 3), (false, true), "saved is what was saved");
        // In descriptor format, as was set.
        let failed = rig.run(&rw16(READ16, u64::MAX, 1), Data::In(512));
        assert_eq!(failed.sense[0], 0x72);
    }
    rig.stop().unwrap();
    // Another device, as after delete and create: a power on, and the saved values.
    rig.start_as(8).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    assert_eq!(d_sense_and_wce(&mut rig, 0), (false, true));
    rig.stop().unwrap();
}

#[test]
fn a_unit_attention_is_told_by_the_next_daemon_if_it_may_not_have_arrived_and_once_if_it_has() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    let changed = (6, 0x2a, 9);
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    // Not told yet: the power on too.
    rig.lun().resize(2 * MIB).unwrap();
    rig.kill();
    rig.capacity = 2 * MIB;
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    assert_eq!(ready(&mut rig), changed);
    // Killed as the answer left: told again. It is the power on that came first.
    rig.kill();
    rig.start_as(7).unwrap();
    assert_eq!([ready(&mut rig), ready(&mut rig), ready(&mut rig)], [POWER_ON, changed, READY]);
    // A while after it, or if the daemon was stopped in good order, never again.
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), READY);
    rig.lun().resize(3 * MIB).unwrap();
    rig.capacity = 3 * MIB;
    assert_eq!(ready(&mut rig), changed);
    rig.wait_until_told();
    rig.kill();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), READY);
    rig.stop().unwrap();
}

#[test]
fn a_write_cache_that_was_set_from_outside_while_no_daemon_was_there_counts_and_is_told() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    rig.stop().unwrap();
    rig.start_with(7, |params| params.write_cache = false).unwrap();
    assert_eq!(ready(&mut rig), (6, 0x2a, 1));
    assert_eq!(d_sense_and_wce(&mut rig, 0), (false, false));
    // As it is now, it stays, and nobody is told.
    rig.stop().unwrap();
    rig.start_with(7, |params| params.write_cache = false).unwrap();
    assert_eq!((ready(&mut rig), d_sense_and_wce(&mut rig, 0)), (READY, (false, false)));
    rig.stop().unwrap();
}

#[test]
fn what_a_newer_daemon_kept_is_not_guessed_at_initiators_are_told_of_a_reset() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    change_pages(&mut rig);
    rig.stop().unwrap();
    for other in [r#"{"version":2,"device":7}"#, "{"] {
        std::fs::write(rig.continued(7).path, other).unwrap();
        rig.start_as(7).unwrap();
        assert_eq!(ready(&mut rig), POWER_ON);
        assert_eq!(d_sense_and_wce(&mut rig, 0), (false, true));
        rig.stop().unwrap();
    }
}

#[test]
fn a_format_that_was_cut_off_leaves_the_medium_unusable_until_it_is_repeated() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.stop().unwrap();
    rig.start_as(7).unwrap();
    assert_eq!(ready(&mut rig), POWER_ON);
    rig.stop().unwrap();
    let file = rig.continued(7);
    let kept = file.load().unwrap().unwrap();
    file.keep(&Continued { unfinished: Some(Unfinished::Format), ..kept }).unwrap();
    for _ in 0..2 {
        rig.start_as(7).unwrap();
        assert_eq!(rig.run(&rw16(READ16, 0, 1), Data::In(512)).key_asc_ascq(), (3, 0x31, 1));
        rig.kill();
    }
    rig.start_as(7).unwrap();
    assert_eq!(rig.run(&[4, 0, 0, 0, 0, 0], Data::None).status, 0);
    assert_eq!(rig.run(&rw16(READ16, 0, 1), Data::In(512)).status, 0);
    rig.kill();
    rig.start_as(7).unwrap();
    assert_eq!(rig.run(&rw16(READ16, 0, 1), Data::In(512)).status, 0);
    rig.stop().unwrap();
}

#[test]
fn saved_mode_pages_of_a_newer_version_are_refused_in_words_and_stay() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    let mut control = mode_page(&mut rig, 0, 0x0a);
    control[0] &= 0x7f;
    let list = [&[0; 4], &control[..]].concat();
    assert_eq!(rig.run(&[0x15, 0x11, 0, 0, list.len() as u8, 0], Data::Out(&list)).status, 0);
    rig.stop().unwrap();
    let folder = rig.state_dir().join("mode-pages");
    let file = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let newer = std::fs::read_to_string(&file).unwrap().replace("\"version\":1", "\"version\":2");
    std::fs::write(&file, &newer).unwrap();
    let error = rig.start().unwrap_err();
    let words = tcmu_dif::lun::chain(&error);
    assert!(words.contains("is of version 2, and this program knows 1"), "{words}");
    assert!(
        error.next_step().unwrap().ends_with(&format!("rm {}", file.display())),
        "{:?}",
        error.next_step()
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), newer);
    std::fs::remove_file(&file).unwrap();
    rig.start().unwrap();
    rig.stop().unwrap();
}

#[test]
fn the_lun_is_the_same_disk_after_a_restart() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    let inquiry = |rig: &mut Rig, page: u8| rig.run(&[0x12, 1, page, 0, 255, 0], Data::In(255)).data;
    let before = [inquiry(&mut rig, 0x80), inquiry(&mut rig, 0x83)];
    assert!(before[0].ends_with(b"0123456789"));
    rig.run(&rw16(WRITE16, 9, 1), Data::Out(&[3; 512]));
    rig.stop().unwrap();
    rig.start().unwrap();
    assert_eq!([inquiry(&mut rig, 0x80), inquiry(&mut rig, 0x83)], before);
    rig.run(&[0; 6], Data::None);
    assert_eq!(rig.run(&rw16(READ16, 9, 1), Data::In(512)).data, [3; 512]);
    rig.stop().unwrap();
}

#[test]
fn an_image_in_use_is_refused_and_the_refusal_leaves_the_user_alone() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    let second = start(LunParams {
        device: Kernel::new(Options::default()).unwrap().device().unwrap(),
        ..rig.params()
    });
    let error = second.unwrap_err();
    assert!(error.to_string().contains(&*rig.image.to_string_lossy()), "{error}");
    assert!(error.next_step().is_some());
    assert_eq!(rig.run(&[0; 6], Data::None).status, 0);
    rig.stop().unwrap();
    rig.start().unwrap();
}

/// A guest may put a qcow2 image onto its disk. Where the format is set, that changes nothing; where it is probed at each
/// start, it would change what the disk is, so it is refused.
#[test]
fn a_guest_cannot_change_the_format_of_its_disk() {
    let mut magic = vec![0u8; 512];
    magic[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    let mut rig = Rig::new(MIB, BlockSize::B512);
    assert_ne!(rig.run(&rw16(WRITE16, 0, 1), Data::Out(&magic)).status, 0);
    rig.stop().unwrap();
    let raw = |rig: &Rig| {
        let mut params = rig.params();
        params.config.format = Some(tcmu_dif::image::Format::Raw);
        start(params).unwrap()
    };
    rig.lun = Some(raw(&rig));
    rig.run(&[0; 6], Data::None);
    assert_eq!(rig.run(&rw16(WRITE16, 0, 1), Data::Out(&magic)).status, 0);
    rig.stop().unwrap();
    rig.lun = Some(raw(&rig));
    rig.run(&[0; 6], Data::None);
    assert_eq!(rig.run(&rw16(READ16, 0, 1), Data::In(512)).data, magic);
    rig.stop().unwrap();
}

#[test]
fn an_image_that_has_lost_its_end_is_refused() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.stop().unwrap();
    std::fs::OpenOptions::new().write(true).open(&rig.image).unwrap().set_len(MIB / 2).unwrap();
    let error = rig.start().unwrap_err();
    assert!(matches!(error, LunError::Shrunk { .. }), "{error}");
}

#[test]
fn a_broken_ring_fails_its_lun_with_the_reason_and_releases_the_image() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.kernel.submit_raw(&[1, 0, 0, 0, 0, 0, 0, 0], None).unwrap();
    for _ in 0..200 {
        if rig.lun().is_finished() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let State::Failed(reason) = rig.lun().state() else { panic!("{:?}", rig.lun().state()) };
    assert!(reason.contains("broken ring entry") && reason.contains("its length is 0"), "{reason}");
    assert!(matches!(rig.lun().stats(), Err(LunError::Gone(_))));
    let lockable = tempfile_lock(&rig.image);
    assert!(lockable, "the image is still locked");
    rig.lun.take();
}

fn tempfile_lock(image: &Path) -> bool {
    let mut other = Rig::new(MIB, BlockSize::B512);
    other.stop().unwrap();
    other.image = image.to_owned();
    other.start().is_ok() && other.stop().is_ok()
}

#[test]
fn data_in_that_no_command_filled_is_never_old_memory() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.run(&rw16(WRITE16, 0, 8), Data::Out(&[0xaa; 4096]));
    // TEST UNIT READY with room for data-in, as SG_IO can ask for it.
    let ended = rig.run(&[0; 6], Data::In(4096));
    assert!(ended.data.iter().all(|b| *b == 0));
    // INQUIRY with a short allocation length and a long buffer.
    let ended = rig.run(&[0x12, 0, 0, 0, 5, 0], Data::In(4096));
    assert!(ended.data[5..].iter().all(|b| *b == 0));
    rig.stop().unwrap();
}

#[test]
fn counters_count() {
    let mut rig = Rig::new(MIB, BlockSize::B512);
    rig.run(&rw16(WRITE16, 0, 8), Data::Out(&[1; 4096]));
    rig.run(&rw16(READ16, 0, 2), Data::In(1024));
    let stats = rig.lun().stats().unwrap();
    assert_eq!((stats.commands, stats.in_flight), (3, 0));
    assert_eq!(
        (stats.counted.bytes_out, stats.counted.bytes_in, stats.counted.check_conditions),
        (4096, 1024, 1)
    );
    rig.stop().unwrap();
}
