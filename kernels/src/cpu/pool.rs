//! [`Pool`]: the threads that compute, a team for each NUMA node. Pinned to cores, spinning for a moment before they sleep.
//!
//! A decode step is a few hundred operations of some ten microseconds; waking a sleeping thread costs as much. So workers spin between
//! operations and park only when nothing comes. The caller takes part as thread 0, in the first team.
//!
//! What lies in a node's memory is worked on by its team: [`Pool::at_home`] and [`Pool::near`] hand out tasks by node. What every team needs of an
//! operation — the job, who has finished it, the next task — is on cache lines of its own, so that many cores do not wait for one line.

use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::topology::{Placement, Visit, pin, proportion};

/// Looks at the clockless "is there work" word this often before parking; about 50 microseconds.
const SPINS: u32 = 4000;

/// What workers run: called with the worker's index.
type Job = *const (dyn Fn(usize) + Sync);

/// A fixed set of compute threads.
pub(crate) struct Pool {
    inner: Arc<Inner>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: there is one at a time.
    turn: Mutex<()>,
    /// The first team's CPUs, where threads are pinned and there are several teams.
    home: Vec<usize>,
}

struct Inner {
    teams: Vec<Team>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers asleep or about to be; guarded so that a wake-up is not missed.
    sleepers: Mutex<usize>,
    wake: Condvar,
}

/// The threads of a node.
struct Team {
    /// The indices of its threads.
    threads: Range<usize>,
    start: Line<Start>,
    /// Workers that have not finished the job.
    pending: Line<AtomicUsize>,
    /// The next of the node's tasks.
    next: Line<AtomicUsize>,
}

/// What a team's workers wait for.
struct Start {
    /// Counts jobs; a worker that sees it change runs the job once.
    epoch: AtomicU32,
    /// Written while no worker runs, read after `epoch` changed; valid while a team has workers pending.
    job: UnsafeCell<Option<SendJob>>,
}

// SAFETY: `job` is written by the thread that holds the pool's turn, while every worker waits for `epoch`; see `Pool::start`.
unsafe impl Sync for Start {}

/// Alone on its cache lines. (Processors fetch them in pairs.)
#[repr(align(128))]
struct Line<T>(T);

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the closure is `Sync`, and `run` keeps it alive until every worker is done with it.
unsafe impl Send for SendJob {}

/// A task that a thread has taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turn {
    /// Who took it.
    pub thread: usize,
    /// The node it belongs to.
    pub node: usize,
    /// Which of the node's tasks it is.
    pub task: usize,
}

thread_local! {
    /// The pool at whose home this thread stays.
    static SETTLED: Cell<usize> = const { Cell::new(0) };
}

impl Pool {
    /// Starts the threads but one, which the caller is.
    pub fn new(placement: &Placement) -> Self {
        let mut first = 0;
        let mut teams: Vec<Range<usize>> = Vec::new();
        for team in &placement.teams {
            teams.push(first..first + team.threads);
            first += team.threads;
        }
        let team = |threads: Range<usize>| Team {
            threads,
            start: Line(Start {
                epoch: AtomicU32::new(0),
                job: UnsafeCell::new(None),
            }),
            pending: Line(AtomicUsize::new(0)),
            next: Line(AtomicUsize::new(0)),
        };
        let inner = Inner {
            teams: teams.into_iter().map(team).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        };
        let mut pool = Self {
            inner: Arc::new(inner),
            workers: Vec::new(),
            turn: Mutex::new(()),
            home: match &placement.teams[..] {
                [first, _, ..] => first.node.clone(),
                _ => Vec::new(),
            },
        };
        if pool.spawn(placement).is_err() {
            // The system gives no more threads: compute with as many as there were. Which nodes they are on does not matter any more.
            let started = pool.workers.len() + 1;
            drop(pool);
            return Self::new(&Placement::unpinned(&[started]));
        }
        pool
    }

