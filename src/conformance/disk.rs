//! A disk under test: what it says of itself, and block commands with their protection information on it, whichever way that
//! travels.

use serde::Serialize;

use super::{
    ConformanceError,
    initiator::{Answer, Initiator, Wire},
    tuples::{self, Tuple},
};

/// What a command does (SBC-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// VERIFY, with its BYTCHK.
    Verify(u8),
    /// WRITE AND VERIFY, BYTCHK 0.
    WriteVerify,
    /// WRITE SAME.
    WriteSame,
}

/// One block command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// What it does.
    pub kind: Kind,
    /// Bytes of its CDB: 6, 10, 12, 16 or 32.
    pub size: u8,
    /// RDPROTECT, WRPROTECT or VRPROTECT.
    pub protect: u8,
    /// The first block.
    pub lba: u64,
    /// How many.
    pub blocks: u32,
    /// EXPECTED INITIAL LOGICAL BLOCK REFERENCE TAG of the 32-byte form.
    pub reference: u32,
    /// EXPECTED LOGICAL BLOCK APPLICATION TAG and its mask.
    pub app: (u16, u16),
}

impl Op {
    /// A command whose expected reference tag fits its address, and which expects no application tag.
    pub fn new(kind: Kind, size: u8, protect: u8, lba: u64, blocks: u32) -> Op {
        Op { kind, size, protect, lba, blocks, reference: lba as u32, app: (0, 0) }
    }

    /// Whether there is such a command.
    pub fn exists(&self) -> bool {
        match (self.kind, self.size) {
            (Kind::Read | Kind::Write, 6) => self.protect == 0 && self.lba < 1 << 21 && self.blocks < 256,
            (_, 6) | (Kind::WriteSame, 12) => false,
            (_, 10) => self.lba < 1 << 32 && self.blocks < 1 << 16,
            (_, 12) => self.lba < 1 << 32,
            _ => true,
        }
    }

    /// The CDB (SBC-4 clause 5).
    pub fn cdb(&self) -> Vec<u8> {
        let (opcodes, action): ([u8; 4], u16) = match self.kind {
            Kind::Read => ([0x08, 0x28, 0xa8, 0x88], 0x09),
            Kind::Write => ([0x0a, 0x2a, 0xaa, 0x8a], 0x0b),
            Kind::Verify(_) => ([0, 0x2f, 0xaf, 0x8f], 0x0a),
            Kind::WriteVerify => ([0, 0x2e, 0xae, 0x8e], 0x0c),
            Kind::WriteSame => ([0, 0x41, 0, 0x93], 0x0d),
        };
        let bytchk = if let Kind::Verify(n) = self.kind { n << 1 } else { 0 };
        let flags = self.protect << 5 | bytchk;
        let (lba, count) = (self.lba.to_be_bytes(), self.blocks.to_be_bytes());
        let mut cdb = vec![0; usize::from(self.size)];
        match self.size {
            6 => {
                cdb[..4].copy_from_slice(&[opcodes[0], lba[5] & 0x1f, lba[6], lba[7]]);
                cdb[4] = count[3];
            }
            10 => {
                cdb[..2].copy_from_slice(&[opcodes[1], flags]);
                cdb[2..6].copy_from_slice(&lba[4..]);
                cdb[7..9].copy_from_slice(&count[2..]);
            }
            12 => {
                cdb[..2].copy_from_slice(&[opcodes[2], flags]);
                cdb[2..6].copy_from_slice(&lba[4..]);
                cdb[6..10].copy_from_slice(&count);
            }
            16 => {
                cdb[..2].copy_from_slice(&[opcodes[3], flags]);
                cdb[2..10].copy_from_slice(&lba);
                cdb[10..14].copy_from_slice(&count);
            }
            _ => {
                cdb[0] = 0x7f;
                cdb[7] = 0x18;
                cdb[8..10].copy_from_slice(&action.to_be_bytes());
                cdb[10] = flags;
                cdb[12..20].copy_from_slice(&lba);
                cdb[20..24].copy_from_slice(&self.reference.to_be_bytes());
                cdb[24..26].copy_from_slice(&self.app.0.to_be_bytes());
                cdb[26..28].copy_from_slice(&self.app.1.to_be_bytes());
                cdb[28..].copy_from_slice(&count);
            }
        }
        cdb
    }

    /// Blocks that go to the disk.
    pub fn blocks_out(&self) -> u32 {
        match self.kind {
            Kind::Read | Kind::Verify(0) => 0,
            Kind::Verify(3) | Kind::WriteSame => 1,
            _ => self.blocks,
        }
    }

    /// Whether it changes the disk when it ends well.
    pub fn writes(&self) -> bool {
        matches!(self.kind, Kind::Write | Kind::WriteVerify | Kind::WriteSame)
    }
}

/// How protection information gets to the disk and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Carriage {
    /// In a list of its own.
    Beside,
    /// Behind each block, in the same buffer.
    Between,
    /// The disk has protection information, and this way to it does not carry it.
    Nowhere,
}

