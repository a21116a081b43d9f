//! Real images with words of their metadata overwritten, then used, checked and repaired: errors or data, never a panic, a hang, or
//! memory without bound. What nobody damaged has to be clean afterwards.
#![no_main]

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    ops::Range,
    path::Path,
    rc::Rc,
    sync::OnceLock,
    time::UNIX_EPOCH,
};

use libfuzzer_sys::fuzz_target;
use tcmu_dif::{
    image::qcow2::{CreateOptions, Qcow2, Repair, Storage, check_on, create_on, repair_on},
    sys::{
        exec::Executor,
        mem::{Buffer, Sg},
    },
    units::ByteOffset,
    volume::Volume,
};

const PAGE: usize = 4096;
/// A file system would refuse a larger file.
const LARGEST: u64 = 1 << 44;
/// Operations of the disk that one input may cause: a loop would need more.
const STEPS: u64 = 200_000;

/// A sparse file in memory.
#[derive(Default, Clone)]
struct Memory(Rc<MemoryState>);

#[derive(Default)]
struct MemoryState {
    pages: RefCell<HashMap<u64, [u8; PAGE]>>,
    len: Cell<u64>,
    steps: Cell<u64>,
}

impl Memory {
    fn step(&self) {
        self.0.steps.set(self.0.steps.get() + 1);
        assert!(self.0.steps.get() < STEPS, "it goes on for ever");
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let mut pages = self.0.pages.borrow_mut();
        each_page(at, bytes.len(), |page, within, part| {
            let len = part.len();
            pages.entry(page).or_insert([0; PAGE])[within..within + len].copy_from_slice(&bytes[part]);
        });
        self.0.len.set(self.0.len.get().max(at + bytes.len() as u64));
    }

    fn clear(&self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.0.len.get());
        self.0.pages.borrow_mut().retain(|page, bytes| {
            let start = page * PAGE as u64;
            let within = |pos: u64| pos.saturating_sub(start).min(PAGE as u64) as usize;
            bytes[within(at)..within(end).max(within(at))].fill(0);
            start < at || start + PAGE as u64 > end
        });
    }
}

/// Calls back for each page that bytes from an offset on lie in: its number, the first byte in it, which of the bytes.
fn each_page(at: u64, len: usize, mut each: impl FnMut(u64, usize, Range<usize>)) {
    let mut done = 0;
    while done < len {
        let pos = at + done as u64;
        let within = (pos % PAGE as u64) as usize;
        let n = (PAGE - within).min(len - done);
        each(pos / PAGE as u64, within, done..done + n);
        done += n;
    }
}

impl Storage for Memory {
    async fn read(&self, at: u64, to: &Sg) -> io::Result<()> {
        self.step();
        let mut bytes = vec![0; to.len()];
        if at.checked_add(bytes.len() as u64).is_some() {
            let pages = self.0.pages.borrow();
            each_page(at, bytes.len(), |page, within, part| {
                if let Some(page) = pages.get(&page) {
                    let len = part.len();
                    bytes[part].copy_from_slice(&page[within..within + len]);
                }
            });
        }
        to.copy_from(0, &Buffer::from_slice(&bytes).sg());
        Ok(())
    }

    async fn write(&self, at: u64, from: &Sg) -> io::Result<()> {
        self.step();
        if at.checked_add(from.len() as u64).is_none_or(|end| end > LARGEST) {
            return Err(io::Error::from_raw_os_error(27)); // EFBIG
        }
        self.put(at, &from.to_vec());
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        self.step();
        Ok(())
    }

    async fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.step();
        self.clear(at, len);
        Ok(())
    }

    async fn zero(&self, at: u64, len: u64) -> io::Result<()> {
        self.punch(at, len).await
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.len.get())
    }

    async fn set_size(&self, len: u64) -> io::Result<()> {
        self.step();
        if len > LARGEST {
            return Err(io::Error::from_raw_os_error(27));
        }
        let old = self.0.len.replace(len);
        self.clear(len, old.saturating_sub(len));
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        false
    }
}

fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let exec = Executor::new();
    let out = Rc::new(RefCell::new(None));
    let slot = out.clone();
    exec.spawn(async move {
        let value = future.await;
        *slot.borrow_mut() = Some(value);
    });
    while exec.run_ready() {}
    out.take().expect("it waits for something that never comes")
}

type Bytes = Vec<u8>;

/// Images with a bit of everything in them, as bytes.
fn images() -> &'static [Bytes] {
    static IMAGES: OnceLock<Vec<Bytes>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let of = |cluster_size, version, extended_l2, refcount_bits, snapshot| {
            let more = CreateOptions { version, extended_l2, refcount_bits, ..CreateOptions::new(400 << 10) };
            block_on(make(CreateOptions { cluster_size, ..more }, snapshot))
        };
        vec![
            of(4096, 3, false, 16, false),
            of(512, 2, false, 16, true),
            of(65536, 3, false, 1, false),
            of(16384, 3, true, 16, false),
            of(4096, 3, false, 8, true),
            of(16384, 3, true, 64, true),
        ]
    })
}

