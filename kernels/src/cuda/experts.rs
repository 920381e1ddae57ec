//! Mixtures of experts: which experts a row uses is decided on the device, so the work is sized for the worst case and blocks without work end at
//! once.

use super::backend::{CudaBackend, operand_precision};
use super::buffers::Activations;
use super::matrix::Matrix;
use super::params::{self, Pointer, Rows};
use super::products::{Choice, Tiles, choose, one_segment};
use super::scratch::Purpose;
use crate::{Error, Experts, Shard};

const ROUTE_ROWS: usize = 4;
const SORT_WARPS: usize = 8;
const COMBINE_THREADS: usize = 256;
/// Most experts: their counts are in shared memory.
const MOST_EXPERTS: usize = 4096;

impl CudaBackend {
    /// Records `out[r] += Σ weight · expert(x[r])`.
    pub(super) fn mixture(
        &mut self,
        x: &Activations,
        of: &Experts<'_, Self>,
        out: &mut Activations,
    ) -> Result<(), Error> {
        let (rows, hidden, n) = (self.rows(), x.cols, of.down.cols);
        let (experts, top_k) = (of.experts, of.top_k);
        check(of, hidden)?;
        x.check(rows, hidden, "input of experts")?;
        let out = out.floats(rows, hidden, "output of experts")?;
        let bias = |vector: Option<&super::Vector>, len, what: &str| match vector {
            None => Ok(0),
            Some(vector) => vector.of(len, what),
        };
        let router_bias = bias(of.router_bias, experts, "router bias")?;
        let gate_up_bias = bias(of.gate_up_bias, experts * 2 * n, "experts' gate bias")?;
        let down_bias = bias(of.down_bias, experts * hidden, "experts' output bias")?;

        let choices = rows * top_k;
        let floats = |n: usize| n * size_of::<f32>();
        let scores = self.scratch.get(Purpose::Scores, floats(rows * experts))?;
        self.product(
            x.params(),
            rows,
            of.router,
            router_bias,
            (scores, experts),
            false,
        )?;
        let route = params::Route {
            scores,
            chosen: self.scratch.get(Purpose::Chosen, floats(choices))?,
            weights: self.scratch.get(Purpose::ChoiceWeights, floats(choices))?,
            rows: rows as i32,
            experts: experts as i32,
            top_k: top_k as i32,
            normalised: i32::from(of.normalised),
        };
        self.launch("route", (rows.div_ceil(ROUTE_ROWS), 1), 0, &route);

        let places = self.scratch.get(Purpose::Places, floats(choices))?;
        let gate_up = self.scratch.get(Purpose::GateUp, floats(choices * 2 * n))?;
        let gated = Rows {
            data: self.scratch.get(Purpose::Gated, floats(choices * n))?,
            stride: n as i32,
            precision: operand_precision(n) as i32,
        };
        let answers = self
            .scratch
            .get(Purpose::Answers, floats(choices * hidden))?;
        // Places of an expert, if rows were spread evenly.
        let even = choices.div_ceil(experts);
        let sort = |this: &mut Self, purpose, choice: Choice, features| {
            this.sort(
                (route.chosen, places),
                (rows, top_k, experts),
                purpose,
                choice,
                features,
            )
        };
        let choice = self.choice(of.gate_up, even)?;
        let tiles = sort(self, Purpose::GateUpTiles, choice, 2 * n)?;
        self.experts_product(x.params(), rows, of.gate_up, gate_up_bias, tiles, gate_up)?;
        self.gate_rows(choices, gate_up, n, of.activation, gated);
        let choice = self.choice(of.down, even)?;
        // Tiles depend on how many rows they have, and on no matrix.
        let same = choice.rows == tiles.choice.rows;
        let tiles = if same {
            tiles
        } else {
            sort(self, Purpose::DownTiles, choice, hidden)?
        };
        let tiles = Tiles {
            row_of: 0,
            features: hidden,
            choice,
            ..tiles
        };
        self.experts_product(gated, choices, of.down, down_bias, tiles, answers)?;
        let part = match of.down.shard {
            Some(Shard::Columns) => Some(self.part(rows * hidden, out, true)?),
            _ => None,
        };
        let combine = params::Combine {
            answers,
            places,
            weights: route.weights,
            out: part.map_or(out, |part| part.own),
            cols: hidden as i32,
            top_k: top_k as i32,
            add: i32::from(part.is_none()),
            pad: 0,
        };
        let blocks = hidden.div_ceil(COMBINE_THREADS).min(16);
        self.launch("combine_experts", (rows, blocks), 0, &combine);
        if let Some(part) = part {
            self.add_up(part, out, true);
        }
        Ok(())
    }

    /// The kernel for a matrix of experts with about `rows` rows each.
    fn choice(&self, matrix: &Matrix, rows: usize) -> Result<Choice, Error> {
        let layout = one_segment(matrix)?.layout;
        Ok(choose(layout, rows, self.deterministic))
    }

    /// Records the sorting of places by expert, into tiles of the kernel's size.
    fn sort(
        &mut self,
        (chosen, places): (Pointer, Pointer),
        (rows, top_k, experts): (usize, usize, usize),
        purpose: Purpose,
        choice: Choice,
        features: usize,
    ) -> Result<Tiles, Error> {
        let choices = rows * top_k;
        // Every expert may have a tile that is not full.
        let most = choices / choice.rows + experts.min(choices);
        let tile_bytes = 3 * size_of::<u32>();
        let count = self.scratch.get(purpose, 16 + most * tile_bytes)?;
        let row_of = self
            .scratch
            .get(Purpose::RowOf, choices * size_of::<u32>())?;
        let sort = params::Sort {
            chosen,
            places,
            row_of,
            tiles: count + 16,
            tile_count: count,
            choices: choices as i32,
            top_k: top_k as i32,
            experts: experts as i32,
            tile_rows: choice.rows as i32,
        };
        let shared = (experts + SORT_WARPS) * size_of::<i32>();
        self.launch("sort_by_expert", (experts, 1), shared, &sort);
        Ok(Tiles {
            at: sort.tiles,
            count,
            row_of,
            most,
            features,
            choice,
        })
    }
}

/// Refuses parts that do not fit each other.
fn check(of: &Experts<'_, CudaBackend>, hidden: usize) -> Result<(), Error> {
    let (experts, top_k, n) = (of.experts, of.top_k, of.down.cols);
    if experts == 0 || top_k == 0 || top_k > experts || experts > MOST_EXPERTS {
        return Err(Error::Shape(format!(
            "{top_k} of {experts} experts, on a GPU at most {MOST_EXPERTS}"
        )));
    }
    let fits = of.router.rows == experts
        && of.router.cols == hidden
        && of.gate_up.rows == experts * 2 * n
        && of.gate_up.cols == hidden
        && of.down.rows == experts * hidden;
    if !fits {
        return Err(Error::Shape(format!(
            "{experts} experts of [{}, {}] and [{}, {n}] behind a router of [{}, {}] for rows of {hidden}",
            of.gate_up.rows, of.gate_up.cols, of.down.rows, of.router.rows, of.router.cols
        )));
    }
    Ok(())
}
