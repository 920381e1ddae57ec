//! [`Library`]: cuBLASLt, where it is found, for dense products with many rows. Which algorithm suits a shape is asked once and remembered; of a shape
//! that none suits it says so before a step is recorded, and our kernels do its work.

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

/// Set to 0, it is as if the library were not there: our own kernels do all of its work.
const WANTED: &str = "QUIRE_CUDA_LIBRARY";

/// Above so many rows they are rounded up for the choice of an algorithm: prompts have any number of rows, and each would be asked about and remembered.
const EXACT_ROWS: u32 = 512;
/// What they are rounded to: no tile of an algorithm is larger by less.
const ROWS: u32 = 64;

pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    stream: driver::CUstream,
    workspace: driver::CUdeviceptr,
    /// By shapes as [`key`] has them; `None`: no algorithm.
    products: Mutex<HashMap<DenseShape, Option<Product>>>,
}

/// A product's descriptions.
struct Described {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Drop for Described {
    fn drop(&mut self) {
        // Nothing is left to be done about an error here.
        // SAFETY: handles of ours, each destroyed once; what is on the stream was described when it was put there.
        unsafe {
            if !self.product.is_null() {
                let _ = lt::destroy_matmul_desc(self.product);
            }
            let layouts = [self.w, self.x, self.out].into_iter();
            for layout in layouts.filter(|layout| !layout.is_null()) {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// A product and its algorithm.
struct Product {
    described: Described,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The shape that an algorithm is asked for.
fn key(shape: DenseShape) -> DenseShape {
    let rows = match shape.rows {
        0..=EXACT_ROWS => shape.rows,
        rows => rows.div_ceil(ROWS).saturating_mul(ROWS),
    };
    DenseShape { rows, ..shape }
}

fn failed(what: &str, error: lt::CublasError) -> Error {
    Error::Device(format!("cuBLASLt, {what}: {error}"))
}

impl Library {
    /// Opens the library.
    ///
    /// # Errors
    /// Why there is none, as far as anybody needs to know: our kernels do its work then.
    pub fn open(stream: driver::CUstream) -> Result<Self, String> {
        if std::env::var_os(WANTED).is_some_and(|value| value == "0") {
            return Err("which is switched off".to_owned());
        }
        // SAFETY: opens the library and runs its initialisers, as every program that uses it does.
        if !unsafe { sys::is_culib_present() } {
            return Err("which was not found".to_owned());
        }
        // Another version than the driver's, say.
        let handle =
            lt::create_handle().map_err(|error| format!("which does not start: {error}"))?;
        // SAFETY: plain memory, given back when this is dropped.
        let workspace = match unsafe { cuda::malloc_sync(WORKSPACE) } {
            Ok(workspace) => workspace,
            Err(error) => {
                // SAFETY: a handle that was just made.
                let _ = unsafe { lt::destroy_handle(handle) };
                return Err(format!("for which there is no workspace: {error:?}"));
            }
        };
        Ok(Self {
            handle,
            stream,
            workspace,
            products: Mutex::default(),
        })
    }

    /// Whether there is an algorithm for a product.
    pub fn supports(&self, shape: DenseShape) -> bool {
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        let product = products.entry(key(shape));
        product
            .or_insert_with_key(|&shape| self.describe(shape).ok())
            .is_some()
    }

    /// Puts a product on the stream, of a shape that is supported.
    pub fn run(&self, dense: &Dense) -> Result<(), Error> {
        let shape = dense.shape;
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        // An algorithm for rounded rows may not do for these: found out once.
        let known = match products.get(&shape) {
            None => products.get(&key(shape)),
            exact => exact,
        };
        if let Some(Some(product)) = known {
            let done = self.put(product, dense);
            if done.is_ok() || key(shape) == shape {
                return done;
            }
        }
        let product = self.describe(shape)?;
        let done = self.put(&product, dense);
        products.insert(shape, Some(product));
        done
    }

    fn put(&self, product: &Product, dense: &Dense) -> Result<(), Error> {
        let Described {
            product: what,
            w,
            x,
            out,
        } = product.described;
        let rows = u64::from(dense.shape.rows);
        let alpha = 1.0_f32;
        let beta = if dense.shape.add { 1.0_f32 } else { 0.0 };
        // SAFETY: descriptions made for these operands, used by nobody else meanwhile (their map is locked) and told how many rows there are; the operands'
        // memory is alive until the stream has passed here; the scalars are read before the call returns.
        unsafe {
            for layout in [x, out] {
                lt::set_matrix_layout_attribute(
                    layout,
                    sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS,
                    (&raw const rows).cast(),
                    size_of::<u64>(),
                )
                .map_err(|error| failed("a number of rows", error))?;
            }
            lt::matmul(
                self.handle,
                what,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                dense.w as *const c_void,
                w,
                dense.x as *const c_void,
                x,
                dense.out as *const c_void,
                out,
                dense.out as *mut c_void,
                out,
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
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
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
        let mut described = Described {
            product: std::ptr::null_mut(),
            w: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            out: std::ptr::null_mut(),
        };
        described.product =
            lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, float)
                .map_err(describing)?;
        // CUBLAS_OP_T; the bindings leave cublasOperation_t out.
        let transposed = 1_i32;
        // SAFETY: a descriptor that was just made, and an attribute of its type.
        unsafe {
            lt::set_matmul_desc_attribute(
                described.product,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }
        .map_err(describing)?;
        described.w = layout(operand, cols, features, shape.cols)?;
        described.x = layout(operand, cols, rows, shape.x_stride)?;
        described.out = layout(float, features, rows, shape.out_stride)?;
        let workspace = WORKSPACE as u64;
        let [of_w, of_x, of_out] = shape.alignments;
        // The output is read, too: it is C as well as D. Without being told, an algorithm expects all four to be aligned to 256 bytes.
        let alignments = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, of_w),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, of_x),
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                of_out,
            ),
            (
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
                of_out,
            ),
        ];
        let preference = lt::create_matmul_pref().map_err(describing)?;
        // SAFETY: descriptions that were just made, and attributes of their types; the preference is not needed afterwards.
        let heuristic = unsafe {
            let set = lt::set_matmul_pref_attribute(
                preference,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<u64>(),
            );
            let set = alignments.iter().fold(set, |set, (attribute, bytes)| {
                set.and_then(|()| {
                    let bytes = std::ptr::from_ref(bytes).cast();
                    lt::set_matmul_pref_attribute(preference, *attribute, bytes, size_of::<u32>())
                })
            });
            let Described { product, w, x, out } = described;
            let heuristic = set.and_then(|()| {
                lt::get_matmul_algo_heuristic(self.handle, product, w, x, out, out, preference)
            });
            lt::destroy_matmul_pref(preference).map_err(describing)?;
            heuristic.map_err(|error| failed(&format!("an algorithm for {shape:?}"), error))?
        };
        Ok(Product {
            described,
            algorithm: heuristic.algo,
        })
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.products
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        // Nothing is left to be done about an error here.
        // SAFETY: handles of ours, each destroyed once, after everything on the stream is done.
        unsafe {
            let _ = cuda::free_sync(self.workspace);
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_nearly_as_many_rows_share_an_algorithm() {
        let of = |rows| DenseShape {
            operand: Operand::Bf16,
            rows,
            features: 4096,
            cols: 4096,
            x_stride: 4096,
            out_stride: 4096,
            add: false,
            alignments: [256; 3],
        };
        assert_eq!(key(of(8100)), key(of(8128)));
        assert_eq!(key(of(8128)).rows, 8128);
        assert_ne!(
            key(of(500)),
            key(of(501)),
            "generation has few numbers of rows"
        );
        assert_eq!(key(of(u32::MAX)).rows, u32::MAX);
    }
}
