//! [`CpuBackend`]: checks shapes, then hands work to the kernels.

use super::attention::{self, Attention};
use super::buffers::{Activations, Vector, weights};
use super::elementwise::{add_row, gate_row, norm_head, rms_norm, rotary_row, rotate, rule_row};
use super::kv::{KvCache, Slot, store};
use super::linear::{Head, Linear, Output, Rows};
use super::matrix::Matrix;
use super::memory::{Buffer, Shared};
use super::moe::{self, Mixture};
use super::numa::Numa;
use super::options::CpuOptions;
use super::pool::Pool;
use super::ranked::Ranked;
use super::simd::{Isa, dispatch};
use super::topology::{self, Topology};
use crate::checks::{check_draws_among, check_layer, check_rotary, check_step, check_tables};
use crate::{
    Activation, AttentionShape, Backend, Collective, Draws, Error, Experts, Format, KvDtype,
    KvLayer, KvShape, LogitsRule, MatrixPart, Norm, QkvLayer, Rank, Rotary, Shard, Step,
};

/// Runs decoders on the CPU.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    bf16_activations: bool,
    step: Step,
    product_rows: Rows,
    attention: attention::Scratch,
    experts: moe::Scratch,
    /// Page group, window and cache size of the layers whose block tables were checked in this step.
    checked: Vec<(usize, Option<u32>, usize)>,
    /// Rows whose logits are wanted, normalised. `[logit rows, hidden]`
    head_rows: Buffer<f32>,
    head: Head,
    /// Where it is one of several ranks.
    ranked: Option<Ranked>,
}

impl std::fmt::Debug for CpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.description())
    }
}

impl CpuBackend {
    /// Starts the threads.
    ///
    /// # Errors
    /// No memory, or an instruction set this processor does not have.
    pub fn new(options: CpuOptions) -> Result<Self, Error> {
        let isa = options.isa.unwrap_or_else(Isa::best);
        if !isa.is_available() {
            return Err(Error::Device(format!(
                "this processor does not have {}",
                isa.name()
            )));
        }
        let threads = options
            .threads
            .unwrap_or_else(topology::default_threads)
            .max(1);
        let machine = Topology::of_machine();
        let topology = match options.numa {
            Numa::Auto => machine,
            Numa::Off => machine.as_one(),
            Numa::Emulated(nodes) => machine.emulated(usize::from(nodes.get())),
        };
        Ok(Self {
            pool: Pool::new(&topology.place(threads, options.pin)),
            isa,
            bf16_activations: options.bf16_activations,
            step: Step::default(),
            product_rows: Rows::new()?,
            attention: attention::Scratch::new()?,
            experts: moe::Scratch::new()?,
            checked: Vec::new(),
            head_rows: Buffer::zeroed(0, "output rows")?,
            head: Head::new()?,
            ranked: None,
        })
    }

    /// One of several ranks that compute a model together, each with a part of the weights.
    ///
    /// For tests of what GPUs do: CPUs of one machine share their memory, and divide rows and heads among [`Numa`] nodes instead.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub fn of_rank(options: CpuOptions, collective: Box<dyn Collective>) -> Result<Self, Error> {
        Ok(Self {
            ranked: Some(Ranked::new(collective)?),
            ..Self::new(options)?
        })
    }

    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn pool(&self) -> &Pool {
        &self.pool
    }

    fn rows(&self) -> usize {
        self.step.rows()
    }

    fn product(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
        output: Output,
    ) -> Result<(), Error> {
        let rows = self.rows();
        if let Some(bias) = bias
            && bias.as_slice().len() != matrix.rows
        {
            return Err(Error::Shape(format!(
                "a bias of {} for {} output features",
                bias.as_slice().len(),
                matrix.rows
            )));
        }
        let x = x.first(rows, matrix.cols, "input of a product")?;
        let linear = Linear::new(matrix, x, rows, bias.map(Vector::as_slice), output);
        let y = out.first_mut(rows, matrix.rows, "output of a product")?;
        let (product_rows, pool, isa) = (&mut self.product_rows, &self.pool, self.isa);
        match (&mut self.ranked, matrix.shard, output) {
            (Some(ranked), Some(Shard::Columns), Output::Set) => {
                linear.run(y, product_rows, pool, isa)?;
                ranked.sum(y)
            }
            (Some(ranked), Some(Shard::Columns), Output::Add) => {
                let part = Linear::new(matrix, x, rows, bias.map(Vector::as_slice), Output::Set);
                let sums = ranked.sums_of(rows * matrix.rows, |own| {
                    part.run(own, product_rows, pool, isa)
                })?;
                add_rows(sums, matrix.rows, y, pool, isa);
                Ok(())
            }
            _ => linear.run(y, product_rows, pool, isa),
        }
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
}

