//! How commands reach a disk: SG_IO, where protection information can only travel between the blocks, or a vhost-scsi
//! queue, which carries it beside them.

use std::{path::Path, time::Duration};

use super::ConformanceError;
use crate::{
    peer::vhost::{Transfer, VhostError, VhostInitiator},
    sys::sg::{self, SgDevice},
};

/// How long a command may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What a command moves, protection information apart.
#[derive(Debug, Clone, Copy)]
pub enum Wire<'a> {
    /// Nothing.
    None,
    /// Data, and protection information that belongs to it.
    Out(&'a [u8], &'a [u8]),
    /// Room for data, and for its protection information.
    In(usize, usize),
}

/// How a command ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// SAM-5 status.
    pub status: u8,
    /// Sense data.
    pub sense: Vec<u8>,
    /// Data that came in.
    pub data: Vec<u8>,
    /// Protection information that came in beside them.
    pub tuples: Vec<u8>,
}

impl Answer {
    /// Sense key, additional sense code and qualifier, from either format (SPC-5 4.4).
    pub fn codes(&self) -> Option<(u8, u8, u8)> {
        let s = &self.sense;
        match s.first()? & 0x7f {
            0x70 | 0x71 => Some((s.get(2)? & 0xf, *s.get(12)?, *s.get(13)?)),
            0x72 | 0x73 => Some((s.get(1)? & 0xf, *s.get(2)?, *s.get(3)?)),
            _ => None,
        }
    }

    /// Whether the sense data are in descriptor format.
    pub fn is_descriptor(&self) -> bool {
        self.sense.first().is_some_and(|b| matches!(b & 0x7f, 0x72 | 0x73))
    }

    /// INFORMATION, where it is valid.
    pub fn information(&self) -> Option<u64> {
        let s = &self.sense;
        let word = |b: &[u8]| b.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
        match s.first()? & 0x7f {
            0x70 | 0x71 if s[0] & 0x80 != 0 => Some(word(s.get(3..7)?)),
            0x72 | 0x73 => {
                let mut left = s.get(8..)?;
                loop {
                    let (kind, len) = (*left.first()?, usize::from(*left.get(1)?));
                    if kind == 0 && len >= 10 {
                        return (*left.get(2)? & 0x80 != 0)
                            .then(|| word(left.get(4..12).unwrap_or_default()));
                    }
                    left = left.get(2 + len..)?;
                }
            }
            _ => None,
        }
    }

    /// In words: `GOOD`, or status, sense and LBA.
    pub fn words(&self) -> String {
        let lba = self.information().map_or(String::new(), |n| format!(", information {n}"));
        match (self.status, self.codes()) {
            (0, _) => "GOOD".to_owned(),
            (2, Some((key, asc, ascq))) => format!("{key:02X}h/{asc:02X}h/{ascq:02X}h{lba}"),
            (status, Some((key, asc, ascq))) => {
                format!("status {status:02X}h, {key:02X}h/{asc:02X}h/{ascq:02X}h{lba}")
            }
            (status, None) => format!("status {status:02X}h"),
        }
    }
}

/// A way to a disk.
pub trait Initiator {
    /// Whether protection information travels beside the data; if not, it stands behind each block in the same buffer.
    fn separate(&self) -> bool;

    /// Sends one command.
    ///
    /// # Errors
    /// If it was not delivered or not answered.
    fn send(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError>;
}

fn transport(cdb: &[u8], source: impl std::error::Error + Send + Sync + 'static) -> ConformanceError {
    let cdb = cdb.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
    ConformanceError::Transport { cdb, source: Box::new(source) }
}

/// `/dev/sgN`.
pub struct SgInitiator(SgDevice);

impl SgInitiator {
    /// Opens it.
    ///
    /// # Errors
    /// What `open` says.
    pub fn open(path: &Path) -> std::io::Result<SgInitiator> {
        SgDevice::open(path).map(SgInitiator)
    }
}

impl Initiator for SgInitiator {
    fn separate(&self) -> bool {
        false
    }

    fn send(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError> {
        let mut room = match wire {
            Wire::In(data, _) => vec![0; data],
            _ => Vec::new(),
        };
        let data = match wire {
            Wire::None => sg::Data::None,
            Wire::Out(bytes, _) => sg::Data::Out(bytes),
            Wire::In(..) => sg::Data::In(&mut room),
        };
        let answer = self.0.execute(cdb, data, TIMEOUT).map_err(|e| transport(cdb, e))?;
        room.truncate(room.len().saturating_sub(answer.residual));
        Ok(Answer { status: answer.status, sense: answer.sense, data: room, tuples: Vec::new() })
    }
}

/// A vhost-scsi target, with VIRTIO_SCSI_F_T10_PI.
pub struct VhostPi(VhostInitiator);

impl VhostPi {
    /// Connects to it.
    ///
    /// # Errors
    /// As [`VhostInitiator::connect_with_pi`].
    pub fn connect(wwpn: &str) -> Result<VhostPi, VhostError> {
        VhostInitiator::connect_with_pi(wwpn).map(VhostPi)
    }
}

impl Initiator for VhostPi {
    fn separate(&self) -> bool {
        true
    }

    fn send(&mut self, cdb: &[u8], wire: Wire<'_>) -> Result<Answer, ConformanceError> {
        let transfer = match wire {
            Wire::None | Wire::Out([], _) | Wire::In(0, _) => Transfer::None,
            Wire::Out(data, []) => Transfer::Out(data),
            Wire::Out(data, tuples) => Transfer::OutPi(data, tuples),
            Wire::In(data, 0) => Transfer::In(data),
            Wire::In(data, tuples) => Transfer::InPi(data, tuples),
        };
        let tag = self.0.submit(cdb, transfer).map_err(|e| transport(cdb, e))?;
        let done = self.0.complete(TIMEOUT).map_err(|e| transport(cdb, e))?;
        if done.tag != tag || done.response != 0 {
            return Err(transport(cdb, std::io::Error::other(format!("virtio response {}", done.response))));
        }
        Ok(Answer { status: done.status, sense: done.sense, data: done.data, tuples: done.pi })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lba_is_found_in_both_formats_of_sense_data_and_only_where_it_is_valid() {
        let fixed = |first: u8| {
            let mut sense = vec![first, 0, 0x0b, 0, 1, 2, 3, 10, 0, 0, 0, 0, 0x10, 1, 0, 0, 0, 0];
            sense[0] = first;
            Answer { status: 2, sense, ..Answer::default() }
        };
        assert_eq!((fixed(0xf0).codes(), fixed(0xf0).information()), (Some((0xb, 0x10, 1)), Some(0x10203)));
        assert_eq!(fixed(0x70).information(), None);
        let mut sense = vec![0x72, 0xb, 0x10, 3, 0, 0, 0, 20];
        sense.extend([2, 6, 0, 0, 0, 0, 0, 0]);
        sense.extend([0, 10, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 9]);
        let answer = Answer { status: 2, sense, ..Answer::default() };
        assert_eq!((answer.codes(), answer.information()), (Some((0xb, 0x10, 3)), Some(0x1_0000_0009)));
        assert!(answer.is_descriptor() && !fixed(0xf0).is_descriptor());
    }
}
