//! A self-test of a LUN through `/dev/vhost-scsi`: who it is, random writes with many in flight, read back and compared, an
//! address beyond the end, and what it does per second. **It overwrites the first blocks of the LUN.**

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{Completion, MAX_IN_FLIGHT, Transfer, VhostError, VhostInitiator};

/// Most bytes that one random command moves.
const MAX_COMMAND: u64 = 64 << 10;
/// Mismatching blocks that are listed by their address.
const LISTED: usize = 16;

/// How much is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// Random writes.
    pub writes: u32,
    /// Commands in flight, at most [`MAX_IN_FLIGHT`].
    pub depth: usize,
    /// Bytes of the LUN that are written to, from its start.
    pub region: u64,
    /// What the random numbers begin with.
    pub seed: u64,
    /// How long one command may take.
    pub timeout: Duration,
    /// How long the reads are counted.
    pub measure: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            writes: 2000,
            depth: 32,
            region: 32 << 20,
            seed: 1,
            timeout: Duration::from_secs(60),
            measure: Duration::from_secs(1),
        }
    }
}

/// What the self-test found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The target.
    pub wwpn: String,
    /// INQUIRY's vendor identification.
    pub vendor: String,
    /// INQUIRY's product identification.
    pub product: String,
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks of the LUN.
    pub blocks: u64,
    /// Write commands that ended GOOD.
    pub writes: u32,
    /// The most commands in flight at a time.
    pub most_in_flight: usize,
    /// Blocks that were read back and compared.
    pub compared: u64,
    /// Blocks that came back wrong.
    pub mismatches: u64,
    /// The first of them.
    pub mismatching_lbas: Vec<u64>,
    /// Commands that did not end GOOD, in words; the first few.
    pub failures: Vec<String>,
    /// A read beyond the end was answered CHECK CONDITION, ILLEGAL REQUEST, LOGICAL BLOCK ADDRESS OUT OF RANGE (05h/21h/00h).
    pub out_of_range_refused: bool,
    /// What it was answered with.
    pub out_of_range_answer: String,
    /// Random reads of 4 KiB per second at that depth.
    pub read_iops: f64,
    /// All of the above is as it must be.
    pub ok: bool,
}

/// SplitMix64: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What a block holds that was written by that write.
fn fill(block: &mut [u8], seed: u64, lba: u64, write: u32) {
    let mut random = Random(seed ^ lba.rotate_left(32) ^ u64::from(write));
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// A command under way.
#[derive(Clone, Copy)]
struct Work {
    lba: u64,
    blocks: u64,
    /// The number of the write; 0 for a read.
    write: u32,
}

struct Test<'a> {
    lun: VhostInitiator,
    options: &'a Options,
    random: Random,
    report: Report,
    /// Blocks that are written to.
    region: u64,
    /// Which write each of them was last written by, 0 for none.
    model: Vec<u32>,
    under_way: HashMap<u64, Work>,
}

/// Tests LUN 0 of the target, destroying what its first blocks hold.
///
/// # Errors
/// If there is no connection, a command is not answered in time, or the ring breaks. A LUN that answers wrongly is not an error
/// but a [`Report`] that is not ok.
pub fn selftest(wwpn: &str, options: &Options) -> Result<Report, VhostError> {
    let mut lun = VhostInitiator::connect(wwpn)?;
    let (vendor, product) = identify(&mut lun, options)?;
    let (blocks, block_size) = capacity(&mut lun, options)?;
    let region = (options.region / u64::from(block_size)).clamp(1, blocks);
    let report = Report {
        wwpn: wwpn.to_owned(),
        vendor,
        product,
        block_size,
        blocks,
        writes: 0,
        most_in_flight: 0,
        compared: 0,
        mismatches: 0,
        mismatching_lbas: Vec::new(),
        failures: Vec::new(),
        out_of_range_refused: false,
        out_of_range_answer: String::new(),
        read_iops: 0.0,
        ok: false,
    };
    let model = vec![0; region as usize];
    let random = Random(options.seed);
    let mut test = Test { lun, options, random, report, region, model, under_way: HashMap::new() };
    test.write()?;
    test.flush()?;
    test.read_back()?;
    test.beyond_the_end()?;
    test.measure()?;
    let mut report = test.report;
    report.ok = report.failures.is_empty()
        && report.writes == options.writes
        && report.compared > 0
        && report.mismatches == 0
        && report.out_of_range_refused;
    Ok(report)
}