async fn make(options: CreateOptions, snapshot: bool) -> Bytes {
    let disk = Memory::default();
    create_on(disk.clone(), None, Path::new("/image"), &options).await.expect("it can be made");
    let image =
        Qcow2::open_on(disk.clone(), Path::new("/image"), false, None).await.expect("it can be opened");
    let data = Buffer::from_slice(&vec![7; 60 << 10]).sg();
    image.write(ByteOffset(0), &data, Default::default()).await.expect("it can be written");
    image.write(ByteOffset(150 << 10), &data, Default::default()).await.expect("it can be written");
    if snapshot {
        image.snapshot_create("one", UNIX_EPOCH).await.expect("it can have a snapshot");
        image.write(ByteOffset(200 << 10), &data, Default::default()).await.expect("it can be written");
    }
    image.discard(ByteOffset(8 << 10), 16 << 10).await.expect("it can be discarded");
    image.write_zeroes(ByteOffset(160 << 10), 20 << 10, false).await.expect("it can be zeroed");
    image.close().await.expect("it can be closed");
    let bytes = Buffer::zeroed(disk.size().expect("it has a size") as usize);
    disk.read(0, &bytes.sg()).await.expect("it can be read");
    bytes.to_vec()
}

/// What is left of the input.
struct Input {
    bytes: Bytes,
    at: usize,
}

impl Input {
    fn take(&mut self, n: usize) -> Option<u64> {
        let word = self.bytes.get(self.at..self.at + n)?;
        self.at += n;
        Some(word.iter().fold(0, |v, b| v << 8 | u64::from(*b)))
    }
}

async fn use_it(image: Bytes, mut input: Input) {
    let disk = Memory::default();
    disk.put(0, &image);
    // Words of metadata, which lie in whole words, and mostly at the front.
    let mut damaged = false;
    for _ in 0..input.take(1).unwrap_or(0) % 8 {
        let (Some(place), Some(how)) = (input.take(2), input.take(1)) else { break };
        let at = place * 8 % (image.len() as u64 / 8 * 8);
        let old = u64::from_be_bytes(image[at as usize..at as usize + 8].try_into().expect("eight bytes"));
        let new = match how % 8 {
            0 => input.take(8).unwrap_or(0),
            1 => old ^ 1 << (how / 8 * 2),
            2 => old.wrapping_add(512),
            3 => u64::MAX,
            4 => 0,
            5 => 1 << 63 | input.take(3).unwrap_or(0) << 9,
            6 => 1 << 62 | input.take(3).unwrap_or(0),
            _ => image.len() as u64 | 1 << 63,
        };
        damaged |= new != old;
        disk.put(at, &new.to_be_bytes());
    }
    let ending = input.take(1).unwrap_or(0) % 4;
    let read_only = input.take(1).unwrap_or(0) & 1 == 1;
    if let Ok(image) = Qcow2::open_on(disk.clone(), Path::new("/image"), read_only, None).await {
        work(image, &mut input).await;
    }
    let path = Path::new("/image");
    let report = match ending {
        0 => repair_on(&disk, path, Repair::All, &mut |_, _| ()).await,
        1 => repair_on(&disk, path, Repair::Leaks, &mut |_, _| ()).await,
        _ => check_on(&disk, path, &mut |_, _| ()).await,
    };
    if !damaged {
        let report = report.expect("it can be checked");
        assert!(report.is_clean(), "{:?}", report.findings);
    }
}

async fn work(image: Qcow2<Memory>, input: &mut Input) {
    while let (Some(what), Some(place), Some(len)) = (input.take(1), input.take(2), input.take(1)) {
        let size = image.limits().capacity;
        let at = (place * 512) % size.max(1);
        let len = (1 + len * 256).min(size - at);
        let sg = Buffer::zeroed(len as usize).sg();
        let at = ByteOffset(at);
        // Errors are legal; what else may come of it is for the sanitizer and the assertions to say.
        let _ = match what % 8 {
            0 if what & 8 != 0 => match what >> 4 & 3 {
                0 | 1 => image.snapshot_create(&format!("at {}", at.0), UNIX_EPOCH).await.map(drop),
                2 => image.snapshot_apply("1").await,
                _ => image.snapshot_delete("1").await,
            }
            .map_err(drop)
            .or(Ok(())),
            0 | 1 => image.read(at, &sg).await,
            2 | 3 => image.write(at, &sg, Default::default()).await,
            4 => image.discard(at, len).await,
            5 => image.write_zeroes(at, len, what & 8 != 0).await,
            6 => image.map_extents(at, len).await.map(drop),
            _ if what & 16 != 0 => image.resize(size + len * 4096).await,
            _ if what & 8 != 0 => image.resize(len * 1024).await,
            _ => image.flush().await,
        };
    }
    let _ = image.close().await;
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input { bytes: data.to_vec(), at: 0 };
    let images = images();
    let image = images[input.take(1).unwrap_or(0) as usize % images.len()].clone();
    block_on(use_it(image, input));
});
