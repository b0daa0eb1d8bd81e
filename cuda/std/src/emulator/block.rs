//! Runs one block: its threads as coroutines, stopped and released at the operations that need several of them.

use std::cell::{Cell, RefCell};
use std::format;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use core::panic::Location;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use super::fault::{Fault, FaultKind, place};
use super::machine::{self, Argument};
use super::shadow::{Shadow, Stamp};
use crate::launch::{Entry, Launch};

/// Room for a kernel's frame and for the panic machinery on top; only touched pages take memory.
const STACK_BYTES: usize = 256 * 1024;
/// What a block may declare statically, on every architecture.
pub(super) const SHARED_BYTES: usize = 48 * 1024;
pub(super) const POISON: u8 = super::POISON;
const WARP: usize = 32;

type Thread = Coroutine<(), (), (), DefaultStack>;

std::thread_local! {
    /// Stacks outlive blocks: mapping one costs more than a small block.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
    static ARENAS: RefCell<Vec<Vec<u128>>> = const { RefCell::new(Vec::new()) };
}

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// Nothing: it may run.
    Nothing,
    Barrier,
    Warp(Operation),
    /// It has returned.
    Done,
}

/// An operation of all 32 lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Sync,
    ShuffleXor,
    ShuffleIdx,
    ShuffleDown,
    Ballot,
    Butterfly { width: u32, operation: u8 },
    MmaF16,
    MmaS8,
    LoadMatrix { transposed: bool },
}

/// One thread, as the operations of this crate see it.
pub(super) struct Lane {
    pub thread_idx: [u32; 3],
    /// Its linear index in the block.
    pub index: u32,
    pub block: *const Block,
    pub yielder: Cell<*const Yielder<(), ()>>,
    pub wait: Cell<Wait>,
    /// The last operation it waited at.
    pub at: Cell<Option<&'static Location<'static>>>,
    /// Operands of the operation it waits for, then results.
    pub payload: Cell<[u32; 10]>,
    pub copies: RefCell<Copies>,
    /// Whether it has passed [`crate::grid::wait`].
    pub waited: Cell<bool>,
}

/// `cp.async` copies under way.
#[derive(Default)]
pub(super) struct Copies {
    pub pending: Vec<PendingCopy>,
    pub committed: u32,
}

pub(super) struct PendingCopy {
    pub group: u32,
    pub to: usize,
    /// 4 or 16.
    pub bytes: usize,
    pub data: [u32; 4],
}

/// One block, as its threads see it.
pub(super) struct Block {
    pub entry: &'static Entry,
    pub launch: Launch,
    pub block_idx: [u32; 3],
    pub number: u32,
    /// Whether it was the last of a grid to arrive: then it is ordered after the others.
    pub acquired: Cell<bool>,
    pub linear: u32,
    pub barriers: Cell<u32>,
    /// `bar.warp.sync`s of each warp.
    pub warp_syncs: Vec<Cell<u32>>,
    pub arena: usize,
    pub arena_used: Cell<usize>,
    /// Key, offset and bytes of each shared array.
    pub arrays: RefCell<Vec<(*const u8, usize, usize)>>,
    pub shared_shadow: Option<Shadow>,
    pub fault: RefCell<Option<Fault>>,
}

impl Block {
    pub fn stamp(&self, thread: u32) -> Stamp {
        Stamp {
            launch: self.number + u32::from(self.acquired.get()),
            block: self.linear,
            thread,
            block_epoch: self.barriers.get(),
            warp_epoch: self.warp_syncs[thread as usize / WARP].get(),
        }
    }
}

/// The order of blocks, warps and lanes, drawn from a seed; 0 is the natural one.
pub(super) struct Order(u64);

impl Order {
    pub fn new(seed: u64, launch: u32) -> Self {
        Self(if seed == 0 { 0 } else { seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(launch) | 1 << 63 })
    }

    /// `0..n` in this order's next permutation (Fisher and Yates, over splitmix64).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        if self.0 != 0 {
            for last in (1..n).rev() {
                self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut bits = self.0;
                bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                order.swap(last, ((bits ^ (bits >> 31)) % (last as u64 + 1)) as usize);
            }
        }
        order
    }
}

