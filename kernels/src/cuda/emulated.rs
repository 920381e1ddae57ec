//! [`Emulated`]: the kernels compiled as C++ and run on this processor, thread by thread; see `cuda-emulation/emulation.h`.
//!
//! It proves indices, masks, fragment layouts and barriers, slowly. Every allocation ends at a page that cannot be touched, and is poisoned
//! with NaN: what reads beyond its end or before it was written does not go unnoticed.
//!
//! It is as late as a GPU may be: what need not be done when a call returns is done when somebody waits for it. So a result that is taken too early is
//! poison, and a step sees what its memory was overwritten with too early. What may be done at once, beside the step that runs, is done at once, too.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::backend::{CudaBackend, CudaOptions};
use super::device::{Dense, DenseShape, Device, Exchange, Launch, Operand, Work, alignment};
use super::flights::FLIGHTS;
use super::params::Pointer;
use crate::{Collective, Error, InProcess, Rank};

/// A page of memory, and the alignment of what CUDA allocates.
const PAGE: usize = 4096;
const ALIGNMENT: usize = 256;
/// What the emulated GPU says it has.
const TOTAL: u64 = 1 << 30;
/// What a block may have of shared memory on the smallest GPUs there are machine code for.
const SHARED: u32 = 99 << 10;
/// Bytes of a NaN, as bf16, f16 or f32.
const POISON: u8 = 0xff;

unsafe extern "C" {
    fn quire_emulated_kernel(
        name: *const std::ffi::c_char,
        size: *mut usize,
        threads: *mut i32,
    ) -> *const c_void;
    fn quire_emulated_launch(
        kernel: *const c_void,
        x: i32,
        y: i32,
        threads: i32,
        shared: usize,
        params: *const c_void,
    );
}

impl CudaBackend {
    /// A backend whose GPU is emulated by this processor, for tests.
    ///
    /// # Errors
    /// No memory.
    pub fn emulated(options: CudaOptions) -> Result<Self, Error> {
        Self::emulated_under(options, Watch::default())
    }

    /// As [`CudaBackend::emulated`], watched.
    ///
    /// # Errors
    /// No memory.
    pub fn emulated_under(options: CudaOptions, watch: Watch) -> Result<Self, Error> {
        let device = Emulated {
            watch,
            ..Emulated::default()
        };
        Self::on(Arc::new(device), options.deterministic)
    }

    /// The ranks of a group of emulated GPUs, in order, which add up in that order. Each is for a thread of its own.
    ///
    /// # Errors
    /// No memory.
    pub fn emulated_group(options: CudaOptions, of: usize) -> Result<Vec<Self>, Error> {
        let ranks = InProcess::group(of).into_iter();
        ranks
            .map(|ties| {
                let device = Emulated {
                    rank: ties.rank(),
                    ties: Mutex::new(Some(ties)),
                    ..Emulated::default()
                };
                Self::on(Arc::new(device), options.deterministic)
            })
            .collect()
    }
}

/// What happened to a step; they are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It was handed to the device.
    Launched(usize),
    /// The host waited until it was done.
    Waited(usize),
}

/// What a test sees of an emulated GPU, and does to it.
#[derive(Debug, Clone, Default)]
pub struct Watch(Arc<Mutex<Watched>>);

#[derive(Debug, Default)]
struct Watched {
    moments: Vec<Moment>,
    launched: usize,
    /// The last step of each mark.
    marked: [usize; FLIGHTS],
    /// The step that is to fail, and how one has.
    fails: Option<usize>,
    failed: Option<String>,
    /// Whether there is a library for products.
    library: bool,
    /// Whether its memory is full.
    full: bool,
}

impl Watch {
    /// What has happened so far, in order.
    pub fn moments(&self) -> Vec<Moment> {
        self.lock().moments.clone()
    }

    /// Gives it a library for dense products, without which its own kernels multiply everything, as on a GPU without cuBLASLt.
    #[must_use]
    pub fn with_library(self) -> Self {
        self.lock().library = true;
        self
    }

