//! Products: which kernel, in which tiles.

use super::backend::{CudaBackend, THREADS};
use super::buffers::{Activations, Vector};
use super::device::{Dense, DenseShape, Operand, Work, alignment};
use super::matrix::{Layout, Matrix, Segment};
use super::params::{self, Pointer, Precision, Rows};
use super::scratch::Purpose;
use crate::{Error, Shard};

/// Most rows that the kernels bound by memory take in one tile; with more, weights are read again or tensor cores are the limit.
const FEW: usize = 32;
/// Features and rows of a block; see the kernels.
const FEW_FEATURES: usize = 16;
const MANY_FEATURES: usize = 128;
const MANY_K: usize = 64;
/// Blocks that a GPU has room for at a time: two on each multiprocessor of an H100 or H200 (an A100 has 216). Where products of many rows have fewer, k is
/// divided.
const BLOCKS: usize = 264;
/// Columns that are worth a split: the blocks' sums are written, and added up by another kernel.
const SPLIT: usize = 8 * MANY_K;
/// Blocks of the kernel that adds them up.
const ADDING: usize = 1024;
/// Fewest rows for which quantised weights are expanded for the device's library. Expanding takes as long as it multiplies some hundred rows.
const EXPANDING: usize = 512;
/// Bytes of weights that are expanded at once: large enough for a product to use the whole GPU, and small enough to be found in its cache again.
const EXPANDED: usize = 32 << 20;
const FLOAT_FEATURES: usize = 8;
const FLOAT_ROWS: usize = 4;

/// The experts' part of a product: tiles of places.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    /// Where they are, and where their number is.
    pub at: Pointer,
    pub count: Pointer,
    /// The row of x of each place; 0: the place itself.
    pub row_of: Pointer,
    /// Most there can be.
    pub most: usize,
    /// Output features of an expert.
    pub features: usize,
    /// The kernel whose tiles they are.
    pub choice: Choice,
}

/// A kernel and its tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Choice {
    kernel: &'static str,
    /// Most rows of a block.
    pub rows: usize,
    features: usize,
    shared: usize,
}

/// The kernels of a layout: for up to 8, 16 and 32 rows, and in tiles of 64 and 128 rows.
fn kernels(layout: Layout) -> [&'static str; 5] {
    macro_rules! of {
        ($name:literal) => {
            [
                concat!("product_few_", $name, "_8"),
                concat!("product_few_", $name, "_16"),
                concat!("product_few_", $name, "_32"),
                concat!("product_many_", $name, "_64"),
                concat!("product_many_", $name, "_128"),
            ]
        };
    }
    match layout {
        Layout::F32 => ["product_f32"; 5],
        Layout::Bf16 => of!("bf16"),
        Layout::F16 => of!("f16"),
        Layout::Q4_0 => of!("q4_0"),
        Layout::Q5_1 => of!("q5_1"),
        Layout::Q4K => of!("q4_k"),
        Layout::Q8_0 => of!("q8_0"),
        Layout::Int4(_) => of!("int4"),
        Layout::Int8(_) => of!("int8"),
        Layout::Fp8(_) => of!("fp8"),
    }
}

/// The kernel for `rows` rows. `deterministic`: the same arithmetic for any number.
pub(super) fn choose(layout: Layout, rows: usize, deterministic: bool) -> Choice {
    let kernels = kernels(layout);
    if layout == Layout::F32 {
        return Choice {
            kernel: kernels[0],
            rows: FLOAT_ROWS,
            features: FLOAT_FEATURES,
            shared: 0,
        };
    }
    let (index, rows) = match rows {
        0..=8 => (0, 8),
        9..=16 => (1, 16),
        _ if rows <= FEW || deterministic => (2, FEW),
        33..=64 => (3, 64),
        _ => (4, 128),
    };
    let kernel = kernels[index];
    if rows <= FEW {
        Choice {
            kernel,
            rows,
            features: FEW_FEATURES,
            // A sum for each of 8 warps.
            shared: 8 * rows * FEW_FEATURES * size_of::<f32>(),
        }
    } else {
        Choice {
            kernel,
            rows,
            features: MANY_FEATURES,
            // Two buffers of weights and of activations.
            shared: 2 * (MANY_FEATURES + rows) * MANY_K * size_of::<u16>(),
        }
    }
}

/// Into how many splits of k, of how many columns, `blocks` blocks are divided.
fn splits(blocks: usize, cols: usize) -> (usize, usize) {
    let most = (cols / SPLIT).max(1);
    let splits = (BLOCKS / blocks.max(1)).clamp(1, most);
    let each = cols.div_ceil(splits).next_multiple_of(MANY_K);
    (cols.div_ceil(each), each)
}

