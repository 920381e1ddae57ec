//! [`Metered`]: a device that notes how long it worked on each step.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quire_kernels::{
    Activation, AttentionShape, Backend, Draws, Error, Experts, Format, KvDtype, KvLayer, KvShape,
    LogitsRule, MatrixPart, Norm, QkvLayer, Rotary, Step,
};

/// How long the device worked on the last step, for who asks from the engine thread.
#[derive(Debug, Clone, Default)]
pub struct Meter(Arc<AtomicU64>);

impl Meter {
    /// From the step's beginning to its logits.
    pub fn last(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// Another device, with a meter: everything is handed on.
#[derive(Debug)]
pub struct Metered<B> {
    inner: B,
    meter: Meter,
    began: Instant,
}

impl<B> Metered<B> {
    /// `inner`, as `meter` shall see it.
    pub fn new(inner: B, meter: Meter) -> Self {
        Self {
            inner,
            meter,
            began: Instant::now(),
        }
    }
}

fn norm<'a, B: Backend>(of: &Norm<'a, Metered<B>>) -> Norm<'a, B> {
    Norm {
        weight: of.weight,
        eps: of.eps,
    }
}

impl<B: Backend> Backend for Metered<B> {
    type Activations = B::Activations;
    type Matrix = B::Matrix;
    type Vector = B::Vector;
    type KvCache = B::KvCache;

    fn description(&self) -> String {
        self.inner.description()
    }

    fn matrix(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
    ) -> Result<Self::Matrix, Error> {
        self.inner.matrix(parts, quantize)
    }

    fn matrix_bytes(&self, matrix: &Self::Matrix) -> usize {
        self.inner.matrix_bytes(matrix)
    }

    fn vector(&self, values: &[f32]) -> Result<Self::Vector, Error> {
        self.inner.vector(values)
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Self::Activations, Error> {
        self.inner.activations(rows, cols)
    }

    fn kv_dtypes(&self) -> &'static [KvDtype] {
        self.inner.kv_dtypes()
    }

    fn kv_cache(&self, shape: &KvShape) -> Result<Self::KvCache, Error> {
        self.inner.kv_cache(shape)
    }

    fn claim(&mut self, kv: &mut Self::KvCache, part: usize) -> usize {
        self.inner.claim(kv, part)
    }

    fn begin(&mut self, step: &Step) -> Result<(), Error> {
        self.began = Instant::now();
        self.inner.begin(step)
    }

    fn copy_blocks(&mut self, kv: &mut Self::KvCache, copies: &[(u32, u32)]) -> Result<(), Error> {
        self.inner.copy_blocks(kv, copies)
    }

    fn embed(
        &mut self,
        table: &Self::Matrix,
        scale: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.embed(table, scale, out)
    }

    fn rotary(
        &mut self,
        rotary: &Rotary<'_, Self>,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        let rotary = Rotary {
            frequencies: rotary.frequencies,
            beyond: rotary.beyond,
            scale: rotary.scale,
        };
        self.inner.rotary(&rotary, out)
    }

    fn rms_norm(
        &mut self,
        x: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.rms_norm(x, weight, eps, out)
    }

    fn rms_norm_in_place(
        &mut self,
        x: &mut Self::Activations,
        of: &Norm<'_, Self>,
    ) -> Result<(), Error> {
        self.inner.rms_norm_in_place(x, &norm(of))
    }

    fn add(
        &mut self,
        x: &Self::Activations,
        of: Option<&Norm<'_, Self>>,
        scale: f32,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.add(x, of.map(norm).as_ref(), scale, out)
    }

    fn linear(
        &mut self,
        x: &Self::Activations,
        matrix: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.linear(x, matrix, bias, out)
    }

    fn linear_add(
        &mut self,
        x: &Self::Activations,
        matrix: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.linear_add(x, matrix, bias, out)
    }

    fn norm_rope_store(
        &mut self,
        qkv: &mut Self::Activations,
        of: &QkvLayer<'_, Self>,
        kv: &mut Self::KvCache,
    ) -> Result<(), Error> {
        let layer = QkvLayer {
            layer: of.layer,
            shape: of.shape,
            q_norm: of.q_norm,
            k_norm: of.k_norm,
            eps: of.eps,
            rotary: of.rotary,
        };
        self.inner.norm_rope_store(qkv, &layer, kv)
    }

    fn attention(
        &mut self,
        qkv: &Self::Activations,
        layer: KvLayer,
        shape: &AttentionShape,
        sinks: Option<&Self::Vector>,
        kv: &Self::KvCache,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.attention(qkv, layer, shape, sinks, kv, out)
    }

    fn gate(
        &mut self,
        gate_up: &Self::Activations,
        activation: Activation,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        self.inner.gate(gate_up, activation, out)
    }

    fn experts(
        &mut self,
        x: &Self::Activations,
        of: &Experts<'_, Self>,
        out: &mut Self::Activations,
    ) -> Result<(), Error> {
        let experts = Experts {
            router: of.router,
            router_bias: of.router_bias,
            gate_up: of.gate_up,
            gate_up_bias: of.gate_up_bias,
            down: of.down,
            down_bias: of.down_bias,
            experts: of.experts,
            top_k: of.top_k,
            normalised: of.normalised,
            activation: of.activation,
        };
        self.inner.experts(x, &experts, out)
    }

    fn logits(
        &mut self,
        x: &Self::Activations,
        of: &Norm<'_, Self>,
        head: &Self::Matrix,
        rule: LogitsRule,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let done = self.inner.logits(x, &norm(of), head, rule, logits);
        let nanos = self.began.elapsed().as_nanos() as u64;
        self.meter.0.store(nanos, Ordering::Relaxed);
        done
    }

    fn draws(&self) -> Draws {
        self.inner.draws()
    }

    fn collect(&mut self, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.inner.collect(logits)
    }

    fn is_usable(&mut self) -> bool {
        self.inner.is_usable()
    }

    fn drawn(&self) -> &[u32] {
        self.inner.drawn()
    }

    fn each(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.inner.each(tasks, task);
    }
}
