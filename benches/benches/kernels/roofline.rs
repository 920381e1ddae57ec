//! [`Roofline`]: beside each kernel's time the least that the machine could need for it (Williams et al. 2009).

#[path = "../../src/engine/limits.rs"]
mod limits;

use std::cell::Cell;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId};
use quire_kernels::cpu::{CpuOptions, Isa};

pub use limits::Operands;

use limits::Limits;

/// What one call of a kernel cannot do without.
#[derive(Debug, Clone, Copy, Default)]
pub struct Need {
    /// Bytes to be read and written, as if none were in a cache.
    pub bytes: f64,
    /// Multiplications and additions of f32.
    pub f32: f64,
    /// Those of matrices' products, and of what.
    pub products: Option<(Operands, f64)>,
}

/// The machine's limits, measured before the first kernel.
#[derive(Debug)]
pub struct Roofline(Limits);

impl Roofline {
    /// Measures them on the threads and with the instruction set that the kernels have, and says what they are.
    ///
    /// # Errors
    /// There is no memory to read.
    pub fn measure(options: &CpuOptions) -> anyhow::Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or_else(cores);
        let isa = options.isa.unwrap_or_else(Isa::best);
        let limits = Limits::measure(threads, isa)?;
        println!(
            "limits of {} on {threads} threads: memory {:.1} GB/s, f32 {:.0} GFLOP/s, bf16 {:.0} GFLOP/s, 8-bit {:.0} GOP/s",
            isa.name(),
            limits.memory_bytes_per_second / 1e9,
            limits.f32.per_second / 1e9,
            limits.of(Operands::Bf16).per_second / 1e9,
            limits.of(Operands::Int8).per_second / 1e9
        );
        Ok(Self(limits))
    }

    /// Threads they were measured on.
    pub fn threads(&self) -> usize {
        self.0.threads
    }

    /// Times a kernel and prints, after what criterion says of it, the share of the nearer limit that its median sample reaches.
    pub fn bench(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        id: impl Into<Id>,
        need: Need,
        mut kernel: impl FnMut(),
    ) {
        let samples = Cell::new(Vec::new());
        group.bench_function(id.into().0, |bencher| {
            bencher.iter_custom(|turns| {
                let began = Instant::now();
                for _ in 0..turns {
                    kernel();
                }
                let took = began.elapsed();
                let mut all = samples.take();
                all.push(took.as_secs_f64() / turns as f64);
                samples.set(all);
                took
            });
        });
        let mut samples = samples.take();
        samples.sort_by(f64::total_cmp);
        // Without samples this one was filtered out.
        if let Some(&seconds) = samples.get(samples.len() / 2) {
            println!("{}", self.line(need, seconds));
        }
    }

    fn line(&self, need: Need, seconds: f64) -> String {
        let memory = need.bytes / self.0.memory_bytes_per_second;
        let (operands, products) = need.products.unwrap_or((Operands::F32, 0.0));
        let arithmetic =
            need.f32 / self.0.f32.per_second + products / self.0.of(operands).per_second;
        let mut line = String::from("                        roofline: ");
        let least = memory.max(arithmetic);
        let which = if memory > arithmetic {
            "memory"
        } else {
            "arithmetic"
        };
        let at_least = Duration::from_secs_f64(least);
        // Writing to a string cannot fail.
        let _ = write!(
            line,
            "{at_least:.1?} ({which}), {:.0} % reached",
            100.0 * least / seconds
        );
        line
    }
}

/// What a benchmark is called.
pub struct Id(BenchmarkId);

impl From<usize> for Id {
    fn from(rows: usize) -> Self {
        Self(BenchmarkId::from_parameter(rows))
    }
}

impl From<&str> for Id {
    fn from(name: &str) -> Self {
        Self(BenchmarkId::from_parameter(name))
    }
}