impl CudaBackend {
    pub(super) fn linear_into(
        &mut self,
        x: &Activations,
        matrix: &Matrix,
        bias: Option<&Vector>,
        out: &mut Activations,
        add: bool,
    ) -> Result<(), Error> {
        let rows = self.rows();
        let bias = match bias {
            None => 0,
            Some(bias) => bias.of(matrix.rows, "a bias")?,
        };
        x.check(rows, matrix.cols, "input of a product")?;
        let to = out.floats(rows, matrix.rows, "output of a product")?;
        if matrix.shard == Some(Shard::Columns) {
            let part = self.part(rows * matrix.rows, to, add)?;
            let own = (part.own, matrix.rows);
            self.product(x.params(), rows, matrix, bias, own, false)?;
            self.add_up(part, to, add);
            return Ok(());
        }
        self.product(x.params(), rows, matrix, bias, (to, matrix.rows), add)
    }

    /// `out[r] (+)= matrix · x[r] + bias` for `rows` rows; `out`: where, and its stride.
    pub(super) fn product(
        &mut self,
        x: Rows,
        rows: usize,
        matrix: &Matrix,
        bias: Pointer,
        (out, stride): (Pointer, usize),
        add: bool,
    ) -> Result<(), Error> {
        // Segments mostly want the same of x; what was converted for one serves the next.
        let mut operands: Option<(Layout, Pointer, Rows)> = None;
        for segment in &matrix.segments {
            let like = (segment.layout == Layout::F32, segment.order());
            let x = match operands {
                Some((layout, order, x)) if (layout == Layout::F32, order) == like => x,
                _ => self.operands(x, rows, segment, matrix.cols)?,
            };
            operands = Some((segment.layout, segment.order(), x));
            let product = params::Product {
                w: segment.params(),
                x: x.data,
                out,
                bias,
                tiles: 0,
                tile_count: 0,
                row_of: 0,
                rows: rows as i32,
                features: segment.rows as i32,
                x_stride: x.stride,
                out_stride: stride as i32,
                column: segment.first as i32,
                add: i32::from(add),
                splits: 1,
                split_cols: matrix.cols as i32,
            };
            if self.dense(segment, &product, x)? || self.expanded(segment, &product, x)? {
                continue;
            }
            let choice = choose(segment.layout, rows, self.deterministic);
            let blocks = (
                segment.rows.div_ceil(choice.features),
                rows.div_ceil(choice.rows),
            );
            // Sums that are added up have no gaps between their rows.
            let whole = segment.rows == stride && segment.first == 0;
            let (splits, each) = splits(blocks.0 * blocks.1, matrix.cols);
            if choice.features == MANY_FEATURES && whole && splits > 1 {
                let split = params::Product {
                    splits: splits as i32,
                    split_cols: each as i32,
                    ..product
                };
                self.split_product(choice, blocks, split, x)?;
            } else {
                self.run_product(choice, blocks, product, x);
            }
        }
        Ok(())
    }

    /// Records a product whose k is divided, and the addition of its parts, in order of k.
    fn split_product(
        &mut self,
        choice: Choice,
        blocks: (usize, usize),
        product: params::Product,
        x: Rows,
    ) -> Result<(), Error> {
        let (rows, splits) = (product.rows as usize, product.splits as usize);
        let count = rows * product.features as usize;
        let parts = self
            .scratch
            .get(Purpose::Splits, splits * count * size_of::<f32>())?;
        let of_parts = params::Product {
            out: parts,
            bias: 0,
            add: 0,
            ..product
        };
        self.run_product(choice, (blocks.0, blocks.1 * splits), of_parts, x);
        let sum = params::AddParts {
            parts,
            out: product.out,
            count: count as i64,
            ranks: product.splits,
            add: product.add,
        };
        let blocks = count.div_ceil(THREADS).min(ADDING);
        self.launch("add_parts", (blocks, 1), 0, &sum);
        if product.bias != 0 {
            self.add_bias(product.out, product.bias, &product);
        }
        Ok(())
    }

    /// Records the addition of a bias to every row of a product's output, whose columns begin at `x`.
    fn add_bias(&mut self, x: Pointer, bias: Pointer, of: &params::Product) {
        let add = params::AddBias {
            x,
            bias,
            stride: of.out_stride,
            cols: of.features,
        };
        self.launch("add_bias", (of.rows as usize, 1), 0, &add);
    }

    /// The product of every place with its expert's part of the matrix. `out` `[places, features]`.
    pub(super) fn experts_product(
        &mut self,
        x: Rows,
        x_rows: usize,
        matrix: &Matrix,
        bias: Pointer,
        tiles: Tiles,
        out: Pointer,
    ) -> Result<(), Error> {
        let (choice, features) = (tiles.choice, tiles.features);
        let segment = one_segment(matrix)?;
        let x = self.operands(x, x_rows, segment, matrix.cols)?;
        let product = params::Product {
            w: segment.params(),
            x: x.data,
            out,
            bias,
            tiles: tiles.at,
            tile_count: tiles.count,
            row_of: tiles.row_of,
            rows: 0,
            features: features as i32,
            x_stride: x.stride,
            out_stride: features as i32,
            column: 0,
            add: 0,
            splits: 1,
            split_cols: matrix.cols as i32,
        };
        let blocks = (features.div_ceil(choice.features), tiles.most);
        self.run_product(choice, blocks, product, x);
        Ok(())
    }

