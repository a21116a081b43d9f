//! Memory that I/O works on: page-aligned buffers, shared mappings, and [`Sg`], the scatter list over either.
//!
//! A scatter list keeps what it points into alive, so an operation that holds one may be in flight in the kernel while
//! its future is dropped. All access is by copy or by a closure over one segment at a time; nothing hands out a
//! reference that lives across an await. The bytes may change under us only by operations that the same LUN thread has
//! in flight: it does not look at a buffer before the operation on it has finished, and the kernel does not touch a
//! command's data area between queueing and completion (`target_core_user.c` copies at both ends).

mod buffer;

use std::{
    fmt,
    fs::File,
    io,
    ptr::NonNull,
    rc::Rc,
    sync::atomic::{AtomicU32, Ordering},
};

use smallvec::SmallVec;

use buffer::Mem;
pub use buffer::{BUFFER_ALIGN, Buffer};

/// Bytes of a page of memory, and of the page cache.
pub fn page_size() -> u64 {
    // SAFETY: it asks for a number, and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX has it always; if not, as large as Linux makes them.
    u64::try_from(size).unwrap_or(64 << 10)
}

/// For tests of what a process leaves behind when it is killed: something to do before each store into shared memory.
#[cfg(test)]
pub(crate) mod crash {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Calls back before each store of this thread, until another is set.
    pub(crate) fn before_each_store(hook: Option<Hook>) {
        HOOK.with(|h| *h.borrow_mut() = hook);
    }

    pub(super) fn point() {
        // Stores that the hook itself makes are none of the process's.
        let Some(mut hook) = HOOK.with(|h| h.borrow_mut().take()) else { return };
        hook();
        HOOK.with(|h| *h.borrow_mut() = Some(hook));
    }
}

/// A shared, writable mapping of a file: a UIO region, or the embedded kernel's memory.
pub struct Mapping {
    map: memmap2::MmapRaw,
}

impl Mapping {
    /// Maps the first `len` bytes.
    ///
    /// # Errors
    /// What `mmap` says.
    pub fn new(file: &File, len: usize) -> io::Result<Rc<Mapping>> {
        Ok(Rc::new(Mapping { map: memmap2::MmapOptions::new().len(len).map_raw(file)? }))
    }

    /// Bytes that are mapped.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether nothing is mapped.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// The first byte. Dereferencing it is up to `sys`.
    pub(crate) fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Copies bytes out of the mapping, once: what the other side changes later is not seen. False if outside.
    #[must_use]
    pub fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        if !self.holds(offset, out.len() as u64) {
            return false;
        }
        // SAFETY: the range is inside the mapping, and `out` is exclusive memory of this process.
        unsafe {
            std::ptr::copy_nonoverlapping(self.base().add(offset as usize), out.as_mut_ptr(), out.len())
        };
        true
    }

    /// Copies bytes into the mapping. False if outside.
    #[must_use]
    pub fn write(&self, offset: u64, bytes: &[u8]) -> bool {
        if !self.holds(offset, bytes.len() as u64) {
            return false;
        }
        #[cfg(test)]
        crash::point();
        // SAFETY: the range is inside the mapping, and `bytes` is memory of this process.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base().add(offset as usize), bytes.len())
        };
        true
    }

    /// Loads a word of the mapping with acquire order: what its writer wrote before it is seen.
    ///
    /// # Panics
    /// If the word is outside or not aligned: offsets of words are constants of the ABI.
    pub fn load_acquire(&self, offset: u64) -> u32 {
        self.atomic(offset).load(Ordering::Acquire)
    }

    /// Stores a word of the mapping with release order: whoever sees it sees what was written before.
    ///
    /// # Panics
    /// As [`Mapping::load_acquire`].
    pub fn store_release(&self, offset: u64, value: u32) {
        #[cfg(test)]
        crash::point();
        self.atomic(offset).store(value, Ordering::Release)
    }

    fn atomic(&self, offset: u64) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && self.holds(offset, 4), "a word outside the mapping");
        // SAFETY: inside the mapping and aligned (mappings start at a page); both sides use whole-word access.
        unsafe { AtomicU32::from_ptr(self.base().add(offset as usize).cast()) }
    }

    fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.map.len() as u64)
    }

    /// A segment of the mapping, if it lies inside.
    pub fn segment(self: &Rc<Self>, offset: u64, len: u64) -> Option<Segment> {
        if !self.holds(offset, len) {
            return None;
        }
        // SAFETY: offset is inside the mapping, so the pointer stays inside its allocation.
        let ptr = unsafe { self.base().add(offset as usize) };
        Some(Segment { ptr: NonNull::new(ptr)?, len: len as usize, keep: Keep::Map(self.clone()) })
    }
}

