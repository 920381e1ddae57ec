//! [`Device`]: what a GPU does for the backend — memory, copies and lists of launches — and nothing more, so that the same backend runs on a
//! GPU and on the emulation.
//!
//! A step is recorded as a list of [`Work`] before any of it runs. Two steps of one batch size record equal lists (what differs between them is
//! in device memory), so a device that can replay a list as one graph recognises it by comparison: nothing has to be told when a graph is stale.

use std::sync::Arc;

use super::params::{Params, Pointer, bytes_of};
use crate::{Error, Rank};

/// Most bytes a kernel's parameters have.
const PARAMS: usize = 136;

/// One kernel to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launch {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks. The second index ends at 65,535.
    pub grid: (u32, u32),
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    params: [u8; PARAMS],
    params_len: u32,
}

impl Launch {
    pub fn new<P: Params>(
        kernel: &'static str,
        grid: (usize, usize),
        shared: usize,
        params: &P,
    ) -> Self {
        const { assert!(size_of::<P>() <= PARAMS) };
        let mut bytes = [0; PARAMS];
        bytes[..size_of::<P>()].copy_from_slice(bytes_of(params));
        Self {
            kernel,
            grid: (grid.0 as u32, grid.1 as u32),
            threads: threads(kernel),
            shared: shared as u32,
            params: bytes,
            params_len: size_of::<P>() as u32,
        }
    }

    /// The kernel's parameters.
    pub fn params(&self) -> &[u8] {
        &self.params[..self.params_len as usize]
    }
}

/// Threads of a kernel's blocks: what its source says, which the emulation compares.
fn threads(kernel: &str) -> u32 {
    if kernel == "sample" {
        1024
    } else if kernel.starts_with("attention") || matches!(kernel, "norm_rope_store" | "route") {
        128
    } else {
        256
    }
}

/// The operands' precision in a [`Dense`] product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Operand {
    Bf16,
    F16,
}

/// The shape of a dense product: what the choice of an algorithm depends on, and the key it is remembered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct DenseShape {
    pub operand: Operand,
    pub rows: u32,
    pub features: u32,
    pub cols: u32,
    pub x_stride: u32,
    pub out_stride: u32,
    /// Whether what is in the output is added to.
    pub add: bool,
    /// What the addresses of `w`, `x` and the output are multiples of, in bytes: a power of two up to 256.
    pub alignments: [u32; 3],
}

/// What an address is a multiple of, as [`DenseShape::alignments`] has it.
pub(crate) fn alignment(at: Pointer) -> u32 {
    1 << at.trailing_zeros().min(8)
}

/// `out[r, f] (+)= Σ_k x[r, k] · w[f, k]` by a vendor's library. `x`, `w` 16-bit, `out` f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dense {
    pub shape: DenseShape,
    pub w: Pointer,
    pub x: Pointer,
    pub out: Pointer,
}

/// Numbers that ranks exchange, f32. Every rank exchanges as many, in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exchange {
    pub at: Pointer,
    pub count: usize,
}

/// One entry of a step's list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(
    clippy::large_enum_variant,
    reason = "a list of launches is what it is for"
)]
pub(crate) enum Work {
    Launch(Launch),
    Dense(Dense),
    /// `[count]` becomes the sum over the ranks', the same on all of them.
    AllReduce(Exchange),
    /// `[ranks, count]`, of which each rank has made its own part, becomes whole on all of them.
    AllGather(Exchange),
}

/// A GPU, or what stands for one. All work is in one order: what is uploaded, run and downloaded happens as it was asked for.
pub(crate) trait Device: Send + Sync {
    /// For logs: its name and memory.
    fn description(&self) -> String;

    /// Bytes of its memory: free, and in all.
    fn memory(&self) -> Result<(u64, u64), Error>;

