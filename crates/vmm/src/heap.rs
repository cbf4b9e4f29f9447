//! The allocator of a process that builds one machine and then allocates next to nothing, a few hundred times per host.

/// Lets all threads share one heap; to be called before the first is started. A heap of its own for each would cost pages.
pub fn share() {
    // SAFETY: sets a number of the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives back what building the machine needed and running it does not.
pub fn trim() {
    // SAFETY: returns pages of free blocks to the kernel.
    unsafe { libc::malloc_trim(0) };
}
