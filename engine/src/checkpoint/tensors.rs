//! [`Tensors`]: the weights of a checkpoint by name.

use std::borrow::Cow;
use std::collections::BTreeMap;

use quire_kernels::Format;
use safetensors::tensor::{Dtype, TensorInfo};
use serde_json::{Map, Value};

use super::CheckpointError;
use super::files::{Bytes, Files};
use super::gguf::{self, TensorInfo as GgufInfo};
use super::quantised::{self, Found, Layout, Plan};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Either is in every directory with safetensors.
pub(super) const FILES: [&str; 2] = [SINGLE, INDEX];
/// Longer headers are refused, as by the format's reference implementation.
const LONGEST_HEADER: u64 = 100_000_000;

/// The tensors of a checkpoint by name, memory-mapped (or static, for the demo model).
#[derive(Debug)]
pub struct Tensors {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    /// Matrices that several tensors make up, by the names they would have as one.
    combined: BTreeMap<String, Combined>,
    /// Names in the file are llama.cpp's.
    gguf: Option<gguf::Names>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    bytes: Bytes,
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    /// How elements are stored, or the name of a type that is not supported.
    format: Result<Format, String>,
    shape: Vec<usize>,
    begin: usize,
    end: usize,
    /// Rows of heads of this size are stored with the two halves of a head interleaved.
    interleaved: Option<usize>,
}

/// A matrix that several tensors make up.
#[derive(Debug)]
struct Combined {
    /// The tensors, in the order the layout wants them.
    parts: Vec<(String, Entry)>,
    shape: Vec<usize>,
    description: String,
    layout: Box<dyn Layout>,
}

/// A tensor as it is in the file, whatever its type.
#[derive(Debug, Clone, Copy)]
pub(super) struct Raw<'a> {
    pub file: &'a str,
    /// As safetensors spells it.
    pub dtype: &'a str,
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// One tensor's bytes, little-endian, row-major.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// How the elements are stored.
    pub format: Format,
    /// Its shape.
    pub shape: &'a [usize],
    /// Exactly as many bytes as type and shape demand.
    pub data: Cow<'a, [u8]>,
    /// The input feature of each column of a matrix, where they are sorted. `[cols]`
    pub order: Option<Vec<u32>>,
}

impl Tensors {
    pub(super) fn open(files: &Files) -> Result<Self, CheckpointError> {
        let mut tensors = Self {
            shards: Vec::new(),
            entries: BTreeMap::new(),
            combined: BTreeMap::new(),
            gguf: None,
        };
        if let Some(bytes) = files.map(SINGLE)? {
            tensors.add(SINGLE, bytes)?;
            return Ok(tensors);
        }
        let Some(index) = files.json(INDEX)? else {
            return Err(files.missing(&format!("{SINGLE} and no {INDEX}")));
        };
        let map = index["weight_map"]
            .as_object()
            .ok_or_else(|| CheckpointError::file(INDEX, "no object `weight_map`"))?;
        let mut names: Vec<&str> = Vec::new();
        for (tensor, shard) in map {
            let shard = shard.as_str().unwrap_or_default();
            // A shard is a file beside the index, nothing else.
            let plain = !shard.is_empty()
                && !shard.contains(['/', '\\'])
                && shard != ".."
                && std::path::Path::new(shard)
                    .extension()
                    .is_some_and(|e| e == "safetensors");
            if !plain {
                return Err(CheckpointError::Field {
                    file: INDEX.into(),
                    field: tensor.clone(),
                    value: map[tensor].to_string(),
                    expected: "the name of a .safetensors file in the same directory".to_owned(),
                });
            }
            names.push(shard);
        }
        names.sort_unstable();
        names.dedup();
        for name in names {
            let bytes = files.map(name)?.ok_or_else(|| files.missing(name))?;
            tensors.add(name, bytes)?;
        }
        if let Some(absent) = map.keys().find(|name| !tensors.contains(&of_text(name))) {
            return Err(CheckpointError::file(
                INDEX,
                format!("tensor `{absent}` is in none of the shards"),
            ));
        }
        Ok(tensors)
    }

