//! [`Setup`]: a checkpoint on this machine's CPU, ready to be timed.

use quire::checkpoint::Checkpoint;
use quire::model::{Decoder, LoadOptions};
use quire_kernels::cpu::{CpuBackend, CpuOptions, Isa, Numa};
use quire_kernels::{Format, KvDtype};

use super::cost::Cost;
use super::limits::Operands;
use super::workload::{Cache, Workload};

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// Threads that compute.
    pub threads: usize,
    /// Instruction set of the kernels; `None`: the best there is.
    pub isa: Option<Isa>,
    /// What is done about NUMA nodes.
    pub numa: Numa,
    /// What float weights are quantised to.
    pub quantize: Option<Format>,
    /// Activations are rounded to bfloat16 where weights are.
    pub bf16_activations: bool,
    /// Precisions of the KV cache that are compared; at least one.
    pub kv_dtypes: &'a [KvDtype],
    /// Most rows of a step.
    pub rows: u32,
}

impl Setup<'_> {
    /// Threads that compute where nobody says how many: one for each core this process may use.
    pub fn cores() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// Loads the checkpoint.
    ///
    /// # Errors
    /// It cannot be loaded.
    pub fn load(&self, checkpoint: &Checkpoint) -> anyhow::Result<Workload> {
        let backend = CpuBackend::new(CpuOptions {
            threads: Some(self.threads),
            isa: self.isa,
            numa: self.numa,
            bf16_activations: self.bf16_activations,
            ..CpuOptions::default()
        })?;
        let options = LoadOptions {
            quantize: self.quantize,
            max_rows: self.rows as usize,
        };
        let decoder = Decoder::load(checkpoint, backend, options, &mut |_| {})?;
        // Every family has it, and experts are stored as it is.
        let stands_for_all = "model.layers.0.self_attn.o_proj.weight";
        let shape = checkpoint.tensors.shape(stands_for_all).unwrap_or_default();
        let stored = checkpoint.tensors.get(stands_for_all, shape)?.format;
        let operands = Operands::of(self.quantize.unwrap_or(stored), self.bf16_activations);
        let caches = self.kv_dtypes.iter().map(|&dtype| {
            let bytes = decoder.weight_bytes();
            let cost = Cost::of(decoder.config(), bytes, operands, dtype);
            Cache::new(dtype, cost)
        });
        let caches = caches.collect();
        Ok(Workload::new(decoder, caches, self.rows))
    }
}
