//! Whether this kernel's target_core_user passes protection information between fabrics and handlers. Released kernels do not;
//! one with our change (`vendor/linux/`) does, and says so before there is a device: by its module parameter `dif`.
//!
//! Called by `check-host` and `create`. A device's own word is its mailbox flag (`ring::Device::carries_dif`).

use std::{fs, path::Path, process::Command};

use super::fabric::Fabric;

/// What becomes of protection information that a fabric hands over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dif {
    /// It reaches the handler, and the handler's reaches the fabric.
    Carried,
    /// It is dropped, in both directions.
    Lost,
}

impl Dif {
    /// Looks: at the loaded module (`sysfs` is /sys, or a test's), or at the one that would be loaded.
    pub fn of_this_kernel(sysfs: &Path) -> Dif {
        let module = sysfs.join("module/target_core_user");
        let carried = if module.is_dir() {
            let value = fs::read_to_string(module.join("parameters/dif")).unwrap_or_default();
            value.trim() == "Y"
        } else {
            modinfo().is_some_and(|parameters| names_dif(&parameters))
        };
        if carried { Dif::Carried } else { Dif::Lost }
    }

    /// What `check-host` says of a fabric.
    pub fn of_fabric(self, fabric: Fabric) -> &'static str {
        match (self, fabric) {
            (Dif::Carried, Fabric::Loopback) => {
                "PI is carried: this host's block layer makes and checks it (DIX)"
            }
            (Dif::Carried, Fabric::Vhost) => "PI is carried: a guest's own with t10_pi=on",
            (Dif::Lost, Fabric::Loopback) => {
                "PI is lost: target_core_user drops what the block layer sends (DIX); only commands built by hand (SG_IO) carry it, between the blocks"
            }
            (Dif::Lost, Fabric::Vhost) => {
                "PI is lost: target_core_user drops what a guest with t10_pi=on sends"
            }
        }
    }
}

fn modinfo() -> Option<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let out = Command::new("modinfo")
        .args(["--parameters", "target_core_user"])
        // A root that came through sudo or su may lack the directory.
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .ok()?;
    out.status.success().then(|| String::from_utf8_lossy(&out.stdout).into_owned())
}

fn names_dif(parameters: &str) -> bool {
    parameters.lines().any(|line| line.starts_with("dif:"))
}

/// Why a LUN whose initiators see its protection information cannot be made here, and what to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this kernel's target_core_user drops the protection information that initiators send, so a LUN that says it has some \
     fails their reads"
)]
pub struct NotCarried;

impl NotCarried {
    /// What to do.
    pub fn next_step(self) -> &'static str {
        "load a target_core_user that carries it (vendor/linux/README.md), or leave it at --exposure target; for programs \
         that build their own commands (SG_IO), ask for it by name: --pi-transfer interleaved"
    }
}

/// Whether a LUN may show its protection information to initiators: `interleaved` if it was asked for by name.
///
/// # Errors
/// [`NotCarried`] if it travels on its own and this kernel would lose it.
pub fn may_expose(dif: Dif, interleaved: bool) -> Result<(), NotCarried> {
    match dif {
        Dif::Lost if !interleaved => Err(NotCarried),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaded_module_says_by_its_parameter_whether_it_carries() {
        let sysfs = tempfile::tempdir().unwrap();
        let parameters = sysfs.path().join("module/target_core_user/parameters");
        fs::create_dir_all(&parameters).unwrap();
        assert_eq!(Dif::of_this_kernel(sysfs.path()), Dif::Lost);
        for (text, dif) in [("Y\n", Dif::Carried), ("N\n", Dif::Lost), ("", Dif::Lost)] {
            fs::write(parameters.join("dif"), text).unwrap();
            assert_eq!(Dif::of_this_kernel(sysfs.path()), dif, "{text:?}");
        }
    }

    #[test]
    fn a_module_that_is_not_loaded_is_known_by_its_parameters() {
        let stock =
            "global_max_data_area_mb:Max MBs allowed (int)\nblock_netlink:Block new netlink commands.\n";
        assert!(!names_dif(stock));
        assert!(names_dif(&format!("{stock}dif:Pass protection information on (bool)\n")));
    }

    #[test]
    fn what_a_kernel_would_lose_is_refused_unless_asked_for_by_name() {
        assert_eq!(may_expose(Dif::Lost, false), Err(NotCarried));
        for (dif, interleaved) in [(Dif::Lost, true), (Dif::Carried, false), (Dif::Carried, true)] {
            assert_eq!(may_expose(dif, interleaved), Ok(()));
        }
        assert!(NotCarried.next_step().contains("--pi-transfer interleaved"));
    }
}
