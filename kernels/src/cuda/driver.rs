//! [`Driver`]: a GPU, through the CUDA driver that is found when the process starts.
//!
//! Nothing of CUDA is linked: the driver's library is opened here, and where there is none the backend is not made and says why. All work is on one stream, so
//! that it happens in the order in which it was asked for, but for copies that were asked to be made beside it, for which that stream waits. A list that will
//! come again is captured once and replayed as a graph.
//!
//! **Invariant:** errors of the driver are sticky (a fault in a kernel fails everything after it), so each is reported with the call that saw it, and the
//! engine ends.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::result as cuda;
use cudarc::driver::sys::{self, CUfunction_attribute_enum as FunctionAttribute};

use super::backend::{CudaBackend, CudaOptions};
use super::cublaslt::Library;
use super::device::{DenseShape, Device, Launch, Work};
use super::flights::FLIGHTS;
use super::graphs::{Graphs, capture};
use super::machine::{Found, failed, init};
use super::nccl::Ties;
use super::params::Pointer;
use crate::{Error, Rank};

/// A fatbin as nvcc aligns those that it embeds itself: the driver reads its 8-byte fields in place.
#[repr(align(16))]
struct Aligned<T: ?Sized>(T);

/// Kernels as nvcc made them: a name and a fatbin each, of which the driver takes what fits the GPU.
static FATBINS: &[(&str, &Aligned<[u8]>)] = &include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Devices whose context stays until the process ends. The driver destroys a context when the last backend lets go of it, and makes a new one in 0.2 to 0.5 s:
/// once for each test, say.
static KEPT: Mutex<Vec<sys::CUdevice>> = Mutex::new(Vec::new());

/// Set to 1, it has every kernel on a GPU of Hopper's kind or newer begin while the one before it ends, up to where it would read or write anything ("programmatic
/// dependent launch"). Not a flag, for nobody has measured yet what it is worth; docs/gpu.md names it.
const OVERLAP: &str = "QUIRE_CUDA_OVERLAP";
/// Set to 0, it has every list run as it is: a way to tell a fault of a graph from one of a kernel.
const GRAPHS_WANTED: &str = "QUIRE_CUDA_GRAPHS";
/// Shared memory a block has without asking.
const SHARED_UNASKED: u32 = 48 << 10;

impl CudaBackend {
    /// A backend on one of this machine's GPUs.
    ///
    /// # Errors
    /// There is no driver or no such GPU, it is older than compute capability 8.0, or its memory is full.
    pub fn new(options: CudaOptions) -> Result<Self, Error> {
        let driver = Driver::open(options.ordinal)?;
        Self::on(Arc::new(driver), options.deterministic)
    }
}

/// Kernels that were not loaded, which most often is the driver's age.
fn too_old(name: &str, error: cuda::DriverError) -> Error {
    let mut version = 0;
    // SAFETY: a place to write to. Where it fails the version is 0, which is said.
    let _ = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let (major, minor) = (version / 1000, version % 1000 / 10);
    failed(
        &format!(
            "loading the kernels of {name} (the driver is for CUDA {major}.{minor}; kernels by an nvcc of CUDA 13 need driver 580 or newer)"
        ),
        error,
    )
}

/// The page-locked memory at an address that the driver gave.
fn host(at: Pointer) -> *const u8 {
    std::ptr::with_exposed_provenance(at as usize)
}

struct Kernel {
    function: sys::CUfunction,
    /// Dynamic shared memory it may have so far.
    shared: u32,
}

/// What changes while it is used.
#[derive(Default)]
struct State {
    kernels: HashMap<&'static str, Kernel>,
    graphs: Graphs,
    /// Lists run as they are from now on: a capture has failed, or nobody wants one.
    plain: bool,
}

