//! [`ExitAllocator`]: ends the program with an exit code of its own where memory is out.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::Write,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// The exit code of a program that has no memory left.
const EXIT_CODE: i32 = 4;

/// The system's allocator, for programs: where it has no memory, one line on standard error says so, and the program ends
/// with exit code 4.
///
/// Most libraries allocate as if nothing could fail, and the standard library then aborts, or panics and waits for ever for
/// the memory of a backtrace. An allocator may not unwind, so it ends the process. What must outlive the program is written
/// atomically in any case.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitAllocator;

/// What a program does before [`ExitAllocator`] ends it.
static CLEANUP: OnceLock<fn()> = OnceLock::new();

impl ExitAllocator {
    /// Calls `cleanup` before the program ends for want of memory, to restore a terminal. It runs in the middle of an
    /// allocation, so it must not allocate, and must not wait for a lock that an allocating thread may hold. Only the first
    /// one that is set is kept.
    pub fn set_cleanup(cleanup: fn()) {
        let _ = CLEANUP.set(cleanup);
    }
}

// SAFETY: everything is passed on to the system's allocator, and null pointers to nobody.
unsafe impl GlobalAlloc for ExitAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        there(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        there(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        there(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[inline(always)]
fn there(pointer: *mut u8, size: usize) -> *mut u8 {
    if pointer.is_null() {
        exhausted(size);
    }
    pointer
}

/// Takes no memory, and runs nothing that could, but for a cleanup that breaks its promise.
#[cold]
fn exhausted(size: usize) -> ! {
    static CLEANED: AtomicBool = AtomicBool::new(false);
    if let Some(cleanup) = CLEANUP.get()
        && !CLEANED.swap(true, Relaxed)
    {
        cleanup();
    }
    let mut text = [0; 256];
    let mut rest = &mut text[..];
    // It is long enough.
    let _ = writeln!(
        rest,
        "error: out of memory: {} MiB more are not available{}; a smaller model, text, context or batch fits",
        size.div_ceil(1 << 20),
        limit()
    );
    let length = 256 - rest.len();
    end(&text[..length])
}

/// Which limit of the process may be the reason.
fn limit() -> &'static str {
    #[cfg(unix)]
    for (resource, text) in [
        (libc::RLIMIT_AS, " (the address space is limited: see `ulimit -v`)"),
        (libc::RLIMIT_DATA, " (the data segment is limited: see `ulimit -d`)"),
    ] {
        let mut found = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the call writes to `found` alone.
        let known = unsafe { libc::getrlimit(resource, &mut found) } == 0;
        if known && found.rlim_cur != libc::RLIM_INFINITY {
            return text;
        }
    }
    ""
}

#[cfg(unix)]
fn end(text: &[u8]) -> ! {
    // SAFETY: the bytes are there; neither call takes memory or a lock.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(EXIT_CODE)
    }
}

#[cfg(not(unix))]
fn end(text: &[u8]) -> ! {
    let _ = std::io::stderr().write_all(text);
    std::process::exit(EXIT_CODE)
}
