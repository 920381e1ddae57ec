//! [`CudaBackend`]: checks shapes, then records kernels.
//!
//! Nothing of a step runs while it is recorded: its end, [`Backend::logits`], hands the list to the device and brings logits and tokens back, or leaves
//! that to [`Backend::collect`]. Then the next step is recorded while this one runs.

use std::sync::Arc;
use std::thread;

use super::buffers::{Activations, KvCache, Vector};
use super::device::{Buffer, Device, Launch, Work, bytes_of_slice_mut};
use super::flights::{Flights, Results};
use super::matrix::{Layout, Matrix};
use super::params::{self, Params, Pointer, Precision, Rows};
use super::plan::Plan;
use super::scratch::{Purpose, Scratch};
use crate::checks::{
    check_drawn_rows, check_draws, check_layer, check_rotary, check_step, check_tables,
};
use crate::cpu::pool::Pool;
use crate::cpu::topology::Topology;
use crate::{
    Activation, AttentionShape, Backend, DeviceMemory, Draws, Error, Experts, Format, KvDtype,
    KvLayer, KvShape, LogitsRule, MatrixPart, Norm, QkvLayer, Rank, Rotary, Shard, Step,
};

/// Threads of the kernels that have a block for each row.
pub(super) const THREADS: usize = 256;
/// Blocks that elementwise work on a row is divided among, at most.
const BLOCKS_OF_ROW: usize = 64;

/// How a [`CudaBackend`] is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which of the machine's GPUs.
    pub ordinal: usize,
    /// The same bits for a row whatever else is in the step: one kernel for every number of rows, positions split in the same way for prompts
    /// and generation. Slower.
    pub deterministic: bool,
}

/// Runs decoders on an NVIDIA GPU.
pub struct CudaBackend {
    pub(super) device: Arc<dyn Device>,
    pub(super) deterministic: bool,
    pub(super) step: Step,
    pub(super) plan: Plan,
    /// What the step will run.
    list: Vec<Work>,
    flights: Flights,
    /// Most rows of any buffer: what a step may be padded to.
    max_rows: std::sync::atomic::AtomicUsize,
    pub(super) scratch: Scratch,
    /// The host's cores, for what is done with logits.
    host: Pool,
    /// On the device, the tokens that the last step drew: the next one embeds them, and then draws its own there.
    pub(super) drawn: Buffer,
    /// The tokens of the step that was collected last.
    tokens: Vec<u32>,
    /// Page group, window and cache size of the layers whose block tables were checked in this step.
    checked: Vec<(usize, Option<u32>, usize)>,
}

impl std::fmt::Debug for CudaBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.description())
    }
}

impl CudaBackend {
    /// A backend on `device`.
    pub(super) fn on(device: Arc<dyn Device>, deterministic: bool) -> Result<Self, Error> {
        let host = Topology::of_machine().as_one();
        // What is done with logits, the first rank does.
        let threads = match device.rank().index {
            0 => thread::available_parallelism().map_or(1, usize::from),
            _ => 1,
        };
        Ok(Self {
            flights: Flights::new(&device)?,
            scratch: Scratch::new(&device),
            host: Pool::new(&host.place(threads, false)),
            drawn: Buffer::new(&device, 0, "drawn tokens")?,
            tokens: Vec::new(),
            device,
            deterministic,
            step: Step::default(),
            plan: Plan::default(),
            list: Vec::new(),
            max_rows: std::sync::atomic::AtomicUsize::new(1),
            checked: Vec::new(),
        })
    }

    /// Rows that are computed: the step's, and padding.
    pub(super) fn rows(&self) -> usize {
        self.plan.rows
    }

    /// Where kernels find the step.
    pub(super) fn step_at(&self) -> Pointer {
        self.flights.header()
    }

    /// Records a kernel.
    pub(super) fn launch<P: Params>(
        &mut self,
        kernel: &'static str,
        grid: (usize, usize),
        shared: usize,
        params: &P,
    ) {
        if grid.0 > 0 && grid.1 > 0 {
            self.list
                .push(Work::Launch(Launch::new(kernel, grid, shared, params)));
        }
    }