fn identify(lun: &mut VhostInitiator, options: &Options) -> Result<(String, String), VhostError> {
    // INQUIRY (SPC-5 6.6), allocation length 96.
    let inquiry = lun.execute(&[0x12, 0, 0, 0, 96, 0], Transfer::In(96), options.timeout)?;
    let text = |from: usize, to: usize| {
        let bytes = inquiry.data.get(from..to).unwrap_or_default();
        String::from_utf8_lossy(bytes).trim_end().to_owned()
    };
    Ok((text(8, 16), text(16, 32)))
}

fn capacity(lun: &mut VhostInitiator, options: &Options) -> Result<(u64, u32), VhostError> {
    // READ CAPACITY (16) (SBC-4 5.21), allocation length 32.
    let cdb = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
    let answer = lun.execute(&cdb, Transfer::In(32), options.timeout)?;
    let data = &answer.data;
    let last = data.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    let size = data.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    match (last.and_then(|l| l.checked_add(1)), size) {
        (Some(blocks), Some(size @ (512 | 4096))) => Ok((blocks, size)),
        _ => Err(VhostError::Ring("READ CAPACITY (16) gave no capacity")),
    }
}

/// READ (16) or WRITE (16) (SBC-4 5.18, 5.46).
fn cdb16(opcode: u8, lba: u64, blocks: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = opcode;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
    cdb
}

fn words(done: &Completion) -> String {
    match done.sense_codes() {
        Some((key, asc, ascq)) => {
            format!("status {:02x}h, sense {key:02x}h/{asc:02x}h/{ascq:02x}h", done.status)
        }
        None => format!("transport {}, status {:02x}h, no sense data", done.response, done.status),
    }
}