impl Backend for CpuBackend {
    type Activations = Activations;
    type Matrix = Matrix;
    type Vector = Vector;
    type KvCache = KvCache;

    fn description(&self) -> String {
        let threads = self.pool.threads();
        let s = if threads == 1 { "" } else { "s" };
        let nodes = match self.pool.nodes() {
            1 => String::new(),
            nodes => format!(" on {nodes} NUMA nodes"),
        };
        format!("CPU, {}, {threads} thread{s}{nodes}", self.isa.name())
    }

    fn matrix(&self, parts: &[MatrixPart<'_>], quantize: Option<Format>) -> Result<Matrix, Error> {
        Matrix::pack(parts, quantize, self.bf16_activations, &self.pool)
    }

    fn rank(&self) -> Rank {
        self.ranked.as_ref().map_or(Rank::ALONE, Ranked::rank)
    }

    fn shard(
        &self,
        parts: &[MatrixPart<'_>],
        quantize: Option<Format>,
        shard: Shard,
    ) -> Result<Matrix, Error> {
        let mut matrix = self.matrix(parts, quantize)?;
        if let Shard::Vocabulary { of } = shard
            && self.rank().share(of, 1).len() != matrix.rows
        {
            return Err(Error::Shape(format!(
                "{} rows of a vocabulary of {of} on {:?}",
                matrix.rows,
                self.rank()
            )));
        }
        matrix.shard = Some(shard);
        Ok(matrix)
    }

    fn leave(&mut self) {
        if let Some(ranked) = &mut self.ranked {
            ranked.leave();
        }
    }

    fn matrix_bytes(&self, matrix: &Matrix) -> usize {
        matrix.bytes()
    }

    fn vector(&self, values: &[f32]) -> Result<Vector, Error> {
        Vector::new(values)
    }

    fn activations(&self, rows: usize, cols: usize) -> Result<Activations, Error> {
        Activations::new(rows, cols)
    }

    fn kv_dtypes(&self) -> &'static [KvDtype] {
        KvCache::DTYPES
    }

    fn kv_cache(&self, shape: &KvShape) -> Result<KvCache, Error> {
        KvCache::new(shape, &self.pool)
    }

    fn begin(&mut self, step: &Step) -> Result<(), Error> {
        self.pool.settle();
        check_step(step)?;
        check_draws_among(self.draws(), step)?;
        self.step.clone_from(step);
        self.checked.clear();
        self.attention.plan(&step.spans);
        Ok(())
    }

    fn claim(&mut self, kv: &mut KvCache, part: usize) -> usize {
        kv.claim(part, &self.pool)
    }

    fn copy_blocks(&mut self, kv: &mut KvCache, copies: &[(u32, u32)]) -> Result<(), Error> {
        for &(from, to) in copies {
            let (from, to) = (from as usize, to as usize);
            if from.max(to) >= kv.shape.blocks {
                return Err(Error::Shape(format!(
                    "copy of block {from} to {to} in a cache of {}",
                    kv.shape.blocks
                )));
            }
            kv.copy_block(from, to, &self.pool);
        }
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, scale: f32, out: &mut Activations) -> Result<(), Error> {
        let tokens = &self.step.tokens;
        let of = match table.shard {
            Some(Shard::Vocabulary { of }) => of,
            _ => table.rows,
        };
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= of) {
            return Err(Error::Shape(format!(
                "token {token} of a vocabulary of {of}"
            )));
        }
        let cols = table.cols;
        let own = match &self.ranked {
            Some(ranked) if table.shard.is_some() => ranked.tokens(of),
            _ => 0..of,
        };
        let out = out.first_mut(tokens.len(), cols, "embeddings")?;
        let rows = Shared::new(out);
        self.pool.each(tokens.len(), &|row| {
            // SAFETY: each row is written by one task.
            let out = unsafe { rows.range(row * cols, cols) };
            let token = tokens[row] as usize;
            if own.contains(&token) {
                table.row(token - own.start, scale, out);
            } else {
                // Another rank has it.
                out.fill(0.0);
            }
        });
        match &mut self.ranked {
            Some(ranked) if table.shard.is_some() => ranked.sum(out),
            _ => Ok(()),
        }
    }

