//! [`Blocks`]: the pool and the prefix cache, which must agree about every block.

use crate::groups::PageGroup;
use crate::pool::{Pool, Worth};
use crate::prefix_cache::{Link, PrefixCache};
use crate::{BlockId, Config, TokenId};

/// Memory the scheduler takes for each block of the KV cache, at most: of a model whose blocks are small it is more than they are.
pub fn bytes_per_block(block_size: u32, groups: &[PageGroup]) -> usize {
    Pool::<BlockId>::BYTES + PrefixCache::bytes_per_block(block_size, groups)
}

/// The blocks of the KV cache: who holds them, and which can be found.
#[derive(Debug)]
pub(crate) struct Blocks {
    pub pool: Pool<BlockId>,
    pub cache: PrefixCache,
    /// Blocks nobody holds that can be found.
    pub cached_free: u32,
}

impl Blocks {
    pub fn new(config: &Config) -> Self {
        let Config {
            num_blocks,
            block_size,
            kv_events,
            ..
        } = *config;
        Self {
            pool: Pool::new(num_blocks),
            cache: PrefixCache::new(num_blocks, block_size, &config.groups, kv_events),
            cached_free: 0,
        }
    }

    /// A block for writing; what it held is no longer findable.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.pool.take()?;
        if self.cache.holds(block) {
            self.cached_free -= 1;
            let (pool, cached_free) = (&self.pool, &mut self.cached_free);
            self.cache.evict(block, |lost| {
                *cached_free -= u32::from(pool.references(lost) == 0);
            });
        }
        Some(block)
    }

    /// One more reference to a block that was found.
    pub fn share(&mut self, block: BlockId) {
        if self.pool.references(block) == 0 {
            self.cached_free -= 1;
        }
        self.pool.refer(block);
    }

    /// Gives one block back; `worth`: what it is if it can be found.
    pub fn release(&mut self, block: BlockId, worth: Worth) {
        let findable = self.cache.holds(block);
        let worth = if findable { worth } else { Worth::Nothing };
        if self.pool.release(block, worth) && findable {
            self.cached_free += 1;
        }
    }

    /// Gives a table's blocks back, last first: a chain's beginning is worth more than its end.
    pub fn release_all(&mut self, table: &[BlockId]) {
        for &block in table.iter().rev() {
            if block != BlockId::NONE {
                self.release(block, Worth::Much);
            }
        }
    }

    /// Takes the blocks out of a table that the groups' windows passed while `from` full blocks became `to`.
    pub fn release_passed(
        &mut self,
        table: &mut [BlockId],
        groups: &[PageGroup],
        block_size: u32,
        from: u32,
        to: u32,
    ) {
        for (at, group) in groups.iter().enumerate() {
            for index in group.passed(from, block_size)..group.passed(to, block_size) {
                let entry = &mut table[index as usize * groups.len() + at];
                let block = std::mem::replace(entry, BlockId::NONE);
                self.release(block, Worth::Little);
            }
        }
    }

    /// Makes a sequence's blocks findable; see [`PrefixCache::store`]. Where their like is findable already, the sequence holds that instead: what it goes
    /// on with would be lost to everybody once that was evicted.
    pub fn store(
        &mut self,
        parent: Link,
        table: &mut [BlockId],
        tokens: &[TokenId],
        salt: u64,
    ) -> Link {
        let (pool, cached_free) = (&self.pool, &mut self.cached_free);
        let (node, link) = self.cache.store(parent, table, tokens, salt, |lost| {
            *cached_free -= u32::from(pool.references(lost) == 0);
        });
        for (group, entry) in table.iter_mut().enumerate() {
            let like = self.cache.block(node, group);
            if like != BlockId::NONE && like != *entry {
                self.share(like);
                self.release(std::mem::replace(entry, like), Worth::Nothing);
            }
        }
        link
    }

    /// Forgets every findable block that nobody holds.
    pub fn clear(&mut self) {
        let (forgotten, held): (Vec<BlockId>, Vec<BlockId>) = self
            .cache
            .findable()
            .partition(|&block| self.pool.references(block) == 0);
        for block in forgotten {
            if held.is_empty() {
                self.cache.forget(block, |_| {});
            } else {
                self.cache.evict(block, |_| {});
            }
        }
        if held.is_empty() {
            self.cache.cleared();
        }
        self.cached_free = 0;
    }
}
