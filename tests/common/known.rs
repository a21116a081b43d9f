//! LUNs of a guest that knows what its disk holds, and those who judge their images: qemu-img and `pi verify`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tcmu_dif::{
    image::{Format, create::create_qcow2, create::create_raw, qcow2::CreateOptions},
    lun::config::DeviceConfig,
    peer::kernel::Data,
    pi::{
        PiMode, PiType,
        store::{NewSidecar, Stamp, default_path},
        tools,
    },
    sys,
    units::{BlockSize, Blocks},
};

use super::rig::{Guest, MIB, Rig};

pub const SIZE: u64 = 8 * MIB;
pub const BLOCKS: u64 = SIZE / 512;

pub fn qemu_img(words: &[&str]) -> String {
    let out = Command::new("qemu-img").args(words).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "qemu-img {words:?}: {said}");
    said
}

pub fn tcmu_dif(words: &[&str], dir: Option<&Path>) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"));
    command.args(words).env_remove("TCMU_DIF_LOG");
    if let Some(dir) = dir {
        command.arg("--run-dir").arg(dir);
    }
    let out = command.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.success(), said)
}

/// A guest that knows what its disk holds.
pub struct Known {
    pub guest: Guest,
    pub disk: Vec<u8>,
    pub seed: u64,
}

impl Known {
    pub fn random(&mut self, n: u64) -> u64 {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.seed >> 33) % n
    }

    /// A write or an UNMAP somewhere.
    pub fn step(&mut self) {
        let blocks = 1 + self.random(64);
        let lba = self.random(BLOCKS - blocks);
        let range = (lba * 512) as usize..((lba + blocks) * 512) as usize;
        if self.random(5) == 0 {
            let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
            list.extend(lba.to_be_bytes());
            list.extend((blocks as u32).to_be_bytes());
            list.extend([0; 4]);
            let cdb = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
            assert_eq!(self.guest.kernel.execute(&cdb, Data::Out(&list)).unwrap().status, 0);
            self.disk[range].fill(0);
        } else {
            let data: Vec<u8> = (0..range.len()).map(|_| self.random(256) as u8).collect();
            assert_eq!(self.guest.write(lba as u32, &data), 0);
            self.disk[range].copy_from_slice(&data);
        }
    }

    pub fn steps(&mut self, n: usize) {
        (0..n).for_each(|_| self.step());
    }

    pub fn compare(&mut self) {
        for lba in (0..BLOCKS).step_by(2048) {
            let cdb = [0x28, 0, 0, 0, (lba >> 8) as u8, lba as u8, 0, 8, 0, 0];
            let done = self.guest.kernel.execute(&cdb, Data::In(MIB as usize)).unwrap();
            assert_eq!(done.status, 0);
            let at = (lba * 512) as usize;
            assert!(
                done.data == self.disk[at..at + MIB as usize],
                "what is read at {lba} is not what was written"
            );
        }
    }
}

pub fn make(path: &Path, format: Format, pi: bool) {
    let at = path.to_owned();
    sys::run(async move |io| {
        match format {
            Format::Raw => create_raw(&io, &at, SIZE).await.unwrap(),
            Format::Qcow2 => create_qcow2(&io, &at, &CreateOptions::new(SIZE)).await.unwrap(),
        }
        if pi {
            let new = NewSidecar {
                block_size: BlockSize::B512,
                kind: PiType::Type1,
                mode: PiMode::Bitmap,
                capacity: Blocks(BLOCKS),
                format: format.into(),
                stamp: Stamp::of(&at).unwrap(),
            };
            tools::create(&io, &at, &default_path(&at), new).await.unwrap();
        }
    });
}

pub fn start(rig: &Rig, image: &Path, pi: bool) -> Known {
    start_named(rig, "vm1", image, pi)
}

pub fn start_named(rig: &Rig, name: &str, image: &Path, pi: bool) -> Known {
    let config = DeviceConfig { pi: pi.then_some(PiType::Type1), ..DeviceConfig::new(image) };
    Known { guest: rig.start(name, config, SIZE), disk: vec![0; SIZE as usize], seed: 1 }
}

pub fn new_lun(rig: &Rig, format: Format, pi: bool) -> (PathBuf, Known) {
    let image = rig.dir.path().join(format!("old.{format}"));
    make(&image, format, pi);
    let mut known = start(rig, &image, pi);
    known.steps(100);
    (image, known)
}

pub fn refused(answer: &Value) -> String {
    answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

pub fn path(p: &Path) -> &str {
    p.to_str().unwrap()
}

/// An image of a LUN that is down: whole, and what the guest knows.
pub fn judge(image: &Path, format: Format, pi: bool, disk: &[u8], dir: &Path) {
    if format == Format::Qcow2 {
        let said = qemu_img(&["check", path(image)]);
        assert!(said.contains("No errors were found"), "{said}");
    }
    let raw = dir.join("judged.raw");
    std::fs::write(&raw, disk).unwrap();
    let format = format.to_string();
    let said = qemu_img(&["compare", "-f", &format, "-F", "raw", path(image), path(&raw)]);
    assert!(said.contains("identical"), "{said}");
    if pi {
        let (good, said) = tcmu_dif(&["pi", "verify", path(image)], None);
        assert!(good, "{said}");
    }
}

/// What qemu-img says of each image of a chain, from the top down.
pub fn chain(image: &Path) -> Vec<PathBuf> {
    let said = qemu_img(&["info", "-U", "--backing-chain", "--output=json", path(image)]);
    let said: Value = serde_json::from_str(&said).unwrap();
    said.as_array().unwrap().iter().map(|i| i["filename"].as_str().unwrap().into()).collect()
}

pub fn image_of(known: &Known) -> PathBuf {
    known.guest.lun.remote().made().config.image.clone()
}