    fn rotary(&mut self, rotary: &Rotary<'_, Self>, out: &mut Activations) -> Result<(), Error> {
        let frequencies = rotary.frequencies.as_slice();
        let beyond = rotary
            .beyond
            .map_or(frequencies, |beyond| beyond.as_slice());
        if beyond.len() != frequencies.len() {
            return Err(Error::Shape(format!(
                "{} rotary frequencies and {} beyond the switch",
                frequencies.len(),
                beyond.len()
            )));
        }
        let step = &self.step;
        let (cols, scale) = (2 * frequencies.len(), rotary.scale);
        let out = Shared::new(out.first_mut(step.rows(), cols, "rotary table")?);
        self.pool.each(step.spans.len(), &|span| {
            let span = &step.spans[span];
            let frequencies = if span.beyond { beyond } else { frequencies };
            for row in span.row as usize..(span.row + span.rows) as usize {
                // SAFETY: each row is written by one task.
                let out = unsafe { out.range(row * cols, cols) };
                rotary_row(step.positions[row], frequencies, scale, out);
            }
        });
        Ok(())
    }

    fn rms_norm(
        &mut self,
        x: &Activations,
        weight: &Vector,
        eps: f32,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, cols, isa) = (self.rows(), x.cols, self.isa);
        let weight = weights(weight, cols)?;
        let x = x.first(rows, cols, "input of a norm")?;
        let out = Shared::new(out.first_mut(rows, cols, "output of a norm")?);
        self.pool.each(rows, &|row| {
            let x = &x[row * cols..(row + 1) * cols];
            // SAFETY: each row is written by one task.
            let out = unsafe { out.range(row * cols, cols) };
            dispatch!(isa, rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
        });
        Ok(())
    }

    fn rms_norm_in_place(
        &mut self,
        x: &mut Activations,
        norm: &Norm<'_, Self>,
    ) -> Result<(), Error> {
        let (rows, cols, isa, eps) = (self.rows(), x.cols, self.isa, norm.eps);
        let weight = weights(norm.weight, cols)?;
        let x = Shared::new(x.first_mut(rows, cols, "rows of a norm")?);
        self.pool.each(rows, &|row| {
            // SAFETY: each row is written by one task.
            let x = unsafe { x.range(row * cols, cols) };
            dispatch!(isa, norm_head(x: &mut [f32], weight: &[f32], eps: f32));
        });
        Ok(())
    }

