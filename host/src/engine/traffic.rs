//! What one decode step must read of device memory: the bytes that the memory's speed bounds it by.

use super::KvType;
use crate::adapter::{FfnSpec, LayerSpec, LinearSpec, ModelSpec, NormSpec, TensorId};
use crate::gguf::TensorInfo;

/// Bytes of weights, keys and values that one decode step reads when a query sees `n_keys` keys, its own included, where
/// no window hides some of them.
///
/// Each weight counts once, as the file stores it: of the token embedding one row, of experts those that a token uses.
/// Norms, biases, routers and positions, which the device holds as f32, count 4 bytes an element. Activations do not count:
/// they stay in the caches of the device.
pub fn decode_bytes(spec: &ModelSpec, tensors: &[TensorInfo], kv: KvType, n_keys: usize) -> u64 {
    let bytes = |id: TensorId| tensors[id.0].n_bytes as u64;
    let f32s = |id: TensorId| 4 * tensors[id.0].n_elements();
    let linear = |linear: &LinearSpec| bytes(linear.weight) + linear.bias.map_or(0, f32s);
    let norm = |norm: &NormSpec| match *norm {
        NormSpec::Layer { gamma, beta, .. } => f32s(gamma) + f32s(beta),
        NormSpec::Rms { gamma, .. } => f32s(gamma),
    };
    let ffn = |ffn: &FfnSpec| match ffn {
        FfnSpec::Gelu { up, down } => linear(up) + linear(down),
        FfnSpec::MixtureOfExperts { router, n_expert, n_used, gate, up, down, .. } => {
            let stacks = [gate, up, down].map(|experts| bytes(experts.weight) + f32s(experts.bias));
            let used = stacks.iter().sum::<u64>() / *n_expert as u64 * *n_used as u64;
            f32s(router.weight) + router.bias.map_or(0, f32s) + used
        }
    };
    let attention = |layer: &LayerSpec| {
        let keys = n_keys.min(layer.attention.window.unwrap_or(usize::MAX));
        let cached = (2 * keys * spec.n_head_kv * spec.d_head * kv.n_bytes()) as u64;
        cached + layer.attention.sinks.map_or(0, f32s)
    };
    let layer = |layer: &LayerSpec| {
        norm(&layer.attention_norm)
            + layer.qkv.linears().map(linear).sum::<u64>()
            + attention(layer)
            + linear(&layer.attention_output)
            + norm(&layer.ffn_norm)
            + ffn(&layer.ffn)
    };
    let row = bytes(spec.token_embedding) / spec.n_vocab as u64;
    let position = spec.position_embedding.map_or(0, |_| 4 * spec.d_model as u64);
    row + position + spec.layers.iter().map(layer).sum::<u64>() + norm(&spec.output_norm) + linear(&spec.output)
}
