//! gpt-oss: RMS norms, grouped queries with attention sinks, windows in every other layer, YaRN, a mixture of experts.
//!
//! Source: OpenAI, *gpt-oss-120b & gpt-oss-20b Model Card*, arXiv:2508.10925; names of keys and tensors as llama.cpp
//! b11434 reads them. Stricter than llama.cpp, where a missing rope key means other frequencies without a word.

use super::keys::Keys;
use super::tensors::{Tensors, Wanted};
use super::{
    AttentionSpec, ClampedSwiGlu, Error, ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, MAX_EXPERTS, MAX_EXPERTS_USED,
    MAX_LAYERS, MAX_SIZE, ModelSpec, NormSpec, QkvSpec, RopeSpec, YarnSpec,
};
use crate::gguf::{Metadata, TensorInfo};

pub(super) const ARCHITECTURE: &str = "gpt-oss";

/// The activation of every gpt-oss model: no key says it.
const ACTIVATION: ClampedSwiGlu = ClampedSwiGlu { alpha: 1.702, limit: 7.0 };
/// The layers that see a window only, where the file does not say: of every two the first.
const DEFAULT_WINDOW_PATTERN: usize = 2;

/// Describes the gpt-oss model in these key-value pairs and tensors.
pub(super) fn describe(metadata: &Metadata, tensors: &[TensorInfo]) -> Result<ModelSpec, Error> {
    let keys = Keys::new(ARCHITECTURE, metadata);
    let sizes = Sizes::read(&keys)?;
    let Sizes { n_vocab, n_ctx, d_model, n_layer, n_head, n_head_kv, d_head, d_ff, epsilon, .. } = sizes;
    let rope = rope(&keys, d_head)?;
    let window = keys.size("attention.sliding_window", MAX_SIZE)?;
    let has_window = keys.window_pattern("attention.sliding_window_pattern", n_layer, DEFAULT_WINDOW_PATTERN)?;
    let mut tensors = Tensors::new(tensors);

    let embedding = Wanted { shape: &[d_model, n_vocab], meaning: "[embedding_length, number of tokens]" };
    let token_embedding = tensors.weight("token_embd.weight", embedding)?;
    let output_norm = norm(&mut tensors, "output_norm", d_model, epsilon)?;
    let head = tensors.weight("output.weight", embedding)?;
    let output = LinearSpec { weight: head, bias: None, n_in: d_model, n_out: n_vocab };

    let mut layers = Vec::with_capacity(n_layer);
    for (i, &has_window) in has_window.iter().enumerate() {
        let attention_norm = norm(&mut tensors, &format!("blk.{i}.attn_norm"), d_model, epsilon)?;
        let qkv = qkv(&mut tensors, i, &sizes)?;
        let heads = Wanted { shape: &[n_head], meaning: "[attention.head_count]" };
        let attention = AttentionSpec {
            scale: (d_head as f32).sqrt().recip(),
            window: has_window.then_some(window),
            sinks: Some(tensors.floats(&format!("blk.{i}.attn_sinks.weight"), heads)?),
            rope: Some(rope.clone()),
        };
        let meaning = "[rows of q, embedding_length]";
        let attention_output = tensors.linear(&format!("blk.{i}.attn_output"), n_head * d_head, d_model, meaning)?;
        layers.push(LayerSpec {
            attention_norm,
            qkv,
            attention,
            attention_output,
            ffn_norm: norm(&mut tensors, &format!("blk.{i}.post_attention_norm"), d_model, epsilon)?,
            ffn: mixture(&mut tensors, i, &sizes)?,
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
        position_embedding: None,
        layers,
        output_norm,
        output,
    })
}

fn norm(tensors: &mut Tensors, name: &str, d_model: usize, epsilon: f32) -> Result<NormSpec, Error> {
    let wanted = Wanted { shape: &[d_model], meaning: "[embedding_length]" };
    Ok(NormSpec::Rms { gamma: tensors.floats(&format!("{name}.weight"), wanted)?, epsilon })
}

/// Queries, keys and values of layer `i`: three tensors, as converters write them, or one, as llama.cpp reads too.
fn qkv(tensors: &mut Tensors, i: usize, sizes: &Sizes) -> Result<QkvSpec, Error> {
    let (d_q, d_kv) = (sizes.n_head * sizes.d_head, sizes.n_head_kv * sizes.d_head);
    let fused = format!("blk.{i}.attn_qkv");
    if tensors.contains(&format!("{fused}.weight")) {
        let meaning = "[embedding_length, rows of q, k and v]";
        return Ok(QkvSpec::Fused(tensors.linear(&fused, sizes.d_model, d_q + 2 * d_kv, meaning)?));
    }
    let mut linear = |name, n_out| {
        let meaning = "[embedding_length, heads times key_length]";
        tensors.linear(&format!("blk.{i}.{name}"), sizes.d_model, n_out, meaning)
    };
    Ok(QkvSpec::Separate { q: linear("attn_q", d_q)?, k: linear("attn_k", d_kv)?, v: linear("attn_v", d_kv)? })
}

/// The feed-forward network of layer `i`.
fn mixture(tensors: &mut Tensors, i: usize, sizes: &Sizes) -> Result<FfnSpec, Error> {
    let Sizes { d_model, d_ff, n_expert, n_used, .. } = *sizes;
    // Nobody quantizes a router, since a small error there chooses other experts.
    let name = format!("blk.{i}.ffn_gate_inp");
    let weight = Wanted { shape: &[d_model, n_expert], meaning: "[embedding_length, expert_count]" };
    let weight = tensors.floats(&format!("{name}.weight"), weight)?;
    let bias = Wanted { shape: &[n_expert], meaning: "[expert_count]" };
    let bias = Some(tensors.floats(&format!("{name}.bias"), bias)?);

    let mut experts = |name, n_in, n_out, meanings: [&'static str; 2]| -> Result<ExpertsSpec, Error> {
        let name = format!("blk.{i}.{name}");
        let weight = Wanted { shape: &[n_in, n_out, n_expert], meaning: meanings[0] };
        let bias = Wanted { shape: &[n_out, n_expert], meaning: meanings[1] };
        Ok(ExpertsSpec {
            weight: tensors.weight(&format!("{name}.weight"), weight)?,
            bias: tensors.floats(&format!("{name}.bias"), bias)?,
            n_in,
            n_out,
        })
    };
    let inward =
        ["[embedding_length, expert_feed_forward_length, expert_count]", "[expert_feed_forward_length, expert_count]"];
    let outward = ["[expert_feed_forward_length, embedding_length, expert_count]", "[embedding_length, expert_count]"];
    Ok(FfnSpec::MixtureOfExperts {
        router: LinearSpec { weight, bias, n_in: d_model, n_out: n_expert },
        n_expert,
        n_used,
        gate: experts("ffn_gate_exps", d_model, d_ff, inward)?,
        up: experts("ffn_up_exps", d_model, d_ff, inward)?,
        down: experts("ffn_down_exps", d_ff, d_model, outward)?,
        activation: ACTIVATION,
    })
}

/// The rotary positions of all layers, with and without a window.
fn rope(keys: &Keys, d_head: usize) -> Result<RopeSpec, Error> {
    let base = keys.number("rope.freq_base", "above 1", |base| base > 1.0)?;
    keys.only("rope.freq_base_swa", base)?;
    // All elements are turned: published files do not even say so.
    keys.only("rope.dimension_count", d_head)?;
    keys.only("rope.dimension_count_swa", d_head)?;
    let scaling = match keys.text("rope.scaling.type")? {
        "none" => None,
        "yarn" => Some(yarn(keys)?),
        found => return Err(keys.rope_scaling("rope.scaling.type", found)),
    };
    Ok(RopeSpec { n_dims: d_head, base, scaling })
}

fn yarn(keys: &Keys) -> Result<YarnSpec, Error> {
    let factor = keys.number("rope.scaling.factor", "of at least 1", |factor| factor >= 1.0)?;
    keys.only("rope.scale_linear", factor)?;
    // Knobs of other models, at the values that leave the formula alone.
    for (name, neutral) in [("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)] {
        keys.only(&format!("rope.scaling.{name}"), neutral)?;
    }
    keys.only("rope.scaling.alpha", 0.0_f32)?;
    // OpenAI's own values where a converter left them out; llama.cpp has them fixed.
    let beta_slow = keys.number_or("rope.scaling.yarn_beta_slow", 1.0, "above 0", |beta| beta > 0.0)?;
    let beta_fast =
        keys.number_or("rope.scaling.yarn_beta_fast", 32.0, "above yarn_beta_slow", |beta| beta > beta_slow)?;
    Ok(YarnSpec {
        factor,
        original_context: keys.size("rope.scaling.original_context_length", MAX_SIZE)?,
        beta_fast,
        beta_slow,
        attention_factor: keys.number_or("rope.scaling.attn_factor", 1.0, "above 0", |factor| factor > 0.0)?,
    })
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
    n_expert: usize,
    n_used: usize,
    epsilon: f32,
}

impl Sizes {
    fn read(keys: &Keys) -> Result<Self, Error> {
        let n_layer = keys.size("block_count", MAX_LAYERS)?;
        let n_ctx = keys.size("context_length", MAX_SIZE)?;
        let n_expert = keys.size("expert_count", MAX_EXPERTS)?;
        let n_used = keys.size("expert_used_count", n_expert.min(MAX_EXPERTS_USED))?;
        // The rows of all experts are counted as one.
        let d_model = keys.whole_groups("embedding_length", keys.size("embedding_length", MAX_SIZE / n_expert)?)?;
        let d_ff = keys.size_of_all_layers("expert_feed_forward_length", n_layer, MAX_SIZE / n_expert)?;
        let d_ff = keys.whole_groups("expert_feed_forward_length", d_ff)?;

        let d_head = keys.d_head()?;
        // So that the rows of q, k and v together can be counted, too.
        let n_head = keys.size_of_all_layers("attention.head_count", n_layer, MAX_SIZE / (3 * d_head))?;
        let n_head_kv = keys.n_head_kv(n_head, n_layer)?;
        keys.whole_groups("attention.head_count times key_length", n_head * d_head)?;
        keys.only("attention.key_length_swa", d_head)?;
        keys.only("attention.value_length_swa", d_head)?;

        keys.only("attention.causal", true)?;
        keys.only("embedding_length_out", d_model)?;
        // Keys by which a file would ask for something else than the forward pass of gpt-oss.
        for name in [
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "pooling_type",
            "nextn_predict_layers",
        ] {
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
            n_expert,
            n_used,
            epsilon: keys.epsilon("attention.layer_norm_rms_epsilon")?,
        })
    }
}
