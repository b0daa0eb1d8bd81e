//! The host machine: each operation of this crate as the emulator does it. The twin of `ptx.rs`.

use std::cell::Cell;

use core::panic::Location;
use core::ptr::NonNull;

use super::block::{Block, Lane, Operation, PendingCopy, SHARED_BYTES, Wait};
use super::fault::{Fault, FaultKind, place};
use super::shadow::{Access, Finding, Shadow};
pub use super::wgmma::*;
use crate::launch::ParamKind;
use crate::{Element, Shared, Store, f16};

/// The shadow of the memory behind a parameter; none in fast mode.
pub type ShadowRef = Option<NonNull<()>>;

pub const SUM: u8 = 0;
pub const MAX: u8 = 1;

std::thread_local! {
    static CURRENT: Cell<*const Lane> = const { Cell::new(core::ptr::null()) };
}

/// `lane` runs from here on.
pub(super) fn enter(lane: &Lane) {
    CURRENT.set(lane);
}

/// The lane that runs, or ran last.
#[inline(always)]
pub(super) fn current() -> &'static Lane {
    lane()
}

/// No lane runs any more; gives the index of the last.
pub(super) fn leave() -> Option<u32> {
    let last = CURRENT.replace(core::ptr::null());
    // SAFETY: set by `enter`, whose lane is still alive when its scheduler calls this.
    (!last.is_null()).then(|| unsafe { (*last).index })
}

#[inline(always)]
pub(super) fn lane() -> &'static Lane {
    let current = CURRENT.get();
    assert!(!current.is_null(), "device operations run inside a kernel launch");
    // SAFETY: `enter` set it, and its scheduler outlives the running coroutine.
    unsafe { &*current }
}

#[inline(always)]
pub(super) fn block() -> &'static Block {
    // SAFETY: the block outlives its lanes.
    unsafe { &*lane().block.get() }
}

/// Ends the launch with a fault of the running thread.
#[cold]
pub(super) fn fault(kind: FaultKind, at: &'static Location<'static>) -> ! {
    let (lane, block) = (lane(), block());
    *block.fault.borrow_mut() =
        Some(Fault { kernel: block.entry.name, block: block.block_idx, thread: lane.thread_idx, at: place(at), kind });
    loop {
        suspend(lane);
    }
}

#[inline(always)]
fn suspend(lane: &Lane) {
    // SAFETY: set when the coroutine began, and valid while it runs.
    unsafe { (*lane.yielder.get()).suspend(()) };
}

/// A launch argument, resolved to host memory.
#[derive(Clone, Copy)]
pub struct Argument {
    bits: u64,
    len: usize,
    shadow: ShadowRef,
}

// SAFETY: it names memory that the launch keeps alive; shadows are used by one thread at a time.
unsafe impl Sync for Argument {}
// SAFETY: as above.
unsafe impl Send for Argument {}

impl Argument {
    pub(super) fn slice_of(address: usize, len: usize, shadow: Option<&Shadow>) -> Self {
        Self { bits: address as u64, len, shadow: shadow.map(|shadow| NonNull::from(shadow).cast()) }
    }

    pub(super) fn empty_slice() -> Self {
        Self { bits: 16, len: 0, shadow: None }
    }

    pub(super) fn scalar(bits: u64) -> Self {
        Self { bits, len: 0, shadow: None }
    }

    pub(crate) fn slice(&self) -> (usize, usize, ShadowRef) {
        (self.bits as usize, self.len, self.shadow)
    }
}

impl From<&Argument> for u32 {
    fn from(argument: &Argument) -> Self {
        argument.bits as u32
    }
}
impl From<&Argument> for i32 {
    fn from(argument: &Argument) -> Self {
        argument.bits as i32
    }
}
impl From<&Argument> for u64 {
    fn from(argument: &Argument) -> Self {
        argument.bits
    }
}
impl From<&Argument> for f32 {
    fn from(argument: &Argument) -> Self {
        f32::from_bits(argument.bits as u32)
    }
}

