//! [`ExitAllocator`]: an allocator that ends the program with its own exit code when memory is exhausted.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::Write,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// The exit code of a program that ran out of memory.
const EXIT_CODE: i32 = 4;

/// The system's allocator, as the global allocator of a program. When memory is exhausted, it prints one line to standard
/// error and ends the program with exit code 4.
///
/// Most libraries assume that allocation does not fail. The standard library then aborts, or panics and waits forever for
/// the memory of a backtrace. An allocator may not unwind, so this one ends the process. Files are written atomically, so
/// that none is left half written.
///
/// # Example
/// ```
/// #[global_allocator]
/// static ALLOCATOR: ternary_kernels::ExitAllocator = ternary_kernels::ExitAllocator;
/// # fn main() {}
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct ExitAllocator;

/// Called before [`ExitAllocator`] ends the program.
static CLEANUP: OnceLock<fn()> = OnceLock::new();

impl ExitAllocator {
    /// Sets a function that is called before the program ends, for instance to restore the terminal.
    ///
    /// It runs inside an allocation: it must not allocate, and must not wait for a lock that an allocating thread may hold.
    /// Only the first function that is set is kept.
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

/// The pointer, unless it is null.
#[inline(always)]
fn there(pointer: *mut u8, size: usize) -> *mut u8 {
    if pointer.is_null() {
        exhausted(size);
    }
    pointer
}

/// Reports that `size` bytes could not be allocated, and ends the program. Allocates nothing itself.
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

/// The resource limit of the process that may be the reason.
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

/// Prints the text and ends the process.
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
