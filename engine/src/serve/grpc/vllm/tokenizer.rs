//! [`TokenizerFiles`]: the tokenizer as the gateway fetches it, a zip archive of the checkpoint's files (for a GGUF file, of what they would be).
//!
//! The archive is made when it is asked for; a gateway asks once for each worker.

use std::io::{self, Cursor, Write};

use quire_proto::smg::grpc::common::GetTokenizerChunk;
use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::checkpoint::{ModelSource, tokenizer_files};

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;
/// Where the tokenizer's files are.
#[derive(Debug, Clone)]
pub struct TokenizerFiles(ModelSource);

/// A zip archive.
#[derive(Debug)]
pub(super) struct Archive(Vec<u8>);

impl TokenizerFiles {
    /// Of the model that `source` names.
    pub fn new(source: ModelSource) -> Self {
        Self(source)
    }

    /// What the model is called on this machine.
    pub(super) fn path(&self) -> String {
        match &self.0 {
            ModelSource::Demo => "demo".to_owned(),
            ModelSource::Path(path) => path.display().to_string(),
        }
    }

    /// Packs the files. Blocks.
    pub(super) fn archive(&self) -> io::Result<Archive> {
        // Tokenizers are small, and zip without compression needs no library in C.
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in tokenizer_files(&self.0).map_err(io::Error::other)? {
            archive.start_file(name, options)?;
            archive.write_all(&bytes)?;
        }
        Ok(Archive(archive.finish()?.into_inner()))
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(u32::from(value), 16).expect("four bits are a digit");
    let digits = bytes.iter().flat_map(|&byte| [byte >> 4, byte & 15]);
    digits.map(digit).collect()
}

impl Archive {
    /// The messages that carry it; the last one has the fingerprint.
    pub fn chunks(&self) -> impl Iterator<Item = GetTokenizerChunk> {
        let last = self.0.len().div_ceil(CHUNK) - 1;
        self.0.chunks(CHUNK).enumerate().map(move |(at, bytes)| {
            let sha256 = if at == last {
                hexadecimal(&Sha256::digest(&self.0))
            } else {
                String::new()
            };
            GetTokenizerChunk {
                data: bytes.to_vec(),
                sha256,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_holds_the_files_and_only_the_last_chunk_has_a_fingerprint() {
        let files = TokenizerFiles::new(ModelSource::Demo);
        let archive = files.archive().expect("the demo model's files are here");
        let chunks: Vec<_> = archive.chunks().collect();
        let (last, others) = chunks.split_last().expect("an archive is not empty");
        assert_eq!(last.sha256.len(), 64);
        assert!(others.iter().all(|chunk| chunk.sha256.is_empty()));
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.data.clone()).collect();
        let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).expect("a zip archive");
        let files = tokenizer_files(&ModelSource::Demo).expect("they are in the binary");
        assert_eq!(files.len(), 5);
        for (name, bytes) in files {
            let mut file = archive.by_name(name).expect(name);
            let mut read = Vec::new();
            io::copy(&mut file, &mut read).expect("readable");
            assert!(read == *bytes, "{name}");
        }
    }

    #[test]
    fn a_directory_gives_the_files_it_has() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("tokenizer.json"), "{}").expect("written");
        std::fs::write(directory.path().join("model.safetensors"), "x").expect("written");
        let files = TokenizerFiles::new(ModelSource::Path(directory.path().to_owned()));
        let archive = files.archive().expect("packed");
        let mut archive = zip::ZipArchive::new(Cursor::new(archive.0)).expect("a zip archive");
        assert_eq!(archive.len(), 1);
        assert!(archive.by_name("tokenizer.json").is_ok());
    }
}