pub(super) struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// For copies beside what runs on the other one.
    beside: sys::CUstream,
    /// Recorded behind the last copy beside.
    copied: sys::CUevent,
    marks: [sys::CUevent; FLIGHTS],
    modules: Vec<sys::CUmodule>,
    /// Or why there is none.
    library: Result<Library, String>,
    name: String,
    /// Compute capability and multiprocessors.
    kind: [i32; 3],
    /// Whether kernels begin while others end: see [`OVERLAP`].
    overlap: bool,
    /// To the other ranks, where it is one of several.
    ties: Option<Ties>,
    state: Mutex<State>,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs, which every call below sees to; what is changed is
// behind a mutex.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl Driver {
    pub(super) fn open(ordinal: usize) -> Result<Self, Error> {
        init()?;
        let Found { device, name, kind } = Found::gpu(ordinal)?;
        let [major, minor, _] = kind;
        // SAFETY: as above; released when this is dropped.
        let context = unsafe { cuda::primary_ctx::retain(device) }
            .map_err(|error| failed("a context", error))?;
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.contains(&device) {
            // SAFETY: as above; never released.
            unsafe { cuda::primary_ctx::retain(device) }
                .map_err(|error| failed("a context", error))?;
            kept.push(device);
        }
        drop(kept);
        let mut driver = Self {
            device,
            context,
            stream: std::ptr::null_mut(),
            beside: std::ptr::null_mut(),
            copied: std::ptr::null_mut(),
            marks: [std::ptr::null_mut(); FLIGHTS],
            modules: Vec::new(),
            library: Err(String::new()),
            name: format!("{name} (compute capability {major}.{minor})"),
            kind,
            overlap: major >= 9 && std::env::var_os(OVERLAP).is_some_and(|value| value == "1"),
            ties: None,
            state: Mutex::new(State {
                plain: std::env::var_os(GRAPHS_WANTED).is_some_and(|value| value == "0"),
                ..State::default()
            }),
        };
        driver.enter()?;
        for stream in [&mut driver.stream, &mut driver.beside] {
            *stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking)
                .map_err(|error| failed("a stream", error))?;
        }
        for event in std::iter::once(&mut driver.copied).chain(&mut driver.marks) {
            *event = cuda::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
                .map_err(|error| failed("an event", error))?;
        }
        for (name, fatbin) in FATBINS {
            // SAFETY: a fatbin by nvcc, whole and alive.
            let module = unsafe { cuda::module::load_data(fatbin.0.as_ptr().cast()) }
                .map_err(|error| too_old(name, error))?;
            driver.modules.push(module);
        }
        driver.library = Library::open(driver.stream);
        Ok(driver)
    }

    /// As one of several ranks.
    pub(super) fn tied(self, ties: Ties) -> Self {
        let mut this = self;
        this.ties = Some(ties);
        this
    }

    /// To the other ranks.
    pub(super) fn ties(&self) -> Result<&Ties, Error> {
        self.ties.as_ref().ok_or_else(|| {
            Error::Device(format!(
                "an exchange on {}, which is one of no ranks",
                self.name
            ))
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether libraries and kernels choose here as they do there.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.kind == other.kind
    }

    /// Has `work` done with memory that is given back afterwards.
    pub(super) fn with_memory(
        &self,
        bytes: usize,
        work: impl FnOnce(Pointer, sys::CUstream) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let at = self.allocate(bytes, "a first exchange")?;
        let done = work(at, self.stream);
        if done.is_err() {
            // Whoever waits for this memory would wait for the other ranks.
            self.leave();
        }
        self.free(at, bytes);
        done
    }

    /// Makes the context this thread's: calls come from whichever thread owns the backend.
    fn enter(&self) -> Result<(), Error> {
        // SAFETY: a context that is retained as long as this lives.
        unsafe { cuda::ctx::set_current(self.context) }
            .map_err(|error| failed("the GPU's context", error))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &'static str) -> Result<Kernel, Error> {
        let text = CString::new(name).map_err(|_| Error::Device(name.to_owned()))?;
        for &module in &self.modules {
            // SAFETY: a module that is loaded as long as this lives.
            match unsafe { cuda::module::get_function(module, text.clone()) } {
                Ok(function) => {
                    return Ok(Kernel {
                        function,
                        shared: SHARED_UNASKED,
                    });
                }
                Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_NOT_FOUND => {}
                // The driver loads a kernel when it is first asked for: here is where that fails, or where an earlier fault shows.
                Err(error) => return Err(failed(&format!("loading the kernel {name}"), error)),
            }
        }
        Err(Error::Device(format!("there is no kernel {name}")))
    }

    /// A launch's kernel, with as much shared memory as that wants.
    fn kernel(&self, state: &mut State, launch: &Launch) -> Result<sys::CUfunction, Error> {
        let kernel = match state.kernels.entry(launch.kernel) {
            std::collections::hash_map::Entry::Occupied(kernel) => kernel.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(self.find(launch.kernel)?)
            }
        };
        if launch.shared > kernel.shared {
            // SAFETY: a function of a loaded module.
            unsafe {
                cuda::function::set_function_attribute(
                    kernel.function,
                    FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    launch.shared as i32,
                )
            }
            .map_err(|error| {
                let (wanted, name) = (launch.shared, launch.kernel);
                failed(
                    &format!("{wanted} bytes of shared memory for {name}"),
                    error,
                )
            })?;
            kernel.shared = launch.shared;
        }
        Ok(kernel.function)
    }

    fn launch(&self, state: &mut State, launch: &Launch) -> Result<(), Error> {
        let (function, name) = (self.kernel(state, launch)?, launch.kernel);
        // The driver reads as many bytes as the kernel's parameter has, which the test of sizes in the emulation compares.
        let mut params = [launch.params().as_ptr().cast_mut().cast::<c_void>()];
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: 1,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: &raw mut overlap,
            numAttrs: 1,
        };
        // SAFETY: the function takes one struct of plain data by value, which the driver copies before it returns. What it points to is memory of
        // this device that is alive until the list has run: see `Scratch` and `Buffer`. That kernels which overlap wait for each other is the
        // first thing each does (`device.cuh`).
        unsafe {
            if self.overlap {
                let extra = std::ptr::null_mut();
                sys::cuLaunchKernelEx(&raw const config, function, params.as_mut_ptr(), extra)
                    .result()
            } else {
                cuda::launch_kernel(
                    function,
                    (launch.grid.0, launch.grid.1, 1),
                    (launch.threads, 1, 1),
                    launch.shared,
                    self.stream,
                    &mut params,
                )
            }
        }
        .map_err(|error| failed(&format!("launching {name} on {:?}", launch.grid), error))
    }

    fn issue(&self, state: &mut State, list: &[Work]) -> Result<(), Error> {
        for work in list {
            match work {
                Work::Launch(launch) => self.launch(state, launch)?,
                Work::Dense(dense) => match &self.library {
                    Ok(library) => library.run(dense)?,
                    Err(why) => {
                        return Err(Error::Device(format!("a product by cuBLASLt, {why}")));
                    }
                },
                &Work::AllReduce(exchange) => self.ties()?.all_reduce(exchange, self.stream)?,
                &Work::AllGather(exchange) => self.ties()?.all_gather(exchange, self.stream)?,
            }
        }
        Ok(())
    }

    /// Looks up what a list's launches need.
    fn load(&self, state: &mut State, list: &[Work]) -> Result<(), Error> {
        for work in list {
            if let Work::Launch(launch) = work {
                self.kernel(state, launch)?;
            }
        }
        Ok(())
    }

    /// Captures a list and keeps it. Kernels and algorithms were looked up before, which a capture does not allow.
    fn keep(&self, state: &mut State, list: &[Work]) -> Result<(), Error> {
        let graph = capture(self.stream, || self.issue(state, list))?;
        state.graphs.keep(list, graph)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // First, for the stream may wait for other ranks.
        self.leave();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Nothing is left to be done about an error here.
        // SAFETY: handles of ours, each destroyed once, after everything on the stream is done.
        unsafe {
            let streams = [self.stream, self.beside];
            for stream in streams.into_iter().filter(|stream| !stream.is_null()) {
                let _ = cuda::stream::synchronize(stream);
            }
            state.graphs.clear();
            self.library = Err(String::new());
            for module in self.modules.drain(..) {
                let _ = cuda::module::unload(module);
            }
            let events = self.marks.into_iter().chain([self.copied]);
            for event in events.filter(|event| !event.is_null()) {
                let _ = cuda::event::destroy(event);
            }
            for stream in streams.into_iter().filter(|stream| !stream.is_null()) {
                let _ = cuda::stream::destroy(stream);
            }
            let _ = cuda::primary_ctx::release(self.device);
        }
    }
}