    /// Reads a shard's header.
    fn add(&mut self, name: &str, bytes: Bytes) -> Result<(), CheckpointError> {
        let data = bytes.as_slice();
        let wrong = |problem: String| CheckpointError::file(name, problem);
        let (begin, header) = header(data).map_err(wrong)?;
        let length = data.len() - begin;
        let shard = self.shards.len();
        // The tensors cover the data, one after the other.
        let mut tensors = Vec::with_capacity(header.len());
        for (tensor, info) in header {
            if tensor == "__metadata__" {
                continue;
            }
            let info: TensorInfo = serde_json::from_value(info)
                .map_err(|error| wrong(format!("tensor `{tensor}`: {error}")))?;
            tensors.push((tensor, info));
        }
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut covered = 0;
        for (tensor, info) in tensors {
            let (from, to) = info.data_offsets;
            if from != covered || to < from {
                return Err(wrong(format!(
                    "tensor `{tensor}` lies at {from}..{to}, expected it to begin at {covered}"
                )));
            }
            if to > length {
                return Err(wrong(format!(
                    "tensor `{tensor}` lies at {from}..{to}, but there are {length} bytes of data (is the file truncated?)"
                )));
            }
            let bits = info
                .shape
                .iter()
                .try_fold(info.dtype.bitsize(), |bits, &size| bits.checked_mul(size));
            if bits.is_none() || bits != (to - from).checked_mul(8) {
                return Err(wrong(format!(
                    "tensor `{tensor}` of shape {:?} and type {:?} has {} bytes",
                    info.shape,
                    info.dtype,
                    to - from
                )));
            }
            covered = to;
            let entry = Entry {
                shard,
                format: match info.dtype {
                    Dtype::F32 => Ok(Format::F32),
                    Dtype::F16 => Ok(Format::F16),
                    Dtype::BF16 => Ok(Format::Bf16),
                    other => Err(format!("{other:?}")),
                },
                shape: info.shape,
                begin: begin + from,
                end: begin + to,
                interleaved: None,
            };
            if self.entries.insert(of_text(&tensor), entry).is_some() {
                return Err(wrong(format!("tensor `{tensor}` is in another shard too")));
            }
        }
        if covered != length {
            return Err(wrong(format!(
                "{length} bytes of data, but its tensors have {covered}"
            )));
        }
        self.shards.push(Shard {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }

    /// The tensor `name`, which must have exactly `shape`.
    ///
    /// # Errors
    /// There is none, or it has another shape, or its elements are of a type that is not supported.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, CheckpointError> {
        if let Some(combined) = self.combined.get(name) {
            return self.get_combined(name, combined, shape);
        }
        let entry = self.entry(name, shape)?;
        let format = match &entry.format {
            Ok(format) => *format,
            Err(dtype) => {
                return Err(CheckpointError::Dtype {
                    file: self.shards[entry.shard].name.clone(),
                    name: self.spelt(name),
                    dtype: dtype.clone(),
                    expected: if self.gguf.is_some() {
                        "F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0 or MXFP4"
                    } else {
                        "F32, F16 or BF16"
                    },
                });
            }
        };
        let data = &self.shards[entry.shard].bytes.as_slice()[entry.begin..entry.end];
        Ok(TensorView {
            format,
            shape: &entry.shape,
            data: match entry.interleaved {
                None => Cow::Borrowed(data),
                Some(head) => Cow::Owned(in_halves(data, shape[0], head)),
            },
            order: None,
        })
    }

    /// A matrix that several tensors make up, its rows brought into the form of one format.
    fn get_combined<'a>(
        &'a self,
        name: &str,
        combined: &'a Combined,
        shape: &[usize],
    ) -> Result<TensorView<'a>, CheckpointError> {
        let (first, entry) = &combined.parts[0];
        let file = &self.shards[entry.shard].name;
        if combined.shape != shape {
            return Err(CheckpointError::Shape {
                file: file.clone(),
                name: name.to_owned(),
                found: combined.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let wrong =
            |problem: String| CheckpointError::file(file, format!("tensor `{first}`: {problem}"));
        let parts: Vec<&[u8]> = combined
            .parts
            .iter()
            .map(|(_, entry)| self.bytes_of(entry))
            .collect();
        let layout = &*combined.layout;
        let plan: Plan = layout.plan(&parts).map_err(wrong)?;
        let data = quantised::rows(layout, &plan, &parts, shape).map_err(wrong)?;
        Ok(TensorView {
            format: plan.format,
            shape: &combined.shape,
            data: Cow::Owned(data),
            order: plan.order,
        })
    }

    /// Takes what has been read so far out of this process's memory; it can be read again.
    pub(crate) fn release(&self) {
        for shard in &self.shards {
            shard.bytes.release();
        }
    }

    fn bytes_of(&self, entry: &Entry) -> &[u8] {
        &self.shards[entry.shard].bytes.as_slice()[entry.begin..entry.end]
    }

    /// The tensor `name` as it is in the file.
    pub(super) fn raw(&self, name: &str) -> Option<Raw<'_>> {
        let entry = self.entries.get(name)?;
        let dtype = match &entry.format {
            Ok(Format::F32) => "F32",
            Ok(Format::F16) => "F16",
            Ok(Format::Bf16) => "BF16",
            Ok(other) => other.name(),
            Err(other) => other,
        };
        Some(Raw {
            file: &self.shards[entry.shard].name,
            dtype,
            shape: &entry.shape,
            data: self.bytes_of(entry),
        })
    }

    /// Puts one matrix in the place of the tensors that make it up.
    pub(super) fn combine(&mut self, found: Found) {
        for spent in &found.spent {
            self.entries.remove(spent);
        }
        let parts = found.parts.into_iter();
        let parts = parts.filter_map(|name| self.entries.remove_entry(&name));
        let combined = Combined {
            parts: parts.collect(),
            shape: found.shape,
            description: found.description,
            layout: found.layout,
        };
        let name = format!("{}.weight", found.module);
        // Floats beside them would be the same matrix once more.
        self.entries.remove(&name);
        self.combined.insert(name, combined);
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry, CheckpointError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(CheckpointError::MissingTensor {
                name: self.spelt(name),
                shape: shape.to_vec(),
                hint: self.hint(name),
            });
        };
        if entry.shape != shape {
            return Err(CheckpointError::Shape {
                file: self.shards[entry.shard].name.clone(),
                name: self.spelt(name),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        Ok(entry)
    }

    /// The bytes of the tensor `name`, whose elements are unsigned bytes that mean something only with another tensor.
    ///
    /// # Errors
    /// There is none, or it has another shape, or other elements.
    pub fn bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8], CheckpointError> {
        let entry = self.entry(name, shape)?;
        let shard = &self.shards[entry.shard];
        if entry.format.as_ref().err().map(String::as_str) != Some("U8") {
            let dtype = match &entry.format {
                Ok(format) => format.name().to_owned(),
                Err(dtype) => dtype.clone(),
            };
            return Err(CheckpointError::Dtype {
                file: shard.name.clone(),
                name: self.spelt(name),
                dtype,
                expected: "U8",
            });
        }
        Ok(self.bytes_of(entry))
    }

    /// The tensors of GGUF files: `(file, bytes, tensors)`. `interleaved`: query and key rows are, in heads of this size.
    pub(super) fn from_gguf(
        parts: impl Iterator<Item = (String, Bytes, Vec<GgufInfo>)>,
        names: gguf::Names,
        interleaved: Option<usize>,
    ) -> Result<Self, CheckpointError> {
        let mut tensors = Self {
            shards: Vec::new(),
            entries: BTreeMap::new(),
            combined: BTreeMap::new(),
            gguf: Some(names),
        };
        for (name, bytes, infos) in parts {
            let shard = tensors.shards.len();
            for info in infos {
                let rotated = [".attn_q.", ".attn_k."]
                    .iter()
                    .any(|part| info.name.contains(part));
                // Rows that are no whole heads have the wrong shape, and are refused for that.
                let whole = |head: &usize| {
                    info.shape
                        .first()
                        .is_some_and(|rows| rows.is_multiple_of(*head))
                };
                let entry = Entry {
                    shard,
                    format: info.format,
                    begin: info.bytes.start,
                    end: info.bytes.end,
                    interleaved: interleaved.filter(|_| rotated).filter(whole),
                    shape: info.shape,
                };
                if tensors
                    .entries
                    .insert(names.ours(&info.name), entry)
                    .is_some()
                {
                    return Err(CheckpointError::file(
                        name,
                        format!("tensor `{}` is there twice", info.name),
                    ));
                }
            }
            tensors.shards.push(Shard { name, bytes });
        }
        Ok(tensors)
    }

    /// The tensor's name in the file.
    fn spelt(&self, name: &str) -> String {
        match self.gguf {
            Some(names) => names.theirs(name),
            None => name.to_owned(),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name) || self.combined.contains_key(name)
    }

    /// The shape of the tensor `name`, if there is one.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let combined = self.combined.get(name).map(|combined| &combined.shape);
        let shape = combined.or_else(|| Some(&self.entries.get(name)?.shape))?;
        Some(shape)
    }

    /// Bytes of the tensor `name` and how they are stored: the format's name, or that of a type that is not supported.
    pub fn stored(&self, name: &str) -> Option<(usize, &str)> {
        if let Some(combined) = self.combined.get(name) {
            let bytes = combined.parts.iter().map(|(_, part)| part.end - part.begin);
            return Some((bytes.sum(), &combined.description));
        }
        let entry = self.entries.get(name)?;
        let format = match &entry.format {
            Ok(format) => format.name(),
            Err(other) => other,
        };
        Some((entry.end - entry.begin, format))
    }

    /// The format that most bytes are stored in.
    pub fn prevailing_format(&self) -> &str {
        let mut bytes: BTreeMap<&str, usize> = BTreeMap::new();
        for (size, format) in self.names().filter_map(|name| self.stored(name)) {
            *bytes.entry(format).or_default() += size;
        }
        let most = bytes.into_iter().max_by_key(|&(_, size)| size);
        most.map_or("", |(format, _)| format)
    }

    /// The tensors' names: matrices that several tensors make up, then the others, each in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.combined.keys().chain(self.entries.keys());
        names.map(String::as_str)
    }

