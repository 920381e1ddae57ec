//! [`Cost`]: what a step cannot do without — bytes to be read, operations to be done.

use quire::model::ModelConfig;
use quire_kernels::KvDtype;

use super::limits::{Limits, Operands};

/// The price of a model's parts.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Weights of the layers' matrices.
    layer_weights: f64,
    /// Weights of the output head.
    head_weights: f64,
    bytes_per_weight: f64,
    /// What their products multiply.
    operands: Operands,
    /// Bytes of the keys and values of one position.
    kv_bytes: f64,
    /// Operations of attention for one query and one key, all layers.
    attention: f64,
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
        // Of a mixture of experts: what one token uses. (A step of many tokens reads more of them.)
        let mlps = config.layers.iter().map(|layer| match &config.experts {
            Some(of) if layer.experts => {
                hidden * of.count + of.top_k * 3 * hidden * of.intermediate_size
            }
            _ => 3 * hidden * inner,
        });
        let layers = config.layers.len();
        let layer_weights = (layers * attention + mlps.sum::<usize>()) as f64;
        let head_weights = (config.vocab_size * hidden) as f64;
        let tables = if config.tied_head { 1.0 } else { 2.0 };
        Self {
            layer_weights,
            head_weights,
            bytes_per_weight: weight_bytes as f64 / (layer_weights + tables * head_weights),
            operands,
            kv_bytes: (layers * config.kv_heads * kv_dtype.head_bytes(1, config.head_dim)) as f64,
            attention: (layers * 4 * q) as f64,
        }
    }

    /// Of one step. `spans`: for each sequence its first position and how many of its tokens are computed; `logits`: rows of them.
    pub fn step(&self, spans: impl Iterator<Item = (u32, u32)>, logits: u32) -> Need {
        let mut need = Need {
            bytes: self.layer_weights * self.bytes_per_weight,
            products: 2.0 * self.head_weights * f64::from(logits),
            attention: 0.0,
        };
        if logits > 0 {
            need.bytes += self.head_weights * self.bytes_per_weight;
        }
        for (start, rows) in spans {
            let (start, rows) = (f64::from(start), f64::from(rows));
            need.products += 2.0 * self.layer_weights * rows;
            // Row i sees start + i + 1 positions.
            need.attention += self.attention * rows * (start + 0.5 * (rows + 1.0));
            need.bytes += self.kv_bytes * (start + rows);
        }
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

    use super::*;

    #[test]
    fn a_step_costs_its_weights_once_and_its_products_by_token() {
        let config = Checkpoint::open(&ModelSource::Demo)
            .expect("the demo model is inside the binary")
            .config;
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
        let config = Checkpoint::open(&ModelSource::Demo)
            .expect("the demo model is inside the binary")
            .config;
        let cost = Cost::of(&config, 1 << 20, Operands::F32, KvDtype::F16);
        let whole = cost.step([(0, 100)].into_iter(), 0).attention;
        let parts = cost.step([(0, 64)].into_iter(), 0).attention
            + cost.step([(64, 36)].into_iter(), 0).attention;
        assert!((whole / parts - 1.0).abs() < 1e-12);
    }
}
