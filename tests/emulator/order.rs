//! The order that threads run in, the indices they see, and what a launch leaves behind.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use cuda_std::emulator::{Emulator, FaultKind, Mode};
use cuda_std::{Atomics, Disjoint, Global, Launch, kernel, shared_array, thread, warp};

use crate::{Device, all_modes, at, checked, fault};

#[kernel(threads = 64)]
unsafe fn draw_tickets(out: Disjoint<u32>, counter: Atomics<u32>) {
    let i = thread::block_idx_x() * 64 + thread::thread_idx_x();
    let first = counter.fetch_add(0, 1);
    warp::sync();
    let second = counter.fetch_add(1, 1);
    thread::sync_threads();
    out.write(i as usize, first);
    out.write(192 + i as usize, second);
}

fn tickets(seed: u64) -> Vec<u32> {
    let device = Device::new(Mode::Checked { seed });
    let (out, counter) = (device.uninitialized(384), device.zeros(2));
    unsafe { draw_tickets::run(&device.0, Launch::linear(3, 64), out, counter) }.unwrap();
    device.download(out).unwrap()
}

#[test]
fn seed_zero_is_the_natural_order() {
    assert!(tickets(0).into_iter().eq((0..192).chain(0..192)));
}

#[test]
fn other_seeds_permute_blocks_warps_and_lanes() {
    let (mut blocks, mut warps, mut lanes, mut later_lanes) = (false, false, false, false);
    for seed in 1..=8 {
        let found = tickets(seed);
        assert_eq!(found, tickets(seed), "a seed is one order");
        for half in [&found[..192], &found[192..]] {
            let mut sorted = half.to_vec();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..192), "each ticket once");
        }
        blocks |= found[0] / 64 != 0;
        warps |= found[0] % 64 >= 32;
        lanes |= !found[0].is_multiple_of(32);
        later_lanes |= (0..32).any(|lane| found[192 + lane] % 32 != found[lane] % 32);
    }
    assert!(blocks && warps && lanes && later_lanes, "{blocks} {warps} {lanes} {later_lanes}");
}

static ARRIVED: AtomicU32 = AtomicU32::new(0);
static BEGUN: OnceLock<Instant> = OnceLock::new();
static HOSTS: Mutex<Vec<std::thread::ThreadId>> = Mutex::new(Vec::new());

/// Thread 0 of each block waits until two host threads are at work, or 10 s after the first.
#[kernel(threads = 32)]
unsafe fn waits_for_another_block(out: Disjoint<u32>) {
    let i = thread::block_idx_x() * 32 + thread::thread_idx_x();
    if thread::thread_idx_x() == 0 {
        let this = std::thread::current().id();
        let mut hosts = HOSTS.lock().unwrap();
        if !hosts.contains(&this) {
            hosts.push(this);
            ARRIVED.fetch_add(1, Ordering::SeqCst);
        }
        drop(hosts);
        let deadline = *BEGUN.get_or_init(Instant::now) + Duration::from_secs(10);
        while ARRIVED.load(Ordering::SeqCst) < 2 && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
    out.write(i as usize, warp::shuffle(i, 5) + i);
}

#[test]
fn fast_mode_spreads_blocks_over_host_threads() {
    if std::thread::available_parallelism().unwrap().get() == 1 {
        return; // One core has nothing to spread over.
    }
    let device = Device::new(Mode::Fast);
    let out = device.uninitialized(64 * 32);
    unsafe { waits_for_another_block::run(&device.0, Launch::linear(64, 32), out) }.unwrap();
    assert!(HOSTS.lock().unwrap().len() >= 2);
    let expected = (0..64 * 32).map(|i| i / 32 * 32 + 5 + i);
    assert!(device.download(out).unwrap().into_iter().eq(expected));
}

/// A bit of everything: the sum of a row over the block, through shuffles, shared memory and barriers.
#[kernel(threads = 128)]
unsafe fn row_sums(out: Disjoint<f32>, x: Global<f32>) {
    let partial = shared_array!(partial_sums: [f32; 4]);
    let t = thread::thread_idx_x() as usize;
    let Some(row) = x.row(thread::block_idx_x() as usize, 512) else { return };
    let own = row[t] + row[t + 128] + row[t + 256] + row[t + 384];
    let sum = warp::sum(own);
    if t.is_multiple_of(32) {
        partial.write(t / 32, sum);
    }
    thread::sync_threads();
    let total = partial.read(0) + partial.read(1) + partial.read(2) + partial.read(3);
    if t == 0 {
        out.write(thread::block_idx_x() as usize, total);
    }
}

fn row_sums_of(device: &Device) -> Vec<f32> {
    let x: Vec<f32> = (0..40 * 512).map(|i| (i % 1009) as f32 / 7.0).collect();
    let (out, x) = (device.uninitialized(40), device.upload(&x));
    // The last two blocks have no row.
    unsafe { row_sums::run(&device.0, Launch::linear(42, 128), out, x) }.unwrap();
    device.download(out).unwrap()
}

#[test]
fn all_modes_and_orders_give_the_same_bits() {
    let expected = row_sums_of(&checked());
    let exact: f64 = (0..512).map(|i| f64::from(i % 1009) / 7.0).sum();
    assert!((f64::from(expected[0]) - exact).abs() < 1e-2, "{} {exact}", expected[0]);
    for seed in 1..5 {
        assert_eq!(row_sums_of(&Device::new(Mode::Checked { seed })), expected);
    }
    for _ in 0..20 {
        assert_eq!(row_sums_of(&Device::new(Mode::Fast)), expected);
    }
}

#[test]
fn one_emulator_serves_several_host_threads() {
    for mode in [Mode::Fast, Mode::Checked { seed: 3 }] {
        let device = Device::new(mode);
        let expected = row_sums_of(&checked());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..5).for_each(|_| assert_eq!(row_sums_of(&device), expected)));
            }
        });
    }
}

