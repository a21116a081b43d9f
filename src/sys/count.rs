//! Counts the allocations of each thread, for the tests that say how many a command costs: a test makes [`Counting`] its global allocator, and
//! asks for the count of a thread by its id. In the daemon the allocator is the system's, and nothing of this runs.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering},
};

/// The system's allocator, with a count for each thread.
pub struct Counting;

/// By the thread's id. Two threads whose ids are so far apart share a count.
static COUNTS: [AtomicU64; 4096] = [const { AtomicU64::new(0) }; 4096];

thread_local! {
    static ID: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that ends may allocate when its locals are gone; nobody asks for its count any more.
    let id = ID.try_with(|id| {
        if id.get() == 0 {
            id.set(rustix::thread::gettid().as_raw_nonzero().get() as usize);
        }
        id.get()
    });
    if let Ok(id) = id {
        COUNTS[id % COUNTS.len()].fetch_add(1, Ordering::Relaxed);
    }
}

/// Allocations, and reallocations, of the thread with that id since the process began.
pub fn allocations(thread: u32) -> u64 {
    COUNTS[thread as usize % COUNTS.len()].load(Ordering::Relaxed)
}

// SAFETY: everything is the system allocator's; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}