impl Device for Driver {
    fn description(&self) -> String {
        let library = match &self.library {
            Ok(_) => "with cuBLASLt".to_owned(),
            Err(why) => format!("without cuBLASLt, {why}"),
        };
        let overlap = if self.overlap {
            ", kernels overlapping"
        } else {
            ""
        };
        let exchange = self.ties.as_ref().map(Ties::description);
        let and = exchange.map_or_else(String::new, |exchange| format!(", with {exchange}"));
        format!("{}, {library}{overlap}{and}", self.name)
    }

    fn memory(&self) -> Result<(u64, u64), Error> {
        self.enter()?;
        let (free, total) = cuda::mem_get_info().map_err(|error| failed("free memory", error))?;
        Ok((free as u64, total as u64))
    }

    fn allocate(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error> {
        self.enter()?;
        // SAFETY: plain memory, which `Buffer` gives back.
        match unsafe { cuda::malloc_sync(bytes) } {
            Ok(at) => Ok(at),
            Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(Error::OutOfMemory { what, bytes })
            }
            Err(error) => Err(failed(&format!("{bytes} bytes for {what}"), error)),
        }
    }

    fn free(&self, at: Pointer, _bytes: usize) {
        // An error here is an earlier one that was reported by the call that saw it.
        if self.enter().is_ok() {
            // SAFETY: memory of ours that nothing names any more; the driver waits for work that may still use it.
            let _ = unsafe { cuda::free_sync(at) };
        }
    }

