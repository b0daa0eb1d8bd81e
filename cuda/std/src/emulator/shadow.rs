//! What the checked mode knows of each piece of memory: what was written, and who touched it last.

use std::cell::UnsafeCell;
use std::vec;
use std::vec::Vec;

/// Bytes per cell: the smallest element that several threads may write side by side.
pub(super) const GRAIN: usize = 2;

/// Who makes an access, and when: barriers order accesses of one block, `bar.warp.sync` those of one warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The launch's number, odd; one more for blocks that were the last to arrive. Accesses of different launches are ordered.
    pub launch: u32,
    pub block: u32,
    pub thread: u32,
    pub block_epoch: u32,
    pub warp_epoch: u32,
}

impl Stamp {
    fn warp(self) -> u32 {
        self.thread / 32
    }

    /// Whether `self`, the earlier access, is certain to be before `later` on every machine.
    fn is_ordered_before(self, later: Stamp) -> bool {
        self.launch != later.launch
            || (self.block == later.block
                && (self.thread == later.thread
                    || self.block_epoch < later.block_epoch
                    || (self.warp() == later.warp() && self.warp_epoch < later.warp_epoch)))
    }
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Atomic,
    /// A `cp.async` is issued: from here until it lands its destination is nobody's.
    Copy,
    /// The issuing thread has waited for it.
    Landing,
}

/// What an access ran into.
pub(super) enum Finding {
    /// Nothing wrote these bytes.
    Uninitialized { byte: usize },
    /// Another thread's access, or a copy under way, is not ordered with this one.
    Race { byte: usize, other: Stamp, other_access: Access },
}

/// What a cell holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    /// A copy under way, issued at the cell's `before`.
    InFlight,
    Written,
}

/// The accesses to a cell that may still race with later ones. Reads do not race with each other, nor do atomic updates,
/// so what counts is the last run of one kind, and what was before that run. Older accesses need not be kept: whoever is
/// ordered after the run is ordered after them.
#[derive(Clone, Copy)]
struct Cell {
    /// A write, or one of the run before `last`.
    before: Stamp,
    before_by: Access,
    /// The first of a run of reads or of atomic updates, less those that a later one of them is ordered after.
    last: Stamp,
    last_by: Access,
    /// Who made them.
    by: By,
    /// If several: block and thread of one that is not ordered with `last`.
    also: (u32, u32),
}

/// Who made the accesses that a cell's `last` stands for. This is exact: whoever is not ordered after `last` by this rule
/// is not ordered after one of them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    One,
    /// Several of one warp, since its last `bar.warp.sync`.
    SeveralOfOneWarp,
    /// Several of one block, since its last barrier.
    SeveralOfOneBlock,
    SeveralBlocks,
}

impl Cell {
    /// Whether all that `last` stands for is certain to be before `now`.
    fn last_is_ordered_before(&self, now: Stamp) -> bool {
        let last = self.last;
        let barrier_between = last.block == now.block && last.block_epoch < now.block_epoch;
        let warp_sync_between =
            last.block == now.block && last.warp() == now.warp() && last.warp_epoch < now.warp_epoch;
        last.launch != now.launch
            || match self.by {
                By::One => last.is_ordered_before(now),
                By::SeveralOfOneWarp => barrier_between || warp_sync_between,
                By::SeveralOfOneBlock => barrier_between,
                By::SeveralBlocks => false,
            }
    }

    /// One of those that `last` stands for and that is not ordered before `now`.
    fn unordered_with(&self, now: Stamp) -> Stamp {
        let (block, thread) = self.also;
        if self.last.is_ordered_before(now) { Stamp { block, thread, ..self.last } } else { self.last }
    }

    /// A read or atomic update at `now`, which races with nothing, is the newest.
    fn join(&mut self, access: Access, now: Stamp) {
        if self.last_is_ordered_before(now) {
            if access != self.last_by && self.last.launch == now.launch {
                (self.before, self.before_by) = (self.last, self.last_by);
            }
            (self.last, self.last_by, self.by) = (now, access, By::One);
            return;
        }
        let by = match self.by {
            _ if self.last.block != now.block => By::SeveralBlocks,
            By::One | By::SeveralOfOneWarp if self.last.warp() == now.warp() => By::SeveralOfOneWarp,
            By::SeveralBlocks => By::SeveralBlocks,
            _ => By::SeveralOfOneBlock,
        };
        if by != self.by {
            (self.by, self.also) = (by, (now.block, now.thread));
        }
    }
}

const NEVER: Stamp = Stamp { launch: 0, block: 0, thread: 0, block_epoch: 0, warp_epoch: 0 };
const FRESH: Cell =
    Cell { before: NEVER, before_by: Access::Write, last: NEVER, last_by: Access::Read, by: By::One, also: (0, 0) };

/// The shadow of one allocation.
pub(super) struct Shadow {
    base: usize,
    /// Of shared memory: how many blocks had it, which stands for the launch's number. 0 for other memory.
    n_blocks: u32,
    state: UnsafeCell<State>,
}

