//! [`Ties`]: a GPU's communicator among the ranks of a group, and [`CudaBackend::group`], which makes one for each of this machine's GPUs.
//!
//! NCCL is opened when several GPUs are asked for, and at no other time. Of its functions there are eight here and not a crate's bindings, because those look
//! for `libnccl.so`, which comes with the headers; what an installation has is `libnccl.so.2`.
//!
//! Communicators do not block: a call that would wait for other ranks returns, and is waited for here, as the stream is, with an eye on the group. Whoever sees
//! that a rank has left aborts its own communicator, in its own thread, which ends what its GPU still waits for.
//!
//! **Invariant:** graphs that exchange are destroyed before their communicator is: it waits for them.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUresult};

use super::backend::{CudaBackend, CudaOptions};
use super::device::Exchange;
use super::driver::Driver;
use super::group::Group;
use super::machine::gpus;
use crate::{Error, Rank};

/// What NCCL's library is called: its major version is its ABI's.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version whose communicators need not block.
const OLDEST: c_int = version(2, 14, 0);
/// GPUs that have not found each other by then will not.
const PATIENCE: Duration = Duration::from_secs(120);

// Of `nccl.h`.
const SUCCESS: u32 = 0;
const IN_PROGRESS: u32 = 7;
const FLOAT32: c_int = 7;
const SUM: c_int = 0;
const MAGIC: u32 = 0xcafe_beef;

type Communicator = *mut c_void;

/// `NCCL_VERSION`.
const fn version(major: c_int, minor: c_int, patch: c_int) -> c_int {
    major * 10_000 + minor * 100 + patch
}

/// `ncclUniqueId`: where a group meets.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([c_char; 128]);

/// `ncclConfig_t` as of 2.14: later versions read no more of one that says so.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    /// Where later versions have another setting: undefined.
    rest: c_int,
}

/// The library's functions. Results are numbers and not an enumeration, since later versions have more of them.
struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> u32,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> u32,
    init_rank: unsafe extern "C" fn(*mut Communicator, c_int, UniqueId, c_int, *mut Config) -> u32,
    async_error: unsafe extern "C" fn(Communicator, *mut u32) -> u32,
    abort: unsafe extern "C" fn(Communicator) -> u32,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Communicator,
        sys::CUstream,
    ) -> u32,
    all_gather: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        Communicator,
        sys::CUstream,
    ) -> u32,
    error_string: unsafe extern "C" fn(u32) -> *const c_char,
    /// Keeps the functions where they are; never closed, since threads of the library may outlive the last communicator.
    _opened: ManuallyDrop<libloading::Library>,
}

impl Library {
    fn open() -> Result<Self, Error> {
        // SAFETY: opens the library and runs its initialisers, as every program that uses it does.
        let library = NAMES
            .iter()
            .find_map(|name| unsafe { libloading::Library::new(*name) }.ok())
            .ok_or_else(|| {
                Error::Device(format!(
                    "several GPUs exchange through NCCL, and there is no {} on this machine: install it (NVIDIA's package libnccl2, or \
                     nvidia-nccl-cu13 from PyPI) where the system finds libraries, or name its folder in LD_LIBRARY_PATH",
                    NAMES[0]
                ))
            })?;
        // SAFETY: the fields' types are those of `nccl.h`.
        let opened = unsafe {
            Self {
                get_version: function(&library, "ncclGetVersion")?,
                get_unique_id: function(&library, "ncclGetUniqueId")?,
                init_rank: function(&library, "ncclCommInitRankConfig")?,
                async_error: function(&library, "ncclCommGetAsyncError")?,
                abort: function(&library, "ncclCommAbort")?,
                all_reduce: function(&library, "ncclAllReduce")?,
                all_gather: function(&library, "ncclAllGather")?,
                error_string: function(&library, "ncclGetErrorString")?,
                _opened: ManuallyDrop::new(library),
            }
        };
        let version = opened.version()?;
        if version < OLDEST {
            return Err(Error::Device(format!(
                "NCCL is {}, several GPUs need {} or newer",
                name_of(version),
                name_of(OLDEST)
            )));
        }
        Ok(opened)
    }

