//! How much heap a piece of code holds and needs, counted thread by thread by an allocator around the system's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes that this thread has allocated and not freed; negative if it freed what others had allocated.
    static LIVE: Cell<i64> = const { Cell::new(0) };
    /// The most that [`LIVE`] has been since it was last set.
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

/// The system's allocator, which counts. A test program takes it with `#[global_allocator]`; without, nothing is counted.
#[derive(Debug, Default)]
pub struct CountingHeap;

fn add(bytes: i64) {
    // A thread that is ending has no counter any more, and nobody measures it.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

// SAFETY: every call is passed on to the system's allocator as it came, and its answer is given back as it came; counting
// touches two thread-locals that are initialised at compile time and have no destructor, so it allocates nothing.
unsafe impl GlobalAlloc for CountingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(signed(layout.size()));
        // SAFETY: the caller's own promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        add(-signed(layout.size()));
        // SAFETY: the caller's own promises.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(signed(size) - signed(layout.size()));
        // SAFETY: the caller's own promises.
        unsafe { System.realloc(place, layout, size) }
    }
}

/// What a call did to this thread's heap, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grown {
    /// More held after it than before.
    pub held: i64,
    /// The most that was held meanwhile, above what was held before.
    pub peak: i64,
}

/// Makes a call and tells what it did to the heap. Calls may not be nested.
pub fn measured<T>(call: impl FnOnce() -> T) -> (T, Grown) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = call();
    let grown = Grown {
        held: LIVE.get() - before,
        peak: PEAK.get() - before,
    };
    (result, grown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static HEAP: CountingHeap = CountingHeap;

    #[test]
    fn what_is_held_and_what_was_needed_are_told_apart() {
        let (kept, grown) = measured(|| {
            drop(std::hint::black_box(vec![1u8; 5000]));
            std::hint::black_box(vec![2u8; 1000])
        });
        assert_eq!((grown.held, grown.peak), (1000, 5000));
        let ((), grown) = measured(|| drop(kept));
        assert_eq!((grown.held, grown.peak), (-1000, 0));
    }
}
