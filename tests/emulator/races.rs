//! The race detector: programs of a few accesses against an oracle that compares every pair of them.

use std::cell::Cell;
use std::collections::BTreeSet;

use cuda_std::emulator::{FaultKind, Mode};
use cuda_std::{Atomics, Disjoint, Global, Launch, f16, kernel, shared_array, thread, warp};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::{Device, checked, fault};

/// One step of a program; each thread takes those that name it, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read(Who, u32),
    Write(Who, u32),
    Atomic(Who, u32),
    /// All threads of a block.
    Barrier(u32),
    /// All lanes of a block's warp.
    WarpSync(u32, u32),
    WarpShuffle(u32, u32),
}
use Step::*;

/// Block and thread.
type Who = (u32, u32);

const CELLS: usize = 4;
const BLOCKS: u32 = 2;
const THREADS: u32 = 96;

impl Step {
    /// Operation, block, thread or warp, cell: a byte each.
    fn encode(self) -> u32 {
        let (operation, (block, who), cell) = match self {
            Read(who, cell) => (0, who, cell),
            Write(who, cell) => (1, who, cell),
            Atomic(who, cell) => (2, who, cell),
            Barrier(block) => (3, (block, 0), 0),
            WarpSync(block, warp) => (4, (block, warp), 0),
            WarpShuffle(block, warp) => (5, (block, warp), 0),
        };
        operation << 24 | block << 16 | who << 8 | cell
    }
}

/// A value that an access gave and nobody needs.
fn touch<T>(_: T) {}

/// `plain` and `atomic` are the same memory.
#[kernel(threads = 96)]
unsafe fn interpret(plain: Disjoint<u32>, atomic: Atomics<u32>, program: Global<u32>, in_shared: u32) {
    let shared = shared_array!(cells: [u32; CELLS]);
    let (block, t) = (thread::block_idx_x(), thread::thread_idx_x());
    if in_shared == 1 {
        if t < CELLS as u32 {
            shared.write(t as usize, 0);
        }
        thread::sync_threads();
    }
    for i in 0..program.len() {
        let [cell, who, step_block, operation] = program[i].to_le_bytes().map(u32::from);
        let cell = cell as usize;
        if step_block != block {
            continue;
        }
        match operation {
            0 if who == t && in_shared == 1 => touch(shared.read(cell)),
            0 if who == t => touch(plain.read(cell)),
            1 if who == t && in_shared == 1 => shared.write(cell, i as u32),
            1 if who == t => plain.write(cell, i as u32),
            2 if who == t => touch(atomic.fetch_add(cell, 1)),
            3 => thread::sync_threads(),
            4 if who == t / 32 => warp::sync(),
            5 if who == t / 32 => touch(warp::shuffle_xor(t, 1)),
            _ => {}
        }
    }
}

/// A pair of conflicting accesses: the cell, then each one's name and thread.
type Pair = (usize, (&'static str, Who), (&'static str, Who));

/// Every pair of accesses to one cell by different threads, not both reads and not both atomic, with no barrier of their
/// block and no synchronization of their warp between.
fn races(program: &[Step], in_shared: bool) -> BTreeSet<Pair> {
    let access = |step: &Step| match *step {
        Read(who, cell) => Some(("read", who, cell as usize)),
        Write(who, cell) => Some(("write", who, cell as usize)),
        Atomic(who, cell) => Some(("atomic update", who, cell as usize)),
        _ => None,
    };
    let mut found = BTreeSet::new();
    for (i, first) in program.iter().enumerate() {
        for (j, second) in program.iter().enumerate().skip(i + 1) {
            let (Some((a, who_a, cell_a)), Some((b, who_b, cell_b))) = (access(first), access(second)) else {
                continue;
            };
            let apart = cell_a != cell_b || (in_shared && who_a.0 != who_b.0);
            if apart || who_a == who_b || (a == b && a != "write") {
                continue;
            }
            let orders = |step: &Step| match *step {
                Barrier(block) => who_a.0 == block && who_b.0 == block,
                WarpSync(block, warp) => [who_a, who_b].iter().all(|who| who.0 == block && who.1 / 32 == warp),
                _ => false,
            };
            if !program[i + 1..j].iter().any(orders) {
                found.insert((cell_a, (a, who_a), (b, who_b)));
                found.insert((cell_a, (b, who_b), (a, who_a)));
            }
        }
    }
    found
}

