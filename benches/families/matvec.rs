//! One token through a weight matrix: decode's linear maps, at the widths of GPT-2 and gpt-oss.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

mod linear;

use gpt_gamma::gguf::TensorType;
use linear::Linear;

/// `n_in` to `n_out`: GPT-2's up and attention's maps and its head, gpt-oss's attention and its head.
const SHAPES: [(usize, usize); 4] = [(768, 3072), (768, 2304), (768, 50257), (2880, 5120)];
const TYPES: [TensorType; 5] =
    [TensorType::Q4_K, TensorType::Q6_K, TensorType::Q8_0, TensorType::MXFP4, TensorType::F16];

/// A lane's sums round at random: √(terms) · 2⁻²⁴ of their size, about 2e-6 for 2048 terms, up to three times more where the
/// offset of a block and its quants cancel.
const TOLERANCE: f64 = 1e-5;
/// Integer tensor cores take `x` in 16 bits for each group: 2e-5 of the result, at random.
const TOLERANCE_OF_INTEGERS: f64 = 4e-5;

fn main() {
    gamma_benches::run(|suite| {
        for ty in TYPES {
            for (n_in, n_out) in SHAPES {
                // Super-blocks of 256 do not divide gpt-oss's width.
                if n_in % ty.block_len() == 0 {
                    let tolerance = if ty == TensorType::Q8_0 { TOLERANCE_OF_INTEGERS } else { TOLERANCE };
                    Linear { op: "matvec", ty, n_tokens: 1, n_in, n_out }.bench(suite, tolerance);
                }
            }
        }
        for (n_in, n_out) in [(4096, 2880), (2880, 201_088)] {
            let ty = TensorType::Q8_0;
            Linear { op: "matvec", ty, n_tokens: 1, n_in, n_out }.bench(suite, TOLERANCE_OF_INTEGERS);
        }
    });
}
