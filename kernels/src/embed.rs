//! Token embedding.

#[cfg(not(target_arch = "nvptx64"))]
use crate::format::WeightFormat;
use crate::format::{self, Format, GROUP, Place};
use cuda_std::warp::WARP_SIZE;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::{DeviceSlice, Entry, Launch, LaunchError, Launcher};
use cuda_std::{Disjoint, Global, kernel, thread};

/// The one geometry the kernels of this file are written for.
#[cfg(not(target_arch = "nvptx64"))]
pub const fn launch(n_tokens: u32) -> Launch {
    Launch::linear(n_tokens, WARP_SIZE)
}

macro_rules! kernels {
    ($($name:ident: $format:ident;)+) => {
        $(
            #[doc = concat!("Looks up tokens in a table of type ", stringify!($format), ".")]
            ///
            /// - Math: `out[t, c] = table[tokens[t], c]`, plus `positions[state[0] + t, c]` if there are any.
            /// - Shapes: `out`: `[n_tokens, d_model]`; `weight`: `[n_vocab, d_model]` in its format's planes; `tokens`:
            ///   `[n_tokens]`; `positions`: `[n_ctx, d_model]`, or empty; `state`: `[1]`, the position of the first token. A
            ///   token or position past its table traps.
            /// - Launch: [`launch`]`(n_tokens)`. A warp owns a token, a lane its groups `g ≡ lane (mod 32)`.
            /// - Shared memory: none, and no barrier.
            /// - Cost: memory bound, a row of each table and `4 · d_model` bytes written a token.
            /// - Determinism: every machine decodes to the same bits, those of the format's reference.
            /// - Source: [`crate::format`].
            ///
            /// # Safety
            ///
            /// Launched as above; the slices have the shapes written above; `d_model` is a multiple of the format's block.
            #[kernel(threads = 32, blocks_per_sm = 16)]
            #[allow(clippy::too_many_arguments, reason = "a kernel's interface is flat")]
            pub unsafe fn $name(
                out: Disjoint<f32>,
                weight: Global<u8>,
                tokens: Global<u32>,
                positions: Global<f32>,
                state: Global<u32>,
                n_tokens: u32,
                d_model: u32,
                n_vocab: u32,
            ) {
                // SAFETY: the launch contract is this kernel's own.
                unsafe { embed::<format::$format>(out, weight, tokens, positions, state, n_tokens, d_model, n_vocab) }
            }
        )+

        /// The kernels of this file.
        #[cfg(not(target_arch = "nvptx64"))]
        pub const ENTRIES: &[&Entry] = &[$($name::ENTRY),+];

        /// Starts the kernel for `format`.
        ///
        /// # Errors
        ///
        /// Those of [`Launcher::launch`].
        ///
        /// # Safety
        ///
        /// Those of the kernel.
        #[cfg(not(target_arch = "nvptx64"))]
        #[allow(clippy::too_many_arguments, reason = "the kernel's own")]
        pub unsafe fn run(
            format: WeightFormat,
            launcher: &dyn Launcher,
            out: DeviceSlice<f32>,
            weight: DeviceSlice<u8>,
            tokens: DeviceSlice<u32>,
            positions: DeviceSlice<f32>,
            state: DeviceSlice<u32>,
            n_tokens: u32,
            d_model: u32,
            n_vocab: u32,
        ) -> Result<(), LaunchError> {
            let launch = launch(n_tokens);
            // SAFETY: the caller's promise.
            unsafe {
                match format {
                    $(WeightFormat::$format => $name::run(
                        launcher, launch, out, weight, tokens, positions, state, n_tokens, d_model, n_vocab,
                    ),)+
                }
            }
        }
    };
}

kernels! {
    embed_f32: F32;
    embed_f16: F16;
    embed_bf16: Bf16;
    embed_q4_0: Q4_0;
    embed_q4_1: Q4_1;
    embed_q5_0: Q5_0;
    embed_q5_1: Q5_1;
    embed_q8_0: Q8_0;
    embed_q2_k: Q2K;
    embed_q3_k: Q3K;
    embed_q4_k: Q4K;
    embed_q5_k: Q5K;
    embed_q6_k: Q6K;
    embed_mxfp4: Mxfp4;
}

/// # Safety
///
/// As the kernels above.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the kernels' own")]
unsafe fn embed<F: Format>(
    out: Disjoint<f32>,
    weight: Global<u8>,
    tokens: Global<u32>,
    positions: Global<f32>,
    state: Global<u32>,
    n_tokens: u32,
    d_model: u32,
    n_vocab: u32,
) {
    let (t, lane, d) = (thread::block_idx_x(), thread::thread_idx_x(), d_model as usize);
    if t >= n_tokens {
        return;
    }
    let token = tokens[t as usize];
    if token >= n_vocab {
        tokens.read(usize::MAX); // Past every table's end: traps rather than read another row.
    }
    let place = Place { weight, planes: F::LAYOUT.planes(d, n_vocab as usize), n_groups: d_model / GROUP };
    let has_positions = positions.len() > 0;
    let position = if has_positions { (state[0] + t) as usize * d } else { 0 };

    let mut group = lane;
    while group < place.n_groups {
        // SAFETY: the row is below `n_vocab`, and the group of it.
        let raw = unsafe { F::load(&place, token as usize, group) };
        let mut i = 0;
        while i < 8 {
            let mut values = F::decode(&raw, i, F::scale(&raw, group, i / 4));
            let c = (group * GROUP) as usize + 4 * i;
            if has_positions {
                let [p0, p1, p2, p3] = [0, 1, 2, 3].map(|j| positions[position + c + j]);
                let [v0, v1, v2, v3] = values;
                values = [v0 + p0, v1 + p1, v2 + p2, v3 + p3];
            }
            // SAFETY: `(t, c..c + 4)` are this lane's alone, inside, and at a multiple of 4 elements.
            unsafe { out.store16(t as usize * d + c, values.map(f32::to_bits)) };
            i += 1;
        }
        group += WARP_SIZE;
    }
}