struct State {
    contents: Vec<Content>,
    cells: Vec<Cell>,
}

// SAFETY: `state` is only touched under the emulator's lock, which checked launches and the host's copies hold, and a
// checked launch runs on one thread.
unsafe impl Sync for Shadow {}
// SAFETY: as above.
unsafe impl Send for Shadow {}

impl Shadow {
    pub fn new(base: usize, bytes: usize) -> Self {
        let state = State { contents: vec![Content::Nothing; bytes.div_ceil(GRAIN)], cells: Vec::new() };
        Self { base, n_blocks: 0, state: UnsafeCell::new(state) }
    }

    /// From here on it is that of a new block's shared memory, which nothing has written. Accesses of the blocks before
    /// count as those of earlier launches.
    pub fn begin_block(&mut self, base: usize, bytes: usize) {
        self.base = base;
        let State { contents, cells } = self.state.get_mut();
        contents.clear();
        contents.resize(bytes.div_ceil(GRAIN), Content::Nothing);
        if self.n_blocks == u32::MAX {
            (self.n_blocks, *cells) = (0, Vec::new());
        }
        self.n_blocks += 1;
        if !cells.is_empty() {
            cells.resize(contents.len(), FRESH);
        }
    }

    #[expect(clippy::mut_from_ref, reason = "see the SAFETY comment of `Sync`")]
    fn state(&self) -> &mut State {
        // SAFETY: one thread at a time, and no reference outlives a method of this type.
        unsafe { &mut *self.state.get() }
    }

    /// The host wrote or filled `bytes` at `address`.
    pub fn initialize(&self, address: usize, bytes: usize) {
        let first = (address - self.base) / GRAIN;
        let last = (address - self.base + bytes).div_ceil(GRAIN);
        self.state().contents[first..last].fill(Content::Written);
    }

    /// The first byte in `bytes` at `address` that nothing wrote.
    pub fn first_uninitialized(&self, address: usize, bytes: usize) -> Option<usize> {
        if bytes == 0 {
            return None;
        }
        let first = (address - self.base) / GRAIN;
        let last = (address - self.base + bytes).div_ceil(GRAIN);
        let found = first + self.state().contents[first..last].iter().position(|&held| held != Content::Written)?;
        Some((self.base + found * GRAIN).saturating_sub(address))
    }

    /// Who last wrote the first of `bytes` at `address` for which `wrong` holds, and that byte.
    pub fn find_writer(&self, address: usize, bytes: usize, wrong: impl Fn(Stamp) -> bool) -> Option<(usize, Stamp)> {
        let state = self.state();
        let first = (address - self.base) / GRAIN;
        let last = (address - self.base + bytes).div_ceil(GRAIN);
        let cells = state.cells.get(first..last).unwrap_or_default();
        let written = cells.iter().map(|cell| cell.before).enumerate();
        let found = written.filter(|(_, stamp)| stamp.launch == self.n_blocks).find(|(_, stamp)| wrong(*stamp))?;
        Some((found.0 * GRAIN, found.1))
    }

    /// Records an access of the kernel, and says what is wrong with it.
    pub fn record(&self, address: usize, bytes: usize, access: Access, now: Stamp) -> Option<Finding> {
        let state = self.state();
        let now = if self.n_blocks > 0 { Stamp { launch: self.n_blocks, ..now } } else { now };
        if state.cells.is_empty() {
            state.cells = vec![FRESH; state.contents.len()];
        }
        let first = (address - self.base) / GRAIN;
        let last = (address - self.base + bytes).div_ceil(GRAIN);
        for grain in first..last {
            let byte = (grain * GRAIN + self.base).saturating_sub(address);
            let (cell, content) = (&mut state.cells[grain], &mut state.contents[grain]);
            let race = |other, other_access| Some(Finding::Race { byte, other, other_access });

            if access == Access::Landing {
                // Between issue and landing every other access was refused.
                (cell.before, cell.before_by, *content) = (now, Access::Write, Content::Written);
                continue;
            }
            if *content == Content::InFlight {
                return race(cell.before, Access::Copy);
            }
            let reads = access == Access::Read || access == Access::Atomic;
            if reads && *content == Content::Nothing {
                return Some(Finding::Uninitialized { byte });
            }
            // Two of one kind race only if they write; an access of the older kind is checked against the newer.
            if access != cell.last_by && !cell.last_is_ordered_before(now) {
                return race(cell.unordered_with(now), cell.last_by);
            }
            let of_one_kind = reads && access == cell.before_by;
            if !of_one_kind && !cell.before.is_ordered_before(now) {
                return race(cell.before, cell.before_by);
            }
            if reads {
                cell.join(access, now);
            } else {
                *cell = Cell { before: now, before_by: access, ..FRESH };
                *content = if access == Access::Copy { Content::InFlight } else { Content::Written };
            }
        }
        None
    }
}
