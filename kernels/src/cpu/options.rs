//! [`CpuOptions`].

use super::numa::Numa;
use super::simd::Isa;

/// How a [`CpuBackend`](super::CpuBackend) is made.
#[derive(Debug, Clone, Copy)]
pub struct CpuOptions {
    /// Threads that compute; `None`: the cores this process may use.
    pub threads: Option<usize>,
    /// Keep threads on their NUMA node, and on a core of their own if they are as many as there are. Right for a server, wrong for many backends in
    /// one process.
    pub pin: bool,
    /// The instruction set; `None`: the best there is.
    pub isa: Option<Isa>,
    /// The NUMA nodes that weights, KV cache and threads are divided among.
    pub numa: Numa,
    /// Round activations to bfloat16 where weights are bfloat16: what most engines do, and several times as fast where the instruction
    /// set is [`Isa::Amx`] or [`Isa::Avx512Bf16`]. Otherwise they are multiplied as f32. Under [`Isa::Amx`] answers have bits of their own.
    pub bf16_activations: bool,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            threads: None,
            pin: true,
            isa: None,
            numa: Numa::Auto,
            bf16_activations: false,
        }
    }
}
