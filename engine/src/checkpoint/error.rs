//! [`CheckpointError`]: what is wrong with a checkpoint, and where.

use std::borrow::Cow;
use std::path::PathBuf;

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The path is not a checkpoint's directory.
    #[error("{}: {problem}; expected a GGUF file, or a directory with config.json, tokenizer.json and *.safetensors", path.display())]
    NotACheckpoint {
        /// What was given.
        path: PathBuf,
        /// What it is instead.
        problem: String,
    },
    /// A file that every checkpoint has is not there.
    #[error("{} has no {file}", directory.display())]
    MissingFile {
        /// The checkpoint.
        directory: PathBuf,
        /// The file's name.
        file: String,
    },
    /// A file cannot be read, or does not hold what its name says.
    #[error("{file}: {problem}")]
    File {
        /// The file's name.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of a JSON file or of GGUF metadata has a value no model can have, or one that is not supported.
    #[error("{file}: `{field}` is {value}, expected {expected}")]
    Field {
        /// The file's name.
        file: Cow<'static, str>,
        /// The field's name.
        field: String,
        /// Its value.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The weights lack a tensor.
    #[error("tensor `{name}` is missing; expected it with shape {shape:?}{hint}")]
    MissingTensor {
        /// Its name.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
        /// A tensor of a similar name, if there is one.
        hint: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error(
        "{file}: tensor `{name}` has shape {found:?}, expected {expected:?} from the model's configuration"
    )]
    Shape {
        /// The file's name.
        file: String,
        /// Its name.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor's elements are of a type that is not supported.
    #[error("{file}: tensor `{name}` has elements of type {dtype}, expected {expected}")]
    Dtype {
        /// The file's name.
        file: String,
        /// Its name.
        name: String,
        /// The type.
        dtype: String,
        /// What would be right.
        expected: &'static str,
    },
}

impl CheckpointError {
    /// Something is wrong with `file`.
    pub(super) fn file(file: impl Into<String>, problem: impl ToString) -> Self {
        Self::File {
            file: file.into(),
            problem: problem.to_string(),
        }
    }
}
