//! [`Cost`]: what a step cannot do without — bytes to be read, operations to be done.

use quire::model::ModelConfig;
use quire_kernels::KvDtype;

use super::limits::{Limits, Operands};

/// The price of a model's parts.
#[derive(Debug, Clone)]
pub struct Cost {
    /// Weights of the layers' matrices that every token is multiplied with: attention, routers, MLPs of the layers without experts.
    dense_weights: f64,
    /// The mixture of experts of the layers that have one.
    experts: Option<Experts>,
    /// Weights of the output head.
    head_weights: f64,
    bytes_per_weight: f64,
    /// What their products multiply.
    operands: Operands,
    /// Bytes of the keys and values of one position in one layer.
    kv_bytes: f64,
    /// Operations of attention for one query and one key in one layer.
    attention: f64,
    /// The sliding window of each layer; `None`: it sees all positions.
    windows: Vec<Option<u32>>,
}

/// Experts of all layers together.
#[derive(Debug, Clone, Copy)]
struct Experts {
    /// Of a layer.
    count: f64,
    /// How many of them a token uses.
    top_k: f64,
    /// Weights of one of them, in every layer that has it.
    weights: f64,
}

impl Experts {
    /// How many of a layer's experts a step of so many tokens is to read if routers choose evenly: each is left alone by a token with
    /// probability 1 - k/n.
    fn read(&self, tokens: f64) -> f64 {
        self.count * (1.0 - (1.0 - self.top_k / self.count).powf(tokens))
    }
}

/// What a run of steps needs at least.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Need {
    /// To be read: weights once a step, keys and values once a sequence.
    pub bytes: f64,
    /// Multiplications and additions with weights.
    pub products: f64,
    /// Multiplications and additions of attention.
    pub attention: f64,
}

impl Cost {
    /// Of a model whose matrices occupy `weight_bytes`.
    pub fn of(
        config: &ModelConfig,
        weight_bytes: usize,
        operands: Operands,
        kv_dtype: KvDtype,
    ) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let attention = hidden * (q + 2 * kv) + q * hidden;
        let layers = config.layers.len();
        let mixed = config.layers.iter().filter(|layer| layer.experts).count();
        let (experts, routers, mlps) = match &config.experts {
            Some(of) => (
                Some(Experts {
                    count: of.count as f64,
                    top_k: of.top_k as f64,
                    weights: (mixed * 3 * hidden * of.intermediate_size) as f64,
                }),
                mixed * hidden * of.count,
                layers - mixed,
            ),
            None => (None, 0, layers),
        };
        let dense_weights = (layers * attention + routers + mlps * 3 * hidden * inner) as f64;
        let head_weights = (config.vocab_size * hidden) as f64;
        let tables = if config.tied_head { 1.0 } else { 2.0 };
        // Loaded are all experts, however few of them a step reads.
        let loaded =
            dense_weights + experts.map_or(0.0, |of| of.count * of.weights) + tables * head_weights;
        Self {
            dense_weights,
            experts,
            head_weights,
            bytes_per_weight: weight_bytes as f64 / loaded,
            operands,
            kv_bytes: (config.kv_heads * kv_dtype.head_bytes(1, config.head_dim)) as f64,
            attention: (4 * q) as f64,
            windows: config.layers.iter().map(|layer| layer.window).collect(),
        }
    }

    /// Of one step. `spans`: for each sequence its first position and how many of its tokens are computed; `logits`: rows of them.
    pub fn step(&self, spans: impl Iterator<Item = (u32, u32)>, logits: u32) -> Need {
        let mut need = Need::default();
        let mut tokens = 0.0;
        for (start, rows) in spans {
            let (start, rows) = (f64::from(start), f64::from(rows));
            tokens += rows;
            for &window in &self.windows {
                let (seen, read) = attended(start, rows, window.map(f64::from));
                need.attention += self.attention * seen;
                need.bytes += self.kv_bytes * read;
            }
        }
        let (mut read, mut used) = (self.dense_weights, self.dense_weights);
        if let Some(of) = &self.experts {
            read += of.read(tokens) * of.weights;
            used += of.top_k * of.weights;
        }
        if logits > 0 {
            read += self.head_weights;
        }
        need.bytes += read * self.bytes_per_weight;
        need.products = 2.0 * (used * tokens + self.head_weights * f64::from(logits));
        need
    }

    /// Seconds the machine needs at least for the memory traffic, and for the arithmetic.
    pub fn at_least(&self, need: Need, limits: &Limits) -> (f64, f64) {
        let products = limits.of(self.operands).per_second;
        (
            need.bytes / limits.memory_bytes_per_second,
            need.products / products + need.attention / limits.f32.per_second,
        )
    }
}

/// Of a layer's attention for `rows` queries from position `start` on: pairs of a query and a key it sees, and positions that are read for all of them.
fn attended(start: f64, rows: f64, window: Option<f64>) -> (f64, f64) {
    // Row i sees start + i + 1 positions, but no more than the window: the first rows see everything, those after them a window each.
    let whole = window.map_or(rows, |window| (window - start).clamp(0.0, rows));
    let all = whole * (start + 0.5 * (whole + 1.0));
    match window {
        None => (all, start + rows),
        Some(window) => (
            all + (rows - whole) * window,
            (start + rows).min(window + rows - 1.0),
        ),
    }
}

