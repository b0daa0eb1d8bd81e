//! Byte-level BPE: of all neighbouring tokens, the two that come first in the list of merges become one, until no two of
//! them are in it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// The list of merges, by the two tokens that each joins.
#[derive(Debug)]
pub(super) struct Merges {
    /// Rank and result.
    by_pair: HashMap<(u32, u32), (u32, u32)>,
}

/// A token of a text, in a list that forgets tokens without moving others.
#[derive(Clone, Copy)]
struct Symbol {
    id: u32,
    previous: usize,
    /// [`END`] behind the last, and for what was joined to the symbol before.
    next: usize,
    is_gone: bool,
}

const END: usize = usize::MAX;

impl Merges {
    /// The merges `(left, right, both)` in the order of their ranks.
    ///
    /// # Errors
    ///
    /// The rank of a merge whose two tokens an earlier one joins.
    pub fn new(merges: &[(u32, u32, u32)]) -> Result<Self, usize> {
        let mut by_pair = HashMap::with_capacity(merges.len());
        for (rank, &(left, right, both)) in merges.iter().enumerate() {
            // A vocabulary has fewer than 2³² tokens and each merge another pair, but one list may hold more.
            let rank_of_pair = u32::try_from(rank).map_err(|_| rank)?;
            if by_pair.insert((left, right), (rank_of_pair, both)).is_some() {
                return Err(rank);
            }
        }
        Ok(Self { by_pair })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_pair.len()
    }

    /// Appends to `ids` what becomes of `tokens`, those of the single bytes of a piece of text.
    pub fn apply(&self, tokens: impl Iterator<Item = u32>, ids: &mut Vec<u32>) {
        let mut symbols: Vec<Symbol> = tokens
            .enumerate()
            .map(|(at, id)| Symbol { id, previous: at.wrapping_sub(1), next: at + 1, is_gone: false })
            .collect();
        let Some(last) = symbols.last_mut() else { return };
        last.next = END;
        // Lowest rank first, and from left to right among equals: place and result follow the rank.
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        for at in 1..symbols.len() {
            self.look_up(&symbols, at - 1, &mut queue);
        }
        while let Some(Reverse((_, at, both))) = queue.pop() {
            let Symbol { id, previous, next, is_gone } = symbols[at];
            // Either token may have become part of another since.
            if is_gone || next == END || self.by_pair.get(&(id, symbols[next].id)).is_none_or(|made| made.1 != both) {
                continue;
            }
            let after = symbols[next].next;
            symbols[next].is_gone = true;
            (symbols[at].id, symbols[at].next) = (both, after);
            if after != END {
                symbols[after].previous = at;
                self.look_up(&symbols, at, &mut queue);
            }
            if previous != END {
                self.look_up(&symbols, previous, &mut queue);
            }
        }
        ids.extend(symbols.iter().filter(|symbol| !symbol.is_gone).map(|symbol| symbol.id));
    }

    /// Queues the merge of the symbol at `at` with the next one, if there is one.
    fn look_up(&self, symbols: &[Symbol], at: usize, queue: &mut BinaryHeap<Reverse<(u32, usize, u32)>>) {
        let pair = (symbols[at].id, symbols[symbols[at].next].id);
        if let Some(&(rank, both)) = self.by_pair.get(&pair) {
            queue.push(Reverse((rank, at, both)));
        }
    }
}
