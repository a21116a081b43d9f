//! Commands that only tell: INQUIRY, REQUEST SENSE, READ CAPACITY, the REPORT family, LOG SENSE, READ DEFECT DATA.

use super::{Command, Outcome, Target};
use crate::{
    scsi::{
        cdb::Cdb,
        log,
        opcodes::{self, One},
        sense::{Asc, Sense, SenseKey},
        vpd,
    },
    volume::Volume,
};

impl<V: Volume> Target<V> {
    pub(super) fn inquiry(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let (evpd, code) = (cdb.bit(1, 0), cdb.u8(2));
        if cdb.bit(1, 1) {
            return Err(Sense::invalid_field(1, 1).into()); // CMDDT of SPC-2
        }
        let data = if evpd {
            vpd::page(code, &self.identity, &self.geometry.get(), self.transfer.is_some())
                .ok_or(Sense::invalid_field(2, 7))?
        } else if code != 0 {
            return Err(Sense::invalid_field(2, 7).into());
        } else {
            vpd::standard(&self.identity, self.transfer.is_some())
        };
        self.reply(command, &data, u64::from(cdb.u16(3)))
    }

    /// Gives back, and so clears, what the next command would have been refused with.
    pub(super) fn request_sense(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let mut sense = match self.give_attention() {
            Some(asc) => Sense::new(SenseKey::UnitAttention, asc),
            None => self.medium.get().sense().unwrap_or(Sense::new(SenseKey::NoSense, Asc::NONE)),
        };
        sense.descriptor = cdb.bit(1, 0);
        self.reply(command, &sense.to_bytes(), u64::from(cdb.u8(4)))
    }

    pub(super) fn read_capacity_10(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        if cdb.u32(2) != 0 {
            return Err(Sense::invalid_field(2, 7).into());
        }
        let last = self.geometry.get().blocks.saturating_sub(1);
        let mut out = u32::try_from(last).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        out.extend((self.block_size.bytes() as u32).to_be_bytes());
        self.reply(command, &out, u64::MAX)
    }

    pub(super) fn read_capacity_16(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let g = self.geometry.get();
        let mut out = vec![0; 32];
        out[..8].copy_from_slice(&g.blocks.saturating_sub(1).to_be_bytes());
        out[8..12].copy_from_slice(&(self.block_size.bytes() as u32).to_be_bytes());
        if let Some(kind) = self.protection() {
            out[12] = (kind.number() - 1) << 1 | 1; // P_TYPE, PROT_EN
        }
        // P_I_EXPONENT = 0: a tuple for every block; the lowest aligned LBA is 0.
        out[13] = g.physical_exponent();
        out[14] = if g.thin { 0xc0 } else { 0 }; // LBPME, LBPRZ
        self.reply(command, &out, u64::from(cdb.u32(10)))
    }

    /// One logical unit, number 0. Through the ring the kernel answers this.
    pub(super) fn report_luns(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        if cdb.u32(6) < 16 {
            return Err(Sense::invalid_field(6, 7).into());
        }
        let data: &[u8] = match cdb.u8(2) {
            0x00 | 0x02 => &[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            0x01 => &[0; 8], // well-known logical units: none
            _ => return Err(Sense::invalid_field(2, 7).into()),
        };
        self.reply(command, data, u64::from(cdb.u32(6)))
    }

    /// One group, active and optimized, and that is all that it can be (SPC-4 6.37).
    pub(super) fn report_target_port_groups(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let mut body = match cdb.u8(1) >> 5 {
            0 => vec![],
            1 => vec![0x10, 0, 0, 0], // extended header; no implicit transition
            _ => return Err(Sense::invalid_field(1, 7).into()),
        };
        let [group_high, group_low] = vpd::PORT_GROUP.to_be_bytes();
        let [port_high, port_low] = vpd::RELATIVE_PORT.to_be_bytes();
        body.extend([0x00, 0x01, group_high, group_low, 0, 0, 0, 1]); // AO_SUP; one port
        body.extend([0, 0, port_high, port_low]);
        let mut out = (body.len() as u32).to_be_bytes().to_vec();
        out.extend(body);
        self.reply(command, &out, u64::from(cdb.u32(6)))
    }

    pub(super) fn report_supported_opcodes(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let has = self.abilities();
        let (rctd, action) = (cdb.bit(2, 7), cdb.u16(4));
        let one = match cdb.u8(2) & 0x07 {
            0 => None,
            1 => Some(One::Opcode),
            2 => Some(One::Action(action)),
            3 => Some(One::Either(action)),
            _ => return Err(Sense::invalid_field(2, 2).into()),
        };
        let data = match one {
            None => opcodes::report_all(rctd, has),
            Some(one) => opcodes::report_one(cdb.u8(3), one, rctd, has).ok_or(Sense::invalid_field(2, 2))?,
        };
        self.reply(command, &data, u64::from(cdb.u32(6)))
    }

    /// What the kernel does for us: ABORT TASK and LOGICAL UNIT RESET.
    pub(super) fn report_supported_tmf(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let extended = cdb.bit(2, 7);
        let mut out = vec![0x88, 0, 0, 0];
        if extended {
            out[3] = 12;
            out.extend([0; 12]); // no timeouts
        }
        self.reply(command, &out, u64::from(cdb.u32(6)))
    }

    pub(super) async fn log_sense(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        if cdb.u8(1) & 0x03 != 0 {
            return Err(Sense::invalid_field(1, 1).into()); // PPC, SP
        }
        let code = cdb.u8(2) & 0x3f;
        if log::page(code, cdb.u8(3), 0, None).is_none() {
            return Err(Sense::invalid_field(2, 5).into());
        }
        let available = self.available_sets().await.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        let data = log::page(code, cdb.u8(3), cdb.u16(5), available).ok_or(Sense::invalid_field(5, 7))?;
        self.reply(command, &data, u64::from(cdb.u16(7)))
    }

    /// There are no defects, in whichever list and format (SBC-4 5.17, 5.18).
    pub(super) fn read_defect_data(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        match cdb.bytes().len() {
            10 => self.reply(command, &[0, cdb.u8(2) & 0x1f, 0, 0], u64::from(cdb.u16(7))),
            _ => self.reply(command, &[0, cdb.u8(1) & 0x1f, 0, 0, 0, 0, 0, 0], u64::from(cdb.u32(6))),
        }
    }
}
