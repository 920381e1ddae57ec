//! [`Scratch`]: what a step needs beside the decoder's buffers, kept from step to step.

use std::sync::Arc;

use super::device::{Buffer, Device};
use super::flights::FLIGHTS;
use super::params::Pointer;
use crate::Error;

/// What memory is for. Operations follow each other, so each purpose has one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Purpose {
    /// Rows whose logits are wanted, normalised.
    HeadRows,
    /// `[rows, vocabulary]` f32.
    Logits,
    /// Rows in the precision, or with their columns in the order, that a product wants.
    Operands,
    /// Rows as f16.
    Halves,
    /// Of split attention, `[query, head_dim]` and `[query]`.
    Partial,
    Softmax,
    /// Parts of sums or of logits, of this rank or of all.
    Parts,
    /// A product's sums over parts of k.
    Splits,
    /// Quantised weights as bf16.
    Expanded,
    /// Of experts: `[rows, experts]`, then by choice or by place.
    Scores,
    Chosen,
    ChoiceWeights,
    Places,
    RowOf,
    GateUpTiles,
    DownTiles,
    GateUp,
    Gated,
    Answers,
}

const PURPOSES: usize = Purpose::Answers as usize + 1;

pub(super) struct Scratch {
    device: Arc<dyn Device>,
    pieces: [Option<Buffer>; PURPOSES],
    /// Pieces that were too small, by the slot of the step that found it: what was recorded before still names them.
    retired: [Vec<Buffer>; FLIGHTS],
    slot: usize,
}

impl Scratch {
    pub fn new(device: &Arc<dyn Device>) -> Self {
        Self {
            device: Arc::clone(device),
            pieces: Default::default(),
            retired: Default::default(),
            slot: 0,
        }
    }

    /// A step begins, in a slot whose last step has run, and so have all before that one.
    pub fn begin(&mut self, slot: usize) {
        self.slot = slot;
        self.retired[slot].clear();
    }

    /// At least `bytes` bytes for a purpose; undefined, or what the last one who asked for it left there.
    pub fn get(&mut self, purpose: Purpose, bytes: usize) -> Result<Pointer, Error> {
        let piece = &mut self.pieces[purpose as usize];
        if let Some(piece) = piece
            && piece.bytes() >= bytes
        {
            return Ok(piece.at());
        }
        // Rounded up, so that a growing batch does not grow it at every step.
        let rounded = bytes.max(256).next_multiple_of((bytes / 8).max(256));
        let new = Buffer::new(&self.device, rounded, "working memory")?;
        let at = new.at();
        self.retired[self.slot].extend(piece.replace(new));
        Ok(at)
    }

    /// Brings what the step left for a purpose to the host.
    pub fn read(&self, purpose: Purpose, to: &mut [u8]) -> Result<(), Error> {
        match &self.pieces[purpose as usize] {
            Some(piece) if piece.bytes() >= to.len() => piece.download(to),
            _ if to.is_empty() => Ok(()),
            _ => Err(Error::Device("nothing was computed to be read".to_owned())),
        }
    }
}