/// Runs `program` in three orders; the race found, if any, is one that the oracle knows, and it finds one if there is any.
fn agrees_with_the_oracle(program: &[Step], in_shared: bool) -> Result<bool, String> {
    let races = races(program, in_shared);
    for seed in [0, 1, 2] {
        let device = Device::new(Mode::Checked { seed });
        let cells = device.zeros::<u32>(CELLS);
        let steps = device.upload(&program.iter().map(|step| step.encode()).collect::<Vec<u32>>());
        let launch = Launch::linear(BLOCKS, THREADS);
        let found = match unsafe { interpret::run(&device.0, launch, cells, cells, steps, in_shared.into()) } {
            Ok(()) => None,
            other => Some(fault(other)),
        };
        match found {
            None if races.is_empty() => {}
            None => return Err(format!("seed {seed}: missed {races:?}")),
            Some(fault) => {
                let FaultKind::Race { index, this, other, other_thread, other_block } = fault.kind else {
                    return Err(format!("seed {seed}: {fault}"));
                };
                let pair = (index, (this, (fault.block[0], fault.thread[0])), (other, (other_block, other_thread)));
                if !races.contains(&pair) {
                    return Err(format!("seed {seed}: {fault}, but the oracle has {races:?}"));
                }
            }
        }
    }
    Ok(!races.is_empty())
}

#[track_caller]
fn check(program: &[Step], racy: bool) {
    for in_shared in [false, true] {
        if in_shared && program.iter().any(|step| matches!(step, Atomic(..) | Read((1, _), _) | Write((1, _), _))) {
            continue;
        }
        assert_eq!(agrees_with_the_oracle(program, in_shared), Ok(racy), "{program:?}, shared: {in_shared}");
    }
}

#[test]
fn two_writes_race_unless_a_barrier_lies_between() {
    check(&[Write((0, 0), 0), Write((0, 1), 0)], true);
    check(&[Write((0, 0), 0), Barrier(0), Write((0, 1), 0)], false);
    check(&[Barrier(0), Write((0, 0), 0), Write((0, 1), 0), Barrier(0)], true);
    check(&[Write((0, 0), 0), Write((0, 0), 0)], false);
    check(&[Write((0, 0), 0), Write((0, 1), 1)], false);
}

#[test]
fn a_read_and_a_write_race_in_either_order() {
    check(&[Read((0, 0), 0), Write((0, 1), 0)], true);
    check(&[Write((0, 0), 0), Read((0, 1), 0)], true);
    check(&[Read((0, 40), 0), Write((0, 1), 0)], true);
    check(&[Write((0, 0), 0), Read((0, 95), 0)], true);
    check(&[Write((0, 0), 0), Barrier(0), Read((0, 95), 0), Barrier(0), Write((0, 1), 0)], false);
}

#[test]
fn reads_do_not_race() {
    check(&[Read((0, 0), 0), Read((0, 1), 0), Read((0, 64), 0), Read((1, 3), 0)], false);
}

#[test]
fn nothing_orders_two_blocks() {
    check(&[Write((0, 0), 0), Write((1, 0), 0)], true);
    check(&[Write((0, 0), 0), Barrier(0), Barrier(1), Read((1, 0), 0)], true);
    check(&[Read((0, 0), 0), Barrier(0), Barrier(1), Write((1, 0), 0)], true);
}

#[test]
fn a_warp_synchronization_orders_its_warp_and_a_shuffle_orders_nothing() {
    check(&[Write((0, 0), 0), WarpSync(0, 0), Read((0, 31), 0)], false);
    check(&[Write((0, 0), 0), WarpShuffle(0, 0), Read((0, 31), 0)], true);
    check(&[Write((0, 0), 0), WarpSync(0, 0), WarpSync(0, 1), Read((0, 32), 0)], true);
    check(&[Write((0, 0), 0), WarpSync(0, 1), Read((0, 1), 0)], true);
}