    /// Lets the step that is launched after `more` others fail, and with it everything that comes later, as a fault in a kernel does.
    pub fn fail_after(&self, more: usize) {
        let mut watched = self.lock();
        watched.fails = Some(watched.launched + more);
    }

    /// Lets it have no memory left to give, or some again.
    pub fn fill_memory(&self, full: bool) {
        self.lock().full = full;
    }

    /// The step that is being launched, under a mark.
    fn launch(&self, mark: usize) -> usize {
        let mut watched = self.lock();
        let step = watched.launched;
        watched.launched += 1;
        watched.marked[mark] = step;
        watched.moments.push(Moment::Launched(step));
        step
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was asked for and is not done yet.
enum Later {
    /// To, from, bytes.
    Copy(Pointer, Pointer, usize),
    Run(Vec<Work>),
    /// The end of a step.
    End(usize),
}

struct Emulated {
    /// Begins and lengths of the mappings by what was given out.
    mappings: Mutex<HashMap<Pointer, (usize, usize)>>,
    queue: Mutex<VecDeque<Later>>,
    watch: Watch,
    rank: Rank,
    /// To the other ranks, where there are any.
    ties: Mutex<Option<InProcess>>,
}

impl Default for Emulated {
    fn default() -> Self {
        Self {
            mappings: Mutex::default(),
            queue: Mutex::default(),
            watch: Watch::default(),
            rank: Rank::ALONE,
            ties: Mutex::default(),
        }
    }
}

/// Copies parts of allocations: see `Buffer` and `HostBuffer`.
fn copy(to: Pointer, from: Pointer, bytes: usize) {
    if bytes > 0 {
        // SAFETY: as above.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
    }
}

/// What the vendor's library would do.
fn multiply(dense: &Dense) -> Result<(), Error> {
    let shape = dense.shape;
    let aligned = [dense.w, dense.x, dense.out].map(alignment);
    if aligned
        .iter()
        .zip(shape.alignments)
        .any(|(&is, said)| is < said)
    {
        return Err(Error::Device(format!(
            "{dense:?}: aligned to {aligned:?} bytes"
        )));
    }
    let value = |bits: u16| match shape.operand {
        Operand::Bf16 => half::bf16::from_bits(bits).to_f32(),
        Operand::F16 => half::f16::from_bits(bits).to_f32(),
    };
    let (rows, features, cols) = (
        shape.rows as usize,
        shape.features as usize,
        shape.cols as usize,
    );
    let row = |at: Pointer, row: usize, stride: usize| {
        // SAFETY: parts of allocations (see `Buffer`), or the host is wrong, which the pages around allocations are there to show.
        unsafe { std::slice::from_raw_parts((at as *const u16).add(row * stride), cols) }
    };
    for r in 0..rows {
        let x: Vec<f32> = row(dense.x, r, shape.x_stride as usize)
            .iter()
            .map(|&bits| value(bits))
            .collect();
        for f in 0..features {
            let w = row(dense.w, f, cols).iter().map(|&bits| value(bits));
            let sum: f32 = x.iter().zip(w).map(|(x, w)| x * w).sum();
            // SAFETY: as above.
            unsafe {
                let out = (dense.out as *mut f32).add(r * shape.out_stride as usize + f);
                *out = if shape.add { *out + sum } else { sum };
            }
        }
    }
    Ok(())
}

/// A kernel's entry, what its parameters occupy, and its block size.
fn kernel(name: &'static str) -> Result<(*const c_void, usize, i32), Error> {
    let missing = || Error::Device(format!("there is no kernel {name}"));
    let text = CString::new(name).map_err(|_| missing())?;
    let (mut size, mut threads) = (0, 0);
    // SAFETY: a string and two places to write to, all alive.
    let entry = unsafe { quire_emulated_kernel(text.as_ptr(), &raw mut size, &raw mut threads) };
    if entry.is_null() {
        Err(missing())
    } else {
        Ok((entry, size, threads))
    }
}

impl Emulated {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Later>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what was asked for: up to the end of a step, or all of it. After an error, nothing.
    fn catch_up(&self, to: Option<usize>) -> Result<(), Error> {
        if let Some(error) = &self.watch.lock().failed {
            return Err(Error::Device(error.clone()));
        }
        let done = self.work_off(to);
        if let Err(error) = &done {
            self.watch.lock().failed = Some(error.to_string());
        }
        done
    }

    fn work_off(&self, to: Option<usize>) -> Result<(), Error> {
        let mut queue = self.queue();
        let reached = |later: &Later| matches!(later, Later::End(step) if Some(*step) == to);
        if to.is_some() && !queue.iter().any(reached) {
            return Ok(());
        }
        while let Some(later) = queue.pop_front() {
            let end = reached(&later);
            match later {
                Later::Copy(to, from, bytes) => copy(to, from, bytes),
                Later::Run(list) => self.run_now(&list)?,
                Later::End(step) if self.watch.lock().fails == Some(step) => {
                    let text = "the emulated GPU was to fail";
                    return Err(Error::Device(text.to_owned()));
                }
                Later::End(_) => {}
            }
            if end {
                break;
            }
        }
        Ok(())
    }

    fn run_now(&self, list: &[Work]) -> Result<(), Error> {
        for work in list {
            match work {
                Work::Launch(launch) => Self::launch(launch)?,
                Work::Dense(dense) => multiply(dense)?,
                &Work::AllReduce(Exchange { at, count }) => {
                    self.exchange(at, count, InProcess::all_reduce)?;
                }
                &Work::AllGather(Exchange { at, count }) => {
                    self.exchange(at, count * self.rank.of, |ties, all| {
                        let own = all[count * self.rank.index..][..count].to_vec();
                        ties.all_gather(&own, all)
                    })?;
                }
            }
        }
        Ok(())
    }

    fn launch(launch: &Launch) -> Result<(), Error> {
        let (entry, size, threads) = kernel(launch.kernel)?;
        if size != launch.params().len() {
            return Err(Error::Device(format!(
                "{} takes {size} bytes of parameters, not {}",
                launch.kernel,
                launch.params().len()
            )));
        }
        if launch.threads != threads as u32 || launch.grid.1 > 65_535 {
            return Err(Error::Device(format!(
                "{} is made for blocks of {threads}, not for {launch:?}",
                launch.kernel
            )));
        }
        if launch.shared > SHARED {
            return Err(Error::Device(format!(
                "{} wants {} bytes of shared memory, there are {SHARED}",
                launch.kernel, launch.shared
            )));
        }
        // The parameters, at an address that is aligned for them.
        let mut params = vec![0_u64; size.div_ceil(8)];
        for (word, bytes) in params.iter_mut().zip(launch.params().chunks(8)) {
            let mut all = [0; 8];
            all[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(all);
        }
        // SAFETY: the entry came from the table; the parameters have the size it takes and name memory that is alive — or the kernel is wrong,
        // which the pages around allocations are there to show.
        unsafe {
            quire_emulated_launch(
                entry,
                launch.grid.0 as i32,
                launch.grid.1 as i32,
                threads,
                launch.shared as usize,
                params.as_ptr().cast(),
            );
        }
        Ok(())
    }
}

impl Emulated {
    /// Has the other ranks take part in an exchange of `len` numbers.
    fn exchange(
        &self,
        at: Pointer,
        len: usize,
        exchange: impl FnOnce(&mut InProcess, &mut [f32]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut ties = self.ties.lock().unwrap_or_else(PoisonError::into_inner);
        let ties = ties.as_mut().ok_or_else(|| {
            Error::Device("an exchange on a GPU that is one of no ranks".to_owned())
        })?;
        // SAFETY: a part of an allocation (see `Buffer`), which nothing else touches while a list runs.
        exchange(ties, unsafe {
            std::slice::from_raw_parts_mut(at as *mut f32, len)
        })
    }
}

impl Device for Emulated {
    fn description(&self) -> String {
        "emulated GPU".to_owned()
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        let mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        let used: usize = mappings.values().map(|mapping| mapping.1).sum();
        Ok((TOTAL.saturating_sub(used as u64), TOTAL))
    }

    fn allocate(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error> {
        let out_of_memory = Error::OutOfMemory { what, bytes };
        if self.watch.lock().full {
            return Err(out_of_memory);
        }
        let used = bytes.next_multiple_of(PAGE);
        // SAFETY: a new mapping somewhere.
        let begin = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                used + PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if begin == libc::MAP_FAILED {
            return Err(out_of_memory);
        }
        // SAFETY: inside the mapping, whose last page nobody shall touch.
        unsafe {
            libc::mprotect(begin.byte_add(used), PAGE, libc::PROT_NONE);
            begin.cast::<u8>().write_bytes(POISON, used);
        }
        // As near to that page as the alignment allows.
        let at = begin as usize + (used - bytes) / ALIGNMENT * ALIGNMENT;
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        mappings.insert(at as Pointer, (begin as usize, used + PAGE));
        Ok(at as Pointer)
    }

    fn free(&self, at: Pointer, _bytes: usize) {
        // As the driver does. That it fails is told to those who wait.
        let _ = self.catch_up(None);
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((begin, len)) = mappings.remove(&at) {
            // SAFETY: a mapping of ours that nothing names any more.
            unsafe { libc::munmap(begin as *mut c_void, len) };
        }
    }

    fn zero(&self, at: Pointer, bytes: usize) -> Result<(), Error> {
        self.catch_up(None)?;
        // SAFETY: a part of an allocation: see `Buffer`.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    fn upload(&self, to: Pointer, from: &[u8]) -> Result<(), Error> {
        self.catch_up(None)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), Error> {
        self.catch_up(None)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        self.queue().push_back(Later::Copy(to, from, bytes));
        Ok(())
    }

    fn allocate_host(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error> {
        self.allocate(bytes, what)
    }

    fn free_host(&self, at: Pointer, bytes: usize) {
        self.free(at, bytes);
    }

    fn upload_beside(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        // At once and again at the last moment: either may be when a GPU does it.
        copy(to, from, bytes);
        self.queue().push_back(Later::Copy(to, from, bytes));
        Ok(())
    }

    fn upload_later(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        self.queue().push_back(Later::Copy(to, from, bytes));
        Ok(())
    }

    fn download_later(&self, from: Pointer, to: Pointer, bytes: usize) -> Result<(), Error> {
        if bytes > 0 {
            // SAFETY: as above.
            unsafe { (to as *mut u8).write_bytes(POISON, bytes) };
            self.queue().push_back(Later::Copy(to, from, bytes));
        }
        Ok(())
    }

    fn mark(&self, mark: usize) -> Result<(), Error> {
        let step = self.watch.launch(mark);
        self.queue().push_back(Later::End(step));
        Ok(())
    }

    fn wait(&self, mark: usize) -> Result<(), Error> {
        let step = self.watch.lock().marked[mark];
        self.catch_up(Some(step))?;
        self.watch.lock().moments.push(Moment::Waited(step));
        Ok(())
    }

    fn synchronise(&self) -> Result<(), Error> {
        self.catch_up(None)
    }

    fn run(&self, list: &[Work], _again: bool) -> Result<(), Error> {
        self.queue().push_back(Later::Run(list.to_vec()));
        Ok(())
    }

    fn supports(&self, shape: DenseShape) -> bool {
        // As some algorithms want it.
        self.watch.lock().library && shape.alignments.iter().all(|&bytes| bytes >= 16)
    }

    fn rank(&self) -> Rank {
        self.rank
    }

    fn leave(&self) {
        let mut ties = self.ties.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ties) = ties.as_mut() {
            ties.leave();
        }
    }
}