/// Bytes of one element of a slice parameter.
pub(super) fn element_bytes(kind: ParamKind) -> usize {
    match kind {
        ParamKind::Global(name) | ParamKind::Disjoint(name) | ParamKind::Atomics(name) => match name {
            "u8" => 1,
            "u16" | "f16" => 2,
            "u64" => 8,
            _ => 4,
        },
        ParamKind::Scalar(_) => 1,
    }
}

#[cold]
#[track_caller]
pub fn out_of_bounds(index: usize, len: usize) -> ! {
    fault(FaultKind::OutOfBounds { index, len }, Location::caller())
}

#[inline(always)]
#[track_caller]
pub fn check_bounds(end: usize, index: usize, len: usize) {
    if end > len {
        out_of_bounds(index.max(end - 1), len);
    }
}

#[inline(always)]
#[track_caller]
fn on_access(access: Access, shadow: ShadowRef, base: usize, i: usize, size: usize, bytes: usize, len: usize) -> usize {
    let at = Location::caller();
    let elements = bytes.div_ceil(size);
    if i >= len || elements > len - i {
        fault(FaultKind::OutOfBounds { index: i.saturating_add(elements - 1), len }, at);
    }
    let address = base + i * size;
    if !address.is_multiple_of(bytes) {
        fault(FaultKind::Misaligned { address, alignment: bytes }, at);
    }
    if let Some(shadow) = shadow {
        // SAFETY: the launch holds the allocation, and with it the shadow.
        let shadow = unsafe { shadow.cast::<Shadow>().as_ref() };
        record(shadow, access, address, bytes, i, size, at);
    }
    address
}

fn record(
    shadow: &Shadow,
    access: Access,
    address: usize,
    bytes: usize,
    i: usize,
    size: usize,
    at: &'static Location<'static>,
) {
    let now = block().stamp(lane().index);
    let name = |access| match access {
        Access::Read => "read",
        Access::Write => "write",
        Access::Atomic => "atomic update",
        Access::Copy | Access::Landing => "copy under way",
    };
    match shadow.record(address, bytes, access, now) {
        None => {}
        Some(Finding::Uninitialized { byte }) => fault(FaultKind::Uninitialized { index: i + byte / size }, at),
        Some(Finding::Race { byte, other, other_access }) => fault(
            FaultKind::Race {
                index: i + byte / size,
                this: name(access),
                other: name(other_access),
                other_thread: other.thread,
                other_block: other.block,
            },
            at,
        ),
    }
}

#[inline(always)]
#[track_caller]
pub fn on_read(shadow: ShadowRef, base: usize, i: usize, size: usize, bytes: usize, len: usize) {
    on_access(Access::Read, shadow, base, i, size, bytes, len);
}

#[inline(always)]
#[track_caller]
pub fn on_write(shadow: ShadowRef, base: usize, i: usize, size: usize, bytes: usize, len: usize) {
    after_wait();
    on_access(Access::Write, shadow, base, i, size, bytes, len);
}

#[inline(always)]
#[track_caller]
pub fn on_atomic(shadow: ShadowRef, base: usize, i: usize, size: usize, len: usize) {
    after_wait();
    on_access(Access::Atomic, shadow, base, i, size, size, len);
}

/// A write of device memory: none before [`crate::grid::wait`].
#[inline(always)]
#[track_caller]
fn after_wait() {
    if block().entry.waits && !lane().waited.get() {
        fault(FaultKind::WroteBeforeWait, Location::caller());
    }
}

/// The running thread's kernel has returned.
pub(super) fn returned() {
    let lane = lane();
    if block().entry.waits && !lane.waited.get() {
        // Where it ended nobody knows: its last operation is named.
        fault(FaultKind::NeverWaited, lane.at.get().unwrap_or(Location::caller()));
    }
    products_end();
}

