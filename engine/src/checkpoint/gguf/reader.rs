//! The bytes of a GGUF file: header, metadata, tensor table. (ggml's `docs/gguf.md`, versions 2 and 3.)
//!
//! **Invariant:** every length is compared with the bytes that are left before it is believed; nothing is allocated for what the file only claims
//! to hold.

use std::collections::BTreeMap;
use std::ops::Range;

use quire_kernels::Format;

/// Metadata keys are no longer, by the specification.
const LONGEST_KEY: usize = 65_535;
/// Tensor names are no longer than ggml's, with room to spare.
const LONGEST_NAME: usize = 256;
/// ggml's tensors have four dimensions.
const MOST_DIMENSIONS: usize = 4;

/// A parsed GGUF file: what it says about itself, and where its tensors are.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<TensorInfo>,
}

/// Where a tensor is and what it is made of.
#[derive(Debug)]
pub(in crate::checkpoint) struct TensorInfo {
    pub name: String,
    /// Outermost first, as everywhere but in the file.
    pub shape: Vec<usize>,
    /// How its elements are stored, or the name of a type that is not supported.
    pub format: Result<Format, String>,
    /// In the file; empty where the format is not supported.
    pub bytes: Range<usize>,
}

/// A metadata value. Strings and arrays stay in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array(Array),
}

/// An array of scalars or strings.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    kind: u32,
    len: usize,
    bytes: Range<usize>,
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Reads front to back and knows where it is.
struct Reader<'a> {
    data: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8], String> {
        let left = self.data.len() - self.at;
        if len > left as u64 {
            return Err(format!(
                "{what} has {len} bytes at byte {}, but {left} follow (is the file truncated?)",
                self.at
            ));
        }
        let bytes = &self.data[self.at..self.at + len as usize];
        self.at += len as usize;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes
            .try_into()
            .expect("`take` gives as many bytes as asked"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Where a string of at most `longest` bytes is.
    fn string(&mut self, longest: usize, what: &str) -> Result<Range<usize>, String> {
        let len = self.u64(what)?;
        if len > longest as u64 {
            return Err(format!(
                "{what} has {len} bytes, expected at most {longest}"
            ));
        }
        let begin = self.at;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8 text"))?;
        Ok(begin..self.at)
    }

    /// A string's bytes, whatever they are.
    fn bytes(&mut self, what: &str) -> Result<&'a [u8], String> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// A short string of its own.
    fn name(&mut self, longest: usize, what: &str) -> Result<String, String> {
        let range = self.string(longest, what)?;
        Ok(String::from_utf8_lossy(&self.data[range]).into_owned())
    }

    /// A scalar or a string.
    fn value(&mut self, kind: u32, what: &str) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::Unsigned(self.array::<1>(what)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(what)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Unsigned(self.u32(what)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => match self.array::<1>(what)?[0] {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => return Err(format!("{what} is {other}, expected 0 or 1 for a boolean")),
            },
            STRING => Value::String(self.string(usize::MAX, what)?),
            10 => Value::Unsigned(self.u64(what)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(what)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            other => {
                return Err(format!(
                    "{what} has type {other}, expected 0 to 12, and no array in an array"
                ));
            }
        })
    }

    fn any_value(&mut self, what: &str) -> Result<Value, String> {
        let kind = self.u32(what)?;
        if kind != ARRAY {
            return self.value(kind, what);
        }
        let kind = self.u32(what)?;
        let len = self.u64(what)?;
        let begin = self.at;
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            // Each is read, to know where it ends.
            STRING => 0,
            other => {
                return Err(format!(
                    "{what} is an array of type {other}, expected scalars or strings"
                ));
            }
        };
        if kind == STRING {
            let least = len.checked_mul(8);
            if least.is_none_or(|least| least > (self.data.len() - self.at) as u64) {
                return Err(format!(
                    "{what} has {len} strings, more than the file has room for"
                ));
            }
            // Whether it is text is seen when it is read: a vocabulary has hundreds of thousands.
            for _ in 0..len {
                self.bytes(what)?;
            }
        } else {
            let bytes = len
                .checked_mul(size)
                .ok_or_else(|| format!("{what} has {len} elements"))?;
            self.take(bytes, what)?;
        }
        Ok(Value::Array(Array {
            kind,
            len: len as usize,
            bytes: begin..self.at,
        }))
    }
}