    /// Memory for `bytes` bytes (more than 0), aligned to 256. What is in it is undefined.
    fn allocate(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error>;

    /// Gives memory back that [`Device::allocate`] gave.
    fn free(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeroes.
    fn zero(&self, at: Pointer, bytes: usize) -> Result<(), Error>;

    /// Copies to the device; `from` may be reused when it returns.
    fn upload(&self, to: Pointer, from: &[u8]) -> Result<(), Error>;

    /// Copies from the device, when everything before is done.
    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), Error>;

    /// Copies within the device.
    fn copy(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error>;

    /// Memory of the host that the device can copy from and to by itself, aligned to 4. What is in it is undefined.
    fn allocate_host(&self, bytes: usize, what: &'static str) -> Result<Pointer, Error>;

    /// Gives memory back that [`Device::allocate_host`] gave, when nothing copies from or to it any more.
    fn free_host(&self, at: Pointer, bytes: usize);

    /// Copies to the device from such memory, beside what runs: before the next list, but maybe at once. Neither side may be touched until then.
    fn upload_beside(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error>;

    /// Copies to the device from such memory, in order, without waiting: `from` must stay until it is done.
    fn upload_later(&self, to: Pointer, from: Pointer, bytes: usize) -> Result<(), Error>;

    /// Copies from the device to such memory, in order, without waiting.
    fn download_later(&self, from: Pointer, to: Pointer, bytes: usize) -> Result<(), Error>;

    /// Sets mark `mark`, of [`FLIGHTS`](super::flights::FLIGHTS), behind everything that was asked for.
    fn mark(&self, mark: usize) -> Result<(), Error>;

    /// Waits until everything before a mark, as it was set last, is done.
    fn wait(&self, mark: usize) -> Result<(), Error>;

    /// Waits until everything that was asked for is done. After a fault this fails for ever.
    fn synchronise(&self) -> Result<(), Error>;

    /// Runs a list, without waiting. `again`: lists equal to it will follow, so that it is worth keeping as a graph.
    fn run(&self, list: &[Work], again: bool) -> Result<(), Error>;

    /// Whether it has a library that computes [`Dense`] products of this shape.
    fn supports(&self, shape: DenseShape) -> bool;

    /// Which of the ranks that run equal lists, and exchange numbers in them, it is.
    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    /// Takes no part in exchanges any more: those of the others fail instead of waiting for this one.
    fn leave(&self) {}
}

/// Memory on a device, given back when it is dropped.
pub(crate) struct Buffer {
    device: Arc<dyn Device>,
    at: Pointer,
    bytes: usize,
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.at)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.free(self.at, self.bytes);
        }
    }
}

impl Buffer {
    /// Memory whose contents are undefined.
    pub fn new(device: &Arc<dyn Device>, bytes: usize, what: &'static str) -> Result<Self, Error> {
        let at = if bytes == 0 {
            0
        } else {
            device.allocate(bytes, what)?
        };
        Ok(Self {
            device: Arc::clone(device),
            at,
            bytes,
        })
    }

    /// Memory full of zeroes.
    pub fn zeroed(
        device: &Arc<dyn Device>,
        bytes: usize,
        what: &'static str,
    ) -> Result<Self, Error> {
        let buffer = Self::new(device, bytes, what)?;
        if bytes > 0 {
            device.zero(buffer.at, bytes)?;
        }
        Ok(buffer)
    }

    /// A copy of `values`.
    pub fn of(device: &Arc<dyn Device>, values: &[u8], what: &'static str) -> Result<Self, Error> {
        let buffer = Self::new(device, values.len(), what)?;
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    /// Where it begins; 0 for one that is empty.
    pub fn at(&self) -> Pointer {
        self.at
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies `values` to the buffer's byte `at` and after.
    pub fn upload(&self, at: usize, values: &[u8]) -> Result<(), Error> {
        assert!(
            at + values.len() <= self.bytes,
            "an upload beyond its buffer"
        );
        if values.is_empty() {
            return Ok(());
        }
        self.device.upload(self.at + at as u64, values)
    }

    /// Copies the buffer's first bytes.
    pub fn download(&self, to: &mut [u8]) -> Result<(), Error> {
        assert!(to.len() <= self.bytes, "a download beyond its buffer");
        if to.is_empty() {
            return Ok(());
        }
        self.device.download(self.at, to)
    }
}

/// Page-locked memory of the host, given back when it is dropped.
pub(crate) struct HostBuffer {
    device: Arc<dyn Device>,
    at: Pointer,
    bytes: usize,
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.device.free_host(self.at, self.bytes);
        }
    }
}

impl HostBuffer {
    /// Memory whose contents are undefined.
    pub fn new(device: &Arc<dyn Device>, bytes: usize, what: &'static str) -> Result<Self, Error> {
        let at = if bytes == 0 {
            0
        } else {
            device.allocate_host(bytes, what)?
        };
        Ok(Self {
            device: Arc::clone(device),
            at,
            bytes,
        })
    }

    /// Where it begins; 0 for one that is empty.
    pub fn at(&self) -> Pointer {
        self.at
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Replaces the bytes from `at` on. Nothing may be copying them.
    pub fn write(&mut self, at: usize, values: &[u8]) {
        assert!(
            values.len() <= self.bytes && at <= self.bytes - values.len(),
            "a write beyond its buffer"
        );
        // SAFETY: inside the allocation, which is ours; copies to and from it are done, as the caller promises.
        unsafe {
            let to = std::ptr::with_exposed_provenance_mut::<u8>(self.at as usize).add(at);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
    }

    /// The first bytes. Nothing may be copying to them.
    pub fn read(&self, to: &mut [u8]) {
        assert!(to.len() <= self.bytes, "a read beyond its buffer");
        // SAFETY: as above.
        unsafe {
            let from = std::ptr::with_exposed_provenance::<u8>(self.at as usize);
            std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len());
        }
    }
}

/// The bytes of plain numbers.
pub(crate) fn bytes_of_slice<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain numbers have no padding and no invalid bits.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of plain numbers, to be written to.
pub(crate) fn bytes_of_slice_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: plain numbers have no padding, and any bits are one.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Numbers for which any bits are a value.
pub(crate) trait Plain: sealed::Sealed + Copy {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($type:ty),*) => {$(
        impl sealed::Sealed for $type {}
        impl Plain for $type {}
    )*};
}
plain!(u8, u16, u32, f32);
