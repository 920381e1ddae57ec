//! What ranks in one process exchange, each a thread: sums of a step's rows after every projection back into the residual stream, and logits.

use criterion::{Criterion, Throughput};
use quire_kernels::{Collective, Error, InProcess};

use crate::roofline::{Need, Roofline};

const HIDDEN: usize = 1024;
const VOCABULARY: usize = 151_936;

pub fn benches(c: &mut Criterion, roofline: &Roofline) {
    // More ranks than threads would only wait for each other's turn.
    for of in [2, 4, 8].into_iter().filter(|&of| of <= roofline.threads()) {
        all_reduce(c, roofline, of);
        all_gather(c, roofline, of);
    }
}

fn all_reduce(c: &mut Criterion, roofline: &Roofline, of: usize) {
    let mut group = c.benchmark_group(format!("all_reduce of {HIDDEN}, {of} ranks"));
    for rows in [1, 32, 512] {
        let len = rows * HIDDEN;
        // Every rank's part is read, and becomes the sum.
        let bytes = of * len * 2 * size_of::<f32>();
        group.throughput(Throughput::Bytes(bytes as u64));
        let need = Need {
            bytes: bytes as f64,
            f32: ((of - 1) * len) as f64,
            products: None,
        };
        let memory = || vec![0.0; len];
        let reduce = |rank: &mut InProcess, x: &mut Vec<f32>| rank.all_reduce(x);
        together(of, memory, reduce, |exchange| {
            roofline.bench(&mut group, rows, need, exchange);
        });
    }
    group.finish();
}

fn all_gather(c: &mut Criterion, roofline: &Roofline, of: usize) {
    let mut group = c.benchmark_group(format!("all_gather of {VOCABULARY}, {of} ranks"));
    for rows in [1, 32] {
        let own = VOCABULARY / of * rows;
        // Every rank's part is read, and all are written for each.
        let bytes = (of + of * of) * own * size_of::<f32>();
        group.throughput(Throughput::Bytes(bytes as u64));
        let need = Need {
            bytes: bytes as f64,
            ..Need::default()
        };
        let memory = || (vec![0.0; own], vec![0.0; of * own]);
        let gather = |rank: &mut InProcess, x: &mut (Vec<f32>, Vec<f32>)| {
            let (own, all) = x;
            rank.all_gather(own, all)
        };
        together(of, memory, gather, |exchange| {
            roofline.bench(&mut group, rows, need, exchange);
        });
    }
    group.finish();
}

/// Has `bench` time the first rank's part of `exchange`, in which the others take part as often as it does.
fn together<T>(
    of: usize,
    memory: impl Fn() -> T + Sync,
    exchange: impl Fn(&mut InProcess, &mut T) -> Result<(), Error> + Sync,
    bench: impl FnOnce(&mut dyn FnMut()),
) {
    std::thread::scope(|scope| {
        let mut ranks = InProcess::group(of).into_iter();
        let mut first = ranks.next().expect("there are several");
        for mut rank in ranks {
            let (memory, exchange) = (&memory, &exchange);
            scope.spawn(move || {
                let mut own = memory();
                // Until the first one leaves.
                while exchange(&mut rank, &mut own).is_ok() {}
            });
        }
        let mut own = memory();
        bench(&mut || exchange(&mut first, &mut own).expect("all are there"));
    });
}