    fn version(&self) -> Result<c_int, Error> {
        let mut version = 0;
        // SAFETY: a place to write to.
        let result = unsafe { (self.get_version)(&raw mut version) };
        self.done("its version", result)?;
        Ok(version)
    }

    fn unique_id(&self) -> Result<UniqueId, Error> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: a place to write to.
        let result = unsafe { (self.get_unique_id)(&raw mut id) };
        self.done("a place for ranks to meet", result)?;
        Ok(id)
    }

    fn done(&self, what: &str, result: u32) -> Result<(), Error> {
        if result == SUCCESS {
            return Ok(());
        }
        // SAFETY: a string of the library's, for any number.
        let text = unsafe { (self.error_string)(result) };
        let text = if text.is_null() {
            "an unknown error".into()
        } else {
            // SAFETY: as above, it ends with a zero and is never freed.
            unsafe { CStr::from_ptr(text) }.to_string_lossy()
        };
        Err(Error::Device(format!("NCCL, {what}: {text}")))
    }
}

/// A function of a library by its name.
///
/// # Safety
/// `F` is the function's type.
unsafe fn function<F: Copy>(library: &libloading::Library, name: &str) -> Result<F, Error> {
    // SAFETY: the caller's promise.
    match unsafe { library.get::<F>(name.as_bytes()) } {
        Ok(function) => Ok(*function),
        Err(error) => Err(Error::Device(format!(
            "NCCL is too old, or something else is called so: {error}"
        ))),
    }
}

/// As NCCL's releases are named.
fn name_of(version: c_int) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

/// What ties a GPU to the other ranks.
pub(super) struct Ties {
    library: Arc<Library>,
    rank: Rank,
    state: Mutex<State>,
}

struct State {
    group: Group,
    /// Null before it is made, and once it is aborted.
    communicator: Communicator,
}

// SAFETY: a communicator may be used from any thread whose current context is its GPU's, one at a time: it is behind a mutex.
unsafe impl Send for State {}

impl Ties {
    fn new(library: Arc<Library>, group: Group) -> Self {
        Self {
            library,
            rank: group.rank(),
            state: Mutex::new(State {
                group,
                communicator: std::ptr::null_mut(),
            }),
        }
    }

    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// For logs.
    pub fn description(&self) -> String {
        self.library.version().map_or_else(
            |_| "NCCL".to_owned(),
            |version| format!("NCCL {}", name_of(version)),
        )
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Meets the others: every rank calls this at once, with its GPU's context current.
    fn meet(&self, id: UniqueId) -> Result<(), Error> {
        let state = &mut *self.state();
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: version(2, 14, 0) as u32,
            blocking: 0,
            rest: c_int::MIN,
        };
        // SAFETY: places to write to and to read from. The communicator is there when the call returns, though not yet ready.
        let result = unsafe {
            (self.library.init_rank)(
                &raw mut state.communicator,
                self.rank.of as c_int,
                id,
                self.rank.index as c_int,
                &raw mut config,
            )
        };
        self.settle(
            state,
            "meeting the other ranks",
            result,
            Some(Instant::now() + PATIENCE),
        )
    }

