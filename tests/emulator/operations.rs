//! Each operation of several threads against what PTX says of it.

use std::collections::BTreeSet;

use cuda_std::{Atomics, Disjoint, Global, Launch, f16, kernel, mma, shared_array, thread, warp};

use crate::{Random, all_modes};

const ONE_WARP: Launch = Launch::linear(1, 32);

#[kernel(threads = 32)]
unsafe fn shuffles(out: Disjoint<u32>, x: Global<u32>, operand: u32) {
    let lane = warp::lane_id();
    let (value, i) = (x[lane as usize], lane as usize);
    out.write(i, warp::shuffle_xor(value, operand));
    out.write(32 + i, warp::shuffle(value, operand));
    out.write(64 + i, warp::shuffle_down(value, operand));
    // Each lane may name its own source.
    out.write(96 + i, warp::shuffle(value, (lane * 7 + operand) % 32));
    out.write(128 + i, warp::shuffle_xor(f32::from_bits(value), operand).to_bits());
    out.write(160 + i, warp::shuffle_down(value as i32, operand) as u32);
}

#[test]
fn shuffles_take_the_lane_they_name() {
    let mut random = Random(1);
    // Without NaN patterns: the way through f32 must not be able to change bits.
    let x: Vec<u32> = (0..32).map(|_| random.uniform(-1.0, 1.0).to_bits()).collect();
    for device in all_modes() {
        let (out, input) = (device.uninitialized::<u32>(192), device.upload(&x));
        for operand in 0..32 {
            unsafe { shuffles::run(&device.0, ONE_WARP, out, input, operand as u32) }.unwrap();
            let xor = (0..32).map(|lane| x[lane ^ operand]);
            let indexed = (0..32).map(|_| x[operand]);
            let down = (0..32).map(|lane| if lane + operand < 32 { x[lane + operand] } else { x[lane] });
            let own = (0..32).map(|lane| x[(lane * 7 + operand) % 32]);
            let expected: Vec<u32> =
                xor.clone().chain(indexed).chain(down.clone()).chain(own).chain(xor).chain(down).collect();
            assert_eq!(device.download(out).unwrap(), expected, "operand {operand}");
        }
    }
}

#[kernel(threads = 64)]
unsafe fn votes(out: Disjoint<u32>, x: Global<u32>) {
    let t = thread::thread_idx_x() as usize;
    let predicate = x[t] != 0;
    out.write(t, warp::ballot(predicate));
    out.write(64 + t, u32::from(warp::any(predicate)) + 2 * u32::from(warp::all(predicate)));
}

#[test]
fn votes_are_of_each_warp_alone() {
    let cases = [(0, 0, 0), (!0, !0, 3), (1, 1, 1), (1 << 31, 1 << 31, 1), (!(1 << 13), !(1 << 13), 1u32)];
    for device in all_modes() {
        for (bits, ballot, any_all) in cases {
            let low = (0..32).map(|lane| u32::from(bits >> lane & 1 == 1) * 5);
            let x: Vec<u32> = low.chain([1, 0].into_iter().cycle().take(32)).collect();
            let (out, x) = (device.uninitialized::<u32>(128), device.upload(&x));
            unsafe { votes::run(&device.0, Launch::linear(1, 64), out, x) }.unwrap();
            let found = device.download(out).unwrap();
            assert_eq!(found[..32], [ballot; 32]);
            assert_eq!(found[32..64], [0x5555_5555; 32]);
            assert_eq!(found[64..96], [any_all; 32]);
            assert_eq!(found[96..], [1; 32]);
        }
    }
}

#[kernel(threads = 32)]
unsafe fn reductions(out: Disjoint<f32>, x: Global<f32>) {
    let (i, value) = (warp::lane_id() as usize, x[warp::lane_id() as usize]);
    out.write(i, warp::sum_of::<1>(value));
    out.write(32 + i, warp::sum_of::<2>(value));
    out.write(64 + i, warp::sum_of::<4>(value));
    out.write(96 + i, warp::sum_of::<8>(value));
    out.write(128 + i, warp::sum_of::<16>(value));
    out.write(160 + i, warp::sum_of::<32>(value));
    out.write(192 + i, warp::sum(value));
    out.write(224 + i, warp::max_of::<1>(value));
    out.write(256 + i, warp::max_of::<2>(value));
    out.write(288 + i, warp::max_of::<4>(value));
    out.write(320 + i, warp::max_of::<8>(value));
    out.write(352 + i, warp::max_of::<16>(value));
    out.write(384 + i, warp::max_of::<32>(value));
    out.write(416 + i, warp::max(value));
}