/// What the disk says of itself.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// INQUIRY's vendor and product identification.
    pub name: String,
    /// Logical blocks.
    pub blocks: u64,
    /// Bytes of a logical block.
    pub block_size: usize,
    /// INQUIRY's PROTECT bit.
    pub protect: bool,
    /// READ CAPACITY(16)'s PROT_EN and P_TYPE as the number of the type, 0 for none.
    pub pi_type: u8,
    /// The extended INQUIRY data page (VPD 86h), if there is one: bytes 4 and 5.
    pub extended: Option<(u8, u8)>,
    /// The control mode page (0Ah), if there is one.
    pub control: Option<Vec<u8>>,
    /// How protection information travels.
    pub carriage: Carriage,
}

impl Facts {
    /// GRD_CHK: guards are checked when a read says nothing of protection.
    pub fn guard_checked(&self) -> bool {
        self.extended.is_some_and(|(spt, _)| spt & 4 != 0)
    }

    /// REF_CHK.
    pub fn reference_checked(&self) -> bool {
        self.extended.is_some_and(|(spt, _)| spt & 1 != 0)
    }
}

/// A disk under test.
pub struct Disk {
    initiator: Box<dyn Initiator>,
    /// What it says of itself.
    pub facts: Facts,
}

impl Disk {
    /// Asks the disk what it is. **Overwrites its first block** to see whether protection information gets through.
    ///
    /// # Errors
    /// If it is no disk.
    pub fn look(initiator: Box<dyn Initiator>) -> Result<Disk, ConformanceError> {
        let facts = Facts {
            name: String::new(),
            blocks: 0,
            block_size: 0,
            protect: false,
            pi_type: 0,
            extended: None,
            control: None,
            carriage: Carriage::Nowhere,
        };
        let mut disk = Disk { initiator, facts };
        // INQUIRY (SPC-5 6.6), READ CAPACITY (16) (SBC-4 5.21), MODE SENSE (6) (SPC-5 6.13).
        let inquiry = disk.must("INQUIRY", &[0x12, 0, 0, 0, 96, 0], 96)?;
        let text = String::from_utf8_lossy(inquiry.get(8..32).unwrap_or_default()).into_owned();
        disk.facts.name = text.split_whitespace().collect::<Vec<_>>().join(" ");
        disk.facts.protect = inquiry.get(5).is_some_and(|b| b & 1 != 0);
        let cdb = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        let capacity = disk.must("READ CAPACITY (16)", &cdb, 32)?;
        let word = |from: usize, to: usize| {
            capacity.get(from..to).unwrap_or_default().iter().fold(0u64, |n, b| n << 8 | u64::from(*b))
        };
        disk.facts.blocks = word(0, 8).saturating_add(1);
        disk.facts.block_size = word(8, 12) as usize;
        let protection = word(12, 13) as u8;
        disk.facts.pi_type = if protection & 1 != 0 { (protection >> 1 & 7) + 1 } else { 0 };
        if !matches!(disk.facts.block_size, 512 | 4096) || disk.facts.blocks < 64 {
            return Err(ConformanceError::Unusable {
                what: "a disk of at least 64 blocks of 512 or 4096 bytes is needed",
                answer: format!("{} blocks of {}", disk.facts.blocks, disk.facts.block_size),
            });
        }
        let page = disk.command(&[0x12, 1, 0x86, 0, 64, 0], Wire::In(64, 0))?;
        disk.facts.extended = (page.status == 0 && page.data.len() > 5).then(|| (page.data[4], page.data[5]));
        disk.facts.control = disk.mode_page(0x0a)?;
        disk.facts.carriage = disk.carriage()?;
        Ok(disk)
    }

    fn must(&mut self, what: &'static str, cdb: &[u8], room: usize) -> Result<Vec<u8>, ConformanceError> {
        let answer = self.command(cdb, Wire::In(room, 0))?;
        if answer.status != 0 {
            return Err(ConformanceError::Unusable { what, answer: answer.words() });
        }
        Ok(answer.data)
    }

    /// The current values of a mode page, from its page code on.
    pub(super) fn mode_page(&mut self, page: u8) -> Result<Option<Vec<u8>>, ConformanceError> {
        let answer = self.command(&[0x1a, 8, page, 0, 252, 0], Wire::In(252, 0))?;
        let skip = 4 + answer.data.get(3).map_or(0, |n| usize::from(*n));
        let body = answer.data.get(skip..).unwrap_or_default();
        let len = body.get(1).map_or(0, |n| 2 + usize::from(*n));
        Ok((answer.status == 0).then(|| body.get(..len).map(<[u8]>::to_vec)).flatten())
    }

    /// The form of READ and WRITE that may carry protection information: type 2 wants the 32-byte one.
    pub fn form(&self) -> u8 {
        if self.facts.pi_type == 2 { 32 } else { 16 }
    }

