//! Runs one block: its threads as coroutines, stopped and released at the operations that need several of them.

use std::boxed::Box;
use std::cell::{Cell, RefCell};
use std::format;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::{String, ToString};
use std::vec::Vec;

use core::ops::Range;
use core::panic::Location;

use corosensei::Yielder;

use super::fault::{Fault, FaultKind, place};
use super::machine::{self, Argument};
use super::pool::{Job, Pool};
use super::shadow::{Shadow, Stamp};
use super::wgmma::{Products, Proxy};
use crate::launch::{Entry, Launch};

/// What a block may declare statically, on every architecture.
pub(super) const SHARED_BYTES: usize = 48 * 1024;
pub(super) const POISON: u8 = super::POISON;
pub(super) const WARP: usize = 32;

/// What a thread waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wait {
    /// Its first turn.
    Begin,
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
    Butterfly {
        width: u8,
        operation: u8,
    },
    MmaF16,
    MmaS8,
    LoadMatrix {
        transposed: bool,
    },
    /// A product of a warpgroup: exchanges A's registers, if they are its operand.
    Wgmma,
    /// Fence, commit or wait of a warpgroup.
    Warpgroup,
}

/// One thread, as the operations of this crate see it.
pub(super) struct Lane {
    pub thread_idx: [u32; 3],
    /// Its linear index in the block.
    pub index: u32,
    pub block: Cell<*const Block>,
    /// That of the worker it runs on.
    pub yielder: Cell<*const Yielder<*const Job, ()>>,
    /// The worker, while it waits.
    pub worker: Cell<u32>,
    pub wait: Cell<Wait>,
    /// The last operation it waited at.
    pub at: Cell<Option<&'static Location<'static>>>,
    /// Operands of the operation it waits for, then results.
    pub payload: [Cell<u32>; 16],
    pub copies: RefCell<Copies>,
    pub products: RefCell<Products>,
    pub proxy: Cell<Proxy>,
    /// Whether it has passed [`crate::grid::wait`].
    pub waited: Cell<bool>,
}

impl Lane {
    /// Thread `index` of a block of `shape`, of no block yet.
    pub fn new(index: u32, [x, y, _]: [u32; 3]) -> Self {
        Self {
            thread_idx: [index % x, index / x % y, index / x / y],
            index,
            block: Cell::new(core::ptr::null()),
            yielder: Cell::new(core::ptr::null()),
            worker: Cell::new(0),
            wait: Cell::new(Wait::Begin),
            at: Cell::new(None),
            payload: Default::default(),
            copies: RefCell::default(),
            products: RefCell::default(),
            proxy: Cell::default(),
            waited: Cell::new(false),
        }
    }

    /// As new, for the next block.
    pub fn reset(&mut self) {
        *self.wait.get_mut() = Wait::Begin;
        *self.at.get_mut() = None;
        *self.waited.get_mut() = false;
        let copies = self.copies.get_mut();
        copies.pending.clear();
        copies.committed = 0;
        self.products.get_mut().reset();
        *self.proxy.get_mut() = Proxy::default();
    }
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
    /// Products that the warps which have returned started.
    pub products_of_warps: RefCell<Vec<Option<u32>>>,
    lanes: *const [Lane],
}

impl Block {
    /// What the async proxy sees of what a thread wrote.
    pub fn proxy_of(&self, thread: u32) -> Proxy {
        // SAFETY: the pool that holds the lanes outlives the block, and its vector does not change meanwhile.
        unsafe { (&*self.lanes)[thread as usize].proxy.get() }
    }

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

    fn is_natural(&self) -> bool {
        self.0 == 0
    }

    /// `0..n` in this order's next permutation (Fisher and Yates, over splitmix64).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        if !self.is_natural() {
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

/// Runs block number `linear` of the grid to its end; checked if there is an order.
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
    let mut pool = Pool::take();
    pool.prepare_lanes(launch.block);
    pool.arena.resize((SHARED_BYTES + entry.dynamic_shared as usize).div_ceil(size_of::<u128>()), 0);
    let arena = pool.arena.as_mut_ptr() as usize;
    let shared_shadow = order.is_some().then(|| {
        pool.arena.fill(u128::from_ne_bytes([POISON; 16]));
        let mut shadow = pool.shared_shadow.take().unwrap_or_else(|| Shadow::new(arena, 0));
        shadow.begin_block(arena, pool.arena.len() * size_of::<u128>());
        shadow
    });
    let mut warp_syncs = core::mem::take(&mut pool.warp_syncs);
    warp_syncs.clear();
    warp_syncs.resize(pool.lanes.len().div_ceil(WARP), Cell::new(0));
    let mut arrays = core::mem::take(&mut pool.arrays);
    arrays.clear();
    let block = Block {
        entry,
        launch,
        block_idx,
        number,
        acquired: Cell::new(false),
        linear: linear as u32,
        barriers: Cell::new(0),
        warp_syncs,
        arena,
        arena_used: Cell::new(0),
        arrays: RefCell::new(arrays),
        shared_shadow,
        fault: RefCell::new(None),
        products_of_warps: RefCell::default(),
        lanes: pool.lanes.as_slice(),
    };

