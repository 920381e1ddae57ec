//! What no instruction set says of a processor's speed, by who made it. Measured on an AMD Zen 5 and an Intel Emerald Rapids (benches/NOTES.md).

/// Whether shifting and masking vectors takes turns with multiplying them. Of 512 bits, two units do both on Intel's processors, and four share the work on AMD's; of 256 bits, two of
/// Intel's three vector units multiply, and only those shift.
pub(crate) fn shares_units() -> bool {
    is_intel()
}

/// Whether AVX-512's products of bfloat16 are faster than multiply-adds: on AMD's processors twice as fast, on Intel's half as fast (one in two cycles).
pub(super) fn bf16_products_pay() -> bool {
    !is_intel()
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    static IS_INTEL: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // (Under a hypervisor the instruction takes microseconds: once.)
    *IS_INTEL.get_or_init(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes);
        vendor.as_flattened() == b"GenuineIntel"
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
}
