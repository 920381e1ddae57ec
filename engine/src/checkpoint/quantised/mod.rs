//! Quantised matrices of safetensors checkpoints: MLX, GPTQ, AWQ, BitNet, FP8 and compressed-tensors.
//!
//! Each of these stores a matrix as several tensors — packed integers, scales, zeros — and says in `config.json` how. [`assemble`] finds what belongs
//! together, checks every shape and type, and puts one tensor of the usual name and shape in their place; [`Tensors::get`] then answers as for any
//! other, with rows in the form the kernels take. So nothing above knows that a matrix was several tensors, and what a format costs is one file here that
//! recognises it: how integers are read stands once in [`integers`], for E4M3 floats in [`float8`].
//!
//! **Invariant:** weights are brought into another order and never to another value (but for BitNet's floats with `quantization_mode: online`, which are rounded as
//! the checkpoint asks), one matrix at a time: there are never two copies of a model.

mod awq;
mod bitnet;
mod compressed;
mod float8;
mod gptq;
mod integers;
mod mlx;

use quire_kernels::Format;
use quire_kernels::quantize::{Bits, Scale};
use serde_json::Value;

use super::tensors::{Raw, Tensors};
use super::{CheckpointError, config};

/// Matrices of at least so many bytes are read by several threads.
const LARGE: usize = 1 << 20;

/// How a matrix is made of the tensors that store it.
pub(super) trait Layout: std::fmt::Debug + Send + Sync {
    /// Reads what all rows share. `Err` says what is wrong with the tensors' contents.
    fn plan(&self, parts: &[&[u8]]) -> Result<Plan, String>;

    /// Writes row `row` in the form of the plan's format to `out`, which is zero. `scratch` is memory to work in.
    fn row(
        &self,
        parts: &[&[u8]],
        plan: &Plan,
        row: usize,
        scratch: &mut Vec<u8>,
        out: &mut [u8],
    ) -> Result<(), String>;
}

/// What is known of a matrix once its small tensors are read.
#[derive(Debug)]
pub(super) struct Plan {
    pub format: Format,
    /// The input feature of each column, where they are sorted.
    pub order: Option<Vec<u32>>,
    /// For each of the format's groups, the checkpoint's group that it belongs to.
    pub groups: Vec<u32>,
    /// The scale of all rows, where there is one.
    pub scale: f32,
}

/// A matrix that is several tensors, found and checked.
#[derive(Debug)]
pub(super) struct Found {
    /// The module's name: the matrix is `{module}.weight`.
    pub module: String,
    /// The tensors it is made of, as [`Layout`] expects them; the first names it in errors.
    pub parts: Vec<String>,
    /// Tensors that say what is known by now.
    pub spent: Vec<String>,
    /// Its shape; what comes before the columns are rows.
    pub shape: Vec<usize>,
    /// The format's name and what differs between files of it.
    pub description: String,
    pub layout: Box<dyn Layout>,
}

/// Finds the quantised matrices of a checkpoint with this `config.json`.
pub(super) fn assemble(tensors: &mut Tensors, json: &Value) -> Result<(), CheckpointError> {
    let quantisation = &json["quantization_config"];
    let method = &quantisation["quant_method"];
    // MLX writes a copy of its section under the name the others use.
    let mlx = ["quantization", "quantization_config"]
        .into_iter()
        .find(|&field| {
            let section = &json[field];
            section.is_object() && section["quant_method"].is_null() && !section["bits"].is_null()
        });
    let found = match (method.as_str(), mlx) {
        (_, Some(field)) => mlx::find(tensors, field, &json[field])?,
        (Some("gptq"), _) => gptq::find(tensors, &Section(quantisation))?,
        (Some("awq"), _) => awq::find(tensors, &Section(quantisation))?,
        (Some("bitnet"), _) => bitnet::find(tensors, &Section(quantisation))?,
        (Some("fp8"), _) => float8::find(tensors, &Section(quantisation))?,
        (Some("compressed-tensors"), _) => compressed::find(tensors, &Section(quantisation))?,
        // gpt-oss: its experts are read as they are, in `model/experts.rs`.
        (Some("mxfp4"), _) => return Ok(()),
        _ if quantisation.is_null() => return Ok(()),
        _ => {
            return Err(config::wrong(
                "quantization_config.quant_method",
                method,
                "gptq, awq, bitnet, fp8, compressed-tensors or mxfp4, or the fields that MLX writes",
            ));
        }
    };
    for found in found {
        tensors.combine(found);
    }
    Ok(())
}