impl std::ops::AddAssign for Need {
    fn add_assign(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.products += other.products;
        self.attention += other.attention;
    }
}

#[cfg(test)]
mod tests {
    use quire::checkpoint::{Checkpoint, ModelSource};
    use quire::model::ExpertsConfig;

    use super::*;

    fn demo() -> ModelConfig {
        Checkpoint::open(&ModelSource::Demo)
            .expect("the demo model is inside the binary")
            .config
    }

    #[test]
    fn a_step_costs_its_weights_once_and_its_products_by_token() {
        let config = demo();
        let layer = config.hidden_size
            * ((2 * config.heads + 2 * config.kv_heads) * config.head_dim
                + 3 * config.intermediate_size);
        let weights = config.layers.len() * layer + config.vocab_size * config.hidden_size;
        assert!(config.tied_head);
        let cost = Cost::of(&config, 2 * weights, Operands::F32, KvDtype::F16);
        let one = cost.step([(0, 1)].into_iter(), 1);
        assert!((one.products / (2 * weights) as f64 - 1.0).abs() < 1e-12);
        let kv = (config.layers.len() * 2 * config.kv_heads * config.head_dim * 2) as f64;
        assert!((one.bytes / (2.0 * weights as f64 + kv) - 1.0).abs() < 1e-12);

        let eight = cost.step((0..8).map(|_| (0, 1)), 8);
        assert!((eight.products / one.products - 8.0).abs() < 1e-9);
        assert!((eight.bytes - one.bytes - 7.0 * kv).abs() < 1.0);
    }

    #[test]
    fn a_prompt_cut_in_two_has_the_same_attention() {
        let config = demo();
        let cost = Cost::of(&config, 1 << 20, Operands::F32, KvDtype::F16);
        let whole = cost.step([(0, 100)].into_iter(), 0).attention;
        let parts = cost.step([(0, 64)].into_iter(), 0).attention
            + cost.step([(64, 36)].into_iter(), 0).attention;
        assert!((whole / parts - 1.0).abs() < 1e-12);
    }

    #[test]
    fn of_experts_a_step_reads_those_its_tokens_choose() {
        let mut config = demo();
        let experts = ExpertsConfig {
            count: 64,
            top_k: 2,
            intermediate_size: 256,
            normalised: true,
            bias: false,
            interleaved: false,
        };
        let expert = 3 * config.hidden_size * experts.intermediate_size;
        let layers = config.layers.len();
        for layer in &mut config.layers {
            layer.experts = true;
        }
        config.experts = Some(experts);
        let attention =
            config.hidden_size * (2 * config.heads + 2 * config.kv_heads) * config.head_dim;
        let dense =
            layers * (attention + config.hidden_size * 64) + config.vocab_size * config.hidden_size;
        let all = dense + layers * 64 * expert;
        // Two bytes a weight.
        let cost = Cost::of(&config, 2 * all, Operands::Bf16, KvDtype::F16);
        let kv = (layers * 2 * config.kv_heads * config.head_dim * 2) as f64;
        let one = cost.step([(0, 1)].into_iter(), 1);
        let used = (dense + layers * 2 * expert) as f64;
        assert!((one.bytes / (2.0 * used + kv) - 1.0).abs() < 1e-12);
        assert!((one.products / (2.0 * used) - 1.0).abs() < 1e-12);
        // Many tokens read all of them, and no more.
        let many = cost.step([(0, 4096)].into_iter(), 1);
        let least = 2.0 * all as f64 + 4096.0 * kv;
        assert!((many.bytes / least - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_window_bounds_what_a_layer_reads_and_attends_to() {
        let mut config = demo();
        let whole = Cost::of(&config, 1 << 20, Operands::F32, KvDtype::F16);
        for layer in &mut config.layers {
            layer.window = Some(16);
        }
        let windowed = Cost::of(&config, 1 << 20, Operands::F32, KvDtype::F16);
        let kv = (config.layers.len() * 2 * config.kv_heads * config.head_dim * 2) as f64;
        let both = |span| {
            [&whole, &windowed].map(|cost| {
                let need = cost.step([span].into_iter(), 0);
                (need.attention, need.bytes)
            })
        };
        let [all, within] = both((0, 16));
        assert_eq!(all, within, "no longer than the window");
        let [all, within] = both((999, 1));
        assert!((all.0 / within.0 - 1000.0 / 16.0).abs() < 1e-9);
        assert!((all.1 - within.1 - kv * 984.0).abs() < 1.0);
        // Rows at 10 to 29: six see 11 to 16 positions, the others 16; read are 15 before the last row of a step and those of the step.
        let [all, within] = both((10, 20));
        let (seen, of) = (
            f64::from(11 + 12 + 13 + 14 + 15 + 16 + 14 * 16),
            20.0 * 20.5,
        );
        assert!((within.0 / all.0 - seen / of).abs() < 1e-9);
        assert_eq!(all.1, within.1, "30 positions are fewer than 16 + 20 - 1");
        let [all, within] = both((100, 20));
        assert!((all.1 - within.1 - kv * 85.0).abs() < 1.0);
    }
}