/// Runs block number `linear` of the grid to its end.
pub(super) fn run(
    entry: &'static Entry,
    launch: Launch,
    arguments: &[Argument],
    number: u32,
    linear: usize,
    order: Option<&mut Order>,
) -> Result<(), Fault> {
    let [grid_x, grid_y, _] = launch.grid.map(|n| n as usize);
    let block_idx = [linear % grid_x, linear / grid_x % grid_y, linear / grid_x / grid_y].map(|i| i as u32);
    let n_threads = launch.threads() as usize;
    let mut arena = ARENAS.with_borrow_mut(Vec::pop).unwrap_or_default();
    arena.resize((SHARED_BYTES + entry.dynamic_shared as usize).div_ceil(size_of::<u128>()), 0);
    let checked = order.is_some();
    let block = Block {
        entry,
        launch,
        block_idx,
        number,
        acquired: Cell::new(false),
        linear: linear as u32,
        barriers: Cell::new(0),
        warp_syncs: vec![Cell::new(0); n_threads.div_ceil(WARP)],
        arena: arena.as_mut_ptr() as usize,
        arena_used: Cell::new(0),
        arrays: RefCell::new(Vec::new()),
        shared_shadow: checked.then(|| Shadow::new(arena.as_ptr() as usize, arena.len() * size_of::<u128>())),
        fault: RefCell::new(None),
    };
    if checked {
        arena.fill(u128::from_ne_bytes([POISON; 16]));
    }

    let mut natural = Order::new(0, 0);
    let order = order.unwrap_or(&mut natural);
    let result = Scheduler::new(&block, arguments, n_threads).run(order);
    ARENAS.with_borrow_mut(|arenas| arenas.push(arena));
    result
}

struct Scheduler<'a> {
    block: &'a Block,
    arguments: &'a [Argument],
    lanes: Vec<Lane>,
    /// The coroutines that have begun and not returned. One that returns at once leaves its stack, still in the cache, to
    /// the next.
    threads: Vec<Option<Thread>>,
}

impl<'a> Scheduler<'a> {
    fn new(block: &'a Block, arguments: &'a [Argument], n_threads: usize) -> Self {
        let [x, y, _] = block.launch.block;
        let lane = |index: u32| Lane {
            thread_idx: [index % x, index / x % y, index / x / y],
            index,
            block,
            yielder: Cell::new(core::ptr::null()),
            wait: Cell::new(Wait::Nothing),
            at: Cell::new(None),
            payload: Cell::new([0; 10]),
            copies: RefCell::default(),
            waited: Cell::new(false),
        };
        let lanes: Vec<Lane> = (0..n_threads as u32).map(lane).collect();

        let threads = lanes.iter().map(|_| None).collect();
        Self { block, arguments, lanes, threads }
    }