    /// Records any work.
    pub(super) fn record(&mut self, work: Work) {
        self.list.push(work);
    }

    /// Hands what was recorded to the device.
    fn submit(&mut self, results: Results) -> Result<(), Error> {
        let drawn = self.drawn.at();
        let done = self
            .flights
            .launch(&mut self.plan, &self.list, drawn, results);
        self.list.clear();
        done
    }

    /// Makes room for the tokens that the step draws. Those of the step before, which it may embed, stay.
    fn make_room_for_drawn(&mut self, rows: usize) -> Result<(), Error> {
        let bytes = rows.max(self.plan.draws) * size_of::<u32>();
        if self.drawn.bytes() < bytes {
            let room = Buffer::new(&self.device, bytes, "drawn tokens")?;
            if self.drawn.bytes() > 0 {
                let (to, from) = (room.at(), self.drawn.at());
                self.device.copy(to, from, self.drawn.bytes())?;
            }
            self.drawn = room;
        }
        Ok(())
    }

    /// Runs what was recorded and waits for it; for tests and benchmarks of single operations.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.submit(Results::default())?;
        self.flights.collect(&mut self.tokens).map(drop)
    }

    /// Launches what was recorded, of a deferred step, for which [`Backend::collect`] waits; for benchmarks of steps without sampling.
    ///
    /// # Errors
    /// The device failed.
    pub fn finish_later(&mut self) -> Result<(), Error> {
        self.submit(Results::default())
    }

    /// Checks the step's block tables for a layer, once for all that are alike.
    fn check_tables(
        &mut self,
        group: usize,
        window: Option<u32>,
        kv: &KvCache,
    ) -> Result<(), Error> {
        let alike = (group, window, kv.shape.blocks);
        if !self.checked.contains(&alike) {
            check_tables(&self.step, &kv.shape, group, window)?;
            self.checked.push(alike);
        }
        Ok(())
    }

    /// Records an RMS norm of `rows` rows; of the step's logit rows where `gather`.
    #[expect(clippy::too_many_arguments, reason = "a kernel's parameters")]
    fn norm(
        &mut self,
        rows: usize,
        x: Rows,
        out: Rows,
        weight: Pointer,
        cols: usize,
        eps: f32,
        gather: bool,
    ) {
        let norm = params::RmsNorm {
            x,
            out,
            weight,
            step: if gather { self.step_at() } else { 0 },
            cols: cols as i32,
            eps,
        };
        self.launch("rms_norm", (rows, 1), 32 * size_of::<f32>(), &norm);
    }
}

/// The precision of what products read: bf16 where rows begin at multiples of 16 bytes.
pub(super) fn operand_precision(cols: usize) -> Precision {
    if cols.is_multiple_of(8) {
        Precision::Bf16
    } else {
        Precision::F32
    }
}

impl Backend for CudaBackend {
    type Activations = Activations;
    type Matrix = Matrix;
    type Vector = Vector;
    type KvCache = KvCache;

    fn description(&self) -> String {
        let deterministic = if self.deterministic {
            ", deterministic"
        } else {
            ""
        };
        format!("{}{deterministic}", self.device.description())
    }

    fn memory(&self) -> Result<Option<DeviceMemory>, Error> {
        let (free, total) = self.device.memory()?;
        Ok(Some(DeviceMemory { free, total }))
    }