#[derive(Clone)]
enum Keep {
    Heap(Mem),
    Map(Rc<Mapping>),
}

impl Keep {
    fn is(&self, other: &Keep) -> bool {
        match (self, other) {
            (Keep::Heap(a), Keep::Heap(b)) => a.is(b),
            (Keep::Map(a), Keep::Map(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Keeps the memory of a list alive, and says nothing of where it is: what an operation in the kernel holds.
#[derive(Default)]
pub(crate) struct Held {
    #[allow(dead_code)] // Held, never read.
    keep: SmallVec<[Keep; 1]>,
}

/// One contiguous run of memory that is kept alive.
#[derive(Clone)]
pub struct Segment {
    ptr: NonNull<u8>,
    len: usize,
    keep: Keep,
}

impl Segment {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn sub(&self, start: usize, len: usize) -> Segment {
        assert!(start <= self.len && len <= self.len - start, "sub-segment outside its segment");
        // SAFETY: start <= len, so the pointer stays inside the allocation or one past it.
        Segment { ptr: unsafe { self.ptr.add(start) }, len, keep: self.keep.clone() }
    }
}

/// A scatter list: a sequence of memory segments that reads as one run of bytes. Clones share the memory.
///
/// Ranges outside the list are a bug of the caller and panic; lengths from outside are checked before one is made.
#[derive(Clone, Default)]
pub struct Sg {
    segs: SmallVec<[Segment; 2]>,
    len: usize,
}

impl Sg {
    /// No bytes.
    pub fn new() -> Sg {
        Sg::default()
    }

    /// No bytes, and room for that many segments.
    pub fn with_room(segments: usize) -> Sg {
        Sg { segs: SmallVec::with_capacity(segments), len: 0 }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many segments it has.
    pub fn segments(&self) -> usize {
        self.segs.len()
    }

    /// Adds a segment at the end; one that continues the last is joined to it.
    pub fn push(&mut self, seg: Segment) {
        if seg.len == 0 {
            return;
        }
        self.len += seg.len;
        if let Some(last) = self.segs.last_mut()
            && last.keep.is(&seg.keep)
            && last.ptr.as_ptr().wrapping_add(last.len) == seg.ptr.as_ptr()
        {
            last.len += seg.len;
            return;
        }
        self.segs.push(seg);
    }

    /// Adds all of another list at the end.
    pub fn append(&mut self, other: &Sg) {
        for seg in &other.segs {
            self.push(seg.clone());
        }
    }

    /// The part from `start`, `len` bytes long, over the same memory.
    pub fn slice(&self, start: usize, len: usize) -> Sg {
        assert!(
            start <= self.len && len <= self.len - start,
            "slice {start}+{len} of a list of {}",
            self.len
        );
        if start == 0 && len == self.len {
            return self.clone();
        }
        let mut out = Sg::new();
        let (mut skip, mut want) = (start, len);
        for seg in &self.segs {
            if want == 0 {
                break;
            }
            if skip >= seg.len {
                skip -= seg.len;
                continue;
            }
            let n = want.min(seg.len - skip);
            out.push(seg.sub(skip, n));
            skip = 0;
            want -= n;
        }
        out
    }

    /// Deals the bytes out to two lists over the same memory, as cards: `first` bytes to the one, `second` to the other, and
    /// so on to the end.
    pub fn deal(&self, first: usize, second: usize) -> (Sg, Sg) {
        assert!(first > 0 && second > 0, "dealing in runs of {first} and {second} bytes");
        let mut out = [Sg::new(), Sg::new()];
        let (mut whose, mut left) = (0, first);
        for seg in &self.segs {
            let mut at = 0;
            while at < seg.len {
                let n = left.min(seg.len - at);
                out[whose].push(seg.sub(at, n));
                at += n;
                left -= n;
                if left == 0 {
                    whose = 1 - whose;
                    left = if whose == 0 { first } else { second };
                }
            }
        }
        let [one, other] = out;
        (one, other)
    }

    /// Calls `f` with each run of bytes from `start` on, `len` bytes in all.
    pub fn for_each(&self, start: usize, len: usize, mut f: impl FnMut(&[u8])) {
        self.walk(start, len, |ptr, n| {
            // SAFETY: the run lies in live memory (kept by the segment); see the module's word on who changes it.
            f(unsafe { std::slice::from_raw_parts(ptr, n) })
        });
    }

    fn walk(&self, start: usize, len: usize, mut f: impl FnMut(*mut u8, usize)) {
        assert!(
            start <= self.len && len <= self.len - start,
            "range {start}+{len} of a list of {}",
            self.len
        );
        let (mut skip, mut want) = (start, len);
        for seg in &self.segs {
            if want == 0 {
                return;
            }
            if skip >= seg.len {
                skip -= seg.len;
                continue;
            }
            let n = want.min(seg.len - skip);
            // SAFETY: skip < seg.len.
            f(unsafe { seg.ptr.as_ptr().add(skip) }, n);
            skip = 0;
            want -= n;
        }
    }

    /// Copies bytes from the list at `at` to `out`.
    pub fn copy_out(&self, at: usize, out: &mut [u8]) {
        let mut done = 0;
        let dst = out.as_mut_ptr();
        self.walk(at, out.len(), |ptr, n| {
            // SAFETY: both runs are live and n bytes long; `out` is exclusive, so they do not overlap unless a caller
            // made a slice of the list's own memory, which `for_each` alone does, immutably.
            unsafe { std::ptr::copy(ptr, dst.add(done), n) };
            done += n;
        });
    }

    /// Copies `bytes` into the list at `at`.
    pub fn copy_in(&self, at: usize, bytes: &[u8]) {
        let mut done = 0;
        self.walk(at, bytes.len(), |ptr, n| {
            // SAFETY: as in `copy_out`.
            unsafe { std::ptr::copy(bytes.as_ptr().add(done), ptr, n) };
            done += n;
        });
    }

    /// Copies all of `from` into the list at `at`.
    pub fn copy_from(&self, at: usize, from: &Sg) {
        let mut done = at;
        from.for_each(0, from.len, |bytes| {
            self.copy_in(done, bytes);
            done += bytes.len();
        });
    }

    /// Sets `len` bytes from `at` on.
    pub fn fill(&self, at: usize, len: usize, byte: u8) {
        self.walk(at, len, |ptr, n| {
            // SAFETY: the run is live and n bytes long.
            unsafe { std::ptr::write_bytes(ptr, byte, n) }
        });
    }

    /// A copy of all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len];
        self.copy_out(0, &mut out);
        out
    }

    /// Whether every byte is 0.
    pub fn is_zero(&self) -> bool {
        let mut zero = true;
        self.for_each(0, self.len, |bytes| zero = zero && bytes.iter().all(|b| *b == 0));
        zero
    }

    /// The index of the first byte that differs from `other`'s, over the length of the shorter.
    pub fn mismatch(&self, other: &Sg) -> Option<usize> {
        let len = self.len.min(other.len);
        let mut chunk = [0u8; 4096];
        let mut at = 0;
        while at < len {
            let n = (len - at).min(chunk.len());
            other.copy_out(at, &mut chunk[..n]);
            let (mut pos, mut found) = (0, None);
            self.for_each(at, n, |bytes| {
                if found.is_none() {
                    let theirs = &chunk[pos..pos + bytes.len()];
                    if bytes != theirs {
                        found = bytes.iter().zip(theirs).position(|(a, b)| a != b).map(|i| at + pos + i);
                    }
                }
                pos += bytes.len();
            });
            if found.is_some() {
                return found;
            }
            at += n;
        }
        None
    }

    /// The list's segments as bare memory, for the SIMD kernels. Valid while the list lives.
    pub(crate) fn runs(&self) -> Runs<'_> {
        Runs(self.segs.iter())
    }

    /// The iovecs of the list, for a system call. Valid while the list lives, or what [`Sg::hold`] gives.
    pub(crate) fn iovecs(&self) -> impl Iterator<Item = libc::iovec> {
        self.segs.iter().map(|s| libc::iovec { iov_base: s.ptr.as_ptr().cast(), iov_len: s.len })
    }

    /// Keeps the list's memory alive.
    pub(crate) fn hold(&self) -> Held {
        let mut keep: SmallVec<[Keep; 1]> = SmallVec::new();
        for seg in &self.segs {
            if !keep.last().is_some_and(|last| last.is(&seg.keep)) {
                keep.push(seg.keep.clone());
            }
        }
        Held { keep }
    }
}

/// See [`Sg::runs`]: where each segment starts, and its bytes.
pub(crate) struct Runs<'a>(std::slice::Iter<'a, Segment>);

impl Iterator for Runs<'_> {
    type Item = (NonNull<u8>, usize);

    fn next(&mut self) -> Option<(NonNull<u8>, usize)> {
        self.0.next().map(|s| (s.ptr, s.len))
    }
}

impl fmt::Debug for Sg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sg({} bytes in {} segments)", self.len, self.segs.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scattered(parts: &[&[u8]]) -> Sg {
        let mut sg = Sg::new();
        for p in parts {
            sg.append(&Buffer::from_slice(p).sg());
        }
        sg
    }

