//! [`Pool`]: reference counts, and the free blocks (or nodes) in the order in which they will be reused.
//!
//! Free ones form two lists, both linked through the entries, so that one that is found again leaves the middle of its list in constant
//! time. The first list is used up before the second: it has what is worth nothing in front and what is worth little behind.

use std::marker::PhantomData;

use crate::ids::Numbered;

/// No entry.
const NONE: u32 = u32::MAX;

/// How late something free is reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Worth {
    /// At once: nobody can find it.
    Nothing,
    /// Before anything that is worth keeping.
    Little,
    /// As late as possible.
    Much,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    references: u32,
    previous: u32,
    next: u32,
    /// Free, and in the second list.
    kept: bool,
}

#[derive(Debug, Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

/// Things with the numbers `0..len`: the blocks of a KV cache, or the nodes of the prefix cache.
#[derive(Debug)]
pub(crate) struct Pool<Id> {
    entries: Vec<Entry>,
    /// Worth nothing or little, and worth much.
    lists: [List; 2],
    free: u32,
    kind: PhantomData<Id>,
}

impl<Id: Numbered> Pool<Id> {
    /// Memory for each.
    pub const BYTES: usize = size_of::<Entry>();

    pub fn new(len: u32) -> Self {
        let entry = Entry {
            references: 0,
            previous: NONE,
            next: NONE,
            kept: false,
        };
        let mut pool = Self {
            entries: vec![entry; len as usize],
            lists: [List {
                first: NONE,
                last: NONE,
            }; 2],
            free: 0,
            kind: PhantomData,
        };
        for number in 0..len {
            pool.push_back(number, false);
        }
        pool
    }

    pub fn len(&self) -> u32 {
        self.entries.len() as u32
    }

    /// Those nobody references, cached ones included.
    pub fn free(&self) -> u32 {
        self.free
    }

    pub fn references(&self, id: Id) -> u32 {
        self.entries[id.number() as usize].references
    }

    /// Takes the one that is to be reused next.
    pub fn take(&mut self) -> Option<Id> {
        let [little, much] = self.lists;
        let number = if little.first == NONE {
            much.first
        } else {
            little.first
        };
        if number == NONE {
            return None;
        }
        self.unlink(number);
        self.entries[number as usize].references = 1;
        Some(Id::new(number))
    }

    /// One more reference, to one in use or free.
    pub fn refer(&mut self, id: Id) {
        let number = id.number();
        if self.entries[number as usize].references == 0 {
            self.unlink(number);
        }
        self.entries[number as usize].references += 1;
    }

    /// One reference less; the last one frees it. Returns whether this was the last.
    pub fn release(&mut self, id: Id, worth: Worth) -> bool {
        let number = id.number();
        let references = &mut self.entries[number as usize].references;
        assert!(
            *references > 0,
            "{number} is released once for each reference"
        );
        *references -= 1;
        if *references > 0 {
            return false;
        }
        match worth {
            Worth::Nothing => self.push_front(number),
            Worth::Little => self.push_back(number, false),
            Worth::Much => self.push_back(number, true),
        }
        true
    }

    /// The free ones, next to be reused first.
    pub fn free_ids(&self) -> impl Iterator<Item = Id> {
        self.lists.iter().flat_map(|list| {
            std::iter::successors((list.first != NONE).then_some(list.first), |&number| {
                let next = self.entries[number as usize].next;
                (next != NONE).then_some(next)
            })
            .map(Id::new)
        })
    }

    fn push_back(&mut self, number: u32, kept: bool) {
        let list = &mut self.lists[usize::from(kept)];
        let entry = &mut self.entries[number as usize];
        (entry.previous, entry.next, entry.kept) = (list.last, NONE, kept);
        match list.last {
            NONE => list.first = number,
            last => self.entries[last as usize].next = number,
        }
        list.last = number;
        self.free += 1;
    }

    fn push_front(&mut self, number: u32) {
        let list = &mut self.lists[0];
        let entry = &mut self.entries[number as usize];
        (entry.previous, entry.next, entry.kept) = (NONE, list.first, false);
        match list.first {
            NONE => list.last = number,
            first => self.entries[first as usize].previous = number,
        }
        list.first = number;
        self.free += 1;
    }

    fn unlink(&mut self, number: u32) {
        let Entry {
            previous,
            next,
            kept,
            ..
        } = self.entries[number as usize];
        let list = &mut self.lists[usize::from(kept)];
        match previous {
            NONE => list.first = next,
            previous => self.entries[previous as usize].next = next,
        }
        match next {
            NONE => list.last = previous,
            next => self.entries[next as usize].previous = previous,
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockId;

    #[test]
    fn blocks_come_in_order_and_are_reused_least_recently_freed_first() {
        let mut pool = Pool::new(3);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(taken, [BlockId(0), BlockId(1), BlockId(2)]);
        for block in [BlockId(1), BlockId(2), BlockId(0)] {
            pool.release(block, Worth::Much);
        }
        assert_eq!(pool.take(), Some(BlockId(1)));
    }

    #[test]
    fn a_block_not_worth_keeping_is_reused_first() {
        let mut pool: Pool<BlockId> = Pool::new(3);
        let _ = (pool.take(), pool.take());
        pool.release(BlockId(0), Worth::Much);
        pool.release(BlockId(1), Worth::Nothing);
        assert_eq!(pool.take(), Some(BlockId(1)));
    }

    #[test]
    fn what_is_worth_little_is_reused_after_nothing_and_before_much() {
        let mut pool: Pool<BlockId> = Pool::new(4);
        while pool.take().is_some() {}
        for (block, worth) in [
            (3, Worth::Much),
            (2, Worth::Little),
            (1, Worth::Little),
            (0, Worth::Nothing),
        ] {
            pool.release(BlockId(block), worth);
        }
        let taken: Vec<_> = std::iter::from_fn(|| pool.take()).map(|b| b.0).collect();
        assert_eq!(taken, [0, 2, 1, 3]);
    }

    #[test]
    fn a_referenced_block_leaves_the_middle_of_the_free_list() {
        let mut pool = Pool::new(3);
        pool.refer(BlockId(1));
        assert_eq!(
            pool.free_ids().collect::<Vec<_>>(),
            [BlockId(0), BlockId(2)]
        );
        pool.refer(BlockId(1));
        assert!(!pool.release(BlockId(1), Worth::Much));
        assert_eq!(pool.free(), 2, "it is still referenced once");
    }
}