/// All rows of a matrix, in the form of the plan's format.
pub(super) fn rows(
    layout: &dyn Layout,
    plan: &Plan,
    parts: &[&[u8]],
    shape: &[usize],
) -> Result<Vec<u8>, String> {
    let too_large = || format!("a matrix of shape {shape:?} is not supported");
    let (&cols, before) = shape.split_last().ok_or_else(too_large)?;
    let rows = before.iter().product::<usize>();
    let bytes = plan.format.row_bytes(cols).ok_or_else(too_large)?;
    let total = bytes.checked_mul(rows).ok_or_else(too_large)?;
    if total == 0 {
        return Ok(Vec::new());
    }
    let mut out = vec![0; total];
    let threads = match total {
        0..LARGE => 1,
        _ => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let share = rows.div_ceil(threads).max(1);
    let read = |first: usize, out: &mut [u8]| -> Result<(), String> {
        let mut scratch = Vec::new();
        for (i, out) in out.chunks_exact_mut(bytes).enumerate() {
            layout.row(parts, plan, first + i, &mut scratch, out)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let shares = out.chunks_mut(share * bytes).enumerate();
        let started: Vec<_> = shares
            .map(|(i, out)| scope.spawn(move || read(i * share, out)))
            .collect();
        started.into_iter().try_for_each(|thread| {
            let read = thread.join();
            read.unwrap_or_else(|_| Err("it could not be read".to_owned()))
        })
    })?;
    Ok(out)
}

/// `quantization_config` of `config.json`.
struct Section<'a>(&'a Value);

impl Section<'_> {
    fn wrong(&self, field: &str, expected: &str) -> CheckpointError {
        let path = format!("quantization_config.{field}");
        config::wrong(&path, &self.0[field], expected)
    }

    /// `bits`, which must be one of `allowed`.
    fn bits(&self, field: &str, allowed: &[Bits]) -> Result<Bits, CheckpointError> {
        let value = self.0[field].as_u64();
        let bits = allowed
            .iter()
            .find(|bits| Some(bits.count() as u64) == value);
        bits.copied().ok_or_else(|| {
            let allowed: Vec<String> = allowed.iter().map(|b| b.count().to_string()).collect();
            self.wrong(field, &allowed.join(" or "))
        })
    }

    /// The size of a group along k; `None`: all of k.
    fn group_size(&self, field: &str) -> Result<Option<usize>, CheckpointError> {
        match (self.0[field].as_i64(), self.0[field].as_u64()) {
            (Some(-1), _) => Ok(None),
            (_, Some(size @ 1..=0xffff_ffff)) if size % 32 == 0 => Ok(Some(size as usize)),
            _ => Err(self.wrong(field, "a multiple of 32, or -1")),
        }
    }

    fn flag(&self, field: &str, default: bool) -> Result<bool, CheckpointError> {
        match &self.0[field] {
            Value::Null => Ok(default),
            Value::Bool(value) => Ok(*value),
            _ => Err(self.wrong(field, "true or false")),
        }
    }
}

/// The modules that have a tensor of this name.
fn modules(tensors: &Tensors, suffix: &str) -> Vec<String> {
    let module = |name: &str| Some(name.strip_suffix(suffix)?.strip_suffix('.')?.to_owned());
    tensors.names().filter_map(module).collect()
}

/// A tensor that must be there, with one of these types; an empty shape means any.
fn part<'a>(
    tensors: &'a Tensors,
    name: &str,
    dtypes: &[&str],
    expected: &'static str,
    shape: &[usize],
) -> Result<Raw<'a>, CheckpointError> {
    let raw = tensors
        .raw(name)
        .ok_or_else(|| CheckpointError::MissingTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            hint: String::new(),
        })?;
    if !dtypes.contains(&raw.dtype) {
        return Err(CheckpointError::Dtype {
            file: raw.file.to_owned(),
            name: name.to_owned(),
            dtype: raw.dtype.to_owned(),
            expected,
        });
    }
    if !shape.is_empty() && raw.shape != shape {
        return Err(misshapen(name, &raw, shape));
    }
    Ok(raw)
}

const FLOATS: &[&str] = &["F32", "F16", "BF16"];

/// A tensor of scales or biases, and how they are stored.
fn floats<'a>(
    tensors: &'a Tensors,
    name: &str,
    shape: &[usize],
) -> Result<(Raw<'a>, Scale), CheckpointError> {
    let raw = part(tensors, name, FLOATS, "F32, F16 or BF16", shape)?;
    let scale = match raw.dtype {
        "F32" => Scale::F32,
        "F16" => Scale::F16,
        _ => Scale::Bf16,
    };
    Ok((raw, scale))
}

fn misshapen(name: &str, raw: &Raw<'_>, expected: &[usize]) -> CheckpointError {
    CheckpointError::Shape {
        file: raw.file.to_owned(),
        name: name.to_owned(),
        found: raw.shape.to_vec(),
        expected: expected.to_vec(),
    }
}

/// A tensor's shape as rows and columns of at least one each.
fn matrix(name: &str, raw: &Raw<'_>) -> Result<[usize; 2], CheckpointError> {
    match *raw.shape {
        [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
        _ => Err(CheckpointError::file(
            raw.file,
            format!(
                "tensor `{name}` has shape {:?}, expected a matrix with rows and columns",
                raw.shape
            ),
        )),
    }
}

/// Whether a module is in a list of modules, or inside one that is.
fn listed(list: &Value, module: &str) -> bool {
    let names = list.as_array().into_iter().flatten();
    names.filter_map(Value::as_str).any(|name| {
        let inside = |rest: &str| rest.is_empty() || rest.starts_with('.');
        module.strip_prefix(name).is_some_and(inside)
            || module
                .strip_suffix(name)
                .is_some_and(|before| before.ends_with('.'))
    })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn plural(group: Option<usize>) -> String {
    group.map_or_else(
        || "a group a row".to_owned(),
        |size| format!("groups of {size}"),
    )
}
