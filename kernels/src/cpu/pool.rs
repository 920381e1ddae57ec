//! [`Pool`]: the threads that compute. Pinned to cores, spinning for a moment before they sleep.
//!
//! A decode step is a few hundred operations of some ten microseconds; waking a sleeping thread costs as much. So workers spin between
//! operations and park only when nothing comes. The caller takes part as worker 0.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Looks at the clockless "is there work" word this often before parking; about 50 microseconds.
const SPINS: u32 = 4000;

/// What workers run: called with the worker's index.
type Job = *const (dyn Fn(usize) + Sync);

/// A fixed set of compute threads.
pub(crate) struct Pool {
    inner: Arc<Inner>,
    workers: Vec<JoinHandle<()>>,
}

struct Inner {
    /// Counts jobs; a worker that sees it change runs the job once.
    epoch: AtomicU32,
    /// Valid while `pending > 0`.
    job: Mutex<Option<SendJob>>,
    /// Workers that have not finished the job.
    pending: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers asleep or about to be; guarded so that a wake-up is not missed.
    sleepers: Mutex<usize>,
    wake: Condvar,
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the closure is `Sync`, and `run` keeps it alive until every worker is done with it.
unsafe impl Send for SendJob {}

impl Pool {
    /// Starts `threads - 1` workers beside the caller; `cores` pins them (index 0 is the caller's core and left to it).
    pub fn new(threads: usize, cores: &[usize]) -> Self {
        let inner = Arc::new(Inner {
            epoch: AtomicU32::new(0),
            job: Mutex::new(None),
            pending: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        });
        let mut workers = Vec::new();
        for index in 1..threads {
            let inner = Arc::clone(&inner);
            let core = cores.get(index).copied();
            // The system gives no more threads: compute with those there are.
            let Ok(worker) = std::thread::Builder::new()
                .name(format!("quire-cpu-{index}"))
                .spawn(move || {
                    if let Some(core) = core {
                        super::topology::pin(core);
                    }
                    inner.work(index);
                })
            else {
                break;
            };
            workers.push(worker);
        }
        Self { inner, workers }
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job` once on every thread, with the thread's index, and returns when all are done.
    ///
    /// # Panics
    /// When the job panicked on any thread — after all have ended.
    #[allow(clippy::transmute_ptr_to_ptr)] // an `as` cast cannot extend the closure's lifetime
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            job(0);
            return;
        }
        let inner = &*self.inner;
        // SAFETY: only the lifetime changes; the pointer is not used after this function returns, see the wait below.
        let erased: Job =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        *inner.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(SendJob(erased));
        inner.pending.store(self.workers.len(), Ordering::Relaxed);
        // Publishes the job: workers read `epoch` with Acquire.
        inner.epoch.fetch_add(1, Ordering::SeqCst);
        if *inner
            .sleepers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            > 0
        {
            inner.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| job(0)));
        let mut spins = 0;
        while inner.pending.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                // Another program has our core's neighbour: let it work.
                std::thread::yield_now();
            }
        }
        let theirs = inner.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a compute thread panicked");
    }

    /// Runs `task(i)` for every `i < tasks`, spread over the threads as they become free.
    pub fn each(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let next = AtomicUsize::new(0);
        self.run(&|_| {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                task(i);
            }
        });
    }
}

impl Inner {
    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    self.park(seen);
                }
            }
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(SendJob(job)) = job {
                // SAFETY: `run` waits for `pending` to reach 0 before the closure goes away.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(|| job(index))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.pending.fetch_sub(1, Ordering::Release);
        }
    }

    fn park(&self, seen: u32) {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        *sleepers += 1;
        // Checked under the lock that `run` takes after it changed the epoch, so one of the two sees the other.
        while self.epoch.load(Ordering::SeqCst) == seen {
            sleepers = self
                .wake
                .wait(sleepers)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *sleepers -= 1;
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::Relaxed);
        self.inner.epoch.fetch_add(1, Ordering::SeqCst);
        drop(
            self.inner
                .sleepers
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.inner.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_the_job_once() {
        let pool = Pool::new(4, &[]);
        for _ in 0..1000 {
            let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
            pool.run(&|index| {
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn every_task_is_done_once() {
        let pool = Pool::new(3, &[]);
        let done: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        pool.each(1000, &|i| {
            done[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3, &[]);
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|index| assert_ne!(index, 2));
        }));
        assert!(panicked.is_err());
        let ran = AtomicUsize::new(0);
        pool.run(&|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), 3);
    }
}