    fn zero(&self, at: Pointer, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: a part of an allocation: see `Buffer`.
        unsafe { cuda::memset_d8_async(at, 0, bytes, self.stream) }
            .map_err(|error| failed("zeroing memory", error))
    }

    fn upload(&self, to: Pointer, from: &[u8]) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: as above. `from` is pageable memory: where the GPU reads such by itself, it has done so once the stream is done.
        unsafe {
            cuda::memcpy_htod_async(to, from, self.stream)
                .and_then(|()| cuda::stream::synchronize(self.stream))
        }
        .map_err(|error| failed("copying to the GPU", error))
    }

    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), Error> {
        self.enter()?;
        if let Some(ties) = &self.ties {
            ties.wait(self.stream)?;
        }
        // SAFETY: as above; nobody touches `to` before the stream is done.
        unsafe {
            cuda::memcpy_dtoh_async(to, from, self.stream)
                .and_then(|()| cuda::stream::synchronize(self.stream))
        }
        .map_err(|error| failed("copying from the GPU", error))
    }

    fn copy(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: as above.
        unsafe { cuda::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|error| failed("copying on the GPU", error))
    }

    fn allocate_host(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error> {
        self.enter()?;
        // SAFETY: plain memory, which `HostBuffer` gives back.
        match unsafe { cuda::malloc_host(bytes, 0) } {
            Ok(at) => Ok(at.expose_provenance() as Pointer),
            Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(Error::OutOfMemory { what, bytes })
            }
            Err(error) => Err(failed(
                &format!("{bytes} page-locked bytes for {what}"),
                error,
            )),
        }
    }

    fn free_host(&self, at: Pointer, _bytes: usize) {
        if self.enter().is_ok() {
            // SAFETY: memory of ours that nobody names any more, and no copy either once both streams are done. Errors were reported by the call
            // that saw them.
            unsafe {
                let _ = cuda::stream::synchronize(self.beside);
                let _ = cuda::stream::synchronize(self.stream);
                let _ = cuda::free_host(std::ptr::with_exposed_provenance_mut(at as usize));
            }
        }
    }

    fn upload_beside(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: parts of allocations of that length, page-locked at `from`, which nobody touches before the list that follows: see `Flights`.
        unsafe {
            let from = std::slice::from_raw_parts(host(from), bytes);
            cuda::memcpy_htod_async(to, from, self.beside)
                .and_then(|()| cuda::event::record(self.copied, self.beside))
                .and_then(|()| {
                    let plain = sys::CUevent_wait_flags_enum::CU_EVENT_WAIT_DEFAULT;
                    cuda::stream::wait_event(self.stream, self.copied, plain)
                })
        }
        .map_err(|error| failed("copying a step to the GPU", error))
    }

    fn upload_later(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: as above, until the mark that follows.
        unsafe {
            let from = std::slice::from_raw_parts(host(from), bytes);
            cuda::memcpy_htod_async(to, from, self.stream)
        }
        .map_err(|error| failed("copying a step to the GPU", error))
    }

    fn download_later(&self, from: Pointer, to: Pointer, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: as above.
        unsafe {
            let to = std::slice::from_raw_parts_mut(host(to).cast_mut(), bytes);
            cuda::memcpy_dtoh_async(to, from, self.stream)
        }
        .map_err(|error| failed("copying tokens from the GPU", error))
    }

    fn mark(&self, mark: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: an event and a stream that are alive.
        unsafe { cuda::event::record(self.marks[mark], self.stream) }
            .map_err(|error| failed("marking a step's end", error))
    }

    fn wait(&self, mark: usize) -> Result<(), Error> {
        self.enter()?;
        // Ranks are never ahead of each other, so that nothing is behind the mark.
        if let Some(ties) = &self.ties {
            ties.wait(self.stream)?;
        }
        // SAFETY: as above.
        unsafe { cuda::event::synchronize(self.marks[mark]) }
            .map_err(|error| failed("a step", error))
    }

    fn synchronise(&self) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: as above.
        unsafe {
            cuda::stream::synchronize(self.beside)
                .and_then(|()| cuda::stream::synchronize(self.stream))
        }
        .map_err(|error| failed("waiting for the GPU", error))
    }

    fn run(&self, list: &[Work], again: bool) -> Result<(), Error> {
        self.enter()?;
        let state = &mut *self.state();
        let known = if again { state.graphs.find(list) } else { None };
        let replay = match &self.ties {
            None => known.is_some(),
            Some(ties) => {
                if known.is_none() {
                    self.load(state, list)?;
                }
                // Nobody launches before all have recorded, whatever they launch: memory that is given back and kernels that are loaded wait for this GPU and
                // its peers, and would wait for ever for an exchange that has begun there and waits for this rank.
                ties.agree(known.is_some())?
            }
        };
        if let Some(index) = known.filter(|_| replay) {
            return state.graphs.replay(index, self.stream);
        }
        // One rank may know what another does not: then all begin anew.
        if let Some(index) = known {
            state.graphs.remove(index)?;
        }
        // The first time it runs as it is, so that everything it needs is looked up, and is captured for the next.
        self.issue(state, list)?;
        if again && !state.plain {
            // A graph is only faster. (A device that has failed says so where the step is waited for.)
            if let Err(error) = self.keep(state, list) {
                tracing::warn!(%error, "steps run without graphs from now on");
                state.plain = true;
            }
        }
        Ok(())
    }

    fn supports(&self, shape: DenseShape) -> bool {
        let library = self.library.as_ref();
        self.enter().is_ok() && library.is_ok_and(|library| library.supports(shape))
    }

    fn rank(&self) -> Rank {
        self.ties.as_ref().map_or(Rank::ALONE, Ties::rank)
    }

    fn leave(&self) {
        let Some(ties) = &self.ties else {
            return;
        };
        ties.leave();
        if self.enter().is_ok() {
            // A communicator waits for the graphs that exchange through it. Nothing is left to be done about an error here.
            self.state().graphs.clear();
            ties.abort();
        }
    }
}
