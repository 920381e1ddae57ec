//! The operations of a decoder by themselves: each of `Backend`, products in every format, and what ranks exchange. Shapes are those of
//! Qwen3-0.6B; of experts, those of Qwen3-30B-A3B and gpt-oss-20b.
//!
//! They run on all cores this process may use, with the best instruction set there is, unless the environment says otherwise: `QUIRE_BENCH_THREADS` a
//! number, `QUIRE_BENCH_ISA` a name as `quire-bench engine --isa` takes it. Limits are those of the same threads and instructions.
//!
//! One row is limited by memory and reported in bytes of weights a second; many rows are limited by arithmetic and reported in
//! operations a second ("elem" is one multiplication or addition). Matrices are used in turn, enough of them not to stay in any cache: so it is in a model.
//! Beside each stands its roofline: the least time the machine could need, by its memory bandwidth and arithmetic peak as measured first.
//!
//! Of what a CPU does for a decoder, three operations are not here. `begin` computes nothing: what a step costs beside its kernels is `quire-bench
//! overhead`'s question. `each` lends threads; what rows of logits cost on them is in `sampler.rs`. `claim` has the system hand out memory.

mod attention;
mod experts;
mod head;
mod inputs;
mod options;
mod products;
mod ranks;
mod roofline;
mod rows;

use std::time::Duration;

use criterion::Criterion;

use roofline::Roofline;

fn main() -> anyhow::Result<()> {
    let options = options::options()?;
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_millis(1500))
        .warm_up_time(Duration::from_millis(300))
        .configure_from_args();
    let roofline = Roofline::measure(&options)?;
    products::benches(&mut criterion, &roofline);
    experts::benches(&mut criterion, &roofline);
    attention::benches(&mut criterion, &roofline);
    rows::benches(&mut criterion, &roofline);
    head::benches(&mut criterion, &roofline);
    ranks::benches(&mut criterion, &roofline);
    criterion.final_summary();
    Ok(())
}
