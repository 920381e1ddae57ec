//! [`Device`]: what a model runs on, and how that is decided at start.

use quire_kernels::cpu::{CpuBackend, CpuOptions};

use crate::checkpoint::Checkpoint;
use crate::model::{LoadProgress, check_ranks};

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
#[derive(Debug, Clone, Copy)]
pub struct DeviceOptions {
    /// Which device.
    pub device: Device,
    /// Of a CPU: threads, NUMA nodes, instruction set.
    pub cpu: CpuOptions,
    /// Of a GPU: the same bits under any load, for some of its speed. (A CPU gives them anyway.)
    pub deterministic: bool,
    /// GPUs among which the model is divided, from the machine's first on. More than one is a demand for GPUs.
    pub tensor_parallel_size: usize,
}

impl Default for DeviceOptions {
    /// The device that is found, one of it.
    fn default() -> Self {
        Self {
            device: Device::Auto,
            cpu: CpuOptions::default(),
            deterministic: false,
            tensor_parallel_size: 1,
        }
    }
}

impl Engine {
    /// [`Engine::start`] on a device of this machine.
    ///
    /// # Errors
    /// As [`Engine::start`], and where GPUs are demanded that are not there, or a model of which so many cannot have parts. A GPU that is there and too
    /// small is an error too: a model does not become fifty times slower without a word.
    pub fn start_on(
        checkpoint: &Checkpoint,
        options: DeviceOptions,
        config: &EngineConfig,
        observer: Option<Box<dyn FnMut(StepReport) + Send>>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self, StartError> {
        check_size(checkpoint, options)?;
        let several = options.tensor_parallel_size > 1;
        match (options.device, gpus(options)) {
            (Device::Auto | Device::Cuda, Ok(gpus)) => {
                Self::start_on_ranks(checkpoint, gpus, config, observer, progress)
            }
            (_, Err(why)) if several => {
                let size = options.tensor_parallel_size.to_string();
                Err(setting("--tensor-parallel-size", size, format!("1: {why}")))
            }
            (Device::Cuda, Err(why)) => {
                let expected = format!("cpu or auto: {why}");
                Err(setting("--device", "cuda".to_owned(), expected))
            }
            // A GPU that is full, or kept for another process, is no reason to be fifty times slower without a word.
            (Device::Auto, Err(why)) if has_gpu() => {
                let expected =
                    format!("cpu, since the GPU that is there cannot be used now: {why}");
                Err(setting("--device", "auto".to_owned(), expected))
            }
            (device, gpus) => {
                if let (Device::Auto, Err(why)) = (device, gpus) {
                    // News only where there might have been one.
                    if cfg!(feature = "cuda") {
                        tracing::info!(%why, "no GPU to use: the CPU computes");
                    } else {
                        tracing::debug!(%why, "no GPU to use: the CPU computes");
                    }
                }
                let cpu = CpuBackend::new(options.cpu).map_err(StartError::Backend)?;
                Self::start(checkpoint, cpu, config, observer, progress)
            }
        }
    }
}

fn setting(name: &'static str, value: String, expected: String) -> StartError {
    StartError::Setting {
        name,
        value,
        expected,
    }
}

/// Refuses a number of GPUs that could not have the model, before any is looked for.
fn check_size(checkpoint: &Checkpoint, options: DeviceOptions) -> Result<(), StartError> {
    let size = options.tensor_parallel_size;
    let refused = |expected: &str| {
        setting(
            "--tensor-parallel-size",
            size.to_string(),
            expected.to_owned(),
        )
    };
    if size == 0 {
        return Err(refused("1 or more"));
    }
    if size > 1 && options.device == Device::Cpu {
        return Err(refused(
            "1 on a CPU: its memory nodes divide weights, KV cache and threads among themselves (--numa)",
        ));
    }
    Ok(check_ranks(&checkpoint.config, size)?)
}

/// Whether there is a GPU that the kernels are made for, whatever state it is in.
fn has_gpu() -> bool {
    #[cfg(feature = "cuda")]
    let there = quire_kernels::cuda::has_gpu();
    #[cfg(not(feature = "cuda"))]
    let there = false;
    there
}

/// The machine's first GPUs, as many as are asked for: the ranks of a group, if they are several.
#[cfg(feature = "cuda")]
fn gpus(
    options: DeviceOptions,
) -> Result<Vec<quire_kernels::cuda::CudaBackend>, quire_kernels::Error> {
    use quire_kernels::cuda::{CudaBackend, CudaOptions};

    if options.device == Device::Cpu {
        return Err(quire_kernels::Error::Device(
            "the CPU was chosen".to_owned(),
        ));
    }
    let of_gpu = CudaOptions {
        ordinal: 0,
        deterministic: options.deterministic,
    };
    match options.tensor_parallel_size {
        1 => Ok(vec![CudaBackend::new(of_gpu)?]),
        several => CudaBackend::group(of_gpu, several),
    }
}

/// None: this binary was built without GPUs in mind.
#[cfg(not(feature = "cuda"))]
fn gpus(_options: DeviceOptions) -> Result<Vec<CpuBackend>, quire_kernels::Error> {
    Err(quire_kernels::Error::Device(
        "this binary was built without the feature `cuda` (docs/gpu.md says how)".to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ModelSource;

    fn refused(device: Device, tensor_parallel_size: usize) -> String {
        let checkpoint = Checkpoint::open(&ModelSource::Demo).expect("it is part of the binary");
        let options = DeviceOptions {
            device,
            tensor_parallel_size,
            ..DeviceOptions::default()
        };
        let config = EngineConfig::default();
        let started = Engine::start_on(&checkpoint, options, &config, None, &mut |_| {});
        started.expect_err("it is refused").to_string()
    }

    #[test]
    fn a_number_of_gpus_that_cannot_be_is_refused_with_what_can() {
        let text = refused(Device::Auto, 0);
        assert!(text.contains("--tensor-parallel-size is 0"), "{text}");
        let text = refused(Device::Cpu, 2);
        assert!(text.contains("--numa"), "{text}");
        // The demo model has fewer heads.
        for device in [Device::Auto, Device::Cuda] {
            let text = refused(device, 7);
            assert!(text.contains("among 7 ranks: its"), "{text}");
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn several_gpus_are_a_demand_for_gpus() {
        for device in [Device::Auto, Device::Cuda] {
            let text = refused(device, 3);
            assert!(
                text.starts_with("--tensor-parallel-size is 3, expected 1: this binary was built without the feature"),
                "{text}"
            );
        }
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_demand_for_a_gpu_is_refused_with_its_flag() {
        let text = refused(Device::Cuda, 1);
        assert!(
            text.starts_with(
                "--device is cuda, expected cpu or auto: this binary was built without the feature"
            ),
            "{text}"
        );
    }
}
