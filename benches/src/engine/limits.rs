//! [`Limits`]: what the machine can do at most, measured. Small loops that do nothing but read, or nothing but multiply and add.
//!
//! On x86-64 the arithmetic loops are written in assembly, one for each instruction set, and the fastest that the processor has counts — also
//! where our kernels do not use it yet. Elsewhere plain Rust stands in for f32, and products of fewer bits are not measured.

use quire_kernels::Format;
use quire_kernels::cpu::Isa;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use serde::Serialize;

/// A peak, and the instructions it was reached with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// Multiplications and additions.
    pub per_second: f64,
    /// The instruction set.
    pub with: &'static str,
}

/// What the machine can do at most, all threads together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Limits {
    /// Threads that were measured.
    pub threads: usize,
    /// Reading memory that is in no cache.
    pub memory_bytes_per_second: f64,
    /// f32 multiply-add.
    pub f32: Peak,
    /// Products of bfloat16 added up in f32; `None` where no instruction does them.
    pub bf16: Option<Peak>,
    /// Products of 8-bit integers added up exactly in 32 bits; `None` where it was not measured.
    pub int8: Option<Peak>,
}

/// What a product of matrices multiplies, which decides what it can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operands {
    F32,
    Bf16,
    Int8,
}

impl Operands {
    /// Of the products with weights in a format; `round`: activations are rounded to bfloat16 where weights are.
    pub fn of(format: Format, round: bool) -> Self {
        match format {
            Format::Bf16 if round => Self::Bf16,
            _ if format.multiplies_integers() => Self::Int8,
            _ => Self::F32,
        }
    }
}

/// Memory that is read: more than any cache holds.
const BUFFER_BYTES: usize = 1 << 30;
/// Runs of each loop, of which the fastest counts: a limit is what can be reached, not what is reached beside other programs.
const RUNS: usize = 5;

impl Limits {
    /// Measures on so many threads, with what kernels of `isa` may use. Takes a few seconds.
    ///
    /// # Errors
    /// There is no memory to read.
    pub fn measure(threads: usize, isa: Isa) -> anyhow::Result<Self> {
        let best = |loops: &[Loop]| {
            loops
                .iter()
                .filter(|l| (l.available)() && l.belongs_to(isa))
                .map(|l| l.peak(threads))
                .max_by(|a, b| a.per_second.total_cmp(&b.per_second))
        };
        Ok(Self {
            threads,
            memory_bytes_per_second: memory(threads)?,
            f32: best(F32).unwrap_or_else(|| PLAIN.peak(threads)),
            bf16: best(BF16),
            int8: best(INT8),
        })
    }

    /// The peak of a product; f32's stands in for what has none.
    pub fn of(&self, operands: Operands) -> Peak {
        match operands {
            Operands::F32 => None,
            Operands::Bf16 => self.bf16,
            Operands::Int8 => self.int8,
        }
        .unwrap_or(self.f32)
    }
}

/// Runs `work` on all threads at once; the time from when the first of them begins until the last is done.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    // By the clock of who works: a thread that only waits may be woken when the work is half done.
                    let began = Instant::now();
                    work(thread);
                    (began, Instant::now())
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().expect("the loops do not panic"))
            .collect()
    });
    let began = times.iter().map(|(began, _)| *began).min();
    let ended = times.iter().map(|(_, ended)| *ended).max();
    match (began, ended) {
        (Some(began), Some(ended)) => ended - began,
        _ => Duration::ZERO,
    }
}

fn fastest(speeds: [f64; RUNS]) -> f64 {
    speeds.into_iter().fold(0.0, f64::max)
}

