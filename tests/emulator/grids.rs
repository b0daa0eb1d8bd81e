//! Grids after one another, blocks that arrive, and memory beyond the static 48 KiB.

use cuda_std::emulator::FaultKind;
use cuda_std::{Atomics, Disjoint, Global, Launch, dynamic_shared_array, grid, kernel, shared_array, thread};

use crate::{all_modes, at, checked, fault};

const THREADS: u32 = 64;
const LANES: usize = THREADS as usize;

/// Each block squares its part of `x`; the last to arrive adds them all up.
#[kernel(threads = THREADS, waits)]
unsafe fn sum_of_squares(sum: Disjoint<f32>, squares: Disjoint<f32>, arrived: Atomics<u32>, x: Global<f32>) {
    grid::wait();
    let i = (thread::block_idx_x() * THREADS + thread::thread_idx_x()) as usize;
    squares.write(i, x[i] * x[i]);
    let flags = shared_array!(sum_of_squares_flags: [u32; LANES]);
    if grid::is_last_block(arrived, 0, thread::grid_dim_x(), flags) && thread::thread_idx_x() == 0 {
        let mut total = 0.0;
        for i in 0..squares.len() {
            total += squares.read(i);
        }
        sum.write(0, total);
    }
}

#[test]
fn the_last_block_reads_what_all_blocks_wrote_and_the_counter_starts_over() {
    for device in all_modes() {
        let x: Vec<f32> = (0..5 * THREADS).map(|i| i as f32 / 8.0).collect();
        let expected: f32 = x.iter().map(|x| x * x).sum();
        let (sum, squares, arrived) = (device.zeros(1), device.uninitialized(x.len()), device.zeros(1));
        let x = device.upload(&x);
        for _ in 0..3 {
            let launch = Launch::linear(5, THREADS);
            unsafe { sum_of_squares::run(&device.0, launch, sum, squares, arrived, x).unwrap() };
            assert_eq!(device.download(sum).unwrap(), [expected]);
            assert_eq!(device.download(arrived).unwrap(), [0_u32]);
        }
    }
}

/// As above, but nobody arrives.
#[kernel(threads = THREADS)]
unsafe fn sum_without_arriving(sum: Disjoint<f32>, squares: Disjoint<f32>, x: Global<f32>) {
    let i = (thread::block_idx_x() * THREADS + thread::thread_idx_x()) as usize;
    squares.write(i, x[i] * x[i]);
    thread::sync_threads();
    if thread::block_idx_x() + 1 == thread::grid_dim_x() && thread::thread_idx_x() == 0 {
        sum.write(0, squares.read(0)); // unordered read
    }
}

#[test]
fn a_block_that_did_not_arrive_may_not_read_what_others_wrote() {
    let device = checked();
    let x = device.upload(&vec![1.0_f32; 2 * LANES]);
    let (sum, squares) = (device.zeros(1), device.uninitialized(2 * LANES));
    let launch = Launch::linear(2, THREADS);
    let fault = fault(unsafe { sum_without_arriving::run(&device.0, launch, sum, squares, x) });
    assert_eq!(fault.at, at!("unordered read"));
    assert!(matches!(fault.kind, FaultKind::Race { this: "read", other: "write", .. }), "{fault}");
}

#[kernel(threads = THREADS, waits)]
unsafe fn writes_early(out: Disjoint<u32>) {
    out.write(thread::thread_idx_x() as usize, 1); // early write
    grid::wait();
}

#[kernel(threads = THREADS, waits)]
unsafe fn counts_early(counts: Atomics<u32>) {
    counts.fetch_add(0, 1); // early count
    grid::wait();
}

#[kernel(threads = THREADS, waits)]
unsafe fn half_waits(out: Disjoint<u32>) {
    if thread::thread_idx_x() < THREADS / 2 {
        grid::wait();
        out.write(thread::thread_idx_x() as usize, 1);
    }
}

#[test]
fn what_comes_before_the_wait_writes_nothing() {
    for device in all_modes() {
        let out = device.zeros(LANES);
        let launch = Launch::linear(1, THREADS);
        let found = fault(unsafe { writes_early::run(&device.0, launch, out) });
        assert_eq!((found.kind, found.at), (FaultKind::WroteBeforeWait, at!("early write")));
        let found = fault(unsafe { counts_early::run(&device.0, launch, out) });
        assert_eq!((found.kind, found.at), (FaultKind::WroteBeforeWait, at!("early count")));
    }
}

#[test]
fn every_thread_of_a_kernel_that_waits_itself_must_wait() {
    for device in all_modes() {
        let found = fault(unsafe { half_waits::run(&device.0, Launch::linear(1, THREADS), device.zeros(LANES)) });
        assert_eq!(found.kind, FaultKind::NeverWaited);
        assert!(found.thread[0] >= THREADS / 2, "{found}");
    }
}

const LARGE: usize = 20_000;

/// Reverses `x` by way of 80,000 bytes of shared memory.
#[kernel(threads = THREADS, dynamic_shared = 4 * LARGE)]
unsafe fn reverses(out: Disjoint<u32>, x: Global<u32>) {
    let all = dynamic_shared_array!(reverses_all: [u32; LARGE]);
    let beside = shared_array!(reverses_beside: [u32; LANES]);
    let lane = thread::thread_idx_x() as usize;
    beside.write(lane, 7);
    let mut i = lane;
    while i < LARGE {
        all.write(i, x[i]);
        i += LANES;
    }
    thread::sync_threads();
    let mut i = lane;
    while i < LARGE {
        out.write(i, all.read(LARGE - 1 - i) + beside.read(LANES - 1 - lane));
        i += LANES;
    }
}

#[kernel(threads = THREADS, dynamic_shared = 4 * LARGE - 4)]
unsafe fn declares_too_little(out: Disjoint<u32>) {
    let all = dynamic_shared_array!(declares_too_little_all: [u32; LARGE]); // too large
    out.write(0, all.len() as u32);
}

#[test]
fn dynamic_shared_memory_is_as_large_as_the_kernel_says() {
    for device in all_modes() {
        let x: Vec<u32> = (0..LARGE as u32).map(|i| i * 3).collect();
        let (out, launch) = (device.uninitialized(LARGE), Launch::linear(2, THREADS));
        let expected: Vec<u32> = x.iter().rev().map(|x| x + 7).collect();
        unsafe { reverses::run(&device.0, Launch::linear(1, THREADS), out, device.upload(&x)).unwrap() };
        assert_eq!(device.download(out).unwrap(), expected);
        let found = fault(unsafe { declares_too_little::run(&device.0, launch, out) });
        assert_eq!(found.kind, FaultKind::SharedMemory { bytes: 4 * LARGE, limit: 4 * LARGE - 4 });
        assert_eq!(found.at, at!("too large"));
    }
}

#[test]
fn the_entry_records_what_the_launch_must_give() {
    assert_eq!((reverses::ENTRY.dynamic_shared, reverses::ENTRY.waits), (80_000, false));
    assert_eq!((writes_early::ENTRY.dynamic_shared, writes_early::ENTRY.waits), (0, true));
}
