//! A host that stands by for LUNs of another: what can be looked at before is, and when the other host is gone they are made here.
//!
//! What keeps two hosts from writing to one image is its owner's file ([`crate::image::owner`]), which is waited for and taken here by [`owner::Watch`]; this adds only what a LUN needs besides.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    Admin, Refusal,
    create::{Created, world_wide_names},
    declared,
    handover::check_image,
    order::Order,
    require_root,
};
use crate::{
    image::owner::{self, Claim, OwnerError, Watch},
    kernel::modules,
    pi::protected::sidecar_path,
};

/// How long a fencing agent may take.
const AGENT_PATIENCE: Duration = Duration::from_secs(120);
/// How often and how far apart a LUN whose image has been taken is tried to be made.
const TRIES: usize = 12;
const PAUSE: Duration = Duration::from_secs(5);

/// A LUN that was taken over.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct TakenOver {
    /// The host that had it.
    pub from: String,
    /// How long nothing had been heard of it, in milliseconds.
    pub silent_ms: u64,
    /// A fencing agent has said that it is gone.
    pub fenced: bool,
    /// How long it took from then to have the image, in milliseconds.
    pub image_ms: u64,
    /// How long it took from then until the LUN served, in milliseconds.
    pub lun_ms: u64,
    /// What it is.
    pub lun: Created,
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Admin {
    /// What a file declares of a LUN, if this host could have it now but for its image, which is another host's. The kernel's modules are there then.
    ///
    /// # Errors
    /// What is in the way, and what to do about it.
    pub fn may_stand_by(&self, declaration: &Path) -> Result<Order, Refusal> {
        require_root("standby")?;
        let places = &self.places;
        places.daemon()?;
        let name = declaration.file_stem().unwrap_or_default().to_string_lossy();
        let order = declared::parse(declaration, &name)?;
        let at = declaration.display();
        if order.serial.is_none() {
            return Err(Refusal::new(
                "standby",
                &at,
                "there is no serial number, and with another it would be another disk",
            )
            .then(format!(
                "add it as the other host has it: serial = \"…\" (there: tcmu-dif show {})",
                order.name
            )));
        }
        let config = order.config()?;
        let image = config.image.display();
        check_image(&config)
            .map_err(|e| Refusal::new("standby", &order.name, e.reason).maybe_next(e.next))?;
        let refused =
            |e: OwnerError| Refusal::from("standby", &image, &e).maybe_next(e.next_step(&config.image));
        if owner::read(&config.image).map_err(refused)?.is_none() {
            return Err(refused(OwnerError::NotShared(owner::path_of(&config.image))).then(format!(
                "on the host that has it, while it is not in use: tcmu-dif image owner --share {image}"
            )));
        }
        if config.pi.is_some() {
            let sidecar = sidecar_path(&config.image, config.sidecar.as_deref());
            if !sidecar.exists() {
                return Err(Refusal::new("standby", sidecar.display(), "it is not there")
                    .then("keep the protection information where both hosts see it, beside the image"));
            }
        }
        if places.find("standby", &order.name)?.is_some() {
            return Err(Refusal::new("standby", &order.name, "a LUN of that name is here already")
                .then(format!("delete it first: tcmu-dif delete {}", order.name)));
        }
        for (export, wwn) in order.exports.iter().zip(world_wide_names(&order)) {
            let target = Path::new("target").join(export.fabric.word()).join(wwn.as_str());
            if places.tree.has_now(&target) {
                return Err(Refusal::new("standby", &wwn, "that target is here already").then(
                    "take it down first, or choose another: export = [\"vhost:naa.5001405XXXXXXXXX\"]",
                ));
            }
        }
        let unready = |e: modules::ModuleError| {
            Refusal::from("standby", &order.name, &e).then("see what this host lacks: tcmu-dif check-host")
        };
        modules::mount_configfs(&places.configfs).map_err(unready)?;
        modules::load("target_core_user").map_err(unready)?;
        for export in &order.exports {
            modules::load(export.fabric.module()).map_err(unready)?;
        }
        Ok(order)
    }

    /// Waits until the host of a LUN's image is gone, and makes the LUN here; nothing, if it is told to stop. With a fencing agent nothing is taken before that has said that the host is
    /// gone, and nobody waits for the host to stop by itself.
    ///
    /// # Errors
    /// Why that is over without a LUN.
    pub fn stand_by(
        &self,
        order: &Order,
        agent: Option<&Path>,
        stop: &AtomicBool,
    ) -> Result<Option<TakenOver>, Refusal> {
        let claim = Claim::of_this_host().map_err(|e| Refusal::from("standby", "machine-id", &e))?;
        let call = agent.map(|agent| move |host: &str| call(agent, host, AGENT_PATIENCE));
        let fencing = call.as_ref().map(|call| call as owner::Fencing<'_>);
        let image = &order.image;
        let taken = Watch::of(image, claim).stand_by(fencing, stop);
        let taken = taken
            .map_err(|e| Refusal::from("standby", image.display(), &e).maybe_next(e.next_step(image)))?;
        let Some(taken) = taken else { return Ok(None) };
        tracing::warn!(lun = %order.name, host = taken.from.host.name, "its image has been taken over");
        let began = Instant::now();
        let mut tries = 0;
        let lun = loop {
            tries += 1;
            match self.create(order) {
                Ok(lun) => break lun,
                Err(e) if tries == TRIES => return Err(e),
                Err(e) => tracing::error!(lun = %order.name, "it is tried again: {}", e.in_one_line()),
            }
            std::thread::sleep(PAUSE);
        };
        Ok(Some(TakenOver {
            from: taken.from.host.name,
            silent_ms: ms(taken.silent),
            fenced: taken.fenced,
            image_ms: ms(taken.took),
            lun_ms: ms(began.elapsed()),
            lun,
        }))
    }
}

/// Has an agent make sure that a host is gone.
fn call(agent: &Path, host: &str, patience: Duration) -> Result<(), String> {
    let at = agent.display();
    let begun = Command::new(agent).arg(host).stdin(Stdio::null()).spawn();
    let mut child = begun.map_err(|e| format!("{at}: {e}"))?;
    let end = Instant::now() + patience;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{at} {host}: {status}")),
            Ok(None) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            failed => {
                let why =
                    failed.err().map_or(format!("not in {} seconds", patience.as_secs()), |e| e.to_string());
                // Whatever comes of it has no word any more.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(format!("{at} {host}: {why}"));
            }
        }
    }
}