#[test]
fn many_readers_then_a_writer_need_one_barrier_that_orders_them_all() {
    let by_two_warps = [Read((0, 0), 0), Read((0, 1), 0), Read((0, 32), 0)];
    check(&[&by_two_warps[..], &[Barrier(0), Write((0, 5), 0)]].concat(), false);
    check(&[&by_two_warps[..], &[WarpSync(0, 0), WarpSync(0, 1), Write((0, 0), 0)]].concat(), true);
    check(&[&by_two_warps[..], &[Write((0, 32), 0)]].concat(), true);
}

#[test]
fn readers_of_one_warp_are_ordered_by_its_synchronization() {
    check(&[Read((0, 0), 0), Read((0, 1), 0), WarpSync(0, 0), Write((0, 0), 0)], false);
    check(&[Read((0, 0), 0), Read((0, 1), 0), Write((0, 0), 0)], true);
    check(&[Read((0, 0), 0), Read((0, 1), 0), WarpSync(0, 0), Write((0, 32), 0)], true);
}

#[test]
fn the_only_reader_may_write() {
    check(&[Read((0, 7), 0), Write((0, 7), 0)], false);
    check(&[Read((0, 7), 0), Read((0, 7), 0), Write((0, 7), 0), Read((0, 7), 0)], false);
    check(&[Read((0, 7), 0), Read((1, 7), 0), Write((0, 7), 0)], true);
    check(&[Read((0, 7), 0), Read((1, 7), 0), Write((1, 7), 0)], true);
}

#[test]
fn atomics_race_with_plain_accesses_only() {
    check(&[Atomic((0, 0), 0), Atomic((0, 1), 0), Atomic((1, 0), 0)], false);
    check(&[Atomic((0, 0), 0), Write((0, 1), 0)], true);
    check(&[Atomic((0, 0), 0), Read((0, 1), 0)], true);
    check(&[Read((0, 0), 0), Atomic((0, 1), 0)], true);
    check(&[Write((0, 0), 0), Barrier(0), Atomic((0, 1), 0), Atomic((0, 2), 0)], false);
}

#[test]
fn an_atomic_does_not_hide_an_older_access() {
    // The second update comes after the write only for the thread that made both.
    check(&[Write((0, 0), 0), Atomic((0, 0), 0), Atomic((0, 1), 0)], true);
    // The reader's own update is ordered with its read; the other one is not.
    check(&[Atomic((0, 0), 0), Atomic((0, 1), 0), Read((0, 1), 0)], true);
    check(&[Atomic((0, 0), 0), Atomic((0, 1), 0), Write((0, 1), 0)], true);
    // A thread's own read after its update, or update after its read, orders nobody else.
    check(&[Atomic((0, 0), 0), Read((0, 0), 0), Read((0, 1), 0)], true);
    check(&[Read((0, 0), 0), Atomic((0, 0), 0), Atomic((0, 1), 0)], true);
}

fn step() -> impl Strategy<Value = Step> {
    let who = || (0..BLOCKS, prop::sample::select(vec![0, 1, 31, 32, 33, 64]));
    let cell = || prop_oneof![3 => Just(0u32), 1 => Just(1u32)];
    let warp = || (0..BLOCKS, 0..THREADS / 32);
    prop_oneof![
        4 => (who(), cell()).prop_map(|(who, cell)| Read(who, cell)),
        2 => (who(), cell()).prop_map(|(who, cell)| Write(who, cell)),
        2 => (who(), cell()).prop_map(|(who, cell)| Atomic(who, cell)),
        3 => (0..BLOCKS).prop_map(Barrier),
        3 => warp().prop_map(|(block, warp)| WarpSync(block, warp)),
        1 => warp().prop_map(|(block, warp)| WarpShuffle(block, warp)),
    ]
}

/// Programs in one block and warp have few races, programs all over the grid many: both verdicts occur often.
fn near(step: Step) -> Step {
    match step {
        Read((_, thread), cell) => Read((0, thread % 32), cell),
        Write((_, thread), cell) => Write((0, thread % 32), cell),
        Atomic((_, thread), cell) => Atomic((0, thread % 32), cell),
        Barrier(_) => Barrier(0),
        WarpSync(..) => WarpSync(0, 0),
        WarpShuffle(..) => WarpShuffle(0, 0),
    }
}

