//! Steps that are launched before the tokens of the one before have come to the host.

use quire_kernels::cuda::{Activations, CudaBackend, Matrix, Vector};
use quire_kernels::{Backend, ChangeKind, Draw, DrawnRow, Error, LogitsRule, Norm, Step};

use crate::common::step;
use crate::machine::{f32_matrix, gpu};

const VOCABULARY: usize = 8;

/// A model of a table and a head: the token after `t` is `t + 1`.
struct Model {
    gpu: CudaBackend,
    table: Matrix,
    head: Matrix,
    weight: Vector,
    x: Activations,
}

impl Model {
    fn new() -> Self {
        let gpu = gpu(false);
        let one_in = |of: usize| -> Vec<f32> {
            let ones = (0..VOCABULARY).map(|row| (row + of) % VOCABULARY);
            ones.flat_map(|one| (0..VOCABULARY).map(move |col| f32::from(u8::from(col == one))))
                .collect()
        };
        let matrix = |gpu: &CudaBackend, of| f32_matrix(gpu, VOCABULARY, VOCABULARY, &one_in(of));
        Self {
            table: matrix(&gpu, 0),
            head: matrix(&gpu, VOCABULARY - 1),
            weight: gpu.vector(&[1.0; VOCABULARY]).unwrap(),
            x: gpu.activations(16, VOCABULARY).unwrap(),
            gpu,
        }
    }

    fn run(&mut self, step: &Step) -> Result<Vec<f32>, Error> {
        let norm = Norm {
            weight: &self.weight,
            eps: 0.0,
        };
        let rule = LogitsRule {
            scale: 1.0,
            softcap: None,
        };
        let mut host = Vec::new();
        self.gpu.begin(step)?;
        self.gpu.embed(&self.table, 1.0, &mut self.x)?;
        self.gpu
            .logits(&self.x, &norm, &self.head, rule, &mut host)?;
        Ok(host)
    }

    fn collect(&mut self) -> Result<Vec<u32>, Error> {
        self.gpu.collect(&mut Vec::new())?;
        Ok(self.gpu.drawn().to_vec())
    }
}

/// Draws from every row, greedily, and waits for nothing.
fn deferred(rows: usize) -> Step {
    let mut step = step(&vec![(3, 1); rows], 16);
    step.logit_rows = (0..rows as u32).collect();
    step.draws = (step.logit_rows.iter())
        .map(|&row| Draw {
            row,
            greedy: true,
            inverse_temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            within: f32::INFINITY,
            place: 0.5,
            first_change: 0,
            changes: [0; ChangeKind::COUNT],
        })
        .collect();
    step.deferred = true;
    step
}

/// After `before`: row `r` has the token of draw `draws[r]`, or a token of its own.
fn after(draws: &[Option<u32>], tokens: &[u32]) -> Step {
    let mut step = deferred(draws.len());
    step.tokens = tokens.to_vec();
    let rows = (0..).zip(draws);
    step.drawn_rows = rows
        .filter_map(|(row, draw)| draw.map(|draw| DrawnRow { row, draw }))
        .collect();
    step
}

#[test]
fn a_row_takes_its_token_from_a_draw_that_the_host_has_not_seen() {
    let mut model = Model::new();
    let unknown = u32::MAX;
    model.run(&after(&[None, None, None], &[1, 5, 3])).unwrap();
    // They change places; one is not wanted, and one is new.
    let second = after(&[Some(2), None, Some(0)], &[unknown, 7, unknown]);
    model.run(&second).unwrap();
    assert_eq!(model.collect().unwrap(), [2, 6, 4]);
    // More of them, and then fewer: other buckets.
    let draws = [Some(0), Some(1), Some(2), Some(0), Some(0)];
    model.run(&after(&draws, &[unknown; 5])).unwrap();
    assert_eq!(model.collect().unwrap(), [5, 0, 3]);
    model.run(&after(&[Some(4)], &[unknown])).unwrap();
    assert_eq!(model.collect().unwrap(), [6, 1, 4, 6, 6]);
    assert_eq!(model.collect().unwrap(), [7]);
    // And on, in one bucket, as a graph would be replayed.
    model.run(&after(&[Some(0)], &[unknown])).unwrap();
    for token in 0..20 {
        model.run(&after(&[Some(0)], &[unknown])).unwrap();
        assert_eq!(model.collect().unwrap(), [token % 8]);
    }
}

#[test]
fn what_a_device_cannot_keep_is_refused() {
    let mut model = Model::new();
    let first = after(&[None, None], &[1, 2]);
    model.run(&first).unwrap();
    let refused = |done: Result<Vec<f32>, Error>, part: &str| {
        let error = done.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(
        model.run(&after(&[Some(2)], &[0])),
        "after a step of 2 draws",
    );
    let mut beyond = after(&[Some(1)], &[0]);
    beyond.drawn_rows[0].row = 1;
    refused(model.run(&beyond), "after a step of 2 draws");
    let mut waits = after(&[Some(0)], &[0]);
    waits.deferred = false;
    refused(model.run(&waits), "is waited for");
    model.run(&after(&[Some(1)], &[0])).unwrap();
    refused(model.run(&first), "before the last was collected");
    // Refusals leave what is in flight as it is.
    assert_eq!(model.collect().unwrap(), [2, 3]);
    assert_eq!(model.collect().unwrap(), [4]);
    let error = model.collect().unwrap_err().to_string();
    assert!(error.contains("no step"), "{error}");
    // Logits lie where the next step puts its own.
    let mut with_logits = first.clone();
    with_logits.draws.remove(0);
    model.run(&with_logits).unwrap();
    refused(model.run(&after(&[Some(0)], &[0])), "are to be collected");
    let mut logits = Vec::new();
    model.gpu.collect(&mut logits).unwrap();
    assert_eq!(model.gpu.drawn(), [3]);
    let largest = |logits: &[f32]| (0..VOCABULARY).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    assert_eq!((logits.len(), largest(&logits)), (VOCABULARY, Some(2)));
}