    fn add(
        &mut self,
        x: &Activations,
        norm: Option<&Norm<'_, Self>>,
        scale: f32,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, cols, isa) = (self.rows(), x.cols, self.isa);
        let norm = match norm {
            None => None,
            Some(norm) => Some((weights(norm.weight, cols)?, norm.eps)),
        };
        let x = x.first(rows, cols, "rows to be added")?;
        let out = Shared::new(out.first_mut(rows, cols, "residual stream")?);
        self.pool.each(rows, &|row| {
            let x = &x[row * cols..(row + 1) * cols];
            // SAFETY: each row is written by one task.
            let out = unsafe { out.range(row * cols, cols) };
            dispatch!(isa, add_row(x: &[f32], norm: Option<(&[f32], f32)>, scale: f32, out: &mut [f32]));
        });
        Ok(())
    }

    fn linear(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        self.product(x, matrix, bias, out, Output::Set)
    }

    fn linear_add(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        self.product(x, matrix, bias, out, Output::Add)
    }

    fn norm_rope_store(
        &mut self,
        qkv: &mut Activations,
        layer: &QkvLayer<'_, Self>,
        kv: &mut KvCache,
    ) -> Result<(), Error> {
        let shape = layer.shape;
        check_layer(&shape, layer.layer, &kv.shape)?;
        kv.check_nodes(&self.pool)?;
        self.check_tables(layer.layer.group, shape.window, kv)?;
        let (rows, d, eps, isa) = (self.rows(), shape.head_dim, layer.eps, self.isa);
        let (heads, kv_heads) = (shape.heads, shape.kv_heads);
        let columns = (heads + 2 * kv_heads) * d;
        let rotary_cols = layer.rotary.map_or(0, |rotary| rotary.cols);
        check_rotary(rotary_cols, d)?;
        let rotary: &[f32] = match layer.rotary {
            None => &[],
            Some(rotary) => rotary.first(rows, rotary_cols, "rotary table")?,
        };
        let qkv = Shared::new(qkv.first_mut(rows, columns, "queries, keys and values")?);
        // Norms over all heads together come first, those of single heads with the rotation.
        let whole = |norm: Option<&Vector>, heads: usize| {
            norm.is_some_and(|norm| heads > 1 && norm.as_slice().len() == heads * d)
        };
        let together = [
            (layer.q_norm, whole(layer.q_norm, heads), 0, heads),
            (layer.k_norm, whole(layer.k_norm, kv_heads), heads, kv_heads),
        ];
        for (norm, whole, first, heads) in together {
            let Some(norm) = norm.filter(|_| whole) else {
                continue;
            };
            let weight = weights(norm, heads * d)?;
            self.pool.each(rows, &|row| {
                // SAFETY: each row is written by one task.
                let x = unsafe { qkv.range(row * columns + first * d, heads * d) };
                dispatch!(isa, norm_head(x: &mut [f32], weight: &[f32], eps: f32));
            });
        }
        let [q_norm, k_norm] = together.map(|(norm, whole, ..)| norm.filter(|_| !whole));
        let q_norm = q_norm.map(|w| weights(w, d)).transpose()?;
        let k_norm = k_norm.map(|w| weights(w, d)).transpose()?;
        let (kv_shape, layout) = (kv.shape, kv.layout());
        let KvLayer {
            group: page_group,
            index,
        } = layer.layer;
        let cache = Shared::new(kv.data.as_mut_slice());
        let kv = &*kv;
        let step = &self.step;
        // A head's keys and values are written by its node's threads, also the first time: that puts them there.
        let tasks = |node| step.spans.len() * kv.heads(node).len();
        self.pool.at_home(&tasks, &|turn| {
            let heads_here = kv.heads(turn.node);
            let span = step.spans[turn.task / heads_here.len()];
            let kv_head = heads_here.start + turn.task % heads_here.len();
            let group = heads / kv_heads;
            for i in 0..span.rows as usize {
                let row = span.row as usize + i;
                let (cos, sin) =
                    rotary[row * rotary_cols..(row + 1) * rotary_cols].split_at(rotary_cols / 2);
                // SAFETY: a head of a row belongs to one task: queries by their group, keys and values by their own index.
                let head = |head: usize| unsafe { qkv.range(row * columns + head * d, d) };
                for h in 0..group {
                    let x = head(kv_head * group + h);
                    dispatch!(isa, prepare(x: &mut [f32], q_norm: Option<&[f32]>, eps: f32, cos: &[f32], sin: &[f32]));
                }
                let key = head(heads + kv_head);
                {
                    let x = &mut *key;
                    dispatch!(isa, prepare(x: &mut [f32], k_norm: Option<&[f32]>, eps: f32, cos: &[f32], sin: &[f32]));
                }
                let value = head(heads + kv_heads + kv_head);
                let position = step.positions[row] as usize;
                let entry = position / kv_shape.block_size * step.groups + page_group;
                let block = step.block_tables[span.table as usize + entry] as usize;
                let at = kv.offset(index, block, kv_head);
                let slot = &mut Slot {
                    // SAFETY: this KV head of this block is written by the one sequence that owns the block.
                    bytes: unsafe { cache.range(at, layout.bytes) },
                    layout,
                    dtype: kv_shape.dtype,
                    head_dim: d,
                    at: position % kv_shape.block_size,
                };
                let (key, value): (&[f32], &[f32]) = (key, value);
                dispatch!(isa, store(slot: &mut Slot<'_>, key: &[f32], value: &[f32]));
            }
        });
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
        kv.check_nodes(&self.pool)?;
        self.check_tables(layer.group, shape.window, kv)?;
        if let Some(sinks) = sinks
            && sinks.as_slice().len() != shape.heads
        {
            return Err(Error::Shape(format!(
                "{} attention sinks for {} heads",
                sinks.as_slice().len(),
                shape.heads
            )));
        }
        let rows = self.rows();
        let columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        let attention = Attention {
            shape: *shape,
            layer,
            sinks: sinks.map(Vector::as_slice),
            kv,
            groups: self.step.groups,
            qkv: qkv.first(rows, columns, "queries, keys and values")?,
            block_tables: &self.step.block_tables,
        };
        let out = out.first_mut(rows, shape.heads * shape.head_dim, "attention output")?;
        attention.run(out, &mut self.attention, &self.pool, self.isa)
    }

    fn gate(
        &mut self,
        gate_up: &Activations,
        activation: Activation,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, n, isa) = (self.rows(), out.cols, self.isa);
        let gate_up = gate_up.first(rows, 2 * n, "gate and up projections")?;
        let out = Shared::new(out.first_mut(rows, n, "gated activations")?);
        self.pool.each(rows, &|row| {
            let (gate, up) = gate_up[row * 2 * n..(row + 1) * 2 * n].split_at(n);
            // SAFETY: each row is written by one task.
            let out = unsafe { out.range(row * n, n) };
            dispatch!(isa, gate_row(activation: Activation, gate: &[f32], up: &[f32], out: &mut [f32]));
        });
        Ok(())
    }

    fn experts(
        &mut self,
        x: &Activations,
        experts: &Experts<'_, Self>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, cols) = (self.rows(), x.cols);
        let mixture = Mixture {
            router: experts.router,
            router_bias: experts.router_bias.map(Vector::as_slice),
            gate_up: experts.gate_up,
            gate_up_bias: experts.gate_up_bias.map(Vector::as_slice),
            down: experts.down,
            down_bias: experts.down_bias.map(Vector::as_slice),
            experts: experts.experts,
            top_k: experts.top_k,
            normalised: experts.normalised,
            activation: experts.activation,
        };
        let n = mixture.check(cols)?;
        let x = x.first(rows, cols, "input of experts")?;
        let out = out.first_mut(rows, cols, "output of experts")?;
        let (pool, isa) = (&self.pool, self.isa);
        let (scratch, product_rows) = (&mut self.experts, &mut self.product_rows);
        let mut run =
            |out: &mut [f32]| mixture.run(x, rows, n, out, scratch, product_rows, pool, isa);
        match &mut self.ranked {
            Some(ranked) if experts.down.shard == Some(Shard::Columns) => {
                add_rows(ranked.sums_of(rows * cols, run)?, cols, out, pool, isa);
                Ok(())
            }
            _ => run(out),
        }
    }

    fn logits(
        &mut self,
        x: &Activations,
        norm: &Norm<'_, Self>,
        head: &Matrix,
        rule: LogitsRule,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let (cols, isa, eps) = (x.cols, self.isa, norm.eps);
        let wanted = &self.step.logit_rows;
        let x = x.first(self.step.rows(), cols, "residual stream")?;
        let weight = weights(norm.weight, cols)?;
        if head.cols != cols {
            return Err(Error::Shape(format!(
                "an output head of {} columns for rows of {cols}",
                head.cols
            )));
        }
        self.head_rows.reserve(wanted.len() * cols, "output rows")?;
        let rows = Shared::new(self.head_rows.as_mut_slice());
        self.pool.each(wanted.len(), &|i| {
            let row = wanted[i] as usize;
            let x = &x[row * cols..(row + 1) * cols];
            // SAFETY: each row is written by one task.
            let out = unsafe { rows.range(i * cols, cols) };
            dispatch!(isa, rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
        });
        let vocabulary = match head.shard {
            Some(Shard::Vocabulary { of }) => of,
            _ => head.rows,
        };
        let count = wanted.len();
        logits.resize((count - self.step.draws.len()) * vocabulary, 0.0);
        self.head.clear();
        if count == 0 {
            return Ok(());
        }
        let x = self.head_rows.as_slice();
        let linear = Linear::new(head, x, count, None, Output::Set);
        let (product_rows, pool) = (&mut self.product_rows, &self.pool);
        if !self.step.draws.is_empty() {
            let with = (product_rows, pool, isa);
            return self
                .head
                .draw(&linear, &self.step.draws, rule, logits, with);
        }
        let mut run = |out: &mut [f32]| linear.run(out, product_rows, pool, isa);
        match &mut self.ranked {
            Some(ranked) if head.shard.is_some() => {
                ranked.logits(count, vocabulary, logits, run)?;
            }
            _ => run(logits)?,
        }
        let LogitsRule { scale, softcap } = rule;
        if scale != 1.0 || softcap.is_some() {
            let rows = Shared::new(logits);
            self.pool.each(count, &|i| {
                // SAFETY: each row is written by one task.
                let x = unsafe { rows.range(i * vocabulary, vocabulary) };
                dispatch!(isa, rule_row(x: &mut [f32], scale: f32, softcap: Option<f32>));
            });
        }
        Ok(())
    }

    fn draws(&self) -> Draws {
        // Of several ranks each has a part of a row.
        match self.ranked {
            None => Draws::Largest,
            Some(_) => Draws::None,
        }
    }

    fn drawn(&self) -> &[u32] {
        self.head.drawn()
    }

    fn each(&mut self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.pool.each(tasks, task);
    }
}

/// `out[r] += x[r]`; both `[rows, cols]`.
fn add_rows(x: &[f32], cols: usize, out: &mut [f32], pool: &Pool, isa: Isa) {
    let rows = Shared::new(out);
    pool.each(x.len() / cols, &|row| {
        let x = &x[row * cols..(row + 1) * cols];
        // SAFETY: each row is written by one task.
        let out = unsafe { rows.range(row * cols, cols) };
        let (norm, scale): (Option<(&[f32], f32)>, f32) = (None, 1.0);
        dispatch!(isa, add_row(x: &[f32], norm: Option<(&[f32], f32)>, scale: f32, out: &mut [f32]));
    });
}

/// Normalises, where there are weights, and rotates one head.
///
/// # Safety
/// The processor has the instructions of `S`.
#[inline(always)]
unsafe fn prepare<S: super::simd::Simd>(
    head: &mut [f32],
    norm: Option<&[f32]>,
    eps: f32,
    cos: &[f32],
    sin: &[f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        if let Some(weight) = norm {
            norm_head::<S>(head, weight, eps);
        }
        rotate::<S>(head, cos, sin);
    }
}