fn random_programs_agree_with_the_oracle(in_shared: bool) {
    const CASES: u32 = 1500;
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    let racy = Cell::new(0);
    let result =
        TestRunner::new(config).run(&(prop::collection::vec(step(), 1..14), any::<bool>()), |(program, close)| {
            // Shared memory has no atomics.
            let program = program.into_iter().filter(|step| !in_shared || !matches!(step, Atomic(..)));
            let program: Vec<Step> = program.map(|step| if close { near(step) } else { step }).collect();
            let is_racy = agrees_with_the_oracle(&program, in_shared).map_err(TestCaseError::fail)?;
            racy.set(racy.get() + u32::from(is_racy));
            Ok(())
        });
    result.unwrap_or_else(|error| panic!("{error}"));
    // Neither verdict is rare, or the agreement would mean little.
    assert!((CASES / 5..CASES / 5 * 4).contains(&racy.get()), "{} of {CASES} race", racy.get());
}

#[test]
fn random_programs_in_device_memory_agree_with_the_oracle() {
    random_programs_agree_with_the_oracle(false);
}

#[test]
fn random_programs_in_shared_memory_agree_with_the_oracle() {
    random_programs_agree_with_the_oracle(true);
}

#[kernel(threads = 64)]
unsafe fn neighbouring_halves(out: Disjoint<f16>) {
    let shared = shared_array!(halves: [f16; 64]);
    let t = thread::thread_idx_x() as usize;
    shared.write(t, f16::from_f32(t as f32));
    out.write(t, shared.read(t));
}

#[test]
fn neighbouring_halves_of_different_threads_do_not_race() {
    let device = checked();
    let out = device.uninitialized(64);
    unsafe { neighbouring_halves::run(&device.0, Launch::linear(1, 64), out) }.unwrap();
    assert_eq!(device.download(out).unwrap(), (0..64).map(|t| f16::from_f32(t as f32)).collect::<Vec<_>>());
}

#[kernel(threads = 64)]
unsafe fn shifts_by_one(out: Disjoint<u32>, x: Global<u32>) {
    let t = thread::thread_idx_x() as usize;
    let value = x[t];
    if t > 0 {
        out.write(t - 1, value);
    }
}

#[test]
fn one_memory_behind_two_parameters_is_checked_as_one() {
    for seed in 0..4 {
        let device = Device::new(Mode::Checked { seed });
        let (x, other) = (device.zeros::<u32>(64), device.zeros::<u32>(64));
        unsafe { shifts_by_one::run(&device.0, Launch::linear(1, 64), other, x) }.unwrap();
        let found = fault(unsafe { shifts_by_one::run(&device.0, Launch::linear(1, 64), x, x) });
        assert!(matches!(found.kind, FaultKind::Race { .. }), "{found}");
    }
}

#[kernel(threads = 32)]
unsafe fn writes_four(out: Disjoint<u32>, i: u32, j: u32) {
    match thread::thread_idx_x() {
        0 => out.store16(i as usize, [0; 4]),
        1 => out.write(j as usize, 0),
        _ => {}
    }
}

#[test]
fn a_wide_store_races_on_each_of_its_elements_and_no_other() {
    let device = checked();
    let out = device.zeros::<u32>(16);
    for j in 0..16 {
        let result = unsafe { writes_four::run(&device.0, Launch::linear(1, 32), out, 4, j) };
        if (4..8).contains(&j) {
            let expected =
                FaultKind::Race { index: j as usize, this: "write", other: "write", other_thread: 0, other_block: 0 };
            assert_eq!(fault(result).kind, expected);
        } else {
            result.unwrap();
        }
    }
}

#[test]
fn launches_are_ordered_with_each_other() {
    let device = checked();
    let cells = device.zeros::<u32>(CELLS);
    for program in [Write((0, 0), 0), Write((1, 1), 0), Atomic((0, 5), 0), Read((1, 9), 0), Write((0, 2), 0)] {
        let steps = device.upload(&[program.encode()]);
        unsafe { interpret::run(&device.0, Launch::linear(BLOCKS, THREADS), cells, cells, steps, 0) }.unwrap();
    }
}
