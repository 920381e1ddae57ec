//! [`Buffer`]: aligned, zeroed memory that fails with an error instead of ending the process.
//!
//! Large buffers come from the system as untouched pages — an allocator would write their zeroes, and a KV cache sized for the worst case would
//! occupy all of it at once — and in huge pages where there are any: weights are read from end to end at every step.
//!
//! A page is on the NUMA node of the thread that touches it first. Where that matters, buffers have pages of their own ([`Buffer::own_pages`]).

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;

use crate::Error;

/// A cache line, and the widest vector there is.
const ALIGNMENT: usize = 64;
/// Buffers of at least so many bytes are mapped: a huge page.
const MAPPED: usize = HUGE_PAGE;
/// Bytes of a huge page on x86-64, and on AArch64 with pages of 4 KiB.
const HUGE_PAGE: usize = 2 << 20;

/// Plain numbers: every bit pattern, all zeroes included, is a value.
///
/// # Safety
/// Implemented only for primitive numbers without padding or invalid patterns.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: primitive numbers.
unsafe impl Plain for u8 {}
// SAFETY: primitive numbers.
unsafe impl Plain for i8 {}
// SAFETY: primitive numbers.
unsafe impl Plain for u16 {}
// SAFETY: primitive numbers.
unsafe impl Plain for i32 {}
// SAFETY: primitive numbers.
unsafe impl Plain for f32 {}

/// A fixed-size array of numbers, aligned to 64 bytes and zeroed. Large ones (see [`MAPPED`]) cost no memory until they are written.
pub(crate) struct Buffer<T: Plain> {
    data: NonNull<T>,
    len: usize,
    mapped: bool,
}

// SAFETY: it owns its memory, and `T` is plain data.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: shared access only reads plain data.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeroes; `what` names them in the error.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self, Error> {
        Self::new(len, what, false)
    }

    /// As [`Buffer::zeroed`], untouched and on pages that it shares with no other buffer: each is on the node of whoever writes it first.
    pub fn own_pages(len: usize, what: &'static str) -> Result<Self, Error> {
        Self::new(len, what, true)
    }

    fn new(len: usize, what: &'static str, own_pages: bool) -> Result<Self, Error> {
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| bytes <= isize::MAX as usize - ALIGNMENT)
            .ok_or(Error::OutOfMemory {
                what,
                bytes: usize::MAX,
            })?;
        if bytes == 0 {
            return Ok(Self {
                data: NonNull::dangling(),
                len: 0,
                mapped: false,
            });
        }
        let mapped = own_pages || bytes >= MAPPED;
        let data = if own_pages {
            map_apart(bytes)
        } else if mapped {
            map(bytes)
        } else {
            // SAFETY: the layout's size is not zero.
            NonNull::new(unsafe { alloc_zeroed(Self::layout(bytes)) })
        };
        let data = data.ok_or(Error::OutOfMemory { what, bytes })?.cast();
        Ok(Self { data, len, mapped })
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGNMENT)
            .expect("`new` has checked that size and alignment fit")
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `data` points to `len` initialised elements that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Leaves small the pages that `elements` are on, where the buffer has any of its own: who touches one of them then pays for what is touched, and not for a
    /// huge page.
    #[cfg(target_os = "linux")]
    pub fn small_pages(&mut self, elements: Range<usize>) {
        // SAFETY: a system call without arguments in memory.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0);
        let start = self.data.as_ptr() as usize;
        let [begin, end] = [elements.start, elements.end.min(self.len)]
            .map(|at| start.saturating_add(at * size_of::<T>()) / page.max(1) * page);
        if self.mapped && begin < end {
            // SAFETY: advice on pages within this mapping, which begins with one.
            unsafe {
                libc::madvise(
                    begin as *mut libc::c_void,
                    end - begin,
                    libc::MADV_NOHUGEPAGE,
                );
            }
        }
    }

    /// Elsewhere the system takes pages as it likes.
    #[cfg(not(target_os = "linux"))]
    pub fn small_pages(&mut self, _: Range<usize>) {}

    /// Grows to at least `len` elements; what was in it is lost when it does.
    pub fn reserve(&mut self, len: usize, what: &'static str) -> Result<(), Error> {
        if self.len < len {
            *self = Self::zeroed(len, what)?;
        }
        Ok(())
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        let bytes = self.len * size_of::<T>();
        if self.mapped {
            // SAFETY: mapped in `new` with this very length.
            unsafe { unmap(self.data.cast(), bytes) };
        } else if bytes > 0 {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { dealloc(self.data.as_ptr().cast(), Self::layout(bytes)) };
        }
    }
}