fn memory(threads: usize) -> anyhow::Result<f64> {
    let words = BUFFER_BYTES / size_of::<u64>();
    let mut buffer: Vec<u64> = Vec::new();
    buffer
        .try_reserve_exact(words)
        .map_err(|error| anyhow::anyhow!("no memory to measure the memory with: {error}"))?;
    // Not zeroes: pages of zeroes may all be the same page.
    buffer.resize(words, 1);
    let part = words / threads;
    let speeds = [(); RUNS].map(|()| {
        let took = together(threads, |thread| {
            let words = &buffer[thread * part..(thread + 1) * part];
            let mut sums = [0_u64; 16];
            for group in words.chunks_exact(sums.len()) {
                for (sum, word) in sums.iter_mut().zip(group) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            std::hint::black_box(sums);
        });
        (part * threads * size_of::<u64>()) as f64 / took.as_secs_f64()
    });
    Ok(fastest(speeds))
}

/// A loop that does arithmetic and nothing else.
struct Loop {
    with: &'static str,
    /// The least of the kernels' instruction sets that may use it.
    isa: Isa,
    /// Whether the processor has the instructions.
    available: fn() -> bool,
    /// Multiplications and additions of one turn.
    operations: f64,
    /// Does so many turns. To be called only if `available`.
    run: fn(u64),
}

impl Loop {
    /// Whether kernels for `isa` may use its instructions.
    fn belongs_to(&self, isa: Isa) -> bool {
        match isa {
            Isa::Avx512Bf16 | Isa::Amx => {
                self.isa == isa || !matches!(self.isa, Isa::Avx512Bf16 | Isa::Amx)
            }
            Isa::Avx512 => !matches!(self.isa, Isa::Avx512Bf16 | Isa::Amx),
            _ => self.isa == Isa::Avx2 || self.isa == isa,
        }
    }

    fn peak(&self, threads: usize) -> Peak {
        // Turns that take about 50 ms.
        let mut turns = 1 << 16;
        while together(threads, |_| (self.run)(turns)) < Duration::from_millis(50) {
            turns *= 2;
        }
        let speeds = [(); RUNS].map(|()| {
            let took = together(threads, |_| (self.run)(turns));
            self.operations * turns as f64 * threads as f64 / took.as_secs_f64()
        });
        Peak {
            per_second: fastest(speeds),
            with: self.with,
        }
    }
}

const PLAIN: Loop = Loop {
    with: "plain Rust",
    isa: Isa::Scalar,
    available: || true,
    operations: 2.0 * 64.0,
    run: |turns| {
        let factor = std::hint::black_box(1.0_f32);
        let mut sums = [0.0_f32; 64];
        for _ in 0..turns {
            for sum in &mut sums {
                *sum = *sum * factor + factor;
            }
        }
        std::hint::black_box(sums);
    },
};

#[cfg(not(target_arch = "x86_64"))]
const F32: &[Loop] = &[];
#[cfg(not(target_arch = "x86_64"))]
const BF16: &[Loop] = &[];
#[cfg(not(target_arch = "x86_64"))]
const INT8: &[Loop] = &[];

#[cfg(target_arch = "x86_64")]
use x86::{BF16, F32, INT8};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Independent chains of instructions, enough of them to keep two units busy whose results take five cycles.

    use std::arch::{asm, is_x86_feature_detected};

    use quire_kernels::cpu::Isa;

    use super::Loop;

    /// 1.0 as bits, two of bfloat16, and four 8-bit ones.
    const ONE: u32 = 0x3f80_0000;
    const PAIR: u32 = 0x3f80_3f80;
    const ONES: u32 = 0x0101_0101;

    /// Repeats the given lines; registers 12 and 13 hold `$value` in every lane, 14 holds 16-bit ones, the others zero.
    macro_rules! repeat {
        ($turns:ident, $wide:literal, $value:ident, $($line:expr),+ $(,)?) => {
            // SAFETY: a loop is run only where the processor has its instructions. They touch no memory, and every register they use is
            // declared.
            unsafe {
                asm!(
                    "vzeroall",
                    "vmovd xmm12, {value:e}",
                    concat!("vpbroadcastd ", $wide, "12, xmm12"),
                    concat!("vpbroadcastd ", $wide, "13, xmm12"),
                    "vmovd xmm14, {words:e}",
                    concat!("vpbroadcastd ", $wide, "14, xmm14"),
                    "2:",
                    $($line,)+
                    "dec {turns}",
                    "jnz 2b",
                    "vzeroupper",
                    turns = inout(reg) $turns => _,
                    value = in(reg) $value,
                    words = in(reg) 0x0001_0001_u32,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                    out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                    out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack),
                );
            }
        };
    }

    /// One instruction that multiplies and adds, in twelve chains.
    macro_rules! one_instruction {
        ($turns:ident, $wide:literal, $value:ident, $op:literal) => {
            one_instruction!(@ $turns, $wide, $value, $op, 0 1 2 3 4 5 6 7 8 9 10 11)
        };
        (@ $turns:ident, $wide:literal, $value:ident, $op:literal, $($n:literal)+) => {
            repeat!($turns, $wide, $value, $(
                concat!($op, " ", $wide, $n, ", ", $wide, "12, ", $wide, "13"),
            )+)
        };
    }

    /// Multiply to 16 bits, add neighbours to 32 bits, add up: six chains with a register each to work in.
    macro_rules! three_instructions {
        ($turns:ident, $wide:literal) => {
            three_instructions!(@ $turns, $wide, 0 6, 1 7, 2 8, 3 9, 4 10, 5 11)
        };
        (@ $turns:ident, $wide:literal, $($n:literal $t:literal),+) => {
            repeat!($turns, $wide, ONES, $(
                concat!("vpmaddubsw ", $wide, $t, ", ", $wide, "12, ", $wide, "13"),
                concat!("vpmaddwd ", $wide, $t, ", ", $wide, $t, ", ", $wide, "14"),
                concat!("vpaddd ", $wide, $n, ", ", $wide, $n, ", ", $wide, $t),
            )+)
        };
    }

    pub const F32: &[Loop] = &[
        Loop {
            with: "AVX2+FMA",
            isa: Isa::Avx2,
            available: || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            operations: 12.0 * 8.0 * 2.0,
            run: |turns| one_instruction!(turns, "ymm", ONE, "vfmadd231ps"),
        },
        Loop {
            with: "AVX-512",
            isa: Isa::Avx512,
            available: || is_x86_feature_detected!("avx512f"),
            operations: 12.0 * 16.0 * 2.0,
            run: |turns| one_instruction!(turns, "zmm", ONE, "vfmadd231ps"),
        },
    ];

    pub const BF16: &[Loop] = &[
        Loop {
            with: "AVX-512 BF16",
            isa: Isa::Avx512Bf16,
            available: || is_x86_feature_detected!("avx512bf16"),
            operations: 12.0 * 32.0 * 2.0,
            run: |turns| one_instruction!(turns, "zmm", PAIR, "vdpbf16ps"),
        },
        Loop {
            with: "AMX",
            isa: Isa::Amx,
            available: || Isa::Amx.is_available(),
            operations: 4.0 * 16.0 * 16.0 * 32.0 * 2.0,
            run: products_of_tiles,
        },
    ];

    /// Shapes of eight tiles for `ldtilecfg`: 16 rows of 64 bytes each.
    #[repr(align(64))]
    struct Shapes([u8; 64]);

    static SHAPES: Shapes = {
        let mut shapes = [0; 64];
        // The palette; then bytes of a row in 16 bits each, and rows.
        shapes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            shapes[16 + 2 * tile] = 64;
            shapes[48 + tile] = 16;
            tile += 1;
        }
        Shapes(shapes)
    };

    /// Four products of tiles, each added to a tile of its own. The tiles are zero, which takes as long as other numbers.
    fn products_of_tiles(turns: u64) {
        // SAFETY: it is run only where this process may use tiles, of which none are in use. They touch no memory.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {turns}",
                "jnz 2b",
                "tilerelease",
                shapes = in(reg) SHAPES.0.as_ptr(),
                turns = inout(reg) turns => _,
                options(readonly, nostack),
            );
        }
    }

    pub const INT8: &[Loop] = &[
        Loop {
            with: "AVX2",
            isa: Isa::Avx2,
            available: || is_x86_feature_detected!("avx2"),
            operations: 6.0 * 32.0 * 2.0,
            run: |turns| three_instructions!(turns, "ymm"),
        },
        Loop {
            with: "AVX-VNNI",
            isa: Isa::AvxVnni,
            available: || is_x86_feature_detected!("avxvnni"),
            operations: 12.0 * 32.0 * 2.0,
            run: |turns| one_instruction!(turns, "ymm", ONES, "{{vex}} vpdpbusd"),
        },
        Loop {
            with: "AVX-512",
            isa: Isa::Avx512,
            available: || is_x86_feature_detected!("avx512bw"),
            operations: 6.0 * 64.0 * 2.0,
            run: |turns| three_instructions!(turns, "zmm"),
        },
        Loop {
            with: "AVX-512 VNNI",
            isa: Isa::Avx512,
            available: || is_x86_feature_detected!("avx512vnni"),
            operations: 12.0 * 64.0 * 2.0,
            run: |turns| one_instruction!(turns, "zmm", ONES, "vpdpbusd"),
        },
    ];
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_loop_the_processor_has_runs() {
        let loops = super::F32.iter().chain(super::BF16).chain(super::INT8);
        for l in loops.chain([&super::PLAIN]) {
            if (l.available)() {
                // An instruction it does not have would end the process.
                (l.run)(1);
                (l.run)(1000);
            }
        }
    }

    #[test]
    fn no_thread_takes_longer_than_all_together() {
        use std::sync::Mutex;
        use std::time::{Duration, Instant};

        // More threads than cores: whoever waits for them is woken late.
        let longest = Mutex::new(Duration::ZERO);
        let took = super::together(32, |_| {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(20) {
                std::hint::spin_loop();
            }
            let mut longest = longest.lock().unwrap();
            *longest = longest.max(began.elapsed());
        });
        let longest = longest.into_inner().unwrap();
        assert!(took >= longest, "{took:?} for work of {longest:?}");
    }
}