impl Array {
    pub fn len(&self) -> usize {
        self.len
    }

    /// The elements, if they are strings; each is `None` if it is not UTF-8 text.
    pub fn strings<'a>(
        &self,
        data: &'a [u8],
    ) -> Option<impl Iterator<Item = Option<&'a str>> + use<'a>> {
        let mut reader = self.reader(data, self.kind == STRING)?;
        let strings = (0..self.len).map_while(move |_| reader.bytes("").ok());
        Some(strings.map(|bytes| std::str::from_utf8(bytes).ok()))
    }

    /// The elements, if they are numbers or booleans.
    pub fn scalars<'a>(&self, data: &'a [u8]) -> Option<impl Iterator<Item = Value> + use<'a>> {
        let mut reader = self.reader(data, self.kind != STRING)?;
        let (kind, len) = (self.kind, self.len);
        Some((0..len).map_while(move |_| reader.value(kind, "").ok()))
    }

    fn reader<'a>(&self, data: &'a [u8], right: bool) -> Option<Reader<'a>> {
        right.then_some(Reader {
            data: &data[..self.bytes.end],
            at: self.bytes.start,
        })
    }
}

impl Value {
    pub fn unsigned(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    pub fn float(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            _ => None,
        }
    }

    /// As JSON spells it; arrays by their elements.
    pub fn json(&self, data: &[u8]) -> serde_json::Value {
        match self {
            Self::Unsigned(value) => (*value).into(),
            Self::Signed(value) => (*value).into(),
            Self::Float(value) => (*value).into(),
            Self::Bool(value) => (*value).into(),
            Self::String(range) => String::from_utf8_lossy(&data[range.clone()]).into(),
            Self::Array(array) => {
                // Long ones are never shown.
                let scalars = array.scalars(data).into_iter().flatten().take(64);
                let strings = array.strings(data).into_iter().flatten().take(64);
                let scalars = scalars.map(|value| value.json(data));
                scalars
                    .chain(strings.map(serde_json::Value::from))
                    .collect()
            }
        }
    }
}

