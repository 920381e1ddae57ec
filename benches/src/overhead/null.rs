//! [`NullBackend`]: a device that costs nothing, so that what is left of a step is the engine's own.
//!
//! It holds no weights and no keys, and its logits name one token a row: another each time, so that text, detokenising and the wire have something to do.

use quire::core::EngineConfig;
use quire_kernels::{
    Activation, AttentionShape, Backend, Error, Experts, Format, KvDtype, KvLayer, KvShape,
    LogitsRule, MatrixPart, Norm, QkvLayer, Rotary, Step,
};

/// What comes out of it: rows of logits that are 0 but for one place.
#[derive(Debug, Default)]
pub struct NullBackend {
    /// Rows of logits of this step.
    rows: usize,
    /// Rows of logits ever made.
    made: u64,
    /// The places that are not 0.
    hot: Vec<usize>,
}

/// The rows of a matrix: all that is known of it.
#[derive(Debug)]
pub struct Rows(usize);

/// Logit of the token that is to be chosen.
const LOUD: f32 = 30.0;
/// Tokens that are named lie this far apart, so that neighbours in a sequence are no neighbours in the vocabulary. Odd, and so a generator of every power of two.
const STRIDE: u64 = 0x9e37_79b9;

/// Places of an engine's queue for so many sequences that come at once: none is to be refused.
pub fn queue(sequences: u32) -> u32 {
    sequences.max(EngineConfig::default().max_waiting)
}

impl NullBackend {
    /// An engine's settings for it: many sequences, and a cache that holds them all.
    pub fn config(sequences: u32) -> EngineConfig {
        EngineConfig {
            max_seqs: sequences.max(256),
            max_waiting: queue(sequences),
            kv_cache_memory: Some(1 << 30),
            ..EngineConfig::default()
        }
    }
}

impl Backend for NullBackend {
    type Activations = ();
    type Matrix = Rows;
    type Vector = ();
    type KvCache = ();

    fn description(&self) -> String {
        "a device that costs nothing".to_owned()
    }

    fn matrix(&self, parts: &[MatrixPart<'_>], _: Option<Format>) -> Result<Rows, Error> {
        Ok(Rows(parts.iter().map(|part| part.rows).sum()))
    }

    fn matrix_bytes(&self, _: &Rows) -> usize {
        0
    }

    fn vector(&self, _: &[f32]) -> Result<(), Error> {
        Ok(())
    }

    fn activations(&self, _: usize, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn kv_dtypes(&self) -> &'static [KvDtype] {
        &[KvDtype::F16]
    }

    fn kv_cache(&self, _: &KvShape) -> Result<(), Error> {
        Ok(())
    }

    fn begin(&mut self, step: &Step) -> Result<(), Error> {
        self.rows = step.logit_rows.len();
        Ok(())
    }

    fn copy_blocks(&mut self, (): &mut (), _: &[(u32, u32)]) -> Result<(), Error> {
        Ok(())
    }

    fn embed(&mut self, _: &Rows, _: f32, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn rotary(&mut self, _: &Rotary<'_, Self>, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn rms_norm(&mut self, (): &(), (): &(), _: f32, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn rms_norm_in_place(&mut self, (): &mut (), _: &Norm<'_, Self>) -> Result<(), Error> {
        Ok(())
    }

    fn add(
        &mut self,
        (): &(),
        _: Option<&Norm<'_, Self>>,
        _: f32,
        (): &mut (),
    ) -> Result<(), Error> {
        Ok(())
    }

    fn linear(&mut self, (): &(), _: &Rows, _: Option<&()>, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn linear_add(&mut self, (): &(), _: &Rows, _: Option<&()>, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn norm_rope_store(
        &mut self,
        (): &mut (),
        _: &QkvLayer<'_, Self>,
        (): &mut (),
    ) -> Result<(), Error> {
        Ok(())
    }

    fn attention(
        &mut self,
        (): &(),
        _: KvLayer,
        _: &AttentionShape,
        _: Option<&()>,
        (): &(),
        (): &mut (),
    ) -> Result<(), Error> {
        Ok(())
    }

    fn gate(&mut self, (): &(), _: Activation, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    fn experts(&mut self, (): &(), _: &Experts<'_, Self>, (): &mut ()) -> Result<(), Error> {
        Ok(())
    }

    /// Names a token a row. Relies on getting the same buffer back as it left it, so that a step writes as many floats as it has rows, and not a vocabulary for each.
    fn logits(
        &mut self,
        (): &(),
        _: &Norm<'_, Self>,
        head: &Rows,
        _: LogitsRule,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let vocab = head.0;
        for at in self.hot.drain(..) {
            if let Some(old) = logits.get_mut(at) {
                *old = 0.0;
            }
        }
        if logits.len() < self.rows * vocab {
            logits.resize(self.rows * vocab, 0.0);
        }
        for row in 0..self.rows {
            let token = (self.made.wrapping_mul(STRIDE) % vocab as u64) as usize;
            self.made += 1;
            logits[row * vocab + token] = LOUD;
            self.hot.push(row * vocab + token);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_names_one_token_and_they_differ() {
        let mut backend = NullBackend::default();
        let head = Rows(1000);
        let rule = LogitsRule {
            scale: 1.0,
            softcap: None,
        };
        let norm = Norm {
            weight: &(),
            eps: 0.0,
        };
        let mut logits = Vec::new();
        let mut named = Vec::new();
        for rows in [3, 1, 4] {
            backend.rows = rows;
            backend
                .logits(&(), &norm, &head, rule, &mut logits)
                .unwrap();
            for row in logits.chunks(1000).take(rows) {
                let loud: Vec<usize> = (0..1000).filter(|&at| row[at] != 0.0).collect();
                assert_eq!(loud.len(), 1, "{loud:?}");
                named.push(loud[0]);
            }
        }
        named.sort_unstable();
        named.dedup();
        assert_eq!(named.len(), 8);
    }
}
