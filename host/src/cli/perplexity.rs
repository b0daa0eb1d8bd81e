//! `gamma perplexity`: how well a model predicts a text, by the procedure of llama.cpp's llama-perplexity, so that values
//! compare.

use std::io::{IsTerminal, Write, stderr};
use std::time::Instant;

use serde_json::json;

use super::args::Perplexity;
use super::error::Error;
use super::model::{self, Model};
use super::{Out, note, session};

/// Runs the command.
pub fn run(args: &Perplexity) -> Result<(), Error> {
    let text = model::prompt(&args.prompt)?;
    let model = Model::open(&args.model, &args.engine, &args.device)?;
    let n_ctx = model.options.n_ctx;
    let tokens = model.prompt_tokens(&text, args.prompt.specials)?;
    // The token at position p is predicted from those before, by the logits at p - 1.
    let first = n_ctx / 2;
    if n_ctx < first + 3 {
        return Err(Error::WindowTooSmall { n_ctx });
    }
    let n_whole = tokens.len() / n_ctx;
    if n_whole == 0 {
        return Err(Error::TextTooShort { found: tokens.len(), expected: n_ctx });
    }
    let n_chunks = args.chunks.0.unwrap_or(n_whole).min(n_whole);
    if let Some(asked) = args.chunks.0.filter(|&asked| asked > n_whole) {
        note(&format!("the text has {n_whole} windows of {n_ctx} tokens, fewer than --chunks {asked}"));
    }

    let stats = session::talks(args.stats);
    let mut engine = session::load(&model, &args.device, stats)?;
    let bar = session::bar("windows", "{pos}/{len}  PPL {prefix}");
    bar.set_length(n_chunks as u64);
    let start = Instant::now();
    let (mut losses, mut running) = (Losses::default(), Vec::new());
    for window in tokens.chunks_exact(n_ctx).take(n_chunks) {
        let mut window = window.to_vec();
        if let Some(bos) = model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos()) {
            window[0] = bos;
        }
        engine.reset();
        engine.prefill(&window[..first], &mut |_| {}).map_err(|error| model.engine_error(error))?;
        // The last token is only predicted, and none are predicted from it.
        let mut each = |position: usize, logits: &[f32]| {
            losses.add(loss(logits, window[position + 1]));
        };
        let scored = &window[first..n_ctx - 1];
        engine.prefill_all(scored, &mut each).map_err(|error| model.engine_error(error))?;
        running.push(losses.ppl());
        bar.set_prefix(format!("{:.4}", losses.ppl()));
        bar.inc(1);
        if !stderr().is_terminal() {
            // For a reader that watches the run, as llama-perplexity prints it.
            let _ = write!(stderr(), "[{}]{:.4},", running.len(), losses.ppl());
        }
    }
    bar.finish_and_clear();
    if !stderr().is_terminal() {
        let _ = writeln!(stderr());
    }
    if stats && let Some(rate) = session::rate(n_chunks * n_ctx, start.elapsed().as_secs_f64()) {
        let _ = writeln!(stderr(), "{n_chunks} windows of {n_ctx} tokens, {rate:.1} tokens/s");
    }

    let mut out = Out::new();
    let (ppl, error) = (losses.ppl(), losses.error());
    if args.json {
        out.json(&json!({
            "ppl": ppl,
            "error": error,
            "n_chunks": n_chunks,
            "n_ctx": n_ctx,
            "n_scored": losses.n,
            "running": running,
        }))?;
    } else {
        out.line(&format!("PPL = {ppl:.4} +/- {error:.5}"))?;
    }
    out.flush()
}

/// -ln of the probability that `logits` give `token`. Infinite if that is 0, NaN if a logit is.
fn loss(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - max)
}

/// What the scored tokens cost, in nats.
#[derive(Default)]
struct Losses {
    n: usize,
    sum: f64,
    sum_of_squares: f64,
}

impl Losses {
    fn add(&mut self, loss: f64) {
        self.n += 1;
        self.sum += loss;
        self.sum_of_squares += loss * loss;
    }

    fn mean(&self) -> f64 {
        self.sum / self.n as f64
    }

    fn ppl(&self) -> f64 {
        self.mean().exp()
    }

    /// Standard error of the mean, carried over to its exponential, as llama.cpp has it: n - 1 and not n below.
    fn error(&self) -> f64 {
        let variance = self.sum_of_squares / self.n as f64 - self.mean() * self.mean();
        // Rounding may leave less than nothing of equal losses.
        (variance.max(0.0) / (self.n - 1) as f64).sqrt() * self.ppl()
    }
}