pub fn launch_dependents() {}

/// # Safety
/// None of its own.
pub unsafe fn wait_for_grids() {
    lane().waited.set(true);
}

/// The block knows what others released: its accesses are from here on as those of a later launch.
pub fn acquired(last: bool) {
    if last {
        block().acquired.set(true);
    }
}

#[inline(always)]
pub fn thread_idx() -> [u32; 3] {
    lane().thread_idx
}

#[inline(always)]
pub fn block_idx() -> [u32; 3] {
    block().block_idx
}

#[inline(always)]
pub fn block_dim() -> [u32; 3] {
    block().launch.block
}

#[inline(always)]
pub fn grid_dim() -> [u32; 3] {
    block().launch.grid
}

#[inline(always)]
pub fn lane_id() -> u32 {
    lane().index % 32
}

/// # Safety
/// None of its own: the scheduler checks convergence. So for all warp operations below.
#[inline(always)]
#[track_caller]
pub unsafe fn sync_threads() {
    let lane = lane();
    lane.at.set(Some(Location::caller()));
    lane.wait.set(Wait::Barrier);
    suspend(lane);
}

/// Waits for the warp. This and all that calls it is inlined into the kernel: a lane that were resumed inside a function of
/// its own would return from it to where the processor does not expect, and so would its next switch.
#[inline(always)]
#[track_caller]
pub(super) fn together<const IN: usize, const OUT: usize>(operation: Operation, operands: [u32; IN]) -> [u32; OUT] {
    let lane = lane();
    lane.at.set(Some(Location::caller()));
    for (to, operand) in lane.payload.iter().zip(operands) {
        to.set(operand);
    }
    lane.wait.set(Wait::Warp(operation));
    suspend(lane);
    core::array::from_fn(|i| lane.payload[i].get())
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn sync_warp() {
    let [] = together(Operation::Sync, []);
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_xor(value: u32, lane_mask: u32) -> u32 {
    let [result] = together(Operation::ShuffleXor, [value, lane_mask]);
    result
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_idx(value: u32, source: u32) -> u32 {
    let [result] = together(Operation::ShuffleIdx, [value, source]);
    result
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn shuffle_down(value: u32, delta: u32) -> u32 {
    let [result] = together(Operation::ShuffleDown, [value, delta]);
    result
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn ballot(predicate: bool) -> u32 {
    let [result] = together(Operation::Ballot, [predicate.into()]);
    result
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn butterfly<const WIDTH: u32, const OPERATION: u8>(value: f32) -> f32 {
    let operation = Operation::Butterfly { width: WIDTH as u8, operation: OPERATION };
    let [result] = together(operation, [value.to_bits()]);
    f32::from_bits(result)
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn mma_m16n8k16_f16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    let [c0, c1, c2, c3] = c.map(f32::to_bits);
    together(Operation::MmaF16, [a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3]).map(f32::from_bits)
}

/// # Safety
/// As [`sync_threads`].
#[inline(always)]
#[track_caller]
pub unsafe fn mma_m16n8k32_s8(a: [u32; 4], b: [u32; 2], c: [i32; 4]) -> [i32; 4] {
    let [c0, c1, c2, c3] = c.map(i32::cast_unsigned);
    together(Operation::MmaS8, [a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3]).map(u32::cast_signed)
}

/// Does an operation of a whole warp: operands out of the payloads, results into them.
pub(super) fn complete(operation: Operation, lanes: &[Lane]) {
    let lanes: &[Lane; 32] = lanes.try_into().expect("a warp that is whole");
    let operand = |i: usize| -> [u32; 32] { core::array::from_fn(|l| lanes[l].payload[i].get()) };
    let answer = |value: &dyn Fn(usize) -> u32| {
        for (l, lane) in lanes.iter().enumerate() {
            lane.payload[0].set(value(l));
        }
    };
    match operation {
        Operation::Sync => {}
        Operation::ShuffleXor => {
            let (values, masks) = (operand(0), operand(1));
            answer(&|l| values[(l ^ masks[l] as usize) & 31]);
        }
        Operation::ShuffleIdx => {
            let (values, sources) = (operand(0), operand(1));
            answer(&|l| values[sources[l] as usize & 31]);
        }
        Operation::ShuffleDown => {
            let (values, deltas) = (operand(0), operand(1));
            answer(&|l| {
                let source = l + (deltas[l] & 31) as usize;
                values[if source < 32 { source } else { l }]
            });
        }
        Operation::Ballot => {
            let votes = operand(0).iter().enumerate().fold(0, |votes, (l, vote)| votes | vote << l);
            answer(&|_| votes);
        }
        Operation::Butterfly { width, operation } => {
            let mut values = operand(0).map(f32::from_bits);
            // Each step is a constant: of addresses that are known, LLVM makes vectors.
            let steps: [fn(&mut [f32; 32], u8); 5] =
                [exchange::<16>, exchange::<8>, exchange::<4>, exchange::<2>, exchange::<1>];
            for exchange in &steps[(32 / width).ilog2() as usize..] {
                exchange(&mut values, operation);
            }
            answer(&|l| values[l].to_bits());
        }
        Operation::MmaF16 => mma_f16(lanes),
        Operation::MmaS8 => mma_s8(lanes),
        Operation::LoadMatrix { transposed } => load_matrices(lanes, transposed),
        Operation::Wgmma => exchange_rows(lanes),
        Operation::Warpgroup => {}
    }
}

/// One step of a butterfly.
fn exchange<const STEP: usize>(values: &mut [f32; 32], operation: u8) {
    let before = *values;
    for (l, value) in values.iter_mut().enumerate() {
        let other = before[l ^ STEP];
        *value = if operation == SUM { before[l] + other } else { larger(before[l], other) };
    }
}

/// `max.f32`: NaN counts as absent, and +0 is above −0, which `f32::max` leaves open.
fn larger(a: f32, b: f32) -> f32 {
    if a == 0.0 && b == 0.0 { a + b } else { a.max(b) }
}

/// The two f16 of a register. In integers and one exact product: it runs 192 times per `mma`, and `half`'s conversion asks
/// the processor what it can do each time.
#[inline(always)]
pub(super) fn halves(pair: u32) -> [f64; 2] {
    [pair & 0xffff, pair >> 16].map(|bits| {
        // The exponent of f16 is 112 below that of f32; the product makes up for it, for subnormals too.
        let scaled = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
        let magnitude =
            if bits & 0x7c00 == 0x7c00 { f32::from_bits(0x7f80_0000 | (bits & 0x3ff) << 13) } else { scaled };
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16).into()
    })
}

/// D = A · B + C by the fragment table of [`crate::mma`].
fn mma_f16(lanes: &[Lane; 32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        /// # Safety
        /// The processor has AVX2.
        #[target_feature(enable = "avx2")]
        unsafe fn with_avx2(lanes: &[Lane; 32]) {
            multiply(lanes);
        }
        // SAFETY: it has, says the line above.
        return unsafe { with_avx2(lanes) };
    }
    multiply(lanes);
}

/// [`mma_f16`], for any processor that it is inlined for: the same operations in the same order, more or fewer at a time.
#[inline(always)]
fn multiply(lanes: &[Lane; 32]) {
    // Lane 4g + t has elements 2t and 2t + 1 of row g of a quarter of A (quarters are its registers), of column g of a half of
    // B, and of row g of a half of C. So a register of all lanes is 8 rows, or columns, of 8.
    let register = |i: usize| -> [[f64; 8]; 8] {
        core::array::from_fn(|g| {
            let pairs: [[f64; 2]; 4] = core::array::from_fn(|t| halves(lanes[4 * g + t].payload[i].get()));
            core::array::from_fn(|k| pairs[k / 2][k % 2])
        })
    };
    // Products of f16 are exact in f64, and so, nearly always, their sum.
    let (a, b) = ([register(0), register(1), register(2), register(3)], [register(4), register(5)]);
    let b: [[f64; 8]; 16] = core::array::from_fn(|k| core::array::from_fn(|column| b[k / 8][column][k % 8]));
    for half in 0..2 {
        for g in 0..8 {
            let at = |column: usize| &lanes[4 * g + column / 2].payload;
            let mut d: [f64; 8] =
                core::array::from_fn(|column| f32::from_bits(at(column)[6 + 2 * half + column % 2].get()).into());
            // Columns innermost: eight sums at a time instead of one chain of additions.
            for (k, b) in b.iter().enumerate() {
                let a = a[half + 2 * (k / 8)][g][k % 8];
                for (d, b) in d.iter_mut().zip(b) {
                    *d += a * b;
                }
            }
            // Its registers of A are taken, and C's of this row.
            for (column, d) in d.into_iter().enumerate() {
                at(column)[2 * half + column % 2].set((d as f32).to_bits());
            }
        }
    }
}

/// D = A · B + C by the second fragment table of [`crate::mma`].
fn mma_s8(lanes: &[Lane; 32]) {
    // Indexed (row, k), (k, column) and (row, column).
    let (mut a, mut b, mut d) = ([[0i32; 32]; 16], [[0i32; 8]; 32], [[0i32; 8]; 16]);
    let bytes = |word: u32| word.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
    for (l, lane) in lanes.iter().enumerate() {
        let (g, t) = (l / 4, l % 4);
        for (register, word) in lane.payload[..4].iter().enumerate() {
            let (row, k) = (g + 8 * (register & 1), 4 * t + 16 * (register >> 1));
            a[row][k..k + 4].copy_from_slice(&bytes(word.get()));
        }
        for (register, word) in lane.payload[4..6].iter().enumerate() {
            for (row, byte) in b[4 * t + 16 * register..].iter_mut().zip(bytes(word.get())) {
                row[g] = byte;
            }
        }
        for (register, bits) in lane.payload[6..10].iter().enumerate() {
            d[g + 8 * (register >> 1)][2 * t + (register & 1)] = bits.get().cast_signed();
        }
    }
    for (a, d) in a.iter().zip(&mut d) {
        for (a, b) in a.iter().zip(&b) {
            for (d, b) in d.iter_mut().zip(b) {
                *d = d.wrapping_add(a * b);
            }
        }
    }
    for (l, lane) in lanes.iter().enumerate() {
        let (g, t) = (l / 4, l % 4);
        for (register, to) in lane.payload[..4].iter().enumerate() {
            to.set(d[g + 8 * (register >> 1)][2 * t + (register & 1)].cast_unsigned());
        }
    }
}

fn load_matrices(lanes: &[Lane; 32], transposed: bool) {
    let rows: [[u16; 8]; 32] = core::array::from_fn(|l| {
        let address = u64::from(lanes[l].payload[0].get()) | u64::from(lanes[l].payload[1].get()) << 32;
        // SAFETY: `load_matrix_x4` checked that 16 bytes at this address are inside a shared array.
        unsafe { *(address as *const [u16; 8]) }
    });
    for (l, lane) in lanes.iter().enumerate() {
        for (matrix, register) in lane.payload[..4].iter().enumerate() {
            let element = |row: usize, column: usize| rows[8 * matrix + row][column];
            let (row, column) = (l / 4, 2 * (l % 4));
            let [low, high] = if transposed {
                [element(column, row), element(column + 1, row)]
            } else {
                [element(row, column), element(row, column + 1)]
            };
            register.set(u32::from(low) | u32::from(high) << 16);
        }
    }
}

#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    // `.ftz`: subnormal operands and results are zero. Through f64, since hosts' libraries differ in the last bit of f32.
    let result = f64::from(x).exp2() as f32;
    if result < f32::MIN_POSITIVE { 0.0 } else { result }
}

#[inline(always)]
pub fn rsqrt(x: f32) -> f32 {
    (1.0 / f64::from(x).sqrt()) as f32
}

#[inline(always)]
pub fn sqrt(x: f32) -> f32 {
    x.sqrt()
}

#[inline(always)]
pub fn mul_add(x: f32, a: f32, b: f32) -> f32 {
    // The product is exact in f64. Rounding the sum twice differs from once only if the first ends in the middle between two
    // f32; their subnormals have their middles elsewhere. x86-64 has no baseline FMA, and libm's is ten times slower.
    let sum = f64::from(x) * f64::from(a) + f64::from(b);
    let in_the_middle = sum.to_bits() & 0x1fff_ffff == 0x1000_0000;
    if in_the_middle || sum.abs() < f64::from(f32::MIN_POSITIVE) { x.mul_add(a, b) } else { sum as f32 }
}

#[inline(always)]
pub fn floor(x: f32) -> f32 {
    x.floor()
}

#[inline(always)]
pub fn div_full(x: f32, divisor: f32) -> f32 {
    x / divisor
}

#[inline(always)]
pub fn pack_f16x2(low: f32, high: f32) -> u32 {
    u32::from(f16::from_f32(low).to_bits()) | u32::from(f16::from_f32(high).to_bits()) << 16
}

#[inline(always)]
pub fn mul_f16x2(a: u32, b: u32) -> u32 {
    // In f32 the product is exact.
    let half = |shift: u32| f16::from_bits((a >> shift) as u16).to_f32() * f16::from_bits((b >> shift) as u16).to_f32();
    pack_f16x2(half(0), half(16))
}

#[inline(always)]
pub fn add_f16x2(a: u32, b: u32) -> u32 {
    // In f64 the sum is exact, and so rounded once.
    let half = |shift: u32| {
        let sum = f16::from_bits((a >> shift) as u16).to_f64() + f16::from_bits((b >> shift) as u16).to_f64();
        u32::from(f16::from_f64(sum).to_bits()) << shift
    };
    half(0) | half(16)
}

#[inline(always)]
#[track_caller]
pub fn permute_bytes(a: u32, b: u32, selector: u32) -> u32 {
    assert!(selector & 0x8888_8888 == 0 && selector <= 0xffff, "selector {selector:#x} of permute_bytes");
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    u32::from_le_bytes(core::array::from_fn(|i| bytes[(selector >> (4 * i) & 7) as usize]))
}

/// # Safety
/// The bytes are readable; the caller checked them. So for the two below.
#[inline(always)]
pub unsafe fn load4(from: *const u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { *from }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn load8(from: *const u32) -> [u32; 2] {
    // SAFETY: the caller's promise.
    unsafe { *from.cast() }
}

/// # Safety
/// As above.
#[inline(always)]
pub unsafe fn load16(from: *const u32) -> [u32; 4] {
    // SAFETY: the caller's promise.
    unsafe { *from.cast() }
}

/// # Safety
/// The bytes are writable; the caller checked them.
#[inline(always)]
pub unsafe fn store16(to: *mut u32, x: [u32; 4]) {
    // SAFETY: the caller's promise.
    unsafe { *to.cast() = x }
}

/// A shared array of the running block: where it starts on the host.
pub type SharedAddress = usize;

/// What `shared_array!` expands to: the array of this call site, made by the block's first thread that gets here.
#[doc(hidden)]
#[track_caller]
pub fn shared_array<T: Element>(key: *const u8, len: usize) -> Shared<T> {
    let block = block();
    let bytes = len * size_of::<T>();
    let mut arrays = block.arrays.borrow_mut();
    let known = arrays.iter().find(|(other, _, other_bytes)| *other == key && *other_bytes == bytes);
    let offset = if let Some((_, offset, _)) = known {
        *offset
    } else {
        let offset = block.arena_used.get();
        let used = (offset + bytes).next_multiple_of(16);
        if used > SHARED_BYTES {
            drop(arrays);
            fault(FaultKind::SharedMemory { bytes: used, limit: SHARED_BYTES }, Location::caller());
        }
        block.arena_used.set(used);
        arrays.push((key, offset, bytes));
        offset
    };
    crate::shared::from_address(block.arena + offset, len)
}

/// What `dynamic_shared_array!` expands to: what the launch adds behind the static arrays.
#[doc(hidden)]
#[track_caller]
pub fn dynamic_shared_array<T: Element>(len: usize) -> Shared<T> {
    let block = block();
    let (bytes, limit) = (len * size_of::<T>(), block.entry.dynamic_shared as usize);
    if bytes > limit {
        fault(FaultKind::SharedMemory { bytes, limit }, Location::caller());
    }
    crate::shared::from_address(block.arena + SHARED_BYTES, len)
}

#[inline(always)]
#[track_caller]
pub(super) fn on_shared<T>(access: Access, base: SharedAddress, i: usize, bytes: usize, len: usize) -> usize {
    let shadow = block().shared_shadow.as_ref().map(|shadow| NonNull::from(shadow).cast());
    on_access(access, shadow, base, i, size_of::<T>(), bytes, len)
}

/// # Safety
/// None of its own: bounds and alignment are checked. So for all below.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_read<T: Element>(base: SharedAddress, i: usize, len: usize) -> T {
    let address = on_shared::<T>(Access::Read, base, i, size_of::<T>(), len);
    // SAFETY: checked.
    unsafe { *(address as *const T) }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_write<T: Store>(base: SharedAddress, i: usize, len: usize, value: T) {
    let address = on_shared::<T>(Access::Write, base, i, size_of::<T>(), len);
    wrote_shared();
    // SAFETY: checked.
    unsafe { *(address as *mut T) = value }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_load4<T>(base: SharedAddress, i: usize, len: usize) -> u32 {
    let address = on_shared::<T>(Access::Read, base, i, 4, len);
    // SAFETY: checked.
    unsafe { *(address as *const u32) }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_load16<T>(base: SharedAddress, i: usize, len: usize) -> [u32; 4] {
    let address = on_shared::<T>(Access::Read, base, i, 16, len);
    // SAFETY: checked.
    unsafe { *(address as *const [u32; 4]) }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_store4<T>(base: SharedAddress, i: usize, len: usize, value: u32) {
    let address = on_shared::<T>(Access::Write, base, i, 4, len);
    wrote_shared();
    // SAFETY: checked.
    unsafe { *(address as *mut u32) = value }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn shared_store16<T>(base: SharedAddress, i: usize, len: usize, value: [u32; 4]) {
    let address = on_shared::<T>(Access::Write, base, i, 16, len);
    wrote_shared();
    // SAFETY: checked.
    unsafe { *(address as *mut [u32; 4]) = value }
}

/// # Safety
/// As above.
#[inline(always)]
#[track_caller]
pub unsafe fn load_matrix_x4<T>(base: SharedAddress, i: usize, len: usize, transposed: bool) -> [u32; 4] {
    let address = on_shared::<T>(Access::Read, base, i, 16, len) as u64;
    together(Operation::LoadMatrix { transposed }, [address as u32, (address >> 32) as u32])
}

/// # Safety
/// `from` is readable if `valid`; the caller checked it.
#[track_caller]
pub unsafe fn copy_async<T>(to: SharedAddress, i: usize, len: usize, from: *const u8, valid: bool) {
    // SAFETY: the caller's promise.
    let data = if valid { unsafe { *from.cast() } } else { [0; 4] };
    start_copy::<T>(to, i, len, 16, data);
}

/// # Safety
/// `from` is readable if `wanted`; the caller checked it.
#[track_caller]
pub unsafe fn copy_async_if<T>(wanted: bool, to: SharedAddress, i: usize, len: usize, from: *const u8) {
    if wanted {
        // SAFETY: the caller's promise.
        unsafe { copy_async::<T>(to, i, len, from, true) };
    }
}

/// # Safety
/// As above.
#[track_caller]
pub unsafe fn copy_async4<T>(to: SharedAddress, i: usize, len: usize, from: *const u8, valid: bool) {
    // SAFETY: the caller's promise.
    let word = if valid { unsafe { *from.cast() } } else { 0 };
    start_copy::<T>(to, i, len, 4, [word, 0, 0, 0]);
}

/// A copy of the first `bytes` of `data` to element `i` of a shared array.
#[track_caller]
fn start_copy<T>(to: SharedAddress, i: usize, len: usize, bytes: usize, data: [u32; 4]) {
    let at = Location::caller();
    let elements = bytes / size_of::<T>();
    if i >= len || elements > len - i {
        fault(FaultKind::OutOfBounds { index: i.saturating_add(elements - 1), len }, at);
    }
    let to = to + i * size_of::<T>();
    if !to.is_multiple_of(bytes) {
        fault(FaultKind::Misaligned { address: to, alignment: bytes }, at);
    }
    if let Some(shadow) = &block().shared_shadow {
        record(shadow, Access::Copy, to, bytes, i, size_of::<T>(), at);
    }
    let mut copies = lane().copies.borrow_mut();
    let group = copies.committed;
    copies.pending.push(PendingCopy { group, to, bytes, data });
}

pub fn cp_async_commit() {
    lane().copies.borrow_mut().committed += 1;
}

/// The copies land here and not before: an access in between finds a race with the copy under way.
pub fn cp_async_wait<const PENDING: u32>() {
    let lane = lane();
    let mut copies = lane.copies.borrow_mut();
    let complete_below = copies.committed.saturating_sub(PENDING);
    let landed: std::vec::Vec<PendingCopy> =
        copies.pending.extract_if(.., |copy| copy.group < complete_below).collect();
    drop(copies);
    if !landed.is_empty() {
        wrote_shared();
    }
    for PendingCopy { to, bytes, data, .. } in landed {
        if let Some(shadow) = &block().shared_shadow {
            shadow.record(to, bytes, Access::Landing, block().stamp(lane.index));
        }
        // SAFETY: `start_copy` checked it.
        unsafe { core::ptr::copy_nonoverlapping(data.as_ptr().cast(), to as *mut u8, bytes) };
    }
}

/// # Safety
/// `to` is valid, and everyone accesses it by atomics only.
pub unsafe fn atomic_inc_u32(to: *mut u32, last: u32) -> u32 {
    use core::sync::atomic::{AtomicU32, Ordering};
    let next = |before| Some(if before >= last { 0 } else { before + 1 });
    // SAFETY: the caller's promise.
    let count = unsafe { AtomicU32::from_ptr(to) };
    count.fetch_update(Ordering::AcqRel, Ordering::Acquire, next).expect("there is always a next")
}

macro_rules! atomic {
    ($name:ident, $type:ty, $atomic:ty, $operation:ident) => {
        /// # Safety
        /// `to` is valid, and everyone accesses it by atomics only.
        pub unsafe fn $name(to: *mut $type, value: $type) -> $type {
            // SAFETY: the caller's promise.
            unsafe { <$atomic>::from_ptr(to) }.$operation(value, core::sync::atomic::Ordering::Relaxed)
        }
    };
}

atomic!(atomic_add_u32, u32, core::sync::atomic::AtomicU32, fetch_add);
atomic!(atomic_max_u32, u32, core::sync::atomic::AtomicU32, fetch_max);
atomic!(atomic_add_u64, u64, core::sync::atomic::AtomicU64, fetch_add);
atomic!(atomic_max_u64, u64, core::sync::atomic::AtomicU64, fetch_max);
