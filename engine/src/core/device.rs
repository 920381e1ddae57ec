//! [`Device`]: what a model runs on, and how that is decided at start.

use quire_kernels::cpu::{CpuBackend, CpuOptions};

use crate::checkpoint::Checkpoint;
use crate::model::LoadProgress;

use super::config::{EngineConfig, StartError, StepReport};
use super::handle::Engine;

/// What a model runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The machine's first GPU where there is one, and otherwise its CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU, or an error.
    Cuda,
}

/// How the chosen device computes.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeviceOptions {
    /// Which device.
    pub device: Device,
    /// Of a CPU: threads, NUMA nodes, instruction set.
    pub cpu: CpuOptions,
    /// Of a GPU: the same bits under any load, for some of its speed. (A CPU gives them anyway.)
    pub deterministic: bool,
}

impl Engine {
    /// [`Engine::start`] on a device of this machine.
    ///
    /// # Errors
    /// As [`Engine::start`], and where a GPU is demanded that is not there. A GPU that is there and too small is an error too: a model does not become
    /// fifty times slower without a word.
    pub fn start_on(
        checkpoint: &Checkpoint,
        options: DeviceOptions,
        config: &EngineConfig,
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, StartError> {
        match (options.device, gpu(options)) {
            (Device::Auto | Device::Cuda, Ok(gpu)) => {
                Self::start(checkpoint, gpu, config, observer, progress)
            }
            (Device::Cuda, Err(error)) => Err(StartError::Backend(error)),
            (device, gpu) => {
                if let (Device::Auto, Err(why)) = (device, gpu) {
                    tracing::info!(%why, "no GPU to use: the CPU computes");
                }
                let cpu = CpuBackend::new(options.cpu).map_err(StartError::Backend)?;
                Self::start(checkpoint, cpu, config, observer, progress)
            }
        }
    }
}

/// The machine's first GPU.
#[cfg(feature = "cuda")]
fn gpu(options: DeviceOptions) -> Result<quire_kernels::cuda::CudaBackend, quire_kernels::Error> {
    if options.device == Device::Cpu {
        return Err(quire_kernels::Error::Device(
            "the CPU was chosen".to_owned(),
        ));
    }
    quire_kernels::cuda::CudaBackend::new(quire_kernels::cuda::CudaOptions {
        ordinal: 0,
        deterministic: options.deterministic,
    })
}

/// None: this binary was built without GPUs in mind.
#[cfg(not(feature = "cuda"))]
fn gpu(_options: DeviceOptions) -> Result<CpuBackend, quire_kernels::Error> {
    Err(quire_kernels::Error::Device(
        "this binary was built without the feature `cuda`".to_owned(),
    ))
}
