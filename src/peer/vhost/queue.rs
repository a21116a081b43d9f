//! The driver's half of the request queue: a command becomes a chain of descriptors, a used element becomes a completion.
//!
//! Every command in flight has a slot: 16 descriptors of its own, a request, a response, and room for its data. So nothing
//! is allocated while commands run, and a slot's number is the head of its chain.

use std::collections::VecDeque;

use super::{Completion, Memory, Transfer, VhostError};
use crate::sys::vhost::Vring;

/// Commands in flight.
pub(super) const SLOTS: usize = 64;
/// Descriptors of a slot: request, response, and up to 14 pieces of data.
const CHAIN: usize = 16;
/// The third queue of virtio-scsi (5.6.2): control, event, request.
pub(super) const REQUEST_QUEUE: usize = 2;
/// Bytes of data a command may move.
pub const MAX_DATA: usize = 256 << 10;
/// Bytes of protection information a command may move.
pub const MAX_PI: usize = MAX_DATA / 512 * 8;
/// Data is cut into pieces of at most this, and a first one that is shorter: fabrics see scatter lists, not one run.
const PIECE: usize = 32 << 10;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;

/// `struct virtio_scsi_cmd_req`: LUN (8), tag (8), task attribute, priority, CRN, CDB (32).
const REQUEST: usize = 51;
/// `struct virtio_scsi_cmd_req_pi`, for every command once VIRTIO_SCSI_F_T10_PI is settled: before the CDB, `pi_bytesout` and
/// `pi_bytesin` (32 bits each). Protection information stands before the data of its direction.
const REQUEST_PI: usize = REQUEST + 8;
const PI_BYTES_AT: usize = 19;
const CDB_SIZE: usize = 32;
/// `struct virtio_scsi_cmd_resp`: sense length (4), residual (4), qualifier (2), status, response, sense (96).
const RESPONSE: usize = 108;
const SENSE_SIZE: usize = 96;
/// Bytes that a request and a response take up.
const HEADER_ROOM: usize = 256;
const RESPONSE_AT: usize = 128;

/// Where everything lies in the memory.
pub(super) struct Layout {
    pub rings: [Vring; 3],
    headers: u64,
    data: u64,
    pi: u64,
    pub total: usize,
}

impl Layout {
    pub(super) fn new() -> Layout {
        let ring = |at: u64, num: u16| {
            let avail = at + 16 * u64::from(num);
            let used = (avail + 6 + 2 * u64::from(num)).next_multiple_of(4096);
            (Vring { num, desc: at, avail, used }, (used + 6 + 8 * u64::from(num)).next_multiple_of(4096))
        };
        let (control, at) = ring(0, 8);
        let (event, at) = ring(at, 8);
        let (request, headers) = ring(at, (SLOTS * CHAIN) as u16);
        let data = headers + (SLOTS * HEADER_ROOM) as u64;
        let pi = data + (SLOTS * MAX_DATA) as u64;
        let total = pi as usize + SLOTS * MAX_PI;
        Layout { rings: [control, event, request], headers, data, pi, total }
    }
}

struct Pending {
    tag: u64,
    data_in: usize,
    pi_in: usize,
}

/// The request queue.
pub(super) struct Queue {
    memory: Memory,
    ring: Vring,
    headers: u64,
    data: u64,
    pi: u64,
    /// VIRTIO_SCSI_F_T10_PI is settled.
    with_pi: bool,
    guest_base: u64,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    avail: u16,
    used: u16,
    next_tag: u64,
}

