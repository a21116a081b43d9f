//! Memory of one's own: page-aligned buffers. Small ones are not given back to the allocator but kept for the next, by size and thread: they are
//! needed for every command with protection, and aligned allocations are slow. Called by everybody who reads or writes a file.

use std::{
    alloc::{self, Layout},
    cell::RefCell,
    fmt,
    mem::ManuallyDrop,
    ptr::NonNull,
    rc::Rc,
};

use smallvec::SmallVec;

use super::{Keep, Segment, Sg};

/// Alignment of every [`Buffer`]: enough for O_DIRECT on any block device.
pub const BUFFER_ALIGN: usize = 4096;

/// Sizes of memory that is kept for the next buffer when it is free, and how many pieces of each a thread keeps. Smaller buffers take the
/// next size: an allocation that is aligned to a page costs more than its bytes.
const SIZES: [(usize, usize); 3] = [(4 << 10, 64), (16 << 10, 16), (64 << 10, 4)];

thread_local! {
    static FREE: RefCell<[Vec<Rc<HeapMem>>; SIZES.len()]> = const { RefCell::new([const { Vec::new() }; SIZES.len()]) };
}

struct HeapMem {
    ptr: NonNull<u8>,
    layout: Layout,
}

/// A share in memory. The last one gives it back to its thread's free pieces.
#[derive(Clone)]
pub(super) struct Mem(ManuallyDrop<Rc<HeapMem>>);

impl Mem {
    /// Whether both are of the same memory.
    pub(super) fn is(&self, other: &Mem) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Memory of that many bytes, and whether they are zeros; all of it has been set to something.
    fn take(len: usize) -> (Mem, bool) {
        let size = SIZES.iter().position(|(size, _)| len <= *size);
        let free = |i: usize| FREE.try_with(|free| free.borrow_mut()[i].pop()).ok().flatten();
        if let Some(mem) = size.and_then(free) {
            return (Mem(ManuallyDrop::new(mem)), false);
        }
        let bytes = size.map_or(len, |i| SIZES[i].0);
        let layout =
            Layout::from_size_align(bytes, BUFFER_ALIGN).expect("a buffer is smaller than isize::MAX");
        // SAFETY: the layout's size is not 0.
        let ptr = unsafe { alloc::alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { alloc::handle_alloc_error(layout) };
        (Mem(ManuallyDrop::new(Rc::new(HeapMem { ptr, layout }))), true)
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody looks at it afterwards.
        let mem = unsafe { ManuallyDrop::take(&mut self.0) };
        if Rc::strong_count(&mem) > 1 {
            return;
        }
        let Some(i) = SIZES.iter().position(|(size, _)| mem.layout.size() == *size) else { return };
        // A thread that ends has no such list any more.
        let _ = FREE.try_with(|free| {
            let free = &mut free.borrow_mut()[i];
            if free.len() < SIZES[i].1 {
                free.push(mem);
            }
        });
    }
}

impl Drop for HeapMem {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this layout, and nobody else frees it.
        unsafe { alloc::dealloc(self.ptr.as_ptr(), self.layout) }
    }
}

/// Zeroed, page-aligned memory of its own; clones share it.
#[derive(Clone)]
pub struct Buffer {
    mem: Mem,
    len: usize,
}

impl Buffer {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Buffer {
        let (mem, zeros) = Mem::take(len);
        let buffer = Buffer { mem, len };
        if !zeros {
            buffer.sg().fill(0, len, 0);
        }
        buffer
    }

    /// `len` bytes that are about to be written, all of them: what is in them is of no meaning.
    pub fn unset(len: usize) -> Buffer {
        Buffer { mem: Mem::take(len).0, len }
    }

    /// A buffer that holds those bytes.
    pub fn from_slice(bytes: &[u8]) -> Buffer {
        let buffer = Buffer::unset(bytes.len());
        buffer.sg().copy_in(0, bytes);
        buffer
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The whole buffer as a scatter list of one segment.
    pub fn sg(&self) -> Sg {
        let mut segs = SmallVec::new();
        if self.len > 0 {
            segs.push(Segment { ptr: self.mem.0.ptr, len: self.len, keep: Keep::Heap(self.mem.clone()) });
        }
        Sg { segs, len: self.len }
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        self.sg().to_vec()
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_free_serves_the_next_buffer_and_its_old_bytes_are_not_seen() {
        let first = Buffer::from_slice(&[7; 600]);
        let place = first.mem.0.ptr;
        let part = first.sg().slice(100, 100);
        let held = part.hold();
        drop((first, part));
        assert_ne!(Buffer::zeroed(600).mem.0.ptr, place, "an operation still has it");
        drop(held);
        let second = Buffer::zeroed(700);
        assert_eq!((second.mem.0.ptr, second.to_vec()), (place, vec![0; 700]));
        assert_ne!(Buffer::zeroed(8 << 10).mem.0.ptr, place);
    }
}