    fn matrix(&self, parts: &[MatrixPart<'_>], quantize: Option<Format>) -> Result<Matrix, Error> {
        Matrix::pack(&self.device, parts, quantize)
    }

    fn rank(&self) -> Rank {
        self.device.rank()
    }

    fn shard(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
        shard: Shard,
    ) -> Result<Matrix, Error> {
        self.pack_shard(parts, quantize, shard)
    }

    fn leave(&mut self) {
        self.device.leave();
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, Error> {
        Vector::new(&self.device, values)
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Activations, Error> {
        self.max_rows
            .fetch_max(rows, std::sync::atomic::Ordering::Relaxed);
        Activations::new(&self.device, rows, cols)
    }

    fn kv_dtypes(&self) -> &'static [KvDtype] {
        KvCache::DTYPES
    }

    fn kv_cache(&self, shape: &KvShape) -> Result<KvCache, Error> {
        KvCache::new(&self.device, shape)
    }

    fn begin(&mut self, step: &Step) -> Result<(), Error> {
        check_step(step)?;
        check_draws(step)?;
        check_drawn_rows(step, self.flights.before().drawn)?;
        let slot = self.flights.begin(step)?;
        self.step.clone_from(step);
        for drawn in &step.drawn_rows {
            self.step.tokens[drawn.row as usize] = 0;
        }
        self.checked.clear();
        self.list.clear();
        let most = self.max_rows.load(std::sync::atomic::Ordering::Relaxed);
        self.plan.begin(step, most);
        self.scratch.begin(slot);
        self.make_room_for_drawn(most)
    }

    fn copy_blocks(&mut self, kv: &mut KvCache, copies: &[(u32, u32)]) -> Result<(), Error> {
        let shape = &kv.shape;
        for &(from, to) in copies {
            if from.max(to) as usize >= shape.blocks {
                return Err(Error::Shape(format!(
                    "copy of block {from} to {to} in a cache of {}",
                    shape.blocks
                )));
            }
        }
        if copies.is_empty() {
            return Ok(());
        }
        self.plan.copies(copies);
        // Their number is a parameter: such a step is not like others.
        self.plan.again = false;
        let bytes = shape.block_bytes() / shape.layers;
        let copy = params::CopyBlocks {
            step: self.step_at(),
            cache: kv.at(),
            count: copies.len() as i32,
            blocks: shape.blocks as i32,
            bytes: bytes as i64,
        };
        let blocks = bytes.div_ceil(16 * THREADS).min(BLOCKS_OF_ROW);
        self.launch("copy_blocks", (blocks, shape.layers), 0, &copy);
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, scale: f32, out: &mut Activations) -> Result<(), Error> {
        let (tokens, of) = (&self.step.tokens, table.vocabulary());
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= of) {
            return Err(Error::Shape(format!(
                "token {token} of a vocabulary of {of}"
            )));
        }
        let [segment] = &table.segments[..] else {
            return Err(Error::Shape(
                "an embedding table whose parts are stored differently".to_owned(),
            ));
        };
        if segment.order() != 0 {
            return Err(Error::Shape(
                "an embedding table whose columns are sorted".to_owned(),
            ));
        }
        let rows = self.rows();
        out.check(rows, table.cols, "embeddings")?;
        out.precision = Precision::F32;
        let embed = params::Embed {
            step: self.step_at(),
            table: segment.params(),
            drawn: self.drawn.at(),
            out: out.buffer.at(),
            first: table.first_token(self.device.rank()) as u32,
            rows: table.rows as u32,
            scale,
            pad: 0,
        };
        let kernel = match segment.layout {
            Layout::F32 => "embed_f32",
            Layout::Bf16 => "embed_bf16",
            Layout::F16 => "embed_f16",
            Layout::Q4_0 => "embed_q4_0",
            Layout::Q5_1 => "embed_q5_1",
            Layout::Q4K => "embed_q4_k",
            Layout::Q8_0 => "embed_q8_0",
            Layout::Int4(_) => "embed_int4",
            Layout::Int8(_) => "embed_int8",
            Layout::Fp8(_) => "embed_fp8",
        };
        self.launch(kernel, (rows, 1), 0, &embed);
        if table.shard.is_some() {
            self.add_up_one(embed.out, rows * table.cols);
        }
        Ok(())
    }

    fn rotary(&mut self, rotary: &Rotary<'_, Self>, out: &mut Activations) -> Result<(), Error> {
        let count = rotary.frequencies.len;
        let beyond = rotary.beyond.unwrap_or(rotary.frequencies);
        let rows = self.rows();
        out.check(rows, 2 * count, "rotary table")?;
        out.precision = Precision::F32;
        let table = params::RotaryTable {
            step: self.step_at(),
            frequencies: rotary.frequencies.at(),
            beyond: beyond.of(count, "rotary frequencies beyond the switch")?,
            out: out.buffer.at(),
            count: count as i32,
            scale: rotary.scale,
        };
        self.launch("rotary", (rows, 1), 0, &table);
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Activations,
        weight: &Vector,
        eps: f32,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, cols) = (self.rows(), x.cols);
        let weight = weight.of(cols, "norm weights")?;
        x.check(rows, cols, "input of a norm")?;
        out.check(rows, cols, "output of a norm")?;
        out.precision = operand_precision(cols);
        self.norm(rows, x.params(), out.params(), weight, cols, eps, false);
        Ok(())
    }