    /// Waits for what a call began, which may take the other ranks.
    fn settle(
        &self,
        state: &State,
        what: &str,
        result: u32,
        until: Option<Instant>,
    ) -> Result<(), Error> {
        let mut result = result;
        while result == IN_PROGRESS {
            state.group.check()?;
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(late(what));
            }
            thread::yield_now();
            // SAFETY: a communicator that is not aborted, and a place to write to.
            let asked = unsafe { (self.library.async_error)(state.communicator, &raw mut result) };
            self.library.done(what, asked)?;
        }
        self.library.done(what, result)
    }

    /// Puts a sum over the ranks on the stream, which may be capturing.
    pub fn all_reduce(&self, exchange: Exchange, stream: sys::CUstream) -> Result<(), Error> {
        let state = &*self.usable()?;
        let at = exchange.at as *mut c_void;
        // SAFETY: memory of this GPU that is alive until the stream has passed here; it may be summed in place.
        let result = unsafe {
            (self.library.all_reduce)(
                at,
                at,
                exchange.count,
                FLOAT32,
                SUM,
                state.communicator,
                stream,
            )
        };
        self.settle(state, "a sum", result, None)
    }

    /// Puts the exchange of all ranks' parts on the stream, which may be capturing.
    pub fn all_gather(&self, exchange: Exchange, stream: sys::CUstream) -> Result<(), Error> {
        let state = &*self.usable()?;
        let own = exchange.count * self.rank.index * size_of::<f32>();
        // SAFETY: as above; parts may be gathered in place where each rank's is where it will be.
        let result = unsafe {
            (self.library.all_gather)(
                (exchange.at + own as u64) as *const c_void,
                exchange.at as *mut c_void,
                exchange.count,
                FLOAT32,
                state.communicator,
                stream,
            )
        };
        self.settle(state, "an exchange of parts", result, None)
    }

    /// The communicator, unless it is aborted.
    fn usable(&self) -> Result<MutexGuard<'_, State>, Error> {
        let state = self.state();
        state.group.check()?;
        if state.communicator.is_null() {
            return Err(Error::Device(format!(
                "{:?} exchanges no more: it has left",
                self.rank
            )));
        }
        Ok(state)
    }

    /// Whether all ranks say yes. What is captured on one rank and not on another is no exchange NCCL knows.
    pub fn agree(&self, yes: bool) -> Result<bool, Error> {
        self.usable()?.group.agree(yes)
    }

    /// Waits until everything on the stream is done. A copy to the host would wait as well, but with no eye on the group.
    ///
    /// # Errors
    /// A rank has left, or the GPU or NCCL failed. The stream may then still wait, until [`Ties::abort`].
    pub fn wait(&self, stream: sys::CUstream) -> Result<(), Error> {
        self.wait_until(stream, None)
    }

    fn wait_until(&self, stream: sys::CUstream, until: Option<Instant>) -> Result<(), Error> {
        loop {
            // SAFETY: a stream that is alive, in the current context.
            match unsafe { sys::cuStreamQuery(stream) } {
                CUresult::CUDA_SUCCESS => return Ok(()),
                CUresult::CUDA_ERROR_NOT_READY => {}
                error => {
                    return Err(Error::Device(format!("waiting for the GPU: {error:?}")));
                }
            }
            let state = self.usable()?;
            let mut result = SUCCESS;
            // SAFETY: a communicator that is not aborted, and a place to write to.
            let asked = unsafe { (self.library.async_error)(state.communicator, &raw mut result) };
            self.library.done("an exchange", asked)?;
            if result != IN_PROGRESS {
                self.library.done("an exchange", result)?;
            }
            drop(state);
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(late("a first exchange"));
            }
            thread::yield_now();
        }
    }

    /// Leaves the group: the others see it.
    pub fn leave(&self) {
        self.state().group.leave();
    }

    /// Leaves the group and ends what the GPU still waits for. No graph that exchanges is left.
    pub fn abort(&self) {
        let mut state = self.state();
        state.group.leave();
        let communicator = std::mem::replace(&mut state.communicator, std::ptr::null_mut());
        if !communicator.is_null() {
            // Nothing is left to be done about an error here.
            // SAFETY: a communicator of ours that nobody will name again.
            unsafe { (self.library.abort)(communicator) };
        }
    }
}

fn late(what: &str) -> Error {
    Error::Device(format!(
        "NCCL, {what}: nothing has come of it in {} seconds (NCCL_DEBUG=INFO says how far it got; NCCL_P2P_DISABLE=1 helps where GPUs cannot reach each other's \
         memory)",
        PATIENCE.as_secs()
    ))
}

impl Drop for Ties {
    fn drop(&mut self) {
        self.abort();
    }
}

