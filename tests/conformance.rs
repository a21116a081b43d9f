//! Our LUN judged by the conformance room, in one process: every type and block size, tuples beside the data and between
//! the blocks, and two LUNs compared by random commands. What runs in the VM over real fabrics runs here over the embedded kernel.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{path::Path, process::Command};

use tcmu_dif::{
    conformance::{
        Clause, ConformanceError, Disk, Initiator, Verdict, clauses, differential,
        disk::Carriage,
        initiator::{Answer, Wire},
    },
    lun::{LunHandle, LunParams, config::DeviceConfig, start},
    peer::kernel::{Data, Kernel, Options},
    pi::{Exposure, PiType, Transfer},
    sys::backend_from_env,
    units::BlockSize,
};

/// What the patched kernel's mailbox says.
const WITH_DIF: u16 = 0xf | tcmu_sys::TCMU_MAILBOX_FLAG_CAP_DIF as u16;

/// A LUN on the embedded kernel, as an initiator reaches it.
struct Embedded {
    kernel: Kernel,
    separate: bool,
    _lun: LunHandle,
    _dir: tempfile::TempDir,
}

impl Initiator for Embedded {
    fn separate(&self) -> bool {
        self.separate
    }

    fn send(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError> {
        let data = match wire {
            Wire::None | Wire::Out([], _) | Wire::In(0, _) => Data::None,
            Wire::Out(data, []) => Data::Out(data),
            Wire::Out(data, tuples) => Data::OutDif(data, tuples),
            Wire::In(data, 0) => Data::In(data),
            Wire::In(data, tuples) => Data::InDif(data, tuples),
        };
        let ended = self.kernel.execute(cdb, data).unwrap();
        let sense = if ended.status == 0 { Vec::new() } else { ended.sense };
        Ok(Answer { status: ended.status, sense, data: ended.data, tuples: ended.dif })
    }
}

fn lun(pi: Option<PiType>, block_size: BlockSize, transfer: Transfer) -> Box<Embedded> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.raw");
    let capacity = 4 << 20;
    std::fs::File::create(&image).unwrap().set_len(capacity).unwrap();
    if let Some(pi) = pi {
        protect(&image, pi, block_size);
    }
    let separate = transfer == Transfer::Separate;
    let flags = if separate { WITH_DIF } else { 0xf };
    let options = Options { flags, cut: Some(5), ..Options::default() };
    let kernel = Kernel::new(options).unwrap();
    let exposure = if pi.is_some() { Exposure::Initiator } else { Exposure::Target };
    let lun = start(LunParams {
        name: "judged".into(),
        config: DeviceConfig { pi, exposure, transfer, ..DeviceConfig::new(&image) },
        block_size,
        capacity,
        write_cache: true,
        serial: Some("0123456789".into()),
        neighbourhood: Default::default(),
        state_dir: None,
        backend: Some(backend_from_env()),
        polling: true,
        device: kernel.device().unwrap(),
    })
    .unwrap();
    Box::new(Embedded { kernel, separate, _lun: lun, _dir: dir })
}

fn protect(image: &Path, pi: PiType, block_size: BlockSize) {
    let done = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["pi", "rebuild", "--pi", &pi.to_string(), "--block-size", &block_size.to_string()])
        .arg(image)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

fn failures(rows: &[Clause]) -> Vec<String> {
    let failed = |c: &&Clause| matches!(c.verdict, Verdict::Fail(_));
    rows.iter().filter(failed).map(|c| format!("{}: {} {:?}", c.clause, c.what, c.verdict)).collect()
}

const SIZES: [u64; 2] = [512, 4096];

#[test]
fn every_clause_holds_for_every_type_block_size_and_transfer() {
    for pi in PiType::ALL {
        for size in SIZES {
            for transfer in [Transfer::Separate, Transfer::Interleaved] {
                let block_size = BlockSize::new(size).unwrap();
                let mut disk = Disk::look(lun(Some(pi), block_size, transfer)).unwrap();
                let wanted =
                    if transfer == Transfer::Separate { Carriage::Beside } else { Carriage::Between };
                assert_eq!((disk.facts.carriage, disk.facts.pi_type), (wanted, pi.number()));
                let rows = clauses::run(&mut disk).unwrap();
                let failed = failures(&rows);
                assert!(failed.is_empty(), "{pi}, {size}, {transfer}:\n{}", failed.join("\n"));
                let passed = rows.iter().filter(|c| c.verdict == Verdict::Pass).count();
                assert!(passed >= 60, "{pi}: only {passed} clauses were asked");
            }
        }
    }
}

#[test]
fn a_disk_without_protection_refuses_all_that_asks_for_it() {
    let size = BlockSize::new(512).unwrap();
    let mut disk = Disk::look(lun(None, size, Transfer::Separate)).unwrap();
    let rows = clauses::run(&mut disk).unwrap();
    assert_eq!(failures(&rows), Vec::<String>::new());
    assert!(rows.len() > 20);
}

/// Both transfers end in the same target, so nothing may differ; and the comparison must be able to fail.
#[test]
fn tuples_beside_the_data_and_between_the_blocks_come_to_the_same() {
    for (pi, seed) in PiType::ALL.into_iter().zip(1..) {
        let size = BlockSize::new(512).unwrap();
        let mut first = Disk::look(lun(Some(pi), size, Transfer::Separate)).unwrap();
        let mut second = Disk::look(lun(Some(pi), size, Transfer::Interleaved)).unwrap();
        let options = differential::Options { commands: 1500, seed };
        let report = differential::run(&mut first, &mut second, &options).unwrap();
        assert_eq!(report.differences, 0, "{pi}: {:#?}", report.listed);
        assert!(report.good > 500 && report.equal_errors > 200, "{pi}: {report:?}");
    }
    let size = BlockSize::new(512).unwrap();
    let mut first = Disk::look(lun(Some(PiType::Type1), size, Transfer::Separate)).unwrap();
    let mut other = Disk::look(Box::new(Deaf(lun(Some(PiType::Type1), size, Transfer::Separate)))).unwrap();
    let options = differential::Options { commands: 300, seed: 1 };
    let report = differential::run(&mut first, &mut other, &options).unwrap();
    assert!(report.differences > 0, "a disk that gives back wrong tuples was not noticed");
    let failed = failures(&clauses::run(&mut other).unwrap());
    assert!(failed.iter().any(|line| line.contains("come back as they were sent")), "{failed:?}");
}

/// A disk that gives back a wrong application tag now and then.
struct Deaf(Box<Embedded>);

impl Initiator for Deaf {
    fn separate(&self) -> bool {
        true
    }

    fn send(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError> {
        let mut answer = self.0.send(cdb, wire)?;
        if let Some(byte) = answer.tuples.get_mut(3) {
            *byte ^= 1;
        }
        Ok(answer)
    }
}
