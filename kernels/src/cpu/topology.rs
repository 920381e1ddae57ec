//! Which cores this process may use, and staying on one.

/// The cores this process may use, in order; empty where the system does not say.
#[cfg(target_os = "linux")]
pub(crate) fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer and the size belong to `set`.
    let got = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) };
    if got != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize)
        // SAFETY: the index is below CPU_SETSIZE.
        .filter(|&core| unsafe { libc::CPU_ISSET(core, &set) })
        .collect()
}

/// Keeps the calling thread on one core. Without effect where that is not allowed: it is a matter of speed only.
#[cfg(target_os = "linux")]
pub(crate) fn pin(core: usize) {
    // SAFETY: an all-zero set is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core >= libc::CPU_SETSIZE as usize {
        return;
    }
    // SAFETY: the index is below CPU_SETSIZE; pointer and size belong to `set`.
    unsafe {
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// The cores this process may use, in order; empty where the system does not say.
#[cfg(not(target_os = "linux"))]
pub(crate) fn allowed_cores() -> Vec<usize> {
    Vec::new()
}

/// Keeps the calling thread on one core, where the system can.
#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_core: usize) {}

/// Threads that compute by default: the cores this process may use, within the CPU quota of its container.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}
