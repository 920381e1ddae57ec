//! [`BlockPool`]: reference counts, and the free blocks in the order in which they will be reused.
//!
//! The free list is linked through the blocks, so that a block found in the prefix cache leaves the middle of it in constant time.
//! Blocks worth finding again join at the back, others at the front.

use crate::BlockId;

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Block {
    references: u32,
    previous: u32,
    next: u32,
}

/// The blocks of a KV cache.
#[derive(Debug)]
pub(crate) struct BlockPool {
    blocks: Vec<Block>,
    first: u32,
    last: u32,
    free: u32,
}

impl BlockPool {
    pub fn new(count: u32) -> Self {
        let mut pool = Self {
            blocks: vec![
                Block {
                    references: 0,
                    previous: NONE,
                    next: NONE,
                };
                count as usize
            ],
            first: NONE,
            last: NONE,
            free: 0,
        };
        for block in 0..count {
            pool.push_back(block);
        }
        pool
    }

    pub fn len(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Blocks nobody references, cached ones included.
    pub fn free(&self) -> u32 {
        self.free
    }

    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks[block.index()].references
    }

    /// Takes the block that is to be reused next.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.first;
        if block == NONE {
            return None;
        }
        self.unlink(block);
        self.blocks[block as usize].references = 1;
        Some(BlockId(block))
    }

    /// One more reference, to a block in use or free.
    pub fn refer(&mut self, block: BlockId) {
        if self.blocks[block.index()].references == 0 {
            self.unlink(block.0);
        }
        self.blocks[block.index()].references += 1;
    }

    /// One reference less; the last one frees the block. `keep`: reuse it as late as possible.
    pub fn release(&mut self, block: BlockId, keep: bool) {
        let references = &mut self.blocks[block.index()].references;
        assert!(
            *references > 0,
            "{block:?} is released once for each reference"
        );
        *references -= 1;
        if *references == 0 {
            if keep {
                self.push_back(block.0);
            } else {
                self.push_front(block.0);
            }
        }
    }

    /// The free blocks, next to be reused first.
    pub fn free_blocks(&self) -> impl Iterator<Item = BlockId> {
        std::iter::successors((self.first != NONE).then_some(self.first), |&block| {
            let next = self.blocks[block as usize].next;
            (next != NONE).then_some(next)
        })
        .map(BlockId)
    }

    fn push_back(&mut self, block: u32) {
        self.blocks[block as usize].previous = self.last;
        self.blocks[block as usize].next = NONE;
        match self.last {
            NONE => self.first = block,
            last => self.blocks[last as usize].next = block,
        }
        self.last = block;
        self.free += 1;
    }

    fn push_front(&mut self, block: u32) {
        self.blocks[block as usize].previous = NONE;
        self.blocks[block as usize].next = self.first;
        match self.first {
            NONE => self.last = block,
            first => self.blocks[first as usize].previous = block,
        }
        self.first = block;
        self.free += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = self.blocks[block as usize];
        match previous {
            NONE => self.first = next,
            previous => self.blocks[previous as usize].next = next,
        }
        match next {
            NONE => self.last = previous,
            next => self.blocks[next as usize].previous = previous,
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_in_order_and_are_reused_least_recently_freed_first() {
        let mut pool = BlockPool::new(3);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken, [BlockId(0), BlockId(1), BlockId(2)]);
        for block in [BlockId(1), BlockId(2), BlockId(0)] {
            pool.release(block, true);
        }
        assert_eq!(pool.take(), Some(BlockId(1)));
    }

    #[test]
    fn a_block_not_worth_keeping_is_reused_first() {
        let mut pool = BlockPool::new(3);
        let _ = (pool.take(), pool.take());
        pool.release(BlockId(0), true);
        pool.release(BlockId(1), false);
        assert_eq!(pool.take(), Some(BlockId(1)));
    }

    #[test]
    fn a_referenced_block_leaves_the_middle_of_the_free_list() {
        let mut pool = BlockPool::new(3);
        pool.refer(BlockId(1));
        assert_eq!(
            pool.free_blocks().collect::<Vec<_>>(),
            [BlockId(0), BlockId(2)]
        );
        pool.refer(BlockId(1));
        pool.release(BlockId(1), true);
        assert_eq!(pool.free(), 2, "it is still referenced once");
    }
}
