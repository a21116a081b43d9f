//! A guest that writes blocks with numbers, so that one which comes back older than it was answered is noticed.

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant},
};

use tcmu_dif::peer::kernel::Data;

use super::goes::Side;

pub const SIZE: u64 = 24 << 20;
/// Places that are written as a whole, with a number.
pub const SLOTS: usize = 768;
pub const SLOT: usize = SIZE as usize / SLOTS;

impl Side {
    /// What stands in that place.
    pub fn number_in(&self, slot: usize) -> u64 {
        let (status, data) = self.run(&command(0x28, slot), Data::In(SLOT));
        assert_eq!(status, 0, "{slot}");
        let number = u64::from_be_bytes(data[..8].try_into().unwrap());
        assert!(data == content(slot, number), "place {slot} is torn: it begins with {number}");
        number
    }

    /// Nothing that was answered is older or gone, and nothing is there that nobody wrote.
    pub fn compare(&self, numbers: &Numbers) {
        for slot in 0..SLOTS {
            let (is, known) = (self.number_in(slot), numbers.answered[slot]);
            let may = numbers.pending.get(&slot);
            assert!(is == known || Some(&is) == may, "place {slot}: {is}, and not {known} (or {may:?})");
        }
    }
}

pub fn command(opcode: u8, slot: usize) -> Vec<u8> {
    let mut cdb = vec![opcode, 0];
    cdb.extend(((slot * SLOT / 512) as u32).to_be_bytes());
    cdb.push(0);
    cdb.extend(((SLOT / 512) as u16).to_be_bytes());
    cdb.push(0);
    cdb
}

/// Zeros for the number 0: a place that was unmapped.
fn content(slot: usize, number: u64) -> Vec<u8> {
    let slot = if number == 0 { 0 } else { slot as u64 };
    [number.to_be_bytes(), slot.to_be_bytes()].concat().repeat(SLOT / 16)
}

/// What a guest knows of its disk.
#[derive(Debug, Clone)]
pub struct Numbers {
    /// The last one that was answered, of each place.
    pub answered: Vec<u64>,
    /// One that was not.
    pub pending: HashMap<usize, u64>,
    next: u64,
    /// Places are unmapped too, whose number is 0 then.
    pub unmaps: bool,
}

impl Numbers {
    pub fn none() -> Numbers {
        Numbers { answered: vec![0; SLOTS], pending: HashMap::new(), next: 1, unmaps: true }
    }

    /// What there is on a LUN that nobody else uses.
    pub fn as_it_is(side: &Side) -> Numbers {
        let answered: Vec<u64> = (0..SLOTS).map(|slot| side.number_in(slot)).collect();
        let next = answered.iter().max().map_or(1, |n| n + 1);
        Numbers { answered, pending: HashMap::new(), next, unmaps: true }
    }
}

/// A guest that writes and unmaps, up to eight commands at a time.
pub struct Guest<'a> {
    side: &'a Side,
    numbers: &'a mut Numbers,
    under_way: HashMap<u16, usize>,
}

impl<'a> Guest<'a> {
    pub fn of(side: &'a Side, numbers: &'a mut Numbers) -> Guest<'a> {
        numbers.pending.clear();
        Guest { side, numbers, under_way: HashMap::new() }
    }

    /// Takes the answers that are there.
    fn hear(&mut self) {
        for done in self.side.kernel.borrow_mut().ended().unwrap() {
            let slot = self.under_way.remove(&done.id).unwrap();
            assert_eq!(done.status, 0, "the guest has met an error: {done:?}");
            self.numbers.answered[slot] = self.numbers.pending.remove(&slot).unwrap();
        }
    }

    /// Takes answers, and begins as much as may be under way.
    pub fn turn(&mut self) {
        self.hear();
        let mut kernel = self.side.kernel.borrow_mut();
        while self.under_way.len() < 8 {
            let n = self.numbers.next;
            self.numbers.next += 1;
            let slot = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % SLOTS;
            if self.numbers.pending.contains_key(&slot) {
                continue;
            }
            let number = if self.numbers.unmaps && n.is_multiple_of(9) { 0 } else { n };
            let id = match number {
                0 => {
                    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
                    list.extend(((slot * SLOT / 512) as u64).to_be_bytes());
                    list.extend(((SLOT / 512) as u32).to_be_bytes());
                    list.extend([0; 4]);
                    kernel.submit(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Data::Out(&list)).unwrap()
                }
                n => kernel.submit(&command(0x2a, slot), Data::Out(&content(slot, n))).unwrap(),
            };
            self.numbers.pending.insert(slot, number);
            self.under_way.insert(id, slot);
        }
    }

    /// Waits until all that is under way is answered.
    pub fn drain(&mut self) {
        let end = Instant::now() + Duration::from_secs(30);
        while !self.under_way.is_empty() {
            assert!(Instant::now() < end, "commands have no answer");
            thread::sleep(Duration::from_micros(300));
            self.hear();
        }
    }

    /// Some commands, all of which are answered.
    pub fn turns(&mut self, n: usize) {
        for _ in 0..n {
            self.turn();
            thread::sleep(Duration::from_micros(300));
        }
        self.drain();
    }
}

/// Writes every place once.
pub fn fill(side: &Side) -> Numbers {
    let mut numbers = Numbers::none();
    for slot in 0..SLOTS {
        let n = numbers.next;
        numbers.next += 1;
        assert_eq!(side.run(&command(0x2a, slot), Data::Out(&content(slot, n))).0, 0);
        numbers.answered[slot] = n;
    }
    numbers
}