    fn begin(&self, index: usize) -> Thread {
        let emulate = self.block.entry.emulate;
        let (lane, arguments): (*const Lane, *const [Argument]) = (&raw const self.lanes[index], self.arguments);
        let stack = STACKS.with_borrow_mut(Vec::pop).unwrap_or_else(|| {
            DefaultStack::new(STACK_BYTES).expect("the host maps a stack for each thread of a block")
        });
        Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            // SAFETY: `lane` and `arguments` outlive the coroutine: `Scheduler` drops it, and `run` holds both. The
            // kernel's contract is that of the launch.
            unsafe {
                (*lane).yielder.set(yielder);
                emulate(&*arguments);
                machine::returned();
                (*lane).wait.set(Wait::Done);
            }
        })
    }

    fn run(mut self, order: &mut Order) -> Result<(), Fault> {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.rounds(order)));
        let current = machine::leave();
        outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let message = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            let index = current.map_or(0, |index| index as usize);
            let mut fault = self.fault(index, FaultKind::Panicked { message });
            // Where it panicked only the panic hook is told.
            fault.at = if fault.at.is_empty() { "at its start".into() } else { format!("after {}", fault.at) };
            Err(fault)
        })
    }

    /// Runs every warp as far as it gets, then opens the barrier, until all have returned.
    fn rounds(&mut self, order: &mut Order) -> Result<(), Fault> {
        loop {
            for warp in order.permutation(self.block.warp_syncs.len()) {
                self.run_warp(warp, order)?;
            }
            // Each lane now waits at the block's barrier or has returned.
            let waiting = self.lanes.iter().filter(|lane| lane.wait.get() == Wait::Barrier).count();
            if waiting == 0 {
                return Ok(());
            }
            let first = self.lanes.iter().position(|lane| lane.wait.get() == Wait::Barrier).expect("counted above");
            if let Some(others) = self.divergence(first, 0..self.lanes.len()) {
                return Err(self.fault(first, FaultKind::DivergentBarrier { others }));
            }
            self.block.barriers.set(self.block.barriers.get() + 1);
            for lane in &self.lanes {
                lane.wait.set(Wait::Nothing);
            }
        }
    }

    fn run_warp(&mut self, warp: usize, order: &mut Order) -> Result<(), Fault> {
        let lanes = warp * WARP..self.lanes.len().min((warp + 1) * WARP);
        loop {
            if order.0 == 0 {
                for index in lanes.clone() {
                    self.resume(index)?;
                }
            } else {
                for lane in order.permutation(lanes.len()) {
                    self.resume(lanes.start + lane)?;
                }
            }
            let operation = lanes.clone().find_map(|index| match self.lanes[index].wait.get() {
                Wait::Warp(operation) => Some((index, operation)),
                _ => None,
            });
            let Some((first, operation)) = operation else {
                return Ok(());
            };
            if lanes.len() < WARP {
                return Err(self.fault(first, FaultKind::PartialWarp { lanes: lanes.len() as u32 }));
            }
            if let Some(others) = self.divergence(first, lanes.clone()) {
                return Err(self.fault(first, FaultKind::DivergentWarp { others }));
            }
            if operation == Operation::Sync {
                let syncs = &self.block.warp_syncs[warp];
                syncs.set(syncs.get() + 1);
            }
            machine::complete(operation, &self.lanes[lanes.clone()]);
            for lane in &self.lanes[lanes.clone()] {
                lane.wait.set(Wait::Nothing);
            }
        }
    }

    fn resume(&mut self, index: usize) -> Result<(), Fault> {
        let lane = &self.lanes[index];
        if lane.wait.get() != Wait::Nothing {
            return Ok(());
        }
        machine::enter(lane);
        if self.threads[index].is_none() {
            self.threads[index] = Some(self.begin(index));
        }
        let thread = self.threads[index].as_mut().expect("begun above");
        if let CoroutineResult::Return(()) = thread.resume(()) {
            let stack = self.threads[index].take().expect("as above").into_stack();
            STACKS.with_borrow_mut(|stacks| stacks.push(stack));
        }
        match self.block.fault.borrow_mut().take() {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    }

    /// Where the lanes of `range` are that do not wait where lane `first` does.
    fn divergence(&self, first: usize, range: core::ops::Range<usize>) -> Option<String> {
        let (wait, at) = (self.lanes[first].wait.get(), self.lanes[first].at.get());
        let other = self.lanes[range].iter().find(|lane| lane.wait.get() != wait || lane.at.get() != at)?;
        let thread = other.thread_idx;
        Some(match other.wait.get() {
            Wait::Done => format!("have returned, such as {thread:?}"),
            _ => format!("are at {}, such as {thread:?}", other.at.get().map_or_else(String::new, place)),
        })
    }

    fn fault(&self, index: usize, kind: FaultKind) -> Fault {
        let lane = &self.lanes[index];
        let (kernel, block) = (self.block.entry.name, self.block.block_idx);
        Fault { kernel, block, thread: lane.thread_idx, at: lane.at.get().map_or_else(String::new, place), kind }
    }
}

impl Drop for Scheduler<'_> {
    fn drop(&mut self) {
        for mut thread in self.threads.drain(..).flatten() {
            // SAFETY: a kernel's frames own nothing, so nothing leaks when a faulted one is abandoned.
            unsafe { thread.force_reset() };
            STACKS.with_borrow_mut(|stacks| stacks.push(thread.into_stack()));
        }
    }
}
