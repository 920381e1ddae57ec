//! The operations of a decoder by themselves, on all cores this process may use: each of `Backend`, products in every format. Shapes are those of
//! Qwen3-0.6B; of experts, those of Qwen3-30B-A3B and gpt-oss-20b.
//!
//! One row is limited by memory and reported in bytes of weights a second; many rows are limited by arithmetic and reported in
//! operations a second ("elem" is one multiplication or addition). Matrices are used in turn, enough of them not to stay in any cache: so it is in a model.
//! Beside each stands its roofline: the least time the machine could need, by its memory bandwidth and arithmetic peak as measured first.
//!
//! Two operations are not here. `begin` computes nothing: what a step costs beside its kernels is `quire-bench overhead`'s question. `each` lends threads.

mod attention;
mod experts;
mod head;
mod inputs;
mod products;
mod roofline;
mod rows;

use std::time::Duration;

use criterion::Criterion;

use roofline::Roofline;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_millis(1500))
        .warm_up_time(Duration::from_millis(300))
        .configure_from_args();
    let roofline = Roofline::measure();
    products::benches(&mut criterion, &roofline);
    experts::benches(&mut criterion, &roofline);
    attention::benches(&mut criterion, &roofline);
    rows::benches(&mut criterion, &roofline);
    head::benches(&mut criterion, &roofline);
    criterion.final_summary();
}
