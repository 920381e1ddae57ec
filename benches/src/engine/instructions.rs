//! [`InstructionSet`]: what command lines call the kernels' instruction sets.

use clap::ValueEnum;
use quire_kernels::cpu::Isa;
use serde::Serialize;

/// Instruction sets of the CPU kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstructionSet {
    /// AVX-512 with VNNI and AMX's products of matrices
    Amx,
    /// AVX-512 with VNNI and products of bfloat16
    Avx512Bf16,
    /// AVX-512 with VNNI
    Avx512,
    /// AVX2, FMA and F16C, and AVX-VNNI's products of bytes
    AvxVnni,
    /// AVX2, FMA and F16C
    Avx2,
    /// NEON with dot products of bytes
    Dotprod,
    /// NEON
    Neon,
    /// Plain Rust
    Scalar,
}

impl InstructionSet {
    /// The kernels' name for it.
    pub fn isa(self) -> Isa {
        match self {
            Self::Amx => Isa::Amx,
            Self::Avx512Bf16 => Isa::Avx512Bf16,
            Self::Avx512 => Isa::Avx512,
            Self::AvxVnni => Isa::AvxVnni,
            Self::Avx2 => Isa::Avx2,
            Self::Dotprod => Isa::NeonDotprod,
            Self::Neon => Isa::Neon,
            Self::Scalar => Isa::Scalar,
        }
    }
}