impl Test<'_> {
    fn block(&self) -> usize {
        self.report.block_size as usize
    }

    fn depth(&self) -> usize {
        self.options.depth.clamp(1, MAX_IN_FLIGHT)
    }

    fn start(&mut self, work: Work) -> Result<(), VhostError> {
        let len = work.blocks as usize * self.block();
        let tag = if work.write > 0 {
            let mut data = vec![0; len];
            for (block, lba) in data.chunks_exact_mut(self.report.block_size as usize).zip(work.lba..) {
                fill(block, self.options.seed, lba, work.write);
            }
            self.lun.submit(&cdb16(0x8a, work.lba, work.blocks), Transfer::Out(&data))?
        } else {
            self.lun.submit(&cdb16(0x88, work.lba, work.blocks), Transfer::In(len))?
        };
        self.under_way.insert(tag, work);
        self.report.most_in_flight = self.report.most_in_flight.max(self.lun.in_flight());
        Ok(())
    }

    /// Waits for one command; what came of it, unless it failed (which is noted).
    fn finish(&mut self) -> Result<Option<(Work, Completion)>, VhostError> {
        let done = self.lun.complete(self.options.timeout)?;
        let work = self.under_way.remove(&done.tag).ok_or(VhostError::Ring("an answer to nothing"))?;
        if done.sense_codes().is_some_and(|(key, ..)| key == 0x6) {
            self.start(work)?;
            return Ok(None);
        }
        let whole = work.write > 0 || done.data.len() == work.blocks as usize * self.block();
        if done.response == 0 && done.status == 0 && whole {
            return Ok(Some((work, done)));
        }
        if self.report.failures.len() < LISTED {
            let what = if work.write > 0 { "write" } else { "read" };
            let text = format!("{what} of {} blocks at {}: {}", work.blocks, work.lba, words(&done));
            self.report.failures.push(text);
        }
        Ok(None)
    }

    /// A place that no command under way touches: what overlapping writes leave is anybody's guess.
    fn place(&mut self, most: u64) -> Option<(u64, u64)> {
        for _ in 0..64 {
            let blocks = 1 + self.random.below(most.min(self.region));
            let lba = self.random.below(self.region - blocks + 1);
            let clear = self.under_way.values().all(|w| w.lba + w.blocks <= lba || lba + blocks <= w.lba);
            if clear {
                return Some((lba, blocks));
            }
        }
        None
    }

    fn write(&mut self) -> Result<(), VhostError> {
        let most = MAX_COMMAND / u64::from(self.report.block_size);
        let mut next = 1;
        while next <= self.options.writes || !self.under_way.is_empty() {
            while next <= self.options.writes && self.under_way.len() < self.depth() {
                let Some((lba, blocks)) = self.place(most) else { break };
                self.start(Work { lba, blocks, write: next })?;
                next += 1;
            }
            if let Some((work, _)) = self.finish()? {
                self.report.writes += 1;
                self.model[work.lba as usize..(work.lba + work.blocks) as usize].fill(work.write);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), VhostError> {
        // SYNCHRONIZE CACHE (10) (SBC-4 5.34), all blocks.
        let cdb = [0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let done = self.lun.execute(&cdb, Transfer::None, self.options.timeout)?;
        if done.response != 0 || done.status != 0 {
            self.report.failures.push(format!("synchronize cache: {}", words(&done)));
        }
        Ok(())
    }

    fn read_back(&mut self) -> Result<(), VhostError> {
        let most = MAX_COMMAND / u64::from(self.report.block_size);
        let mut lba = 0;
        while lba < self.region || !self.under_way.is_empty() {
            while lba < self.region && self.under_way.len() < self.depth() {
                let blocks = (1 + self.random.below(most)).min(self.region - lba);
                self.start(Work { lba, blocks, write: 0 })?;
                lba += blocks;
            }
            let Some((work, done)) = self.finish()? else { continue };
            self.compare(work, &done.data);
        }
        Ok(())
    }

    fn compare(&mut self, work: Work, data: &[u8]) {
        let mut want = vec![0; self.block()];
        for (got, lba) in data.chunks_exact(self.block()).zip(work.lba..) {
            let write = self.model[lba as usize];
            if write == 0 {
                continue;
            }
            fill(&mut want, self.options.seed, lba, write);
            self.report.compared += 1;
            if got != want {
                self.report.mismatches += 1;
                if self.report.mismatching_lbas.len() < LISTED {
                    self.report.mismatching_lbas.push(lba);
                }
            }
        }
    }

    fn beyond_the_end(&mut self) -> Result<(), VhostError> {
        let cdb = cdb16(0x88, self.report.blocks - 1, 2);
        let room = Transfer::In(2 * self.block());
        let done = self.lun.execute(&cdb, room, self.options.timeout)?;
        self.report.out_of_range_refused = done.status == 2 && done.sense_codes() == Some((0x5, 0x21, 0));
        self.report.out_of_range_answer = words(&done);
        Ok(())
    }

    fn measure(&mut self) -> Result<(), VhostError> {
        let blocks = (4096 / u64::from(self.report.block_size)).min(self.region);
        let (start, mut done) = (Instant::now(), 0u64);
        while start.elapsed() < self.options.measure || !self.under_way.is_empty() {
            while start.elapsed() < self.options.measure && self.under_way.len() < self.depth() {
                let lba = self.random.below(self.region / blocks) * blocks;
                self.start(Work { lba, blocks, write: 0 })?;
            }
            if self.under_way.is_empty() {
                break;
            }
            done += u64::from(self.finish()?.is_some());
        }
        self.report.read_iops = done as f64 / start.elapsed().as_secs_f64();
        Ok(())
    }
}