    let mut natural = Order::new(0, 0);
    let mut scheduler = Scheduler::new(&block, arguments, pool);
    let result = scheduler.run(order.unwrap_or(&mut natural));
    let mut pool = scheduler.pool;
    if result.is_err() {
        pool.recover();
    }
    (pool.warp_syncs, pool.arrays) = (block.warp_syncs, block.arrays.into_inner());
    pool.shared_shadow = block.shared_shadow.or(pool.shared_shadow.take());
    pool.give_back();
    result
}

struct Scheduler<'a> {
    block: &'a Block,
    pool: Box<Pool>,
    job: Job,
}

impl<'a> Scheduler<'a> {
    fn new(block: &'a Block, arguments: &'a [Argument], pool: Box<Pool>) -> Self {
        for lane in &pool.lanes {
            lane.block.set(block);
        }
        let job = Job {
            emulate: block.entry.emulate,
            arguments,
            lanes: pool.lanes.as_slice(),
            order: Cell::new(&[]),
            next: Cell::new(0),
        };
        Self { block, pool, job }
    }

    fn run(&mut self, order: &mut Order) -> Result<(), Fault> {
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
        let (n_lanes, n_warps) = (self.pool.lanes.len(), self.block.warp_syncs.len());
        loop {
            if order.is_natural() {
                (0..n_warps).try_for_each(|warp| self.run_warp(warp, order))?;
            } else {
                order.permutation(n_warps).into_iter().try_for_each(|warp| self.run_warp(warp, order))?;
            }
            // Each lane now waits at the block's barrier or has returned.
            let Some(first) = self.pool.lanes.iter().position(|lane| lane.wait.get() == Wait::Barrier) else {
                return Ok(());
            };
            if let Some(others) = self.divergence(first, 0..n_lanes) {
                return Err(self.fault(first, FaultKind::DivergentBarrier { others }));
            }
            self.block.barriers.set(self.block.barriers.get() + 1);
            self.release(0..n_lanes);
        }
    }

    fn run_warp(&mut self, warp: usize, order: &mut Order) -> Result<(), Fault> {
        let lanes = warp * WARP..self.pool.lanes.len().min((warp + 1) * WARP);
        loop {
            if order.is_natural() {
                let natural: *const [u32] = &raw const self.pool.natural[lanes.clone()];
                // SAFETY: nothing changes `natural` while a block runs.
                self.pass(unsafe { &*natural })?;
            } else {
                let permutation = order.permutation(lanes.len());
                let drawn: Vec<u32> = permutation.into_iter().map(|lane| (lanes.start + lane) as u32).collect();
                self.pass(&drawn)?;
            }
            let operation = lanes.clone().find_map(|index| match self.pool.lanes[index].wait.get() {
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
            machine::complete(operation, &self.pool.lanes[lanes.clone()]);
            self.release(lanes.clone());
        }
    }

    /// Gives each of a warp's lanes its turn, in this order: it runs as far as it gets.
    fn pass(&mut self, order: &[u32]) -> Result<(), Fault> {
        self.job.order.set(order);
        self.job.next.set(0);
        while let Some(&index) = order.get(self.job.next.get()) {
            let lane = &self.pool.lanes[index as usize];
            let worker = match lane.wait.get() {
                // The worker begins this lane and, if it returns without having waited, those after it.
                Wait::Begin => self.pool.idle_worker(),
                wait => {
                    self.job.next.set(self.job.next.get() + 1);
                    if wait != Wait::Nothing {
                        continue;
                    }
                    machine::enter(lane);
                    lane.worker.get()
                }
            };
            self.pool.workers[worker as usize].resume(&raw const self.job);
            let lane = machine::current();
            match lane.wait.get() {
                Wait::Done => self.pool.idle.push(worker),
                Wait::Nothing => {
                    return Err(self.block.fault.take().expect("only a fault suspends a lane that does not wait"));
                }
                _ => lane.worker.set(worker),
            }
        }
        Ok(())
    }

    /// Lets lanes run on.
    fn release(&self, lanes: Range<usize>) {
        for lane in &self.pool.lanes[lanes] {
            lane.wait.set(Wait::Nothing);
        }
    }

    /// Where the lanes of `range` are that do not wait where lane `first` does.
    fn divergence(&self, first: usize, range: Range<usize>) -> Option<String> {
        let lanes = &self.pool.lanes;
        let (wait, at) = (lanes[first].wait.get(), lanes[first].at.get());
        // One place has one address nearly always; comparing what it names takes long.
        let same = |a: Option<&'static Location>, b: Option<&'static Location>| {
            matches!((a, b), (Some(a), Some(b)) if core::ptr::eq(a, b)) || a == b
        };
        let other = lanes[range].iter().find(|lane| lane.wait.get() != wait || !same(lane.at.get(), at))?;
        let thread = other.thread_idx;
        Some(match other.wait.get() {
            Wait::Done => format!("have returned, such as {thread:?}"),
            _ => format!("are at {}, such as {thread:?}", other.at.get().map_or_else(String::new, place)),
        })
    }

    fn fault(&self, index: usize, kind: FaultKind) -> Fault {
        let lane = &self.pool.lanes[index];
        let (kernel, block) = (self.block.entry.name, self.block.block_idx);
        Fault { kernel, block, thread: lane.thread_idx, at: lane.at.get().map_or_else(String::new, place), kind }
    }
}
