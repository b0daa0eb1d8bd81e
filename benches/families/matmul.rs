//! Many tokens through a weight matrix: prefill's linear maps, at the widths of GPT-2 and gpt-oss.

#![allow(missing_docs, clippy::unwrap_used, reason = "a program that panics where it fails")]

mod linear;

use gpt_gamma::gguf::TensorType;
use linear::Linear;

const SHAPES: [(usize, usize); 2] = [(768, 3072), (2880, 5120)];
const TYPES: [TensorType; 3] = [TensorType::MXFP4, TensorType::Q4_K, TensorType::Q8_0];

/// Both factors are rounded to f16: each by 2⁻¹¹/√12 to 2⁻¹²/√12 of itself, a product by about 2e-4 · √2 norm-wise.
const TOLERANCE: f64 = 6e-4;

fn main() {
    gamma_benches::run(|suite| {
        for ty in TYPES {
            for (n_in, n_out) in SHAPES {
                // Super-blocks of 256 do not divide gpt-oss's width: the nearest that they do stands in for it.
                let n_in = n_in.next_multiple_of(ty.block_len());
                for n_tokens in [64, 512, 2048] {
                    Linear { op: "matmul", ty, n_tokens, n_in, n_out }.bench(suite, TOLERANCE);
                }
            }
        }
    });
}
