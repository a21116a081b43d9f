//! The guard: CRC-16/T10-DIF (polynomial 8BB7h, initial value 0, not reflected, no final XOR; SBC-4 4.21.4.2), and what is
//! done with guards at the speed of memory: making tuples, comparing them with stored ones, and both while blocks are copied.
//!
//! There are several kernels, and all give the same numbers. [`Guard::best`] picks the fastest that this machine runs;
//! tests and benches name one. Called by [`super::check`]; `docs/guard.md` has the mathematics and the figures.

#![allow(unsafe_code)]

mod blocks;
#[cfg(target_arch = "x86_64")]
mod clmul;
mod engine;
#[cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]
mod gfni;
#[doc(hidden)]
pub mod isal;
#[cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]
mod lanes;
mod slice;
mod tags;
#[cfg(test)]
mod tests;
#[cfg_attr(not(any(test, target_arch = "x86_64")), allow(dead_code))]
mod weights;

use std::{
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use crc_fast::CrcAlgorithm;

use super::tuple::TUPLE_LEN;
use crate::{sys::mem::Buffer, units::BlockSize};
use engine::{Each, Generate, Job, OneByOne, Verify, drive};

pub use blocks::Blocks;
pub use tags::{Mask, Tags};

/// A way to compute guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// GFNI's bit matrices on 512-bit registers, eight blocks at once: Ice Lake, Zen 4 and later.
    Gfni,
    /// Carry-less multiplication on 256-bit registers: processors with VPCLMULQDQ and AVX2, such as Zen 3 and Alder Lake.
    Clmul,
    /// The crate `crc-fast`: carry-less multiplication where the processor has it.
    Fast,
    /// Sixteen tables, sixteen bytes at a time: any processor.
    Slice16,
    /// [`Kernel::Gfni`]'s sequence of operations in plain Rust.
    #[cfg(test)]
    GfniInPlainRust,
}

/// A kernel that this machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard(Kernel);

impl Kernel {
    /// Every kernel there is, the fastest first.
    pub const ALL: [Kernel; 4] = [Kernel::Gfni, Kernel::Clmul, Kernel::Fast, Kernel::Slice16];

    /// Its name, as `TCMU_DIF_GUARD` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Kernel::Gfni => "gfni",
            Kernel::Clmul => "vpclmulqdq",
            Kernel::Fast => "crc-fast",
            Kernel::Slice16 => "slice16",
            #[cfg(test)]
            Kernel::GfniInPlainRust => "gfni in plain Rust",
        }
    }

    /// Whether this machine runs it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kernel::Gfni => gfni::Native::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Clmul => clmul::Clmul::new().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            Kernel::Gfni | Kernel::Clmul => false,
            // Without carry-less multiplication the crate falls back to a table of its own.
            Kernel::Fast | Kernel::Slice16 => true,
            #[cfg(test)]
            Kernel::GfniInPlainRust => true,
        }
    }
}

/// Of kernels with what they cost, the one that is to be taken. Processors run them in the order they are listed in, the fastest first; an emulated
/// one may have a long way to go for each of the instructions that a real one is fast with, and is then better off without. To be taken
/// before one that comes first a kernel has to be a quarter faster.
fn fastest_of(kernels: impl Iterator<Item = (Guard, Duration)>) -> Guard {
    let better = |best: (Guard, Duration), next: (Guard, Duration)| match next.1 * 5 < best.1 * 4 {
        true => next,
        false => best,
    };
    kernels.reduce(better).map_or(Guard(Kernel::Slice16), |(guard, _)| guard)
}

impl Guard {
    /// The kernel that the environment variable `TCMU_DIF_GUARD` names, if it can be run, or the fastest, which is found out once.
    pub fn best() -> Guard {
        static FASTEST: OnceLock<Guard> = OnceLock::new();
        let fastest = || *FASTEST.get_or_init(|| fastest_of(Guard::all().map(|guard| (guard, guard.cost()))));
        let Some(named) = std::env::var_os("TCMU_DIF_GUARD") else { return fastest() };
        Guard::all().find(|g| named == g.kernel().name()).unwrap_or_else(|| {
            let fastest = fastest();
            tracing::warn!(
                TCMU_DIF_GUARD = %named.display(),
                instead = fastest.kernel().name(),
                "this machine runs no guard kernel of that name"
            );
            fastest
        })
    }

    /// Every kernel that this machine runs, the fastest first.
    pub fn all() -> impl Iterator<Item = Guard> {
        Kernel::ALL.into_iter().filter(|k| k.available()).map(Guard)
    }

