//! The daemon's host as it really is: configfs, /dev/uioN and LUN threads.

use std::{
    fs::File,
    path::PathBuf,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{
    rundir::RunDir,
    settings::Shared,
    worker::{Failure, Host, Identity, Lun, Report},
};
use crate::{
    kernel::{
        backstore,
        tree::{Real, Tree},
        uio::{Uio, UioDevice},
    },
    lun::{
        self, LunError, LunHandle, LunParams, Neighbourhood, Remote, State, chain, config::DeviceConfig,
        continued::ContinuedFile,
    },
    ring::{Device, RingError},
    units::BlockSize,
};

/// How long a device's node may take to come up.
const NODE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a device may be held by somebody who is about to let go of it: a daemon that has just ended, whose memory the kernel takes apart.
const HOLD_PATIENCE: Duration = Duration::from_secs(1);
const HOLD_LOOK: Duration = Duration::from_millis(10);

/// What is to be known where another process has a device's ring.
const HELD: &str = "nothing, if an earlier daemon's process cannot end because its storage does not answer (`ps -C tcmu-dif -L -o pid,stat,wchan`): \
                    the LUN goes on when the storage does";

/// The kernel's devices, served by real LUNs.
#[derive(Debug, Clone)]
pub struct RealHost {
    /// Where configfs is mounted.
    pub configfs: PathBuf,
    /// Where what has to outlive the daemon is kept.
    pub run: RunDir,
    /// Where what has to outlive a reboot is kept.
    pub state_dir: PathBuf,
    /// The LUNs that may copy to each other.
    pub neighbourhood: Neighbourhood,
    /// What a LUN is started with besides its own configuration.
    pub settings: Shared,
}

impl RealHost {
    /// The device's in-flight record, and the number of this instance of the device.
    fn record(&self, device: &UioDevice) -> std::io::Result<(File, u64)> {
        let file = self.run.open_record(device.minor)?;
        let instance = Uio::default().instance(device)?;
        Ok((file, instance))
    }

    /// What to do about a record that another version wrote.
    fn without_record(&self, device: &UioDevice) -> String {
        format!(
            "start the version of tcmu-dif that wrote it, and stop that with systemctl stop tcmu-dif, after which any version goes on; or have all commands in the \
             ring given back to their initiators, which send them again, also those that were executed: rm {}",
            self.run.record_file(device.minor).display()
        )
    }

    /// Without the record of the daemon that was here before, the ring holds commands of which nobody knows whether they were
    /// answered, and to answer one again would break the ring for good. The kernel gives them back as BUSY, and their initiators send them again.
    fn give_back_unknown(&self, device: &UioDevice, ring: &Device) -> Result<(), Failure> {
        let resumable = ring.is_resumable().map_err(|e| Failure {
            next: matches!(e, RingError::RecordVersion { .. }).then(|| self.without_record(device)),
            ..Failure::new(libc::EIO, chain(&e))
        });
        if resumable? {
            return Ok(());
        }
        let name = &device.name.name;
        let action = backstore::path_of(device.name.hba, name).join("action");
        let tree = Real::at(&self.configfs);
        let write = |attribute: &str, value: &str| {
            tree.write(&action.join(attribute), value).map_err(|e| {
                let errno = e.raw_os_error().unwrap_or(libc::EIO);
                Failure::new(errno, format!("configfs: cannot write {value} to {attribute}: {e}"))
            })
        };
        info!(lun = %name, "commands that another daemon left are given back to be sent again");
        write("block_dev", "1")?;
        let reset = write("reset_ring", "1");
        write("block_dev", "0")?;
        reset
    }
}

/// A new device is as large as its image: a person gave both. (One that was there before may be smaller, after a resize that was cut short.)
fn same_size(handle: &LunHandle, config: &DeviceConfig, identity: &Identity) -> Result<(), Failure> {
    let (image, device) = (handle.stats()?.capacity_bytes, identity.capacity);
    if image == device {
        return Ok(());
    }
    Err(Failure {
        next: Some(format!("give the size of the image: {image}")),
        ..Failure::new(
            libc::EINVAL,
            format!(
                "the disk in {} has {image} bytes, and the device was made with {device}",
                config.image.display()
            ),
        )
    })
}

/// The errno in a chain of errors.
fn errno(e: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(e);
    while let Some(e) = next {
        if let Some(number) = e.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
            return Some(number);
        }
        next = e.source();
    }
    None
}