impl Queue {
    pub(super) fn new(memory: Memory, layout: &Layout, guest_base: u64, with_pi: bool) -> Queue {
        Queue {
            memory,
            ring: layout.rings[REQUEST_QUEUE],
            headers: layout.headers,
            data: layout.data,
            pi: layout.pi,
            with_pi,
            guest_base,
            pending: (0..SLOTS).map(|_| None).collect(),
            free: (0..SLOTS).rev().collect(),
            avail: 0,
            used: 0,
            next_tag: 1,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        SLOTS - self.free.len()
    }

    /// Makes a command's chain and puts it into the available ring.
    pub(super) fn push(&mut self, target: u8, cdb: &[u8], transfer: Transfer<'_>) -> Result<u64, VhostError> {
        let (out, room, pi_out, pi_room) = transfer.parts();
        let (len, pi_len) = (out.len().max(room), pi_out.len().max(pi_room));
        if cdb.is_empty() || cdb.len() > CDB_SIZE {
            return Err(VhostError::Command("a CDB has 1 to 32 bytes"));
        }
        if len > MAX_DATA || pi_len > MAX_PI {
            return Err(VhostError::Command("more data than a slot holds"));
        }
        if pi_len > 0 && !self.with_pi {
            return Err(VhostError::Command("protection information is not settled with the device"));
        }
        let slot = self.free.pop().ok_or(VhostError::Command("too many are in flight"))?;
        let tag = self.next_tag;
        self.next_tag += 1;

        let mut request = [0u8; REQUEST_PI];
        // 5.6.6.1: byte 0 is 1, byte 1 the target, bytes 2 and 3 the LUN in flat format.
        request[..4].copy_from_slice(&[1, target, 0x40, 0]);
        request[8..16].copy_from_slice(&tag.to_le_bytes());
        let (cdb_at, request_len) = if self.with_pi {
            let [from, mid, to] = [PI_BYTES_AT, PI_BYTES_AT + 4, PI_BYTES_AT + 8];
            request[from..mid].copy_from_slice(&(pi_out.len() as u32).to_le_bytes());
            request[mid..to].copy_from_slice(&(pi_room as u32).to_le_bytes());
            (to, REQUEST_PI)
        } else {
            (PI_BYTES_AT, REQUEST)
        };
        request[cdb_at..cdb_at + cdb.len()].copy_from_slice(cdb);
        let header = self.headers + (slot * HEADER_ROOM) as u64;
        let response = header + RESPONSE_AT as u64;
        let data = self.data + (slot * MAX_DATA) as u64;
        let pi = self.pi + (slot * MAX_PI) as u64;
        self.put(header, &request[..request_len])?;
        self.put(response, &[0xff; RESPONSE])?;
        self.put(data, out)?;
        self.put(pi, pi_out)?;

        let mut chain = vec![(header, request_len, 0)];
        let writable = room > 0;
        if writable || len == 0 {
            chain.push((response, RESPONSE, DESC_F_WRITE));
        }
        let flags = if writable { DESC_F_WRITE } else { 0 };
        if pi_len > 0 {
            chain.push((pi, pi_len, flags));
        }
        pieces(tag, len, |at, n| chain.push((data + at as u64, n, flags)));
        if !writable && len > 0 {
            chain.push((response, RESPONSE, DESC_F_WRITE));
        }
        let head = slot * CHAIN;
        let last = chain.len() - 1;
        for (i, (at, n, flags)) in chain.into_iter().enumerate() {
            let mut desc = [0u8; 16];
            desc[..8].copy_from_slice(&(self.guest_base + at).to_le_bytes());
            desc[8..12].copy_from_slice(&(n as u32).to_le_bytes());
            let flags = if i < last { flags | DESC_F_NEXT } else { flags };
            desc[12..14].copy_from_slice(&flags.to_le_bytes());
            desc[14..].copy_from_slice(&((head + i + 1) as u16).to_le_bytes());
            self.put(self.ring.desc + 16 * (head + i) as u64, &desc)?;
        }
        let entry = u64::from(self.avail % self.ring.num);
        self.put(self.ring.avail + 4 + 2 * entry, &(head as u16).to_le_bytes())?;
        self.avail = self.avail.wrapping_add(1);
        self.pending[slot] = Some(Pending { tag, data_in: room, pi_in: pi_room });
        // Flags (0) and index are one little-endian word; the device sees the entry before the index.
        self.memory.store_release(self.ring.avail, u32::from(self.avail) << 16);
        Ok(tag)
    }

    /// Takes what the device has finished.
    pub(super) fn take_used(&mut self, done: &mut VecDeque<Completion>) -> Result<(), VhostError> {
        let index = (self.memory.load_acquire(self.ring.used) >> 16) as u16;
        if usize::from(index.wrapping_sub(self.used)) > self.in_flight() {
            return Err(VhostError::Ring("more completions than commands"));
        }
        while self.used != index {
            let mut element = [0u8; 8];
            let at = self.ring.used + 4 + 8 * u64::from(self.used % self.ring.num);
            self.get(at, &mut element)?;
            self.used = self.used.wrapping_add(1);
            let head = le32(&element, 0) as usize;
            let slot = head / CHAIN;
            let pending = match self.pending.get_mut(slot) {
                Some(pending) if head.is_multiple_of(CHAIN) => pending.take(),
                _ => None,
            };
            let pending = pending.ok_or(VhostError::Ring("a completion for no command in flight"))?;
            done.push_back(self.completion(slot, pending)?);
            self.free.push(slot);
        }
        Ok(())
    }

    fn completion(&self, slot: usize, pending: Pending) -> Result<Completion, VhostError> {
        let mut response = [0u8; RESPONSE];
        self.get(self.headers + (slot * HEADER_ROOM + RESPONSE_AT) as u64, &mut response)?;
        let sense_len = (le32(&response, 0) as usize).min(SENSE_SIZE);
        let residual = le32(&response, 4);
        let mut data = vec![0; pending.data_in.saturating_sub(residual as usize)];
        self.get(self.data + (slot * MAX_DATA) as u64, &mut data)?;
        let mut pi = vec![0; pending.pi_in];
        self.get(self.pi + (slot * MAX_PI) as u64, &mut pi)?;
        Ok(Completion {
            tag: pending.tag,
            response: response[11],
            status: response[10],
            sense: response[12..12 + sense_len].to_vec(),
            residual,
            data,
            pi,
        })
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), VhostError> {
        self.memory.write(at, bytes).then_some(()).ok_or(VhostError::Ring("outside our own memory"))
    }

    fn get(&self, at: u64, out: &mut [u8]) -> Result<(), VhostError> {
        self.memory.read(at, out).then_some(()).ok_or(VhostError::Ring("outside our own memory"))
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Cuts `len` bytes into at most 14 pieces. Every other command begins with a piece of some sectors only, so that later ones
/// straddle pages.
fn pieces(tag: u64, len: usize, mut piece: impl FnMut(usize, usize)) {
    let first = if tag.is_multiple_of(2) { 512 * (1 + tag as usize / 2 % 7) } else { PIECE };
    let (mut at, mut n) = (0, first);
    while at < len {
        n = n.min(len - at);
        piece(at, n);
        at += n;
        n = PIECE;
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use crate::sys::mem::Mapping;

    const BASE: u64 = 0x5000_0000;

    /// Pieces: offset, length, device-writable.
    type Chain = Vec<(u64, usize, bool)>;

    /// The device's half: reads chains as virtio 1.2, 2.7.5 has them, and answers.
    struct Device {
        memory: Memory,
        ring: Vring,
        seen: u16,
        used: u16,
    }

    impl Device {
        fn bytes(&self, at: u64, n: usize) -> Vec<u8> {
            let mut out = vec![0; n];
            assert!(self.memory.read(at, &mut out), "the device was sent outside the memory");
            out
        }

        /// The next chain and its head.
        fn next_chain(&mut self) -> Option<(u16, Chain)> {
            let index = (self.memory.load_acquire(self.ring.avail) >> 16) as u16;
            if index == self.seen {
                return None;
            }
            let entry = self.bytes(self.ring.avail + 4 + 2 * u64::from(self.seen % self.ring.num), 2);
            self.seen = self.seen.wrapping_add(1);
            let head = u16::from_le_bytes([entry[0], entry[1]]);
            let (mut chain, mut i) = (Vec::new(), head);
            loop {
                let d = self.bytes(self.ring.desc + 16 * u64::from(i), 16);
                let addr = u64::from_le_bytes(d[..8].try_into().unwrap());
                let flags = u16::from_le_bytes([d[12], d[13]]);
                chain.push((addr - BASE, le32(&d, 8) as usize, flags & DESC_F_WRITE != 0));
                if flags & DESC_F_NEXT == 0 {
                    return Some((head, chain));
                }
                i = u16::from_le_bytes([d[14], d[15]]);
            }
        }

        fn finish(&mut self, head: u32) {
            let mut element = [0; 8];
            element[..4].copy_from_slice(&head.to_le_bytes());
            let at = self.ring.used + 4 + 8 * u64::from(self.used % self.ring.num);
            assert!(self.memory.write(at, &element));
            self.used = self.used.wrapping_add(1);
            self.memory.store_release(self.ring.used, u32::from(self.used) << 16);
        }
    }

    fn pair() -> (Queue, Device) {
        pair_with(false)
    }

    fn pair_with(with_pi: bool) -> (Queue, Device) {
        let layout = Layout::new();
        let file = tempfile::tempfile().unwrap();
        file.set_len(layout.total as u64).unwrap();
        let memory = Mapping::new(&file, layout.total).unwrap();
        let ring = layout.rings[REQUEST_QUEUE];
        let device = Device { memory: Rc::clone(&memory), ring, seen: 0, used: 0 };
        (Queue::new(memory, &layout, BASE, with_pi), device)
    }

    #[test]
    fn a_device_finds_request_data_and_response_where_virtio_puts_them() {
        let (mut queue, mut device) = pair();
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let mut cdb = [0u8; 16];
        cdb[0] = 0x8a;
        for round in 0..3000u64 {
            let tag = queue.push(1, &cdb, Transfer::Out(&bytes)).unwrap();
            let (head, chain) = device.next_chain().unwrap();
            let request = device.bytes(chain[0].0, chain[0].1);
            assert_eq!(request.len(), REQUEST);
            assert_eq!(
                (&request[..4], u64::from_le_bytes(request[8..16].try_into().unwrap()), request[19]),
                (&[1, 1, 0x40, 0][..], tag, 0x8a)
            );
            let (response, data) = chain[1..].split_last().unwrap();
            assert!(data.iter().all(|d| !d.2) && response.2 && response.1 == RESPONSE, "round {round}");
            if round % 500 < 2 {
                let sent: Vec<u8> = data.iter().flat_map(|d| device.bytes(d.0, d.1)).collect();
                assert!(sent == bytes);
            }
            device.finish(u32::from(head));
            let mut done = VecDeque::new();
            queue.take_used(&mut done).unwrap();
            assert_eq!((done.len(), done[0].tag, queue.in_flight()), (1, tag, 0));
        }
    }

    #[test]
    fn protection_information_stands_before_the_data_of_its_direction() {
        let (mut queue, mut device) = pair_with(true);
        let (bytes, tuples) = (vec![7u8; 70_000], vec![9u8; 1096]);
        queue.push(1, &[0x8a, 0x20], Transfer::OutPi(&bytes, &tuples)).unwrap();
        let (head, chain) = device.next_chain().unwrap();
        let request = device.bytes(chain[0].0, chain[0].1);
        assert_eq!((request.len(), le32(&request, 19), le32(&request, 23)), (59, 1096, 0));
        assert_eq!(request[27..29], [0x8a, 0x20]);
        let (response, pieces) = chain[1..].split_last().unwrap();
        assert!(response.2 && pieces.iter().all(|d| !d.2));
        let sent: Vec<u8> = pieces.iter().flat_map(|d| device.bytes(d.0, d.1)).collect();
        assert_eq!(sent, [tuples.clone(), bytes].concat());
        device.finish(u32::from(head));

        queue.push(1, &[0x88, 0x20], Transfer::InPi(4096, 64)).unwrap();
        let (head, chain) = device.next_chain().unwrap();
        let request = device.bytes(chain[0].0, chain[0].1);
        assert_eq!((le32(&request, 19), le32(&request, 23)), (0, 64));
        assert_eq!(chain[2].1, 64);
        assert!(chain[1..].iter().all(|d| d.2));
        assert!(device.memory.write(chain[1].0, &[0; RESPONSE]));
        assert!(device.memory.write(chain[2].0, &[5; 64]));
        device.finish(u32::from(head));
        let mut done = VecDeque::new();
        queue.take_used(&mut done).unwrap();
        assert_eq!((done[1].pi.clone(), done[1].data.len()), (vec![5; 64], 4096));

        queue.push(1, &[0], Transfer::None).unwrap();
        let (_, chain) = device.next_chain().unwrap();
        assert_eq!((chain.len(), chain[0].1), (2, 59));
        let (mut without, _) = pair();
        let refused = without.push(1, &[0x88], Transfer::InPi(512, 8));
        assert!(matches!(refused, Err(VhostError::Command(_))));
    }

    #[test]
    fn out_of_order_answers_find_their_commands_and_short_reads_are_cut() {
        let (mut queue, mut device) = pair();
        let tags: Vec<u64> =
            (0..SLOTS).map(|_| queue.push(1, &[0x28], Transfer::In(8192)).unwrap()).collect();
        assert!(matches!(queue.push(1, &[0], Transfer::None), Err(VhostError::Command(_))));
        let mut chains: Vec<_> = std::iter::from_fn(|| device.next_chain()).collect();
        chains.reverse();
        for (head, chain) in &chains {
            let mut response = [0u8; RESPONSE];
            response[..8].copy_from_slice(&[18, 0, 0, 0, 0, 16, 0, 0]);
            response[10] = 2;
            response[12..15].copy_from_slice(&[0x70, 0, 0x5]);
            response[24] = 0x21;
            assert!(device.memory.write(chain[1].0, &response));
            assert!(device.memory.write(chain[2].0, &[*head as u8; 512]));
            device.finish(u32::from(*head));
        }
        let mut done = VecDeque::new();
        queue.take_used(&mut done).unwrap();
        assert_eq!(
            done.iter().map(|d| d.tag).collect::<Vec<_>>(),
            tags.into_iter().rev().collect::<Vec<_>>()
        );
        for (d, (head, _)) in done.iter().zip(&chains) {
            assert_eq!((d.status, d.sense_codes(), d.data.len()), (2, Some((5, 0x21, 0)), 4096));
            assert!(d.data[..512].iter().all(|b| *b == *head as u8));
        }
    }

    #[test]
    fn a_completion_for_nothing_in_flight_is_refused() {
        for head in [1, CHAIN as u32, 1 << 20] {
            let (mut queue, mut device) = pair();
            queue.push(1, &[0], Transfer::None).unwrap();
            device.finish(head);
            assert!(matches!(queue.take_used(&mut VecDeque::new()), Err(VhostError::Ring(_))), "{head}");
        }
        let (mut queue, mut device) = pair();
        device.finish(0);
        assert!(matches!(queue.take_used(&mut VecDeque::new()), Err(VhostError::Ring(_))));
    }
}
