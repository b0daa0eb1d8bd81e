//! Products of warpgroups: against plain sums, and each rule of theirs broken once.

use cuda_std::emulator::FaultKind;
use cuda_std::{Disjoint, Global, Launch, Shared, dynamic_shared_array, f16, kernel, thread, wgmma};

use crate::{Random, all_modes, checked, fault};

const ROWS: usize = 64;
const COLUMNS: usize = 16;
const K: usize = 64;
const HALVES: u32 = ((ROWS + COLUMNS) * K) as u32;
const LAUNCH: Launch = Launch::linear(1, 128);

/// What a kernel does wrong.
const NOTHING: u32 = 0;
const NO_FENCE: u32 = 1;
const NO_PROXY_FENCE: u32 = 2;
const PROXY_FENCE_BEHIND_BARRIER: u32 = 3;
const NO_BARRIER: u32 = 4;
const OVERWRITES: u32 = 5;
const OVERWRITES_BY_ANOTHER: u32 = 6;
const NO_WAIT: u32 = 7;
const MISPLACED: u32 = 8;
const UNEVEN: u32 = 9;

/// Writes this thread's part of a matrix of rows of 64 as an operand.
unsafe fn spread(tiles: Shared<f16>, first: usize, x: Global<f16>) {
    let mut i = thread::thread_idx_x() as usize;
    while i < x.len() {
        let (row, k) = (i / K, i % K);
        let chunk = (k / 8) ^ (row % 8);
        tiles.write(first + row * K + 8 * chunk + k % 8, x[i]);
        i += 128;
    }
}

/// `out = a · bᵀ`, twice: A from registers, then from shared memory.
#[kernel(threads = 128, dynamic_shared = 2 * HALVES, warpgroups)]
unsafe fn product(out: Disjoint<f32>, a: Global<f16>, b: Global<f16>, defect: u32) {
    let tiles = dynamic_shared_array!(product_tiles: [f16; HALVES as usize]);
    let (t, b_at) = (thread::thread_idx_x(), ROWS * K);
    spread(tiles, 0, a);
    spread(tiles, b_at, b);
    if defect != NO_PROXY_FENCE && defect != PROXY_FENCE_BEHIND_BARRIER {
        wgmma::fence_proxy_async();
    }
    if defect != NO_BARRIER {
        thread::sync_threads();
    }
    if defect == PROXY_FENCE_BEHIND_BARRIER {
        wgmma::fence_proxy_async();
    }
    let operand = tiles.operand(if defect == MISPLACED { b_at + 8 } else { b_at });
    let (warp, g, pair) = (t / 32, t % 32 / 4, 2 * (t % 4));
    let row = (16 * warp + g) as usize;
    let two = |row: usize, k: u32| {
        let at = row * K + k as usize;
        u32::from(a[at].to_bits()) | u32::from(a[at + 1].to_bits()) << 16
    };
    let mut sums = [[[0.0; 4]; COLUMNS / 8]; 2];
    if defect != NO_FENCE {
        wgmma::fence();
    }
    let quarters = if defect == UNEVEN && warp == 2 { 3 } else { 4 };
    for quarter in 0..quarters {
        let k = 16 * quarter + pair;
        let registers = [two(row, k), two(row + 8, k), two(row, k + 8), two(row + 8, k + 8)];
        wgmma::m64k16_f16(&mut sums[0], registers, operand.quarter(quarter));
    }
    wgmma::commit();
    wgmma::fence();
    for quarter in 0..4 {
        wgmma::m64k16_f16_shared(&mut sums[1], tiles.operand(0).quarter(quarter), operand.quarter(quarter));
    }
    wgmma::commit();
    if defect == OVERWRITES_BY_ANOTHER {
        thread::sync_threads();
        tiles.write(b_at + t as usize, f16::ONE);
    }
    if defect == OVERWRITES {
        wgmma::wait::<1>();
        thread::sync_threads();
        // The first group is done, the second is not.
        tiles.write(t as usize, f16::ONE);
        thread::sync_threads();
    }
    if defect != NO_WAIT {
        wgmma::wait::<0>();
    }
    for (i, sums) in sums.iter().enumerate() {
        for (n, sums) in sums.iter().enumerate() {
            for (j, &sum) in sums.iter().enumerate() {
                let (row, column) = (row + j / 2 * 8, 8 * n + pair as usize + j % 2);
                out.write((i * ROWS + row) * COLUMNS + column, sum);
            }
        }
    }
}

fn operands() -> (Vec<f16>, Vec<f16>) {
    let mut random = Random(3);
    let mut matrix = |rows: usize| (0..rows * K).map(|_| f16::from_f32(random.uniform(-1.0, 1.0))).collect();
    (matrix(ROWS), matrix(COLUMNS))
}

#[test]
fn products_are_those_of_plain_sums() {
    let (a, b) = operands();
    let dot = |i: usize| -> f64 {
        let (a, b) = (&a[i / COLUMNS % ROWS * K..][..K], &b[i % COLUMNS * K..][..K]);
        a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum()
    };
    for device in all_modes() {
        let (out, a, b) = (device.uninitialized::<f32>(2 * ROWS * COLUMNS), device.upload(&a), device.upload(&b));
        unsafe { product::run(&device.0, LAUNCH, out, a, b, NOTHING) }.unwrap();
        for (i, found) in device.download(out).unwrap().into_iter().enumerate() {
            assert!((f64::from(found) - dot(i)).abs() < 1e-5, "element {i}: {found}, expected {}", dot(i));
        }
    }
}

#[test]
fn each_broken_rule_is_found() {
    let (a, b) = operands();
    let run = |defect: u32| {
        let device = checked();
        let (out, a, b) = (device.uninitialized::<f32>(2 * ROWS * COLUMNS), device.upload(&a), device.upload(&b));
        fault(unsafe { product::run(&device.0, LAUNCH, out, a, b, defect) }).kind
    };
    assert_eq!(run(NO_FENCE), FaultKind::ProductWithoutFence);
    assert!(matches!(run(NO_PROXY_FENCE), FaultKind::NotFenced { .. }));
    assert!(matches!(run(PROXY_FENCE_BEHIND_BARRIER), FaultKind::NotFenced { .. }));
    assert!(matches!(run(NO_BARRIER), FaultKind::Race { .. } | FaultKind::Uninitialized { .. }));
    assert_eq!(run(OVERWRITES), FaultKind::OperandOverwritten);
    assert!(matches!(run(OVERWRITES_BY_ANOTHER), FaultKind::Race { .. } | FaultKind::OperandOverwritten));
    assert_eq!(run(NO_WAIT), FaultKind::ProductsUnderWay { groups: 2 });
    assert_eq!(run(MISPLACED), FaultKind::OperandMisplaced { offset: 2 * (ROWS * K + 8) });
    assert!(matches!(run(UNEVEN), FaultKind::UnevenWarpgroup { .. }));
}