impl From<LunError> for Failure {
    fn from(e: LunError) -> Failure {
        let errno = errno(&e).unwrap_or(match e {
            LunError::Size { .. } => libc::EINVAL,
            _ => libc::EIO,
        });
        Failure { errno, reason: chain(&e), next: e.next_step() }
    }
}

impl Host for RealHost {
    fn identify(&self, device: &UioDevice) -> Result<Identity, Failure> {
        let tree = Real::at(&self.configfs);
        let failed = |e: backstore::ConfigfsError| {
            Failure::new(e.source.raw_os_error().unwrap_or(libc::EIO), format!("configfs: {}", chain(&e)))
        };
        let found = backstore::read(&tree, device.name.hba, &device.name.name).map_err(failed)?;
        let found = found.ok_or_else(|| Failure::new(libc::ENODEV, "configfs has no such device"))?;
        Ok(Identity {
            capacity: found.capacity,
            block_size: found.block_size,
            device_id: found.device_id(&tree).map_err(failed)?,
            serial: found.serial,
            write_cache: found.write_cache,
            wants_answers: found.wants_answers,
            enabled: found.enabled,
        })
    }

    fn start(
        &self,
        device: &UioDevice,
        config: &DeviceConfig,
        identity: &Identity,
    ) -> Result<Box<dyn Lun>, Failure> {
        let node = device.node.display();
        let io = |e: std::io::Error| {
            Failure::new(e.raw_os_error().unwrap_or(libc::EIO), format!("{node} can't be opened: {e}"))
        };
        let block_size = BlockSize::new(identity.block_size).ok_or_else(|| Failure {
            errno: libc::EINVAL,
            reason: format!("a block size of {} bytes isn't served", identity.block_size),
            next: Some("create the device with hw_block_size=512 or 4096".to_owned()),
        })?;
        Uio::default().wait_for_node(device, NODE_PATIENCE).map_err(io)?;
        let mut ring = opened(device).map_err(|e| match e.kind() {
            std::io::ErrorKind::ResourceBusy => Failure { next: Some(HELD.to_owned()), ..io(e) },
            _ => io(e),
        })?;
        let continued = match self.record(device) {
            Ok((file, instance)) => {
                ring = ring.with_record(file, instance);
                Some(ContinuedFile { path: self.run.continued_file(device.minor), device: instance })
            }
            // It serves all the same; only a crash would be noticed.
            Err(e) => {
                warn!(lun = %device.name.name, "no in-flight record can be kept: {e}");
                None
            }
        };
        self.give_back_unknown(device, &ring)?;
        let tree = Real::at(&self.configfs);
        if let Err(e) = backstore::hear_task_management(&tree, device.name.hba, &device.name.name) {
            warn!(lun = %device.name.name, "commands that initiators give up are executed all the same: {}", chain(&e));
        }
        if (!identity.enabled || identity.serial.is_empty())
            && let Err(e) = backstore::give_patience(&tree, device.name.hba, &device.name.name)
        {
            warn!(lun = %device.name.name, "the kernel's time limits stay as they are: {}", chain(&e));
        }
        let settings = self.settings.get();
        let cache_size = config.cache_size.or(settings.cache_size);
        let params = LunParams {
            name: device.name.name.clone(),
            config: DeviceConfig { cache_size, ..config.clone() },
            block_size,
            capacity: identity.capacity,
            write_cache: identity.write_cache,
            serial: Some(identity.serial.clone()),
            state_dir: Some(self.state_dir.clone()),
            neighbourhood: self.neighbourhood.clone(),
            backend: settings.backend,
            polling: settings.polling,
            device: ring,
        };
        let handle = lun::start_where(params, continued)?;
        if !identity.enabled
            && let Err(failure) = same_size(&handle, config, identity)
        {
            // Nothing has been written, and the refusal is what counts.
            let _ = LunHandle::stop(handle);
            return Err(failure);
        }
        Ok(Box::new(handle))
    }