/// The documented order, for the lane whose group it is: the halves of the group, each reduced, then the two.
fn butterfly(x: &[f32], lane: usize, width: usize, operation: &dyn Fn(f32, f32) -> f32) -> f32 {
    // After steps width/2, …, step the value of a lane is that of the step before, with the lane `step` away.
    fn after(x: &[f32], lane: usize, step: usize, width: usize, operation: &dyn Fn(f32, f32) -> f32) -> f32 {
        if step == width {
            return x[lane];
        }
        operation(after(x, lane, 2 * step, width, operation), after(x, lane ^ step, 2 * step, width, operation))
    }
    after(x, lane, 1, width, operation)
}

#[test]
fn reductions_have_the_bits_of_the_butterfly_in_every_lane() {
    let mut random = Random(2);
    for device in all_modes() {
        for round in 0..20 {
            // Magnitudes far apart, so that another order gives other bits.
            let magnitude = |random: &mut Random| f32::powi(2.0, (random.bits() % 24) as i32);
            let x: Vec<f32> = (0..32).map(|_| random.uniform(-1.0, 1.0) * magnitude(&mut random)).collect();
            let (out, input) = (device.uninitialized::<f32>(448), device.upload(&x));
            unsafe { reductions::run(&device.0, ONE_WARP, out, input) }.unwrap();
            let found = device.download(out).unwrap();
            for (row, width) in [1, 2, 4, 8, 16, 32, 32].into_iter().enumerate() {
                for lane in 0..32 {
                    let sum = butterfly(&x, lane, width, &|a, b| a + b);
                    assert_eq!(found[32 * row + lane].to_bits(), sum.to_bits(), "round {round} width {width}");
                    let group = lane / width * width;
                    let max = x[group..group + width].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(found[32 * (7 + row) + lane].to_bits(), max.to_bits(), "round {round} width {width}");
                }
            }
        }
    }
}

#[test]
fn max_ignores_nan_and_puts_plus_zero_above_minus_zero() {
    for device in all_modes() {
        let check = |x: [f32; 32], expected: f32| {
            let (out, input) = (device.uninitialized::<f32>(448), device.upload(&x));
            unsafe { reductions::run(&device.0, ONE_WARP, out, input) }.unwrap();
            for found in &device.download(out).unwrap()[416..] {
                assert_eq!(found.to_bits(), expected.to_bits(), "{x:?}");
            }
        };
        let mut x = [f32::NAN; 32];
        x[17] = -3.0;
        check(x, -3.0);
        for position in 0..32 {
            let mut x = [-0.0; 32];
            x[position] = 0.0;
            check(x, 0.0);
        }
        check([-0.0; 32], -0.0);
        check([f32::NEG_INFINITY; 32], f32::NEG_INFINITY);
    }
}

#[kernel(threads = 32)]
unsafe fn multiply(out: Disjoint<f32>, a: Global<u32>, b: Global<u32>, c: Global<f32>) {
    let lane = warp::lane_id() as usize;
    let a = [a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]];
    let c = [c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]];
    let d = mma::m16n8k16_f16(a, [b[lane * 2], b[lane * 2 + 1]], c);
    for (i, d) in d.into_iter().enumerate() {
        out.write(lane * 4 + i, d);
    }
}

fn pair(low: f16, high: f16) -> u32 {
    u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16
}