    fn run_product(
        &mut self,
        choice: Choice,
        blocks: (usize, usize),
        product: params::Product,
        x: Rows,
    ) {
        if choice.kernel == "product_f32" {
            let product = params::FloatProduct { of: product, x };
            self.launch(choice.kernel, blocks, choice.shared, &product);
        } else {
            self.launch(choice.kernel, blocks, choice.shared, &product);
        }
    }

    /// Rows as a segment multiplies them: bf16 (any precision with f32 matrices), their columns in its order.
    fn operands(
        &mut self,
        x: Rows,
        rows: usize,
        segment: &Segment,
        cols: usize,
    ) -> Result<Rows, Error> {
        let fits = segment.layout == Layout::F32 || x.precision == Precision::Bf16 as i32;
        if fits && segment.order() == 0 {
            return Ok(x);
        }
        let precision = if segment.layout == Layout::F32 {
            Precision::F32
        } else {
            Precision::Bf16
        };
        let out = Rows {
            data: self
                .scratch
                .get(Purpose::Operands, rows * cols * size_of::<f32>())?,
            stride: cols as i32,
            precision: precision as i32,
        };
        let convert = params::Convert {
            x,
            out,
            order: segment.order(),
            cols: cols as i32,
            pad: 0,
        };
        self.launch("convert", (rows, 1), 0, &convert);
        Ok(out)
    }

    /// Records the product for the device's library, where it has one and it pays.
    fn dense(
        &mut self,
        segment: &Segment,
        product: &params::Product,
        x: Rows,
    ) -> Result<bool, Error> {
        let operand = match segment.layout {
            Layout::Bf16 => Operand::Bf16,
            Layout::F16 => Operand::F16,
            _ => return Ok(false),
        };
        let rows = product.rows as usize;
        if rows <= FEW || self.deterministic {
            return Ok(false);
        }
        let cols = segment.params().cols;
        let halves = match operand {
            Operand::Bf16 => None,
            Operand::F16 => Some(Rows {
                data: self
                    .scratch
                    .get(Purpose::Halves, rows * cols as usize * size_of::<u16>())?,
                stride: cols,
                precision: Precision::Bf16 as i32,
            }),
        };
        let at = (product.column as usize * size_of::<f32>()) as u64;
        let (w, of, out) = (
            segment.params().quants,
            halves.unwrap_or(x),
            product.out + at,
        );
        let shape = dense_shape(operand, product, [w, of.data, out].map(alignment));
        let shape = DenseShape {
            x_stride: of.stride as u32,
            ..shape
        };
        if !self.device.supports(shape) {
            return Ok(false);
        }
        if let Some(out) = halves {
            let convert = params::Convert {
                x,
                out,
                order: 0,
                cols,
                pad: 0,
            };
            self.launch("convert_f16", (rows, 1), 0, &convert);
        }
        self.record(Work::Dense(Dense {
            shape,
            w,
            x: of.data,
            out,
        }));
        if product.bias != 0 {
            self.add_bias(out, product.bias + at, product);
        }
        Ok(true)
    }

    /// Records a product with quantised weights for the device's library, where it has one and it pays: piece by piece they become bf16, the same numbers
    /// that our kernels multiply.
    fn expanded(
        &mut self,
        segment: &Segment,
        product: &params::Product,
        x: Rows,
    ) -> Result<bool, Error> {
        let Some((kernel, run)) = expanding_kernel(segment.layout) else {
            return Ok(false);
        };
        let w = segment.params();
        let cols = w.cols as usize;
        let (at_once, pieces) = pieces(segment.rows, cols);
        let few = (product.rows as usize) < EXPANDING;
        if few || self.deterministic || at_once * cols > i32::MAX as usize {
            return Ok(false);
        }
        let place = |first: usize| {
            let column = product.column as usize + first;
            product.out + (column * size_of::<f32>()) as u64
        };
        let shape = |(first, features): (usize, usize)| {
            // Where they will be, a piece of memory begins.
            let alignments = [256, alignment(x.data), alignment(place(first))];
            DenseShape {
                features: features as u32,
                ..dense_shape(Operand::Bf16, product, alignments)
            }
        };
        if !pieces
            .clone()
            .all(|piece| self.device.supports(shape(piece)))
        {
            return Ok(false);
        }
        let bytes = at_once * cols * size_of::<u16>();
        let expanded = self.scratch.get(Purpose::Expanded, bytes)?;
        for (first, features) in pieces {
            let expand = params::Expand {
                w,
                out: expanded,
                first: first as i32,
                rows: features as i32,
            };
            let blocks = (features * cols / run).div_ceil(THREADS).min(BLOCKS * 4);
            // Of 16-bit elements of a run in each thread.
            let shared = THREADS * run * size_of::<u16>();
            self.launch(kernel, (blocks, 1), shared, &expand);
            self.record(Work::Dense(Dense {
                shape: shape((first, features)),
                w: expanded,
                x: x.data,
                out: place(first),
            }));
        }
        if product.bias != 0 {
            let bias = product.bias + (product.column as usize * size_of::<f32>()) as u64;
            self.add_bias(place(0), bias, product);
        }
        Ok(true)
    }
}

