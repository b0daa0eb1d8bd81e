//! Products of warpgroups. They are done when they are started; what a GPU might do later is watched instead: operands must
//! stay as they are until the product was waited for, and must have been written for the eyes of the async proxy.

use std::vec::Vec;

use core::panic::Location;

use super::block::{Lane, Operation, SHARED_BYTES};
use super::fault::FaultKind;
use super::machine::{SharedAddress, block, fault, halves, lane, on_shared, together};
use super::shadow::Access;
use crate::f16;

/// Bytes of a row of an operand, and of 8 of them.
const ROW: usize = 128;
const ATOM: usize = 8 * ROW;
/// Bytes of a row that a product takes.
const QUARTER: usize = 32;

/// An operand: a place in a shared array, whose bytes swizzling permutes.
#[derive(Clone, Copy)]
pub struct Operand {
    /// Where the array starts, and its bytes.
    base: SharedAddress,
    bytes: usize,
    /// Where the operand starts in it.
    start: usize,
    /// Bytes from there on to the 16 elements of each row.
    column: usize,
}

impl Operand {
    /// Where 16 bytes of a row are, as places in the array: the first or second half of what a product takes.
    fn chunk(&self, row: usize, half: usize) -> usize {
        let linear = row / 8 * ATOM + row % 8 * ROW + self.column + 16 * half;
        self.start + (linear ^ (row % 8 * 16))
    }
}

/// The products a thread has under way.
#[derive(Default)]
pub(super) struct Products {
    pending: Vec<Product>,
    committed: u32,
    started: u32,
    /// Whether [`crate::wgmma::fence`] came after the last commit.
    fenced: bool,
}

impl Products {
    pub fn reset(&mut self) {
        self.pending.clear();
        (self.committed, self.started, self.fenced) = (0, 0, false);
    }
}

/// A product under way: what this thread read of its operands, and what it found there.
struct Product {
    group: u32,
    chunks: Vec<(Operand, usize)>,
    found: u64,
}

/// What a thread wrote to shared memory, as the async proxy sees it. Times are numbers of barriers passed.
#[derive(Clone, Copy, Default)]
pub(super) struct Proxy {
    /// When the first write came that no fence followed yet.
    unfenced: Option<u32>,
    /// The times from the first write to the fence, of the last fence.
    last: Option<[u32; 2]>,
}

impl Proxy {
    /// Whether what was written at `then` may be unseen behind barrier `now`.
    fn hides(self, then: u32, now: u32) -> bool {
        self.unfenced.is_some_and(|since| since <= then)
            || self.last.is_some_and(|[first, fence]| first <= then && then < fence && fence >= now)
    }
}

/// The running thread wrote to shared memory, or a copy of its landed there.
pub(super) fn wrote_shared() {
    if block().shared_shadow.is_none() {
        return;
    }
    let (lane, now) = (lane(), block().barriers.get());
    let proxy = lane.proxy.get();
    lane.proxy.set(Proxy { unfenced: proxy.unfenced.or(Some(now)), ..proxy });
}

pub fn fence_proxy_async() {
    let (lane, now) = (lane(), block().barriers.get());
    let proxy = lane.proxy.get();
    let last = proxy.unfenced.map_or(proxy.last, |first| Some([first, now]));
    lane.proxy.set(Proxy { unfenced: None, last });
}

/// # Safety
/// None of its own: everything is checked. So for all below.
#[track_caller]
pub unsafe fn operand_at<T>(base: SharedAddress, i: usize, len: usize) -> Operand {
    let start = i * size_of::<T>();
    let offset = (base + start).wrapping_sub(block().arena + SHARED_BYTES);
    if !offset.is_multiple_of(ATOM) {
        fault(FaultKind::OperandMisplaced { offset }, Location::caller());
    }
    Operand { base, bytes: len * size_of::<T>(), start, column: 0 }
}