    #[test]
    fn a_scattered_list_reads_as_one_run_of_bytes() {
        let sg = scattered(&[b"ab", b"", b"cdef", b"g"]);
        assert_eq!((sg.len(), sg.segments()), (7, 3));
        assert_eq!(sg.slice(1, 5).to_vec(), b"bcdef");
        sg.copy_in(1, b"XYZ");
        assert_eq!(sg.to_vec(), b"aXYZefg");
        sg.fill(0, 2, 0);
        assert!(sg.slice(0, 2).is_zero() && !sg.is_zero());
    }

    #[test]
    fn slices_share_memory_and_join_again() {
        let b = Buffer::zeroed(8192);
        let mut sg = b.sg().slice(0, 4096);
        sg.append(&b.sg().slice(4096, 4096));
        assert_eq!(sg.segments(), 1);
        sg.copy_in(4095, b"ab");
        assert_eq!(&b.to_vec()[4095..4097], b"ab");
    }

    #[test]
    fn bytes_are_dealt_out_in_turn_across_segment_borders() {
        let sg = scattered(&[b"aaax", b"xaa", b"", b"axxa"]);
        let (a, x) = sg.deal(3, 2);
        assert_eq!((a.to_vec(), x.to_vec()), (b"aaaaaaa".to_vec(), b"xxxx".to_vec()));
        x.fill(0, 4, b'y');
        assert_eq!(sg.to_vec(), b"aaayyaaayya");
        assert_eq!(Sg::new().deal(1, 1).0.len(), 0);
    }

    #[test]
    fn the_first_difference_is_found_across_segment_borders() {
        let a = scattered(&[&[0; 5000], &[0; 5000]]);
        let b = scattered(&[&[0; 7000], &[0; 3000]]);
        assert_eq!(a.mismatch(&b), None);
        b.copy_in(6999, &[1]);
        b.copy_in(8000, &[1]);
        assert_eq!(a.mismatch(&b), Some(6999));
        assert_eq!(a.slice(7000, 1001).mismatch(&b.slice(7000, 1001)), Some(1000));
    }

    #[test]
    fn a_segment_outside_its_mapping_is_refused() {
        let f = tempfile::tempfile().unwrap();
        f.set_len(8192).unwrap();
        let m = Mapping::new(&f, 8192).unwrap();
        assert!(
            m.segment(8192, 1).is_none()
                && m.segment(u64::MAX, 2).is_none()
                && m.segment(4096, 4097).is_none()
        );
        assert_eq!(m.segment(4096, 4096).unwrap().len(), 4096);
    }
}