/// The fragments of A `[16][16]`, B `[16][8]` and C `[16][8]` after the PTX ISA's index formulas: for a_i, `row = g` for
/// i in 0, 1, 4, 5 and `g + 8` otherwise, `column = 2 t + (i & 1)`, 8 more from i = 4 on; for b_i, `row = 2 t + (i & 1)`,
/// 8 more from i = 2 on, `column = g`; for c_i, `row = g` below i = 2 and `g + 8` from there, `column = 2 t + (i & 1)`.
fn fragments(a: &[[f16; 16]; 16], b: &[[f16; 8]; 16], c: &[[f32; 8]; 16]) -> (Vec<u32>, Vec<u32>, Vec<f32>) {
    let (mut of_a, mut of_b, mut of_c) = (Vec::new(), Vec::new(), Vec::new());
    for lane in 0..32 {
        let (g, t) = (lane / 4, lane % 4);
        let a_i = |i: usize| {
            let row = if matches!(i, 0 | 1 | 4 | 5) { g } else { g + 8 };
            a[row][2 * t + (i & 1) + if i < 4 { 0 } else { 8 }]
        };
        let b_i = |i: usize| b[2 * t + (i & 1) + if i < 2 { 0 } else { 8 }][g];
        of_a.extend([pair(a_i(0), a_i(1)), pair(a_i(2), a_i(3)), pair(a_i(4), a_i(5)), pair(a_i(6), a_i(7))]);
        of_b.extend([pair(b_i(0), b_i(1)), pair(b_i(2), b_i(3))]);
        of_c.extend((0..4).map(|i| c[if i < 2 { g } else { g + 8 }][2 * t + (i & 1)]));
    }
    (of_a, of_b, of_c)
}

fn from_fragments(d: &[f32]) -> [[f32; 8]; 16] {
    let mut matrix = [[f32::NAN; 8]; 16];
    for (lane, d) in d.chunks_exact(4).enumerate() {
        let (g, t) = (lane / 4, lane % 4);
        for (i, &d) in d.iter().enumerate() {
            matrix[if i < 2 { g } else { g + 8 }][2 * t + (i & 1)] = d;
        }
    }
    matrix
}

#[test]
fn mma_is_the_matrix_product_in_the_documented_layout() {
    let mut random = Random(3);
    for device in all_modes() {
        for _ in 0..10 {
            let a: [[f16; 16]; 16] = [0; 16].map(|_| [0; 16].map(|_| f16::from_f32(random.uniform(-2.0, 2.0))));
            let b: [[f16; 8]; 16] = [0; 16].map(|_| [0; 8].map(|_| f16::from_f32(random.uniform(-2.0, 2.0))));
            let c: [[f32; 8]; 16] = [0; 16].map(|_| [0; 8].map(|_| random.uniform(-2.0, 2.0)));
            let (of_a, of_b, of_c) = fragments(&a, &b, &c);
            let out = device.uninitialized::<f32>(128);
            let (of_a, of_b, of_c) = (device.upload(&of_a), device.upload(&of_b), device.upload(&of_c));
            unsafe { multiply::run(&device.0, ONE_WARP, out, of_a, of_b, of_c) }.unwrap();
            let found = from_fragments(&device.download(out).unwrap());
            for (row, found) in found.iter().enumerate() {
                for (column, &found) in found.iter().enumerate() {
                    let products = (0..16).map(|k| f64::from(a[row][k]) * f64::from(b[k][column]));
                    let expected = products.sum::<f64>() + f64::from(c[row][column]);
                    // One rounding to f32; the f64 sums of 17 terms below 4 differ by less than 17 · 68 · 2⁻⁵³.
                    let tolerance = expected.abs() * f64::from(f32::EPSILON) / 2.0 + 1.3e-13;
                    assert!((f64::from(found) - expected).abs() <= tolerance, "({row}, {column}): {found} {expected}");
                }
            }
        }
    }
}