pub fn quarter_of(operand: Operand, quarter: u32) -> Operand {
    Operand { column: operand.column + quarter as usize * QUARTER, ..operand }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_fence() {
    let [] = together(Operation::Warpgroup, []);
    lane().products.borrow_mut().fenced = true;
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_commit() {
    let [] = together(Operation::Warpgroup, []);
    let mut products = lane().products.borrow_mut();
    products.committed += 1;
    products.fenced = false;
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_wait<const PENDING: u32>() {
    let [] = together(Operation::Warpgroup, []);
    end_products(PENDING);
}

/// The thread's products but those of the `pending` newest groups are done: their operands must still be as they were.
#[track_caller]
fn end_products(pending: u32) {
    let at = Location::caller();
    let mut products = lane().products.borrow_mut();
    let complete_below = products.committed.saturating_sub(pending);
    let done: Vec<Product> = products.pending.extract_if(.., |product| product.group < complete_below).collect();
    drop(products);
    for product in done {
        let mut found = 0;
        for (operand, place) in product.chunks {
            found = mixed(found, access_chunk(operand, place));
        }
        if found != product.found {
            fault(FaultKind::OperandOverwritten, at);
        }
    }
}

/// The running thread's kernel has returned: nothing is under way, and the warps of its warpgroup did alike.
pub(super) fn products_end() {
    if !block().entry.warpgroups {
        return;
    }
    let lane = lane();
    let products = lane.products.borrow();
    let at = lane.at.get().unwrap_or(Location::caller());
    let groups = products.pending.iter().map(|product| product.group).collect::<std::collections::BTreeSet<_>>().len();
    let (started, index) = (products.started, lane.index);
    drop(products);
    if groups > 0 {
        fault(FaultKind::ProductsUnderWay { groups: groups as u32 }, at);
    }
    let warp = index / 32;
    let mut counts = block().products_of_warps.borrow_mut();
    let n_warps = counts.len().max(warp as usize + 1);
    counts.resize(n_warps, None);
    counts[warp as usize] = Some(started);
    let others = (warp / 4 * 4..warp / 4 * 4 + 4).filter_map(|other| Some((other, (*counts.get(other as usize)?)?)));
    let differs = others.into_iter().find(|(_, count)| *count != started);
    drop(counts);
    if let Some((other, expected)) = differs {
        fault(FaultKind::UnevenWarpgroup { found: started, other, expected }, at);
    }
}

/// 16 bytes of an operand, which nobody may be writing.
#[track_caller]
fn access_chunk(operand: Operand, place: usize) -> [u32; 4] {
    let address = on_shared::<u8>(Access::Read, operand.base, place, 16, operand.bytes);
    // SAFETY: checked.
    unsafe { *(address as *const [u32; 4]) }
}

/// The same, as the async proxy reads them first.
#[track_caller]
fn read_chunk(operand: Operand, place: usize) -> [u32; 4] {
    let (at, address) = (Location::caller(), operand.base + place);
    let chunk = access_chunk(operand, place);
    let block = block();
    if let Some(shadow) = &block.shared_shadow {
        let now = block.barriers.get();
        // Threads that have not run yet wrote nothing, so all writers are lanes.
        let hidden =
            shadow.find_writer(address, 16, |stamp| block.proxy_of(stamp.thread).hides(stamp.block_epoch, now));
        if let Some((byte, stamp)) = hidden {
            let index = (place + byte) / size_of::<f16>();
            fault(FaultKind::NotFenced { index, other_thread: stamp.thread }, at);
        }
    }
    chunk
}

fn mixed(before: u64, chunk: [u32; 4]) -> u64 {
    chunk.iter().fold(before, |hash, &word| (hash.rotate_left(7) ^ u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_m64k16_f16<const N: usize>(sums: &mut [[f32; 4]; N], a: [u32; 4], b: Operand) {
    const { crate::wgmma::assert_width(N) };
    let words: [u32; 16] = together(Operation::Wgmma, a);
    let rows: [[f64; 16]; 2] = core::array::from_fn(|i| spread(core::array::from_fn(|j| words[8 * i + j])));
    multiply(sums, rows, Vec::new(), b);
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn wgmma_m64k16_f16_shared<const N: usize>(sums: &mut [[f32; 4]; N], a: Operand, b: Operand) {
    const { crate::wgmma::assert_width(N) };
    let [] = together(Operation::Warpgroup, []);
    multiply_shared(sums, a, b);
}

#[track_caller]
fn multiply_shared(sums: &mut [[f32; 4]], a: Operand, b: Operand) {
    let index = lane().index as usize;
    let first = index / 32 % 4 * 16 + index % 32 / 4;
    let mut chunks = Vec::new();
    let rows = [first, first + 8].map(|row| row_of(a, row, &mut chunks));
    multiply(sums, rows, chunks, b);
}

/// Gives each lane the two rows of A that its row of the fragment and the one 8 below are, 8 words each.
pub(super) fn exchange_rows(lanes: &[Lane; 32]) {
    let registers: [[u32; 4]; 32] = core::array::from_fn(|l| core::array::from_fn(|i| lanes[l].payload[i].get()));
    for (l, lane) in lanes.iter().enumerate() {
        for (i, word) in lane.payload.iter().enumerate() {
            let (below, half, t) = (i / 8, i % 8 / 4, i % 4);
            word.set(registers[l / 4 * 4 + t][below + 2 * half]);
        }
    }
}

fn spread(words: [u32; 8]) -> [f64; 16] {
    core::array::from_fn(|k| halves(words[k / 2])[k % 2])
}

/// The 16 elements of a row of an operand.
#[track_caller]
fn row_of(operand: Operand, row: usize, chunks: &mut Vec<(Operand, usize)>) -> [f64; 16] {
    let places = [operand.chunk(row, 0), operand.chunk(row, 1)];
    chunks.extend(places.map(|place| (operand, place)));
    let words = places.map(|place| read_chunk(operand, place));
    spread(core::array::from_fn(|i| words[i / 4][i % 4]))
}

/// Adds the products of this lane's two rows of A with its columns.
#[track_caller]
fn multiply(sums: &mut [[f32; 4]], rows: [[f64; 16]; 2], mut chunks: Vec<(Operand, usize)>, b: Operand) {
    let (lane, at) = (lane(), Location::caller());
    if !lane.products.borrow().fenced {
        fault(FaultKind::ProductWithoutFence, at);
    }
    for (n, sums) in sums.iter_mut().enumerate() {
        for i in 0..2 {
            let column = row_of(b, 8 * n + 2 * (lane.index as usize % 4) + i, &mut chunks);
            for (half, row) in rows.iter().enumerate() {
                let sum = &mut sums[2 * half + i];
                // Products of f16 are exact in f64, and so, nearly always, their sum.
                *sum = row.iter().zip(column).fold(f64::from(*sum), |sum, (a, b)| sum + a * b) as f32;
            }
        }
    }
    let mut products = lane.products.borrow_mut();
    products.started += 1;
    if block().shared_shadow.is_some() {
        let bytes = |&(operand, place): &(Operand, usize)| -> [u32; 4] {
            // SAFETY: read above.
            unsafe { *((operand.base + place) as *const [u32; 4]) }
        };
        let found = chunks.iter().fold(0, |hash, chunk| mixed(hash, bytes(chunk)));
        let group = products.committed;
        products.pending.push(Product { group, chunks, found });
    }
}