#[kernel(threads = 64)]
unsafe fn write_indices(out: Disjoint<u32>) {
    use thread::*;
    let threads = block_dim_x() * block_dim_y() * 2;
    let block = block_idx_x() + grid_dim_x() * (block_idx_y() + grid_dim_y() * block_idx_z());
    let linear = thread_idx_x() + block_dim_x() * (thread_idx_y() + block_dim_y() * thread_idx_z());
    let indices = [thread_idx_x(), thread_idx_y(), thread_idx_z(), block_idx_x(), block_idx_y(), block_idx_z()];
    let of_warp = [warp::lane_id(), warp::shuffle(linear, 0), grid_dim_z()];
    for (i, value) in indices.into_iter().chain(of_warp).enumerate() {
        out.write(((block * threads + linear) * 9) as usize + i, value);
    }
}

#[test]
fn indices_count_along_x_first_and_warps_follow_them() {
    for device in all_modes() {
        let launch = Launch { grid: [3, 2, 4], block: [8, 4, 2] };
        let out = device.uninitialized(24 * 64 * 9);
        unsafe { write_indices::run(&device.0, launch, out) }.unwrap();
        let found = device.download(out).unwrap();
        let mut at = 0;
        for (z, y, x) in (0..4).flat_map(|z| (0..2).flat_map(move |y| (0..3).map(move |x| (z, y, x)))) {
            for linear in 0..64 {
                let expected = [linear % 8, linear / 8 % 4, linear / 32, x, y, z, linear % 32, linear / 32 * 32, 4];
                assert_eq!(found[at..at + 9], expected, "block {x} {y} {z}, thread {linear}");
                at += 9;
            }
        }
    }
}

#[kernel(threads = 1024)]
unsafe fn fails_in_its_own_way(x: Global<u32>, way: u32) {
    let shared = shared_array!(failing: [u32; 1024]);
    let t = thread::thread_idx_x();
    shared.write(t as usize, t);
    warp::sync();
    warp::sum(1.0); // before the panic
    if t == 700 {
        match way {
            0 => drop(vec![x.read(1)]),
            1 => panic!("seven hundred"),
            2 => panic!("thread {t} of {way}"),
            3 => assert_eq!([1u32, 2][t as usize % 2 + 2], 0),
            4 => std::panic::panic_any(7u8),
            _ => return,
        }
    }
    thread::sync_threads();
}

#[test]
fn a_panic_is_a_fault_with_its_message_and_thread() {
    let messages = [(1, "seven hundred"), (2, "thread 700 of 2"), (4, "")];
    for device in all_modes() {
        let x = device.zeros::<u32>(1);
        for (way, expected) in messages {
            let found = fault(unsafe { fails_in_its_own_way::run(&device.0, Launch::linear(1, 1024), x, way) });
            assert_eq!((found.kernel, found.thread, found.block), ("fails_in_its_own_way", [700, 0, 0], [0; 3]));
            assert_eq!(found.at, format!("after {}", at!("before the panic")));
            assert_eq!(found.kind, FaultKind::Panicked { message: expected.into() });
        }
        let found = fault(unsafe { fails_in_its_own_way::run(&device.0, Launch::linear(1, 1024), x, 3) });
        let FaultKind::Panicked { message } = found.kind else { panic!("{found}") };
        assert!(message.contains("index out of bounds"), "{message}");
    }
}

#[test]
fn a_fault_leaves_the_emulator_as_it_was() {
    let expected = row_sums_of(&checked());
    for device in all_modes() {
        let x = device.zeros::<u32>(1);
        for way in 0..6 {
            fault(unsafe { fails_in_its_own_way::run(&device.0, Launch::linear(2, 1024), x, way) });
            assert_eq!(row_sums_of(&device), expected, "after way {way}");
        }
    }
}

#[test]
fn stacks_of_faulted_threads_are_used_again() {
    // 1024 stacks a launch, each two mappings: 100 launches would pass the 65530 mappings that Linux allows a process.
    let device = checked();
    let x = device.zeros::<u32>(1);
    for _ in 0..100 {
        fault(unsafe { fails_in_its_own_way::run(&device.0, Launch::linear(1, 1024), x, 5) });
    }
}

#[kernel(threads = 1)]
unsafe fn panics_at_once() {
    panic!("at once");
}

#[test]
fn a_panic_before_any_operation_says_so() {
    let found = fault(unsafe { panics_at_once::run(&Emulator::new(Mode::Fast), Launch::linear(1, 1)) });
    assert_eq!(found.at, "at its start");
}

#[test]
#[should_panic(expected = "device operations run inside a kernel launch")]
fn device_operations_outside_a_launch_panic() {
    thread::thread_idx_x();
}
