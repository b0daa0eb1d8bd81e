use gamma_tests::{assert_close, bytes, devices, uniform};
use gpt_gamma::device::{StreamShape, stream_read};
use half::f16;
use kernels::probe::{self, CHAINS, FACTOR_WORDS, empty, mma_chains};

#[test]
fn a_stream_is_read_whole_and_once() {
    // Less than a round, a round of the smallest grid, one vector more, one round and a tail, many blocks with a tail.
    for (n_vectors, n_blocks, threads) in
        [(1, 1, 32), (7, 1, 32), (512, 1, 32), (513, 1, 32), (1500, 3, 64), (9001, 2, 96)]
    {
        for depth in [4, 8, 16] {
            check_stream(4 * n_vectors, StreamShape { depth, threads, n_blocks });
        }
    }
}

#[track_caller]
fn check_stream(n_words: usize, shape: StreamShape) {
    let data: Vec<u32> =
        bytes(3, 4 * n_words).chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    // Thread i has the vectors i, i + n, …: a word that another read would be in another sum.
    let mut expected = vec![0_u32; shape.n_threads()];
    for (i, vector) in data.chunks_exact(4).enumerate() {
        let sum = &mut expected[i % shape.n_threads()];
        *sum = vector.iter().fold(*sum, |sum, &word| sum.wrapping_add(word));
    }
    for device in devices() {
        let (sums, data) = (device.poisoned(shape.n_threads()), device.upload(&data));
        stream_read(device.launcher(), shape, sums.view(), data.view()).unwrap();
        assert_eq!(sums.to_vec().unwrap(), expected, "{n_words} words, {shape:?}");
    }
}

#[test]
fn chains_of_products_add_up() {
    const N_ROUNDS: u32 = 5;
    // Halves of words: element (row, column) of A and of B by the fragments of PTX ISA, mma.m16n8k16.
    let random = uniform(5, 2 * 32 * FACTOR_WORDS, -1.0, 1.0);
    let factors: Vec<f16> = random.iter().map(|&x| f16::from_f32(x)).collect();
    let half = |lane: usize, word: usize, high: usize| f64::from(factors[2 * (lane * FACTOR_WORDS + word) + high]);
    let a = |row: usize, k: usize| half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
    let b = |k: usize, column: usize| half(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    let product = |row, column| (0..16).map(|k| a(row, k) * b(k, column)).sum::<f64>();
    let mut expected = Vec::new();
    for lane in (0..64).map(|thread| thread % 32) {
        for i in 0..4 {
            let sum = product(lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2);
            expected.push(f64::from(N_ROUNDS) * CHAINS as f64 * sum);
        }
    }
    let bits = |x: f16| u32::from(x.to_bits());
    let words: Vec<u32> = factors.chunks_exact(2).map(|pair| bits(pair[0]) | bits(pair[1]) << 16).collect();
    for device in devices() {
        let (out, factors) = (device.poisoned(4 * 64), device.upload(&words));
        // SAFETY: two warps of 4 elements a lane, 6 words of factors a lane.
        unsafe {
            mma_chains::run(device.launcher(), probe::launch(1, 64), out.slice(), factors.slice(), N_ROUNDS).unwrap();
        }
        // 5 sums of 16 products, then 8 of those: fewer than 30 roundings of 2⁻²⁴, 16 in the tensor core's own order.
        assert_close(&out.to_vec().unwrap(), &expected, 2e-6);
    }
}

#[test]
fn the_empty_kernel_takes_any_launch() {
    for device in devices() {
        for launch in [probe::launch(1, 32), probe::launch(5, 512)] {
            // SAFETY: it takes nothing and does nothing.
            unsafe { empty::run(device.launcher(), launch).unwrap() };
            device.0.synchronize().unwrap();
        }
        // SAFETY: refused before it runs.
        assert!(unsafe { empty::run(device.launcher(), probe::launch(1, 544)) }.is_err());
    }
}
