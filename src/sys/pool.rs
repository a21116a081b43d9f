//! Memory that is used again: what comes and goes with every command, and what it waits for, lies where the last one of its size lay. That
//! costs no allocation, and the memory is in the processor's cache.
//!
//! Each thread has its own. [`Pooled`] is a box of it; the executor keeps its tasks there ([`super::exec`]).

use std::{
    alloc::{self, Layout},
    cell::RefCell,
    fmt,
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// Pieces of memory of one size that a thread keeps at most: as many as there are commands under way in a busy LUN.
const KEPT: usize = 320;

/// Larger ones are not kept: futures of opening and closing, which are needed once.
const LARGEST: usize = 8 << 10;

/// Free memory, by its layout. There are few: a LUN has its commands, one kind of task for them and one for its messages.
struct Memory(RefCell<Vec<(Layout, Vec<NonNull<u8>>)>>);

thread_local! {
    static MEMORY: Memory = const { Memory(RefCell::new(Vec::new())) };
}

fn is_kept(layout: Layout) -> bool {
    (1..=LARGEST).contains(&layout.size())
}

/// What `make` gives, made where it lies: in memory that something before it had, or in new.
pub(super) fn hold<T>(make: impl FnOnce() -> T) -> Box<T> {
    let layout = Layout::new::<T>();
    // Without its locals a thread is ending.
    let kept = |layout| MEMORY.try_with(|m| m.take(layout)).ok();
    let Some(place) = Some(layout).filter(|l| is_kept(*l)).and_then(kept) else {
        return Box::new(make());
    };
    let place = place.cast::<T>().as_ptr();
    // SAFETY: the memory has the layout of T, comes from the global allocator as a box's does, and is nobody else's.
    unsafe {
        place.write(make());
        Box::from_raw(place)
    }
}

/// Drops what is in a box where it is, and keeps its memory.
pub(super) fn release<T: ?Sized>(boxed: Box<T>) {
    let layout = Layout::for_value(&*boxed);
    if !is_kept(layout) {
        return;
    }
    let value = Box::into_raw(boxed);
    // SAFETY: it comes out of its box, and is not used afterwards.
    unsafe { std::ptr::drop_in_place(value) };
    let place = value.cast::<u8>();
    if MEMORY.try_with(|m| m.keep(layout, place)) != Ok(true) {
        // SAFETY: the box's memory, whose value has been dropped.
        unsafe { alloc::dealloc(place, layout) }
    }
}

impl Memory {
    fn take(&self, layout: Layout) -> NonNull<u8> {
        let kept = self.0.borrow_mut().iter_mut().find(|(l, _)| *l == layout).and_then(|(_, all)| all.pop());
        kept.unwrap_or_else(|| {
            // SAFETY: the caller's layout has a size.
            NonNull::new(unsafe { alloc::alloc(layout) }).unwrap_or_else(|| alloc::handle_alloc_error(layout))
        })
    }

    /// Keeps a piece; false if there are enough.
    fn keep(&self, layout: Layout, place: *mut u8) -> bool {
        let mut kept = self.0.borrow_mut();
        let at = kept.iter().position(|(l, _)| *l == layout).unwrap_or_else(|| {
            kept.push((layout, Vec::new()));
            kept.len() - 1
        });
        let all = &mut kept[at].1;
        let few = all.len() < KEPT;
        all.extend(NonNull::new(place).filter(|_| few));
        few
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (layout, all) in self.0.get_mut() {
            for place in all {
                // SAFETY: it came from the global allocator with this layout, and what was in it has been dropped.
                unsafe { alloc::dealloc(place.as_ptr(), *layout) }
            }
        }
    }
}

/// A box for what is made and dropped for each command.
pub struct Pooled<T>(ManuallyDrop<Box<T>>);

impl<T> Pooled<T> {
    /// What `make` gives, made where it lies.
    pub fn new(make: impl FnOnce() -> T) -> Pooled<T> {
        Pooled(ManuallyDrop::new(hold(make)))
    }
}

impl<T> Deref for Pooled<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Pooled<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Pooled<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here; nobody looks at it afterwards.
        release(unsafe { ManuallyDrop::take(&mut self.0) });
    }
}

impl<T: fmt::Debug> fmt::Debug for Pooled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn the_memory_of_what_is_dropped_serves_the_next_of_its_size_and_everything_is_dropped_once() {
        let counted = Rc::new(());
        let one = Pooled::new(|| (counted.clone(), [1u64; 40]));
        let at = &raw const *one;
        let two = Pooled::new(|| (counted.clone(), [2u64; 40]));
        assert_eq!(Rc::strong_count(&counted), 3);
        drop(one);
        assert_eq!(Rc::strong_count(&counted), 2);
        // Another size goes elsewhere.
        let other = Pooled::new(|| [0u8; 3]);
        let three = Pooled::new(|| (counted.clone(), [3u64; 40]));
        assert_eq!(&raw const *three, at);
        assert_eq!((two.1[39], three.1[39], other[2]), (2, 3, 0));
        drop((two, three));
        assert_eq!(Rc::strong_count(&counted), 1);
    }

    #[test]
    fn what_has_no_size_or_too_much_is_an_ordinary_box() {
        assert_eq!(format!("{:?}", Pooled::new(|| ())), "()");
        let large = Pooled::new(|| [7u8; LARGEST + 1]);
        assert_eq!(large[LARGEST], 7);
    }
}
