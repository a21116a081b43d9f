//! `tcmu-dif create`.

use super::{
    Done,
    args::{Cli, Create, PiSetting},
    output, size,
};
use crate::admin::order::Order;

impl Create {
    /// The order that the words are.
    pub fn order(&self) -> Order {
        let PiSetting(pi) = self.pi;
        Order {
            name: self.name.clone(),
            image: self.image.clone(),
            size: self.size,
            format: self.format,
            block_size: self.block_size,
            pi,
            pi_mode: self.pi_mode,
            exposure: self.exposure,
            transfer: self.pi_transfer,
            sidecar: self.sidecar.clone(),
            cache: self.cache,
            cpus: self.cpus.clone(),
            cache_size: self.cache_size,
            copy_group: self.copy_group.clone(),
            limits: self.throttle,
            read_only: self.read_only,
            serial: self.serial.clone(),
            exports: self.export.clone(),
        }
    }
}

/// Makes the LUN.
pub fn run(cli: &Cli, args: &Create) -> Done {
    let out = cli.admin().create(&args.order())?;
    if args.json.json {
        return output::json(&out);
    }
    let is = if out.created { "is up" } else { "is there already, as asked" };
    let format = out.format.map(|f| format!("{f}, ")).unwrap_or_default();
    let mut text = format!(
        "{} {is}: {} ({format}{}, blocks of {}, protection {})",
        out.name,
        out.image,
        size::human(out.capacity_bytes),
        out.block_size,
        out.pi
    );
    for e in &out.exports {
        match (&e.device, &e.libvirt, &e.qemu) {
            (Some(device), ..) => text.push_str(&format!("\n{} {}: {device}", e.fabric, e.wwn)),
            (None, Some(xml), Some(args)) => {
                text.push_str(&format!(
                    "\n{} {}, for libvirt:\n{xml}\nor for QEMU:\n{args}",
                    e.fabric, e.wwn
                ));
            }
            _ => text.push_str(&format!("\n{} {}", e.fabric, e.wwn)),
        }
    }
    output::print(&text)
}

#[cfg(test)]
#[path = "create_tests.rs"]
mod tests;