    fn rms_norm_in_place(
        &mut self,
        x: &mut Activations,
        norm: &Norm<'_, Self>,
    ) -> Result<(), Error> {
        let (rows, cols) = (self.rows(), x.cols);
        let weight = norm.weight.of(cols, "norm weights")?;
        x.check(rows, cols, "rows of a norm")?;
        self.norm(rows, x.params(), x.params(), weight, cols, norm.eps, false);
        Ok(())
    }

    fn add(
        &mut self,
        x: &Activations,
        norm: Option<&Norm<'_, Self>>,
        scale: f32,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, cols) = (self.rows(), x.cols);
        let (weight, eps) = match norm {
            None => (0, 0.0),
            Some(norm) => (norm.weight.of(cols, "norm weights")?, norm.eps),
        };
        x.check(rows, cols, "rows to be added")?;
        let add = params::Add {
            x: x.params(),
            weight,
            out: out.floats(rows, cols, "residual stream")?,
            cols: cols as i32,
            eps,
            scale,
            pad: 0,
        };
        self.launch("add", (rows, 1), 32 * size_of::<f32>(), &add);
        Ok(())
    }

    fn linear(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        out.precision = Precision::F32;
        self.linear_into(x, matrix, bias, out, false)
    }

    fn linear_add(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        self.linear_into(x, matrix, bias, out, true)
    }

    fn norm_rope_store(
        &mut self,
        qkv: &mut Activations,
        layer: &QkvLayer<'_, Self>,
        kv: &mut KvCache,
    ) -> Result<(), Error> {
        let shape = layer.shape;
        check_layer(&shape, layer.layer, &kv.shape)?;
        self.check_tables(layer.layer.group, shape.window, kv)?;
        let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
        let (rows, all) = (self.rows(), heads + 2 * kv_heads);
        let what = "queries, keys and values";
        let data = qkv.floats(rows, all * d, what)?;
        let (rotary, pairs) = match layer.rotary {
            None => (0, 0),
            Some(rotary) => {
                check_rotary(rotary.cols, d)?;
                let table = rotary.floats(rows, rotary.cols, "rotary table")?;
                (table, rotary.cols / 2)
            }
        };
        // Norms over all heads together come first, those of single heads with the rotation.
        let mut of_head = [0; 2];
        let norms = [
            (layer.q_norm, heads, 0, "query norm"),
            (layer.k_norm, kv_heads, heads * d, "key norm"),
        ];
        for (of_head, (norm, heads, first, what)) in of_head.iter_mut().zip(norms) {
            let Some(norm) = norm else {
                continue;
            };
            if heads > 1 && norm.len == heads * d {
                let columns = Rows {
                    data: data + (first * size_of::<f32>()) as u64,
                    ..qkv.params()
                };
                self.norm(
                    rows,
                    columns,
                    columns,
                    norm.at(),
                    heads * d,
                    layer.eps,
                    false,
                );
            } else {
                *of_head = norm.of(d, what)?;
            }
        }
        self.plan.slots(&self.step, kv.shape.block_size as u32);
        let store = params::NormRopeStore {
            step: self.step_at(),
            qkv: data,
            q_norm: of_head[0],
            k_norm: of_head[1],
            rotary,
            cache: kv.layer(layer.layer.index),
            bucket: rows as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            d: d as i32,
            pairs: pairs as i32,
            block_size: kv.shape.block_size as i32,
            page_group: layer.layer.group as i32,
            dtype: kv.dtype(),
            eps: layer.eps,
            pad: 0,
        };
        self.launch("norm_rope_store", (rows, all.div_ceil(4)), 0, &store);
        Ok(())
    }

    fn attention(
        &mut self,
        qkv: &Activations,
        layer: KvLayer,
        shape: &AttentionShape,
        sinks: Option<&Vector>,
        kv: &KvCache,
        out: &mut Activations,
    ) -> Result<(), Error> {
        check_layer(shape, layer, &kv.shape)?;
        self.check_tables(layer.group, shape.window, kv)?;
        self.attend(qkv, layer, shape, sinks, kv, out)
    }

    fn gate(
        &mut self,
        gate_up: &Activations,
        activation: Activation,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, n) = (self.rows(), out.cols);
        let from = gate_up.floats(rows, 2 * n, "gate and up projections")?;
        out.check(rows, n, "gated activations")?;
        out.precision = operand_precision(n);
        self.gate_rows(rows, from, n, activation, out.params());
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Activations,
        experts: &Experts<'_, Self>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        self.mixture(x, experts, out)
    }

    fn logits(
        &mut self,
        x: &Activations,
        norm: &Norm<'_, Self>,
        head: &Matrix,
        rule: LogitsRule,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (cols, wanted, rows) = (x.cols, self.step.logit_rows.len(), self.plan.logit_rows);
        x.check(self.rows(), cols, "residual stream")?;
        let weight = norm.weight.of(cols, "norm weights")?;
        if head.cols != cols {
            return Err(Error::Shape(format!(
                "an output head of {} columns for rows of {cols}",
                head.cols
            )));
        }
        let (drawn, vocabulary) = (self.step.draws.len(), head.vocabulary());
        if rows > 0 {
            let normed = Rows {
                data: self
                    .scratch
                    .get(Purpose::HeadRows, rows * cols * size_of::<f32>())?,
                stride: cols as i32,
                precision: operand_precision(cols) as i32,
            };
            self.norm(rows, x.params(), normed, weight, cols, norm.eps, true);
            let (out, stride) = self.own_logits(rows, head)?;
            self.product(normed, rows, head, 0, (out, stride), false)?;
            let LogitsRule { scale, softcap } = rule;
            if scale != 1.0 || softcap.is_some() {
                let rule = params::Rule {
                    x: out,
                    cols: stride as i32,
                    scale,
                    cap: softcap.unwrap_or(0.0),
                    pad: 0,
                };
                let blocks = stride.div_ceil(THREADS).min(BLOCKS_OF_ROW);
                self.launch("logits_rule", (rows, blocks), 0, &rule);
            }
            let out = self.join_logits(rows, head, out)?;
            self.draw_from(out, vocabulary);
        }
        self.submit(Results {
            drawn,
            logits: (wanted - drawn) * vocabulary,
        })?;
        if self.step.deferred {
            return Ok(());
        }
        self.collect(logits)
    }

    fn draws(&self) -> Draws {
        Draws::All
    }

    fn collect(&mut self, logits: &mut Vec<f32>) -> Result<(), Error> {
        let results = self.flights.collect(&mut self.tokens)?;
        logits.resize(results.logits, 0.0);
        // Nothing was launched behind a step whose logits are wanted.
        self.scratch
            .read(Purpose::Logits, bytes_of_slice_mut(logits))
    }

    fn is_usable(&mut self) -> bool {
        self.device.synchronise().is_ok()
    }

    fn drawn(&self) -> &[u32] {
        &self.tokens
    }

    fn each(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.host.each(tasks, task);
    }
}

impl CudaBackend {
    /// Records a gate of `rows` rows of `2n` f32 at `from`.
    pub(super) fn gate_rows(
        &mut self,
        rows: usize,
        from: Pointer,
        n: usize,
        activation: Activation,
        out: Rows,
    ) {
        let (kind, alpha, limit) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::GeluTanh => (1, 0.0, 0.0),
            Activation::Relu2 => (2, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (3, alpha, limit),
        };
        let gate = params::Gate {
            gate_up: from,
            out,
            n: n as i32,
            kind,
            alpha,
            limit,
        };
        // Few rows need all threads that there are; of many, a thread does more than begin and end.
        let each = if rows < 256 { 1 } else { 8 };
        let blocks = n.div_ceil(THREADS * each).min(BLOCKS_OF_ROW);
        self.launch("gate", (rows, blocks), 0, &gate);
    }
}
