//! One token through the model: as few launches as there are dependencies, five a layer.

use cuda_std::{LaunchError, Launcher};
use kernels::format::WeightFormat;

use super::Model;
use crate::adapter::{ExpertsSpec, FfnSpec, LayerSpec, LinearSpec, NormSpec};
use crate::device::View;
use crate::device::ops::{
    self, Cut, Epilogue, ExpertsMatrix, Norm, Rotation, RouterFinish, RouterParts, TokenExperts, TokenWork,
};
use crate::engine::load::{Experts, Matrix};
use crate::engine::plan::attention_shape;

impl Model {
    /// The token in `work.tokens` through all layers: into `work.x`, and its keys and values into the cache.
    pub(super) fn token_layers(&self, launcher: &dyn Launcher) -> Result<(), LaunchError> {
        let (spec, work, weights) = (&self.spec, &self.work, &self.weights);
        let q_width = spec.n_head * spec.d_head;
        let x = work.x.view().part(0..spec.d_model);
        let qkv = work.qkv.view().part(0..q_width + 2 * spec.n_head_kv * spec.d_head);
        let attended = work.attended.view().part(0..q_width);
        let (tokens, state) = (work.tokens.view().part(0..1), work.state.view());

        let table = weights.matrix(spec.token_embedding);
        let positions = spec.position_embedding.map(|id| weights.vector(id).view());
        ops::embed(launcher, x, table.format, table.packed.view(), tokens, positions, state, spec.n_vocab)?;

        for (layer, cache) in spec.layers.iter().zip(&self.caches) {
            self.token_qkv(launcher, qkv, x, layer)?;
            let shape = attention_shape(spec, &self.options, layer);
            let (frequencies, magnitude) = (work.frequencies.view(), self.rope_magnitude);
            let rotation = layer.attention.rope.is_some().then_some(Rotation { frequencies, magnitude });
            let sinks = layer.attention.sinks.map(|id| weights.vector(id).view());
            let token_work = TokenWork { partial: work.partial.view(), counters: work.counters.view() };
            ops::attention_token(launcher, attended, qkv, cache.view(), state, rotation, sinks, token_work, shape)?;
            self.token_ffn(launcher, x, attended, layer)?;
        }
        Ok(())
    }

    /// The logits of the token that [`token_layers`](Self::token_layers) left, or of row `row` of several.
    pub(super) fn token_head(&self, launcher: &dyn Launcher, logits: View<f32>, row: usize) -> Result<(), LaunchError> {
        let d = self.spec.d_model;
        let x = self.work.x.view().part(row * d..(row + 1) * d);
        self.product(launcher, logits, x, Some(&self.spec.output_norm), &self.spec.output, Epilogue::Store)
    }

    /// Queries, keys and values: one product if the file has one tensor or three of one type.
    fn token_qkv(
        &self,
        launcher: &dyn Launcher,
        qkv: View<f32>,
        x: View<f32>,
        layer: &LayerSpec,
    ) -> Result<(), LaunchError> {
        let bias = self.qkv_bias(layer);
        let mut first = 0;
        for matrix in self.qkv_matrices(layer) {
            let rows = first..first + matrix.n_out;
            let bias = bias.map(|bias| bias.part(rows.clone()));
            let out = qkv.part(rows.clone());
            self.normed_product(launcher, out, x, Some(&layer.attention_norm), matrix, bias, Epilogue::Store)?;
            first = rows.end;
        }
        Ok(())
    }

