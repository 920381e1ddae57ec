//! [`Ranks`]: a decoder on one device or a decoder on each of several, which look like one.
//!
//! The engine thread is the first rank and plans every step; the others are threads that are told the step and compute their part of it meanwhile. What
//! they exchange they exchange below the backends. With a single rank there is nothing of this: no thread, no copy of the step.

use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use flume::{Receiver, Sender};
use quire_kernels::{Backend, DeviceMemory, Draws, Error, KvDtype, Rank, Step};

use crate::checkpoint::Checkpoint;
use crate::model::{Decoder, LoadError, LoadOptions, LoadProgress};

use super::config::StartError;

/// The decoders of all ranks, loaded, without caches.
pub(super) struct Loaded<B: Backend> {
    /// Of each rank in order; never empty.
    decoders: Vec<Decoder<B>>,
}

/// The decoders of all ranks with their parts of the KV cache.
pub(super) struct Ranks<B: Backend> {
    decoder: Decoder<B>,
    kv: B::KvCache,
    followers: Vec<Follower>,
    work: Arc<RwLock<Work>>,
}

/// What the followers are to compute.
#[derive(Default)]
struct Work {
    step: Step,
    copies: Vec<(u32, u32)>,
}

/// A rank with a thread of its own. It ends when it is dropped, or with the first step that fails.
struct Follower {
    rank: usize,
    go: Sender<()>,
    done: Receiver<Result<(), Error>>,
}