impl CudaBackend {
    /// A backend on each of `of` GPUs of this machine, from `options.ordinal` on: the ranks of a group, in order, each for a thread of its own.
    ///
    /// # Errors
    /// As [`CudaBackend::new`]; there are fewer GPUs, they are not alike, there is no NCCL, or they do not find each other.
    pub fn group(options: CudaOptions, of: usize) -> Result<Vec<Self>, Error> {
        let names = gpus()?;
        let first = options.ordinal;
        if of == 0 || names.len() < first + of {
            return Err(Error::Device(format!(
                "{of} GPUs are asked for, and this machine has {}: {}",
                names.len(),
                names.join(", ")
            )));
        }
        let library = Arc::new(Library::open()?);
        let id = library.unique_id()?;
        thread::scope(|scope| {
            let ranks: Vec<_> = Group::of(of)
                .into_iter()
                .map(|group| {
                    let ties = Ties::new(Arc::clone(&library), group);
                    scope.spawn(move || Driver::of_rank(first + ties.rank().index, ties, id))
                })
                .collect();
            let drivers = ranks
                .into_iter()
                .map(|rank| {
                    rank.join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect::<Vec<_>>();
            // What one rank failed with says more than that it has left.
            let left = |error: &Error| error.to_string().contains("has left");
            if let Some(Err(error)) = drivers
                .iter()
                .find(|driver| matches!(driver, Err(error) if !left(error)))
            {
                return Err(error.clone());
            }
            let drivers = drivers.into_iter().collect::<Result<Vec<_>, _>>()?;
            if let Some(other) = drivers.iter().find(|driver| !driver.is_like(&drivers[0])) {
                return Err(Error::Device(format!(
                    "a model is divided among GPUs that are alike, since each must choose the same experts: {} is not like {}",
                    other.name(),
                    drivers[0].name()
                )));
            }
            drivers
                .into_iter()
                .map(|driver| Self::on(Arc::new(driver), options.deterministic))
                .collect()
        })
    }
}

impl Driver {
    /// A GPU that is one of several ranks, once all are there.
    fn of_rank(ordinal: usize, ties: Ties, id: UniqueId) -> Result<Self, Error> {
        let driver = Self::open(ordinal)?.tied(ties);
        driver.meet(id)?;
        Ok(driver)
    }

    /// Meets the other ranks and exchanges something, so that GPUs that cannot are found before a model is loaded, and what NCCL needs of their memory is taken
    /// before the rest is counted.
    fn meet(&self, id: UniqueId) -> Result<(), Error> {
        const COUNT: usize = 1 << 20;
        let ties = self.ties()?;
        ties.meet(id)?;
        let of = ties.rank().of;
        let until = Some(Instant::now() + PATIENCE);
        self.with_memory(of * COUNT * size_of::<f32>(), |at, stream| {
            ties.all_reduce(Exchange { at, count: COUNT }, stream)?;
            ties.wait_until(stream, until)?;
            ties.all_gather(Exchange { at, count: COUNT }, stream)?;
            ties.wait_until(stream, until)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_gpus_or_without_nccl_is_told_what_is_missing() {
        // Whatever this machine lacks first; with two GPUs and NCCL nothing is.
        let options = CudaOptions::default();
        if let Err(error) = CudaBackend::group(options, 2) {
            let error = error.to_string();
            assert!(
                ["libcuda", "this machine has", "libnccl.so.2", "CUDA driver"]
                    .iter()
                    .any(|part| error.contains(part)),
                "{error}"
            );
        }
        match Library::open() {
            Ok(library) => assert!(library.version().is_ok_and(|version| version >= OLDEST)),
            Err(error) => assert!(error.to_string().contains("libnccl.so.2"), "{error}"),
        }
    }

    #[test]
    fn versions_are_numbered_as_nccl_numbers_them() {
        assert_eq!(version(2, 14, 0), 21_400);
        assert_eq!(name_of(22_703), "2.27.3");
    }
}
