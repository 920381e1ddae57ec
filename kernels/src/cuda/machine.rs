//! Which GPUs this machine has, and whether the kernels are made for them.
//!
//! Nothing of CUDA is linked: the driver's library is opened here, and where there is none every question is answered with that.

use cudarc::driver::result as cuda;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as DeviceAttribute};

use crate::Error;

/// The names of this machine's GPUs.
///
/// # Errors
/// There is no driver, or it fails: why.
pub fn gpus() -> Result<Vec<String>, Error> {
    init()?;
    let count = cuda::device::get_count().map_err(|error| failed("counting GPUs", error))?;
    (0..count)
        .map(|ordinal| {
            let device = cuda::device::get(ordinal).map_err(|error| failed("a GPU", error))?;
            cuda::device::get_name(device).map_err(|error| failed("a GPU's name", error))
        })
        .collect()
}

/// Whether the first GPU is one that the kernels are made for, whoever uses it.
pub fn has_gpu() -> bool {
    init().and_then(|()| Found::gpu(0)).is_ok()
}

pub(super) fn failed(what: &str, error: cuda::DriverError) -> Error {
    Error::Device(format!("{what}: {error:?}"))
}

/// Opens the driver.
pub(super) fn init() -> Result<(), Error> {
    // SAFETY: opens the library and runs its initialisers, as every program that uses CUDA does.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Device(
            "there is no CUDA driver (libcuda) on this machine".to_owned(),
        ));
    }
    cuda::init().map_err(|error| failed("the CUDA driver does not start", error))
}

/// A GPU that the kernels are made for.
pub(super) struct Found {
    pub device: sys::CUdevice,
    pub name: String,
    /// Compute capability and multiprocessors.
    pub kind: [i32; 3],
}

impl Found {
    /// The driver must have been opened.
    pub fn gpu(ordinal: usize) -> Result<Self, Error> {
        let index = i32::try_from(ordinal).unwrap_or(i32::MAX);
        let device = cuda::device::get(index)
            .map_err(|error| failed(&format!("there is no GPU {ordinal}"), error))?;
        let name = cuda::device::get_name(device).map_err(|error| failed("a GPU's name", error))?;
        let attribute = |attribute| {
            // SAFETY: a device that was just found.
            unsafe { cuda::device::get_attribute(device, attribute) }
                .map_err(|error| failed("a GPU's attributes", error))
        };
        let major = attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(Error::Device(format!(
                "{name} has compute capability {major}.{minor}, the kernels need 8.0 or newer"
            )));
        }
        let multiprocessors = attribute(DeviceAttribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Self {
            device,
            name,
            kind: [major, minor, multiprocessors],
        })
    }
}