impl<B: Backend> Loaded<B> {
    /// Loads every rank's part of the checkpoint, all at once.
    ///
    /// # Errors
    /// `backends` are not the ranks of one group in order, or one of them cannot load its part.
    pub fn load(
        checkpoint: &Checkpoint,
        backends: Vec<B>,
        options: LoadOptions,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, StartError> {
        let of = backends.len();
        for (index, backend) in backends.iter().enumerate() {
            let expected = Rank { index, of };
            if backend.rank() != expected {
                return Err(StartError::Backend(Error::Device(format!(
                    "{} is {:?}, expected {expected:?}",
                    backend.description(),
                    backend.rank()
                ))));
            }
        }
        let mut backends = backends.into_iter();
        let first = backends.next().ok_or_else(|| {
            StartError::Backend(Error::Device("a model on no device at all".to_owned()))
        })?;
        let decoders = thread::scope(|scope| {
            let others: Vec<_> = backends
                .map(|backend| {
                    scope.spawn(move || Decoder::load(checkpoint, backend, options, &mut |_| {}))
                })
                .collect();
            let first = Decoder::load(checkpoint, first, options, progress);
            let others = others.into_iter().map(|other| {
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            std::iter::once(first)
                .chain(others)
                .collect::<Result<Vec<_>, LoadError>>()
        })?;
        Ok(Self { decoders })
    }

    /// The first rank's; what is not divided is the same on all.
    pub fn first(&self) -> &Decoder<B> {
        &self.decoders[0]
    }

    /// Bytes of all ranks' weights.
    pub fn weight_bytes(&self) -> usize {
        self.decoders.iter().map(Decoder::weight_bytes).sum()
    }

    /// The memory of every rank's device, where devices have their own.
    ///
    /// # Errors
    /// A device failed.
    pub fn memories(&self) -> Result<Vec<DeviceMemory>, Error> {
        let memories = self.decoders.iter().map(|of| of.backend().memory());
        memories.filter_map(Result::transpose).collect()
    }

    /// One line about the devices.
    pub fn description(&self) -> String {
        let first = self.first().backend().description();
        match self.decoders.len() {
            1 => first,
            ranks => format!("{ranks} ranks: {first}"),
        }
    }

    /// Makes every rank's KV cache and starts the followers.
    ///
    /// # Errors
    /// No memory, or no thread.
    pub fn start(
        self,
        blocks: usize,
        block_size: usize,
        dtype: KvDtype,
    ) -> Result<Ranks<B>, StartError> {
        let work = Arc::new(RwLock::new(Work::default()));
        let caches = self
            .decoders
            .iter()
            .map(|decoder| decoder.kv_cache(blocks, block_size, dtype))
            .collect::<Result<Vec<_>, _>>()
            .map_err(StartError::Cache)?;
        let mut ranks = self.decoders.into_iter().zip(caches);
        let (decoder, kv) = ranks
            .next()
            .expect("`load` refuses to load on no device at all");
        let followers = ranks
            .enumerate()
            .map(|(index, (decoder, kv))| {
                Follower::start(index + 1, decoder, kv, Arc::clone(&work))
            })
            .collect::<Result<_, _>>()
            .map_err(StartError::Thread)?;
        Ok(Ranks {
            decoder,
            kv,
            followers,
            work,
        })
    }
}

impl<B: Backend> Ranks<B> {
    /// Logits of a row.
    pub fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// The first rank's device, for host work between the steps.
    pub fn backend_mut(&mut self) -> &mut B {
        self.decoder.backend_mut()
    }

    /// Which of a step's draws the devices do.
    pub fn draws(&self) -> Draws {
        self.decoder.backend().draws()
    }

    /// The tokens that a step drew: the last one, or the one that was collected last.
    pub fn drawn(&self) -> &[u32] {
        self.decoder.backend().drawn()
    }

    /// Whether steps may be deferred. Several ranks wait for each other after every step, so that none of them is ahead.
    pub fn run_ahead(&self) -> bool {
        self.draws() == Draws::All && self.followers.is_empty()
    }

    /// Whether there can be another step after one that failed. Of several ranks there is none: their caches differ.
    pub fn are_usable(&mut self) -> bool {
        self.followers.is_empty() && self.decoder.backend_mut().is_usable()
    }

    /// Waits for a deferred step; see [`Backend::collect`].
    ///
    /// # Errors
    /// As there.
    pub fn collect(&mut self, logits: &mut Vec<f32>) -> Result<(), Error> {
        self.decoder.backend_mut().collect(logits)
    }

    /// Claims a part of the KV cache's memory; see [`Backend::claim`]. With several ranks there is none.
    fn claim(&mut self, part: usize) -> usize {
        if !self.followers.is_empty() {
            return 0;
        }
        self.decoder.backend_mut().claim(&mut self.kv, part)
    }

    /// Runs a step on all ranks; see [`Decoder::forward`].
    ///
    /// # Errors
    /// As there, on any rank. Then see [`Ranks::are_usable`].
    pub fn forward(
        &mut self,
        step: &Step,
        copies: &[(u32, u32)],
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        if !self.followers.is_empty() {
            let mut work = self.work.write().unwrap_or_else(PoisonError::into_inner);
            work.step.clone_from(step);
            work.copies.clear();
            work.copies.extend_from_slice(copies);
        }
        for follower in &self.followers {
            follower.go.send(()).map_err(|_| follower.ended())?;
        }
        let mut result = self.decoder.forward(step, copies, &mut self.kv, logits);
        if result.is_err() && !self.followers.is_empty() {
            // The followers may be waiting for what will not come.
            self.decoder.backend_mut().leave();
        }
        for follower in &self.followers {
            let theirs = follower.done.recv().map_err(|_| follower.ended());
            result = result.and(theirs.and_then(|done| done));
        }
        result
    }
}

/// What of the KV cache's memory is still to be claimed from the system.
pub(super) struct Unclaimed {
    part: usize,
    bytes: u64,
}

impl Unclaimed {
    /// So many bytes of it.
    pub fn new(bytes: u64) -> Self {
        Self { part: 0, bytes }
    }

    /// Claims a little, a few milliseconds' work; false: there is nothing to claim any more.
    pub fn claim<B: Backend>(&mut self, ranks: &mut Ranks<B>) -> bool {
        if self.bytes > 0 {
            match ranks.claim(self.part) as u64 {
                0 => self.bytes = 0,
                claimed => self.bytes = self.bytes.saturating_sub(claimed),
            }
            self.part += 1;
        }
        self.bytes > 0
    }
}

impl Follower {
    fn start<B: Backend>(
        rank: usize,
        mut decoder: Decoder<B>,
        mut kv: B::KvCache,
        work: Arc<RwLock<Work>>,
    ) -> std::io::Result<Self> {
        let (go, told) = flume::bounded::<()>(1);
        let (tell, done) = flume::bounded(1);
        thread::Builder::new()
            .name(format!("quire-rank-{rank}"))
            .spawn(move || {
                let mut logits = Vec::new();
                while told.recv().is_ok() {
                    let work = work.read().unwrap_or_else(PoisonError::into_inner);
                    let result = decoder.forward(&work.step, &work.copies, &mut kv, &mut logits);
                    drop(work);
                    let failed = result.is_err();
                    if failed {
                        decoder.backend_mut().leave();
                    }
                    if tell.send(result).is_err() || failed {
                        break;
                    }
                }
            })?;
        Ok(Self { rank, go, done })
    }

    fn ended(&self) -> Error {
        Error::Device(format!("rank {} has ended after a failure", self.rank))
    }
}

#[cfg(test)]
mod tests {
    use quire_kernels::cpu::{CpuBackend, CpuOptions};
    use quire_kernels::{InProcess, Span};

    use super::*;
    use crate::checkpoint::ModelSource;

    const BLOCK: usize = 16;

    fn cpus(of: usize) -> Vec<CpuBackend> {
        let options = CpuOptions {
            threads: Some(1),
            pin: false,
            ..CpuOptions::default()
        };
        InProcess::group(of)
            .into_iter()
            .map(|rank| CpuBackend::of_rank(options, Box::new(rank)).expect("it has a thread"))
            .collect()
    }

    fn demo_on<B: Backend>(backends: Vec<B>) -> Ranks<B> {
        let of = backends.len();
        let checkpoint = Checkpoint::open(&ModelSource::Demo).expect("it is part of the binary");
        let options = LoadOptions {
            quantize: None,
            max_rows: 4,
        };
        let loaded = Loaded::load(&checkpoint, backends, options, &mut |_| {});
        let loaded = loaded.expect("three query heads");
        assert!(loaded.description().contains(&format!("{of} ranks")));
        loaded
            .start(4, BLOCK, KvDtype::F32)
            .expect("a small cache and a thread")
    }

    fn step(token: u32) -> Step {
        Step {
            tokens: vec![token],
            positions: vec![0],
            spans: vec![Span {
                row: 0,
                rows: 1,
                start: 0,
                table: 0,
                beyond: false,
            }],
            block_tables: vec![0],
            logit_rows: vec![0],
            ..Step::default()
        }
    }

    fn fails_and_hangs_nobody<B: Backend>(mut ranks: Ranks<B>) {
        let mut logits = Vec::new();
        ranks
            .forward(&step(3), &[], &mut logits)
            .expect("a token of the vocabulary");
        assert_eq!(logits.len(), ranks.vocab_size());
        let outside = step(u32::MAX);
        assert!(ranks.forward(&outside, &[], &mut logits).is_err());
        let error = ranks.forward(&step(3), &[], &mut logits);
        let error = error.expect_err("the followers have ended").to_string();
        assert!(error.contains("rank"), "{error}");
    }

    /// One rank's work fails in the middle of a step, while the other waits for its part.
    fn one_fails_and_the_other_is_told<B: Backend>(mut ranks: Ranks<B>) {
        let mut logits = Vec::new();
        ranks
            .forward(&step(3), &[], &mut logits)
            .expect("a token of the vocabulary");
        ranks.decoder.backend_mut().leave();
        let error = ranks.forward(&step(3), &[], &mut logits);
        let error = error.expect_err("the first rank has left").to_string();
        assert!(error.contains("rank 0 of 2 has left"), "{error}");
        assert!(ranks.forward(&step(3), &[], &mut logits).is_err());
    }

    #[test]
    fn a_step_that_fails_ends_the_ranks_and_hangs_nobody() {
        fails_and_hangs_nobody(demo_on(cpus(2)));
        one_fails_and_the_other_is_told(demo_on(cpus(2)));
    }

    #[cfg(feature = "cuda-emulation")]
    #[test]
    fn a_step_that_fails_ends_the_gpus_and_hangs_nobody() {
        use quire_kernels::cuda::{CudaBackend, CudaOptions};

        let gpus =
            || CudaBackend::emulated_group(CudaOptions::default(), 2).expect("there is memory");
        fails_and_hangs_nobody(demo_on(gpus()));
        one_fails_and_the_other_is_told(demo_on(gpus()));
    }
}