/// The path of an agent as it is found from everywhere.
///
/// # Errors
/// That it is no program.
pub fn agent(path: &Path) -> Result<PathBuf, Refusal> {
    use std::os::unix::fs::PermissionsExt;
    let whole = std::path::absolute(path).map_err(|e| Refusal::from("--fence-agent", path.display(), &e))?;
    let meta = whole.metadata().map_err(|e| Refusal::from("--fence-agent", path.display(), &e))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(Refusal::new("--fence-agent", path.display(), "it is no program")
            .then("give one that is called with the other host's name, and ends with 0 once that is gone"));
    }
    Ok(whole)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A test may panic.
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::{super::luns::Places, *};

    fn script(dir: &Path, text: &str) -> PathBuf {
        let path = dir.join("agent.sh");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn an_agents_word_is_its_exit_status_and_one_that_does_not_come_back_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let said = dir.path().join("said");
        let yes = script(dir.path(), &format!("echo \"$1\" > {}", said.display()));
        assert_eq!(call(&yes, "host-b", AGENT_PATIENCE), Ok(()));
        assert_eq!(fs::read_to_string(&said).unwrap(), "host-b\n");
        let no = script(dir.path(), "exit 3");
        assert!(call(&no, "host-b", AGENT_PATIENCE).unwrap_err().contains("exit status: 3"));
        let hangs = script(dir.path(), "exec sleep 60");
        let began = Instant::now();
        let why = call(&hangs, "host-b", Duration::from_millis(200)).unwrap_err();
        assert!(why.contains("not in") && began.elapsed() < Duration::from_secs(30), "{why}");
        assert!(call(&dir.path().join("none"), "host-b", AGENT_PATIENCE).is_err());
        assert!(agent(&no).is_ok());
        for wrong in [dir.path(), &said, &dir.path().join("none")] {
            agent(wrong).unwrap_err();
        }
    }

    #[test]
    fn what_would_be_in_the_way_is_told_before_anybody_waits() {
        if !rustix::process::geteuid().is_root() {
            println!("only root may stand by");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let places =
            Places::at(&dir.path().join("configfs"), &dir.path().join("run"), &dir.path().join("lib"));
        let admin = Admin { places, protect: |_, _, _, _, _| Ok(()) };
        let image = dir.path().join("a.raw");
        let file = dir.path().join("vm1.toml");
        let words = |more: &str| {
            fs::write(&file, format!("image = \"{}\"\nexport = [\"vhost\"]\n{more}", image.display()))
                .unwrap();
            let refused = admin.may_stand_by(&file).unwrap_err();
            assert!(refused.next.is_some(), "{}", refused.reason);
            format!("{} {}", refused.reason, refused.next.unwrap())
        };
        assert!(words("").contains("it isn't running"));
        let _daemon = admin.places.run.lock().unwrap();
        assert!(words("nonsense = 1\n").contains("nonsense"));
        assert!(words("").contains("no serial number"));
        let serial = "serial = \"s1\"\n";
        assert!(words(serial).contains("mount the storage"));
        fs::write(&image, [0; 4096]).unwrap();
        assert!(words(serial).contains("image owner --share"));
        owner::share(&image, &Claim::of_this_host().unwrap()).unwrap();
        assert!(words(&format!("{serial}pi = \"type1\"\n")).contains("keep the protection information"));
        assert!(words(&format!("{serial}read-only = true\n")).contains("read-only"));
        // A target of that name.
        let target = "naa.5001405aa1b2c3d4";
        fs::create_dir_all(dir.path().join("configfs/target/vhost").join(target)).unwrap();
        fs::create_dir_all(dir.path().join("configfs/target/core")).unwrap();
        fs::write(&file, format!("image = \"{}\"\nexport = [\"vhost:{target}\"]\n{serial}", image.display()))
            .unwrap();
        assert!(admin.may_stand_by(&file).unwrap_err().reason.contains("that target is here already"));
    }
}