/// Row 0 of A holds one value at a time, column 0 of B the 1 that picks it up; block b takes values 16 b to 16 b + 15.
#[kernel(threads = 32)]
unsafe fn through_mma(out: Disjoint<f32>) {
    let lane = warp::lane_id();
    for k in 0..16 {
        let value = thread::block_idx_x() * 16 + k;
        // Lane t holds columns 2 t, 2 t + 1 of row 0 in register 0 and 8 further ones in register 2; B is the same with
        // rows, in registers 0 and 1.
        let (mine, half) = (lane == k % 8 / 2, 16 * (k % 2));
        let a = if mine { value << half } else { 0 };
        let b = if mine { 0x3c00 << half } else { 0 };
        let (a, b) = if k < 8 { ([a, 0, 0, 0], [b, 0]) } else { ([0, 0, a, 0], [0, b]) };
        let d = mma::m16n8k16_f16(a, b, [0.0; 4]);
        if lane == 0 {
            out.write(value as usize, d[0]);
        }
    }
}

#[test]
fn mma_knows_every_f16() {
    let device = crate::Device::new(cuda_std::emulator::Mode::Fast);
    let out = device.uninitialized::<f32>(1 << 16);
    unsafe { through_mma::run(&device.0, Launch::linear(1 << 12, 32), out) }.unwrap();
    for (bits, found) in device.download(out).unwrap().into_iter().enumerate() {
        let expected = f16::from_bits(bits as u16).to_f32();
        assert!(found == expected || found.is_nan() && expected.is_nan(), "{bits:#x}: {found} {expected}");
    }
}

#[kernel(threads = 32)]
unsafe fn multiply_bytes(out: Disjoint<i32>, a: Global<u32>, b: Global<u32>, c: Global<i32>) {
    let lane = warp::lane_id() as usize;
    let a = [a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]];
    let c = [c[lane * 4], c[lane * 4 + 1], c[lane * 4 + 2], c[lane * 4 + 3]];
    let d = mma::m16n8k32_s8(a, [b[lane * 2], b[lane * 2 + 1]], c);
    for (i, d) in d.into_iter().enumerate() {
        out.write(lane * 4 + i, d);
    }
}

#[test]
fn mma_of_bytes_is_the_matrix_product_in_the_documented_layout() {
    let mut random = Random(4);
    for device in all_modes() {
        // PTX ISA, m16n8k32 of .s8: for a_i, row = g for 0 ≤ i < 4 and 8 ≤ i < 12, else g + 8; column = 4 t + (i & 3), 16 more
        // from i = 8 on. For b_i, row = 4 t + (i & 3), 16 more from i = 4 on; column = g. c_i as for m16n8k16.
        let mut byte = || random.uniform(-128.0, 128.0).floor() as i8;
        let a: [[i8; 32]; 16] = [0; 16].map(|_| [0; 32].map(|_| byte()));
        let mut b: [[i8; 8]; 32] = [0; 32].map(|_| [0; 8].map(|_| byte()));
        b[3] = [i8::MIN; 8];
        let c: [[i32; 8]; 16] = [0; 16].map(|_| [0; 8].map(|_| i32::from(byte()) << 23));
        let (mut of_a, mut of_b, mut of_c) = (Vec::new(), Vec::new(), Vec::new());
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4);
            let a_i = |i: usize| {
                a[if matches!(i, 0..4 | 8..12) { g } else { g + 8 }][4 * t + (i & 3) + if i < 8 { 0 } else { 16 }]
            };
            let b_i = |i: usize| b[4 * t + (i & 3) + if i < 4 { 0 } else { 16 }][g];
            let word = |of: &dyn Fn(usize) -> i8, first: usize| {
                u32::from_le_bytes([0, 1, 2, 3].map(|i| of(first + i).cast_unsigned()))
            };
            of_a.extend([0, 4, 8, 12].map(|first| word(&a_i, first)));
            of_b.extend([0, 4].map(|first| word(&b_i, first)));
            of_c.extend((0..4).map(|i| c[if i < 2 { g } else { g + 8 }][2 * t + (i & 1)]));
        }
        let out = device.uninitialized::<i32>(128);
        let (of_a, of_b, of_c) = (device.upload(&of_a), device.upload(&of_b), device.upload(&of_c));
        unsafe { multiply_bytes::run(&device.0, ONE_WARP, out, of_a, of_b, of_c) }.unwrap();
        for (lane, found) in device.download(out).unwrap().chunks_exact(4).enumerate() {
            for (i, &found) in found.iter().enumerate() {
                let (row, column) = (lane / 4 + if i < 2 { 0 } else { 8 }, 2 * (lane % 4) + (i & 1));
                let products = (0..32).map(|k| i32::from(a[row][k]) * i32::from(b[k][column]));
                assert_eq!(found, products.fold(c[row][column], i32::wrapping_add), "({row}, {column})");
            }
        }
    }
}

