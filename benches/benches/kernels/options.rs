//! What the environment says of every benchmark here; the command line is criterion's.

#[path = "../../src/engine/instructions.rs"]
mod instructions;

use std::env::{self, VarError};

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use quire_kernels::cpu::{CpuOptions, Isa};

use instructions::InstructionSet;

const ISA: &str = "QUIRE_BENCH_ISA";
const THREADS: &str = "QUIRE_BENCH_THREADS";

/// The kernels' instruction set and threads: the best there is on all cores, where `QUIRE_BENCH_ISA` and `QUIRE_BENCH_THREADS` say nothing else.
///
/// # Errors
/// They say what there is not.
pub fn options() -> anyhow::Result<CpuOptions> {
    Ok(CpuOptions {
        isa: value(ISA)?.map(|name| isa(&name)).transpose()?,
        threads: value(THREADS)?.map(|count| threads(&count)).transpose()?,
        ..CpuOptions::default()
    })
}

fn value(name: &str) -> anyhow::Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(error) => bail!("{name}: {error}"),
    }
}

fn isa(name: &str) -> anyhow::Result<Isa> {
    let Ok(set) = InstructionSet::from_str(name, false) else {
        let sets = InstructionSet::value_variants().iter();
        let names: Vec<_> = sets
            .filter_map(|set| Some(set.to_possible_value()?.get_name().to_owned()))
            .collect();
        bail!("{ISA}={name}: choose one of {}", names.join(", "));
    };
    let isa = set.isa();
    ensure!(
        isa.is_available(),
        "{ISA}={name}: this processor does not have {}",
        isa.name()
    );
    Ok(isa)
}

fn threads(count: &str) -> anyhow::Result<usize> {
    let expected = || format!("{THREADS}={count}: expected a number of threads, at least 1");
    let threads = count.parse().with_context(expected)?;
    ensure!(threads > 0, expected());
    Ok(threads)
}