/// Zeroed pages that cost nothing until they are touched.
#[cfg(unix)]
fn map(bytes: usize) -> Option<NonNull<u8>> {
    let data = map_small(bytes)?;
    #[cfg(target_os = "linux")]
    // SAFETY: advice on the mapping just made. Without effect where there are no huge pages.
    unsafe {
        libc::madvise(data.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
    }
    Some(data)
}

/// As [`map`], but no page, huge ones included, reaches into another mapping: the kernel joins mappings side by side, so only whole huge pages
/// within this one are advised to be huge.
#[cfg(target_os = "linux")]
fn map_apart(bytes: usize) -> Option<NonNull<u8>> {
    let huge = bytes / HUGE_PAGE * HUGE_PAGE;
    // Room to begin where a huge page does.
    let slack = if huge > 0 { HUGE_PAGE } else { 0 };
    let whole = map_small(bytes.checked_add(slack)?)?;
    let before = whole.as_ptr().align_offset(HUGE_PAGE).min(slack);
    // SAFETY: a system call without arguments in memory.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).ok()?;
    let end = (before + bytes).next_multiple_of(page);
    let mapped = (bytes + slack).next_multiple_of(page);
    // SAFETY: offsets within the mapping just made, all multiples of a page where something is given back or advised; nobody uses it yet.
    unsafe {
        let data = whole.add(before);
        if before > 0 {
            unmap(whole, before);
        }
        if end < mapped {
            unmap(whole.add(end), mapped - end);
        }
        if huge > 0 {
            libc::madvise(data.as_ptr().cast(), huge, libc::MADV_HUGEPAGE);
        }
        if huge < bytes {
            let rest = data.add(huge).as_ptr().cast();
            libc::madvise(rest, bytes - huge, libc::MADV_NOHUGEPAGE);
        }
        Some(data)
    }
}

/// Elsewhere the system places pages as it likes.
#[cfg(all(unix, not(target_os = "linux")))]
fn map_apart(bytes: usize) -> Option<NonNull<u8>> {
    map(bytes)
}

#[cfg(unix)]
fn map_small(bytes: usize) -> Option<NonNull<u8>> {
    // SAFETY: a new anonymous mapping touches nothing there is.
    let data = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if data == libc::MAP_FAILED {
        return None;
    }
    NonNull::new(data.cast())
}

/// # Safety
/// `data` is a mapping of `bytes` that nobody uses any more.
#[cfg(unix)]
unsafe fn unmap(data: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { libc::munmap(data.as_ptr().cast(), bytes) };
}

#[cfg(not(unix))]
fn map_apart(bytes: usize) -> Option<NonNull<u8>> {
    map(bytes)
}

#[cfg(not(unix))]
fn map(bytes: usize) -> Option<NonNull<u8>> {
    // SAFETY: the layout's size is not zero.
    NonNull::new(unsafe { alloc_zeroed(Buffer::<u8>::layout(bytes)) })
}

/// # Safety
/// `data` was made by `map` with `bytes`, and nobody uses it any more.
#[cfg(not(unix))]
unsafe fn unmap(data: NonNull<u8>, bytes: usize) {
    // SAFETY: the caller's promise.
    unsafe { dealloc(data.as_ptr(), Buffer::<u8>::layout(bytes)) };
}

/// A mutable array that several threads write at once, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: it hands out elements only through unsafe methods, whose callers keep to disjoint ranges.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The caller keeps `slice` borrowed while the copies are in use: kernels do so by blocking in `Pool::run`.
    pub fn new(slice: &mut [T]) -> Self {
        Self {
            data: slice.as_mut_ptr(),
            len: slice.len(),
        }
    }

    /// What there is of elements `start..start + len`, for somebody else.
    pub fn part(&self, start: usize, len: usize) -> Self {
        let start = start.min(self.len);
        Self {
            data: self.data.wrapping_add(start),
            len: len.min(self.len - start),
        }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No other thread uses any of them meanwhile, and the slice `self` was made of is still borrowed.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(Buffer::<f32>::zeroed(usize::MAX / 2, "test").is_err());
        assert!(Buffer::<f32>::zeroed(1 << 60, "test").is_err());
    }

    /// The resident part of this process, in bytes.
    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_large_buffer_costs_nothing_until_it_is_written() {
        let before = resident();
        let mut buffer = Buffer::<u8>::zeroed(1 << 30, "test").unwrap();
        assert!(resident() < before + (64 << 20));
        buffer.as_mut_slice()[1 << 29] = 1;
        assert_eq!(buffer.as_slice()[(1 << 29) - 1], 0);
        assert!(resident() < before + (64 << 20));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_touch_of_small_pages_costs_no_huge_one() {
        let mut buffer = Buffer::<u8>::zeroed(256 << 20, "test").unwrap();
        let begins = || (0..128).map(|at| at * HUGE_PAGE);
        for at in begins() {
            buffer.small_pages(at..at + HUGE_PAGE);
        }
        // Beyond its end is nothing to advise.
        buffer.small_pages(buffer.len()..buffer.len() + HUGE_PAGE);
        let before = resident();
        begins().for_each(|at| buffer.as_mut_slice()[at] = 1);
        assert!(resident() < before + (64 << 20));
        assert_eq!(buffer.as_slice()[HUGE_PAGE - 1], 0);
    }

    #[test]
    fn buffers_are_zeroed_and_aligned() {
        let buffer = Buffer::<u16>::zeroed(1001, "test").unwrap();
        assert!(buffer.as_slice().iter().all(|&x| x == 0));
        assert_eq!(buffer.as_slice().as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(Buffer::<u16>::zeroed(0, "test").unwrap().len(), 0);
    }
}