/// The shape of a product for the device's library.
fn dense_shape(operand: Operand, product: &params::Product, alignments: [u32; 3]) -> DenseShape {
    DenseShape {
        operand,
        rows: product.rows as u32,
        features: product.features as u32,
        cols: product.w.cols as u32,
        x_stride: product.x_stride as u32,
        out_stride: product.out_stride as u32,
        add: product.add != 0,
        alignments,
    }
}

/// The kernel that expands a layout, and the elements of its runs; none for floats.
fn expanding_kernel(layout: Layout) -> Option<(&'static str, usize)> {
    Some(match layout {
        Layout::F32 | Layout::Bf16 | Layout::F16 => return None,
        Layout::Q4_0 => ("expand_q4_0", 32),
        Layout::Q5_1 => ("expand_q5_1", 32),
        Layout::Q4K => ("expand_q4_k", 32),
        Layout::Q8_0 => ("expand_q8_0", 16),
        Layout::Int4(_) => ("expand_int4", 32),
        Layout::Int8(_) => ("expand_int8", 16),
        Layout::Fp8(_) => ("expand_fp8", 16),
    })
}

/// Features that are expanded at once, a multiple of what the library's tiles have; and the pieces: the first, and how many.
fn pieces(features: usize, cols: usize) -> (usize, impl Iterator<Item = (usize, usize)> + Clone) {
    let at_once = EXPANDED / (cols.max(1) * size_of::<u16>()) / 256 * 256;
    let at_once = at_once.max(256).min(features);
    let pieces = (0..features).step_by(at_once.max(1));
    let piece = move |first| (first, at_once.min(features - first));
    (at_once, pieces.map(piece))
}

/// The only segment of a matrix of experts: their rows are found by counting.
pub(super) fn one_segment(matrix: &Matrix) -> Result<&Segment, Error> {
    match &matrix.segments[..] {
        [segment] => Ok(segment),
        segments => Err(Error::Shape(format!(
            "experts stored in {} different ways in one matrix, which there is no kernel for on a GPU",
            segments.len()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_for_a_number_of_rows_has_a_tile_for_them() {
        for rows in 1..300 {
            let choice = choose(Layout::Q4_0, rows, false);
            assert!(choice.rows >= rows.min(128), "{rows}: {choice:?}");
            assert!(choice.shared <= 96 << 10, "fits every GPU");
        }
    }

    #[test]
    fn k_is_divided_where_blocks_are_few_and_every_column_is_in_one_split() {
        for cols in [8, 64, 500, 1024, 4096, 12_288, 14_336] {
            for blocks in [1, 8, 32, 48, 96, 192, 300, 5000] {
                let (splits, each) = splits(blocks, cols);
                assert!(splits * each >= cols && (splits - 1) * each < cols);
                assert!(splits == 1 || each >= SPLIT && splits * blocks <= BLOCKS);
            }
        }
        assert_eq!(splits(32, 12_288), (8, 1536));
        assert_eq!(splits(192, 4096).0, 1);
    }

    #[test]
    fn pieces_of_expanded_weights_are_of_a_size_and_all_of_them() {
        for (features, cols) in [(1, 32), (300, 4096), (24_576, 4096), (5000, 1 << 20)] {
            let (at_once, pieces) = pieces(features, cols);
            assert!(at_once * cols * 2 <= EXPANDED.max(256 * cols * 2));
            let mut next = 0;
            for (first, features) in pieces {
                assert!(first == next && features > 0 && features <= at_once);
                next += features;
            }
            assert_eq!(next, features);
        }
        assert_eq!(pieces(24_576, 4096).0, 4096);
    }

    #[test]
    fn deterministic_products_are_the_same_arithmetic_for_any_number_of_rows() {
        for rows in 1..300 {
            let kernel = choose(Layout::Bf16, rows, true).kernel;
            assert!(kernel.starts_with("product_few_"), "{rows}: {kernel}");
        }
    }
}
