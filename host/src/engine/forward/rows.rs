//! Many tokens through the model: activations as rows of f16 against weights on tensor cores.

use cuda_std::{LaunchError, Launcher, f16};

use super::Model;
use crate::adapter::{ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, NormSpec};
use crate::device::View;
use crate::device::ops::{self, AttentionOut, Epilogue, ExpertsMatrix, ExpertsRowsWork, Rotation, Rows, RowsWork};
use crate::engine::load::{Experts, Matrix};
use crate::engine::plan::attention_shape;

/// Where a product goes: rows of f32 `stride` elements apart, or of f16 close by.
enum Out<'a> {
    F32 { out: View<'a, f32>, stride: usize },
    F16(View<'a, f16>),
}

impl Model {
    /// The tokens in `work.tokens` through all layers: into `work.x`, and their keys and values into the cache.
    pub(super) fn rows_layers(&self, launcher: &dyn Launcher, n_tokens: usize) -> Result<(), LaunchError> {
        let (spec, work, weights) = (&self.spec, &self.work, &self.weights);
        let q_width = spec.n_head * spec.d_head;
        let qkv_width = q_width + 2 * spec.n_head_kv * spec.d_head;
        let x = work.x.view().part(0..n_tokens * spec.d_model);
        let qkv = work.qkv.view().part(0..n_tokens * qkv_width);
        let attended = work.rows.view().part(0..n_tokens * q_width);
        let (tokens, state) = (work.tokens.view().part(0..n_tokens), work.state.view());

        let table = weights.matrix(spec.token_embedding);
        let positions = spec.position_embedding.map(|id| weights.vector(id).view());
        ops::embed(launcher, x, table.format, table.packed.view(), tokens, positions, state, spec.n_vocab)?;

        for (layer, cache) in spec.layers.iter().zip(&self.caches) {
            let rows = self.normed_rows(launcher, x, &layer.attention_norm)?;
            let bias = self.qkv_bias(layer);
            let mut first = 0;
            for matrix in self.qkv_matrices(layer) {
                let bias = bias.map(|bias| bias.part(first..first + matrix.n_out));
                let out = Out::F32 { out: qkv.part(first..qkv.len()), stride: qkv_width };
                self.rows_product(launcher, out, matrix, rows, bias, Epilogue::Store)?;
                first += matrix.n_out;
            }

            let shape = attention_shape(spec, &self.options, layer);
            let (frequencies, magnitude) = (work.frequencies.view(), self.rope_magnitude);
            if layer.attention.rope.is_some() {
                ops::rope(launcher, qkv, Rotation { frequencies, magnitude }, state, shape, n_tokens)?;
            }
            ops::kv_append(launcher, cache.view(), qkv, state, shape, n_tokens)?;
            let sinks = layer.attention.sinks.map(|id| weights.vector(id).view());
            let out = AttentionOut::F16(attended);
            ops::attention(launcher, out, qkv, cache.view(), state, sinks, shape, n_tokens)?;
            let attended = Rows { x: attended, factors: self.ones(n_tokens) };
            self.rows_linear(launcher, whole(x, spec.d_model), &layer.attention_output, attended, Epilogue::Add)?;

            self.rows_ffn(launcher, x, layer)?;
        }
        Ok(())
    }

    /// Logits of rows `first..first + n_rows` of the last forward pass.
    pub(super) fn rows_head(
        &self,
        launcher: &dyn Launcher,
        logits: View<f32>,
        first: usize,
        n_rows: usize,
    ) -> Result<(), LaunchError> {
        let d = self.spec.d_model;
        let x = self.work.x.view().part(first * d..(first + n_rows) * d);
        let rows = self.normed_rows(launcher, x, &self.spec.output_norm)?;
        self.rows_linear(launcher, whole(logits, self.spec.n_vocab), &self.spec.output, rows, Epilogue::Store)
    }

    fn rows_ffn(&self, launcher: &dyn Launcher, x: View<f32>, layer: &LayerSpec) -> Result<(), LaunchError> {
        let (work, d_model, d_ff) = (&self.work, self.spec.d_model, self.spec.d_ff);
        let n_tokens = x.len() / d_model;
        match &layer.ffn {
            FfnSpec::Gelu { up, down } => {
                let rows = self.normed_rows(launcher, x, &layer.ffn_norm)?;
                let inner = work.inner.view().cast::<f16>().part(0..n_tokens * d_ff);
                self.rows_linear(launcher, Out::F16(inner), up, rows, self.gelu())?;
                let inner = Rows { x: inner, factors: self.ones(n_tokens) };
                self.rows_linear(launcher, whole(x, d_model), down, inner, Epilogue::Add)
            }
            FfnSpec::MixtureOfExperts { router, n_expert, n_used, gate, up, down, activation: _ } => {
                let vector = |id| self.weights.vector(id).view();
                let matrix = |experts: &ExpertsSpec| {
                    let Experts { format, packed } = self.weights.experts(experts.weight);
                    ExpertsMatrix { format: *format, packed: packed.view(), bias: vector(experts.bias) }
                };
                let (gate, up, down) = (matrix(gate), matrix(up), matrix(down));
                // The router is f32: a rounded activation may choose another expert.
                let normed = work.normed.view().part(0..n_tokens * d_model);
                self.norm(launcher, normed, x, &layer.ffn_norm)?;
                if !ops::experts_rows_take(gate.format, down.format, d_model, d_ff) {
                    return self.ffn(launcher, x, normed, &layer.ffn);
                }
                let rows = self.normed_rows(launcher, x, &layer.ffn_norm)?;
                let slow = self.experts_work(n_tokens, *n_expert, *n_used);
                ops::route(launcher, &slow, normed, vector(router.weight), router.bias.map(vector))?;
                let experts = ExpertsRowsWork {
                    n_expert: *n_expert,
                    n_used: *n_used,
                    d_model,
                    d_ff,
                    warpgroup_pairs: self.device.has_warpgroups().then_some(ops::WARPGROUP_PAIRS),
                    ids: slow.ids,
                    weights: slow.weights,
                    pairs: slow.pairs,
                    tiles: slow.tiles,
                    h: work.inner.view().cast::<f16>().part(0..n_tokens * n_used * d_ff),
                    y: slow.y,
                };
                ops::experts_rows(launcher, &experts, x, rows.x, Some(rows.factors), gate, up, down)
            }
        }
    }

    /// The norms of the rows of `x`, in `work.rows`.
    fn normed_rows(&self, launcher: &dyn Launcher, x: View<f32>, norm: &NormSpec) -> Result<Rows<'_>, LaunchError> {
        let n_tokens = x.len() / self.spec.d_model;
        let factors = self.work.factors.view().part(0..n_tokens);
        let rows = Rows { x: self.work.rows.view().part(0..x.len()), factors };
        let vector = |id| self.weights.vector(id).view();
        match *norm {
            NormSpec::Layer { gamma, beta, epsilon } => {
                ops::layer_norm_rows(launcher, rows, x, vector(gamma), vector(beta), epsilon)?;
            }
            NormSpec::Rms { gamma, epsilon } => ops::rms_norm_rows(launcher, rows, x, vector(gamma), epsilon)?,
        }
        Ok(rows)
    }

    /// The factors of rows that are what they are.
    fn ones(&self, n_tokens: usize) -> View<'_, f32> {
        self.work.ones.view().part(0..n_tokens)
    }

    fn rows_linear(
        &self,
        launcher: &dyn Launcher,
        out: Out,
        linear: &LinearSpec,
        rows: Rows,
        epilogue: Epilogue,
    ) -> Result<(), LaunchError> {
        let bias = linear.bias.map(|id| self.weights.vector(id).view());
        self.rows_product(launcher, out, self.weights.matrix(linear.weight), rows, bias, epilogue)
    }

    fn rows_product(
        &self,
        launcher: &dyn Launcher,
        out: Out,
        matrix: &Matrix,
        rows: Rows,
        bias: Option<View<f32>>,
        epilogue: Epilogue,
    ) -> Result<(), LaunchError> {
        let work = RowsWork {
            partial: self.work.rows_partial.view(),
            counters: self.work.rows_counters.view(),
            warpgroups: self.device.has_warpgroups(),
        };
        let (out, stride, out16) = match out {
            Out::F32 { out, stride } => (Some(out), stride, None),
            Out::F16(out) => (None, matrix.n_out, Some(out)),
        };
        ops::linear_rows(launcher, out, stride, out16, matrix.rows(), rows, bias, epilogue, work)
    }
}

/// Rows of `width`, one behind the other.
fn whole(out: View<'_, f32>, width: usize) -> Out<'_> {
    Out::F32 { out, stride: width }
}
