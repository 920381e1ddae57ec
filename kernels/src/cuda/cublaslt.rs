//! [`Library`]: cuBLASLt, where it is found, for dense products with many rows. Which algorithm suits a shape is asked once and remembered.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys;
use cudarc::driver::result as cuda;
use cudarc::driver::sys as driver;

use super::device::{Dense, DenseShape, Operand};
use crate::Error;

/// What algorithms may use beside their operands; NVIDIA advises 32 MiB on Hopper.
const WORKSPACE: usize = 32 << 20;

pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    stream: driver::CUstream,
    workspace: driver::CUdeviceptr,
    products: Mutex<HashMap<DenseShape, Product>>,
}

/// A product's description and its algorithm.
struct Product {
    descriptor: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn failed(what: &str, error: lt::CublasError) -> Error {
    Error::Device(format!("cuBLASLt, {what}: {error}"))
}

impl Library {
    /// Opens the library; `None` where there is none.
    pub fn open(stream: driver::CUstream) -> Result<Option<Self>, Error> {
        // SAFETY: opens the library and runs its initialisers, as every program that uses it does.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        // A library that does not start (another version than the driver's, say) is none: our kernels do its work.
        let Ok(handle) = lt::create_handle() else {
            return Ok(None);
        };
        // SAFETY: plain memory, given back when this is dropped.
        let Ok(workspace) = (unsafe { cuda::malloc_sync(WORKSPACE) }) else {
            return Err(Error::OutOfMemory {
                what: "the workspace of cuBLASLt",
                bytes: WORKSPACE,
            });
        };
        Ok(Some(Self {
            handle,
            stream,
            workspace,
            products: Mutex::default(),
        }))
    }

    /// Puts a product on the stream.
    pub fn run(&self, dense: &Dense) -> Result<(), Error> {
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let product = match products.entry(dense.shape) {
            std::collections::hash_map::Entry::Occupied(product) => product.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(self.describe(dense.shape)?)
            }
        };
        let alpha = 1.0_f32;
        let beta = if dense.shape.add { 1.0_f32 } else { 0.0 };
        // SAFETY: descriptions made for these operands, whose memory is alive until the stream has passed here; the scalars are read before
        // the call returns.
        unsafe {
            lt::matmul(
                self.handle,
                product.descriptor,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                dense.w as *const c_void,
                product.w,
                dense.x as *const c_void,
                product.x,
                dense.out as *const c_void,
                product.out,
                dense.out as *mut c_void,
                product.out,
                &raw const product.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                self.stream.cast(),
            )
        }
        .map_err(|error| failed(&format!("{:?}", dense.shape), error))
    }

    /// cuBLASLt counts by column: our `out[r, f]` is its `[f, r]`, the product of the transposed `w` `[k, f]` and `x` `[k, r]`.
    fn describe(&self, shape: DenseShape) -> Result<Product, Error> {
        let operand = match shape.operand {
            Operand::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Operand::F16 => sys::cudaDataType_t::CUDA_R_16F,
        };
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let (rows, features, cols) = (
            u64::from(shape.rows),
            u64::from(shape.features),
            u64::from(shape.cols),
        );
        let describing = |error| failed("a description", error);
        let layout = |kind, rows, cols, stride: u32| {
            lt::create_matrix_layout(kind, rows, cols, i64::from(stride)).map_err(describing)
        };
        let descriptor =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)
                .map_err(describing)?;
        // CUBLAS_OP_T; the bindings leave cublasOperation_t out.
        let transposed = 1_i32;
        // SAFETY: a descriptor that was just made, and an attribute of its type.
        unsafe {
            lt::set_matmul_desc_attribute(
                descriptor,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(describing)?;
        let w = layout(operand, cols, features, shape.cols)?;
        let x = layout(operand, cols, rows, shape.x_stride)?;
        let out = layout(float, features, rows, shape.out_stride)?;
        let workspace = WORKSPACE;
        let preference = lt::create_matmul_pref().map_err(describing)?;
        // SAFETY: descriptions that were just made; the preference is not needed afterwards.
        let heuristic = unsafe {
            lt::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )
            .map_err(describing)?;
            let heuristic =
                lt::get_matmul_algo_heuristic(self.handle, descriptor, w, x, out, out, preference);
            lt::destroy_matmul_pref(preference).map_err(describing)?;
            heuristic.map_err(|error| failed(&format!("an algorithm for {shape:?}"), error))?
        };
        Ok(Product {
            descriptor,
            w,
            x,
            out,
            algorithm: heuristic.algo,
        })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        let products = self
            .products
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // Nothing is left to be done about an error here.
        // SAFETY: handles of ours, each destroyed once, after everything on the stream is done.
        unsafe {
            for (_, product) in products.drain() {
                let _ = lt::destroy_matmul_desc(product.descriptor);
                let _ = lt::destroy_matrix_layout(product.w);
                let _ = lt::destroy_matrix_layout(product.x);
                let _ = lt::destroy_matrix_layout(product.out);
            }
            let _ = cuda::free_sync(self.workspace);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}