    fn spawn(&mut self, placement: &Placement) -> std::io::Result<()> {
        for (node, team) in placement.teams.iter().enumerate() {
            for (nth, index) in self.inner.teams[node].threads.clone().enumerate() {
                if index == 0 {
                    continue;
                }
                let inner = Arc::clone(&self.inner);
                let cpus = match team.cpus.get(nth) {
                    Some(&cpu) => vec![cpu],
                    None => team.node.clone(),
                };
                let worker = std::thread::Builder::new()
                    .name(format!("quire-cpu-{index}"))
                    .spawn(move || {
                        if !cpus.is_empty() {
                            pin(&cpus);
                        }
                        inner.work(node, index);
                    })?;
                self.workers.push(worker);
            }
        }
        Ok(())
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// NUMA nodes with threads; tasks belong to one of them.
    pub fn nodes(&self) -> usize {
        self.inner.teams.len()
    }

    /// The share of a node of `items` in order, in proportion to its threads.
    pub fn share(&self, items: usize, node: usize) -> Range<usize> {
        let threads = &self.inner.teams[node].threads;
        let begins = |thread| proportion(items, thread, self.threads());
        begins(threads.start)..begins(threads.end)
    }

    /// Keeps the calling thread on the first node, whose thread it is while a job runs. For good: it is the thread that runs the steps.
    pub fn settle(&self) {
        let this = Arc::as_ptr(&self.inner) as usize;
        if !self.home.is_empty() && SETTLED.replace(this) != this {
            pin(&self.home);
        }
    }

    /// Keeps the calling thread on the first node until the guard is dropped.
    pub fn visit(&self) -> Visit {
        Visit::to(&self.home)
    }

    /// Runs `job` once on every thread, with the thread's index, and returns when all are done.
    ///
    /// # Panics
    /// When the job panicked on any thread — after all have ended.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            job(0);
            return;
        }
        self.run_alone(&self.turn(), job);
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Pool::run`] for who has the turn.
    fn run_alone(&self, _turn: &MutexGuard<'_, ()>, job: &(dyn Fn(usize) + Sync)) {
        let inner = &*self.inner;
        // SAFETY: this function returns when every worker is done with `job`.
        unsafe { self.start(job) };
        if *inner
            .sleepers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            > 0
        {
            inner.wake.notify_all();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| job(0)));
        for team in &inner.teams {
            let mut spins = 0;
            while team.pending.0.load(Ordering::Acquire) > 0 {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    // Another program has our core's neighbour: let it work.
                    std::thread::yield_now();
                }
            }
        }
        let theirs = inner.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a compute thread panicked");
    }

    /// Hands `job` to every worker.
    ///
    /// # Safety
    /// The caller has the turn, and keeps `job` alive until no team has workers pending.
    #[allow(clippy::transmute_ptr_to_ptr)] // an `as` cast cannot extend the closure's lifetime
    unsafe fn start(&self, job: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; the caller keeps the closure alive while it is used.
        let erased: Job =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        for team in &self.inner.teams {
            let workers = team.threads.len() - usize::from(team.threads.start == 0);
            // SAFETY: the team's workers have finished the job before, which `run_alone` saw, and wait for the epoch to change.
            unsafe { *team.start.0.job.get() = Some(SendJob(erased)) };
            team.pending.0.store(workers, Ordering::Relaxed);
            // Publishes the job: workers read `epoch` with Acquire.
            team.start.0.epoch.fetch_add(1, Ordering::SeqCst);
        }
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

    /// Runs `tasks(node)` tasks of every node on the node's own threads, as they become free: for what is written there first, and so put there.
    pub fn at_home(&self, tasks: &(dyn Fn(usize) -> usize + Sync), task: &(dyn Fn(Turn) + Sync)) {
        self.by_node(false, tasks, task);
    }

    /// Runs `tasks(node)` tasks of every node, each thread those of its own node first; who has none left helps the others.
    pub fn near(&self, tasks: &(dyn Fn(usize) -> usize + Sync), task: &(dyn Fn(Turn) + Sync)) {
        self.by_node(true, tasks, task);
    }

    fn by_node(
        &self,
        help: bool,
        tasks: &(dyn Fn(usize) -> usize + Sync),
        task: &(dyn Fn(Turn) + Sync),
    ) {
        let nodes = self.nodes();
        let total: usize = (0..nodes).map(tasks).sum();
        // A single task is done at once by the caller, if it may.
        if self.workers.is_empty() || total <= 1 && (help || total == tasks(0)) {
            for node in 0..nodes {
                for i in 0..tasks(node) {
                    let turn = Turn {
                        thread: 0,
                        node,
                        task: i,
                    };
                    task(turn);
                }
            }
            return;
        }
        let turn = self.turn();
        for team in &self.inner.teams {
            team.next.0.store(0, Ordering::Relaxed);
        }
        self.run_alone(&turn, &|thread| {
            let teams = &self.inner.teams;
            let home = teams.partition_point(|team| team.threads.end <= thread);
            let reach = if help { nodes } else { 1 };
            for node in (home..home + reach).map(|node| node % nodes) {
                let (next, tasks) = (&teams[node].next.0, tasks(node));
                // Looks first: who comes when all is done leaves the line to others.
                while next.load(Ordering::Relaxed) < tasks {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i < tasks {
                        let turn = Turn {
                            thread,
                            node,
                            task: i,
                        };
                        task(turn);
                    }
                }
            }
        });
    }
}

impl Placement {
    /// Teams of so many threads each, anywhere.
    pub fn unpinned(threads: &[usize]) -> Self {
        let team = |&threads: &usize| super::topology::Team {
            threads,
            cpus: Vec::new(),
            node: Vec::new(),
        };
        Self {
            teams: threads.iter().map(team).collect(),
        }
    }
}

impl Inner {
    fn work(&self, node: usize, index: usize) {
        let team = &self.teams[node];
        let start = &team.start.0;
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while start.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                } else {
                    self.park(&start.epoch, seen);
                }
            }
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            // SAFETY: written before the epoch changed, and not again before this worker is no longer pending.
            let job = unsafe { *start.job.get() };
            if let Some(SendJob(job)) = job {
                // SAFETY: `run_alone` waits for `pending` to reach 0 before the closure goes away.
                let job = unsafe { &*job };
                if catch_unwind(AssertUnwindSafe(|| job(index))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            team.pending.0.fetch_sub(1, Ordering::Release);
        }
    }

    fn park(&self, epoch: &AtomicU32, seen: u32) {
        let mut sleepers = self.sleepers.lock().unwrap_or_else(PoisonError::into_inner);
        *sleepers += 1;
        // Checked under the lock that `run` takes after it changed the epoch, so one of the two sees the other.
        while epoch.load(Ordering::SeqCst) == seen {
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
        for team in &self.inner.teams {
            team.start.0.epoch.fetch_add(1, Ordering::SeqCst);
        }
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

    fn pool(teams: &[usize]) -> Pool {
        Pool::new(&Placement::unpinned(teams))
    }

    #[test]
    fn every_thread_runs_the_job_once() {
        for teams in [&[4][..], &[2, 2], &[1, 1, 2]] {
            let pool = pool(teams);
            for _ in 0..1000 {
                let counts: Vec<AtomicUsize> = (0..4).map(|_| AtomicUsize::new(0)).collect();
                pool.run(&|index| {
                    counts[index].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn every_task_is_done_once() {
        let pool = pool(&[3]);
        let done: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        pool.each(1000, &|i| {
            done[i].fetch_add(1, Ordering::Relaxed);
        });
        assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_task_of_every_node_is_done_once_and_at_home_by_its_own_threads() {
        for teams in [&[1][..], &[3], &[1, 1], &[2, 1], &[1, 2, 1]] {
            let pool = pool(teams);
            let of_node = |node: usize| [100, 0, 1][(node + teams.len()) % 3];
            for help in [true, false] {
                for _ in 0..100 {
                    let done: Vec<AtomicUsize> = (0..300).map(|_| AtomicUsize::new(0)).collect();
                    pool.by_node(help, &of_node, &|turn| {
                        assert!(turn.task < of_node(turn.node));
                        done[turn.node * 100 + turn.task].fetch_add(1, Ordering::Relaxed);
                        let own = pool.inner.teams[turn.node].threads.contains(&turn.thread);
                        assert!(own || help);
                    });
                    for node in 0..3 {
                        for task in 0..100 {
                            let expected = node < teams.len() && task < of_node(node);
                            let times = done[node * 100 + task].load(Ordering::Relaxed);
                            assert_eq!(times, usize::from(expected));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn shares_are_in_proportion_to_threads_and_leave_nothing_out() {
        for teams in [&[1][..], &[2, 2], &[3, 1], &[1, 2, 4]] {
            let pool = pool(teams);
            for items in 0..40 {
                let mut next = 0;
                for (node, threads) in teams.iter().enumerate() {
                    let share = pool.share(items, node);
                    assert_eq!(share.start, next);
                    let exact = items as f64 * *threads as f64 / pool.threads() as f64;
                    assert!((share.len() as f64 - exact).abs() < 1.0);
                    next = share.end;
                }
                assert_eq!(next, items);
            }
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        for teams in [&[3][..], &[1, 2]] {
            let pool = pool(teams);
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

    #[test]
    fn callers_take_turns() {
        let pool = pool(&[2, 1]);
        let ran = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.near(&|_| 5, &|_| {
                            ran.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(ran.load(Ordering::Relaxed), 4 * 200 * 2 * 5);
    }
}