    /// Bytes of all tensors, for progress and memory planning.
    pub fn total_bytes(&self) -> u64 {
        let stored = self.names().filter_map(|name| self.stored(name));
        stored.map(|(bytes, _)| bytes as u64).sum()
    }

    /// A tensor the model will not ask for.
    pub(super) fn leave_out(&mut self, name: &str) {
        self.entries.remove(name);
        self.combined.remove(name);
    }

    /// A tensor whose name ends alike, for a reader who wonders where it went.
    fn hint(&self, name: &str) -> String {
        let bare = name.strip_prefix("model.").unwrap_or(name);
        let alike = |other: &&str| {
            other
                .strip_suffix(bare)
                .is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        self.names()
            .find(alike)
            .map_or_else(String::new, |other| format!(" (there is `{other}`)"))
    }
}

/// A tensor's name in a model of text alone, for one of a model for pictures and text: transformers 4 and 5 put the text part elsewhere.
fn of_text(name: &str) -> String {
    match (
        name.strip_prefix("language_model."),
        name.strip_prefix("model.language_model."),
    ) {
        (Some(rest), _) => rest.to_owned(),
        (None, Some(rest)) => format!("model.{rest}"),
        (None, None) => name.to_owned(),
    }
}

/// Rows `0, 1, 2, …` of each head, which belong to positions `0, head / 2, 1, head / 2 + 1, …`, put there.
///
/// Whole rows move, so quantised ones stay exact.
fn in_halves(data: &[u8], rows: usize, head: usize) -> Vec<u8> {
    let row = data.len() / rows.max(1);
    let half = head / 2;
    let mut out = Vec::with_capacity(data.len());
    for to in 0..rows {
        let (first, within) = (to / head * head, to % head);
        let from = first + 2 * (within % half) + within / half;
        out.extend_from_slice(&data[from * row..(from + 1) * row]);
    }
    out
}

/// Where a safetensors file's data begins, and its header: 8 bytes of length, then as much JSON.
fn header(data: &[u8]) -> Result<(usize, Map<String, Value>), String> {
    let Some((length, rest)) = data.split_first_chunk::<8>() else {
        return Err(format!(
            "not a safetensors file: it has {} bytes",
            data.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST_HEADER {
        return Err(format!(
            "not a safetensors file: its header would have {length} bytes"
        ));
    }
    let Some(json) = rest.get(..length as usize) else {
        return Err(format!(
            "its header has {length} bytes, but {} follow (is the file truncated?)",
            rest.len()
        ));
    };
    let header = serde_json::from_slice(json)
        .map_err(|error| format!("its header is not valid JSON: {error}"))?;
    Ok((8 + json.len(), header))
}