    /// A tuple that nobody would make up, written and read unchecked, shows whether tuples get through.
    fn carriage(&mut self) -> Result<Carriage, ConformanceError> {
        if self.initiator.separate() {
            return Ok(Carriage::Beside);
        }
        if self.facts.pi_type == 0 {
            return Ok(Carriage::Nowhere);
        }
        self.facts.carriage = Carriage::Between;
        let data: Vec<u8> = (0..self.facts.block_size).map(|i| i as u8 ^ 0x5a).collect();
        let odd = Tuple { guard: 0x1234, app: 0x5678, reference: 0 };
        let form = self.form();
        let written = self.run(&Op::new(Kind::Write, form, 3, 0, 1), &data, &[odd])?;
        let read = self.run(&Op::new(Kind::Read, form, 3, 0, 1), &[], &[])?;
        let through = written.status == 0 && read.status == 0 && read.tuples == odd.bytes();
        Ok(if through { Carriage::Between } else { Carriage::Nowhere })
    }

    /// Sends a command; a unit attention is taken note of, and the command sent again.
    ///
    /// # Errors
    /// If it was not delivered or not answered.
    pub fn command(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError> {
        let mut answer = self.initiator.send(cdb, wire)?;
        for _ in 0..8 {
            if answer.codes().is_none_or(|(key, ..)| key != 6) {
                break;
            }
            answer = self.initiator.send(cdb, wire)?;
        }
        Ok(answer)
    }

    /// Runs a block command. `data` has its blocks out, `tuples` one for each of them; what comes in is taken apart again.
    ///
    /// # Errors
    /// If it was not delivered or not answered.
    pub fn run(&mut self, op: &Op, data: &[u8], tuples: &[Tuple]) -> Result<Answer, ConformanceError> {
        let size = self.facts.block_size;
        let cdb = op.cdb();
        let carried = op.protect != 0 && self.facts.pi_type != 0;
        let carriage = if carried { self.facts.carriage } else { Carriage::Nowhere };
        let out = op.blocks_out() as usize;
        debug_assert_eq!((data.len(), out == 0 || !carried || tuples.len() == out), (out * size, true));
        if out > 0 {
            let bytes: Vec<u8> = tuples.iter().flat_map(|t| t.bytes()).collect();
            return match carriage {
                Carriage::Nowhere => self.command(&cdb, Wire::Out(data, &[])),
                Carriage::Beside => self.command(&cdb, Wire::Out(data, &bytes)),
                Carriage::Between => {
                    let pairs = data.chunks(size).zip(bytes.chunks(tuples::LEN));
                    let mixed: Vec<u8> = pairs.flat_map(|(d, t)| d.iter().chain(t)).copied().collect();
                    self.command(&cdb, Wire::Out(&mixed, &[]))
                }
            };
        }
        if op.kind != Kind::Read || op.blocks == 0 {
            return self.command(&cdb, Wire::None);
        }
        let blocks = op.blocks as usize;
        match carriage {
            Carriage::Nowhere => self.command(&cdb, Wire::In(blocks * size, 0)),
            Carriage::Beside => self.command(&cdb, Wire::In(blocks * size, blocks * tuples::LEN)),
            Carriage::Between => {
                let mut answer = self.command(&cdb, Wire::In(blocks * (size + tuples::LEN), 0))?;
                let mixed = std::mem::take(&mut answer.data);
                for unit in mixed.chunks_exact(size + tuples::LEN) {
                    answer.data.extend_from_slice(&unit[..size]);
                    answer.tuples.extend_from_slice(&unit[size..]);
                }
                Ok(answer)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cdb_has_its_fields_where_sbc_4_puts_them() {
        let op = Op { app: (0x1122, 0x3344), ..Op::new(Kind::Read, 32, 5, 0x0102_0304_0506, 7) };
        let cdb = op.cdb();
        assert_eq!(cdb[..12], [0x7f, 0, 0, 0, 0, 0, 0, 0x18, 0, 9, 0xa0, 0]);
        assert_eq!(cdb[12..20], [0, 0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(cdb[20..], [3, 4, 5, 6, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 7]);
        assert_eq!(Op::new(Kind::Verify(1), 10, 1, 9, 2).cdb(), [0x2f, 0x22, 0, 0, 0, 9, 0, 0, 2, 0]);
        assert_eq!(Op::new(Kind::Write, 6, 0, 0x1f_0203, 4).cdb(), [0x0a, 0x1f, 2, 3, 4, 0]);
        assert_eq!(Op::new(Kind::Write, 12, 3, 5, 6).cdb(), [0xaa, 0x60, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0]);
        assert_eq!(Op::new(Kind::WriteSame, 16, 1, 5, 6).cdb()[..2], [0x93, 0x20]);
        assert!(!Op::new(Kind::WriteSame, 12, 0, 0, 1).exists());
    }
}