const STRIDE: usize = 24;

#[kernel(threads = 32)]
unsafe fn load_matrices(out: Disjoint<u32>, order: Global<u32>) {
    let shared = shared_array!(matrices: [u16; STRIDE * 32]);
    let lane = warp::lane_id() as usize;
    for column in 0..8 {
        shared.write(lane * STRIDE + column, (lane * 8 + column) as u16);
    }
    thread::sync_threads();
    let row = order[lane] as usize * STRIDE;
    let (straight, transposed) = (shared.load_matrix_x4(row), shared.load_matrix_x4_transposed(row));
    for m in 0..4 {
        out.write(lane * 4 + m, straight[m]);
        out.write(128 + lane * 4 + m, transposed[m]);
    }
}

#[test]
fn load_matrix_gives_each_lane_two_elements_of_each_matrix() {
    // PTX ISA, `ldmatrix`: threads 8 m to 8 m + 7 give the rows of matrix m; thread l receives elements 2 (l mod 4) and
    // the next of row l / 4, with `.trans` of column l / 4.
    let reversed: Vec<u32> = (0..32).rev().collect();
    for order in [(0..32).collect::<Vec<u32>>(), reversed, (0..32).map(|l| l * 5 % 32).collect()] {
        for device in all_modes() {
            let (out, given) = (device.uninitialized::<u32>(256), device.upload(&order));
            unsafe { load_matrices::run(&device.0, ONE_WARP, out, given) }.unwrap();
            let found = device.download(out).unwrap();
            // Element `column` of the row that lane `8 m + row` names holds `8 · name + column`.
            let element = |m: usize, row: usize, column: usize| order[8 * m + row] * 8 + column as u32;
            for lane in 0..32 {
                for m in 0..4 {
                    let (line, two) = (lane / 4, 2 * (lane % 4));
                    let straight = element(m, line, two) | element(m, line, two + 1) << 16;
                    let transposed = element(m, two, line) | element(m, two + 1, line) << 16;
                    assert_eq!(found[lane * 4 + m], straight, "lane {lane}, matrix {m}");
                    assert_eq!(found[128 + lane * 4 + m], transposed, "lane {lane}, matrix {m}, transposed");
                }
            }
        }
    }
}

#[kernel(threads = 64)]
unsafe fn count(out: Disjoint<u32>, wide_out: Disjoint<u64>, counts: Atomics<u32>, wide: Atomics<u64>) {
    let i = thread::block_idx_x() * 64 + thread::thread_idx_x();
    out.write(i as usize, counts.fetch_add(0, 1));
    wide_out.write(i as usize, wide.fetch_add(0, 1 << 40));
    counts.fetch_max(1, i * 7 % 128);
    wide.fetch_max(1, u64::from(i * 7 % 128) << 40);
    counts.fetch_add(2, u32::MAX);
}

#[test]
fn atomics_return_the_value_before_and_lose_no_update() {
    for device in all_modes() {
        let (out, wide_out) = (device.uninitialized::<u32>(128), device.uninitialized::<u64>(128));
        let (counts, wide) = (device.zeros::<u32>(3), device.zeros::<u64>(2));
        unsafe { count::run(&device.0, Launch::linear(2, 64), out, wide_out, counts, wide) }.unwrap();
        let before: BTreeSet<u32> = device.download(out).unwrap().into_iter().collect();
        assert!(before.into_iter().eq(0..128));
        let before: BTreeSet<u64> = device.download(wide_out).unwrap().into_iter().collect();
        assert!(before.into_iter().eq((0..128).map(|n| n << 40)));
        // Addition wraps: 128 times −1.
        assert_eq!(device.download(counts).unwrap(), [128, 127, 128u32.wrapping_neg()]);
        assert_eq!(device.download(wide).unwrap(), [128 << 40, 127 << 40]);
    }
}