    fn tell_config(&self, device: &UioDevice, dev_config: &str) -> Result<(), Failure> {
        let tree = Real::at(&self.configfs);
        backstore::set_config(&tree, device.name.hba, &device.name.name, dev_config).map_err(|e| {
            Failure::new(e.source.raw_os_error().unwrap_or(libc::EIO), format!("configfs: {}", chain(&e)))
        })
    }
}

impl Lun for LunHandle {
    fn resize(&self, bytes: u64) -> Result<(), Failure> {
        Ok(LunHandle::resize(self, bytes)?)
    }

    fn set_write_cache(&self, on: bool) -> Result<(), Failure> {
        Ok(LunHandle::set_write_cache(self, on)?)
    }

    fn report(&self) -> Result<Report, Failure> {
        let stats = self.stats()?;
        let mut counters = serde_json::to_value(&stats).unwrap_or_default();
        if let Some(map) = counters.as_object_mut() {
            // These stand beside the counters.
            for key in ["io", "format", "capacity_bytes"] {
                map.remove(key);
            }
        }
        Ok(Report { format: stats.format, io: stats.io, counters })
    }

    fn remote(&self) -> Option<Remote> {
        Some(LunHandle::remote(self).clone())
    }

    fn failure(&self) -> Option<Failure> {
        match self.state() {
            State::Failed(reason) => Some(Failure::new(libc::EIO, reason)),
            State::Stopped => Some(Failure::new(libc::EIO, "the LUN's thread has ended")),
            State::Online => None,
        }
    }

    fn stop(self: Box<Self>) -> Result<(), Failure> {
        Ok(LunHandle::stop(*self)?)
    }
}

/// The device's ring, as soon as nobody else has it.
fn opened(device: &UioDevice) -> std::io::Result<Device> {
    let until = Instant::now() + HOLD_PATIENCE;
    loop {
        match Device::open_uio(&device.node, device.map_size) {
            Err(e) if e.kind() == std::io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(HOLD_LOOK);
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_the_errno_at_the_bottom_of_the_chain() {
        let e = LunError::Thread(std::io::Error::from_raw_os_error(libc::ENOMEM));
        let failure = Failure::from(e);
        assert_eq!(failure.errno, libc::ENOMEM);
        assert!(failure.reason.starts_with("the LUN's thread cannot run: "), "{}", failure.reason);
        let e = LunError::Size { capacity: 5, block_size: BlockSize::B512 };
        assert_eq!(Failure::from(e).errno, libc::EINVAL);
    }

    #[test]
    fn a_block_size_that_no_lun_has_is_refused_before_the_device_is_opened() {
        let host = RealHost {
            configfs: "/none".into(),
            run: RunDir::at("/none"),
            state_dir: "/none".into(),
            neighbourhood: Neighbourhood::default(),
            settings: Shared::new(super::super::settings::tests::settings()),
        };
        let name = crate::kernel::uio::UioName::parse("tcm-user/0/a/dif//a").unwrap();
        let device = UioDevice { minor: 0, name, map_size: 4096, node: "/dev/none".into() };
        let identity = Identity {
            capacity: 1 << 20,
            block_size: 1024,
            serial: String::new(),
            write_cache: true,
            device_id: 0,
            wants_answers: true,
            enabled: true,
        };
        let failed = host.start(&device, &DeviceConfig::new("/a"), &identity).err().unwrap();
        assert_eq!(failed.errno, libc::EINVAL);
        assert!(failed.reason.contains("1024"), "{}", failed.reason);
    }
}
