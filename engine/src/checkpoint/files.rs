//! [`Files`]: the files of a checkpoint, on disk or inside the binary.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde_json::Value;

use super::{CheckpointError, ModelSource};

/// Metadata files larger than this are not metadata.
const LARGEST_METADATA: u64 = 256 << 20;

macro_rules! demo {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../../demo-model/", $name)))),*]
    };
}

/// The demo model's files.
const DEMO: &[(&str, &[u8])] = demo![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// Where a checkpoint's files are.
#[derive(Debug)]
pub(super) enum Files {
    Demo,
    Directory(PathBuf),
}

/// The bytes of a weights file.
#[derive(Debug)]
pub(super) enum Bytes {
    Static(&'static [u8]),
    Mapped(Mmap),
}

impl Bytes {
    pub fn as_slice(&self) -> &[u8] {
        match self {
            Self::Static(bytes) => bytes,
            Self::Mapped(map) => map,
        }
    }

    /// Takes the pages that have been read out of this process's memory; whoever reads them again gets them from the page cache.
    ///
    /// Without it a model that is packed while it is read would be in memory twice: packed, and as the mapping's pages.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            // SAFETY: the mapping is read-only and of a file, so a page that is dropped comes back with the same bytes.
            let advised = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            if let Err(error) = advised {
                tracing::debug!(%error, "mapped pages stay in memory");
            }
        }
    }
}

impl Files {
    pub fn open(source: &ModelSource) -> Result<Self, CheckpointError> {
        let path = match source {
            ModelSource::Demo => return Ok(Self::Demo),
            ModelSource::Path(path) => path,
        };
        let problem = |problem: &str| CheckpointError::NotACheckpoint {
            path: path.clone(),
            problem: problem.to_owned(),
        };
        let metadata = std::fs::metadata(path).map_err(|error| problem(&error.to_string()))?;
        if metadata.is_dir() {
            return Ok(Self::Directory(path.clone()));
        }
        // A weights file stands for the directory it is in.
        match (path.extension().and_then(|e| e.to_str()), path.parent()) {
            (Some("safetensors"), Some(parent)) if metadata.is_file() => {
                Ok(Self::Directory(if parent.as_os_str().is_empty() {
                    PathBuf::from(".")
                } else {
                    parent.to_owned()
                }))
            }
            _ => Err(problem("not a directory")),
        }
    }

    /// `demo`, or the directory's name.
    pub fn name(&self) -> String {
        match self {
            Self::Demo => "demo".to_owned(),
            Self::Directory(path) => {
                let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
                absolute.file_name().map_or_else(
                    || "model".to_owned(),
                    |name| name.to_string_lossy().into_owned(),
                )
            }
        }
    }

    /// A metadata file's bytes, if it is there.
    pub fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        let directory = match self {
            Self::Demo => {
                return Ok(DEMO
                    .iter()
                    .find(|file| file.0 == name)
                    .map(|file| Cow::Borrowed(file.1)));
            }
            Self::Directory(directory) => directory,
        };
        let path = directory.join(name);
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(CheckpointError::file(name, error)),
        };
        check_regular(name, &metadata)?;
        if metadata.len() > LARGEST_METADATA {
            return Err(CheckpointError::file(
                name,
                format!(
                    "{} bytes, expected at most {LARGEST_METADATA}",
                    metadata.len()
                ),
            ));
        }
        std::fs::read(&path)
            .map(|bytes| Some(Cow::Owned(bytes)))
            .map_err(|error| CheckpointError::file(name, error))
    }

    /// A metadata file as JSON, if it is there.
    pub fn json(&self, name: &str) -> Result<Option<Value>, CheckpointError> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|error| CheckpointError::file(name, format!("not valid JSON: {error}")))?;
        if value.is_object() {
            Ok(Some(value))
        } else {
            Err(CheckpointError::file(name, "not a JSON object"))
        }
    }

    /// Maps a weights file, if it is there.
    pub fn map(&self, name: &str) -> Result<Option<Bytes>, CheckpointError> {
        let directory = match self {
            Self::Demo => {
                return Ok(DEMO
                    .iter()
                    .find(|file| file.0 == name)
                    .map(|file| Bytes::Static(file.1)));
            }
            Self::Directory(directory) => directory,
        };
        map(&directory.join(name), name)
    }

    /// The error for a file that every checkpoint has.
    pub fn missing(&self, file: &str) -> CheckpointError {
        CheckpointError::MissingFile {
            directory: match self {
                Self::Demo => PathBuf::from("the demo model"),
                Self::Directory(directory) => directory.clone(),
            },
            file: file.to_owned(),
        }
    }
}

fn check_regular(name: &str, metadata: &std::fs::Metadata) -> Result<(), CheckpointError> {
    if metadata.is_file() {
        Ok(())
    } else {
        Err(CheckpointError::file(name, "not a regular file"))
    }
}

/// Maps a file, if it is there; errors call it `name`.
pub(super) fn map(path: &Path, name: &str) -> Result<Option<Bytes>, CheckpointError> {
    // Asked before it is opened: opening a pipe would wait for a writer.
    match std::fs::metadata(path) {
        Ok(metadata) => check_regular(name, &metadata)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(CheckpointError::file(name, error)),
    }
    map_file(path)
        .map(|map| Some(Bytes::Mapped(map)))
        .map_err(|error| CheckpointError::file(name, error))
}

fn map_file(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is read-only. Whoever truncates the file while it is being served ends the process with SIGBUS, as with every
    // engine that maps its weights; after loading, the weights are packed and the mapping is dropped.
    unsafe { Mmap::map(&file) }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// How much of a mapped file is in this process's memory, in KiB.
    fn resident(path: &Path) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("Linux has it");
        let name = path.display().to_string();
        let lines = maps.lines().skip_while(|line| !line.ends_with(&name));
        let mut sizes = lines.filter_map(|line| line.strip_prefix("Rss:"));
        let size = sizes.next().and_then(|size| size.trim().split(' ').next());
        size.and_then(|size| size.parse().ok())
            .expect("the file is mapped")
    }

    #[test]
    fn what_was_released_takes_no_memory_and_can_be_read_again() {
        let directory = tempfile::tempdir().expect("a place for files");
        let path = directory.path().join("weights");
        std::fs::write(&path, vec![7; 8 << 20]).expect("it can be written");
        let bytes = map(&path, "weights").expect("it opens").expect("it exists");
        let sum = || bytes.as_slice().iter().map(|&b| u64::from(b)).sum::<u64>();
        assert_eq!(sum(), 7 << 23);
        assert!(resident(&path) >= 8 << 10);
        bytes.release();
        assert_eq!(resident(&path), 0);
        assert_eq!(sum(), 7 << 23);
    }
}
