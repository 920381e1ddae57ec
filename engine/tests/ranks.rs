//! Several ranks, each with its part of the weights straight from the checkpoint, compute what one computes.
//!
//! The ranks are CPU backends in threads of this process, and their sums go through [`InProcess`]; what is tested is what GPUs use too (`cuda.rs`): the cuts
//! of every tensor, and where the parts are added up. Parts of sums are rounded on their own, so logits differ by some last bits from those of one rank —
//! from those of another run, or of another rank, by none.
#![allow(clippy::unwrap_used)]

mod common;

use common::Random;
use common::sequence::Sequence;
use quire::checkpoint::{Checkpoint, ModelSource};
use quire::core::{Engine, EngineConfig};
use quire::model::{Decoder, LoadOptions};
use quire_kernels::cpu::CpuBackend;
use quire_kernels::{Format, InProcess, KvDtype};

const PROMPT: usize = 70;
const CHUNK: usize = 33;
const STEPS: usize = 6;

fn golden(name: &str) -> Checkpoint {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    Checkpoint::open(&ModelSource::Path(path.into())).unwrap()
}

/// Every rank's backend.
fn backends(of: usize) -> Vec<CpuBackend> {
    InProcess::group(of)
        .into_iter()
        .map(|rank| CpuBackend::of_rank(common::options(1), Box::new(rank)).unwrap())
        .collect()
}

/// The logits after a prompt and after each of some further tokens.
fn read(mut sequence: Sequence) -> Vec<Vec<f32>> {
    let vocabulary = sequence.decoder.config().vocab_size;
    let mut random = Random::new(3);
    let mut token = || random.below(vocabulary) as u32;
    let prompt: Vec<u32> = (0..PROMPT).map(|_| token()).collect();
    let first = sequence.read(&prompt, CHUNK);
    let rest = (0..STEPS).map(|_| sequence.read(&[token()], 1));
    std::iter::once(first).chain(rest).collect()
}

/// What every rank's decoder gives.
fn read_on(of: usize, checkpoint: &Checkpoint, quantize: Option<Format>) -> Vec<Vec<Vec<f32>>> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = backends(of)
            .into_iter()
            .map(|backend| {
                scope.spawn(move || read(Sequence::on(backend, checkpoint, quantize, KvDtype::F32)))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The largest difference of a row, relative to its largest logit.
fn error(got: &[f32], expected: &[f32]) -> f32 {
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let differences = got.iter().zip(expected).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max) / largest
}

fn equal_one_rank(name: &str, of: usize) {
    let checkpoint = golden(name);
    let one = read(Sequence::new(&checkpoint));
    let ranks = read_on(of, &checkpoint, None);
    for rank in &ranks {
        for (got, expected) in rank.iter().zip(&one) {
            assert_eq!(got.len(), checkpoint.config.vocab_size);
            let error = error(got, expected);
            assert!(error < 1e-5, "{name} on {of} ranks: {error}");
        }
        let same = rank.iter().flatten().zip(ranks[0].iter().flatten());
        assert!(same.into_iter().all(|(a, b)| a.to_bits() == b.to_bits()));
    }
    let again = read_on(of, &checkpoint, None);
    assert_eq!(again, ranks, "{name}: not the same in another run");
}

#[test]
fn qwen3_with_a_tied_head() {
    equal_one_rank("qwen3", 2);
}

#[test]
fn llama_with_biases_everywhere_that_are_added_once() {
    equal_one_rank("llama3-rope", 2);
}

#[test]
fn five_heads_on_two_ranks_and_on_three() {
    equal_one_rank("llama-linear-rope", 2);
    equal_one_rank("llama-linear-rope", 3);
}

#[test]
fn phi3_whose_fused_projections_are_cut_in_each_of_their_parts() {
    equal_one_rank("phi3", 2);
    equal_one_rank("phi3", 3);
}

#[test]
fn experts_of_which_every_rank_has_some_rows() {
    equal_one_rank("qwen3-moe", 2);
}

#[test]
fn gpt_oss_with_sinks_biased_experts_and_windows() {
    equal_one_rank("gpt-oss", 2);
}

#[test]
fn gemma2_with_norms_around_what_is_added_up() {
    equal_one_rank("gemma2", 2);
}

#[test]
fn windows_and_multipliers() {
    for name in ["mistral", "ministral", "granite"] {
        equal_one_rank(name, 2);
    }
}

#[test]
fn more_ranks_than_key_value_heads_share_them() {
    equal_one_rank("qwen2", 2);
    equal_one_rank("qwen2", 4);
    equal_one_rank("qwen3", 4);
    // Three query heads.
    equal_one_rank("phi4-longrope", 2);
    equal_one_rank("smollm3", 2);
}

/// Activations are rounded to 8 bits between the sums, which magnifies their last bits; and with multiples of the unit of the part that a rank has.
fn tell_the_same(name: &str, checkpoint: &Checkpoint, quantize: Option<Format>, of: usize) {
    let one = read(Sequence::on(
        common::backend(1),
        checkpoint,
        quantize,
        KvDtype::F32,
    ));
    for rank in read_on(of, checkpoint, quantize) {
        for (got, expected) in rank.iter().zip(&one) {
            let divergence = common::divergence(expected, got);
            assert!(divergence < 3e-3, "{name} as {quantize:?}: {divergence}");
        }
    }
}

#[test]
fn quantised_weights_are_cut_between_their_blocks() {
    let demo = common::demo_checkpoint();
    for format in [Format::Q8_0, Format::Q4_0] {
        tell_the_same("demo", &demo, Some(format), 3);
    }
    for name in ["mlx-8bit-f16", "compressed-int4-g32"] {
        tell_the_same(name, &golden(&format!("formats/{name}")), None, 2);
    }
}

#[test]
fn what_cannot_be_divided_is_refused_with_the_numbers() {
    let refused = |name: &str, of: usize| {
        let mut backends = backends(of);
        let options = LoadOptions {
            quantize: None,
            max_rows: 8,
        };
        let loaded = Decoder::load(&golden(name), backends.remove(0), options, &mut |_| {});
        loaded.unwrap_err().to_string()
    };
    let text = refused("llama-linear-rope", 7);
    assert!(
        text.contains("7 ranks") && text.contains("5 key/value heads"),
        "{text}"
    );
    let text = refused("olmo2", 2);
    assert!(text.contains("normalised over all heads"), "{text}");
    let text = refused("bitnet", 2);
    assert!(text.contains("norms inside"), "{text}");
    let text = refused("formats/mlx-4bit", 2);
    assert!(
        text.contains("o_proj") && text.contains("column 32 of 64") && text.contains("block of 64"),
        "{text}"
    );
    let text = refused("formats/gptq-4bit-g32-desc-act", 2);
    assert!(text.contains("desc_act"), "{text}");
}

#[test]
fn an_engine_wants_the_ranks_of_one_group_in_order() {
    let mut backends = backends(2);
    backends.reverse();
    let checkpoint = common::demo_checkpoint();
    let config = EngineConfig::default();
    let error =
        Engine::start_on_ranks(&checkpoint, backends, &config, None, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("expected"), "{error}");
    let none: Vec<CpuBackend> = Vec::new();
    assert!(Engine::start_on_ranks(&checkpoint, none, &config, None, &mut |_| {}).is_err());
}
