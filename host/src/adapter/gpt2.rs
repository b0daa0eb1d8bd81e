//! GPT-2: learned positions, layer norms, biases everywhere, GELU, and an output head that may be the embedding.
//!
//! Source: Radford et al., *Language Models are Unsupervised Multitask Learners*; names of keys and tensors as llama.cpp
//! b11434 reads them. Stricter than llama.cpp where a value could change the result without a word.

use super::keys::Keys;
use super::tensors::{Tensors, Wanted};
use super::{AttentionSpec, Error, FfnSpec, LayerSpec, LinearSpec, MAX_LAYERS, MAX_SIZE, ModelSpec, NormSpec, QkvSpec};
use crate::gguf::{Metadata, TensorInfo};

pub(super) const ARCHITECTURE: &str = "gpt2";

/// Describes the GPT-2 model in these key-value pairs and tensors.
pub(super) fn describe(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<ModelSpec, Error> {
    let sizes = Sizes::read(&Keys::new(ARCHITECTURE, metadata))?;
    let Sizes { n_vocab, n_ctx, d_model, n_layer, n_head, n_head_kv, d_head, d_ff, epsilon } = sizes;
    let mut tensors = Tensors::new(tensors);

    let embedding = Wanted { shape: &[d_model, n_vocab], meaning: "[embedding_length, number of tokens]" };
    let token_embedding = tensors.weight("token_embd.weight", embedding)?;
    let positions = Wanted { shape: &[d_model, n_ctx], meaning: "[embedding_length, context_length]" };
    let position_embedding = Some(tensors.weight("position_embd.weight", positions)?);
    let output_norm = norm(&mut tensors, "output_norm", d_model, epsilon)?;
    // Without a head of its own the model uses the embedding again.
    let head = "output.weight";
    let head = if tensors.contains(head) { tensors.weight(head, embedding)? } else { token_embedding };
    let output = LinearSpec { weight: head, bias: None, n_in: d_model, n_out: n_vocab };

    let d_qkv = d_model + 2 * n_head_kv * d_head;
    let mut layers = Vec::with_capacity(n_layer);
    for i in 0..n_layer {
        let mut linear = |name, n_in, n_out, meaning| tensors.linear(&format!("blk.{i}.{name}"), n_in, n_out, meaning);
        let qkv = linear("attn_qkv", d_model, d_qkv, "[embedding_length, rows of q, k and v]")?;
        let attention_output = linear("attn_output", d_model, d_model, "[embedding_length, embedding_length]")?;
        let up = linear("ffn_up", d_model, d_ff, "[embedding_length, feed_forward_length]")?;
        let down = linear("ffn_down", d_ff, d_model, "[feed_forward_length, embedding_length]")?;
        layers.push(LayerSpec {
            attention_norm: norm(&mut tensors, &format!("blk.{i}.attn_norm"), d_model, epsilon)?,
            qkv: QkvSpec::Fused(qkv),
            attention: AttentionSpec { scale: (d_head as f32).sqrt().recip(), window: None, sinks: None, rope: None },
            attention_output,
            ffn_norm: norm(&mut tensors, &format!("blk.{i}.ffn_norm"), d_model, epsilon)?,
            ffn: FfnSpec::Gelu { up, down },
        });
    }
    tensors.finish()?;

    Ok(ModelSpec {
        architecture: ARCHITECTURE,
        n_vocab,
        n_ctx,
        d_model,
        n_layer,
        n_head,
        n_head_kv,
        d_head,
        d_ff,
        token_embedding,
        position_embedding,
        layers,
        output_norm,
        output,
    })
}

fn norm(tensors: &mut Tensors, name: &str, d_model: usize, epsilon: f32) -> Result<NormSpec, Error> {
    let wanted = Wanted { shape: &[d_model], meaning: "[embedding_length]" };
    let gamma = tensors.floats(&format!("{name}.weight"), wanted)?;
    let beta = tensors.floats(&format!("{name}.bias"), wanted)?;
    Ok(NormSpec::Layer { gamma, beta, epsilon })
}

/// The hyper-parameters, checked against each other.
struct Sizes {
    n_vocab: usize,
    n_ctx: usize,
    d_model: usize,
    n_layer: usize,
    n_head: usize,
    n_head_kv: usize,
    d_head: usize,
    d_ff: usize,
    epsilon: f32,
}

impl Sizes {
    fn read(keys: &Keys) -> Result<Self, Error> {
        let n_layer = keys.size("block_count", MAX_LAYERS)?;
        let n_ctx = keys.size("context_length", MAX_SIZE)?;
        let d_model = keys.whole_groups("embedding_length", keys.size("embedding_length", MAX_SIZE)?)?;
        let d_ff = keys.size_of_all_layers("feed_forward_length", n_layer, MAX_SIZE)?;
        let d_ff = keys.whole_groups("feed_forward_length", d_ff)?;
        let n_head = keys.size_of_all_layers("attention.head_count", n_layer, MAX_SIZE)?;
        let n_head_kv = keys.n_head_kv(n_head, n_layer)?;
        let d_head = keys.d_head_or_share(d_model, n_head)?;
        if n_head * d_head != d_model {
            return Err(Error::WidthMismatch { n_head, d_head, d_model });
        }

        keys.only("attention.causal", true)?;
        // Keys by which a file would ask for something else than the forward pass of GPT-2.
        for name in ["expert_count", "expert_used_count", "pooling_type", "nextn_predict_layers"] {
            keys.only(name, 0_u32)?;
        }
        Ok(Self {
            n_vocab: keys.n_vocab()?,
            n_ctx,
            d_model,
            n_layer,
            n_head,
            n_head_kv,
            d_head,
            d_ff,
            epsilon: keys.epsilon("attention.layer_norm_epsilon")?,
        })
    }
}
