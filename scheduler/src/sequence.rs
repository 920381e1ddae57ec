//! [`Sequence`]: one prompt and what was generated after it; and the slots sequences live in.

use crate::policy::Key;
use crate::prefix_cache::{Link, Realm};
use crate::{BlockId, SeqId, TokenId};

/// Where a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// In the queue; holds no blocks.
    Waiting,
    /// Holds blocks.
    Running,
}

/// What the scheduler knows of one sequence.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub state: State,
    pub key: Key,
    /// Whom it may share blocks with. Beyond: it knows more tokens than [`crate::Config::recompute_beyond`].
    pub realm: Realm,
    /// Known tokens: the prompt, then what was generated.
    pub tokens: Vec<TokenId>,
    /// Most tokens it can come to know: once it runs, its lists have room for them, so that no step of its generation allocates.
    pub longest: u32,
    /// Tokens whose keys and values are in its blocks.
    pub computed: u32,
    /// Interleaved: `groups` entries for each `block_size` positions. [`BlockId::NONE`] where a group's window has passed.
    pub blocks: Vec<BlockId>,
    /// Of its full, computed blocks, those that were made findable and that windows were moved over.
    pub filled: u32,
    /// Their chain in the prefix cache.
    pub chain: Link,
    /// Rows of the prompt whose logits are wanted and were not told: those from `told` up to `to_tell`. Nothing before `told` need be computed for
    /// its logits again.
    pub told: u32,
    pub to_tell: u32,
    /// Samples still to be forked off.
    pub pending_forks: u32,
    /// Tokens it computes in the current batch.
    pub scheduled: u32,
    /// The current batch gives it logits, and no token has come of them.
    pub awaiting: bool,
    /// Its last token is [`TokenId::PENDING`]. Only the last one ever is, and it is not computed before it is known: blocks are made of known tokens.
    pub pending: bool,
    /// Others may hold the block of its last computed token: look before writing there. False: nobody does.
    pub tail_may_be_shared: bool,
    /// Set at admission, until it was told in a [`crate::Scheduled`].
    pub cached: Option<u32>,
    /// It was admitted before: its look-ups were counted, and it is none of those that [`crate::Config::max_waiting`] bounds.
    pub ran: bool,
    /// Chain hashes of the full blocks among the tokens known when it last joined the queue.
    pub hashes: Vec<u64>,
}

impl Sequence {
    pub fn known(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// Whether there is a full, computed block that [`Sequence::filled`] does not count yet.
    pub fn has_filled_a_block(&self, block_size: u32) -> bool {
        (self.filled + 1) * block_size <= self.computed
    }

    /// How many of the rows `begin..end` are to be told.
    pub fn rows_to_tell(&self, begin: u32, end: u32) -> u32 {
        end.min(self.to_tell).saturating_sub(begin.max(self.told))
    }

    /// Known tokens not computed yet.
    pub fn remaining(&self) -> u32 {
        self.known() - self.computed
    }
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    sequence: Option<Sequence>,
}

/// The live sequences, by [`SeqId`].
#[derive(Debug, Default)]
pub(crate) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    pub fn insert(&mut self, sequence: Sequence) -> SeqId {
        if let Some(slot) = self.free.pop() {
            let place = &mut self.slots[slot as usize];
            place.sequence = Some(sequence);
            SeqId {
                slot,
                generation: place.generation,
            }
        } else {
            self.slots.push(Slot {
                generation: 0,
                sequence: Some(sequence),
            });
            // Room for every slot to become free, so that an end allocates nothing.
            self.free.reserve(self.slots.len());
            SeqId {
                slot: self.slots.len() as u32 - 1,
                generation: 0,
            }
        }
    }

    pub fn remove(&mut self, seq: SeqId) -> Option<Sequence> {
        let place = self.slots.get_mut(seq.slot())?;
        if place.generation != seq.generation {
            return None;
        }
        let sequence = place.sequence.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(seq.slot);
        Some(sequence)
    }

    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        let place = self.slots.get(seq.slot())?;
        (place.generation == seq.generation)
            .then_some(place.sequence.as_ref())
            .flatten()
    }

    pub fn get_mut(&mut self, seq: SeqId) -> Option<&mut Sequence> {
        let place = self.slots.get_mut(seq.slot())?;
        (place.generation == seq.generation)
            .then_some(place.sequence.as_mut())
            .flatten()
    }

    pub fn iter(&self) -> impl Iterator<Item = (SeqId, &Sequence)> {
        self.slots.iter().enumerate().filter_map(|(slot, place)| {
            let id = SeqId {
                slot: slot as u32,
                generation: place.generation,
            };
            place.sequence.as_ref().map(|sequence| (id, sequence))
        })
    }
}