    /// What follows attention, added to `x`.
    fn token_ffn(
        &self,
        launcher: &dyn Launcher,
        x: View<f32>,
        attended: View<f32>,
        layer: &LayerSpec,
    ) -> Result<(), LaunchError> {
        match &layer.ffn {
            FfnSpec::Gelu { up, down } => {
                let inner = self.work.inner.view().part(0..self.spec.d_ff);
                self.product(launcher, x, attended, None, &layer.attention_output, Epilogue::Add)?;
                self.product(launcher, inner, x, Some(&layer.ffn_norm), up, self.gelu())?;
                self.product(launcher, x, inner, None, down, Epilogue::Add)
            }
            FfnSpec::MixtureOfExperts { router, n_expert, n_used, gate, up, down, activation: _ } => {
                let vector = |id| self.weights.vector(id).view();
                let matrix = |experts: &ExpertsSpec| {
                    let Experts { format, packed } = self.weights.experts(experts.weight);
                    ExpertsMatrix { format: *format, packed: packed.view(), bias: vector(experts.bias) }
                };
                let (gate, up, down) = (matrix(gate), matrix(up), matrix(down));
                let output = self.weights.matrix(layer.attention_output.weight);
                let (d, d_ff) = (self.spec.d_model, self.spec.d_ff);
                let is_mxfp4 = [gate.format, up.format, down.format] == [WeightFormat::Mxfp4; 3];
                let fits = ops::experts_token_fits(*n_expert, *n_used, d, d_ff)
                    && ops::router_fits(output.linear(), *n_expert, self.cut());
                let (NormSpec::Rms { gamma, epsilon }, true) =
                    (&layer.ffn_norm, is_mxfp4 && fits && !self.device.prefers_scalars())
                else {
                    self.product(launcher, x, attended, None, &layer.attention_output, Epilogue::Add)?;
                    let normed = self.work.normed.view().part(0..d);
                    self.norm(launcher, normed, x, &layer.ffn_norm)?;
                    return self.ffn(launcher, x, normed, &layer.ffn);
                };
                // The product that makes x also multiplies its share of it with the router; the experts' first kernel adds
                // the shares up.
                let n_parts = ops::router_parts(output.linear(), *n_expert, self.cut());
                let parts = self.work.parts.view().part(0..n_parts * (n_expert + 1));
                let (router_weight, gamma) = (vector(router.weight), vector(*gamma));
                let router_parts = RouterParts { weight: router_weight, gamma, parts };
                let bias = layer.attention_output.bias.map(vector);
                let shares = Some(router_parts);
                ops::linear_fused(
                    launcher,
                    x,
                    output.linear(),
                    attended,
                    None,
                    bias,
                    Epilogue::Add,
                    shares,
                    self.cut(),
                )?;
                let finish = RouterFinish { parts, gamma, bias: router.bias.map(vector), epsilon: *epsilon };
                let token = TokenExperts {
                    n_blocks: self.device.multiprocessors(),
                    n_expert: *n_expert,
                    d_model: d,
                    d_ff,
                    ids: self.work.expert_ids.view().part(0..*n_used),
                    weights: self.work.expert_weights.view().part(0..*n_used),
                    h: self.work.token_h.view().part(0..n_used * d_ff / 2),
                };
                ops::experts_token(launcher, &token, x, finish, gate, up, down)
            }
        }
    }

    /// A few warps for each of the emulator's threads, so that none waits long for the last; blocks for the multiprocessors of a
    /// GPU.
    fn cut(&self) -> Cut {
        match self.device.prefers_scalars() {
            true => Cut::Warps(4 * self.device.multiprocessors()),
            false => Cut::Multiprocessors(self.device.multiprocessors()),
        }
    }

    fn product(
        &self,
        launcher: &dyn Launcher,
        out: View<f32>,
        x: View<f32>,
        norm: Option<&NormSpec>,
        linear: &LinearSpec,
        epilogue: Epilogue,
    ) -> Result<(), LaunchError> {
        let bias = linear.bias.map(|id| self.weights.vector(id).view());
        self.normed_product(launcher, out, x, norm, self.weights.matrix(linear.weight), bias, epilogue)
    }

    fn normed_product(
        &self,
        launcher: &dyn Launcher,
        out: View<f32>,
        x: View<f32>,
        norm: Option<&NormSpec>,
        matrix: &Matrix,
        bias: Option<View<f32>>,
        epilogue: Epilogue,
    ) -> Result<(), LaunchError> {
        let vector = |id| self.weights.vector(id).view();
        let fused = norm.map(|norm| match *norm {
            NormSpec::Layer { gamma, beta, epsilon } => {
                Norm::Layer { gamma: vector(gamma), beta: vector(beta), epsilon }
            }
            NormSpec::Rms { gamma, epsilon } => Norm::Rms { gamma: vector(gamma), epsilon },
        });
        if let Some(norm) = norm
            && !ops::norm_fits(matrix.n_in, matches!(norm, NormSpec::Layer { .. }))
        {
            let normed = self.work.normed.view().part(0..matrix.n_in);
            self.norm(launcher, normed, x, norm)?;
            return ops::linear_fused(launcher, out, matrix.linear(), normed, None, bias, epilogue, None, self.cut());
        }
        ops::linear_fused(launcher, out, matrix.linear(), x, fused, bias, epilogue, None, self.cut())
    }
}