/// Parses a file.
pub(super) fn parse(data: &[u8]) -> Result<Header, String> {
    let mut reader = Reader { data, at: 0 };
    let magic = reader.array::<4>("the header")?;
    if magic != *b"GGUF" {
        return Err(format!(
            "not a GGUF file: it begins with {:?}",
            String::from_utf8_lossy(&magic)
        ));
    }
    let version = reader.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(format!(
            "GGUF version {version}, expected 2 or 3 (or a big-endian file, which is not supported)"
        ));
    }
    let tensor_count = reader.u64("the number of tensors")?;
    let value_count = reader.u64("the number of metadata values")?;
    let mut metadata = BTreeMap::new();
    for i in 0..value_count {
        let key = reader.name(LONGEST_KEY, &format!("the name of metadata value {i}"))?;
        let value = reader.any_value(&format!("`{key}`"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("`{key}` is there twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(value) => match value.unsigned() {
            Some(value) if value.is_power_of_two() && value <= 1 << 20 => value as usize,
            _ => {
                return Err(format!(
                    "`general.alignment` is {}, expected a power of two up to 1048576",
                    value.json(data)
                ));
            }
        },
    };
    let mut infos = Vec::new();
    for i in 0..tensor_count {
        infos.push(raw_info(&mut reader, i)?);
    }
    let begin = reader
        .at
        .checked_next_multiple_of(alignment)
        .filter(|&begin| begin <= data.len() || infos.is_empty())
        .ok_or("the tensors' data is missing (is the file truncated?)")?;
    let length = data.len().saturating_sub(begin) as u64;
    let mut tensors = Vec::with_capacity(infos.len());
    for (name, shape, kind, offset) in infos {
        let wrong = |problem: String| format!("tensor `{name}`{problem}");
        if !offset.is_multiple_of(alignment as u64) {
            return Err(wrong(format!(
                " begins at {offset}, expected a multiple of {alignment}"
            )));
        }
        let format = format(kind);
        let bytes = match &format {
            Err(_) => begin..begin,
            Ok(format) => {
                let cols = shape.last().copied().unwrap_or(1);
                let rows = &shape[..shape.len().saturating_sub(1)];
                let row = format.row_bytes(cols).ok_or_else(|| {
                    wrong(format!(
                        " has rows of {cols} elements, expected a multiple of {} for {}",
                        format.block_size(),
                        format.name()
                    ))
                })?;
                let size = rows.iter().try_fold(row, |size, &n| size.checked_mul(n));
                let end = size.and_then(|size| offset.checked_add(size as u64));
                match end {
                    Some(end) if end <= length => begin + offset as usize..begin + end as usize,
                    _ => {
                        return Err(wrong(format!(
                            " of shape {shape:?} and type {} begins at {offset}, but there are {length} bytes of data (is the file truncated?)",
                            format.name()
                        )));
                    }
                }
            }
        };
        tensors.push(TensorInfo {
            name,
            shape,
            format,
            bytes,
        });
    }
    Ok(Header { metadata, tensors })
}

/// Name, shape, type and offset of a tensor.
fn raw_info(reader: &mut Reader<'_>, i: u64) -> Result<(String, Vec<usize>, u32, u64), String> {
    let name = reader.name(LONGEST_NAME, &format!("the name of tensor {i}"))?;
    let what = format!("the description of tensor `{name}`");
    let dimensions = reader.u32(&what)? as usize;
    if dimensions > MOST_DIMENSIONS {
        return Err(format!(
            "tensor `{name}` has {dimensions} dimensions, expected at most {MOST_DIMENSIONS}"
        ));
    }
    let mut shape = Vec::with_capacity(dimensions);
    for _ in 0..dimensions {
        let size = reader.u64(&what)?;
        // What is larger does not fit the file either; found here, it cannot overflow later.
        if size == 0 || size > 1 << 40 {
            return Err(format!("tensor `{name}` has a dimension of {size}"));
        }
        shape.push(size as usize);
    }
    shape.reverse();
    let kind = reader.u32(&what)?;
    let offset = reader.u64(&what)?;
    Ok((name, shape, kind, offset))
}

/// ggml's numbers of types.
fn format(kind: u32) -> Result<Format, String> {
    Ok(match kind {
        0 => Format::F32,
        1 => Format::F16,
        2 => Format::Q4_0,
        3 => Format::Q4_1,
        6 => Format::Q5_0,
        7 => Format::Q5_1,
        8 => Format::Q8_0,
        10 => Format::Q2K,
        11 => Format::Q3K,
        12 => Format::Q4K,
        13 => Format::Q5K,
        14 => Format::Q6K,
        20 => Format::Iq4Nl,
        23 => Format::Iq4Xs,
        30 => Format::Bf16,
        34 => Format::Tq1_0,
        35 => Format::Tq2_0,
        39 => Format::Mxfp4,
        other => {
            let name = match other {
                9 => "Q8_1",
                15 => "Q8_K",
                16 => "IQ2_XXS",
                17 => "IQ2_XS",
                18 => "IQ3_XXS",
                19 => "IQ1_S",
                21 => "IQ3_S",
                22 => "IQ2_S",
                24 => "I8",
                25 => "I16",
                26 => "I32",
                27 => "I64",
                28 => "F64",
                29 => "IQ1_M",
                _ => return Err(format!("number {other}")),
            };
            return Err(name.to_owned());
        }
    })
}
