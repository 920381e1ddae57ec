//! What a serving engine computes in its next step.
//!
//! In go requests ([`Scheduler::add`]), aborts and sampled tokens; out comes, step by step, a [`Batch`]: which tokens of which sequences to
//! compute, and through [`Scheduler::block_table`] where their keys and values live. [`Scheduler::schedule`] and
//! [`Scheduler::complete`] are the whole contract. The crate is pure: no I/O, no clock (time is an argument), no threads, no
//! randomness, so a test can replay a million steps in seconds. Where tokens are drawn on a device, [`Scheduler::resolve`] brings them when the next step
//! is already planned.
//!
//! Invariants, checked after every step of random workloads (`tests/random_workloads/`): a block is free or referenced, never both,
//! and what the prefix cache finds may be either; reference counts equal the tables that hold them; no budget is exceeded; no sequence waits
//! for ever; an abort at any moment frees exactly what was held.
#![forbid(unsafe_code)]

mod batch;
mod blocks;
mod config;
mod events;
mod groups;
mod ids;
mod invariants;
mod node_index;
mod policy;
mod pool;
mod prefix_cache;
mod scheduler;
mod sequence;
mod step;

pub use batch::{Batch, BlockCopy, Sampled, Scheduled};
pub use blocks::bytes_per_block;
pub use config::{AddError, Config, ConfigError, Pace, Policy};
pub use events::KvEvent;
pub use groups::{PageGroup, blocks_needed};
pub use ids::{BlockId, SeqId, Time, TokenId};
pub use scheduler::{NewSequence, Scheduler, Stats};