    /// What it takes for 16 blocks of 512 bytes: the least of a few rounds, since what comes on top is other work of the machine.
    fn cost(self) -> Duration {
        let data = Buffer::zeroed(16 * 512);
        let sg = data.sg();
        let round = |_| {
            let begun = Instant::now();
            self.guards(Blocks::of(&sg, BlockSize::B512), |_, guard| {
                black_box(guard);
            });
            begun.elapsed()
        };
        (0..5).map(round).min().unwrap_or_default()
    }

    /// Which it is.
    pub fn kernel(self) -> Kernel {
        self.0
    }

    /// Calls `each` with the index and the guard of every block, in order.
    pub fn guards(self, data: Blocks<'_>, each: impl FnMut(usize, u16)) {
        self.run(data, None, Each(each));
    }

    /// Makes the tuples of the blocks, eight bytes each, big-endian ([`super::tuple`]).
    ///
    /// # Panics
    /// If `out` does not have eight bytes a block.
    pub fn generate(self, data: Blocks<'_>, tags: Tags, out: &mut [u8]) {
        assert_eq!(out.len(), data.count() * TUPLE_LEN, "as many tuples as there are blocks");
        self.run(data, None, Generate { tags, out });
    }

    /// Compares the blocks with stored tuples, under a mask of the bits that count. Calls `suspect` with the index and the guard
    /// of each block that differs, or whose application tag is FFFFh so that it may be the escape; in order. All the
    /// others match.
    ///
    /// # Panics
    /// If `stored` does not have eight bytes a block.
    pub fn verify(
        self,
        data: Blocks<'_>,
        tags: Tags,
        mask: Mask,
        stored: &[u8],
        suspect: impl FnMut(usize, u16),
    ) {
        assert_eq!(stored.len(), data.count() * TUPLE_LEN, "as many tuples as there are blocks");
        self.run(data, None, Verify { tags, mask, stored, suspect });
    }

    /// Copies the blocks and makes their tuples meanwhile: as [`Guard::generate`].
    ///
    /// # Panics
    /// If `to` does not have as many blocks of the same size, or `out` not eight bytes for each.
    pub fn copy_and_generate(self, from: Blocks<'_>, to: Blocks<'_>, tags: Tags, out: &mut [u8]) {
        assert_eq!(out.len(), from.count() * TUPLE_LEN, "as many tuples as there are blocks");
        self.run(from, Some(to), Generate { tags, out });
    }

    /// Copies the blocks and compares them with stored tuples meanwhile: as [`Guard::verify`].
    ///
    /// # Panics
    /// If `to` does not have as many blocks of the same size, or `stored` not eight bytes for each.
    pub fn copy_and_verify(
        self,
        from: Blocks<'_>,
        to: Blocks<'_>,
        tags: Tags,
        mask: Mask,
        stored: &[u8],
        suspect: impl FnMut(usize, u16),
    ) {
        assert_eq!(stored.len(), from.count() * TUPLE_LEN, "as many tuples as there are blocks");
        self.run(from, Some(to), Verify { tags, mask, stored, suspect });
    }

    fn run<J: Job>(self, from: Blocks<'_>, to: Option<Blocks<'_>>, job: J) {
        let fits = to.is_none_or(|to| to.count() == from.count() && to.bytes() == from.bytes());
        assert!(fits, "as many blocks to copy to as there are to copy");
        let fast = |block: &[u8]| crc_fast::checksum(CrcAlgorithm::Crc16T10Dif, block) as u16;
        // SAFETY: a wide kernel is made only where the processor has its features, and the others need none. That `to` has as
        // many blocks has been seen to; should it be the same memory, then the copy makes no sense but is sound, because
        // all access is by pointer and allows for it.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Kernel::Gfni => {
                    if let Some(kernel) = gfni::Native::new() {
                        return kernel.run(from, to, job);
                    }
                }
                #[cfg(target_arch = "x86_64")]
                Kernel::Clmul => {
                    if let Some(kernel) = clmul::Clmul::new() {
                        return kernel.run(from, to, job);
                    }
                }
                #[cfg(test)]
                Kernel::GfniInPlainRust => return drive(gfni::Gfni::plain(), from, to, job),
                Kernel::Fast => return drive(OneByOne(fast), from, to, job),
                _ => (),
            }
            drive(OneByOne(|block| slice::update(0, block)), from, to, job);
        }
    }
}
