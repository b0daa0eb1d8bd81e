//! What the blocks of one host thread leave to each other: mapping a stack, beginning a coroutine or growing a vector
//! costs more than a small block.

use std::boxed::Box;
use std::cell::Cell;
use std::vec::Vec;

use corosensei::stack::{DefaultStack, Stack, StackPointer};
use corosensei::{Coroutine, Yielder};

use super::block::{Lane, Wait};
use super::machine::{self, Argument};
use super::shadow::Shadow;

/// Room for a kernel's frame and for the panic machinery on top; only touched pages take memory.
const STACK_BYTES: usize = 256 * 1024;
/// Bytes of a cache line, and lines that a first-level cache tells apart by address.
const LINE: usize = 64;
const LINES: usize = 64;

std::thread_local! {
    static POOL: Cell<Option<Box<Pool>>> = const { Cell::new(None) };
}

/// A coroutine that runs lanes: those of its job that have not begun, until one of them waits; that one is then its own
/// until it has returned.
pub(super) type Worker = Coroutine<*const Job, (), (), ShiftedStack>;

/// What a worker needs to begin lanes.
pub(super) struct Job {
    pub emulate: unsafe fn(&[Argument]),
    pub arguments: *const [Argument],
    pub lanes: *const [Lane],
    /// Indices of one warp's lanes in the order in which they run, and how many of them had their turn.
    pub order: Cell<*const [u32]>,
    pub next: Cell<usize>,
}

impl Job {
    /// The lane whose turn it is, if it has not begun.
    ///
    /// # Safety
    ///
    /// `order` and `lanes` are valid, and hold each other's indices.
    unsafe fn begin_next(&self) -> Option<&Lane> {
        // SAFETY: the caller's promise.
        let (order, lanes) = unsafe { (&*self.order.get(), &*self.lanes) };
        let lane = &lanes[*order.get(self.next.get())? as usize];
        if lane.wait.get() != Wait::Begin {
            return None;
        }
        self.next.set(self.next.get() + 1);
        lane.wait.set(Wait::Nothing);
        Some(lane)
    }
}

/// A stack that begins some cache lines below the end of its mapping. Mappings lie at multiples of a page from each other,
/// so without this the frames of all lanes would compete for the same few lines of the cache.
pub(super) struct ShiftedStack {
    mapping: DefaultStack,
    base: StackPointer,
}

impl ShiftedStack {
    fn new(index: usize) -> Self {
        let mapping = DefaultStack::new(STACK_BYTES).expect("the host maps a stack for each thread of a block");
        // Odd, so that it visits all lines; large, so that neighbours do not overlap.
        let shift = index * 13 % LINES * LINE;
        let base = StackPointer::new(mapping.base().get() - shift).expect("inside the mapping");
        Self { mapping, base }
    }
}

// SAFETY: the stack is the mapping, with its guard page, less its last page at most.
unsafe impl Stack for ShiftedStack {
    fn base(&self) -> StackPointer {
        self.base
    }

    fn limit(&self) -> StackPointer {
        self.mapping.limit()
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Pool {
    pub workers: Vec<Worker>,
    /// Indices of the workers that have no lane.
    pub idle: Vec<u32>,
    pub lanes: Vec<Lane>,
    /// What `lanes` were made for.
    shape: [u32; 3],
    pub warp_syncs: Vec<Cell<u32>>,
    /// `0, 1, …`, as far as a block ever had threads.
    pub natural: Vec<u32>,
    pub arena: Vec<u128>,
    pub arrays: Vec<(*const u8, usize, usize)>,
    pub shared_shadow: Option<Shadow>,
}

impl Pool {
    /// This host thread's.
    pub fn take() -> Box<Self> {
        POOL.take().unwrap_or_default()
    }

    /// For the next block. Every lane has returned, or [`recover`](Self::recover) was called.
    pub fn give_back(self: Box<Self>) {
        POOL.set(Some(self));
    }

    /// Makes lanes as at the start of a block of `shape`.
    pub fn prepare_lanes(&mut self, shape: [u32; 3]) {
        let n_threads = shape.iter().product::<u32>();
        if self.shape != shape {
            self.shape = shape;
            self.lanes.clear();
            self.lanes.extend((0..n_threads).map(|index| Lane::new(index, shape)));
            self.natural = (0..n_threads.max(self.natural.len() as u32)).collect();
        } else {
            self.lanes.iter_mut().for_each(Lane::reset);
        }
    }

    /// Takes from the lanes that have not returned their workers, whose stacks begin anew: a block failed.
    pub fn recover(&mut self) {
        let workers = core::mem::take(&mut self.workers);
        let renewed = workers.into_iter().enumerate().map(|(index, mut worker)| {
            if self.idle.contains(&(index as u32)) {
                return worker;
            }
            // SAFETY: a kernel's frames own nothing, so nothing leaks when they are abandoned.
            unsafe { worker.force_reset() };
            Coroutine::with_stack(worker.into_stack(), work)
        });
        self.workers = renewed.collect();
        self.idle = (0..self.workers.len() as u32).collect();
    }

    /// A worker without a lane.
    pub fn idle_worker(&mut self) -> u32 {
        self.idle.pop().unwrap_or_else(|| {
            let index = self.workers.len();
            self.workers.push(Coroutine::with_stack(ShiftedStack::new(index), work));
            index as u32
        })
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // SAFETY: neither a kernel's frames nor `work` own anything, so nothing leaks when they are abandoned.
            unsafe { worker.force_reset() };
        }
    }
}

/// What a worker does.
fn work(yielder: &Yielder<*const Job, ()>, mut job: *const Job) {
    loop {
        // SAFETY: the job, its arguments and its lanes outlive the pass over a warp that resumed this worker with it, and
        // between passes every worker is suspended. The kernel's contract is that of the launch.
        unsafe {
            while let Some(lane) = (*job).begin_next() {
                machine::enter(lane);
                lane.yielder.set(yielder);
                ((*job).emulate)(&*(*job).arguments);
                machine::returned();
                lane.wait.set(Wait::Done);
            }
        }
        job = yielder.suspend(());
    }
}
