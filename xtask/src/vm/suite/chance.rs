//! What goes wrong in a handover between two kernels, and what chooses it.

/// What goes wrong in a handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    SourceKilled,
    DestinationKilled,
    ReceiveKilled,
    Cut,
    LongCut,
    NoRoom,
}

impl Fault {
    pub const ALL: [Self; 6] = [
        Self::SourceKilled,
        Self::DestinationKilled,
        Self::ReceiveKilled,
        Self::Cut,
        Self::LongCut,
        Self::NoRoom,
    ];

    pub fn words(self) -> &'static str {
        match self {
            Self::SourceKilled => "the source's daemon killed",
            Self::DestinationKilled => "the destination's daemon killed",
            Self::ReceiveKilled => "receive killed",
            Self::Cut => "the network cut for seconds",
            Self::LongCut => "the network cut for longer than is waited",
            Self::NoRoom => "no room",
        }
    }
}

/// Chooses what is done when (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// All faults in some order.
    pub fn faults(&mut self) -> Vec<Fault> {
        let mut all = Fault::ALL.to_vec();
        for last in (1..all.len()).rev() {
            let with = usize::try_from(self.below(last as u64 + 1)).unwrap_or_default();
            all.swap(last, with);
        }
        all
    }
}
