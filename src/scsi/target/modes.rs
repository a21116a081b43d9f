//! MODE SENSE, MODE SELECT, START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL (SPC-4 6.11 to 6.14, SBC-4 5.12, 5.34).

use tracing::warn;

use super::{Command, Failure, Outcome, Target};
use crate::{
    scsi::{
        cdb::Cdb,
        mode::{self, Control, Settings},
        sense::{Asc, Sense, SenseKey},
    },
    volume::Volume,
};

impl<V: Volume> Target<V> {
    pub(super) fn mode_sense(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let six = cdb.bytes().len() == 6;
        let control = Control::from_bits(cdb.u8(2) >> 6);
        let values = match control {
            Control::Current | Control::Changeable => self.settings.get(),
            Control::Default => self.defaults,
            Control::Saved if self.saved.is_some() => self.saved_settings.get(),
            Control::Saved => {
                return Err(Sense::new(SenseKey::IllegalRequest, Asc::SAVING_PARAMETERS_NOT_SUPPORTED).into());
            }
        };
        let pages = mode::sense(cdb.u8(2) & 0x3f, cdb.u8(3), control, &values, self.saved.is_some())
            .ok_or(Sense::invalid_field(2, 5))?;
        let long = !six && cdb.bit(1, 4); // LLBAA
        let descriptor = if cdb.bit(1, 3) { Vec::new() } else { self.block_descriptor(long) };
        let protected = self.read_only || self.geometry.get().read_only || self.settings.get().write_protect;
        let device_specific = 0x10 | if protected { 0x80 } else { 0 }; // DPOFUA, WP
        let rest = descriptor.len() + pages.len();
        let mut out = if six {
            vec![(3 + rest) as u8, 0, device_specific, descriptor.len() as u8]
        } else {
            let mut header = ((6 + rest) as u16).to_be_bytes().to_vec();
            header.extend([0, device_specific, u8::from(long), 0]);
            header.extend((descriptor.len() as u16).to_be_bytes());
            header
        };
        out.extend(descriptor);
        out.extend(pages);
        let allocation = if six { u64::from(cdb.u8(4)) } else { u64::from(cdb.u16(7)) };
        self.reply(command, &out, allocation)
    }

    /// SBC-4 6.5.2: 8 bytes, or 16 where LLBAA allows them.
    fn block_descriptor(&self, long: bool) -> Vec<u8> {
        let (blocks, size) = (self.geometry.get().blocks, self.block_size.bytes() as u32);
        let mut out = Vec::with_capacity(16);
        if long {
            out.extend(blocks.to_be_bytes());
            out.extend([0; 4]);
        } else {
            out.extend(u32::try_from(blocks).unwrap_or(u32::MAX).to_be_bytes());
        }
        out.extend(size.to_be_bytes());
        out
    }

    pub(super) async fn mode_select(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let six = cdb.bytes().len() == 6;
        let (page_format, save) = (cdb.bit(1, 4), cdb.bit(1, 0));
        if !page_format {
            return Err(Sense::invalid_field(1, 4).into());
        }
        if save && self.saved.is_none() {
            return Err(Sense::invalid_field(1, 0).into());
        }
        let len = if six { usize::from(cdb.u8(4)) } else { usize::from(cdb.u16(7)) };
        if len == 0 {
            return Ok(0);
        }
        let list = self.parameters(command, len)?;
        let header = if six { 4 } else { 8 };
        if len < header {
            return Err(Sense::parameter_list_length().into());
        }
        let (descriptor_len, long) = match six {
            true => (usize::from(list[3]), false),
            false => (usize::from(u16::from_be_bytes([list[6], list[7]])), list[4] & 1 != 0),
        };
        let pages_at = header + descriptor_len;
        let descriptor = list.get(header..pages_at).ok_or(Sense::parameter_list_length())?;
        self.check_block_descriptor(descriptor, long, header as u16)?;
        let mut now = self.settings.get();
        if let Some(pi) = &mut now.pi {
            pi.capacity = self.geometry.get().blocks;
        }
        let settings = mode::select(&list[pages_at..], pages_at, &now)?;
        if save {
            self.save(&settings)?;
        }
        self.apply(settings).await?;
        Ok(0)
    }

    /// A block descriptor may say what is so already, and no more: the capacity is the volume's.
    fn check_block_descriptor(&self, descriptor: &[u8], long: bool, at: u16) -> Result<(), Failure> {
        let size = self.block_size.bytes() as u32;
        let now = self.geometry.get().blocks;
        let right = match (descriptor, long) {
            ([], _) => true,
            (&[b0, b1, b2, b3, _, s0, s1, s2], false) => {
                let blocks = u32::from_be_bytes([b0, b1, b2, b3]);
                let any = blocks == 0 || blocks == u32::MAX;
                (any || u64::from(blocks) == now) && u32::from_be_bytes([0, s0, s1, s2]) == size
            }
            (descriptor, true) if descriptor.len() == 16 => {
                let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
                let blocks = number(&descriptor[..8]);
                let any = blocks == 0 || blocks == u64::MAX;
                (any || blocks == now) && number(&descriptor[12..]) == u64::from(size)
            }
            _ => false,
        };
        if right { Ok(()) } else { Err(Sense::invalid_parameter(at).into()) }
    }

    fn save(&self, settings: &Settings) -> Result<(), Failure> {
        let Some(saved) = &self.saved else { return Ok(()) };
        if let Err(error) = saved.save(&mode::save(settings)) {
            warn!(%error, "mode pages could not be saved");
            return Err(Sense::new(SenseKey::HardwareError, Asc::INTERNAL_TARGET_FAILURE).into());
        }
        self.saved_settings.set(*settings);
        Ok(())
    }

    /// The initiator that changed them knows; the ring does not tell initiators apart, so nobody gets a unit attention.
    async fn apply(&self, settings: Settings) -> Result<(), Failure> {
        let old = self.settings.replace(settings);
        if let Some(pi) = settings.pi {
            *self.app_ranges.borrow_mut() = pi.ranges().collect();
        }
        if old.threshold != settings.threshold {
            self.space.take();
        }
        self.keep();
        if old.write_cache && !settings.write_cache {
            // Every write that was begun with the cache on has ended when the flush begins.
            drop(self.gate.hold(0, u64::MAX).await);
            self.volume.flush().await.map_err(|e| self.failure(e))?;
        }
        Ok(())
    }

    /// A disk that cannot be ejected, and that others use too: stopping it flushes it, and no more.
    pub(super) async fn start_stop_unit(&self, cdb: Cdb<'_>) -> Outcome {
        let byte = cdb.u8(4);
        let (condition, no_flush) = (byte >> 4, byte & 0x04 != 0);
        let (load_eject, start) = (byte & 0x02 != 0, byte & 0x01 != 0);
        if condition != 0 {
            return Err(Sense::invalid_field(4, 7).into()); // no power conditions (no VPD page 8A)
        }
        if load_eject {
            return Err(Sense::invalid_field(4, 1).into()); // RMB = 0
        }
        if !start && !no_flush {
            self.volume.flush().await.map_err(|e| self.failure(e))?;
        }
        Ok(0)
    }

    /// The medium cannot be removed, so preventing it is done by doing nothing.
    pub(super) fn prevent_allow(&self, cdb: Cdb<'_>) -> Outcome {
        if cdb.u8(4) & 0x02 != 0 {
            return Err(Sense::invalid_field(4, 1).into()); // obsolete values
        }
        Ok(0)
    }
}
